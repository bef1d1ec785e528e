//! A tensor's elements as JSON, read and written one by one.

use cutover_runtime::tensor::{DType, Shape, Tensor, TensorError};
use half::{bf16, f16};
use serde::{
    Serialize, Serializer,
    de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use std::fmt;

/// The tensor of `shape` whose elements are the leaves of the arrays that `json` spells, in order.
///
/// # Errors
/// More or fewer elements than `shape` has; one that `dtype` can't hold; a type that JSON can't carry.
pub fn read(json: &str, dtype: DType, shape: Shape) -> Result<Tensor, String> {
    match dtype {
        DType::Bool => read_as::<bool>(json, shape, |shape, values| Tensor::from_bools(shape, &values)),
        DType::String => read_as::<String>(json, shape, Tensor::from_strings),
        DType::U8 => read_as::<u8>(json, shape, Tensor::from_vec),
        DType::U16 => read_as::<u16>(json, shape, Tensor::from_vec),
        DType::U32 => read_as::<u32>(json, shape, Tensor::from_vec),
        DType::U64 => read_as::<u64>(json, shape, Tensor::from_vec),
        DType::I8 => read_as::<i8>(json, shape, Tensor::from_vec),
        DType::I16 => read_as::<i16>(json, shape, Tensor::from_vec),
        DType::I32 => read_as::<i32>(json, shape, Tensor::from_vec),
        DType::I64 => read_as::<i64>(json, shape, Tensor::from_vec),
        DType::F16 => read_as::<f16>(json, shape, Tensor::from_vec),
        DType::BF16 => read_as::<bf16>(json, shape, Tensor::from_vec),
        DType::F32 => read_as::<f32>(json, shape, Tensor::from_vec),
        DType::F64 => read_as::<f64>(json, shape, Tensor::from_vec),
        other => Err(format!("type {other} can't be sent as JSON")),
    }
}

fn read_as<T: Leaf>(
    json: &str,
    shape: Shape,
    tensor: impl FnOnce(Shape, Vec<T>) -> Result<Tensor, TensorError>,
) -> Result<Tensor, String> {
    let Some(expected) = shape.checked_len() else {
        return Err(format!("shape {shape} is more than memory can hold"));
    };
    // An element takes at least a character and a comma: what the shape claims is not allocated before it is there.
    let mut leaves =
        Leaves { values: Vec::with_capacity(expected.min(json.len().div_ceil(2))), expected, problem: None };
    let mut deserializer = serde_json::Deserializer::from_str(json);
    let read = (&mut leaves).deserialize(&mut deserializer).map_err(|e| e.to_string());
    let Leaves { values, problem, .. } = leaves;
    if let Some(problem) = problem {
        return Err(match problem {
            Problem::TooMany => format!("more elements than the {expected} of shape {shape}"),
            Problem::Element(found) => format!("element {} is {found}, expected {}", values.len(), T::EXPECTED),
        });
    }
    read?;
    if values.len() != expected {
        return Err(format!("{} elements, expected the {expected} of shape {shape}", values.len()));
    }
    tensor(shape, values).map_err(|e| e.to_string())
}

/// What JSON has that is no array.
enum Json<'a> {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(&'a str),
    Object,
}

impl fmt::Display for Json<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Json::Null => f.write_str("null"),
            Json::Bool(v) => write!(f, "{v}"),
            Json::Unsigned(v) => write!(f, "{v}"),
            Json::Signed(v) => write!(f, "{v}"),
            Json::Float(v) => write!(f, "{v:?}"),
            Json::Text(v) => write!(f, "{v:?}"),
            Json::Object => f.write_str("an object"),
        }
    }
}

/// A type of elements.
trait Leaf: Sized {
    const EXPECTED: &'static str;
    fn read(json: &Json) -> Option<Self>;
}

macro_rules! whole_numbers {
    ($($t:ty),*) => {$(
        impl Leaf for $t {
            const EXPECTED: &'static str = concat!("a whole number that fits ", stringify!($t));

            fn read(json: &Json) -> Option<$t> {
                match *json {
                    Json::Unsigned(v) => v.try_into().ok(),
                    Json::Signed(v) => v.try_into().ok(),
                    _ => None,
                }
            }
        }
    )*};
}
whole_numbers!(u8, u16, u32, u64, i8, i16, i32, i64);

