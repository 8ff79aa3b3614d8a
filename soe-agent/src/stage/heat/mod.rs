//! Which blocks the next burst will read, learned from earlier bursts of the volume. Pure.
//!
//! Every block remembers in which of the last 64 bursts it was read (and how often, and how often
//! at all). Simple experts turn that into the reads to expect: by frequency, by recency, by the
//! bursts before, by those that began after similar accesses, by those at the same time of day.
//! What each expert's choice would have served of past bursts decides how much it has to say, so a
//! volume without a pattern gets decayed frequency. Live scans are continued beyond what was ever
//! read. Time only tells the time of day: ageing goes by accesses and bursts.

mod context;
mod experts;
mod ranking;
mod scans;
mod unit;

use std::collections::VecDeque;

use crate::stage::hash::{BlockMap, mix};
use context::{Recent, Sketch};
use experts::{BURSTS, EARLIER_BURSTS, EXPERTS, FALLBACK, Kernels, Mixture, Past};

use crate::seam::{ByteRange, UnixNanos};
use crate::stage::score::{Access, ScoredRange};
use scans::{Scan, Scans};
use unit::{Clock, Unit};

/// Blocks of which the experts' choices are compared.
const SAMPLE: usize = 1 << 16;

/// Accesses to the volume after which a scan that is idle is over.
const LIVE: u64 = 4096;
/// Requests after which a run is taken for a scan; shorter ones end within a burst's first moments.
const MANY_REQUESTS: u64 = 16;
/// Blocks that a scan was expected to read that the prior chance of one half weighs.
const SCAN_PRIOR: f64 = 256.0;

/// How blocks are remembered and scored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BurstHeatConfig {
    /// Bytes of a block.
    pub unit_bytes: u32,
    /// How many reads a write outweighs.
    pub write_penalty: f64,
    /// Blocks remembered per volume; the coldest are forgotten first. A block takes about 90 bytes.
    pub max_units: usize,
    /// The share of the blocks remembered that is staged, until a budget is known.
    pub budget_share: f64,
}

impl Default for BurstHeatConfig {
    fn default() -> Self {
        Self {
            unit_bytes: 4096,
            write_penalty: 1.0,
            max_units: 1 << 20,
            budget_share: 0.05,
        }
    }
}

/// What is known of the blocks of one volume.
#[derive(Clone, Debug)]
pub struct BurstHeat {
    config: BurstHeatConfig,
    slots: BlockMap<u32>,
    units: Vec<Unit>,
    clock: Clock,
    recent: Recent,
    past: VecDeque<Past>,
    scans: Scans,
    /// How much of what scans were expected to go on with they did: observed, expected.
    went_on: (f64, f64),
    mixture: Mixture,
    running: Option<Running>,
    /// Access clock when the last burst ended.
    ended: u64,
    /// Accesses of a burst, smoothed.
    length: f32,
    /// Blocks staged per burst.
    budget: Option<u64>,
}

/// The burst that runs now.
#[derive(Clone, Debug)]
struct Running {
    before: Sketch,
    second_of_day: i64,
    began: u64,
    /// Sampled blocks, with the experts that would have staged them as bits.
    chosen: Vec<(u64, u32)>,
    /// The scans that were live, with the blocks they may go on for.
    scans: Vec<(Scan, u64)>,
}

impl BurstHeat {
    /// A volume without accesses.
    pub fn new(config: BurstHeatConfig) -> Self {
        Self {
            config: BurstHeatConfig {
                unit_bytes: config.unit_bytes.max(512),
                max_units: config.max_units.clamp(1, u32::MAX as usize / 2),
                ..config
            },
            slots: BlockMap::default(),
            units: Vec::new(),
            clock: Clock {
                slow: 8e4,
                fast: 1e4,
                ..Clock::default()
            },
            recent: Recent::default(),
            past: VecDeque::new(),
            scans: Scans::default(),
            went_on: (0.0, 0.0),
            mixture: Mixture::default(),
            running: None,
            ended: 0,
            length: 0.0,
            budget: None,
        }
    }

