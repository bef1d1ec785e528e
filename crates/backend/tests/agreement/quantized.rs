//! Quantized networks: integer kernels in place of dequantization, operator and quantization give the same bytes as these do, to one step.
//!
//! `CUTOVER_SOAK=N` runs N times as many graphs.

use super::support::{Random, run, rungs, seeds};
use cutover_backend::{Backend, CompileOptions, CpuOptions, cpu, reference};
use cutover_graph::{
    Constant, Graph, Op, Plan, TensorFact, ValueId,
    ops::{
        Activation, AveragePool, Binary, BinaryFunction, Cast, Concat, Conv, ConvInteger, DequantizeLinear,
        DynamicQuantizeLinear, DynamicQuantizeMatMul, Flatten, Gemm, GlobalPool, GlobalPoolFunction, Granularity,
        MatMul, MatMulInteger, MatMulIntegerToFloat, MatMulNBits, MaxPool, Padding, QLinearConv, QLinearMatMul,
        QuantizeLinear, Unary, UnaryFunction, Window,
    },
};
use cutover_tensor::{DType, Tensor, Value};
use std::{collections::BTreeMap, sync::Arc};

const PER_TENSOR: Granularity = Granularity { axis: 1, block_size: 0 };

/// A quantized graph being drawn, and what it will be run on.
struct Drawing {
    random: Random,
    graph: Graph,
    inputs: Vec<Value>,
    said: Vec<String>,
}

/// Of a quantized value.
#[derive(Clone, Copy)]
struct Scale {
    scale: ValueId,
    zero_point: ValueId,
}

