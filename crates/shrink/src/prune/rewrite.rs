//! The graph without the indices that go: weights cut, and every attribute and constant that says a shape written anew.

use super::{
    axes::{AxisId, KeptIndices},
    dependency::Dependencies,
};
use crate::{ShrinkError, edit::sweep};
use cutover_graph::{Constant, Dim, Graph, Node, NodeId, Op, TensorFact, ValueId};
use cutover_tensor::{Tensor, TensorError};

/// The elements that input `index` of `node` holds where its output has the extents that `extent` says: −1 for one that is open, 0 for
/// one that is the input's. `None` where more than that would be needed.
pub(super) fn target(
    all: &Dependencies,
    node: &Node,
    index: usize,
    extent: &dyn Fn(AxisId) -> Dim,
) -> Option<Vec<i64>> {
    let y = all.of.get(node.outputs.first()?)?;
    let own = (*node.inputs.get(index)?)?;
    let own = all.graph.constant(own).and_then(|c| TensorFact::of_tensor(&c.tensor).constant_value());
    let x = node.inputs[0].and_then(|x| all.of.get(&x));
    let mut open = 0;
    let element = |(i, &axis): (usize, &AxisId)| match (extent(axis).as_const(), &own, &node.op) {
        // What an Expand leaves as it is may be 1.
        (Some(_), Some(own), Op::Expand(_)) if own.get(i) == Some(&1) => Some(1),
        (Some(n), ..) => (n > 0).then_some(n),
        (None, Some(own), _) => own.get(i).copied(),
        (None, None, Op::Reshape(op)) if !op.allow_zero => {
            let copied = x.and_then(|x| x.get(i)).is_some_and(|&a| all.axes.extent(a) == all.axes.extent(axis));
            open += i32::from(!copied);
            Some(if copied { 0 } else { -1 })
        }
        _ => None,
    };
    let elements: Option<Vec<i64>> = y.iter().enumerate().map(element).collect();
    elements.filter(|_| open <= 1)
}

impl Dependencies {
    /// The graph in which of every atom only the indices that `kept` names are left. Atoms that are frozen are left as they are.
    ///
    /// # Errors
    /// What the graph's own rules refuse, with the node. The signature is that of the original.
    pub fn remove(&self, kept: &KeptIndices) -> Result<Graph, ShrinkError> {
        let kept: KeptIndices =
            kept.iter().filter(|(id, _)| self.axes.frozen(**id).is_none()).map(|(id, k)| (*id, k.clone())).collect();
        let mut graph = self.graph.clone();
        let extent = |axis: AxisId| self.axes.extent_with(axis, &|atom| kept.get(&atom).map(Vec::len));
        let changed = |value: &ValueId| {
            self.of.get(value).is_some_and(|axes| axes.iter().any(|&a| extent(a) != *self.axes.extent(a)))
        };
        let constants: Vec<ValueId> =
            graph.values().map(|(id, _)| id).filter(|id| graph.constant(*id).is_some() && changed(id)).collect();
        for id in constants {
            let axes = &self.of[&id];
            let stay: Vec<Vec<usize>> = axes.iter().map(|&axis| self.axes.kept(axis, &kept)).collect();
            if let Some(constant) = graph.constant(id) {
                let tensor = cut(&constant.tensor, &stay)
                    .map_err(|source| ShrinkError::Tensor { name: graph.value(id).name.clone(), source })?;
                set_constant(&mut graph, id, tensor);
            }
        }
        let nodes: Vec<NodeId> = graph.topological_order()?;
        for &id in &nodes {
            let node = graph.node(id).clone();
            if node.outputs.iter().chain(node.inputs.iter().flatten()).any(&changed) {
                self.rewrite(&mut graph, id, &node, &extent)?;
            }
            let node = graph.node(id);
            let facts = graph.infer(&node.name, &node.op, &node.inputs, node.outputs.len())?;
            let outputs = node.outputs.clone();
            for (output, fact) in outputs.into_iter().zip(facts) {
                graph.value_mut(output).fact = fact;
            }
        }
        sweep(&mut graph);
        graph.verify()?;
        for &output in graph.outputs() {
            let (before, after) = (&self.graph.value(output).fact, &graph.value(output).fact);
            if before.as_tensor().map(|f| &f.shape) != after.as_tensor().map(|f| &f.shape) {
                let name = &graph.value(output).name;
                return Err(ShrinkError::Signature(format!("output '{name}' was {before}, is {after} after pruning")));
            }
        }
        Ok(graph)
    }

