//! Pictures and texts become a model's inputs, as a description says that travels with the model.
//!
//! A [`Preprocessing`] is plain data: it stands in a package's manifest and is checked against the model's inputs when a [`Preprocessor`] is
//! made of it. What comes in is a list of samples as bytes, an encoded picture or a UTF-8 text each; what comes out are the tensors the
//! model asks for, the samples along their first axis.

mod error;
#[cfg(feature = "image")]
mod picture;
#[cfg(feature = "text")]
mod text;

pub use error::InputError;

use cutover_tensor::{DType, Tensor, Value};
#[cfg(feature = "image")]
use cutover_tensor::{bf16, f16};
use serde::{Deserialize, Serialize};

/// How raw samples become the inputs of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preprocessing {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pictures: Vec<Picture>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub texts: Vec<Text>,
}

/// A picture as a tensor: decoded, resized, cropped, scaled and normalised, `(scale · byte − mean) / deviation`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Picture {
    /// The model's input, and what the picture is called in a request.
    pub input: String,
    pub resize: Option<Resize>,
    pub filter: Filter,
    /// Height and width of the middle that is kept; zeros where the picture is smaller.
    pub crop: Option<[u32; 2]>,
    pub color: Color,
    /// Bytes of 0 to 255 are multiplied by this first; 1/255 where absent.
    pub scale: f32,
    /// Per channel, in the order of `color`; one value for all.
    pub mean: Vec<f32>,
    /// Standard deviations, as `mean`.
    pub deviation: Vec<f32>,
    pub layout: Layout,
}

impl Default for Picture {
    fn default() -> Self {
        Picture {
            input: String::new(),
            resize: None,
            filter: Filter::default(),
            crop: None,
            color: Color::default(),
            scale: 1.0 / 255.0,
            mean: Vec::new(),
            deviation: Vec::new(),
            layout: Layout::default(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resize {
    /// The shorter side gets this length, the other follows.
    Shorter(u32),
    /// Height and width, whatever the picture's were.
    Exact([u32; 2]),
}

/// How pixels in between are found. Shrinking averages over all pixels that one covers (antialiasing), except with `nearest`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filter {
    Nearest,
    #[default]
    Bilinear,
    Bicubic,
    Lanczos,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Color {
    #[default]
    Rgb,
    Bgr,
    /// One channel, by the luma of ITU-R BT.709.
    Grey,
}

impl Color {
    fn channels(self) -> usize {
        if self == Color::Grey { 1 } else { 3 }
    }
}

/// The order of axes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// `[samples, channels, height, width]`.
    #[default]
    Nchw,
    /// `[samples, height, width, channels]`.
    Nhwc,
}

/// A text as token ids `[samples, tokens]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Text {
    /// What the text is called in a request.
    pub name: String,
    /// The model's input of token ids.
    pub ids: String,
    /// The model's input that is 1 at tokens and 0 at padding, where it has one.
    pub mask: Option<String>,
    /// The model's input of segment ids, where it has one.
    pub types: Option<String>,
    /// Tokens at most; the rest of a text is cut off.
    pub length: usize,
    /// Every text is padded to `length`, not to the longest of its batch.
    pub pad_to_length: bool,
}

impl Default for Text {
    fn default() -> Self {
        Text {
            name: "text".to_string(),
            ids: "input_ids".to_string(),
            mask: None,
            types: None,
            length: 512,
            pad_to_length: false,
        }
    }
}

impl Text {
    fn made(&self) -> impl Iterator<Item = &str> {
        [Some(&self.ids), self.mask.as_ref(), self.types.as_ref()].into_iter().flatten().map(String::as_str)
    }
}

/// Largest side that a description may ask for, in pixels.
const SIDE_MAX: u32 = 1 << 14;
/// Most tokens that a description may ask for.
const LENGTH_MAX: usize = 1 << 20;

impl Preprocessing {
    pub fn is_empty(&self) -> bool {
        self.pictures.is_empty() && self.texts.is_empty()
    }

    /// What the raw inputs are called.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let pictures = self.pictures.iter().map(|picture| picture.input.as_str());
        pictures.chain(self.texts.iter().map(|text| text.name.as_str()))
    }

    /// The model's inputs that are made here.
    pub fn made(&self) -> impl Iterator<Item = &str> {
        let pictures = self.pictures.iter().map(|picture| picture.input.as_str());
        pictures.chain(self.texts.iter().flat_map(Text::made))
    }

    /// Compares the description with itself and with a model whose input of a name has the type that `dtype` gives.
    ///
    /// # Errors
    /// A value out of its range; an input that the model does not have, has with another type, or that is made twice.
    pub fn check(&self, dtype: impl Fn(&str) -> Option<DType>) -> Result<(), InputError> {
        let wrong = |input: &str, message: String| Err(InputError::Description { input: input.to_string(), message });
        let mut seen = Vec::new();
        for name in self.made() {
            if seen.contains(&name) {
                return wrong(name, "it is made twice".to_string());
            }
            seen.push(name);
        }
        for picture in &self.pictures {
            let (name, channels) = (picture.input.as_str(), picture.color.channels());
            let allowed = [DType::F32, DType::F16, DType::BF16, DType::F64, DType::U8, DType::I8, DType::I32];
            match dtype(name) {
                Some(dtype) if allowed.contains(&dtype) => {}
                Some(dtype) => return wrong(name, format!("a picture can't be {dtype}, which the model's input is")),
                None => return wrong(name, "the model has no such input".to_string()),
            }
            for (what, values) in [("mean", &picture.mean), ("deviation", &picture.deviation)] {
                if ![0, 1, channels].contains(&values.len()) || values.iter().any(|v| !v.is_finite()) {
                    return wrong(name, format!("{what} {values:?}: expected one finite value, or {channels}"));
                }
            }
            if picture.deviation.contains(&0.0) || !picture.scale.is_finite() {
                return wrong(name, "deviations are above 0, and the scale is finite".to_string());
            }
            let sides = match picture.resize {
                Some(Resize::Shorter(side)) => vec![side],
                Some(Resize::Exact(sides)) => sides.to_vec(),
                None => Vec::new(),
            };
            if sides.iter().chain(picture.crop.iter().flatten()).any(|side| !(1..=SIDE_MAX).contains(side)) {
                return wrong(name, format!("sides are 1 to {SIDE_MAX} pixels"));
            }
        }
        for text in &self.texts {
            for name in text.made() {
                match dtype(name) {
                    Some(DType::I64 | DType::I32) => {}
                    Some(dtype) => {
                        return wrong(name, format!("token ids are i64 or i32, the model's input is {dtype}"));
                    }
                    None => return wrong(name, "the model has no such input".to_string()),
                }
            }
            if !(1..=LENGTH_MAX).contains(&text.length) {
                return wrong(&text.ids, format!("length {}: expected 1 to {LENGTH_MAX}", text.length));
            }
        }
        Ok(())
    }
}

/// Samples of one raw input: encoded pictures, or texts in UTF-8.
#[derive(Clone, Debug, PartialEq)]
pub struct Raw<'a> {
    pub name: &'a str,
    pub samples: Vec<&'a [u8]>,
}

