//! The JSON of the Open Inference Protocol, version 2 (KServe), and its tensors.
//!
//! Tensors come as flat or nested arrays in row-major order. The binary extension is not spoken here.

use cutover_runtime::tensor::{DType, Shape, Tensor, Value};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

/// `POST /v2/models/NAME/infer`.
#[derive(Debug, Deserialize)]
pub struct InferRequest {
    pub id: Option<String>,
    #[serde(default)]
    pub parameters: Map<String, Json>,
    pub inputs: Vec<InputTensor>,
    /// Which outputs to answer with, in this order; all if absent.
    pub outputs: Option<Vec<RequestedOutput>>,
}

#[derive(Debug, Deserialize)]
pub struct InputTensor {
    pub name: String,
    pub shape: Vec<u64>,
    pub datatype: String,
    pub data: Json,
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
    pub data: Json,
}

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

impl InputTensor {
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
        let mut elements = Vec::new();
        flatten(&self.data, &mut elements);
        // The data is there already: a shape that claims more is refused before anything is allocated for it.
        if shape.checked_len() != Some(elements.len()) {
            return Err(format!("{} elements, which shape {shape} does not hold", elements.len()));
        }
        if dtype == DType::String {
            let strings = each(&elements, "a string", |v| v.as_str().map(str::to_string))?;
            return Tensor::from_strings(shape, strings).map_err(|e| e.to_string());
        }
        let mut bytes = Vec::with_capacity(elements.len() * dtype.bits() / 8);
        macro_rules! integers {
            ($t:ty) => {{
                let what = concat!("a whole number that fits ", stringify!($t));
                let number = |v: &Json| {
                    let wide = v.as_i64().map(i128::from).or_else(|| v.as_u64().map(i128::from))?;
                    <$t>::try_from(wide).ok()
                };
                each(&elements, what, number)?.iter().for_each(|v| bytes.extend(v.to_le_bytes()));
            }};
        }
        macro_rules! floats {
            ($convert:expr) => {
                each(&elements, "a number", Json::as_f64)?
                    .into_iter()
                    .for_each(|v| bytes.extend($convert(v).to_le_bytes()))
            };
        }
        match dtype {
            DType::U8 => integers!(u8),
            DType::U16 => integers!(u16),
            DType::U32 => integers!(u32),
            DType::U64 => integers!(u64),
            DType::I8 => integers!(i8),
            DType::I16 => integers!(i16),
            DType::I32 => integers!(i32),
            DType::I64 => integers!(i64),
            DType::F16 => floats!(half::f16::from_f64),
            DType::BF16 => floats!(half::bf16::from_f64),
            DType::F32 => floats!(|v| v as f32),
            DType::F64 => floats!(|v: f64| v),
            DType::Bool => {
                let truth = |v: &Json| v.as_bool().or_else(|| v.as_u64().filter(|&n| n < 2).map(|n| n == 1));
                bytes.extend(each(&elements, "true or false", truth)?.into_iter().map(u8::from));
            }
            other => return Err(format!("datatype {other} can't be sent as JSON")),
        }
        Tensor::from_bytes(dtype, shape, &bytes).map_err(|e| e.to_string())
    }
}

/// The leaves of nested arrays, in order. JSON's own nesting limit bounds the recursion.
fn flatten<'a>(value: &'a Json, into: &mut Vec<&'a Json>) {
    match value {
        Json::Array(items) => items.iter().for_each(|item| flatten(item, into)),
        leaf => into.push(leaf),
    }
}

fn each<T>(elements: &[&Json], expected: &str, read: impl Fn(&Json) -> Option<T>) -> Result<Vec<T>, String> {
    let read_one =
        |(at, v): (usize, &&Json)| read(v).ok_or_else(|| format!("element {at} is {v}, expected {expected}"));
    elements.iter().enumerate().map(read_one).collect()
}

