//! The p-norm under a sliding window.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, Window,
    max_pool::{Geometry, infer_shape, read},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `Y = (Σ |x|^p)^(1/p)` over each window; `X [n, c, …]` to `Y [n, c, …]`.
#[derive(Clone, Debug, PartialEq)]
pub struct LpPool {
    pub window: Window,
    pub p: usize,
}

impl Operator for LpPool {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        Ok(LpPool { window: read(node)?, p: read_p(node)? }.into())
    }

    fn export(&self) -> Spelling {
        self.window.spell(Spelling::new("LpPool")).with("p", self.p as i64)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        Ok(vec![TensorFact { dtype: x.dtype, shape: infer_shape(&self.window, x)?, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let geometry = Geometry::new(&self.window, x.shape())?;
        context.bounded_len(&geometry.output)?;
        let p = self.p as f64;
        let mut y = geometry.sums(&Wide::floats(x)?, |x| x.abs().powf(p));
        y.iter_mut().for_each(|y| *y = y.powf(1.0 / p));
        Ok(vec![Wide::Float(y).narrow(x.dtype(), geometry.output)?.into()])
    }
}

/// Attribute `p`, a float in opset 1.
pub(super) fn read_p(node: &mut NodeReader) -> Result<usize, ImportError> {
    if node.opset >= 2 {
        return node.count("p", 2);
    }
    match node.float("p", 2.0)? {
        p if p.fract() == 0.0 && (1.0..=1e6).contains(&p) => Ok(p as usize),
        p => Err(node.unsupported(format!("p = {p}, no whole number"))),
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("LpPool", 18)
            .with("kernel_shape", vec![2i64, 2])
            .with("p", 1)
            .wave(&[1, 1, 3, 3])
            .gives([f32s(&[1, 1, 2, 2], &[3.25, 2.0, 2.5, 2.0])]);
        case("LpPool", 18)
            .with("kernel_shape", vec![3i64])
            .with("strides", vec![2i64])
            .with("pads", vec![1i64, 1])
            .wave(&[1, 1, 5])
            .gives([f32s(&[1, 1, 3], &[1.34629, 1.43614, 1.27475])]);
    }

    #[test]
    fn p_as_a_float() {
        let old = |p: f32| {
            case("LpPool", 1).with("kernel_shape", vec![2i64]).with("p", p).input(f32s(&[1, 1, 2], &[1., -2.]))
        };
        old(1.0).gives([f32s(&[1, 1, 1], &[3.0])]);
        old(1.5).fails("no whole number");
        case("GlobalLpPool", 1).with("p", 1.0f32).input(f32s(&[1, 1, 2], &[1., -2.])).gives([f32s(&[1, 1, 1], &[3.0])]);
    }
}
