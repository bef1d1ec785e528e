//! Matrix products, and whatever is one once its operands are read from the right places: `C[z, m, n] = finish(Σ_k A[z, m, k] · B[z, k, n])`.
//!
//! # Which kernel, and of what tile
//!
//! Tensor cores (`product_tensor.cu`) for elements of 16 bits, for bytes, and for f32 where [`Precision::Tf32`] is asked for; else
//! `product_plain.cu`; for at most 8 rows `product_rows.cu`. A tile is chosen by predicted clocks: blocks go over the multiprocessors in waves, and a block's step costs
//! the most of what it multiplies, what its warps read from shared memory, and what it brings from the level-2 cache, but no less than the
//! latency of memory over the stages under way; the whole no less than reading the factors once. Where tiles are too few for the device, k is split over blocks; the parts lie in the workspace
//! and a second kernel adds them in order, so a result is the same in every run.

use super::{
    Argument, Device, Element, Functions, Kernel, Launch, Precision, Refused,
    text::{begin, check_count, check_grid, constant, index_text},
};
use std::fmt::Write;

/// Which neighbours of a factor lie together in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Along k: `[m, k]` of the first factor, `[n, k]` of the second.
    ByK,
    /// Along the other axis: `[k, m]` of the first, `[k, n]` of the second.
    ByOuter,
}

/// Where a factor's elements come from.
#[derive(Clone, Debug)]
pub enum Operand {
    /// An array whose rows are `leading` elements apart, aligned to 16 bytes; its matrix for batch coordinates is `batch` elements away along
    /// each (0: repeated). Of bytes, the order has to be [`Order::ByK`].
    Array { order: Order, leading: usize, batch: Vec<usize> },
    /// `a_at` or `b_at` of [`Functions`]; the order says along which axis it is best asked.
    Function { order: Order },
}

/// A product's description. Its inputs are `A` (0) and `B` (1), in [`Element`]s of `elements`; those of functions are not arguments.
#[derive(Clone, Debug)]
pub struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Extents of batch axes; the result is `[batch…, m, n]`, row-major.
    pub batch: Vec<usize>,
    pub a: Operand,
    pub b: Operand,
    /// Of A and B: the same, or u8 and i8.
    pub elements: [Element; 2],
    pub result: Element,
    pub precision: Precision,
    /// Whether `finish` gets the row as its channel, rather than the column.
    pub channel_is_row: bool,
    pub functions: Functions,
}

/// Which kernel a product has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// `product_tensor.cu`.
    Tensor,
    /// `product_plain.cu`.
    Plain,
    /// `product_rows.cu`: at most 8 rows, at the speed of memory. A tile's k is how many warps share columns.
    Rows,
}

/// How a product is cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    pub way: Way,
    /// Elements of C a block computes, and along k at a time.
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Elements of C a warp (on tensor cores) or a thread (without) computes.
    pub part_m: usize,
    pub part_n: usize,
    /// Tiles under way on tensor cores.
    pub stages: usize,
    /// Parts that k is split into.
    pub splits: usize,
}

impl Product {
    /// The kernel for the tile that the cost model prefers.
    pub fn kernel(&self, device: Device) -> Result<Kernel, Refused> {
        let core = self.core()?;
        let (tile, _) = core.candidates(device)?.remove(0);
        core.kernel(device, tile)
    }

    /// Tiles that a tuner may try with the clocks that are predicted of them, best first.
    pub fn candidates(&self, device: Device) -> Result<Vec<(Tile, f64)>, Refused> {
        self.core()?.candidates(device)
    }

    pub fn kernel_of(&self, device: Device, tile: Tile) -> Result<Kernel, Refused> {
        self.core()?.kernel(device, tile)
    }

