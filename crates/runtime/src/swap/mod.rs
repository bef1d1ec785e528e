//! A version in memory: pinned by requests, drained, released by the reaper.
//!
//! A request holds an `Arc` of the version that serves it to its end. A version taken out of service goes to the [`Reaper`], which holds
//! it until it is the last to do so: the memory is given back on the reaper's thread, never on a request's.

mod drain;
mod instances;

/// What [`drain`] is made of; loom's in its test.
mod sync {
    pub(super) use std::sync::{Arc, Condvar, Mutex};
}

pub(crate) use instances::{Instances, NoInstance};

use cutover_backend::Executable;
use cutover_monitor::{Seen, Window};
use cutover_package::input::{Preprocessing, Preprocessor};
use drain::Drain;
use serde::{Deserialize, Serialize};
use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// How often the reaper looks whether requests have let go.
const REAP: Duration = Duration::from_millis(2);

/// A compiled version with its instances.
pub(crate) struct Version {
    pub name: String,
    pub executable: Arc<dyn Executable>,
    pub instances: Instances,
    /// How raw requests become inputs, where the package says so.
    pub preprocessor: Option<Preprocessor>,
    /// What it took to read, compile and pack it.
    pub load: Duration,
    pub in_flight: AtomicUsize,
    /// Since it took traffic.
    pub total: Mutex<Window>,
    trial: Mutex<Trial>,
}

/// What is counted since the rollout under way began.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Trial {
    window: Window,
    /// Of the step under way. A label for an answer in an earlier step counts with what that step counted.
    number: u64,
    /// Of the rollout's first step. Labels for answers before it count for none.
    first: u64,
}

impl Version {
    pub fn new(
        name: String,
        executable: Arc<dyn Executable>,
        instances: Instances,
        preprocessor: Option<Preprocessor>,
        load: Duration,
    ) -> Version {
        // Steps of different starts of the host are told apart by when they began: labels come across restarts.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let number = u64::try_from(now.as_millis()).unwrap_or(0);
        Version {
            name,
            executable,
            instances,
            preprocessor,
            load,
            in_flight: AtomicUsize::new(0),
            total: Mutex::default(),
            trial: Mutex::new(Trial { number, first: number, window: Window::default() }),
        }
    }

    pub fn preprocessing(&self) -> Option<&Preprocessing> {
        self.preprocessor.as_ref().map(Preprocessor::described)
    }

    /// Counts, and gives the step's number; for the rollout only where the request is one of its `trial`.
    pub fn count(&self, trial: bool, count: impl Fn(&mut Window)) -> u64 {
        count(&mut lock(&self.total));
        if !trial {
            return u64::MAX;
        }
        self.count_trial(count)
    }

    /// Counts for the rollout alone.
    pub fn count_trial(&self, count: impl FnOnce(&mut Window)) -> u64 {
        let mut trial = lock(&self.trial);
        count(&mut trial.window);
        trial.number
    }

    pub fn answered(&self, trial: bool, latency: Duration, seen: Option<&Seen>) -> u64 {
        self.count(trial, |window| window.answered(latency, seen))
    }

    /// Counts labels for answers given in step `number`.
    pub fn count_labels(&self, number: u64, right: &[bool]) {
        lock(&self.total).accuracy.add_to(0, right);
        let mut trial = lock(&self.trial);
        if let Some(step) = number.checked_sub(trial.first).filter(|_| number != u64::MAX) {
            trial.window.accuracy.add_to(usize::try_from(step).unwrap_or(usize::MAX), right);
        }
    }

    pub fn window(&self) -> Window {
        lock(&self.trial).window.clone()
    }

    pub fn trial(&self) -> Trial {
        lock(&self.trial).clone()
    }

    /// Goes on with what was counted before a restart.
    pub fn resume(&self, trial: Trial) {
        *lock(&self.trial) = trial;
    }

    /// A rollout begins: nothing was counted.
    pub fn begin_rollout(&self) {
        let mut trial = lock(&self.trial);
        trial.number += 1;
        (trial.first, trial.window) = (trial.number, Window::default());
    }

    /// The next step of the same rollout.
    pub fn begin_step(&self) {
        let mut trial = lock(&self.trial);
        trial.window.begin_step();
        trial.number += 1;
    }

    /// What it takes while it can answer and `counted` does not hold yet: its weights, and a session for each instance.
    pub fn bytes_beside(&self, counted: &mut HashSet<usize>) -> u64 {
        bytes_beside(&*self.executable, self.instances.max(), counted)
    }

    pub fn in_flight(&self) -> InFlight<'_> {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(self)
    }
}

/// What `executable` takes with `instances` sessions, beside the weights at addresses that are `counted` already.
pub(crate) fn bytes_beside(executable: &dyn Executable, instances: usize, counted: &mut HashSet<usize>) -> u64 {
    let mut bytes = executable.footprint().session_bytes.saturating_mul(instances as u64);
    executable.weights(&mut |address, weight_bytes| {
        if counted.insert(address) {
            bytes = bytes.saturating_add(weight_bytes);
        }
    });
    bytes
}

/// Counts a request as under way until it is dropped.
pub(crate) struct InFlight<'a>(&'a Version);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The data behind `mutex`. Counters and lists here are whole between any two statements, so a panic elsewhere spoils nothing.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives the memory of retired versions back, on a thread of its own.
pub(crate) struct Reaper {
    drain: Arc<Drain<Version>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Reaper {
    pub fn start() -> std::io::Result<Reaper> {
        let drain = Arc::new(Drain::new());
        let of_thread = Arc::clone(&drain);
        let reap = move || {
            while of_thread.wait() {
                if of_thread.sweep() > 0 {
                    thread::sleep(REAP);
                }
            }
        };
        let thread = thread::Builder::new().name("cutover-reaper".to_string()).spawn(reap)?;
        Ok(Reaper { drain, thread: Some(thread) })
    }

    /// Takes a version that nothing routes to any more. Call it while still holding another reference.
    pub fn retire(&self, version: Arc<Version>) {
        self.drain.retire(version);
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        // The host is going: whoever still holds a version is the last.
        self.drain.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
