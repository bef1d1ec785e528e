//! The driver, and all passes together on seeded random graphs.

use super::{
    Pass, PassOptions, Subject, declutter, driver,
    testing::{Builder, Random, assert_same, random_inputs, soak},
};
use crate::{
    Dim, Graph, NodeId, Patch, ValueId,
    ops::{
        BatchNorm, BinaryFunction, Cast, Clip, Concat, Conv, Dropout, FactorOrder, Flatten, FusedMatMul, Gemm,
        Identity, MatMul, Padding, Reduce, ReduceFunction, Reshape, Shape, Slice, Softmax, SoftmaxFunction, Squeeze,
        Transpose, Unary, UnaryFunction, Unsqueeze, Window,
    },
};
use cutover_tensor::{DType, Tensor};

/// Elementwise in f32, a dozen operators deep: fusion leaves out roundings of 6e-8 each, which sums and products of small numbers
/// make larger against the result.
const TOLERANCE: f64 = 1e-4;

impl Builder {
    fn dims(&self, value: ValueId) -> Vec<Dim> {
        self.graph.value(value).fact.as_tensor().unwrap().shape.clone().unwrap()
    }

    fn extent(&self, value: ValueId, axis: usize) -> Option<usize> {
        self.dims(value).get(axis)?.as_const().map(|d| d as usize)
    }