    /// Bytes of a block.
    pub fn unit_bytes(&self) -> u32 {
        self.config.unit_bytes
    }

    /// Blocks remembered.
    pub fn len(&self) -> usize {
        self.units.len()
    }

    /// Whether nothing was accessed.
    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    /// The mean share of a burst's reads that each expert's choice served.
    pub fn gains(&self) -> [f64; EXPERTS] {
        self.mixture.gains()
    }

    /// Counts one access to `range`; `weight` is 1 for a plain access, more for a sampled one.
    pub fn record(&mut self, _at: UnixNanos, access: Access, range: ByteRange, weight: f64) {
        if range.len == 0 || !weight.is_finite() || weight <= 0.0 {
            return;
        }
        let unit = u64::from(self.config.unit_bytes);
        let first = range.offset / unit;
        let last = range.offset.saturating_add(range.len - 1) / unit;
        // One access of more blocks than are remembered would only push out everything else.
        let last = last.min(first.saturating_add(self.config.max_units as u64 - 1));
        for index in first..=last {
            self.count(index, access, weight.min(1e6) as f32);
        }
        if access == Access::Read {
            self.scans.read(first, last, self.clock.accesses);
        }
    }

    fn count(&mut self, index: u64, access: Access, weight: f32) {
        self.clock.accesses = self.clock.accesses.saturating_add(1);
        self.recent.touch(index);
        let clock = self.clock;
        let slot = match self.slots.get(&index) {
            Some(slot) => *slot as usize,
            None => {
                self.slots.insert(index, self.units.len() as u32);
                self.units.push(Unit::new(index, &clock));
                self.units.len() - 1
            }
        };
        let in_burst = self.running.is_some();
        let after = !in_burst && clock.accesses.saturating_sub(self.ended) < self.length as u64;
        let unit = &mut self.units[slot];
        match access {
            Access::Read => unit.read(&clock, weight, in_burst, after),
            Access::Write => unit.write(&clock, weight, in_burst),
        }
        if self.units.len() > self.config.max_units {
            self.forget_coldest();
        }
    }

    /// Counts `reads` and `writes` of the block `index` at once.
    pub fn record_unit(&mut self, _at: UnixNanos, index: u64, reads: f64, writes: f64) {
        for (access, weight) in [(Access::Read, reads), (Access::Write, writes)] {
            if weight.is_finite() && weight > 0.0 {
                self.count(index, access, weight.min(1e6) as f32);
            }
        }
    }

    /// Counts what was read and written of the block `index` long before: as of no burst, whatever runs now.
    pub fn prime_unit(&mut self, index: u64, reads: f64, writes: f64) {
        let (before, length) = (self.clock.accesses, std::mem::take(&mut self.length));
        let running = self.running.take();
        self.record_unit(0, index, reads, writes);
        // The burst that runs has not grown by it.
        let counted = self.clock.accesses - before;
        self.running = running.map(|mut running| {
            running.began += counted;
            running
        });
        self.length = length;
    }

    /// Says how many bytes are staged per burst, so that experts are compared at that size.
    pub fn set_budget(&mut self, bytes: u64) {
        self.budget = Some(bytes / u64::from(self.config.unit_bytes));
    }

    /// A burst begins: what would have been staged for it is noted, to be judged at its end.
    pub fn burst_began(&mut self, at: UnixNanos) {
        if self.running.is_some() {
            self.burst_ended(at);
        }
        let before = self.recent.sketch();
        let kernels = self.kernels(&before, at);
        let chosen = self.choices(&kernels);
        let scans = self.live_scans();
        self.running = Some(Running {
            before,
            second_of_day: second_of_day(at),
            began: self.clock.accesses,
            chosen,
            scans,
        });
    }

