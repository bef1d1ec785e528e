//! Recurrent layers: their units go, a row of every gate each, in both directions.

use super::{axes::AxisId, dependency::Rule};
use cutover_graph::{Dim, Graph, NodeId, Op, ValueId, ops::Recurrent};

/// Initial states of zeros are left out: that is what they are without, and a shape that a run computes would hold the layer's size.
pub(super) fn without_zero_states(graph: &mut Graph) {
    let nodes: Vec<NodeId> = graph.nodes().map(|(id, _)| id).collect();
    for id in nodes {
        if !matches!(graph.node(id).op, Op::Recurrent(_)) {
            continue;
        }
        for slot in [5, 6] {
            let state = graph.node(id).inputs.get(slot).copied().flatten();
            if state.is_some_and(|state| is_zero(graph, state)) {
                graph.node_mut(id).inputs[slot] = None;
            }
        }
    }
    crate::edit::sweep(graph);
}

/// Whether all elements of `value` are 0, whatever its shape.
fn is_zero(graph: &Graph, value: ValueId) -> bool {
    if let Some(constant) = graph.constant(value) {
        return constant.tensor.bytes().iter().all(|&byte| byte == 0);
    }
    let Some((node, _)) = graph.producer(value) else { return false };
    let node = graph.node(node);
    match &node.op {
        Op::ConstantOfShape(op) => op.value.bytes().iter().all(|&byte| byte == 0),
        Op::Expand(_) | Op::Reshape(_) | Op::Squeeze(_) | Op::Unsqueeze(_) | Op::Transpose(_) | Op::Slice(_) => {
            node.inputs[0].is_some_and(|input| is_zero(graph, input))
        }
        _ => false,
    }
}

impl Rule<'_> {
    /// `W` and `R` hold a row of each unit for every gate, and `R` a column; sequences, directions and gates keep their extents.
    pub(super) fn recurrent(&mut self, layer: &Recurrent) -> Option<()> {
        let (x, w, r) = (self.input(0)?, self.input(1)?, self.input(2)?);
        let (&[first, second, features], &[directions, rows, columns], &[r_directions, r_rows, units]) =
            (&x[..], &w[..], &r[..])
        else {
            return None;
        };
        let (steps, samples) = if layer.batch_first { (second, first) } else { (first, second) };
        self.freeze(steps, "goes over it step by step");
        self.freeze(directions, "runs in this direction");
        self.unify(directions, r_directions);
        self.unify(features, columns);
        self.gates(rows, layer.cell.gates(), units);
        self.gates(r_rows, layer.cell.gates(), units);
        if let Some(bias) = self.input(3) {
            let &[own, rows] = &bias[..] else { return None };
            self.unify(directions, own);
            self.gates(rows, 2 * layer.cell.gates(), units);
        }
        if let Some(lengths) = self.input(4) {
            self.same(&lengths, &[samples])?;
        }
        let state = match layer.batch_first {
            false => [directions, samples, units],
            true => [samples, directions, units],
        };
        for index in [5, 6] {
            if let Some(initial) = self.input(index) {
                self.same(&initial, &state)?;
            }
        }
        if let Some(peepholes) = self.input(7) {
            let &[own, rows] = &peepholes[..] else { return None };
            self.unify(directions, own);
            self.gates(rows, 3, units);
        }
        let every = match layer.batch_first {
            false => [steps, directions, samples, units],
            true => [samples, steps, directions, units],
        };
        for (index, axes) in [&every[..], &state, &state].into_iter().enumerate() {
            if let Some(y) = self.output(index) {
                self.same(&y, axes)?;
            }
        }
        Some(())
    }

    /// `rows` are so many blocks of a row for each unit.
    fn gates(&mut self, rows: AxisId, blocks: usize, units: AxisId) {
        let gates = self.all.axes.add(Dim::from(blocks));
        self.freeze(gates, "has so many gates");
        self.grouped(rows, gates, units);
    }
}
