//! LSTM, GRU and RNN: what inputs add to the gates is a product before it; this walks the steps of each sequence in one launch.

use super::{
    Argument, Device, Functions, Kernel, Launch, Refused,
    text::{begin, check_count, check_grid, constant},
};
use std::fmt::Write;

/// A recurrent cell, its gates in ONNX's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    Rnn,
    /// Update, reset, hidden; `is_linear`: whether the reset gate comes after the product with the state.
    Gru {
        is_linear: bool,
    },
    /// Input, output, forget, cell; `is_coupled`: the forget gate is one less the input gate.
    Lstm {
        is_coupled: bool,
    },
}

impl Cell {
    pub fn gates(self) -> usize {
        match self {
            Cell::Rnn => 1,
            Cell::Gru { .. } => 3,
            Cell::Lstm { .. } => 4,
        }
    }
}

/// A recurrence in f32. Its input (0) is the recurrent matrix with rows side by side, `[directions, hidden, gates · hidden]`; it has no
/// output of its own: [`Functions`] reads and writes everything else, with `row` in `0..gates · hidden` and `j` in `0..hidden`:
///
/// - `float gate(const Operands& o, u32 d, u32 t, u32 n, u32 row)`: what step `t` of sequence `n` adds, bias included;
///   `float recurrent_bias(const Operands& o, u32 d, u32 row)`: what the recurrent product adds
/// - `float initial(const Operands& o, u32 d, u32 n, u32 j)`, `float initial_cell(…)`: states before the first step
/// - `float peephole(const Operands& o, u32 d, u32 i)`: `i` in `0..3 · hidden`, input, output, forget
/// - `u32 length_of(const Operands& o, u32 n)`, `bool is_reverse(u32 d)`
/// - `float activate0(float x, u32 d)`, and `activate1`, `activate2` where the cell has them
/// - `void put(const Operands& o, u32 d, u32 t, u32 n, u32 j, float h)`: takes the state after step `t`, zero behind the end
/// - `void put_last(const Operands& o, u32 d, u32 n, u32 j, float h, float c)`: takes the last states
#[derive(Clone, Debug)]
pub struct Recurrence {
    pub cell: Cell,
    pub directions: usize,
    pub steps: usize,
    pub batch: usize,
    /// 1 to 1024.
    pub hidden: usize,
    pub functions: Functions,
}

impl Recurrence {
    pub fn kernel(&self, _: Device) -> Result<Kernel, Refused> {
        let (hidden, gates) = (self.hidden, self.cell.gates());
        if !(1..=1024).contains(&hidden) {
            return Err(Refused(format!("{hidden} hidden units")));
        }
        let rows = gates * hidden;
        check_count("gates", self.directions * self.steps * self.batch * rows)?;
        let (mut text, arguments) =
            begin(&[("r", "const float*".to_string(), Argument::Input(0))], &self.functions, "float");
        // A thread for each row, its row in registers beside 40 that everything else takes.
        let threads = rows.next_multiple_of(32).min(1024);
        let is_resident =
            rows <= 1024 && hidden.next_multiple_of(4) + 40 <= (65536 / threads.next_multiple_of(128)).min(255);
        let cell = match self.cell {
            Cell::Rnn => 0,
            Cell::Gru { is_linear: false } => 1,
            Cell::Gru { is_linear: true } => 2,
            Cell::Lstm { is_coupled: false } => 3,
            Cell::Lstm { is_coupled: true } => 4,
        };
        let numbers = [
            ("HIDDEN", hidden),
            ("GATES", gates),
            ("STEPS", self.steps),
            ("BATCH", self.batch),
            ("DIRECTIONS", self.directions),
            ("THREADS", threads),
            ("CELL", cell),
        ];
        text.extend(numbers.map(|(name, value)| constant(name, value)));
        let _ = writeln!(text, "constexpr bool RESIDENT = {is_resident};");
        let unused = "__device__ __forceinline__ float";
        for name in ["activate1", "activate2"].into_iter().filter(|name| !self.functions.text.contains(name)) {
            let _ = writeln!(text, "{unused} {name}(float x, u32) {{ return x; }}");
        }
        text += include_str!("../../cuda/recurrent.cu");
        let entry = format!("recurrent{cell}_{hidden}");
        let grid = check_grid([self.batch, self.directions, 1])?;
        let launch = Launch { entry: entry.clone(), grid, block: threads as u32, shared_bytes: 0 };
        let launches = if grid.contains(&0) { Vec::new() } else { vec![launch] };
        Ok(Kernel { source: text.replace("ENTRY", &entry), launches, arguments, workspace_bytes: 0 })
    }
}
