//! One attempt at a layer: which blocks to read again, and the window in which nothing moved.
//!
//! # Why no block is forgotten
//!
//! A write is stamped twice: when it is queued and, after it landed and before its writer is told,
//! when it completes. A marking program loads the epoch and then stores it, so a program that
//! straddles a bump may store the older number, also over a newer one.
//!
//! A pass bumps the epoch to `X`, waits for a grace period, then scans and reads. After the grace
//! period no program is under way that loaded an epoch before `X`. A write that lands after the
//! pass's scan began completes later still, so its completion mark says `X` or more, and no program
//! is left that could hide it behind a smaller number. So the next scan takes `stamp >= X`, and by
//! induction every block whose last read is older than its last landing is found by the scan of a
//! later pass or of the cut. A write that is under way during a scan is found by a later one, for a
//! cut needs nothing in flight.
//!
//! That argument leans on completion marks. Where a completion program was skipped since a pass, the
//! write it belonged to may have been queued, and stamped, before that pass and landed after its
//! read. It was queued after the last proven quiet instant, though, so the next scan goes back to that
//! one's epoch. (Without such an instant the attempt starts over: [`judge`](super::select::judge).)
//!
//! # Why the window is sound
//!
//! [`Attempt::window`] bumps every volume (full fence), then takes the first readings. A reading
//! takes *completed* before *queued*; if they are equal nothing was in flight between the two, and no
//! program that loaded an older epoch is under way (a queue program counts before it loads, a
//! completion program after it stored). What landed before is stamped, so the scan that follows is
//! exact without a grace period. When the second readings, taken after the last byte was read, equal
//! the first, then no write was queued between: each volume stood still from its first reading to its
//! second, and because all first readings come before all second ones, all volumes did so at one
//! common instant.

use std::io;
use std::ops::Range;
use std::time::Duration;

use soe_common::BlockIndex;

use super::error::CaptureError;
use super::pace::{DeadlinePace, Eager, TimedPace, pause_is_over};
use super::ranges;
use super::sink::{LayerSink, VolumePlan};
use super::types::{CaptureParts, CapturePolicy, Level, Mutation, VolumeCut};
use super::volume::{Residual, Volume};
use crate::seam::{Pace, UnixNanos};

/// Assumed until something was read, in bytes per second: below any disk worth an agent.
const FIRST_BANDWIDTH: f64 = 100e6;
/// Faster than memory is copied: a rate above it means that waiting hid the reading.
const MAX_BANDWIDTH: f64 = 4e9;

/// The window of a successful try.
pub(super) struct Window {
    pub(super) length: Duration,
    pub(super) at: UnixNanos,
}

/// Why a try did not become a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    /// Writes were in flight at the first reading.
    InFlight,
    /// Writes came, or programs were skipped, while the residual was read.
    Between,
    /// The residual does not fit into memory.
    TooMuch,
    /// The pause was over before everything was read.
    Deadline,
}

impl Moved {
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::InFlight => "writes stayed in flight",
            Self::Between => "the device was written to while the last blocks were read",
            Self::TooMuch => "more was left to read than the memory limit allows",
            Self::Deadline => "the pause budget ran out before everything was read",
        }
    }
}

/// An attempt at one layer per volume.
pub(super) struct Attempt<'a, 'p> {
    parts: &'p CaptureParts<'a>,
    policy: CapturePolicy,
    volumes: Vec<Volume<'a>>,
    pub(super) passes: u32,
    last_pass: u64,
    stalled: u32,
    /// Passes after which it is enough.
    enough: u32,
    /// Passes are no longer paced.
    hurried: bool,
    bandwidth: f64,
}

