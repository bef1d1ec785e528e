//! Whether an answer is the one that a case stores.
//!
//! Numbers must be within `atol + rtol·|expected|`; the ONNX project's own runner takes 1e-7 and 1e-3, and 2⁻⁶ of bf16, which
//! are two of its last places. Types and shapes must be equal, and so must strings, booleans and integers. Of drawn numbers, which no two implementations share, it is compared what they are drawn from.

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
    /// Cases with random outputs.
    #[serde(default)]
    random: BTreeMap<String, Random>,
}

#[derive(Deserialize)]
struct Random {
    draws: Draws,
    /// Why the stored outputs are not the only right ones.
    #[expect(dead_code, reason = "whoever reads the file wants to know")]
    reason: String,
}

/// What is drawn, and what is right whichever numbers came.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Draws {
    /// Zeros and ones: as many ones as the probabilities, the first input, make likely.
    Coins,
    /// The first input with elements dropped, as many as the second input (0.5 without it) makes likely, and the rest divided by
    /// what that leaves of 1; then where it was kept.
    Dropout,
}

#[derive(Clone, Copy, Deserialize)]
struct Tolerance {
    rtol: f64,
    atol: f64,
}

const DEFAULT: Tolerance = Tolerance { rtol: 1e-3, atol: 1e-7 };
const OF_BF16: Tolerance = Tolerance { rtol: 1.0 / 64.0, ..DEFAULT };

impl Judge {
    pub fn load() -> Judge {
        toml::from_str(DATA).expect("tests/onnx/cases.toml is data of this repository")
    }

    /// Whether `actual`, with the names of the outputs, are right for the model's `inputs`.
    ///
    /// # Errors
    /// What differs.
    pub fn compare(
        &self,
        case: &str,
        inputs: &[Value],
        actual: &[(&str, &Value)],
        expected: &[Value],
    ) -> Result<(), String> {
        for ((name, actual), expected) in actual.iter().zip(expected) {
            let judged = match self.random.contains_key(case) {
                true => same_kind(actual, expected),
                false => self.values(case, actual, expected),
            };
            judged.map_err(|difference| format!("output '{name}': {difference}"))?;
        }
        let drawn: Vec<&Value> = actual.iter().map(|(_, value)| *value).collect();
        self.random.get(case).map_or(Ok(()), |random| random.draws.check(inputs, &drawn))
    }

