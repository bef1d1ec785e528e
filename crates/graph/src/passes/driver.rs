//! Applies patches, and checks what each did.
//!
//! The cost of a patch is that of its own neighbourhood: facts are inferred again only as far downstream as they change. What was
//! known of a value stays known of whatever replaces it, since both hold the same elements.

use super::{Folding, Pass, PassOptions, PassReport, Step, Subject, subject::meet};
use crate::{Fact, Graph, GraphError, NodeId, Patch, PatchValue, Source, ValueId};
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

pub(super) fn run(
    graph: Graph,
    passes: &[&dyn Pass],
    options: &PassOptions,
) -> Result<(Graph, PassReport), GraphError> {
    graph.verify()?;
    let nodes_before = graph.node_count();
    let steps_max = 1000 + 20 * nodes_before;
    let limit = options.stop_after.unwrap_or(usize::MAX);
    let mut driver = Driver::new(graph, options.folding);
    'rounds: loop {
        let steps_before = driver.steps.len();
        for &pass in passes {
            let steps_before = driver.steps.len();
            let mut nodes = Queue::of(driver.order()?);
            while let Some(node) = nodes.pop() {
                if driver.steps.len() >= limit {
                    break 'rounds;
                }
                if !driver.subject.graph.has_node(node) {
                    continue;
                }
                driver.work += 1 + driver.subject.node(node).inputs.len();
                if let Some(patch) = pass.propose(&driver.subject, node) {
                    let again = driver.apply(pass.name(), node, &patch).map_err(|e| driver.blame(pass, e))?;
                    if options.verify_each_patch {
                        driver.verify().map_err(|e| driver.blame(pass, e))?;
                    }
                    nodes.extend(again);
                }
                if driver.steps.len() > steps_max {
                    let detail = format!("{} patches on a graph of {nodes_before} nodes", driver.steps.len());
                    return Err(driver.blame(pass, GraphError::Rule { rule: "passes come to an end", detail }));
                }
            }
            if driver.steps.len() > steps_before {
                driver.verify().map_err(|e| driver.blame(pass, e))?;
            }
        }
        if driver.steps.len() == steps_before {
            break;
        }
    }
    let Driver { subject, steps, work, .. } = driver;
    let nodes_after = subject.graph.node_count();
    Ok((subject.graph, PassReport { steps, nodes_before, nodes_after, work }))
}

/// Nodes to look at, each once however often it was asked for meanwhile: one that reads thousands of values is not looked at again for
/// every one of them.
#[derive(Default)]
struct Queue {
    nodes: VecDeque<NodeId>,
    /// By node.
    is_waiting: Vec<bool>,
}

impl Queue {
    fn of(nodes: impl IntoIterator<Item = NodeId>) -> Queue {
        let mut queue = Queue::default();
        queue.extend(nodes);
        queue
    }

    fn extend(&mut self, nodes: impl IntoIterator<Item = NodeId>) {
        for node in nodes {
            self.is_waiting.resize(self.is_waiting.len().max(node.index() + 1), false);
            if !std::mem::replace(&mut self.is_waiting[node.index()], true) {
                self.nodes.push_back(node);
            }
        }
    }

    fn pop(&mut self) -> Option<NodeId> {
        let node = self.nodes.pop_front()?;
        self.is_waiting[node.index()] = false;
        Some(node)
    }
}

struct Driver {
    subject: Subject,
    steps: Vec<Step>,
    /// As [`PassReport::work`].
    work: usize,
    /// The nodes in order, until a patch changes the graph.
    order: Option<Vec<NodeId>>,
    value_names: HashSet<String>,
    node_names: HashSet<String>,
    /// The graph's inputs and outputs as they were.
    signature: Vec<(String, Fact)>,
}

impl Driver {
    fn new(graph: Graph, folding: Folding) -> Driver {
        let in_use = graph.values().filter(|(_, v)| !matches!(v.source, Source::Removed));
        Driver {
            value_names: in_use.map(|(_, v)| v.name.clone()).collect(),
            node_names: graph.nodes().map(|(_, n)| n.name.clone()).collect(),
            signature: signature(&graph),
            subject: Subject::new(graph, folding),
            steps: Vec::new(),
            work: 0,
            order: None,
        }
    }

    fn order(&mut self) -> Result<Vec<NodeId>, GraphError> {
        if self.order.is_none() {
            self.order = Some(self.subject.graph.topological_order()?);
        }
        Ok(self.order.clone().unwrap_or_default())
    }

