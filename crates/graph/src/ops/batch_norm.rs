//! Batch normalisation with the statistics of the training data.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, conv::differ};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `Y = (X − mean) / √(variance + epsilon) · scale + bias` per channel; inputs `X [n, c, …]`, and `scale`, `bias`, `mean`,
/// `variance` of `[c]`. Training mode is not computed.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchNorm {
    pub epsilon: f32,
}

impl Operator for BatchNorm {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(5..=5)?;
        let epsilon = node.float("epsilon", 1e-5)?;
        // Only training reads it.
        node.float("momentum", 0.9)?;
        if node.opset >= 14 && node.flag("training_mode", false)? {
            return Err(node.unsupported("training_mode"));
        }
        if node.opset < 9 && !node.flag("spatial", true)? {
            return Err(node.unsupported("spatial = 0"));
        }
        if node.outputs > 1 {
            return Err(node.unsupported(format!("{} outputs, which only training gives", node.outputs)));
        }
        Ok(BatchNorm { epsilon }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("BatchNormalization").with("epsilon", self.epsilon)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        for index in 1..5 {
            let parameter = inputs.tensor(index)?;
            let channels = x.shape.as_ref().and_then(|dims| dims.get(1));
            let wrong =
                parameter.shape.as_ref().is_some_and(|p| p.len() != 1 || channels.is_some_and(|c| differ(&p[0], c)));
            if wrong || x.rank().is_some_and(|rank| rank < 2) {
                return Err(OpError::input(format!(
                    "expected [n, c, …] and parameters of [c], got {x} and {parameter}"
                )));
            }
        }
        Ok(vec![TensorFact { value: None, ..x.clone() }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let [_, channels, spatial @ ..] = x.shape().dims() else {
            return Err(OpError::input(format!("expected [n, c, …], got {}", x.shape())));
        };
        let parameter = |index: usize| {
            let values = Wide::floats(inputs.tensor(index)?)?;
            match values.len() == *channels {
                true => Ok(values),
                false => {
                    Err(OpError::input(format!("input {index} must have {channels} elements, has {}", values.len())))
                }
            }
        };
        let (scale, bias, mean, variance) = (parameter(1)?, parameter(2)?, parameter(3)?, parameter(4)?);
        let mut y = Wide::floats(x)?;
        let plane: usize = spatial.iter().product();
        if plane > 0 {
            for (index, plane) in y.chunks_exact_mut(plane).enumerate() {
                let c = index % channels;
                let inverse = 1.0 / (variance[c] + f64::from(self.epsilon)).sqrt();
                plane.iter_mut().for_each(|x| *x = (*x - mean[c]) * inverse * scale[c] + bias[c]);
            }
        }
        Ok(vec![Wide::Float(y).narrow(x.dtype(), x.shape().clone())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("BatchNormalization", 15)
            .with("epsilon", 0.01f32)
            .wave(&[2, 2, 3])
            .wave(&[2])
            .wave(&[2])
            .wave(&[2])
            .input(f32s(&[2], &[0.5, 2.0]))
            .gives([f32s(
                &[2, 2, 3],
                &[
                    1.82531, 0.60007, 1.30021, 0.352103, -0.52958, -1.41126, 0.25, 0.95014, 1.65028, -0.0887384,
                    -0.97042, -1.8521,
                ],
            )]);
        case("BatchNormalization", 9)
            .wave(&[2, 3])
            .wave(&[3])
            .wave(&[3])
            .wave(&[3])
            .input(f32s(&[3], &[0.5, 2.0, 0.0]))
            .gives([f32s(&[2, 3], &[1.84097, -0.308059, 40.5285, 0.0732251, -0.52903, 20.7642])]);
    }

    #[test]
    fn training_is_refused() {
        let node = case("BatchNormalization", 15).with("training_mode", 1).wave(&[1, 2]);
        node.wave(&[2]).wave(&[2]).wave(&[2]).wave(&[2]).fails("training_mode");
    }
}