/// A [`Preprocessing`] that can be applied: checked, with its tokenizer read.
#[derive(Debug)]
pub struct Preprocessor {
    described: Preprocessing,
    /// Of every input that is made.
    #[cfg(any(feature = "image", feature = "text"))]
    dtypes: Vec<(String, DType)>,
    #[cfg(feature = "text")]
    tokenizers: Vec<text::Tokenizer>,
}

impl Preprocessor {
    /// # Errors
    /// Those of [`Preprocessing::check`]; a tokenizer that is missing or can't be read.
    pub fn new(
        described: Preprocessing,
        tokenizer: Option<&[u8]>,
        dtype: impl Fn(&str) -> Option<DType>,
    ) -> Result<Preprocessor, InputError> {
        described.check(&dtype)?;
        if !described.texts.is_empty() && tokenizer.is_none() {
            return Err(InputError::NoTokenizer);
        }
        Ok(Preprocessor {
            #[cfg(any(feature = "image", feature = "text"))]
            dtypes: described.made().filter_map(|name| Some((name.to_string(), dtype(name)?))).collect(),
            #[cfg(feature = "text")]
            tokenizers: described
                .texts
                .iter()
                .map(|text| text::Tokenizer::new(text, tokenizer.unwrap_or_default()))
                .collect::<Result<_, _>>()?,
            described,
        })
    }

    pub fn described(&self) -> &Preprocessing {
        &self.described
    }

