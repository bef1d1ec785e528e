//! Operators that no kernel takes, written as some that kernels take, before anything is planned.
//!
//! A composition computes what the operator's reference evaluation does, rounded to f32 between its parts. It is proposed for f32 and for
//! what is known of the shapes; whatever it does not cover stays the operator it is. Of positions and numbers of keys that the operator
//! refuses, a composition may make something.

mod attention;
mod einsum;
mod gated;
mod normalize;
mod rotary;

use cutover_graph::{
    Constant, Dim, Graph, GraphError, Node, NodeId, Op, Patch, PatchValue, Plan, ValueId,
    ops::{
        Binary, BinaryFunction, Concat, MatMul, Reshape, Slice, Softmax, SoftmaxFunction, Transpose, Unary,
        UnaryFunction, Unsqueeze,
    },
    passes::{self, Pass, PassOptions, Subject},
};
use cutover_tensor::{DType, Tensor};

/// The name that nodes which are composed have among the kernels.
pub(crate) const KERNEL: &str = "composition";

/// The plan with every node composed that can be.
pub(crate) fn compose(plan: &Plan) -> Result<Plan, GraphError> {
    let graph = plan.graph();
    if !graph.nodes().any(|(_, node)| is_composite(&node.op)) {
        return Ok(plan.clone());
    }
    let (graph, _) = passes::rewrite(graph.clone(), &[&Compose], &PassOptions::default())?;
    Plan::new(graph)
}

/// Whether the operator is one that may be composed.
pub(crate) fn is_composite(op: &Op) -> bool {
    match op {
        Op::Attention(_)
        | Op::MultiHeadAttention(_)
        | Op::ProjectedAttention(_)
        | Op::RotaryEmbedding(_)
        | Op::SkipLayerNorm(_)
        | Op::InstanceNorm(_)
        | Op::Einsum(_)
        | Op::BiasGelu(_)
        | Op::BiasSplitGelu(_)
        | Op::SwiGlu(_) => true,
        Op::Unary(op) => gated::is_gated(op),
        _ => false,
    }
}

/// Whether `node` of `graph` is composed, as far as its operator and type tell.
pub(crate) fn is_composed(graph: &Graph, node: &Node) -> bool {
    let first = node.inputs.first().copied().flatten().and_then(|id| graph.value(id).fact.as_tensor());
    is_composite(&node.op) && first.is_some_and(|fact| fact.dtype == DType::F32)
}

struct Compose;

impl Pass for Compose {
    fn name(&self) -> &'static str {
        "compose"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let node = subject.node(id);
        let dtype = subject.dtype(node.inputs.first().copied().flatten()?)?;
        if !is_composite(&node.op) || dtype != DType::F32 {
            return None;
        }
        let composing = Composing { subject, node, patch: Patch::new() };
        match &node.op {
            Op::Attention(op) => attention::attention(composing, op),
            Op::MultiHeadAttention(op) => attention::multi_head(composing, op),
            Op::ProjectedAttention(op) => attention::projected(composing, op),
            Op::RotaryEmbedding(op) => rotary::rotary(composing, op),
            Op::SkipLayerNorm(op) => normalize::skip_layer_norm(composing, op),
            Op::InstanceNorm(op) => normalize::instance_norm(composing, op),
            Op::Einsum(op) => einsum::einsum(composing, op),
            Op::BiasGelu(op) => gated::bias_gelu(composing, op),
            Op::BiasSplitGelu(_) => gated::bias_split_gelu(composing),
            Op::SwiGlu(op) => gated::swiglu(composing, op),
            Op::Unary(op) => gated::gate(composing, op),
            _ => None,
        }
    }
}

/// A node being written as others.
struct Composing<'a> {
    subject: &'a Subject,
    node: &'a Node,
    patch: Patch,
}

