//! What can go wrong with the history.

use std::io;
use std::path::{Path, PathBuf};

use parquet::errors::ParquetError;

use super::contain::Panicked;

/// Errors of the history. [`HistoryError::is_integrity`] and [`HistoryError::is_usage`] choose the
/// exit code.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// A call on a file failed.
    #[error("{call} {}: {source}", path.display())]
    Io {
        /// The call.
        call: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file's content is not what was written.
    #[error("history file {} is damaged: {reason}; move it away or restore it from a copy", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file was written by a newer version.
    #[error("history file {} has schema version {found} of {table}, this version reads up to {supported}; use a newer soe", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its table.
        table: &'static str,
        /// The version it says.
        found: String,
        /// The newest version that is understood.
        supported: u32,
    },
    /// Another process writes this history.
    #[error("history {} is in use by another soe; stop it or choose another folder", dir.display())]
    Locked {
        /// The folder.
        dir: PathBuf,
    },
    /// Rows could not be made into columns, or back.
    #[error("table {table}: {reason}")]
    Columns {
        /// The table.
        table: &'static str,
        /// What does not fit.
        reason: String,
    },
    /// A line of an imported file is not what its format says.
    #[error("{}:{line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// The import as a whole can't be done.
    #[error("import of {what}: {reason}")]
    Import {
        /// The file, volume or format.
        what: String,
        /// Why not.
        reason: String,
    },
    /// A query is not allowed or not understood.
    #[error("query refused: {reason}")]
    Query {
        /// Why.
        reason: String,
    },
    /// A query failed while it ran.
    #[error("query failed: {reason}")]
    QueryRun {
        /// Why.
        reason: String,
    },
}

/// A result of the history.
pub type Result<T, E = HistoryError> = std::result::Result<T, E>;

impl HistoryError {
    /// Whether stored data is not what was written (exit code 5).
    pub fn is_integrity(&self) -> bool {
        matches!(self, Self::Damaged { .. })
    }

    /// Whether the caller asked for something that can't be (exit code 2).
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Query { .. })
    }

    /// For `map_err` on calls of files.
    pub(super) fn io(call: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { call, path, source }
    }

    /// For `map_err` on the reading of a Parquet file.
    pub(super) fn parquet(path: &Path) -> impl Fn(ParquetError) -> Self + use<> {
        let path = path.to_owned();
        move |error| Self::Damaged {
            path: path.clone(),
            reason: one_line(&error.to_string()),
        }
    }

    /// For `map_err` on a panic of the library that was to decode a file.
    pub(super) fn undecodable(path: &Path) -> impl Fn(Panicked) -> Self + use<> {
        let path = path.to_owned();
        move |Panicked(message)| Self::Damaged {
            path: path.clone(),
            reason: format!("it cannot be decoded ({})", one_line(&message)),
        }
    }

    /// For damage found by our own checks.
    pub(super) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    /// Whether a file vanished between being listed and being opened.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// The most that is told of a library's message.
const TOLD_CHARS: usize = 240;

/// The first line of a library's message, without its full stop and at a length to be read.
pub(super) fn one_line(message: &str) -> String {
    let line = message.lines().next().unwrap_or("").trim();
    let line = line.trim_end_matches('.');
    match line.char_indices().nth(TOLD_CHARS) {
        Some((end, _)) => format!("{}...", line.get(..end).unwrap_or(line)),
        None => line.to_owned(),
    }
}
