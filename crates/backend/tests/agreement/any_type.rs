//! Operators of elements of every type: the CPU backend against the reference, without a fallback, for every number of threads.

use super::support::run;
use cutover_backend::{CompileOptions, CpuOptions, cpu, reference};
use cutover_graph::{
    Constant, Graph, Op, Plan, TensorFact,
    ops::{
        ArgReduce, Binary, BinaryFunction, Cast, Clip, Concat, DepthSpace, Gather, GatherElements, GatherNd, Pad,
        PadMode, Predicate, Reduce, ReduceFunction, Scatter, ScatterPlace, ScatterReduction, Slice, Split, Tile,
        Transpose, Trilu, Unary, UnaryFunction, Variadic, VariadicFunction, Where,
    },
};
use cutover_tensor::{DType, Tensor, Value, bf16, f16};

const NUMBERS: [DType; 12] = {
    use DType::*;
    [I8, U8, I16, U16, I32, U32, I64, U64, F16, BF16, F32, F64]
};

/// Small numbers, of both signs where the type has them; `Bool` too.
fn numbers(seed: u64, dtype: DType, shape: &[usize]) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) % 201) as i64 - 100
    };
    let values: Vec<i64> = (0..shape.iter().product()).map(|_| next()).collect();
    macro_rules! of {
        ($f:expr) => {
            Tensor::from_vec(shape, values.into_iter().map($f).collect()).unwrap()
        };
    }
    match dtype {
        DType::I8 => of!(|v| v as i8),
        DType::U8 => of!(|v| v as u8),
        DType::I16 => of!(|v| v as i16 * 300),
        DType::U16 => of!(|v| v as u16),
        DType::I32 => of!(|v| v as i32 * 70_000),
        DType::U32 => of!(|v| v as u32),
        DType::I64 => of!(|v| v),
        DType::U64 => of!(|v| v as u64),
        DType::F16 => of!(|v| f16::from_f64(v as f64 / 8.0)),
        DType::BF16 => of!(|v| bf16::from_f64(v as f64 / 8.0)),
        DType::F32 => of!(|v| v as f32 / 8.0),
        DType::F64 => of!(|v| v as f64 / 8.0),
        DType::Bool => Tensor::from_bools(shape, &values.into_iter().map(|v| v > 0).collect::<Vec<_>>()).unwrap(),
        other => panic!("{other}"),
    }
}

fn integers(values: &[i64]) -> Tensor {
    Tensor::from_vec([values.len()], values.to_vec()).unwrap()
}

/// An operand: given with the request, or with the model.
#[derive(Clone)]
enum Operand {
    Input(Tensor),
    Constant(Tensor),
}

use Operand::{Constant as C, Input as I};

/// Runs one node on both backends: the same bytes, or near ones where `tolerance` is above 0.
fn check(op: impl Into<Op>, operands: &[Operand], outputs: usize, tolerance: f64) {
    let op = op.into();
    let said = format!(
        "{op:?} of {}",
        operands
            .iter()
            .map(|o| match o {
                I(t) | C(t) => format!("{} {}, ", t.dtype(), t.shape()),
            })
            .collect::<String>()
    );
    let mut graph = Graph::new("one");
    let mut given = Vec::new();
    let mut ids = Vec::new();
    for (index, operand) in operands.iter().enumerate() {
        ids.push(Some(match operand {
            Operand::Input(tensor) => {
                given.push(Value::Tensor(tensor.clone()));
                graph.add_input(format!("x{index}"), TensorFact::of_constant_shape(tensor.dtype(), tensor.shape()))
            }
            Operand::Constant(tensor) => graph.add_constant(format!("c{index}"), Constant::new(tensor.clone())),
        }));
    }
    let names = (0..outputs).map(|i| format!("y{i}")).collect();
    let node = graph.add_node("node", op, ids, names).unwrap_or_else(|e| panic!("{said}: {e}"));
    graph.set_outputs(graph.node(node).outputs.clone());
    let plan = Plan::new(graph).unwrap();
    let expected = run(&reference(), &plan, &given, &said);
    for threads in [1, 3] {
        let backend = cpu(CpuOptions { threads, isa: None, ..CpuOptions::default() }).unwrap();
        let placed = backend.compile(&plan, &CompileOptions::default()).unwrap().placement().nodes[0].clone();
        assert_ne!(placed.kernel, "reference", "{said}: {}", placed.reason);
        for (actual, expected) in run(&backend, &plan, &given, &said).iter().zip(&expected) {
            assert_eq!((actual.dtype(), actual.shape()), (expected.dtype(), expected.shape()), "{said}");
            if tolerance == 0.0 {
                assert!(actual.bytes() == expected.bytes(), "{said}: {actual:?}, expected {expected:?}");
                continue;
            }
            let floats = |t: &Tensor| cutover_graph::ops::Wide::floats(t).unwrap();
            for (a, e) in floats(actual).into_iter().zip(floats(expected)) {
                let near = (a - e).abs() <= tolerance * (1.0 + e.abs()) || (a.is_nan() && e.is_nan()) || a == e;
                assert!(near, "{said}: {a}, expected {e}");
            }
        }
    }
}

