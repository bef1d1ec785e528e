//! Kernels for NVIDIA's GPUs that were written by hand, as plans use them: each family against the reference at its edges, which networks take
//! which of them, and precisions below f32. Elsewhere than on CUDA these tests say that they are skipped.

use super::{
    gpu::{check, gpu, near},
    halves::rounded,
    networks::Drawing,
    support::{Random, answers, run, seeds},
};
use cutover_backend::{
    Backend, CompileOptions, Input, Numerics, OpTiming, Output, Phase, PhaseObserver, Precision, Profiler, RunContext,
    SessionMemory, reference,
};
use cutover_graph::{
    Op, Plan, TensorFact, ValueId,
    ops::{
        Activation, Binary, BinaryFunction, Cell, CellActivation, Conv, ConvInteger, DequantizeLinear, Direction, Gemm,
        GlobalPool, GlobalPoolFunction, Granularity, InstanceNorm, LayerNorm, MatMul, MatMulInteger, MatMulNBits,
        Padding, QuantizeLinear, Recurrent, Reduce, ReduceFunction, Softmax, SoftmaxFunction, Transpose, Unary,
        UnaryFunction, Window,
    },
};
use cutover_tensor::{DType, Tensor, Value};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

fn cuda(test: &str) -> Option<Arc<dyn Backend>> {
    let gpu = gpu(test)?;
    let is_cuda = gpu.describe().backend == "cuda";
    if !is_cuda {
        println!("skipped: {test} needs CUDA");
    }
    is_cuda.then_some(gpu)
}

#[derive(Default)]
struct Kernels(Mutex<BTreeSet<String>>);

impl Profiler for Kernels {
    fn record(&self, timing: OpTiming<'_>) {
        self.0.lock().unwrap().insert(timing.kernel.to_string());
    }
}

/// The kernels that a run of `plan` launches.
fn kernels(gpu: &Arc<dyn Backend>, plan: &Plan, inputs: &[Value], options: &CompileOptions) -> BTreeSet<String> {
    let executable = gpu.compile(plan, options).unwrap();
    let mut outputs: Vec<Output<'_>> = executable.signature().outputs.iter().map(|_| Output::Allocate(None)).collect();
    let mut session = executable.session(SessionMemory::default()).unwrap();
    let kernels = Kernels::default();
    let context = RunContext { profiler: Some(&kernels), ..RunContext::default() };
    let inputs: Vec<Input<'_>> = inputs.iter().map(Input::Value).collect();
    session.run(&inputs, &mut outputs, &context).unwrap();
    kernels.0.into_inner().unwrap()
}

/// `drawing` on both, and that its run launches `expected` among others, or nothing but.
fn check_by(gpu: &Arc<dyn Backend>, drawing: Drawing, expected: &[&str], tolerance: f32) {
    let plan = Plan::new(drawing.graph.clone()).unwrap();
    let found = kernels(gpu, &plan, &drawing.inputs, &CompileOptions::default());
    let expected: BTreeSet<String> = expected.iter().map(|name| name.to_string()).collect();
    assert_eq!(found, expected, "{}", drawing.said.join("; "));
    check(gpu, drawing, tolerance);
}

#[derive(Default)]
struct Times(Mutex<Vec<(Phase, Duration)>>);

impl PhaseObserver for Times {
    fn record(&self, phase: Phase, duration: Duration) {
        self.0.lock().unwrap().push((phase, duration));
    }
}

/// A run that is watched gives the same answers, from the first to one whose kernels are recorded, and its kernels took some time.
#[test]
fn runs_are_timed_on_the_gpu() {
    let Some(gpu) = cuda("runs_are_timed_on_the_gpu") else { return };
    let mut d = Drawing::new(12);
    let (x, w) = (d.input(&[20, 64]), d.weights(&[64, 72]));
    let y = d.node(MatMul { activation: None }, &[x, w]);
    let y = d.node(Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false }, &[y]);
    d.graph.set_outputs(vec![y]);
    let plan = Plan::new(d.graph).unwrap();
    let expected = run(&reference(), &plan, &d.inputs, "timed");
    let mut session =
        gpu.compile(&plan, &CompileOptions::default()).unwrap().session(SessionMemory::default()).unwrap();
    let inputs: Vec<Input<'_>> = d.inputs.iter().map(Input::Value).collect();
    for at in 0..4 {
        let times = Times::default();
        // An ordinary run between watched ones.
        let phases = (at != 2).then_some(&times as &dyn PhaseObserver);
        let mut outputs = [Output::Allocate(None)];
        session.run(&inputs, &mut outputs, &RunContext { phases, ..RunContext::default() }).unwrap();
        let [Output::Allocate(Some(Value::Tensor(answer)))] = &outputs else { panic!("a tensor expected") };
        near(answer, &expected[0], 1e-5, "timed");
        let times = times.0.into_inner().unwrap();
        let seen: Vec<Phase> = times.iter().map(|(phase, _)| *phase).collect();
        let all = [Phase::CopyIn, Phase::Kernels, Phase::CopyOut];
        assert_eq!(seen, if at == 2 { &[][..] } else { &all });
        assert!(times.get(1).is_none_or(|(_, kernels)| !kernels.is_zero()), "{times:?}");
    }
}

/// Of the GPU by its name; whoever has none is told so.
#[cfg(feature = "cuda")]
#[test]
fn energy_of_the_gpu_is_counted() {
    let Some(gpu) = cuda("energy_of_the_gpu_is_counted") else { return };
    let energy = cutover_backend::GpuEnergy::start(&gpu.describe().device).unwrap();
    let first = energy.joules().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let second = energy.joules().unwrap();
    assert!(first >= 0.0 && second > first, "{first} J, then {second} J");
    let error = cutover_backend::GpuEnergy::start("no such GPU").err().unwrap();
    assert!(error.contains("no such GPU"), "{error}");
}

fn window(strides: [usize; 2], dilations: [usize; 2], padding: usize) -> Window {
    let padding = Padding::Explicit { begin: vec![padding; 2], end: vec![padding; 2] };
    Window { kernel_shape: None, strides: strides.into(), dilations: dilations.into(), padding, ceil_mode: false }
}

