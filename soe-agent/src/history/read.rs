//! Reading: rows of a time range and some volumes, streamed, with every byte proven.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::error::{HistoryError, Result};
use super::file::HistoryFile;
use super::merge::{Merge, Order};
use super::partition::{Hour, Partition, files, partitions};
use super::scan::{partition_streams, time_range};
use super::table::{Table, TableRow};
use crate::seam::UnixNanos;
use crate::window::{BinBuilder, BinError, BinSeries, Name, VolumeWindow};

/// What to do about a damaged file, or one of a newer version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDamage {
    /// End with the error: for reads that a person asked for.
    Fail,
    /// Leave the file out and remember the error: for the daemon.
    Skip,
}

/// Which rows are wanted.
#[derive(Clone, Debug)]
pub struct Query {
    /// Rows whose `ts` lies in here.
    pub range: Range<UnixNanos>,
    /// Only these volumes; `None` is all. Tables without a volume give all rows.
    pub volumes: Option<BTreeSet<String>>,
    /// What to do about damage.
    pub on_damage: OnDamage,
    /// Whether bulky columns (the histograms) are wanted.
    pub bulky: bool,
}

impl Query {
    /// Everything, failing on damage.
    pub fn all() -> Self {
        Self {
            range: UnixNanos::MIN..UnixNanos::MAX,
            volumes: None,
            on_damage: OnDamage::Fail,
            bulky: true,
        }
    }

    /// Everything of a range of time.
    pub fn range(range: Range<UnixNanos>) -> Self {
        Self {
            range,
            ..Self::all()
        }
    }

    /// Only some volumes.
    pub fn volumes<S: Into<String>>(mut self, volumes: impl IntoIterator<Item = S>) -> Self {
        self.volumes = Some(volumes.into_iter().map(Into::into).collect());
        self
    }

    /// Leaves damaged files out.
    pub fn skip_damage(mut self) -> Self {
        self.on_damage = OnDamage::Skip;
        self
    }

    /// Leaves the histograms out.
    pub fn without_bulky(mut self) -> Self {
        self.bulky = false;
        self
    }
}

/// Errors about files that were left out.
#[derive(Clone, Default)]
pub(super) struct Skipped(Arc<Mutex<Vec<HistoryError>>>);

impl Skipped {
    pub fn take(&self) -> Vec<HistoryError> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Remembers the error if it may be skipped, else gives it back.
    pub fn accept(&self, on_damage: OnDamage, error: HistoryError) -> Result<()> {
        let skippable = matches!(
            error,
            HistoryError::Damaged { .. } | HistoryError::Version { .. }
        );
        if on_damage == OnDamage::Fail || !skippable {
            return Err(error);
        }
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(error);
        Ok(())
    }
}

/// A folder of history, opened for reading. Needs no lock and writes nothing; a daemon may go on
/// writing, compacting and removing meanwhile.
#[derive(Clone, Debug)]
pub struct HistoryReader {
    dir: PathBuf,
}

