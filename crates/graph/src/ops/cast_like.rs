//! Conversion to the element type of another tensor.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling,
    cast::{Cast, Conversion, convert},
};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// `x` as elements of the type of the second input, whose elements don't matter.
#[derive(Clone, Debug, PartialEq)]
pub struct CastLike {
    pub conversion: Conversion,
}

impl Operator for CastLike {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        Ok(CastLike { conversion: Conversion::read(node)? }.into())
    }

    fn export(&self) -> Spelling {
        self.conversion.spell(Spelling::new("CastLike"))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let to = inputs.tensor(1)?.dtype;
        Cast { to, conversion: self.conversion }.infer(Facts(&[inputs.get(0)]), context)
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        Ok(vec![convert(inputs.tensor(0)?, inputs.tensor(1)?.dtype(), self.conversion)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn the_second_input_says_the_type() {
        case("CastLike", 19).input(f32s(&[3], &[1.5, -2.5, 300.0])).input(tensor::<i64>(&[0], &[])).gives([tensor::<
            i64,
        >(
            &[3],
            &[1, -2, 300],
        )]);
    }
}
