//! `cutover deploy`, `promote` and `rollback`.

use super::target::Target;
use crate::{Verdict, output::Printer};
use anyhow::{Context, Result, bail};
use cutover::{Strategy, runtime::Call};
use serde_json::{Value as Json, json};
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(after_help = "Example: cutover deploy digits digits-v2.cutover --strategy canary --store models\n\n\
    Strategies, each with the parameters that --parameters may change and their defaults:\n\
    \x20 blue-green  all requests at once, and back if a gate fails: {\"observe_s\": 60}\n\
    \x20 canary      a growing share: {\"steps\": [{\"share\": 0.05, \"dwell_s\": 60}, …], \"deadline_s\": 3600}\n\
    \x20 ab          a fixed share until a metric is better, or not: {\"share\": 0.5, \"metric\": \"accuracy\",\n\
    \x20             \"minimum_effect\": 0.01, \"alpha\": 0.05, \"deadline_s\": 604800}; metrics: accuracy, confidence, answered\n\
    \x20 shadow      copies that no caller sees, then a canary: {\"observe_s\": 60, \"deadline_s\": 86400, \"then\": {…} or null}\n\
    \x20 sequential  the old version is unloaded first, where both do not fit in memory\n\
    All but the last take \"gates\", e.g. {\"gates\": {\"error_rate_rise_max\": 0.005, \"accuracy_drop_max\": 0.01}}.")]
pub(crate) struct Deploy {
    /// The model's name.
    name: String,
    package: PathBuf,
    /// blue-green, canary, ab, shadow or sequential.
    #[arg(long, default_value = "canary", value_parser = strategy)]
    strategy: Strategy,
    /// The strategy's parameters as JSON, e.g. {"steps":[{"share":0.5,"dwell_s":10}]}.
    #[arg(long)]
    parameters: Option<String>,
    #[command(flatten)]
    target: Target,
}

fn strategy(name: &str) -> Result<Strategy, String> {
    Strategy::named(name).ok_or_else(|| format!("expected one of {}", Strategy::NAMES.join(", ")))
}

impl Deploy {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let strategy = match &self.parameters {
            None => self.strategy.clone(),
            Some(text) => {
                let parameters: Json = serde_json::from_str(text).context("--parameters")?;
                serde_json::from_value(json!({ self.strategy.name(): parameters })).context("--parameters")?
            }
        };
        let package = std::path::absolute(&self.package)?;
        if !package.exists() {
            bail!("there is no package at {}", package.display());
        }
        let call = Call::Deploy { model: self.name.clone(), package, strategy: Box::new(strategy) };
        let document: Json = self.target.connect(true)?.call(&call)?;
        let id = document["rollout"].as_str().unwrap_or_default();
        printer.print(&document, || {
            format!("rollout {id} of {} started; cutover status shows it, cutover history why it ends", self.name)
        })?;
        Ok(Verdict::Yes)
    }
}

#[derive(clap::Args)]
#[command(after_help = "Example: cutover promote digits --store models")]
pub(crate) struct Promote {
    /// The model's name.
    name: String,
    #[command(flatten)]
    target: Target,
}

#[derive(clap::Args)]
#[command(after_help = "Example: cutover rollback digits --store models")]
pub(crate) struct Rollback {
    /// The model's name.
    name: String,
    #[command(flatten)]
    target: Target,
}

impl Promote {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let call = Call::Promote { model: self.name.clone() };
        switched(&self.name, self.target.connect(false)?.call(&call)?, printer)
    }
}

impl Rollback {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let call = Call::Rollback { model: self.name.clone() };
        switched(&self.name, self.target.connect(false)?.call(&call)?, printer)
    }
}

fn switched(name: &str, document: Json, printer: &Printer) -> Result<Verdict> {
    let active = document["active"].as_str().unwrap_or_default();
    printer.print(&document, || format!("{name}: version {active} serves"))?;
    Ok(Verdict::Yes)
}
