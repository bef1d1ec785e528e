//! Files of named tensors: `.npz`, `.npy`, `.safetensors` and `.json`, read and written.
//!
//! JSON is `{"NAME": {"dtype": "f32", "shape": [2], "data": [1, 2]}}`, or nested arrays of numbers alone (f32).

use crate::pickle;
use anyhow::{Context, Result, anyhow, bail};
use cutover::{
    DType, Shape, Tensor, Value,
    tensor::{MapKeys, f16},
};
use serde_json::{Map, Value as Json, json};
use std::{
    fs::{self, File},
    io::{BufWriter, Read, Seek, Write},
    path::Path,
};
use zip::{CompressionMethod, ZipArchive, ZipWriter, write::SimpleFileOptions};

/// Tensors by name, in the order of the file.
pub type Named = Vec<(String, Tensor)>;

/// Largest file, and largest entry of an archive.
const BYTES_MAX: u64 = 16 << 30;

/// Reads the file at `path`, whose ending says what it is. An `.npy` holds one tensor, called `only`.
pub fn read(path: &Path, only: Option<&str>) -> Result<Named> {
    let at = || format!("cannot read {}", path.display());
    let size = fs::metadata(path).with_context(at)?.len();
    if size > BYTES_MAX {
        bail!("{}: {size} bytes, above the limit of {BYTES_MAX}", path.display());
    }
    match extension(path)? {
        "npz" => npz(File::open(path).with_context(at)?),
        "npy" => {
            let only = only
                .context("an .npy holds one tensor, and the model has several: use .npz, whose keys are their names")?;
            let tensor = fs::read(path).map_err(Into::into).and_then(|bytes| npy(&bytes));
            tensor.map(|tensor| vec![(only.to_string(), tensor)])
        }
        "safetensors" => fs::read(path).map_err(Into::into).and_then(|bytes| safetensors(&bytes)),
        _ => fs::read(path).map_err(Into::into).and_then(|bytes| json_tensors(&bytes)),
    }
    .with_context(at)
}

/// Writes `tensors` to `path`, whose ending says how.
pub fn write(path: &Path, tensors: &Named) -> Result<()> {
    let at = || format!("cannot write {}", path.display());
    match extension(path)? {
        "npz" => write_npz(File::create(path).with_context(at)?, tensors),
        "npy" => match &tensors[..] {
            [(_, tensor)] => npy_bytes(tensor).and_then(|bytes| Ok(fs::write(path, bytes)?)),
            _ => bail!("an .npy holds one tensor, the model gives {}: use .npz", tensors.len()),
        },
        "safetensors" => {
            let views: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
            let layout = cutover::graph::onnx::safetensors::layout(&views);
            let mut file = BufWriter::new(File::create(path).with_context(at)?);
            let written = cutover::graph::onnx::safetensors::write(&layout, &views, &mut file);
            written.and_then(|()| file.flush()).map_err(Into::into)
        }
        _ => {
            let object: Map<String, Json> =
                tensors.iter().map(|(n, t)| Ok((n.clone(), to_json(t)?))).collect::<Result<_>>().with_context(at)?;
            fs::write(path, serde_json::to_vec(&object)?).map_err(Into::into)
        }
    }
    .with_context(at)
}

fn extension(path: &Path) -> Result<&str> {
    match path.extension().and_then(|e| e.to_str()) {
        Some(known @ ("npz" | "npy" | "safetensors" | "json")) => Ok(known),
        _ => bail!("{}: expected a file ending in .npz, .npy, .safetensors or .json", path.display()),
    }
}

fn npz(file: impl Read + Seek) -> Result<Named> {
    let mut archive = ZipArchive::new(file).context("not an .npz")?;
    let mut tensors = Vec::with_capacity(archive.len());
    for index in 0..archive.len() {
        let entry = archive.by_index(index)?;
        let file_name = entry.name()?.to_string();
        let name = file_name.strip_suffix(".npy").unwrap_or(&file_name).to_string();
        let mut bytes = Vec::new();
        entry.take(BYTES_MAX).read_to_end(&mut bytes).with_context(|| format!("'{name}'"))?;
        tensors.push((name.clone(), npy(&bytes).with_context(|| format!("'{name}'"))?));
    }
    Ok(tensors)
}

