//! Labels to other labels, by a table.

use super::{
    CategoryMapper, EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, select_from,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Shape, Tensor, Value};
use std::collections::HashMap;

/// Each element of `x` that is a key becomes the key's value, any other the default. Where a key is there twice the last counts; NaN is equal to NaN.
#[derive(Clone, Debug, PartialEq)]
pub struct LabelEncoder {
    /// `[n]`, of the type of `x`.
    pub keys: Tensor,
    /// `[n]`, of the type of the result.
    pub values: Tensor,
    /// One element.
    pub default: Tensor,
}

#[derive(PartialEq, Eq, Hash)]
enum Key<'a> {
    Text(&'a str),
    Int(i128),
    /// The bits of a float: one for every NaN, one for both zeros.
    Float(u64),
}

fn keys(tensor: &Tensor) -> Result<Vec<Key<'_>>, OpError> {
    if tensor.dtype() == DType::String {
        return Ok(tensor.strings()?.iter().map(|text| Key::Text(text)).collect());
    }
    let float = |v: f64| Key::Float(if v.is_nan() { f64::NAN.to_bits() } else { (v + 0.0).to_bits() });
    Ok(match Wide::of(tensor)? {
        Wide::Int(values) => values.into_iter().map(Key::Int).collect(),
        Wide::Bool(values) => values.into_iter().map(|v| Key::Int(v.into())).collect(),
        Wide::Float(values) => values.into_iter().map(float).collect(),
    })
}

/// The one of `keys_…` or `values_…` that is there, as a list.
fn table(node: &mut NodeReader, stem: &str) -> Result<Tensor, ImportError> {
    let mut tables = Vec::new();
    let mut add = |node: &NodeReader, tensor: Result<Tensor, cutover_tensor::TensorError>| {
        tables.push(tensor.map_err(|e| node.corrupt(e.to_string()))?);
        Ok::<(), ImportError>(())
    };
    if let Some(v) = node.optional_ints(&format!("{stem}_int64s"))? {
        add(node, Tensor::from_vec([v.len()], v))?;
    }
    if let Some(v) = node.optional_floats(&format!("{stem}_floats"))? {
        add(node, Tensor::from_vec([v.len()], v))?;
    }
    if let Some(v) = node.optional_strings(&format!("{stem}_strings"))? {
        add(node, Tensor::from_strings([v.len()], v))?;
    }
    if let Some(v) = node.optional_tensor(&format!("{stem}_tensor"))? {
        add(node, v.reshape([v.element_count()]))?;
    }
    match <[Tensor; 1]>::try_from(tables) {
        Ok([table]) => Ok(table),
        Err(tables) => Err(node.corrupt(format!("has {} of '{stem}_…', 1 expected", tables.len()))),
    }
}

/// What an element that is no key becomes.
fn default(node: &mut NodeReader, dtype: DType) -> Result<Tensor, ImportError> {
    let (int, float) = (node.optional_int("default_int64")?, node.optional_float("default_float")?);
    let (text, tensor) = (node.optional_string("default_string")?, node.optional_tensor("default_tensor")?);
    // Those of other types may be there too: they have default values of their own.
    if let Some(tensor) = tensor {
        if tensor.dtype() != dtype || tensor.element_count() != 1 {
            return Err(node.corrupt(format!("default_tensor is {tensor:?}, one {dtype} expected")));
        }
        return tensor.reshape(Shape::scalar()).map_err(|e| node.corrupt(e.to_string()));
    }
    if dtype == DType::String {
        let text = text.unwrap_or_else(|| "_Unused".to_string());
        return Tensor::from_strings(Shape::scalar(), vec![text]).map_err(|e| node.corrupt(e.to_string()));
    }
    let wide = match dtype.is_float() {
        true => Wide::Float(vec![float.unwrap_or(-0.0).into()]),
        false => Wide::Int(vec![int.unwrap_or(-1).into()]),
    };
    wide.narrow(dtype, Shape::scalar()).map_err(|e| node.unsupported(e.to_string()))
}

