//! The comparison of a candidate with the incumbent, and what follows.

use crate::{
    Classes, Gates, Labels, Moments, Proportion, Strata, Window, half_width, ln_evidence_above, ln_evidence_below,
    proportion_difference, sequence::TIGHTEST_AT, stratified_difference,
};
use serde::{Deserialize, Serialize};

/// What was compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// The share of failed requests beside the incumbent's, as a difference.
    Errors,
    /// The same, as a ratio.
    ErrorRatio,
    /// The same, on its own.
    ErrorRate,
    /// Latency beside the incumbent's.
    Latency,
    /// Latency on its own.
    LatencyLimit,
    /// Accuracy beside the incumbent's.
    Accuracy,
    /// Accuracy on its own.
    AccuracyFloor,
    Agreement,
    Margin,
    Confidence,
    Entropy,
    Drift,
    /// What an A/B test is about.
    Effect,
}

impl Gate {
    /// As people are told of it.
    pub fn name(self) -> &'static str {
        match self {
            Gate::Errors => "errors",
            Gate::ErrorRatio => "error ratio",
            Gate::ErrorRate => "error rate",
            Gate::Latency => "latency",
            Gate::LatencyLimit => "latency limit",
            Gate::Accuracy => "accuracy",
            Gate::AccuracyFloor => "accuracy floor",
            Gate::Agreement => "agreement",
            Gate::Margin => "margin",
            Gate::Confidence => "confidence",
            Gate::Entropy => "entropy",
            Gate::Drift => "drift",
            Gate::Effect => "effect",
        }
    }
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
    /// What no number says; mostly empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
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
    /// Both arms fail it alike: it is the data or the device, not the candidate.
    BothArms,
}

impl GateState {
    /// As people are told of it.
    pub fn name(self) -> &'static str {
        match self {
            GateState::Passed => "passed",
            GateState::Failed => "failed",
            GateState::Open => "open",
            GateState::Outranked => "outranked",
            GateState::BothArms => "both arms",
        }
    }
}

/// What follows from all gates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every gate that has something to say passed.
    Promote,
    Hold,
    RollBack,
}

/// How the arms' windows came about.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Design {
    /// Each request went to one arm, to the candidate's with this probability.
    Split { share: f64 },
    /// The incumbent's requests, and the candidate's answers to copies of some.
    Paired,
    /// The incumbent's window ended where the candidate's began.
    BeforeAndAfter,
}

/// What was seen of the incumbent before the candidate came, against which both arms' drift is measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    pub errors: Proportion,
    pub accuracy: Proportion,
    pub confidence: Moments,
    pub classes: Classes,
}

impl Reference {
    pub fn of(window: &Window) -> Reference {
        Reference {
            errors: window.errors,
            accuracy: window.accuracy.pooled(),
            confidence: window.confidence,
            classes: window.classes.clone(),
        }
    }
}

/// Everything a judgement rests on.
#[derive(Clone, Copy, Debug)]
pub struct Comparison<'a> {
    /// Of the same time as the candidate's, but in [`Design::BeforeAndAfter`].
    pub incumbent: &'a Window,
    pub candidate: &'a Window,
    pub design: Design,
    pub labels: Labels,
    pub reference: Option<&'a Reference>,
}

impl Comparison<'_> {
    fn labelled(&self) -> bool {
        let total = |window: &Window| window.accuracy.pooled().total;
        total(self.incumbent).max(total(self.candidate)).max(self.candidate.pairs.labelled()) > 0
    }
}

