//! `cutover shrink`.

use super::DeviceArguments;
use crate::{
    Verdict,
    evidence::Evidence,
    output::Printer,
    raw::{self, PreprocessArguments},
    report,
};
use anyhow::{Context, Result, bail};
use cutover::{
    Tensor,
    backend::Signature,
    graph::{
        Graph,
        onnx::{self, ImportOptions, Weights, export, import},
    },
    input::{Preprocessing, Preprocessor},
};
use cutover_shrink::{
    Budget, Data, Sample,
    recipe::{About, Cache, PackStep, Recipe, Step, run},
};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value as Json, json};
use std::{
    cell::Cell,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tempfile::NamedTempFile;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  cutover shrink model.onnx --data calib.npz --method static --budget \"accuracy>=-0.5%\" -o small.onnx\n  \
    cutover shrink model.onnx --data calib.npz --prune-operations 0.5 --method static -o small.cutover --name model --version 2\n  \
    cutover shrink model.onnx --data calib.npz --recipe recipe.toml -o small.onnx\n\
    Exits with 1 if a budget is not met; the nearest that was found is written all the same."
)]
pub(crate) struct Arguments {
    /// The ONNX model.
    model: PathBuf,
    /// Inputs by name, samples along the first axis: .npz, .npy, .safetensors, .json or .csv; 'labels' holds the class of each sample. Or, with
    /// --preprocess, a folder of pictures (in a folder for each class, where classes are known) or a .txt with a text to a line.
    #[arg(long)]
    data: PathBuf,
    /// What to write, an ONNX file or, where it is called .cutover, a package; an existing one is replaced. MODEL.small.onnx in the current folder
    /// if left out; a recipe that packs needs none.
    #[arg(short, long)]
    output: Option<PathBuf>,
    /// The model's name in a package; the file's if left out.
    #[arg(long)]
    name: Option<String>,
    /// The version in a package.
    #[arg(long)]
    version: Option<String>,
    #[command(flatten)]
    work: Work,
}

/// What is done, and on what device: as `shrink` and `convert` take it.
#[derive(clap::Args)]
pub(super) struct Work {
    /// The steps, as TOML, in place of all options about them. docs/shrink.md has them.
    #[arg(long, value_name = "TOML", conflicts_with = "Steps")]
    recipe: Option<PathBuf>,
    #[command(flatten)]
    steps: Steps,
    /// Samples that are not trained on, in a file of the same kind: fine-tuning, 'verify' and what is said at the end are judged by them.
    #[arg(long, value_name = "FILE", requires = "data")]
    held_out: Option<PathBuf>,
    #[command(flatten)]
    preprocess: PreprocessArguments,
    /// Writes a page with plots, all in one HTML file.
    #[arg(long, value_name = "HTML")]
    report: Option<PathBuf>,
    /// Keeps what steps made in this folder; by default in the user's cache.
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// Neither looks up what was done before nor keeps it.
    #[arg(long, conflicts_with = "cache")]
    no_cache: bool,
    /// Samples in a run, where the model leaves that open.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Uses the first so many samples only.
    #[arg(long)]
    samples: Option<usize>,
    #[command(flatten)]
    device: DeviceArguments,
}

