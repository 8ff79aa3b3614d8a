//! Block I/O engines: io_uring, a plain fallback, and what holds them back.

pub mod volume;

pub mod request;

pub mod buffer;

pub mod depth;

pub mod uring;

pub mod plain;

pub mod pace;

pub mod clock;

pub use clock::SystemClock;
pub use pace::PacedBy;
pub use plain::PlainReader;
pub use uring::UringReader;
pub use volume::{OpenError, VolumeSpec};

use crate::seam::BlockReader;

/// I/O priority of the agent's background reads: the idle class with data level 5. The level says
/// nothing to the scheduler in this class; it is the tag by which the kernel half knows the agent's
/// own reads.
pub const AGENT_IOPRIO: u16 = (3 << 13) | AGENT_IOPRIO_LEVEL;

/// I/O priority of reads for which writers may be waiting: best effort, because idle-class reads are
/// the last to be served exactly when the pause should end soonest; same tag.
pub const AGENT_IOPRIO_URGENT: u16 = (2 << 13) | AGENT_IOPRIO_LEVEL;

/// The data level that marks the agent's own I/O in either class.
pub const AGENT_IOPRIO_LEVEL: u16 = 5;

/// How a volume is read.
#[derive(Clone, Copy, Debug)]
pub struct ReadOptions {
    /// Requests in flight at most, 1 to 64.
    pub max_depth: u32,
    /// Bytes of a request at most; rounded down to a multiple of the unit asked for.
    pub max_request: u32,
    /// Whether writers may be waiting: best-effort class and full depth at once, instead of the idle
    /// class and a depth found by measuring.
    pub urgent: bool,
}

impl ReadOptions {
    /// For passes over a volume in use.
    pub const BACKGROUND: Self = Self {
        max_depth: 16,
        max_request: 1 << 20,
        urgent: false,
    };
    /// For what is read in a window in which nothing may move.
    pub const URGENT: Self = Self {
        max_depth: 32,
        max_request: 256 << 10,
        urgent: true,
    };

    /// The I/O priority of the requests.
    pub const fn ioprio(&self) -> u16 {
        if self.urgent {
            AGENT_IOPRIO_URGENT
        } else {
            AGENT_IOPRIO
        }
    }
}

/// Opens a volume with io_uring, or plainly where io_uring cannot be had (old kernel, seccomp,
/// locked-memory limit), which is logged with its reason.
pub fn open_reader(
    spec: &VolumeSpec,
    options: ReadOptions,
) -> Result<Box<dyn BlockReader>, OpenError> {
    match UringReader::open(spec, options) {
        Ok(reader) => Ok(Box::new(reader)),
        Err(OpenError::NoUring { reason, .. }) => {
            tracing::info!(volume = %spec.path.display(), %reason, "reading without io_uring");
            Ok(Box::new(PlainReader::open(spec, options)?))
        }
        Err(other) => Err(other),
    }
}
