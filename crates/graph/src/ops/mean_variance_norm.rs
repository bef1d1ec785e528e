//! Normalisation to mean 0 and variance 1 over chosen axes.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, broadcast_index, normalize_axis,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Shape, Value};

/// `Y = (X − mean) / (√variance + 1e-9)`, by ONNX's function body.
#[derive(Clone, Debug, PartialEq)]
pub struct MeanVarianceNorm {
    pub axes: Vec<i64>,
}

impl Operator for MeanVarianceNorm {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let axes = node.optional_ints("axes")?.unwrap_or_else(|| vec![0, 2, 3]);
        Ok(MeanVarianceNorm { axes }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("MeanVarianceNormalization").with("axes", self.axes.clone())
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        if let Some(rank) = x.rank() {
            self.axes.iter().try_for_each(|&axis| normalize_axis(axis, rank).map(|_| ()))?;
        }
        Ok(vec![TensorFact { value: None, ..x.clone() }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let mut kept: Shape = x.shape().clone();
        for &axis in &self.axes {
            let axis = normalize_axis(axis, kept.rank())?;
            kept = kept.iter().enumerate().map(|(i, &d)| if i == axis { 1 } else { d }).collect();
        }
        let groups: Vec<usize> = broadcast_index(&kept, x.shape()).collect();
        let mut y = Wide::floats(x)?;
        let count = (y.len() / kept.element_count().max(1)) as f64;
        let mut means = vec![0.0; kept.element_count()];
        groups.iter().zip(&y).for_each(|(&g, x)| means[g] += x / count);
        let mut variances = vec![0.0; means.len()];
        groups.iter().zip(&y).for_each(|(&g, x)| variances[g] += (x - means[g]).powi(2) / count);
        let normalised = y.iter_mut().zip(&groups);
        normalised.for_each(|(x, &g)| *x = (*x - means[g]) / (variances[g].sqrt() + 1e-9));
        Ok(vec![Wide::Float(y).narrow(x.dtype(), x.shape().clone())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("MeanVarianceNormalization", 13).wave(&[2, 2, 1, 3]).gives([f32s(
            &[2, 2, 1, 3],
            &[
                -1.30856, 0.889821, -0.366397, 1.46385, 0.29277, -0.87831, 1.51793, 0.261712, -0.994506, 0.87831,
                -0.29277, -1.46385,
            ],
        )]);
        case("MeanVarianceNormalization", 13).with("axes", vec![0i64, 2]).wave(&[2, 2, 2, 2]).gives([f32s(
            &[2, 2, 2, 2],
            &[
                -1.26491, 0.199117, 0.632456, 0.995585, -1.26491, -1.26491, 0.632456, 0.632456, -0.632456, 0.464606,
                1.26491, -1.65931, -0.632456, -0.632456, 1.26491, 1.26491,
            ],
        )]);
    }
}
