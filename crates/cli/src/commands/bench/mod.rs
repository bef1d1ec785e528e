//! `cutover bench`: one model, a matrix of models and settings, two matrices against each other, or swaps under load.

mod assertion;
mod cell;
mod diff;
mod document;
mod int8;
mod machine;
mod matrix;
pub(super) mod one;
mod plot;
mod profile;
mod requests;
mod statistics;
mod tables;
mod warm_up;

use super::{DeviceArguments, DeviceDetails, ModelArguments, swap::Swap};
use crate::{Verdict, output::Printer};
use anyhow::{Context, Result, bail};
use clap::Subcommand;
use cutover::Device;
use document::Arrivals;
use std::{path::PathBuf, time::Duration};

#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Examples:\n  cutover bench model.onnx --threads 2 --seconds 3 --shape image=1x3x224x224\n  \
    cutover bench --matrix models/*.onnx --backend cpu,wgpu --precision f32,int8 --batch 1,8 --threads 1,2 --json=now.json --plot now.svg\n  \
    cutover bench --matrix model.onnx --rate 200 --assert 'p99<=20ms and memory<=100MB where backend=cpu'\n  \
    cutover bench diff before.json now.json --threshold 5%\n  \
    cutover bench --swap v1.cutover v2.cutover --swaps 100 --json\n\n\
    Inputs are random: floats within -1 and 1, integers below 1000, ones where the name holds 'mask', zeros where it \
    holds 'type'. What varies and no --shape gives is assumed, and the output says so: 1 for batches, 224 for images' \
    height and width, 32 for sequences; where the model refuses those, other usual ones. Integers that the model \
    refuses are 0.\n\n\
    A matrix is measured in rounds over all cells, each round in another order and each cell in a process of its own, so that what the machine \
    does meanwhile falls on all alike. A cell that can't run stands in the table with its reason.\n\n\
    Exit codes of a matrix: 0 measured, 1 with --strict and a cell that could not run, 2 error, 3 an assertion does not hold, 130 interrupted; \
    what was measured until then is written."
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Option<Compare>,
    #[command(flatten)]
    model: Option<ModelArguments>,
    /// auto, cpu, wgpu, cuda or reference; several for a matrix.
    #[arg(long, default_value = "auto", value_delimiter = ',')]
    backend: Vec<String>,
    /// Threads of the CPU; one per core if left out. Several for a matrix.
    #[arg(long, value_delimiter = ',')]
    threads: Vec<usize>,
    /// f32, as the model says; f16 or bf16 for weights of products and convolutions in 16 bits. In a matrix several, and int8: quantized for
    /// the measurement, with ranges of made-up inputs where there are convolutions.
    #[arg(long, default_value = "f32", value_delimiter = ',')]
    precision: Vec<String>,
    /// Items in a run, where the model leaves that open; several for a matrix.
    #[arg(long, value_delimiter = ',')]
    batch: Vec<usize>,
    #[command(flatten)]
    details: DeviceDetails,
    /// An input's shape, e.g. image=1x3x224x224; once for every input whose dimensions vary. In a matrix N stands for the batch, and
    /// MODEL:image=Nx3x224x224 is for the model of that name alone.
    #[arg(long = "shape", value_name = "NAME=SHAPE")]
    shapes: Vec<String>,
    /// How long to measure, after warming up: one model, or a cell in all rounds together.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Seed of the inputs, of the order of a matrix, and of arrivals.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Measures every node too, and prints the time by operator and by node, and how near each comes to what the machine can do.
    #[arg(long, conflicts_with = "matrix")]
    profile: bool,
    #[command(flatten)]
    matrix: Matrix,
    #[command(flatten)]
    swap: SwapArguments,
    /// Measures the cell that is described on the standard input, which stands for the model: what a matrix starts processes for.
    #[arg(long, hide = true)]
    cell: bool,
}

#[derive(Subcommand)]
enum Compare {
    /// Compares two matrices cell by cell: ratios of medians, their intervals, and whether rounds differ.
    Diff(diff::Arguments),
}

/// Every combination of models and settings.
#[derive(clap::Args)]
struct Matrix {
    /// Measures these models in every combination of backends, precisions, batches and threads.
    #[arg(long, value_name = "MODELS", num_args = 1.., conflicts_with_all = ["ModelArguments", "swap"])]
    matrix: Vec<PathBuf>,
    /// Rounds over all cells.
    #[arg(long, default_value_t = 10, requires = "matrix")]
    rounds: usize,
    /// Requests a second that come by a clock, answered one after the other: latency then counts from when a request was due.
    #[arg(long, requires = "matrix", value_name = "PER_SECOND")]
    rate: Option<f64>,
    /// When requests of --rate come.
    #[arg(long, requires = "rate", default_value = "poisson")]
    arrivals: Arrivals,
    /// Seconds that a cell's process may take in a round.
    #[arg(long, default_value_t = 120.0, requires = "matrix", value_name = "SECONDS")]
    timeout: f64,
    /// Fails where a cell breaks it, e.g. 'p50<=10ms'; 'p99<20ms and memory<=100MB where backend=cpu, batch=1'. May be given again. Metrics: min, p25, p50,
    /// p75, p90, p99, p999, max, mean, open, compile, first, throughput, gflops, gbytes, roofline, memory, energy, gpu-energy, unanswered, elsewhere.
    #[arg(long = "assert", requires = "matrix", value_name = "BOUND")]
    assertions: Vec<String>,
    /// Writes the table as CSV.
    #[arg(long, requires = "matrix", value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Writes the table in Markdown.
    #[arg(long, requires = "matrix", value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Draws it: .svg, or .html with the table.
    #[arg(long, requires = "matrix", value_name = "FILE", value_parser = plot::target)]
    plot: Option<PathBuf>,
}

/// Two versions that replace each other.
#[derive(clap::Args)]
struct SwapArguments {
    /// Swaps two versions of one model under load, and measures what callers notice.
    #[arg(long, requires = "other", conflicts_with_all = ["shapes", "profile"])]
    swap: bool,
    /// The other version, for --swap.
    #[arg(requires = "swap")]
    other: Option<PathBuf>,
    /// Swaps with a load each; every tenth is followed by two rollbacks.
    #[arg(long, default_value_t = 50, requires = "swap")]
    swaps: u64,
    /// Threads that ask without pause while versions are swapped.
    #[arg(long, default_value_t = 2, requires = "swap")]
    clients: usize,
    /// Time between two swaps.
    #[arg(long, default_value_t = 250, requires = "swap", value_name = "MS")]
    pause_ms: u64,
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        if self.cell {
            return cell::process().map(|()| Verdict::Yes);
        }
        if let Some(Compare::Diff(arguments)) = self.command {
            return arguments.run(printer);
        }
        if !(self.seconds > 0.0 && self.seconds <= 86_400.0) {
            bail!("--seconds {}: expected more than 0 and at most 86400", self.seconds);
        }
        if !self.matrix.matrix.is_empty() {
            return matrix::Plan::new(self)?.run(printer);
        }
        let model = self.model.context("expected a model, or --matrix with several; see cutover bench --help")?;
        let device = DeviceArguments {
            backend: one_of("--backend", &self.backend)?.map_or(Ok(Device::Auto), |name| name.parse())?,
            threads: one_of("--threads", &self.threads)?.copied(),
            precision: one_of("--precision", &self.precision)?.map_or(Ok(Default::default()), |text| {
                let wrong = |message| anyhow::anyhow!("--precision {text}: {message}");
                super::precision(text).map_err(wrong)
            })?,
            details: self.details,
        };
        if let Some(other) = self.swap.other {
            let swap = Swap {
                versions: &[model.model.clone(), other],
                device: device.backend,
                options: &device.options(),
                swaps: self.swap.swaps.clamp(1, 1_000_000),
                clients: self.swap.clients.clamp(1, 256),
                pause: Duration::from_millis(self.swap.pause_ms),
            };
            return swap.run(printer);
        }
        let batch = one_of("--batch", &self.batch)?.copied();
        let (shapes, seconds, seed, profile) = (self.shapes, self.seconds, self.seed, self.profile);
        one::One { model, device, batch, shapes, seconds, seed, profile }.run(printer)
    }
}

/// The value of an option that only a matrix takes several of.
fn one_of<'a, T>(name: &str, values: &'a [T]) -> Result<Option<&'a T>> {
    match values {
        [] => Ok(None),
        [value] => Ok(Some(value)),
        _ => bail!("{name}: one model takes one, --matrix several"),
    }
}
