//! What each operator says of the axes of its inputs and outputs: which lose the same indices, and which may lose none.
//!
//! An operator that is not listed freezes all it touches, and so does every axis that an operator mixes (softmax, sums, windows): what is
//! removed must not change what stays.

use super::{
    axes::{Axes, AxisId},
    recurrent::without_zero_states,
};
use cutover_graph::{
    Constant, Dim, Graph, Node, NodeId, Op, TensorFact, ValueId,
    ops::{normalize_axes, normalize_axis},
};
use std::collections::{HashMap, HashSet};

/// Constants of up to so many elements that several nodes read are given to each on its own: equal zeros tie no layers together.
const UNSHARED_ELEMENTS: usize = 1 << 16;

/// A graph with the axes of its values.
#[derive(Clone, Debug)]
pub struct Dependencies {
    pub graph: Graph,
    pub axes: Axes,
    /// The axes of every tensor of known rank.
    pub of: HashMap<ValueId, Vec<AxisId>>,
    /// The groups of grouped convolutions and norms.
    pub(super) groups: HashMap<NodeId, AxisId>,
    /// For every axis that a `Slice` cuts, what lies before the cut.
    pub(super) before: HashMap<NodeId, Vec<(usize, AxisId)>>,
}

/// What is left alone though it could be removed.
#[derive(Clone, Debug, Default)]
pub struct Restrictions {
    /// Nodes whose weights keep their shapes.
    pub exclude: HashSet<String>,
    /// Whether channels that a layer or group norm takes its mean over may go: that changes what the others become, and fine-tuning must
    /// make up for it. Off, what stays is exactly what it was.
    pub through_norms: bool,
}

impl Dependencies {
    /// Of `graph`, which should be [`plain`](crate::plain()).
    pub fn new(mut graph: Graph, restrictions: &Restrictions) -> Dependencies {
        without_zero_states(&mut graph);
        unshare(&mut graph);
        let mut axes = Axes::default();
        let mut of = HashMap::new();
        for (id, value) in graph.values() {
            if let Some(shape) = value.fact.as_tensor().and_then(|fact| fact.shape.as_ref()) {
                of.insert(id, shape.iter().map(|dim| axes.add(dim.clone())).collect());
            }
        }
        let (groups, before) = (HashMap::new(), HashMap::new());
        let mut all = Dependencies { graph, axes, of, groups, before };
        for (ids, what) in [(all.graph.inputs().to_vec(), "an input"), (all.graph.outputs().to_vec(), "an output")] {
            ids.into_iter().for_each(|id| all.freeze_value(id, &format!("is {what} of the model")));
        }
        let nodes: Vec<NodeId> = all.graph.nodes().map(|(id, _)| id).collect();
        for id in nodes {
            let node = all.graph.node(id).clone();
            let rule = Rule { all: &mut all, id, reason: format!("{} '{}'", node.op.name(), node.name), node: &node };
            rule.apply(restrictions);
            if restrictions.exclude.contains(&node.name) {
                for &value in node.inputs.iter().flatten() {
                    if all.graph.constant(value).is_some() {
                        all.freeze_value(value, &format!("belongs to '{}', which is excluded", node.name));
                    }
                }
            }
        }
        all.axes.keep_inner_factors("is a part of each head or group: these go whole");
        all
    }

    fn freeze_value(&mut self, value: ValueId, reason: &str) {
        for axis in self.of.get(&value).cloned().unwrap_or_default() {
            self.axes.freeze(axis, reason);
        }
    }
}

/// Gives every reader of a small constant its own.
fn unshare(graph: &mut Graph) {
    let mut read = HashSet::new();
    let nodes: Vec<NodeId> = graph.nodes().map(|(id, _)| id).collect();
    for id in nodes {
        for slot in 0..graph.node(id).inputs.len() {
            let Some(value) = graph.node(id).inputs[slot] else { continue };
            let Some(constant) = graph.constant(value) else { continue };
            if read.insert(value) || constant.tensor.element_count() > UNSHARED_ELEMENTS {
                continue;
            }
            let tensor = constant.tensor.clone();
            let name = graph.unique_value_name(&graph.value(value).name);
            graph.node_mut(id).inputs[slot] = Some(graph.add_constant(name, Constant::new(tensor)));
        }
    }
}

/// One node's say.
pub(super) struct Rule<'a> {
    pub(super) all: &'a mut Dependencies,
    id: NodeId,
    node: &'a Node,
    /// The operator and the node.
    reason: String,
}

