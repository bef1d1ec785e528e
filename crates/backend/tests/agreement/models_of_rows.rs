//! Models of rows on the CPU backend against the reference: random ones, for every type of input, number of rows and of threads.

use super::support::{Random, run, seeds};
use cutover_backend::{CpuOptions, cpu, reference};
use cutover_graph::{
    Dim, Fact, Graph, Op, Plan, TensorFact,
    ops::{Attribute, Linear, NodeReader, Normalizer, Operator, Scaler, Svm, TreeEnsemble},
    passes::{PassOptions, declutter},
};
use cutover_tensor::{DType, Tensor, Value};
use std::collections::BTreeMap;

const FEATURES: usize = 5;

impl Random {
    /// A quarter of a small number: splits and features are often equal.
    fn quarter(&mut self) -> f32 {
        (self.below(17) as f32 - 8.0) / 4.0
    }

    fn quarters(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.quarter()).collect()
    }

    fn rows(&mut self, dtype: DType, rows: usize) -> Tensor {
        let shape = [rows, FEATURES];
        let missing = |random: &mut Random| random.below(6) == 0;
        let count = rows * FEATURES;
        let float = |random: &mut Random| if missing(random) { f32::NAN } else { random.quarter() };
        match dtype {
            DType::F32 => Tensor::from_vec(shape, (0..count).map(|_| float(self)).collect()),
            DType::F64 => Tensor::from_vec(shape, (0..count).map(|_| f64::from(float(self))).collect()),
            DType::I64 => Tensor::from_vec(shape, (0..count).map(|_| self.below(7) as i64 - 3).collect()),
            _ => Tensor::from_vec(shape, (0..count).map(|_| self.below(7) as i32 - 3).collect()),
        }
        .unwrap()
    }
}

type Attributes = BTreeMap<String, Attribute>;

fn read<O: Operator>(name: &str, version: i64, outputs: usize, attributes: Attributes) -> Op {
    let mut node = NodeReader::new("model", "ai.onnx.ml", name, version, vec![true], outputs, attributes);
    O::import(&mut node).unwrap()
}

fn with(attributes: &mut Attributes, name: &str, value: impl Into<Attribute>) {
    attributes.insert(name.to_string(), value.into());
}

const TRANSFORMS: [&str; 5] = ["NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT"];

