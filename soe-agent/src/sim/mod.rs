//! Simulated twins of the seams and a scenario runner whose oracle knows every landed sector.
//!
//! Everything runs on one thread: whenever the code under test calls a seam, the [`world`] takes a
//! seeded number of steps (a marking program stores one stamp, a write lands one sector, a writer
//! queues its next write). So a seed fixes the interleaving, and a failure replays.

pub mod world;

pub mod map;

pub mod disk;

pub mod freezer;

pub mod sink;

pub mod scenario;

pub mod conformance;

#[cfg(test)]
mod protocol_tests;

pub use disk::{SimClock, SimReader};
pub use freezer::SimFreezer;
pub use map::SimMap;
pub use world::{Faults, Load, World};
