//! What a capture is given and what it gives back.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use soe_common::Epoch;
use uuid::Uuid;

use super::audit::AUDIT_BLOCKS;
use super::freezer::VolumeFreezer;
use crate::seam::{BlockReader, ChangeMap, Clock, Misses, Pace, UnixNanos};

/// What the manifest of a layer records of its cut. The newest *durable* one is the base of the next
/// layer; nothing else is, so that the blocks of a layer that failed are in the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutRecord {
    /// The generation the epochs belong to.
    pub generation: Uuid,
    /// The epoch that began at the cut: every later write is stamped with it or a later one.
    #[serde(with = "epoch_number")]
    pub epoch: Epoch,
    /// The next layer takes every block with a stamp of this epoch or later. It is [`epoch`](Self::epoch)
    /// itself, or that of the cut before when a write failed or a completion was missed between.
    #[serde(with = "epoch_number")]
    pub since_next: Epoch,
    /// The totals at the cut, from which the next capture counts.
    pub misses: Misses,
}

mod epoch_number {
    use serde::{Deserialize, Deserializer, Serializer};
    use soe_common::Epoch;

    pub(super) fn serialize<S: Serializer>(epoch: &Epoch, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u32(epoch.0)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Epoch, D::Error> {
        u32::deserialize(from).map(Epoch)
    }
}

/// One volume of the group.
#[derive(Clone, Copy)]
pub struct VolumeParts<'a> {
    /// Its change map.
    pub map: &'a dyn ChangeMap,
    /// Reads it in the background.
    pub reader: &'a dyn BlockReader,
    /// Reads it while writers may be waiting; may be the same reader.
    pub urgent: &'a dyn BlockReader,
    /// What the newest durable manifest of its chain says; `None` when there is no chain yet.
    pub base: Option<CutRecord>,
    /// The total of failed writes for which the path has settled since (see
    /// [`PathSettling`](super::PathSettling)). More than that forbids the optimistic cut.
    pub settled_failures: u64,
}

/// What a capture works with.
pub struct CaptureParts<'a> {
    /// The volumes, in the order in which the sink and the result number them.
    pub volumes: Vec<VolumeParts<'a>>,
    /// Time.
    pub clock: &'a dyn Clock,
    /// Holds the passes back in favour of the foreground.
    pub pace: &'a dyn Pace,
    /// Freezes the filesystems on the volumes; without one only the optimistic cut is tried.
    pub freezer: Option<&'a dyn VolumeFreezer>,
    /// Reads the volumes' residuals on one thread each. The simulation reads them in turn, so that a
    /// seed replays.
    pub parallel: bool,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct CaptureRequest {
    /// Read everything although a differential would do.
    pub baseline: bool,
    /// Limits.
    pub policy: CapturePolicy,
}

/// Limits of one capture.
#[derive(Clone, Copy, Debug)]
pub struct CapturePolicy {
    /// Whether the optimistic cut is tried at all.
    pub optimistic: bool,
    /// Optimistic cuts tried before freezing or giving up.
    pub optimistic_tries: u32,
    /// Time for the optimistic cut, from the end of the first pass.
    pub optimistic_time: Duration,
    /// Bytes an optimistic cut may leave for its window: more makes the window longer.
    pub optimistic_residual: u64,
    /// First wait between two optimistic tries; doubles up to [`backoff_max`](Self::backoff_max).
    pub backoff_min: Duration,
    /// Longest wait between two optimistic tries.
    pub backoff_max: Duration,
    /// Time for which writers may be held.
    pub pause_budget: Duration,
    /// Freezes tried before giving up.
    pub freeze_tries: u32,
    /// Bytes of residual held in memory.
    pub memory_limit: u64,
    /// Passes in a row that do not shrink by 10 % before the capture is said not to converge.
    pub stalled_passes: u32,
    /// Passes at most.
    pub max_passes: u32,
    /// Blocks of each volume that are read again after the cut and held against the layer
    /// (the module `audit`); 0 for none.
    pub audit_blocks: u32,
    /// A wrong order of the protocol, so that tests can show that it is noticed.
    #[cfg(test)]
    pub(crate) mutation: Mutation,
}

