//! Weights of 4 or 8 bits in blocks, activations in floats: `MatMulNBits`, and `GatherBlockQuantized` for tables.

use super::{
    QuantizeReport,
    dynamic::{tables, transposed},
    gptq,
};
use crate::{
    Kept, Observation, Question, ShrinkError,
    edit::{Product, ProductKind, add, constant, constant_bytes, floats, replace, sweep},
};
use cutover_graph::{
    Graph, NodeId, ValueId,
    ops::{Binary, BinaryFunction, GatherBlockQuantized, MatMulNBits},
};
use cutover_tensor::{Tensor, TensorError};
use std::collections::{HashMap, HashSet};

/// How to store weights.
#[derive(Clone, Debug)]
pub struct BlockOptions {
    /// 4 or 8.
    pub bits: usize,
    /// Weights along `k` that share a scale and a zero point: a power of two from 16 on.
    pub block: usize,
    /// Tables that are gathered from (embeddings) too.
    pub tables: bool,
    /// Weights of fewer elements stay: they weigh nothing.
    pub elements_min: usize,
    /// Names of nodes that stay in floats.
    pub exclude: HashSet<String>,
}

impl Default for BlockOptions {
    fn default() -> Self {
        BlockOptions { bits: 4, block: 32, tables: true, elements_min: 1024, exclude: HashSet::new() }
    }
}

impl BlockOptions {
    fn check(&self) -> Result<(), ShrinkError> {
        if !matches!(self.bits, 4 | 8) {
            return Err(ShrinkError::Option(format!("weights of {} bits (only 4 and 8)", self.bits)));
        }
        if !self.block.is_power_of_two() || self.block < 16 {
            return Err(ShrinkError::Option(format!("blocks of {}: expected a power of two from 16 on", self.block)));
        }
        Ok(())
    }

    fn takes(&self, graph: &Graph, product: &Product) -> Result<(), &'static str> {
        let small = graph.constant(product.weight).is_some_and(|c| c.tensor.element_count() < self.elements_min);
        match product.kind {
            ProductKind::Conv { .. } => Err("convolutions have no form with weights of a few bits"),
            _ if self.exclude.contains(&graph.node(product.node).name) => Err("it was excluded"),
            _ if small => Err("it is small"),
            _ => Ok(()),
        }
    }

    /// What GPTQ has to know of `graph`, for [`crate::observe()`].
    pub fn questions(&self, graph: &Graph) -> Vec<Question> {
        let products = Product::all(graph).into_iter().filter(|p| self.takes(graph, p).is_ok());
        let mut values: Vec<ValueId> = products.map(|p| p.input).collect();
        values.sort();
        values.dedup();
        values.into_iter().map(|value| Question { value, channel_axis: -1, gram: true }).collect()
    }
}

/// `graph`, which is [`crate::plain`], with the weights of its matrix products in blocks of few bits. Where `observations` hold a product's input with
/// its Gram matrix, the weight is rounded by GPTQ; otherwise to the nearest step.
///
/// # Errors
/// Options out of range; a weight that is not finite.
pub fn quantize_weights(
    mut graph: Graph,
    observations: &HashMap<ValueId, Observation>,
    options: &BlockOptions,
) -> Result<(Graph, QuantizeReport), ShrinkError> {
    options.check()?;
    let mut report = QuantizeReport { bytes_before: constant_bytes(&graph), ..QuantizeReport::default() };
    for product in Product::all(&graph) {
        let name = graph.node(product.node).name.clone();
        match options.takes(&graph, &product) {
            Err(reason) => report.kept.push(Kept { name, reason: reason.to_string() }),
            Ok(()) => {
                let gram = observations.get(&product.input).map_or(&[][..], |o| &o.gram);
                multiply(&mut graph, &product, gram, options)?;
                report.quantized.push(name);
            }
        }
    }
    if options.tables {
        for (node, table) in tables(&graph, options.elements_min) {
            let width = graph.constant(table).map_or(0, |c| c.tensor.shape()[1]);
            let name = graph.node(node).name.clone();
            if options.exclude.contains(&name) || !width.is_multiple_of(2) {
                let reason = if width.is_multiple_of(2) { "it was excluded" } else { "its rows are of an odd width" };
                report.kept.push(Kept { name, reason: reason.to_string() });
                continue;
            }
            gather(&mut graph, node, table, options)?;
            report.quantized.push(name);
        }
    }
    sweep(&mut graph);
    graph.verify()?;
    report.bytes_after = constant_bytes(&graph);
    Ok((graph, report))
}

/// `q = round(w / scale) + zero_point` in `[0, 2ᵇ)`.
#[derive(Clone, Copy, Debug)]
struct Step {
    scale: f32,
    zero_point: u8,
}

impl Step {
    /// What covers the values, and 0.
    fn covering(values: impl Iterator<Item = f32>, bits: usize) -> Step {
        let most = ((1u32 << bits) - 1) as f32;
        let (low, high) = values.fold((0f32, 0f32), |(low, high), v| (low.min(v), high.max(v)));
        let scale = (high / most - low / most).max(f32::MIN_POSITIVE);
        if low == high {
            return Step { scale: 1.0, zero_point: 1 << (bits - 1) };
        }
        Step { scale, zero_point: (-low / scale).round_ties_even().clamp(0.0, most) as u8 }
    }

    fn quantize(self, value: f32, bits: usize) -> u8 {
        let most = ((1u32 << bits) - 1) as f32;
        ((value / self.scale).round_ties_even() + f32::from(self.zero_point)).clamp(0.0, most) as u8
    }

