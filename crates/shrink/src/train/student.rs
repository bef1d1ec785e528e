//! A student out of its teacher: some of the layers that a network repeats.
//!
//! Layers are found by their structure: equal subgraphs behind one another, each of which reads the one before through a single value, and nothing
//! else of it. Names mean nothing.

use crate::{
    ShrinkError,
    edit::{replace, sweep},
    plain,
};
use cutover_graph::{Fact, Graph, NodeId, Op, ValueId};
use cutover_tensor::DType;
use std::collections::{HashMap, HashSet};

/// The layers that `graph` repeats, in order: what each reads and what it gives. Empty where it repeats none.
pub fn layers(graph: &Graph) -> Result<Vec<(ValueId, ValueId)>, ShrinkError> {
    let order = graph.topological_order()?;
    let place: HashMap<NodeId, usize> = order.iter().enumerate().map(|(i, &n)| (n, i)).collect();
    let uses = graph.uses();
    // Values that layers may lie between, by the operator that gives them and what they are.
    let mut groups: Vec<(String, Fact, Vec<ValueId>)> = Vec::new();
    for &node in &order {
        let node = graph.node(node);
        let value = node.outputs[0];
        let (name, fact) = (node.op.name(), &graph.value(value).fact);
        match groups.iter_mut().find(|(n, f, _)| *n == name && f == fact) {
            Some((.., values)) => values.push(value),
            None => groups.push((name, fact.clone(), vec![value])),
        }
    }
    let search = Search { graph, place, uses: &uses };
    let mut best: (usize, Vec<(ValueId, ValueId)>) = (0, Vec::new());
    for (.., values) in &groups {
        for period in 1..=values.len() / 2 {
            for first in 0..period.min(values.len()) {
                let (nodes, chain) = search.chain(&values[first..], period);
                if chain.len() > 1 && nodes > best.0 {
                    best = (nodes, chain);
                }
            }
        }
    }
    // What the first layer reads may be of another kind: an input, or a value of another shape as far as is known.
    let mut chain = best.1;
    while let Some(&first) = chain.first()
        && let Some(input) = search.twin(first, first.0)
        && search.closed(input, first.0).is_some()
    {
        chain.insert(0, (input, first.0));
    }
    Ok(chain)
}

/// `graph`, plain, with only the repeated layers of these numbers, counted from 0; and how many it repeats.
///
/// # Errors
/// No repeated layers, or one that is not there.
pub fn student_of(graph: &Graph, keep: &[usize]) -> Result<(Graph, usize), ShrinkError> {
    let mut graph = plain(graph.clone())?;
    let layers = layers(&graph)?;
    if layers.is_empty() {
        return Err(ShrinkError::Option("the model repeats no layers that could be left out".to_string()));
    }
    if keep.is_empty() || keep.iter().any(|&layer| layer >= layers.len()) {
        let message = format!("layers {keep:?} are to be kept, the model repeats {}, counted from 0", layers.len());
        return Err(ShrinkError::Option(message));
    }
    // From the back: what a dropped layer reads is then still what it was.
    for (i, &(input, output)) in layers.iter().enumerate().rev() {
        if !keep.contains(&i) {
            replace(&mut graph, output, input, &[]);
        }
    }
    sweep(&mut graph);
    graph.verify()?;
    Ok((plain(graph)?, layers.len()))
}

struct Search<'a> {
    graph: &'a Graph,
    place: HashMap<NodeId, usize>,
    uses: &'a [Vec<NodeId>],
}

