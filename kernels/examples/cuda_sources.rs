//! Writes the source of every hand-made CUDA kernel, for three GPUs, into a folder, for compilers: `cuda_sources FOLDER`. `cargo xtask cuda`
//! runs it. A file's name begins with the compute capability; its first line says which instructions it has to have, and how often.

use cutover_kernels::cuda::{
    Attention, BlockedProduct, Cell, Conv, Device, Element, Functions, Kernel, Layout, Operand, Order, Precision,
    Product, Recurrence, Refused, RowFunction, Rows, Transpose, Way, Winograd,
};
use std::{collections::BTreeSet, ffi::OsString, path::PathBuf};

/// `mma.sync` and so on, and how many of them a kernel has at least.
type Needs = Vec<(&'static str, usize)>;

fn main() -> std::io::Result<()> {
    let folder = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| "target/cuda/sources".to_string()));
    std::fs::create_dir_all(&folder)?;
    let mut sources = Sources { folder, device: Device::T4, written: BTreeSet::new() };
    for device in [Device::T4, Device::ORIN, Device::H100] {
        sources.device = device;
        products(&mut sources)?;
        convolutions(&mut sources)?;
        attentions(&mut sources)?;
        few_rows(&mut sources)?;
        rows(&mut sources)?;
        recurrences(&mut sources)?;
    }
    sources.remove_others()
}

/// The folder, and what was written into it.
struct Sources {
    folder: PathBuf,
    device: Device,
    written: BTreeSet<OsString>,
}

impl Sources {
    /// Writes a kernel, unless the device has none; a file that is the same keeps its time.
    fn write(&mut self, name: &str, kernel: Result<Kernel, Refused>, needs: &Needs) -> std::io::Result<()> {
        let Ok(kernel) = kernel else { return Ok(()) };
        let needs: Vec<String> = needs.iter().map(|(what, count)| format!("{what}:{count}")).collect();
        let text = format!("// needs {}\n{}", needs.join(" "), kernel.source);
        let stem = format!("sm_{}-{name}", self.device.sm);
        let path = self.folder.join(format!("{stem}.cu"));
        self.written.insert(stem.into());
        if std::fs::read_to_string(&path).is_ok_and(|old| old == text) {
            return Ok(());
        }
        std::fs::write(path, text)
    }

