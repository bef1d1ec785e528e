//! Dynamic quantization: weights in bytes, activations quantized by the range that each run finds.

use super::{Channels, QuantizeReport, QuantizedWeight, WeightRange};
use crate::{
    Kept, ShrinkError,
    edit::{Product, ProductKind, add, constant, constant_bytes, floats, replace, sweep},
};
use cutover_graph::{
    Graph, NodeId, Op, ValueId,
    ops::{Binary, BinaryFunction, Cast, DynamicQuantizeLinear, Gather, MatMulInteger},
};
use cutover_tensor::{DType, Tensor, TensorError};
use std::collections::{HashMap, HashSet};

/// How to quantize dynamically.
#[derive(Clone, Debug)]
pub struct DynamicOptions {
    /// A scale for each output channel of a weight, or one for all.
    pub per_channel: bool,
    pub weights: WeightRange,
    /// Tables that are gathered from (embeddings) too, a scale for each row.
    pub tables: bool,
    /// Weights of fewer elements stay: they weigh nothing.
    pub elements_min: usize,
    /// Names of nodes that stay in floats.
    pub exclude: HashSet<String>,
}

impl Default for DynamicOptions {
    fn default() -> Self {
        DynamicOptions {
            per_channel: true,
            weights: WeightRange::Largest,
            tables: true,
            elements_min: 1024,
            exclude: HashSet::new(),
        }
    }
}

/// `graph`, which is [`crate::plain`], with every `MatMul` and `Gemm` by a constant as `DynamicQuantizeLinear` and `MatMulInteger`. Needs no data.
/// Convolutions stay: without known ranges their outputs can't go on as integers, and nothing is won.
pub fn quantize_dynamic(mut graph: Graph, options: &DynamicOptions) -> Result<(Graph, QuantizeReport), ShrinkError> {
    let mut report = QuantizeReport { bytes_before: constant_bytes(&graph), ..QuantizeReport::default() };
    let mut inputs = HashMap::new();
    for product in Product::all(&graph) {
        let name = graph.node(product.node).name.clone();
        let reason = match product.kind {
            ProductKind::Conv { .. } => Some("a convolution needs known ranges: quantize it statically"),
            _ if options.exclude.contains(&name) => Some("it was excluded"),
            _ if graph.constant(product.weight).is_some_and(|c| c.tensor.element_count() < options.elements_min) => {
                Some("it is small")
            }
            _ => None,
        };
        match reason {
            Some(reason) => report.kept.push(Kept { name, reason: reason.to_string() }),
            None => {
                multiply(&mut graph, &product, options, &mut inputs)?;
                report.quantized.push(name);
            }
        }
    }
    if options.tables {
        for (node, table) in tables(&graph, options.elements_min) {
            report.quantized.push(graph.node(node).name.clone());
            gather(&mut graph, node, table)?;
        }
    }
    sweep(&mut graph);
    graph.verify()?;
    report.bytes_after = constant_bytes(&graph);
    Ok((graph, report))
}

/// A value's bytes, scale and zero point.
type Quantized = [ValueId; 3];

