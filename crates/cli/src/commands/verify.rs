//! `cutover verify`.

use super::{
    DeviceArguments, ModelArguments,
    run::{output_tensors, read_inputs, run},
};
use crate::{
    Verdict,
    output::{Printer, table},
    tensors,
};
use anyhow::{Context, Result, bail};
use cutover::{DType, Tensor, tensor::bf16, tensor::f16};
use serde_json::{Value as Json, json};
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(after_help = "Example: cutover verify model.onnx --inputs in.npz --expect out.npz --backend cpu\n\
    Exits with 1 if an output disagrees.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    device: DeviceArguments,
    /// Inputs by name: .npz, .npy, .safetensors or .json.
    #[arg(long)]
    inputs: PathBuf,
    /// Expected outputs by name, in any of those formats. Outputs it does not hold are not compared; of maps the values are, [rows, classes].
    #[arg(long)]
    expect: PathBuf,
    /// An element passes if it differs by at most atol + rtol · |expected|; 1e-3 if left out.
    #[arg(long)]
    rtol: Option<f64>,
    /// 1e-4 if left out.
    #[arg(long)]
    atol: Option<f64>,
    /// Judges by the signal-to-quantization-noise ratio instead: at least so many dB. With --precision f16 or bf16 it does so unless told
    /// a tolerance, by 45 or 25 dB.
    #[arg(long, value_name = "DB")]
    sqnr: Option<f64>,
}

/// How one output compares.
struct Comparison {
    name: String,
    elements: usize,
    /// Largest absolute error, and the index where it is.
    absolute: (f64, Vec<usize>),
    /// Largest error relative to the expected value, where that is not 0.
    relative: (f64, Vec<usize>),
    /// Elements outside of the tolerance.
    outside: usize,
    /// `10 · log₁₀(Σ expected² / Σ (actual - expected)²)`; infinite where they are equal.
    sqnr_db: f64,
    /// Why it can't be compared at all.
    mismatch: Option<String>,
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let (rtol, atol) = (self.rtol.unwrap_or(1e-3), self.atol.unwrap_or(1e-4));
        if !(rtol >= 0.0 && atol >= 0.0) {
            bail!("--rtol {rtol} and --atol {atol}: expected at least 0");
        }
        if self.sqnr.is_some_and(f64::is_nan) {
            bail!("--sqnr: expected a number of decibels");
        }
        let least_sqnr = self.sqnr.or(match (self.rtol, self.atol) {
            (None, None) => self.device.least_sqnr_db(),
            _ => None,
        });
        let model = self.model.open()?.compile_with(self.device.backend, &self.device.options())?;
        let inputs = read_inputs(&model, &self.inputs)?;
        let only = match &model.signature().outputs[..] {
            [one] => Some(one.name.as_str()),
            _ => None,
        };
        let expected = tensors::read(&self.expect, only)?;
        let outputs = output_tensors(run(&mut model.session()?, &inputs)?)?;
        let mut comparisons = Vec::new();
        for (name, expected) in &expected {
            let names = || outputs.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>().join(", ");
            let (_, actual) = outputs.iter().find(|(n, _)| n == name).with_context(|| {
                format!("{} holds '{name}', which is no output of the model; it has {}", self.expect.display(), names())
            })?;
            comparisons.push(compare(name, actual, expected, rtol, atol)?);
        }
        if comparisons.is_empty() {
            bail!("{} holds no tensor", self.expect.display());
        }
        let passes = |c: &Comparison| match least_sqnr {
            Some(least) => c.mismatch.is_none() && c.sqnr_db >= least,
            None => c.mismatch.is_none() && c.outside == 0,
        };
        let verdict = if comparisons.iter().all(passes) { Verdict::Yes } else { Verdict::No };
        let document = json!({
            "model": self.model.name(),
            "agrees": verdict == Verdict::Yes,
            "precision": self.device.precision_name(),
            "rtol": rtol, "atol": atol, "sqnr_db_min": least_sqnr,
            "outputs": comparisons.iter().map(|c| json!({
                "name": c.name, "agrees": passes(c), "elements": c.elements, "mismatch": c.mismatch,
                "absolute_error_max": c.absolute.0, "absolute_error_at": c.absolute.1,
                "relative_error_max": c.relative.0, "relative_error_at": c.relative.1,
                "outside": c.outside,
                "sqnr_db": if c.sqnr_db.is_finite() { Json::from(c.sqnr_db) } else { Json::Null },
            })).collect::<Vec<_>>(),
        });
        printer.print(&document, || {
            let row = |c: &Comparison| match &c.mismatch {
                Some(mismatch) => vec![c.name.clone(), "NO".to_string(), mismatch.clone()],
                None => vec![
                    c.name.clone(),
                    if passes(c) { "yes" } else { "NO" }.to_string(),
                    format!("{:.3e} at {:?}", c.absolute.0, c.absolute.1),
                    format!("{:.3e} at {:?}", c.relative.0, c.relative.1),
                    format!("{} of {}", c.outside, c.elements),
                    format!("{:.1}", c.sqnr_db),
                ],
            };
            let header = [
                "output",
                "agrees",
                "largest absolute error",
                "largest relative error",
                "outside tolerance",
                "SQNR dB",
            ];
            let judged = match least_sqnr {
                Some(least) => format!("judged by an SQNR of at least {least} dB"),
                None => format!("judged by differences of at most {atol:e} + {rtol:e} · |expected|"),
            };
            let rows = table(&header, comparisons.iter().map(row).collect(), false);
            format!("{rows}\n{judged}; precision {}", self.device.precision_name())
        })?;
        Ok(verdict)
    }
}

