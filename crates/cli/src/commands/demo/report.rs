//! What the demo found, as a table and as JSON.

use super::clients::Answered;
use crate::output::{bytes, table};
use serde_json::{Value as Json, json};

/// Requests this near to a swap are compared with the rest, in seconds.
const NEAR_S: f32 = 0.1;

/// Everything that was seen.
pub struct Findings {
    pub versions: Vec<&'static str>,
    pub answered: Vec<Answered>,
    pub failed: u64,
    pub wrong_version: u64,
    pub complaints: Vec<String>,
    /// What happened when, in seconds since the clients started.
    pub swaps: Vec<(f32, String)>,
    pub memory_before: u64,
    pub memory_after: u64,
    pub decisions: Vec<Decision>,
    pub seconds: f64,
}

/// How one rollout ended.
pub struct Decision {
    pub strategy: String,
    pub version: String,
    /// How it must end: as the history says it.
    pub expected: &'static str,
    pub outcome: String,
    /// The numbers it rests on.
    pub reason: String,
    /// From its deploy to its decision, in seconds since the clients started.
    pub began_s: f32,
    pub ended_s: f32,
}

impl Findings {
    /// Whether all is as it must be.
    pub fn good(&self) -> bool {
        let decided = self.decisions.len() == 4 && self.decisions.iter().all(|d| d.outcome == d.expected);
        self.failed == 0 && self.wrong_version == 0 && decided && self.seen_of_shadows() == 0
    }

    fn decided(&self, strategy: &str, version: &str) -> Option<&Decision> {
        self.decisions.iter().find(|d| d.strategy == strategy && d.version == version)
    }

    /// Answers that callers got from a version while it was a shadow.
    fn seen_of_shadows(&self) -> usize {
        let shadows = self.decisions.iter().filter(|d| d.strategy == "shadow");
        let seen = |d: &Decision| {
            let version = self.versions.iter().position(|v| *v == d.version);
            let during =
                |a: &&Answered| Some(usize::from(a.version)) == version && a.at_s > d.began_s && a.at_s < d.ended_s;
            self.answered.iter().filter(during).count()
        };
        shadows.map(seen).sum()
    }

    fn of(&self, version: usize) -> impl Iterator<Item = &Answered> {
        self.answered.iter().filter(move |a| usize::from(a.version) == version)
    }

    fn is_near_a_swap(&self, answered: &Answered) -> bool {
        // Asked before the end of the time round the swap, answered after its beginning.
        let asked_s = answered.at_s - answered.latency_ms / 1e3;
        self.swaps.iter().any(|(at, _)| asked_s <= at + NEAR_S && answered.at_s >= at - NEAR_S)
    }

    fn p99_near_and_far(&self) -> (Option<f32>, Option<f32>) {
        let near = quantile(self.answered.iter().filter(|a| self.is_near_a_swap(a)), 0.99);
        (near, quantile(self.answered.iter().filter(|a| !self.is_near_a_swap(a)), 0.99))
    }

    pub fn json(&self) -> Json {
        let versions = self.versions.iter().enumerate().map(|(i, name)| {
            json!({
                "version": name, "requests": self.of(i).count(), "accuracy": accuracy(self.of(i)),
                "latency_p50_ms": quantile(self.of(i), 0.5), "latency_p99_ms": quantile(self.of(i), 0.99),
            })
        });
        let (near, far) = self.p99_near_and_far();
        json!({
            "good": self.good(),
            "versions": versions.collect::<Vec<_>>(),
            "requests": self.answered.len(),
            "failed": self.failed,
            "answered_by_wrong_version": self.wrong_version,
            "complaints": self.complaints,
            "v2_promoted": self.decided("canary", "v2").is_some_and(|d| d.outcome == "promoted"),
            "v3_rolled_back": self.decided("canary", "v3").is_some_and(|d| d.outcome == "rolled back"),
            "rollback_reason": self.decided("canary", "v3").map(|d| &d.reason),
            "answers_of_a_shadow": self.seen_of_shadows(),
            "decisions": self.decisions.iter().map(|d| json!({
                "strategy": d.strategy, "version": d.version, "outcome": d.outcome, "expected": d.expected,
                "reason": d.reason, "seconds": d.ended_s - d.began_s,
            })).collect::<Vec<_>>(),
            "swaps": self.swaps.iter().map(|(at, what)| json!({ "at_s": at, "what": what })).collect::<Vec<_>>(),
            "latency_p99_ms_within_100_ms_of_a_swap": near,
            "latency_p99_ms_otherwise": far,
            "memory_bytes_before": self.memory_before,
            "memory_bytes_after": self.memory_after,
            "seconds": self.seconds,
        })
    }