impl Drawing {
    fn new(seed: u64) -> Drawing {
        let random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1);
        Drawing { random, graph: Graph::new("drawn"), inputs: Vec::new(), said: Vec::new() }
    }

    fn constant(&mut self, tensor: Tensor) -> ValueId {
        let name = self.graph.unique_value_name("c");
        self.graph.add_constant(name, Constant::new(tensor))
    }

    fn nodes(&mut self, op: impl Into<Op>, inputs: &[Option<ValueId>], outputs: usize) -> Vec<ValueId> {
        let op = op.into();
        self.said.push(format!("{op:?}"));
        let names = (0..outputs).map(|i| format!("v{}_{i}", self.said.len())).collect();
        let node = self.graph.add_node(format!("n{}", self.said.len()), op, inputs.to_vec(), names).unwrap();
        self.graph.node(node).outputs.clone()
    }

    fn node(&mut self, op: impl Into<Op>, inputs: &[ValueId]) -> ValueId {
        let inputs: Vec<Option<ValueId>> = inputs.iter().copied().map(Some).collect();
        self.nodes(op, &inputs, 1)[0]
    }

    fn shape(&self, id: ValueId) -> Vec<usize> {
        self.graph.value(id).fact.as_tensor().unwrap().constant_shape().unwrap()
    }

    fn bytes(&mut self, dtype: DType, shape: &[usize]) -> Tensor {
        let bytes: Vec<u8> = (0..shape.iter().product()).map(|_| self.random.next() as u8).collect();
        Tensor::from_bytes(dtype, shape, &bytes).unwrap()
    }

    /// Bytes that come with the request.
    fn input(&mut self, dtype: DType, shape: &[usize]) -> ValueId {
        let tensor = self.bytes(dtype, shape);
        self.inputs.push(Value::Tensor(tensor));
        self.said.push(format!("input {dtype} {shape:?}"));
        self.graph.add_input(format!("x{}", self.inputs.len()), TensorFact::of_constant_shape(dtype, shape))
    }

    /// Floats that come with the request.
    fn floats(&mut self, shape: &[usize]) -> ValueId {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| self.random.unit() * 3.0 + 0.7).collect();
        self.inputs.push(Value::Tensor(Tensor::from_vec(shape, values).unwrap()));
        self.said.push(format!("floats {shape:?}"));
        self.graph.add_input(format!("x{}", self.inputs.len()), TensorFact::of_constant_shape(DType::F32, shape))
    }

    fn scale(&mut self, dtype: DType, step: f32) -> Scale {
        let point = self.random.pick(&[0i64, 3, 100, 127]);
        let tensor = match dtype {
            DType::U8 => Tensor::scalar(point as u8),
            _ => Tensor::scalar(point.min(127) as i8 - 50),
        };
        self.said.push(format!("scale {step} zero point {:?}", tensor.bytes()));
        Scale { scale: self.constant(Tensor::scalar(step)), zero_point: self.constant(tensor) }
    }

    fn dequantized(&mut self, x: ValueId, scale: Scale) -> ValueId {
        self.node(DequantizeLinear { granularity: PER_TENSOR, output_dtype: None }, &[x, scale.scale, scale.zero_point])
    }

    fn quantized(&mut self, x: ValueId, scale: Scale) -> ValueId {
        let op = QuantizeLinear { granularity: PER_TENSOR, output_dtype: None, saturate: true, precision: None };
        self.node(op, &[x, scale.scale, scale.zero_point])
    }

    /// Dequantized weights of `m` along `axis`, with a scale for each or for all.
    fn weights(&mut self, shape: &[usize], axis: usize) -> ValueId {
        let dtype = self.random.pick(&[DType::I8, DType::I8, DType::U8]);
        let tensor = self.bytes(dtype, shape);
        let each = self.random.below(3) > 0;
        let count = if each { shape[axis] } else { 1 };
        let scales: Vec<f32> = (0..count).map(|_| 0.002 + self.random.unit().abs() * 0.01).collect();
        let zero = dtype == DType::I8 && self.random.below(2) == 0;
        let points: Vec<u8> = (0..count).map(|_| if zero { 0 } else { self.random.below(128) as u8 }).collect();
        let dims: &[usize] = if each { &[count] } else { &[] };
        let (w, scale) = (self.constant(tensor), self.constant(Tensor::from_vec(dims, scales).unwrap()));
        let point = self.constant(Tensor::from_bytes(dtype, dims, &points).unwrap());
        let granularity = Granularity { axis: axis as i64, block_size: 0 };
        self.node(DequantizeLinear { granularity, output_dtype: None }, &[w, scale, point])
    }

    fn bias(&mut self, m: usize) -> ValueId {
        let values: Vec<i32> = (0..m).map(|_| self.random.below(20_000) as i32 - 10_000).collect();
        let w = self.constant(Tensor::from_vec([m], values).unwrap());
        let scale = self.constant(Tensor::from_vec([m], vec![0.0003f32; m]).unwrap());
        self.nodes(
            DequantizeLinear { granularity: Granularity { axis: 0, block_size: 0 }, output_dtype: None },
            &[Some(w), Some(scale)],
            1,
        )[0]
    }

    fn window(&mut self, kernel: Option<Vec<usize>>) -> Window {
        let r = &mut self.random;
        let mut two = |n: usize| vec![1 + r.below(n), 1 + r.below(n)];
        let (strides, dilations) = (two(2), if kernel.is_none() { two(2) } else { Vec::new() });
        let mut pad = || vec![r.below(2), r.below(2)];
        let padding = Padding::Explicit { begin: pad(), end: pad() };
        Window { kernel_shape: kernel, strides, dilations, padding, ceil_mode: false }
    }

    fn activation(&mut self) -> Option<Activation> {
        let clip = Activation::Clip { low: -0.5, high: 6.0 };
        let fused = [Activation::Relu, clip, Activation::Gelu, Activation::Silu].map(Some);
        self.random.pick(&[&[None; 3][..], &fused].concat())
    }

    /// An operator of a dequantized image, whose result is quantized again, or not.
    fn image(seed: u64) -> Drawing {
        let mut d = Drawing::new(seed);
        let dtype = d.random.pick(&[DType::U8, DType::U8, DType::I8]);
        let groups = d.random.pick(&[1, 1, 2, 3]);
        let channels = groups * d.random.pick(&[1, 3, 5, 8, 17, 32]);
        let shape = [1 + d.random.below(2), channels, 5 + d.random.below(6), 5 + d.random.below(6)];
        let (x, scale) = (d.input(dtype, &shape), d.scale(dtype, 0.04));
        let x = d.dequantized(x, scale);
        let to_dtype = d.random.pick(&[DType::U8, DType::U8, DType::I8]);
        {
            let channels = d.shape(x)[1];
            let small = d.shape(x)[2] < 5 || d.shape(x)[3] < 5;
            let step = d.random.pick(&[0.1, 0.6]);
            let to = d.scale(to_dtype, step);
            let y = match d.random.below(if small { 5 } else { 8 }) {
                0 => {
                    let function = UnaryFunction::HardSwish;
                    d.node(Unary { function }, &[x])
                }
                1 => {
                    let other = d.input(DType::U8, &d.shape(x));
                    let scale = d.scale(DType::U8, 0.02);
                    let other = d.dequantized(other, scale);
                    d.node(Binary { function: BinaryFunction::Add }, &[x, other])
                }
                2 => {
                    let other = d.input(dtype, &d.shape(x));
                    let scale = d.scale(dtype, 0.05);
                    let other = d.dequantized(other, scale);
                    d.node(Concat { axis: 1 }, &[x, other])
                }
                3 => d.node(GlobalPool { function: GlobalPoolFunction::Average }, &[x]),
                4 => {
                    let m = d.random.pick(&[1, 4, 16, 33]);
                    let (w, bias) = (d.weights(&[m, channels, 1, 1], 0), d.bias(m));
                    let window = Window {
                        kernel_shape: None,
                        strides: vec![],
                        dilations: vec![],
                        padding: Padding::Explicit { begin: vec![], end: vec![] },
                        ceil_mode: false,
                    };
                    let activation = d.activation();
                    d.node(Conv { window, group: 1, activation }, &[x, w, bias])
                }
                5 => {
                    let window = d.window(Some(vec![2, 3]));
                    d.node(MaxPool { window, column_major_indices: false }, &[x])
                }
                6 => {
                    let (window, count_include_pad) = (d.window(Some(vec![3, 2])), d.random.below(2) == 0);
                    d.node(AveragePool { window, count_include_pad }, &[x])
                }
                _ => {
                    let depthwise = d.random.below(3) == 0;
                    let group = if depthwise {
                        channels
                    } else if channels.is_multiple_of(groups) {
                        groups
                    } else {
                        1
                    };
                    let m = if depthwise { channels } else { group * d.random.pick(&[1, 7, 16, 20]) };
                    let (kh, kw) = (1 + d.random.below(3), 1 + d.random.below(3));
                    let (w, bias) = (d.weights(&[m, channels / group, kh, kw], 0), d.bias(m));
                    let (window, activation) = (d.window(None), d.activation());
                    d.node(Conv { window, group, activation }, &[x, w, bias])
                }
            };
            let y = if d.random.below(4) == 0 { d.node(Unary { function: UnaryFunction::Relu }, &[y]) } else { y };
            let y = if d.random.below(8) == 0 { y } else { d.quantized(y, to) };
            d.graph.set_outputs(vec![y]);
        }
        d
    }

    /// A product of dequantized rows.
    fn product(seed: u64) -> Drawing {
        let mut d = Drawing::new(seed);
        let dtype = d.random.pick(&[DType::U8, DType::I8]);
        let (m, k, n) = (1 + d.random.below(30), 1 + d.random.below(120), 1 + d.random.below(50));
        let activation = d.activation();
        let (x, scale) = (d.input(dtype, &[m, k]), d.scale(dtype, 0.04));
        let x = d.dequantized(x, scale);
        let y = if d.random.below(2) == 0 {
            let transpose_b = d.random.below(2) == 0;
            let w = if transpose_b { d.weights(&[n, k], 0) } else { d.weights(&[k, n], 1) };
            let bias = d.bias(n);
            d.node(Gemm { alpha: 1.0, beta: 1.0, transpose_a: false, transpose_b, activation }, &[x, w, bias])
        } else {
            let x = d.node(Flatten { axis: 1 }, &[x]);
            let w = d.weights(&[k, n], 1);
            d.node(MatMul { activation }, &[x, w])
        };
        if d.random.below(4) == 0 {
            d.graph.set_outputs(vec![y]);
            return d;
        }
        let to = d.scale(DType::U8, 0.2);
        let q = d.quantized(y, to);
        d.graph.set_outputs(vec![q]);
        d
    }

    /// Operators that name quantized operands, and a dynamically quantized product.
    fn named(seed: u64) -> Drawing {
        let mut d = Drawing::new(seed);
        let dtype = d.random.pick(&[DType::U8, DType::I8]);
        let (m, k, n) = (1 + d.random.below(30), 1 + d.random.below(120), 1 + d.random.below(50));
        let (from, to) = (d.scale(dtype, 0.04), d.scale(DType::U8, 0.4));
        let w_scale = d.scale(DType::I8, 0.01);
        let window = d.window(None);
        let y = match d.random.below(7) {
            0 => {
                let x = d.input(dtype, &[1, 4, 9, 8]);
                let (w, bias) =
                    (d.bytes(DType::I8, &[6, 2, 2, 3]), Tensor::from_vec([6], vec![100, -200, 3, 0, 50, -7]).unwrap());
                let (w, bias) = (d.constant(w), d.constant(bias));
                let inputs = [
                    x,
                    from.scale,
                    from.zero_point,
                    w,
                    w_scale.scale,
                    w_scale.zero_point,
                    to.scale,
                    to.zero_point,
                    bias,
                ];
                d.node(QLinearConv { window, group: 2 }, &inputs)
            }
            1 => {
                let x = d.input(dtype, &[m, k]);
                let w = d.bytes(DType::I8, &[k, n]);
                let w = d.constant(w);
                let inputs =
                    [x, from.scale, from.zero_point, w, w_scale.scale, w_scale.zero_point, to.scale, to.zero_point];
                d.node(QLinearMatMul, &inputs)
            }
            2 => {
                let x = d.input(dtype, &[2, 3, 9, 8]);
                let w = d.bytes(DType::U8, &[5, 3, 3, 2]);
                let w = d.constant(w);
                let point = d.constant(Tensor::scalar(120u8));
                d.node(ConvInteger { window, group: 1 }, &[x, w, from.zero_point, point])
            }
            3 => {
                let x = d.input(dtype, &[2, m, k]);
                let w = d.bytes(DType::I8, &[k, n]);
                let w = d.constant(w);
                d.node(MatMulInteger, &[x, w, from.zero_point])
            }
            4 | 5 => {
                let dynamic = d.random.below(2) == 0;
                let x = if dynamic { d.floats(&[2, m, k]) } else { d.input(dtype, &[2, m, k]) };
                let w = d.bytes(DType::I8, &[k, n]);
                let w = d.constant(w);
                let scales = (0..n).map(|_| 0.01 + d.random.unit().abs() * 0.1).collect();
                let scales = d.constant(Tensor::from_vec([n], scales).unwrap());
                let points = d.bytes(DType::I8, &[n]);
                let points = (d.random.below(2) == 0).then(|| d.constant(points));
                let bias = d.random.tensor(&[n]);
                let bias = (d.random.below(2) == 0).then(|| d.constant(bias));
                if dynamic {
                    d.nodes(DynamicQuantizeMatMul, &[Some(x), Some(w), Some(scales), points, bias], 1)[0]
                } else {
                    let (scale, point) = (Some(from.scale), Some(from.zero_point));
                    let inputs = [Some(x), Some(w), scale, Some(scales), point, points, bias];
                    d.nodes(MatMulIntegerToFloat, &inputs, 1)[0]
                }
            }
            _ => {
                let x = d.floats(&[m, k]);
                let [x, scale, point] = d.nodes(DynamicQuantizeLinear, &[Some(x)], 3)[..] else { panic!("three") };
                let w = d.bytes(DType::I8, &[k, n]);
                let w = d.constant(w);
                let scales: Vec<f32> = (0..n).map(|_| d.random.unit().abs()).collect();
                let (zeros, scales) =
                    (Tensor::from_bytes(DType::I8, [n], &vec![0; n]).unwrap(), Tensor::from_vec([n], scales).unwrap());
                let (zeros, scales) = (d.constant(zeros), d.constant(scales));
                let scales = d.node(Binary { function: BinaryFunction::Mul }, &[scale, scales]);
                let y = d.node(MatMulInteger, &[x, w, point, zeros]);
                let y = d.node(Cast::to(DType::F32), &[y]);
                let y = d.node(Binary { function: BinaryFunction::Mul }, &[y, scales]);
                let bias = (0..n).map(|i| i as f32).collect();
                let bias = d.constant(Tensor::from_vec([n], bias).unwrap());
                d.node(Binary { function: BinaryFunction::Add }, &[bias, y])
            }
        };
        d.graph.set_outputs(vec![y]);
        d
    }
}

