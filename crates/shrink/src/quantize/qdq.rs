//! Static quantization: ranges from calibration, and `QuantizeLinear` → `DequantizeLinear` round every operator that computes with integers.
//!
//! The pairs go where integer kernels begin and end, as both our own lowering and ONNX Runtime's look for them: on what a product reads, on what
//! its ReLU gives, and on through operators that move, pool, join or add what is bytes already. Values that only floats read stay floats.

use super::dynamic::{gather, tables};
use super::{ActivationType, Affine, Calibration, Channels, QuantizeReport, QuantizedWeight, Range, WeightRange};
use crate::{
    Kept, Observation, Question, ShrinkError,
    edit::{Product, ProductKind},
    edit::{add, constant, constant_bytes, floats, is_bound, is_f32, is_sum, rewire, sweep},
};
use cutover_graph::{
    Graph, NodeId, ValueId,
    ops::{DequantizeLinear, Granularity, QuantizeLinear},
};
use cutover_tensor::{Tensor, TensorError};
use std::collections::{HashMap, HashSet, hash_map::Entry};

/// How to quantize statically.
#[derive(Clone, Debug)]
pub struct StaticOptions {
    pub activations: ActivationType,
    pub calibration: Calibration,
    /// A scale for each output channel of a weight, or one for all.
    pub per_channel: bool,
    pub weights: WeightRange,
    /// Tables that are gathered from (embeddings) too, a scale for each row.
    pub tables: bool,
    /// Names of nodes that stay in floats.
    pub exclude: HashSet<String>,
}

impl Default for StaticOptions {
    fn default() -> Self {
        StaticOptions {
            activations: ActivationType::U8,
            calibration: Calibration::MinMax,
            per_channel: true,
            weights: WeightRange::Largest,
            tables: true,
            exclude: HashSet::new(),
        }
    }
}

/// Smaller tables stay: they weigh nothing.
const TABLE_ELEMENTS_MIN: usize = 1024;

/// What a node does with bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Multiplies them by a constant.
    Product,
    /// Adds two tensors of them.
    Sum,
    /// Gives the same numbers at other places, so input and output share their scale.
    Move,
    /// Gives others, within the range of its inputs.
    Pool,
    /// Needs floats.
    Other,
}

fn role(graph: &Graph, node: NodeId) -> Role {
    let n = graph.node(node);
    let data =
        |i: usize| n.inputs.get(i).copied().flatten().filter(|&v| is_f32(graph, v) && graph.constant(v).is_none());
    if Product::of(graph, node).is_some() {
        return Role::Product;
    }
    if data(0).is_none() {
        return Role::Other;
    }
    match n.op.name().as_str() {
        _ if is_sum(&n.op) && data(1).is_some() => Role::Sum,
        "Reshape" | "Transpose" | "Flatten" | "Squeeze" | "Unsqueeze" => Role::Move,
        "MaxPool" if n.outputs.len() == 1 => Role::Move,
        "GlobalAveragePool" | "AveragePool" => Role::Pool,
        "Concat" if (0..n.inputs.len()).all(|i| data(i).is_some()) => Role::Pool,
        _ => Role::Other,
    }
}

/// Which nodes of a graph compute with bytes, and which values are bytes between them.
pub(crate) struct Placement {
    /// Nodes with their roles, in order.
    nodes: Vec<(NodeId, Role)>,
    /// Values that are quantized.
    values: HashSet<ValueId>,
}

