//! Who gets traffic while a new version is tried.
//!
//! A strategy is its parameters and a pure state machine: [`Rollout::handle`] is given the serving time so far and an event, and says
//! what to do. It reads no clock and no file, so a simulator can drive it, and it can be stored between any two events.

mod ab_test;
mod blue_green;
mod canary;
mod sequential;
mod shadow;

pub use ab_test::AbTest;
pub use blue_green::BlueGreen;
pub use canary::{Canary, Step};
pub use sequential::Sequential;
pub use shadow::Shadow;

use cutover_monitor::{Comparison, Design, Evidence, GateState, Gates, Labels, Reference, Verdict, Window, judge};
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
    /// A fixed share, until a metric is seen to be better or not.
    #[serde(rename = "ab")]
    AbTest(AbTest),
    /// Copies of requests, whose answers no caller sees.
    Shadow(Shadow),
    /// The old version goes before the new one comes.
    Sequential(Sequential),
}

impl Strategy {
    /// As they are written on command lines.
    pub const NAMES: [&'static str; 5] = ["blue-green", "canary", "ab", "shadow", "sequential"];

    pub fn blue_green() -> Strategy {
        Strategy::BlueGreen(BlueGreen::default())
    }

    pub fn canary() -> Strategy {
        Strategy::Canary(Canary::default())
    }

    pub fn ab_test() -> Strategy {
        Strategy::AbTest(AbTest::default())
    }

    pub fn shadow() -> Strategy {
        Strategy::Shadow(Shadow::default())
    }

    pub fn sequential() -> Strategy {
        Strategy::Sequential(Sequential::default())
    }

    /// The strategy of this name with its default parameters.
    pub fn named(name: &str) -> Option<Strategy> {
        let all = [
            Strategy::blue_green(),
            Strategy::canary(),
            Strategy::ab_test(),
            Strategy::shadow(),
            Strategy::sequential(),
        ];
        all.into_iter().find(|strategy| strategy.name() == name)
    }

    /// As it is written on command lines.
    pub fn name(&self) -> &'static str {
        match self {
            Strategy::BlueGreen(_) => "blue-green",
            Strategy::Canary(_) => "canary",
            Strategy::AbTest(_) => "ab",
            Strategy::Shadow(_) => "shadow",
            Strategy::Sequential(_) => "sequential",
        }
    }

    /// # Errors
    /// Parameters that make no rollout, and why.
    pub fn check(&self) -> Result<(), String> {
        if let Some(gates) = self.gates() {
            gates.check()?;
        }
        match self {
            Strategy::BlueGreen(strategy) => strategy.check(),
            Strategy::Canary(strategy) => strategy.check(),
            Strategy::AbTest(strategy) => strategy.check(),
            Strategy::Shadow(strategy) => strategy.check(),
            Strategy::Sequential(_) => Ok(()),
        }
    }

    /// What a candidate must keep to, where it is on trial.
    pub fn gates(&self) -> Option<&Gates> {
        match self {
            Strategy::BlueGreen(BlueGreen { gates, .. })
            | Strategy::Canary(Canary { gates, .. })
            | Strategy::AbTest(AbTest { gates, .. })
            | Strategy::Shadow(Shadow { gates, .. }) => Some(gates),
            Strategy::Sequential(_) => None,
        }
    }

    /// Takes the gates that the package carries.
    pub fn set_gates(&mut self, new: Gates) {
        match self {
            Strategy::BlueGreen(BlueGreen { gates, .. })
            | Strategy::Canary(Canary { gates, .. })
            | Strategy::AbTest(AbTest { gates, .. })
            | Strategy::Shadow(Shadow { gates, .. }) => *gates = new,
            Strategy::Sequential(_) => {}
        }
        if let Strategy::Shadow(Shadow { then: Some(canary), .. }) = self {
            canary.gates = new;
        }
    }

    /// How both arms' windows come about while the candidate has `share` of the requests.
    fn design(&self, share: f64) -> Design {
        match self {
            Strategy::BlueGreen(_) | Strategy::Sequential(_) => Design::BeforeAndAfter,
            Strategy::Shadow(_) => Design::Paired,
            Strategy::Canary(_) | Strategy::AbTest(_) => Design::Split { share },
        }
    }
}

/// Whether requests of `key` go to a candidate that has `share` of them: fixed for one key, share and salt, and whoever was in stays in
/// while the share grows. Another salt chooses others.
pub fn is_assigned(salt: u64, key: &str, share: f64) -> bool {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&salt.to_le_bytes()).update(key.as_bytes());
    let digest = hasher.finalize();
    let word = digest.as_bytes().iter().take(8).fold(0u64, |v, &b| v << 8 | u64::from(b));
    ((word >> 11) as f64 / (1u64 << 53) as f64) < share
}

/// The part of the time since the last look that counts as served: a device that slept, or a clock that jumped, makes no step pass.
pub fn served(since_last_look: Duration) -> Duration {
    const LOOK_MAX: Duration = Duration::from_secs(1);
    since_last_look.min(LOOK_MAX)
}

/// What happened.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// The candidate was admitted and can take traffic.
    Admitted,
    /// What was counted of both arms since then, or since the share last changed.
    Observed { incumbent: &'a Window, candidate: &'a Window },
    /// The candidate panicked, or lost its device.
    Crashed { reason: &'a str },
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
    /// The same, since its time is over and nothing speaks for or against it.
    Inconclusive { reason: String },
    /// Somebody is to look at the data or the device: both arms fail alike. The rollout holds meanwhile.
    Alert { reason: String },
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
    /// What was seen of the incumbent before.
    #[serde(default)]
    pub reference: Option<Reference>,
    /// Whether both arms fail alike, and that was said.
    #[serde(default)]
    pub alerted: bool,
    /// What the last judgement rested on.
    pub evidence: Vec<Evidence>,
}

