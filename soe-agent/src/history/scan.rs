//! Scanning one partition: row groups chosen by their statistics, proven, decoded and filtered.

use std::sync::Arc;

use arrow::array::{Array, BooleanArray, RecordBatch, StringArray};
use arrow::compute::filter_record_batch;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::file::statistics::Statistics;

use super::error::{HistoryError, Result};
use super::file::{HistoryFile, Positioned};
use super::merge::{Batches, Order, conform, sort, ts_unit, ts_values};
use super::partition::{Partition, files};
use super::read::{Query, Skipped};
use super::table::Table;
use crate::seam::UnixNanos;

/// Rows that are decoded at a time.
const BATCH_ROWS: usize = 4096;
/// How often a partition is listed again because a file vanished between being listed and opened.
const RETRIES: usize = 5;

/// Sorted streams that together hold the wanted rows of a partition. All files are opened before the
/// first is read, so a compaction meanwhile changes nothing.
pub(super) fn partition_streams(
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
    file: &Arc<HistoryFile>,
    group: usize,
    mask: ProjectionMask,
) -> Result<ParquetRecordBatchReader> {
    file.prove_group(group)?;
    let source = Positioned::new(file.clone());
    ParquetRecordBatchReaderBuilder::new_with_metadata(source, file.metadata.clone())
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

pub(super) fn time_range(file: &HistoryFile, group: usize) -> Option<(UnixNanos, UnixNanos)> {
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
