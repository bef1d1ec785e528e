//! What the operators of classical machine learning (`ai.onnx.ml`) share: rows of features, class labels, and the functions
//! that turn scores into probabilities. Where the ONNX definition is silent these do as ONNX Runtime does.

use super::{Facts, InferContext, NodeReader, Spelling};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor};
use std::sync::Arc;

pub const ML_DOMAIN: &str = "ai.onnx.ml";

/// The function applied to a row of scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PostTransform {
    None,
    /// Over the row: `exp(s - max) / Σ`.
    Softmax,
    Logistic,
    /// As softmax, but scores within 1e-7 of 0 stay 0 and are not summed.
    SoftmaxZero,
    /// `√2 · erf⁻¹(2·s - 1)`, the inverse by Winitzki's approximation with a = 0.147.
    Probit,
}

const POST_TRANSFORMS: [(PostTransform, &str); 5] = [
    (PostTransform::None, "NONE"),
    (PostTransform::Softmax, "SOFTMAX"),
    (PostTransform::Logistic, "LOGISTIC"),
    (PostTransform::SoftmaxZero, "SOFTMAX_ZERO"),
    (PostTransform::Probit, "PROBIT"),
];

impl PostTransform {
    pub(super) fn import(node: &mut NodeReader) -> Result<PostTransform, ImportError> {
        let name = node.string("post_transform", "NONE")?;
        let known = POST_TRANSFORMS.iter().find(|(_, n)| *n == name);
        known.map(|&(transform, _)| transform).ok_or_else(|| node.corrupt(format!("post_transform '{name}'")))
    }

    pub(super) fn name(self) -> &'static str {
        POST_TRANSFORMS[self as usize].1
    }

    /// As `TreeEnsemble` numbers them.
    pub(super) fn from_code(code: i64) -> Option<PostTransform> {
        usize::try_from(code).ok().and_then(|code| POST_TRANSFORMS.get(code)).map(|&(transform, _)| transform)
    }

    /// In f32, whatever the scores are held in.
    pub fn apply<S: Score>(self, scores: &mut [S]) {
        let each = |scores: &mut [S], f: &mut dyn FnMut(f32) -> f32| {
            scores.iter_mut().for_each(|s| *s = S::from(f(s.single())));
        };
        let max = |scores: &[S]| scores.iter().map(|s| s.single()).fold(f32::MIN, f32::max);
        match self {
            PostTransform::None => {}
            PostTransform::Logistic => each(scores, &mut logistic),
            PostTransform::Probit => each(scores, &mut probit),
            PostTransform::Softmax => {
                let (max, mut sum) = (max(scores), 0.0);
                each(scores, &mut |s| {
                    let power = (s - max).exp();
                    sum += power;
                    power
                });
                each(scores, &mut |s| s / sum);
            }
            PostTransform::SoftmaxZero => {
                let (max, mut sum) = (max(scores), 0.0);
                each(scores, &mut |s| {
                    if s.abs() > 1e-7 {
                        let power = (s - max).exp();
                        sum += power;
                        power
                    } else {
                        s * (-max).exp()
                    }
                });
                each(scores, &mut |s| s / sum);
            }
        }
    }
}

/// What a score is held in.
pub trait Score: Copy + From<f32> {
    fn single(self) -> f32;
}

impl Score for f32 {
    fn single(self) -> f32 {
        self
    }
}

impl Score for f64 {
    fn single(self) -> f32 {
        self as f32
    }
}

pub fn logistic(x: f32) -> f32 {
    let y = 1.0 / (1.0 + (-x.abs()).exp());
    if x < 0.0 { 1.0 - y } else { y }
}

pub fn probit(x: f32) -> f32 {
    std::f32::consts::SQRT_2 * inverse_erf(2.0 * x - 1.0)
}

fn inverse_erf(x: f32) -> f32 {
    const A: f32 = 0.147;
    // Six digits of π, as ONNX Runtime has them.
    #[allow(clippy::approx_constant)]
    const PI: f32 = 3.14159;
    let sign = if x < 0.0 { -1.0 } else { 1.0 };
    let log = ((1.0 - x) * (1.0 + x)).ln();
    let half = 2.0 / (PI * A) + 0.5 * log;
    let root = (half * half - log / A).sqrt() - half;
    sign * root.sqrt()
}

/// The names of classes, in the order of their scores.
#[derive(Clone, Debug, PartialEq)]
pub enum ClassLabels {
    Ints(Arc<[i64]>),
    Strings(Arc<[String]>),
}

impl ClassLabels {
    /// Takes whichever of the two attributes is there; no labels where neither is.
    pub(super) fn import(node: &mut NodeReader, ints: &str, strings: &str) -> Result<ClassLabels, ImportError> {
        let int_labels = node.optional_ints(ints)?.unwrap_or_default();
        let string_labels = node.optional_strings(strings)?.unwrap_or_default();
        match (int_labels.is_empty(), string_labels.is_empty()) {
            (false, false) => Err(node.corrupt(format!("has both '{ints}' and '{strings}', one expected"))),
            (true, false) => Ok(ClassLabels::Strings(string_labels.into())),
            _ => Ok(ClassLabels::Ints(int_labels.into())),
        }
    }

