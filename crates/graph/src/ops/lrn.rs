//! Local response normalisation across channels (Krizhevsky et al. 2012).

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `Y = X / (bias + alpha/size · Σ X²)^beta`, the sum over `size` channels around each: `⌊(size − 1)/2⌋` before it and
/// `⌈(size − 1)/2⌉` after. `X [n, c, …]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Lrn {
    pub alpha: f32,
    pub beta: f32,
    pub bias: f32,
    pub size: usize,
}

impl Operator for Lrn {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let (alpha, beta, bias) = (node.float("alpha", 1e-4)?, node.float("beta", 0.75)?, node.float("bias", 1.0)?);
        match node.count("size", 0)? {
            0 => Err(node.corrupt("attribute 'size' is missing")),
            size => Ok(Lrn { alpha, beta, bias, size }.into()),
        }
    }

    fn export(&self) -> Spelling {
        Spelling::new("LRN")
            .with("alpha", self.alpha)
            .with("beta", self.beta)
            .with("bias", self.bias)
            .with("size", self.size as i64)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        if x.rank().is_some_and(|rank| rank < 2) {
            return Err(OpError::input(format!("expected [n, c, …], got {x}")));
        }
        Ok(vec![TensorFact { value: None, ..x.clone() }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let [_, channels, spatial @ ..] = x.shape().dims() else {
            return Err(OpError::input(format!("expected [n, c, …], got {}", x.shape())));
        };
        let plane: usize = spatial.iter().product();
        let values = Wide::floats(x)?;
        let (before, after) = ((self.size - 1) / 2, self.size / 2);
        let factor = f64::from(self.alpha) / self.size as f64;
        let y = (0..values.len()).map(|i| {
            let (sample, c, within) = (i / (plane * channels), i / plane % channels, i % plane);
            let around = c.saturating_sub(before)..c.saturating_add(after).saturating_add(1).min(*channels);
            let sum: f64 = around.map(|c| values[(sample * channels + c) * plane + within].powi(2)).sum();
            values[i] / (f64::from(self.bias) + factor * sum).powf(f64::from(self.beta))
        });
        Ok(vec![Wide::Float(y.collect()).narrow(x.dtype(), x.shape().clone())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("LRN", 13)
            .with("size", 3)
            .with("alpha", 0.5f32)
            .with("beta", 0.6f32)
            .with("bias", 2.0f32)
            .wave(&[1, 4, 1, 2])
            .gives([f32s(
                &[1, 4, 1, 2],
                &[-0.757944, 0.303178, -0.302358, 0.740007, 0.15498, -0.448703, 0.627011, 0.0],
            )]);
    }
}
