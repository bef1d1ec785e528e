//! Two backends as one: what the preferred one takes runs there, every other node on the other, and the placement says why.
//!
//! A plan is cut into as few pieces as the order of its nodes allows; values between pieces are the host's. What a backend finds only when it
//! knows the shapes, at compile or in a run, moves the node it names to the other backend, and only ever that way.

use crate::{
    Backend, CompileError, CompileOptions, DeviceInfo, Executable, Footprint, Input, Output, Peak, PlacedNode,
    Placement, Precision, ResourceError, RunContext, RunError, Session, SessionMemory, Signature, Support,
    binding::{bind_inputs, check_outputs, check_result},
};
use cutover_graph::{Bindings, Graph, Node, NodeId, Plan, ValueId};
use cutover_tensor::Value;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// `preferred` for whatever it takes, `other` for the rest. With `strict` a node that `preferred` does not take is an error.
pub fn partition(preferred: Arc<dyn Backend>, other: Arc<dyn Backend>, strict: bool) -> Arc<dyn Backend> {
    Arc::new(Partition { backends: Arc::new(Backends { preferred, other }), strict })
}

struct Backends {
    preferred: Arc<dyn Backend>,
    other: Arc<dyn Backend>,
}

struct Partition {
    backends: Arc<Backends>,
    strict: bool,
}

struct PartitionExecutable {
    backends: Arc<Backends>,
    plan: Plan,
    options: CompileOptions,
    strict: bool,
    signature: Signature,
    /// What a run has shown makes it a finer one.
    cut: Mutex<Arc<Cut>>,
    placement: Placement,
    footprint: Footprint,
}

/// A plan in pieces.
struct Cut {
    /// Nodes that the preferred backend does not take, and why.
    refused: BTreeMap<NodeId, String>,
    pieces: Vec<Piece>,
}

struct Piece {
    executable: Arc<dyn Executable>,
    inputs: Vec<ValueId>,
    outputs: Vec<ValueId>,
    /// Values that nothing after it reads.
    released: Vec<ValueId>,
}

impl Backend for Partition {
    fn describe(&self) -> DeviceInfo {
        self.backends.preferred.describe()
    }

    fn supports(&self, graph: &Graph, node: &Node) -> Support {
        match self.backends.preferred.supports(graph, node) {
            Support::No { reason } if self.strict => Support::No { reason },
            Support::No { reason } => Support::Fallback { reason },
            support => support,
        }
    }

    fn measure_peak(&self) -> Option<Peak> {
        self.backends.preferred.measure_peak()
    }

    fn driver(&self) -> Option<String> {
        self.backends.preferred.driver()
    }

    fn compile(&self, plan: &Plan, options: &CompileOptions) -> Result<Arc<dyn Executable>, CompileError> {
        let plan = crate::compose::compose(plan)?;
        let graph = plan.graph();
        let mut refused = BTreeMap::new();
        for &id in plan.order() {
            if let Support::No { reason } = self.backends.preferred.supports(graph, graph.node(id)) {
                refused.insert(id, reason);
            }
        }
        let cut = Cut::new(&self.backends, &plan, *options, refused)?;
        check_strict(graph, &cut, self.strict)?;
        let placement = cut.placement(&plan, &self.backends);
        let mut footprint = Footprint::default();
        for piece in &cut.pieces {
            let of = piece.executable.footprint();
            footprint.weight_bytes += of.weight_bytes;
            footprint.shared_bytes += of.shared_bytes;
            footprint.session_bytes += of.session_bytes;
        }
        Ok(Arc::new(PartitionExecutable {
            backends: Arc::clone(&self.backends),
            signature: Signature::of(graph),
            options: *options,
            strict: self.strict,
            cut: Mutex::new(Arc::new(cut)),
            placement,
            footprint,
            plan,
        }))
    }
}

fn check_strict(graph: &Graph, cut: &Cut, strict: bool) -> Result<(), CompileError> {
    if !strict || cut.refused.is_empty() {
        return Ok(());
    }
    let name = |(&id, reason): (&NodeId, &String)| {
        format!("'{}' ({}): {reason}", graph.node(id).name, graph.node(id).op.name())
    };
    let names: Vec<String> = cut.refused.iter().map(name).collect();
    Err(CompileError::Options(format!("{} nodes would not run where they shall: {}", names.len(), names.join("; "))))
}

