//! Callers that keep state between requests (a recurrent network's, a decoder's cache), each pinned to the version that made it.

use crate::swap::Version;
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

/// One request of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamStep {
    /// The stream's name, which the caller chooses.
    pub id: String,
    /// The caller's state is fresh: the stream begins, on the version whose turn it is.
    pub start: bool,
    /// No request follows.
    pub end: bool,
}

/// How long streams may keep a version.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StreamLimits {
    /// Once their version has left service.
    pub grace: Duration,
    /// Without a request.
    pub idle: Duration,
    /// Streams of one model at once.
    pub open_max: usize,
}

/// The open streams of a model. Bounded; whoever is not in here has to start again.
#[derive(Default)]
pub(crate) struct Streams(HashMap<String, Open>);

struct Open {
    version: Arc<Version>,
    used: Instant,
    /// From when on its version serves nobody else.
    left: Option<Instant>,
}

/// Why a stream can't go on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The caller is to begin again, its state fresh.
    Restart(&'static str),
    TooMany(usize),
}

impl Streams {
    /// The version of a stream's request; `serving` says whether a version is in service.
    pub fn pin(
        &mut self,
        step: &StreamStep,
        now: Instant,
        limits: StreamLimits,
        pick: impl FnOnce() -> Arc<Version>,
        serving: impl Fn(&Arc<Version>) -> bool,
    ) -> Result<Arc<Version>, Refused> {
        self.sweep(now, limits, &serving);
        if step.start {
            if !self.0.contains_key(&step.id) && self.0.len() >= limits.open_max {
                return Err(Refused::TooMany(self.0.len()));
            }
            let version = pick();
            let open = Open { version: Arc::clone(&version), used: now, left: None };
            if !step.end {
                self.0.insert(step.id.clone(), open);
            }
            return Ok(version);
        }
        let unknown =
            Refused::Restart("it is not open: it was never started, ended, idle for too long, or its version is gone");
        let open = self.0.get_mut(&step.id).ok_or(unknown)?;
        open.used = now;
        let version = Arc::clone(&open.version);
        if step.end {
            self.0.remove(&step.id);
        }
        Ok(version)
    }

    pub fn end(&mut self, id: &str) {
        self.0.remove(id);
    }

    /// Lets go of streams whose time is over, and with them of their versions.
    pub fn sweep(&mut self, now: Instant, limits: StreamLimits, serving: impl Fn(&Arc<Version>) -> bool) {
        self.0.retain(|_, open| {
            if !serving(&open.version) {
                open.left.get_or_insert(now);
            }
            let overdue = open.left.is_some_and(|left| now.saturating_duration_since(left) >= limits.grace);
            !overdue && now.saturating_duration_since(open.used) < limits.idle
        });
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}
