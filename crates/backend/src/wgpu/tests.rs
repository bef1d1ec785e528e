//! The kernels of a plan on the GPU that is there, against plain computations: forms, limits, precisions, clocks and losses of the device.

use super::*;
use crate::{
    CompileOptions, Input, Numerics, OpTiming, Output, Phase, PhaseObserver, Precision, Profiler, RunContext, RunError,
    SessionMemory, reference,
};
use cutover_graph::{
    Constant, Graph, Plan, TensorFact, ValueId,
    ops::{
        Activation, Binary, BinaryFunction, Cast, Conv, ConvInteger, Cumulate, DequantizeLinear, Granularity, MatMul,
        MatMulInteger, MatMulNBits, Padding, QuantizeLinear, Scatter, ScatterPlace, ScatterReduction, Softmax,
        SoftmaxFunction, TopK, Unary, UnaryFunction, Window,
    },
};
use cutover_tensor::{DType, Tensor, Value};
use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

/// `y = e^x` of `count` elements.
fn exponential(count: usize) -> Plan {
    let mut graph = Graph::new("exponential");
    let x = graph.add_input("x", TensorFact::of_constant_shape(DType::F32, &[count]));
    let op = Unary { function: UnaryFunction::Exp }.into();
    let node = graph.add_node("exp", op, vec![Some(x)], vec!["y".into()]).unwrap();
    graph.set_outputs(vec![graph.node(node).outputs[0]]);
    Plan::new(graph).unwrap()
}

#[test]
fn a_lost_device_is_an_error_of_the_run() {
    let Ok(gpu) = gpu::Gpu::open(None) else {
        return println!("skipped: a_lost_device_is_an_error_of_the_run needs a GPU");
    };
    let backend = Planned::new(gpu);
    let executable = backend.compile(&exponential(3), &CompileOptions::default()).unwrap();
    let mut session = executable.session(SessionMemory::default()).unwrap();
    let x = Value::Tensor(Tensor::from_vec([3], vec![0.0f32, 1.0, -1.0]).unwrap());
    let mut run = || session.run(&[Input::Value(&x)], &mut [Output::Allocate(None)], &RunContext::default());
    run().unwrap();
    backend.driver().device.destroy();
    for _ in 0..2 {
        let error = run().unwrap_err();
        assert!(matches!(error, RunError::DeviceLost(_)), "{error}");
    }
}

#[test]
fn what_a_device_has_no_memory_for_is_refused() {
    let Ok(gpu) = gpu::Gpu::open(None) else {
        return println!("skipped: what_a_device_has_no_memory_for_is_refused needs a GPU");
    };
    let most = gpu.limits.tensor_bytes() as usize;
    let backend = Planned::new(gpu);
    let executable = backend.compile(&exponential(1000), &CompileOptions::default()).unwrap();
    let budget = SessionMemory { budget_bytes: Some(1000) };
    let error = executable.session(budget).err().unwrap().to_string();
    assert!(error.starts_with("a session on the GPU needs "), "{error}");
    let error = backend.compile(&exponential(most / 4 + 1), &CompileOptions::default()).err().unwrap().to_string();
    assert!(error.starts_with("a tensor on the GPU needs "), "{error}");
}

/// Seeded numbers between -1 and 1, and below what they are asked for.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }

    fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let values = (0..shape.iter().product()).map(|_| self.below(1 << 16) as f32 / 32768.0 - 1.0);
        Tensor::from_vec(shape, values.collect::<Vec<f32>>()).unwrap()
    }
}

fn answer(backend: &dyn Backend, plan: &Plan, numerics: Numerics, inputs: &[Value]) -> Vec<f32> {
    result(backend, plan, numerics, inputs).to_vec().unwrap()
}

/// The one output of `plan`.
fn result(backend: &dyn Backend, plan: &Plan, numerics: Numerics, inputs: &[Value]) -> Tensor {
    let options = CompileOptions { numerics, ..CompileOptions::default() };
    let mut session = backend.compile(plan, &options).unwrap().session(SessionMemory::default()).unwrap();
    let given: Vec<Input<'_>> = inputs.iter().map(Input::Value).collect();
    let mut outputs = [Output::Allocate(None)];
    session.run(&given, &mut outputs, &RunContext::default()).unwrap();
    let [Output::Allocate(Some(Value::Tensor(tensor)))] = outputs else { panic!("a tensor expected") };
    tensor
}

/// A device that is told to be one that no processor imitates, if `is_real`.
fn device(test: &str, is_real: bool) -> Option<Planned<gpu::Gpu>> {
    let Ok(mut gpu) = gpu::Gpu::open(None) else {
        println!("skipped: {test} needs a GPU");
        return None;
    };
    if is_real {
        (gpu.limits.has_lanes, gpu.limits.is_imitated) = (false, false);
    }
    Some(Planned::new(gpu))
}

