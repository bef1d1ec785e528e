//! The GPU backend against the reference: random graphs, every function at its edges, products and windows of odd shapes. All of it runs
//! on the GPU or the test fails: nothing falls back.
//!
//! The GPU is wgpu's, or CUDA's where `CUTOVER_GPU` says `cuda`. Without it each test says so and passes; `cargo xtask test` counts them.

use super::{
    networks::Drawing,
    support::{Random, run, seeds},
};
use cutover_backend::{Backend, CompileError, CompileOptions, Input, Output, RunContext, RunError, SessionMemory};
use cutover_backend::{cpu, partition, reference};
use cutover_graph::{
    Constant, Graph, Plan, TensorFact, ValueId,
    ops::{
        ArgReduce, Binary, BinaryFunction, Cast, Cell, CellActivation, Conv, ConvTranspose, Cumulate, Direction,
        Gather, MatMul, NonZero, Padding, Recurrent, Reduce, ReduceFunction, Scatter, ScatterPlace, ScatterReduction,
        Slice, Softmax, SoftmaxFunction, TopK, Transpose, Unary, UnaryFunction, Unsqueeze, Window,
    },
};
use cutover_tensor::{DType, Tensor, Value};
use std::sync::{Arc, OnceLock};

/// The GPU; `None`, said once for each test, where there is none.
pub fn gpu(test: &str) -> Option<Arc<dyn Backend>> {
    static GPU: OnceLock<Option<Arc<dyn Backend>>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| open().ok());
    if gpu.is_none() {
        println!("skipped: {test} needs a GPU");
    }
    gpu.clone()
}

fn open() -> Result<Arc<dyn Backend>, CompileError> {
    match std::env::var("CUTOVER_GPU").as_deref().unwrap_or("wgpu") {
        #[cfg(feature = "wgpu")]
        "wgpu" => cutover_backend::wgpu(cutover_backend::WgpuOptions::default()),
        #[cfg(feature = "cuda")]
        "cuda" => cutover_backend::cuda(cutover_backend::CudaOptions::default()),
        other => Err(CompileError::Options(format!("this build has no {other}"))),
    }
}

pub fn near(actual: &Tensor, expected: &Tensor, tolerance: f32, said: &str) {
    assert_eq!((actual.dtype(), actual.shape()), (expected.dtype(), expected.shape()), "{said}");
    if actual.dtype() != DType::F32 {
        assert!(actual.bytes() == expected.bytes(), "{said}: {actual:?}, expected {expected:?}");
        return;
    }
    let (actual, expected) = (actual.to_vec::<f32>().unwrap(), expected.to_vec::<f32>().unwrap());
    let scale = expected.iter().filter(|e| e.is_finite()).fold(1.0f32, |m, v| m.max(v.abs()));
    for (at, (a, e)) in actual.iter().zip(&expected).enumerate() {
        let same = (a - e).abs() <= tolerance * scale || a == e || a.is_nan() && e.is_nan();
        assert!(same, "[{at}]: {a}, expected {e}: {said}");
    }
}

/// `drawing`'s graph on both.
pub fn check(gpu: &Arc<dyn Backend>, drawing: Drawing, tolerance: f32) {
    let said = drawing.said.join("; ");
    let plan = Plan::new(drawing.graph).unwrap();
    let expected = run(&reference(), &plan, &drawing.inputs, &said);
    let actual = run(gpu, &plan, &drawing.inputs, &said);
    actual.iter().zip(&expected).for_each(|(actual, expected)| near(actual, expected, tolerance, &said));
}

