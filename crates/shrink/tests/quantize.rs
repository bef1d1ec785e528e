//! Quantization on small models of every shape that it treats differently, measured against the float model.

use cutover_backend::{
    Backend, CpuOptions, Input, OpTiming, Output, Profiler, RunContext, SessionMemory, cpu, reference,
};
use cutover_graph::{
    Constant, Dim, Graph, Plan, TensorFact, ValueId,
    onnx::{ImportOptions, encode, import_bytes},
    ops::{
        Binary, BinaryFunction, Concat, Conv, Flatten, Gather, Gemm, GlobalPool, GlobalPoolFunction, LayerNorm, MatMul,
        Op, Padding, Unary, UnaryFunction, Window,
    },
};
use cutover_shrink::{
    Budget, Comparison, Data, Method, Quantization, Sample, ShrinkError, Target, compare, constant_bytes, observe,
    plain,
    quantize::{
        ActivationType, BlockOptions, Calibration, DynamicOptions, StaticOptions, WeightRange, correct_bias, equalize,
        quantize_dynamic, quantize_static, quantize_weights, smooth, static_questions,
    },
    shrink,
};
use cutover_tensor::{DType, Tensor, Value};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

/// Numbers within about ±1, the same for the same seed.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| (next() + next() + next()) / 2.0).collect()
}

/// A graph in the making.
struct Model {
    graph: Graph,
    seed: u64,
}

impl Model {
    fn new() -> Model {
        Model { graph: Graph::new("model"), seed: 1 }
    }

    fn constant(&mut self, shape: &[usize], scale: f32) -> ValueId {
        self.seed += 1;
        let values = noise(self.seed, shape.iter().product()).into_iter().map(|v| v * scale).collect();
        let name = format!("constant{}", self.seed);
        self.graph.add_constant(name, Constant::new(Tensor::from_vec(shape, values).unwrap()))
    }

    fn node(&mut self, op: impl Into<Op>, inputs: &[ValueId]) -> ValueId {
        let name = format!("node{}", self.graph.node_count());
        let inputs = inputs.iter().map(|&i| Some(i)).collect();
        let node = self.graph.add_node(name.clone(), op.into(), inputs, vec![format!("{name}.y")]).unwrap();
        self.graph.node(node).outputs[0]
    }

    fn conv(&mut self, x: ValueId, channels: [usize; 2], kernel: usize, group: usize) -> ValueId {
        let [input, output] = channels;
        let fan = (input / group * kernel * kernel) as f32;
        let weight = self.constant(&[output, input / group, kernel, kernel], fan.powf(-0.5) * 2.0);
        let bias = self.constant(&[output], 0.2);
        let pads = vec![kernel / 2; 2];
        let window = Window {
            kernel_shape: Some(vec![kernel; 2]),
            strides: vec![1; 2],
            dilations: vec![1; 2],
            padding: Padding::Explicit { begin: pads.clone(), end: pads },
            ceil_mode: false,
        };
        self.node(Conv { window, group, activation: None }, &[x, weight, bias])
    }

    fn relu(&mut self, x: ValueId) -> ValueId {
        self.node(Unary { function: UnaryFunction::Relu }, &[x])
    }

    fn add(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.node(Binary { function: BinaryFunction::Add }, &[a, b])
    }

    fn finish(mut self, y: ValueId) -> Graph {
        self.graph.set_outputs(vec![y]);
        plain(self.graph).unwrap()
    }
}

const CLASSES: usize = 10;

/// `image [N, 3, 12, 12]` through a residual, a depthwise and a concatenated convolution to `CLASSES` scores.
fn network() -> Graph {
    network_of(16)
}

