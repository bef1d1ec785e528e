//! Normalisation over the last axes.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, broadcast_index, normalize_axis,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Shape, Tensor, Value};

/// `Y = (X − mean) / √(variance + epsilon) · scale + bias` over `axis` and all after it; inputs `X`, `scale` and optional
/// `bias`, which broadcast to `X`. Further outputs: the mean and `1 / √(variance + epsilon)`, f32, normalised axes of extent 1.
/// With `centred` false it is RMSNormalization: the mean counts as 0, and there is no bias and one output, of the type of `scale`.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerNorm {
    pub axis: i64,
    pub epsilon: f32,
    pub centred: bool,
    /// Without a mean, `1 / √(variance + epsilon)` is a second output: what ONNX Runtime calls SimplifiedLayerNormalization.
    pub with_deviation: bool,
}

impl Operator for LayerNorm {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let centred = node.op_type == "LayerNormalization";
        node.expect_inputs(if centred { 2..=3 } else { 2..=2 })?;
        let axis = node.int("axis", -1)?;
        let epsilon = node.float("epsilon", 1e-5)?;
        // The type that statistics are computed in: here always wider than any that can be asked for.
        let stash_type = node.int("stash_type", 1)?;
        if stash_type != i64::from(DType::F32.onnx_code()) {
            return Err(node.unsupported(format!("stash_type {stash_type} (only 1, float)")));
        }
        let with_deviation = node.op_type == "SimplifiedLayerNormalization" && node.outputs > 1;
        Ok(LayerNorm { axis, epsilon, centred, with_deviation }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = match self.centred {
            true => Spelling::new("LayerNormalization"),
            false if self.with_deviation => Spelling::new("SimplifiedLayerNormalization"),
            false => Spelling::new("RMSNormalization").since(23),
        };
        spelling.with("axis", self.axis).with("epsilon", self.epsilon)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, scale) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let dtype = if self.centred { x.dtype } else { scale.dtype };
        let y = TensorFact { dtype, value: None, shape: x.shape.clone() };
        let statistics = match &x.shape {
            None => TensorFact::unknown_rank(DType::F32),
            Some(dims) => {
                let axis = normalize_axis(self.axis, dims.len())?;
                let dims = dims.iter().enumerate();
                TensorFact::new(
                    DType::F32,
                    dims.map(|(i, d)| if i < axis { d.clone() } else { Dim::Const(1) }).collect::<Vec<_>>(),
                )
            }
        };
        Ok(match self.centred {
            true => vec![y.into(), statistics.clone().into(), statistics.into()],
            false => vec![y.into(), statistics.into()],
        })
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let shape = x.shape();
        let axis = normalize_axis(self.axis, shape.rank())?;
        let extent: usize = shape[axis..].iter().product();
        let mut y = Wide::floats(x)?;
        let rows = context.bounded_len(&shape[..axis])?;
        let (means, inverse_deviations) = normalise(&mut y, (rows, extent), self.epsilon, self.centred);
        scale_and_shift(&mut y, shape, inputs.tensor(1)?, inputs.optional_tensor(2)?)?;
        let dtype = if self.centred { x.dtype() } else { inputs.tensor(1)?.dtype() };
        let y = Wide::Float(y).narrow(dtype, shape.clone())?;
        let statistics = |values: Vec<f64>| {
            let shape: Shape = shape.iter().enumerate().map(|(i, &d)| if i < axis { d } else { 1 }).collect();
            Wide::Float(values).narrow(DType::F32, shape)
        };
        Ok(match self.centred {
            true => vec![y.into(), statistics(means)?.into(), statistics(inverse_deviations)?.into()],
            false => vec![y.into(), statistics(inverse_deviations)?.into()],
        })
    }
}

/// Of every row of `(rows, extent)`: makes it `(y − mean) / √(variance + epsilon)`, and gives the mean, which counts as 0 where it is not
/// `centred`, and `1 / √(variance + epsilon)`.
pub(super) fn normalise(
    y: &mut [f64],
    (rows, extent): (usize, usize),
    epsilon: f32,
    centred: bool,
) -> (Vec<f64>, Vec<f64>) {
    if extent == 0 {
        // The mean of nothing is no number.
        return (vec![f64::NAN; rows], vec![f64::NAN; rows]);
    }
    let row = |row: &mut [f64]| {
        let mean = if centred { row.iter().sum::<f64>() / extent as f64 } else { 0.0 };
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / extent as f64;
        let inverse = 1.0 / (variance + f64::from(epsilon)).sqrt();
        row.iter_mut().for_each(|x| *x = (*x - mean) * inverse);
        (mean, inverse)
    };
    y.chunks_exact_mut(extent).map(row).unzip()
}

/// `y = y · scale + bias`, both broadcast to `shape`.
pub(super) fn scale_and_shift(
    y: &mut [f64],
    shape: &Shape,
    scale: &Tensor,
    bias: Option<&Tensor>,
) -> Result<(), OpError> {
    for (tensor, is_scale) in [(Some(scale), true), (bias, false)] {
        let Some(tensor) = tensor else { continue };
        if super::broadcast_shape(&[tensor.shape(), shape])? != *shape {
            return Err(OpError::input(format!("{} does not broadcast to {shape}", tensor.shape())));
        }
        let values = Wide::floats(tensor)?;
        let sources = broadcast_index(tensor.shape(), shape);
        y.iter_mut().zip(sources).for_each(|(y, i)| if is_scale { *y *= values[i] } else { *y += values[i] });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("LayerNormalization", 17).with("axis", -1).wave(&[2, 3]).wave(&[3]).wave(&[3]).gives([
            f32s(&[2, 3], &[0.831233, 0.848389, 0.970938, -0.362368, -0.75, 0.693816]),
            f32s(&[2, 1], &[-0.416667, 0.25]),
            f32s(&[2, 1], &[1.39496, 1.22474]),
        ]);
        case("LayerNormalization", 17).with("axis", 1).with("epsilon", 0.01f32).wave(&[2, 2, 2]).wave(&[2, 2]).gives([
            f32s(&[2, 2, 2], &[0.65294, 0.65294, -0.130588, -0.979409, -0.0987441, -1.72802, 0.345604, 0.148116]),
        ]);
        case("RMSNormalization", 23)
            .with("axis", -1)
            .wave(&[2, 3])
            .wave(&[3])
            .gives([f32s(&[2, 3], &[0.753773, 0.753773, -0.150755, -0.73192, 0.36596, -0.219576])]);
        case("SimplifiedLayerNormalization", 1).with("epsilon", 0.01f32).wave(&[2, 3]).wave(&[3]).gives([
            f32s(&[2, 3], &[0.748355, 0.748355, -0.149671, -0.726957, 0.363479, -0.218087]),
            f32s(&[2, 1], &[1.19737, 1.16313]),
        ]);
        case("SimplifiedLayerNormalization", 1)
            .wave(&[2, 3])
            .wave(&[3])
            .gives([f32s(&[2, 3], &[0.753773, 0.753773, -0.150755, -0.73192, 0.36596, -0.219576])]);
    }
}
