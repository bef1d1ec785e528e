//! Functions of one tensor from quantized values to quantized values.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, UnaryFunction,
    qlinear::{DOMAIN, Quantized, Target, fact, quantized_fact, target_dtype},
};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// `Y = quantize(f(dequantize(X)))`, elementwise, with f32 in between. Inputs `X`, its scale and zero point, the scale and zero point of
/// `Y`; zero points may be omitted.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearUnary {
    pub function: QLinearUnaryFunction,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum QLinearUnaryFunction {
    Sigmoid,
    LeakyRelu { alpha: f32 },
}

impl Operator for QLinearUnary {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(4..=5)?;
        let function = match node.op_type.as_str() {
            "QLinearSigmoid" => QLinearUnaryFunction::Sigmoid,
            _ => QLinearUnaryFunction::LeakyRelu { alpha: node.float("alpha", 0.01)? },
        };
        Ok(QLinearUnary { function }.into())
    }

    fn export(&self) -> Spelling {
        match self.function {
            QLinearUnaryFunction::Sigmoid => Spelling::new("QLinearSigmoid").in_domain(DOMAIN),
            QLinearUnaryFunction::LeakyRelu { alpha } => {
                Spelling::new("QLinearLeakyRelu").in_domain(DOMAIN).with("alpha", alpha)
            }
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = quantized_fact(inputs, 0)?;
        Ok(fact(target_dtype(inputs, 3, 0)?, x.shape.clone()))
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = Quantized::read(inputs, 0)?;
        let target = Target::read(inputs, 3, x.tensor.dtype())?;
        let function = match self.function {
            QLinearUnaryFunction::Sigmoid => UnaryFunction::Sigmoid,
            QLinearUnaryFunction::LeakyRelu { alpha } => UnaryFunction::LeakyRelu { alpha },
        };
        let y = x.floats().map(|x| target.quantize(function.of_float(x.into()) as f32));
        Ok(vec![target.tensor(y.collect(), x.tensor.shape().clone())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.QLinearSigmoid", 1)
            .input(tensor::<u8>(&[2, 4], &[141, 8, 195, 186, 216, 44, 22, 220]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[128]))
            .input(f32s(&[], &[0.00390625]))
            .input(tensor::<u8>(&[], &[0]))
            .gives([tensor::<u8>(&[2, 4], &[168, 1, 247, 243, 253, 4, 1, 253])]);
        case("com.microsoft.QLinearSigmoid", 1)
            .input(tensor::<i8>(&[5], &[-123, 10, -108, -52, -5]))
            .input(f32s(&[], &[0.05]))
            .omitted()
            .input(f32s(&[], &[0.005]))
            .input(tensor::<i8>(&[], &[-100]))
            .gives([tensor::<i8>(&[5], &[-100, 24, -99, -86, -12])]);
        case("com.microsoft.QLinearLeakyRelu", 1)
            .with("alpha", 0.1f32)
            .input(tensor::<u8>(&[2, 4], &[108, 103, 7, 1, 31, 2, 171, 134]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[128]))
            .input(f32s(&[], &[0.04]))
            .input(tensor::<u8>(&[], &[30]))
            .gives([tensor::<u8>(&[2, 4], &[28, 27, 15, 14, 18, 14, 84, 38])]);
        case("com.microsoft.QLinearLeakyRelu", 1)
            .input(tensor::<i8>(&[5], &[-4, -3, -2, 3, 120]))
            .input(f32s(&[], &[0.5]))
            .input(tensor::<i8>(&[], &[0]))
            .input(f32s(&[], &[1.0]))
            .input(tensor::<i8>(&[], &[1]))
            .gives([tensor::<i8>(&[5], &[1, 1, 1, 3, 61])]);
    }
}
