//! Pictures: decoding, resizing, cropping, normalising.

use crate::{Color, Filter, InputError, Layout, Picture, Resize};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use image::{DynamicImage, ImageReader, Limits, imageops::FilterType};
use std::{borrow::Cow, io::Cursor};

/// What decoding one picture may hold, in bytes.
const DECODED_BYTES: u64 = 512 << 20;

/// The pictures' shape as one tensor, and its values.
pub(crate) fn read(picture: &Picture, samples: &[&[u8]]) -> Result<(Vec<usize>, Vec<f32>), InputError> {
    let channels = picture.color.channels();
    let mut values = Vec::new();
    let mut first: Option<[usize; 2]> = None;
    for (number, bytes) in samples.iter().enumerate() {
        let failed = |message: String| InputError::Sample { name: picture.input.clone(), number: number + 1, message };
        let (size, pixels) = pixels(picture, bytes).map_err(failed)?;
        match first {
            Some(known) if known != size => {
                let message = format!(
                    "{} × {} pixels, the first has {} × {}: describe a size to resize or crop to",
                    size[0], size[1], known[0], known[1]
                );
                return Err(failed(message));
            }
            _ => first = Some(size),
        }
        normalise(picture, size, &pixels, &mut values);
    }
    let [height, width] = first.unwrap_or_default();
    let shape = match picture.layout {
        Layout::Nchw => vec![samples.len(), channels, height, width],
        Layout::Nhwc => vec![samples.len(), height, width, channels],
    };
    Ok((shape, values))
}

/// Height and width, and bytes `[height, width, channels]`.
fn pixels(picture: &Picture, bytes: &[u8]) -> Result<([usize; 2], Vec<u8>), String> {
    let image = decode(bytes)?;
    // Resizing grey is a third of the work.
    let image = match picture.color {
        Color::Grey => DynamicImage::ImageLuma8(image.into_luma8()),
        Color::Rgb | Color::Bgr => DynamicImage::ImageRgb8(image.into_rgb8()),
    };
    let image = match picture.resize.map(|resize| size_after(resize, image.height(), image.width())) {
        Some([height, width]) if [height, width] != [image.height(), image.width()] => {
            let filter = match picture.filter {
                Filter::Nearest => FilterType::Nearest,
                Filter::Bilinear => FilterType::Triangle,
                Filter::Bicubic => FilterType::CatmullRom,
                Filter::Lanczos => FilterType::Lanczos3,
            };
            image.resize_exact(width, height, filter)
        }
        _ => image,
    };
    let size = [image.height() as usize, image.width() as usize];
    let (channels, bytes) = (picture.color.channels(), image.into_bytes());
    match picture.crop {
        None => Ok((size, bytes)),
        Some(crop) => {
            let crop = crop.map(|side| side as usize);
            Ok((crop, middle(&bytes, size, crop, channels)))
        }
    }
}

/// A picture as it lies in a file, or that in base64, as JSON carries it.
fn decode(bytes: &[u8]) -> Result<DynamicImage, String> {
    let known = image::guess_format(bytes).is_ok();
    let bytes = match known {
        true => Cow::Borrowed(bytes),
        false => Cow::Owned(BASE64_STANDARD.decode(bytes.trim_ascii()).map_err(|_| {
            "neither a picture of a known format (PNG, JPEG, WebP, BMP, TIFF, PNM) nor one in base64".to_string()
        })?),
    };
    let mut reader = ImageReader::new(Cursor::new(&*bytes)).with_guessed_format().map_err(|e| e.to_string())?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(DECODED_BYTES);
    reader.limits(limits);
    reader.decode().map_err(|error| error.to_string())
}

/// Height and width.
fn size_after(resize: Resize, height: u32, width: u32) -> [u32; 2] {
    match resize {
        Resize::Exact(size) => size,
        Resize::Shorter(side) => {
            let (short, long) = (height.min(width).max(1), height.max(width));
            // As torchvision: cut off, not rounded.
            let other = u32::try_from(u64::from(side) * u64::from(long) / u64::from(short)).unwrap_or(u32::MAX);
            let other = other.clamp(1, side.saturating_mul(64));
            if height <= width { [side, other] } else { [other, side] }
        }
    }
}

/// The middle of a picture; what lies outside of it is 0.
fn middle(bytes: &[u8], size: [usize; 2], crop: [usize; 2], channels: usize) -> Vec<u8> {
    let mut cropped = vec![0; crop[0] * crop[1] * channels];
    // Where the crop begins in the picture, and the picture in the crop; halves are rounded to even, as in torchvision.
    let half = |rest: usize| (rest / 2) + usize::from(rest % 4 == 3);
    let begin = [0, 1].map(|axis| half(size[axis].saturating_sub(crop[axis])));
    let into = [0, 1].map(|axis| crop[axis].saturating_sub(size[axis]) / 2);
    let columns = size[1].min(crop[1]) * channels;
    for row in 0..size[0].min(crop[0]) {
        let from = ((begin[0] + row) * size[1] + begin[1]) * channels;
        let to = ((into[0] + row) * crop[1] + into[1]) * channels;
        cropped[to..to + columns].copy_from_slice(&bytes[from..from + columns]);
    }
    cropped
}

fn normalise(picture: &Picture, [height, width]: [usize; 2], pixels: &[u8], values: &mut Vec<f32>) {
    let channels = picture.color.channels();
    let of = |list: &[f32], channel: usize, default: f32| match list {
        [] => default,
        [one] => *one,
        several => several[channel],
    };
    // A table for each channel, in the order in which they come out.
    let tables: Vec<[f32; 256]> = (0..channels)
        .map(|channel| {
            let (mean, deviation) = (of(&picture.mean, channel, 0.0), of(&picture.deviation, channel, 1.0));
            std::array::from_fn(|byte| (byte as f32 * picture.scale - mean) / deviation)
        })
        .collect();
    let from = |channel: usize| if picture.color == Color::Bgr { channels - 1 - channel } else { channel };
    values.reserve(height * width * channels);
    match picture.layout {
        Layout::Nchw => {
            for (channel, table) in tables.iter().enumerate() {
                let plane = pixels.iter().skip(from(channel)).step_by(channels);
                values.extend(plane.map(|&byte| table[usize::from(byte)]));
            }
        }
        Layout::Nhwc => {
            for pixel in pixels.chunks_exact(channels) {
                values.extend(tables.iter().enumerate().map(|(channel, t)| t[usize::from(pixel[from(channel)])]));
            }
        }
    }
}
