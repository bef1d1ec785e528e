//! Which kernel runs which node: one file per family.

pub(super) mod conv;
pub(super) mod elementwise;
pub(super) mod fallback;
pub(super) mod layout;
pub(super) mod movement;
pub(super) mod normalize;
pub(super) mod pool;
pub(super) mod product;
pub(super) mod recurrent;
pub(super) mod resample;
pub(super) mod select;

use super::{
    frame::{Frame, Worker},
    plan::{Builder, NoPlan},
};
use crate::{RunError, Support};
use cutover_graph::{Fact, Graph, Node, Op, ops};
use cutover_kernels::cpu::{Activation, IsaLevel};
use cutover_tensor::DType;

/// The steps there are. A `match` per step of a run, nothing virtual.
pub(super) enum Lowered {
    Reorder(layout::Reorder),
    Conv(conv::ConvStep),
    FirstConv(conv::FirstStep),
    Depthwise(conv::DepthwiseStep),
    PackB(product::PackB),
    Product(product::Product),
    Pool(pool::PoolStep),
    GlobalPool(pool::GlobalStep),
    Unary(elementwise::UnaryStep),
    Binary(elementwise::BinaryStep),
    Softmax(normalize::SoftmaxStep),
    StridedSoftmax(normalize::StridedSoftmaxStep),
    LayerNorm(normalize::LayerNormStep),
    ChannelNorm(normalize::ChannelNormStep),
    Lrn(normalize::LrnStep),
    Reduce(normalize::ReduceStep),
    Copy(movement::Copy),
    CopyStrided(movement::CopyStrided),
    Gather(movement::GatherStep),
    Resample(resample::ResampleStep),
    TopK(select::TopKStep),
    Fill(select::FillStep),
    Recurrence(recurrent::Recurrence),
    Fallback(fallback::FallbackStep),
}

impl Lowered {
    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>, level: IsaLevel) -> Result<(), RunError> {
        match self {
            Lowered::Reorder(step) => step.run(frame, worker, level),
            Lowered::Conv(step) => step.run(frame, worker, level),
            Lowered::FirstConv(step) => step.run(frame, worker, level),
            Lowered::Depthwise(step) => step.run(frame, worker, level),
            Lowered::PackB(step) => step.run(frame, worker, level),
            Lowered::Product(step) => step.run(frame, worker, level),
            Lowered::Pool(step) => step.run(frame, worker, level),
            Lowered::GlobalPool(step) => step.run(frame, worker, level),
            Lowered::Unary(step) => step.run(frame, worker, level),
            Lowered::Binary(step) => step.run(frame, worker, level),
            Lowered::Softmax(step) => step.run(frame, worker, level),
            Lowered::StridedSoftmax(step) => step.run(frame, worker, level),
            Lowered::LayerNorm(step) => step.run(frame, worker, level),
            Lowered::ChannelNorm(step) => step.run(frame, worker),
            Lowered::Lrn(step) => step.run(frame, worker),
            Lowered::Reduce(step) => step.run(frame, worker, level),
            Lowered::Copy(step) => step.run(frame, worker),
            Lowered::CopyStrided(step) => step.run(frame, worker, level),
            Lowered::Gather(step) => return step.run(frame, worker),
            Lowered::Resample(step) => step.run(frame, worker),
            Lowered::TopK(step) => step.run(frame, worker),
            Lowered::Fill(step) => step.run(frame, worker),
            Lowered::Recurrence(step) => step.run(frame, worker, level),
            Lowered::Fallback(step) => return step.run(frame, worker),
        }
        Ok(())
    }
}

/// Adds the steps of `node` with kernels; `false` where there is none for it.
pub(super) fn lower(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    match &node.op {
        Op::Conv(op) => conv::lower(builder, node, op),
        Op::ConvTranspose(op) => conv::lower_transposed(builder, node, op),
        Op::MatMul(op) => product::lower_matmul(builder, node, op),
        Op::Gemm(op) => product::lower_gemm(builder, node, op),
        Op::MaxPool(op) => pool::lower_max(builder, node, op),
        Op::AveragePool(op) => pool::lower_average(builder, node, op),
        Op::GlobalPool(op) => pool::lower_global(builder, node, op),
        Op::Unary(op) => elementwise::lower_unary(builder, node, op),
        Op::Binary(op) => elementwise::lower_binary(builder, node, op),
        Op::Variadic(op) => elementwise::lower_variadic(builder, node, op),
        Op::Clip(_) => elementwise::lower_clip(builder, node),
        Op::Softmax(op) => normalize::lower_softmax(builder, node, op),
        Op::LayerNorm(op) => normalize::lower_layer_norm(builder, node, op),
        Op::BatchNorm(op) => normalize::lower_batch_norm(builder, node, op),
        Op::InstanceNorm(op) => normalize::lower_instance_norm(builder, node, op),
        Op::Lrn(op) => normalize::lower_lrn(builder, node, op),
        Op::Reduce(op) => normalize::lower_reduce(builder, node, op),
        Op::Resize(op) => resample::lower(builder, node, op),
        Op::TopK(op) => select::lower_top_k(builder, node, op),
        Op::ConstantOfShape(op) => select::lower_fill(builder, node, op),
        Op::DepthSpace(op) => movement::lower_depth_space(builder, node, op),
        Op::Recurrent(op) => recurrent::lower(builder, node, op),
        Op::Reshape(_) | Op::Flatten(_) | Op::Squeeze(_) | Op::Unsqueeze(_) | Op::Identity(_) => {
            movement::lower_view(builder, node)
        }
        Op::Dropout(_) if node.outputs.len() == 1 => movement::lower_view(builder, node),
        Op::Transpose(op) => movement::lower_transpose(builder, node, op),
        Op::Slice(_) => movement::lower_slice(builder, node),
        Op::Expand(_) => movement::lower_expand(builder, node),
        Op::Concat(op) => movement::lower_concat(builder, node, op),
        Op::Split(op) => movement::lower_split(builder, node, op),
        Op::Gather(op) => movement::lower_gather(builder, node, op),
        _ => Ok(false),
    }
}

