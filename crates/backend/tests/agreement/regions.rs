//! Graphs of which only a run knows all shapes, and graphs with graphs in them: the CPU backend against the reference, and what it promises
//! of them.
//!
//! `CUTOVER_SOAK=N` runs N times as many graphs.

use super::support::{Random, seeds};
use cutover_backend::{
    Backend, Cancellation, CompileOptions, CpuOptions, Executable, Input, OpTiming, Output, Profiler, RunContext,
    RunError, RunLimits, SessionMemory, cpu, reference,
};
use cutover_graph::{
    Constant, Dim, Fact, Graph, Op, Plan, TensorFact, ValueId,
    ops::{
        Binary, BinaryFunction, Branch, Concat, ConcatFromSequence, Gather, MatMul, NonZero, Reduce, ReduceFunction,
        Repeat, Reshape, Scan, Scanned, Shape, Slice, SplitToSequence, Subgraph, TopK, Unary, UnaryFunction,
    },
};
use cutover_tensor::{DType, Tensor, Value};
use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// A graph being made.
struct Making {
    graph: Graph,
    nodes: usize,
}

impl Making {
    fn new(name: &str) -> Making {
        Making { graph: Graph::new(name), nodes: 0 }
    }

    fn input(&mut self, name: &str, dtype: DType, dims: &[Option<usize>]) -> ValueId {
        let dim =
            |(axis, d): (usize, &Option<usize>)| d.map_or_else(|| Dim::symbol(format!("{name}{axis}")), Dim::from);
        let dims: Vec<Dim> = dims.iter().enumerate().map(dim).collect();
        self.graph.add_input(name, TensorFact::new(dtype, dims))
    }

    fn constant(&mut self, tensor: Tensor) -> ValueId {
        let name = self.graph.unique_value_name("c");
        self.graph.add_constant(name, Constant::new(tensor))
    }

    fn integers(&mut self, values: &[i64]) -> ValueId {
        self.constant(Tensor::from_vec([values.len()], values.to_vec()).unwrap())
    }

