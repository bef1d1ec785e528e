//! Jobs that wait for a worker: a bounded lane for each model, served in turn. Generic over the jobs, and over the primitives it
//! synchronises by (`super::sync`), so that loom can try every order of its steps.

use super::sync::{Condvar, Mutex};
use std::collections::{BTreeMap, VecDeque};

/// Lanes of jobs. No lane can fill another's, nor keep every worker busy while others wait.
pub(crate) struct Queue<J> {
    state: Mutex<State<J>>,
    changed: Condvar,
}

struct State<J> {
    lanes: BTreeMap<String, Lane<J>>,
    /// The lane that was served last: its turn comes after all others'.
    last: String,
    closed: bool,
}

struct Lane<J> {
    waiting: VecDeque<J>,
    running: usize,
}

impl<J> Queue<J> {
    pub fn new() -> Queue<J> {
        let state = State { lanes: BTreeMap::new(), last: String::new(), closed: false };
        Queue { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Takes a job, unless `waiting_max` wait in its lane; then it is given back with their number.
    pub fn push(&self, lane: &str, job: J, waiting_max: usize) -> Result<(), (J, usize)> {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        if !state.lanes.contains_key(lane) {
            state.lanes.insert(lane.to_string(), Lane { waiting: VecDeque::new(), running: 0 });
        }
        let lane = state.lanes.get_mut(lane).expect("just made");
        if lane.waiting.len() >= waiting_max {
            return Err((job, lane.waiting.len()));
        }
        lane.waiting.push_back(job);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Waits for a job of a lane of which fewer than `running_max` run; the lanes take turns. Every job is to be followed by
    /// [`Queue::done`]. `None` once the queue is closed and no job is left.
    pub fn take(&self, running_max: usize) -> Option<(String, J)> {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            if let Some(taken) = state.take(running_max) {
                return Some(taken);
            }
            if state.closed && state.lanes.values().all(|lane| lane.waiting.is_empty()) {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }

    pub fn done(&self, lane: &str) {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(found) = state.lanes.get_mut(lane) {
            found.running -= 1;
            if found.running == 0 && found.waiting.is_empty() {
                state.lanes.remove(lane);
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    pub fn close(&self) {
        self.state.lock().unwrap_or_else(|e| e.into_inner()).closed = true;
        self.changed.notify_all();
    }

    /// What nobody took.
    pub fn drain(&self) -> Vec<J> {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        state.lanes.values_mut().flat_map(|lane| std::mem::take(&mut lane.waiting)).collect()
    }

    /// Jobs of all lanes that nobody took yet.
    pub fn waiting(&self) -> usize {
        self.state.lock().unwrap_or_else(|e| e.into_inner()).lanes.values().map(|lane| lane.waiting.len()).sum()
    }
}

impl<J> State<J> {
    fn take(&mut self, running_max: usize) -> Option<(String, J)> {
        let is_due = |lane: &Lane<J>| !lane.waiting.is_empty() && lane.running < running_max;
        let after = self.lanes.iter().find(|(name, lane)| **name > self.last && is_due(lane));
        let name = after.or_else(|| self.lanes.iter().find(|(_, lane)| is_due(lane)))?.0.clone();
        let lane = self.lanes.get_mut(&name)?;
        let job = lane.waiting.pop_front()?;
        lane.running += 1;
        self.last.clone_from(&name);
        Some((name, job))
    }
}
