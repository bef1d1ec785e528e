//! The options of each step, as a recipe spells them.

use crate::{
    Budget, HalfFormat, HalfOptions, Method, Quantization, Target,
    prune::{Amount, Criterion, PruneOptions, Restrictions, Scope, Sparsity},
    quantize::{ActivationType, BlockOptions, Calibration, DynamicOptions, StaticOptions, WeightRange},
};
use serde::{Deserialize, Serialize};
use std::{collections::HashSet, path::PathBuf};

/// Removes channels, heads and neurons: exactly one of `channels`, `operations` and `latency` says how many.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct PruneStep {
    /// This share of channels goes.
    pub channels: Option<f64>,
    /// At most this share of multiplications stays.
    pub operations: Option<f64>,
    /// At most this share of the latency stays.
    pub latency: Option<f64>,
    pub criterion: Criterion,
    pub scope: Scope,
    pub multiple: usize,
    /// Nodes whose weights keep their shapes.
    pub exclude: Vec<String>,
    pub through_norms: bool,
}

impl Default for PruneStep {
    fn default() -> PruneStep {
        PruneStep {
            channels: None,
            operations: None,
            latency: None,
            criterion: Criterion::default(),
            scope: Scope::default(),
            multiple: PruneOptions::default().multiple,
            exclude: Vec::new(),
            through_norms: false,
        }
    }
}

impl PruneStep {
    /// # Errors
    /// None or several amounts, or one outside 0 to 1.
    pub fn options(&self) -> Result<PruneOptions, String> {
        let (amount, share) = match (self.channels, self.operations, self.latency) {
            (Some(share), None, None) => (Amount::Channels(share), share),
            (None, Some(share), None) => (Amount::Operations(share), share),
            (None, None, Some(share)) => (Amount::Latency(share), share),
            (None, None, None) => return Err("expected channels, operations or latency, e.g. operations = 0.5".into()),
            _ => return Err("expected one of channels, operations and latency, not several".to_string()),
        };
        share_in_range(share)?;
        if self.multiple == 0 {
            return Err("multiple = 0: expected at least 1".to_string());
        }
        let exclude = self.exclude.iter().cloned().collect();
        Ok(PruneOptions {
            amount,
            criterion: self.criterion,
            scope: self.scope,
            multiple: self.multiple,
            restrictions: Restrictions { exclude, through_norms: self.through_norms },
        })
    }
}

fn share_in_range(share: f64) -> Result<(), String> {
    match (0.0..1.0).contains(&share) {
        true => Ok(()),
        false => Err(format!("a share of {share}: expected at least 0 and below 1")),
    }
}

/// Leaves out layers: of those that the model repeats, only these stay. What follows trains them to answer as the original does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct StudentStep {
    /// Numbers of the layers that stay, from 0 and rising.
    pub layers: Vec<usize>,
}

impl StudentStep {
    /// # Errors
    /// No layers, or not in rising order.
    pub fn check(&self) -> Result<(), String> {
        match !self.layers.is_empty() && self.layers.is_sorted_by(|a, b| a < b) {
            true => Ok(()),
            false => {
                Err(format!("layers = {:?}: expected those that stay, counted from 0, e.g. [0, 3, 5]", self.layers))
            }
        }
    }
}

/// Sets single weights to zero: exactly one of `ratio` and `pattern` says which.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct SparsifyStep {
    /// The share that becomes zero.
    pub ratio: Option<f64>,
    /// Whether layers are compared with each other, for `ratio`.
    pub scope: Scope,
    /// `2:4` and the like.
    pub pattern: Option<String>,
    pub exclude: Vec<String>,
}

