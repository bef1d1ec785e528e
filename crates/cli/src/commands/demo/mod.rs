//! `cutover demo`: a real model served, replaced under load by a smaller one, and a bad successor found out three times: as a shadow that no
//! caller sees, as a canary, and in an A/B test.
//!
//! Nothing here tells the host which version is bad: its gates find out.

mod clients;
mod digits;
mod report;

use super::{
    convert::{Source, convert},
    serve::open_host,
};
use crate::{Verdict, output::Printer, tensors};
use anyhow::{Context, Result, bail};
use clients::{Answered, Clients, Expected, agent, get, post};
use cutover::{Device, DeviceOptions, Model, Tensor};
use cutover_server::{Server, ServerOptions};
use digits::HeldOut;
use indicatif::{ProgressBar, ProgressStyle};
use report::{Decision, Findings};
use serde_json::{Value as Json, json};
use std::{
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

#[derive(clap::Args)]
#[command(after_help = "Example: cutover demo --stay")]
pub(crate) struct Arguments {
    /// Keeps serving after the table, and says where.
    #[arg(long)]
    stay: bool,
    /// Threads that ask without pause.
    #[arg(long, default_value_t = 4)]
    clients: usize,
}

/// How long each calm phase between rollouts lasts.
const CALM: Duration = Duration::from_secs(2);
/// A rollout that is undecided for so long has failed to do what the demo shows.
const PATIENCE: Duration = Duration::from_secs(15);
/// Records a client keeps; enough for the whole demo.
const RECORDS: usize = 400_000;

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let start = Instant::now();
        let progress = if printer.json { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        progress.set_style(ProgressStyle::with_template("{spinner} {elapsed:>3} {msg}").context("a template")?);
        progress.enable_steady_tick(Duration::from_millis(100));
        progress.set_message("packing three versions of the digits model");
        let folder = tempfile::Builder::new().prefix("cutover-demo-").tempdir().context("a temporary folder")?;
        let held_out = HeldOut::read()?;
        let (packages, expected) = prepare(folder.path(), &held_out)?;
        // Each request runs on one thread: there are more requests than cores.
        let device = DeviceOptions { threads: Some(1), ..DeviceOptions::default() };
        let host = open_host(&folder.path().join("store"), Device::Auto, &device, 2)?;
        host.deploy("digits", &packages[0], cutover::Strategy::blue_green())?;
        let server = Server::start(host.clone(), ([127, 0, 0, 1], 0).into(), &ServerOptions::default())?;
        let url = format!("http://{}", server.address());
        let findings = drive(&url, &held_out, &expected, &packages, self.clients.clamp(1, 64), &progress, start)?;
        progress.finish_and_clear();
        printer.print(&findings.json(), || findings.text())?;
        let verdict = if findings.good() { Verdict::Yes } else { Verdict::No };
        if self.stay {
            let example = json!({ "inputs": [{ "name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": held_out.image(0) }] });
            eprintln!(
                "still serving at {url}; Ctrl-C ends it. Ask it:\n\n  curl -s {url}/v2/models/digits/infer -d '{example}'\n"
            );
            server.wait_for_signal()?;
        }
        Ok(verdict)
    }
}

/// The three packages, and what each version answers to every held-out image.
fn prepare(folder: &Path, held_out: &HeldOut) -> Result<(Vec<PathBuf>, Vec<Expected>)> {
    let images = |count: usize| Tensor::from_vec([count, 1, 8, 8], held_out.images[..count * 64].to_vec());
    let golden = folder.join("golden.npz");
    tensors::write(&golden, &vec![("image".to_string(), images(16)?)])?;
    let (mut packages, mut expected) = (Vec::new(), Vec::new());
    for (version, ..) in digits::VERSIONS {
        let files = folder.join(version);
        digits::write(version, &files)?;
        let package = folder.join(format!("digits-{version}.cutover"));
        let model = files.join("model.onnx");
        let source = Source { model: &model, name: "digits", version, golden: Some(&golden), f16: false };
        convert(&source, &package)?;
        // On the definition, not on what will serve: a server that is wrong in the same way would go unseen.
        let mut session = Model::open(&package)?.compile(Device::Reference)?.session()?;
        let answers = session.run([("image", images(held_out.labels.len())?.view())])?;
        let probabilities = answers.get("probabilities").context("the model's output 'probabilities'")?.to_vec()?;
        expected.push(Expected { version, probabilities });
        packages.push(package);
    }
    Ok((packages, expected))
}

