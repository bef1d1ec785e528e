//! A session that runs shapes it has seen into the caller's buffers makes no heap allocation, on any thread.
#![allow(unsafe_code)] // a global allocator that counts

use cutover_backend::{CompileOptions, CpuOptions, Input, Output, RunContext, SessionMemory, cpu};
use cutover_graph::{
    Constant, Graph, Op, Plan, TensorFact, ValueId,
    ops::{
        Binary, BinaryFunction, Conv, GlobalPool, GlobalPoolFunction, MatMul, Padding, Reshape, Softmax,
        SoftmaxFunction, Unary, UnaryFunction, Window,
    },
};
use cutover_tensor::{DType, Tensor, TensorView, TensorViewMut};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does all the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above; `alloc` took it from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn add(graph: &mut Graph, op: impl Into<Op>, inputs: &[ValueId]) -> ValueId {
    let name = graph.unique_node_name("n");
    let value = graph.unique_value_name("v");
    let node = graph.add_node(name, op.into(), inputs.iter().copied().map(Some).collect(), vec![value]).unwrap();
    graph.node(node).outputs[0]
}

fn constant(graph: &mut Graph, shape: &[usize]) -> ValueId {
    let values = (0..shape.iter().product()).map(|i| (i % 7) as f32 * 0.1 - 0.3).collect();
    let name = graph.unique_value_name("c");
    graph.add_constant(name, Constant::new(Tensor::from_vec::<f32>(shape, values).unwrap()))
}

/// An image network: convolutions, a residual sum, a pool, a product, softmax.
fn network() -> Plan {
    let mut graph = Graph::new("network");
    let g = &mut graph;
    let x = g.add_input("x", TensorFact::of_constant_shape(DType::F32, &[1, 3, 20, 20]));
    let conv = || {
        let padding = Padding::Explicit { begin: vec![1, 1], end: vec![1, 1] };
        let window = Window { kernel_shape: None, strides: vec![], dilations: vec![], padding, ceil_mode: false };
        Conv { window, group: 1, activation: None }
    };
    let w = constant(g, &[32, 3, 3, 3]);
    let first = add(g, conv(), &[x, w]);
    let relu = add(g, Unary { function: UnaryFunction::Relu }, &[first]);
    let w = constant(g, &[32, 32, 3, 3]);
    let second = add(g, conv(), &[relu, w]);
    let sum = add(g, Binary { function: BinaryFunction::Add }, &[second, relu]);
    let pooled = add(g, GlobalPool { function: GlobalPoolFunction::Average }, &[sum]);
    let target = g.add_constant("target", Constant::new(Tensor::from_vec([2], vec![1i64, -1]).unwrap()));
    let flat = add(g, Reshape { allow_zero: false }, &[pooled, target]);
    let w = constant(g, &[32, 10]);
    let product = add(g, MatMul { activation: None }, &[flat, w]);
    let softmax = Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false };
    let y = add(g, softmax, &[product]);
    graph.set_outputs(vec![y]);
    Plan::new(graph).unwrap()
}

#[test]
fn a_run_of_static_shapes_into_the_callers_buffers_allocates_nothing() {
    let plan = network();
    for threads in [1, 2, 4] {
        let backend = cpu(CpuOptions { threads, isa: None, ..CpuOptions::default() }).unwrap();
        let executable = backend.compile(&plan, &CompileOptions::default()).unwrap();
        let mut session = executable.session(SessionMemory::default()).unwrap();
        let image: Vec<f32> = (0..1200).map(|i| (i % 11) as f32 * 0.1).collect();
        let (from, to) = ([1, 3, 20, 20], [1, 10]);
        let mut probabilities = [0.0f32; 10];
        let mut run = || {
            let inputs = [Input::View(TensorView::new(&from, &image).unwrap())];
            let mut outputs = [Output::Write(TensorViewMut::new(&to, &mut probabilities).unwrap())];
            session.run(&inputs, &mut outputs, &RunContext::default()).unwrap();
        };
        // The first runs grow the session's memory and let every thread start.
        (0..10).for_each(|_| run());
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        (0..50).for_each(|_| run());
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0, "{threads} threads");
        assert!((probabilities.iter().sum::<f32>() - 1.0).abs() < 1e-5);
    }
}
