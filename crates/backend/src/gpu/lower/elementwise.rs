//! What computes each element of its result from one element of every operand: functions, arithmetic, comparisons, choices and casts.

use super::super::{
    code::{self, float, integer, wrapped},
    plan::{Builder, Unable},
};
use cutover_graph::{
    Node, ValueId,
    ops::{Activation, Binary, BinaryFunction, Predicate, Unary, UnaryFunction, Variadic, VariadicFunction},
};
use cutover_tensor::{DType, Shape};

pub(super) fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

fn is_signed(dtype: DType) -> bool {
    matches!(dtype, DType::I8 | DType::I16 | DType::I32 | DType::I64)
}

fn is_whole(dtype: DType) -> bool {
    is_signed(dtype) || matches!(dtype, DType::U8 | DType::U16 | DType::U32 | DType::U64)
}

/// `f(x)` of a float, `x` being the name of a variable.
pub(super) fn unary_text(function: UnaryFunction, x: &str) -> Option<String> {
    use UnaryFunction::*;
    Some(match function {
        Abs => format!("abs({x})"),
        Neg => format!("(-{x})"),
        Sign => format!("select(sign({x}), {x}, is_nan({x}))"),
        Floor => format!("floor({x})"),
        Ceil => format!("ceil({x})"),
        Round => format!("round({x})"),
        Sqrt => format!("select(sqrt({x}), not_a_number(), {x} < 0.0)"),
        Reciprocal => format!("(1.0 / {x})"),
        Exp => format!("exp_of({x})"),
        Log => format!("log_of({x})"),
        Sin => format!("sin_of({x})"),
        Cos => format!("cos_of({x})"),
        Tan => format!("(sin_of({x}) / cos_of({x}))"),
        Asin => format!("asin_of({x})"),
        Acos => format!("acos_of({x})"),
        Atan => format!("atan_of({x})"),
        Sinh => format!("sinh_of({x})"),
        Cosh => format!("cosh_of({x})"),
        Tanh => format!("tanh_of({x})"),
        Asinh => format!("asinh_of({x})"),
        Acosh => format!("acosh_of({x})"),
        Atanh => format!("atanh_of({x})"),
        Erf => format!("erf_of({x})"),
        Relu => format!("select({x}, 0.0, {x} < 0.0)"),
        Sigmoid => format!("sigmoid_of({x})"),
        Softplus => format!("softplus_of({x})"),
        Softsign => format!("({x} / (1.0 + abs({x})))"),
        HardSwish => format!("({x} * clamp({x} / 6.0 + 0.5, 0.0, 1.0))"),
        Mish => format!("({x} * tanh_of(softplus_of({x})))"),
        LeakyRelu { alpha } => format!("select({x}, {x} * {}, {x} < 0.0)", float(alpha)),
        Elu { alpha } => format!("select({x}, {} * expm1_of({x}), {x} < 0.0)", float(alpha)),
        Celu { alpha } => {
            format!("(max({x}, 0.0) + select({a} * expm1_of({x} / {a}), 0.0, {x} > 0.0))", a = float(alpha))
        }
        Selu { alpha, gamma } => {
            format!("({} * select({} * expm1_of({x}), {x}, {x} > 0.0))", float(gamma), float(alpha))
        }
        HardSigmoid { alpha, beta } => format!("clamp({x} * {} + {}, 0.0, 1.0)", float(alpha), float(beta)),
        ThresholdedRelu { alpha } => format!("select(0.0, {x}, {x} > {})", float(alpha)),
        Swish { alpha } => format!("({x} / (1.0 + exp_of(-{} * {x})))", float(alpha)),
        Gelu { tanh: false } => format!("(0.5 * {x} * (1.0 + erf_of({x} * 0.70710678)))"),
        Gelu { tanh: true } => {
            format!("(0.5 * {x} * (1.0 + tanh_of(0.79788456 * ({x} + 0.044715 * {x} * {x} * {x}))))")
        }
        Shrink { lambda, bias } => {
            let (lambda, bias) = (float(lambda), float(bias));
            format!("select(select(0.0, {x} - {bias}, {x} > {lambda}), {x} + {bias}, {x} < -{lambda})")
        }
        BitwiseNot => return None,
    })
}

