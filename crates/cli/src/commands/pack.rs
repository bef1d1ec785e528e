//! `cutover pack`.

use super::convert::golden;
use crate::{
    Verdict,
    output::{Printer, bytes},
    raw::PreprocessArguments,
    tensors::{self, Named},
};
use anyhow::{Context, Result, bail};
use cutover::{
    DType, Device, Model, Tensor,
    graph::{
        Graph,
        onnx::{ImportOptions, import},
    },
    monitor::Gates,
    package::{
        Contents, Distribution, Golden, GoldenTolerance, Manifest, Package, Profile, Resources, TensorSchema, file,
        write,
    },
};
use serde_json::json;
use std::{fs, path::PathBuf};

#[derive(clap::Args)]
#[command(
    after_help = "Example: cutover pack digits.onnx -o digits-2.cutover --name digits --version 2 --description \"half as wide\" \
    --labels probabilities=0,1,2,3,4,5,6,7,8,9 --range image=0:1 --profile training.npz --security-epoch 3\n\n\
    A folder as `cutover unpack` writes it is packed again: what its manifest says stays unless an option says otherwise, and digests are \
    those of the files as they are now."
)]
pub(crate) struct Arguments {
    /// An ONNX model, or the folder of an unpacked package.
    model: PathBuf,
    /// The package to write; an existing one is replaced.
    #[arg(short, long)]
    output: PathBuf,
    /// The model's name, which all its versions share; the file's if left out.
    #[arg(long)]
    name: Option<String>,
    #[arg(long)]
    version: Option<String>,
    /// What it is and who to ask, for people.
    #[arg(long)]
    description: Option<String>,
    /// Never goes down on a device.
    #[arg(long)]
    security_epoch: Option<u64>,
    /// Inputs of the golden vectors: .npz, .npy, .safetensors or .json; made up if left out.
    #[arg(long)]
    golden: Option<PathBuf>,
    /// How close the golden answers must come, for all backends or for one.
    #[arg(long = "tolerance", value_name = "[BACKEND=]RTOL:ATOL", value_parser = tolerance)]
    tolerances: Vec<(Option<String>, GoldenTolerance)>,
    /// What the classes of an output are called, in order.
    #[arg(long, value_name = "OUTPUT=NAME,NAME,…", value_parser = labels)]
    labels: Vec<(String, Vec<String>)>,
    /// Least and largest element that the model is meant for.
    #[arg(long = "range", value_name = "TENSOR=MIN:MAX", value_parser = range)]
    ranges: Vec<(String, [f64; 2])>,
    /// What a rollout of this version is judged by, as JSON, e.g. {"accuracy_drop_max": 0.01}.
    #[arg(long, value_name = "JSON", value_parser = gates)]
    gates: Option<Gates>,
    /// A device that takes longer for the median request on the golden inputs does not admit it.
    #[arg(long, value_name = "MS")]
    latency_ms_max: Option<f64>,
    /// Training data by input name, to be summed up in profile.json; a tensor called `label` holds the classes.
    #[arg(long)]
    profile: Option<PathBuf>,
    #[command(flatten)]
    preprocess: PreprocessArguments,
}

fn tolerance(text: &str) -> Result<(Option<String>, GoldenTolerance), String> {
    let (backend, numbers) = match text.split_once('=') {
        Some((backend, numbers)) => (Some(backend.to_string()), numbers),
        None => (None, text),
    };
    let [rtol, atol] = pair(numbers).ok_or_else(|| format!("'{text}': expected e.g. 1e-3:1e-4 or cpu=1e-3:1e-4"))?;
    Ok((backend, GoldenTolerance { rtol, atol }))
}

fn labels(text: &str) -> Result<(String, Vec<String>), String> {
    let (name, labels) = text.split_once('=').ok_or_else(|| format!("'{text}': expected e.g. scores=cat,dog"))?;
    Ok((name.to_string(), labels.split(',').map(|label| label.trim().to_string()).collect()))
}

