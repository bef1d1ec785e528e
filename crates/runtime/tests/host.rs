//! What a host promises, through its public interface: versions under load, gates, admission, restarts.

mod support;

use cutover_monitor::Gates;
use cutover_runtime::{
    AdmissionError, BlueGreen, Canary, Host, HostError, HostOptions, InferError, Label, Request, Strategy,
    rollout::Step,
};
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use support::*;

/// Steps short enough for tests.
fn canary() -> Strategy {
    let step = |share, dwell_s| Step { share, dwell_s };
    Strategy::Canary(Canary {
        steps: vec![step(0.2, 0.05), step(0.5, 0.05)],
        deadline_s: 20.0,
        gates: Gates {
            requests_min: 100,
            labels_min: 50,
            accuracy_drop_max: 0.05,
            labels_wait_s: 1.0,
            latency_slack_ms: 4.0,
            ..Gates::default()
        },
    })
}

/// Clients that ask without pause, know what every version answers, and may tell the truth a little late.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: Vec<thread::JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(host: &Host, versions: &[Recipe], clients: usize, labels: bool) -> Load {
        let known: Arc<BTreeMap<&str, Vec<Vec<f32>>>> =
            Arc::new(versions.iter().map(|v| (v.version, v.answers())).collect());
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let client = |client: usize| {
            let (host, known, stop, answered) = (host.clone(), known.clone(), stop.clone(), answered.clone());
            thread::spawn(move || {
                let mut wrong = Vec::new();
                let mut late: std::collections::VecDeque<(String, usize)> = Default::default();
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let class = (number * 7 + client) % CLASSES;
                    let id = format!("{client}-{number}");
                    match host.infer(MODEL, request(id.clone(), class)) {
                        Ok(answer) if probabilities(&answer) == known[answer.version.as_str()][class] => {}
                        Ok(answer) => wrong.push(format!("{id}: not what {} answers: {answer:?}", answer.version)),
                        Err(error) => wrong.push(format!("{id}: {error}")),
                    }
                    answered.fetch_add(1, Ordering::Relaxed);
                    late.push_back((id, class));
                    if labels && late.len() > 50 {
                        let (id, class) = late.pop_front().unwrap();
                        host.feedback(MODEL, &id, &Label::class(class as u32)).unwrap();
                    }
                    // Leaves the other threads of a small machine their turn.
                    thread::sleep(Duration::from_micros(200));
                }
                wrong
            })
        };
        let clients = (0..clients).map(client).collect();
        Load { stop, answered, clients }
    }

    /// Ends, with not one failed or torn answer.
    fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            let wrong = client.join().unwrap();
            assert!(wrong.is_empty(), "{} wrong answers, the first: {}", wrong.len(), wrong[0]);
        }
        self.answered.load(Ordering::Relaxed)
    }
}

fn rolled_out(host: &Host) -> bool {
    host.status().models[0].rollout.is_none()
}

fn active(host: &Host) -> String {
    host.status().models[0].active.version.clone()
}

/// Serves `first`, rolls `candidate` out under load, and gives who serves then and why.
fn roll_out(first: &Recipe, candidate: &Recipe, strategy: Strategy, labels: bool) -> (String, String) {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::open(folder.path().join("store"), options()).unwrap();
    host.deploy(MODEL, &first.package(folder.path()), Strategy::canary()).unwrap();
    let load = Load::start(&host, &[first.clone(), candidate.clone()], 3, labels);
    thread::sleep(Duration::from_millis(200));
    host.deploy(MODEL, &candidate.package(folder.path()), strategy).unwrap();
    wait(60, "the end of the rollout", || rolled_out(&host));
    thread::sleep(Duration::from_millis(50));
    load.finish();
    let last = host.history(MODEL).unwrap().pop().unwrap();
    assert_eq!(last.version, candidate.version);
    (active(&host), format!("{}: {}", last.event, last.reason))
}