    fn blame(&self, pass: &dyn Pass, source: GraphError) -> GraphError {
        GraphError::Pass { pass: pass.name().to_string(), step: self.steps.len(), source: Box::new(source) }
    }

    /// The rules of the graph, and that its inputs and outputs are what they were.
    fn verify(&self) -> Result<(), GraphError> {
        self.subject.graph.verify()?;
        for ((was, known), (name, fact)) in self.signature.iter().zip(signature(&self.subject.graph)) {
            if *was != name || meet(known, &fact, &self.subject.input_symbols).is_none() {
                let detail = format!("'{was}' of {known} became '{name}' of {fact}");
                return Err(GraphError::Rule { rule: "a model's inputs and outputs stay what they are", detail });
            }
        }
        Ok(())
    }

    /// Applies `patch`, which `pass` proposed at `anchor`: the nodes that a pass may now find changed. A patch that would make an
    /// output of the graph the same value as an input or as another output is left alone, for each needs its own name.
    fn apply(&mut self, pass: &'static str, anchor: NodeId, patch: &Patch) -> Result<Vec<NodeId>, GraphError> {
        let nameless = |&(old, new): &(ValueId, PatchValue)| match new {
            PatchValue::Existing(new) if self.subject.is_output(old) => {
                self.subject.is_output(new) || self.subject.graph.producer(new).is_none()
            }
            PatchValue::Constant(_) => self.subject.is_output(old),
            _ => false,
        };
        let leaving = self.leaving(patch);
        if patch.replacements.iter().any(nameless) || (patch.replacements.is_empty() && leaving.is_empty()) {
            return Ok(Vec::new());
        }
        let step =
            Step { pass, node: self.subject.node(anchor).name.clone(), description: self.describe(patch, &leaving) };
        self.steps.push(step);
        self.order = None;
        self.free_names(patch, &leaving);
        let (constants, nodes) = self.add(patch)?;
        let resolve = |value: PatchValue, graph: &Graph| match value {
            PatchValue::Existing(id) => id,
            PatchValue::Constant(index) => constants[index],
            PatchValue::Node { node, output } => graph.node(nodes[node]).outputs[output],
        };
        let mut changed = Queue::default();
        let mut again = nodes.clone();
        for &(old, new) in &patch.replacements {
            let new = resolve(new, &self.subject.graph);
            again.extend(self.replace(old, new, &nodes, &mut changed)?);
        }
        self.remove(&leaving, patch);
        self.infer_again(changed)?;
        Ok(again)
    }

    /// Nodes of which nothing is needed once `patch` is applied, users before what they use.
    fn leaving(&self, patch: &Patch) -> Vec<NodeId> {
        let targets = patch.replacements.iter().map(|&(_, new)| new);
        let referenced = patch.nodes.iter().flat_map(|n| n.inputs.iter().flatten().copied()).chain(targets);
        let kept: HashSet<ValueId> =
            referenced.filter_map(|v| if let PatchValue::Existing(id) = v { Some(id) } else { None }).collect();
        let replaced: HashSet<ValueId> = patch.replacements.iter().map(|&(old, _)| old).collect();
        let mut lost: HashMap<ValueId, usize> = HashMap::new();
        let (mut leaving, mut seen) = (Vec::new(), HashSet::new());
        let producer = |value: ValueId| self.subject.graph.producer(value).map(|(node, _)| node);
        let mut waiting: Vec<NodeId> = patch.replacements.iter().filter_map(|&(old, _)| producer(old)).collect();
        waiting.extend(&patch.removals);
        while let Some(id) = waiting.pop() {
            let node = self.subject.node(id);
            let needed = |value: &ValueId| {
                let used = || self.subject.users(*value).len() > lost.get(value).copied().unwrap_or(0);
                kept.contains(value) || (!replaced.contains(value) && (self.subject.is_output(*value) || used()))
            };
            if seen.contains(&id) || node.outputs.iter().any(needed) {
                continue;
            }
            seen.insert(id);
            leaving.push(id);
            for &input in node.inputs.iter().flatten() {
                *lost.entry(input).or_default() += 1;
                waiting.extend(producer(input));
            }
        }
        leaving
    }

    fn describe(&self, patch: &Patch, leaving: &[NodeId]) -> String {
        let mut gone: Vec<NodeId> = leaving.to_vec();
        gone.sort_unstable();
        let list = |names: Vec<String>, none: &str| if names.is_empty() { none.to_string() } else { names.join(" + ") };
        let gone = gone.iter().map(|&id| self.subject.node(id).op.name()).collect();
        let come = patch.nodes.iter().map(|n| n.op.name()).collect();
        let none = match (patch.replacements.is_empty(), patch.constants.is_empty()) {
            (true, _) => "nothing",
            (false, true) => "a value that is there",
            (false, false) => "a constant",
        };
        format!("{} -> {}", list(gone, "another use"), list(come, none))
    }

