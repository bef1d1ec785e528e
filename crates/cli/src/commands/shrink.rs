//! `cutover shrink`.

use super::DeviceArguments;
use crate::{
    Verdict,
    output::{Printer, bytes, table},
    raw::{self, PreprocessArguments},
    report, tensors,
};
use anyhow::{Context, Result, bail};
use cutover::{
    Tensor,
    backend::Signature,
    graph::{
        Graph,
        onnx::{ImportOptions, Weights, export, import},
    },
    input::Preprocessor,
};
use cutover_shrink::{
    Budget, Data, Evaluation, Method, Recipe, Sample, ShrinkReport, Target, latencies,
    quantize::{ActivationType, BlockOptions, Calibration, DynamicOptions, StaticOptions, WeightRange},
};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value as Json, json};
use std::{
    cell::RefCell,
    collections::HashSet,
    path::{Path, PathBuf},
    time::Duration,
};

#[derive(clap::Args)]
#[command(
    after_help = "Example: cutover shrink model.onnx --data calib.npz --method static --budget \"accuracy>=-0.5%\" -o small.onnx\n\
    Exits with 1 if the budget is not met; the nearest that was found is written all the same."
)]
pub(crate) struct Arguments {
    /// The ONNX model.
    model: PathBuf,
    /// Inputs by name, samples along the first axis: .npz, .npy, .safetensors, .json or .csv; 'labels' holds the class of each sample. Or, with
    /// --preprocess, a folder of pictures (in a folder for each class, where classes are known) or a .txt with a text to a line.
    #[arg(long)]
    data: PathBuf,
    #[command(flatten)]
    preprocess: PreprocessArguments,
    /// The ONNX file to write; an existing one is replaced.
    #[arg(short, long)]
    output: PathBuf,
    /// Writes a page with plots, all in one HTML file.
    #[arg(long, value_name = "HTML")]
    report: Option<PathBuf>,
    /// static: integers, ranges from the data; dynamic: integers, ranges in every run; int8 or int4: weights in blocks, activations in
    /// floats; f16: weights in half precision.
    #[arg(long, default_value = "static", value_parser = ["static", "dynamic", "int8", "int4", "f16"])]
    method: String,
    /// size: every layer; latency: a layer that is no faster in integers on this device stays in floats.
    #[arg(long, default_value = "size", value_parser = ["size", "latency"])]
    target: String,
    /// What must be kept: accuracy>=-0.5%, agreement>=99%, sqnr>=20 or cosine>=0.995. The most sensitive layers go back to floats until it is.
    #[arg(long)]
    budget: Option<Budget>,
    /// How ranges of activations are found: minmax, percentile (with --percentile), entropy or mse.
    #[arg(long, default_value = "minmax", value_parser = ["minmax", "percentile", "entropy", "mse"])]
    calibration: String,
    /// Share of values within the range, in percent.
    #[arg(long, default_value_t = 99.99)]
    percentile: f64,
    /// Integers of activations: u8, i8, or i8 with zero point 0.
    #[arg(long, default_value = "u8", value_parser = ["u8", "i8", "i8-symmetric"])]
    activations: String,
    /// One scale for a whole weight instead of one for each output channel.
    #[arg(long)]
    per_tensor: bool,
    /// Clips weights to the range of least squared error.
    #[arg(long)]
    clip_weights: bool,
    /// SmoothQuant: moves outliers of activations into weights, 0 to 1; 0.5 is usual.
    #[arg(long, value_name = "STRENGTH")]
    smooth: Option<f32>,
    /// Cross-layer equalization of convolutions.
    #[arg(long)]
    equalize: bool,
    /// Bias correction, of static quantization.
    #[arg(long)]
    bias_correction: bool,
    /// GPTQ: rounds weights in blocks by what the data shows.
    #[arg(long)]
    gptq: bool,
    /// Weights in a block, of int8 and int4.
    #[arg(long, default_value_t = 32)]
    block: usize,
    /// A node that stays in floats; may be given several times.
    #[arg(long, value_name = "NODE")]
    exclude: Vec<String>,
    /// Samples in a run, where the model leaves that open.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Uses the first so many samples only.
    #[arg(long)]
    samples: Option<usize>,
    #[command(flatten)]
    device: DeviceArguments,
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let graph = import(&self.model, &ImportOptions::default())
            .with_context(|| format!("cannot read {}", self.model.display()))?;
        let data = self.read_data(&graph)?;
        let recipe = self.recipe(&graph)?;
        let backend = self.device.backend.backend(&self.device.options())?;
        let bar = Bar::new(printer.json);
        let shrunk =
            cutover_shrink::shrink(&graph, &recipe, &data, &backend, &|what, done, of| bar.show(what, done, of))?;
        bar.0.borrow().finish_and_clear();
        write(&shrunk.graph, &self.output)?;
        let file = |path: &Path| std::fs::metadata(path).map(|m| m.len()).unwrap_or(0);
        // The smaller model is measured as it will be used: read from its file.
        let written = import(&self.output, &ImportOptions::default()).context("reading back what was written")?;
        let [before, after] = latencies(&graph, &written, &backend, &data.samples, Duration::from_secs(3))?;
        let result =
            Outcome { report: &shrunk.report, file_bytes: file(&self.output), before, after, arguments: &self };
        if let Some(path) = &self.report {
            let title = format!("{} shrunk: {}", self.model.display(), self.method);
            let page = report::page(&title, &result.rows(), &shrunk.report)?;
            std::fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))?;
        }
        printer.print(&result.json(), || result.text())?;
        Ok(if shrunk.report.within_budget { Verdict::Yes } else { Verdict::No })
    }

    fn read_data(&self, graph: &Graph) -> Result<Data> {
        let (batch, most) = (self.batch.max(1), self.samples.unwrap_or(usize::MAX));
        if !raw::is_raw(&self.data) {
            return read_data(graph, &self.data, batch, most);
        }
        let signature = Signature::of(graph);
        let dtype = |name: &str| {
            let binding = signature.inputs.iter().find(|binding| binding.name == name)?;
            Some(binding.fact.as_tensor()?.dtype)
        };
        let preprocessor = match self.preprocess.read()? {
            Some((described, tokenizer)) => Some(Preprocessor::new(described, tokenizer.as_deref(), dtype)?),
            None => None,
        };
        let made = raw::read(&self.data, most)?;
        let runs = made.samples.len() / batch;
        if runs == 0 {
            bail!("{} holds {} samples, a run takes {batch}", self.data.display(), made.samples.len());
        }
        let sample = |run: usize| -> Result<Sample> {
            let inputs = made.inputs(preprocessor.as_ref(), run * batch..(run + 1) * batch)?;
            for binding in &signature.inputs {
                if !inputs.iter().any(|(name, _)| *name == binding.name) {
                    bail!("--preprocess does not say what input '{}' ({}) is made of", binding.name, binding.fact);
                }
            }
            Ok(inputs.into_iter().map(|(name, tensor)| (name, tensor.into())).collect())
        };
        let samples = (0..runs).map(sample).collect::<Result<Vec<_>>>()?;
        let labels = made.labels.map(|all| all.chunks_exact(batch).take(runs).map(<[i64]>::to_vec).collect());
        Ok(Data { samples, labels })
    }

    fn recipe(&self, graph: &Graph) -> Result<Recipe> {
        if !(self.percentile > 0.0 && self.percentile <= 100.0) {
            bail!("--percentile {}: expected above 0 and at most 100", self.percentile);
        }
        for name in &self.exclude {
            if !graph.nodes().any(|(_, node)| node.name == *name) {
                bail!("--exclude {name}: the model has no such node; `cutover inspect` shows those it has");
            }
        }
        let exclude: HashSet<String> = self.exclude.iter().cloned().collect();
        let calibration = match self.calibration.as_str() {
            "percentile" => Calibration::Percentile(1.0 - self.percentile / 100.0),
            "entropy" => Calibration::Entropy,
            "mse" => Calibration::LeastError,
            _ => Calibration::MinMax,
        };
        let activations = match self.activations.as_str() {
            "i8" => ActivationType::I8,
            "i8-symmetric" => ActivationType::SymmetricI8,
            _ => ActivationType::U8,
        };
        let weights = if self.clip_weights { WeightRange::LeastError } else { WeightRange::Largest };
        let per_channel = !self.per_tensor;
        let blocks =
            |bits| BlockOptions { bits, block: self.block, exclude: exclude.clone(), ..BlockOptions::default() };
        let method = match self.method.as_str() {
            "static" => {
                let exclude = exclude.clone();
                Method::Static(StaticOptions { activations, calibration, per_channel, weights, tables: true, exclude })
            }
            "dynamic" => {
                let exclude = exclude.clone();
                Method::Dynamic(DynamicOptions { per_channel, weights, exclude, ..DynamicOptions::default() })
            }
            "int8" => Method::Weights(blocks(8)),
            "int4" => Method::Weights(blocks(4)),
            _ => Method::Half,
        };
        let only = |asked: bool, flag: &str, method: &str| match asked && self.method != method {
            true => bail!("{flag} is for --method {method}, not {}", self.method),
            false => Ok(()),
        };
        only(self.bias_correction, "--bias-correction", "static")?;
        if self.gptq && !self.method.starts_with("int") {
            bail!("--gptq is for --method int4 and int8, not {}", self.method);
        }
        Ok(Recipe {
            method,
            smooth: self.smooth,
            equalize: self.equalize,
            correct_bias: self.bias_correction,
            gptq: self.gptq,
            target: if self.target == "latency" { Target::Latency } else { Target::Size },
            detail: self.report.is_some(),
            budget: self.budget,
        })
    }
}

