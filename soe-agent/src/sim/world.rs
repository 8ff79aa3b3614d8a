//! The simulated disks and everything that happens on them, one step at a time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use uuid::Uuid;

use crate::books::Account;
use crate::seam::{Misses, Rest};

/// Bytes of a simulated sector: one number, the id of the write that landed there last.
pub const SIM_SECTOR: u64 = 8;
/// Sectors of a block of the change map.
pub const BLOCK_SECTORS: usize = 4;
/// Bytes of a block of the change map.
pub const SIM_BLOCK: u32 = BLOCK_SECTORS as u32 * SIM_SECTOR as u32;
/// Blocks under one coarse stamp.
pub const COARSE_BLOCKS: usize = 4;
/// Processors, each with its own counters.
pub const CPUS: usize = 2;

/// Ways in which the kernel half can be wrong, for mutation tests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Completions leave no mark.
    pub mark_only_at_queue: bool,
    /// Counters that lost an event are still reported as true.
    pub trust_untrue_counters: bool,
    /// The completion program counts before it stamps.
    pub count_before_stamp: bool,
    /// The device's own statistics are not asked.
    pub no_witness: bool,
    /// The base is moved over completions nobody saw without a miss being counted.
    pub forget_unseen: bool,
}

/// What the writers do, as probabilities.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Writers through a filesystem.
    pub writers: usize,
    /// Writers to the raw device, which no freeze holds.
    pub raw_writers: usize,
    /// That a step in a busy time queues a write.
    pub start: f64,
    /// That a step turns a busy time into a quiet one.
    pub calm: f64,
    /// That a step turns a quiet time into a busy one.
    pub burst: f64,
    /// That a queue program is skipped.
    pub miss_queue: f64,
    /// That a completion program is skipped.
    pub miss_complete: f64,
    /// That one is skipped without being counted as missed.
    pub miss_silently: f64,
    /// That a write fails and is executed later, or never.
    pub fail: f64,
}

/// A write on its way.
#[derive(Debug)]
struct Write {
    disk: usize,
    start: usize,
    len: usize,
    value: u64,
    /// Sectors that have not landed.
    left: Vec<usize>,
    stage: Stage,
    epoch: u32,
    cpu: usize,
    writer: Option<usize>,
    raw: bool,
    fails: bool,
    /// Turns it lets pass: its program was preempted, or its device is slow.
    stalled: u32,
    /// Grace periods begun while one of its programs was running.
    graced: bool,
}

/// Where a write stands. The number in a stamping stage is the next stamp to store: first the fine
/// ones, then the coarse ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Submitted,
    QueueLoad,
    QueueStamp(usize),
    Flight,
    DoneLoad,
    DoneStamp(usize),
    DoneCount,
    Told,
}

#[derive(Debug)]
pub(super) struct Disk {
    pub(super) sectors: Vec<u64>,
    pub(super) fine: Vec<u32>,
    pub(super) coarse: Vec<u32>,
    pub(super) epoch: u32,
    pub(super) queued: [u64; CPUS],
    pub(super) completed: [u64; CPUS],
    /// Sectors the device accounted as done.
    pub(super) accounted: u64,
    /// Added to the sum of `completed`, and taken from `accounted`: the counters' base.
    pub(super) base: i64,
    pub(super) device_base: i64,
    /// Misses of the queue side when the books were last balanced.
    pub(super) queue_base: u64,
    /// The counters lack queue events.
    pub(super) untrue: bool,
    pub(super) rest: Option<Rest>,
    pub(super) misses: Misses,
    pub(super) generation: Uuid,
    /// Whether a filesystem is on it.
    pub(super) has_fs: bool,
}

impl Disk {
    /// What the counters say when nobody moves.
    pub(super) fn account(&self) -> Account {
        Account {
            queued: self.queued.iter().sum(),
            completed: self
                .completed
                .iter()
                .sum::<u64>()
                .wrapping_add_signed(self.base),
        }
    }
}

