//! Quantization to integers or small floats by a scale and a zero point.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, conv::differ,
    evaluate::from_codes, normalize_axis,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{
    DType, Shape, Tensor, Value, bf16, f16,
    small_float::{RoundMode, encode, is_small_float},
};

/// `y = saturate(round(x / scale) + zero_point)`, to nearest even; inputs `x`, `scale`, optional `zero_point`. Small floats are not
/// rounded before the zero point is added. The type of `y` is the zero point's.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizeLinear {
    pub granularity: Granularity,
    /// Of `y` where there is no zero point; u8 if neither says.
    pub output_dtype: Option<DType>,
    /// Floats of eight bits: numbers beyond the largest become that; otherwise infinity or NaN.
    pub saturate: bool,
    /// The type in which the division is done: f32 where it is left out, or f64 for `x` of f64. (The specification's default is
    /// the type of the scale, and ONNX Runtime divides halves in f32 all the same.)
    pub precision: Option<DType>,
}

/// Which elements share a scale and a zero point: all, if there is one scale; with a scale for each index of `axis`, those
/// of that index; with `block_size`, runs of as many along `axis`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granularity {
    pub axis: i64,
    /// 0 for no blocks.
    pub block_size: usize,
}

impl Operator for QuantizeLinear {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=3)?;
        let granularity = Granularity::read(node)?;
        let saturate = node.flag("saturate", true)?;
        let output_dtype = optional_dtype(node, "output_dtype")?;
        if let Some(other) = output_dtype.filter(|&dtype| integer_bounds(dtype).is_none() && !is_target(dtype)) {
            return Err(node.unsupported(format!("quantization to {other}")));
        }
        let precision = optional_dtype(node, "precision")?;
        if let Some(other) = precision.filter(|&dtype| divided(1.0, 1.0, dtype).is_none()) {
            return Err(node.unsupported(format!("a precision of {other}")));
        }
        Ok(QuantizeLinear { granularity, output_dtype, saturate, precision }.into())
    }

    fn export(&self) -> Spelling {
        let mut spelling = self.granularity.spell(Spelling::new("QuantizeLinear"));
        if let Some(dtype) = self.output_dtype {
            spelling = spelling.with("output_dtype", i64::from(dtype.onnx_code()));
        }
        if !self.saturate {
            spelling = spelling.with("saturate", 0);
        }
        match self.precision {
            Some(dtype) => spelling.with("precision", i64::from(dtype.onnx_code())).since(23),
            None => spelling,
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let zero_point = inputs.optional_tensor(2)?;
        self.granularity.check(x, inputs.tensor(1)?)?;
        let dtype = self.dtype(zero_point.map(|z| z.dtype))?;
        Ok(vec![TensorFact { dtype, shape: x.shape.clone(), value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, scale) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let zero_point = inputs.optional_tensor(2)?;
        let dtype = self.dtype(zero_point.map(|z| z.dtype()))?;
        let index = ScaleIndex::new(self.granularity, x.shape(), scale.shape())?;
        let scales = numbers(scale)?;
        let precision = self.precision.unwrap_or(if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 });
        let unknown = || OpError::unsupported(format!("a precision of {precision}"));
        let quotient = |(i, x): (usize, f64)| divided(x, scales[index.of(i)], precision).ok_or_else(unknown);
        let quotients = numbers(x)?.into_iter().enumerate().map(quotient).collect::<Result<Vec<f64>, _>>()?;
        let quotients = quotients.into_iter().enumerate();
        if is_target(dtype) {
            let zero_points = match same_places(zero_point, scale.shape())? {
                Some(zero_point) => Wide::floats(zero_point)?,
                None => Vec::new(),
            };
            let shifted = quotients.map(|(i, y)| y + zero_points.get(index.of(i)).copied().unwrap_or(0.0));
            let codes: Vec<u8> = shifted.map(|y| encode(dtype, y, self.saturate, RoundMode::default())).collect();
            return Ok(vec![from_codes(codes.into_iter(), dtype, x.shape().clone())?.into()]);
        }
        let bounds = integer_bounds(dtype).ok_or_else(|| OpError::unsupported(format!("quantization to {dtype}")))?;
        let zero_points = zero_points(zero_point, scale.shape())?;
        let y = quotients.map(|(i, y)| saturate(y, zero_points.get(index.of(i)).copied().unwrap_or(0), bounds));
        Ok(vec![Wide::Int(y.collect()).narrow(dtype, x.shape().clone())?.into()])
    }
}

/// The small floats that tensors are quantized to.
fn is_target(dtype: DType) -> bool {
    is_small_float(dtype) && dtype != DType::F8E8M0
}

/// `x / y`, each operand and the quotient rounded to `precision`; `None` where that is no float of 16 bits or more.
fn divided(x: f64, y: f64, precision: DType) -> Option<f64> {
    let half = |x: f64| f64::from(f16::from_f64(x));
    let brain = |x: f64| f64::from(bf16::from_f64(x));
    Some(match precision {
        DType::F64 => x / y,
        DType::F32 => f64::from(x as f32 / y as f32),
        DType::F16 => half(half(x) / half(y)),
        DType::BF16 => brain(brain(x) / brain(y)),
        _ => return None,
    })
}

/// A number's type by its code, where the attribute is there and is not 0.
pub(super) fn optional_dtype(node: &mut NodeReader, name: &str) -> Result<Option<DType>, ImportError> {
    let code = node.int(name, 0)?;
    match (code, i32::try_from(code).ok().and_then(DType::from_onnx_code)) {
        (0, _) => Ok(None),
        (_, Some(dtype)) => Ok(Some(dtype)),
        (_, None) => Err(node.corrupt(format!("{name} {code} is not defined"))),
    }
}

/// Floats or integers as `f64`.
fn numbers(tensor: &Tensor) -> Result<Vec<f64>, OpError> {
    match Wide::of(tensor)? {
        Wide::Float(values) => Ok(values),
        Wide::Int(values) => Ok(values.into_iter().map(|x| x as f64).collect()),
        Wide::Bool(_) => Err(OpError::input("expected numbers, got bool")),
    }
}

impl QuantizeLinear {
    fn dtype(&self, zero_point: Option<DType>) -> Result<DType, OpError> {
        match (zero_point, self.output_dtype) {
            (Some(zero_point), Some(output)) if zero_point != output => {
                Err(OpError::input(format!("output_dtype is {output}, the zero point's type {zero_point}")))
            }
            (zero_point, output) => Ok(zero_point.or(output).unwrap_or(DType::U8)),
        }
    }
}

impl Granularity {
    pub(super) fn read(node: &mut NodeReader) -> Result<Granularity, ImportError> {
        let axis = node.int("axis", 1)?;
        let block_size = match node.int("block_size", 0)? {
            size @ 0..=0x7fff_ffff => size as usize,
            other => return Err(node.corrupt(format!("block_size must not be negative, got {other}"))),
        };
        Ok(Granularity { axis, block_size })
    }

    pub(super) fn spell(&self, spelling: Spelling) -> Spelling {
        let spelling = spelling.with("axis", self.axis);
        if self.block_size == 0 { spelling } else { spelling.with("block_size", self.block_size as i64) }
    }

    pub(super) fn check(&self, x: &TensorFact, scale: &TensorFact) -> Result<(), OpError> {
        let (Some(dims), Some(scales)) = (&x.shape, &scale.shape) else { return Ok(()) };
        let fits = match scales.as_slice() {
            [] => true,
            [one] if one.as_const() == Some(1) => true,
            [count] if self.block_size == 0 => !differ(count, &dims[normalize_axis(self.axis, dims.len())?]),
            _ if self.block_size > 0 => {
                let axis = normalize_axis(self.axis, dims.len())?;
                let blocks = |d: &crate::Dim| d.ceil_div(&self.block_size.into());
                let expected = |i: usize, d: &crate::Dim| if i == axis { blocks(d) } else { d.clone() };
                scales.len() == dims.len()
                    && dims.iter().zip(scales).enumerate().all(|(i, (d, s))| !differ(&expected(i, d), s))
            }
            _ => false,
        };
        match fits {
            true => Ok(()),
            false => Err(OpError::input(format!("scales {scale} don't fit {x} at axis {}", self.axis))),
        }
    }
}

/// Which scale each element of a tensor has.
#[derive(Clone, Copy)]
pub(super) struct ScaleIndex {
    inner: usize,
    extent: usize,
    block: usize,
    blocks: usize,
    /// Scales between two outer indices: 0 where every outer index has the same.
    outer: usize,
    stride: usize,
}

impl ScaleIndex {
    pub fn new(granularity: Granularity, x: &Shape, scale: &Shape) -> Result<ScaleIndex, OpError> {
        let fact = |shape: &Shape| TensorFact::of_constant_shape(DType::F32, shape);
        granularity.check(&fact(x), &fact(scale))?;
        if scale.rank() == 0 || (scale.rank() == 1 && scale[0] == 1) {
            return Ok(ScaleIndex { inner: 1, extent: 1, block: 1, blocks: 1, outer: 0, stride: 0 });
        }
        let axis = normalize_axis(granularity.axis, x.rank())?;
        let inner: usize = x[axis + 1..].iter().product();
        Ok(match granularity.block_size {
            0 => ScaleIndex { inner, extent: x[axis], block: 1, blocks: x[axis], outer: 0, stride: 0 },
            block => {
                let blocks = scale[axis];
                ScaleIndex { inner, extent: x[axis], block, blocks, outer: blocks * inner, stride: inner }
            }
        })
    }

    pub fn of(&self, element: usize) -> usize {
        let (rest, within) = (element / self.inner, element % self.inner);
        let (outer, index) = (rest / self.extent, rest % self.extent);
        debug_assert!(self.extent == 1 || index / self.block < self.blocks);
        match self.stride {
            0 => index,
            stride => outer * self.outer + index / self.block * stride + within,
        }
    }
}

/// The zero point, if there is one: it must have the scale's number of elements.
pub(super) fn same_places<'a>(zero_point: Option<&'a Tensor>, scale: &Shape) -> Result<Option<&'a Tensor>, OpError> {
    match zero_point {
        Some(zero_point) if zero_point.element_count() != scale.element_count() => {
            Err(OpError::input(format!("scales of {scale}, but zero points of {}", zero_point.shape())))
        }
        zero_point => Ok(zero_point),
    }
}