/// Writes into a file beside `output` first: a killed run leaves no half-written model.
fn write(graph: &Graph, output: &Path) -> Result<()> {
    let folder = match output.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let at = || format!("cannot write {}", output.display());
    let mut builder = tempfile::Builder::new();
    builder.prefix(".shrink").suffix(".onnx");
    // As any other file, not for the owner alone.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let file = builder.tempfile_in(folder).with_context(at)?;
    export(graph, file.path(), &Weights::Inline).with_context(at)?;
    file.as_file().sync_all().with_context(at)?;
    file.persist(output).map_err(|e| e.error).with_context(at)?;
    Ok(())
}

/// The samples in `path`, `batch` to a run where the model leaves that open, and their labels.
fn read_data(graph: &Graph, path: &Path, mut batch: usize, most: usize) -> Result<Data> {
    let signature = Signature::of(graph);
    let only = match &signature.inputs[..] {
        [one] => Some(one.name.as_str()),
        _ => None,
    };
    let arrays = match path.extension().is_some_and(|ending| ending == "csv") {
        true => raw::table(path, &signature)?,
        false => tensors::read(path, only)?,
    };
    let is_input = |name: &String| signature.inputs.iter().any(|b| b.name == *name);
    if let Some((name, _)) = arrays.iter().find(|(name, _)| !is_input(name) && name != "labels") {
        let names = signature.inputs.iter().map(|b| b.name.as_str()).collect::<Vec<_>>().join(", ");
        bail!(
            "{} holds '{name}', which is no input of the model; it has {names}, and 'labels' may be there",
            path.display()
        );
    }
    let mut count: Option<(usize, String)> = None;
    for binding in &signature.inputs {
        let Some((name, array)) = arrays.iter().find(|(name, _)| *name == binding.name) else {
            bail!("{} does not hold input '{}' ({})", path.display(), binding.name, binding.fact);
        };
        let fact = binding.fact.as_tensor().with_context(|| format!("input '{name}' is no tensor"))?;
        let fixed = fact.shape.as_ref().and_then(|dims| dims.first()).and_then(|dim| dim.as_const());
        if let Some(fixed) = fixed.and_then(|fixed| usize::try_from(fixed).ok()) {
            batch = fixed.max(1);
        }
        let Some(&rows) = array.shape().dims().first() else { bail!("'{name}' has no first axis to hold samples") };
        match &count {
            Some((known, other)) if *known != rows => {
                bail!("'{name}' holds {rows} samples, '{other}' {known}")
            }
            _ => count = Some((rows, name.clone())),
        }
    }
    let rows = count.map_or(0, |(rows, _)| rows).min(most);
    let runs = rows / batch;
    if runs == 0 {
        bail!("{} holds {rows} samples, a run takes {batch}", path.display());
    }
    let part = |array: &Tensor, run: usize| -> Result<Tensor> {
        let width = array.bytes().len() / array.shape()[0].max(1);
        let dims = [&[batch], &array.shape().dims()[1..]].concat();
        Ok(Tensor::from_bytes(array.dtype(), dims, &array.bytes()[run * batch * width..][..batch * width])?)
    };
    let sample = |run: usize| -> Result<Sample> {
        let inputs = arrays.iter().filter(|(name, _)| name != "labels" || is_input(name));
        inputs.map(|(name, array)| Ok((name.clone(), part(array, run)?.into()))).collect()
    };
    let samples = (0..runs).map(sample).collect::<Result<Vec<_>>>()?;
    let labels = arrays.iter().find(|(name, _)| name == "labels" && !is_input(name));
    let labels = match labels {
        None => None,
        Some((_, labels)) => {
            let all = cutover::package::numbers(labels).context("'labels': expected numbers")?;
            let total = arrays.iter().find(|(name, _)| is_input(name)).map_or(0, |(_, array)| array.shape()[0]);
            if all.len() != total {
                bail!("'labels' holds {} classes for {total} samples", all.len());
            }
            Some(all.chunks_exact(batch).take(runs).map(|run| run.iter().map(|&l| l as i64).collect()).collect())
        }
    };
    Ok(Data { samples, labels })
}