#[test]
fn gates_decide_by_what_they_see() {
    let (v1, v3) = (good("v1", 5.0), bad("v3", 6.0));
    let fail = Recipe { behaviour: "fail", ..good("fail", 6.0) };
    let panic = Recipe { behaviour: "panic", ..good("panic", 6.0) };
    let slow = Recipe { behaviour: "slow", ..good("slow", 6.0) };
    let unsure = Recipe { wrong_from: 8, ..good("unsure", 2.5) };
    // Which of several signs is sure first depends on how fast the machine answers: any of those named, and no other.
    let cases = [
        ("as good", &v1, good("v2", 6.0), true, "v2", "promoted"),
        ("worse by labels", &v1, v3.clone(), true, "v1", "rolled back: accuracy"),
        ("better than a bad incumbent", &v3, v1.clone(), true, "v1", "promoted"),
        ("failing", &v1, fail, true, "v1", "rolled back: errors"),
        ("panicking", &v1, panic, false, "v1", "rolled back: the candidate crashed: panicked"),
        ("slow", &v1, slow, true, "v1", "rolled back: latency"),
        ("as good, no labels", &v1, good("v2", 6.0), false, "v2", "promoted"),
        ("disagreeing, no labels", &v1, unsure, false, "v1", "rolled back: agreement|confidence|entropy|drift"),
    ];
    for (name, first, candidate, labels, serving, reason) in cases {
        let (active, why) = roll_out(first, &candidate, canary(), labels);
        assert!(active == serving && says(&why, reason), "{name}: {active} serves, {why}");
    }
}

#[test]
fn blue_green_switches_and_switches_back() {
    let strategy = |observe_s| {
        let gates = Gates { requests_min: 100, labels_min: 50, ..Gates::default() };
        Strategy::BlueGreen(BlueGreen { observe_s, gates })
    };
    let (v1, v2) = (good("v1", 5.0), good("v2", 6.0));
    assert_eq!(roll_out(&v1, &v2, strategy(0.5), true).0, "v2");
    let (active, why) = roll_out(&v1, &bad("v3", 6.0), strategy(30.0), true);
    assert!(active == "v1" && why.starts_with("rolled back: accuracy"), "{active}: {why}");
}

#[test]
fn swaps_under_load_tear_nothing_and_leak_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    let host = Host::open(&store, options()).unwrap();
    let versions = [good("a", 4.0), good("b", 5.0), good("c", 6.0)];
    let packages = versions.clone().map(|v| v.package(folder.path()));
    host.deploy(MODEL, &packages[0], Strategy::canary()).unwrap();
    let load = Load::start(&host, &versions, 4, false);
    let at_once = || Strategy::BlueGreen(BlueGreen { observe_s: 0.0, gates: Gates::default() });
    // Mapped objects of the store and open descriptors, once the reaper is done.
    let held = || {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let object = |line: &str| line.split("/objects/").nth(1).map(str::to_string);
        let mapped: std::collections::BTreeSet<String> =
            maps.lines().filter(|l| l.contains(&*store.to_string_lossy())).filter_map(object).collect();
        (mapped, fs::read_dir("/proc/self/fd").unwrap().count())
    };
    let on_disk =
        || fs::read_dir(store.join("objects")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut descriptors = 0;
    let factor: usize = std::env::var("CUTOVER_SOAK").ok().and_then(|v| v.parse().ok()).unwrap_or(1);
    for swap in 1..=50 * factor {
        host.deploy(MODEL, &packages[swap % 3], at_once()).unwrap();
        assert_eq!(active(&host), versions[swap % 3].version);
        if swap == 5 {
            descriptors = held().1;
        }
    }
    let answered = load.finish();
    wait(10, "giving back what was replaced", || held().0.is_subset(&on_disk().collect()));
    let descriptors_now = held().1;
    // Other tests of this process hold some too, at times.
    assert!(descriptors_now <= descriptors + 8, "{descriptors_now} descriptors, {descriptors} after swap 5");
    assert_eq!(on_disk().count(), 6, "three objects each of the version in service and of the one before");
    println!("{} swaps, {answered} answers", 50 * factor);
    host.rollback(MODEL).unwrap();
    assert_eq!(active(&host), versions[(50 * factor - 1) % 3].version);
}

