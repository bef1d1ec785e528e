//! A matrix drawn: a panel a model, a line a cell, a dot at the median on a logarithmic axis, with the quartiles around it.

use super::{
    document::{Cell, Document},
    tables::{method, rows, significant},
};
use anyhow::{Result, anyhow};
use plotters::{
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use std::path::{Path, PathBuf};

const WIDTH: i32 = 960;
const MARGIN: i32 = 24;
/// Of a line, of a panel's title, of its axis.
const LINE: i32 = 22;
const TITLE: i32 = 34;
const AXIS: i32 = 34;
/// Where dots are drawn; labels stand left of it, numbers right.
const LEFT: i32 = 250;
const RIGHT: i32 = 690;

const INK: RGBColor = RGBColor(34, 34, 34);
const FAINT: RGBColor = RGBColor(120, 120, 120);
const GRID: RGBColor = RGBColor(228, 228, 228);
/// Apart for eyes of every kind (Okabe and Ito).
const COLOURS: [(&str, RGBColor); 5] = [
    ("cpu", RGBColor(0, 114, 178)),
    ("wgpu", RGBColor(213, 94, 0)),
    ("cuda", RGBColor(0, 158, 115)),
    ("auto", RGBColor(204, 121, 167)),
    ("reference", RGBColor(130, 130, 130)),
];

/// A file that can be drawn to.
pub(super) fn target(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.extension().and_then(|e| e.to_str()) {
        Some("svg" | "html") => Ok(path),
        _ => Err("expected a file called .svg or .html".to_string()),
    }
}

/// What goes into the file: the plot, in a page with the table where it is called `.html`.
pub(super) fn draw(document: &Document, path: &Path) -> Result<String> {
    let svg = svg(document)?;
    match path.extension().is_some_and(|e| e == "html") {
        true => Ok(page(document, &svg)),
        false => Ok(svg),
    }
}

struct Panel<'a> {
    model: &'a str,
    cells: Vec<&'a Cell>,
}

fn svg(document: &Document) -> Result<String> {
    let mut panels: Vec<Panel<'_>> = Vec::new();
    for cell in &document.cells {
        match panels.iter_mut().find(|panel| panel.model == cell.key.model) {
            Some(panel) => panel.cells.push(cell),
            None => panels.push(Panel { model: &cell.key.model, cells: vec![cell] }),
        }
    }
    let height: i32 = panels.iter().map(|panel| TITLE + LINE * panel.cells.len() as i32 + AXIS).sum();
    let height = height + MARGIN * 2 + 40;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH as u32, height as u32)).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        let drawing = Drawing(&area);
        let mut top = MARGIN;
        for panel in &panels {
            drawing.panel(panel, top)?;
            top += TITLE + LINE * panel.cells.len() as i32 + AXIS;
        }
        let explained = match document.settings.rate {
            None => {
                "Latency of a run: the median over rounds, its interval as a thick line, the middle half of all runs as a thin one."
            }
            Some(_) => {
                "Latency since a request was due: the median over rounds, its interval (thick), the middle half (thin)."
            }
        };
        drawing.text(explained, (MARGIN, top + 16), 12, FAINT, HPos::Left)?;
        let about = method(document).into_iter().next().unwrap_or_default();
        drawing.text(&about, (MARGIN, top + 34), 12, FAINT, HPos::Left)?;
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

struct Drawing<'a, 'b>(&'a Area<'b>);

impl Drawing<'_, '_> {
    fn panel(&self, panel: &Panel<'_>, top: i32) -> Result<()> {
        self.text(panel.model, (MARGIN, top + 14), 17, INK, HPos::Left)?;
        let figures = || panel.cells.iter().filter_map(|cell| cell.figures.as_ref());
        let lowest = figures().map(|f| f.latency_ms.p25.min(f.latency_ms.median_low)).fold(f64::INFINITY, f64::min);
        let highest = figures().map(|f| f.latency_ms.p75.max(f.latency_ms.median_high)).fold(0.0, f64::max);
        let scale = Scale::of(lowest, highest);
        let (start, end) = (top + TITLE, top + TITLE + LINE * panel.cells.len() as i32);
        if highest > 0.0 {
            for tick in scale.ticks() {
                let x = scale.place(tick);
                self.line((x, start - 2), (x, end + 2), GRID, 1)?;
                self.text(&tick_label(tick), (x, end + 12), 12, FAINT, HPos::Center)?;
            }
            self.text("ms", (RIGHT + 14, end + 12), 12, FAINT, HPos::Left)?;
        }
        for (cell, y) in panel.cells.iter().zip((start + LINE / 2..).step_by(LINE as usize)) {
            self.text(&cell.key.setting(), (LEFT - 14, y), 13, INK, HPos::Right)?;
            let Some(figures) = &cell.figures else {
                let reason = cell.gap.as_deref().unwrap_or("interrupted before");
                let short: String = reason.chars().take(105).collect();
                let cut = if short.len() < reason.len() { "…" } else { "" };
                self.text(&format!("{short}{cut}"), (LEFT, y), 12, FAINT, HPos::Left)?;
                continue;
            };
            let colour = COLOURS.iter().find(|(name, _)| *name == cell.key.backend).map_or(INK, |(_, colour)| *colour);
            let latency = &figures.latency_ms;
            let at = |value: f64| (scale.place(value), y);
            self.line(at(latency.p25), at(latency.p75), colour, 1)?;
            self.line(at(latency.median_low), at(latency.median_high), colour, 4)?;
            self.0.draw(&Circle::new(at(latency.median), 5, colour.filled())).map_err(failed)?;
            let numbers = format!("{} ms", significant(latency.median));
            self.text(&numbers, (RIGHT + 100, y), 13, INK, HPos::Right)?;
            let rate = format!("{} items/s", significant(figures.items_per_second));
            self.text(&rate, (WIDTH - MARGIN, y), 13, FAINT, HPos::Right)?;
        }
        Ok(())
    }

