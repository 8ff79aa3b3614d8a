//! Pure decisions: state, forecast, SLA and budget to intents with reasons. No I/O, no clock.
//!
//! One [`Brain`](brain::Brain) owns all decision state. Events go in with the time at which they
//! are handled, commands come out; whoever carries out a command reports back with an event. The
//! service feeds it from the kernel and the clock, [`simulate`] from a recorded history and virtual
//! time: the decisions are the same because the code is.
//!
//! Invariant: nothing here reads a clock, does I/O, or draws a random number.

pub mod types;

pub mod window;

pub mod capture;

pub mod staging;

pub mod brain;

pub mod simulate;

pub mod backtest;

pub mod backtest_blocks;

pub mod staged;

pub mod summary;

pub use brain::{Brain, Predicted};
pub use types::{
    Action, CaptureHints, CaptureKind, Command, Criticality, Decision, Event, ExternalEvent,
    GroupName, GroupSpec, PlannerConfig, StagingConfig,
};
