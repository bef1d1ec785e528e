//! The CPU backend against the reference: random graphs at the edges of its kernels, at every instruction set, and the same bits
//! for every number of threads and whatever a sample is batched with.
//!
//! `CUTOVER_SOAK=N` runs N times as many graphs.

use super::support::{Random, answers, run, rungs, same_bits, seeds};
use cutover_backend::{Backend, CompileOptions, CpuOptions, MemoryUse, Numerics, cpu, reference};
use cutover_graph::{
    Constant, Graph, Op, Plan, TensorFact, ValueId,
    ops::{
        AveragePool, Binary, BinaryFunction, Cell, CellActivation, Concat, Conv, Direction, Gemm, GlobalPool,
        GlobalPoolFunction, LayerNorm, MatMul, MaxPool, Padding, Recurrent, Reduce, ReduceFunction, Reshape, Softmax,
        SoftmaxFunction, Split, Transpose, Unary, UnaryFunction, Window,
    },
};
use cutover_tensor::{DType, Tensor, Value};
use std::sync::Arc;

/// A graph being drawn, and the inputs it will be run on.
pub struct Drawing {
    pub random: Random,
    pub graph: Graph,
    pub inputs: Vec<Value>,
    pub said: Vec<String>,
}

impl Drawing {
    pub fn new(seed: u64) -> Drawing {
        let random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1);
        Drawing { random, graph: Graph::new("drawn"), inputs: Vec::new(), said: Vec::new() }
    }

    pub fn input(&mut self, shape: &[usize]) -> ValueId {
        let tensor = self.random.tensor(shape);
        self.inputs.push(Value::Tensor(tensor));
        self.said.push(format!("input {shape:?}"));
        self.graph.add_input(format!("x{}", self.inputs.len()), TensorFact::of_constant_shape(DType::F32, shape))
    }

    pub fn constant(&mut self, tensor: Tensor) -> ValueId {
        let name = self.graph.unique_value_name("c");
        self.graph.add_constant(name, Constant::new(tensor))
    }

    pub fn weights(&mut self, shape: &[usize]) -> ValueId {
        let tensor = self.random.tensor(shape);
        self.constant(tensor)
    }

    pub fn nodes(&mut self, op: impl Into<Op>, inputs: &[ValueId], outputs: usize) -> Vec<ValueId> {
        let op = op.into();
        self.said.push(format!("{op:?}"));
        let names = (0..outputs).map(|i| format!("v{}_{i}", self.said.len())).collect();
        let name = format!("n{}", self.said.len());
        let node = self.graph.add_node(name, op, inputs.iter().copied().map(Some).collect(), names).unwrap();
        self.graph.node(node).outputs.clone()
    }

    pub fn node(&mut self, op: impl Into<Op>, inputs: &[ValueId]) -> ValueId {
        self.nodes(op, inputs, 1)[0]
    }

    pub fn shape(&self, id: ValueId) -> Vec<usize> {
        self.graph.value(id).fact.as_tensor().unwrap().constant_shape().unwrap()
    }

    fn window(&mut self, kernel: Option<Vec<usize>>, pads: usize) -> Window {
        let r = &mut self.random;
        let mut two = |n: usize| vec![1 + r.below(n), 1 + r.below(n)];
        let (strides, dilations) = (two(3), if kernel.is_none() { two(2) } else { Vec::new() });
        let mut pad = || vec![r.below(pads + 1), r.below(pads + 1)];
        let padding = Padding::Explicit { begin: pad(), end: pad() };
        Window { kernel_shape: kernel, strides, dilations, padding, ceil_mode: false }
    }

    fn image(&mut self) -> ValueId {
        let channels = self.random.pick(&[1, 3, 8, 15, 16, 17, 32, 40]);
        let shape = [1 + self.random.below(2), channels, 5 + self.random.below(12), 5 + self.random.below(12)];
        self.input(&shape)
    }

    fn conv(&mut self, x: ValueId) -> ValueId {
        let shape = self.shape(x);
        let channels = shape[1];
        let depthwise = channels > 1 && self.random.below(4) == 0;
        let group = match depthwise {
            true => channels,
            false if channels.is_multiple_of(4) && self.random.below(4) == 0 => 2,
            false => 1,
        };
        let out = if depthwise { channels } else { self.random.pick(&[2, 8, 16, 18, 32, 48]) };
        let small = shape[2] < 5 || shape[3] < 5;
        let (h, w) = if small { (1, 1) } else { (1 + self.random.below(3), 1 + self.random.below(3)) };
        let weights = self.weights(&[out, channels / group, h, w]);
        let bias = self.weights(&[out]);
        let window = self.window(None, 2);
        let op = Conv { window, group, activation: None };
        if self.random.below(3) == 0 { self.node(op, &[x, weights]) } else { self.node(op, &[x, weights, bias]) }
    }

    fn pointwise(&mut self, x: ValueId) -> ValueId {
        use UnaryFunction::*;
        let function =
            self.random.pick(&[Relu, Sigmoid, Tanh, Exp, Abs, Erf, Reciprocal, Log, Floor, Softplus, Neg, Sqrt]);
        // Of no value that makes the function steep or undefined, so that tolerances mean something.
        let safe = matches!(function, Reciprocal | Log | Floor | Sqrt);
        let x = if safe {
            let sigmoid = self.node(Unary { function: Sigmoid }, &[x]);
            let half = self.constant(Tensor::scalar(0.51f32));
            if function == Floor {
                return self.node(Unary { function: Neg }, &[sigmoid]);
            }
            self.node(Binary { function: BinaryFunction::Add }, &[sigmoid, half])
        } else {
            self.node(Unary { function: Tanh }, &[x])
        };
        self.node(Unary { function }, &[x])
    }

    fn combine(&mut self, x: ValueId) -> ValueId {
        use BinaryFunction::*;
        let shape = self.shape(x);
        let function = self.random.pick(&[Add, Sub, Mul, Div]);
        let own: Vec<usize> = match self.random.below(4) {
            0 => vec![],
            1 => shape.clone(),
            2 if shape.len() == 4 => vec![1, shape[1], 1, 1],
            _ => shape.iter().map(|&d| if self.random.below(2) == 0 { 1 } else { d }).collect(),
        };
        let other = if function == Div {
            // Divisors away from zero.
            let count = own.iter().product();
            let values: Vec<f32> = (0..count).map(|i| 1.0 + i as f32 % 3.0).collect();
            self.constant(Tensor::from_vec(own, values).unwrap())
        } else {
            self.weights(&own)
        };
        if self.random.below(2) == 0 || function == Div {
            self.node(Binary { function }, &[x, other])
        } else {
            self.node(Binary { function }, &[other, x])
        }
    }

    fn pool(&mut self, x: ValueId) -> ValueId {
        let shape = self.shape(x);
        match self.random.below(3) {
            0 if shape[2] >= 3 && shape[3] >= 3 => {
                let window = self.window(Some(vec![2, 3]), 1);
                self.node(MaxPool { window, column_major_indices: false }, &[x])
            }
            1 if shape[2] >= 3 && shape[3] >= 3 => {
                let window = self.window(Some(vec![3, 2]), 1);
                let count_include_pad = self.random.below(2) == 0;
                self.node(AveragePool { window, count_include_pad }, &[x])
            }
            _ => {
                let function = self.random.pick(&[GlobalPoolFunction::Average, GlobalPoolFunction::Max]);
                self.node(GlobalPool { function }, &[x])
            }
        }
    }

    fn softmax(&mut self, x: ValueId) -> ValueId {
        let function = self.random.pick(&[SoftmaxFunction::Softmax, SoftmaxFunction::LogSoftmax]);
        let axis = self.random.below(self.shape(x).len()) as i64;
        self.node(Softmax { function, axis, coerced: false }, &[x])
    }

    fn reduce(&mut self, x: ValueId) -> ValueId {
        use ReduceFunction::*;
        let rank = self.shape(x).len();
        let function = self.random.pick(&[Sum, Mean, Max, Min, L1, L2]);
        let axis = self.random.below(rank) as i64;
        let axes = self.constant(Tensor::from_vec([1], vec![axis]).unwrap());
        self.node(Reduce { function, keep_dims: true, noop_with_empty_axes: false }, &[x, axes])
    }

    fn product(&mut self, x: ValueId) -> ValueId {
        let shape = self.shape(x);
        let k = shape[shape.len() - 1];
        let n = self.random.pick(&[1, 2, 7, 16, 31, 33, 48]);
        if shape.len() == 2 && self.random.below(2) == 0 {
            let transpose_b = self.random.below(2) == 0;
            let b = self.weights(&if transpose_b { [n, k] } else { [k, n] });
            let c = self.weights(&[n]);
            let alpha = self.random.pick(&[1.0, 0.5]);
            let gemm = Gemm { alpha, beta: 1.0, transpose_a: false, transpose_b, activation: None };
            return self.node(gemm, &[x, b, c]);
        }
        match self.random.below(3) {
            0 => {
                let b = self.weights(&[k, n]);
                self.node(MatMul { activation: None }, &[x, b])
            }
            // With itself, as attention does.
            _ => {
                let rank = shape.len();
                let mut permutation: Vec<usize> = (0..rank).collect();
                permutation.swap(rank - 1, rank - 2);
                let turned = self.node(Transpose { permutation: Some(permutation) }, &[x]);
                self.node(MatMul { activation: None }, &[x, turned])
            }
        }
    }

    fn join(&mut self, x: ValueId) -> ValueId {
        let axis = self.random.below(self.shape(x).len());
        let (a, b) = (self.pointwise(x), self.combine(x));
        let extents = |id: ValueId| self.shape(id);
        let fits = extents(a).len() == extents(b).len() && extents(a) == extents(b);
        let both = if fits { self.node(Concat { axis: axis as i64 }, &[a, b]) } else { a };
        let extent = self.shape(both)[axis];
        if extent < 2 || self.random.below(2) == 0 {
            return both;
        }
        let sizes = self.constant(Tensor::from_vec([2], vec![1i64, extent as i64 - 1]).unwrap());
        self.nodes(Split { axis: axis as i64, parts: 2 }, &[both, sizes], 2)[1]
    }

    fn normalize(&mut self, x: ValueId) -> ValueId {
        let width = *self.shape(x).last().unwrap();
        let (gamma, beta) = (self.weights(&[width]), self.weights(&[width]));
        self.node(LayerNorm { axis: -1, epsilon: 1e-2, centred: true, with_deviation: false }, &[x, gamma, beta])
    }

    fn recurrent(&mut self) -> ValueId {
        let (steps, batch, width) = (1 + self.random.below(4), 1 + self.random.below(3), 1 + self.random.below(20));
        let hidden = self.random.pick(&[1, 5, 16, 19]);
        let x = self.input(&[steps, batch, width]);
        let direction = self.random.pick(&[Direction::Forward, Direction::Reverse, Direction::Bidirectional]);
        let cell = self.random.pick(&[
            Cell::Lstm { coupled: false },
            Cell::Gru { linear_before_reset: false },
            Cell::Gru { linear_before_reset: true },
        ]);
        let lstm = matches!(cell, Cell::Lstm { .. });
        let (d, gates) = (if direction == Direction::Bidirectional { 2 } else { 1 }, if lstm { 4 } else { 3 } * hidden);
        let one: &[CellActivation] = match lstm {
            true => &[CellActivation::Sigmoid, CellActivation::Tanh, CellActivation::Tanh],
            false => &[CellActivation::Sigmoid, CellActivation::Tanh],
        };
        let activations = one.repeat(d);
        let (w, r) = (self.weights(&[d, gates, width]), self.weights(&[d, gates, hidden]));
        let b = self.weights(&[d, 2 * gates]);
        let op = Recurrent { cell, direction, hidden_size: Some(hidden), activations, clip: None, batch_first: false };
        let op: Op = op.into();
        self.said.push(format!("{op:?}"));
        let initial = self.input(&[d, batch, hidden]);
        let inputs = vec![Some(x), Some(w), Some(r), Some(b), None, Some(initial)];
        let node = self.graph.add_node("recurrent", op, inputs, vec!["y".into(), "y_h".into()]).unwrap();
        self.graph.node(node).outputs[usize::from(self.random.below(2) == 1)]
    }

    /// A chain of random operators, with what it ends in as the output, and sometimes a value on the way too.
    pub fn chain(seed: u64) -> Drawing {
        let mut d = Drawing::new(seed);
        let mut x = match d.random.below(4) {
            0 | 1 => d.image(),
            2 => {
                let shape = [1 + d.random.below(4), 1 + d.random.below(20), 1 + d.random.below(40)];
                let rank = 2 + d.random.below(2);
                d.input(&shape[3 - rank..])
            }
            _ => d.recurrent(),
        };
        let mut outputs = Vec::new();
        for _ in 0..1 + d.random.below(5) {
            let image = d.shape(x).len() == 4;
            x = match d.random.below(9) {
                0..=2 if image => d.conv(x),
                3 if image => d.pool(x),
                4 => d.pointwise(x),
                5 => d.combine(x),
                6 => d.join(x),
                7 => d.softmax(x),
                8 => d.reduce(x),
                0 | 1 => d.product(x),
                _ => d.normalize(x),
            };
            if d.random.below(5) == 0 {
                outputs.push(x);
            }
        }
        if d.random.below(4) == 0 {
            let target = d.constant(Tensor::from_vec([1], vec![-1i64]).unwrap());
            x = d.node(Reshape { allow_zero: false }, &[x, target]);
        }
        if !outputs.contains(&x) {
            outputs.push(x);
        }
        d.graph.set_outputs(outputs);
        d
    }
}