fn range(text: &str) -> Result<(String, [f64; 2]), String> {
    let found = text.split_once('=').and_then(|(name, numbers)| Some((name.to_string(), pair(numbers)?)));
    found.ok_or_else(|| format!("'{text}': expected e.g. image=0:1"))
}

fn pair(text: &str) -> Option<[f64; 2]> {
    let (a, b) = text.split_once(':')?;
    Some([a.parse().ok()?, b.parse().ok()?])
}

fn gates(text: &str) -> Result<Gates, String> {
    let gates: Gates = serde_json::from_str(text).map_err(|error| error.to_string())?;
    gates.check().map(|()| gates)
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let before = self.unpacked()?;
        let path = if self.model.is_dir() { self.model.join(file::MODEL) } else { self.model.clone() };
        let graph = import(&path, &ImportOptions::default())?;
        let mut manifest = self.manifest(&graph, before.as_ref())?;
        let kept = self.model.join(file::GOLDEN);
        let (golden, note) = match &self.golden {
            // Answers are kept where the weights they were given by are.
            None if before.is_some() && kept.is_file() => (Golden::decode(&fs::read(&kept)?)?, None),
            inputs => golden(&graph, inputs.as_deref()).context("golden vectors")?,
        };
        let profile = self.profile(&graph)?;
        let tokenizer = match self.preprocess.read()? {
            Some((described, tokenizer)) => {
                manifest.preprocessing = described;
                tokenizer
            }
            None => {
                let kept = self.model.join(file::TOKENIZER);
                if kept.is_file() { Some(fs::read(kept)?) } else { None }
            }
        };
        let (profile, tokenizer) = (profile.as_ref(), tokenizer.as_deref());
        let contents = Contents { graph: &graph, manifest, golden: &golden, profile, tokenizer };
        let manifest = write(&contents, &self.output)?;
        // As a device will find it.
        let package = Package::open(&self.output)?;
        package.graph(&ImportOptions::default())?;
        let total: u64 = manifest.files.values().map(|f| f.bytes).sum();
        let document = json!({
            "output": self.output.display().to_string(), "manifest": manifest, "bytes": total, "golden": note,
        });
        printer.print(&document, || {
            let line = format!(
                "{}: {} version {}, {} tensors, {}",
                self.output.display(),
                manifest.name,
                manifest.version,
                manifest.tensors.len(),
                bytes(total)
            );
            [Some(line), note].into_iter().flatten().collect::<Vec<_>>().join("\n")
        })?;
        Ok(Verdict::Yes)
    }

    /// The manifest of an unpacked folder.
    fn unpacked(&self) -> Result<Option<Manifest>> {
        let path = self.model.join(file::MANIFEST);
        if !self.model.is_dir() {
            return Ok(None);
        }
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Some(Manifest::parse(&text)?))
    }

    fn manifest(&self, graph: &Graph, before: Option<&Manifest>) -> Result<Manifest> {
        let stem = || self.model.file_stem().and_then(|s| s.to_str()).map(str::to_string);
        let name =
            self.name.clone().or(before.map(|m| m.name.clone())).or_else(stem).context("give the model's --name")?;
        let version = self.version.clone().or(before.map(|m| m.version.clone())).unwrap_or_else(|| "1".to_string());
        let mut manifest = Manifest::of(graph, &name, &version)?;
        if let Some(before) = before {
            manifest.description.clone_from(&before.description);
            (manifest.security_epoch, manifest.golden, manifest.gates) =
                (before.security_epoch, before.golden, before.gates);
            manifest.golden_on.clone_from(&before.golden_on);
            manifest.preprocessing.clone_from(&before.preprocessing);
            for schema in manifest.inputs.iter_mut().chain(&mut manifest.outputs) {
                if let Some(old) = before.inputs.iter().chain(&before.outputs).find(|old| old.name == schema.name) {
                    (schema.range, schema.labels) = (old.range, old.labels.clone());
                }
            }
        }
        manifest.description = self.description.clone().or(manifest.description);
        manifest.security_epoch = self.security_epoch.unwrap_or(manifest.security_epoch);
        manifest.gates = self.gates.or(manifest.gates);
        for (backend, tolerance) in &self.tolerances {
            match backend {
                Some(backend) if Device::NAMES.contains(&backend.as_str()) => {
                    manifest.golden_on.insert(backend.clone(), *tolerance);
                }
                Some(backend) => {
                    bail!("--tolerance: there is no backend '{backend}'; there is {}", Device::NAMES.join(", "))
                }
                None => manifest.golden = *tolerance,
            }
        }
        for (name, range) in &self.ranges {
            find(&mut manifest, name, "--range")?.range = Some(*range);
        }
        for (name, labels) in &self.labels {
            find(&mut manifest, name, "--labels")?.labels.clone_from(labels);
        }
        let compiled = Model::from_graph(graph.clone(), &Default::default())?.compile(Device::Auto)?;
        let footprint = compiled.executable().footprint();
        let old = before.and_then(|before| before.resources).and_then(|resources| resources.latency_ms_max);
        manifest.resources = Some(Resources {
            weight_bytes: footprint.weight_bytes,
            session_bytes: footprint.session_bytes,
            latency_ms_max: self.latency_ms_max.or(old),
        });
        Ok(manifest)
    }

    fn profile(&self, graph: &Graph) -> Result<Option<Profile>> {
        let Some(path) = &self.profile else {
            let kept = self.model.join(file::PROFILE);
            return Ok(if kept.is_file() { Some(Profile::parse(&fs::read(kept)?)?) } else { None });
        };
        let data: Named = tensors::read(path, None)?;
        let mut profile = Profile::default();
        for (name, tensor) in &data {
            let values = numbers(tensor).with_context(|| format!("--profile: '{name}' holds no numbers"))?;
            if name == "label" {
                profile.samples = values.len() as u64;
                let mut counts: Vec<f64> = Vec::new();
                for value in &values {
                    let class = *value as usize;
                    if *value < 0.0 || value.fract() != 0.0 || class >= 1 << 16 {
                        bail!("--profile: 'label' holds {value}, which is no class");
                    }
                    counts.resize(counts.len().max(class + 1), 0.0);
                    counts[class] += 1.0;
                }
                profile.classes = counts.iter().map(|count| count / values.len() as f64).collect();
                continue;
            }
            if !graph.inputs().iter().any(|&id| graph.value(id).name == *name) {
                bail!("--profile: '{name}' is no input of the model");
            }
            profile.samples = profile.samples.max(tensor.shape().first().copied().unwrap_or(1) as u64);
            let distribution = Distribution::of(values).with_context(|| format!("--profile: '{name}' is empty"))?;
            profile.inputs.insert(name.clone(), distribution);
        }
        Ok(Some(profile))
    }
}

fn find<'a>(manifest: &'a mut Manifest, name: &str, option: &str) -> Result<&'a mut TensorSchema> {
    let mut all = manifest.inputs.iter_mut().chain(&mut manifest.outputs);
    all.find(|schema| schema.name == name)
        .with_context(|| format!("{option}: the model has no input or output '{name}'"))
}

fn numbers(tensor: &Tensor) -> Option<Vec<f64>> {
    fn wide<T: Into<f64>>(values: Vec<T>) -> Vec<f64> {
        values.into_iter().map(Into::into).collect()
    }
    Some(match tensor.dtype() {
        DType::F32 => wide(tensor.to_vec::<f32>().ok()?),
        DType::F64 => tensor.to_vec::<f64>().ok()?,
        DType::I64 => tensor.to_vec::<i64>().ok()?.into_iter().map(|v| v as f64).collect(),
        DType::I32 => wide(tensor.to_vec::<i32>().ok()?),
        DType::U8 => wide(tensor.to_vec::<u8>().ok()?),
        _ => return None,
    })
}
