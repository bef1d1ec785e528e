//! The command as a user types it: what it prints, how it exits, and what it says of input that is wrong.

mod bench;
mod hostile;
mod models;
mod protocol;
mod raw;
mod rollouts;
mod server;
mod shrink;

use serde_json::Value as Json;
use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// Address space of a command, in KiB: one that allocates what a file claims dies of it.
const ADDRESS_SPACE_KIB: usize = 8 << 20;

/// A file of the repository.
fn repository(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("crates/cli is two folders down");
    root.join(path).to_str().expect("a path in UTF-8").to_string()
}

fn digits(version: &str) -> String {
    repository(&format!("models/digits/{version}/model.onnx"))
}

fn conformance(file: &str) -> String {
    repository(&format!("tests/conformance/models/{file}"))
}

/// A temporary folder whose files are named by strings, as arguments are.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("a path in UTF-8").to_string()
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        std::fs::write(self.path(name), content).expect("a file in a temporary folder");
        self.path(name)
    }

    /// A package of digits.
    fn package(&self, version: &str) -> String {
        let package = self.path(&format!("{version}.cutover"));
        cutover(&["convert", &digits(version), "-o", &package, "--name", "digits", "--version", version]).done();
        package
    }
}

/// How a command ended.
#[derive(Debug)]
struct Outcome {
    #[expect(dead_code, reason = "read in the messages of failed tests, through Debug")]
    line: String,
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Runs the command in a folder of its own, with bounded memory.
fn cutover<S: AsRef<str>>(arguments: &[S]) -> Outcome {
    let folder = Folder::new();
    let arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
    let limited = format!("ulimit -v {ADDRESS_SPACE_KIB}; exec \"$0\" \"$@\"");
    let mut command = Command::new("sh");
    command.args(["-c", &limited, env!("CARGO_BIN_EXE_cutover")]).args(&arguments).current_dir(folder.0.path());
    // Nothing is found that another test made.
    command.env("XDG_CACHE_HOME", folder.0.path());
    let Output { status, stdout, stderr } = command.output().expect("a shell");
    let text = |bytes| String::from_utf8(bytes).expect("text in UTF-8");
    Outcome { line: arguments.join(" "), code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

impl Outcome {
    #[track_caller]
    fn exits(self, code: i32) -> Outcome {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
        self
    }

    #[track_caller]
    fn done(self) -> Outcome {
        self.exits(0)
    }

    /// An error: nothing for scripts, and every one of `parts` for people.
    #[track_caller]
    fn refuses(self, parts: &[&str]) {
        let outcome = self.exits(2);
        assert!(outcome.stdout.is_empty() && outcome.stderr.starts_with("error: "), "{outcome:#?}");
        for part in parts {
            assert!(outcome.stderr.contains(part), "expected '{part}' in {outcome:#?}");
        }
    }

    #[track_caller]
    fn says(self, parts: &[&str]) -> Outcome {
        for part in parts {
            assert!(self.stdout.contains(part), "expected '{part}' in {self:#?}");
        }
        self
    }

    /// The one document that `--json` prints.
    #[track_caller]
    fn json(&self) -> Json {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e} in {self:#?}"))
    }
}

#[test]
fn every_command_explains_itself_with_an_example() {
    let help = cutover(&["--help"]).done().says(&["Exit codes", "Example: cutover demo"]);
    let commands = "inspect run verify bench shrink convert pack unpack serve deploy status promote rollback history checklist store feedback demo";
    for command in commands.split(' ') {
        assert!(help.stdout.contains(&format!("\n  {command} ")), "{help:#?}");
        let explained = cutover(&[command, "--help"]).done().says(&[&format!("cutover {command}"), "--json"]);
        let examples = [format!("Example: cutover {command}"), format!("Examples:\n  cutover {command}")];
        assert!(examples.iter().any(|example| explained.stdout.contains(example)), "{explained:#?}");
    }
}

#[test]
fn what_is_no_command_is_an_error() {
    let cases: &[(&[&str], &str)] = &[
        (&["frobnicate"], "frobnicate"),
        (&["inspect"], "<MODEL>"),
        (&["run", "m.onnx"], "--inputs"),
        (&["feedback", "digits", "--store", "s"], "--label"),
        (&["inspect", "m.onnx", "--backend", "gpu"], "there is auto, cpu, cuda, wgpu, reference"),
        (
            &["deploy", "digits", "p.cutover", "--strategy", "hope"],
            "expected one of blue-green, canary, ab, shadow, sequential",
        ),
        (&["serve", "--listen", "here"], "--listen"),
    ];
    for (arguments, part) in cases {
        cutover(arguments).refuses(&[part]);
    }
}

#[test]
fn an_error_says_each_thing_once() {
    let outcome = cutover(&["inspect", "nowhere.onnx"]).exits(2);
    assert_eq!(outcome.stderr.matches("No such file").count(), 1, "{outcome:#?}");
}

/// Arguments of strings of different kinds.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => { &[$(String::from($argument)),*] };
}
pub(crate) use arguments;

fn tensors(path: &str) -> cutover_cli::tensors::Named {
    cutover_cli::tensors::read(&PathBuf::from(path), None).expect("a file of tensors")
}
