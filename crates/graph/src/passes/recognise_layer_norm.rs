//! Layer normalisation that an exporter spelled out becomes the operator, in steps that each hold by themselves: the normalised value
//! first, then the scale and the bias after it.

use super::{
    Pass, Subject,
    subject::{is_binary, is_unary},
};
use crate::{
    Constant, Node, NodeId, Op, Patch, PatchValue, ValueId,
    ops::{BinaryFunction, LayerNorm, ReduceFunction, UnaryFunction, Wide},
};
use cutover_tensor::{DType, Tensor};

pub(super) struct RecogniseLayerNorm;

impl Pass for RecogniseLayerNorm {
    fn name(&self) -> &'static str {
        "recognise-layer-norm"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let node = subject.node(id);
        if subject.dtype(node.outputs[0]) != Some(DType::F32) {
            return None;
        }
        normalised(subject, node).or_else(|| scaled(subject, node))
    }
}

/// `(x − mean(x)) / √(mean((x − mean(x))²) + epsilon)`.
fn normalised(subject: &Subject, node: &Node) -> Option<Patch> {
    let (a, b) = (subject.input(node, 0)?, subject.input(node, 1)?);
    let (centred, radicand) = if is_binary(node, BinaryFunction::Div) {
        (a, root(subject, b)?)
    } else if is_binary(node, BinaryFunction::Mul) {
        match (inverse_root(subject, b), inverse_root(subject, a)) {
            (Some(radicand), _) => (a, radicand),
            (None, Some(radicand)) => (b, radicand),
            (None, None) => return None,
        }
    } else {
        return None;
    };
    let (_, sum) = subject.producer(radicand).filter(|(_, n)| is_binary(n, BinaryFunction::Add))?;
    let (variance, epsilon) = subject.split_constant(sum)?;
    let epsilon = subject.scalar(epsilon)? as f32;
    let (square, axes) = mean(subject, variance)?;
    let (_, square) = subject.producer(square)?;
    let squares = |value: ValueId| same_difference(subject, value, centred);
    let (p, q) = (subject.input(square, 0)?, subject.input(square, 1)?);
    let is_square = match () {
        () if is_binary(square, BinaryFunction::Mul) => squares(p) && squares(q),
        () if is_binary(square, BinaryFunction::Pow) => {
            let integer = || subject.integers(q).filter(|v| v.len() == 1).map(|v| v[0] as f64);
            squares(p) && subject.scalar(q).or_else(integer)? == 2.0
        }
        () => false,
    };
    let (_, difference) = subject.producer(centred).filter(|(_, n)| is_binary(n, BinaryFunction::Sub))?;
    let (input, centre) = (subject.input(difference, 0)?, subject.input(difference, 1)?);
    let (averaged, centre_axes) = mean(subject, centre)?;
    let shape = subject.shape(input)?;
    let first = axes.iter().position(|&reduced| reduced)?;
    let is_trailing = axes[first..].iter().all(|&reduced| reduced);
    if !is_square
        || averaged != input
        || axes != centre_axes
        || !is_trailing
        || !subject.same_type(input, node.outputs[0])
    {
        return None;
    }
    let extents = shape[first..].iter().map(|d| usize::try_from(d.as_const()?).ok()).collect::<Option<Vec<usize>>>()?;
    let ones = Tensor::from_vec(extents.as_slice(), vec![1f32; extents.iter().product()]).ok()?;
    let mut patch = Patch::new();
    let scale = patch.constant(format!("{}.scale", node.name), Constant::new(ones));
    let axis = first as i64 - shape.len() as i64;
    let op = LayerNorm { axis, epsilon, centred: true, with_deviation: false };
    let normalised = patch.node(&node.name, op, &[Some(input.into()), Some(scale)]);
    patch.replace(node.outputs[0], normalised);
    Some(patch)
}

/// What `value` is the square root of.
fn root(subject: &Subject, value: ValueId) -> Option<ValueId> {
    let (_, node) = subject.producer(value)?;
    let is_half = || subject.input(node, 1).and_then(|e| subject.scalar(e)) == Some(0.5);
    let is_root = is_unary(node, UnaryFunction::Sqrt) || (is_binary(node, BinaryFunction::Pow) && is_half());
    subject.input(node, 0).filter(|_| is_root)
}

/// What `value` is one by the square root of.
fn inverse_root(subject: &Subject, value: ValueId) -> Option<ValueId> {
    let (_, node) = subject.producer(value)?;
    let (a, b) = (subject.input(node, 0)?, subject.input(node, 1));
    match b {
        None if is_unary(node, UnaryFunction::Reciprocal) => root(subject, a),
        Some(b) if is_binary(node, BinaryFunction::Div) && subject.scalar(a) == Some(1.0) => root(subject, b),
        Some(b) if is_binary(node, BinaryFunction::Pow) && subject.scalar(b) == Some(-0.5) => Some(a),
        _ => None,
    }
}

/// What `value` is the mean of, and for every axis whether it was averaged over; averaged axes stay, of extent 1.
fn mean(subject: &Subject, value: ValueId) -> Option<(ValueId, Vec<bool>)> {
    let (_, node) = subject.producer(value)?;
    let Op::Reduce(op) = &node.op else { return None };
    let input = subject.input(node, 0)?;
    let axes = match subject.input(node, 1) {
        Some(axes) => subject.integers(axes)?,
        None => Vec::new(),
    };
    let reduced = op.reduced(&axes, subject.shape(input)?.len()).ok()?;
    (op.function == ReduceFunction::Mean && op.keep_dims).then_some((input, reduced))
}

