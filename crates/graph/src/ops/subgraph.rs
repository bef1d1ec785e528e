//! Graphs inside operators: the branches of `If`, the bodies of `Loop`, `Scan` and `SequenceMap`.
//!
//! A subgraph is closed: what it uses of the graph around it are its last inputs, and inputs of its node. So the graph around it is
//! like any other, and only the ONNX file has names that reach outwards.

use super::{EvalContext, Facts, InferContext, Inputs, Op};
use crate::{Bindings, Dim, Fact, Graph, GraphError, NodeId, OpError, Source, Symbol, TensorFact, ValueId};
use cutover_tensor::Value;
use std::{collections::BTreeSet, fmt, sync::Arc};

/// A graph in an operator. Clones share it.
#[derive(Clone)]
pub struct Subgraph(Arc<Inner>);

struct Inner {
    graph: Graph,
    /// Its nodes in the order they run, and the values that nothing reads after each.
    steps: Vec<(NodeId, Vec<ValueId>)>,
    captured: usize,
}

impl fmt::Debug for Subgraph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Subgraph({} of {} nodes)", self.graph().name, self.0.steps.len())
    }
}

/// The same graph, not an equal one.
impl PartialEq for Subgraph {
    fn eq(&self, other: &Subgraph) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Subgraph {
    /// `graph`, whose last `captured` inputs are values of the graph around it.
    pub fn new(graph: Graph, captured: usize) -> Result<Subgraph, GraphError> {
        debug_assert!(captured <= graph.inputs().len());
        let mut read: BTreeSet<ValueId> = graph.outputs().iter().copied().collect();
        let mut steps = Vec::new();
        for id in graph.topological_order()?.into_iter().rev() {
            let node = graph.node(id);
            let last = node.inputs.iter().flatten().chain(&node.outputs).copied();
            let last = last.filter(|&v| graph.constant(v).is_none() && read.insert(v)).collect();
            steps.push((id, last));
        }
        steps.reverse();
        Ok(Subgraph(Arc::new(Inner { graph, steps, captured })))
    }

    pub fn graph(&self) -> &Graph {
        &self.0.graph
    }

    /// Number of inputs that are values of the graph around it.
    pub fn captured(&self) -> usize {
        self.0.captured
    }

    /// Number of inputs that its operator gives it.
    pub fn formal(&self) -> usize {
        self.graph().inputs().len() - self.0.captured
    }

    /// The subgraph with its graph rewritten; inputs and outputs must stay what they are.
    pub fn rewritten(&self, rewrite: impl FnOnce(Graph) -> Result<Graph, GraphError>) -> Result<Subgraph, GraphError> {
        Subgraph::new(rewrite(self.graph().clone())?, self.0.captured)
    }

    /// What is known of output `at` outside: extents that only the subgraph knows become fresh ones, named by `stem`.
    pub fn output_fact(&self, at: usize, context: &InferContext<'_>, stem: &str) -> Result<Fact, OpError> {
        let graph = self.graph();
        let id = graph.outputs().get(at).ok_or_else(|| {
            OpError::input(format!("'{}' has {} outputs, {} expected", graph.name, graph.outputs().len(), at + 1))
        })?;
        let mut outer = BTreeSet::new();
        for &input in &graph.inputs()[self.formal()..] {
            collect_symbols(&graph.value(input).fact, &mut outer);
        }
        Ok(outward(&graph.value(*id).fact, &outer, context, stem))
    }

    /// Refuses values for its inputs that contradict what it declares of them, since what is known of its outputs follows from that.
    pub fn check(&self, given: &[Value]) -> Result<(), OpError> {
        let graph = self.graph();
        let declared = graph.inputs().iter().map(|&id| graph.value(id));
        let none = Bindings::new();
        // A value that is there may stand where one that may be missing is expected.
        let admits = |fact: &Fact, given: &Value| {
            fact.admits(given, &none) || matches!(fact, Fact::Optional(of) if of.admits(given, &none))
        };
        match declared.zip(given).find(|(declared, given)| !admits(&declared.fact, given)) {
            Some((declared, given)) => {
                let (name, fact) = (&declared.name, &declared.fact);
                Err(OpError::input(format!("'{}': input '{name}' is {fact}, got {given:?}", graph.name)))
            }
            None => Ok(()),
        }
    }

    /// [`Subgraph::eval`], counted among the trips of the run.
    pub fn iterate(&self, inputs: Vec<Value>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        context.count_trip()?;
        self.eval(inputs, context)
    }

    /// Runs it: the formal inputs, then the captured ones.
    ///
    /// # Errors
    /// Another number of inputs, or what an operator in it says, with its node's name.
    pub fn eval(&self, inputs: Vec<Value>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let graph = self.graph();
        if inputs.len() != graph.inputs().len() {
            let (expected, actual) = (graph.inputs().len(), inputs.len());
            return Err(OpError::input(format!("'{}' takes {expected} inputs, {actual} given", graph.name)));
        }
        let mut values: Vec<Option<Value>> = vec![None; graph.value_count()];
        for (id, value) in graph.values() {
            if let Source::Constant(constant) = &value.source {
                values[id.index()] = Some(Value::Tensor(constant.tensor.clone()));
            }
        }
        for (&id, value) in graph.inputs().iter().zip(inputs) {
            values[id.index()] = Some(value);
        }
        for (id, last) in &self.0.steps {
            let node = graph.node(*id);
            let inputs: Vec<Option<&Value>> =
                node.inputs.iter().map(|input| input.and_then(|v| values[v.index()].as_ref())).collect();
            let of_node = EvalContext { outputs: node.outputs.len(), ..*context };
            let results =
                node.op.eval(Inputs(&inputs), &of_node).map_err(|e| inside(&node.name, &node.op.name(), e))?;
            for (&output, value) in node.outputs.iter().zip(results) {
                values[output.index()] = Some(value);
            }
            last.iter().for_each(|v| values[v.index()] = None);
        }
        let take = |id: &ValueId| {
            let missing = || OpError::input(format!("nothing made '{}'", graph.value(*id).name));
            values[id.index()].clone().ok_or_else(missing)
        };
        graph.outputs().iter().map(take).collect()
    }
}

/// How one of an operator's graphs is run: its number among [`Op::subgraphs`], then its inputs.
pub type Run<'a, E> = dyn FnMut(usize, Vec<Value>) -> Result<Vec<Value>, E> + 'a;

impl Op {
    /// The graphs it holds.
    pub fn subgraphs(&self) -> Vec<&Subgraph> {
        match self {
            Op::Branch(op) => op.subgraphs().to_vec(),
            Op::Repeat(op) => vec![&op.body],
            Op::Scan(op) => vec![&op.body],
            Op::SequenceMap(op) => vec![&op.body],
            _ => Vec::new(),
        }
    }

