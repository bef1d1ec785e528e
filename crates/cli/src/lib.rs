//! Everything the `cutover` command does. Exit codes: 0 done, 1 the answer is no, 2 an error, 3 an assertion of `bench` does not hold,
//! 130 interrupted.

mod commands;
mod evidence;
mod made_up;
mod output;
mod pickle;
mod raw;
mod report;
pub mod tensors;

use clap::Parser;
use std::process::ExitCode;

/// Edge inference: run ONNX models, shrink them, and replace them while they serve.
#[derive(Parser)]
#[command(
    name = "cutover",
    version,
    after_help = "Exit codes: 0 done, 1 the answer is no, 2 error; of bench also 3, an assertion does not hold, and 130, interrupted.\nExample: cutover demo"
)]
struct Arguments {
    /// Prints one JSON document instead of text; with =FILE, writes it there, and prints the text.
    #[arg(long, global = true, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    json: Option<Option<std::path::PathBuf>>,
    #[command(subcommand)]
    command: commands::Command,
}

/// What a command that ran to its end says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Yes,
    No,
    /// An assertion of `bench` does not hold.
    Broken,
    /// By the user; what was done until then is kept.
    Interrupted,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let filter = std::env::var("CUTOVER_LOG").ok().and_then(|level| level.parse().ok());
    let level = filter.unwrap_or(tracing_subscriber::filter::LevelFilter::WARN);
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(level).init();
    let arguments = Arguments::parse();
    let printer = output::Printer { json: arguments.json == Some(None), file: arguments.json.flatten() };
    match arguments.command.run(&printer) {
        Ok(Verdict::Yes) => ExitCode::SUCCESS,
        Ok(Verdict::No) => ExitCode::from(1),
        Ok(Verdict::Broken) => ExitCode::from(3),
        Ok(Verdict::Interrupted) => ExitCode::from(130),
        // Whoever reads this command's output has gone: nobody is left to be told.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            ExitCode::from(2)
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kind = |e: &(dyn std::error::Error + 'static)| e.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    error.chain().any(|e| kind(e) == Some(std::io::ErrorKind::BrokenPipe))
}

/// The error and its causes, without those that the text before them says already.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}
