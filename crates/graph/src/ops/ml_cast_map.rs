//! The values of a map as a row.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling,
    ml::{ML_DOMAIN, map_of},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, MapKeys, Tensor, Value};
use std::collections::BTreeMap;

/// The values of a map from i64 to f32 or strings in the order of its keys, as `to` (`[1, n]`).
#[derive(Clone, Debug, PartialEq)]
pub struct CastMap {
    /// f32, i64 or strings.
    pub to: DType,
    /// The value of key `k` is at place `k` of so many; the others are 0 (the string `0.f`, as ONNX Runtime has it), and keys beyond are
    /// left out. `None` where there is no place but for the values there are.
    pub places: Option<usize>,
}

const TYPES: [(DType, &str); 3] = [(DType::F32, "TO_FLOAT"), (DType::I64, "TO_INT64"), (DType::String, "TO_STRING")];

impl Operator for CastMap {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let (to, form) = (node.string("cast_to", "TO_FLOAT")?, node.string("map_form", "DENSE")?);
        let count = node.int("max_map", 1)?;
        let Some(&(to, _)) = TYPES.iter().find(|(_, name)| *name == to) else {
            return Err(node.corrupt(format!("cast_to '{to}', expected TO_FLOAT, TO_INT64 or TO_STRING")));
        };
        let places = match form.as_str() {
            "DENSE" => None,
            "SPARSE" => match usize::try_from(count).ok().filter(|&count| (1..1 << 31).contains(&count)) {
                Some(count) => Some(count),
                None => return Err(node.corrupt(format!("max_map {count}, expected 1 or more"))),
            },
            other => return Err(node.corrupt(format!("map_form '{other}', expected DENSE or SPARSE"))),
        };
        Ok(CastMap { to, places }.into())
    }

    fn export(&self) -> Spelling {
        let name = TYPES.iter().find(|(dtype, _)| *dtype == self.to).map_or("", |(_, name)| name);
        let spelling = Spelling::new("CastMap").in_domain(ML_DOMAIN).with("cast_to", name);
        match self.places {
            None => spelling.with("map_form", "DENSE"),
            Some(count) => spelling.with("map_form", "SPARSE").with("max_map", count as i64),
        }
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        match map_of(inputs, 0)? {
            (DType::I64, value) if matches!(value.dtype, DType::F32 | DType::String) => {}
            (key, value) => {
                return Err(OpError::input(format!("expected a map from i64 to f32 or strings, got {key} to {value}")));
            }
        }
        let count = self.places.map_or_else(|| context.fresh("values"), Dim::from);
        Ok(vec![TensorFact::new(self.to, vec![Dim::Const(1), count]).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let Some(Value::Map { keys: MapKeys::Ints(keys), values }) = inputs.get(0) else {
            return Err(OpError::input("expected a map from i64"));
        };
        let entries: BTreeMap<i64, usize> = keys.iter().copied().zip(0..).collect();
        if let Some((&least, _)) = entries.first_key_value().filter(|&(&key, _)| key < 0 && self.places.is_some()) {
            return Err(OpError::input(format!("key {least} of a map by place, 0 or more expected")));
        }
        let sources: Vec<Option<usize>> = match self.places {
            None => entries.into_values().map(Some).collect(),
            Some(count) => {
                let mut sources = vec![None; context.bounded_len(&[count])?];
                for (key, source) in entries {
                    if let Some(place) = usize::try_from(key).ok().and_then(|key| sources.get_mut(key)) {
                        *place = Some(source);
                    }
                }
                sources
            }
        };
        let shape = [1, sources.len()];
        let texts = if values.dtype() == DType::String { values.strings()? } else { &[] };
        let floats: Vec<f32> = if values.dtype() == DType::String { Vec::new() } else { values.to_vec()? };
        let is_text = values.dtype() == DType::String;
        let refused = |what: &dyn std::fmt::Display, to: &str| OpError::input(format!("'{what}' is no {to}"));
        let float = |i: usize| match is_text {
            true => texts[i].trim().parse::<f32>().map_err(|_| refused(&texts[i], "number")),
            false => Ok(floats[i]),
        };
        let int = |i: usize| match is_text {
            true => texts[i].trim().parse::<i64>().map_err(|_| refused(&texts[i], "integer")),
            false if floats[i].abs() < 9.2e18 => Ok(floats[i] as i64),
            false => Err(refused(&floats[i], "integer")),
        };
        // Six digits after the point, as C has it.
        let text = |i: usize| if is_text { texts[i].clone() } else { format!("{:.6}", floats[i]) };
        let y = match self.to {
            DType::F32 => {
                Tensor::from_vec(shape, sources.iter().map(|s| s.map_or(Ok(0.0), float)).collect::<Result<_, _>>()?)?
            }
            DType::I64 => {
                Tensor::from_vec(shape, sources.iter().map(|s| s.map_or(Ok(0), int)).collect::<Result<_, _>>()?)?
            }
            _ => {
                let texts = sources.iter().map(|s| s.map_or_else(|| "0.f".to_string(), text));
                Tensor::from_strings(shape, texts.collect())?
            }
        };
        Ok(vec![y.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, strings, tensor};
    use cutover_tensor::{MapKeys, Value};

    fn map(values: cutover_tensor::Tensor) -> Value {
        Value::Map { keys: MapKeys::Ints(vec![3, 0]), values }
    }

    #[test]
    fn values_come_in_the_order_of_keys_or_at_their_places() {
        let node = || case("ai.onnx.ml.CastMap", 1);
        let floats = || map(f32s(&[2], &[1.75, -2.5]));
        let texts = || map(strings(&[2], &["7", "-8"]));
        node().input(floats()).gives([f32s(&[1, 2], &[-2.5, 1.75])]);
        node().with("cast_to", "TO_INT64").input(floats()).gives([tensor::<i64>(&[1, 2], &[-2, 1])]);
        node().with("cast_to", "TO_STRING").input(floats()).gives([strings(&[1, 2], &["-2.500000", "1.750000"])]);
        node().input(texts()).gives([f32s(&[1, 2], &[-8.0, 7.0])]);
        let places = |count: i64| node().with("map_form", "SPARSE").with("max_map", count);
        places(5).input(floats()).gives([f32s(&[1, 5], &[-2.5, 0.0, 0.0, 1.75, 0.0])]);
        places(2).with("cast_to", "TO_INT64").input(texts()).gives([tensor::<i64>(&[1, 2], &[-8, 0])]);
        let with_gap = places(2).with("cast_to", "TO_STRING").input(texts());
        with_gap.gives([strings(&[1, 2], &["-8", "0.f"])]);
    }

    #[test]
    fn what_is_no_number_is_refused() {
        let node = || case("ai.onnx.ml.CastMap", 1);
        node().input(map(strings(&[2], &["7", "x"]))).fails("'x' is no number");
        node().with("cast_to", "TO_INT64").input(map(f32s(&[2], &[f32::NAN, 0.0]))).fails("no integer");
        let negative = Value::Map { keys: MapKeys::Ints(vec![-1]), values: f32s(&[1], &[0.0]) };
        node().with("map_form", "SPARSE").input(negative).fails("key -1");
        node().with("map_form", "SPARSE").with("max_map", 0).input(map(f32s(&[2], &[0.0; 2]))).fails("max_map 0");
        node().with("map_form", "LOOSE").input(map(f32s(&[2], &[0.0; 2]))).fails("map_form 'LOOSE'");
    }
}
