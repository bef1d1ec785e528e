//! Elementwise functions, casts and reductions of elements of any type: the operators' own functions on widened elements.

use super::select::broadcast_view;
use crate::{
    RunError,
    cpu::{
        frame::{Buffer, Frame, Worker},
        lower::Lowered,
        plan::{Builder, NoPlan, Strided},
    },
};
use cutover_graph::{
    Node, Op, OpError, ValueId,
    ops::{
        ArgReduce, BinaryFunction, Predicate, Reduce, ReduceFunction, UnaryFunction, VariadicFunction,
        bounds_of_integers, normalize_axis,
    },
};
use cutover_kernels::cpu::{
    IsaLevel, elementwise,
    typed::{self, ElementType, Line, Wide},
};
use cutover_tensor::{DType, Tensor};

/// The kernels' name of an element type; `None` for strings, complex numbers, and what is smaller than a byte or not a number of it.
pub(super) fn element_type(dtype: DType) -> Option<ElementType> {
    Some(match dtype {
        DType::Bool => ElementType::Bool,
        DType::I8 => ElementType::I8,
        DType::U8 => ElementType::U8,
        DType::I16 => ElementType::I16,
        DType::U16 => ElementType::U16,
        DType::I32 => ElementType::I32,
        DType::U32 => ElementType::U32,
        DType::I64 => ElementType::I64,
        DType::U64 => ElementType::U64,
        DType::F16 => ElementType::F16,
        DType::BF16 => ElementType::Bf16,
        DType::F32 => ElementType::F32,
        DType::F64 => ElementType::F64,
        _ => return None,
    })
}

/// What a type is widened to.
#[derive(Clone, Copy, PartialEq)]
enum Class {
    Float,
    Integer,
    /// Of which only the value, not the low bits, may be needed.
    Unsigned,
}

fn class(ty: ElementType) -> Class {
    match ty {
        ElementType::F16 | ElementType::Bf16 | ElementType::F32 | ElementType::F64 => Class::Float,
        ElementType::U64 => Class::Unsigned,
        _ => Class::Integer,
    }
}

#[derive(Clone, Debug)]
enum Function {
    Binary(BinaryFunction),
    Unary(UnaryFunction),
    Predicate(Predicate),
    /// Of two values, or `Mean`: the sum by its number of terms.
    Fold(VariadicFunction),
    Divide(f64),
    Cast,
    ClipFloats(f64, f64),
    ClipIntegers(i128, i128),
    /// `(x − zero_point) · scale` of two or three operands.
    Dequantize,
    /// `x / scale + zero_point`, rounded before the sum, saturated at bounds; in double precision or not.
    Quantize {
        least: f64,
        most: f64,
        in_double: bool,
    },
}

pub(in crate::cpu) struct TypedStep {
    function: Function,
    shape: Vec<usize>,
    operands: Vec<(Strided, ElementType)>,
    output: Buffer,
    ty: ElementType,
    node: String,
    op: String,
}

pub(in crate::cpu) fn lower(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let output = node.outputs[0];
    let shape = builder.shape(output).to_vec();
    let Some(ty) = element_type(builder.fact(output).dtype) else { return Ok(false) };
    let mut operands = Vec::with_capacity(node.inputs.len());
    let counted = if matches!(node.op, Op::CastLike(_) | Op::Clip(_)) { 1 } else { node.inputs.len() };
    for input in &node.inputs[..counted] {
        let Some(id) = *input else { return Ok(false) };
        let Some(ty) = element_type(builder.fact(id).dtype) else { return Ok(false) };
        if builder.shape(id).rank() > shape.len() || shape.len() > elementwise::MAX_RANK {
            return Ok(false);
        }
        operands.push((broadcast_view(builder, id, &shape)?, ty));
    }
    let Some(&(_, of)) = operands.first() else { return Ok(false) };
    let float = class(of) == Class::Float;
    let function = match &node.op {
        Op::Cast(_) | Op::CastLike(_) => Function::Cast,
        Op::Predicate(op) if float || *op == Predicate::Not => Function::Predicate(op.clone()),
        Op::Binary(op) => Function::Binary(op.function),
        Op::Unary(op) if of != ElementType::Bool => Function::Unary(op.function),
        Op::Clip(_) => match bounds(builder, node, float) {
            Some(function) => function,
            None => return Ok(false),
        },
        Op::Variadic(op) if of != ElementType::Bool && (float || op.function != VariadicFunction::Mean) => {
            return lower_variadic(builder, node, op.function, shape, operands, ty);
        }
        _ => return Ok(false),
    };
    push(builder, node, function, shape, operands, output, ty)?;
    Ok(true)
}

