//! Training on what the repository has: it learns, it repeats, it goes on after a kill to the same bits, and its graphs say what it saw.

use super::*;
use crate::{
    Sample, compare, plain,
    quantize::{Calibration, StaticOptions},
    runner::Runner,
};
use cutover_backend::{CpuOptions, RunContext, cpu};
use cutover_graph::{
    Constant, Dim, TensorFact,
    ops::{
        Binary, BinaryFunction, Gather, LayerNorm, MatMul, Softmax, SoftmaxFunction, Transpose, Unary, UnaryFunction,
    },
};
use cutover_tensor::{DType, Tensor, Value};

fn backend() -> Arc<dyn Backend> {
    cpu(CpuOptions { threads: 1, ..CpuOptions::default() }).unwrap()
}

/// The digits, each a sample, and every third one held out.
fn digits(training: usize, held_out: usize) -> (Data, Data) {
    let (mut a, mut b) = (Data::default(), Data::default());
    a.labels = Some(Vec::new());
    b.labels = Some(Vec::new());
    for (at, line) in include_str!("../../../../models/digits/data/digits.csv").lines().enumerate() {
        let numbers: Vec<i64> = line.split(',').map(|n| n.parse().unwrap()).collect();
        let pixels = numbers[..64].iter().map(|&p| p as f32 / 16.0).collect();
        let image = Tensor::from_vec([1, 1, 8, 8], pixels).unwrap();
        let data = if at % 3 == 2 { &mut b } else { &mut a };
        data.samples.push(vec![("image".to_string(), image.into())]);
        data.labels.as_mut().unwrap().push(vec![numbers[64]]);
    }
    for (data, count) in [(&mut a, training), (&mut b, held_out)] {
        data.samples.truncate(count);
        data.labels.as_mut().unwrap().truncate(count);
    }
    (a, b)
}

fn network(channels: usize) -> Graph {
    let layers = vec![
        Layer::Convolution { channels, kernel: 3 },
        Layer::Relu,
        Layer::Convolution { channels, kernel: 3 },
        Layer::Relu,
        Layer::MaxPool { size: 2 },
        Layer::Linear { units: 10 },
    ];
    Network { input: [1, 8, 8], layers }.graph("digits", 5).unwrap()
}

fn of_labels(epochs: usize, seed: u64) -> Fit {
    let losses = Losses { soft: 0.0, labels: 1.0, ..Losses::default() };
    Fit { epochs, batch: 16, rate: 5e-3, seed, losses, ..Fit::default() }
}