    /// The model's inputs made of `raw`, the samples along the first axis.
    ///
    /// # Errors
    /// No samples; a sample that can't be decoded, by its number; pictures that come out in different sizes; what this build was made without.
    pub fn apply(&self, raw: &Raw<'_>) -> Result<Vec<(String, Tensor)>, InputError> {
        if raw.samples.is_empty() {
            return Err(InputError::Empty(raw.name.to_string()));
        }
        #[cfg(not(feature = "image"))]
        if self.described.pictures.iter().any(|picture| picture.input == raw.name) {
            return Err(InputError::Feature { what: "pictures", feature: "image" });
        }
        #[cfg(not(feature = "text"))]
        if self.described.texts.iter().any(|text| text.name == raw.name) {
            return Err(InputError::Feature { what: "texts", feature: "text" });
        }
        #[cfg(feature = "image")]
        if let Some(picture) = self.described.pictures.iter().find(|picture| picture.input == raw.name) {
            let (shape, values) = picture::read(picture, &raw.samples)?;
            return Ok(vec![(picture.input.clone(), self.cast(&picture.input, shape, &values)?)]);
        }
        #[cfg(feature = "text")]
        if let Some(at) = self.described.texts.iter().position(|text| text.name == raw.name) {
            let text = &self.described.texts[at];
            let tokens = self.tokenizers[at].encode(&raw.samples)?;
            let shape = vec![raw.samples.len(), tokens.width];
            let named =
                [(Some(&text.ids), tokens.ids), (text.mask.as_ref(), tokens.mask), (text.types.as_ref(), tokens.types)];
            let wanted = named.into_iter().filter_map(|(name, values)| Some((name?, values)));
            return wanted.map(|(name, values)| Ok((name.clone(), self.ids(name, shape.clone(), values)?))).collect();
        }
        let names = self.described.names().collect::<Vec<_>>().join(", ");
        Err(InputError::Unknown { name: raw.name.to_string(), names })
    }

    /// Makes the model's inputs of those in `given` that are raw: lists of strings under a name of [`Preprocessing::names`]. Others go through.
    ///
    /// # Errors
    /// Those of [`Preprocessor::apply`].
    pub fn prepare(&self, given: &[(String, Value)]) -> Result<Vec<(String, Value)>, InputError> {
        let mut prepared = Vec::with_capacity(given.len());
        for (name, value) in given {
            match self.raw(name, value) {
                None => prepared.push((name.clone(), value.clone())),
                Some(strings) => {
                    let samples = strings.iter().map(String::as_bytes).collect();
                    let made = self.apply(&Raw { name, samples })?;
                    prepared.extend(made.into_iter().map(|(name, tensor)| (name, tensor.into())));
                }
            }
        }
        Ok(prepared)
    }

    /// Whether there is something to prepare.
    pub fn is_raw(&self, given: &[(String, Value)]) -> bool {
        given.iter().any(|(name, value)| self.raw(name, value).is_some())
    }

    fn raw<'a>(&self, name: &str, value: &'a Value) -> Option<&'a [String]> {
        value.as_tensor()?.strings().ok().filter(|_| self.described.names().any(|raw| raw == name))
    }

    #[cfg(any(feature = "image", feature = "text"))]
    fn dtype(&self, name: &str) -> DType {
        self.dtypes.iter().find(|(known, _)| known == name).map_or(DType::F32, |(_, dtype)| *dtype)
    }

    /// Integers are rounded, and clamped to what they hold.
    #[cfg(feature = "image")]
    fn cast(&self, name: &str, shape: Vec<usize>, values: &[f32]) -> Result<Tensor, InputError> {
        let values = values.iter().copied();
        let tensor = match self.dtype(name) {
            DType::F16 => Tensor::from_vec(shape, values.map(f16::from_f32).collect::<Vec<_>>()),
            DType::BF16 => Tensor::from_vec(shape, values.map(bf16::from_f32).collect::<Vec<_>>()),
            DType::F64 => Tensor::from_vec(shape, values.map(f64::from).collect::<Vec<_>>()),
            DType::U8 => Tensor::from_vec(shape, values.map(|v| v.round() as u8).collect::<Vec<_>>()),
            DType::I8 => Tensor::from_vec(shape, values.map(|v| v.round() as i8).collect::<Vec<_>>()),
            DType::I32 => Tensor::from_vec(shape, values.map(|v| v.round() as i32).collect::<Vec<_>>()),
            _ => Tensor::from_vec(shape, values.collect::<Vec<_>>()),
        };
        Ok(tensor?)
    }

    #[cfg(feature = "text")]
    fn ids(&self, name: &str, shape: Vec<usize>, values: Vec<u32>) -> Result<Tensor, InputError> {
        let tensor = match self.dtype(name) {
            DType::I32 => Tensor::from_vec(shape, values.into_iter().map(|v| v as i32).collect::<Vec<_>>()),
            _ => Tensor::from_vec(shape, values.into_iter().map(i64::from).collect::<Vec<_>>()),
        };
        Ok(tensor?)
    }
}
