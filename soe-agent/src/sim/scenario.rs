//! Seeded scenarios: writers against captures, judged by an oracle that knows every landed sector.
//!
//! The oracle: after each capture, the image a restore would give equals, on all disks alike, the
//! disks' content at one instant between the capture's start and its commit at which no write was in
//! flight. Sectors of a write that failed since the cut before may hold its old or its new content
//! in the first layer after it; in the next one they must be exact.

use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::disk::{SimClock, SimReader};
use super::freezer::SimFreezer;
use super::map::SimMap;
use super::sink::{MemoryChain, MemorySink};
use super::world::{Faults, Load, World};
use crate::capture::{
    CaptureError, CaptureParts, CapturePolicy, CaptureRequest, GroupCut, Method, VolumeFreezer,
    VolumeParts, capture_group,
};
use crate::seam::{GenerationEnd, Unpaced};

/// What a scenario is made of, besides its seed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Setup {
    /// Wrong kernel halves.
    pub faults: Faults,
    /// Policy to start from; the scenario varies its limits.
    pub policy: CapturePolicy,
    /// Writes may fail and be executed late.
    pub failing_writes: bool,
    /// Marking programs may be skipped.
    pub misses: bool,
    /// Completion programs may be skipped without being counted as missed.
    pub silent_misses: bool,
    /// Before each capture a sector changes without any event.
    pub behind: bool,
}

/// What happened, so that tests can show that the scenarios are not idle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Cuts without a pause.
    pub optimistic: u64,
    /// Cuts under a freeze.
    pub frozen: u64,
    /// Captures that gave up with an error.
    pub failed: u64,
    /// Generations that ended.
    pub generations: u64,
    /// Of these, those that an audit ended.
    pub audits_failed: u64,
    /// Cuts tried, the failed ones included.
    pub tries: u64,
    /// Sectors that landed.
    pub landings: u64,
    /// Cuts after a failed write.
    pub after_failed_writes: u64,
}

impl Tally {
    /// Adds another scenario's figures.
    pub fn add(&mut self, other: &Tally) {
        self.optimistic += other.optimistic;
        self.frozen += other.frozen;
        self.failed += other.failed;
        self.generations += other.generations;
        self.audits_failed += other.audits_failed;
        self.tries += other.tries;
        self.landings += other.landings;
        self.after_failed_writes += other.after_failed_writes;
    }
}

/// A layer that is no instant of the disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The scenario.
    pub seed: u64,
    /// Which capture, from 0.
    pub capture: u32,
    /// How its cut was made.
    pub method: Method,
    /// The fewest wrong sectors over all instants.
    pub wrong_sectors: usize,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seed {}: capture {} ({:?}) equals no instant of the disks, at best {} sectors differ",
            self.seed, self.capture, self.method, self.wrong_sectors
        )
    }
}

/// Runs the scenario of `seed`. An unexpected error of a capture panics with the seed.
pub fn run(seed: u64, setup: &Setup) -> Result<Tally, Violation> {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x50e);
    let disks = rng.random_range(1..=3);
    let blocks = rng.random_range(6..40);
    let raw = rng.random_bool(0.3);
    let mut chance = |on: bool, p: f64| {
        let some = rng.random_bool(0.5);
        if on && some { p } else { 0.0 }
    };
    let (miss_queue, miss_complete, fail, miss_silently) = (
        chance(setup.misses, 0.01),
        chance(setup.misses, 0.01),
        chance(setup.failing_writes, 0.03),
        if setup.silent_misses { 0.02 } else { 0.0 },
    );
    let load = Load {
        writers: rng.random_range(1..6),
        raw_writers: if raw { rng.random_range(1..3) } else { 0 },
        start: rng.random_range(0.1..0.6),
        calm: rng.random_range(0.01..0.1),
        burst: rng.random_range(0.002..0.02),
        miss_queue,
        miss_complete,
        miss_silently,
        fail,
    };
    let world = World::new(seed, disks, blocks, load, setup.faults);
    let mut behind = SmallRng::seed_from_u64(seed);
    world.run(200);
    let freezer = rng.random_bool(0.7).then(|| SimFreezer {
        world: world.clone(),
    });
    let mut scenario = Scenario {
        seed,
        disks,
        world,
        freezer,
        chain: MemoryChain::default(),
        reference: vec![vec![0; blocks * super::world::BLOCK_SECTORS]; disks],
        applied: 0,
        last_start: 0,
        tally: Tally::default(),
    };
    for number in 0..rng.random_range(3..6) {
        let mut policy = setup.policy;
        policy.optimistic = rng.random_bool(0.8);
        policy.optimistic_residual = rng.random_range(32..400);
        policy.optimistic_tries = rng.random_range(3..40);
        policy.optimistic_time = Duration::from_millis(rng.random_range(5..200));
        policy.pause_budget = Duration::from_millis(rng.random_range(2..40));
        let request = CaptureRequest {
            baseline: rng.random_bool(0.1),
            policy,
        };
        if setup.behind {
            scenario.world.change_behind(behind.random_range(0..disks));
        }
        scenario.capture(number, &request, rng.random_bool(0.15))?;
        scenario.world.run(rng.random_range(0..400));
    }
    scenario.tally.landings = scenario.world.state().landings.len() as u64;
    Ok(scenario.tally)
}

struct Scenario {
    seed: u64,
    disks: usize,
    world: World,
    freezer: Option<SimFreezer>,
    chain: MemoryChain,
    /// The disks' content after `applied` landings.
    reference: Vec<Vec<u64>>,
    applied: usize,
    /// Landings when the last successful capture began.
    last_start: usize,
    tally: Tally,
}

