//! Normalisation of each channel, or group of channels, of each sample.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, conv::differ};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// `Y = (X − mean) / √(variance + epsilon) · scale + bias`; inputs `X [n, c, …]`, `scale [c]`, `bias [c]`. Mean and variance are
/// over the spatial axes, and, where there are `groups` (GroupNormalization), over the channels of a group.
#[derive(Clone, Debug, PartialEq)]
pub struct InstanceNorm {
    pub epsilon: f32,
    pub groups: Option<usize>,
}

impl Operator for InstanceNorm {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(3..=3)?;
        let epsilon = node.float("epsilon", 1e-5)?;
        let groups = match node.op_type.as_str() {
            "InstanceNormalization" => None,
            _ if node.opset < 21 => {
                return Err(node.unsupported("scale and bias per group, as before opset 21"));
            }
            _ => {
                let stash_type = node.int("stash_type", 1)?;
                if stash_type != i64::from(DType::F32.onnx_code()) {
                    return Err(node.unsupported(format!("stash_type {stash_type} (only 1, float)")));
                }
                match node.count("num_groups", 0)? {
                    0 => return Err(node.corrupt("attribute 'num_groups' is missing")),
                    groups => Some(groups),
                }
            }
        };
        Ok(InstanceNorm { epsilon, groups }.into())
    }

    fn export(&self) -> Spelling {
        match self.groups {
            None => Spelling::new("InstanceNormalization"),
            Some(groups) => Spelling::new("GroupNormalization").with("num_groups", groups as i64),
        }
        .with("epsilon", self.epsilon)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        for index in 1..3 {
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
        let (scale, bias) = (Wide::floats(inputs.tensor(1)?)?, Wide::floats(inputs.tensor(2)?)?);
        if scale.len() != *channels || bias.len() != *channels {
            let message = format!("{} scales and {} biases for {channels} channels", scale.len(), bias.len());
            return Err(OpError::input(message));
        }
        let groups = self.groups.unwrap_or(*channels);
        if groups == 0 || channels % groups != 0 {
            return Err(OpError::input(format!("{channels} channels do not divide into {groups} groups")));
        }
        let plane: usize = spatial.iter().product();
        let extent = channels / groups * plane;
        let mut y = Wide::floats(x)?;
        if extent > 0 {
            for (index, group) in y.chunks_exact_mut(extent).enumerate() {
                let mean = group.iter().sum::<f64>() / extent as f64;
                let variance = group.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / extent as f64;
                let inverse = 1.0 / (variance + f64::from(self.epsilon)).sqrt();
                let first = index % groups * (channels / groups);
                for (i, x) in group.iter_mut().enumerate() {
                    let c = first + i / plane;
                    *x = (*x - mean) * inverse * scale[c] + bias[c];
                }
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
        case("InstanceNormalization", 7).with("epsilon", 0.01f32).wave(&[2, 2, 3]).wave(&[2]).wave(&[2]).gives([f32s(
            &[2, 2, 3],
            &[
                0.825664, -0.383231, 0.307566, 0.769577, -0.75, -2.26958, -0.357831, 0.25, 0.857831, 0.769577, -0.75,
                -2.26958,
            ],
        )]);
        case("GroupNormalization", 21)
            .with("num_groups", 2)
            .with("epsilon", 0.01f32)
            .wave(&[1, 4, 3])
            .wave(&[4])
            .wave(&[4])
            .gives([f32s(
                &[1, 4, 3],
                &[
                    0.941613, -0.0958066, 0.497005, 1.22604, -0.255991, -1.73802, 1.33802, 1.03756, 0.737092,
                    -0.788723, 0.112675, 1.01407,
                ],
            )]);
    }

    #[test]
    fn groups_must_divide_the_channels() {
        case("GroupNormalization", 21)
            .with("num_groups", 2)
            .wave(&[1, 3, 1])
            .wave(&[3])
            .wave(&[3])
            .fails("3 channels do not divide into 2 groups");
    }
}
