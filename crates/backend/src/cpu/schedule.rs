//! How a graph is cut: into regions that are compiled whole, and nodes that are interpreted between them.
//!
//! A region holds everything whose shapes follow from the shapes of what enters it, and from the elements of small integer tensors that
//! enter it (a `Reshape`'s target, the `k` of a `TopK`). Nodes whose results only a run can size (`NonZero`), and those of
//! strings, containers and control flow, stand between regions. Every node runs as early as it may, so that there are as few regions as
//! possible: all that does not wait for an interpreted node is the first, all that waits for one of these the second, and so on.

use super::plan::{Region, Setting, Undecided, could_be_known};
use super::segment::Segment;
use cutover_graph::{
    Bindings, Dim, Fact, Graph, Node, NodeId, Plan, TensorFact, ValueId,
    ops::{Facts, InferContext},
};
use cutover_tensor::DType;
use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
};

/// The pieces of a graph in the order they run.
pub(super) struct Schedule {
    pub pieces: Vec<Piece>,
    /// After each piece, the values that nothing reads any more.
    pub released: Vec<Vec<ValueId>>,
    /// Whether the one piece is a segment from the graph's inputs to its outputs.
    pub is_whole: bool,
    interpreted: BTreeSet<NodeId>,
    late: BTreeSet<NodeId>,
}

pub(super) enum Piece {
    Segment(Arc<Segment>),
    Node(NodeId),
}

impl Schedule {
    /// As far as can be told before a run: the first guess, which runs correct.
    pub fn guess(plan: &Plan, setting: Setting<'_>, is_body: bool) -> Schedule {
        let Undecided { late, interpreted } = survey(plan, setting);
        cut(plan, interpreted.into_iter().collect(), late.into_iter().collect(), is_body, &[])
    }

    /// This schedule with what a run has shown; `None` where that is nothing new.
    pub fn corrected(&self, plan: &Plan, undecided: &Undecided, is_body: bool) -> Option<Schedule> {
        let (mut interpreted, mut late) = (self.interpreted.clone(), self.late.clone());
        let known = interpreted.len() + late.len();
        interpreted.extend(&undecided.interpreted);
        late.extend(&undecided.late);
        (interpreted.len() + late.len() > known).then(|| cut(plan, interpreted, late, is_body, &self.pieces))
    }

    pub fn is_interpreted(&self, node: NodeId) -> bool {
        self.interpreted.contains(&node)
    }
}

/// When a value is there: in which round, and whether a segment made it.
#[derive(Clone, Copy)]
struct Made {
    round: usize,
    by_segment: bool,
}

/// Round after round: a segment, then the interpreted nodes that wait for it. Segments that were there before are kept.
fn cut(
    plan: &Plan,
    interpreted: BTreeSet<NodeId>,
    late: BTreeSet<NodeId>,
    is_body: bool,
    before: &[Piece],
) -> Schedule {
    let graph = plan.graph();
    let mut made: Vec<Option<Made>> = vec![None; graph.value_count()];
    let mut rounds: Vec<(Vec<NodeId>, Vec<NodeId>)> = Vec::new();
    for &id in plan.order() {
        let node = graph.node(id);
        let by_segment = !interpreted.contains(&id);
        // What an interpreted node makes, the next segment may read; and what a segment makes, a late node of the next.
        let after = |m: Made| m.round + usize::from(by_segment && (!m.by_segment || late.contains(&id)));
        let round = node.inputs.iter().flatten().filter_map(|v| made[v.index()]).map(after).max().unwrap_or(0);
        node.outputs.iter().for_each(|v| made[v.index()] = Some(Made { round, by_segment }));
        rounds.resize_with(rounds.len().max(round + 1), Default::default);
        let (compiled, interpreted) = &mut rounds[round];
        if by_segment { compiled.push(id) } else { interpreted.push(id) }
    }
    let is_plain_value = |&id: &ValueId| is_plain(&graph.value(id).fact);
    let passes_through = || {
        let mut seen = HashSet::new();
        graph.outputs().iter().any(|&id| graph.producer(id).is_none() || !seen.insert(id))
    };
    let is_whole = interpreted.is_empty()
        && rounds.len() == 1
        && graph.inputs().iter().chain(graph.outputs()).all(is_plain_value)
        // A body hands on what passes through it; a model's outputs are the caller's to place.
        && !(is_body && passes_through());
    let mut pieces = Vec::new();
    for (compiled, interpreted) in rounds {
        if !compiled.is_empty() {
            let region = if is_whole { whole(graph, compiled) } else { region(graph, compiled) };
            let kept = before.iter().find_map(|piece| match piece {
                Piece::Segment(segment) if segment.region == region => Some(Arc::clone(segment)),
                _ => None,
            });
            pieces.push(Piece::Segment(kept.unwrap_or_else(|| Arc::new(Segment::new(region)))));
        }
        pieces.extend(interpreted.into_iter().map(Piece::Node));
    }
    let mut read: HashSet<ValueId> = graph.outputs().iter().copied().collect();
    let mut released: Vec<Vec<ValueId>> = Vec::with_capacity(pieces.len());
    for piece in pieces.iter().rev() {
        let values: Vec<ValueId> = match piece {
            Piece::Segment(segment) => segment.region.inputs.iter().chain(&segment.region.outputs).copied().collect(),
            Piece::Node(id) => {
                graph.node(*id).inputs.iter().flatten().chain(&graph.node(*id).outputs).copied().collect()
            }
        };
        released.push(values.into_iter().filter(|&v| graph.constant(v).is_none() && read.insert(v)).collect());
    }
    released.reverse();
    Schedule { pieces, released, is_whole, interpreted, late }
}

