//! `cutover unpack`.

use crate::{Verdict, output::Printer};
use anyhow::{Context, Result, bail};
use cutover::package::{Package, file};
use serde_json::json;
use std::{fs, path::PathBuf};

#[derive(clap::Args)]
#[command(after_help = "Example: cutover unpack model.cutover -o folder\n\
    Netron and ONNX Runtime open folder/model.onnx, safetensors tools open folder/weights.safetensors.")]
pub(crate) struct Arguments {
    package: PathBuf,
    /// The folder to write, which must not be there.
    #[arg(short, long)]
    output: PathBuf,
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let package = Package::open(&self.package)?;
        if self.output.exists() {
            bail!("{} is there already", self.output.display());
        }
        fs::create_dir_all(&self.output).with_context(|| format!("cannot make {}", self.output.display()))?;
        let names: Vec<&str> = file::ALL.iter().copied().filter(|name| package.folder().join(name).is_file()).collect();
        for name in &names {
            let to = self.output.join(name);
            fs::copy(package.folder().join(name), &to).with_context(|| format!("cannot write {}", to.display()))?;
        }
        let document = json!({ "output": self.output.display().to_string(), "files": names });
        printer.print(&document, || format!("{}: {}", self.output.display(), names.join(", ")))?;
        Ok(Verdict::Yes)
    }
}