impl Placement {
    pub fn of(graph: &Graph, exclude: &HashSet<String>) -> Result<Placement, ShrinkError> {
        let order = graph.topological_order()?;
        let uses = graph.uses();
        let included = |node: NodeId| !exclude.contains(&graph.node(node).name);
        let inputs = |node: NodeId| {
            let all = graph.node(node).inputs.clone();
            all.into_iter().flatten().filter(|&v| is_f32(graph, v) && graph.constant(v).is_none())
        };
        // What integer kernels can give as bytes, from the front.
        let mut made = HashSet::new();
        for &node in order.iter().filter(|&&node| included(node)) {
            let gives = match role(graph, node) {
                Role::Product => true,
                Role::Sum | Role::Move | Role::Pool => inputs(node).all(|v| made.contains(&v)),
                Role::Other => false,
            };
            if gives {
                made.insert(last(graph, &uses, node));
            }
        }
        // What integer kernels take as bytes, from the back.
        let mut placement = Placement { nodes: Vec::new(), values: HashSet::new() };
        for &node in order.iter().rev().filter(|&&node| included(node)) {
            let role = role(graph, node);
            let wanted = placement.values.contains(&last(graph, &uses, node));
            let takes = match role {
                Role::Product => true,
                Role::Sum | Role::Move | Role::Pool => wanted && inputs(node).all(|v| made.contains(&v)),
                Role::Other => false,
            };
            if takes {
                placement.nodes.push((node, role));
                match role {
                    Role::Product => placement.values.insert(graph.node(node).inputs[0].expect("a product's input")),
                    _ => inputs(node).fold(false, |_, v| placement.values.insert(v)),
                };
            }
        }
        placement.nodes.reverse();
        Ok(placement)
    }

    /// The nodes that read a quantized value as bytes.
    pub fn takers(&self, graph: &Graph) -> HashMap<ValueId, Vec<NodeId>> {
        let mut takers: HashMap<ValueId, Vec<NodeId>> = HashMap::new();
        for &(node, _) in &self.nodes {
            for &input in graph.node(node).inputs.iter().flatten().filter(|v| self.values.contains(v)) {
                takers.entry(input).or_default().push(node);
            }
        }
        takers
    }

    /// The products among the nodes, in order.
    pub fn products(&self, graph: &Graph) -> Vec<Product> {
        self.nodes.iter().filter_map(|&(node, _)| Product::of(graph, node)).collect()
    }

    /// Quantized values that only moved, and what they come from, whose scale they keep.
    pub fn origins(&self, graph: &Graph) -> HashMap<ValueId, ValueId> {
        let moved: HashMap<ValueId, ValueId> = self
            .nodes
            .iter()
            .filter(|(_, role)| *role == Role::Move)
            .map(|&(node, _)| (graph.node(node).outputs[0], graph.node(node).inputs[0].expect("what is moved")))
            .collect();
        let origin = |&value: &ValueId| {
            let mut from = value;
            while let Some(&source) = moved.get(&from) {
                from = source;
            }
            (value, from)
        };
        self.values.iter().map(origin).collect()
    }
}

/// What comes of `node` in the end: of its first output, or of the bounds and constant sums that alone read it.
fn last(graph: &Graph, uses: &[Vec<NodeId>], node: NodeId) -> ValueId {
    let mut value = graph.node(node).outputs[0];
    while let [reader] = uses[value.index()][..]
        && !graph.outputs().contains(&value)
    {
        let n = graph.node(reader);
        let adds_constant = is_sum(&n.op) && n.inputs.iter().flatten().any(|&v| graph.constant(v).is_some());
        if !(is_bound(&n.op) || adds_constant) {
            break;
        }
        value = n.outputs[0];
    }
    value
}

/// What [`quantize_static`] has to know of `graph`'s values, for [`crate::observe()`].
pub fn static_questions(graph: &Graph, exclude: &HashSet<String>) -> Result<Vec<Question>, ShrinkError> {
    let placement = Placement::of(graph, exclude)?;
    let mut axes: HashMap<ValueId, i64> = HashMap::new();
    for product in placement.products(graph) {
        axes.insert(product.input, product.input_axis());
    }
    let mut values: Vec<ValueId> = placement.values.into_iter().collect();
    values.sort();
    let question = |value| Question { value, channel_axis: axes.get(&value).copied().unwrap_or(1), gram: false };
    Ok(values.into_iter().map(question).collect())
}

