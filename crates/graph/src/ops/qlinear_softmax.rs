//! Softmax from quantized values to quantized values.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Softmax, SoftmaxFunction, Spelling,
    qlinear::{DOMAIN, Quantized, Target, fact, quantized_fact, target_dtype},
};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// `Y = quantize(softmax(dequantize(X)))`, with f32 in between; inputs `X`, its scale and zero point, the scale and zero point of `Y`. ONNX
/// Runtime takes the inverse of that scale for a whole number, rounded down: with 1/255 it gives 254ths.
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

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.QLinearSoftmax", 1)
            .with("opset", 13)
            .input(tensor::<u8>(&[2, 3], &[165, 65, 157, 195, 98, 117]))
            .input(f32s(&[], &[0.02]))
            .input(tensor::<u8>(&[], &[120]))
            .input(f32s(&[], &[0.00390625]))
            .input(tensor::<u8>(&[], &[0]))
            .gives([tensor::<u8>(&[2, 3], &[129, 17, 110, 189, 27, 40])]);
        case("com.microsoft.QLinearSoftmax", 1)
            .with("opset", 13)
            .with("axis", 1)
            .input(tensor::<i8>(&[2, 2, 2], &[127, 78, 123, -31, 47, 115, 38, 87]))
            .input(f32s(&[], &[0.01]))
            .input(tensor::<i8>(&[], &[12]))
            .input(f32s(&[], &[0.00390625]))
            .input(tensor::<i8>(&[], &[-128]))
            .gives([tensor::<i8>(&[2, 2, 2], &[3, 64, -3, -64, 6, 18, -6, -18])]);
        case("com.microsoft.QLinearSoftmax", 1)
            .with("opset", 12)
            .with("axis", 1)
            .input(tensor::<u8>(&[2, 2, 2], &[176, 180, 99, 224, 34, 148, 184, 216]))
            .input(f32s(&[], &[0.01]))
            .input(tensor::<u8>(&[], &[12]))
            .input(f32s(&[], &[0.005]))
            .input(tensor::<u8>(&[], &[3]))
            .gives([tensor::<u8>(&[2, 2, 2], &[52, 54, 25, 81, 17, 45, 64, 87])]);
        case("com.microsoft.QLinearSoftmax", 1)
            .with("opset", 12)
            .input(tensor::<u8>(&[2, 2], &[134, 96, 79, 108]))
            .input(f32s(&[], &[0.01]))
            .input(tensor::<u8>(&[], &[12]))
            .input(f32s(&[], &[0.005]))
            .input(tensor::<u8>(&[], &[3]))
            .gives([tensor::<u8>(&[2, 2], &[122, 84, 89, 117])]);
        case("com.microsoft.QLinearSoftmax", 1)
            .with("opset", 9)
            .with("axis", -1)
            .input(tensor::<u8>(&[2, 2, 2], &[124, 184, 227, 18, 239, 136, 91, 172]))
            .input(f32s(&[], &[0.01]))
            .input(tensor::<u8>(&[], &[12]))
            .input(f32s(&[], &[0.005]))
            .input(tensor::<u8>(&[], &[3]))
            .gives([tensor::<u8>(&[2, 2, 2], &[74, 132, 181, 25, 150, 56, 65, 141])]);
    }

    #[test]
    fn the_opset_says_what_an_axis_means() {
        let (x, one) = (tensor::<u8>(&[2], &[1, 2]), f32s(&[], &[1.0]));
        case("com.microsoft.QLinearSoftmax", 1)
            .input(x)
            .input(one.clone())
            .omitted()
            .input(one)
            .fails("'opset' is missing");
    }
}