impl Rollout {
    pub fn new(strategy: Strategy) -> Rollout {
        Rollout {
            strategy,
            step: 0,
            step_began: Duration::ZERO,
            share: 0.0,
            labelled: false,
            reference: None,
            alerted: false,
            evidence: Vec::new(),
        }
    }

    /// Moves on. `serving` is the time since admission in which both arms could serve.
    pub fn handle(&mut self, serving: Duration, event: Event<'_>) -> Vec<Action> {
        if let Event::Crashed { reason } = event {
            return vec![Action::RollBack { reason: format!("the candidate crashed: {reason}") }];
        }
        let mut actions = match self.strategy.clone() {
            Strategy::BlueGreen(strategy) => strategy.handle(self, serving, event),
            Strategy::Canary(strategy) => strategy.handle(self, serving, event),
            Strategy::AbTest(strategy) => strategy.handle(self, serving, event),
            Strategy::Shadow(strategy) => strategy.handle(self, serving, event),
            Strategy::Sequential(strategy) => strategy.handle(event),
        };
        let alike = list(&self.evidence, GateState::BothArms);
        if !alike.is_empty() && !self.alerted {
            actions.push(Action::Alert { reason: alike.clone() });
        }
        self.alerted = !alike.is_empty();
        for action in &actions {
            if let Action::Share(share) = action {
                self.share = *share;
            }
        }
        actions
    }

    /// What follows from both windows, kept as the evidence of the last judgement.
    fn judge(&mut self, serving: Duration, incumbent: &Window, candidate: &Window, gates: &Gates) -> Verdict {
        let labels = |window: &Window| window.accuracy.pooled().total;
        self.labelled |= labels(incumbent).max(labels(candidate)).max(candidate.pairs.labelled()) > 0;
        let labels = if self.labelled { Labels::Awaited } else { gates.labels(serving.as_secs_f64()) };
        let (design, reference) = (self.strategy.design(self.share), self.reference.as_ref());
        let (verdict, evidence) = judge(&Comparison { incumbent, candidate, design, labels, reference }, gates);
        self.evidence = evidence;
        verdict
    }
}

/// The gates in this state, with their numbers, for the record.
fn list(evidence: &[Evidence], state: GateState) -> String {
    evidence.iter().filter(|e| e.state == state).map(describe).collect::<Vec<_>>().join("; ")
}

/// One gate's numbers, for the record.
fn describe(evidence: &Evidence) -> String {
    let number = |value: Option<f64>| value.map_or("nothing".to_string(), |v| format!("{v:.4}"));
    let interval = evidence.interval.map(|[low, high]| format!(", interval {low:.4} to {high:.4}")).unwrap_or_default();
    let note = if evidence.note.is_empty() { String::new() } else { format!(" ({})", evidence.note) };
    format!(
        "{}: candidate {}, incumbent {}{interval}, limit {}, after {} observations{note}",
        evidence.gate.name(),
        number(evidence.candidate),
        number(evidence.incumbent),
        evidence.limit,
        evidence.observations
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assignment_is_even_sticky_and_grows() {
        let keys: Vec<String> = (0..10_000).map(|i| format!("client-{i}")).collect();
        let inside = |salt, share| keys.iter().map(move |key| is_assigned(salt, key, share)).collect::<Vec<bool>>();
        let (quarter, half, other) = (inside(3, 0.25), inside(3, 0.5), inside(4, 0.25));
        let count = |inside: &[bool]| inside.iter().filter(|&&is| is).count();
        assert!((2300..2700).contains(&count(&quarter)), "{}", count(&quarter));
        assert!(quarter.iter().zip(&half).all(|(quarter, half)| *half || !quarter), "whoever was in stays in");
        let both = quarter.iter().zip(&other).filter(|(a, b)| **a && **b).count();
        assert!((500..750).contains(&both), "salts choose independently: {both}");
        assert!(count(&inside(3, 0.0)) == 0 && count(&inside(3, 1.0)) == keys.len());
    }

    #[test]
    fn a_crash_ends_every_strategy_at_once() {
        for name in Strategy::NAMES {
            let strategy = Strategy::named(name).unwrap();
            assert_eq!(strategy.name(), name);
            strategy.check().unwrap();
            let mut rollout = Rollout::new(strategy);
            rollout.handle(Duration::ZERO, Event::Admitted);
            let actions = rollout.handle(Duration::from_secs(1), Event::Crashed { reason: "panicked" });
            assert!(matches!(&actions[..], [Action::RollBack { reason }] if reason.contains("panicked")), "{name}");
        }
    }

    #[test]
    fn time_that_nobody_looked_at_serves_nobody() {
        assert_eq!(served(Duration::from_millis(20)), Duration::from_millis(20));
        assert_eq!(served(Duration::from_secs(86_400)), Duration::from_secs(1));
    }

    #[test]
    fn records_of_older_software_are_read() {
        let old = r#"{"strategy":{"canary":{"steps":[{"share":0.5,"dwell_s":1.0}],"deadline_s":9.0,"gates":{}}},
            "step":0,"step_began":{"secs":0,"nanos":0},"share":0.5,"evidence":[]}"#;
        let rollout: Rollout = serde_json::from_str(old).unwrap();
        assert_eq!((rollout.strategy.name(), rollout.alerted), ("canary", false));
    }
}