/// One backend per rung of the ladder that this machine has and number of threads.
pub fn backends(memory: MemoryUse) -> Vec<(&'static str, Vec<Arc<dyn Backend>>)> {
    let make = |isa: &str, threads| cpu(CpuOptions { threads, isa: Some(isa.to_string()), memory }).ok();
    let rung = |isa| Some((isa, [1, 2, 3, 7].into_iter().map(|t| make(isa, t)).collect::<Option<Vec<_>>>()?));
    rungs().into_iter().filter_map(rung).collect()
}

pub fn all_same_bits(a: &[Tensor], b: &[Tensor]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_bits(a, b))
}

#[test]
fn random_graphs_agree_with_the_reference_at_every_instruction_set_and_number_of_threads() {
    let reference = reference();
    // Those short of memory use other algorithms.
    let backends = [backends(MemoryUse::Fast), backends(MemoryUse::Lean)].concat();
    assert!(!backends.is_empty());
    for seed in seeds(150) {
        let drawing = Drawing::chain(seed);
        let said = drawing.said.join("; ");
        let plan = Plan::new(drawing.graph).unwrap();
        let expected = run(&reference, &plan, &drawing.inputs, &said);
        for (isa, backends) in &backends {
            let answers: Vec<_> = backends.iter().map(|b| run(b, &plan, &drawing.inputs, &said)).collect();
            assert!(
                answers.iter().all(|a| all_same_bits(a, &answers[0])),
                "seed {seed}, {isa}: other bits on more threads: {said}"
            );
            for (output, (actual, expected)) in answers[0].iter().zip(&expected).enumerate() {
                let floats = |tensor: &Tensor| tensor.to_vec::<f32>().unwrap();
                let (actual, expected) = (floats(actual), floats(expected));
                assert_eq!(actual.len(), expected.len());
                let scale = expected.iter().fold(1.0f32, |m, v| m.max(v.abs()));
                for (at, (a, e)) in actual.iter().zip(&expected).enumerate() {
                    let near = (a - e).abs() <= 2e-4 * scale || a.to_bits() == e.to_bits() || a.is_nan() && e.is_nan();
                    assert!(near, "seed {seed}, {isa}, output {output}[{at}]: {a}, expected {e}: {said}");
                }
            }
        }
    }
}

