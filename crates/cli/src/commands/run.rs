//! `cutover run`.

use super::{DeviceArguments, ModelArguments};
use crate::{
    Verdict,
    output::Printer,
    raw::{self, PreprocessArguments},
    tensors::{self, Named},
};
use anyhow::{Result, bail};
use cutover::{
    Answers, CompiledModel, Session, TensorView, Value,
    backend::{RunContext, RunLimits},
};
use serde_json::{Map, Value as Json};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  cutover run model.onnx --inputs in.npz --outputs out.npz\n  cutover run classifier.cutover --inputs photo.jpg"
)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    device: DeviceArguments,
    /// Tensors by name: .npz, .npy (a model of one input), .safetensors, .json or .csv. Or what they are made of, where a package or
    /// --preprocess says how: a picture, a folder of pictures, or a .txt with a text to a line.
    #[arg(long)]
    inputs: PathBuf,
    #[command(flatten)]
    preprocess: PreprocessArguments,
    /// Where to write the outputs, in any of those formats; printed if left out.
    #[arg(long)]
    outputs: Option<PathBuf>,
    /// Says which backend runs the model, and why that one.
    #[arg(long)]
    verbose: bool,
    /// Bytes that the run may hold.
    #[arg(long, default_value_t = RunLimits::default().arena_bytes)]
    max_memory_bytes: u64,
    /// Iterations of all the model's loops together.
    #[arg(long, default_value_t = RunLimits::default().trips)]
    max_trips: u64,
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let mut opened = self.model.open()?;
        if let Some((described, tokenizer)) = self.preprocess.read()? {
            opened = opened.with_preprocessing(described, tokenizer.as_deref())?;
        }
        let model = opened.compile_with(self.device.backend, &self.device.options())?;
        if self.verbose {
            let nodes = &model.placement().nodes;
            let backends: BTreeSet<&str> = nodes.iter().map(|node| node.backend).collect();
            let chosen = model.choice().map_or(String::new(), |choice| format!("; chosen: {choice}"));
            eprintln!("{} nodes on {}{chosen}", nodes.len(), backends.into_iter().collect::<Vec<_>>().join(" and "));
        }
        let inputs = match raw::is_raw(&self.inputs) {
            true => {
                let samples = raw::read(&self.inputs, usize::MAX)?;
                samples.inputs(opened.preprocessor(), 0..samples.len())?
            }
            false => read_inputs(&model, &self.inputs)?,
        };
        let (arena_bytes, trips) = (self.max_memory_bytes, self.max_trips);
        let limits = RunLimits { arena_bytes, trips, ..RunLimits::default() };
        let answers = run_within(&mut model.session()?, &inputs, limits)?;
        let document: Map<String, Json> = match &self.outputs {
            Some(path) => {
                tensors::write(path, &output_tensors(answers.clone())?)?;
                [("outputs".to_string(), Json::from(path.display().to_string()))].into_iter().collect()
            }
            None => {
                answers.iter().map(|(n, v)| Ok((n.to_string(), tensors::value_to_json(v)?))).collect::<Result<_>>()?
            }
        };
        printer.print(&Json::Object(document), || {
            let mut text = String::new();
            for (name, value) in answers.iter() {
                let Value::Tensor(tensor) = value else {
                    let shown = tensors::value_to_json(value).unwrap_or_default().to_string();
                    let (start, more) =
                        shown.char_indices().nth(400).map_or((&*shown, ""), |(at, _)| (&shown[..at], "…"));
                    text += &format!("{name}: {} {start}{more}\n", value.kind());
                    continue;
                };
                text += &format!("{name}: {tensor:?}");
                if self.outputs.is_none() {
                    let data = tensors::to_json(tensor).map(|j| j["data"].clone()).unwrap_or_default();
                    let items = data.as_array().cloned().unwrap_or_default();
                    let shown: Vec<String> = items.iter().take(16).map(Json::to_string).collect();
                    text += &format!(" [{}{}]", shown.join(", "), if items.len() > 16 { ", …" } else { "" });
                }
                text.push('\n');
            }
            text
        })?;
        Ok(Verdict::Yes)
    }
}

/// The tensors in `path`, whose names must be those of the model's inputs.
pub(super) fn read_inputs(model: &CompiledModel, path: &Path) -> Result<Named> {
    let expected = &model.signature().inputs;
    let mut inputs = raw::tensors(path, model.signature())?;
    if raw::is_table(path) {
        inputs.retain(|(name, _)| name != "labels");
    }
    let names = || expected.iter().map(|b| b.name.as_str()).collect::<Vec<_>>().join(", ");
    if let Some((name, _)) = inputs.iter().find(|(name, _)| !expected.iter().any(|b| b.name == *name)) {
        bail!("{} holds '{name}', which is no input of the model; it has {}", path.display(), names());
    }
    if let Some(missing) = expected.iter().find(|b| !inputs.iter().any(|(name, _)| *name == b.name)) {
        bail!("{} does not hold input '{}' ({})", path.display(), missing.name, missing.fact);
    }
    Ok(inputs)
}

pub(super) fn run(session: &mut Session, inputs: &Named) -> Result<Answers> {
    run_within(session, inputs, RunLimits::default())
}

fn run_within(session: &mut Session, inputs: &Named, limits: RunLimits) -> Result<Answers> {
    let views: Vec<(&str, TensorView<'_>)> =
        inputs.iter().map(|(name, tensor)| (name.as_str(), tensor.view())).collect();
    Ok(session.run_with(views, &RunContext { limits, ..RunContext::default() })?)
}

/// What a run gave as tensors. Maps, and sequences of them, are tables of their values, in the order of the keys.
pub(super) fn output_tensors(answers: Answers) -> Result<Named> {
    let tensor = |(name, value): (String, Value)| match value {
        Value::Tensor(tensor) => Ok((name, tensor)),
        other => match other.as_table() {
            Some((_, table)) => Ok((name, table)),
            None => bail!("output '{name}' is a {}, and only tensors and maps can be written", other.kind()),
        },
    };
    answers.into_iter().map(tensor).collect()
}
