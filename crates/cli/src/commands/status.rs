//! `cutover status` and `history`.

use super::target::Target;
use crate::{
    Verdict,
    output::{Printer, bytes, table, time_of},
};
use anyhow::{Result, bail};
use cutover::{
    monitor::Evidence,
    runtime::{Call, HistoryEntry, ModelStatus, Status as HostStatus, VersionStatus},
};
use serde_json::json;
use std::{
    io::{IsTerminal, Write},
    time::Duration,
};

#[derive(clap::Args)]
#[command(after_help = "Example: cutover status --store models --watch 1\n\n\
    One row for each version in service, then one for each gate of a rollout: what it compares, its limit, and what it says.")]
pub(crate) struct Status {
    /// Shows it again every so many seconds, until Ctrl-C.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1")]
    watch: Option<f64>,
    /// Ends --watch after so many tables.
    #[arg(long, requires = "watch")]
    times: Option<u64>,
    #[command(flatten)]
    target: Target,
}

impl Status {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        if self.watch.is_some_and(|s| !(0.01..=86_400.0).contains(&s)) {
            bail!("--watch: expected a number of seconds between 0.01 and 86400");
        }
        let mut connection = self.target.connect(false)?;
        let mut shown = 0;
        loop {
            let status: HostStatus = connection.call(&Call::Status)?;
            if self.watch.is_some() && !printer.json && std::io::stdout().is_terminal() {
                // Over the table before.
                write!(std::io::stdout(), "\x1b[2J\x1b[H")?;
            }
            printer.print(&json!(status), || text(&status))?;
            shown += 1;
            match self.watch {
                Some(seconds) if self.times.is_none_or(|times| shown < times) => {
                    std::thread::sleep(Duration::from_secs_f64(seconds));
                }
                _ => return Ok(Verdict::Yes),
            }
        }
    }
}

fn text(status: &HostStatus) -> String {
    let header = ["model", "role", "version", "share", "requests", "errors", "p50 ms", "p99 ms", "accuracy", "labels"];
    let mut text = table(&header, status.models.iter().flat_map(rows).collect(), true);
    let gates: Vec<Vec<String>> = status
        .models
        .iter()
        .flat_map(|model| model.rollout.iter().map(move |rollout| (model, rollout)))
        .flat_map(|(model, rollout)| rollout.evidence.iter().map(|e| gate_row(&model.name, e)))
        .collect();
    if !gates.is_empty() {
        let header = ["model", "gate", "incumbent", "candidate", "interval", "limit", "observations", "state"];
        text += &format!("\n\n{}", table(&header, gates, true));
    }
    let budget = status.memory_bytes_max.map_or(String::new(), |max| format!(" of {}", bytes(max)));
    text += &format!("\n\nmemory: {}{budget}", bytes(status.memory_bytes));
    for model in &status.models {
        if let Some(outage) = &model.outage {
            text += &format!(
                "\n{}: OUTAGE, version {} comes; {:.1} s of about {:.1} s",
                model.name, outage.version, outage.so_far_s, outage.expected_s
            );
        }
        if model.rollout.as_ref().is_some_and(|rollout| rollout.holding) {
            text += &format!("\n{}: ALERT, both arms fail alike; the rollout holds (cutover history)", model.name);
        }
        if model.streams > 0 {
            text += &format!("\n{}: {} streams open", model.name, model.streams);
        }
    }
    text
}

fn rows(model: &ModelStatus) -> Vec<Vec<String>> {
    let number = |v: Option<f64>, digits: usize| v.map_or("-".to_string(), |v| format!("{v:.digits$}"));
    let row = |role: String, share: f64, v: &VersionStatus| {
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

fn gate_row(model: &str, e: &Evidence) -> Vec<String> {
    let number = |v: Option<f64>| v.map_or("-".to_string(), |v| format!("{v:.4}"));
    vec![
        model.to_string(),
        e.gate.name().to_string(),
        number(e.incumbent),
        number(e.candidate),
        e.interval.map_or("-".to_string(), |[low, high]| format!("{low:.4} to {high:.4}")),
        e.limit.to_string(),
        e.observations.to_string(),
        e.state.name().to_string(),
    ]
}

#[derive(clap::Args)]
#[command(after_help = "Example: cutover history digits --store models")]
pub(crate) struct History {
    /// The model's name.
    name: String,
    #[command(flatten)]
    target: Target,
}

impl History {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let entries: Vec<HistoryEntry> = self.target.connect(false)?.call(&Call::History { model: self.name })?;
        let row = |e: &HistoryEntry| vec![time_of(e.at_unix_ms), e.event.clone(), e.version.clone(), e.reason.clone()];
        let header = ["UTC", "event", "version", "why"];
        printer.print(&json!(entries), || table(&header, entries.iter().map(row).collect(), false))?;
        Ok(Verdict::Yes)
    }
}
