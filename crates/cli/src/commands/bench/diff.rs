//! `cutover bench diff`: one matrix against another, cell by cell.

use super::{
    assertion::{Assertion, Metric, Unit},
    document::{Cell, Document, Key},
    statistics::{holm, least_p, mann_whitney, median, ratio_interval},
    tables::significant,
};
use crate::{
    Verdict,
    output::{Printer, dense_table},
};
use anyhow::{Result, bail};
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    io::IsTerminal,
    path::PathBuf,
};

#[derive(clap::Args)]
#[command(
    after_help = "Example: cutover bench diff before.json now.json --threshold 5% --assert 'ratio<=1.05 where backend=cpu'\n\n\
    A ratio is the median over rounds in NOW over that in BEFORE: below 1 is faster. Its interval is a bootstrap's over rounds (95 %, 10000 \
    resamples, seeded). p is the Mann-Whitney test's over rounds, two-sided, corrected by Holm for the number of cells; a cell has changed where p is \
    at most --alpha.\n\n\
    Exit codes: 0 compared, 1 with --threshold and a cell that has changed by more, 2 error, 3 an assertion does not hold."
)]
pub(super) struct Arguments {
    /// What `cutover bench --matrix --json=FILE` wrote.
    before: PathBuf,
    /// Another such file, later.
    now: PathBuf,
    /// A cell that has become slower by more than this, and not by chance, makes the command exit with 1.
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    threshold: Option<f64>,
    /// The chance of one false alarm among all cells.
    #[arg(long, default_value_t = 0.05)]
    alpha: f64,
    /// Compares files of different machines or settings all the same.
    #[arg(long)]
    force: bool,
    /// Of the bootstrap.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Fails where a cell breaks it, e.g. 'ratio<=1.05'; 'low<=1 and p>=0.01 where backend=cpu'. May be given again. Metrics: ratio, low, high, p, before, now, memory.
    #[arg(long = "assert", value_name = "BOUND")]
    assertions: Vec<String>,
}

fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
    let number = number.filter(|number| (0.0..=1000.0).contains(number)).map(|number| number / 100.0);
    number.ok_or_else(|| "expected a percentage such as 5%".to_string())
}