/// Trees with numbered nodes, of every mode there.
fn trees(random: &mut Random, is_classifier: bool) -> (Op, usize) {
    const MODES: [&str; 7] =
        ["BRANCH_LEQ", "BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ"];
    let targets = 1 + random.below(4);
    let mut ints: [Vec<i64>; 6] = Default::default();
    let (mut modes, mut splits, mut leaf) = (Vec::new(), Vec::new(), [const { Vec::new() }; 3]);
    let mut weights = Vec::new();
    let is_plain = random.below(2) == 0;
    for tree in 0..random.below(12) as i64 {
        let mut open = 1 + random.below(20);
        let (mut id, mut next) = (0, 1);
        while id < next {
            let is_leaf = open == 0;
            open = open.saturating_sub(1);
            let (holds, fails) = if is_leaf { (0, 0) } else { (next, next + 1) };
            next += if is_leaf { 0 } else { 2 };
            let missing = i64::from(random.below(3) == 0);
            let row = [tree, id, random.below(FEATURES) as i64, holds, fails, missing];
            ints.iter_mut().zip(row).for_each(|(list, value)| list.push(value));
            splits.push(random.quarter());
            modes.push(match (is_leaf, is_plain) {
                (true, _) => "LEAF".to_string(),
                (false, true) => "BRANCH_LEQ".to_string(),
                (false, false) => random.pick(&MODES).to_string(),
            });
            for target in 0..targets as i64 {
                if is_leaf && (is_plain || random.below(2) == 0) {
                    leaf.iter_mut().zip([tree, id, target]).for_each(|(list, value)| list.push(value));
                    weights.push(random.quarter());
                }
            }
            id += 1;
        }
    }
    let mut attributes = Attributes::new();
    let names = ["treeids", "nodeids", "featureids", "truenodeids", "falsenodeids", "missing_value_tracks_true"];
    names.into_iter().zip(ints).for_each(|(name, list)| with(&mut attributes, &format!("nodes_{name}"), list));
    with(&mut attributes, "nodes_modes", modes);
    with(&mut attributes, "nodes_values", splits);
    let prefix = if is_classifier { "class" } else { "target" };
    let [leaf_trees, leaf_nodes, leaf_targets] = leaf;
    with(&mut attributes, &format!("{prefix}_treeids"), leaf_trees);
    with(&mut attributes, &format!("{prefix}_nodeids"), leaf_nodes);
    with(&mut attributes, &format!("{prefix}_ids"), leaf_targets);
    with(&mut attributes, &format!("{prefix}_weights"), weights);
    with(&mut attributes, "post_transform", random.pick(&TRANSFORMS));
    if random.below(2) == 0 {
        with(&mut attributes, "base_values", random.quarters(targets));
    }
    if is_classifier {
        with(&mut attributes, "classlabels_int64s", (0..targets as i64).map(|i| 10 - i).collect::<Vec<_>>());
        return (read::<TreeEnsemble>("TreeEnsembleClassifier", 3, 2, attributes), 2);
    }
    with(&mut attributes, "n_targets", targets as i64);
    with(&mut attributes, "aggregate_function", random.pick(&["SUM", "AVERAGE", "MIN", "MAX"]));
    (read::<TreeEnsemble>("TreeEnsembleRegressor", 3, 1, attributes), 1)
}

/// One tree that tests for sets, and for what else there is.
fn sets(random: &mut Random) -> (Op, usize) {
    let count = 1 + random.below(12);
    let modes: Vec<u8> = (0..count).map(|_| if random.below(2) == 0 { 6 } else { random.below(6) as u8 }).collect();
    let mut members = Vec::new();
    for _ in modes.iter().filter(|mode| **mode == 6) {
        let size = 1 + random.below(6);
        members.extend(random.quarters(size).into_iter().chain([f32::NAN]));
    }
    let mut attributes = Attributes::new();
    let floats = |values: Vec<f32>| Tensor::from_vec([values.len()], values).unwrap();
    let indices = |f: &dyn Fn(usize) -> i64| (0..count).map(f).collect::<Vec<i64>>();
    let is_last = |i: usize| i + 1 == count;
    with(&mut attributes, "nodes_featureids", (0..count).map(|_| random.below(FEATURES) as i64).collect::<Vec<_>>());
    with(&mut attributes, "nodes_modes", Tensor::from_vec([count], modes).unwrap());
    with(&mut attributes, "nodes_splits", floats(random.quarters(count)));
    with(&mut attributes, "nodes_truenodeids", indices(&|i| i as i64));
    with(&mut attributes, "nodes_trueleafs", indices(&|_| 1));
    with(&mut attributes, "nodes_falsenodeids", indices(&|i| i as i64 + 1));
    with(&mut attributes, "nodes_falseleafs", indices(&|i| i64::from(is_last(i))));
    let missing = (0..count).map(|_| i64::from(random.below(3) == 0)).collect::<Vec<_>>();
    with(&mut attributes, "nodes_missing_value_tracks_true", missing);
    with(&mut attributes, "tree_roots", vec![0, count as i64 / 2]);
    with(&mut attributes, "membership_values", floats(members));
    with(&mut attributes, "leaf_targetids", (0..=count as i64).map(|i| i % 2).collect::<Vec<_>>());
    with(&mut attributes, "leaf_weights", floats(random.quarters(count + 1)));
    with(&mut attributes, "n_targets", 2);
    with(&mut attributes, "aggregate_function", random.below(4) as i64);
    (read::<TreeEnsemble>("TreeEnsemble", 5, 1, attributes), 1)
}