fn write_npz(file: impl Write + Seek, tensors: &Named) -> Result<()> {
    let mut archive = ZipWriter::new(BufWriter::new(file));
    for (name, tensor) in tensors {
        let bytes = npy_bytes(tensor).with_context(|| format!("'{name}'"))?;
        let large = bytes.len() as u64 >= u64::from(u32::MAX) - 1024;
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(large);
        archive.start_file(format!("{name}.npy"), options)?;
        archive.write_all(&bytes)?;
    }
    archive.finish()?.flush()?;
    Ok(())
}

const NPY_TYPES: &[(&str, DType)] = &[
    ("f4", DType::F32),
    ("f8", DType::F64),
    ("f2", DType::F16),
    ("i1", DType::I8),
    ("i2", DType::I16),
    ("i4", DType::I32),
    ("i8", DType::I64),
    ("u1", DType::U8),
    ("u2", DType::U16),
    ("u4", DType::U32),
    ("u8", DType::U64),
    ("b1", DType::Bool),
];

/// NumPy's format, versions 1 to 3 (NEP 1): a magic, a header that is a Python literal, the elements.
fn npy(bytes: &[u8]) -> Result<Tensor> {
    let corrupt = || anyhow!("not a valid .npy");
    let header_at = match bytes.get(..8) {
        Some([0x93, b'N', b'U', b'M', b'P', b'Y', 1, _]) => 10,
        Some([0x93, b'N', b'U', b'M', b'P', b'Y', 2 | 3, _]) => 12,
        _ => return Err(corrupt()),
    };
    let length =
        bytes.get(8..header_at).ok_or_else(corrupt)?.iter().rev().fold(0usize, |n, &b| n << 8 | usize::from(b));
    let header = bytes.get(header_at..header_at + length).ok_or_else(corrupt)?;
    let header = std::str::from_utf8(header).map_err(|_| corrupt())?;
    let field = |name: &str| -> Result<&str> {
        let (_, rest) = header.split_once(&format!("'{name}':")).ok_or_else(corrupt)?;
        Ok(rest.trim_start())
    };
    let descr = field("descr")?.strip_prefix('\'').and_then(|d| d.split('\'').next());
    let descr = descr.context("a structured .npy, expected one of numbers")?;
    let (order, kind) = descr.split_at_checked(1).ok_or_else(corrupt)?;
    let known = NPY_TYPES.iter().find(|(name, _)| *name == kind).map(|&(_, dtype)| dtype);
    let strings = NpyStrings::of(kind)?;
    let Some(dtype) = known.or(strings.as_ref().map(|_| DType::String)) else {
        bail!("elements of NumPy type '{descr}', which no tensor here has");
    };
    if order == ">" && (dtype == DType::String || dtype.bits() > 8) {
        bail!("big-endian elements; save them with .astype('<{kind}')");
    }
    if field("fortran_order")?.starts_with("True") {
        bail!("elements in Fortran order; save them with numpy.ascontiguousarray");
    }
    let shape = field("shape")?.strip_prefix('(').and_then(|s| s.split(')').next()).ok_or_else(corrupt)?;
    let dims = shape.split(',').map(str::trim).filter(|s| !s.is_empty());
    let dims =
        dims.map(|d| d.trim_end_matches('L').parse::<usize>()).collect::<Result<Vec<_>, _>>().map_err(|_| corrupt())?;
    let data = &bytes[header_at + length..];
    match strings {
        Some(NpyStrings::CodePoints(count)) => Ok(Tensor::from_strings(dims, texts(data, count)?)?),
        Some(NpyStrings::Objects) => {
            let count = Shape::new(&dims).checked_len().ok_or_else(corrupt)?;
            Ok(Tensor::from_strings(dims, pickle::texts(data, count)?)?)
        }
        None => Ok(Tensor::from_bytes(dtype, dims, data)?),
    }
}