#[test]
fn every_type_becomes_every_other() {
    for from in NUMBERS.into_iter().chain([DType::Bool]) {
        for to in NUMBERS.into_iter().chain([DType::Bool]) {
            if from != to {
                check(Cast::to(to), &[I(numbers(1, from, &[3, 50]))], 1, 0.0);
            }
        }
    }
}

#[test]
fn functions_of_one_and_two_elements() {
    use BinaryFunction::*;
    for dtype in NUMBERS {
        let float = dtype.is_float();
        let tolerance = if dtype == DType::F32 { 1e-5 } else { 0.0 };
        let (a, b) = (I(numbers(2, dtype, &[4, 1, 70])), I(numbers(3, dtype, &[3, 70])));
        for function in [Add, Sub, Mul] {
            check(Binary { function }, &[a.clone(), b.clone()], 1, tolerance);
        }
        for function in [Equal, Less, Greater, LessOrEqual, GreaterOrEqual] {
            check(Binary { function }, &[a.clone(), b.clone()], 1, 0.0);
        }
        for function in [VariadicFunction::Min, VariadicFunction::Max] {
            check(Variadic { function }, &[a.clone(), b.clone(), a.clone()], 1, tolerance);
        }
        let signed = float || matches!(dtype, DType::I8 | DType::I16 | DType::I32 | DType::I64);
        for function in
            [UnaryFunction::Abs, UnaryFunction::Sign].into_iter().chain(signed.then_some(UnaryFunction::Neg))
        {
            check(Unary { function }, std::slice::from_ref(&a), 1, tolerance);
        }
        if float {
            for function in [UnaryFunction::Exp, UnaryFunction::Cos, UnaryFunction::ThresholdedRelu { alpha: 1.5 }] {
                check(Unary { function }, std::slice::from_ref(&a), 1, tolerance);
            }
            check(Variadic { function: VariadicFunction::Mean }, &[a.clone(), b.clone(), a.clone()], 1, 1e-2);
            check(Predicate::IsNan, std::slice::from_ref(&a), 1, 0.0);
            check(Predicate::IsInf { negative: true, positive: false }, std::slice::from_ref(&a), 1, 0.0);
        } else {
            let nonzero = match &b {
                I(t) | C(t) => {
                    let bytes: Vec<u8> = t
                        .bytes()
                        .chunks(dtype.bits() / 8)
                        .flat_map(|c| {
                            let mut c = c.to_vec();
                            c[0] |= 1;
                            c
                        })
                        .collect();
                    I(Tensor::from_bytes(dtype, t.shape().clone(), &bytes).unwrap())
                }
            };
            for function in [Div, Mod, Fmod, BitwiseAnd, BitwiseOr, BitwiseXor] {
                check(Binary { function }, &[a.clone(), nonzero.clone()], 1, 0.0);
            }
        }
        let (low, high) = (numbers(5, dtype, &[]), numbers(4, dtype, &[]));
        check(Clip, &[a.clone(), C(low), C(high)], 1, tolerance);
    }
    for function in [And, Or, Xor, Equal] {
        let (a, b) = (numbers(6, DType::Bool, &[4, 1, 70]), numbers(7, DType::Bool, &[3, 1]));
        check(Binary { function }, &[I(a), I(b)], 1, 0.0);
    }
    check(Predicate::Not, &[I(numbers(8, DType::Bool, &[9, 7]))], 1, 0.0);
}

