//! Budgets of CPU, memory, I/O and space, and the foreground-latency guard.

pub mod guard;

pub use guard::{GuardLimits, LatencyGuard, LatencyProbe};
