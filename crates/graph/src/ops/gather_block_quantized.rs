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
        let places_of = inputs.integers(1)?;
        if dtype == DType::U8 && places_of.len() < extent {
            return self.eval_rows(inputs, &places_of, context);
        }
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
        let places = places_of;
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
    /// As [`Operator::eval`] of a table of bytes, whose rows are whole ones: those alone that are asked for are unpacked.
    fn eval_rows(&self, inputs: Inputs<'_>, places: &[i64], context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let extent = inputs.tensor(0)?.shape()[0];
        let row = |place: i64| {
            let place = if place < 0 { place.saturating_add(extent as i64) } else { place };
            usize::try_from(place).ok().filter(|&place| place < extent)
        };
        let rows: Vec<usize> = places.iter().filter_map(|&place| row(place)).collect();
        let chosen = |tensor: &Tensor| -> Result<Value, OpError> {
            let width = tensor.bytes().len() / extent.max(1);
            let bytes: Vec<u8> = rows.iter().flat_map(|row| &tensor.bytes()[row * width..][..width]).copied().collect();
            let shape = [&[rows.len()], &tensor.shape()[1..]].concat();
            Ok(Tensor::from_bytes(tensor.dtype(), shape, &bytes).map_err(|e| OpError::input(e.to_string()))?.into())
        };
        let mut next = 0..;
        let renumbered = places.iter().map(|&place| row(place).and_then(|_| next.next()).unwrap_or(i64::MAX)).collect();
        let renumbered = Tensor::from_vec(inputs.tensor(1)?.shape().clone(), renumbered);
        let renumbered = renumbered.map_err(|e| OpError::input(e.to_string()))?.into();
        let (data, scales) = (chosen(inputs.tensor(0)?)?, chosen(inputs.tensor(2)?)?);
        let zero_points = inputs.optional_tensor(3)?.map(chosen).transpose()?;
        self.eval(Inputs(&[Some(&data), Some(&renumbered), Some(&scales), zero_points.as_ref()]), context)
    }

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

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};
    use cutover_tensor::{DType, Tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.GatherBlockQuantized", 1)
            .with("block_size", 16)
            .input(
                Tensor::from_bytes(
                    DType::I4,
                    [3, 18],
                    &[
                        0x53, 0xe4, 0xcf, 0xca, 0xd3, 0x17, 0x02, 0xd4, 0x21, 0x25, 0x01, 0xe8, 0x1c, 0x1d, 0xdf, 0xc0,
                        0x0b, 0x17, 0x11, 0xe6, 0x1e, 0x70, 0xea, 0x5b, 0x90, 0x6a, 0x7f,
                    ],
                )
                .unwrap(),
            )
            .input(tensor::<i64>(&[1, 2], &[0, -1]))
            .input(f32s(&[3, 2], &[0.3357, 0.1109, 0.5347, 0.2644, 0.9745, 0.9079]))
            .input(Tensor::from_bytes(DType::I4, [3, 2], &[0x7f, 0x18, 0x08]).unwrap())
            .gives([f32s(
                &[1, 2, 18],
                &[
                    1.3428, 2.0142, 1.6785, -0.3357, 0.0, -1.0071, -1.6785, -1.0071, 1.3428, -0.6714, 2.6856, 0.6714,
                    1.0071, 0.3357, 1.6785, -0.6714, -0.6654, -0.5545, 8.7705, 8.7705, 13.643, 5.847, 5.847, 8.7705,
                    7.796, 14.6175, 1.949, 5.847, 2.9235, 12.6685, 7.796, 0.9745, 1.949, 13.643, -0.9079, 6.3553,
                ],
            )]);
        case("com.microsoft.GatherBlockQuantized", 1)
            .with("block_size", 16)
            .with("gather_axis", 1)
            .with("quantize_axis", 0)
            .input(
                Tensor::from_bytes(
                    DType::U4,
                    [17, 2],
                    &[
                        0xde, 0xa3, 0x32, 0xe6, 0x7a, 0xc3, 0x89, 0x2a, 0x4e, 0x97, 0x22, 0x07, 0x69, 0xc3, 0x95, 0x53,
                        0xba,
                    ],
                )
                .unwrap(),
            )
            .input(tensor::<i32>(&[], &[1]))
            .input(f32s(&[2, 2], &[0.5361, 0.9996, 0.7984, 0.8476]))
            .gives([f32s(
                &[17],
                &[
                    12.9948, 9.996, 2.9988, 13.9944, 6.9972, 11.9952, 7.9968, 1.9992, 3.9984, 8.9964, 1.9992, 0.0,
                    5.9976, 11.9952, 8.9964, 4.998, 9.3236,
                ],
            )]);
        case("com.microsoft.GatherBlockQuantized", 1)
            .with("block_size", 16)
            .input(tensor::<u8>(
                &[2, 10],
                &[148, 66, 199, 38, 148, 51, 18, 110, 114, 131, 1, 49, 21, 199, 12, 222, 54, 80, 86, 130],
            ))
            .input(tensor::<i64>(&[2], &[1, 0]))
            .input(f32s(&[2, 2], &[0.6349, 0.7501, 0.2327, 0.3528]))
            .input(tensor::<u8>(&[2, 1], &[51, 187]))
            .gives([f32s(
                &[2, 20],
                &[
                    -2.327, -2.5597, -2.327, -1.8616, -1.3962, -2.327, -0.9308, 0.2327, 0.2327, -2.5597, 0.6981,
                    0.4654, -1.1635, -1.8616, -2.5597, -1.3962, -1.764, -2.1168, -3.1752, -1.0584, 0.6349, 3.8094,
                    -0.6349, 0.6349, 2.5396, 5.7141, 1.9047, -0.6349, 0.6349, 3.8094, 0.0, 0.0, -0.6349, -1.2698,
                    6.9839, 1.9047, -0.7501, 3.0004, 0.0, 3.7505,
                ],
            )]);
        case("com.microsoft.GatherBlockQuantized", 1)
            .with("block_size", 16)
            .with("bits", 8)
            .input(tensor::<u8>(
                &[2, 16],
                &[
                    185, 145, 254, 230, 251, 114, 141, 104, 72, 78, 190, 59, 37, 166, 137, 67, 77, 220, 10, 69, 143,
                    172, 146, 145, 197, 160, 160, 229, 194, 43, 247, 38,
                ],
            ))
            .input(tensor::<i64>(&[1], &[1]))
            .input(f32s(&[2, 1], &[0.2097, 0.1688]))
            .gives([f32s(
                &[1, 16],
                &[
                    -8.6088, 15.5296, -19.9184, -9.9592, 2.532, 7.4272, 3.0384, 2.8696, 11.6472, 5.4016, 5.4016,
                    17.0488, 11.1408, -14.348, 20.0872, -15.192,
                ],
            )]);
        case("com.microsoft.GatherBlockQuantized", 1)
            .with("block_size", 16)
            .with("bits", 2)
            .with("quantize_axis", -1)
            .input(tensor::<u8>(&[3, 4], &[226, 136, 144, 42, 33, 206, 62, 5, 116, 95, 115, 121]))
            .input(tensor::<i64>(&[1], &[1]))
            .input(f32s(&[3, 1], &[0.2949, 0.4203, 0.3005]))
            .input(tensor::<u8>(&[3, 1], &[205, 72, 112]))
            .gives([f32s(
                &[1, 16],
                &[
                    0.4203, 0.0, 0.8406, 0.0, 0.8406, 1.2609, 0.0, 1.2609, 0.8406, 1.2609, 1.2609, 0.0, 0.4203, 0.4203,
                    0.0, 0.0,
                ],
            )]);
        case("com.microsoft.GatherBlockQuantized", 1)
            .with("block_size", 16)
            .with("bits", 8)
            .input(tensor::<u8>(
                &[2, 16],
                &[
                    237, 255, 106, 99, 98, 91, 156, 163, 170, 199, 169, 69, 21, 105, 148, 234, 188, 81, 203, 167, 150,
                    219, 33, 126, 21, 189, 82, 197, 237, 219, 120, 158,
                ],
            ))
            .input(tensor::<i64>(&[3], &[2, -3, 0]))
            .input(f32s(&[2, 1], &[0.5137, 0.7796]))
            .gives([f32s(
                &[3, 16],
                &[
                    0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
                    0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 55.9933, 65.2399, -11.3014, -14.8973,
                    -15.411, -19.0069, 14.3836, 17.9795, 21.5754, 36.4727, 21.0617, -30.3083, -54.9659, -11.8151,
                    10.274, 54.4522,
                ],
            )]);
    }
}