/// One operator of the inputs given, all of its outputs.
fn check_op(
    gpu: &Arc<dyn Backend>,
    op: impl Into<cutover_graph::Op>,
    inputs: &[Tensor],
    outputs: usize,
    tolerance: f32,
) {
    let mut d = Drawing::new(1);
    let ids: Vec<ValueId> = inputs
        .iter()
        .enumerate()
        .map(|(at, tensor)| {
            d.inputs.push(Value::Tensor(tensor.clone()));
            d.said.push(format!("{}{}", tensor.dtype(), tensor.shape()));
            // Indices, axes and sizes are constants; what is computed with comes in a run.
            match at > 0 && tensor.dtype() == DType::I64 {
                true => {
                    d.inputs.pop();
                    d.constant(tensor.clone())
                }
                false => {
                    d.graph.add_input(format!("x{at}"), TensorFact::of_constant_shape(tensor.dtype(), tensor.shape()))
                }
            }
        })
        .collect();
    let made = d.nodes(op, &ids, outputs);
    d.graph.set_outputs(made);
    check(gpu, d, tolerance);
}

#[test]
fn random_graphs_agree_with_the_reference() {
    let Some(gpu) = gpu("random_graphs_agree_with_the_reference") else { return };
    for seed in seeds(40) {
        // Exponentials of sums of dozens: as the CPU's kernels are compared.
        check(&gpu, Drawing::chain(seed), 2e-4);
    }
}

