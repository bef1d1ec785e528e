//! A version in memory: pinned by requests, drained, released by the reaper.
//!
//! A request holds an `Arc` of the version that serves it to its end. A version taken out of service goes to the [`Reaper`], which holds
//! it until it is the last to do so: the memory is given back on the reaper's thread, never on a request's.

use cutover_backend::{Executable, ResourceError, Session, SessionMemory};
use cutover_monitor::Window;
use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::Duration,
};

/// How often the reaper looks whether requests have let go.
const REAP: Duration = Duration::from_millis(2);

/// A compiled version with the sessions that are idle now.
pub(crate) struct Version {
    pub name: String,
    pub executable: Arc<dyn Executable>,
    idle: Mutex<Vec<Box<dyn Session>>>,
    /// Idle sessions beyond these are dropped.
    sessions_max: usize,
    pub in_flight: AtomicUsize,
    /// Since it took traffic.
    pub total: Mutex<Window>,
    trial: Mutex<Trial>,
}

/// What is counted since the rollout under way, or its step, began.
#[derive(Default)]
struct Trial {
    window: Window,
    /// Tells this window from those before: a label for an answer in an earlier one counts for none.
    number: u64,
}

impl Version {
    pub fn new(name: String, executable: Arc<dyn Executable>, sessions_max: usize) -> Version {
        Version {
            name,
            executable,
            idle: Mutex::default(),
            sessions_max,
            in_flight: AtomicUsize::new(0),
            total: Mutex::default(),
            trial: Mutex::default(),
        }
    }

    /// An idle session, or a new one. It comes back by [`Version::give_back`]; one that is lost is only memory.
    pub fn session(&self) -> Result<Box<dyn Session>, ResourceError> {
        if let Some(session) = lock(&self.idle).pop() {
            return Ok(session);
        }
        self.executable.clone().session(SessionMemory::default())
    }

    pub fn give_back(&self, session: Box<dyn Session>) {
        let mut idle = lock(&self.idle);
        if idle.len() < self.sessions_max {
            idle.push(session);
        }
    }

    /// Counts, and gives the window's number; for the rollout only where the request is one of its `trial`.
    pub fn count(&self, trial: bool, count: impl Fn(&mut Window)) -> u64 {
        count(&mut lock(&self.total));
        if !trial {
            return u64::MAX;
        }
        let mut trial = lock(&self.trial);
        count(&mut trial.window);
        trial.number
    }

    /// Counts labels for answers given in window `number`.
    pub fn count_labels(&self, number: u64, right: &[bool]) {
        let add = |window: &mut Window| right.iter().for_each(|&right| window.accuracy.add(right));
        add(&mut lock(&self.total));
        let mut trial = lock(&self.trial);
        if trial.number == number {
            add(&mut trial.window);
        }
    }

    pub fn count_agreement(&self, agree: impl Iterator<Item = bool>) {
        let mut trial = lock(&self.trial);
        agree.for_each(|agree| trial.window.agreement.add(agree));
    }

    pub fn window(&self) -> Window {
        lock(&self.trial).window.clone()
    }

    pub fn begin_window(&self) {
        let mut trial = lock(&self.trial);
        trial.window = Window::default();
        trial.number += 1;
    }

    /// What it takes while it can answer: its weights and one session.
    pub fn bytes(&self) -> u64 {
        let footprint = self.executable.footprint();
        footprint.weight_bytes.saturating_add(footprint.session_bytes)
    }

    pub fn in_flight(&self) -> InFlight<'_> {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(self)
    }
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

/// Gives the memory of retired versions back.
pub(crate) struct Reaper {
    retired: Option<Sender<Arc<Version>>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Reaper {
    pub fn start() -> std::io::Result<Reaper> {
        let (retired, incoming) = channel();
        let thread = thread::Builder::new().name("cutover-reaper".to_string()).spawn(move || reap(&incoming))?;
        Ok(Reaper { retired: Some(retired), thread: Some(thread) })
    }

    /// Takes a version that nothing routes to any more. Call it while still holding another reference.
    pub fn retire(&self, version: Arc<Version>) {
        if let Some(retired) = &self.retired {
            let _ = retired.send(version);
        }
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.retired = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn reap(incoming: &Receiver<Arc<Version>>) {
    let mut draining: Vec<Arc<Version>> = Vec::new();
    loop {
        let next = if draining.is_empty() {
            incoming.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            incoming.recv_timeout(REAP)
        };
        match next {
            Ok(version) => draining.push(version),
            Err(RecvTimeoutError::Timeout) => {}
            // The host is going: whoever still holds a version is the last.
            Err(RecvTimeoutError::Disconnected) => return,
        }
        // With only the reaper's reference left nobody can make another one.
        draining.retain(|version| Arc::strong_count(version) > 1);
    }
}
