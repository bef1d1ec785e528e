//! Pictures out of files.

#[cfg(feature = "image")]
mod jpeg;

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
#[cfg(feature = "image")]
use cutover_tensor::Tensor;
use cutover_tensor::{DType, Value};

/// The bytes of a BMP, JPEG, JPEG 2000, PNG, PNM, TIFF or WebP file, as `[height, width, channels]` of type u8. What cannot be decoded
/// gives `[0, 0, channels]`, as ONNX has it. Needs the feature `image`.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageDecoder {
    pub format: PixelFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PixelFormat {
    Rgb,
    Bgr,
    /// `0.299·red + 0.587·green + 0.114·blue` (ITU-R BT.601).
    Grayscale,
}

/// Pixels that a picture may have: a file of a few bytes may say that it has any number.
#[cfg(feature = "image")]
const PIXELS_MAX: usize = 1 << 28;

impl PixelFormat {
    fn channels(self) -> usize {
        match self {
            PixelFormat::Rgb | PixelFormat::Bgr => 3,
            PixelFormat::Grayscale => 1,
        }
    }

    #[cfg(feature = "image")]
    fn convert(self, picture: &Picture) -> Vec<u8> {
        let luma = |&[r, g, b]: &[u8; 3]| {
            let weighted = 19595 * u32::from(r) + 38470 * u32::from(g) + 7471 * u32::from(b);
            ((weighted + (1 << 15)) >> 16) as u8
        };
        let rgb = || picture.pixels.as_chunks::<3>().0.iter();
        match (self, picture.channels) {
            (PixelFormat::Grayscale, 1) => picture.pixels.clone(),
            (PixelFormat::Grayscale, _) => rgb().map(luma).collect(),
            (_, 1) => picture.pixels.iter().flat_map(|&luma| [luma; 3]).collect(),
            (PixelFormat::Rgb, _) => picture.pixels.clone(),
            (PixelFormat::Bgr, _) => rgb().flat_map(|&[r, g, b]| [b, g, r]).collect(),
        }
    }
}

/// Pixels of one or three bytes.
#[cfg(feature = "image")]
struct Picture {
    height: usize,
    width: usize,
    channels: usize,
    pixels: Vec<u8>,
}

#[cfg(feature = "image")]
impl Picture {
    /// # Errors
    /// `OpError::Input` where the file has no picture.
    fn decode(bytes: &[u8], pixels_max: usize) -> Result<Picture, OpError> {
        match bytes {
            [0xff, 0xd8, 0xff, ..] => {
                let jpeg::Jpeg { width, height, channels, pixels } = jpeg::decode(bytes, pixels_max)?;
                Ok(Picture { width, height, channels, pixels })
            }
            [0x00, 0x00, 0x00, 0x0c, b'j', b'P', ..] | [0xff, 0x4f, 0xff, 0x51, ..] => {
                Picture::jpeg_2000(bytes, pixels_max)
            }
            _ => Picture::other(bytes, pixels_max),
        }
    }

    fn bounded(width: usize, height: usize, pixels_max: usize) -> Result<(), OpError> {
        match width.checked_mul(height).is_some_and(|pixels| pixels <= pixels_max) {
            true => Ok(()),
            false => Err(OpError::Resource(format!("a picture of {width} × {height} pixels, above {pixels_max}"))),
        }
    }

    fn jpeg_2000(bytes: &[u8], pixels_max: usize) -> Result<Picture, OpError> {
        use hayro_jpeg2000::{ColorSpace, DecodeSettings, DecoderContext, Image};
        let corrupt = |error| OpError::input(format!("a JPEG 2000 file: {error}"));
        let image = Image::new(bytes, &DecodeSettings::default()).map_err(corrupt)?;
        let (width, height) = (image.width() as usize, image.height() as usize);
        Picture::bounded(width, height, pixels_max)?;
        let channels = match image.color_space() {
            ColorSpace::Gray | ColorSpace::Icc { num_channels: 1, .. } => 1,
            ColorSpace::RGB | ColorSpace::Icc { num_channels: 3, .. } => 3,
            _ => return Err(OpError::unsupported("a JPEG 2000 file of colours other than grey and RGB")),
        };
        let mut context = DecoderContext::default();
        let decoded = image.decode(&mut context).map_err(corrupt)?;
        let stored = decoded.components().len();
        if stored < channels || decoded.components().iter().any(|component| component.samples().len() != width * height)
        {
            return Err(OpError::input("a JPEG 2000 file: components of several sizes"));
        }
        let pixels = match decoded.data_u8() {
            pixels if stored == channels => pixels,
            pixels => pixels.chunks_exact(stored).flat_map(|pixel| &pixel[..channels]).copied().collect(),
        };
        Ok(Picture { height, width, channels, pixels })
    }

