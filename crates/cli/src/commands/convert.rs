//! `cutover convert`.

use super::bench::{Random, random_tensor};
use crate::{
    Verdict,
    output::{Printer, bytes},
    tensors::{self, Named},
};
use anyhow::{Context, Result, bail};
use cutover::{
    Device, Model,
    graph::{
        Bindings, Graph,
        onnx::{ImportOptions, import},
    },
    package::{Contents, Golden, Manifest, write},
};
use serde_json::json;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

#[derive(clap::Args)]
#[command(after_help = "Example: cutover convert model.onnx -o model.cutover --version 2.1.0 --golden in.npz")]
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
    /// Inputs of the golden vectors: .npz, .npy, .safetensors or .json; made up if left out, with what varies at 2.
    #[arg(long)]
    golden: Option<PathBuf>,
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => self.model.file_stem().and_then(|s| s.to_str()).context("give the model's --name")?.to_string(),
        };
        let inputs = self.golden.as_deref();
        let manifest = convert(&self.model, &self.output, &name, &self.version, inputs)?;
        let total: u64 = manifest.files.values().map(|f| f.bytes).sum();
        let document = json!({ "output": self.output.display().to_string(), "manifest": manifest, "bytes": total });
        printer.print(&document, || {
            let tensors = manifest.tensors.len();
            format!("{}: {name} version {}, {tensors} tensors, {}", self.output.display(), self.version, bytes(total))
        })?;
        Ok(Verdict::Yes)
    }
}

/// Writes the ONNX model at `model` as a package, with golden vectors of what the reference backend answers.
pub(crate) fn convert(
    model: &Path,
    output: &Path,
    name: &str,
    version: &str,
    inputs: Option<&Path>,
) -> Result<Manifest> {
    let graph = import(model, &ImportOptions::default())?;
    let manifest = Manifest::of(&graph, name, version)?;
    let inputs = match inputs {
        Some(path) => tensors::read(path, graph.inputs().first().map(|&id| graph.value(id).name.as_str()))?,
        None => made_up(&graph)?,
    };
    let golden = golden(&graph, inputs).context("golden vectors")?;
    Ok(write(&Contents { graph: &graph, manifest, golden: &golden }, output)?)
}

/// One set of inputs of the declared shapes, symbols at 2 (so that a mistake about batches shows).
fn made_up(graph: &Graph) -> Result<Named> {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut inputs = Vec::new();
    for &id in graph.inputs() {
        let value = graph.value(id);
        let fact = value.fact.as_tensor().with_context(|| format!("input '{}' is a {}", value.name, value.fact))?;
        let Some(dims) = &fact.shape else { bail!("input '{}' has no declared rank: give --golden", value.name) };
        let mut symbols = BTreeSet::new();
        dims.iter().for_each(|d| d.collect_symbols(&mut symbols));
        // Extents of images and sequences must survive some halving.
        let bound: Bindings = symbols.into_iter().map(|s| (s, 2)).collect();
        let bound: Bindings =
            bound.into_iter().map(|(s, v)| if is_spatial(&s, dims) { (s, 32) } else { (s, v) }).collect();
        let extent = |d: &cutover::graph::Dim| d.eval(&bound).and_then(|v| usize::try_from(v).ok());
        let shape = dims.iter().map(extent).collect::<Option<Vec<_>>>();
        let shape = shape.with_context(|| format!("input '{}': give --golden", value.name))?;
        inputs.push((value.name.clone(), random_tensor(&value.name, fact.dtype, shape, &mut random)?));
    }
    Ok(inputs)
}

/// Whether `symbol` is one of the last two axes of an image `[n, c, h, w]`.
fn is_spatial(symbol: &str, dims: &[cutover::graph::Dim]) -> bool {
    dims.len() >= 4 && dims[2..].iter().any(|d| d.as_symbol().is_some_and(|s| &**s == symbol))
}

fn golden(graph: &Graph, inputs: Named) -> Result<Golden> {
    // Integers below 1000 may be no valid index of a small model: then all are 0.
    let run = |inputs: &Named| -> Result<_> {
        let model = Model::from_graph(graph.clone(), &Default::default())?.compile(Device::Reference)?;
        super::run::output_tensors(super::run::run(&mut model.session()?, inputs)?)
    };
    let (inputs, outputs) = match run(&inputs) {
        Ok(outputs) => (inputs, outputs),
        Err(first) => {
            let zeroed = |(name, tensor): (String, cutover::Tensor)| {
                let keep = tensor.dtype().is_float();
                let tensor =
                    if keep { tensor } else { cutover::Tensor::zeros(tensor.dtype(), tensor.shape().clone())? };
                Ok((name, tensor))
            };
            let inputs = inputs.into_iter().map(zeroed).collect::<Result<Named>>()?;
            let outputs =
                run(&inputs).map_err(|_| first).context("the model does not run on made-up inputs; give --golden")?;
            (inputs, outputs)
        }
    };
    Ok(Golden { inputs, outputs })
}
