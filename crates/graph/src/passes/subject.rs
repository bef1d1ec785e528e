//! The graph as a pass sees it: with the users of every value at hand.

use super::Folding;
use crate::{Constant, Dim, Fact, Graph, Node, NodeId, Op, Source, Symbol, TensorFact, ValueId, ops::Wide};
use cutover_tensor::{DType, Tensor};
use std::{
    collections::BTreeSet,
    hash::{DefaultHasher, Hash, Hasher},
};

/// A graph that is being rewritten. Passes read it; the driver alone changes it.
#[derive(Debug)]
pub struct Subject {
    pub(super) graph: Graph,
    /// For every value, the nodes that use it, once for every use.
    pub(super) uses: Vec<Vec<NodeId>>,
    pub(super) is_output: Vec<bool>,
    /// Symbols of the graph's inputs: the others are made up where an extent is not known.
    pub(super) input_symbols: BTreeSet<Symbol>,
    pub(super) folding: Folding,
    pub(super) alike: Alike,
}

/// Nodes by what they are made from, so that those which may compute the same are found without a search.
///
/// A node's key is a sum over its inputs: replacing one of them costs the same whether it has two or thousands.
#[derive(Debug, Default)]
pub(super) struct Alike {
    /// By value; equal for values that are the same by [`Subject::same_value`].
    values: Vec<u64>,
    /// By node.
    keys: Vec<u64>,
    nodes: BTreeSet<(u64, NodeId)>,
}

impl Alike {
    fn of(graph: &Graph) -> Alike {
        let mut alike = Alike::default();
        graph.nodes().for_each(|(id, _)| alike.add(graph, id));
        alike
    }

    /// Takes note of values that are new.
    pub fn see(&mut self, graph: &Graph) {
        let known = self.values.len();
        self.values.extend(graph.values_from(known).map(|(id, value)| match &value.source {
            Source::Constant(constant) if is_compared(&constant.tensor) => {
                digest(&(constant.tensor.dtype(), constant.tensor.shape().dims(), constant.tensor.bytes()))
            }
            _ => digest(&id),
        }));
    }

    pub fn add(&mut self, graph: &Graph, id: NodeId) {
        self.see(graph);
        let node = graph.node(id);
        let parts = node.inputs.iter().enumerate().map(|(at, &input)| self.part(at, input));
        let key = parts.fold(digest(&std::mem::discriminant(&node.op)), u64::wrapping_add);
        self.keys.resize(self.keys.len().max(id.index() + 1), 0);
        self.keys[id.index()] = key;
        self.nodes.insert((key, id));
    }

    pub fn remove(&mut self, id: NodeId) {
        self.nodes.remove(&(self.keys[id.index()], id));
    }

    /// Input `at` of the node, which was `old`, is `new`.
    pub fn replace(&mut self, id: NodeId, at: usize, old: ValueId, new: ValueId) {
        let (was, is) = (self.part(at, Some(old)), self.part(at, Some(new)));
        self.remove(id);
        let key = &mut self.keys[id.index()];
        *key = key.wrapping_sub(was).wrapping_add(is);
        self.nodes.insert((*key, id));
    }

    fn part(&self, at: usize, input: Option<ValueId>) -> u64 {
        digest(&(at, input.map(|input| self.values[input.index()])))
    }
}

