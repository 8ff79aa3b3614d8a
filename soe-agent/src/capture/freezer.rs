//! The seam to whatever holds writers back.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Freezes the filesystems on a group's volumes, all of them or none.
pub trait VolumeFreezer: Send + Sync {
    /// Writes out what is dirty, so that a freeze has little to do. Writers are not held.
    fn flush(&self) -> Result<(), FreezeError>;
    /// How long the freezing itself is expected to take.
    fn freeze_estimate(&self) -> Duration;
    /// How long the thawing is expected to take; writers are held until it is done.
    fn thaw_estimate(&self) -> Duration;
    /// Whether volume number `volume` of the group is under one of the filesystems.
    fn covers(&self, volume: usize) -> bool;
    /// Freezes. Writers are held from here until the hold is thawed or dropped. At the latest `limit`
    /// after this call thawing begins, whether or not everything was frozen by then (the guard does
    /// that at the deadline, and when this process dies).
    fn freeze(&self, limit: Duration) -> Result<Box<dyn Hold + '_>, FreezeError>;
}

/// Frozen filesystems. Dropping it thaws.
pub trait Hold {
    /// Thaws and says how it went.
    fn thaw(self: Box<Self>) -> Result<Thawed, FreezeError>;
}

/// How a hold ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thawed {
    /// From the start of the first freeze call to the end of the last thaw.
    pub pause: Duration,
    /// Whether everything was still frozen when the thaw was asked for: neither the deadline nor
    /// somebody else had come first.
    pub intact: bool,
}

/// Why filesystems could not be frozen, or not be thawed.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// Somebody else froze it; it is theirs to thaw.
    #[error(
        "{mount} is already frozen by somebody else; it was left as it is (fsfreeze --unfreeze {mount} when nobody owns that freeze)"
    )]
    AlreadyFrozen {
        /// Where it is mounted.
        mount: PathBuf,
    },
    /// The kernel refused.
    #[error("freezing {mount}: {source}")]
    Freeze {
        /// Where it is mounted.
        mount: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel did not grant the freeze in time; nothing is held any more.
    #[error(
        "freezing {mount} took longer than the pause allows and was given up after {held:?}; try in a quieter time or allow a longer pause"
    )]
    TooSlow {
        /// Where it is mounted.
        mount: PathBuf,
        /// For how long writers were held.
        held: Duration,
    },
    /// Freezing it could block the agent itself.
    #[error(
        "refused to freeze {mount}: {path} ({role}) lies on it, so the agent would block itself; move it to another filesystem"
    )]
    Protected {
        /// Where it is mounted.
        mount: PathBuf,
        /// The path on it.
        path: PathBuf,
        /// What the agent keeps there.
        role: String,
    },
    /// One of the filesystem's devices is outside the group.
    #[error("{mount} spans devices outside the group ({device}); add them to the group")]
    SpansOutside {
        /// Where it is mounted.
        mount: PathBuf,
        /// The device.
        device: String,
    },
    /// The guard did not do its part.
    #[error("the freeze guard failed ({what}): {source}")]
    Guard {
        /// What it was asked.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Reading the mount table or the device tree failed.
    #[error("finding the filesystems on the volumes: {path}: {source}")]
    Discover {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
