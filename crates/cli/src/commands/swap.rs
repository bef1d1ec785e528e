//! `cutover bench --swap A B`: what replacing a model under load costs.

use super::{
    bench::one::peak_rss_bytes,
    serve::{open_host, package_of},
};
use crate::{
    Verdict,
    output::{Printer, bytes, table},
};
use anyhow::{Context, Result, bail};
use cutover::{
    Device, DeviceOptions, Host, Request, Strategy, Value,
    monitor::Gates,
    package::Package,
    runtime::{BlueGreen, Shadow},
};
use serde_json::json;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Requests this near to a swap are compared with the rest.
const NEAR: Duration = Duration::from_millis(100);
/// Memory and descriptors are first looked at after a tenth of the swaps, at least and at most these: by then what is bounded has filled.
const WARM_UP: [u64; 2] = [10, 1000];
/// What memory may grow by over all swaps: 2 % and 2 MiB.
const GROWTH_SHARE: f64 = 0.02;
const GROWTH_BYTES: f64 = 2.0 * 1024.0 * 1024.0;

/// How a swap is measured.
pub(super) struct Swap<'a> {
    /// Two versions of one model.
    pub versions: &'a [PathBuf],
    pub device: Device,
    pub options: &'a DeviceOptions,
    pub swaps: u64,
    pub clients: usize,
    /// Least time between two swaps, so that there is a steady state to compare with.
    pub pause: Duration,
}

/// What clients saw: start and end of each answer, since the beginning; the newest ones.
struct Seen {
    answers: Mutex<Vec<(Duration, Duration)>>,
    answered: AtomicU64,
    failed: AtomicU64,
    stop: AtomicBool,
}

/// Answers that are kept of one client: what comes after a run of some ten minutes is counted, and not looked at one by one.
const KEPT: usize = 1 << 21;