fn push(
    builder: &mut Builder<'_>,
    node: &Node,
    function: Function,
    shape: Vec<usize>,
    operands: Vec<(Strided, ElementType)>,
    output: ValueId,
    ty: ElementType,
) -> Result<(), NoPlan> {
    let to = builder.new_plain(output)?;
    push_to(builder, node, function, shape, operands, to, ty);
    Ok(())
}

fn push_to(
    builder: &mut Builder<'_>,
    node: &Node,
    function: Function,
    shape: Vec<usize>,
    operands: Vec<(Strided, ElementType)>,
    to: Buffer,
    ty: ElementType,
) {
    let reads: Vec<Buffer> = operands.iter().map(|(view, _)| view.buffer).collect();
    let (node, op) = (node.name.clone(), node.op.name());
    builder.push(Lowered::Typed(TypedStep { function, shape, operands, output: to, ty, node, op }), &reads, &[to]);
}

/// `QuantizeLinear` and `DequantizeLinear` of any types, with scales for a tensor, an axis, or blocks of one.
pub(super) fn lower_scaled(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let granularity = match &node.op {
        Op::QuantizeLinear(op) => op.granularity,
        Op::DequantizeLinear(op) => op.granularity,
        _ => return Ok(false),
    };
    let output = node.outputs[0];
    let (dtype, Some(ty)) = (builder.fact(output).dtype, element_type(builder.fact(output).dtype)) else {
        return Ok(false);
    };
    let Some(&Some(x)) = node.inputs.first() else { return Ok(false) };
    let own = builder.shape(x).to_vec();
    if own.contains(&0) || own.len() >= elementwise::MAX_RANK {
        return Ok(false);
    }
    // An axis in blocks is two axes.
    let mut shape = own.clone();
    let axis = normalize_axis(granularity.axis, own.len()).ok();
    let block = granularity.block_size;
    match axis.and_then(|axis| Some((axis, own[axis].checked_div(block)?))) {
        Some((axis, blocks)) if blocks * block == own[axis] => drop(shape.splice(axis..=axis, [blocks, block])),
        None if block == 0 => {}
        _ => return Ok(false),
    }
    let mut operands = Vec::with_capacity(3);
    for (index, input) in node.inputs.iter().enumerate() {
        let Some(id) = *input else { continue };
        let Some(ty) = element_type(builder.fact(id).dtype) else { return Ok(false) };
        let buffer = builder.plain(id)?;
        let count = builder.shape(id).element_count();
        let strides = match (index, axis) {
            (0, _) => cutover_tensor::Shape::new(&shape).strides().to_vec(),
            (_, _) if count == 1 => vec![0; shape.len()],
            (_, Some(axis)) if block == 0 && count == own[axis] => {
                (0..shape.len()).map(|a| usize::from(a == axis)).collect()
            }
            (_, Some(axis)) if block > 0 => {
                let mut strides = builder.shape(id).strides().to_vec();
                if strides.len() != own.len() {
                    return Ok(false);
                }
                strides.insert(axis + 1, 0);
                strides
            }
            _ => return Ok(false),
        };
        operands.push((Strided { buffer, offset: 0, strides }, ty));
    }
    let function = match &node.op {
        Op::DequantizeLinear(_) => Function::Dequantize,
        _ if matches!(class(ty), Class::Float | Class::Unsigned) || dtype == DType::Bool => return Ok(false),
        _ => {
            let (least, most) = bounds_of_integers(dtype);
            let own = if builder.fact(x).dtype == DType::F64 { DType::F64 } else { DType::F32 };
            let precision = match &node.op {
                Op::QuantizeLinear(op) => op.precision.unwrap_or(own),
                _ => own,
            };
            if !matches!(precision, DType::F32 | DType::F64) {
                return Ok(false);
            }
            let in_double = precision == DType::F64;
            Function::Quantize { least: least as f64, most: most as f64, in_double }
        }
    };
    if !(2..=3).contains(&operands.len()) {
        return Ok(false);
    }
    push(builder, node, function, shape, operands, output, ty)?;
    Ok(true)
}