/// `graph`'s one output on the device and by the reference.
fn check(gpu: &Planned<gpu::Gpu>, graph: Graph, numerics: Numerics, inputs: &[Value], said: &str) {
    let plan = Plan::new(graph).unwrap();
    let expected = answer(&*reference(), &plan, numerics, inputs);
    let actual = answer(gpu, &plan, numerics, inputs);
    assert_eq!(actual.len(), expected.len(), "{said}");
    let scale = expected.iter().fold(1.0f32, |most, value| most.max(value.abs()));
    for (at, (a, e)) in actual.iter().zip(&expected).enumerate() {
        assert!((a - e).abs() <= 1e-5 * scale, "[{at}]: {a}, expected {e}: {said}");
    }
}

/// Every way that a convolution is computed: by tiles of both sizes, written out, direct, of one tap; on both kinds of devices.
#[test]
fn convolutions_agree_on_either_kind_of_device() {
    for is_real in [false, true] {
        let Some(gpu) = device("convolutions_agree_on_either_kind_of_device", is_real) else { return };
        let mut random = Random(3);
        for case in 0..12 {
            let kernel = [3, 3, 3, 1, 5, 2][case % 6];
            let stride = if kernel == 3 && case % 4 > 0 { 1 } else { 1 + random.below(2) };
            let group = if kernel == 2 { 2 } else { 1 };
            let inner = [3, 16, 20, 32][random.below(4)];
            let outer = group * [4, 16, 24, 36][random.below(4)];
            let (samples, pad) = (1 + random.below(2), random.below(2));
            let size = [5 + random.below(20), [8, 16, 7 + random.below(20)][random.below(3)]];
            let numerics = if case % 6 == 2 { Numerics::Strict } else { Numerics::Default };
            let said =
                format!("{size:?} {kernel} by {stride}, pad {pad}, {group} of {inner} to {outer}, real {is_real}");
            let output = size.map(|extent| (extent + 2 * pad - kernel) / stride + 1);
            let mut graph = Graph::new("convolution");
            let shapes = [vec![samples, group * inner, size[0], size[1]], vec![samples, outer, output[0], output[1]]];
            let names = ["x", "residual"].iter().zip(&shapes);
            let inputs = names.map(|(name, shape)| {
                graph.add_input(name.to_string(), TensorFact::of_constant_shape(DType::F32, shape))
            });
            let inputs: Vec<ValueId> = inputs.collect();
            let mut constant =
                |name: &str, shape: &[usize]| graph.add_constant(name, Constant::new(random.tensor(shape)));
            let (w, bias) = (constant("w", &[outer, inner, kernel, kernel]), constant("b", &[outer]));
            let padding = Padding::Explicit { begin: vec![pad; 2], end: vec![pad; 2] };
            let window = Window {
                kernel_shape: None,
                strides: vec![stride; 2],
                dilations: vec![1; 2],
                padding,
                ceil_mode: false,
            };
            let op = Conv { window, group, activation: Some(Activation::Relu) };
            let given = vec![Some(inputs[0]), Some(w), Some(bias), Some(inputs[1])];
            let node = graph.add_node("conv", op.into(), given, vec!["y".into()]).unwrap();
            graph.set_outputs(vec![graph.node(node).outputs[0]]);
            let values: Vec<Value> = shapes.iter().map(|shape| Value::Tensor(random.tensor(shape))).collect();
            check(&gpu, graph, numerics, &values, &said);
        }
    }
}

/// Rows that lie by fours and rows that don't, sums with a rest and without.
#[test]
fn products_agree_on_either_kind_of_device() {
    for is_real in [false, true] {
        let Some(gpu) = device("products_agree_on_either_kind_of_device", is_real) else { return };
        let mut random = Random(5);
        for _ in 0..16 {
            let mut extent = |most: usize| {
                if random.below(2) == 0 { 4 * (1 + random.below(most / 4)) } else { 1 + random.below(most) }
            };
            let (m, k, n) = (extent(40), extent(70), extent(150));
            let batch = 1 + random.below(3);
            let shapes = [vec![batch, m, k], vec![if random.below(2) == 0 { 1 } else { batch }, k, n]];
            let mut graph = Graph::new("product");
            let names = ["a", "b"].iter().zip(&shapes);
            let inputs = names.map(|(name, shape)| {
                Some(graph.add_input(name.to_string(), TensorFact::of_constant_shape(DType::F32, shape)))
            });
            let inputs: Vec<Option<ValueId>> = inputs.collect();
            let op = MatMul { activation: None };
            let node = graph.add_node("product", op.into(), inputs, vec!["y".into()]).unwrap();
            graph.set_outputs(vec![graph.node(node).outputs[0]]);
            let values: Vec<Value> = shapes.iter().map(|shape| Value::Tensor(random.tensor(shape))).collect();
            check(
                &gpu,
                graph,
                Numerics::Default,
                &values,
                &format!("{m} by {k} by {n}, {batch} of them, real {is_real}"),
            );
        }
    }
}