/// How NumPy has strings.
enum NpyStrings {
    /// So many code points each, in four bytes, those after the last of a shorter one 0.
    CodePoints(usize),
    /// Python's own, pickled.
    Objects,
}

impl NpyStrings {
    fn of(kind: &str) -> Result<Option<NpyStrings>> {
        match kind.strip_prefix('U') {
            _ if kind == "O" => Ok(Some(NpyStrings::Objects)),
            Some(count) => Ok(Some(NpyStrings::CodePoints(count.parse().map_err(|_| anyhow!("not a valid .npy"))?))),
            None => Ok(None),
        }
    }
}

fn texts(data: &[u8], count: usize) -> Result<Vec<String>> {
    let width = count.checked_mul(4).filter(|&width| width > 0).context("strings of no length")?;
    let text = |element: &[u8]| {
        let (points, _) = element.as_chunks::<4>();
        let points: Vec<u32> = points.iter().map(|&point| u32::from_le_bytes(point)).collect();
        let end = points.iter().rposition(|&point| point != 0).map_or(0, |last| last + 1);
        points[..end].iter().map(|&point| char::from_u32(point).context("a string that is not Unicode")).collect()
    };
    if !data.len().is_multiple_of(width) {
        bail!("not a valid .npy");
    }
    data.chunks_exact(width).map(text).collect()
}

fn npy_strings(tensor: &Tensor) -> Result<Vec<u8>> {
    let texts = tensor.strings()?;
    let count = texts.iter().map(|text| text.chars().count()).max().unwrap_or(0).max(1);
    let mut bytes = npy_header(&format!("<U{count}"), tensor)?;
    for text in texts {
        let points = text.chars().map(u32::from).chain(std::iter::repeat(0)).take(count);
        points.for_each(|point| bytes.extend(point.to_le_bytes()));
    }
    Ok(bytes)
}

fn npy_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    if tensor.dtype() == DType::String {
        return npy_strings(tensor);
    }
    let Some((kind, _)) = NPY_TYPES.iter().find(|(_, d)| *d == tensor.dtype()) else {
        bail!("NumPy has no type for {}", tensor.dtype());
    };
    let order = if tensor.dtype().bits() > 8 { '<' } else { '|' };
    let mut bytes = npy_header(&format!("{order}{kind}"), tensor)?;
    bytes.extend(tensor.bytes());
    Ok(bytes)
}

/// What comes before the elements of `tensor`.
fn npy_header(descr: &str, tensor: &Tensor) -> Result<Vec<u8>> {
    let dims: String = tensor.shape().iter().map(|d| format!("{d}, ")).collect();
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}", dims.trim_end());
    let padded = (10 + header.len() + 1).next_multiple_of(64) - 10;
    header.extend(std::iter::repeat_n(' ', padded - header.len() - 1));
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend(u16::try_from(header.len()).context("too many axes")?.to_le_bytes());
    bytes.extend(header.as_bytes());
    Ok(bytes)
}

fn safetensors(bytes: &[u8]) -> Result<Named> {
    let file = ::safetensors::SafeTensors::deserialize(bytes).context("not a valid .safetensors")?;
    let mut names: Vec<String> = file.names().into_iter().map(|n| n.to_string()).collect();
    names.retain(|n| !n.starts_with("__pad."));
    names.sort();
    let one = |name: String| {
        let view = file.tensor(&name)?;
        let spelled = view.dtype().to_string().to_lowercase();
        let dtype = DType::from_name(&spelled).with_context(|| format!("'{name}' has type {spelled}"))?;
        Ok((name, Tensor::from_bytes(dtype, view.shape(), view.data())?))
    };
    names.into_iter().map(one).collect()
}

fn json_tensors(bytes: &[u8]) -> Result<Named> {
    let value: Json = serde_json::from_slice(bytes)?;
    let object = value.as_object().context("expected an object of tensors by name")?;
    object
        .iter()
        .map(|(name, value)| Ok((name.clone(), from_json(value).with_context(|| format!("'{name}'"))?)))
        .collect()
}