/// Two by two, from the first on.
fn lower_variadic(
    builder: &mut Builder<'_>,
    node: &Node,
    function: VariadicFunction,
    shape: Vec<usize>,
    operands: Vec<(Strided, ElementType)>,
    ty: ElementType,
) -> Result<bool, NoPlan> {
    let count = operands.len();
    let pairwise = if function == VariadicFunction::Mean { VariadicFunction::Sum } else { function };
    let strides = cutover_tensor::Shape::new(&shape).strides().to_vec();
    let bytes = shape.iter().product::<usize>() * ty.size();
    let mut operands = operands.into_iter();
    let Some(mut left) = operands.next() else { return Ok(false) };
    for (index, right) in operands.enumerate() {
        let last = index + 2 == count && function != VariadicFunction::Mean;
        let to = if last { builder.new_plain(node.outputs[0])? } else { builder.new_bytes(bytes)? };
        push_to(builder, node, Function::Fold(pairwise), shape.clone(), vec![left, right], to, ty);
        left = (Strided { buffer: to, offset: 0, strides: strides.clone() }, ty);
        if last {
            return Ok(true);
        }
    }
    let by = if function == VariadicFunction::Mean { count as f64 } else { 1.0 };
    let function = if by == 1.0 { Function::Cast } else { Function::Divide(by) };
    push(builder, node, function, shape, vec![left], node.outputs[0], ty)?;
    Ok(true)
}

/// The clip between bounds that are known.
fn bounds(builder: &Builder<'_>, node: &Node, float: bool) -> Option<Function> {
    let known = |index: usize| match node.inputs.get(index).copied().flatten() {
        None => Some(None),
        Some(id) => builder.known_tensor(id).filter(|t| t.element_count() == 1).map(Some),
    };
    let (low, high) = (known(1)?, known(2)?);
    if float {
        let of = |t: Option<Tensor>, open: f64| match t {
            None => Some(open),
            Some(t) => cutover_graph::ops::Wide::floats(&t).ok()?.first().copied(),
        };
        return Some(Function::ClipFloats(of(low, f64::NEG_INFINITY)?, of(high, f64::INFINITY)?));
    }
    let of = |t: Option<Tensor>, open: i128| match t {
        None => Some(open),
        Some(t) => match cutover_graph::ops::Wide::of(&t).ok()? {
            cutover_graph::ops::Wide::Int(v) => v.first().copied(),
            _ => None,
        },
    };
    Some(Function::ClipIntegers(of(low, i128::from(i64::MIN))?, of(high, i128::from(u64::MAX))?))
}

/// One step's run: what every function is applied with.
struct Run<'a> {
    step: &'a TypedStep,
    frame: &'a Frame<'a>,
    range: std::ops::Range<usize>,
    level: IsaLevel,
}