/// Lengths and widths that fill the kernels' blocks and that don't.
#[test]
fn attention_agrees_on_either_kind_of_device() {
    for is_real in [false, true] {
        let Some(gpu) = device("attention_agrees_on_either_kind_of_device", is_real) else { return };
        let mut random = Random(7);
        for [s, t, depth, width] in [[1, 1, 1, 1], [32, 32, 16, 32], [33, 65, 17, 9], [5, 100, 64, 128], [70, 3, 8, 40]]
        {
            let mut graph = Graph::new("attention");
            let shapes = [vec![2, 3, s, depth], vec![2, 3, depth, t], vec![2, 1, t, width], vec![2, 1, s, t]];
            let names = ["q", "k", "v", "mask"].iter().zip(&shapes);
            let inputs = names.map(|(name, shape)| {
                Some(graph.add_input(name.to_string(), TensorFact::of_constant_shape(DType::F32, shape)))
            });
            let inputs: Vec<Option<ValueId>> = inputs.collect();
            let mut node = |op: cutover_graph::Op, inputs: Vec<Option<ValueId>>, name: &str| {
                let node = graph.add_node(name, op, inputs, vec![format!("{name}.y")]).unwrap();
                Some(graph.node(node).outputs[0])
            };
            let product = || MatMul { activation: None }.into();
            let x = node(product(), vec![inputs[0], inputs[1], inputs[3]], "scores");
            let softmax = Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false };
            let p = node(softmax.into(), vec![x], "softmax");
            let y = node(product(), vec![p, inputs[2]], "values");
            graph.set_outputs(vec![y.unwrap()]);
            let values: Vec<Value> = shapes.iter().map(|shape| Value::Tensor(random.tensor(shape))).collect();
            let said = format!("{s} by {t} of {depth} and {width}, real {is_real}");
            check(&gpu, graph, Numerics::Default, &values, &said);
        }
    }
}

/// Products of bytes whose zero points are known and are not, and of blocks of a few bits; words that are filled and that aren't.
#[test]
fn integers_agree_on_either_kind_of_device() {
    for is_real in [false, true] {
        let Some(gpu) = device("integers_agree_on_either_kind_of_device", is_real) else { return };
        let mut random = Random(9);
        for case in 0..12 {
            let (m, k, n) = (1 + random.below(40), 1 + random.below(70), 1 + random.below(150));
            let mut bytes = |dtype: DType, shape: &[usize]| {
                let bytes: Vec<u8> = (0..shape.iter().product()).map(|_| random.below(256) as u8).collect();
                Tensor::from_bytes(dtype, shape, &bytes).unwrap()
            };
            let mut graph = Graph::new("integers");
            let input = |graph: &mut Graph, tensor: &Tensor| {
                let fact = TensorFact::of_constant_shape(tensor.dtype(), tensor.shape());
                Some(graph.add_input("x", fact))
            };
            let constant =
                |graph: &mut Graph, name: &str, tensor: Tensor| Some(graph.add_constant(name, Constant::new(tensor)));
            let (x, op, given): (Tensor, cutover_graph::Op, Vec<Option<ValueId>>) = match case % 3 {
                0 => {
                    let x = bytes(DType::U8, &[2, m, k]);
                    let (w, point, points) = (bytes(DType::I8, &[k, n]), bytes(DType::U8, &[]), bytes(DType::I8, &[n]));
                    let given = vec![
                        input(&mut graph, &x),
                        constant(&mut graph, "w", w),
                        constant(&mut graph, "x_zero", point),
                        constant(&mut graph, "w_zero", points).filter(|_| case % 2 == 0),
                    ];
                    (x, MatMulInteger.into(), given)
                }
                1 => {
                    let x = bytes(DType::U8, &[2, 2 * (1 + k % 9), 7, 6]);
                    let (w, point) = (bytes(DType::I8, &[2 * (1 + n % 20), 1 + k % 9, 3, 2]), bytes(DType::U8, &[]));
                    let given = vec![
                        input(&mut graph, &x),
                        constant(&mut graph, "w", w),
                        constant(&mut graph, "x_zero", point),
                    ];
                    let padding = Padding::Explicit { begin: vec![1, 0], end: vec![0, 1] };
                    let (strides, dilations) = (vec![1 + case % 2, 1], vec![1, 2]);
                    let window = Window { kernel_shape: None, strides, dilations, padding, ceil_mode: false };
                    (x, ConvInteger { window, group: 2 }.into(), given)
                }
                _ => {
                    let (bits, block_size) = ([2, 4, 8][case % 4 % 3], 16);
                    let blocks = k.div_ceil(block_size);
                    let w = bytes(DType::U8, &[n, blocks, block_size * bits / 8]);
                    let x = random.tensor(&[m, k]);
                    let scales = random.tensor(&[n, blocks]);
                    let given = vec![
                        input(&mut graph, &x),
                        constant(&mut graph, "w", w),
                        constant(&mut graph, "scales", scales),
                    ];
                    (x, MatMulNBits { n, k, bits, block_size, accuracy_level: 0 }.into(), given)
                }
            };
            let said = format!("{} of {m} by {k} by {n}, real {is_real}", op.name());
            let node = graph.add_node("product", op, given, vec!["sums".into()]).unwrap();
            let sums = graph.node(node).outputs[0];
            let node = graph.add_node("cast", Cast::to(DType::F32).into(), vec![Some(sums)], vec!["y".into()]);
            graph.set_outputs(vec![graph.node(node.unwrap()).outputs[0]]);
            check(&gpu, graph, Numerics::Default, &[Value::Tensor(x)], &said);
        }
    }
}