/// A sector that landed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Landing {
    pub(super) disk: usize,
    pub(super) sector: usize,
    pub(super) value: u64,
}

/// A write that failed and may still be executed.
#[derive(Debug)]
struct Zombie {
    landing: Landing,
    /// It is executed at the latest when this many layers have been captured.
    until_captures: u32,
}

/// The state behind a [`World`].
#[derive(Debug)]
pub(super) struct State {
    pub(super) rng: SmallRng,
    pub(super) now_ns: u64,
    pub(super) disks: Vec<Disk>,
    pub(super) faults: Faults,
    load: Load,
    writes: Vec<Write>,
    idle: Vec<bool>,
    busy: bool,
    next_value: u64,
    zombies: Vec<Zombie>,
    /// Every sector that landed, in order.
    pub(super) landings: Vec<Landing>,
    /// Lengths of `landings` at instants with nothing in flight on any disk, ascending.
    pub(super) quiet: Vec<usize>,
    /// Sectors of failed writes, with the length of `landings` at the failure.
    pub(super) failures: Vec<(usize, usize, usize)>,
    pub(super) captures: u32,
    /// Writes in flight stay there until they are drained.
    held: bool,
    pub(super) frozen: bool,
    pub(super) thaw_at_ns: Option<u64>,
}

/// Disks, writers and time.
#[derive(Clone, Debug)]
pub struct World(Arc<Mutex<State>>);

impl World {
    /// `disks` disks of `blocks` blocks under `load`, everything decided by `seed`. A disk without a
    /// filesystem is written to by raw writers only.
    pub fn new(seed: u64, disks: usize, blocks: usize, load: Load, faults: Faults) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let disks = (0..disks.max(1))
            .map(|number| Disk {
                sectors: vec![0; blocks * BLOCK_SECTORS],
                fine: vec![0; blocks],
                coarse: vec![0; blocks.div_ceil(COARSE_BLOCKS)],
                epoch: 1,
                queued: [0; CPUS],
                completed: [0; CPUS],
                accounted: 0,
                base: 0,
                device_base: 0,
                queue_base: 0,
                untrue: false,
                rest: None,
                misses: Misses::default(),
                generation: Uuid::from_u128(rng.random()),
                has_fs: load.raw_writers == 0 || number == 0 || rng.random_bool(0.7),
            })
            .collect();
        Self(Arc::new(Mutex::new(State {
            rng,
            now_ns: 1,
            disks,
            faults,
            load,
            writes: Vec::new(),
            idle: vec![true; load.writers + load.raw_writers],
            busy: true,
            next_value: 1,
            zombies: Vec::new(),
            landings: Vec::new(),
            quiet: vec![0],
            failures: Vec::new(),
            captures: 0,
            held: false,
            frozen: false,
            thaw_at_ns: None,
        })))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the world run for `steps` steps.
    pub fn run(&self, steps: usize) {
        let mut state = self.state();
        (0..steps).for_each(|_| state.step());
    }

    /// Changes the load.
    pub fn set_load(&self, load: Load) {
        let mut state = self.state();
        state.idle.resize(load.writers + load.raw_writers, true);
        state.load = load;
    }

    /// Keeps writes in flight until they are drained.
    pub fn hold_in_flight(&self) {
        self.state().held = true;
    }

    /// Changes a sector of disk `disk` without any event, as a write to a loop device's backing file.
    pub fn change_behind(&self, disk: usize) {
        let mut state = self.state();
        let sectors = state.disks.get(disk).map_or(0, |d| d.sectors.len());
        if sectors > 0 {
            let sector = state.rng.random_range(0..sectors);
            let value = state.next_value;
            state.next_value += 1;
            state.land(Landing {
                disk,
                sector,
                value,
            });
            state.note_quiet();
        }
    }

    /// Begins a new generation of disk `disk`: its stamps start anew, as after tracking was lost.
    pub fn new_generation(&self, disk: usize) {
        let mut state = self.state();
        state.new_generation(disk);
    }
}

