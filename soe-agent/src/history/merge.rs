//! Sorting one batch, and merging many sorted streams of batches in bounded memory.

use std::cmp::Ordering;
use std::sync::Arc;

use arrow::array::{Array, Int64Array, RecordBatch, StringArray, new_null_array};
use arrow::compute::{
    SortColumn, cast, concat_batches, interleave_record_batch, lexsort_to_indices,
    take_record_batch,
};
use arrow::datatypes::{DataType, SchemaRef};
use arrow::error::ArrowError;

use super::error::{HistoryError, Result};
use super::table::Table;

/// A stream of batches.
pub(super) type Batches = Box<dyn Iterator<Item = Result<RecordBatch>> + Send>;

/// Rows of a merged batch, at most.
const MERGED_ROWS: usize = 8192;

/// What rows are sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// By volume, then time: the order in every file. Tables without a volume: by time.
    VolumeTime,
    /// By time alone.
    Time,
}

fn columns_error(table: Table) -> impl Fn(ArrowError) -> HistoryError {
    move |error| HistoryError::Columns {
        table: table.name(),
        reason: error.to_string(),
    }
}

/// The times of a batch in the unit they are stored in, which is one per table.
fn ts_array(table: Table, batch: &RecordBatch) -> Result<Int64Array> {
    let missing = || HistoryError::Columns {
        table: table.name(),
        reason: "column ts is missing".into(),
    };
    let column = batch.column_by_name("ts").ok_or_else(missing)?;
    let numbers = cast(column, &DataType::Int64).map_err(columns_error(table))?;
    numbers
        .as_any()
        .downcast_ref::<Int64Array>()
        .cloned()
        .ok_or_else(missing)
}

/// The times of a batch in ns.
pub(super) fn ts_values(table: Table, batch: &RecordBatch) -> Result<Vec<i64>> {
    let unit = ts_unit(batch);
    Ok(ts_array(table, batch)?
        .values()
        .iter()
        .map(|ts| ts.saturating_mul(unit))
        .collect())
}

/// The unit that times are stored in, in ns.
pub(super) fn ts_unit(batch: &RecordBatch) -> i64 {
    use arrow::datatypes::TimeUnit;
    match batch.column_by_name("ts").map(|column| column.data_type()) {
        Some(DataType::Timestamp(TimeUnit::Nanosecond, _)) => 1,
        _ => 1000,
    }
}

fn volume_array(table: Table, batch: &RecordBatch) -> Result<Option<StringArray>> {
    if !table.has_volume() {
        return Ok(None);
    }
    let column = batch.column_by_name("volume");
    let volumes = column.and_then(|column| column.as_any().downcast_ref::<StringArray>());
    volumes
        .cloned()
        .map(Some)
        .ok_or_else(|| HistoryError::Columns {
            table: table.name(),
            reason: "column volume is missing or no text".into(),
        })
}

/// All of `batches` as one, in `order`; rows that are equal in it stay as they were.
pub(super) fn sort(
    table: Table,
    batches: &[RecordBatch],
    order: Order,
) -> Result<Option<RecordBatch>> {
    let Some(first) = batches.first() else {
        return Ok(None);
    };
    let wrong = columns_error(table);
    let all = concat_batches(&first.schema(), batches).map_err(&wrong)?;
    let plain = |values| SortColumn {
        values,
        options: None,
    };
    let mut keys = Vec::new();
    if order == Order::VolumeTime
        && let Some(volumes) = volume_array(table, &all)?
    {
        keys.push(plain(Arc::new(volumes) as _));
    }
    keys.push(plain(Arc::new(ts_array(table, &all)?) as _));
    // The row number makes the sort stable.
    let rows = Int64Array::from_iter_values(0..all.num_rows() as i64);
    keys.push(plain(Arc::new(rows) as _));
    let indices = lexsort_to_indices(&keys, None).map_err(&wrong)?;
    take_record_batch(&all, &indices).map(Some).map_err(&wrong)
}

/// The columns of `schema` in its order; what the batch does not have is missing in every row.
pub(super) fn conform(
    table: Table,
    batch: &RecordBatch,
    schema: &SchemaRef,
) -> Result<RecordBatch> {
    let columns = schema.fields().iter().map(|field| {
        let column = batch.column_by_name(field.name()).cloned();
        column.unwrap_or_else(|| new_null_array(field.data_type(), batch.num_rows()))
    });
    RecordBatch::try_new(schema.clone(), columns.collect()).map_err(columns_error(table))
}

/// One stream with the place it was read to.
struct Cursor {
    batch: RecordBatch,
    volumes: Option<StringArray>,
    ts: Int64Array,
    row: usize,
    rest: Batches,
}

impl Cursor {
    fn start(table: Table, order: Order, mut rest: Batches) -> Result<Option<Self>> {
        loop {
            let Some(batch) = rest.next().transpose()? else {
                return Ok(None);
            };
            if batch.num_rows() > 0 {
                let volumes = match order {
                    Order::VolumeTime => volume_array(table, &batch)?,
                    Order::Time => None,
                };
                let ts = ts_array(table, &batch)?;
                return Ok(Some(Self {
                    batch,
                    volumes,
                    ts,
                    row: 0,
                    rest,
                }));
            }
        }
    }

    fn compare(&self, row: usize, other: &Self) -> Ordering {
        let volumes = match (&self.volumes, &other.volumes) {
            (Some(mine), Some(others)) => mine.value(row).cmp(others.value(other.row)),
            _ => Ordering::Equal,
        };
        volumes.then_with(|| self.ts.value(row).cmp(&other.ts.value(other.row)))
    }

    fn exhausted(&self) -> bool {
        self.row >= self.batch.num_rows()
    }
}