/// A device that binds 4 KiB at once: what is larger is bound in parts, read and written by range.
#[test]
fn tensors_larger_than_a_binding_are_bound_in_parts() {
    for is_real in [false, true] {
        let Some(adapter) = gpu::adapters().into_iter().next() else {
            return println!("skipped: tensors_larger_than_a_binding_are_bound_in_parts needs a GPU");
        };
        let limits = ::wgpu::Limits { max_storage_buffer_binding_size: 4096, ..adapter.limits() };
        let mut gpu = gpu::Gpu::within(&adapter, limits).unwrap();
        if is_real {
            (gpu.limits.has_lanes, gpu.limits.is_imitated) = (false, false);
        }
        let gpu = Planned::new(gpu);
        let mut random = Random(13);
        let inputs = |graph: &mut Graph, shapes: &[&[usize]], random: &mut Random| {
            let (mut ids, mut values) = (Vec::new(), Vec::new());
            for (at, shape) in shapes.iter().enumerate() {
                ids.push(Some(graph.add_input(format!("x{at}"), TensorFact::of_constant_shape(DType::F32, shape))));
                values.push(Value::Tensor(random.tensor(shape)));
            }
            (ids, values)
        };
        // A chain of elementwise operators, a product, and one by a weight with what follows, each of more than two parts.
        let mut graph = Graph::new("chain");
        let (ids, values) = inputs(&mut graph, &[&[3, 1000], &[1000]], &mut random);
        let op = Binary { function: BinaryFunction::Mul };
        let node = graph.add_node("mul", op.into(), ids, vec!["xy".into()]).unwrap();
        let x = graph.node(node).outputs[0];
        let op = Unary { function: UnaryFunction::Tanh };
        let node = graph.add_node("tanh", op.into(), vec![Some(x)], vec!["y".into()]).unwrap();
        graph.set_outputs(vec![graph.node(node).outputs[0]]);
        check(&gpu, graph, Numerics::Default, &values, &format!("a chain, real {is_real}"));

        for (m, k, n) in [(40, 70, 90), (33, 128, 64)] {
            let mut graph = Graph::new("product");
            let (mut ids, values) = inputs(&mut graph, &[&[m, k], &[k, n]], &mut random);
            let op = || MatMul { activation: None }.into();
            let node = graph.add_node("product", op(), ids.clone(), vec!["xy".into()]).unwrap();
            let w = graph.add_constant("w", Constant::new(random.tensor(&[n, 50])));
            ids = vec![Some(graph.node(node).outputs[0]), Some(w)];
            let node = graph.add_node("weighted", op(), ids, vec!["y".into()]).unwrap();
            graph.set_outputs(vec![graph.node(node).outputs[0]]);
            check(&gpu, graph, Numerics::Default, &values, &format!("{m} by {k} by {n}, real {is_real}"));
        }

        // What has loops of its own, and puts its elements where they come to lie.
        let along = |extent: i32| Constant::new(Tensor::from_vec([1], vec![i64::from(extent)]).unwrap());
        let axis = Constant::new(Tensor::from_vec([], vec![1i64]).unwrap());
        let places = Tensor::from_vec([1100], (0..1100).map(|at| at * 7 % 1500).collect::<Vec<i32>>()).unwrap();
        let scatter = Scatter { place: ScatterPlace::Elements { axis: 0 }, reduction: ScatterReduction::Add };
        let cases: [(cutover_graph::Op, &[&[usize]], Constant); 3] = [
            (Cumulate { product: false, exclusive: false, reverse: true }.into(), &[&[2, 700]], axis),
            (TopK { axis: 1, largest: true, sorted: true }.into(), &[&[2, 700]], along(600)),
            (scatter.into(), &[&[1500], &[1100]], Constant::new(places)),
        ];
        for (op, shapes, constant) in cases {
            let mut graph = Graph::new("lines");
            let (mut ids, values) = inputs(&mut graph, shapes, &mut random);
            ids.insert(1, Some(graph.add_constant("constant", constant)));
            let mut names = vec!["y".to_string()];
            if matches!(op, cutover_graph::Op::TopK(_)) {
                names.push("places".to_string());
            }
            let said = format!("{}, real {is_real}", op.name());
            let node = graph.add_node("node", op, ids, names).unwrap();
            graph.set_outputs(vec![graph.node(node).outputs[0]]);
            check(&gpu, graph, Numerics::Default, &values, &said);
        }
    }
}