    fn core(&self) -> Result<Core, Refused> {
        let count: usize = self.batch.iter().product();
        let place = |operand: &Operand, outer: &str, extent: usize, element: Element| match operand {
            Operand::Array { order, leading, batch } => {
                let (fast, slow, along) = match order {
                    Order::ByK => ("k", outer, self.k),
                    Order::ByOuter => (outer, "k", extent),
                };
                let begin = index_text(&self.batch, batch, "z");
                let text = format!(
                    "at = {begin} + {slow} * {leading}u + {fast};\nreturn {outer} < {extent}u && k < {}u;",
                    self.k
                );
                let copy = aligned(&[&[along, *leading], &batch[..]].concat(), element);
                Factor { order: *order, copy, place: text }
            }
            Operand::Function { order } => {
                Factor { order: *order, copy: 0, place: format!("return {outer} < {extent}u && k < {}u;", self.k) }
            }
        };
        let (m, n) = (self.m, self.n);
        Ok(Core {
            m,
            n,
            k: self.k,
            z: count,
            a: place(&self.a, "m", m, self.elements[0]),
            b: place(&self.b, "n", n, self.elements[1]),
            inputs: [0, 1],
            elements: self.elements,
            result: self.result,
            precision: self.precision,
            result_place: format!("(z * {m}u + m) * {n}u + n"),
            result_aligned: n,
            channel: if self.channel_is_row { "m" } else { "n" }.to_string(),
            functions: self.functions.clone(),
            outside: None,
            inner: None,
            name: "product",
        })
    }
}

/// How many bytes of neighbours lie together, aligned, where rows and matrices are multiples of `extents` elements apart and the last row
/// ends after such a multiple: 16, 8, 4, or one element's.
pub(super) fn aligned(extents: &[usize], element: Element) -> usize {
    let fits = |bytes: usize| extents.iter().all(|&extent| (extent * element.bytes()).is_multiple_of(bytes));
    [16, 8, 4].into_iter().find(|&bytes| bytes >= element.bytes() && fits(bytes)).unwrap_or(element.bytes())
}

/// A factor as text.
pub(super) struct Factor {
    pub order: Order,
    /// Bytes that lie together; 0 where a function gives elements.
    pub copy: usize,
    /// Body of `bool place(u32 z, u32 m or n, u32 k, u32& at)`.
    pub place: String,
}

/// A product whose factors and result lie wherever text says: what convolutions are, too.
pub(super) struct Core {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub z: usize,
    pub a: Factor,
    pub b: Factor,
    /// Which inputs A and B are.
    pub inputs: [usize; 2],
    pub elements: [Element; 2],
    pub result: Element,
    pub precision: Precision,
    /// Where element (z, m, n) of C lies, and what its channel is.
    pub result_place: String,
    pub channel: String,
    /// C's elements lie together in groups of this many along n, each beginning at a multiple of it.
    pub result_aligned: usize,
    pub functions: Functions,
    /// The input that holds 16 bytes of what A is where it is outside, if that is not zero.
    pub outside: Option<usize>,
    /// A product in the middle of something reads B from the workspace and writes C behind it.
    pub inner: Option<Inner>,
    pub name: &'static str,
}

/// Where a product in the middle has its operands, in elements from the workspace's begin.
pub(super) struct Inner {
    pub b: usize,
    pub output: usize,
    /// Where the workspace is free.
    pub parts: usize,
    /// Members of `Operands` beside A and the workspace.
    pub members: Vec<(&'static str, String, Argument)>,
    /// Text behind the product's.
    pub text: String,
}

/// Bytes a clock that a multiprocessor gets from memory and from the level-2 cache.
const MEMORY_BYTES: f64 = 13.0;
const LEVEL2_BYTES: f64 = 32.0;

impl Core {
    fn uses_tensor_cores(&self) -> bool {
        self.elements[0] != Element::F32 || self.precision == Precision::Tf32
    }

