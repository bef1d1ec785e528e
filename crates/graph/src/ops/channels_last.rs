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