#[test]
fn textures_are_counted() {
    let Some(gpu) = device("textures_are_counted", false) else { return };
    if !gpu.driver().limits.has_lanes {
        return println!("skipped: textures_are_counted needs a device that a processor imitates");
    }
    let footprint = |is_real: bool| {
        let gpu = device("textures_are_counted", is_real)?;
        let mut graph = Graph::new("product");
        let x = graph.add_input("x", TensorFact::of_constant_shape(DType::F32, &[64, 64]));
        let w = graph.add_constant("w", Constant::new(Random(1).tensor(&[64, 64])));
        let op = MatMul { activation: None };
        let node = graph.add_node("product", op.into(), vec![Some(x), Some(w)], vec!["y".into()]).unwrap();
        graph.set_outputs(vec![graph.node(node).outputs[0]]);
        Some(gpu.compile(&Plan::new(graph).unwrap(), &CompileOptions::default()).unwrap().footprint())
    };
    let (Some(with), Some(without)) = (footprint(false), footprint(true)) else { return };
    // A row of four floats each, of the weight and of the input.
    let row = 16 * 4096;
    assert_eq!(with.weight_bytes, without.weight_bytes + row);
    assert_eq!(with.session_bytes, without.session_bytes + row);
}

/// Products and convolutions give what they give with rounded weights, in half the memory.
#[test]
fn weights_are_held_in_16_bits() {
    for is_real in [false, true] {
        let Some(gpu) = device("weights_are_held_in_16_bits", is_real) else { return };
        if !gpu.driver().limits.has_f16 {
            return println!("skipped: weights_are_held_in_16_bits needs a GPU with numbers of 16 bits");
        }
        let mut random = Random(17);
        for (shape, weights) in [
            (vec![5, 64], vec![64, 48]),
            (vec![2, 16, 9, 8], vec![24, 16, 3, 3]),
            (vec![1, 8, 6, 6], vec![16, 8, 1, 1]),
        ] {
            let w = random.tensor(&weights);
            let rounded = w.to_vec::<f32>().unwrap();
            let rounded: Vec<f32> = rounded.into_iter().map(|w| half::f16::from_f32(w).to_f32()).collect();
            let plan = |w: Tensor| {
                let mut graph = Graph::new("weights");
                let x = graph.add_input("x", TensorFact::of_constant_shape(DType::F32, &shape));
                let w = graph.add_constant("w", Constant::new(w));
                let padding = Padding::Explicit { begin: vec![1; 2], end: vec![1; 2] };
                let (strides, dilations) = (vec![1; 2], vec![1; 2]);
                let window = Window { kernel_shape: None, strides, dilations, padding, ceil_mode: false };
                let op = match shape.len() {
                    2 => MatMul { activation: None }.into(),
                    _ => Conv { window, group: 1, activation: None }.into(),
                };
                let node = graph.add_node("node", op, vec![Some(x), Some(w)], vec!["y".into()]).unwrap();
                graph.set_outputs(vec![graph.node(node).outputs[0]]);
                Plan::new(graph).unwrap()
            };
            let inputs = [Value::Tensor(random.tensor(&shape))];
            let expected = answer(
                &*reference(),
                &plan(Tensor::from_vec(&weights[..], rounded).unwrap()),
                Numerics::Default,
                &inputs,
            );
            let options = CompileOptions { precision: Precision::F16, ..CompileOptions::default() };
            let halved = gpu.compile(&plan(w.clone()), &options).unwrap();
            if is_real {
                let whole: usize = weights.iter().product();
                assert_eq!(halved.footprint().weight_bytes, 2 * whole as u64);
            }
            let mut session = halved.session(SessionMemory::default()).unwrap();
            let mut outputs = [Output::Allocate(None)];
            session.run(&[Input::Value(&inputs[0])], &mut outputs, &RunContext::default()).unwrap();
            let [Output::Allocate(Some(Value::Tensor(actual)))] = outputs else { panic!("a tensor expected") };
            for (a, e) in actual.to_vec::<f32>().unwrap().iter().zip(&expected) {
                assert!((a - e).abs() <= 1e-4, "{a}, expected {e}: {weights:?}, real {is_real}");
            }
        }
    }
    let Ok(mut gpu) = gpu::Gpu::open(None) else { return };
    gpu.limits.has_f16 = false;
    let options = CompileOptions { precision: Precision::F16, ..CompileOptions::default() };
    let error = Planned::new(gpu).compile(&exponential(3), &options).err().unwrap().to_string();
    assert!(error.contains("no numbers of 16 bits"), "{error}");
}

const WHOLE: Granularity = Granularity { axis: 1, block_size: 0 };

