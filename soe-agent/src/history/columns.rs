//! Rows into columns and back: the two halves of every table's definition.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, ArrowPrimitiveType, BooleanArray, Float64Array, Int64Array, ListArray,
    PrimitiveArray, RecordBatch, StringArray, StructArray, TimestampMicrosecondArray,
    TimestampNanosecondArray,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{
    DataType, Field, Fields, Float64Type, Int64Type, Schema, TimeUnit, TimestampMicrosecondType,
    TimestampNanosecondType,
};

use super::error::{HistoryError, Result};
use super::table::Table;
use crate::window::{LogHistogram, Name};
use soe_common::histogram::{bucket_low, bucket_of};

/// All times are UTC.
const UTC: &str = "UTC";

/// Builds a batch column by column. Unsigned numbers are stored as signed ones, because not every
/// reader of Parquet knows unsigned types; what does not fit is stored as the largest.
#[derive(Default)]
pub(super) struct BatchBuilder {
    fields: Vec<Field>,
    arrays: Vec<ArrayRef>,
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl BatchBuilder {
    fn push(mut self, name: &str, nullable: bool, array: ArrayRef) -> Self {
        self.fields
            .push(Field::new(name, array.data_type().clone(), nullable));
        self.arrays.push(array);
        self
    }

    /// Times in ns since the Unix epoch, stored in microseconds.
    pub fn micros(self, name: &str, times: impl Iterator<Item = i64>) -> Self {
        let array: TimestampMicrosecondArray = times.map(|ns| Some(ns.div_euclid(1000))).collect();
        self.push(name, false, Arc::new(array.with_timezone(UTC)))
    }

    /// Times that may be missing, stored in microseconds.
    pub fn opt_micros(self, name: &str, times: impl Iterator<Item = Option<i64>>) -> Self {
        let array: TimestampMicrosecondArray =
            times.map(|ns| ns.map(|ns| ns.div_euclid(1000))).collect();
        self.push(name, true, Arc::new(array.with_timezone(UTC)))
    }

    /// Times stored to the nanosecond.
    pub fn nanos(self, name: &str, times: impl Iterator<Item = i64>) -> Self {
        let array: TimestampNanosecondArray = times.map(Some).collect();
        self.push(name, false, Arc::new(array.with_timezone(UTC)))
    }

    /// Lengths of time in ns, stored in milliseconds.
    pub fn millis(self, name: &str, lengths: impl Iterator<Item = i64>) -> Self {
        let array: Int64Array = lengths.map(|ns| Some(ns / 1_000_000)).collect();
        self.push(name, false, Arc::new(array))
    }

    /// Text.
    pub fn text<'a>(self, name: &str, values: impl Iterator<Item = &'a str>) -> Self {
        self.push(name, false, Arc::new(StringArray::from_iter_values(values)))
    }

