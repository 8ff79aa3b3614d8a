//! Recorded traces into the history's tables, all or nothing.
//!
//! An import is built as a history of its own below `.work`, and only when every line was read and
//! every table is written and synced does it get its mark; then its files are moved into place. A
//! bad line or a crash before the mark leaves nothing behind; a crash after it is mended at the next
//! start. Memory stays bounded however long the trace is.

mod csv;
mod lines;
mod series;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

pub use csv::export_csv;

use super::disk::{Disk, RealDisk, create_dirs, remove_tree};
use super::error::{HistoryError, Result};
use super::file::random_name;
use super::partition::{WORK, all_partitions, files};
use super::read::{HistoryReader, Query};
use super::store::{HistoryStore, StoreConfig};
use super::table::Table;
use crate::seam::UnixNanos;
use crate::window::{Name, VolumeWindow};

/// The mark of an import that is complete.
const COMPLETE: &str = "complete";

/// What the imported files look like (docs/history-schema.md, "Importing traces").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImportFormat {
    /// `ts_us,volume,op,offset,length[,latency_us]`: a line is a request.
    Csv,
    /// `ts_s,volume,read_ops,write_ops,read_bytes,write_bytes`: a line is a bin.
    Series,
}

impl FromStr for ImportFormat {
    type Err = HistoryError;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "csv" => Ok(Self::Csv),
            "series" => Ok(Self::Series),
            _ => Err(HistoryError::Query {
                reason: format!("trace format {text:?} is unknown; use csv or series"),
            }),
        }
    }
}

/// What an import brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImportReport {
    /// Lines that became rows.
    pub lines: u64,
    /// The volumes, with their first and last time.
    pub volumes: BTreeMap<Name, (UnixNanos, UnixNanos)>,
    /// Rows by table.
    pub rows: BTreeMap<Table, u64>,
    /// What the windows made of it cover, by volume: from the first one's start to the last one's
    /// end, which is more than the lines' own times.
    pub covered: BTreeMap<Name, Range<UnixNanos>>,
}

impl ImportReport {
    fn saw(&mut self, volume: &Name, ts: UnixNanos) {
        self.lines += 1;
        if let Some(span) = self.volumes.get_mut(volume) {
            *span = (span.0.min(ts), span.1.max(ts));
        } else {
            self.volumes.insert(volume.clone(), (ts, ts));
        }
    }

    fn wrote(&mut self, table: Table, rows: usize) {
        *self.rows.entry(table).or_default() += rows as u64;
    }

    fn covers(&mut self, window: &VolumeWindow) {
        let mine = window.start..window.end();
        let covered = self
            .covered
            .entry(window.volume.clone())
            .or_insert(mine.clone());
        *covered = covered.start.min(mine.start)..covered.end.max(mine.end);
    }

    /// The first and the last time of all volumes.
    pub fn span(&self) -> Option<(UnixNanos, UnixNanos)> {
        let first = self.volumes.values().map(|span| span.0).min()?;
        Some((first, self.volumes.values().map(|span| span.1).max()?))
    }
}

/// Imports `files` into the history in `out`, which is created when it is missing. `volume` names the
/// volume of lines whose volume is empty; it never overrides one that is given.
///
/// Refuses volumes that have history in the same time already.
pub fn import_files(
    format: ImportFormat,
    files: &[PathBuf],
    volume: Option<&str>,
    out: &Path,
) -> Result<ImportReport> {
    // The lock of `out` is held to the end.
    let store = HistoryStore::open(StoreConfig::new(out))?;
    let work = out.join(WORK).join(format!("import-{}", random_name()));
    let result = build(format, files, volume, &work).and_then(|report| {
        refuse_overlap(out, &report)?;
        make_durable(&*store.disk, &work)?;
        publish(&*store.disk, &work, out)?;
        Ok(report)
    });
    if result.is_err() && !is_complete(&work) {
        // What can't be removed now is removed at the next start.
        let _ = remove_tree(&RealDisk { durable: false }, &work);
    }
    result
}

fn build(
    format: ImportFormat,
    files: &[PathBuf],
    volume: Option<&str>,
    work: &Path,
) -> Result<ImportReport> {
    let config = StoreConfig {
        flush_every: Duration::MAX,
        flush_bytes: 64 << 20,
        buffer_bytes: 256 << 20,
        durable: false,
        ..StoreConfig::new(work)
    };
    let store = HistoryStore::open(config)?;
    let report = match format {
        ImportFormat::Csv => csv::import(files, volume, &store)?,
        ImportFormat::Series => series::import(files, volume, &store)?,
    };
    if report.lines == 0 {
        let what = files
            .iter()
            .map(|f| f.display().to_string())
            .collect::<Vec<_>>()
            .join(", ");
        return Err(HistoryError::Import {
            what,
            reason: "there is no line in it".into(),
        });
    }
    store.flush()?;
    store.compact_all()?;
    store.close()?;
    Ok(report)
}

