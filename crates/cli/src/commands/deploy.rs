//! `cutover deploy`, `status` and `rollback`: they talk to the server that holds the store, or else open the store themselves.

use super::serve::open_host;
use crate::{
    Verdict,
    output::{Printer, table},
};
use anyhow::{Context, Result, bail};
use cutover::{
    Device, DeviceOptions, Host, Strategy,
    runtime::{HistoryEntry, ModelStatus, Status as HostStatus},
};
use serde::de::DeserializeOwned;
use serde_json::{Value as Json, json};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// Whom the command talks to.
#[derive(clap::Args)]
pub(crate) struct Target {
    /// The store's folder. If a server holds it, the command talks to that server. Deploying makes it if it is not there.
    #[arg(long, default_value = "models")]
    store: PathBuf,
    /// A server, e.g. http://127.0.0.1:8080.
    #[arg(long, conflicts_with = "store")]
    server: Option<String>,
}

enum Connection {
    Server(String),
    Store(Box<Host>),
}

impl Target {
    /// The server or the store; `create` makes a store where none is, in a folder that is empty or not there.
    fn connect(&self, create: bool) -> Result<Connection> {
        if let Some(url) = &self.server {
            return Ok(Connection::Server(url.trim_end_matches('/').to_string()));
        }
        if let Some(url) = announced(&self.store) {
            return Ok(Connection::Server(url));
        }
        // A folder of something else must not be littered with a store.
        let is_free = || fs::read_dir(&self.store).map_or(!self.store.exists(), |mut entries| entries.next().is_none());
        if !(Host::has_store(&self.store) || create && is_free()) {
            bail!("there is no store at {}; give --store, or --server", self.store.display());
        }
        Ok(Connection::Store(Box::new(open_host(&self.store, Device::Auto, &DeviceOptions::default(), 0)?)))
    }
}

/// Where the server that holds the store listens, if there is one and it answers.
fn announced(store: &Path) -> Option<String> {
    let holder: Json = serde_json::from_str(&fs::read_to_string(store.join("holder.json")).ok()?).ok()?;
    let url = holder["url"].as_str()?.to_string();
    agent().get(format!("{url}/v2/health/live")).call().is_ok().then_some(url)
}

fn agent() -> ureq::Agent {
    let config =
        ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(600)));
    config.build().into()
}

/// The answer's body; any status but 200 is an error with the server's message.
fn call<T: DeserializeOwned>(method: &str, url: &str, body: Option<Json>) -> Result<T> {
    let answer = match body {
        Some(body) => agent().post(url).send_json(&body),
        None if method == "GET" => agent().get(url).call(),
        None => agent().post(url).send_empty(),
    };
    let mut answer = answer.with_context(|| format!("no answer from {url}"))?;
    let (status, text) = (answer.status(), answer.body_mut().read_to_string()?);
    if status != 200 {
        let message = serde_json::from_str::<Json>(&text).ok().and_then(|j| j["error"].as_str().map(str::to_string));
        bail!("{}", message.unwrap_or(format!("{url}: {status}")));
    }
    serde_json::from_str(&text).with_context(|| format!("{url} gave no answer of this version's"))
}

#[derive(clap::Args)]
#[command(after_help = "Example: cutover deploy digits digits-v2.cutover --strategy canary --store models")]
pub(crate) struct Deploy {
    /// The model's name.
    name: String,
    package: PathBuf,
    /// blue-green or canary.
    #[arg(long, default_value = "canary", value_parser = strategy)]
    strategy: Strategy,
    /// The strategy's parameters as JSON, e.g. {"steps":[{"share":0.5,"dwell_s":10}]}.
    #[arg(long)]
    parameters: Option<String>,
    #[command(flatten)]
    target: Target,
}

fn strategy(name: &str) -> Result<Strategy, String> {
    match name {
        "blue-green" => Ok(Strategy::blue_green()),
        "canary" => Ok(Strategy::canary()),
        _ => Err("expected blue-green or canary".to_string()),
    }
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
        let id: String = match self.target.connect(true)? {
            Connection::Server(url) => {
                let body = json!({ "package": package, "strategy": strategy });
                let answer: Json = call("POST", &format!("{url}/cutover/v1/models/{}/deploy", self.name), Some(body))?;
                answer["rollout"].as_str().unwrap_or_default().to_string()
            }
            Connection::Store(host) => host.deploy(&self.name, &package, strategy)?.0,
        };
        let document = json!({ "rollout": id });
        printer.print(&document, || format!("rollout {id} of {} started; cutover status shows it", self.name))?;
        Ok(Verdict::Yes)
    }
}