/// What kernel a node is for, as far as its operator and types tell.
pub(super) fn kernel_name(graph: &Graph, node: &Node) -> &'static str {
    match support(graph, node) {
        Support::Native { kernel } => kernel,
        _ => "reference",
    }
}

/// As the placement says it. A node of unusual attributes or shapes may still fall back; an executable's placement says which.
pub(super) fn support(graph: &Graph, node: &Node) -> Support {
    let fallback = |reason: &str| Support::Fallback { reason: reason.to_string() };
    let dtype = |fact: &Fact| fact.as_tensor().map(|t| t.dtype);
    let first = node.inputs.iter().flatten().next().and_then(|&i| dtype(&graph.value(i).fact));
    let moves = matches!(
        node.op,
        Op::Reshape(_)
            | Op::Flatten(_)
            | Op::Squeeze(_)
            | Op::Unsqueeze(_)
            | Op::Identity(_)
            | Op::Concat(_)
            | Op::Split(_)
            | Op::Gather(_)
    );
    let kernel = match &node.op {
        Op::Shape(_) | Op::Size(_) | Op::Range(_) => return Support::Native { kernel: "shape" },
        Op::Conv(_) => "convolution",
        Op::ConvTranspose(_) => "transposed convolution",
        Op::MatMul(_) | Op::Gemm(_) => "matrix product",
        Op::MaxPool(_) | Op::AveragePool(_) => "pool",
        Op::GlobalPool(op) if !matches!(op.function, ops::GlobalPoolFunction::Lp { .. }) => "global pool",
        Op::Unary(op) if elementwise::unary_kernel(op.function).is_some() => "elementwise",
        Op::Binary(op) if elementwise::binary_kernel(op.function).is_some() => "elementwise",
        Op::Variadic(_) | Op::Clip(_) => "elementwise",
        Op::Softmax(op) if op.function != ops::SoftmaxFunction::Hardmax => "softmax",
        Op::LayerNorm(_) => "layer normalization",
        Op::BatchNorm(_) | Op::InstanceNorm(_) => "channel normalization",
        Op::Lrn(_) => "local response normalization",
        Op::Reduce(op) if normalize::reduction(op.function).is_some() => "reduction",
        Op::Resize(_) => "resampling",
        Op::TopK(_) => "best of a line",
        Op::ConstantOfShape(_) => return Support::Native { kernel: "fill" },
        Op::Recurrent(_) => "recurrent",
        Op::Reshape(_) | Op::Flatten(_) | Op::Squeeze(_) | Op::Unsqueeze(_) | Op::Identity(_) | Op::Dropout(_) => {
            "view"
        }
        Op::Transpose(_) | Op::Slice(_) | Op::Expand(_) | Op::DepthSpace(_) => "strided copy",
        Op::Concat(_) | Op::Split(_) => "copy",
        Op::Gather(_) => "gather",
        _ => return fallback("no kernel"),
    };
    match first {
        Some(DType::F32) => Support::Native { kernel },
        Some(DType::String) | None => fallback("not a numeric tensor"),
        Some(_) if moves => Support::Native { kernel },
        Some(DType::I32 | DType::I64) if kernel == "best of a line" => Support::Native { kernel },
        Some(DType::I32 | DType::U32) if kernel == "strided copy" => Support::Native { kernel },
        Some(other) => Support::Fallback { reason: format!("no kernel for {other}") },
    }
}

/// The kernels' name of a fused activation.
fn activation(fused: Option<ops::Activation>) -> Activation {
    match fused {
        None => Activation::Identity,
        Some(ops::Activation::Relu) => Activation::Relu,
        Some(ops::Activation::Clip { low, high }) => Activation::Clip { low, high },
        Some(ops::Activation::LeakyRelu { alpha }) => Activation::LeakyRelu { alpha },
        Some(ops::Activation::Sigmoid) => Activation::Sigmoid,
        Some(ops::Activation::Tanh) => Activation::Tanh,
        Some(ops::Activation::Silu) => Activation::Silu,
        Some(ops::Activation::HardSigmoid { alpha, beta }) => Activation::HardSigmoid { alpha, beta },
        Some(ops::Activation::HardSwish) => Activation::HardSwish,
        Some(ops::Activation::Gelu) => Activation::Gelu,
        Some(ops::Activation::GeluTanh) => Activation::GeluTanh,
    }
}
