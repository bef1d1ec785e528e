//! What `--assert` takes: bounds on figures, for scripts that must fail where they are passed.
//!
//! ```text
//! assertion  = comparison { "and" comparison } [ "where" condition { "," condition } ]
//! comparison = metric ( "<=" | "<" | ">=" | ">" ) number [ unit ]
//! condition  = ( "model" | "backend" | "precision" | "batch" | "threads" ) "=" value
//! ```

use super::document::Key;
use anyhow::{Context, Result, bail};

/// What a metric's numbers are in, and so which units may follow a bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    /// In ms.
    Time,
    Bytes,
    /// 1 is 100 %.
    Share,
    Joules,
    Count,
}

impl Unit {
    /// Units as they are written, and what a number in each is multiplied by.
    fn spellings(self) -> &'static [(&'static str, f64)] {
        match self {
            Unit::Time => &[("ns", 1e-6), ("us", 1e-3), ("µs", 1e-3), ("ms", 1.0), ("s", 1e3)],
            Unit::Bytes => &[
                ("B", 1.0),
                ("kB", 1e3),
                ("MB", 1e6),
                ("GB", 1e9),
                ("KiB", 1024.0),
                ("MiB", 1_048_576.0),
                ("GiB", 1_073_741_824.0),
            ],
            Unit::Share => &[("", 1.0), ("%", 0.01)],
            Unit::Joules => &[("J", 1.0), ("mJ", 1e-3)],
            Unit::Count => &[("", 1.0)],
        }
    }

    fn show(self, value: f64) -> String {
        match self {
            Unit::Time => format!("{value:.4} ms"),
            Unit::Bytes => crate::output::bytes(value.max(0.0) as u64),
            Unit::Share => format!("{value:.4}"),
            Unit::Joules => format!("{value:.4} J"),
            Unit::Count => format!("{value:.2}"),
        }
    }
}

/// Something that can be asserted of a cell.
pub(super) struct Metric<T> {
    pub name: &'static str,
    pub unit: Unit,
    /// `None` where it was not measured.
    pub of: fn(&T) -> Option<f64>,
}

/// One `--assert`, of cells `T`.
pub(super) struct Assertion<T: 'static> {
    text: String,
    comparisons: Vec<Comparison<T>>,
    conditions: Vec<(String, String)>,
}

struct Comparison<T: 'static> {
    metric: &'static Metric<T>,
    operator: &'static str,
    bound: f64,
}

const OPERATORS: [&str; 4] = ["<=", ">=", "<", ">"];
const COLUMNS: [&str; 5] = ["model", "backend", "precision", "batch", "threads"];

impl<T> Assertion<T> {
    pub fn parse(text: &str, metrics: &'static [Metric<T>]) -> Result<Assertion<T>> {
        let (bounds, conditions) = match text.split_once(" where ") {
            Some((bounds, conditions)) => (bounds, conditions.split(',').collect()),
            None => (text, Vec::new()),
        };
        let comparisons: Result<_> = bounds.split(" and ").map(|part| comparison(part, metrics)).collect();
        let conditions: Result<_> = conditions.into_iter().map(condition).collect();
        let at = || format!("--assert '{text}'");
        let (comparisons, conditions) = (comparisons.with_context(at)?, conditions.with_context(at)?);
        Ok(Assertion { text: text.to_string(), comparisons, conditions })
    }

    fn concerns(&self, key: &Key) -> bool {
        let number = |number: Option<usize>| number.map_or(String::new(), |number| number.to_string());
        self.conditions.iter().all(|(column, value)| {
            *value
                == match column.as_str() {
                    "model" => key.model.clone(),
                    "backend" => key.backend.clone(),
                    "precision" => key.precision.clone(),
                    "batch" => number(key.batch),
                    _ => number(key.threads),
                }
        })
    }

    /// Every way in which cells break it. One that none of the cells can break, because it is about none of them, is broken too: it guards
    /// nothing.
    pub fn broken<'a>(&self, cells: impl Iterator<Item = (&'a Key, &'a T)>) -> Vec<String>
    where
        T: 'a,
    {
        let mut broken = Vec::new();
        let mut looked_at = 0;
        for (key, cell) in cells.filter(|(key, _)| self.concerns(key)) {
            looked_at += 1;
            for Comparison { metric, operator, bound } in &self.comparisons {
                let show = |value| metric.unit.show(value);
                match (metric.of)(cell) {
                    None => broken.push(format!("{key}: {} was not measured", metric.name)),
                    Some(value) if !holds(value, operator, *bound) => {
                        broken.push(format!(
                            "{key}: {} is {}, not {operator} {}",
                            metric.name,
                            show(value),
                            show(*bound)
                        ));
                    }
                    Some(_) => {}
                }
            }
        }
        if looked_at == 0 {
            broken.push(format!("'{}': no cell with figures to assert it of", self.text));
        }
        broken
    }
}

fn holds(value: f64, operator: &str, bound: f64) -> bool {
    match operator {
        "<=" => value <= bound,
        ">=" => value >= bound,
        "<" => value < bound,
        _ => value > bound,
    }
}

