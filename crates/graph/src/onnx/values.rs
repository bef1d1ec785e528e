//! Values in files of their own (`.pb`), as the ONNX project's test data holds them.

use super::{
    ImportOptions,
    mapping::FileBytes,
    proto::{OptionalProto, SequenceProto, TensorProto},
    tensors::TensorReader,
};
use crate::{Fact, ImportError};
use cutover_tensor::Value;
use prost::{Message, bytes::Bytes};

/// Reads a serialised `TensorProto`, `SequenceProto` or `OptionalProto`: the file does not say which it is, so `declared` does.
///
/// # Errors
/// Bytes that are no such message; a tensor that contradicts itself; a map, which ONNX has no file for.
pub fn read_value(bytes: Bytes, declared: &Fact, options: &ImportOptions) -> Result<Value, ImportError> {
    let file = FileBytes::of(bytes);
    let message = file.bytes();
    let mut reader = TensorReader::new(file, super::tensors::External::None, options);
    let decode = |e: prost::DecodeError| ImportError::Decode(e.to_string());
    match declared {
        Fact::Tensor(_) => tensor(&TensorProto::decode(message).map_err(decode)?, &mut reader),
        Fact::Sequence(_) => sequence(&SequenceProto::decode(message).map_err(decode)?, &mut reader),
        Fact::Optional(_) => optional(&OptionalProto::decode(message).map_err(decode)?, &mut reader),
        Fact::Map { .. } => unsupported("a map in a file of its own"),
    }
}

fn unsupported<T>(message: &str) -> Result<T, ImportError> {
    Err(ImportError::Unsupported { place: "the value".to_string(), message: message.to_string() })
}

fn tensor(proto: &TensorProto, reader: &mut TensorReader<'_>) -> Result<Value, ImportError> {
    Ok(Value::Tensor(reader.read(proto, "the value")?))
}

/// prost bounds how deep messages lie in one another.
fn sequence(proto: &SequenceProto, reader: &mut TensorReader<'_>) -> Result<Value, ImportError> {
    let SequenceProto { elem_type, tensor_values, sequence_values, optional_values, .. } = proto;
    let values: Result<Vec<Value>, ImportError> = match elem_type {
        // Of undefined type only where it is empty.
        0 | 1 => tensor_values.iter().map(|t| tensor(t, reader)).collect(),
        3 => sequence_values.iter().map(|s| sequence(s, reader)).collect(),
        5 => optional_values.iter().map(|o| optional(o, reader)).collect(),
        other => return unsupported(&format!("a sequence of elements of kind {other}")),
    };
    Ok(Value::Sequence(values?))
}

fn optional(proto: &OptionalProto, reader: &mut TensorReader<'_>) -> Result<Value, ImportError> {
    let value = match (&proto.tensor_value, &proto.sequence_value, &proto.optional_value) {
        (Some(t), ..) => Some(tensor(t, reader)?),
        (_, Some(s), _) => Some(sequence(s, reader)?),
        (.., Some(o)) => Some(optional(o, reader)?),
        _ => None,
    };
    Ok(Value::Optional(value.map(Box::new)))
}
