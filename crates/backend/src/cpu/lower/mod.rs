//! Which kernel runs which node: one file per family.

pub(super) mod attention;
pub(super) mod conv;
pub(super) mod elementwise;
pub(super) mod expanded;
pub(super) mod fallback;
pub(super) mod half;
pub(super) mod indexing;
pub(super) mod layout;
pub(super) mod ml;
pub(super) mod movement;
pub(super) mod nbits;
pub(super) mod normalize;
pub(super) mod pool;
pub(super) mod product;
pub(super) mod quantized;
pub(super) mod recurrent;
pub(super) mod resample;
pub(super) mod sampling;
pub(super) mod select;
pub(super) mod top_k;
pub(super) mod trees;
pub(super) mod typed;
pub(super) mod unfolded;

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
    Narrow(layout::Narrow),
    Conv(conv::ConvStep),
    FirstConv(conv::FirstStep),
    Depthwise(conv::DepthwiseStep),
    Expanded(expanded::ExpandedStep),
    Unfolded(unfolded::UnfoldedStep),
    Attention(attention::AttentionStep),
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
    Regions(sampling::RegionsStep),
    Grid(sampling::GridStep),
    TopK(top_k::TopKStep),
    Fill(top_k::FillStep),
    Recurrence(recurrent::Recurrence),
    Trees(trees::TreesStep),
    ToFloats(ml::ToFloats),
    Scaler(ml::ScalerStep),
    Normalizer(ml::NormalizerStep),
    Linear(ml::LinearStep),
    Svm(ml::SvmStep),
    Typed(typed::TypedStep),
    Lines(typed::LinesStep),
    Runs(select::RunsStep),
    Choose(select::ChooseStep),
    Indexed(indexing::IndexedStep),
    IntegerProduct(quantized::ProductStep),
    IntegerWindow(quantized::WindowStep),
    Map(quantized::MapStep),
    NBits(nbits::NBitsStep),
    Fallback(fallback::FallbackStep),
}

impl Lowered {
    /// What a run reads that lies in no buffer, as far as it counts: that of models of rows, for each row again.
    pub fn bytes_beside_buffers(&self) -> usize {
        match self {
            Lowered::Trees(step) => step.bytes_read(),
            Lowered::Linear(step) => step.bytes_read(),
            Lowered::Svm(step) => step.bytes_read(),
            _ => 0,
        }
    }

    /// Multiplications and additions of products, as [`crate::Work`] counts them.
    pub fn operations(&self) -> u64 {
        match self {
            Lowered::Conv(step) => step.operations(),
            Lowered::FirstConv(step) => step.operations(),
            Lowered::Depthwise(step) => step.operations(),
            Lowered::Expanded(step) => step.operations(),
            Lowered::Attention(step) => step.operations(),
            Lowered::Product(step) => step.operations(),
            Lowered::NBits(step) => step.operations(),
            _ => 0,
        }
    }

