//! What a student is to lessen, and what it is judged by.

use super::{
    Losses,
    differentiable::{Arithmetic, Reduction, RowFunction, binary, cosine, matmul, of_rows, read, reduce, unary},
};
use candle_core::{DType, Device, Result, Tensor, bail};
use cutover_graph::{
    Graph, Op, ValueId,
    ops::{SoftmaxFunction, UnaryFunction},
};

/// The value whose rows along the last axis are logits: what the softmax that gives `output` reads, or `output` itself.
pub(super) fn logits(graph: &Graph, output: ValueId) -> ValueId {
    let Some((node, _)) = graph.producer(output) else { return output };
    let node = graph.node(node);
    match (&node.op, node.inputs.first()) {
        (Op::Softmax(op), Some(&Some(input))) => {
            let rank = graph.value(output).fact.as_tensor().and_then(|fact| fact.rank());
            let is_last = op.axis == -1 || rank.is_some_and(|rank| op.axis == rank as i64 - 1);
            if is_last && op.function == SoftmaxFunction::Softmax { input } else { output }
        }
        _ => output,
    }
}

/// What a batch of the student and its teacher gave.
pub(super) struct Answers<'a> {
    /// Of every output that is compared.
    pub outputs: &'a [Tensor],
    pub logits: &'a [Tensor],
    pub features: &'a [Tensor],
    pub teacher: Option<Teacher<'a>>,
    /// A class for every row of the first output's logits.
    pub labels: Option<&'a [i64]>,
}

/// The same of a teacher.
pub(super) struct Teacher<'a> {
    pub outputs: &'a [Tensor],
    pub logits: &'a [Tensor],
    pub features: &'a [Tensor],
}

/// The sum of all losses that have a weight, each a mean over its elements or rows.
pub(super) fn loss(
    answers: &Answers<'_>,
    weights: &Losses,
    temperature: f64,
    projections: &[Option<Tensor>],
) -> Result<Tensor> {
    let mut terms: Vec<Tensor> = Vec::new();
    let mut add = |weight: f64, term: Tensor| -> Result<()> {
        terms.push(term.affine(weight, 0.0)?);
        Ok(())
    };
    if let Some(teacher) = &answers.teacher {
        let share = 1.0 / answers.outputs.len().max(1) as f64;
        for (i, student) in answers.outputs.iter().enumerate() {
            if weights.soft > 0.0 {
                add(weights.soft * share, soft(&answers.logits[i], &teacher.logits[i], temperature)?)?;
            }
            if weights.mse > 0.0 {
                add(weights.mse * share, mean_square(student, &teacher.outputs[i])?)?;
            }
            if weights.cosine > 0.0 {
                add(weights.cosine * share, mean(&cosine(student, &teacher.outputs[i])?)?.affine(-1.0, 1.0)?)?;
            }
        }
        for (i, feature) in weights.features.iter().enumerate() {
            let (student, teacher) = (&answers.features[i], &teacher.features[i]);
            let student = match &projections[i] {
                Some(projection) => matmul(student, projection)?,
                None => student.clone(),
            };
            add(feature.weight, mean_square(&student, teacher)?)?;
        }
    }
    if let (Some(labels), true) = (answers.labels, weights.labels > 0.0) {
        add(weights.labels, cross_entropy(&answers.logits[0], labels)?)?;
    }
    let mut terms = terms.into_iter();
    let Some(first) = terms.next() else { bail!("nothing to lessen: no loss has a weight and what it compares with") };
    terms.try_fold(first, |sum, term| sum + term)
}

/// `T² · KL(teacher ‖ student)` at temperature `T`, the mean over rows (Hinton et al. 2015).
fn soft(student: &Tensor, teacher: &Tensor, temperature: f64) -> Result<Tensor> {
    let colder = |x: &Tensor| x.affine(1.0 / temperature, 0.0);
    let ours = of_rows(RowFunction::LogSoftmax, &colder(student)?)?;
    let theirs = of_rows(RowFunction::LogSoftmax, &colder(teacher)?)?;
    let share = unary(UnaryFunction::Exp, &theirs)?;
    let gaps = binary(Arithmetic::Mul, &share, &binary(Arithmetic::Sub, &theirs, &ours)?)?;
    mean(&reduce(Reduction::Sum, &gaps)?)?.affine(temperature * temperature, 0.0)
}