    fn nodes(&mut self, op: impl Into<Op>, inputs: &[ValueId], outputs: usize) -> Vec<ValueId> {
        self.nodes += 1;
        let (name, op) = (format!("{}.n{}", self.graph.name, self.nodes), op.into());
        let names = (0..outputs).map(|i| format!("{}.v{}_{i}", self.graph.name, self.nodes)).collect();
        let node = self.graph.add_node(name, op, inputs.iter().copied().map(Some).collect(), names).unwrap();
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

    fn scalar(&mut self, value: f32) -> ValueId {
        self.constant(Tensor::scalar(value))
    }

    fn reduce(&mut self, function: ReduceFunction, x: ValueId, axes: &[i64]) -> ValueId {
        let op = Reduce { function, keep_dims: false, noop_with_empty_axes: false };
        let axes = self.integers(axes);
        self.node(op, &[x, axes])
    }

    fn reshape(&mut self, x: ValueId, to: &[i64]) -> ValueId {
        let to = self.integers(to);
        self.node(Reshape { allow_zero: false }, &[x, to])
    }

    fn body(mut self, outputs: &[ValueId], captured: usize) -> Subgraph {
        self.graph.set_outputs(outputs.to_vec());
        Subgraph::new(self.graph, captured).unwrap()
    }

    fn plan(mut self, outputs: &[ValueId]) -> Plan {
        self.graph.set_outputs(outputs.to_vec());
        Plan::new(self.graph).unwrap()
    }

    /// The rows of `x [n, …]` whose largest element is above a half: how many they are only a run tells.
    fn some_rows(&mut self, x: ValueId) -> ValueId {
        let largest = self.reduce(ReduceFunction::Max, x, &[1]);
        let half = self.scalar(0.5);
        let mask = self.binary(BinaryFunction::Greater, largest, half);
        let found = self.node(NonZero, &[mask]);
        let rows = self.reshape(found, &[-1]);
        self.node(Gather { axis: 0 }, &[x, rows])
    }

    /// The first half of the rows of `x`, by arithmetic on its shape, and its best elements.
    fn first_half(&mut self, x: ValueId) -> ValueId {
        let shape = self.node(Shape { start: 0, end: Some(1) }, &[x]);
        let (one, two) = (self.integers(&[1]), self.integers(&[2]));
        let more = self.binary(BinaryFunction::Add, shape, one);
        let half = self.binary(BinaryFunction::Div, more, two);
        let (start, axis) = (self.integers(&[0]), self.integers(&[0]));
        let rows = self.node(Slice, &[x, start, half, axis]);
        let op = TopK { axis: 0, largest: true, sorted: true };
        self.nodes(op, &[rows, half], 2)[0]
    }

    /// `-x`, or `x` twice: as the sum of `x` says.
    fn branch(&mut self, x: ValueId, width: usize) -> ValueId {
        let sum = self.reduce(ReduceFunction::Sum, x, &[0, 1]);
        let zero = self.scalar(0.0);
        let condition = self.binary(BinaryFunction::Greater, sum, zero);
        let number = self.nodes;
        let mut positive = Making::new(&format!("then{number}"));
        let inner = positive.input("x", DType::F32, &[None, Some(width)]);
        let y = positive.unary(UnaryFunction::Neg, inner);
        let positive = positive.body(&[y], 1);
        let mut negative = Making::new(&format!("else{number}"));
        let inner = negative.input("x", DType::F32, &[None, Some(width)]);
        let y = negative.node(Concat { axis: 0 }, &[inner, inner]);
        let negative = negative.body(&[y], 1);
        self.node(Branch { then_branch: positive, else_branch: negative }, &[condition, x, x])
    }

    /// `trips` times `x · w`, squashed; and the sum of every trip's.
    fn repeat(&mut self, x: ValueId, w: ValueId, trips: i64, width: usize) -> [ValueId; 2] {
        let number = self.nodes;
        let mut body = Making::new(&format!("loop{number}"));
        body.input("trip", DType::I64, &[]);
        let condition = body.input("condition", DType::Bool, &[]);
        let state = body.input("state", DType::F32, &[None, Some(width)]);
        let captured = body.input("w", DType::F32, &[Some(width), Some(width)]);
        let y = body.node(MatMul { activation: None }, &[state, captured]);
        let y = body.unary(UnaryFunction::Tanh, y);
        let sum = body.reduce(ReduceFunction::Sum, y, &[0, 1]);
        let body = body.body(&[condition, y, sum], 1);
        let trips = self.constant(Tensor::scalar(trips));
        let condition = self.constant(Tensor::from_bools([], &[true]).unwrap());
        self.nodes(Repeat { body }, &[trips, condition, x, w], 2).try_into().unwrap()
    }

    /// Running sums of the rows of `x`.
    fn scan(&mut self, x: ValueId, width: usize) -> ValueId {
        let number = self.nodes;
        let mut body = Making::new(&format!("scan{number}"));
        let state = body.input("state", DType::F32, &[Some(width)]);
        let row = body.input("row", DType::F32, &[Some(width)]);
        let sum = body.binary(BinaryFunction::Add, state, row);
        let half = body.scalar(0.5);
        let half = body.binary(BinaryFunction::Mul, sum, half);
        let body = body.body(&[half, sum], 0);
        let zeros = self.constant(Tensor::zeros(DType::F32, [width]).unwrap());
        let along = vec![Scanned::default()];
        self.nodes(Scan { body, inputs: along.clone(), outputs: along }, &[zeros, x], 2)[1]
    }
}

fn run(
    backend: &dyn Backend,
    plan: &Plan,
    inputs: &[Value],
    context: &RunContext<'_>,
    times: usize,
) -> Result<Vec<Value>, RunError> {
    let executable = backend.compile(plan, &CompileOptions::default()).unwrap();
    run_compiled(&executable, inputs, context, times)
}

fn run_compiled(
    executable: &Arc<dyn Executable>,
    inputs: &[Value],
    context: &RunContext<'_>,
    times: usize,
) -> Result<Vec<Value>, RunError> {
    let mut session = Arc::clone(executable).session(SessionMemory::default()).unwrap();
    let inputs: Vec<Input<'_>> = inputs.iter().map(Input::Value).collect();
    let mut results = Vec::new();
    for _ in 0..times {
        let mut outputs: Vec<Output<'_>> =
            executable.signature().outputs.iter().map(|_| Output::Allocate(None)).collect();
        session.run(&inputs, &mut outputs, context)?;
        results = outputs
            .into_iter()
            .map(|output| match output {
                Output::Allocate(Some(value)) => value,
                other => panic!("{other:?}"),
            })
            .collect();
    }
    Ok(results)
}

fn on_threads(threads: usize) -> Arc<dyn Backend> {
    cpu(CpuOptions { threads, isa: None, ..CpuOptions::default() }).unwrap()
}

/// That the CPU gives what the reference gives, the second time too and on any number of threads.
fn check(plan: &Plan, inputs: &[Value], said: &str) {
    let context = RunContext::default();
    let expected = run(&*reference(), plan, inputs, &context, 1).unwrap();
    let alone = run(&*on_threads(1), plan, inputs, &context, 2).unwrap_or_else(|e| panic!("{said}: {e}"));
    assert_eq!(alone, run(&*on_threads(3), plan, inputs, &context, 2).unwrap(), "{said}");
    for (at, (actual, expected)) in alone.iter().zip(&expected).enumerate() {
        let (Value::Tensor(actual), Value::Tensor(expected)) = (actual, expected) else {
            assert_eq!(actual, expected, "{said}");
            continue;
        };
        assert_eq!((actual.dtype(), actual.shape()), (expected.dtype(), expected.shape()), "output {at} of {said}");
        if actual.dtype() != DType::F32 {
            assert_eq!(actual, expected, "output {at} of {said}");
            continue;
        }
        let (actual, expected) = (actual.to_vec::<f32>().unwrap(), expected.to_vec::<f32>().unwrap());
        // Sums of some hundred terms below one, through functions that are not steep.
        let close = |(a, e): (&f32, &f32)| (a - e).abs() <= 2e-5 * (1.0 + e.abs());
        assert!(actual.iter().zip(&expected).all(close), "output {at} of {said}: {actual:?}, expected {expected:?}");
    }
}

#[test]
fn random_graphs_agree_with_the_reference() {
    for seed in seeds(40) {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 7);
        let width = 4 + random.below(6);
        let mut m = Making::new("outer");
        let mut x = m.input("x", DType::F32, &[None, Some(width)]);
        let rows = 1 + random.below(12);
        let given = random.tensor(&[rows, width]);
        let (mut said, mut outputs) = (format!("seed {seed}: {:?}", given.shape()), Vec::new());
        for _ in 0..2 + random.below(5) {
            let choice = random.below(8);
            said += &format!(" {choice}");
            let weights = random.tensor(&[width, width]);
            x = match choice {
                0 => {
                    let w = m.constant(weights);
                    m.node(MatMul { activation: None }, &[x, w])
                }
                1 => m.some_rows(x),
                2 => m.first_half(x),
                3 => m.branch(x, width),
                4 | 5 => {
                    let mut w = m.constant(weights);
                    if choice == 5 {
                        w = m.unary(UnaryFunction::Neg, w);
                    }
                    let [last, sums] = m.repeat(x, w, 1 + random.below(4) as i64, width);
                    outputs.push(sums);
                    last
                }
                6 => m.scan(x, width),
                _ => {
                    let op = SplitToSequence { axis: 0, keep_axis: true };
                    let parts = m.node(op, &[x]);
                    m.node(ConcatFromSequence { axis: 0, new_axis: false }, &[parts])
                }
            };
            // So that sums stay small.
            x = m.unary(UnaryFunction::Tanh, x);
        }
        outputs.push(x);
        check(&m.plan(&outputs), &[Value::Tensor(given)], &said);
    }
}

