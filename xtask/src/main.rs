//! Project tasks, run as `cargo xtask TASK`.
//!
//! This binary stays small, since it is built before anything else can be checked: tasks that need the engine
//! run it through cargo.

mod check;
mod cuda;
mod emulate;
mod gpu;
mod rules;
mod soak;
mod test;
mod train;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use std::{path::PathBuf, process::Command};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Project tasks of Cutover")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Formatting, the rules of the workspace, clippy and rustdoc: everything that needs no run.
    Check,
    /// Everything that must pass before a change lands: `check`, then every test.
    Test,
    /// Runs for hours what `test` runs a seeded sample of, and writes dated evidence to docs/evidence/.
    Soak {
        /// One of the soaks; leave it out to list them.
        name: Option<String>,
        /// Replays this one run of the simulation, and tells what happens in it.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Runs a sample of the tests on instruction sets that this machine may lack. Example: cargo xtask emulate neon
    Emulate {
        machine: emulate::Machine,
        /// Only tests whose names hold this.
        #[arg(default_value = "")]
        only: String,
    },
    /// Compiles every hand-made CUDA kernel for three GPUs, and checks that none spills; needs no GPU. Example: cargo xtask cuda --table
    Cuda {
        /// Prints registers and counts of instructions for each.
        #[arg(long)]
        table: bool,
    },
    /// Puts what a machine with an NVIDIA GPU runs (`benches/gpu.py` and all that it starts) into a folder: neither Rust nor a compiler is needed there.
    Gpu {
        #[arg(default_value = "target/gpu")]
        folder: PathBuf,
        /// `dev` builds faster, and is no measurement.
        #[arg(long, default_value = "release")]
        profile: String,
    },
    /// Trains a model that the repository ships, and prints its accuracy on held-out data. Example: cargo xtask train digits
    Train {
        /// `digits`.
        model: String,
        /// Where to write the versions; by default where the repository keeps them.
        #[arg(long)]
        output: Option<PathBuf>,
    },
    /// The ONNX project's node cases on every backend. Example: cargo xtask conformance --backend cpu --filter softmax
    ///
    /// With --emulated, CUDA's driver and compiler are imitated, and its kernels run on the processor.
    #[command(disable_help_flag = true)]
    Conformance {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Writes docs/operators.md: what the cases show of every operator, on every backend.
    Operators,
    /// Converts a model to a package, as `cutover convert` does, shrinking it on the way where --data is given.
    /// Example: cargo xtask convert in.onnx -o out.cutover --data calib.npz --recipe recipe.toml
    #[command(disable_help_flag = true)]
    Convert {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn main() {
    if let Err(error) = run(Arguments::parse().task) {
        eprintln!("error: {error:#}");
        std::process::exit(1);
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Check => check::check(),
        Task::Test => test::test(),
        Task::Soak { name, seed } => soak::soak(name.as_deref(), seed),
        Task::Cuda { table } => cuda::cuda(table).map(|_| ()),
        Task::Gpu { folder, profile } => gpu::gpu(&folder, &profile),
        Task::Emulate { machine, only } => emulate::emulate(machine, &only),
        Task::Train { model, output } => {
            train::train(&model, &output.unwrap_or_else(|| root().join("models").join(&model)))
        }
        Task::Conformance { arguments } => {
            // A GPU takes long to build for, and nobody waits for it who asks for none.
            let names = |gpu: &&str| arguments.iter().any(|argument| argument.contains(gpu));
            let features = ["cuda", "wgpu"].into_iter().filter(names).collect::<Vec<_>>().join(",");
            let (emulated, arguments): (Vec<String>, Vec<String>) =
                arguments.iter().cloned().partition(|argument| argument == "--emulated");
            let environment = if emulated.is_empty() { Vec::new() } else { emulate::cuda::environment()? };
            let program = ["--package", "cutover-tests", "--features", &features, "--bin", "conformance", "--"];
            hand_on(&program, &arguments, &environment)
        }
        Task::Operators => {
            hand_on(&["--package", "cutover-tests", "--bin", "conformance", "--"], &["--operators".to_string()], &[])
        }
        Task::Convert { arguments } => {
            let has = |option: &str| arguments.iter().any(|a| a == option || a.starts_with(&format!("{option}=")));
            // A recipe may train, which takes minutes more to build.
            let trains = has("--recipe") || has("--fine-tune");
            let features = [(trains, "train"), (has("--preprocess"), "image"), (has("--tokenizer"), "text")];
            let features = features.into_iter().filter(|(wanted, _)| *wanted).map(|(_, feature)| feature);
            let features = features.collect::<Vec<_>>().join(",");
            hand_on(&["--package", "cutover-cli", "--features", &features, "--", "convert"], &arguments, &[])
        }
    }
}

/// Runs one of the workspace's programs with `environment` added, whose exit code becomes this one's.
fn hand_on(program: &[&str], arguments: &[String], environment: &[(&str, String)]) -> Result<()> {
    let cargo = ["run", "--release", "--quiet"].iter().chain(program).copied();
    let arguments = cargo.chain(arguments.iter().map(String::as_str));
    let environment = environment.iter().map(|(name, value)| (name, value));
    let status =
        Command::new(env!("CARGO")).args(arguments).envs(environment).status().context("cannot start cargo")?;
    std::process::exit(status.code().unwrap_or(2));
}

/// The workspace's root folder.
fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_path_buf()
}

/// Runs cargo at the root, with `environment` added; an error names the command.
fn cargo(arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    eprintln!("$ cargo {}", arguments.join(" "));
    let status = Command::new(env!("CARGO"))
        .args(arguments)
        .envs(environment.iter().copied())
        .current_dir(root())
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("`cargo {}` failed", arguments.join(" "));
    }
    Ok(())
}
