//! Two nodes that compute the same become one.

use super::{Pass, Subject};
use crate::{NodeId, Op, Patch};

pub(super) struct ShareEqual;

impl Pass for ShareEqual {
    fn name(&self) -> &'static str {
        "share-equal"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let node = subject.node(id);
        // A user's own operator need not be a function of its inputs alone.
        if matches!(node.op, Op::Custom(_)) {
            return None;
        }
        if node.inputs.iter().flatten().all(|&input| subject.constant(input).is_some()) {
            return None;
        }
        let same_inputs = |other: &[Option<crate::ValueId>]| {
            other.len() == node.inputs.len()
                && other.iter().zip(&node.inputs).all(|pair| match pair {
                    (Some(a), Some(b)) => subject.same_value(*a, *b),
                    (a, b) => a == b,
                })
        };
        let equal = |&other: &NodeId| {
            let candidate = subject.node(other);
            let same_form = candidate.outputs.len() == node.outputs.len() && candidate.op.same(&node.op);
            // A file can declare of equal values what does not agree.
            let agree = || node.outputs.iter().zip(&candidate.outputs).all(|(&a, &b)| subject.agreed(a, b).is_some());
            same_form && same_inputs(&candidate.inputs) && agree()
        };
        let earlier = subject.alike(id).find(equal)?;
        let mut patch = Patch::new();
        for (&mine, &theirs) in node.outputs.iter().zip(&subject.node(earlier).outputs) {
            patch.replace(mine, theirs);
        }
        Some(patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{Binary, BinaryFunction, Unary, UnaryFunction},
        passes::testing::{Builder, check},
    };

    #[test]
    fn equal_nodes_are_shared_and_others_not() {
        let mut b = Builder::new(1);
        let (x, z) = (b.input("x", &[3]), b.input("z", &[3]));
        let sub = Binary { function: BinaryFunction::Sub };
        let (two, also_two, three) = (b.scalar(2.0), b.scalar(2.0), b.scalar(3.0));
        let parts = [
            b.node(sub.clone(), &[x, two]),
            b.node(sub.clone(), &[x, also_two]),
            b.node(sub.clone(), &[x, three]),
            b.node(sub.clone(), &[two, x]),
            b.node(sub.clone(), &[x, z]),
            b.node(sub.clone(), &[z, x]),
            b.node(sub.clone(), &[x, z]),
        ];
        let mut y = x;
        for part in parts {
            let part = b.node(Unary { function: UnaryFunction::Exp }, &[part]);
            y = b.node(Binary { function: BinaryFunction::Mul }, &[y, part]);
        }
        let left = check(&[&ShareEqual], b.finish(&[y]), 0.0);
        let count = |name: &str| left.iter().filter(|n| *n == name).count();
        assert_eq!((count("Sub"), count("Exp"), count("Mul")), (5, 5, 7));
    }
}
