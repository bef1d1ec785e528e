//! Convolution of 8-bit integers.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, Window,
    conv::{Geometry, infer_shape},
    quantize_linear::factors,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// `Y = (X − x_zero_point) ∗ (W − w_zero_point)` in i32; inputs `X`, `W` and the optional zero points: scalars, or for `W` one per
/// output channel. Padding holds the zero point.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvInteger {
    pub window: Window,
    pub group: usize,
}

impl Operator for ConvInteger {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=4)?;
        Ok(ConvInteger { window: Window::read(node)?, group: node.count("group", 1)? }.into())
    }

    fn export(&self) -> Spelling {
        self.window.spell(Spelling::new("ConvInteger")).with("group", self.group as i64)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        inputs.same_dtype(0, 2)?;
        inputs.same_dtype(1, 3)?;
        let shape = infer_shape(&self.window, self.group, inputs.tensor(0)?, inputs.tensor(1)?, None)?;
        Ok(vec![TensorFact { dtype: DType::I32, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, w) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let geometry = Geometry::new(&self.window, self.group, x.shape(), w.shape())?;
        let mut y = vec![0i64; geometry.output_len(context)?];
        let x = less_zero_point(x, inputs.optional_tensor(2)?, false)?;
        let w = less_zero_point(w, inputs.optional_tensor(3)?, true)?;
        geometry.convolve(&x, &w, &mut y);
        let y = y.into_iter().map(i128::from).collect();
        Ok(vec![Wide::Int(y).narrow(DType::I32, geometry.output)?.into()])
    }
}

/// The integers less their zero point: one, or, where it may be `per_channel`, one for each index of the first axis.
pub(super) fn less_zero_point(
    tensor: &Tensor,
    zero_point: Option<&Tensor>,
    per_channel: bool,
) -> Result<Vec<i64>, OpError> {
    let values = factors(tensor)?;
    let points = zero_point.map(factors).transpose()?.unwrap_or_else(|| vec![0]);
    if points.len() != 1 && !(per_channel && points.len() == tensor.shape()[0]) {
        return Err(OpError::input(format!("{} zero points don't fit {}", points.len(), tensor.shape())));
    }
    // Of nothing there may be no zero points.
    let run = (values.len() / points.len().max(1)).max(1);
    let values = values.into_iter().enumerate();
    Ok(values.map(|(i, x)| x - points[(i / run).min(points.len() - 1)]).collect())
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, tensor};

    #[test]
    fn no_output_channels_have_no_zero_points() {
        case("ConvInteger", 10)
            .input(tensor::<u8>(&[1, 1, 4], &[1, 2, 3, 4]))
            .input(tensor::<i8>(&[0, 1, 2], &[]))
            .omitted()
            .input(tensor::<i8>(&[0], &[]))
            .gives([tensor::<i32>(&[1, 0, 3], &[])]);
    }

    #[test]
    fn agrees_with_onnx_runtime() {
        case("ConvInteger", 10)
            .with("pads", vec![1i64, 0])
            .with("strides", vec![2i64])
            .input(tensor::<u8>(&[1, 1, 4], &[1, 2, 3, 250]))
            .input(tensor::<u8>(&[1, 1, 2], &[1, 2]))
            .input(tensor::<u8>(&[], &[2]))
            .input(tensor::<u8>(&[], &[1]))
            .gives([tensor::<i32>(&[1, 1, 2], &[-1, 1])]);
    }
}
