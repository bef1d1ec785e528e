//! Layer normalisation of a sum, as ONNX Runtime fuses them.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, broadcast_index,
    broadcast_shape,
    layer_norm::{normalise, scale_and_shift},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// `s = x + skip + bias`, `y = (s − mean) / √(variance + epsilon) · gamma + beta` over the last axis. Inputs: `x [.., d]`, `skip` that
/// broadcasts to it, `gamma`, `beta` and `bias` `[d]`, the last two optional. Outputs: `y`, the mean and `1 / √(variance + epsilon)`
/// `[.., 1]` of type f32, and `s`. With `centred` false the mean counts as 0, and there is no `beta` among the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct SkipLayerNorm {
    pub epsilon: f32,
    pub centred: bool,
}

impl SkipLayerNorm {
    /// The inputs with `beta` and `bias`.
    pub fn beta_and_bias(&self) -> (Option<usize>, usize) {
        if self.centred { (Some(3), 4) } else { (None, 3) }
    }
}

impl Operator for SkipLayerNorm {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let centred = node.op_type == "SkipLayerNormalization";
        node.expect_inputs(if centred { 3..=5 } else { 3..=4 })?;
        Ok(SkipLayerNorm { epsilon: node.float("epsilon", 1e-12)?, centred }.into())
    }

    fn export(&self) -> Spelling {
        let name = if self.centred { "SkipLayerNormalization" } else { "SkipSimplifiedLayerNormalization" };
        Spelling::new(name).in_domain("com.microsoft").with("epsilon", self.epsilon)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        inputs.tensor(1)?;
        inputs.tensor(2)?;
        (1..5).try_for_each(|index| inputs.same_dtype(0, index))?;
        let y = TensorFact { value: None, ..x.clone() };
        let mut statistics = TensorFact { dtype: DType::F32, ..y.clone() };
        if let Some(dims) = &mut statistics.shape {
            *dims.last_mut().ok_or_else(|| OpError::input("expected [.., d], got a scalar"))? = Dim::Const(1);
        }
        Ok(vec![y.clone().into(), statistics.clone().into(), statistics.into(), y.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, skip, gamma) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?);
        let (beta, bias) = self.beta_and_bias();
        let beta = beta.map(|beta| inputs.optional_tensor(beta)).transpose()?.flatten();
        let shape = x.shape();
        let Some((&width, rows)) = shape.dims().split_last() else {
            return Err(OpError::input("expected [.., d], got a scalar"));
        };
        let mut y = Wide::floats(x)?;
        for added in [Some(skip), inputs.optional_tensor(bias)?].into_iter().flatten() {
            if broadcast_shape(&[added.shape(), shape])? != *shape {
                return Err(OpError::input(format!("{} does not broadcast to {shape}", added.shape())));
            }
            let values = Wide::floats(added)?;
            y.iter_mut().zip(broadcast_index(added.shape(), shape)).for_each(|(y, i)| *y += values[i]);
        }
        let sum = Wide::Float(y.clone()).narrow(x.dtype(), shape.clone())?;
        let (means, inverses) = normalise(&mut y, (context.bounded_len(rows)?, width), self.epsilon, self.centred);
        scale_and_shift(&mut y, shape, gamma, beta)?;
        let y = Wide::Float(y).narrow(x.dtype(), shape.clone())?;
        let one_each: Vec<usize> = rows.iter().copied().chain([1]).collect();
        let statistics = |values: Vec<f64>| Wide::Float(values).narrow(DType::F32, one_each.clone());
        Ok(vec![y.into(), statistics(means)?.into(), statistics(inverses)?.into(), sum.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.SkipLayerNormalization", 1)
            .with("epsilon", 0.01f32)
            .wave(&[1, 2, 3])
            .wave(&[2, 3])
            .wave(&[3])
            .wave(&[3])
            .wave(&[3])
            .gives([
                f32s(&[1, 2, 3], &[0.709695, -0.958008, -1.11612, 0.873367, -1.04472, -1.88643]),
                f32s(&[1, 2, 1], &[-0.25, 0.166667]),
                f32s(&[1, 2, 1], &[0.464489, 0.759798]),
                f32s(&[1, 2, 3], &[-2.75, 2.5, -0.5, -0.5, 2.0, -1.0]),
            ]);
        case("com.microsoft.SkipSimplifiedLayerNormalization", 1)
            .with("epsilon", 0.01f32)
            .wave(&[1, 2, 3])
            .wave(&[1, 2, 3])
            .wave(&[3])
            .wave(&[3])
            .gives([
                f32s(&[1, 2, 3], &[-0.142177, -0.995242, -0.94785, 0.247178, -0.617945, -1.1535]),
                f32s(&[1, 2, 1], &[0.0, 0.0]),
                f32s(&[1, 2, 1], &[0.75828, 0.659142]),
                f32s(&[1, 2, 3], &[-0.75, 1.75, -1.25, 1.5, 1.25, -1.75]),
            ]);
        case("com.microsoft.SkipLayerNormalization", 1)
            .wave(&[1, 2, 3])
            .wave(&[1, 2, 3])
            .wave(&[3])
            .gives([f32s(&[1, 2, 3], &[-0.290619, -0.959043, -0.116248, 0.0505076, -0.833376, -1.3132])]);
    }

    #[test]
    fn what_is_added_broadcasts_to_the_input() {
        let of = |skip: &[usize]| case("com.microsoft.SkipLayerNormalization", 1).wave(&[1, 3]).wave(skip).wave(&[3]);
        of(&[2, 3]).fails("[2, 3] does not broadcast to [1, 3]");
    }
}