#[test]
fn functions_agree_at_their_edges() {
    let Some(gpu) = gpu("functions_agree_at_their_edges") else { return };
    use UnaryFunction::*;
    let mut values =
        vec![0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-3, -1e-3, 2.5, 3.5, f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    values.extend((-60..60).map(|i| i as f32 * 0.11));
    let x = Tensor::from_vec([values.len()], values).unwrap();
    let functions = [
        Abs,
        Neg,
        Sign,
        Floor,
        Ceil,
        Round,
        Sqrt,
        Reciprocal,
        Exp,
        Log,
        Sin,
        Cos,
        Asin,
        Acos,
        Atan,
        Tanh,
        Asinh,
        Acosh,
        Atanh,
        Erf,
        Relu,
        Sigmoid,
        Softplus,
        Softsign,
        HardSwish,
        Mish,
        LeakyRelu { alpha: 0.1 },
        Elu { alpha: 1.5 },
        Celu { alpha: 0.7 },
        Selu { alpha: 1.6, gamma: 1.05 },
        HardSigmoid { alpha: 0.2, beta: 0.5 },
        ThresholdedRelu { alpha: 1.0 },
        Gelu { tanh: false },
        Gelu { tanh: true },
        Shrink { lambda: 0.5, bias: 0.1 },
        Swish { alpha: 1.3 },
    ];
    for function in functions {
        // Infinities times zero are no number, and clamps of it are the driver's choice.
        let finite = matches!(
            function,
            HardSwish | HardSigmoid { .. } | Mish | Softsign | Gelu { .. } | Celu { .. } | Swish { .. }
        );
        let x = match finite {
            true => Tensor::from_vec([120], (-60..60).map(|i| i as f32 * 0.11).collect()).unwrap(),
            false => x.clone(),
        };
        check_op(&gpu, Unary { function }, &[x], 1, 3e-6);
    }
}

#[test]
fn arithmetic_of_every_type_agrees() {
    let Some(gpu) = gpu("arithmetic_of_every_type_agrees") else { return };
    use BinaryFunction::*;
    let mut random = Random(3);
    let floats = |random: &mut Random| random.tensor(&[3, 1, 5]);
    for function in [Add, Sub, Mul, Div, Pow, Equal, Less, Greater, LessOrEqual, GreaterOrEqual, PRelu, Mod, Fmod] {
        let (x, y) = (floats(&mut random), random.tensor(&[4, 5]));
        check_op(&gpu, Binary { function }, &[x, y], 1, 1e-5);
    }
    let whole = [7i64, -7, 0, i64::MAX, i64::MIN, 1 << 40, -3, 5];
    let by = [2i64, 2, 3, 3, 5, -7, -2, 5];
    for function in [Add, Sub, Mul, Div, Mod, Fmod, BitwiseAnd, BitwiseXor, Less, Equal] {
        let tensors = [whole, by].map(|v| Tensor::from_vec([8], v.to_vec()).unwrap());
        let mut d = Drawing::new(1);
        let ids = tensors.map(|tensor| {
            let id = d.graph.add_input(format!("x{}", d.inputs.len()), TensorFact::of_constant_shape(DType::I64, &[8]));
            d.inputs.push(Value::Tensor(tensor));
            id
        });
        let y = d.node(Binary { function }, &ids);
        d.graph.set_outputs(vec![y]);
        check(&gpu, d, 0.0);
    }
    for to in [DType::I8, DType::U8, DType::I16, DType::I32, DType::I64, DType::Bool, DType::F16, DType::BF16] {
        let x = Tensor::from_vec([6], vec![0.0f32, 1.7, -2.5, 100.25, -128.0, 0.1]).unwrap();
        // A negative number of an unsigned type is nobody's.
        let x = if to == DType::U8 { Tensor::from_vec([3], vec![0.0f32, 1.7, 200.0]).unwrap() } else { x };
        check_op(&gpu, Cast::to(to), &[x], 1, 0.0);
    }
}

#[test]
fn products_and_windows_of_odd_shapes_agree() {
    let Some(gpu) = gpu("products_and_windows_of_odd_shapes_agree") else { return };
    let mut random = Random(11);
    for seed in seeds(12) {
        let (m, k, n) = (random.upto(70), random.upto(40), random.upto(300));
        let batch = random.upto(3);
        let (a, b) = (random.tensor(&[batch, m, k]), random.tensor(&[if seed % 2 == 0 { 1 } else { batch }, k, n]));
        check_op(&gpu, MatMul { activation: None }, &[a, b], 1, 1e-5);
        let group = random.pick(&[1, 1, 2, 4]);
        let (inner, outer) = (random.upto(5), random.upto(40));
        let (kernel, size) = ([random.upto(4), random.upto(4)], [4 + random.below(14), 4 + random.below(14)]);
        let padding = Padding::Explicit { begin: vec![random.below(3), 1], end: vec![1, random.below(3)] };
        let (strides, dilations) = (vec![random.upto(2), random.upto(2)], vec![1, random.upto(2)]);
        if (kernel[1] - 1) * dilations[1] > size[1] {
            continue;
        }
        let window = Window { kernel_shape: None, strides, dilations, padding, ceil_mode: false };
        let mut d = Drawing::new(seed + 5);
        let x = d.input(&[random.upto(2), group * inner, size[0], size[1]]);
        let (w, bias) = (d.weights(&[group * outer, inner, kernel[0], kernel[1]]), d.weights(&[group * outer]));
        let y = d.node(Conv { window: window.clone(), group, activation: None }, &[x, w, bias]);
        d.graph.set_outputs(vec![y]);
        check(&gpu, d, 1e-5);
        let mut d = Drawing::new(seed + 9);
        let x = d.input(&[1, group * inner, size[0], size[1]]);
        let w = d.weights(&[group * inner, random.upto(6), kernel[0], kernel[1]]);
        let op = ConvTranspose { window, group, output_padding: Vec::new(), output_shape: None };
        let y = d.node(op, &[x, w]);
        d.graph.set_outputs(vec![y]);
        check(&gpu, d, 1e-5);
    }
}

/// Queries, keys and values of heads, a mask or none, and their attention.
fn attention(d: &mut Drawing) {
    let (batch, groups, shared) = (d.random.upto(2), d.random.upto(3), d.random.pick(&[1, 1, 3]));
    let lengths = [1, 7, 31, 32, 33, 64, 65 + d.random.below(40)];
    let widths = [1, 3, 8, 32, 33, 40, 128];
    let (queries, keys) = (d.random.pick(&lengths), d.random.pick(&lengths));
    let (depth, width) = (d.random.pick(&widths), d.random.pick(&widths));
    // As projections leave them, or by head.
    let heads = |d: &mut Drawing, count: usize, length: usize, width: usize| match d.random.coin() {
        true => d.input(&[batch, count, length, width]),
        false => {
            let x = d.input(&[batch, length, count, width]);
            d.node(Transpose { permutation: Some(vec![0, 2, 1, 3]) }, &[x])
        }
    };
    let mut lead = vec![batch, groups];
    let (mut k, mut v) = (heads(d, groups, keys, depth), heads(d, groups, keys, width));
    k = d.node(Transpose { permutation: Some(vec![0, 1, 3, 2]) }, &[k]);
    let q = match shared {
        1 => heads(d, groups, queries, depth),
        _ => {
            let axes = d.constant(Tensor::from_vec([1], vec![2i64]).unwrap());
            (k, v) = (d.node(Unsqueeze, &[k, axes]), d.node(Unsqueeze, &[v, axes]));
            lead.push(shared);
            d.input(&[batch, groups, shared, queries, depth])
        }
    };
    let mut x = d.node(MatMul { activation: None }, &[q, k]);
    if d.random.coin() {
        let scale = d.constant(Tensor::scalar(0.25f32));
        x = d.node(Binary { function: BinaryFunction::Mul }, &[x, scale]);
    }
    let mut whole = lead.clone();
    whole.extend([queries, keys]);
    let mut of_samples = vec![1; whole.len()];
    (of_samples[0], of_samples[whole.len() - 1]) = (batch, keys);
    match d.random.below(5) {
        0 => {}
        1 => {
            // Causal: the first query sees one key, and some see none.
            let hidden = |at: usize| if at % keys <= at / keys { 0.0 } else { f32::NEG_INFINITY };
            let mut mask: Vec<f32> = (0..queries * keys).map(hidden).collect();
            mask[(queries - 1) * keys..].fill(f32::MIN);
            let mask = d.constant(Tensor::from_vec([queries, keys], mask).unwrap());
            x = d.node(Binary { function: BinaryFunction::Add }, &[x, mask]);
        }
        form => {
            let shape = [&whole[..], &of_samples, &[keys]][form - 2].to_vec();
            let mask = d.input(&shape);
            let mask = d.node(Unary { function: UnaryFunction::Exp }, &[mask]);
            x = d.node(Binary { function: BinaryFunction::Add }, &[mask, x]);
        }
    }
    let p = d.node(Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false }, &[x]);
    let mut y = d.node(MatMul { activation: None }, &[p, v]);
    if shared == 1 && d.random.coin() {
        y = d.node(Transpose { permutation: Some(vec![0, 2, 1, 3]) }, &[y]);
    }
    d.graph.set_outputs(vec![y]);
}