impl Swap<'_> {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let folder = tempfile::Builder::new().prefix("cutover-swap-").tempdir().context("a temporary folder")?;
        let packages = self
            .versions
            .iter()
            .enumerate()
            .map(|(number, path)| versioned(path, number, folder.path()))
            .collect::<Result<Vec<_>>>()?;
        let opened: Vec<Package> = packages.iter().map(|path| Package::open(path)).collect::<Result<_, _>>()?;
        let [a, b] = &opened[..] else { bail!("--swap takes two versions") };
        if a.manifest.name != b.manifest.name || a.manifest.version == b.manifest.version {
            bail!(
                "--swap takes two versions of one model, these are {} {} and {} {}",
                a.manifest.name,
                a.manifest.version,
                b.manifest.name,
                b.manifest.version
            );
        }
        let shared = a.manifest.tensors.values().collect::<BTreeSet<_>>();
        let differing = b.manifest.tensors.values().filter(|digest| !shared.contains(digest)).count();
        let inputs: Vec<(String, Value)> =
            a.golden()?.inputs.into_iter().map(|(name, tensor)| (name, Value::from(tensor))).collect();
        let name = a.manifest.name.clone();
        let tensors = b.manifest.tensors.len();
        drop(opened);

        let store = folder.path().join("store");
        let host = open_host(&store, self.device, self.options, 0)?;
        let at_once = || Strategy::BlueGreen(BlueGreen { observe_s: 0.0, ..BlueGreen::default() });
        let request = || Request { inputs: inputs.clone(), ..Request::default() };
        let cold = Instant::now();
        host.deploy(&name, &packages[0], at_once())?;
        host.infer(&name, request())?;
        let cold_ms = ms(cold.elapsed());

        let start = Instant::now();
        let seen = Seen {
            answers: Mutex::default(),
            answered: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        };
        let mut swaps: Vec<Duration> = Vec::new();
        let mut rollbacks: Vec<f64> = Vec::new();
        let mut deploys: Vec<f64> = Vec::new();
        let (mut settled, mut ends) = (None, Usage::default());
        let outcome = std::thread::scope(|scope| -> Result<()> {
            for client in 0..self.clients {
                let (host, seen, request) = (&host, &seen, &request);
                scope.spawn(move || ask(host, &name_of(host), request, seen, start, client));
            }
            let swapped = (|| {
                for number in 1..=self.swaps {
                    std::thread::sleep(self.pause);
                    let began = Instant::now();
                    host.deploy(&name, &packages[number as usize % 2], at_once())?;
                    deploys.push(ms(began.elapsed()));
                    swaps.push(start.elapsed());
                    // Now and then back and forth again: the version before is still in memory.
                    if number % 10 == 0 {
                        for _ in 0..2 {
                            std::thread::sleep(self.pause);
                            let began = Instant::now();
                            host.rollback(&name)?;
                            host.infer(&name, request())?;
                            rollbacks.push(ms(began.elapsed()));
                            swaps.push(start.elapsed());
                        }
                    }
                    if number == (self.swaps / 10).clamp(WARM_UP[0], WARM_UP[1]).min(self.swaps) {
                        settled = Some(Usage::now(&store));
                    }
                }
                std::thread::sleep(NEAR);
                ends = Usage::now(&store);
                Ok(())
            })();
            seen.stop.store(true, Ordering::Relaxed);
            swapped
        });
        outcome?;
        // The version that is in service by now, and the other as its shadow.
        let other = &packages[(self.swaps as usize + 1) % 2];
        let shadow = if self.swaps > 0 { self.shadow(&host, &name, other, &request)? } else { Default::default() };
        let mut answers = seen.answers.into_inner().unwrap_or_default();
        answers.sort_by_key(|(_, end)| *end);
        let (near, far): (Vec<f64>, Vec<f64>) = split(&answers, &swaps);
        let pauses = pauses(&answers, &swaps);
        let settled = settled.unwrap_or_default();
        let failed = seen.failed.load(Ordering::Relaxed);
        let flat = ends.memory as f64 <= settled.memory as f64 * (1.0 + GROWTH_SHARE) + GROWTH_BYTES;
        // A deploy of the last moment may still hold the store's files open.
        let (no_leak, maps_of_resident) = (ends.descriptors <= settled.descriptors + 1, ends.mapped <= ends.objects);
        let good = failed == 0 && flat && no_leak && maps_of_resident;
        let document = json!({
            "good": good,
            "swaps": swaps.len(), "loads": self.swaps, "tensors": tensors, "tensors_that_differ": differing,
            "requests": seen.answered.load(Ordering::Relaxed), "failed": failed,
            "cold_to_first_answer_ms": cold_ms,
            "deploy_ms": { "p50": quantile(&deploys, 0.5), "p99": quantile(&deploys, 0.99) },
            "pause_ms": { "p50": quantile(&pauses, 0.5), "p99": quantile(&pauses, 0.99), "max": quantile(&pauses, 1.0) },
            "latency_ms_within_100_ms_of_a_swap": { "p50": quantile(&near, 0.5), "p99": quantile(&near, 0.99), "p999": quantile(&near, 0.999) },
            "latency_ms_steady": { "p50": quantile(&far, 0.5), "p99": quantile(&far, 0.99), "p999": quantile(&far, 0.999) },
            "latency_ms_alone": { "p50": quantile(&shadow.alone, 0.5), "p99": quantile(&shadow.alone, 0.99), "p999": quantile(&shadow.alone, 0.999) },
            "latency_ms_beside_a_shadow": { "p50": quantile(&shadow.beside, 0.5), "p99": quantile(&shadow.beside, 0.99), "p999": quantile(&shadow.beside, 0.999) },
            "shadow_copies_share": shadow.copies_share,
            "rollback_ms": { "p50": quantile(&rollbacks, 0.5), "max": quantile(&rollbacks, 1.0) },
            "memory_bytes_settled": settled.memory, "memory_bytes_end": ends.memory, "memory_flat": flat,
            "peak_memory_bytes": peak_rss_bytes(),
            "descriptors_settled": settled.descriptors, "descriptors_end": ends.descriptors,
            "objects_mapped_end": ends.mapped, "objects_end": ends.objects,
            "seconds": start.elapsed().as_secs_f64(),
        });
        printer.print(&document, || {
            let row = |name: &str, value: String| vec![name.to_string(), value];
            let ms = |v: Option<f64>| v.map_or("-".to_string(), |v| format!("{v:.3}"));
            let rows = vec![
                row("swaps, with a load each", self.swaps.to_string()),
                row("tensors that differ", format!("{differing} of {tensors}")),
                row("requests", document["requests"].to_string()),
                row("failed", failed.to_string()),
                row("cold to first answer, ms", format!("{cold_ms:.2}")),
                row("pause p50 / p99 / max, ms", [0.5, 0.99, 1.0].map(|q| ms(quantile(&pauses, q))).join(" / ")),
                row("p99.9 within 100 ms of a swap, ms", ms(quantile(&near, 0.999))),
                row("p99.9 steady, ms", ms(quantile(&far, 0.999))),
                row("alone p50 / p99, ms", [0.5, 0.99].map(|q| ms(quantile(&shadow.alone, q))).join(" / ")),
                row("beside a shadow p50 / p99, ms", [0.5, 0.99].map(|q| ms(quantile(&shadow.beside, q))).join(" / ")),
                row("requests that the shadow saw", format!("{:.1} %", 100.0 * shadow.copies_share)),
                row("rollback p50 / max, ms", [0.5, 1.0].map(|q| ms(quantile(&rollbacks, q))).join(" / ")),
                row("memory after warm-up", bytes(settled.memory)),
                row("memory at the end", bytes(ends.memory)),
                row("peak memory", bytes(peak_rss_bytes())),
                row(
                    "descriptors after warm-up / at the end",
                    format!("{} / {}", settled.descriptors, ends.descriptors),
                ),
                row("objects mapped / in the store at the end", format!("{} / {}", ends.mapped, ends.objects)),
            ];
            format!(
                "{}\n{}",
                table(&["", "value"], rows, true),
                if good { "all as it must be" } else { "NOT AS IT MUST BE" }
            )
        })?;
        Ok(if good { Verdict::Yes } else { Verdict::No })
    }
}

