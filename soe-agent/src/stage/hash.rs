//! A hasher without a random seed: what is learned must not depend on the run. Pure.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A map from block indexes, the same in every run.
pub type BlockMap<V> = HashMap<u64, V, BuildHasherDefault<BlockHasher>>;

/// Spreads the bits of `x` (the finisher of SplitMix64; Steele, Lea and Flood, OOPSLA 2014).
pub fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Hashes block indexes. Not for keys that an attacker chooses freely: a volume's user can at worst
/// slow down the statistics of that volume.
#[derive(Clone, Copy, Debug, Default)]
pub struct BlockHasher(u64);

impl Hasher for BlockHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = mix(self.0 ^ u64::from(*byte));
        }
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = mix(self.0 ^ key.wrapping_add(0x9e37_79b9_7f4a_7c15));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_blocks_are_spread_the_same_way_in_every_run() {
        let mut low = std::collections::HashSet::new();
        for i in 0..1000u64 {
            low.insert(mix(i) & 0xffff);
        }
        assert!(low.len() > 980, "{} different of 1000", low.len());
        assert_eq!(mix(1), 0x5692_161d_100b_05e5);
    }
}
