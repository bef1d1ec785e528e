//! Joining quantized tensors, each of its own scale, along an axis.

use super::{
    Concat, EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling,
    concat::concatenate,
    qlinear::{DOMAIN, Quantized, Target, quantized_fact, target_dtype},
};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// Inputs: the scale and zero point of `Y`, then for each part the tensor, its scale and its zero point. Parts are dequantized to f32,
/// quantized as `Y`, and put one after the other along `axis`.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearConcat {
    pub axis: i64,
}

impl Operator for QLinearConcat {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(5..=usize::MAX)?;
        if !(node.inputs.len() - 2).is_multiple_of(3) {
            let message = format!("has {} inputs, two and three for each part expected", node.inputs.len());
            return Err(node.corrupt(message));
        }
        let axis = node.optional_int("axis")?.ok_or_else(|| node.corrupt("attribute 'axis' is missing"))?;
        Ok(QLinearConcat { axis }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("QLinearConcat").in_domain(DOMAIN).with("axis", self.axis)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        target_dtype(inputs, 0, 2)?;
        let parts = (2..inputs.len()).step_by(3);
        parts.clone().try_for_each(|at| quantized_fact(inputs, at).map(drop))?;
        let parts: Vec<Option<&Fact>> = parts.map(|at| inputs.get(at)).collect();
        Concat { axis: self.axis }.infer(Facts(&parts), context)
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let target = Target::read(inputs, 0, inputs.tensor(2)?.dtype())?;
        let part = |at: usize| {
            let x = Quantized::read(inputs, at)?;
            let values = x.floats().map(|x| target.quantize(x)).collect();
            target.tensor(values, x.tensor.shape().clone())
        };
        let parts = (2..inputs.len()).step_by(3).map(part).collect::<Result<Vec<_>, _>>()?;
        Ok(vec![concatenate(&parts.iter().collect::<Vec<_>>(), self.axis, context)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.QLinearConcat", 1)
            .with("axis", 1)
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[10]))
            .input(tensor::<u8>(&[2, 2], &[146, 65, 82, 184]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[10]))
            .input(tensor::<u8>(&[2, 1], &[152, 129]))
            .input(f32s(&[], &[0.02]))
            .input(tensor::<u8>(&[], &[128]))
            .gives([tensor::<u8>(&[2, 3], &[146, 65, 20, 82, 184, 10])]);
        case("com.microsoft.QLinearConcat", 1)
            .with("axis", -1)
            .input(f32s(&[], &[1.0]))
            .input(tensor::<i8>(&[], &[1]))
            .input(tensor::<i8>(&[3], &[-42, 66, -28]))
            .input(f32s(&[], &[0.5]))
            .input(tensor::<i8>(&[], &[0]))
            .input(tensor::<i8>(&[2], &[-44, 99]))
            .input(f32s(&[], &[0.25]))
            .input(tensor::<i8>(&[], &[-7]))
            .input(tensor::<i8>(&[1], &[-61]))
            .input(f32s(&[], &[2.0]))
            .input(tensor::<i8>(&[], &[3]))
            .gives([tensor::<i8>(&[6], &[-20, 34, -13, -8, 27, -127])]);
    }

    #[test]
    fn parts_come_with_their_scales() {
        let (x, scale, zero_point) = (tensor::<u8>(&[1], &[1]), f32s(&[], &[1.0]), tensor::<u8>(&[], &[0]));
        let concat =
            case("com.microsoft.QLinearConcat", 1).with("axis", 0).input(scale.clone()).input(zero_point.clone());
        concat.input(x.clone()).input(scale).input(zero_point).input(x).fails("three for each part");
    }
}
