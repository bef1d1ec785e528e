//! `cargo xtask conformance`: the ONNX project's node cases on a backend.

use clap::Parser;
use cutover::{Device, DeviceOptions};
use cutover_tests::conformance::{Case, Cases, Expected, OnGpu, Outcome, Placed, page, run};
use std::{collections::BTreeMap, fs, path::Path, process::ExitCode};

/// Runs the ONNX project's 1,884 node cases and prints what fails. Example: cargo xtask conformance --backend cpu --filter softmax
#[derive(Parser)]
struct Arguments {
    /// Backends, e.g. `reference,cpu`.
    #[arg(long, value_delimiter = ',', default_value = "reference,cpu")]
    backend: Vec<String>,
    /// Only cases whose name has this in it.
    #[arg(long)]
    filter: Option<String>,
    /// Lists the cases that fall back to the reference.
    #[arg(long)]
    fallbacks: bool,
    /// Writes what fails now to tests/onnx/expected.toml, with what it says as its reason; of a GPU also how many cases it runs, to
    /// a file of its own there.
    #[arg(long)]
    update: bool,
    /// Writes docs/operators.md from what passes on all backends.
    #[arg(long)]
    operators: bool,
}

fn main() -> ExitCode {
    match work(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn work(arguments: &Arguments) -> Result<bool, Box<dyn std::error::Error>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("onnx/expected.toml");
    let text = fs::read_to_string(&path)?;
    let mut table: BTreeMap<String, BTreeMap<String, String>> = toml::from_str(&text)?;
    let all = Cases::load()?;
    let chosen = |name: &str| arguments.filter.as_ref().is_none_or(|part| name.contains(part));
    let cases: Vec<_> = all.0.iter().filter(|case| chosen(&case.name)).collect();
    let mut as_expected = true;
    let mut ran = Vec::new();
    for name in &arguments.backend {
        let device: Device = name.parse()?;
        let options = DeviceOptions { threads: Some(1), ..DeviceOptions::default() };
        let outcomes = match device {
            Device::Cuda | Device::Wgpu => run_wholly(&cases, device, &options, arguments.fallbacks)?,
            _ => run(&cases, &*device.backend(&options)?),
        };
        let expected = Expected::parse(&text, name)?;
        if arguments.filter.is_some() {
            outcomes.iter().for_each(|o| println!("{} {}", o.name, o.failure.as_deref().unwrap_or("passes")));
        } else {
            let contradictions = expected.contradictions(&outcomes);
            contradictions.iter().for_each(|c| println!("{c}"));
            as_expected &= contradictions.is_empty();
        }
        if arguments.fallbacks {
            for outcome in outcomes.iter().filter(|o| o.failure.is_none()) {
                let fallen = outcome.operators.iter().filter(|used| used.placed == Placed::Fallback);
                let fallen: Vec<_> = fallen.map(|used| format!("{} of {}", used.name, used.dtype)).collect();
                if !fallen.is_empty() {
                    println!("{} falls back ({})", outcome.name, fallen.join(", "));
                }
            }
        }
        for suite in ["node", "simple"] {
            let of_suite: Vec<&Outcome> =
                cases.iter().zip(&outcomes).filter(|(case, _)| case.suite == suite).map(|(_, o)| o).collect();
            println!("{}", summary(&of_suite, suite, name));
        }
        table.insert(name.clone(), expected.updated(&outcomes));
        if let Some(file) = OnGpu::file(name).filter(|_| arguments.update && arguments.filter.is_none()) {
            let gpu = device.backend(&options)?.describe().device;
            fs::write(path.with_file_name(file), toml::to_string(&OnGpu::of(gpu, &outcomes))?)?;
        }
        ran.push((name.as_str(), outcomes));
    }
    if arguments.operators && arguments.filter.is_none() {
        let ran: Vec<(&str, &[Outcome])> = ran.iter().map(|(name, outcomes)| (*name, outcomes.as_slice())).collect();
        fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operators.md"), page(&cases, &ran))?;
    }
    if arguments.update && arguments.filter.is_none() {
        let head = "# What a backend can't do yet, by case or (with a star at the end) by family, and why.\n\
                    # The runner fails on what is missing here, and on what is here and passes.\n\n";
        fs::write(&path, format!("{head}{}", toml::to_string(&table)?))?;
    }
    Ok(as_expected)
}

/// Each case wholly on the device, and those that can't be with what falls back, which counts as the reference's help.
fn run_wholly(
    cases: &[&Case],
    device: Device,
    options: &DeviceOptions,
    says_why: bool,
) -> Result<Vec<Outcome>, cutover::Error> {
    let strict = device.backend(&DeviceOptions { strict: true, ..options.clone() })?;
    let mut outcomes = run(cases, &*strict);
    let left: Vec<usize> = (0..cases.len()).filter(|&at| outcomes[at].failure.is_some()).collect();
    let again: Vec<&Case> = left.iter().map(|&at| cases[at]).collect();
    for (at, outcome) in left.into_iter().zip(run(&again, &*device.backend(options)?)) {
        if says_why && let Some(why) = &outcomes[at].failure {
            println!("{} is not wholly there: {why}", outcome.name);
        }
        outcomes[at] = Outcome { placed: Placed::Fallback, ..outcome };
    }
    Ok(outcomes)
}

fn summary(outcomes: &[&Outcome], suite: &str, backend: &str) -> String {
    let passed: Vec<_> = outcomes.iter().filter(|o| o.failure.is_none()).collect();
    let placed = |placed: Placed| passed.iter().filter(|o| o.placed == placed).count();
    let (native, composed, fallback) = (placed(Placed::Native), placed(Placed::Composed), placed(Placed::Fallback));
    format!(
        "{} of {} on {backend} ({suite}: {native} on its own kernels, {composed} composed of them, {fallback} with the reference's help)",
        passed.len(),
        outcomes.len()
    )
}
