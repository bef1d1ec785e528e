//! From nodes to functions and kernels, one file for each family.

pub(super) mod attention;
mod blocks;
mod bytes;
mod conv;
mod depthwise;
mod elementwise;
mod indexing;
mod movement;
mod normalize;
mod product;
mod quantized;
mod recurrent;
mod reduce;
mod tiles;
mod window;
pub(super) mod written;

use super::{
    code,
    device::Limits,
    plan::{Builder, Unable},
};
use cutover_graph::{Fact, Graph, Node, Op, ValueId, ops};
use cutover_tensor::DType;

/// Adds what computes `node`'s outputs.
pub(super) fn lower(b: &mut Builder<'_>, node: &Node) -> Result<(), Unable> {
    b.kernel = kernel_name(&node.op).unwrap_or("elementwise");
    if movement::lower_known(b, node)? {
        return Ok(());
    }
    if let Some(result) = lower_empty(b, node) {
        return result;
    }
    match &node.op {
        Op::Unary(op) => elementwise::lower_unary(b, node, op),
        Op::Binary(op) => elementwise::lower_binary(b, node, op),
        Op::Variadic(op) => elementwise::lower_variadic(b, node, op),
        Op::Clip(_) => elementwise::lower_clip(b, node),
        Op::Predicate(op) => elementwise::lower_predicate(b, node, op),
        Op::Where(_) => elementwise::lower_where(b, node),
        Op::Cast(_) | Op::CastLike(_) => elementwise::lower_cast(b, node),
        Op::Reshape(_) | Op::Flatten(_) | Op::Squeeze(_) | Op::Unsqueeze(_) | Op::Identity(_) => {
            movement::lower_view(b, node)
        }
        Op::Dropout(_) if node.outputs.len() == 1 && node.inputs.get(2).is_none_or(Option::is_none) => {
            movement::lower_view(b, node)
        }
        Op::Transpose(op) => movement::lower_transpose(b, node, op),
        Op::Expand(_) => movement::lower_expand(b, node),
        Op::Concat(op) => movement::lower_concat(b, node, op),
        Op::Split(op) => movement::lower_split(b, node, op),
        Op::Gather(op) => movement::lower_gather(b, node, op),
        Op::GatherElements(op) => movement::lower_gather_elements(b, node, op),
        Op::GatherNd(op) => movement::lower_gather_nd(b, node, op),
        Op::Reduce(op) => reduce::lower_reduce(b, node, op),
        Op::ArgReduce(op) => reduce::lower_arg_reduce(b, node, op),
        Op::Cumulate(op) => reduce::lower_cumulate(b, node, op),
        Op::TopK(op) => reduce::lower_top_k(b, node, op),
        Op::Softmax(op) => normalize::lower_softmax(b, node, op),
        Op::LayerNorm(op) => normalize::lower_layer_norm(b, node, op),
        Op::InstanceNorm(op) => normalize::lower_instance_norm(b, node, op),
        Op::BatchNorm(op) => normalize::lower_batch_norm(b, node, op),
        Op::Lrn(op) => normalize::lower_lrn(b, node, op),
        Op::LpNorm(op) => normalize::lower_lp_norm(b, node, op),
        Op::MaxPool(op) => window::lower_max_pool(b, node, op),
        Op::AveragePool(op) => window::lower_average_pool(b, node, op),
        Op::LpPool(op) => window::lower_lp_pool(b, node, op),
        Op::GlobalPool(op) => window::lower_global_pool(b, node, op),
        Op::Conv(op) => match conv::lower(b, node, op)? {
            true => Ok(()),
            false => window::lower_conv(b, node, op),
        },
        Op::MatMul(op) => product::lower_matmul(b, node, op),
        Op::FusedMatMul(op) => product::lower_fused_matmul(b, node, op),
        Op::Gemm(op) => product::lower_gemm(b, node, op, None),
        Op::FusedGemm(op) => product::lower_gemm(b, node, &op.gemm, Some(op)),
        Op::ConvTranspose(op) => window::lower_conv_transpose(b, node, op),
        Op::Recurrent(op) => recurrent::lower(b, node, op),
        Op::Scatter(op) => indexing::lower_scatter(b, node, op),
        Op::Resize(op) => indexing::lower_resize(b, node, op),
        Op::OneHot(op) => quantized::lower_one_hot(b, node, op.axis),
        Op::QuantizeLinear(op) => quantized::lower_quantize(b, node, op),
        Op::DequantizeLinear(op) => quantized::lower_dequantize(b, node, op),
        Op::DynamicQuantizeLinear(_) => quantized::lower_dynamic(b, node),
        Op::MatMulInteger(_) => quantized::lower_matmul_integer(b, node),
        Op::ConvInteger(op) => quantized::lower_conv_integer(b, node, op),
        Op::QLinearMatMul(_) => quantized::lower_qlinear_matmul(b, node),
        Op::MatMulIntegerToFloat(_) => quantized::lower_matmul_to_float(b, node, false),
        Op::DynamicQuantizeMatMul(_) => quantized::lower_matmul_to_float(b, node, true),
        Op::MatMulNBits(op) => blocks::lower(b, node, op),
        Op::QLinearConv(op) => quantized::lower_qlinear_conv(b, node, &op.window, op.group),
        op if movement::moves(op) => movement::lower_selection(b, node),
        _ => Err("no kernel for these values".into()),
    }
}

