//! `TensorProto` to tensors: raw bytes and external data as views, typed fields decoded.

use super::{
    ImportOptions,
    mapping::FileBytes,
    proto::{SparseTensorProto, TensorProto},
};
use crate::{ImportError, ops::select_from};
use cutover_tensor::{Buffer, DType, Shape, Tensor};
use std::{
    collections::HashMap,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

/// Where external data may lie.
#[derive(Clone, Copy)]
pub(super) enum External<'a> {
    None,
    /// The model's folder.
    Folder(&'a Path),
    /// Files that are given by their names.
    Files(&'a dyn Fn(&str) -> std::io::Result<Arc<Buffer>>),
}

/// Reads the tensors of one model; external files are opened once.
pub(super) struct TensorReader<'a> {
    pub file: FileBytes,
    pub source: External<'a>,
    pub options: &'a ImportOptions,
    external: HashMap<String, FileBytes>,
    /// Bytes that sparse tensors have taken so far.
    sparse_bytes: u64,
}

impl<'a> TensorReader<'a> {
    pub fn new(file: FileBytes, source: External<'a>, options: &'a ImportOptions) -> TensorReader<'a> {
        TensorReader { file, source, options, external: HashMap::new(), sparse_bytes: 0 }
    }

    /// The tensor that `proto` holds or points to; `place` names it in errors.
    pub fn read(&mut self, proto: &TensorProto, place: &str) -> Result<Tensor, ImportError> {
        let corrupt = |message: String| ImportError::Corrupt { place: place.to_string(), message };
        let dtype = DType::from_onnx_code(proto.data_type)
            .ok_or_else(|| corrupt(format!("data type {} is not one of ONNX's", proto.data_type)))?;
        let limits = &self.options.limits;
        if proto.dims.len() > limits.rank {
            let (actual, limit) = (proto.dims.len() as u64, limits.rank as u64);
            return Err(ImportError::Limit { place: place.to_string(), what: "the rank", actual, limit });
        }
        let dims = proto.dims.iter().map(|&d| usize::try_from(d)).collect::<Result<Vec<_>, _>>();
        let shape = Shape::new(&dims.map_err(|_| corrupt(format!("dimensions {:?}: one is negative", proto.dims)))?);
        let count = shape.checked_len().ok_or_else(|| corrupt(format!("dimensions {shape} overflow")))?;
        let expected = dtype.byte_len(count).ok_or_else(|| corrupt(format!("dimensions {shape} overflow")))?;
        if proto.data_location == 1 {
            return self.external(proto, dtype, shape, expected, place);
        }
        if proto.data_location != 0 {
            return Err(corrupt(format!("data location {}, expected 0 or 1", proto.data_location)));
        }
        if let Some(raw) = &proto.raw_data
            && (!raw.is_empty() || expected == 0)
        {
            if dtype == DType::String {
                return Err(corrupt("strings can't be raw bytes".to_string()));
            }
            if raw.len() != expected {
                return Err(corrupt(format!("{} bytes of data, {dtype} of shape {shape} takes {expected}", raw.len())));
            }
            let tensor = match self.file.offset_of(raw) {
                Some(offset) => Tensor::from_buffer(dtype, shape, self.file.0.clone(), offset),
                None => Tensor::from_bytes(dtype, shape, raw),
            };
            return tensor.map_err(|e| corrupt(e.to_string()));
        }
        typed(proto, dtype, shape, count).map_err(corrupt)
    }

    /// The sparse tensor with its zeros written out.
    pub fn read_sparse(&mut self, proto: &SparseTensorProto, place: &str) -> Result<Tensor, ImportError> {
        let corrupt = |message: String| ImportError::Corrupt { place: place.to_string(), message };
        let limit = |what, actual, limit| ImportError::Limit { place: place.to_string(), what, actual, limit };
        let (Some(values), Some(indices)) = (&proto.values, &proto.indices) else {
            return Err(corrupt("a sparse tensor without values or without indices".to_string()));
        };
        let limits = &self.options.limits;
        if proto.dims.len() > limits.rank {
            return Err(limit("the rank", proto.dims.len() as u64, limits.rank as u64));
        }
        let dims = proto.dims.iter().map(|&d| usize::try_from(d)).collect::<Result<Vec<_>, _>>();
        let shape = Shape::new(&dims.map_err(|_| corrupt(format!("dimensions {:?}: one is negative", proto.dims)))?);
        let count = shape.checked_len().ok_or_else(|| corrupt(format!("dimensions {shape} overflow")))?;
        let values = self.read(values, place)?;
        let indices = self.read(indices, place)?;
        let bytes = match values.dtype() {
            DType::String => count.saturating_mul(size_of::<String>()),
            dtype => dtype.byte_len(count).unwrap_or(usize::MAX),
        };
        self.sparse_bytes = self.sparse_bytes.saturating_add(bytes as u64);
        if self.sparse_bytes > self.options.limits.sparse_bytes {
            let most = self.options.limits.sparse_bytes;
            return Err(limit("the size of its sparse tensors in bytes", self.sparse_bytes, most));
        }
        let positions = positions(&shape, &values, &indices).map_err(corrupt)?;
        let zero = Tensor::zeros(values.dtype(), Shape::scalar()).map_err(|e| corrupt(e.to_string()))?;
        let mut stored = positions.into_iter().enumerate().peekable();
        let sources = (0..count).map(|at| match stored.next_if(|&(_, position)| position == at) {
            Some((index, _)) => (1, index),
            None => (0, 0),
        });
        select_from(&[&zero, &values], shape, sources).map_err(|e| corrupt(e.to_string()))
    }

    fn external(
        &mut self,
        proto: &TensorProto,
        dtype: DType,
        shape: Shape,
        expected: usize,
        place: &str,
    ) -> Result<Tensor, ImportError> {
        let corrupt = |message: String| ImportError::Corrupt { place: place.to_string(), message };
        let entry = |key: &str| proto.external_data.iter().find(|e| e.key == key).map(|e| e.value.as_str());
        let number = |key: &str| match entry(key) {
            None => Ok(None),
            Some(text) => match text.parse::<usize>() {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(corrupt(format!("external data: {key} is '{text}', expected a number of bytes"))),
            },
        };
        if dtype == DType::String {
            return Err(corrupt("strings can't be external data".to_string()));
        }
        let location = entry("location").ok_or_else(|| corrupt("external data without a location".to_string()))?;
        let offset = number("offset")?.unwrap_or(0);
        let file = match self.external.get(location) {
            Some(file) => file.clone(),
            None => {
                let (map, limit) = (self.options.map, self.options.limits.file_bytes);
                let file = match self.source {
                    External::Folder(folder) => {
                        FileBytes::open(&confined(folder, location).map_err(corrupt)?, map, limit)?
                    }
                    External::Files(open) => {
                        let io = |source| ImportError::Io { path: location.to_string(), source };
                        FileBytes(open(location).map_err(io)?)
                    }
                    External::None => {
                        let message =
                            format!("external data in '{location}', and the model was not read from a folder");
                        return Err(corrupt(message));
                    }
                };
                self.external.insert(location.to_string(), file.clone());
                file
            }
        };
        let length = number("length")?.unwrap_or(expected);
        if length != expected {
            return Err(corrupt(format!("external data of {length} bytes, {dtype} of shape {shape} takes {expected}")));
        }
        if offset.checked_add(length).is_none_or(|end| end > file.0.len()) {
            let len = file.0.len();
            return Err(corrupt(format!(
                "external data: bytes {offset} to {offset} + {length} of '{location}', which has {len}"
            )));
        }
        Tensor::from_buffer(dtype, shape, Arc::clone(&file.0), offset).map_err(|e| corrupt(e.to_string()))
    }
}

