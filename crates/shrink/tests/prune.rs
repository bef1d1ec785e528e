//! Pruning on generated networks: what is zero can go, and nothing else changes. And what it says of what it can't do.

use cutover_backend::{Backend, CpuOptions, cpu, reference};
use cutover_graph::{
    Constant, Dim, Graph, NodeId, Op, TensorFact, ValueId,
    onnx::{Weights, export, import},
    ops::{
        AveragePool, BatchNorm, Binary, BinaryFunction, Cell, CellActivation, Concat, ConstantOfShape, Conv,
        ConvTranspose, DepthSpace, Direction, Flatten, Gemm, GlobalPool, GlobalPoolFunction, InstanceNorm, LayerNorm,
        MatMul, Padding, Recurrent, Reduce, ReduceFunction, Reshape, Shape, Slice, Softmax, SoftmaxFunction, Split,
        Transpose, Unary, UnaryFunction, Window,
    },
};
use cutover_shrink::{
    Data, Sample, ShrinkError, compare, plain,
    prune::{
        Amount, Criterion, Dependencies, Group, KeptIndices, PruneOptions, PruneReport, Restrictions, Scope, Sparsity,
        prune, sparsify,
    },
};
use cutover_tensor::{DType, Tensor, Value};
use proptest::prelude::*;
use std::{collections::HashSet, sync::Arc};

/// Numbers within about ±1, the same for the same seed.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| (next() + next() + next()) / 2.0).collect()
}

/// What follows in a generated network. Every one takes and gives `[N, channels, 8, 8]` with any number of channels.
#[derive(Clone, Copy, Debug)]
enum Block {
    Convolution { channels: usize, kernel: usize },
    Grouped { groups: usize, channels_each: usize },
    Depthwise,
    Transposed { groups: usize },
    BatchNorm,
    GroupNorm { groups: usize },
    InstanceNorm,
    Sigmoid,
    Relu,
    Residual,
    Dense { growth: usize },
    SqueezeExcite,
    Shuffle { groups: usize },
    SplitAndJoin,
    FirstChannels,
    SumOfHalves,
    Pool,
    DepthToSpace { depth_first: bool },
}

fn block() -> impl Strategy<Value = Block> {
    prop_oneof![
        (2usize..12, 0usize..2).prop_map(|(channels, k)| Block::Convolution { channels, kernel: 1 + 2 * k }),
        (2usize..4, 1usize..4).prop_map(|(groups, channels_each)| Block::Grouped { groups, channels_each }),
        Just(Block::Depthwise),
        (1usize..3).prop_map(|groups| Block::Transposed { groups }),
        Just(Block::BatchNorm),
        (1usize..4).prop_map(|groups| Block::GroupNorm { groups }),
        Just(Block::InstanceNorm),
        Just(Block::Sigmoid),
        Just(Block::Relu),
        Just(Block::Residual),
        (1usize..6).prop_map(|growth| Block::Dense { growth }),
        Just(Block::SqueezeExcite),
        (2usize..4).prop_map(|groups| Block::Shuffle { groups }),
        Just(Block::SplitAndJoin),
        Just(Block::FirstChannels),
        Just(Block::SumOfHalves),
        Just(Block::Pool),
        any::<bool>().prop_map(|depth_first| Block::DepthToSpace { depth_first }),
    ]
}

/// What a generated network ends in.
#[derive(Clone, Copy, Debug)]
enum Head {
    /// Mean over places, then a product.
    Pooled,
    /// Channels × places flattened, then a product.
    Flat,
    /// Places as a sequence through attention, with queries, keys and values from one product or three, and a network of two products.
    Attention { heads: usize, width: usize, joined: bool },
    /// Places as a sequence through two recurrent layers, the second of whose last states are read.
    Recurrent { cell: Cell, units: usize, both_ways: bool },
}

fn head() -> impl Strategy<Value = Head> {
    prop_oneof![
        Just(Head::Pooled),
        Just(Head::Flat),
        (2usize..4, 1usize..4, any::<bool>()).prop_map(|(heads, width, joined)| Head::Attention {
            heads,
            width,
            joined
        }),
        (cell(), 2usize..5, any::<bool>()).prop_map(|(cell, units, both_ways)| Head::Recurrent {
            cell,
            units,
            both_ways
        }),
    ]
}

fn cell() -> impl Strategy<Value = Cell> {
    prop_oneof![
        any::<bool>().prop_map(|coupled| Cell::Lstm { coupled }),
        any::<bool>().prop_map(|linear_before_reset| Cell::Gru { linear_before_reset }),
        Just(Cell::Rnn),
    ]
}

