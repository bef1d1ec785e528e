//! Which version a request goes to, and which answers feedback may still refer to.

mod serve;

pub(crate) use serve::{COMPARISONS_MAX, Comparison};

use crate::{error::FeedbackError, request::Label, swap::Version};
use std::{collections::hash_map::RandomState, hash::BuildHasher, sync::Arc};

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

/// Answers that share a place; the oldest of them goes when another comes.
const WAYS: usize = 8;
/// Versions whose answers are told apart.
const VERSIONS: usize = 256;

/// What was answered lately, by request id. All of its memory is there from the beginning: a host that serves does not grow.
pub(crate) struct Predictions {
    /// Sets of [`WAYS`]; an id's hash says which set is its.
    places: Vec<Prediction>,
    hasher: RandomState,
    /// Number of the next answer; 0 is none.
    next: u64,
    /// The last versions' names, by their number modulo [`VERSIONS`].
    versions: Vec<String>,
    version: u64,
}

#[derive(Clone, Default)]
struct Prediction {
    /// Of the id. Two ids of one hash are one in 2^64 pairs.
    hash: u64,
    /// 0 where nothing is remembered.
    number: u64,
    version: u64,
    window: u64,
    class: u32,
    /// Classes of the samples after the first.
    more: Box<[u32]>,
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
    /// Remembers about `capacity` answers.
    pub fn new(capacity: usize) -> Predictions {
        let places = capacity.next_multiple_of(WAYS.min(capacity.max(1)));
        let mut predictions = Predictions {
            places: Vec::with_capacity(places),
            hasher: RandomState::new(),
            next: 1,
            versions: Vec::new(),
            version: 0,
        };
        predictions.places.resize_with(places, Prediction::default);
        predictions
    }

    fn set(&mut self, hash: u64) -> &mut [Prediction] {
        let ways = WAYS.min(self.places.len());
        let sets = self.places.len().checked_div(ways).unwrap_or(0);
        let set = if sets == 0 { 0 } else { hash as usize % sets };
        &mut self.places[set * ways..(set + 1) * ways]
    }

    pub fn remember(&mut self, id: &str, version: &str, window: u64, classes: Vec<u32>) {
        let Some((&class, more)) = classes.split_first() else { return };
        if self.versions.get(self.version as usize % VERSIONS).is_none_or(|name| name != version) {
            // Answers of two versions alternate while both serve.
            match self.versions.iter().position(|name| name == version) {
                Some(at) => {
                    let behind = (self.version as usize % VERSIONS + VERSIONS - at) % VERSIONS;
                    return self.insert(id, self.version - behind as u64, window, class, more);
                }
                None if self.versions.is_empty() => self.versions.push(version.to_string()),
                None => {
                    self.version += 1;
                    match self.versions.get_mut(self.version as usize % VERSIONS) {
                        Some(name) => *name = version.to_string(),
                        None => self.versions.push(version.to_string()),
                    }
                }
            }
        }
        self.insert(id, self.version, window, class, more);
    }

    fn insert(&mut self, id: &str, version: u64, window: u64, class: u32, more: &[u32]) {
        let hash = self.hasher.hash_one(id);
        let number = self.next;
        self.next += 1;
        let set = self.set(hash);
        // An id that comes again takes its own place.
        let own = set.iter().position(|p| p.number > 0 && p.hash == hash);
        let place = own.or_else(|| (0..set.len()).min_by_key(|&i| set[i].number));
        if let Some(place) = place {
            set[place] = Prediction { hash, number, version, window, class, more: more.into() };
        }
    }

    /// Compares the answer to `id` with the truth. A label counts once.
    pub fn settle(&mut self, id: &str, label: &Label) -> Result<Settled, FeedbackError> {
        let unknown = || FeedbackError::UnknownId(id.to_string());
        let hash = self.hasher.hash_one(id);
        let newest = self.version;
        let found = self.set(hash).iter_mut().find(|p| p.number > 0 && p.hash == hash).ok_or_else(unknown)?;
        let (classes, labels) = (1 + found.more.len(), label.classes.len());
        if classes != labels {
            return Err(FeedbackError::Count { id: id.to_string(), classes, labels });
        }
        let prediction = std::mem::take(found);
        if prediction.version + VERSIONS as u64 <= newest {
            return Err(unknown());
        }
        let said = [prediction.class].into_iter().chain(prediction.more);
        let right = said.zip(&label.classes).map(|(a, b)| a == *b).collect();
        let version = self.versions[prediction.version as usize % VERSIONS].clone();
        Ok(Settled { version, window: prediction.window, right })
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
        assert_eq!(predictions.places.len(), 2);
        assert!(Predictions::new(0).settle("a", &Label::class(1)).is_err());
    }

    #[test]
    fn answers_of_alternating_and_of_forgotten_versions_are_told_apart() {
        let mut predictions = Predictions::new(4096);
        for number in 0..2 * VERSIONS {
            predictions.remember(&format!("{number}"), &format!("v{number}"), number as u64, vec![1, 2]);
            predictions.remember(&format!("{number} again"), "v0", 0, vec![3]);
        }
        let label = Label { classes: vec![1, 0] };
        let last = 2 * VERSIONS - 1;
        let settled = predictions.settle(&format!("{last}"), &label).unwrap();
        let expected = Settled { version: format!("v{last}"), window: last as u64, right: vec![true, false] };
        assert_eq!(settled, expected);
        assert_eq!(predictions.settle(&format!("{last} again"), &Label::class(3)).unwrap().version, "v0");
        assert!(predictions.settle("1", &label).is_err(), "its version is forgotten");
    }
}