/// The function's value of the variable `x`.
pub(super) fn activation_text(activation: Option<Activation>, x: &str) -> String {
    let function = match activation {
        None => return x.to_string(),
        Some(Activation::Clip { low, high }) => {
            let (low, high) = (float(low), float(high));
            return format!("select(select({x}, {low}, {x} < {low}), {high}, {x} > {high})");
        }
        Some(Activation::Relu) => UnaryFunction::Relu,
        Some(Activation::LeakyRelu { alpha }) => UnaryFunction::LeakyRelu { alpha },
        Some(Activation::Sigmoid) => UnaryFunction::Sigmoid,
        Some(Activation::Tanh) => UnaryFunction::Tanh,
        Some(Activation::Silu) => UnaryFunction::Swish { alpha: 1.0 },
        Some(Activation::HardSigmoid { alpha, beta }) => UnaryFunction::HardSigmoid { alpha, beta },
        Some(Activation::HardSwish) => UnaryFunction::HardSwish,
        Some(Activation::Gelu) => UnaryFunction::Gelu { tanh: false },
        Some(Activation::GeluTanh) => UnaryFunction::Gelu { tanh: true },
    };
    unary_text(function, x).unwrap_or_else(|| x.to_string())
}

pub(super) fn lower_unary(b: &mut Builder<'_>, node: &Node, op: &Unary) -> Result<(), Unable> {
    let x = super::input(node, 0)?;
    let dtype = b.dtype(x);
    let text = match op.function {
        function if is_float(dtype) => unary_text(function, "x"),
        UnaryFunction::Abs if is_signed(dtype) => Some("abs(x)".to_string()),
        UnaryFunction::Neg if is_signed(dtype) => Some("(-x)".to_string()),
        UnaryFunction::Sign if is_signed(dtype) => Some("sign(x)".to_string()),
        UnaryFunction::Relu if is_signed(dtype) => Some(format!("max(x, {})", integer(dtype, 0))),
        UnaryFunction::Abs | UnaryFunction::Relu if is_whole(dtype) => Some("x".to_string()),
        UnaryFunction::BitwiseNot if is_whole(dtype) => Some("(~x)".to_string()),
        _ => None,
    };
    let text = text.ok_or_else(|| format!("no kernel for {dtype}"))?;
    let operands = b.operands(&[x])?;
    b.define(node.outputs[0], format!("let x = $0(i);\nreturn {};", wrapped(dtype, &text)), operands)
}

/// Statements that give `names` the elements of `ids`, broadcast to `to`.
fn broadcast_operands(b: &Builder<'_>, ids: &[ValueId], to: &Shape, names: &[&str]) -> String {
    let mut text = String::new();
    for (at, (&id, name)) in ids.iter().zip(names).enumerate() {
        let (statements, index) = code::broadcast(&b.shape(id), to);
        // Each operand's coordinates are its own.
        match statements.is_empty() {
            true => text += &format!("let {name} = ${at}({index});\n"),
            false => {
                let of = code::value_type(b.dtype(id)).unwrap_or("u32");
                text += &format!("var {name}: {of};\n{{\n{statements}{name} = ${at}({index});\n}}\n");
            }
        }
    }
    text
}

