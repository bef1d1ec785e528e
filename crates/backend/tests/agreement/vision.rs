//! What detectors, video and flow need beside convolutions of images, against the reference: over seeded random shapes, at every
//! instruction set, and the same bits for every number of threads. The CPU runs none of it by the reference's evaluation.

use super::support::{Random, answers, rungs, same_bits, seeds};
use cutover_backend::{Backend, CompileOptions, CpuOptions, cpu, reference};
use cutover_graph::{
    Constant, Graph, Op, Plan, TensorFact, ValueId,
    ops::{
        Activation, AveragePool, Conv, GridSample, GridSampleMode, GridSamplePadding, MaxPool, Padding, RoiAlign,
        Scatter, ScatterPlace, ScatterReduction, Window,
    },
};
use cutover_tensor::{DType, Tensor, Value};

const ROUNDS: u64 = 24;

/// One node, on inputs or constants.
struct One {
    graph: Graph,
    ids: Vec<Option<ValueId>>,
    values: Vec<Value>,
}

impl One {
    fn new() -> One {
        One { graph: Graph::new("one"), ids: Vec::new(), values: Vec::new() }
    }

    fn input(&mut self, tensor: Tensor) {
        let fact = TensorFact::of_constant_shape(tensor.dtype(), tensor.shape());
        self.ids.push(Some(self.graph.add_input(format!("x{}", self.ids.len()), fact)));
        self.values.push(Value::Tensor(tensor));
    }

    fn constant(&mut self, tensor: Tensor) {
        let name = format!("c{}", self.ids.len());
        self.ids.push(Some(self.graph.add_constant(name, Constant::new(tensor))));
    }

    fn check(mut self, op: impl Into<Op>, tolerance: f32) {
        let op = op.into();
        let shapes: Vec<_> =
            self.values.iter().filter_map(Value::as_tensor).map(|tensor| tensor.shape().to_vec()).collect();
        let said = format!("{op:?} of {shapes:?}");
        let node = self.graph.add_node("node", op, self.ids, vec!["y".into()]).unwrap();
        self.graph.set_outputs(self.graph.node(node).outputs.clone());
        let plan = Plan::new(self.graph).unwrap();
        let compiled = |backend: &dyn Backend| backend.compile(&plan, &CompileOptions::default()).unwrap();
        let expected = answers(compiled(&*reference()), &self.values, &said).swap_remove(0);
        let wanted: Vec<f32> = expected.to_vec().unwrap();
        for isa in rungs() {
            let make = |threads| cpu(CpuOptions { threads, isa: Some(isa.to_string()), ..CpuOptions::default() }).ok();
            let mut first: Option<Tensor> = None;
            for backend in [1, 2, 5].into_iter().filter_map(make) {
                let executable = compiled(&*backend);
                let actual = answers(executable.clone(), &self.values, &said).swap_remove(0);
                let kernels = &executable.placement().nodes;
                assert!(kernels.iter().all(|node| node.kernel != "reference"), "{said}: {kernels:?}");
                assert_eq!(actual.shape(), expected.shape(), "{said}");
                let scale = wanted.iter().fold(1.0f32, |m, v| m.max(v.abs()));
                for (at, (a, e)) in actual.to_vec::<f32>().unwrap().iter().zip(&wanted).enumerate() {
                    let near = (a - e).abs() <= tolerance * scale || a == e || a.is_nan() && e.is_nan();
                    assert!(near, "{isa}: [{at}] is {a}, expected {e}: {said}");
                }
                assert!(
                    first.as_ref().is_none_or(|f| same_bits(f, &actual)),
                    "{isa}: other bits on more threads: {said}"
                );
                first = Some(actual);
            }
        }
    }
}