/// A graph in the making.
struct Model {
    graph: Graph,
    seed: u64,
}

impl Model {
    fn new(seed: u64, batch: Dim) -> (Model, ValueId) {
        let mut graph = Graph::new("model");
        let x = graph.add_input("x", TensorFact::new(DType::F32, vec![batch, 3.into(), 8.into(), 8.into()]));
        (Model { graph, seed: seed << 16 }, x)
    }

    fn constant(&mut self, shape: &[usize], scale: f32) -> ValueId {
        self.seed += 1;
        let values = noise(self.seed, shape.iter().product()).into_iter().map(|v| v * scale).collect();
        self.graph.add_constant(format!("weight{}", self.seed), Constant::new(Tensor::from_vec(shape, values).unwrap()))
    }

    fn numbers(&mut self, numbers: &[i64]) -> ValueId {
        self.seed += 1;
        let tensor = Tensor::from_vec([numbers.len()], numbers.to_vec()).unwrap();
        self.graph.add_constant(format!("numbers{}", self.seed), Constant::new(tensor))
    }

    fn nodes(&mut self, op: impl Into<Op>, inputs: &[ValueId], outputs: usize) -> Vec<ValueId> {
        let name = format!("node{}", self.graph.node_count());
        let inputs = inputs.iter().map(|&i| Some(i)).collect();
        let outputs = (0..outputs).map(|i| format!("{name}.{i}")).collect();
        let node = self.graph.add_node(name, op.into(), inputs, outputs).unwrap();
        self.graph.node(node).outputs.clone()
    }

    fn node(&mut self, op: impl Into<Op>, inputs: &[ValueId]) -> ValueId {
        self.nodes(op, inputs, 1)[0]
    }

    fn unary(&mut self, function: UnaryFunction, x: ValueId) -> ValueId {
        self.node(Unary { function }, &[x])
    }

    fn binary(&mut self, function: BinaryFunction, a: ValueId, b: ValueId) -> ValueId {
        self.node(Binary { function }, &[a, b])
    }

    fn extent(&self, value: ValueId, axis: usize) -> usize {
        let shape = self.graph.value(value).fact.as_tensor().unwrap().shape.as_ref().unwrap();
        shape[axis].as_const().unwrap() as usize
    }

    fn conv(&mut self, x: ValueId, channels: usize, kernel: usize, group: usize) -> ValueId {
        let input = self.extent(x, 1);
        let weight = self.constant(&[channels, input / group, kernel, kernel], 1.0);
        let bias = self.constant(&[channels], 0.5);
        self.node(Conv { window: window(kernel), group, activation: None }, &[x, weight, bias])
    }

    fn matmul(&mut self, x: ValueId, input: usize, output: usize) -> ValueId {
        let (weight, bias) = (self.constant(&[input, output], 0.5), self.constant(&[output], 0.5));
        let product = self.node(MatMul { activation: None }, &[x, weight]);
        self.binary(BinaryFunction::Add, product, bias)
    }

    fn reshape(&mut self, x: ValueId, shape: &[i64]) -> ValueId {
        let shape = self.numbers(shape);
        self.node(Reshape { allow_zero: false }, &[x, shape])
    }

    fn transpose(&mut self, x: ValueId, order: &[usize]) -> ValueId {
        self.node(Transpose { permutation: Some(order.to_vec()) }, &[x])
    }

