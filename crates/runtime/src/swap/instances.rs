//! The sessions of a version: as many at once as it may have, and a bounded number of requests that wait for one.

use super::lock;
use cutover_backend::{Cancellation, Executable, ResourceError, Session, SessionMemory};
use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How often a waiting request looks whether it was cancelled.
const LOOK: Duration = Duration::from_millis(2);

/// A pool of sessions. A request gets the one that has worked least so far; where none is idle and no more may be made it waits, so that no
/// instance idles while a request waits.
pub(crate) struct Instances {
    state: Mutex<State>,
    freed: Condvar,
    max: usize,
    waiting_max: usize,
}

#[derive(Default)]
struct State {
    idle: Vec<Instance>,
    /// Idle and working ones together.
    live: usize,
    waiting: usize,
}

/// One session, and how long it has worked.
pub(crate) struct Instance {
    pub session: Box<dyn Session>,
    worked: Duration,
}

/// Why a request has no session to run in.
#[derive(Debug)]
pub(crate) enum NoInstance {
    Overloaded { waiting: usize },
    Deadline,
    Cancelled,
    Resource(ResourceError),
}

impl Instances {
    pub fn new(max: usize, waiting_max: usize) -> Instances {
        Instances { state: Mutex::default(), freed: Condvar::new(), max: max.max(1), waiting_max }
    }

    pub fn max(&self) -> usize {
        self.max
    }

    /// Adds a session that has run already: the first request finds its memory in place.
    pub fn add(&self, session: Box<dyn Session>) {
        let mut state = lock(&self.state);
        if state.live < self.max {
            state.live += 1;
            state.idle.push(Instance { session, worked: Duration::ZERO });
        }
    }

    /// Waits for a session until the deadline. It comes back by [`Instances::give_back`], or is reported [`Instances::lost`].
    pub fn take(
        &self,
        executable: &Arc<dyn Executable>,
        deadline: Option<Instant>,
        cancellation: Option<&Cancellation>,
    ) -> Result<Instance, NoInstance> {
        let mut state = lock(&self.state);
        let mut counted = false;
        let taken = loop {
            let least = (0..state.idle.len()).min_by_key(|&i| state.idle[i].worked);
            if let Some(least) = least {
                break Ok(Some(state.idle.swap_remove(least)));
            }
            if state.live < self.max {
                state.live += 1;
                break Ok(None);
            }
            if cancellation.is_some_and(Cancellation::is_cancelled) {
                break Err(NoInstance::Cancelled);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                break Err(NoInstance::Deadline);
            }
            if !counted {
                if state.waiting >= self.waiting_max {
                    break Err(NoInstance::Overloaded { waiting: state.waiting });
                }
                (counted, state.waiting) = (true, state.waiting + 1);
            }
            let wait = match cancellation {
                Some(_) => left.unwrap_or(LOOK).min(LOOK),
                None => left.unwrap_or(Duration::from_secs(1)),
            };
            state = self.freed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        };
        state.waiting -= usize::from(counted);
        drop(state);
        match taken? {
            Some(instance) => Ok(instance),
            None => match executable.clone().session(SessionMemory::default()) {
                Ok(session) => Ok(Instance { session, worked: Duration::ZERO }),
                Err(error) => {
                    self.lost();
                    Err(NoInstance::Resource(error))
                }
            },
        }
    }

    pub fn give_back(&self, mut instance: Instance, worked: Duration) {
        instance.worked += worked;
        lock(&self.state).idle.push(instance);
        self.freed.notify_one();
    }

    /// A session that panicked or lost its device is not used again; another may take its place.
    pub fn lost(&self) {
        lock(&self.state).live -= 1;
        self.freed.notify_one();
    }
}
