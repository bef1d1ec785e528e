//! The graph: nodes, the values between them, and the rules they keep.

use crate::{Fact, GraphError, Identity, Op, TensorFact};
use cutover_tensor::Tensor;
use smallvec::SmallVec;
use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, OnceLock},
};

/// Index of a value in its graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(u32);

/// Index of a node in its graph. Stable while the graph changes; a removed node's is not used again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(u32);

impl ValueId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl NodeId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A model: ONNX semantics, typed. Every value has one source, and a fact.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    pub name: String,
    /// The file's `metadata_props`, and `producer` where it named one.
    pub metadata: BTreeMap<String, String>,
    values: Vec<Value>,
    nodes: Vec<Option<Node>>,
    inputs: Vec<ValueId>,
    outputs: Vec<ValueId>,
}

/// An edge of the graph.
#[derive(Clone, Debug)]
pub struct Value {
    /// Unique in the graph.
    pub name: String,
    pub fact: Fact,
    pub source: Source,
}

/// Where a value comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// An input of the graph.
    Input,
    Constant(Constant),
    /// The `output`-th result of `node`.
    Node {
        node: NodeId,
        output: usize,
    },
    /// Nothing any more: its node was removed, and nothing uses it.
    Removed,
}

/// A tensor known when the model is loaded.
#[derive(Clone, Debug)]
pub struct Constant {
    pub tensor: Tensor,
    /// Digested when somebody asks: that reads every byte, which loading a model does not.
    identity: Arc<OnceLock<Identity>>,
}

impl Constant {
    pub fn new(tensor: Tensor) -> Constant {
        Constant { tensor, identity: Arc::default() }
    }

    /// The constant that `recipe`, an operator with its attributes spelled out, made of constants of these identities.
    pub fn derived(tensor: Tensor, recipe: &str, inputs: &[Identity]) -> Constant {
        Constant { tensor, identity: Arc::new(OnceLock::from(Identity::derived(recipe, inputs))) }
    }

    /// Whether one is a copy of the other; needs no identity.
    pub fn is_clone_of(&self, other: &Constant) -> bool {
        Arc::ptr_eq(&self.identity, &other.identity)
    }

    pub fn identity(&self) -> Identity {
        *self.identity.get_or_init(|| Identity::of_tensor(&self.tensor))
    }
}

/// One operator applied to values. An omitted optional input is `None`; every output has a value, used or not.
#[derive(Clone, Debug)]
pub struct Node {
    /// Unique in the graph.
    pub name: String,
    pub op: Op,
    pub inputs: Vec<Option<ValueId>>,
    pub outputs: Vec<ValueId>,
}

impl Graph {
    pub fn new(name: impl Into<String>) -> Graph {
        Graph { name: name.into(), ..Graph::default() }
    }

    /// Adds an input of the graph.
    pub fn add_input(&mut self, name: impl Into<String>, fact: impl Into<Fact>) -> ValueId {
        let id = self.push_value(name.into(), fact.into(), Source::Input);
        self.inputs.push(id);
        id
    }

    pub fn add_constant(&mut self, name: impl Into<String>, constant: Constant) -> ValueId {
        let fact = TensorFact::of_tensor(&constant.tensor).into();
        self.push_value(name.into(), fact, Source::Constant(constant))
    }

    /// Adds a node whose outputs are new values called `output_names`; their facts are inferred from its inputs'.
    pub fn add_node(
        &mut self,
        name: impl Into<String>,
        op: Op,
        inputs: Vec<Option<ValueId>>,
        output_names: Vec<String>,
    ) -> Result<NodeId, GraphError> {
        let name = name.into();
        let facts = self.infer(&name, &op, &inputs, output_names.len())?;
        let node = NodeId(u32::try_from(self.nodes.len()).expect("below four thousand million nodes"));
        let outputs = output_names
            .into_iter()
            .zip(facts)
            .enumerate()
            .map(|(output, (name, fact))| self.push_value(name, fact, Source::Node { node, output }))
            .collect();
        self.nodes.push(Some(Node { name, op, inputs, outputs }));
        Ok(node)
    }

