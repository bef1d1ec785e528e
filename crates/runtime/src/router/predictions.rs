//! What was answered lately, by request id, so that labels that come late find the version and the step they are for.

use crate::{error::FeedbackError, request::Label};
use serde::{Deserialize, Serialize};

/// Answers that share a place; the oldest of them goes when another comes.
const WAYS: usize = 8;
/// Versions whose answers are told apart.
const VERSIONS: usize = 256;
/// Answers that outlive the process, the newest ones.
const KEPT: usize = 8192;

/// All of its memory is there from the beginning: a host that serves does not grow.
pub(crate) struct Predictions {
    /// Sets of [`WAYS`]; an id's hash says which set is its.
    places: Vec<Prediction>,
    /// Nobody outside knows which ids share a place.
    key: [u8; 32],
    /// Number of the next answer; 0 is none.
    next: u64,
    /// The last versions' names, by their number modulo [`VERSIONS`].
    versions: Vec<String>,
    version: u64,
    saved: u64,
}

#[derive(Clone, Default, Serialize, Deserialize)]
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
    /// What the candidate said of a copy.
    copy: Box<[u32]>,
    /// What was right, where that came before the candidate's answer to the copy.
    #[serde(default)]
    truth: Box<[u32]>,
}

/// The part that outlives the process.
#[derive(Serialize, Deserialize)]
struct Kept {
    key: [u8; 32],
    next: u64,
    versions: Vec<String>,
    version: u64,
    answers: Vec<Prediction>,
}

/// What was answered, for [`Predictions::remember`].
pub(crate) struct Answered<'a> {
    pub id: &'a str,
    pub version: &'a str,
    /// The step in which the version answered.
    pub window: u64,
    /// Of every sample.
    pub classes: Vec<u32>,
}

/// What a label says of the answer it is for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Settled {
    pub version: String,
    /// The step in which the version answered.
    pub window: u64,
    /// For each sample, whether it was right.
    pub right: Vec<bool>,
    /// Whether the candidate was right on a copy; empty where it saw none, or has yet to answer.
    pub copy_right: Vec<bool>,
}

/// For each sample of a request that a shadow saw too, whether the version that answered was right, and the candidate.
pub(crate) type Pairs = Vec<(bool, bool)>;

fn right(said: impl IntoIterator<Item = u32>, truth: &[u32]) -> Vec<bool> {
    said.into_iter().zip(truth).map(|(said, truth)| said == *truth).collect()
}

impl Predictions {
    /// Remembers about `capacity` answers.
    pub fn new(capacity: usize, key: [u8; 32]) -> Predictions {
        let places = capacity.next_multiple_of(WAYS.min(capacity.max(1)));
        let mut predictions = Predictions {
            places: Vec::with_capacity(places),
            key,
            next: 1,
            versions: Vec::new(),
            version: 0,
            saved: 0,
        };
        predictions.places.resize_with(places, Prediction::default);
        predictions
    }

    /// As [`Predictions::new`], with what [`Predictions::save`] gave.
    ///
    /// # Errors
    /// Bytes that it did not give.
    pub fn restore(capacity: usize, saved: &[u8]) -> Result<Predictions, serde_json::Error> {
        let Kept { key, next, versions, version, answers } = serde_json::from_slice(saved)?;
        let mut predictions = Predictions { next, versions, version, saved: next, ..Predictions::new(capacity, key) };
        if predictions.versions.len() > VERSIONS {
            predictions.versions.clear();
        }
        answers.into_iter().for_each(|answer| predictions.place(answer));
        Ok(predictions)
    }

    /// The newest answers, if there are any since the last time.
    pub fn save(&mut self) -> Option<Vec<u8>> {
        if self.saved == self.next {
            return None;
        }
        let oldest = self.next.saturating_sub(KEPT as u64).max(1);
        let answers = self.places.iter().filter(|p| p.number >= oldest).cloned().collect();
        let Predictions { key, next, version, .. } = *self;
        let kept = Kept { key, next, versions: self.versions.clone(), version, answers };
        self.saved = next;
        serde_json::to_vec(&kept).ok()
    }

