//! One Parquet file: written sorted, with checksums that cover every byte; read with proof.
//!
//! `part-<UTC of the first row>-<16 hex, random>-<bytes of the tail, hex>-<CRC-32C of the tail>.parquet`
//!
//! The *tail* is all that follows the last row group: page indexes and footer. It is proven by the
//! name before anything in it is parsed. The footer's key-value metadata holds the CRC-32C of every
//! row group (`soe.row_groups`), so a reader that skips row groups still proves each byte it uses.
//! Parquet's own page checksums are not written by the library, and a flipped bit in a page or in a
//! statistic would otherwise be believed.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, RecordBatch, StringArray};
use arrow::datatypes::SchemaRef;
use bytes::Bytes;
use chrono::DateTime;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::metadata::{KeyValue, PageIndexPolicy, SortingColumn};
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{ChunkReader, Length};
use parquet::schema::types::ColumnPath;
use uuid::Uuid;

use super::contain::contained;
use super::disk::{Disk, DiskFile};
use super::error::{HistoryError, Result, one_line};
use super::merge::ts_values;
use super::partition::{SUFFIX, TEMPORARY};
use super::table::Table;
use crate::window::SECOND_NS;

/// A row group of fewer rows is shared by volumes: its metadata would outweigh it.
const MIN_GROUP_ROWS: usize = 1024;
/// The most rows of a row group.
const MAX_GROUP_ROWS: usize = 128 * 1024;

/// Keys of the footer's key-value metadata.
pub(super) mod key {
    /// The table's name.
    pub const TABLE: &str = "soe.table";
    /// The schema version of the table.
    pub const VERSION: &str = "soe.schema_version";
    /// Events that were lost before they became rows.
    pub const DROPPED_EVENTS: &str = "soe.dropped_events";
    /// Rows that were lost before they were written.
    pub const DROPPED_ROWS: &str = "soe.dropped_rows";
    /// Ends and checksums of the row groups: `end:crc,end:crc,...`, decimal and hexadecimal.
    pub const ROW_GROUPS: &str = "soe.row_groups";
}

/// What was lost in the time a file covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Events that were lost before they became rows (in the kernel, or on the way).
    pub dropped_events: u64,
    /// Rows that were lost before they were written (the disk was full for too long).
    pub dropped_rows: u64,
}

impl Losses {
    /// The sum of two.
    pub fn plus(self, other: Self) -> Self {
        Self {
            dropped_events: self.dropped_events.saturating_add(other.dropped_events),
            dropped_rows: self.dropped_rows.saturating_add(other.dropped_rows),
        }
    }
}

/// Counts and sums what goes to the file.
struct Summing {
    file: Box<dyn DiskFile>,
    written: u64,
    crc: u32,
}

