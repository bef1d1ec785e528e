//! The mean over all spatial axes, from quantized values to quantized values.

use super::{
    EvalContext, Facts, GlobalPool, GlobalPoolFunction, InferContext, Inputs, NodeReader, Op, Operator, Spelling,
    qlinear::{
        DOMAIN, Quantized, Target, channels_first, channels_last, fact, move_channels, quantized_fact,
        read_channels_last, target_dtype,
    },
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Shape, Value};

/// `Y = saturate(round(mean(X − x_zero_point) · x_scale / y_scale) + y_zero_point)`, to nearest even; inputs `X`, its scale and zero
/// point, the scale and zero point of `Y`.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearGlobalAveragePool {
    /// `[n, …, c]` instead of `[n, c, …]`.
    pub channels_last: bool,
}

impl Operator for QLinearGlobalAveragePool {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(5..=5)?;
        Ok(QLinearGlobalAveragePool { channels_last: read_channels_last(node)? }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("QLinearGlobalAveragePool").in_domain(DOMAIN);
        spelling.with("channels_last", i64::from(self.channels_last))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = quantized_fact(inputs, 0)?;
        let dtype = target_dtype(inputs, 3, 0)?;
        let shape = match self.channels_last {
            true => x.shape.as_ref().map(|dims| channels_first(dims)),
            false => x.shape.clone(),
        };
        let first: Fact = TensorFact { dtype, shape, value: None }.into();
        let pool = GlobalPool { function: GlobalPoolFunction::Average };
        let y = pool.infer(Facts(&[Some(&first)]), context)?;
        let shape = Facts(&[y.first()]).tensor(0)?.shape.clone();
        Ok(fact(dtype, if self.channels_last { shape.map(|dims| channels_last(&dims)) } else { shape }))
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = Quantized::read(inputs, 0)?;
        let target = Target::read(inputs, 3, x.tensor.dtype())?;
        let (dims, values) = match self.channels_last {
            false => (x.tensor.shape().to_vec(), x.values),
            true => {
                let moved = move_channels(
                    &super::Wide::Int(x.values.into_iter().map(i128::from).collect())
                        .narrow(DType::I32, x.tensor.shape().clone())?,
                    false,
                )?;
                (moved.shape().to_vec(), moved.to_vec::<i32>()?.into_iter().map(i64::from).collect())
            }
        };
        let [n, c, spatial @ ..] = &dims[..] else {
            return Err(OpError::input(format!("expected [n, c, …], got {}", x.tensor.shape())));
        };
        let output: Vec<usize> = [*n, *c].into_iter().chain(spatial.iter().map(|_| 1)).collect();
        let planes = context.bounded_len(&output)?;
        let plane: usize = spatial.iter().product();
        let factor = x.scale as f32 / (plane as f32 * target.scale as f32);
        let y = (0..planes).map(|index| {
            let sum: i64 = values[index * plane..][..plane].iter().sum();
            target.requantize(sum, factor)
        });
        let shape: Shape = if self.channels_last { channels_last(&output) } else { output.clone() }.into();
        // One element per channel: moving the axis moves no element.
        Ok(vec![target.tensor(y.collect(), shape)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.QLinearGlobalAveragePool", 1)
            .with("channels_last", 0)
            .input(tensor::<u8>(
                &[2, 2, 3, 2],
                &[
                    127, 107, 135, 58, 201, 19, 106, 72, 188, 191, 182, 236, 238, 47, 29, 33, 186, 248, 237, 171, 247,
                    223, 3, 30,
                ],
            ))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[10]))
            .input(f32s(&[], &[0.03]))
            .input(tensor::<u8>(&[], &[9]))
            .gives([tensor::<u8>(&[2, 2, 1, 1], &[172, 255, 209, 245])]);
        case("com.microsoft.QLinearGlobalAveragePool", 1)
            .with("channels_last", 1)
            .input(tensor::<i8>(&[1, 3, 2, 2], &[93, -107, 123, 83, 117, -36, -90, 4, 120, -34, 99, -30]))
            .input(f32s(&[], &[0.5]))
            .input(tensor::<i8>(&[], &[1]))
            .input(f32s(&[], &[0.5]))
            .input(tensor::<i8>(&[], &[-9]))
            .gives([tensor::<i8>(&[1, 1, 1, 2], &[67, -30])]);
    }
}
