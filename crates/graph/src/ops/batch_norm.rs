//! Batch normalisation, with the statistics of the training data or of the batch itself.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, conv::differ};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `Y = (X − mean) / √(variance + epsilon) · scale + bias` per channel; inputs `X [n, c, …]` (or `[n]`, one channel), and `scale`, `bias`,
/// `mean`, `variance` of `[c]`.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchNorm {
    pub epsilon: f32,
    pub training: Option<Training>,
    /// Every element of a sample is a channel of its own, and parameters are of `[c, …]`: `spatial = 0` before opset 9.
    pub per_element: bool,
}

/// In training the mean and the variance are those of the batch, the variance divided by the number of elements. Further outputs: the
/// running mean and variance, `running · momentum + of the batch · (1 − momentum)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Training {
    pub momentum: f32,
    /// Followed by the batch's own mean and variance, as before opset 14.
    pub saves_statistics: bool,
}

impl Operator for BatchNorm {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(5..=5)?;
        let epsilon = node.float("epsilon", 1e-5)?;
        let momentum = node.float("momentum", 0.9)?;
        let is_test = node.opset < 7 && node.flag("is_test", false)?;
        let is_training = match node.opset {
            14.. => node.flag("training_mode", false)?,
            // The number of outputs says it.
            _ => node.outputs > 1 && !is_test,
        };
        if node.outputs > 1 && !is_training {
            return Err(node.corrupt(format!("{} outputs, which only training gives", node.outputs)));
        }
        let training = Training { momentum, saves_statistics: node.opset < 14 && node.outputs > 3 };
        let per_element = node.opset < 9 && !node.flag("spatial", true)?;
        Ok(BatchNorm { epsilon, training: is_training.then_some(training), per_element }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("BatchNormalization").with("epsilon", self.epsilon);
        let spelling = match self.training {
            Some(training) => spelling.with("momentum", training.momentum).with("training_mode", 1),
            None => spelling,
        };
        match self.training {
            _ if self.per_element => spelling.until(8),
            Some(Training { saves_statistics: true, .. }) => spelling.until(13),
            _ => spelling,
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let expected: Option<Vec<Dim>> = x.shape.as_ref().map(|dims| match &dims[..] {
            [] | [_] => vec![Dim::Const(1)],
            [_, rest @ ..] => rest[..if self.per_element { rest.len() } else { 1 }].to_vec(),
        });
        for index in 1..5 {
            let parameter = inputs.tensor(index)?;
            let wrong = |expected: &[Dim]| {
                let fits =
                    |p: &Vec<Dim>| p.len() == expected.len() && !p.iter().zip(expected).any(|(p, e)| differ(p, e));
                parameter.shape.as_ref().is_some_and(|p| !fits(p))
            };
            if x.rank() == Some(0) || expected.as_deref().is_some_and(wrong) {
                return Err(OpError::input(format!(
                    "expected [n, c, …] and parameters of [c], got {x} and {parameter}"
                )));
            }
        }
        let y = TensorFact { value: None, ..x.clone() };
        let mut facts = vec![y.into()];
        if self.training.is_some() {
            let statistic = |index: usize| -> Result<Fact, OpError> {
                let dtype = inputs.tensor(index)?.dtype;
                Ok(TensorFact { dtype, shape: expected.clone(), value: None }.into())
            };
            facts.extend([statistic(3)?, statistic(4)?, statistic(3)?, statistic(4)?]);
        }
        Ok(facts)
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let shape = match x.shape().dims() {
            [] => return Err(OpError::input(format!("expected [n, c, …], got {}", x.shape()))),
            [_] => &[1][..],
            [_, rest @ ..] => &rest[..if self.per_element { rest.len() } else { 1 }],
        };
        let channels: usize = shape.iter().product();
        let parameter = |index: usize| {
            let values = Wide::floats(inputs.tensor(index)?)?;
            match values.len() == channels {
                true => Ok(values),
                false => {
                    Err(OpError::input(format!("input {index} must have {channels} elements, has {}", values.len())))
                }
            }
        };
        let (scale, bias, mut mean, mut variance) = (parameter(1)?, parameter(2)?, parameter(3)?, parameter(4)?);
        let mut y = Wide::floats(x)?;
        // Elements that follow each other in one channel.
        let plane: usize = x.shape().dims().iter().skip(1 + shape.len()).product();
        let channel = |i: usize| i / plane % channels;
        let mut statistics = Vec::new();
        if let Some(training) = self.training {
            let (of_batch, of_squares) = moments(&y, channels, channel);
            for (running, batch, index) in [(&mean, &of_batch, 3), (&variance, &of_squares, 4)] {
                let momentum = f64::from(training.momentum);
                let next = running.iter().zip(batch).map(|(r, b)| r * momentum + b * (1.0 - momentum));
                statistics.push((next.collect::<Vec<_>>(), index));
            }
            statistics.extend([(of_batch.clone(), 3), (of_squares.clone(), 4)]);
            (mean, variance) = (of_batch, of_squares);
        }
        for (i, x) in y.iter_mut().enumerate() {
            let c = channel(i);
            let inverse = 1.0 / (variance[c] + f64::from(self.epsilon)).sqrt();
            *x = (*x - mean[c]) * inverse * scale[c] + bias[c];
        }
        let mut results = vec![Wide::Float(y).narrow(x.dtype(), x.shape().clone())?.into()];
        for (values, index) in statistics {
            results.push(Wide::Float(values).narrow(inputs.tensor(index)?.dtype(), shape)?.into());
        }
        Ok(results)
    }
}

/// Mean and variance of every channel; of nothing they are no number.
fn moments(x: &[f64], channels: usize, channel: impl Fn(usize) -> usize) -> (Vec<f64>, Vec<f64>) {
    let count = (x.len() / channels.max(1)) as f64;
    let mut mean = vec![0.0; channels];
    x.iter().enumerate().for_each(|(i, x)| mean[channel(i)] += x);
    mean.iter_mut().for_each(|m| *m /= count);
    let mut variance = vec![0.0; channels];
    x.iter().enumerate().for_each(|(i, x)| variance[channel(i)] += (x - mean[channel(i)]).powi(2));
    variance.iter_mut().for_each(|v| *v /= count);
    (mean, variance)
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s};

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
    fn training_takes_the_statistics_of_the_batch() {
        let x = || f32s(&[2, 1, 2], &[1., 2., 3., 6.]);
        let parameters = |case: Case| {
            let one = |value: f32| f32s(&[1], &[value]);
            case.input(x()).input(one(2.0)).input(one(1.0)).input(one(10.0)).input(one(100.0))
        };
        // Mean 3, variance 3.5; √3.5 is 1.87083.
        let y = || f32s(&[2, 1, 2], &[-1.13809, -0.069045, 1.0, 4.207135]);
        let training = parameters(case("BatchNormalization", 15).with("training_mode", 1).with("epsilon", 0.0f32));
        training.with("momentum", 0.5f32).gives([y(), f32s(&[1], &[6.5]), f32s(&[1], &[51.75])]);
        let old = parameters(case("BatchNormalization", 9).with("epsilon", 0.0f32)).with("momentum", 1.0f32);
        let one = |value: f32| f32s(&[1], &[value]);
        old.gives([y(), one(10.0), one(100.0), one(3.0), one(3.5)]);
    }

    #[test]
    fn old_forms() {
        let of = |opset| case("BatchNormalization", opset).with("epsilon", 0.0f32);
        let four = |case: Case, values: [f32; 4]| {
            let tensor = || f32s(&[2, 2], &values);
            case.input(f32s(&[1, 2, 2], &[1., 2., 3., 4.]))
                .input(tensor())
                .input(tensor())
                .input(tensor())
                .input(tensor())
        };
        let each = four(of(7).with("spatial", 0), [1., 1., 4., 4.]);
        each.gives([f32s(&[1, 2, 2], &[1., 2., 2., 4.])]);
        let one = || f32s(&[1], &[4.0]);
        let row = of(6).with("is_test", 1).input(f32s(&[2], &[0., 8.])).input(one()).input(one()).input(one());
        row.input(one()).gives([f32s(&[2], &[-4., 12.])]);
    }

    #[test]
    fn outputs_of_training_need_training() {
        let node = case("BatchNormalization", 15).wave(&[1, 2]).wave(&[2]).wave(&[2]).wave(&[2]).wave(&[2]);
        node.outputs(3).fails("which only training gives");
    }
}