fn whole(graph: &Graph, nodes: Vec<NodeId>) -> Region {
    Region { nodes, inputs: graph.inputs().to_vec(), outputs: graph.outputs().to_vec() }
}

fn region(graph: &Graph, nodes: Vec<NodeId>) -> Region {
    let inside: HashSet<NodeId> = nodes.iter().copied().collect();
    let is_inside = |v: ValueId| graph.producer(v).is_some_and(|(node, _)| inside.contains(&node));
    let mut seen = HashSet::new();
    let enters = |&v: &ValueId| !is_inside(v) && graph.constant(v).is_none();
    let read = nodes.iter().flat_map(|&id| graph.node(id).inputs.iter().flatten().copied());
    let inputs = read.filter(enters).filter(|&v| seen.insert(v)).collect();
    let outside = graph.nodes().filter(|(id, _)| !inside.contains(id));
    let mut read: HashSet<ValueId> = outside.flat_map(|(_, node)| node.inputs.iter().flatten().copied()).collect();
    read.extend(graph.outputs());
    let made = nodes.iter().flat_map(|&id| graph.node(id).outputs.iter().copied());
    let outputs = made.filter(|v| read.contains(v)).collect();
    Region { nodes, inputs, outputs }
}

/// Whether values of this kind have a place in an arena.
fn is_plain(fact: &Fact) -> bool {
    fact.as_tensor().is_some_and(|fact| fact.dtype != DType::String)
}

/// Whether a node can be part of no region, whatever the shapes.
fn stands_alone(graph: &Graph, node: &Node) -> bool {
    let values = node.inputs.iter().flatten().chain(&node.outputs);
    !node.op.subgraphs().is_empty() || !values.clone().all(|&v| is_plain(&graph.value(v).fact))
}

/// Which nodes can't be planned with those before them, as far as inference tells with every unknown extent at 1. What it can't tell is
/// taken for decided, until a run shows better.
fn survey(plan: &Plan, setting: Setting<'_>) -> Undecided {
    let graph = plan.graph();
    let mut undecided = Undecided::default();
    let mut facts: Vec<Option<Fact>> = vec![None; graph.value_count()];
    // Made by a node of a region.
    let mut inside: HashSet<ValueId> = HashSet::new();
    for &id in graph.inputs() {
        facts[id.index()] = imagined(&graph.value(id).fact);
    }
    for &id in plan.order() {
        let node = graph.node(id);
        if stands_alone(graph, node) {
            undecided.interpreted.push(id);
            node.outputs.iter().for_each(|v| facts[v.index()] = imagined(&graph.value(*v).fact));
            continue;
        }
        let fact = |v: ValueId| facts[v.index()].as_ref().or(setting.constants[v.index()].as_ref());
        let known: Vec<Option<&Fact>> = node.inputs.iter().map(|input| input.and_then(fact)).collect();
        if node.inputs.iter().zip(&known).any(|(input, fact)| input.is_some() && fact.is_none()) {
            continue;
        }
        let context = InferContext { node: &node.name, outputs: node.outputs.len() };
        let Ok(inferred) = node.op.infer(Facts(&known), &context) else { continue };
        let is_concrete = |fact: &Fact| fact.as_tensor().is_some_and(|fact| fact.constant_shape().is_some());
        // By what the graph says of the extents: those at 1 here may be any.
        let may_be_known = |v: &&ValueId| could_be_known(&graph.value(**v).fact);
        let unknown = |v: &&ValueId| fact(**v).is_some_and(could_be_known);
        let mut waits = node.inputs.iter().flatten().filter(may_be_known).filter(unknown).peekable();
        let is_decided = inferred.iter().all(is_concrete);
        if !is_decided && waits.peek().is_none() {
            undecided.interpreted.push(id);
        } else if !is_decided && waits.any(|v| inside.contains(v)) {
            undecided.late.push(id);
        }
        let is_inside = undecided.interpreted.last() != Some(&id);
        for (&output, fact) in node.outputs.iter().zip(&inferred) {
            facts[output.index()] = imagined(fact);
            if is_inside {
                inside.insert(output);
            }
        }
    }
    undecided
}

/// `fact` with every symbol at 1; `None` where that gives no shape.
fn imagined(fact: &Fact) -> Option<Fact> {
    let fact = fact.as_tensor()?;
    let mut symbols = BTreeSet::new();
    let dims = fact.shape.as_ref()?;
    dims.iter().for_each(|dim| dim.collect_symbols(&mut symbols));
    let ones: Bindings = symbols.into_iter().map(|symbol| (symbol, 1)).collect();
    let extent = |dim: &Dim| dim.eval(&ones).filter(|&extent| extent >= 0).map(Dim::Const);
    let value = fact.value.clone().filter(|value| value.iter().all(|dim| dim.as_const().is_some()));
    let shape = dims.iter().map(extent).collect::<Option<Vec<Dim>>>()?;
    Some(Fact::Tensor(TensorFact { dtype: fact.dtype, shape: Some(shape), value }))
}
