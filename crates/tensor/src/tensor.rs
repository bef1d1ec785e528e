//! Tensors and borrowed views of them.

use crate::{Buffer, DType, Element, Shape, TensorError};
use std::{fmt, sync::Arc};

/// A contiguous row-major array. Cloning shares the bytes.
#[derive(Clone)]
pub struct Tensor {
    dtype: DType,
    shape: Shape,
    data: Data,
}

#[derive(Clone)]
enum Data {
    Bytes { buffer: Arc<Buffer>, offset: usize, len: usize },
    Strings(Arc<[String]>),
}

fn byte_len(dtype: DType, shape: &Shape) -> Result<usize, TensorError> {
    shape
        .checked_len()
        .and_then(|n| dtype.byte_len(n))
        .filter(|&n| n <= isize::MAX as usize)
        .ok_or_else(|| TensorError::TooLarge { shape: shape.clone(), dtype })
}

impl Tensor {
    /// Zeros (false, 0, +0.0; empty strings), 64-byte aligned.
    pub fn zeros(dtype: DType, shape: impl Into<Shape>) -> Result<Tensor, TensorError> {
        let shape = shape.into();
        if dtype == DType::String {
            let count = shape.checked_len().ok_or_else(|| TensorError::TooLarge { shape: shape.clone(), dtype })?;
            return Tensor::from_strings(shape, vec![String::new(); count]);
        }
        let len = byte_len(dtype, &shape)?;
        let Some(buffer) = Buffer::try_zeroed(len) else { return Err(TensorError::OutOfMemory { shape, dtype }) };
        Ok(Tensor { dtype, shape, data: Data::Bytes { buffer: Arc::new(buffer), offset: 0, len } })
    }

    /// Takes `values` in row-major order.
    pub fn from_vec<T: Element>(shape: impl Into<Shape>, values: Vec<T>) -> Result<Tensor, TensorError> {
        Tensor::from_bytes(T::DTYPE, shape, bytemuck::cast_slice(&values))
    }

    /// Booleans, stored as one byte each, 0 or 1.
    pub fn from_bools(shape: impl Into<Shape>, values: &[bool]) -> Result<Tensor, TensorError> {
        Tensor::from_bytes(DType::Bool, shape, bytemuck::cast_slice(values))
    }

    pub fn from_strings(shape: impl Into<Shape>, values: Vec<String>) -> Result<Tensor, TensorError> {
        let shape = shape.into();
        if shape.checked_len() != Some(values.len()) {
            return Err(TensorError::Reshape { from: values.len(), to: shape });
        }
        Ok(Tensor { dtype: DType::String, shape, data: Data::Strings(values.into()) })
    }

    pub fn scalar<T: Element>(value: T) -> Tensor {
        Tensor::from_vec(Shape::scalar(), vec![value]).expect("one value fits a scalar")
    }

    /// An aligned copy of packed little-endian `bytes`.
    pub fn from_bytes(dtype: DType, shape: impl Into<Shape>, bytes: &[u8]) -> Result<Tensor, TensorError> {
        let shape = shape.into();
        let expected = byte_len(dtype, &shape)?;
        if expected != bytes.len() || dtype == DType::String {
            return Err(TensorError::ByteLength { shape, dtype, expected, actual: bytes.len() });
        }
        let data = Data::Bytes { buffer: Arc::new(Buffer::copy_of(bytes)), offset: 0, len: expected };
        Ok(Tensor { dtype, shape, data })
    }