    fn block(&mut self, x: ValueId, block: Block) -> ValueId {
        let channels = self.extent(x, 1);
        let whole = |groups: usize| channels.is_multiple_of(groups);
        match block {
            Block::Convolution { channels, kernel } => self.conv(x, channels, kernel, 1),
            Block::Grouped { groups, channels_each } if whole(groups) => {
                self.conv(x, groups * channels_each, 3, groups)
            }
            Block::Depthwise => self.conv(x, channels, 3, channels),
            Block::Transposed { groups } if whole(groups) => {
                let weight = self.constant(&[channels, 4, 3, 3], 1.0);
                let bias = self.constant(&[4 * groups], 0.5);
                let conv =
                    ConvTranspose { window: window(3), group: groups, output_padding: vec![], output_shape: None };
                self.node(conv, &[x, weight, bias])
            }
            Block::BatchNorm => {
                let parameters = [(); 3].map(|()| self.constant(&[channels], 1.0));
                let variance = self.constant(&[channels], 1.0);
                let variance = self.node(Unary { function: UnaryFunction::Abs }, &[variance]);
                let norm = BatchNorm { epsilon: 1e-2, training: None, per_element: false };
                self.node(norm, &[&[x], &parameters[..], &[variance]].concat())
            }
            Block::GroupNorm { groups } if whole(groups) => self.channel_norm(x, Some(groups)),
            Block::InstanceNorm => self.channel_norm(x, None),
            Block::Sigmoid => self.unary(UnaryFunction::Sigmoid, x),
            Block::Relu => self.unary(UnaryFunction::Relu, x),
            Block::Residual => {
                let inside = self.conv(x, 5, 1, 1);
                let inside = self.unary(UnaryFunction::Sigmoid, inside);
                let inside = self.conv(inside, channels, 3, 1);
                self.binary(BinaryFunction::Add, x, inside)
            }
            Block::Dense { growth } => {
                let more = self.conv(x, growth, 3, 1);
                self.node(Concat { axis: 1 }, &[x, more])
            }
            Block::SqueezeExcite => {
                let pooled = self.node(GlobalPool { function: GlobalPoolFunction::Average }, &[x]);
                let squeezed = self.conv(pooled, 4, 1, 1);
                let squeezed = self.unary(UnaryFunction::Relu, squeezed);
                let gate = self.conv(squeezed, channels, 1, 1);
                let gate = self.unary(UnaryFunction::Sigmoid, gate);
                self.binary(BinaryFunction::Mul, x, gate)
            }
            Block::Shuffle { groups } if whole(groups) => {
                let (g, c) = (groups as i64, channels as i64);
                let apart = self.reshape(x, &[0, g, c / g, 8, 8]);
                let swapped = self.transpose(apart, &[0, 2, 1, 3, 4]);
                self.reshape(swapped, &[-1, c, 8, 8])
            }
            Block::SplitAndJoin if channels >= 2 => {
                let first = channels as i64 / 2;
                let sizes = self.numbers(&[first, channels as i64 - first]);
                let parts = self.nodes(Split { axis: 1, parts: 2 }, &[x, sizes], 2);
                let branch = self.conv(parts[1], 6, 1, 1);
                self.node(Concat { axis: 1 }, &[branch, parts[0]])
            }
            Block::FirstChannels if channels >= 3 => {
                let [starts, ends, axes] = [[1], [-1], [1]].map(|numbers| self.numbers(&numbers));
                self.node(Slice, &[x, starts, ends, axes])
            }
            Block::SumOfHalves if whole(2) => {
                let parts = self.nodes(Split { axis: 1, parts: 2 }, &[x], 2);
                self.binary(BinaryFunction::Add, parts[0], parts[1])
            }
            Block::Pool => {
                let window = Window { kernel_shape: Some(vec![3; 2]), ..window(3) };
                self.node(AveragePool { window, count_include_pad: true }, &[x])
            }
            Block::DepthToSpace { depth_first } if whole(4) => {
                let wide = self.node(DepthSpace { to_space: true, block: 2, depth_first }, &[x]);
                let strided = Window { strides: vec![2; 2], ..window(3) };
                let (weight, bias) = (self.constant(&[6, channels / 4, 3, 3], 1.0), self.constant(&[6], 0.5));
                self.node(Conv { window: strided, group: 1, activation: None }, &[wide, weight, bias])
            }
            _ => x,
        }
    }

    fn channel_norm(&mut self, x: ValueId, groups: Option<usize>) -> ValueId {
        let channels = self.extent(x, 1);
        let (scale, bias) = (self.constant(&[channels], 1.0), self.constant(&[channels], 1.0));
        self.node(InstanceNorm { epsilon: 1e-3, groups }, &[x, scale, bias])
    }

    /// `[steps, samples, features]` to every state, and the last.
    fn recurrent(&mut self, x: ValueId, cell: Cell, sizes: [usize; 2], both_ways: bool) -> Vec<ValueId> {
        let ([features, units], rows) = (sizes, cell.gates() * sizes[1]);
        let direction = if both_ways { Direction::Bidirectional } else { Direction::Forward };
        let ways = direction.count();
        let activations = match cell {
            Cell::Lstm { .. } => &[CellActivation::Sigmoid, CellActivation::Tanh, CellActivation::Tanh][..],
            Cell::Gru { .. } => &[CellActivation::Sigmoid, CellActivation::Tanh],
            Cell::Rnn => &[CellActivation::Tanh],
        };
        let weights = self.constant(&[ways, rows, features], 0.5);
        let recurrent = self.constant(&[ways, rows, units], 0.5);
        let bias = self.constant(&[ways, 2 * rows], 0.5);
        let layer = Recurrent {
            cell,
            direction,
            hidden_size: Some(units),
            activations: activations.repeat(ways),
            clip: None,
            batch_first: false,
        };
        self.nodes(layer, &[x, weights, recurrent, bias], 2)
    }