impl Write for Summing {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self.file.write(buf)?;
        self.crc = crc32c::crc32c_append(self.crc, buf.get(..written).unwrap_or(buf));
        self.written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Summing {
    /// The checksum since the last call.
    fn take_crc(&mut self) -> u32 {
        std::mem::take(&mut self.crc)
    }
}

fn properties(table: Table, schema: &SchemaRef, losses: Losses) -> WriterProperties {
    let pair = |key: &str, value: String| KeyValue::new(key.to_owned(), value);
    let sorting = ["volume", "ts"].iter().filter_map(|name| {
        let column_idx = i32::try_from(schema.index_of(name).ok()?).ok()?;
        Some(SortingColumn {
            column_idx,
            descending: false,
            nulls_first: false,
        })
    });
    let mut builder = WriterProperties::builder()
        .set_created_by(format!("soe {}", env!("CARGO_PKG_VERSION")))
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_row_count(None)
        .set_sorting_columns(Some(sorting.collect()))
        .set_key_value_metadata(Some(vec![
            pair(key::TABLE, table.name().to_owned()),
            pair(key::VERSION, table.version().to_string()),
            pair(key::DROPPED_EVENTS, losses.dropped_events.to_string()),
            pair(key::DROPPED_ROWS, losses.dropped_rows.to_string()),
        ]));
    for column in ["ts", "target_start", "target_end", "received_at"] {
        let path = ColumnPath::from(column);
        builder = builder
            .set_column_dictionary_enabled(path.clone(), false)
            .set_column_encoding(path, Encoding::DELTA_BINARY_PACKED);
    }
    builder.build()
}

/// Writes the rows of `batches`, sorted already, as one file in `folder`, which exists. Returns the
/// file, durable under its final name, and its number of rows; nothing is written without rows.
pub(super) fn write(
    disk: &dyn Disk,
    folder: &Path,
    table: Table,
    batches: impl Iterator<Item = Result<RecordBatch>>,
    losses: Losses,
) -> Result<Option<(PathBuf, usize)>> {
    let mut batches = batches.peekable();
    let (schema, first_ts) = match batches.peek() {
        Some(Ok(batch)) => (batch.schema(), ts_values(table, batch)?.first().copied()),
        Some(Err(_)) => return batches.next().transpose().map(|_| None),
        None => return Ok(None),
    };
    let stem = format!("part-{}-{}", stamp(first_ts.unwrap_or(0)), random_name());
    let temporary = folder.join(format!(".{stem}{TEMPORARY}"));
    let result = write_temporary(disk, &temporary, table, &schema, batches, losses);
    let (rows, tail) = match result {
        Ok(written) => written,
        Err(error) => {
            // Best effort: what stays is removed at the next start.
            let _ = disk.remove_file(&temporary);
            return Err(error);
        }
    };
    let path = folder.join(format!("{stem}-{:x}-{:08x}{SUFFIX}", tail.bytes, tail.crc));
    disk.rename(&temporary, &path)
        .map_err(HistoryError::io("rename", &temporary))?;
    Ok(Some((path, rows)))
}

fn write_temporary(
    disk: &dyn Disk,
    path: &Path,
    table: Table,
    schema: &SchemaRef,
    batches: impl Iterator<Item = Result<RecordBatch>>,
    losses: Losses,
) -> Result<(usize, Tail)> {
    let wrong = |error: parquet::errors::ParquetError| match error {
        parquet::errors::ParquetError::External(source) => HistoryError::Io {
            call: "write",
            path: path.to_owned(),
            source: source
                .downcast::<io::Error>()
                .map_or_else(io::Error::other, |error| *error),
        },
        other => HistoryError::Columns {
            table: table.name(),
            reason: one_line(&other.to_string()),
        },
    };
    let file = disk
        .create(path)
        .map_err(HistoryError::io("create", path))?;
    let sink = Summing {
        file,
        written: 0,
        crc: 0,
    };
    let properties = properties(table, schema, losses);
    let mut writer =
        ArrowWriter::try_new(sink, schema.clone(), Some(properties)).map_err(&wrong)?;
    let (mut groups, mut groups_end) = (Vec::new(), 0);
    let mut end_group = |writer: &mut ArrowWriter<Summing>| -> Result<()> {
        writer.flush().map_err(&wrong)?;
        writer.sync().map_err(HistoryError::io("write", path))?;
        let sink = writer.inner_mut();
        groups_end = sink.written;
        groups.push(format!("{}:{:x}", groups_end, sink.take_crc()));
        Ok(())
    };
    let (mut rows, mut group_rows) = (0, 0);
    let mut last_volume: Option<String> = None;
    for batch in batches {
        let batch = batch?;
        for (volume, run) in volume_runs(table, &batch) {
            if volume != last_volume && group_rows >= MIN_GROUP_ROWS {
                end_group(&mut writer)?;
                group_rows = 0;
            }
            last_volume = volume;
            let mut from = run.start;
            while from < run.end {
                let count = (run.end - from).min(MAX_GROUP_ROWS - group_rows);
                writer.write(&batch.slice(from, count)).map_err(&wrong)?;
                from += count;
                group_rows += count;
                rows += count;
                if group_rows == MAX_GROUP_ROWS {
                    end_group(&mut writer)?;
                    group_rows = 0;
                }
            }
        }
    }
    if group_rows > 0 {
        end_group(&mut writer)?;
    }
    let groups = KeyValue::new(key::ROW_GROUPS.to_owned(), groups.join(","));
    writer.append_key_value_metadata(groups);
    writer.finish().map_err(&wrong)?;
    writer.sync().map_err(HistoryError::io("write", path))?;
    let sink = writer.inner_mut();
    sink.file.sync().map_err(HistoryError::io("fsync", path))?;
    let bytes = sink.written.saturating_sub(groups_end);
    Ok((
        rows,
        Tail {
            bytes,
            crc: sink.take_crc(),
        },
    ))
}

/// Runs of equal volumes in a sorted batch.
fn volume_runs(table: Table, batch: &RecordBatch) -> Vec<(Option<String>, Range<usize>)> {
    let column = batch
        .column_by_name("volume")
        .filter(|_| table.has_volume());
    let Some(volumes) = column.and_then(|column| column.as_any().downcast_ref::<StringArray>())
    else {
        return vec![(None, 0..batch.num_rows())];
    };
    let mut runs: Vec<(Option<String>, Range<usize>)> = Vec::new();
    for row in 0..volumes.len() {
        let volume = volumes.value(row);
        match runs.last_mut() {
            Some((Some(last), range)) if last == volume => range.end = row + 1,
            _ => runs.push((Some(volume.to_owned()), row..row + 1)),
        }
    }
    runs
}

fn stamp(ts: i64) -> String {
    let time = DateTime::from_timestamp(ts.div_euclid(SECOND_NS), 0).unwrap_or_default();
    time.format("%Y%m%dT%H%M%SZ").to_string()
}

/// Sixteen hexadecimal digits that were never used before: the clock may step back, names may not.
pub(super) fn random_name() -> String {
    Uuid::new_v4()
        .simple()
        .to_string()
        .chars()
        .take(16)
        .collect()
}

/// An opened file whose tail was proven.
pub(super) struct HistoryFile {
    pub path: PathBuf,
    pub file: File,
    pub metadata: ArrowReaderMetadata,
    pub losses: Losses,
    /// The row groups' checksums; none in files of other writers.
    groups: Vec<GroupSum>,
    /// Whether nothing vouches for the tail, and so for nothing in the file.
    foreign: bool,
}

/// Where a row group lies, and its CRC-32C.
#[derive(Clone, Debug, PartialEq, Eq)]
struct GroupSum {
    bytes: Range<u64>,
    crc: u32,
}

impl GroupSum {
    fn prove(&self, file: &File, path: &Path, index: usize) -> Result<()> {
        let what = format!("row group {index}");
        prove(file, path, self.bytes.clone(), self.crc, &what)
    }
}

/// What is needed to prove the row groups of a file whose tail was proven. Keeps no file open.
#[cfg(feature = "sql")]
pub(super) struct Proof {
    path: PathBuf,
    groups: Vec<GroupSum>,
}

#[cfg(feature = "sql")]
impl Proof {
    /// Number of row groups that can be proven.
    pub fn row_groups(&self) -> usize {
        self.groups.len()
    }

