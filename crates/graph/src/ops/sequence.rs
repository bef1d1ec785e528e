//! Sequences of tensors: made, read and changed. A sequence is a value like any other, so that a change gives a new one; the tensors in
//! it are shared.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, movement};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// What is done with a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    pub function: SequenceFunction,
}

/// Positions are integers of one element; negative ones count from the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceFunction {
    /// A sequence without elements, which would be tensors of `dtype`.
    Empty { dtype: DType },
    /// The inputs, in order.
    Construct,
    /// `(sequence, tensor, position?)`: the tensor before what is at the position, or last.
    Insert,
    /// `(sequence, position?)`: without what is at the position, or without the last.
    Erase,
    /// `(sequence, position)`: the tensor at the position.
    At,
    /// The number of elements, an i64 scalar.
    Length,
}

/// The fact of an element that is taken out of a sequence whose elements' fact is `of`: it has extents of its own.
pub fn taken(of: &Fact, context: &InferContext<'_>) -> Fact {
    match of {
        Fact::Tensor(TensorFact { dtype, shape: Some(shape), .. }) => {
            let extent = |(axis, dim): (usize, &Dim)| match dim {
                Dim::Const(_) => dim.clone(),
                _ => context.fresh(&format!("extent{axis}")),
            };
            TensorFact::new(*dtype, shape.iter().enumerate().map(extent).collect::<Vec<_>>()).into()
        }
        Fact::Optional(of) => Fact::Optional(Box::new(taken(of, context))),
        other => other.clone(),
    }
}

/// What holds of a sequence's elements once one of `added` is among them.
fn joined(of: &Fact, added: &TensorFact, context: &InferContext<'_>) -> Result<Fact, OpError> {
    let added = Fact::Tensor(TensorFact { value: None, ..added.clone() });
    let mut fresh = |axis: usize| context.fresh(&format!("extent{axis}"));
    of.join(&added, &mut fresh).ok_or_else(|| OpError::input(format!("{added} in a sequence of {of}")))
}

fn check_position(inputs: Facts<'_>, index: usize) -> Result<(), OpError> {
    match inputs.optional_tensor(index)? {
        Some(fact) if !movement::is_index(fact.dtype) || fact.constant_count().is_some_and(|count| count != 1) => {
            Err(OpError::input(format!("input {index}, the position, must be one i64 or i32, got {fact}")))
        }
        _ => Ok(()),
    }
}

/// The position in input `index` of a sequence with `places` places, or `default` where the input is omitted.
fn position(inputs: Inputs<'_>, index: usize, places: usize, default: Option<usize>) -> Result<usize, OpError> {
    if inputs.get(index).is_none() {
        return default.ok_or_else(|| OpError::input("the sequence has no elements"));
    }
    let given = match inputs.integers(index)?[..] {
        [given] => given,
        ref other => return Err(OpError::input(format!("input {index} must be one position, got {}", other.len()))),
    };
    let at = if given < 0 { given.saturating_add(places as i64) } else { given };
    let at = usize::try_from(at).ok().filter(|&at| at < places);
    at.ok_or_else(|| OpError::input(format!("position {given} of a sequence with {places} places")))
}