    fn values(&self, case: &str, actual: &Value, expected: &Value) -> Result<(), String> {
        match (actual, expected) {
            (Value::Tensor(actual), Value::Tensor(expected)) => self.tensors(case, actual, expected),
            (Value::Sequence(actual), Value::Sequence(expected)) if actual.len() == expected.len() => {
                actual.iter().zip(expected).try_for_each(|(a, e)| self.values(case, a, e))
            }
            (Value::Sequence(actual), Value::Sequence(expected)) => {
                Err(format!("{} elements in a sequence, expected {}", actual.len(), expected.len()))
            }
            (Value::Optional(None), Value::Optional(None)) => Ok(()),
            (Value::Optional(Some(actual)), Value::Optional(Some(expected))) => self.values(case, actual, expected),
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
        let usual = if actual.dtype() == DType::BF16 { OF_BF16 } else { DEFAULT };
        let Tolerance { rtol, atol } = self.tolerance.get(case).copied().unwrap_or(usual);
        let (actual, expected) = (numbers(actual)?, numbers(expected)?);
        let near = |a: f64, e: f64| {
            a == e || (a.is_nan() && e.is_nan()) || e.is_finite() && (a - e).abs() <= atol + rtol * e.abs()
        };
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

/// Whether both are tensors of one type and shape.
fn same_kind(actual: &Value, expected: &Value) -> Result<(), String> {
    match (actual, expected) {
        (Value::Tensor(a), Value::Tensor(e)) if (a.dtype(), a.shape()) == (e.dtype(), e.shape()) => Ok(()),
        _ => Err(format!("{actual:?}, expected {expected:?}")),
    }
}

impl Draws {
    fn check(self, inputs: &[Value], outputs: &[&Value]) -> Result<(), String> {
        let numbers_of = |value: Option<&Value>| {
            let tensor = value.and_then(Value::as_tensor).ok_or("a tensor is missing")?;
            numbers(tensor)
        };
        let (x, y) = (numbers_of(inputs.first())?, numbers_of(outputs.first().copied())?);
        match self {
            Draws::Coins => {
                if let Some(other) = y.iter().find(|&&y| y != 0.0 && y != 1.0) {
                    return Err(format!("{other} is neither 0 nor 1"));
                }
                likely(y.iter().filter(|&&y| y == 1.0).count(), &x)
            }
            Draws::Dropout => {
                let ratio = match inputs.get(1) {
                    Some(ratio) => numbers_of(Some(ratio))?.first().copied().ok_or("a ratio is missing")?,
                    None => 0.5,
                };
                let kept: Vec<bool> = match outputs.get(1) {
                    Some(mask) => numbers_of(Some(mask))?.into_iter().map(|m| m != 0.0).collect(),
                    None => x.iter().zip(&y).map(|(&x, &y)| x == 0.0 || y != 0.0).collect(),
                };
                let right = |at: &usize| {
                    let scaled = x[*at] / (1.0 - ratio);
                    // The quotient was rounded to the type of the output, an f32 at least.
                    if kept[*at] { (y[*at] - scaled).abs() <= 1e-6 * scaled.abs() } else { y[*at] == 0.0 }
                };
                if let Some(at) = (0..y.len()).find(|at| !right(at)) {
                    return Err(format!("element {at} is {}, kept: {}, of {}", y[at], kept[at], x[at]));
                }
                likely(kept.iter().filter(|&&kept| kept).count(), &vec![1.0 - ratio; kept.len()])
            }
        }
    }
}

/// Whether so many of coins of these probabilities can have fallen on 1: within five standard deviations.
fn likely(ones: usize, probabilities: &[f64]) -> Result<(), String> {
    let mean: f64 = probabilities.iter().sum();
    let allowed = 5.0 * probabilities.iter().map(|p| p * (1.0 - p)).sum::<f64>().sqrt();
    match (ones as f64 - mean).abs() <= allowed {
        true => Ok(()),
        false => Err(format!("{ones} of {} draws, expected {mean} within {allowed}", probabilities.len())),
    }
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
    fn draws_must_be_of_their_distribution() {
        let value = |v: Vec<f32>| Value::from(Tensor::from_vec([v.len()], v).unwrap());
        let coins = |p: f32, share: usize| {
            let drawn = value((0..200).map(|i| f32::from(u8::from(i % 10 < share))).collect());
            Draws::Coins.check(&[value(vec![p; 200])], &[&drawn]).is_ok()
        };
        assert!(coins(0.5, 5) && coins(0.1, 1));
        assert!(!coins(0.1, 9) && !coins(0.0, 1) && !coins(1.0, 9));
        assert!(Draws::Coins.check(&[value(vec![0.5])], &[&value(vec![0.5])]).is_err());

        let dropped = |ratio: f32, y: &[f32]| {
            Draws::Dropout.check(&[value(vec![1.0; y.len()]), value(vec![ratio])], &[&value(y.to_vec())]).is_ok()
        };
        assert!(dropped(0.75, &[4.0, 0.0, 0.0, 0.0]) && dropped(0.0, &[1.0, 1.0]));
        assert!(!dropped(0.75, &[1.0, 0.0]) && !dropped(0.0, &[1.0, 0.0]) && !dropped(0.5, &[0.0; 100]));
        let (x, y) = (value(vec![1.0, 1.0]), value(vec![2.0, 0.0]));
        let mask = |kept: [bool; 2]| Value::from(Tensor::from_bools([2], &kept).unwrap());
        let with_mask = |kept| Draws::Dropout.check(std::slice::from_ref(&x), &[&y, &mask(kept)]).is_ok();
        assert!(with_mask([true, false]) && !with_mask([true, true]) && !with_mask([false, true]));
    }
}
