//! Volumes, their recording, and what is staged of them.

use serde::{Deserialize, Serialize};

use super::{TimeWindow, named_enum};
use crate::seam::Tracking;

named_enum! {
    /// What may be said of a volume's change map.
    pub enum TrackingState {
        /// Every change since the generation began is in the map.
        Complete = "complete",
        /// Changes may be missing; the next layer reads everything.
        Tainted = "tainted",
        /// No program is attached.
        Detached = "detached",
    }
}

impl From<Tracking> for TrackingState {
    fn from(tracking: Tracking) -> Self {
        match tracking {
            Tracking::Complete => Self::Complete,
            Tracking::Tainted(_) => Self::Tainted,
            Tracking::Detached => Self::Detached,
        }
    }
}

/// A volume that was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Path of the block device.
    pub volume: String,
    /// Identity that survives renumbering.
    pub device_id: String,
    /// `disk`, `partition`, `dm`, `md`, `loop`, `zram`, `nvme` or `other`.
    pub kind: String,
    /// Size.
    pub size_bytes: u64,
    /// Other names of the same device.
    pub aliases: Vec<String>,
    /// The devices it is made of.
    pub members: Vec<String>,
    /// Where it is mounted.
    pub mounts: Vec<String>,
    /// Whether nothing is stacked on it.
    pub leaf: bool,
    /// Whether its changes are tracked.
    pub tracked: bool,
    /// What may be said of its change map, when tracked.
    pub tracking: Option<TrackingState>,
    /// The group it belongs to.
    pub group: Option<String>,
    /// Why it cannot be tracked, if it cannot.
    pub untrackable: Option<String>,
}

/// Blocks staged of one volume.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StagingStatus {
    /// Bytes that may be staged.
    pub budget_bytes: u64,
    /// Bytes staged.
    pub staged_bytes: u64,
    /// Of them still equal to the origin.
    pub valid_bytes: u64,
    /// Of them wanted at least once: read from the area, or on the origin while they were staged.
    pub used_bytes: u64,
    /// Of those ever staged: overwritten on the origin before use.
    pub invalidated_bytes: u64,
    /// Share of the volume's reads that were of staged and valid blocks, since something of it is
    /// staged, as far as the heat of its regions tells; `None` before the first read.
    pub hit_ratio: Option<f64>,
    /// Share of the bytes chosen for the last bursts that was read in them; `None` before any.
    #[serde(default)]
    pub precision: Option<f64>,
    /// Whether bursts are not staged for because too little of it was read.
    #[serde(default)]
    pub switched_off: bool,
}

/// [`StagingStatus`] with its volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageReport {
    /// The volume.
    pub volume: String,
    /// What is staged.
    #[serde(flatten)]
    pub status: StagingStatus,
}

/// A recording of single IOs that has ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceReport {
    /// The volume.
    pub volume: String,
    /// Records written.
    pub records: u64,
    /// Records lost because the buffer was full.
    pub dropped: u64,
    /// IOs left out by sampling; the records' weights make up for them.
    pub sampled_out: u64,
    /// What the recording covers.
    pub window: TimeWindow,
    /// The history's files that hold it.
    pub files: Vec<String>,
}