    /// Text that may be missing.
    pub fn opt_text<'a>(self, name: &str, values: impl Iterator<Item = Option<&'a str>>) -> Self {
        self.push(name, true, Arc::new(values.collect::<StringArray>()))
    }

    /// Counts.
    pub fn count(self, name: &str, values: impl Iterator<Item = u64>) -> Self {
        let array: Int64Array = values.map(|value| Some(signed(value))).collect();
        self.push(name, false, Arc::new(array))
    }

    /// Counts that may be unknown.
    pub fn opt_count(self, name: &str, values: impl Iterator<Item = Option<u64>>) -> Self {
        let array: Int64Array = values.map(|value| value.map(signed)).collect();
        self.push(name, true, Arc::new(array))
    }

    /// Numbers.
    pub fn number(self, name: &str, values: impl Iterator<Item = f64>) -> Self {
        self.push(
            name,
            false,
            Arc::new(Float64Array::from_iter_values(values)),
        )
    }

    /// Numbers that may be unknown.
    pub fn opt_number(self, name: &str, values: impl Iterator<Item = Option<f64>>) -> Self {
        self.push(name, true, Arc::new(values.collect::<Float64Array>()))
    }

    /// Truth values.
    pub fn truth(self, name: &str, values: impl Iterator<Item = bool>) -> Self {
        self.push(
            name,
            false,
            Arc::new(values.map(Some).collect::<BooleanArray>()),
        )
    }

    /// Lists of names.
    pub fn names<'a>(self, name: &str, values: impl Iterator<Item = &'a [Name]>) -> Self {
        let (mut lengths, mut items) = (Vec::new(), Vec::<&str>::new());
        for list in values {
            lengths.push(list.len());
            items.extend(list.iter().map(|item| &**item));
        }
        let field = Arc::new(Field::new("element", DataType::Utf8, false));
        let offsets = OffsetBuffer::from_lengths(lengths);
        let array = ListArray::new(field, offsets, Arc::new(StringArray::from(items)), None);
        self.push(name, false, Arc::new(array))
    }

    /// Histograms, as lists of (lower end of the bucket in ns, count).
    pub fn histogram<'a>(self, name: &str, values: impl Iterator<Item = &'a LogHistogram>) -> Self {
        let (mut lengths, mut from, mut counts) = (Vec::new(), Vec::new(), Vec::new());
        for histogram in values {
            let before = from.len();
            for (bucket, count) in histogram.iter() {
                from.push(signed(bucket_low(bucket)));
                counts.push(signed(count));
            }
            lengths.push(from.len() - before);
        }
        let fields = Fields::from(vec![
            Field::new("from_ns", DataType::Int64, false),
            Field::new("count", DataType::Int64, false),
        ]);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(Int64Array::from(from)),
            Arc::new(Int64Array::from(counts)),
        ];
        let items = StructArray::new(fields.clone(), columns, None);
        let field = Arc::new(Field::new("element", DataType::Struct(fields), false));
        let offsets = OffsetBuffer::from_lengths(lengths);
        let array = ListArray::new(field, offsets, Arc::new(items), None);
        self.push(name, false, Arc::new(array))
    }

    /// The batch.
    pub fn finish(self, table: &'static str) -> Result<RecordBatch> {
        RecordBatch::try_new(Arc::new(Schema::new(self.fields)), self.arrays).map_err(|error| {
            HistoryError::Columns {
                table,
                reason: error.to_string(),
            }
        })
    }
}

/// Reads a batch column by column; a column that was left out reads as missing where that is allowed.
pub(super) struct BatchReader<'a> {
    batch: &'a RecordBatch,
    table: Table,
}

impl<'a> BatchReader<'a> {
    pub fn new(table: Table, batch: &'a RecordBatch) -> Self {
        Self { batch, table }
    }

    fn wrong(&self, name: &str, what: &str) -> HistoryError {
        HistoryError::Columns {
            table: self.table.name(),
            reason: format!("column {name} {what}"),
        }
    }

    fn find<T: 'static>(&self, name: &str) -> Result<Option<&'a T>> {
        let Some(array) = self.batch.column_by_name(name) else {
            return Ok(None);
        };
        let typed = array.as_any().downcast_ref::<T>();
        typed
            .map(Some)
            .ok_or_else(|| self.wrong(name, &format!("has type {}", array.data_type())))
    }

    fn need<T: Array + 'static>(&self, name: &str) -> Result<&'a T> {
        let array = self
            .find::<T>(name)?
            .ok_or_else(|| self.wrong(name, "is missing"))?;
        if array.null_count() > 0 {
            return Err(self.wrong(name, "has missing values"));
        }
        Ok(array)
    }