fn go_on(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn train(graph: &Graph, data: &Data, held_out: Option<&Data>, options: &Fit) -> Fitted {
    fit(graph, None, data, held_out, options, &backend(), &mut go_on).unwrap()
}

/// The bits of all weights.
fn weights(graph: &Graph) -> Vec<u32> {
    let constants = graph.values().filter_map(|(id, _)| graph.constant(id));
    let floats = constants.filter(|c| c.tensor.dtype() == DType::F32);
    floats.flat_map(|c| c.tensor.to_vec::<f32>().unwrap()).map(f32::to_bits).collect()
}

/// The share of rows that `graph`, run by the CPU backend, answers right.
fn accuracy(graph: &Graph, data: &Data) -> f64 {
    let mut runner = Runner::new(graph, &backend()).unwrap();
    let answers = data.samples.iter().enumerate().map(|(i, sample)| {
        let answer = runner.run(sample, i, &RunContext::default()).unwrap();
        crate::compare::largest(&answer[0].as_tensor().unwrap().to_vec::<f32>().unwrap()) as i64
    });
    let right = answers.zip(data.labels.as_ref().unwrap()).filter(|(answer, label)| *answer == label[0]).count();
    right as f64 / data.samples.len() as f64
}

#[test]
fn it_learns_what_it_was_not_shown() {
    let (training, held_out) = digits(500, 300);
    let fitted = train(&network(8), &training, Some(&held_out), &of_labels(8, 1));
    assert_eq!((fitted.metric_name, fitted.curve.len()), ("accuracy", 8));
    let best = fitted.curve.iter().filter_map(|p| p.metric).fold(0.0, f64::max);
    assert!(best > 0.88, "{:?}", fitted.curve);
    // The best weights were kept, and the runtime says of them what training said.
    assert!((accuracy(&fitted.graph, &held_out) - best).abs() < 1e-9);
}

#[test]
fn a_seed_gives_the_same_weights_again_and_another_seed_others() {
    let (training, _) = digits(60, 1);
    let run = |seed| weights(&train(&network(4), &training, None, &of_labels(2, seed)).graph);
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

#[test]
fn a_model_of_one_sample_at_a_time_learns_the_same() {
    let (training, held_out) = digits(32, 9);
    let fixed = |mut graph: Graph| {
        let input = graph.inputs()[0];
        graph.value_mut(input).fact = TensorFact::of_constant_shape(DType::F32, &[1, 1, 8, 8]).into();
        graph
    };
    let options = Fit { steps: Some(4), ..of_labels(1, 3) };
    let together = train(&network(4), &training, Some(&held_out), &options);
    let apart = train(&fixed(network(4)), &training, Some(&held_out), &options);
    let values = |fitted: &Fitted| weights(&fitted.graph).into_iter().map(f32::from_bits).collect::<Vec<_>>();
    for (a, b) in values(&together).into_iter().zip(values(&apart)) {
        assert!((a - b).abs() < 2e-4, "{a} against {b}");
    }
    assert!((together.curve[1].loss - apart.curve[1].loss).abs() < 1e-4);
}

#[test]
fn a_killed_run_goes_on_to_the_same_bits() {
    let (training, held_out) = digits(70, 20);
    let options = Fit { every: 3, quantize: Some(FakeQuantize::default()), ..of_labels(4, 3) };
    let whole = train(&network(4), &training, Some(&held_out), &options);
    for kills in [vec![1], vec![4, 5], vec![7, 13, 19]] {
        let folder = tempfile::tempdir().unwrap();
        let options = Fit { checkpoints: Some(folder.path().to_path_buf()), ..options.clone() };
        for kill in &kills {
            let mut stop =
                |p: &Progress| if p.step >= *kill { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
            let error = fit(&network(4), None, &training, Some(&held_out), &options, &backend(), &mut stop).err();
            assert!(matches!(error, Some(ShrinkError::Stopped { step }) if step == *kill), "{error:?}");
            // What a kill in the middle of writing leaves.
            std::fs::write(folder.path().join("step-99999999.safetensors"), b"torn").unwrap();
            std::fs::write(folder.path().join("step-00000008.tmp"), b"torn").unwrap();
        }
        let resumed = train(&network(4), &training, Some(&held_out), &options);
        assert_eq!(weights(&resumed.graph), weights(&whole.graph), "kills at {kills:?}");
        assert_eq!(resumed.ranges, whole.ranges);
        let metrics = |fitted: &Fitted| fitted.curve.iter().map(|p| (p.step, p.loss, p.metric)).collect::<Vec<_>>();
        assert_eq!(metrics(&resumed), metrics(&whole));
        // Another training does not take these up.
        let other = Fit { seed: 4, ..options };
        let error = fit(&network(4), None, &training, None, &other, &backend(), &mut go_on).unwrap_err().to_string();
        assert!(error.contains("another training"), "{error}");
    }
}

#[test]
fn a_narrow_student_learns_from_a_teacher_without_labels() {
    let (training, held_out) = digits(600, 300);
    let teacher = train(&network(12), &training, Some(&held_out), &of_labels(6, 1)).graph;
    let unlabelled = Data { labels: None, ..training };
    let feature = Feature { student: "relu3".to_string(), teacher: "relu3".to_string(), weight: 0.1 };
    let losses = Losses { soft: 1.0, features: vec![feature], ..Losses::default() };
    let options = Fit { losses, ..of_labels(8, 2) };
    let fitted =
        fit(&network(6), Some(&teacher), &unlabelled, Some(&held_out), &options, &backend(), &mut go_on).unwrap();
    assert_eq!(fitted.metric_name, "accuracy");
    let (before, after) = (accuracy(&teacher, &held_out), accuracy(&fitted.graph, &held_out));
    assert!(after > before - 0.05, "{before} became {after}");
    // Only six channels came out.
    assert!(weights(&fitted.graph).len() < weights(&teacher).len() / 2 + 200);
}

/// A small transformer over token numbers, as exporters write it.
fn transformer() -> Graph {
    let mut graph = Graph::new("transformer");
    let fact = TensorFact::new(DType::I64, [Dim::symbol("N"), Dim::symbol("S")]);
    let ids = graph.add_input("ids", fact);
    let mut seed = 0u64;
    let mut constant = |graph: &mut Graph, name: &str, shape: &[usize], scale: f32| {
        seed += 1;
        let value = |i: usize| ((i as f32 * 12.9898 + seed as f32 * 78.233).sin() * 43_758.547).fract() * scale;
        let values = (0..shape.iter().product()).map(value).collect();
        graph.add_constant(name, Constant::new(Tensor::from_vec(shape, values).unwrap()))
    };
    fn add(
        graph: &mut Graph,
        name: &str,
        op: impl Into<cutover_graph::Op>,
        inputs: &[cutover_graph::ValueId],
    ) -> cutover_graph::ValueId {
        let inputs = inputs.iter().map(|&i| Some(i)).collect();
        let node = graph.add_node(format!("/{name}"), op.into(), inputs, vec![name.to_string()]).unwrap();
        graph.node(node).outputs[0]
    }
    let table = constant(&mut graph, "table", &[20, 8], 1.0);
    let mut x = add(&mut graph, "embedded", Gather { axis: 0 }, &[table, ids]);
    let sum = || Binary { function: BinaryFunction::Add };
    for layer in 0..2 {
        let name = |what: &str| format!("{what}{layer}");
        let mut project = |graph: &mut Graph, what: &str, x, from, to| {
            let weight = constant(graph, &format!("{what}.weight"), &[from, to], 0.5);
            let bias = constant(graph, &format!("{what}.bias"), &[to], 0.1);
            let y = add(graph, &format!("{what}.product"), MatMul { activation: None }, &[x, weight]);
            add(graph, what, sum(), &[y, bias])
        };
        let q = project(&mut graph, &name("q"), x, 8, 8);
        let k = project(&mut graph, &name("k"), x, 8, 8);
        let v = project(&mut graph, &name("v"), x, 8, 8);
        let k = add(&mut graph, &name("kt"), Transpose { permutation: Some(vec![0, 2, 1]) }, &[k]);
        let scores = add(&mut graph, &name("scores"), MatMul { activation: None }, &[q, k]);
        let softmax = Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false };
        let shares = add(&mut graph, &name("shares"), softmax, &[scores]);
        let y = add(&mut graph, &name("mixed"), MatMul { activation: None }, &[shares, v]);
        x = add(&mut graph, &name("first"), sum(), &[x, y]);
        let hidden = project(&mut graph, &name("up"), x, 8, 16);
        let hidden = add(&mut graph, &name("gelu"), Unary { function: UnaryFunction::Gelu { tanh: false } }, &[hidden]);
        let y = project(&mut graph, &name("down"), hidden, 16, 8);
        x = add(&mut graph, &name("second"), sum(), &[x, y]);
        let (scale, shift) =
            (constant(&mut graph, &name("scale"), &[8], 1.0), constant(&mut graph, &name("shift"), &[8], 0.1));
        let norm = LayerNorm { axis: -1, epsilon: 1e-5, centred: true, with_deviation: false };
        let node = graph.add_node(name("/norm"), norm.into(), [x, scale, shift].map(Some).to_vec(), vec![name("norm")]);
        x = graph.node(node.unwrap()).outputs[0];
    }
    graph.set_outputs(vec![x]);
    graph
}

fn sentences(count: usize) -> Data {
    let sentence = |i: usize| -> Sample {
        let ids: Vec<i64> = (0..3 + i % 3).map(|s| ((i * 7 + s * 5) % 20) as i64).collect();
        vec![("ids".to_string(), Tensor::from_vec([1, ids.len()], ids).unwrap().into())]
    };
    Data { samples: (0..count).map(sentence).collect(), labels: None }
}

#[test]
fn a_transformer_of_half_the_layers_comes_near_its_teacher() {
    let teacher = transformer();
    let mut student = plain(teacher.clone()).unwrap();
    // The second layer is left out: its norm's reader reads the first one's.
    let norm = |name: &str| student.values().find(|(_, v)| v.name == name).unwrap().0;
    let (first, second) = (norm("norm0"), norm("norm1"));
    crate::edit::replace(&mut student, second, first, &[]);
    crate::edit::sweep(&mut student);
    let data = sentences(48);
    let options = Fit {
        epochs: 40,
        batch: 8,
        rate: 1e-2,
        losses: Losses { soft: 0.0, cosine: 1.0, mse: 1.0, ..Losses::default() },
        ..Fit::default()
    };
    let fitted = fit(&student, Some(&teacher), &data, Some(&data), &options, &backend(), &mut go_on).unwrap();
    let cosine = |graph: &Graph| compare(&teacher, graph, &backend(), &data.samples).unwrap().outputs[0].cosine_mean;
    let (before, after) = (cosine(&student), cosine(&fitted.graph));
    assert!(after > 0.9 && after > before + 0.1, "{before} became {after}");
    // Training and the runtime agree on it.
    assert!((fitted.curve.iter().filter_map(|p| p.metric).fold(0.0, f64::max) - after).abs() < 1e-3);
}

/// The digits network with channels of very different sizes, which one scale for a whole weight can't do justice.
fn unbalanced(graph: &Graph) -> Graph {
    let mut graph = plain(graph.clone()).unwrap();
    let find = |graph: &Graph, name: &str| graph.values().find(|(_, v)| v.name == name).unwrap().0;
    {
        let (first, second) = ("conv0", "conv2");
        let factor = |channel: usize| if channel.is_multiple_of(2) { 1.0 } else { 60.0f32 };
        let mut scale = |name: String, f: &dyn Fn(usize, &[usize]) -> f32| {
            let id = find(&graph, &name);
            let tensor = graph.constant(id).unwrap().tensor.clone();
            let shape = tensor.shape().dims().to_vec();
            let values: Vec<f32> =
                tensor.to_vec::<f32>().unwrap().iter().enumerate().map(|(i, v)| v * f(i, &shape)).collect();
            graph.value_mut(id).source =
                cutover_graph::Source::Constant(Constant::new(Tensor::from_vec(shape, values).unwrap()));
        };
        scale(format!("{first}.weight"), &|i, shape| factor(i / shape[1..].iter().product::<usize>()));
        scale(format!("{first}.bias"), &|i, _| factor(i));
        scale(format!("{second}.weight"), &|i, shape| {
            1.0 / factor(i / shape[2..].iter().product::<usize>() % shape[1])
        });
    }
    graph
}

#[test]
fn training_for_integers_wins_back_what_quantization_lost() {
    let (training, held_out) = digits(600, 300);
    let float = unbalanced(&train(&network(8), &training, Some(&held_out), &of_labels(8, 1)).graph);
    let reference = accuracy(&float, &held_out);
    for quantize in [
        FakeQuantize { per_channel: false, weight_bits: 4, activation_bits: Some(4), ..FakeQuantize::default() },
        FakeQuantize { per_channel: false, ..FakeQuantize::default() },
    ] {
        let eight = quantize.weight_bits == 8;
        // Hardly a step: what quantization after training gives.
        let idle = Fit { quantize: Some(quantize.clone()), rate: 1e-12, steps: Some(30), ..of_labels(1, 1) };
        let after = train(&float, &training, Some(&held_out), &idle);
        let options = Fit { quantize: Some(quantize), rate: 2e-3, ..of_labels(6, 1) };
        let aware = train(&float, &training, Some(&held_out), &options);
        let best = |fitted: &Fitted| fitted.curve.iter().filter_map(|p| p.metric).fold(0.0, f64::max);
        let (after, trained) = (best(&after), best(&aware));
        println!("float {reference}, quantized {after}, trained for it {trained}");
        assert!(trained > if eight { after - 0.01 } else { after + 0.02 }, "{reference}: {after}, trained {trained}");
        if eight {
            // What static quantization makes of it gives what training saw.
            let options = StaticOptions {
                per_channel: false,
                calibration: Calibration::MinMax,
                tables: false,
                ..StaticOptions::default()
            };
            let (quantized, report) = aware.quantize(&options).unwrap();
            assert!(report.quantized.len() >= 3, "{report:?}");
            assert!((accuracy(&quantized, &held_out) - trained).abs() <= 0.01);
        }
    }
}

#[test]
fn what_does_not_fit_is_said() {
    let (training, held_out) = digits(20, 5);
    let refused = |graph: &Graph, teacher: Option<&Graph>, data: &Data, options: Fit, message: &str| {
        let error = fit(graph, teacher, data, Some(&held_out), &options, &backend(), &mut go_on)
            .expect_err("an error")
            .to_string();
        assert!(error.contains(message), "'{error}' does not say '{message}'");
    };
    let (graph, unlabelled) = (network(4), Data { labels: None, ..training.clone() });
    let with = |losses: Losses| Fit { losses, ..of_labels(1, 0) };
    refused(&graph, None, &training, Fit::default(), "there is none");
    refused(&graph, None, &unlabelled, of_labels(1, 0), "the data has none");
    refused(&graph, None, &Data::default(), of_labels(1, 0), "at least one sample");
    refused(&graph, None, &training, with(Losses { soft: 0.0, ..Losses::default() }), "nothing to lessen");
    refused(&graph, None, &training, Fit { rate: 0.0, ..of_labels(1, 0) }, "above 0");
    refused(&graph, None, &training, Fit { rate: 1e30, clip_norm: 0.0, ..of_labels(3, 0) }, "the rate is too high");
    refused(&graph, None, &training, Fit { frozen: vec!["none".into()], ..of_labels(1, 0) }, "'none'");
    let feature = Feature { student: "nowhere".into(), teacher: "relu1".into(), weight: 1.0 };
    refused(
        &graph,
        Some(&graph),
        &training,
        with(Losses { features: vec![feature], ..Losses::default() }),
        "no value 'nowhere'",
    );
    refused(&graph, Some(&transformer()), &training, with(Losses::default()), "differ in their signatures");
    let wrong = Data { labels: Some(vec![vec![10]; 20]), ..training.clone() };
    refused(&graph, None, &wrong, of_labels(1, 0), "label 10, expected one below 10");
    let nan = Value::from(Tensor::from_vec([1, 1, 8, 8], vec![f32::NAN; 64]).unwrap());
    let broken = Data { samples: vec![vec![("image".to_string(), nan)]; 20], ..training.clone() };
    refused(&graph, None, &broken, of_labels(1, 0), "not finite");
    let bits = Fit { quantize: Some(FakeQuantize { weight_bits: 1, ..FakeQuantize::default() }), ..of_labels(1, 0) };
    refused(&graph, None, &training, bits, "1 bits, expected 2 to 8");
    let layers = vec![Layer::Linear { units: 3 }, Layer::MaxPool { size: 1 }];
    let error = Network { input: [1, 8, 8], layers }.graph("wrong", 0).unwrap_err().to_string();
    assert!(error.contains("layer 1: a pooling layer needs an image"), "{error}");
}