#[test]
fn convolutions_agree() {
    let Some(gpu) = cuda("convolutions_agree") else { return };
    const DIRECT: &str = "convolution by hand";
    const WINOGRAD: &str = "Winograd convolution by hand";
    const DEPTHWISE: &str = "depthwise convolution by hand";
    // Of the input, the filters; strides, dilations, padding, groups.
    for (at, (input, filters, strides, dilations, padding, group, expected)) in [
        ([2, 5, 9, 7], [6, 5, 3, 3], [1, 1], [1, 1], 1, 1, DIRECT),
        ([1, 3, 17, 13], [8, 3, 7, 7], [2, 2], [1, 1], 3, 1, DIRECT),
        ([1, 40, 5, 6], [24, 40, 1, 1], [1, 1], [1, 1], 0, 1, DIRECT),
        ([3, 6, 8, 8], [10, 3, 3, 2], [2, 1], [1, 2], 1, 2, DIRECT),
        ([1, 64, 28, 28], [64, 64, 3, 3], [1, 1], [1, 1], 1, 1, WINOGRAD),
        ([2, 9, 11, 10], [9, 1, 3, 3], [1, 1], [1, 1], 1, 9, DEPTHWISE),
        ([1, 4, 12, 9], [8, 1, 5, 5], [2, 2], [1, 1], 2, 4, DEPTHWISE),
        ([1, 7, 10, 10], [7, 1, 3, 3], [1, 1], [2, 2], 2, 7, DEPTHWISE),
        ([1, 2, 1, 1], [3, 2, 1, 1], [1, 1], [1, 1], 0, 1, DIRECT),
    ]
    .into_iter()
    .enumerate()
    {
        let mut d = Drawing::new(at as u64 + 100);
        let x = d.input(&input);
        let (w, bias) = (d.weights(&filters), d.weights(&[filters[0]]));
        let activation = [None, Some(Activation::Relu), Some(Activation::HardSwish)][at % 3];
        let y = d.node(Conv { window: window(strides, dilations, padding), group, activation }, &[x, w, bias]);
        d.graph.set_outputs(vec![y]);
        check_by(&gpu, d, &[expected], 1e-5);
    }
    // One axis; filters that are computed; a residual.
    let mut d = Drawing::new(7);
    let x = d.input(&[2, 6, 31]);
    let w = d.input(&[4, 6, 3]);
    let padding = Padding::Explicit { begin: vec![1], end: vec![1] };
    let line = Window { kernel_shape: None, strides: vec![1], dilations: vec![1], padding, ceil_mode: false };
    let y = d.node(Conv { window: line.clone(), group: 1, activation: None }, &[x, w]);
    let (v, bias) = (d.weights(&[4, 4, 3]), d.weights(&[4]));
    let z = d.node(Conv { window: line, group: 1, activation: Some(Activation::Relu) }, &[y, v, bias, y]);
    d.graph.set_outputs(vec![z]);
    check_by(&gpu, d, &[DIRECT], 1e-5);
}

#[test]
fn direct_sums_are_kept_to_on_the_gpu() {
    let Some(gpu) = cuda("direct_sums_are_kept_to_on_the_gpu") else { return };
    let mut d = Drawing::new(8);
    let x = d.input(&[1, 64, 28, 28]);
    let w = d.weights(&[64, 64, 3, 3]);
    let y = d.node(Conv { window: window([1, 1], [1, 1], 1), group: 1, activation: None }, &[x, w]);
    d.graph.set_outputs(vec![y]);
    let options = CompileOptions { numerics: Numerics::Strict, ..CompileOptions::default() };
    let found = kernels(&gpu, &Plan::new(d.graph).unwrap(), &d.inputs, &options);
    assert_eq!(found.into_iter().collect::<Vec<_>>(), ["convolution by hand"]);
}

#[test]
fn rows_agree() {
    let Some(gpu) = cuda("rows_agree") else { return };
    // A warp's, a block's, and more than a block holds; fours and not.
    let lengths = [1, 2, 31, 32, 100, 1024, 1025, 4096, 8193];
    for (at, length) in lengths.into_iter().enumerate() {
        let mut d = Drawing::new(at as u64);
        let x = d.input(&[3, length]);
        let (scale, bias) = (d.weights(&[length]), d.weights(&[length]));
        let norm = LayerNorm { axis: -1, epsilon: 1e-5, centred: at % 2 == 0, with_deviation: false };
        let inputs = [x, scale, bias];
        let normed = d.node(norm, &inputs[..if at % 2 == 0 { 3 } else { 2 }]);
        let function = if at % 3 == 0 { SoftmaxFunction::LogSoftmax } else { SoftmaxFunction::Softmax };
        let soft = d.node(Softmax { function, axis: 1, coerced: false }, &[x]);
        d.graph.set_outputs(vec![normed, soft]);
        check_by(&gpu, d, &["layer normalization by hand", "softmax by hand"], 2e-5);

        use ReduceFunction::*;
        let mut d = Drawing::new(at as u64 + 50);
        let x = d.input(&[2, 2, length]);
        // What is reduced may be computed on the way.
        let y = d.node(Unary { function: UnaryFunction::Relu }, &[x]);
        let axes = d.constant(Tensor::from_vec([1], vec![2i64]).unwrap());
        let functions = [Sum, Mean, Max, Min, SumSquare, L1, L2, LogSum];
        let op = |function| Reduce { function, keep_dims: at % 2 == 0, noop_with_empty_axes: false };
        let reduced = [functions[at % 8], functions[(at + 3) % 8]].map(|function| d.node(op(function), &[y, axes]));
        d.graph.set_outputs(reduced.to_vec());
        check_by(&gpu, d, &["elementwise", "reduction by hand"], 1e-5);
    }
    // One kernel computes what it reduces.
    let mut d = Drawing::new(90);
    let x = d.input(&[4, 300]);
    let y = d.node(Unary { function: UnaryFunction::Exp }, &[x]);
    let axes = d.constant(Tensor::from_vec([1], vec![1i64]).unwrap());
    let y = d.node(Reduce { function: ReduceFunction::Sum, keep_dims: false, noop_with_empty_axes: false }, &[y, axes]);
    d.graph.set_outputs(vec![y]);
    check_by(&gpu, d, &["reduction by hand"], 1e-5);

    let mut d = Drawing::new(91);
    let x = d.input(&[2, 6, 5, 7]);
    let (scale, bias) = (d.weights(&[6]), d.weights(&[6]));
    let a = d.node(InstanceNorm { epsilon: 1e-4, groups: Some(3) }, &[x, scale, bias]);
    let b = d.node(InstanceNorm { epsilon: 1e-4, groups: None }, &[x, scale, bias]);
    let c = d.node(GlobalPool { function: GlobalPoolFunction::Average }, &[x]);
    let e = d.node(GlobalPool { function: GlobalPoolFunction::Max }, &[x]);
    d.graph.set_outputs(vec![a, b, c, e]);
    check_by(&gpu, d, &["channel normalization by hand", "global pool by hand"], 1e-5);

    // What is no number stays so.
    let values = vec![f32::NAN, 1.0, 2.0, f32::NEG_INFINITY, 3.0, f32::NEG_INFINITY, -1.0, -2.0, 5.0];
    let x = Tensor::from_vec([3, 3], values).unwrap();
    for function in [ReduceFunction::Max, ReduceFunction::Min, ReduceFunction::Sum] {
        let mut d = Drawing::new(92);
        let id = d.input(&[3, 3]);
        d.inputs = vec![Value::Tensor(x.clone())];
        let axes = d.constant(Tensor::from_vec([1], vec![1i64]).unwrap());
        let y = d.node(Reduce { function, keep_dims: false, noop_with_empty_axes: false }, &[id, axes]);
        let z = d.node(Softmax { function: SoftmaxFunction::Softmax, axis: 1, coerced: false }, &[id]);
        d.graph.set_outputs(vec![y, z]);
        check(&gpu, d, 1e-6);
    }
}

