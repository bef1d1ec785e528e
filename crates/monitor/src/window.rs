//! What is counted of one version since its window began.

use crate::LatencyHistogram;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How many of how many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proportion {
    pub count: u64,
    pub total: u64,
}

impl Proportion {
    pub fn add(&mut self, counted: bool) {
        self.count += u64::from(counted);
        self.total += 1;
    }

    /// `None` where nothing was observed.
    pub fn value(self) -> Option<f64> {
        (self.total > 0).then(|| self.count as f64 / self.total as f64)
    }
}

/// Proportions of the steps of a rollout: a label that comes late counts for the step in which its answer was given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Strata(Vec<Proportion>);

impl Default for Strata {
    fn default() -> Self {
        Strata::of(Proportion::default())
    }
}

impl Strata {
    pub fn of(first: Proportion) -> Strata {
        Strata(vec![first])
    }

    /// Begins the next stratum.
    pub fn begin(&mut self) {
        self.0.push(Proportion::default());
    }

    /// Counts in the stratum under way.
    pub fn add(&mut self, counted: bool) {
        if let Some(last) = self.0.last_mut() {
            last.add(counted);
        }
    }

    /// Counts in stratum `index`; what there is no such stratum for counts for none.
    pub fn add_to(&mut self, index: usize, counted: &[bool]) {
        if let Some(stratum) = self.0.get_mut(index) {
            counted.iter().for_each(|&counted| stratum.add(counted));
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = Proportion> + '_ {
        self.0.iter().copied()
    }

    /// All strata as one.
    pub fn pooled(&self) -> Proportion {
        self.iter()
            .fold(Proportion::default(), |sum, p| Proportion { count: sum.count + p.count, total: sum.total + p.total })
    }
}

/// Number, sum and sum of squares of some quantity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Moments([f64; 3]);

impl Moments {
    /// A value that is not finite counts for nothing.
    pub fn add(&mut self, value: f64) {
        if value.is_finite() {
            self.0[0] += 1.0;
            self.0[1] += value;
            self.0[2] += value * value;
        }
    }

    pub fn count(&self) -> f64 {
        self.0[0]
    }

    /// `None` where nothing was added.
    pub fn mean(&self) -> Option<f64> {
        (self.0[0] > 0.0).then(|| self.0[1] / self.0[0])
    }

    pub fn variance(&self) -> f64 {
        let mean = self.mean().unwrap_or_default();
        (self.0[2] / self.0[0].max(1.0) - mean * mean).max(0.0)
    }
}

/// How often each class won, the last of [`Classes::MAX`] standing for all beyond it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Classes(Vec<u64>);

impl Classes {
    pub const MAX: usize = 32;

    pub fn add(&mut self, class: u32) {
        let class = (class as usize).min(Self::MAX - 1);
        if self.0.len() <= class {
            self.0.resize(class + 1, 0);
        }
        self.0[class] += 1;
    }

    /// Of shares, as if `total` answers had been given in them.
    pub fn of_shares(shares: &[f64], total: u64) -> Classes {
        let mut classes = Classes(vec![0; shares.len().min(Self::MAX)]);
        for (class, share) in shares.iter().enumerate() {
            let last = classes.0.len() - 1;
            classes.0[class.min(last)] += (share * total as f64).round().max(0.0) as u64;
        }
        classes
    }

    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The share of every class.
    pub fn shares(&self) -> Vec<f64> {
        let total = self.total().max(1) as f64;
        self.0.iter().map(|&n| n as f64 / total).collect()
    }

    /// The population stability index of `self` against `reference`, and what chance alone exceeds once in 100,000 (it is distributed as
    /// `(1/n + 1/m)·χ²` with one degree fewer than classes; Yurdakul and Naranjo 2020). `None` below 100 observations of either.
    pub fn stability(&self, reference: &Classes) -> Option<(f64, f64)> {
        /// Fewer say nothing.
        const LEAST: u64 = 100;
        let (n, m) = (reference.total(), self.total());
        if n.min(m) < LEAST {
            return None;
        }
        let classes = self.0.len().max(reference.0.len());
        let share = |of: &Classes, i: usize, total: u64| {
            let total = total as f64;
            (of.0.get(i).copied().unwrap_or(0) as f64 / total).max(0.5 / total)
        };
        let mut index = 0.0;
        let mut cells = 0usize;
        for i in 0..classes {
            if self.0.get(i).copied().unwrap_or(0) + reference.0.get(i).copied().unwrap_or(0) == 0 {
                continue;
            }
            let (p, q) = (share(reference, i, n), share(self, i, m));
            index += (q - p) * (q / p).ln();
            cells += 1;
        }
        Some((index, (1.0 / n as f64 + 1.0 / m as f64) * chi_squared(cells.saturating_sub(1))))
    }
}

/// What a χ² of `degrees` exceeds once in 100,000 (Wilson and Hilferty 1931).
fn chi_squared(degrees: usize) -> f64 {
    /// The normal distribution's quantile.
    const Z: f64 = 4.264_890_79;
    let k = degrees.max(1) as f64;
    k * (1.0 - 2.0 / (9.0 * k) + Z * (2.0 / (9.0 * k)).sqrt()).powi(3)
}

/// Both arms' answers to the same requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pairs {
    /// Pairs whose label came, of which only the incumbent was right.
    pub incumbent_only: u64,
    /// Of which only the candidate was.
    pub candidate_only: u64,
    /// Of which both were, or neither.
    pub alike: u64,
    /// Pairs in which the candidate took longer than what the gates allow for the incumbent's time.
    pub slower: Proportion,
    /// By how much the candidate's margin, the distance of its first class from its second, exceeds the incumbent's.
    pub margin: Moments,
}

