//! Every family against the operators' own definition in f64: what it gives, and its gradient against central differences.

use super::*;
use candle_core::Var;
use cutover_graph::{
    TensorFact,
    ops::{
        AspectPolicy, AveragePool, BatchNorm, Binary, Cell, CellActivation, Clip, Concat, Conv, ConvTranspose,
        CoordinateMode, DepthSpace, Direction, Expand, Flatten, Gather, Gemm, GlobalPool, GlobalPoolFunction,
        InstanceNorm, LayerNorm, LpNorm, LpNormOrder, MatMul, MaxPool, NearestMode, Pad, PadMode, Padding, Recurrent,
        Reduce, ReduceFunction, Reshape, Resize, ResizeMode, Slice, Softmax, SoftmaxFunction, Split, Squeeze, Tile,
        Transpose, Trilu, Unary, UnaryFunction, Unsqueeze, Variadic, VariadicFunction, Where, Window,
    },
};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

/// An input of a case.
#[derive(Clone)]
enum In {
    /// A variable of this shape, uniform in the range.
    Var(Vec<usize>, f64, f64),
    /// Known; floats take the type of the run.
    Known(Host),
    /// Known, as it is.
    Kept(Host),
    Omitted,
}

fn var(shape: &[usize]) -> In {
    In::Var(shape.to_vec(), -1.0, 1.0)
}

fn positive(shape: &[usize]) -> In {
    In::Var(shape.to_vec(), 0.3, 1.5)
}

fn ints(values: &[i64]) -> In {
    In::Known(Host::from_vec([values.len()], values.to_vec()).unwrap())
}

fn floats(shape: &[usize], values: &[f32]) -> In {
    In::Known(Host::from_vec(shape, values.to_vec()).unwrap())
}