#[test]
fn transpositions_agree() {
    let Some(gpu) = cuda("transpositions_agree") else { return };
    for (shape, permutation) in [
        (vec![3, 5], vec![1, 0]),
        (vec![65, 130], vec![1, 0]),
        (vec![2, 64, 63], vec![0, 2, 1]),
        (vec![2, 6, 5, 8], vec![0, 2, 3, 1]),
        (vec![1, 5, 1, 8], vec![0, 3, 1, 2]),
    ] {
        let mut d = Drawing::new(5);
        let x = d.input(&shape);
        let y = d.node(Transpose { permutation: Some(permutation) }, &[x]);
        d.graph.set_outputs(vec![y]);
        check_by(&gpu, d, &["transposition by hand"], 0.0);
    }
    let mut d = Drawing::new(6);
    let x = d.input(&[33, 34]);
    let y = d.node(Unary { function: UnaryFunction::Abs }, &[x]);
    let y = d.node(Transpose { permutation: None }, &[y]);
    d.graph.set_outputs(vec![y]);
    check_by(&gpu, d, &["transposition by hand"], 0.0);
}

#[test]
fn recurrences_agree() {
    let Some(gpu) = cuda("recurrences_agree") else { return };
    let cells = [
        (Cell::Rnn, 1),
        (Cell::Gru { linear_before_reset: false }, 3),
        (Cell::Gru { linear_before_reset: true }, 3),
        (Cell::Lstm { coupled: false }, 4),
        (Cell::Lstm { coupled: true }, 4),
    ];
    for (at, ((cell, gates), hidden)) in
        cells.into_iter().flat_map(|cell| [1, 16, 70].map(|hidden| (cell, hidden))).enumerate()
    {
        let is_lstm = matches!(cell, Cell::Lstm { .. });
        let direction = [Direction::Forward, Direction::Reverse, Direction::Bidirectional][at % 3];
        let directions = if direction == Direction::Bidirectional { 2 } else { 1 };
        let (steps, batch, features, batch_first) = (1 + at % 5, 1 + at % 3, 1 + at % 4, at % 4 == 1);
        let mut d = Drawing::new(at as u64);
        let x = d.input(&if batch_first { [batch, steps, features] } else { [steps, batch, features] });
        let (w, r) =
            (d.weights(&[directions, gates * hidden, features]), d.weights(&[directions, gates * hidden, hidden]));
        let bias = d.weights(&[directions, 2 * gates * hidden]);
        let lengths = (0..batch).map(|n| (steps - n.min(steps)) as i32).collect::<Vec<_>>();
        let lengths = d.constant(Tensor::from_vec([batch], lengths).unwrap());
        let state = if batch_first { [batch, directions, hidden] } else { [directions, batch, hidden] };
        let mut inputs = vec![x, w, r, bias, lengths, d.input(&state)];
        if is_lstm {
            inputs.extend([d.input(&state), d.weights(&[directions, 3 * hidden])]);
        }
        let of_one: &[CellActivation] = match cell {
            Cell::Rnn => &[CellActivation::Relu],
            Cell::Gru { .. } => &[CellActivation::Sigmoid, CellActivation::Softsign],
            Cell::Lstm { .. } => {
                &[CellActivation::HardSigmoid { alpha: 0.2, beta: 0.5 }, CellActivation::Tanh, CellActivation::Tanh]
            }
        };
        let clip = (at % 2 == 0).then_some(0.7);
        let activations = of_one.repeat(directions);
        let op = Recurrent { cell, direction, hidden_size: Some(hidden), activations, clip, batch_first };
        let outputs = d.nodes(op, &inputs[..if at % 5 == 0 { 4 } else { inputs.len() }], if is_lstm { 3 } else { 2 });
        d.graph.set_outputs(outputs);
        check_by(&gpu, d, &["matrix product by hand", "recurrent by hand"], 1e-5);
    }
}