fn compare(name: &str, actual: &Tensor, expected: &Tensor, rtol: f64, atol: f64) -> Result<Comparison> {
    let mut comparison = Comparison {
        name: name.to_string(),
        elements: expected.element_count(),
        absolute: (0.0, Vec::new()),
        relative: (0.0, Vec::new()),
        outside: 0,
        sqnr_db: f64::INFINITY,
        mismatch: None,
    };
    if actual.dtype() != expected.dtype() || actual.shape() != expected.shape() {
        let of = |t: &Tensor| format!("{} {}", t.dtype(), t.shape());
        comparison.mismatch = Some(format!("is {}, expected {}", of(actual), of(expected)));
        return Ok(comparison);
    }
    if expected.dtype() == DType::String {
        comparison.outside = actual.strings()?.iter().zip(expected.strings()?).filter(|(a, e)| a != e).count();
        if comparison.outside > 0 {
            comparison.sqnr_db = f64::NEG_INFINITY;
        }
        return Ok(comparison);
    }
    let (mut signal, mut noise) = (0.0, 0.0);
    for (at, (a, e)) in numbers(actual)?.into_iter().zip(numbers(expected)?).enumerate() {
        let same = a == e || (a.is_nan() && e.is_nan());
        let error = if same { 0.0 } else { (a - e).abs() };
        // A NaN where none is expected is an infinite error, not one that no comparison sees.
        let error = if error.is_nan() { f64::INFINITY } else { error };
        let index = || unravel(at, expected.shape());
        if error > comparison.absolute.0 {
            comparison.absolute = (error, index());
        }
        if e != 0.0 && error / e.abs() > comparison.relative.0 {
            comparison.relative = (error / e.abs(), index());
        }
        // Where a NaN or an infinity is expected, the tolerance is no number either: only the same will do.
        let within = same || e.is_finite() && error <= atol + rtol * e.abs();
        comparison.outside += usize::from(!within);
        signal += if e.is_finite() { e * e } else { 0.0 };
        noise += error * error;
    }
    if noise > 0.0 {
        comparison.sqnr_db = 10.0 * (signal / noise).log10();
    }
    Ok(comparison)
}

fn unravel(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (i, &extent) in index.iter_mut().zip(shape).rev() {
        *i = at % extent;
        at /= extent;
    }
    index
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    macro_rules! wide {
        ($t:ty) => {
            tensor.to_vec::<$t>()?.into_iter().map(|v| v as f64).collect()
        };
    }
    Ok(match tensor.dtype() {
        DType::F32 => wide!(f32),
        DType::F64 => tensor.to_vec::<f64>()?,
        DType::F16 => tensor.to_vec::<f16>()?.into_iter().map(f16::to_f64).collect(),
        DType::BF16 => tensor.to_vec::<bf16>()?.into_iter().map(bf16::to_f64).collect(),
        DType::I8 => wide!(i8),
        DType::I16 => wide!(i16),
        DType::I32 => wide!(i32),
        DType::I64 => wide!(i64),
        DType::U8 => wide!(u8),
        DType::U16 => wide!(u16),
        DType::U32 => wide!(u32),
        DType::U64 => wide!(u64),
        DType::Bool => tensor.to_bools()?.into_iter().map(|v| f64::from(u8::from(v))).collect(),
        other => bail!("tensors of {other} can't be compared"),
    })
}