/// Steps as options: they come in the order prune, sparsify, fine-tune, quantize. Without any, static quantization.
#[derive(clap::Args, Default, PartialEq)]
struct Steps {
    /// Removes this share of channels, heads and neurons, e.g. 0.5.
    #[arg(long, value_name = "SHARE", value_parser = share)]
    prune_channels: Option<f64>,
    /// Removes as many as leave at most this share of multiplications.
    #[arg(long, value_name = "SHARE", value_parser = share, conflicts_with = "prune_channels")]
    prune_operations: Option<f64>,
    /// Removes as many as leave at most this share of the latency on this device.
    #[arg(long, value_name = "SHARE", value_parser = share, conflicts_with_all = ["prune_channels", "prune_operations"])]
    prune_latency: Option<f64>,
    /// What says that a channel matters: l1 or l2 of its weights, its activation on the data, or taylor, what the loss does without it (in a
    /// program with the feature 'train').
    #[arg(long, value_parser = ["l1", "l2", "activation", "taylor"])]
    criterion: Option<String>,
    /// uniform: every layer loses the same share; global: the least of all.
    #[arg(long, value_parser = ["uniform", "global"])]
    scope: Option<String>,
    /// Channels come out as multiples of this, where layers are large enough.
    #[arg(long, value_name = "N")]
    multiple: Option<usize>,
    /// Prunes channels that layer norms take their mean over, too: what stays is then not what it was, and needs fine-tuning.
    #[arg(long)]
    through_norms: bool,
    /// Sets this share of each layer's weights to zero; of all together with --scope global. Nothing is faster for it.
    #[arg(long, value_name = "SHARE", value_parser = share)]
    zeros: Option<f64>,
    /// Keeps the largest weights of every few in a row, e.g. 2:4.
    #[arg(long, value_name = "N:M", conflicts_with = "zeros")]
    pattern: Option<String>,
    /// Trains for so many passes over the data to answer as the original does; the program has to be built with the feature 'train'.
    #[arg(long, value_name = "EPOCHS")]
    fine_tune: Option<usize>,
    /// Of all that is drawn at random.
    #[arg(long)]
    seed: Option<u64>,
    /// static: integers, ranges from the data; dynamic: integers, ranges in every run; int8 or int4: weights in blocks, activations in
    /// floats; f16 or bf16: weights in 16 bits, widened again.
    #[arg(long, value_parser = ["static", "dynamic", "int8", "int4", "f16", "bf16"])]
    method: Option<String>,
    /// What integers are to lessen; a layer where they do not stays in floats. size: bytes of the file; latency: time of a run, measured on this
    /// device; memory: what the compiled model and a session take on it. size if left out.
    #[arg(long, value_parser = ["size", "latency", "memory"])]
    target: Option<String>,
    /// What must be kept: accuracy>=-0.5%, agreement>=99%, sqnr>=20 or cosine>=0.995. Where something is quantized, the most sensitive layers
    /// go back to floats until it is.
    #[arg(long)]
    budget: Option<Budget>,
    /// How ranges of activations are found: minmax, percentile (with --percentile), entropy or mse.
    #[arg(long, value_parser = ["minmax", "percentile", "entropy", "mse"])]
    calibration: Option<String>,
    /// Share of values within the range, in percent; 99.99 if left out.
    #[arg(long, value_parser = finite)]
    percentile: Option<f64>,
    /// Integers of activations: u8, i8, or i8 with zero point 0.
    #[arg(long, value_parser = ["u8", "i8", "i8-symmetric"])]
    activations: Option<String>,
    /// One scale for a whole weight instead of one for each output channel.
    #[arg(long)]
    per_tensor: bool,
    /// Clips weights to the range of least squared error.
    #[arg(long)]
    clip_weights: bool,
    /// SmoothQuant: moves outliers of activations into weights, 0 to 1; 0.5 is usual.
    #[arg(long, value_name = "STRENGTH", value_parser = finite)]
    smooth: Option<f64>,
    /// Cross-layer equalization of convolutions.
    #[arg(long)]
    equalize: bool,
    /// Bias correction, of static quantization.
    #[arg(long)]
    bias_correction: bool,
    /// GPTQ: rounds weights in blocks by what the data shows.
    #[arg(long)]
    gptq: bool,
    /// Weights in a block, of int8 and int4; 32 if left out.
    #[arg(long)]
    block: Option<usize>,
    /// A node that stays as it is; may be given several times.
    #[arg(long, value_name = "NODE")]
    exclude: Vec<String>,
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let Arguments { model, data, output, name, version, work } = self;
        work.run(&Source { model, data, output, name, version }, printer)
    }
}

/// Which model, on which data, and what is written.
pub(super) struct Source {
    pub model: PathBuf,
    pub data: PathBuf,
    pub output: Option<PathBuf>,
    pub name: Option<String>,
    pub version: Option<String>,
}

impl Work {
    /// Whether any step is asked for.
    pub fn is_asked(&self) -> bool {
        self.recipe.is_some() || self.steps != Steps::default()
    }

    pub fn run(&self, source: &Source, printer: &Printer) -> Result<Verdict> {
        let graph = import(&source.model, &ImportOptions::default())?;
        let recipe = self.recipe(source)?;
        let preprocess = self.preprocess.read()?;
        let data = self.read_data(&graph, &source.data, preprocess.as_ref())?;
        let held_out =
            self.held_out.as_ref().map(|path| self.read_data(&graph, path, preprocess.as_ref())).transpose()?;
        let stem = source.model.file_stem().and_then(|s| s.to_str()).unwrap_or("model");
        let name = source.name.as_deref().unwrap_or(stem).to_string();
        let packed = match recipe.steps.last() {
            Some(Step::Pack(pack)) => Some(pack.output.clone()),
            _ => None,
        };
        let output = source.output.clone().unwrap_or_else(|| format!("{stem}.small.onnx").into());
        // What can't be written is said before the work, not after it.
        for path in [Some(&output), packed.as_ref(), self.report.as_ref()].into_iter().flatten() {
            file_beside(path)?;
        }
        let (preprocessing, tokenizer) = preprocess.unwrap_or_default();
        let about = About { name, preprocessing, tokenizer };
        let backend = self.device.backend.backend(&self.device.options())?;
        let bar = Bar::new(printer.json);
        let shown = |what: &str, done, of| bar.show(what, done, of);
        let (held_out, detail) = (held_out.as_ref(), self.report.is_some());
        let outcome = run(&graph, &about, &recipe, &data, held_out, &backend, &self.cache(), detail, &shown)?;
        bar.bar.finish_and_clear();
        let output = match packed {
            Some(packed) if source.output.as_ref().is_none_or(|output| *output == packed) => packed,
            _ => {
                replace(&output, |path| Ok(export(&outcome.graph, path, &weights(&recipe))?))?;
                output
            }
        };
        let file_bytes = [&source.model, &output].map(|path| bytes_of_files(path));
        let evidence = Evidence { model: &source.model, output: &output, file_bytes, outcome: &outcome };
        if let Some(path) = &self.report {
            let page = report::page(&evidence)?;
            replace(path, |path| Ok(std::fs::write(path, page)?))?;
        }
        printer.print(&evidence.json(), || evidence.text())?;
        Ok(if outcome.within_budget { Verdict::Yes } else { Verdict::No })
    }