#[test]
fn a_sample_has_the_same_bits_whatever_it_is_batched_with() {
    for (isa, backends) in backends(MemoryUse::Fast) {
        for batch in [2, 5, 9] {
            let build = |batch: usize| {
                let mut d = Drawing::new(7);
                let x = d.graph.add_input("x", TensorFact::of_constant_shape(DType::F32, &[batch, 12, 9, 9]));
                let x = d.conv(x);
                let shape = d.shape(x);
                let target = d.constant(Tensor::from_vec([2], vec![batch as i64, -1]).unwrap());
                let x = d.node(Reshape { allow_zero: false }, &[x, target]);
                let w = d.weights(&[shape[1..].iter().product(), 33]);
                let x = d.node(MatMul { activation: None }, &[x, w]);
                let x = d.node(Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false }, &[x]);
                d.graph.set_outputs(vec![x]);
                Plan::new(d.graph).unwrap()
            };
            let all = Random(3).tensor(&[batch, 12, 9, 9]);
            let values: Vec<f32> = all.to_vec().unwrap();
            let together = run(&backends[1], &build(batch), &[Value::Tensor(all)], "together").swap_remove(0);
            let together = together.to_vec::<f32>().unwrap();
            for (sample, expected) in values.chunks(12 * 81).zip(together.chunks(33)) {
                let alone = Tensor::from_vec([1, 12, 9, 9], sample.to_vec()).unwrap();
                let alone = run(&backends[0], &build(1), &[Value::Tensor(alone)], "alone");
                let expected = Tensor::from_vec([1, 33], expected.to_vec()).unwrap();
                assert!(all_same_bits(&alone, &[expected]), "{isa}, {batch} samples");
            }
        }
    }
}