#[test]
fn attentions_agree() {
    let Some(gpu) = cuda("attentions_agree") else { return };
    for (at, [batch, heads, queries, keys, depth, width]) in [
        [1, 1, 1, 1, 1, 1],
        [2, 3, 33, 65, 16, 20],
        [1, 2, 64, 64, 64, 64],
        [2, 1, 5, 130, 7, 128],
        [2, 2, 33, 65, 16, 24],
        [1, 3, 70, 129, 40, 8],
    ]
    .into_iter()
    .enumerate()
    {
        let mut d = Drawing::new(at as u64);
        let q = d.input(&[batch, heads, queries, depth]);
        let [k, v] = [depth, width].map(|width| d.input(&[batch, keys, heads, width]));
        let turn = |d: &mut Drawing, x, order: [usize; 4]| d.node(Transpose { permutation: Some(order.into()) }, &[x]);
        let (k, v) = (turn(&mut d, k, [0, 2, 3, 1]), turn(&mut d, v, [0, 2, 1, 3]));
        let mut x = d.node(MatMul { activation: None }, &[q, k]);
        if at % 2 == 1 {
            let mask = d.input(&[batch, 1, queries, keys]);
            x = d.node(Binary { function: BinaryFunction::Add }, &[x, mask]);
        }
        let p = d.node(Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false }, &[x]);
        let y = d.node(MatMul { activation: None }, &[p, v]);
        let y = turn(&mut d, y, [0, 2, 1, 3]);
        d.graph.set_outputs(vec![y]);
        let (plan, inputs, said) = (Plan::new(d.graph.clone()).unwrap(), d.inputs.clone(), d.said.join("; "));
        check_by(&gpu, d, &["attention by hand"], 1e-5);
        // On tensor cores, where rows fill 16 bytes.
        let fills = depth % 8 == 0 && width % 8 == 0;
        for (precision, name, tolerance) in [(Precision::F16, ", f16", 2e-3), (Precision::BF16, ", bf16", 2e-2)] {
            let options = CompileOptions { precision, ..CompileOptions::default() };
            let found = kernels(&gpu, &plan, &inputs, &options);
            let kernel = format!("attention by hand{}", if fills { name } else { "" });
            assert!(found.contains(&kernel), "{said} in {precision:?}: {found:?}");
            let expected = run(&reference(), &plan, &inputs, &said);
            let actual = answers(gpu.compile(&plan, &options).unwrap(), &inputs, &said);
            near(&actual[0], &expected[0], tolerance, &said);
        }
    }
}

#[test]
fn blocks_of_few_bits_agree() {
    let Some(gpu) = cuda("blocks_of_few_bits_agree") else { return };
    for (at, (m, n, k, bits, block_size, has_points)) in [
        (1, 17, 64, 4, 32, false),
        (3, 40, 150, 4, 32, true),
        (8, 33, 256, 8, 128, true),
        (5, 9, 96, 2, 16, true),
        (9, 20, 64, 4, 32, true),
        (33, 70, 150, 4, 64, false),
        (70, 40, 96, 8, 32, true),
        (17, 24, 100, 2, 16, true),
    ]
    .into_iter()
    .enumerate()
    {
        let mut d = Drawing::new(at as u64);
        let blocks = usize::div_ceil(k, block_size);
        let bytes = |d: &mut Drawing, shape: &[usize]| {
            let bytes: Vec<u8> = (0..shape.iter().product()).map(|_| d.random.below(256) as u8).collect();
            d.constant(Tensor::from_vec(shape, bytes).unwrap())
        };
        let a = d.input(&[m, k]);
        let w = bytes(&mut d, &[n, blocks, block_size * bits / 8]);
        let mut inputs = vec![a, w, d.weights(&[n * blocks])];
        if has_points {
            inputs.push(bytes(&mut d, &[n * usize::div_ceil(blocks * bits, 8)]));
        }
        let y = d.node(MatMulNBits { n, k, bits, block_size, accuracy_level: 0 }, &inputs);
        d.graph.set_outputs(vec![y]);
        let (plan, inputs, said) = (Plan::new(d.graph.clone()).unwrap(), d.inputs.clone(), d.said.join("; "));
        check_by(&gpu, d, &["blocked product by hand"], 1e-5);
        // Of more rows on tensor cores.
        for (precision, name, tolerance) in
            [(Precision::F16, ", f16", 2e-3), (Precision::BF16, ", bf16", 2e-2), (Precision::Tf32, ", tf32", 2e-3)]
        {
            let options = CompileOptions { precision, ..CompileOptions::default() };
            let found = kernels(&gpu, &plan, &inputs, &options);
            let kernel = format!("blocked product by hand{}", if m > 8 { name } else { "" });
            assert!(found.contains(&kernel), "{said} in {precision:?}: {found:?}");
            let expected = run(&reference(), &plan, &inputs, &said);
            let actual = answers(gpu.compile(&plan, &options).unwrap(), &inputs, &said);
            near(&actual[0], &expected[0], tolerance, &said);
        }
    }
}

#[test]
fn products_of_bytes_agree() {
    let Some(gpu) = cuda("products_of_bytes_agree") else { return };
    for (at, (batch, m, k, n)) in
        [(1, 1, 4, 1), (2, 3, 33, 17), (1, 40, 70, 65), (3, 16, 64, 32)].into_iter().enumerate()
    {
        let mut d = Drawing::new(at as u64);
        let bytes = |d: &mut Drawing, shape: &[usize]| -> Vec<u8> {
            (0..shape.iter().product()).map(|_| d.random.below(256) as u8).collect()
        };
        let shape = [batch, m, k];
        let x = Tensor::from_vec(shape, bytes(&mut d, &shape)).unwrap();
        let id = d.graph.add_input("x", TensorFact::of_constant_shape(DType::U8, &shape));
        d.inputs.push(Value::Tensor(x));
        let w: Vec<i8> = bytes(&mut d, &[k, n]).into_iter().map(|byte| byte as i8).collect();
        let w = d.constant(Tensor::from_vec([k, n], w).unwrap());
        let zero = d.constant(Tensor::scalar(131u8));
        let zeros: Vec<i8> = (0..n).map(|n| (n % 3) as i8 - 1).collect();
        let zeros = d.constant(Tensor::from_vec([n], zeros).unwrap());
        let inputs = [id, w, zero, zeros];
        let sums = d.node(MatMulInteger, &inputs[..if at % 2 == 0 { 4 } else { 3 }]);
        d.graph.set_outputs(vec![sums]);
        let plan = Plan::new(d.graph.clone()).unwrap();
        let found = kernels(&gpu, &plan, &d.inputs, &CompileOptions::default());
        assert!(found.contains("integer product by hand"), "{found:?}");
        check(&gpu, d, 0.0);
    }
}

