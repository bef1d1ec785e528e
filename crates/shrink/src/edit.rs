//! Small changes of a graph that every transformation here makes.

use crate::ShrinkError;
use cutover_graph::{
    Constant, Graph, Node, NodeId, Op, ValueId,
    onnx::{ImportOptions, encode, import_bytes},
    ops::BinaryFunction,
    passes::{PassOptions, declutter},
};
use cutover_tensor::{DType, Tensor};

/// `graph` with constants folded and norms merged into convolutions, as the standard nodes it is written out as: nothing of it is fused, so
/// quantization can go between any two.
pub fn plain(graph: Graph) -> Result<Graph, ShrinkError> {
    let (graph, _) = declutter(graph, &PassOptions::default())?;
    let bytes = encode(&graph)?;
    Ok(import_bytes(bytes.into(), None, &ImportOptions::default())?)
}

/// Adds a node of one output, named after `stem`.
pub(crate) fn add(graph: &mut Graph, stem: &str, op: Op, inputs: &[ValueId]) -> Result<ValueId, ShrinkError> {
    let (node, value) = (graph.unique_node_name(stem), graph.unique_value_name(stem));
    let node = graph.add_node(node, op, inputs.iter().map(|&i| Some(i)).collect(), vec![value])?;
    Ok(graph.node(node).outputs[0])
}

/// Adds a constant, named after `stem`.
pub(crate) fn constant(graph: &mut Graph, stem: &str, tensor: Tensor) -> ValueId {
    let name = graph.unique_value_name(stem);
    graph.add_constant(name, Constant::new(tensor))
}

/// Makes every use of `old` but those of `except` a use of `new`. An output of the model that is `old` becomes `new` under its name.
pub(crate) fn replace(graph: &mut Graph, old: ValueId, new: ValueId, except: &[NodeId]) {
    let readers: Vec<NodeId> = graph.nodes().map(|(id, _)| id).filter(|id| !except.contains(id)).collect();
    for id in readers {
        for input in graph.node_mut(id).inputs.iter_mut().flatten().filter(|input| **input == old) {
            *input = new;
        }
    }
    if graph.outputs().contains(&old) {
        let name = graph.value(old).name.clone();
        graph.value_mut(old).name = graph.unique_value_name(&format!("{name}.before"));
        graph.value_mut(new).name = name;
        let outputs = graph.outputs().iter().map(|&o| if o == old { new } else { o }).collect();
        graph.set_outputs(outputs);
    }
}

/// Makes `node` read `new` where it reads `old`.
pub(crate) fn rewire(graph: &mut Graph, node: NodeId, old: ValueId, new: ValueId) {
    for input in graph.node_mut(node).inputs.iter_mut().flatten().filter(|input| **input == old) {
        *input = new;
    }
}

/// Forgets nodes that nothing reads, and the constants that nothing reads then.
pub(crate) fn sweep(graph: &mut Graph) {
    loop {
        let uses = graph.uses();
        let read = |value: &ValueId| !uses[value.index()].is_empty() || graph.outputs().contains(value);
        let dead: Vec<NodeId> = graph.nodes().filter(|(_, n)| !n.outputs.iter().any(read)).map(|(id, _)| id).collect();
        if dead.is_empty() {
            let unread = graph.values().map(|(id, _)| id).filter(|id| graph.constant(*id).is_some() && !read(id));
            for id in unread.collect::<Vec<_>>() {
                graph.remove_constant(id);
            }
            return;
        }
        dead.into_iter().for_each(|node| graph.remove_node(node));
    }
}

/// The elements of an f32 constant.
pub(crate) fn floats(graph: &Graph, value: ValueId) -> Option<(Vec<usize>, Vec<f32>)> {
    let tensor = &graph.constant(value)?.tensor;
    Some((tensor.shape().dims().to_vec(), tensor.to_vec::<f32>().ok()?))
}