    /// The same of products of bytes.
    pub fn integer_operations(&self) -> u64 {
        match self {
            Lowered::IntegerProduct(step) => step.operations(),
            Lowered::IntegerWindow(step) => step.operations(),
            _ => 0,
        }
    }

    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>, level: IsaLevel) -> Result<(), RunError> {
        match self {
            Lowered::Reorder(step) => step.run(frame, worker, level),
            Lowered::Narrow(step) => step.run(frame, worker, level),
            Lowered::Conv(step) => step.run(frame, worker, level),
            Lowered::FirstConv(step) => step.run(frame, worker, level),
            Lowered::Depthwise(step) => step.run(frame, worker, level),
            Lowered::Expanded(step) => step.run(frame, worker, level),
            Lowered::Unfolded(step) => step.run(frame, worker, level),
            Lowered::Attention(step) => step.run(frame, worker, level),
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
            Lowered::Regions(step) => return step.run(frame, worker, level),
            Lowered::Grid(step) => step.run(frame, worker, level),
            Lowered::TopK(step) => step.run(frame, worker),
            Lowered::Fill(step) => step.run(frame, worker),
            Lowered::Recurrence(step) => step.run(frame, worker, level),
            Lowered::Trees(step) => step.run(frame, worker),
            Lowered::ToFloats(step) => step.run(frame, worker),
            Lowered::Scaler(step) => step.run(frame, worker),
            Lowered::Normalizer(step) => step.run(frame, worker),
            Lowered::Linear(step) => step.run(frame, worker, level),
            Lowered::Svm(step) => step.run(frame, worker, level),
            Lowered::Typed(step) => return step.run(frame, worker, level),
            Lowered::Lines(step) => return step.run(frame, worker, level),
            Lowered::Runs(step) => step.run(frame, worker),
            Lowered::Choose(step) => step.run(frame, worker, level),
            Lowered::Indexed(step) => return step.run(frame, worker, level),
            Lowered::IntegerProduct(step) => step.run(frame, worker, level),
            Lowered::IntegerWindow(step) => step.run(frame, worker, level),
            Lowered::Map(step) => step.run(frame, worker, level),
            Lowered::NBits(step) => step.run(frame, worker, level),
            Lowered::Fallback(step) => return step.run(frame, worker),
        }
        Ok(())
    }
}

/// Adds the steps of `node` with kernels; `false` where there is none for it.
pub(super) fn lower(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    if lower_quantized(builder, node)? {
        return Ok(true);
    }
    builder.settle(node);
    match &node.op {
        Op::Conv(op) => Ok(conv::lower(builder, node, op)? || unfolded::lower(builder, node, op)?),
        Op::ConvTranspose(op) => conv::lower_transposed(builder, node, op),
        Op::MatMul(op) => product::lower_matmul(builder, node, op),
        Op::Gemm(op) => product::lower_gemm(builder, node, op),
        Op::MatMulNBits(op) => nbits::lower(builder, node, op),
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
        Op::RoiAlign(op) => sampling::lower_regions(builder, node, op),
        Op::GridSample(op) => sampling::lower_grid(builder, node, op),
        Op::TopK(op) => top_k::lower_top_k(builder, node, op),
        Op::ConstantOfShape(op) => top_k::lower_fill(builder, node, op),
        Op::DepthSpace(op) => movement::lower_depth_space(builder, node, op),
        Op::Recurrent(op) => recurrent::lower(builder, node, op),
        Op::TreeEnsemble(op) => trees::lower(builder, node, op),
        Op::Scaler(op) => ml::lower_scaler(builder, node, op),
        Op::Normalizer(op) => ml::lower_normalizer(builder, node, op),
        Op::Linear(op) => ml::lower_linear(builder, node, op),
        Op::Svm(op) => ml::lower_svm(builder, node, op),
        Op::Reshape(_) | Op::Flatten(_) | Op::Squeeze(_) | Op::Unsqueeze(_) | Op::Identity(_) => {
            movement::lower_view(builder, node)
        }
        Op::Dropout(_) if is_no_dropout(node) => movement::lower_view(builder, node),
        Op::Transpose(op) => movement::lower_transpose(builder, node, op),
        Op::Slice(_) => movement::lower_slice(builder, node),
        Op::Expand(_) => movement::lower_expand(builder, node),
        Op::Concat(op) => movement::lower_concat(builder, node, op),
        Op::Split(op) => movement::lower_split(builder, node, op),
        Op::Gather(op) => movement::lower_gather(builder, node, op),
        Op::ArrayFeatureExtractor(_) => movement::lower_features(builder, node),
        _ => Ok(false),
    }
}

