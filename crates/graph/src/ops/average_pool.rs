//! The mean under a sliding window.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, Window,
    max_pool::{Geometry, infer_shape, read},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `X [n, c, …]` to `Y [n, c, …]`. What a window of `ceil_mode` covers beyond the padding is not counted in either mode.
#[derive(Clone, Debug, PartialEq)]
pub struct AveragePool {
    pub window: Window,
    /// Whether padding counts as zeros; otherwise only elements of the input count.
    pub count_include_pad: bool,
}

impl Operator for AveragePool {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let window = read(node)?;
        Ok(AveragePool { window, count_include_pad: node.flag("count_include_pad", false)? }.into())
    }

    fn export(&self) -> Spelling {
        self.window.spell(Spelling::new("AveragePool")).with("count_include_pad", i64::from(self.count_include_pad))
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        Ok(vec![TensorFact { dtype: x.dtype, shape: infer_shape(&self.window, x)?, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let geometry = Geometry::new(&self.window, x.shape())?;
        context.bounded_len(&geometry.output)?;
        let mut y = geometry.sums(&Wide::floats(x)?, |x| x);
        let plane = geometry.output_plane();
        if plane > 0 {
            let counts = self.counts(&geometry);
            y.iter_mut().zip(counts.iter().cycle()).for_each(|(y, count)| *y /= count);
        }
        Ok(vec![Wide::Float(y).narrow(x.dtype(), geometry.output)?.into()])
    }
}

impl AveragePool {
    /// What each sum of one plane is divided by; a window with nothing to count gives 0, not 0/0.
    pub(super) fn counts(&self, geometry: &Geometry) -> Vec<f64> {
        let [z, y, x] = geometry.axes.map(|axis| {
            let mut counts = vec![0usize; axis.output];
            if self.count_include_pad {
                counts.iter_mut().enumerate().for_each(|(o, count)| *count = axis.taps_in_padded_input(o));
            } else {
                for tap in 0..axis.kernel {
                    axis.outputs_at(tap).for_each(|o| counts[o] += 1);
                }
            }
            counts
        });
        let rows = z.iter().flat_map(|z| y.iter().map(move |y| z * y));
        rows.flat_map(|row| x.iter().map(move |x| (row * x).max(1) as f64)).collect()
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("AveragePool", 11)
            .with("kernel_shape", vec![2i64, 2])
            .with("pads", vec![1i64, 0, 1, 0])
            .wave(&[1, 1, 3, 3])
            .gives([f32s(&[1, 1, 4, 2], &[-0.375, 0.0, 0.1875, -0.125, 0.625, -0.375, 0.5, -0.5])]);
        case("AveragePool", 11)
            .with("kernel_shape", vec![2i64, 2])
            .with("pads", vec![1i64, 0, 1, 0])
            .with("count_include_pad", 1)
            .wave(&[1, 1, 3, 3])
            .gives([f32s(&[1, 1, 4, 2], &[-0.1875, 0.0, 0.1875, -0.125, 0.625, -0.375, 0.25, -0.25])]);
        case("AveragePool", 19)
            .with("kernel_shape", vec![2i64])
            .with("strides", vec![2i64])
            .with("ceil_mode", 1)
            .with("count_include_pad", 1)
            .with("pads", vec![1i64, 1])
            .wave(&[1, 1, 4])
            .gives([f32s(&[1, 1, 3], &[-0.625, 0.0, 0.625])]);
        case("AveragePool", 19)
            .with("kernel_shape", vec![2i64])
            .with("dilations", vec![2i64])
            .wave(&[1, 2, 4])
            .gives([f32s(&[1, 2, 2], &[-0.875, 0.875, 0.625, -0.375])]);
    }
}
