//! The page that `cutover shrink --report` writes: tables and plots in one file that needs nothing else.

use crate::{
    evidence::{Evidence, percent},
    output::bytes,
};
use anyhow::{Result, anyhow};
use cutover_shrink::{
    CalibratedRange, Evaluation, LayerCost, ShrinkReport, Target,
    prune::{PruneReport, PrunedGroup},
    recipe::Detail,
    train::Point,
};
use plotters::prelude::*;

const BLUE: RGBColor = RGBColor(38, 98, 176);
const RED: RGBColor = RGBColor(196, 58, 49);

/// Histograms that are drawn; a network has hundreds of activations, and the first and widest tell most.
const HISTOGRAMS_MAX: usize = 12;
/// Groups of channels that are drawn, and how many side by side.
const GROUPS_MAX: usize = 160;
const GROUPS_IN_A_PLOT: usize = 40;
/// Reasons that are listed.
const REASONS_MAX: usize = 20;

/// The page.
pub(crate) fn page(evidence: &Evidence<'_>) -> Result<String> {
    let mut body = table(&["", "before", "after", ""], &evidence.rows());
    body += "<h2>Steps</h2>";
    body += &table(&["step", "time", ""], &evidence.step_rows());
    let outputs = evidence.outcome.measured.evaluation.comparison.outputs.iter().map(|o| {
        let agreement = o.top1_agreement.map_or("–".to_string(), |share| format!("{:.1} %", share * 100.0));
        vec![o.name.clone(), decibels(o.sqnr_db), format!("{:.5}", o.cosine_mean), agreement]
    });
    body += "<h2>What was lost</h2>";
    body += &table(&["output", "SQNR dB", "mean cosine", "same largest"], &outputs.collect::<Vec<_>>());
    for step in &evidence.outcome.steps {
        match &step.detail {
            Detail::Prune(report) => body += &pruned(report)?,
            Detail::FineTune { curve, metric_name, .. } => body += &tuned(curve, metric_name)?,
            Detail::Quantize(report) => body += &quantized(report)?,
            _ => {}
        }
    }
    let title = format!("{} shrunk", evidence.model.display());
    let title = escaped(&title);
    Ok(format!(
        "<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>\
         body{{font:16px system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}\
         table{{border-collapse:collapse}}td,th{{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right}}\
         td:first-child,th:first-child{{text-align:left}}svg{{max-width:100%;height:auto}}</style><h1>{title}</h1>{body}</html>\n"
    ))
}

/// What pruning left of every group, and what it could not touch.
fn pruned(report: &PruneReport) -> Result<String> {
    let mut body = "<h2>Channels</h2><p>What each group of layers had, pale, and what is left; heads and neurons are groups too.</p>".to_string();
    for (number, groups) in report.groups.chunks(GROUPS_IN_A_PLOT).take(GROUPS_MAX / GROUPS_IN_A_PLOT).enumerate() {
        body += &bars(1 + number * GROUPS_IN_A_PLOT, groups)?;
    }
    let rest = report.groups.len().saturating_sub(GROUPS_MAX);
    if rest > 0 {
        body += &format!("<p>{rest} more are not drawn.</p>");
    }
    let rows = report.groups.iter().enumerate().map(|(i, group)| {
        let count = |count: usize| match group.width {
            1 => count.to_string(),
            width => format!("{count} × {width}"),
        };
        vec![(i + 1).to_string(), count(group.before), count(group.after), group.nodes.join(", ")]
    });
    let rows = table(&["group", "before", "after", "layers that make it"], &rows.collect::<Vec<_>>());
    body += &format!("<details><summary>The groups</summary>{rows}</details>");
    let whole = report.frozen.iter().take(REASONS_MAX).map(|(reason, axes)| vec![reason.clone(), axes.to_string()]);
    body += "<h2>Not pruned</h2>";
    body += &table(&["why", "axes of weights"], &whole.collect::<Vec<_>>());
    Ok(body)
}

fn tuned(curve: &[Point], metric_name: &str) -> Result<String> {
    let of = |pick: &dyn Fn(&Point) -> Option<f64>| -> Vec<(f64, f64)> {
        curve.iter().filter_map(|p| Some((p.step as f64, pick(p)?))).filter(|p| p.1.is_finite()).collect()
    };
    let (losses, metrics) = (of(&|p| Some(p.loss)), of(&|p| p.metric));
    let mut body = "<h2>Fine-tuning</h2>".to_string();
    for (name, points) in [("loss", losses), (metric_name, metrics)] {
        if points.len() > 1 {
            body += &plot("step", name, &points, true)?;
        }
    }
    Ok(body)
}

