//! What operators from quantized tensors to quantized tensors share, where each tensor has one scale and one zero point.

use super::{
    Facts, Inputs, NodeReader, Wide,
    quantize_linear::{factors, integer_bounds, saturate},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Shape, Tensor};

/// The domain that ONNX Runtime's quantizer and optimiser write their operators in.
pub(super) const DOMAIN: &str = "com.microsoft";

/// A quantized input: the integers less their zero point, and the scale.
pub(super) struct Quantized<'a> {
    pub tensor: &'a Tensor,
    pub values: Vec<i64>,
    pub zero_point: i64,
    pub scale: f64,
}

impl<'a> Quantized<'a> {
    /// The tensor at `at`, its scale after it, and then its zero point, 0 where that is omitted.
    pub fn read(inputs: Inputs<'a>, at: usize) -> Result<Quantized<'a>, OpError> {
        let tensor = inputs.tensor(at)?;
        let zero_point = match inputs.optional_tensor(at + 2)? {
            Some(zero_point) => single(&factors(zero_point)?, "zero point")?,
            None => 0,
        };
        let values = factors(tensor)?.into_iter().map(|x| x - zero_point).collect();
        Ok(Quantized { tensor, values, zero_point, scale: scale(inputs, at + 1)? })
    }

    /// As `DequantizeLinear` gives them: f32.
    pub fn floats(&self) -> impl Iterator<Item = f32> + '_ {
        self.values.iter().map(|&x| (x as f64 * self.scale) as f32)
    }

    /// The f32 tensor that `DequantizeLinear` gives.
    pub fn dequantize(&self) -> Result<Tensor, OpError> {
        Ok(Tensor::from_vec(self.tensor.shape().clone(), self.floats().collect())?)
    }
}

/// The scale, zero point and type of a result.
pub(super) struct Target {
    pub scale: f64,
    pub zero_point: i128,
    bounds: (i128, i128),
    dtype: DType,
}

impl Target {
    /// The scale at `at` and the zero point after it, 0 where that is omitted.
    pub fn read(inputs: Inputs<'_>, at: usize, dtype: DType) -> Result<Target, OpError> {
        let bounds = integer_bounds(dtype).ok_or_else(|| OpError::unsupported(format!("quantization to {dtype}")))?;
        let zero_point = match inputs.optional_tensor(at + 1)? {
            Some(zero_point) => single(&factors(zero_point)?, "zero point")?.into(),
            None => 0,
        };
        Ok(Target { scale: scale(inputs, at)?, zero_point, bounds, dtype })
    }

    /// As `QuantizeLinear` does: divided in f32, rounded to nearest even, then moved by the zero point.
    pub fn quantize(&self, x: f32) -> i128 {
        saturate(f64::from(x / self.scale as f32), self.zero_point, self.bounds)
    }

    /// `steps`, a value in units of the scale that was moved by the zero point already, to nearest even.
    pub fn round(&self, steps: f32) -> i128 {
        saturate(f64::from(steps), 0, self.bounds)
    }

    /// `sum` in units of `factor`, rounded to nearest even, then moved by the zero point. The product is rounded to f32 first, as kernels
    /// and ONNX Runtime do: where it lies midway between two steps, that decides.
    pub fn requantize(&self, sum: i64, factor: f32) -> i128 {
        saturate(f64::from(sum as f32 * factor), self.zero_point, self.bounds)
    }

    pub fn tensor(&self, values: Vec<i128>, shape: impl Into<Shape>) -> Result<Tensor, OpError> {
        Wide::Int(values).narrow(self.dtype, shape)
    }
}

/// The one scale at `index`.
pub(super) fn scale(inputs: Inputs<'_>, index: usize) -> Result<f64, OpError> {
    single(&Wide::floats(inputs.tensor(index)?)?, "scale")
}

fn single<T: Copy>(values: &[T], what: &str) -> Result<T, OpError> {
    match values {
        [one] => Ok(*one),
        many => Err(OpError::input(format!("expected one {what}, got {}", many.len()))),
    }
}

/// The quantized tensor at `at`: its zero point two further on must be of its type, and its scale one number of type f32.
pub(super) fn quantized_fact<'a>(inputs: Facts<'a>, at: usize) -> Result<&'a TensorFact, OpError> {
    let fact = inputs.tensor(at)?;
    if !matches!(fact.dtype, DType::I8 | DType::U8) {
        return Err(OpError::input(format!("expected 8-bit integers, got {fact}")));
    }
    inputs.same_dtype(at, at + 2)?;
    check_scale(inputs, at + 1)?;
    Ok(fact)
}

/// The type of a result whose scale is at `at`, its zero point after it: that of input `like`, which the zero point must have too.
pub(super) fn target_dtype(inputs: Facts<'_>, at: usize, like: usize) -> Result<DType, OpError> {
    inputs.same_dtype(like, at + 1)?;
    check_scale(inputs, at)?;
    Ok(inputs.tensor(like)?.dtype)
}

fn check_scale(inputs: Facts<'_>, index: usize) -> Result<(), OpError> {
    let scale = inputs.tensor(index)?;
    match scale.dtype == DType::F32 && scale.constant_count().is_none_or(|count| count == 1) {
        true => Ok(()),
        false => Err(OpError::input(format!("expected one scale of f32, got {scale}"))),
    }
}

pub(super) fn fact(dtype: DType, shape: Option<Vec<Dim>>) -> Vec<Fact> {
    vec![TensorFact { dtype, shape, value: None }.into()]
}

/// The attribute that puts channels last.
pub(super) fn read_channels_last(node: &mut NodeReader) -> Result<bool, ImportError> {
    node.flag("channels_last", false)
}

/// `[n, …, c]` as `[n, c, …]`.
pub(super) fn channels_first<T: Clone>(dims: &[T]) -> Vec<T> {
    match dims {
        [n, spatial @ .., c] => [n, c].into_iter().chain(spatial).cloned().collect(),
        short => short.to_vec(),
    }
}

/// `[n, c, …]` as `[n, …, c]`.
pub(super) fn channels_last<T: Clone>(dims: &[T]) -> Vec<T> {
    match dims {
        [n, c, spatial @ ..] => std::iter::once(n).chain(spatial).chain([c]).cloned().collect(),
        short => short.to_vec(),
    }
}

/// The tensor `[n, …, c]` as `[n, c, …]`, or with `back` the other way round.
pub(super) fn move_channels(tensor: &Tensor, back: bool) -> Result<Tensor, OpError> {
    let dims = tensor.shape().dims();
    if dims.len() < 3 {
        return Err(OpError::input(format!("expected a batch, channels and a spatial axis, got {}", tensor.shape())));
    }
    let (rows, columns) = match back {
        true => (dims[1], dims[2..].iter().product::<usize>()),
        false => (dims[1..dims.len() - 1].iter().product::<usize>(), dims[dims.len() - 1]),
    };
    let shape = if back { channels_last(dims) } else { channels_first(dims) };
    let sources = (0..tensor.element_count()).map(|i| {
        let (image, within) = (i / (rows * columns), i % (rows * columns));
        image * rows * columns + within % rows * columns + within / rows
    });
    super::select(tensor, shape, sources)
}
