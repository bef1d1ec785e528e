//! The mean under a sliding window, from quantized values to quantized values.

use super::{
    AveragePool, EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling,
    max_pool::{Geometry, infer_shape, read},
    qlinear::{
        DOMAIN, Quantized, Target, channels_first, channels_last, fact, move_channels, quantized_fact,
        read_channels_last, target_dtype,
    },
    window::for_each_tap,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `Y = saturate(round(mean / y_scale + y_zero_point))`, to nearest even, where the mean is that of the dequantized elements. Inputs `X`,
/// its scale and zero point, the scale and zero point of `Y`. Where both scales are one, a mean often lies midway between two
/// steps; which one it becomes, f32 decides: elements are added in it, in the window's order, and divided in it.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearAveragePool {
    pub pool: AveragePool,
    /// `[n, …, c]` instead of `[n, c, …]`.
    pub channels_last: bool,
}

impl Operator for QLinearAveragePool {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(4..=5)?;
        let window = read(node)?;
        let pool = AveragePool { window, count_include_pad: node.flag("count_include_pad", false)? };
        Ok(QLinearAveragePool { pool, channels_last: read_channels_last(node)? }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = self.pool.window.spell(Spelling::new("QLinearAveragePool").in_domain(DOMAIN));
        spelling
            .with("count_include_pad", i64::from(self.pool.count_include_pad))
            .with("channels_last", i64::from(self.channels_last))
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = quantized_fact(inputs, 0)?;
        let dtype = target_dtype(inputs, 3, 0)?;
        if !self.channels_last {
            return Ok(fact(dtype, infer_shape(&self.pool.window, x)?));
        }
        let first = x.shape.as_ref().map(|dims| channels_first(dims));
        let first = TensorFact { dtype, shape: first, value: None };
        Ok(fact(dtype, infer_shape(&self.pool.window, &first)?.map(|dims| channels_last(&dims))))
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = Quantized::read(inputs, 0)?;
        let target = Target::read(inputs, 3, x.tensor.dtype())?;
        let mut floats = x.dequantize()?;
        if self.channels_last {
            floats = move_channels(&floats, false)?;
        }
        let geometry = Geometry::new(&self.pool.window, floats.shape())?;
        let mut y = vec![0f32; context.bounded_len(&geometry.output)?];
        let (from, to) = (geometry.input_plane(), geometry.output_plane());
        if !y.is_empty() && from > 0 {
            for (y, x) in y.chunks_exact_mut(to).zip(floats.to_vec::<f32>()?.chunks_exact(from)) {
                for_each_tap(&geometry.axes, |o, i| y[o] += x[i]);
            }
        }
        let counts = self.pool.counts(&geometry);
        let steps = y.iter().zip(counts.iter().cycle()).map(|(&y, &count)| {
            let steps = y / count as f32 / target.scale as f32;
            target.round(steps + target.zero_point as f32)
        });
        let y = target.tensor(steps.collect(), geometry.output)?;
        Ok(vec![if self.channels_last { move_channels(&y, true)? } else { y }.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.QLinearAveragePool", 1)
            .with("kernel_shape", vec![2i64, 2])
            .input(tensor::<u8>(
                &[1, 2, 3, 3],
                &[61, 202, 224, 20, 14, 171, 86, 146, 38, 220, 115, 229, 203, 180, 59, 196, 13, 145],
            ))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[10]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[9]))
            .gives([tensor::<u8>(&[1, 2, 2, 2], &[73, 152, 66, 91, 178, 145, 147, 98])]);
        case("com.microsoft.QLinearAveragePool", 1)
            .with("kernel_shape", vec![3i64, 3])
            .with("pads", vec![1i64, 1, 1, 1])
            .with("strides", vec![2i64, 2])
            .input(tensor::<i8>(&[1, 1, 3, 4], &[-25, 127, -78, 114, -105, 31, 20, 102, -52, 102, 44, 99]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<i8>(&[], &[1]))
            .input(f32s(&[], &[0.03]))
            .input(tensor::<i8>(&[], &[-9]))
            .gives([tensor::<i8>(&[1, 1, 2, 2], &[1, 77, -21, 100])]);
        case("com.microsoft.QLinearAveragePool", 1)
            .with("kernel_shape", vec![3i64, 2])
            .with("pads", vec![1i64, 1, 1, 1])
            .with("count_include_pad", 1)
            .input(tensor::<u8>(&[1, 1, 3, 4], &[51, 194, 241, 12, 93, 162, 27, 130, 161, 195, 237, 104]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[20]))
            .input(f32s(&[], &[0.03]))
            .input(tensor::<u8>(&[], &[19]))
            .gives([tensor::<u8>(
                &[1, 1, 3, 5],
                &[48, 136, 170, 111, 47, 87, 223, 255, 194, 71, 78, 166, 169, 135, 73],
            )]);
        case("com.microsoft.QLinearAveragePool", 1)
            .with("kernel_shape", vec![2i64, 2])
            .with("channels_last", 1)
            .input(tensor::<u8>(
                &[1, 3, 3, 2],
                &[112, 121, 244, 50, 127, 12, 108, 242, 158, 89, 254, 154, 242, 4, 117, 213, 193, 104],
            ))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[10]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[9]))
            .gives([tensor::<u8>(&[1, 2, 2, 2], &[154, 125, 195, 75, 155, 136, 180, 139])]);
    }
}
