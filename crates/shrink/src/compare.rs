//! Two forms of one model, measured side by side on the same inputs.

use crate::{Sample, ShrinkError, runner::Runner};
use cutover_backend::{Backend, Binding, RunContext, Signature};
use cutover_graph::Graph;
use cutover_tensor::{DType, Tensor, Value};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// How far the answers of one graph are from those of another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    pub samples: usize,
    /// The floating-point outputs, in the order of the signature.
    pub outputs: Vec<OutputComparison>,
}

/// One output over all samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutputComparison {
    pub name: String,
    /// Largest `|after − before|`.
    #[serde(with = "crate::number")]
    pub absolute_error_max: f64,
    /// Largest magnitude of an element before.
    pub magnitude_max: f64,
    /// Signal to quantization noise, `10 · log₁₀(Σ before² / Σ (after − before)²)`: infinite where nothing differs.
    #[serde(with = "crate::number")]
    pub sqnr_db: f64,
    /// Of the rows along the last axis, the share whose largest element is at the same place, counting a row of scores as a class;
    /// `None` where the last axis has fewer than two elements.
    pub top1_agreement: Option<f64>,
    /// Mean over the rows along the last axis of the cosine between before and after: 1 where they point the same way, whatever their length.
    pub cosine_mean: f64,
}

/// Runs both graphs on `backend` over `samples` (each the model's inputs by name).
///
/// # Errors
/// Graphs whose inputs or outputs differ in name or type; a sample that does not fit them; whatever the backend says.
pub fn compare(
    before: &Graph,
    after: &Graph,
    backend: &Arc<dyn Backend>,
    samples: &[Sample],
) -> Result<Comparison, ShrinkError> {
    let signature = Signature::of(before);
    check_signatures(&signature, &Signature::of(after))?;
    let (mut first, mut second) = (Runner::new(before, backend)?, Runner::new(after, backend)?);
    let mut sums: Vec<Sums> = signature.outputs.iter().map(|_| Sums::default()).collect();
    for (number, sample) in samples.iter().enumerate() {
        let context = RunContext::default();
        let (expected, actual) = (first.run(sample, number, &context)?, second.run(sample, number, &context)?);
        for ((sums, binding), pair) in sums.iter_mut().zip(&signature.outputs).zip(expected.iter().zip(&actual)) {
            if let (Value::Tensor(x), Value::Tensor(y)) = pair {
                sums.add(x, y).map_err(|message| {
                    let message = format!("output '{}': {message}", binding.name);
                    ShrinkError::Sample { sample: number, message }
                })?;
            }
        }
    }
    let outputs = signature.outputs.iter().zip(sums).filter(|(_, sums)| sums.counted);
    let outputs = outputs.map(|(binding, sums)| sums.finish(binding.name.clone())).collect();
    Ok(Comparison { samples: samples.len(), outputs })
}

fn check_signatures(before: &Signature, after: &Signature) -> Result<(), ShrinkError> {
    let describe = |bindings: &[Binding]| {
        let dtype = |b: &Binding| b.fact.as_tensor().map_or("other", |f| f.dtype.name());
        bindings.iter().map(|b| format!("{} {}", dtype(b), b.name)).collect::<Vec<_>>().join(", ")
    };
    for (what, a, b) in [("inputs", &before.inputs, &after.inputs), ("outputs", &before.outputs, &after.outputs)] {
        let (a, b) = (describe(a), describe(b));
        if a != b {
            return Err(ShrinkError::Signature(format!("{what} ({a}) against ({b})")));
        }
    }
    Ok(())
}

#[derive(Default)]
struct Sums {
    counted: bool,
    signal: f64,
    noise: f64,
    absolute_error_max: f64,
    magnitude_max: f64,
    rows: usize,
    agreeing_rows: usize,
    cosines: f64,
    cosine_rows: usize,
}

impl Sums {
    fn add(&mut self, before: &Tensor, after: &Tensor) -> Result<(), String> {
        if before.dtype() != DType::F32 {
            return Ok(());
        }
        if before.shape() != after.shape() {
            return Err(format!("shape {} became {}", before.shape(), after.shape()));
        }
        let floats = |t: &Tensor| t.to_vec::<f32>().map_err(|e| e.to_string());
        let (before_values, after_values) = (floats(before)?, floats(after)?);
        self.counted = true;
        for (&x, &y) in before_values.iter().zip(&after_values) {
            // Equal infinities and NaNs in both are no error.
            if x.to_bits() == y.to_bits() || (x.is_nan() && y.is_nan()) {
                self.signal += if x.is_finite() { f64::from(x) * f64::from(x) } else { 0.0 };
            } else {
                let error = (f64::from(x) - f64::from(y)).abs();
                let error = if error.is_nan() { f64::INFINITY } else { error };
                self.signal += f64::from(x) * f64::from(x);
                self.noise += error * error;
                self.absolute_error_max = self.absolute_error_max.max(error);
            }
            if x.is_finite() {
                self.magnitude_max = self.magnitude_max.max(f64::from(x.abs()));
            }
        }
        let classes = before.shape().last().copied().unwrap_or(1);
        for (x, y) in before_values.chunks_exact(classes.max(1)).zip(after_values.chunks_exact(classes.max(1))) {
            self.cosine_rows += 1;
            self.cosines += cosine(x, y);
        }
        if classes >= 2 {
            for (x, y) in before_values.chunks_exact(classes).zip(after_values.chunks_exact(classes)) {
                self.rows += 1;
                self.agreeing_rows += usize::from(largest(x) == largest(y));
            }
        }
        Ok(())
    }

    fn finish(self, name: String) -> OutputComparison {
        OutputComparison {
            name,
            absolute_error_max: self.absolute_error_max,
            magnitude_max: self.magnitude_max,
            sqnr_db: if self.noise == 0.0 { f64::INFINITY } else { 10.0 * (self.signal / self.noise).log10() },
            cosine_mean: if self.cosine_rows > 0 { self.cosines / self.cosine_rows as f64 } else { 1.0 },
            top1_agreement: (self.rows > 0).then(|| self.agreeing_rows as f64 / self.rows as f64),
        }
    }
}

/// 1 where both are zero, 0 where one is or where either is no number.
fn cosine(x: &[f32], y: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let (xx, yy) = (dot(x, x), dot(y, y));
    if xx == 0.0 && yy == 0.0 {
        return 1.0;
    }
    let cosine = dot(x, y) / (xx.sqrt() * yy.sqrt());
    if cosine.is_finite() { cosine } else { 0.0 }
}

/// Where the first largest element is.
pub(crate) fn largest(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}
