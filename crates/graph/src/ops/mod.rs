//! The operators: one file each, holding attributes, import for every opset, facts, reference evaluation and cases.
//!
//! A line in `operators!` below lists an operator's file, its type and the ONNX names it is imported from
//! (`Name`, or `domain.Name` outside the default domain). Everything else about it is in its own file.

mod activation;
mod broadcast;
#[cfg(test)]
pub(crate) mod cases;
mod evaluate;
mod fourier;
mod heads;
mod ml;
mod ml_forest;
mod movement;
mod qlinear;
mod randomness;
mod read;
mod stacked;
mod subgraph;
mod window;

pub use activation::Activation;
pub use broadcast::{broadcast_dims, elementwise_fact};
pub use evaluate::{
    Inputs, Wide, broadcast_index, broadcast_shape, checked_shape, indices, normalize_axes, normalize_axis, select,
    select_from,
};
pub use ml::{ClassLabels, PostTransform};
pub use ml_forest::{Forest, Test, TestKind};
pub use read::NodeReader;
pub(crate) use read::trailing_axes;
pub use subgraph::Subgraph;
pub use window::{Padding, Window, WindowAxis};

use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;
use std::{any::Any, fmt, sync::Arc};

/// What an operator's file implements.
pub trait Operator: Clone + fmt::Debug + PartialEq + Send + Sync + 'static {
    /// Reads one ONNX node of any opset into the newest form: attributes that became inputs are added as constant
    /// inputs ([`NodeReader::push_constant`]), removed attributes become what they meant.
    fn import(node: &mut NodeReader) -> Result<Op, ImportError>;

    /// The ONNX node this is written as, at opset [`EXPORT_OPSET`]; inputs and outputs stay as they are.
    fn export(&self) -> Spelling;

    /// Type and shape of every output, symbolic where inputs are, with elements where [`TensorFact::value`] can hold them.
    /// Inputs that contradict the operator's definition are an error.
    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError>;

    /// The definition: slow, plain, every type. At least as many values as `context.outputs`.
    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError>;
}

/// The opset of the default domain that graphs are held in and exported at.
pub const EXPORT_OPSET: i64 = 21;

/// An operator as ONNX spells it.
#[derive(Clone, Debug)]
pub struct Spelling {
    /// Empty for the default domain.
    pub domain: &'static str,
    pub op_type: &'static str,
    pub attributes: Vec<(&'static str, Attribute)>,
    /// One-input activations applied to the first output after it, in order: fused operators are written as several nodes.
    pub then: Vec<Spelling>,
    /// Where this is a bias fused into a product: the index of the input that is written as an `Add` after it.
    pub added_input: Option<usize>,
    /// Where the operator sees its first input as a matrix: the axis of the `Flatten` written before it; a `Reshape` to the
    /// input's own shape follows it.
    pub coerced_at: Option<i64>,
    /// The opset of the default domain that has the operator, where that is above [`EXPORT_OPSET`]: the file is then written at
    /// it. No operator spelled for [`EXPORT_OPSET`] means something else there.
    pub since: i64,
    /// The last version of its domain that has it, where later ones dropped it. In the default domain it is then not written.
    pub until: Option<i64>,
}

impl Spelling {
    pub fn new(op_type: &'static str) -> Spelling {
        Spelling {
            domain: "",
            op_type,
            attributes: Vec::new(),
            then: Vec::new(),
            added_input: None,
            coerced_at: None,
            since: EXPORT_OPSET,
            until: None,
        }
    }

    pub fn in_domain(mut self, domain: &'static str) -> Spelling {
        self.domain = domain;
        self
    }

    pub fn until(mut self, version: i64) -> Spelling {
        self.until = Some(version);
        self
    }

    pub fn since(mut self, opset: i64) -> Spelling {
        self.since = opset;
        self
    }

