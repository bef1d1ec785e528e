//! What is known of a value before any input is seen.

use crate::{Bindings, Dim, OpError};
use cutover_tensor::{DType, Shape, Tensor, Value};
use std::fmt;

/// The type of a value and what is known of its contents.
#[derive(Clone, Debug, PartialEq)]
pub enum Fact {
    Tensor(TensorFact),
    /// What holds of every element. A symbol in it stands for whatever extent each element has: it is not one number, and an
    /// element that is taken out gets symbols of its own.
    Sequence(Box<Fact>),
    Optional(Box<Fact>),
    Map {
        key: DType,
        value: Box<Fact>,
    },
}

/// Element type, extents and, for small integer and boolean tensors, the elements themselves.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorFact {
    pub dtype: DType,
    /// `None` where even the rank is unknown.
    pub shape: Option<Vec<Dim>>,
    /// Elements in row-major order, booleans as 0 and 1. Known for integer and boolean tensors of at most
    /// [`TensorFact::VALUE_LIMIT`] elements whose shape is constant, and for f32 constants (scales to resize by).
    pub value: Option<Vec<Dim>>,
}

impl TensorFact {
    /// Exporters compute shapes with tensors of a few elements; anything larger is data.
    pub const VALUE_LIMIT: usize = 64;

    pub fn new(dtype: DType, shape: impl Into<Vec<Dim>>) -> TensorFact {
        TensorFact { dtype, shape: Some(shape.into()), value: None }
    }

    pub fn of_constant_shape(dtype: DType, shape: &[usize]) -> TensorFact {
        TensorFact::new(dtype, shape.iter().map(|&d| Dim::from(d)).collect::<Vec<_>>())
    }

    pub fn unknown_rank(dtype: DType) -> TensorFact {
        TensorFact { dtype, shape: None, value: None }
    }

    /// The fact of a known tensor, its elements included where they are small integers or booleans.
    pub fn of_tensor(tensor: &Tensor) -> TensorFact {
        let mut fact = TensorFact::of_constant_shape(tensor.dtype(), tensor.shape());
        if tensor.element_count() <= TensorFact::VALUE_LIMIT {
            fact.value = match tensor.dtype() {
                DType::I64 => tensor.to_vec::<i64>().ok().map(|v| v.into_iter().map(Dim::Const).collect()),
                DType::I32 => {
                    tensor.to_vec::<i32>().ok().map(|v| v.into_iter().map(|x| Dim::Const(x.into())).collect())
                }
                DType::F32 => tensor.to_vec::<f32>().ok().and_then(|v| v.into_iter().map(Dim::of_float).collect()),
                DType::Bool => tensor.to_bools().ok().map(|v| v.into_iter().map(|x| Dim::Const(x.into())).collect()),
                _ => None,
            };
        }
        fact
    }

    /// Attaches `value` where it may be kept: an integer or boolean type, a constant shape, few elements.
    pub fn with_value(mut self, value: Option<Vec<Dim>>) -> TensorFact {
        let kept = matches!(self.dtype, DType::I64 | DType::I32 | DType::Bool);
        // What overflows wraps, which extents do not.
        let fits = |d: &Dim| self.dtype != DType::I32 || d.as_const().is_none_or(|d| i32::try_from(d).is_ok());
        self.value = value.filter(|v| {
            kept && v.len() <= TensorFact::VALUE_LIMIT && self.constant_count() == Some(v.len()) && v.iter().all(fits)
        });
        self
    }

    pub fn rank(&self) -> Option<usize> {
        self.shape.as_ref().map(Vec::len)
    }

    /// The extents, where all are known.
    pub fn constant_shape(&self) -> Option<Vec<usize>> {
        self.shape.as_ref()?.iter().map(|d| d.as_const().and_then(|d| usize::try_from(d).ok())).collect()
    }

    /// Number of elements, where it is known and fits.
    pub fn constant_count(&self) -> Option<usize> {
        Shape::from(self.constant_shape()?).checked_len()
    }

    /// The elements, where all are known numbers.
    pub fn constant_value(&self) -> Option<Vec<i64>> {
        self.value.as_ref()?.iter().map(Dim::as_const).collect()
    }

