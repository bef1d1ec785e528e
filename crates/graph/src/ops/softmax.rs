//! Softmax and its relatives.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, normalize_axis};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// Over `axis`, with the type and shape of the input.
#[derive(Clone, Debug, PartialEq)]
pub struct Softmax {
    pub function: SoftmaxFunction,
    /// Counted from the end where negative.
    pub axis: i64,
    /// Over `axis` and all after it together: what opsets before 13 mean, which see their input as a matrix.
    pub coerced: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SoftmaxFunction {
    /// `exp(x) / Σ exp(x)`.
    Softmax,
    /// `x − log Σ exp(x)`.
    LogSoftmax,
    /// 1 at the first largest element, 0 elsewhere.
    Hardmax,
}

impl Operator for Softmax {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let function = match node.op_type.as_str() {
            "Softmax" => SoftmaxFunction::Softmax,
            "LogSoftmax" => SoftmaxFunction::LogSoftmax,
            _ => SoftmaxFunction::Hardmax,
        };
        let coerced = node.opset < 13;
        let axis = node.int("axis", if coerced { 1 } else { -1 })?;
        // One axis is one axis, however the rest is seen.
        Ok(Softmax { function, axis, coerced: coerced && axis != -1 }.into())
    }

    fn export(&self) -> Spelling {
        let mut spelling = Spelling::new(match self.function {
            SoftmaxFunction::Softmax => "Softmax",
            SoftmaxFunction::LogSoftmax => "LogSoftmax",
            SoftmaxFunction::Hardmax => "Hardmax",
        });
        spelling.coerced_at = self.coerced.then_some(self.axis);
        spelling.with("axis", if self.coerced { -1 } else { self.axis })
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        if let Some(rank) = x.rank() {
            self.split(rank)?;
        }
        Ok(vec![TensorFact { value: None, ..x.clone() }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let (first, end) = self.split(x.shape().rank())?;
        let extent: usize = x.shape()[first..end].iter().product();
        let inner: usize = x.shape()[end..].iter().product();
        let mut y = Wide::floats(x)?;
        let mut row = vec![0.0; extent];
        let outer = y.len().checked_div(extent * inner).unwrap_or(0);
        for start in (0..outer).flat_map(|o| (0..inner).map(move |i| o * extent * inner + i)) {
            row.iter_mut().enumerate().for_each(|(i, x)| *x = y[start + i * inner]);
            self.function.apply(&mut row);
            row.iter().enumerate().for_each(|(i, &x)| y[start + i * inner] = x);
        }
        Ok(vec![Wide::Float(y).narrow(x.dtype(), x.shape().clone())?.into()])
    }
}

impl Softmax {
    /// The axes it works over, as a range.
    fn split(&self, rank: usize) -> Result<(usize, usize), OpError> {
        if self.coerced {
            // Flattening may start behind the last axis: every element is then a row of its own.
            let first = if self.axis == rank as i64 { rank } else { normalize_axis(self.axis, rank)? };
            return Ok((first, rank));
        }
        // A scalar has one element to choose from.
        if rank == 0 && matches!(self.axis, 0 | -1) {
            return Ok((0, 0));
        }
        normalize_axis(self.axis, rank).map(|axis| (axis, axis + 1))
    }
}

impl SoftmaxFunction {
    pub fn apply(self, x: &mut [f64]) {
        let largest = x.iter().fold(f64::NEG_INFINITY, |a, &b| if b > a || b.is_nan() { b } else { a });
        match self {
            SoftmaxFunction::Softmax => {
                x.iter_mut().for_each(|x| *x = (*x - largest).exp());
                let sum: f64 = x.iter().sum();
                x.iter_mut().for_each(|x| *x /= sum);
            }
            SoftmaxFunction::LogSoftmax => {
                let sum: f64 = x.iter().map(|x| (x - largest).exp()).sum();
                x.iter_mut().for_each(|x| *x = *x - largest - sum.ln());
            }
            SoftmaxFunction::Hardmax => {
                let first = x.iter().position(|&x| x == largest).unwrap_or(0);
                x.iter_mut().enumerate().for_each(|(i, x)| *x = f64::from(i == first));
            }
        }
    }
}