    /// Removes files of kernels that are no more.
    fn remove_others(&self) -> std::io::Result<()> {
        for entry in std::fs::read_dir(&self.folder)? {
            let path = entry?.path();
            if path.file_stem().is_none_or(|stem| !self.written.contains(stem)) {
                std::fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

fn products(sources: &mut Sources) -> std::io::Result<()> {
    let device = sources.device;
    let is_new = device.sm >= 80;
    for (elements, result, precision) in [
        ([Element::F32; 2], Element::F32, Precision::Full),
        ([Element::F32; 2], Element::F32, Precision::Tf32),
        ([Element::F16; 2], Element::F16, Precision::Full),
        ([Element::BF16; 2], Element::BF16, Precision::Full),
        ([Element::I8; 2], Element::I32, Precision::Full),
        ([Element::U8, Element::I8], Element::I32, Precision::Full),
    ] {
        for by_k in [[true, true], [true, false]] {
            let order = |by_k: bool| if by_k { Order::ByK } else { Order::ByOuter };
            let operand = |by_k: bool| Operand::Array { order: order(by_k), leading: 1024, batch: vec![] };
            let product = Product {
                m: 1024,
                n: 1024,
                k: 1024,
                batch: vec![],
                a: operand(by_k[0]),
                b: operand(by_k[1]),
                elements,
                result,
                precision,
                channel_is_row: false,
                functions: bias_and_gelu(elements[0]),
            };
            let Ok(candidates) = product.candidates(device) else { continue };
            for (tile, _) in candidates
                .iter()
                .filter(|(tile, _)| tile.splits == 1 || (tile.splits == 2 && tile.m == 64 && tile.n == 64))
            {
                let is_plain = elements[0] == Element::F32 && precision == Precision::Full;
                let mut needs = Needs::new();
                if is_plain {
                    needs.extend([
                        ("fma.rn.f32", tile.part_m * tile.part_n * tile.k),
                        ("ld.global.v4", 2),
                        ("ld.shared.v4", tile.k),
                    ]);
                } else {
                    let depth = 32 / elements[0].bytes();
                    needs.push(("mma.sync", tile.part_m / 16 * (tile.part_n / 8) * (tile.k / depth)));
                    let transposes = precision == Precision::Tf32;
                    needs.push(("ldmatrix", if transposes && !(by_k[0] && by_k[1]) { 2 } else { 4 }));
                    if is_new {
                        needs.push(("cp.async.cg", 2));
                    }
                }
                let kind = if precision == Precision::Tf32 { "tf32" } else { elements[0].name() };
                let orders = by_k.map(|by_k| if by_k { "k" } else { "o" }).concat();
                let splits = if tile.splits > 1 { "-splits" } else { "" };
                let name = format!("product-{kind}-{orders}-{}x{}x{}{splits}", tile.m, tile.n, tile.k);
                sources.write(&name, product.kernel_of(device, *tile), &needs)?;
            }
        }
    }
    Ok(())
}

fn convolutions(sources: &mut Sources) -> std::io::Result<()> {
    let device = sources.device;
    let copies = if device.sm >= 80 { "cp.async.cg" } else { "mma.sync" };
    for (name, element, precision, layout, [channels, out_channels, groups], [kernel, stride], needs) in [
        ("3x3", Element::F32, Precision::Full, Layout::Planes, [64, 64, 1], [3, 1], vec![("fma.rn.f32", 256)]),
        (
            "3x3",
            Element::F32,
            Precision::Tf32,
            Layout::Channels,
            [64, 64, 1],
            [3, 1],
            vec![("mma.sync", 8), ("cp.async.cg", 2)],
        ),
        ("3x3", Element::F16, Precision::Full, Layout::Planes, [64, 64, 1], [3, 1], vec![("mma.sync", 8)]),
        (
            "3x3",
            Element::F16,
            Precision::Full,
            Layout::Channels,
            [64, 64, 1],
            [3, 1],
            vec![("mma.sync", 8), (copies, 2)],
        ),
        (
            "1x1",
            Element::F16,
            Precision::Full,
            Layout::Channels,
            [64, 256, 1],
            [1, 1],
            vec![("mma.sync", 8), (copies, 2)],
        ),
        (
            "3x3",
            Element::U8,
            Precision::Full,
            Layout::Channels,
            [64, 64, 1],
            [3, 1],
            vec![("mma.sync", 8), (copies, 2)],
        ),
        ("stem", Element::F16, Precision::Full, Layout::Channels, [4, 64, 1], [7, 2], vec![("mma.sync", 8)]),
        ("stem", Element::F32, Precision::Full, Layout::Planes, [3, 64, 1], [7, 2], vec![("fma.rn.f32", 256)]),
        ("depthwise", Element::F32, Precision::Full, Layout::Planes, [96, 96, 96], [3, 1], vec![("fma.rn.f32", 36)]),
        (
            "depthwise",
            Element::F32,
            Precision::Full,
            Layout::Channels,
            [96, 96, 96],
            [3, 1],
            vec![("ld.global.nc.v4", 12)],
        ),
        (
            "depthwise",
            Element::F16,
            Precision::Full,
            Layout::Channels,
            [96, 96, 96],
            [3, 1],
            vec![("ld.global.nc.v4", 12)],
        ),
        ("depthwise", Element::U8, Precision::Full, Layout::Channels, [96, 96, 96], [3, 1], vec![]),
        ("depthwise", Element::I8, Precision::Full, Layout::Channels, [96, 96, 96], [3, 2], vec![]),
        (
            "3x3",
            Element::I8,
            Precision::Full,
            Layout::Channels,
            [64, 128, 1],
            [3, 1],
            vec![("mma.sync", 8), ("ldmatrix", 2)],
        ),
    ] {
        let conv = Conv {
            images: 8,
            channels,
            out_channels,
            groups,
            input: [56, 56],
            output: [56usize.div_ceil(stride); 2],
            kernel: [kernel; 2],
            stride: [stride; 2],
            dilation: [1, 1],
            pad_begin: [kernel / 2; 2],
            layout,
            element,
            result: if element == Element::U8 { Element::I32 } else { element },
            has_zero_point: element == Element::U8,
            precision,
            x_is_function: false,
            functions: bias_and_gelu(element),
        };
        let kind = if precision == Precision::Tf32 { "tf32" } else { element.name() };
        let layout = if layout == Layout::Planes { "planes" } else { "channels" };
        let name = format!("conv-{name}-{kind}-{layout}");
        sources.write(&name, conv.kernel(device), &needs)?;
        if name.starts_with("conv-3x3-float") {
            for tile in [2, 4] {
                let winograd = Winograd { conv: conv.clone(), tile };
                sources.write(&format!("winograd-{tile}"), winograd.kernel(device), &vec![("fma.rn.f32", 256)])?;
            }
        }
    }
    Ok(())
}

fn few_rows(sources: &mut Sources) -> std::io::Result<()> {
    let device = sources.device;
    for element in [Element::F32, Element::F16] {
        for (m, order, orders) in [(1, Order::ByK, "kk"), (8, Order::ByK, "kk"), (1, Order::ByOuter, "ko")] {
            let array = |order| Operand::Array { order, leading: 4096, batch: vec![] };
            let product = Product {
                m,
                n: 4096,
                k: 4096,
                batch: vec![],
                a: array(Order::ByK),
                b: array(order),
                elements: [element; 2],
                result: element,
                precision: Precision::Full,
                channel_is_row: false,
                functions: bias_and_gelu(element),
            };
            let candidates = product.candidates(device).unwrap_or_default();
            let Some((tile, _)) = candidates.into_iter().find(|(tile, _)| tile.way == Way::Rows) else { continue };
            let name = format!("rows-{m}-{}-{orders}", element.name());
            sources.write(&name, product.kernel_of(device, tile), &vec![("ld.global.nc.v4", 4)])?;
        }
    }
    for (bits, m) in [(4, 1), (4, 4), (4, 8), (8, 1), (2, 1)] {
        let of = BlockedProduct {
            m,
            n: 4096,
            k: 4096,
            bits,
            block: 32,
            has_zero_points: true,
            element: Element::F16,
            scale: Element::F16,
            functions: Functions::default(),
        };
        let needs = if bits == 2 { vec![] } else { vec![("ld.global.nc.v4", 2), ("ld.shared.v4", 4)] };
        sources.write(&format!("bits-{bits}-{m}"), of.kernel(device), &needs)?;
    }
    Ok(())
}

fn rows(sources: &mut Sources) -> std::io::Result<()> {
    let device = sources.device;
    let functions = [RowFunction::Softmax, RowFunction::LayerNorm { epsilon: 1e-5 }, RowFunction::Mean];
    for (function, name) in functions.into_iter().zip(["softmax", "layernorm", "mean"]) {
        for (element, length) in
            [(Element::F32, 768), (Element::F16, 1024), (Element::F16, 4096), (Element::F32, 50000)]
        {
            let of =
                Rows { rows: 4096, length, function, element, x_is_function: false, functions: Functions::default() };
            sources.write(
                &format!("{name}-{}-{length}", element.name()),
                of.kernel(device),
                &vec![("ld.global.nc.v4", 1)],
            )?;
        }
    }
    for elements in [[Element::F32; 2], [Element::F32, Element::F16], [Element::F16; 2]] {
        let of = Transpose {
            batch: 8,
            rows: 64,
            columns: 3136,
            elements,
            x_is_function: false,
            functions: Functions::default(),
        };
        let name = format!("transpose-{}-{}", elements[0].name(), elements[1].name());
        sources.write(&name, of.kernel(device), &vec![])?;
    }
    Ok(())
}

fn recurrences(sources: &mut Sources) -> std::io::Result<()> {
    let device = sources.device;
    let lstm = Cell::Lstm { is_coupled: false };
    for (cell, name, hidden) in [(Cell::Gru { is_linear: true }, "gru", 128), (lstm, "lstm", 64), (lstm, "lstm", 512)] {
        let mut text = String::new();
        for function in
            ["gate(const Operands& o, u32 d, u32 t, u32 n, u32 i)", "recurrent_bias(const Operands& o, u32 d, u32 i)"]
        {
            text += &format!("__device__ float {function} {{ return o.operands[i]; }}\n");
        }
        for name in ["initial", "initial_cell"] {
            text += &format!("__device__ float {name}(const Operands& o, u32 d, u32 n, u32 j) {{ return 0.0f; }}\n");
        }
        for name in ["activate0", "activate1", "activate2"] {
            text += &format!("__device__ float {name}(float x, u32 d) {{ return tanhf(x); }}\n");
        }
        text += "__device__ float peephole(const Operands& o, u32 d, u32 i) { return 0.0f; }
__device__ u32 length_of(const Operands& o, u32 n) { return 100; }
__device__ bool is_reverse(u32 d) { return false; }
__device__ void put(const Operands& o, u32 d, u32 t, u32 n, u32 j, float h) { o.y[(t * 8 + n) * 512 + j] = h; }
__device__ void put_last(const Operands& o, u32 d, u32 n, u32 j, float h, float c) {}\n";
        let pointers = ["const float* operands", "float* y"].map(|of| of.rsplit_once(' ').unwrap_or_default());
        let pointers = pointers.map(|(of, name)| (of.to_string(), name.to_string())).to_vec();
        let of =
            Recurrence { cell, directions: 1, steps: 100, batch: 8, hidden, functions: Functions { pointers, text } };
        let needs = if hidden < 512 {
            vec![("fma.rn.f32", hidden), ("ld.shared.v4", hidden / 4)]
        } else {
            vec![("ld.global.nc", 4)]
        };
        sources.write(&format!("{name}-{hidden}"), of.kernel(device), &needs)?;
    }
    Ok(())
}

fn attentions(sources: &mut Sources) -> std::io::Result<()> {
    let device = sources.device;
    let f16 = [Element::F16; 2];
    for [element, memory] in [[Element::F32; 2], f16, [Element::BF16; 2], [Element::F16, Element::F32]] {
        for depth in [32, 64, 80, 96, 128] {
            let strides = [12 * 512 * depth, depth, 12 * depth];
            let attention = Attention {
                batch: 8,
                heads: 12,
                key_heads: 12,
                queries: 512,
                keys: 512,
                depth,
                width: depth,
                strides: [strides; 3],
                output_strides: strides,
                scale: 0.125,
                causal_offset: Some(0),
                has_mask: false,
                element,
                memory,
                functions: Functions::default(),
            };
            let needs = match element {
                Element::F32 => vec![("fma.rn.f32", 128), ("ld.global.nc.v4", 3)],
                _ => vec![("mma.sync", depth / 16 * 8 + depth / 8 * 4), ("ldmatrix", depth / 16 * 5 + depth / 16 * 4)],
            };
            let of = if memory == element { "" } else { "-of-f32" };
            let name = format!("attention-{}{of}-{depth}", element.name());
            sources.write(&name, attention.kernel(device), &needs)?;
        }
    }
    Ok(())
}

/// What stands behind most products.
fn bias_and_gelu(element: Element) -> Functions {
    let pointers = vec![("const float*".to_string(), "bias".to_string())];
    let text = match element {
        Element::I8 | Element::U8 => {
            "__device__ Sum finish(const Operands& o, u32 i, u32 channel, Sum x) { return x + Sum(o.bias[channel]); }\n"
        }
        _ => {
            "__device__ Sum finish(const Operands& o, u32 i, u32 channel, Sum x) { x += o.bias[channel]; return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }\n"
        }
    };
    Functions { pointers, text: text.to_string() }
}
