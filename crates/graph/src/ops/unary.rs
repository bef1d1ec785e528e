//! Elementwise functions of one tensor.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `y = f(x)`, elementwise; `y` has the type and shape of `x`.
#[derive(Clone, Debug, PartialEq)]
pub struct Unary {
    pub function: UnaryFunction,
}

/// The functions, as ONNX defines them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum UnaryFunction {
    Abs,
    Neg,
    Sign,
    Floor,
    Ceil,
    /// To the nearest, ties to even.
    Round,
    Sqrt,
    Reciprocal,
    Exp,
    Log,
    Sin,
    Cos,
    Tan,
    Asin,
    Acos,
    Atan,
    Sinh,
    Cosh,
    Tanh,
    Asinh,
    Acosh,
    Atanh,
    Erf,
    Relu,
    Sigmoid,
    Softplus,
    Softsign,
    HardSwish,
    Mish,
    LeakyRelu {
        alpha: f32,
    },
    Elu {
        alpha: f32,
    },
    Celu {
        alpha: f32,
    },
    Selu {
        alpha: f32,
        gamma: f32,
    },
    HardSigmoid {
        alpha: f32,
        beta: f32,
    },
    ThresholdedRelu {
        alpha: f32,
    },
    Gelu {
        tanh: bool,
    },
    Shrink {
        lambda: f32,
        bias: f32,
    },
    /// `x · sigmoid(alpha · x)`.
    Swish {
        alpha: f32,
    },
    BitwiseNot,
}