    fn hash(&self, id: &str) -> u64 {
        let digest = blake3::keyed_hash(&self.key, id.as_bytes());
        digest.as_bytes().iter().take(8).fold(0, |hash, &byte| hash << 8 | u64::from(byte))
    }

    fn set(&mut self, hash: u64) -> &mut [Prediction] {
        let ways = WAYS.min(self.places.len());
        let sets = self.places.len().checked_div(ways).unwrap_or(0);
        let set = if sets == 0 { 0 } else { hash as usize % sets };
        &mut self.places[set * ways..(set + 1) * ways]
    }

    pub fn remember(&mut self, answered: Answered<'_>) {
        let Answered { id, version, window, classes } = answered;
        let Some((&class, more)) = classes.split_first() else { return };
        let (hash, version, number) = (self.hash(id), self.number_of(version), self.next);
        self.next += 1;
        self.place(Prediction { hash, number, version, window, class, more: more.into(), ..Prediction::default() });
    }

    /// The number of a version's name. Answers of two versions alternate while both serve.
    fn number_of(&mut self, version: &str) -> u64 {
        let current = self.version as usize % VERSIONS;
        if self.versions.get(current).is_some_and(|name| name == version) {
            return self.version;
        }
        if let Some(at) = self.versions.iter().position(|name| name == version) {
            return self.version - ((current + VERSIONS - at) % VERSIONS) as u64;
        }
        if !self.versions.is_empty() {
            self.version += 1;
        }
        match self.versions.get_mut(self.version as usize % VERSIONS) {
            Some(name) => *name = version.to_string(),
            None => self.versions.push(version.to_string()),
        }
        self.version
    }

    /// An id that comes again takes its own place.
    fn place(&mut self, prediction: Prediction) {
        let set = self.set(prediction.hash);
        let own = set.iter().position(|p| p.number > 0 && p.hash == prediction.hash);
        if let Some(place) = own.or_else(|| (0..set.len()).min_by_key(|&i| set[i].number)) {
            set[place] = prediction;
        }
    }

    /// Adds what the candidate said of a copy of request `id`; gives the pairs if what was right is known already.
    pub fn add_copy(&mut self, id: &str, classes: Vec<u32>) -> Option<Pairs> {
        let hash = self.hash(id);
        let found = self.set(hash).iter_mut().find(|p| p.number > 0 && p.hash == hash)?;
        if found.truth.is_empty() {
            found.copy = classes.into();
            return None;
        }
        let Prediction { class, more, truth, .. } = std::mem::take(found);
        let answered = right([class].into_iter().chain(more), &truth);
        Some(answered.into_iter().zip(right(classes, &truth)).collect())
    }