impl SparsifyStep {
    /// # Errors
    /// Neither or both, or out of range.
    pub fn sparsity(&self) -> Result<Sparsity, String> {
        match (self.ratio, &self.pattern) {
            (Some(ratio), None) => {
                share_in_range(ratio)?;
                Ok(match self.scope {
                    Scope::Global => Sparsity::Global { ratio },
                    Scope::Uniform => Sparsity::PerLayer { ratio },
                })
            }
            (None, Some(pattern)) => {
                let numbers = pattern.split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
                match numbers {
                    Some((keep, of)) if keep > 0 && keep <= of => Ok(Sparsity::Pattern { keep, of }),
                    _ => Err(format!("pattern = \"{pattern}\": expected e.g. \"2:4\", at least one kept")),
                }
            }
            _ => Err("expected either ratio or pattern, e.g. pattern = \"2:4\"".to_string()),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MethodName {
    /// Integers, ranges from the data.
    #[default]
    Static,
    /// Integers, ranges found by every run.
    Dynamic,
    /// Weights of 8 bits in blocks, activations in floats.
    Int8,
    /// Of 4 bits.
    Int4,
    /// Weights in half precision.
    F16,
    /// Weights as bfloat16.
    Bf16,
}

impl MethodName {
    pub fn name(self) -> &'static str {
        match self {
            MethodName::Static => "static",
            MethodName::Dynamic => "dynamic",
            MethodName::Int8 => "int8",
            MethodName::Int4 => "int4",
            MethodName::F16 => "f16",
            MethodName::Bf16 => "bf16",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CalibrationName {
    #[default]
    Minmax,
    Percentile,
    Entropy,
    Mse,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActivationName {
    #[default]
    U8,
    I8,
    I8Symmetric,
}

/// Quantizes. A budget is against the model as it comes to this step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct QuantizeStep {
    pub method: MethodName,
    pub target: Target,
    pub budget: Option<Budget>,
    pub calibration: CalibrationName,
    /// Share of values within the range, in percent.
    pub percentile: f64,
    pub activations: ActivationName,
    pub per_tensor: bool,
    pub clip_weights: bool,
    /// SmoothQuant's strength.
    pub smooth: Option<f32>,
    pub equalize: bool,
    pub bias_correction: bool,
    pub gptq: bool,
    /// Weights in a block.
    pub block: usize,
    /// Nodes that stay in floats.
    pub exclude: Vec<String>,
}

impl Default for QuantizeStep {
    fn default() -> QuantizeStep {
        QuantizeStep {
            method: MethodName::default(),
            target: Target::default(),
            budget: None,
            calibration: CalibrationName::default(),
            percentile: 99.99,
            activations: ActivationName::default(),
            per_tensor: false,
            clip_weights: false,
            smooth: None,
            equalize: false,
            bias_correction: false,
            gptq: false,
            block: BlockOptions::default().block,
            exclude: Vec::new(),
        }
    }
}

impl QuantizeStep {
    /// # Errors
    /// Options out of range, or of another method.
    pub fn check(&self) -> Result<(), String> {
        if !(self.percentile > 0.0 && self.percentile <= 100.0) {
            return Err(format!("percentile {}: expected above 0 and at most 100", self.percentile));
        }
        if self.bias_correction && self.method != MethodName::Static {
            return Err(format!("bias-correction is for method static, not {}", self.method.name()));
        }
        if matches!(self.method, MethodName::F16 | MethodName::Bf16) && self.target != Target::Size {
            let method = self.method.name();
            return Err(format!("method {method} is for target size: weights are widened before they are used"));
        }
        if self.gptq && !matches!(self.method, MethodName::Int8 | MethodName::Int4) {
            return Err(format!("gptq is for method int4 and int8, not {}", self.method.name()));
        }
        Ok(())
    }

    /// With `detail` for a report to draw.
    pub fn quantization(&self, detail: bool) -> Quantization {
        let exclude: HashSet<String> = self.exclude.iter().cloned().collect();
        let calibration = match self.calibration {
            CalibrationName::Minmax => Calibration::MinMax,
            CalibrationName::Percentile => Calibration::Percentile(1.0 - self.percentile / 100.0),
            CalibrationName::Entropy => Calibration::Entropy,
            CalibrationName::Mse => Calibration::LeastError,
        };
        let activations = match self.activations {
            ActivationName::U8 => ActivationType::U8,
            ActivationName::I8 => ActivationType::I8,
            ActivationName::I8Symmetric => ActivationType::SymmetricI8,
        };
        let weights = if self.clip_weights { WeightRange::LeastError } else { WeightRange::Largest };
        let per_channel = !self.per_tensor;
        let blocks =
            |bits| BlockOptions { bits, block: self.block, exclude: exclude.clone(), ..BlockOptions::default() };
        let method = match self.method {
            MethodName::Static => {
                let exclude = exclude.clone();
                Method::Static(StaticOptions { activations, calibration, per_channel, weights, tables: true, exclude })
            }
            MethodName::Dynamic => {
                let exclude = exclude.clone();
                Method::Dynamic(DynamicOptions { per_channel, weights, exclude, ..DynamicOptions::default() })
            }
            MethodName::Int8 => Method::Weights(blocks(8)),
            MethodName::Int4 => Method::Weights(blocks(4)),
            MethodName::F16 => Method::Half(HalfOptions::default()),
            MethodName::Bf16 => Method::Half(HalfOptions { format: HalfFormat::Bf16, ..HalfOptions::default() }),
        };
        Quantization {
            method,
            smooth: self.smooth,
            equalize: self.equalize,
            correct_bias: self.bias_correction,
            gptq: self.gptq,
            target: self.target,
            detail,
            budget: self.budget,
        }
    }
}

/// Compares with the original: what is not met makes the outcome not within budget.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct VerifyStep {
    /// All of them must be met.
    pub budget: Vec<Budget>,
}

impl VerifyStep {
    pub fn check(&self) -> Result<(), String> {
        match self.budget.is_empty() {
            true => Err("expected budget, e.g. budget = [\"accuracy>=-0.5%\"]".to_string()),
            false => Ok(()),
        }
    }
}

/// Writes a package: golden vectors of what the original answers, a profile of the data, and a summary in the manifest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct PackStep {
    /// The model's name, which all its versions share; the file's if left out.
    pub name: Option<String>,
    /// `1` if left out.
    pub version: Option<String>,
    pub description: Option<String>,
    /// The package to write; relative to where the program was started.
    pub output: PathBuf,
}

impl PackStep {
    pub fn check(&self) -> Result<(), String> {
        match self.output.as_os_str().is_empty() {
            true => Err("expected output, the package to write".to_string()),
            false => Ok(()),
        }
    }
}
