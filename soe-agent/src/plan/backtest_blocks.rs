//! What staging would have chosen, and what a live cache would have missed, over recorded IO: raw outputs
//! and counts for others to score.
//!
//! Accesses are handed over in the order of time, and a choice is made from what was handed over before
//! the burst it is for: looking ahead is impossible.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::simulate::TraceAccess;
use crate::model::VolumeName;
use crate::seam::{ByteRange, UnixNanos};
use crate::stage::cache::{LiveCache, LiveCacheConfig};
use crate::stage::heat::{BurstHeat, BurstHeatConfig};

/// Blocks remembered per volume: 16 GiB of 4 KiB blocks.
const MAX_UNITS: usize = 1 << 22;
/// The share of a cache's blocks that is offered to be staged before a burst; the cache takes as many of
/// them as have paid.
const OFFERED: f64 = 0.5;

/// Blocks of one access that count to the footprint: a discard of the whole volume touches none of them.
const MOST_BLOCKS: usize = 1 << 18;

/// A burst of one volume, known from elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenBurst {
    /// The volume.
    pub volume: VolumeName,
    /// When it began.
    pub start: UnixNanos,
    /// When it ended.
    pub end: UnixNanos,
}

/// How much may be staged, or cached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// A share of the footprint: of the blocks that were ever accessed.
    Share(f64),
    /// So many bytes.
    Bytes(u64),
}

impl Amount {
    /// In bytes, of a footprint of `blocks` blocks of `block` bytes.
    fn bytes(self, blocks: usize, block: u32) -> u64 {
        match self {
            Self::Share(share) => (share * blocks as f64) as u64 * u64::from(block),
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// A block chosen for a burst.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChosenBlock {
    /// The volume.
    pub volume: VolumeName,
    /// When the burst began.
    pub burst_start: UnixNanos,
    /// Its rank: 0 is the block most worth staging.
    pub rank: usize,
    /// Where it begins, in bytes.
    pub offset: u64,
}

/// What is known of one volume on the way.
struct Course<'a> {
    heat: BurstHeat,
    /// Bursts to come, and when the one under way ends.
    bursts: std::slice::Iter<'a, GivenBurst>,
    next: Option<&'a GivenBurst>,
    ends: Option<UnixNanos>,
}

impl<'a> Course<'a> {
    fn new(block: u32, bursts: &'a [GivenBurst]) -> Self {
        let mut bursts = bursts.iter();
        Self {
            heat: BurstHeat::new(BurstHeatConfig {
                unit_bytes: block,
                max_units: MAX_UNITS,
                ..BurstHeatConfig::default()
            }),
            next: bursts.next(),
            bursts,
            ends: None,
        }
    }

    /// Lets the bursts end and begin that do so until `now`; `began` is called before each begins.
    fn until(&mut self, now: UnixNanos, began: &mut dyn FnMut(&mut BurstHeat, &GivenBurst)) {
        loop {
            if let Some(end) = self.ends.filter(|end| *end <= now) {
                self.heat.burst_ended(end);
                self.ends = None;
            }
            let Some(burst) = self.next.filter(|burst| burst.start <= now) else {
                return;
            };
            self.next = self.bursts.next();
            began(&mut self.heat, burst);
            // One that begins within another ends that one.
            self.heat.burst_began(burst.start);
            self.ends = Some(burst.end);
        }
    }
}

/// The bursts by volume, ascending by start.
fn by_volume(bursts: &[GivenBurst]) -> BTreeMap<VolumeName, Vec<GivenBurst>> {
    let mut all: BTreeMap<VolumeName, Vec<GivenBurst>> = BTreeMap::new();
    for burst in bursts {
        all.entry(burst.volume.clone())
            .or_default()
            .push(burst.clone());
    }
    for bursts in all.values_mut() {
        bursts.sort_by_key(|burst| (burst.start, burst.end));
    }
    all
}

/// For every given burst the blocks of `block` bytes that would be staged for it within `budget`, chosen by
/// the accesses before it. `accesses` ascend by time.
///
/// # Errors
/// The first error of `accesses`.
pub fn staging<E>(
    accesses: impl Iterator<Item = Result<TraceAccess, E>>,
    bursts: &[GivenBurst],
    budget: Amount,
    block: u32,
    take: &mut dyn FnMut(ChosenBlock),
) -> Result<(), E> {
    let bursts = by_volume(bursts);
    let mut courses: BTreeMap<VolumeName, Course<'_>> = bursts
        .iter()
        .map(|(volume, bursts)| (volume.clone(), Course::new(block, bursts)))
        .collect();
    let mut choose = |heat: &mut BurstHeat, burst: &GivenBurst| {
        let bytes = budget.bytes(heat.len(), block);
        heat.set_budget(bytes);
        for (rank, chosen) in heat.rank(burst.start, bytes, u64::MAX).iter().enumerate() {
            take(ChosenBlock {
                volume: burst.volume.clone(),
                burst_start: burst.start,
                rank,
                offset: chosen.range.offset,
            });
        }
    };
    for access in accesses {
        let access = access?;
        if let Some(course) = courses.get_mut(&access.volume) {
            course.until(access.at, &mut choose);
            course
                .heat
                .record(access.at, access.access, access.range, 1.0);
        }
    }
    for course in courses.values_mut() {
        course.until(UnixNanos::MAX, &mut choose);
    }
    Ok(())
}

/// How many blocks of each volume were ever accessed.
///
/// # Errors
/// The first error of `accesses`.
pub fn footprints<E>(
    accesses: impl Iterator<Item = Result<TraceAccess, E>>,
    block: u32,
) -> Result<BTreeMap<VolumeName, usize>, E> {
    let mut blocks: BTreeMap<VolumeName, BTreeSet<u64>> = BTreeMap::new();
    for access in accesses {
        let access = access?;
        let touched = blocks.entry(access.volume).or_default();
        touched.extend(indexes(access.range, block).take(MOST_BLOCKS));
    }
    Ok(blocks
        .into_iter()
        .map(|(volume, blocks)| (volume, blocks.len()))
        .collect())
}

fn indexes(range: ByteRange, block: u32) -> std::ops::Range<u64> {
    let block = u64::from(block.max(1));
    let end = range.offset.saturating_add(range.len);
    range.offset / block..end.div_ceil(block)
}

/// What the cache of one volume did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CacheCounts {
    /// The volume.
    pub volume: VolumeName,
    /// Blocks that it ever accessed.
    pub footprint_blocks: usize,
    /// Blocks that the cache holds, prefetched and staged ones among them.
    pub capacity_blocks: usize,
    /// Blocks read.
    pub reads: u64,
    /// Of them not in the cache when the request came: live cache and online prefetch alone.
    pub misses: u64,
    /// Blocks prefetched.
    pub prefetched: u64,
    /// Of them used.
    pub prefetched_used: u64,
    /// The same as `misses` with staging, in the same capacity; `None` without bursts.
    pub misses_with_staging: Option<u64>,
    /// Blocks staged.
    pub staged: u64,
    /// Of them read.
    pub staged_used: u64,
}

