//! Layers, their verification and their restore.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{named_enum, rfc3339};
use crate::seam::{GenerationEnd, UnixNanos};

named_enum! {
    /// What a layer holds.
    pub enum LayerKind {
        /// The whole volume.
        Baseline = "baseline",
        /// What changed since the layer before.
        Differential = "differential",
    }
}

named_enum! {
    /// What a layer promises.
    pub enum ConsistencyLevel {
        /// The device at one instant, as after a power cut.
        Crash = "crash",
        /// The filesystem was frozen at the cut.
        Filesystem = "filesystem",
        /// The application's hooks ran around the cut.
        Application = "application",
    }
}

named_enum! {
    /// How the cut was made.
    pub enum CutMethod {
        /// The device was proven to stand still; no write was delayed.
        Optimistic = "optimistic",
        /// The filesystem was frozen.
        Freeze = "freeze",
        /// A snapshot of the device or filesystem itself.
        Native = "native",
        /// The device-mapper device was suspended.
        Suspend = "suspend",
    }
}

/// A durable layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerInfo {
    /// Unique id.
    pub id: String,
    /// The group it belongs to.
    pub group: String,
    /// The volume it is of.
    pub volume: String,
    /// Place in the volume's chain; the first layer is 1.
    pub sequence: u64,
    /// What it holds.
    pub kind: LayerKind,
    /// What it promises.
    pub level: ConsistencyLevel,
    /// How the cut was made.
    pub method: CutMethod,
    /// How long writes were paused, microseconds.
    pub pause_us: u64,
    /// Largest distance between the cuts of the group's volumes, microseconds.
    pub skew_us: u64,
    /// Blocks it holds.
    pub changed_blocks: u64,
    /// Bytes of a block.
    pub block_size_bytes: u64,
    /// Bytes read from the volume, pre-copy passes included.
    pub bytes_read: u64,
    /// Bytes added to the store, after compression.
    pub bytes_stored: u64,
    /// When the capture began.
    #[serde(with = "rfc3339")]
    pub started_at: UnixNanos,
    /// The instant the layer shows.
    #[serde(with = "rfc3339")]
    pub cut_at: UnixNanos,
    /// When the layer was durable.
    #[serde(with = "rfc3339")]
    pub finished_at: UnixNanos,
    /// What the cut's epoch belongs to.
    pub generation: Option<Uuid>,
    /// The epoch of the cut.
    pub epoch: u64,
    /// Why everything was read, if it was.
    pub rescan_reason: Option<GenerationEnd>,
    /// Bytes of the volume at the cut.
    pub volume_bytes: u64,
    /// Root hash over the whole image at the cut, hexadecimal.
    pub state_root: Option<String>,
}

/// A layer with what only a close look needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerDetail {
    /// The layer.
    #[serde(flatten)]
    pub layer: LayerInfo,
    /// Id of the layer before it.
    pub parent: Option<String>,
    /// Root hash over this layer's own representation, hexadecimal.
    pub delta_root: Option<String>,
    /// Blocks stored as holes.
    pub zero_blocks: u64,
    /// Codec and level, such as `zstd:1`.
    pub compression: String,
    /// Files of the store that hold it.
    pub files: Vec<String>,
}

/// What verification tells as it goes. The last event is [`VerifyEvent::Summary`]; a stream that
/// ends without it did not run its course.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum VerifyEvent {
    /// How far it is.
    Progress {
        /// The layer being read.
        layer: String,
        /// Bytes checked so far, over all layers.
        bytes_checked: u64,
        /// Bytes to check, over all layers.
        bytes_total: u64,
    },
    /// Something does not match.
    Problem {
        /// The layer.
        layer: String,
        /// The volume.
        volume: String,
        /// What does not match.
        what: String,
    },
    /// The end.
    Summary {
        /// Layers checked.
        layers: u64,
        /// Blocks checked.
        blocks: u64,
        /// Bytes checked.
        bytes: u64,
        /// Problems found.
        problems: u64,
    },
}

/// Which state to restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RestorePoint {
    /// The newest layer.
    Latest,
    /// The layer with this id.
    Layer(String),
    /// The newest layer cut at or before this time.
    At(UnixNanos),
}

/// A restore to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreRequest {
    /// The group.
    pub group: String,
    /// The volume whose state is wanted.
    pub volume: String,
    /// Which state.
    pub point: RestorePoint,
    /// Absolute path of the file or block device to write.
    pub target: PathBuf,
    /// Write only what differs from the target's present content.
    pub differential: bool,
}

named_enum! {
    /// Where a restore is.
    pub enum RestorePhase {
        /// Resolving the chain.
        Planning = "planning",
        /// Writing blocks.
        Writing = "writing",
        /// Making them durable.
        Syncing = "syncing",
        /// All bytes are on the target and durable.
        Done = "done",
    }
}

/// How far a restore is. The last one has phase [`RestorePhase::Done`]; a stream that ends without
/// it did not run its course.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RestoreProgress {
    /// Where it is.
    pub phase: RestorePhase,
    /// The layer being written.
    pub layer: String,
    /// Bytes of the image.
    pub bytes_total: u64,
    /// Bytes accounted for: the sum of the four below.
    pub bytes_done: u64,
    /// Bytes written that were read from the store.
    pub bytes_written: u64,
    /// Bytes written that were taken from the staging area.
    pub bytes_from_staging: u64,
    /// Bytes the target already held.
    pub bytes_equal: u64,
    /// Bytes that are zero in the image, and were made or found zero.
    pub bytes_zeroed: u64,
}
