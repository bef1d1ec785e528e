//! Sums and products of all elements so far along an axis.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, movement, normalize_axis,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// Inputs `x` and the axis: `y[i] = x[0] ∘ … ∘ x[i]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Cumulate {
    /// Products instead of sums.
    pub product: bool,
    /// Without `x[i]` itself.
    pub exclusive: bool,
    /// From the last element to the first.
    pub reverse: bool,
}

impl Cumulate {
    fn scan<T: Clone>(
        &self,
        x: &[T],
        shape: &[usize],
        axis: usize,
        identity: T,
        combine: impl Fn(&T, &T) -> T,
    ) -> Vec<T> {
        let (outer, extent, inner) = movement::around(shape, axis);
        let mut y = x.to_vec();
        for (line, within) in (0..outer).flat_map(|line| (0..inner).map(move |within| (line, within))) {
            let mut total = identity.clone();
            for step in 0..extent {
                let i = if self.reverse { extent - 1 - step } else { step };
                let at = (line * extent + i) * inner + within;
                let next = combine(&total, &x[at]);
                y[at] = if self.exclusive { total } else { next.clone() };
                total = next;
            }
        }
        y
    }
}

impl Operator for Cumulate {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        let (exclusive, reverse) = (node.flag("exclusive", false)?, node.flag("reverse", false)?);
        Ok(Cumulate { product: node.op_type == "CumProd", exclusive, reverse }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = if self.product { Spelling::new("CumProd").since(26) } else { Spelling::new("CumSum") };
        spelling.with("exclusive", i64::from(self.exclusive)).with("reverse", i64::from(self.reverse))
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let axis = movement::known_integer(inputs, 1)?;
        let axis = axis.zip(x.rank()).map(|(axis, rank)| normalize_axis(axis, rank)).transpose()?;
        let fact = TensorFact { value: None, ..x.clone() };
        let value = match (&x.value, x.constant_shape(), axis) {
            (Some(value), Some(shape), Some(axis)) => {
                let known: Vec<Option<Dim>> = value.iter().cloned().map(Some).collect();
                let identity = Some(Dim::Const(self.product.into()));
                let totals = self.scan(&known, &shape, axis, identity, |a, b| {
                    let (a, b) = (a.clone()?, b.clone()?);
                    if self.product { a * b } else { a + b }.unless_overflown()
                });
                totals.into_iter().collect::<Option<Vec<Dim>>>()
            }
            _ => None,
        };
        Ok(vec![fact.with_value(value).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        let axis = normalize_axis(movement::integer(inputs, 1)?, shape.len())?;
        let y = match Wide::of(x)? {
            Wide::Float(v) if self.product => Wide::Float(self.scan(&v, shape, axis, 1.0, |a, b| a * b)),
            Wide::Float(v) => Wide::Float(self.scan(&v, shape, axis, 0.0, |a, b| a + b)),
            Wide::Int(v) if self.product => Wide::Int(self.scan(&v, shape, axis, 1, |a, b| a.wrapping_mul(*b))),
            Wide::Int(v) => Wide::Int(self.scan(&v, shape, axis, 0, |a, b| a.wrapping_add(*b))),
            Wide::Bool(_) => return Err(OpError::input("expected numbers, got bool")),
        };
        Ok(vec![y.narrow(x.dtype(), shape)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};
    use cutover_tensor::Tensor;

    #[test]
    fn agrees_with_onnx_runtime() {
        let x = || f32s(&[2, 3], &[1., 2., 3., 4., 5., 6.]);
        let sum = |axis: i64| case("CumSum", 14).input(x()).input(Tensor::scalar(axis));
        sum(0).gives([f32s(&[2, 3], &[1., 2., 3., 5., 7., 9.])]);
        sum(-1).gives([f32s(&[2, 3], &[1., 3., 6., 4., 9., 15.])]);
        sum(1).with("exclusive", 1).gives([f32s(&[2, 3], &[0., 1., 3., 0., 4., 9.])]);
        sum(1).with("reverse", 1).gives([f32s(&[2, 3], &[6., 5., 3., 15., 11., 6.])]);
        sum(1).with("reverse", 1).with("exclusive", 1).gives([f32s(&[2, 3], &[5., 3., 0., 11., 6., 0.])]);
        let most = tensor::<i32>(&[2], &[i32::MAX, 1]);
        case("CumSum", 14).input(most).input(Tensor::scalar(0i64)).gives([tensor::<i32>(&[2], &[i32::MAX, i32::MIN])]);
        sum(2).fails("axis 2 of a tensor of rank 2");
        case("CumSum", 11).wave(&[2, 0, 3]).input(tensor::<i32>(&[1], &[1])).gives([f32s(&[2, 0, 3], &[])]);
    }

    #[test]
    fn what_overflows_on_the_way_wraps_too() {
        let x = tensor::<i64>(&[4], &[i64::MAX, 2, -1, 1]);
        case("CumProd", 26).input(x).input(Tensor::scalar(0i32)).gives([tensor::<i64>(&[4], &[i64::MAX, -2, 2, 2])]);
    }

    #[test]
    fn products_wrap_as_integers_do() {
        let x = tensor::<i32>(&[3], &[3, 65536, 65536]);
        let product = || case("CumProd", 26).input(x.clone()).input(Tensor::scalar(0i32));
        product().gives([tensor::<i32>(&[3], &[3, 196608, 0])]);
        product().with("exclusive", 1).gives([tensor::<i32>(&[3], &[1, 3, 196608])]);
    }
}
