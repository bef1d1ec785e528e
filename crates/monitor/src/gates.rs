//! The comparison of a candidate with the incumbent, and what follows.

use crate::{Proportion, Window, half_width, proportion_difference};
use serde::{Deserialize, Serialize};

/// What a candidate must keep to. A package may carry its own; these are the defaults.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gates {
    /// Requests a candidate must have answered before it can be promoted.
    pub requests_min: u64,
    /// Labels each arm needs before accuracy is judged.
    pub labels_min: u64,
    /// Largest rise of the share of failed requests, in absolute terms.
    pub error_rate_rise_max: f64,
    /// Largest drop of accuracy, in absolute terms.
    pub accuracy_drop_max: f64,
    /// Smallest share of requests on which both arms give the same class, where no labels come.
    pub agreement_min: f64,
    /// Largest drop of the mean probability of the winning class, where no labels come.
    pub confidence_drop_max: f64,
    /// Serving time, in seconds, in which the first labels may be expected. Until it has passed, agreement and confidence judge nothing:
    /// a candidate may disagree because the incumbent is wrong.
    pub labels_wait_s: f64,
    /// How many times the incumbent's median, and its 95th percentile, the candidate's may be; a difference below `latency_slack_ms`
    /// passes whatever the ratio.
    pub latency_ratio_max: f64,
    pub latency_slack_ms: f64,
    /// Probability, per gate and over all looks together, that a candidate is judged wrongly by it.
    pub alpha: f64,
}

impl Default for Gates {
    fn default() -> Self {
        Gates {
            requests_min: 200,
            labels_min: 100,
            error_rate_rise_max: 0.01,
            accuracy_drop_max: 0.02,
            agreement_min: 0.9,
            confidence_drop_max: 0.05,
            labels_wait_s: 30.0,
            latency_ratio_max: 1.5,
            latency_slack_ms: 2.0,
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
        ];
        if let Some((name, value)) = shares.iter().find(|(_, value)| !(0.0..=1.0).contains(value)) {
            return Err(format!("the gates' {name} is {value}, expected 0 to 1"));
        }
        let at_least = [
            ("labels_wait_s", self.labels_wait_s, 0.0),
            ("latency_ratio_max", self.latency_ratio_max, 1.0),
            ("latency_slack_ms", self.latency_slack_ms, 0.0),
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
    /// After `serving_s` seconds in which both arms could be asked.
    pub fn labels(&self, serving_s: f64) -> Labels {
        if serving_s < self.labels_wait_s { Labels::Awaited } else { Labels::Due }
    }
}

/// What was compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    Errors,
    Latency,
    Accuracy,
    Agreement,
    Confidence,
}

/// The numbers behind one gate's judgement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    pub gate: Gate,
    pub incumbent: Option<f64>,
    pub candidate: Option<f64>,
    /// The candidate's value, or its difference from the incumbent's, lies within these, at all times together. Of latency: by how much
    /// more of its requests the candidate exceeds what is allowed.
    pub interval: Option<[f64; 2]>,
    pub limit: f64,
    /// Observations of the candidate.
    pub observations: u64,
    pub state: GateState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateState {
    Passed,
    Failed,
    /// Not enough was seen yet.
    Open,
    /// It decides nothing: labels outrank agreement and confidence, and where labels never come there is no accuracy.
    Outranked,
}

/// What follows from all gates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every gate that has something to say passed.
    Promote,
    Hold,
    RollBack,
}

/// Compares the windows of both arms, which must cover the same time at the same share of the traffic: otherwise a change of the data
/// would count against the arm that saw more of it.
///
/// Labels decide where they come: a candidate that disagrees with a bad incumbent, and is right, must pass. Where none come in the time
/// they take, agreement and confidence stand in for accuracy.
pub fn judge(incumbent: &Window, candidate: &Window, gates: &Gates, labels: Labels) -> (Verdict, Vec<Evidence>) {
    let labelled = incumbent.accuracy.total.max(candidate.accuracy.total) > 0;
    let mut evidence = vec![
        errors(incumbent, candidate, gates),
        latency(incumbent, candidate, gates),
        accuracy(incumbent, candidate, gates),
        agreement(candidate, gates),
        confidence(incumbent, candidate, gates),
    ];
    for item in &mut evidence {
        match item.gate {
            Gate::Accuracy if !labelled && labels == Labels::Due => item.state = GateState::Outranked,
            Gate::Agreement | Gate::Confidence if labelled || labels == Labels::Awaited => {
                item.state = GateState::Outranked
            }
            _ => {}
        }
    }
    let has = |state| evidence.iter().any(|e| e.state == state);
    let verdict = if has(GateState::Failed) {
        Verdict::RollBack
    } else if has(GateState::Open) || candidate.requests() < gates.requests_min {
        Verdict::Hold
    } else {
        Verdict::Promote
    };
    (verdict, evidence)
}

