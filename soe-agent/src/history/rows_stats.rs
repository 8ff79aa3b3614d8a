//! The columns of `volume_stats`, `region_heat`, `io_trace` and `app_stats`.

use std::str::FromStr;

use arrow::array::RecordBatch;

use super::columns::{BatchBuilder, BatchReader};
use super::error::{HistoryError, Result};
use super::table::{Table, TableRow};
use crate::seam::UnixNanos;
use crate::window::{
    AppStatsRow, DirectionStats, IoOp, IoRecord, LatencySummary, Name, QueueDepth, RegionHeatRow,
    VolumeWindow,
};

/// Names repeat from row to row: this keeps one copy for each run.
#[derive(Default)]
pub(super) struct Interner(Name);

impl Interner {
    pub fn name(&mut self, text: &str) -> Name {
        if &*self.0 != text {
            self.0 = text.into();
        }
        self.0.clone()
    }
}

fn direction<'a>(
    builder: BatchBuilder,
    prefix: &str,
    rows: &[&'a VolumeWindow],
    of: fn(&'a VolumeWindow) -> &'a DirectionStats,
) -> BatchBuilder {
    let latency = |pick: fn(&LatencySummary) -> u64| {
        rows.iter()
            .map(move |row| of(row).latency.as_ref().map(pick))
    };
    let name = |suffix: &str| format!("{prefix}_{suffix}");
    builder
        .opt_count(&name("ops"), rows.iter().map(|row| of(row).ops))
        .opt_count(&name("bytes"), rows.iter().map(|row| of(row).bytes))
        .opt_count(&name("latency_p50"), latency(|l| l.p50))
        .opt_count(&name("latency_p90"), latency(|l| l.p90))
        .opt_count(&name("latency_p99"), latency(|l| l.p99))
        .opt_count(&name("latency_p999"), latency(|l| l.p999))
        .opt_count(&name("latency_max"), latency(|l| l.max))
        .histogram(
            &name("latency_histogram"),
            rows.iter().map(|row| &of(row).histogram),
        )
}

fn read_direction(
    reader: &BatchReader<'_>,
    prefix: &str,
    rows: usize,
) -> Result<Vec<DirectionStats>> {
    let column = |suffix: &str| reader.opt_counts(&format!("{prefix}_{suffix}"));
    let (ops, bytes) = (column("ops")?, column("bytes")?);
    let (p50, p90) = (column("latency_p50")?, column("latency_p90")?);
    let (p99, p999) = (column("latency_p99")?, column("latency_p999")?);
    let max = column("latency_max")?;
    let histogram = format!("{prefix}_latency_histogram");
    let latency = |row| {
        Some(LatencySummary {
            p50: p50.count(row)?,
            p90: p90.count(row)?,
            p99: p99.count(row)?,
            p999: p999.count(row)?,
            max: max.count(row)?,
        })
    };
    (0..rows)
        .map(|row| {
            Ok(DirectionStats {
                ops: ops.count(row),
                bytes: bytes.count(row),
                latency: latency(row),
                histogram: reader.histogram(&histogram, row)?,
            })
        })
        .collect()
}

impl TableRow for VolumeWindow {
    const TABLE: Table = Table::VolumeStats;
    const BULKY: &'static [&'static str] = &["read_latency_histogram", "write_latency_histogram"];

    fn ts(&self) -> UnixNanos {
        self.start
    }

    fn to_batch(rows: &[&Self]) -> Result<RecordBatch> {
        let builder = BatchBuilder::default()
            .micros("ts", rows.iter().map(|row| row.start))
            .millis("interval_ms", rows.iter().map(|row| row.interval))
            .text("host", rows.iter().map(|row| &*row.host))
            .text("volume", rows.iter().map(|row| &*row.volume))
            .text("device_id", rows.iter().map(|row| &*row.device_id));
        let builder = direction(builder, "read", rows, |row| &row.read);
        direction(builder, "write", rows, |row| &row.write)
            .opt_count("discard_ops", rows.iter().map(|row| row.discard_ops))
            .opt_count("discard_bytes", rows.iter().map(|row| row.discard_bytes))
            .opt_count("flush_ops", rows.iter().map(|row| row.flush_ops))
            .opt_number(
                "queue_depth",
                rows.iter().map(|row| row.queue_depth.map(|q| q.mean)),
            )
            .opt_count(
                "queue_depth_max",
                rows.iter().map(|row| row.queue_depth.map(|q| q.max)),
            )
            .opt_number(
                "sequential_share",
                rows.iter().map(|row| row.sequential_share),
            )
            .opt_count(
                "seek_distance_p50",
                rows.iter().map(|row| row.seek_distance_p50),
            )
            .opt_count("unique_regions", rows.iter().map(|row| row.unique_regions))
            .opt_number("reread_share", rows.iter().map(|row| row.reread_share))
            .count("dropped", rows.iter().map(|row| row.dropped))
            .finish(Self::TABLE.name())
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let reader = BatchReader::new(Self::TABLE, batch);
        let rows = batch.num_rows();
        let (ts, interval) = (reader.times("ts")?, reader.counts("interval_ms")?);
        let (host, volume) = (reader.text("host")?, reader.text("volume")?);
        let device_id = reader.text("device_id")?;
        let mut names: [Interner; 3] = Default::default();
        let [hosts, volumes, devices] = &mut names;
        let discard_ops = reader.opt_counts("discard_ops")?;
        let discard_bytes = reader.opt_counts("discard_bytes")?;
        let flush_ops = reader.opt_counts("flush_ops")?;
        let queue_depth = reader.opt_numbers("queue_depth")?;
        let queue_depth_max = reader.opt_counts("queue_depth_max")?;
        let sequential_share = reader.opt_numbers("sequential_share")?;
        let seek_distance = reader.opt_counts("seek_distance_p50")?;
        let unique_regions = reader.opt_counts("unique_regions")?;
        let reread_share = reader.opt_numbers("reread_share")?;
        let dropped = reader.counts("dropped")?;
        let reads = read_direction(&reader, "read", rows)?;
        let writes = read_direction(&reader, "write", rows)?;
        Ok(reads
            .into_iter()
            .zip(writes)
            .enumerate()
            .map(|(row, (read, write))| Self {
                start: ts.ns(row),
                interval: interval.millis_ns(row),
                host: hosts.name(host.value(row)),
                volume: volumes.name(volume.value(row)),
                device_id: devices.name(device_id.value(row)),
                read,
                write,
                discard_ops: discard_ops.count(row),
                discard_bytes: discard_bytes.count(row),
                flush_ops: flush_ops.count(row),
                queue_depth: queue_depth.at(row).map(|mean| QueueDepth {
                    mean,
                    max: queue_depth_max.count(row).unwrap_or(mean.ceil() as u64),
                }),
                sequential_share: sequential_share.at(row),
                seek_distance_p50: seek_distance.count(row),
                unique_regions: unique_regions.count(row),
                reread_share: reread_share.at(row),
                dropped: dropped.at(row),
            })
            .collect())
    }
}

