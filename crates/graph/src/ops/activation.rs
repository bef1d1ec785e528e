//! Activations that products are fused with.

use super::Spelling;

/// `y = f(x)` applied to every element of a product before it is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    Relu,
    /// `min(max(x, low), high)`; ReLU6 is `Clip { low: 0.0, high: 6.0 }`.
    Clip {
        low: f32,
        high: f32,
    },
    LeakyRelu {
        alpha: f32,
    },
    Sigmoid,
    Tanh,
    /// `x · σ(x)`.
    Silu,
    HardSigmoid {
        alpha: f32,
        beta: f32,
    },
    HardSwish,
    /// `x/2 · (1 + erf(x/√2))`.
    Gelu,
    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715·x³)))`.
    GeluTanh,
}

impl Activation {
    /// The definition. NaN goes through as NaN.
    pub fn apply(self, x: f64) -> f64 {
        use Activation::*;
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match self {
            Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            Clip { low, high } => {
                let x = if x < low.into() { low.into() } else { x };
                if x > high.into() { high.into() } else { x }
            }
            LeakyRelu { alpha } => {
                if x < 0.0 {
                    x * f64::from(alpha)
                } else {
                    x
                }
            }
            Sigmoid => sigmoid(x),
            Tanh => x.tanh(),
            Silu => x * sigmoid(x),
            HardSigmoid { alpha, beta } => (x * f64::from(alpha) + f64::from(beta)).clamp(0.0, 1.0),
            HardSwish => x * (x / 6.0 + 0.5).clamp(0.0, 1.0),
            Gelu => 0.5 * x * (1.0 + super::unary::erf(x * std::f64::consts::FRAC_1_SQRT_2)),
            GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                0.5 * x * (1.0 + inner.tanh())
            }
        }
    }

    /// The ONNX nodes, one input each, that mean the same.
    pub fn spelling(self) -> Spelling {
        use Activation::*;
        match self {
            Relu => Spelling::new("Relu"),
            // `Clip`'s bounds are inputs; the exporter adds them as constants.
            Clip { low, high } => Spelling::new("Clip").with("min", low).with("max", high),
            LeakyRelu { alpha } => Spelling::new("LeakyRelu").with("alpha", alpha),
            Sigmoid => Spelling::new("Sigmoid"),
            Tanh => Spelling::new("Tanh"),
            // Spelled by the exporter as Sigmoid and Mul: opset 21 has no Swish.
            Silu => Spelling::new("Swish"),
            HardSigmoid { alpha, beta } => Spelling::new("HardSigmoid").with("alpha", alpha).with("beta", beta),
            HardSwish => Spelling::new("HardSwish"),
            Gelu => Spelling::new("Gelu"),
            GeluTanh => Spelling::new("Gelu").with("approximate", "tanh"),
        }
    }
}
