//! Parts along an axis as a sequence.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, movement, normalize_axis};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Tensor, Value};

/// Parts that one result may have: those without elements cost nothing in the file.
const PARTS_MAX: usize = 1 << 22;

/// Consecutive parts along `axis`: all of the extent in the second input where that is a scalar (the last may be smaller), of those extents
/// where it is a list, and of extent 1 where it is omitted.
#[derive(Clone, Debug, PartialEq)]
pub struct SplitToSequence {
    pub axis: i64,
    /// Whether parts keep the axis where the second input is omitted; with it they do.
    pub keep_axis: bool,
}

enum Parts {
    Each(i64),
    Listed(Vec<i64>),
}

impl SplitToSequence {
    fn extents(&self, extent: usize, parts: Parts) -> Result<Vec<usize>, OpError> {
        let listed = match parts {
            Parts::Each(each) => {
                let each = usize::try_from(each).ok().filter(|&each| each > 0);
                let each = each.ok_or_else(|| OpError::input("parts must have an extent above 0"))?;
                let count = extent.div_ceil(each);
                if count > PARTS_MAX {
                    return Err(OpError::Resource(format!("{count} parts, above the limit of {PARTS_MAX}")));
                }
                return Ok((0..count).map(|i| each.min(extent - i * each)).collect());
            }
            Parts::Listed(listed) => listed,
        };
        let extents = listed.iter().map(|&v| usize::try_from(v).ok()).collect::<Option<Vec<_>>>();
        let extents = extents.filter(|e| e.iter().try_fold(0usize, |n, &e| n.checked_add(e)) == Some(extent));
        extents.ok_or_else(|| OpError::input(format!("parts {listed:?} of an axis of {extent}")))
    }
}

impl Operator for SplitToSequence {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=2)?;
        Ok(SplitToSequence { axis: node.int("axis", 0)?, keep_axis: node.flag("keepdims", true)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("SplitToSequence").with("axis", self.axis).with("keepdims", i64::from(self.keep_axis))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let known = match inputs.optional_tensor(1)? {
            None => None,
            Some(split) if split.rank().is_some_and(|rank| rank > 1) => {
                return Err(OpError::input(format!("the parts must be a scalar or a list, got {split}")));
            }
            Some(split) => Some((split.rank(), movement::known_integers(inputs, 1)?)),
        };
        let Some(shape) = &x.shape else {
            return Ok(vec![Fact::Sequence(Box::new(TensorFact::unknown_rank(x.dtype).into()))]);
        };
        let axis = normalize_axis(self.axis, shape.len())?;
        let mut dims = shape.clone();
        let fresh = || context.fresh("part");
        match known {
            None if !self.keep_axis => {
                dims.remove(axis);
            }
            None => dims[axis] = Dim::Const(1),
            Some((rank, values)) => {
                let extent = shape[axis].as_const().and_then(|e| usize::try_from(e).ok());
                dims[axis] = match (rank, values.as_deref()) {
                    (Some(0), Some(&[each])) => match extent {
                        Some(extent) if each > 0 && extent as i64 % each == 0 => Dim::Const(each),
                        Some(extent) if each > 0 && extent as i64 <= each => Dim::from(extent),
                        _ if each > 0 => fresh(),
                        _ => return Err(OpError::input(format!("parts of extent {each}"))),
                    },
                    (Some(1), Some(listed)) => {
                        if let Some(extent) = extent {
                            self.extents(extent, Parts::Listed(listed.to_vec()))?;
                        }
                        match listed {
                            [first, rest @ ..] if rest.iter().all(|other| other == first) => Dim::Const(*first),
                            _ => fresh(),
                        }
                    }
                    _ => fresh(),
                };
            }
        }
        Ok(vec![Fact::Sequence(Box::new(TensorFact::new(x.dtype, dims).into()))])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        let axis = normalize_axis(self.axis, shape.len())?;
        let given = inputs.optional_tensor(1)?;
        let parts = match given.map(Tensor::shape).map(|s| s.rank()) {
            None => Parts::Each(1),
            Some(0) => Parts::Each(inputs.integers(1)?[0]),
            Some(1) => Parts::Listed(inputs.integers(1)?),
            Some(rank) => return Err(OpError::input(format!("the parts must be a scalar or a list, got rank {rank}"))),
        };
        let drop_axis = given.is_none() && !self.keep_axis;
        let strides = movement::strides(shape);
        let mut first = 0;
        let mut values = Vec::new();
        for extent in self.extents(shape[axis], parts)? {
            let mut to = shape.to_vec();
            to[axis] = extent;
            let steps = strides.iter().map(|&s| s as isize).collect();
            let moved = movement::strided(to.clone(), steps, first * strides[axis]);
            let part = super::select(x, to.clone(), moved.sources)?;
            values.push(Value::Tensor(match drop_axis {
                true => {
                    to.remove(axis);
                    part.reshape(to)?
                }
                false => part,
            }));
            first += extent;
        }
        Ok(vec![Value::Sequence(values)])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, sequence, tensor};
    use cutover_tensor::{Tensor, Value};

    fn x() -> Tensor {
        f32s(&[2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    }

    #[test]
    fn parts_are_equal_listed_or_single() {
        let columns = [f32s(&[2, 1], &[0.0, 3.0]), f32s(&[2, 1], &[1.0, 4.0]), f32s(&[2, 1], &[2.0, 5.0])];
        let all = || sequence(&[&columns[0], &columns[1], &columns[2]]);
        let split = |axis: i64| case("SplitToSequence", 11).with("axis", axis).input(x());
        split(1).gives([all()]);
        split(-1).with("keepdims", 1).gives([all()]);
        split(1).input(tensor(&[], &[1i64])).with("keepdims", 0).gives([all()]);
        split(-1).input(tensor(&[3], &[1i64, 1, 1])).gives([all()]);
        let flat = columns.each_ref().map(|c| c.reshape([2]).unwrap());
        split(1).with("keepdims", 0).gives([sequence(&[&flat[0], &flat[1], &flat[2]])]);
        let two = f32s(&[2, 2], &[0.0, 1.0, 3.0, 4.0]);
        split(1).input(tensor(&[], &[2i32])).gives([sequence(&[&two, &columns[2]])]);
        split(1).input(tensor(&[], &[7i64])).gives([sequence(&[&x()])]);
        split(1).input(tensor(&[3], &[2i64, 0, 1])).gives([sequence(&[&two, &f32s(&[2, 0], &[]), &columns[2]])]);
        case("SplitToSequence", 24).input(f32s(&[0, 3], &[])).gives([Value::Sequence(vec![])]);
        case("SplitToSequence", 11)
            .input(f32s(&[1], &[5.0]))
            .with("keepdims", 0)
            .gives([sequence(&[&f32s(&[], &[5.0])])]);
    }

    #[test]
    fn what_does_not_add_up_is_refused() {
        let split = |split: Tensor| case("SplitToSequence", 11).with("axis", 1).input(x()).input(split);
        split(tensor(&[], &[0i64])).fails("extent 0");
        split(tensor(&[], &[-2i64])).fails("extent -2");
        split(tensor(&[2], &[1i64, 1])).fails("parts [1, 1] of an axis of 3");
        split(tensor(&[2], &[4i64, -1])).fails("of an axis of 3");
        split(tensor(&[1, 1], &[1i64])).fails("scalar or a list");
        split(f32s(&[], &[1.0])).fails("i64 or i32");
        case("SplitToSequence", 11).input(f32s(&[], &[1.0])).fails("axis 0");
        case("SplitToSequence", 11).input(f32s(&[1 << 40, 0], &[])).fails("above the limit");
    }
}