impl TableRow for RegionHeatRow {
    const TABLE: Table = Table::RegionHeat;

    fn ts(&self) -> UnixNanos {
        self.ts
    }

    fn to_batch(rows: &[&Self]) -> Result<RecordBatch> {
        BatchBuilder::default()
            .micros("ts", rows.iter().map(|row| row.ts))
            .millis("interval_ms", rows.iter().map(|row| row.interval))
            .text("volume", rows.iter().map(|row| &*row.volume))
            .count("region", rows.iter().map(|row| row.region))
            .count("read_ops", rows.iter().map(|row| row.read_ops))
            .count("write_ops", rows.iter().map(|row| row.write_ops))
            .finish(Self::TABLE.name())
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let reader = BatchReader::new(Self::TABLE, batch);
        let (ts, interval) = (reader.times("ts")?, reader.counts("interval_ms")?);
        let (volume, region) = (reader.text("volume")?, reader.counts("region")?);
        let (read_ops, write_ops) = (reader.counts("read_ops")?, reader.counts("write_ops")?);
        let mut volumes = Interner::default();
        Ok((0..batch.num_rows())
            .map(|row| Self {
                ts: ts.ns(row),
                interval: interval.millis_ns(row),
                volume: volumes.name(volume.value(row)),
                region: region.at(row),
                read_ops: read_ops.at(row),
                write_ops: write_ops.at(row),
            })
            .collect())
    }
}

impl TableRow for IoRecord {
    const TABLE: Table = Table::IoTrace;

    fn ts(&self) -> UnixNanos {
        self.ts
    }