fn multiply(
    graph: &mut Graph,
    product: &Product,
    options: &DynamicOptions,
    inputs: &mut HashMap<ValueId, Quantized>,
) -> Result<(), ShrinkError> {
    let (shape, mut values) = product.weights(graph)?;
    let name = graph.value(product.weight).name.clone();
    let at = |source: TensorError| ShrinkError::Tensor { name: name.clone(), source };
    let (mut k, mut n) = (shape[0], shape[1]);
    if product.channel_axis == 0 {
        values = transposed(&values, shape[0], shape[1]);
        (k, n) = (n, k);
    }
    let channels = if options.per_channel { Channels { count: n, inner: 1 } } else { Channels::ONE };
    let weight = QuantizedWeight::new(&values, channels, options.weights);
    let [bytes, scale, zero_point] = match inputs.get(&product.input) {
        Some(known) => *known,
        None => {
            let made = quantize_input(graph, product.input)?;
            *inputs.entry(product.input).or_insert(made)
        }
    };
    let stem = graph.node(product.node).name.clone();
    let stored = constant(graph, &format!("{name}.quantized"), Tensor::from_vec([k, n], weight.values).map_err(at)?);
    let dims = if options.per_channel { vec![n] } else { Vec::new() };
    let zeros = Tensor::from_vec(dims.clone(), vec![0i8; weight.scales.len()]).map_err(at)?;
    let zeros = constant(graph, &format!("{name}.zero_point"), zeros);
    let scales = constant(graph, &format!("{name}.scale"), Tensor::from_vec(dims, weight.scales).map_err(at)?);
    let operands = [bytes, stored, zero_point, zeros];
    let sums = add(graph, &format!("{stem}.integer"), MatMulInteger.into(), &operands)?;
    let sums = add(graph, &format!("{stem}.sums"), Cast::to(DType::F32).into(), &[sums])?;
    let factor = binary(graph, &format!("{stem}.factor"), BinaryFunction::Mul, scale, scales)?;
    let mut result = binary(graph, &format!("{stem}.scaled"), BinaryFunction::Mul, sums, factor)?;
    if let Some(bias) = product.bias(graph) {
        result = binary(graph, &format!("{stem}.biased"), BinaryFunction::Add, result, bias)?;
    }
    replace(graph, graph.node(product.node).outputs[0], result, &[]);
    Ok(())
}

fn quantize_input(graph: &mut Graph, value: ValueId) -> Result<Quantized, ShrinkError> {
    let name = graph.value(value).name.clone();
    let node = graph.unique_node_name(&format!("{name}.quantize"));
    let outputs = ["quantized", "scale", "zero_point"].map(|part| graph.unique_value_name(&format!("{name}.{part}")));
    let node = graph.add_node(node, DynamicQuantizeLinear.into(), vec![Some(value)], outputs.into())?;
    Ok(std::array::from_fn(|i| graph.node(node).outputs[i]))
}

fn binary(
    graph: &mut Graph,
    stem: &str,
    function: BinaryFunction,
    a: ValueId,
    b: ValueId,
) -> Result<ValueId, ShrinkError> {
    add(graph, stem, Binary { function }.into(), &[a, b])
}

pub(super) fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
}

/// Nodes that gather rows from a large constant matrix of floats, with that matrix.
pub(super) fn tables(graph: &Graph, elements_min: usize) -> Vec<(NodeId, ValueId)> {
    let table = |(id, node): (NodeId, &cutover_graph::Node)| {
        let Op::Gather(gather) = &node.op else { return None };
        let table = node.inputs[0]?;
        let tensor = &graph.constant(table)?.tensor;
        let fits = gather.axis == 0 && tensor.dtype() == DType::F32 && tensor.shape().len() == 2;
        (fits && tensor.element_count() >= elements_min).then_some((id, table))
    };
    graph.nodes().filter_map(table).collect()
}

/// Rows of bytes and their scales are gathered, and multiplied.
pub(super) fn gather(graph: &mut Graph, node: NodeId, table: ValueId) -> Result<(), ShrinkError> {
    let (shape, values) = floats(graph, table).expect("a table of floats");
    let (name, stem) = (graph.value(table).name.clone(), graph.node(node).name.clone());
    let at = |source: TensorError| ShrinkError::Tensor { name: name.clone(), source };
    let rows = QuantizedWeight::new(&values, Channels::along(&shape, 0), WeightRange::Largest);
    let indices = graph.node(node).inputs[1].expect("indices");
    let stored =
        constant(graph, &format!("{name}.quantized"), Tensor::from_vec(shape.clone(), rows.values).map_err(at)?);
    let scales = constant(graph, &format!("{name}.scale"), Tensor::from_vec([shape[0], 1], rows.scales).map_err(at)?);
    let gather = |graph: &mut Graph, part: &str, from| {
        add(graph, &format!("{stem}.{part}"), Gather { axis: 0 }.into(), &[from, indices])
    };
    let (bytes, scale) = (gather(graph, "bytes", stored)?, gather(graph, "scale", scales)?);
    let floats = add(graph, &format!("{stem}.floats"), Cast::to(DType::F32).into(), &[bytes])?;
    let result = binary(graph, &format!("{stem}.rows"), BinaryFunction::Mul, floats, scale)?;
    replace(graph, graph.node(node).outputs[0], result, &[]);
    Ok(())
}