fn uniform(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// The first f32 outputs of `op`, over three seeds. The tolerance of values is relative to the largest; that of gradients is 30 times as much.
fn check(op: impl Into<Op>, inputs: &[In], outputs: usize) {
    let op = op.into();
    for seed in 0..3 {
        check_once(&op, inputs, outputs, 1e-5, seed);
    }
}

fn check_once(op: &Op, inputs: &[In], outputs: usize, tolerance: f64, seed: u64) {
    let name = op.name();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    // Rounded to f32, so that both sides see the same numbers.
    let mut values: Vec<Vec<f64>> = Vec::new();
    let mut graph = Graph::new("case");
    let (mut ids, mut variables) = (Vec::new(), Vec::new());
    for (i, input) in inputs.iter().enumerate() {
        let (id, value) = match input {
            In::Omitted => (None, Vec::new()),
            In::Known(tensor) | In::Kept(tensor) => {
                (Some(graph.add_constant(format!("c{i}"), cutover_graph::Constant::new(tensor.clone()))), Vec::new())
            }
            In::Var(shape, low, high) => {
                let id = graph.add_input(format!("x{i}"), TensorFact::of_constant_shape(DType::F32, shape));
                variables.push((i, id, shape.clone()));
                let count = shape.iter().product();
                let value = |_| f64::from((low + (high - low) * uniform(&mut random)) as f32);
                (Some(id), (0..count).map(value).collect())
            }
        };
        ids.push(id);
        values.push(value);
    }
    let node = graph.add_node("node", op.clone(), ids, (0..outputs).map(|o| format!("y{o}")).collect()).unwrap();
    let wanted = graph.node(node).outputs.clone();
    graph.set_outputs(wanted.clone());
    // Exactly.
    let exact = |values: &[Vec<f64>]| -> Vec<Host> {
        let hosts: Vec<Option<Value>> = inputs
            .iter()
            .zip(values)
            .map(|(input, values)| match input {
                In::Omitted => None,
                In::Var(shape, ..) => Some(Host::from_vec(shape.clone(), values.clone()).unwrap().into()),
                In::Known(tensor) if tensor.dtype() == DType::F32 => {
                    let wide = tensor.to_vec::<f32>().unwrap().into_iter().map(f64::from).collect();
                    Some(Host::from_vec(tensor.shape().clone(), wide).unwrap().into())
                }
                In::Known(tensor) | In::Kept(tensor) => Some(tensor.clone().into()),
            })
            .collect();
        let hosts: Vec<Option<&Value>> = hosts.iter().map(Option::as_ref).collect();
        let context = EvalContext { outputs, ..EvalContext::default() };
        let results = op.eval(Inputs(&hosts), &context).unwrap();
        results.into_iter().take(outputs).map(|v| v.into_tensor().unwrap()).collect()
    };
    let expected = exact(&values);
    let parameters: Vec<Var> = variables
        .iter()
        .map(|(i, _, shape)| {
            let narrow: Vec<f32> = values[*i].iter().map(|&v| v as f32).collect();
            Var::from_vec(narrow, shape.clone(), &Device::Cpu).unwrap()
        })
        .collect();
    let tensors: Vec<Tensor> = parameters.iter().map(|p| p.as_tensor().clone()).collect();
    let ids: Vec<ValueId> = variables.iter().map(|(_, id, _)| *id).collect();
    let differentiable = Differentiable::new(graph, &ids).unwrap();
    let got = differentiable.run(&tensors, &Vec::new(), &wanted, &mut Clear).unwrap();
    let mut coefficients = Vec::new();
    let mut loss = Tensor::zeros((), candle_core::DType::F32, &Device::Cpu).unwrap();
    for (got, expected) in got.iter().zip(&expected) {
        assert_eq!(got.dims(), expected.shape().dims(), "{name}: shape");
        let (host, wide) = (to_host(got).unwrap(), expected.to_vec::<f64>().unwrap());
        let scale = wide.iter().fold(1f64, |m, v| m.max(v.abs()));
        for (i, (a, b)) in host.to_vec::<f32>().unwrap().into_iter().zip(&wide).enumerate() {
            assert!(
                (f64::from(a) - b).abs() <= tolerance * scale,
                "{name} seed {seed}: element {i} is {a}, expected {b}"
            );
        }
        let row: Vec<f32> = wide.iter().map(|_| (2.0 * uniform(&mut random) - 1.0) as f32).collect();
        let weights = Tensor::from_vec(row.clone(), got.dims(), &Device::Cpu).unwrap();
        coefficients.push(row);
        loss = (loss + (got * weights).unwrap().sum_all().unwrap()).unwrap();
    }
    let objective = |values: &[Vec<f64>]| -> f64 {
        let outputs = exact(values);
        outputs
            .iter()
            .zip(&coefficients)
            .map(|(y, row)| y.to_vec::<f64>().unwrap().iter().zip(row).map(|(y, &c)| y * f64::from(c)).sum::<f64>())
            .sum()
    };
    let gradients = loss.backward().unwrap();
    for ((i, ..), parameter) in variables.iter().zip(&parameters) {
        let gradient = gradients.get(parameter).unwrap_or_else(|| panic!("{name}: no gradient at input {i}"));
        let gradient = to_host(gradient).unwrap().to_vec::<f32>().unwrap();
        let mut differences = Vec::new();
        let mut moved = values.clone();
        for (element, &at) in values[*i].iter().enumerate() {
            const STEP: f64 = 1e-5;
            moved[*i][element] = at + STEP;
            let above = objective(&moved);
            moved[*i][element] = at - STEP;
            differences.push((above - objective(&moved)) / (2.0 * STEP));
            moved[*i][element] = at;
        }
        let scale = differences.iter().fold(1f64, |m, v| m.max(v.abs()));
        for (element, (got, expected)) in gradient.into_iter().zip(differences).enumerate() {
            assert!(
                (f64::from(got) - expected).abs() <= 30.0 * tolerance * scale,
                "{name} seed {seed}: gradient at element {element} of input {i} is {got}, expected {expected}"
            );
        }
    }
}

fn window(kernel: Option<&[usize]>, strides: &[usize], dilations: &[usize], pads: (&[usize], &[usize])) -> Window {
    Window {
        kernel_shape: kernel.map(<[usize]>::to_vec),
        strides: strides.to_vec(),
        dilations: dilations.to_vec(),
        padding: Padding::Explicit { begin: pads.0.to_vec(), end: pads.1.to_vec() },
        ceil_mode: false,
    }
}

#[test]
fn functions_of_one_value() {
    use UnaryFunction as U;
    for function in [
        U::Abs,
        U::Neg,
        U::Exp,
        U::Sin,
        U::Cos,
        U::Tan,
        U::Atan,
        U::Sinh,
        U::Cosh,
        U::Tanh,
        U::Asinh,
        U::Erf,
        U::Relu,
        U::Sigmoid,
        U::Softplus,
        U::Softsign,
        U::Mish,
        U::LeakyRelu { alpha: 0.1 },
        U::Elu { alpha: 0.7 },
        U::Celu { alpha: 0.7 },
        U::Selu { alpha: 1.6, gamma: 1.1 },
        U::Gelu { tanh: false },
        U::Gelu { tanh: true },
        U::Swish { alpha: 1.0 },
        U::Swish { alpha: 1.7 },
    ] {
        check(Unary { function }, &[var(&[3, 7])], 1);
    }
    for function in [
        U::HardSwish,
        U::HardSigmoid { alpha: 0.2, beta: 0.5 },
        U::ThresholdedRelu { alpha: 0.8 },
        U::Shrink { lambda: 0.5, bias: 0.2 },
        U::Gelu { tanh: false },
        U::Sigmoid,
    ] {
        check(Unary { function }, &[In::Var(vec![41], -5.0, 5.0)], 1);
    }
    for function in [U::Sqrt, U::Reciprocal, U::Log] {
        check(Unary { function }, &[positive(&[11])], 1);
    }
    for function in [U::Asin, U::Acos, U::Atanh] {
        check(Unary { function }, &[In::Var(vec![11], -0.9, 0.9)], 1);
    }
    check(Unary { function: U::Acosh }, &[In::Var(vec![11], 1.2, 3.0)], 1);
    check(Clip, &[var(&[13]), floats(&[], &[-0.4]), floats(&[], &[0.6])], 1);
    check(Clip, &[var(&[13]), In::Omitted, floats(&[], &[0.6])], 1);
}

#[test]
fn functions_of_two_values_are_broadcast() {
    use BinaryFunction as B;
    let shapes: [(&[usize], &[usize]); 8] = [
        (&[2, 3, 4], &[2, 3, 4]),
        (&[2, 3, 4], &[4]),
        (&[2, 3, 4], &[3, 1]),
        (&[3, 1], &[2, 3, 4]),
        (&[2, 1, 4], &[1, 3, 1]),
        (&[], &[5]),
        (&[1, 5], &[]),
        (&[2, 1, 2, 1], &[3, 1, 4]),
    ];
    for (a, b) in shapes {
        for function in [B::Add, B::Sub, B::Mul, B::Div] {
            check(Binary { function }, &[var(a), positive(b)], 1);
        }
        check(Binary { function: B::Pow }, &[positive(a), positive(b)], 1);
    }
    check(Binary { function: B::PRelu }, &[var(&[2, 3, 4]), var(&[3, 1])], 1);
    check(Binary { function: B::Pow }, &[var(&[2, 3]), floats(&[], &[2.0])], 1);
    for function in [VariadicFunction::Sum, VariadicFunction::Mean, VariadicFunction::Min, VariadicFunction::Max] {
        check(Variadic { function }, &[var(&[2, 3]), var(&[3]), var(&[2, 1])], 1);
    }
    let condition = Host::from_bools([2, 1], &[true, false]).unwrap();
    check(Where, &[In::Known(condition), var(&[2, 3]), var(&[3])], 1);
}

#[test]
fn convolutions() {
    let none: (&[usize], &[usize]) = (&[], &[]);
    let cases: [(&[usize], &[usize], usize, Window); 10] = [
        (&[2, 3, 7], &[4, 3, 3], 1, window(None, &[2], &[], (&[1], &[0]))),
        (&[2, 3, 5, 6], &[4, 3, 3, 2], 1, window(None, &[], &[], (&[1, 0], &[1, 1]))),
        (&[2, 4, 6, 5], &[6, 2, 3, 3], 2, window(None, &[2, 1], &[1, 2], (&[1, 2], &[1, 2]))),
        (&[2, 4, 6, 5], &[4, 1, 3, 3], 4, window(None, &[1, 1], &[], (&[1, 1], &[1, 1]))),
        (&[3, 4, 7, 5], &[4, 1, 3, 3], 4, window(None, &[2, 2], &[], (&[1, 1], &[1, 1]))),
        (&[1, 2, 5, 5], &[4, 1, 2, 2], 2, window(None, &[], &[2, 2], none)),
        (&[5, 3, 4, 4], &[6, 3, 1, 1], 1, window(None, &[], &[], none)),
        (&[1, 3, 5, 5], &[2, 3, 1, 1], 1, window(None, &[2, 2], &[], none)),
        (&[1, 2, 3, 4, 3], &[3, 2, 2, 2, 2], 1, window(None, &[], &[], (&[1, 0, 0], &[0, 1, 0]))),
        (&[2, 3, 7, 6], &[2, 3, 3, 3], 1, Window { padding: Padding::SameLower, ..window(None, &[2, 2], &[], none) }),
    ];
    for (x, w, group, window) in cases {
        let conv = |window: &Window| Conv { window: window.clone(), group, activation: None };
        check(conv(&window), &[var(x), var(w), var(&[w[0]])], 1);
        check(conv(&window), &[var(x), var(w)], 1);
    }
    let transposed: [(&[usize], &[usize], usize, Window, &[usize]); 5] = [
        (&[2, 3, 4], &[3, 2, 3], 1, window(None, &[2], &[], (&[1], &[1])), &[1]),
        (&[2, 4, 3, 3], &[4, 2, 2, 2], 1, window(None, &[2, 2], &[], none), &[]),
        (&[1, 4, 3, 4], &[4, 2, 3, 3], 2, window(None, &[2, 1], &[1, 2], (&[1, 1], &[0, 1])), &[]),
        (&[2, 3, 3, 4], &[3, 1, 3, 3], 3, window(None, &[2, 2], &[], (&[1, 1], &[1, 1])), &[1, 1]),
        (
            &[1, 2, 3, 3],
            &[2, 3, 3, 3],
            1,
            Window { padding: Padding::SameUpper, ..window(None, &[2, 2], &[], none) },
            &[],
        ),
    ];
    for (x, w, group, window, output_padding) in transposed {
        let output_padding = output_padding.to_vec();
        let op = ConvTranspose { window, group, output_padding, output_shape: None };
        check(op, &[var(x), var(w), var(&[w[1] * group])], 1);
    }
}

#[test]
fn pools() {
    let cases: [(&[usize], Window); 4] = [
        (&[2, 3, 6], window(Some(&[2]), &[2], &[], (&[], &[]))),
        (&[2, 3, 6, 5], window(Some(&[3, 2]), &[2, 1], &[], (&[1, 0], &[1, 1]))),
        (&[1, 2, 7, 7], window(Some(&[3, 3]), &[2, 2], &[2, 1], (&[1, 1], &[1, 1]))),
        (&[1, 2, 6, 6], Window { ceil_mode: true, ..window(Some(&[3, 3]), &[2, 2], &[], (&[0, 0], &[1, 0])) }),
    ];
    for (x, window) in cases {
        check(MaxPool { window: window.clone(), column_major_indices: false }, &[var(x)], 1);
        for count_include_pad in [false, true] {
            check(AveragePool { window: window.clone(), count_include_pad }, &[var(x)], 1);
        }
    }
    for function in [GlobalPoolFunction::Average, GlobalPoolFunction::Max] {
        check(GlobalPool { function }, &[var(&[2, 3, 4, 5])], 1);
    }
}

#[test]
fn products() {
    let shapes: [(&[usize], &[usize]); 8] = [
        (&[3, 4], &[4, 5]),
        (&[2, 3, 4], &[4, 5]),
        (&[2, 3, 4], &[2, 4, 5]),
        (&[2, 2, 3, 4], &[2, 1, 4, 5]),
        (&[3, 4], &[2, 4, 5]),
        (&[4], &[4, 5]),
        (&[2, 3, 4], &[4]),
        (&[4], &[4]),
    ];
    for (a, b) in shapes {
        check(MatMul { activation: None }, &[var(a), var(b)], 1);
    }
    // More rows than a thread's turn, more columns than a panel.
    check_once(&MatMul { activation: None }.into(), &[var(&[101, 7]), var(&[7, 33])], 1, 1e-5, 0);
    for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
        let (a, b) = (if transpose_a { [4, 3] } else { [3, 4] }, if transpose_b { [5, 4] } else { [4, 5] });
        let gemm = |alpha, beta| Gemm { alpha, beta, transpose_a, transpose_b, activation: None };
        check(gemm(0.5, 2.0), &[var(&a), var(&b), var(&[5])], 1);
        check(gemm(1.0, 1.0), &[var(&a), var(&b)], 1);
    }
}