#[test]
fn shapes_follow_from_numbers_that_a_graph_is_given_or_computes() {
    let mut m = Making::new("outer");
    let x = m.input("x", DType::F32, &[Some(6), Some(4)]);
    let target = m.input("target", DType::I64, &[Some(2)]);
    let given = m.node(Reshape { allow_zero: false }, &[x, target]);
    // [2, 12] of the count of the elements above zero, which are 12.
    let zero = m.scalar(0.0);
    let mask = m.binary(BinaryFunction::Greater, x, zero);
    let found = m.node(NonZero, &[mask]);
    let shape = m.node(Shape { start: 0, end: None }, &[found]);
    let computed = m.node(Reshape { allow_zero: false }, &[x, shape]);
    let plan = m.plan(&[given, computed]);
    let x: Vec<f32> = (0..24).map(|i| if i % 2 == 0 { i as f32 } else { -1.0 }).map(|v| v + 0.5).collect();
    let x = Value::Tensor(Tensor::from_vec([6, 4], x).unwrap());
    let executable = on_threads(2).compile(&plan, &CompileOptions::default()).unwrap();
    for target in [[3i64, 8], [8, 3], [3, 8], [24, 1]] {
        let inputs = [x.clone(), Value::Tensor(Tensor::from_vec([2], target.to_vec()).unwrap())];
        let outputs = run_compiled(&executable, &inputs, &RunContext::default(), 1).unwrap();
        let shapes: Vec<Vec<usize>> = outputs.iter().map(|v| v.as_tensor().unwrap().shape().to_vec()).collect();
        assert_eq!(shapes, [target.map(|d| d as usize).to_vec(), vec![2, 12]]);
        check(&plan, &inputs, &format!("{target:?}"));
    }
    let wrong = [x, Value::Tensor(Tensor::from_vec([2], vec![5i64, 5]).unwrap())];
    assert!(run_compiled(&executable, &wrong, &RunContext::default(), 1).is_err());
}