impl<'a> Run<'a> {
    fn operand(&self, index: usize) -> typed::Operand<'a> {
        let (view, ty) = &self.step.operands[index];
        let bytes = &self.frame.bytes(view.buffer)[view.offset * ty.size()..];
        typed::Operand { ty: *ty, bytes, strides: &view.strides }
    }

    fn one<A: Wide, R: Wide>(&self, f: impl Fn(A) -> Result<R, OpError>) -> Result<(), OpError> {
        let output = self.frame.words_output(self.step.output);
        let (shape, range) = (&self.step.shape, self.range.clone());
        typed::map(self.level, shape, [self.operand(0)], range, self.step.ty, output, |[a]| f(a))
    }

    fn two<A: Wide, R: Wide>(&self, f: impl Fn(A, A) -> Result<R, OpError>) -> Result<(), OpError> {
        let output = self.frame.words_output(self.step.output);
        let (shape, range) = (&self.step.shape, self.range.clone());
        let operands = [self.operand(0), self.operand(1)];
        typed::map(self.level, shape, operands, range, self.step.ty, output, |[a, b]| f(a, b))
    }

    /// Of two operands or three, 0 in the third's place.
    fn scaled(&self, f: impl Fn(f64, f64, f64) -> f64) -> Result<(), OpError> {
        let output = self.frame.words_output(self.step.output);
        let (shape, range) = (&self.step.shape, self.range.clone());
        if self.step.operands.len() == 2 {
            return self.two(|x: f64, scale: f64| Ok(f(x, scale, 0.0)));
        }
        let operands = [self.operand(0), self.operand(1), self.operand(2)];
        typed::map(self.level, shape, operands, range, self.step.ty, output, |[x, scale, zero]: [f64; 3]| {
            Ok(f(x, scale, zero))
        })
    }

    fn binary(&self, f: BinaryFunction) -> Result<(), OpError> {
        use BinaryFunction as F;
        let types = [self.step.operands[0].1, self.step.operands[1].1];
        let classes = types.map(class);
        if classes.contains(&Class::Float) {
            return match f {
                F::Add => self.two(|a: f64, b| Ok(a + b)),
                F::Sub => self.two(|a: f64, b| Ok(a - b)),
                F::Mul => self.two(|a: f64, b| Ok(a * b)),
                F::Div => self.two(|a: f64, b| Ok(a / b)),
                f if f.compares() => self.two(|a: f64, b| Ok(i64::from(f.compare(&a, &b)))),
                f => self.two(|a: f64, b| {
                    f.of_floats(a, b).ok_or_else(|| OpError::input(format!("{} is not defined on floats", f.name())))
                }),
            };
        }
        if types.contains(&ElementType::Bool) {
            return match f {
                F::And => self.two(|a: i64, b| Ok(a & b)),
                F::Or => self.two(|a: i64, b| Ok(a | b)),
                F::Xor => self.two(|a: i64, b| Ok(a ^ b)),
                F::Equal => self.two(|a: i64, b| Ok(i64::from(a == b))),
                f => Err(OpError::input(format!("{} is not defined on bool", f.name()))),
            };
        }
        // Of sums and products the low bits are those of the low bits.
        match f {
            F::Add => return self.two(|a: i64, b| Ok(a.wrapping_add(b))),
            F::Sub => return self.two(|a: i64, b| Ok(a.wrapping_sub(b))),
            F::Mul => return self.two(|a: i64, b| Ok(a.wrapping_mul(b))),
            _ => {}
        }
        match (f.compares(), classes.contains(&Class::Unsigned)) {
            (true, false) => self.two(|a: i64, b| Ok(i64::from(f.compare(&a, &b)))),
            (true, true) => self.two(|a: i128, b| Ok(i64::from(f.compare(&a, &b)))),
            (false, _) => self.two(|a: i128, b| f.of_ints(a, b)),
        }
    }

    fn fold(&self, f: VariadicFunction) -> Result<(), OpError> {
        use VariadicFunction as F;
        match (f, class(self.step.ty)) {
            (F::Sum | F::Mean, Class::Float) => self.two(|a: f64, b| Ok(a + b)),
            (F::Min, Class::Float) => self.two(|a: f64, b| Ok(if b.is_nan() || b < a { b } else { a })),
            (F::Max, Class::Float) => self.two(|a: f64, b| Ok(if b.is_nan() || b > a { b } else { a })),
            (F::Sum | F::Mean, _) => self.two(|a: i64, b| Ok(a.wrapping_add(b))),
            (F::Min, Class::Integer) => self.two(|a: i64, b| Ok(a.min(b))),
            (F::Max, Class::Integer) => self.two(|a: i64, b| Ok(a.max(b))),
            (F::Min, Class::Unsigned) => self.two(|a: i128, b| Ok(a.min(b))),
            (F::Max, Class::Unsigned) => self.two(|a: i128, b| Ok(a.max(b))),
        }
    }

    fn cast(&self) -> Result<(), OpError> {
        match (class(self.step.operands[0].1), class(self.step.ty)) {
            // A float that is not 0 may be 0 as an integer, and is true.
            (Class::Float, _) | (_, Class::Float) => self.one(|x: f64| Ok(x)),
            _ => self.one(|x: i64| Ok(x)),
        }
    }
}

