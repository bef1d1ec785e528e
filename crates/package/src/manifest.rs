//! `manifest.json`: who a package is, what it holds, and what it must keep to.

use crate::{PackageError, file};
use cutover_graph::{Fact, Graph, ValueId};
use cutover_input::Preprocessing;
use cutover_monitor::Gates;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Packages of a newer major version are refused; fields of a newer minor version are skipped.
const FORMAT: &str = "1.2";
/// Longest name or version.
const NAME_BYTES: usize = 128;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// `major.minor` of this format.
    pub format: String,
    /// The model's name, which all its versions share.
    pub name: String,
    pub version: String,
    /// What it is and who to ask, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
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
    /// The same for backends that need another tolerance, by their names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub golden_on: BTreeMap<String, GoldenTolerance>,
    /// What it takes, as measured where it was packed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// What a rollout of this version is judged by; the strategy's own where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gates: Option<Gates>,
    /// How pictures and texts become inputs.
    #[serde(default, skip_serializing_if = "Preprocessing::is_empty")]
    pub preprocessing: Preprocessing,
    /// How it was made smaller, and what that changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shrink: Option<ShrinkSummary>,
}

/// What was done to a model to make it smaller, and what that changed: each pair is before and after, as measured where it was done.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ShrinkSummary {
    /// In order: `prune`, `quantize` and the like.
    pub steps: Vec<String>,
    /// Samples that it was measured on.
    pub samples: u64,
    pub weight_bytes: [u64; 2],
    pub parameters: [u64; 2],
    /// Multiplications of all products in a run.
    pub operations: [u64; 2],
    /// Of the compiled model with one session.
    pub memory_bytes: [u64; 2],
    pub latency_ms: [f64; 2],
    /// Against the labels, where there are some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<[f64; 2]>,
    /// Of the worst output against the original's; absent where nothing differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sqnr_db: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cosine: Option<f64>,
    /// Share of rows whose largest element is where it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
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

/// What a version takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Resources {
    /// Bytes of weights.
    pub weight_bytes: u64,
    /// Bytes of one session.
    pub session_bytes: u64,
    /// A device on which the median request on the golden inputs takes longer does not admit it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_ms_max: Option<f64>,
}

/// A named input or output; a dimension is a number, or the symbol or expression it varies by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorSchema {
    pub name: String,
    pub dtype: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<Vec<String>>,
    /// Least and largest element that the model is meant for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<[f64; 2]>,
    /// What the classes along the last axis are called.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
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
            description: None,
            security_epoch: 0,
            files: BTreeMap::new(),
            tensors: tensors.collect(),
            inputs: schema(graph.inputs()),
            outputs: schema(graph.outputs()),
            golden: GoldenTolerance::default(),
            golden_on: BTreeMap::new(),
            resources: None,
            gates: None,
            preprocessing: Preprocessing::default(),
            shrink: None,
        })
    }

    /// What a newer minor version added is skipped: fields, gates, files.
    ///
    /// # Errors
    /// No valid manifest, or one of a newer major version.
    pub fn parse(text: &[u8]) -> Result<Manifest, PackageError> {
        let corrupt = |message: String| PackageError::Corrupt { file: file::MANIFEST.to_string(), message };
        let mut value: serde_json::Value = serde_json::from_slice(text).map_err(|e| corrupt(e.to_string()))?;
        let format = value["format"].as_str().unwrap_or_default().to_string();
        let is_newer = match (version_of(&format), version_of(FORMAT)) {
            (Some(found), Some(own)) if found.0 == own.0 => found.1 > own.1,
            _ => return Err(PackageError::Format { found: format, expected: FORMAT }),
        };
        if is_newer {
            skip_newer(&mut value);
        }
        let manifest: Manifest = serde_json::from_value(value).map_err(|e| corrupt(e.to_string()))?;
        manifest.check().map_err(corrupt)?;
        check_name("the name", &manifest.name)?;
        check_name("the version", &manifest.version)?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        if let Some(other) = self.files.keys().find(|name| !file::ALL.contains(&name.as_str())) {
            return Err(format!("lists '{other}', which is no file of a package"));
        }
        for required in [file::MODEL, file::WEIGHTS, file::GOLDEN] {
            if !self.files.contains_key(required) {
                return Err(format!("does not list '{required}'"));
            }
        }
        if let Some(gates) = &self.gates {
            gates.check()?;
        }
        let is_tolerance = |t: &GoldenTolerance| [t.rtol, t.atol].iter().all(|v| *v >= 0.0 && v.is_finite());
        if !self.golden_on.values().chain([&self.golden]).all(is_tolerance) {
            return Err("the tolerances must be numbers of at least 0".to_string());
        }
        let latency = self.resources.and_then(|resources| resources.latency_ms_max);
        if latency.is_some_and(|ms| !(ms > 0.0 && ms.is_finite())) {
            return Err("resources.latency_ms_max must be a number above 0".to_string());
        }
        let is_range = |range: [f64; 2]| range[0] <= range[1];
        match self.inputs.iter().chain(&self.outputs).find(|s| !s.range.is_none_or(is_range)) {
            Some(schema) => Err(format!("the range of '{}' holds nothing", schema.name)),
            None => Ok(()),
        }
    }

    /// How close answers on `backend` must come to the golden ones.
    pub fn tolerance(&self, backend: &str) -> GoldenTolerance {
        self.golden_on.get(backend).copied().unwrap_or(self.golden)
    }

    /// Whether a newer minor version than this software's wrote it.
    pub(crate) fn is_newer(&self) -> bool {
        version_of(&self.format).map(|v| v.1) > version_of(FORMAT).map(|v| v.1)
    }
}

