//! One file per command.

mod bench;
mod checklist;
mod convert;
mod demo;
mod deploy;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod devices;
mod feedback;
mod inspect;
mod pack;
mod run;
mod serve;
mod shrink;
mod status;
mod store;
mod swap;
mod target;
mod unpack;
mod verify;

use crate::{Verdict, output::Printer};
use anyhow::Result;
use clap::{Args, Subcommand};
use cutover::{
    CompiledModel, Device, DeviceOptions, Model, OpenOptions,
    backend::{Backend, CompileOptions, DeviceInfo, MemoryUse, Numerics, Precision},
    graph::{
        onnx::{ImportOptions, Limits},
        passes::PassOptions,
    },
};
use serde_json::{Value as Json, json};
use std::{path::PathBuf, time::Duration};

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Shows a model's inputs, outputs, operators and size, and what each backend would run where.
    Inspect(inspect::Arguments),
    /// Runs a model on tensors from a file.
    Run(run::Arguments),
    /// Compares a model's outputs with expected ones; a package's with its golden ones.
    Verify(verify::Arguments),
    /// Measures how fast a model loads and runs, or what replacing it under load costs.
    Bench(bench::Arguments),
    /// Lists the GPUs there are: what they offer, and what they reach.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    Devices(devices::Arguments),
    /// Makes a model smaller and faster, and measures what was lost.
    Shrink(shrink::Arguments),
    /// Makes a package of an ONNX model, its weights in half precision where asked for.
    Convert(convert::Arguments),
    /// Makes a package of a model, or of an unpacked folder, with all that its manifest may say.
    Pack(pack::Arguments),
    /// Writes a package's files into a folder, where other tools open them.
    Unpack(unpack::Arguments),
    /// Serves models over HTTP (Open Inference Protocol v2).
    Serve(serve::Arguments),
    /// Rolls a new version of a model out.
    Deploy(deploy::Deploy),
    /// Shows what is in service: versions, shares, requests, latency, and every gate with its numbers.
    Status(status::Status),
    /// Ends a rollout in favour of its candidate.
    Promote(deploy::Promote),
    /// Ends a rollout against its candidate, or goes back to the version before.
    Rollback(deploy::Rollback),
    /// Lists every transition of a model, and why.
    History(status::History),
    /// Shows what a version has shown and what it lacks, with the evidence; signs it off.
    Checklist(checklist::Arguments),
    /// Checks or repairs a store.
    Store(store::Arguments),
    /// Tells what was right, late, by request id.
    Feedback(feedback::Arguments),
    /// The main job on a real model: served, replaced under load, and bad versions found out.
    Demo(demo::Arguments),
}

impl Command {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        match self {
            Command::Inspect(arguments) => arguments.run(printer),
            Command::Run(arguments) => arguments.run(printer),
            Command::Verify(arguments) => arguments.run(printer),
            Command::Bench(arguments) => arguments.run(printer),
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            Command::Devices(arguments) => arguments.run(printer),
            Command::Shrink(arguments) => arguments.run(printer),
            Command::Convert(arguments) => arguments.run(printer),
            Command::Pack(arguments) => arguments.run(printer),
            Command::Unpack(arguments) => arguments.run(printer),
            Command::Serve(arguments) => arguments.run(printer),
            Command::Deploy(arguments) => arguments.run(printer),
            Command::Status(arguments) => arguments.run(printer),
            Command::Promote(arguments) => arguments.run(printer),
            Command::Rollback(arguments) => arguments.run(printer),
            Command::History(arguments) => arguments.run(printer),
            Command::Checklist(arguments) => arguments.run(printer),
            Command::Store(arguments) => arguments.run(printer),
            Command::Feedback(arguments) => arguments.run(printer),
            Command::Demo(arguments) => arguments.run(printer),
        }
    }
}

/// Where a model runs, as several commands take it.
#[derive(Args)]
struct DeviceArguments {
    /// auto, cpu, cuda, wgpu or reference.
    #[arg(long, default_value = "auto")]
    backend: Device,
    /// Threads of the CPU; one per core if left out.
    #[arg(long)]
    threads: Option<usize>,
    /// f32; f16 or bf16 for weights of products and convolutions in 16 bits, which are half the memory, and rounded; tf32 for products of f32 on
    /// NVIDIA's tensor cores.
    #[arg(long, default_value = "f32", value_parser = precision)]
    precision: Precision,
    #[command(flatten)]
    details: DeviceDetails,
}

/// What few change about a device.
#[derive(Args)]
struct DeviceDetails {
    /// A lower instruction set than the CPU has: avx512, avx2 or scalar.
    #[arg(long)]
    isa: Option<String>,
    /// How arithmetic may be rearranged: default; strict, for direct sums alone; relaxed, for Winograd's F(6×6, 3×3) too.
    #[arg(long, default_value = "default", value_parser = numerics)]
    numerics: Numerics,
    /// fast, or lean: the weights once and one arena, no more.
    #[arg(long, default_value = "fast", value_parser = memory)]
    memory: MemoryUse,
    /// Refuses a model of which a node would not run on the backend asked for; a matrix then exits with 1 where a cell could not run.
    #[arg(long)]
    strict: bool,
    /// Which GPU, by a part of its name as `cutover devices` lists it.
    #[arg(long)]
    adapter: Option<String>,
}