/// Bytes stay bytes from one convolution to the next: what quantizes a sum is the kernel's epilogue, whatever the activation and the residual.
#[test]
fn convolutions_of_bytes_agree() {
    let Some(gpu) = cuda("convolutions_of_bytes_agree") else { return };
    let per_tensor = Granularity { axis: 1, block_size: 0 };
    // Channels in, between and out; of the image.
    for (at, ([first, middle, last], size)) in
        [([3, 16, 24], [9, 7]), ([16, 32, 8], [6, 11]), ([5, 12, 6], [5, 5]), ([64, 64, 130], [7, 7])]
            .into_iter()
            .enumerate()
    {
        let mut d = Drawing::new(at as u64 + 40);
        let shape = [1 + at % 2, first, size[0], size[1]];
        let (of_image, of_filters) = if at % 2 == 0 { (DType::U8, DType::I8) } else { (DType::I8, DType::U8) };
        let bytes = |d: &mut Drawing, dtype: DType, shape: &[usize]| {
            let bytes: Vec<u8> = (0..shape.iter().product()).map(|_| d.random.below(256) as u8).collect();
            Tensor::from_bytes(dtype, shape, &bytes).unwrap()
        };
        let image = bytes(&mut d, of_image, &shape);
        let id = d.graph.add_input("x", TensorFact::of_constant_shape(of_image, &shape));
        d.inputs.push(Value::Tensor(image));
        let step = d.constant(Tensor::scalar(0.05f32));
        let zero = match of_image {
            DType::U8 => d.constant(Tensor::scalar(131u8)),
            _ => d.constant(Tensor::scalar(-3i8)),
        };
        let dequantized = |d: &mut Drawing, id| {
            d.node(DequantizeLinear { granularity: per_tensor, output_dtype: None }, &[id, step, zero])
        };
        let quantized = |d: &mut Drawing, id| {
            let op = QuantizeLinear { granularity: per_tensor, output_dtype: None, saturate: true, precision: None };
            d.node(op, &[id, step, zero])
        };
        let conv = |d: &mut Drawing, of: &[ValueId], filters: [usize; 4], stride: usize, group: usize, activation| {
            let w = bytes(d, of_filters, &filters);
            let w = d.constant(w);
            let scales = (0..filters[0]).map(|c| 0.0004 * (1 + c % 5) as f32).collect::<Vec<_>>();
            let scales = d.constant(Tensor::from_vec([filters[0]], scales).unwrap());
            let middle = if of_filters == DType::U8 { 128 } else { 0 };
            let zeros = Tensor::from_bytes(of_filters, [filters[0]], &vec![middle; filters[0]]).unwrap();
            let zeros = d.constant(zeros);
            let op = DequantizeLinear { granularity: Granularity { axis: 0, block_size: 0 }, output_dtype: None };
            let w = d.node(op, &[w, scales, zeros]);
            let bias = d.weights(&[filters[0]]);
            let window = window([stride; 2], [1, 1], filters[2] / 2);
            d.node(Conv { window, group, activation }, &[&[of[0], w, bias], &of[1..]].concat())
        };
        let x = dequantized(&mut d, id);
        let a = conv(&mut d, &[x], [middle, first, 3, 3], 1, 1, Some(Activation::Relu));
        let a = quantized(&mut d, a);
        let a = dequantized(&mut d, a);
        let b = conv(&mut d, &[a], [middle, 1, 3, 3], 1, middle, Some(Activation::Clip { low: 0.0, high: 6.0 }));
        let b = quantized(&mut d, b);
        let b = dequantized(&mut d, b);
        // Added to what was read before.
        let c = conv(&mut d, &[b, a], [middle, middle, 1, 1], 1, 1, None);
        let c = quantized(&mut d, c);
        let c = dequantized(&mut d, c);
        let grouped = if middle % 8 == 0 { 2 } else { 1 };
        let e = conv(&mut d, &[c], [last, middle / grouped, 3, 3], 2, grouped, None);
        let f = quantized(&mut d, e);
        let g = dequantized(&mut d, f);
        d.graph.set_outputs(vec![f, g]);
        let (plan, said) = (Plan::new(d.graph).unwrap(), d.said.join("; "));
        let found = kernels(&gpu, &plan, &d.inputs, &CompileOptions::default());
        let is_by_hand = |name: &str| name.contains("integer convolution by hand");
        assert!(found.contains("integer convolution by hand"), "{said}: {found:?}");
        assert!(found.contains("depthwise integer convolution by hand"), "{said}: {found:?}");
        // What is convolved and added is packed, and seen otherwise where it is added.
        let is_rest = |name: &str| ["packing", "quantization", "elementwise"].contains(&name);
        assert!(found.iter().all(|name| is_by_hand(name) || is_rest(name)), "{said}: {found:?}");
        let floats = |values: Vec<Tensor>| values[1].to_vec::<f32>().unwrap();
        let expected = floats(run(&reference(), &plan, &d.inputs, &said));
        let actual = floats(run(&gpu, &plan, &d.inputs, &said));
        // A sum between two steps may go either way, and what follows from it.
        let differ = actual.iter().zip(&expected).filter(|(a, e)| a != e).count();
        assert!(
            differ * 50 <= expected.len() && near_by(&actual, &expected, 0.051),
            "{differ} of {}: {said}",
            expected.len()
        );
    }
    // Sums themselves, of a picture whose zero point comes with it: exact.
    let mut d = Drawing::new(50);
    let shape = [2, 6, 7, 5];
    let x: Vec<u8> = (0..420).map(|_| d.random.below(256) as u8).collect();
    let w: Vec<i8> = (0..8 * 6 * 9).map(|_| d.random.below(256) as u8 as i8).collect();
    let id = d.graph.add_input("x", TensorFact::of_constant_shape(DType::U8, &shape));
    d.inputs.push(Value::Tensor(Tensor::from_vec(shape, x).unwrap()));
    let zero = d.graph.add_input("zero", TensorFact::of_constant_shape(DType::U8, &[]));
    d.inputs.push(Value::Tensor(Tensor::scalar(77u8)));
    let w = d.constant(Tensor::from_vec([8, 6, 3, 3], w).unwrap());
    let y = d.node(ConvInteger { window: window([1, 2], [1, 1], 1), group: 1 }, &[id, w, zero]);
    d.graph.set_outputs(vec![y]);
    let found = kernels(&gpu, &Plan::new(d.graph.clone()).unwrap(), &d.inputs, &CompileOptions::default());
    assert!(found.contains("integer convolution by hand"), "{found:?}");
    check(&gpu, d, 0.0);
}

