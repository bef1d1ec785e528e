//! Functions that are a product of others.

use super::{Composing, known};
use cutover_graph::{
    Patch,
    ops::{BiasGelu, SwiGlu, Unary, UnaryFunction},
};

/// Whether it is `x · sigmoid(alpha · x)` with a factor that no kernel has.
pub(super) fn is_gated(op: &Unary) -> bool {
    matches!(op.function, UnaryFunction::Swish { alpha } if alpha != 1.0)
}

pub(super) fn gate(mut composing: Composing<'_>, op: &Unary) -> Option<Patch> {
    let UnaryFunction::Swish { alpha } = op.function else { return None };
    let x = composing.input(0)?.into();
    let inner = composing.times(x, alpha);
    let gate = composing.unary(UnaryFunction::Sigmoid, inner);
    let y = composing.mul(x, gate);
    composing.finish(&[Some(y)])
}

pub(super) fn swiglu(mut composing: Composing<'_>, op: &SwiGlu) -> Option<Patch> {
    let (a, b) = (composing.input(0)?.into(), composing.input(1)?.into());
    let inner = if op.alpha == 1.0 { a } else { composing.times(a, op.alpha) };
    let gate = composing.unary(UnaryFunction::Sigmoid, inner);
    let swish = composing.mul(a, gate);
    let y = composing.mul(swish, b);
    composing.finish(&[Some(y)])
}

pub(super) fn bias_gelu(mut composing: Composing<'_>, op: &BiasGelu) -> Option<Patch> {
    let (a, b) = (composing.input(0)?.into(), composing.input(1)?.into());
    let sum = composing.add(a, b);
    let y = composing.unary(UnaryFunction::Gelu { tanh: op.tanh }, sum);
    composing.finish(&[Some(y)])
}

pub(super) fn bias_split_gelu(mut composing: Composing<'_>) -> Option<Patch> {
    let (x, shape) = composing.floats(0)?;
    let half = known(shape.last()?)? / 2;
    let bias = composing.input(1)?.into();
    let sum = composing.add(x, bias);
    let left = composing.slice(sum, -1, 0, half);
    let right = composing.slice(sum, -1, half, 2 * half);
    let gate = composing.unary(UnaryFunction::Gelu { tanh: false }, right);
    let y = composing.mul(left, gate);
    composing.finish(&[Some(y)])
}
