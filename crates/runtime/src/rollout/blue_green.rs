//! All traffic at once, watched for a while, and back at once.

use super::{Action, Event, Rollout, list};
use cutover_monitor::{GateState, Gates, Verdict};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// One switch. The version before stays ready while the candidate is watched: a failed gate switches back. The incumbent is
/// judged by what was counted of it before the switch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BlueGreen {
    /// Serving time in seconds after which a candidate that failed no gate stays.
    pub observe_s: f64,
    pub gates: Gates,
}

impl Default for BlueGreen {
    fn default() -> Self {
        BlueGreen { observe_s: 60.0, gates: Gates::default() }
    }
}

impl BlueGreen {
    pub fn check(&self) -> Result<(), String> {
        if !(self.observe_s >= 0.0 && self.observe_s.is_finite()) {
            return Err(format!("an observation of {} s, expected 0 or more", self.observe_s));
        }
        Ok(())
    }

    pub(super) fn handle(&self, rollout: &mut Rollout, serving: Duration, event: Event<'_>) -> Vec<Action> {
        match event {
            Event::Admitted if self.observe_s == 0.0 => {
                vec![Action::Share(1.0), Action::Promote { reason: "switched, not observed".to_string() }]
            }
            Event::Admitted => {
                rollout.step_began = serving;
                vec![Action::Share(1.0)]
            }
            Event::Observed { incumbent, candidate } => {
                let verdict = rollout.judge(serving, incumbent, candidate, &self.gates);
                let watched = serving.saturating_sub(rollout.step_began).as_secs_f64();
                if verdict == Verdict::RollBack {
                    vec![Action::RollBack { reason: list(&rollout.evidence, GateState::Failed) }]
                } else if watched >= self.observe_s {
                    vec![Action::Promote { reason: format!("no gate failed in {watched:.0} s") }]
                } else {
                    Vec::new()
                }
            }
            Event::Crashed { .. } => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Strategy;
    use cutover_monitor::Window;

    #[test]
    fn it_switches_at_once_and_back_when_requests_fail() {
        let mut rollout = Rollout::new(Strategy::blue_green());
        assert_eq!(rollout.handle(Duration::ZERO, Event::Admitted), [Action::Share(1.0)]);
        let (mut before, mut after) = (Window::default(), Window::default());
        (0..500).for_each(|_| before.answered(Duration::from_millis(5), None));
        (0..100).for_each(|_| after.failed());
        let event = Event::Observed { incumbent: &before, candidate: &after };
        let actions = rollout.handle(Duration::from_secs(1), event);
        assert!(matches!(&actions[..], [Action::RollBack { reason }] if reason.contains("errors")), "{actions:?}");
    }

    #[test]
    fn it_stays_when_nothing_failed() {
        let mut rollout = Rollout::new(Strategy::blue_green());
        rollout.handle(Duration::ZERO, Event::Admitted);
        let (before, after) = (Window::default(), Window::default());
        let mut at =
            |s| rollout.handle(Duration::from_secs(s), Event::Observed { incumbent: &before, candidate: &after });
        assert_eq!(at(59), []);
        assert!(matches!(&at(60)[..], [Action::Promote { .. }]));
    }
}