    fn text(&self, text: &str, at: (i32, i32), size: i32, colour: RGBColor, side: HPos) -> Result<()> {
        let style = ("sans-serif", size).into_font().color(&colour).pos(Pos::new(side, VPos::Center));
        self.0.draw(&Text::new(text.to_string(), at, style)).map_err(failed)
    }

    fn line(&self, from: (i32, i32), to: (i32, i32), colour: RGBColor, width: u32) -> Result<()> {
        self.0.draw(&PathElement::new([from, to], colour.stroke_width(width))).map_err(failed)
    }
}

/// A logarithmic axis.
struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    /// A little wider than what is on it, and never less than a factor of two.
    fn of(lowest: f64, highest: f64) -> Scale {
        let (low, high) = (lowest.max(1e-9) / 1.15, highest.max(1e-9) * 1.15);
        let wider = (2.0 / (high / low)).max(1.0).sqrt();
        Scale { low: low / wider, high: high * wider }
    }

    fn place(&self, value: f64) -> i32 {
        let share = (value.max(self.low) / self.low).ln() / (self.high / self.low).ln();
        LEFT + (share.clamp(0.0, 1.0) * f64::from(RIGHT - LEFT)).round() as i32
    }

    /// Round numbers on it: 1, 2 and 5 times powers of ten, or powers alone where those are many.
    fn ticks(&self) -> Vec<f64> {
        let all = |factors: &[f64]| {
            let exponents = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let ticks = exponents.flat_map(|e| factors.iter().map(move |f| f * 10f64.powi(e)));
            ticks.filter(|tick| (self.low..=self.high).contains(tick)).collect::<Vec<f64>>()
        };
        let sets: [&[f64]; 4] =
            [&[1.0], &[1.0, 3.0], &[1.0, 2.0, 5.0], &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]];
        let enough = sets.iter().map(|factors| all(factors)).find(|ticks| ticks.len() >= 3);
        enough.unwrap_or_else(|| all(sets[3]))
    }
}

/// With two digits that count, and no zeros after them.
fn tick_label(tick: f64) -> String {
    let digits = (1.0 - tick.log10().floor()).max(0.0) as usize;
    let text = format!("{tick:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
}

fn page(document: &Document, svg: &str) -> String {
    let escaped = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let line = |tag: &str, cells: &[String]| {
        let cells: String = cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escaped(cell))).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let (head, rows) = rows(document);
    let head: Vec<String> = head.iter().map(|name| name.to_string()).collect();
    let rows: String = rows.iter().map(|row| line("td", row)).collect();
    let about: String = method(document).iter().map(|text| format!("<p>{}</p>", escaped(text))).collect();
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>cutover bench</title><style>\
         body{{font:15px system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}}\
         svg{{max-width:100%;height:auto}}.wide{{overflow-x:auto}}table{{border-collapse:collapse;font-variant-numeric:tabular-nums}}\
         td,th{{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}}\
         td:nth-child(-n+3),th:nth-child(-n+3),td:last-child{{text-align:left}}</style>\n\
         <h1>cutover bench</h1>\n{svg}\n<div class=\"wide\"><table>{}{rows}</table></div>\n{about}\
         <pre>{}</pre></html>\n",
        line("th", &head),
        escaped(&document.command.join(" "))
    )
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_has_round_numbers_on_it() {
        let cases: &[(f64, f64, &[&str])] = &[
            (1.0, 1000.0, &["1", "10", "100", "1000"]),
            (0.02, 0.3, &["0.03", "0.1", "0.3"]),
            (8.0, 9.0, &["7", "8", "9"]),
        ];
        for (low, high, expected) in cases {
            let labels: Vec<String> = Scale::of(*low, *high).ticks().into_iter().map(tick_label).collect();
            assert!(expected.iter().all(|e| labels.iter().any(|l| l == e)), "{labels:?}, expected {expected:?}");
            assert!(labels.len() <= 12, "{labels:?}");
        }
        assert_eq!([0.5, 1.5, 0.15, 0.02, 300.0].map(tick_label), ["0.5", "1.5", "0.15", "0.02", "300"]);
    }

    #[test]
    fn places_rise_with_values_and_stay_on_the_plot() {
        let scale = Scale::of(1.0, 100.0);
        let places = [0.0, 1.0, 10.0, 100.0, 1e9].map(|value| scale.place(value));
        assert!(places.is_sorted() && places[0] == LEFT && places[4] == RIGHT, "{places:?}");
        assert_eq!(places[2], (LEFT + RIGHT) / 2);
        // Nothing measured, or one value: still an axis.
        assert!(Scale::of(5.0, 5.0).high / Scale::of(5.0, 5.0).low > 1.99);
    }
}
