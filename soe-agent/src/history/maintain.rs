//! Repair after a crash, compaction and retention.
//!
//! Both replace or remove a whole hour in one step, so that a reader, ours or any other, sees the
//! rows of an hour once, before and after a crash at any moment:
//!
//! - *compaction* builds the new folder of an hour under `.work` and exchanges it with the old one
//!   (`renameat2`, `RENAME_EXCHANGE`), then removes the old one from `.work`;
//! - *retention* renames the folder of an hour into `.work`, then removes it.
//!
//! Whatever lies under `.work` at the start is rubbish, except an import that says it is complete
//! (see [`super::import`]). On a file system that can't exchange folders nothing is compacted.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock, statvfs};

use super::disk::{create_dirs, remove_tree};
use super::error::{HistoryError, Result};
use super::file::{self, HistoryFile, Losses, random_name};
use super::import;
use super::merge::{Merge, Order};
use super::partition::{
    Hour, Partition, QUARANTINED, TEMPORARY, WORK, all_partitions, files, others,
};
use super::scan::group_batches;
use super::store::{HistoryStore, lock};
use super::table::Table;
use crate::seam::UnixNanos;
use crate::window::SECOND_NS;

/// An hour that goes on is compacted when it has this many files.
const OPEN_HOUR_FILES: usize = 20;
/// An hour counts as over this long after its end, because rows come late.
const SETTLE_NS: i64 = 300 * SECOND_NS;
/// Files this large are left alone.
const LARGE_BYTES: u64 = 256 << 20;

/// What is kept. The oldest hours go first, of all tables alike; the present hour always stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// Hours that ended longer ago than this are removed.
    pub max_age: Option<Duration>,
    /// The files together may take this many bytes.
    pub max_bytes: Option<u64>,
    /// This many bytes of the file system are to stay free.
    pub min_free_bytes: Option<u64>,
}

/// What maintenance did.
#[derive(Debug, Default)]
pub struct Maintained {
    /// Hours whose files were merged.
    pub compacted: usize,
    /// Hours removed because of their age.
    pub expired: usize,
    /// Hours removed to make room.
    pub evicted: usize,
    /// Damaged files that were moved aside (their names end in `.damaged` now), and files of a newer
    /// version, which were left alone.
    pub skipped: Vec<HistoryError>,
}

/// One hour on disk, for retention.
struct Stored {
    table: Table,
    partition: Partition,
    bytes: u64,
}

impl HistoryStore {
    /// Compacts and removes; call it every few minutes. `now` is wall-clock time.
    pub fn maintain(&self, now: UnixNanos) -> Result<Maintained> {
        let mut done = Maintained::default();
        self.retain(now, &mut done)?;
        if !self.no_readers()? {
            return Ok(done);
        }
        for table in Table::ALL {
            for partition in all_partitions(self.dir(), table)? {
                let over = partition.hour.end().saturating_add(SETTLE_NS) <= now;
                let count = files(&partition.path)?.len();
                let wanted = if over && !self.is_pending(table, partition.hour) {
                    count > 1
                } else {
                    count >= OPEN_HOUR_FILES
                };
                if wanted && self.compact(table, &partition, &mut done)? {
                    done.compacted += 1;
                }
            }
        }
        Ok(done)
    }

    /// Compacts every hour that has more than one file.
    pub fn compact_all(&self) -> Result<Maintained> {
        let mut done = Maintained::default();
        for table in Table::ALL {
            for partition in all_partitions(self.dir(), table)? {
                if files(&partition.path)?.len() > 1
                    && self.compact(table, &partition, &mut done)?
                {
                    done.compacted += 1;
                }
            }
        }
        Ok(done)
    }

    /// Whether nobody holds a shared lock on the folder, as long queries do.
    fn no_readers(&self) -> Result<bool> {
        let dir = self.dir();
        let handle = File::open(dir).map_err(HistoryError::io("open", dir))?;
        // Closing the handle gives the lock back.
        Ok(flock(&handle, FlockOperation::NonBlockingLockExclusive).is_ok())
    }

    fn work_folder(&self, purpose: &str) -> Result<PathBuf> {
        let path = self
            .dir()
            .join(WORK)
            .join(format!("{purpose}-{}", random_name()));
        create_dirs(&*self.disk, self.dir(), &path)
            .map_err(HistoryError::io("create folder", &path))?;
        Ok(path)
    }

