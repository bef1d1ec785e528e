//! Recipes on a small network: what is cached, what a killed run leaves, and what a package holds.

use cutover_backend::{Backend, CpuOptions, cpu};
use cutover_graph::{
    Constant, Dim, Graph, Op, TensorFact, ValueId,
    onnx::encode,
    ops::{Gemm, MatMul, Unary, UnaryFunction},
};
use cutover_package::Package;
use cutover_shrink::{
    Data,
    recipe::{About, Cache, Detail, Outcome, Recipe, run},
};
use cutover_tensor::{DType, Tensor, Value};
use std::{cell::Cell, path::Path, sync::Arc};

/// Numbers within about ±1, the same for the same seed.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| (next() + next() + next()) / 2.0).collect()
}

/// `x [N, 16]` through 64 neurons to 4 scores.
fn network() -> Graph {
    let mut graph = Graph::new("model");
    let x = graph.add_input("x", TensorFact::new(DType::F32, vec![Dim::symbol("N"), 16.into()]));
    let mut constant = |name: &str, shape: &[usize], seed: u64| {
        let values = noise(seed, shape.iter().product());
        graph.add_constant(name, Constant::new(Tensor::from_vec(shape, values).unwrap()))
    };
    let (w1, w2, b2) = (constant("w1", &[16, 64], 1), constant("w2", &[4, 64], 2), constant("b2", &[4], 3));
    let mut node = |name: &str, op: Op, inputs: &[ValueId]| {
        let inputs = inputs.iter().map(|&i| Some(i)).collect();
        let node = graph.add_node(name, op, inputs, vec![format!("{name}.y")]).unwrap();
        graph.node(node).outputs[0]
    };
    let hidden = node("first", MatMul { activation: None }.into(), &[x, w1]);
    let hidden = node("relu", Unary { function: UnaryFunction::Relu }.into(), &[hidden]);
    let gemm = Gemm { alpha: 1.0, beta: 1.0, transpose_a: false, transpose_b: true, activation: None };
    let scores = node("second", gemm.into(), &[hidden, w2, b2]);
    graph.set_outputs(vec![scores]);
    graph
}

fn data() -> Data {
    let rows = |i: u64| Value::from(Tensor::from_vec([2, 16], noise(100 + i, 32)).unwrap());
    let samples = (0..8).map(|i| vec![("x".to_string(), rows(i))]).collect();
    Data { samples, labels: Some((0..8).map(|i| vec![i % 4, (i + 1) % 4]).collect()) }
}

fn on_cpu() -> Arc<dyn Backend> {
    cpu(CpuOptions { threads: 1, ..CpuOptions::default() }).unwrap()
}

fn about() -> About {
    About { name: "small".to_string(), ..About::default() }
}

fn done(text: &str, cache: &Cache) -> Outcome {
    done_with(text, cache, false)
}

fn done_with(text: &str, cache: &Cache, detail: bool) -> Outcome {
    let recipe = Recipe::parse(text, "recipe.toml").unwrap();
    run(&network(), &about(), &recipe, &data(), None, &on_cpu(), cache, detail, &|_, _, _| ()).unwrap()
}

const PRUNE: &str = "[[step]]\ndo = \"prune\"\nchannels = 0.5\n";
const QUANTIZE: &str = "[[step]]\ndo = \"quantize\"\nmethod = \"dynamic\"\n";

fn cached(outcome: &Outcome) -> Vec<(&str, bool)> {
    outcome.steps.iter().map(|step| (step.name, step.cached)).collect()
}

#[test]
fn what_was_done_is_not_done_again() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::new(folder.path().join("cache"));
    let (both, other) = (format!("{PRUNE}{QUANTIZE}"), format!("{PRUNE}{}", QUANTIZE.replace("dynamic", "f16")));
    let first = done(&both, &cache);
    assert_eq!(cached(&first), [("prune", false), ("quantize", false)]);
    let again = done(&both, &cache);
    assert_eq!(cached(&again), [("prune", true), ("quantize", true)]);
    assert_eq!(encode(&first.graph).unwrap(), encode(&again.graph).unwrap());
    assert_eq!(first.measured, again.measured, "and measured once");
    for (one, two) in first.steps.iter().zip(&again.steps) {
        assert_eq!(one.detail, two.detail);
    }
    // A changed last step uses the one before; a changed first step or seed, nothing.
    assert_eq!(cached(&done(&other, &cache)), [("prune", true), ("quantize", false)]);
    assert_eq!(cached(&done(&format!("seed = 2\n{both}"), &cache)), [("prune", false), ("quantize", false)]);
    assert_eq!(cached(&done(&both.replace("0.5", "0.25"), &cache)), [("prune", false), ("quantize", false)]);
    // What only a report needs is not there yet; what comes before is.
    assert_eq!(cached(&done_with(&both, &cache, true)), [("prune", true), ("quantize", false)]);
    // Without a cache the result is the same.
    assert_eq!(encode(&done(&both, &Cache::none()).graph).unwrap(), encode(&first.graph).unwrap());
}