fn near_by(actual: &[f32], expected: &[f32], most: f32) -> bool {
    actual.iter().zip(expected).all(|(a, e)| (a - e).abs() <= most)
}

/// `op` of `input`, in `precision`: by `kernel`, near what the reference makes of rounded operands, and how many bytes of weights there are.
fn check_precision(
    gpu: &Arc<dyn Backend>,
    op: impl Into<Op>,
    input: &Tensor,
    constants: &[Tensor],
    precision: Precision,
    kernel: &str,
) -> u64 {
    let op = op.into();
    let plan = |round: bool| {
        let mut d = Drawing::new(1);
        let x = d.input(input.shape());
        let mut ids = vec![x];
        for (at, tensor) in constants.iter().enumerate() {
            ids.push(d.constant(if round && at == 0 { rounded(tensor, precision) } else { tensor.clone() }));
        }
        let y = d.node(op.clone(), &ids);
        d.graph.set_outputs(vec![y]);
        Plan::new(d.graph).unwrap()
    };
    let said = format!("{op:?} of {} in {precision:?}", input.shape());
    let options = CompileOptions { precision, ..CompileOptions::default() };
    let inputs = [Value::Tensor(input.clone())];
    let found = kernels(gpu, &plan(false), &inputs, &options);
    assert!(found.contains(kernel), "{said}: {found:?}");
    let expected = run(&reference(), &plan(true), &[Value::Tensor(rounded(input, precision))], &said);
    let executable = gpu.compile(&plan(false), &options).unwrap();
    let bytes = executable.footprint().weight_bytes;
    near(&answers(executable, &inputs, &said)[0], &expected[0], 2e-5, &said);
    bytes
}

#[test]
fn precisions_on_the_gpu() {
    let Some(gpu) = cuda("precisions_on_the_gpu") else { return };
    for (precision, name, size) in
        [(Precision::F16, "f16", 2), (Precision::BF16, "bf16", 2), (Precision::Tf32, "tf32", 4)]
    {
        for seed in seeds(6) {
            let r = &mut Random(seed);
            // Tensor cores are for more rows than a few.
            let rows: &[usize] = if precision == Precision::Tf32 { &[33, 130] } else { &[1, 3, 33, 130] };
            let (m, k, n) = (r.pick(rows), 40 + r.below(90), 30 + r.below(200));
            let (input, bias) = (r.tensor(&[2, m, k]), r.tensor(&[n]));
            let kernel = format!("matrix product by hand, {name}");
            let op = MatMul { activation: Some(Activation::Relu) };
            let constants = [r.tensor(&[k, n]), bias.clone()];
            let bytes = check_precision(&gpu, op, &input, &constants, precision, &kernel);
            assert_eq!(bytes, (k * n * size).next_multiple_of(4) as u64 + 4 * n as u64, "{name}");
            let op = Gemm { alpha: 0.5, beta: 1.0, transpose_a: false, transpose_b: true, activation: None };
            let input = r.tensor(&[m, k]);
            check_precision(&gpu, op, &input, &[r.tensor(&[n, k]), bias], precision, &kernel);

            // Their channels do not fill 16 bytes, so that results are f32.
            let (channels, outputs, extent) = (r.pick(&[17, 20, 33]), 16 + r.below(30), r.pick(&[1, 3]));
            let shape = [1 + r.below(2), channels, 5 + r.below(6), 5 + r.below(9)];
            let input = r.tensor(&shape);
            let op = Conv { window: window([1 + r.below(2); 2], [1, 1], extent / 2), group: 1, activation: None };
            let filters = r.tensor(&[outputs, channels, extent, extent.max(3)]);
            let kernel = format!("convolution by hand, {name}");
            check_precision(&gpu, op, &input, &[filters, r.tensor(&[outputs])], precision, &kernel);
        }
    }
}