fn from_json(value: &Json) -> Result<Tensor> {
    let (dtype, shape, data) = match value {
        Json::Object(object) => {
            let spelled = object.get("dtype").and_then(Json::as_str).unwrap_or("f32");
            let dtype = DType::from_name(spelled).with_context(|| format!("dtype '{spelled}' is not known"))?;
            let shape = match object.get("shape") {
                Some(shape) => Some(serde_json::from_value::<Vec<usize>>(shape.clone()).context("'shape'")?),
                None => None,
            };
            (dtype, shape, object.get("data").context("'data' is missing")?)
        }
        nested => (DType::F32, None, nested),
    };
    let mut leaves = Vec::new();
    let nested = nesting(data, &mut leaves)?;
    let shape = Shape::new(&shape.unwrap_or(nested));
    if shape.checked_len() != Some(leaves.len()) {
        bail!("{} elements, which shape {shape} does not hold", leaves.len());
    }
    if dtype == DType::String {
        let text = |v: &&Json| v.as_str().map(str::to_string).context("expected strings");
        return Ok(Tensor::from_strings(shape, leaves.iter().map(text).collect::<Result<_>>()?)?);
    }
    let mut bytes = Vec::with_capacity(leaves.len() * dtype.bits().div_ceil(8));
    for (at, leaf) in leaves.iter().enumerate() {
        let wrong = || format!("element {at} is {leaf}, which is no {dtype}");
        macro_rules! push {
            ($value:expr) => {
                bytes.extend($value.with_context(wrong)?.to_le_bytes())
            };
        }
        let int = leaf.as_i64().map(i128::from).or_else(|| leaf.as_u64().map(i128::from));
        match dtype {
            DType::F32 => push!(leaf.as_f64().map(|v| v as f32)),
            DType::F64 => push!(leaf.as_f64()),
            DType::F16 => push!(leaf.as_f64().map(f16::from_f64)),
            DType::I8 => push!(int.and_then(|v| i8::try_from(v).ok())),
            DType::I16 => push!(int.and_then(|v| i16::try_from(v).ok())),
            DType::I32 => push!(int.and_then(|v| i32::try_from(v).ok())),
            DType::I64 => push!(int.and_then(|v| i64::try_from(v).ok())),
            DType::U8 => push!(int.and_then(|v| u8::try_from(v).ok())),
            DType::U16 => push!(int.and_then(|v| u16::try_from(v).ok())),
            DType::U32 => push!(int.and_then(|v| u32::try_from(v).ok())),
            DType::U64 => push!(int.and_then(|v| u64::try_from(v).ok())),
            DType::Bool => push!(leaf.as_bool().map(u8::from)),
            other => bail!("JSON can't hold {other}"),
        }
    }
    Ok(Tensor::from_bytes(dtype, shape, &bytes)?)
}

/// The shape of nested arrays, and their leaves in order.
fn nesting<'a>(value: &'a Json, leaves: &mut Vec<&'a Json>) -> Result<Vec<usize>> {
    let Json::Array(items) = value else {
        leaves.push(value);
        return Ok(Vec::new());
    };
    let mut inner: Option<Vec<usize>> = None;
    for item in items {
        let shape = nesting(item, leaves)?;
        match &inner {
            Some(first) if *first != shape => bail!("nested arrays of different lengths"),
            _ => inner = Some(shape),
        }
    }
    Ok([vec![items.len()], inner.unwrap_or_default()].concat())
}