/// `interval` holds the difference: failed where all of it is beyond the limit, passed where none is.
fn two_sided(low: f64, high: f64, limit: f64, higher_is_worse: bool) -> GateState {
    let (beyond, within) = if higher_is_worse { (low > limit, high <= limit) } else { (high < limit, low >= limit) };
    match (beyond, within) {
        (true, _) => GateState::Failed,
        (_, true) => GateState::Passed,
        _ => GateState::Open,
    }
}

fn errors(incumbent: &Window, candidate: &Window, gates: &Gates) -> Evidence {
    let (difference, half) = proportion_difference(incumbent.errors, candidate.errors, gates.alpha);
    let enough = candidate.requests() >= gates.requests_min;
    let state = if difference - half > gates.error_rate_rise_max {
        GateState::Failed
    } else if enough && difference <= gates.error_rate_rise_max {
        // Failures are rare: that there is no more of them is all that some hundreds of requests can show.
        GateState::Passed
    } else {
        GateState::Open
    };
    Evidence {
        gate: Gate::Errors,
        incumbent: incumbent.errors.value(),
        candidate: candidate.errors.value(),
        interval: finite(difference - half, difference + half),
        limit: gates.error_rate_rise_max,
        observations: candidate.errors.total,
        state,
    }
}

/// A candidate is too slow where it exceeds, beyond chance, the bound on the incumbent's median, or that on its 95th percentile, on more
/// of its requests than the incumbent does. How often a bound is exceeded is compared, never two estimates of a quantile: where both arms
/// were fast for a while and then slow, their medians lie far apart by chance alone, and their exceedances do not.
fn latency(incumbent: &Window, candidate: &Window, gates: &Gates) -> Evidence {
    /// The quantile whose bound is meant, and by what share of the requests it may be exceeded more often.
    const BOUNDS: [(f64, f64); 2] = [(0.5, 0.25), (0.95, 0.05)];
    let quantile = |window: &Window, q| window.latency.quantile_ms(q);
    let enough = |window: &Window| window.latency.count() >= gates.requests_min;
    let rises = BOUNDS.map(|(q, rise_max)| {
        let quantile_ms = quantile(incumbent, q).unwrap_or_default();
        let bound_us = (quantile_ms * gates.latency_ratio_max).max(quantile_ms + gates.latency_slack_ms) * 1e3;
        let over = |window: &Window| {
            let total = window.latency.count();
            Proportion { count: total - window.latency.at_most(bound_us as u64), total }
        };
        let (rise, half) = proportion_difference(over(incumbent), over(candidate), gates.alpha);
        (rise, half, rise - half > rise_max)
    });
    let failed = rises.iter().find(|(.., failed)| *failed);
    let state = match incumbent.latency.count() {
        _ if !enough(candidate) => GateState::Open,
        // An incumbent that no longer answers can't be compared with.
        0 => GateState::Passed,
        _ if !enough(incumbent) => GateState::Open,
        _ if failed.is_some() => GateState::Failed,
        _ => GateState::Passed,
    };
    let (rise, half, _) = failed.unwrap_or(&rises[0]);
    Evidence {
        gate: Gate::Latency,
        incumbent: quantile(incumbent, 0.5),
        candidate: quantile(candidate, 0.5),
        interval: finite(rise - half, rise + half),
        limit: gates.latency_ratio_max,
        observations: candidate.latency.count(),
        state,
    }
}

fn accuracy(incumbent: &Window, candidate: &Window, gates: &Gates) -> Evidence {
    let (difference, half) = proportion_difference(incumbent.accuracy, candidate.accuracy, gates.alpha);
    let enough = incumbent.accuracy.total.min(candidate.accuracy.total) >= gates.labels_min;
    let state = match enough {
        true => two_sided(difference - half, difference + half, -gates.accuracy_drop_max, false),
        false => GateState::Open,
    };
    Evidence {
        gate: Gate::Accuracy,
        incumbent: incumbent.accuracy.value(),
        candidate: candidate.accuracy.value(),
        interval: finite(difference - half, difference + half),
        limit: -gates.accuracy_drop_max,
        observations: candidate.accuracy.total,
        state,
    }
}

fn agreement(candidate: &Window, gates: &Gates) -> Evidence {
    let Proportion { total, .. } = candidate.agreement;
    let value = candidate.agreement.value();
    let p = (candidate.agreement.count as f64 + 1.0) / (total as f64 + 2.0);
    let half = half_width((p * (1.0 - p)).sqrt(), total as f64, gates.alpha);
    let (low, high) = (value.unwrap_or(0.0) - half, value.unwrap_or(1.0) + half);
    Evidence {
        gate: Gate::Agreement,
        incumbent: None,
        candidate: value,
        interval: finite(low, high),
        limit: gates.agreement_min,
        observations: total,
        state: two_sided(low, high, gates.agreement_min, false),
    }
}