impl Cut {
    /// Cuts the plan, and cuts it again where compiling a piece shows that a node can't stay in it.
    fn new(
        backends: &Backends,
        plan: &Plan,
        options: CompileOptions,
        mut refused: BTreeMap<NodeId, String>,
    ) -> Result<Cut, CompileError> {
        loop {
            match Cut::try_new(backends, plan, options, &refused) {
                Ok(pieces) => return Ok(Cut { refused, pieces }),
                Err(CompileError::Unsupported { node, op, reason }) => {
                    let graph = plan.graph();
                    let found = graph.nodes().find(|(_, of)| of.name == node).map(|(id, _)| id);
                    match found.filter(|id| !refused.contains_key(id)) {
                        Some(id) => drop(refused.insert(id, reason)),
                        None => return Err(CompileError::Unsupported { node, op, reason }),
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn try_new(
        backends: &Backends,
        plan: &Plan,
        options: CompileOptions,
        refused: &BTreeMap<NodeId, String>,
    ) -> Result<Vec<Piece>, CompileError> {
        let graph = plan.graph();
        let compile = |plan: &Plan, is_preferred: bool| match (is_preferred, options.precision) {
            (true, _) => backends.preferred.compile(plan, &options),
            // What one has for its own products alone, the other computes exactly.
            (false, Precision::Tf32) => {
                backends.other.compile(plan, &CompileOptions { precision: Precision::F32, ..options })
            }
            (false, _) => backends.other.compile(plan, &options),
        };
        if refused.is_empty() || refused.len() == plan.order().len() {
            let executable = compile(plan, refused.is_empty())?;
            let (inputs, outputs) = (graph.inputs().to_vec(), graph.outputs().to_vec());
            return Ok(vec![Piece { executable, inputs, outputs, released: Vec::new() }]);
        }
        let mut pieces = Vec::new();
        for (nodes, is_preferred) in rounds(plan, refused) {
            let (sub, inputs, outputs) = part(graph, &nodes)?;
            let executable = compile(&Plan::new(sub)?, is_preferred)?;
            pieces.push(Piece { executable, inputs, outputs, released: Vec::new() });
        }
        let mut read: HashSet<ValueId> = graph.outputs().iter().copied().collect();
        for piece in pieces.iter_mut().rev() {
            let values = piece.inputs.iter().chain(&piece.outputs).copied();
            piece.released = values.filter(|&value| read.insert(value)).collect();
        }
        Ok(pieces)
    }

    fn placement(&self, plan: &Plan, backends: &Backends) -> Placement {
        let graph = plan.graph();
        let other = backends.other.describe().backend;
        let reasons: HashMap<&str, &str> =
            self.refused.iter().map(|(&id, reason)| (graph.node(id).name.as_str(), reason.as_str())).collect();
        let placed = self.pieces.iter().flat_map(|piece| piece.executable.placement().nodes.iter().cloned());
        let nodes = placed.map(|node| match reasons.get(node.node.as_str()) {
            Some(reason) if node.backend == other => {
                let and = if node.reason.is_empty() { String::new() } else { format!("; there: {}", node.reason) };
                PlacedNode { reason: format!("{reason}{and}"), ..node }
            }
            _ => node,
        });
        Placement { nodes: nodes.collect() }
    }
}

/// Nodes that run together, one backend after the other: each as early as what it reads allows.
fn rounds(plan: &Plan, refused: &BTreeMap<NodeId, String>) -> Vec<(Vec<NodeId>, bool)> {
    let graph = plan.graph();
    let mut made: HashMap<ValueId, usize> = HashMap::new();
    // Even rounds are the preferred backend's, odd ones the other's.
    let mut rounds: Vec<Vec<NodeId>> = Vec::new();
    for &id in plan.order() {
        let node = graph.node(id);
        let after = node.inputs.iter().flatten().filter_map(|value| made.get(value).copied()).max().unwrap_or(0);
        let parity = usize::from(refused.contains_key(&id));
        let round = if after % 2 == parity { after } else { after + 1 };
        made.extend(node.outputs.iter().map(|&output| (output, round)));
        rounds.resize_with(rounds.len().max(round + 1), Vec::new);
        rounds[round].push(id);
    }
    let numbered = rounds.into_iter().enumerate().filter(|(_, nodes)| !nodes.is_empty());
    numbered.map(|(round, nodes)| (nodes, round % 2 == 0)).collect()
}

/// `nodes` as a graph of their own, and which values of the whole enter and leave it.
fn part(graph: &Graph, nodes: &[NodeId]) -> Result<(Graph, Vec<ValueId>, Vec<ValueId>), CompileError> {
    let inside: HashSet<NodeId> = nodes.iter().copied().collect();
    let mut part = Graph::new(graph.name.clone());
    let mut mapped: HashMap<ValueId, ValueId> = HashMap::new();
    let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
    for &id in nodes {
        let node = graph.node(id);
        let mut read = Vec::with_capacity(node.inputs.len());
        for &input in &node.inputs {
            let Some(value) = input else {
                read.push(None);
                continue;
            };
            let of = graph.value(value);
            let new = mapped.get(&value).copied().unwrap_or_else(|| match graph.constant(value) {
                Some(constant) => part.add_constant(of.name.clone(), constant.clone()),
                None => {
                    inputs.push(value);
                    part.add_input(of.name.clone(), of.fact.clone())
                }
            });
            mapped.insert(value, new);
            read.push(Some(new));
        }
        let names = node.outputs.iter().map(|&output| graph.value(output).name.clone()).collect();
        let new = part.add_node(node.name.clone(), node.op.clone(), read, names)?;
        let made = part.node(new).outputs.clone();
        for (&old, new) in node.outputs.iter().zip(made) {
            // What the whole graph knows of it, inference over a part of it may not.
            part.value_mut(new).fact = graph.value(old).fact.clone();
            mapped.insert(old, new);
        }
    }
    let outside = graph.nodes().filter(|(id, _)| !inside.contains(id));
    let mut wanted: HashSet<ValueId> = outside.flat_map(|(_, node)| node.inputs.iter().flatten().copied()).collect();
    wanted.extend(graph.outputs());
    for output in nodes.iter().flat_map(|&id| graph.node(id).outputs.iter()) {
        if wanted.contains(output) {
            outputs.push(*output);
        }
    }
    part.set_outputs(outputs.iter().map(|output| mapped[output]).collect());
    Ok((part, inputs, outputs))
}

impl PartitionExecutable {
    fn cut(&self) -> MutexGuard<'_, Arc<Cut>> {
        self.cut.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the node that a run of `cut` named; `false` where that is nothing new.
    fn learn(&self, cut: &Arc<Cut>, node: &str, reason: &str) -> Result<bool, CompileError> {
        let mut current = self.cut();
        if !Arc::ptr_eq(&current, cut) {
            return Ok(true);
        }
        let found = self.plan.graph().nodes().find(|(_, of)| of.name == node).map(|(id, _)| id);
        let Some(id) = found.filter(|id| !self.strict && !cut.refused.contains_key(id)) else { return Ok(false) };
        let mut refused = cut.refused.clone();
        refused.insert(id, reason.to_string());
        *current = Arc::new(Cut::new(&self.backends, &self.plan, self.options, refused)?);
        Ok(true)
    }
}

impl Executable for PartitionExecutable {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn footprint(&self) -> Footprint {
        self.footprint
    }

    fn weights(&self, visit: &mut dyn FnMut(usize, u64)) {
        let cut = Arc::clone(&self.cut());
        cut.pieces.iter().for_each(|piece| piece.executable.weights(visit));
    }

    fn placement(&self) -> &Placement {
        &self.placement
    }

    fn session(self: Arc<Self>, memory: SessionMemory) -> Result<Box<dyn Session>, ResourceError> {
        let cut = Arc::clone(&self.cut());
        let sessions = sessions(&cut, &memory)?;
        Ok(Box::new(PartitionSession { executable: self, memory, cut, sessions }))
    }
}

fn sessions(cut: &Cut, memory: &SessionMemory) -> Result<Vec<Box<dyn Session>>, ResourceError> {
    cut.pieces.iter().map(|piece| Arc::clone(&piece.executable).session(memory.clone())).collect()
}

struct PartitionSession {
    executable: Arc<PartitionExecutable>,
    memory: SessionMemory,
    cut: Arc<Cut>,
    sessions: Vec<Box<dyn Session>>,
}

impl Session for PartitionSession {
    fn run(
        &mut self,
        inputs: &[Input<'_>],
        outputs: &mut [Output<'_>],
        context: &RunContext<'_>,
    ) -> Result<(), RunError> {
        let executable = Arc::clone(&self.executable);
        loop {
            let cut = Arc::clone(&executable.cut());
            if !Arc::ptr_eq(&cut, &self.cut) {
                self.sessions = sessions(&cut, &self.memory)?;
                self.cut = cut;
            }
            match self.run_pieces(inputs, outputs, context) {
                Err(RunError::Unsupported { node, op, reason }) => match executable.learn(&self.cut, &node, &reason) {
                    Ok(true) => {}
                    Ok(false) => return Err(RunError::Unsupported { node, op, reason }),
                    Err(error) => {
                        let reason = format!("{reason}; and without it: {error}");
                        return Err(RunError::Unsupported { node, op, reason });
                    }
                },
                result => return result,
            }
        }
    }
}

impl PartitionSession {
    fn run_pieces(
        &mut self,
        inputs: &[Input<'_>],
        outputs: &mut [Output<'_>],
        context: &RunContext<'_>,
    ) -> Result<(), RunError> {
        let executable = &self.executable;
        let graph = executable.plan.graph();
        let signature = &executable.signature;
        if let ([piece], [session]) = (&self.cut.pieces[..], &mut self.sessions[..])
            && piece.inputs == graph.inputs()
            && piece.outputs == graph.outputs()
        {
            return session.run(inputs, outputs, context);
        }
        let mut symbols = Bindings::new();
        bind_inputs(signature, inputs, &mut symbols)?;
        check_outputs(signature, outputs, &symbols)?;
        let mut values: HashMap<ValueId, Value> = HashMap::new();
        let given: HashMap<ValueId, &Input<'_>> = graph.inputs().iter().copied().zip(inputs).collect();
        for (piece, session) in self.cut.pieces.iter().zip(&mut self.sessions) {
            let read = |id: &ValueId| match (values.get(id), given.get(id)) {
                (Some(value), _) => Input::Value(value),
                (None, Some(input)) => (*input).clone(),
                (None, None) => unreachable!("pieces come in the order of their values"),
            };
            let entering: Vec<Input<'_>> = piece.inputs.iter().map(read).collect();
            let mut leaving: Vec<Output<'_>> = piece.outputs.iter().map(|_| Output::Allocate(None)).collect();
            session.run(&entering, &mut leaving, context)?;
            let made = piece.outputs.iter().copied().zip(leaving).filter_map(|(id, output)| match output {
                Output::Allocate(Some(value)) => Some((id, value)),
                _ => None,
            });
            let made: Vec<(ValueId, Value)> = made.collect();
            values.extend(made);
            piece.released.iter().for_each(|id| drop(values.remove(id)));
        }
        for ((&id, binding), output) in graph.outputs().iter().zip(&signature.outputs).zip(outputs) {
            let value = match (values.get(&id), given.get(&id), graph.constant(id)) {
                (Some(value), ..) => value.clone(),
                (None, Some(Input::View(view)), _) => Value::Tensor(view.to_tensor()),
                (None, Some(Input::Value(value)), _) => (*value).clone(),
                (None, None, Some(constant)) => Value::Tensor(constant.tensor.clone()),
                (None, None, None) => unreachable!("every output has a source"),
            };
            match output {
                Output::Discard => {}
                Output::Allocate(place) => *place = Some(value),
                Output::Write(view) => {
                    let Value::Tensor(tensor) = &value else {
                        let kind = value.kind().to_string();
                        return Err(RunError::OutputKind { name: binding.name.clone(), kind });
                    };
                    check_result(&binding.name, tensor.dtype(), tensor.shape(), view)?;
                    view.bytes_mut().copy_from_slice(tensor.bytes());
                }
            }
        }
        Ok(())
    }
}
