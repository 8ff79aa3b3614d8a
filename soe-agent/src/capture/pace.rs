//! Paces of a capture's own.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::seam::{Clock, Pace};

/// Holds nothing back, but can still be cancelled.
pub(super) struct Eager<'a>(pub(super) &'a dyn Pace);

impl Pace for Eager<'_> {
    fn before(&self, _bytes: u64) -> io::Result<()> {
        self.0.before(0)
    }
}

/// Ends reads once the pause is over.
pub(super) struct DeadlinePace<'a> {
    pub(super) clock: &'a dyn Clock,
    pub(super) until: Duration,
}

impl Pace for DeadlinePace<'_> {
    fn before(&self, _bytes: u64) -> io::Result<()> {
        if self.clock.monotonic() < self.until {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, PauseOver))
    }
}

/// Tells the end of a pause from a device that timed out.
#[derive(Debug, thiserror::Error)]
#[error("the pause budget ran out")]
struct PauseOver;

/// Whether a read ended because of a [`DeadlinePace`].
pub(super) fn pause_is_over(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<PauseOver>())
}

/// Measures how long another pace held the reads back, so that bandwidth is not mistaken for budget.
pub(super) struct TimedPace<'a> {
    inner: &'a dyn Pace,
    clock: &'a dyn Clock,
    waited_ns: AtomicU64,
}

impl<'a> TimedPace<'a> {
    pub(super) fn new(inner: &'a dyn Pace, clock: &'a dyn Clock) -> Self {
        Self {
            inner,
            clock,
            waited_ns: AtomicU64::new(0),
        }
    }

    /// Time spent waiting so far.
    pub(super) fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited_ns.load(Ordering::Relaxed))
    }
}

impl Pace for TimedPace<'_> {
    fn before(&self, bytes: u64) -> io::Result<()> {
        let began = self.clock.monotonic();
        let result = self.inner.before(bytes);
        let waited = (self.clock.monotonic() - began).as_nanos() as u64;
        self.waited_ns.fetch_add(waited, Ordering::Relaxed);
        result
    }
}
