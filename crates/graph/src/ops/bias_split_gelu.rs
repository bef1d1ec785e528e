//! A bias, and half of the result gated by Gelu of the other half.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, UnaryFunction, Wide, conv::differ,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `y = a · Gelu(b)`, where `a` and `b` are the halves of `x + bias` along the last axis: `x [n, s, d]`, `bias [d]`, `y [n, s, d / 2]`.
#[derive(Clone, Debug, PartialEq)]
pub struct BiasSplitGelu;

impl Operator for BiasSplitGelu {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        Ok(BiasSplitGelu.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("BiasSplitGelu").in_domain("com.microsoft")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, bias) = (inputs.tensor(0)?, inputs.tensor(1)?);
        inputs.same_dtype(0, 1)?;
        let mut shape = x.shape.clone();
        if let Some(dims) = &mut shape {
            let last = dims.last_mut().ok_or_else(|| OpError::input("expected [n, s, d], got a scalar"))?;
            let wrong = bias.shape.as_ref().is_some_and(|b| b.len() != 1 || differ(&b[0], last));
            if wrong || last.as_const().is_some_and(|d| d % 2 != 0) {
                return Err(OpError::input(format!("expected [n, s, d] with d even, and [d], got {x} and {bias}")));
            }
            *last = last.floor_div(&Dim::Const(2));
        }
        Ok(vec![TensorFact { dtype: x.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, bias) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let mut shape = x.shape().dims().to_vec();
        let width = shape.last().copied().unwrap_or(1);
        if width % 2 != 0 || bias.shape().dims() != [width] {
            let (x, bias) = (x.shape(), bias.shape());
            return Err(OpError::input(format!("expected [n, s, d] with d even, and [d], got {x} and {bias}")));
        }
        let (values, bias) = (Wide::floats(x)?, Wide::floats(bias)?);
        let gelu = UnaryFunction::Gelu { tanh: false };
        let half = width / 2;
        let gated = |row: &[f64], i: usize| (row[i] + bias[i]) * gelu.of_float(row[half + i] + bias[half + i]);
        let rows = values.chunks_exact(width.max(1));
        let y = rows.flat_map(|row| (0..half).map(move |i| gated(row, i))).collect();
        if let Some(last) = shape.last_mut() {
            *last = half;
        }
        Ok(vec![Wide::Float(y).narrow(x.dtype(), shape)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn the_second_half_gates() {
        let of = || case("com.microsoft.BiasSplitGelu", 1).input(f32s(&[1, 1, 4], &[1.0, 2.0, 3.0, -1.0]));
        // Gelu(1) is 0.841345, Gelu(0) is 0.
        of().input(f32s(&[4], &[1.0, 1.0, -2.0, 1.0])).gives([f32s(&[1, 1, 2], &[1.68269, 0.0])]);
        of().wave(&[3]).fails("expected [n, s, d]");
    }
}
