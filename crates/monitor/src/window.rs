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

/// Counters of one version.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Window {
    /// Failed requests of all requests.
    pub errors: Proportion,
    /// Of answered requests, from when the model began to when it ended.
    pub latency: LatencyHistogram,
    /// Requests on which candidate and incumbent, both run, gave the same class.
    pub agreement: Proportion,
    /// Right answers of those whose label came.
    pub accuracy: Proportion,
    /// Number, sum and sum of squares of the winning class' probability.
    confidence: [f64; 3],
}

impl Window {
    pub fn answered(&mut self, latency: Duration, confidence: Option<f64>) {
        self.errors.add(false);
        self.latency.record(latency);
        if let Some(p) = confidence.filter(|p| p.is_finite()) {
            self.confidence[0] += 1.0;
            self.confidence[1] += p;
            self.confidence[2] += p * p;
        }
    }

    pub fn failed(&mut self) {
        self.errors.add(true);
    }

    pub fn requests(&self) -> u64 {
        self.errors.total
    }

    /// Number of observations, mean and standard deviation of the winning class' probability.
    pub fn confidence(&self) -> (f64, f64, f64) {
        let [n, sum, squares] = self.confidence;
        if n == 0.0 {
            return (0.0, 0.0, 0.0);
        }
        let mean = sum / n;
        (n, mean, (squares / n - mean * mean).max(0.0).sqrt())
    }
}