/// Products that a library is asked for first; where it is not there, or refuses (`IMITATED_CUDA`), our own kernels have them.
#[test]
fn large_products_agree() {
    let Some(gpu) = cuda("large_products_agree") else { return };
    let is_refused = std::env::var("IMITATED_CUDA").is_ok_and(|told| told.ends_with("-products"));
    let by = |suffix: &str| format!("matrix product by {}{suffix}", if is_refused { "hand" } else { "cuBLASLt" });
    let r = &mut Random(3);
    let matmul = |activation| MatMul { activation };
    let gemm = |alpha, transpose_a, transpose_b| Gemm { alpha, beta: 1.0, transpose_a, transpose_b, activation: None };
    let (m, k, n) = (515, 260, 513);
    let (x, w, bias) = (r.tensor(&[m, k]), r.tensor(&[k, n]), r.tensor(&[n]));
    let full = Precision::F32;
    check_precision(&gpu, matmul(Some(Activation::Relu)), &x, &[w.clone(), bias.clone()], full, &by(""));
    check_precision(&gpu, matmul(None), &r.tensor(&[4, 130, k]), std::slice::from_ref(&w), full, &by(""));
    check_precision(&gpu, gemm(0.5, false, true), &x, &[r.tensor(&[n, k]), bias.clone()], full, &by(""));
    check_precision(&gpu, gemm(1.0, true, true), &r.tensor(&[k, m]), &[r.tensor(&[n, k]), bias.clone()], full, &by(""));
    // A matrix each; and of those that their reader computes.
    check_precision(&gpu, matmul(None), &r.tensor(&[5, 257, 260]), &[r.tensor(&[5, 260, 259])], full, &by(""));
    for (precision, name) in [(Precision::F16, ", f16"), (Precision::BF16, ", bf16"), (Precision::Tf32, ", tf32")] {
        check_precision(&gpu, matmul(Some(Activation::Relu)), &x, &[w.clone(), bias.clone()], precision, &by(name));
        check_precision(&gpu, gemm(1.0, false, true), &x, &[r.tensor(&[n, k]), bias.clone()], precision, &by(name));
    }
    // Its GELU is that of the hyperbolic tangent; and a residual.
    check_precision(&gpu, matmul(Some(Activation::GeluTanh)), &x, &[w.clone(), bias.clone()], full, &by(""));
    check_precision(&gpu, matmul(Some(Activation::GeluTanh)), &x, std::slice::from_ref(&w), full, &by(""));
    let residual = r.tensor(&[m, n]);
    check_precision(&gpu, matmul(Some(Activation::Relu)), &x, &[w.clone(), residual.clone()], full, &by(""));
    let scaled = Gemm { alpha: 0.5, beta: -0.75, transpose_a: false, transpose_b: false, activation: None };
    check_precision(&gpu, scaled, &x, &[w.clone(), residual.clone()], full, &by(""));
    check_precision(&gpu, matmul(None), &x, &[w.clone(), residual], Precision::F16, &by(", f16"));
    // What it has no epilogue for is ours anyway.
    let hand = "matrix product by hand";
    check_precision(&gpu, matmul(Some(Activation::Gelu)), &x, &[w.clone(), bias.clone()], full, hand);
    let scaled = Gemm { alpha: 1.0, beta: 2.0, transpose_a: false, transpose_b: false, activation: None };
    check_precision(&gpu, scaled, &x, &[w, bias], full, hand);
}