impl Rule<'_> {
    fn apply(mut self, restrictions: &Restrictions) {
        if self.try_apply(restrictions).is_none() {
            let reason = format!("{} mixes it in a way that is not known", self.reason);
            for value in self.node.inputs.iter().flatten().chain(&self.node.outputs) {
                self.all.freeze_value(*value, &reason);
            }
        }
    }

    /// `None` where this node is not understood.
    fn try_apply(&mut self, restrictions: &Restrictions) -> Option<()> {
        match &self.node.op {
            Op::Unary(_)
            | Op::Binary(_)
            | Op::Variadic(_)
            | Op::Where(_)
            | Op::Clip(_)
            | Op::Cast(_)
            | Op::Identity(_)
            | Op::Dropout(_)
            | Op::Predicate(_)
            | Op::BiasGelu(_) => self.elementwise(),
            Op::Conv(conv) => self.convolution(conv.group),
            Op::ConvTranspose(conv) => self.transposed_convolution(conv.group),
            Op::MatMul(_) => self.matmul(),
            Op::Gemm(gemm) => self.gemm(gemm.transpose_a, gemm.transpose_b),
            Op::Einsum(einsum) => self.einsum(&einsum.equation),
            Op::Recurrent(layer) => self.recurrent(layer),
            Op::BatchNorm(norm) if norm.training.is_none() && !norm.per_element => self.channel_parameters(1..5),
            Op::InstanceNorm(norm) => self.instance_norm(norm.groups, restrictions),
            Op::LayerNorm(norm) => self.layer_norm(norm.axis, restrictions),
            Op::Softmax(softmax) => self.softmax(softmax.axis, softmax.coerced),
            Op::Lrn(_) => {
                let (x, y) = (self.input(0)?, self.output(0)?);
                self.freeze(*x.get(1)?, "sums over its neighbours");
                self.same(&x, &y)
            }
            Op::Reduce(reduce) => self.reduce(reduce.keep_dims, reduce.noop_with_empty_axes),
            Op::MaxPool(_) | Op::AveragePool(_) | Op::LpPool(_) | Op::GlobalPool(_) => self.pool(),
            Op::Resize(_) => self.resize(),
            Op::Pad(_) => self.pad(),
            Op::Flatten(_) | Op::Squeeze(_) | Op::Unsqueeze(_) => self.reshape(),
            Op::Reshape(_) => {
                self.reshape()?;
                self.target(1)
            }
            Op::Expand(_) => {
                self.elementwise_of(&[0])?;
                self.target(1)
            }
            Op::Transpose(transpose) => {
                let (x, y) = (self.input(0)?, self.output(0)?);
                let reversed = || (0..x.len()).rev().collect();
                let order = transpose.permutation.clone().unwrap_or_else(reversed);
                self.same(&order.iter().map(|&axis| x.get(axis).copied()).collect::<Option<Vec<_>>>()?, &y)
            }
            Op::Concat(concat) => self.concat(concat.axis),
            Op::Split(split) => self.split(split.axis),
            Op::Slice(_) => self.slice(),
            Op::Gather(gather) => self.gather(gather.axis),
            Op::DepthSpace(op) => self.depth_space(op.to_space, op.block, op.depth_first),
            Op::Shape(shape) => self.shape(shape.start, shape.end),
            _ => None,
        }
    }

    fn value(&self, index: usize) -> Option<ValueId> {
        *self.node.inputs.get(index)?
    }

    pub(super) fn input(&self, index: usize) -> Option<Vec<AxisId>> {
        self.all.of.get(&self.value(index)?).cloned()
    }

    pub(super) fn output(&self, index: usize) -> Option<Vec<AxisId>> {
        self.all.of.get(self.node.outputs.get(index)?).cloned()
    }

    fn numbers(&self, index: usize) -> Option<Vec<i64>> {
        let constant = self.all.graph.constant(self.value(index)?)?;
        TensorFact::of_tensor(&constant.tensor).constant_value()
    }

    fn extent(&self, axis: AxisId) -> Option<i64> {
        self.all.axes.extent(axis).as_const()
    }

    pub(super) fn freeze(&mut self, axis: AxisId, does: &str) {
        self.all.axes.freeze(axis, &format!("{} {does}", self.reason));
    }

    pub(super) fn unify(&mut self, a: AxisId, b: AxisId) {
        let reason = format!("{} joins axes that do not divide alike", self.reason);
        self.all.axes.unify(a, b, &reason);
    }

    pub(super) fn same(&mut self, x: &[AxisId], y: &[AxisId]) -> Option<()> {
        (x.len() == y.len()).then(|| x.iter().zip(y).for_each(|(&a, &b)| self.unify(a, b)))
    }

    fn elementwise(&mut self) -> Option<()> {
        self.elementwise_of(&(0..self.node.inputs.len()).collect::<Vec<_>>())
    }

    /// These inputs, broadcast to the first output; others are frozen.
    fn elementwise_of(&mut self, inputs: &[usize]) -> Option<()> {
        let y = self.output(0)?;
        for &index in inputs {
            if self.value(index).is_some() {
                self.broadcast(&self.input(index)?, &y)?;
            }
        }
        for output in 1..self.node.outputs.len() {
            self.same(&self.output(output)?, &y)?;
        }
        Some(())
    }

    /// Axes of `x` are those of `y` counted from the end, but where it has one element.
    fn broadcast(&mut self, x: &[AxisId], y: &[AxisId]) -> Option<()> {
        let front = y.len().checked_sub(x.len())?;
        for (&a, &b) in x.iter().zip(&y[front..]) {
            if self.all.axes.extent(a) == self.all.axes.extent(b) {
                self.unify(a, b);
            } else if self.extent(a) != Some(1) {
                self.freeze(a, "may broadcast it");
                self.freeze(b, "may broadcast to it");
            }
        }
        Some(())
    }

    fn freeze_spatial(&mut self, axes: &[AxisId]) {
        axes.iter().skip(2).for_each(|&axis| self.freeze(axis, "slides over it"));
    }

    /// The axis of `group` groups; none for one.
    fn group_axis(&mut self, group: usize) -> Option<AxisId> {
        let axis = self.all.axes.add(Dim::from(group));
        self.all.groups.insert(self.id, axis);
        Some(axis)
    }

    /// `whole` is `group` × `part`.
    pub(super) fn grouped(&mut self, whole: AxisId, group: AxisId, part: AxisId) {
        let product = self.all.axes.product(&[group, part]);
        self.unify(whole, product);
    }

    fn convolution(&mut self, group: usize) -> Option<()> {
        let (x, w, y) = (self.input(0)?, self.input(1)?, self.output(0)?);
        if x.len() < 3 || w.len() != x.len() || y.len() != x.len() || group == 0 {
            return None;
        }
        [&x, &w, &y].into_iter().for_each(|axes| self.freeze_spatial(axes));
        self.unify(x[0], y[0]);
        self.unify(w[0], y[1]);
        if group == 1 {
            self.unify(x[1], w[1]);
        } else {
            let groups = self.group_axis(group)?;
            let outputs = self.all.axes.add(Dim::Const(self.extent(y[1])? / group as i64));
            self.grouped(x[1], groups, w[1]);
            self.grouped(y[1], groups, outputs);
        }
        self.added_to_channels(2..self.node.inputs.len(), &y)
    }

    fn transposed_convolution(&mut self, group: usize) -> Option<()> {
        let (x, w, y) = (self.input(0)?, self.input(1)?, self.output(0)?);
        if x.len() < 3 || w.len() != x.len() || y.len() != x.len() || group == 0 {
            return None;
        }
        [&x, &w, &y].into_iter().for_each(|axes| self.freeze_spatial(axes));
        self.unify(x[0], y[0]);
        self.unify(x[1], w[0]);
        if group == 1 {
            self.unify(y[1], w[1]);
        } else {
            let groups = self.group_axis(group)?;
            let inputs = self.all.axes.add(Dim::Const(self.extent(x[1])? / group as i64));
            self.grouped(x[1], groups, inputs);
            self.grouped(y[1], groups, w[1]);
        }
        self.added_to_channels(2..self.node.inputs.len(), &y)
    }

    /// Biases `[c]`, and residuals of the output's shape.
    fn added_to_channels(&mut self, inputs: std::ops::Range<usize>, y: &[AxisId]) -> Option<()> {
        for index in inputs.filter(|&index| self.node.inputs.get(index).is_some_and(Option::is_some)) {
            match self.input(index)?[..] {
                [channels] => self.unify(channels, y[1]),
                ref axes => self.broadcast(axes, y)?,
            }
        }
        Some(())
    }

    fn channel_parameters(&mut self, inputs: std::ops::Range<usize>) -> Option<()> {
        let (x, y) = (self.input(0)?, self.output(0)?);
        if x.len() < 2 || self.node.outputs.len() > 1 {
            return None;
        }
        self.same(&x, &y)?;
        self.added_to_channels(inputs, &y)
    }

    fn instance_norm(&mut self, groups: Option<usize>, restrictions: &Restrictions) -> Option<()> {
        let y = self.output(0)?;
        self.channel_parameters(1..3)?;
        self.freeze_spatial(&y);
        if let Some(groups) = groups {
            let width = self.extent(y[1])? / groups.max(1) as i64;
            let (group, part) = (self.group_axis(groups)?, self.all.axes.add(Dim::Const(width)));
            self.grouped(y[1], group, part);
            if !restrictions.through_norms {
                self.freeze(part, "takes its mean over it");
            }
        }
        Some(())
    }

    fn layer_norm(&mut self, axis: i64, restrictions: &Restrictions) -> Option<()> {
        let (x, y) = (self.input(0)?, self.output(0)?);
        let axis = normalize_axis(axis, x.len()).ok()?;
        self.same(&x, &y)?;
        for index in [1, 2] {
            if let Some(parameter) = self.input(index) {
                self.broadcast(&parameter, &y)?;
            }
        }
        if !restrictions.through_norms {
            x[axis..].iter().for_each(|&axis| self.freeze(axis, "takes its mean over it"));
        }
        for output in 1..self.node.outputs.len() {
            let own = self.output(output)?;
            self.same(own.get(..axis)?, &x[..axis])?;
        }
        Some(())
    }

    fn softmax(&mut self, axis: i64, coerced: bool) -> Option<()> {
        let (x, y) = (self.input(0)?, self.output(0)?);
        let axis = normalize_axis(axis, x.len()).ok()?;
        let end = if coerced { x.len() } else { axis + 1 };
        x[axis..end].iter().for_each(|&axis| self.freeze(axis, "sums over it"));
        self.same(&x, &y)
    }

    fn reduce(&mut self, keep_dims: bool, none_if_empty: bool) -> Option<()> {
        let (x, y) = (self.input(0)?, self.output(0)?);
        let axes = match self.value(1) {
            None => Vec::new(),
            Some(_) => self.numbers(1)?,
        };
        let axes = match axes.is_empty() {
            true if none_if_empty => Vec::new(),
            true => (0..x.len()).collect(),
            false => normalize_axes(&axes, x.len()).ok()?,
        };
        let mut kept = y.iter();
        for (axis, &a) in x.iter().enumerate() {
            if axes.contains(&axis) {
                self.freeze(a, "sums over it");
                if keep_dims {
                    kept.next()?;
                }
            } else {
                self.unify(a, *kept.next()?);
            }
        }
        Some(())
    }

    fn pool(&mut self) -> Option<()> {
        let (x, y) = (self.input(0)?, self.output(0)?);
        let indices = self.node.outputs.get(1);
        let read = |value: &ValueId| !self.all.graph.uses()[value.index()].is_empty();
        if x.len() < 2 || y.len() < 2 || indices.is_some_and(read) {
            return None;
        }
        self.freeze_spatial(&x);
        self.freeze_spatial(&y);
        self.same(&x[..2], &y[..2])
    }

    fn resize(&mut self) -> Option<()> {
        let (x, y) = (self.input(0)?, self.output(0)?);
        for (&a, &b) in x.iter().zip(&y) {
            if self.all.axes.extent(a) == self.all.axes.extent(b) {
                self.unify(a, b);
            } else {
                self.freeze(a, "resizes it");
                self.freeze(b, "resizes it");
            }
        }
        // Sizes of all axes are written anew; of some, their number is not the rank.
        if self.value(3).is_some() && self.numbers(3)?.len() == y.len() { self.target(3) } else { Some(()) }
    }

    fn pad(&mut self) -> Option<()> {
        let (x, y, pads) = (self.input(0)?, self.output(0)?, self.numbers(1)?);
        let axes = match self.value(3) {
            None => (0..x.len()).collect(),
            Some(_) => normalize_axes(&self.numbers(3)?, x.len()).ok()?,
        };
        for (axis, (&a, &b)) in x.iter().zip(&y).enumerate() {
            let padded = axes.iter().position(|&other| other == axis);
            if padded.is_some_and(|p| pads.get(p) != Some(&0) || pads.get(p + axes.len()) != Some(&0)) {
                self.freeze(a, "pads it");
                self.freeze(b, "pads it");
            } else {
                self.unify(a, b);
            }
        }
        Some(())
    }

    fn reshape(&mut self) -> Option<()> {
        let (x, y) = (self.input(0)?, self.output(0)?);
        let reason = format!("{} splits axes in a way that does not divide", self.reason);
        self.all.axes.reshape(&x, &y, &reason);
        Some(())
    }

    /// Input `index` holds the output's shape, and is written anew where that is possible; where not, its fixed extents stay.
    fn target(&mut self, index: usize) -> Option<()> {
        let y = self.output(0)?;
        if super::rewrite::target(self.all, self.node, index, &|axis| self.all.axes.extent(axis).clone()).is_none() {
            y.iter().for_each(|&axis| self.freeze(axis, "computes its shape"));
        }
        Some(())
    }

    fn concat(&mut self, axis: i64) -> Option<()> {
        let y = self.output(0)?;
        let axis = normalize_axis(axis, y.len()).ok()?;
        let mut parts = Vec::new();
        for index in 0..self.node.inputs.len() {
            let x = self.input(index)?;
            parts.push(*x.get(axis)?);
            for other in (0..y.len()).filter(|&other| other != axis) {
                self.unify(*x.get(other)?, y[other]);
            }
        }
        let sum = self.all.axes.sum(&parts);
        self.unify(sum, y[axis]);
        Some(())
    }

    fn split(&mut self, axis: i64) -> Option<()> {
        let x = self.input(0)?;
        let axis = normalize_axis(axis, x.len()).ok()?;
        if self.value(1).is_some() {
            self.numbers(1)?;
        }
        let mut parts = Vec::new();
        for index in 0..self.node.outputs.len() {
            let y = self.output(index)?;
            parts.push(*y.get(axis)?);
            for other in (0..x.len()).filter(|&other| other != axis) {
                self.unify(x[other], *y.get(other)?);
            }
        }
        let sum = self.all.axes.sum(&parts);
        self.unify(x[axis], sum);
        Some(())
    }

    fn slice(&mut self) -> Option<()> {
        let (x, y) = (self.input(0)?, self.output(0)?);
        let (starts, ends) = (self.numbers(1)?, self.numbers(2)?);
        let axes = match self.value(3) {
            None => (0..starts.len()).collect(),
            Some(_) => normalize_axes(&self.numbers(3)?, x.len()).ok()?,
        };
        let steps = match self.value(4) {
            None => vec![1; starts.len()],
            Some(_) => self.numbers(4)?,
        };
        for axis in (0..x.len()).filter(|axis| !axes.contains(axis)) {
            self.unify(x[axis], *y.get(axis)?);
        }
        let mut before = Vec::new();
        for (slot, &axis) in axes.iter().enumerate() {
            let (a, b) = (x[axis], *y.get(axis)?);
            let (Some(extent), 1) = (self.extent(a), *steps.get(slot)?) else {
                self.freeze(a, "takes a part of it");
                self.freeze(b, "takes a part of it");
                continue;
            };
            let place = |v: i64| if v < 0 { (v + extent).max(0) } else { v.min(extent) };
            let (start, end) = (place(*starts.get(slot)?), place(*ends.get(slot)?));
            let [head, tail] = [start, extent - end.max(start)].map(|n| self.all.axes.add(Dim::Const(n)));
            let sum = self.all.axes.sum(&[head, b, tail]);
            self.unify(a, sum);
            before.push((slot, head));
        }
        self.all.before.insert(self.id, before);
        Some(())
    }

    fn gather(&mut self, axis: i64) -> Option<()> {
        let (x, indices, y) = (self.input(0)?, self.input(1)?, self.output(0)?);
        let axis = normalize_axis(axis, x.len()).ok()?;
        self.freeze(x[axis], "looks up in it");
        indices.iter().for_each(|&axis| self.freeze(axis, "looks up by it"));
        y.get(axis..axis + indices.len())?.iter().for_each(|&axis| self.freeze(axis, "looks up by it"));
        self.same(&x[..axis], &y[..axis])?;
        self.same(&x[axis + 1..], &y[axis + indices.len()..])
    }

    fn depth_space(&mut self, to_space: bool, block: usize, depth_first: bool) -> Option<()> {
        let (deep, wide) = match to_space {
            true => (self.input(0)?, self.output(0)?),
            false => (self.output(0)?, self.input(0)?),
        };
        self.freeze_spatial(&deep);
        self.freeze_spatial(&wide);
        self.unify(deep[0], wide[0]);
        let places = self.all.axes.add(Dim::from(block * block));
        self.freeze(places, "spreads it over rows and columns");
        let factors = if depth_first { [wide[1], places] } else { [places, wide[1]] };
        let product = self.all.axes.product(&factors);
        self.unify(deep[1], product);
        Some(())
    }

    /// What reads a shape may compute anything of it, but single extents that are picked out.
    fn shape(&mut self, start: i64, end: Option<i64>) -> Option<()> {
        let x = self.input(0)?;
        let rank = x.len() as i64;
        let place = |v: i64| if v < 0 { v + rank } else { v }.clamp(0, rank);
        let (start, end) = (place(start), place(end.unwrap_or(rank)));
        let readers = &self.all.graph.uses()[self.node.outputs[0].index()];
        let mut picked: Option<Vec<i64>> = Some(Vec::new());
        for &reader in readers {
            let node = self.all.graph.node(reader);
            let constant = |index: usize| {
                let id = (*node.inputs.get(index)?)?;
                TensorFact::of_tensor(&self.all.graph.constant(id)?.tensor).constant_value()
            };
            let own = match &node.op {
                Op::Gather(_) => constant(1),
                Op::Slice(_) if node.inputs.len() <= 4 => match (constant(1).as_deref(), constant(2).as_deref()) {
                    (Some(&[from]), Some(&[to])) if from >= 0 && to >= 0 => Some((from..to.min(end - start)).collect()),
                    _ => None,
                },
                _ => None,
            };
            picked = picked.zip(own).map(|(all, own)| [all, own].concat());
        }
        for (index, axis) in (start..end).enumerate() {
            let used = |picked: &Vec<i64>| picked.iter().any(|&p| p == index as i64 || p + end - start == index as i64);
            if picked.as_ref().is_none_or(used) {
                self.freeze(x[axis as usize], "reads its extent");
            }
        }
        Some(())
    }

    fn matmul(&mut self) -> Option<()> {
        let (a, b, y) = (self.input(0)?, self.input(1)?, self.output(0)?);
        let (inner_a, inner_b) = (*a.last()?, if b.len() == 1 { b[0] } else { b[b.len() - 2] });
        self.unify(inner_a, inner_b);
        let mut rest = &y[..];
        if b.len() > 1 {
            let (&columns, front) = rest.split_last()?;
            self.unify(b[b.len() - 1], columns);
            rest = front;
        }
        if a.len() > 1 {
            let (&rows, front) = rest.split_last()?;
            self.unify(a[a.len() - 2], rows);
            rest = front;
        }
        self.broadcast(&a[..a.len().saturating_sub(2)], rest)?;
        self.broadcast(&b[..b.len().saturating_sub(2)], rest)?;
        self.added(2, &y)
    }

    fn gemm(&mut self, transpose_a: bool, transpose_b: bool) -> Option<()> {
        let (a, b, y) = (self.input(0)?, self.input(1)?, self.output(0)?);
        if a.len() != 2 || b.len() != 2 {
            return None;
        }
        let ((rows, inner_a), (inner_b, columns)) = (
            if transpose_a { (a[1], a[0]) } else { (a[0], a[1]) },
            if transpose_b { (b[1], b[0]) } else { (b[0], b[1]) },
        );
        self.unify(inner_a, inner_b);
        self.same(&[rows, columns], &y)?;
        self.added(2, &y)
    }

    fn added(&mut self, index: usize, y: &[AxisId]) -> Option<()> {
        match self.value(index) {
            Some(_) => self.broadcast(&self.input(index)?, y),
            None => Some(()),
        }
    }

    fn einsum(&mut self, equation: &str) -> Option<()> {
        let equation: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
        let (from, to) = equation.split_once("->")?;
        if equation.contains('.') {
            return None;
        }
        let mut letters: HashMap<char, AxisId> = HashMap::new();
        let mut terms: Vec<(Vec<AxisId>, &str)> = Vec::new();
        for (index, term) in from.split(',').enumerate() {
            terms.push((self.input(index)?, term));
        }
        terms.push((self.output(0)?, to));
        for (axes, term) in terms {
            if axes.len() != term.chars().count() {
                return None;
            }
            for (axis, letter) in axes.into_iter().zip(term.chars()) {
                match letters.get(&letter) {
                    Some(&known) if self.all.axes.extent(known) != self.all.axes.extent(axis) => {
                        self.freeze(known, "broadcasts it");
                        self.freeze(axis, "broadcasts it");
                    }
                    Some(&known) => self.unify(known, axis),
                    None => _ = letters.insert(letter, axis),
                }
            }
        }
        Some(())
    }
}