    /// The facts of the first `outputs` results of `op` applied to `inputs`.
    pub fn infer(
        &self,
        name: &str,
        op: &Op,
        inputs: &[Option<ValueId>],
        outputs: usize,
    ) -> Result<Vec<Fact>, GraphError> {
        let facts: Vec<Option<&Fact>> = inputs.iter().map(|i| i.map(|i| &self.value(i).fact)).collect();
        let context = crate::ops::InferContext { node: name, outputs };
        let at = |source| GraphError::Op { node: name.to_string(), op: op.name().to_string(), source };
        let facts = op.infer(crate::ops::Facts(&facts), &context).map_err(at)?;
        if facts.len() < outputs {
            let message = format!("has {} outputs, {outputs} are named", facts.len());
            return Err(at(crate::OpError::input(message)));
        }
        Ok(facts)
    }

    pub fn set_outputs(&mut self, outputs: Vec<ValueId>) {
        self.outputs = outputs;
    }

    pub fn inputs(&self) -> &[ValueId] {
        &self.inputs
    }

    pub fn outputs(&self) -> &[ValueId] {
        &self.outputs
    }

    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    pub fn value_mut(&mut self, id: ValueId) -> &mut Value {
        &mut self.values[id.index()]
    }

    /// Number of values ever added: every [`ValueId::index`] is below it.
    pub fn value_count(&self) -> usize {
        self.values.len()
    }

    pub fn values(&self) -> impl Iterator<Item = (ValueId, &Value)> {
        self.values_from(0)
    }

    /// As [`Graph::values`], of those added when there were `count`, and later.
    pub(crate) fn values_from(&self, count: usize) -> impl Iterator<Item = (ValueId, &Value)> {
        self.values[count..].iter().zip(count..).map(|(v, i)| (ValueId(i as u32), v))
    }