/// Latencies in milliseconds of the version in service, alone and while another is its shadow.
#[derive(Default)]
struct Shadowed {
    alone: Vec<f64>,
    beside: Vec<f64>,
    /// Of the requests beside a shadow, how many it was given too.
    copies_share: f64,
}

impl Swap<'_> {
    /// Clients ask without pause while the package `other` is a shadow, and is none, in turn.
    fn shadow(
        &self,
        host: &Host,
        name: &str,
        other: &Path,
        request: &(dyn Fn() -> Request + Sync),
    ) -> Result<Shadowed> {
        const TURNS: usize = 8;
        const TURN: Duration = Duration::from_secs(1);
        // Nothing ends it but us: the comparison is not what is measured.
        let gates = Gates { requests_min: u64::MAX, labels_wait_s: 1e9, latency_ratio_max: 1e9, ..Gates::default() };
        let undecided = || Strategy::Shadow(Shadow { observe_s: 1e9, deadline_s: 1e9, then: None, gates });
        let start = Instant::now();
        let seen = Seen {
            answers: Mutex::default(),
            answered: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        };
        let (mut turns, mut copies) = (Vec::new(), 0);
        std::thread::scope(|scope| -> Result<()> {
            for client in 0..self.clients {
                let seen = &seen;
                scope.spawn(move || ask(host, name, request, seen, start, client));
            }
            let measured = (|| {
                for turn in 0..TURNS {
                    let beside = turn % 2 == 1;
                    if beside {
                        host.deploy(name, other, undecided())?;
                    }
                    // What loading and dropping a version costs is told elsewhere.
                    std::thread::sleep(NEAR * 2);
                    let began = start.elapsed();
                    std::thread::sleep(TURN);
                    turns.push((began, start.elapsed(), beside));
                    if beside {
                        let status = host.status();
                        let rollout = status.models.iter().find_map(|model| model.rollout.as_ref());
                        copies += rollout.map_or(0, |rollout| rollout.candidate.requests);
                        host.rollback(name)?;
                    }
                }
                Ok(())
            })();
            seen.stop.store(true, Ordering::Relaxed);
            measured
        })?;
        let mut shadowed = Shadowed::default();
        for (asked, answered) in seen.answers.into_inner().unwrap_or_default() {
            let turn = turns.iter().find(|(began, ended, _)| *began <= asked && answered <= *ended);
            if let Some((_, _, beside)) = turn {
                if *beside { &mut shadowed.beside } else { &mut shadowed.alone }.push(ms(answered - asked));
            }
        }
        shadowed.copies_share = copies as f64 / shadowed.beside.len().max(1) as f64;
        Ok(shadowed)
    }
}

