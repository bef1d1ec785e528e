//! Slices of a table that is quantized in blocks, dequantized.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, conv::differ,
    gather::check_indices, indices, normalize_axis, qlinear::DOMAIN,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Shape, Tensor, Value};

/// `Gather` along `gather_axis` of `(data − zero_point) · scale`, where runs of `block_size` along `quantize_axis` share a scale and a zero
/// point. Inputs `data`, `indices`, `scales`, optional `zero_points`. Integers of `data` take 4 bits; or it is u8 and holds elements of
/// `bits` bits, packed along the last axis from the low bits up, as zero points then are too, and midway of the range where there are none. Floats have
/// no zero point. An index out of range gives zeros. The result has the scales' type.
#[derive(Clone, Debug, PartialEq)]
pub struct GatherBlockQuantized {
    pub gather_axis: i64,
    pub quantize_axis: i64,
    /// 0 for one block of the whole axis.
    pub block_size: usize,
    pub bits: usize,
}

impl Operator for GatherBlockQuantized {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(3..=4)?;
        let (gather_axis, quantize_axis) = (node.int("gather_axis", 0)?, node.int("quantize_axis", 1)?);
        let block_size = match node.int("block_size", 128)? {
            0 => 0,
            size @ 16..=0x7fff_ffff if (size as usize).is_power_of_two() => size as usize,
            other => return Err(node.corrupt(format!("block_size must be a power of two from 16 on, got {other}"))),
        };
        let bits = node.count("bits", 4)?;
        if !matches!(bits, 2 | 4 | 8) {
            return Err(node.unsupported(format!("elements of {bits} bits (only 2, 4 and 8)")));
        }
        Ok(GatherBlockQuantized { gather_axis, quantize_axis, block_size, bits }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("GatherBlockQuantized")
            .in_domain(DOMAIN)
            .with("gather_axis", self.gather_axis)
            .with("quantize_axis", self.quantize_axis)
            .with("block_size", self.block_size as i64)
            .with("bits", self.bits as i64)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (data, places, scales) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?);
        check_indices(places)?;
        inputs.same_dtype(0, 3)?;
        let unknown = TensorFact::unknown_rank(scales.dtype);
        let Some(packed) = &data.shape else { return Ok(vec![unknown.into()]) };
        let dims = self.unpacked(data.dtype, packed)?;
        let axes = self.axes(data.dtype, dims.len())?;
        if let Some(scales) = &scales.shape {
            self.check_scales(data.dtype, &dims, scales, axes)?;
        }
        let Some(places) = &places.shape else { return Ok(vec![unknown.into()]) };
        let shape = [&dims[..axes.0], places, &dims[axes.0 + 1..]].concat();
        Ok(vec![TensorFact::new(scales.dtype, shape).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (data, places, scales) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?);
        let dtype = data.dtype();
        let as_dims = |shape: &[usize]| shape.iter().map(|&d| Dim::from(d)).collect::<Vec<_>>();
        let constant = |dim: &Dim| dim.as_const().and_then(|d| usize::try_from(d).ok());
        let dims = self.unpacked(dtype, &as_dims(data.shape()))?;
        let (gather_axis, quantize_axis) = self.axes(dtype, dims.len())?;
        self.check_scales(dtype, &dims, &as_dims(scales.shape()), (gather_axis, quantize_axis))?;
        let too_large = || OpError::Resource(format!("data of {}", data.shape()));
        let dims: Shape = dims.iter().map(constant).collect::<Option<Vec<_>>>().ok_or_else(too_large)?.into();
        let extent = dims[gather_axis];
        let shape = [&dims[..gather_axis], places.shape().dims(), &dims[gather_axis + 1..]].concat();
        context.bounded_len(&shape)?;
        let values = self.elements(data, &dims)?;
        let zero_points = match inputs.optional_tensor(3)? {
            Some(points) => Some(self.elements(points, scales.shape())?),
            None => None,
        };
        let midway = if dtype == DType::U8 { f64::from(1 << (self.bits - 1)) } else { 0.0 };
        let (scale_values, rank) = (Wide::floats(scales)?, places.shape().rank());
        let (strides, scale_strides) = (dims.strides(), scales.shape().strides());
        let places_strides = places.shape().strides();
        let places = inputs.integers(1)?;
        let block = if self.block_size == 0 { dims[quantize_axis].max(1) } else { self.block_size };
        let y = indices(&shape).map(|index| {
            let place: usize = index[gather_axis..].iter().zip(&places_strides).map(|(i, s)| i * s).sum();
            let place = places[place];
            let place = if place < 0 { place.saturating_add(extent as i64) } else { place };
            let Some(place) = usize::try_from(place).ok().filter(|&place| place < extent) else { return 0.0 };
            let (mut at, mut scale_at) = (0, 0);
            for axis in 0..dims.rank() {
                let i = match axis {
                    _ if axis < gather_axis => index[axis],
                    _ if axis == gather_axis => place,
                    _ => index[axis - 1 + rank],
                };
                at += i * strides[axis];
                let of_scale = if axis == quantize_axis { i / block } else { i };
                scale_at += if scales.shape()[axis] == 1 { 0 } else { of_scale * scale_strides[axis] };
            }
            let zero_point = zero_points.as_ref().map_or(midway, |points| points[scale_at]);
            (values[at] - zero_point) * scale_values[scale_at]
        });
        Ok(vec![Wide::Float(y.collect()).narrow(scales.dtype(), shape.clone())?.into()])
    }
}