pub(super) fn lower_binary(b: &mut Builder<'_>, node: &Node, op: &Binary) -> Result<(), Unable> {
    use BinaryFunction::*;
    let (x, y) = (super::input(node, 0)?, super::input(node, 1)?);
    let (dtype, of_y) = (b.dtype(x), b.dtype(y));
    let comparison = match op.function {
        Equal => "==",
        Less => "<",
        Greater => ">",
        LessOrEqual => "<=",
        GreaterOrEqual => ">=",
        _ => "",
    };
    let zero = integer(dtype, 0);
    let of_dividend = || format!("if (y == {zero}) {{ {} return {zero}; }}\n", b.fault());
    let bits = dtype.bits();
    let mut before = String::new();
    let text = match op.function {
        // NaN is equal to nothing and in no order, whatever a driver takes for granted.
        f if f.compares() && is_float(dtype) => {
            format!("(x {comparison} y) && !is_nan(x) && !is_nan(y)")
        }
        Equal if dtype == DType::Bool => "(x == y)".to_string(),
        f if f.compares() && is_whole(dtype) => format!("(x {comparison} y)"),
        And => "(x && y)".to_string(),
        Or => "(x || y)".to_string(),
        Xor => "(x != y)".to_string(),
        Pow if is_float(dtype) => {
            let y = match of_y {
                of if is_float(of) => "y",
                DType::I64 | DType::U64 => "f32(y)",
                _ => "f32(y)",
            };
            format!("pow_of(x, {y})")
        }
        Pow if is_whole(dtype) && is_float(of_y) => return Err("a power of whole numbers by a float".into()),
        Pow if is_whole(dtype) => {
            let one = integer(dtype, 1);
            let (of, of_exponent) = (code::value_type(dtype).unwrap_or("i32"), integer(of_y, 0));
            if is_signed(of_y) {
                before = format!(
                    "if (y < {of_exponent}) {{\nif (x == {zero}) {{ {} return {zero}; }}\n{}if (x == {one}) {{ return {one}; }}\nreturn {zero};\n}}\n",
                    b.fault(),
                    if is_signed(dtype) {
                        format!(
                            "if (x == -{one}) {{ return select({one}, -{one}, u32(y & {}) != 0u); }}\n",
                            integer(of_y, 1)
                        )
                    } else {
                        String::new()
                    }
                );
            }
            before += &format!("var power: {of} = {one};\nvar base = x;\nvar left = u32(y);\n");
            before += "while (left != 0u) { if ((left & 1u) != 0u) { power = power * base; } base = base * base; left = left >> 1u; }\n";
            "power".to_string()
        }
        _ if dtype != of_y => return Err(format!("{dtype} and {of_y}").into()),
        Add if dtype != DType::Bool => "(x + y)".to_string(),
        Sub if dtype != DType::Bool => "(x - y)".to_string(),
        Mul if dtype != DType::Bool => "(x * y)".to_string(),
        Div if is_float(dtype) => "(x / y)".to_string(),
        PRelu if is_float(dtype) || is_signed(dtype) => format!("select(x, x * y, x < {zero})"),
        PRelu if is_whole(dtype) => "x".to_string(),
        Fmod if is_float(dtype) => "fmod_of(x, y)".to_string(),
        Mod if is_float(dtype) => "mod_of(x, y)".to_string(),
        Div if is_whole(dtype) => {
            before = of_dividend();
            "(x / y)".to_string()
        }
        Fmod | Mod if is_whole(dtype) => {
            before = of_dividend();
            before += "let r = x - (x / y) * y;\n";
            match op.function == Mod && is_signed(dtype) {
                true => format!("select(r, r + y, r != {zero} && (r < {zero}) != (y < {zero}))"),
                false => "r".to_string(),
            }
        }
        BitwiseAnd if is_whole(dtype) => "(x & y)".to_string(),
        BitwiseOr if is_whole(dtype) => "(x | y)".to_string(),
        BitwiseXor if is_whole(dtype) => "(x ^ y)".to_string(),
        // A shift by all bits is none of WGSL's; one by fewer than none counts as that.
        ShiftLeft | ShiftRight if is_whole(dtype) => {
            let all = integer(dtype, bits as i128);
            let is_all = if is_signed(dtype) { format!("y < {zero} || y >= {all}") } else { format!("y >= {all}") };
            let (sign, rest) = match (op.function, is_signed(dtype)) {
                (ShiftLeft, _) => ("<<", zero.clone()),
                (_, false) => (">>", zero.clone()),
                (_, true) => (">>", format!("select({zero}, {}, x < {zero})", integer(dtype, -1))),
            };
            before = format!("if ({is_all}) {{ return {rest}; }}\n");
            format!("(x {sign} u32(y))")
        }
        _ => return Err(format!("no kernel for {dtype}").into()),
    };
    let output = node.outputs[0];
    let result = wrapped(b.dtype(output), &text);
    let operands = b.operands(&[x, y])?;
    let loads = broadcast_operands(b, &[x, y], &b.shape(output), &["x", "y"]);
    b.define(output, format!("{loads}{before}return {result};"), operands)
}

