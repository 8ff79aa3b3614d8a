//! Cuts and copies: what makes a layer equal the device at one instant.
//!
//! A capture copies blocks while the volume is in use (passes), until the rest is small. Then it
//! needs an instant at which nothing moved: the [optimistic](run) way proves from the write counters
//! that the device stood still while the rest was read (no write is delayed), the freezing way makes
//! it stand still for as long as a pause budget allows.
//!
//! Invariant: a block that may have changed since its last read in an attempt is read again before
//! the cut. [`attempt`] holds the argument.
//!
//! Invariant: nothing is hashed, compressed or written inside a pause.
//!
//! Invariant: a fuzzy copy never becomes a layer; an attempt ends in a proven cut or in an error.

pub mod types;

pub mod select;

pub mod ranges;

mod volume;

mod pace;

mod audit;

pub mod attempt;

pub mod run;

pub mod sink;

pub mod freezer;

pub mod mounts;

pub mod guard;

pub mod guard_client;

mod error;

pub use audit::AUDIT_BLOCKS;
pub use error::CaptureError;
pub use freezer::{FreezeError, Hold, Thawed, VolumeFreezer};
pub use guard::guard_main;
pub use guard_client::{FreezeGuard, GuardFreezer};
pub use run::capture_group;
pub use select::PathSettling;
pub use sink::{LayerSink, SinkError, VolumePlan};
pub use types::{
    CaptureParts, CapturePolicy, CaptureRequest, CutRecord, GroupCut, LayerKind, Level, Method,
    VolumeCut, VolumeParts,
};
/// The identity of a generation.
pub use uuid::Uuid;
