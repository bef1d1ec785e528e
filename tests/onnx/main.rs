//! The ONNX project's cases on every backend: none may regress, none may pass that is expected to fail.

use cutover::{Device, DeviceOptions};
use cutover_tests::conformance::{Cases, Expected, run};

fn check(name: &str, device: Device) {
    let backend = device.backend(&DeviceOptions { threads: Some(1), ..DeviceOptions::default() }).unwrap();
    let cases = Cases::load().unwrap();
    let cases: Vec<_> = cases.0.iter().collect();
    let outcomes = run(&cases, &*backend);
    let expected = Expected::parse(include_str!("expected.toml"), name).unwrap();
    let contradictions = expected.contradictions(&outcomes);
    assert!(contradictions.is_empty(), "on {name}:\n{}", contradictions.join("\n"));
    let passed = outcomes.iter().filter(|o| o.failure.is_none()).count();
    println!("{passed} of {} on {name}", outcomes.len());
}

#[test]
fn on_the_reference() {
    check("reference", Device::Reference);
}

#[test]
fn on_the_cpu() {
    check("cpu", Device::Cpu);
}