#[test]
fn what_is_not_admitted_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let v1 = Recipe { security_epoch: 2, ..good("v1", 5.0) };
    let package = v1.package(folder.path());
    let weights = fs::metadata(&package).unwrap().len();
    let host =
        Host::open(folder.path().join("store"), HostOptions { memory_bytes: Some(weights * 5 / 2), ..options() })
            .unwrap();
    assert!(matches!(host.infer(MODEL, request("0", 0)), Err(InferError::UnknownModel(_))));
    assert!(matches!(host.deploy("other", &package, Strategy::canary()), Err(HostError::WrongModel { .. })));
    host.deploy(MODEL, &package, Strategy::canary()).unwrap();
    let recipe = |version, scale| Recipe { security_epoch: 2, ..good(version, scale) };
    let next = |recipe: Recipe| host.deploy(MODEL, &recipe.package(folder.path()), canary());
    let refused = |result: Result<_, HostError>, expected: fn(&HostError) -> bool| {
        let error = result.map(|_: cutover_runtime::RolloutId| ()).unwrap_err();
        assert!(expected(&error), "{error:?}");
        assert!(rolled_out(&host) && active(&host) == "v1");
        host.infer(MODEL, request("x", 1)).unwrap();
    };
    refused(next(v1.clone()), |e| matches!(e, HostError::AlreadyServing { .. }));
    refused(
        next(Recipe { golden_error: 0.01, ..recipe("v2", 6.0) }),
        |e| matches!(e, HostError::Admission { source: AdmissionError::Golden(m), .. } if m.contains("probabilities")),
    );
    refused(next(good("v2", 6.5)), |e| matches!(e, HostError::SecurityEpoch { package: 0, device: 2, .. }));
    // A version that was refused has not taken its name.
    next(recipe("v2", 7.0)).unwrap();
    let second = host.deploy(MODEL, &recipe("v3", 8.0).package(folder.path()), canary());
    assert!(matches!(second, Err(HostError::Busy { candidate, .. }) if candidate == "v2"));
    host.promote(MODEL).unwrap();
    let taken = host.deploy(MODEL, &recipe("v1", 9.0).package(folder.path()), canary());
    assert!(matches!(taken, Err(HostError::VersionTaken { .. })));
    // The version before gives way where there is no room for three.
    next(recipe("v3", 8.0)).unwrap();
    host.rollback(MODEL).unwrap();
    host.rollback(MODEL).unwrap();
    assert_eq!(active(&host), "v1");
    assert!(events(&host).contains(&"refused v2".to_string()));
}

#[test]
fn memory_that_is_not_there_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::open(folder.path().join("store"), HostOptions { memory_bytes: Some(1000), ..options() }).unwrap();
    let error = host.deploy(MODEL, &good("v1", 5.0).package(folder.path()), Strategy::canary()).unwrap_err();
    assert!(
        matches!(error, HostError::Admission { source: AdmissionError::Memory { budget: 1000, .. }, .. }),
        "{error}"
    );
    assert_eq!(fs::read_dir(folder.path().join("store/objects")).unwrap().count(), 0);
}

#[test]
fn a_damaged_package_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = good("v1", 5.0).package(folder.path());
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let host = Host::open(folder.path().join("store"), options()).unwrap();
    let error = host.deploy(MODEL, &path, Strategy::canary()).unwrap_err();
    assert!(matches!(error, HostError::Package(_)), "{error:?}");
}

