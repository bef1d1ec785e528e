//! Arithmetic, comparison and logic of two tensors, broadcast.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, broadcast_index,
    broadcast_shape, elementwise_fact,
};
use crate::{Dim, Fact, ImportError, OpError};
use cutover_tensor::{DType, Tensor, Value};

/// `y = f(a, b)`, elementwise after broadcasting. Comparisons and logic give bool; everything else the type of `a`.
#[derive(Clone, Debug, PartialEq)]
pub struct Binary {
    pub function: BinaryFunction,
}

macro_rules! functions {
    ($($(#[$doc:meta])* $variant:ident),* $(,)?) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum BinaryFunction { $($(#[$doc])* $variant),* }

        impl BinaryFunction {
            /// The ONNX operator; of `Mod` and `BitShift`, which of its two.
            pub fn name(self) -> &'static str {
                match self { $(BinaryFunction::$variant => stringify!($variant)),* }
            }
            fn from_name(name: &str) -> Option<Self> {
                match name { $(stringify!($variant) => Some(BinaryFunction::$variant),)* _ => None }
            }
        }
    };
}

functions!(
    Add,
    Sub,
    Mul,
    Div,
    Pow,
    Equal,
    Less,
    Greater,
    LessOrEqual,
    GreaterOrEqual,
    And,
    Or,
    Xor,
    BitwiseAnd,
    BitwiseOr,
    BitwiseXor,
    PRelu,
    /// ONNX's `Mod` with `fmod` 0: the remainder has the divisor's sign.
    Mod,
    /// ONNX's `Mod` with `fmod` 1: the remainder has the dividend's sign.
    Fmod,
    ShiftLeft,
    ShiftRight,
);

impl BinaryFunction {
    /// Whether the result is a truth about numbers.
    pub fn compares(self) -> bool {
        use BinaryFunction::*;
        matches!(self, Equal | Less | Greater | LessOrEqual | GreaterOrEqual)
    }

    /// Whether it is of truths.
    pub fn is_logic(self) -> bool {
        use BinaryFunction::*;
        matches!(self, And | Or | Xor)
    }

    /// Of the functions that compare.
    pub fn compare<T: PartialOrd>(self, a: &T, b: &T) -> bool {
        match self {
            BinaryFunction::Equal => a == b,
            BinaryFunction::Less => a < b,
            BinaryFunction::Greater => a > b,
            BinaryFunction::LessOrEqual => a <= b,
            _ => a >= b,
        }
    }

    /// `None` where it is not defined on floats.
    pub fn of_floats(self, a: f64, b: f64) -> Option<f64> {
        use BinaryFunction::*;
        Some(match self {
            Add => a + b,
            Sub => a - b,
            Mul => a * b,
            Div => a / b,
            Pow => a.powf(b),
            PRelu => {
                if a < 0.0 {
                    a * b
                } else {
                    a
                }
            }
            Fmod => a % b,
            Mod => match a % b {
                0.0 => 0f64.copysign(b),
                remainder if (remainder < 0.0) != (b < 0.0) => remainder + b,
                remainder => remainder,
            },
            _ => return None,
        })
    }

    /// Before the result is wrapped to its type.
    pub fn of_ints(self, a: i128, b: i128) -> Result<i128, OpError> {
        use BinaryFunction::*;
        Ok(match self {
            Add => a + b,
            Sub => a - b,
            Mul => a.wrapping_mul(b),
            Div if b == 0 => return Err(OpError::input("integer division by zero")),
            // Towards zero, as C does.
            Div => a / b,
            Pow => power(a, b)?,
            BitwiseAnd => a & b,
            BitwiseOr => a | b,
            BitwiseXor => a ^ b,
            Mod | Fmod if b == 0 => return Err(OpError::input("the remainder of an integer division by zero")),
            Fmod => a % b,
            Mod => match a % b {
                remainder if remainder != 0 && (remainder < 0) != (b < 0) => remainder + b,
                remainder => remainder,
            },
            // No type has more than 64 bits; a shift by fewer than none is one by all of them.
            ShiftLeft => a << if b < 0 { 64 } else { b.min(64) },
            ShiftRight => a >> if b < 0 { 64 } else { b.min(64) },
            PRelu => {
                if a < 0 {
                    a.wrapping_mul(b)
                } else {
                    a
                }
            }
            other => return Err(OpError::input(format!("{} is not defined on integers", other.name()))),
        })
    }

    /// On symbolic elements, where the result can be told.
    fn of_dims(self, a: &Dim, b: &Dim) -> Option<Dim> {
        use BinaryFunction::*;
        let truth = |v: bool| Some(Dim::Const(v.into()));
        match (self, a.as_const(), b.as_const()) {
            (Add, ..) => (a.clone() + b.clone()).unless_overflown(),
            (Sub, ..) => (a.clone() - b.clone()).unless_overflown(),
            (Mul, ..) => (a.clone() * b.clone()).unless_overflown(),
            (Div, Some(a), Some(b)) => a.checked_div(b).map(Dim::Const),
            (Div, ..) if a.lower_bound() >= Some(0) && b.lower_bound() >= Some(1) => Some(a.floor_div(b)),
            (Equal, ..) if a == b => truth(true),
            // An extent is at least its bound: a comparison with -1 is decided for every shape.
            (Equal, None, Some(b)) if a.lower_bound() > Some(b) => truth(false),
            (Equal, Some(a), None) if b.lower_bound() > Some(a) => truth(false),
            (f, Some(a), Some(b)) if f.compares() => truth(f.compare(&a, &b)),
            (And, Some(a), Some(b)) => truth(a != 0 && b != 0),
            (Or, Some(a), Some(b)) => truth(a != 0 || b != 0),
            (Xor, Some(a), Some(b)) => truth((a != 0) != (b != 0)),
            _ => None,
        }
    }
}

fn power(base: i128, exponent: i128) -> Result<i128, OpError> {
    match u32::try_from(exponent) {
        Ok(exponent) => Ok(base.wrapping_pow(exponent)),
        // 1/base^n rounds towards zero.
        Err(_) if exponent < 0 && base != 0 => Ok(if base == 1 {
            1
        } else if base == -1 {
            1 - 2 * (exponent & 1)
        } else {
            0
        }),
        Err(_) => Err(OpError::input(format!("{base} to the power of {exponent}"))),
    }
}

impl Operator for Binary {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        if node.opset < 7 {
            node.flag("broadcast", false)?;
            if let Some(axis) = node.optional_int("axis")? {
                node.align_input(1, axis);
            } else if node.op_type == "PRelu" {
                // A slope per channel; one slope for all broadcasts any way.
                node.align_input(1, 1);
            }
        }
        let name = node.op_type.clone();
        let function = match name.as_str() {
            "Mod" if node.flag("fmod", false)? => Some(BinaryFunction::Fmod),
            "BitShift" => match node.string("direction", "")?.as_str() {
                "LEFT" => Some(BinaryFunction::ShiftLeft),
                "RIGHT" => Some(BinaryFunction::ShiftRight),
                other => return Err(node.corrupt(format!("direction is '{other}', expected LEFT or RIGHT"))),
            },
            name => BinaryFunction::from_name(name),
        };
        Ok(Binary { function: function.ok_or_else(|| node.unsupported("this function"))? }.into())
    }

    fn export(&self) -> Spelling {
        match self.function {
            BinaryFunction::Fmod => Spelling::new("Mod").with("fmod", 1),
            BinaryFunction::ShiftLeft => Spelling::new("BitShift").with("direction", "LEFT"),
            BinaryFunction::ShiftRight => Spelling::new("BitShift").with("direction", "RIGHT"),
            function => Spelling::new(function.name()),
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let f = self.function;
        if a.dtype != b.dtype && f != BinaryFunction::Pow {
            return Err(OpError::input(format!("types {} and {} differ", a.dtype, b.dtype)));
        }
        if f.is_logic() && a.dtype != DType::Bool {
            return Err(OpError::input(format!("{} needs bool, got {}", f.name(), a.dtype)));
        }
        let dtype = if f.compares() || f.is_logic() { DType::Bool } else { a.dtype };
        Ok(vec![elementwise_fact(&[a, b], dtype, |v| f.of_dims(v[0], v[1]))?])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let f = self.function;
        let shape = broadcast_shape(&[a.shape(), b.shape()])?;
        let pairs = || broadcast_index(a.shape(), &shape).zip(broadcast_index(b.shape(), &shape));
        if a.dtype() == DType::String && b.dtype() == DType::String && f == BinaryFunction::Equal {
            let (x, y) = (a.strings()?, b.strings()?);
            let equal: Vec<bool> = pairs().map(|(i, j)| x[i] == y[j]).collect();
            return Ok(vec![Tensor::from_bools(shape, &equal)?.into()]);
        }
        let y = match (Wide::of(a)?, Wide::of(b)?) {
            (Wide::Float(x), Wide::Float(y)) if f.compares() => {
                Wide::Bool(pairs().map(|(i, j)| f.compare(&x[i], &y[j])).collect())
            }
            (Wide::Int(x), Wide::Int(y)) if f.compares() => {
                Wide::Bool(pairs().map(|(i, j)| f.compare(&x[i], &y[j])).collect())
            }
            (Wide::Bool(x), Wide::Bool(y)) => {
                let logic = |a: bool, b: bool| match f {
                    BinaryFunction::And => Ok(a & b),
                    BinaryFunction::Or => Ok(a | b),
                    BinaryFunction::Xor => Ok(a ^ b),
                    BinaryFunction::Equal => Ok(a == b),
                    _ => Err(OpError::input(format!("{} is not defined on bool", f.name()))),
                };
                Wide::Bool(pairs().map(|(i, j)| logic(x[i], y[j])).collect::<Result<_, _>>()?)
            }
            (Wide::Float(x), Wide::Int(y)) if f == BinaryFunction::Pow => {
                Wide::Float(pairs().map(|(i, j)| x[i].powf(y[j] as f64)).collect())
            }
            (Wide::Int(x), Wide::Float(y)) if f == BinaryFunction::Pow => {
                Wide::Int(pairs().map(|(i, j)| (x[i] as f64).powf(y[j]) as i128).collect())
            }
            (Wide::Float(x), Wide::Float(y)) => {
                let undefined = || OpError::input(format!("{} is not defined on floats", f.name()));
                let one = |(i, j): (usize, usize)| f.of_floats(x[i], y[j]).ok_or_else(undefined);
                Wide::Float(pairs().map(one).collect::<Result<_, _>>()?)
            }
            (Wide::Int(x), Wide::Int(y)) => {
                Wide::Int(pairs().map(|(i, j)| f.of_ints(x[i], y[j])).collect::<Result<_, _>>()?)
            }
            _ => return Err(OpError::input(format!("types {} and {} differ", a.dtype(), b.dtype()))),
        };
        let dtype = if f.compares() || f.is_logic() { DType::Bool } else { a.dtype() };
        Ok(vec![y.narrow(dtype, shape)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn before_opset_7_axes_meet_where_the_node_says() {
        let old = |axis: i64| {
            case("Add", 6).with("broadcast", 1).with("axis", axis).input(f32s(&[2, 2, 1], &[1.0, 2.0, 3.0, 4.0]))
        };
        old(0).input(f32s(&[2], &[10.0, 20.0])).gives([f32s(&[2, 2, 1], &[11.0, 12.0, 23.0, 24.0])]);
        old(1).input(f32s(&[2], &[10.0, 20.0])).gives([f32s(&[2, 2, 1], &[11.0, 22.0, 13.0, 24.0])]);
        old(-2).input(f32s(&[2, 1], &[10.0, 20.0])).gives([f32s(&[2, 2, 1], &[11.0, 22.0, 13.0, 24.0])]);
        old(2).input(f32s(&[2, 1], &[10.0, 20.0])).fails("do not meet");
        old(3).input(f32s(&[1], &[10.0])).fails("do not meet");
        case("PRelu", 6)
            .input(f32s(&[1, 2, 2], &[-1.0, 2.0, -3.0, -4.0]))
            .input(f32s(&[2], &[10.0, 20.0]))
            .gives([f32s(&[1, 2, 2], &[-10.0, 2.0, -60.0, -80.0])]);
        case("Gemm", 6)
            .with("broadcast", 1)
            .wave(&[2, 3])
            .wave(&[3, 2])
            .input(f32s(&[2], &[1.0, 2.0]))
            .gives([f32s(&[2, 2], &[1.25, 0.0625, -0.3125, 3.375])]);
    }
}