#[test]
fn elements_of_every_size_are_moved() {
    for dtype in NUMBERS.into_iter().chain([DType::Bool]) {
        let x = || I(numbers(9, dtype, &[4, 6, 10]));
        check(Transpose { permutation: Some(vec![2, 0, 1]) }, &[x()], 1, 0.0);
        check(Concat { axis: 1 }, &[x(), x()], 1, 0.0);
        check(Split { axis: 2, parts: 2 }, &[x()], 2, 0.0);
        let slice = |values: [i64; 2]| C(integers(&values));
        check(Slice, &[x(), slice([1, 8]), slice([100, -100]), slice([1, 2]), slice([2, -3])], 1, 0.0);
        check(Tile, &[x(), C(integers(&[2, 1, 3]))], 1, 0.0);
        for mode in [PadMode::Constant, PadMode::Reflect, PadMode::Edge, PadMode::Wrap] {
            let constant = (mode == PadMode::Constant).then(|| C(numbers(10, dtype, &[])));
            let operands: Vec<Operand> = [x(), C(integers(&[1, 0, 2, 3, -1, 5]))].into_iter().chain(constant).collect();
            check(Pad { mode }, &operands, 1, 0.0);
        }
        check(Trilu { upper: true }, &[x()], 1, 0.0);
        check(Where, &[I(numbers(11, DType::Bool, &[6, 1])), x(), I(numbers(12, dtype, &[1, 10]))], 1, 0.0);
        let indices = |shape: &[usize], extent: usize| {
            let count = shape.iter().product::<usize>() as i64;
            let values = (0..count).map(|i| i * 7 % (2 * extent as i64) - extent as i64).collect();
            Tensor::from_vec(shape, values).unwrap()
        };
        check(Gather { axis: 1 }, &[x(), I(indices(&[2, 3], 6))], 1, 0.0);
        for place in [I, C] {
            check(GatherElements { axis: 1 }, &[x(), place(indices(&[3, 5, 10], 6))], 1, 0.0);
            check(GatherNd { batch_dims: 1 }, &[x(), place(indices(&[4, 3, 1], 6))], 1, 0.0);
        }
        use ScatterReduction::*;
        for reduction in [Replace, Add, Multiply, Maximum, Minimum] {
            let elements = Scatter { place: ScatterPlace::Elements { axis: 2 }, reduction };
            check(
                elements,
                &[x(), I(indices(&[2, 6, 25], 10)), I(numbers(13, dtype, &[2, 6, 25]))],
                1,
                wide_tolerance(dtype, reduction),
            );
            let slices = Scatter { place: ScatterPlace::Slices, reduction };
            check(
                slices,
                &[x(), I(indices(&[5, 1], 4)), I(numbers(14, dtype, &[5, 6, 10]))],
                1,
                wide_tolerance(dtype, reduction),
            );
        }
    }
    let x = I(numbers(9, DType::U8, &[1, 8, 3, 2]));
    check(DepthSpace { to_space: true, block: 2, depth_first: true }, &[x], 1, 0.0);
}

/// Where sums are rounded at every term, not once.
fn wide_tolerance(dtype: DType, reduction: ScatterReduction) -> f64 {
    match (dtype, reduction) {
        (DType::F16 | DType::BF16, ScatterReduction::Add | ScatterReduction::Multiply) => 5e-2,
        (DType::F32, ScatterReduction::Add | ScatterReduction::Multiply) => 1e-5,
        _ => 0.0,
    }
}

#[test]
fn lines_of_every_type_are_reduced() {
    for dtype in NUMBERS {
        let x = || I(numbers(15, dtype, &[5, 7, 6]));
        let tolerance = if dtype == DType::F32 { 1e-5 } else { 0.0 };
        use ReduceFunction::*;
        // Products of f32 overflow on the way, where those of their values do not.
        let product = (dtype != DType::F32).then_some(Prod);
        for function in [Sum, Mean, Max, Min, L1, SumSquare, L2].into_iter().chain(product) {
            for axes in [&[0i64, 2][..], &[1], &[]] {
                let reduce = Reduce { function, keep_dims: axes.len() == 1, noop_with_empty_axes: false };
                check(reduce, &[x(), C(integers(axes))], 1, tolerance);
            }
        }
        for largest in [true, false] {
            for (axis, select_last) in [(0, false), (1, true), (-1, false)] {
                check(ArgReduce { largest, axis, keep_dims: true, select_last }, &[x()], 1, 0.0);
            }
        }
    }
}
