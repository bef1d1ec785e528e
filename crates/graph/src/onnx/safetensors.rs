//! Safetensors files whose large tensors start on a page, so that they can be mapped one by one.
//!
//! The format allows no holes in its data: gaps are tensors of their own, `__pad.N` of type U8, and the header is padded with
//! spaces. Types that safetensors lacks are written as U8 of their packed bytes.

use cutover_tensor::{DType, Tensor};
use serde_json::{Map, Value, json};
use std::io::{self, Write};

/// Tensors of at least this many bytes start on a page.
pub const LARGE_BYTES: usize = 64 << 10;
const PAGE: usize = 4096;
/// What other tensors are aligned to.
const LINE: usize = 64;

/// Where each tensor of a file lies.
pub struct Layout {
    header: Vec<u8>,
    /// Offset in the file and length of every tensor, in the order given.
    pub places: Vec<(usize, usize)>,
}

/// Plans the file that holds `tensors` in this order.
pub fn layout(tensors: &[(String, &Tensor)]) -> Layout {
    // The data follows the header and starts on a page, whatever the header's length turns out to be.
    let mut entries = Map::new();
    let mut places = Vec::with_capacity(tensors.len());
    let (mut end, mut pads) = (0usize, 0);
    for (name, tensor) in tensors {
        let len = tensor.bytes().len();
        let start = end.next_multiple_of(if len >= LARGE_BYTES { PAGE } else { LINE });
        if start > end {
            let pad = json!({ "dtype": "U8", "shape": [start - end], "data_offsets": [end, start] });
            entries.insert(format!("__pad.{pads}"), pad);
            pads += 1;
        }
        let (dtype, shape) = match safetensors_name(tensor.dtype()) {
            Some(dtype) => (dtype, tensor.shape().to_vec()),
            None => ("U8", vec![len]),
        };
        entries.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, start + len] }));
        places.push((start, len));
        end = start + len;
    }
    let mut header = Value::Object(entries).to_string().into_bytes();
    header.resize((8 + header.len()).next_multiple_of(PAGE) - 8, b' ');
    let data = 8 + header.len();
    places.iter_mut().for_each(|(offset, _)| *offset += data);
    Layout { header, places }
}

/// Writes the file that `layout` planned for the same `tensors`.
pub fn write(layout: &Layout, tensors: &[(String, &Tensor)], to: &mut impl Write) -> io::Result<()> {
    to.write_all(&(layout.header.len() as u64).to_le_bytes())?;
    to.write_all(&layout.header)?;
    let mut at = 8 + layout.header.len();
    for (&(offset, len), (_, tensor)) in layout.places.iter().zip(tensors) {
        to.write_all(&[0; PAGE][..offset - at])?;
        to.write_all(tensor.bytes())?;
        at = offset + len;
    }
    Ok(())
}

fn safetensors_name(dtype: DType) -> Option<&'static str> {
    Some(match dtype {
        DType::F64 => "F64",
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::I64 => "I64",
        DType::I32 => "I32",
        DType::I16 => "I16",
        DType::I8 => "I8",
        DType::U64 => "U64",
        DType::U32 => "U32",
        DType::U16 => "U16",
        DType::U8 => "U8",
        DType::Bool => "BOOL",
        DType::F8E4M3FN => "F8_E4M3",
        DType::F8E5M2 => "F8_E5M2",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_safetensors_crate_reads_it_and_large_tensors_start_on_pages() {
        let large = Tensor::from_vec([20_000], (0..20_000).map(|v| v as f32).collect()).unwrap();
        let small = Tensor::from_vec([3], vec![1i64, -2, 3]).unwrap();
        let narrow = Tensor::from_bytes(DType::I4, [3], &[0x21, 0x03]).unwrap();
        let empty = Tensor::zeros(DType::F16, [0, 2]).unwrap();
        let tensors: Vec<(String, &Tensor)> =
            [("a", &small), ("b", &large), ("c", &narrow), ("d", &large), ("e", &empty)]
                .map(|(n, t)| (n.to_string(), t))
                .to_vec();
        let layout = layout(&tensors);
        let mut file = Vec::new();
        write(&layout, &tensors, &mut file).unwrap();
        let read = safetensors::SafeTensors::deserialize(&file).unwrap();
        for ((name, tensor), &(offset, len)) in tensors.iter().zip(&layout.places) {
            assert_eq!(read.tensor(name).unwrap().data(), tensor.bytes(), "{name}");
            assert_eq!(&file[offset..offset + len], tensor.bytes(), "{name}");
            assert!(offset.is_multiple_of(if len >= LARGE_BYTES { PAGE } else { LINE }), "{name}");
        }
        assert_eq!(read.tensor("c").unwrap().dtype(), safetensors::Dtype::U8);
    }
}