    pub(super) fn export(&self, spelling: Spelling, ints: &'static str, strings: &'static str) -> Spelling {
        match self {
            ClassLabels::Ints(labels) if labels.is_empty() => spelling,
            ClassLabels::Ints(labels) => spelling.with(ints, labels.to_vec()),
            ClassLabels::Strings(labels) => spelling.with(strings, labels.to_vec()),
        }
    }

    pub fn len(&self) -> usize {
        match self {
            ClassLabels::Ints(labels) => labels.len(),
            ClassLabels::Strings(labels) => labels.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn dtype(&self) -> DType {
        match self {
            ClassLabels::Ints(_) => DType::I64,
            ClassLabels::Strings(_) => DType::String,
        }
    }

    /// The labels of the classes `picked`, each of which must be one.
    pub(super) fn tensor(&self, picked: &[usize]) -> Result<Tensor, OpError> {
        let rows = [picked.len()];
        Ok(match self {
            ClassLabels::Ints(labels) => Tensor::from_vec(rows, picked.iter().map(|&i| labels[i]).collect())?,
            ClassLabels::Strings(labels) => {
                Tensor::from_strings(rows, picked.iter().map(|&i| labels[i].clone()).collect())?
            }
        })
    }
}

/// Finite or not, the first of the largest; classes that compare with nothing (NaN) lose to the first.
pub fn largest(scores: &[f32]) -> usize {
    (1..scores.len()).fold(0, |best, i| if scores[i] > scores[best] { i } else { best })
}

/// `x` as rows of features: `[n, features]`, or `[features]` for one row.
pub struct Rows {
    pub count: usize,
    pub features: usize,
}

impl Rows {
    pub(super) fn of(x: &Tensor) -> Result<Rows, OpError> {
        match x.shape()[..] {
            [features] => Ok(Rows { count: 1, features }),
            [count, features] => Ok(Rows { count, features }),
            _ => Err(OpError::input(format!("expected rows of features, got {} {}", x.dtype(), x.shape()))),
        }
    }

    /// As [`Rows::of`], of exactly `features`.
    pub(super) fn with_features(x: &Tensor, features: usize) -> Result<Rows, OpError> {
        let rows = Rows::of(x)?;
        match rows.features == features {
            true => Ok(rows),
            false => Err(OpError::input(format!("rows have {} features, expected {features}", rows.features))),
        }
    }
}

/// The elements as f32, in which scores are computed.
pub(super) fn f32_values(x: &Tensor) -> Result<Vec<f32>, OpError> {
    Ok(match x.dtype() {
        DType::F32 => x.to_vec()?,
        DType::F64 => x.to_vec::<f64>()?.into_iter().map(|v| v as f32).collect(),
        DType::I64 => x.to_vec::<i64>()?.into_iter().map(|v| v as f32).collect(),
        DType::I32 => x.to_vec::<i32>()?.into_iter().map(|v| v as f32).collect(),
        other => return Err(OpError::input(format!("expected f32, f64, i64 or i32, got {other}"))),
    })
}

/// Refuses what is not f32, f64, i64 or i32.
pub(super) fn numeric<'a>(inputs: Facts<'a>, index: usize) -> Result<&'a TensorFact, OpError> {
    let x = inputs.tensor(index)?;
    match x.dtype {
        DType::F32 | DType::F64 | DType::I64 | DType::I32 => Ok(x),
        other => Err(OpError::input(format!("expected f32, f64, i64 or i32, got {other}"))),
    }
}

/// The types of the keys and the values of the map at `index`.
pub(super) fn map_of<'a>(inputs: Facts<'a>, index: usize) -> Result<(DType, &'a TensorFact), OpError> {
    match inputs.get(index) {
        Some(Fact::Map { key, value }) => Ok((*key, value.tensor()?)),
        Some(other) => Err(OpError::input(format!("input {index} must be a map, got {other}"))),
        None => Err(OpError::input(format!("input {index} is missing"))),
    }
}

/// The number of rows, from the shape of `x`; `features` of them are expected, if that is known.
pub(super) fn row_dim(x: &TensorFact, features: Option<usize>, context: &InferContext<'_>) -> Result<Dim, OpError> {
    let (rows, actual) = match x.shape.as_deref() {
        None => return Ok(context.fresh("rows")),
        Some([features]) => (Dim::Const(1), features),
        Some([rows, features]) => (rows.clone(), features),
        Some(_) => return Err(OpError::input(format!("expected rows of features, got {x}"))),
    };
    match (features, actual.as_const()) {
        (Some(expected), Some(actual)) if expected as i64 != actual => {
            Err(OpError::input(format!("rows have {actual} features, expected {expected}")))
        }
        _ => Ok(rows),
    }
}