#[test]
fn norms_and_softmax() {
    let channels = |n: usize| [var(&[n]), var(&[n]), var(&[n]), positive(&[n])];
    let batch_norm = BatchNorm { epsilon: 1e-3, training: None, per_element: false };
    check(batch_norm, &[&[var(&[2, 3, 4, 5])][..], &channels(3)].concat(), 1);
    for (axis, parameter) in [(-1, &[5][..]), (1, &[4, 5][..])] {
        for centred in [true, false] {
            let norm = LayerNorm { axis, epsilon: 1e-3, centred, with_deviation: false };
            let inputs = [var(&[2, 4, 5]), var(parameter), var(parameter)];
            check(norm.clone(), &inputs[..if centred { 3 } else { 2 }], 1);
        }
    }
    for groups in [None, Some(2)] {
        check(InstanceNorm { epsilon: 1e-3, groups }, &[var(&[2, 4, 3, 2]), var(&[4]), var(&[4])], 1);
    }
    for (axis, coerced) in [(-1, false), (1, false), (0, false), (1, true)] {
        for function in [SoftmaxFunction::Softmax, SoftmaxFunction::LogSoftmax] {
            check(Softmax { function, axis, coerced }, &[var(&[3, 4, 5])], 1);
        }
    }
    for p in [LpNormOrder::L1, LpNormOrder::L2] {
        check(LpNorm { axis: 1, p }, &[var(&[2, 3, 4])], 1);
    }
}