/// Where in a tensor of `shape` each stored value lies, in ascending order.
fn positions(shape: &Shape, values: &Tensor, indices: &Tensor) -> Result<Vec<usize>, String> {
    let (rank, count) = (shape.rank(), values.element_count());
    let flat = indices.shape().dims() == [count];
    if values.shape().rank() != 1 || !(flat || indices.shape().dims() == [count, rank]) {
        return Err(format!("values of shape {} with indices of shape {}", values.shape(), indices.shape()));
    }
    let indices = indices.to_vec::<i64>().map_err(|e| format!("indices: {e}"))?;
    let place = |extent: usize, index: i64| {
        let valid = usize::try_from(index).ok().filter(|&i| i < extent);
        valid.ok_or_else(|| format!("index {index} is outside of shape {shape}"))
    };
    let positions: Vec<usize> = if flat {
        indices.iter().map(|&i| place(shape.element_count(), i)).collect::<Result<_, _>>()?
    } else {
        let at = |index: &[i64]| {
            shape.iter().zip(index).try_fold(0, |at, (&extent, &i)| Ok::<_, String>(at * extent + place(extent, i)?))
        };
        (0..count).map(|n| at(&indices[n * rank..(n + 1) * rank])).collect::<Result<_, _>>()?
    };
    match positions.windows(2).find(|pair| pair[0] >= pair[1]) {
        Some(pair) => Err(format!("index {} comes after {}, they must ascend", pair[1], pair[0])),
        None => Ok(positions),
    }
}

