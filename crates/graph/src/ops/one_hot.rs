//! Indices as vectors with one element on.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, checked_shape, movement,
    normalize_axis, select,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Tensor, Value};

/// Inputs `indices`, the scalar `depth` and `values [off, on]`: a new axis of `depth` elements at `axis`, on at the index and off
/// elsewhere. Negative indices count from the end; one that is out of range is off everywhere. Fractions are cut off.
#[derive(Clone, Debug, PartialEq)]
pub struct OneHot {
    pub axis: i64,
}

/// The numbers of a tensor as whole ones.
fn whole(tensor: &Tensor) -> Result<Vec<i128>, OpError> {
    match Wide::of(tensor)? {
        Wide::Int(v) => Ok(v),
        // Not a number is no index.
        Wide::Float(v) => Ok(v.into_iter().map(|v| if v.is_nan() { i128::MAX } else { v as i128 }).collect()),
        Wide::Bool(_) => Err(OpError::input("expected numbers, got bool")),
    }
}

impl Operator for OneHot {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(3..=3)?;
        Ok(OneHot { axis: node.int("axis", -1)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("OneHot").with("axis", self.axis)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (indices, depth, values) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?);
        let shape = match &indices.shape {
            Some(shape) => {
                let depth = match depth.value.as_deref() {
                    Some([depth]) => depth.clone(),
                    Some(depths) => return Err(OpError::input(format!("the depth is {} numbers", depths.len()))),
                    None => context.fresh("depth"),
                };
                if let Some(depth) = depth.as_const().filter(|&depth| depth < 0) {
                    return Err(OpError::input(format!("a depth of {depth}")));
                }
                let mut shape = shape.clone();
                shape.insert(normalize_axis(self.axis, shape.len() + 1)?, depth);
                Some(shape)
            }
            None => None,
        };
        let fact = TensorFact { dtype: values.dtype, shape, value: None };
        let few = fact.constant_count().is_some_and(|count| count <= TensorFact::VALUE_LIMIT);
        let value = match (indices.constant_value(), values.value.as_deref(), fact.constant_shape()) {
            (Some(indices), Some([off, on]), Some(to)) if few => {
                let indices: Vec<i128> = indices.into_iter().map(i128::from).collect();
                let axis = normalize_axis(self.axis, to.len())?;
                let on_at = lit(&indices, &to, axis);
                Some(on_at.map(|lit| if lit { on.clone() } else { off.clone() }).collect::<Vec<Dim>>())
            }
            _ => None,
        };
        Ok(vec![fact.with_value(value).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (indices, depth, values) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?);
        if values.shape().dims() != [2] {
            return Err(OpError::input(format!("values must be [off, on], got shape {}", values.shape())));
        }
        let depth = match whole(depth)?.as_slice() {
            [depth] => usize::try_from(*depth).map_err(|_| OpError::input(format!("a depth of {depth}")))?,
            depths => return Err(OpError::input(format!("the depth is {} numbers", depths.len()))),
        };
        let mut to = indices.shape().to_vec();
        let axis = normalize_axis(self.axis, to.len() + 1)?;
        to.insert(axis, depth);
        checked_shape(to.clone(), context)?;
        let indices = whole(indices)?;
        let sources = lit(&indices, &to, axis).map(usize::from);
        Ok(vec![select(values, to.clone(), sources)?.into()])
    }
}

/// For every element of a result of shape `to`, whether it is on.
fn lit<'a>(indices: &'a [i128], to: &[usize], axis: usize) -> impl Iterator<Item = bool> + 'a {
    let (outer, depth, inner) = movement::around(to, axis);
    let limit = depth as i128;
    let wrapped = move |at: usize| indices[at] + if indices[at] < 0 { limit } else { 0 };
    let element = move |o: usize, d: usize, i: usize| wrapped(o * inner + i) == d as i128;
    (0..outer).flat_map(move |o| (0..depth).flat_map(move |d| (0..inner).map(move |i| element(o, d, i))))
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, strings, tensor};
    use cutover_tensor::Tensor;

    #[test]
    fn agrees_with_onnx_runtime() {
        let values = || f32s(&[2], &[2., 5.]);
        case("OneHot", 11)
            .input(tensor::<i64>(&[4], &[0, -1, 3, -4]))
            .input(Tensor::scalar(3i64))
            .input(values())
            .gives([f32s(&[4, 3], &[5., 2., 2., 2., 2., 5., 2., 2., 2., 2., 2., 2.])]);
        case("OneHot", 9)
            .with("axis", 0)
            .input(tensor::<i32>(&[2], &[1, 0]))
            .input(tensor::<i32>(&[1], &[2]))
            .input(tensor::<i64>(&[2], &[0, 1]))
            .gives([tensor::<i64>(&[2, 2], &[0, 1, 1, 0])]);
        case("OneHot", 11)
            .with("axis", -2)
            .input(tensor::<i64>(&[1, 2], &[1, 0]))
            .input(Tensor::scalar(2i64))
            .input(strings(&[2], &["off", "on"]))
            .gives([strings(&[1, 2, 2], &["off", "on", "on", "off"])]);
        case("OneHot", 11)
            .input(f32s(&[2], &[1.7, f32::NAN]))
            .input(Tensor::scalar(2.9f32))
            .input(values())
            .gives([f32s(&[2, 2], &[2., 5., 2., 2.])]);
        let none = case("OneHot", 11).input(tensor::<i64>(&[2], &[0, 0])).input(Tensor::scalar(0i64));
        none.input(values()).gives([f32s(&[2, 0], &[])]);
    }

    #[test]
    fn refuses_what_has_no_result() {
        let node = |depth: i64| case("OneHot", 11).input(tensor::<i64>(&[1], &[0])).input(Tensor::scalar(depth));
        node(-1).input(f32s(&[2], &[0., 1.])).fails("a depth of -1");
        node(2).input(f32s(&[3], &[0., 1., 2.])).fails("values must be [off, on]");
        node(i64::MAX).input(f32s(&[2], &[0., 1.])).fails("a result of shape");
    }
}