fn drive(
    url: &str,
    held_out: &HeldOut,
    expected: &[Expected],
    packages: &[PathBuf],
    count: usize,
    progress: &ProgressBar,
    start: Instant,
) -> Result<Findings> {
    let clients = Clients::new(url.to_string(), held_out, expected);
    // Touched before memory is measured, so that the records themselves do not look like a leak.
    let mut records: Vec<Vec<Answered>> = (0..count)
        .map(|_| {
            let mut records = vec![Answered { at_s: 1.0, ..Answered::default() }; RECORDS];
            records.clear();
            records
        })
        .collect();
    let (swaps, memory, outcome) = std::thread::scope(|scope| {
        for (client, records) in records.iter_mut().enumerate() {
            let clients = &clients;
            scope.spawn(move || clients.ask(client, records));
        }
        scope.spawn(|| clients.post_labels());
        let mut stage = Stage { url, clients: &clients, progress, agent: agent(), swaps: Vec::new() };
        let outcome = stage.play(packages);
        let memory = outcome.as_ref().map(|o| o.memory).unwrap_or_default();
        clients.stop();
        (stage.swaps, memory, outcome)
    });
    let outcome = outcome?;
    Ok(Findings {
        versions: expected.iter().map(|e| e.version).collect(),
        answered: records.into_iter().flatten().collect(),
        failed: clients.failed.load(Ordering::Relaxed),
        wrong_version: clients.wrong_version.load(Ordering::Relaxed),
        complaints: clients.complaints.lock().expect("no thread panics with it").clone(),
        swaps,
        memory_before: memory.0,
        memory_after: memory.1,
        decisions: outcome.decisions,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Drives the rollouts, over HTTP like anyone else.
struct Stage<'a> {
    url: &'a str,
    clients: &'a Clients<'a>,
    progress: &'a ProgressBar,
    agent: ureq::Agent,
    swaps: Vec<(f32, String)>,
}

#[derive(Default)]
struct Outcome {
    decisions: Vec<Decision>,
    memory: (u64, u64),
}

/// The strategies of the demo, with times for a machine that answers thousands of requests a second.
fn canary() -> Json {
    let steps = [(0.1, 1.0), (0.5, 1.0)].map(|(share, dwell_s)| json!({ "share": share, "dwell_s": dwell_s }));
    json!({ "canary": { "steps": steps, "deadline_s": PATIENCE.as_secs_f64() } })
}

fn shadow() -> Json {
    json!({ "shadow": { "observe_s": 1.0, "deadline_s": PATIENCE.as_secs_f64(), "then": null } })
}

/// What the metric says decides here: the gates let any accuracy pass.
fn ab_test() -> Json {
    let gates = json!({ "accuracy_drop_max": 1.0 });
    json!({ "ab": { "metric": "accuracy", "minimum_effect": 0.01, "deadline_s": PATIENCE.as_secs_f64(), "gates": gates } })
}

impl Stage<'_> {
    fn play(&mut self, packages: &[PathBuf]) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        self.calm("v1 serves")?;
        outcome.memory.0 = resident_bytes();
        outcome.decisions.push(self.roll_out("v2", &packages[1], canary(), "promoted")?);
        self.calm("v2 should serve now")?;
        for strategy in [shadow(), canary(), ab_test()] {
            outcome.decisions.push(self.roll_out("v3", &packages[2], strategy, "rolled back")?);
        }
        self.calm("the version before v3 should serve")?;
        outcome.memory.1 = resident_bytes();
        Ok(outcome)
    }

    fn get(&self, path: &str) -> Result<Json> {
        get(&self.agent, &format!("{}{path}", self.url)).map_err(anyhow::Error::msg)
    }

    /// What `digits` is doing.
    fn status(&self) -> Result<Json> {
        let status = self.get("/cutover/v1/status")?;
        Ok(status["models"].as_array().and_then(|m| m.first()).cloned().unwrap_or_default())
    }

    fn active(&self) -> Result<String> {
        Ok(self.status()?["active"]["version"].as_str().unwrap_or_default().to_string())
    }

    fn calm(&self, what: &str) -> Result<()> {
        let end = Instant::now() + CALM;
        while Instant::now() < end {
            self.show(what);
            std::thread::sleep(Duration::from_millis(50));
        }
        match self.clients.answered.load(Ordering::Relaxed) {
            0 => bail!(
                "no request was answered: {:?}",
                self.clients.complaints.lock().expect("no thread panics with it")
            ),
            _ => Ok(()),
        }
    }

    /// Deploys, and tells how it was decided.
    fn roll_out(&mut self, version: &str, package: &Path, strategy: Json, expected: &'static str) -> Result<Decision> {
        let name = strategy.as_object().and_then(|s| s.keys().next()).cloned().unwrap_or_default();
        let body = json!({ "package": package, "strategy": strategy });
        let deploy = format!("{}/cutover/v1/models/digits/deploy", self.url);
        let began_s = self.clients.start.elapsed().as_secs_f32();
        post(&self.agent, &deploy, &body).map_err(anyhow::Error::msg)?;
        let mut share = -1.0;
        let end = Instant::now() + PATIENCE;
        loop {
            let status = self.status()?;
            if status["rollout"].is_null() || Instant::now() >= end {
                break;
            }
            let now = status["rollout"]["share"].as_f64().unwrap_or_default();
            if now != share {
                share = now;
                self.swap(format!("{version} by {name} gets {:.0} %", 100.0 * share));
            }
            self.show(&format!("{version} by {name}, {:.0} % of the requests", 100.0 * share));
            std::thread::sleep(Duration::from_millis(5));
        }
        let history = self.get("/cutover/v1/models/digits/history")?;
        let last = history.as_array().and_then(|entries| entries.last()).cloned().unwrap_or_default();
        let of = |key: &str| last[key].as_str().unwrap_or_default().to_string();
        let outcome = if last["version"] == version { of("event") } else { "undecided".to_string() };
        self.swap(format!("{version} by {name}: {outcome}; {} serves", self.active()?));
        let ended_s = self.clients.start.elapsed().as_secs_f32();
        Ok(Decision {
            strategy: name,
            version: version.to_string(),
            expected,
            outcome,
            reason: of("reason"),
            began_s,
            ended_s,
        })
    }

    fn swap(&mut self, what: String) {
        self.progress.println(format!("{:6.1} s  {what}", self.clients.start.elapsed().as_secs_f32()));
        self.swaps.push((self.clients.start.elapsed().as_secs_f32(), what));
    }

    fn show(&self, what: &str) {
        let of = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let (answered, labels) = (of(&self.clients.answered), of(&self.clients.labels));
        let bad = of(&self.clients.failed) + of(&self.clients.wrong_version);
        self.progress.set_message(format!("{what}: {answered} answered, {labels} labels, {bad} failed or wrong"));
    }
}

/// The resident set of this process.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
}