fn numerics(text: &str) -> Result<Numerics, String> {
    match text {
        "default" => Ok(Numerics::Default),
        "strict" => Ok(Numerics::Strict),
        "relaxed" => Ok(Numerics::Relaxed),
        _ => Err("expected default, strict or relaxed".to_string()),
    }
}

fn numerics_name(numerics: Numerics) -> &'static str {
    match numerics {
        Numerics::Default => "default",
        Numerics::Strict => "strict",
        Numerics::Relaxed => "relaxed",
    }
}

fn memory_name(memory: MemoryUse) -> &'static str {
    match memory {
        MemoryUse::Fast => "fast",
        MemoryUse::Lean => "lean",
    }
}

fn memory(text: &str) -> Result<MemoryUse, String> {
    match text {
        "fast" => Ok(MemoryUse::Fast),
        "lean" => Ok(MemoryUse::Lean),
        _ => Err("expected fast or lean".to_string()),
    }
}

fn precision(text: &str) -> Result<Precision, String> {
    match text {
        "f32" => Ok(Precision::F32),
        "bf16" => Ok(Precision::BF16),
        "f16" => Ok(Precision::F16),
        "tf32" => Ok(Precision::Tf32),
        _ => Err("expected f32, bf16, f16 or tf32".to_string()),
    }
}

impl DeviceArguments {
    fn options(&self) -> DeviceOptions {
        let details = &self.details;
        let compile = CompileOptions { precision: self.precision, numerics: details.numerics };
        DeviceOptions {
            threads: self.threads,
            isa: details.isa.clone(),
            memory: details.memory,
            strict: details.strict,
            adapter: details.adapter.clone(),
            compile,
        }
    }

    /// What answers are expected to keep of those in f32: a weight is rounded by 2^-12 of its value at most, or 2^-9, and each of a network's layers
    /// adds to it.
    fn least_sqnr_db(&self) -> Option<f64> {
        match self.precision {
            Precision::F32 => None,
            // It rounds both factors as f16 does.
            Precision::F16 | Precision::Tf32 => Some(45.0),
            Precision::BF16 => Some(25.0),
        }
    }

    fn precision_name(&self) -> &'static str {
        match self.precision {
            Precision::F32 => "f32",
            Precision::BF16 => "bf16",
            Precision::F16 => "f16",
            Precision::Tf32 => "tf32",
        }
    }
}

/// Which model, and how it is opened.
#[derive(Args)]
struct ModelArguments {
    /// An .onnx file, a package folder or a .cutover archive.
    model: PathBuf,
    /// Stops the graph's rewriting after so many steps, to find a bad one; 0 is the model as imported.
    #[arg(long)]
    stop_after: Option<usize>,
    /// Reads files instead of mapping them, so that they may be overwritten meanwhile.
    #[arg(long)]
    no_map: bool,
    /// Largest file that is read, in bytes.
    #[arg(long, default_value_t = Limits::default().file_bytes)]
    max_file_bytes: u64,
    /// Most nodes that the model may have, functions and graphs in nodes included.
    #[arg(long, default_value_t = Limits::default().nodes)]
    max_nodes: usize,
    /// How deep graphs may lie in nodes, and functions call one another.
    #[arg(long, default_value_t = Limits::default().depth)]
    max_depth: usize,
}

impl ModelArguments {
    fn open(&self) -> Result<Model> {
        let (file_bytes, nodes, depth) = (self.max_file_bytes, self.max_nodes, self.max_depth);
        let limits = Limits { file_bytes, nodes, depth, ..Limits::default() };
        let import = ImportOptions { limits, map: !self.no_map, ..ImportOptions::default() };
        let passes = PassOptions { stop_after: self.stop_after, ..PassOptions::default() };
        Ok(Model::open_with(&self.model, &OpenOptions { import, passes })?)
    }

    /// For messages and JSON.
    fn name(&self) -> String {
        self.model.display().to_string()
    }
}

/// Which backend a model was compiled for, where it was chosen, else what `asked` says of itself.
fn device_of(compiled: &CompiledModel, asked: &dyn Backend) -> DeviceInfo {
    compiled.choice().map_or_else(|| asked.describe(), |choice| choice.device.clone())
}

/// Why a model runs where it does; null where nothing was chosen.
fn choice_json(compiled: &CompiledModel) -> Json {
    let Some(choice) = compiled.choice() else { return Json::Null };
    let ms = |time: Option<Duration>| time.map(|time| time.as_secs_f64() * 1e3);
    let tried = choice.tried.iter().map(|tried| {
        json!({
            "backend": tried.backend,
            "device": tried.device,
            "predicted_ms": ms(tried.predicted),
            "measured_ms": ms(tried.measured),
            "note": tried.note,
        })
    });
    json!({ "backend": choice.device.backend, "kept": choice.was_kept, "tried": tried.collect::<Vec<_>>() })
}
