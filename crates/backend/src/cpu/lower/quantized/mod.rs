//! Quantized networks on integers: what stands between a dequantization and a quantization becomes one kernel.
//!
//! A dequantized value is not computed when its node comes: it is held as the quantized bytes with their scale and zero point, and made floats only
//! where a kernel asks for floats. A convolution, product, sum, pool or function of one value whose operands are held so, and whose only reader
//! is a quantization, writes that one's result. Images between integer kernels are channels-last, held as strided views.

mod maps;
mod products;
mod windows;

pub(in crate::cpu) use maps::{MapStep, dequantize};
pub(super) use maps::{lower_add, lower_concat, lower_dequantize, lower_dynamic, lower_function, lower_quantize};
pub(in crate::cpu) use products::ProductStep;
pub(super) use products::{
    lower_conv, lower_conv_integer, lower_dynamic_matmul, lower_gemm, lower_matmul, lower_matmul_integer,
    lower_matmul_integer_to_float, lower_qlinear_conv, lower_qlinear_matmul,
};
pub(in crate::cpu) use windows::WindowStep;
pub(super) use windows::{lower_average_pool, lower_global_pool, lower_max_pool};

use super::{
    conv::two_axes,
    elementwise,
    movement::{self, view},
};
use crate::{
    RunError,
    cpu::{
        frame::{Buffer, Frame, Worker},
        lower::Lowered,
        plan::{Builder, Dequantized, NoPlan, Strided},
        weights::Recipe,
    },
};
use cutover_graph::{
    Constant, Node, NodeId, Op, ValueId,
    ops::{
        Activation as Fused, AveragePool, Concat, Conv, EvalContext, Gemm, GlobalPool, GlobalPoolFunction, Inputs,
        MatMul, MaxPool, UnaryFunction, Wide, Window, normalize_axis,
    },
};
use cutover_kernels::cpu::{
    IsaLevel,
    conv::Axis,
    quantized::{self, Quantization, WindowOp},
    quantized_depthwise::{self, DEPTHWISE_TERMS, Depthwise},
    quantized_product::{self as product, Epilogue, Form, ProductShape, Quantized},
};
use cutover_tensor::{DType, Tensor, Value};

/// Bytes of a buffer.
#[derive(Clone, Copy)]
struct Bytes {
    buffer: Buffer,
    signed: bool,
}

/// Multiplications and additions of a product or convolution.
fn operations(shape: &ProductShape) -> u64 {
    2 * (shape.rows() * shape.channels_out * shape.depth()) as u64
}

fn input(node: &Node, index: usize) -> Option<ValueId> {
    node.inputs.get(index).copied().flatten()
}

fn is_byte(dtype: DType) -> bool {
    matches!(dtype, DType::U8 | DType::I8)
}

/// One scale of f32 above 0, and one zero point of bytes of `dtype`.
fn quantization(
    builder: &Builder<'_>,
    scale: Option<ValueId>,
    zero_point: Option<ValueId>,
    dtype: DType,
) -> Option<Quantization> {
    let scale = builder.known_tensor(scale?).filter(|t| t.element_count() == 1 && t.dtype() == DType::F32)?;
    let scale = scale.to_vec::<f32>().ok()?[0];
    let zero_point = match zero_point {
        None => 0,
        Some(id) => {
            let point = builder.known_tensor(id).filter(|t| t.element_count() == 1 && t.dtype() == dtype)?;
            integers(&point)?[0]
        }
    };
    (is_byte(dtype) && scale.is_finite() && scale > 0.0).then_some(Quantization {
        scale,
        zero_point,
        signed: dtype == DType::I8,
    })
}

/// Of a quantization of f32 to bytes, divided in f32.
fn quantization_of(builder: &Builder<'_>, node: &Node) -> Option<Quantization> {
    let Op::QuantizeLinear(op) = &node.op else { return None };
    let (x, output) = (input(node, 0)?, node.outputs[0]);
    let single = builder.is_float(x) && op.precision.is_none_or(|precision| precision == DType::F32);
    quantization(builder, input(node, 1), input(node, 2), builder.fact(output).dtype).filter(|_| single)
}