impl<'a, 'p> Attempt<'a, 'p> {
    /// Begins: decides what each volume's layer is and notes the totals to count from.
    pub(super) fn begin(
        parts: &'p CaptureParts<'a>,
        baseline: bool,
        policy: CapturePolicy,
    ) -> Result<Self, CaptureError> {
        if parts.volumes.is_empty() {
            return Err(CaptureError::NoVolumes);
        }
        let volumes = parts
            .volumes
            .iter()
            .map(|parts| Volume::begin(*parts, baseline, &policy))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            parts,
            policy,
            volumes,
            passes: 0,
            last_pass: u64::MAX,
            stalled: 0,
            enough: policy.max_passes,
            hurried: false,
            bandwidth: FIRST_BANDWIDTH,
        })
    }

    /// What the layers are going to be.
    pub(super) fn plan(&self) -> Vec<VolumePlan> {
        self.volumes
            .iter()
            .map(|volume| VolumePlan {
                volume: volume.name(),
                volume_bytes: volume.bytes,
                block_size: volume.unit,
                kind: volume.kind,
            })
            .collect()
    }

    /// A volume with a failed write whose path has not settled: its name.
    pub(super) fn unsettled(&self) -> Result<Option<String>, CaptureError> {
        for volume in &self.volumes {
            if volume.unsettled(&volume.parts.map.reading()?.misses) {
                return Ok(Some(volume.name()));
            }
        }
        Ok(None)
    }

    /// Whether a write had failed before the window just tried, without its path having settled.
    pub(super) fn window_unsettled(&self) -> bool {
        self.volumes.iter().any(|v| v.unsettled(&v.misses()))
    }

    /// Bytes that would have to be read now.
    pub(super) fn pending(&self) -> Result<u64, CaptureError> {
        let mut bytes = 0;
        for volume in &self.volumes {
            let now = volume.parts.map.reading()?.misses;
            bytes += ranges::total(&volume.scan(&now, &self.policy)?);
        }
        Ok(bytes)
    }

    /// How long `bytes` take to read, by what was seen so far.
    pub(super) fn reading_time(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.bandwidth)
    }

    /// Whether another pass may be made.
    pub(super) fn converging(&self) -> bool {
        self.stalled < self.policy.stalled_passes && self.passes < self.enough
    }

    /// Lets the passes from now on go as fast as the device can, where paced ones do not converge: what
    /// the foreground dirties meanwhile grows with the time a pass takes, and so does the harm to it.
    /// False when they already do.
    pub(super) fn hurry(&mut self) -> bool {
        if self.hurried {
            return false;
        }
        self.hurried = true;
        self.stalled = 0;
        self.last_pass = u64::MAX;
        self.enough = self.passes + self.policy.max_passes;
        true
    }

    /// Copies what changed since the last pass, paced.
    pub(super) fn pass(&mut self, sink: &mut dyn LayerSink) -> Result<(), CaptureError> {
        // A volume with nothing to read keeps its epoch: selecting from an older one is always safe.
        let mut dirty = Vec::new();
        for (number, volume) in self.volumes.iter().enumerate() {
            let now = volume.parts.map.reading()?.misses;
            if !volume.scan(&now, &self.policy)?.is_empty() {
                dirty.push((number, volume.parts.map.bump()?));
            }
        }
        if !self.policy.mutated(Mutation::NoGrace) {
            for (number, _) in &dirty {
                if let Some(volume) = self.volumes.get(*number) {
                    volume.parts.map.grace()?;
                }
            }
        }
        let mut copied = 0;
        let eager = Eager(self.parts.pace);
        let inner = if self.hurried {
            &eager
        } else {
            self.parts.pace
        };
        let pace = TimedPace::new(inner, self.parts.clock);
        let began = self.parts.clock.monotonic();
        for (number, epoch) in dirty {
            let Some(volume) = self.volumes.get_mut(number) else {
                continue;
            };
            let misses = volume.parts.map.reading()?.misses;
            let selected = volume.scan(&misses, &self.policy)?;
            let mut refused = None;
            let unit = volume.unit;
            let read = volume
                .parts
                .reader
                .read(&selected, unit, &pace, &mut |offset, data| {
                    let block = BlockIndex(offset / u64::from(unit));
                    sink.put_block(number, block, data).map_err(|error| {
                        refused = Some(error);
                        io::Error::other("the layer store refused a block")
                    })
                });
            if let Some(source) = refused {
                return Err(CaptureError::Sink { source });
            }
            read.map_err(|source| volume.read_error(source))?;
            volume.bytes_read += ranges::total(&selected);
            volume.since = Some(epoch);
            volume.missed_before = misses.complete;
            copied += ranges::total(&selected);
        }
        let busy = (self.parts.clock.monotonic() - began).saturating_sub(pace.waited());
        self.saw_bandwidth(copied, busy);
        self.passes += 1;
        self.stalled = if copied > self.last_pass / 10 * 9 {
            self.stalled + 1
        } else {
            0
        };
        self.last_pass = copied;
        Ok(())
    }

    fn saw_bandwidth(&mut self, bytes: u64, busy: Duration) {
        // Less says more about the clock than about the disk.
        if bytes >= 256 << 10 && busy > Duration::ZERO {
            let now = (bytes as f64 / busy.as_secs_f64()).min(MAX_BANDWIDTH);
            self.bandwidth = 0.5 * self.bandwidth + 0.5 * now;
        }
    }

    /// Makes room for `bytes` of residual, outside the window.
    pub(super) fn make_room(&mut self, bytes: u64) {
        let bytes = usize::try_from(bytes.min(self.policy.memory_limit)).unwrap_or(usize::MAX);
        let share = bytes / self.volumes.len().max(1);
        for volume in &mut self.volumes {
            volume.residual.clear();
            volume.residual.bytes.reserve(share);
        }
    }

    /// Balances the books of volumes that do not look quiet. Takes time: not inside a window.
    pub(super) fn settle(&self) -> Result<(), CaptureError> {
        for volume in &self.volumes {
            volume.parts.map.settle()?;
        }
        Ok(())
    }

    /// Whether nothing is in flight on any volume right now. A hint; it proves nothing later.
    pub(super) fn looks_quiet(&self) -> Result<bool, CaptureError> {
        for volume in &self.volumes {
            if !volume.parts.map.reading()?.nothing_in_flight() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Tries a cut: see the module's second argument. `patience` is how long to wait for writes in
    /// flight at the first readings. `thaw` is called by a mutation only.
    pub(super) fn window(
        &mut self,
        pace: &dyn Pace,
        patience: Duration,
        thaw: &mut dyn FnMut(),
    ) -> Result<Result<Window, Moved>, CaptureError> {
        let count = self.volumes.len();
        if self.policy.mutated(Mutation::VolumeByVolume) {
            let mut last = Err(Moved::InFlight);
            for number in 0..count {
                last = self.window_over(number..number + 1, pace, patience, thaw)?;
                if last.is_err() {
                    break;
                }
            }
            return Ok(last);
        }
        self.window_over(0..count, pace, patience, thaw)
    }

    fn window_over(
        &mut self,
        group: Range<usize>,
        pace: &dyn Pace,
        patience: Duration,
        thaw: &mut dyn FnMut(),
    ) -> Result<Result<Window, Moved>, CaptureError> {
        let policy = self.policy;
        let clock = self.parts.clock;
        let parallel = self.parts.parallel;
        let Some(volumes) = self.volumes.get_mut(group) else {
            return Ok(Err(Moved::InFlight));
        };
        if policy.mutated(Mutation::ResidualBeforeCounters) {
            fix_residuals(volumes, &policy)?;
        }
        for volume in volumes.iter_mut() {
            volume.epoch = volume.parts.map.bump()?;
        }
        let until = clock.monotonic() + patience;
        for volume in volumes.iter_mut() {
            if !volume.take_first(clock, until, &policy)? {
                return Ok(Err(Moved::InFlight));
            }
        }
        let opened = clock.monotonic();
        let at = clock.now();
        if !policy.mutated(Mutation::ResidualBeforeCounters) {
            fix_residuals(volumes, &policy)?;
        }
        if ranges_total(volumes) > policy.memory_limit {
            return Ok(Err(Moved::TooMuch));
        }
        let mut stood_still = None;
        if policy.mutated(Mutation::ThawBeforeRead) {
            stood_still = Some(all_unmoved(volumes)?);
            thaw();
        }
        let began = clock.monotonic();
        match fetch_all(volumes, pace, parallel) {
            Err(CaptureError::Read { source, .. }) if pause_is_over(&source) => {
                return Ok(Err(Moved::Deadline));
            }
            other => other?,
        }
        let closed = clock.monotonic();
        let still = match stood_still {
            Some(still) => still,
            None => all_unmoved(volumes)? || policy.mutated(Mutation::NoSecondReading),
        };
        let bytes = ranges_total(volumes);
        if !still {
            return Ok(Err(Moved::Between));
        }
        for volume in volumes.iter() {
            volume.check_truth(&policy)?;
        }
        self.saw_bandwidth(bytes, closed - began);
        Ok(Ok(Window {
            length: closed - opened,
            at,
        }))
    }

    /// Reads some blocks again and ends the generation if one changed without a mark since `cut`. Where
    /// the map cannot be asked there is no verdict: what was cut is proven without it.
    pub(super) fn audit(
        &self,
        number: usize,
        cut: &VolumeCut,
        until: &DeadlinePace<'_>,
        sink: &dyn LayerSink,
    ) -> Result<(), CaptureError> {
        match self.volumes.get(number) {
            Some(volume) => match volume.audit(number, cut, until, sink, &self.policy) {
                Err(CaptureError::Track(error)) => {
                    tracing::warn!(%error, "the audit of a cut was not finished");
                    Ok(())
                }
                verdict => verdict,
            },
            None => Ok(()),
        }
    }

    /// Hands the residuals of the cut to the sink and describes the volumes' parts of it.
    pub(super) fn persist(
        &mut self,
        sink: &mut dyn LayerSink,
        level: impl Fn(usize) -> Level,
    ) -> Result<Vec<VolumeCut>, CaptureError> {
        let mut cuts = Vec::with_capacity(self.volumes.len());
        for (number, volume) in self.volumes.iter_mut().enumerate() {
            for (offset, place) in &volume.residual.blocks {
                let Some(data) = volume.residual.bytes.get(place.clone()) else {
                    continue;
                };
                let block = BlockIndex(offset / u64::from(volume.unit));
                sink.put_block(number, block, data)
                    .map_err(|source| CaptureError::Sink { source })?;
            }
            volume.residual = Residual::default();
            cuts.push(volume.cut(level(number), &self.policy));
        }
        Ok(cuts)
    }
}

fn ranges_total(volumes: &[Volume<'_>]) -> u64 {
    volumes.iter().map(|v| ranges::total(&v.scan)).sum()
}

fn fix_residuals(volumes: &mut [Volume<'_>], policy: &CapturePolicy) -> Result<(), CaptureError> {
    for volume in volumes {
        // The window counts only if the totals are still the same at the second reading.
        let misses = volume.misses();
        volume.scan = volume.scan(&misses, policy)?;
    }
    Ok(())
}

fn all_unmoved(volumes: &[Volume<'_>]) -> Result<bool, CaptureError> {
    for volume in volumes {
        if volume.first != Some(volume.parts.map.reading()?) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn fetch_all(
    volumes: &mut [Volume<'_>],
    pace: &dyn Pace,
    parallel: bool,
) -> Result<(), CaptureError> {
    let busy = volumes.iter().filter(|v| !v.scan.is_empty()).count();
    if !parallel || busy < 2 {
        return volumes.iter_mut().try_for_each(|v| v.fetch(pace));
    }
    std::thread::scope(|scope| {
        let readers: Vec<_> = volumes
            .iter_mut()
            .map(|volume| scope.spawn(move || volume.fetch(pace)))
            .collect();
        readers.into_iter().try_for_each(|reader| {
            reader
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}
