//! The rows of the history's tables.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::histogram::{LatencySummary, LogHistogram};
use crate::seam::UnixNanos;

/// A name shared by many rows.
pub type Name = Arc<str>;

/// What a request asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IoOp {
    /// Data from the device.
    Read,
    /// Data to the device.
    Write,
    /// The range's content is no longer needed.
    Discard,
    /// The range shall read as zeroes.
    WriteZeroes,
    /// The range shall be unrecoverable.
    SecureErase,
    /// The device's cache shall be made durable.
    Flush,
}

/// How a request is counted: like the kernel's own statistics, zeroing is a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoClass {
    /// Counted as a read.
    Read,
    /// Counted as a write.
    Write,
    /// Counted as a discard.
    Discard,
    /// Counted as a flush.
    Flush,
}

impl IoOp {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Read,
        Self::Write,
        Self::Discard,
        Self::WriteZeroes,
        Self::SecureErase,
        Self::Flush,
    ];

    /// The name in tables and traces.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Discard => "discard",
            Self::WriteZeroes => "write_zeroes",
            Self::SecureErase => "secure_erase",
            Self::Flush => "flush",
        }
    }

    /// How it is counted.
    pub const fn class(self) -> IoClass {
        match self {
            Self::Read => IoClass::Read,
            Self::Write | Self::WriteZeroes => IoClass::Write,
            Self::Discard | Self::SecureErase => IoClass::Discard,
            Self::Flush => IoClass::Flush,
        }
    }
}

impl fmt::Display for IoOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for IoOp {
    type Err = ();

    /// Accepts the names, and their first letters as block traces use them (`R`, `W`, `D`, `F`).
    fn from_str(text: &str) -> Result<Self, ()> {
        let is = |name: &str| text.eq_ignore_ascii_case(name);
        if let Some(op) = Self::ALL.into_iter().find(|op| is(op.as_str())) {
            return Ok(op);
        }
        match text {
            "r" | "R" => Ok(Self::Read),
            "w" | "W" => Ok(Self::Write),
            "d" | "D" => Ok(Self::Discard),
            "f" | "F" => Ok(Self::Flush),
            _ => Err(()),
        }
    }
}

/// One direction's share of a window.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DirectionStats {
    /// Requests completed.
    pub ops: Option<u64>,
    /// Bytes moved.
    pub bytes: Option<u64>,
    /// Quantiles of the latency; `None` when nothing was measured.
    pub latency: Option<LatencySummary>,
    /// The latencies themselves, ns. Empty when nothing was measured, or when a reader left it out.
    pub histogram: LogHistogram,
}

impl DirectionStats {
    /// Counts with their latencies. `max_ns` is the exact maximum where it is known.
    pub fn measured(ops: u64, bytes: u64, histogram: LogHistogram, max_ns: Option<u64>) -> Self {
        Self {
            ops: Some(ops),
            bytes: Some(bytes),
            latency: histogram.summary(max_ns),
            histogram,
        }
    }
}

/// Requests at the device at the same time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct QueueDepth {
    /// Mean over time.
    pub mean: f64,
    /// The most at once.
    pub max: u64,
}

/// What one volume did in one interval: a row of `volume_stats`.
#[derive(Clone, Debug, PartialEq)]
pub struct VolumeWindow {
    /// Where the interval begins.
    pub start: UnixNanos,
    /// The length of the interval in ns; 1 s for the agent's own windows.
    pub interval: i64,
    /// The host that saw it; empty for imported traces.
    pub host: Name,
    /// The volume's name.
    pub volume: Name,
    /// The identity behind the name; empty when unknown.
    pub device_id: Name,
    /// Reads.
    pub read: DirectionStats,
    /// Writes, zeroing among them.
    pub write: DirectionStats,
    /// Discards.
    pub discard_ops: Option<u64>,
    /// Bytes discarded.
    pub discard_bytes: Option<u64>,
    /// Flushes.
    pub flush_ops: Option<u64>,
    /// Requests at the device.
    pub queue_depth: Option<QueueDepth>,
    /// Share of reads and writes that continue one of the last streams, 0 to 1; `None` when idle.
    pub sequential_share: Option<f64>,
    /// Median distance between the end of one read or write and the start of the next, in bytes.
    pub seek_distance_p50: Option<u64>,
    /// Different regions of 1 MiB touched by reads and writes.
    pub unique_regions: Option<u64>,
    /// Share of reads of a block that was read shortly before, 0 to 1; `None` without reads.
    pub reread_share: Option<f64>,
    /// Events of this interval that were lost, and so are in none of the figures.
    pub dropped: u64,
}

impl VolumeWindow {
    /// A window in which nothing is known.
    pub fn unknown(start: UnixNanos, interval: i64, volume: Name) -> Self {
        Self {
            start,
            interval,
            host: Name::default(),
            volume,
            device_id: Name::default(),
            read: DirectionStats::default(),
            write: DirectionStats::default(),
            discard_ops: None,
            discard_bytes: None,
            flush_ops: None,
            queue_depth: None,
            sequential_share: None,
            seek_distance_p50: None,
            unique_regions: None,
            reread_share: None,
            dropped: 0,
        }
    }

    /// The first instant after the window.
    pub fn end(&self) -> UnixNanos {
        self.start.saturating_add(self.interval)
    }
}