    /// Whether a row group has bytes in `range`.
    pub fn overlaps(&self, group: usize, range: &Range<u64>) -> bool {
        self.groups
            .get(group)
            .is_some_and(|group| group.bytes.start < range.end && range.start < group.bytes.end)
    }

    /// Proves the bytes of one row group.
    pub fn prove_group(&self, index: usize) -> Result<()> {
        let Some(group) = self.groups.get(index) else {
            return Ok(());
        };
        let file = File::open(&self.path).map_err(HistoryError::io("open", &self.path))?;
        group.prove(&file, &self.path, index)
    }
}

impl HistoryFile {
    /// Opens a file of `table`, proves its tail and reads its metadata.
    pub fn open(path: &Path, table: Table) -> Result<Self> {
        let file = File::open(path).map_err(HistoryError::io("open", path))?;
        let tail = tail_of(path);
        if let Some(tail) = tail {
            let length = file
                .metadata()
                .map_err(HistoryError::io("stat", path))?
                .len();
            let start = length
                .checked_sub(tail.bytes)
                .ok_or_else(|| HistoryError::damaged(path, "it is cut short"))?;
            prove(&file, path, start..length, tail.crc, "the footer")?;
        }
        let options = ArrowReaderOptions::new().with_page_index_policy(PageIndexPolicy::Optional);
        let metadata = contained(|| ArrowReaderMetadata::load(&file, options))
            .map_err(HistoryError::undecodable(path))?
            .map_err(HistoryError::parquet(path))?;
        let pairs = metadata
            .metadata()
            .file_metadata()
            .key_value_metadata()
            .cloned();
        let value = |key: &str| {
            let mut pairs = pairs.iter().flatten();
            pairs
                .find(|pair| pair.key == key)
                .and_then(|pair| pair.value.clone())
        };
        let number = |key| value(key).and_then(|text| text.parse().ok()).unwrap_or(0);
        let losses = Losses {
            dropped_events: number(key::DROPPED_EVENTS),
            dropped_rows: number(key::DROPPED_ROWS),
        };
        if let Some(found) = value(key::TABLE).filter(|found| found != table.name()) {
            let reason = format!("it holds table {found}, and lies with {table}");
            return Err(HistoryError::damaged(path, reason));
        }
        let version = value(key::VERSION)
            .ok_or_else(|| HistoryError::damaged(path, "it has no soe.schema_version"))?;
        if !matches!(version.parse(), Ok(number @ 1..) if number <= table.version()) {
            return Err(HistoryError::Version {
                path: path.to_owned(),
                table: table.name(),
                found: version,
                supported: table.version(),
            });
        }
        let mut opened = Self {
            path: path.to_owned(),
            file,
            metadata,
            losses,
            groups: Vec::new(),
            foreign: tail.is_none(),
        };
        if let Some(groups) = value(key::ROW_GROUPS).or(tail.map(|_| String::new())) {
            opened.groups = parse_groups(&groups)
                .filter(|groups| groups.len() == opened.row_groups())
                .ok_or_else(|| HistoryError::damaged(path, "soe.row_groups is not readable"))?;
        }
        Ok(opened)
    }

