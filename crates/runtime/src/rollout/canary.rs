//! A growing share of the traffic, each step judged by the gates.

use super::{Action, Event, Rollout, list};
use cutover_monitor::{GateState, Gates, Verdict};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Labels are counted for each step.
const STEPS_MAX: usize = 64;

/// One share of the traffic, held for some time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Between 0 and 1.
    pub share: f64,
    /// Least serving time before the next step, in seconds.
    pub dwell_s: f64,
}

/// Steps of a growing share, each judged by what was counted since it began: the arms' shares are then the same for all that is compared,
/// and a change of the data counts against neither. A failed gate ends it at any moment; a step ends when its time has passed and every gate that has
/// something to say passed; a step that can't be decided within `deadline_s` ends inconclusively, the incumbent staying.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Canary {
    pub steps: Vec<Step>,
    /// Longest serving time of one step, in seconds.
    pub deadline_s: f64,
    pub gates: Gates,
}

impl Default for Canary {
    fn default() -> Self {
        let step = |share, dwell_s| Step { share, dwell_s };
        Canary {
            steps: vec![step(0.05, 60.0), step(0.25, 60.0), step(0.5, 60.0)],
            deadline_s: 3600.0,
            gates: Gates::default(),
        }
    }
}

impl Canary {
    /// Steps of a few seconds, for devices that answer hundreds of requests a second or more and get their labels at once.
    pub fn fast() -> Canary {
        let step = |share, dwell_s| Step { share, dwell_s };
        Canary {
            steps: vec![step(0.05, 2.0), step(0.25, 2.0), step(0.5, 2.0)],
            deadline_s: 60.0,
            gates: Gates { labels_wait_s: 5.0, ..Gates::default() },
        }
    }

    pub fn check(&self) -> Result<(), String> {
        if self.steps.is_empty() || self.steps.len() > STEPS_MAX {
            return Err(format!("a canary of {} steps, expected 1 to {STEPS_MAX}", self.steps.len()));
        }
        for step in &self.steps {
            if !(step.share > 0.0 && step.share < 1.0) {
                return Err(format!("a step of share {}, expected one between 0 and 1", step.share));
            }
            if !(step.dwell_s >= 0.0 && step.dwell_s <= self.deadline_s && self.deadline_s.is_finite()) {
                return Err(format!(
                    "a step of {} s, expected 0 to the deadline of {} s",
                    step.dwell_s, self.deadline_s
                ));
            }
        }
        Ok(())
    }

    pub(super) fn handle(&self, rollout: &mut Rollout, serving: Duration, event: Event<'_>) -> Vec<Action> {
        let (incumbent, candidate) = match event {
            Event::Admitted => {
                rollout.step = 0;
                rollout.step_began = serving;
                return vec![Action::Share(self.steps[0].share)];
            }
            Event::Observed { incumbent, candidate } => (incumbent, candidate),
            Event::Crashed { .. } => return Vec::new(),
        };
        let verdict = rollout.judge(serving, incumbent, candidate, &self.gates);
        let dwelt = serving.saturating_sub(rollout.step_began).as_secs_f64();
        match verdict {
            Verdict::RollBack => vec![Action::RollBack { reason: list(&rollout.evidence, GateState::Failed) }],
            Verdict::Promote if dwelt >= self.steps[rollout.step].dwell_s => match self.steps.get(rollout.step + 1) {
                Some(step) => {
                    rollout.step += 1;
                    rollout.step_began = serving;
                    vec![Action::Share(step.share)]
                }
                None => vec![Action::Promote { reason: format!("all {} steps passed", self.steps.len()) }],
            },
            Verdict::Hold if dwelt >= self.deadline_s => {
                let open = list(&rollout.evidence, GateState::Open);
                let reason = format!("undecided after {dwelt:.0} s of step {}: {open}", rollout.step + 1);
                vec![Action::Inconclusive { reason }]
            }
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Strategy;
    use cutover_monitor::{Seen, Window};

    fn window(n: usize, accuracy: f64) -> Window {
        let mut window = Window::default();
        for i in 0..n {
            let seen = Seen { classes: vec![0], confidence: 0.9, margin: 0.8, entropy: 0.1 };
            window.answered(Duration::from_millis(5), Some(&seen));
            window.accuracy.add((i as f64 * accuracy).floor() < ((i + 1) as f64 * accuracy).floor());
        }
        window
    }

    /// The actions over `seconds` of ticks, both arms gaining `rate` requests a second.
    fn run(incumbent: f64, candidate: f64, rate: usize, seconds: usize) -> Vec<Action> {
        let mut rollout = Rollout::new(Strategy::canary());
        let mut actions = rollout.handle(Duration::ZERO, Event::Admitted);
        for second in 1..=seconds {
            let (incumbent, candidate) = (window(second * rate, incumbent), window(second * rate, candidate));
            let event = Event::Observed { incumbent: &incumbent, candidate: &candidate };
            actions.extend(rollout.handle(Duration::from_secs(second as u64), event));
            if actions.iter().any(|a| !matches!(a, Action::Share(_))) {
                break;
            }
        }
        actions
    }

    #[test]
    fn a_good_candidate_climbs_every_step() {
        let actions = run(0.98, 0.98, 40, 400);
        assert_eq!(&actions[..3], &[Action::Share(0.05), Action::Share(0.25), Action::Share(0.5)]);
        assert!(matches!(&actions[3..], [Action::Promote { .. }]), "{actions:?}");
    }

    #[test]
    fn a_bad_candidate_goes_at_the_first_step() {
        let actions = run(0.98, 0.85, 40, 400);
        assert!(
            matches!(&actions[..], [Action::Share(_), Action::RollBack { reason }] if reason.contains("accuracy")),
            "{actions:?}"
        );
    }

    #[test]
    fn a_better_candidate_is_promoted_over_a_bad_incumbent() {
        assert!(matches!(run(0.85, 0.98, 40, 400).last(), Some(Action::Promote { .. })));
    }

    #[test]
    fn without_traffic_it_holds_until_its_deadline() {
        assert_eq!(run(0.98, 0.98, 0, 3599), [Action::Share(0.05)]);
        assert!(
            matches!(run(0.98, 0.98, 0, 3600).last(), Some(Action::Inconclusive { reason }) if reason.contains("undecided"))
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for steps in [vec![], vec![Step { share: 1.5, dwell_s: 1.0 }], vec![Step { share: 0.5, dwell_s: f64::NAN }]] {
            assert!(Canary { steps, ..Canary::default() }.check().is_err());
        }
    }
}