#[test]
fn attention_agrees_with_its_operators() {
    let Some(gpu) = gpu("attention_agrees_with_its_operators") else { return };
    for seed in seeds(32) {
        let mut d = Drawing::new(seed);
        attention(&mut d);
        let executable = gpu.compile(&Plan::new(d.graph.clone()).unwrap(), &CompileOptions::default()).unwrap();
        let kernels: Vec<&str> = executable.placement().nodes.iter().map(|node| node.kernel.as_str()).collect();
        let any = |begin: &str| kernels.iter().any(|kernel| kernel.starts_with(begin));
        assert!(any("attention") && !any("matrix product"), "{kernels:?}");
        // A sum of a hundred products of what is at most one, and a mask of at most e.
        check(&gpu, d, 1e-5);
    }
}

#[test]
fn attention_holds_no_matrix_of_scores() {
    let Some(gpu) = gpu("attention_holds_no_matrix_of_scores") else { return };
    let memory = |length: usize| {
        let mut d = Drawing::new(3);
        let [q, k, v] = [[1, 4, length, 32], [1, 4, 32, length], [1, 4, length, 32]].map(|shape| d.input(&shape));
        let x = d.node(MatMul { activation: None }, &[q, k]);
        let p = d.node(Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false }, &[x]);
        let y = d.node(MatMul { activation: None }, &[p, v]);
        d.graph.set_outputs(vec![y]);
        let executable = gpu.compile(&Plan::new(d.graph).unwrap(), &CompileOptions::default()).unwrap();
        executable.footprint().session_bytes
    };
    // Queries, keys, values, the result, that as it comes back, and what three of them are read through on some devices: tensors of 4 heads
    // of 32, where the scores are 4 times 2048 by 2048.
    let (tensor, scores) = (4 * 2048 * 32 * 4, 4 * 2048 * 2048 * 4);
    assert!(memory(2048) <= 8 * tensor + 8 * 256, "{}", memory(2048));
    assert!(memory(2048) < scores / 4 && memory(4096) <= 2 * memory(2048));
}