    fn rewrite(
        &self,
        graph: &mut Graph,
        id: NodeId,
        node: &Node,
        extent: &dyn Fn(AxisId) -> Dim,
    ) -> Result<(), ShrinkError> {
        let number = |axis: AxisId| extent(axis).as_const().unwrap_or(1).max(0);
        if let Some(&axis) = self.groups.get(&id) {
            let groups = number(axis) as usize;
            match &mut graph.node_mut(id).op {
                Op::Conv(conv) => conv.group = groups,
                Op::ConvTranspose(conv) => conv.group = groups,
                Op::InstanceNorm(norm) => norm.groups = Some(groups),
                _ => {}
            }
        }
        match &node.op {
            Op::Recurrent(_) => {
                let hidden =
                    node.outputs.iter().find_map(|y| self.of.get(y)?.last()).map(|&axis| number(axis) as usize);
                if let Op::Recurrent(layer) = &mut graph.node_mut(id).op {
                    layer.hidden_size = hidden.or(layer.hidden_size);
                }
                Ok(())
            }
            // The kernel's spatial extents are not touched, and other convolutions have one group.
            Op::Reshape(_) | Op::Expand(_) => self.write_target(graph, id, node, 1, extent),
            Op::Resize(_) if node.inputs.get(3).is_some_and(Option::is_some) => {
                self.write_target(graph, id, node, 3, extent)
            }
            Op::Split(split) => {
                let rank = self.of[&node.outputs[0]].len() as i64;
                let axis = if split.axis < 0 { split.axis + rank } else { split.axis } as usize;
                let sizes: Vec<i64> = node.outputs.iter().map(|y| number(self.of[y][axis])).collect();
                set_numbers(graph, id, 1, sizes)
            }
            Op::Slice(_) => {
                let numbers = |index: usize| {
                    let constant = node.inputs[index].and_then(|v| graph.constant(v))?;
                    TensorFact::of_tensor(&constant.tensor).constant_value()
                };
                let (Some(before), Some(mut starts), Some(mut ends)) = (self.before.get(&id), numbers(1), numbers(2))
                else {
                    return Ok(());
                };
                let axes = node.inputs.get(3).copied().flatten().and_then(|_| numbers(3));
                let y = &self.of[&node.outputs[0]];
                for &(slot, head) in before {
                    let axis = axes.as_ref().map_or(slot as i64, |axes| axes[slot]);
                    let axis = if axis < 0 { axis + y.len() as i64 } else { axis } as usize;
                    starts[slot] = number(head);
                    ends[slot] = number(head) + number(y[axis]);
                }
                set_numbers(graph, id, 1, starts)?;
                set_numbers(graph, id, 2, ends)
            }
            _ => Ok(()),
        }
    }

    fn write_target(
        &self,
        graph: &mut Graph,
        id: NodeId,
        node: &Node,
        index: usize,
        extent: &dyn Fn(AxisId) -> Dim,
    ) -> Result<(), ShrinkError> {
        match target(self, node, index, extent) {
            Some(elements) => set_numbers(graph, id, index, elements),
            None => Ok(()),
        }
    }
}

/// Input `index` of `node` becomes a constant of its own.
fn set_numbers(graph: &mut Graph, node: NodeId, index: usize, numbers: Vec<i64>) -> Result<(), ShrinkError> {
    let name = graph.unique_value_name(&format!("{}.shape", graph.node(node).name));
    let tensor = Tensor::from_vec([numbers.len()], numbers)
        .map_err(|source| ShrinkError::Tensor { name: name.clone(), source })?;
    let id = graph.add_constant(name, Constant::new(tensor));
    let inputs = &mut graph.node_mut(node).inputs;
    inputs.resize(inputs.len().max(index + 1), None);
    inputs[index] = Some(id);
    Ok(())
}

pub(super) fn set_constant(graph: &mut Graph, id: ValueId, tensor: Tensor) {
    let value = graph.value_mut(id);
    value.fact = TensorFact::of_tensor(&tensor).into();
    value.source = cutover_graph::Source::Constant(Constant::new(tensor));
}

/// The elements of `tensor` at the indices that stay, for each axis.
fn cut(tensor: &Tensor, stay: &[Vec<usize>]) -> Result<Tensor, TensorError> {
    let dims = tensor.shape().dims().to_vec();
    let width = tensor.bytes().len() / tensor.element_count().max(1);
    let mut bytes: Vec<u8> = tensor.bytes().to_vec();
    // From the last axis to the first, each time with what is left of those behind.
    let mut inner = width;
    for (axis, indices) in stay.iter().enumerate().rev() {
        if indices.len() < dims[axis] {
            let block = dims[axis] * inner;
            let pieces = |block: &[u8]| indices.iter().flat_map(|&i| block[i * inner..][..inner].to_vec()).collect();
            bytes = bytes.chunks_exact(block).flat_map(|block| -> Vec<u8> { pieces(block) }).collect();
        }
        inner *= indices.len();
    }
    let shape: Vec<usize> = stay.iter().map(Vec::len).collect();
    Tensor::from_bytes(tensor.dtype(), shape, &bytes)
}