/// What quantized values are computed with on integers.
fn lower_quantized(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    match &node.op {
        Op::DequantizeLinear(_) => quantized::lower_dequantize(builder, node),
        Op::QuantizeLinear(_) => quantized::lower_quantize(builder, node),
        Op::DynamicQuantizeLinear(_) => quantized::lower_dynamic(builder, node),
        Op::Conv(op) => quantized::lower_conv(builder, node, op),
        Op::Gemm(op) => quantized::lower_gemm(builder, node, op),
        Op::MatMul(op) => quantized::lower_matmul(builder, node, op),
        Op::Unary(_) | Op::Clip(_) => quantized::lower_function(builder, node),
        Op::Binary(op) if op.function == ops::BinaryFunction::Add => quantized::lower_add(builder, node),
        Op::MaxPool(op) => quantized::lower_max_pool(builder, node, op),
        Op::AveragePool(op) => quantized::lower_average_pool(builder, node, op),
        Op::GlobalPool(op) => quantized::lower_global_pool(builder, node, op),
        Op::Concat(op) => quantized::lower_concat(builder, node, op),
        Op::ConvInteger(op) => quantized::lower_conv_integer(builder, node, op),
        Op::QLinearConv(op) => quantized::lower_qlinear_conv(builder, node, op),
        Op::QLinearMatMul(_) => quantized::lower_qlinear_matmul(builder, node),
        Op::MatMulInteger(_) => quantized::lower_matmul_integer(builder, node),
        Op::MatMulIntegerToFloat(_) => quantized::lower_matmul_integer_to_float(builder, node),
        Op::DynamicQuantizeMatMul(_) => quantized::lower_dynamic_matmul(builder, node),
        _ => Ok(false),
    }
}

/// Whether a dropout hands its input on, and has no mask to make: nothing can ask it to train.
fn is_no_dropout(node: &Node) -> bool {
    node.outputs.len() == 1 && node.inputs.get(2).is_none_or(Option::is_none)
}

/// As [`lower`], with the kernels that take elements of any type, slower where there is one for f32; `false` where there is none either.
pub(super) fn lower_any_type(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    if let Some(kernel) = any_type_kernel(&node.op) {
        builder.name_kernel(kernel);
    }
    if node.outputs.iter().all(|&output| builder.shape(output).element_count() == 0) {
        for &output in &node.outputs {
            builder.new_plain(output)?;
        }
        return Ok(true);
    }
    if select::lower_known(builder, node)? {
        return Ok(true);
    }
    match &node.op {
        Op::Unary(_)
        | Op::Binary(_)
        | Op::Variadic(_)
        | Op::Clip(_)
        | Op::Predicate(_)
        | Op::Cast(_)
        | Op::CastLike(_) => typed::lower(builder, node),
        Op::Reduce(op) => typed::lower_reduce(builder, node, op),
        Op::ArgReduce(op) => typed::lower_arg_reduce(builder, node, op),
        Op::Where(_) => select::lower_where(builder, node),
        Op::GatherElements(_) | Op::GatherNd(_) | Op::Scatter(_) => indexing::lower(builder, node),
        _ => select::lower_runs(builder, node),
    }
}