impl Scenario {
    fn capture(
        &mut self,
        number: u32,
        request: &CaptureRequest,
        store_fails: bool,
    ) -> Result<(), Violation> {
        self.world.state().settle_zombies();
        let start = self.world.state().landings.len();
        let failures = self.world.state().failures.len();
        let maps: Vec<SimMap> = (0..self.disks)
            .map(|disk| SimMap::new(&self.world, disk))
            .collect();
        let readers: Vec<SimReader> = (0..self.disks)
            .map(|disk| SimReader::new(&self.world, disk))
            .collect();
        let records = self.chain.records.clone();
        let volumes = maps
            .iter()
            .zip(&readers)
            .enumerate()
            .map(|(disk, (map, reader))| {
                let base = records.get(disk).copied();
                VolumeParts {
                    map,
                    reader,
                    urgent: reader,
                    base,
                    settled_failures: base.map_or(0, |base| base.misses.failed_writes),
                }
            })
            .collect();
        let clock = SimClock(self.world.clone());
        let parts = CaptureParts {
            volumes,
            clock: &clock,
            pace: &Unpaced,
            freezer: self.freezer.as_ref().map(|f| f as &dyn VolumeFreezer),
            parallel: false,
        };
        let mut sink = MemorySink::new(&self.world, &mut self.chain);
        sink.commit_fails = if store_fails { 1.0 } else { 0.0 };
        let result = capture_group(&parts, request, &mut sink);
        assert_eq!(
            sink.aborted,
            result.is_err(),
            "seed {}: an attempt is aborted exactly when it failed",
            self.seed
        );
        let committed_at = sink.committed_at;
        match (result, committed_at) {
            (Ok(cut), Some(end)) => {
                self.count(&cut, failures > 0);
                self.judge(number, &cut, start, end)?;
                self.last_start = start;
            }
            (Ok(_), None) => panic!("seed {}: success without a commit", self.seed),
            (Err(error), _) => self.expect(number, &error),
        }
        Ok(())
    }

    fn count(&mut self, cut: &GroupCut, after_failed_writes: bool) {
        match cut.method {
            Method::Optimistic => {
                self.tally.optimistic += 1;
                assert!(cut.pause.is_zero(), "seed {}: pause", self.seed);
            }
            Method::Freeze => self.tally.frozen += 1,
        }
        self.tally.tries += u64::from(cut.tries);
        self.tally.after_failed_writes += u64::from(after_failed_writes);
    }

    /// Errors a capture may end with here; a generation that ends is replaced by a new one.
    fn expect(&mut self, number: u32, error: &CaptureError) {
        self.tally.failed += 1;
        match error {
            CaptureError::GenerationEnds { volume, reason } => {
                self.tally.generations += 1;
                self.tally.audits_failed += u64::from(*reason == GenerationEnd::AuditFail);
                let disk = volume.trim_start_matches("sim").parse().unwrap_or(0);
                self.world.new_generation(disk);
            }
            CaptureError::NotQuiet { .. }
            | CaptureError::NotConverging { .. }
            | CaptureError::FreezeTooLong { .. }
            | CaptureError::FrozenButMoving { .. }
            | CaptureError::PathUnsettled { .. }
            | CaptureError::MissedBeforeFirstCut { .. }
            | CaptureError::Sink { .. } => {}
            other => panic!("seed {}: capture {number}: {other}", self.seed),
        }
    }

    /// Looks for an instant between `start` and `end` that the image equals.
    fn judge(
        &mut self,
        number: u32,
        cut: &GroupCut,
        start: usize,
        end: usize,
    ) -> Result<(), Violation> {
        let state = self.world.state();
        let undefined: HashSet<(usize, usize)> = state
            .failures
            .iter()
            .filter(|(_, _, at)| *at >= self.last_start)
            .map(|(disk, sector, _)| (*disk, *sector))
            .collect();
        let images = &self.chain.images;
        let differs = |reference: &[Vec<u64>], disk: usize, sector: usize| {
            !undefined.contains(&(disk, sector))
                && images.get(disk).and_then(|i| i.get(sector))
                    != reference.get(disk).and_then(|r| r.get(sector))
        };
        let mut wrong = None;
        let mut fewest = usize::MAX;
        for at in start..=end {
            while self.applied < at {
                let Some(landing) = state.landings.get(self.applied) else {
                    break;
                };
                let (disk, sector) = (landing.disk, landing.sector);
                let before = differs(&self.reference, disk, sector);
                if let Some(place) = self.reference.get_mut(disk).and_then(|d| d.get_mut(sector)) {
                    *place = landing.value;
                }
                let after = differs(&self.reference, disk, sector);
                wrong = wrong.map(|n: usize| n + usize::from(after) - usize::from(before));
                self.applied += 1;
            }
            let now = *wrong.get_or_insert_with(|| {
                let all = self.reference.iter().enumerate();
                all.flat_map(|(disk, sectors)| (0..sectors.len()).map(move |s| (disk, s)))
                    .filter(|(disk, sector)| differs(&self.reference, *disk, *sector))
                    .count()
            });
            if state.quiet.binary_search(&at).is_ok() {
                fewest = fewest.min(now);
                if now == 0 {
                    return Ok(());
                }
            }
        }
        Err(Violation {
            seed: self.seed,
            capture: number,
            method: cut.method,
            wrong_sectors: fewest,
        })
    }
}

/// Runs the scenarios of `seeds`; the first violation, and what was done until then.
pub fn sweep(seeds: std::ops::Range<u64>, setup: &Setup) -> (Tally, Option<Violation>) {
    let mut tally = Tally::default();
    for seed in seeds {
        match run(seed, setup) {
            Ok(one) => tally.add(&one),
            Err(violation) => return (tally, Some(violation)),
        }
    }
    (tally, None)
}
