//! Records every IO of one volume for a while into `io_trace`.

use std::sync::Arc;
use std::time::Duration;

use soe_common::record::{IoEvent, op};

use super::agent::{Agent, Entry, lock};
use crate::api::engine::{EngineError, ErrorKind};
use crate::api::types::{TimeWindow, TraceReport};
use crate::observe::ring::RingReader;
use crate::seam::{Clock, UnixNanos};
use crate::window::{IoOp, IoRecord};

/// Between two drains of the ring buffer: it holds some 100,000 records.
const DRAIN_EVERY: Duration = Duration::from_millis(10);
/// Longest recording.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// The kernel's monotonic clock now, in ns.
fn monotonic_ns() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

fn operation(op: u32) -> Option<IoOp> {
    Some(match op {
        op::READ => IoOp::Read,
        op::WRITE => IoOp::Write,
        op::FLUSH => IoOp::Flush,
        op::DISCARD => IoOp::Discard,
        op::SECURE_ERASE => IoOp::SecureErase,
        op::WRITE_ZEROES => IoOp::WriteZeroes,
        _ => return None,
    })
}

/// A kernel record as a row, when it is about this volume. `to_wall` is what to add to the kernel's
/// clock.
fn row(event: &IoEvent, entry: &Entry, to_wall: i64) -> Option<IoRecord> {
    let (start, end) = (entry.volume.start, entry.volume.end);
    if event.slot != entry.track.slot() || event.sector < start || event.sector >= end {
        return None;
    }
    let name = event.comm.split(|b| *b == 0).next().unwrap_or_default();
    let queued = i64::try_from(event.at.saturating_sub(event.latency)).unwrap_or(i64::MAX);
    Some(IoRecord {
        ts: queued.saturating_add(to_wall),
        volume: entry.name.as_str().into(),
        op: operation(event.op)?,
        offset: (event.sector - start) * soe_common::SECTOR_SIZE,
        length: u64::from(event.sectors) * soe_common::SECTOR_SIZE,
        latency: Some(event.latency),
        cgroup: (event.cgroup != 0).then(|| event.cgroup.to_string().into()),
        pid: Some(event.pid),
        comm: Some(String::from_utf8_lossy(name).into()),
        sample_weight: 1,
    })
}

impl Agent {
    /// Records for `duration`, or until the agent stops.
    pub(super) fn record_trace_now(
        self: &Arc<Self>,
        volume: &str,
        duration: Duration,
    ) -> Result<TraceReport, EngineError> {
        let entry = self.known(volume)?;
        if duration > LONGEST {
            return Err(EngineError::invalid("a recording lasts a day at most"));
        }
        let internal =
            |e: &dyn std::error::Error| EngineError::new(ErrorKind::Internal, e.to_string());
        let mut recording = lock(&self.recording);
        if *recording {
            return Err(EngineError::new(
                ErrorKind::Conflict,
                "another volume is being recorded; wait until it has ended",
            ));
        }
        *recording = true;
        drop(recording);
        let outcome = self.record(&entry, duration);
        entry.track.set_traced(false);
        let stopped = self.tracker.set_tracing(false);
        *lock(&self.recording) = false;
        stopped.map_err(|e| internal(&e))?;
        outcome.map_err(|e| internal(&e))
    }

    fn record(
        &self,
        entry: &Entry,
        duration: Duration,
    ) -> Result<TraceReport, super::ServiceError> {
        let ring = |source| super::ServiceError::Process {
            what: "mapping the ring buffer of records",
            source,
        };
        let mut reader = RingReader::new(self.tracker.events()).map_err(ring)?;
        // What an earlier recording left behind.
        reader.drain(&mut |_| {});
        let books = self.tracker.trace_books()?;
        let to_wall: UnixNanos = self.clock.now() - monotonic_ns();
        let started = self.clock.now();
        entry.track.set_traced(true);
        self.tracker.set_tracing(true)?;
        let began = self.clock.monotonic();
        let mut records = 0;
        let mut rows = Vec::new();
        loop {
            let ending = self.stopping() || self.clock.monotonic() - began >= duration;
            if ending {
                entry.track.set_traced(false);
                self.tracker.set_tracing(false)?;
            }
            reader.drain(&mut |event| rows.extend(row(&event, entry, to_wall)));
            records += rows.len() as u64;
            self.history.append(&rows)?;
            rows.clear();
            if ending {
                break;
            }
            self.clock.sleep(DRAIN_EVERY);
        }
        let now = self.tracker.trace_books()?;
        let dropped = now.dropped - books.dropped;
        self.history
            .note_dropped_events(crate::history::Table::IoTrace, dropped);
        self.history.flush()?;
        for (result, count) in [
            ("seen", now.written - books.written),
            ("rejected", now.unmatched - books.unmatched),
            ("dropped", dropped),
        ] {
            self.metrics.observe_events.with([result]).inc_by(count);
        }
        Ok(TraceReport {
            volume: entry.name.clone(),
            records,
            dropped,
            sampled_out: 0,
            window: TimeWindow {
                start: started,
                end: self.clock.now(),
            },
            files: vec![self.history.dir().join("io_trace").display().to_string()],
        })
    }
}