impl State {
    /// A seeded number of steps, mostly few: called by every seam.
    pub(super) fn progress(&mut self) {
        let steps = match self.rng.random_range(0..20) {
            0..8 => 0,
            8..19 => self.rng.random_range(1..4),
            _ => self.rng.random_range(4..40),
        };
        (0..steps).for_each(|_| self.step());
    }

    /// One thing happens.
    pub(super) fn step(&mut self) {
        self.now_ns += self.rng.random_range(200..20_000);
        if self.thaw_at_ns.is_some_and(|at| self.now_ns >= at) {
            self.frozen = false;
            self.thaw_at_ns = None;
        }
        let turn = if self.busy {
            self.load.calm
        } else {
            self.load.burst
        };
        if self.rng.random_bool(turn) {
            self.busy = !self.busy;
        }
        if !self.zombies.is_empty() && self.rng.random_bool(0.02) {
            let which = self.rng.random_range(0..self.zombies.len());
            self.rise(which);
        }
        if self.busy && self.rng.random_bool(self.load.start) {
            self.queue_by_a_writer();
        } else if !self.writes.is_empty() {
            let which = self.rng.random_range(0..self.writes.len());
            self.advance(which);
        }
        self.note_quiet();
    }

    fn note_quiet(&mut self) {
        let quiet = self.writes.iter().all(|w| w.stage == Stage::Submitted);
        let at = self.landings.len();
        if quiet && self.quiet.last() != Some(&at) {
            self.quiet.push(at);
        }
    }

    fn queue_by_a_writer(&mut self) {
        if self.idle.is_empty() {
            return;
        }
        let writer = self.rng.random_range(0..self.idle.len());
        let raw = writer >= self.load.writers;
        let disk = self.rng.random_range(0..self.disks.len());
        let has_fs = self.disks.get(disk).is_some_and(|d| d.has_fs);
        let held = self.frozen && has_fs && !raw;
        if held || (!has_fs && !raw) || self.idle.get(writer) != Some(&true) {
            return;
        }
        if let Some(idle) = self.idle.get_mut(writer) {
            *idle = false;
        }
        let sectors = self.disks.get(disk).map_or(0, |d| d.sectors.len());
        // Half of the writes meet in few blocks, so that marks overwrite each other.
        let hot = (2 * BLOCK_SECTORS).min(sectors);
        let near = if self.rng.random_bool(0.5) {
            hot
        } else {
            sectors
        };
        let start = self.rng.random_range(0..near);
        let len = self.rng.random_range(1..=6).min(sectors - start);
        self.submit(disk, start, len, Some(writer), raw);
    }

    /// Submits a write of `len` sectors; a tenth of them are discards.
    pub(super) fn submit(
        &mut self,
        disk: usize,
        start: usize,
        len: usize,
        writer: Option<usize>,
        raw: bool,
    ) {
        let value = if self.rng.random_bool(0.1) {
            0
        } else {
            self.next_value += 1;
            self.next_value
        };
        let mut left: Vec<usize> = (start..start + len).collect();
        left.shuffle(&mut self.rng);
        let fail = self.load.fail;
        let write = Write {
            disk,
            start,
            len,
            value,
            left,
            stage: Stage::Submitted,
            epoch: 0,
            cpu: self.rng.random_range(0..CPUS),
            writer,
            raw,
            fails: fail > 0.0 && self.rng.random_bool(fail),
            stalled: 0,
            graced: false,
        };
        self.writes.push(write);
    }

    fn advance(&mut self, which: usize) {
        let Some(mut write) = (which < self.writes.len()).then(|| self.writes.swap_remove(which))
        else {
            return;
        };
        if write.stalled > 0 {
            write.stalled -= 1;
        } else {
            self.advance_write(&mut write);
            if self.rng.random_bool(0.04) {
                write.stalled = self.rng.random_range(3..60);
            }
        }
        if write.stage != Stage::Told {
            self.writes.push(write);
        } else if let Some(idle) = write.writer.and_then(|writer| self.idle.get_mut(writer)) {
            *idle = true;
        }
    }