/// `id` dequantized by `scale`, and what that is called.
fn dequantized(graph: &mut Graph, id: ValueId, scale: f32, name: &str) -> ValueId {
    let scale = graph.add_constant(format!("{name}.scale"), Constant::new(Tensor::from_vec([], vec![scale]).unwrap()));
    let op = DequantizeLinear { granularity: WHOLE, output_dtype: None };
    let node = graph.add_node(name, op.into(), vec![Some(id), Some(scale)], vec![format!("{name}.y")]).unwrap();
    graph.node(node).outputs[0]
}

/// `id` quantized to unsigned bytes, 100 of which is 0.
fn quantized(graph: &mut Graph, id: ValueId, scale: f32, name: &str) -> ValueId {
    let mut constant = |part: &str, tensor| graph.add_constant(format!("{name}.{part}"), Constant::new(tensor));
    let scale = constant("scale", Tensor::from_vec([], vec![scale]).unwrap());
    let zero = constant("zero", Tensor::from_bytes(DType::U8, [], &[100]).unwrap());
    let op = QuantizeLinear { granularity: WHOLE, output_dtype: None, saturate: true, precision: None };
    let inputs = vec![Some(id), Some(scale), Some(zero)];
    let node = graph.add_node(name, op.into(), inputs, vec![format!("{name}.y")]).unwrap();
    graph.node(node).outputs[0]
}

/// What comes as bytes, is computed with as floats and leaves as bytes takes a byte an element wherever it lies.
#[test]
fn bytes_lie_four_to_a_word() {
    for is_real in [false, true] {
        let Some(gpu) = device("bytes_lie_four_to_a_word", is_real) else { return };
        for (count, dtype) in [(1, DType::U8), (2, DType::I8), (100_003, DType::U8), (100_004, DType::I8)] {
            let mut graph = Graph::new("bytes");
            let x = graph.add_input("x", TensorFact::of_constant_shape(dtype, &[count]));
            let y = dequantized(&mut graph, x, 0.5, "dequantize");
            let op = Unary { function: UnaryFunction::Neg }.into();
            let node = graph.add_node("neg", op, vec![Some(y)], vec!["negated".into()]).unwrap();
            let y = graph.node(node).outputs[0];
            let y = quantized(&mut graph, y, 0.25, "quantize");
            graph.set_outputs(vec![y]);
            let plan = Plan::new(graph).unwrap();
            let bytes: Vec<u8> = (0..count).map(|at| (at * 7) as u8).collect();
            let inputs = [Value::Tensor(Tensor::from_bytes(dtype, [count], &bytes).unwrap())];
            let expected = result(&*reference(), &plan, Numerics::Default, &inputs);
            let actual = result(&gpu, &plan, Numerics::Default, &inputs);
            assert_eq!(actual.bytes(), expected.bytes(), "{count} {dtype}, real {is_real}");
            if is_real {
                // The input, the output and where it is read back, what is rounded up for each, and what tells of faults.
                let footprint = gpu.compile(&plan, &CompileOptions::default()).unwrap().footprint();
                assert!(footprint.session_bytes <= 3 * count as u64 + 2048, "{}", footprint.session_bytes);
            }
        }
    }
}

/// Convolutions and a product between quantizations, whose floats are in no memory: of channels and pixels that come by fours and do not, one of
/// a channel a group among them.
#[test]
fn quantized_layers_agree_on_either_kind_of_device() {
    for is_real in [false, true] {
        let Some(gpu) = device("quantized_layers_agree_on_either_kind_of_device", is_real) else { return };
        let mut random = Random(19);
        for (case, [inner, outer, height, width]) in
            [[8, 16, 6, 8], [5, 7, 5, 7], [32, 24, 4, 9], [3, 40, 7, 7]].into_iter().enumerate()
        {
            let mut bytes = |dtype: DType, shape: &[usize]| {
                let bytes: Vec<u8> = (0..shape.iter().product()).map(|_| random.below(256) as u8).collect();
                Tensor::from_bytes(dtype, shape, &bytes).unwrap()
            };
            let mut graph = Graph::new("layers");
            let shape = [2, inner, height, width];
            let x = graph.add_input("x", TensorFact::of_constant_shape(DType::U8, &shape));
            let mut y = dequantized(&mut graph, x, 0.020_41, "x.dequantized");
            for (layer, (filters, group)) in
                [([outer, inner, 1, 1], 1), ([outer, 1, 3, 3], outer), ([outer, outer, 3, 3], 1)]
                    .into_iter()
                    .enumerate()
            {
                let w = graph.add_constant(format!("w{layer}"), Constant::new(bytes(DType::I8, &filters)));
                let w = dequantized(&mut graph, w, 0.002_13, &format!("w{layer}.dequantized"));
                let pad = filters[2] / 2;
                let padding = Padding::Explicit { begin: vec![pad; 2], end: vec![pad; 2] };
                let window = Window {
                    kernel_shape: None,
                    strides: vec![1; 2],
                    dilations: vec![1; 2],
                    padding,
                    ceil_mode: false,
                };
                let op = Conv { window, group, activation: (case % 2 == 0).then_some(Activation::Relu) };
                let node = graph.add_node(
                    format!("conv{layer}"),
                    op.into(),
                    vec![Some(y), Some(w)],
                    vec![format!("conv{layer}.y")],
                );
                y = graph.node(node.unwrap()).outputs[0];
                y = quantized(&mut graph, y, 0.030_17, &format!("q{layer}"));
                y = dequantized(&mut graph, y, 0.030_17, &format!("d{layer}"));
            }
            let w = graph.add_constant("w", Constant::new(bytes(DType::I8, &[width, 12])));
            let w = dequantized(&mut graph, w, 0.01, "w.dequantized");
            let node =
                graph.add_node("product", MatMul { activation: None }.into(), vec![Some(y), Some(w)], vec!["p".into()]);
            y = graph.node(node.unwrap()).outputs[0];
            y = quantized(&mut graph, y, 0.097_3, "q");
            graph.set_outputs(vec![y]);
            let plan = Plan::new(graph).unwrap();
            let inputs = [Value::Tensor(bytes(DType::U8, &shape))];
            let expected = result(&*reference(), &plan, Numerics::Default, &inputs);
            let actual = result(&gpu, &plan, Numerics::Default, &inputs);
            // Sums of bytes are exact here and floats there: a tie may fall otherwise, and what it gives to others with it.
            let steps = actual.bytes().iter().zip(expected.bytes()).map(|(a, e)| a.abs_diff(*e));
            let (most, differ) = (steps.clone().max().unwrap(), steps.filter(|&step| step > 0).count());
            let (count, said) = (expected.element_count(), format!("{inner} to {outer}, real {is_real}"));
            assert!(most <= 1 && differ * 100 <= count, "{differ} of {count} differ, by {most} at most: {said}");
        }
    }
}

