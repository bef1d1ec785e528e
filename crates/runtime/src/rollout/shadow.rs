//! The candidate answers copies of requests; callers only ever see the incumbent's answers.

use super::{Action, Canary, Event, Rollout, Strategy, list};
use cutover_monitor::{GateState, Gates, Verdict};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A paired comparison: on how many of the same requests both arms disagree, how much surer one is, how much longer one takes, and who is
/// right where labels come. Pairing makes a decision possible on a device with little traffic. Copies are answered when there is time for
/// them, so that requests are no slower; where there is none, nothing is compared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Shadow {
    /// Least serving time, in seconds.
    pub observe_s: f64,
    /// Serving time, in seconds, after which it ends inconclusively.
    pub deadline_s: f64,
    /// What a candidate that passed goes on with; without it, it is promoted.
    pub then: Option<Canary>,
    pub gates: Gates,
}

impl Default for Shadow {
    fn default() -> Self {
        Shadow { observe_s: 60.0, deadline_s: 86_400.0, then: Some(Canary::default()), gates: Gates::default() }
    }
}

impl Shadow {
    pub fn check(&self) -> Result<(), String> {
        if !(self.observe_s >= 0.0 && self.observe_s <= self.deadline_s && self.deadline_s.is_finite()) {
            return Err(format!(
                "an observation of {} s, expected 0 to the deadline of {} s",
                self.observe_s, self.deadline_s
            ));
        }
        self.then.as_ref().map_or(Ok(()), |canary| canary.gates.check().and_then(|()| canary.check()))
    }

    pub(super) fn handle(&self, rollout: &mut Rollout, serving: Duration, event: Event<'_>) -> Vec<Action> {
        let (incumbent, candidate) = match event {
            Event::Admitted => {
                rollout.step_began = serving;
                return vec![Action::Share(0.0)];
            }
            Event::Observed { incumbent, candidate } => (incumbent, candidate),
            Event::Crashed { .. } => return Vec::new(),
        };
        let verdict = rollout.judge(serving, incumbent, candidate, &self.gates);
        let watched = serving.saturating_sub(rollout.step_began).as_secs_f64();
        match (verdict, &self.then) {
            (Verdict::RollBack, _) => vec![Action::RollBack { reason: list(&rollout.evidence, GateState::Failed) }],
            (Verdict::Promote, Some(canary)) if watched >= self.observe_s => {
                rollout.strategy = Strategy::Canary(canary.clone());
                canary.handle(rollout, serving, Event::Admitted)
            }
            (Verdict::Promote, None) if watched >= self.observe_s => {
                let reason = format!("{} pairs passed", candidate.requests());
                vec![Action::Promote { reason }]
            }
            (Verdict::Hold, _) if watched >= self.deadline_s => {
                let open = list(&rollout.evidence, GateState::Open);
                let reason = format!("undecided after {watched:.0} s and {} pairs: {open}", candidate.requests());
                vec![Action::Inconclusive { reason }]
            }
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cutover_monitor::{Seen, Window};

    fn answered(n: usize, agreement: f64) -> Window {
        let mut window = Window::default();
        for i in 0..n {
            let seen = Seen { classes: vec![0], confidence: 0.9, margin: 0.8, entropy: 0.1 };
            window.answered(Duration::from_millis(5), Some(&seen));
            window.agreement.add((i as f64 * agreement).floor() < ((i + 1) as f64 * agreement).floor());
            window.pairs.slower.add(false);
            window.pairs.margin.add(0.0);
        }
        window
    }

    fn decided(strategy: Shadow, agreement: f64, seconds: u64) -> Option<Action> {
        let mut rollout = Rollout::new(Strategy::Shadow(strategy));
        assert_eq!(rollout.handle(Duration::ZERO, Event::Admitted), [Action::Share(0.0)]);
        (1..=seconds).find_map(|second| {
            let (incumbent, candidate) =
                (answered(second as usize * 40, 1.0), answered(second as usize * 4, agreement));
            let event = Event::Observed { incumbent: &incumbent, candidate: &candidate };
            rollout.handle(Duration::from_secs(second), event).pop()
        })
    }

    #[test]
    fn pairs_decide() {
        let alone = || Shadow { then: None, ..Shadow::default() };
        assert!(matches!(decided(alone(), 0.99, 3600), Some(Action::Promote { reason }) if reason.contains("pairs")));
        assert_eq!(decided(Shadow::default(), 0.99, 3600), Some(Action::Share(0.05)), "it goes on as a canary");
        assert!(
            matches!(decided(alone(), 0.6, 3600), Some(Action::RollBack { reason }) if reason.contains("agreement"))
        );
        let short = Shadow { deadline_s: 61.0, ..alone() };
        assert!(matches!(decided(short, 0.91, 61), Some(Action::Inconclusive { .. })));
        assert!(Shadow { observe_s: 5.0, deadline_s: 1.0, ..alone() }.check().is_err());
    }
}