#[test]
fn lines_and_indices_agree() {
    let Some(gpu) = gpu("lines_and_indices_agree") else { return };
    let mut random = Random(17);
    let integers = |values: &[i64]| Tensor::from_vec([values.len()], values.to_vec()).unwrap();
    for shape in [vec![1, 1], vec![3, 130], vec![2, 3, 5], vec![7, 1, 65]] {
        let axis = shape.len() as i64 - 1;
        let x = random.tensor(&shape);
        for function in [ReduceFunction::Sum, ReduceFunction::Max, ReduceFunction::LogSumExp, ReduceFunction::Prod] {
            let op = Reduce { function, keep_dims: false, noop_with_empty_axes: false };
            check_op(&gpu, op.clone(), &[x.clone(), integers(&[0])], 1, 1e-5);
            check_op(&gpu, op, &[x.clone(), integers(&[axis])], 1, 1e-5);
        }
        for (largest, select_last) in [(true, false), (false, true)] {
            check_op(&gpu, ArgReduce { largest, axis, keep_dims: true, select_last }, std::slice::from_ref(&x), 1, 0.0);
            let k = Tensor::from_vec([1], vec![shape[axis as usize].min(3) as i64]).unwrap();
            check_op(&gpu, TopK { axis, largest, sorted: true }, &[x.clone(), k], 2, 0.0);
        }
        let total = Cumulate { product: false, exclusive: true, reverse: true };
        check_op(&gpu, total, &[x.clone(), Tensor::scalar(axis)], 1, 1e-5);
        check_op(&gpu, Gather { axis }, &[x.clone(), integers(&[0, -1, 0])], 1, 0.0);
        let ends = [integers(&[-1]), integers(&[i64::MIN]), integers(&[axis]), integers(&[-1])];
        check_op(&gpu, Slice, &[[x.clone()].as_slice(), &ends].concat(), 1, 0.0);
    }
    for reduction in [ScatterReduction::Replace, ScatterReduction::Add, ScatterReduction::Maximum] {
        let x = random.tensor(&[4, 6]);
        let at = Tensor::from_vec([3, 2], vec![0i64, 1, -1, 1, 0, 3]).unwrap();
        let op = Scatter { place: ScatterPlace::Elements { axis: 0 }, reduction };
        check_op(&gpu, op, &[x.clone(), at, random.tensor(&[3, 2])], 1, 1e-6);
        let at = Tensor::from_vec([3, 1], vec![2i64, 0, 2]).unwrap();
        let op = Scatter { place: ScatterPlace::Slices, reduction };
        check_op(&gpu, op, &[x, at, random.tensor(&[3, 6])], 1, 1e-6);
    }
}

#[test]
fn sequences_shorter_than_others_agree() {
    let Some(gpu) = gpu("sequences_shorter_than_others_agree") else { return };
    for (cell, gates) in [(Cell::Lstm { coupled: false }, 4), (Cell::Gru { linear_before_reset: false }, 3)] {
        let mut d = Drawing::new(gates as u64);
        let x = d.input(&[5, 3, 7]);
        let (w, r, bias) =
            (d.weights(&[2, gates * 9, 7]), d.weights(&[2, gates * 9, 9]), d.weights(&[2, 2 * gates * 9]));
        let lengths = d.constant(Tensor::from_vec([3], vec![5i32, 1, 3]).unwrap());
        let one = [CellActivation::Sigmoid, CellActivation::Tanh, CellActivation::Tanh];
        let activations = one[..gates - 1].repeat(2);
        let direction = Direction::Bidirectional;
        let op = Recurrent { cell, direction, hidden_size: Some(9), activations, clip: Some(0.8), batch_first: false };
        let outputs = d.nodes(op, &[x, w, r, bias, lengths], gates - 1);
        d.graph.set_outputs(outputs);
        check(&gpu, d, 1e-5);
    }
}