    /// # Panics
    /// If the node was removed.
    pub fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.index()].as_ref().expect("a node of this graph")
    }

    /// Whether `id` is a node of this graph that was not removed.
    pub fn has_node(&self, id: NodeId) -> bool {
        matches!(self.nodes.get(id.index()), Some(Some(_)))
    }

    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id.index()].as_mut().expect("a node of this graph")
    }

    /// The nodes, in the order they were added.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        self.nodes.iter().enumerate().filter_map(|(i, n)| Some((NodeId(i as u32), n.as_ref()?)))
    }

    pub fn node_count(&self) -> usize {
        self.nodes.iter().flatten().count()
    }

    /// The node that makes `value`, and which of its outputs it is.
    pub fn producer(&self, value: ValueId) -> Option<(NodeId, usize)> {
        match self.value(value).source {
            Source::Node { node, output } => Some((node, output)),
            _ => None,
        }
    }

    pub fn constant(&self, value: ValueId) -> Option<&Constant> {
        match &self.value(value).source {
            Source::Constant(constant) => Some(constant),
            _ => None,
        }
    }

    /// For every value, the nodes that use it (a node that uses it twice is listed twice). Graph outputs are not uses.
    pub fn uses(&self) -> Vec<Vec<NodeId>> {
        let mut uses = vec![Vec::new(); self.values.len()];
        for (id, node) in self.nodes() {
            for input in node.inputs.iter().flatten() {
                uses[input.index()].push(id);
            }
        }
        uses
    }

    /// Makes every use of `old`, graph outputs included, a use of `new`.
    pub fn replace_uses(&mut self, old: ValueId, new: ValueId) {
        let inputs = self.nodes.iter_mut().flatten().flat_map(|n| n.inputs.iter_mut().flatten());
        for id in inputs.chain(self.outputs.iter_mut()).filter(|id| **id == old) {
            *id = new;
        }
    }

    pub fn remove_node(&mut self, id: NodeId) {
        if let Some(node) = self.nodes[id.index()].take() {
            for output in node.outputs {
                self.values[output.index()].source = Source::Removed;
            }
        }
    }

    /// Forgets a constant that nothing uses, so that its bytes can be given back.
    pub fn remove_constant(&mut self, id: ValueId) {
        if let Source::Constant(_) = self.value(id).source {
            self.values[id.index()].source = Source::Removed;
        }
    }

    /// Nodes in an order in which every value is made before it is used; ties keep the order of the file.
    pub fn topological_order(&self) -> Result<Vec<NodeId>, GraphError> {
        let needs = |node: &Node| {
            let made = node.inputs.iter().flatten().filter_map(|&input| self.producer(input));
            made.map(|(producer, _)| producer.index()).collect::<SmallVec<[usize; 4]>>()
        };
        // The users of node `n` are `users[starts[n]..starts[n + 1]]`, once for every use.
        let mut starts = vec![0usize; self.nodes.len() + 1];
        let mut waiting = vec![0usize; self.nodes.len()];
        let mut ready = std::collections::BinaryHeap::new();
        for (id, node) in self.nodes() {
            let needs = needs(node);
            waiting[id.index()] = needs.len();
            needs.iter().for_each(|&producer| starts[producer + 1] += 1);
            if needs.is_empty() {
                ready.push(std::cmp::Reverse(id));
            }
        }
        (1..starts.len()).for_each(|n| starts[n] += starts[n - 1]);
        let mut next = starts.clone();
        let mut users = vec![NodeId(0); starts[self.nodes.len()]];
        for (id, node) in self.nodes() {
            for producer in needs(node) {
                users[next[producer]] = id;
                next[producer] += 1;
            }
        }
        let mut order = Vec::with_capacity(self.nodes.len());
        while let Some(std::cmp::Reverse(id)) = ready.pop() {
            order.push(id);
            for &user in &users[starts[id.index()]..starts[id.index() + 1]] {
                waiting[user.index()] -= 1;
                if waiting[user.index()] == 0 {
                    ready.push(std::cmp::Reverse(user));
                }
            }
        }
        match self.nodes().find(|(id, _)| waiting[id.index()] > 0) {
            Some((_, stuck)) => Err(GraphError::Cycle { node: stuck.name.clone() }),
            None => Ok(order),
        }
    }

    /// Checks every rule of this stage.
    pub fn verify(&self) -> Result<(), GraphError> {
        let rule = |rule, detail: String| Err(GraphError::Rule { rule, detail });
        let mut names = HashSet::new();
        for (_, value) in self.values().filter(|(_, v)| !matches!(v.source, Source::Removed)) {
            if !names.insert(value.name.as_str()) {
                return rule("every value has a name of its own", format!("'{}' is there twice", value.name));
            }
        }
        let mut node_names = HashSet::new();
        for (id, node) in self.nodes() {
            if !node_names.insert(node.name.as_str()) {
                return rule("every node has a name of its own", format!("'{}' is there twice", node.name));
            }
            for &input in node.inputs.iter().flatten() {
                if matches!(self.value(input).source, Source::Removed) {
                    let detail = format!("node '{}' uses '{}'", node.name, self.value(input).name);
                    return rule("nothing uses a removed value", detail);
                }
            }
            for (index, &output) in node.outputs.iter().enumerate() {
                if self.producer(output) != Some((id, index)) {
                    let detail = format!("'{}' of node '{}'", self.value(output).name, node.name);
                    return rule("a node's outputs know their node", detail);
                }
            }
        }
        for &output in &self.outputs {
            if matches!(self.value(output).source, Source::Removed) {
                return rule("every graph output has a source", format!("'{}'", self.value(output).name));
            }
        }
        for (_, value) in self.values() {
            if let (Source::Constant(constant), Fact::Tensor(fact)) = (&value.source, &value.fact) {
                let shape = fact.constant_shape();
                if fact.dtype != constant.tensor.dtype() || shape.as_deref() != Some(constant.tensor.shape().dims()) {
                    let detail = format!("'{}' is {:?}, its fact says {fact}", value.name, constant.tensor);
                    return rule("a constant's fact is that of its tensor", detail);
                }
            }
        }
        self.topological_order().map(|_| ())
    }

    /// A value name that nothing has yet, made from `stem`.
    pub fn unique_value_name(&self, stem: &str) -> String {
        unique(stem, |name| self.values.iter().any(|v| v.name == name))
    }

    /// A node name that nothing has yet, made from `stem`.
    pub fn unique_node_name(&self, stem: &str) -> String {
        unique(stem, |name| self.nodes.iter().flatten().any(|n| n.name == name))
    }

    fn push_value(&mut self, name: String, fact: Fact, source: Source) -> ValueId {
        let id = ValueId(u32::try_from(self.values.len()).expect("below four thousand million values"));
        self.values.push(Value { name, fact, source });
        id
    }
}

fn unique(stem: &str, taken: impl Fn(&str) -> bool) -> String {
    if !taken(stem) {
        return stem.to_string();
    }
    (1..).map(|i| format!("{stem}.{i}")).find(|name| !taken(name)).expect("a free number")
}
