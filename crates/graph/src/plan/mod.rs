//! A decluttered, ordered graph: what backends compile.

use crate::{Graph, GraphError, NodeId};

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
}