/// `major.minor`.
fn version_of(format: &str) -> Option<(u32, u32)> {
    let (major, minor) = format.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Removes what this version does not know from where it would be refused.
fn skip_newer(manifest: &mut serde_json::Value) {
    if let Some(files) = manifest["files"].as_object_mut() {
        files.retain(|name, _| file::ALL.contains(&name.as_str()));
    }
    let known = serde_json::to_value(Gates::default()).unwrap_or_default();
    if let Some(gates) = manifest.get_mut("gates").and_then(|gates| gates.as_object_mut()) {
        gates.retain(|name, _| known.get(name).is_some());
    }
}

impl TensorSchema {
    pub fn of(name: &str, fact: &Fact) -> TensorSchema {
        match fact {
            Fact::Tensor(fact) => TensorSchema {
                name: name.to_string(),
                dtype: fact.dtype.to_string(),
                shape: fact.shape.as_ref().map(|dims| dims.iter().map(ToString::to_string).collect()),
                range: None,
                labels: Vec::new(),
            },
            other => TensorSchema {
                name: name.to_string(),
                dtype: other.to_string(),
                shape: None,
                range: None,
                labels: Vec::new(),
            },
        }
    }

    /// Whether both are of one name, type and shape.
    pub(crate) fn is_like(&self, other: &TensorSchema) -> bool {
        (&self.name, &self.dtype, &self.shape) == (&other.name, &other.dtype, &other.shape)
    }
}

/// Names become parts of paths and of URLs.
///
/// # Errors
/// One that is empty, too long or holds anything but letters, digits and `. _ - +`; `what` names it.
pub fn check_name(what: &'static str, name: &str) -> Result<(), PackageError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+');
    if name.is_empty() || name.len() > NAME_BYTES || name.starts_with('.') || !name.chars().all(allowed) {
        return Err(PackageError::Name { what, name: name.chars().take(NAME_BYTES).collect() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn manifest() -> serde_json::Value {
        let entry = json!({ "bytes": 1, "blake3": "0" });
        json!({
            "format": FORMAT, "name": "m", "version": "1", "inputs": [], "outputs": [],
            "files": { file::MODEL: entry, file::WEIGHTS: entry, file::GOLDEN: entry },
            "gates": { "alpha": 0.02 },
        })
    }

    fn parse(manifest: &serde_json::Value) -> Result<Manifest, PackageError> {
        Manifest::parse(&serde_json::to_vec(manifest).unwrap())
    }

    #[test]
    fn a_newer_minor_version_is_read_without_what_it_added() {
        let mut newer = manifest();
        newer["hologram"] = json!(true);
        newer["gates"]["vibes_min"] = json!(0.5);
        newer["files"]["hologram.bin"] = json!({ "bytes": 1, "blake3": "0" });
        assert!(parse(&newer).is_err(), "this version knows its own gates and files");
        newer["format"] = json!("1.99");
        let read = parse(&newer).unwrap();
        assert!(read.gates.unwrap().alpha == 0.02 && read.files.len() == 3 && read.is_newer());
        for format in ["2.0", "0.9", "1", "one", ""] {
            newer["format"] = json!(format);
            assert!(matches!(parse(&newer), Err(PackageError::Format { .. })), "{format}");
        }
        let mut older = manifest();
        older["format"] = json!("1.0");
        assert!(!parse(&older).unwrap().is_newer());
    }

    #[test]
    fn tolerances_are_those_of_the_backend() {
        let mut with = manifest();
        with["golden"] = json!({ "rtol": 0.1, "atol": 0.0 });
        with["golden_on"] = json!({ "cpu": { "rtol": 0.5, "atol": 0.0 } });
        let read = parse(&with).unwrap();
        assert_eq!((read.tolerance("cpu").rtol, read.tolerance("reference").rtol), (0.5, 0.1));
        with["golden_on"]["cpu"]["atol"] = json!(-1.0);
        assert!(parse(&with).is_err());
    }

    #[test]
    fn limits_that_make_no_sense_are_refused() {
        for (field, value) in [
            ("resources", json!({ "weight_bytes": 1, "session_bytes": 1, "latency_ms_max": 0.0 })),
            ("inputs", json!([{ "name": "x", "dtype": "f32", "range": [1.0, 0.0] }])),
        ] {
            let mut bad = manifest();
            bad[field] = value;
            assert!(parse(&bad).is_err(), "{field}");
        }
    }
}
