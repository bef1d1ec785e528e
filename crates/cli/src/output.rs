//! How commands print: text and tables for people, one JSON document for scripts.

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::Value;
use std::{
    io::Write,
    path::{Path, PathBuf},
};

pub(crate) struct Printer {
    pub json: bool,
    /// Where the document goes besides.
    pub file: Option<PathBuf>,
}

impl Printer {
    /// Prints `document` where JSON was asked for, and `text` otherwise; writes it to the file where there is one.
    pub fn print(&self, document: &Value, text: impl FnOnce() -> String) -> Result<()> {
        if let Some(path) = &self.file {
            write_whole(path, format!("{document:#}\n").as_bytes())?;
        }
        let mut out = std::io::stdout().lock();
        match self.json {
            true => writeln!(out, "{}", serde_json::to_string_pretty(document)?)?,
            false => writeln!(out, "{}", text().trim_end())?,
        }
        Ok(())
    }
}

/// Replaces a file at once: whoever stops the program, or reads meanwhile, finds a whole one. What is no regular file, as `/dev/stdout`, is
/// written to.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> Result<()> {
    let at = || format!("cannot write {}", path.display());
    if path.metadata().is_ok_and(|metadata| !metadata.is_file()) {
        return std::fs::write(path, content).with_context(at);
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".cutover");
    // As any other file, not for the owner alone.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).with_context(at)?;
    file.write_all(content).with_context(at)?;
    file.persist(path).map_err(|e| e.error).with_context(at)?;
    Ok(())
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

/// As [`table`] of numbers, without lines between rows.
pub(crate) fn dense_table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let table = table(header, rows, true);
    let lines: Vec<&str> = table.lines().collect();
    let is_rule = |line: &str| line.chars().all(|c| c == '─');
    let kept = lines.iter().enumerate().filter(|(at, line)| *at == 0 || at + 1 == lines.len() || !is_rule(line));
    kept.map(|(_, line)| *line).collect::<Vec<_>>().join("\n")
}

/// Bytes in the unit that makes them readable.
pub(crate) fn bytes(count: u64) -> String {
    match count {
        0..=9_999 => format!("{count} B"),
        10_000..=9_999_999 => format!("{:.1} kB", count as f64 / 1e3),
        _ => format!("{:.1} MB", count as f64 / 1e6),
    }
}

/// Milliseconds since 1970 as `YYYY-MM-DD HH:MM:SS`, in UTC.
pub(crate) fn time_of(unix_ms: u64) -> String {
    let (days, seconds) = (unix_ms / 86_400_000, unix_ms / 1000 % 86_400);
    // The civil calendar from days since 1970, by eras of 400 years that begin in March.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, carried) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year_of_era + era * 400 + carried;
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        assert_eq!(time_of(0), "1970-01-01 00:00:00");
        assert_eq!(time_of(951_782_400_000), "2000-02-29 00:00:00");
        assert_eq!(time_of(1_767_225_599_999), "2025-12-31 23:59:59");
        assert_eq!(time_of(4_107_542_400_000), "2100-03-01 00:00:00");
    }
}