/// One cell in both files.
#[derive(Clone, Debug, Serialize)]
struct Change {
    #[serde(flatten)]
    key: Key,
    before_ms: f64,
    now_ms: f64,
    ratio: f64,
    /// 95 %; `None` of too few rounds.
    ratio_low: Option<f64>,
    ratio_high: Option<f64>,
    /// As it is, and corrected for the number of cells.
    p: f64,
    p_corrected: f64,
    verdict: Direction,
    memory_ratio: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Direction {
    Faster,
    Slower,
    Same,
}

const METRICS: &[Metric<Change>] = &[
    Metric { name: "ratio", unit: Unit::Share, of: |c| Some(c.ratio) },
    Metric { name: "low", unit: Unit::Share, of: |c| c.ratio_low },
    Metric { name: "high", unit: Unit::Share, of: |c| c.ratio_high },
    Metric { name: "p", unit: Unit::Share, of: |c| Some(c.p_corrected) },
    Metric { name: "before", unit: Unit::Time, of: |c| Some(c.before_ms) },
    Metric { name: "now", unit: Unit::Time, of: |c| Some(c.now_ms) },
    Metric { name: "memory", unit: Unit::Share, of: |c| c.memory_ratio },
];

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        if !(self.alpha > 0.0 && self.alpha < 1.0) {
            bail!("--alpha {}: expected a chance between 0 and 1", self.alpha);
        }
        let assertions: Vec<Assertion<Change>> =
            self.assertions.iter().map(|text| Assertion::parse(text, METRICS)).collect::<Result<_>>()?;
        let (before, now) = (Document::read(&self.before)?, Document::read(&self.now)?);
        let warnings = self.comparable(&before, &now)?;
        let changes = changes(&before, &now, self.alpha, self.seed);
        let missing = [missing(&before, &now, "before"), missing(&now, &before, "now")].concat();
        let mut notes = warnings;
        let hopeless =
            changes.iter().filter(|change| !change.could_differ(&before, &now, changes.len(), self.alpha)).count();
        if hopeless > 0 {
            notes.push(format!(
                "{hopeless} of {} cells have too few rounds for any difference to be more than chance: measure with more --rounds",
                changes.len()
            ));
        }
        let broken: Vec<String> =
            assertions.iter().flat_map(|assertion| assertion.broken(changes.iter().map(|c| (&c.key, c)))).collect();
        let slower = |change: &&Change| {
            change.verdict == Direction::Slower && self.threshold.is_some_and(|most| change.ratio > 1.0 + most)
        };
        let regressions: Vec<String> = changes.iter().filter(slower).map(|change| change.key.to_string()).collect();
        let mean = geometric_mean(&changes);
        let document = serde_json::json!({
            "before": self.before.display().to_string(),
            "now": self.now.display().to_string(),
            "cells": changes,
            "missing": missing,
            "notes": notes,
            "geometric_mean": mean,
            "test": "Mann-Whitney over rounds, two-sided, corrected by Holm",
            "interval": "bootstrap over rounds, percentiles, 95 %, 10000 resamples",
            "alpha": self.alpha,
            "seed": self.seed,
            "threshold": self.threshold,
            "regressions": regressions,
            "broken_assertions": broken,
        });
        printer.print(&document, || text(&changes, &missing, mean, std::io::stdout().is_terminal()))?;
        notes.iter().for_each(|note| eprintln!("note: {note}"));
        regressions.iter().for_each(|key| eprintln!("slower: {key}"));
        broken.iter().for_each(|line| eprintln!("assertion: {line}"));
        Ok(match () {
            () if !broken.is_empty() => Verdict::Broken,
            () if !regressions.is_empty() => Verdict::No,
            () => Verdict::Yes,
        })
    }

    /// What is to be known of the comparison.
    ///
    /// # Errors
    /// Files of different machines, or measured differently, unless forced.
    fn comparable(&self, before: &Document, now: &Document) -> Result<Vec<String>> {
        let mut differ = before.machine.differences(&now.machine);
        let (a, b) = (&before.settings, &now.settings);
        if (a.rate, a.arrivals) != (b.rate, b.arrivals) {
            let rate = |rate: Option<f64>| rate.map_or("none".to_string(), |rate| rate.to_string());
            differ.push(format!("rate: {} and {}", rate(a.rate), rate(b.rate)));
        }
        if !differ.is_empty() && !self.force {
            bail!("these are not to be compared, unless with --force: {}", differ.join("; "));
        }
        let mut notes: Vec<String> = differ.into_iter().map(|difference| format!("differs, {difference}")).collect();
        for (document, path) in [(before, &self.before), (now, &self.now)] {
            notes.extend(document.machine.was_busy().map(|busy| format!("{}: {busy}", path.display())));
            if !document.complete {
                notes.push(format!(
                    "{} was interrupted after {} of {} rounds",
                    path.display(),
                    document.rounds_done,
                    document.settings.rounds
                ));
            }
        }
        Ok(notes)
    }
}

fn medians(cell: &Cell) -> Vec<f64> {
    cell.rounds.iter().map(|round| round.median_ms).collect()
}

/// Cells with rounds, by their keys.
fn measured(document: &Document) -> BTreeMap<&Key, &Cell> {
    document.cells.iter().filter(|cell| !cell.rounds.is_empty()).map(|cell| (&cell.key, cell)).collect()
}