impl TypedStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) -> Result<(), RunError> {
        let run = Run { step: self, frame, range: worker.share(self.shape.iter().product()), level };
        let of = class(self.operands[0].1);
        let result = match &self.function {
            Function::Binary(f) => run.binary(*f),
            Function::Fold(f) => run.fold(*f),
            Function::Cast => run.cast(),
            Function::Divide(by) => run.one(|x: f64| Ok(x / by)),
            Function::Unary(UnaryFunction::BitwiseNot) if of == Class::Float => {
                Err(OpError::input("BitwiseNot is not defined on floats"))
            }
            Function::Unary(f) if of == Class::Float => run.one(|x: f64| Ok(f.of_float(x))),
            Function::Unary(f) => run.one(|x: i128| f.of_int(x)),
            Function::Predicate(Predicate::Not) => run.one(|x: i64| Ok(i64::from(x == 0))),
            Function::Predicate(Predicate::IsNan) => run.one(|x: f64| Ok(i64::from(x.is_nan()))),
            Function::Predicate(Predicate::IsInf { negative, positive }) => {
                run.one(|x: f64| Ok(i64::from(x.is_infinite() && if x > 0.0 { *positive } else { *negative })))
            }
            // Comparisons let NaN through.
            Function::ClipFloats(low, high) => run.one(|x: f64| {
                let x = if x < *low { *low } else { x };
                Ok(if x > *high { *high } else { x })
            }),
            Function::Dequantize => run.scaled(|x, scale, zero| (x - zero) * scale),
            &Function::Quantize { least, most, in_double } => run.scaled(|x, scale, zero| {
                let quotient = if in_double { x / scale } else { f64::from(x as f32 / scale as f32) };
                let rounded = quotient.round_ties_even();
                let rounded = if rounded.is_nan() { 0.0 } else { rounded };
                (rounded + zero).clamp(least, most)
            }),
            Function::ClipIntegers(low, high) => run.one(|x: i128| Ok(x.max(*low).min(*high))),
        };
        result.map_err(|source| RunError::Op { node: self.node.clone(), op: self.op.clone(), source })
    }
}

/// What becomes of a line.
enum Fold {
    Reduce(ReduceFunction, DType),
    Choose { largest: bool, last: bool },
}

/// One result for every line of an axis.
pub(in crate::cpu) struct LinesStep {
    fold: Fold,
    axis: usize,
    inner: usize,
    lines: usize,
    input: Buffer,
    ty: ElementType,
    output: Buffer,
    result: ElementType,
}

pub(in crate::cpu) fn lower_reduce(builder: &mut Builder<'_>, node: &Node, op: &Reduce) -> Result<bool, NoPlan> {
    let (Some(&Some(x)), output) = (node.inputs.first(), node.outputs[0]) else { return Ok(false) };
    let axes = match node.inputs.get(1).copied().flatten() {
        None => Vec::new(),
        Some(id) => match builder.integers(id) {
            Some(axes) => axes,
            None => return Ok(false),
        },
    };
    let (shape, dtype) = (builder.shape(x), builder.fact(x).dtype);
    let (Ok(reduced), Some(ty)) = (op.reduced(&axes, shape.rank()), element_type(dtype)) else { return Ok(false) };
    let choice = matches!(op.function, ReduceFunction::Max | ReduceFunction::Min);
    if (ty == ElementType::Bool && !choice) || shape.rank() > elementwise::MAX_RANK {
        return Ok(false);
    }
    // The kept axes first: each line is contiguous then.
    let (kept, gone): (Vec<usize>, Vec<usize>) = (0..shape.rank()).partition(|&a| !reduced[a]);
    let axis: usize = gone.iter().map(|&a| shape[a]).product();
    let lines = builder.shape(output).element_count();
    let order = [&kept[..], &gone[..]].concat();
    let input = if shape.element_count() == 0 || order.is_sorted() {
        builder.plain(x)?
    } else {
        let view = super::movement::view(builder, x)?;
        let to = builder.new_bytes(shape.element_count() * ty.size())?;
        let from = Strided { strides: order.iter().map(|&a| view.strides[a]).collect(), ..view };
        let turned = order.iter().map(|&a| shape[a]).collect();
        let (buffer, size) = (from.buffer, ty.size());
        let copy = super::movement::CopyStrided { from, shape: turned, size, to };
        builder.push(Lowered::CopyStrided(copy), &[buffer], &[to]);
        to
    };
    // The line, widened.
    builder.need_workspace(axis * size_of::<i128>() / size_of::<f32>());
    let to = builder.new_plain(output)?;
    let fold = Fold::Reduce(op.function, dtype);
    let step = LinesStep { fold, axis, inner: 1, lines, input, ty, output: to, result: ty };
    builder.push(Lowered::Lines(step), &[input], &[to]);
    Ok(true)
}