    fn real(self, q: u8) -> f32 {
        (f32::from(q) - f32::from(self.zero_point)) * self.scale
    }
}

/// A matrix in blocks along each of its rows.
struct Blocks {
    /// Elements, one to a byte.
    values: Vec<u8>,
    steps: Vec<Step>,
}

fn multiply(graph: &mut Graph, product: &Product, gram: &[f32], options: &BlockOptions) -> Result<(), ShrinkError> {
    let (shape, mut values) = product.weights(graph)?;
    let name = graph.value(product.weight).name.clone();
    let at = |source: TensorError| ShrinkError::Tensor { name: name.clone(), source };
    let (mut k, mut n) = (shape[0], shape[1]);
    if product.channel_axis == 0 {
        values = transposed(&values, shape[0], shape[1]);
        (k, n) = (n, k);
    }
    let BlockOptions { bits, block, .. } = *options;
    let blocks = k.div_ceil(block);
    // Column by column, which are the rows of what is stored.
    let mut made =
        Blocks { values: vec![0; n * blocks * block], steps: vec![Step { scale: 1.0, zero_point: 0 }; n * blocks] };
    gptq::round_rows(&mut values, n, gram, |row, weights| {
        if row % block == 0 {
            let rows = row..k.min(row + block);
            for column in 0..n {
                let values = rows.clone().map(|r| weights[r * n + column]);
                made.steps[column * blocks + row / block] = Step::covering(values, bits);
            }
        }
        for (column, w) in weights[row * n..][..n].iter_mut().enumerate() {
            let step = made.steps[column * blocks + row / block];
            let q = step.quantize(*w, bits);
            made.values[column * blocks * block + row] = q;
            *w = step.real(q);
        }
    });
    let stem = graph.node(product.node).name.clone();
    let data = Tensor::from_vec([n, blocks, block * bits / 8], packed(&made.values, block, bits)).map_err(at)?;
    let scales = Tensor::from_vec([n, blocks], made.steps.iter().map(|s| s.scale).collect()).map_err(at)?;
    let zero_points: Vec<u8> = made.steps.iter().map(|s| s.zero_point).collect();
    let row_bytes = (blocks * bits).div_ceil(8);
    let zero_points = Tensor::from_vec([n, row_bytes], packed(&zero_points, blocks, bits)).map_err(at)?;
    let data = constant(graph, &format!("{name}.quantized"), data);
    let scales = constant(graph, &format!("{name}.scales"), scales);
    let zero_points = constant(graph, &format!("{name}.zero_points"), zero_points);
    let op = MatMulNBits { n, k, bits, block_size: block, accuracy_level: 0 };
    let operands = [product.input, data, scales, zero_points];
    let mut result = add(graph, &format!("{stem}.blocks"), op.into(), &operands)?;
    if let Some(bias) = product.bias(graph) {
        let sum = Binary { function: BinaryFunction::Add };
        result = add(graph, &format!("{stem}.biased"), sum.into(), &[result, bias])?;
    }
    replace(graph, graph.node(product.node).outputs[0], result, &[]);
    Ok(())
}

/// Rows of `width` elements packed from the low bits up, every row from a byte of its own.
fn packed(values: &[u8], width: usize, bits: usize) -> Vec<u8> {
    if bits == 8 {
        return values.to_vec();
    }
    let byte = |pair: &[u8]| pair[0] | pair.get(1).map_or(0, |high| high << 4);
    values.chunks(width.max(1)).flat_map(|row| row.chunks(2).map(byte)).collect()
}

fn gather(graph: &mut Graph, node: NodeId, table: ValueId, options: &BlockOptions) -> Result<(), ShrinkError> {
    let (shape, values) = floats(graph, table).expect("a table of floats");
    let (name, stem) = (graph.value(table).name.clone(), graph.node(node).name.clone());
    let at = |source: TensorError| ShrinkError::Tensor { name: name.clone(), source };
    let BlockOptions { bits, block, .. } = *options;
    let (rows, width) = (shape[0], shape[1]);
    let blocks = width.div_ceil(block);
    let runs = || values.chunks(width).flat_map(|row| row.chunks(block));
    let steps: Vec<Step> = runs().map(|run| Step::covering(run.iter().copied(), bits)).collect();
    let quantized = runs().zip(&steps).flat_map(|(run, step)| run.iter().map(|&w| step.quantize(w, bits)));
    let data = packed(&quantized.collect::<Vec<_>>(), width, bits);
    let data = Tensor::from_vec([rows, width * bits / 8], data).map_err(at)?;
    let scales = Tensor::from_vec([rows, blocks], steps.iter().map(|s| s.scale).collect()).map_err(at)?;
    let zero_points: Vec<u8> = steps.iter().map(|s| s.zero_point).collect();
    let zero_points =
        Tensor::from_vec([rows, (blocks * bits).div_ceil(8)], packed(&zero_points, blocks, bits)).map_err(at)?;
    let indices = graph.node(node).inputs[1].expect("indices");
    let data = constant(graph, &format!("{name}.quantized"), data);
    let scales = constant(graph, &format!("{name}.scales"), scales);
    let zero_points = constant(graph, &format!("{name}.zero_points"), zero_points);
    let op = GatherBlockQuantized { gather_axis: 0, quantize_axis: 1, block_size: block, bits };
    let result = add(graph, &format!("{stem}.rows"), op.into(), &[data, indices, scales, zero_points])?;
    replace(graph, graph.node(node).outputs[0], result, &[]);
    Ok(())
}
