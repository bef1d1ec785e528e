//! The JSON of the Open Inference Protocol, version 2 (KServe), and its tensors.
//!
//! Tensors come as flat or nested arrays in row-major order. The binary extension is not spoken here. The text of an array becomes the
//! tensor's elements, and they become text, with nothing in between: a tensor of JSON values would take many times its bytes.

use crate::elements::{self, Elements};
use cutover_runtime::tensor::{DType, Shape, Tensor, Value};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, value::RawValue};

/// `POST /v2/models/NAME/infer`.
#[derive(Debug, Deserialize)]
pub struct InferRequest<'a> {
    pub id: Option<String>,
    #[serde(default)]
    pub parameters: Map<String, Json>,
    #[serde(borrow)]
    pub inputs: Vec<InputTensor<'a>>,
    /// Which outputs to answer with, in this order; all if absent.
    pub outputs: Option<Vec<RequestedOutput>>,
}

#[derive(Debug, Deserialize)]
pub struct InputTensor<'a> {
    pub name: String,
    pub shape: Vec<u64>,
    pub datatype: String,
    #[serde(borrow)]
    pub data: &'a RawValue,
}

#[derive(Debug, Deserialize)]
pub struct RequestedOutput {
    pub name: String,
}

/// The answer to [`InferRequest`].
#[derive(Debug, Serialize)]
pub struct InferResponse {
    pub model_name: String,
    pub model_version: String,
    pub id: String,
    pub outputs: Vec<OutputTensor>,
}

#[derive(Debug, Serialize)]
pub struct OutputTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub datatype: &'static str,
    pub data: Elements,
}

/// Ends the name of the output that holds the keys of maps.
pub const KEYS: &str = ".keys";

/// A name and type of the protocol's metadata; a dimension that varies is -1.
#[derive(Debug, Serialize)]
pub struct TensorMetadata {
    pub name: String,
    pub datatype: &'static str,
    pub shape: Vec<i64>,
}

const DATATYPES: &[(&str, DType)] = &[
    ("BOOL", DType::Bool),
    ("UINT8", DType::U8),
    ("UINT16", DType::U16),
    ("UINT32", DType::U32),
    ("UINT64", DType::U64),
    ("INT8", DType::I8),
    ("INT16", DType::I16),
    ("INT32", DType::I32),
    ("INT64", DType::I64),
    ("FP16", DType::F16),
    ("BF16", DType::BF16),
    ("FP32", DType::F32),
    ("FP64", DType::F64),
    ("BYTES", DType::String),
];

/// The protocol's name of a type; its types that the protocol lacks are called by their own names.
pub fn datatype(dtype: DType) -> &'static str {
    DATATYPES.iter().find(|(_, d)| *d == dtype).map_or(dtype.name(), |(name, _)| name)
}

impl InputTensor<'_> {
    /// The tensor that `self` spells.
    ///
    /// # Errors
    /// Says what is wrong with which input: an unknown datatype, a shape that is not that of the data, an element that the
    /// type can't hold.
    pub fn decode(&self) -> Result<(String, Value), String> {
        let tensor = self.tensor().map_err(|message| format!("input '{}': {message}", self.name))?;
        Ok((self.name.clone(), Value::Tensor(tensor)))
    }

    fn tensor(&self) -> Result<Tensor, String> {
        let Some(&(_, dtype)) = DATATYPES.iter().find(|(name, _)| *name == self.datatype) else {
            let known: Vec<_> = DATATYPES.iter().map(|(name, _)| *name).collect();
            return Err(format!("datatype '{}' is unknown, expected one of {}", self.datatype, known.join(", ")));
        };
        let shape: Shape = self.shape.iter().map(|&d| usize::try_from(d).unwrap_or(usize::MAX)).collect();
        elements::read(self.data.get(), dtype, shape)
    }
}

impl OutputTensor {
    /// The value as tensors. Maps, and sequences of them, are two: their values (`[maps, keys]`), and the keys as `NAME.keys`.
    ///
    /// # Errors
    /// A value that is neither, or of a type that JSON can't carry.
    pub fn encode_all(name: &str, value: &Value) -> Result<Vec<OutputTensor>, String> {
        match (value, value.as_table()) {
            (Value::Tensor(tensor), _) => Ok(vec![OutputTensor::encode(name, tensor)?]),
            (_, Some((keys, table))) => {
                let keys = OutputTensor::encode(&format!("{name}{KEYS}"), &keys.to_tensor())?;
                Ok(vec![OutputTensor::encode(name, &table)?, keys])
            }
            // A run on no rows: there is no map whose keys could be told.
            (Value::Sequence(values), None) if values.is_empty() => Ok(Vec::new()),
            _ => Err(format!("output '{name}' is a {}, and the protocol carries tensors alone", value.kind())),
        }
    }