/// What the device says that its steps took is something, and no more than passed meanwhile.
#[test]
fn steps_are_timed_by_the_devices_clock() {
    let Some(gpu) = device("steps_are_timed_by_the_devices_clock", false) else { return };
    if !gpu.driver().has_clock {
        return println!("skipped: steps_are_timed_by_the_devices_clock needs a GPU that tells the time");
    }
    #[derive(Default)]
    struct Told(Mutex<Vec<(String, Duration)>>);
    impl PhaseObserver for Told {
        fn record(&self, phase: Phase, duration: Duration) {
            self.0.lock().unwrap().push((format!("{phase:?}"), duration));
        }
    }
    impl Profiler for Told {
        fn record(&self, timing: OpTiming<'_>) {
            self.0.lock().unwrap().push((timing.kernel.to_string(), timing.duration));
        }
    }
    let count = 1 << 20;
    let executable = gpu.compile(&exponential(count), &CompileOptions::default()).unwrap();
    let mut session = executable.session(SessionMemory::default()).unwrap();
    let x = Value::Tensor(Tensor::from_vec([count], vec![0.5f32; count]).unwrap());
    for (is_profiled, expected) in [(false, vec!["CopyIn", "Kernels", "CopyOut"]), (true, vec!["elementwise"])] {
        let told = Told::default();
        let context = match is_profiled {
            true => RunContext { profiler: Some(&told), ..RunContext::default() },
            false => RunContext { phases: Some(&told), ..RunContext::default() },
        };
        let mut outputs = [Output::Allocate(None)];
        let start = Instant::now();
        session.run(&[Input::Value(&x)], &mut outputs, &context).unwrap();
        let passed = start.elapsed();
        let told = told.0.into_inner().unwrap();
        assert_eq!(told.iter().map(|(what, _)| what.as_str()).collect::<Vec<_>>(), expected);
        let kernels = told[told.len() / 2].1;
        // A million exponentials are no matter of nanoseconds, whoever computes them.
        assert!(kernels > Duration::from_micros(1) && kernels <= passed, "{told:?} of {passed:?}");
        let [Output::Allocate(Some(Value::Tensor(y)))] = outputs else { panic!("a tensor expected") };
        assert!((y.to_vec::<f32>().unwrap()[count - 1] - 0.5f32.exp()).abs() < 1e-6);
    }
}

