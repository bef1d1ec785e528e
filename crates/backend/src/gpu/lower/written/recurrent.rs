//! Recurrences over all steps in one launch.

use super::{
    super::super::{
        code::{Operand, Text},
        plan::{BufferId, Builder, Written},
    },
    only,
};
use crate::Work;
use cutover_graph::ops::Cell;
use cutover_kernels::cuda;

/// A recurrence: its recurrent matrix with rows side by side, and functions of its caller's in WGSL; see [`cuda::Recurrence`].
pub(in super::super) struct Recurrence<'a> {
    pub cell: Cell,
    pub directions: usize,
    pub steps: usize,
    pub batch: usize,
    pub hidden: usize,
    pub matrix: &'a Operand,
    /// The result that is always there.
    pub to: BufferId,
    pub work: Work,
}

/// The recurrence with `functions`, which follow `text`.
pub(in super::super) fn recurrence(b: &mut Builder<'_>, of: &Recurrence<'_>, text: Text, functions: &str) -> bool {
    let &Recurrence { cell, directions, steps, batch, hidden, matrix, to, work } = of;
    let (Some(device), Operand::Buffer(matrix, _)) = (b.gpu.written, matrix) else { return false };
    let cell = match cell {
        Cell::Rnn => cuda::Cell::Rnn,
        Cell::Gru { linear_before_reset } => cuda::Cell::Gru { is_linear: linear_before_reset },
        Cell::Lstm { coupled } => cuda::Cell::Lstm { is_coupled: coupled },
    };
    let solutions = |functions: cuda::Functions, _: usize| {
        only(cuda::Recurrence { cell, directions, steps, batch, hidden, functions }.kernel(device))
    };
    let (inputs, name) = (&[*matrix], "recurrent by hand");
    b.push_written(Written {
        text,
        functions,
        inputs,
        more: &[],
        output: to,
        solutions: &solutions,
        name: &|_| name,
        work,
    })
}
