//! Batches as a table for eyes, or as lines of JSON.

use std::io::Write;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use arrow::json::writer::LineDelimited;
use arrow::util::display::{ArrayFormatter, FormatOptions};

use super::error::{HistoryError, Result, one_line};
use super::sql::SqlFormat;

/// Rows by which the widths of a printed table are chosen; later cells may stick out.
const WIDTH_ROWS: usize = 1000;

/// Writes batches as they come.
pub(super) struct Printer<'a> {
    format: SqlFormat,
    out: &'a mut (dyn Write + Send),
    rows: u64,
    /// Rows of a table that wait until the widths are chosen.
    held: Vec<Vec<String>>,
    widths: Vec<usize>,
    numeric: Vec<bool>,
    header: Vec<String>,
    chosen: bool,
}

impl<'a> Printer<'a> {
    pub fn new(format: SqlFormat, out: &'a mut (dyn Write + Send)) -> Self {
        Self {
            format,
            out,
            rows: 0,
            held: Vec::new(),
            widths: Vec::new(),
            numeric: Vec::new(),
            header: Vec::new(),
            chosen: false,
        }
    }

    pub fn nothing_out(&self) -> bool {
        self.rows == 0
    }

    pub fn print(&mut self, batch: &RecordBatch) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        match self.format {
            SqlFormat::JsonLines => self.print_json(batch)?,
            SqlFormat::Table => self.print_table(batch)?,
        }
        self.rows += batch.num_rows() as u64;
        Ok(())
    }

    fn print_json(&mut self, batch: &RecordBatch) -> Result<()> {
        let mut writer = arrow::json::WriterBuilder::new()
            .with_explicit_nulls(true)
            .build::<_, LineDelimited>(Vec::new());
        writer
            .write(batch)
            .and_then(|()| writer.finish())
            .map_err(cell_error)?;
        self.out
            .write_all(&writer.into_inner())
            .map_err(write_error)
    }

    fn print_table(&mut self, batch: &RecordBatch) -> Result<()> {
        self.learn(&batch.schema());
        let options = FormatOptions::default()
            .with_timestamp_tz_format(Some("%Y-%m-%dT%H:%M:%S%.fZ"))
            .with_display_error(true);
        let cells = batch
            .columns()
            .iter()
            .map(|column| ArrayFormatter::try_new(column, &options))
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(cell_error)?;
        for row in 0..batch.num_rows() {
            let line: Vec<String> = cells
                .iter()
                .map(|cell| cell.value(row).to_string())
                .collect();
            if self.chosen {
                self.line(&line)?;
                continue;
            }
            self.held.push(line);
            if self.held.len() >= WIDTH_ROWS {
                self.choose()?;
            }
        }
        Ok(())
    }

    fn learn(&mut self, schema: &SchemaRef) {
        if self.header.is_empty() {
            self.header = schema
                .fields()
                .iter()
                .map(|field| field.name().clone())
                .collect();
            self.numeric = schema
                .fields()
                .iter()
                .map(|field| field.data_type().is_numeric())
                .collect();
        }
    }

    /// Chooses the widths and writes what was held.
    fn choose(&mut self) -> Result<()> {
        self.chosen = true;
        let held = std::mem::take(&mut self.held);
        let header = std::mem::take(&mut self.header);
        self.widths = header.iter().map(|name| name.chars().count()).collect();
        for line in &held {
            for (width, cell) in self.widths.iter_mut().zip(line) {
                *width = (*width).max(cell.chars().count());
            }
        }
        self.line(&header)?;
        let rule: Vec<String> = self.widths.iter().map(|&width| "-".repeat(width)).collect();
        self.line(&rule)?;
        held.iter().try_for_each(|line| self.line(line))
    }

    fn line(&mut self, cells: &[String]) -> Result<()> {
        let mut text = String::new();
        for (at, (cell, &width)) in cells.iter().zip(&self.widths).enumerate() {
            if at > 0 {
                text.push_str("  ");
            }
            match self.numeric.get(at) {
                Some(true) => text.push_str(&format!("{cell:>width$}")),
                _ => text.push_str(&format!("{cell:<width$}")),
            }
        }
        writeln!(self.out, "{}", text.trim_end()).map_err(write_error)
    }

    pub fn end(&mut self, schema: &SchemaRef) -> Result<()> {
        if self.format == SqlFormat::Table && !self.chosen {
            self.learn(schema);
            self.choose()?;
        }
        self.out.flush().map_err(write_error)
    }

    pub fn finish(self) -> Result<u64> {
        Ok(self.rows)
    }
}

fn write_error(source: std::io::Error) -> HistoryError {
    HistoryError::Io {
        call: "write",
        path: "query output".into(),
        source,
    }
}

fn cell_error(error: arrow::error::ArrowError) -> HistoryError {
    HistoryError::QueryRun {
        reason: one_line(&error.to_string()),
    }
}