fn integers(tensor: &Tensor) -> Option<Vec<i32>> {
    match tensor.dtype() {
        DType::U8 => return Some(tensor.bytes().iter().map(|&byte| i32::from(byte)).collect()),
        DType::I8 => return Some(tensor.bytes().iter().map(|&byte| i32::from(byte as i8)).collect()),
        _ => {}
    }
    match Wide::of(tensor).ok()? {
        Wide::Int(values) => Some(values.into_iter().map(|v| v as i32).collect()),
        _ => None,
    }
}

/// The same bytes under the shape of `output`.
pub(super) fn hold_view(
    builder: &mut Builder<'_>,
    output: ValueId,
    of: ValueId,
    held: Dequantized,
) -> Result<(), NoPlan> {
    let (from, to) = (builder.shape(of), builder.shape(output));
    let view = match from == to {
        true => held.view,
        false => {
            let buffer = contiguous(builder, &held.view, &from)?;
            Strided { buffer, offset: 0, strides: to.strides().to_vec() }
        }
    };
    builder.hold_dequantized(output, Dequantized { view, from: held.from });
    Ok(())
}

/// The bytes of a view, row-major.
fn contiguous(builder: &mut Builder<'_>, view: &Strided, shape: &[usize]) -> Result<Buffer, NoPlan> {
    copied(builder, view, shape, &(0..shape.len()).collect::<Vec<_>>())
}

/// The bytes of a view with its axes in another order; the view's own buffer if it has them so.
fn copied(builder: &mut Builder<'_>, view: &Strided, shape: &[usize], order: &[usize]) -> Result<Buffer, NoPlan> {
    let turned: Vec<usize> = order.iter().map(|&a| shape[a]).collect();
    let strides: Vec<usize> = order.iter().map(|&a| view.strides[a]).collect();
    let wanted = cutover_tensor::Shape::new(&turned).strides().to_vec();
    if view.offset == 0 && (0..turned.len()).all(|a| turned[a] == 1 || strides[a] == wanted[a]) {
        return Ok(view.buffer);
    }
    let to = builder.new_bytes(turned.iter().product())?;
    let from = Strided { strides, ..view.clone() };
    let kernel = builder.name_kernel("layout");
    let buffer = view.buffer;
    builder.push(Lowered::CopyStrided(movement::CopyStrided { from, shape: turned, size: 1, to }), &[buffer], &[to]);
    builder.name_kernel(kernel);
    Ok(to)
}

/// Channels last, in the strides of `[n, c, …]`.
fn channels_last(shape: &[usize]) -> Vec<usize> {
    let order = last_order(shape.len());
    let turned: Vec<usize> = order.iter().map(|&a| shape[a]).collect();
    let strides = cutover_tensor::Shape::new(&turned).strides().to_vec();
    let mut own = vec![0; shape.len()];
    order.iter().zip(strides).for_each(|(&axis, stride)| own[axis] = stride);
    own
}

fn last_order(rank: usize) -> Vec<usize> {
    [0].into_iter().chain(2..rank).chain([1]).collect()
}

/// The bytes that an image is held as, channels-last from now on.
fn image(builder: &mut Builder<'_>, id: ValueId) -> Result<Option<(Buffer, Quantization)>, NoPlan> {
    let Some(held) = builder.dequantized(id) else { return Ok(None) };
    let shape = builder.shape(id);
    let buffer = copied(builder, &held.view, &shape, &last_order(shape.rank()))?;
    let view = Strided { buffer, offset: 0, strides: channels_last(&shape) };
    builder.hold_dequantized(id, Dequantized { view, from: held.from });
    Ok(Some((buffer, held.from)))
}

/// The quantization that is a value's only reader, by way of clamps.
struct Sink {
    /// Its result.
    value: ValueId,
    to: Quantization,
    /// Bounds of the rounded quotient, the clamps' among them.
    low: f32,
    high: f32,
    nodes: Vec<NodeId>,
}

