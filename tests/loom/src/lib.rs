//! The mark/cut protocol, cut down to what its correctness rests on, in loom's atomics.
//!
//! What stands for what:
//! - a writer thread is a CPU that submits writes one after the other, and on which they complete;
//!   its counters are that CPU's share of the per-CPU counters;
//! - the device is a register per block that is always read and written at its newest value (a
//!   relaxed read-modify-write), between two full fences: a doorbell write before, an interrupt
//!   after;
//! - the BPF fetching atomics are fully ordered, as the kernel defines them; stamps are plain
//!   stores, epoch loads plain loads (relaxed);
//! - a grace period waits for every program run that began before it (a lock held by each run).
//!
//! The block values a writer stores grow, so one comparison tells which of two states is newer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32 as Ghost, Ordering::SeqCst as GhostOrder};

use loom::sync::Mutex;
use loom::sync::atomic::Ordering::{Relaxed, SeqCst};
use loom::sync::atomic::{AtomicU32, fence};

/// Blocks in the model. All of them share one coarse stamp.
pub const BLOCKS: usize = 2;
/// CPUs in the model.
pub const CPUS: usize = 2;
/// The epoch in which the model begins; the previous layer's cut began it.
pub const START: u32 = 2;

/// The rules of the protocol. A model with all of them kept loses nothing; taking any of them away
/// must be noticed.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The queue program counts the write before it loads the epoch.
    pub queue_counts_before_epoch: bool,
    /// The queue program stamps.
    pub mark_at_queue: bool,
    /// The completion program stamps.
    pub mark_at_completion: bool,
    /// The completion program counts the write after it has stamped.
    pub completion_counts_after_stamp: bool,
    /// The counters are counted with fully ordered (fetching) atomics.
    pub counters_are_barriers: bool,
    /// The agent lets a full fence follow the bump of the epoch.
    pub fence_after_bump: bool,
    /// The agent reads `completed` on all CPUs before `queued`.
    pub completed_before_queued: bool,
    /// A full fence lies between these two readings.
    pub fence_between_readings: bool,
    /// The agent takes no cut while writes are in flight.
    pub in_flight_check: bool,
    /// The agent selects blocks after it has read the counters.
    pub counters_before_selection: bool,
    /// The agent reads `queued` again after it has read the data.
    pub queued_read_again: bool,
    /// The agent takes no cut when runs of the queue program were missed.
    pub misses_refuse: bool,
    /// A pass of the pre-copy lets a grace period go by between its two bumps.
    pub grace_between_bumps: bool,
    /// After a pass, fine stamps are selected from the epoch before its own.
    pub fine_from_previous_epoch: bool,
    /// After a pass, coarse stamps are selected from the epoch before its own.
    pub coarse_from_previous_epoch: bool,
}

impl Rules {
    /// All rules kept.
    pub const KEPT: Rules = Rules {
        queue_counts_before_epoch: true,
        mark_at_queue: true,
        mark_at_completion: true,
        completion_counts_after_stamp: true,
        counters_are_barriers: true,
        fence_after_bump: true,
        completed_before_queued: true,
        fence_between_readings: true,
        in_flight_check: true,
        counters_before_selection: true,
        queued_read_again: true,
        misses_refuse: true,
        grace_between_bumps: true,
        fine_from_previous_epoch: true,
        coarse_from_previous_epoch: true,
    };
}

/// Which runs of the marking programs a write suffers the loss of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missed {
    /// None.
    Nothing,
    /// The queue program is skipped: no count, no stamp, a miss.
    Queue,
    /// The completion program is skipped: no count, no stamp.
    Completion,
}

/// One write of a whole block.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    /// The block.
    pub block: usize,
    /// Its new contents; later writes of a block have greater ones.
    pub value: u32,
    /// What goes wrong.
    pub missed: Missed,
}

/// A write of `value` to `block`.
pub const fn write(block: usize, value: u32) -> Write {
    Write {
        block,
        value,
        missed: Missed::Nothing,
    }
}

/// What the kernel, the device and the agent share.
pub struct World {
    rules: Rules,
    epoch: AtomicU32,
    queued: [AtomicU32; CPUS],
    completed: [AtomicU32; CPUS],
    queue_misses: [AtomicU32; CPUS],
    fine: [AtomicU32; BLOCKS],
    coarse: AtomicU32,
    device: [AtomicU32; BLOCKS],
    running: [Mutex<()>; CPUS],
    /// What each block's writer was told is written. Not part of the protocol: the model's oracle.
    acknowledged: [Ghost; BLOCKS],
}

