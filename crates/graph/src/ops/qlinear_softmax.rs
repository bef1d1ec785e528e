//! Softmax from quantized values to quantized values.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Softmax, SoftmaxFunction, Spelling,
    qlinear::{DOMAIN, Quantized, Target, fact, quantized_fact, target_dtype},
};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// `Y = quantize(softmax(dequantize(X)))`, with f32 in between; inputs `X`, its scale and zero point, the scale and zero point of `Y`.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearSoftmax {
    /// As [`Softmax`] has them.
    pub axis: i64,
    pub coerced: bool,
}

impl Operator for QLinearSoftmax {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(4..=5)?;
        // Of the Softmax that this stands for.
        let opset = node.optional_int("opset")?.ok_or_else(|| node.corrupt("attribute 'opset' is missing"))?;
        let coerced = opset < 13;
        let axis = node.int("axis", if coerced { 1 } else { -1 })?;
        Ok(QLinearSoftmax { axis, coerced: coerced && axis != -1 }.into())
    }

    fn export(&self) -> Spelling {
        let opset = if self.coerced { 12 } else { 13 };
        Spelling::new("QLinearSoftmax").in_domain(DOMAIN).with("axis", self.axis).with("opset", opset)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = quantized_fact(inputs, 0)?;
        self.softmax().infer(inputs, context)?;
        Ok(fact(target_dtype(inputs, 3, 0)?, x.shape.clone()))
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = Quantized::read(inputs, 0)?;
        let target = Target::read(inputs, 3, x.tensor.dtype())?;
        let floats = x.dequantize()?.into();
        let y = self.softmax().eval(Inputs(&[Some(&floats)]), context)?;
        let y = Inputs(&[y.first()]).tensor(0)?.to_vec::<f32>()?;
        let y = y.into_iter().map(|y| target.quantize(y)).collect();
        Ok(vec![target.tensor(y, x.tensor.shape().clone())?.into()])
    }
}

impl QLinearSoftmax {
    fn softmax(&self) -> Softmax {
        Softmax { function: SoftmaxFunction::Softmax, axis: self.axis, coerced: self.coerced }
    }
}
