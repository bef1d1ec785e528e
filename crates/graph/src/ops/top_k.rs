//! The largest or smallest elements along an axis.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, movement, normalize_axis,
    select,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};
use std::cmp::Ordering;

/// Inputs `x` and `k`: the `k` largest (or smallest) elements along `axis`, best first, and their indices (i64). Of equal ones the first
/// comes first; NaN is larger than every number.
#[derive(Clone, Debug, PartialEq)]
pub struct TopK {
    pub axis: i64,
    pub largest: bool,
    /// Without it any order is right; ours is the same.
    pub sorted: bool,
}

impl TopK {
    /// For every element of the result, row-major, its position along the axis.
    fn positions<T>(
        &self,
        x: &[T],
        shape: &[usize],
        axis: usize,
        k: usize,
        order: impl Fn(&T, &T) -> Ordering,
    ) -> Vec<usize> {
        let (outer, extent, inner) = movement::around(shape, axis);
        let mut positions = vec![0; outer * k * inner];
        if positions.is_empty() {
            return positions;
        }
        let mut line: Vec<usize> = Vec::with_capacity(extent);
        for (o, i) in (0..outer).flat_map(|o| (0..inner).map(move |i| (o, i))) {
            let element = |at: usize| &x[(o * extent + at) * inner + i];
            let better = |&a: &usize, &b: &usize| {
                let order = order(element(a), element(b));
                (if self.largest { order.reverse() } else { order }).then(a.cmp(&b))
            };
            line.clear();
            line.extend(0..extent);
            if k < extent {
                line.select_nth_unstable_by(k - 1, better);
            }
            line[..k].sort_unstable_by(better);
            line[..k].iter().enumerate().for_each(|(rank, &at)| positions[(o * k + rank) * inner + i] = at);
        }
        positions
    }
}

impl Operator for TopK {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        if node.opset < 10 {
            node.expect_inputs(1..=1)?;
            let k = node.optional_int("k")?.ok_or_else(|| node.corrupt("attribute 'k' is missing"))?;
            let k = movement::integers(node, vec![k])?;
            node.push_constant(1, k);
        }
        node.expect_inputs(2..=2)?;
        let axis = node.int("axis", -1)?;
        Ok(TopK { axis, largest: node.flag("largest", true)?, sorted: node.flag("sorted", true)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("TopK")
            .with("axis", self.axis)
            .with("largest", i64::from(self.largest))
            .with("sorted", i64::from(self.sorted))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, k) = (inputs.tensor(0)?, inputs.tensor(1)?);
        movement::known_integer(inputs, 1)?;
        let mut shape = x.shape.clone();
        if let Some(dims) = &mut shape {
            let axis = normalize_axis(self.axis, dims.len())?;
            let k = k.value.as_ref().and_then(|k| k.first().cloned());
            if let (Some(k), Some(extent)) = (k.as_ref().and_then(crate::Dim::as_const), dims[axis].as_const()) {
                check(k, extent)?;
            }
            dims[axis] = k.unwrap_or_else(|| context.fresh("k"));
        }
        let output = |dtype: DType| TensorFact { dtype, shape: shape.clone(), value: None }.into();
        Ok(vec![output(x.dtype), output(DType::I64)])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        let axis = normalize_axis(self.axis, shape.len())?;
        let k = check(movement::integer(inputs, 1)?, shape[axis] as i64)?;
        let mut to = shape.to_vec();
        to[axis] = k;
        context.bounded_len(&to)?;
        let positions = match Wide::of(x)? {
            // Numbers compare as numbers, so that zeros of both signs are equal.
            Wide::Float(v) => self
                .positions(&v, shape, axis, k, |a, b| a.partial_cmp(b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))),
            Wide::Int(v) => self.positions(&v, shape, axis, k, Ord::cmp),
            Wide::Bool(_) => return Err(OpError::input("expected numbers, got bool")),
        };
        let (_, extent, inner) = movement::around(shape, axis);
        let block = (k * inner).max(1);
        let sources = positions.iter().enumerate().map(|(n, &at)| (n / block * extent + at) * inner + n % inner.max(1));
        let values = select(x, to.clone(), sources)?;
        let indices = Tensor::from_vec(to, positions.iter().map(|&at| at as i64).collect())?;
        Ok(vec![values.into(), indices.into()])
    }
}

fn check(k: i64, extent: i64) -> Result<usize, OpError> {
    let within = usize::try_from(k).ok().filter(|_| k <= extent);
    within.ok_or_else(|| OpError::input(format!("the best {k} elements of an axis of {extent}")))
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, tensor};
    use cutover_tensor::Tensor;

    fn k(case: Case, k: i64) -> Case {
        case.input(tensor::<i64>(&[1], &[k]))
    }

    #[test]
    fn agrees_with_onnx_runtime() {
        let x = || f32s(&[2, 4], &[3., 1., 3., 2., -1., 0., -0.0, 5.]);
        let best = |values: [f32; 4], indices: [i64; 4]| -> [Tensor; 2] {
            [f32s(&[2, 2], &values), tensor::<i64>(&[2, 2], &indices)]
        };
        k(case("TopK", 11).input(x()), 2).gives(best([3., 3., 5., 0.], [0, 2, 3, 1]));
        let least = k(case("TopK", 24).with("largest", 0).input(x()), 2);
        least.gives(best([1., 2., -1., 0.], [1, 3, 0, 1]));
        let rows = k(case("TopK", 10).with("axis", 0).input(x()), 1);
        rows.gives([f32s(&[1, 4], &[3., 1., 3., 5.]), tensor::<i64>(&[1, 4], &[0, 0, 0, 1])]);
        case("TopK", 1).with("k", 1).with("axis", 1).input(x()).gives([f32s(&[2, 1], &[3., 5.])]);
        let wide = k(case("TopK", 24).input(tensor::<u64>(&[3], &[u64::MAX, 1, u64::MAX - 1])), 2);
        wide.gives([tensor::<u64>(&[2], &[u64::MAX, u64::MAX - 1])]);
        let none = k(case("TopK", 11).input(x()), 0);
        none.gives([f32s(&[2, 0], &[]), tensor::<i64>(&[2, 0], &[])]);
        let empty = k(case("TopK", 11).with("axis", 1).wave(&[0, 3]), 2);
        empty.gives([f32s(&[0, 2], &[])]);
    }

    #[test]
    fn nan_is_largest() {
        let x = || f32s(&[4], &[1., f32::NAN, 3., 2.]);
        k(case("TopK", 11).input(x()), 2).gives([f32s(&[2], &[f32::NAN, 3.])]);
        k(case("TopK", 11).with("largest", 0).input(x()), 3).gives([f32s(&[3], &[1., 2., 3.])]);
    }

    #[test]
    fn no_more_than_there_are() {
        k(case("TopK", 11).wave(&[3]), 4).fails("the best 4 elements of an axis of 3");
        k(case("TopK", 11).wave(&[3]), -1).fails("the best -1 elements");
        case("TopK", 11).wave(&[3]).input(tensor::<i64>(&[2], &[1, 1])).fails("must be one integer, got 2");
    }
}