macro_rules! numbers {
    ($($t:ty: $from:expr),*) => {$(
        impl Leaf for $t {
            const EXPECTED: &'static str = "a number";

            fn read(json: &Json) -> Option<$t> {
                match *json {
                    Json::Unsigned(v) => Some($from(v as f64)),
                    Json::Signed(v) => Some($from(v as f64)),
                    Json::Float(v) => Some($from(v)),
                    _ => None,
                }
            }
        }
    )*};
}
numbers!(f16: f16::from_f64, bf16: bf16::from_f64, f32: (|v| v as f32), f64: (|v| v));

impl Leaf for bool {
    const EXPECTED: &'static str = "true or false";

    fn read(json: &Json) -> Option<bool> {
        match *json {
            Json::Bool(v) => Some(v),
            Json::Unsigned(v @ (0 | 1)) => Some(v == 1),
            _ => None,
        }
    }
}

impl Leaf for String {
    const EXPECTED: &'static str = "a string";

    fn read(json: &Json) -> Option<String> {
        match json {
            Json::Text(v) => Some(v.to_string()),
            _ => None,
        }
    }
}

/// The leaves of nested arrays, in order. serde_json bounds how deep they nest.
struct Leaves<T> {
    values: Vec<T>,
    expected: usize,
    problem: Option<Problem>,
}

enum Problem {
    TooMany,
    /// The element after those read is this.
    Element(String),
}

impl<T: Leaf> Leaves<T> {
    fn push<E: Error>(&mut self, json: Json) -> Result<(), E> {
        let problem = match T::read(&json) {
            Some(value) if self.values.len() < self.expected => {
                self.values.push(value);
                return Ok(());
            }
            Some(_) => Problem::TooMany,
            None => Problem::Element(json.to_string()),
        };
        self.problem = Some(problem);
        Err(E::custom("told by `problem`"))
    }
}

impl<'de, T: Leaf> DeserializeSeed<'de> for &mut Leaves<T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Leaf> Visitor<'de> for &mut Leaves<T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.push(Json::Null)
    }

    fn visit_bool<E: Error>(self, v: bool) -> Result<(), E> {
        self.push(Json::Bool(v))
    }

    fn visit_u64<E: Error>(self, v: u64) -> Result<(), E> {
        self.push(Json::Unsigned(v))
    }

    fn visit_i64<E: Error>(self, v: i64) -> Result<(), E> {
        self.push(Json::Signed(v))
    }

    fn visit_f64<E: Error>(self, v: f64) -> Result<(), E> {
        self.push(Json::Float(v))
    }

    fn visit_str<E: Error>(self, v: &str) -> Result<(), E> {
        self.push(Json::Text(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<(), A::Error> {
        while array.next_element_seed(&mut *self)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
        while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        self.push(Json::Object)
    }
}

/// The elements of a tensor as one flat array. NaN and infinities, which JSON has no numbers for, become null.
#[derive(Debug)]
pub struct Elements(Tensor);

impl Elements {
    /// # Errors
    /// A type that JSON can't carry.
    pub fn of(tensor: &Tensor) -> Result<Elements, String> {
        let (bits, dtype) = (tensor.dtype().bits(), tensor.dtype());
        match dtype {
            DType::Bool | DType::String | DType::F16 | DType::BF16 | DType::F32 | DType::F64 => {}
            dtype if dtype.is_integer() && bits >= 8 => {}
            other => return Err(format!("type {other} can't be sent as JSON")),
        }
        Ok(Elements(tensor.aligned()))
    }
}

impl Serialize for Elements {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Elements(tensor) = self;
        macro_rules! array {
            ($t:ty) => {
                array!($t, |v| *v)
            };
            ($t:ty, $json:expr) => {
                serializer.collect_seq(tensor.as_slice::<$t>().map_err(serde::ser::Error::custom)?.iter().map($json))
            };
        }
        match tensor.dtype() {
            DType::U8 => array!(u8),
            DType::U16 => array!(u16),
            DType::U32 => array!(u32),
            DType::U64 => array!(u64),
            DType::I8 => array!(i8),
            DType::I16 => array!(i16),
            DType::I32 => array!(i32),
            DType::I64 => array!(i64),
            DType::F16 => array!(f16, |v| v.to_f32()),
            DType::BF16 => array!(bf16, |v| v.to_f32()),
            DType::F32 => array!(f32),
            DType::F64 => array!(f64),
            DType::Bool => serializer.collect_seq(tensor.bytes().iter().map(|&b| b != 0)),
            DType::String => serializer.collect_seq(tensor.strings().map_err(serde::ser::Error::custom)?),
            other => Err(serde::ser::Error::custom(format!("type {other} can't be sent as JSON"))),
        }
    }
}