/// A run that ends in the middle leaves what was finished; an entry that is damaged is made again.
#[test]
fn a_killed_run_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::new(folder.path());
    let recipe = Recipe::parse(&format!("{PRUNE}{}", QUANTIZE.replace("dynamic", "static")), "recipe.toml").unwrap();
    let (network, data) = (network(), data());
    let calls = Cell::new(0);
    let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        run(&network, &about(), &recipe, &data, None, &on_cpu(), &cache, false, &|what, _, _| {
            calls.set(calls.get() + 1);
            assert_ne!(what, "calibration", "killed here");
        })
    }));
    assert!(killed.is_err());
    let whole = run(&network, &about(), &recipe, &data, None, &on_cpu(), &cache, false, &|_, _, _| ()).unwrap();
    assert_eq!(cached(&whole), [("prune", true), ("quantize", false)]);
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let model = entry.unwrap().path().join("model.onnx");
        if let Ok(bytes) = std::fs::read(&model) {
            std::fs::write(&model, &bytes[..bytes.len() / 2]).unwrap();
        }
    }
    let again = run(&network, &about(), &recipe, &data, None, &on_cpu(), &cache, false, &|_, _, _| ()).unwrap();
    assert_eq!(cached(&again), [("prune", false), ("quantize", false)]);
    assert_eq!(encode(&whole.graph).unwrap(), encode(&again.graph).unwrap());
}

#[test]
fn a_package_tells_of_the_original() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("small.cutover");
    let pack = format!("[[step]]\ndo = \"pack\"\nversion = \"2\"\noutput = {:?}\n", output.display().to_string());
    let outcome = done(&format!("{PRUNE}{QUANTIZE}{pack}"), &Cache::none());
    let Detail::Pack(answers) = &outcome.steps[2].detail else { panic!("{:?}", outcome.steps) };
    let package = Package::open(&output).unwrap();
    let (manifest, golden) = (&package.manifest, package.golden().unwrap());
    assert_eq!((manifest.name.as_str(), manifest.version.as_str()), ("small", "2"));
    // Golden vectors are the original's.
    let original = done("[[step]]\ndo = \"verify\"\nbudget = [\"cosine>=0.99999\"]\n", &Cache::none());
    assert!(original.within_budget);
    let expected = cutover_backend::reference();
    let comparison = cutover_shrink::compare(&network(), &original.graph, &expected, &data().samples).unwrap();
    assert_eq!(comparison.outputs[0].absolute_error_max, 0.0);
    assert_eq!(golden.inputs[0].1.to_vec::<f32>().unwrap(), noise(100, 32));
    assert!(answers.largest_error > 0.0 && manifest.golden.atol > answers.largest_error);
    let profile = package.profile().unwrap().unwrap();
    assert_eq!((profile.samples, profile.classes), (16, vec![0.25; 4]));
    let summary = manifest.shrink.as_ref().unwrap();
    assert_eq!(summary.steps, ["prune", "quantize"]);
    assert!(summary.parameters[1] < summary.parameters[0] * 6 / 10, "{summary:?}");
    assert_eq!(summary.operations, [2 * (16 * 64 + 64 * 4), 16 * 64 + 64 * 4], "half of the neurons");
    assert!(summary.accuracy.is_some() && summary.sqnr_db.is_some());
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, [Path::new("small.cutover").as_os_str()], "nothing else is left there");
}

#[test]
fn a_budget_that_is_missed_is_named() {
    let outcome =
        done(&format!("{PRUNE}[[step]]\ndo = \"verify\"\nbudget = [\"sqnr>=60\", \"cosine>=-1\"]\n"), &Cache::none());
    let Detail::Verify { missed, .. } = &outcome.steps[1].detail else { panic!("{:?}", outcome.steps) };
    assert_eq!((missed.as_slice(), outcome.within_budget), (&["sqnr>=60".to_string()][..], false));
}

#[test]
fn a_step_that_fails_is_named() {
    let refused = |text: &str| {
        let recipe = Recipe::parse(text, "recipe.toml").unwrap();
        let none = Cache::none();
        run(&network(), &about(), &recipe, &data(), None, &on_cpu(), &none, false, &|_, _, _| ())
            .err()
            .unwrap()
            .to_string()
    };
    let message = refused(&format!("{QUANTIZE}{PRUNE}exclude = [\"third\"]\n"));
    assert!(message.contains("step 2 (prune)") && message.contains("'third'"), "{message}");
    let message = refused(&format!("{PRUNE}exclude = [\"first\", \"second\"]\n"));
    assert!(message.contains("step 1 (prune)") && message.contains("nothing can be pruned"), "{message}");
    #[cfg(not(feature = "train"))]
    {
        let message = refused("[[step]]\ndo = \"fine-tune\"\n");
        assert!(message.contains("step 1") && message.contains("--features train"), "{message}");
    }
}

/// What pruning lost, fine-tuning by the original's answers mostly brings back; done once, and the same from the same seed.
#[cfg(feature = "train")]
#[test]
fn training_after_pruning_brings_the_answers_back() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::new(folder.path().join("cache"));
    let tune =
        "[[step]]\ndo = \"fine-tune\"\nepochs = 60\nbatch = 4\nrate = 0.01\n[step.losses]\nsoft = 0.0\nmse = 1.0\n";
    let (pruned, tuned) = (done(PRUNE, &cache), done(&format!("{PRUNE}{tune}"), &cache));
    assert_eq!(cached(&tuned), [("prune", true), ("fine-tune", false)]);
    let sqnr = |outcome: &Outcome| {
        let comparison = cutover_shrink::compare(&network(), &outcome.graph, &on_cpu(), &data().samples).unwrap();
        comparison.outputs[0].sqnr_db
    };
    let (before, after) = (sqnr(&pruned), sqnr(&tuned));
    assert!(after > before + 3.0, "{before} dB, after fine-tuning {after} dB");
    assert_eq!(cached(&done(&format!("{PRUNE}{tune}"), &cache)), [("prune", true), ("fine-tune", true)]);
    let again = done(&format!("{PRUNE}{tune}"), &Cache::none());
    assert_eq!(encode(&again.graph).unwrap(), encode(&tuned.graph).unwrap());
}
