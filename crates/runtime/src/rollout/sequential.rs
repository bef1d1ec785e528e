//! The old version goes before the new one comes.

use super::{Action, Event};
use serde::{Deserialize, Serialize};

/// For versions that do not fit in memory together: the one in service is unloaded first, and the time without answers is announced and
/// measured. Where both fit, one switch without a trial.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sequential {}

impl Sequential {
    pub(super) fn handle(&self, event: Event<'_>) -> Vec<Action> {
        match event {
            Event::Admitted => {
                vec![Action::Share(1.0), Action::Promote { reason: "switched, both fit".to_string() }]
            }
            // After a restart between the two.
            Event::Observed { .. } => vec![Action::Promote { reason: "switched, both fit".to_string() }],
            Event::Crashed { .. } => Vec::new(),
        }
    }
}