    pub fn with(mut self, name: &'static str, value: impl Into<Attribute>) -> Spelling {
        self.attributes.push((name, value.into()));
        self
    }
}

/// An attribute's value.
#[derive(Clone, Debug)]
pub enum Attribute {
    Int(i64),
    Float(f32),
    String(String),
    Tensor(cutover_tensor::Tensor),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Strings(Vec<String>),
    Type(Fact),
    /// What it captures are the node's last inputs, graph after graph in the order of the attributes.
    Graph(Subgraph),
}

macro_rules! attribute_from {
    ($($t:ty => $v:ident),*) => { $(impl From<$t> for Attribute { fn from(v: $t) -> Attribute { Attribute::$v(v.into()) } })* };
}
attribute_from!(i64 => Int, f32 => Float, &str => String, String => String, cutover_tensor::Tensor => Tensor,
    Vec<i64> => Ints, Vec<f32> => Floats, Vec<String> => Strings, Fact => Type, Subgraph => Graph);

/// The facts of a node's inputs, omitted ones `None`.
#[derive(Clone, Copy)]
pub struct Facts<'a>(pub &'a [Option<&'a Fact>]);

impl<'a> Facts<'a> {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The tensor at `index`; an error where it is omitted or not a tensor.
    pub fn tensor(&self, index: usize) -> Result<&'a TensorFact, OpError> {
        self.get(index).ok_or_else(|| OpError::input(format!("input {index} is missing")))?.tensor()
    }

    /// The tensor of strings at `index`.
    pub fn strings(&self, index: usize) -> Result<&'a TensorFact, OpError> {
        let fact = self.tensor(index)?;
        match fact.dtype {
            cutover_tensor::DType::String => Ok(fact),
            _ => Err(OpError::input(format!("input {index} must hold strings, got {fact}"))),
        }
    }

    /// The fact of the elements of the sequence at `index`; an error where it is omitted or no sequence.
    pub fn sequence(&self, index: usize) -> Result<&'a Fact, OpError> {
        match self.get(index) {
            Some(Fact::Sequence(of)) => Ok(of),
            Some(other) => Err(OpError::input(format!("input {index} must be a sequence, got {other}"))),
            None => Err(OpError::input(format!("input {index} is missing"))),
        }
    }

    /// The tensor at `index`, or `None` where it is omitted.
    pub fn optional_tensor(&self, index: usize) -> Result<Option<&'a TensorFact>, OpError> {
        self.get(index).map(Fact::tensor).transpose()
    }

    pub fn get(&self, index: usize) -> Option<&'a Fact> {
        self.0.get(index).copied().flatten()
    }

    /// The inputs at both indices, where they are there, must have one element type.
    pub fn same_dtype(&self, a: usize, b: usize) -> Result<(), OpError> {
        match (self.optional_tensor(a)?, self.optional_tensor(b)?) {
            (Some(x), Some(y)) if x.dtype != y.dtype => {
                Err(OpError::input(format!("inputs {a} and {b} must have one type, got {} and {}", x.dtype, y.dtype)))
            }
            _ => Ok(()),
        }
    }
}

/// What inference may know besides the inputs.
#[derive(Clone, Copy, Debug)]
pub struct InferContext<'a> {
    /// The node's name, from which fresh symbols get theirs.
    pub node: &'a str,
    /// How many outputs the node names.
    pub outputs: usize,
}

impl InferContext<'_> {
    /// A symbol for an extent that only data decides.
    pub fn fresh(&self, what: &str) -> Dim {
        Dim::symbol(format!("{}.{what}", self.node))
    }
}

/// What evaluation may know besides the inputs.
#[derive(Clone, Copy, Debug)]
pub struct EvalContext<'a> {
    pub outputs: usize,
    /// Largest number of elements an output may have.
    pub max_elements: usize,
    /// How often graphs inside of nodes may run: the iterations of all loops together, those of loops in loops each time.
    pub max_trips: u64,
    /// How often they ran; `None` to count for each outermost node alone.
    pub trips: Option<&'a std::cell::Cell<u64>>,
}

