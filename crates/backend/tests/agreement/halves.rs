//! Weights held in 16 bits: the CPU computes with them to the bit what it computes in f32 with the same weights rounded, at every
//! instruction set and number of threads, and they take half the memory. Processors that multiply pairs of bfloat16 round what the
//! weights are multiplied with, too; or, of a convolution, Winograd's coefficients of both.

use super::support::{Random, answers, run, rungs, same_bits, seeds};
use cutover_backend::{CompileOptions, CpuOptions, Numerics, Precision, cpu, reference};
use cutover_graph::{
    Constant, Graph, Op, Plan, TensorFact,
    ops::{Activation, Conv, ConvTranspose, Gemm, MatMul, Padding, Window},
};
use cutover_tensor::{DType, Tensor, Value, bf16, f16};

pub fn rounded(tensor: &Tensor, to: Precision) -> Tensor {
    let round = |x: f32| match to {
        Precision::F32 => x,
        Precision::F16 => f16::from_f32(x).to_f32(),
        Precision::BF16 => bf16::from_f32(x).to_f32(),
        Precision::Tf32 => f32::from_bits((x.to_bits() + 0x1000) & !0x1fff),
    };
    let values: Vec<f32> = tensor.to_vec::<f32>().unwrap().into_iter().map(round).collect();
    Tensor::from_vec(tensor.shape().dims(), values).unwrap()
}

/// `op` of an input and constants, of which the first is `weights`.
fn one(op: &Op, input: &[usize], weights: &Tensor, rest: &[Tensor]) -> Plan {
    let mut graph = Graph::new("one");
    let mut ids = vec![Some(graph.add_input("x", TensorFact::of_constant_shape(DType::F32, input)))];
    for (at, tensor) in std::iter::once(weights).chain(rest).enumerate() {
        ids.push(Some(graph.add_constant(format!("c{at}"), Constant::new(tensor.clone()))));
    }
    let node = graph.add_node("node", op.clone(), ids, vec!["y".into()]).unwrap();
    graph.set_outputs(graph.node(node).outputs.clone());
    Plan::new(graph).unwrap()
}

fn check(op: impl Into<Op>, input: &Tensor, weights: &Tensor, rest: &[Tensor]) {
    let op = op.into();
    let said = format!("{op:?} of {} by {}", input.shape(), weights.shape());
    let inputs = [Value::Tensor(input.clone())];
    for precision in [Precision::F16, Precision::BF16] {
        let plan = one(&op, input.shape(), weights, rest);
        let plan_of_rounded = one(&op, input.shape(), &rounded(weights, precision), rest);
        let of = |inputs: &[Value]| -> Vec<f32> {
            run(&reference(), &plan_of_rounded, inputs, &said).swap_remove(0).to_vec().unwrap()
        };
        let expected = [of(&inputs), of(&[Value::Tensor(rounded(input, precision))])];
        for isa in rungs() {
            for threads in [1, 2, 5] {
                let Ok(backend) = cpu(CpuOptions { threads, isa: Some(isa.into()), ..CpuOptions::default() }) else {
                    continue;
                };
                // Of the rounded filters Winograd's would be others.
                let full = CompileOptions { numerics: Numerics::Strict, ..CompileOptions::default() };
                let full = backend.compile(&plan_of_rounded, &full).unwrap();
                let half = CompileOptions { precision, ..CompileOptions::default() };
                let half = backend.compile(&plan, &half).unwrap();
                let kernel = half.placement().nodes[0].kernel.clone();
                assert!(kernel.ends_with("f16"), "{said}: {kernel}");
                let in_pairs = kernel.ends_with(" in bf16") && !kernel.contains("weights");
                let by_winograd = kernel.starts_with("Winograd");
                let may_be = precision == Precision::BF16 && isa.ends_with("bf16");
                assert_eq!(in_pairs, may_be, "{isa}: {kernel}");
                let (bytes, of) = (half.footprint().weight_bytes, full.footprint().weight_bytes);
                let others: usize = rest.iter().map(|t| t.bytes().len()).sum();
                // Sixteen coefficients of nine weights.
                let most = if by_winograd { of * 16 / 9 } else { of } / 2 + others as u64;
                assert!(bytes <= most, "{isa}, {precision:?}: {bytes} bytes, {of} in f32: {said}");
                let actual = answers(half, &inputs, &said).swap_remove(0);
                let same = answers(full, &inputs, &said).swap_remove(0);
                assert!(
                    in_pairs || same_bits(&actual, &same),
                    "{isa}, {precision:?}: other bits than with rounded weights: {said}"
                );
                // Winograd's coefficients are rounded, not what they are made of.
                let expected = &expected[usize::from(in_pairs && !by_winograd)];
                let tolerance = if by_winograd { 2e-2 } else { 1e-4 };
                let scale = expected.iter().fold(1.0f32, |m, v| m.max(v.abs()));
                for (at, (a, e)) in actual.to_vec::<f32>().unwrap().iter().zip(expected).enumerate() {
                    let near = (a - e).abs() <= tolerance * scale;
                    assert!(near, "{isa}, {precision:?}: [{at}] is {a}, expected {e}: {said}");
                }
            }
        }
    }
}