#[derive(clap::Args)]
#[command(after_help = "Example: cutover status --store models")]
pub(crate) struct Status {
    /// Lists every transition of this model, and why.
    #[arg(long, value_name = "MODEL")]
    history: Option<String>,
    #[command(flatten)]
    target: Target,
}

impl Status {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let connection = self.target.connect(false)?;
        if let Some(model) = &self.history {
            let entries: Vec<HistoryEntry> = match &connection {
                Connection::Server(url) => call("GET", &format!("{url}/cutover/v1/models/{model}/history"), None)?,
                Connection::Store(host) => host.history(model)?,
            };
            let row =
                |e: &HistoryEntry| vec![e.at_unix_ms.to_string(), e.event.clone(), e.version.clone(), e.reason.clone()];
            let header = ["unix ms", "event", "version", "why"];
            printer.print(&json!(entries), || table(&header, entries.iter().map(row).collect(), false))?;
            return Ok(Verdict::Yes);
        }
        let status: HostStatus = match &connection {
            Connection::Server(url) => call("GET", &format!("{url}/cutover/v1/status"), None)?,
            Connection::Store(host) => host.status(),
        };
        printer.print(&json!(status), || {
            let rows = status.models.iter().flat_map(rows).collect();
            let header =
                ["model", "role", "version", "share", "requests", "errors", "p50 ms", "p99 ms", "accuracy", "labels"];
            let mut text = table(&header, rows, true);
            for model in &status.models {
                let evidence = model.rollout.iter().flat_map(|r| &r.evidence);
                let rows: Vec<Vec<String>> = evidence
                    .map(|e| {
                        let number = |v: Option<f64>| v.map_or("-".to_string(), |v| format!("{v:.4}"));
                        let of = [
                            number(e.incumbent),
                            number(e.candidate),
                            format!("{}", e.limit),
                            e.observations.to_string(),
                        ];
                        let gate = format!("{:?}", e.gate).to_lowercase();
                        [vec![model.name.clone(), gate], of.to_vec(), vec![format!("{:?}", e.state).to_lowercase()]]
                            .concat()
                    })
                    .collect();
                if !rows.is_empty() {
                    let header = ["model", "gate", "incumbent", "candidate", "limit", "observations", "state"];
                    text += &format!("\n\n{}", table(&header, rows, true));
                }
            }
            text
        })?;
        Ok(Verdict::Yes)
    }
}

fn rows(model: &ModelStatus) -> Vec<Vec<String>> {
    let number = |v: Option<f64>, digits: usize| v.map_or("-".to_string(), |v| format!("{v:.digits$}"));
    let row = |role: String, share: f64, v: &cutover::runtime::VersionStatus| {
        vec![
            model.name.clone(),
            role,
            v.version.clone(),
            format!("{:.0} %", share * 100.0),
            v.requests.to_string(),
            v.errors.to_string(),
            number(v.latency_p50_ms, 3),
            number(v.latency_p99_ms, 3),
            number(v.accuracy, 4),
            v.labels.to_string(),
        ]
    };
    let share = model.rollout.as_ref().map_or(0.0, |r| r.share);
    let mut rows = vec![row("active".to_string(), 1.0 - share, &model.active)];
    if let Some(rollout) = &model.rollout {
        rows.push(row(format!("{}, step {}", rollout.strategy, rollout.step), share, &rollout.candidate));
    }
    rows
}

#[derive(clap::Args)]
#[command(after_help = "Example: cutover rollback digits --store models")]
pub(crate) struct Rollback {
    /// The model's name.
    name: String,
    #[command(flatten)]
    target: Target,
}

impl Rollback {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let active = match self.target.connect(false)? {
            Connection::Server(url) => {
                let answer: Json = call("POST", &format!("{url}/cutover/v1/models/{}/rollback", self.name), None)?;
                answer["active"].as_str().unwrap_or_default().to_string()
            }
            Connection::Store(host) => {
                host.rollback(&self.name)?;
                let status = host.status();
                status.models.into_iter().find(|m| m.name == self.name).map(|m| m.active.version).unwrap_or_default()
            }
        };
        printer.print(&json!({ "active": active }), || format!("{}: version {active} serves", self.name))?;
        Ok(Verdict::Yes)
    }
}
