//! What the live cache of a volume holds: replacement, read-ahead and replay together. Pure.
//!
//! Replacement is S3-FIFO (Yang et al., SOSP 2023): new blocks pass a small queue and only what is
//! read again there, or comes back soon after, gets into the main queue, so scans do no harm.
//! Prefetched blocks wait in a queue of their own, first in, first out; a little more room for it is
//! weighed against a little more room for the rest by the hits at the end of each (as ARC balances
//! recency and frequency; Megiddo and Modha, FAST 2003). Staged blocks have a small queue that grows
//! with the share of them that was used. All of this is within the same capacity.

mod gate;
mod queues;
mod readahead;
mod replay;

use crate::seam::ByteRange;
use crate::stage::score::Access;
use gate::{Cell, Gate};
use queues::Queues;
use readahead::ReadAhead;
use replay::Replay;

const SMALL: usize = 0;
const MAIN: usize = 1;
const PREFETCHED: usize = 2;
const STAGED: usize = 3;
/// Blocks that were in the cache lately, without their data.
const GHOST: usize = 4;

/// The share of the capacity of the small queue.
const SMALL_SHARE: f64 = 0.1;
/// Uses counted of a block.
const MOST_USES: u8 = 3;

/// The part at the end of a queue whose hits say what a little more or less room is worth.
const MARGIN: f64 = 0.25;
/// The shares of the capacity between which the room for prefetched blocks moves.
const PREFETCHED_SHARE: [f64; 2] = [0.05, 0.8];
/// The share of the capacity that staged blocks may get.
const MOST_STAGED: f64 = 0.1;
/// The share used of what was staged from which on more is staged.
const ENOUGH_USED: f64 = 0.9;
/// The share used of what was staged below which less is staged.
const TOO_FEW_USED: f64 = 0.75;

/// How the live cache works.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LiveCacheConfig {
    /// Bytes of a block.
    pub unit_bytes: u32,
    /// Blocks that it holds, staged and prefetched ones among them.
    pub capacity: usize,
    /// Blocks of history to find sequences in; 0 switches replay off. A block takes about 30 bytes.
    pub history: usize,
    /// Blocks read ahead at most per run or sequence; 0 switches all prefetching off.
    pub max_depth: u32,
    /// The share of prefetched blocks that must be used for prefetching to go on.
    pub min_precision: f64,
}

impl Default for LiveCacheConfig {
    fn default() -> Self {
        Self {
            unit_bytes: 4096,
            capacity: 1 << 16,
            history: 1 << 20,
            max_depth: 64,
            min_precision: 0.2,
        }
    }
}

/// What an access found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Blocks that were there when the request came.
    pub hits: u64,
    /// Blocks that were not.
    pub misses: u64,
}

/// What the cache did so far, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LiveCacheStatistics {
    /// Read and found.
    pub read_hits: u64,
    /// Read and not found.
    pub read_misses: u64,
    /// Prefetched.
    pub prefetched: u64,
    /// Prefetched and then accessed.
    pub prefetched_used: u64,
    /// Staged.
    pub staged: u64,
    /// Staged and then read.
    pub staged_used: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Note {
    uses: u8,
    cell: Cell,
    /// How many blocks had entered its queue before, modulo 2^32.
    stamp: u32,
}

/// The live cache of one volume: which blocks are in it, not their data.
#[derive(Clone, Debug)]
pub struct LiveCache {
    config: LiveCacheConfig,
    queues: Queues<Note, 5>,
    gate: Gate,
    read_ahead: ReadAhead,
    replay: Replay,
    /// Prefetched blocks that may wait.
    prefetched_room: f64,
    /// Staged blocks that may wait.
    staged_room: f64,
    /// Blocks staged last time, and the count of staged blocks used by then.
    last_staged: (u64, u64),
    /// Blocks that entered each queue so far, modulo 2^32.
    entered: [u32; 5],
    statistics: LiveCacheStatistics,
    want: Vec<(u64, Cell)>,
}

impl LiveCache {
    /// An empty cache.
    pub fn new(config: LiveCacheConfig) -> Self {
        let config = LiveCacheConfig {
            unit_bytes: config.unit_bytes.max(512),
            capacity: config.capacity.clamp(1, u32::MAX as usize / 4),
            ..config
        };
        let capacity = config.capacity as f64;
        Self {
            queues: Queues::default(),
            gate: Gate::new(config.min_precision),
            read_ahead: ReadAhead::default(),
            replay: Replay::new(config.history),
            prefetched_room: 0.2 * capacity,
            staged_room: (0.01 * capacity).max(1.0),
            last_staged: (0, 0),
            entered: [0; 5],
            statistics: LiveCacheStatistics::default(),
            want: Vec::new(),
            config,
        }
    }

