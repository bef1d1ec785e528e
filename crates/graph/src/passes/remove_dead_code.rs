//! Nodes whose results nobody reads go.

use super::{Pass, Subject};
use crate::{NodeId, Patch};

pub(super) struct RemoveDeadCode;

impl Pass for RemoveDeadCode {
    fn name(&self) -> &'static str {
        "remove-dead-code"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let used = |&output: &_| subject.is_output(output) || !subject.users(output).is_empty();
        let is_dead = !subject.node(id).outputs.iter().any(used);
        is_dead.then(|| Patch { removals: vec![id], ..Patch::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{Unary, UnaryFunction},
        passes::testing::{Builder, check},
    };

    #[test]
    fn a_chain_to_nowhere_goes() {
        let mut b = Builder::new(1);
        let x = b.input("x", &[3]);
        let y = b.node(Unary { function: UnaryFunction::Exp }, &[x]);
        let dead = b.node(Unary { function: UnaryFunction::Neg }, &[y]);
        b.node(Unary { function: UnaryFunction::Abs }, &[dead]);
        assert_eq!(check(&[&RemoveDeadCode], b.finish(&[y]), 0.0), ["Exp"]);
    }
}
