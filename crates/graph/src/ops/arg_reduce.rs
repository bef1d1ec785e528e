//! Where along an axis the largest or smallest element is.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, normalize_axis};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Shape, Value};

/// Index (i64) along `axis` of the largest or smallest element; of equal ones the first, or the last. NaN is never chosen
/// before a number.
#[derive(Clone, Debug, PartialEq)]
pub struct ArgReduce {
    pub largest: bool,
    pub axis: i64,
    /// The axis stays, of extent 1.
    pub keep_dims: bool,
    pub select_last: bool,
}

impl Operator for ArgReduce {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let largest = node.op_type == "ArgMax";
        let axis = node.int("axis", 0)?;
        let keep_dims = node.flag("keepdims", true)?;
        Ok(ArgReduce { largest, axis, keep_dims, select_last: node.flag("select_last_index", false)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new(if self.largest { "ArgMax" } else { "ArgMin" })
            .with("axis", self.axis)
            .with("keepdims", i64::from(self.keep_dims))
            .with("select_last_index", i64::from(self.select_last))
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let shape = x.shape.as_ref().map(|dims| self.output(dims, Dim::Const(1))).transpose()?;
        Ok(vec![TensorFact { dtype: DType::I64, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let output = Shape::from(self.output(x.shape(), 1)?);
        let len = context.bounded_len(&output)?;
        let axis = normalize_axis(self.axis, x.shape().rank())?;
        let (extent, inner) = (x.shape()[axis], x.shape()[axis + 1..].iter().product::<usize>());
        if extent == 0 && len > 0 {
            return Err(OpError::input(format!("axis {axis} of {} has no element to choose", x.shape())));
        }
        let lines = (0..len).map(|i| (i / inner * extent) * inner + i % inner);
        let indices: Vec<i128> = match Wide::of(x)? {
            Wide::Float(x) => {
                // NaN loses against every number.
                let beats = |a: f64, b: f64| if self.largest { a > b } else { a < b } || (b.is_nan() && !a.is_nan());
                lines.map(|start| self.choose(&x, start, extent, inner, beats)).collect()
            }
            Wide::Int(x) => {
                let beats = |a: i128, b: i128| if self.largest { a > b } else { a < b };
                lines.map(|start| self.choose(&x, start, extent, inner, beats)).collect()
            }
            Wide::Bool(_) => return Err(OpError::input("expected numbers, got bool")),
        };
        Ok(vec![Wide::Int(indices).narrow(DType::I64, output)?.into()])
    }
}

impl ArgReduce {
    fn output<T: Clone>(&self, dims: &[T], one: T) -> Result<Vec<T>, OpError> {
        let axis = normalize_axis(self.axis, dims.len())?;
        let mut dims = dims.to_vec();
        if self.keep_dims {
            dims[axis] = one;
        } else {
            dims.remove(axis);
        }
        Ok(dims)
    }

    fn choose<T: Copy>(
        &self,
        x: &[T],
        start: usize,
        extent: usize,
        inner: usize,
        beats: impl Fn(T, T) -> bool,
    ) -> i128 {
        let mut best = 0;
        for i in 1..extent {
            let (new, old) = (x[start + i * inner], x[start + best * inner]);
            if beats(new, old) || (self.select_last && !beats(old, new)) {
                best = i;
            }
        }
        best as i128
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("ArgMax", 13).with("axis", 1).wave(&[2, 5]).gives([tensor::<i64>(&[2, 1], &[3, 1])]);
        case("ArgMin", 13).with("axis", -2).with("keepdims", 0).wave(&[3, 2]).gives([tensor::<i64>(&[2], &[0, 2])]);
        case("ArgMax", 13)
            .with("axis", 0)
            .with("select_last_index", 1)
            .input(f32s(&[4], &[1.0, 3.0, 3.0, 2.0]))
            .gives([tensor::<i64>(&[1], &[2])]);
        case("ArgMax", 11).input(tensor::<i32>(&[3], &[3, 9, 9])).gives([tensor::<i64>(&[1], &[1])]);
    }

    #[test]
    fn an_empty_axis_has_no_largest_element() {
        case("ArgMax", 13).wave(&[0, 2]).fails("has no element to choose");
    }
}