    /// What it did so far.
    pub fn statistics(&self) -> LiveCacheStatistics {
        self.statistics
    }

    /// Blocks in it.
    pub fn len(&self) -> usize {
        [SMALL, MAIN, PREFETCHED, STAGED]
            .map(|queue| self.queues.len(queue))
            .iter()
            .sum()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the block `index` is in it.
    pub fn contains(&self, index: u64) -> bool {
        self.queues
            .get(index)
            .is_some_and(|(queue, _)| queue != GHOST)
    }

    /// Takes in one access; what was accessed is in the cache afterwards (writes go through it), and
    /// so is what is added to `fetch`: the ranges to prefetch, nearest first. An access that is
    /// larger than the cache passes it by.
    pub fn access(
        &mut self,
        access: Access,
        range: ByteRange,
        fetch: &mut Vec<ByteRange>,
    ) -> Found {
        if range.len == 0 {
            return Found::default();
        }
        let unit = u64::from(self.config.unit_bytes);
        let first = range.offset / unit;
        let last = range.offset.saturating_add(range.len - 1) / unit;
        let blocks = (last - first).saturating_add(1);
        if blocks > self.config.capacity as u64 {
            return self.pass_by(access, blocks);
        }
        let hits = (first..=last).filter(|b| self.contains(*b)).count() as u64;
        let found = Found {
            hits,
            misses: blocks - hits,
        };
        if access == Access::Read {
            self.statistics.read_hits += found.hits;
            self.statistics.read_misses += found.misses;
        }
        let mut fetched = false;
        for block in first..=last {
            fetched |= self.touch(block);
        }
        let most = u64::from(self.config.max_depth).min(self.config.capacity as u64 / 16);
        if most > 0 {
            self.prefetch(first, last, most, fetched, fetch);
        }
        found
    }

    fn pass_by(&mut self, access: Access, blocks: u64) -> Found {
        if access == Access::Read {
            self.statistics.read_misses = self.statistics.read_misses.saturating_add(blocks);
        }
        Found {
            hits: 0,
            misses: blocks,
        }
    }

    /// Stages the blocks of `ranges`, best first, as far as there is room for staged blocks; the
    /// ranges not in the cache yet are added to `fetch`. What was staged before and is not used yet
    /// goes first.
    pub fn stage(&mut self, ranges: &[ByteRange], fetch: &mut Vec<ByteRange>) {
        let unit = u64::from(self.config.unit_bytes);
        self.judge_staged();
        let room = self.staged_room as usize;
        let mut wanted = Vec::new();
        'ranges: for range in ranges {
            if range.len == 0 {
                continue;
            }
            let last = range.offset.saturating_add(range.len - 1) / unit;
            for block in range.offset / unit..=last {
                if wanted.len() >= room {
                    break 'ranges;
                }
                if !self.contains(block) {
                    wanted.push(block);
                } else if let Some((STAGED, _)) = self.queues.get(block) {
                    wanted.push(block);
                }
            }
        }
        // The best come last and so leave last.
        for block in wanted.iter().rev() {
            if !self.contains(*block) {
                self.statistics.staged += 1;
                add_block(fetch, *block, unit);
                self.make_room();
            }
            self.enter(STAGED, *block, 0);
        }
        while self.queues.len(STAGED) > wanted.len() {
            self.queues.pop(STAGED);
        }
        self.last_staged = (wanted.len() as u64, self.statistics.staged_used);
    }

    /// What was staged last and served gets more room, what was not loses it.
    fn judge_staged(&mut self) {
        let (staged, used_before) = self.last_staged;
        if staged == 0 {
            return;
        }
        let used = self.statistics.staged_used - used_before;
        let share = used as f64 / staged as f64;
        let capacity = self.config.capacity as f64;
        let room = &mut self.staged_room;
        if share >= ENOUGH_USED {
            *room *= 2.0;
        } else if share < TOO_FEW_USED {
            *room *= 0.5;
        }
        *room = room.clamp(
            1.0f64.max(0.002 * capacity),
            1.0f64.max(MOST_STAGED * capacity),
        );
    }