/// A bar on the terminal, where there is one.
struct Bar(RefCell<ProgressBar>);

impl Bar {
    fn new(hidden: bool) -> Bar {
        let style = ProgressStyle::with_template("{msg:12} {wide_bar} {pos}/{len} {eta}").expect("a template");
        let bar = if hidden { ProgressBar::hidden() } else { ProgressBar::new(0) };
        Bar(RefCell::new(bar.with_style(style)))
    }

    fn show(&self, what: &str, done: usize, of: usize) {
        let bar = self.0.borrow();
        if bar.message() != what {
            bar.reset();
            bar.set_message(what.to_string());
        }
        bar.set_length(of as u64);
        bar.set_position(done as u64);
    }
}

/// All there is to say of a run.
struct Outcome<'a> {
    report: &'a ShrinkReport,
    file_bytes: u64,
    before: Duration,
    after: Duration,
    arguments: &'a Arguments,
}

impl Outcome<'_> {
    fn json(&self) -> Json {
        let ShrinkReport { evaluation, .. } = self.report;
        json!({
            "model": self.arguments.model.display().to_string(),
            "output": self.arguments.output.display().to_string(),
            "method": self.arguments.method,
            "weight_bytes_before": self.report.bytes_before,
            "weight_bytes_after": self.report.bytes_after,
            "file_bytes": self.file_bytes,
            "latency_ms_before": milliseconds(self.before),
            "latency_ms_after": milliseconds(self.after),
            "latency_ratio": self.after.as_secs_f64() / self.before.as_secs_f64(),
            "evaluation": evaluation_json(evaluation),
            "within_budget": self.report.within_budget,
            "smoothed": self.report.smoothed,
            "equalized": self.report.equalized,
            "quantized": self.report.quantized,
            "kept": self.report.kept.iter().map(|k| json!({ "node": k.name, "reason": k.reason })).collect::<Vec<_>>(),
            "sensitivity": self.report.sensitivity.iter()
                .map(|s| json!({ "node": s.node, "sqnr_db": finite(s.sqnr_db) })).collect::<Vec<_>>(),
            "tried": self.report.tried.iter().map(|(kept, bytes, evaluation)| json!({
                "layers_in_floats": kept, "weight_bytes": bytes, "evaluation": evaluation_json(evaluation),
            })).collect::<Vec<_>>(),
        })
    }

    /// What changed: what, before, after, and how they compare.
    fn rows(&self) -> Vec<Vec<String>> {
        let ShrinkReport { bytes_before, bytes_after, evaluation, .. } = self.report;
        let mut rows = vec![
            vec![
                "weights".to_string(),
                bytes(*bytes_before),
                bytes(*bytes_after),
                percent(*bytes_after as f64, *bytes_before as f64),
            ],
            vec![
                "latency, ms".to_string(),
                format!("{:.3}", milliseconds(self.before)),
                format!("{:.3}", milliseconds(self.after)),
                percent(self.after.as_secs_f64(), self.before.as_secs_f64()),
            ],
        ];
        if let Some((before, after)) = evaluation.accuracy {
            let change = format!("{:+.2} points", 100.0 * (after - before));
            rows.push(vec!["accuracy".to_string(), percent(before, 1.0), percent(after, 1.0), change]);
        }
        rows
    }

    fn text(&self) -> String {
        let evaluation = &self.report.evaluation;
        let mut text = table(&["", "before", "after", ""], self.rows(), true);
        let outputs = evaluation.comparison.outputs.iter().map(|o| {
            let agreement = o.top1_agreement.map_or("-".to_string(), |share| percent(share, 1.0));
            vec![o.name.clone(), format!("{:.1}", o.sqnr_db), format!("{:.5}", o.cosine_mean), agreement]
        });
        text += "\n\n";
        text += &table(&["output", "SQNR dB", "mean cosine", "same largest"], outputs.collect(), true);
        text += &format!("\n{} layers quantized, {} kept", self.report.quantized.len(), self.report.kept.len());
        for (reason, count) in reasons(self.report) {
            text += &format!("\n  {count}: {reason}");
        }
        if !self.report.sensitivity.is_empty() {
            text += "\nmost sensitive layers, each quantized alone:";
            for layer in self.report.sensitivity.iter().take(5) {
                text += &format!("\n  {:.1} dB  {}", layer.sqnr_db, layer.node);
            }
        }
        if self.after > self.before && self.arguments.target == "size" {
            text +=
                "\nIt is no faster on this device: --target latency keeps layers in floats where integers win nothing.";
        }
        if !self.report.within_budget {
            text += "\nThe budget is not met, even with every layer in floats that can be.";
        }
        text
    }
}

fn reasons(report: &ShrinkReport) -> Vec<(&str, usize)> {
    let mut reasons: Vec<(&str, usize)> = Vec::new();
    for kept in &report.kept {
        match reasons.iter_mut().find(|(reason, _)| *reason == kept.reason) {
            Some((_, count)) => *count += 1,
            None => reasons.push((&kept.reason, 1)),
        }
    }
    reasons
}

fn evaluation_json(evaluation: &Evaluation) -> Json {
    json!({
        "accuracy_before": evaluation.accuracy.map(|(before, _)| before),
        "accuracy_after": evaluation.accuracy.map(|(_, after)| after),
        "outputs": evaluation.comparison.outputs.iter().map(|o| json!({
            "name": o.name, "sqnr_db": finite(o.sqnr_db), "cosine_mean": o.cosine_mean, "top1_agreement": o.top1_agreement,
            "absolute_error_max": finite(o.absolute_error_max),
        })).collect::<Vec<_>>(),
    })
}

fn percent(part: f64, whole: f64) -> String {
    format!("{:.1} %", 100.0 * part / whole)
}

/// Infinite where nothing differs, which JSON has no number for.
fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