    fn read_data(
        &self,
        graph: &Graph,
        path: &Path,
        preprocess: Option<&(Preprocessing, Option<Vec<u8>>)>,
    ) -> Result<Data> {
        let (batch, most) = (self.batch.max(1), self.samples.unwrap_or(usize::MAX));
        if !raw::is_raw(path) {
            return read_data(graph, path, batch, most);
        }
        let signature = Signature::of(graph);
        let dtype = |name: &str| signature.input_dtype(name);
        let preprocessor = match preprocess {
            Some((described, tokenizer)) => Some(Preprocessor::new(described.clone(), tokenizer.as_deref(), dtype)?),
            None => None,
        };
        let made = raw::read(path, most)?;
        let runs = made.len() / batch;
        if runs == 0 {
            bail!("{} holds {} samples, a run takes {batch}", path.display(), made.len());
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

    fn recipe(&self, source: &Source) -> Result<Recipe> {
        let mut recipe = match &self.recipe {
            None => self.steps.recipe()?,
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
                Recipe::parse(&text, &path.display().to_string())?
            }
        };
        let packs = matches!(recipe.steps.last(), Some(Step::Pack(_)));
        match &source.output {
            Some(output) if output.extension().is_some_and(|e| e == "cutover") && !packs => {
                recipe.steps.push(Step::Pack(PackStep {
                    name: source.name.clone(),
                    version: source.version.clone(),
                    description: None,
                    output: output.clone(),
                }));
            }
            _ => {}
        }
        Ok(recipe)
    }

    fn cache(&self) -> Cache {
        match (self.no_cache, &self.cache) {
            (true, _) => Cache::none(),
            (false, Some(folder)) => Cache::new(folder),
            (false, None) => user_cache().map_or_else(Cache::none, |folder| Cache::new(folder.join("cutover/shrink"))),
        }
    }
}

/// Bytes of a model's files, those of external data included; or of any other file.
fn bytes_of_files(path: &Path) -> u64 {
    let files = onnx::files(path, &ImportOptions::default()).unwrap_or_else(|_| vec![path.to_path_buf()]);
    files.iter().filter_map(|file| Some(std::fs::metadata(file).ok()?.len())).sum()
}

/// Where the user's system keeps what can be made again.
fn user_cache() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    match std::env::consts::OS {
        "windows" => folder("LOCALAPPDATA"),
        "macos" => folder("HOME").map(|home| home.join("Library/Caches")),
        _ => folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache"))),
    }
}

impl Steps {
    fn recipe(&self) -> Result<Recipe> {
        let mut steps = Vec::new();
        if self.prune_channels.or(self.prune_operations).or(self.prune_latency).is_some() {
            let options = [
                ("channels", json!(self.prune_channels)),
                ("operations", json!(self.prune_operations)),
                ("latency", json!(self.prune_latency)),
                ("criterion", json!(self.criterion)),
                ("scope", json!(self.scope)),
                ("multiple", json!(self.multiple)),
                ("through-norms", json!(self.through_norms)),
                ("exclude", json!(self.exclude)),
            ];
            steps.push(Step::Prune(step(options)?));
        } else if self.criterion.is_some() || self.multiple.is_some() || self.through_norms {
            bail!(
                "--criterion, --multiple and --through-norms are for pruning: give --prune-operations or another amount"
            );
        }
        if self.zeros.is_some() || self.pattern.is_some() {
            let options = [
                ("ratio", json!(self.zeros)),
                ("pattern", json!(self.pattern)),
                ("scope", json!(self.scope)),
                ("exclude", json!(self.exclude)),
            ];
            steps.push(Step::Sparsify(step(options)?));
        }
        if self.fine_tune.is_some() {
            steps.push(Step::FineTune(step([("epochs", json!(self.fine_tune)), ("seed", json!(self.seed))])?));
        }
        let quantizes = self.method.is_some() || steps.is_empty();
        if quantizes {
            let options = [
                ("method", json!(self.method)),
                ("target", json!(self.target)),
                ("budget", json!(self.budget)),
                ("calibration", json!(self.calibration)),
                ("percentile", json!(self.percentile)),
                ("activations", json!(self.activations)),
                ("per-tensor", json!(self.per_tensor)),
                ("clip-weights", json!(self.clip_weights)),
                ("smooth", json!(self.smooth)),
                ("equalize", json!(self.equalize)),
                ("bias-correction", json!(self.bias_correction)),
                ("gptq", json!(self.gptq)),
                ("block", json!(self.block)),
                ("exclude", json!(self.exclude)),
            ];
            steps.push(Step::Quantize(step(options)?));
        }
        if let (Some(budget), true) = (self.budget, steps.len() > 1 || !quantizes) {
            steps.push(Step::Verify(step([("budget", json!([budget]))])?));
        }
        let recipe = Recipe { seed: self.seed.unwrap_or(0), steps };
        recipe.check().map_err(anyhow::Error::msg)?;
        Ok(recipe)
    }
}

