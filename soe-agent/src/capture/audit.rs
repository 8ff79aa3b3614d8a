//! The audit: some blocks that nothing says have changed are read again after the cut and held
//! against what the layer, with its chain, says they contain.
//!
//! A block whose content differs although it carries no mark since the cut is a change that neither
//! mark saw: a backing file written behind the device, a command that bypasses bios, a fault of the
//! map. Then nothing else in the map can be believed: a differential is given up and the generation
//! ends. A layer that read everything is kept, because another could tell no more.
//!
//! What it is worth: if a share `s` of a volume's blocks is wrong, one audit of `n` blocks finds it with
//! probability `1 - (1 - s)^n`. It finds a map that is often wrong soon, and a single forgotten block
//! of a large volume hardly ever; that one lasts until the next baseline, which reads everything.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::ranges;
use crate::seam::ByteRange;

/// Blocks that one audit of a volume reads.
pub const AUDIT_BLOCKS: u32 = 32;

/// Bytes of one audit of a volume, where blocks are large; a few blocks are read all the same.
const AUDIT_BYTES: u64 = 4 << 20;
/// For how long the audit of a group may hold its layer back. What is not read by then is not judged.
pub(super) const AUDIT_TIME: Duration = Duration::from_secs(2);

/// How many of `count` blocks of `unit` bytes one audit reads.
pub(super) fn affordable(count: u32, unit: u32) -> u32 {
    let most = AUDIT_BYTES / u64::from(unit.max(1));
    count.min(u32::try_from(most).unwrap_or(u32::MAX).max(4))
}

/// Chooses up to `count` of the volume's blocks, ascending: half of them among `recent`, where writes
/// completed lately (ranges in whole blocks), half anywhere; everything where that is not more than
/// `count` blocks. The same `seed` chooses the same.
pub(super) fn choose(
    recent: &[ByteRange],
    unit: u32,
    bytes: u64,
    count: u32,
    seed: u64,
) -> Vec<ByteRange> {
    let size = u64::from(unit.max(1));
    let blocks = bytes.div_ceil(size);
    let recent_blocks = ranges::total(recent).div_ceil(size);
    if blocks == 0 {
        return Vec::new();
    }
    if u64::from(count) >= blocks {
        return vec![ByteRange::new(0, bytes)];
    }
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut chosen: Vec<ByteRange> = (0..count)
        .filter_map(|nth| {
            let block = if nth % 2 == 0 && recent_blocks > 0 {
                nth_block(recent, size, rng.random_range(0..recent_blocks))?
            } else {
                rng.random_range(0..blocks)
            };
            Some(ByteRange::new(block * size, size.min(bytes - block * size)))
        })
        .collect();
    chosen.sort();
    chosen.dedup();
    chosen
}

/// The block at `nth` of those that `ranges` cover.
fn nth_block(ranges: &[ByteRange], size: u64, mut nth: u64) -> Option<u64> {
    for range in ranges {
        let here = range.len.div_ceil(size);
        if nth < here {
            return Some(range.offset / size + nth);
        }
        nth -= here;
    }
    None
}

/// Whether `block` lies in none of the ascending, disjoint `changed`.
pub(super) fn unchanged(block: &ByteRange, changed: &[ByteRange]) -> bool {
    let after = changed.partition_point(|range| range.end() <= block.offset);
    changed
        .get(after)
        .is_none_or(|range| range.offset >= block.end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chosen_blocks_are_whole_distinct_and_inside(
            bytes in 0u64..5000,
            raw in proptest::collection::vec((0u64..40, 1u64..5), 0..6),
            count in 0u32..40,
            seed: u64,
        ) {
            let raw: Vec<ByteRange> = {
                let mut sorted = raw;
                sorted.sort();
                sorted.into_iter().map(|(block, len)| ByteRange::new(block * 128, len * 128)).collect()
            };
            let recent = ranges::widen(&raw, 128, bytes);
            let chosen = choose(&recent, 128, bytes, count, seed);
            prop_assert!(ranges::total(&chosen).div_ceil(128) <= u64::from(count));
            for pair in chosen.windows(2) {
                prop_assert!(pair[0].end() <= pair[1].offset);
            }
            for block in &chosen {
                prop_assert!(block.offset % 128 == 0 && block.end() <= bytes);
                prop_assert!(block.len == 128 || block.end() == bytes || u64::from(count) >= bytes.div_ceil(128));
            }
            let lies_in = |block: &ByteRange| recent.iter().any(|r| r.offset < block.end() && block.offset < r.end());
            if count >= 16 && !recent.is_empty() {
                prop_assert!(chosen.iter().any(lies_in), "none where writes completed lately");
            }
            prop_assert_eq!(chosen, choose(&recent, 128, bytes, count, seed));
        }

        #[test]
        fn unchanged_is_what_no_range_touches(
            block in 0u64..60,
            raw in proptest::collection::vec((0u64..500, 1u64..60), 0..8),
        ) {
            let mut raw: Vec<ByteRange> = raw.into_iter().map(|(o, l)| ByteRange::new(o, l)).collect();
            raw.sort();
            let changed = ranges::widen(&raw, 1, u64::MAX);
            let block = ByteRange::new(block * 10, 10);
            let touched = changed.iter().any(|r| r.offset < block.end() && block.offset < r.end());
            prop_assert_eq!(unchanged(&block, &changed), !touched);
        }
    }

    #[test]
    fn every_block_is_chosen_sooner_or_later() {
        let recent = [ByteRange::new(0, 128)];
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..200 {
            seen.extend(
                choose(&recent, 128, 20 * 128, 8, seed)
                    .iter()
                    .map(|r| r.offset / 128),
            );
        }
        assert_eq!(seen.len(), 20);
    }
}
