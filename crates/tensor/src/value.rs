//! What flows along an edge of a graph: a tensor, or one of ONNX's containers of them.

use crate::{DType, Tensor};

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

    /// The values of a map (`[keys]`), or of a sequence of maps with the same keys in the same order (`[maps, keys]`), as one tensor, and
    /// the keys: what a classifier says of its classes, as a table.
    pub fn as_table(&self) -> Option<(&MapKeys, Tensor)> {
        match self {
            Value::Map { keys, values } => Some((keys, values.clone())),
            Value::Sequence(maps) => {
                let row =
                    |map: &'_ Value| if let Value::Map { values, .. } = map { Some(values.clone()) } else { None };
                let Some(Value::Map { keys, values: first }) = maps.first() else { return None };
                let same = |map: &Value| matches!(map, Value::Map { keys: k, values } if k == keys && values.dtype() == first.dtype());
                if !maps.iter().all(same) {
                    return None;
                }
                let rows: Vec<Tensor> = maps.iter().filter_map(row).collect();
                let shape = [rows.len(), first.element_count()];
                let table = match first.dtype() {
                    DType::String => {
                        let texts = rows.iter().filter_map(|row| row.strings().ok());
                        Tensor::from_strings(shape, texts.flatten().cloned().collect())
                    }
                    dtype => {
                        let bytes: Vec<u8> = rows.iter().flat_map(|row| row.bytes().iter().copied()).collect();
                        Tensor::from_bytes(dtype, shape, &bytes)
                    }
                };
                Some((keys, table.ok()?))
            }
            _ => None,
        }
    }

    /// Bytes of all its elements; of strings those of the text.
    pub fn byte_size(&self) -> u64 {
        match self {
            Value::Tensor(tensor) if tensor.dtype() == DType::String => {
                tensor.strings().map_or(0, |s| s.iter().map(|s| s.len() as u64).sum())
            }
            Value::Tensor(tensor) | Value::Map { values: tensor, .. } => tensor.bytes().len() as u64,
            Value::Sequence(values) => values.iter().map(Value::byte_size).sum(),
            Value::Optional(value) => value.as_deref().map_or(0, Value::byte_size),
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

impl MapKeys {
    /// As a tensor (`[keys]`) of i64 or strings.
    pub fn to_tensor(&self) -> Tensor {
        let tensor = match self {
            MapKeys::Ints(keys) => Tensor::from_vec([keys.len()], keys.clone()),
            MapKeys::Strings(keys) => Tensor::from_strings([keys.len()], keys.clone()),
        };
        tensor.expect("as many keys as the shape has elements")
    }
}

impl From<Tensor> for Value {
    fn from(tensor: Tensor) -> Value {
        Value::Tensor(tensor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_with_the_same_keys_are_a_table() {
        let map = |keys: &[i64], values: &[f32]| Value::Map {
            keys: MapKeys::Ints(keys.to_vec()),
            values: Tensor::from_vec([values.len()], values.to_vec()).unwrap(),
        };
        let two = Value::Sequence(vec![map(&[5, 3], &[1.0, 2.0]), map(&[5, 3], &[3.0, 4.0])]);
        let (keys, table) = two.as_table().unwrap();
        assert_eq!(table, Tensor::from_vec([2, 2], vec![1f32, 2.0, 3.0, 4.0]).unwrap());
        assert_eq!(keys.to_tensor(), Tensor::from_vec([2], vec![5i64, 3]).unwrap());
        assert!(Value::Sequence(vec![map(&[5], &[1.0]), map(&[3], &[1.0])]).as_table().is_none());
        assert!(Value::Sequence(Vec::new()).as_table().is_none());
        assert!(Value::Sequence(vec![Tensor::scalar(1f32).into()]).as_table().is_none());
        let texts = |texts: [&str; 2]| Value::Map {
            keys: MapKeys::Strings(vec!["a".to_string(), "b".to_string()]),
            values: Tensor::from_strings([2], texts.map(str::to_string).to_vec()).unwrap(),
        };
        let (_, table) = texts(["x", "y"]).as_table().map(|(k, t)| (k.clone(), t)).unwrap();
        assert_eq!(table.strings().unwrap(), ["x", "y"]);
    }
}
