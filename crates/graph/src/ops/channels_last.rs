//! Operators whose images have their channels last.

use super::{
    Conv, EvalContext, Facts, InferContext, Inputs, MaxPool, NodeReader, Op, Operator, QLinearConv, Spelling,
    activation::Activation,
    qlinear::{DOMAIN, channels_first, channels_last, move_channels, read_channels_last},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// [`Conv`], [`MaxPool`] or [`QLinearConv`] over `[n, …, c]` instead of `[n, c, …]`, in and out; weights are as ever.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelsLast {
    pub of: ChannelsFirst,
}

#[derive(Clone, Debug, PartialEq)]
pub enum ChannelsFirst {
    Conv(Conv),
    MaxPool(MaxPool),
    QLinearConv(QLinearConv),
}

impl Operator for ChannelsLast {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let of = match node.op_type.as_str() {
            "NhwcMaxPool" => MaxPool::import(node)?,
            "QLinearConv" => match read_channels_last(node)? {
                true => QLinearConv::import(node)?,
                false => return QLinearConv::import(node),
            },
            _ => Conv::import(node)?,
        };
        let of = match of {
            Op::Conv(op) => ChannelsFirst::Conv(op),
            Op::MaxPool(op) => ChannelsFirst::MaxPool(op),
            Op::QLinearConv(op) => ChannelsFirst::QLinearConv(op),
            other => return Err(node.unsupported(format!("{} with channels last", other.name()))),
        };
        Ok(ChannelsLast { of }.into())
    }

    fn export(&self) -> Spelling {
        let plain = self.operator().spelling().unwrap_or_else(|| Spelling::new(""));
        let spelling = |op_type, attributes| Spelling { attributes, ..Spelling::new(op_type).in_domain(DOMAIN) };
        match &self.of {
            ChannelsFirst::Conv(op) => {
                let spelling = spelling("NhwcFusedConv", plain.attributes);
                match op.activation.and_then(Activation::parameters) {
                    None => spelling,
                    Some((name, parameters)) if parameters.is_empty() => spelling.with("activation", name),
                    Some((name, parameters)) => spelling.with("activation", name).with("activation_params", parameters),
                }
            }
            ChannelsFirst::MaxPool(_) => {
                let kept = plain.attributes.into_iter().filter(|(name, _)| *name != "storage_order");
                spelling("NhwcMaxPool", kept.collect())
            }
            ChannelsFirst::QLinearConv(_) => spelling("QLinearConv", plain.attributes).with("channels_last", 1),
        }
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let moved = |index: usize| {
            let fact = inputs.get(index)?.as_tensor()?;
            let shape = fact.shape.as_ref().map(|dims| channels_first(dims));
            Some(Fact::from(TensorFact { dtype: fact.dtype, shape, value: None }))
        };
        let images = self.images().iter().map(|&index| moved(index)).collect::<Vec<_>>();
        let mut facts: Vec<Option<&Fact>> = (0..inputs.len()).map(|index| inputs.get(index)).collect();
        for (&index, image) in self.images().iter().zip(&images) {
            facts.get_mut(index).into_iter().for_each(|fact| *fact = image.as_ref());
        }
        let results = self.operator().infer(Facts(&facts), context)?;
        let results = [results.first()];
        let y = Facts(&results).tensor(0)?;
        let shape = y.shape.as_ref().map(|dims| channels_last(dims));
        Ok(vec![TensorFact { dtype: y.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let moved = |index: usize| inputs.optional_tensor(index)?.map(|t| move_channels(t, false)).transpose();
        let images = self.images().iter().map(|&index| Ok(moved(index)?.map(Value::from)));
        let images = images.collect::<Result<Vec<_>, OpError>>()?;
        let mut values: Vec<Option<&Value>> = (0..inputs.len()).map(|index| inputs.get(index)).collect();
        for (&index, image) in self.images().iter().zip(&images) {
            values.get_mut(index).into_iter().for_each(|value| *value = image.as_ref());
        }
        let results = self.operator().eval(Inputs(&values), context)?;
        Ok(vec![move_channels(Inputs(&[results.first()]).tensor(0)?, true)?.into()])
    }
}

impl ChannelsLast {
    /// The same with channels first.
    pub fn operator(&self) -> Op {
        match self.of.clone() {
            ChannelsFirst::Conv(op) => op.into(),
            ChannelsFirst::MaxPool(op) => op.into(),
            ChannelsFirst::QLinearConv(op) => op.into(),
        }
    }

    /// The inputs that are images.
    pub fn images(&self) -> &'static [usize] {
        match self.of {
            ChannelsFirst::Conv(_) => &[0, 3],
            _ => &[0],
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.NhwcMaxPool", 1)
            .with("kernel_shape", vec![2i64, 2])
            .with("strides", vec![1i64, 2])
            .input(tensor::<u8>(
                &[1, 3, 4, 2],
                &[
                    229, 103, 109, 223, 214, 32, 3, 221, 183, 236, 102, 55, 127, 43, 50, 182, 237, 72, 51, 223, 143,
                    171, 152, 183,
                ],
            ))
            .gives([tensor::<u8>(&[1, 2, 2, 2], &[229, 236, 214, 221, 237, 236, 152, 183])]);
        case("com.microsoft.NhwcMaxPool", 1)
            .with("kernel_shape", vec![3i64, 3])
            .with("pads", vec![1i64, 1, 1, 1])
            .with("strides", vec![2i64, 2])
            .input(tensor::<i8>(&[1, 3, 3, 1], &[91, -106, -9, 82, 84, 87, 6, -64, 116]))
            .gives([tensor::<i8>(&[1, 2, 2, 1], &[91, 87, 84, 116])]);
        case("com.microsoft.QLinearConv", 1)
            .with("channels_last", 1)
            .with("kernel_shape", vec![2i64, 1])
            .with("pads", vec![0i64, 0, 1, 0])
            .input(tensor::<u8>(&[1, 3, 2, 2], &[239, 183, 111, 233, 78, 241, 186, 205, 184, 31, 26, 31]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[10]))
            .input(tensor::<u8>(&[3, 2, 2, 1], &[244, 157, 235, 69, 135, 98, 184, 44, 200, 195, 170, 218]))
            .input(f32s(&[], &[0.02]))
            .input(tensor::<u8>(&[], &[100]))
            .input(f32s(&[], &[0.5]))
            .input(tensor::<u8>(&[], &[90]))
            .input(tensor::<i32>(&[3], &[100, 0, -300]))
            .gives([tensor::<u8>(
                &[1, 3, 2, 3],
                &[196, 109, 227, 187, 112, 220, 191, 131, 173, 194, 133, 160, 146, 106, 127, 100, 95, 96],
            )]);
        case("com.microsoft.QLinearConv", 1)
            .with("group", 2)
            .with("kernel_shape", vec![2i64, 1])
            .input(tensor::<u8>(&[1, 2, 3, 2], &[255, 33, 212, 132, 214, 101, 17, 202, 37, 119, 182, 187]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[10]))
            .input(tensor::<u8>(&[2, 1, 2, 1], &[12, 144, 22, 250]))
            .input(f32s(&[], &[0.02]))
            .input(tensor::<u8>(&[], &[100]))
            .input(f32s(&[], &[0.5]))
            .input(tensor::<u8>(&[], &[90]))
            .gives([tensor::<u8>(&[1, 2, 2, 2], &[65, 97, 72, 77, 97, 93, 137, 126])]);
    }

    #[test]
    fn a_residual_and_an_activation_come_after_the_sum() {
        // Of ONNX Runtime's own kernels none runs this on a CPU: it is FusedConv with its images transposed.
        case("com.microsoft.NhwcFusedConv", 1)
            .with("activation", "LeakyRelu")
            .with("activation_params", vec![0.5f32])
            .input(f32s(&[1, 1, 2, 2], &[1.0, 2.0, 3.0, 4.0]))
            .input(f32s(&[1, 2, 1, 1], &[1.0, -2.0]))
            .input(f32s(&[1], &[0.5]))
            .input(f32s(&[1, 1, 2, 1], &[3.0, 0.5]))
            .gives([f32s(&[1, 1, 2, 1], &[0.5, -2.0])]);
        case("com.microsoft.NhwcConv", 1)
            .input(f32s(&[1, 1, 2, 2], &[1.0, 2.0, 3.0, 4.0]))
            .input(f32s(&[1, 2, 1, 1], &[1.0, -2.0]))
            .gives([f32s(&[1, 1, 2, 1], &[-3.0, -5.0])]);
    }

    #[test]
    fn images_have_a_batch_and_channels() {
        case("com.microsoft.NhwcMaxPool", 1).with("kernel_shape", vec![1i64]).wave(&[2, 2]).fails("expected");
    }
}