    pub fn text(&self) -> String {
        let ms = |v: Option<f32>| v.map_or("-".to_string(), |v| format!("{v:.2}"));
        let rows = self.versions.iter().enumerate().map(|(i, name)| {
            vec![
                name.to_string(),
                self.of(i).count().to_string(),
                accuracy(self.of(i)).map_or("-".to_string(), |a| format!("{:.2} %", 100.0 * a)),
                ms(quantile(self.of(i), 0.5)),
                ms(quantile(self.of(i), 0.99)),
            ]
        });
        let header = ["version", "requests answered", "accuracy", "latency p50 ms", "p99 ms"];
        let mut text = format!("\n{}\n\n", table(&header, rows.collect(), true));
        let (near, far) = self.p99_near_and_far();
        let row = |what: &str, value: String| vec![what.to_string(), value];
        let rows = vec![
            row("requests failed", self.failed.to_string()),
            row("answered by the wrong version", self.wrong_version.to_string()),
            row("answers of v3 while it was a shadow", self.seen_of_shadows().to_string()),
            row("p99 ms within 100 ms of a swap", ms(near)),
            row("p99 ms otherwise", ms(far)),
            row("memory before", bytes(self.memory_before)),
            row("memory after", bytes(self.memory_after)),
        ];
        text += &table(&["", "value"], rows, true);
        let decisions = self.decisions.iter().map(|d| {
            let outcome =
                if d.outcome == d.expected { d.outcome.clone() } else { format!("{}, NOT {}", d.outcome, d.expected) };
            vec![d.version.clone(), d.strategy.clone(), outcome, format!("{:.1} s", d.ended_s - d.began_s)]
        });
        text += &format!("\n\n{}\n", table(&["version", "strategy", "decision", "after"], decisions.collect(), false));
        for d in &self.decisions {
            text += &format!("\n{} by {}: {}", d.version, d.strategy, d.reason);
        }
        for complaint in &self.complaints {
            text += &format!("\nwrong: {complaint}");
        }
        text
    }
}

fn quantile<'a>(answered: impl Iterator<Item = &'a Answered>, q: f64) -> Option<f32> {
    let mut latencies: Vec<f32> = answered.map(|a| a.latency_ms).collect();
    latencies.sort_by(f32::total_cmp);
    let rank = (q * latencies.len() as f64).ceil() as usize;
    latencies.get(rank.saturating_sub(1)).copied()
}

fn accuracy<'a>(answered: impl Iterator<Item = &'a Answered>) -> Option<f64> {
    let (right, total) = answered.fold((0u64, 0u64), |(r, t), a| (r + u64::from(a.right), t + 1));
    (total > 0).then(|| right as f64 / total as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_take_the_nearest_rank() {
        let answered: Vec<Answered> =
            (1..=100).map(|ms| Answered { latency_ms: ms as f32, ..Answered::default() }).collect();
        assert_eq!(quantile(answered.iter(), 0.5), Some(50.0));
        assert_eq!(quantile(answered.iter(), 0.99), Some(99.0));
        assert_eq!(quantile([].iter(), 0.5), None);
    }
}