    /// One more value made of `pool`, by an operator or a pattern that some pass looks for.
    fn grow(&mut self, pool: &[ValueId]) -> Option<ValueId> {
        use BinaryFunction::{Add, Div, Mul, Pow, Sub};
        let x = match self.random.below(3) {
            0 => *self.random.pick(pool),
            _ => *pool.last()?,
        };
        let dims = self.dims(x);
        let rank = dims.len();
        Some(match self.random.below(24) {
            0 => {
                let functions = [
                    UnaryFunction::Neg,
                    UnaryFunction::Relu,
                    UnaryFunction::Sigmoid,
                    UnaryFunction::Tanh,
                    UnaryFunction::HardSwish,
                    UnaryFunction::LeakyRelu { alpha: 0.1 },
                    UnaryFunction::Gelu { tanh: false },
                ];
                let function = *self.random.pick(&functions);
                self.unary(function, x)
            }
            1 | 2 => {
                let number = self.random.pick(&[0f32, 1.0, 0.5, 2.0, 0.7]).to_owned();
                let function = *self.random.pick(&[Add, Sub, Mul]);
                let number = self.scalar(number);
                let swap = self.random.below(2) == 0;
                if swap { self.binary(function, number, x) } else { self.binary(function, x, number) }
            }
            3 => {
                let divisor = self.random.pick(&[1f32, 2.0, 3.0]).to_owned();
                let divisor = self.scalar(divisor);
                self.binary(Div, x, divisor)
            }
            4 | 5 => {
                let channels = self.extent(x, 1)?;
                let mut shape = vec![1; rank];
                shape[1] = channels;
                let lead = self.random.below(2) as usize;
                let constant = self.weight(&shape[lead..]);
                let function = *self.random.pick(&[Add, Mul]);
                self.binary(function, x, constant)
            }
            6 | 7 => {
                let same: Vec<ValueId> = pool.iter().copied().filter(|&v| self.dims(v) == dims).collect();
                let other = *self.random.pick(&same);
                let function = *self.random.pick(&[Add, Sub]);
                self.binary(function, x, other)
            }
            8 => {
                let (low, high) = (self.scalar(0.0), self.scalar(6.0));
                self.node(Clip, &[x, low, high])
            }
            9 | 10 if rank == 4 => {
                let channels = self.extent(x, 1)?;
                let depthwise = self.random.below(3) == 0;
                let (outputs, group) = if depthwise { (channels, channels) } else { (4, 1) };
                let padding = Padding::Explicit { begin: vec![1, 1], end: vec![1, 1] };
                let window =
                    Window { kernel_shape: None, strides: vec![], dilations: vec![], padding, ceil_mode: false };
                let w = self.weight(&[outputs, channels / group, 3, 3]);
                let mut inputs = vec![x, w];
                if self.random.below(2) == 0 {
                    inputs.push(self.weight(&[outputs]));
                }
                let y = self.node(Conv { window, group, activation: None }, &inputs);
                // Keeps numbers near 1.
                let scale = self.scalar(0.25);
                self.binary(Mul, y, scale)
            }
            11 => {
                let channels = self.extent(x, 1)?;
                let [scale, bias, mean] = [(); 3].map(|()| self.weight(&[channels]));
                let variance = (0..channels).map(|_| self.random.float().abs() + 0.5).collect();
                let variance = self.constant(Tensor::from_vec([channels], variance).unwrap());
                self.node(
                    BatchNorm { epsilon: 1e-3, training: None, per_element: false },
                    &[x, scale, bias, mean, variance],
                )
            }
            12 if rank >= 2 && self.random.below(4) == 0 => {
                let columns = self.extent(x, rank - 1)?;
                let w = self.weight(&[4, columns]);
                let (a, b) = (FactorOrder::default(), FactorOrder { batch: false, transpose: true });
                self.node(FusedMatMul { a, b, alpha: 0.25, function: None }, &[x, w])
            }
            12 | 13 if rank >= 2 => {
                let columns = self.extent(x, rank - 1)?;
                let w = self.weight(&[columns, 4]);
                let y = self.node(MatMul { activation: None }, &[x, w]);
                let (scale, bias) = (self.scalar(0.25), self.weight(&[4]));
                let y = self.binary(Add, y, bias);
                self.binary(Mul, y, scale)
            }
            14 if rank == 2 => {
                let columns = self.extent(x, 1)?;
                let w = self.weight(&[columns, 4]);
                let w = if self.random.below(2) == 0 { self.node(Transpose { permutation: None }, &[w]) } else { w };
                let transpose_b = self.extent(w, 1) == Some(columns) && self.extent(w, 0) == Some(4);
                let gemm = Gemm { alpha: 0.25, beta: 1.0, transpose_a: false, transpose_b, activation: None };
                self.node(gemm, &[x, w])
            }
            15 => {
                let mut permutation: Vec<usize> = (0..rank).collect();
                for i in (1..rank).rev() {
                    permutation.swap(i, self.random.below(i as u64 + 1) as usize);
                }
                self.node(Transpose { permutation: Some(permutation) }, &[x])
            }
            16 => self.node(Flatten { axis: 1 }, &[x]),
            17 => {
                let axis = self.random.below(rank as u64 + 1) as i64;
                let axis = self.integers(&[axis]);
                if rank < 5 { self.node(Unsqueeze, &[x, axis]) } else { return None }
            }
            18 => {
                let axis = dims.iter().position(|d| d.as_const() == Some(1))?;
                let axis = self.integers(&[axis as i64]);
                if rank > 2 { self.node(Squeeze, &[x, axis]) } else { return None }
            }
            19 => {
                // To its own shape, which is computed, and then flat.
                let shape = self.node(Shape { start: 0, end: None }, &[x]);
                let y = self.node(Reshape { allow_zero: false }, &[x, shape]);
                let flat = self.integers(&[0, -1]);
                dims[0].as_const().is_none().then(|| self.node(Reshape { allow_zero: false }, &[y, flat]))?
            }
            20 => match self.random.below(4) {
                0 => self.node(Identity, &[x]),
                1 => self.nodes(Dropout { seed: 0, mask_as_data: false }, &[x], 2)[0],
                2 => self.node(Cast::to(DType::F32), &[x]),
                _ => {
                    let (starts, ends) = (self.integers(&[0]), self.integers(&[i64::MAX]));
                    self.node(Slice, &[x, starts, ends])
                }
            },
            21 => {
                let gate = self.unary(UnaryFunction::Sigmoid, x);
                self.binary(Mul, x, gate)
            }
            22 => {
                let (root, one, half) = (self.scalar(2f32.sqrt()), self.scalar(1.0), self.scalar(0.5));
                let t = self.binary(Div, x, root);
                let t = self.unary(UnaryFunction::Erf, t);
                let t = self.binary(Add, t, one);
                let t = self.binary(Mul, x, t);
                self.binary(Mul, t, half)
            }
            _ => match self.random.below(3) {
                0 => self.node(Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false }, &[x]),
                1 => self.node(Concat { axis: rank as i64 - 1 }, &[x, x]),
                _ => {
                    let extent = self.extent(x, rank - 1).filter(|&n| n > 1)?;
                    let mean = Reduce { function: ReduceFunction::Mean, keep_dims: true, noop_with_empty_axes: false };
                    let (axes, two, epsilon) = (self.integers(&[-1]), self.scalar(2.0), self.scalar(0.1));
                    let centre = self.node(mean.clone(), &[x, axes]);
                    let centred = self.binary(Sub, x, centre);
                    let square = self.binary(Pow, centred, two);
                    let variance = self.node(mean, &[square, axes]);
                    let radicand = self.binary(Add, variance, epsilon);
                    let root = self.unary(UnaryFunction::Sqrt, radicand);
                    let y = self.binary(Div, centred, root);
                    let (scale, bias) = (self.weight(&[extent]), self.weight(&[extent]));
                    let y = self.binary(Mul, y, scale);
                    self.binary(Add, y, bias)
                }
            },
        })
    }
}

