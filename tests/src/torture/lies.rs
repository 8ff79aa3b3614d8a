//! Change maps between the capture and the kernel: one that only notes when it was asked, so that the
//! oracle knows the window, and wrong ones. The oracle must notice every wrong one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use soe_agent::observe::disk::SliceMap;
use soe_agent::seam::{ByteRange, ChangeMap, Reading, Rest, TrackError, Tracking};
use soe_common::Epoch;

use super::history::{History, SECTOR};
use super::oracle::Window;

/// In which way the map is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// Not at all.
    None,
    /// Nothing is ever in flight.
    NothingInFlight,
    /// The residual is fixed before the counters are read, and then some time passes.
    ScanFirst,
    /// Only queue events mark blocks: what a completion marked alone is not told.
    QueueMarksOnly,
}

/// An operation issued so long before a bump was queued before it. Ones in doubt are told, so the
/// lie is never larger than the mistake it stands for.
const SURELY_QUEUED: Duration = Duration::from_millis(3);

#[derive(Default)]
struct Notes {
    /// (start, end) in ticks of the readings since the last bump, and what they said.
    readings: Vec<(u64, u64, Reading)>,
    /// The window is over: what is read now is the audit's.
    closed: bool,
    /// When each epoch began.
    bumps: Vec<(Epoch, Instant)>,
    since: Option<Epoch>,
    fixed: Option<(Epoch, Vec<ByteRange>)>,
}

/// A change map that notes the ticks of its readings, and lies if it is told to.
pub struct Witness {
    map: SliceMap,
    volume: usize,
    history: Arc<History>,
    lie: Lie,
    notes: Mutex<Notes>,
}

impl Witness {
    /// Wraps the map of volume number `volume`.
    pub fn new(map: SliceMap, volume: usize, history: Arc<History>, lie: Lie) -> Self {
        Self {
            map,
            volume,
            history,
            lie,
            notes: Mutex::default(),
        }
    }

    /// The kernel's map.
    pub fn inner(&self) -> &SliceMap {
        &self.map
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What no operation marked at its queueing in `since` or later, as far as that is sure, is left
    /// out.
    fn queue_marked(&self, ranges: Vec<ByteRange>, since: Epoch) -> Vec<ByteRange> {
        let notes = self.notes();
        let Some((_, began)) = notes.bumps.iter().find(|(epoch, _)| *epoch == since) else {
            return ranges;
        };
        let ops = self.history.of(self.volume);
        let unit = u64::from(self.block_size());
        let mut out: Vec<ByteRange> = Vec::new();
        let mut push = |range: ByteRange| match out.last_mut() {
            Some(last) if last.end() == range.offset => last.len += range.len,
            _ => out.push(range),
        };
        for range in ranges {
            let mut at = range.offset;
            while at < range.end() {
                let end = (at / unit * unit + unit).min(range.end());
                let mut marks = ops.iter().filter(|op| {
                    let from = op.sector * SECTOR as u64;
                    from < end && at < from + op.sectors * SECTOR as u64
                });
                let only_before = marks.clone().next().is_some()
                    && marks.all(|op| op.issued_at + SURELY_QUEUED < *began);
                if !only_before {
                    push(ByteRange::new(at, end - at));
                }
                at = end;
            }
        }
        out
    }
}

/// The window of a successful capture: between the last two readings of every map.
pub fn window(maps: &[&Witness]) -> Option<Window> {
    let mut window = Window {
        first: 0,
        second: u64::MAX,
    };
    for map in maps {
        let notes = map.notes();
        let [.., (_, first, _), (second, _, _)] = notes.readings[..] else {
            return None;
        };
        window.first = window.first.max(first);
        window.second = window.second.min(second);
    }
    Some(window)
}

impl ChangeMap for Witness {
    fn volume(&self) -> &str {
        self.map.volume()
    }
    fn volume_bytes(&self) -> u64 {
        self.map.volume_bytes()
    }
    fn block_size(&self) -> u32 {
        self.map.block_size()
    }
    fn generation(&self) -> uuid::Uuid {
        self.map.generation()
    }
    fn epoch(&self) -> Epoch {
        self.map.epoch()
    }
    fn bump(&self) -> Result<Epoch, TrackError> {
        let now = Instant::now();
        let epoch = self.map.bump()?;
        let mut notes = self.notes();
        notes.readings.clear();
        notes.closed = false;
        notes.bumps.push((epoch, now));
        if self.lie == Lie::ScanFirst
            && let Some(since) = notes.since
        {
            notes.fixed = Some((since, self.map.changed_since(since)?));
            drop(notes);
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(epoch)
    }
    fn settle(&self) -> Result<(), TrackError> {
        self.map.settle()
    }
    fn rest(&self) -> Option<Rest> {
        self.map.rest()
    }
    fn grace(&self) -> Result<(), TrackError> {
        self.map.grace()
    }
    fn reading(&self) -> Result<Reading, TrackError> {
        let start = self.history.tick();
        let mut reading = self.map.reading()?;
        let end = self.history.tick();
        let mut notes = self.notes();
        if !notes.closed {
            notes.readings.push((start, end, reading));
        }
        drop(notes);
        if self.lie == Lie::NothingInFlight {
            reading.completed = reading.queued;
        }
        Ok(reading)
    }
    fn changed_since(&self, since: Epoch) -> Result<Vec<ByteRange>, TrackError> {
        let fixed = {
            let mut notes = self.notes();
            // Within a window the scan comes after its first reading; the audit's comes after the second,
            // which is equal.
            notes.closed |= matches!(notes.readings[..], [.., (_, _, first), (_, _, second)]
                if first == second && first.nothing_in_flight());
            notes.since = Some(since);
            notes.fixed.take()
        };
        match fixed {
            Some((of, ranges)) if of == since => return Ok(ranges),
            _ => {}
        }
        let ranges = self.map.changed_since(since)?;
        match self.lie {
            Lie::QueueMarksOnly => Ok(self.queue_marked(ranges, since)),
            _ => Ok(ranges),
        }
    }
    fn tracking(&self) -> Tracking {
        self.map.tracking()
    }
}