/// As [`read`] takes it: NaN and infinities, which JSON has no numbers for, become null.
pub fn to_json(tensor: &Tensor) -> Result<Json> {
    macro_rules! numbers {
        ($t:ty) => {
            tensor.to_vec::<$t>()?.into_iter().map(Json::from).collect::<Vec<_>>()
        };
    }
    let data = match tensor.dtype() {
        DType::F32 => numbers!(f32),
        DType::F64 => numbers!(f64),
        DType::F16 => tensor.to_vec::<f16>()?.into_iter().map(|v| Json::from(v.to_f32())).collect(),
        DType::I8 => numbers!(i8),
        DType::I16 => numbers!(i16),
        DType::I32 => numbers!(i32),
        DType::I64 => numbers!(i64),
        DType::U8 => numbers!(u8),
        DType::U16 => numbers!(u16),
        DType::U32 => numbers!(u32),
        DType::U64 => numbers!(u64),
        DType::Bool => tensor.to_bools()?.into_iter().map(Json::from).collect(),
        DType::String => tensor.strings()?.iter().map(|s| Json::from(s.as_str())).collect(),
        other => bail!("JSON can't hold {other}"),
    };
    Ok(json!({ "dtype": tensor.dtype().name(), "shape": tensor.shape().to_vec(), "data": data }))
}

/// A tensor as [`to_json`] has it; a map as an object, a sequence as an array, an optional as what it holds or null.
pub fn value_to_json(value: &Value) -> Result<Json> {
    Ok(match value {
        Value::Tensor(tensor) => to_json(tensor)?,
        Value::Sequence(values) => Json::Array(values.iter().map(value_to_json).collect::<Result<_>>()?),
        Value::Optional(None) => Json::Null,
        Value::Optional(Some(value)) => value_to_json(value)?,
        Value::Map { keys, values } => {
            let keys: Vec<String> = match keys {
                MapKeys::Ints(keys) => keys.iter().map(ToString::to_string).collect(),
                MapKeys::Strings(keys) => keys.clone(),
            };
            let values = to_json(values)?["data"].as_array().cloned().unwrap_or_default();
            Json::Object(keys.into_iter().zip(values).collect())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    #[test]
    fn every_format_gives_back_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let tensors: Named = vec![
            ("a".to_string(), Tensor::from_vec([2, 1], vec![1.5f32, -2.0]).unwrap()),
            ("b".to_string(), Tensor::from_vec([0, 3], Vec::<i64>::new()).unwrap()),
            ("c".to_string(), Tensor::from_bools(Shape::scalar(), &[true]).unwrap()),
            ("d".to_string(), Tensor::from_vec([3], vec![u64::MAX, 0, 1]).unwrap()),
            ("e".to_string(), Tensor::from_vec([1], vec![f16::from_f32(0.5)]).unwrap()),
        ];
        for ending in ["npz", "safetensors", "json"] {
            let path = folder.path().join(format!("t.{ending}"));
            write(&path, &tensors).unwrap();
            assert_eq!(read(&path, None).unwrap(), tensors, "{ending}");
        }
        let texts = ["", "ab", "é"].map(str::to_string).to_vec();
        let texts: Named = vec![("t".to_string(), Tensor::from_strings([3, 1], texts).unwrap())];
        for ending in ["npz", "json"] {
            let path = folder.path().join(format!("s.{ending}"));
            write(&path, &texts).unwrap();
            assert_eq!(read(&path, None).unwrap(), texts, "{ending}");
        }
        let path = folder.path().join("t.npy");
        write(&path, &tensors[..1].to_vec()).unwrap();
        assert_eq!(read(&path, Some("a")).unwrap(), tensors[..1]);
        assert!(read(&path, None).is_err());
        assert!(write(&path, &tensors).is_err());
    }

    #[test]
    fn what_is_cut_short_or_lies_is_refused() {
        let bytes = npy_bytes(&Tensor::from_vec([2], vec![1f32, 2.0]).unwrap()).unwrap();
        for end in 0..bytes.len() {
            assert!(npy(&bytes[..end]).is_err(), "{end} bytes");
        }
        let huge = String::from_utf8_lossy(&bytes).replace("(2,)", "(99999999999999999999,)");
        assert!(npy(huge.as_bytes()).is_err());
        for text in ["1", "{\"x\": {\"data\": [1], \"shape\": [2]}}", "{\"x\": [[1], [1, 2]]}", "{\"x\": [\"a\"]}"] {
            assert!(json_tensors(text.as_bytes()).is_err(), "{text}");
        }
        assert!(npz(Cursor::new(b"PK")).is_err());
    }
}
