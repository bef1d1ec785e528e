//! `cutover convert`.

use super::shrink;
use crate::{
    Verdict,
    made_up::{Extents, first_that_runs},
    output::{Printer, bytes},
    tensors::Named,
};
use anyhow::{Context, Result, bail};
use cutover::{
    Device, DeviceOptions, Model, Value,
    graph::{
        Graph,
        onnx::{ImportOptions, import},
    },
    package::{Contents, Golden, Manifest, write},
};
use cutover_shrink::{Comparison, HalfOptions, HalfReport, compare, half_weights};
use serde_json::{Value as Json, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cutover convert model.onnx -o model.cutover --version 2.1.0 --golden in.npz\n  \
    cutover convert model.onnx -o small.cutover --version 2 --data calib.npz --prune-operations 0.5 --method static\n\
    With --data the model is shrunk on the way, as `cutover shrink` does; golden answers are then the original's.")]
pub(crate) struct Arguments {
    /// The ONNX model.
    model: PathBuf,
    /// The package to write; an existing one is replaced.
    #[arg(short, long)]
    output: PathBuf,
    /// The model's name, which all its versions share; the file's if left out.
    #[arg(long)]
    name: Option<String>,
    #[arg(long, default_value = "1")]
    version: String,
    /// Inputs of the golden vectors: .npz, .npy, .safetensors or .json; made up if left out.
    #[arg(long)]
    golden: Option<PathBuf>,
    /// Stores weights in half precision, and reports what that changes: half the bytes, computed with as before.
    #[arg(long, conflicts_with = "data")]
    f16: bool,
    /// Samples to shrink the model with, as `cutover shrink` takes them; golden inputs are then the first of them.
    #[arg(long, conflicts_with = "golden")]
    data: Option<PathBuf>,
    #[command(flatten)]
    work: shrink::Work,
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        match self.data {
            Some(data) => {
                let Arguments { model, output, name, version, work, .. } = self;
                let source = shrink::Source { model, data, output: Some(output), name, version: Some(version) };
                return work.run(&source, printer);
            }
            None if self.work.is_asked() => bail!("shrinking needs --data: samples to calibrate and to compare on"),
            None => {}
        }
        let name = match &self.name {
            Some(name) => name.clone(),
            None => self.model.file_stem().and_then(|s| s.to_str()).context("give the model's --name")?.to_string(),
        };
        let golden = self.golden.as_deref();
        let source = Source { model: &self.model, name: &name, version: &self.version, golden, f16: self.f16 };
        let Converted { manifest, note, half } = convert(&source, &self.output)?;
        let total: u64 = manifest.files.values().map(|f| f.bytes).sum();
        let document = json!({
            "output": self.output.display().to_string(),
            "manifest": manifest,
            "bytes": total,
            "golden": note,
            "half": half.as_ref().map(Half::json),
        });
        printer.print(&document, || {
            let tensors = manifest.tensors.len();
            let line = format!(
                "{}: {name} version {}, {tensors} tensors, {}",
                self.output.display(),
                self.version,
                bytes(total)
            );
            [Some(line), note, half.as_ref().map(Half::text)].into_iter().flatten().collect::<Vec<_>>().join("\n")
        })?;
        Ok(Verdict::Yes)
    }
}

/// What a package is made of.
pub(crate) struct Source<'a> {
    pub model: &'a Path,
    pub name: &'a str,
    pub version: &'a str,
    /// A file of golden inputs; they are made up if left out.
    pub golden: Option<&'a Path>,
    /// Stores the weights in half precision.
    pub f16: bool,
}

/// What came of it.
pub(crate) struct Converted {
    pub manifest: Manifest,
    /// What was assumed of the golden inputs.
    pub note: Option<String>,
    pub half: Option<Half>,
}

/// The evidence of weights in half precision: what changed, and how far the golden answers moved.
pub(crate) struct Half {
    pub report: HalfReport,
    pub comparison: Comparison,
}

