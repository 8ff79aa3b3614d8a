//! Sets of block numbers that mostly come in long runs.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of block numbers, kept as maximal runs: first block -> the block after the last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunSet {
    runs: BTreeMap<u64, u64>,
}

impl RunSet {
    /// Adds the blocks of `range`.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        // Every run that overlaps or touches is swallowed.
        while let Some((&run_start, &run_end)) = self.runs.range(..=end).next_back() {
            if run_end < start {
                break;
            }
            start = start.min(run_start);
            end = end.max(run_end);
            self.runs.remove(&run_start);
        }
        self.runs.insert(start, end);
    }

    /// Takes the blocks of `range` out.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        while let Some((&run_start, &run_end)) = self.runs.range(..range.end).next_back() {
            if run_end <= range.start {
                break;
            }
            self.runs.remove(&run_start);
            if run_end > range.end {
                self.runs.insert(range.end, run_end);
            }
            if run_start < range.start {
                self.runs.insert(run_start, range.start);
                break;
            }
        }
    }

    /// Whether `block` is in the set.
    pub fn contains(&self, block: u64) -> bool {
        self.runs
            .range(..=block)
            .next_back()
            .is_some_and(|(_, &end)| block < end)
    }

    /// The first block of `0..count` that is not in the set.
    pub fn first_gap(&self, count: u64) -> Option<u64> {
        let gap = match self.runs.first_key_value() {
            Some((&0, &end)) => end,
            _ => 0,
        };
        (gap < count).then_some(gap)
    }

    /// The runs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.runs.iter().map(|(&start, &end)| start..end)
    }

    /// The number of runs.
    pub fn run_count(&self) -> usize {
        self.runs.len()
    }

    /// The number of blocks.
    pub fn block_count(&self) -> u64 {
        self.iter().map(|run| run.end - run.start).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set_of_numbers(
            steps in proptest::collection::vec((any::<bool>(), 0u64..60, 0u64..12), 0..60)
        ) {
            let mut runs = RunSet::default();
            let mut oracle = BTreeSet::new();
            for (insert, start, len) in steps {
                let range = start..start + len;
                if insert {
                    runs.insert(range.clone());
                    oracle.extend(range);
                } else {
                    runs.remove(range.clone());
                    oracle.retain(|block| !range.contains(block));
                }
                prop_assert_eq!(runs.iter().flatten().collect::<Vec<_>>(), oracle.iter().copied().collect::<Vec<_>>());
                prop_assert_eq!(runs.block_count(), oracle.len() as u64);
                let ends: Vec<_> = runs.iter().collect();
                prop_assert!(ends.windows(2).all(|pair| pair[0].end < pair[1].start), "runs must be maximal");
                prop_assert_eq!(runs.first_gap(72), (0..72).find(|block| !oracle.contains(block)));
                prop_assert!((0..72).all(|block| runs.contains(block) == oracle.contains(&block)));
            }
        }
    }
}