/// With so many channels.
fn network_of(width: usize) -> Graph {
    let mut m = Model::new();
    let x =
        m.graph.add_input("image", TensorFact::new(DType::F32, vec![Dim::symbol("N"), 3.into(), 12.into(), 12.into()]));
    let a = m.conv(x, [3, width], 3, 1);
    let a = m.relu(a);
    let b = m.conv(a, [width, width], 3, 1);
    let sum = m.add(a, b);
    let sum = m.relu(sum);
    let depthwise = m.conv(sum, [width, width], 3, width);
    let depthwise = m.relu(depthwise);
    let c = m.conv(depthwise, [width, 8], 1, 1);
    let joined = m.node(Concat { axis: 1 }, &[sum, c]);
    let pooled = m.node(GlobalPool { function: GlobalPoolFunction::Average }, &[joined]);
    let flat = m.node(Flatten { axis: 1 }, &[pooled]);
    let (weight, bias) = (m.constant(&[CLASSES, width + 8], 0.8), m.constant(&[CLASSES], 0.1));
    let gemm = Gemm { alpha: 1.0, beta: 1.0, transpose_a: false, transpose_b: true, activation: None };
    let scores = m.node(gemm, &[flat, weight, bias]);
    m.finish(scores)
}

fn images(count: usize) -> Vec<Sample> {
    let sample = |i| {
        let pixels = noise(1000 + i as u64, 2 * 3 * 144);
        vec![("image".to_string(), Value::from(Tensor::from_vec([2, 3, 12, 12], pixels).unwrap()))]
    };
    (0..count).map(sample).collect()
}

const WIDTH: usize = 64;
const WORDS: usize = 50;

/// `ids [N, T]` through a table, a layer norm and two products with a residual; some channels of the norm are `outlier` times the others.
fn encoder(outlier: f32) -> Graph {
    let mut m = Model::new();
    let ids = m.graph.add_input("ids", TensorFact::new(DType::I64, vec![Dim::symbol("N"), Dim::symbol("T")]));
    let table = m.constant(&[WORDS, WIDTH], 1.0);
    let rows = m.node(Gather { axis: 0 }, &[table, ids]);
    let gain = (0..WIDTH).map(|i| if i.is_multiple_of(17) { outlier } else { 1.0 }).collect();
    let gain = m.graph.add_constant("gain", Constant::new(Tensor::from_vec([WIDTH], gain).unwrap()));
    let shift = m.constant(&[WIDTH], 0.1);
    let norm = LayerNorm { axis: -1, epsilon: 1e-5, centred: true, with_deviation: false };
    let normed = m.node(norm, &[rows, gain, shift]);
    let (w1, b1, w2) = (m.constant(&[WIDTH, 96], 0.3), m.constant(&[96], 0.1), m.constant(&[96, WIDTH], 0.3));
    let product = m.node(MatMul { activation: None }, &[normed, w1]);
    let hidden = m.add(product, b1);
    let hidden = m.node(Unary { function: UnaryFunction::Tanh }, &[hidden]);
    let back = m.node(MatMul { activation: None }, &[hidden, w2]);
    let y = m.add(back, rows);
    m.finish(y)
}

fn texts(count: usize) -> Vec<Sample> {
    let sample = |i: usize| {
        let ids = (0..2 * 7).map(|t| ((i * 13 + t * 29 + t * t) % WORDS) as i64).collect();
        vec![("ids".to_string(), Value::from(Tensor::from_vec([2, 7], ids).unwrap()))]
    };
    (0..count).map(sample).collect()
}

fn on_cpu() -> Arc<dyn Backend> {
    cpu(CpuOptions { threads: 1, ..CpuOptions::default() }).unwrap()
}

fn quiet(_: &str, _: usize, _: usize) {}

/// What `after` says on both backends, which must agree with each other, and read back from its file, which must not differ.
fn measured(before: &Graph, after: &Graph, samples: &[Sample]) -> Comparison {
    let read = import_bytes(encode(after).unwrap().into(), None, &ImportOptions::default()).unwrap();
    let again = compare(after, &read, &reference(), samples).unwrap();
    assert!(again.outputs.iter().all(|o| o.absolute_error_max == 0.0), "the file says something else: {again:?}");
    let here = compare(before, after, &on_cpu(), samples).unwrap();
    let plainly = compare(before, after, &reference(), samples).unwrap();
    for (a, b) in here.outputs.iter().zip(&plainly.outputs) {
        let same = a.sqnr_db == b.sqnr_db || (a.sqnr_db - b.sqnr_db).abs() < 1.5;
        assert!(same, "{} dB on cpu, {} dB by reference", a.sqnr_db, b.sqnr_db);
    }
    here
}

