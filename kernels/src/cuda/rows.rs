//! What is done to whole rows (softmax, normalisation, reduction), and matrices that are transposed.

use super::{
    Argument, Device, Element, Functions, Kernel, Launch, Refused,
    text::{begin, check_count, check_grid, constant},
};
use std::fmt::Write;

/// What becomes of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RowFunction {
    Softmax,
    LogSoftmax,
    /// `(x − mean) / √(variance + epsilon)`; `finish` multiplies and adds what there is for each channel.
    LayerNorm {
        epsilon: f32,
    },
    /// `x / √(mean of x² + epsilon)`.
    RmsNorm {
        epsilon: f32,
    },
    /// One element a row, as all below; `finish` gets the row as index and channel.
    Sum,
    Mean,
    Max,
    Min,
}

/// A function of the rows of `[rows, length]` (input 0). `finish` gets the place in the row as its channel.
#[derive(Clone, Debug)]
pub struct Rows {
    pub rows: usize,
    /// At least 1.
    pub length: usize,
    pub function: RowFunction,
    /// Of the input and the result: F32, F16 or BF16.
    pub element: Element,
    /// Whether the input is not an array but `float x_at(const Operands& o, u32 i)` of [`Functions`].
    pub x_is_function: bool,
    pub functions: Functions,
}

/// Elements of a row that a thread holds at most.
const HELD: usize = 32;

impl Rows {
    pub fn kernel(&self, _: Device) -> Result<Kernel, Refused> {
        check_float(self.element)?;
        check_count("rows", self.rows * self.length)?;
        if self.length == 0 {
            return Err(Refused("rows without elements".to_string()));
        }
        let (mut text, arguments) = begin_moves(self.element, self.element, self.x_is_function, &self.functions);
        let full = 16 / self.element.bytes();
        let wide = if !self.x_is_function && self.length.is_multiple_of(full) { full } else { 1 };
        // A warp for a row as long as it can hold it, else as many threads as leave each a few elements; more would have too few registers.
        let threads = match self.length {
            0..=1024 => 32,
            1025..=8192 => 256,
            _ => 512,
        };
        let each = self.length.div_ceil(threads * wide) * wide;
        let (function, epsilon) = match self.function {
            RowFunction::Softmax => (0, 0.0),
            RowFunction::LogSoftmax => (1, 0.0),
            RowFunction::LayerNorm { epsilon } => (2, epsilon),
            RowFunction::RmsNorm { epsilon } => (3, epsilon),
            RowFunction::Sum => (4, 0.0),
            RowFunction::Mean => (5, 0.0),
            RowFunction::Max => (6, 0.0),
            RowFunction::Min => (7, 0.0),
        };
        let numbers = [
            ("ROWS", self.rows),
            ("LENGTH", self.length),
            ("THREADS", threads),
            ("EACH", each),
            ("WIDE", wide),
            ("FUNCTION", function),
        ];
        text.extend(numbers.map(|(name, value)| constant(name, value)));
        let held = each <= HELD;
        let _ = writeln!(text, "constexpr float EPSILON = {epsilon:?}f;\nconstexpr bool HELD = {held};");
        text += include_str!("../../cuda/rows.cu");
        let entry = format!("rows{function}_{}_{}", self.element.name(), self.length);
        let block = if threads == 32 { 128 } else { threads };
        finish(text, &entry, self.rows.div_ceil(block / threads), block, arguments)
    }
}

/// `[batch, rows, columns]` (input 0) as `[batch, columns, rows]`, of other elements if need be: so pictures come from planes to channels
/// (rows are channels) and back. `finish` gets the index into the result, and the column as its channel.
#[derive(Clone, Debug)]
pub struct Transpose {
    pub batch: usize,
    pub rows: usize,
    pub columns: usize,
    /// Of the input and of the result: F32, F16 or BF16.
    pub elements: [Element; 2],
    /// As [`Rows::x_is_function`].
    pub x_is_function: bool,
    pub functions: Functions,
}

impl Transpose {
    pub fn kernel(&self, _: Device) -> Result<Kernel, Refused> {
        let [from, to] = self.elements;
        check_float(from)?;
        check_float(to)?;
        check_count("a matrix to transpose", self.batch * self.rows * self.columns)?;
        let (mut text, arguments) = begin_moves(from, to, self.x_is_function, &self.functions);
        text.extend([("ROWS", self.rows), ("COLUMNS", self.columns)].map(|(name, value)| constant(name, value)));
        let pairs = !self.x_is_function && self.columns.is_multiple_of(2);
        let _ = writeln!(text, "constexpr bool PAIRS_IN = {pairs};");
        text += include_str!("../../cuda/transpose.cu");
        let entry = format!("transpose_{}_{}", from.name(), to.name());
        let tiles = self.rows.div_ceil(64) * self.columns.div_ceil(64) * self.batch;
        finish(text, &entry, tiles, 256, arguments)
    }
}

fn check_float(element: Element) -> Result<(), Refused> {
    match element {
        Element::F32 | Element::F16 | Element::BF16 => Ok(()),
        other => Err(Refused(format!("no kernel of rows for {}", other.name()))),
    }
}

/// What stands before kernels that read one input, element by element or as an array.
fn begin_moves(from: Element, to: Element, x_is_function: bool, functions: &Functions) -> (String, Vec<Argument>) {
    let mut members = vec![("output", format!("{}*", to.name()), Argument::Output(0))];
    if !x_is_function {
        members.insert(0, ("x", format!("const {}*", from.name()), Argument::Input(0)));
    }
    let (mut text, arguments) = begin(&members, functions, "float");
    let (value, array) = if x_is_function { ("x_at(o, i)", "nullptr") } else { ("widen(o.x[i])", "o.x") };
    let _ = writeln!(
        text,
        "using Element = {};\nusing Result = {};
__device__ __forceinline__ float x_value(const Operands& o, u32 i) {{ return {value}; }}
__device__ __forceinline__ const Element* x_array(const Operands& o) {{ return {array}; }}",
        from.name(),
        to.name()
    );
    (text, arguments)
}

fn finish(text: String, entry: &str, blocks: usize, block: usize, arguments: Vec<Argument>) -> Result<Kernel, Refused> {
    let grid = check_grid([blocks, 1, 1])?;
    let launch = Launch { entry: entry.to_string(), grid, block: block as u32, shared_bytes: 0 };
    let launches = if blocks == 0 { Vec::new() } else { vec![launch] };
    Ok(Kernel { source: text.replace("ENTRY", entry), launches, arguments, workspace_bytes: 0 })
}