/// Whether both are one value, or differences of the same values.
fn same_difference(subject: &Subject, a: ValueId, b: ValueId) -> bool {
    let inputs =
        |value| subject.producer(value).filter(|(_, n)| is_binary(n, BinaryFunction::Sub)).map(|(_, n)| &n.inputs);
    a == b || inputs(a).is_some_and(|x| inputs(b) == Some(x))
}

/// A product after a normalisation without scale, or a sum after one without bias.
fn scaled(subject: &Subject, node: &Node) -> Option<Patch> {
    let (multiplies, adds) = (is_binary(node, BinaryFunction::Mul), is_binary(node, BinaryFunction::Add));
    if !multiplies && !adds {
        return None;
    }
    let (input, constant) = subject.split_constant(node)?;
    let (_, norm) = subject.sole_producer(input)?;
    let Op::LayerNorm(op) = &norm.op else { return None };
    let scale = subject.input(norm, 1)?;
    let is_plain = op.centred && norm.outputs.len() == 1 && subject.input(norm, 2).is_none();
    if !is_plain || !subject.same_type(input, node.outputs[0]) {
        return None;
    }
    // Of the extents that are normalised, which leading ones do not change.
    let extents = subject.constant(scale)?.tensor.shape().clone();
    let tensor = &subject.constant(constant)?.tensor;
    let lead = tensor.shape().rank().checked_sub(extents.rank())?;
    let fits = tensor.shape()[..lead].iter().all(|&d| d == 1) && tensor.shape()[lead..] == *extents;
    let factors = tensor.reshape(extents).ok().filter(|_| fits)?;
    let mut patch = Patch::new();
    let mut inputs: Vec<Option<PatchValue>> = vec![Some(subject.input(norm, 0)?.into())];
    if multiplies {
        let is_one = match Wide::of(&subject.constant(scale)?.tensor).ok()? {
            Wide::Float(v) => v.iter().all(|&v| v == 1.0),
            _ => false,
        };
        inputs.push(is_one.then(|| patch.constant(format!("{}.scale", node.name), Constant::new(factors))));
        inputs[1]?;
    } else {
        inputs.push(Some(scale.into()));
        inputs.push(Some(patch.constant(format!("{}.bias", node.name), Constant::new(factors))));
    }
    let merged = patch.node(&norm.name, op.clone(), &inputs);
    patch.replace(node.outputs[0], merged);
    Some(patch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{Binary, Reduce, Unary},
        passes::testing::{Builder, check},
    };
    use BinaryFunction::{Add, Div, Mul, Pow, Sub};

    /// The spelled form rounds after every step.
    const ROUNDING: f64 = 3e-6;

    fn recognised(
        axes: &[i64],
        scale: &[usize],
        spell_root: impl Fn(&mut Builder, ValueId, ValueId) -> ValueId,
    ) -> Vec<String> {
        let mut b = Builder::new(6);
        let x = b.symbolic_input("x", &["N", "5", "4"]);
        let axes = b.integers(axes);
        let mean = Reduce { function: ReduceFunction::Mean, keep_dims: true, noop_with_empty_axes: false };
        let binary = |function| Binary { function };
        let centre = b.node(mean.clone(), &[x, axes]);
        let centred = b.node(binary(Sub), &[x, centre]);
        let again = b.node(binary(Sub), &[x, centre]);
        let two = b.scalar(2.0);
        let square = b.node(binary(Pow), &[again, two]);
        let variance = b.node(mean, &[square, axes]);
        let epsilon = b.scalar(1e-5);
        let radicand = b.node(binary(Add), &[variance, epsilon]);
        let y = spell_root(&mut b, centred, radicand);
        let (scale, bias) = (b.weight(scale), b.weight(scale));
        let y = b.node(binary(Mul), &[y, scale]);
        let y = b.node(binary(Add), &[bias, y]);
        check(&[&RecogniseLayerNorm], b.finish(&[y]), ROUNDING)
    }

    #[test]
    fn every_spelling() {
        let divided = |b: &mut Builder, x: ValueId, radicand: ValueId| {
            let root = b.node(Unary { function: UnaryFunction::Sqrt }, &[radicand]);
            b.node(Binary { function: Div }, &[x, root])
        };
        let reciprocal = |b: &mut Builder, x: ValueId, radicand: ValueId| {
            let root = b.node(Unary { function: UnaryFunction::Sqrt }, &[radicand]);
            let inverse = b.node(Unary { function: UnaryFunction::Reciprocal }, &[root]);
            b.node(Binary { function: Mul }, &[inverse, x])
        };
        let power = |b: &mut Builder, x: ValueId, radicand: ValueId| {
            let exponent = b.scalar(-0.5);
            let inverse = b.node(Binary { function: Pow }, &[radicand, exponent]);
            b.node(Binary { function: Mul }, &[x, inverse])
        };
        assert_eq!(recognised(&[-1], &[4], divided), ["LayerNormalization"]);
        assert_eq!(recognised(&[2], &[4], reciprocal), ["LayerNormalization"]);
        assert_eq!(recognised(&[1, 2], &[1, 5, 4], power), ["LayerNormalization"]);
        // A scale along other axes stays a product, normalisation over another axis is none.
        assert_eq!(recognised(&[-1], &[5, 4], divided), ["LayerNormalization", "Mul", "Add"]);
        assert_eq!(recognised(&[1], &[4], divided).len(), 10);
    }
}