/// Which of several tiles is fastest is measured where compiled kernels are kept, and kept with them; a choice that is torn is made again.
#[cfg(feature = "cuda")]
#[test]
fn choices_are_kept_on_the_gpu() {
    let Some(_) = cuda("choices_are_kept_on_the_gpu") else { return };
    let folder = std::env::temp_dir().join(format!("cutover-choices-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    let files = || {
        let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect();
        files.sort_by_key(|file| std::fs::metadata(file).unwrap().len());
        files
    };
    // A magic word, a digest and a digit.
    let is_choice = |file: &std::path::PathBuf| std::fs::metadata(file).unwrap().len() == 8 + 32 + 1;
    let run = |numerics: Numerics| {
        let options = cutover_backend::CudaOptions { cache: Some(folder.clone()), ..Default::default() };
        let gpu = cutover_backend::cuda(options).unwrap();
        let mut d = Drawing::new(4);
        let (x, w) = (d.input(&[40, 64]), d.weights(&[64, 72]));
        let y = d.node(MatMul { activation: None }, &[x, w]);
        d.graph.set_outputs(vec![y]);
        let plan = Plan::new(d.graph).unwrap();
        let expected = self::run(&reference(), &plan, &d.inputs, "a choice");
        let executable = gpu.compile(&plan, &CompileOptions { numerics, ..CompileOptions::default() }).unwrap();
        near(&answers(executable, &d.inputs, "a choice")[0], &expected[0], 1e-5, "a choice");
    };
    run(Numerics::Default);
    let first = files();
    assert_eq!(first.iter().filter(|file| is_choice(file)).count(), 1, "{first:?}");
    assert!(first.len() > 2, "{first:?}");
    // With the choice alone, only what was chosen is compiled again.
    first.iter().filter(|file| !is_choice(file)).for_each(|file| std::fs::remove_file(file).unwrap());
    run(Numerics::Default);
    assert_eq!(files().len(), 2, "{:?}", files());
    // Torn, it is as good as none.
    std::fs::write(&files()[0], b"cutover1").unwrap();
    run(Numerics::Default);
    assert_eq!(files().iter().filter(|file| is_choice(file)).count(), 1, "{:?}", files());
    assert_eq!(files().len(), first.len(), "{:?}", files());
    // Whoever wants sums in one order, whatever is faster, has nothing measured.
    std::fs::remove_dir_all(&folder).unwrap();
    run(Numerics::Strict);
    assert_eq!(files().iter().filter(|file| is_choice(file)).count(), 0, "{:?}", files());
    std::fs::remove_dir_all(&folder).unwrap();
}

/// In 16 bits pictures stay by channels from one convolution to the next: they are turned where they enter, and where others read them.
#[test]
fn pictures_by_channels_agree() {
    let Some(gpu) = cuda("pictures_by_channels_agree") else { return };
    for (precision, name, tolerance) in [(Precision::F16, "f16", 2e-3), (Precision::BF16, "bf16", 2e-2)] {
        for (at, size) in [[9, 7], [12, 8]].into_iter().enumerate() {
            let mut d = Drawing::new(at as u64);
            let x = d.input(&[1 + at, 16, size[0], size[1]]);
            let conv = |d: &mut Drawing, of: &[ValueId], filters: [usize; 4], stride: usize, group: usize| {
                let (w, bias) = (d.weights(&filters), d.weights(&[filters[0]]));
                // So that nothing grows from layer to layer.
                let scale = d.constant(Tensor::scalar(0.1f32));
                let w = d.node(Binary { function: BinaryFunction::Mul }, &[w, scale]);
                let window = window([stride; 2], [1, 1], filters[2] / 2);
                let inputs = [&[of[0], w, bias], &of[1..]].concat();
                d.node(Conv { window, group, activation: Some(Activation::Relu) }, &inputs)
            };
            let a = conv(&mut d, &[x], [32, 16, 3, 3], 1, 1);
            let b = conv(&mut d, &[a], [32, 1, 3, 3], 1, 32);
            // Added to what was read before; then with a stride, and read by others twice.
            let c = conv(&mut d, &[b, a], [32, 32, 1, 1], 1, 1);
            let e = conv(&mut d, &[c], [24, 32, 3, 3], 2, 1);
            let pooled = d.node(GlobalPool { function: GlobalPoolFunction::Average }, &[e]);
            let y = d.node(Unary { function: UnaryFunction::HardSwish }, &[e]);
            d.graph.set_outputs(vec![pooled, y]);
            let (graph, _) = cutover_graph::passes::declutter(d.graph, &Default::default()).unwrap();
            let plan = Plan::new(graph).unwrap();
            let said = d.said.join("; ");
            let options = CompileOptions { precision, ..CompileOptions::default() };
            let found = kernels(&gpu, &plan, &d.inputs, &options);
            for kernel in [format!("convolution by hand, {name}"), format!("depthwise convolution by hand, {name}")] {
                assert!(found.contains(&kernel), "{kernel}: {found:?}");
            }
            assert!(!found.contains("convolution by hand") && !found.contains("convolution"), "{found:?}");
            let expected = run(&reference(), &plan, &d.inputs, &said);
            let actual = answers(gpu.compile(&plan, &options).unwrap(), &d.inputs, &said);
            actual.iter().zip(&expected).for_each(|(a, e)| near(a, e, tolerance, &said));
        }
    }
}

#[test]
fn what_a_precision_is_not_for_stays_f32_on_the_gpu() {
    let Some(gpu) = cuda("what_a_precision_is_not_for_stays_f32_on_the_gpu") else { return };
    let mut r = Random(5);
    // Of a few rows memory is the limit, not what multiplies.
    let mut d = Drawing::new(1);
    let (x, w) = (d.input(&[1, 53]), d.weights(&[60, 53]));
    let y = d.node(Gemm { alpha: 1.0, beta: 1.0, transpose_a: false, transpose_b: true, activation: None }, &[x, w]);
    d.graph.set_outputs(vec![y]);
    let options = CompileOptions { precision: Precision::Tf32, ..CompileOptions::default() };
    let found = kernels(&gpu, &Plan::new(d.graph).unwrap(), &d.inputs, &options);
    assert_eq!(found.into_iter().collect::<Vec<_>>(), ["matrix product by hand"]);
    // Beyond f16's range; too few to matter.
    let large = Tensor::from_vec([40, 40], vec![1e6f32; 1600]).unwrap();
    let x = r.tensor(&[3, 40]);
    let weights = [large, r.tensor(&[40, 4])];
    for w in weights {
        let mut d = Drawing::new(1);
        let id = d.input(x.shape());
        d.inputs = vec![Value::Tensor(x.clone())];
        let w = d.constant(w);
        let y = d.node(MatMul { activation: None }, &[id, w]);
        d.graph.set_outputs(vec![y]);
        let options = CompileOptions { precision: Precision::F16, ..CompileOptions::default() };
        let found = kernels(&gpu, &Plan::new(d.graph.clone()).unwrap(), &d.inputs, &options);
        assert!(found.iter().all(|kernel| !kernel.contains("f16")), "{found:?}");
    }
    // And the processor has none of NVIDIA's.
    let cpu = cutover_backend::cpu(cutover_backend::CpuOptions { threads: 1, ..Default::default() }).unwrap();
    let mut d = Drawing::new(1);
    let x = d.input(&[1]);
    let y = d.node(Unary { function: UnaryFunction::Abs }, &[x]);
    d.graph.set_outputs(vec![y]);
    let options = CompileOptions { precision: Precision::Tf32, ..CompileOptions::default() };
    let error = cpu.compile(&Plan::new(d.graph).unwrap(), &options).err().unwrap().to_string();
    assert!(error.contains("tf32"), "{error}");
}

#[test]
fn halves_of_the_model_itself_agree() {
    let Some(gpu) = cuda("halves_of_the_model_itself_agree") else { return };
    let mut r = Random(6);
    let half = |tensor: Tensor| -> Tensor {
        let values: Vec<cutover_tensor::f16> =
            tensor.to_vec::<f32>().unwrap().into_iter().map(cutover_tensor::f16::from_f32).collect();
        Tensor::from_vec(tensor.shape().dims(), values).unwrap()
    };
    let (x, w, bias) = (half(r.tensor(&[1, 8, 9, 8])), half(r.tensor(&[16, 8, 3, 3])), half(r.tensor(&[16])));
    let mut graph = cutover_graph::Graph::new("halves");
    let id = graph.add_input("x", cutover_graph::TensorFact::of_constant_shape(DType::F16, &[1, 8, 9, 8]));
    let constants = [w, bias].map(|t| Some(graph.add_constant(t.shape().to_string(), cutover_graph::Constant::new(t))));
    let conv = Conv { window: window([1, 1], [1, 1], 1), group: 1, activation: Some(Activation::Relu) };
    let ids = std::iter::once(Some(id)).chain(constants).collect();
    let node = graph.add_node("conv", conv.into(), ids, vec!["y".into()]).unwrap();
    let y = graph.node(node).outputs[0];
    let soft = Softmax { function: SoftmaxFunction::Softmax, axis: 3, coerced: false };
    let node = graph.add_node("soft", soft.into(), vec![Some(y)], vec!["z".into()]).unwrap();
    graph.set_outputs(vec![y, graph.node(node).outputs[0]]);
    let (plan, inputs) = (Plan::new(graph).unwrap(), [Value::Tensor(x)]);
    let found = kernels(&gpu, &plan, &inputs, &CompileOptions::default());
    assert_eq!(found.into_iter().collect::<Vec<_>>(), ["convolution by hand, f16", "softmax by hand"]);
    let floats = |tensor: &Tensor| {
        let values: Vec<f32> =
            tensor.to_vec::<cutover_tensor::f16>().unwrap().into_iter().map(|v| v.to_f32()).collect();
        Tensor::from_vec(tensor.shape().dims(), values).unwrap()
    };
    let (actual, expected) = (run(&gpu, &plan, &inputs, "halves"), run(&reference(), &plan, &inputs, "halves"));
    actual.iter().zip(&expected).for_each(|(a, e)| near(&floats(a), &floats(e), 1e-3, "halves"));
}
