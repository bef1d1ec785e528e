//! Every order of steps of what is shared between threads, tried by loom: pinning, replacing, draining and dropping a version; and the queue of
//! jobs. The drain and the queue are the host's own files, over loom's primitives. The cell that requests load their version from is an
//! `arc_swap::ArcSwap` in the host, which loom knows nothing of: a twin of a lock round an `Arc`, which gives the same promises, stands in.

#[path = "../../src/swap/drain.rs"]
mod drain;
#[path = "../../src/router/queue.rs"]
mod queue;

/// What both are made of here.
mod sync {
    pub use loom::sync::{Arc, Condvar, Mutex};
}

use drain::Drain;
use loom::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};
use queue::Queue;
use sync::{Arc, Mutex};

/// The twin of `ArcSwap`.
struct Cell<T>(Mutex<Arc<T>>);

impl<T> Cell<T> {
    fn new(value: Arc<T>) -> Cell<T> {
        Cell(Mutex::new(value))
    }

    fn load(&self) -> Arc<T> {
        Arc::clone(&self.0.lock().unwrap())
    }

    fn store(&self, value: Arc<T>) {
        *self.0.lock().unwrap() = value;
    }
}

/// A version that knows whether it is gone, and on whose thread it went.
struct Version {
    number: usize,
    gone: Arc<AtomicBool>,
    dropped_by_a_request: Arc<AtomicUsize>,
}

loom::thread_local! {
    static ON_A_REQUEST: std::cell::Cell<bool> = std::cell::Cell::new(false);
}

impl Drop for Version {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::SeqCst);
        if ON_A_REQUEST.with(std::cell::Cell::get) {
            self.dropped_by_a_request.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

#[test]
fn a_pinned_version_outlives_its_requests_and_is_dropped_by_the_reaper() {
    explore(3, || {
        let (gone, by_requests) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let version = |number, gone: &Arc<AtomicBool>| {
            let (gone, dropped_by_a_request) = (Arc::clone(gone), Arc::clone(&by_requests));
            Arc::new(Version { number, gone, dropped_by_a_request })
        };
        let cell = Arc::new(Cell::new(version(1, &gone)));
        let drain = Arc::new(Drain::new());
        let request = {
            let (cell, gone) = (Arc::clone(&cell), Arc::clone(&gone));
            thread::spawn(move || {
                ON_A_REQUEST.with(|on| on.set(true));
                let pinned = cell.load();
                // Whatever was replaced meanwhile, what is pinned is there.
                assert!(pinned.number != 1 || !gone.load(Ordering::SeqCst));
                thread::yield_now();
                assert!(pinned.number != 1 || !gone.load(Ordering::SeqCst));
            })
        };
        let deploy = {
            let (cell, drain) = (Arc::clone(&cell), Arc::clone(&drain));
            let second = version(2, &Arc::new(AtomicBool::new(false)));
            thread::spawn(move || {
                // As the host does: the old one is held until the drain has it.
                let before = cell.load();
                cell.store(second);
                drain.retire(Arc::clone(&before));
            })
        };
        // The reaper.
        while drain.sweep() > 0 {
            thread::yield_now();
        }
        request.join().unwrap();
        deploy.join().unwrap();
        while drain.sweep() > 0 {
            thread::yield_now();
        }
        assert!(gone.load(Ordering::SeqCst), "its memory was given back");
        assert_eq!(cell.load().number, 2);
        assert_eq!(by_requests.load(Ordering::SeqCst), 0, "never on a request's thread");
    });
}

#[test]
fn a_reaper_that_waits_is_woken_by_what_is_retired_and_by_the_end() {
    explore(3, || {
        let drain = Arc::new(Drain::new());
        let reaper = {
            let drain = Arc::clone(&drain);
            thread::spawn(move || {
                let mut rounds = 0;
                while drain.wait() {
                    drain.sweep();
                    rounds += 1;
                    thread::yield_now();
                }
                rounds
            })
        };
        let held = Arc::new(7);
        drain.retire(Arc::clone(&held));
        drop(held);
        drain.close();
        reaper.join().unwrap();
    });
}

#[test]
fn every_job_is_done_once_or_given_back() {
    explore(2, || {
        let queue = Arc::new(Queue::new());
        let done = Arc::new(AtomicUsize::new(0));
        let worker = |queue: &Arc<Queue<usize>>| {
            let (queue, done) = (Arc::clone(queue), Arc::clone(&done));
            thread::spawn(move || {
                while let Some((lane, job)) = queue.take(1) {
                    done.fetch_add(job, Ordering::SeqCst);
                    queue.done(&lane);
                }
            })
        };
        let workers = [worker(&queue), worker(&queue)];
        let mut refused = 0;
        for job in [1, 10] {
            refused += queue.push("a", job, 1).map_or_else(|(job, _)| job, |()| 0);
        }
        queue.close();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        let left: usize = queue.drain().into_iter().sum();
        assert_eq!(done.load(Ordering::SeqCst) + refused + left, 11);
        assert_eq!(left, 0, "what was taken in before the end is done");
        assert_eq!(queue.waiting(), 0);
    });
}

#[test]
fn lanes_take_turns_and_none_runs_more_than_it_may() {
    loom::model(|| {
        let queue = Queue::new();
        for (lane, job) in [("a", 1), ("a", 2), ("b", 3)] {
            queue.push(lane, job, 2).unwrap();
        }
        assert!(queue.push("a", 4, 2).is_err());
        let (first, second) = (queue.take(1).unwrap(), queue.take(1).unwrap());
        assert_eq!((first.1, second.1), (1, 3), "b's turn comes before a's next, of which one runs already");
        queue.done("a");
        assert_eq!(queue.take(1), Some(("a".to_string(), 2)));
        queue.done("a");
        queue.done("b");
        queue.close();
        assert_eq!(queue.take(1), None);
    });
}
