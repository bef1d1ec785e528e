//! Categories as rows of zeros and a one.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    ml::{ClassLabels, ML_DOMAIN, numeric},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};
use std::collections::HashMap;

/// `y[…, c] = 1` where the element of `x` is category `c`, else 0 (f32). Floats are cut to integers. An element that is no category gives
/// zeros alone, or is refused. Where a category is there twice the last counts.
#[derive(Clone, Debug, PartialEq)]
pub struct OneHotEncoder {
    pub categories: ClassLabels,
    /// Elements that are no category give zeros.
    pub zeros: bool,
}

impl Operator for OneHotEncoder {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let categories = ClassLabels::import(node, "cats_int64s", "cats_strings")?;
        let zeros = node.int("zeros", 1)? != 0;
        match categories.is_empty() {
            true => Err(node.corrupt("has no categories")),
            false => Ok(OneHotEncoder { categories, zeros }.into()),
        }
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("OneHotEncoder").in_domain(ML_DOMAIN).with("zeros", i64::from(self.zeros));
        self.categories.export(spelling, "cats_int64s", "cats_strings")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = match self.categories {
            ClassLabels::Ints(_) => numeric(inputs, 0)?,
            ClassLabels::Strings(_) => inputs.strings(0)?,
        };
        let categories = Dim::from(self.categories.len());
        let shape = x.shape.as_ref().map(|shape| [&shape[..], &[categories]].concat());
        Ok(vec![TensorFact { dtype: DType::F32, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let places: Vec<Option<usize>> = match &self.categories {
            ClassLabels::Strings(categories) => {
                let places: HashMap<&str, usize> = categories.iter().map(String::as_str).zip(0..).collect();
                x.strings()?.iter().map(|text| places.get(text.as_str()).copied()).collect()
            }
            ClassLabels::Ints(categories) => {
                let places: HashMap<i64, usize> = categories.iter().copied().zip(0..).collect();
                // What no i64 is, NaN too, is no category.
                let cut = |x: f64| (x.abs() < 9.2e18).then_some(x as i64);
                let category = |x: Option<i64>| x.and_then(|x| places.get(&x).copied());
                match Wide::of(x)? {
                    Wide::Float(values) => values.into_iter().map(|x| category(cut(x))).collect(),
                    Wide::Int(values) => values.into_iter().map(|x| category(i64::try_from(x).ok())).collect(),
                    Wide::Bool(_) => return Err(OpError::input("expected numbers, got bool")),
                }
            }
        };
        let width = self.categories.len();
        let shape = [x.shape().dims(), &[width]].concat();
        let mut y = vec![0f32; context.bounded_len(&shape)?];
        for (index, place) in places.into_iter().enumerate() {
            match place {
                Some(place) => y[index * width + place] = 1.0,
                None if self.zeros => {}
                None => return Err(OpError::input(format!("element {index} is none of the {width} categories"))),
            }
        }
        Ok(vec![Tensor::from_vec(shape, y)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, strings, tensor};

    const NAME: &str = "ai.onnx.ml.OneHotEncoder";

    #[test]
    fn a_category_is_a_one_among_zeros() {
        let ints = || case(NAME, 1).with("cats_int64s", vec![3, -1, 7]);
        let rows = || f32s(&[2, 1, 3], &[0.0, 0.0, 1.0, 0.0, 1.0, 0.0]);
        ints().input(tensor::<i64>(&[2, 1], &[7, -1])).gives([rows()]);
        ints().input(f32s(&[2, 1], &[7.9, -1.5])).gives([rows()]);
        ints().input(tensor::<i32>(&[1], &[4])).gives([f32s(&[1, 3], &[0.0; 3])]);
        ints().input(f32s(&[1], &[f32::NAN])).gives([f32s(&[1, 3], &[0.0; 3])]);
        let texts = || case(NAME, 1).with("cats_strings", vec!["a".to_string(), "b".to_string()]);
        texts().input(strings(&[3], &["b", "", "a"])).gives([f32s(&[3, 2], &[0.0, 1.0, 0.0, 0.0, 1.0, 0.0])]);
        texts().with("zeros", 0).input(strings(&[1], &["b"])).gives([f32s(&[1, 2], &[0.0, 1.0])]);
    }

    #[test]
    fn what_is_no_category_may_be_refused() {
        let node = || case(NAME, 1).with("cats_int64s", vec![3, -1, 7]);
        node().with("zeros", 0).input(tensor::<i64>(&[2], &[3, 4])).fails("element 1 is none of the 3");
        node().input(strings(&[1], &["3"])).fails("expected f32");
        case(NAME, 1).wave(&[1]).fails("no categories");
    }
}