    /// What leaves gives its names to what comes.
    fn free_names(&mut self, patch: &Patch, leaving: &[NodeId]) {
        for &id in leaving {
            let node = self.subject.graph.node(id);
            self.node_names.remove(&node.name);
            for &output in &node.outputs {
                self.value_names.remove(&self.subject.graph.value(output).name);
            }
        }
        for &(old, _) in &patch.replacements {
            if self.subject.is_output(old) && !self.leaves(old, leaving) {
                let name = self.subject.graph.value(old).name.clone();
                self.subject.graph.value_mut(old).name = unique(&format!("{name}.inner"), &mut self.value_names);
                self.value_names.remove(&name);
            }
        }
    }

    fn leaves(&self, value: ValueId, leaving: &[NodeId]) -> bool {
        self.subject.graph.producer(value).is_some_and(|(node, _)| leaving.contains(&node))
    }

    /// The patch's constants and nodes. A value that replaces another takes its name, if that is free.
    fn add(&mut self, patch: &Patch) -> Result<(Vec<ValueId>, Vec<NodeId>), GraphError> {
        let wanted = |value: PatchValue| patch.replacements.iter().find(|&&(_, new)| new == value).map(|&(old, _)| old);
        // Outputs of the graph keep their names for certain.
        let reserved: Vec<(PatchValue, String)> = patch
            .replacements
            .iter()
            .filter(|(old, _)| self.subject.is_output(*old))
            .map(|&(old, new)| (new, self.signature_name(old)))
            .collect();
        self.value_names.extend(reserved.iter().map(|(_, name)| name.clone()));
        let name = |driver: &mut Driver, value: PatchValue, stem: &str| {
            if let Some((_, name)) = reserved.iter().find(|(reserved, _)| *reserved == value) {
                return name.clone();
            }
            let stem = wanted(value).map_or(stem.to_string(), |old| driver.subject.graph.value(old).name.clone());
            unique(&stem, &mut driver.value_names)
        };
        let mut constants = Vec::with_capacity(patch.constants.len());
        for (index, (stem, constant)) in patch.constants.iter().enumerate() {
            let name = name(self, PatchValue::Constant(index), stem);
            constants.push(self.subject.graph.add_constant(name, constant.clone()));
            self.subject.uses.push(Vec::new());
            self.subject.is_output.push(false);
        }
        self.subject.alike.see(&self.subject.graph);
        let mut nodes: Vec<NodeId> = Vec::with_capacity(patch.nodes.len());
        for (index, node) in patch.nodes.iter().enumerate() {
            let resolve = |value: PatchValue| match value {
                PatchValue::Existing(id) => id,
                PatchValue::Constant(index) => constants[index],
                PatchValue::Node { node, output } => self.subject.graph.node(nodes[node]).outputs[output],
            };
            let inputs: Vec<Option<ValueId>> = node.inputs.iter().map(|input| input.map(resolve)).collect();
            let outputs =
                (0..node.outputs).map(|output| name(self, PatchValue::Node { node: index, output }, &node.name));
            let outputs: Vec<String> = outputs.collect();
            let stem = unique(&node.name, &mut self.node_names);
            let id = self.subject.graph.add_node(stem, node.op.clone(), inputs.clone(), outputs)?;
            self.subject.uses.resize(self.subject.graph.value_count(), Vec::new());
            self.subject.is_output.resize(self.subject.graph.value_count(), false);
            inputs.iter().flatten().for_each(|input| self.subject.uses[input.index()].push(id));
            self.subject.alike.add(&self.subject.graph, id);
            nodes.push(id);
        }
        Ok((constants, nodes))
    }

    /// The name that the graph's output `value` is known by.
    fn signature_name(&self, value: ValueId) -> String {
        let graph = &self.subject.graph;
        let position = graph.outputs().iter().position(|&output| output == value).expect("an output of the graph");
        self.signature[graph.inputs().len() + position].0.clone()
    }

