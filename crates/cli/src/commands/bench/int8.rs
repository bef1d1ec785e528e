//! A model in integers, for `--precision int8`: made once, before anything is measured, by what suits it.
//!
//! Convolutions need known ranges: a model that has some is calibrated on the made-up inputs, which costs no speed and makes the answers
//! worthless. Others are quantized dynamically, as they are in practice. Who wants to know what is lost uses `cutover shrink`.

use super::one::LADDER;
use crate::made_up::{first_that_runs, parse_shapes};
use anyhow::{Context, Result, bail};
use cutover::{
    Device, DeviceOptions, Model, Value,
    graph::{
        Graph,
        onnx::{Weights, export},
        passes::PassOptions,
    },
};
use cutover_shrink::{
    Product, ProductKind, observe, plain,
    quantize::{DynamicOptions, StaticOptions, quantize_dynamic, quantize_static, static_questions},
};
use std::path::Path;

/// Writes the model at `path` in integers to `target`, and says how that was done.
pub(super) fn quantize(model: &Model, shapes: &[String], seed: u64, target: &Path) -> Result<String> {
    let graph = plain(model.graph().clone())?;
    let is_integer = |name: &str| name.contains("Quantize") || name.contains("Integer") || name.starts_with("QLinear");
    if let Some((_, node)) = graph.nodes().find(|(_, node)| is_integer(&node.op.name())) {
        bail!("the model is in integers already ('{}', {}): f32 runs it as it is", node.name, node.op.name());
    }
    let has_convolution = Product::all(&graph).iter().any(|p| matches!(p.kind, ProductKind::Conv { .. }));
    let ((graph, report), how) = match has_convolution {
        true => (calibrated(graph, shapes, seed)?, "static, ranges of made-up inputs"),
        false => (quantize_dynamic(graph, &DynamicOptions::default())?, "dynamic"),
    };
    if report.quantized.is_empty() {
        let reason = report.kept.first().map_or("it has no products by weights", |kept| &kept.reason);
        bail!("nothing of it can be quantized: {reason}");
    }
    export(&graph, target, &Weights::Inline)?;
    Ok(format!("int8: {how}, {} layers, {} stay in floats", report.quantized.len(), report.kept.len()))
}

fn calibrated(graph: Graph, shapes: &[String], seed: u64) -> Result<(Graph, cutover_shrink::quantize::QuantizeReport)> {
    let options = StaticOptions::default();
    let backend = Device::Cpu.backend(&DeviceOptions::default())?;
    let model = Model::from_graph(graph.clone(), &PassOptions::default())?;
    let compiled = model.compile_on(&*backend, &Default::default())?;
    let bindings = &compiled.signature().inputs;
    let given = parse_shapes(shapes, bindings)?;
    let run = |inputs: &_| Ok(compiled.session()?.run(super::one::views(inputs)).map(drop)?);
    let (made_up, ()) = first_that_runs(bindings, &given, seed, LADDER, run).context("calibration")?;
    let sample = made_up.inputs.into_iter().map(|(name, tensor)| (name, Value::Tensor(tensor))).collect();
    let questions = static_questions(&graph, &options.exclude)?;
    let seen = observe(&graph, &questions, false, &backend, &[sample], &|_, _, _| {})?;
    Ok(quantize_static(graph, &seen, &options)?)
}