impl Default for CapturePolicy {
    fn default() -> Self {
        Self {
            optimistic: true,
            optimistic_tries: 40,
            optimistic_time: Duration::from_secs(2),
            optimistic_residual: 4 << 20,
            backoff_min: Duration::from_millis(1),
            backoff_max: Duration::from_millis(100),
            pause_budget: Duration::from_millis(100),
            freeze_tries: 3,
            memory_limit: 128 << 20,
            stalled_passes: 3,
            max_passes: 24,
            audit_blocks: AUDIT_BLOCKS,
            #[cfg(test)]
            mutation: Mutation::None,
        }
    }
}

impl CapturePolicy {
    /// Whether tests asked for this wrong order; never in a real build.
    pub(crate) fn mutated(&self, by: Mutation) -> bool {
        #[cfg(test)]
        return self.mutation == by;
        #[cfg(not(test))]
        {
            let _ = by;
            false
        }
    }
}

/// Wrong orders of the protocol. The simulation must notice every one of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code))]
pub(crate) enum Mutation {
    /// The right order.
    #[default]
    None,
    /// The first reading need not find nothing in flight.
    NoInFlightCheck,
    /// The residual is fixed before the first reading.
    ResidualBeforeCounters,
    /// The next layer takes stamps later than the cut, not from it on.
    SelectAfterCut,
    /// The filesystem is thawed before the residual is read.
    ThawBeforeRead,
    /// A pass does not wait for the marking programs that straddle its bump.
    NoGrace,
    /// The second reading is not compared.
    NoSecondReading,
    /// Volumes are cut one after the other, not in one common window.
    VolumeByVolume,
    /// Failed writes are forgotten by the next layer but one.
    ForgetFailedWrites,
    /// Passes rely on completion marks although completions were missed.
    TrustPasses,
    /// Misses of both marks are taken for harmless.
    IgnoreDoubleMiss,
}

/// How much of a volume a layer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerKind {
    /// Everything, depends on no other layer.
    Baseline,
    /// What changed since the cut before, as the change map says.
    Differential,
    /// What differs from the chain, found by reading everything.
    Rescan,
}

/// What a layer promises about its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Equals the device at one instant, as after a power cut.
    Crash,
    /// The filesystem was frozen at the cut.
    Filesystem,
    /// The application's own hooks ran around the cut.
    Application,
}

/// How the cut was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Proven from the counters, without a pause.
    Optimistic,
    /// The filesystems were frozen.
    Freeze,
}

/// One volume's part of a cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeCut {
    /// The volume's name.
    pub volume: String,
    /// Bytes of the volume at the cut.
    pub volume_bytes: u64,
    /// What kind of layer this is.
    pub kind: LayerKind,
    /// What the content promises.
    pub level: Level,
    /// The base of the next layer once this one is durable.
    pub record: CutRecord,
    /// Bytes read from the volume, repeated reads included.
    pub bytes_read: u64,
}

/// A cut through all volumes of the group at one common instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupCut {
    /// How it was made.
    pub method: Method,
    /// The volumes, in the order of [`CaptureParts::volumes`].
    pub volumes: Vec<VolumeCut>,
    /// How long writers were held at the cut, measured around the freeze and the thaw.
    pub pause: Duration,
    /// Time writers were held by freezes of this capture that did not lead to a cut.
    pub wasted_pause: Duration,
    /// Freezes of this capture that held writers for longer than the budget.
    pub budget_missed: u32,
    /// Difference between the instants of the volumes' images. Zero, because the windows in which
    /// the volumes stood still have an instant in common.
    pub skew: Duration,
    /// Length of the window in which every volume stood still.
    pub window: Duration,
    /// Wall-clock time at the start of the capture.
    pub started_at: UnixNanos,
    /// Wall-clock time inside the window.
    pub cut_at: UnixNanos,
    /// Passes made before the cut.
    pub passes: u32,
    /// Cuts tried, this one included.
    pub tries: u32,
    /// Of these, those that would have held nobody.
    pub optimistic_tries: u32,
}
