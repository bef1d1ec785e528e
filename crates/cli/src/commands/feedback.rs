//! `cutover feedback`.

use super::target::Target;
use crate::{Verdict, output::Printer};
use anyhow::{Context, Result, bail};
use cutover::runtime::Call;
use serde_json::{Value as Json, json};
use std::{fs, path::PathBuf};

#[derive(clap::Args)]
#[command(after_help = "Example: cutover feedback digits --label request-17=3 --label request-18=7\n\
    \x20        cutover feedback digits --file labels.csv\n\n\
    A label is the right class of an answer, found by the id of its request, however late: after restarts too, as long as the answer is among the \
    last ones that the host remembers. Exits with 1 if a label was not counted.")]
pub(crate) struct Arguments {
    /// The model's name.
    name: String,
    /// A request's id and its right class; classes with commas between, where the request had several samples.
    #[arg(long = "label", value_name = "ID=CLASS", value_parser = label)]
    labels: Vec<(String, Vec<u32>)>,
    /// A file with a line ID,CLASS for each label.
    #[arg(long)]
    file: Option<PathBuf>,
    #[command(flatten)]
    target: Target,
}

fn label(text: &str) -> Result<(String, Vec<u32>), String> {
    let expected = || format!("'{text}': expected ID=CLASS, e.g. request-17=3");
    let (id, classes) = text.rsplit_once('=').ok_or_else(expected)?;
    let classes: Result<Vec<u32>, _> = classes.split(',').map(|class| class.trim().parse()).collect();
    match classes {
        Ok(classes) if !id.is_empty() => Ok((id.to_string(), classes)),
        _ => Err(expected()),
    }
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let mut labels = self.labels;
        if let Some(path) = &self.file {
            let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
                let place = || format!("{}, line {}: expected ID,CLASS", path.display(), number + 1);
                let (id, class) = line.split_once(',').with_context(place)?;
                let classes: Result<Vec<u32>, _> = class.split(',').map(|class| class.trim().parse()).collect();
                labels.push((id.trim().to_string(), classes.with_context(place)?));
            }
        }
        if labels.is_empty() {
            bail!("give --label ID=CLASS or --file");
        }
        let call = Call::Feedback { model: self.name, labels };
        let answer: Json = self.target.connect(false)?.call(&call)?;
        let refused: Vec<&str> = answer["refused"].as_array().into_iter().flatten().filter_map(Json::as_str).collect();
        printer.print(&json!(answer), || {
            let refused: String = refused.iter().map(|why| format!("\nnot counted: {why}")).collect();
            format!("{} labels counted{refused}", answer["counted"])
        })?;
        Ok(if refused.is_empty() { Verdict::Yes } else { Verdict::No })
    }
}