fn statically(graph: &Graph, samples: &[Sample], options: &StaticOptions) -> Graph {
    let questions = static_questions(graph, &options.exclude).unwrap();
    let histograms = options.calibration != Calibration::MinMax;
    let observations = observe(graph, &questions, histograms, &reference(), samples, &quiet).unwrap();
    quantize_static(graph.clone(), &observations, options).unwrap().0
}

/// The kernels that ran.
fn kernels(graph: &Graph, sample: &Sample) -> Vec<String> {
    #[derive(Default)]
    struct Seen(Mutex<Vec<String>>);
    impl Profiler for Seen {
        fn record(&self, timing: OpTiming<'_>) {
            self.0.lock().unwrap().push(timing.kernel.to_string());
        }
    }
    let seen = Seen::default();
    let executable = on_cpu().compile(&Plan::new(graph.clone()).unwrap(), &Default::default()).unwrap();
    let mut session = executable.session(SessionMemory::default()).unwrap();
    let context = RunContext { profiler: Some(&seen), ..RunContext::default() };
    session.run(&[Input::Value(&sample[0].1)], &mut [Output::Allocate(None)], &context).unwrap();
    drop(session);
    seen.0.into_inner().unwrap()
}

#[test]
fn static_quantization_runs_on_integers_from_end_to_end() {
    let (graph, samples) = (network(), images(6));
    let mut results = HashMap::new();
    for activations in [ActivationType::U8, ActivationType::I8, ActivationType::SymmetricI8] {
        for calibration in
            [Calibration::MinMax, Calibration::Percentile(1e-4), Calibration::Entropy, Calibration::LeastError]
        {
            let options = StaticOptions { activations, calibration, ..StaticOptions::default() };
            let quantized = statically(&graph, &samples, &options);
            let sqnr = measured(&graph, &quantized, &samples).outputs[0].sqnr_db;
            let least = if calibration == Calibration::Entropy { 12.0 } else { 25.0 };
            assert!(sqnr > least && sqnr.is_finite(), "{activations:?}, {calibration:?}: {sqnr} dB");
            results.insert(format!("{activations:?}{calibration:?}"), sqnr);
        }
    }
    // A ReLU's output has no negative half that signed symmetric bytes would be of use for.
    assert!(results["U8MinMax"] > results["SymmetricI8MinMax"]);

    let quantized = statically(&graph, &samples, &StaticOptions::default());
    let seen = kernels(&quantized, &samples[0]);
    for kernel in
        ["integer convolution", "integer depthwise convolution", "integer sum", "integer pool", "integer product"]
    {
        assert!(seen.iter().any(|k| k == kernel), "no {kernel} in {seen:?}");
    }
    assert!(!seen.iter().any(|k| k == "reference" || k == "convolution" || k == "elementwise"), "{seen:?}");
}

#[test]
fn channels_with_scales_of_their_own_lose_less() {
    // One channel fifty times the others, and made small again by what comes after: a scale for all leaves the others few of the steps.
    let mut m = Model::new();
    let x = m.graph.add_input("x", TensorFact::new(DType::F32, vec![Dim::symbol("N"), 32.into()]));
    let uneven = |m: &mut Model, power: f32, rows: bool| {
        let values = noise(9, 32 * 16).into_iter().enumerate().map(|(i, w)| {
            let channel = if rows { i / 32 } else { i % 16 };
            if channel == 0 { w * power } else { w }
        });
        let shape = if rows { [16, 32] } else { [32, 16] };
        let tensor = Tensor::from_vec(shape, values.collect()).unwrap();
        m.graph.add_constant(format!("uneven{rows}"), Constant::new(tensor))
    };
    let gemm = Gemm { alpha: 1.0, beta: 1.0, transpose_a: false, transpose_b: true, activation: None };
    let (first, second) = (uneven(&mut m, 50.0, true), uneven(&mut m, 0.02, false));
    let hidden = m.node(gemm.clone(), &[x, first]);
    let hidden = m.relu(hidden);
    let y = m.node(gemm, &[hidden, second]);
    let graph = m.finish(y);
    let last = cutover_shrink::Product::all(&graph)[1].node;
    let sample =
        |i: u64| vec![("x".to_string(), Value::from(Tensor::from_vec([8, 32], noise(50 + i, 8 * 32)).unwrap()))];
    let samples: Vec<Sample> = (0..4).map(sample).collect();
    let sqnr = |per_channel| {
        let exclude = [graph.node(last).name.clone()].into();
        let options = StaticOptions { per_channel, exclude, ..StaticOptions::default() };
        measured(&graph, &statically(&graph, &samples, &options), &samples).outputs[0].sqnr_db
    };
    assert!(sqnr(true) > sqnr(false) + 3.0, "{} and {}", sqnr(true), sqnr(false));
}

