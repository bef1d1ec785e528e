//! What operators that only move elements share: where each element of a result comes from.

use super::{Inputs, NodeReader, select};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

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
            let count = cutover_tensor::Shape::new(&moved.shape).checked_len();
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
                at += strides[axis];
                if index[axis] < extents[axis] {
                    break;
                }
                at -= strides[axis] * extents[axis] as isize;
                index[axis] = 0;
            }
        }
        at as usize
    });
    Moved { shape, sources: Box::new(sources) }
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