fn linear(random: &mut Random) -> (Op, usize) {
    let targets = 1 + random.below(4);
    let mut attributes = Attributes::new();
    with(&mut attributes, "coefficients", random.quarters(targets * FEATURES));
    with(&mut attributes, "intercepts", random.quarters(targets));
    with(&mut attributes, "post_transform", random.pick(&TRANSFORMS[..4]));
    if random.below(2) == 0 {
        with(&mut attributes, "targets", targets as i64);
        return (read::<Linear>("LinearRegressor", 1, 1, attributes), 1);
    }
    with(&mut attributes, "classlabels_ints", (0..targets.max(2) as i64).map(|i| 10 - i).collect::<Vec<_>>());
    (read::<Linear>("LinearClassifier", 1, 2, attributes), 2)
}

fn svm(random: &mut Random) -> (Op, usize) {
    let classes = 2 + random.below(3);
    let counts: Vec<i64> = (0..classes).map(|_| 1 + random.below(9) as i64).collect();
    let (vectors, pairs) = (counts.iter().sum::<i64>() as usize, classes * (classes - 1) / 2);
    let mut attributes = Attributes::new();
    with(&mut attributes, "kernel_type", random.pick(&["LINEAR", "POLY", "RBF", "SIGMOID"]));
    with(&mut attributes, "kernel_params", vec![0.25, 0.5, 1.0 + random.below(3) as f32]);
    with(&mut attributes, "support_vectors", random.quarters(vectors * FEATURES));
    // Sums of so odd numbers are not 0, whatever they are rounded to.
    with(&mut attributes, "rho", random.quarters(pairs).into_iter().map(|x| x + 0.0123).collect::<Vec<f32>>());
    if random.below(3) == 0 {
        with(&mut attributes, "n_supports", vectors as i64);
        with(&mut attributes, "coefficients", random.quarters(vectors));
        return (read::<Svm>("SVMRegressor", 1, 1, attributes), 1);
    }
    with(&mut attributes, "coefficients", random.quarters((classes - 1) * vectors));
    with(&mut attributes, "vectors_per_class", counts);
    with(&mut attributes, "classlabels_ints", (0..classes as i64).map(|i| 10 - i).collect::<Vec<_>>());
    with(&mut attributes, "post_transform", random.pick(&TRANSFORMS[..4]));
    (read::<Svm>("SVMClassifier", 1, 2, attributes), 2)
}

fn prepared(random: &mut Random) -> (Op, usize) {
    let mut attributes = Attributes::new();
    if random.below(2) == 0 {
        with(&mut attributes, "norm", random.pick(&["MAX", "L1", "L2"]));
        return (read::<Normalizer>("Normalizer", 1, 1, attributes), 1);
    }
    let count = if random.below(2) == 0 { FEATURES } else { 1 };
    with(&mut attributes, "offset", random.quarters(count));
    with(&mut attributes, "scale", random.quarters(count));
    (read::<Scaler>("Scaler", 1, 1, attributes), 1)
}

