//! What callers send and get.

use crate::router::StreamStep;
use cutover_backend::Cancellation;
use cutover_monitor::Seen;
use cutover_tensor::{DType, Value, bf16, f16};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

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
    /// Stops the request at its next node, or while it waits.
    pub cancellation: Option<Arc<Cancellation>>,
    /// Where the caller keeps state between requests, which only the version that made it may see.
    pub stream: Option<StreamStep>,
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

/// What a device can see of an answer without knowing the truth, of the scores of classes in the output called `scores`. `None` where that is
/// no floating-point tensor with a last axis of at least two. Scores that are no probabilities are taken for logits.
pub(crate) fn seen(outputs: &[(String, Value)], scores: &str) -> Option<Seen> {
    /// Answers of more scores than this are not looked at: requests pay for it.
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
    let mut seen = Seen { classes: Vec::with_capacity(scores.len() / classes), ..Seen::default() };
    let mut probabilities = vec![0f64; classes];
    for row in scores.chunks_exact(classes) {
        let best = (0..classes).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a)))?;
        let sum: f32 = row.iter().sum();
        let is_distribution = (sum - 1.0).abs() < 1e-2 && row.iter().all(|&p| (-1e-6..=1.0 + 1e-3).contains(&p));
        match is_distribution {
            true => probabilities.iter_mut().zip(row).for_each(|(p, &v)| *p = f64::from(v).max(0.0)),
            false => {
                probabilities.iter_mut().zip(row).for_each(|(p, &v)| *p = f64::from(v - row[best]).exp());
                let sum: f64 = probabilities.iter().sum();
                probabilities.iter_mut().for_each(|p| *p /= sum);
            }
        }
        let second = probabilities.iter().enumerate().filter(|(i, _)| *i != best).map(|(_, &p)| p).fold(0.0, f64::max);
        let entropy: f64 = probabilities.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
        seen.classes.push(best as u32);
        seen.confidence += probabilities[best];
        seen.margin += probabilities[best] - second;
        seen.entropy += entropy / (classes as f64).ln();
    }
    let samples = seen.classes.len() as f64;
    (seen.confidence, seen.margin, seen.entropy) =
        (seen.confidence / samples, seen.margin / samples, seen.entropy / samples);
    Some(seen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cutover_tensor::Tensor;

    #[test]
    fn logits_and_probabilities_are_seen_alike() {
        let see = |values: Vec<f32>| {
            let tensor = Tensor::from_vec([2, 3], values).unwrap();
            seen(&[("scores".to_string(), tensor.into())], "scores").unwrap()
        };
        let probabilities = [0.7f32, 0.2, 0.1, 0.1, 0.1, 0.8];
        let (a, b) = (see(probabilities.to_vec()), see(probabilities.iter().map(|p| p.ln() + 3.0).collect()));
        assert_eq!((&a.classes, &b.classes), (&vec![0, 2], &vec![0, 2]));
        for (a, b, expected) in [
            (a.confidence, b.confidence, 0.75),
            (a.margin, b.margin, 0.6),
            (a.entropy, b.entropy, (0.801_819 + 0.639_032) / 2.0 / 3f64.ln()),
        ] {
            assert!((a - b).abs() < 1e-6 && (a - expected).abs() < 1e-5, "{a}, {b}, expected {expected}");
        }
        let text = ("scores".to_string(), Tensor::from_vec([2], vec![1i64, 2]).unwrap().into());
        assert_eq!(seen(&[text], "scores"), None);
    }
}
