//! Which blocks are worth staging: most frequently read, with decay. Pure.
//!
//! Reads count, and lose weight with time, so that what earlier bursts read outranks what was read
//! once long ago. Writes are held against a block: a staged copy of a block that is about to be
//! overwritten is a wasted one. The unit of counting is up to the caller: 4 KiB blocks when every
//! IO is known, regions when only the heat of regions is.

use std::collections::HashMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::seam::{ByteRange, UnixNanos};

/// How heat is kept and scored.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScoreConfig {
    /// Bytes of a unit of counting.
    pub unit_bytes: u32,
    /// The time after which an access counts half.
    pub half_life: Duration,
    /// How many reads a write outweighs.
    pub write_penalty: f64,
    /// Units remembered per volume; the coldest are forgotten first. A unit takes about 50 bytes.
    pub max_units: usize,
}

impl Default for ScoreConfig {
    fn default() -> Self {
        Self {
            unit_bytes: 4096,
            half_life: Duration::from_secs(86_400),
            write_penalty: 1.0,
            max_units: 1 << 20,
        }
    }
}

/// Whether an access read or wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// It read.
    Read,
    /// It wrote, discarded or zeroed.
    Write,
}

/// A range worth staging.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoredRange {
    /// The range.
    pub range: ByteRange,
    /// Its score; only the order matters.
    pub score: f64,
}

#[derive(Clone, Copy, Debug)]
struct Heat {
    reads: f64,
    writes: f64,
    at: UnixNanos,
}

impl Heat {
    fn aged(self, now: UnixNanos, half_life: f64) -> Self {
        // Time that went back does not make anything hotter.
        let age = now.saturating_sub(self.at).max(0) as f64;
        let keep = 0.5f64.powf(age / half_life);
        Self {
            reads: self.reads * keep,
            writes: self.writes * keep,
            at: self.at.max(now),
        }
    }

    fn score(&self, write_penalty: f64) -> f64 {
        let against = self.reads + write_penalty.max(0.0) * self.writes;
        if against > 0.0 {
            self.reads * self.reads / against
        } else {
            0.0
        }
    }
}

/// How often each unit of one volume was read and written, with decay.
#[derive(Clone, Debug)]
pub struct HeatMap {
    config: ScoreConfig,
    units: HashMap<u64, Heat>,
    latest: UnixNanos,
}

impl HeatMap {
    /// A map without accesses.
    pub fn new(config: ScoreConfig) -> Self {
        Self {
            config: ScoreConfig {
                unit_bytes: config.unit_bytes.max(512),
                max_units: config.max_units.max(1),
                half_life: config.half_life.max(Duration::from_nanos(1)),
                ..config
            },
            units: HashMap::new(),
            latest: 0,
        }
    }

    /// Bytes of a unit.
    pub fn unit_bytes(&self) -> u32 {
        self.config.unit_bytes
    }

    /// Units remembered.
    pub fn len(&self) -> usize {
        self.units.len()
    }

    /// Whether nothing was accessed.
    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    /// Counts one access to `range`; `weight` is 1 for a plain access, more for one that is known
    /// to matter more, such as one within a burst, or for a sampled one.
    pub fn record(&mut self, at: UnixNanos, access: Access, range: ByteRange, weight: f64) {
        if range.len == 0 || !weight.is_finite() || weight <= 0.0 {
            return;
        }
        let unit = u64::from(self.config.unit_bytes);
        let first = range.offset / unit;
        let last = range.offset.saturating_add(range.len - 1) / unit;
        // One access of more units than are remembered would only push out everything else.
        let last = last.min(first.saturating_add(self.config.max_units as u64 - 1));
        for index in first..=last {
            self.count(index, at, access, weight);
        }
    }

    /// Counts `reads` and `writes` of the unit `index` at once: the heat of a region.
    pub fn record_unit(&mut self, at: UnixNanos, index: u64, reads: f64, writes: f64) {
        for (access, weight) in [(Access::Read, reads), (Access::Write, writes)] {
            if weight.is_finite() && weight > 0.0 {
                self.count(index, at, access, weight);
            }
        }
    }

