//! What `cutover shrink` says of its work: as JSON, as text, and as rows that the page shows too.

use crate::output::{bytes, table};
use cutover_shrink::{
    Evaluation, ShrinkReport,
    prune::PruneReport,
    recipe::{Detail, Done, Outcome},
};
use serde_json::{Value as Json, json};
use std::{path::Path, time::Duration};

/// All there is to say of a run.
pub(crate) struct Evidence<'a> {
    pub model: &'a Path,
    pub output: &'a Path,
    /// Of the model and of what was written, external data included.
    pub file_bytes: [u64; 2],
    pub outcome: &'a Outcome,
}

impl Evidence<'_> {
    /// Of the last quantization, where there was one.
    pub fn quantized(&self) -> Option<&ShrinkReport> {
        self.outcome.steps.iter().rev().find_map(|step| match &step.detail {
            Detail::Quantize(report) => Some(&**report),
            _ => None,
        })
    }

    pub fn pruned(&self) -> impl Iterator<Item = &PruneReport> {
        self.outcome.steps.iter().filter_map(|step| match &step.detail {
            Detail::Prune(report) => Some(report),
            _ => None,
        })
    }

    pub fn json(&self) -> Json {
        let measured = &self.outcome.measured;
        let mut document = json!({
            "model": self.model.display().to_string(),
            "output": self.output.display().to_string(),
            "steps": self.outcome.steps.iter().map(step_json).collect::<Vec<_>>(),
            "weight_bytes_before": measured.weight_bytes[0],
            "weight_bytes_after": measured.weight_bytes[1],
            "file_bytes_before": self.file_bytes[0],
            "file_bytes": self.file_bytes[1],
            "parameters_before": measured.parameters[0],
            "parameters_after": measured.parameters[1],
            "operations_before": measured.operations[0],
            "operations_after": measured.operations[1],
            "memory_bytes_before": measured.memory_bytes[0],
            "memory_bytes_after": measured.memory_bytes[1],
            "latency_ms_before": measured.latency_ms[0],
            "latency_ms_after": measured.latency_ms[1],
            "latency_ratio": measured.latency_ms[1] / measured.latency_ms[0],
            "evaluation": evaluation_json(&measured.evaluation),
            "within_budget": self.outcome.within_budget,
            "manifest": self.outcome.manifest,
        });
        if let (Some(report), Some(document)) = (self.quantized(), document.as_object_mut()) {
            let own = json!({
                "smoothed": report.smoothed,
                "equalized": report.equalized,
                "quantized": report.quantized,
                "kept": report.kept.iter().map(|k| json!({ "node": k.name, "reason": k.reason })).collect::<Vec<_>>(),
                "sensitivity": report.sensitivity.iter()
                    .map(|s| json!({ "node": s.node, "evaluation": evaluation_json(&s.evaluation) })).collect::<Vec<_>>(),
                "target": report.target,
                "costs": report.costs,
                "tried": report.tried.iter().map(|(kept, bytes, evaluation)| json!({
                    "layers_in_floats": kept, "weight_bytes": bytes, "evaluation": evaluation_json(evaluation),
                })).collect::<Vec<_>>(),
            });
            document.extend(own.as_object().cloned().unwrap_or_default());
        }
        document
    }

    /// What changed: what, before, after, and how they compare.
    pub fn rows(&self) -> Vec<Vec<String>> {
        let measured = &self.outcome.measured;
        let row = |what: &str, pair: [u64; 2], written: &dyn Fn(u64) -> String| {
            vec![what.to_string(), written(pair[0]), written(pair[1]), percent(pair[1] as f64, pair[0] as f64)]
        };
        let mut rows = vec![
            row("files", self.file_bytes, &bytes),
            row("weights", measured.weight_bytes, &bytes),
            row("parameters", measured.parameters, &count),
            row("operations", measured.operations, &count),
            row("memory", measured.memory_bytes, &bytes),
        ];
        let [before, after] = measured.latency_ms;
        rows.push(vec![
            "latency, ms".to_string(),
            format!("{before:.3}"),
            format!("{after:.3}"),
            percent(after, before),
        ]);
        if let Some((before, after)) = measured.evaluation.accuracy {
            let change = format!("{:+.2} points", 100.0 * (after - before));
            rows.push(vec!["accuracy".to_string(), percent(before, 1.0), percent(after, 1.0), change]);
        }
        rows
    }

    /// The steps: which, how long it took, and what it did.
    pub fn step_rows(&self) -> Vec<Vec<String>> {
        let row = |(number, step): (usize, &Done)| {
            let time = if step.cached { "cached".to_string() } else { seconds(step.time) };
            vec![format!("{}. {}", number + 1, step.name), time, summary(&step.detail)]
        };
        self.outcome.steps.iter().enumerate().map(row).collect()
    }

    pub fn text(&self) -> String {
        let measured = &self.outcome.measured;
        let mut text = table(&["step", "time", ""], self.step_rows(), false);
        text += "\n\n";
        text += &table(&["", "before", "after", ""], self.rows(), true);
        let outputs = measured.evaluation.comparison.outputs.iter().map(|o| {
            let agreement = o.top1_agreement.map_or("-".to_string(), |share| percent(share, 1.0));
            vec![o.name.clone(), format!("{:.1}", o.sqnr_db), format!("{:.5}", o.cosine_mean), agreement]
        });
        text += "\n\n";
        text += &table(&["output", "SQNR dB", "mean cosine", "same largest"], outputs.collect(), true);
        for report in self.pruned().filter(|report| !report.reached) {
            let share = percent(report.operations[1] as f64, report.operations[0] as f64);
            text += &format!(
                "\nPruning did not come down to what was asked for: all that may go went, which leaves {share} of the operations."
            );
        }
        if let Some(report) = self.quantized() {
            text += &format!("\n{} layers quantized, {} kept", report.quantized.len(), report.kept.len());
            for (reason, count) in reasons(report) {
                text += &format!("\n  {count}: {reason}");
            }
            if !report.sensitivity.is_empty() {
                text += "\nmost sensitive layers, each quantized alone:";
                for layer in report.sensitivity.iter().take(5) {
                    text += &format!("\n  {:.1} dB  {}", layer.evaluation.sqnr_db(), layer.node);
                }
            }
            if !report.within_budget {
                text += "\nThe budget is not met, even with every layer in floats that can be.";
            }
            if measured.latency_ms[1] > measured.latency_ms[0] {
                text += "\nIt is no faster on this device: --target latency keeps layers in floats where integers win nothing.";
            }
        }
        for step in &self.outcome.steps {
            match &step.detail {
                Detail::Sparsify(report) => {
                    text += "\nZeros make nothing faster here: this CPU backend has no kernels for them.";
                    if report.zeros() < 2.0 / 3.0 {
                        text += " Below two thirds of zeros a file of sparse weights is no smaller either.";
                    }
                }
                Detail::Verify { missed, .. } if !missed.is_empty() => {
                    text += &format!("\nThe budget is not met: {}", missed.join(", "));
                }
                _ => {}
            }
        }
        text
    }
}

