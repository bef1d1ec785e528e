//! How commands print: text and tables for people, one JSON document for scripts.

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::Value;
use std::io::Write;

pub(crate) struct Printer {
    pub json: bool,
}

impl Printer {
    /// Prints `document` where JSON was asked for, and `text` otherwise.
    pub fn print(&self, document: &Value, text: impl FnOnce() -> String) -> Result<()> {
        let mut out = std::io::stdout().lock();
        match self.json {
            true => writeln!(out, "{}", serde_json::to_string_pretty(document)?)?,
            false => writeln!(out, "{}", text().trim_end())?,
        }
        Ok(())
    }
}

/// A table whose columns after the first are numbers, aligned to the right, where `numbers` says so.
pub(crate) fn table(header: &[&str], rows: Vec<Vec<String>>, numbers: bool) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1).filter(|_| numbers) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// Bytes in the unit that makes them readable.
pub(crate) fn bytes(count: u64) -> String {
    match count {
        0..=9_999 => format!("{count} B"),
        10_000..=9_999_999 => format!("{:.1} kB", count as f64 / 1e3),
        _ => format!("{:.1} MB", count as f64 / 1e6),
    }
}