/// The same in every process, so that nothing depends on chance.
fn digest(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// Whether constants are compared by their bytes.
fn is_compared(tensor: &Tensor) -> bool {
    const COMPARED_BYTES: usize = 4096;
    tensor.dtype() != DType::String && tensor.bytes().len() <= COMPARED_BYTES
}

impl Subject {
    pub(super) fn new(graph: Graph, folding: Folding) -> Subject {
        let (uses, alike) = (graph.uses(), Alike::of(&graph));
        let mut is_output = vec![false; graph.value_count()];
        graph.outputs().iter().for_each(|output| is_output[output.index()] = true);
        let mut input_symbols = BTreeSet::new();
        let facts = graph.inputs().iter().filter_map(|&input| graph.value(input).fact.as_tensor());
        facts.filter_map(|f| f.shape.as_ref()).flatten().for_each(|dim| dim.collect_symbols(&mut input_symbols));
        Subject { graph, uses, is_output, input_symbols, folding, alike }
    }

    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    pub fn node(&self, id: NodeId) -> &Node {
        self.graph.node(id)
    }

    /// The nodes that use `value`, once for every use. Being an output of the graph is not a use.
    pub fn users(&self, value: ValueId) -> &[NodeId] {
        &self.uses[value.index()]
    }

    pub fn is_output(&self, value: ValueId) -> bool {
        self.is_output[value.index()]
    }

    /// Nodes before `id` that may compute what it does, the earliest first: with the same kind of operator and the same inputs, but for
    /// chance.
    pub fn alike(&self, id: NodeId) -> impl Iterator<Item = NodeId> {
        let key = self.alike.keys[id.index()];
        let from = self.alike.nodes.range((key, NodeId::default())..(key, id));
        from.map(|&(_, other)| other)
    }

    /// The node that makes `value`, if `value` is its first output.
    pub fn producer(&self, value: ValueId) -> Option<(NodeId, &Node)> {
        match self.graph.producer(value) {
            Some((id, 0)) => Some((id, self.graph.node(id))),
            _ => None,
        }
    }

    /// As [`Subject::producer`], where nothing but one node, once, needs the value: the producer can be fused away.
    pub fn sole_producer(&self, value: ValueId) -> Option<(NodeId, &Node)> {
        self.producer(value).filter(|_| !self.is_output(value) && self.users(value).len() == 1)
    }

    pub fn input(&self, node: &Node, index: usize) -> Option<ValueId> {
        node.inputs.get(index).copied().flatten()
    }

    pub fn fact(&self, value: ValueId) -> Option<&TensorFact> {
        self.graph.value(value).fact.as_tensor()
    }

    pub fn dtype(&self, value: ValueId) -> Option<DType> {
        Some(self.fact(value)?.dtype)
    }

    pub fn shape(&self, value: ValueId) -> Option<&[Dim]> {
        self.fact(value)?.shape.as_deref()
    }

    /// Whether both have one type and, for every value of the symbols, one shape.
    pub fn same_type(&self, a: ValueId, b: ValueId) -> bool {
        match (self.fact(a), self.fact(b)) {
            (Some(x), Some(y)) => x.dtype == y.dtype && x.shape.is_some() && x.shape == y.shape,
            _ => false,
        }
    }

    /// What is known of `old` and of `new` together, for `new` to replace `old`; `None` where they can't hold the same.
    pub(super) fn agreed(&self, old: ValueId, new: ValueId) -> Option<Fact> {
        let (old, new) = (&self.graph.value(old).fact, &self.graph.value(new).fact);
        meet(old, new, &self.input_symbols).filter(|_| !names_differ(old, new, &self.input_symbols))
    }

    pub fn constant(&self, value: ValueId) -> Option<&Constant> {
        self.graph.constant(value)
    }

    /// The elements of a floating-point constant.
    pub fn floats(&self, value: ValueId) -> Option<Vec<f64>> {
        Wide::floats(&self.constant(value)?.tensor).ok()
    }

    /// The integers of an i64 or i32 constant, or of a value whose elements are known.
    pub fn integers(&self, value: ValueId) -> Option<Vec<i64>> {
        match self.constant(value).map(|c| &c.tensor) {
            Some(tensor) => match tensor.dtype() {
                DType::I64 => tensor.to_vec().ok(),
                DType::I32 => Some(tensor.to_vec::<i32>().ok()?.into_iter().map(i64::from).collect()),
                _ => None,
            },
            None => self.fact(value).filter(|f| f.dtype.is_integer())?.constant_value(),
        }
    }

    /// The number that a floating-point constant of one element holds.
    pub fn scalar(&self, value: ValueId) -> Option<f64> {
        let constant = self.constant(value).filter(|c| c.tensor.element_count() == 1)?;
        Wide::floats(&constant.tensor).ok()?.first().copied()
    }

    /// Whether both are one value, or small constants with the same bytes.
    pub fn same_value(&self, a: ValueId, b: ValueId) -> bool {
        let equal = |x: &Tensor, y: &Tensor| {
            x.dtype() == y.dtype() && x.shape() == y.shape() && is_compared(x) && x.bytes() == y.bytes()
        };
        a == b || matches!((self.constant(a), self.constant(b)), (Some(x), Some(y)) if equal(&x.tensor, &y.tensor))
    }

    /// The operand of a binary node that is a constant, and the other one, in whichever order they stand.
    pub fn split_constant(&self, node: &Node) -> Option<(ValueId, ValueId)> {
        let (a, b) = (self.input(node, 0)?, self.input(node, 1)?);
        match (self.constant(a).is_some(), self.constant(b).is_some()) {
            (false, true) => Some((a, b)),
            (true, false) => Some((b, a)),
            _ => None,
        }
    }
}

/// Whether `node` applies the binary `function`.
pub(super) fn is_binary(node: &Node, function: crate::ops::BinaryFunction) -> bool {
    matches!(&node.op, Op::Binary(op) if op.function == function)
}

/// Whether `node` applies the unary `function`.
pub(super) fn is_unary(node: &Node, function: crate::ops::UnaryFunction) -> bool {
    matches!(&node.op, Op::Unary(op) if op.function == function)
}

/// What both facts say of one value together; `None` where they contradict each other. Where they say the same in different words, the
/// words of `old` stay.
pub(super) fn meet(old: &Fact, new: &Fact, input_symbols: &BTreeSet<Symbol>) -> Option<Fact> {
    let boxed = |a: &Fact, b: &Fact| meet(a, b, input_symbols).map(Box::new);
    let (a, b) = match (old, new) {
        (Fact::Tensor(a), Fact::Tensor(b)) => (a, b),
        (Fact::Sequence(a), Fact::Sequence(b)) => return boxed(a, b).map(Fact::Sequence),
        (Fact::Optional(a), Fact::Optional(b)) => return boxed(a, b).map(Fact::Optional),
        (old, new) => return (old == new).then(|| old.clone()),
    };
    let lists = |a: &Option<Vec<Dim>>, b: &Option<Vec<Dim>>| match (a, b) {
        (Some(a), Some(b)) if a.len() != b.len() => None,
        (Some(a), Some(b)) => {
            a.iter().zip(b).map(|(a, b)| meet_dims(a, b, input_symbols)).collect::<Option<Vec<_>>>().map(Some)
        }
        (a, b) => Some(a.clone().or_else(|| b.clone())),
    };
    let met = TensorFact { dtype: a.dtype, shape: lists(&a.shape, &b.shape)?, value: lists(&a.value, &b.value)? };
    (a.dtype == b.dtype).then_some(Fact::Tensor(met))
}

/// Whether an extent of an input, which may be any, would become a number or another input's extent. (Downstream it may: operands that
/// must agree say more of each other.)
fn names_differ(old: &Fact, new: &Fact, input_symbols: &BTreeSet<Symbol>) -> bool {
    let shape = |fact: &Fact| fact.as_tensor().and_then(|f| f.shape.clone()).unwrap_or_default();
    let is_extent = |dim: &Dim| dim.as_symbol().is_some_and(|symbol| input_symbols.contains(symbol));
    let differ = |(a, b): (Dim, Dim)| {
        a != b && (is_extent(&a) || is_extent(&b)) && [&a, &b].iter().all(|d| is_extent(d) || d.as_const().is_some())
    };
    shape(old).into_iter().zip(shape(new)).any(differ)
}

fn meet_dims(old: &Dim, new: &Dim, input_symbols: &BTreeSet<Symbol>) -> Option<Dim> {
    // A made-up symbol says nothing that an expression of the inputs' extents does not.
    let made_up = |dim: &Dim| {
        let mut symbols = BTreeSet::new();
        dim.collect_symbols(&mut symbols);
        !symbols.is_subset(input_symbols)
    };
    match (old.as_const(), new.as_const()) {
        (Some(a), Some(b)) => (a == b).then(|| old.clone()),
        (None, Some(_)) => Some(new.clone()),
        (Some(_), None) => Some(old.clone()),
        (None, None) if made_up(old) && !made_up(new) => Some(new.clone()),
        (None, None) => Some(old.clone()),
    }
}
