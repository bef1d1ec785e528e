//! A decluttered, ordered graph: what backends compile.
//!
//! Which values share memory, and where, is a backend's choice; [`arena`] has the algorithm for it.

pub mod arena;

use crate::{Graph, GraphError, NodeId};
use std::collections::HashSet;

/// A graph after its passes, with the order its nodes run in. Shapes may be symbolic; nothing here is bound to a machine.
#[derive(Clone, Debug)]
pub struct Plan {
    graph: Graph,
    order: Vec<NodeId>,
}

impl Plan {
    /// Orders a graph that passed its own [`Graph::verify`].
    pub fn new(graph: Graph) -> Result<Plan, GraphError> {
        graph.verify()?;
        let order = graph.topological_order()?;
        Ok(Plan { graph, order })
    }

    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Every node once, after all that it needs.
    pub fn order(&self) -> &[NodeId] {
        &self.order
    }

    /// Checks every rule of this stage, those of the graph included.
    pub fn verify(&self) -> Result<(), GraphError> {
        self.graph.verify()?;
        let rule = |rule, detail: String| Err(GraphError::Rule { rule, detail });
        let mut made = HashSet::new();
        for &id in &self.order {
            let node = self.graph.node(id);
            if node.outputs.iter().any(|&output| !made.insert(output)) {
                return rule("a plan runs every node once", format!("'{}' comes twice", node.name));
            }
            let missing = |&&input: &&_| self.graph.producer(input).is_some() && !made.contains(&input);
            if let Some(&input) = node.inputs.iter().flatten().find(missing) {
                let detail = format!("'{}' runs before '{}' is made", node.name, self.graph.value(input).name);
                return rule("a plan makes every value before it is used", detail);
            }
        }
        if self.order.len() != self.graph.node_count() {
            let detail = format!("{} of {} nodes are in the order", self.order.len(), self.graph.node_count());
            return rule("a plan runs every node once", detail);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ops::UnaryFunction, passes::testing::Builder};

    #[test]
    fn an_order_runs_every_node_once_and_after_its_inputs() {
        let mut b = Builder::new(1);
        let x = b.input("x", &[2]);
        let y = b.unary(UnaryFunction::Neg, x);
        let y = b.unary(UnaryFunction::Exp, y);
        let plan = Plan::new(b.finish(&[y])).unwrap();
        plan.verify().unwrap();
        let (first, second) = (plan.order[0], plan.order[1]);
        let check = |order: Vec<NodeId>, expected: &str| {
            let plan = Plan { order, ..plan.clone() };
            assert_eq!(plan.verify().unwrap_err().to_string(), expected);
        };
        check(vec![second, first], "a plan makes every value before it is used: 'n1' runs before 'v0' is made");
        check(vec![first, first, second], "a plan runs every node once: 'n0' comes twice");
        check(vec![first], "a plan runs every node once: 1 of 2 nodes are in the order");
    }
}
