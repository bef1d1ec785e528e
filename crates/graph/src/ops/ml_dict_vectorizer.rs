//! A map as a row, by the places of its keys in a vocabulary.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling,
    ml::{ClassLabels, ML_DOMAIN, map_of},
    select_from,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, MapKeys, Shape, Tensor, Value};
use std::collections::HashMap;

/// `y[0, i]` is the value of the vocabulary's word `i`, or 0 (an empty string) where the map does not have it: `[1, words]`.
#[derive(Clone, Debug, PartialEq)]
pub struct DictVectorizer {
    pub vocabulary: ClassLabels,
}

impl Operator for DictVectorizer {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        Ok(DictVectorizer { vocabulary: ClassLabels::import(node, "int64_vocabulary", "string_vocabulary")? }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("DictVectorizer").in_domain(ML_DOMAIN);
        self.vocabulary.export(spelling, "int64_vocabulary", "string_vocabulary")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (key, value) = map_of(inputs, 0)?;
        if key != self.vocabulary.dtype() {
            return Err(OpError::input(format!("a vocabulary of {} for keys of {key}", self.vocabulary.dtype())));
        }
        let shape = vec![Dim::Const(1), Dim::from(self.vocabulary.len())];
        Ok(vec![TensorFact::new(value.dtype, shape).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (keys, values) = match inputs.get(0) {
            Some(Value::Map { keys, values }) => (keys, values),
            other => {
                return Err(OpError::input(format!("expected a map, got {}", other.map_or("nothing", Value::kind))));
            }
        };
        let places: Vec<Option<usize>> = match (keys, &self.vocabulary) {
            (MapKeys::Ints(keys), ClassLabels::Ints(words)) => {
                let places: HashMap<i64, usize> = keys.iter().copied().zip(0..).collect();
                words.iter().map(|word| places.get(word).copied()).collect()
            }
            (MapKeys::Strings(keys), ClassLabels::Strings(words)) => {
                let places: HashMap<&str, usize> = keys.iter().map(String::as_str).zip(0..).collect();
                words.iter().map(|word| places.get(word.as_str()).copied()).collect()
            }
            _ => return Err(OpError::input("the map's keys are of another type than the vocabulary")),
        };
        let nothing = match values.dtype() {
            DType::String => Tensor::from_strings(Shape::scalar(), vec![String::new()])?,
            dtype => Tensor::zeros(dtype, Shape::scalar())?,
        };
        let sources = places.iter().map(|place| place.map_or((1, 0), |place| (0, place)));
        Ok(vec![select_from(&[values, &nothing], [1, places.len()], sources)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, strings, tensor};
    use cutover_tensor::{MapKeys, Value};

    #[test]
    fn words_find_their_values() {
        let texts = |words: &[&str]| words.iter().map(|w| w.to_string()).collect::<Vec<_>>();
        let node = || case("ai.onnx.ml.DictVectorizer", 1);
        let map = || Value::Map { keys: MapKeys::Strings(texts(&["b", "a"])), values: f32s(&[2], &[2.0, 1.0]) };
        let words = || node().with("string_vocabulary", texts(&["a", "x", "b", "a"]));
        words().input(map()).gives([f32s(&[1, 4], &[1.0, 0.0, 2.0, 1.0])]);
        let numbers = Value::Map { keys: MapKeys::Ints(vec![5]), values: strings(&[1], &["five"]) };
        let node_of_ints = || node().with("int64_vocabulary", vec![4, 5]);
        node_of_ints().input(numbers).gives([strings(&[1, 2], &["", "five"])]);
        node_of_ints().input(map()).fails("a vocabulary of i64 for keys of string");
        node_of_ints().input(tensor::<i64>(&[1], &[5])).fails("must be a map");
    }
}