#[test]
fn requests_that_do_not_fit_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::open(folder.path().join("store"), options()).unwrap();
    host.deploy(MODEL, &good("v1", 5.0).package(folder.path()), Strategy::canary()).unwrap();
    let with = |change: fn(&mut Request)| {
        let mut request = request("a", 1);
        change(&mut request);
        host.infer(MODEL, request).unwrap_err()
    };
    let cases: [(InferError, &str); 6] = [
        (with(|r| r.inputs.clear()), "input 'image'"),
        (with(|r| r.inputs[0].0 = "picture".to_string()), "input 'picture' is not one of the model's: image"),
        (with(|r| r.inputs.push(r.inputs[0].clone())), "twice"),
        (with(|r| r.inputs[0].1 = cutover_tensor::Tensor::from_vec([2], vec![1i64, 2]).unwrap().into()), "image"),
        (with(|r| r.outputs = Some(vec!["logits".to_string()])), "output 'logits' is not one of the model's"),
        (with(|r| r.version = Some("v9".to_string())), "no version 'v9'"),
    ];
    for (error, expected) in cases {
        assert!(error.is_callers() && error.to_string().contains(expected), "{error}, expected {expected}");
    }
    let late = Request { deadline: Some(Instant::now()), ..request("late", 1) };
    assert!(matches!(host.infer(MODEL, late), Err(InferError::Deadline)));
    assert!(host.feedback(MODEL, "nobody", &Label::class(1)).is_err());
    assert_eq!(host.status().models[0].active.errors, 0);
}

#[test]
fn submitted_requests_are_bounded_and_all_complete() {
    let folder = tempfile::tempdir().unwrap();
    let slow = Recipe { behaviour: "slow", ..good("v1", 5.0) };
    let host = Host::open(folder.path().join("store"), HostOptions { waiting_max: 4, ..options() }).unwrap();
    host.deploy(MODEL, &slow.package(folder.path()), Strategy::canary()).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    for number in 0..40 {
        let sender = sender.clone();
        host.submit(MODEL, request(number.to_string(), 1), move |answer| sender.send(answer).unwrap());
    }
    let answers: Vec<_> = (0..40).map(|_| receiver.recv_timeout(Duration::from_secs(10)).unwrap()).collect();
    let refused = answers.iter().filter(|a| matches!(a, Err(InferError::Overloaded { .. }))).count();
    let answered = answers.iter().filter(|a| a.is_ok()).count();
    assert!(answered >= 4 && refused >= 20 && answered + refused == 40, "{answered} answered, {refused} refused");
}

#[test]
fn a_rollout_goes_on_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    let (v1, v2) = (good("v1", 5.0), good("v2", 6.0));
    let open = || Host::open(&store, options()).unwrap();
    let host = open();
    host.deploy(MODEL, &v1.package(folder.path()), Strategy::canary()).unwrap();
    host.deploy(MODEL, &v2.package(folder.path()), canary()).unwrap();
    let held = Host::open(&store, options()).unwrap_err();
    assert!(held.to_string().contains(&std::process::id().to_string()), "{held}");
    // Closed as it should be, any number of times: that says nothing against the candidate.
    drop(host);
    for _ in 0..5 {
        let host = open();
        assert_eq!(host.status().models[0].rollout.as_ref().unwrap().candidate.version, "v2");
    }
    let host = open();
    let load = Load::start(&host, &[v1, v2], 3, true);
    wait(60, "the end of the rollout", || rolled_out(&host));
    load.finish();
    assert_eq!(active(&host), "v2");
    drop(host);
    assert_eq!(active(&open()), "v2");
}

#[test]
fn a_damaged_version_in_service_gives_way_to_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    let host = Host::open(&store, options()).unwrap();
    let objects = || -> std::collections::BTreeSet<_> {
        fs::read_dir(store.join("objects")).unwrap().map(|e| e.unwrap().path()).collect()
    };
    host.deploy(MODEL, &good("v1", 5.0).package(folder.path()), Strategy::canary()).unwrap();
    let before = objects();
    host.deploy(MODEL, &good("v2", 6.0).package(folder.path()), canary()).unwrap();
    host.promote(MODEL).unwrap();
    drop(host);
    damage(objects().difference(&before).next().unwrap());
    let host = Host::open(&store, options()).unwrap();
    assert_eq!(active(&host), "v1");
    assert!(host.history(MODEL).unwrap().pop().unwrap().reason.contains("no longer loads"));
    host.infer(MODEL, request("a", 1)).unwrap();
    // What is damaged can be deployed again.
    host.deploy(MODEL, &good("v2", 6.0).package(folder.path()), canary()).unwrap();
}

fn damage(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    bytes[0] ^= 1;
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}