    /// As [`Op::eval`], with `run` in place of the evaluation of its graphs; `None` where it holds none.
    pub fn eval_with<E: From<OpError>>(
        &self,
        inputs: Inputs<'_>,
        context: &EvalContext,
        run: &mut Run<'_, E>,
    ) -> Option<Result<Vec<Value>, E>> {
        match self {
            Op::Branch(op) => Some(op.eval_with(inputs, run)),
            Op::Repeat(op) => Some(op.eval_with(inputs, context, run)),
            Op::Scan(op) => Some(op.eval_with(inputs, context, run)),
            Op::SequenceMap(op) => Some(op.eval_with(inputs, run)),
            _ => None,
        }
    }
}

fn inside(node: &str, op: &str, error: OpError) -> OpError {
    let message = |text: String| format!("node '{node}' ({op}) inside: {text}");
    match error {
        OpError::Input(text) => OpError::Input(message(text)),
        OpError::Unsupported(text) => OpError::Unsupported(message(text)),
        OpError::Resource(text) => OpError::Resource(message(text)),
        OpError::Tensor(error) => OpError::Input(message(error.to_string())),
    }
}

fn collect_symbols(fact: &Fact, into: &mut BTreeSet<Symbol>) {
    match fact {
        Fact::Tensor(tensor) => tensor.shape.iter().flatten().for_each(|dim| dim.collect_symbols(into)),
        Fact::Sequence(of) | Fact::Optional(of) => collect_symbols(of, into),
        Fact::Map { value, .. } => collect_symbols(value, into),
    }
}

fn outward(fact: &Fact, outer: &BTreeSet<Symbol>, context: &InferContext<'_>, stem: &str) -> Fact {
    let known = |dim: &Dim| {
        let mut symbols = BTreeSet::new();
        dim.collect_symbols(&mut symbols);
        symbols.is_subset(outer)
    };
    let extent =
        |(axis, dim): (usize, &Dim)| if known(dim) { dim.clone() } else { context.fresh(&format!("{stem}.{axis}")) };
    match fact {
        Fact::Tensor(TensorFact { dtype, shape: Some(shape), .. }) => {
            TensorFact::new(*dtype, shape.iter().enumerate().map(extent).collect::<Vec<_>>()).into()
        }
        Fact::Tensor(TensorFact { dtype, shape: None, .. }) => TensorFact::unknown_rank(*dtype).into(),
        Fact::Sequence(of) => Fact::Sequence(Box::new(outward(of, outer, context, stem))),
        Fact::Optional(of) => Fact::Optional(Box::new(outward(of, outer, context, stem))),
        Fact::Map { key, value } => Fact::Map { key: *key, value: Box::new(outward(value, outer, context, stem)) },
    }
}

/// What is known of a value that may be either: extents that differ become fresh ones.
///
/// # Errors
/// Values of different kinds or element types.
pub fn either(a: &Fact, b: &Fact, context: &InferContext<'_>, stem: &str) -> Result<Fact, OpError> {
    let both = |a: &Fact, b: &Fact| either(a, b, context, stem).map(Box::new);
    match (a, b) {
        (Fact::Tensor(a), Fact::Tensor(b)) if a.dtype == b.dtype => Ok(match (&a.shape, &b.shape) {
            (Some(a_shape), Some(b_shape)) if a_shape.len() == b_shape.len() => {
                let extent = |(axis, (a, b)): (usize, (&Dim, &Dim))| match a == b {
                    true => a.clone(),
                    false => context.fresh(&format!("{stem}.{axis}")),
                };
                let dims = a_shape.iter().zip(b_shape).enumerate().map(extent);
                TensorFact::new(a.dtype, dims.collect::<Vec<_>>()).into()
            }
            _ => TensorFact::unknown_rank(a.dtype).into(),
        }),
        (Fact::Sequence(a), Fact::Sequence(b)) => Ok(Fact::Sequence(both(a, b)?)),
        (Fact::Optional(a), Fact::Optional(b)) => Ok(Fact::Optional(both(a, b)?)),
        (Fact::Map { key, value }, Fact::Map { key: other, value: with }) if key == other => {
            Ok(Fact::Map { key: *key, value: both(value, with)? })
        }
        (a, b) => Err(OpError::input(format!("may be {a} or {b}: one type expected"))),
    }
}

/// The captured values of `subgraph`, which begin at input `from` of its node.
pub fn captured(subgraph: &Subgraph, inputs: &Inputs<'_>, from: usize) -> Result<Vec<Value>, OpError> {
    let value = |at| inputs.get(at).cloned().ok_or_else(|| OpError::input(format!("captured value {at} is missing")));
    (from..from + subgraph.captured()).map(value).collect()
}

/// Number of the node's own inputs, those before the captured values of `subgraphs`.
pub fn own_inputs(facts: &Facts<'_>, subgraphs: &[&Subgraph]) -> Result<usize, OpError> {
    let captured: usize = subgraphs.iter().map(|s| s.captured()).sum();
    facts.len().checked_sub(captured).ok_or_else(|| OpError::input("captured values are missing"))
}