impl World {
    /// A device of zeroes, captured when epoch [`START`] began. Something else under the same coarse
    /// stamp was written since, so that the coarse stamp alone hides nothing.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            epoch: AtomicU32::new(START),
            queued: Default::default(),
            completed: Default::default(),
            queue_misses: Default::default(),
            fine: std::array::from_fn(|_| AtomicU32::new(START - 1)),
            coarse: AtomicU32::new(START),
            device: Default::default(),
            running: std::array::from_fn(|_| Mutex::new(())),
            acknowledged: Default::default(),
        }
    }

    /// Submits a write on `cpu` and returns when its submitter would be told that it is done.
    pub fn submit(&self, cpu: usize, write: Write) {
        if write.missed == Missed::Queue {
            self.queue_misses[cpu].fetch_add(1, Relaxed);
        } else {
            self.queue_program(cpu, write.block);
        }
        self.device_write(write.block, write.value);
        if write.missed != Missed::Completion {
            self.completion_program(cpu, write.block);
        }
        self.acknowledged[write.block].store(write.value, GhostOrder);
    }

    fn queue_program(&self, cpu: usize, block: usize) {
        let _run = self.running[cpu].lock().unwrap();
        let epoch = if self.rules.queue_counts_before_epoch {
            self.count(&self.queued[cpu]);
            self.epoch.load(Relaxed)
        } else {
            let epoch = self.epoch.load(Relaxed);
            self.count(&self.queued[cpu]);
            epoch
        };
        if self.rules.mark_at_queue {
            self.stamp(block, epoch);
        }
    }

    fn completion_program(&self, cpu: usize, block: usize) {
        let _run = self.running[cpu].lock().unwrap();
        let epoch = self.epoch.load(Relaxed);
        if !self.rules.completion_counts_after_stamp {
            self.count(&self.completed[cpu]);
        }
        if self.rules.mark_at_completion {
            self.stamp(block, epoch);
        }
        if self.rules.completion_counts_after_stamp {
            self.count(&self.completed[cpu]);
        }
    }

    fn stamp(&self, block: usize, epoch: u32) {
        self.fine[block].store(epoch, Relaxed);
        self.coarse.store(epoch, Relaxed);
    }

    fn count(&self, counter: &AtomicU32) {
        if self.rules.counters_are_barriers {
            fence(SeqCst);
            counter.fetch_add(1, Relaxed);
            fence(SeqCst);
        } else {
            counter.fetch_add(1, Relaxed);
        }
    }

    fn device_write(&self, block: usize, value: u32) {
        fence(SeqCst);
        self.device[block].swap(value, Relaxed);
        fence(SeqCst);
    }

    fn device_read(&self, block: usize) -> u32 {
        fence(SeqCst);
        let value = self.device[block].fetch_add(0, Relaxed);
        fence(SeqCst);
        value
    }

    fn bump(&self) -> u32 {
        // Only the agent writes the epoch, so its own last store is what it reads.
        let epoch = self.epoch.load(Relaxed) + 1;
        self.epoch.store(epoch, Relaxed);
        if self.rules.fence_after_bump {
            fence(SeqCst);
        }
        epoch
    }

    fn grace(&self) {
        for run in &self.running {
            drop(run.lock().unwrap());
        }
    }

    fn reading(&self) -> Reading {
        let (first, second) = if self.rules.completed_before_queued {
            (&self.completed, &self.queued)
        } else {
            (&self.queued, &self.completed)
        };
        let first = sum(first);
        if self.rules.fence_between_readings {
            fence(SeqCst);
        }
        let second = sum(second);
        let (completed, queued) = if self.rules.completed_before_queued {
            (first, second)
        } else {
            (second, first)
        };
        Reading {
            completed,
            queued,
            queue_misses: sum(&self.queue_misses),
        }
    }
}

fn sum(counters: &[AtomicU32; CPUS]) -> u32 {
    counters.iter().map(|counter| counter.load(Relaxed)).sum()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    completed: u32,
    queued: u32,
    queue_misses: u32,
}