fn summary(detail: &Detail) -> String {
    match detail {
        Detail::Student { of, kept } => format!("layers {kept:?} of {of}"),
        Detail::Prune(report) => {
            let (before, after) =
                report.groups.iter().fold((0, 0), |(b, a), group| (b + group.before, a + group.after));
            let share = percent(report.operations[1] as f64, report.operations[0] as f64);
            format!("{before} channels and heads to {after}, {share} of the operations left")
        }
        Detail::Sparsify(report) => format!("{} of the weights are zero", percent(report.zeros(), 1.0)),
        Detail::FineTune { curve, metric_name, .. } => match curve.last().map(|point| (point.step, point.metric)) {
            Some((steps, Some(metric))) => format!("{steps} steps, {metric_name} {metric:.4}"),
            Some((steps, None)) => format!("{steps} steps"),
            None => String::new(),
        },
        Detail::Quantize(report) => format!("{} layers, {} kept", report.quantized.len(), report.kept.len()),
        Detail::Verify { missed, .. } if missed.is_empty() => "the budget is met".to_string(),
        Detail::Verify { missed, .. } => format!("not met: {}", missed.join(", ")),
        Detail::Measured(_) => String::new(),
        Detail::Pack(answers) => {
            format!("golden answers are the original's, {:.1e} away at most", answers.largest_error)
        }
    }
}

fn step_json(step: &Done) -> Json {
    let mut document = json!({
        "name": step.name, "seconds": step.time.as_secs_f64(), "cached": step.cached, "summary": summary(&step.detail),
    });
    let own = match &step.detail {
        Detail::Student { of, kept } => json!({ "layers": of, "kept": kept }),
        Detail::Prune(report) => json!({
            "groups": report.groups, "parameters": report.parameters, "operations": report.operations, "reached": report.reached,
            "frozen": report.frozen,
        }),
        Detail::Sparsify(report) => json!({ "zeros": report.zeros(), "layers": report.layers }),
        Detail::FineTune { curve, metric_name, samples_per_second } => json!({
            "curve": curve, "metric_name": metric_name, "samples_per_second": samples_per_second,
        }),
        Detail::Verify { evaluation, missed } => json!({ "evaluation": evaluation_json(evaluation), "missed": missed }),
        Detail::Quantize(_) | Detail::Measured(_) | Detail::Pack(_) => json!({}),
    };
    if let (Some(document), Some(own)) = (document.as_object_mut(), own.as_object()) {
        document.extend(own.clone());
    }
    document
}

fn reasons(report: &ShrinkReport) -> Vec<(&str, usize)> {
    let mut reasons: Vec<(&str, usize)> = Vec::new();
    for kept in &report.kept {
        match reasons.iter_mut().find(|(reason, _)| *reason == kept.reason) {
            Some((_, count)) => *count += 1,
            None => reasons.push((&kept.reason, 1)),
        }
    }
    reasons
}

fn evaluation_json(evaluation: &Evaluation) -> Json {
    json!({
        "accuracy_before": evaluation.accuracy.map(|(before, _)| before),
        "accuracy_after": evaluation.accuracy.map(|(_, after)| after),
        "outputs": evaluation.comparison.outputs.iter().map(|o| json!({
            "name": o.name, "sqnr_db": finite(o.sqnr_db), "cosine_mean": o.cosine_mean, "top1_agreement": o.top1_agreement,
            "absolute_error_max": finite(o.absolute_error_max),
        })).collect::<Vec<_>>(),
    })
}

pub(crate) fn percent(part: f64, whole: f64) -> String {
    format!("{:.1} %", 100.0 * part / whole)
}

/// In thousands, millions and thousand millions.
pub(crate) fn count(number: u64) -> String {
    match number {
        0..=9_999 => number.to_string(),
        10_000..=9_999_999 => format!("{:.1} k", number as f64 / 1e3),
        10_000_000..=9_999_999_999 => format!("{:.1} M", number as f64 / 1e6),
        _ => format!("{:.1} G", number as f64 / 1e9),
    }
}

fn seconds(time: Duration) -> String {
    match time.as_secs() {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        seconds => format!("{}:{:02} min", seconds / 60, seconds % 60),
    }
}

/// Infinite where nothing differs, which JSON has no number for.
fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}