    /// Times, in ns, whatever unit they are stored in.
    pub fn times(&self, name: &str) -> Result<Times<'a>> {
        let column = self.batch.column_by_name(name);
        match column.map(|column| column.data_type()) {
            Some(DataType::Timestamp(TimeUnit::Nanosecond, _)) => {
                Ok(Times::Nanos(self.need(name)?))
            }
            _ => Ok(Times::Micros(self.need(name)?)),
        }
    }

    /// Times that may be missing.
    pub fn opt_times(&self, name: &str) -> Result<Opt<'a, TimestampMicrosecondType>> {
        Ok(Opt(self.find(name)?))
    }

    /// Text.
    pub fn text(&self, name: &str) -> Result<&'a StringArray> {
        self.need(name)
    }

    /// Text that may be missing.
    pub fn opt_text(&self, name: &str) -> Result<OptText<'a>> {
        Ok(OptText(self.find(name)?))
    }

    /// Counts.
    pub fn counts(&self, name: &str) -> Result<Counts<'a>> {
        Ok(Counts(self.need(name)?))
    }

    /// Counts that may be missing.
    pub fn opt_counts(&self, name: &str) -> Result<Opt<'a, Int64Type>> {
        Ok(Opt(self.find(name)?))
    }

    /// Numbers.
    pub fn numbers(&self, name: &str) -> Result<&'a Float64Array> {
        self.need(name)
    }

    /// Numbers that may be missing.
    pub fn opt_numbers(&self, name: &str) -> Result<Opt<'a, Float64Type>> {
        Ok(Opt(self.find(name)?))
    }

    /// Lists of names.
    pub fn names(&self, name: &str, row: usize) -> Result<Vec<Name>> {
        let lists = self.need::<ListArray>(name)?;
        let list = lists.value(row);
        let items = list
            .as_any()
            .downcast_ref::<StringArray>()
            .ok_or_else(|| self.wrong(name, "is not a list of text"))?;
        Ok(items.iter().flatten().map(Name::from).collect())
    }

    /// Histograms; one that was left out reads as empty.
    pub fn histogram(&self, name: &str, row: usize) -> Result<LogHistogram> {
        let mut histogram = LogHistogram::default();
        let Some(lists) = self.find::<ListArray>(name)? else {
            return Ok(histogram);
        };
        let wrong = || self.wrong(name, "is not a list of (from_ns, count)");
        let list = lists.value(row);
        let items = list
            .as_any()
            .downcast_ref::<StructArray>()
            .ok_or_else(wrong)?;
        let column = |name| {
            items
                .column_by_name(name)
                .and_then(|c| c.as_any().downcast_ref::<Int64Array>())
        };
        let (from, counts) = (
            column("from_ns").ok_or_else(wrong)?,
            column("count").ok_or_else(wrong)?,
        );
        for (from, count) in from.values().iter().zip(counts.values()) {
            histogram.add(bucket_of(from.unsigned_abs()), count.unsigned_abs());
        }
        Ok(histogram)
    }
}

/// A column of times without missing ones.
pub(super) enum Times<'a> {
    Micros(&'a PrimitiveArray<TimestampMicrosecondType>),
    Nanos(&'a PrimitiveArray<TimestampNanosecondType>),
}

impl Times<'_> {
    /// ns since the Unix epoch.
    pub fn ns(&self, row: usize) -> i64 {
        match self {
            Self::Micros(array) => array.value(row).saturating_mul(1000),
            Self::Nanos(array) => array.value(row),
        }
    }
}

/// A column of counts without missing ones.
pub(super) struct Counts<'a>(&'a Int64Array);

impl Counts<'_> {
    pub fn at(&self, row: usize) -> u64 {
        self.0.value(row).max(0).unsigned_abs()
    }

    /// Milliseconds as ns.
    pub fn millis_ns(&self, row: usize) -> i64 {
        self.0.value(row).saturating_mul(1_000_000)
    }
}

/// A column that may be missing, with values that may be missing.
pub(super) struct Opt<'a, T: ArrowPrimitiveType>(Option<&'a PrimitiveArray<T>>);

impl<T: ArrowPrimitiveType> Opt<'_, T> {
    pub fn at(&self, row: usize) -> Option<T::Native> {
        self.0
            .filter(|array| array.is_valid(row))
            .map(|array| array.value(row))
    }
}

impl Opt<'_, Int64Type> {
    pub fn count(&self, row: usize) -> Option<u64> {
        self.at(row).map(|value| value.max(0).unsigned_abs())
    }
}

impl Opt<'_, TimestampMicrosecondType> {
    pub fn ns(&self, row: usize) -> Option<i64> {
        self.at(row).map(|micros| micros.saturating_mul(1000))
    }
}

/// A column of text that may be missing, with values that may be missing.
pub(super) struct OptText<'a>(Option<&'a StringArray>);

impl OptText<'_> {
    pub fn at(&self, row: usize) -> Option<&str> {
        self.0
            .filter(|array| array.is_valid(row))
            .map(|array| array.value(row))
    }

    pub fn name(&self, row: usize) -> Option<Name> {
        self.at(row).map(Name::from)
    }
}
