//! Whether an answer is the one that a case stores.
//!
//! Numbers must be within `atol + rtol·|expected|`; the ONNX project's own runner takes 1e-7 and 1e-3. Types and shapes must be equal, and
//! so must strings, booleans and integers.

use cutover::{
    Tensor, Value,
    graph::ops::Wide,
    tensor::{DType, MapKeys},
};
use serde::Deserialize;
use std::collections::BTreeMap;

const DATA: &str = include_str!("../../onnx/cases.toml");

/// What is said of single cases in `tests/onnx/cases.toml`.
#[derive(Deserialize)]
pub struct Judge {
    #[serde(default)]
    tolerance: BTreeMap<String, Tolerance>,
    /// Cases with random outputs, and why they are: type, shape and statistics are compared.
    #[serde(default)]
    random: BTreeMap<String, String>,
}

#[derive(Clone, Copy, Deserialize)]
struct Tolerance {
    rtol: f64,
    atol: f64,
}

const DEFAULT: Tolerance = Tolerance { rtol: 1e-3, atol: 1e-7 };

impl Judge {
    pub fn load() -> Judge {
        toml::from_str(DATA).expect("tests/onnx/cases.toml is data of this repository")
    }

    /// # Errors
    /// What differs.
    pub fn compare(&self, case: &str, actual: &Value, expected: &Value) -> Result<(), String> {
        match (actual, expected) {
            (Value::Tensor(actual), Value::Tensor(expected)) => self.tensors(case, actual, expected),
            (Value::Sequence(actual), Value::Sequence(expected)) if actual.len() == expected.len() => {
                actual.iter().zip(expected).try_for_each(|(a, e)| self.compare(case, a, e))
            }
            (Value::Sequence(actual), Value::Sequence(expected)) => {
                Err(format!("{} elements in a sequence, expected {}", actual.len(), expected.len()))
            }
            (Value::Optional(None), Value::Optional(None)) => Ok(()),
            (Value::Optional(Some(actual)), Value::Optional(Some(expected))) => self.compare(case, actual, expected),
            (Value::Map { keys, values }, Value::Map { keys: expected_keys, values: expected }) => {
                same_keys(keys, expected_keys)?;
                self.tensors(case, values, expected)
            }
            (actual, expected) => Err(format!("a {} ({actual:?}), expected {expected:?}", actual.kind())),
        }
    }

    fn tensors(&self, case: &str, actual: &Tensor, expected: &Tensor) -> Result<(), String> {
        if (actual.dtype(), actual.shape()) != (expected.dtype(), expected.shape()) {
            return Err(format!("{actual:?}, expected {expected:?}"));
        }
        if actual.dtype() == DType::String {
            let (actual, expected) = (actual.strings().map_err(text)?, expected.strings().map_err(text)?);
            return match actual.iter().zip(expected).position(|(a, e)| a != e) {
                Some(at) => Err(format!("element {at} is {:?}, expected {:?}", actual[at], expected[at])),
                None => Ok(()),
            };
        }
        let (actual, expected) = (numbers(actual)?, numbers(expected)?);
        if self.random.contains_key(case) {
            return statistics(&actual, &expected);
        }
        let Tolerance { rtol, atol } = self.tolerance.get(case).copied().unwrap_or(DEFAULT);
        let near = |a: f64, e: f64| a == e || (a.is_nan() && e.is_nan()) || (a - e).abs() <= atol + rtol * e.abs();
        let apart = actual.iter().zip(&expected).filter(|&(&a, &e)| !near(a, e)).count();
        match actual.iter().zip(&expected).position(|(&a, &e)| !near(a, e)) {
            Some(at) => {
                let (a, e, count) = (actual[at], expected[at], actual.len());
                Err(format!("element {at} is {a}, expected {e}; {apart} of {count} differ"))
            }
            None => Ok(()),
        }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn same_keys(actual: &MapKeys, expected: &MapKeys) -> Result<(), String> {
    if actual == expected { Ok(()) } else { Err(format!("keys {actual:?}, expected {expected:?}")) }
}

/// Every element as `f64`, complex ones as two. Integers above 2^53 lose their last bits, on both sides alike.
fn numbers(tensor: &Tensor) -> Result<Vec<f64>, String> {
    let parts = match tensor.dtype() {
        DType::Complex64 => Some(tensor.bytes().chunks_exact(4).map(|b| f32_of(b).into()).collect()),
        DType::Complex128 => Some(tensor.bytes().chunks_exact(8).map(f64_of).collect()),
        _ => None,
    };
    if let Some(parts) = parts {
        return Ok(parts);
    }
    Ok(match Wide::of(tensor).map_err(text)? {
        Wide::Float(values) => values,
        Wide::Int(values) => values.into_iter().map(|v| v as f64).collect(),
        Wide::Bool(values) => values.into_iter().map(|v| f64::from(u8::from(v))).collect(),
    })
}

fn f32_of(bytes: &[u8]) -> f32 {
    f32::from_le_bytes(bytes.try_into().expect("four bytes"))
}

fn f64_of(bytes: &[u8]) -> f64 {
    f64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

/// Whether two samples can be of one distribution: means within five standard errors, spreads within a factor.
fn statistics(actual: &[f64], expected: &[f64]) -> Result<(), String> {
    let moments = |values: &[f64]| {
        let count = values.len().max(1) as f64;
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
        (mean, variance, count)
    };
    let ((mean, variance, count), (expected_mean, expected_variance, _)) = (moments(actual), moments(expected));
    let allowed = 5.0 * (variance.max(expected_variance) * 2.0 / count).sqrt() + 1e-6;
    if (mean - expected_mean).abs() <= allowed {
        return Ok(());
    }
    Err(format!("mean {mean}, expected {expected_mean} within {allowed}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(actual: &[f32], expected: &[f32], right: bool) {
        let tensor = |v: &[f32]| Tensor::from_vec([v.len()], v.to_vec()).unwrap();
        let judged = Judge::load().tensors("", &tensor(actual), &tensor(expected));
        assert_eq!(judged.is_ok(), right, "{actual:?} for {expected:?}: {judged:?}");
    }

    #[test]
    fn only_what_is_near_enough_is_right() {
        check(&[1.0, f32::NAN, f32::INFINITY], &[1.0005, f32::NAN, f32::INFINITY], true);
        check(&[1.0], &[1.002], false);
        check(&[f32::NAN], &[1.0], false);
        check(&[1.0], &[f32::NAN], false);
        check(&[f32::INFINITY], &[f32::NEG_INFINITY], false);
        check(&[1.0], &[1.0, 1.0], false);
        check(&[2e-8], &[0.0], true);
        check(&[2e-6], &[0.0], false);
    }

    #[test]
    fn samples_of_another_distribution_are_told() {
        let coin = |share: usize| (0..200).map(|i| f64::from(u8::from(i % 10 < share))).collect::<Vec<_>>();
        assert!(statistics(&coin(5), &coin(5)).is_ok());
        assert!(statistics(&coin(1), &coin(9)).is_err());
    }
}
