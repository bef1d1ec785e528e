//! What callers send and get.

use cutover_tensor::{DType, Value, bf16, f16};
use std::time::{Duration, Instant};

/// One question to a model.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// For feedback; made up where absent. A later request of the same id takes its place.
    pub id: Option<String>,
    /// Requests of one key see one version while a share is split; the id where absent.
    pub key: Option<String>,
    /// A version in service to be asked rather than the one whose turn it is.
    pub version: Option<String>,
    pub inputs: Vec<(String, Value)>,
    /// Which outputs to give, in this order; all where absent.
    pub outputs: Option<Vec<String>>,
    pub deadline: Option<Instant>,
}

/// One version's answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub id: String,
    /// The version that computed all of it.
    pub version: String,
    pub outputs: Vec<(String, Value)>,
    /// From when the model began to when it ended.
    pub latency: Duration,
}

/// The right classes of a request's samples, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    pub classes: Vec<u32>,
}

impl Label {
    pub fn class(class: u32) -> Label {
        Label { classes: vec![class] }
    }
}

/// What a device can see of an answer without knowing the truth: the winning class of every sample, and the mean probability of
/// the winners. `None` where the output called `scores` is no floating-point tensor with a last axis of at least two.
pub(crate) fn prediction(outputs: &[(String, Value)], scores: &str) -> Option<(Vec<u32>, f64)> {
    /// Answers of more samples than this are not looked at: requests pay for it.
    const ELEMENTS_MAX: usize = 1 << 16;
    let tensor = outputs.iter().find(|(name, _)| name == scores)?.1.as_tensor()?;
    let classes = *tensor.shape().last().filter(|&&c| c >= 2)?;
    if tensor.element_count() == 0 || tensor.element_count() > ELEMENTS_MAX {
        return None;
    }
    let scores: Vec<f32> = match tensor.dtype() {
        DType::F32 => tensor.to_vec().ok()?,
        DType::F64 => tensor.to_vec::<f64>().ok()?.into_iter().map(|v| v as f32).collect(),
        DType::F16 => tensor.to_vec::<f16>().ok()?.into_iter().map(f16::to_f32).collect(),
        DType::BF16 => tensor.to_vec::<bf16>().ok()?.into_iter().map(bf16::to_f32).collect(),
        _ => return None,
    };
    let mut winners = Vec::with_capacity(scores.len() / classes);
    let mut confidence = 0.0;
    for row in scores.chunks_exact(classes) {
        let best = (0..classes).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a)))?;
        let sum: f32 = row.iter().sum();
        let is_distribution = (sum - 1.0).abs() < 1e-2 && row.iter().all(|&p| (-1e-6..=1.0 + 1e-3).contains(&p));
        // Scores that are no probabilities are taken for logits.
        let probability = match is_distribution {
            true => f64::from(row[best]),
            false => 1.0 / row.iter().map(|&v| f64::from(v - row[best]).exp()).sum::<f64>(),
        };
        winners.push(best as u32);
        confidence += probability;
    }
    let samples = winners.len() as f64;
    Some((winners, confidence / samples))
}
