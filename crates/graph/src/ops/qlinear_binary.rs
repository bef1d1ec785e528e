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
/// broadcast, and zero points may be omitted. ONNX Runtime computes in f32, which is off by a step for some of a million values.
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
        let c = sources.map(|(i, j)| {
            let (x, y) = (a.values[i] as f64, b.values[j] as f64);
            target.round_moved(match self.function {
                QLinearBinaryFunction::Add => (a.scale * x + b.scale * y) / target.scale,
                QLinearBinaryFunction::Mul => a.scale * b.scale * (x * y) / target.scale,
            })
        });
        Ok(vec![target.tensor(c.collect(), shape.clone())?.into()])
    }
}