    fn encode(name: &str, tensor: &Tensor) -> Result<OutputTensor, String> {
        Ok(OutputTensor {
            name: name.to_string(),
            shape: tensor.shape().to_vec(),
            datatype: datatype(tensor.dtype()),
            data: Elements::of(tensor).map_err(|e| format!("output '{name}': {e}"))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cutover_runtime::tensor::MapKeys;
    use serde_json::json;

    /// Decodes an input of these, spelt as a request spells it.
    fn decode(datatype: &str, shape: &[u64], data: Json) -> Result<(String, Value), String> {
        let text = json!({ "name": "x", "shape": shape, "datatype": datatype, "data": data }).to_string();
        serde_json::from_str::<InputTensor>(&text).unwrap().decode()
    }

    #[test]
    fn every_type_comes_back_as_it_was_sent() {
        let cases = [
            ("BOOL", json!([true, false])),
            ("UINT8", json!([0, 255])),
            ("INT8", json!([-128, 127])),
            ("UINT64", json!([0, u64::MAX])),
            ("INT64", json!([i64::MIN, i64::MAX])),
            ("FP16", json!([0.5, -2.0])),
            ("BF16", json!([0.5, -2.0])),
            // As the shortest decimal of its own type, not of a wider one.
            ("FP32", json!([0.1, 16777216.0])),
            ("FP64", json!([0.1, 1e300])),
            ("BYTES", json!(["a", "ü"])),
        ];
        for (datatype, data) in cases {
            let (name, value) = decode(datatype, &[2], data.clone()).unwrap();
            let output = OutputTensor::encode_all(&name, &value).unwrap().remove(0);
            assert_eq!(output.datatype, datatype);
            assert_eq!(serde_json::to_string(&output.data).unwrap(), data.to_string());
        }
    }

    #[test]
    fn nested_arrays_are_row_major() {
        let (_, value) = decode("INT32", &[2, 2], json!([[1, 2], [3, 4]])).unwrap();
        let Value::Tensor(tensor) = value else { panic!("a tensor was sent") };
        assert_eq!(tensor.to_vec::<i32>().unwrap(), [1, 2, 3, 4]);
    }

    #[test]
    fn scalars_and_empty_tensors_come_and_go() {
        let (_, one) = decode("FP32", &[], json!(2.5)).unwrap();
        let (_, none) = decode("BOOL", &[2, 0], json!([])).unwrap();
        let written =
            [one, none].map(|v| serde_json::to_string(&OutputTensor::encode_all("x", &v).unwrap()[0]).unwrap());
        let expected = [
            r#"{"name":"x","shape":[],"datatype":"FP32","data":[2.5]}"#,
            r#"{"name":"x","shape":[2,0],"datatype":"BOOL","data":[]}"#,
        ];
        assert_eq!(written, expected);
    }

    #[test]
    fn what_json_has_no_number_for_is_null() {
        let tensor = Tensor::from_vec([3], vec![f32::NAN, f32::INFINITY, 1.0]).unwrap();
        let output = OutputTensor::encode("x", &tensor).unwrap();
        assert_eq!(serde_json::to_string(&output.data).unwrap(), "[null,null,1.0]");
    }

    #[test]
    fn maps_are_their_values_and_their_keys() {
        let map = |values: [f32; 2]| Value::Map {
            keys: MapKeys::Strings(vec!["no".to_string(), "yes".to_string()]),
            values: Tensor::from_vec([2], values.to_vec()).unwrap(),
        };
        let maps = Value::Sequence(vec![map([0.25, 0.75]), map([1.0, 0.0])]);
        let written: Vec<String> =
            OutputTensor::encode_all("p", &maps).unwrap().iter().map(|o| serde_json::to_string(o).unwrap()).collect();
        let expected = [
            r#"{"name":"p","shape":[2,2],"datatype":"FP32","data":[0.25,0.75,1.0,0.0]}"#,
            r#"{"name":"p.keys","shape":[2],"datatype":"BYTES","data":["no","yes"]}"#,
        ];
        assert_eq!(written, expected);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let cases = [
            (decode("FLOAT", &[1], json!([1])), "datatype 'FLOAT' is unknown"),
            (decode("UINT8", &[1], json!([256])), "element 0 is 256, expected a whole number that fits u8"),
            (decode("INT32", &[2], json!([1, 1.5])), "element 1 is 1.5, expected a whole number that fits i32"),
            (decode("FP32", &[u64::MAX, 2], json!([1])), "is more than memory can hold"),
            (decode("FP32", &[u64::MAX], json!([1])), "1 elements, expected the"),
            (decode("FP32", &[2], json!([1])), "1 elements, expected the 2 of shape [2]"),
            (decode("FP32", &[2], json!([[1], [2, 3]])), "more elements than the 2 of shape [2]"),
            (decode("FP32", &[1], json!(["a"])), "element 0 is \"a\", expected a number"),
            (decode("FP32", &[1], json!([null])), "element 0 is null, expected a number"),
            (decode("FP32", &[1], json!([{ "a": 1 }])), "element 0 is an object, expected a number"),
            (decode("BOOL", &[1], json!([2])), "element 0 is 2, expected true or false"),
            (decode("BYTES", &[1], json!([1])), "element 0 is 1, expected a string"),
        ];
        for (decoded, expected) in cases {
            let message = decoded.unwrap_err();
            assert!(message.starts_with("input 'x': ") && message.contains(expected), "{message}");
        }
        // Nested deeper than anything is: refused, and the stack holds.
        let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
        let text = format!(r#"{{"name":"x","shape":[1],"datatype":"FP32","data":{deep}}}"#);
        let message = serde_json::from_str::<InputTensor>(&text).map_err(|e| e.to_string()).and_then(|x| x.decode());
        assert!(message.unwrap_err().contains("recursion limit"));
    }
}
