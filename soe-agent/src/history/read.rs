//! Reading: rows of a time range and some volumes, streamed, with every byte proven.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{Array, BooleanArray, RecordBatch, StringArray};
use arrow::compute::filter_record_batch;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::statistics::Statistics;

use super::error::{HistoryError, Result};
use super::file::HistoryFile;
use super::merge::{Batches, Merge, Order, conform, sort, ts_unit, ts_values};
use super::partition::{Hour, Partition, files, partitions};
use super::table::{Table, TableRow};
use crate::seam::UnixNanos;
use crate::window::{BinBuilder, BinError, BinSeries, Name, VolumeWindow};

/// Rows that are decoded at a time.
const BATCH_ROWS: usize = 4096;
/// How often a partition is listed again because a file vanished between being listed and opened.
const RETRIES: usize = 5;

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
struct Skipped(Arc<Mutex<Vec<HistoryError>>>);

impl Skipped {
    fn take(&self) -> Vec<HistoryError> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Remembers the error if it may be skipped, else gives it back.
    fn accept(&self, on_damage: OnDamage, error: HistoryError) -> Result<()> {
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

    /// The windows of every volume in order of time, and the errors about files left out.
    pub fn volume_windows(
        &self,
        query: &Query,
    ) -> Result<(BTreeMap<Name, Vec<VolumeWindow>>, Vec<HistoryError>)> {
        let mut volumes: BTreeMap<Name, Vec<VolumeWindow>> = BTreeMap::new();
        let mut rows = self.rows::<VolumeWindow>(query)?;
        for window in &mut rows {
            let window = window?;
            match volumes.get_mut(&window.volume) {
                Some(windows) => windows.push(window),
                None => drop(volumes.insert(window.volume.clone(), vec![window])),
            }
        }
        Ok((volumes, rows.skipped()))
    }

    /// The load of every volume in evenly spaced bins of `bin` ns, and the errors about files left
    /// out. Holds the bins only, never the windows. The range of the query must be bounded.
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

/// Sorted streams that together hold the wanted rows of a partition. All files are opened before the
/// first is read, so a compaction meanwhile changes nothing.
fn partition_streams(
    table: Table,
    partition: &Partition,
    query: &Query,
    order: Order,
    bulky: &[&str],
    skipped: &Skipped,
) -> Result<Vec<Batches>> {
    let mut attempt = 0;
    let opened = loop {
        attempt += 1;
        let errors = Skipped::default();
        let opened: Result<Vec<HistoryFile>> = files(&partition.path)?
            .iter()
            .filter_map(|path| match HistoryFile::open(path, table) {
                Ok(file) => Some(Ok(file)),
                Err(error) => errors.accept(query.on_damage, error).err().map(Err),
            })
            .collect();
        match opened {
            // Compacted or removed since it was listed.
            Err(error) if error.is_not_found() && attempt < RETRIES => {}
            opened => {
                for error in errors.take() {
                    skipped.accept(query.on_damage, error)?;
                }
                break opened?;
            }
        }
    };
    let mut streams: Vec<Batches> = Vec::new();
    for file in opened {
        let groups: Vec<usize> = (0..file.row_groups())
            .filter(|&group| may_hold(&file, group, query))
            .collect();
        let file = Arc::new(file);
        let left_out = if query.bulky { &[] } else { bulky };
        let stream = |groups: Vec<usize>| {
            let batches = group_batches(table, file.clone(), groups, left_out)?;
            Ok::<_, HistoryError>(wanted(table, batches, query.clone(), skipped.clone()))
        };
        match order {
            Order::VolumeTime => streams.push(stream(groups)?),
            Order::Time => {
                for group in groups {
                    streams.push(by_time(
                        table,
                        stream(vec![group])?,
                        one_volume(&file, group),
                    ));
                }
            }
        }
    }
    Ok(streams)
}

/// A stream of one row group, sorted by time: as it is, when it holds one volume.
fn by_time(table: Table, stream: Batches, sorted: bool) -> Batches {
    if sorted || !table.has_volume() {
        return stream;
    }
    let mut stream = Some(stream);
    Box::new(std::iter::from_fn(move || {
        let batches: Result<Vec<RecordBatch>> = stream.take()?.collect();
        batches
            .and_then(|batches| sort(table, &batches, Order::Time))
            .transpose()
    }))
}

/// The batches of some row groups, each proven before it is decoded.
pub(super) fn group_batches(
    table: Table,
    file: Arc<HistoryFile>,
    groups: Vec<usize>,
    leave_out: &[&str],
) -> Result<Batches> {
    let full = table.schema()?;
    let kept: Vec<_> = full
        .fields()
        .iter()
        .filter(|field| !leave_out.contains(&field.name().as_str()))
        .cloned()
        .collect();
    let schema = Arc::new(arrow::datatypes::Schema::new(kept));
    let parquet = file.metadata.parquet_schema();
    let roots = file
        .schema()
        .fields()
        .iter()
        .enumerate()
        .filter_map(|(at, field)| schema.field_with_name(field.name()).is_ok().then_some(at))
        .collect::<Vec<_>>();
    let mask = ProjectionMask::roots(parquet, roots);
    let mut groups = groups.into_iter();
    let mut current = None;
    Ok(Box::new(std::iter::from_fn(move || {
        loop {
            if current.is_none() {
                let group = groups.next()?;
                match open_group(&file, group, mask.clone()) {
                    Ok(reader) => current = Some(reader),
                    Err(error) => return Some(Err(error)),
                }
            }
            match current.as_mut().and_then(Iterator::next) {
                Some(Ok(batch)) => return Some(conform(table, &batch, &schema)),
                Some(Err(error)) => {
                    return Some(Err(HistoryError::damaged(&file.path, error.to_string())));
                }
                None => current = None,
            }
        }
    })))
}

fn open_group(
    file: &HistoryFile,
    group: usize,
    mask: ProjectionMask,
) -> Result<parquet::arrow::arrow_reader::ParquetRecordBatchReader> {
    file.prove_group(group)?;
    let handle = file
        .file
        .try_clone()
        .map_err(HistoryError::io("open", &file.path))?;
    ParquetRecordBatchReaderBuilder::new_with_metadata(handle, file.metadata.clone())
        .with_batch_size(BATCH_ROWS)
        .with_row_groups(vec![group])
        .with_projection(mask)
        .build()
        .map_err(HistoryError::parquet(&file.path))
}

/// Only the rows that are wanted; damage ends the stream, and fails it unless it may be skipped.
fn wanted(table: Table, batches: Batches, query: Query, skipped: Skipped) -> Batches {
    let mut batches = Some(batches);
    Box::new(std::iter::from_fn(move || {
        match batches.as_mut()?.next()? {
            Ok(batch) => Some(filter(table, batch, &query)),
            Err(error) => {
                batches = None;
                skipped.accept(query.on_damage, error).err().map(Err)
            }
        }
    }))
}

fn filter(table: Table, batch: RecordBatch, query: &Query) -> Result<RecordBatch> {
    let times = ts_values(table, &batch)?;
    let column = batch
        .column_by_name("volume")
        .filter(|_| table.has_volume());
    let volumes = column.and_then(|column| column.as_any().downcast_ref::<StringArray>());
    let keep: Vec<bool> = times
        .iter()
        .enumerate()
        .map(|(row, ts)| {
            let volume = match (&query.volumes, volumes) {
                (Some(wanted), Some(volumes)) => wanted.contains(volumes.value(row)),
                _ => true,
            };
            volume && query.range.contains(ts)
        })
        .collect();
    if keep.iter().all(|&keep| keep) {
        return Ok(batch);
    }
    filter_record_batch(&batch, &BooleanArray::from(keep)).map_err(|error| HistoryError::Columns {
        table: table.name(),
        reason: error.to_string(),
    })
}

/// The statistics of a column of a row group.
fn statistics<'a>(file: &'a HistoryFile, group: usize, name: &str) -> Option<&'a Statistics> {
    let group = file.metadata.metadata().row_groups().get(group)?;
    group
        .columns()
        .iter()
        .find(|column| column.column_path().string() == name)?
        .statistics()
}

