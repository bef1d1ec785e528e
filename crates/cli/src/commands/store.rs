//! `cutover store check` and `repair`.

use super::target::Target;
use crate::{
    Verdict,
    output::{Printer, bytes, table},
};
use anyhow::Result;
use cutover::runtime::{Call, Lost, StoreCheck, StoreRepair, check_store, repair_store};
use serde_json::json;

#[derive(clap::Args)]
#[command(after_help = "Example: cutover store check --store models")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Reads everything through and compares it with its digest; changes nothing. Exits with 1 if something is damaged or missing.
    #[command(after_help = "Example: cutover store check --store models")]
    Check {
        #[command(flatten)]
        target: Target,
    },
    /// Moves what is damaged into the store's folder `damaged`, goes back to versions that are whole, and says what was lost. Exits with 1 if
    /// something was.
    #[command(after_help = "Example: cutover store repair --store models")]
    Repair {
        #[command(flatten)]
        target: Target,
    },
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        match self.command {
            Command::Check { target } => check(&target, printer),
            Command::Repair { target } => repair(&target, printer),
        }
    }
}

fn check(target: &Target, printer: &Printer) -> Result<Verdict> {
    // A damaged store may be one that no host opens.
    let check: StoreCheck = match target.holder() {
        Some(mut holder) => holder.call(&Call::CheckStore)?,
        None => {
            target.must_exist()?;
            check_store(&target.store)?
        }
    };
    printer.print(&json!(check), || {
        let rows = vec![
            row("format", check.format.to_string()),
            row("models", check.models.to_string()),
            row("versions", check.versions.to_string()),
            row("objects", check.objects.to_string()),
            row("bytes", bytes(check.bytes)),
            row("bytes if versions shared nothing", bytes(check.bytes_unshared)),
            row("objects without use", check.unused.to_string()),
            row("damaged or missing", check.lost.len().to_string()),
        ];
        format!("{}{}", table(&["", "value"], rows, true), lost(&check.lost))
    })?;
    Ok(if check.lost.is_empty() { Verdict::Yes } else { Verdict::No })
}

fn repair(target: &Target, printer: &Printer) -> Result<Verdict> {
    let repair: StoreRepair = match target.holder() {
        Some(mut holder) => holder.call(&Call::RepairStore)?,
        None => {
            target.must_exist()?;
            repair_store(&target.store)?
        }
    };
    printer.print(&json!(repair), || {
        if repair.lost.is_empty() {
            return "nothing is damaged".to_string();
        }
        let changes = repair.changes.iter().map(|change| format!("\n{change}")).collect::<String>();
        format!("{}{changes}\n{} objects without use removed", lost(&repair.lost).trim_start(), repair.removed)
    })?;
    Ok(if repair.lost.is_empty() { Verdict::Yes } else { Verdict::No })
}

fn row(name: &str, value: String) -> Vec<String> {
    vec![name.to_string(), value]
}

fn lost(lost: &[Lost]) -> String {
    let line = |l: &Lost| format!("\nlost: object {} ({}), of {}", l.digest, l.reason, l.versions.join(", "));
    lost.iter().map(line).collect()
}
