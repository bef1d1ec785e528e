//! Conversion between element types.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, evaluate::from_codes};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{
    DType, Tensor, Value,
    small_float::{RoundMode, encode, is_small_float},
};

/// `x` as elements of type `to`: floats round to nearest even, to integers towards zero; to bool, what is not zero is true.
#[derive(Clone, Debug, PartialEq)]
pub struct Cast {
    pub to: DType,
    pub conversion: Conversion,
}

/// What matters to floats of eight bits and fewer alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conversion {
    /// Numbers beyond the largest become that; otherwise infinity or NaN.
    pub saturate: bool,
    /// To powers of two.
    pub round_mode: RoundMode,
}

impl Default for Conversion {
    fn default() -> Self {
        Conversion { saturate: true, round_mode: RoundMode::Up }
    }
}

impl Conversion {
    pub(super) fn read(node: &mut NodeReader) -> Result<Conversion, ImportError> {
        let saturate = node.flag("saturate", true)?;
        let round_mode = match node.string("round_mode", "up")?.as_str() {
            "up" => RoundMode::Up,
            "down" => RoundMode::Down,
            "nearest" => RoundMode::Nearest,
            other => return Err(node.corrupt(format!("round_mode '{other}', expected up, down or nearest"))),
        };
        Ok(Conversion { saturate, round_mode })
    }

    /// The attributes that differ from what is taken without them.
    pub(super) fn spell(self, spelling: Spelling) -> Spelling {
        let spelling = if self.saturate { spelling } else { spelling.with("saturate", 0) };
        match self.round_mode {
            RoundMode::Up => spelling,
            RoundMode::Down => spelling.since(24).with("round_mode", "down"),
            RoundMode::Nearest => spelling.since(24).with("round_mode", "nearest"),
        }
    }
}

impl Cast {
    pub fn to(to: DType) -> Cast {
        Cast { to, conversion: Conversion::default() }
    }
}

impl Operator for Cast {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let conversion = Conversion::read(node)?;
        Ok(Cast { to: named_type(node, "to")?, conversion }.into())
    }

    fn export(&self) -> Spelling {
        self.conversion.spell(Spelling::new("Cast").with("to", i64::from(self.to.onnx_code())))
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let value = match self.to {
            // Elements fit the wider type, and a symbol stands for an extent, which fits i32 wherever a model uses one so.
            DType::I64 | DType::I32 if x.dtype == DType::F32 => {
                x.constant_value().map(|v| v.into_iter().map(Dim::from).collect())
            }
            DType::I64 | DType::I32 => x.value.clone(),
            DType::Bool => x.constant_value().map(|v| v.iter().map(|&v| i64::from(v != 0).into()).collect()),
            _ => None,
        };
        Ok(vec![TensorFact { dtype: self.to, shape: x.shape.clone(), value: None }.with_value(value).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        Ok(vec![convert(x, self.to, self.conversion)?.into()])
    }
}

/// The element type that attribute `name` says, by its code; before opset 6 by its name.
pub(super) fn named_type(node: &mut NodeReader, name: &str) -> Result<DType, ImportError> {
    if node.opset < 6 {
        let spelled = node.optional_string(name)?.unwrap_or_default();
        let known = [("FLOAT", DType::F32), ("DOUBLE", DType::F64), ("FLOAT16", DType::F16), ("BOOL", DType::Bool)];
        let known = known.into_iter().find(|(known, _)| *known == spelled).map(|(_, dtype)| dtype);
        let integer = || DType::from_name(&spelled.to_lowercase().replace("uint", "u").replace("int", "i"));
        return known.or_else(integer).ok_or_else(|| node.corrupt(format!("type '{spelled}' is not one of ONNX's")));
    }
    let code = node.optional_int(name)?.ok_or_else(|| node.corrupt(format!("attribute '{name}' is missing")))?;
    let dtype = i32::try_from(code).ok().and_then(DType::from_onnx_code);
    dtype.ok_or_else(|| node.corrupt(format!("type {code} is not one of ONNX's")))
}

/// `x` as elements of type `to`.
pub(super) fn cast(x: &Tensor, to: DType) -> Result<Tensor, OpError> {
    convert(x, to, Conversion::default())
}

pub(super) fn convert(x: &Tensor, to: DType, conversion: Conversion) -> Result<Tensor, OpError> {
    if x.dtype() == to {
        return Ok(x.clone());
    }
    let shape = x.shape().clone();
    if to == DType::String {
        return Ok(Tensor::from_strings(shape, spell(x)?)?);
    }
    let wide = if x.dtype() == DType::String { parse(x.strings()?, to)? } else { Wide::of(x)? };
    let wide = match (wide, to) {
        (Wide::Float(v), DType::Bool) => Wide::Bool(v.into_iter().map(|v| v != 0.0).collect()),
        (Wide::Int(v), DType::Bool) => Wide::Bool(v.into_iter().map(|v| v != 0).collect()),
        (Wide::Float(v), _) if to.is_integer() => Wide::Int(v.into_iter().map(|v| v as i128).collect()),
        (Wide::Int(v), _) if to.is_float() => Wide::Float(v.into_iter().map(|v| v as f64).collect()),
        (Wide::Bool(v), _) if to.is_integer() => Wide::Int(v.into_iter().map(i128::from).collect()),
        (Wide::Bool(v), _) if to.is_float() => Wide::Float(v.into_iter().map(|v| f64::from(u8::from(v))).collect()),
        (same, _) => same,
    };
    match wide {
        Wide::Float(v) if is_small_float(to) => {
            let code = |v| encode(to, v, conversion.saturate, conversion.round_mode);
            from_codes(v.into_iter().map(code), to, shape)
        }
        wide => wide.narrow(to, shape),
    }
}

/// Numbers as Python spells them.
fn spell(x: &Tensor) -> Result<Vec<String>, OpError> {
    Ok(match Wide::of(x)? {
        Wide::Float(v) if x.dtype() == DType::F64 => v.into_iter().map(|v| python(&format!("{v:?}"))).collect(),
        Wide::Float(v) => v.into_iter().map(|v| python(&format!("{:?}", v as f32))).collect(),
        Wide::Int(v) => v.into_iter().map(|v| v.to_string()).collect(),
        Wide::Bool(v) => v.into_iter().map(|v| if v { "True" } else { "False" }.to_string()).collect(),
    })
}

fn python(text: &str) -> String {
    match text {
        "NaN" => "nan".to_string(),
        text => text.to_string(),
    }
}

/// Numbers, also `nan`, `inf` and `INF`; whole ones are read as such where whole ones are wanted.
fn parse(strings: &[String], to: DType) -> Result<Wide, OpError> {
    let wrong = |s: &String| OpError::input(format!("'{s}' is not a number"));
    if to.is_integer() {
        let whole = |s: &String| {
            let text = s.trim();
            text.parse::<i128>().ok().or_else(|| text.parse::<f64>().ok().map(|v| v as i128)).ok_or_else(|| wrong(s))
        };
        return Ok(Wide::Int(strings.iter().map(whole).collect::<Result<_, _>>()?));
    }
    let number = |s: &String| s.trim().parse::<f64>().map_err(|_| wrong(s));
    Ok(Wide::Float(strings.iter().map(number).collect::<Result<_, _>>()?))
}