    /// The ranges of most use, best first, of at most `budget` bytes together. Ranges do not
    /// overlap, and none reaches beyond `volume_bytes`.
    pub fn rank(&self, now: UnixNanos, budget: u64, volume_bytes: u64) -> Vec<ScoredRange> {
        let unit = u64::from(self.config.unit_bytes);
        let mut scored: Vec<(u64, f64)> = self
            .scores(now)
            .filter(|(index, score)| {
                *score > 0.0 && index.checked_mul(unit).is_some_and(|o| o < volume_bytes)
            })
            .collect();
        // Equal scores go by offset, so that the answer never depends on the order of a hash map.
        let order = |a: &(u64, f64), b: &(u64, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let wanted = usize::try_from(budget / unit)
            .unwrap_or(usize::MAX)
            .saturating_add(1);
        if wanted < scored.len() {
            scored.select_nth_unstable_by(wanted, order);
            scored.truncate(wanted);
        }
        scored.sort_unstable_by(order);
        let mut left = budget;
        let mut ranges = Vec::new();
        for (index, score) in scored {
            let offset = index * unit;
            let len = unit.min(volume_bytes - offset);
            if len > left {
                break;
            }
            left -= len;
            ranges.push(ScoredRange {
                range: ByteRange::new(offset, len),
                score,
            });
        }
        ranges
    }

    fn scores(&self, now: UnixNanos) -> impl Iterator<Item = (u64, f64)> + '_ {
        let half_life = self.half_life();
        let penalty = self.config.write_penalty;
        self.units
            .iter()
            .map(move |(index, heat)| (*index, heat.aged(now, half_life).score(penalty)))
    }

    fn half_life(&self) -> f64 {
        self.config.half_life.as_nanos() as f64
    }

    fn count(&mut self, index: u64, at: UnixNanos, access: Access, weight: f64) {
        self.latest = self.latest.max(at);
        let half_life = self.half_life();
        let heat = self.units.entry(index).or_insert(Heat {
            reads: 0.0,
            writes: 0.0,
            at,
        });
        *heat = heat.aged(at, half_life);
        // What is told late counts as little as if it had been told in time.
        let late = heat.at.saturating_sub(at).max(0) as f64;
        let weight = weight * 0.5f64.powf(late / half_life);
        match access {
            Access::Read => heat.reads += weight,
            Access::Write => heat.writes += weight,
        }
        if self.units.len() > self.config.max_units {
            self.forget_coldest();
        }
    }

    /// Forgets a quarter of the units at once, so that it is not done for every new one.
    fn forget_coldest(&mut self) {
        let half_life = self.half_life();
        let latest = self.latest;
        let mut by_heat: Vec<(u64, f64)> = self
            .units
            .iter()
            .map(|(index, heat)| {
                let heat = heat.aged(latest, half_life);
                (*index, heat.reads + heat.writes)
            })
            .collect();
        let forget = (by_heat.len() / 4).max(1);
        let order = |a: &(u64, f64), b: &(u64, f64)| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0));
        by_heat.select_nth_unstable_by(forget - 1, order);
        for (index, _) in &by_heat[..forget] {
            self.units.remove(index);
        }
    }
}

