//! `manifest.json`: who a package is, what it holds, and what it must keep to.

use crate::{PackageError, file};
use cutover_graph::{Fact, Graph, ValueId};
use cutover_monitor::Gates;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Packages of a newer major version are refused; fields of a newer minor version are skipped.
const FORMAT: &str = "1.0";
/// Longest name or version.
const NAME_BYTES: usize = 128;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// `major.minor` of this format.
    pub format: String,
    /// The model's name, which all its versions share.
    pub name: String,
    pub version: String,
    /// Never goes down on a device.
    #[serde(default)]
    pub security_epoch: u64,
    /// Every other file, by name.
    pub files: BTreeMap<String, FileEntry>,
    /// Digest of every tensor (type, shape and bytes), by its name in the model.
    #[serde(default)]
    pub tensors: BTreeMap<String, String>,
    pub inputs: Vec<TensorSchema>,
    pub outputs: Vec<TensorSchema>,
    /// How close the device's answers must come to the golden ones.
    #[serde(default)]
    pub golden: GoldenTolerance,
    /// What a rollout of this version is judged by; the strategy's own where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gates: Option<Gates>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub bytes: u64,
    /// BLAKE3, in hexadecimal.
    pub blake3: String,
}

/// `|device - golden| <= atol + rtol · |golden|` for every element.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GoldenTolerance {
    pub rtol: f64,
    pub atol: f64,
}

impl Default for GoldenTolerance {
    fn default() -> Self {
        GoldenTolerance { rtol: 1e-3, atol: 1e-4 }
    }
}

impl GoldenTolerance {
    /// Where a NaN or an infinity is expected, only the same will do: the tolerance there is no number either.
    pub fn within(&self, actual: f64, expected: f64) -> bool {
        let same = actual == expected || actual.is_nan() && expected.is_nan();
        same || expected.is_finite() && (actual - expected).abs() <= self.atol + self.rtol * expected.abs()
    }
}

/// A named input or output; a dimension is a number, or the symbol or expression it varies by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorSchema {
    pub name: String,
    pub dtype: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<Vec<String>>,
}

impl Manifest {
    /// The manifest of `graph`, its files not listed yet.
    pub fn of(graph: &Graph, name: &str, version: &str) -> Result<Manifest, PackageError> {
        check_name("the name", name)?;
        check_name("the version", version)?;
        let schema = |ids: &[ValueId]| {
            ids.iter().map(|&id| TensorSchema::of(&graph.value(id).name, &graph.value(id).fact)).collect()
        };
        let tensors = graph.values().filter_map(|(id, value)| {
            graph.constant(id).map(|constant| (value.name.clone(), constant.identity().to_string()))
        });
        Ok(Manifest {
            format: FORMAT.to_string(),
            name: name.to_string(),
            version: version.to_string(),
            security_epoch: 0,
            files: BTreeMap::new(),
            tensors: tensors.collect(),
            inputs: schema(graph.inputs()),
            outputs: schema(graph.outputs()),
            golden: GoldenTolerance::default(),
            gates: None,
        })
    }

    /// # Errors
    /// No valid manifest, or one of a newer major version.
    pub fn parse(text: &[u8]) -> Result<Manifest, PackageError> {
        let corrupt = |message: String| PackageError::Corrupt { file: file::MANIFEST.to_string(), message };
        let value: serde_json::Value = serde_json::from_slice(text).map_err(|e| corrupt(e.to_string()))?;
        let format = value["format"].as_str().unwrap_or_default().to_string();
        if format.split('.').next() != FORMAT.split('.').next() {
            return Err(PackageError::Format { found: format, expected: FORMAT });
        }
        let manifest: Manifest = serde_json::from_value(value).map_err(|e| corrupt(e.to_string()))?;
        check_name("the name", &manifest.name)?;
        check_name("the version", &manifest.version)?;
        if let Some(other) = manifest.files.keys().find(|name| !file::ALL.contains(&name.as_str())) {
            return Err(corrupt(format!("lists '{other}', which is no file of a package")));
        }
        for required in [file::MODEL, file::WEIGHTS, file::GOLDEN] {
            if !manifest.files.contains_key(required) {
                return Err(corrupt(format!("does not list '{required}'")));
            }
        }
        if let Some(gates) = &manifest.gates {
            gates.check().map_err(corrupt)?;
        }
        let tolerance = manifest.golden;
        if !(tolerance.rtol >= 0.0 && tolerance.atol >= 0.0 && tolerance.rtol.is_finite() && tolerance.atol.is_finite())
        {
            return Err(corrupt("the tolerances must be numbers of at least 0".to_string()));
        }
        Ok(manifest)
    }
}

impl TensorSchema {
    pub fn of(name: &str, fact: &Fact) -> TensorSchema {
        match fact {
            Fact::Tensor(fact) => TensorSchema {
                name: name.to_string(),
                dtype: fact.dtype.to_string(),
                shape: fact.shape.as_ref().map(|dims| dims.iter().map(ToString::to_string).collect()),
            },
            other => TensorSchema { name: name.to_string(), dtype: other.to_string(), shape: None },
        }
    }
}

/// Names become parts of paths and of URLs.
pub(crate) fn check_name(what: &'static str, name: &str) -> Result<(), PackageError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+');
    if name.is_empty() || name.len() > NAME_BYTES || name.starts_with('.') || !name.chars().all(allowed) {
        return Err(PackageError::Name { what, name: name.chars().take(NAME_BYTES).collect() });
    }
    Ok(())
}
