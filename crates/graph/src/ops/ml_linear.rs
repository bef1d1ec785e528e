//! Linear models: regression, and classification by the largest score.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling,
    ml::{ClassLabels, ML_DOMAIN, PostTransform, Rows, f32_values, largest, logistic, numeric, row_dim},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};
use std::sync::Arc;

/// `s = x·coefficientsᵀ + intercepts` for rows `x` (`[n, features]`), then the post transform over each row of `s` (`[n, targets]`,
/// f32, which is also the type it is computed in).
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// `[targets, features]`.
    pub coefficients: Arc<[f32]>,
    /// One a target.
    pub intercepts: Arc<[f32]>,
    pub post_transform: PostTransform,
    pub output: LinearOutput,
}

/// What a linear model gives.
#[derive(Clone, Debug, PartialEq)]
pub enum LinearOutput {
    /// The transformed scores.
    Regression,
    /// Labels (`[n]`), and the transformed scores. Of one target the label is that of a positive or negative score, 1 and 0 where
    /// there are no labels; with two labels the scores become `[1 - s, s]`, or `[1 - logistic(s), logistic(s)]`.
    Classification(ClassLabels),
}

impl Linear {
    pub fn targets(&self) -> usize {
        self.intercepts.len()
    }

    pub fn features(&self) -> usize {
        self.coefficients.len() / self.targets()
    }

    /// Scores a row has in the end.
    pub fn columns(&self) -> usize {
        match &self.output {
            LinearOutput::Classification(labels) if self.targets() == 1 && labels.len() == 2 => 2,
            _ => self.targets(),
        }
    }

    /// From the raw scores of a row (`[targets]`) to its class and what it gives (`[columns]`).
    pub fn finish(&self, scores: &[f32], result: &mut [f32]) -> usize {
        let class = match scores {
            &[score] => usize::from(score > 0.0),
            _ => largest(scores),
        };
        match (scores, self.post_transform, &mut *result) {
            (&[score], PostTransform::Logistic, [negative, positive]) => {
                (*negative, *positive) = (logistic(-score), logistic(score));
            }
            (&[score], PostTransform::Probit, pair @ [_, _]) => {
                pair.copy_from_slice(&[1.0 - score, score]);
                PostTransform::Probit.apply(pair);
            }
            (&[score], _, [negative, positive]) => (*negative, *positive) = (1.0 - score, score),
            (&[score], PostTransform::Probit, [one]) => *one = super::ml::probit(score),
            // Of one target every other transform is the identity.
            (&[score], _, [one]) => *one = score,
            (_, transform, result) => {
                result.copy_from_slice(scores);
                transform.apply(result);
            }
        }
        class
    }

    /// The labels of classes that [`Linear::finish`] gave.
    pub fn labels(&self, classes: &[usize]) -> Result<Option<Tensor>, OpError> {
        match &self.output {
            LinearOutput::Regression => Ok(None),
            LinearOutput::Classification(labels) if labels.is_empty() => {
                Ok(Some(Tensor::from_vec([classes.len()], classes.iter().map(|&c| c as i64).collect())?))
            }
            LinearOutput::Classification(labels) => labels.tensor(classes).map(Some),
        }
    }
}

