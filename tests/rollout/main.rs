//! The three versions of digits, deployed in every order: only the gates know which one is bad.

mod raw_requests;

use cutover::{
    Host, HostOptions, Label, Request, Strategy, Tensor, Value,
    graph::onnx::{ImportOptions, import},
    runtime::Canary,
};
use cutover_tests::{host, package};
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

struct Digits {
    images: Vec<Tensor>,
    labels: Vec<u32>,
    packages: Vec<(&'static str, PathBuf)>,
}

/// The held-out third, and a package of every version.
fn digits(folder: &Path) -> Digits {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("models/digits");
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    for line in std::fs::read_to_string(root.join("data/digits.csv")).unwrap().lines().skip(2).step_by(3) {
        let numbers: Vec<u32> = line.split(',').map(|n| n.parse().unwrap()).collect();
        let pixels: Vec<f32> = numbers[..64].iter().map(|&p| p as f32 / 16.0).collect();
        images.push(Tensor::from_vec([1, 1, 8, 8], pixels).unwrap());
        labels.push(numbers[64]);
    }
    let make = |version: &'static str| {
        let graph = import(&root.join(version).join("model.onnx"), &ImportOptions::default()).unwrap();
        (version, package(&graph, "digits", version, ("image", &images[0]), "probabilities", folder))
    };
    let packages = ["v1", "v2", "v3"].map(make).to_vec();
    Digits { images, labels, packages }
}

impl Digits {
    fn package(&self, version: &str) -> &Path {
        &self.packages.iter().find(|(v, _)| *v == version).unwrap().1
    }

    /// Sends requests, with labels where `labelled`, until the rollout is decided; gives who serves then.
    fn serve_until_decided(&self, host: &Host, labelled: bool) -> String {
        let end = Instant::now() + Duration::from_secs(60);
        for number in 0.. {
            let at = number * 17 % self.images.len();
            let inputs = vec![("image".to_string(), Value::Tensor(self.images[at].clone()))];
            let id = format!("request-{number}");
            let answer = host.infer("digits", Request { id: Some(id), inputs, ..Request::default() }).unwrap();
            if labelled {
                host.feedback("digits", &answer.id, &Label::class(self.labels[at])).unwrap();
            }
            if number % 50 == 0 {
                host.poll(Instant::now());
                let status = host.status();
                if status.models[0].rollout.is_none() {
                    return status.models[0].active.version.clone();
                }
                assert!(Instant::now() < end, "undecided: {status:#?}");
            }
        }
        unreachable!("the requests have no end")
    }
}

fn canary() -> Strategy {
    let step = |share| cutover::runtime::rollout::Step { share, dwell_s: 0.05 };
    Strategy::Canary(Canary { steps: vec![step(0.2), step(0.5)], deadline_s: 50.0, ..Canary::default() })
}

/// Deploys `first`, then `second` by canary; gives who serves in the end, and why.
fn play(first: &str, second: &str, labelled: bool) -> (String, String) {
    let folder = tempfile::tempdir().unwrap();
    let digits = digits(folder.path());
    let host = host(&folder.path().join("store"), HostOptions { drive: false, ..HostOptions::default() });
    host.deploy("digits", digits.package(first), canary()).unwrap();
    host.deploy("digits", digits.package(second), canary()).unwrap();
    let serving = digits.serve_until_decided(&host, labelled);
    (serving, host.history("digits").unwrap().last().unwrap().reason.clone())
}

#[test]
fn the_better_version_serves_in_whatever_order_they_come() {
    for (first, second, expected) in
        [("v1", "v2", "v2"), ("v1", "v3", "v1"), ("v2", "v3", "v2"), ("v3", "v1", "v1"), ("v3", "v2", "v2")]
    {
        let (serving, reason) = play(first, second, true);
        assert_eq!(serving, expected, "{second} after {first}: {reason}");
    }
}

#[test]
fn without_labels_a_version_that_disagrees_is_rolled_back() {
    let (serving, reason) = play("v1", "v3", false);
    assert_eq!(serving, "v1", "{reason}");
    assert!(reason.contains("agreement") || reason.contains("confidence"), "{reason}");
}

#[test]
fn a_store_keeps_what_serves_and_a_rollback_goes_back() {
    let folder = tempfile::tempdir().unwrap();
    let digits = digits(folder.path());
    let store = folder.path().join("store");
    let options = || HostOptions { drive: false, ..HostOptions::default() };
    {
        let host = host(&store, options());
        host.deploy("digits", digits.package("v1"), canary()).unwrap();
        host.deploy("digits", digits.package("v2"), canary()).unwrap();
        assert_eq!(digits.serve_until_decided(&host, true), "v2");
    }
    let host = host(&store, options());
    assert_eq!(host.status().models[0].active.version, "v2");
    host.rollback("digits").unwrap();
    assert_eq!(host.status().models[0].active.version, "v1");
    assert!(host.rollback("nothing").is_err());
}

#[test]
fn what_is_not_admitted_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let digits = digits(folder.path());
    let host = host(&folder.path().join("store"), HostOptions { drive: false, ..HostOptions::default() });
    host.deploy("digits", digits.package("v1"), canary()).unwrap();
    let mut bytes = std::fs::read(digits.package("v2")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    let damaged = folder.path().join("damaged.cutover");
    std::fs::write(&damaged, bytes).unwrap();
    for path in [damaged.as_path(), Path::new("nowhere.cutover"), digits.package("v1")] {
        assert!(host.deploy("digits", path, canary()).is_err(), "{}", path.display());
    }
    assert!(host.deploy("other", digits.package("v2"), canary()).is_err());
    assert_eq!(host.versions("digits").unwrap(), ["v1"]);
}
