//! What flows along an edge of a graph: a tensor, or one of ONNX's containers of them.

use crate::Tensor;

/// ONNX's runtime values.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Tensor(Tensor),
    Sequence(Vec<Value>),
    Optional(Option<Box<Value>>),
    /// `map(key, tensor)`; the two are of equal length.
    Map {
        keys: MapKeys,
        values: Tensor,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub enum MapKeys {
    Ints(Vec<i64>),
    Strings(Vec<String>),
}

impl Value {
    pub fn as_tensor(&self) -> Option<&Tensor> {
        match self {
            Value::Tensor(tensor) => Some(tensor),
            _ => None,
        }
    }

    pub fn into_tensor(self) -> Option<Tensor> {
        match self {
            Value::Tensor(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// Name of the kind of value, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Tensor(_) => "tensor",
            Value::Sequence(_) => "sequence",
            Value::Optional(_) => "optional",
            Value::Map { .. } => "map",
        }
    }
}

impl From<Tensor> for Value {
    fn from(tensor: Tensor) -> Value {
        Value::Tensor(tensor)
    }
}
