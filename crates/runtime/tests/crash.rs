//! The process is killed at arbitrary moments of changing who serves; what is opened afterwards is as before or as after.
//!
//! Killing a process leaves the page cache: whether what was synced is on the medium is for the store's own tests.

mod support;

use cutover_monitor::Gates;
use cutover_runtime::{BlueGreen, Canary, Host, HostOptions, Request, Strategy};
use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};
use support::*;

const STORE: &str = "CUTOVER_TEST_STORE";
const TASK: &str = "CUTOVER_TEST_TASK";

fn versions() -> [Recipe; 3] {
    [good("a", 4.0), good("b", 5.0), good("c", 6.0)]
}

fn package(folder: &Path, recipe: &Recipe) -> std::path::PathBuf {
    folder.join(format!("{}-{}.cutover", recipe.version, recipe.scale))
}

fn hand_driven() -> HostOptions {
    HostOptions { drive: false, workers: 0, ..options() }
}

/// Not a test of its own: what the killed processes do.
#[test]
fn child() {
    let Some(folder) = std::env::var_os(STORE) else { return };
    let folder = Path::new(&folder);
    let host = Host::open(folder.join("store"), hand_driven()).unwrap();
    // Standard output is captured in tests of this crate; its lock is not.
    let said = |line: String| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{line}").and_then(|()| out.flush()).unwrap();
    };
    // The harness has begun a line with this test's name.
    said(String::new());
    match std::env::var(TASK).unwrap().as_str() {
        "swap" => {
            for number in 0.. {
                let serving = host.status().models.first().map(|m| m.active.version.clone());
                let next = &versions()[(number + 1) % 3];
                if serving.as_deref() == Some(next.version) {
                    continue;
                }
                // A rollout that the last process left.
                let _ = host.rollback_candidate();
                let at_once = Strategy::BlueGreen(BlueGreen { observe_s: 0.0, gates: Gates::default() });
                let strategy = if number % 2 == 0 { at_once } else { Strategy::Canary(Canary::default()) };
                said(format!("begin {}", next.version));
                host.deploy(MODEL, &package(folder, next), strategy).unwrap();
                if number % 2 == 1 {
                    host.promote(MODEL).unwrap();
                }
                said(format!("done {}", next.version));
            }
        }
        "wait" => {
            said("open".to_string());
            thread::sleep(Duration::from_secs(60));
        }
        other => panic!("no task {other}"),
    }
}

trait RollbackCandidate {
    fn rollback_candidate(&self) -> bool;
}

impl RollbackCandidate for Host {
    /// Rolls back only where a rollout is under way.
    fn rollback_candidate(&self) -> bool {
        let under_way = self.status().models.first().is_some_and(|m| m.rollout.is_some());
        under_way && self.rollback(MODEL).is_ok()
    }
}

fn start(folder: &Path, task: &str, aborts: bool) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture", "--test-threads=1"]).env(STORE, folder).env(TASK, task);
    if aborts {
        command.env("CUTOVER_ABORTS", "1");
    }
    command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

/// The lines said until the process ended, those of the test harness left out.
fn lines(child: &mut Child) -> Vec<String> {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    lines.filter(|l| l.starts_with("begin ") || l.starts_with("done ") || l == "open").collect()
}

/// splitmix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[test]
fn a_kill_at_any_moment_leaves_old_or_new() {
    let folder = tempfile::tempdir().unwrap();
    for version in versions() {
        version.package(folder.path());
    }
    let factor: u64 = std::env::var("CUTOVER_SOAK").ok().and_then(|v| v.parse().ok()).unwrap_or(1);
    let (mut seed, mut acknowledged, mut changes) = (11u64, None::<String>, 0);
    // What begins in one life may be resumed, and end, in the next.
    let mut in_flight = None::<String>;
    for cut in 0..12 * factor {
        let mut child = start(folder.path(), "swap", false);
        let pause = Duration::from_micros(20_000 + random(&mut seed) % 250_000);
        thread::sleep(pause);
        child.kill().unwrap();
        let said = lines(&mut child);
        child.wait().unwrap();
        let done = said.iter().filter_map(|l| l.strip_prefix("done ")).next_back().map(str::to_string);
        changes += said.iter().filter(|l| l.starts_with("done ")).count();
        acknowledged = done.or(acknowledged);
        if let Some(last) = said.iter().rfind(|l| *l != "open") {
            in_flight = last.strip_prefix("begin ").map(str::to_string);
        }

        let host = Host::open(folder.path().join("store"), hand_driven())
            .unwrap_or_else(|e| panic!("cut {cut} after {pause:?}: {e}"));
        let status = host.status();
        let Some(model) = status.models.first() else {
            assert_eq!(acknowledged, None, "cut {cut} after {pause:?}: what was acknowledged is gone");
            continue;
        };
        let active = Some(model.active.version.clone());
        assert!(
            active == acknowledged || active == in_flight,
            "cut {cut} after {pause:?}: {active:?} serves, {acknowledged:?} was acknowledged, {in_flight:?} under way"
        );
        // What serves is whole.
        let known = versions().into_iter().find(|v| Some(v.version) == active.as_deref()).unwrap();
        for (class, expected) in known.answers().iter().enumerate() {
            let request = Request { version: active.clone(), ..request("x", class) };
            assert_eq!(&probabilities(&host.infer(MODEL, request).unwrap()), expected);
        }
        // The last word of the history is what serves, and nothing was recorded twice in a row.
        let history = events(&host);
        assert!(history.windows(2).all(|pair| pair[0] != pair[1] || pair[0].starts_with("resumed")), "{history:?}");
        // Nothing is left of what was half-written.
        let objects = std::fs::read_dir(folder.path().join("store/objects")).unwrap();
        let names: Vec<String> = objects.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        assert!(names.len() <= 9 && names.iter().all(|n| !n.ends_with(".tmp")), "{names:?}");
        acknowledged = active;
    }
    println!("{} cuts, {changes} acknowledged changes", 12 * factor);
    assert!(changes > 0, "no change was ever finished: the pauses are too short for this machine");
}

#[test]
fn a_candidate_that_ends_the_process_is_reverted() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    let aborting = Recipe { behaviour: "abort", ..good("abort", 7.0) };
    {
        let host = Host::open(&store, hand_driven()).unwrap();
        host.deploy(MODEL, &good("a", 4.0).package(folder.path()), Strategy::canary()).unwrap();
        host.deploy(MODEL, &aborting.package(folder.path()), Strategy::canary()).unwrap();
    }
    // Loading the candidate ends the process: as many times as the options allow, and then not again.
    let starts: Vec<bool> = (0..4)
        .map(|_| {
            let mut child = start(folder.path(), "wait", true);
            let mut first = String::new();
            let mut out = BufReader::new(child.stdout.take().unwrap());
            while out.read_line(&mut first).unwrap() > 0 && !first.contains("open\n") {}
            child.kill().unwrap();
            child.wait().unwrap();
            first.contains("open\n")
        })
        .collect();
    assert_eq!(starts, [false, false, false, true]);
    let host = Host::open(&store, hand_driven()).unwrap();
    assert_eq!(events(&host).last().unwrap(), "rolled back abort");
    assert_eq!(host.status().models[0].active.version, "a");
}