impl Composing<'_> {
    fn input(&self, index: usize) -> Option<ValueId> {
        self.subject.input(self.node, index)
    }

    /// The extents of input `index`, where its rank is known and it is of f32.
    fn floats(&self, index: usize) -> Option<(PatchValue, Vec<Dim>)> {
        let id = self.input(index)?;
        let shape = self.subject.shape(id)?.to_vec();
        (self.subject.dtype(id)? == DType::F32).then(|| (id.into(), shape))
    }

    /// Whether anything reads output `index`.
    fn is_wanted(&self, index: usize) -> bool {
        let output = self.node.outputs.get(index).copied();
        output.is_some_and(|id| self.subject.is_output(id) || !self.subject.users(id).is_empty())
    }

    /// The node's outputs are `values`; those of them that nobody wants are left out.
    fn finish(mut self, values: &[Option<PatchValue>]) -> Option<Patch> {
        for (index, &output) in self.node.outputs.iter().enumerate() {
            if self.is_wanted(index) {
                self.patch.replace(output, values.get(index).copied().flatten()?);
            }
        }
        Some(self.patch)
    }

    fn op(&mut self, op: impl Into<Op>, inputs: &[PatchValue]) -> PatchValue {
        let op = op.into();
        let name = format!("{}/{}", self.node.name, op.name());
        self.patch.node(name, op, &inputs.iter().copied().map(Some).collect::<Vec<_>>())
    }

    fn constant(&mut self, tensor: Tensor) -> PatchValue {
        let name = format!("{}/constant", self.node.name);
        self.patch.constant(name, Constant::new(tensor))
    }

    fn number(&mut self, value: f32) -> PatchValue {
        self.constant(Tensor::scalar(value))
    }

    fn integers(&mut self, values: &[i64]) -> PatchValue {
        self.constant(Tensor::from_vec([values.len()], values.to_vec()).expect("as many values as elements"))
    }

    fn binary(&mut self, function: BinaryFunction, a: PatchValue, b: PatchValue) -> PatchValue {
        self.op(Binary { function }, &[a, b])
    }

    fn add(&mut self, a: PatchValue, b: PatchValue) -> PatchValue {
        self.binary(BinaryFunction::Add, a, b)
    }

    fn mul(&mut self, a: PatchValue, b: PatchValue) -> PatchValue {
        self.binary(BinaryFunction::Mul, a, b)
    }

    fn times(&mut self, a: PatchValue, factor: f32) -> PatchValue {
        let factor = self.number(factor);
        self.mul(a, factor)
    }

    fn unary(&mut self, function: UnaryFunction, x: PatchValue) -> PatchValue {
        self.op(Unary { function }, &[x])
    }

    /// Extents of 0 are those of `x`, one of −1 is what is left.
    fn reshape(&mut self, x: PatchValue, extents: &[i64]) -> PatchValue {
        let extents = self.integers(extents);
        self.op(Reshape { allow_zero: false }, &[x, extents])
    }

    fn transpose(&mut self, x: PatchValue, permutation: &[usize]) -> PatchValue {
        self.op(Transpose { permutation: Some(permutation.to_vec()) }, &[x])
    }

    fn unsqueeze(&mut self, x: PatchValue, axes: &[i64]) -> PatchValue {
        let axes = self.integers(axes);
        self.op(Unsqueeze, &[x, axes])
    }

    fn slice(&mut self, x: PatchValue, axis: i64, start: i64, end: i64) -> PatchValue {
        let bounds = [self.integers(&[start]), self.integers(&[end]), self.integers(&[axis])];
        self.op(Slice, &[x, bounds[0], bounds[1], bounds[2]])
    }

    fn concat(&mut self, values: &[PatchValue], axis: i64) -> PatchValue {
        self.op(Concat { axis }, values)
    }

    fn matmul(&mut self, a: PatchValue, b: PatchValue) -> PatchValue {
        self.op(MatMul { activation: None }, &[a, b])
    }

    fn softmax(&mut self, x: PatchValue) -> PatchValue {
        self.op(Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false }, &[x])
    }
}

/// The number that an extent is, where it is known.
fn known(extent: &Dim) -> Option<i64> {
    extent.as_const().filter(|&extent| extent > 0)
}