    fn head(&mut self, x: ValueId, head: Head) -> ValueId {
        let channels = self.extent(x, 1);
        let gemm = Gemm { alpha: 1.0, beta: 1.0, transpose_a: false, transpose_b: true, activation: None };
        match head {
            Head::Pooled | Head::Flat => {
                let pooled = match head {
                    Head::Pooled => self.node(GlobalPool { function: GlobalPoolFunction::Average }, &[x]),
                    _ => x,
                };
                let flat = self.node(Flatten { axis: 1 }, &[pooled]);
                let width = if matches!(head, Head::Pooled) { channels } else { channels * 64 };
                let (weight, bias) = (self.constant(&[5, width], 0.3), self.constant(&[5], 0.5));
                self.node(gemm, &[flat, weight, bias])
            }
            Head::Attention { heads, width, joined } => {
                let hidden = heads * width;
                let rows = self.reshape(x, &[0, channels as i64, 64]);
                let rows = self.transpose(rows, &[0, 2, 1]);
                let tokens = self.matmul(rows, channels, hidden);
                let (gain, shift) = (self.constant(&[hidden], 1.0), self.constant(&[hidden], 1.0));
                let norm = LayerNorm { axis: -1, epsilon: 1e-3, centred: true, with_deviation: false };
                let normed = self.node(norm, &[tokens, gain, shift]);
                let (h, d) = (heads as i64, width as i64);
                let apart: Vec<ValueId> = if joined {
                    let all = self.matmul(normed, hidden, 3 * hidden);
                    let all = self.reshape(all, &[0, 64, 3, h, d]);
                    let all = self.transpose(all, &[2, 0, 3, 1, 4]);
                    let parts = self.nodes(Split { axis: 0, parts: 3 }, &[all], 3);
                    parts.into_iter().map(|part| self.reshape(part, &[-1, h, 64, d])).collect()
                } else {
                    let three = [(); 3].map(|()| {
                        let one = self.matmul(normed, hidden, hidden);
                        let one = self.reshape(one, &[-1, 64, h, d]);
                        self.transpose(one, &[0, 2, 1, 3])
                    });
                    three.to_vec()
                };
                let keys = self.transpose(apart[1], &[0, 1, 3, 2]);
                let scores = self.node(MatMul { activation: None }, &[apart[0], keys]);
                let softmax = Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false };
                let scores = self.node(softmax, &[scores]);
                let mixed = self.node(MatMul { activation: None }, &[scores, apart[2]]);
                let mixed = self.transpose(mixed, &[0, 2, 1, 3]);
                let mixed = self.reshape(mixed, &[0, 0, hidden as i64]);
                let out = self.matmul(mixed, hidden, hidden);
                let tokens = self.binary(BinaryFunction::Add, tokens, out);
                let inner = self.matmul(tokens, hidden, 7);
                let inner = self.unary(UnaryFunction::Tanh, inner);
                let inner = self.matmul(inner, 7, hidden);
                let tokens = self.binary(BinaryFunction::Add, tokens, inner);
                let axes = self.numbers(&[1]);
                let mean = Reduce { function: ReduceFunction::Mean, keep_dims: false, noop_with_empty_axes: false };
                let mean = self.node(mean, &[tokens, axes]);
                let (weight, bias) = (self.constant(&[5, hidden], 0.3), self.constant(&[5], 0.5));
                self.node(gemm, &[mean, weight, bias])
            }
            Head::Recurrent { cell, units, both_ways } => {
                let rows = self.reshape(x, &[0, channels as i64, 64]);
                let steps = self.transpose(rows, &[2, 0, 1]);
                let all = self.recurrent(steps, cell, [channels, units], both_ways)[0];
                let all = self.transpose(all, &[0, 2, 1, 3]);
                let width = units * if both_ways { 2 } else { 1 };
                let steps = self.reshape(all, &[0, 0, width as i64]);
                let last = self.recurrent(steps, cell, [width, 6], both_ways)[1];
                let last = self.transpose(last, &[1, 0, 2]);
                let flat = self.node(Flatten { axis: 1 }, &[last]);
                let width = 6 * if both_ways { 2 } else { 1 };
                let (weight, bias) = (self.constant(&[5, width], 0.3), self.constant(&[5], 0.5));
                self.node(gemm, &[flat, weight, bias])
            }
        }
    }
}

