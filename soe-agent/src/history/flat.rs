//! Results as one plain Parquet file: what `soe simulate` and `soe backtest` write.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use super::columns::BatchBuilder;
use super::disk::{Disk, DiskFile, RealDisk};
use super::error::{HistoryError, Result, one_line};
use super::file::random_name;
use super::partition::TEMPORARY;
use crate::seam::UnixNanos;

/// One column of a result.
#[derive(Clone, Debug, PartialEq)]
pub enum FlatColumn {
    /// Text.
    Text(Vec<String>),
    /// Times, stored in microseconds UTC.
    Time(Vec<UnixNanos>),
    /// Times that may be missing.
    OptTime(Vec<Option<UnixNanos>>),
    /// Numbers.
    Number(Vec<f64>),
    /// Numbers that may be missing.
    OptNumber(Vec<Option<f64>>),
    /// Counts.
    Count(Vec<u64>),
    /// Truth values.
    Truth(Vec<bool>),
}

/// A result: named columns of equal length, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FlatTable {
    columns: Vec<(String, FlatColumn)>,
}

impl FlatTable {
    /// Adds a column.
    pub fn column(mut self, name: &str, column: FlatColumn) -> Self {
        self.columns.push((name.to_owned(), column));
        self
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.columns.first().map_or(0, |(_, column)| match column {
            FlatColumn::Text(values) => values.len(),
            FlatColumn::Time(values) => values.len(),
            FlatColumn::OptTime(values) => values.len(),
            FlatColumn::Number(values) => values.len(),
            FlatColumn::OptNumber(values) => values.len(),
            FlatColumn::Count(values) => values.len(),
            FlatColumn::Truth(values) => values.len(),
        })
    }
}

/// Writes a result as the Parquet file `path`, replacing it whole or not at all.
pub fn write_flat(path: &Path, table: &FlatTable) -> Result<()> {
    let mut builder = BatchBuilder::default();
    for (name, column) in &table.columns {
        builder = match column {
            FlatColumn::Text(values) => builder.text(name, values.iter().map(String::as_str)),
            FlatColumn::Time(values) => builder.micros(name, values.iter().copied()),
            FlatColumn::OptTime(values) => builder.opt_micros(name, values.iter().copied()),
            FlatColumn::Number(values) => builder.number(name, values.iter().copied()),
            FlatColumn::OptNumber(values) => builder.opt_number(name, values.iter().copied()),
            FlatColumn::Count(values) => builder.count(name, values.iter().copied()),
            FlatColumn::Truth(values) => builder.truth(name, values.iter().copied()),
        };
    }
    let batch = builder.finish("result")?;
    let wrong = |error: parquet::errors::ParquetError| HistoryError::Columns {
        table: "result",
        reason: one_line(&error.to_string()),
    };
    let properties = WriterProperties::builder()
        .set_created_by(format!("soe {}", env!("CARGO_PKG_VERSION")))
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .build();
    let mut writer =
        ArrowWriter::try_new(Vec::new(), Arc::clone(&batch.schema()), Some(properties))
            .map_err(wrong)?;
    writer.write(&batch).map_err(wrong)?;
    let bytes = writer.into_inner().map_err(wrong)?;
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let temporary = folder.join(format!(".{}{TEMPORARY}", random_name()));
    let disk = RealDisk { durable: true };
    let written = disk
        .create(&temporary)
        .and_then(|mut file: Box<dyn DiskFile>| {
            file.write_all(&bytes)?;
            file.sync()?;
            // Unlike the history's own files, a result may be written again under its name.
            std::fs::rename(&temporary, path)?;
            disk.sync_dir(folder)
        });
    written.map_err(|source| {
        let _ = disk.remove_file(&temporary);
        HistoryError::Io {
            call: "write",
            path: path.to_owned(),
            source,
        }
    })
}
