//! `cutover inspect`.

use super::{DeviceArguments, ModelArguments, choice_json, device_of};
use crate::{
    Verdict,
    output::{Printer, bytes, table},
};
use anyhow::Result;
use cutover::{
    Device, Model,
    backend::{Placement, Signature},
    package::{Manifest, Package, Profile},
};
use serde_json::{Value as Json, json};
use std::collections::BTreeMap;

#[derive(clap::Args)]
#[command(after_help = "Example: cutover inspect model.onnx")]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    device: DeviceArguments,
    /// Lists every step of the graph's rewriting by its number, for --stop-after.
    #[arg(long)]
    passes: bool,
    /// Lists every node with the kernel that runs it.
    #[arg(long)]
    nodes: bool,
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let model = self.model.open()?;
        let graph = model.graph();
        let signature = model.signature();
        let package = match model.manifest() {
            Some(manifest) => Some((manifest, Package::open(&self.model.model)?.profile()?)),
            None => None,
        };
        let mut ops: BTreeMap<String, usize> = BTreeMap::new();
        graph.nodes().for_each(|(_, node)| *ops.entry(node.op.name()).or_default() += 1);
        let constants = graph.values().filter_map(|(id, _)| graph.constant(id));
        let (parameters, weight_bytes) = constants.fold((0u64, 0u64), |(count, bytes), constant| {
            (count + constant.tensor.element_count() as u64, bytes + constant.tensor.bytes().len() as u64)
        });
        let devices = match self.device.backend {
            Device::Auto => vec![Device::Auto, Device::Reference],
            one => vec![one],
        };
        let mut backends = Vec::new();
        for device in devices {
            let backend = device.backend(&self.device.options())?;
            let compiled = model.compile_on(&*backend, &self.device.options().compile);
            let info = compiled.as_ref().map_or_else(|_| backend.describe(), |compiled| device_of(compiled, &*backend));
            backends.push((info, compiled));
        }
        let placed = |placement: &Placement| -> BTreeMap<String, usize> {
            let mut kernels = BTreeMap::new();
            placement.nodes.iter().for_each(|n| *kernels.entry(kernel(&n.kernel)).or_default() += 1);
            kernels
        };
        let document = json!({
            "model": self.model.name(),
            "name": graph.name,
            "version": model.manifest().map(|m| &m.version),
            "package": package.as_ref().map(|(manifest, profile)| json!({ "manifest": manifest, "profile": profile })),
            "inputs": bindings(&signature.inputs),
            "outputs": bindings(&signature.outputs),
            "nodes": graph.node_count(),
            "nodes_imported": model.passes().nodes_before,
            "ops": ops,
            "parameters": parameters,
            "weight_bytes": weight_bytes,
            "passes": self.passes.then(|| steps(&model)),
            "backends": backends.iter().map(|(info, compiled)| match compiled {
                Ok(compiled) => json!({
                    "backend": info.backend,
                    "device": info.device,
                    "isa": info.isa,
                    "threads": info.threads,
                    "choice": choice_json(compiled),
                    "kernels": placed(compiled.placement()),
                    "footprint_bytes": { "weights": compiled.executable().footprint().weight_bytes,
                        "session": compiled.executable().footprint().session_bytes },
                    "nodes": self.nodes.then(|| nodes(compiled.placement())),
                }),
                Err(error) => json!({ "backend": info.backend, "error": error.to_string() }),
            }).collect::<Vec<_>>(),
        });
        printer.print(&document, || {
            let mut text = format!("{} ({})\n", self.model.name(), graph.name);
            text += &format!("{} parameters, {} of weights\n", parameters, bytes(weight_bytes));
            text += &format!("{} nodes, {} as imported\n\n", graph.node_count(), model.passes().nodes_before);
            if let Some((manifest, profile)) = &package {
                text += &format!("{}\n\n", package_table(manifest, profile.as_ref()));
            }
            text += &signature_table(&signature);
            let rows = ops.iter().map(|(op, count)| vec![op.clone(), count.to_string()]).collect();
            text += &format!("\n\n{}\n", table(&["operator", "nodes"], rows, true));
            for (info, compiled) in &backends {
                text += &format!("\n{} on {} ({}, {} threads): ", info.backend, info.device, info.isa, info.threads);
                match compiled {
                    Err(error) => text += &format!("can't: {error}\n"),
                    Ok(compiled) => {
                        let footprint = compiled.executable().footprint();
                        text += &format!(
                            "{} of weights, {} for a session\n",
                            bytes(footprint.weight_bytes),
                            bytes(footprint.session_bytes)
                        );
                        if let Some(choice) = compiled.choice() {
                            text += &format!("chosen: {choice}\n");
                        }
                        let rows =
                            placed(compiled.placement()).into_iter().map(|(k, n)| vec![k, n.to_string()]).collect();
                        text += &table(&["kernel", "nodes"], rows, true);
                        let node = |n: &cutover::backend::PlacedNode| {
                            vec![n.node.clone(), n.op.clone(), n.kernel.clone(), n.dtype.clone(), n.reason.clone()]
                        };
                        if self.nodes {
                            let rows = compiled.placement().nodes.iter().map(node).collect();
                            text +=
                                &format!("\n{}", table(&["node", "operator", "kernel", "type", "why"], rows, false));
                        }
                        text.push('\n');
                    }
                }
            }
            if self.passes {
                let rows =
                    model.passes().steps.iter().enumerate().map(|(i, s)| {
                        vec![(i + 1).to_string(), s.pass.to_string(), s.node.clone(), s.description.clone()]
                    });
                text += &format!("\n{}\n", table(&["step", "pass", "node", "what"], rows.collect(), false));
            }
            text
        })?;
        Ok(Verdict::Yes)
    }
}

