//! What works on files alone: each function calls the room that knows how, and turns its errors into
//! exit codes.

pub(super) mod backtest;
pub(super) mod blocks;

mod simulation;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use super::error::CliError;
use crate::api::engine::{EngineError, ErrorKind};
use crate::api::types::VerifyEvent;
use crate::capture::guard::guard_main;
use crate::history::{HistoryError, HistoryReader, ImportFormat, Query, export_csv, import_files};
use crate::layer::fs::DirFs;
use crate::layer::{ErrorClass, LayerError, LayerStore, StoreOptions};
use crate::seam::UnixNanos;

pub(super) use simulation::simulate;

impl From<HistoryError> for CliError {
    fn from(error: HistoryError) -> Self {
        let kind = if error.is_integrity() {
            ErrorKind::Integrity
        } else if error.is_usage() {
            ErrorKind::InvalidArgument
        } else if matches!(error, HistoryError::Locked { .. }) {
            ErrorKind::Unsafe
        } else {
            ErrorKind::Internal
        };
        if let HistoryError::Io { source, .. } = &error
            && source.kind() == std::io::ErrorKind::BrokenPipe
        {
            return Self::BrokenPipe;
        }
        EngineError::new(kind, error.to_string()).into()
    }
}

impl From<LayerError> for CliError {
    fn from(error: LayerError) -> Self {
        let kind = match (&error, error.class()) {
            (LayerError::NotFound { .. }, _) => ErrorKind::NotFound,
            (_, ErrorClass::Integrity) => ErrorKind::Integrity,
            (_, ErrorClass::Usage) => ErrorKind::InvalidArgument,
            (_, ErrorClass::Refused) => ErrorKind::Unsafe,
            (_, ErrorClass::Failed) => ErrorKind::Internal,
        };
        EngineError::new(kind, error.to_string()).into()
    }
}

/// Freezes and thaws for the agent that started this process.
pub(super) fn freeze_guard() -> ExitCode {
    guard_main()
}

/// Verifies a group in the store that lies in `dir`, telling `note` what it finds.
pub(super) fn verify(
    dir: &Path,
    group: &str,
    note: &mut dyn FnMut(VerifyEvent),
) -> Result<(), CliError> {
    let fs = DirFs::open(dir).map_err(CliError::io(format!("layer store {}", dir.display())))?;
    let store = LayerStore::open(
        Arc::new(fs),
        StoreOptions {
            read_only: true,
            ..StoreOptions::default()
        },
    )?;
    let total = store
        .manifests(group)
        .map(|manifests| {
            manifests
                .iter()
                .flat_map(|m| &m.volumes)
                .map(|v| v.bytes_stored)
                .sum()
        })
        .unwrap_or(0);
    let report = store.verify_with(group, None, &mut |bytes_checked| {
        note(VerifyEvent::Progress {
            layer: String::new(),
            bytes_checked,
            bytes_total: total,
        });
    })?;
    let problems = report.damages.len() as u64;
    for damage in report.damages {
        note(VerifyEvent::Problem {
            layer: damage
                .sequence
                .map_or_else(|| "-".into(), |s| s.to_string()),
            volume: damage.volume.unwrap_or_else(|| "-".into()),
            what: damage.what,
        });
    }
    note(VerifyEvent::Summary {
        layers: report.layers,
        blocks: report.blocks,
        bytes: report.bytes,
        problems,
    });
    Ok(())
}

/// Runs a query over the history in `dir`.
#[cfg(feature = "sql")]
pub(super) fn sql(
    dir: &Path,
    query: &str,
    out: &mut super::output::Output,
) -> Result<(), CliError> {
    use crate::history::{SqlFormat, SqlLimits, run_sql};
    let format = if out.is_json() {
        SqlFormat::JsonLines
    } else {
        SqlFormat::Table
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(CliError::io("the query's runtime"))?;
    runtime.block_on(run_sql(dir, query, SqlLimits::default(), format, out.raw()))?;
    Ok(())
}

/// This build has no SQL.
#[cfg(not(feature = "sql"))]
pub(super) fn sql(_: &Path, _: &str, _: &mut super::output::Output) -> Result<(), CliError> {
    let message = "this build has no SQL; build it with the feature sql, or read the Parquet files with another tool";
    Err(EngineError::new(ErrorKind::Unsupported, message).into())
}

/// What an import brought.
pub(super) struct Imported {
    /// Lines that became rows.
    pub(super) lines: u64,
    /// The volumes.
    pub(super) volumes: Vec<String>,
    /// Rows by table.
    pub(super) rows: BTreeMap<&'static str, u64>,
}

/// Imports trace files into the history in `dir`.
pub(super) fn import(
    format: &str,
    files: &[PathBuf],
    volume: Option<&str>,
    dir: &Path,
) -> Result<Imported, CliError> {
    let format: ImportFormat = format.parse()?;
    let report = import_files(format, files, volume, dir)?;
    Ok(Imported {
        lines: report.lines,
        volumes: report.volumes.keys().map(|v| v.to_string()).collect(),
        rows: report
            .rows
            .iter()
            .map(|(table, rows)| (table.name(), *rows))
            .collect(),
    })
}

/// Which IOs to export.
pub(super) struct Selection {
    /// Only of this volume.
    pub(super) volume: Option<String>,
    /// Only of this time or later.
    pub(super) from: Option<UnixNanos>,
    /// Only before this time.
    pub(super) to: Option<UnixNanos>,
}

/// Writes recorded IOs as csv. Returns their number.
pub(super) fn export(
    history: &Path,
    selection: &Selection,
    out: &mut dyn Write,
) -> Result<u64, CliError> {
    let reader = HistoryReader::open(history)?;
    let all = Query::all().range;
    let range = selection.from.unwrap_or(all.start)..selection.to.unwrap_or(all.end);
    let query = match &selection.volume {
        Some(volume) => Query::range(range).volumes([volume.as_str()]),
        None => Query::range(range),
    };
    Ok(export_csv(&reader, &query, out)?)
}