    fn advance_write(&mut self, write: &mut Write) {
        let Some(disk) = self.disks.get_mut(write.disk) else {
            return;
        };
        let stamps = Stamps::of(write.start, write.len);
        write.stage = match write.stage {
            Stage::Submitted if self.rng.random_bool(self.load.miss_queue) => {
                disk.misses.queue += 1;
                Stage::Flight
            }
            Stage::Submitted => {
                disk.queued[write.cpu] += write.len as u64;
                Stage::QueueLoad
            }
            Stage::QueueLoad => {
                write.epoch = disk.epoch;
                Stage::QueueStamp(0)
            }
            Stage::QueueStamp(next) if stamps.store(disk, next, write.epoch) => {
                Stage::QueueStamp(next + 1)
            }
            Stage::QueueStamp(_) => Stage::Flight,
            Stage::Flight => return self.land_or_complete(write),
            Stage::DoneLoad => {
                write.epoch = disk.epoch;
                if self.faults.count_before_stamp {
                    disk.completed[write.cpu] += write.len as u64;
                }
                Stage::DoneStamp(0)
            }
            Stage::DoneStamp(next)
                if !self.faults.mark_only_at_queue && stamps.store(disk, next, write.epoch) =>
            {
                Stage::DoneStamp(next + 1)
            }
            Stage::DoneStamp(_) => Stage::DoneCount,
            Stage::DoneCount => {
                if !self.faults.count_before_stamp {
                    disk.completed[write.cpu] += write.len as u64;
                }
                if write.fails {
                    disk.misses.failed_writes += 1;
                }
                disk.accounted += write.len as u64;
                Stage::Told
            }
            Stage::Told => Stage::Told,
        };
    }

    fn land_or_complete(&mut self, write: &mut Write) {
        // Slow now and then: a write that stays in flight across several seam calls.
        if self.held || self.rng.random_bool(0.3) {
            return;
        }
        let gives_up = write.fails && self.rng.random_bool(0.4);
        if !gives_up && let Some(sector) = write.left.pop() {
            self.land(Landing {
                disk: write.disk,
                sector,
                value: write.value,
            });
            return;
        }
        if write.fails {
            let failed_at = self.landings.len();
            for sector in write.start..write.start + write.len {
                self.failures.push((write.disk, sector, failed_at));
            }
            for sector in std::mem::take(&mut write.left) {
                let landing = Landing {
                    disk: write.disk,
                    sector,
                    value: write.value,
                };
                self.zombies.push(Zombie {
                    landing,
                    until_captures: self.captures + 1,
                });
            }
        }
        write.cpu = self.rng.random_range(0..CPUS);
        let silently = self.rng.random_bool(self.load.miss_silently);
        write.stage = if silently || self.rng.random_bool(self.load.miss_complete) {
            if let Some(disk) = self.disks.get_mut(write.disk) {
                disk.misses.complete += u64::from(!silently);
                disk.accounted += write.len as u64;
            }
            Stage::Told
        } else {
            Stage::DoneLoad
        };
    }

    fn land(&mut self, landing: Landing) {
        if let Some(place) = self
            .disks
            .get_mut(landing.disk)
            .and_then(|d| d.sectors.get_mut(landing.sector))
        {
            *place = landing.value;
            self.landings.push(landing);
        }
    }

    /// A failed write is executed after all, without any event.
    fn rise(&mut self, which: usize) {
        let zombie = self.zombies.swap_remove(which);
        self.land(zombie.landing);
    }

    /// Executes the failed writes whose time has come at the latest.
    pub(super) fn settle_zombies(&mut self) {
        while let Some(which) = self
            .zombies
            .iter()
            .position(|z| z.until_captures <= self.captures)
        {
            self.rise(which);
        }
        self.note_quiet();
    }

