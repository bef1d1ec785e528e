//! Sum, mean, minimum and maximum of any number of tensors, broadcast.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, broadcast_index,
    broadcast_shape, elementwise_fact,
};
use crate::{Dim, Fact, ImportError, OpError};
use cutover_tensor::Value;

/// `y = f(x₀, x₁, …)`, elementwise after broadcasting, of the type that all share.
#[derive(Clone, Debug, PartialEq)]
pub struct Variadic {
    pub function: VariadicFunction,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VariadicFunction {
    Sum,
    Mean,
    Min,
    Max,
}

impl Operator for Variadic {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=usize::MAX)?;
        use VariadicFunction::*;
        let function = match node.op_type.as_str() {
            "Sum" => Sum,
            "Mean" => Mean,
            "Min" => Min,
            _ => Max,
        };
        Ok(Variadic { function }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new(match self.function {
            VariadicFunction::Sum => "Sum",
            VariadicFunction::Mean => "Mean",
            VariadicFunction::Min => "Min",
            VariadicFunction::Max => "Max",
        })
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let facts = (0..inputs.len().max(1)).map(|i| inputs.tensor(i)).collect::<Result<Vec<_>, _>>()?;
        if let Some(other) = facts.iter().find(|f| f.dtype != facts[0].dtype) {
            return Err(OpError::input(format!("types {} and {} differ", facts[0].dtype, other.dtype)));
        }
        let fold = |v: &[&Dim], f: fn(&Dim, &Dim) -> Dim| v[1..].iter().fold(v[0].clone(), |a, b| f(&a, b));
        let element = |v: &[&Dim]| match self.function {
            VariadicFunction::Sum => v[1..].iter().try_fold(v[0].clone(), |a, &b| (a + b.clone()).unless_overflown()),
            VariadicFunction::Min => Some(fold(v, Dim::minimum)),
            VariadicFunction::Max => Some(fold(v, Dim::maximum)),
            VariadicFunction::Mean => None,
        };
        Ok(vec![elementwise_fact(&facts, facts[0].dtype, element)?])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let tensors = (0..inputs.len().max(1)).map(|i| inputs.tensor(i)).collect::<Result<Vec<_>, _>>()?;
        let shapes: Vec<&[usize]> = tensors.iter().map(|t| t.shape().dims()).collect();
        let shape = broadcast_shape(&shapes)?;
        let wides = tensors.iter().map(|t| Wide::of(t)).collect::<Result<Vec<_>, _>>()?;
        let indices: Vec<Vec<usize>> = shapes.iter().map(|s| broadcast_index(s, &shape).collect()).collect();
        let count = shape.element_count();
        use VariadicFunction::*;
        let y = match &wides[0] {
            Wide::Float(_) => {
                let mut out = Vec::with_capacity(count);
                for at in 0..count {
                    let mut items = wides.iter().zip(&indices).map(|(w, i)| match w {
                        Wide::Float(v) => Ok(v[i[at]]),
                        _ => Err(OpError::input("the inputs' types differ")),
                    });
                    let first = items.next().expect("one input at least")?;
                    let pick = |a: f64, b: f64, less: bool| if a.is_nan() || (a < b) == less { a } else { b };
                    let total = items.try_fold(first, |a, b| {
                        b.map(|b| match self.function {
                            Sum | Mean => a + b,
                            Min => {
                                if b.is_nan() {
                                    b
                                } else {
                                    pick(a, b, true)
                                }
                            }
                            Max => {
                                if b.is_nan() {
                                    b
                                } else {
                                    pick(a, b, false)
                                }
                            }
                        })
                    })?;
                    out.push(if self.function == Mean { total / wides.len() as f64 } else { total });
                }
                Wide::Float(out)
            }
            Wide::Int(_) => {
                let mut out = Vec::with_capacity(count);
                for at in 0..count {
                    let mut items = wides.iter().zip(&indices).map(|(w, i)| match w {
                        Wide::Int(v) => Ok(v[i[at]]),
                        _ => Err(OpError::input("the inputs' types differ")),
                    });
                    let first = items.next().expect("one input at least")?;
                    out.push(items.try_fold(first, |a, b| {
                        b.and_then(|b| match self.function {
                            Sum => Ok(a + b),
                            Min => Ok(a.min(b)),
                            Max => Ok(a.max(b)),
                            Mean => Err(OpError::input("Mean is not defined on integers")),
                        })
                    })?);
                }
                Wide::Int(out)
            }
            Wide::Bool(_) => return Err(OpError::input("not defined on bool")),
        };
        Ok(vec![y.narrow(tensors[0].dtype(), shape)?.into()])
    }
}