    fn other(bytes: &[u8], pixels_max: usize) -> Result<Picture, OpError> {
        use image::{DynamicImage, ImageDecoder as _, ImageError, ImageReader, Limits};
        let failed = |error: ImageError| match error {
            ImageError::Unsupported(error) => OpError::unsupported(error.to_string()),
            ImageError::Limits(error) => OpError::Resource(error.to_string()),
            error => OpError::input(error.to_string()),
        };
        let reader = ImageReader::new(std::io::Cursor::new(bytes)).with_guessed_format();
        let mut reader = reader.map_err(|error| OpError::input(error.to_string()))?;
        if reader.format().is_none() {
            return Err(OpError::input("a file of no format that is known"));
        }
        let mut limits = Limits::default();
        // Of a decoder's own memory, eight bytes a pixel.
        limits.max_alloc = Some(pixels_max as u64 * 8);
        reader.limits(limits);
        let decoder = reader.into_decoder().map_err(failed)?;
        let (width, height) = decoder.dimensions();
        Picture::bounded(width as usize, height as usize, pixels_max)?;
        let image = DynamicImage::from_decoder(decoder).map_err(failed)?;
        let (width, height) = (image.width() as usize, image.height() as usize);
        let (channels, pixels) = match image {
            DynamicImage::ImageLuma8(image) => (1, image.into_raw()),
            image => (3, image.into_rgb8().into_raw()),
        };
        Ok(Picture { height, width, channels, pixels })
    }
}

impl Operator for ImageDecoder {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let format = match node.string("pixel_format", "RGB")?.as_str() {
            "RGB" => PixelFormat::Rgb,
            "BGR" => PixelFormat::Bgr,
            "Grayscale" => PixelFormat::Grayscale,
            other => {
                let message = format!("attribute 'pixel_format' must be RGB, BGR or Grayscale, got '{other}'");
                return Err(node.corrupt(message));
            }
        };
        if cfg!(not(feature = "image")) {
            return Err(node.unsupported("pictures, without the feature 'image' of this build"));
        }
        Ok(ImageDecoder { format }.into())
    }

    fn export(&self) -> Spelling {
        let format = match self.format {
            PixelFormat::Rgb => "RGB",
            PixelFormat::Bgr => "BGR",
            PixelFormat::Grayscale => "Grayscale",
        };
        Spelling::new("ImageDecoder").with("pixel_format", format)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let file = inputs.tensor(0)?;
        if file.dtype != DType::U8 || file.rank().is_some_and(|rank| rank != 1) {
            return Err(OpError::input(format!("expected the bytes of a file, got {file}")));
        }
        let dims = [context.fresh("height"), context.fresh("width"), Dim::from(self.format.channels())];
        Ok(vec![TensorFact::new(DType::U8, dims).into()])
    }

    #[cfg(feature = "image")]
    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let file = inputs.tensor(0)?;
        if file.dtype() != DType::U8 || file.shape().rank() != 1 {
            return Err(OpError::input(format!("expected the bytes of a file, got {file:?}")));
        }
        let channels = self.format.channels();
        let (shape, pixels) = match Picture::decode(file.bytes(), PIXELS_MAX.min(context.max_elements / channels)) {
            Ok(picture) => ([picture.height, picture.width, channels], self.format.convert(&picture)),
            Err(OpError::Input(message)) => {
                tracing::warn!("no picture: {message}");
                ([0, 0, channels], Vec::new())
            }
            Err(error) => return Err(error),
        };
        Ok(vec![Tensor::from_vec(shape, pixels)?.into()])
    }

    #[cfg(not(feature = "image"))]
    fn eval(&self, _: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        Err(OpError::unsupported("pictures, without the feature 'image' of this build"))
    }
}

#[cfg(all(test, feature = "image"))]
mod tests;

#[cfg(all(test, not(feature = "image")))]
mod tests {
    use crate::ops::cases::{case, tensor};

    #[test]
    fn refuses_without_its_feature() {
        case("ImageDecoder", 20).input(tensor::<u8>(&[1], &[0])).fails("without the feature 'image'");
    }
}