impl Drawing {
    /// A product with weights of a few bits, in blocks.
    fn blocked(seed: u64) -> Drawing {
        let mut d = Drawing::new(seed);
        let (bits, block_size) = (d.random.pick(&[2, 4, 4, 8]), d.random.pick(&[16, 32, 128]));
        let (m, k, n) = (1 + d.random.below(9), 1 + d.random.below(300), 1 + d.random.below(100));
        let op = MatMulNBits { n, k, bits, block_size, accuracy_level: 0 };
        let blocks = k.div_ceil(block_size);
        let x = d.floats(&[2, m, k]);
        let b = d.bytes(DType::U8, &[n, blocks, block_size * bits / 8]);
        let scales = d.random.tensor(&[n, blocks]);
        let (b, scales) = (d.constant(b), d.constant(scales));
        let points = match d.random.below(3) {
            0 => None,
            1 => Some(d.bytes(DType::U8, &[n, (blocks * bits).div_ceil(8)])),
            _ => Some(d.random.tensor(&[n, blocks])),
        };
        let points = points.map(|points| d.constant(points));
        let bias = d.random.tensor(&[n]);
        let bias = (d.random.below(2) == 0).then(|| d.constant(bias));
        let y = d.nodes(op, &[Some(x), Some(b), Some(scales), points, None, bias], 1)[0];
        d.graph.set_outputs(vec![y]);
        d
    }
}