fn time_range(file: &HistoryFile, group: usize) -> Option<(UnixNanos, UnixNanos)> {
    let Statistics::Int64(times) = statistics(file, group, "ts")? else {
        return None;
    };
    let unit = ts_unit(&RecordBatch::new_empty(file.schema()));
    Some((
        times.min_opt()?.saturating_mul(unit),
        times.max_opt()?.saturating_mul(unit),
    ))
}

fn volume_range(file: &HistoryFile, group: usize) -> Option<(&[u8], &[u8])> {
    let Statistics::ByteArray(volumes) = statistics(file, group, "volume")? else {
        return None;
    };
    Some((volumes.min_opt()?.data(), volumes.max_opt()?.data()))
}

fn one_volume(file: &HistoryFile, group: usize) -> bool {
    let exact = matches!(
        statistics(file, group, "volume"),
        Some(Statistics::ByteArray(volumes)) if volumes.min_is_exact() && volumes.max_is_exact()
    );
    exact && volume_range(file, group).is_some_and(|(min, max)| min == max)
}

/// Whether a row group may hold wanted rows, by its statistics.
fn may_hold(file: &HistoryFile, group: usize, query: &Query) -> bool {
    let in_time = time_range(file, group)
        .is_none_or(|(min, max)| max >= query.range.start && min < query.range.end);
    let in_volumes = match (&query.volumes, volume_range(file, group)) {
        (Some(wanted), Some((min, max))) => wanted
            .iter()
            .any(|volume| min <= volume.as_bytes() && volume.as_bytes() <= max),
        _ => true,
    };
    in_time && in_volumes
}
