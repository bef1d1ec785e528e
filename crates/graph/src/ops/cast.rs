//! Conversion between element types.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// `x` as elements of type `to`: floats round to nearest even, to integers towards zero; to bool, what is not zero is true.
#[derive(Clone, Debug, PartialEq)]
pub struct Cast {
    pub to: DType,
}

impl Operator for Cast {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let code = node.optional_int("to")?.ok_or_else(|| node.corrupt("attribute 'to' is missing"))?;
        // Saturation and rounding matter to the eight-bit floats alone, which are not converted yet.
        node.int("saturate", 1)?;
        node.optional_string("round_mode")?;
        let to = i32::try_from(code).ok().and_then(DType::from_onnx_code);
        Ok(Cast { to: to.ok_or_else(|| node.corrupt(format!("type {code} is not one of ONNX's")))? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Cast").with("to", i64::from(self.to.onnx_code()))
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let value = match self.to {
            // Elements fit the wider type, and a symbol stands for an extent, which fits i32 wherever a model uses one so.
            DType::I64 | DType::I32 => x.value.clone(),
            DType::Bool => x.constant_value().map(|v| v.iter().map(|&v| i64::from(v != 0).into()).collect()),
            _ => None,
        };
        Ok(vec![TensorFact { dtype: self.to, shape: x.shape.clone(), value: None }.with_value(value).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        Ok(vec![cast(x, self.to)?.into()])
    }
}

/// `x` as elements of type `to`.
pub(super) fn cast(x: &Tensor, to: DType) -> Result<Tensor, OpError> {
    if x.dtype() == to {
        return Ok(x.clone());
    }
    let shape = x.shape().clone();
    if x.dtype() == DType::String {
        let strings = x.strings()?;
        let parse = |s: &String| s.trim().parse::<f64>().map_err(|_| OpError::input(format!("'{s}' is not a number")));
        let numbers = strings.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        if to.is_integer() {
            return Wide::Int(numbers.into_iter().map(|v| v as i128).collect()).narrow(to, shape);
        }
        return Wide::Float(numbers).narrow(to, shape);
    }
    let wide = match (Wide::of(x)?, to) {
        (Wide::Float(v), DType::Bool) => Wide::Bool(v.into_iter().map(|v| v != 0.0).collect()),
        (Wide::Int(v), DType::Bool) => Wide::Bool(v.into_iter().map(|v| v != 0).collect()),
        (wide, DType::String) => {
            let strings = match wide {
                Wide::Float(v) => v.into_iter().map(|v| (v as f32).to_string()).collect(),
                Wide::Int(v) => v.into_iter().map(|v| v.to_string()).collect(),
                Wide::Bool(v) => v.into_iter().map(|v| if v { "True" } else { "False" }.to_string()).collect(),
            };
            return Ok(Tensor::from_strings(shape, strings)?);
        }
        (Wide::Float(v), _) if to.is_integer() => Wide::Int(v.into_iter().map(|v| v as i128).collect()),
        (Wide::Int(v), _) if to.is_float() => Wide::Float(v.into_iter().map(|v| v as f64).collect()),
        (Wide::Bool(v), _) if to.is_integer() => Wide::Int(v.into_iter().map(i128::from).collect()),
        (Wide::Bool(v), _) if to.is_float() => Wide::Float(v.into_iter().map(|v| f64::from(u8::from(v))).collect()),
        (same, _) => same,
    };
    wide.narrow(to, shape)
}