/// Compares both arms.
///
/// Labels decide where they come: a candidate that disagrees with a bad incumbent, and is right, must pass. Where none come in the time
/// they take, agreement, confidence, entropy, margin and drift stand in for accuracy. What both arms fail alike is an alert, and holds.
pub fn judge(comparison: &Comparison<'_>, gates: &Gates) -> (Verdict, Vec<Evidence>) {
    let Comparison { incumbent, candidate, design, .. } = *comparison;
    let labelled = comparison.labelled();
    let paired = design == Design::Paired;
    let gathered = [
        Some(errors(incumbent, candidate, gates)),
        gates.error_ratio_max.map(|limit| error_ratio(comparison, gates, limit)),
        gates.error_rate_max.map(|limit| error_rate(comparison, gates, limit)),
        Some(if paired { paired_latency(candidate, gates) } else { latency(incumbent, candidate, gates) }),
        gates.latency_p95_max_ms.map(|limit| latency_limit(comparison, gates, limit)),
        Some(if paired { paired_accuracy(candidate, gates) } else { accuracy(incumbent, candidate, gates) }),
        gates.accuracy_min.map(|limit| accuracy_floor(comparison, gates, limit)),
        Some(agreement(candidate, gates)),
        paired.then(|| margin(candidate, gates)),
        Some(means(Gate::Confidence, comparison, gates)),
        Some(means(Gate::Entropy, comparison, gates)),
        Some(drift(comparison, gates)),
    ];
    let mut evidence: Vec<Evidence> = gathered.into_iter().flatten().collect();
    for item in &mut evidence {
        let stands_in =
            matches!(item.gate, Gate::Agreement | Gate::Margin | Gate::Confidence | Gate::Entropy | Gate::Drift);
        let of_labels = matches!(item.gate, Gate::Accuracy | Gate::AccuracyFloor);
        let due = comparison.labels == Labels::Due;
        let outranked = if stands_in { labelled || !due } else { of_labels && !labelled && due };
        if outranked && item.state != GateState::BothArms {
            item.state = GateState::Outranked;
        }
    }
    let has = |state| evidence.iter().any(|e| e.state == state);
    let verdict = if has(GateState::Failed) {
        Verdict::RollBack
    } else if has(GateState::Open) || has(GateState::BothArms) || candidate.requests() < gates.requests_min {
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

fn of(gate: Gate, limit: f64, observations: u64) -> Evidence {
    let note = String::new();
    Evidence {
        gate,
        incumbent: None,
        candidate: None,
        interval: None,
        limit,
        observations,
        state: GateState::Open,
        note,
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
        incumbent: incumbent.errors.value(),
        candidate: candidate.errors.value(),
        interval: finite(difference - half, difference + half),
        state,
        ..of(Gate::Errors, gates.error_rate_rise_max, candidate.errors.total)
    }
}

/// Exact at any rate and share: of the failed requests of both arms, as many are the candidate's as the ratio allows.
fn error_ratio(comparison: &Comparison<'_>, gates: &Gates, limit: f64) -> Evidence {
    let Comparison { incumbent, candidate, design, .. } = comparison;
    let (n, m) = (incumbent.errors, candidate.errors);
    let share = match design {
        Design::Split { share } => *share,
        // Known requests rather than a probability of getting one.
        _ => m.total as f64 / (n.total + m.total).max(1) as f64,
    };
    let of_failures = limit * share / (limit * share + 1.0 - share);
    let evidence = ln_evidence_above(m.count, n.count + m.count, of_failures);
    let within = m.value().unwrap_or(0.0) <= limit * n.value().unwrap_or(0.0);
    let state = match () {
        () if share > 0.0 && share < 1.0 && evidence >= -gates.alpha.ln() => GateState::Failed,
        // So few failures tell no ratio; the difference is looked at by another gate.
        () if m.total >= gates.requests_min && (within || m.count + n.count < 10) => GateState::Passed,
        () => GateState::Open,
    };
    Evidence { incumbent: n.value(), candidate: m.value(), state, ..of(Gate::ErrorRatio, limit, m.total) }
}

/// The state of a share that must not exceed `limit`, whatever the incumbent's is.
fn at_most(limit: f64, incumbent: Proportion, candidate: Proportion, least: u64, alpha: f64) -> GateState {
    let exceeds = |p: Proportion| ln_evidence_above(p.count, p.total, limit) >= -alpha.ln();
    match () {
        () if exceeds(candidate) && exceeds(incumbent) => GateState::BothArms,
        () if exceeds(candidate) => GateState::Failed,
        () if candidate.total >= least && candidate.value().unwrap_or(0.0) <= limit => GateState::Passed,
        () => GateState::Open,
    }
}

fn error_rate(comparison: &Comparison<'_>, gates: &Gates, limit: f64) -> Evidence {
    let (n, m) = (comparison.incumbent.errors, comparison.candidate.errors);
    let state = at_most(limit, n, m, gates.requests_min, gates.alpha);
    Evidence { incumbent: n.value(), candidate: m.value(), state, ..of(Gate::ErrorRate, limit, m.total) }
}

/// How many latencies exceed a bound.
fn over(window: &Window, bound_ms: f64) -> Proportion {
    let total = window.latency.count();
    Proportion { count: total - window.latency.at_most((bound_ms * 1e3) as u64), total }
}

fn latency_limit(comparison: &Comparison<'_>, gates: &Gates, limit_ms: f64) -> Evidence {
    /// Of a 95th percentile.
    const SHARE: f64 = 0.05;
    let (n, m) = (over(comparison.incumbent, limit_ms), over(comparison.candidate, limit_ms));
    let p95 = |window: &Window| window.latency.quantile_ms(0.95);
    Evidence {
        incumbent: p95(comparison.incumbent),
        candidate: p95(comparison.candidate),
        state: at_most(SHARE, n, m, gates.requests_min, gates.alpha),
        ..of(Gate::LatencyLimit, limit_ms, m.total)
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
        let bound_ms = gates.latency_bound_ms(quantile(incumbent, q).unwrap_or_default());
        let (rise, half) = proportion_difference(over(incumbent, bound_ms), over(candidate, bound_ms), gates.alpha);
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
        incumbent: quantile(incumbent, 0.5),
        candidate: quantile(candidate, 0.5),
        interval: finite(rise - half, rise + half),
        state,
        ..of(Gate::Latency, gates.latency_ratio_max, candidate.latency.count())
    }
}

/// On most requests the candidate must take no longer than is allowed beside the incumbent on the same one.
fn paired_latency(candidate: &Window, gates: &Gates) -> Evidence {
    /// Of the pairs.
    const SLOWER_MAX: f64 = 0.5;
    let slower = candidate.pairs.slower;
    let (low, high) = interval_of(slower, gates.alpha);
    let state = match two_sided(low, high, SLOWER_MAX, true) {
        GateState::Passed if slower.total < gates.requests_min => GateState::Open,
        state => state,
    };
    Evidence {
        candidate: slower.value(),
        interval: finite(low, high),
        state,
        ..of(Gate::Latency, SLOWER_MAX, slower.total)
    }
}

fn accuracy(incumbent: &Window, candidate: &Window, gates: &Gates) -> Evidence {
    let (difference, half) = stratified_difference(&incumbent.accuracy, &candidate.accuracy, gates.alpha, TIGHTEST_AT);
    let (n, m) = (incumbent.accuracy.pooled(), candidate.accuracy.pooled());
    let state = match n.total.min(m.total) >= gates.labels_min {
        true => two_sided(difference - half, difference + half, -gates.accuracy_drop_max, false),
        false => GateState::Open,
    };
    Evidence {
        incumbent: n.value(),
        candidate: m.value(),
        interval: finite(difference - half, difference + half),
        state,
        ..of(Gate::Accuracy, -gates.accuracy_drop_max, m.total)
    }
}

/// Of pairs the difference within each is looked at: what makes a request hard is hard for both.
fn paired_accuracy(candidate: &Window, gates: &Gates) -> Evidence {
    let pairs = candidate.pairs;
    let n = pairs.labelled() as f64;
    let (worse, better) = (pairs.incumbent_only as f64, pairs.candidate_only as f64);
    let difference = (better - worse) / n.max(1.0);
    // One pair of each kind is added to the variance, so that agreement so far does not look certain.
    let variance = (worse + better + 2.0) / (n + 2.0) - difference * difference;
    let half = half_width(variance.max(0.0).sqrt(), n, gates.alpha, TIGHTEST_AT);
    let state = match pairs.labelled() >= gates.labels_min {
        true => two_sided(difference - half, difference + half, -gates.accuracy_drop_max, false),
        false => GateState::Open,
    };
    let share = |only: f64| (n > 0.0).then(|| only / n);
    Evidence {
        incumbent: share(worse),
        candidate: share(better),
        interval: finite(difference - half, difference + half),
        state,
        note: "shares of the pairs on which only this arm is right".to_string(),
        ..of(Gate::Accuracy, -gates.accuracy_drop_max, pairs.labelled())
    }
}

fn accuracy_floor(comparison: &Comparison<'_>, gates: &Gates, limit: f64) -> Evidence {
    let of_arm = |window: &Window| window.accuracy.pooled();
    let (n, m) = (of_arm(comparison.incumbent), of_arm(comparison.candidate));
    let below = |p: Proportion| ln_evidence_below(p.count, p.total, limit) >= -gates.alpha.ln();
    let state = match () {
        () if below(m) && below(n) => GateState::BothArms,
        () if below(m) => GateState::Failed,
        () if m.total >= gates.labels_min && m.value().unwrap_or(0.0) >= limit => GateState::Passed,
        () => GateState::Open,
    };
    Evidence { incumbent: n.value(), candidate: m.value(), state, ..of(Gate::AccuracyFloor, limit, m.total) }
}

/// What an A/B test measures; more is better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// The share of right answers among those whose label came.
    #[default]
    Accuracy,
    /// The mean probability of the winning class.
    Confidence,
    /// The share of requests that are answered.
    Answered,
}

/// The candidate's effect on `metric` beside the incumbent's, with a confidence sequence each side of which holds at level `alpha`: passed
/// where there is one and it is seen to be at least `minimum`, failed where it is surely smaller than that.
pub fn effect(
    metric: Metric,
    incumbent: &Window,
    candidate: &Window,
    minimum: f64,
    alpha: f64,
    least: u64,
) -> Evidence {
    /// Effects worth a test are small: they take thousands of observations.
    const TIGHTEST_AT: f64 = 2000.0;
    let answered = |window: &Window| {
        let Proportion { count, total } = window.errors;
        Proportion { count: total - count, total }
    };
    let ((difference, half), [n, m], observations) = match metric {
        Metric::Accuracy => {
            let [a, b] = [incumbent.accuracy.pooled(), candidate.accuracy.pooled()];
            let effect = stratified_difference(&incumbent.accuracy, &candidate.accuracy, alpha, TIGHTEST_AT);
            (effect, [a.value(), b.value()], a.total.min(b.total))
        }
        Metric::Answered => {
            let [a, b] = [answered(incumbent), answered(candidate)];
            let effect = stratified_difference(&Strata::of(a), &Strata::of(b), alpha, TIGHTEST_AT);
            (effect, [a.value(), b.value()], a.total.min(b.total))
        }
        Metric::Confidence => {
            let (a, b) = (incumbent.confidence, candidate.confidence);
            let effect = mean_difference(a, b, alpha).unwrap_or((0.0, f64::INFINITY));
            (effect, [a.mean(), b.mean()], a.count().min(b.count()) as u64)
        }
    };
    let state = match () {
        () if observations < least => GateState::Open,
        () if difference - half > 0.0 && difference >= minimum => GateState::Passed,
        () if difference + half < minimum => GateState::Failed,
        () => GateState::Open,
    };
    let interval = finite(difference - half, difference + half);
    Evidence { incumbent: n, candidate: m, interval, state, ..of(Gate::Effect, minimum, observations) }
}

/// A proportion's confidence sequence.
fn interval_of(observed: Proportion, alpha: f64) -> (f64, f64) {
    let n = observed.total as f64;
    let p = (observed.count as f64 + 1.0) / (n + 2.0);
    let half = half_width((p * (1.0 - p)).sqrt(), n, alpha, TIGHTEST_AT);
    (observed.value().unwrap_or(0.0) - half, observed.value().unwrap_or(1.0) + half)
}

fn agreement(candidate: &Window, gates: &Gates) -> Evidence {
    let observed = candidate.agreement;
    let (low, high) = interval_of(observed, gates.alpha);
    Evidence {
        candidate: observed.value(),
        interval: finite(low, high),
        state: two_sided(low, high, gates.agreement_min, false),
        ..of(Gate::Agreement, gates.agreement_min, observed.total)
    }
}

fn margin(candidate: &Window, gates: &Gates) -> Evidence {
    let margin = candidate.pairs.margin;
    let n = margin.count();
    let mut evidence = Evidence { candidate: margin.mean(), ..of(Gate::Margin, -gates.margin_drop_max, n as u64) };
    if n > 1.0 {
        let (mean, half) =
            (margin.mean().unwrap_or(0.0), half_width(margin.variance().sqrt(), n, gates.alpha, TIGHTEST_AT));
        evidence.interval = finite(mean - half, mean + half);
        evidence.state = two_sided(mean - half, mean + half, -gates.margin_drop_max, false);
    } else if candidate.requests() >= gates.requests_min {
        evidence.state = GateState::Passed;
    }
    evidence
}

/// The difference of two means, and half the width of its confidence sequence.
fn mean_difference(a: Moments, b: Moments, alpha: f64) -> Option<(f64, f64)> {
    let (n, m) = (a.count(), b.count());
    if n <= 1.0 || m <= 1.0 {
        return None;
    }
    let effective = n * m / (n + m);
    let variance = a.variance() / n + b.variance() / m;
    let half = half_width((variance * effective).sqrt(), effective, alpha, TIGHTEST_AT);
    Some((b.mean()? - a.mean()?, half))
}

/// Confidence or entropy.
fn means(gate: Gate, comparison: &Comparison<'_>, gates: &Gates) -> Evidence {
    let entropy = gate == Gate::Entropy;
    let of_arm = |window: &Window| if entropy { window.entropy } else { window.confidence };
    let (a, b) = (of_arm(comparison.incumbent), of_arm(comparison.candidate));
    let limit = if entropy { gates.entropy_rise_max } else { -gates.confidence_drop_max };
    let mut evidence = Evidence { incumbent: a.mean(), candidate: b.mean(), ..of(gate, limit, b.count() as u64) };
    if let Some((difference, half)) = mean_difference(a, b, gates.alpha) {
        evidence.interval = finite(difference - half, difference + half);
        evidence.state = two_sided(difference - half, difference + half, limit, entropy);
    } else if comparison.candidate.requests() >= gates.requests_min {
        // A model that gives no probabilities has no confidence to lose.
        evidence.state = GateState::Passed;
    }
    evidence
}

/// Whether what is answered moved: against what was seen before, in both arms or in one, and between the arms.
///
/// Arms get the same data, so what moved in both alike is the data's doing. Where the arms can't be told apart by time
/// ([`Design::BeforeAndAfter`]) nothing can be said of the data.
fn drift(comparison: &Comparison<'_>, gates: &Gates) -> Evidence {
    let Comparison { incumbent, candidate, design, .. } = comparison;
    let limit = gates.drift_max;
    let mut evidence = of(Gate::Drift, limit, candidate.classes.total());
    evidence.state = GateState::Passed;
    if *design == Design::BeforeAndAfter {
        evidence.state = GateState::Outranked;
        return evidence;
    }
    let moved = |stability: Option<(f64, f64)>| stability.is_some_and(|(index, chance)| index > limit.max(chance));
    let between = candidate.classes.stability(&incumbent.classes);
    if let Some(reference) = comparison.reference {
        let [n, m] = [incumbent, candidate].map(|window| window.classes.stability(&reference.classes));
        (evidence.incumbent, evidence.candidate) = (n.map(|(index, _)| index), m.map(|(index, _)| index));
        let shifted = [incumbent, candidate].map(|window| shifts(window, reference, gates));
        let classes = (moved(n) && moved(m) && !moved(between)).then_some("the classes that win");
        if let Some(what) = classes.into_iter().chain(both(&shifted)).next() {
            evidence.state = GateState::BothArms;
            evidence.note = format!("{what} moved in both arms alike");
            return evidence;
        }
    }
    if moved(between) {
        evidence.state = GateState::Failed;
        evidence.candidate = between.map(|(index, _)| index);
        evidence.note = "the candidate's classes against the incumbent's".to_string();
    }
    evidence
}

/// What of an arm moved since before, as far as no candidate can be the reason.
fn shifts(window: &Window, reference: &Reference, gates: &Gates) -> Vec<&'static str> {
    let alpha = gates.alpha / 3.0;
    let beyond = |(difference, half): (f64, f64), limit: f64| difference.abs() - half > limit;
    let confidence = mean_difference(reference.confidence, window.confidence, alpha);
    let errors = proportion_difference(reference.errors, window.errors, alpha);
    let accuracy = proportion_difference(reference.accuracy, window.accuracy.pooled(), alpha);
    [
        ("confidence", confidence.is_some_and(|moved| beyond(moved, gates.confidence_drop_max))),
        ("the share of failed requests", errors.0 - errors.1 > gates.error_rate_rise_max),
        ("accuracy", beyond(accuracy, gates.accuracy_drop_max)),
    ]
    .into_iter()
    .filter_map(|(what, moved)| moved.then_some(what))
    .collect()
}

