//! A change that a pass proposes; only the driver of `passes` applies it.

use crate::{Constant, NodeId, Op, ValueId};

/// New nodes, and which values they replace. Made by a pass, applied and re-verified by the driver.
#[derive(Clone, Debug, Default)]
pub struct Patch {
    pub constants: Vec<(String, Constant)>,
    pub nodes: Vec<PatchNode>,
    /// Every use of the value becomes a use of what stands beside it.
    pub replacements: Vec<(ValueId, PatchValue)>,
    /// Nodes that go although nothing replaces them. What a patch leaves unused goes without being named.
    pub removals: Vec<NodeId>,
}

/// A node to add. Its name and its outputs' names are stems, which the driver makes unique.
#[derive(Clone, Debug)]
pub struct PatchNode {
    pub name: String,
    pub op: Op,
    pub inputs: Vec<Option<PatchValue>>,
    pub outputs: usize,
}

/// A value of the graph as it is, or one that the patch brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchValue {
    Existing(ValueId),
    Constant(usize),
    /// Output of the node at this index of [`Patch::nodes`].
    Node {
        node: usize,
        output: usize,
    },
}

impl From<ValueId> for PatchValue {
    fn from(id: ValueId) -> PatchValue {
        PatchValue::Existing(id)
    }
}

impl Patch {
    pub fn new() -> Patch {
        Patch::default()
    }

    pub fn constant(&mut self, name: impl Into<String>, constant: Constant) -> PatchValue {
        self.constants.push((name.into(), constant));
        PatchValue::Constant(self.constants.len() - 1)
    }

    /// Adds a node with one output and gives that output.
    pub fn node(&mut self, name: impl Into<String>, op: impl Into<Op>, inputs: &[Option<PatchValue>]) -> PatchValue {
        self.nodes.push(PatchNode { name: name.into(), op: op.into(), inputs: inputs.to_vec(), outputs: 1 });
        PatchValue::Node { node: self.nodes.len() - 1, output: 0 }
    }

    pub fn replace(&mut self, old: ValueId, new: impl Into<PatchValue>) {
        self.replacements.push((old, new.into()));
    }
}
