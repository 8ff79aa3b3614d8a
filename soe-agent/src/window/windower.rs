//! Requests into windows.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashSet};

use super::histogram::LogHistogram;
use super::locality::{Rereads, SequentialStreams};
use super::rows::{DirectionStats, IoClass, IoRecord, Name, QueueDepth, VolumeWindow};
use super::{REGION_BYTES, SECOND_NS, floor_to};
use crate::seam::UnixNanos;

/// Distances are counted in sectors, so that the histogram reaches past 100 TB.
const SEEK_UNIT: u64 = soe_common::SECTOR_SIZE;
/// What a re-read is told by: the block a read begins in.
const REREAD_BLOCK: u64 = 4096;
/// Different blocks that are at least remembered for re-reads, per volume.
const REREAD_BLOCKS: usize = 1 << 16;

/// How requests become windows.
#[derive(Clone, Copy, Debug)]
pub struct WindowConfig {
    /// Length of a window in ns.
    pub interval: i64,
    /// How long, in ns, a request is held back so that earlier ones may still come. What comes
    /// later than that is dropped, and counted.
    pub reorder: i64,
    /// The longest stretch without requests, in ns, that counts as idle; beyond it the recording is
    /// taken to have been interrupted, and there are no windows.
    pub max_idle: i64,
}

impl Default for WindowConfig {
    fn default() -> Self {
        Self {
            interval: SECOND_NS,
            reorder: 0,
            max_idle: 86_400 * SECOND_NS,
        }
    }
}

/// What became of the requests: `seen == counted + dropped + held`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Books {
    /// Requests that came.
    pub seen: u64,
    /// Requests that are in a window.
    pub counted: u64,
    /// Requests that came too late for theirs.
    pub dropped: u64,
    /// Requests held back.
    pub held: u64,
}

/// Turns requests of many volumes into rows of `volume_stats`. Windows of one volume come out in
/// order of time.
#[derive(Debug)]
pub struct IoWindower {
    config: WindowConfig,
    volumes: BTreeMap<Name, VolumeState>,
    books: Books,
}

impl IoWindower {
    /// A windower without volumes.
    pub fn new(config: WindowConfig) -> Self {
        let config = WindowConfig {
            interval: config.interval.max(1),
            ..config
        };
        Self {
            config,
            volumes: BTreeMap::new(),
            books: Books::default(),
        }
    }

    /// Says that `volume` is recorded since `ts`: it is idle from there to its first request.
    pub fn begin(&mut self, volume: &Name, ts: UnixNanos) {
        let start = floor_to(ts, self.config.interval);
        let state = self.volumes.entry(volume.clone()).or_default();
        if !state.begun {
            state.begin(start);
        }
    }

    /// Takes one request; windows that end by it go to `out`.
    pub fn push(&mut self, record: IoRecord, out: &mut Vec<VolumeWindow>) {
        self.books.seen += 1;
        let config = self.config;
        let volume = record.volume.clone();
        let state = self.volumes.entry(volume.clone()).or_default();
        if config.reorder <= 0 {
            state.take(&record, &volume, &config, &mut self.books, out);
            return;
        }
        let newest = state.newest.max(record.ts);
        state.newest = newest;
        self.books.held += 1;
        state.sequence += 1;
        state.held.push(Reverse(Held {
            ts: record.ts,
            sequence: state.sequence,
            record,
        }));
        state.release(
            newest - config.reorder,
            &volume,
            &config,
            &mut self.books,
            out,
        );
    }

    /// Says that nothing before `now` will come any more: closes what ended by then, with windows of
    /// zeroes where a volume was idle.
    pub fn advance(&mut self, now: UnixNanos, out: &mut Vec<VolumeWindow>) {
        let names: Vec<Name> = self.volumes.keys().cloned().collect();
        for volume in &names {
            self.close(volume, now, out);
        }
    }

    /// Like [`IoWindower::advance`], for one volume.
    pub fn close(&mut self, volume: &Name, now: UnixNanos, out: &mut Vec<VolumeWindow>) {
        let config = self.config;
        let now = floor_to(now, config.interval);
        if let Some(state) = self.volumes.get_mut(volume) {
            state.release(now, volume, &config, &mut self.books, out);
            state.close_until(now, volume, &config, out);
        }
    }

    /// Says that the recording of one volume ended with `last`: it gets windows up to the one that
    /// holds `last`, and is forgotten.
    pub fn end(&mut self, volume: &Name, last: UnixNanos, out: &mut Vec<VolumeWindow>) {
        let config = self.config;
        if let Some(mut state) = self.volumes.remove(volume) {
            state.release(UnixNanos::MAX, volume, &config, &mut self.books, out);
            let end = floor_to(last, config.interval).saturating_add(config.interval);
            if state.begun && (state.open.start < end || state.open.touched()) {
                let end = end.max(state.open.start.saturating_add(config.interval));
                state.close_until(end, volume, &config, out);
            }
        }
    }