    /// Number of elements as an expression, where the rank is known.
    pub fn element_count(&self) -> Option<Dim> {
        Some(self.shape.as_ref()?.iter().fold(Dim::Const(1), |n, d| n * d.clone()))
    }
}

impl Fact {
    pub fn as_tensor(&self) -> Option<&TensorFact> {
        match self {
            Fact::Tensor(fact) => Some(fact),
            _ => None,
        }
    }

    /// Whether nothing of `value` contradicts this: its kind, element type, rank, and extents as far as `bindings` say them.
    pub fn admits(&self, value: &Value, bindings: &Bindings) -> bool {
        match (self, value) {
            (Fact::Tensor(fact), Value::Tensor(tensor)) => {
                let extents = tensor.shape();
                let agree = |(dim, &extent): (&Dim, &usize)| dim.eval(bindings).is_none_or(|dim| dim == extent as i64);
                let fits = |dims: &Vec<Dim>| dims.len() == extents.rank() && dims.iter().zip(extents.iter()).all(agree);
                fact.dtype == tensor.dtype() && fact.shape.as_ref().is_none_or(fits)
            }
            (Fact::Sequence(of), Value::Sequence(values)) => values.iter().all(|value| of.admits(value, bindings)),
            (Fact::Optional(of), Value::Optional(value)) => {
                value.as_ref().is_none_or(|value| of.admits(value, bindings))
            }
            (Fact::Map { .. }, Value::Map { .. }) => true,
            _ => false,
        }
    }

    /// What holds of a value that is the one or the other: extents that differ are what `fresh` gives for their axis, and where ranks
    /// differ the rank is unknown. `None` where the kinds or the element types differ.
    pub fn join(&self, other: &Fact, fresh: &mut dyn FnMut(usize) -> Dim) -> Option<Fact> {
        match (self, other) {
            (Fact::Tensor(a), Fact::Tensor(b)) => {
                if a.dtype != b.dtype {
                    return None;
                }
                let shape = match (&a.shape, &b.shape) {
                    (Some(x), Some(y)) if x.len() == y.len() => {
                        let extents = x.iter().zip(y).enumerate();
                        Some(extents.map(|(axis, (x, y))| if x == y { x.clone() } else { fresh(axis) }).collect())
                    }
                    _ => None,
                };
                let value = if a.value == b.value && a.shape == b.shape { a.value.clone() } else { None };
                Some(TensorFact { dtype: a.dtype, shape, value }.into())
            }
            (Fact::Sequence(a), Fact::Sequence(b)) => Some(Fact::Sequence(Box::new(a.join(b, fresh)?))),
            (Fact::Optional(a), Fact::Optional(b)) => Some(Fact::Optional(Box::new(a.join(b, fresh)?))),
            (Fact::Map { key, value: a }, Fact::Map { key: other, value: b }) if key == other => {
                Some(Fact::Map { key: *key, value: Box::new(a.join(b, fresh)?) })
            }
            _ => None,
        }
    }

    /// The tensor's fact, or an error that says what came instead.
    pub fn tensor(&self) -> Result<&TensorFact, OpError> {
        self.as_tensor().ok_or_else(|| OpError::input(format!("expected a tensor, got {self}")))
    }
}

impl From<TensorFact> for Fact {
    fn from(fact: TensorFact) -> Fact {
        Fact::Tensor(fact)
    }
}

impl fmt::Display for TensorFact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.dtype)?;
        match &self.shape {
            None => f.write_str("[..]"),
            Some(shape) => {
                f.write_str("[")?;
                for (i, dim) in shape.iter().enumerate() {
                    write!(f, "{}{dim}", if i > 0 { ", " } else { "" })?;
                }
                f.write_str("]")
            }
        }
    }
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fact::Tensor(fact) => fact.fmt(f),
            Fact::Sequence(of) => write!(f, "sequence({of})"),
            Fact::Optional(of) => write!(f, "optional({of})"),
            Fact::Map { key, value } => write!(f, "map({key}, {value})"),
        }
    }
}
