//! What else a host promises: strategies with real requests, streams, several models under one budget, swaps that do not fit, checklists, and
//! other processes that ask.

mod support;

use cutover_backend::Cancellation;
use cutover_monitor::Gates;
use cutover_runtime::{
    AbTest, BlueGreen, Call, Client, Host, HostError, HostOptions, InferError, Item, Label, Request, Shadow, Status,
    StoreError, Strategy, StreamStep, check_store, rollout::Canary,
};
use std::{
    collections::BTreeSet,
    fs,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use support::*;

fn gates() -> Gates {
    Gates {
        requests_min: 60,
        labels_min: 40,
        accuracy_drop_max: 0.05,
        labels_wait_s: 0.3,
        latency_slack_ms: 20.0,
        ..Gates::default()
    }
}

fn at_once() -> Strategy {
    Strategy::BlueGreen(BlueGreen { observe_s: 0.0, gates: gates() })
}

/// A host that serves `first`.
fn serving(folder: &tempfile::TempDir, first: &Recipe, options: HostOptions) -> Host {
    let host = Host::open(folder.path().join("store"), options).unwrap();
    host.deploy(MODEL, &first.package(folder.path()), at_once()).unwrap();
    host
}

fn active(host: &Host) -> String {
    host.status().models[0].active.version.clone()
}

fn under_way(host: &Host) -> bool {
    host.status().models[0].rollout.is_some()
}

/// Asks, and tells the truth, until the rollout ends; gives the versions that answered and the last word of the history.
fn ask_until_decided(host: &Host, labels: bool) -> (BTreeSet<String>, String) {
    let mut versions = BTreeSet::new();
    let end = Instant::now() + Duration::from_secs(60);
    for number in 0.. {
        if !under_way(host) {
            break;
        }
        assert!(Instant::now() < end, "undecided after a minute: {:#?}", host.status());
        let id = format!("r{number}");
        versions.insert(host.infer(MODEL, request(id, number % CLASSES)).unwrap().version);
        if labels {
            thread::sleep(Duration::from_millis(1));
            host.feedback(MODEL, &format!("r{number}"), &Label::class((number % CLASSES) as u32)).unwrap();
        }
    }
    let last = host.history(MODEL).unwrap().pop().unwrap();
    (versions, format!("{}: {}", last.event, last.reason))
}

#[test]
fn a_shadow_is_judged_and_never_seen() {
    let shadow = || Strategy::Shadow(Shadow { observe_s: 0.2, deadline_s: 50.0, then: None, gates: gates() });
    for (candidate, labels, expected) in [
        (good("v2", 6.0), false, "promoted: "),
        (good("v2", 6.0), true, "promoted: "),
        // Which of several signs is sure first depends on how fast the machine answers: any of those named, and no other.
        (bad("v3", 6.0), false, "rolled back: agreement|confidence|entropy|drift"),
        (bad("v3", 6.0), true, "rolled back: accuracy|agreement|confidence|entropy|drift"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let host = serving(&folder, &good("v1", 5.0), options());
        host.deploy(MODEL, &candidate.package(folder.path()), shadow()).unwrap();
        let (versions, last) = ask_until_decided(&host, labels);
        assert!(says(&last, expected), "{}, labels {labels}: {last}", candidate.version);
        // Only after its promotion may it have answered.
        assert!(versions.len() == 1 && versions.contains("v1"), "{versions:?}");
    }
}

#[test]
fn a_shadow_that_passes_goes_on_as_a_canary() {
    let folder = tempfile::tempdir().unwrap();
    let host = serving(&folder, &good("v1", 5.0), options());
    let step = cutover_runtime::rollout::Step { share: 0.5, dwell_s: 0.1 };
    let canary = Canary { steps: vec![step], deadline_s: 30.0, gates: gates() };
    let shadow = Shadow { observe_s: 0.1, deadline_s: 30.0, then: Some(canary), gates: gates() };
    host.deploy(MODEL, &good("v2", 6.0).package(folder.path()), Strategy::Shadow(shadow)).unwrap();
    let (versions, last) = ask_until_decided(&host, true);
    assert!(last.starts_with("promoted: all 1 steps passed") && versions.len() == 2, "{last}, {versions:?}");
    assert!(events(&host).contains(&"share v2".to_string()));
}

#[test]
fn an_ab_test_ends_by_its_metric() {
    let test = |deadline_s| {
        let gates = Gates { accuracy_drop_max: 0.5, ..gates() };
        Strategy::AbTest(AbTest { minimum_effect: 0.05, observations_min: 40, deadline_s, gates, ..AbTest::default() })
    };
    for (first, candidate, deadline_s, expected) in [
        (bad("v1", 5.0), good("v2", 6.0), 50.0, "promoted: it is better"),
        (good("v1", 5.0), bad("v3", 6.0), 50.0, "rolled back: it is no improvement"),
        (good("v1", 5.0), good("v2", 6.0), 0.05, "inconclusive: undecided"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let host = serving(&folder, &first, options());
        host.deploy(MODEL, &candidate.package(folder.path()), test(deadline_s)).unwrap();
        let (_, last) = ask_until_decided(&host, true);
        assert!(last.starts_with(expected), "{last}");
    }
}

fn step(id: &str, start: bool, end: bool) -> Request {
    Request { stream: Some(StreamStep { id: id.to_string(), start, end }), ..request(format!("{id}-x"), 1) }
}

#[test]
fn a_stream_stays_with_its_version_and_is_told_to_start_again() {
    let folder = tempfile::tempdir().unwrap();
    let options = HostOptions { stream_grace: Duration::from_millis(300), streams_max: 2, ..options() };
    let host = serving(&folder, &good("v1", 5.0), options);
    let restart = |error: InferError| assert!(matches!(error, InferError::StreamRestart { .. }), "{error}");
    restart(host.infer(MODEL, step("a", false, false)).unwrap_err());
    assert_eq!(host.infer(MODEL, step("a", true, false)).unwrap().version, "v1");
    host.infer(MODEL, step("b", true, false)).unwrap();
    assert!(matches!(host.infer(MODEL, step("c", true, false)), Err(InferError::TooManyStreams { open: 2 })));
    host.infer(MODEL, step("b", false, true)).unwrap();
    restart(host.infer(MODEL, step("b", false, false)).unwrap_err());

    host.deploy(MODEL, &good("v2", 6.0).package(folder.path()), at_once()).unwrap();
    assert_eq!(host.infer(MODEL, request("other", 1)).unwrap().version, "v2");
    assert_eq!(host.infer(MODEL, step("a", false, false)).unwrap().version, "v1", "its state is v1's");
    assert_eq!(host.status().models[0].streams, 1);
    wait(5, "the end of the grace", || host.status().models[0].streams == 0);
    restart(host.infer(MODEL, step("a", false, false)).unwrap_err());
    assert_eq!(host.infer(MODEL, step("a", true, false)).unwrap().version, "v2");
}

/// A candidate that fails within a stream must not hand its state to the incumbent.
#[test]
fn a_stream_of_a_failing_candidate_starts_again() {
    let folder = tempfile::tempdir().unwrap();
    let options = HostOptions { drive: false, instances: Some(1), ..options() };
    let host = serving(&folder, &good("v1", 5.0), options);
    let failing = Recipe { behaviour: "fail", ..good("fail", 6.0) };
    let observed = Strategy::BlueGreen(BlueGreen { observe_s: 60.0, gates: gates() });
    host.deploy(MODEL, &failing.package(folder.path()), observed).unwrap();
    assert_eq!(host.infer(MODEL, step("a", true, false)).unwrap().version, "fail");
    let (mut restarted, mut by_others) = (false, 0);
    for _ in 0..8 {
        match host.infer(MODEL, step("a", false, false)) {
            Ok(answer) => by_others += u32::from(answer.version != "fail"),
            Err(InferError::StreamRestart { .. }) => restarted = true,
            Err(error) => panic!("{error}"),
        }
        if restarted {
            break;
        }
    }
    assert!(restarted && by_others == 0, "restarted: {restarted}, {by_others} answers of another version");
}

#[test]
fn models_share_one_budget_and_no_queue() {
    let folder = tempfile::tempdir().unwrap();
    let slow = Recipe { behaviour: "slow", ..good("v1", 5.0) };
    let host = Host::open(
        folder.path().join("store"),
        HostOptions { workers: 2, instances: Some(1), waiting_max: 8, ..options() },
    )
    .unwrap();
    host.deploy(MODEL, &slow.package(folder.path()), at_once()).unwrap();
    let quick = good("q1", 4.0).package_as("quick", folder.path());
    host.deploy("quick", &quick, at_once()).unwrap();
    let one = host.status().memory_bytes;
    // The slow model's lane is full, and the other's answers come all the same.
    let (sender, receiver) = std::sync::mpsc::channel();
    for number in 0..30 {
        let sender = sender.clone();
        host.submit(MODEL, request(format!("s{number}"), 1), move |answer| {
            let refused = matches!(answer, Err(InferError::Overloaded { .. }));
            sender.send((false, refused)).unwrap();
        });
    }
    let sender2 = sender.clone();
    host.submit("quick", request("q", 2), move |answer| sender2.send((true, answer.is_err())).unwrap());
    drop(sender);
    let answers: Vec<(bool, bool)> = receiver.iter().collect();
    assert_eq!(answers.len(), 31);
    let refused = answers.iter().filter(|(_, refused)| *refused).count();
    assert!((20..=22).contains(&refused), "{refused} refused");
    let answered_before = answers.iter().filter(|(_, refused)| !refused).position(|(quick, _)| *quick).unwrap();
    assert!(answered_before <= 2, "{answered_before} slow requests were answered first");
    drop(host);

    // A third model does not fit into what two take.
    let budget = HostOptions { memory_bytes: Some(one + one / 4), instances: Some(1), ..options() };
    let host = Host::open(folder.path().join("store"), budget).unwrap();
    let third = good("t1", 3.0).package_as("third", folder.path());
    let error = host.deploy("third", &third, at_once()).unwrap_err();
    assert!(matches!(error, HostError::Admission { .. }) && error.to_string().contains("budget"), "{error}");
    host.infer("quick", request("q", 2)).unwrap();
}

#[test]
fn requests_are_cancelled_and_have_deadlines_while_they_wait() {
    let folder = tempfile::tempdir().unwrap();
    let slow = Recipe { behaviour: "slow", ..good("v1", 5.0) };
    let host = serving(&folder, &slow, HostOptions { instances: Some(1), ..options() });
    let cancelled = Arc::new(Cancellation::default());
    let busy = |host: Host| thread::spawn(move || (0..20).for_each(|_| drop(host.infer(MODEL, request("b", 1)))));
    let others: Vec<_> = (0..3).map(|_| busy(host.clone())).collect();
    thread::sleep(Duration::from_millis(20));
    let deadline = Request { deadline: Some(Instant::now() + Duration::from_millis(1)), ..request("d", 1) };
    assert!(matches!(host.infer(MODEL, deadline), Err(InferError::Deadline)));
    cancelled.cancel();
    let cancel = Request { cancellation: Some(cancelled), ..request("c", 1) };
    assert!(matches!(host.infer(MODEL, cancel), Err(InferError::Cancelled)));
    others.into_iter().for_each(|other| other.join().unwrap());
}

#[test]
fn what_does_not_fit_is_swapped_with_an_outage_that_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let host = serving(&folder, &good("v1", 5.0), HostOptions { instances: Some(1), ..options() });
    let one = host.status().memory_bytes;
    drop(host);
    let budget = HostOptions { memory_bytes: Some(one + one / 4), instances: Some(1), ..options() };
    let host = Host::open(folder.path().join("store"), budget).unwrap();
    let v2 = good("v2", 6.0).package(folder.path());
    let error = host.deploy(MODEL, &v2, at_once()).unwrap_err();
    assert!(matches!(error, HostError::OnlySequential { .. }) && error.to_string().contains("sequential"), "{error}");
    assert_eq!(active(&host), "v1");

    let load = {
        let host = host.clone();
        thread::spawn(move || {
            let (mut outages, mut others, mut versions) = (0, Vec::new(), BTreeSet::new());
            let end = Instant::now() + Duration::from_secs(30);
            while !versions.contains("v2") && Instant::now() < end {
                match host.infer(MODEL, request("x", 1)) {
                    Ok(answer) => drop(versions.insert(answer.version)),
                    Err(InferError::Outage { version, .. }) => {
                        assert_eq!(version, "v2");
                        outages += 1;
                    }
                    Err(error) => others.push(error.to_string()),
                }
            }
            (outages, others, versions)
        })
    };
    thread::sleep(Duration::from_millis(20));
    host.deploy(MODEL, &v2, Strategy::sequential()).unwrap();
    let (_, others, versions) = load.join().unwrap();
    assert!(versions.contains("v2"), "{versions:?}");
    // A request that had chosen its version a moment before finds it gone.
    assert!(others.len() <= 2, "{others:?}");
    assert!(host.status().memory_bytes <= one + one / 4);
    let history = host.history(MODEL).unwrap();
    let outage = history.iter().find(|e| e.event == "outage").unwrap();
    assert!(outage.reason.contains("without answers"), "{outage:?}");
    assert!(history.last().unwrap().reason.contains("without answers"), "{history:?}");

    // One that is not admitted leaves the old one serving.
    let wrong = Recipe { golden_error: 0.01, ..good("v3", 7.0) };
    let error = host.deploy(MODEL, &wrong.package(folder.path()), Strategy::sequential()).unwrap_err();
    assert!(matches!(error, HostError::Admission { .. }), "{error}");
    assert_eq!(host.infer(MODEL, request("x", 1)).unwrap().version, "v2");
    assert!(host.status().models[0].outage.is_none());
    // Where both fit there is no outage.
    drop(host);
    let host = Host::open(folder.path().join("store"), options()).unwrap();
    host.deploy(MODEL, &good("v4", 8.0).package(folder.path()), Strategy::sequential()).unwrap();
    assert!(host.history(MODEL).unwrap().last().unwrap().reason.contains("both fit"));
}

#[test]
fn labels_come_days_late() {
    let folder = tempfile::tempdir().unwrap();
    let options = || HostOptions { drive: false, ..options() };
    let host = serving(&folder, &good("v1", 5.0), options());
    let half = cutover_runtime::rollout::Step { share: 0.5, dwell_s: 0.0 };
    let canary = Canary { steps: vec![half, half], deadline_s: 1e6, gates: gates() };
    host.deploy(MODEL, &good("v2", 6.0).package(folder.path()), Strategy::Canary(canary)).unwrap();
    (0..40).for_each(|n| drop(host.infer(MODEL, request(format!("{n}"), n % CLASSES)).unwrap()));
    drop(host);
    // The device was off since.
    let host = Host::open(folder.path().join("store"), options()).unwrap();
    for n in 0..40 {
        host.feedback(MODEL, &format!("{n}"), &Label::class((n % CLASSES) as u32)).unwrap();
    }
    assert!(host.feedback(MODEL, "0", &Label::class(0)).is_err(), "a label counts once");
    let status = host.status();
    let model = &status.models[0];
    let candidate = &model.rollout.as_ref().unwrap().candidate;
    assert_eq!(model.active.labels + candidate.labels, 40);
    assert!(candidate.labels > 5 && candidate.accuracy == Some(1.0), "{candidate:?}");
    // They count for the rollout too, in which the answers were given before.
    host.poll(Instant::now());
    host.poll(Instant::now() + Duration::from_millis(20));
    let evidence = host.status().models[0].rollout.clone().unwrap().evidence;
    let accuracy = evidence.iter().find(|e| e.gate == cutover_monitor::Gate::Accuracy).unwrap();
    assert_eq!(accuracy.observations, candidate.labels, "{evidence:?}");
}

#[test]
fn a_strategy_does_not_start_without_what_policy_requires() {
    let folder = tempfile::tempdir().unwrap();
    let host = serving(&folder, &good("v1", 5.0), options());
    let list = host.checklist(MODEL).unwrap();
    assert!(list.complete, "{list:#?}");
    let line = |item| list.lines.iter().find(|line| line.item == item).unwrap();
    for item in [Item::Validation, Item::Benchmarks, Item::Security] {
        assert!(line(item).ticked && line(item).required && !line(item).evidence.is_empty(), "{item}");
    }
    assert!(line(Item::Validation).evidence.iter().any(|e| e.starts_with("golden: 1 outputs within")));
    assert!(!line(Item::SignOff).ticked && !line(Item::RollbackPlan).ticked);

    host.require(MODEL, Some([Item::SignOff, Item::RollbackPlan].into())).unwrap();
    let v2 = good("v2", 6.0).package(folder.path());
    let error = host.deploy(MODEL, &v2, at_once()).unwrap_err();
    assert!(matches!(&error, HostError::Checklist { missing, .. } if missing.contains("sign-off")), "{error}");
    assert_eq!(active(&host), "v1");
    host.sign_off(MODEL, "v2", "Ada").unwrap();
    drop(host);
    let host = Host::open(folder.path().join("store"), options()).unwrap();
    host.deploy(MODEL, &v2, at_once()).unwrap();
    let list = host.checklist(MODEL).unwrap();
    assert!(list.complete && list.version == "v2", "{list:#?}");
    assert!(events(&host).contains(&"refused v2".to_string()) && events(&host).contains(&"signed off v2".to_string()));
    // For a model that is not here yet.
    host.require("later", Some([Item::Documentation].into())).unwrap();
    let error = host.deploy("later", &good("1", 3.0).package_as("later", folder.path()), at_once()).unwrap_err();
    assert!(error.to_string().contains("documentation"), "{error}");
}

#[test]
fn other_processes_ask_the_holder() {
    let folder = tempfile::tempdir().unwrap();
    // Longer than a socket's address may be.
    let store = folder.path().join("x".repeat(90)).join("store");
    let host = Host::open(&store, options()).unwrap();
    let v1 = good("v1", 5.0).package(folder.path());
    let mut client = Client::connect(&store).expect("somebody listens");
    let deploy = |package: &std::path::Path| Call::Deploy {
        model: MODEL.to_string(),
        package: package.to_path_buf(),
        strategy: Box::new(at_once()),
    };
    let started: serde_json::Value = client.call(&deploy(&v1)).unwrap();
    assert_eq!(started["rollout"], "classifier#1");
    let error = client.call::<serde_json::Value>(&deploy(&v1)).unwrap_err();
    assert!(error.to_string().contains("in service already"), "{error}");
    let status: Status = client.call(&Call::Status).unwrap();
    assert_eq!(status.models[0].active.version, "v1");
    let check: cutover_runtime::StoreCheck = client.call(&Call::CheckStore).unwrap();
    assert_eq!((check.models, check.lost.len()), (1, 0));
    host.infer(MODEL, request("id", 3)).unwrap();
    let labels = vec![("id".to_string(), vec![3]), ("nobody".to_string(), vec![3])];
    let feedback: serde_json::Value = client.call(&Call::Feedback { model: MODEL.to_string(), labels }).unwrap();
    assert_eq!((&feedback["counted"], feedback["refused"].as_array().unwrap().len()), (&serde_json::json!(1), 1));
    #[cfg(unix)]
    {
        use std::os::unix::fs::{FileTypeExt, PermissionsExt};
        let metadata = fs::symlink_metadata(store.join("socket")).unwrap();
        assert!(metadata.file_type().is_socket() && metadata.permissions().mode() & 0o777 == 0o600);
    }
    let held = check_store(&store).unwrap_err();
    assert!(matches!(&held, StoreError::Held { holder, .. } if holder.contains(&std::process::id().to_string())));
    drop(host);
    assert!(Client::connect(&store).is_none() && !store.join("socket").exists());
    assert!(client.call::<Status>(&Call::Status).is_err(), "nobody is there any more");
    assert_eq!(check_store(&store).unwrap().versions, 1);
}

#[test]
fn a_quota_and_damage_are_told_by_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let host = serving(&folder, &good("v1", 5.0), options());
    let bytes = host.check_store().unwrap().bytes;
    drop(host);
    let host =
        Host::open(folder.path().join("store"), HostOptions { store_bytes: Some(bytes + bytes / 2), ..options() })
            .unwrap();
    let error = host.deploy(MODEL, &good("v2", 6.0).package(folder.path()), at_once()).unwrap_err();
    assert!(matches!(error, HostError::Store(StoreError::Quota { .. })), "{error}");
    assert_eq!(host.check_store().unwrap().bytes, bytes);
    // An object that is damaged while its version serves: it serves on, and that is said.
    let object = fs::read_dir(folder.path().join("store/objects")).unwrap().next().unwrap().unwrap().path();
    let bytes = fs::read(&object).unwrap();
    fs::remove_file(&object).unwrap();
    fs::write(&object, &bytes[1..]).unwrap();
    let repair = host.repair_store().unwrap();
    assert!(repair.lost.len() == 1 && repair.changes[0].contains("serves from memory"), "{repair:?}");
    host.infer(MODEL, request("x", 1)).unwrap();
}

/// Two versions that agree in most of their bytes take little more than one: mapped and counted once.
#[test]
fn what_versions_share_is_in_memory_once() {
    let folder = tempfile::tempdir().unwrap();
    let host = serving(&folder, &good("v1", 5.0), HostOptions { instances: Some(1), ..options() });
    let one = host.status().memory_bytes;
    let (stored, mapped) = (host.check_store().unwrap().bytes, mapped_objects(&folder));
    // The same first weights, others after: half is shared.
    let other = Recipe { wrong_from: 9, ..good("v2", 5.0) };
    host.deploy(MODEL, &other.package(folder.path()), at_once()).unwrap();
    let check = host.check_store().unwrap();
    assert!(check.bytes < stored * 8 / 5 && check.bytes_unshared > stored * 19 / 10, "{check:?}, {stored} before");
    let two = host.status().memory_bytes;
    assert!(two < one * 8 / 5, "{two} bytes for two, {one} for one");
    // Every object in memory is mapped once, however many versions use it.
    let now = mapped_objects(&folder);
    assert!(now.iter().collect::<BTreeSet<_>>().len() == now.len() && now.len() > mapped.len(), "{now:?}");
}

fn mapped_objects(folder: &tempfile::TempDir) -> Vec<String> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let prefix = folder.path().join("store/objects").display().to_string();
    maps.lines().filter_map(|line| line.split_once(&prefix).map(|(_, name)| name.to_string())).collect()
}