impl Operator for LabelEncoder {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        if node.opset < 2 {
            let strings = node.optional_strings("classes_strings")?.unwrap_or_default();
            let default_string = node.string("default_string", "_Unused")?;
            let default_int = node.int("default_int64", -1)?;
            let ints = (0..strings.len() as i64).collect();
            return Ok(CategoryMapper { ints, strings, default_int, default_string }.into());
        }
        let (keys, values) = (table(node, "keys")?, table(node, "values")?);
        if keys.element_count() != values.element_count() {
            let (keys, values) = (keys.element_count(), values.element_count());
            return Err(node.corrupt(format!("{keys} keys and {values} values")));
        }
        let default = default(node, values.dtype())?;
        Ok(LabelEncoder { keys, values, default }.into())
    }

    fn export(&self) -> Spelling {
        let with = |spelling: Spelling, names: [&'static str; 4], tensor: &Tensor| match tensor.dtype() {
            DType::I64 => spelling.with(names[0], tensor.to_vec::<i64>().unwrap_or_default()),
            DType::F32 => spelling.with(names[1], tensor.to_vec::<f32>().unwrap_or_default()),
            DType::String => spelling.with(names[2], tensor.strings().unwrap_or_default().to_vec()),
            _ => spelling.with(names[3], tensor.clone()),
        };
        let spelling = Spelling::new("LabelEncoder").in_domain("ai.onnx.ml");
        let spelling = with(spelling, ["keys_int64s", "keys_floats", "keys_strings", "keys_tensor"], &self.keys);
        let names = ["values_int64s", "values_floats", "values_strings", "values_tensor"];
        let spelling = with(spelling, names, &self.values);
        match self.default.dtype() {
            DType::I64 => spelling.with("default_int64", self.default.to_vec::<i64>().unwrap_or_default()[0]),
            DType::F32 => spelling.with("default_float", self.default.to_vec::<f32>().unwrap_or_default()[0]),
            DType::String => spelling.with("default_string", self.default.strings().unwrap_or_default()[0].as_str()),
            _ => spelling.with("default_tensor", self.default.reshape([1]).unwrap_or_else(|_| self.default.clone())),
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        if x.dtype != self.keys.dtype() {
            return Err(OpError::input(format!("keys of {} for {x}", self.keys.dtype())));
        }
        Ok(vec![TensorFact { dtype: self.values.dtype(), shape: x.shape.clone(), value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        if x.dtype() != self.keys.dtype() {
            return Err(OpError::input(format!("keys of {} for labels of {}", self.keys.dtype(), x.dtype())));
        }
        let places: HashMap<Key<'_>, usize> = keys(&self.keys)?.into_iter().zip(0..).collect();
        let sources: Vec<(usize, usize)> =
            keys(x)?.iter().map(|key| places.get(key).map_or((1, 0), |&place| (0, place))).collect();
        let y = select_from(&[&self.values, &self.default], x.shape().clone(), sources.into_iter())?;
        Ok(vec![y.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, strings, tensor};

    const NAME: &str = "ai.onnx.ml.LabelEncoder";

    fn texts(values: &[&str]) -> Vec<String> {
        values.iter().map(|v| v.to_string()).collect()
    }

    #[test]
    fn labels_become_others() {
        let x = || strings(&[2, 2], &["a", "b", "", "c"]);
        let node = |opset: i64| -> Case { case(NAME, opset).with("keys_strings", texts(&["a", "b", "c"])) };
        let to = || node(2).with("values_int64s", vec![1, 2, 3]).input(x());
        to().gives([tensor(&[2, 2], &[1i64, 2, -1, 3])]);
        to().with("default_int64", 9).gives([tensor(&[2, 2], &[1i64, 2, 9, 3])]);
        to().with("default_string", "unused").gives([tensor(&[2, 2], &[1i64, 2, -1, 3])]);
        node(4).with("values_floats", vec![1f32, 2.0, 3.0]).input(x()).gives([f32s(&[2, 2], &[1.0, 2.0, -0.0, 3.0])]);
        let same = node(4).with("values_strings", texts(&["x", "y", "z"])).input(x());
        same.gives([strings(&[2, 2], &["x", "y", "_Unused", "z"])]);
        let shorts = || node(4).with("values_tensor", tensor(&[3], &[0i16, 1, 2])).input(x());
        shorts().with("default_tensor", tensor(&[1], &[42i16])).gives([tensor(&[2, 2], &[0i16, 1, 42, 2])]);
        shorts().gives([tensor(&[2, 2], &[0i16, 1, -1, 2])]);
        shorts().with("default_tensor", tensor(&[1], &[42i32])).fails("one i16 expected");
        node(2).with("values_int64s", vec![1, 2, 3]).input(strings(&[0], &[])).gives([tensor(&[0], &[0i64; 0])]);
    }

    #[test]
    fn numbers_are_keys_by_value() {
        let floats = |opset: i64, keys: Vec<f32>| case(NAME, opset).with("keys_floats", keys);
        let node = floats(4, vec![f32::NAN, 0.0, 1.5, 1.5]).with("values_int64s", vec![10, 20, 30, 40]);
        let x = f32s(&[5], &[-f32::NAN, -0.0, 1.5, 2.0, 0.0]);
        node.input(x).gives([tensor(&[5], &[10i64, 20, 40, -1, 20])]);
        let doubles = case(NAME, 4).with("keys_tensor", tensor(&[2], &[0.1f64, 0.2]));
        let doubles =
            doubles.with("values_strings", texts(&["x", "y"])).input(tensor(&[2], &[0.2f64, f64::from(0.1f32)]));
        doubles.gives([strings(&[2], &["y", "_Unused"])]);
    }

    #[test]
    fn contradictions_are_refused() {
        let node = || case(NAME, 4).with("keys_int64s", vec![1, 2]).input(tensor(&[1], &[1i64]));
        node().with("values_int64s", vec![1]).fails("2 keys and 1 values");
        node().fails("has 0 of 'values_…'");
        node().with("values_int64s", vec![1, 2]).with("values_floats", vec![1f32, 2.0]).fails("has 2 of 'values_…'");
        let other = case(NAME, 4).with("keys_int64s", vec![1]).with("values_int64s", vec![1]);
        other.input(tensor(&[1], &[1i32])).fails("keys of i64 for i32[1]");
    }

    #[test]
    fn the_first_opset_maps_either_way() {
        let node = || case(NAME, 1).with("classes_strings", texts(&["a", "b"]));
        node().input(strings(&[3], &["b", "a", "z"])).gives([tensor(&[3], &[1i64, 0, -1])]);
        node().input(tensor(&[3], &[0i64, 2, 1])).gives([strings(&[3], &["a", "_Unused", "b"])]);
    }
}