    fn check(&self, device: Device) -> Result<(), Refused> {
        let [a, b] = self.elements;
        let is_sum = |of: &[Element]| of.contains(&self.result);
        let fits = match (a, b) {
            (Element::F32, Element::F32) => is_sum(&[Element::F32]),
            (Element::F16, Element::F16) => is_sum(&[Element::F16, Element::F32]),
            (Element::BF16, Element::BF16) => is_sum(&[Element::BF16, Element::F32]) && device.sm >= 80,
            (Element::I8 | Element::U8, Element::I8) => {
                let by_k = [&self.a, &self.b].iter().all(|factor| factor.order == Order::ByK);
                is_sum(&[Element::I32, Element::I8, Element::U8]) && by_k
            }
            _ => false,
        };
        if !fits || (self.precision == Precision::Tf32 && device.sm < 80) {
            let what = format!("{} · {} to {}", a.name(), b.name(), self.result.name());
            return Err(Refused(format!("no product of {what} for compute capability {}", device.sm)));
        }
        for (what, count) in [
            ("a first factor", self.z * self.m * self.k),
            ("a second factor", self.z * self.k * self.n),
            ("a product", self.z * self.m * self.n),
        ] {
            check_count(what, count)?;
        }
        Ok(())
    }

    pub fn candidates(&self, device: Device) -> Result<Vec<(Tile, f64)>, Refused> {
        self.check(device)?;
        let mut candidates = Vec::new();
        for &tile in if self.uses_tensor_cores() { TENSOR_TILES } else { PLAIN_TILES } {
            let element = self.elements[0].bytes();
            let mut tile = tile;
            if tile.way == Way::Tensor {
                tile.k = 64 / element;
                tile.stages = if device.sm < 80 { 2 } else { tile.stages };
            }
            // On 7.5 that tile's sums don't fit the registers.
            let spills = tile.way == Way::Tensor && device.sm < 80 && (tile.m, tile.n) == (32, 128);
            if spills || self.shared_bytes(tile) > device.shared_bytes as usize {
                continue;
            }
            let steps = self.k.div_ceil(tile.k).max(1);
            for splits in [1, 2, 4, 8, 16, 32] {
                // Every part has steps of its own, and more than one.
                let each = steps.div_ceil(splits);
                if splits > 1 && (each < 2 || each * (splits - 1) >= steps) {
                    continue;
                }
                let tile = Tile { splits, ..tile };
                candidates.push((tile, self.clocks(device, tile)));
            }
        }
        candidates.extend(self.row_tiles(device));
        candidates.sort_by(|(_, a), (_, b)| a.total_cmp(b));
        Ok(candidates)
    }

    /// Whether both factors are read 16 bytes at a time where there are few rows.
    fn is_wide(&self) -> bool {
        self.b.copy == 16 && (self.a.copy == 16 || self.b.order == Order::ByOuter)
    }

    /// Tiles for few rows, with their clocks: reading the second factor once, unless its readers are too few to keep memory busy.
    fn row_tiles(&self, device: Device) -> Vec<(Tile, f64)> {
        let element = self.elements[0].bytes();
        let by_k = self.b.order == Order::ByK;
        if !(1..=8).contains(&self.m)
            || self.a.order != Order::ByK
            || self.a.copy * self.b.copy == 0
            || element == 1
            || self.z > 65535
        {
            return Vec::new();
        }
        let each = if self.is_wide() { 16 / element } else { 1 };
        let columns = if self.m <= 4 { 2 } else { 1 };
        let mut tiles = Vec::new();
        for (warps, splits) in [1, 2, 4, 8].into_iter().flat_map(|warps| [1, 2, 4, 8, 16].map(|splits| (warps, splits)))
        {
            let (n, step) = if by_k { (8 / warps * columns, 32 * each * warps) } else { (32 * each, 8) };
            let is_one = by_k || warps == 1;
            if !is_one || (splits > 1 && step * splits * 2 > self.k) {
                continue;
            }
            let tile =
                Tile { way: Way::Rows, m: self.m, n, k: warps, part_m: self.m, part_n: columns, stages: 1, splits };
            let blocks = (self.n.div_ceil(n) * self.z * splits) as f64;
            let sms = f64::from(device.multiprocessors);
            // Two blocks a multiprocessor have enough loads under way.
            let busy = (blocks / (2.0 * sms)).min(1.0);
            // Of narrow loads, instructions are the limit.
            let bytes = (self.z * self.k * self.n * element) as f64 * (16.0 / (each * element) as f64).sqrt();
            let trips = self.k.div_ceil(step * splits) as f64;
            let second = if splits > 1 { 3000.0 } else { 0.0 };
            let clocks = 1500.0 + (bytes / (MEMORY_BYTES * sms * busy)).max(trips * 200.0) + second;
            tiles.push((tile, clocks));
        }
        tiles
    }