impl HistoryReader {
    /// Opens the folder, which must exist.
    pub fn open(dir: &Path) -> Result<Self> {
        std::fs::read_dir(dir).map_err(HistoryError::io("open history folder", dir))?;
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The rows of a table, hour by hour; within an hour by (volume, ts).
    pub fn rows<R: TableRow>(&self, query: &Query) -> Result<RowStream<R>> {
        self.stream(query, Order::VolumeTime)
    }

    /// The rows of a table by time, all volumes together: what a replay wants.
    pub fn rows_by_time<R: TableRow>(&self, query: &Query) -> Result<RowStream<R>> {
        self.stream(query, Order::Time)
    }

    fn stream<R: TableRow>(&self, query: &Query, order: Order) -> Result<RowStream<R>> {
        if query.range.is_empty() {
            return Ok(RowStream::empty(query, order));
        }
        let hours = Hour::of(query.range.start)..=Hour::of(query.range.end - 1);
        let partitions = partitions(&self.dir, R::TABLE, hours)?.into();
        Ok(RowStream {
            partitions,
            ..RowStream::empty(query, order)
        })
    }

    /// The load of every volume in evenly spaced bins of `bin` ns, and the errors about files left
    /// out. Holds the bins only, never the windows. The range of the query must be bounded. Windows
    /// that began more than an hour before the range are not looked at.
    pub fn load_bins(
        &self,
        query: &Query,
        bin: i64,
    ) -> Result<(BTreeMap<Name, BinSeries>, Vec<HistoryError>)> {
        let refuse = |error: BinError| HistoryError::Query {
            reason: error.to_string(),
        };
        // A window that began an hour before may still reach into the range.
        let mut wider = query.clone().without_bulky();
        wider.range.start = wider
            .range
            .start
            .saturating_sub(3600 * crate::window::SECOND_NS);
        let mut volumes: BTreeMap<Name, BinBuilder> = BTreeMap::new();
        let mut rows = self.rows::<VolumeWindow>(&wider)?;
        for window in &mut rows {
            let window = window?;
            if let Some(builder) = volumes.get_mut(&window.volume) {
                builder.add(&window);
            } else {
                let name = window.volume.clone();
                let mut builder =
                    BinBuilder::new(name.clone(), query.range.clone(), bin).map_err(refuse)?;
                builder.add(&window);
                volumes.insert(name, builder);
            }
        }
        let series = volumes
            .into_iter()
            .map(|(name, builder)| (name, builder.finish()));
        Ok((series.collect(), rows.skipped()))
    }

    /// The first and the last time (inclusive) that a table holds, from the files' statistics;
    /// `None` when it is empty. Damaged files say nothing.
    pub fn time_span(&self, table: Table) -> Result<Option<(UnixNanos, UnixNanos)>> {
        let hours = partitions(&self.dir, table, Hour(i64::MIN)..=Hour(i64::MAX))?;
        let span = |partition: &Partition| -> Result<Option<(UnixNanos, UnixNanos)>> {
            let mut span: Option<(UnixNanos, UnixNanos)> = None;
            for path in files(&partition.path)? {
                let Ok(file) = HistoryFile::open(&path, table) else {
                    continue;
                };
                for group in 0..file.row_groups() {
                    if let Some((min, max)) = time_range(&file, group) {
                        span = Some(span.map_or((min, max), |s| (s.0.min(min), s.1.max(max))));
                    }
                }
            }
            Ok(span)
        };
        let mut first = None;
        for partition in &hours {
            first = span(partition)?;
            if first.is_some() {
                break;
            }
        }
        let mut last = None;
        for partition in hours.iter().rev() {
            last = span(partition)?;
            if last.is_some() {
                break;
            }
        }
        Ok(first.zip(last).map(|(first, last)| (first.0, last.1)))
    }

    /// Reads everything and returns every error found: a check of the whole history.
    pub fn verify(&self) -> Result<Vec<HistoryError>> {
        let mut errors = Vec::new();
        for table in Table::ALL {
            for partition in partitions(&self.dir, table, Hour(i64::MIN)..=Hour(i64::MAX))? {
                for path in files(&partition.path)? {
                    let proven = HistoryFile::open(&path, table).and_then(|file| {
                        (0..file.row_groups()).try_for_each(|group| file.prove_group(group))
                    });
                    match proven {
                        Err(error) if !error.is_not_found() => errors.push(error),
                        _ => {}
                    }
                }
            }
        }
        Ok(errors)
    }
}

/// Rows one by one; see [`HistoryReader::rows`].
pub struct RowStream<R> {
    query: Query,
    order: Order,
    partitions: VecDeque<Partition>,
    merge: Option<Merge>,
    rows: std::vec::IntoIter<R>,
    skipped: Skipped,
    failed: bool,
}

impl<R: TableRow> RowStream<R> {
    fn empty(query: &Query, order: Order) -> Self {
        Self {
            query: query.clone(),
            order,
            partitions: VecDeque::new(),
            merge: None,
            rows: Vec::new().into_iter(),
            skipped: Skipped::default(),
            failed: false,
        }
    }

    /// The errors about files that were left out, up to now.
    pub fn skipped(&self) -> Vec<HistoryError> {
        self.skipped.take()
    }

    fn fill(&mut self) -> Result<bool> {
        loop {
            if let Some(merge) = &mut self.merge {
                match merge.next().transpose()? {
                    Some(batch) => {
                        self.rows = R::from_batch(&batch)?.into_iter();
                        return Ok(true);
                    }
                    None => self.merge = None,
                }
            }
            let Some(partition) = self.partitions.pop_front() else {
                return Ok(false);
            };
            let streams = partition_streams(
                R::TABLE,
                &partition,
                &self.query,
                self.order,
                R::BULKY,
                &self.skipped,
            )?;
            self.merge = Some(Merge::new(R::TABLE, self.order, streams));
        }
    }
}

impl<R: TableRow> Iterator for RowStream<R> {
    type Item = Result<R>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(row) = self.rows.next() {
                return Some(Ok(row));
            }
            if self.failed {
                return None;
            }
            match self.fill() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    self.failed = true;
                    return Some(Err(error));
                }
            }
        }
    }
}