/// How often one region was touched in one interval: a row of `region_heat`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionHeatRow {
    /// Where the interval begins.
    pub ts: UnixNanos,
    /// The length of the interval in ns; 1 min for the agent's own rows.
    pub interval: i64,
    /// The volume's name.
    pub volume: Name,
    /// Index of the region of 1 MiB, from the volume's start.
    pub region: u64,
    /// Reads that touched it.
    pub read_ops: u64,
    /// Writes that touched it.
    pub write_ops: u64,
}

/// One request: a row of `io_trace`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoRecord {
    /// When the request came to the device.
    pub ts: UnixNanos,
    /// The volume's name.
    pub volume: Name,
    /// What it asked for.
    pub op: IoOp,
    /// First byte, from the volume's start.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Time to completion in ns, where it is known.
    pub latency: Option<u64>,
    /// The control group that is charged.
    pub cgroup: Option<Name>,
    /// The process; for writeback a kernel thread.
    pub pid: Option<u32>,
    /// The name of the thread.
    pub comm: Option<Name>,
    /// How many requests this one stands for: 1 unless sampled.
    pub sample_weight: u32,
}

/// What one control group did on one volume in one interval: a row of `app_stats`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppStatsRow {
    /// Where the interval begins.
    pub ts: UnixNanos,
    /// The length of the interval in ns.
    pub interval: i64,
    /// The volume's name.
    pub volume: Name,
    /// Path of the control group.
    pub cgroup: Name,
    /// Application type, from host metadata.
    pub app: Option<Name>,
    /// The service manager's unit.
    pub unit: Option<Name>,
    /// The container.
    pub container: Option<Name>,
    /// Reads.
    pub read_ops: u64,
    /// Writes.
    pub write_ops: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
}

/// One event from outside, with the names of CloudEvents 1.0: a row of `events`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventRow {
    /// When it happened (`time`), or when it came if the producer did not say.
    pub ts: UnixNanos,
    /// When it came.
    pub received: UnixNanos,
    /// When the change of load that it announces is expected; `None` when it announces none.
    pub expected: Option<UnixNanos>,
    /// With `source`, unique.
    pub id: String,
    /// Who says so.
    pub source: String,
    /// What kind of event.
    pub kind: String,
    /// What it is about.
    pub subject: Option<String>,
    /// The volumes it concerns.
    pub volumes: Vec<Name>,
    /// Media type of the data.
    pub data_content_type: Option<String>,
    /// The data as text (JSON as it came, binary as base64).
    pub data: Option<String>,
}

/// One layer that was captured, or could not be: a row of `layers`.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerRow {
    /// When the capture ended.
    pub ts: UnixNanos,
    /// When it began.
    pub started: UnixNanos,
    /// The snapshot group.
    pub group: Name,
    /// The volume's name.
    pub volume: Name,
    /// The layer's identifier.
    pub layer: String,
    /// Place in its chain, from 0.
    pub sequence: u64,
    /// `baseline` or `differential`.
    pub kind: String,
    /// `application`, `filesystem` or `crash`.
    pub level: String,
    /// `optimistic`, `freeze`, `native` or `suspend`.
    pub method: String,
    /// Generation of the change map.
    pub generation: String,
    /// Epoch the cut began.
    pub epoch: u64,
    /// The measured pause in microseconds.
    pub pause_us: u64,
    /// Blocks that had changed.
    pub changed_blocks: u64,
    /// Bytes read from the volume.
    pub bytes_read: u64,
    /// Bytes added to the store.
    pub bytes_stored: u64,
    /// Why it failed; `None` when it is durable.
    pub error: Option<String>,
}

/// One decision: a row of `decisions`.
#[derive(Clone, Debug, PartialEq)]
pub struct DecisionRow {
    /// When it was taken; nothing later entered it.
    pub ts: UnixNanos,
    /// The snapshot group, where there is one.
    pub group: Option<Name>,
    /// The volume's name.
    pub volume: Name,
    /// `capture`, `stage` or `wait`.
    pub action: String,
    /// The window the action is meant for.
    pub window_start: Option<UnixNanos>,
    /// Its end.
    pub window_end: Option<UnixNanos>,
    /// Why, in one sentence.
    pub reason: String,
}

/// One forecast of one bin: a row of `forecasts`.
#[derive(Clone, Debug, PartialEq)]
pub struct ForecastRow {
    /// When it was issued: the end of the last bin known.
    pub issued: UnixNanos,
    /// The volume's name.
    pub volume: Name,
    /// The bin it is about.
    pub target_start: UnixNanos,
    /// Its end.
    pub target_end: UnixNanos,
    /// What is forecast, for example `bytes_per_second`.
    pub metric: Name,
    /// Quantile 0.1.
    pub q10: f64,
    /// Median.
    pub q50: f64,
    /// Quantile 0.8.
    pub q80: f64,
    /// Quantile 0.9.
    pub q90: f64,
    /// Quantile 0.95.
    pub q95: f64,
    /// Quantile 0.99.
    pub q99: f64,
    /// Probability that a burst begins in the bin.
    pub burst_probability: Option<f64>,
    /// The forecaster that served.
    pub member: Name,
}

/// One thing that happened to one staged range: a row of `staging`.
#[derive(Clone, Debug, PartialEq)]
pub struct StagingRow {
    /// When.
    pub ts: UnixNanos,
    /// The volume's name.
    pub volume: Name,
    /// `staged`, `used`, `invalidated`, `evicted` or `wasted`.
    pub action: Name,
    /// First byte, from the volume's start.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Expected benefit when it was staged.
    pub score: Option<f64>,
    /// When it was evicted.
    pub evicted: Option<UnixNanos>,
}
