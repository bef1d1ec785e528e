//! What reference evaluation is written with: one way over all element types.
//!
//! Arithmetic widens: every float to `f64`, every integer to `i128`; the result is rounded or wrapped once, when it is
//! narrowed. Operators that only move elements don't look at them: they say where each comes from ([`select`]).

use crate::OpError;
use cutover_tensor::{
    DType, Element, Shape, Tensor, Value, bf16, f16,
    small_float::{self, RoundMode, is_small_float},
};

/// A node's inputs, omitted ones `None`.
#[derive(Clone, Copy)]
pub struct Inputs<'a>(pub &'a [Option<&'a Value>]);

impl<'a> Inputs<'a> {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn get(&self, index: usize) -> Option<&'a Value> {
        self.0.get(index).copied().flatten()
    }

    pub fn tensor(&self, index: usize) -> Result<&'a Tensor, OpError> {
        self.optional_tensor(index)?.ok_or_else(|| OpError::input(format!("input {index} is missing")))
    }

    pub fn optional_tensor(&self, index: usize) -> Result<Option<&'a Tensor>, OpError> {
        self.get(index)
            .map(|value| {
                value
                    .as_tensor()
                    .ok_or_else(|| OpError::input(format!("input {index} must be a tensor, got a {}", value.kind())))
            })
            .transpose()
    }

    /// The elements of the sequence at `index`.
    pub fn sequence(&self, index: usize) -> Result<&'a [Value], OpError> {
        match self.get(index) {
            Some(Value::Sequence(values)) => Ok(values),
            Some(other) => Err(OpError::input(format!("input {index} must be a sequence, got a {}", other.kind()))),
            None => Err(OpError::input(format!("input {index} is missing"))),
        }
    }

    /// The integers of an i64 or i32 tensor, such as axes or a shape.
    pub fn integers(&self, index: usize) -> Result<Vec<i64>, OpError> {
        let tensor = self.tensor(index)?;
        match tensor.dtype() {
            DType::I64 => Ok(tensor.to_vec()?),
            DType::I32 => Ok(tensor.to_vec::<i32>()?.into_iter().map(i64::from).collect()),
            other => Err(OpError::input(format!("input {index} must be of type i64 or i32, got {other}"))),
        }
    }
}

/// Elements in the widest type of their class.
#[derive(Clone, Debug, PartialEq)]
pub enum Wide {
    Float(Vec<f64>),
    Int(Vec<i128>),
    Bool(Vec<bool>),
}

impl Wide {
    /// # Errors
    /// Strings and complex numbers.
    pub fn of(tensor: &Tensor) -> Result<Wide, OpError> {
        fn ints<T: Element + Into<i128>>(tensor: &Tensor) -> Result<Wide, OpError> {
            Ok(Wide::Int(tensor.to_vec::<T>()?.into_iter().map(Into::into).collect()))
        }
        Ok(match tensor.dtype() {
            DType::F32 => Wide::Float(tensor.to_vec::<f32>()?.into_iter().map(f64::from).collect()),
            DType::F64 => Wide::Float(tensor.to_vec()?),
            DType::F16 => Wide::Float(tensor.to_vec::<f16>()?.into_iter().map(f64::from).collect()),
            DType::BF16 => Wide::Float(tensor.to_vec::<bf16>()?.into_iter().map(f64::from).collect()),
            DType::I8 => ints::<i8>(tensor)?,
            DType::I16 => ints::<i16>(tensor)?,
            DType::I32 => ints::<i32>(tensor)?,
            DType::I64 => ints::<i64>(tensor)?,
            DType::U8 => ints::<u8>(tensor)?,
            DType::U16 => ints::<u16>(tensor)?,
            DType::U32 => ints::<u32>(tensor)?,
            DType::U64 => ints::<u64>(tensor)?,
            DType::Bool => Wide::Bool(tensor.to_bools()?),
            DType::I4 | DType::U4 | DType::I2 | DType::U2 => Wide::Int(unpack(tensor)),
            dtype if is_small_float(dtype) => {
                Wide::Float(codes(tensor).into_iter().map(|code| small_float::decode(dtype, code)).collect())
            }
            other => return Err(OpError::unsupported(format!("arithmetic on {other}"))),
        })
    }