#[test]
fn reductions() {
    use ReduceFunction as R;
    for function in [R::Sum, R::Mean, R::Max, R::Min, R::L1, R::L2, R::LogSum, R::LogSumExp, R::SumSquare] {
        for (axes, keep_dims) in [(&[1][..], true), (&[0, 2], false), (&[-1], false), (&[], true)] {
            let op = Reduce { function, keep_dims, noop_with_empty_axes: false };
            check(op, &[positive(&[2, 3, 4]), if axes.is_empty() { In::Omitted } else { ints(axes) }], 1);
        }
    }
}

#[test]
fn movements() {
    check(Reshape { allow_zero: false }, &[var(&[2, 3, 4]), ints(&[0, -1])], 1);
    check(Flatten { axis: 2 }, &[var(&[2, 3, 4])], 1);
    check(Squeeze, &[var(&[2, 1, 4]), ints(&[1])], 1);
    check(Unsqueeze, &[var(&[2, 4]), ints(&[0, -1])], 1);
    check(Transpose { permutation: Some(vec![2, 0, 3, 1]) }, &[var(&[2, 3, 4, 5])], 1);
    check(Transpose { permutation: None }, &[var(&[2, 3])], 1);
    check(Concat { axis: 1 }, &[var(&[2, 3, 2]), var(&[2, 1, 2]), var(&[2, 2, 2])], 1);
    check(Split { axis: 1, parts: 2 }, &[var(&[2, 5, 2]), ints(&[2, 3])], 2);
    check(Slice, &[var(&[4, 6]), ints(&[3, 1]), ints(&[-9, 5]), ints(&[0, 1]), ints(&[-2, 2])], 1);
    check(Expand, &[var(&[3, 1]), ints(&[2, 1, 4])], 1);
    check(Tile, &[var(&[2, 3]), ints(&[2, 1])], 1);
    let indices = In::Known(Host::from_vec([2, 2], vec![0i64, -1, 2, 2]).unwrap());
    for axis in [0, 1, -1] {
        check(Gather { axis }, &[var(&[3, 3, 3]), indices.clone()], 1);
    }
    check(Pad { mode: PadMode::Constant }, &[var(&[2, 3]), ints(&[1, 0, 0, 2]), floats(&[], &[0.5])], 1);
    check(Pad { mode: PadMode::Constant }, &[var(&[2, 3]), ints(&[1, -1, 0, 2])], 1);
    check(Pad { mode: PadMode::Reflect }, &[var(&[2, 3]), ints(&[1, 0, 0, 2])], 1);
    check(DepthSpace { to_space: true, block: 2, depth_first: true }, &[var(&[1, 8, 2, 3])], 1);
    check(Trilu { upper: false }, &[var(&[4, 5])], 1);
    let nearest = Resize {
        mode: ResizeMode::Nearest,
        coordinates: CoordinateMode::Asymmetric,
        nearest: NearestMode::Floor,
        cubic_coefficient: -0.75,
        exclude_outside: false,
        extrapolation: 0.0,
        antialias: false,
        axes: None,
        aspect: AspectPolicy::Stretch,
    };
    let scales = In::Kept(Host::from_vec([4], vec![1f32, 1.0, 2.0, 1.5]).unwrap());
    check(nearest.clone(), &[var(&[1, 2, 3, 4]), In::Omitted, scales.clone()], 1);
    for mode in [ResizeMode::Linear, ResizeMode::Cubic] {
        for coordinates in [CoordinateMode::HalfPixel, CoordinateMode::AlignCorners] {
            let op = Resize { mode, coordinates, ..nearest.clone() };
            check(op.clone(), &[var(&[1, 2, 3, 4]), In::Omitted, scales.clone()], 1);
            let sizes = [var(&[2, 5, 4]), In::Omitted, In::Omitted, ints(&[3, 7])];
            check(Resize { axes: Some(vec![1, -1]), ..op }, &sizes, 1);
        }
    }
}