fn window(kernel: usize) -> Window {
    let pads = vec![kernel / 2; 2];
    Window {
        kernel_shape: Some(vec![kernel; 2]),
        strides: vec![1; 2],
        dilations: vec![1; 2],
        padding: Padding::Explicit { begin: pads.clone(), end: pads },
        ceil_mode: false,
    }
}

fn network(seed: u64, open: bool, blocks: &[Block], head: Head) -> Graph {
    let (mut model, x) = Model::new(seed, if open { Dim::symbol("N") } else { Dim::Const(2) });
    let mut y = model.conv(x, 8, 3, 1);
    for &block in blocks {
        y = model.block(y, block);
    }
    let y = model.head(y, head);
    model.graph.set_outputs(vec![y]);
    plain(model.graph).unwrap()
}

fn images(seed: u64) -> Vec<Sample> {
    let image = Tensor::from_vec([2, 3, 8, 8], noise(seed, 2 * 3 * 64)).unwrap();
    vec![vec![("x".to_string(), Value::from(image))]]
}

/// Of every group about half, at least one.
fn some(groups: &[Group], seed: u64) -> KeptIndices {
    let of = |group: &Group| {
        let chance = noise(seed.wrapping_add(group.nodes.len() as u64 * 31 + group.size as u64), group.size);
        let mut kept: Vec<usize> = (0..group.size).filter(|&i| chance[i] > 0.0).collect();
        if kept.is_empty() {
            kept.push(group.size / 2);
        }
        (group.axis, kept)
    };
    groups.iter().map(of).collect()
}

/// The graph in which what would go is zero: weights and biases of products, and parameters of norms.
fn zeroed(dependencies: &Dependencies, kept: &KeptIndices) -> Graph {
    scaled_but(dependencies, kept, 0.0)
}

/// The graph in which what would go is `by` times what it was.
fn scaled_but(dependencies: &Dependencies, kept: &KeptIndices, by: f32) -> Graph {
    let mut graph = dependencies.graph.clone();
    let parameters = |op: &Op| match op {
        Op::Conv(_) | Op::ConvTranspose(_) | Op::MatMul(_) | Op::Gemm(_) | Op::Einsum(_) | Op::Binary(_) => 0..3,
        Op::BatchNorm(_) | Op::InstanceNorm(_) | Op::LayerNorm(_) => 1..3,
        Op::Recurrent(_) => 1..4,
        _ => 0..0,
    };
    let weights: HashSet<ValueId> = dependencies
        .graph
        .nodes()
        .flat_map(|(_, node)| parameters(&node.op).filter_map(|i| *node.inputs.get(i)?).collect::<Vec<_>>())
        .filter(|&value| dependencies.graph.constant(value).is_some())
        .collect();
    for id in weights {
        let tensor = &dependencies.graph.constant(id).unwrap().tensor;
        let Ok(mut values) = tensor.to_vec::<f32>() else { continue };
        let shape = tensor.shape().dims().to_vec();
        for (axis, &extent) in shape.iter().enumerate() {
            let stay = dependencies.axes.kept(dependencies.of[&id][axis], kept);
            let inner: usize = shape[axis + 1..].iter().product();
            for (i, run) in values.chunks_exact_mut(inner.max(1)).enumerate() {
                if stay.binary_search(&(i % extent)).is_err() {
                    run.iter_mut().for_each(|v| *v *= by);
                }
            }
        }
        graph.value_mut(id).source =
            cutover_graph::Source::Constant(Constant::new(Tensor::from_vec(shape, values).unwrap()));
    }
    graph
}

/// Rounding only: sums are shorter, and those of a norm's output are taken in another order.
const TOLERANCE: f64 = 2e-5;

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    /// Zero channels, heads and neurons can go: the answers stay.
    #[test]
    fn what_is_zero_can_go(
        seed in 0u64..1 << 32,
        open in any::<bool>(),
        blocks in prop::collection::vec(block(), 0..8),
        head in head(),
        through_norms in prop::bool::weighted(0.2),
    ) {
        let restrictions = Restrictions { through_norms, ..Restrictions::default() };
        let dependencies = Dependencies::new(network(seed, open, &blocks, head), &restrictions);
        let kept = some(&dependencies.groups(), seed);
        let before = zeroed(&dependencies, &kept);
        let after = dependencies.remove(&kept).unwrap();
        let comparison = compare(&before, &after, &reference(), &images(seed)).unwrap();
        let output = &comparison.outputs[0];
        // Through norms the mean is another; the shapes fit all the same.
        prop_assert!(
            through_norms || output.absolute_error_max <= TOLERANCE * output.magnitude_max.max(1.0),
            "off by {} of {}", output.absolute_error_max, output.magnitude_max
        );
    }
}

