//! Activations that exporters spell out in arithmetic become the operator that they are.
//!
//! Products are compared as a factor and a set of values, so the order in which an exporter multiplied does not matter. Constants must be
//! what the formula says to the precision of f32.

use super::{
    Pass, Subject,
    subject::{is_binary, is_unary},
};
use crate::{
    NodeId, Op, Patch, ValueId,
    ops::{BinaryFunction, Unary, UnaryFunction, VariadicFunction},
};
use cutover_tensor::DType;

pub(super) struct RecogniseActivations;

impl Pass for RecogniseActivations {
    fn name(&self) -> &'static str {
        "recognise-activations"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let node = subject.node(id);
        let output = node.outputs[0];
        if subject.dtype(output) != Some(DType::F32) {
            return None;
        }
        let (input, function) = match &node.op {
            Op::Binary(op) if matches!(op.function, BinaryFunction::Mul | BinaryFunction::Div) => {
                let product = Product::of(subject, output)?;
                gelu(subject, &product).or_else(|| hard_swish(subject, &product))?
            }
            // max(x, 0)
            Op::Variadic(op) if op.function == VariadicFunction::Max && node.inputs.len() == 2 => {
                let (input, bound) = subject.split_constant(node)?;
                (subject.scalar(bound)? == 0.0).then_some((input, UnaryFunction::Relu))?
            }
            _ => return None,
        };
        if !subject.same_type(input, output) {
            return None;
        }
        let mut patch = Patch::new();
        let recognised = patch.node(&node.name, Unary { function }, &[Some(input.into())]);
        patch.replace(output, recognised);
        Some(patch)
    }
}

/// `factor · Π values`.
#[derive(Debug)]
struct Product {
    factor: f64,
    /// Sorted; a value that is squared is there twice.
    values: Vec<ValueId>,
}

impl Product {
    /// Longer products are no activation.
    const VALUES_MAX: usize = 4;

    /// The product that `value` is, through multiplications, divisions by constants and small powers.
    fn of(subject: &Subject, value: ValueId) -> Option<Product> {
        let mut product = Product { factor: 1.0, values: Vec::new() };
        product.expand(subject, value, 0)?;
        product.values.sort_unstable();
        Some(product)
    }

    fn expand(&mut self, subject: &Subject, value: ValueId, depth: usize) -> Option<()> {
        if let Some(scalar) = subject.scalar(value) {
            self.factor *= scalar;
            return Some(());
        }
        let node = subject.producer(value).map(|(_, node)| node).filter(|_| depth < Product::VALUES_MAX);
        if let Some(node) = node {
            let operand = |index| subject.input(node, index);
            if is_binary(node, BinaryFunction::Mul) {
                self.expand(subject, operand(0)?, depth + 1)?;
                return self.expand(subject, operand(1)?, depth + 1);
            }
            if is_binary(node, BinaryFunction::Div)
                && let Some(divisor) = subject.scalar(operand(1)?)
            {
                self.factor /= divisor;
                return self.expand(subject, operand(0)?, depth + 1);
            }
            if is_binary(node, BinaryFunction::Pow)
                && let Some(exponent) = exponent(subject, operand(1)?)
            {
                for _ in 0..exponent {
                    self.push(operand(0)?)?;
                }
                return Some(());
            }
        }
        self.push(value)
    }

    fn push(&mut self, value: ValueId) -> Option<()> {
        self.values.push(value);
        (self.values.len() <= Product::VALUES_MAX).then_some(())
    }

    /// Whether this is `factor · input^power`.
    fn is_power(&self, factor: f64, input: ValueId, power: usize) -> bool {
        close(self.factor, factor) && self.values.len() == power && self.values.iter().all(|&v| v == input)
    }
}

/// 2 or 3, as a float or integer constant.
fn exponent(subject: &Subject, value: ValueId) -> Option<usize> {
    let integer = || subject.integers(value).filter(|v| v.len() == 1).map(|v| v[0] as f64);
    let exponent = subject.scalar(value).or_else(integer)?;
    [2, 3].into_iter().find(|&n| exponent == n as f64)
}

/// Equal as exporters write constants: in f32, perhaps rounded twice.
fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-6 * b.abs()
}

