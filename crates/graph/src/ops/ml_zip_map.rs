//! Rows of scores as maps from the names of classes.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling,
    ml::{ClassLabels, ML_DOMAIN, Rows, row_dim},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, MapKeys, Tensor, Value};

/// For every row of `x` (`[n, classes]`, or `[classes]` for one) the map from class to score.
#[derive(Clone, Debug, PartialEq)]
pub struct ZipMap {
    /// None twice.
    pub classes: ClassLabels,
}

impl Operator for ZipMap {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let classes = ClassLabels::import(node, "classlabels_int64s", "classlabels_strings")?;
        if classes.is_empty() {
            return Err(node.corrupt("has no class labels"));
        }
        let distinct = match &classes {
            ClassLabels::Ints(labels) => labels.iter().collect::<std::collections::HashSet<_>>().len(),
            ClassLabels::Strings(labels) => labels.iter().collect::<std::collections::HashSet<_>>().len(),
        };
        match distinct == classes.len() {
            true => Ok(ZipMap { classes }.into()),
            false => Err(node.corrupt("has a class label twice, and a map has a key once")),
        }
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("ZipMap").in_domain(ML_DOMAIN);
        self.classes.export(spelling, "classlabels_int64s", "classlabels_strings")
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        if x.dtype != DType::F32 {
            return Err(OpError::input(format!("expected f32, got {x}")));
        }
        row_dim(x, Some(self.classes.len()), context)?;
        let map = Fact::Map { key: self.classes.dtype(), value: Box::new(TensorFact::new(DType::F32, vec![]).into()) };
        Ok(vec![Fact::Sequence(Box::new(map))])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let rows = Rows::with_features(x, self.classes.len())?;
        let keys = match &self.classes {
            ClassLabels::Ints(labels) => MapKeys::Ints(labels.to_vec()),
            ClassLabels::Strings(labels) => MapKeys::Strings(labels.to_vec()),
        };
        let values = x.to_vec::<f32>()?;
        let map = |row: &[f32]| {
            let values = Tensor::from_vec([rows.features], row.to_vec())?;
            Ok(Value::Map { keys: keys.clone(), values })
        };
        Ok(vec![Value::Sequence(values.chunks_exact(rows.features).map(map).collect::<Result<_, OpError>>()?)])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};
    use cutover_tensor::{MapKeys, Value};

    #[test]
    fn a_row_is_a_map() {
        let node = || case("ai.onnx.ml.ZipMap", 1).with("classlabels_int64s", vec![4, -2]);
        let map = |values: &[f32]| Value::Map { keys: MapKeys::Ints(vec![4, -2]), values: f32s(&[2], values) };
        let two = Value::Sequence(vec![map(&[1.0, 2.0]), map(&[3.0, 4.0])]);
        node().input(f32s(&[2, 2], &[1.0, 2.0, 3.0, 4.0])).gives([two]);
        node().input(f32s(&[2], &[1.0, 2.0])).gives([Value::Sequence(vec![map(&[1.0, 2.0])])]);
        node().input(f32s(&[0, 2], &[])).gives([Value::Sequence(Vec::new())]);
        let names = vec!["no".to_string(), "yes".to_string()];
        let named = Value::Map { keys: MapKeys::Strings(names.clone()), values: f32s(&[2], &[0.25, 0.75]) };
        let node = case("ai.onnx.ml.ZipMap", 1).with("classlabels_strings", names);
        node.input(f32s(&[1, 2], &[0.25, 0.75])).gives([Value::Sequence(vec![named])]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let node = |labels: Vec<i64>| case("ai.onnx.ml.ZipMap", 1).with("classlabels_int64s", labels);
        node(vec![1, 2]).wave(&[1, 3]).fails("3 features, expected 2");
        node(vec![1, 1]).wave(&[1, 2]).fails("twice");
        node(vec![]).wave(&[1, 2]).fails("no class labels");
        node(vec![1]).input(tensor::<f64>(&[1, 1], &[0.0])).fails("expected f32");
    }
}