    fn remove_tree(&self, path: &Path) -> Result<()> {
        remove_tree(&*self.disk, path).map_err(HistoryError::io("remove", path))
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        self.disk
            .sync_dir(path)
            .map_err(HistoryError::io("fsync folder", path))
    }

    /// Merges the files of one hour into one. Returns whether it did.
    fn compact(&self, table: Table, partition: &Partition, done: &mut Maintained) -> Result<bool> {
        let _files = lock(&self.files);
        let Some(sources) = self.sources(table, partition, done)? else {
            return Ok(false);
        };
        let work = self.work_folder("compact")?;
        let merged = self.merge_into(table, partition, sources, &work);
        let exchanged = match merged {
            Ok(exchanged) => exchanged,
            Err(error) => {
                // What can't be removed now is removed at the next start.
                let _ = remove_tree(&*self.disk, &work);
                return Err(error);
            }
        };
        self.remove_tree(&work)?;
        Ok(exchanged)
    }

    /// The files to merge, opened; `None` when it does not pay or can't be done.
    fn sources(
        &self,
        table: Table,
        partition: &Partition,
        done: &mut Maintained,
    ) -> Result<Option<Vec<HistoryFile>>> {
        let (mut opened, mut bytes) = (Vec::new(), 0);
        let known = table.schema()?;
        for path in files(&partition.path)? {
            let proven = HistoryFile::open(&path, table).and_then(|file| {
                (0..file.row_groups()).try_for_each(|group| file.prove_group(group))?;
                Ok(file)
            });
            match proven {
                Ok(file) => {
                    let newer = |field: &Arc<_>| known.field_with_name(name_of(field)).is_err();
                    if file.schema().fields().iter().any(newer) {
                        // A newer version added a column: merging here would lose it.
                        return Ok(None);
                    }
                    bytes += file.file.metadata().map_or(0, |metadata| metadata.len());
                    opened.push(file);
                }
                Err(error) if error.is_integrity() => {
                    self.quarantine(&path)?;
                    tracing::error!(%error, "history file was moved aside");
                    done.skipped.push(error);
                }
                Err(error @ HistoryError::Version { .. }) => {
                    done.skipped.push(error);
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
        let worth = opened.len() > 1 && bytes <= LARGE_BYTES;
        Ok(worth.then_some(opened))
    }

    /// Moves a damaged file aside, so that no reader takes it for data.
    fn quarantine(&self, path: &Path) -> Result<()> {
        let mut aside = path.as_os_str().to_owned();
        aside.push(QUARANTINED);
        self.disk
            .rename(path, Path::new(&aside))
            .map_err(HistoryError::io("rename damaged file", path))
    }

    fn merge_into(
        &self,
        table: Table,
        partition: &Partition,
        sources: Vec<HistoryFile>,
        work: &Path,
    ) -> Result<bool> {
        let expected: usize = sources.iter().map(HistoryFile::rows).sum();
        let losses = sources
            .iter()
            .fold(Losses::default(), |sum, file| sum.plus(file.losses));
        let streams = sources
            .into_iter()
            .map(|file| {
                let groups = (0..file.row_groups()).collect();
                group_batches(table, Arc::new(file), groups, &[])
            })
            .collect::<Result<Vec<_>>>()?;
        let merge = Merge::new(table, Order::VolumeTime, streams);
        let written = file::write(&*self.disk, work, table, merge, losses)?;
        let rows = written.map_or(0, |(_, rows)| rows);
        if rows != expected {
            let reason = format!("compaction made {rows} rows of {expected}; nothing was changed");
            return Err(HistoryError::damaged(&partition.path, reason));
        }
        for other in others(&partition.path)? {
            if let Some(name) = other.file_name().filter(|_| !is_temporary(&other)) {
                self.disk
                    .hard_link(&other, &work.join(name))
                    .map_err(HistoryError::io("link", &other))?;
            }
        }
        self.sync_dir(work)?;
        match self.disk.exchange(work, &partition.path) {
            Ok(()) => {}
            Err(error) if is_unsupported(&error) => return Ok(false),
            Err(error) => return Err(HistoryError::io("exchange folder", &partition.path)(error)),
        }
        for folder in [partition.path.parent(), work.parent()]
            .into_iter()
            .flatten()
        {
            self.sync_dir(folder)?;
        }
        Ok(true)
    }

    fn retain(&self, now: UnixNanos, done: &mut Maintained) -> Result<()> {
        let retention = *lock(&self.retention);
        if retention == Retention::default() {
            return Ok(());
        }
        let mut stored = Vec::new();
        for table in Table::ALL {
            for partition in all_partitions(self.dir(), table)? {
                // The present hour stays, and so does what a clock that ran ahead has written.
                if partition.hour < Hour::of(now) {
                    let bytes = folder_bytes(&partition.path)?;
                    stored.push(Stored {
                        table,
                        partition,
                        bytes,
                    });
                }
            }
        }
        stored.sort_by_key(|stored| (stored.partition.hour, stored.table));
        let mut stored = std::collections::VecDeque::from(stored);
        if let Some(max_age) = retention.max_age {
            let max_age = i64::try_from(max_age.as_nanos()).unwrap_or(i64::MAX);
            let expired =
                |oldest: &&Stored| oldest.partition.hour.end() < now.saturating_sub(max_age);
            while stored.front().filter(expired).is_some() {
                self.remove_oldest(&mut stored)?;
                done.expired += 1;
            }
        }
        let mut bytes: u64 = stored.iter().map(|stored| stored.bytes).sum();
        let mut free = free_bytes(self.dir())?;
        while retention.max_bytes.is_some_and(|max| bytes > max)
            || retention.min_free_bytes.is_some_and(|min| free < min)
        {
            let Some(removed) = self.remove_oldest(&mut stored)? else {
                break;
            };
            bytes = bytes.saturating_sub(removed);
            free = free_bytes(self.dir())?;
            done.evicted += 1;
        }
        Ok(())
    }

    /// Removes the oldest hour and returns its bytes.
    fn remove_oldest(
        &self,
        stored: &mut std::collections::VecDeque<Stored>,
    ) -> Result<Option<u64>> {
        let Some(oldest) = stored.pop_front() else {
            return Ok(None);
        };
        let _files = lock(&self.files);
        let path = &oldest.partition.path;
        let work = self.work_folder("remove")?;
        self.disk
            .rename(path, &work.join("hour"))
            .map_err(HistoryError::io("remove hour", path))?;
        if let Some(day) = path.parent() {
            self.sync_dir(day)?;
            // Fails as long as the day has other hours.
            let _ = self.disk.remove_dir(day);
        }
        self.remove_tree(&work)?;
        Ok(Some(oldest.bytes))
    }

    /// Removes what a crash left behind, and ends imports that were complete.
    pub(super) fn repair(&self) -> Result<()> {
        let work = self.dir().join(WORK);
        if work.is_dir() {
            for entry in fs::read_dir(&work).map_err(HistoryError::io("list", &work))? {
                let path = entry.map_err(HistoryError::io("list", &work))?.path();
                if import::is_complete(&path) {
                    import::publish(&*self.disk, &path, self.dir())?;
                } else if path.is_dir() {
                    self.remove_tree(&path)?;
                } else {
                    self.disk
                        .remove_file(&path)
                        .map_err(HistoryError::io("remove", &path))?;
                }
            }
        }
        for table in Table::ALL {
            for partition in all_partitions(self.dir(), table)? {
                for path in others(&partition.path)? {
                    if is_temporary(&path) {
                        self.disk
                            .remove_file(&path)
                            .map_err(HistoryError::io("remove", &path))?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn name_of(field: &arrow::datatypes::FieldRef) -> &str {
    field.name()
}

fn is_temporary(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.ends_with(TEMPORARY))
}

fn is_unsupported(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = Errno::from_io_error(error);
    matches!(
        errno,
        Some(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::XDEV)
    )
}

fn folder_bytes(path: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(path).map_err(HistoryError::io("list", path))? {
        let entry = entry.map_err(HistoryError::io("list", path))?;
        bytes += entry.metadata().map_or(0, |metadata| metadata.len());
    }
    Ok(bytes)
}

fn free_bytes(path: &Path) -> Result<u64> {
    let stat = statvfs(path).map_err(|error| HistoryError::io("statvfs", path)(error.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
