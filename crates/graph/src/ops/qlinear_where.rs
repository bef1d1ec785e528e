//! Choice between two quantized tensors, element by element.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, broadcast_dims, broadcast_index,
    broadcast_shape,
    qlinear::{DOMAIN, Quantized, Target, fact, quantized_fact, target_dtype},
};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::{DType, Value};

/// `Z = quantize(condition ? dequantize(X) : dequantize(Y))`, elementwise after broadcasting, with f32 in between. Inputs `condition`,
/// `X`, its scale and zero point, `Y`, its scale and zero point, and the scale and zero point of `Z`.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearWhere;

impl Operator for QLinearWhere {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(9..=9)?;
        Ok(QLinearWhere.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("QLinearWhere").in_domain(DOMAIN)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (condition, x, y) = (inputs.tensor(0)?, quantized_fact(inputs, 1)?, quantized_fact(inputs, 4)?);
        if condition.dtype != DType::Bool {
            return Err(OpError::input(format!("expected a condition of bool, got {condition}")));
        }
        inputs.same_dtype(1, 4)?;
        Ok(fact(target_dtype(inputs, 7, 1)?, broadcast_dims(&[condition, x, y])?))
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let condition = inputs.tensor(0)?;
        let (x, y) = (Quantized::read(inputs, 1)?, Quantized::read(inputs, 4)?);
        let target = Target::read(inputs, 7, x.tensor.dtype())?;
        let shape = broadcast_shape(&[condition.shape(), x.tensor.shape(), y.tensor.shape()])?;
        context.bounded_len(&shape)?;
        let quantized = |side: &Quantized<'_>| side.floats().map(|x| target.quantize(x)).collect::<Vec<_>>();
        let (truth, from_x, from_y) = (condition.to_bools()?, quantized(&x), quantized(&y));
        let sources = broadcast_index(x.tensor.shape(), &shape).zip(broadcast_index(y.tensor.shape(), &shape));
        let z = broadcast_index(condition.shape(), &shape).zip(sources);
        let z = z.map(|(c, (i, j))| if truth[c] { from_x[i] } else { from_y[j] });
        Ok(vec![target.tensor(z.collect(), shape.clone())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};
    use cutover_tensor::Tensor;

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.QLinearWhere", 1)
            .input(Tensor::from_bools([1, 2], &[true, false]).unwrap())
            .input(tensor::<u8>(&[2, 2], &[58, 182, 159, 12]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[10]))
            .input(tensor::<u8>(&[2, 1], &[21, 96]))
            .input(f32s(&[], &[0.02]))
            .input(tensor::<u8>(&[], &[128]))
            .input(f32s(&[], &[0.04]))
            .input(tensor::<u8>(&[], &[9]))
            .gives([tensor::<u8>(&[2, 2], &[69, 0, 195, 0])]);
        case("com.microsoft.QLinearWhere", 1)
            .input(Tensor::from_bools([3], &[true, false, true]).unwrap())
            .input(tensor::<i8>(&[3], &[85, -26, 73]))
            .input(f32s(&[], &[0.5]))
            .input(tensor::<i8>(&[], &[0]))
            .input(tensor::<i8>(&[1], &[-47]))
            .input(f32s(&[], &[0.25]))
            .input(tensor::<i8>(&[], &[-7]))
            .input(f32s(&[], &[1.0]))
            .input(tensor::<i8>(&[], &[3]))
            .gives([tensor::<i8>(&[3], &[45, -7, 39])]);
    }
}