impl Operator for Sequence {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let (inputs, function) = match node.op_type.as_str() {
            "SequenceEmpty" => {
                let code = node.int("dtype", DType::F32.onnx_code().into())?;
                let dtype = i32::try_from(code).ok().and_then(DType::from_onnx_code);
                let dtype = dtype.ok_or_else(|| node.corrupt(format!("dtype {code} is not one of ONNX's")))?;
                (0..=0, SequenceFunction::Empty { dtype })
            }
            "SequenceConstruct" => (1..=usize::MAX, SequenceFunction::Construct),
            "SequenceInsert" => (2..=3, SequenceFunction::Insert),
            "SequenceErase" => (1..=2, SequenceFunction::Erase),
            "SequenceAt" => (2..=2, SequenceFunction::At),
            "SequenceLength" => (1..=1, SequenceFunction::Length),
            other => return Err(node.unsupported(format!("operator {other}"))),
        };
        node.expect_inputs(inputs)?;
        Ok(Sequence { function }.into())
    }

    fn export(&self) -> Spelling {
        match self.function {
            SequenceFunction::Empty { dtype } => {
                Spelling::new("SequenceEmpty").with("dtype", i64::from(dtype.onnx_code()))
            }
            SequenceFunction::Construct => Spelling::new("SequenceConstruct"),
            SequenceFunction::Insert => Spelling::new("SequenceInsert"),
            SequenceFunction::Erase => Spelling::new("SequenceErase"),
            SequenceFunction::At => Spelling::new("SequenceAt"),
            SequenceFunction::Length => Spelling::new("SequenceLength"),
        }
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let fact = match self.function {
            SequenceFunction::Empty { dtype } => Fact::Sequence(Box::new(TensorFact::unknown_rank(dtype).into())),
            SequenceFunction::Construct => {
                let first = inputs.tensor(0)?;
                let first = Fact::Tensor(TensorFact { value: None, ..first.clone() });
                let of = (1..inputs.len()).try_fold(first, |of, i| joined(&of, inputs.tensor(i)?, context))?;
                Fact::Sequence(Box::new(of))
            }
            SequenceFunction::Insert => {
                check_position(inputs, 2)?;
                Fact::Sequence(Box::new(joined(inputs.sequence(0)?, inputs.tensor(1)?, context)?))
            }
            SequenceFunction::Erase => {
                check_position(inputs, 1)?;
                Fact::Sequence(Box::new(inputs.sequence(0)?.clone()))
            }
            SequenceFunction::At => {
                inputs.tensor(1)?;
                check_position(inputs, 1)?;
                taken(inputs.sequence(0)?, context)
            }
            SequenceFunction::Length => {
                inputs.sequence(0)?;
                let value = Some(vec![context.fresh("length")]);
                TensorFact::of_constant_shape(DType::I64, &[]).with_value(value).into()
            }
        };
        Ok(vec![fact])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let result = match self.function {
            SequenceFunction::Empty { .. } => Value::Sequence(Vec::new()),
            SequenceFunction::Construct => {
                let tensors = (0..inputs.len()).map(|i| inputs.tensor(i)).collect::<Result<Vec<_>, _>>()?;
                if let Some(other) = tensors.iter().find(|t| t.dtype() != tensors[0].dtype()) {
                    let (first, other) = (tensors[0].dtype(), other.dtype());
                    return Err(OpError::input(format!("tensors of one type expected, got {first} and {other}")));
                }
                Value::Sequence(tensors.into_iter().map(|t| Value::Tensor(t.clone())).collect())
            }
            SequenceFunction::Insert => {
                let (values, tensor) = (inputs.sequence(0)?, inputs.tensor(1)?);
                if let Some(Value::Tensor(first)) = values.first()
                    && first.dtype() != tensor.dtype()
                {
                    let (first, tensor) = (first.dtype(), tensor.dtype());
                    return Err(OpError::input(format!("a tensor of {tensor} in a sequence of {first}")));
                }
                // A negative position counts from the end of the sequence as it is, before what it names.
                let after = inputs.get(2).is_some() && inputs.integers(2)?.first().is_some_and(|&at| at < 0);
                let at = position(inputs, 2, values.len() + usize::from(!after), Some(values.len()))?;
                let mut values = values.to_vec();
                values.insert(at, Value::Tensor(tensor.clone()));
                Value::Sequence(values)
            }
            SequenceFunction::Erase => {
                let mut values = inputs.sequence(0)?.to_vec();
                let at = position(inputs, 1, values.len(), values.len().checked_sub(1))?;
                values.remove(at);
                Value::Sequence(values)
            }
            SequenceFunction::At => {
                let values = inputs.sequence(0)?;
                values[position(inputs, 1, values.len(), None)?].clone()
            }
            SequenceFunction::Length => Tensor::scalar(inputs.sequence(0)?.len() as i64).into(),
        };
        Ok(vec![result])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, sequence, tensor, wave};
    use crate::{Fact, TensorFact};
    use cutover_tensor::{DType, Tensor, Value};

    fn at(position: i64) -> Tensor {
        tensor(&[], &[position])
    }

    #[test]
    fn sequences_are_made_and_read() {
        let (a, b) = (wave(&[2, 3], 0), wave(&[4, 3], 1));
        case("SequenceConstruct", 11).input(a.clone()).input(b.clone()).gives([sequence(&[&a, &b])]);
        case("SequenceConstruct", 11).input(a.clone()).gives([sequence(&[&a])]);
        case("SequenceConstruct", 11)
            .input(a.clone())
            .input(f32s(&[], &[1.0]))
            .gives([sequence(&[&a, &f32s(&[], &[1.0])])]);
        case("SequenceConstruct", 11).input(a.clone()).input(at(0)).fails("i64[] in a sequence of f32[2, 3]");
        case("SequenceEmpty", 11).gives([Value::Sequence(vec![])]);
        case("SequenceEmpty", 11).with("dtype", 7).gives([Value::Sequence(vec![])]);
        case("SequenceEmpty", 11).with("dtype", 99).fails("dtype 99");
        let both = || sequence(&[&a, &b]);
        case("SequenceAt", 11).input(both()).input(at(0)).gives([a.clone()]);
        case("SequenceAt", 11).input(both()).input(tensor(&[], &[-1i32])).gives([b.clone()]);
        case("SequenceAt", 11).input(both()).input(at(2)).fails("position 2 of a sequence with 2 places");
        case("SequenceAt", 11).input(both()).input(at(i64::MIN)).fails("of a sequence with 2 places");
        case("SequenceAt", 11).input(both()).input(f32s(&[], &[0.0])).fails("must be one i64 or i32");
        case("SequenceAt", 11).input(both()).input(tensor(&[2], &[0i64, 1])).fails("must be one i64 or i32");
        case("SequenceAt", 11).input(a.clone()).input(at(0)).fails("input 0 must be a sequence, got f32[2, 3]");
        case("SequenceLength", 11).input(both()).gives([at(2)]);
    }

    #[test]
    fn elements_are_inserted_and_erased() {
        let (a, b, c) = (wave(&[2], 0), wave(&[3], 1), wave(&[2], 2));
        let insert = |position: Option<i64>| {
            let node = case("SequenceInsert", 11).input(sequence(&[&a, &b])).input(c.clone());
            if let Some(position) = position { node.input(at(position)) } else { node }
        };
        insert(None).gives([sequence(&[&a, &b, &c])]);
        insert(Some(2)).gives([sequence(&[&a, &b, &c])]);
        insert(Some(0)).gives([sequence(&[&c, &a, &b])]);
        insert(Some(-1)).gives([sequence(&[&a, &c, &b])]);
        insert(Some(-2)).gives([sequence(&[&c, &a, &b])]);
        insert(Some(3)).fails("position 3");
        insert(Some(-3)).fails("position -3");
        case("SequenceInsert", 11).input(sequence(&[&a])).input(at(0)).fails("i64[] in a sequence of f32[2]");
        let empty = || (Value::Sequence(vec![]), Fact::Sequence(Box::new(TensorFact::unknown_rank(DType::F32).into())));
        case("SequenceInsert", 11).declared(empty()).input(a.clone()).gives([sequence(&[&a])]);
        case("SequenceInsert", 11).declared(empty()).input(a.clone()).input(at(-1)).fails("position -1");

        let erase = |position: Option<i64>| {
            let node = case("SequenceErase", 11).input(sequence(&[&a, &b, &c]));
            if let Some(position) = position { node.input(at(position)) } else { node }
        };
        erase(None).gives([sequence(&[&a, &b])]);
        erase(Some(0)).gives([sequence(&[&b, &c])]);
        erase(Some(-2)).gives([sequence(&[&a, &c])]);
        erase(Some(3)).fails("position 3 of a sequence with 3 places");
        case("SequenceErase", 11).declared(empty()).fails("no elements");
        case("SequenceLength", 11).declared(empty()).gives([at(0)]);
    }
}