fn finite(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(|| "expected a number".to_string())
}

fn share(text: &str) -> Result<f64, String> {
    finite(text)
        .ok()
        .filter(|share| (0.0..1.0).contains(share))
        .ok_or_else(|| "expected at least 0 and below 1".to_string())
}

/// A step of the options that were given; the others keep their defaults.
fn step<T: DeserializeOwned, const N: usize>(options: [(&str, Json); N]) -> Result<T> {
    let given =
        options.into_iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name.to_string(), value));
    Ok(serde_json::from_value(Json::Object(given.collect::<Map<_, _>>()))?)
}

/// Where weights were set to zero, those that take fewer bytes so are written as sparse ones.
fn weights(recipe: &Recipe) -> Weights {
    let sparse = recipe.steps.iter().any(|step| matches!(step, Step::Sparsify(_)));
    if sparse { Weights::Sparse } else { Weights::Inline }
}

/// A file beside `output`, to take its place once it is whole.
fn file_beside(output: &Path) -> Result<NamedTempFile> {
    let folder = match output.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".shrink").suffix(".tmp");
    // As any other file, not for the owner alone.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder).with_context(|| format!("cannot write {}", output.display()))
}

/// Replaces `output` by what `write` puts into a file beside it: a killed run leaves no half-written one.
fn replace(output: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let at = || format!("cannot write {}", output.display());
    let file = file_beside(output)?;
    write(file.path()).with_context(at)?;
    file.as_file().sync_all().with_context(at)?;
    file.persist(output).map_err(|e| e.error).with_context(at)?;
    Ok(())
}

/// The samples in `path`, `batch` to a run where the model leaves that open, and their labels.
fn read_data(graph: &Graph, path: &Path, mut batch: usize, most: usize) -> Result<Data> {
    let signature = Signature::of(graph);
    let arrays = raw::tensors(path, &signature)?;
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
            if let Some((sample, class)) = all.iter().enumerate().find(|(_, class)| class.fract() != 0.0) {
                bail!("'labels': {class} of sample {sample} is no class: expected whole numbers");
            }
            Some(all.chunks_exact(batch).take(runs).map(|run| run.iter().map(|&l| l as i64).collect()).collect())
        }
    };
    Ok(Data { samples, labels })
}

/// A bar on the terminal; where there is none, a line now and then for who looks into a log.
struct Bar {
    bar: ProgressBar,
    /// When the last line was written; `None` where none are.
    line: Cell<Option<Instant>>,
}

/// From one line of a log to the next.
const LINES_APART: Duration = Duration::from_secs(30);

impl Bar {
    fn new(hidden: bool) -> Bar {
        let style = ProgressStyle::with_template("{msg:12} {wide_bar} {pos}/{len} {eta}").expect("a template");
        let bar = if hidden { ProgressBar::hidden() } else { ProgressBar::new(0) };
        let line = Cell::new((!hidden && bar.is_hidden()).then(Instant::now));
        Bar { bar: bar.with_style(style), line }
    }

    fn show(&self, what: &str, done: usize, of: usize) {
        let bar = &self.bar;
        let activity = |message: &str| message.split(':').next().unwrap_or_default().to_string();
        if activity(&bar.message()) != activity(what) {
            bar.reset();
        }
        bar.set_message(what.to_string());
        bar.set_length(of as u64);
        bar.set_position(done as u64);
        if self.line.get().is_some_and(|last| last.elapsed() >= LINES_APART) {
            self.line.set(Some(Instant::now()));
            eprintln!("{what} {done}/{of}, {} left", HumanDuration(bar.eta()));
        }
    }
}
