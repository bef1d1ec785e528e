//! The same bits under another type.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, cast::named_type};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// The elements' bits as elements of `to`, a type of as many bits. Booleans are bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct BitCast {
    pub to: DType,
}

impl Operator for BitCast {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        Ok(BitCast { to: named_type(node, "to")? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("BitCast").since(26).with("to", i64::from(self.to.onnx_code()))
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        if x.dtype.bits() != self.to.bits() || self.to == DType::String {
            return Err(OpError::input(format!(
                "the bits of {} as {}: they are of different widths",
                x.dtype, self.to
            )));
        }
        Ok(vec![TensorFact { dtype: self.to, shape: x.shape.clone(), value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        Ok(vec![inputs.tensor(0)?.bitcast(self.to)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn bits_stay() {
        case("BitCast", 26)
            .with("to", 12)
            .input(f32s(&[2], &[1.0, -0.0]))
            .gives([tensor::<u32>(&[2], &[0x3f80_0000, 0x8000_0000])]);
        case("BitCast", 26).with("to", 7).input(f32s(&[1], &[1.0])).fails("different widths");
    }
}
