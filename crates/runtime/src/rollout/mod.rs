//! Who gets traffic while a new version is tried.
//!
//! A strategy is its parameters and a pure state machine: [`Rollout::handle`] is given the serving time so far and an event, and says
//! what to do. It reads no clock and no file, so a simulator can drive it, and it can be stored between any two events.

mod blue_green;
mod canary;

pub use blue_green::BlueGreen;
pub use canary::{Canary, Step};

use cutover_monitor::{Evidence, GateState, Gates, Labels, Verdict, Window, judge};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How a version is to be rolled out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// All traffic at once, and back at once.
    BlueGreen(BlueGreen),
    /// A growing share of the traffic.
    Canary(Canary),
}

impl Strategy {
    pub fn blue_green() -> Strategy {
        Strategy::BlueGreen(BlueGreen::default())
    }

    pub fn canary() -> Strategy {
        Strategy::Canary(Canary::default())
    }

    /// As it is written on command lines.
    pub fn name(&self) -> &'static str {
        match self {
            Strategy::BlueGreen(_) => "blue-green",
            Strategy::Canary(_) => "canary",
        }
    }

    /// # Errors
    /// Parameters that make no rollout, and why.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Strategy::BlueGreen(strategy) => strategy.check(),
            Strategy::Canary(strategy) => strategy.check(),
        }
    }

    /// Takes the gates that the package carries.
    pub fn set_gates(&mut self, gates: Gates) {
        match self {
            Strategy::BlueGreen(strategy) => strategy.gates = gates,
            Strategy::Canary(strategy) => strategy.gates = gates,
        }
    }
}

/// What happened.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// The candidate was admitted and can take traffic.
    Admitted,
    /// What was counted of both arms since then.
    Observed { incumbent: &'a Window, candidate: &'a Window },
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send this share of requests, between 0 and 1, to the candidate.
    Share(f64),
    /// The candidate becomes the version in service.
    Promote { reason: String },
    /// The candidate gets no more traffic.
    RollBack { reason: String },
}

/// A rollout under way: a strategy and where it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    pub strategy: Strategy,
    /// Index of the step, for strategies that have some.
    pub step: usize,
    /// Serving time at which the step began.
    pub step_began: Duration,
    pub share: f64,
    /// Whether a label ever came: then labels decide, also while a step still waits for its first.
    #[serde(default)]
    pub labelled: bool,
    /// What the last judgement rested on.
    pub evidence: Vec<Evidence>,
}

impl Rollout {
    pub fn new(strategy: Strategy) -> Rollout {
        Rollout { strategy, step: 0, step_began: Duration::ZERO, share: 0.0, labelled: false, evidence: Vec::new() }
    }

    /// Moves on. `serving` is the time since admission in which both arms could serve.
    pub fn handle(&mut self, serving: Duration, event: Event<'_>) -> Vec<Action> {
        let actions = match self.strategy.clone() {
            Strategy::BlueGreen(strategy) => strategy.handle(self, serving, event),
            Strategy::Canary(strategy) => strategy.handle(self, serving, event),
        };
        for action in &actions {
            if let Action::Share(share) = action {
                self.share = *share;
            }
        }
        actions
    }

    /// What follows from both windows, kept as the evidence of the last judgement.
    fn judge(&mut self, serving: Duration, incumbent: &Window, candidate: &Window, gates: &Gates) -> Verdict {
        self.labelled |= incumbent.accuracy.total.max(candidate.accuracy.total) > 0;
        let labels = if self.labelled { Labels::Awaited } else { gates.labels(serving.as_secs_f64()) };
        let (verdict, evidence) = judge(incumbent, candidate, gates, labels);
        self.evidence = evidence;
        verdict
    }
}

/// The gates in this state, with their numbers, for the record.
fn list(evidence: &[Evidence], state: GateState) -> String {
    evidence.iter().filter(|e| e.state == state).map(describe).collect::<Vec<_>>().join("; ")
}

fn describe(evidence: &Evidence) -> String {
    let number = |value: Option<f64>| value.map_or("nothing".to_string(), |v| format!("{v:.4}"));
    let interval = evidence.interval.map(|[low, high]| format!(", interval {low:.4} to {high:.4}")).unwrap_or_default();
    format!(
        "{:?}: candidate {}, incumbent {}{interval}, limit {}, after {} observations",
        evidence.gate,
        number(evidence.candidate),
        number(evidence.incumbent),
        evidence.limit,
        evidence.observations
    )
    .to_lowercase()
}
