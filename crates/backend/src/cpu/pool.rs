//! Threads that walk a run's steps together: one wake per run, a barrier between steps.
//!
//! A step is cut into a part or more for each thread, by its outputs. A thread begins its own parts in order, and then those that others have not
//! begun: one that was woken late, or whose core is somebody else's for a while, does not hold up the step. Which thread computes an output never
//! shows in it.
//!
//! A run that finds the threads busy with another goes on alone: results do not depend on the number of threads, so only its time
//! differs, and sessions never wait for each other.

use crate::{CompileError, ResourceError};
use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

/// Rounds that a thread without a run spins before it sleeps: some tens of microseconds.
const SPINS: usize = 4_000;

/// A thread that waits for another in a run spins this many times longer: whoever sleeps on a virtual machine gives its core back, and
/// waking it takes longer than most steps. One that went on spinning for ever would on a busy machine have used up its share of a core by the
/// time what it waits for is there.
const MOST_PATIENCE: usize = 5;

/// How often of late a thread has spun in vain, at most [`MOST_PATIENCE`]: each time halves how long the next one spins. All that runs here shares
/// one machine, and this tells how busy that is.
static IMPATIENCE: AtomicUsize = AtomicUsize::new(0);

/// Floats up to which filling memory takes less time than waking threads for it.
const WORTH_WAKING_LEN: usize = 32 * 1024;

/// Parts of a step for each thread. More of them even out more, but what is prepared for a part is prepared as often.
const PARTS: usize = 2;

pub(super) struct Pool {
    /// By thread, how many of its parts of all steps of a run were begun.
    begun: Box<[Line]>,
    shared: Arc<Shared>,
    workers: Vec<thread::JoinHandle<()>>,
    /// Held by the run that has the workers.
    busy: Mutex<()>,
}

/// A counter in a cache line of its own.
#[repr(align(64))]
#[derive(Default)]
struct Line(AtomicUsize);

struct Shared {
    job: Mutex<Job>,
    wake: Condvar,
    /// The number of the job, for workers that look without the lock.
    number: AtomicUsize,
    /// Workers still in the job.
    running: AtomicUsize,
    /// Where the caller waits for them.
    done: Gate,
    panicked: AtomicBool,
}

struct Job {
    number: usize,
    task: Option<Task>,
    stop: bool,
}

/// A task that lives on the caller's stack until every worker is done with it.
#[derive(Clone, Copy)]
struct Task(*const (dyn Fn(usize, usize) + Sync));

// SAFETY: the task is `Sync`, and `Pool::run` does not return before the last worker let go of the pointer.
unsafe impl Send for Task {}

impl Pool {
    /// `threads` in all, the caller's of each run included.
    pub fn new(threads: usize) -> Result<Pool, CompileError> {
        let shared = Arc::new(Shared {
            job: Mutex::new(Job { number: 0, task: None, stop: false }),
            wake: Condvar::new(),
            number: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            done: Gate::default(),
            panicked: AtomicBool::new(false),
        });
        let mut workers = Vec::with_capacity(threads.saturating_sub(1));
        for thread in 1..threads.max(1) {
            let shared = Arc::clone(&shared);
            let worker = thread::Builder::new().name(format!("cutover-cpu-{thread}"));
            let worker = worker.spawn(move || shared.work(thread, threads)).map_err(|error| {
                CompileError::Resource(ResourceError::System { what: "a thread", message: error.to_string() })
            })?;
            workers.push(worker);
        }
        let begun = (0..threads.max(1)).map(|_| Line::default()).collect();
        Ok(Pool { begun, shared, workers, busy: Mutex::new(()) })
    }

    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Cuts `memory` into `pieces` of one length and calls `fill` for ranges of them, each with its part of the memory, on all threads where that is
    /// worth waking them.
    pub fn share_out(&self, memory: &mut [f32], pieces: usize, fill: &(dyn Fn(Range<usize>, &mut [f32]) + Sync)) {
        let threads = if memory.len() < WORTH_WAKING_LEN { 1 } else { self.threads().min(pieces) };
        if threads <= 1 {
            return fill(0..pieces, memory);
        }
        let each = memory.len() / pieces;
        let mut rest = memory;
        let parts: Vec<_> = (0..threads)
            .map(|part| {
                let range = share(pieces, part, threads);
                let (own, others) = std::mem::take(&mut rest).split_at_mut(range.len() * each);
                rest = others;
                Mutex::new(Some((range, own)))
            })
            .collect();
        self.run(&|_, _| {
            // Whoever comes takes what is left: a thread that is late holds up nobody.
            for part in &parts {
                let own = part.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some((range, memory)) = own {
                    fill(range, memory);
                }
            }
        });
    }