impl Operator for Linear {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let coefficients = node.optional_floats("coefficients")?.unwrap_or_default();
        let mut intercepts = node.optional_floats("intercepts")?.unwrap_or_default();
        let post_transform = PostTransform::import(node)?;
        let output = if node.op_type == "LinearRegressor" {
            let targets = node.count("targets", 1)?;
            if targets > coefficients.len() {
                return Err(node.corrupt(format!("has {targets} targets and {} coefficients", coefficients.len())));
            }
            // ONNX Runtime takes intercepts only where there is one a target.
            if intercepts.len() != targets {
                intercepts = vec![0.0; targets];
            }
            LinearOutput::Regression
        } else {
            // Says how the model was trained, which changes nothing here.
            node.optional_int("multi_class")?;
            let labels = ClassLabels::import(node, "classlabels_ints", "classlabels_strings")?;
            if intercepts.is_empty() {
                intercepts = vec![0.0; labels.len()];
            }
            let fits = match intercepts.len() {
                1 => matches!(labels.len(), 0 | 2),
                targets => labels.len() == targets,
            };
            if !fits {
                let (targets, labels) = (intercepts.len(), labels.len());
                return Err(node.corrupt(format!("has {labels} class labels for {targets} rows of coefficients")));
            }
            LinearOutput::Classification(labels)
        };
        let targets = intercepts.len();
        if targets == 0 || coefficients.is_empty() || !coefficients.len().is_multiple_of(targets) {
            let count = coefficients.len();
            return Err(node.corrupt(format!("has {count} coefficients, expected a multiple of its {targets} targets")));
        }
        Ok(Linear { coefficients: coefficients.into(), intercepts: intercepts.into(), post_transform, output }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = match &self.output {
            LinearOutput::Regression => Spelling::new("LinearRegressor").with("targets", self.targets() as i64),
            LinearOutput::Classification(labels) => {
                labels.export(Spelling::new("LinearClassifier"), "classlabels_ints", "classlabels_strings")
            }
        };
        spelling
            .in_domain(ML_DOMAIN)
            .with("coefficients", self.coefficients.to_vec())
            .with("intercepts", self.intercepts.to_vec())
            .with("post_transform", self.post_transform.name())
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let rows = row_dim(numeric(inputs, 0)?, Some(self.features()), context)?;
        let scores = TensorFact::new(DType::F32, vec![rows.clone(), Dim::from(self.columns())]).into();
        Ok(match &self.output {
            LinearOutput::Regression => vec![scores],
            LinearOutput::Classification(labels) => vec![TensorFact::new(labels.dtype(), vec![rows]).into(), scores],
        })
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let rows = Rows::with_features(x, self.features())?;
        let columns = self.columns();
        let shape = [rows.count, columns];
        let mut result = vec![0f32; context.bounded_len(&shape)?];
        let (mut classes, mut scores) = (Vec::with_capacity(rows.count), vec![0f32; self.targets()]);
        let values = f32_values(x)?;
        for (row, result) in (0..rows.count).zip(result.chunks_exact_mut(columns)) {
            let x = &values[row * rows.features..][..rows.features];
            for ((score, weights), intercept) in
                scores.iter_mut().zip(self.coefficients.chunks_exact(rows.features)).zip(&*self.intercepts)
            {
                let sum: f64 = x.iter().zip(weights).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                *score = (sum + f64::from(*intercept)) as f32;
            }
            classes.push(self.finish(&scores, result));
        }
        let labels = self.labels(&classes)?;
        let scores = Tensor::from_vec(shape, result)?;
        Ok(labels.into_iter().chain([scores]).map(Value::Tensor).collect())
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, tensor};

    fn classifier() -> Case {
        let x = f32s(&[3, 2], &[1.0, 2.0, -3.0, 0.5, 0.0, 0.0]);
        case("ai.onnx.ml.LinearClassifier", 1).input(x)
    }

    /// Values from ONNX Runtime.
    #[test]
    fn a_score_above_zero_is_the_second_of_two_classes() {
        let one = || classifier().with("coefficients", vec![0.3, 0.1]).with("intercepts", vec![0.05]);
        let two = || one().with("classlabels_ints", vec![5, 6]);
        let labels = || tensor::<i64>(&[3], &[6, 5, 6]);
        let complement = || f32s(&[3, 2], &[0.45, 0.55, 1.8, -0.8, 0.95, 0.05]);
        two().gives([labels(), complement()]);
        two().with("post_transform", "SOFTMAX").gives([labels(), complement()]);
        let logistic = f32s(&[3, 2], &[0.3658644, 0.6341356, 0.6899745, 0.3100255, 0.4875026, 0.5124974]);
        two().with("post_transform", "LOGISTIC").gives([labels(), logistic]);
        let alone = f32s(&[3, 1], &[0.55, -0.8, 0.05]);
        one().with("post_transform", "LOGISTIC").gives([tensor::<i64>(&[3], &[1, 0, 1]), alone]);
        let probit = f32s(&[3, 1], &[0.12566201, f32::NAN, -1.6446697]);
        one().with("post_transform", "PROBIT").gives([tensor::<i64>(&[3], &[1, 0, 1]), probit]);
    }

