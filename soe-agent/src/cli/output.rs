//! Tables and JSON on standard output.

use std::io::{self, BufWriter, IsTerminal, Stdout, Write};

use serde::Serialize;

use super::error::CliError;
use crate::api::types::rfc3339;
use crate::seam::UnixNanos;

/// Where a result goes, and in which form.
pub(super) struct Output {
    writer: BufWriter<Stdout>,
    json: bool,
    bold: bool,
}

fn failed(error: io::Error) -> CliError {
    CliError::io("standard output")(error)
}

impl Output {
    /// Standard output. Headings are bold on a terminal unless `NO_COLOR` is set.
    pub(super) fn stdout(json: bool) -> Self {
        let stdout = io::stdout();
        let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        let bold = stdout.is_terminal() && !plain;
        Self {
            writer: BufWriter::new(stdout),
            json,
            bold,
        }
    }

    /// Whether JSON is wanted.
    pub(super) fn is_json(&self) -> bool {
        self.json
    }

    /// The raw writer, for results that are written piece by piece. Call [`Output::finish`] after.
    pub(super) fn raw(&mut self) -> &mut (dyn Write + Send) {
        &mut self.writer
    }

    /// Writes text as it is.
    pub(super) fn text(&mut self, text: &str) -> Result<(), CliError> {
        self.writer.write_all(text.as_bytes()).map_err(failed)
    }

    /// Writes one line.
    pub(super) fn line(&mut self, text: &str) -> Result<(), CliError> {
        writeln!(self.writer, "{text}").map_err(failed)
    }

    /// Makes sure that all of it arrived.
    pub(super) fn finish(&mut self) -> Result<(), CliError> {
        self.writer.flush().map_err(failed)
    }

    /// Writes `value` as JSON, or what `table` makes of it.
    pub(super) fn show<T: Serialize>(
        &mut self,
        value: &T,
        table: impl FnOnce(&T) -> Table,
    ) -> Result<(), CliError> {
        if self.json {
            self.json(value)
        } else {
            let text = table(value).render(self.bold);
            self.text(&text)?;
            self.finish()
        }
    }

    /// Writes `value` as one line of JSON.
    pub(super) fn json<T: Serialize>(&mut self, value: &T) -> Result<(), CliError> {
        let text = serde_json::to_string(value)
            .map_err(|e| CliError::Failed(format!("result as JSON: {e}")))?;
        self.line(&text)?;
        self.finish()
    }
}

/// A table of text.
pub(super) struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
    empty: &'static str,
}

impl Table {
    /// A table with these columns; `empty` is what stands there without rows.
    pub(super) fn new(header: &[&'static str], empty: &'static str) -> Self {
        Self {
            header: header.to_vec(),
            rows: Vec::new(),
            empty,
        }
    }

    /// Two columns without heading.
    pub(super) fn pairs() -> Self {
        Self::new(&[], "")
    }

    /// Adds a row.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Adds a row of two.
    pub(super) fn pair(&mut self, name: &str, value: impl ToString) {
        self.rows.push(vec![name.to_owned(), value.to_string()]);
    }

    /// The table as text. Columns are as wide as their widest cell; control characters, which a name
    /// may have brought, are shown escaped.
    pub(super) fn render(&self, bold: bool) -> String {
        if self.rows.is_empty() {
            return if self.empty.is_empty() {
                String::new()
            } else {
                format!("{}\n", self.empty)
            };
        }
        let clean: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|row| row.iter().map(|cell| visible(cell)).collect())
            .collect();
        let columns = clean
            .iter()
            .map(Vec::len)
            .max()
            .unwrap_or(0)
            .max(self.header.len());
        let width = |column: usize| {
            let cells = clean
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count());
            cells
                .chain(self.header.get(column).map(|h| h.len()))
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        if !self.header.is_empty() {
            let heading = line(&self.header, &widths);
            text.push_str(&if bold {
                format!("\x1b[1m{heading}\x1b[0m\n")
            } else {
                format!("{heading}\n")
            });
        }
        for row in &clean {
            let cells: Vec<&str> = row.iter().map(String::as_str).collect();
            text.push_str(&line(&cells, &widths));
            text.push('\n');
        }
        text
    }
}

fn line(cells: &[&str], widths: &[usize]) -> String {
    let padded: Vec<String> = cells
        .iter()
        .zip(widths)
        .map(|(cell, width)| format!("{cell:width$}"))
        .collect();
    padded.join("  ").trim_end().to_owned()
}

fn visible(cell: &str) -> String {
    cell.chars()
        .map(|c| {
            if c.is_control() {
                c.escape_default().to_string()
            } else {
                c.to_string()
            }
        })
        .collect()
}

/// The value, or `-`.
pub(super) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |v| v.to_string())
}

/// The time to the second.
pub(super) fn when(at: UnixNanos) -> String {
    rfc3339::format(at - at.rem_euclid(1_000_000_000))
}

/// Seconds as the largest two units, such as `2h 5m`.
pub(super) fn age(seconds: u64) -> String {
    let units = [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)];
    let mut rest = seconds;
    let mut parts = Vec::new();
    for (name, length) in units {
        if rest >= length && parts.len() < 2 {
            parts.push(format!("{}{name}", rest / length));
            rest %= length;
        } else if !parts.is_empty() {
            break;
        }
    }
    if parts.is_empty() {
        "0s".into()
    } else {
        parts.join(" ")
    }
}

/// Microseconds as a table shows them.
pub(super) fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_control_characters_show() {
        let mut table = Table::new(&["NAME", "N"], "nothing");
        assert_eq!(table.render(false), "nothing\n");
        table.row(["a\x1b[31m".into(), "1".into()]);
        table.row(["é".into(), "22".into()]);
        assert_eq!(
            table.render(false),
            "NAME         N\na\\u{1b}[31m  1\né            22\n"
        );
        assert!(table.render(true).starts_with("\x1b[1mNAME"));
    }

    #[test]
    fn figures_for_people() {
        assert_eq!(
            [0, 59, 60, 3661, 90_061].map(age),
            ["0s", "59s", "1m", "1h 1m", "1d 1h"]
        );
        assert_eq!(
            [0, 999, 32_000, 2_500_000].map(micros),
            ["0 us", "999 us", "32.0 ms", "2.50 s"]
        );
        assert_eq!(when(1_500_000_000), "1970-01-01T00:00:01Z");
        assert_eq!(when(-1), "1969-12-31T23:59:59Z");
    }
}
