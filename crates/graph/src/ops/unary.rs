//! Elementwise functions of one tensor.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `y = f(x)`, elementwise; `y` has the type and shape of `x`.
#[derive(Clone, Debug, PartialEq)]
pub struct Unary {
    pub function: UnaryFunction,
}

macro_rules! functions {
    ($($variant:ident),*) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum UnaryFunction { $($variant),* }

        impl UnaryFunction {
            pub fn name(self) -> &'static str {
                match self { $(UnaryFunction::$variant => stringify!($variant)),* }
            }
            fn from_name(name: &str) -> Option<Self> {
                match name { $(stringify!($variant) => Some(UnaryFunction::$variant),)* _ => None }
            }
        }
    };
}

functions!(Abs, Relu, Neg, Exp, Sqrt, Tanh, Sigmoid, Erf);

impl Operator for Unary {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let function = UnaryFunction::from_name(&node.op_type).expect("listed under this name");
        Ok(Unary { function }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new(self.function.name())
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        Ok(vec![TensorFact { value: None, ..inputs.tensor(0)?.clone() }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let y = match Wide::of(x)? {
            Wide::Float(v) => Wide::Float(v.into_iter().map(|v| self.function.of_float(v)).collect()),
            Wide::Int(v) => Wide::Int(v.into_iter().map(|v| self.function.of_int(v)).collect::<Result<_, _>>()?),
            Wide::Bool(_) => return Err(OpError::input(format!("{} is not defined on bool", self.function.name()))),
        };
        Ok(vec![y.narrow(x.dtype(), x.shape().clone())?.into()])
    }
}

impl UnaryFunction {
    pub fn of_float(self, x: f64) -> f64 {
        use UnaryFunction::*;
        match self {
            Abs => x.abs(),
            Relu => if x < 0.0 { 0.0 } else { x },
            Neg => -x,
            Exp => x.exp(),
            Sqrt => x.sqrt(),
            Tanh => x.tanh(),
            Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Erf => erf(x),
        }
    }

    fn of_int(self, x: i128) -> Result<i128, OpError> {
        use UnaryFunction::*;
        match self {
            Abs => Ok(x.abs()),
            Relu => Ok(x.max(0)),
            Neg => Ok(-x),
            other => Err(OpError::input(format!("{} is not defined on integers", other.name()))),
        }
    }
}

/// The error function in double precision.
pub(super) fn erf(_x: f64) -> f64 {
    todo!()
}