/// An operand without an element leaves nothing that a loop could begin with.
fn lower_empty(b: &Builder<'_>, node: &Node) -> Option<Result<(), Unable>> {
    let is_view = matches!(node.op, Op::Concat(_) | Op::Pad(_) | Op::Resize(_) | Op::Clip(_));
    let is_empty = node.inputs.first().copied().flatten().is_some_and(|id| b.count(id) == 0);
    (is_empty && !is_view).then(|| Err("an operand without elements".into()))
}

/// What a kernel must know before it is written, and is not known yet.
fn unknown(what: &str) -> Unable {
    Unable::Unknown(format!("'{what}' is known only in a run"))
}

/// The value of input `index`.
fn input(node: &Node, index: usize) -> Result<ValueId, Unable> {
    node.inputs.get(index).copied().flatten().ok_or_else(|| format!("input {index} is missing").into())
}

/// The kernel that such a node is for, `None` where there is none for its operator.
pub(super) fn kernel_name(op: &Op) -> Option<&'static str> {
    Some(match op {
        Op::Unary(_) | Op::Binary(_) | Op::Variadic(_) | Op::Clip(_) | Op::Predicate(_) | Op::Where(_) => "elementwise",
        Op::Cast(_) | Op::CastLike(_) => "cast",
        Op::Reshape(_) | Op::Flatten(_) | Op::Squeeze(_) | Op::Unsqueeze(_) | Op::Identity(_) | Op::Dropout(_) => {
            "view"
        }
        Op::Transpose(_) | Op::Expand(_) => "strided copy",
        Op::Concat(_) | Op::Split(_) => "copy",
        Op::Gather(_) | Op::GatherElements(_) | Op::GatherNd(_) => "gather",
        Op::Shape(_) | Op::Size(_) | Op::Range(_) | Op::EyeLike(_) | Op::ConstantOfShape(_) => "shape",
        Op::Reduce(_) => "reduction",
        Op::ArgReduce(_) => "choice along an axis",
        Op::Cumulate(_) => "running total",
        Op::TopK(_) => "best of a line",
        Op::Softmax(_) => "softmax",
        Op::LayerNorm(_) => "layer normalization",
        Op::InstanceNorm(_) | Op::BatchNorm(_) | Op::LpNorm(_) => "channel normalization",
        Op::Lrn(_) => "local response normalization",
        Op::MaxPool(_) | Op::AveragePool(_) | Op::LpPool(_) => "pool",
        Op::GlobalPool(_) => "global pool",
        Op::Conv(_) => "convolution",
        Op::MatMul(_) | Op::FusedMatMul(_) | Op::Gemm(_) | Op::FusedGemm(_) => "matrix product",
        Op::ConvTranspose(_) => "transposed convolution",
        Op::Recurrent(_) => "recurrent",
        Op::Scatter(_) => "scatter",
        Op::Resize(_) => "resampling",
        Op::OneHot(_) => "choice",
        Op::QuantizeLinear(_) | Op::DequantizeLinear(_) | Op::DynamicQuantizeLinear(_) => "quantization",
        Op::MatMulInteger(_) | Op::QLinearMatMul(_) => "integer product",
        Op::MatMulIntegerToFloat(_) | Op::DynamicQuantizeMatMul(_) => "integer product",
        Op::MatMulNBits(_) => "blocked product",
        Op::ConvInteger(_) | Op::QLinearConv(_) => "integer convolution",
        op if movement::moves(op) => "selection",
        _ => return None,
    })
}

/// Why `node` can't be run on this device, as far as its operator and types tell.
pub(super) fn refusal(gpu: &Limits, graph: &Graph, node: &Node) -> Option<String> {
    if kernel_name(&node.op).is_none() {
        return Some("no kernel for this operator".to_string());
    }
    let graph_value = |id: ValueId| &graph.value(id).fact;
    for &id in node.inputs.iter().flatten().chain(&node.outputs) {
        let Fact::Tensor(fact) = graph_value(id) else { return Some(format!("{} is no tensor", graph_value(id))) };
        let dtype = fact.dtype;
        let is_there = match dtype {
            DType::F16 => gpu.has_f16,
            DType::I64 | DType::U64 => gpu.has_i64,
            dtype => code::value_type(dtype).is_some(),
        };
        if !is_there {
            return Some(format!("this device computes nothing of {dtype}"));
        }
    }
    match &node.op {
        Op::Dropout(_) if node.outputs.len() > 1 || node.inputs.get(2).is_some_and(Option::is_some) => {
            Some("a mask, or training".to_string())
        }
        Op::BatchNorm(op) if op.training.is_some() || op.per_element => Some("in training, or per element".to_string()),
        Op::Unary(op) if op.function == ops::UnaryFunction::BitwiseNot => None,
        _ => None,
    }
}