    /// The burst ended: what it read is learned.
    pub fn burst_ended(&mut self, _at: UnixNanos) {
        let Some(running) = self.running.take() else {
            return;
        };
        let accesses = self.clock.accesses.saturating_sub(running.began);
        if accesses == 0 {
            return;
        }
        let mut served = [0.0f64; EXPERTS];
        let mut reads = 0.0f64;
        for (index, experts) in &running.chosen {
            let Some(slot) = self.slots.get(index) else {
                continue;
            };
            let now = f64::from(self.units[*slot as usize].reads_now());
            if now == 0.0 {
                continue;
            }
            reads += now;
            for (i, served) in served.iter_mut().enumerate() {
                if experts >> i & 1 == 1 {
                    *served += now;
                }
            }
        }
        if reads > 0.0 {
            let chosen = running.chosen.iter().filter(|c| c.1 & 1 == 1).count();
            self.mixture.learn(&served, reads, chosen as f64);
        }
        self.learn_scans(&running.scans);
        let accesses = accesses as f32;
        self.length = if self.length == 0.0 {
            accesses
        } else {
            0.7 * self.length + 0.3 * accesses
        };
        self.past.push_front(Past {
            before: running.before,
            second_of_day: running.second_of_day,
        });
        self.past.truncate(BURSTS);
        self.clock.bursts = self.clock.bursts.saturating_add(1);
        self.ended = self.clock.accesses;
    }

    /// The ranges most worth staging for a burst soon after `now`, best first, of at most `budget`
    /// bytes together. Ranges do not overlap, and none reaches beyond `volume_bytes`.
    pub fn rank(&self, now: UnixNanos, budget: u64, volume_bytes: u64) -> Vec<ScoredRange> {
        let bytes = u64::from(self.config.unit_bytes);
        let kernels = match &self.running {
            Some(running) => self.kernels(&running.before, now),
            None => self.kernels(&self.recent.sketch(), now),
        };
        let clock = self.clock;
        let weights = self.mixture.weights();
        let penalty = self.config.write_penalty as f32;
        let mut scored: Vec<(u64, f64)> = Vec::new();
        for unit in &self.units {
            let inside = unit
                .index
                .checked_mul(bytes)
                .is_some_and(|offset| offset < volume_bytes);
            if !inside {
                continue;
            }
            let mut unit = *unit;
            unit.settle(&clock);
            let scores = kernels.scores(&unit, &clock);
            let score: f32 = scores.iter().zip(&weights).map(|(s, w)| s * w).sum();
            let score = f64::from(score * unit.read_share(penalty));
            if score > 0.0 && score.is_finite() {
                scored.push((unit.index, score));
            }
        }
        let factor = self.scan_factor();
        let mut onward: Vec<(u64, f64)> = Vec::new();
        for (scan, reach) in self.live_scans() {
            for distance in 0..reach {
                let index = scan.next.saturating_add(distance);
                if index.checked_mul(bytes).is_none_or(|o| o >= volume_bytes) {
                    break;
                }
                onward.push((index, factor * scan.survival(distance)));
            }
        }
        ranking::better_of_both(&mut scored, onward);
        ranking::best(scored, bytes, budget, volume_bytes)
    }

    /// The scans that go on, with how many blocks at most they read in a burst.
    fn live_scans(&self) -> Vec<(Scan, u64)> {
        let now = self.clock.accesses;
        let most = self.budget.unwrap_or(SAMPLE as u64).min(1 << 20);
        self.scans
            .live(now, LIVE, MANY_REQUESTS)
            .map(|scan| {
                let reach = self.length() as f64 * scan.share(now);
                (*scan, (reach as u64).min(most))
            })
            .collect()
    }

    /// The chance, learned, that a block is read to which a scan is expected to come.
    fn scan_factor(&self) -> f64 {
        (self.went_on.0 + 0.5 * SCAN_PRIOR) / (self.went_on.1 + SCAN_PRIOR)
    }

    fn learn_scans(&mut self, scans: &[(Scan, u64)]) {
        let (mut observed, mut expected) = (0.0, 0.0);
        for (scan, reach) in scans {
            // A sample of each is enough.
            let step = (reach / 1024).max(1);
            for distance in (0..*reach).step_by(step as usize) {
                let index = scan.next.saturating_add(distance);
                expected += step as f64 * scan.survival(distance);
                if let Some(slot) = self.slots.get(&index)
                    && self.units[*slot as usize].reads_now() > 0
                {
                    observed += step as f64;
                }
            }
        }
        self.went_on.0 = self.went_on.0 * 0.8 + observed;
        self.went_on.1 = self.went_on.1 * 0.8 + expected;
    }