pub(super) fn lower_variadic(b: &mut Builder<'_>, node: &Node, op: &Variadic) -> Result<(), Unable> {
    let ids = node.inputs.iter().flatten().copied().collect::<Vec<_>>();
    let output = node.outputs[0];
    let dtype = b.dtype(output);
    if dtype == DType::Bool {
        return Err("no kernel for bool".into());
    }
    let operands = b.operands(&ids)?;
    let names: Vec<String> = (0..ids.len()).map(|at| format!("x{at}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let loads = broadcast_operands(b, &ids, &b.shape(output), &names);
    let fold = |text: String, name: &&str| match (op.function, is_float(dtype)) {
        (VariadicFunction::Sum | VariadicFunction::Mean, _) => format!("({text} + {name})"),
        (VariadicFunction::Min, true) => format!("min_of({text}, {name})"),
        (VariadicFunction::Max, true) => format!("max_of({text}, {name})"),
        (VariadicFunction::Min, false) => format!("min({text}, {name})"),
        (VariadicFunction::Max, false) => format!("max({text}, {name})"),
    };
    let mut text = names[1..].iter().fold(names[0].to_string(), fold);
    if op.function == VariadicFunction::Mean {
        if !is_float(dtype) {
            return Err(format!("a mean of {dtype}").into());
        }
        text = format!("({text} / {})", float(ids.len() as f32));
    }
    b.define(output, format!("{loads}return {};", wrapped(dtype, &text)), operands)
}

pub(super) fn lower_clip(b: &mut Builder<'_>, node: &Node) -> Result<(), Unable> {
    let x = super::input(node, 0)?;
    let bounds = [node.inputs.get(1).copied().flatten(), node.inputs.get(2).copied().flatten()];
    let mut ids = vec![x];
    let mut body = "var x = $0(i);\n".to_string();
    for (bound, sign) in bounds.into_iter().zip(["<", ">"]) {
        let Some(bound) = bound else { continue };
        if b.count(bound) != 1 {
            return Err("bounds that are no scalars".into());
        }
        let name = ["low", "high"][usize::from(sign == ">")];
        body += &format!("let {name} = ${}(0u);\nif (x {sign} {name}) {{ x = {name}; }}\n", ids.len());
        ids.push(bound);
    }
    let operands = b.operands(&ids)?;
    b.define(node.outputs[0], body + "return x;", operands)
}

pub(super) fn lower_predicate(b: &mut Builder<'_>, node: &Node, op: &Predicate) -> Result<(), Unable> {
    let x = super::input(node, 0)?;
    let text = match op {
        Predicate::Not => "!x".to_string(),
        _ if !is_float(b.dtype(x)) => return Err(format!("no kernel for {}", b.dtype(x)).into()),
        Predicate::IsNan => "is_nan(x)".to_string(),
        Predicate::IsInf { negative, positive } => {
            format!("is_infinite(x) && ((x < 0.0 && {negative}) || (x > 0.0 && {positive}))")
        }
    };
    let operands = b.operands(&[x])?;
    b.define(node.outputs[0], format!("let x = $0(i);\nreturn {text};"), operands)
}

pub(super) fn lower_where(b: &mut Builder<'_>, node: &Node) -> Result<(), Unable> {
    let ids = [super::input(node, 0)?, super::input(node, 1)?, super::input(node, 2)?];
    let output = node.outputs[0];
    let operands = b.operands(&ids)?;
    let loads = broadcast_operands(b, &ids, &b.shape(output), &["c", "x", "y"]);
    b.define(output, format!("{loads}return select(y, x, c);"), operands)
}

/// The element `x` of type `from` as one of `to`; `None` where no kernel does it.
pub(super) fn cast_text(from: DType, to: DType) -> Option<String> {
    let of = code::value_type(to)?;
    Some(match (from, to) {
        (from, to) if from == to => "x".to_string(),
        (DType::Bool, to) if is_float(to) => "select(0.0, 1.0, x)".to_string(),
        (DType::Bool, to) => format!("select({}, {}, x)", integer(to, 0), integer(to, 1)),
        (from, DType::Bool) => format!("(x != {})", integer(from, 0)),
        (from, to) if is_float(from) && is_float(to) => wrapped(to, "x"),
        (from, to) if is_whole(from) && is_float(to) => wrapped(to, "f32(x)"),
        // What is out of range wraps: through the widest type there is, as far as that holds it.
        (from, to) if is_float(from) => match to {
            DType::I64 => "i64(clamp(x, -9223371487098961920.0, 9223371487098961920.0))".to_string(),
            DType::U64 => "u64(clamp(x, 0.0, 18446742974197923840.0))".to_string(),
            DType::U32 => "u32(clamp(x, 0.0, 4294967040.0))".to_string(),
            to => {
                let whole = "i32(clamp(select(x, 0.0, is_nan(x)), -2147483648.0, 2147483520.0))";
                let signed = is_signed(to);
                wrapped(to, &if signed { whole.to_string() } else { format!("u32({whole})") })
            }
        },
        (from, to) if is_whole(from) && is_whole(to) => {
            // Through 32 bits of the same sign: WGSL converts by bits between words of one width.
            wrapped(to, &format!("{of}(x)"))
        }
        _ => return None,
    })
}

pub(super) fn lower_cast(b: &mut Builder<'_>, node: &Node) -> Result<(), Unable> {
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let (from, to) = (b.dtype(x), b.dtype(output));
    let text = cast_text(from, to).ok_or_else(|| format!("no kernel from {from} to {to}"))?;
    let operands = b.operands(&[x])?;
    b.define(output, format!("let x = $0(i);\nreturn {text};"), operands)
}