/// A window over `axes` axes, of extents up to 3; of a pool where `kernel` says so, whose windows see more than padding.
fn window(r: &mut Random, axes: usize, kernel: bool) -> (Window, Vec<usize>) {
    let extents: Vec<usize> = (0..axes).map(|_| r.upto(3)).collect();
    let mut drawn = |most: &dyn Fn(usize) -> usize| (0..axes).map(|i| r.below(most(i) + 1)).collect::<Vec<_>>();
    let most = |axis: usize| if kernel { extents[axis] - 1 } else { 2 };
    let padding = Padding::Explicit { begin: drawn(&most), end: drawn(&most) };
    let strides = drawn(&|_| 1).iter().map(|s| s + 1).collect();
    let dilations = if kernel { Vec::new() } else { drawn(&|_| 1).iter().map(|d| d + 1).collect() };
    let kernel_shape = kernel.then(|| extents.clone());
    (Window { kernel_shape, strides, dilations, padding, ceil_mode: kernel && r.coin() }, extents)
}

fn image(r: &mut Random, channels: usize, axes: usize) -> Tensor {
    let mut shape = vec![r.upto(2), channels];
    shape.extend((0..axes).map(|_| 5 + r.below(7)));
    r.tensor(&shape)
}

#[test]
fn convolutions_over_three_axes_and_with_weights_of_the_run() {
    for seed in seeds(2 * ROUNDS) {
        let mut r = Random(seed + 700);
        let axes = r.pick(&[1, 2, 3, 3]);
        let (group, per_group, m) = (r.pick(&[1, 1, 2, 3]), r.upto(5), r.upto(20));
        let (window, kernel) = window(&mut r, axes, false);
        let x = image(&mut r, group * per_group, axes);
        let mut one = One::new();
        one.input(x);
        let weights = r.tensor(&[vec![group * m, per_group], kernel].concat());
        if axes == 3 && r.coin() {
            one.constant(weights)
        } else {
            one.input(weights)
        }
        match r.coin() {
            true => one.input(r.tensor(&[group * m])),
            false => one.ids.push(None),
        }
        let activation = r.coin().then_some(Activation::Relu);
        let mut op = Conv { window, group, activation };
        if r.coin() {
            // With something of the result's shape added before the activation.
            op.activation = None;
            let mut probe = One::new();
            (probe.graph, probe.ids) = (one.graph.clone(), one.ids.clone());
            let node = probe.graph.add_node("probe", op.clone().into(), probe.ids, vec!["y".into()]).unwrap();
            let y = probe.graph.node(node).outputs[0];
            let shape = probe.graph.value(y).fact.as_tensor().unwrap().constant_shape().unwrap();
            one.input(r.tensor(&shape));
            op.activation = activation;
        }
        // Sums of at most 135 products.
        one.check(op, 2e-5);
    }
}

#[test]
fn pools_over_three_axes() {
    for seed in seeds(ROUNDS) {
        let mut r = Random(seed + 800);
        let channels = r.upto(20);
        let x = image(&mut r, channels, 3);
        let (window, _) = window(&mut r, 3, true);
        let mut one = One::new();
        one.input(x);
        match r.coin() {
            true => one.check(MaxPool { window, column_major_indices: false }, 0.0),
            false => one.check(AveragePool { window, count_include_pad: r.coin() }, 1e-6),
        }
    }
}

#[test]
fn regions_of_maps() {
    for seed in seeds(ROUNDS) {
        let mut r = Random(seed + 900);
        let (n, c, h, w) = (r.upto(3), r.upto(40), r.upto(12), r.upto(12));
        let count = r.upto(9);
        // Some of them partly outside, some of negative size.
        let corners = (0..4 * count).map(|_| 8.0 + 14.0 * r.unit()).collect();
        let images = (0..count).map(|_| r.below(n)).collect::<Vec<_>>();
        let mut one = One::new();
        one.input(r.tensor(&[n, c, h, w]));
        one.input(Tensor::from_vec([count, 4], corners).unwrap());
        one.input(match r.coin() {
            true => Tensor::from_vec([count], images.iter().map(|&i| i as i64).collect()).unwrap(),
            false => Tensor::from_vec([count], images.iter().map(|&i| i as i32).collect()).unwrap(),
        });
        let (height, width) = (r.upto(4), r.upto(4));
        let op = RoiAlign {
            maximum: false,
            height,
            width,
            sampling_ratio: r.below(4),
            spatial_scale: r.pick(&[1.0, 0.5, 0.25]),
            half_pixel: r.coin(),
        };
        one.check(op, 1e-5);
    }
}