/// The other operand, where `value` is a sum with the constant `addend`.
fn plus(subject: &Subject, value: ValueId, addend: f64) -> Option<ValueId> {
    let (_, node) = subject.producer(value).filter(|(_, n)| is_binary(n, BinaryFunction::Add))?;
    let (other, constant) = subject.split_constant(node)?;
    close(subject.scalar(constant)?, addend).then_some(other)
}

/// `x · ½ · (1 + erf(x / √2))`, or with `tanh(√(2/π) · (x + 0.044715 · x³))` for `erf(…)`.
fn gelu(subject: &Subject, product: &Product) -> Option<(ValueId, UnaryFunction)> {
    if !close(product.factor, 0.5) {
        return None;
    }
    let &[a, b] = product.values.as_slice() else { return None };
    [(a, b), (b, a)].into_iter().find_map(|(input, gate)| {
        let (_, function) = subject.producer(plus(subject, gate, 1.0)?)?;
        let argument = || Product::of(subject, subject.input(function, 0)?);
        if is_unary(function, UnaryFunction::Erf) {
            let scaled = argument()?.is_power(std::f64::consts::FRAC_1_SQRT_2, input, 1);
            return scaled.then_some((input, UnaryFunction::Gelu { tanh: false }));
        }
        let is_tanh = is_unary(function, UnaryFunction::Tanh);
        let argument = argument().filter(|p| is_tanh && close(p.factor, (2.0 / std::f64::consts::PI).sqrt()))?;
        let is_cubic = match argument.values.as_slice() {
            // √(2/π) · (x + 0.044715 · x³)
            [sum] => {
                let (_, sum) = subject.producer(*sum).filter(|(_, n)| is_binary(n, BinaryFunction::Add))?;
                let (a, b) = (subject.input(sum, 0)?, subject.input(sum, 1)?);
                let cubic = if a == input { b } else { a };
                (a == input || b == input) && Product::of(subject, cubic)?.is_power(0.044715, input, 3)
            }
            // √(2/π) · x · (1 + 0.044715 · x²)
            &[a, b] => {
                let sum = if a == input { b } else { a };
                let square = plus(subject, sum, 1.0)?;
                (a == input || b == input) && Product::of(subject, square)?.is_power(0.044715, input, 2)
            }
            _ => false,
        };
        is_cubic.then_some((input, UnaryFunction::Gelu { tanh: true }))
    })
}

