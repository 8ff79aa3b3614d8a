//! Writing: rows are buffered, sorted and committed as whole files.
//!
//! A file is written under a temporary name in its partition, synced, renamed and its folder synced:
//! a reader sees a file complete or not at all. Rows that are only buffered are lost in a crash: at
//! most those of the last [`StoreConfig::flush_every`]. A clean stop ([`HistoryStore::close`]) loses
//! none.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arrow::array::RecordBatch;
use rustix::fs::{FlockOperation, flock};

use super::disk::{Disk, RealDisk, create_dirs};
use super::error::{HistoryError, Result};
use super::file::{self, Losses};
use super::maintain::Retention;
use super::merge::{Order, sort};
use super::partition::Hour;
use super::table::{Table, TableRow};

/// The writer's lock, so that two never write the same history.
const LOCK: &str = ".lock";

/// How the history is written.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The folder; it is created.
    pub dir: PathBuf,
    /// Rows are written when they have waited this long: what a crash can lose.
    pub flush_every: Duration,
    /// Rows are written when they take this many bytes of memory.
    pub flush_bytes: usize,
    /// Rows beyond this many bytes of memory are dropped and counted, when they can't be written.
    pub buffer_bytes: usize,
    /// What is kept.
    pub retention: Retention,
    /// Whether files are synced; only results that can be made again do without.
    pub durable: bool,
}

impl StoreConfig {
    /// The defaults: 30 s, 16 MiB, 64 MiB, all kept, synced.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            flush_every: Duration::from_secs(30),
            flush_bytes: 16 << 20,
            buffer_bytes: 64 << 20,
            retention: Retention::default(),
            durable: true,
        }
    }
}

/// What the store did since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Rows taken.
    pub rows_appended: u64,
    /// Rows in files.
    pub rows_written: u64,
    /// Rows waiting.
    pub rows_buffered: u64,
    /// Rows dropped because they could not be written for too long.
    pub rows_dropped: u64,
    /// Files written.
    pub files_written: u64,
}

#[derive(Default)]
struct Pending {
    batches: Vec<RecordBatch>,
    rows: u64,
    bytes: usize,
}

#[derive(Default)]
struct Buffer {
    pending: BTreeMap<(Table, Hour), Pending>,
    bytes: usize,
    losses: BTreeMap<Table, Losses>,
    stats: StoreStats,
    /// When the oldest buffered row came.
    oldest: Option<Instant>,
}

impl Buffer {
    fn put(&mut self, at: (Table, Hour), pending: Pending) {
        self.bytes += pending.bytes;
        self.stats.rows_buffered += pending.rows;
        let slot = self.pending.entry(at).or_default();
        slot.rows += pending.rows;
        slot.bytes += pending.bytes;
        slot.batches.extend(pending.batches);
        self.oldest.get_or_insert_with(Instant::now);
    }

    fn take(&mut self, at: (Table, Hour)) -> Option<(Pending, Losses)> {
        let pending = self.pending.remove(&at)?;
        self.bytes -= pending.bytes;
        self.stats.rows_buffered -= pending.rows;
        if self.pending.is_empty() {
            self.oldest = None;
        }
        Some((pending, self.losses.remove(&at.0).unwrap_or_default()))
    }
}