fn both<'a>([a, b]: &'a [Vec<&'static str>; 2]) -> impl Iterator<Item = &'static str> + 'a {
    a.iter().filter(|what| b.contains(what)).copied()
}

fn finite(low: f64, high: f64) -> Option<[f64; 2]> {
    (low.is_finite() && high.is_finite()).then_some([low, high])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Seen;
    use std::time::Duration;

    /// A window of `n` requests with these shares.
    fn window(n: u64, errors: f64, accuracy: Option<f64>, agreement: Option<f64>, latency_ms: u64) -> Window {
        let mut window = Window::default();
        let share = |i: u64, p: f64| (i as f64 * p).floor() < ((i + 1) as f64 * p).floor();
        for i in 0..n {
            if share(i, errors) {
                window.failed();
            } else {
                let seen = Seen { classes: vec![(i % 10) as u32], confidence: 0.9, margin: 0.8, entropy: 0.1 };
                window.answered(Duration::from_millis(latency_ms), Some(&seen));
            }
            accuracy.inspect(|&p| window.accuracy.add(share(i, p)));
            agreement.inspect(|&p| window.agreement.add(share(i, p)));
        }
        window
    }

    fn split<'a>(incumbent: &'a Window, candidate: &'a Window, labels: Labels) -> Comparison<'a> {
        Comparison { incumbent, candidate, design: Design::Split { share: 0.5 }, labels, reference: None }
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
            let (verdict, evidence) = judge(&split(&incumbent, &candidate, Labels::Due), &Gates::default());
            assert_eq!(verdict, expected, "{name}: {evidence:#?}");
        }
    }

    #[test]
    fn limits_of_their_own_blame_the_candidate_alone_for_what_it_alone_does() {
        let gates = Gates {
            error_rate_max: Some(0.02),
            error_ratio_max: Some(1.5),
            accuracy_min: Some(0.9),
            latency_p95_max_ms: Some(10.0),
            ..Gates::default()
        };
        use {GateState::*, Verdict::*};
        let good = || window(3000, 0.004, Some(0.98), None, 5);
        let cases = [
            ("good", good(), good(), Promote, (Gate::ErrorRate, Passed)),
            (
                "five times the failures",
                good(),
                window(3000, 0.019, Some(0.98), None, 5),
                RollBack,
                (Gate::ErrorRatio, Failed),
            ),
            (
                "both fail",
                window(3000, 0.1, Some(0.98), None, 5),
                window(3000, 0.1, Some(0.98), None, 5),
                Hold,
                (Gate::ErrorRate, BothArms),
            ),
            ("too slow", good(), window(3000, 0.004, Some(0.98), None, 30), RollBack, (Gate::LatencyLimit, Failed)),
            (
                "both slow",
                window(3000, 0.004, Some(0.98), None, 30),
                window(3000, 0.004, Some(0.98), None, 30),
                Hold,
                (Gate::LatencyLimit, BothArms),
            ),
            (
                "below the floor",
                good(),
                window(3000, 0.004, Some(0.8), None, 5),
                RollBack,
                (Gate::AccuracyFloor, Failed),
            ),
            (
                "both below",
                window(3000, 0.004, Some(0.8), None, 5),
                window(3000, 0.004, Some(0.8), None, 5),
                Hold,
                (Gate::AccuracyFloor, BothArms),
            ),
        ];
        for (name, incumbent, candidate, expected, (gate, state)) in cases {
            let (verdict, evidence) = judge(&split(&incumbent, &candidate, Labels::Due), &gates);
            let found = evidence.iter().find(|e| e.gate == gate).unwrap();
            assert_eq!((verdict, found.state), (expected, state), "{name}: {evidence:#?}");
        }
    }

    #[test]
    fn what_moves_in_both_arms_holds_and_what_moves_in_one_counts_against_it() {
        let of_classes = |classes: u32, confidence: f64| {
            let mut window = Window::default();
            for i in 0..2000 {
                let seen = Seen { classes: vec![i % classes], confidence, margin: 0.8, entropy: 0.1 };
                window.answered(Duration::from_millis(5), Some(&seen));
                window.agreement.add(true);
            }
            window
        };
        let reference = Reference::of(&of_classes(10, 0.9));
        let of = |incumbent: &Window, candidate: &Window| {
            let comparison = Comparison { reference: Some(&reference), ..split(incumbent, candidate, Labels::Due) };
            let (verdict, evidence) = judge(&comparison, &Gates::default());
            (verdict, evidence.into_iter().find(|e| e.gate == Gate::Drift).unwrap())
        };
        let (calm, moved, unsure) = (of_classes(10, 0.9), of_classes(4, 0.9), of_classes(10, 0.6));
        assert_eq!(of(&calm, &calm).0, Verdict::Promote);
        let (verdict, evidence) = of(&moved, &moved);
        assert!(verdict == Verdict::Hold && evidence.note.contains("both arms"), "{evidence:?}");
        let (verdict, evidence) = of(&unsure, &unsure);
        assert!(verdict == Verdict::Hold && evidence.note.contains("confidence"), "{evidence:?}");
        let (verdict, evidence) = of(&calm, &moved);
        assert_eq!((verdict, evidence.state), (Verdict::RollBack, GateState::Failed));
    }

    #[test]
    fn pairs_tell_a_worse_candidate_with_few_labels() {
        let paired = |worse: u64, better: u64, alike: u64, slower: bool| {
            let mut candidate = window(300, 0.0, None, Some(0.97), 5);
            candidate.pairs = Pairs { incumbent_only: worse, candidate_only: better, alike, ..Pairs::default() };
            (0..300).for_each(|_| candidate.pairs.slower.add(slower));
            (0..300).for_each(|_| candidate.pairs.margin.add(0.01));
            candidate
        };
        use crate::Pairs;
        let incumbent = window(5000, 0.0, Some(0.98), None, 5);
        let of = |candidate: &Window| {
            let comparison = Comparison { design: Design::Paired, ..split(&incumbent, candidate, Labels::Awaited) };
            judge(&comparison, &Gates::default())
        };
        assert_eq!(of(&paired(1, 1, 1500, false)).0, Verdict::Promote);
        assert_eq!(of(&paired(60, 2, 238, false)).0, Verdict::RollBack);
        assert_eq!(of(&paired(1, 1, 1500, true)).0, Verdict::RollBack);
        assert_eq!(of(&paired(1, 1, 20, false)).0, Verdict::Hold);
    }

    #[test]
    fn disagreement_waits_for_labels() {
        let (incumbent, candidate) = (window(2000, 0.0, None, None, 5), window(2000, 0.0, None, Some(0.7), 5));
        let verdict = |labels| judge(&split(&incumbent, &candidate, labels), &Gates::default()).0;
        assert_eq!(verdict(Labels::Awaited), Verdict::Hold);
        assert_eq!(verdict(Labels::Due), Verdict::RollBack);
    }

    #[test]
    fn a_slow_tail_fails_though_the_median_does_not() {
        let mut candidate = window(1800, 0.0, Some(0.98), None, 5);
        (0..200).for_each(|_| candidate.answered(Duration::from_millis(50), None));
        let incumbent = window(2000, 0.0, Some(0.98), None, 5);
        let (verdict, evidence) = judge(&split(&incumbent, &candidate, Labels::Due), &Gates::default());
        assert_eq!(verdict, Verdict::RollBack, "{evidence:#?}");
    }
}
