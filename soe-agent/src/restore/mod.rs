//! Restore plans and the jobs that carry them out.
//!
//! A plan is pure: it orders the blocks of a merged index, newest differential first, baseline
//! last, each block once. A job carries it out on a [`Target`], checks every block's hash before it
//! is written and takes it from staging where staging has the same content. A restore that was
//! interrupted is resumed by running it again with [`Mode::Differential`]: what was written already
//! is then recognised by its hash and left alone.

mod error;

mod plan;

mod held;

mod target;

mod job;

#[cfg(test)]
mod tests;

pub use error::RestoreError;
pub use held::{HeldBy, device_in_use};
pub use job::{Mode, NoStaging, Progress, RestoreStats, StagedBlocks, restore};
pub use plan::{LayerSteps, Plan, Step, plan};
pub use target::{DeviceTarget, FileTarget, Target};