/// `y = x[i]`, and how many elements of it are not zero, which only a run can tell.
fn gathered() -> Plan {
    let mut graph = Graph::new("gathered");
    let x = graph.add_input("x", TensorFact::of_constant_shape(DType::F32, &[4]));
    let i = graph.add_input("i", TensorFact::of_constant_shape(DType::I64, &[100]));
    let node = graph.add_node("gather", Gather { axis: 0 }.into(), vec![Some(x), Some(i)], vec!["y".into()]).unwrap();
    let y = graph.node(node).outputs[0];
    let node = graph.add_node("find", NonZero.into(), vec![Some(y)], vec!["found".into()]).unwrap();
    let found = graph.node(node).outputs[0];
    graph.set_outputs(vec![y, found]);
    Plan::new(graph).unwrap()
}

#[test]
fn what_the_gpu_lacks_runs_elsewhere_and_is_told() {
    let Some(gpu) = gpu("what_the_gpu_lacks_runs_elsewhere_and_is_told") else { return };
    let cpu = cpu(cutover_backend::CpuOptions { threads: 1, ..Default::default() }).unwrap();
    let strict = partition(Arc::clone(&gpu), Arc::clone(&cpu), true);
    let error = strict.compile(&gathered(), &CompileOptions::default()).err().unwrap().to_string();
    assert!(error.contains("'find' (NonZero)"), "{error}");
    let both = partition(Arc::clone(&gpu), cpu, false);
    let executable = both.compile(&gathered(), &CompileOptions::default()).unwrap();
    let places: Vec<(&str, &str, bool)> =
        executable.placement().nodes.iter().map(|n| (n.node.as_str(), n.backend, n.reason.is_empty())).collect();
    assert_eq!(places, [("gather", gpu.describe().backend, true), ("find", "cpu", false)]);
    let x = Tensor::from_vec([4], vec![0.0f32, 1.0, 2.0, 3.0]).unwrap();
    let i = Tensor::from_vec([100], (0..100).map(|i| i64::from(i % 5 == 0) * 2).collect::<Vec<i64>>()).unwrap();
    let inputs = [Value::Tensor(x.clone()), Value::Tensor(i)];
    let answers = run(&both, &gathered(), &inputs, "both");
    assert_eq!(answers[0].to_vec::<f32>().unwrap()[..6], [2.0, 0.0, 0.0, 0.0, 0.0, 2.0]);
    assert_eq!(answers[1].shape().dims(), [1, 20]);
    // An index out of range is an error that names the node, and the session goes on.
    let mut session = executable.session(SessionMemory::default()).unwrap();
    let wrong = Value::Tensor(Tensor::from_vec([100], vec![4i64; 100]).unwrap());
    let x = Value::Tensor(x);
    let mut outputs = [Output::Allocate(None), Output::Allocate(None)];
    let error = session.run(&[Input::Value(&x), Input::Value(&wrong)], &mut outputs, &RunContext::default());
    assert!(matches!(&error, Err(RunError::Op { node, .. }) if node == "gather"), "{error:?}");
    session.run(&[Input::Value(&inputs[0]), Input::Value(&inputs[1])], &mut outputs, &RunContext::default()).unwrap();
}

