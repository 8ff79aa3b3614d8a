//! Why a capture ended without a layer.

use std::io;
use std::time::Duration;

use super::freezer::FreezeError;
use super::sink::SinkError;
use crate::seam::{GenerationEnd, TrackError};

/// Why a capture ended without a layer. The changed blocks stay marked: the next attempt has them.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The group has no volumes.
    #[error("nothing to capture: the group has no volumes")]
    NoVolumes,
    /// The map and the reader disagree, or a size is unusable.
    #[error("cannot capture {volume}: {what}")]
    BadVolume {
        /// The volume.
        volume: String,
        /// What is wrong.
        what: String,
    },
    /// The change map failed.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// The map does not tell the whole truth; the caller ends the generation, the next layer is a rescan.
    #[error(
        "the change map of {volume} may lack changes ({reason}): its generation ends and the next layer is a rescan"
    )]
    GenerationEnds {
        /// The volume.
        volume: String,
        /// Why.
        reason: GenerationEnd,
    },
    /// The generation or the size changed while the capture ran.
    #[error(
        "{volume} became another device or changed its size during the capture; the next attempt begins anew"
    )]
    GenerationChanged {
        /// The volume.
        volume: String,
    },
    /// A mark was missed before the generation's first cut.
    #[error(
        "a completion on {volume} was missed before the first cut of its generation; capture it again"
    )]
    MissedBeforeFirstCut {
        /// The volume.
        volume: String,
    },
    /// Reading failed.
    #[error("reading {volume} for a layer failed: {source}")]
    Read {
        /// The volume.
        volume: String,
        /// Why.
        source: io::Error,
    },
    /// The layer could not be stored.
    #[error("storing the layer failed: {source}; earlier layers are intact")]
    Sink {
        /// Why.
        source: SinkError,
    },
    /// No quiet instant was found and there is nothing to freeze.
    #[error(
        "no instant without writes in {tries} tries within {elapsed:?}, and no filesystem to freeze; try in a quieter time"
    )]
    NotQuiet {
        /// Cuts tried.
        tries: u32,
        /// Time spent on them.
        elapsed: Duration,
    },
    /// A write failed and the device may still execute it.
    #[error(
        "a write to {volume} failed and its path has not settled, so no cut without a freeze is safe; try again when it has"
    )]
    PathUnsettled {
        /// The volume.
        volume: String,
    },
    /// The volume is written as fast as it is copied.
    #[error(
        "copying does not converge: {residual} bytes are left after {passes} passes, a pause of at most {budget:?} cannot take them; wait for a quiet window or allow a longer pause"
    )]
    NotConverging {
        /// Passes made.
        passes: u32,
        /// Bytes left.
        residual: u64,
        /// The pause budget.
        budget: Duration,
    },
    /// Freezing and thawing alone would take longer than the pause may, as they did of late.
    #[error(
        "freezing was not begun: it is expected to take {expected:?}, as it did of late, and a pause may last {budget:?}; wait for a quieter time or allow a longer pause"
    )]
    FreezeTooLong {
        /// What freezing and thawing are expected to take.
        expected: Duration,
        /// The pause budget.
        budget: Duration,
    },
    /// The filesystems could not be frozen.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// The device moved although its filesystems were frozen, or the deadline came first.
    #[error("no cut in {tries} freezes: {why}")]
    FrozenButMoving {
        /// Freezes made.
        tries: u32,
        /// What was seen last.
        why: String,
    },
    /// The pace said stop.
    #[error("the capture was cancelled")]
    Cancelled,
}

impl CaptureError {
    /// Whether the same request may succeed later without anything being mended.
    pub fn retryable(&self) -> bool {
        matches!(
            self,
            Self::MissedBeforeFirstCut { .. }
                | Self::GenerationChanged { .. }
                | Self::GenerationEnds { .. }
                | Self::NotQuiet { .. }
                | Self::PathUnsettled { .. }
                | Self::NotConverging { .. }
                | Self::FreezeTooLong { .. }
                | Self::FrozenButMoving { .. }
                | Self::Cancelled
        )
    }
}
