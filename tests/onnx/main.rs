//! The ONNX project's cases on every backend: none may regress, none may pass that is expected to fail.

use cutover::{Device, DeviceOptions};
use cutover_tests::conformance::{Cases, Expected, page, run};

#[test]
fn every_case_on_every_backend() {
    let cases = Cases::load().unwrap();
    let cases: Vec<_> = cases.0.iter().collect();
    let mut ran = Vec::new();
    let mut contradictions = Vec::new();
    for (name, device) in [("reference", Device::Reference), ("cpu", Device::Cpu)] {
        let backend = device.backend(&DeviceOptions { threads: Some(1), ..DeviceOptions::default() }).unwrap();
        let outcomes = run(&cases, &*backend);
        let expected = Expected::parse(include_str!("expected.toml"), name).unwrap();
        contradictions.extend(expected.contradictions(&outcomes).into_iter().map(|c| format!("on {name}: {c}")));
        let passed = outcomes.iter().filter(|o| o.failure.is_none()).count();
        println!("{passed} of {} on {name}", outcomes.len());
        ran.push((name, outcomes));
    }
    assert!(contradictions.is_empty(), "{}", contradictions.join("\n"));
    let ran: Vec<_> = ran.iter().map(|(name, outcomes)| (*name, outcomes.as_slice())).collect();
    let is_current = page(&cases, &ran) == include_str!("../../docs/operators.md");
    assert!(is_current, "docs/operators.md is out of date: run `cargo xtask operators`");
}
