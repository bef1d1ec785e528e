//! Which version a request goes to, and which answers feedback may still refer to.

mod dispatch;
mod predictions;
mod queue;
mod serve;
mod streams;

/// What [`queue`] is made of; loom's in its test.
mod sync {
    pub(super) use std::sync::{Condvar, Mutex};
}

pub(crate) use dispatch::shadow_gates;
pub(crate) use predictions::{Answered, Predictions};
pub(crate) use queue::Queue;
pub(crate) use serve::{COMPARISONS_MAX, Comparison};
pub use streams::StreamStep;
pub(crate) use streams::{StreamLimits, Streams};

use crate::{rollout::is_assigned, swap::Version};
use cutover_monitor::Gates;
use std::sync::Arc;

/// Who serves a model now. Replaced as a whole, never changed.
pub(crate) struct Routing {
    pub active: Arc<Version>,
    pub candidate: Option<Candidate>,
    /// The version before, kept ready so that going back is one switch.
    pub previous: Option<Arc<Version>>,
}

#[derive(Clone)]
pub(crate) struct Candidate {
    pub version: Arc<Version>,
    /// Share of the requests it gets.
    pub share: f64,
    /// Differs from rollout to rollout, so that not the same clients are always first.
    pub salt: u64,
    /// Set where callers never see its answers.
    pub shadow: Option<Gates>,
}

impl Routing {
    /// The version for requests of `key`: of a growing share, whoever was in stays in.
    pub fn pick(&self, key: &str) -> &Arc<Version> {
        match &self.candidate {
            Some(candidate) if is_assigned(candidate.salt, key, candidate.share) => &candidate.version,
            _ => &self.active,
        }
    }

    /// Every version with a role, and whether that is to be the one before.
    pub fn roles(&self) -> impl Iterator<Item = (&Arc<Version>, bool)> {
        let candidate = self.candidate.as_ref().map(|c| (&c.version, false));
        [Some((&self.active, false)), candidate, self.previous.as_ref().map(|v| (v, true))].into_iter().flatten()
    }

    /// Whether requests go to `version`.
    pub fn serves(&self, version: &Arc<Version>) -> bool {
        let candidate = self.candidate.as_ref().is_some_and(|c| Arc::ptr_eq(&c.version, version));
        candidate || Arc::ptr_eq(&self.active, version)
    }

    pub fn named(&self, version: &str) -> Option<&Arc<Version>> {
        let candidate = self.candidate.as_ref().map(|c| &c.version);
        [Some(&self.active), candidate].into_iter().flatten().find(|v| v.name == version)
    }
}
