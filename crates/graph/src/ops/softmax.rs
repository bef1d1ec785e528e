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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("Softmax", 13)
            .wave(&[2, 3])
            .gives([f32s(&[2, 3], &[0.112719, 0.648654, 0.238627, 0.665241, 0.244728, 0.0900306])]);
        case("Softmax", 13)
            .with("axis", 0)
            .wave(&[2, 2, 2])
            .gives([f32s(&[2, 2, 2], &[0.182426, 0.7773, 0.182426, 0.7773, 0.817574, 0.2227, 0.817574, 0.2227])]);
        case("Softmax", 11).with("axis", 1).wave(&[2, 2, 2]).gives([f32s(
            &[2, 2, 2],
            &[0.0474967, 0.273325, 0.100551, 0.578628, 0.234539, 0.0862821, 0.496519, 0.182659],
        )]);
        case("Softmax", 11)
            .with("axis", -1)
            .wave(&[2, 2])
            .gives([f32s(&[2, 2], &[0.148047, 0.851953, 0.148047, 0.851953])]);
        case("LogSoftmax", 13)
            .with("axis", 1)
            .wave(&[2, 3, 1])
            .gives([f32s(&[2, 3, 1], &[-2.18286, -0.432855, -1.43286, -0.407606, -1.40761, -2.40761])]);
        case("Hardmax", 13).input(f32s(&[4], &[1.0, 3.0, 3.0, 2.0])).gives([f32s(&[4], &[0.0, 1.0, 0.0, 0.0])]);
        case("Softmax", 13).input(f32s(&[3], &[1000.0, 1000.0, -1000.0])).gives([f32s(&[3], &[0.5, 0.5, 0.0])]);
        case("Softmax", 13).wave(&[2, 0]).gives([f32s(&[2, 0], &[])]);
    }

    #[test]
    fn old_opsets_export_as_a_matrix_of_their_input() {
        let mut node = NodeReader::new("n", "", "Softmax", 11, vec![true], 1, [].into());
        let spelling = Softmax::import(&mut node).unwrap().spelling().unwrap();
        assert_eq!(spelling.coerced_at, Some(1));
        case("Softmax", 13).with("axis", 2).wave(&[2, 2]).fails("axis 2 of a tensor of rank 2");
    }
}
