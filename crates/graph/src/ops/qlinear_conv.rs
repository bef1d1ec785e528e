//! Convolution from quantized values to quantized values.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, Window,
    conv::{Geometry, infer_shape},
    conv_integer::less_zero_point,
    qlinear::Target,
    quantize_linear::integers,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// Inputs `x`, its scale and zero point, `w`, its scale and zero point (one, or one per output channel), the scale and zero point
/// of `y`, and an optional i32 bias whose scale is that of `x` times that of `w` and whose zero point is 0.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearConv {
    pub window: Window,
    pub group: usize,
}

impl Operator for QLinearConv {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(8..=9)?;
        Ok(QLinearConv { window: Window::read(node)?, group: node.count("group", 1)? }.into())
    }

    fn export(&self) -> Spelling {
        self.window.spell(Spelling::new("QLinearConv")).with("group", self.group as i64)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        inputs.same_dtype(0, 2)?;
        inputs.same_dtype(3, 5)?;
        let (x, w, bias) = (inputs.tensor(0)?, inputs.tensor(3)?, inputs.optional_tensor(8)?);
        let shape = infer_shape(&self.window, self.group, x, w, bias)?;
        Ok(vec![TensorFact { dtype: inputs.tensor(7)?.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, w, y_zero_point) = (inputs.tensor(0)?, inputs.tensor(3)?, inputs.tensor(7)?);
        let geometry = Geometry::new(&self.window, self.group, x.shape(), w.shape())?;
        let mut sums = vec![0i64; geometry.output_len(context)?];
        if let Some(bias) = inputs.optional_tensor(8)? {
            let bias: Vec<i64> = integers(bias)?.into_iter().map(|b| b as i64).collect();
            geometry.add_bias(&bias, &mut sums)?;
        }
        let x = less_zero_point(x, Some(inputs.tensor(2)?), false)?;
        geometry.convolve(&x, &less_zero_point(w, Some(inputs.tensor(5)?), true)?, &mut sums);
        let channels = geometry.output[1];
        let scale = |index: usize, counts: &[usize]| {
            let scales = Wide::floats(inputs.tensor(index)?)?;
            match counts.contains(&scales.len()) {
                true => Ok(scales),
                false => Err(OpError::input(format!("input {index} has {} scales, expected {counts:?}", scales.len()))),
            }
        };
        let (x_scale, w_scale) = (scale(1, &[1])?[0], scale(4, &[1, channels])?);
        let target = Target::read(inputs, 6, y_zero_point.dtype())?;
        let plane = geometry.plane_len().max(1);
        let y = sums.into_iter().enumerate().map(|(i, sum)| {
            let w_scale = w_scale[if w_scale.len() == 1 { 0 } else { i / plane % channels }];
            target.requantize(sum, x_scale as f32 * w_scale as f32 / target.scale as f32)
        });
        Ok(vec![target.tensor(y.collect(), geometry.output)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("QLinearConv", 10)
            .with("pads", vec![1i64, 1])
            .input(tensor::<u8>(&[1, 1, 4], &[1, 2, 3, 250]))
            .input(f32s(&[], &[0.5]))
            .input(tensor::<u8>(&[], &[2]))
            .input(tensor::<i8>(&[2, 1, 3], &[1, 2, 3, -1, 4, -6]))
            .input(f32s(&[2], &[0.25, 0.5]))
            .input(tensor::<i8>(&[2], &[0, 0]))
            .input(f32s(&[], &[2.0]))
            .input(tensor::<u8>(&[], &[100]))
            .input(tensor::<i32>(&[2], &[10, -20]))
            .gives([tensor::<u8>(&[1, 2, 4], &[100, 101, 147, 132, 97, 97, 0, 221])]);
    }
}