#[test]
fn models_of_rows_agree_with_their_definitions() {
    type Make = fn(&mut Random) -> (Op, usize);
    let kinds: [(&str, f64, Make); 6] = [
        ("classifier", 0.0, |r| trees(r, true)),
        ("regressor", 0.0, |r| trees(r, false)),
        ("sets", 0.0, sets),
        ("linear", 1e-4, linear),
        // Powers of products near 100 cancel each other in sums of dozens.
        ("svm", 5e-3, svm),
        ("prepared", 1e-6, prepared),
    ];
    let on = |threads: usize| cpu(CpuOptions { threads, ..CpuOptions::default() }).unwrap();
    let (reference, one, three) = (reference(), on(1), on(3));
    for seed in seeds(180) {
        let mut random = Random(seed);
        let (kind, tolerance, make) = kinds[seed as usize % kinds.len()];
        let (op, outputs) = make(&mut random);
        let is_probit = format!("{op:?}").contains("Probit");
        let types = if kind == "sets" { 2 } else { 4 };
        let dtype = [DType::F32, DType::F64, DType::I64, DType::I32][random.below(types)];
        let mut graph = Graph::new("model");
        let shape = vec![Dim::symbol("n"), Dim::from(FEATURES)];
        let x = graph.add_input("x", Fact::from(TensorFact::new(dtype, shape)));
        let names = (0..outputs).map(|i| format!("y{i}")).collect();
        let node = graph.add_node("model", op.clone(), vec![Some(x)], names).unwrap();
        graph.set_outputs(graph.node(node).outputs.clone());
        let plan = Plan::new(graph).unwrap();
        for rows in [1, 2, 5, 300] {
            let x = [Value::Tensor(random.rows(dtype, rows))];
            let place = format!("seed {seed}, {kind}, {rows} rows of {dtype}: {op:?}");
            let expected = run(&reference, &plan, &x, &place);
            for backend in [&one, &three] {
                for (y, expected) in run(backend, &plan, &x, &place).iter().zip(&expected) {
                    assert_eq!((y.dtype(), y.shape()), (expected.dtype(), expected.shape()), "{place}");
                    let numbers = |t: &Tensor| match t.dtype() {
                        DType::F32 => t.to_vec::<f32>().unwrap().into_iter().map(f64::from).collect::<Vec<_>>(),
                        DType::F64 => t.to_vec::<f64>().unwrap(),
                        _ => t.to_vec::<i64>().unwrap().into_iter().map(|v| v as f64).collect(),
                    };
                    for (at, (a, b)) in numbers(y).into_iter().zip(numbers(expected)).enumerate() {
                        let near = (a - b).abs() <= tolerance * b.abs().max(1.0);
                        // The probit of what is no probability is no number of one kind or another.
                        let none = if is_probit { !a.is_finite() && !b.is_finite() } else { a.is_nan() && b.is_nan() };
                        assert!(near || a == b || none, "[{at}] is {a}, expected {b}: {place}");
                    }
                }
            }
        }
    }
}

#[test]
fn names_of_classes_are_a_table_after_the_model() {
    let reference = reference();
    for targets in [1, 3] {
        let mut random = Random(targets as u64);
        let mut attributes = Attributes::new();
        with(&mut attributes, "coefficients", random.quarters(targets * FEATURES));
        with(&mut attributes, "intercepts", random.quarters(targets));
        let names = ["ash", "oak", "yew"][..targets.max(2)].iter().map(|name| name.to_string()).collect::<Vec<_>>();
        with(&mut attributes, "classlabels_strings", names);
        let mut graph = Graph::new("model");
        let x = graph.add_input("x", Fact::from(TensorFact::of_constant_shape(DType::F32, &[20, FEATURES])));
        let op = read::<Linear>("LinearClassifier", 1, 2, attributes);
        let node = graph.add_node("model", op, vec![Some(x)], vec!["label".to_string(), "scores".to_string()]).unwrap();
        graph.set_outputs(graph.node(node).outputs.clone());
        let (numbered, _) = declutter(graph.clone(), &PassOptions::default()).unwrap();
        let ops: Vec<String> =
            numbered.topological_order().unwrap().into_iter().map(|id| numbered.node(id).op.name()).collect();
        assert_eq!(ops, ["ai.onnx.ml.LinearClassifier", "ai.onnx.ml.LabelEncoder"]);
        let x = [Value::Tensor(Tensor::from_vec([20, FEATURES], random.quarters(20 * FEATURES)).unwrap())];
        let expected = run(&reference, &Plan::new(graph).unwrap(), &x, "named");
        assert_eq!(expected[0].dtype(), DType::String);
        for backend in [&reference, &cpu(CpuOptions::default()).unwrap()] {
            let answers = run(backend, &Plan::new(numbered.clone()).unwrap(), &x, "numbered");
            assert_eq!(answers[0], expected[0]);
        }
    }
}