    /// Notes that `block` is accessed; whether it had to be fetched, now or ahead of time.
    fn touch(&mut self, block: u64) -> bool {
        let step = 1.0 + self.config.capacity as f64 / 2048.0;
        match self.queues.get(block) {
            Some((SMALL | MAIN, _)) => {
                if let Some(note) = self.queues.value_mut(block) {
                    note.uses = (note.uses + 1).min(MOST_USES);
                }
                return false;
            }
            Some((PREFETCHED, note)) => {
                self.statistics.prefetched_used += 1;
                self.gate.learn(note.cell, true);
                // Less room would have lost it.
                if self.place(PREFETCHED, note.stamp) >= 1.0 - MARGIN {
                    self.adapt(step);
                }
                self.queues.push(SMALL, block, Note::default());
            }
            Some((STAGED, _)) => {
                self.statistics.staged_used += 1;
                self.queues.push(SMALL, block, Note::default());
            }
            Some((_, note)) => {
                // As much room taken from the prefetched blocks would have kept it.
                let left = self.place(GHOST, note.stamp) * self.queues.len(GHOST) as f64;
                if left <= MARGIN * self.queues.len(PREFETCHED) as f64 {
                    self.adapt(-step);
                }
                self.make_room();
                self.queues.push(MAIN, block, Note::default());
            }
            None => {
                self.make_room();
                self.queues.push(SMALL, block, Note::default());
            }
        }
        true
    }

    /// Where in `queue` a block with `stamp` stands, from 0 (newest) to 1 (oldest).
    fn place(&self, queue: usize, stamp: u32) -> f64 {
        let now = self.entered[queue];
        let oldest = self.queues.oldest(queue).map_or(stamp, |o| o.1.stamp);
        let age = |stamp: u32| f64::from(now.wrapping_sub(stamp));
        age(stamp) / age(oldest).max(1.0)
    }

    fn enter(&mut self, queue: usize, block: u64, cell: Cell) {
        let stamp = self.entered[queue];
        self.entered[queue] = stamp.wrapping_add(1);
        self.queues.push(
            queue,
            block,
            Note {
                uses: 0,
                cell,
                stamp,
            },
        );
    }

    fn adapt(&mut self, by: f64) {
        let capacity = self.config.capacity as f64;
        let [least, most] = PREFETCHED_SHARE;
        self.prefetched_room = (self.prefetched_room + by).clamp(least * capacity, most * capacity);
    }

    fn prefetch(
        &mut self,
        first: u64,
        last: u64,
        most: u64,
        fetched: bool,
        fetch: &mut Vec<ByteRange>,
    ) {
        let mut want = std::mem::take(&mut self.want);
        want.clear();
        self.read_ahead
            .read(first, last, most, &mut self.gate, &mut want);
        if self.config.history > 0 {
            self.replay
                .follow(first, last, most, &mut self.gate, &mut want);
            if fetched {
                self.replay.append(first, last);
            }
        }
        let unit = u64::from(self.config.unit_bytes);
        for (block, cell) in &want {
            // What has no address of its own cannot be read.
            if self.contains(*block) || block.checked_mul(unit).is_none() {
                continue;
            }
            self.make_room();
            self.enter(PREFETCHED, *block, *cell);
            self.statistics.prefetched += 1;
            add_block(fetch, *block, unit);
        }
        self.want = want;
    }

    /// Makes room for one block.
    fn make_room(&mut self) {
        while self.len() >= self.config.capacity {
            let over = |queue: usize, room: f64| self.queues.len(queue) as f64 > room;
            let small = over(SMALL, SMALL_SHARE * self.config.capacity as f64);
            let others = self.queues.len(SMALL) + self.queues.len(MAIN);
            if over(PREFETCHED, self.prefetched_room)
                || (others == 0 && self.queues.len(STAGED) == 0)
            {
                self.drop_prefetched();
            } else if over(STAGED, self.staged_room) || others == 0 {
                self.queues.pop(STAGED);
            } else if small || self.queues.len(MAIN) == 0 {
                self.drop_small();
            } else {
                self.drop_main();
            }
        }
    }

    fn drop_prefetched(&mut self) {
        if let Some((_, note)) = self.queues.pop(PREFETCHED) {
            self.gate.learn(note.cell, false);
        }
    }

    fn drop_small(&mut self) {
        let Some((block, note)) = self.queues.oldest(SMALL) else {
            return;
        };
        if note.uses > 0 {
            self.queues.push(MAIN, block, Note::default());
            return;
        }
        self.enter(GHOST, block, 0);
        while self.queues.len(GHOST) > self.config.capacity {
            self.queues.pop(GHOST);
        }
    }

    fn drop_main(&mut self) {
        let Some((block, mut note)) = self.queues.pop(MAIN) else {
            return;
        };
        if note.uses > 0 {
            note.uses -= 1;
            self.queues.push(MAIN, block, note);
        }
    }
}

/// Adds a block to `ranges`, as part of the last one where it follows it.
fn add_block(ranges: &mut Vec<ByteRange>, block: u64, unit: u64) {
    let Some(offset) = block.checked_mul(unit) else {
        return;
    };
    match ranges.last_mut() {
        Some(last) if last.end() == offset => last.len += unit,
        _ => ranges.push(ByteRange::new(offset, unit)),
    }
}

#[cfg(test)]
mod tests;