/// A loop that never ends, around a product.
fn endless() -> Plan {
    let mut body = Making::new("endless");
    body.input("trip", DType::I64, &[]);
    let condition = body.input("condition", DType::Bool, &[]);
    let state = body.input("state", DType::F32, &[Some(8), Some(8)]);
    let y = body.node(MatMul { activation: None }, &[state, state]);
    let y = body.unary(UnaryFunction::Tanh, y);
    let body = body.body(&[condition, y], 0);
    let mut m = Making::new("outer");
    let x = m.input("x", DType::F32, &[Some(8), Some(8)]);
    let condition = m.constant(Tensor::from_bools([], &[true]).unwrap());
    let name = "forever".to_string();
    let op = Repeat { body }.into();
    let node = m.graph.add_node(name, op, vec![None, Some(condition), Some(x)], vec!["y".to_string()]).unwrap();
    let y = m.graph.node(node).outputs[0];
    m.plan(&[y])
}

#[test]
fn a_loop_stops_at_a_deadline_and_a_cancellation() {
    let inputs = [Value::Tensor(Random(1).tensor(&[8, 8]))];
    let deadline = Some(Instant::now() + Duration::from_millis(50));
    let context = RunContext { deadline, ..RunContext::default() };
    let error = run(&*on_threads(2), &endless(), &inputs, &context, 1).unwrap_err();
    assert!(matches!(error, RunError::Deadline { .. }), "{error}");
    let cancellation = Cancellation::default();
    std::thread::scope(|scope| {
        let running = scope.spawn(|| {
            let context = RunContext { cancellation: Some(&cancellation), ..RunContext::default() };
            run(&*on_threads(1), &endless(), &inputs, &context, 1)
        });
        std::thread::sleep(Duration::from_millis(20));
        cancellation.cancel();
        let error = running.join().unwrap().unwrap_err();
        assert!(matches!(error, RunError::Cancelled { .. }), "{error}");
    });
}

