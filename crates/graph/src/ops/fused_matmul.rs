//! A matrix product of transposed factors, with a factor and a function.

use super::{
    EvalContext, Facts, InferContext, Inputs, MatMul, NodeReader, Op, Operator, Spelling, UnaryFunction, Wide,
    activation::{read_function, spell_function},
    matmul::{Product, infer_shape},
    qlinear::DOMAIN,
    select,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Shape, Tensor, Value};

/// `Y = f(alpha · A' · B')`, as [`MatMul`] multiplies; `A'` and `B'` are `A` and `B` with their axes in another order. A vector's stay.
#[derive(Clone, Debug, PartialEq)]
pub struct FusedMatMul {
    pub a: FactorOrder,
    pub b: FactorOrder,
    pub alpha: f32,
    pub function: Option<UnaryFunction>,
}

/// How a factor's axes are reordered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FactorOrder {
    /// The first axis becomes the last but one; before `transpose`.
    pub batch: bool,
    /// The last two change places.
    pub transpose: bool,
}

impl Operator for FusedMatMul {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        let mut order = |batch: &str, transpose: &str| {
            Ok::<_, ImportError>(FactorOrder {
                batch: node.flag(batch, false)?,
                transpose: node.flag(transpose, false)?,
            })
        };
        let (a, b) = (order("transBatchA", "transA")?, order("transBatchB", "transB")?);
        let alpha = node.float("alpha", 1.0)?;
        let function = match node.op_type.as_str() {
            "FusedMatMulActivation" => read_function(node)?,
            _ => None,
        };
        let activation = function.map(|function| function.activation());
        match activation {
            _ if (a, b, alpha) != (FactorOrder::default(), FactorOrder::default(), 1.0) => {}
            None => return Ok(MatMul { activation: None }.into()),
            Some(Some(activation)) => return Ok(MatMul { activation: Some(activation) }.into()),
            Some(None) => {}
        }
        Ok(FusedMatMul { a, b, alpha, function }.into())
    }

    fn export(&self) -> Spelling {
        let name = if self.function.is_some() { "FusedMatMulActivation" } else { "FusedMatMul" };
        let spelling = Spelling::new(name)
            .in_domain(DOMAIN)
            .with("transA", i64::from(self.a.transpose))
            .with("transB", i64::from(self.b.transpose))
            .with("transBatchA", i64::from(self.a.batch))
            .with("transBatchB", i64::from(self.b.batch))
            .with("alpha", self.alpha);
        self.function.into_iter().fold(spelling, spell_function)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(1)?);
        inputs.same_dtype(0, 1)?;
        let ordered = |fact: &TensorFact, order: FactorOrder| {
            let shape = fact.shape.as_ref().map(|dims| order.permute(dims));
            TensorFact { dtype: fact.dtype, shape, value: None }
        };
        let shape = infer_shape(&ordered(a, self.a), &ordered(b, self.b))?;
        Ok(vec![TensorFact { dtype: a.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (a, b) = (self.a.apply(inputs.tensor(0)?)?, self.b.apply(inputs.tensor(1)?)?);
        let product = Product::new(a.shape(), b.shape())?;
        context.bounded_len(&product.output)?;
        let mut y = product.apply(&Wide::floats(&a)?, &Wide::floats(&b)?);
        y.iter_mut().for_each(|y| *y *= f64::from(self.alpha));
        if let Some(function) = self.function {
            y.iter_mut().for_each(|y| *y = function.of_float(*y));
        }
        Ok(vec![Wide::Float(y).narrow(a.dtype(), product.output)?.into()])
    }
}

impl FactorOrder {
    /// `values`, one for each axis, in the new order.
    pub fn permute<T: Clone>(self, values: &[T]) -> Vec<T> {
        let mut values = values.to_vec();
        let rank = values.len();
        if rank < 2 {
            return values;
        }
        if self.batch {
            values[..rank - 1].rotate_left(1);
        }
        if self.transpose {
            values.swap(rank - 2, rank - 1);
        }
        values
    }

    fn apply(self, tensor: &Tensor) -> Result<Tensor, OpError> {
        if self == FactorOrder::default() {
            return Ok(tensor.clone());
        }
        let shape: Shape = self.permute(tensor.shape().dims()).into();
        let strides = self.permute(&tensor.shape().strides());
        let sources = super::indices(&shape);
        let sources = sources.map(|index| index.iter().zip(&strides).map(|(i, stride)| i * stride).sum());
        select(tensor, shape.clone(), sources)
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::case;

    #[test]
    fn factors_must_fit() {
        case("com.microsoft.FusedMatMul", 1).with("transB", 1).wave(&[2, 3]).wave(&[3, 2]).fails("against");
    }
}
