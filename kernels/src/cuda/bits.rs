//! Products with weights of a few bits in blocks of one scale (ONNX's `MatMulNBits`), for a few rows: what they cost is reading the weights.

use super::{
    Argument, Device, Element, Functions, Kernel, Launch, Refused,
    text::{begin, check_count, check_grid, constant},
};
use std::fmt::Write;

/// `C[m, n] = finish(Σ_k A[m, k] · (q[n, k] − zero_point[n, k / block]) · scale[n, k / block])`.
///
/// Inputs: A `[m, k]` (0); q (1), bytes as ONNX packs them, `[n, ⌈k / block⌉, block · bits / 8]`, low bits first; scales (2), `[n, ⌈k / block⌉]`;
/// zero points (3) if there are any, `[n, ⌈⌈k / block⌉ · bits / 8⌉]` bytes. All are aligned to 16 bytes.
#[derive(Clone, Debug)]
pub struct BlockedProduct {
    /// 1 to 8; more are cheaper as a [`super::Product`] whose second factor is a function.
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// 2, 4 or 8.
    pub bits: usize,
    /// A power of two of at least 16.
    pub block: usize,
    pub has_zero_points: bool,
    /// Of A and C.
    pub element: Element,
    pub scale: Element,
    /// `finish` gets the column as its channel.
    pub functions: Functions,
}

impl BlockedProduct {
    pub fn kernel(&self, device: Device) -> Result<Kernel, Refused> {
        let is_float = |of| matches!(of, Element::F32 | Element::F16 | Element::BF16);
        let fits = (1..=8).contains(&self.m)
            && matches!(self.bits, 2 | 4 | 8)
            && self.block.is_power_of_two()
            && self.block >= 16
            && is_float(self.element)
            && is_float(self.scale);
        if !fits {
            let what = format!("{} rows, {} bits in blocks of {}", self.m, self.bits, self.block);
            return Err(Refused(format!("no product of {what}")));
        }
        check_count("weights", self.n * self.k)?;
        // A lane's chunk is at most 16 bytes of one block; 32 lanes of 8 warps read at a time.
        let each = (self.block * self.bits / 8).min(16) * 8 / self.bits;
        // Of many rows, sums take the registers that columns would.
        let columns = if self.m <= 4 { 4 } else { 2 };
        let blocks = self.n.div_ceil(8 * columns);
        let steps = self.k.div_ceil(32 * each).max(1);
        // Enough blocks for two on every multiprocessor, if k is long enough.
        let wanted = (2 * device.multiprocessors as usize).div_ceil(blocks.max(1)).clamp(1, steps);
        let splits = steps.div_ceil(steps.div_ceil(wanted));
        let element = self.element.name();
        let mut members = vec![
            ("a", format!("const {element}*"), Argument::Input(0)),
            ("b", "const unsigned char*".to_string(), Argument::Input(1)),
            ("scales", format!("const {}*", self.scale.name()), Argument::Input(2)),
        ];
        if self.has_zero_points {
            members.push(("zero_points", "const unsigned char*".to_string(), Argument::Input(3)));
        }
        members.push(("output", format!("{element}*"), Argument::Output(0)));
        if splits > 1 {
            members.push(("workspace", "float*".to_string(), Argument::Workspace));
        }
        let (mut text, arguments) = begin(&members, &self.functions, "float");
        let numbers = [
            ("M", self.m),
            ("N", self.n),
            ("K", self.k),
            ("Z", 1),
            ("BITS", self.bits),
            ("BLOCK", self.block),
            ("SPLITS", splits),
            ("COLUMNS", columns),
        ];
        text.extend(numbers.map(|(name, value)| constant(name, value)));
        let parts = if splits > 1 { "o.workspace" } else { "nullptr" };
        let zero_points = self.has_zero_points;
        let zero_byte = if zero_points { "o.zero_points[i]" } else { "0" };
        let _ = writeln!(
            text,
            "constexpr bool HAS_ZERO_POINTS = {zero_points};\nusing Element = {element};\nusing Result = {element};
__device__ __forceinline__ u32 zero_byte(const Operands& o, u32 i) {{ return {zero_byte}; }}
__device__ __forceinline__ float* parts_of(const Operands& o) {{ return {parts}; }}
__device__ __forceinline__ Result* output_array(const Operands& o) {{ return o.output; }}
__device__ __forceinline__ float finish_sum(const Operands& o, u32 i, u32 channel, float x) {{ return finish(o, i, channel, x); }}
__device__ __forceinline__ u32 result_place(u32 z, u32 m, u32 n) {{ return m * N + n; }}
__device__ __forceinline__ u32 channel_of(u32 z, u32 m, u32 n) {{ return n; }}"
        );
        text += include_str!("../../cuda/product_bits.cu");
        let entry = format!("product_{}bits_{element}", self.bits);
        let mut launches = Vec::new();
        if self.n > 0 {
            let grid = check_grid([blocks, splits, 1])?;
            launches.push(Launch { entry: entry.clone(), grid, block: 256, shared_bytes: 0 });
            if splits > 1 {
                text += include_str!("../../cuda/product_splits.cu");
                let grid = check_grid([(self.m * self.n).div_ceil(256), 1, 1])?;
                launches.push(Launch { entry: format!("{entry}_splits"), grid, block: 256, shared_bytes: 0 });
            }
        }
        let workspace_bytes = if splits > 1 { splits * self.m * self.n * 4 } else { 0 };
        Ok(Kernel { source: text.replace("ENTRY", &entry), launches, arguments, workspace_bytes })
    }
}