impl GatherBlockQuantized {
    /// How many elements one of `data` holds.
    fn per_element(&self, dtype: DType) -> usize {
        if dtype == DType::U8 { 8 / self.bits } else { 1 }
    }

    /// The extents of `data`, unpacked.
    fn unpacked(&self, dtype: DType, dims: &[Dim]) -> Result<Vec<Dim>, OpError> {
        let mut dims = dims.to_vec();
        let last = dims.last_mut().ok_or_else(|| OpError::input("data must have an axis"))?;
        *last = last.clone() * Dim::from(self.per_element(dtype));
        Ok(dims)
    }

    /// The axis to gather along and that of the blocks.
    fn axes(&self, dtype: DType, rank: usize) -> Result<(usize, usize), OpError> {
        let axes = (normalize_axis(self.gather_axis, rank)?, normalize_axis(self.quantize_axis, rank)?);
        match dtype {
            DType::U8 if axes.0 != 0 || axes.1 != rank - 1 || axes.0 == axes.1 => Err(OpError::input(format!(
                "data of u8 is gathered along the first axis and quantized along the last, not {} and {}",
                self.gather_axis, self.quantize_axis
            ))),
            DType::U8 | DType::I4 | DType::U4 if self.block_size > 0 => Ok(axes),
            DType::F8E4M3FN | DType::F8E4M3FNUZ | DType::F8E5M2 | DType::F8E5M2FNUZ | DType::F4E2M1 => Ok(axes),
            _ => Err(OpError::input(format!("data of {dtype} in blocks of {}", self.block_size))),
        }
    }

    fn check_scales(&self, dtype: DType, dims: &[Dim], scales: &[Dim], axes: (usize, usize)) -> Result<(), OpError> {
        let fits = |(axis, (dim, scale)): (usize, (&Dim, &Dim))| match self.block_size {
            0 if axis == axes.1 => !differ(scale, &Dim::Const(1)),
            block if axis == axes.1 => !differ(scale, &dim.ceil_div(&block.into())),
            _ => !differ(scale, dim) || (dtype.is_float() && scale.as_const() == Some(1)),
        };
        match scales.len() == dims.len() && dims.iter().zip(scales).enumerate().all(fits) {
            true => Ok(()),
            false => Err(OpError::input(format!("scales of {scales:?} don't fit data of {dims:?}"))),
        }
    }

    /// The elements of `tensor`, which are `dims` once unpacked: every row starts at a byte of its own.
    fn elements(&self, tensor: &Tensor, dims: &Shape) -> Result<Vec<f64>, OpError> {
        let values: Vec<f64> = match Wide::of(tensor)? {
            Wide::Float(values) => values,
            Wide::Int(values) => values.into_iter().map(|v| v as f64).collect(),
            Wide::Bool(_) => return Err(OpError::input("expected numbers, got bool")),
        };
        let per_element = self.per_element(tensor.dtype());
        let row = dims.last().copied().unwrap_or(1);
        let packed_row = row.div_ceil(per_element);
        let rows = dims[..dims.rank().saturating_sub(1)].iter().product::<usize>();
        if rows.checked_mul(packed_row) != Some(values.len()) {
            return Err(OpError::input(format!("{} does not hold the elements of {dims}", tensor.shape())));
        }
        if per_element == 1 {
            return Ok(values);
        }
        let mask = u8::MAX >> (8 - self.bits);
        let element = |packed: &[f64], at: usize| {
            f64::from(packed[at / per_element] as u8 >> (at % per_element * self.bits) & mask)
        };
        Ok(values
            .chunks_exact(packed_row.max(1))
            .flat_map(|packed| (0..row).map(move |at| element(packed, at)))
            .collect())
    }
}