fn data(seed: u64) -> Data {
    Data { samples: images(seed), labels: Some(vec![vec![1, 3]]) }
}

fn quiet(_: &str, _: usize, _: usize) {}

fn on_cpu() -> Arc<dyn Backend> {
    cpu(CpuOptions { threads: 1, ..CpuOptions::default() }).unwrap()
}

fn pruned(graph: &Graph, options: &PruneOptions) -> Result<(Graph, PruneReport), ShrinkError> {
    prune(graph, options, &data(1), &on_cpu(), &quiet)
}

/// A residual network with a depthwise convolution and a dense block.
fn residual() -> Graph {
    let wide = Block::Convolution { channels: 32, kernel: 3 };
    network(
        7,
        true,
        &[wide, Block::BatchNorm, Block::Relu, Block::Residual, Block::Depthwise, Block::Dense { growth: 8 }],
        Head::Pooled,
    )
}

fn by_channels(share: f64) -> PruneOptions {
    PruneOptions { amount: Amount::Channels(share), ..PruneOptions::default() }
}

#[test]
fn half_of_the_channels_is_a_quarter_of_the_work() {
    let graph = residual();
    let criteria = [Criterion::L1, Criterion::L2, Criterion::Activation, Criterion::Taylor];
    for criterion in criteria.into_iter().filter(|&c| c != Criterion::Taylor || cfg!(feature = "train")) {
        for scope in [Scope::Uniform, Scope::Global] {
            let options = PruneOptions { criterion, scope, ..by_channels(0.5) };
            let (small, report) = pruned(&graph, &options).unwrap();
            let share = report.operations[1] as f64 / report.operations[0] as f64;
            assert!((0.2..0.45).contains(&share), "{criterion:?} {scope:?}: {share} of the operations");
            assert!(report.parameters[1] < report.parameters[0] / 2);
            // Both backends, and what is read back from the file.
            let file = cutover_graph::onnx::encode(&small).unwrap();
            let read = cutover_graph::onnx::import_bytes(file.into(), None, &Default::default()).unwrap();
            for backend in [on_cpu(), reference()] {
                compare(&graph, &small, &backend, &images(3)).unwrap();
            }
            assert_eq!(compare(&small, &read, &reference(), &images(3)).unwrap().outputs[0].absolute_error_max, 0.0);
        }
    }
}

#[test]
fn a_share_of_operations_is_reached() {
    for share in [0.3, 0.5, 0.75] {
        let options = PruneOptions { amount: Amount::Operations(share), multiple: 1, ..PruneOptions::default() };
        let (_, report) = pruned(&residual(), &options).unwrap();
        let left = report.operations[1] as f64 / report.operations[0] as f64;
        assert!(report.reached && left <= share && left > share - 0.1, "{left} for {share}");
    }
    let options = PruneOptions { amount: Amount::Operations(0.0), ..PruneOptions::default() };
    assert!(!pruned(&residual(), &options).unwrap().1.reached);
}

/// Heads go whole, and what is not important goes first.
#[test]
fn the_least_head_goes() {
    let mut graph = network(5, true, &[], Head::Attention { heads: 3, width: 3, joined: false });
    let value = graph.nodes().filter(|(_, node)| matches!(node.op, Op::MatMul(_))).nth(1).unwrap().1.inputs[1].unwrap();
    let (shape, mut weights) = (
        graph.constant(value).unwrap().tensor.shape().dims().to_vec(),
        graph.constant(value).unwrap().tensor.to_vec::<f32>().unwrap(),
    );
    assert_eq!(shape, [9, 9]);
    // The second head's queries are a hundred times larger.
    weights.iter_mut().enumerate().filter(|(i, _)| (3..6).contains(&(i % 9))).for_each(|(_, w)| *w *= 100.0);
    graph.value_mut(value).source =
        cutover_graph::Source::Constant(Constant::new(Tensor::from_vec(shape, weights).unwrap()));
    let dependencies = Dependencies::new(graph.clone(), &Restrictions::default());
    let mut groups = dependencies.groups();
    dependencies.score(&mut groups, Criterion::L1, &on_cpu(), &data(1), &quiet).unwrap();
    let heads = groups.iter().find(|group| group.width == 3).unwrap();
    assert_eq!((heads.size, heads.nodes.len()), (3, 3), "queries, keys and values");
    let kept = cutover_shrink::prune::select(&groups, 0.67, Scope::Uniform, 1);
    assert_eq!(kept[&heads.axis], [1]);
    let small = dependencies.remove(&kept).unwrap();
    compare(&graph, &small, &reference(), &images(2)).unwrap();
}