#[test]
fn a_region_of_an_image_that_is_not_there_is_refused() {
    let mut one = One::new();
    one.input(Random(1).tensor(&[1, 2, 3, 3]));
    one.input(Tensor::from_vec([1, 4], vec![0.0f32, 0.0, 2.0, 2.0]).unwrap());
    let index = one.graph.add_input("index", TensorFact::of_constant_shape(DType::I64, &[1]));
    one.ids.push(Some(index));
    let op = RoiAlign { maximum: false, height: 2, width: 2, sampling_ratio: 2, spatial_scale: 1.0, half_pixel: true };
    let node = one.graph.add_node("node", op.into(), one.ids, vec!["y".into()]).unwrap();
    one.graph.set_outputs(one.graph.node(node).outputs.clone());
    let backend = cpu(CpuOptions { threads: 2, ..CpuOptions::default() }).unwrap();
    let executable = backend.compile(&Plan::new(one.graph).unwrap(), &CompileOptions::default()).unwrap();
    for index in [-1i64, 1, i64::MAX] {
        use cutover_backend::{Input, Output, RunContext, SessionMemory};
        let index = Value::Tensor(Tensor::from_vec([1], vec![index]).unwrap());
        let inputs: Vec<Input<'_>> = one.values.iter().chain([&index]).map(Input::Value).collect();
        let mut session = executable.clone().session(SessionMemory::default()).unwrap();
        let error = session.run(&inputs, &mut [Output::Allocate(None)], &RunContext::default()).unwrap_err();
        assert!(error.to_string().contains("region 0 is of an image outside 0 to 1"), "{error}");
    }
}

#[test]
fn places_of_grids() {
    for seed in seeds(3 * ROUNDS) {
        let mut r = Random(seed + 1000);
        let (n, c, h, w) = (r.upto(3), r.upto(5), r.upto(6), r.upto(6));
        let (rows, columns) = (r.upto(5), r.upto(5));
        let places = (0..n * rows * columns * 2).map(|_| 1.6 * r.unit()).collect();
        let mut one = One::new();
        one.input(r.tensor(&[n, c, h, w]));
        one.input(Tensor::from_vec([n, rows, columns, 2], places).unwrap());
        let mode = r.pick(&[GridSampleMode::Nearest, GridSampleMode::Linear, GridSampleMode::Cubic]);
        let padding = r.pick(&[GridSamplePadding::Zeros, GridSamplePadding::Border, GridSamplePadding::Reflection]);
        one.check(GridSample { mode, padding, align_corners: r.coin() }, 1e-5);
    }
}

#[test]
fn elements_scattered_by_row() {
    for seed in seeds(ROUNDS) {
        let mut r = Random(seed + 1100);
        let shape: Vec<usize> = (0..r.upto(4)).map(|_| r.upto(6)).collect();
        let axis = r.below(shape.len());
        let mut updates: Vec<usize> = shape.iter().map(|&extent| r.upto(extent)).collect();
        updates[axis] = r.upto(8);
        let count = updates.iter().product();
        let extent = shape[axis] as i64;
        let indices: Vec<i64> = (0..count).map(|_| r.below(2 * extent as usize) as i64 - extent).collect();
        let mut one = One::new();
        one.input(r.tensor(&shape));
        one.input(Tensor::from_vec(updates.clone(), indices).unwrap());
        one.input(r.tensor(&updates));
        let reduction = r.pick(&[ScatterReduction::Replace, ScatterReduction::Add, ScatterReduction::Maximum]);
        one.check(Scatter { place: ScatterPlace::Elements { axis: axis as i64 }, reduction }, 1e-6);
    }
}
