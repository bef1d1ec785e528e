//! Parts along an axis.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, movement, normalize_axis};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// Consecutive parts along `axis`: of the extents in the second input, or equal ones (the last smaller where they can't be).
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    pub axis: i64,
    /// Number of parts where the second input is omitted.
    pub parts: usize,
}

impl Split {
    fn extents(&self, extent: usize, given: Option<Vec<i64>>) -> Result<Vec<usize>, OpError> {
        let extents = match given {
            Some(given) => given
                .iter()
                .map(|&v| usize::try_from(v).map_err(|_| OpError::input(format!("a part of extent {v}"))))
                .collect::<Result<Vec<_>, _>>()?,
            None => {
                let part = extent.div_ceil(self.parts.max(1));
                (0..self.parts).map(|i| part.min(extent.saturating_sub(i * part))).collect()
            }
        };
        if extents.iter().try_fold(0usize, |n, &e| n.checked_add(e)) != Some(extent) {
            return Err(OpError::input(format!("parts {extents:?} of an axis of {extent}")));
        }
        Ok(extents)
    }
}

impl Operator for Split {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=if node.opset < 13 { 1 } else { 2 })?;
        if let Some(split) = node.optional_ints("split")? {
            if node.opset >= 13 || node.has_input(1) {
                return Err(node.corrupt("attribute 'split' was replaced by an input in opset 13"));
            }
            let tensor = movement::integers(node, split)?;
            node.push_constant(1, tensor);
        }
        let parts = node.int("num_outputs", node.outputs as i64)?;
        let parts = usize::try_from(parts).ok().filter(|&p| p >= node.outputs && p <= 1 << 20);
        let parts =
            parts.ok_or_else(|| node.corrupt(format!("num_outputs contradicts its {} outputs", node.outputs)))?;
        Ok(Split { axis: node.int("axis", 0)?, parts }.into())
    }

    fn export(&self) -> Spelling {
        // `num_outputs` may not stand beside the input; the number of outputs says the same unless parts are uneven.
        Spelling::new("Split").with("axis", self.axis)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let Some(shape) = &x.shape else {
            return Ok(vec![TensorFact::unknown_rank(x.dtype).into(); context.outputs.max(self.parts)]);
        };
        let axis = normalize_axis(self.axis, shape.len())?;
        let given = match inputs.get(1) {
            Some(_) => Some(inputs.tensor(1)?),
            None => None,
        };
        let extents: Vec<Dim> = match (given, shape[axis].as_const()) {
            (Some(given), extent) => match (&given.value, given.constant_value(), extent) {
                (_, Some(known), Some(extent)) => {
                    self.extents(extent as usize, Some(known))?.into_iter().map(Dim::from).collect()
                }
                (Some(value), ..) => value.clone(),
                _ => (0..context.outputs).map(|i| context.fresh(&format!("part{i}"))).collect(),
            },
            (None, Some(extent)) => self.extents(extent as usize, None)?.into_iter().map(Dim::from).collect(),
            (None, None) => {
                let even = shape[axis].exact_div(&Dim::from(self.parts));
                (0..self.parts).map(|i| even.clone().unwrap_or_else(|| context.fresh(&format!("part{i}")))).collect()
            }
        };
        let mut first = Dim::Const(0);
        let mut facts = Vec::with_capacity(extents.len());
        for extent in extents {
            let mut dims = shape.clone();
            dims[axis] = extent.clone();
            let value = match (&x.value, first.as_const(), extent.as_const()) {
                (Some(value), Some(from), Some(count)) if shape.len() == 1 => {
                    value.get(from as usize..(from + count) as usize).map(<[Dim]>::to_vec)
                }
                _ => None,
            };
            facts.push(TensorFact::new(x.dtype, dims).with_value(value).into());
            first = first + extent;
        }
        Ok(facts)
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        let axis = normalize_axis(self.axis, shape.len())?;
        let given = inputs.get(1).map(|_| inputs.integers(1)).transpose()?;
        let strides = movement::strides(shape);
        let mut first = 0;
        let mut parts = Vec::new();
        for extent in self.extents(shape[axis], given)? {
            let mut to = shape.to_vec();
            to[axis] = extent;
            let steps = strides.iter().map(|&s| s as isize).collect();
            parts.extend(movement::strided(to, steps, first * strides[axis]).apply(x)?);
            first += extent;
        }
        Ok(parts)
    }
}