/// `graph`, which is [`crate::plain`], in integers where `observations` say what ranges values have.
///
/// # Errors
/// A value that has to be quantized and was not observed.
pub fn quantize_static(
    mut graph: Graph,
    observations: &HashMap<ValueId, Observation>,
    options: &StaticOptions,
) -> Result<(Graph, QuantizeReport), ShrinkError> {
    let mut report = QuantizeReport { bytes_before: constant_bytes(&graph), ..QuantizeReport::default() };
    let placement = Placement::of(&graph, &options.exclude)?;
    for (id, _) in graph.nodes() {
        let name = &graph.node(id).name;
        if Product::of(&graph, id).is_some() && options.exclude.contains(name) {
            report.kept.push(Kept { name: name.clone(), reason: "it was excluded".to_string() });
        }
    }
    let scales = scales(&graph, &placement, observations, options)?;
    report.quantized = placement.nodes.iter().map(|&(node, _)| graph.node(node).name.clone()).collect();
    let takers = placement.takers(&graph);
    // A weight that several products read is quantized once for each axis.
    let mut weights = HashMap::new();
    for &(node, role) in &placement.nodes {
        if role == Role::Product {
            let product = Product::of(&graph, node).expect("a product, as it was placed");
            let input = scales[&product.input];
            quantize_product(&mut graph, &product, input, options, &mut weights)?;
        }
    }
    let mut values: Vec<ValueId> = placement.values.iter().copied().collect();
    values.sort();
    for value in values {
        let bytes = pair(&mut graph, value, scales[&value])?;
        takers[&value].iter().for_each(|&node| rewire(&mut graph, node, value, bytes));
    }
    let tables = if options.tables { tables(&graph, TABLE_ELEMENTS_MIN) } else { Vec::new() };
    for (node, table) in tables {
        let name = graph.node(node).name.clone();
        if !options.exclude.contains(&name) {
            gather(&mut graph, node, table)?;
            report.quantized.push(name);
        }
    }
    sweep(&mut graph);
    graph.verify()?;
    report.bytes_after = constant_bytes(&graph);
    Ok((graph, report))
}

/// Scale and zero point of every quantized value. What only moves keeps those of what it moves.
fn scales(
    graph: &Graph,
    placement: &Placement,
    observations: &HashMap<ValueId, Observation>,
    options: &StaticOptions,
) -> Result<HashMap<ValueId, Affine>, ShrinkError> {
    let origins = placement.origins(graph);
    let mut scales = HashMap::new();
    for &value in &placement.values {
        let from = origins[&value];
        let observation = observations
            .get(&from)
            .ok_or_else(|| ShrinkError::NotObserved { value: graph.value(from).name.clone() })?;
        let range = Range::of(observation, options.calibration);
        scales.insert(value, Affine::covering(range, options.activations));
    }
    Ok(scales)
}

/// `value` quantized and dequantized again.
fn pair(graph: &mut Graph, value: ValueId, affine: Affine) -> Result<ValueId, ShrinkError> {
    let name = graph.value(value).name.clone();
    let at = |source: TensorError| ShrinkError::Tensor { name: name.clone(), source };
    let scale = constant(graph, &format!("{name}.scale"), affine.scale_tensor().map_err(at)?);
    let zero_point = constant(graph, &format!("{name}.zero_point"), affine.zero_point_tensor().map_err(at)?);
    let granularity = Granularity { axis: 1, block_size: 0 };
    let quantize = QuantizeLinear { granularity, output_dtype: None, saturate: true, precision: None };
    let bytes = add(graph, &format!("{name}.quantized"), quantize.into(), &[value, scale, zero_point])?;
    let dequantize = DequantizeLinear { granularity, output_dtype: None };
    add(graph, &format!("{name}.dequantized"), dequantize.into(), &[bytes, scale, zero_point])
}

