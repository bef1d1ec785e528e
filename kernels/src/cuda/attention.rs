//! Attention without the matrix of scores: `softmax(Q · Kᵀ · scale + mask) · V`, after FlashAttention (Dao et al. 2022).

use super::{
    Argument, Device, Element, Functions, Kernel, Launch, Refused,
    text::{begin, check_count, check_grid, constant},
};
use std::fmt::Write;

/// Where element `[batch, head, row, d]` lies: `batch · strides[0] + head · strides[1] + row · strides[2] + d`.
pub type Strides = [usize; 3];

/// An attention. Its inputs are Q (0), K (1) and V (2), aligned to 16 bytes.
#[derive(Clone, Debug)]
pub struct Attention {
    pub batch: usize,
    pub heads: usize,
    /// Heads of K and V, a divisor of `heads`: neighbours share one.
    pub key_heads: usize,
    pub queries: usize,
    pub keys: usize,
    /// Elements of a row of Q and K: at most 128; on tensor cores a multiple of 8, as strides are there.
    pub depth: usize,
    /// Of V and the result; the same limits.
    pub width: usize,
    pub strides: [Strides; 3],
    pub output_strides: Strides,
    pub scale: f32,
    /// Query `q` sees keys up to `q + offset` alone.
    pub causal_offset: Option<usize>,
    /// Whether `float mask_at(const Operands& o, u32 batch, u32 head, u32 query, u32 key)` of [`Functions`] is added to scores.
    pub has_mask: bool,
    /// What is multiplied: 16 bits on tensor cores, f32 without. Scores and sums are f32.
    pub element: Element,
    /// What Q, K, V and the result are: the same, or F32, which is narrowed as it is read.
    pub memory: Element,
    /// `finish` gets the index into the result, and d as its channel.
    pub functions: Functions,
}

impl Attention {
    pub fn kernel(&self, device: Device) -> Result<Kernel, Refused> {
        let is_plain = self.element == Element::F32;
        let is_known = match self.element {
            Element::F32 | Element::F16 => true,
            Element::BF16 => device.sm >= 80,
            _ => false,
        } && [self.element, Element::F32].contains(&self.memory);
        let strides = [&self.strides[..], &[self.output_strides]].concat().concat();
        let fits = |by: usize| [self.depth, self.width].iter().chain(&strides).all(|extent| extent.is_multiple_of(by));
        let limits = [self.depth, self.width].iter().all(|extent| (1..=128).contains(extent));
        if !is_known
            || !limits
            || (!is_plain && !fits(8))
            || self.key_heads == 0
            || !self.heads.is_multiple_of(self.key_heads)
        {
            let (element, heads) = (self.element.name(), [self.heads, self.key_heads]);
            return Err(Refused(format!(
                "no attention of {element} with rows of {} and {}, heads {heads:?}",
                self.depth, self.width
            )));
        }
        for (at, strides) in self.strides.iter().chain([&self.output_strides]).enumerate() {
            let rows = if matches!(at, 0 | 3) { self.queries } else { self.keys };
            let heads = if matches!(at, 0 | 3) { self.heads } else { self.key_heads };
            let count = self.batch * strides[0] + heads * strides[1] + rows * strides[2] + 128;
            check_count("an operand of attention", count)?;
        }
        let (element, memory) = (self.element.name(), self.memory.name());
        let mut members: Vec<_> = ["q", "k", "v"]
            .into_iter()
            .enumerate()
            .map(|(at, name)| (name, format!("const {memory}*"), Argument::Input(at)))
            .collect();
        members.push(("output", format!("{memory}*"), Argument::Output(0)));
        let (mut text, arguments) = begin(&members, &self.functions, "float");
        let _ = writeln!(text, "using Element = {element};\nusing Memory = {memory};");
        if !self.has_mask {
            text += "__device__ __forceinline__ float mask_at(const Operands&, u32, u32, u32, u32) { return 0.0f; }\n";
        }
        let numbers = [
            ("GROUP", self.heads / self.key_heads),
            ("QUERIES", self.queries),
            ("KEYS", self.keys),
            ("D", self.depth),
            ("DV", self.width),
            ("OFFSET", self.causal_offset.unwrap_or(0)),
        ];
        text.extend(numbers.map(|(name, value)| constant(name, value)));
        for (name, strides) in ["Q", "K", "V", "O"].iter().zip(self.strides.iter().chain([&self.output_strides])) {
            for (of, stride) in ["BATCH", "HEAD", "ROW"].iter().zip(strides) {
                text += &constant(&format!("{name}_{of}"), *stride);
            }
        }
        let (causal, mask) = (self.causal_offset.is_some(), self.has_mask);
        let _ = writeln!(
            text,
            "constexpr bool CAUSAL = {causal}, HAS_MASK = {mask};\nconstexpr float SCALE = {:?}f;",
            self.scale
        );
        let (queries_each, block, shared_bytes) = if is_plain {
            let bytes = |queries: usize, keys: usize| {
                4 * (self.depth * (queries + 4 + keys + 4)
                    + keys * (self.width.div_ceil(4) * 4 + 4)
                    + queries * (keys + 4))
            };
            // Smaller blocks where larger ones would leave most of the device idle, or have no room.
            let blocks = self.batch * self.heads * self.queries.div_ceil(64);
            let is_large =
                bytes(64, 64) <= device.shared_bytes as usize && blocks >= device.multiprocessors as usize / 2;
            let (queries, keys) = if is_large { (64, 64) } else { (32, 32) };
            text += &constant("QUERIES_EACH", queries);
            text += &constant("KEYS_EACH", keys);
            let _ = writeln!(text, "constexpr bool WIDE = {};", fits(4));
            text += include_str!("../../cuda/attention_plain.cu");
            (queries, queries / 4 * keys / 4, bytes(queries, keys))
        } else {
            text += include_str!("../../cuda/attention_tensor.cu");
            let row = |extent: usize| extent.div_ceil(16) * 32 + 16;
            (64, 128, 2 * 64 * (row(self.depth) + row(self.width)))
        };
        if shared_bytes > device.shared_bytes as usize {
            return Err(Refused(format!(
                "attention with rows of {} wants {shared_bytes} bytes of shared memory",
                self.depth
            )));
        }
        let narrows = if self.memory == self.element { "" } else { "_of_f32" };
        let entry = format!("attention_{element}{narrows}_{}x{}", self.depth, self.width);
        let grid = check_grid([self.queries.div_ceil(queries_each), self.heads, self.batch])?;
        let launch = Launch { entry: entry.clone(), grid, block: block as u32, shared_bytes: shared_bytes as u32 };
        let launches = if grid.contains(&0) { Vec::new() } else { vec![launch] };
        Ok(Kernel { source: text.replace("ENTRY", &entry), launches, arguments, workspace_bytes: 0 })
    }
}
