//! The shipped model, its three versions and the held-out images, as they are inside the binary.

use anyhow::{Context, Result, bail};
use std::{fs, path::Path};

/// `(version, model.onnx, weights.safetensors)`.
pub const VERSIONS: [(&str, &[u8], &[u8]); 3] = [
    (
        "v1",
        include_bytes!("../../../../../models/digits/v1/model.onnx"),
        include_bytes!("../../../../../models/digits/v1/weights.safetensors"),
    ),
    (
        "v2",
        include_bytes!("../../../../../models/digits/v2/model.onnx"),
        include_bytes!("../../../../../models/digits/v2/weights.safetensors"),
    ),
    (
        "v3",
        include_bytes!("../../../../../models/digits/v3/model.onnx"),
        include_bytes!("../../../../../models/digits/v3/weights.safetensors"),
    ),
];

const DATA: &str = include_str!("../../../../../models/digits/data/digits.csv");
const PIXELS: usize = 64;

/// The images that no version was trained on.
pub struct HeldOut {
    /// `[images, 1, 8, 8]`, between 0 and 1.
    pub images: Vec<f32>,
    pub labels: Vec<u8>,
}

impl HeldOut {
    /// Every third line of the data.
    pub fn read() -> Result<HeldOut> {
        let mut held_out = HeldOut { images: Vec::new(), labels: Vec::new() };
        for (index, line) in DATA.lines().enumerate().filter(|(index, _)| index % 3 == 2) {
            let numbers: Result<Vec<u8>, _> = line.split(',').map(str::parse).collect();
            let numbers = numbers.with_context(|| format!("digits.csv, line {}", index + 1))?;
            let Some((&label, pixels)) = numbers.split_last().filter(|(_, p)| p.len() == PIXELS) else {
                bail!("digits.csv, line {}: {} numbers, expected {}", index + 1, numbers.len(), PIXELS + 1);
            };
            held_out.images.extend(pixels.iter().map(|&p| f32::from(p) / 16.0));
            held_out.labels.push(label);
        }
        Ok(held_out)
    }

    pub fn image(&self, index: usize) -> &[f32] {
        &self.images[index * PIXELS..][..PIXELS]
    }
}

/// Writes `version`'s files into `folder`, which is made.
pub fn write(version: &str, folder: &Path) -> Result<()> {
    let (_, model, weights) = VERSIONS.iter().find(|(v, ..)| *v == version).context("one of the three versions")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for (name, bytes) in [("model.onnx", model), ("weights.safetensors", weights)] {
        let path = folder.join(name);
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
