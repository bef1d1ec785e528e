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
