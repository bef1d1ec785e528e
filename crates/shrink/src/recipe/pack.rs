//! The package: what the original answers is what the small model must come close to.

use super::{About, Measured, PackStep};
use crate::{
    Data, Sample, ShrinkError,
    runner::{Runner, opened},
};
use cutover_backend::{Backend, CompileOptions, RunContext, reference};
use cutover_graph::{Graph, Plan};
use cutover_package::{
    Contents, Distribution, Golden, GoldenTolerance, Manifest, Profile, Resources, ShrinkSummary, numbers, write,
};
use cutover_tensor::{DType, Tensor, Value};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What the original answers to a sample, and how far the small model's answers are from that, both on the reference backend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    /// As a package holds them.
    golden: Vec<u8>,
    /// The largest `|small − original|` of any element.
    pub largest_error: f64,
}

/// A device rounds differently: its answers may be this much farther from the original's than the reference's are.
const MARGIN: f64 = 1.5;

pub(super) fn answers(original: &Graph, small: &Graph, sample: &Sample) -> Result<Answers, ShrinkError> {
    let given = |graph: &Graph| -> Result<Vec<(String, Tensor)>, ShrinkError> {
        let mut runner = Runner::new(graph, &reference())?;
        let values = runner.run(sample, 0, &RunContext::default())?;
        let names = runner.outputs().iter().map(|output| output.name.clone());
        let tensor = |(name, value)| match value {
            // The file of golden vectors has no strings.
            Value::Tensor(tensor) if tensor.dtype() != DType::String => Some((name, tensor)),
            _ => None,
        };
        Ok(names.zip(values).filter_map(tensor).collect())
    };
    let (outputs, after) = (given(original)?, given(small)?);
    let mut largest_error: f64 = 0.0;
    for ((_, x), (_, y)) in outputs.iter().zip(&after) {
        let (Some(x), Some(y)) = (numbers(x), numbers(y)) else { continue };
        let errors = x.iter().zip(&y).map(|(a, b)| (a - b).abs()).filter(|e| e.is_finite());
        largest_error = errors.fold(largest_error, f64::max);
    }
    let input = |(name, value): &(String, Value)| match value {
        Value::Tensor(tensor) => Some((name.clone(), tensor.clone())),
        _ => None,
    };
    let inputs = sample.iter().filter_map(input).collect();
    Ok(Answers { golden: Golden { inputs, outputs }.encode(), largest_error })
}

/// Writes the package; an existing one is replaced once all of it is written.
pub(super) fn write_package(
    step: &PackStep,
    about: &About,
    graph: &Graph,
    answers: &Answers,
    data: &Data,
    measured: &Measured,
    steps: &[&str],
    backend: &Arc<dyn Backend>,
) -> Result<Manifest, ShrinkError> {
    let name = step.name.as_deref().unwrap_or(&about.name);
    let mut manifest = Manifest::of(graph, name, step.version.as_deref().unwrap_or("1"))?;
    manifest.description.clone_from(&step.description);
    manifest.preprocessing.clone_from(&about.preprocessing);
    let tolerance = GoldenTolerance::default();
    manifest.golden = GoldenTolerance { atol: tolerance.atol.max(MARGIN * answers.largest_error), ..tolerance };
    let footprint = backend.compile(&Plan::new(opened(graph)?)?, &CompileOptions::default())?.footprint();
    manifest.resources = Some(Resources {
        weight_bytes: footprint.weight_bytes,
        session_bytes: footprint.session_bytes,
        latency_ms_max: None,
    });
    let outputs = &measured.evaluation.comparison.outputs;
    let finite = |value: f64| value.is_finite().then_some(value);
    manifest.shrink = Some(ShrinkSummary {
        steps: steps.iter().map(|step| step.to_string()).collect(),
        samples: measured.evaluation.comparison.samples as u64,
        weight_bytes: measured.weight_bytes,
        parameters: measured.parameters,
        operations: measured.operations,
        memory_bytes: measured.memory_bytes,
        latency_ms: measured.latency_ms,
        accuracy: measured.evaluation.accuracy.map(|(before, after)| [before, after]),
        sqnr_db: outputs.iter().filter_map(|o| finite(o.sqnr_db)).reduce(f64::min),
        cosine: outputs.iter().map(|o| o.cosine_mean).reduce(f64::min),
        agreement: outputs.iter().filter_map(|o| o.top1_agreement).reduce(f64::min),
    });
    let golden = Golden::decode(&answers.golden)?;
    let profile = profile(data);
    let (profile, tokenizer) = (Some(&profile), about.tokenizer.as_deref());
    Ok(write(&Contents { graph, manifest, golden: &golden, profile, tokenizer }, &step.output)?)
}

/// A summary of the data, no sample of it.
fn profile(data: &Data) -> Profile {
    let mut profile = Profile::default();
    let names = data.samples.first().into_iter().flatten().map(|(name, _)| name);
    for name in names {
        let own = data.samples.iter().flatten().filter(|(other, _)| other == name);
        let tensors = own.filter_map(|(_, value)| if let Value::Tensor(tensor) = value { Some(tensor) } else { None });
        let rows: usize = tensors.clone().map(|t| t.shape().first().copied().unwrap_or(1)).sum();
        profile.samples = profile.samples.max(rows as u64);
        if let Some(distribution) = Distribution::of(tensors.filter_map(numbers).flatten()) {
            profile.inputs.insert(name.clone(), distribution);
        }
    }
    let labels: Vec<usize> =
        data.labels.iter().flatten().flatten().filter_map(|&label| usize::try_from(label).ok()).collect();
    let classes = labels.iter().max().map_or(0, |most| most + 1);
    if classes <= 1 << 16 {
        profile.classes = vec![0.0; classes];
        labels.iter().for_each(|&label| profile.classes[label] += 1.0 / labels.len() as f64);
    }
    profile
}