    /// Number of row groups.
    pub fn row_groups(&self) -> usize {
        self.metadata.metadata().num_row_groups()
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        usize::try_from(self.metadata.metadata().file_metadata().num_rows()).unwrap_or(0)
    }

    /// Proves the bytes of one row group; where nothing vouches for them, that they can be decoded.
    pub fn prove_group(&self, index: usize) -> Result<()> {
        if let Some(group) = self.groups.get(index) {
            group.prove(&self.file, &self.path, index)?;
        }
        if self.foreign {
            self.decode_group(index)?;
        }
        Ok(())
    }

    /// Decodes a row group and throws it away.
    fn decode_group(&self, index: usize) -> Result<()> {
        let file = self
            .file
            .try_clone()
            .map_err(HistoryError::io("duplicate descriptor of", &self.path))?;
        let decoded = contained(|| {
            let batches =
                ParquetRecordBatchReaderBuilder::new_with_metadata(file, self.metadata.clone())
                    .with_row_groups(vec![index])
                    .build()?;
            for batch in batches {
                batch.map_err(parquet::errors::ParquetError::from)?;
            }
            Ok(())
        });
        decoded
            .map_err(HistoryError::undecodable(&self.path))?
            .map_err(HistoryError::parquet(&self.path))
    }

    /// What proves the row groups later; a file that nothing vouches for is decoded here and now.
    #[cfg(feature = "sql")]
    pub fn into_proof(self) -> Result<Proof> {
        if self.foreign {
            (0..self.row_groups()).try_for_each(|group| self.prove_group(group))?;
        }
        Ok(Proof {
            path: self.path,
            groups: self.groups,
        })
    }

    /// The columns of the file.
    pub fn schema(&self) -> Arc<arrow::datatypes::Schema> {
        self.metadata.schema().clone()
    }
}

/// Reads an opened file at absolute positions, so that many row groups of it can be read at the same
/// time through one descriptor.
#[derive(Clone)]
pub(super) struct Positioned {
    pub file: Arc<HistoryFile>,
    at: u64,
}

impl Positioned {
    pub fn new(file: Arc<HistoryFile>) -> Self {
        Self { file, at: 0 }
    }
}

impl io::Read for Positioned {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.file.file.read_at(buf, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Length for Positioned {
    fn len(&self) -> u64 {
        self.file
            .file
            .metadata()
            .map_or(0, |metadata| metadata.len())
    }
}

impl ChunkReader for Positioned {
    type T = io::BufReader<Self>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        Ok(io::BufReader::new(Self {
            file: self.file.clone(),
            at: start,
        }))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let mut buffer = vec![0; length];
        self.file.file.read_exact_at(&mut buffer, start)?;
        Ok(buffer.into())
    }
}

/// Proves that `range` of a file has the checksum `expected`.
fn prove(file: &File, path: &Path, range: Range<u64>, expected: u32, what: &str) -> Result<()> {
    let mut buffer = vec![0; 256 * 1024];
    let (mut at, mut crc) = (range.start, 0);
    while at < range.end {
        let want = usize::try_from(range.end - at)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let piece = buffer.get_mut(..want).unwrap_or_default();
        let read = file
            .read_at(piece, at)
            .map_err(HistoryError::io("read", path))?;
        if read == 0 {
            return Err(HistoryError::damaged(path, format!("{what} is cut short")));
        }
        crc = crc32c::crc32c_append(crc, piece.get(..read).unwrap_or_default());
        at += read as u64;
    }
    if crc != expected {
        return Err(HistoryError::damaged(
            path,
            format!("{what} does not match its checksum"),
        ));
    }
    Ok(())
}

/// The bytes after the last row group.
#[derive(Clone, Copy, Debug)]
struct Tail {
    bytes: u64,
    crc: u32,
}

/// What a file's name says of its tail; files that others put here say nothing.
fn tail_of(path: &Path) -> Option<Tail> {
    let name = path.file_name()?.to_str()?;
    let mut parts = name
        .strip_prefix("part-")?
        .strip_suffix(SUFFIX)?
        .rsplit('-');
    let crc = u32::from_str_radix(parts.next().filter(|crc| crc.len() == 8)?, 16).ok()?;
    let bytes = u64::from_str_radix(parts.next()?, 16).ok()?;
    Some(Tail { bytes, crc })
}

fn parse_groups(text: &str) -> Option<Vec<GroupSum>> {
    let mut start = 0;
    let mut groups = Vec::new();
    for group in text.split(',').filter(|group| !group.is_empty()) {
        let (end, crc) = group.split_once(':')?;
        let end = end.parse().ok().filter(|&end: &u64| end >= start)?;
        groups.push(GroupSum {
            bytes: start..end,
            crc: u32::from_str_radix(crc, 16).ok()?,
        });
        start = end;
    }
    Some(groups)
}