fn sink(builder: &Builder<'_>, output: ValueId, bounds: (f32, f32)) -> Option<Sink> {
    let (mut low, mut high) = bounds;
    let mut value = output;
    let mut nodes = Vec::new();
    loop {
        let (id, node) = builder.only_reader(value)?;
        nodes.push(id);
        match &node.op {
            Op::QuantizeLinear(_) if node.inputs[0] == Some(value) => {
                let to = quantization_of(builder, node)?;
                let (least, most) = to.bounds();
                let within = |bound: f32| (bound / to.scale).round_ties_even().clamp(least, most);
                return Some(Sink { value: node.outputs[0], to, low: within(low), high: within(high), nodes });
            }
            Op::Unary(op) if op.function == UnaryFunction::Relu => (low, high) = (low.max(0.0), high.max(0.0)),
            Op::Clip(_) if node.inputs[0] == Some(value) => {
                let bound = |index: usize, open: f32| match input(node, index) {
                    None => Some(open),
                    Some(id) => builder.scalar(id),
                };
                let (least, most) = (bound(1, f32::NEG_INFINITY)?, bound(2, f32::INFINITY)?);
                let clip = |x: f32| x.max(least).min(most);
                (low, high) = (clip(low), clip(high));
            }
            _ => return None,
        }
        value = node.outputs[0];
    }
}

/// As [`sink`], where nothing clamps on the way.
fn open_sink(builder: &Builder<'_>, output: ValueId) -> Option<Sink> {
    let sink = sink(builder, output, (f32::NEG_INFINITY, f32::INFINITY))?;
    ((sink.low, sink.high) == sink.to.bounds()).then_some(sink)
}

/// The bounds that an activation is, if it is no more than that.
fn clamps(activation: Option<Fused>) -> Option<(f32, f32)> {
    match activation {
        None => Some((f32::NEG_INFINITY, f32::INFINITY)),
        Some(Fused::Relu) => Some((0.0, f32::INFINITY)),
        Some(Fused::Clip { low, high }) => Some((low, high)),
        Some(_) => None,
    }
}

/// What the dequantization of a constant gives.
pub(in crate::cpu) fn evaluate(builder: &Builder<'_>, id: ValueId) -> Option<Tensor> {
    let (producer, _) = builder.graph.producer(id)?;
    let node = builder.graph.node(producer);
    if !matches!(node.op, Op::DequantizeLinear(_)) {
        return None;
    }
    let constant = |input: &Option<ValueId>| match *input {
        None => Some(None),
        Some(id) => builder.graph.constant(id).map(|c| Some(Value::Tensor(c.tensor.clone()))),
    };
    let values = node.inputs.iter().map(constant).collect::<Option<Vec<_>>>()?;
    let borrowed: Vec<Option<&Value>> = values.iter().map(Option::as_ref).collect();
    let results = node.op.eval(Inputs(&borrowed), &EvalContext::default()).ok()?;
    results.into_iter().next()?.into_tensor()
}

fn constant(builder: &mut Builder<'_>, values: Vec<f32>) -> Result<Buffer, NoPlan> {
    let tensor = Tensor::from_vec([values.len()], values);
    let tensor = tensor.map_err(|e| {
        NoPlan::Error(RunError::Op { node: String::new(), op: "constant".to_string(), source: e.into() })
    })?;
    Ok(builder.new_constant(tensor))
}

/// Factor and offset of each channel's sums, from the scales of weights, input and result and the bias.
fn requantization(weights: &[f32], from: f32, bias: Option<&[f32]>, to: f32) -> (Vec<f32>, Vec<f32>) {
    let factor = |w: &f32| (f64::from(from) * f64::from(*w) / f64::from(to)) as f32;
    let offset = |m: usize| bias.map_or(0.0, |bias| (f64::from(bias[m]) / f64::from(to)) as f32);
    (weights.iter().map(factor).collect(), (0..weights.len()).map(offset).collect())
}

/// The geometry of a convolution of `[n, c, …]`.
fn geometry(
    builder: &Builder<'_>,
    window: &Window,
    group: usize,
    x: ValueId,
    kernel: &[usize],
    output: ValueId,
) -> Option<ProductShape> {
    let (shape, to) = (builder.shape(x), builder.shape(output));
    if !(3..=4).contains(&shape.rank()) || shape.element_count() == 0 || to.element_count() == 0 {
        return None;
    }
    let axes = window.axes(&shape[2..], kernel).ok()?;
    let (height, width) = two_axes(&axes)?;
    Some(ProductShape { images: shape[0], height, width, channels_in: shape[1], channels_out: to[1], groups: group })
}

impl Bytes {
    fn of<'a>(&self, frame: &'a Frame<'_>, zero_point: i32) -> Quantized<'a> {
        Quantized { bytes: frame.bytes(self.buffer), signed: self.signed, zero_point }
    }
}