/// Fails when a window of the import shares time with one that is there already.
fn refuse_overlap(out: &Path, report: &ImportReport) -> Result<()> {
    let Some(last) = report.covered.values().map(|covered| covered.end).max() else {
        return Ok(());
    };
    let names: BTreeSet<String> = report.covered.keys().map(|name| name.to_string()).collect();
    // From the beginning: a window that began long before may still reach into the import.
    let query = Query::range(UnixNanos::MIN..last)
        .volumes(names)
        .without_bulky();
    for window in HistoryReader::open(out)?.rows::<VolumeWindow>(&query)? {
        let window = window?;
        let overlaps = report
            .covered
            .get(&window.volume)
            .is_some_and(|covered| window.end() > covered.start && window.start < covered.end);
        if overlaps {
            return Err(HistoryError::Import {
                what: format!("volume {}", window.volume),
                reason: format!(
                    "{} has history of it in the same time already; import into another folder",
                    out.display()
                ),
            });
        }
    }
    Ok(())
}

/// Writes windows and counts them.
fn append_windows(
    store: &HistoryStore,
    windows: &mut Vec<VolumeWindow>,
    report: &mut ImportReport,
) -> Result<()> {
    store.append(windows)?;
    report.wrote(Table::VolumeStats, windows.len());
    for window in windows.drain(..) {
        report.covers(&window);
    }
    Ok(())
}

/// Syncs all of an import at once, then marks it as complete.
fn make_durable(disk: &dyn Disk, work: &Path) -> Result<()> {
    let folder = fs::File::open(work).map_err(HistoryError::io("open", work))?;
    rustix::fs::syncfs(&folder).map_err(|error| HistoryError::io("syncfs", work)(error.into()))?;
    let mark = work.join(COMPLETE);
    let written = disk.create(&mark).and_then(|mut file| {
        file.write_all(b"complete\n")?;
        file.sync()
    });
    written.map_err(HistoryError::io("write", &mark))?;
    disk.sync_dir(work)
        .map_err(HistoryError::io("fsync folder", work))?;
    match work.parent() {
        Some(parent) => disk
            .sync_dir(parent)
            .map_err(HistoryError::io("fsync folder", parent)),
        None => Ok(()),
    }
}

/// Whether an import below `.work` carries its mark.
pub(super) fn is_complete(work: &Path) -> bool {
    work.join(COMPLETE).is_file()
}

/// Moves the files of a complete import into the history `dir`. May be repeated after a crash.
pub(super) fn publish(disk: &dyn Disk, work: &Path, dir: &Path) -> Result<()> {
    for table in Table::ALL {
        for partition in all_partitions(work, table)? {
            let folder = partition.hour.in_table(dir, table);
            create_dirs(disk, dir, &folder).map_err(HistoryError::io("create folder", &folder))?;
            for path in files(&partition.path)? {
                if let Some(name) = path.file_name() {
                    disk.rename(&path, &folder.join(name))
                        .map_err(HistoryError::io("rename", &path))?;
                }
            }
            disk.sync_dir(&folder)
                .map_err(HistoryError::io("fsync folder", &folder))?;
        }
    }
    // The mark goes last: what is left of an unmarked import is removed at the next start.
    let mark = work.join(COMPLETE);
    for table in Table::ALL {
        let folder = work.join(table.name());
        if folder.is_dir() {
            remove_tree(disk, &folder).map_err(HistoryError::io("remove", &folder))?;
        }
    }
    disk.remove_file(&mark)
        .map_err(HistoryError::io("remove", &mark))?;
    remove_tree(disk, work).map_err(HistoryError::io("remove", work))
}

/// The shared name of a line's volume: what the line says, else `default`.
fn volume_name(text: &str, default: Option<&str>, names: &mut BTreeSet<Name>) -> Option<Name> {
    let text = if text.is_empty() { default? } else { text };
    match names.get(text) {
        Some(name) => Some(name.clone()),
        None => {
            let name = Name::from(text);
            names.insert(name.clone());
            Some(name)
        }
    }
}

#[cfg(test)]
mod tests;
