//! `cutover checklist`.

use super::target::Target;
use crate::{
    Verdict,
    output::{Printer, table},
};
use anyhow::Result;
use cutover::runtime::{Call, Checklist, Item};
use serde_json::{Value as Json, json};
use std::collections::BTreeSet;

#[derive(clap::Args)]
#[command(after_help = "Example: cutover checklist digits --store models\n\
    \x20        cutover checklist digits --sign-off v3 --by \"Ada Lovelace\"\n\
    \x20        cutover checklist digits --require validation,security,sign-off\n\n\
    Of the candidate where a rollout is under way, else of the version in service. Exits with 1 if a required line is not ticked. What can be \
    required: validation, benchmarks, security, monitoring, rollback-plan, documentation, sign-off; a strategy does not start without it.")]
pub(crate) struct Arguments {
    /// The model's name.
    name: String,
    /// What a version must have before a strategy starts: items with commas between, `none`, or `default`.
    #[arg(long, value_name = "ITEMS", value_parser = policy)]
    require: Option<Policy>,
    /// Answers for a version, which need not be deployed yet.
    #[arg(long, value_name = "VERSION", requires = "by")]
    sign_off: Option<String>,
    /// Who answers for it.
    #[arg(long, value_name = "WHO", requires = "sign_off")]
    by: Option<String>,
    #[command(flatten)]
    target: Target,
}

#[derive(Clone)]
struct Policy(Option<BTreeSet<Item>>);

fn policy(text: &str) -> Result<Policy, String> {
    match text {
        "default" => Ok(Policy(None)),
        "none" => Ok(Policy(Some(BTreeSet::new()))),
        items => Ok(Policy(Some(items.split(',').map(|item| item.trim().parse()).collect::<Result<_, _>>()?))),
    }
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let amends = self.require.is_some() || self.sign_off.is_some();
        let mut connection = self.target.connect(amends)?;
        let model = self.name;
        if let Some(Policy(required)) = self.require {
            let _: Json = connection.call(&Call::Require { model: model.clone(), required })?;
        }
        if let (Some(version), Some(by)) = (self.sign_off, self.by) {
            let _: Json = connection.call(&Call::SignOff { model: model.clone(), version, by })?;
        }
        let checklist: Checklist = match connection.call(&Call::Checklist { model: model.clone() }) {
            Ok(checklist) => checklist,
            // Noted before the first version came.
            Err(_) if amends => {
                printer.print(&json!({ "model": model, "lines": [] }), || {
                    format!("{model}: noted; no version is here yet")
                })?;
                return Ok(Verdict::Yes);
            }
            Err(error) => return Err(error),
        };
        printer.print(&json!(checklist), || {
            let row = |line: &cutover::runtime::ChecklistLine| {
                vec![
                    if line.ticked { "[x]" } else { "[ ]" }.to_string(),
                    line.phase.clone(),
                    line.item.to_string(),
                    if line.required { "required" } else { "" }.to_string(),
                    line.evidence.join("\n"),
                ]
            };
            let header = ["", "when", "item", "", "evidence"];
            let lines = table(&header, checklist.lines.iter().map(row).collect(), false);
            let verdict = if checklist.complete { "all that is required is there" } else { "NOT COMPLETE" };
            format!("{} version {}: {verdict}\n{lines}", checklist.model, checklist.version)
        })?;
        Ok(if checklist.complete { Verdict::Yes } else { Verdict::No })
    }
}