#[test]
fn recurrences() {
    use CellActivation as A;
    let (steps, batch, features, hidden) = (4, 2, 3, 5);
    let cells = [
        (Cell::Lstm { coupled: false }, vec![A::Sigmoid, A::Tanh, A::Tanh]),
        (Cell::Gru { linear_before_reset: true }, vec![A::Sigmoid, A::Tanh]),
        (Cell::Gru { linear_before_reset: false }, vec![A::Sigmoid, A::Tanh]),
        (Cell::Rnn, vec![A::Tanh]),
    ];
    for (cell, activations) in cells {
        for direction in [Direction::Forward, Direction::Reverse, Direction::Bidirectional] {
            for batch_first in [false, true] {
                let (d, rows) = (direction.count(), cell.gates() * hidden);
                let is_lstm = matches!(cell, Cell::Lstm { .. });
                let op = Recurrent {
                    cell,
                    direction,
                    hidden_size: Some(hidden),
                    activations: activations.repeat(d),
                    clip: None,
                    batch_first,
                };
                let (x, state) = match batch_first {
                    true => ([batch, steps, features], [batch, d, hidden]),
                    false => ([steps, batch, features], [d, batch, hidden]),
                };
                let mut inputs = vec![var(&x), var(&[d, rows, features]), var(&[d, rows, hidden])];
                check_once(&op.clone().into(), &inputs, 2 + usize::from(is_lstm), 1e-5, 1);
                inputs.extend([var(&[d, 2 * rows]), In::Omitted, var(&state)]);
                if is_lstm {
                    inputs.push(var(&state));
                }
                check_once(&op.into(), &inputs, 2 + usize::from(is_lstm), 1e-5, 2);
            }
        }
    }
}

#[test]
fn what_has_no_derivative_is_named() {
    let mut graph = Graph::new("case");
    let x = graph.add_input("x", TensorFact::of_constant_shape(DType::F32, &[2, 2]));
    let node = graph.add_node("det", cutover_graph::ops::Det.into(), vec![Some(x)], vec!["y".to_string()]).unwrap();
    let y = graph.node(node).outputs[0];
    graph.set_outputs(vec![y]);
    let x = Var::zeros((2, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
    let differentiable = Differentiable::new(graph.clone(), &[graph.inputs()[0]]).unwrap();
    let error = differentiable.run(&[x.as_tensor().clone()], &Vec::new(), &[y], &mut Clear).unwrap_err().to_string();
    assert!(error.contains("'det' (Det)") && error.contains("can be quantized"), "{error}");
}
