//! A matrix as a table: for people, for documents, for spreadsheets.

use super::document::{Arrivals, Cell, Document, Figures};
use crate::output::{bytes, dense_table, time_of};
use anyhow::Result;
use std::collections::BTreeMap;

/// The last column, where cells have no figures.
const WHY_NOT: &str = "why not";

/// What a column is called, and what it shows of a cell.
type Column = (&'static str, fn(&Cell) -> String);

/// Columns that are shown where any cell has something in them.
const COLUMNS: &[Column] = &[
    ("model", |c| c.key.model.clone()),
    ("backend", |c| c.key.backend.clone()),
    ("precision", |c| c.key.precision.clone()),
    ("batch", |c| c.figures.as_ref().map(|f| f.batch).or(c.key.batch).map_or(String::new(), |b| b.to_string())),
    ("threads", |c| c.key.threads.map_or(String::new(), |threads| threads.to_string())),
    ("median ms", |c| of(c, |f| Some(significant(f.latency_ms.median)))),
    ("95 %", |c| of(c, interval)),
    ("p99 ms", |c| of(c, |f| Some(significant(f.latency_ms.p99)))),
    ("items/s", |c| of(c, |f| Some(significant(f.items_per_second)))),
    ("unanswered", |c| of(c, |f| (f.unanswered > 0).then(|| f.unanswered.to_string()))),
    ("copy in ms", |c| of(c, |f| f.phases.as_ref()?.copy_in_ms.map(significant))),
    ("kernels ms", |c| of(c, |f| f.phases.as_ref()?.kernels_ms.map(significant))),
    ("copy out ms", |c| of(c, |f| f.phases.as_ref()?.copy_out_ms.map(significant))),
    ("host ms", |c| of(c, |f| f.phases.as_ref()?.host_ms.map(significant))),
    ("load ms", |c| of(c, |f| Some(significant(f.open_ms + f.compile_ms)))),
    ("first ms", |c| of(c, |f| Some(significant(f.first_ms)))),
    ("GFLOP/s", |c| of(c, |f| f.work.as_ref().and_then(|work| rate(work.gflops_per_second)))),
    ("GB/s", |c| of(c, |f| f.work.as_ref().and_then(|work| rate(work.gbytes_per_second)))),
    ("of roofline", |c| of(c, |f| f.work.as_ref()?.of_roofline.map(|share| format!("{:.0} %", 100.0 * share)))),
    ("memory", |c| of(c, |f| Some(bytes(f.peak_rss_bytes)))),
    ("J/item", |c| of(c, |f| f.energy_j_per_item.map(significant))),
    ("GPU J/item", |c| of(c, |f| f.gpu_energy_j_per_item.map(significant))),
    ("steady", |c| {
        of(c, |f| (f.steady_rounds < c.rounds.len()).then(|| format!("{}/{}", f.steady_rounds, c.rounds.len())))
    }),
];

fn of(cell: &Cell, value: impl Fn(&Figures) -> Option<String>) -> String {
    cell.figures.as_ref().and_then(value).unwrap_or_default()
}

/// Nothing where nobody counted.
fn rate(per_second: f64) -> Option<String> {
    (per_second > 0.0).then(|| significant(per_second))
}

/// Where the median lies; empty where the rounds are too few to say.
fn interval(figures: &Figures) -> Option<String> {
    let latency = &figures.latency_ms;
    (latency.coverage >= 0.9)
        .then(|| format!("{}–{}", significant(latency.median_low), significant(latency.median_high)))
}

/// With as many digits as figures of a shared machine are worth.
pub(super) fn significant(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_string(),
        large if large >= 1000.0 => format!("{value:.0}"),
        large if large >= 100.0 => format!("{value:.1}"),
        large if large >= 10.0 => format!("{value:.2}"),
        large if large >= 1.0 => format!("{value:.3}"),
        large if large >= 0.1 => format!("{value:.4}"),
        _ => format!("{value:.5}"),
    }
}

/// The table's head and rows: columns that any cell has something in, and reasons where cells have none.
pub(super) fn rows(document: &Document) -> (Vec<&'static str>, Vec<Vec<String>>) {
    let shown: Vec<&Column> =
        COLUMNS.iter().filter(|(_, of)| document.cells.iter().any(|c| !of(c).is_empty())).collect();
    let has_gaps = document.cells.iter().any(|cell| cell.figures.is_none());
    let mut head: Vec<&str> = shown.iter().map(|(name, _)| *name).collect();
    if has_gaps {
        head.push(WHY_NOT);
    }
    let row = |cell: &Cell| {
        let mut row: Vec<String> = shown.iter().map(|(_, of)| of(cell)).collect();
        if has_gaps {
            row.push(why_not(cell));
        }
        row
    };
    (head, document.cells.iter().map(row).collect())
}

fn why_not(cell: &Cell) -> String {
    match (&cell.gap, &cell.figures) {
        (Some(gap), _) => gap.clone(),
        (None, None) => "interrupted before".to_string(),
        (None, Some(_)) => String::new(),
    }
}

/// What is to be known besides: by its text, the models it is about.
fn notes(document: &Document) -> Vec<String> {
    let mut notes: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for cell in &document.cells {
        for note in &cell.notes {
            let models = notes.entry(note).or_default();
            if !models.contains(&cell.key.model.as_str()) {
                models.push(&cell.key.model);
            }
        }
    }
    notes.into_iter().map(|(note, models)| format!("{}: {note}", models.join(", "))).collect()
}