/// What a live cache of `capacity` misses of each volume, alone and with staging before the given bursts.
/// `footprints` are those of the whole of `accesses`, which ascend by time.
///
/// # Errors
/// The first error of `accesses`.
pub fn cache<E>(
    accesses: impl Iterator<Item = Result<TraceAccess, E>>,
    footprints: &BTreeMap<VolumeName, usize>,
    bursts: &[GivenBurst],
    capacity: Amount,
    block: u32,
) -> Result<Vec<CacheCounts>, E> {
    let bursts = by_volume(bursts);
    let size = |blocks: usize| {
        let blocks = capacity.bytes(blocks, block) / u64::from(block.max(1));
        usize::try_from(blocks).unwrap_or(usize::MAX).max(1)
    };
    let new = |blocks: usize| {
        LiveCache::new(LiveCacheConfig {
            unit_bytes: block,
            capacity: size(blocks),
            ..LiveCacheConfig::default()
        })
    };
    let mut caches: BTreeMap<VolumeName, (LiveCache, Option<(LiveCache, Course<'_>)>)> = footprints
        .iter()
        .map(|(volume, blocks)| {
            let staged = bursts
                .get(volume)
                .map(|bursts| (new(*blocks), Course::new(block, bursts)));
            (volume.clone(), (new(*blocks), staged))
        })
        .collect();
    let mut fetch = Vec::new();
    for access in accesses {
        let access = access?;
        let Some((alone, staged)) = caches.get_mut(&access.volume) else {
            continue;
        };
        fetch.clear();
        alone.access(access.access, access.range, &mut fetch);
        if let Some((cache, course)) = staged {
            let blocks = size(footprints.get(&access.volume).copied().unwrap_or(0));
            let bytes = (blocks as f64 * OFFERED) as u64 * u64::from(block);
            course.until(access.at, &mut |heat, burst| {
                heat.set_budget(bytes);
                let ranked = heat.rank(burst.start, bytes, u64::MAX);
                let ranges: Vec<ByteRange> = ranked.iter().map(|r| r.range).collect();
                cache.stage(&ranges, &mut fetch);
            });
            course
                .heat
                .record(access.at, access.access, access.range, 1.0);
            fetch.clear();
            cache.access(access.access, access.range, &mut fetch);
        }
    }
    Ok(caches
        .into_iter()
        .map(|(volume, (alone, staged))| {
            let own = alone.statistics();
            let with = staged.map(|(cache, _)| cache.statistics());
            CacheCounts {
                footprint_blocks: footprints.get(&volume).copied().unwrap_or(0),
                capacity_blocks: size(footprints.get(&volume).copied().unwrap_or(0)),
                volume,
                reads: own.read_hits + own.read_misses,
                misses: own.read_misses,
                prefetched: own.prefetched,
                prefetched_used: own.prefetched_used,
                misses_with_staging: with.map(|s| s.read_misses),
                staged: with.map_or(0, |s| s.staged),
                staged_used: with.map_or(0, |s| s.staged_used),
            }
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage::score::Access;

    const S: i64 = 1_000_000_000;
    const BLOCK: u64 = 4096;

    fn read(at: i64, block: u64) -> TraceAccess {
        TraceAccess {
            at: at * S,
            volume: "v".into(),
            access: Access::Read,
            range: ByteRange::new(block * BLOCK, BLOCK),
        }
    }

    /// Every hour the same hundred scattered blocks within ten seconds, others beside and between.
    fn trace(hours: i64, altered_from: i64) -> (Vec<TraceAccess>, Vec<GivenBurst>) {
        let mut accesses = Vec::new();
        let mut bursts = Vec::new();
        for hour in 0..hours {
            for i in 0..300u64 {
                let at = hour * 3600 + 100 + i as i64 * 10;
                accesses.push(read(at, 500_000 + (hour as u64 * 300 + i) * 37 % 9973));
            }
            let start = hour * 3600 + 3590;
            for i in 0..100u64 {
                let block = if start >= altered_from { 77 } else { 1 } + i * 1013 % 90_000;
                accesses.push(read(start + i as i64 / 10, block));
            }
            bursts.push(GivenBurst {
                volume: "v".into(),
                start: start * S,
                end: (start + 10) * S,
            });
        }
        (accesses, bursts)
    }

    fn chosen(accesses: &[TraceAccess], bursts: &[GivenBurst], budget: Amount) -> Vec<ChosenBlock> {
        let mut all = Vec::new();
        let accesses = accesses.iter().cloned().map(Ok::<_, ()>);
        staging(accesses, bursts, budget, BLOCK as u32, &mut |c| all.push(c)).unwrap();
        all
    }

    #[test]
    fn what_earlier_bursts_read_is_chosen_within_the_budget() {
        let (accesses, bursts) = trace(12, i64::MAX);
        let all = chosen(&accesses, &bursts, Amount::Bytes(100 * BLOCK));
        let last = bursts.last().unwrap().start;
        let of_last: Vec<&ChosenBlock> = all.iter().filter(|c| c.burst_start == last).collect();
        assert_eq!(of_last.len(), 100);
        let right = of_last.iter().filter(|c| c.offset < 100_000 * BLOCK);
        assert!(right.count() >= 95, "the blocks of the bursts before");
        assert!(of_last.iter().enumerate().all(|(nth, c)| c.rank == nth));
        let few = chosen(&accesses, &bursts, Amount::Share(0.01));
        let of_last = few.iter().filter(|c| c.burst_start == last).count();
        // The footprint before it: about 3,600 blocks between the bursts, and a hundred in them.
        assert!((20..=40).contains(&of_last), "{of_last}");
    }

    #[test]
    fn nothing_chosen_for_a_burst_depends_on_what_came_after_it() {
        let cut = 8 * 3600 + 3590;
        let (a, bursts) = trace(12, i64::MAX);
        let (b, _) = trace(12, cut);
        assert_ne!(a, b);
        let until = |accesses: &[TraceAccess]| {
            let mut all = chosen(accesses, &bursts, Amount::Bytes(100 * BLOCK));
            all.retain(|c| c.burst_start <= cut * S);
            all
        };
        assert!(until(&a).len() > 500);
        assert_eq!(until(&a), until(&b));
        assert_ne!(
            chosen(&a, &bursts, Amount::Bytes(100 * BLOCK)),
            chosen(&b, &bursts, Amount::Bytes(100 * BLOCK))
        );
    }

    #[test]
    fn a_burst_after_the_last_access_is_chosen_for_too() {
        let (accesses, mut bursts) = trace(3, i64::MAX);
        bursts.push(GivenBurst {
            volume: "v".into(),
            start: 100 * 3600 * S,
            end: 101 * 3600 * S,
        });
        let all = chosen(&accesses, &bursts, Amount::Bytes(10 * BLOCK));
        assert!(all.iter().any(|c| c.burst_start == 100 * 3600 * S));
        assert!(chosen(&accesses, &[], Amount::Bytes(10 * BLOCK)).is_empty());
    }

    #[test]
    fn a_cache_is_counted_alone_and_with_staging_at_the_same_size() {
        let (accesses, bursts) = trace(40, i64::MAX);
        let all = || accesses.iter().cloned().map(Ok::<_, ()>);
        let footprints = footprints(all(), BLOCK as u32).unwrap();
        assert_eq!(footprints["v"], 9973 + 100);
        let capacity = Amount::Share(0.02);
        let counts = cache(all(), &footprints, &bursts, capacity, BLOCK as u32).unwrap();
        let counts = &counts[0];
        assert_eq!(counts.capacity_blocks, 201);
        assert_eq!(counts.reads, 40 * 400);
        let with = counts.misses_with_staging.unwrap();
        assert!(with <= counts.misses, "{counts:?}");
        assert!(counts.misses <= counts.reads);
        let without = cache(all(), &footprints, &[], capacity, BLOCK as u32).unwrap();
        assert_eq!(without[0].misses_with_staging, None);
        assert_eq!(without[0].misses, counts.misses);
    }
}
