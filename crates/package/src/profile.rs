//! `profile.json`: what the training data looked like, so that a device can tell when what it sees is something else.

use crate::{PackageError, file};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A summary of data, no sample of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Profile {
    /// Samples it was made of.
    pub samples: u64,
    /// Of the elements of every input, by its name.
    pub inputs: BTreeMap<String, Distribution>,
    /// The share of every class among the labels, in order.
    pub classes: Vec<f64>,
}

/// The elements of one input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    pub min: f64,
    pub max: f64,
    pub mean: f64,
    /// Standard deviation.
    pub deviation: f64,
}

impl Distribution {
    /// `None` where there are no finite values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Distribution> {
        let (mut n, mut sum, mut squares, mut min, mut max) = (0.0, 0.0, 0.0, f64::INFINITY, f64::NEG_INFINITY);
        for value in values.into_iter().filter(|v| v.is_finite()) {
            (n, sum, squares) = (n + 1.0, sum + value, squares + value * value);
            (min, max) = (f64::min(min, value), f64::max(max, value));
        }
        let mean = sum / n;
        (n > 0.0).then(|| Distribution { min, max, mean, deviation: (squares / n - mean * mean).max(0.0).sqrt() })
    }
}

impl Profile {
    /// # Errors
    /// No valid profile.
    pub fn parse(text: &[u8]) -> Result<Profile, PackageError> {
        let corrupt = |message: String| PackageError::Corrupt { file: file::PROFILE.to_string(), message };
        // An array would be read as the fields in their order.
        if !text.trim_ascii_start().starts_with(b"{") {
            return Err(corrupt("expected an object".to_string()));
        }
        let profile: Profile = serde_json::from_slice(text).map_err(|e| corrupt(e.to_string()))?;
        let total: f64 = profile.classes.iter().sum();
        let shares = profile.classes.iter().all(|share| (0.0..=1.0).contains(share)) && (total - 1.0).abs() < 1e-2;
        if !profile.classes.is_empty() && !shares {
            return Err(corrupt("the classes' shares must be between 0 and 1, and 1 together".to_string()));
        }
        let finite = |d: &Distribution| [d.min, d.max, d.mean, d.deviation].iter().all(|v| v.is_finite());
        match profile.inputs.iter().find(|(_, distribution)| !finite(distribution)) {
            Some((name, _)) => Err(corrupt(format!("input '{name}' is not described by numbers"))),
            None => Ok(profile),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_profile_is_refused() {
        let profile = Profile {
            samples: 4,
            inputs: [("x".to_string(), Distribution::of([1.0, f64::NAN, 3.0]).unwrap())].into(),
            classes: vec![0.25, 0.75],
        };
        assert_eq!(profile.inputs["x"], Distribution { min: 1.0, max: 3.0, mean: 2.0, deviation: 1.0 });
        assert_eq!(Profile::parse(&serde_json::to_vec(&profile).unwrap()).unwrap(), profile);
        for bad in [r#"{"classes": [0.5, 0.6]}"#, r#"{"classes": [2, -1]}"#, r#"{"samples": -1}"#, "[]", ""] {
            assert!(Profile::parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert_eq!(Distribution::of([]), None);
    }
}