impl Operator for Unary {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        use UnaryFunction::*;
        let function = match node.op_type.as_str() {
            "Abs" => Abs,
            "Neg" => Neg,
            "Sign" => Sign,
            "Floor" => Floor,
            "Ceil" => Ceil,
            "Round" => Round,
            "Sqrt" => Sqrt,
            "Reciprocal" => Reciprocal,
            "Exp" => Exp,
            "Log" => Log,
            "Sin" => Sin,
            "Cos" => Cos,
            "Tan" => Tan,
            "Asin" => Asin,
            "Acos" => Acos,
            "Atan" => Atan,
            "Sinh" => Sinh,
            "Cosh" => Cosh,
            "Tanh" => Tanh,
            "Asinh" => Asinh,
            "Acosh" => Acosh,
            "Atanh" => Atanh,
            "Erf" => Erf,
            "Relu" => Relu,
            "Sigmoid" => Sigmoid,
            "Softplus" => Softplus,
            "Softsign" => Softsign,
            "HardSwish" => HardSwish,
            "Mish" => Mish,
            "LeakyRelu" => LeakyRelu { alpha: node.float("alpha", 0.01)? },
            "Elu" => Elu { alpha: node.float("alpha", 1.0)? },
            "Celu" => Celu { alpha: node.float("alpha", 1.0)? },
            "Selu" => Selu { alpha: node.float("alpha", 1.673_263_2)?, gamma: node.float("gamma", 1.050_701)? },
            "HardSigmoid" => HardSigmoid { alpha: node.float("alpha", 0.2)?, beta: node.float("beta", 0.5)? },
            "ThresholdedRelu" => ThresholdedRelu { alpha: node.float("alpha", 1.0)? },
            "Gelu" => match node.string("approximate", "none")?.as_str() {
                "none" => Gelu { tanh: false },
                "tanh" => Gelu { tanh: true },
                other => return Err(node.corrupt(format!("approximate is '{other}', expected none or tanh"))),
            },
            "Swish" => Swish { alpha: node.float("alpha", 1.0)? },
            "QuickGelu" => Swish { alpha: node.float("alpha", 1.702)? },
            "BitwiseNot" => BitwiseNot,
            "Shrink" => Shrink { lambda: node.float("lambd", 0.5)?, bias: node.float("bias", 0.0)? },
            other => return Err(node.unsupported(format!("function {other}"))),
        };
        Ok(Unary { function }.into())
    }

    fn export(&self) -> Spelling {
        use UnaryFunction::*;
        let spelling = Spelling::new(self.function.name());
        match self.function {
            LeakyRelu { alpha } | Elu { alpha } | Celu { alpha } | ThresholdedRelu { alpha } => {
                spelling.with("alpha", alpha)
            }
            Selu { alpha, gamma } => spelling.with("alpha", alpha).with("gamma", gamma),
            HardSigmoid { alpha, beta } => spelling.with("alpha", alpha).with("beta", beta),
            Gelu { tanh } => spelling.with("approximate", if tanh { "tanh" } else { "none" }),
            Swish { alpha } => spelling.since(24).with("alpha", alpha),
            Shrink { lambda, bias } => spelling.with("lambd", lambda).with("bias", bias),
            _ => spelling,
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let value = match (self.function, &x.value) {
            (UnaryFunction::Neg, Some(v)) => {
                v.iter().map(|d| (crate::Dim::Const(0) - d.clone()).unless_overflown()).collect()
            }
            _ => None,
        };
        Ok(vec![TensorFact { value: None, ..x.clone() }.with_value(value).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let y = match Wide::of(x)? {
            Wide::Float(_) if self.function == UnaryFunction::BitwiseNot => {
                return Err(OpError::input("BitwiseNot is not defined on floats"));
            }
            Wide::Float(v) => Wide::Float(v.into_iter().map(|v| self.function.of_float(v)).collect()),
            Wide::Int(v) => Wide::Int(v.into_iter().map(|v| self.function.of_int(v)).collect::<Result<_, _>>()?),
            Wide::Bool(_) => return Err(OpError::input(format!("{} is not defined on bool", self.function.name()))),
        };
        Ok(vec![y.narrow(x.dtype(), x.shape().clone())?.into()])
    }
}

impl UnaryFunction {
    /// The ONNX operator.
    pub fn name(self) -> &'static str {
        use UnaryFunction::*;
        match self {
            Abs => "Abs",
            Neg => "Neg",
            Sign => "Sign",
            Floor => "Floor",
            Ceil => "Ceil",
            Round => "Round",
            Sqrt => "Sqrt",
            Reciprocal => "Reciprocal",
            Exp => "Exp",
            Log => "Log",
            Sin => "Sin",
            Cos => "Cos",
            Tan => "Tan",
            Asin => "Asin",
            Acos => "Acos",
            Atan => "Atan",
            Sinh => "Sinh",
            Cosh => "Cosh",
            Tanh => "Tanh",
            Asinh => "Asinh",
            Acosh => "Acosh",
            Atanh => "Atanh",
            Erf => "Erf",
            Relu => "Relu",
            Sigmoid => "Sigmoid",
            Softplus => "Softplus",
            Softsign => "Softsign",
            HardSwish => "HardSwish",
            Mish => "Mish",
            LeakyRelu { .. } => "LeakyRelu",
            Elu { .. } => "Elu",
            Celu { .. } => "Celu",
            Selu { .. } => "Selu",
            HardSigmoid { .. } => "HardSigmoid",
            ThresholdedRelu { .. } => "ThresholdedRelu",
            Gelu { .. } => "Gelu",
            Shrink { .. } => "Shrink",
            Swish { .. } => "Swish",
            BitwiseNot => "BitwiseNot",
        }
    }

    /// The definition. NaN goes through as NaN.
    pub fn of_float(self, x: f64) -> f64 {
        use super::Activation as A;
        use UnaryFunction::*;
        let softplus = |x: f64| if x > 30.0 { x } else { x.exp().ln_1p() };
        match self {
            Abs => x.abs(),
            Neg => -x,
            Sign => {
                if x == 0.0 || x.is_nan() {
                    x
                } else {
                    x.signum()
                }
            }
            Floor => x.floor(),
            Ceil => x.ceil(),
            Round => x.round_ties_even(),
            Sqrt => x.sqrt(),
            Reciprocal => 1.0 / x,
            Exp => x.exp(),
            Log => x.ln(),
            Sin => x.sin(),
            Cos => x.cos(),
            Tan => x.tan(),
            Asin => x.asin(),
            Acos => x.acos(),
            Atan => x.atan(),
            Sinh => x.sinh(),
            Cosh => x.cosh(),
            Tanh => x.tanh(),
            Asinh => x.asinh(),
            Acosh => x.acosh(),
            Atanh => x.atanh(),
            Erf => erf(x),
            Relu => A::Relu.apply(x),
            Sigmoid => A::Sigmoid.apply(x),
            Softplus => softplus(x),
            Softsign => x / (1.0 + x.abs()),
            HardSwish => A::HardSwish.apply(x),
            Mish => x * softplus(x).tanh(),
            LeakyRelu { alpha } => A::LeakyRelu { alpha }.apply(x),
            Elu { alpha } => {
                if x < 0.0 {
                    f64::from(alpha) * x.exp_m1()
                } else {
                    x
                }
            }
            Celu { alpha } => {
                let alpha = f64::from(alpha);
                x.max(0.0) + (alpha * (x / alpha).exp_m1()).min(0.0)
            }
            Selu { alpha, gamma } => {
                let y = if x > 0.0 { x } else { f64::from(alpha) * x.exp_m1() };
                f64::from(gamma) * y
            }
            HardSigmoid { alpha, beta } => A::HardSigmoid { alpha, beta }.apply(x),
            ThresholdedRelu { alpha } => {
                if x > alpha.into() {
                    x
                } else {
                    0.0
                }
            }
            Swish { alpha } => x / (1.0 + (-f64::from(alpha) * x).exp()),
            // Refused where a float comes in.
            BitwiseNot => f64::NAN,
            Gelu { tanh: false } => A::Gelu.apply(x),
            Gelu { tanh: true } => A::GeluTanh.apply(x),
            Shrink { lambda, bias } => {
                let (lambda, bias) = (f64::from(lambda), f64::from(bias));
                if x < -lambda {
                    x + bias
                } else if x > lambda {
                    x - bias
                } else {
                    0.0
                }
            }
        }
    }

    /// Before the result is wrapped to its type.
    pub fn of_int(self, x: i128) -> Result<i128, OpError> {
        use UnaryFunction::*;
        match self {
            Abs => Ok(x.abs()),
            Relu => Ok(x.max(0)),
            Neg => Ok(-x),
            Sign => Ok(x.signum()),
            BitwiseNot => Ok(!x),
            // Rounded towards zero, as ONNX Runtime does.
            Erf | Shrink { .. } => Ok(self.of_float(x as f64) as i128),
            other => Err(OpError::input(format!("{} is not defined on integers", other.name()))),
        }
    }

    /// The same function as an activation that products are fused with.
    pub fn activation(self) -> Option<super::Activation> {
        use super::Activation as A;
        use UnaryFunction::*;
        Some(match self {
            Relu => A::Relu,
            Sigmoid => A::Sigmoid,
            Tanh => A::Tanh,
            HardSwish => A::HardSwish,
            LeakyRelu { alpha } => A::LeakyRelu { alpha },
            HardSigmoid { alpha, beta } => A::HardSigmoid { alpha, beta },
            Gelu { tanh: false } => A::Gelu,
            Gelu { tanh: true } => A::GeluTanh,
            _ => return None,
        })
    }
}

/// The error function, to about 1e-15: its Taylor series below 2.5, the continued fraction of erfc above (Abramowitz and Stegun
/// 7.1.6 and 7.1.14).
pub(crate) fn erf(x: f64) -> f64 {
    let z = x.abs();
    if z.is_nan() {
        return x;
    }
    let value = if z < 2.5 {
        // erf(z) = 2/√π · e^(-z²) · Σ 2ⁿ z^(2n+1) / (1·3·…·(2n+1)): all terms positive, so nothing cancels.
        let (mut term, mut sum, mut n) = (z, z, 0.0);
        while term > sum * 1e-17 {
            n += 1.0;
            term *= 2.0 * z * z / (2.0 * n + 1.0);
            sum += term;
        }
        std::f64::consts::FRAC_2_SQRT_PI * (-z * z).exp() * sum
    } else if z < 6.0 {
        let mut fraction = z;
        for n in (1..=60).rev() {
            fraction = z + f64::from(n) / 2.0 / fraction;
        }
        1.0 - (-z * z).exp() / (std::f64::consts::PI.sqrt() * fraction)
    } else {
        1.0
    };
    value.copysign(x)
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn those_of_onnx_runtime() {
        case("com.microsoft.QuickGelu", 1).wave(&[3]).gives([f32s(&[3], &[-0.133066, 0.350388, -0.149612])]);
        case("com.microsoft.Gelu", 1).wave(&[3]).gives([f32s(&[3], &[-0.132062, 0.345731, -0.154269])]);
    }

    #[test]
    fn the_least_integer_has_no_negative() {
        let least = || tensor::<i64>(&[2], &[i64::MIN, 3]);
        case("Neg", 13).input(least()).gives([tensor::<i64>(&[2], &[i64::MIN, -3])]);
    }

    #[test]
    fn erf_is_accurate() {
        let cases = [
            (0.0, 0.0),
            (1e-10, 1.1283791670955126e-10),
            (0.5, 0.5204998778130465),
            (1.0, 0.8427007929497149),
            (2.0, 0.9953222650189527),
            (2.6, 0.9997639655834707),
            (4.0, 0.9999999845827421),
            (7.0, 1.0),
        ];
        for (x, expected) in cases {
            for sign in [1.0, -1.0] {
                let error: f64 = super::erf(sign * x) - sign * expected;
                assert!(error.abs() <= 4e-16, "erf({}) is off by {error}", sign * x);
            }
        }
    }

    #[test]
    fn integers_round_towards_zero() {
        use crate::ops::cases::{case, tensor};
        case("Erf", 13).input(tensor::<i32>(&[3], &[-1, 0, 9])).gives([tensor::<i32>(&[3], &[0, 0, 1])]);
        let shrink = case("Shrink", 9).with("lambd", 1.5f32).with("bias", 1.5f32);
        shrink.input(tensor::<i8>(&[3], &[-4, 1, 2])).gives([tensor::<i8>(&[3], &[-2, 0, 0])]);
    }
}