fn quantized(report: &ShrinkReport) -> Result<String> {
    let mut body = String::new();
    let noise: Vec<f64> = report.layer_sqnr_db.iter().map(|(_, sqnr)| *sqnr).filter(|s| s.is_finite()).collect();
    if noise.len() > 1 {
        body += "<h2>Noise from layer to layer</h2><p>Signal to noise of what each layer gives, with all before it quantized. \
                 A drop marks a layer that loses much.</p>";
        body += &line("layer", "SQNR dB", &noise)?;
    }
    if report.tried.len() > 1 {
        body += "<h2>What was tried</h2><p>Each point is a model: its weights, and the worst output's signal to noise. The budget took the smallest that met it.</p>";
        let points = report.tried.iter().map(|(_, bytes, evaluation)| (*bytes as f64 / 1e6, evaluation.sqnr_db()));
        body += &points_of("weights, MB", "SQNR dB", &points.filter(|p| p.1.is_finite()).collect::<Vec<_>>())?;
    }
    if !report.costs.is_empty() {
        body += "<h2>What integers win</h2><p>The model with this layer in floats and in integers, all else alike.</p>";
        body += &table(&["layer", "in floats", "in integers", ""], &cost_rows(report));
    }
    if !report.sensitivity.is_empty() {
        body += "<h2>Sensitivity</h2><p>Each layer quantized alone, the worst first.</p>";
        let rows = report.sensitivity.iter().map(|s| {
            let kept = if report.quantized.contains(&s.node) { "integers" } else { "floats" };
            vec![s.node.clone(), decibels(s.evaluation.sqnr_db()), task_metric(&s.evaluation), kept.to_string()]
        });
        body += &table(&["layer", "SQNR dB", "metric", "is now in"], &rows.collect::<Vec<_>>());
    }
    if !report.ranges.is_empty() {
        body += "<h2>Activations</h2><p>What was seen in calibration, counts on a scale of powers of ten; red lines are the range that the integers cover.</p>";
        for range in report.ranges.iter().take(HISTOGRAMS_MAX) {
            body += &histogram(range)?;
        }
        let rest = report.ranges.len().saturating_sub(HISTOGRAMS_MAX);
        if rest > 0 {
            body += &format!("<p>{rest} more are not drawn.</p>");
        }
    }
    if !report.kept.is_empty() {
        body += "<h2>Kept in floats</h2>";
        let rows: Vec<_> = report.kept.iter().map(|k| vec![k.name.clone(), k.reason.clone()]).collect();
        body += &table(&["layer", "why"], &rows);
    }
    Ok(body)
}

/// A row for each layer: seconds or bytes, and how they compare.
fn cost_rows(report: &ShrinkReport) -> Vec<Vec<String>> {
    let written = |cost: f64| match report.target {
        Target::Latency => format!("{:.4} ms", cost * 1e3),
        Target::Size | Target::Memory => bytes(cost as u64),
    };
    let row = |cost: &LayerCost| {
        vec![cost.node.clone(), written(cost.floats), written(cost.integers), percent(cost.integers, cost.floats)]
    };
    report.costs.iter().map(row).collect()
}

/// Accuracy where there are labels, else how many answers stayed the same, else how alike they are.
fn task_metric(evaluation: &Evaluation) -> String {
    let outputs = &evaluation.comparison.outputs;
    match (evaluation.accuracy, outputs.first().and_then(|o| o.top1_agreement)) {
        (Some((before, after)), _) => format!("accuracy {:+.2} points", 100.0 * (after - before)),
        (None, Some(agreement)) => format!("agreement {}", percent(agreement, 1.0)),
        (None, None) => format!("cosine {:.5}", outputs.iter().map(|o| o.cosine_mean).fold(1.0, f64::min)),
    }
}

fn decibels(value: f64) -> String {
    if value.is_finite() { format!("{value:.1}") } else { "no difference".to_string() }
}

fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let cells = |tag: &str, cells: &mut dyn Iterator<Item = &str>| {
        let cells: String = cells.map(|cell| format!("<{tag}>{}</{tag}>", escaped(cell))).collect();
        format!("<tr>{cells}</tr>")
    };
    let head = cells("th", &mut header.iter().copied());
    let rows: String = rows.iter().map(|row| cells("td", &mut row.iter().map(String::as_str))).collect();
    format!("<table>{head}{rows}</table>")
}