/// The integers of a zero point of the scale's shape; empty where there is none.
pub(super) fn zero_points(zero_point: Option<&Tensor>, scale: &Shape) -> Result<Vec<i128>, OpError> {
    same_places(zero_point, scale)?.map_or(Ok(Vec::new()), integers)
}

/// The elements of an integer tensor.
pub(super) fn integers(tensor: &Tensor) -> Result<Vec<i128>, OpError> {
    match Wide::of(tensor)? {
        Wide::Int(values) => Ok(values),
        _ => Err(OpError::unsupported(format!("quantized values of {}", tensor.dtype()))),
    }
}

/// The elements of a quantized factor. Sums of products of at most 16-bit values leave ample room in an i64.
pub(super) fn factors(tensor: &Tensor) -> Result<Vec<i64>, OpError> {
    if !matches!(tensor.dtype(), DType::I8 | DType::U8 | DType::I16 | DType::U16) {
        return Err(OpError::input(format!("expected 8-bit integers, got {}", tensor.dtype())));
    }
    Ok(integers(tensor)?.into_iter().map(|x| x as i64).collect())
}

/// `value` rounded to nearest even, plus `zero_point`, within `bounds`. NaN counts as 0.
pub(super) fn saturate(value: f64, zero_point: i128, (least, most): (i128, i128)) -> i128 {
    // A float-to-integer cast saturates, and no bound is anywhere near i64's.
    let rounded = i128::from(value.round_ties_even() as i64);
    (rounded + zero_point).clamp(least, most)
}