    /// Whether a write of `disk` was queued and is not complete.
    pub(super) fn in_flight(&self, disk: usize) -> bool {
        self.writes
            .iter()
            .any(|w| w.disk == disk && w.stage != Stage::Submitted)
    }

    /// Whether the device says that a write of `disk` is on its way: it knows of it from its dispatch
    /// on, later than the queue program.
    pub(super) fn at_device(&self, disk: usize) -> bool {
        let there = |stage| {
            !matches!(
                stage,
                Stage::Submitted | Stage::QueueLoad | Stage::QueueStamp(_)
            )
        };
        self.writes.iter().any(|w| w.disk == disk && there(w.stage))
    }

    /// Runs until the marking programs that run now on `disk` are done.
    pub(super) fn grace(&mut self, disk: usize) {
        for write in &mut self.writes {
            write.graced = write.disk == disk
                && !matches!(write.stage, Stage::Submitted | Stage::Flight | Stage::Told);
        }
        while let Some(which) = self.writes.iter().position(|w| w.graced) {
            if self.rng.random_bool(0.3) {
                self.step();
                continue;
            }
            let mut write = self.writes.swap_remove(which);
            self.advance_write(&mut write);
            if matches!(write.stage, Stage::Flight | Stage::Told) {
                write.graced = false;
            }
            self.writes.push(write);
            // Those told are removed by their writers' next step.
            self.writes_told();
            self.note_quiet();
        }
    }

    fn writes_told(&mut self) {
        while let Some(which) = self.writes.iter().position(|w| w.stage == Stage::Told) {
            let write = self.writes.swap_remove(which);
            if let Some(idle) = write.writer.and_then(|writer| self.idle.get_mut(writer)) {
                *idle = true;
            }
        }
    }

    /// Runs until no write that a freeze waits for is on its way.
    pub(super) fn drain_filesystems(&mut self) {
        let waits =
            |disks: &[Disk], w: &Write| !w.raw && disks.get(w.disk).is_some_and(|disk| disk.has_fs);
        let held = std::mem::replace(&mut self.held, false);
        while self.writes.iter().any(|w| waits(&self.disks, w)) {
            self.step();
        }
        self.held = held;
    }

    #[cfg(test)]
    /// Runs until every write submitted has gone through its queue program.
    pub(super) fn queue_all(&mut self) {
        while self.writes.iter().any(|w| w.stage != Stage::Flight) {
            self.step();
        }
    }

    pub(super) fn new_generation(&mut self, disk: usize) {
        // Tracking is attached anew: what is under way then is not seen before it completes.
        let id = Uuid::from_u128(self.rng.random());
        if let Some(disk) = self.disks.get_mut(disk) {
            disk.generation = id;
            disk.rest = None;
        }
    }
}

/// The stamps a write stores: fine ones first, then coarse ones.
struct Stamps {
    first: usize,
    fine: usize,
    first_coarse: usize,
    coarse: usize,
}

impl Stamps {
    fn of(start: usize, len: usize) -> Self {
        let first = start / BLOCK_SECTORS;
        let last = (start + len.max(1) - 1) / BLOCK_SECTORS;
        Self {
            first,
            fine: last - first + 1,
            first_coarse: first / COARSE_BLOCKS,
            coarse: last / COARSE_BLOCKS - first / COARSE_BLOCKS + 1,
        }
    }

    /// Stores stamp number `next`; false when there are no more.
    fn store(&self, disk: &mut Disk, next: usize, epoch: u32) -> bool {
        let place = if next < self.fine {
            disk.fine.get_mut(self.first + next)
        } else if next < self.fine + self.coarse {
            disk.coarse.get_mut(self.first_coarse + next - self.fine)
        } else {
            return false;
        };
        if let Some(place) = place {
            *place = epoch;
        }
        true
    }
}