fn confidence(incumbent: &Window, candidate: &Window, gates: &Gates) -> Evidence {
    let ((n, a, deviation_a), (m, b, deviation_b)) = (incumbent.confidence(), candidate.confidence());
    let mut evidence = Evidence {
        gate: Gate::Confidence,
        incumbent: (n > 0.0).then_some(a),
        candidate: (m > 0.0).then_some(b),
        interval: None,
        limit: -gates.confidence_drop_max,
        observations: m as u64,
        state: GateState::Open,
    };
    if n > 1.0 && m > 1.0 {
        let effective = n * m / (n + m);
        let variance = deviation_a * deviation_a / n + deviation_b * deviation_b / m;
        let half = half_width((variance * effective).sqrt(), effective, gates.alpha);
        evidence.interval = finite(b - a - half, b - a + half);
        evidence.state = two_sided(b - a - half, b - a + half, -gates.confidence_drop_max, false);
    } else if candidate.requests() >= gates.requests_min {
        // A model that gives no probabilities has no confidence to lose.
        evidence.state = GateState::Passed;
    }
    evidence
}

fn finite(low: f64, high: f64) -> Option<[f64; 2]> {
    (low.is_finite() && high.is_finite()).then_some([low, high])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// A window of `n` requests with these shares.
    fn window(n: u64, errors: f64, accuracy: Option<f64>, agreement: Option<f64>, latency_ms: u64) -> Window {
        let mut window = Window::default();
        let share = |i: u64, p: f64| (i as f64 * p).floor() < ((i + 1) as f64 * p).floor();
        for i in 0..n {
            if share(i, errors) {
                window.failed();
            } else {
                window.answered(Duration::from_millis(latency_ms), Some(0.9));
            }
            accuracy.inspect(|&p| window.accuracy.add(share(i, p)));
            agreement.inspect(|&p| window.agreement.add(share(i, p)));
        }
        window
    }

    #[test]
    fn verdicts() {
        use Verdict::*;
        let good = || window(2000, 0.0, Some(0.98), None, 5);
        let silent = || window(2000, 0.0, None, None, 5);
        let cases = [
            ("as good", good(), window(2000, 0.0, Some(0.98), Some(0.97), 5), Promote),
            (
                "better, and disagrees",
                window(2000, 0.0, Some(0.8), None, 5),
                window(2000, 0.0, Some(0.98), Some(0.8), 5),
                Promote,
            ),
            ("worse, and agrees", good(), window(2000, 0.0, Some(0.85), Some(1.0), 5), RollBack),
            ("nothing seen", good(), Window::default(), Hold),
            ("little seen", good(), window(50, 0.0, Some(0.98), None, 5), Hold),
            ("fails", good(), window(2000, 0.1, Some(0.98), None, 5), RollBack),
            ("slow", good(), window(2000, 0.0, Some(0.98), None, 20), RollBack),
            ("no labels, agrees", silent(), window(2000, 0.0, None, Some(0.99), 5), Promote),
            ("no labels, disagrees", silent(), window(2000, 0.0, None, Some(0.7), 5), RollBack),
            ("no labels, nothing compared", silent(), window(2000, 0.0, None, None, 5), Hold),
            ("labels of one arm alone", silent(), window(2000, 0.0, Some(0.98), Some(0.99), 5), Hold),
        ];
        for (name, incumbent, candidate, expected) in cases {
            let (verdict, evidence) = judge(&incumbent, &candidate, &Gates::default(), Labels::Due);
            assert_eq!(verdict, expected, "{name}: {evidence:#?}");
        }
    }

    #[test]
    fn disagreement_waits_for_labels() {
        let (incumbent, candidate) = (window(2000, 0.0, None, None, 5), window(2000, 0.0, None, Some(0.7), 5));
        let verdict = |labels| judge(&incumbent, &candidate, &Gates::default(), labels).0;
        assert_eq!(verdict(Labels::Awaited), Verdict::Hold);
        assert_eq!(verdict(Labels::Due), Verdict::RollBack);
    }

    #[test]
    fn a_slow_tail_fails_though_the_median_does_not() {
        let mut candidate = window(1800, 0.0, Some(0.98), None, 5);
        (0..200).for_each(|_| candidate.answered(Duration::from_millis(50), Some(0.9)));
        let (verdict, evidence) =
            judge(&window(2000, 0.0, Some(0.98), None, 5), &candidate, &Gates::default(), Labels::Due);
        assert_eq!(verdict, Verdict::RollBack, "{evidence:#?}");
    }

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
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