fn random_graph(seed: u64) -> Graph {
    let mut b = Builder::new(seed);
    let mut pool = vec![b.symbolic_input("x", &["N", "4", "3", "4"])];
    if b.random.below(2) == 0 {
        pool.push(b.symbolic_input("z", &["N", "4"]));
    }
    let count = 4 + b.random.below(14);
    for _ in 0..count {
        pool.extend(b.grow(&pool.clone()));
    }
    let mut outputs = vec![*pool.last().unwrap()];
    let extra = *b.random.pick(&pool);
    if !outputs.contains(&extra) && b.graph.producer(extra).is_some() {
        outputs.push(extra);
    }
    b.finish(&outputs)
}

#[test]
fn answers_of_random_graphs_stay_what_they_are() {
    let mut applied = std::collections::BTreeMap::<&str, usize>::new();
    for seed in 0..400 * soak() {
        let graph = random_graph(seed);
        let options = PassOptions { verify_each_patch: true, ..PassOptions::default() };
        let (after, report) = declutter(graph.clone(), &options).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        report.steps.iter().for_each(|s| *applied.entry(s.pass).or_default() += 1);
        assert_eq!((report.nodes_before, report.nodes_after), (graph.node_count(), after.node_count()));
        for extent in [1, 3] {
            println!("seed {seed}, N = {extent}");
            let inputs = random_inputs(&graph, &mut Random::new(seed), extent);
            assert_same(&graph, &after, &inputs, TOLERANCE);
        }
        // Nothing is left to do, and any prefix of the steps is a sound graph too.
        assert_eq!(declutter(after, &options).unwrap().1.steps, []);
        let stop = Random::new(seed).below(report.steps.len() as u64 + 1) as usize;
        let (partly, prefix) = declutter(graph.clone(), &PassOptions { stop_after: Some(stop), ..options }).unwrap();
        assert_eq!(prefix.steps, report.steps[..stop]);
        assert_same(&graph, &partly, &random_inputs(&graph, &mut Random::new(seed), 2), TOLERANCE);
    }
    // Every pass had something to do, but the one for classifiers, which are not among these graphs: the backends' tests have it.
    let passes = super::PASSES.iter().map(|p| p.name()).filter(|&name| name != "number-classes");
    let idle: Vec<&str> = passes.filter(|name| !applied.contains_key(name)).collect();
    assert!(idle.is_empty(), "{idle:?} never applied: {applied:?}");
}

/// Does to each `Neg` what its function says.
struct Faulty(fn(&Subject, NodeId) -> Patch);

impl Pass for Faulty {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let is_neg = matches!(&subject.node(id).op, crate::Op::Unary(op) if op.function == UnaryFunction::Neg);
        is_neg.then(|| (self.0)(subject, id))
    }
}

#[test]
fn a_patch_that_breaks_a_rule_is_named() {
    let check = |patch: fn(&Subject, NodeId) -> Patch, expected: &str| {
        let mut b = Builder::new(1);
        let x = b.symbolic_input("x", &["N", "3"]);
        let y = b.unary(UnaryFunction::Neg, x);
        let w = b.weight(&[3, 2]);
        let y = b.node(MatMul { activation: None }, &[y, w]);
        let error = driver::run(b.finish(&[y]), &[&Faulty(patch)], &PassOptions::default()).unwrap_err();
        assert_eq!(error.to_string(), expected);
    };
    fn with(subject: &Subject, id: NodeId, op: impl Into<crate::Op>) -> Patch {
        let node = subject.node(id);
        let mut patch = Patch::new();
        let new = patch.node("bad", op, &[node.inputs[0].map(Into::into)]);
        patch.replace(node.outputs[0], new);
        patch
    }
    check(
        |s, id| with(s, id, Cast::to(DType::F64)),
        "pass 'faulty' broke the graph at its step 1: what replaces a value has its type and shape: \
         'v0' of f32[N, 3] was to be replaced by f64[N, 3]",
    );
    check(
        |s, id| with(s, id, Transpose { permutation: None }),
        "pass 'faulty' broke the graph at its step 1: what replaces a value has its type and shape: \
         'v0' of f32[N, 3] was to be replaced by f32[3, N]",
    );
    check(
        |s, id| with(s, id, Transpose { permutation: Some(vec![0]) }),
        "pass 'faulty' broke the graph at its step 1: node 'bad' (Transpose): a permutation of 1 axes, the input has 2",
    );
    // A value that depends on what it replaces, by way of its user.
    check(
        |s, id| {
            let mut patch = Patch::new();
            let product = s.node(s.users(s.node(id).outputs[0])[0]).outputs[0];
            let w = patch.constant("w", crate::Constant::new(Tensor::zeros(DType::F32, [2, 3]).unwrap()));
            let new = patch.node("bad", MatMul { activation: None }, &[Some(product.into()), Some(w)]);
            patch.replace(s.node(id).outputs[0], new);
            patch
        },
        "pass 'faulty' broke the graph at its step 1: the graph has a cycle through node 'n1'",
    );
    // Never done.
    check(
        |s, id| with(s, id, Unary { function: UnaryFunction::Neg }),
        "pass 'faulty' broke the graph at its step 1041: passes come to an end: 1041 patches on a graph of 2 nodes",
    );
}

