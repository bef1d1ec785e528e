//! Evenly spaced numbers.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// `start, start + delta, …` before `limit`: `max(⌈(limit - start) / delta⌉, 0)` elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Range;

impl Operator for Range {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(3..=3)?;
        Ok(Range.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Range")
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let facts = [inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?];
        let dtype = facts[0].dtype;
        if let Some(other) = facts.iter().find(|f| f.dtype != dtype) {
            return Err(OpError::input(format!("types {dtype} and {} differ", other.dtype)));
        }
        // Integers, and floats that are whole.
        let one = |f: &TensorFact| {
            let element = f.value.as_ref()?.first()?;
            (dtype != DType::F32 || element.as_const().is_some()).then(|| element.clone())
        };
        let (Some(start), Some(limit), Some(delta)) = (one(facts[0]), one(facts[1]), one(facts[2])) else {
            return Ok(vec![TensorFact::new(dtype, [context.fresh("count")]).into()]);
        };
        let distance = limit - start.clone();
        let count = match delta.as_const() {
            Some(0) => return Err(OpError::input("a delta of 0")),
            Some(1) => distance,
            Some(d) if d > 0 => distance.ceil_div(&delta),
            Some(d) => (Dim::Const(0) - distance).ceil_div(&Dim::Const(d.checked_neg().unwrap_or(i64::MAX))),
            None => context.fresh("count"),
        };
        let count = if count.lower_bound().is_some_and(|b| b >= 0) { count } else { count.maximum(&Dim::Const(0)) };
        let value = count
            .as_const()
            .filter(|&n| n <= TensorFact::VALUE_LIMIT as i64)
            .map(|n| (0..n).map(|i| start.clone() + Dim::Const(i) * delta.clone()).collect());
        Ok(vec![TensorFact::new(dtype, [count]).with_value(value).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let tensors = [inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?];
        if let Some(t) = tensors.iter().find(|t| t.element_count() != 1) {
            return Err(OpError::input(format!("start, limit and delta must be scalars, one has shape {}", t.shape())));
        }
        let dtype: DType = tensors[0].dtype();
        let too_many = |count: f64| OpError::Resource(format!("a range of {count} elements"));
        let wide = match (Wide::of(tensors[0])?, Wide::of(tensors[1])?, Wide::of(tensors[2])?) {
            (_, _, Wide::Int(d)) if d[0] == 0 => return Err(OpError::input("a delta of 0")),
            (Wide::Int(s), Wide::Int(l), Wide::Int(d)) => {
                let (distance, delta) = (l[0] - s[0], d[0]);
                let count = distance / delta + i128::from(distance % delta != 0 && (distance < 0) == (delta < 0));
                let count = usize::try_from(count.max(0)).ok().filter(|&n| n <= context.max_elements);
                let count = count.ok_or_else(|| too_many(distance as f64 / delta as f64))?;
                Wide::Int((0..count as i128).map(|i| s[0] + i * delta).collect())
            }
            (Wide::Float(s), Wide::Float(l), Wide::Float(d)) => {
                let count = ((l[0] - s[0]) / d[0]).ceil().max(0.0);
                if !count.is_finite() || count > context.max_elements as f64 {
                    return Err(too_many(count));
                }
                Wide::Float((0..count as usize).map(|i| s[0] + i as f64 * d[0]).collect())
            }
            _ => return Err(OpError::input("start, limit and delta must be numbers of one type")),
        };
        let count = wide.len();
        Ok(vec![wide.narrow(dtype, [count])?.into()])
    }
}
