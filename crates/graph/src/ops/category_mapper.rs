//! Names of categories to their numbers, and back.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};
use std::collections::HashMap;

/// Strings become the integers beside them in the table, and i64s the strings; what is not in it, the default of the result's type. Where one is
/// there twice the last counts.
#[derive(Clone, Debug, PartialEq)]
pub struct CategoryMapper {
    pub ints: Vec<i64>,
    pub strings: Vec<String>,
    pub default_int: i64,
    pub default_string: String,
}

impl CategoryMapper {
    fn result(&self, dtype: DType) -> Result<DType, OpError> {
        match dtype {
            DType::String => Ok(DType::I64),
            DType::I64 => Ok(DType::String),
            other => Err(OpError::input(format!("expected strings or i64, got {other}"))),
        }
    }
}

impl Operator for CategoryMapper {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let ints = node.optional_ints("cats_int64s")?.unwrap_or_default();
        let strings = node.optional_strings("cats_strings")?.unwrap_or_default();
        if ints.len() != strings.len() {
            return Err(node.corrupt(format!("{} cats_int64s and {} cats_strings", ints.len(), strings.len())));
        }
        let default_int = node.int("default_int64", -1)?;
        let default_string = node.string("default_string", "_Unused")?;
        Ok(CategoryMapper { ints, strings, default_int, default_string }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("CategoryMapper")
            .in_domain("ai.onnx.ml")
            .with("cats_int64s", self.ints.clone())
            .with("cats_strings", self.strings.clone())
            .with("default_int64", self.default_int)
            .with("default_string", self.default_string.as_str())
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        Ok(vec![TensorFact { dtype: self.result(x.dtype)?, shape: x.shape.clone(), value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let pairs = self.ints.iter().zip(&self.strings);
        let y = match self.result(x.dtype())? {
            DType::I64 => {
                let table: HashMap<&str, i64> = pairs.map(|(&int, text)| (text.as_str(), int)).collect();
                let of = |text: &String| table.get(text.as_str()).copied().unwrap_or(self.default_int);
                Tensor::from_vec(x.shape().clone(), x.strings()?.iter().map(of).collect())?
            }
            _ => {
                let table: HashMap<i64, &str> = pairs.map(|(&int, text)| (int, text.as_str())).collect();
                let mut bytes = 0usize;
                let of = |int| {
                    let text = table.get(&int).copied().unwrap_or(&self.default_string);
                    bytes = bytes.saturating_add(text.len());
                    context.bounded_len(&[bytes])?;
                    Ok(text.to_string())
                };
                let texts = x.to_vec::<i64>()?.into_iter().map(of).collect::<Result<Vec<_>, OpError>>()?;
                Tensor::from_strings(x.shape().clone(), texts)?
            }
        };
        Ok(vec![y.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, strings, tensor};

    #[test]
    fn categories_map_either_way() {
        let node = |ints: &[i64]| -> Case {
            let texts = ["a", "b", "c"].map(String::from).to_vec();
            case("ai.onnx.ml.CategoryMapper", 1).with("cats_int64s", ints.to_vec()).with("cats_strings", texts)
        };
        let numbers = [7, 8, 7];
        node(&numbers).input(strings(&[2, 2], &["a", "b", "c", "d"])).gives([tensor(&[2, 2], &[7i64, 8, 7, -1])]);
        node(&numbers).input(tensor(&[3], &[7i64, 8, 9])).gives([strings(&[3], &["c", "b", "_Unused"])]);
        node(&numbers).with("default_int64", 0).input(strings(&[1], &[""])).gives([tensor(&[1], &[0i64])]);
        node(&numbers).with("default_string", "?").input(tensor(&[], &[0i64])).gives([strings(&[], &["?"])]);
        node(&numbers).input(strings(&[0], &[])).gives([tensor(&[0], &[0i64; 0])]);
        node(&[7]).input(strings(&[1], &["a"])).fails("1 cats_int64s and 3 cats_strings");
        node(&numbers).input(f32s(&[1], &[7.0])).fails("expected strings or i64, got f32");
    }
}
