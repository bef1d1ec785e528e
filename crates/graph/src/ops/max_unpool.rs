//! The largest elements back where they came from.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Window, max_pool, movement};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Shape, Value};

/// Undoes a max pooling: inputs `x [n, c, …]`, for each of its elements the flat index that it has in a result of spatial extents
/// `(extent − 1)·stride − pads + kernel`, and optionally the shape of a larger result, whose first elements on every axis are those. All
/// other elements are zero.
#[derive(Clone, Debug, PartialEq)]
pub struct MaxUnpool {
    pub window: Window,
}

impl MaxUnpool {
    fn unpooled(&self, dims: &[Dim]) -> Result<Vec<Dim>, OpError> {
        if dims.len() < 3 {
            return Err(OpError::input(format!(
                "expected [n, c, …] with a spatial axis, got a rank of {}",
                dims.len()
            )));
        }
        let kernel = self.window.kernel()?;
        self.window.check_rank(dims.len() - 2, kernel.len())?;
        let spatial = dims[2..].iter().zip(kernel).enumerate().map(|(axis, (extent, &kernel))| {
            let (begin, end) = self.window.explicit_pads(axis);
            (extent.clone() - Dim::Const(1)) * Dim::from(self.window.stride(axis)) + Dim::from(kernel)
                - Dim::from(begin)
                - Dim::from(end)
        });
        let shape: Vec<Dim> = dims[..2].iter().cloned().chain(spatial).collect();
        match shape.iter().find(|extent| extent.as_const().is_some_and(|extent| extent < 0)) {
            Some(extent) => Err(OpError::input(format!("an extent of {extent}"))),
            None => Ok(shape),
        }
    }
}

impl Operator for MaxUnpool {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=3)?;
        if node.has_attribute("dilations") || node.has_attribute("auto_pad") {
            return Err(node.corrupt("has attribute 'dilations' or 'auto_pad', which it does not define"));
        }
        let window = max_pool::read(node)?;
        if window.ceil_mode {
            return Err(node.corrupt("has attribute 'ceil_mode', which it does not define"));
        }
        Ok(MaxUnpool { window }.into())
    }

    fn export(&self) -> Spelling {
        self.window.spell(Spelling::new("MaxUnpool"))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, indices) = (inputs.tensor(0)?, inputs.tensor(1)?);
        if !movement::is_index(indices.dtype) {
            return Err(OpError::input(format!("indices must be of type i64, got {}", indices.dtype)));
        }
        let unpooled = x.shape.as_ref().map(|dims| self.unpooled(dims)).transpose()?;
        let shape = match inputs.optional_tensor(2)? {
            None => unpooled,
            Some(given) => {
                movement::known_integers(inputs, 2)?;
                match (&given.value, unpooled) {
                    (Some(value), unpooled) => {
                        if unpooled.is_some_and(|unpooled| unpooled.len() != value.len()) {
                            return Err(OpError::input(format!("{} extents for a result like {x}", value.len())));
                        }
                        Some(value.clone())
                    }
                    (None, Some(unpooled)) => {
                        Some((0..unpooled.len()).map(|axis| context.fresh(&format!("axis{axis}"))).collect())
                    }
                    (None, None) => None,
                }
            }
        };
        Ok(vec![TensorFact { dtype: x.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        let (indices, of) = (inputs.integers(1)?, inputs.tensor(1)?.shape());
        if of.dims() != shape {
            return Err(OpError::input(format!("indices of shape {of} for elements of shape {}", x.shape())));
        }
        let dims: Vec<Dim> = shape.iter().map(|&extent| Dim::from(extent)).collect();
        let extent = |dim: &Dim| dim.as_const().and_then(|extent| usize::try_from(extent).ok());
        let unpooled: Option<Vec<usize>> = self.unpooled(&dims)?.iter().map(extent).collect();
        let unpooled = unpooled.ok_or_else(|| OpError::Resource("an extent is too large".to_string()))?;
        let count = context.bounded_len(&unpooled)?;
        let to: Vec<usize> = match inputs.get(2) {
            None => unpooled.clone(),
            Some(_) => {
                let given = inputs.integers(2)?;
                let extents: Option<Vec<usize>> = given.iter().map(|&extent| extent.try_into().ok()).collect();
                let holds =
                    |to: &Vec<usize>| to.len() == unpooled.len() && to.iter().zip(&unpooled).all(|(t, u)| t >= u);
                let small = || OpError::input(format!("a result of extents {given:?}, at least {unpooled:?} needed"));
                extents.filter(holds).ok_or_else(small)?
            }
        };
        context.bounded_len(&to)?;
        let mut from = vec![None; count];
        for (element, &index) in indices.iter().enumerate() {
            let place = usize::try_from(index).ok().and_then(|index| from.get_mut(index));
            let outside = || OpError::input(format!("index {index} in a result of {} elements", Shape::new(&unpooled)));
            *place.ok_or_else(outside)? = Some(element);
        }
        let places = movement::along_axes(&unpooled, &to, |axis, i| Some(i).filter(|&i| i < unpooled[axis]));
        movement::fill(x, to.clone(), None, places.map(|place| place.and_then(|place| from[place])))
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, tensor};

    fn node(indices: [i64; 4]) -> Case {
        case("MaxUnpool", 11)
            .with("kernel_shape", vec![2i64, 2])
            .with("strides", vec![2i64, 2])
            .input(f32s(&[1, 1, 2, 2], &[1., 2., 3., 4.]))
            .input(tensor::<i64>(&[1, 1, 2, 2], &indices))
    }

    #[test]
    fn agrees_with_onnx() {
        let unpooled = [0., 0., 0., 0., 0., 1., 0., 2., 0., 0., 0., 0., 0., 3., 0., 4.];
        node([5, 7, 13, 15]).gives([f32s(&[1, 1, 4, 4], &unpooled)]);
        let larger = [0., 0., 0., 0., 0., 0., 1., 0., 2., 0., 0., 0., 0., 0., 0., 0., 3., 0., 4., 0.];
        let shape = tensor::<i64>(&[4], &[1, 1, 4, 5]);
        node([5, 7, 13, 15]).input(shape).gives([f32s(&[1, 1, 4, 5], &larger)]);
        // The last of several stays.
        node([0, 0, 0, 0]).with("pads", vec![1i64, 1, 1, 1]).gives([f32s(&[1, 1, 2, 2], &[4., 0., 0., 0.])]);
    }

    #[test]
    fn refuses_places_that_are_not_there() {
        node([5, 7, 13, 16]).fails("index 16");
        node([5, 7, -13, 15]).fails("index -13");
        node([5, 7, 13, 15]).input(tensor::<i64>(&[4], &[1, 1, 3, 5])).fails("at least [1, 1, 4, 4] needed");
        node([5, 7, 13, 15]).with("pads", vec![9i64, 9, 9, 9]).fails("an extent of -14");
        node([5, 7, 13, 15]).with("dilations", vec![2i64, 2]).fails("does not define");
    }
}