fn changes(before: &Document, now: &Document, alpha: f64, seed: u64) -> Vec<Change> {
    let (before, now) = (measured(before), measured(now));
    let pairs: Vec<(&Key, &Cell, &Cell)> =
        before.iter().filter_map(|(key, cell)| Some((*key, *cell, *now.get(key)?))).collect();
    let p: Vec<f64> = pairs.iter().map(|(_, a, b)| mann_whitney(&medians(a), &medians(b))).collect();
    let corrected = holm(&p);
    let change = |((key, before, now), (p, p_corrected)): ((&Key, &Cell, &Cell), (f64, f64))| {
        let (before_ms, now_ms) = (median(&medians(before)), median(&medians(now)));
        let interval = ratio_interval(&medians(before), &medians(now), seed);
        let ratio = now_ms / before_ms;
        let memory = |cell: &Cell| cell.figures.as_ref().map(|f| f.peak_rss_bytes.max(1) as f64);
        let verdict = match p_corrected <= alpha {
            true if ratio < 1.0 => Direction::Faster,
            true if ratio > 1.0 => Direction::Slower,
            _ => Direction::Same,
        };
        Change {
            key: key.clone(),
            before_ms,
            now_ms,
            ratio,
            ratio_low: interval.map(|i| i.low),
            ratio_high: interval.map(|i| i.high),
            p,
            p_corrected,
            verdict,
            memory_ratio: memory(now).zip(memory(before)).map(|(now, before)| now / before),
        }
    };
    pairs.into_iter().zip(p.iter().copied().zip(corrected)).map(change).collect()
}

impl Change {
    /// Whether as many rounds can show a difference at all, among so many cells.
    fn could_differ(&self, before: &Document, now: &Document, cells: usize, alpha: f64) -> bool {
        let rounds = |document| measured(document).get(&self.key).map_or(0, |cell: &&Cell| cell.rounds.len());
        least_p(rounds(before), rounds(now)) * cells as f64 <= alpha
    }
}

/// Cells of `document` that `other` has no figures of, and why, where it says.
fn missing(document: &Document, other: &Document, side: &str) -> Vec<String> {
    let there: BTreeSet<&Key> = measured(other).into_keys().collect();
    let name = |key: &&Key| {
        let gap = other.cells.iter().find(|cell| cell.key == **key).and_then(|cell| cell.gap.as_deref());
        format!("{key}: only {side}{}", gap.map_or(String::new(), |gap| format!(" ({gap})")))
    };
    measured(document).into_keys().filter(|key| !there.contains(key)).map(|key| name(&key)).collect()
}

/// Of all ratios; `None` of none.
fn geometric_mean(changes: &[Change]) -> Option<f64> {
    let sum: f64 = changes.iter().map(|change| change.ratio.ln()).sum();
    (!changes.is_empty()).then(|| (sum / changes.len() as f64).exp())
}

fn text(changes: &[Change], missing: &[String], mean: Option<f64>, coloured: bool) -> String {
    let row = |change: &Change| {
        let interval = change.ratio_low.zip(change.ratio_high).map(|(low, high)| format!("{low:.3}–{high:.3}"));
        let verdict = match change.verdict {
            Direction::Faster => "faster",
            Direction::Slower => "slower",
            Direction::Same => "same",
        };
        vec![
            change.key.to_string(),
            significant(change.before_ms),
            significant(change.now_ms),
            format!("{:.3}", change.ratio),
            interval.unwrap_or_default(),
            format!("{:.4}", change.p_corrected),
            verdict.to_string(),
        ]
    };
    let head = ["cell", "before ms", "now ms", "ratio", "95 %", "p", ""];
    let mut text = dense_table(&head, changes.iter().map(row).collect());
    if coloured {
        text = text.lines().map(painted).collect::<Vec<_>>().join("\n");
    }
    if let Some(mean) = mean {
        text += &format!("\ngeometric mean of {} ratios: {mean:.3}\n", changes.len());
    }
    for line in missing {
        text += &format!("\n{line}");
    }
    text
}

/// A line of the table with its verdict, which stands at its end, in green or red.
fn painted(line: &str) -> String {
    let ended = line.trim_end();
    for (verdict, code) in [("faster", 32), ("slower", 31)] {
        if let Some(rest) = ended.strip_suffix(verdict) {
            return format!("{rest}\x1b[{code}m{verdict}\x1b[0m");
        }
    }
    line.to_string()
}