fn check(draw: fn(u64) -> Drawing, count: u64) {
    let backends: Vec<Arc<dyn Backend>> = rungs()
        .into_iter()
        .flat_map(|isa| {
            [1, 3].map(|threads| cpu(CpuOptions { threads, isa: Some(isa.to_string()), ..CpuOptions::default() }).ok())
        })
        .flatten()
        .collect();
    check_on(&backends, draw, count);
}

/// Compares `backends` with the reference; how many nodes every kernel had.
fn check_on(backends: &[Arc<dyn Backend>], draw: fn(u64) -> Drawing, count: u64) -> BTreeMap<String, usize> {
    let reference = reference();
    let mut kernels = BTreeMap::new();
    for seed in seeds(count) {
        let drawing = draw(seed);
        let said = format!("seed {seed}: {}", drawing.said.join("; "));
        let plan = Plan::new(drawing.graph).unwrap();
        let expected = run(&reference, &plan, &drawing.inputs, &said).swap_remove(0);
        let mut first: Option<(String, Tensor)> = None;
        for backend in backends {
            let about = backend.describe();
            let executable = backend.compile(&plan, &CompileOptions::default()).unwrap();
            for placed in &executable.placement().nodes {
                assert_ne!(placed.kernel, "reference", "{said}: {} {}", placed.op, placed.reason);
                *kernels.entry(placed.kernel.clone()).or_default() += 1;
            }
            let actual = run(backend, &plan, &drawing.inputs, &said).swap_remove(0);
            assert_eq!((actual.dtype(), actual.shape()), (expected.dtype(), expected.shape()), "{said}");
            let values = |t: &Tensor| match cutover_graph::ops::Wide::of(t).unwrap() {
                cutover_graph::ops::Wide::Int(v) => v.into_iter().map(|v| v as f64).collect::<Vec<_>>(),
                cutover_graph::ops::Wide::Float(v) => v,
                other => panic!("{other:?}"),
            };
            let (a, e) = (values(&actual), values(&expected));
            let largest = e.iter().fold(1f64, |m, v| m.max(v.abs()));
            let step = match actual.dtype() {
                DType::I32 => 0.0,
                DType::F32 => 1e-5 * largest,
                _ => 1.0,
            };
            for (at, (a, e)) in a.iter().zip(&e).enumerate() {
                assert!((a - e).abs() <= step, "{} [{at}] is {a}, expected {e}: {said}", about.isa);
            }
            let off = a.iter().zip(&e).filter(|(a, e)| a != e).count();
            assert!(
                actual.dtype() == DType::F32 || off * 20 <= a.len() + 40,
                "{} {off} of {} are off: {said}",
                about.isa,
                a.len()
            );
            match &first {
                Some((isa, tensor)) if *isa == about.isa => {
                    assert!(tensor.bytes() == actual.bytes(), "{isa}: other bits on more threads: {said}");
                }
                _ => first = Some((about.isa.clone(), actual)),
            }
        }
    }
    kernels
}