/// The ranges in ascending order, neighbours made one: the order in which to copy them.
pub fn merged(ranges: &[ScoredRange]) -> Vec<ByteRange> {
    let mut sorted: Vec<ByteRange> = ranges.iter().map(|r| r.range).collect();
    sorted.sort_unstable();
    let mut merged: Vec<ByteRange> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            Some(last) if last.end() == range.offset => last.len += range.len,
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const S: i64 = 1_000_000_000;
    const MANY: u64 = 1 << 40;

    fn map() -> HeatMap {
        HeatMap::new(ScoreConfig {
            half_life: Duration::from_secs(100),
            max_units: 1000,
            ..ScoreConfig::default()
        })
    }

    fn block(i: u64) -> ByteRange {
        ByteRange::new(i * 4096, 4096)
    }

    fn order(ranked: &[ScoredRange]) -> Vec<u64> {
        ranked.iter().map(|r| r.range.offset / 4096).collect()
    }

    #[test]
    fn the_most_read_come_first_within_the_budget() {
        let mut m = map();
        for (i, reads) in [(3, 5), (9, 9), (1, 2)] {
            for _ in 0..reads {
                m.record(0, Access::Read, block(i), 1.0);
            }
        }
        assert_eq!(order(&m.rank(0, 3 * 4096, MANY)), [9, 3, 1]);
        assert_eq!(order(&m.rank(0, 2 * 4096 + 100, MANY)), [9, 3]);
        assert!(m.rank(0, 100, MANY).is_empty());
    }

    #[test]
    fn old_reads_lose_to_new_ones() {
        let mut m = map();
        for _ in 0..3 {
            m.record(0, Access::Read, block(1), 1.0);
        }
        m.record(300 * S, Access::Read, block(2), 1.0);
        assert_eq!(order(&m.rank(300 * S, MANY, MANY)), [2, 1]);
    }

    #[test]
    fn blocks_that_are_overwritten_are_not_worth_it() {
        let mut m = map();
        for _ in 0..4 {
            m.record(0, Access::Read, block(1), 1.0);
            m.record(0, Access::Write, block(1), 1.0);
        }
        for _ in 0..3 {
            m.record(0, Access::Read, block(2), 1.0);
        }
        m.record(0, Access::Write, block(3), 1.0);
        assert_eq!(
            order(&m.rank(0, MANY, MANY)),
            [2, 1],
            "never-read blocks are left out"
        );
    }

    #[test]
    fn an_access_touches_every_unit_it_overlaps_and_the_end_is_cut() {
        let mut m = map();
        m.record(0, Access::Read, ByteRange::new(4000, 200), 1.0);
        m.record(0, Access::Read, ByteRange::new(u64::MAX - 10, 100), 1.0);
        let ranked = m.rank(0, MANY, 5000);
        assert_eq!(order(&ranked), [0, 1]);
        assert_eq!(ranked[1].range, ByteRange::new(4096, 904));
    }

    #[test]
    fn memory_is_bounded_and_the_hot_stay() {
        let mut m = map();
        for _ in 0..50 {
            m.record(0, Access::Read, block(7), 1.0);
        }
        for i in 100..5_000 {
            m.record(S, Access::Read, block(i), 1.0);
        }
        m.record(S, Access::Read, ByteRange::new(0, u64::MAX), 1.0);
        assert!(m.len() <= 1000);
        assert_eq!(order(&m.rank(S, 4096, MANY)), [7]);
    }

    #[test]
    fn merging_joins_neighbours() {
        let scored = |i| ScoredRange {
            range: block(i),
            score: 1.0,
        };
        assert_eq!(
            merged(&[scored(5), scored(1), scored(2)]),
            [ByteRange::new(4096, 8192), block(5)]
        );
    }

    proptest! {
        #[test]
        fn ranking_is_sound_for_any_accesses(
            accesses in proptest::collection::vec(
                (-1000i64..1000, any::<bool>(), any::<u64>(), 0u64..100_000, -1.0f64..5.0), 0..200),
            budget in 0u64..1_000_000, volume in 0u64..u64::MAX,
        ) {
            let mut m = map();
            for (at, read, offset, len, weight) in accesses {
                let access = if read { Access::Read } else { Access::Write };
                m.record(at * S, access, ByteRange::new(offset, len), weight);
            }
            let ranked = m.rank(2000 * S, budget, volume);
            prop_assert!(ranked.iter().map(|r| r.range.len).sum::<u64>() <= budget);
            prop_assert!(ranked.windows(2).all(|w| w[0].score >= w[1].score));
            let mut ranges: Vec<_> = ranked.iter().map(|r| r.range).collect();
            ranges.sort();
            prop_assert!(ranges.windows(2).all(|w| w[0].end() <= w[1].offset));
            prop_assert!(ranges.iter().all(|r| r.end() <= volume && r.len > 0));
        }
    }
}