impl Search<'_> {
    /// The longest run of equal layers among `values`, each `period` further than the last, and how many nodes they have in all.
    fn chain(&self, values: &[ValueId], period: usize) -> (usize, Vec<(ValueId, ValueId)>) {
        let ends: Vec<ValueId> = values.iter().step_by(period).copied().collect();
        let mut best = (0, Vec::new());
        let (mut nodes, mut chain): (usize, Vec<(ValueId, ValueId)>) = (0, Vec::new());
        for pair in ends.windows(2) {
            let Some(inside) = self.closed(pair[0], pair[1]) else {
                (nodes, chain) = (0, Vec::new());
                continue;
            };
            match chain.last() {
                Some(&last) if self.twin((pair[0], pair[1]), last.1) != Some(last.0) => {
                    (nodes, chain) = (0, Vec::new())
                }
                _ => {}
            }
            chain.push((pair[0], pair[1]));
            nodes += inside;
            if nodes > best.0 {
                best = (nodes, chain.clone());
            }
        }
        best
    }

    /// The number of nodes between two values, if everything that follows from `from` reaches the rest of the graph through `to` alone.
    fn closed(&self, from: ValueId, to: ValueId) -> Option<usize> {
        let (end, _) = self.graph.producer(to)?;
        let last = self.place[&end];
        let mut inside: HashSet<NodeId> = HashSet::new();
        let mut pending: Vec<NodeId> = self.uses[from.index()].clone();
        if self.graph.outputs().contains(&from) {
            return None;
        }
        while let Some(node) = pending.pop() {
            // Extents may be read from anywhere: they are those of all layers.
            if matches!(self.graph.node(node).op, Op::Shape(_) | Op::Size(_)) {
                continue;
            }
            if self.place[&node] > last {
                return None;
            }
            if !inside.insert(node) {
                continue;
            }
            for &output in &self.graph.node(node).outputs {
                if output == to {
                    continue;
                }
                if self.graph.outputs().contains(&output) {
                    return None;
                }
                pending.extend(&self.uses[output.index()]);
            }
        }
        inside.contains(&end).then_some(inside.len())
    }

    /// What a layer that ends at `end` reads, if it is the same operators as `layer` in the same order, of constants of the same shapes, and of the same
    /// values from outside.
    fn twin(&self, layer: (ValueId, ValueId), end: ValueId) -> Option<ValueId> {
        let mut twins: HashMap<ValueId, ValueId> = HashMap::new();
        let mut pending = vec![(layer.1, end)];
        while let Some((x, y)) = pending.pop() {
            if let Some(&twin) = twins.get(&x) {
                if twin == y {
                    continue;
                }
                return None;
            }
            twins.insert(x, y);
            let is_shape = |v: ValueId| self.graph.value(v).fact.as_tensor().is_some_and(|f| f.dtype == DType::I64);
            let computed = |v: ValueId| is_shape(v) && self.graph.constant(v).is_none();
            if x == layer.0 || x == y || (computed(x) && computed(y)) {
                // Where the layer begins, from outside and the same for both, or an extent, which may be computed another way.
                continue;
            }
            if let (Some(p), Some(q)) = (self.graph.constant(x), self.graph.constant(y)) {
                let alike = p.tensor.dtype() == q.tensor.dtype() && p.tensor.shape() == q.tensor.shape();
                // Numbers of a formula are the same; weights are of the same shape.
                let weighs = p.tensor.dtype().is_float() && p.tensor.element_count() > 1;
                if !alike || !(weighs || p.tensor.bytes() == q.tensor.bytes()) {
                    return None;
                }
                continue;
            }
            let ((m, i), (n, j)) = (self.graph.producer(x)?, self.graph.producer(y)?);
            let (p, q) = (self.graph.node(m), self.graph.node(n));
            if i != j || !p.op.same(&q.op) || p.inputs.len() != q.inputs.len() {
                return None;
            }
            for pair in p.inputs.iter().zip(&q.inputs) {
                match pair {
                    (Some(x), Some(y)) => pending.push((*x, *y)),
                    (None, None) => {}
                    _ => return None,
                }
            }
        }
        twins.get(&layer.0).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cutover_graph::{
        Constant, Dim, TensorFact,
        ops::{Binary, BinaryFunction, MatMul, Unary, UnaryFunction},
    };
    use cutover_tensor::Tensor;

    /// `x + tanh(x·W)·m` so often, `m` an input.
    fn residual(count: usize, odd: Option<usize>) -> Graph {
        let mut graph = Graph::new("model");
        let fact = || TensorFact::new(DType::F32, [Dim::symbol("N"), 4.into()]);
        let (mut x, mask) = (graph.add_input("x", fact()), graph.add_input("m", fact()));
        for layer in 0..count {
            let weight = Tensor::from_vec([4, 4], (0..16).map(|i| (i + layer) as f32).collect()).unwrap();
            let weight = graph.add_constant(format!("w{layer}"), Constant::new(weight));
            let function = if odd == Some(layer) { UnaryFunction::Erf } else { UnaryFunction::Tanh };
            let mut add = |name: &str, op: cutover_graph::Op, inputs: &[ValueId]| {
                let inputs = inputs.iter().map(|&i| Some(i)).collect();
                let node =
                    graph.add_node(format!("{name}{layer}"), op, inputs, vec![format!("{name}.{layer}")]).unwrap();
                graph.node(node).outputs[0]
            };
            let y = add("product", MatMul { activation: None }.into(), &[x, weight]);
            let y = add("function", Unary { function }.into(), &[y]);
            let y = add("masked", Binary { function: BinaryFunction::Mul }.into(), &[y, mask]);
            x = add("sum", Binary { function: BinaryFunction::Add }.into(), &[y, x]);
        }
        graph.set_outputs(vec![x]);
        graph
    }

    #[test]
    fn repeated_layers_are_found_and_left_out() {
        assert_eq!(layers(&residual(6, None)).unwrap().len(), 6);
        let (student, of) = student_of(&residual(6, None), &[0, 2, 5]).unwrap();
        assert_eq!(of, 6);
        let products = student.nodes().filter(|(_, n)| n.op.name() == "MatMul").count();
        assert_eq!(products, 3);
        let output = student.outputs()[0];
        assert_eq!(student.value(output).name, "sum.5");
        // Those that are kept stay what they were.
        let weights: Vec<f32> = student
            .nodes()
            .filter(|(_, n)| n.op.name() == "MatMul")
            .map(|(_, n)| student.constant(n.inputs[1].unwrap()).unwrap().tensor.to_vec::<f32>().unwrap()[0])
            .collect();
        assert_eq!(weights, [0.0, 2.0, 5.0]);
        // One that differs ends the run.
        assert_eq!(layers(&residual(6, Some(4))).unwrap().len(), 4);
        assert!(layers(&residual(1, None)).unwrap().is_empty());
        assert!(student_of(&residual(1, None), &[0]).unwrap_err().to_string().contains("repeats no layers"));
        assert!(student_of(&residual(6, None), &[6]).unwrap_err().to_string().contains("repeats 6"));
    }
}
