//! What depends on nothing but constants, or has known elements, becomes a constant.
//!
//! Not what would take much more room than it is made from (a large `Expand`), and not `DequantizeLinear`: small weights are why a model
//! was quantized. Casts of half-precision weights are folded whatever their size, since they are run in single precision.

use super::{Pass, Subject};
use crate::{
    Constant, Node, NodeId, Op, Patch, TensorFact,
    ops::{EvalContext, Inputs, Wide},
};
use cutover_tensor::{DType, Tensor, Value};

pub(super) struct FoldConstants;

impl Pass for FoldConstants {
    fn name(&self) -> &'static str {
        "fold-constants"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let node = subject.node(id);
        // An output of the graph stays made by a node.
        if node.outputs.iter().any(|&output| subject.is_output(output)) {
            return None;
        }
        let tensors = known_elements(subject, node).or_else(|| evaluated(subject, node))?;
        let mut patch = Patch::new();
        for (&output, tensor) in node.outputs.iter().zip(tensors) {
            let constant = patch.constant(subject.graph().value(output).name.clone(), Constant::new(tensor));
            patch.replace(output, constant);
        }
        Some(patch)
    }
}

/// The outputs, where their facts hold every element.
fn known_elements(subject: &Subject, node: &Node) -> Option<Vec<Tensor>> {
    let known = |fact: &TensorFact| {
        let integers = matches!(fact.dtype, DType::I64 | DType::I32);
        let elements = fact.constant_value()?;
        let wide = match integers {
            true => Wide::Int(elements.into_iter().map(i128::from).collect()),
            false if fact.dtype == DType::Bool => Wide::Bool(elements.into_iter().map(|v| v != 0).collect()),
            false => return None,
        };
        wide.narrow(fact.dtype, fact.constant_shape()?).ok()
    };
    node.outputs.iter().map(|&output| known(subject.fact(output)?)).collect()
}

fn evaluated(subject: &Subject, node: &Node) -> Option<Vec<Tensor>> {
    if matches!(node.op, Op::DequantizeLinear(_) | Op::Custom(_)) || node.inputs.iter().flatten().next().is_none() {
        return None;
    }
    let mut operand_bytes = 0;
    let mut operands = Vec::with_capacity(node.inputs.len());
    for &input in &node.inputs {
        let tensor = match input {
            Some(input) => Some(&subject.constant(input)?.tensor),
            None => None,
        };
        operand_bytes += tensor.map_or(0, |t| t.bytes().len());
        operands.push(tensor.map(|t| Value::Tensor(t.clone())));
    }
    let is_half = |t: &Tensor| matches!(t.dtype(), DType::F16 | DType::BF16);
    let widens = matches!(&node.op, Op::Cast(cast) if cast.to == DType::F32)
        && operands.iter().flatten().filter_map(Value::as_tensor).any(is_half);
    let limit = if widens { 2 * operand_bytes } else { operand_bytes.saturating_add(subject.folding.growth_bytes) };
    let bytes = |fact: &TensorFact| {
        let count = fact.constant_shape()?.into_iter().try_fold(1usize, usize::checked_mul)?;
        fact.dtype.byte_len(count)
    };
    for &output in &node.outputs {
        // Where only the data says how large the result is, evaluation itself is bounded.
        if subject.fact(output)?.constant_shape().is_some() && bytes(subject.fact(output)?).is_none_or(|b| b > limit) {
            return None;
        }
    }
    let operands: Vec<Option<&Value>> = operands.iter().map(Option::as_ref).collect();
    let max_trips = subject.folding.trips;
    let context = EvalContext { outputs: node.outputs.len(), max_elements: limit, max_trips, trips: None };
    // What fails here fails when the model runs, with the node's name.
    let results = node.op.eval(Inputs(&operands), &context).ok()?;
    let tensors: Vec<Tensor> = results.into_iter().map(Value::into_tensor).collect::<Option<_>>()?;
    let fits = tensors.len() >= node.outputs.len() && tensors.iter().all(|t| t.bytes().len() <= limit);
    fits.then_some(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{Binary, BinaryFunction, Cast, Concat, ConstantOfShape, Gather, Reshape, Shape, Unary, UnaryFunction},
        passes::testing::{Builder, check},
    };

    #[test]
    fn constants_and_known_elements_are_folded() {
        let mut b = Builder::new(1);
        let x = b.symbolic_input("x", &["N", "4", "6"]);
        let w = b.weight(&[6]);
        let w = b.node(Unary { function: UnaryFunction::Exp }, &[w]);
        let y = b.node(Binary { function: BinaryFunction::Mul }, &[x, w]);
        // Shape -> Gather -> Concat of known extents.
        let shape = b.node(Shape { start: 0, end: None }, &[x]);
        let (one, minus) = (b.integers(&[1]), b.integers(&[-1]));
        let four = b.node(Gather { axis: 0 }, &[shape, one]);
        let target = b.node(Concat { axis: 0 }, &[minus, four]);
        let y = b.node(Reshape { allow_zero: false }, &[y, target]);
        assert_eq!(check(&[&FoldConstants], b.finish(&[y]), 0.0), ["Mul", "Reshape"]);
    }

    #[test]
    fn what_would_grow_stays_and_half_precision_goes() {
        let fold = |extent: i64| {
            let mut b = Builder::new(1);
            let shape = b.integers(&[extent]);
            let filled = b.node(ConstantOfShape { value: Tensor::from_vec([1], vec![2f32]).unwrap() }, &[shape]);
            let y = b.node(Unary { function: UnaryFunction::Neg }, &[filled]);
            let y = b.node(Unary { function: UnaryFunction::Neg }, &[y]);
            check(&[&FoldConstants], b.finish(&[y]), 0.0)
        };
        assert_eq!(fold(1000), ["Neg"]);
        assert_eq!(fold(100_000), ["ConstantOfShape", "Neg", "Neg"]);
        let mut b = Builder::new(1);
        let x = b.input("x", &[40_000]);
        let half: Vec<cutover_tensor::f16> = (0..40_000).map(|i| cutover_tensor::f16::from_f32(i as f32)).collect();
        let w = b.constant(Tensor::from_vec([40_000], half).unwrap());
        let w = b.node(Cast::to(DType::F32), &[w]);
        let y = b.node(Binary { function: BinaryFunction::Add }, &[x, w]);
        assert_eq!(check(&[&FoldConstants], b.finish(&[y]), 0.0), ["Add"]);
    }
}
