//! A general matrix product with a function that products of other kinds are not fused with.

use super::{
    EvalContext, Facts, Gemm, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Unary, UnaryFunction,
    activation::spell_function, qlinear::DOMAIN,
};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// `Y = f(Gemm(A, B, C))`: com.microsoft's `FusedGemm`, where [`Gemm`]'s own activations have none for its function.
#[derive(Clone, Debug, PartialEq)]
pub struct FusedGemm {
    pub gemm: Gemm,
    pub function: UnaryFunction,
}

impl Operator for FusedGemm {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        Gemm::import(node)
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling { op_type: "FusedGemm", ..self.gemm.export() };
        spell_function(spelling.in_domain(DOMAIN), self.function)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        self.gemm.infer(inputs, context)
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let product = self.gemm.eval(inputs, context)?;
        Unary { function: self.function }.eval(Inputs(&[product.first()]), context)
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        let fused = |activation: &str| {
            case("com.microsoft.FusedGemm", 1)
                .with("activation", activation)
                .input(f32s(&[1, 3], &[1.0, -2.0, 0.5]))
                .input(f32s(&[3, 2], &[0.5, 1.0, 0.25, 1.0, 1.0, -1.0]))
        };
        fused("Relu").gives([f32s(&[1, 2], &[0.5, 0.0])]);
        fused("Tanh").gives([f32s(&[1, 2], &[0.462117, -0.905148])]);
        fused("").gives([f32s(&[1, 2], &[0.5, -1.5])]);
        fused("LeakyRelu").with("activation_alpha", 0.2f32).gives([f32s(&[1, 2], &[0.5, -0.3])]);
        fused("HardSigmoid")
            .with("activation_alpha", 0.3f32)
            .with("activation_beta", 0.4f32)
            .gives([f32s(&[1, 2], &[0.55, 0.0])]);
        fused("Elu").with("activation_alpha", 0.7f32).gives([f32s(&[1, 2], &[0.5, -0.543809])]);
        fused("Celu").with("activation_alpha", 0.7f32).gives([f32s(&[1, 2], &[0.5, -0.617877])]);
        fused("ThresholdedRelu").with("activation_alpha", 0.3f32).gives([f32s(&[1, 2], &[0.5, 0.0])]);
        fused("Softplus").gives([f32s(&[1, 2], &[0.974077, 0.201413])]);
        fused("Softsign").gives([f32s(&[1, 2], &[0.333333, -0.6])]);
        fused("Selu")
            .with("activation_alpha", 1.5f32)
            .with("activation_gamma", 1.1f32)
            .gives([f32s(&[1, 2], &[0.55, -1.281835])]);
        fused("Affine").fails("activation 'Affine'");
    }
}