#[test]
fn excluded_nodes_stay_as_they_are() {
    let (graph, samples) = (network(), images(2));
    let all: Vec<String> =
        cutover_shrink::Product::all(&graph).iter().map(|p| graph.node(p.node).name.clone()).collect();
    let exclude = all.iter().cloned().collect();
    let nothing = statically(&graph, &samples, &StaticOptions { exclude, ..StaticOptions::default() });
    assert_eq!(compare(&graph, &nothing, &reference(), &samples).unwrap().outputs[0].absolute_error_max, 0.0);
    assert!(nothing.nodes().all(|(_, n)| n.op.name() != "QuantizeLinear"));
    let exclude = [all[1].clone()].into();
    let most = statically(&graph, &samples, &StaticOptions { exclude, ..StaticOptions::default() });
    let weights = |g: &Graph| {
        g.nodes().filter(|(_, n)| n.op.name() == "Conv" && g.constant(n.inputs[1].unwrap()).is_some()).count()
    };
    assert_eq!(weights(&most), 1, "one convolution keeps its weight of floats");
}

#[test]
fn dynamic_quantization_needs_no_ranges() {
    let (graph, samples) = (encoder(1.0), texts(5));
    let (quantized, report) = quantize_dynamic(graph.clone(), &DynamicOptions::default()).unwrap();
    assert_eq!((report.quantized.len(), report.kept.len()), (3, 0));
    assert!((report.bytes_after as f64) < 0.3 * report.bytes_before as f64, "{report:?}");
    assert_eq!(constant_bytes(&quantized), report.bytes_after);
    assert!(measured(&graph, &quantized, &samples).outputs[0].sqnr_db > 35.0);
    let (graph, samples) = (network(), images(3));
    let (quantized, report) =
        quantize_dynamic(graph.clone(), &DynamicOptions { elements_min: 1, ..DynamicOptions::default() }).unwrap();
    assert_eq!((report.quantized.len(), report.kept.len()), (1, 4), "a Gemm; convolutions are named");
    assert!(measured(&graph, &quantized, &samples).outputs[0].sqnr_db > 35.0);
}