/// The kernel of [`lower_any_type`] that takes such nodes.
fn any_type_kernel(op: &Op) -> Option<&'static str> {
    Some(match op {
        Op::Unary(_) | Op::Binary(_) | Op::Variadic(_) | Op::Clip(_) | Op::Predicate(_) => "elementwise of any type",
        Op::Cast(_) | Op::CastLike(_) => "cast",
        Op::Reduce(_) => "reduction of any type",
        Op::ArgReduce(_) => "choice along an axis",
        Op::Where(_) => "choice",
        Op::GatherElements(_) | Op::GatherNd(_) => "gather",
        Op::Scatter(_) => "scatter",
        Op::ConstantOfShape(_) => "shape",
        op if select::moves(op) => "selection",
        _ => return None,
    })
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
            | Op::ArrayFeatureExtractor(_)
    );
    let is_ml = matches!(node.op, Op::TreeEnsemble(_) | Op::Scaler(_) | Op::Normalizer(_) | Op::Linear(_) | Op::Svm(_));
    let kernel = match &node.op {
        Op::Shape(_) | Op::Size(_) | Op::Range(_) => return Support::Native { kernel: "shape" },
        Op::Conv(_) => "convolution",
        Op::ConvTranspose(_) => "transposed convolution",
        Op::MatMul(_) | Op::Gemm(_) => "matrix product",
        Op::MatMulNBits(_) => "blocked product",
        Op::DynamicQuantizeMatMul(_) => "integer product",
        Op::MaxPool(_) | Op::AveragePool(_) => "pool",
        Op::GlobalPool(op) if !matches!(op.function, ops::GlobalPoolFunction::Lp { .. }) => "global pool",
        Op::Unary(op) if elementwise::unary_kernel(op.function).is_some() => "elementwise",
        Op::Binary(op) if elementwise::binary_kernel(op.function).is_some() => "elementwise",
        Op::Variadic(_) | Op::Clip(_) => "elementwise",
        Op::Softmax(op) if op.function != ops::SoftmaxFunction::Hardmax => "softmax",
        Op::LayerNorm(_) => "layer normalization",
        Op::BatchNorm(op) if op.training.is_none() && !op.per_element => "channel normalization",
        Op::InstanceNorm(_) => "channel normalization",
        Op::Lrn(_) => "local response normalization",
        Op::Reduce(op) if normalize::reduction(op.function).is_some() => "reduction",
        Op::Resize(_) | Op::GridSample(_) => "resampling",
        Op::RoiAlign(op) if !op.maximum => "regions",
        Op::TopK(_) => "best of a line",
        Op::ConstantOfShape(_) => return Support::Native { kernel: "fill" },
        Op::Recurrent(_) => "recurrent",
        Op::TreeEnsemble(_) => "trees",
        Op::Scaler(_) => "scaler",
        Op::Normalizer(_) => "row normalization",
        Op::Linear(_) => "linear model",
        Op::Svm(_) => "support vectors",
        Op::Reshape(_) | Op::Flatten(_) | Op::Squeeze(_) | Op::Unsqueeze(_) | Op::Identity(_) => "view",
        Op::Dropout(_) if is_no_dropout(node) => "view",
        Op::Transpose(_) | Op::Slice(_) | Op::Expand(_) | Op::DepthSpace(_) => "strided copy",
        Op::Concat(_) | Op::Split(_) => "copy",
        Op::Gather(_) | Op::ArrayFeatureExtractor(_) => "gather",
        Op::QuantizeLinear(_) | Op::DequantizeLinear(_) | Op::DynamicQuantizeLinear(_) => "quantization",
        Op::MatMulInteger(_) | Op::MatMulIntegerToFloat(_) | Op::QLinearMatMul(_) => "integer product",
        Op::ConvInteger(_) | Op::QLinearConv(_) => "integer convolution",
        op => match (any_type_kernel(op), first) {
            (None, _) => return fallback("no kernel"),
            (Some(_), Some(DType::String) | None) => return fallback("not a numeric tensor"),
            (Some(kernel), _) => kernel,
        },
    };
    match first {
        Some(DType::F32) => Support::Native { kernel },
        Some(DType::String) | None => fallback("not a numeric tensor"),
        Some(_) if moves => Support::Native { kernel },
        Some(DType::F64 | DType::I64 | DType::I32) if is_ml => Support::Native { kernel },
        Some(DType::I32 | DType::I64) if kernel == "best of a line" => Support::Native { kernel },
        Some(dtype) if kernel == "quantization" && typed::element_type(dtype).is_some() => Support::Native { kernel },
        Some(DType::U8 | DType::I8) if kernel.starts_with("integer") => Support::Native { kernel },
        Some(dtype) if kernel == "strided copy" && dtype.bits() % 8 == 0 => Support::Native { kernel },
        Some(dtype) if any_type_kernel(&node.op).is_some() && typed::element_type(dtype).is_some() => {
            Support::Native { kernel: any_type_kernel(&node.op).unwrap_or(kernel) }
        }
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
