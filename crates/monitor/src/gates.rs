//! What a candidate must keep to.

use serde::{Deserialize, Serialize};

/// What a candidate must keep to. A package may carry its own; these are the defaults.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gates {
    /// Requests a candidate must have answered before it can be promoted.
    pub requests_min: u64,
    /// Labels each arm needs before accuracy is judged.
    pub labels_min: u64,
    /// Largest share of failed requests, whatever the incumbent's is.
    pub error_rate_max: Option<f64>,
    /// Largest rise of the share of failed requests over the incumbent's.
    pub error_rate_rise_max: f64,
    /// How many times the incumbent's share of failed requests the candidate's may be.
    pub error_ratio_max: Option<f64>,
    /// Smallest accuracy, whatever the incumbent's is.
    pub accuracy_min: Option<f64>,
    /// Largest drop of accuracy below the incumbent's.
    pub accuracy_drop_max: f64,
    /// Smallest share of requests on which both arms give the same class, where no labels come.
    pub agreement_min: f64,
    /// Largest drop of the mean probability of the winning class, where no labels come.
    pub confidence_drop_max: f64,
    /// Largest rise of the normalised entropy of the classes' probabilities, where no labels come.
    pub entropy_rise_max: f64,
    /// Largest mean drop, over answers to the same requests, of the winner's distance from the next class, where no labels come.
    pub margin_drop_max: f64,
    /// Largest population stability index of the classes that win: of the candidate against the incumbent, where no labels come, and of
    /// both against what was seen before.
    pub drift_max: f64,
    /// Serving time, in seconds, in which the first labels may be expected. Until it has passed, agreement and confidence judge nothing:
    /// a candidate may disagree because the incumbent is wrong.
    pub labels_wait_s: f64,
    /// How many times the incumbent's median, and its 95th percentile, the candidate's may be; a difference below `latency_slack_ms`
    /// passes whatever the ratio.
    pub latency_ratio_max: f64,
    pub latency_slack_ms: f64,
    /// Largest 95th percentile of latency, whatever the incumbent's is.
    pub latency_p95_max_ms: Option<f64>,
    /// Probability, per gate and over all looks together, that a candidate is judged wrongly by it.
    pub alpha: f64,
}

impl Default for Gates {
    fn default() -> Self {
        Gates {
            requests_min: 200,
            labels_min: 100,
            error_rate_max: None,
            error_rate_rise_max: 0.01,
            error_ratio_max: None,
            accuracy_min: None,
            accuracy_drop_max: 0.02,
            agreement_min: 0.9,
            confidence_drop_max: 0.05,
            entropy_rise_max: 0.1,
            margin_drop_max: 0.1,
            drift_max: 0.25,
            labels_wait_s: 30.0,
            latency_ratio_max: 1.5,
            latency_slack_ms: 2.0,
            latency_p95_max_ms: None,
            alpha: 0.01,
        }
    }
}

impl Gates {
    /// # Errors
    /// A bound outside of its range, and which.
    pub fn check(&self) -> Result<(), String> {
        let shares = [
            ("error_rate_rise_max", self.error_rate_rise_max),
            ("accuracy_drop_max", self.accuracy_drop_max),
            ("agreement_min", self.agreement_min),
            ("confidence_drop_max", self.confidence_drop_max),
            ("entropy_rise_max", self.entropy_rise_max),
            ("margin_drop_max", self.margin_drop_max),
            ("error_rate_max", self.error_rate_max.unwrap_or(0.0)),
            ("accuracy_min", self.accuracy_min.unwrap_or(0.0)),
        ];
        if let Some((name, value)) = shares.iter().find(|(_, value)| !(0.0..=1.0).contains(value)) {
            return Err(format!("the gates' {name} is {value}, expected 0 to 1"));
        }
        let at_least = [
            ("labels_wait_s", self.labels_wait_s, 0.0),
            ("latency_ratio_max", self.latency_ratio_max, 1.0),
            ("latency_slack_ms", self.latency_slack_ms, 0.0),
            ("latency_p95_max_ms", self.latency_p95_max_ms.unwrap_or(0.0), 0.0),
            ("error_ratio_max", self.error_ratio_max.unwrap_or(1.0), 1.0),
            ("drift_max", self.drift_max, 0.0),
        ];
        if let Some((name, value, least)) =
            at_least.iter().find(|(_, value, least)| !(value.is_finite() && value >= least))
        {
            return Err(format!("the gates' {name} is {value}, expected a number of at least {least}"));
        }
        if !(self.alpha > 0.0 && self.alpha < 0.5) {
            return Err(format!("the gates' alpha is {}, expected one between 0 and 0.5", self.alpha));
        }
        Ok(())
    }
}

/// Whether labels may still come where none came yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Labels {
    Awaited,
    /// The time they would take has passed: where none came, agreement and confidence stand in for them.
    Due,
}

impl Gates {
    /// What a latency may be beside one of the incumbent's.
    pub fn latency_bound_ms(&self, incumbent_ms: f64) -> f64 {
        (incumbent_ms * self.latency_ratio_max).max(incumbent_ms + self.latency_slack_ms)
    }

    /// After `serving_s` seconds in which both arms could be asked.
    pub fn labels(&self, serving_s: f64) -> Labels {
        if serving_s < self.labels_wait_s { Labels::Awaited } else { Labels::Due }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_that_bound_nothing_are_refused() {
        let good = Gates::default();
        good.check().unwrap();
        for bad in [
            Gates { alpha: 0.0, ..good },
            Gates { alpha: f64::NAN, ..good },
            Gates { agreement_min: 90.0, ..good },
            Gates { latency_ratio_max: 0.5, ..good },
            Gates { labels_wait_s: f64::INFINITY, ..good },
            Gates { error_rate_max: Some(5.0), ..good },
            Gates { error_ratio_max: Some(0.5), ..good },
            Gates { drift_max: f64::NAN, ..good },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