pub(super) fn cross_entropy(logits: &Tensor, labels: &[i64]) -> Result<Tensor> {
    let classes = logits.dims().last().copied().unwrap_or(1);
    let rows = logits.elem_count() / classes.max(1);
    if rows != labels.len() {
        bail!("{} labels for {rows} rows of the first output", labels.len());
    }
    let mut targets = Vec::with_capacity(rows);
    for &label in labels {
        match u32::try_from(label).ok().filter(|&label| (label as usize) < classes) {
            Some(label) => targets.push(label),
            None => bail!("label {label}, expected one below {classes}"),
        }
    }
    let shares = of_rows(RowFunction::LogSoftmax, logits)?.reshape((rows, classes))?;
    candle_nn::loss::nll(&shares, &Tensor::from_vec(targets, rows, &Device::Cpu)?)
}

pub(super) fn mean_square(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.dims() != b.dims() {
        bail!("the student gives {:?} where the teacher gives {:?}", a.dims(), b.dims());
    }
    let gap = binary(Arithmetic::Sub, a, b)?;
    mean(&binary(Arithmetic::Mul, &gap, &gap)?)
}

/// A scalar.
fn mean(x: &Tensor) -> Result<Tensor> {
    reduce(Reduction::Sum, &x.flatten_all()?)?.affine(1.0 / x.elem_count().max(1) as f64, 0.0)
}

/// What a student is judged by: higher is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Metric {
    /// The share of rows whose largest logit is the label's.
    Accuracy,
    /// The share of rows whose largest logit is the teacher's.
    Agreement,
    /// The mean cosine with the teacher's rows.
    Cosine,
    NegativeLoss,
}

impl Metric {
    pub fn of(weights: &Losses, labels: bool, teacher: bool) -> Metric {
        match (labels, teacher) {
            (true, _) => Metric::Accuracy,
            (_, true) if weights.soft > 0.0 => Metric::Agreement,
            (_, true) if weights.cosine > 0.0 => Metric::Cosine,
            _ => Metric::NegativeLoss,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Metric::Accuracy => "accuracy",
            Metric::Agreement => "agreement",
            Metric::Cosine => "cosine",
            Metric::NegativeLoss => "negative loss",
        }
    }

    /// The sum over a batch, and over how many rows.
    pub fn sum(self, answers: &Answers<'_>, loss: &Tensor) -> Result<(f64, usize)> {
        let count = |hits: Vec<bool>| (hits.iter().filter(|hit| **hit).count() as f64, hits.len());
        match (self, answers.labels, &answers.teacher) {
            (Metric::Accuracy, Some(labels), _) => {
                let ours = largest(&answers.logits[0])?;
                if ours.len() != labels.len() {
                    bail!("{} labels for {} rows of the first output", labels.len(), ours.len());
                }
                Ok(count(ours.iter().zip(labels).map(|(a, b)| *a as i64 == *b).collect()))
            }
            (Metric::Agreement, _, Some(teacher)) => {
                let pairs = largest(&answers.logits[0])?.into_iter().zip(largest(&teacher.logits[0])?);
                Ok(count(pairs.map(|(a, b)| a == b).collect()))
            }
            (Metric::Cosine, _, Some(teacher)) => {
                let cosines = cosine(&answers.outputs[0], &teacher.outputs[0])?;
                read(&cosines, |view| (view.data.iter().map(|&c| f64::from(c)).sum(), view.data.len()))
            }
            _ => Ok((-f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?), 1)),
        }
    }
}

fn largest(logits: &Tensor) -> Result<Vec<usize>> {
    let logits = logits.contiguous()?;
    let classes = logits.dims().last().copied().unwrap_or(1).max(1);
    read(&logits, |view| view.data.chunks_exact(classes).map(crate::compare::largest).collect())
}