    /// Clocks that the product takes, after the model at the head of this file.
    fn clocks(&self, device: Device, tile: Tile) -> f64 {
        const SHARED_BYTES: f64 = 128.0;
        const LATENCY: f64 = 700.0;
        const LAUNCH: f64 = 3000.0;
        let element = self.elements[0].bytes();
        let blocks = (self.m.div_ceil(tile.m) * self.n.div_ceil(tile.n) * self.z * tile.splits) as f64;
        let sms = f64::from(device.multiprocessors);
        let (m, n, k) = (tile.m as f64, tile.n as f64, tile.k as f64);
        let bytes = (m + n) * k * element as f64;
        let (rate, read, resident) = if self.uses_tensor_cores() {
            // Multiplications a clock of f16 by `mma.sync`.
            let rate = match device.sm {
                90.. => 1280.0,
                80 => 1024.0,
                _ => 512.0,
            };
            let warps = (tile.m / tile.part_m * (tile.n / tile.part_n)) as f64;
            let read = warps * (tile.part_m + tile.part_n) as f64 * k * element as f64;
            let most = device.shared_bytes as usize / self.shared_bytes(tile).max(1);
            (rate * 2.0 / element as f64, read, most.min(2048 / (32 * warps as usize)).min(3))
        } else {
            let rate = if matches!(device.sm, 75 | 80) { 64.0 } else { 128.0 };
            let (part_m, part_n) = (tile.part_m as f64, tile.part_n as f64);
            let threads = m * n / (part_m * part_n);
            // Beside multiplications a thread issues what reads their factors, and a little for the loop.
            let efficiency = part_m * part_n / (part_m * part_n + (part_m + part_n) / 2.0 + 4.0);
            (rate * efficiency, threads * (part_m + part_n) * k, (1024.0 / threads) as usize)
        };
        let waves = (blocks / sms).ceil();
        let together = waves.min(resident.max(1) as f64);
        // One block alone waits for memory at every step, unless more are under way.
        let wait = LATENCY / (tile.stages.max(2) - 1) as f64 / together;
        let busy = (m * n * k / rate).max((read + bytes) / SHARED_BYTES).max(bytes / LEVEL2_BYTES);
        let step = busy.max(wait);
        let steps = self.k.div_ceil(tile.k).div_ceil(tile.splits) as f64;
        let end = 600.0 + m * n * self.result.bytes() as f64 / LEVEL2_BYTES;
        let second = match tile.splits {
            1 => 0.0,
            splits => LAUNCH + (2 * splits * self.z * self.m * self.n * 4) as f64 / (LEVEL2_BYTES * sms),
        };
        let moved = self.z * ((self.m + self.n) * self.k * element + self.m * self.n * self.result.bytes());
        (waves * (steps * step + end)).max(moved as f64 / (MEMORY_BYTES * sms)) + LATENCY + second
    }

    /// Dynamic shared memory of a block.
    fn shared_bytes(&self, tile: Tile) -> usize {
        if tile.way != Way::Tensor {
            return 0;
        }
        let element = self.elements[0].bytes();
        let part = |factor: &Factor, outer: usize| match factor.order {
            Order::ByOuter if element == 4 => tile.k * (outer * 4 + 32),
            _ => tile.k * outer * element,
        };
        tile.stages * (part(&self.a, tile.m) + part(&self.b, tile.n))
    }