/// How it was measured, in lines.
pub(super) fn method(document: &Document) -> Vec<String> {
    let settings = &document.settings;
    let mut lines = vec![
        document.machine.summary(),
        format!(
            "{} UTC, cutover {}, {} of {} rounds, {} s of measuring a cell, seed {}",
            time_of(document.started_unix_ms),
            document.cutover,
            document.rounds_done,
            settings.rounds,
            settings.seconds,
            settings.seed
        ),
    ];
    if let Some(rate) = settings.rate {
        let arrivals = if settings.arrivals == Arrivals::Poisson { "Poisson" } else { "equally spaced" };
        lines.push(format!("{rate} requests a second, {arrivals}; latency from when a request was due"));
    }
    lines.extend(document.machine.was_busy());
    if !document.machine.counts_energy {
        lines.push("energy of the processor: the system does not tell".to_string());
    }
    lines
}

pub(super) fn text(document: &Document) -> String {
    let (head, mut rows) = rows(document);
    // Reasons are longer than a column is wide: they stand below, each once.
    let mut reasons: Vec<String> = Vec::new();
    for row in rows.iter_mut().filter(|_| head.last() == Some(&WHY_NOT)) {
        let Some(reason) = row.last_mut().filter(|reason| !reason.is_empty()) else { continue };
        let number = reasons.iter().position(|known| known == reason).unwrap_or_else(|| {
            reasons.push(reason.clone());
            reasons.len() - 1
        });
        *reason = format!("[{}]", number + 1);
    }
    let mut text = dense_table(&head, rows);
    text.push('\n');
    for (number, reason) in reasons.iter().enumerate() {
        text += &format!("[{}] {reason}\n", number + 1);
    }
    for line in notes(document).into_iter().chain(method(document)) {
        text += &format!("{line}\n");
    }
    if !document.complete {
        text += "interrupted: figures are of the rounds until then\n";
    }
    text
}

pub(super) fn markdown(document: &Document) -> String {
    let (head, rows) = rows(document);
    let line = |cells: &mut dyn Iterator<Item = String>| {
        let cells: Vec<String> = cells.map(|c| c.replace('|', "\\|").replace('\n', " ")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let rules = head.iter().map(|name| if is_text(name) { "---" } else { "---:" }.to_string());
    let mut text = line(&mut head.iter().map(|name| name.to_string())) + &line(&mut rules.into_iter());
    for row in rows {
        text += &line(&mut row.into_iter());
    }
    text.push('\n');
    for note in notes(document).into_iter().chain(method(document)) {
        text += &format!("- {note}\n");
    }
    text + &format!("\n    {}\n", document.command.join(" "))
}

fn is_text(column: &str) -> bool {
    matches!(column, "model" | "backend" | "precision" | WHY_NOT)
}

/// A line a cell, with the numbers as they are.
pub(super) fn csv(document: &Document) -> Result<Vec<u8>> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record([
        "model",
        "backend",
        "precision",
        "batch",
        "threads",
        "device",
        "isa",
        "rounds",
        "runs",
        "min_ms",
        "p25_ms",
        "median_ms",
        "median_low_ms",
        "median_high_ms",
        "coverage",
        "mean_ms",
        "p75_ms",
        "p90_ms",
        "p99_ms",
        "p999_ms",
        "max_ms",
        "items_per_second",
        "unanswered",
        "open_ms",
        "compile_ms",
        "first_ms",
        "gflops_per_second",
        "gbytes_per_second",
        "of_roofline",
        "copy_in_ms",
        "kernels_ms",
        "copy_out_ms",
        "host_ms",
        "peak_rss_bytes",
        "energy_j_per_item",
        "gpu_energy_j_per_item",
        "steady_rounds",
        "gap",
    ])?;
    for cell in &document.cells {
        let key = &cell.key;
        let whole = |number: Option<usize>| number.map_or(String::new(), |number| number.to_string());
        let float = |number: Option<f64>| number.map_or(String::new(), |number| number.to_string());
        let mut record = vec![key.model.clone(), key.backend.clone(), key.precision.clone()];
        let figures = cell.figures.as_ref();
        record.extend([whole(figures.map(|f| f.batch).or(key.batch)), whole(key.threads)]);
        match figures {
            None => record.extend(std::iter::repeat_n(String::new(), 32)),
            Some(f) => {
                let (l, work, phases) = (&f.latency_ms, f.work.as_ref(), f.phases.as_ref());
                record.extend([f.device.clone(), f.isa.clone(), cell.rounds.len().to_string(), f.runs.to_string()]);
                let latencies = [
                    l.min,
                    l.p25,
                    l.median,
                    l.median_low,
                    l.median_high,
                    l.coverage,
                    l.mean,
                    l.p75,
                    l.p90,
                    l.p99,
                    l.p999,
                    l.max,
                ];
                record.extend(latencies.map(|v| v.to_string()));
                record.extend([f.items_per_second.to_string(), f.unanswered.to_string()]);
                record.extend([f.open_ms, f.compile_ms, f.first_ms].map(|v| v.to_string()));
                record.extend([
                    float(work.map(|w| w.gflops_per_second)),
                    float(work.map(|w| w.gbytes_per_second)),
                    float(work.and_then(|w| w.of_roofline)),
                    float(phases.and_then(|p| p.copy_in_ms)),
                    float(phases.and_then(|p| p.kernels_ms)),
                    float(phases.and_then(|p| p.copy_out_ms)),
                    float(phases.and_then(|p| p.host_ms)),
                    f.peak_rss_bytes.to_string(),
                    float(f.energy_j_per_item),
                    float(f.gpu_energy_j_per_item),
                    f.steady_rounds.to_string(),
                ]);
            }
        }
        record.push(why_not(cell));
        writer.write_record(record)?;
    }
    writer.into_inner().map_err(|error| anyhow::anyhow!("{error}"))
}
