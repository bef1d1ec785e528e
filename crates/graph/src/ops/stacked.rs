//! Tensors of one shape, put side by side along a new axis, and taken apart again.

use super::{EvalContext, select, select_from};
use crate::{Dim, Fact, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// The elements of a tensor that an iteration after the other makes.
#[derive(Default)]
pub(super) struct Stack {
    tensors: Vec<Tensor>,
    elements: usize,
}

impl Stack {
    /// # Errors
    /// Not a tensor, or of another type or shape than those before; too many elements.
    pub fn push(&mut self, value: Value, context: &EvalContext) -> Result<(), OpError> {
        let kind = value.kind();
        let tensor = value.into_tensor().ok_or_else(|| OpError::input(format!("a {kind} to stack, not a tensor")))?;
        if let Some(first) = self.tensors.first()
            && (first.dtype(), first.shape()) != (tensor.dtype(), tensor.shape())
        {
            return Err(OpError::input(format!("{tensor:?} to stack upon {first:?}: one type and shape expected")));
        }
        self.elements = self.elements.saturating_add(tensor.element_count().max(1));
        context.bounded_len(&[self.elements])?;
        self.tensors.push(tensor);
        Ok(())
    }

    /// The stack along a new `axis`, the last first where `backwards`; where nothing was pushed, empty tensors of `element`'s type.
    pub fn finish(mut self, axis: i64, backwards: bool, element: &Fact) -> Result<Tensor, OpError> {
        if backwards {
            self.tensors.reverse();
        }
        let Some(first) = self.tensors.first() else {
            let element = element.tensor()?;
            let extent = |d: &Dim| d.as_const().and_then(|d| usize::try_from(d).ok()).unwrap_or(0);
            let mut shape: Vec<usize> = element.shape.iter().flatten().map(extent).collect();
            shape.insert(new_axis(axis, shape.len())?, 0);
            return Ok(Tensor::zeros(element.dtype, shape)?);
        };
        let of_one = first.shape().to_vec();
        let axis = new_axis(axis, of_one.len())?;
        let mut shape = of_one.clone();
        shape.insert(axis, self.tensors.len());
        let (dtype, inner) = (first.dtype(), of_one[axis..].iter().product::<usize>());
        let outer: usize = of_one[..axis].iter().product();
        let count = self.tensors.len();
        if dtype == DType::String || dtype.bits() < 8 {
            let views: Vec<&Tensor> = self.tensors.iter().collect();
            let sources = (0..outer * count * inner).map(|at| {
                let (row, within) = (at / inner, at % inner);
                (row % count, row / count * inner + within)
            });
            return select_from(&views, shape, sources);
        }
        let mut stack = Tensor::zeros(dtype, shape)?;
        let width = inner * dtype.bits() / 8;
        let to = stack.bytes_mut();
        for (at, tensor) in self.tensors.iter().enumerate().filter(|_| width > 0) {
            for (row, from) in tensor.bytes().chunks_exact(width).enumerate() {
                to[(row * count + at) * width..][..width].copy_from_slice(from);
            }
        }
        Ok(stack)
    }
}

fn new_axis(axis: i64, rank: usize) -> Result<usize, OpError> {
    super::normalize_axis(axis, rank + 1)
}

/// What is known of a stack of `extent` elements.
pub(super) fn stacked_fact(element: &Fact, axis: i64, extent: Dim) -> Result<Fact, OpError> {
    let element = element.tensor()?;
    let Some(shape) = &element.shape else { return Ok(TensorFact::unknown_rank(element.dtype).into()) };
    let mut shape = shape.clone();
    shape.insert(new_axis(axis, shape.len())?, extent);
    Ok(TensorFact::new(element.dtype, shape).into())
}

/// Element number `at` of `tensor` along `axis`, which goes.
pub(super) fn element(tensor: &Tensor, axis: usize, at: usize) -> Result<Tensor, OpError> {
    let mut shape = tensor.shape().to_vec();
    let extent = shape.remove(axis);
    let inner: usize = shape[axis..].iter().product();
    let count = shape.iter().product::<usize>();
    let width = inner * tensor.dtype().bits() / 8;
    if tensor.dtype() == DType::String || tensor.dtype().bits() < 8 || count == 0 {
        return select(tensor, shape, (0..count).map(|i| (i / inner * extent + at) * inner + i % inner));
    }
    let mut element = Tensor::zeros(tensor.dtype(), shape)?;
    let from = tensor.bytes().chunks_exact(width).skip(at).step_by(extent);
    element.bytes_mut().chunks_exact_mut(width).zip(from).for_each(|(to, from)| to.copy_from_slice(from));
    Ok(element)
}