    pub fn kernel(&self, device: Device, tile: Tile) -> Result<Kernel, Refused> {
        self.check(device)?;
        let is_tensor = tile.way == Way::Tensor;
        let is_bytes = self.elements[0].bytes() == 1;
        let sum = if is_bytes { "i32" } else { "float" };
        let [a, b] = self.elements;
        let mut members = Vec::new();
        for (at, name, factor, element) in [(0, "a", &self.a, a), (1, "b", &self.b, b)] {
            if factor.copy > 0 && (self.inner.is_none() || name == "a") {
                members.push((name, format!("const {}*", element.name()), Argument::Input(self.inputs[at])));
            }
        }
        if let Some(input) = self.outside {
            members.push(("outside", format!("const {}*", a.name()), Argument::Input(input)));
        }
        match &self.inner {
            None => members.push(("output", format!("{}*", self.result.name()), Argument::Output(0))),
            Some(inner) => members.extend(inner.members.iter().cloned()),
        }
        if tile.splits > 1 && self.inner.is_none() {
            members.push(("workspace", format!("{sum}*"), Argument::Workspace));
        }
        let (mut text, arguments) = begin(&members, &self.functions, sum);
        let sizes = [
            ("M", self.m),
            ("N", self.n),
            ("K", self.k),
            ("Z", self.z),
            ("BM", tile.m),
            ("BN", tile.n),
            ("BK", tile.k),
            ("SPLITS", tile.splits),
        ];
        text.extend(sizes.map(|(name, value)| constant(name, value)));
        let sizes = match tile.way {
            Way::Tensor => [("WARP_M", tile.part_m), ("WARP_N", tile.part_n), ("STAGES", tile.stages)],
            Way::Plain => [("TM", tile.part_m), ("TN", tile.part_n), ("STAGES", tile.stages)],
            Way::Rows => [("COLUMNS", tile.part_n), ("WARPS_K", tile.k), ("STAGES", tile.stages)],
        };
        text.extend(sizes.map(|(name, value)| constant(name, value)));
        let _ = writeln!(text, "using Element = {};\nusing ElementB = {};", a.name(), b.name());
        let _ = writeln!(text, "using Result = {};", self.result.name());
        let is_tf32 = is_tensor && a == Element::F32;
        let pairs = self.result_aligned.is_multiple_of(2);
        let fours = self.result_aligned.is_multiple_of(4);
        let _ = writeln!(
            text,
            "constexpr bool IS_TF32 = {is_tf32}, PAIRS = {pairs}, FOURS = {fours}, WIDE = {};",
            self.is_wide()
        );
        for (name, factor, axes, element) in
            [("a", &self.a, "u32 m, u32 k", "Element"), ("b", &self.b, "u32 k, u32 n", "ElementB")]
        {
            let upper = name.to_uppercase();
            let copy = if is_tensor || matches!(factor.copy, 0 | 16) { factor.copy } else { 4 };
            let _ = writeln!(text, "constexpr bool {upper}_BY_K = {};", factor.order == Order::ByK);
            text += &constant(&format!("{upper}_COPY"), copy);
            let array = match &self.inner {
                _ if factor.copy == 0 => "nullptr".to_string(),
                Some(inner) if name == "b" => format!("o.workspace + {}u", inner.b),
                _ => format!("o.{name}"),
            };
            let _ = writeln!(
                text,
                "__device__ __forceinline__ const {element}* {name}_array(const Operands& o) {{ return {array}; }}"
            );
            let place = format!("__device__ __forceinline__ bool {name}_place(u32 z, {axes}, u32& at)");
            let _ = writeln!(text, "{place} {{\n{}\n}}", factor.place);
            let coordinates = axes.replace("u32 ", "");
            let value = match factor.copy {
                0 => format!("narrow({element}(), {name}_at(o, z, {coordinates}))"),
                _ => format!("{element}()"),
            };
            let _ = writeln!(
                text,
                "__device__ __forceinline__ {element} {name}_value(const Operands& o, u32 z, {axes}) {{ return {value}; }}"
            );
        }
        let (output, parts) = match &self.inner {
            None => (
                "o.output".to_string(),
                if tile.splits > 1 { "o.workspace".to_string() } else { "nullptr".to_string() },
            ),
            Some(inner) => (format!("o.workspace + {}u", inner.output), format!("o.workspace + {}u", inner.parts)),
        };
        let outside = if self.outside.is_some() { "o.outside" } else { "nullptr" };
        let _ = writeln!(
            text,
            "__device__ __forceinline__ const Element* a_outside(const Operands& o) {{ return {outside}; }}"
        );
        let finish = if self.inner.is_some() { "x" } else { "finish(o, i, channel, x)" };
        let _ = writeln!(
            text,
            "__device__ __forceinline__ Result* output_array(const Operands& o) {{ return {output}; }}
__device__ __forceinline__ Sum finish_sum(const Operands& o, u32 i, u32 channel, Sum x) {{ return {finish}; }}"
        );
        let _ = writeln!(text, "__device__ __forceinline__ Sum* parts_of(const Operands& o) {{ return {parts}; }}");
        for (name, value) in [("result_place", &self.result_place), ("channel_of", &self.channel)] {
            let _ = writeln!(text, "__device__ __forceinline__ u32 {name}(u32 z, u32 m, u32 n) {{ return {value}; }}");
        }
        text += match tile.way {
            Way::Tensor => include_str!("../../cuda/product_tensor.cu"),
            Way::Plain => include_str!("../../cuda/product_plain.cu"),
            Way::Rows => include_str!("../../cuda/product_rows.cu"),
        };
        let count = self.z * self.m * self.n;
        let threads = match tile.way {
            Way::Tensor => tile.m / tile.part_m * (tile.n / tile.part_n) * 32,
            Way::Plain => tile.m / tile.part_m * (tile.n / tile.part_n),
            Way::Rows => 256,
        };
        let kind = if is_tf32 { "tf32" } else { a.name() };
        let entry = format!("{}_{kind}_{}x{}x{}", self.name, tile.m, tile.n, tile.k);
        let mut launches = Vec::new();
        if count > 0 {
            let blocks = self.m.div_ceil(tile.m) * self.n.div_ceil(tile.n);
            let grid = match tile.way {
                Way::Rows => check_grid([blocks, tile.splits, self.z])?,
                _ => check_grid([blocks * self.z, tile.splits, 1])?,
            };
            let shared_bytes = self.shared_bytes(tile) as u32;
            launches.push(Launch { entry: entry.clone(), grid, block: threads as u32, shared_bytes });
            if tile.splits > 1 {
                text += include_str!("../../cuda/product_splits.cu");
                let grid = check_grid([count.div_ceil(256), 1, 1])?;
                launches.push(Launch { entry: format!("{entry}_splits"), grid, block: 256, shared_bytes: 0 });
            }
        }
        let before = self.inner.as_ref().map_or(0, |inner| inner.parts * 4);
        let workspace_bytes = before + if tile.splits > 1 { tile.splits * count * 4 } else { 0 };
        text += self.inner.as_ref().map_or("", |inner| &inner.text);
        Ok(Kernel { source: text.replace("ENTRY", &entry), launches, arguments, workspace_bytes })
    }
}

const fn tensor(m: usize, n: usize, part_m: usize, part_n: usize, stages: usize) -> Tile {
    // A step is 64 bytes along k, whatever the element.
    Tile { way: Way::Tensor, m, n, k: 0, part_m, part_n, stages, splits: 1 }
}

const fn plain(m: usize, n: usize, k: usize, part_m: usize, part_n: usize) -> Tile {
    Tile { way: Way::Plain, m, n, k, part_m, part_n, stages: 2, splits: 1 }
}

const TENSOR_TILES: &[Tile] = &[
    tensor(128, 256, 64, 64, 3),
    tensor(128, 128, 64, 32, 4),
    tensor(128, 64, 32, 32, 4),
    tensor(64, 128, 32, 32, 4),
    tensor(64, 64, 32, 32, 4),
    tensor(32, 128, 32, 32, 4),
    tensor(32, 64, 16, 32, 4),
    tensor(16, 128, 16, 32, 4),
];

const PLAIN_TILES: &[Tile] = &[
    plain(128, 128, 8, 8, 8),
    plain(128, 64, 16, 8, 8),
    plain(64, 128, 16, 8, 8),
    plain(64, 64, 16, 8, 4),
    plain(32, 128, 16, 4, 8),
    plain(32, 64, 16, 4, 4),
];