    /// The floats of a floating-point tensor.
    pub fn floats(tensor: &Tensor) -> Result<Vec<f64>, OpError> {
        match Wide::of(tensor)? {
            Wide::Float(values) => Ok(values),
            _ => Err(OpError::input(format!("expected a floating-point tensor, got {}", tensor.dtype()))),
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Wide::Float(v) => v.len(),
            Wide::Int(v) => v.len(),
            Wide::Bool(v) => v.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rounds floats to nearest even, wraps integers: a tensor of `dtype`, which must be of the same class.
    pub fn narrow(self, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor, OpError> {
        let shape = shape.into();
        fn floats<T: Element>(shape: Shape, v: Vec<f64>, f: impl Fn(f64) -> T) -> Result<Tensor, OpError> {
            Ok(Tensor::from_vec(shape, v.into_iter().map(f).collect())?)
        }
        fn ints<T: Element>(shape: Shape, v: Vec<i128>, f: impl Fn(i128) -> T) -> Result<Tensor, OpError> {
            Ok(Tensor::from_vec(shape, v.into_iter().map(f).collect())?)
        }
        match (self, dtype) {
            (Wide::Float(v), DType::F32) => floats(shape, v, |x| x as f32),
            (Wide::Float(v), DType::F64) => floats(shape, v, |x| x),
            (Wide::Float(v), DType::F16) => floats(shape, v, f16::from_f64),
            (Wide::Float(v), DType::BF16) => floats(shape, v, bf16::from_f64),
            (Wide::Int(v), DType::I8) => ints(shape, v, |x| x as i8),
            (Wide::Int(v), DType::I16) => ints(shape, v, |x| x as i16),
            (Wide::Int(v), DType::I32) => ints(shape, v, |x| x as i32),
            (Wide::Int(v), DType::I64) => ints(shape, v, |x| x as i64),
            (Wide::Int(v), DType::U8) => ints(shape, v, |x| x as u8),
            (Wide::Int(v), DType::U16) => ints(shape, v, |x| x as u16),
            (Wide::Int(v), DType::U32) => ints(shape, v, |x| x as u32),
            (Wide::Int(v), DType::U64) => ints(shape, v, |x| x as u64),
            (Wide::Int(v), DType::I4 | DType::U4 | DType::I2 | DType::U2) => pack(&v, dtype, shape),
            (Wide::Float(v), dtype) if is_small_float(dtype) => {
                let code = |x| small_float::encode(dtype, x, true, RoundMode::default());
                from_codes(v.into_iter().map(code), dtype, shape)
            }
            (Wide::Bool(v), DType::Bool) => Ok(Tensor::from_bools(shape, &v)?),
            (wide, dtype) => {
                let class = match wide {
                    Wide::Float(_) => "floats",
                    Wide::Int(_) => "integers",
                    Wide::Bool(_) => "booleans",
                };
                Err(OpError::unsupported(format!("{class} as {dtype}")))
            }
        }
    }
}

/// The bits of elements of eight bits and fewer, the first of a byte in its lowest bits.
fn codes(tensor: &Tensor) -> Vec<u8> {
    let bits = tensor.dtype().bits();
    let (per_byte, mask) = (8 / bits, u8::MAX >> (8 - bits));
    let element = |i: usize| tensor.bytes()[i / per_byte] >> (i % per_byte * bits) & mask;
    (0..tensor.element_count()).map(element).collect()
}

/// A tensor of elements of eight bits and fewer, given by their bits.
pub(super) fn from_codes(
    codes: impl ExactSizeIterator<Item = u8>,
    dtype: DType,
    shape: Shape,
) -> Result<Tensor, OpError> {
    let bits = dtype.bits();
    let per_byte = 8 / bits;
    let mut bytes = vec![0u8; codes.len().div_ceil(per_byte)];
    for (i, code) in codes.enumerate() {
        bytes[i / per_byte] |= code << (i % per_byte * bits);
    }
    Ok(Tensor::from_bytes(dtype, shape, &bytes)?)
}

fn unpack(tensor: &Tensor) -> Vec<i128> {
    let (bits, signed) = (tensor.dtype().bits(), matches!(tensor.dtype(), DType::I4 | DType::I2));
    let value = |code: u8| match signed && code >> (bits - 1) == 1 {
        true => i128::from(code) - (1 << bits),
        false => i128::from(code),
    };
    codes(tensor).into_iter().map(value).collect()
}

fn pack(values: &[i128], dtype: DType, shape: Shape) -> Result<Tensor, OpError> {
    let mask = (1i128 << dtype.bits()) - 1;
    from_codes(values.iter().map(|value| (value & mask) as u8), dtype, shape)
}

/// The shape that NumPy-style broadcasting gives.
pub fn broadcast_shape(shapes: &[&[usize]]) -> Result<Shape, OpError> {
    let rank = shapes.iter().map(|s| s.len()).max().unwrap_or(0);
    let mut result = vec![1usize; rank];
    for shape in shapes {
        for (out, &dim) in result[rank - shape.len()..].iter_mut().zip(*shape) {
            match (*out, dim) {
                (a, b) if a == b => {}
                (1, b) => *out = b,
                (_, 1) => {}
                (a, b) => {
                    return Err(OpError::input(format!(
                        "shapes {} do not broadcast: {a} against {b}",
                        shapes.iter().map(|s| Shape::new(s).to_string()).collect::<Vec<_>>().join(" and ")
                    )));
                }
            }
        }
    }
    Ok(result.into())
}

/// For each element of `to`, row-major, the index of the element of `from` that broadcasting puts there.
pub fn broadcast_index(from: &[usize], to: &[usize]) -> impl Iterator<Item = usize> + use<> {
    let from_shape = Shape::new(from);
    let from_strides = from_shape.strides();
    let lead = to.len() - from.len();
    let strides: Vec<usize> = (0..to.len())
        .map(|axis| if axis < lead || from[axis - lead] == 1 { 0 } else { from_strides[axis - lead] })
        .collect();
    indices(to).map(move |index| index.iter().zip(&strides).map(|(i, s)| i * s).sum())
}

/// Every multi-index of `shape`, row-major.
pub fn indices(shape: &[usize]) -> impl Iterator<Item = Vec<usize>> + use<> {
    let shape = shape.to_vec();
    let count = Shape::new(&shape).checked_len().unwrap_or(0);
    let mut index = vec![0usize; shape.len()];
    (0..count).map(move |n| {
        if n > 0 {
            for axis in (0..shape.len()).rev() {
                index[axis] += 1;
                if index[axis] < shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        index.clone()
    })
}

/// A tensor of `shape` whose elements are those of `tensor` at `sources` (flat, row-major), for any element type.
pub fn select(
    tensor: &Tensor,
    shape: impl Into<Shape>,
    sources: impl Iterator<Item = usize>,
) -> Result<Tensor, OpError> {
    select_from(&[tensor], shape, sources.map(|source| (0, source)))
}

/// As [`select`], from several tensors of one element type: `(which tensor, which element)`.
pub fn select_from(
    tensors: &[&Tensor],
    shape: impl Into<Shape>,
    sources: impl Iterator<Item = (usize, usize)>,
) -> Result<Tensor, OpError> {
    let shape = shape.into();
    let dtype = tensors.first().ok_or_else(|| OpError::input("no tensor to take elements from"))?.dtype();
    if let Some(other) = tensors.iter().find(|t| t.dtype() != dtype) {
        return Err(OpError::input(format!("tensors of one type expected, got {dtype} and {}", other.dtype())));
    }
    if dtype == DType::String {
        let strings = tensors.iter().map(|t| t.strings()).collect::<Result<Vec<_>, _>>()?;
        return Ok(Tensor::from_strings(shape, sources.map(|(t, i)| strings[t][i].clone()).collect())?);
    }
    let bytes: Vec<&[u8]> = tensors.iter().map(|t| t.bytes()).collect();
    let mut out = Tensor::zeros(dtype, shape)?;
    let count = out.element_count();
    let target = out.bytes_mut();
    match dtype.bits() {
        bits @ (2 | 4) => {
            let per_byte = 8 / bits;
            let mask = (1u8 << bits) - 1;
            for (to, (t, from)) in (0..count).zip(sources) {
                let element = bytes[t][from / per_byte] >> (from % per_byte * bits) & mask;
                target[to / per_byte] |= element << (to % per_byte * bits);
            }
        }
        bits => {
            let size = bits / 8;
            for (to, (t, from)) in target.chunks_exact_mut(size).zip(sources) {
                to.copy_from_slice(&bytes[t][from * size..(from + 1) * size]);
            }
        }
    }
    Ok(out)
}

/// `axis` of a tensor of `rank` axes, where negative ones count from the end.
pub fn normalize_axis(axis: i64, rank: usize) -> Result<usize, OpError> {
    let shifted = if axis < 0 { axis.saturating_add(rank as i64) } else { axis };
    usize::try_from(shifted).ok().filter(|&a| a < rank).ok_or_else(|| {
        OpError::input(format!(
            "axis {axis} of a tensor of rank {rank}, expected {} to {}",
            -(rank as i64),
            rank as i64 - 1
        ))
    })
}

/// `axes`, normalised; none may come twice.
pub fn normalize_axes(axes: &[i64], rank: usize) -> Result<Vec<usize>, OpError> {
    let axes = axes.iter().map(|&a| normalize_axis(a, rank)).collect::<Result<Vec<_>, _>>()?;
    match (1..axes.len()).find(|&i| axes[..i].contains(&axes[i])) {
        Some(twice) => Err(OpError::input(format!("axis {} is there twice", axes[twice]))),
        None => Ok(axes),
    }
}

/// The shape, if an operator may make so large a result.
pub fn checked_shape(dims: Vec<usize>, context: &super::EvalContext) -> Result<Shape, OpError> {
    let shape = Shape::new(&dims);
    // Where an extent is 0 the others are as large as one likes, but still extents.
    let representable = dims.iter().all(|&extent| i64::try_from(extent).is_ok());
    match shape.checked_len().filter(|_| representable) {
        Some(count) if count <= context.max_elements => Ok(shape),
        _ => Err(OpError::Resource(format!("a result of shape {shape}, above {} elements", context.max_elements))),
    }
}