/// Least and largest value of a type that tensors are quantized to.
pub(super) fn integer_bounds(dtype: DType) -> Option<(i128, i128)> {
    let signed = match dtype {
        DType::I8 | DType::I16 | DType::I32 | DType::I4 | DType::I2 => true,
        DType::U8 | DType::U16 | DType::U4 | DType::U2 => false,
        _ => return None,
    };
    let most = 1i128 << (dtype.bits() - usize::from(signed));
    Some((if signed { -most } else { 0 }, most - 1))
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};
    use cutover_tensor::{DType, Tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.QuantizeLinear", 1)
            .input(f32s(&[3], &[-1.0, 0.3, 40000.0]))
            .input(f32s(&[], &[1.0]))
            .input(tensor::<u16>(&[], &[30000]))
            .gives([tensor::<u16>(&[3], &[29999, 30000, 65535])]);
        case("com.microsoft.QuantizeLinear", 1)
            .with("axis", 1)
            .input(f32s(&[2, 2], &[-1.0, 0.3, 2.0, -3.0]))
            .input(f32s(&[2], &[0.5, 0.25]))
            .input(tensor::<i8>(&[2], &[1, 2]))
            .gives([tensor::<i8>(&[2, 2], &[-1, 3, 5, -10])]);
        case("QuantizeLinear", 13)
            .input(f32s(&[6], &[-1.0, 0.0, 0.5, 1.5, 2.5, 300.0]))
            .input(f32s(&[], &[1.0]))
            .input(tensor::<u8>(&[], &[3]))
            .gives([tensor::<u8>(&[6], &[2, 3, 3, 5, 5, 255])]);
        case("QuantizeLinear", 13)
            .with("axis", 0)
            .wave(&[2, 3])
            .input(f32s(&[2], &[0.5, 0.25]))
            .input(tensor::<i8>(&[2], &[1, -2]))
            .gives([tensor::<i8>(&[2, 3], &[-1, 2, 0, 3, -1, -5])]);
        case("QuantizeLinear", 10)
            .input(f32s(&[3], &[-1.0, 0.3, 2.0]))
            .input(f32s(&[], &[0.1]))
            .gives([tensor::<u8>(&[3], &[0, 3, 20])]);
        case("QuantizeLinear", 21)
            .with("axis", 1)
            .with("block_size", 2)
            .wave(&[2, 3])
            .input(f32s(&[2, 2], &[0.5, 0.25, 1.0, 2.0]))
            .input(tensor::<u8>(&[2, 2], &[128, 100, 0, 7]))
            .gives([tensor::<u8>(&[2, 3], &[126, 129, 98, 1, 0, 7])]);
    }

    #[test]
    fn four_bit_integers_are_packed_from_the_low_bits_up() {
        let bits = |bytes: &[u8]| Tensor::from_bytes(DType::I4, [3], bytes).unwrap();
        let zero_point = Tensor::from_bytes(DType::I4, [], &[1]).unwrap();
        // 2 + 1, -20 + 1 saturated to -8, -3 + 1.
        let x = case("QuantizeLinear", 21).input(f32s(&[3], &[2.0, -20.0, -3.0])).input(f32s(&[], &[1.0]));
        x.input(zero_point.clone()).gives([bits(&[0x83, 0x0e])]);
        let back = case("DequantizeLinear", 21).input(bits(&[0x83, 0x0e])).input(f32s(&[], &[0.5]));
        back.input(zero_point).gives([f32s(&[3], &[1.0, -4.5, -1.5])]);
    }

    #[test]
    fn small_floats() {
        let codes = |dtype, codes: &[u8], count: usize| Tensor::from_bytes(dtype, [count], codes).unwrap();
        let x = || f32s(&[5], &[0.0, 1.0, 2.0, 100_000.0, 200.0]);
        // 448 is the largest number of e4m3fn, and 0x7f its NaN; 50 lies between 48 and 52, and an even code wins.
        let quantized =
            |saturate| case("QuantizeLinear", 19).with("saturate", saturate).input(x()).input(f32s(&[], &[2.0]));
        let zero = || Tensor::from_bytes(DType::F8E4M3FN, [], &[0]).unwrap();
        quantized(1).input(zero()).gives([codes(DType::F8E4M3FN, &[0, 0x30, 0x38, 0x7e, 0x6c], 5)]);
        quantized(0).input(zero()).gives([codes(DType::F8E4M3FN, &[0, 0x30, 0x38, 0x7f, 0x6c], 5)]);
        let four = case("QuantizeLinear", 23).with("output_dtype", 23).input(x()).input(f32s(&[], &[2.0]));
        four.gives([codes(DType::F4E2M1, &[0x10, 0x72, 0x07], 5)]);
        let back = case("DequantizeLinear", 23).input(codes(DType::F4E2M1, &[0x10, 0x72, 0x07], 5));
        back.input(f32s(&[], &[2.0])).gives([f32s(&[5], &[0.0, 1.0, 2.0, 12.0, 12.0])]);
    }

    #[test]
    fn the_precision_of_the_division() {
        let x = || case("QuantizeLinear", 23).input(f32s(&[1], &[2.5004])).input(f32s(&[], &[1.0]));
        x().gives([tensor::<u8>(&[1], &[3])]);
        // In half precision it is 2.5, and rounds to the even 2.
        x().with("precision", 10).gives([tensor::<u8>(&[1], &[2])]);
        x().with("precision", 7).fails("a precision of i64");
    }

    #[test]
    fn scales_must_fit() {
        case("QuantizeLinear", 13).wave(&[2, 3]).wave(&[2]).fails("don't fit");
    }
}
