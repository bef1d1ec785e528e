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