    /// Ends all volumes with `last`.
    pub fn finish(mut self, last: UnixNanos, out: &mut Vec<VolumeWindow>) -> Books {
        let names: Vec<Name> = self.volumes.keys().cloned().collect();
        for volume in &names {
            self.end(volume, last, out);
        }
        self.books
    }

    /// What became of the requests so far.
    pub fn books(&self) -> Books {
        self.books
    }
}

/// A request that waits for earlier ones; ordered by time, then by arrival.
#[derive(Debug)]
struct Held {
    ts: UnixNanos,
    sequence: u64,
    record: IoRecord,
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Held {}
impl PartialOrd for Held {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Held {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.ts, self.sequence).cmp(&(other.ts, other.sequence))
    }
}

/// What is counted in the open window.
#[derive(Debug, Default)]
struct Open {
    start: UnixNanos,
    read: Counts,
    write: Counts,
    discard_ops: u64,
    discard_bytes: u64,
    flush_ops: u64,
    /// Reads and writes that continue a stream.
    sequential: u64,
    /// Distances in sectors.
    seeks: LogHistogram,
    regions: HashSet<u64>,
    rereads: u64,
    dropped: u64,
    /// Time integral of the queue depth, ns times requests.
    depth_integral: u128,
    depth_max: u64,
}

impl Open {
    /// Whether anything was counted, or lost.
    fn touched(&self) -> bool {
        let ops = [
            self.read.ops,
            self.write.ops,
            self.discard_ops,
            self.flush_ops,
            self.dropped,
        ];
        ops.iter().any(|&count| count > 0)
    }
}

#[derive(Debug, Default)]
struct Counts {
    ops: u64,
    bytes: u64,
    latency: LogHistogram,
    latency_max: u64,
}

impl Counts {
    fn add(&mut self, record: &IoRecord, weight: u64) {
        self.ops = self.ops.saturating_add(weight);
        self.bytes = self
            .bytes
            .saturating_add(record.length.saturating_mul(weight));
        if let Some(latency) = record.latency {
            self.latency.record(latency, weight);
            self.latency_max = self.latency_max.max(latency);
        }
    }

    fn into_stats(self) -> DirectionStats {
        DirectionStats::measured(self.ops, self.bytes, self.latency, Some(self.latency_max))
    }
}

#[derive(Debug)]
struct VolumeState {
    /// Whether it is known where the first window begins.
    begun: bool,
    open: Open,
    newest: UnixNanos,
    held: BinaryHeap<Reverse<Held>>,
    sequence: u64,
    streams: SequentialStreams,
    rereads: Rereads,
    /// End of the last read or write, in bytes.
    last_end: Option<u64>,
    /// Completion times of requests at the device.
    in_flight: BinaryHeap<Reverse<UnixNanos>>,
    /// Up to where the queue depth is integrated.
    depth_at: UnixNanos,
    /// Whether every latency so far was known; without them there is no queue depth.
    latency_known: bool,
}

impl Default for VolumeState {
    fn default() -> Self {
        Self {
            begun: false,
            open: Open::default(),
            newest: UnixNanos::MIN,
            held: BinaryHeap::new(),
            sequence: 0,
            streams: SequentialStreams::default(),
            rereads: Rereads::new(REREAD_BLOCKS),
            last_end: None,
            in_flight: BinaryHeap::new(),
            depth_at: 0,
            latency_known: true,
        }
    }
}

impl VolumeState {
    /// Opens the first window.
    fn begin(&mut self, start: UnixNanos) {
        self.begun = true;
        self.open.start = start;
        self.depth_at = start;
    }

    /// Counts what was held back and began before `until`.
    fn release(
        &mut self,
        until: UnixNanos,
        volume: &Name,
        config: &WindowConfig,
        books: &mut Books,
        out: &mut Vec<VolumeWindow>,
    ) {
        while self.held.peek().is_some_and(|held| held.0.ts < until) {
            if let Some(Reverse(held)) = self.held.pop() {
                books.held -= 1;
                self.take(&held.record, volume, config, books, out);
            }
        }
    }

    /// Counts one request, or drops it when its window is closed already.
    fn take(
        &mut self,
        record: &IoRecord,
        volume: &Name,
        config: &WindowConfig,
        books: &mut Books,
        out: &mut Vec<VolumeWindow>,
    ) {
        let start = floor_to(record.ts, config.interval);
        if !self.begun {
            self.begin(start);
        }
        self.close_until(start, volume, config, out);
        if record.ts < self.open.start {
            self.open.dropped += 1;
            books.dropped += 1;
            return;
        }
        books.counted += 1;
        self.count(record);
    }