type Weights = HashMap<(ValueId, usize), (ValueId, Vec<f32>)>;

/// Stores a product's weight as signed bytes and its bias as `i32` of the scale that the sums have.
fn quantize_product(
    graph: &mut Graph,
    product: &Product,
    input: Affine,
    options: &StaticOptions,
    weights: &mut Weights,
) -> Result<(), ShrinkError> {
    let key = (product.weight, product.channel_axis);
    let (weight, scales) = match weights.entry(key) {
        Entry::Occupied(known) => known.get().clone(),
        Entry::Vacant(place) => place.insert(quantize_weight(graph, product, options)?).clone(),
    };
    rewire(graph, product.node, product.weight, weight);
    let (Some(bias), ProductKind::Conv { .. } | ProductKind::Gemm) = (product.bias(graph), product.kind) else {
        return Ok(());
    };
    let Some((shape, values)) = floats(graph, bias).filter(|(shape, _)| shape.len() == 1) else { return Ok(()) };
    let name = graph.value(bias).name.clone();
    let at = |source: TensorError| ShrinkError::Tensor { name: name.clone(), source };
    let of = |channel: usize| input.scale * scales[if scales.len() == 1 { 0 } else { channel }];
    let steps: Vec<f64> = values.iter().enumerate().map(|(c, &b)| f64::from(b) / f64::from(of(c))).collect();
    // A sum of products and this bias must stay in 32 bits.
    if !steps.iter().all(|s| s.abs() < f64::from(1 << 30)) || (scales.len() > 1 && scales.len() != values.len()) {
        return Ok(());
    }
    let integers: Vec<i32> = steps.iter().map(|s| s.round_ties_even() as i32).collect();
    let stored = constant(graph, &format!("{name}.quantized"), Tensor::from_vec(shape, integers).map_err(at)?);
    let (scale, axis) = match scales.len() {
        1 => (Tensor::from_vec(Vec::<usize>::new(), vec![of(0)]), 1),
        count => (Tensor::from_vec([count], (0..count).map(of).collect()), 0),
    };
    let scale = constant(graph, &format!("{name}.scale"), scale.map_err(at)?);
    let granularity = Granularity { axis, block_size: 0 };
    let dequantize = DequantizeLinear { granularity, output_dtype: None };
    let real = add(graph, &format!("{name}.dequantized"), dequantize.into(), &[stored, scale])?;
    rewire(graph, product.node, bias, real);
    Ok(())
}

fn quantize_weight(
    graph: &mut Graph,
    product: &Product,
    options: &StaticOptions,
) -> Result<(ValueId, Vec<f32>), ShrinkError> {
    let name = graph.value(product.weight).name.clone();
    let at = |source: TensorError| ShrinkError::Tensor { name: name.clone(), source };
    let (shape, values) = product.weights(graph)?;
    let channels = if options.per_channel { Channels::along(&shape, product.channel_axis) } else { Channels::ONE };
    let QuantizedWeight { values, scales } = QuantizedWeight::new(&values, channels, options.weights);
    let stored = constant(graph, &format!("{name}.quantized"), Tensor::from_vec(shape, values).map_err(at)?);
    let dims = if options.per_channel { vec![scales.len()] } else { Vec::new() };
    let zeros = vec![0i8; scales.len()];
    let scale = constant(graph, &format!("{name}.scale"), Tensor::from_vec(dims.clone(), scales.clone()).map_err(at)?);
    let zero_point = constant(graph, &format!("{name}.zero_point"), Tensor::from_vec(dims, zeros).map_err(at)?);
    let granularity = Granularity { axis: product.channel_axis as i64, block_size: 0 };
    let dequantize = DequantizeLinear { granularity, output_dtype: None };
    let real = add(graph, &format!("{name}.dequantized"), dequantize.into(), &[stored, scale, zero_point])?;
    Ok((real, scales))
}
