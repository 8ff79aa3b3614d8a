//! The seams: what the rooms know of each other. Every trait here has a real implementation and a
//! simulated twin (in [`crate::sim`]), and both pass the same conformance suite.

use std::fmt;
use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use soe_common::Epoch;
use uuid::Uuid;

/// A range of bytes, relative to the start of the volume it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl ByteRange {
    /// The range `[offset, offset + len)`.
    pub const fn new(offset: u64, len: u64) -> Self {
        Self { offset, len }
    }

    /// The first byte after the range.
    pub const fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// Nanoseconds since the Unix epoch, UTC.
pub type UnixNanos = i64;

/// Time, so that the simulation can bring its own.
pub trait Clock: Send + Sync {
    /// Wall-clock time. May step; used for records and calendars, never for durations.
    fn now(&self) -> UnixNanos;
    /// Monotonic time since an arbitrary start; used for every duration and deadline.
    fn monotonic(&self) -> Duration;
    /// Blocks the calling thread.
    fn sleep(&self, duration: Duration);
}

/// Times a tracking program was skipped, and other events after which the map alone does not tell
/// the whole truth. All are totals since tracking was attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Misses {
    /// Skipped runs of the queue-side marking program.
    pub queue: u64,
    /// Skipped runs of the completion-side marking programs.
    pub complete: u64,
    /// Bios whose range could not be remembered until completion (bio-based devices only).
    pub stash: u64,
    /// Write-like completions that carried an error: the device may still execute them.
    pub failed_writes: u64,
}

/// The write counters of one volume. The order in which they were read is part of the contract:
/// `completed` on all CPUs first, then `queued` on all CPUs, then `misses`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Sectors of write-like IO completed.
    pub completed: u64,
    /// Sectors of write-like IO queued.
    pub queued: u64,
    /// What was missed.
    pub misses: Misses,
}

impl Reading {
    /// Whether every write counted as queued was complete before the reading began.
    pub fn nothing_in_flight(&self) -> bool {
        self.completed == self.queued
    }
}

/// An instant at which nothing was in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rest {
    /// What was queued after it carries this epoch's stamp or a later one.
    pub epoch: Epoch,
    /// The totals at that instant.
    pub misses: Misses,
}

/// Why a generation ended, so that the next layer must be a rescan or a baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum GenerationEnd {
    /// There was no generation before this one.
    First,
    /// The host was rebooted.
    GapBoot,
    /// Tracking was detached, or both marks of a write may have been missed.
    GapMiss,
    /// The device changed its size.
    Resize,
    /// Another device, backing file or device-mapper table stands behind the same name.
    Remapped,
    /// A passthrough command may have changed blocks without a bio.
    Passthrough,
    /// The program's counters and the device's own statistics disagree.
    CounterMismatch,
    /// A block that was said to be unchanged had changed.
    AuditFail,
}

impl fmt::Display for GenerationEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::First => "FIRST",
            Self::GapBoot => "GAP_BOOT",
            Self::GapMiss => "GAP_MISS",
            Self::Resize => "RESIZE",
            Self::Remapped => "REMAPPED",
            Self::Passthrough => "PASSTHROUGH",
            Self::CounterMismatch => "COUNTER_MISMATCH",
            Self::AuditFail => "AUDIT_FAIL",
        })
    }
}

/// What may be said of a volume's change map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tracking {
    /// Every change since the generation began is in the map.
    Complete,
    /// Changes may be missing: the generation must end.
    Tainted(GenerationEnd),
    /// No program is attached.
    Detached,
}

/// Errors of a change map.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The kernel refused.
    #[error("change map of {volume}: {call}: {source}")]
    Kernel {
        /// The volume.
        volume: String,
        /// The call that failed.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Changes may be missing.
    #[error("change map of {volume} is not complete ({reason}); the next layer will be a rescan")]
    Tainted {
        /// The volume.
        volume: String,
        /// Why.
        reason: GenerationEnd,
    },
    /// The volume is gone.
    #[error("volume {volume} is gone")]
    Gone {
        /// The volume.
        volume: String,
    },
}

/// One volume's view of the change map: the whole disk's map, cut to the volume.
///
/// The protocol (docs/architecture.md, "The mark/cut protocol"):
/// [`bump`](Self::bump), [`reading`](Self::reading) with nothing in flight,
/// [`changed_since`](Self::changed_since), read the data, [`reading`](Self::reading) again with the
/// same `queued` and `misses`: then the device stood still from the first reading to the last.
pub trait ChangeMap: Send + Sync {
    /// The volume's name, for messages.
    fn volume(&self) -> &str;
    /// Bytes of the volume.
    fn volume_bytes(&self) -> u64;
    /// Bytes a stamp covers.
    fn block_size(&self) -> u32;
    /// The generation the stamps belong to.
    fn generation(&self) -> Uuid;
    /// The current epoch.
    fn epoch(&self) -> Epoch;
    /// Begins the next epoch and returns it; a full fence follows the store.
    fn bump(&self) -> Result<Epoch, TrackError>;
    /// Returns when no marking program that loaded the epoch before the last bump is still running.
    /// Takes up to tens of milliseconds: never call it inside a pause.
    fn grace(&self) -> Result<(), TrackError>;
    /// Balances the books ([`crate::books`]) if the disk is at rest: gives the counters a true base,
    /// and finds what no program saw. Where they balance already it is cheap, else it takes tens of
    /// milliseconds. Without it a reading may never say that nothing is in flight.
    fn settle(&self) -> Result<(), TrackError>;
    /// The newest rest of this generation that [`settle`](Self::settle) proved.
    fn rest(&self) -> Option<Rest>;
    /// Reads the counters in the order [`Reading`] documents. Cheap: may be called inside a pause.
    fn reading(&self) -> Result<Reading, TrackError>;
    /// The ranges with a stamp of `since` or later, ascending, disjoint, merged, cut to the volume.
    fn changed_since(&self, since: Epoch) -> Result<Vec<ByteRange>, TrackError>;
    /// Whether the map tells the whole truth.
    fn tracking(&self) -> Tracking;
}

/// What a paced I/O does between two requests.
pub trait Pace: Send + Sync {
    /// Called before `bytes` are requested; blocks as long as the budget or the foreground demands.
    /// With 0 bytes it never blocks: it only tells whether the I/O is cancelled.
    /// An error of kind [`io::ErrorKind::Interrupted`] cancels the I/O.
    fn before(&self, bytes: u64) -> io::Result<()>;
}

/// No pacing at all: used inside a pause.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unpaced;

impl Pace for Unpaced {
    fn before(&self, _bytes: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Reads one volume past the page cache.
pub trait BlockReader: Send + Sync {
    /// Bytes of the volume.
    fn len(&self) -> u64;
    /// Whether the volume has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Reads `ranges` and hands every piece to `sink` as (offset, bytes), in any order, each byte
    /// once. Pieces never straddle a multiple of `unit` bytes, and start at one unless the range
    /// does not.
    fn read(
        &self,
        ranges: &[ByteRange],
        unit: u32,
        pace: &dyn Pace,
        sink: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()>;
}

/// Writes one restore target.
pub trait BlockWriter: Send + Sync {
    /// Writes `data` at `offset`.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Makes `range` read as zeroes.
    fn zero_at(&self, range: ByteRange) -> io::Result<()>;
    /// Makes everything written so far durable.
    fn sync(&self) -> io::Result<()>;
}
