//! What is out of service and waits until nobody uses it any more. Generic over what that is, and over the primitives it synchronises by
//! (`super::sync`), so that loom can try every order of its steps.

use super::sync::{Arc, Condvar, Mutex};

/// Retired things, each kept until the drain is the only one to hold it: then it is dropped where [`Drain::sweep`] is called, never by the
/// last user.
pub(crate) struct Drain<T> {
    state: Mutex<State<T>>,
    came: Condvar,
}

struct State<T> {
    retired: Vec<Arc<T>>,
    closed: bool,
}

impl<T> Drain<T> {
    pub fn new() -> Drain<T> {
        Drain { state: Mutex::new(State { retired: Vec::new(), closed: false }), came: Condvar::new() }
    }

    /// Takes what nobody can get hold of anew. Call it while still holding another reference: the last one is the drain's to drop.
    pub fn retire(&self, retired: Arc<T>) {
        self.state.lock().unwrap_or_else(|e| e.into_inner()).retired.push(retired);
        self.came.notify_one();
    }

    /// Waits until there is something to sweep; whether there ever will be.
    pub fn wait(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        while state.retired.is_empty() && !state.closed {
            state = self.came.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        !state.closed
    }

    /// Drops what nobody uses any more; gives how many are still in use. With only the drain's reference left nobody can make another one.
    pub fn sweep(&self) -> usize {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let all = std::mem::take(&mut state.retired);
        let (unused, used): (Vec<_>, Vec<_>) = all.into_iter().partition(|retired| Arc::strong_count(retired) == 1);
        state.retired = used;
        let left = state.retired.len();
        drop(state);
        // Giving memory back takes a while: nobody who retires waits for it.
        drop(unused);
        left
    }

    /// What is left is dropped by its last user.
    pub fn close(&self) {
        self.state.lock().unwrap_or_else(|e| e.into_inner()).closed = true;
        self.came.notify_all();
    }
}