    /// Compares the answer to `id` with the truth. A label counts once; where a copy is still to be answered (`has_shadow`), it is kept for that.
    pub fn settle(&mut self, id: &str, label: &Label, has_shadow: bool) -> Result<Settled, FeedbackError> {
        let unknown = || FeedbackError::UnknownId(id.to_string());
        let hash = self.hash(id);
        let newest = self.version;
        let found = self.set(hash).iter_mut().find(|p| p.number > 0 && p.hash == hash && p.truth.is_empty());
        let found = found.ok_or_else(unknown)?;
        let (classes, labels) = (1 + found.more.len(), label.classes.len());
        if classes != labels {
            return Err(FeedbackError::Count { id: id.to_string(), classes, labels });
        }
        let prediction = std::mem::take(found);
        if has_shadow && prediction.copy.is_empty() {
            *found = Prediction { truth: label.classes.as_slice().into(), ..prediction.clone() };
        }
        if prediction.version + VERSIONS as u64 <= newest {
            return Err(unknown());
        }
        let version = self.versions.get(prediction.version as usize % VERSIONS).cloned().ok_or_else(unknown)?;
        Ok(Settled {
            version,
            window: prediction.window,
            right: right([prediction.class].into_iter().chain(prediction.more), &label.classes),
            copy_right: right(prediction.copy, &label.classes),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remember(predictions: &mut Predictions, id: &str, version: &str, window: u64, classes: Vec<u32>) {
        predictions.remember(Answered { id, version, window, classes });
    }

    #[test]
    fn predictions_are_bounded_and_settled_once() {
        let mut predictions = Predictions::new(2, [7; 32]);
        for (id, class) in [("a", 1), ("b", 2), ("b", 3), ("c", 4)] {
            remember(&mut predictions, id, "v1", 7, vec![class]);
        }
        predictions.add_copy("b", vec![9]);
        assert_eq!(predictions.settle("a", &Label::class(1), false), Err(FeedbackError::UnknownId("a".to_string())));
        let right = Settled { version: "v1".to_string(), window: 7, right: vec![true], copy_right: vec![false] };
        assert_eq!(predictions.settle("b", &Label::class(3), false), Ok(right));
        assert!(predictions.settle("b", &Label::class(3), false).is_err());
        let count = FeedbackError::Count { id: "c".to_string(), classes: 1, labels: 2 };
        assert_eq!(predictions.settle("c", &Label { classes: vec![4, 4] }, false), Err(count));
        assert_eq!(predictions.places.len(), 2);
        assert!(Predictions::new(0, [7; 32]).settle("a", &Label::class(1), false).is_err());
    }

    #[test]
    fn a_label_that_comes_before_the_copys_answer_waits_for_it() {
        let mut predictions = Predictions::new(64, [7; 32]);
        remember(&mut predictions, "a", "v1", 7, vec![1, 2]);
        let label = Label { classes: vec![1, 3] };
        let settled = predictions.settle("a", &label, true).unwrap();
        assert_eq!((settled.right, settled.copy_right), (vec![true, false], vec![]));
        assert!(predictions.settle("a", &label, true).is_err(), "it has counted");
        assert_eq!(predictions.add_copy("a", vec![2, 3]), Some(vec![(true, false), (false, true)]));
        assert_eq!(predictions.add_copy("a", vec![2, 3]), None, "the pair has counted");
        remember(&mut predictions, "b", "v1", 7, vec![1]);
        predictions.settle("b", &Label::class(1), false).unwrap();
        assert_eq!(predictions.add_copy("b", vec![1]), None, "nobody waited for it");
    }

    #[test]
    fn answers_of_alternating_and_of_forgotten_versions_are_told_apart() {
        let mut predictions = Predictions::new(4096, [7; 32]);
        for number in 0..2 * VERSIONS {
            remember(&mut predictions, &format!("{number}"), &format!("v{number}"), number as u64, vec![1, 2]);
            remember(&mut predictions, &format!("{number} again"), "v0", 0, vec![3]);
        }
        let label = Label { classes: vec![1, 0] };
        let last = 2 * VERSIONS - 1;
        let settled = predictions.settle(&format!("{last}"), &label, false).unwrap();
        assert_eq!(
            (settled.version, settled.window, settled.right),
            (format!("v{last}"), last as u64, vec![true, false])
        );
        assert_eq!(predictions.settle(&format!("{last} again"), &Label::class(3), false).unwrap().version, "v0");
        assert!(predictions.settle("1", &label, false).is_err(), "its version is forgotten");
    }

    #[test]
    fn answers_outlive_the_process() {
        let mut predictions = Predictions::new(64, [7; 32]);
        remember(&mut predictions, "monday", "v1", 3, vec![5]);
        let saved = predictions.save().unwrap();
        assert!(predictions.save().is_none(), "nothing new");
        let mut restored = Predictions::restore(64, &saved).unwrap();
        remember(&mut restored, "thursday", "v2", 4, vec![6]);
        let settled = restored.settle("monday", &Label::class(5), false).unwrap();
        assert_eq!((settled.version.as_str(), settled.window, settled.right), ("v1", 3, vec![true]));
        assert_eq!(restored.settle("thursday", &Label::class(6), false).unwrap().version, "v2");
        assert!(Predictions::restore(64, b"{}").is_err());
    }
}
