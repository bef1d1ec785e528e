//! Tests on instruction sets that this machine may lack: those of Arm under QEMU, AVX-512 and what came with and after it under Bochs, and
//! CUDA on an imitated driver.
//!
//! QEMU runs a program of another processor among those of this machine. Bochs is a whole machine: a kernel boots there, and its only
//! process is a test program. Both take a hundred times as long as the processor they stand for, so the tests run a sample of their
//! cases. What is needed comes as Debian's packages.

mod bochs;
pub mod cuda;
mod qemu;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Machine {
    /// 64-bit Arm processors, under QEMU: the oldest, and the newest that it knows.
    Neon,
    /// An x86 processor with AVX-VNNI, and AVX-512 with VNNI and BF16, under Bochs.
    Avx512,
    /// An NVIDIA GPU: driver and compiler are imitated, and kernels run on the processor.
    Cuda,
}

/// A test program, and of how many of its cases one is run.
struct Suite {
    package: &'static str,
    target: &'static [&'static str],
    under_qemu: &'static str,
    under_bochs: &'static str,
}

const SUITES: &[Suite] = &[
    Suite { package: "cutover-kernels", target: &["--lib"], under_qemu: "20", under_bochs: "5" },
    Suite { package: "cutover-backend", target: &["--test", "agreement"], under_qemu: "50", under_bochs: "30" },
];

/// Says to the tests which part of their cases to run.
const SAMPLE: &str = "CUTOVER_SAMPLE";
/// Says to them on which rungs of the ladder.
const LEVELS: &str = "CUTOVER_LEVELS";

/// Runs the tests whose names hold `only` on `machine`, all if it is empty.
pub fn emulate(machine: Machine, only: &str) -> Result<()> {
    match machine {
        Machine::Neon => qemu::emulate(only),
        Machine::Avx512 => bochs::emulate(only),
        Machine::Cuda => cuda::emulate(only),
    }
}

/// Builds a suite's test program; its path.
fn build(suite: &Suite, arguments: &[&str], environment: &[(&str, String)]) -> Result<PathBuf> {
    let build =
        [&["test", "--no-run", "--message-format", "json", "--package", suite.package], suite.target, arguments];
    let build = build.concat();
    eprintln!("$ cargo {}", build.join(" "));
    let output = Command::new(env!("CARGO"))
        .args(&build)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .current_dir(crate::root())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("`cargo {}` failed", build.join(" "));
    }
    for message in cargo_metadata::Message::parse_stream(&output.stdout[..]) {
        if let cargo_metadata::Message::CompilerArtifact(artifact) = message?
            && artifact.profile.test
            && let Some(program) = artifact.executable
        {
            return Ok(program.into());
        }
    }
    bail!("`cargo {}` made no program", build.join(" "))
}

/// Installs the packages of `names` that are not there.
fn install(names: &[&str]) -> Result<()> {
    let is_there = |name: &str| {
        let query = Command::new("dpkg-query").args(["--show", "--showformat", "${db:Status-Status} ", name]).output();
        query.is_ok_and(|output| output.stdout.starts_with(b"installed"))
    };
    let missing: Vec<_> = names.iter().copied().filter(|name| !is_there(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    call("apt-get", &["update", "--quiet"], Path::new("."))?;
    let arguments = [&["install", "--quiet", "--yes", "--no-install-recommends"], &missing[..]].concat();
    call("apt-get", &arguments, Path::new(".")).context("this needs root, on Debian 12 or later")
}

/// Runs a program in `folder` to its end; an error names it.
fn call(program: &str, arguments: &[&str], folder: &Path) -> Result<()> {
    eprintln!("$ {program} {}", arguments.join(" "));
    let status = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .stdout(Stdio::from(std::io::stderr()))
        .status()
        .with_context(|| format!("cannot start {program}"))?;
    if !status.success() {
        bail!("`{program} {}` failed", arguments.join(" "));
    }
    Ok(())
}

/// What a program prints.
fn output_of(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!("`{program} {}` failed: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}