/// What the manifest says beyond the model itself. That files and tensors are what it says was found when it was opened.
fn package_table(manifest: &Manifest, profile: Option<&Profile>) -> String {
    let row = |name: &str, value: String| vec![name.to_string(), value];
    let mut rows = vec![
        row("package", format!("{} version {}, format {}", manifest.name, manifest.version, manifest.format)),
        row("description", manifest.description.clone().unwrap_or_else(|| "-".to_string())),
        row("security epoch", manifest.security_epoch.to_string()),
    ];
    for (name, file) in &manifest.files {
        rows.push(row(name, format!("{}, blake3 {}…", bytes(file.bytes), &file.blake3[..file.blake3.len().min(16)])));
    }
    rows.push(row("tensors with a digest each", manifest.tensors.len().to_string()));
    for schema in manifest.inputs.iter().chain(&manifest.outputs) {
        if let Some([low, high]) = schema.range {
            rows.push(row(&format!("range of {}", schema.name), format!("{low} to {high}")));
        }
        if !schema.labels.is_empty() {
            rows.push(row(&format!("labels of {}", schema.name), schema.labels.join(", ")));
        }
    }
    let backends = manifest.golden_on.iter().map(|(backend, t)| (backend.as_str(), t));
    for (backend, t) in [("all backends", &manifest.golden)].into_iter().chain(backends) {
        rows.push(row(&format!("golden tolerance, {backend}"), format!("{} + {} · |expected|", t.atol, t.rtol)));
    }
    if let Some(resources) = &manifest.resources {
        let limit = resources.latency_ms_max.map_or(String::new(), |ms| format!(", at most {ms} ms a request"));
        let needs = format!(
            "{} of weights, {} a session{limit}",
            bytes(resources.weight_bytes),
            bytes(resources.session_bytes)
        );
        rows.push(row("needs", needs));
    }
    if let Some(gates) = &manifest.gates {
        rows.push(row("gates", serde_json::to_string(gates).unwrap_or_default()));
    }
    for name in manifest.preprocessing.names() {
        let picture = manifest.preprocessing.pictures.iter().any(|picture| picture.input == name);
        rows.push(row(
            &format!("made of a {}", if picture { "picture" } else { "text" }),
            format!("{name}, as the manifest describes"),
        ));
    }
    if let Some(profile) = profile {
        rows.push(row("training data", format!("{} samples, {} classes", profile.samples, profile.classes.len())));
        for (name, d) in &profile.inputs {
            let line = format!("{} to {}, mean {:.4}, deviation {:.4}", d.min, d.max, d.mean, d.deviation);
            rows.push(row(&format!("training data, {name}"), line));
        }
    }
    table(&["", "value"], rows, false)
}

/// Kernels that are fused into different nodes are one line of the summary.
fn kernel(name: &str) -> String {
    match name.split_once("fused into ") {
        Some(_) => "fused into another node".to_string(),
        None => name.to_string(),
    }
}

fn bindings(bindings: &[cutover::backend::Binding]) -> Vec<Json> {
    bindings.iter().map(|b| json!({ "name": b.name, "fact": b.fact.to_string() })).collect()
}

fn signature_table(signature: &Signature) -> String {
    let row = |side: &str, b: &cutover::backend::Binding| vec![side.to_string(), b.name.clone(), b.fact.to_string()];
    let inputs = signature.inputs.iter().map(|b| row("input", b));
    let outputs = signature.outputs.iter().map(|b| row("output", b));
    table(&["", "name", "type and shape"], inputs.chain(outputs).collect(), false)
}

fn steps(model: &Model) -> Vec<Json> {
    let steps = model.passes().steps.iter().enumerate();
    steps.map(|(i, s)| json!({ "step": i + 1, "pass": s.pass, "node": s.node, "what": s.description })).collect()
}

fn nodes(placement: &Placement) -> Vec<Json> {
    let node = |n: &cutover::backend::PlacedNode| json!({ "node": n.node, "op": n.op, "backend": n.backend, "kernel": n.kernel, "dtype": n.dtype, "reason": n.reason });
    placement.nodes.iter().map(node).collect()
}
