//! Which version a request goes to, and which answers feedback may still refer to.

mod serve;

pub(crate) use serve::{COMPARISONS_MAX, Comparison};

use crate::{error::FeedbackError, request::Label, swap::Version};
use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

/// Who serves a model now. Replaced as a whole, never changed.
pub(crate) struct Routing {
    pub active: Arc<Version>,
    pub candidate: Option<Candidate>,
    /// The version before, kept ready so that going back is one switch.
    pub previous: Option<Arc<Version>>,
}

#[derive(Clone)]
pub(crate) struct Candidate {
    pub version: Arc<Version>,
    /// Share of the requests it gets.
    pub share: f64,
    /// Differs from rollout to rollout, so that not the same clients are always first.
    pub salt: u64,
}

impl Routing {
    /// The version for requests of `key`: of a growing share, whoever was in stays in.
    pub fn pick(&self, key: &str) -> &Arc<Version> {
        match &self.candidate {
            Some(candidate) if position(candidate.salt, key) < candidate.share => &candidate.version,
            _ => &self.active,
        }
    }

    /// Every version with a role, and whether that is to be the one before.
    pub fn roles(&self) -> impl Iterator<Item = (&Arc<Version>, bool)> {
        let candidate = self.candidate.as_ref().map(|c| (&c.version, false));
        [Some((&self.active, false)), candidate, self.previous.as_ref().map(|v| (v, true))].into_iter().flatten()
    }

    pub fn named(&self, version: &str) -> Option<&Arc<Version>> {
        let candidate = self.candidate.as_ref().map(|c| &c.version);
        [Some(&self.active), candidate].into_iter().flatten().find(|v| v.name == version)
    }
}

/// A place between 0 and 1 that is uniform over keys and fixed for one key and salt.
fn position(salt: u64, key: &str) -> f64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&salt.to_le_bytes()).update(key.as_bytes());
    let digest = hasher.finalize();
    let word = digest.as_bytes().iter().take(8).fold(0u64, |v, &b| v << 8 | u64::from(b));
    (word >> 11) as f64 / (1u64 << 53) as f64
}

/// What was answered lately, by request id: bounded, the oldest goes first.
pub(crate) struct Predictions {
    by_id: HashMap<String, Prediction>,
    order: VecDeque<(String, u64)>,
    next: u64,
    capacity: usize,
}

struct Prediction {
    number: u64,
    version: String,
    window: u64,
    classes: Vec<u32>,
}

/// What a label says of the answer it is for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Settled {
    pub version: String,
    /// The window in which the version answered.
    pub window: u64,
    /// For each sample, whether it was right.
    pub right: Vec<bool>,
}

impl Predictions {
    pub fn new(capacity: usize) -> Predictions {
        Predictions { by_id: HashMap::new(), order: VecDeque::new(), next: 0, capacity }
    }

    pub fn remember(&mut self, id: &str, version: &str, window: u64, classes: Vec<u32>) {
        let number = self.next;
        self.next += 1;
        self.by_id.insert(id.to_string(), Prediction { number, version: version.to_string(), window, classes });
        self.order.push_back((id.to_string(), number));
        while self.order.len() > self.capacity {
            let Some((id, number)) = self.order.pop_front() else { break };
            // An id that came again belongs to its later request.
            if self.by_id.get(&id).is_some_and(|p| p.number == number) {
                self.by_id.remove(&id);
            }
        }
    }

    /// Compares the answer to `id` with the truth. A label counts once.
    pub fn settle(&mut self, id: &str, label: &Label) -> Result<Settled, FeedbackError> {
        let prediction = self.by_id.get(id).ok_or_else(|| FeedbackError::UnknownId(id.to_string()))?;
        let (classes, labels) = (prediction.classes.len(), label.classes.len());
        if classes != labels {
            return Err(FeedbackError::Count { id: id.to_string(), classes, labels });
        }
        let right = prediction.classes.iter().zip(&label.classes).map(|(a, b)| a == b).collect();
        let prediction = self.by_id.remove(id).expect("found above");
        Ok(Settled { version: prediction.version, window: prediction.window, right })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_uniform_and_sticky() {
        let inside = (0..10_000).filter(|i| position(3, &format!("client-{i}")) < 0.25).count();
        assert!((2300..2700).contains(&inside), "{inside}");
        assert_eq!(position(3, "a"), position(3, "a"));
        assert_ne!(position(3, "a"), position(4, "a"));
    }

    #[test]
    fn predictions_are_bounded_and_settled_once() {
        let mut predictions = Predictions::new(2);
        for (id, class) in [("a", 1), ("b", 2), ("b", 3), ("c", 4)] {
            predictions.remember(id, "v1", 7, vec![class]);
        }
        assert_eq!(predictions.settle("a", &Label::class(1)), Err(FeedbackError::UnknownId("a".to_string())));
        assert_eq!(
            predictions.settle("b", &Label::class(3)),
            Ok(Settled { version: "v1".to_string(), window: 7, right: vec![true] })
        );
        assert!(predictions.settle("b", &Label::class(3)).is_err());
        let count = FeedbackError::Count { id: "c".to_string(), classes: 1, labels: 2 };
        assert_eq!(predictions.settle("c", &Label { classes: vec![4, 4] }), Err(count));
        assert!(predictions.by_id.len() <= 2);
    }
}