#[test]
fn weights_in_blocks_of_few_bits() {
    let (graph, samples) = (encoder(1.0), texts(8));
    let store = |bits, block, gptq: bool| {
        let options = BlockOptions { bits, block, ..BlockOptions::default() };
        let questions = options.questions(&graph);
        let observations = match gptq {
            true => observe(&graph, &questions, false, &reference(), &samples, &quiet).unwrap(),
            false => HashMap::new(),
        };
        let (small, report) = quantize_weights(graph.clone(), &observations, &options).unwrap();
        assert_eq!((report.quantized.len(), report.kept.len()), (3, 0));
        (report.bytes_after as f64 / report.bytes_before as f64, measured(&graph, &small, &samples).outputs[0].sqnr_db)
    };
    let ((four, coarse), (eight, fine)) = (store(4, 32, false), store(8, 32, false));
    assert!(four < 0.2 && eight < 0.35, "{four}, {eight}");
    assert!(coarse > 17.0 && fine > coarse + 20.0, "{coarse} dB, {fine} dB");
    assert!(store(4, 16, false).1 > coarse, "smaller blocks fit closer");
    assert!(store(4, 32, true).1 > coarse, "GPTQ makes up for errors");
    for (bits, block, part) in [(3, 32, "3 bits"), (4, 24, "blocks of 24"), (4, 8, "blocks of 8")] {
        let options = BlockOptions { bits, block, ..BlockOptions::default() };
        let error = quantize_weights(graph.clone(), &HashMap::new(), &options).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn balancing_leaves_the_float_model_alone_and_helps_the_quantized() {
    // Outliers of an activation.
    let (graph, samples) = (encoder(30.0), texts(6));
    let questions = static_questions(&graph, &Default::default()).unwrap();
    let observations = observe(&graph, &questions, false, &reference(), &samples, &quiet).unwrap();
    let mut smoothed = graph.clone();
    assert_eq!(smooth(&mut smoothed, &observations, 0.5).unwrap(), 1);
    assert!(compare(&graph, &smoothed, &reference(), &samples).unwrap().outputs[0].sqnr_db > 110.0);
    let sqnr = |g: &Graph| {
        let quantized = statically(g, &samples, &StaticOptions::default());
        compare(&graph, &quantized, &reference(), &samples).unwrap().outputs[0].sqnr_db
    };
    assert!(sqnr(&smoothed) > sqnr(&graph) + 3.0, "{} and {}", sqnr(&smoothed), sqnr(&graph));
    assert!(matches!(smooth(&mut smoothed, &observations, 1.5), Err(ShrinkError::Option(_))));

    // Channels of very different weights, a scale for a whole tensor.
    let samples = images(4);
    let mut m = Model::new();
    let x = m.graph.add_input("image", TensorFact::new(DType::F32, vec![2.into(), 3.into(), 12.into(), 12.into()]));
    let y = m.conv(x, [3, 16], 3, 1);
    let y = m.relu(y);
    let y = m.conv(y, [16, 16], 3, 16);
    let y = m.relu(y);
    let y = m.conv(y, [16, 8], 1, 1);
    let mut graph = m.finish(y);
    let products = cutover_shrink::Product::all(&graph);
    for (at, axis) in [(0, 0), (2, 1)] {
        let tensor = graph.constant(products[at].weight).unwrap().tensor.clone();
        let channels = cutover_shrink::quantize::Channels::along(tensor.shape(), axis);
        let power = |channel: usize| if channel.is_multiple_of(3) { 20f32 } else { 1.0 };
        let mut values = tensor.to_vec::<f32>().unwrap();
        for (i, w) in values.iter_mut().enumerate() {
            let power = power(channels.of(i));
            *w *= if at == 0 { power } else { 1.0 / power };
        }
        let tensor = Tensor::from_vec(tensor.shape().clone(), values).unwrap();
        let name = format!("scaled{at}");
        let scaled = graph.add_constant(name, Constant::new(tensor));
        graph.node_mut(products[at].node).inputs[1] = Some(scaled);
    }
    let mut equalized = graph.clone();
    assert_eq!(equalize(&mut equalized).unwrap(), 2);
    assert!(compare(&graph, &equalized, &reference(), &samples).unwrap().outputs[0].sqnr_db > 110.0);
    let sqnr = |g: &Graph| {
        let options = StaticOptions { per_channel: false, ..StaticOptions::default() };
        compare(&graph, &statically(g, &samples, &options), &reference(), &samples).unwrap().outputs[0].sqnr_db
    };
    assert!(sqnr(&equalized) > sqnr(&graph) + 2.0, "{} and {}", sqnr(&equalized), sqnr(&graph));
}

#[test]
fn corrected_biases_bring_the_mean_back() {
    let mut m = Model::new();
    let x = m.graph.add_input("x", TensorFact::new(DType::F32, vec![Dim::symbol("N"), 32.into()]));
    let (weight, bias) = (m.constant(&[32, 8], 0.5), m.constant(&[8], 0.1));
    let gemm = Gemm { alpha: 1.0, beta: 1.0, transpose_a: false, transpose_b: false, activation: None };
    let y = m.node(gemm, &[x, weight, bias]);
    let graph = m.finish(y);
    // Inputs with a mean far from 0.
    let samples: Vec<Sample> = (0..4)
        .map(|i| {
            let values = noise(77 + i, 16 * 32).into_iter().map(|v| v * 0.3 + 2.0).collect();
            vec![("x".to_string(), Value::from(Tensor::from_vec([16, 32], values).unwrap()))]
        })
        .collect();
    let options = StaticOptions { per_channel: false, ..StaticOptions::default() };
    let questions = static_questions(&graph, &options.exclude).unwrap();
    let observations = observe(&graph, &questions, false, &reference(), &samples, &quiet).unwrap();
    let mut corrected = graph.clone();
    correct_bias(&mut corrected, &observations, false, WeightRange::Largest).unwrap();
    let sqnr = |g: &Graph| {
        let quantized = statically(g, &samples, &options);
        compare(&graph, &quantized, &reference(), &samples).unwrap().outputs[0].sqnr_db
    };
    assert!(sqnr(&corrected) > sqnr(&graph) + 3.0, "{} and {}", sqnr(&corrected), sqnr(&graph));
}

#[test]
fn a_budget_gives_layers_back_until_it_is_met() {
    let (graph, samples) = (network_of(96), images(4));
    let recipe = |budget| Quantization {
        method: Method::Static(StaticOptions { per_channel: false, ..StaticOptions::default() }),
        smooth: None,
        equalize: false,
        correct_bias: false,
        gptq: false,
        target: Target::Size,
        detail: true,
        budget,
    };
    let data = Data { samples, labels: None };
    let run = |budget| shrink(&graph, &recipe(budget), &data, &on_cpu(), &quiet).unwrap().report;
    let free = run(None);
    assert!(free.within_budget && free.sensitivity.is_empty() && free.tried.len() == 1);
    let reached = free.evaluation.sqnr_db();
    let quantized = |layer: &&String| free.quantized.contains(layer);
    let names: Vec<String> =
        cutover_shrink::Product::all(&graph).iter().map(|p| graph.node(p.node).name.clone()).collect();
    let products = names.iter().filter(quantized).count();
    assert!(products >= 4 && free.layer_sqnr_db.len() >= products, "{free:?}");
    assert!(free.layer_sqnr_db.iter().all(|(_, sqnr)| (20.0..80.0).contains(sqnr)), "{:?}", free.layer_sqnr_db);
    assert!(free.ranges.iter().all(|r| r.chosen == r.seen && r.histogram.iter().sum::<u64>() > 0), "{:?}", free.ranges);
    let tight = run(Some(Budget::SqnrDb(reached + 4.0)));
    assert!(tight.within_budget && tight.evaluation.sqnr_db() >= reached + 4.0, "{tight:?}");
    assert!(tight.quantized.len() < free.quantized.len() && tight.bytes_after > free.bytes_after);
    assert_eq!(tight.sensitivity.len(), products, "one for each that was quantized");
    assert!(tight.sensitivity.is_sorted_by(|a, b| a.evaluation.sqnr_db() <= b.evaluation.sqnr_db()));
    assert!(run(Some(Budget::SqnrDb(reached - 1.0))).sensitivity.is_empty(), "nothing to search for");
    assert!(run(Some(Budget::Cosine(1.0))).within_budget, "all in floats is the same model");

    // Labels that the model itself gives: it is right on all of them.
    let labels = vec![vec![0, 0]; 4];
    let labelled = Data { labels: Some(labels), ..data.clone() };
    let report =
        shrink(&graph, &recipe(Some(Budget::AccuracyChange(-1.0))), &labelled, &on_cpu(), &quiet).unwrap().report;
    let (before, after) = report.evaluation.accuracy.unwrap();
    assert!((0.0..=1.0).contains(&before) && (0.0..=1.0).contains(&after));
    let unlabelled =
        shrink(&graph, &recipe(Some(Budget::AccuracyChange(-0.1))), &data, &on_cpu(), &quiet).err().unwrap();
    assert!(unlabelled.to_string().contains("labels"), "{unlabelled}");
}

#[test]
fn layers_that_win_nothing_in_integers_stay() {
    let (graph, samples) = (network(), images(3));
    let data = Data { samples: samples.clone(), labels: None };
    let products = cutover_shrink::Product::all(&graph);
    let names: Vec<&String> = products.iter().map(|p| &graph.node(p.node).name).collect();
    for (target, reason) in [
        (Target::Size, "it takes no fewer bytes in integers"),
        (Target::Latency, "it is no faster in integers here"),
        (Target::Memory, "it takes no less memory in integers here"),
    ] {
        for method in [
            Method::Static(StaticOptions::default()),
            Method::Dynamic(DynamicOptions::default()),
            Method::Weights(BlockOptions { block: 16, ..BlockOptions::default() }),
        ] {
            let recipe = Quantization {
                method,
                smooth: None,
                equalize: false,
                correct_bias: false,
                gptq: false,
                target,
                detail: false,
                budget: None,
            };
            // Which layers stay depends on the machine: that they are named and that the rest is quantized does not.
            let shrunk = shrink(&graph, &recipe, &data, &on_cpu(), &quiet).unwrap();
            let report = &shrunk.report;
            let losing: Vec<&String> =
                report.kept.iter().filter(|kept| kept.reason == reason).map(|kept| &kept.name).collect();
            assert!(losing.iter().all(|name| names.contains(name) && !report.quantized.contains(name)), "{report:?}");
            assert!(report.costs.iter().all(|cost| cost.floats > 0.0 && cost.integers > 0.0), "{report:?}");
            if target != Target::Latency {
                // Each cost less in floats, or integers won nothing at all.
                let loses = |name: &String| report.costs.iter().any(|c| c.node == *name && c.integers >= c.floats);
                assert!(report.quantized.is_empty() || losing.iter().all(|name| loses(name)), "{report:?}");
            }
            // The scales and nodes of a few hundred weights take more than their integers win.
            let is_static = matches!(recipe.method, Method::Static(_));
            assert!(!is_static || target != Target::Size || !losing.is_empty(), "{report:?}");
            measured(&graph, &shrunk.graph, &samples);
        }
    }
}

#[test]
fn bad_data_and_weights_are_named() {
    let graph = network();
    let recipe = Quantization {
        method: Method::Static(StaticOptions::default()),
        smooth: None,
        equalize: true,
        correct_bias: true,
        gptq: false,
        target: Target::Size,
        detail: true,
        budget: None,
    };
    let refused =
        |graph: &Graph, data: Data| shrink(graph, &recipe, &data, &on_cpu(), &quiet).err().unwrap().to_string();
    assert!(refused(&graph, Data::default()).contains("at least one sample"));
    let mut pixels = noise(5, 2 * 3 * 144);
    pixels[7] = f32::NAN;
    let sample = vec![("image".to_string(), Value::from(Tensor::from_vec([2, 3, 12, 12], pixels).unwrap()))];
    let message = refused(&graph, Data { samples: vec![images(1).remove(0), sample], labels: None });
    assert!(message.contains("sample 1") && message.contains("'image'") && message.contains("NaN"), "{message}");
    let message = refused(&graph, Data { samples: images(1), labels: Some(vec![vec![0, 10]]) });
    assert!(message.contains("label of 10") && message.contains("classes 0 to 9"), "{message}");
    let message = refused(&graph, Data { samples: vec![Vec::new()], labels: None });
    assert!(message.contains("no input 'image'"), "{message}");

    let mut broken = encoder(1.0);
    let product = cutover_shrink::Product::all(&broken)[0];
    let mut values = broken.constant(product.weight).unwrap().tensor.to_vec::<f32>().unwrap();
    values[9] = f32::INFINITY;
    let tensor = Tensor::from_vec([WIDTH, 96], values).unwrap();
    let weight = broken.add_constant("broken", Constant::new(tensor));
    broken.node_mut(product.node).inputs[1] = Some(weight);
    let error = quantize_dynamic(broken.clone(), &DynamicOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "weight 'broken': element 9 is inf");
    let error = quantize_weights(broken, &HashMap::new(), &BlockOptions::default()).unwrap_err();
    assert!(error.to_string().contains("'broken'"), "{error}");
}

#[test]
fn budgets_are_read_from_text() {
    let read = |text: &str| text.parse::<Budget>();
    assert_eq!(read("accuracy>=-0.5%"), Ok(Budget::AccuracyChange(-0.005)));
    assert_eq!(read("agreement >= 99%"), Ok(Budget::Agreement(0.99)));
    assert_eq!(read("sqnr>=20"), Ok(Budget::SqnrDb(20.0)));
    assert_eq!(read("cosine>=0.995"), Ok(Budget::Cosine(0.995)));
    for bad in ["", "accuracy", "accuracy>=x", "loss>=1", "cosine>=2", "agreement>=101%", "sqnr>=nan"] {
        assert!(read(bad).unwrap_err().contains("expected"), "{bad}");
    }
}
