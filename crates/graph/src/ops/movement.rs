//! What operators that only move elements share: where each element of a result comes from.

use super::{Inputs, NodeReader, select, select_from};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Shape, Tensor, Value};

/// The shape of a result, and for each of its elements, row-major, the flat index it comes from.
pub struct Moved {
    pub shape: Vec<usize>,
    pub sources: Box<dyn Iterator<Item = usize>>,
}

impl Moved {
    pub fn apply(self, x: &Tensor) -> Result<Vec<Value>, OpError> {
        Ok(vec![select(x, self.shape, self.sources)?.into()])
    }
}

/// The fact `[shape]` of a movement of `x`, with its elements where those of `x` are known; `moved` is asked only then.
pub fn moved_fact(
    x: &TensorFact,
    shape: Option<Vec<Dim>>,
    moved: impl FnOnce(&[usize]) -> Result<Moved, OpError>,
) -> Result<Vec<Fact>, OpError> {
    let fact = TensorFact { dtype: x.dtype, shape, value: None };
    let value = match (&x.value, x.constant_shape()) {
        (Some(value), Some(from)) => {
            let moved = moved(&from)?;
            let count = Shape::new(&moved.shape).checked_len();
            count
                .is_some_and(|count| count <= TensorFact::VALUE_LIMIT)
                .then(|| moved.sources.map(|i| value[i].clone()).collect())
        }
        _ => None,
    };
    Ok(vec![fact.with_value(value).into()])
}

/// Row-major strides.
pub fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}

/// The flat index of every element of a result of `shape` whose axes have `strides` in the source, from `start`.
pub fn strided(shape: Vec<usize>, strides: Vec<isize>, start: usize) -> Moved {
    let count = shape.iter().product::<usize>();
    let mut index = vec![0usize; shape.len()];
    let mut at = start as isize;
    let extents = shape.clone();
    let sources = (0..count).map(move |n| {
        if n > 0 {
            for axis in (0..extents.len()).rev() {
                index[axis] += 1;
                // Past the last element of an axis it may be anywhere.
                at = at.wrapping_add(strides[axis]);
                if index[axis] < extents[axis] {
                    break;
                }
                at = at.wrapping_sub(strides[axis].wrapping_mul(extents[axis] as isize));
                index[axis] = 0;
            }
        }
        at as usize
    });
    Moved { shape, sources: Box::new(sources) }
}

/// Of a result of shape `to` each axis of which comes from the same axis of a source of shape `from`: for every element,
/// row-major, the flat index that it comes from. `along(axis, i)` is where position `i` of an axis comes from, `None` where that
/// is outside of the source: so are then all elements at that position.
pub fn along_axes(
    from: &[usize],
    to: &[usize],
    along: impl Fn(usize, usize) -> Option<usize>,
) -> Box<dyn Iterator<Item = Option<usize>>> {
    let count = Shape::new(to).checked_len().unwrap_or(0);
    let strides = strides(from);
    // An extent of a result without elements may be as large as it likes.
    let extents = if count == 0 { Vec::new() } else { to.to_vec() };
    let offset = |axis: usize, i: usize| along(axis, i).map(|at| at * strides[axis]);
    let offsets: Vec<Vec<Option<usize>>> =
        extents.iter().enumerate().map(|(axis, &extent)| (0..extent).map(|i| offset(axis, i)).collect()).collect();
    let rank = extents.len();
    let mut index = vec![0usize; rank];
    // Of the axes before each, what they add up to.
    let mut sums = vec![Some(0usize); rank + 1];
    let sources = (0..count).map(move |n| {
        let mut changed = 0;
        if n > 0 {
            for axis in (0..rank).rev() {
                changed = axis;
                index[axis] += 1;
                if index[axis] < extents[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        for axis in changed..rank {
            sums[axis + 1] = sums[axis].zip(offsets[axis][index[axis]]).map(|(sum, offset)| sum + offset);
        }
        sums[rank]
    });
    Box::new(sources)
}

/// The elements of `x` at `sources`, and where there is none the one element of `fill`; zeros (empty strings) without it.
pub fn fill(
    x: &Tensor,
    shape: impl Into<Shape>,
    fill: Option<&Tensor>,
    sources: impl Iterator<Item = Option<usize>>,
) -> Result<Vec<Value>, OpError> {
    let zero;
    let fill = match fill {
        Some(fill) => fill,
        None => {
            zero = Tensor::zeros(x.dtype(), [1])?;
            &zero
        }
    };
    let sources = sources.map(|source| source.map_or((1, 0), |source| (0, source)));
    Ok(vec![select_from(&[x, fill], shape, sources)?.into()])
}

/// The one integer of a scalar or one-element input of indices, where it is known.
pub fn known_integer(inputs: super::Facts<'_>, index: usize) -> Result<Option<i64>, OpError> {
    match known_integers(inputs, index)?.as_deref() {
        Some([value]) => Ok(Some(*value)),
        Some(values) => Err(OpError::input(format!("input {index} must be one integer, got {}", values.len()))),
        None => Ok(None),
    }
}

/// The one integer of a scalar or one-element input of indices.
pub fn integer(inputs: Inputs<'_>, index: usize) -> Result<i64, OpError> {
    match inputs.integers(index)?.as_slice() {
        [value] => Ok(*value),
        values => Err(OpError::input(format!("input {index} must be one integer, got {}", values.len()))),
    }
}

/// Number of lines along `axis` before it, its extent, and number of elements between its neighbours.
pub fn around(shape: &[usize], axis: usize) -> (usize, usize, usize) {
    (shape[..axis].iter().product(), shape[axis], shape[axis + 1..].iter().product())
}

/// Axes or a shape from an input, where its elements are known.
pub fn known_integers(inputs: super::Facts<'_>, index: usize) -> Result<Option<Vec<i64>>, OpError> {
    let fact = inputs.tensor(index)?;
    if !is_index(fact.dtype) {
        return Err(OpError::input(format!("input {index} must be of type i64 or i32, got {}", fact.dtype)));
    }
    Ok(fact.constant_value())
}

/// The tensor at 0 and, for convenience, its shape.
pub fn source<'a>(inputs: Inputs<'a>) -> Result<(&'a Tensor, &'a [usize]), OpError> {
    let x = inputs.tensor(0)?;
    Ok((x, x.shape().dims()))
}

/// A constant of i64s, for attributes that became inputs.
pub(super) fn integers(node: &NodeReader, values: Vec<i64>) -> Result<Tensor, ImportError> {
    Tensor::from_vec([values.len()], values).map_err(|e| node.corrupt(e.to_string()))
}

/// Whether `dtype` may hold axes, shapes and indices.
pub(super) fn is_index(dtype: DType) -> bool {
    matches!(dtype, DType::I64 | DType::I32)
}