#[test]
fn images_between_dequantization_and_quantization() {
    check(Drawing::image, 250);
}

#[test]
fn products_between_dequantization_and_quantization() {
    check(Drawing::product, 60);
}

#[test]
fn operators_of_quantized_operands() {
    check(Drawing::named, 90);
}

#[test]
fn products_with_blocks_of_few_bits() {
    check(Drawing::blocked, 60);
}

/// The same on a GPU, where products are of packed bytes.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod on_the_gpu {
    use super::{Drawing, check_on};
    use crate::gpu::gpu;
    use std::collections::BTreeMap;

    /// Whether a node had the kernel of this name, or that written by hand.
    fn has(kernels: &BTreeMap<String, usize>, name: &str) -> bool {
        kernels.keys().any(|kernel| kernel.starts_with(name))
    }

    #[test]
    fn images_between_dequantization_and_quantization() {
        let Some(gpu) = gpu("images_between_dequantization_and_quantization") else { return };
        let kernels = check_on(&[gpu], Drawing::image, 60);
        assert!(has(&kernels, "integer convolution"), "{kernels:?}");
    }

    #[test]
    fn products_between_dequantization_and_quantization() {
        let Some(gpu) = gpu("products_between_dequantization_and_quantization") else { return };
        let kernels = check_on(&[gpu], Drawing::product, 24);
        assert!(has(&kernels, "integer product"), "{kernels:?}");
    }

    #[test]
    fn operators_of_quantized_operands() {
        let Some(gpu) = gpu("operators_of_quantized_operands") else { return };
        let kernels = check_on(&[gpu], Drawing::named, 42);
        assert!(has(&kernels, "integer product"), "{kernels:?}");
    }

    #[test]
    fn products_with_blocks_of_few_bits() {
        let Some(gpu) = gpu("products_with_blocks_of_few_bits") else { return };
        let kernels = check_on(&[gpu], Drawing::blocked, 30);
        assert!(has(&kernels, "blocked product"), "{kernels:?}");
    }
}