    /// Parts that a step is cut into at most.
    pub fn most_parts(&self) -> usize {
        parts(self.threads())
    }

    /// A part of step `step` that nobody has begun, for `thread` of `threads`; `None` where there is none left. All threads ask for the parts of a
    /// step until they are told so, and meet before the next.
    pub fn begin_part(&self, step: usize, thread: usize, threads: usize) -> Option<usize> {
        if threads == 1 {
            // A run that goes alone shares these counters with none, nor needs any.
            return None;
        }
        let end = (step + 1) * PARTS;
        (0..threads).map(|ahead| (thread + ahead) % threads).find_map(|owner| {
            let begin = |begun: usize| (begun < end).then_some(begun + 1);
            let begun = self.begun[owner].0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, begin).ok()?;
            Some(owner * PARTS + begun - step * PARTS)
        })
    }

    /// Calls `task(thread, threads)` once on each of `threads` threads, of which the calling one is 0, and returns when all are done. A
    /// panic of one is the caller's, once all are done.
    pub fn run(&self, task: &(dyn Fn(usize, usize) + Sync)) {
        let busy = match self.busy.try_lock() {
            Ok(busy) => Some(busy),
            // A task that panicked left nothing behind: every worker was done with it.
            Err(TryLockError::Poisoned(busy)) => Some(busy.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let Some(_busy) = busy.filter(|_| !self.workers.is_empty()) else { return task(0, 1) };
        // SAFETY: only the lifetime changes; this function returns, or unwinds, only after `running` is 0.
        let erased: *const (dyn Fn(usize, usize) + Sync) = unsafe {
            std::mem::transmute::<
                *const (dyn Fn(usize, usize) + Sync + '_),
                *const (dyn Fn(usize, usize) + Sync + 'static),
            >(task)
        };
        self.begun.iter().for_each(|begun| begun.0.store(0, Ordering::Relaxed));
        self.shared.running.store(self.workers.len(), Ordering::Relaxed);
        {
            let mut job = self.shared.job.lock().unwrap_or_else(PoisonError::into_inner);
            job.task = Some(Task(erased));
            job.number += 1;
            self.shared.number.store(job.number, Ordering::Release);
        }
        self.shared.wake.notify_all();
        let mine = catch_unwind(AssertUnwindSafe(|| task(0, self.threads())));
        self.shared.done.wait(|| self.shared.running.load(Ordering::SeqCst) == 0);
        let panicked = self.shared.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        assert!(!panicked, "a thread of the CPU backend panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.job.lock().unwrap_or_else(PoisonError::into_inner).stop = true;
        self.shared.number.fetch_add(1, Ordering::Release);
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self, thread: usize, threads: usize) {
        let mut done = 0;
        loop {
            // A run often follows the last one at once: look for it a little before sleeping.
            for _ in 0..SPINS {
                if self.number.load(Ordering::Acquire) != done {
                    break;
                }
                std::hint::spin_loop();
            }
            let mut job = self.job.lock().unwrap_or_else(PoisonError::into_inner);
            while job.number == done && !job.stop {
                job = self.wake.wait(job).unwrap_or_else(PoisonError::into_inner);
            }
            if job.stop {
                return;
            }
            done = job.number;
            let task = job.task;
            drop(job);
            if let Some(Task(task)) = task {
                // SAFETY: `Pool::run` keeps the task alive until `running` is 0, which this thread sees to below.
                let task = unsafe { &*task };
                if catch_unwind(AssertUnwindSafe(|| task(thread, threads))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
                self.running.fetch_sub(1, Ordering::SeqCst);
                self.done.open();
            }
        }
    }
}

/// Where threads wait for what another thread is about to do: they spin, and then sleep.
#[derive(Default)]
struct Gate {
    sleeping: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Gate {
    /// Returns once `is_open`, which reads atomics in sequential order: whoever changes them opens the gate afterwards.
    fn wait(&self, is_open: impl Fn() -> bool) {
        let impatience = IMPATIENCE.load(Ordering::Relaxed);
        for _ in 0..SPINS << (MOST_PATIENCE - impatience) {
            if is_open() {
                if impatience > 0 {
                    IMPATIENCE.store(impatience - 1, Ordering::Relaxed);
                }
                return;
            }
            std::hint::spin_loop();
        }
        IMPATIENCE.store((impatience + 1).min(MOST_PATIENCE), Ordering::Relaxed);
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        // Before the look: either this thread sees the change, or who made it sees this thread.
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        while !is_open() {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleeping.fetch_sub(1, Ordering::SeqCst);
    }

    fn open(&self) {
        if self.sleeping.load(Ordering::SeqCst) > 0 {
            // Whoever looked before the change is asleep once the lock is free.
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }
}

/// Where the threads of one run meet after every step.
#[derive(Default)]
pub(super) struct Barrier {
    arrived: AtomicUsize,
    round: AtomicUsize,
    /// Set by a thread that can't go on; every thread leaves at its next meeting.
    broken: AtomicBool,
    gate: Gate,
}

impl Barrier {
    /// Waits until all `threads` are here; `false` where one can't go on.
    pub fn wait(&self, threads: usize) -> bool {
        if threads > 1 {
            let round = self.round.load(Ordering::Acquire);
            if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == threads {
                self.arrived.store(0, Ordering::Relaxed);
                self.round.store(round.wrapping_add(1), Ordering::SeqCst);
                self.gate.open();
            } else {
                let is_over = || self.round.load(Ordering::SeqCst) != round || self.broken.load(Ordering::SeqCst);
                self.gate.wait(is_over);
            }
        }
        !self.broken.load(Ordering::SeqCst)
    }

    pub fn break_up(&self) {
        self.broken.store(true, Ordering::SeqCst);
        self.gate.open();
    }
}

/// Breaks the barrier when its thread unwinds, so that the others do not wait for it.
pub(super) struct BreakOnPanic<'a>(pub &'a Barrier);

impl Drop for BreakOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.break_up();
        }
    }
}

/// Parts of a step of a run on so many threads.
pub(super) fn parts(threads: usize) -> usize {
    if threads == 1 { 1 } else { threads * PARTS }
}

/// Of `count` units those of one part.
pub(super) fn share(count: usize, part: usize, parts: usize) -> Range<usize> {
    count * part / parts..count * (part + 1) / parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_runs_once_and_meets_the_others() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads).unwrap();
            for _ in 0..100 {
                let barrier = Barrier::default();
                let (before, after) = (AtomicUsize::new(0), AtomicUsize::new(0));
                pool.run(&|_, threads| {
                    before.fetch_add(1, Ordering::Relaxed);
                    assert!(barrier.wait(threads));
                    assert_eq!(before.load(Ordering::Relaxed), threads);
                    after.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(after.load(Ordering::Relaxed), threads);
            }
        }
    }

    #[test]
    fn every_part_of_every_step_is_begun_once_whoever_is_late() {
        for threads in [2, 3, 8] {
            let pool = Pool::new(threads).unwrap();
            let barrier = Barrier::default();
            let counts: Vec<_> = (0..50 * pool.most_parts()).map(|_| AtomicUsize::new(0)).collect();
            pool.run(&|thread, threads| {
                for step in 0..50 {
                    while let Some(part) = pool.begin_part(step, thread, threads) {
                        counts[step * parts(threads) + part].fetch_add(1, Ordering::Relaxed);
                        if thread == step % threads {
                            thread::yield_now();
                        }
                    }
                    assert!(barrier.wait(threads));
                }
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{threads} threads");
        }
    }

    #[test]
    fn memory_is_filled_whatever_the_pieces_and_threads() {
        for (threads, pieces, each) in [(1, 3, 5), (2, 7, 10_000), (3, 2, 40_000), (8, 20, 4_096)] {
            let mut memory = vec![0f32; pieces * each];
            Pool::new(threads).unwrap().share_out(&mut memory, pieces, &|range, part| {
                assert_eq!(part.len(), range.len() * each);
                range.zip(part.chunks_mut(each)).for_each(|(piece, part)| part.fill(1.0 + piece as f32));
            });
            let right = memory.chunks(each).enumerate().all(|(i, part)| part.iter().all(|&x| x == 1.0 + i as f32));
            assert!(right, "{pieces} pieces on {threads} threads");
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3).unwrap();
        for culprit in 0..3 {
            let barrier = Barrier::default();
            let run = || {
                pool.run(&|thread, threads| {
                    let _guard = BreakOnPanic(&barrier);
                    assert_ne!(thread, culprit, "as planned");
                    barrier.wait(threads);
                })
            };
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        }
        let count = AtomicUsize::new(0);
        pool.run(&|_, _| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 3);
    }
}