impl EvalContext<'_> {
    /// This context with a count of trips, a new one where it has none.
    pub(super) fn counting<T>(&self, work: impl FnOnce(&EvalContext<'_>) -> T) -> T {
        let none = std::cell::Cell::new(0);
        work(&EvalContext { trips: Some(self.trips.unwrap_or(&none)), ..*self })
    }

    /// Counts that a graph inside of a node runs once more.
    ///
    /// # Errors
    /// More often than it may.
    pub fn count_trip(&self) -> Result<(), OpError> {
        let Some(trips) = self.trips else { return Ok(()) };
        trips.set(trips.get() + 1);
        match trips.get() <= self.max_trips {
            true => Ok(()),
            false => Err(OpError::Resource(format!("a loop of more than {} iterations", self.max_trips))),
        }
    }

    /// Number of elements of `shape`, if a result may be as large.
    pub fn bounded_len(&self, shape: &[usize]) -> Result<usize, OpError> {
        let shape = cutover_tensor::Shape::new(shape);
        shape.checked_len().filter(|&len| len <= self.max_elements).ok_or_else(|| {
            OpError::Resource(format!("a result of shape {shape} is above the limit of {} elements", self.max_elements))
        })
    }

    /// Refuses a walk over `extents` that takes more than a thousand steps for each element that a result may have: a few small inputs may
    /// ask for any number.
    pub fn bounded_work(&self, extents: &[usize]) -> Result<(), OpError> {
        let shape = cutover_tensor::Shape::new(extents);
        let most = self.max_elements.saturating_mul(1 << 10);
        match extents.contains(&0) || shape.checked_len().is_some_and(|steps| steps <= most) {
            true => Ok(()),
            false => Err(OpError::Resource(format!("a walk over {shape}, above the limit of {most} steps"))),
        }
    }
}

impl Default for EvalContext<'_> {
    fn default() -> Self {
        EvalContext { outputs: 1, max_elements: 1 << 32, max_trips: 1 << 24, trips: None }
    }
}

/// An operator of the user's own.
pub trait CustomOp: fmt::Debug + Send + Sync {
    /// `domain.Name`.
    fn name(&self) -> &str;
    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError>;
    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError>;
    fn as_any(&self) -> &dyn Any;
}

macro_rules! operators {
    ($($file:ident :: $op:ident [$($name:literal),+ $(,)?];)*) => {
        $(mod $file; pub use $file::*;)*

        /// Every operator Cutover knows.
        #[derive(Clone, Debug)]
        pub enum Op {
            $($op($op),)*
            Custom(Arc<dyn CustomOp>),
        }

        /// The ONNX names of every operator (`domain.Name` outside the default domain).
        pub const OPERATOR_NAMES: &[&str] = &[$($($name),+),*];

        impl Op {
            /// Reads the ONNX node; `None` where its operator is unknown.
            pub(crate) fn import(qualified_name: &str, node: &mut NodeReader) -> Option<Result<Op, ImportError>> {
                match qualified_name {
                    $($($name)|+ => Some(<$op as Operator>::import(node)),)*
                    _ => None,
                }
            }

            pub fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
                match self {
                    $(Op::$op(op) => op.infer(inputs, context),)*
                    Op::Custom(op) => op.infer(inputs, context),
                }
            }

            pub fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
                match self {
                    $(Op::$op(op) => op.eval(inputs, context),)*
                    Op::Custom(op) => op.eval(inputs, context),
                }
            }

            /// Whether both are one operator with the same attributes, so that equal inputs give equal results.
            pub fn same(&self, other: &Op) -> bool {
                match (self, other) {
                    $((Op::$op(a), Op::$op(b)) => a == b,)*
                    (Op::Custom(a), Op::Custom(b)) => Arc::ptr_eq(a, b),
                    _ => false,
                }
            }

            /// How ONNX spells it; `None` for a custom operator.
            pub fn spelling(&self) -> Option<Spelling> {
                match self {
                    $(Op::$op(op) => Some(op.export()),)*
                    Op::Custom(_) => None,
                }
            }
        }

        $(impl From<$op> for Op { fn from(op: $op) -> Op { Op::$op(op) } })*
    };
}

