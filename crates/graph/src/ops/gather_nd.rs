//! Selection of elements or slices by tuples of indices.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, checked_shape, gather, movement,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Shape, Value};

/// Inputs `x [batches…, …]` and `indices [batches…, …, n]`: every `n` indices select along the first `n` axes of `x` after the
/// `batch_dims` that both share. Negative indices count from the end.
#[derive(Clone, Debug, PartialEq)]
pub struct GatherNd {
    pub batch_dims: usize,
}

impl GatherNd {
    /// `[batches…, …]` of `indices`, and what a tuple leaves of `x`.
    fn output<T: Clone>(&self, x: &[T], indices: &[T], tuple: usize) -> Result<Vec<T>, OpError> {
        if tuple > x.len() - self.batch_dims {
            let left = x.len() - self.batch_dims;
            return Err(OpError::input(format!("tuples of {tuple} indices into {left} axes")));
        }
        Ok([&indices[..indices.len() - 1], &x[self.batch_dims + tuple..]].concat())
    }

    fn check_ranks(&self, x: usize, indices: usize) -> Result<(), OpError> {
        if indices == 0 || self.batch_dims >= indices || self.batch_dims > x {
            let batches = self.batch_dims;
            return Err(OpError::input(format!("{batches} batch axes, x of rank {x} and indices of rank {indices}")));
        }
        Ok(())
    }

    fn moved(&self, shape: &[usize], index_shape: &[usize], indices: &[i64]) -> Result<movement::Moved, OpError> {
        self.check_ranks(shape.len(), index_shape.len())?;
        let (batch_shape, rest) = shape.split_at(self.batch_dims);
        if index_shape[..self.batch_dims] != *batch_shape {
            return Err(OpError::input(format!("indices of shape {index_shape:?} for {shape:?}: the batches differ")));
        }
        let tuple = index_shape[index_shape.len() - 1];
        let to = self.output(shape, index_shape, tuple)?;
        if Shape::new(&to).checked_len().is_none_or(|count| count == 0) {
            return Ok(movement::Moved { shape: to, sources: Box::new(std::iter::empty()) });
        }
        let strides = movement::strides(rest);
        let slice: usize = rest[tuple..].iter().product();
        let batch: usize = rest.iter().product();
        let tuples: usize = index_shape[self.batch_dims..index_shape.len() - 1].iter().product();
        let count: usize = index_shape[..index_shape.len() - 1].iter().product();
        let mut starts = Vec::with_capacity(count);
        for n in 0..count {
            let mut start = n / tuples.max(1) * batch;
            for (axis, &given) in indices[n * tuple..][..tuple].iter().enumerate() {
                start += gather::index(given, rest[axis])? * strides[axis];
            }
            starts.push(start);
        }
        let sources = starts.into_iter().flat_map(move |start| start..start + slice);
        Ok(movement::Moved { shape: to, sources: Box::new(sources) })
    }
}

impl Operator for GatherNd {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        let batch_dims = node.int("batch_dims", 0)?;
        let batch_dims = usize::try_from(batch_dims)
            .map_err(|_| node.corrupt(format!("attribute 'batch_dims' must be 0 or more, got {batch_dims}")))?;
        Ok(GatherNd { batch_dims }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("GatherND").with("batch_dims", self.batch_dims as i64)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, indices) = (inputs.tensor(0)?, inputs.tensor(1)?);
        gather::check_indices(indices)?;
        let (Some(shape), Some(index_shape)) = (&x.shape, &indices.shape) else {
            return Ok(vec![TensorFact::unknown_rank(x.dtype).into()]);
        };
        self.check_ranks(shape.len(), index_shape.len())?;
        // How many axes are left, the tuples' length says.
        let tuple = index_shape.last().and_then(Dim::as_const).and_then(|n| usize::try_from(n).ok());
        let Some(tuple) = tuple else { return Ok(vec![TensorFact::unknown_rank(x.dtype).into()]) };
        let dims = self.output(shape, index_shape, tuple)?;
        let fact = TensorFact::new(x.dtype, dims.clone());
        let few = fact.constant_count().is_some_and(|count| count <= TensorFact::VALUE_LIMIT);
        match (indices.constant_value(), indices.constant_shape()) {
            (Some(values), Some(index_shape)) if few => {
                movement::moved_fact(x, Some(dims), |shape| self.moved(shape, &index_shape, &values))
            }
            _ => Ok(vec![fact.into()]),
        }
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        let index_shape = inputs.tensor(1)?.shape();
        self.check_ranks(shape.len(), index_shape.rank())?;
        checked_shape(self.output(shape, index_shape, index_shape[index_shape.rank() - 1])?, context)?;
        self.moved(shape, index_shape, &inputs.integers(1)?)?.apply(x)
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, strings, tensor};
    use cutover_tensor::Tensor;

    fn x() -> Tensor {
        tensor::<i32>(&[2, 2, 2], &[0, 1, 2, 3, 4, 5, 6, 7])
    }

    #[test]
    fn agrees_with_onnx_runtime() {
        let cases: [(i64, Tensor, Tensor); 5] = [
            (0, tensor::<i64>(&[2, 2], &[0, 1, 1, 0]), tensor(&[2, 2], &[2, 3, 4, 5])),
            (0, tensor::<i64>(&[2, 3], &[0, 0, 1, 1, -1, -1]), tensor(&[2], &[1, 7])),
            (1, tensor::<i64>(&[2, 1], &[1, 0]), tensor(&[2, 2], &[2, 3, 4, 5])),
            (1, tensor::<i64>(&[2, 1, 2], &[1, 0, 0, -1]), tensor(&[2, 1], &[2, 5])),
            (0, tensor::<i64>(&[0, 1], &[]), tensor::<i32>(&[0, 2, 2], &[])),
        ];
        for (batch_dims, indices, expected) in cases {
            case("GatherND", 13).with("batch_dims", batch_dims).input(x()).input(indices).gives([expected]);
        }
        let whole = case("GatherND", 12).input(x()).input(tensor::<i64>(&[2, 0], &[]));
        let twice: Vec<i32> = (0..8).chain(0..8).collect();
        whole.gives([tensor(&[2, 2, 2, 2], &twice)]);
        let words = case("GatherND", 13).input(strings(&[2], &["a", "b"])).input(tensor::<i64>(&[1, 1], &[1]));
        words.gives([strings(&[1], &["b"])]);
    }

    #[test]
    fn refuses_what_is_not_there() {
        case("GatherND", 13).input(x()).input(tensor::<i64>(&[1, 1], &[2])).fails("index 2 of an axis of 2");
        case("GatherND", 13).input(x()).input(tensor::<i64>(&[1, 4], &[0; 4])).fails("tuples of 4 indices");
        let batches = case("GatherND", 13).with("batch_dims", 1).input(x()).input(tensor::<i64>(&[3, 1], &[0; 3]));
        batches.fails("the batches differ");
        case("GatherND", 13)
            .with("batch_dims", 2)
            .input(x())
            .input(tensor::<i64>(&[2, 1], &[0; 2]))
            .fails("2 batch axes");
    }
}