    fn length(&self) -> f32 {
        if self.length > 0.0 {
            self.length
        } else {
            4096.0
        }
    }

    fn kernels(&self, before: &Sketch, at: UnixNanos) -> Kernels {
        Kernels::new(self.past.iter(), before, second_of_day(at), self.length())
    }

    /// What each expert alone would stage now, of a sample of the blocks.
    fn choices(&mut self, kernels: &Kernels) -> Vec<(u64, u32)> {
        // Counts age with the volume: a count that outlives eight rounds over all blocks is long.
        self.clock.fast = (self.units.len() as f32).max(1e4);
        self.clock.slow = 8.0 * self.clock.fast;
        let clock = self.clock;
        let shift = (self.units.len() / SAMPLE)
            .checked_ilog2()
            .map_or(0, |s| s + 1);
        let mask = (1u64 << shift) - 1;
        let mut sampled: Vec<(u64, [f32; EXPERTS])> = Vec::new();
        let penalty = self.config.write_penalty as f32;
        for unit in &mut self.units {
            unit.settle(&clock);
            if mix(unit.index) & mask == 0 {
                let share = unit.read_share(penalty);
                sampled.push((unit.index, kernels.scores(unit, &clock).map(|s| s * share)));
            }
        }
        let share = match self.budget {
            Some(budget) if !self.units.is_empty() => budget as f64 / self.units.len() as f64,
            _ => self.config.budget_share,
        };
        let take = ((share.clamp(0.0, 1.0) * sampled.len() as f64) as usize).min(sampled.len());
        let mut chosen: Vec<u32> = vec![0; sampled.len()];
        let mut means = [0.0f64; EXPERTS];
        let mut order: Vec<u32> = (0..sampled.len() as u32).collect();
        if take > 0 {
            for (expert, mean) in means.iter_mut().enumerate() {
                let by = |a: &u32, b: &u32| {
                    let (a, b) = (&sampled[*a as usize], &sampled[*b as usize]);
                    b.1[expert].total_cmp(&a.1[expert]).then(a.0.cmp(&b.0))
                };
                order.select_nth_unstable_by(take - 1, by);
                for i in &order[..take] {
                    chosen[*i as usize] |= 1 << expert;
                    *mean += f64::from(sampled[*i as usize].1[expert]) / take as f64;
                }
            }
            self.mixture.set_scale(&means);
        }
        sampled.iter().map(|s| s.0).zip(chosen).collect()
    }

    /// Forgets a quarter of the blocks at once, so that it is not done for every new one.
    fn forget_coldest(&mut self) {
        let clock = self.clock;
        let kernels = self.kernels(&Sketch::default(), 0);
        let mut by_heat: Vec<(f32, u64)> = self
            .units
            .iter_mut()
            .map(|unit| {
                unit.settle(&clock);
                let scores = kernels.scores(unit, &clock);
                let heat = scores[EARLIER_BURSTS] + scores[FALLBACK] + f32::from(unit.reads_now());
                (heat, unit.index)
            })
            .collect();
        let forget = (by_heat.len() / 4).max(1);
        let order = |a: &(f32, u64), b: &(f32, u64)| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1));
        by_heat.select_nth_unstable_by(forget - 1, order);
        for (_, index) in &by_heat[..forget] {
            self.slots.remove(index);
        }
        self.units
            .retain(|unit| self.slots.contains_key(&unit.index));
        for (slot, unit) in self.units.iter().enumerate() {
            self.slots.insert(unit.index, slot as u32);
        }
    }
}

fn second_of_day(at: UnixNanos) -> i64 {
    at.div_euclid(1_000_000_000).rem_euclid(86_400)
}

#[cfg(test)]
mod tests;