#[test]
fn products_with_halves() {
    for seed in seeds(24) {
        let r = &mut Random(seed);
        let (m, k, n) = (if r.coin() { r.upto(4) } else { r.upto(200) }, 30 + r.below(600), 40 + r.below(300));
        let (input, bias) = (r.tensor(&[m, k]), r.tensor(&[n]));
        let activation = r.pick(&[None, Some(Activation::Relu), Some(Activation::Gelu)]);
        if r.coin() {
            check(MatMul { activation }, &input, &r.tensor(&[k, n]), &[bias]);
        } else {
            let transpose_b = r.coin();
            let weights = if transpose_b { r.tensor(&[n, k]) } else { r.tensor(&[k, n]) };
            let alpha = r.pick(&[1.0, 0.5]);
            check(Gemm { alpha, beta: 1.0, transpose_a: false, transpose_b, activation }, &input, &weights, &[bias]);
        }
    }
}

#[test]
fn convolutions_with_halves() {
    for seed in seeds(24) {
        let r = &mut Random(seed);
        let (channels, outputs, kernel) = (33 + r.below(40), 33 + r.below(40), r.pick(&[1, 2, 3]));
        let (height, width) = (3 + r.below(12), 3 + r.below(12));
        let input = r.tensor(&[r.0 as usize % 2 + 1, channels, height, width]);
        let padding = Padding::Explicit { begin: vec![kernel / 2; 2], end: vec![kernel / 2; 2] };
        let strides = vec![1 + r.below(2); 2];
        let window = Window { kernel_shape: None, strides, dilations: Vec::new(), padding, ceil_mode: false };
        let bias = r.tensor(&[outputs]);
        if r.below(4) == 0 {
            let weights = r.tensor(&[channels, outputs, kernel, kernel]);
            check(
                ConvTranspose { window, group: 1, output_padding: Vec::new(), output_shape: None },
                &input,
                &weights,
                &[bias],
            );
        } else {
            let weights = r.tensor(&[outputs, channels, kernel, kernel]);
            let activation = r.pick(&[None, Some(Activation::Relu)]);
            check(Conv { window, group: 1, activation }, &input, &weights, &[bias]);
        }
    }
}

#[test]
fn a_weight_that_would_become_infinite_stays_f32() {
    let r = &mut Random(5);
    let mut values: Vec<f32> = r.tensor(&[64, 64]).to_vec().unwrap();
    values[1000] = 65520.0;
    let (input, weights) = (r.tensor(&[3, 64]), Tensor::from_vec([64, 64], values).unwrap());
    let plan = one(&MatMul { activation: None }.into(), &[3, 64], &weights, &[]);
    let inputs = [Value::Tensor(input)];
    let backend = cpu(CpuOptions::default()).unwrap();
    let of = |precision| backend.compile(&plan, &CompileOptions { precision, ..CompileOptions::default() }).unwrap();
    let (full, half) = (of(Precision::F32), of(Precision::F16));
    assert_eq!(half.footprint().weight_bytes, full.footprint().weight_bytes);
    assert_eq!(half.placement().nodes[0].kernel, "matrix product");
    let answers = [full, half, of(Precision::BF16)].map(|e| answers(e, &inputs, "65520").swap_remove(0));
    assert!(same_bits(&answers[0], &answers[1]) && !same_bits(&answers[0], &answers[2]));
}
