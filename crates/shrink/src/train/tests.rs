//! Training on what the repository has: it learns, it repeats, and its graph says what candle says.

use super::*;
use cutover_backend::{CompileOptions, Input, Output, RunContext, SessionMemory, reference};
use cutover_graph::Plan;
use cutover_tensor::Tensor as Values;

fn digits() -> (Examples, Examples) {
    let (mut training, mut held_out) = (Examples::default(), Examples::default());
    for (at, line) in include_str!("../../../../models/digits/data/digits.csv").lines().enumerate() {
        let numbers: Vec<u32> = line.split(',').map(|n| n.parse().unwrap()).collect();
        let set = if at % 3 == 2 { &mut held_out } else { &mut training };
        set.images.extend(numbers[..64].iter().map(|&p| p as f32 / 16.0));
        set.labels.push(numbers[64]);
    }
    (training, held_out)
}

fn network() -> Network {
    Network {
        input: [1, 8, 8],
        layers: vec![
            Layer::Convolution { channels: 8, kernel: 3 },
            Layer::Relu,
            Layer::MaxPool { size: 2 },
            Layer::Linear { units: 10 },
        ],
    }
}

fn options(epochs: usize, seed: u64) -> TrainOptions {
    TrainOptions { epochs, batch: 16, learning_rate: 5e-3, weight_decay: 1e-2, shift: 0, seed }
}

/// `[n, classes]` of the trained network's graph, by definition.
fn probabilities(trained: &Trained, shape: [usize; 4], images: &[f32]) -> Vec<f32> {
    let plan = Plan::new(trained.graph("trained").unwrap()).unwrap();
    let executable = reference().compile(&plan, &CompileOptions::default()).unwrap();
    let image = Values::from_vec(shape, images.to_vec()).unwrap().into();
    let mut outputs = [Output::Allocate(None)];
    let mut session = executable.session(SessionMemory::default()).unwrap();
    session.run(&[Input::Value(&image)], &mut outputs, &RunContext::default()).unwrap();
    let [Output::Allocate(Some(probabilities))] = outputs else { panic!("no output") };
    probabilities.as_tensor().unwrap().to_vec::<f32>().unwrap()
}

#[test]
fn it_learns_what_it_was_not_shown() {
    let (training, held_out) = digits();
    let few = Examples { images: training.images[..400 * 64].to_vec(), labels: training.labels[..400].to_vec() };
    let mut losses = Vec::new();
    let trained = train(&network(), &few, &options(15, 1), &mut |epoch| losses.push(epoch.loss)).unwrap();
    assert!(losses.len() == 15 && losses[14] < losses[0] / 4.0, "{losses:?}");
    let answers = probabilities(&trained, [held_out.labels.len(), 1, 8, 8], &held_out.images);
    let best = |row: &[f32]| (0..10).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
    let right = answers.chunks(10).zip(&held_out.labels).filter(|(row, label)| best(row) == **label as usize).count();
    // Chance is a tenth.
    assert!(right * 100 > held_out.labels.len() * 88, "{right} of {}", held_out.labels.len());
}

/// Sums in candle's kernels are split by threads: `cargo xtask test` sets one.
#[test]
fn a_seed_gives_the_same_weights_again_and_another_seed_others() {
    let (training, _) = digits();
    let few = Examples { images: training.images[..64 * 64].to_vec(), labels: training.labels[..64].to_vec() };
    let weights = |seed| {
        let trained = train(&network(), &few, &options(2, seed), &mut |_| {}).unwrap();
        let of = |v: &Var| v.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits);
        trained.parameters.iter().flat_map(|(w, b)| of(w).chain(of(b))).collect::<Vec<_>>()
    };
    assert_eq!(weights(7), weights(7));
    assert_ne!(weights(7), weights(8));
}

#[test]
fn the_graph_says_what_the_trained_network_says() {
    // Two channels, sides that differ, a pool that drops a remainder, a wide kernel, two linear layers.
    let network = Network {
        input: [2, 7, 5],
        layers: vec![
            Layer::Convolution { channels: 3, kernel: 5 },
            Layer::MaxPool { size: 2 },
            Layer::Relu,
            Layer::Linear { units: 6 },
            Layer::Relu,
            Layer::Linear { units: 4 },
        ],
    };
    let images: Vec<f32> = (0..6 * 70).map(|i| ((i * 29 % 83) as f32 - 40.0) / 40.0).collect();
    let examples = Examples { images: images.clone(), labels: vec![0, 1, 2, 3, 0, 1] };
    let trained = train(&network, &examples, &options(3, 4), &mut |_| {}).unwrap();
    let batch = Tensor::from_vec(images.clone(), (6, 2, 7, 5), &Device::Cpu).unwrap();
    let expected = candle_nn::ops::softmax(&trained.logits(&batch).unwrap(), D::Minus1).unwrap();
    let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let got = probabilities(&trained, [6, 2, 7, 5], &images);
    assert_eq!(got.len(), expected.len());
    for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
        assert!((got - expected).abs() < 1e-5, "element {at}: {got}, expected {expected}");
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let refused = |network: Network, examples: Examples, message: &str| {
        let error = train(&network, &examples, &options(1, 0), &mut |_| {}).err().expect("an error").to_string();
        assert!(error.contains(message), "'{error}' does not say '{message}'");
    };
    let one = || Examples { images: vec![0.0; 64], labels: vec![0] };
    let with = |layers: &[Layer]| Network { input: [1, 8, 8], layers: layers.to_vec() };
    refused(network(), Examples::default(), "0 pixels for 0 labels");
    refused(network(), Examples { images: vec![0.0; 63], labels: vec![0] }, "63 pixels for 1 labels, expected 64");
    refused(
        network(),
        Examples { images: vec![0.0; 64], labels: vec![10] },
        "label 10 of example 0, expected one below 10",
    );
    refused(with(&[Layer::Relu]), one(), "the last layer with weights must be linear");
    refused(
        with(&[Layer::Convolution { channels: 2, kernel: 2 }]),
        one(),
        "layer 0: a kernel of 2, expected an odd one",
    );
    refused(with(&[Layer::MaxPool { size: 9 }]), one(), "a window of 9 over an image of 8 by 8");
    refused(
        with(&[Layer::Linear { units: 3 }, Layer::MaxPool { size: 1 }]),
        one(),
        "layer 1: a pooling layer needs an image",
    );
}