#[test]
fn numerics_decide_about_winograd_and_a_sample_has_the_same_bits_in_any_batch() {
    let image = Random(5).tensor(&[3, 24, 15, 22]);
    let plan = |batch: usize| {
        let mut d = Drawing::new(11);
        let x = d.graph.add_input("x", TensorFact::of_constant_shape(DType::F32, &[batch, 24, 15, 22]));
        let (w, b) = (d.weights(&[40, 24, 3, 3]), d.weights(&[40]));
        let padding = Padding::Explicit { begin: vec![1, 1], end: vec![1, 1] };
        let window =
            Window { kernel_shape: None, strides: vec![1, 1], dilations: vec![1, 1], padding, ceil_mode: false };
        let y = d.node(Conv { window, group: 1, activation: None }, &[x, w, b]);
        let y = d.node(Unary { function: UnaryFunction::Relu }, &[y]);
        d.graph.set_outputs(vec![y]);
        Plan::new(d.graph).unwrap()
    };
    let expected = run(&reference(), &plan(3), &[Value::Tensor(image.clone())], "reference").swap_remove(0);
    let expected = expected.to_vec::<f32>().unwrap();
    let fast = backends(MemoryUse::Fast).into_iter().flat_map(|(isa, backends)| {
        let cases = [(Numerics::Strict, false), (Numerics::Default, true), (Numerics::Relaxed, true)];
        cases.map(|(numerics, is_winograd)| (isa, backends.clone(), numerics, is_winograd))
    });
    let lean = backends(MemoryUse::Lean).into_iter().map(|(isa, backends)| (isa, backends, Numerics::Default, false));
    for (isa, backends, numerics, is_winograd) in fast.chain(lean) {
        let options = CompileOptions { numerics, ..CompileOptions::default() };
        let said = format!("{isa}, {numerics:?}");
        let together: Vec<_> = backends
            .iter()
            .map(|backend| {
                let executable = backend.compile(&plan(3), &options).unwrap();
                let placed = &executable.placement().nodes;
                assert_eq!(placed.iter().any(|node| node.kernel == "Winograd convolution"), is_winograd, "{said}");
                answers(executable, &[Value::Tensor(image.clone())], &said)
            })
            .collect();
        assert!(together.iter().all(|t| all_same_bits(t, &together[0])), "{said}: other bits on more threads");
        let together = together[0][0].to_vec::<f32>().unwrap();
        let worst = together.iter().zip(&expected).map(|(a, e)| (a - e).abs()).fold(0.0, f32::max);
        assert!(worst < if numerics == Numerics::Relaxed { 3e-4 } else { 3e-5 }, "{said}: {worst} off");
        let samples = image.to_vec::<f32>().unwrap();
        for (sample, whole) in samples.chunks(24 * 15 * 22).zip(together.chunks(40 * 15 * 22)) {
            let sample = Tensor::from_vec([1, 24, 15, 22], sample.to_vec()).unwrap();
            let executable = backends[0].compile(&plan(1), &options).unwrap();
            let alone = answers(executable, &[Value::Tensor(sample)], &said).swap_remove(0);
            assert!(same_bits(&alone, &Tensor::from_vec([1, 40, 15, 22], whole.to_vec()).unwrap()), "{said}");
        }
    }
}

#[test]
fn sessions_of_one_backend_run_side_by_side() {
    let backend = cpu(CpuOptions { threads: 2, isa: None, ..CpuOptions::default() }).unwrap();
    let drawn: Vec<_> = (0..4).map(Drawing::chain).map(|d| (Plan::new(d.graph).unwrap(), d.inputs)).collect();
    let expected: Vec<_> = drawn.iter().map(|(plan, inputs)| run(&backend, plan, inputs, "one")).collect();
    std::thread::scope(|scope| {
        for ((plan, inputs), expected) in drawn.iter().zip(&expected) {
            let backend = &backend;
            scope.spawn(move || {
                for _ in 0..20 {
                    assert!(all_same_bits(&run(backend, plan, inputs, "side by side"), expected));
                }
            });
        }
    });
}
