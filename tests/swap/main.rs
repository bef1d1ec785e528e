//! Versions replaced under load, again and again.

use cutover::{HostOptions, Request, Strategy, Tensor, Value, runtime::BlueGreen};
use cutover_tests::{CLASSES, FEATURES, Random, classifier, deep, host, package, reference, soak_factor};
use std::{
    fs,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

const VERSIONS: usize = 6;
const IMAGES: usize = 32;
const CLIENTS: usize = 4;

/// Both tests measure the memory of their process: one runs at a time.
static MEMORY: Mutex<()> = Mutex::new(());

/// One version's name and what it must answer to every input.
struct Expected {
    version: String,
    answers: Vec<Vec<f32>>,
}

#[test]
fn fifty_swaps_under_load_fail_no_request_mix_no_answer_and_leak_nothing() {
    let _alone = MEMORY.lock();
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random::new(1);
    let inputs: Vec<Tensor> = (0..IMAGES)
        .map(|_| Tensor::from_vec([1, FEATURES], (0..FEATURES).map(|_| random.unit()).collect::<Vec<f32>>()).unwrap())
        .collect();
    let mut packages = Vec::new();
    let mut expected = Vec::new();
    for seed in 0..VERSIONS as u64 {
        let graph = classifier(seed + 1);
        let version = format!("v{seed}");
        packages.push(package(&graph, "m", &version, ("features", &inputs[0]), "probabilities", folder.path()));
        let answers = inputs.iter().map(|x| reference(&graph, "features", x, "probabilities")).collect();
        expected.push(Expected { version, answers });
    }
    let store = folder.path().join("store");
    let host = host(&store, HostOptions::default());
    let strategy = || Strategy::BlueGreen(BlueGreen { observe_s: 0.0, ..BlueGreen::default() });
    host.deploy("m", &packages[0], strategy()).unwrap();
    let swaps = 50 * soak_factor();
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (mut early, mut late) = (None, None);
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (host, inputs, expected, stop, answered) = (&host, &inputs, &expected, &stop, &answered);
            scope.spawn(move || {
                let mut at = client;
                while !stop.load(Ordering::Relaxed) {
                    at = (at + 1) % IMAGES;
                    let inputs = vec![("features".to_string(), Value::Tensor(inputs[at].clone()))];
                    let answer = host.infer("m", Request { inputs, ..Request::default() }).expect("no request fails");
                    let said = answer.outputs[0].1.as_tensor().unwrap().to_vec::<f32>().unwrap();
                    let by =
                        expected.iter().find(|e| e.version == answer.version).expect("a version that was deployed");
                    assert_eq!(said.len(), CLASSES);
                    let near = said.iter().zip(&by.answers[at]).all(|(a, b)| (a - b).abs() < 1e-4);
                    assert!(near, "version {} must say {:?}, said {said:?}", answer.version, by.answers[at]);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // A failed client must not leave the others running for ever.
        let swap = || -> Result<(), String> {
            for number in 1..=swaps {
                let before = answered.load(Ordering::Relaxed);
                host.deploy("m", &packages[number % VERSIONS], strategy())
                    .map_err(|e| format!("swap {number}: {e}"))?;
                let resident = [number % VERSIONS, (number - 1) % VERSIONS];
                wait_for(&format!("swap {number} to drain"), || {
                    mapped_objects(&store) <= objects_of(&host, &resident)
                })?;
                wait_for("requests between swaps", || answered.load(Ordering::Relaxed) > before + 20)?;
                match number {
                    5 => early = Some(Resources::now()),
                    n if n == swaps => late = Some(Resources::now()),
                    _ => {}
                }
            }
            Ok(())
        };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(swap));
        stop.store(true, Ordering::Relaxed);
        result.unwrap().unwrap();
    });
    let (early, late) = (early.unwrap(), late.unwrap());
    println!("{} requests over {swaps} swaps; after swap 5 {early:?}, after the last {late:?}", answered.into_inner());
    let allowed = early.resident_bytes + early.resident_bytes / 50 + (2 << 20);
    assert!(late.resident_bytes <= allowed, "{late:?}, after swap 5 {early:?}");
    assert_eq!(late.descriptors, early.descriptors);
    let history = host.history("m").unwrap();
    assert_eq!(history.iter().filter(|e| e.event == "promoted").count(), swaps);
}

/// Large tensors of the resident versions: three each (two of weights, and the model file).
fn objects_of(_: &cutover::Host, resident: &[usize]) -> usize {
    resident.len() * 3
}

/// Both versions are in memory while one is on trial: nine tenths of their weights are the same, packed and mapped once.
#[test]
fn versions_that_agree_in_nine_tenths_take_an_arena_and_a_tenth_more_than_one() {
    let _alone = MEMORY.lock();
    let folder = tempfile::tempdir().unwrap();
    let input = Tensor::from_vec([1, FEATURES], vec![0.25f32; FEATURES]).unwrap();
    let packages = [1, 2].map(|seed| {
        package(&deep(seed), "m", &format!("v{seed}"), ("features", &input), "probabilities", folder.path())
    });
    let host =
        host(&folder.path().join("store"), HostOptions { instances: Some(1), workers: 1, ..HostOptions::default() });
    let ask = |version: Option<&str>| {
        let inputs = vec![("features".to_string(), Value::Tensor(input.clone()))];
        host.infer("m", Request { inputs, version: version.map(str::to_string), ..Request::default() }).unwrap()
    };
    host.deploy("m", &packages[0], Strategy::canary()).unwrap();
    ask(None);
    let (one, private) = (host.status().memory_bytes, private_bytes());
    let arena = one - host.status().models[0].active.weight_bytes;
    let stored = host.check_store().unwrap().bytes;
    host.deploy("m", &packages[1], Strategy::canary()).unwrap();
    ask(Some("v1"));
    ask(Some("v2"));
    let (two, private_of_two) = (host.status().memory_bytes, private_bytes());
    println!("counted {one} and {two} bytes, private {private} and {private_of_two}, arena {arena}");
    assert!(two - one <= arena + one / 10, "{two} bytes for two, {one} for one, of which the arena takes {arena}");
    // What the system says, with a megabyte for what allocators keep.
    assert!(
        private_of_two <= private + arena + one / 10 + (1 << 20),
        "{private_of_two} private bytes, {private} before"
    );
    let written = host.check_store().unwrap().bytes - stored;
    assert!(written <= stored / 8, "{written} bytes written beside {stored}");
}

/// Memory of this process that no file backs.
fn private_bytes() -> u64 {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Anonymous:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Files of the store's objects that this process maps.
fn mapped_objects(store: &Path) -> usize {
    let objects = store.join("objects").canonicalize().unwrap();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let mut files: Vec<&str> = maps.lines().filter_map(|l| l.find('/').map(|at| &l[at..])).collect();
    files.retain(|f| f.starts_with(objects.to_str().unwrap()));
    files.sort();
    files.dedup();
    files.len()
}

#[derive(Debug)]
struct Resources {
    resident_bytes: u64,
    descriptors: usize,
}

impl Resources {
    fn now() -> Resources {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
        Resources { resident_bytes: kib << 10, descriptors: fs::read_dir("/proc/self/fd").unwrap().count() }
    }
}

fn wait_for(what: &str, done: impl Fn() -> bool) -> Result<(), String> {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        if Instant::now() > end {
            return Err(format!("waited in vain for {what}"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
