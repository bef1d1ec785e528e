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
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.FusedMatMul", 1)
            .with("transB", 1)
            .with("alpha", 0.5f32)
            .input(f32s(&[2, 3], &[-0.6895, 1.332, -1.249, -0.1506, 0.347, -0.1044]))
            .input(f32s(
                &[4, 3],
                &[-0.8023, -0.8684, 0.4254, -1.03, 0.6462, -1.524, -0.555, 0.03631, -1.252, 0.652, -0.01854, -1.036],
            ))
            .gives([f32s(&[2, 4], &[-0.567424, 1.7372, 0.997393, 0.409857, -0.11246, 0.269228, 0.113446, 0.00176691])]);
        case("com.microsoft.FusedMatMul", 1)
            .with("transBatchA", 1)
            .with("alpha", 2.0f32)
            .input(f32s(&[2, 1, 3], &[-1.519, -1.566, 0.05103, -1.157, -1.365, -0.2312]))
            .input(f32s(&[1, 3, 2], &[2.278, 0.2775, 0.7629, 0.2127, 0.783, -1.343]))
            .gives([f32s(&[1, 2, 2], &[-9.23005, -1.64629, -7.71607, -0.601803])]);
        case("com.microsoft.FusedMatMul", 1)
            .with("transA", 1)
            .with("transBatchA", 1)
            .with("transB", 1)
            .input(f32s(
                &[3, 2, 2],
                &[-0.4305, 0.2614, -0.01792, -0.192, -0.6659, -0.2584, -0.7742, -2.422, -1.195, 0.4757, 1.557, 1.814],
            ))
            .input(f32s(
                &[2, 2, 3],
                &[0.09675, 0.8934, 0.908, -0.6923, -1.698, 0.03089, -1.762, -0.3199, 0.6081, -1.42, 0.0323, 1.24],
            ))
            .gives([f32s(&[2, 2, 2], &[-1.72163, 1.39182, 0.226371, 0.27249, 1.22605, 1.93112, 2.2162, 2.44377])]);
        case("com.microsoft.FusedMatMul", 1)
            .with("transBatchB", 1)
            .with("transA", 1)
            .input(f32s(&[2, 2, 1], &[0.3615, 0.5223, 0.9067, 1.733]))
            .input(f32s(&[2, 2, 2], &[0.1514, 1.23, -0.06417, -0.5462, 0.3148, -0.6058, -0.5731, -0.6077]))
            .gives([f32s(&[2, 1, 2], &[0.219151, 0.128236, -1.05137, -1.54838])]);
        case("com.microsoft.FusedMatMul", 1)
            .with("transA", 1)
            .with("alpha", 0.25f32)
            .input(f32s(&[3], &[-2.295, 0.1055, -1.264]))
            .input(f32s(&[3, 2], &[-0.1073, 1.45, -0.521, -0.542, 1.364, 0.5463]))
            .gives([f32s(&[2], &[-0.383202, -1.01886])]);
        case("com.microsoft.FusedMatMul", 1)
            .with("transB", 1)
            .with("alpha", 0.25f32)
            .input(f32s(
                &[2, 2, 3],
                &[0.9765, -0.3553, 0.7481, -0.6862, -0.676, 0.5962, -0.5984, 0.7671, 2.392, -1.686, -0.7522, 1.12],
            ))
            .input(f32s(&[3], &[-0.1451, 1.161, -1.01]))
            .gives([f32s(&[2, 2], &[-0.327444, -0.321858, -0.359622, -0.439966])]);
        case("com.microsoft.FusedMatMul", 1)
            .input(f32s(&[2, 2], &[0.3313, -0.1506, 0.1404, 0.3311]))
            .input(f32s(&[2, 1], &[-1.22, -1.074]))
            .gives([f32s(&[2, 1], &[-0.242442, -0.526889])]);
        case("com.microsoft.TransposeMatMul", 1)
            .with("transA", 1)
            .input(f32s(&[2, 2], &[1.399, 0.2932, 0.1063, -0.04407]))
            .input(f32s(&[2, 1], &[0.3565, -1.156]))
            .gives([f32s(&[2, 1], &[0.375861, 0.155471])]);
    }

    #[test]
    fn a_function_comes_last() {
        let node = case("com.microsoft.FusedMatMulActivation", 1).with("activation", "Softplus").with("alpha", 0.5f32);
        node.with("transB", 1)
            .input(f32s(&[1, 2], &[1.0, -3.0]))
            .input(f32s(&[1, 2], &[1.0, 1.0]))
            .gives([f32s(&[1, 1], &[0.313262])]);
    }

    #[test]
    fn factors_must_fit() {
        case("com.microsoft.FusedMatMul", 1).with("transB", 1).wave(&[2, 3]).wave(&[3, 2]).fails("against");
    }
}
