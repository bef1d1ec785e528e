//! Sum and product from quantized values to quantized values.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, broadcast_dims, broadcast_index,
    broadcast_shape,
    qlinear::{DOMAIN, Quantized, Target, fact, quantized_fact, target_dtype},
};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// `C = saturate(round((A' ∘ B') / C_scale + C_zero_point))`, to nearest even, where `A' = A_scale · (A − A_zero_point)`, `B'` likewise,
/// and `∘` is the function. Inputs `A`, `A_scale`, `A_zero_point`, the same of `B`, `C_scale` and `C_zero_point`; `A` and `B`
/// broadcast, and zero points may be omitted. Results often lie midway between two steps, and which one they become, f32 decides:
/// both are computed in it, in ONNX Runtime's order.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearBinary {
    pub function: QLinearBinaryFunction,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QLinearBinaryFunction {
    Add,
    Mul,
}

impl Operator for QLinearBinary {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(7..=8)?;
        let function = match node.op_type.as_str() {
            "QLinearAdd" => QLinearBinaryFunction::Add,
            _ => QLinearBinaryFunction::Mul,
        };
        Ok(QLinearBinary { function }.into())
    }

    fn export(&self) -> Spelling {
        let name = match self.function {
            QLinearBinaryFunction::Add => "QLinearAdd",
            QLinearBinaryFunction::Mul => "QLinearMul",
        };
        Spelling::new(name).in_domain(DOMAIN)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (a, b) = (quantized_fact(inputs, 0)?, quantized_fact(inputs, 3)?);
        inputs.same_dtype(0, 3)?;
        Ok(fact(target_dtype(inputs, 6, 0)?, broadcast_dims(&[a, b])?))
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (a, b) = (Quantized::read(inputs, 0)?, Quantized::read(inputs, 3)?);
        let target = Target::read(inputs, 6, a.tensor.dtype())?;
        let shape = broadcast_shape(&[a.tensor.shape(), b.tensor.shape()])?;
        context.bounded_len(&shape)?;
        let sources = broadcast_index(a.tensor.shape(), &shape).zip(broadcast_index(b.tensor.shape(), &shape));
        let (of_a, of_b) = (a.scale as f32 / target.scale as f32, b.scale as f32 / target.scale as f32);
        let zero_point = target.zero_point as f32;
        let offset = zero_point - (of_a * a.zero_point as f32 + of_b * b.zero_point as f32);
        let factor = a.scale as f32 * b.scale as f32 / target.scale as f32;
        let c = sources.map(|(i, j)| {
            let (x, y) = (a.values[i], b.values[j]);
            target.round(match self.function {
                QLinearBinaryFunction::Add => {
                    let y = ((y + b.zero_point) as f32).mul_add(of_b, offset);
                    ((x + a.zero_point) as f32).mul_add(of_a, y)
                }
                QLinearBinaryFunction::Mul => (x * y) as f32 * factor + zero_point,
            })
        });
        Ok(vec![target.tensor(c.collect(), shape.clone())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.QLinearAdd", 1)
            .input(tensor::<u8>(&[2, 3], &[217, 163, 130, 69, 78, 10]))
            .input(f32s(&[], &[0.02]))
            .input(tensor::<u8>(&[], &[120]))
            .input(tensor::<u8>(&[3], &[19, 4, 44]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[7]))
            .input(f32s(&[], &[0.04]))
            .input(tensor::<u8>(&[], &[99]))
            .gives([tensor::<u8>(&[2, 3], &[162, 117, 150, 88, 74, 90])]);
        case("com.microsoft.QLinearAdd", 1)
            .input(tensor::<i8>(&[2, 1], &[80, 38]))
            .input(f32s(&[], &[0.25]))
            .input(tensor::<i8>(&[], &[-3]))
            .input(tensor::<i8>(&[1, 3], &[105, 0, 27]))
            .input(f32s(&[], &[0.5]))
            .input(tensor::<i8>(&[], &[5]))
            .input(f32s(&[], &[0.5]))
            .input(tensor::<i8>(&[], &[1]))
            .gives([tensor::<i8>(&[2, 3], &[127, 38, 64, 122, 16, 44])]);
        case("com.microsoft.QLinearMul", 1)
            .input(tensor::<u8>(&[2, 3], &[248, 186, 161, 139, 143, 239]))
            .input(f32s(&[], &[0.02]))
            .input(tensor::<u8>(&[], &[120]))
            .input(tensor::<u8>(&[2, 3], &[71, 208, 171, 0, 100, 219]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[7]))
            .input(f32s(&[], &[0.04]))
            .input(tensor::<u8>(&[], &[99]))
            .gives([tensor::<u8>(&[2, 3], &[255, 255, 255, 96, 152, 255])]);
        case("com.microsoft.QLinearMul", 1)
            .input(tensor::<i8>(&[4], &[1, 3, -1, -3]))
            .input(f32s(&[], &[0.5]))
            .input(tensor::<i8>(&[], &[0]))
            .input(tensor::<i8>(&[1], &[1]))
            .input(f32s(&[], &[1.0]))
            .input(tensor::<i8>(&[], &[0]))
            .input(f32s(&[], &[1.0]))
            .input(tensor::<i8>(&[], &[1]))
            .gives([tensor::<i8>(&[4], &[2, 2, 0, 0])]);
    }

    #[test]
    fn a_tensor_has_one_scale() {
        let (x, zero_point) = (tensor::<u8>(&[2], &[1, 2]), tensor::<u8>(&[], &[0]));
        let add = case("com.microsoft.QLinearAdd", 1)
            .input(x.clone())
            .input(f32s(&[2], &[0.5, 0.25]))
            .input(zero_point.clone());
        let add = add.input(x).input(f32s(&[], &[0.5])).input(zero_point.clone());
        add.input(f32s(&[], &[0.5])).input(zero_point).fails("expected one scale");
    }
}
