//! What a run of the code under test costs: memory, time, and where it panics.
#![allow(unsafe_code)] // a global allocator that counts

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    collections::BTreeMap,
    fs,
    panic::{self, AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

/// Counts the bytes that each thread holds, and ends the process where one asks for more at once than any input here can be worth.
pub struct Counting;

const REQUEST_MAX: usize = 2 << 30;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

static ITERATION: AtomicU64 = AtomicU64::new(0);
static STARTED_MS: AtomicUsize = AtomicUsize::new(0);

fn count(bytes: isize) {
    let held = HELD.get() + bytes;
    HELD.set(held);
    if held > PEAK.get() {
        PEAK.set(held);
    }
}

// SAFETY: every call is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > REQUEST_MAX {
            eprintln!("iteration {} asks for {} bytes at once", ITERATION.load(Relaxed), layout.size());
            std::process::abort();
        }
        count(layout.size() as isize);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        unsafe { System.dealloc(at, layout) }
    }
}

/// Nanoseconds that this thread has been on a processor.
fn processor_time() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = text.split_whitespace().next().and_then(|word| word.parse().ok());
    nanoseconds.map_or(Duration::ZERO, Duration::from_nanos)
}

/// Findings by what tells them apart, with the first iteration of each.
#[derive(Default)]
pub struct Findings(pub BTreeMap<String, (u64, usize)>);

static PANIC: Mutex<String> = Mutex::new(String::new());

pub struct Watch {
    pub findings: Findings,
    origin: Instant,
    /// Longest on a processor, and most bytes held beyond those before.
    pub longest: Duration,
    pub most_bytes: isize,
    seconds_max: u64,
    bytes_max: isize,
}

impl Watch {
    /// Ends the process where one iteration takes a minute or more.
    pub fn start(seconds_max: u64, bytes_max: isize) -> Watch {
        panic::set_hook(Box::new(|info| {
            let place = info.location().map(ToString::to_string).unwrap_or_default();
            *PANIC.lock().unwrap() = format!("panics at {place}: {info}").replace('\n', " ");
            if std::env::var_os("CUTOVER_FUZZ").is_some() {
                eprintln!("{}", std::backtrace::Backtrace::force_capture());
            }
        }));
        let origin = Instant::now();
        thread::spawn(move || {
            loop {
                thread::sleep(Duration::from_secs(5));
                let (iteration, started) = (ITERATION.load(Relaxed), STARTED_MS.load(Relaxed));
                let now = origin.elapsed().as_millis() as usize;
                if started > 0 && now > started + 300_000 && iteration == ITERATION.load(Relaxed) {
                    eprintln!("iteration {iteration} hangs");
                    std::process::abort();
                }
            }
        });
        let findings = Findings::default();
        Watch { findings, origin, longest: Duration::ZERO, most_bytes: 0, seconds_max, bytes_max }
    }

    /// `work` gives what is wrong with the results, if anything.
    pub fn run(&mut self, iteration: u64, work: impl FnOnce() -> Result<(), String>) {
        ITERATION.store(iteration, Relaxed);
        STARTED_MS.store(self.origin.elapsed().as_millis() as usize + 1, Relaxed);
        let (held, started) = (HELD.get(), processor_time());
        PEAK.set(held);
        let result = catch_unwind(AssertUnwindSafe(work));
        let (taken, bytes) = (processor_time().saturating_sub(started), PEAK.get() - held);
        STARTED_MS.store(0, Relaxed);
        self.longest = self.longest.max(taken);
        self.most_bytes = self.most_bytes.max(bytes);
        match result {
            Ok(Ok(())) => {}
            Ok(Err(wrong)) => self.found(iteration, wrong),
            Err(_) => {
                let panicked = PANIC.lock().unwrap().clone();
                self.found(iteration, panicked);
            }
        }
        if taken.as_secs() >= self.seconds_max {
            self.found(iteration, format!("takes {} seconds or more", self.seconds_max));
        }
        if bytes > self.bytes_max {
            self.found(iteration, format!("holds more than {} bytes", self.bytes_max));
        }
    }

    fn found(&mut self, iteration: u64, what: String) {
        // Numbers differ from one occurrence to the next.
        let key: String = what.chars().filter(|c| !c.is_ascii_digit()).take(200).collect();
        let key = if what.starts_with("panics") { what.chars().take(120).collect() } else { key };
        let entry = self.findings.0.entry(key).or_insert_with(|| {
            println!("iteration {iteration} {what}");
            (iteration, 0)
        });
        entry.1 += 1;
    }
}