pub(crate) fn is_f32(graph: &Graph, value: ValueId) -> bool {
    graph.value(value).fact.as_tensor().is_some_and(|fact| fact.dtype == DType::F32)
}

/// Bytes of all constants.
pub fn constant_bytes(graph: &Graph) -> u64 {
    graph.values().filter_map(|(id, _)| graph.constant(id)).map(|c| c.tensor.bytes().len() as u64).sum()
}

/// The matrix or filter that a node multiplies its input by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    pub node: NodeId,
    pub input: ValueId,
    /// An f32 constant.
    pub weight: ValueId,
    /// The axis of the weight that is the channel of the output.
    pub channel_axis: usize,
    pub kind: ProductKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProductKind {
    Conv { group: usize },
    MatMul,
    Gemm,
}

impl Product {
    /// `node` as a product by a constant: `Conv`, `MatMul` by a matrix, and `Gemm` of plain factors.
    pub fn of(graph: &Graph, node: NodeId) -> Option<Product> {
        let Node { op, inputs, .. } = graph.node(node);
        let (input, weight) = ((*inputs.first()?)?, (*inputs.get(1)?)?);
        let tensor = &graph.constant(weight)?.tensor;
        if tensor.dtype() != DType::F32 || !is_f32(graph, input) || graph.constant(input).is_some() {
            return None;
        }
        let rank = tensor.shape().len();
        let (kind, channel_axis) = match op {
            Op::Conv(conv) if conv.activation.is_none() && inputs.len() <= 3 && rank >= 3 => {
                (ProductKind::Conv { group: conv.group }, 0)
            }
            Op::MatMul(product) if rank == 2 && product.activation.is_none() && inputs.len() == 2 => {
                (ProductKind::MatMul, 1)
            }
            Op::Gemm(gemm) if rank == 2 && gemm.activation.is_none() && !gemm.transpose_a => {
                let plain = gemm.alpha == 1.0 && (gemm.beta == 1.0 || inputs.len() < 3);
                plain.then_some((ProductKind::Gemm, usize::from(!gemm.transpose_b)))?
            }
            _ => return None,
        };
        (tensor.element_count() > 0).then_some(Product { node, input, weight, channel_axis, kind })
    }

    /// All of `graph`.
    pub fn all(graph: &Graph) -> Vec<Product> {
        graph.nodes().filter_map(|(id, _)| Product::of(graph, id)).collect()
    }

    /// The weight's shape and elements.
    ///
    /// # Errors
    /// One that is not finite.
    pub(crate) fn weights(&self, graph: &Graph) -> Result<(Vec<usize>, Vec<f32>), ShrinkError> {
        let (shape, values) = floats(graph, self.weight).expect("a weight of floats");
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok((shape, values)),
            Some(at) => {
                let message = format!("element {at} is {}", values[at]);
                Err(ShrinkError::Weight { name: graph.value(self.weight).name.clone(), message })
            }
        }
    }

    /// The axis of the input's channels.
    pub fn input_axis(&self) -> i64 {
        if matches!(self.kind, ProductKind::Conv { .. }) { 1 } else { -1 }
    }

    /// The bias that the node itself adds.
    pub fn bias(&self, graph: &Graph) -> Option<ValueId> {
        graph.node(self.node).inputs.get(2).copied().flatten()
    }
}

/// Whether `op` is an activation that an integer kernel's bounds express.
pub(crate) fn is_bound(op: &Op) -> bool {
    matches!(op.name().as_str(), "Relu" | "Clip")
}

pub(crate) fn is_sum(op: &Op) -> bool {
    matches!(op, Op::Binary(binary) if binary.function == BinaryFunction::Add)
}

/// Whether `op` gives `a·x` for `a·x` in place of `x`, `a` positive.
pub(crate) fn is_homogeneous(op: &Op) -> bool {
    op.name() == "Relu" || op.name() == "LeakyRelu"
}
