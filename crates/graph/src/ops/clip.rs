//! Bounding of every element.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `y = min(max(x, low), high)`: inputs `x`, and scalars `low` and `high`, each of which may be omitted.
#[derive(Clone, Debug, PartialEq)]
pub struct Clip;

impl Operator for Clip {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=if node.opset < 11 { 1 } else { 3 })?;
        for (name, index) in [("min", 1), ("max", 2)] {
            if let Some(bound) = node.optional_float(name)? {
                if node.opset >= 11 || node.has_input(index) {
                    return Err(node.corrupt(format!("attribute '{name}' was replaced by an input in opset 11")));
                }
                node.push_number(index, bound);
            }
        }
        Ok(Clip.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Clip")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        for index in [1, 2] {
            if let Some(bound) = inputs.optional_tensor(index)?
                && bound.dtype != x.dtype
            {
                return Err(OpError::input(format!(
                    "a bound of type {} for elements of type {}",
                    bound.dtype, x.dtype
                )));
            }
        }
        Ok(vec![TensorFact { value: None, ..x.clone() }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let bound = |index: usize| -> Result<Option<Wide>, OpError> {
            let Some(tensor) = inputs.optional_tensor(index)? else { return Ok(None) };
            if tensor.element_count() != 1 {
                return Err(OpError::input(format!("bound {index} must be a scalar, got shape {}", tensor.shape())));
            }
            Wide::of(tensor).map(Some)
        };
        let mut y = Wide::of(x)?;
        for (bound, upper) in [(bound(1)?, false), (bound(2)?, true)] {
            match (&mut y, bound) {
                (_, None) => {}
                // `<` and `>` let NaN through.
                (Wide::Float(v), Some(Wide::Float(b))) => {
                    v.iter_mut().filter(|v| if upper { **v > b[0] } else { **v < b[0] }).for_each(|v| *v = b[0]);
                }
                (Wide::Int(v), Some(Wide::Int(b))) => {
                    v.iter_mut().filter(|v| if upper { **v > b[0] } else { **v < b[0] }).for_each(|v| *v = b[0]);
                }
                _ => return Err(OpError::input("bounds of another type than the elements")),
            }
        }
        Ok(vec![y.narrow(x.dtype(), x.shape().clone())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, tensor};

    #[test]
    fn bounds_take_the_type_of_the_elements() {
        let x = || tensor::<f64>(&[3], &[-1.0, 0.5, 9.0]);
        let old = case("Clip", 6).with("min", 0.0f32).with("max", 2.0f32).input(x());
        old.gives([tensor::<f64>(&[3], &[0.0, 0.5, 2.0])]);
        case("Clip", 13).input(x()).input(tensor::<f32>(&[], &[0.0])).fails("a bound of type f32");
    }
}
