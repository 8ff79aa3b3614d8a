//! What was chosen for staging, copied or not, and how much of it was read since: by that staging is
//! judged. Pure.

use std::collections::BTreeMap;

use crate::seam::ByteRange;

/// Ranges that were chosen together, and what was read of each.
#[derive(Clone, Debug, Default)]
pub struct Chosen {
    /// By offset: the length, and bytes read so far.
    ranges: BTreeMap<u64, (u64, f64)>,
    /// Whether the burst has come for which they were chosen.
    came: bool,
}

impl Chosen {
    /// Ranges of which nothing was read yet; they must not overlap.
    pub fn new(ranges: impl IntoIterator<Item = ByteRange>) -> Self {
        let ranges = ranges.into_iter().filter(|range| range.len > 0);
        Self {
            ranges: ranges.map(|r| (r.offset, (r.len, 0.0))).collect(),
            came: false,
        }
    }

    /// A burst has begun.
    pub fn burst_began(&mut self) {
        self.came = true;
    }

    /// Counts `bytes` that were read somewhere within `range`, evenly spread as far as is known.
    pub fn read(&mut self, range: ByteRange, bytes: f64) {
        let dense = bytes / range.len.max(1) as f64;
        if !dense.is_finite() {
            return;
        }
        let before = self.ranges.range(..range.offset).next_back();
        let from = before
            .filter(|(offset, (len, _))| **offset + len > range.offset)
            .map_or(range.offset, |(offset, _)| *offset);
        for (offset, (len, read)) in self.ranges.range_mut(from..range.end().max(from)) {
            let common = (offset + *len).min(range.end()) - (*offset).max(range.offset);
            *read += common as f64 * dense;
        }
    }

    /// Takes out what is overwritten before anything of it was read: its copy would be worth nothing.
    pub fn overwritten(&mut self, range: ByteRange) {
        let lost = self
            .ranges
            .range_mut(range.offset..range.end().max(range.offset));
        for (_, (_, read)) in lost {
            if *read == 0.0 {
                *read = f64::NEG_INFINITY;
            }
        }
    }

    /// Bytes chosen, and bytes of them that were read, however often; none if no burst came: what is read
    /// anyhow was not worth staging for it.
    pub fn score(&self) -> (u64, u64) {
        let came = f64::from(u8::from(self.came));
        self.ranges
            .values()
            .fold((0, 0), |(all, used), (len, read)| {
                (
                    all + len,
                    used + (came * read.clamp(0.0, *len as f64)) as u64,
                )
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(i: u64) -> ByteRange {
        ByteRange::new(i * 4096, 4096)
    }

    /// Ranges chosen for a burst that came.
    fn chosen(ranges: impl IntoIterator<Item = ByteRange>) -> Chosen {
        let mut chosen = Chosen::new(ranges);
        chosen.burst_began();
        chosen
    }

    #[test]
    fn what_was_chosen_for_a_burst_that_never_came_was_chosen_in_vain() {
        let mut alarm = Chosen::new([block(0)]);
        alarm.read(block(0), 4096.0);
        assert_eq!(alarm.score(), (4096, 0));
        alarm.burst_began();
        assert_eq!(alarm.score(), (4096, 4096));
    }

    #[test]
    fn what_was_read_counts_once_and_only_where_it_was_chosen() {
        let mut chosen = self::chosen([block(1), block(3), block(9)]);
        chosen.read(ByteRange::new(0, 4 * 4096), 4.0 * 4096.0);
        chosen.read(block(3), 4096.0);
        assert_eq!(chosen.score(), (3 * 4096, 2 * 4096));
        // Half a block, from its middle on.
        chosen.read(ByteRange::new(9 * 4096 + 2048, 4096), 4096.0);
        assert_eq!(chosen.score().1, 2 * 4096 + 2048);
    }

    #[test]
    fn a_few_reads_of_a_large_range_are_not_all_of_it() {
        let mut chosen = self::chosen([ByteRange::new(0, 1 << 20)]);
        chosen.read(ByteRange::new(0, 1 << 20), 16.0 * 4096.0);
        assert_eq!(chosen.score(), (1 << 20, 16 * 4096));
    }

    #[test]
    fn what_is_overwritten_before_it_is_read_was_chosen_in_vain() {
        let mut chosen = self::chosen([block(0), block(1)]);
        chosen.read(block(1), 4096.0);
        chosen.overwritten(ByteRange::new(0, 2 * 4096));
        chosen.read(ByteRange::new(0, 2 * 4096), 2.0 * 4096.0);
        assert_eq!(chosen.score(), (2 * 4096, 4096));
    }

    proptest! {
        #[test]
        fn never_more_is_used_than_chosen(
            chosen in proptest::collection::btree_set(0u64..50, 0..20),
            acts in proptest::collection::vec((any::<bool>(), any::<u64>(), any::<u64>(), -1e9f64..1e9), 0..50),
        ) {
            let mut all = self::chosen(chosen.iter().map(|i| block(*i)));
            for (read, offset, len, bytes) in acts {
                let offset = offset % 300_000;
                let range = ByteRange::new(offset, len.min(u64::MAX - offset));
                if read { all.read(range, bytes) } else { all.overwritten(range) }
            }
            let (bytes, used) = all.score();
            prop_assert_eq!(bytes, chosen.len() as u64 * 4096);
            prop_assert!(used <= bytes);
        }
    }
}