impl OutputTensor {
    /// # Errors
    /// A value that is no tensor, or of a type that JSON can't carry.
    pub fn encode(name: &str, value: &Value) -> Result<OutputTensor, String> {
        let Value::Tensor(tensor) = value else {
            return Err(format!("output '{name}' is not a tensor, and the protocol carries nothing else"));
        };
        let data = elements(tensor).map_err(|e| format!("output '{name}': {e}"))?;
        Ok(OutputTensor {
            name: name.to_string(),
            shape: tensor.shape().to_vec(),
            datatype: datatype(tensor.dtype()),
            data: Json::Array(data),
        })
    }
}

/// NaN and infinities, which JSON has no numbers for, become null.
fn elements(tensor: &Tensor) -> Result<Vec<Json>, String> {
    macro_rules! numbers {
        ($t:ty) => {
            tensor.to_vec::<$t>().map_err(|e| e.to_string())?.into_iter().map(Json::from).collect()
        };
    }
    Ok(match tensor.dtype() {
        DType::U8 => numbers!(u8),
        DType::U16 => numbers!(u16),
        DType::U32 => numbers!(u32),
        DType::U64 => numbers!(u64),
        DType::I8 => numbers!(i8),
        DType::I16 => numbers!(i16),
        DType::I32 => numbers!(i32),
        DType::I64 => numbers!(i64),
        // As `f32`, not `f64`: the shortest decimal that reads back as the same `f32`.
        DType::F32 => numbers!(f32),
        DType::F64 => numbers!(f64),
        DType::F16 => {
            let values = tensor.to_vec::<half::f16>().map_err(|e| e.to_string())?;
            values.into_iter().map(|v| Json::from(v.to_f32())).collect()
        }
        DType::BF16 => {
            let values = tensor.to_vec::<half::bf16>().map_err(|e| e.to_string())?;
            values.into_iter().map(|v| Json::from(v.to_f32())).collect()
        }
        DType::Bool => tensor.to_bools().map_err(|e| e.to_string())?.into_iter().map(Json::from).collect(),
        DType::String => tensor.strings().map_err(|e| e.to_string())?.iter().map(|s| Json::from(s.as_str())).collect(),
        other => return Err(format!("type {other} can't be sent as JSON")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn input(datatype: &str, shape: &[u64], data: Json) -> InputTensor {
        InputTensor { name: "x".to_string(), shape: shape.to_vec(), datatype: datatype.to_string(), data }
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
            ("FP64", json!([0.1, 1e300])),
            ("BYTES", json!(["a", "ü"])),
        ];
        for (datatype, data) in cases {
            let (name, value) = input(datatype, &[2], data.clone()).decode().unwrap();
            let output = OutputTensor::encode(&name, &value).unwrap();
            assert_eq!((output.datatype, output.data), (datatype, data));
        }
    }

    #[test]
    fn nested_arrays_are_row_major() {
        let (_, value) = input("INT32", &[2, 2], json!([[1, 2], [3, 4]])).decode().unwrap();
        let Value::Tensor(tensor) = value else { panic!("a tensor was sent") };
        assert_eq!(tensor.to_vec::<i32>().unwrap(), [1, 2, 3, 4]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let cases = [
            (input("FLOAT", &[1], json!([1])), "datatype 'FLOAT' is unknown"),
            (input("UINT8", &[1], json!([256])), "element 0 is 256, expected a whole number that fits u8"),
            (input("INT32", &[2], json!([1, 1.5])), "element 1 is 1.5"),
            (input("FP32", &[u64::MAX, 2], json!([1])), "1 elements"),
            (input("FP32", &[1], json!(["a"])), "expected a number"),
            (input("BYTES", &[1], json!([1])), "expected a string"),
        ];
        for (input, expected) in cases {
            let message = input.decode().unwrap_err();
            assert!(message.starts_with("input 'x': ") && message.contains(expected), "{message}");
        }
    }
}