/// The package at `path`. Bare models are versions of one model called `model`, in their order.
fn versioned(path: &Path, number: usize, folder: &Path) -> Result<PathBuf> {
    if Package::is_one(path) {
        return Ok(path.to_path_buf());
    }
    package_of(path, "model", &(number + 1).to_string(), folder)
}

fn name_of(host: &Host) -> String {
    host.status().models.into_iter().next().map(|model| model.name).unwrap_or_default()
}

/// One client, until it is stopped.
fn ask(host: &Host, name: &str, request: &dyn Fn() -> Request, seen: &Seen, start: Instant, client: usize) {
    // Microseconds of start and length; touched before memory is measured, so that the records themselves do not look like a leak.
    let mut own = vec![(1u32, 1u32); KEPT];
    own.clear();
    while !seen.stop.load(Ordering::Relaxed) {
        let asked = start.elapsed();
        match host.infer(name, request()) {
            Ok(_) => {
                seen.answered.fetch_add(1, Ordering::Relaxed);
                let us = |time: Duration| u32::try_from(time.as_micros()).ok();
                if let (true, Some(asked_us), Some(took_us)) =
                    (own.len() < KEPT, us(asked), us(start.elapsed() - asked))
                {
                    own.push((asked_us, took_us));
                }
            }
            Err(_) => drop(seen.failed.fetch_add(1, Ordering::Relaxed)),
        }
        // Leaves the other threads of a small machine their turn.
        std::thread::sleep(Duration::from_micros(200 + 50 * client as u64));
    }
    seen.answers.lock().unwrap_or_else(std::sync::PoisonError::into_inner).extend(own.into_iter().map(
        |(asked_us, took_us)| {
            let asked = Duration::from_micros(asked_us.into());
            (asked, asked + Duration::from_micros(took_us.into()))
        },
    ));
}

/// Latencies in milliseconds of answers under way near a swap, and of the others.
fn split(answers: &[(Duration, Duration)], swaps: &[Duration]) -> (Vec<f64>, Vec<f64>) {
    let (mut near, mut far) = (Vec::new(), Vec::new());
    for &(asked, answered) in answers {
        // Swaps are in order: the first that is not over long before it was asked.
        let next = swaps.partition_point(|&swap| swap + NEAR < asked);
        let is_near = swaps.get(next).is_some_and(|&swap| swap <= answered + NEAR);
        if is_near { &mut near } else { &mut far }.push(ms(answered - asked));
    }
    (near, far)
}

/// For each swap the longest time without an answer round it, in milliseconds.
fn pauses(answers: &[(Duration, Duration)], swaps: &[Duration]) -> Vec<f64> {
    let longest = |&swap: &Duration| {
        let from = answers.partition_point(|(_, end)| *end + NEAR < swap);
        let to = answers.partition_point(|(_, end)| *end <= swap + NEAR);
        let gaps = answers.get(from..to)?.windows(2).map(|pair| pair[1].1 - pair[0].1);
        gaps.max().map(ms)
    };
    swaps.iter().filter_map(longest).collect()
}

/// What this process holds.
#[derive(Clone, Copy, Default)]
struct Usage {
    memory: u64,
    descriptors: usize,
    /// Objects of the store that are mapped, and that are there.
    mapped: usize,
    objects: usize,
}

impl Usage {
    fn now(store: &Path) -> Usage {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let memory = resident.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024;
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let objects = store.join("objects");
        let prefix = objects.to_string_lossy();
        let mapped: BTreeSet<&str> =
            maps.lines().filter_map(|line| line.split_once(&*prefix).map(|(_, name)| name)).collect();
        let count = |folder: &Path| fs::read_dir(folder).map_or(0, |entries| entries.count());
        Usage { memory, descriptors: count(Path::new("/proc/self/fd")), mapped: mapped.len(), objects: count(&objects) }
    }
}

fn quantile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(((q * sorted.len() as f64).ceil() as usize).saturating_sub(1)).copied()
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