impl Pairs {
    /// Counts a label.
    pub fn settle(&mut self, incumbent_right: bool, candidate_right: bool) {
        match (incumbent_right, candidate_right) {
            (true, false) => self.incumbent_only += 1,
            (false, true) => self.candidate_only += 1,
            _ => self.alike += 1,
        }
    }

    /// Pairs whose label came.
    pub fn labelled(&self) -> u64 {
        self.incumbent_only + self.candidate_only + self.alike
    }
}

/// What can be seen of one answer without its label.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// The winning class of every sample.
    pub classes: Vec<u32>,
    /// Mean probability of the winning classes.
    pub confidence: f64,
    /// Mean distance of the winners' probability from the next.
    pub margin: f64,
    /// Mean entropy of the classes' probabilities, divided by that of equal ones: between 0 and 1.
    pub entropy: f64,
}

/// Counters of one version.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Window {
    /// Failed requests of all requests.
    pub errors: Proportion,
    /// Of answered requests, from when the model began to when it ended.
    pub latency: LatencyHistogram,
    /// Requests on which candidate and incumbent, both run, gave the same class.
    pub agreement: Proportion,
    /// Right answers of those whose label came.
    pub accuracy: Strata,
    /// Of the winning class' probability.
    pub confidence: Moments,
    /// Of the normalised entropy.
    pub entropy: Moments,
    pub classes: Classes,
    /// Of a candidate that answers copies.
    pub pairs: Pairs,
}

impl Window {
    pub fn answered(&mut self, latency: Duration, seen: Option<&Seen>) {
        self.errors.add(false);
        self.latency.record(latency);
        if let Some(seen) = seen {
            self.confidence.add(seen.confidence);
            self.entropy.add(seen.entropy);
            seen.classes.iter().for_each(|&class| self.classes.add(class));
        }
    }

    pub fn failed(&mut self) {
        self.errors.add(true);
    }

    pub fn requests(&self) -> u64 {
        self.errors.total
    }

    /// All is counted anew, but for labels: those that still come for answers given so far count with what they were given in.
    pub fn begin_step(&mut self) {
        let mut accuracy = std::mem::take(&mut self.accuracy);
        accuracy.begin();
        *self = Window { accuracy, ..Window::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_that_shift_are_told_from_chance() {
        let drawn = |seed: u64, shares: &[f64], total: u64| {
            let mut state = seed;
            let mut classes = Classes::default();
            for _ in 0..total {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let mut at = (state >> 11) as f64 / (1u64 << 53) as f64;
                let class = shares.iter().position(|share| {
                    at -= share;
                    at < 0.0
                });
                classes.add(class.unwrap_or(shares.len() - 1) as u32);
            }
            classes
        };
        let even = [0.1; 10];
        let mut shifted = even;
        (shifted[0], shifted[9]) = (0.3, 0.01);
        let exceeds = |(index, chance): (f64, f64)| index > chance;
        for seed in 0..200 {
            let (a, b) = (drawn(seed, &even, 300), drawn(seed + 1000, &even, 700));
            assert!(!exceeds(b.stability(&a).unwrap()), "seed {seed}");
        }
        assert!(exceeds(drawn(1, &shifted, 700).stability(&drawn(2, &even, 700)).unwrap()));
        assert_eq!(drawn(1, &even, 99).stability(&drawn(2, &even, 700)), None);
        assert_eq!(Classes::of_shares(&[0.25, 0.75], 100).shares(), [0.25, 0.75]);
        let mut many = Classes::default();
        many.add(u32::MAX);
        assert_eq!(many.shares().len(), Classes::MAX);
    }

    #[test]
    fn late_labels_count_for_their_step() {
        let mut window = Window::default();
        window.accuracy.add(true);
        window.begin_step();
        window.accuracy.add(false);
        window.accuracy.add_to(0, &[false, true]);
        window.accuracy.add_to(7, &[true]);
        let strata: Vec<Proportion> = window.accuracy.iter().collect();
        assert_eq!(strata, [Proportion { count: 2, total: 3 }, Proportion { count: 0, total: 1 }]);
    }
}