/// With precision f16 what layers hand on is in 16 bits, and what comes out is near what 32 give.
#[test]
fn activations_are_held_in_16_bits() {
    for is_real in [false, true] {
        let Some(gpu) = device("activations_are_held_in_16_bits", is_real) else { return };
        if !gpu.driver().limits.has_f16 {
            return println!("skipped: activations_are_held_in_16_bits needs a GPU with numbers of 16 bits");
        }
        let mut random = Random(23);
        // Two convolutions, odd in size, whose first result is read twice.
        let mut graph = Graph::new("halves");
        let shape = [1, 16, 15, 33];
        let x = graph.add_input("x", TensorFact::of_constant_shape(DType::F32, &shape));
        let node = |graph: &mut Graph, op: cutover_graph::Op, inputs: Vec<ValueId>, name: &str| {
            let inputs = inputs.into_iter().map(Some).collect();
            let node = graph.add_node(name, op, inputs, vec![format!("{name}.y")]).unwrap();
            graph.node(node).outputs[0]
        };
        let conv = |kernel: usize| {
            let padding = Padding::Explicit { begin: vec![kernel / 2; 2], end: vec![kernel / 2; 2] };
            let window =
                Window { kernel_shape: None, strides: vec![1; 2], dilations: vec![1; 2], padding, ceil_mode: false };
            Conv { window, group: 1, activation: Some(Activation::Relu) }.into()
        };
        let (narrow, wide) = ([64, 16, 1, 1], [16, 64, 3, 3]);
        let first = graph.add_constant("first", Constant::new(random.tensor(&narrow)));
        let second = graph.add_constant("second", Constant::new(random.tensor(&wide)));
        let a = node(&mut graph, conv(1), vec![x, first], "a");
        let b = node(&mut graph, Unary { function: UnaryFunction::Tanh }.into(), vec![a], "b");
        let c = node(&mut graph, Binary { function: BinaryFunction::Add }.into(), vec![a, b], "c");
        let y = node(&mut graph, conv(3), vec![c, second], "d");
        graph.set_outputs(vec![y]);
        let plan = Plan::new(graph).unwrap();
        let inputs = [Value::Tensor(random.tensor(&shape))];
        let expected = answer(&*reference(), &plan, Numerics::Default, &inputs);
        let compiled = |precision: Precision| {
            let options = CompileOptions { precision, numerics: Numerics::Strict };
            gpu.compile(&plan, &options).unwrap()
        };
        let (halved, whole) = (compiled(Precision::F16), compiled(Precision::F32));
        if is_real {
            // Of the arena, two tensors of 64 channels at a time; the rest is input, output, and what is read back.
            let of_wide = 64 * 15 * 33;
            let saved = whole.footprint().session_bytes - halved.footprint().session_bytes;
            assert!(saved.abs_diff(2 * 2 * of_wide) <= 1024, "{saved}");
        }
        let mut session = halved.session(SessionMemory::default()).unwrap();
        let mut outputs = [Output::Allocate(None)];
        session.run(&[Input::Value(&inputs[0])], &mut outputs, &RunContext::default()).unwrap();
        let [Output::Allocate(Some(Value::Tensor(actual)))] = outputs else { panic!("a tensor expected") };
        let scale = expected.iter().fold(1.0f32, |most, value| most.max(value.abs()));
        for (a, e) in actual.to_vec::<f32>().unwrap().iter().zip(&expected) {
            assert!((a - e).abs() <= 2e-3 * scale, "{a}, expected {e}, real {is_real}");
        }
    }
}

/// A channel a group: rows that are read by fours and that are not, several filters a channel, taps that lie apart, padding on one side alone.
#[test]
fn depthwise_convolutions_agree_on_either_kind_of_device() {
    for is_real in [false, true] {
        let Some(gpu) = device("depthwise_convolutions_agree_on_either_kind_of_device", is_real) else { return };
        let mut random = Random(29);
        for ([channels, each], size, kernel, [stride, dilation], [begin, end]) in [
            ([5, 1], [6, 8], [3, 3], [1, 1], [1, 1]),
            ([3, 2], [9, 16], [3, 3], [2, 1], [1, 0]),
            ([4, 1], [7, 7], [3, 3], [1, 1], [1, 1]),
            ([2, 3], [10, 11], [5, 4], [2, 2], [4, 4]),
            ([3, 1], [5, 24], [1, 7], [1, 1], [0, 6]),
            ([6, 1], [12, 12], [3, 3], [1, 2], [2, 2]),
            ([1, 1], [70, 70], [9, 9], [1, 1], [4, 4]),
        ] {
            let said =
                format!("{channels} by {each} of {size:?}, {kernel:?} by {stride}, dilated {dilation}, real {is_real}");
            let mut graph = Graph::new("depthwise");
            let shape = [2, channels, size[0], size[1]];
            let x = graph.add_input("x", TensorFact::of_constant_shape(DType::F32, &shape));
            let filters = [channels * each, 1, kernel[0], kernel[1]];
            let w = graph.add_constant("w", Constant::new(random.tensor(&filters)));
            let bias = graph.add_constant("b", Constant::new(random.tensor(&filters[..1])));
            let padding = Padding::Explicit { begin: vec![begin; 2], end: vec![end; 2] };
            let (strides, dilations) = (vec![stride; 2], vec![dilation; 2]);
            let window = Window { kernel_shape: None, strides, dilations, padding, ceil_mode: false };
            let op = Conv { window, group: channels, activation: Some(Activation::Relu) };
            let node = graph.add_node("conv", op.into(), vec![Some(x), Some(w), Some(bias)], vec!["y".into()]).unwrap();
            graph.set_outputs(vec![graph.node(node).outputs[0]]);
            check(&gpu, graph, Numerics::Default, &[Value::Tensor(random.tensor(&shape))], &said);
        }
    }
}