/// Units of a recurrent layer go as channels do, and a state of zeros whose shape a run computes holds none back.
#[test]
fn units_of_recurrent_layers_go() {
    for cell in [Cell::Lstm { coupled: false }, Cell::Gru { linear_before_reset: true }, Cell::Rnn] {
        let mut graph = network(3, true, &[], Head::Recurrent { cell, units: 16, both_ways: true });
        let x = graph.inputs()[0];
        let ends = [("ways", 2i64), ("units", 16)].map(|(name, extent)| {
            graph.add_constant(name, Constant::new(Tensor::from_vec([1], vec![extent]).unwrap()))
        });
        let mut node = |name: &str, op: Op, inputs: &[ValueId]| {
            let inputs = inputs.iter().map(|&input| Some(input)).collect();
            let node = graph.add_node(name, op, inputs, vec![name.to_string()]).unwrap();
            graph.node(node).outputs[0]
        };
        let samples = node("samples", Shape { start: 0, end: Some(1) }.into(), &[x]);
        let shape = node("shape", Concat { axis: 0 }.into(), &[ends[0], samples, ends[1]]);
        let value = Tensor::from_vec([1], vec![0f32]).unwrap();
        let zeros = node("zeros", ConstantOfShape { value }.into(), &[shape]);
        let layer = recurrent_layers(&graph)[0];
        graph.node_mut(layer).inputs.extend([None, Some(zeros)]);
        let (small, report) = pruned(&graph, &by_channels(0.5)).unwrap();
        let layer = small.node(recurrent_layers(&small)[0]);
        let Op::Recurrent(op) = &layer.op else { panic!("{layer:?}") };
        assert_eq!(op.hidden_size, Some(8));
        let share = report.operations[1] as f64 / report.operations[0] as f64;
        assert!((0.2..0.6).contains(&share), "{cell:?}: {share} of the operations");
        let file = cutover_graph::onnx::encode(&small).unwrap();
        let read = cutover_graph::onnx::import_bytes(file.into(), None, &Default::default()).unwrap();
        compare(&graph, &read, &on_cpu(), &images(3)).unwrap();
    }
}

fn recurrent_layers(graph: &Graph) -> Vec<NodeId> {
    let order = graph.topological_order().unwrap();
    order.into_iter().filter(|&id| matches!(graph.node(id).op, Op::Recurrent(_))).collect()
}

#[test]
fn what_can_not_be_done_is_said() {
    let refused = |graph: &Graph, options: &PruneOptions| pruned(graph, options).err().unwrap().to_string();
    let graph = residual();
    for share in [-0.1, 1.0, f64::NAN] {
        let message = refused(&graph, &by_channels(share));
        assert!(message.contains("at least 0 and below 1"), "{message}");
    }
    let message = prune(&graph, &by_channels(0.5), &Data::default(), &on_cpu(), &quiet).err().unwrap().to_string();
    assert!(message.contains("at least one sample"), "{message}");
    // All that is left is read and given by the model, or excluded.
    let names = graph.nodes().map(|(_, node)| node.name.clone()).collect();
    let restrictions = Restrictions { exclude: names, ..Restrictions::default() };
    let message = refused(&graph, &PruneOptions { restrictions, ..by_channels(0.5) });
    assert!(message.starts_with("nothing can be pruned: ") && message.contains("excluded"), "{message}");

    let mut broken = graph.clone();
    let (id, name) =
        broken.values().find(|(_, v)| v.name.starts_with("weight")).map(|(i, v)| (i, v.name.clone())).unwrap();
    let shape = broken.constant(id).unwrap().tensor.shape().dims().to_vec();
    let mut values = broken.constant(id).unwrap().tensor.to_vec::<f32>().unwrap();
    values[4] = f32::NAN;
    broken.value_mut(id).source =
        cutover_graph::Source::Constant(Constant::new(Tensor::from_vec(shape, values).unwrap()));
    let message = refused(&broken, &by_channels(0.5));
    assert!(message.contains("NaN") && message.contains("expected a finite number"), "{name}: {message}");
}

