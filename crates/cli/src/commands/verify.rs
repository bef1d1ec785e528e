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
use cutover::{
    DType, Tensor,
    package::{
        self, GoldenTolerance, Package,
        ranking::{self, Reordering},
    },
};
use serde_json::{Value as Json, json};
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(after_help = "Example: cutover verify model.onnx --inputs in.npz --expect out.npz --backend cpu\n\
    \x20        cutover verify digits.cutover --backend cpu\n\n\
    Of a package without --inputs and --expect, every file and tensor is compared with its digest, and the answers to the golden inputs with the \
    golden outputs, within the tolerance that the package allows this backend. \
    Exits with 1 if an output disagrees. Where an output is a falling column of scores, rows that tie may come in any order.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    device: DeviceArguments,
    /// Inputs by name: .npz, .npy, .safetensors or .json.
    #[arg(long, requires = "expect")]
    inputs: Option<PathBuf>,
    /// Expected outputs by name, in any of those formats. Outputs it does not hold are not compared; of maps the values are, [rows, classes].
    #[arg(long, requires = "inputs")]
    expect: Option<PathBuf>,
    /// An element passes if it differs by at most atol + rtol · |expected|; 1e-3 if left out, or what the package says.
    #[arg(long)]
    rtol: Option<f64>,
    /// 1e-4 if left out, or what the package says.
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
        let model = self.model.open()?;
        let manifest = model.manifest().cloned();
        let model = model.compile_with(self.device.backend, &self.device.options())?;
        let backend = model.placement().nodes.first().map_or("", |node| node.backend);
        let allowed = manifest.as_ref().filter(|_| self.inputs.is_none()).map(|manifest| manifest.tolerance(backend));
        let allowed = allowed.unwrap_or_default();
        let (rtol, atol) = (self.rtol.unwrap_or(allowed.rtol), self.atol.unwrap_or(allowed.atol));
        if !(rtol >= 0.0 && atol >= 0.0) {
            bail!("--rtol {rtol} and --atol {atol}: expected at least 0");
        }
        let tolerance = GoldenTolerance { rtol, atol };
        if self.sqnr.is_some_and(f64::is_nan) {
            bail!("--sqnr: expected a number of decibels");
        }
        let least_sqnr = self.sqnr.or(match (self.rtol, self.atol) {
            (None, None) => self.device.least_sqnr_db(),
            _ => None,
        });
        let (inputs, expected, source) = match (&self.inputs, &self.expect) {
            (Some(inputs), Some(expect)) => {
                let only = match &model.signature().outputs[..] {
                    [one] => Some(one.name.as_str()),
                    _ => None,
                };
                let inputs = read_inputs(&model, inputs)?;
                (inputs, tensors::read(expect, only)?, expect.display().to_string())
            }
            _ if manifest.is_some() => {
                let golden = Package::open(&self.model.model)?.golden()?;
                (golden.inputs, golden.outputs, format!("the golden vectors of {}", self.model.name()))
            }
            _ => bail!("{} is no package: give --inputs and --expect", self.model.name()),
        };
        let mut outputs = output_tensors(run(&mut model.session()?, &inputs)?)?;
        let reordering = reorder(&outputs, &expected, tolerance);
        if let Some(reordering) = &reordering {
            outputs.iter_mut().for_each(|(_, tensor)| reordering.apply(tensor));
        }
        let mut comparisons = Vec::new();
        for (name, expected) in &expected {
            let names = || outputs.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>().join(", ");
            let (_, actual) = outputs.iter().find(|(n, _)| n == name).with_context(|| {
                format!("{source} holds '{name}', which is no output of the model; it has {}", names())
            })?;
            comparisons.push(compare(name, actual, expected, tolerance)?);
        }
        if comparisons.is_empty() {
            bail!("{source} holds no tensor");
        }
        // Opening it compared every file, importing it every tensor.
        let digests = manifest.as_ref().map(|m| json!({ "files": m.files.len(), "tensors": m.tensors.len() }));
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
            "digests_that_agree": digests,
            "rows_reordered": reordering.as_ref().map_or(0, |r| r.moved),
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
            let mut text = manifest.as_ref().map_or(String::new(), |m| {
                format!("{} files and {} tensors are what their digests say\n", m.files.len(), m.tensors.len())
            });
            text += &table(&header, comparisons.iter().map(row).collect(), false);
            if let Some(Reordering { moved, .. }) = &reordering {
                text += &format!("\n{moved} rows whose scores tie come in another order than expected: each was compared with its own.");
            }
            let judged = match least_sqnr {
                Some(least) => format!("judged by an SQNR of at least {least} dB"),
                None => format!("judged by differences of at most {atol:e} + {rtol:e} · |expected|"),
            };
            text + &format!("\n{judged}; precision {}", self.device.precision_name())
        })?;
        Ok(verdict)
    }
}

/// The order of rows in which rankings agree, see [`ranking`].
fn reorder(
    outputs: &[(String, Tensor)],
    expected: &[(String, Tensor)],
    tolerance: GoldenTolerance,
) -> Option<Reordering> {
    let mut pairs = Vec::new();
    for (name, expected) in expected {
        let (_, actual) = outputs.iter().find(|(n, _)| n == name)?;
        if actual.dtype() != expected.dtype() || actual.shape() != expected.shape() {
            return None;
        }
        pairs.push((actual.clone(), expected));
    }
    ranking::reorder(&pairs, |actual, expected| tolerance.within(actual, expected))
}

fn compare(name: &str, actual: &Tensor, expected: &Tensor, tolerance: GoldenTolerance) -> Result<Comparison> {
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
    let elements = |tensor: &Tensor| {
        package::numbers(tensor)
            .with_context(|| format!("output '{name}': tensors of {} can't be compared", tensor.dtype()))
    };
    for (at, (a, e)) in elements(actual)?.into_iter().zip(elements(expected)?).enumerate() {
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
        comparison.outside += usize::from(!tolerance.within(a, e));
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