/// Names come from a file: nothing of them is markup.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn line(x: &str, y: &str, values: &[f64]) -> Result<String> {
    let points: Vec<(f64, f64)> = values.iter().enumerate().map(|(i, v)| (i as f64 + 1.0, *v)).collect();
    plot(x, y, &points, true)
}

fn points_of(x: &str, y: &str, points: &[(f64, f64)]) -> Result<String> {
    if points.is_empty() { Ok(String::new()) } else { plot(x, y, points, false) }
}

/// Points, joined where they follow each other.
fn plot(x: &str, y: &str, points: &[(f64, f64)], joined: bool) -> Result<String> {
    let (across, up) = (spread(points.iter().map(|p| p.0)), spread(points.iter().map(|p| p.1)));
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (800, 320)).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(across, up)
            .map_err(failed)?;
        chart.configure_mesh().x_desc(x).y_desc(y).light_line_style(WHITE).draw().map_err(failed)?;
        if joined {
            chart.draw_series(LineSeries::new(points.iter().copied(), &BLUE)).map_err(failed)?;
        }
        chart.draw_series(points.iter().map(|p| Circle::new(*p, 3, BLUE.filled()))).map_err(failed)?;
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

/// From the least to the greatest, with some room.
fn spread(values: impl Iterator<Item = f64> + Clone) -> std::ops::Range<f64> {
    let (low, high) = (values.clone().fold(f64::INFINITY, f64::min), values.fold(f64::NEG_INFINITY, f64::max));
    let room = ((high - low) * 0.05).max(high.abs() * 0.01).max(1e-6);
    low - room..high + room
}

/// Channels before and after, a bar for each group; `first` is the number of the first.
fn bars(first: usize, groups: &[PrunedGroup]) -> Result<String> {
    let most = groups.iter().map(|g| g.before * g.width).max().unwrap_or(1) as f64;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (800, 260)).into_drawing_area();
        let start = first as f64 - 0.5;
        let mut chart = ChartBuilder::on(&area)
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(start..start + groups.len() as f64, 0.0..most * 1.05)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(WHITE)
            .x_desc("group")
            .y_desc("channels")
            .x_labels(groups.len().min(10))
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y:.0}"))
            .draw()
            .map_err(failed)?;
        for (color, height) in [
            (BLUE.mix(0.25), &(|group: &PrunedGroup| group.before) as &dyn Fn(&PrunedGroup) -> usize),
            (BLUE.mix(0.9), &|group| group.after),
        ] {
            let bar = |(i, group): (usize, &PrunedGroup)| {
                let (from, top) = (start + i as f64, (height(group) * group.width) as f64);
                Rectangle::new([(from + 0.1, 0.0), (from + 0.9, top)], color.filled())
            };
            chart.draw_series(groups.iter().enumerate().map(bar)).map_err(failed)?;
        }
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

fn histogram(range: &CalibratedRange) -> Result<String> {
    const BARS: usize = 128;
    let (low, high) = (f64::from(range.seen.low), f64::from(range.seen.high));
    if range.histogram.is_empty() || low >= high {
        return Ok(String::new());
    }
    let bars: Vec<f64> = range
        .histogram
        .chunks(range.histogram.len().div_ceil(BARS))
        .map(|bins| f64::log10(1.0 + bins.iter().sum::<u64>() as f64))
        .collect();
    let width = (high - low) / bars.len() as f64;
    let top = bars.iter().copied().fold(1.0, f64::max) * 1.05;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (800, 180)).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .caption(escaped(&range.value), ("sans-serif", 14))
            .x_label_area_size(24)
            .y_label_area_size(40)
            .build_cartesian_2d(spread([low, high].into_iter()), 0.0..top)
            .map_err(failed)?;
        chart.configure_mesh().disable_mesh().y_labels(3).draw().map_err(failed)?;
        let bar = |(i, height): (usize, &f64)| {
            let from = low + i as f64 * width;
            Rectangle::new([(from, 0.0), (from + width, *height)], BLUE.mix(0.6).filled())
        };
        chart.draw_series(bars.iter().enumerate().map(bar)).map_err(failed)?;
        for end in [range.chosen.low, range.chosen.high] {
            let end = f64::from(end).clamp(low, high);
            chart.draw_series(LineSeries::new([(end, 0.0), (end, top)], &RED)).map_err(failed)?;
        }
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}