/// A folder of history, opened for writing. Every call takes `&self`: the store may be shared.
pub struct HistoryStore {
    pub(super) config: StoreConfig,
    /// What is kept now; it may change while the store is open.
    pub(super) retention: Mutex<Retention>,
    pub(super) disk: Box<dyn Disk>,
    buffer: Mutex<Buffer>,
    /// Held by whoever changes files.
    pub(super) files: Mutex<()>,
    _lock: File,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HistoryStore {
    /// Opens or creates the history, repairs what a crash left behind, and locks it.
    pub fn open(config: StoreConfig) -> Result<Self> {
        let disk = RealDisk {
            durable: config.durable,
        };
        Self::open_on(config, Box::new(disk))
    }

    pub(super) fn open_on(config: StoreConfig, disk: Box<dyn Disk>) -> Result<Self> {
        let dir = &config.dir;
        std::fs::create_dir_all(dir).map_err(HistoryError::io("create history folder", dir))?;
        let path = dir.join(LOCK);
        let lock_file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(HistoryError::io("open", &path))?;
        flock(&lock_file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| HistoryError::Locked { dir: dir.clone() })?;
        let store = Self {
            disk,
            buffer: Mutex::default(),
            files: Mutex::default(),
            _lock: lock_file,
            retention: Mutex::new(config.retention),
            config,
        };
        store.repair()?;
        Ok(store)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.config.dir
    }

    /// Keeps more or less from the next [`Self::maintain`] on.
    pub fn set_retention(&self, retention: Retention) {
        *lock(&self.retention) = retention;
    }

    /// Takes rows. They are on disk after the next flush; this call makes one when rows have waited
    /// long enough or take too much memory, unless files are being changed at the moment.
    ///
    /// An error is about an earlier or this flush; the rows are kept and tried again.
    pub fn append<R: TableRow>(&self, rows: &[R]) -> Result<()> {
        let mut hours: BTreeMap<Hour, Vec<&R>> = BTreeMap::new();
        for row in rows {
            hours.entry(Hour::of(row.ts())).or_default().push(row);
        }
        let mut due = false;
        for (hour, rows) in hours {
            let batch = R::to_batch(&rows)?;
            let pending = Pending {
                rows: rows.len() as u64,
                bytes: batch.get_array_memory_size(),
                batches: vec![batch],
            };
            let mut buffer = lock(&self.buffer);
            buffer.stats.rows_appended += pending.rows;
            if buffer.bytes + pending.bytes > self.config.buffer_bytes.max(self.config.flush_bytes)
                && buffer.bytes > 0
            {
                // One more try before rows are given up.
                drop(buffer);
                let flushed = self.flush();
                buffer = lock(&self.buffer);
                if let Err(error) = flushed {
                    buffer.stats.rows_dropped += pending.rows;
                    buffer.losses.entry(R::TABLE).or_default().dropped_rows += pending.rows;
                    return Err(error);
                }
            }
            buffer.put((R::TABLE, hour), pending);
            due |= self.due(&buffer);
        }
        match self.files.try_lock() {
            Ok(guard) if due => self.flush_locked(&guard),
            _ => Ok(()),
        }
    }

    /// Counts events that were lost before they became rows of `table`; the next file says so.
    pub fn note_dropped_events(&self, table: Table, events: u64) {
        if events > 0 {
            lock(&self.buffer)
                .losses
                .entry(table)
                .or_default()
                .dropped_events += events;
        }
    }

    fn due(&self, buffer: &Buffer) -> bool {
        buffer.bytes >= self.config.flush_bytes
            || buffer
                .oldest
                .is_some_and(|oldest| oldest.elapsed() >= self.config.flush_every)
    }

    /// Writes what has waited long enough; call it about once a second.
    pub fn tick(&self) -> Result<()> {
        if self.due(&lock(&self.buffer)) {
            self.flush()
        } else {
            Ok(())
        }
    }

    /// Writes all buffered rows. Rows that can't be written stay buffered.
    pub fn flush(&self) -> Result<()> {
        self.flush_locked(&lock(&self.files))
    }

    fn flush_locked(&self, _files: &MutexGuard<'_, ()>) -> Result<()> {
        let waiting: Vec<(Table, Hour)> = lock(&self.buffer).pending.keys().copied().collect();
        let mut first_error = None;
        for at in waiting {
            let Some((pending, losses)) = lock(&self.buffer).take(at) else {
                continue;
            };
            match self.write_partition(at.0, at.1, &pending.batches, losses) {
                Ok(synced) => {
                    let mut buffer = lock(&self.buffer);
                    buffer.stats.rows_written += pending.rows;
                    buffer.stats.files_written += 1;
                    first_error = first_error.or(synced.err());
                }
                Err(error) => {
                    let mut buffer = lock(&self.buffer);
                    buffer.put(at, pending);
                    let total = buffer.losses.entry(at.0).or_default();
                    *total = total.plus(losses);
                    first_error = first_error.or(Some(error));
                }
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// Writes one file. The inner result is that of making its name durable: the file is there then,
    /// and must not be written again.
    fn write_partition(
        &self,
        table: Table,
        hour: Hour,
        batches: &[RecordBatch],
        losses: Losses,
    ) -> Result<Result<()>> {
        let Some(sorted) = sort(table, batches, Order::VolumeTime)? else {
            return Ok(Ok(()));
        };
        let folder = hour.in_table(self.dir(), table);
        create_dirs(&*self.disk, self.dir(), &folder)
            .map_err(HistoryError::io("create folder", &folder))?;
        file::write(
            &*self.disk,
            &folder,
            table,
            std::iter::once(Ok(sorted)),
            losses,
        )?;
        Ok(self
            .disk
            .sync_dir(&folder)
            .map_err(HistoryError::io("fsync folder", &folder)))
    }

    /// What was done since the store was opened.
    pub fn stats(&self) -> StoreStats {
        lock(&self.buffer).stats
    }

    /// Whether rows of this hour are still to be written.
    pub(super) fn is_pending(&self, table: Table, hour: Hour) -> bool {
        lock(&self.buffer).pending.contains_key(&(table, hour))
    }

    /// Writes all rows and gives the history free.
    pub fn close(self) -> Result<()> {
        self.flush()
    }
}

impl Drop for HistoryStore {
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            tracing::error!(%error, "history rows were lost at the end");
        }
    }
}
