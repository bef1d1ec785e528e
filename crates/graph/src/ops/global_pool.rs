//! Pooling over all spatial axes.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Shape, Value};

/// `X [n, c, …]` to `Y [n, c, 1, …]`.
#[derive(Clone, Debug, PartialEq)]
pub struct GlobalPool {
    pub function: GlobalPoolFunction,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GlobalPoolFunction {
    Average,
    Max,
    /// `(Σ |x|^p)^(1/p)`.
    Lp {
        p: usize,
    },
}

impl Operator for GlobalPool {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let function = match node.op_type.as_str() {
            "GlobalAveragePool" => GlobalPoolFunction::Average,
            "GlobalMaxPool" => GlobalPoolFunction::Max,
            _ => GlobalPoolFunction::Lp { p: super::lp_pool::read_p(node)? },
        };
        Ok(GlobalPool { function }.into())
    }

    fn export(&self) -> Spelling {
        match self.function {
            GlobalPoolFunction::Average => Spelling::new("GlobalAveragePool"),
            GlobalPoolFunction::Max => Spelling::new("GlobalMaxPool"),
            GlobalPoolFunction::Lp { p } => Spelling::new("GlobalLpPool").with("p", p as i64),
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let shape = match x.shape.as_deref() {
            Some([n, c, spatial @ ..]) => {
                Some([n.clone(), c.clone()].into_iter().chain(spatial.iter().map(|_| Dim::Const(1))).collect())
            }
            Some(_) => return Err(OpError::input(format!("expected [n, c, …], got {x}"))),
            None => None,
        };
        Ok(vec![TensorFact { dtype: x.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let [n, c, spatial @ ..] = x.shape().dims() else {
            return Err(OpError::input(format!("expected [n, c, …], got {}", x.shape())));
        };
        let output: Shape = [*n, *c].into_iter().chain(spatial.iter().map(|_| 1)).collect();
        let planes = context.bounded_len(&output)?;
        let plane: usize = spatial.iter().product();
        let values = Wide::floats(x)?;
        let y = (0..planes).map(|index| {
            let x = &values[index * plane..][..plane];
            match self.function {
                GlobalPoolFunction::Average => x.iter().sum::<f64>() / plane as f64,
                GlobalPoolFunction::Max => {
                    x.iter().fold(f64::NEG_INFINITY, |y, &x| if x > y || x.is_nan() { x } else { y })
                }
                GlobalPoolFunction::Lp { p } => {
                    x.iter().map(|x| x.abs().powf(p as f64)).sum::<f64>().powf(1.0 / p as f64)
                }
            }
        });
        Ok(vec![Wide::Float(y.collect()).narrow(x.dtype(), output)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("GlobalAveragePool", 7).wave(&[1, 2, 3, 2]).gives([f32s(&[1, 2, 1, 1], &[-0.0833333, -0.125])]);
        case("GlobalMaxPool", 7).wave(&[2, 1, 3]).gives([f32s(&[2, 1, 1], &[0.5, 1.25])]);
        case("GlobalLpPool", 7).with("p", 3).wave(&[1, 2, 2, 2]).gives([f32s(&[1, 2, 1, 1], &[1.60781, 1.12859])]);
    }
}