    fn to_batch(rows: &[&Self]) -> Result<RecordBatch> {
        BatchBuilder::default()
            .nanos("ts", rows.iter().map(|row| row.ts))
            .text("volume", rows.iter().map(|row| &*row.volume))
            .text("op", rows.iter().map(|row| row.op.as_str()))
            .count("offset", rows.iter().map(|row| row.offset))
            .count("length", rows.iter().map(|row| row.length))
            .opt_count("latency", rows.iter().map(|row| row.latency))
            .opt_text("cgroup", rows.iter().map(|row| row.cgroup.as_deref()))
            .opt_count("pid", rows.iter().map(|row| row.pid.map(u64::from)))
            .opt_text("comm", rows.iter().map(|row| row.comm.as_deref()))
            .count(
                "sample_weight",
                rows.iter().map(|row| u64::from(row.sample_weight)),
            )
            .finish(Self::TABLE.name())
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let reader = BatchReader::new(Self::TABLE, batch);
        let (ts, volume, op) = (
            reader.times("ts")?,
            reader.text("volume")?,
            reader.text("op")?,
        );
        let (offset, length) = (reader.counts("offset")?, reader.counts("length")?);
        let (latency, cgroup) = (reader.opt_counts("latency")?, reader.opt_text("cgroup")?);
        let (pid, comm) = (reader.opt_counts("pid")?, reader.opt_text("comm")?);
        let sample_weight = reader.counts("sample_weight")?;
        let mut volumes = Interner::default();
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        (0..batch.num_rows())
            .map(|row| {
                let op = op.value(row);
                let op = IoOp::from_str(op).map_err(|()| HistoryError::Columns {
                    table: Self::TABLE.name(),
                    reason: format!("column op holds {op:?}, which is no operation"),
                })?;
                Ok(Self {
                    ts: ts.ns(row),
                    volume: volumes.name(volume.value(row)),
                    op,
                    offset: offset.at(row),
                    length: length.at(row),
                    latency: latency.count(row),
                    cgroup: cgroup.name(row),
                    pid: pid.count(row).map(narrow),
                    comm: comm.name(row),
                    sample_weight: narrow(sample_weight.at(row)),
                })
            })
            .collect()
    }
}

impl TableRow for AppStatsRow {
    const TABLE: Table = Table::AppStats;

    fn ts(&self) -> UnixNanos {
        self.ts
    }

    fn to_batch(rows: &[&Self]) -> Result<RecordBatch> {
        BatchBuilder::default()
            .micros("ts", rows.iter().map(|row| row.ts))
            .millis("interval_ms", rows.iter().map(|row| row.interval))
            .text("volume", rows.iter().map(|row| &*row.volume))
            .text("cgroup", rows.iter().map(|row| &*row.cgroup))
            .opt_text("app", rows.iter().map(|row| row.app.as_deref()))
            .opt_text("unit", rows.iter().map(|row| row.unit.as_deref()))
            .opt_text("container", rows.iter().map(|row| row.container.as_deref()))
            .count("read_ops", rows.iter().map(|row| row.read_ops))
            .count("write_ops", rows.iter().map(|row| row.write_ops))
            .count("read_bytes", rows.iter().map(|row| row.read_bytes))
            .count("write_bytes", rows.iter().map(|row| row.write_bytes))
            .count(
                "bytes",
                rows.iter()
                    .map(|row| row.read_bytes.saturating_add(row.write_bytes)),
            )
            .finish(Self::TABLE.name())
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let reader = BatchReader::new(Self::TABLE, batch);
        let (ts, interval) = (reader.times("ts")?, reader.counts("interval_ms")?);
        let (volume, cgroup) = (reader.text("volume")?, reader.text("cgroup")?);
        let (app, unit) = (reader.opt_text("app")?, reader.opt_text("unit")?);
        let container = reader.opt_text("container")?;
        let (read_ops, write_ops) = (reader.counts("read_ops")?, reader.counts("write_ops")?);
        let read_bytes = reader.counts("read_bytes")?;
        let write_bytes = reader.counts("write_bytes")?;
        let mut volumes = Interner::default();
        Ok((0..batch.num_rows())
            .map(|row| Self {
                ts: ts.ns(row),
                interval: interval.millis_ns(row),
                volume: volumes.name(volume.value(row)),
                cgroup: cgroup.value(row).into(),
                app: app.name(row),
                unit: unit.name(row),
                container: container.name(row),
                read_ops: read_ops.at(row),
                write_ops: write_ops.at(row),
                read_bytes: read_bytes.at(row),
                write_bytes: write_bytes.at(row),
            })
            .collect())
    }
}