/// Writes the ONNX model of `source` as a package, with golden vectors of what the reference backend answers.
pub(crate) fn convert(source: &Source<'_>, output: &Path) -> Result<Converted> {
    let original = import(source.model, &ImportOptions::default())?;
    let (graph, report) = match source.f16 {
        false => (None, None),
        true => {
            let (graph, report) = half_weights(original.clone(), &HalfOptions::default())?;
            (Some(graph), Some(report))
        }
    };
    let graph = graph.as_ref().unwrap_or(&original);
    let manifest = Manifest::of(graph, source.name, source.version)?;
    let (golden, note) = golden(graph, source.golden).context("golden vectors")?;
    let half = match report {
        None => None,
        Some(report) => {
            let sample = golden.inputs.iter().map(|(n, t)| (n.clone(), Value::Tensor(t.clone()))).collect();
            let backend = Device::Reference.backend(&DeviceOptions::default())?;
            let comparison = compare(&original, graph, &backend, &[sample]).context("comparing before and after")?;
            Some(Half { report, comparison })
        }
    };
    let manifest = write(&Contents { graph, manifest, golden: &golden, profile: None, tokenizer: None }, output)?;
    Ok(Converted { manifest, note, half })
}

/// Extents small enough to be kept in a package, the batch above 1 so that a mistake about batches shows.
const LADDER: &[Extents] = &[
    Extents { batch: 2, spatial: 32, sequence: 8 },
    Extents { batch: 1, spatial: 32, sequence: 8 },
    Extents { batch: 1, spatial: 64, sequence: 512 },
    Extents { batch: 1, spatial: 224, sequence: 4000 },
];

/// What the reference backend answers to the inputs in the file, or to made-up ones, and what was assumed of those.
pub(super) fn golden(graph: &Graph, inputs: Option<&Path>) -> Result<(Golden, Option<String>)> {
    let model = Model::from_graph(graph.clone(), &Default::default())?.compile(Device::Reference)?;
    let answers = |inputs: &Named| {
        let mut outputs = super::run::output_tensors(super::run::run(&mut model.session()?, inputs)?)?;
        // The file of golden vectors has no strings: scores speak for names of classes.
        outputs.retain(|(_, tensor)| tensor.dtype() != cutover::DType::String);
        Ok(outputs)
    };
    if let Some(path) = inputs {
        let inputs = super::run::read_inputs(&model, path)?;
        let outputs = answers(&inputs)?;
        return Ok((Golden { inputs, outputs }, None));
    }
    let bindings = &model.signature().inputs;
    let (made_up, outputs) = first_that_runs(bindings, &BTreeMap::new(), 1, LADDER, answers)
        .context("the model does not run on made-up inputs; give --golden")?;
    let extents = made_up.assumed.iter().map(|(symbol, extent)| format!("{symbol} = {extent}")).collect::<Vec<_>>();
    let note = format!(
        "golden vectors are of made-up inputs{}",
        match &extents[..] {
            [] => String::new(),
            extents => format!(" with {}", extents.join(", ")),
        }
    );
    Ok((Golden { inputs: made_up.inputs, outputs }, Some(note)))
}

impl Half {
    fn json(&self) -> Json {
        let Half { report, comparison } = self;
        json!({
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            "converted": report.converted,
            "kept": report.kept.iter().map(|k| json!({ "name": k.name, "reason": k.reason })).collect::<Vec<_>>(),
            "largest_error": report.largest_error,
            "outputs": comparison.outputs.iter().map(|o| json!({
                "name": o.name,
                "absolute_error_max": o.absolute_error_max,
                "magnitude_max": o.magnitude_max,
                // Infinite where nothing differs, which JSON has no number for.
                "sqnr_db": o.sqnr_db.is_finite().then_some(o.sqnr_db),
                "top1_agreement": o.top1_agreement,
            })).collect::<Vec<_>>(),
        })
    }

    fn text(&self) -> String {
        let Half { report, comparison } = self;
        let mut text = format!(
            "half precision: weights {} to {}, {} of them converted, largest error {:.1e} of a tensor's largest element",
            bytes(report.bytes_before),
            bytes(report.bytes_after),
            report.converted.len(),
            report.largest_error
        );
        for kept in &report.kept {
            text += &format!("\nkept '{}' in f32: {}", kept.name, kept.reason);
        }
        for output in &comparison.outputs {
            text += &format!(
                "\noutput '{}' on the golden inputs: off by at most {:.1e} where the largest is {:.1e}, SQNR {:.1} dB",
                output.name, output.absolute_error_max, output.magnitude_max, output.sqnr_db
            );
            if let Some(share) = output.top1_agreement {
                text += &format!(", same largest class in {:.1} %", share * 100.0);
            }
        }
        text
    }
}
