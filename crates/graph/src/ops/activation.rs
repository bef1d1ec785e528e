//! Activations that products are fused with.

use super::{NodeReader, Spelling, UnaryFunction};
use crate::ImportError;

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

    /// Takes `activation` and `activation_params`, as ONNX Runtime's optimiser writes them on convolutions.
    pub(super) fn read(node: &mut NodeReader) -> Result<Option<Activation>, ImportError> {
        let name = node.string("activation", "")?;
        let parameters = node.optional_floats("activation_params")?.unwrap_or_default();
        let activation = match (name.as_str(), &parameters[..]) {
            ("", []) => return Ok(None),
            ("Relu", []) => Activation::Relu,
            ("Sigmoid", []) => Activation::Sigmoid,
            ("Tanh", []) => Activation::Tanh,
            ("HardSwish", []) => Activation::HardSwish,
            ("LeakyRelu", &[alpha]) => Activation::LeakyRelu { alpha },
            ("Clip", &[low, high]) => Activation::Clip { low, high },
            ("HardSigmoid", &[alpha, beta]) => Activation::HardSigmoid { alpha, beta },
            (name, parameters) => {
                return Err(node.unsupported(format!("activation '{name}' of {} parameters", parameters.len())));
            }
        };
        Ok(Some(activation))
    }

    /// As `activation` and `activation_params` say it, where they can.
    pub(super) fn parameters(self) -> Option<(&'static str, Vec<f32>)> {
        Some(match self {
            Activation::Relu => ("Relu", Vec::new()),
            Activation::Sigmoid => ("Sigmoid", Vec::new()),
            Activation::Tanh => ("Tanh", Vec::new()),
            Activation::HardSwish => ("HardSwish", Vec::new()),
            Activation::LeakyRelu { alpha } => ("LeakyRelu", vec![alpha]),
            Activation::Clip { low, high } => ("Clip", vec![low, high]),
            Activation::HardSigmoid { alpha, beta } => ("HardSigmoid", vec![alpha, beta]),
            Activation::Silu | Activation::Gelu | Activation::GeluTanh => return None,
        })
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

/// Takes `activation` and its `activation_alpha`, `activation_beta` and `activation_gamma`, as ONNX Runtime's optimiser writes them on matrix
/// products. What the function leaves out has ONNX's default.
pub(super) fn read_function(node: &mut NodeReader) -> Result<Option<UnaryFunction>, ImportError> {
    let name = node.string("activation", "")?;
    use UnaryFunction::*;
    let mut parameter = |name: &str, default: f32| node.float(&format!("activation_{name}"), default);
    let function = match name.as_str() {
        "" => return Ok(None),
        "Relu" => Relu,
        "Sigmoid" => Sigmoid,
        "Tanh" => Tanh,
        "Softplus" => Softplus,
        "Softsign" => Softsign,
        "LeakyRelu" => LeakyRelu { alpha: parameter("alpha", 0.01)? },
        "Elu" => Elu { alpha: parameter("alpha", 1.0)? },
        "Celu" => Celu { alpha: parameter("alpha", 1.0)? },
        "ThresholdedRelu" => ThresholdedRelu { alpha: parameter("alpha", 1.0)? },
        "Selu" => Selu { alpha: parameter("alpha", 1.673_263_2)?, gamma: parameter("gamma", 1.050_701)? },
        "HardSigmoid" => HardSigmoid { alpha: parameter("alpha", 0.2)?, beta: parameter("beta", 0.5)? },
        other => return Err(node.unsupported(format!("activation '{other}'"))),
    };
    Ok(Some(function))
}

/// What [`read_function`] reads.
pub(super) fn spell_function(spelling: Spelling, function: UnaryFunction) -> Spelling {
    use UnaryFunction::*;
    let spelling = spelling.with("activation", function.name());
    match function {
        LeakyRelu { alpha } | Elu { alpha } | Celu { alpha } | ThresholdedRelu { alpha } => {
            spelling.with("activation_alpha", alpha)
        }
        Selu { alpha, gamma } => spelling.with("activation_alpha", alpha).with("activation_gamma", gamma),
        HardSigmoid { alpha, beta } => spelling.with("activation_alpha", alpha).with("activation_beta", beta),
        _ => spelling,
    }
}