#[test]
fn single_weights_become_zero() {
    let zeros = |sparsity| {
        let mut graph = residual();
        let report = sparsify(&mut graph, sparsity, &HashSet::new()).unwrap();
        compare(&residual(), &graph, &on_cpu(), &images(1)).unwrap();
        report
    };
    for report in [zeros(Sparsity::Global { ratio: 0.5 }), zeros(Sparsity::PerLayer { ratio: 0.5 })] {
        assert!((report.zeros() - 0.5).abs() < 0.01, "{}", report.zeros());
    }
    let layers = zeros(Sparsity::PerLayer { ratio: 0.5 }).layers;
    assert!(layers.iter().all(|(_, weights, zeros)| (2 * zeros).abs_diff(*weights) <= 1));
    let pattern = zeros(Sparsity::Pattern { keep: 2, of: 4 });
    let (_, weights, cleared) = pattern.layers.iter().find(|layer| layer.1 == 32 * 5).unwrap();
    assert_eq!(2 * cleared, *weights, "32 input channels divide by 4");
    let refuse = |sparsity| sparsify(&mut residual(), sparsity, &HashSet::new()).err().unwrap().to_string();
    assert!(refuse(Sparsity::Pattern { keep: 5, of: 4 }).contains("5:4"));
    assert!(refuse(Sparsity::Global { ratio: 1.5 }).contains("1.5"));
}

/// Where two thirds are zero, a file of sparse weights is smaller; with fewer, they are stored as ever.
#[test]
fn zeros_take_no_room_where_they_are_many() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = |graph: &Graph, weights: &Weights| {
        let path = folder.path().join("model.onnx");
        export(graph, &path, weights).unwrap();
        let read = import(&path, &Default::default()).unwrap();
        let comparison = compare(graph, &read, &reference(), &images(1)).unwrap();
        assert_eq!(comparison.outputs[0].absolute_error_max, 0.0);
        std::fs::metadata(&path).unwrap().len()
    };
    for (ratio, smaller) in [(0.9, true), (0.5, false)] {
        let mut graph = residual();
        sparsify(&mut graph, Sparsity::PerLayer { ratio }, &HashSet::new()).unwrap();
        let (dense, sparse) = (bytes(&graph, &Weights::Inline), bytes(&graph, &Weights::Sparse));
        assert_eq!(sparse < dense, smaller, "{sparse} against {dense} bytes at {ratio}");
        assert!(sparse <= dense && (!smaller || sparse < dense / 2), "{sparse} against {dense} bytes at {ratio}");
    }
}

/// To first order, the loss changes by what the Taylor criterion says when all that goes with a channel becomes zero.
#[cfg(feature = "train")]
#[test]
fn what_the_loss_does_without_a_channel() {
    let graph = network(11, true, &[Block::Relu, Block::Residual], Head::Pooled);
    let dependencies = Dependencies::new(graph, &Restrictions::default());
    let mut groups = dependencies.groups();
    let data = data(4);
    dependencies.score(&mut groups, Criterion::Taylor, &on_cpu(), &data, &quiet).unwrap();
    let loss = |graph: &Graph| {
        let executable =
            reference().compile(&cutover_graph::Plan::new(graph.clone()).unwrap(), &Default::default()).unwrap();
        let mut session = executable.session(Default::default()).unwrap();
        let mut outputs = [cutover_backend::Output::Allocate(None)];
        let input = cutover_backend::Input::Value(&data.samples[0][0].1);
        session.run(&[input], &mut outputs, &Default::default()).unwrap();
        let [cutover_backend::Output::Allocate(Some(Value::Tensor(scores)))] = outputs else { panic!() };
        let rows = scores.to_vec::<f32>().unwrap();
        let row = |(row, &label): (&[f32], &i64)| {
            let sum: f64 = row.iter().map(|&s| f64::from(s).exp()).sum();
            sum.ln() - f64::from(row[label as usize])
        };
        rows.chunks(5).zip(&data.labels.as_ref().unwrap()[0]).map(row).sum::<f64>() / 2.0
    };
    for group in &groups {
        // All that goes with an index, a little smaller; weights that meet twice change the loss twice as much.
        let change = |index: usize| {
            let scaled = |by: f32| {
                let kept = KeptIndices::from([(group.axis, (0..group.size).filter(|&i| i != index).collect())]);
                loss(&scaled_but(&dependencies, &kept, by))
            };
            let step = 1e-3;
            ((scaled(1.0 + step) - scaled(1.0 - step)) / (2.0 * f64::from(step))).powi(2)
        };
        let changes: Vec<f64> = (0..group.size).map(change).collect();
        let mean = changes.iter().sum::<f64>() / group.size as f64;
        for (change, score) in changes.iter().zip(&group.scores) {
            assert!((change / mean - score).abs() < 0.02 + 0.05 * score, "{} against {score}", change / mean);
        }
    }
}