/// Merges streams that are each in `order` into one that is. Holds one batch of each.
pub(super) struct Merge {
    table: Table,
    order: Order,
    waiting: Vec<Batches>,
    cursors: Vec<Cursor>,
    failed: bool,
}

impl Merge {
    pub fn new(table: Table, order: Order, streams: Vec<Batches>) -> Self {
        Self {
            table,
            order,
            waiting: streams,
            cursors: Vec::new(),
            failed: false,
        }
    }

    /// Fetches the next batch of every cursor that has none.
    fn refill(&mut self) -> Result<()> {
        for stream in std::mem::take(&mut self.waiting) {
            self.cursors
                .extend(Cursor::start(self.table, self.order, stream)?);
        }
        let mut at = 0;
        while let Some(cursor) = self.cursors.get_mut(at) {
            if cursor.exhausted() {
                let rest = std::mem::replace(&mut cursor.rest, Box::new(std::iter::empty()));
                match Cursor::start(self.table, self.order, rest)? {
                    Some(next) => *cursor = next,
                    None => {
                        self.cursors.remove(at);
                        continue;
                    }
                }
            }
            at += 1;
        }
        Ok(())
    }

    /// The cursor with the smallest row, and the one with the smallest row after it.
    fn two_smallest(&self) -> Option<(usize, Option<usize>)> {
        let mut order = 0..self.cursors.len();
        let mut smallest = order.next()?;
        let mut second: Option<usize> = None;
        for at in order {
            let less = |a: usize, b: usize| match (self.cursors.get(a), self.cursors.get(b)) {
                (Some(a), Some(b)) => a.compare(a.row, b).is_lt(),
                _ => false,
            };
            if less(at, smallest) {
                second = Some(smallest);
                smallest = at;
            } else if second.is_none_or(|second| less(at, second)) {
                second = Some(at);
            }
        }
        Some((smallest, second))
    }

    fn merged(&mut self) -> Result<Option<RecordBatch>> {
        self.refill()?;
        let mut picked: Vec<(usize, usize)> = Vec::new();
        while picked.len() < MERGED_ROWS {
            let Some((smallest, second)) = self.two_smallest() else {
                return Ok(None);
            };
            let Some(cursor) = self.cursors.get(smallest) else {
                return Ok(None);
            };
            let bound = second.and_then(|second| self.cursors.get(second));
            let limit = cursor
                .batch
                .num_rows()
                .min(cursor.row + MERGED_ROWS - picked.len());
            let mut end = cursor.row + 1;
            while end < limit && bound.is_none_or(|bound| cursor.compare(end, bound).is_le()) {
                end += 1;
            }
            picked.extend((cursor.row..end).map(|row| (smallest, row)));
            let done = end >= cursor.batch.num_rows();
            if let Some(cursor) = self.cursors.get_mut(smallest) {
                cursor.row = end;
            }
            if done {
                break;
            }
        }
        let (Some(&first), Some(&last)) = (picked.first(), picked.last()) else {
            return Ok(None);
        };
        if let Some(cursor) = self.cursors.get(first.0)
            && picked.iter().all(|pick| pick.0 == first.0)
        {
            return Ok(Some(cursor.batch.slice(first.1, last.1 + 1 - first.1)));
        }
        let batches: Vec<&RecordBatch> = self.cursors.iter().map(|cursor| &cursor.batch).collect();
        interleave_record_batch(&batches, &picked)
            .map(Some)
            .map_err(columns_error(self.table))
    }
}

impl Iterator for Merge {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let merged = self.merged();
        self.failed = merged.is_err();
        merged.transpose()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::history::table::TableRow;
    use crate::window::{Name, RegionHeatRow};

    fn rows(spec: &[(u8, i64)]) -> Vec<RegionHeatRow> {
        let row = |(at, &(volume, ts)): (usize, &(u8, i64))| RegionHeatRow {
            ts: ts * 1000,
            interval: 60_000_000_000,
            volume: Name::from(format!("v{volume}")),
            region: at as u64,
            read_ops: 0,
            write_ops: 0,
        };
        spec.iter().enumerate().map(row).collect()
    }

    proptest! {
        #[test]
        fn merging_sorted_streams_sorts_everything(
            streams in prop::collection::vec(
                prop::collection::vec((0u8..4, 0i64..50), 0..60), 0..6),
            cut in 1usize..20,
            by_time in any::<bool>(),
        ) {
            let order = if by_time { Order::Time } else { Order::VolumeTime };
            let key = |row: &RegionHeatRow| {
                (if by_time { Name::default() } else { row.volume.clone() }, row.ts)
            };
            let table = Table::RegionHeat;
            let mut inputs: Vec<Batches> = Vec::new();
            let mut expected = Vec::new();
            for stream in &streams {
                let rows = rows(stream);
                let batch = RegionHeatRow::to_batch(&rows.iter().collect::<Vec<_>>()).unwrap();
                let sorted = sort(table, &[batch], order).unwrap().unwrap();
                let pieces: Vec<_> = (0..sorted.num_rows()).step_by(cut)
                    .map(|at| Ok(sorted.slice(at, cut.min(sorted.num_rows() - at)))).collect();
                inputs.push(Box::new(pieces.into_iter()));
                expected.extend(rows);
            }
            let mut got = Vec::new();
            for batch in Merge::new(table, order, inputs) {
                got.extend(RegionHeatRow::from_batch(&batch.unwrap()).unwrap());
            }
            prop_assert!(got.windows(2).all(|pair| key(&pair[0]) <= key(&pair[1])));
            let all = |mut rows: Vec<RegionHeatRow>| {
                rows.sort_by(|a, b| (&a.volume, a.ts, a.region).cmp(&(&b.volume, b.ts, b.region)));
                rows
            };
            prop_assert_eq!(all(got), all(expected));
        }
    }
}