/// The agent: what it captured, and from which epochs on it takes the next blocks.
pub struct Agent {
    world: Arc<World>,
    image: [u32; BLOCKS],
    fine_since: u32,
    coarse_since: u32,
    /// The writes of each CPU in their order, for the check of an exact cut.
    scripts: [&'static [Write]; CPUS],
}

/// How a cut is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// With writers running: the device must be shown to have stood still while it was read.
    Optimistic,
    /// While the file system is frozen: nothing but the counters shows that the device is quiet, and
    /// whoever writes past the file system is not stopped. No block may be lost; the image is exact
    /// only as far as the freeze reaches.
    Frozen,
}

impl Agent {
    /// An agent whose last layer is the device as [`World::new`] made it.
    pub fn new(world: Arc<World>, scripts: [&'static [Write]; CPUS]) -> Self {
        Self {
            world,
            image: [0; BLOCKS],
            fine_since: START,
            coarse_since: START,
            scripts,
        }
    }

    /// Tries to take a cut, once. A refused cut changes nothing but the epoch.
    pub fn cut(&mut self, cut: Cut) {
        let world = self.world.clone();
        let rules = world.rules;
        let acknowledged: [u32; BLOCKS] =
            std::array::from_fn(|block| world.acknowledged[block].load(GhostOrder));
        let epoch = world.bump();
        let fixed_early = (!rules.counters_before_selection).then(|| self.select());
        let before = world.reading();
        if rules.in_flight_check && before.completed != before.queued {
            return;
        }
        if rules.misses_refuse && before.queue_misses != 0 {
            return;
        }
        let selected = fixed_early.unwrap_or_else(|| self.select());
        let image = self.read(&selected);
        if cut == Cut::Optimistic && rules.queued_read_again && sum(&world.queued) != before.queued
        {
            return;
        }
        self.image = image;
        self.fine_since = epoch;
        self.coarse_since = epoch;
        if cut == Cut::Optimistic {
            self.assert_exact(acknowledged);
        }
    }

    /// One pass of the pre-copy: reads what changed while writes go on, and leaves the rest to the
    /// next pass.
    pub fn pass(&mut self) {
        let world = self.world.clone();
        let rules = world.rules;
        world.bump();
        if rules.grace_between_bumps {
            world.grace();
        }
        let epoch = world.bump();
        let selected = self.select();
        self.image = self.read(&selected);
        self.fine_since = if rules.fine_from_previous_epoch {
            epoch - 1
        } else {
            epoch
        };
        self.coarse_since = if rules.coarse_from_previous_epoch {
            epoch - 1
        } else {
            epoch
        };
    }

    /// The cut that follows when all writers are gone: what it leaves out is lost.
    pub fn last_cut(&mut self) {
        self.world.bump();
        let selected = self.select();
        self.image = self.read(&selected);
        for block in 0..BLOCKS {
            let there = self.world.device_read(block);
            assert!(
                self.image[block] == there,
                "LOST: block {block} holds {there}, captured was {}",
                self.image[block]
            );
        }
    }

    fn select(&self) -> [bool; BLOCKS] {
        if self.world.coarse.load(Relaxed) < self.coarse_since {
            return [false; BLOCKS];
        }
        std::array::from_fn(|block| self.world.fine[block].load(Relaxed) >= self.fine_since)
    }

    fn read(&self, selected: &[bool; BLOCKS]) -> [u32; BLOCKS] {
        std::array::from_fn(|block| {
            if selected[block] {
                self.world.device_read(block)
            } else {
                self.image[block]
            }
        })
    }

    /// An exact cut holds everything that was acknowledged before it began, and of each CPU's writes
    /// a prefix.
    fn assert_exact(&self, acknowledged: [u32; BLOCKS]) {
        for (block, value) in acknowledged.into_iter().enumerate() {
            assert!(
                self.image[block] >= value,
                "TORN: block {block} lacks an acknowledged write"
            );
        }
        for script in self.scripts {
            let held = |write: &Write| self.image[write.block] >= write.value;
            let reach = script.iter().rposition(held).map_or(0, |last| last + 1);
            for write in &script[..reach] {
                assert!(
                    held(write),
                    "TORN: {write:?} is missing, a later write of its CPU is there"
                );
            }
        }
    }
}
