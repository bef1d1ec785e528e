//! What runs several operators as one step gives the bits of the operators one by one, or nearly these where it rounds less, and nearly
//! those of the reference.

use super::{
    networks::{Drawing, all_same_bits, backends},
    support::{run, seeds},
};
use cutover_backend::{Backend, CompileOptions, MemoryUse, reference};
use cutover_graph::{
    Plan, ValueId,
    ops::{
        Activation, Binary, BinaryFunction, Conv, MatMul, Padding, Reshape, Softmax, SoftmaxFunction, Transpose, Window,
    },
};
use cutover_tensor::Tensor;
use std::sync::Arc;

fn has_kernel(backend: &Arc<dyn Backend>, plan: &Plan, kernel: &str) -> bool {
    let executable = backend.compile(plan, &CompileOptions::default()).unwrap();
    executable.placement().nodes.iter().any(|node| node.kernel == kernel)
}

/// Draws a graph whose last value is its output, and the same with another value on the way as an output too, which keeps
/// its operators apart. `difference` is how far the two may be apart, relative to values of one and more.
fn check(kernel: &str, difference: f32, draw: impl Fn(&mut Drawing) -> (ValueId, ValueId)) {
    let backends = backends(MemoryUse::Fast);
    for seed in seeds(40) {
        let plan = |apart: bool| {
            let mut d = Drawing::new(seed);
            let (last, between) = draw(&mut d);
            d.graph.set_outputs(if apart { vec![last, between] } else { vec![last] });
            (Plan::new(d.graph).unwrap(), d.inputs, d.said.join("; "))
        };
        let ((one, inputs, said), (several, ..)) = (plan(false), plan(true));
        let expected = run(&reference(), &one, &inputs, &said).swap_remove(0).to_vec::<f32>().unwrap();
        for (isa, backends) in &backends {
            assert!(has_kernel(&backends[0], &one, kernel), "seed {seed}, {isa}: {said}");
            assert!(!has_kernel(&backends[0], &several, kernel), "seed {seed}, {isa}: {said}");
            let apart = run(&backends[0], &several, &inputs, &said).swap_remove(0);
            let together = run(&backends[0], &one, &inputs, &said);
            for backend in &backends[1..] {
                assert!(all_same_bits(&run(backend, &one, &inputs, &said), &together), "seed {seed}, {isa}: {said}");
            }
            if difference == 0.0 {
                assert!(all_same_bits(&together, std::slice::from_ref(&apart)), "seed {seed}, {isa}: {said}");
            }
            let [together, apart] = [&together[0], &apart].map(|values| values.to_vec::<f32>().unwrap());
            for (at, ((t, a), e)) in together.iter().zip(&apart).zip(&expected).enumerate() {
                let scale = e.abs().max(1.0);
                assert!((t - a).abs() <= difference * scale, "seed {seed}, {isa}: [{at}] is {t}, apart {a}: {said}");
                assert!((a - e).abs() <= 2e-4 * scale, "seed {seed}, {isa}: [{at}] is {a}, expected {e}: {said}");
            }
        }
    }
}

#[test]
fn a_pointwise_convolution_and_the_depthwise_one_behind_it_are_one_step() {
    check("expanded depthwise convolution", 0.0, |d| {
        let (inputs, channels) = (9 + d.random.below(30), 2 + d.random.below(40));
        let (kernel, stride) = (d.random.pick(&[1, 3, 5]), 1 + d.random.below(2));
        let shape = [1 + d.random.below(2), inputs, kernel + d.random.below(20), kernel + d.random.below(20)];
        let x = d.input(&shape);
        let window = |size: usize, stride: usize| {
            let padding = Padding::Explicit { begin: vec![size / 2; 2], end: vec![size / 2; 2] };
            Window { kernel_shape: None, strides: vec![stride; 2], dilations: vec![1; 2], padding, ceil_mode: false }
        };
        let activations = [None, Some(Activation::Relu), Some(Activation::HardSwish), Some(Activation::Silu)];
        let (first, second) = (d.random.pick(&activations), d.random.pick(&activations));
        let (w, b) = (d.weights(&[channels, inputs, 1, 1]), d.weights(&[channels]));
        let x = d.node(Conv { window: window(1, 1), group: 1, activation: first }, &[x, w, b]);
        let (w, b) = (d.weights(&[channels, 1, kernel, kernel]), d.weights(&[channels]));
        let op = Conv { window: window(kernel, stride), group: channels, activation: second };
        let y = if d.random.below(2) == 0 { d.node(op, &[x, w]) } else { d.node(op, &[x, w, b]) };
        (y, x)
    });
}

#[test]
fn products_around_a_softmax_are_one_step() {
    // A sum of 140 products of what is at most one.
    check("attention", 4e-6, |d| {
        let (batch, heads) = (1 + d.random.below(2), 1 + d.random.below(4));
        let (queries, keys) = (1 + d.random.below(150), 1 + d.random.below(140));
        let (width, size) = (1 + d.random.below(40), 1 + d.random.below(40));
        // `[b, s, n, h]` to `[b, n, s, h]`, as projections leave them; keys `[b, n, h, t]`.
        let part = |d: &mut Drawing, length: usize, size: usize, order: [usize; 4]| {
            let x = d.input(&[batch, length, heads, size]);
            d.node(Transpose { permutation: Some(order.to_vec()) }, &[x])
        };
        let q = part(d, queries, width, [0, 2, 1, 3]);
        let k = part(d, keys, width, [0, 2, 3, 1]);
        let mut x = d.node(MatMul { activation: None }, &[q, k]);
        let scale = Tensor::scalar(d.random.pick(&[0.25f32, 0.5, 2.0]));
        let scale = d.constant(scale);
        match d.random.below(3) {
            0 => x = d.node(Binary { function: BinaryFunction::Mul }, &[x, scale]),
            1 => x = d.node(Binary { function: BinaryFunction::Div }, &[x, scale]),
            _ => {}
        }
        let masks: [&[usize]; 5] =
            [&[batch, 1, 1, keys], &[1, 1, queries, keys], &[batch, heads, queries, keys], &[keys], &[queries, keys]];
        if d.random.below(4) > 0 {
            let shape = d.random.pick(&masks).to_vec();
            let mask = d.input(&shape);
            x = d.node(Binary { function: BinaryFunction::Add }, &[mask, x]);
        }
        let p = d.node(Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false }, &[x]);
        let v = part(d, keys, size, [0, 2, 1, 3]);
        let y = d.node(MatMul { activation: None }, &[p, v]);
        let y = d.node(Transpose { permutation: Some(vec![0, 2, 1, 3]) }, &[y]);
        let shape = d.constant(Tensor::from_vec([3], vec![batch as i64, queries as i64, -1]).unwrap());
        (d.node(Reshape { allow_zero: false }, &[y, shape]), p)
    });
}