/// The path of `location` under `folder`, which must stay inside it, links followed.
fn confined(folder: &Path, location: &str) -> Result<PathBuf, String> {
    let relative = Path::new(location);
    let outside = || format!("external data in '{location}', which is outside the model's folder");
    if location.is_empty() || !relative.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir)) {
        return Err(outside());
    }
    let found = |path: &Path| path.canonicalize().map_err(|e| format!("external data in '{location}': {e}"));
    let root = if folder.as_os_str().is_empty() { found(Path::new("."))? } else { found(folder)? };
    let path = found(&root.join(relative))?;
    if path.starts_with(&root) { Ok(path) } else { Err(outside()) }
}

/// The fields for small tensors: one element (or, below eight bits, one packed byte) per number.
fn typed(proto: &TensorProto, dtype: DType, shape: Shape, count: usize) -> Result<Tensor, String> {
    use DType::*;
    let check = |field: &str, actual: usize, expected: usize| {
        if actual == expected {
            return Ok(());
        }
        Err(format!("{actual} values in {field}, {dtype} of shape {shape} takes {expected}"))
    };
    // Capacity follows what the file really holds, never what the dimensions claim.
    macro_rules! pack {
        ($field:ident, $expected:expr, $t:ty) => {{
            check(stringify!($field), proto.$field.len(), $expected)?;
            proto.$field.iter().flat_map(|&v| (v as $t).to_le_bytes()).collect::<Vec<u8>>()
        }};
    }
    let bytes = match dtype {
        F32 => pack!(float_data, count, f32),
        Complex64 => pack!(float_data, count.saturating_mul(2), f32),
        F64 => pack!(double_data, count, f64),
        Complex128 => pack!(double_data, count.saturating_mul(2), f64),
        I64 => pack!(int64_data, count, i64),
        U64 => pack!(uint64_data, count, u64),
        U32 => pack!(uint64_data, count, u32),
        I32 => pack!(int32_data, count, i32),
        U16 | I16 | F16 | BF16 => pack!(int32_data, count, u16),
        Bool => {
            check("int32_data", proto.int32_data.len(), count)?;
            proto.int32_data.iter().map(|&v| u8::from(v != 0)).collect()
        }
        U8 | I8 | F8E4M3FN | F8E4M3FNUZ | F8E5M2 | F8E5M2FNUZ | F8E8M0 => pack!(int32_data, count, u8),
        U4 | I4 | F4E2M1 | U2 | I2 => pack!(int32_data, dtype.byte_len(count).unwrap_or(usize::MAX), u8),
        String => {
            check("string_data", proto.string_data.len(), count)?;
            let text = |bytes: &prost::bytes::Bytes| std::string::String::from_utf8(bytes.to_vec());
            let strings = proto.string_data.iter().map(text).collect::<Result<Vec<_>, _>>();
            let strings = strings.map_err(|_| "a string is not UTF-8".to_string())?;
            return Tensor::from_strings(shape, strings).map_err(|e| e.to_string());
        }
    };
    Tensor::from_bytes(dtype, shape, &bytes).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const F32: i32 = 1;
    const I64: i32 = 7;

    fn sparse(dims: &[i64], values: &[f32], shape: &[i64], indices: &[i64]) -> SparseTensorProto {
        let dims_of = |n: usize| vec![n as i64];
        let values = TensorProto {
            data_type: F32,
            dims: dims_of(values.len()),
            float_data: values.to_vec(),
            ..TensorProto::default()
        };
        let indices = TensorProto {
            data_type: I64,
            dims: shape.to_vec(),
            int64_data: indices.to_vec(),
            ..TensorProto::default()
        };
        SparseTensorProto { values: Some(values), indices: Some(indices), dims: dims.to_vec() }
    }

    fn read(proto: &SparseTensorProto) -> Result<Vec<f32>, String> {
        let options = ImportOptions::default();
        let mut reader = TensorReader::new(FileBytes::of(Default::default()), External::None, &options);
        let tensor = reader.read_sparse(proto, "it").map_err(|e| e.to_string())?;
        assert_eq!(tensor.shape().iter().map(|&d| d as i64).collect::<Vec<_>>(), proto.dims);
        Ok(tensor.to_vec().unwrap())
    }

    #[test]
    fn sparse_tensors_get_their_zeros() {
        let expected = Ok(vec![0.0, 5.0, 0.0, 0.0, 0.0, 7.0]);
        assert_eq!(read(&sparse(&[2, 3], &[5.0, 7.0], &[2], &[1, 5])), expected);
        assert_eq!(read(&sparse(&[2, 3], &[5.0, 7.0], &[2, 2], &[0, 1, 1, 2])), expected);
        assert_eq!(read(&sparse(&[3], &[], &[0], &[])), Ok(vec![0.0; 3]));
        assert_eq!(read(&sparse(&[0, 3], &[], &[0, 2], &[])), Ok(vec![]));
        assert_eq!(read(&sparse(&[], &[4.0], &[1, 0], &[])), Ok(vec![4.0]));
    }

    #[test]
    fn sparse_tensors_that_lie_are_refused() {
        let fails = |proto: SparseTensorProto, message: &str| {
            let error = read(&proto).unwrap_err();
            assert!(error.contains(message), "'{error}' does not say '{message}'");
        };
        fails(sparse(&[2, 3], &[5.0], &[1], &[6]), "index 6 is outside");
        fails(sparse(&[2, 3], &[5.0], &[1, 2], &[1, -1]), "index -1 is outside");
        fails(sparse(&[2, 3], &[5.0, 7.0], &[2], &[4, 4]), "index 4 comes after 4");
        fails(sparse(&[2, 3], &[5.0, 7.0], &[2], &[4, 1]), "must ascend");
        fails(sparse(&[2, 3], &[5.0], &[1, 3], &[0, 0, 0]), "indices of shape [1, 3]");
        fails(sparse(&[2, -3], &[5.0], &[1], &[0]), "negative");
        fails(sparse(&[1 << 40], &[5.0], &[1], &[0]), "above the limit");
        fails(sparse(&[1; 65], &[5.0], &[1], &[0]), "rank");
    }
}