    /// A view of `buffer` from byte `offset`, not copied; it may be misaligned for its type.
    pub fn from_buffer(
        dtype: DType,
        shape: impl Into<Shape>,
        buffer: Arc<Buffer>,
        offset: usize,
    ) -> Result<Tensor, TensorError> {
        let shape = shape.into();
        let len = byte_len(dtype, &shape)?;
        if dtype == DType::String {
            return Err(TensorError::ByteLength { shape, dtype, expected: 0, actual: buffer.len() });
        }
        match offset.checked_add(len) {
            Some(end) if end <= buffer.len() => Ok(Tensor { dtype, shape, data: Data::Bytes { buffer, offset, len } }),
            end => Err(TensorError::OutOfBounds { start: offset, end: end.unwrap_or(usize::MAX), len: buffer.len() }),
        }
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    pub fn element_count(&self) -> usize {
        self.shape.element_count()
    }

    /// The packed little-endian bytes; empty for strings.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Bytes { buffer, offset, len } => &buffer[*offset..*offset + *len],
            Data::Strings(_) => &[],
        }
    }

    /// The elements as a slice, without a copy.
    ///
    /// # Errors
    /// Another element type, or bytes of a mapped file that are not aligned for `T` ([`Tensor::to_vec`] reads those).
    pub fn as_slice<T: Element>(&self) -> Result<&[T], TensorError> {
        self.view().into_slice()
    }

    /// The elements copied out, whatever their alignment.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>, TensorError> {
        self.check_dtype(T::DTYPE)?;
        Ok(bytemuck::pod_collect_to_vec(self.bytes()))
    }

    pub fn to_bools(&self) -> Result<Vec<bool>, TensorError> {
        self.check_dtype(DType::Bool)?;
        Ok(self.bytes().iter().map(|&b| b != 0).collect())
    }

    pub fn strings(&self) -> Result<&[String], TensorError> {
        match &self.data {
            Data::Strings(strings) => Ok(strings),
            Data::Bytes { .. } => Err(TensorError::DType { expected: DType::String, actual: self.dtype }),
        }
    }

    /// The same elements under another shape with as many of them; the bytes are shared.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Tensor, TensorError> {
        let shape = shape.into();
        if shape.checked_len() != Some(self.element_count()) {
            return Err(TensorError::Reshape { from: self.element_count(), to: shape });
        }
        Ok(Tensor { dtype: self.dtype, shape, data: self.data.clone() })
    }

    /// The same bits read as another type of the same width (e.g. the u16 of a bf16).
    pub fn bitcast(&self, dtype: DType) -> Result<Tensor, TensorError> {
        if dtype.bits() != self.dtype.bits() || dtype == DType::String {
            return Err(TensorError::DType { expected: dtype, actual: self.dtype });
        }
        Ok(Tensor { dtype, shape: self.shape.clone(), data: self.data.clone() })
    }

    /// The bytes for writing: those of this tensor if it alone owns them, else of a copy it then holds.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        if let Data::Strings(_) = self.data {
            return &mut [];
        }
        let sole = match &mut self.data {
            Data::Bytes { buffer, .. } => Arc::get_mut(buffer).is_some_and(|b| b.as_mut_owned().is_some()),
            Data::Strings(_) => false,
        };
        if !sole {
            *self = Tensor::from_bytes(self.dtype, self.shape.clone(), self.bytes()).expect("a copy of itself");
        }
        match &mut self.data {
            Data::Bytes { buffer, offset, len } => {
                let bytes = Arc::get_mut(buffer).and_then(Buffer::as_mut_owned).expect("sole owner, as made above");
                &mut bytes[*offset..*offset + *len]
            }
            Data::Strings(_) => &mut [],
        }
    }

    pub fn view(&self) -> TensorView<'_> {
        let strings = if let Data::Strings(strings) = &self.data { &strings[..] } else { &[] };
        TensorView { dtype: self.dtype, shape: &self.shape, bytes: self.bytes(), strings }
    }

    /// Hints that the bytes are not needed for now: where they are a part of a mapped file, the memory that holds them goes, and they are
    /// read again when somebody asks.
    pub fn give_back(&self) {
        if let Data::Bytes { buffer, offset, len } = &self.data {
            buffer.give_back(*offset..*offset + *len);
        }
    }

    /// A copy whose bytes are aligned, or the tensor itself if they are.
    pub fn aligned(&self) -> Tensor {
        let alignment = (self.dtype.bits() / 8).clamp(1, 16);
        if self.dtype == DType::String || (self.bytes().as_ptr() as usize).is_multiple_of(alignment) {
            self.clone()
        } else {
            Tensor::from_bytes(self.dtype, self.shape.clone(), self.bytes()).expect("a copy of itself")
        }
    }

    fn check_dtype(&self, expected: DType) -> Result<(), TensorError> {
        if self.dtype == expected { Ok(()) } else { Err(TensorError::DType { expected, actual: self.dtype }) }
    }
}

/// Equal type, shape and bits (so NaN equals the same NaN, and 0.0 differs from -0.0).
impl PartialEq for Tensor {
    fn eq(&self, other: &Tensor) -> bool {
        self.dtype == other.dtype
            && self.shape == other.shape
            && match (&self.data, &other.data) {
                (Data::Strings(a), Data::Strings(b)) => a == b,
                _ => self.bytes() == other.bytes(),
            }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {})", self.dtype, self.shape)
    }
}