#[test]
fn what_no_fact_describes_is_left_alone() {
    // Of unknown rank, so that nothing has compared the weights with it, and they are absurd.
    let mut b = Builder::new(1);
    let x = b.graph.add_input("x", crate::TensorFact::unknown_rank(DType::F32));
    let (scalar, empty, three) = (b.scalar(2.0), b.weight(&[0]), b.weight(&[3]));
    let window = Window {
        kernel_shape: None,
        strides: vec![],
        dilations: vec![],
        padding: Padding::SameUpper,
        ceil_mode: false,
    };
    let y = b.node(Conv { window, group: 1, activation: None }, &[x, scalar]);
    let y = b.node(BatchNorm { epsilon: 1e-5, training: None, per_element: false }, &[y, three, empty, three, empty]);
    let y = b.binary(BinaryFunction::Add, y, three);
    let y = b.node(MatMul { activation: None }, &[y, scalar]);
    let y = b.binary(BinaryFunction::Add, y, empty);
    let y = b.unary(UnaryFunction::Relu, y);
    let y = b.node(Transpose { permutation: None }, &[y]);
    let y = b.node(Transpose { permutation: Some(vec![1, 0]) }, &[y]);
    let y = b.binary(BinaryFunction::Mul, y, scalar);
    let y = b.binary(BinaryFunction::Div, y, empty);
    let axes = b.integers(&[7]);
    let y = b.node(Unsqueeze, &[y, axes]);
    let y = b.node(Squeeze, &[y, axes]);
    let graph = b.finish(&[y]);
    let count = graph.node_count();
    assert_eq!(declutter(graph, &PassOptions::default()).unwrap().0.node_count(), count);
}

/// Asserts that the graph of four times as many nodes costs about four times the work, and gives what is left of the small one.
fn check_work(graph: impl Fn(usize) -> Graph, count: usize) -> usize {
    let run = |count: usize| {
        let options = PassOptions { verify_each_patch: false, ..PassOptions::default() };
        let (after, report) = declutter(graph(count), &options).unwrap();
        (after.node_count(), report.work)
    };
    let ((left, small), (_, large)) = (run(count), run(4 * count));
    assert!(large <= 5 * small, "{small} for {count}, {large} for four times as many");
    left
}

#[test]
fn work_grows_with_the_graph() {
    let chain = |count: usize| {
        let mut b = Builder::new(1);
        let mut y = b.symbolic_input("x", &["N", "4"]);
        let w = b.weight(&[4, 4]);
        for _ in 0..count {
            y = b.node(Identity, &[y]);
            y = b.node(MatMul { activation: None }, &[y, w]);
            y = b.unary(UnaryFunction::Tanh, y);
        }
        b.finish(&[y])
    };
    assert_eq!(check_work(chain, 500), 500);
    // One value that thousands of different nodes read.
    let star = |count: usize| {
        let mut b = Builder::new(1);
        let x = b.symbolic_input("x", &["N", "4"]);
        let parts: Vec<ValueId> = (0..count).map(|i| b.with_number(BinaryFunction::Mul, x, 2.0 + i as f32)).collect();
        let y = b.node(Concat { axis: 0 }, &parts);
        b.finish(&[y])
    };
    assert_eq!(check_work(star, 500), 501);
}

#[test]
fn thousands_of_equal_nodes_into_one_are_shared() {
    let fan = |count: usize| {
        let mut b = Builder::new(1);
        let x = b.symbolic_input("x", &["N", "4"]);
        let parts: Vec<ValueId> = (0..count).map(|_| b.unary(UnaryFunction::Exp, x)).collect();
        let y = b.node(Concat { axis: 0 }, &parts);
        b.finish(&[y])
    };
    assert_eq!(check_work(fan, 1000), 2);
}
