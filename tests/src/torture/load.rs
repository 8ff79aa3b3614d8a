//! The writers, and the gate that makes them pause.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::history::{History, Kind, SECTOR, stamp};
use crate::device::Aligned;

/// Lets writers through, holds them back, or sends them home.
#[derive(Default)]
pub struct Gate {
    closed: AtomicBool,
    over: AtomicBool,
}

/// For how long the gate is open and closed, in milliseconds.
#[derive(Clone, Debug)]
pub struct Rhythm {
    /// Open.
    pub open: Range<u64>,
    /// Closed, short.
    pub gap: Range<u64>,
    /// Closed for longer every so many gaps: counters get their base only in a lasting silence.
    pub long_every: u32,
    /// That longer one.
    pub long: Range<u64>,
}

impl Gate {
    /// Waits while the gate is closed; whether to go on writing.
    pub fn pass(&self) -> bool {
        while self.closed.load(Ordering::Relaxed) && !self.over() {
            std::thread::sleep(Duration::from_micros(200));
        }
        !self.over()
    }

    /// Closes the gate or opens it.
    pub fn close(&self, closed: bool) {
        self.closed.store(closed, Ordering::Relaxed);
    }

    /// Ends all writers.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    fn over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Opens and closes until the end.
    pub fn beat(&self, rhythm: &Rhythm, seed: u64) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut wait = |range: &Range<u64>| {
            let micros = rng.random_range(range.start * 1000..range.end * 1000);
            std::thread::sleep(Duration::from_micros(micros));
        };
        for turn in 1u32.. {
            if self.over() {
                return;
            }
            wait(&rhythm.open);
            self.close(true);
            let long = rhythm.long_every != 0 && turn % rhythm.long_every == 0;
            wait(if long { &rhythm.long } else { &rhythm.gap });
            self.close(false);
        }
    }
}

/// Ends the writers when the test ends, also by a panic: their threads are joined then.
pub struct EndOnDrop<'a>(pub &'a Gate);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Where a writer writes.
pub struct Target {
    /// Number of the volume in the history.
    pub volume: usize,
    /// Opened past the page cache: the device, or a file on it.
    pub file: File,
    /// Sectors that a request is a multiple of.
    pub align: u64,
    /// Whether it is a device, whose ranges can be discarded and zeroed.
    pub device: bool,
    /// Sectors of the file at which an extent begins; no write crosses one.
    pub borders: Vec<u64>,
}

impl Target {
    fn clip(&self, sector: u64, sectors: u64) -> u64 {
        let border = self.borders.iter().find(|border| **border > sector);
        border.map_or(sectors, |border| sectors.min(border - sector))
    }

    /// One stamped write, logged before and after.
    pub fn write(
        &self,
        history: &History,
        buffer: &mut Aligned,
        sector: u64,
        sectors: u64,
    ) -> io::Result<()> {
        let sectors = self.clip(sector, sectors);
        let bytes = &mut buffer.bytes_mut()[..sectors as usize * SECTOR];
        let id = history.issue(self.volume, sector, sectors, Kind::Write);
        stamp(bytes, self.volume, sector, id);
        self.file.write_all_at(bytes, sector * SECTOR as u64)?;
        history.acknowledge(id);
        Ok(())
    }

    /// Makes a range read as zeroes, by a discard or by a write-zeroes command.
    pub fn zero(&self, history: &History, sector: u64, sectors: u64, kind: Kind) -> io::Result<()> {
        const BLKDISCARD: libc::c_ulong = 0x1277;
        let range = [sector * SECTOR as u64, sectors * SECTOR as u64];
        let id = history.issue(self.volume, sector, sectors, kind);
        let fd = self.file.as_raw_fd();
        let done = match kind {
            // SAFETY: the request takes a pointer to two numbers.
            Kind::Discard => unsafe { libc::ioctl(fd, BLKDISCARD as _, range.as_ptr()) },
            _ => {
                let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
                // SAFETY: a plain system call on an open file.
                unsafe { libc::fallocate(fd, mode, range[0] as i64, range[1] as i64) }
            }
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        history.acknowledge(id);
        Ok(())
    }
}

/// What a writer does.
#[derive(Clone, Debug)]
pub struct Habit {
    /// Sectors of a write.
    pub sectors: Range<u64>,
    /// Every so many operations is a discard or a write-zeroes command on average; 0: none.
    pub zero_every: u32,
    /// Microseconds between two operations.
    pub think_us: Range<u64>,
}

fn think(rng: &mut SmallRng, habit: &Habit) {
    if !habit.think_us.is_empty() {
        let micros = rng.random_range(habit.think_us.clone());
        std::thread::sleep(Duration::from_micros(micros));
    }
}

/// A range inside `area`, in multiples of `align`.
fn place(rng: &mut SmallRng, area: &Range<u64>, align: u64, sectors: &Range<u64>) -> (u64, u64) {
    let most = area.end - area.start;
    let len = rng
        .random_range(sectors.clone())
        .next_multiple_of(align)
        .min(most);
    let steps = (most - len) / align;
    (area.start + rng.random_range(0..=steps) * align, len)
}

/// Writes at random into `area` of `target` until the gate says it is over.
pub fn scribble(
    target: &Target,
    area: Range<u64>,
    habit: &Habit,
    history: &History,
    gate: &Gate,
    seed: u64,
) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut buffer = Aligned::new(habit.sectors.end as usize * SECTOR + 4096, 0);
    while gate.pass() {
        let zero =
            target.device && habit.zero_every != 0 && rng.random_range(0..habit.zero_every) == 0;
        let done = if zero {
            let kind = if rng.random() {
                Kind::Discard
            } else {
                Kind::WriteZeroes
            };
            // Whole pages, the granularity of discards here.
            let (sector, sectors) = place(&mut rng, &area, 8, &(8..128));
            target.zero(history, sector, sectors, kind)
        } else {
            let (sector, sectors) = place(&mut rng, &area, target.align, &habit.sectors);
            target.write(history, &mut buffer, sector, sectors)
        };
        done.unwrap_or_else(|error| panic!("volume {}: {error}", target.volume));
        think(&mut rng, habit);
    }
}

/// Writes a chain of small writes across volumes, each only after the one before was acknowledged.
pub fn depend(
    targets: &[&Target],
    area: Range<u64>,
    history: &History,
    gate: &Gate,
    links: &AtomicU64,
    seed: u64,
) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut buffer = Aligned::new(64 << 10, 0);
    while gate.pass() {
        let target = targets[rng.random_range(0..targets.len())];
        let (sector, sectors) = place(&mut rng, &area, target.align, &(1..33));
        target
            .write(history, &mut buffer, sector, sectors)
            .unwrap_or_else(|error| panic!("volume {}: {error}", target.volume));
        links.fetch_add(1, Ordering::Relaxed);
    }
}