#[test]
fn a_run_keeps_to_its_limit() {
    let mut m = Making::new("outer");
    let x = m.input("x", DType::F32, &[None, Some(4)]);
    let rows = m.some_rows(x);
    let more = m.node(Concat { axis: 0 }, &[rows, rows, rows, rows]);
    let last = m.some_rows(more);
    let plan = m.plan(&[last]);
    let inputs = [Value::Tensor(Tensor::from_vec([256, 4], vec![1f32; 1024]).unwrap())];
    let limits = |arena_bytes| RunLimits { arena_bytes, ..RunLimits::default() };
    let context = |arena_bytes| RunContext { limits: limits(arena_bytes), ..RunContext::default() };
    assert!(run(&*on_threads(1), &plan, &inputs, &context(1 << 20), 1).is_ok());
    let error = run(&*on_threads(1), &plan, &inputs, &context(24 << 10), 1).unwrap_err();
    assert!(matches!(error, RunError::Resource(_) | RunError::Op { .. }), "{error}");
}

#[test]
fn profile_and_placement_name_the_nodes_inside() {
    struct Names(Mutex<Vec<(String, String)>>);
    impl Profiler for Names {
        fn record(&self, timing: OpTiming<'_>) {
            self.0.lock().unwrap().push((timing.node.to_string(), timing.kernel.to_string()));
        }
    }
    let mut m = Making::new("outer");
    let x = m.input("x", DType::F32, &[None, Some(4)]);
    let w = m.constant(Random(3).tensor(&[4, 4]));
    let [last, _] = m.repeat(x, w, 2, 4);
    let found = m.node(NonZero, &[last]);
    let plan = m.plan(&[last, found]);
    let executable = on_threads(2).compile(&plan, &CompileOptions::default()).unwrap();
    let placed = |node: &str| executable.placement().nodes.iter().find(|p| p.node == node).unwrap().kernel.clone();
    assert_eq!(placed("outer.n1"), "control flow");
    assert_eq!(placed("loop0.n1"), "matrix product");
    assert_eq!(placed("outer.n2"), "non-zero");
    let names = Names(Mutex::new(Vec::new()));
    let context = RunContext { profiler: Some(&names), ..RunContext::default() };
    run_compiled(&executable, &[Value::Tensor(Random(4).tensor(&[3, 4]))], &context, 1).unwrap();
    let names = names.0.into_inner().unwrap();
    let count = |node: &str, kernel: &str| names.iter().filter(|(n, k)| n == node && k == kernel).count();
    // What is captured is no constant: its packing is a step too.
    assert_eq!(count("loop0.n1", "matrix product"), 4);
    assert_eq!(count("loop0.n2", "elementwise"), 2);
    assert_eq!((count("outer.n1", "control flow"), count("outer.n2", "non-zero")), (1, 1));
}

#[test]
fn what_passes_through_a_graph_is_its_result() {
    let mut m = Making::new("outer");
    let x = m.input("x", DType::F32, &[None, Some(4)]);
    let sequence = m.graph.add_input("s", Fact::Sequence(Box::new(TensorFact::unknown_rank(DType::String).into())));
    let c = m.constant(Tensor::scalar(3f32));
    let y = m.unary(UnaryFunction::Neg, x);
    let plan = m.plan(&[x, sequence, c, y, y]);
    let strings = Tensor::from_strings([1], vec!["a".to_string()]).unwrap();
    let inputs = [Value::Tensor(Random(5).tensor(&[2, 4])), Value::Sequence(vec![Value::Tensor(strings)])];
    check(&plan, &inputs, "passing through");
}