/// `x · clip(x + 3, 0, 6) / 6`, or `x · hard_sigmoid(x)` with the slope 1/6.
fn hard_swish(subject: &Subject, product: &Product) -> Option<(ValueId, UnaryFunction)> {
    let &[a, b] = product.values.as_slice() else { return None };
    [(a, b), (b, a)].into_iter().find_map(|(input, gate)| {
        let (_, gate) = subject.producer(gate)?;
        let bounded = subject.input(gate, 0)?;
        let is_gate = match &gate.op {
            Op::Unary(op) => match op.function {
                UnaryFunction::HardSigmoid { alpha, beta } => {
                    bounded == input
                        && close(product.factor, 1.0)
                        && close(alpha.into(), 1.0 / 6.0)
                        && close(beta.into(), 0.5)
                }
                _ => false,
            },
            Op::Clip(_) => {
                let bound = |index| subject.scalar(subject.input(gate, index)?);
                let sixth = close(product.factor, 1.0 / 6.0) && bound(1)? == 0.0 && bound(2)? == 6.0;
                sixth && plus(subject, bounded, 3.0)? == input
            }
            _ => false,
        };
        is_gate.then_some((input, UnaryFunction::HardSwish))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::Clip,
        passes::testing::{Builder, check},
    };
    use BinaryFunction::{Add, Div, Mul, Pow};

    /// The recognised function is computed in one rounding where the spelled one takes several.
    fn recognised(spell: impl Fn(&mut Builder, ValueId) -> ValueId) -> Vec<String> {
        let mut b = Builder::new(4);
        let x = b.symbolic_input("x", &["N", "40"]);
        let y = spell(&mut b, x);
        check(&[&RecogniseActivations], b.finish(&[y]), 1e-6)
    }

    #[test]
    fn gelu_in_every_order() {
        let erf_part = |b: &mut Builder, x: ValueId, divided: bool| {
            let t = if divided { b.with_number(Div, x, 2f32.sqrt()) } else { b.with_number(Mul, x, 0.5f32.sqrt()) };
            let t = b.unary(UnaryFunction::Erf, t);
            b.with_number(Add, t, 1.0)
        };
        for divided in [false, true] {
            let orders: [&dyn Fn(&mut Builder, ValueId) -> ValueId; 4] = [
                &|b, x| {
                    let gate = erf_part(b, x, divided);
                    let y = b.binary(Mul, x, gate);
                    b.with_number(Mul, y, 0.5)
                },
                &|b, x| {
                    let gate = erf_part(b, x, divided);
                    let half = b.with_number(Mul, x, 0.5);
                    b.binary(Mul, half, gate)
                },
                &|b, x| {
                    let gate = erf_part(b, x, divided);
                    let half = b.with_number(Mul, gate, 0.5);
                    b.binary(Mul, x, half)
                },
                &|b, x| {
                    let gate = erf_part(b, x, divided);
                    let y = b.binary(Mul, gate, x);
                    b.with_number(Div, y, 2.0)
                },
            ];
            for order in orders {
                assert_eq!(recognised(order), ["Gelu"]);
            }
        }
    }

    #[test]
    fn gelu_by_tanh() {
        let root = (2.0 / std::f32::consts::PI).sqrt();
        let sum = |b: &mut Builder, x: ValueId| {
            let cube = b.with_number(Pow, x, 3.0);
            let t = b.with_number(Mul, cube, 0.044715);
            let t = b.binary(Add, x, t);
            let t = b.with_number(Mul, t, root);
            let t = b.unary(UnaryFunction::Tanh, t);
            let t = b.with_number(Add, t, 1.0);
            let half = b.with_number(Mul, x, 0.5);
            b.binary(Mul, half, t)
        };
        let factored = |b: &mut Builder, x: ValueId| {
            let t = b.with_number(Mul, x, 0.044715);
            let t = b.binary(Mul, t, x);
            let t = b.with_number(Add, t, 1.0);
            let s = b.with_number(Mul, x, root);
            let t = b.binary(Mul, s, t);
            let t = b.unary(UnaryFunction::Tanh, t);
            let t = b.with_number(Add, t, 1.0);
            let y = b.binary(Mul, x, t);
            b.with_number(Mul, y, 0.5)
        };
        assert_eq!(recognised(sum), ["Gelu"]);
        assert_eq!(recognised(factored), ["Gelu"]);
    }

    #[test]
    fn hard_swish_and_relu() {
        let clipped = |b: &mut Builder, x: ValueId| {
            let t = b.with_number(Add, x, 3.0);
            let (low, high) = (b.scalar(0.0), b.scalar(6.0));
            let t = b.node(Clip, &[t, low, high]);
            let y = b.binary(Mul, x, t);
            b.with_number(Div, y, 6.0)
        };
        let gated = |b: &mut Builder, x: ValueId| {
            let t = b.unary(UnaryFunction::HardSigmoid { alpha: 1.0 / 6.0, beta: 0.5 }, x);
            b.binary(Mul, t, x)
        };
        assert_eq!(recognised(clipped), ["HardSwish"]);
        assert_eq!(recognised(gated), ["HardSwish"]);
        let relu = |b: &mut Builder, x: ValueId| {
            let zero = b.scalar(0.0);
            b.node(crate::ops::Variadic { function: VariadicFunction::Max }, &[x, zero])
        };
        assert_eq!(recognised(relu), ["Relu"]);
    }

    #[test]
    fn what_only_looks_alike_is_left() {
        let wrong_scale = |b: &mut Builder, x: ValueId| {
            let t = b.with_number(Div, x, 1.5);
            let t = b.unary(UnaryFunction::Erf, t);
            let t = b.with_number(Add, t, 1.0);
            let y = b.binary(Mul, x, t);
            b.with_number(Mul, y, 0.5)
        };
        let other_input = |b: &mut Builder, x: ValueId| {
            let z = b.unary(UnaryFunction::Neg, x);
            let t = b.with_number(Div, z, 2f32.sqrt());
            let t = b.unary(UnaryFunction::Erf, t);
            let t = b.with_number(Add, t, 1.0);
            let y = b.binary(Mul, x, t);
            b.with_number(Mul, y, 0.5)
        };
        assert_eq!(recognised(wrong_scale).len(), 5);
        assert_eq!(recognised(other_input).len(), 6);
    }
}
