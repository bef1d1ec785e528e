//! Two products with numbers in a row become one, where that changes no bit: one of the numbers must be a power of two.

use super::{Pass, Subject, subject::is_binary};
use crate::{
    Constant, Node, NodeId, Patch, ValueId,
    ops::{Binary, BinaryFunction},
};
use cutover_tensor::{DType, Tensor};

pub(super) struct MergeScalars;

impl Pass for MergeScalars {
    fn name(&self) -> &'static str {
        "merge-scalars"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let node = subject.node(id);
        let (input, second) = scaled(subject, node)?;
        let (_, before) = subject.sole_producer(input)?;
        let (input, first) = scaled(subject, before)?;
        let factor = first * second;
        let is_power = |v: f64| v.abs().log2().fract() == 0.0;
        let is_exact = (is_power(first) || is_power(second)) && f64::from(factor as f32) == factor;
        // Far from where intermediate results overflow or lose bits to the subnormals.
        let is_ordinary = [first, second, factor].iter().all(|v| (1e-6..1e6).contains(&v.abs()));
        if !is_exact || !is_ordinary || !subject.same_type(input, node.outputs[0]) {
            return None;
        }
        let mut patch = Patch::new();
        let constant = patch.constant(format!("{}.factor", node.name), Constant::new(Tensor::scalar(factor as f32)));
        let op = Binary { function: BinaryFunction::Mul };
        let product = patch.node(&node.name, op, &[Some(input.into()), Some(constant)]);
        patch.replace(node.outputs[0], product);
        Some(patch)
    }
}

/// The value that `node` multiplies with a number, and the number; a quotient counts where its inverse is exact.
fn scaled(subject: &Subject, node: &Node) -> Option<(ValueId, f64)> {
    let divides = is_binary(node, BinaryFunction::Div);
    if !divides && !is_binary(node, BinaryFunction::Mul) || subject.dtype(node.outputs[0]) != Some(DType::F32) {
        return None;
    }
    let (input, constant) = subject.split_constant(node)?;
    let number = subject.scalar(constant)?;
    match divides {
        false => Some((input, number)),
        true if subject.input(node, 1) == Some(constant) && number.abs().log2().fract() == 0.0 => {
            Some((input, 1.0 / number))
        }
        true => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::testing::{Builder, check};

    #[test]
    fn exact_products_merge() {
        let left = |numbers: &[(BinaryFunction, f32)]| {
            let mut b = Builder::new(8);
            let mut y = b.input("x", &[7]);
            for &(function, number) in numbers {
                let number = b.scalar(number);
                y = b.node(Binary { function }, &[y, number]);
            }
            check(&[&MergeScalars], b.finish(&[y]), 0.0).len()
        };
        use BinaryFunction::{Div, Mul};
        assert_eq!(left(&[(Mul, 0.3), (Mul, 4.0), (Div, 8.0)]), 1);
        assert_eq!(left(&[(Mul, 0.3), (Mul, 0.7)]), 2);
        assert_eq!(left(&[(Div, 3.0), (Mul, 2.0)]), 2);
        assert_eq!(left(&[(Mul, 0.0), (Mul, 2.0)]), 2);
    }
}