/// A tensor that someone else holds: what callers hand in without a copy.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    dtype: DType,
    shape: &'a [usize],
    bytes: &'a [u8],
    /// Of a tensor of strings, which has no bytes.
    strings: &'a [String],
}

impl<'a> TensorView<'a> {
    pub fn new<T: Element>(shape: &'a [usize], values: &'a [T]) -> Result<Self, TensorError> {
        TensorView::from_bytes(T::DTYPE, shape, bytemuck::cast_slice(values))
    }

    pub fn from_bytes(dtype: DType, shape: &'a [usize], bytes: &'a [u8]) -> Result<Self, TensorError> {
        let owned = Shape::new(shape);
        let expected = byte_len(dtype, &owned)?;
        if expected != bytes.len() || dtype == DType::String {
            return Err(TensorError::ByteLength { shape: owned, dtype, expected, actual: bytes.len() });
        }
        Ok(TensorView { dtype, shape, bytes, strings: &[] })
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    pub fn into_slice<T: Element>(self) -> Result<&'a [T], TensorError> {
        if self.dtype != T::DTYPE {
            return Err(TensorError::DType { expected: T::DTYPE, actual: self.dtype });
        }
        bytemuck::try_cast_slice(self.bytes)
            .map_err(|_| TensorError::Misaligned { dtype: self.dtype, alignment: align_of::<T>() })
    }

    pub fn to_tensor(&self) -> Tensor {
        match self.dtype {
            DType::String => Tensor::from_strings(self.shape, self.strings.to_vec()),
            dtype => Tensor::from_bytes(dtype, self.shape, self.bytes),
        }
        .expect("a view was checked when it was made")
    }
}

/// A caller's buffer that a result is written into.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    dtype: DType,
    shape: &'a [usize],
    bytes: &'a mut [u8],
}

impl<'a> TensorViewMut<'a> {
    pub fn new<T: Element>(shape: &'a [usize], values: &'a mut [T]) -> Result<Self, TensorError> {
        TensorViewMut::from_bytes(T::DTYPE, shape, bytemuck::cast_slice_mut(values))
    }

    pub fn from_bytes(dtype: DType, shape: &'a [usize], bytes: &'a mut [u8]) -> Result<Self, TensorError> {
        TensorView::from_bytes(dtype, shape, bytes)?;
        Ok(TensorViewMut { dtype, shape, bytes })
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    pub fn bytes(&self) -> &[u8] {
        self.bytes
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_lengths_and_bounds_are_checked() {
        assert_eq!(Tensor::zeros(DType::I4, [3]).unwrap().bytes().len(), 2);
        assert_eq!(Tensor::zeros(DType::F32, [0, usize::MAX]).unwrap().element_count(), 0);
        // The product of any of the extents fits, whichever a caller leaves out.
        assert!(matches!(Tensor::zeros(DType::F32, [2, 0, usize::MAX]), Err(TensorError::TooLarge { .. })));
        assert!(matches!(Tensor::zeros(DType::F32, [usize::MAX, 2]), Err(TensorError::TooLarge { .. })));
        let buffer = Arc::new(Buffer::copy_of(&[0; 8]));
        assert!(Tensor::from_buffer(DType::F32, [2], buffer.clone(), 0).is_ok());
        assert!(matches!(
            Tensor::from_buffer(DType::F32, [2], buffer, 1),
            Err(TensorError::OutOfBounds { start: 1, end: 9, len: 8 })
        ));
    }

    #[test]
    fn misaligned_bytes_are_read_by_copy() {
        let mut bytes = vec![0u8; 9];
        bytes[1..5].copy_from_slice(&1.5f32.to_le_bytes());
        bytes[5..9].copy_from_slice(&(-2f32).to_le_bytes());
        let buffer = Arc::new(Buffer::copy_of(&bytes));
        let tensor = Tensor::from_buffer(DType::F32, [2], buffer, 1).unwrap();
        assert!(matches!(tensor.as_slice::<f32>(), Err(TensorError::Misaligned { .. })));
        assert_eq!(tensor.to_vec::<f32>().unwrap(), [1.5, -2.0]);
        assert_eq!(tensor.aligned().as_slice::<f32>().unwrap(), [1.5, -2.0]);
    }

    #[test]
    fn writing_copies_shared_bytes() {
        let mut a = Tensor::from_vec([2], vec![1u8, 2]).unwrap();
        let b = a.clone();
        a.bytes_mut()[0] = 9;
        assert_eq!((a.bytes(), b.bytes()), (&[9, 2][..], &[1, 2][..]));
    }
}
