//! Division by a norm along an axis.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, normalize_axis};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `Y = X / ‖X‖` along `axis`, the norm L1 or L2; zeros where the norm is 0.
#[derive(Clone, Debug, PartialEq)]
pub struct LpNorm {
    pub axis: i64,
    pub p: LpNormOrder,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LpNormOrder {
    L1,
    L2,
}

impl Operator for LpNorm {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let axis = node.int("axis", -1)?;
        let p = match node.int("p", 2)? {
            1 => LpNormOrder::L1,
            2 => LpNormOrder::L2,
            other => return Err(node.corrupt(format!("p must be 1 or 2, got {other}"))),
        };
        Ok(LpNorm { axis, p }.into())
    }

    fn export(&self) -> Spelling {
        let p = if self.p == LpNormOrder::L1 { 1 } else { 2 };
        Spelling::new("LpNormalization").with("axis", self.axis).with("p", p)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        x.rank().map(|rank| normalize_axis(self.axis, rank)).transpose()?;
        Ok(vec![TensorFact { value: None, ..x.clone() }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let axis = normalize_axis(self.axis, x.shape().rank())?;
        let (extent, inner) = (x.shape()[axis], x.shape()[axis + 1..].iter().product::<usize>());
        let mut y = Wide::floats(x)?;
        let outer = y.len().checked_div(extent * inner).unwrap_or(0);
        for start in (0..outer).flat_map(|o| (0..inner).map(move |i| o * extent * inner + i)) {
            let line = || (0..extent).map(|i| start + i * inner);
            let norm = match self.p {
                LpNormOrder::L1 => line().map(|i| y[i].abs()).sum::<f64>(),
                LpNormOrder::L2 => line().map(|i| y[i] * y[i]).sum::<f64>().sqrt(),
            };
            line().for_each(|i| y[i] = if norm == 0.0 { 0.0 } else { y[i] / norm });
        }
        Ok(vec![Wide::Float(y).narrow(x.dtype(), x.shape().clone())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("LpNormalization", 7)
            .with("axis", 0)
            .with("p", 1)
            .wave(&[2, 2])
            .gives([f32s(&[2, 2], &[-0.714286, 0.285714, -0.285714, 0.714286])]);
        case("LpNormalization", 7)
            .wave(&[2, 3])
            .gives([f32s(&[2, 3], &[-0.870388, 0.348155, -0.348155, 0.845154, 0.169031, -0.507093])]);
    }
}
