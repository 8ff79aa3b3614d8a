//! What a watcher sees.

use serde::{Deserialize, Serialize};

use super::{Decision, Event, LayerInfo, StageReport, TrackingState, rfc3339};
use crate::seam::{GenerationEnd, UnixNanos};

/// The load of one volume over one interval.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoadSample {
    /// The volume.
    pub volume: String,
    /// Length of the interval, milliseconds.
    pub interval_ms: u64,
    /// Reads.
    pub read_ops: u64,
    /// Writes.
    pub write_ops: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// 99th percentile of the latency, microseconds; `None` without IO.
    pub p99_latency_us: Option<u64>,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum WatchEvent {
    /// An interval of a volume ended.
    Load(LoadSample),
    /// A layer became durable.
    Layer(Box<LayerInfo>),
    /// The planner decided.
    Decision {
        /// The volume.
        volume: String,
        /// What was decided.
        decision: Decision,
    },
    /// Blocks were staged or dropped.
    Staging(StageReport),
    /// An event was published.
    Published {
        /// The event.
        published: Box<Event>,
    },
    /// What may be said of a change map changed.
    Tracking {
        /// The volume.
        volume: String,
        /// What may be said now.
        tracking: TrackingState,
        /// Why the next layer must read everything, if it must.
        reason: Option<GenerationEnd>,
    },
    /// The watcher was too slow; so many items were left out.
    Missed {
        /// How many.
        items: u64,
    },
}

/// One thing that happened, and when.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WatchItem {
    /// When.
    #[serde(with = "rfc3339")]
    pub at: UnixNanos,
    /// What.
    #[serde(flatten)]
    pub event: WatchEvent,
}