fn comparison<T>(text: &str, metrics: &'static [Metric<T>]) -> Result<Comparison<T>> {
    let found = text.find(['<', '>']).and_then(|at| {
        let operator = OPERATORS.into_iter().find(|operator| text[at..].starts_with(operator))?;
        Some((text[..at].trim(), operator, text[at + operator.len()..].trim()))
    });
    let Some((name, operator, bound)) = found else {
        bail!("'{}': expected a metric, one of <= < >= >, and a bound, e.g. p50<=10ms", text.trim())
    };
    let Some(metric) = metrics.iter().find(|metric| metric.name == name) else {
        let names: Vec<&str> = metrics.iter().map(|metric| metric.name).collect();
        bail!("'{name}' is no metric; there is {}", names.join(", "));
    };
    let digits = bound.len() - bound.trim_start_matches(|c: char| c.is_ascii_digit() || ".+-".contains(c)).len();
    let (number, unit) = (&bound[..digits], bound[digits..].trim());
    let Some(number) = number.parse::<f64>().ok().filter(|number| number.is_finite()) else {
        bail!("'{bound}': expected a number");
    };
    let spellings = metric.unit.spellings();
    let Some((_, factor)) = spellings.iter().find(|(spelling, _)| *spelling == unit) else {
        let known: Vec<&str> = spellings.iter().map(|(spelling, _)| *spelling).filter(|s| !s.is_empty()).collect();
        match known.is_empty() {
            true => bail!("'{unit}': {name} is a number without a unit"),
            false => bail!("'{bound}': expected {name} in {}", known.join(", ")),
        }
    };
    Ok(Comparison { metric, operator, bound: number * factor })
}

fn condition(text: &str) -> Result<(String, String)> {
    let Some((column, value)) = text.split_once('=') else {
        bail!("'{}': expected e.g. backend=cpu", text.trim());
    };
    let (column, value) = (column.trim(), value.trim());
    if !COLUMNS.contains(&column) {
        bail!("'{column}' is no column; there is {}", COLUMNS.join(", "));
    }
    Ok((column.to_string(), value.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: &[Metric<f64>] = &[
        Metric { name: "p50", unit: Unit::Time, of: |v| Some(*v) },
        Metric { name: "memory", unit: Unit::Bytes, of: |_| Some(1_500_000.0) },
        Metric { name: "roofline", unit: Unit::Share, of: |_| None },
        Metric { name: "throughput", unit: Unit::Count, of: |v| Some(1000.0 / v) },
    ];

    fn key(backend: &str, batch: usize) -> Key {
        let (model, precision) = ("m".to_string(), "f32".to_string());
        Key { model, backend: backend.to_string(), precision, batch: Some(batch), threads: None }
    }

    #[test]
    fn bounds_hold_or_name_what_breaks_them() {
        let cells = [(key("cpu", 1), 5.0), (key("cpu", 8), 30.0), (key("wgpu", 1), 9.0)];
        let cases: &[(&str, &[&str])] = &[
            ("p50<=30ms", &[]),
            ("p50 < 0.03 s", &["m cpu f32 batch 8: p50 is 30.0000 ms, not < 30.0000 ms"]),
            ("p50<=10000us where batch=1", &[]),
            ("p50>6ms and memory<=1.4MB where backend=wgpu", &["memory is 1500.0 kB, not <= 1400.0 kB"]),
            ("throughput>=100 where backend=cpu, batch=1", &[]),
            ("roofline>=10% where batch=8", &["roofline was not measured"]),
            ("p50<=1s where backend=cuda", &["no cell with figures"]),
        ];
        for (text, expected) in cases {
            let broken = Assertion::parse(text, METRICS).unwrap().broken(cells.iter().map(|(k, v)| (k, v)));
            assert_eq!(broken.len(), expected.len(), "{text}: {broken:?}");
            broken.iter().zip(*expected).for_each(|(b, e)| assert!(b.contains(e), "{b}"));
        }
    }

    #[test]
    fn what_is_no_assertion_says_what_was_expected() {
        let cases = [
            ("", "expected a metric"),
            ("p50", "expected a metric"),
            ("p50=10ms", "one of <= < >= >"),
            ("p51<=10ms", "there is p50, memory, roofline, throughput"),
            ("p50<=10", "expected p50 in ns, us, µs, ms, s"),
            ("p50<=10MB", "expected p50 in"),
            ("p50<=ms", "expected a number"),
            ("p50<=1e999ms", "expected p50 in"),
            ("p50<=--1ms", "expected a number"),
            ("throughput>=5s", "without a unit"),
            ("p50<=1ms and", "expected p50 in"),
            ("p50<=1ms where", "expected p50 in"),
            ("p50<=1ms where backend", "expected e.g. backend=cpu"),
            ("p50<=1ms where colour=red", "no column"),
            ("µ<1", "no metric"),
        ];
        for (text, expected) in cases {
            let error = format!("{:#}", Assertion::parse(text, METRICS).err().expect(text));
            assert!(error.contains(expected) && error.contains("--assert"), "{text}: {error}");
        }
    }
}