    #[test]
    fn the_largest_score_is_the_class_of_several() {
        let three = || {
            let model = classifier().with("coefficients", vec![0.3, 0.1, -0.3, 0.2, 0.0, 0.0]);
            model.with("intercepts", vec![0.05, 0.02, 0.0]).with("classlabels_ints", vec![5, 6, 9])
        };
        let labels = || tensor::<i64>(&[3], &[5, 6, 5]);
        let scores = f32s(&[3, 3], &[0.55, 0.12, 0.0, -0.8, 1.02, 0.0, 0.05, 0.02, 0.0]);
        three().gives([labels(), scores]);
        let softmax = [0.4489421, 0.2920409, 0.259017, 0.1064124, 0.6567624, 0.236825, 0.3422694, 0.3321538, 0.3255768];
        three().with("post_transform", "SOFTMAX").gives([labels(), f32s(&[3, 3], &softmax)]);
        let nonzero = [0.6058736, 0.3941263, 0.0, 0.1394339, 0.8605661, 0.0, 0.5074995, 0.4925005, 0.0];
        three().with("post_transform", "SOFTMAX_ZERO").gives([labels(), f32s(&[3, 3], &nonzero)]);
        let probit = |x: f32, y: f32| [x, y, f32::NEG_INFINITY];
        let rows = [probit(0.12566201, -1.1751714), probit(f32::NAN, f32::NAN), probit(-1.6446697, -2.052535)];
        three().with("post_transform", "PROBIT").gives([labels(), f32s(&[3, 3], &rows.concat())]);
    }

    #[test]
    fn labels_may_be_strings_and_a_vector_is_one_row() {
        let case = case("ai.onnx.ml.LinearClassifier", 1).input(f32s(&[2], &[1.0, 2.0]));
        let case = case.with("coefficients", vec![0.3, 0.1, -0.3, 0.2]).with("intercepts", vec![0.05, 0.02]);
        let labels = cutover_tensor::Tensor::from_strings([1], vec!["yes".to_string()]).unwrap();
        let strings = vec!["yes".to_string(), "no".to_string()];
        case.with("classlabels_strings", strings).gives([labels, f32s(&[1, 2], &[0.55, 0.12])]);
    }

    #[test]
    fn regression_agrees_with_onnx_runtime() {
        let x = || f32s(&[3, 2], &[1.0, 2.0, -3.0, 0.5, 0.0, 0.0]);
        let model = || case("ai.onnx.ml.LinearRegressor", 1).input(x());
        let one = || model().with("coefficients", vec![0.3, 0.1]).with("intercepts", vec![0.05]);
        one().gives([f32s(&[3, 1], &[0.55, -0.8, 0.05])]);
        one().with("post_transform", "SOFTMAX").gives([f32s(&[3, 1], &[0.55, -0.8, 0.05])]);
        let two = || model().with("coefficients", vec![0.3, 0.1, 0.2, 0.4]).with("targets", 2);
        two().gives([f32s(&[3, 2], &[0.5, 1.0, -0.85, -0.4, 0.0, 0.0])]);
        let logistic = f32s(&[3, 2], &[0.6224593, 0.7310586, 0.2994329, 0.4013124, 0.5, 0.5]);
        two().with("post_transform", "LOGISTIC").gives([logistic]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        classifier().with("coefficients", vec![0.3, 0.1, 0.2]).with("classlabels_ints", vec![1, 2]).fails("multiple");
        classifier().with("coefficients", vec![0.3]).with("intercepts", vec![0.0]).fails("expected 1");
        classifier().with("coefficients", vec![0.3]).with("intercepts", vec![0.0; 3]).fails("0 class labels");
        classifier().with("coefficients", vec![0.3]).with("post_transform", "RELU").fails("RELU");
        case("ai.onnx.ml.LinearRegressor", 1).wave(&[1, 2]).with("targets", 1 << 30).fails("0 coefficients");
    }
}
