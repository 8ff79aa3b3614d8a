//! What precedes a burst, as a small sketch, to tell kinds of bursts apart. Pure.
//!
//! A volume has bursts of several kinds: a boot, a backup, a start of work. Which kind comes is
//! often visible in what was touched just before, such as what a shutdown touches. The idea is
//! context-based prediction (as in tagged geometric history, or in the probability graph of
//! Griffioen and Appleton, USENIX 1994), here by the Dice similarity of two sets of block hashes.

use std::collections::VecDeque;

use crate::stage::hash::mix;

/// Different blocks in a sketch.
const DISTINCT: usize = 384;

/// The last blocks touched, newest last.
#[derive(Clone, Debug, Default)]
pub struct Recent {
    blocks: VecDeque<u32>,
}

/// The blocks touched before a moment: their hashes, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sketch {
    hashes: Vec<u32>,
}

impl Recent {
    /// Notes that block `index` was touched.
    pub fn touch(&mut self, index: u64) {
        let hash = (mix(index) >> 32) as u32;
        if self.blocks.back() == Some(&hash) {
            return;
        }
        if self.blocks.len() >= 4 * DISTINCT {
            self.blocks.pop_front();
        }
        self.blocks.push_back(hash);
    }

    /// The last different blocks, up to 384 of them.
    pub fn sketch(&self) -> Sketch {
        let mut hashes: Vec<u32> = Vec::with_capacity(DISTINCT);
        let mut seen = std::collections::HashSet::with_capacity(DISTINCT);
        for hash in self.blocks.iter().rev() {
            if hashes.len() >= DISTINCT {
                break;
            }
            if seen.insert(*hash) {
                hashes.push(*hash);
            }
        }
        hashes.sort_unstable();
        Sketch { hashes }
    }
}

impl Sketch {
    /// The Dice similarity, 0 (nothing in common) to 1 (the same blocks).
    pub fn similarity(&self, other: &Self) -> f64 {
        let (mut a, mut b) = (
            self.hashes.iter().peekable(),
            other.hashes.iter().peekable(),
        );
        let mut common = 0usize;
        while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
            match x.cmp(y) {
                std::cmp::Ordering::Less => drop(a.next()),
                std::cmp::Ordering::Greater => drop(b.next()),
                std::cmp::Ordering::Equal => {
                    common += 1;
                    a.next();
                    b.next();
                }
            }
        }
        let both = self.hashes.len() + other.hashes.len();
        if both == 0 {
            0.0
        } else {
            2.0 * common as f64 / both as f64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(blocks: std::ops::Range<u64>) -> Sketch {
        let mut recent = Recent::default();
        blocks.for_each(|b| recent.touch(b));
        recent.sketch()
    }

    #[test]
    fn the_same_blocks_are_similar_whatever_came_long_before() {
        let mut recent = Recent::default();
        (10_000..20_000).for_each(|b| recent.touch(b));
        (0..500).for_each(|b| recent.touch(b));
        assert!((recent.sketch().similarity(&after(0..500)) - 1.0).abs() < 1e-9);
        assert!(recent.sketch().similarity(&after(10_000..10_500)) < 0.01);
        let half = after(0..100).similarity(&after(50..150));
        assert!((half - 0.5).abs() < 0.01, "{half}");
        assert_eq!(Sketch::default().similarity(&Sketch::default()), 0.0);
    }

    #[test]
    fn memory_is_bounded_when_one_block_is_hammered() {
        let mut recent = Recent::default();
        (0..100_000u64).for_each(|i| recent.touch(i % 2));
        assert!(recent.blocks.len() <= 4 * DISTINCT);
        assert_eq!(recent.sketch().hashes.len(), 2);
    }
}