    fn count(&mut self, record: &IoRecord) {
        let weight = u64::from(record.sample_weight.max(1));
        let class = record.op.class();
        match class {
            IoClass::Read => self.open.read.add(record, weight),
            IoClass::Write => self.open.write.add(record, weight),
            IoClass::Discard => {
                self.open.discard_ops += weight;
                let bytes = record.length.saturating_mul(weight);
                self.open.discard_bytes = self.open.discard_bytes.saturating_add(bytes);
            }
            IoClass::Flush => self.open.flush_ops += weight,
        }
        if matches!(class, IoClass::Read | IoClass::Write) {
            self.locality(record, weight);
        }
        match record.latency {
            Some(latency) => self.arrive(record.ts, latency),
            None => self.latency_known = false,
        }
    }

    fn locality(&mut self, record: &IoRecord, weight: u64) {
        let end = record.offset.saturating_add(record.length);
        if self.streams.continues(record.offset, end) {
            self.open.sequential += weight;
        }
        if let Some(last_end) = self.last_end {
            self.open
                .seeks
                .record(last_end.abs_diff(record.offset) / SEEK_UNIT, weight);
        }
        self.last_end = Some(end);
        let last = end.saturating_sub(1).max(record.offset) / REGION_BYTES;
        self.open
            .regions
            .extend(record.offset / REGION_BYTES..=last);
        if record.op.class() == IoClass::Read
            && self.rereads.seen_before(record.offset / REREAD_BLOCK)
        {
            self.open.rereads += weight;
        }
    }

    fn arrive(&mut self, ts: UnixNanos, latency: u64) {
        self.integrate(ts);
        let latency = UnixNanos::try_from(latency).unwrap_or(UnixNanos::MAX);
        self.in_flight.push(Reverse(ts.saturating_add(latency)));
        self.open.depth_max = self.open.depth_max.max(self.in_flight.len() as u64);
    }

    /// Brings the integral of the queue depth up to `until`.
    fn integrate(&mut self, until: UnixNanos) {
        loop {
            let depth = self.in_flight.len() as u128;
            let next = self.in_flight.peek().map_or(until, |end| end.0.min(until));
            if next > self.depth_at {
                self.open.depth_integral += depth * next.abs_diff(self.depth_at) as u128;
                self.depth_at = next;
            }
            match self.in_flight.peek() {
                Some(end) if end.0 <= until => self.in_flight.pop(),
                _ => break,
            };
        }
    }

    /// Closes windows up to `until`, a window's start. An idle stretch longer than `max_idle` gives
    /// no windows, but for the one that is open.
    fn close_until(
        &mut self,
        until: UnixNanos,
        volume: &Name,
        config: &WindowConfig,
        out: &mut Vec<VolumeWindow>,
    ) {
        if !self.begun || until <= self.open.start {
            return;
        }
        let interrupted = until.saturating_sub(self.open.start) > config.max_idle;
        loop {
            let end = self.open.start.saturating_add(config.interval);
            self.integrate(end);
            let depth = self.in_flight.len() as u64;
            let next = Open {
                start: end,
                depth_max: depth,
                ..Open::default()
            };
            let closed = std::mem::replace(&mut self.open, next);
            out.push(self.window(closed, volume, config));
            if end >= until {
                return;
            }
            if interrupted {
                self.open.start = until;
                self.integrate(until);
                self.open.depth_integral = 0;
                self.open.depth_max = self.in_flight.len() as u64;
                return;
            }
        }
    }

    fn window(&self, open: Open, volume: &Name, config: &WindowConfig) -> VolumeWindow {
        let moved = open.read.ops.saturating_add(open.write.ops);
        let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        let queue_depth = self.latency_known.then(|| QueueDepth {
            mean: open.depth_integral as f64 / config.interval as f64,
            max: open.depth_max,
        });
        VolumeWindow {
            discard_ops: Some(open.discard_ops),
            discard_bytes: Some(open.discard_bytes),
            flush_ops: Some(open.flush_ops),
            queue_depth,
            sequential_share: share(open.sequential, moved),
            seek_distance_p50: open.seeks.median().map(|sectors| sectors * SEEK_UNIT),
            unique_regions: Some(open.regions.len() as u64),
            reread_share: share(open.rereads, open.read.ops),
            dropped: open.dropped,
            read: open.read.into_stats(),
            write: open.write.into_stats(),
            ..VolumeWindow::unknown(open.start, config.interval, volume.clone())
        }
    }
}

#[cfg(test)]
#[path = "windower_tests.rs"]
mod tests;
