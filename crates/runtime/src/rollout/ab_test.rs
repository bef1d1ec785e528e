//! Two versions at a fixed split, until one metric is seen to be better, or not.

use super::{Action, Event, Rollout, describe, list};
use cutover_monitor::{Gate, GateState, Gates, Metric, Verdict, effect};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A sequential test of whether the candidate improves `metric`. It may be looked at any time and stops by itself: the candidate is promoted
/// when an improvement is beyond doubt and seen to be at least `minimum_effect`, and goes when its effect is surely smaller than that. The
/// gates guard everything else: a failed one ends the test against the candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AbTest {
    /// Of the requests that go to the candidate, between 0 and 1.
    pub share: f64,
    pub metric: Metric,
    /// The smallest improvement that is worth a change, in the metric's units (a share of 1 for all of them).
    pub minimum_effect: f64,
    /// Probability, over all looks together, that a candidate without any improvement is promoted, and that one with at least the minimum is
    /// sent away.
    pub alpha: f64,
    /// Observations of the metric that each arm needs before it is judged.
    pub observations_min: u64,
    /// Serving time, in seconds, after which the test ends inconclusively, the incumbent staying.
    pub deadline_s: f64,
    pub gates: Gates,
}

impl Default for AbTest {
    fn default() -> Self {
        AbTest {
            share: 0.5,
            metric: Metric::Accuracy,
            minimum_effect: 0.01,
            alpha: 0.05,
            observations_min: 100,
            deadline_s: 7.0 * 86_400.0,
            gates: Gates::default(),
        }
    }
}

impl AbTest {
    pub fn check(&self) -> Result<(), String> {
        if !(self.share > 0.0 && self.share < 1.0) {
            return Err(format!("a share of {}, expected one between 0 and 1", self.share));
        }
        if !(self.minimum_effect > 0.0 && self.minimum_effect < 1.0) {
            return Err(format!("a minimum effect of {}, expected one between 0 and 1", self.minimum_effect));
        }
        if !(self.alpha > 0.0 && self.alpha < 0.5) {
            return Err(format!("alpha is {}, expected one between 0 and 0.5", self.alpha));
        }
        if !(self.deadline_s > 0.0 && self.deadline_s.is_finite()) {
            return Err(format!("a deadline of {} s, expected more than 0", self.deadline_s));
        }
        Ok(())
    }

    pub(super) fn handle(&self, rollout: &mut Rollout, serving: Duration, event: Event<'_>) -> Vec<Action> {
        let (incumbent, candidate) = match event {
            Event::Admitted => {
                rollout.step_began = serving;
                return vec![Action::Share(self.share)];
            }
            Event::Observed { incumbent, candidate } => (incumbent, candidate),
            Event::Crashed { .. } => return Vec::new(),
        };
        let verdict = rollout.judge(serving, incumbent, candidate, &self.gates);
        let effect = effect(self.metric, incumbent, candidate, self.minimum_effect, self.alpha, self.observations_min);
        let (state, numbers) = (effect.state, describe(&effect));
        rollout.evidence.push(effect);
        // Whether the metric is better is the test's own question, not a guard's.
        let own = |gate| self.metric == Metric::Accuracy && gate == Gate::Accuracy;
        let holds = |state| rollout.evidence.iter().any(|e| e.state == state && e.gate != Gate::Effect && !own(e.gate));
        let tested = serving.saturating_sub(rollout.step_began).as_secs_f64();
        match (verdict, state) {
            (Verdict::RollBack, _) => vec![Action::RollBack { reason: list(&rollout.evidence, GateState::Failed) }],
            (_, GateState::Failed) => {
                let reason = format!("it is no improvement of {} or more: {numbers}", self.minimum_effect);
                vec![Action::RollBack { reason }]
            }
            (_, GateState::Passed) if !holds(GateState::Open) && !holds(GateState::BothArms) => {
                vec![Action::Promote { reason: format!("it is better: {numbers}") }]
            }
            _ if tested >= self.deadline_s => {
                vec![Action::Inconclusive { reason: format!("undecided after {tested:.0} s: {numbers}") }]
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

    fn decided(incumbent: f64, candidate: f64, hours: u64) -> Option<Action> {
        let strategy = AbTest { deadline_s: 3600.0 * 48.0, ..AbTest::default() };
        let mut rollout = Rollout::new(Strategy::AbTest(strategy));
        assert_eq!(rollout.handle(Duration::ZERO, Event::Admitted), [Action::Share(0.5)]);
        (1..=hours).find_map(|hour| {
            let n = hour as usize * 200;
            let (incumbent, candidate) = (window(n, incumbent), window(n, candidate));
            let event = Event::Observed { incumbent: &incumbent, candidate: &candidate };
            rollout.handle(Duration::from_secs(hour * 3600), event).pop()
        })
    }

    #[test]
    fn it_ends_with_what_the_metric_says() {
        let ends = [
            (0.90, 0.95, "it is better"),
            (0.95, 0.95, "no improvement"),
            (0.95, 0.85, "accuracy"),
            (0.90, 0.909, "undecided after 172800 s"),
        ];
        for (incumbent, candidate, expected) in ends {
            let action = decided(incumbent, candidate, 48);
            let (kind, reason) = match &action {
                Some(Action::Promote { reason }) => ("promoted", reason.as_str()),
                Some(Action::RollBack { reason }) => ("rolled back", reason.as_str()),
                Some(Action::Inconclusive { reason }) => ("inconclusive", reason.as_str()),
                _ => ("nothing", ""),
            };
            assert!(reason.contains(expected), "{incumbent} against {candidate}: {kind}, {reason}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let good = AbTest::default();
        for bad in [
            AbTest { share: 1.0, ..good.clone() },
            AbTest { minimum_effect: 0.0, ..good.clone() },
            AbTest { alpha: f64::NAN, ..good.clone() },
            AbTest { deadline_s: f64::INFINITY, ..good.clone() },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