pub(in crate::cpu) fn lower_arg_reduce(builder: &mut Builder<'_>, node: &Node, op: &ArgReduce) -> Result<bool, NoPlan> {
    let (&[Some(x)], output) = (&node.inputs[..], node.outputs[0]) else { return Ok(false) };
    let shape = builder.shape(x);
    let (Ok(axis), Some(ty)) = (normalize_axis(op.axis, shape.rank()), element_type(builder.fact(x).dtype)) else {
        return Ok(false);
    };
    if shape.element_count() == 0 || ty == ElementType::Bool {
        return Ok(false);
    }
    let (input, lines) = (builder.plain(x)?, builder.shape(output).element_count());
    let to = builder.new_plain(output)?;
    let step = LinesStep {
        fold: Fold::Choose { largest: op.largest, last: op.select_last },
        axis: shape[axis],
        inner: shape[axis + 1..].iter().product(),
        lines,
        input,
        ty,
        output: to,
        result: ElementType::I64,
    };
    builder.push(Lowered::Lines(step), &[input], &[to]);
    Ok(true)
}

impl LinesStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>, level: IsaLevel) -> Result<(), RunError> {
        let lines = worker.share(self.lines);
        match (&self.fold, class(self.ty)) {
            (Fold::Reduce(f, _), Class::Float) => {
                let wide = widened::<f64>(worker, self.axis);
                self.apply(frame, level, lines, |line: Line<'_, f64>| {
                    let mut wide = wide.borrow_mut();
                    line.for_each(|i, x| wide[i] = x);
                    f.of_floats(&wide)
                });
            }
            (Fold::Reduce(f, dtype), _) => {
                let wide = widened::<i128>(worker, self.axis);
                let bounds = if *dtype == DType::Bool { (0, 1) } else { bounds_of_integers(*dtype) };
                self.apply(frame, level, lines, |line: Line<'_, i128>| {
                    let mut wide = wide.borrow_mut();
                    line.for_each(|i, x| wide[i] = x);
                    f.of_integers(&wide, bounds)
                });
            }
            // NaN loses against every number.
            (&Fold::Choose { largest, last }, Class::Float) => self.apply(frame, level, lines, |line| {
                choose(line, last, |a: f64, b: f64| if largest { a > b } else { a < b } || (b.is_nan() && !a.is_nan()))
            }),
            (&Fold::Choose { largest, last }, _) => self.apply(frame, level, lines, |line| {
                choose(line, last, |a: i128, b: i128| if largest { a > b } else { a < b })
            }),
        }
        Ok(())
    }

    fn apply<A: Wide, R: Wide>(
        &self,
        frame: &Frame<'_>,
        level: IsaLevel,
        lines: std::ops::Range<usize>,
        f: impl Fn(Line<'_, A>) -> R,
    ) {
        let (input, output) = (frame.bytes(self.input), frame.words_output(self.output));
        let shape = (self.axis, self.inner);
        let result: Result<(), std::convert::Infallible> =
            typed::fold_lines(level, shape, (self.ty, input), lines, self.result, output, |line| Ok(f(line)));
        let Ok(()) = result;
    }
}

/// The thread's workspace as room for a line.
fn widened<'a, T: Wide>(worker: &'a mut Worker<'_>, count: usize) -> std::cell::RefCell<&'a mut [T]> {
    let bytes = size_of_val(worker.workspace);
    assert!(count * size_of::<T>() <= bytes && worker.workspace.as_ptr().cast::<T>().is_aligned());
    // SAFETY: as long and as aligned as just checked, for plain numbers; borrowed mutably for as long as the result lives.
    let line = unsafe { std::slice::from_raw_parts_mut(worker.workspace.as_mut_ptr().cast::<T>(), count) };
    std::cell::RefCell::new(line)
}

fn choose<A: Wide>(line: Line<'_, A>, last: bool, beats: impl Fn(A, A) -> bool) -> i64 {
    let mut best: Option<(usize, A)> = None;
    line.for_each(|i, x| {
        let wins = best.is_none_or(|(_, old)| beats(x, old) || (last && !beats(old, x)));
        best = if wins { Some((i, x)) } else { best };
    });
    best.map_or(0, |(i, _)| i as i64)
}