#[test]
fn equal_weights_of_two_models_are_one() {
    let Some(gpu) = gpu("equal_weights_of_two_models_are_one") else { return };
    let plan = |seed: u64| {
        let mut graph = Graph::new("product");
        let x = graph.add_input("x", TensorFact::of_constant_shape(DType::F32, &[2, 64]));
        let weight = |graph: &mut Graph, name: &str, seed: u64| {
            graph.add_constant(name, Constant::new(Random(seed).tensor(&[64, 64])))
        };
        let (shared, own) = (weight(&mut graph, "shared", 1), weight(&mut graph, "own", seed));
        let mut last = x;
        for (name, w) in [("a", shared), ("b", own)] {
            let op = MatMul { activation: None }.into();
            let node = graph.add_node(name, op, vec![Some(last), Some(w)], vec![format!("{name}.y")]).unwrap();
            last = graph.node(node).outputs[0];
        }
        graph.set_outputs(vec![last]);
        Plan::new(graph).unwrap()
    };
    let first = gpu.compile(&plan(101), &CompileOptions::default()).unwrap();
    let second = gpu.compile(&plan(102), &CompileOptions::default()).unwrap();
    let bytes = 64 * 64 * 4;
    // Some devices read through a copy.
    assert!(first.footprint().weight_bytes >= 2 * bytes);
    assert_eq!(first.footprint().weight_bytes, second.footprint().weight_bytes);
    assert!(second.footprint().shared_bytes >= bytes, "{:?}", second.footprint());
    let mut parts = std::collections::BTreeSet::new();
    [&first, &second].iter().for_each(|executable| {
        executable.weights(&mut |address, _| {
            parts.insert(address);
        })
    });
    assert_eq!(parts.len(), 3);
}

/// `y = e^x` of `count` elements, compiled.
fn exponential(gpu: &Arc<dyn Backend>, count: usize) -> Arc<dyn cutover_backend::Executable> {
    let mut graph = Graph::new("exponential");
    let x = graph.add_input("x", TensorFact::of_constant_shape(DType::F32, &[count]));
    let op = Unary { function: UnaryFunction::Exp }.into();
    let node = graph.add_node("exp", op, vec![Some(x)], vec!["y".into()]).unwrap();
    graph.set_outputs(vec![graph.node(node).outputs[0]]);
    gpu.compile(&Plan::new(graph).unwrap(), &CompileOptions::default()).unwrap()
}

/// Where the driver is imitated (`cargo xtask emulate cuda`), it also refuses what it is told to.
#[test]
fn what_a_driver_refuses_on_the_gpu_is_an_error() {
    let told = std::env::var("IMITATED_CUDA").unwrap_or_default();
    let Some(gpu) = gpu("what_a_driver_refuses_on_the_gpu_is_an_error") else { return };
    let x = Value::Tensor(Tensor::from_vec([8], vec![0.5f32; 8]).unwrap());
    let ask = |session: &mut Box<dyn cutover_backend::Session>| {
        session.run(&[Input::Value(&x)], &mut [Output::Allocate(None)], &RunContext::default())
    };
    let executable = exponential(&gpu, 8);
    let mut session = Arc::clone(&executable).session(SessionMemory::default()).unwrap();
    match told.as_str() {
        // The third run finds it so, replayed as it is, and every one after.
        "lost:3" => {
            let results: Vec<_> = (0..5).map(|_| ask(&mut session)).collect();
            let lost = results.iter().map(|result| matches!(result, Err(RunError::DeviceLost(_))));
            assert_eq!(lost.collect::<Vec<_>>(), [false, false, true, true, true], "{results:?}");
            let mut other = executable.session(SessionMemory::default()).unwrap();
            assert!(matches!(ask(&mut other), Err(RunError::DeviceLost(_))));
        }
        // Enough for one session of these, and for no other beside it.
        "memory:2500000" => {
            let large = exponential(&gpu, 200_000);
            let x = Value::Tensor(Tensor::from_vec([200_000], vec![0.5f32; 200_000]).unwrap());
            let run = |session: &mut Box<dyn cutover_backend::Session>| {
                session.run(&[Input::Value(&x)], &mut [Output::Allocate(None)], &RunContext::default())
            };
            let mut sessions = [(); 2].map(|()| Arc::clone(&large).session(SessionMemory::default()).unwrap());
            run(&mut sessions[0]).unwrap();
            let error = run(&mut sessions[1]).unwrap_err().to_string();
            assert!(error.starts_with("a session's arena needs "), "{error}");
            let [first, mut second] = sessions;
            drop(first);
            run(&mut second).unwrap();
        }
        _ => (0..4).for_each(|_| ask(&mut session).unwrap()),
    }
}