impl Op {
    /// The ONNX name, for messages and tables.
    pub fn name(&self) -> String {
        match (self.spelling(), self) {
            (Some(s), _) if s.domain.is_empty() => s.op_type.to_string(),
            (Some(s), _) => format!("{}.{}", s.domain, s.op_type),
            (None, Op::Custom(op)) => op.name().to_string(),
            (None, _) => String::new(),
        }
    }
}

operators! {
    // Elementwise, logic, types
    unary::Unary ["Abs", "Neg", "Sign", "Floor", "Ceil", "Round", "Sqrt", "Reciprocal", "Exp", "Log", "Sin", "Cos", "Tan", "Asin",
        "Acos", "Atan", "Sinh", "Cosh", "Tanh", "Asinh", "Acosh", "Atanh", "Erf", "Relu", "Sigmoid", "Softplus", "Softsign",
        "HardSwish", "Mish", "LeakyRelu", "Elu", "Celu", "Selu", "HardSigmoid", "ThresholdedRelu", "Gelu", "Shrink", "Swish", "BitwiseNot",
        "com.microsoft.Gelu", "com.microsoft.QuickGelu"];
    binary::Binary ["Add", "Sub", "Mul", "Div", "Pow", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or",
        "Xor", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "PRelu", "Mod", "BitShift"];
    swiglu::SwiGlu ["SwiGLU"];
    bias_gelu::BiasGelu ["com.microsoft.BiasGelu", "com.microsoft.FastGelu"];
    bias_split_gelu::BiasSplitGelu ["com.microsoft.BiasSplitGelu"];
    variadic::Variadic ["Sum", "Mean", "Min", "Max"];
    select_where::Where ["Where"];
    predicate::Predicate ["Not", "IsNaN", "IsInf"];
    clip::Clip ["Clip"];
    cast::Cast ["Cast"];
    cast_like::CastLike ["CastLike"];
    bit_cast::BitCast ["BitCast"];

    // Graphs in operators
    branch::Branch ["If"];
    repeat::Repeat ["Loop"];
    scan::Scan ["Scan"];
    sequence_map::SequenceMap ["SequenceMap"];

    // Shapes and movement
    identity::Identity ["Identity"];
    dropout::Dropout ["Dropout"];
    random::Random ["RandomUniform", "RandomNormal", "RandomUniformLike", "RandomNormalLike"];
    bernoulli::Bernoulli ["Bernoulli"];
    multinomial::Multinomial ["Multinomial"];
    unique::Unique ["Unique"];
    shape::Shape ["Shape"];
    size::Size ["Size"];
    reshape::Reshape ["Reshape"];
    flatten::Flatten ["Flatten"];
    squeeze::Squeeze ["Squeeze"];
    unsqueeze::Unsqueeze ["Unsqueeze"];
    transpose::Transpose ["Transpose"];
    concat::Concat ["Concat"];
    split::Split ["Split"];
    slice::Slice ["Slice"];
    gather::Gather ["Gather"];
    center_crop_pad::CenterCropPad ["CenterCropPad"];
    gather_elements::GatherElements ["GatherElements"];
    gather_nd::GatherNd ["GatherND"];
    scatter::Scatter ["ScatterElements", "ScatterND", "Scatter"];
    pad::Pad ["Pad"];
    trilu::Trilu ["Trilu"];
    cumulate::Cumulate ["CumSum", "CumProd"];
    top_k::TopK ["TopK"];
    non_zero::NonZero ["NonZero"];
    one_hot::OneHot ["OneHot"];
    compress::Compress ["Compress"];
    reverse_sequence::ReverseSequence ["ReverseSequence"];
    depth_space::DepthSpace ["DepthToSpace", "SpaceToDepth"];
    non_max_suppression::NonMaxSuppression ["NonMaxSuppression"];
    roi_align::RoiAlign ["RoiAlign"];
    expand::Expand ["Expand"];
    tile::Tile ["Tile"];
    eye_like::EyeLike ["EyeLike"];
    constant_of_shape::ConstantOfShape ["ConstantOfShape"];
    range::Range ["Range"];

    // Sequences and optionals
    sequence::Sequence ["SequenceEmpty", "SequenceConstruct", "SequenceInsert", "SequenceErase", "SequenceAt", "SequenceLength"];
    split_to_sequence::SplitToSequence ["SplitToSequence"];
    concat_from_sequence::ConcatFromSequence ["ConcatFromSequence"];
    optional::Optional ["Optional", "OptionalHasElement", "OptionalGetElement"];

    // Text and labels
    string_concat::StringConcat ["StringConcat"];
    string_split::StringSplit ["StringSplit"];
    string_normalizer::StringNormalizer ["StringNormalizer"];
    regex_full_match::RegexFullMatch ["RegexFullMatch"];
    tokenizer::Tokenizer ["com.microsoft.Tokenizer"];
    tfidf_vectorizer::TfIdfVectorizer ["TfIdfVectorizer"];
    label_encoder::LabelEncoder ["ai.onnx.ml.LabelEncoder"];
    category_mapper::CategoryMapper ["ai.onnx.ml.CategoryMapper"];

    // Products and windows
    conv::Conv ["Conv", "com.microsoft.FusedConv"];
    channels_last::ChannelsLast [
        "com.microsoft.NhwcConv", "com.microsoft.NhwcFusedConv", "com.microsoft.NhwcMaxPool", "com.microsoft.QLinearConv",
    ];
    conv_transpose::ConvTranspose ["ConvTranspose"];
    matmul::MatMul ["MatMul"];
    fused_matmul::FusedMatMul ["com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul", "com.microsoft.FusedMatMulActivation"];
    gemm::Gemm ["Gemm"];
    det::Det ["Det"];
    deform_conv::DeformConv ["DeformConv"];
    col2im::Col2Im ["Col2Im"];
    fused_gemm::FusedGemm ["com.microsoft.FusedGemm"];

    max_pool::MaxPool ["MaxPool"];
    max_unpool::MaxUnpool ["MaxUnpool"];
    max_roi_pool::MaxRoiPool ["MaxRoiPool"];
    average_pool::AveragePool ["AveragePool"];
    lp_pool::LpPool ["LpPool"];
    global_pool::GlobalPool ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"];

    // Signals and pictures
    dft::Dft ["DFT"];
    stft::Stft ["STFT"];
    cosine_window::CosineWindow ["HannWindow", "HammingWindow", "BlackmanWindow"];
    mel_weights::MelWeights ["MelWeightMatrix"];
    affine_grid::AffineGrid ["AffineGrid"];
    image_decoder::ImageDecoder ["ImageDecoder"];

    // Normalisation, reduction, recurrence, quantization
    softmax::Softmax ["Softmax", "LogSoftmax", "Hardmax"];
    batch_norm::BatchNorm ["BatchNormalization"];
    layer_norm::LayerNorm ["LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"];
    skip_layer_norm::SkipLayerNorm ["com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization"];
    embed_layer_norm::EmbedLayerNorm ["com.microsoft.EmbedLayerNormalization"];
    reduce::Reduce [
        "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
        "ReduceLogSumExp", "ReduceSumSquare",
    ];
    resize::Resize ["Resize", "Upsample"];
    grid_sample::GridSample ["GridSample"];
    einsum::Einsum ["Einsum"];
    arg_reduce::ArgReduce ["ArgMax", "ArgMin"];
    instance_norm::InstanceNorm ["InstanceNormalization", "GroupNormalization"];
    lp_norm::LpNorm ["LpNormalization"];
    mean_variance_norm::MeanVarianceNorm ["MeanVarianceNormalization"];
    lrn::Lrn ["LRN"];
    recurrent::Recurrent ["LSTM", "GRU", "RNN"];
    dynamic_quantize_lstm::DynamicQuantizeLstm ["com.microsoft.DynamicQuantizeLSTM"];
    quantize_linear::QuantizeLinear ["QuantizeLinear", "com.microsoft.QuantizeLinear"];
    dequantize_linear::DequantizeLinear ["DequantizeLinear", "com.microsoft.DequantizeLinear"];
    dynamic_quantize_linear::DynamicQuantizeLinear ["DynamicQuantizeLinear"];
    matmul_integer::MatMulInteger ["MatMulInteger"];
    conv_integer::ConvInteger ["ConvInteger"];
    qlinear_conv::QLinearConv ["QLinearConv"];
    qlinear_matmul::QLinearMatMul ["QLinearMatMul"];
    matmul_integer_to_float::MatMulIntegerToFloat ["com.microsoft.MatMulIntegerToFloat"];
    dynamic_quantize_matmul::DynamicQuantizeMatMul ["com.microsoft.DynamicQuantizeMatMul"];
    matmul_nbits::MatMulNBits ["com.microsoft.MatMulNBits"];
    gather_block_quantized::GatherBlockQuantized ["com.microsoft.GatherBlockQuantized"];
    qgemm::QGemm ["com.microsoft.QGemm"];
    qlinear_binary::QLinearBinary ["com.microsoft.QLinearAdd", "com.microsoft.QLinearMul"];
    qlinear_unary::QLinearUnary ["com.microsoft.QLinearSigmoid", "com.microsoft.QLinearLeakyRelu"];
    qlinear_softmax::QLinearSoftmax ["com.microsoft.QLinearSoftmax"];
    qlinear_concat::QLinearConcat ["com.microsoft.QLinearConcat"];
    qlinear_where::QLinearWhere ["com.microsoft.QLinearWhere"];
    qlinear_average_pool::QLinearAveragePool ["com.microsoft.QLinearAveragePool"];
    qlinear_global_average_pool::QLinearGlobalAveragePool ["com.microsoft.QLinearGlobalAveragePool"];
    qlinear_reduce_mean::QLinearReduceMean ["com.microsoft.QLinearReduceMean"];

    // Training
    loss::Loss ["NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"];
    optimizer::Optimizer [
        "ai.onnx.preview.training.Adagrad", "ai.onnx.preview.training.Adam", "ai.onnx.preview.training.Momentum",
    ];

    // Attention
    attention::Attention ["Attention"];
    rotary_embedding::RotaryEmbedding ["RotaryEmbedding", "com.microsoft.RotaryEmbedding"];
    tensor_scatter::TensorScatter ["TensorScatter"];
    linear_attention::LinearAttention ["LinearAttention"];
    causal_conv::CausalConv ["CausalConvWithState"];
    flex_attention::FlexAttention ["ai.onnx.preview.FlexAttention"];
    projected_attention::ProjectedAttention ["com.microsoft.Attention"];
    multi_head_attention::MultiHeadAttention ["com.microsoft.MultiHeadAttention"];
    group_query_attention::GroupQueryAttention ["com.microsoft.GroupQueryAttention"];

    // Classical machine learning
    ml_linear::Linear ["ai.onnx.ml.LinearRegressor", "ai.onnx.ml.LinearClassifier"];
    ml_scaler::Scaler ["ai.onnx.ml.Scaler"];
    ml_normalizer::Normalizer ["ai.onnx.ml.Normalizer"];
    ml_svm::Svm ["ai.onnx.ml.SVMRegressor", "ai.onnx.ml.SVMClassifier"];
    ml_tree_ensemble::TreeEnsemble [
        "ai.onnx.ml.TreeEnsemble", "ai.onnx.ml.TreeEnsembleRegressor", "ai.onnx.ml.TreeEnsembleClassifier",
    ];
    ml_array_feature_extractor::ArrayFeatureExtractor ["ai.onnx.ml.ArrayFeatureExtractor"];
    ml_binarizer::Binarizer ["ai.onnx.ml.Binarizer"];
    ml_imputer::Imputer ["ai.onnx.ml.Imputer"];
    ml_one_hot_encoder::OneHotEncoder ["ai.onnx.ml.OneHotEncoder"];
    ml_feature_vectorizer::FeatureVectorizer ["ai.onnx.ml.FeatureVectorizer"];
    ml_zip_map::ZipMap ["ai.onnx.ml.ZipMap"];
    ml_dict_vectorizer::DictVectorizer ["ai.onnx.ml.DictVectorizer"];
    ml_cast_map::CastMap ["ai.onnx.ml.CastMap"];
}
