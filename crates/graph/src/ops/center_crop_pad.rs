//! The middle of a tensor, or a tensor in the middle of zeros.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, movement, normalize_axes};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `x` cut or filled with zeros (empty strings) to the extents in the second input, on both sides alike; an odd element is cut off or added at
/// the end.
#[derive(Clone, Debug, PartialEq)]
pub struct CenterCropPad {
    /// The axes that extents are given for, all if `None`.
    pub axes: Option<Vec<i64>>,
}

impl CenterCropPad {
    fn axes(&self, rank: usize, extents: usize) -> Result<Vec<usize>, OpError> {
        let axes = match &self.axes {
            Some(axes) => normalize_axes(axes, rank)?,
            None => (0..rank).collect(),
        };
        match axes.len() == extents {
            true => Ok(axes),
            false => Err(OpError::input(format!("{extents} extents for {} axes", axes.len()))),
        }
    }
}

impl Operator for CenterCropPad {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        Ok(CenterCropPad { axes: node.optional_ints("axes")? }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("CenterCropPad");
        match &self.axes {
            Some(axes) => spelling.with("axes", axes.clone()),
            None => spelling,
        }
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, extents) = (inputs.tensor(0)?, inputs.tensor(1)?);
        if let Some(known) = movement::known_integers(inputs, 1)? {
            known.into_iter().try_for_each(|extent| checked(extent).map(drop))?;
        }
        let mut shape = x.shape.clone();
        if let Some(dims) = &mut shape {
            match &extents.value {
                Some(value) => {
                    let axes = self.axes(dims.len(), value.len())?;
                    axes.into_iter().zip(value).for_each(|(axis, extent)| dims[axis] = extent.clone());
                }
                None => {
                    let axes = match &self.axes {
                        Some(axes) => normalize_axes(axes, dims.len())?,
                        None => (0..dims.len()).collect(),
                    };
                    axes.into_iter().for_each(|axis| dims[axis] = context.fresh(&format!("axis{axis}")));
                }
            }
        }
        Ok(vec![TensorFact { dtype: x.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        let extents = inputs.integers(1)?;
        let mut to = shape.to_vec();
        for (axis, extent) in self.axes(shape.len(), extents.len())?.into_iter().zip(extents) {
            to[axis] = checked(extent)?;
        }
        context.bounded_len(&to)?;
        let sources = movement::along_axes(shape, &to, |axis, i| match (shape[axis], to[axis]) {
            (from, to) if from >= to => Some(i + (from - to) / 2),
            (from, to) => i.checked_sub((to - from) / 2).filter(|&i| i < from),
        });
        movement::fill(x, to, None, sources)
    }
}

fn checked(extent: i64) -> Result<usize, OpError> {
    usize::try_from(extent).map_err(|_| OpError::input(format!("an extent of {extent}")))
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, strings, tensor};
    use cutover_tensor::Tensor;

    fn node(x: Tensor, extents: &[i64]) -> Case {
        case("CenterCropPad", 18).input(x).input(tensor::<i64>(&[extents.len()], extents))
    }

    #[test]
    fn an_odd_element_is_at_the_end() {
        let x = || f32s(&[2, 4], &[1., 2., 3., 4., 5., 6., 7., 8.]);
        node(x(), &[3, 1]).gives([f32s(&[3, 1], &[2., 6., 0.])]);
        node(x(), &[6])
            .with("axes", vec![-1i64])
            .gives([f32s(&[2, 6], &[0., 1., 2., 3., 4., 0., 0., 5., 6., 7., 8., 0.])]);
        node(strings(&[1], &["a"]), &[3]).gives([strings(&[3], &["", "a", ""])]);
        node(x(), &[0, 2]).gives([f32s(&[0, 2], &[])]);
    }

    #[test]
    fn refuses_what_is_no_extent() {
        node(f32s(&[1], &[1.]), &[-1]).fails("an extent of -1");
        node(f32s(&[1], &[1.]), &[1, 1]).fails("2 extents for 1 axes");
        node(f32s(&[1], &[1.]), &[i64::MAX]).fails("resource limit");
        node(f32s(&[1, 1], &[1.]), &[1, 1]).with("axes", vec![0i64, 0]).fails("axis 0 is there twice");
    }
}