    /// Makes every use of `old` but those by the patch's own `nodes` a use of `new`, and gives their nodes; nodes whose inputs are known
    /// better, or otherwise, go to `changed`.
    fn replace(
        &mut self,
        old: ValueId,
        new: ValueId,
        nodes: &[NodeId],
        changed: &mut Queue,
    ) -> Result<BTreeSet<NodeId>, GraphError> {
        let subject = &mut self.subject;
        let (was, is) = (subject.graph.value(old), subject.graph.value(new));
        let Some(known) = subject.agreed(old, new) else {
            let detail = format!("'{}' of {} was to be replaced by {}", was.name, was.fact, is.fact);
            return Err(GraphError::Rule { rule: "what replaces a value has its type and shape", detail });
        };
        let differs = was.fact != known || is.fact != known;
        let is_made = matches!(is.source, Source::Node { .. });
        if is_made && is.fact != known {
            subject.graph.value_mut(new).fact = known;
            changed.extend(subject.uses[new.index()].iter().copied());
        }
        let (own, users): (Vec<_>, Vec<_>) =
            std::mem::take(&mut subject.uses[old.index()]).into_iter().partition(|u| nodes.contains(u));
        let moved: BTreeSet<NodeId> = users.iter().copied().collect();
        for &user in &moved {
            for (at, input) in subject.graph.node_mut(user).inputs.iter_mut().enumerate() {
                if *input == Some(old) {
                    *input = Some(new);
                    subject.alike.replace(user, at, old, new);
                }
            }
        }
        if differs {
            changed.extend(moved.iter().copied());
        }
        subject.uses[old.index()] = own;
        subject.uses[new.index()].extend(users);
        if subject.is_output[old.index()] {
            let name = self.signature_name(old);
            let subject = &mut self.subject;
            let outputs = subject.graph.outputs().iter().map(|&o| if o == old { new } else { o }).collect();
            subject.graph.set_outputs(outputs);
            subject.is_output[old.index()] = false;
            subject.is_output[new.index()] = true;
            let value = subject.graph.value_mut(new);
            if value.name != name {
                self.value_names.remove(&value.name);
                value.name = name.clone();
                self.value_names.insert(name);
            }
        }
        Ok(moved)
    }

    fn remove(&mut self, leaving: &[NodeId], patch: &Patch) {
        let subject = &mut self.subject;
        let mut unused: Vec<ValueId> = patch.replacements.iter().map(|&(old, _)| old).collect();
        for &id in leaving {
            for input in subject.graph.node(id).inputs.iter().copied().flatten() {
                let uses = &mut subject.uses[input.index()];
                if let Some(at) = uses.iter().position(|&user| user == id) {
                    uses.swap_remove(at);
                }
                unused.push(input);
            }
            subject.alike.remove(id);
            subject.graph.remove_node(id);
        }
        for value in unused {
            let is_used = !subject.uses[value.index()].is_empty() || subject.is_output[value.index()];
            if !is_used && subject.graph.constant(value).is_some() {
                self.value_names.remove(&subject.graph.value(value).name);
                subject.graph.remove_constant(value);
            }
        }
    }

    /// Infers the facts of nodes whose inputs' facts changed, and of theirs.
    fn infer_again(&mut self, mut changed: Queue) -> Result<(), GraphError> {
        while let Some(id) = changed.pop() {
            if !self.subject.graph.has_node(id) {
                continue;
            }
            let node = self.subject.graph.node(id);
            self.work += 1 + node.inputs.len();
            let facts = self.subject.graph.infer(&node.name, &node.op, &node.inputs, node.outputs.len())?;
            let outputs = node.outputs.clone();
            for (output, fact) in outputs.into_iter().zip(facts) {
                let value = self.subject.graph.value(output);
                let Some(known) = meet(&value.fact, &fact, &self.subject.input_symbols) else {
                    let detail = format!("'{}' of {} would be {fact}", value.name, value.fact);
                    return Err(GraphError::Rule { rule: "facts downstream of a patch are not contradicted", detail });
                };
                if value.fact != known {
                    self.subject.graph.value_mut(output).fact = known;
                    changed.extend(self.subject.users(output).iter().copied());
                }
            }
        }
        Ok(())
    }
}

fn signature(graph: &Graph) -> Vec<(String, Fact)> {
    let values = graph.inputs().iter().chain(graph.outputs()).map(|&id| graph.value(id));
    values.map(|v| (v.name.clone(), v.fact.clone())).collect()
}

fn unique(stem: &str, taken: &mut HashSet<String>) -> String {
    let numbered = (1..).map(|i| format!("{stem}.{i}"));
    let name = [stem.to_string()].into_iter().chain(numbered).find(|n| !taken.contains(n)).expect("a free number");
    taken.insert(name.clone());
    name
}
