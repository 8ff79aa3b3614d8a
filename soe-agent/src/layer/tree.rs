//! The state tree: a Merkle tree over the blocks of a whole image.
//!
//! 16 children to a node, so that a changed block costs one hash of 512 bytes for each of at most
//! fourteen levels. Parts that are all zero take no memory, and a clone shares what is not changed
//! afterwards: a capture works on a clone and the parent stays as it is.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use super::hash::{Domain, Hash32};

const FANOUT: u64 = 16;
const CHUNK: u64 = 256;

type Chunk = [Hash32; CHUNK as usize];

/// The hashes of one level. What is not in a chunk is the hash of an all-zero part.
#[derive(Clone, Debug)]
struct Level {
    len: u64,
    zero: Hash32,
    chunks: BTreeMap<u64, Arc<Chunk>>,
}

impl Level {
    fn get(&self, index: u64) -> Hash32 {
        match self.chunks.get(&(index / CHUNK)) {
            Some(chunk) => chunk
                .get((index % CHUNK) as usize)
                .copied()
                .unwrap_or(self.zero),
            None => self.zero,
        }
    }

    fn set(&mut self, index: u64, hash: Hash32) {
        if hash == self.zero && !self.chunks.contains_key(&(index / CHUNK)) {
            return;
        }
        let chunk = self
            .chunks
            .entry(index / CHUNK)
            .or_insert_with(|| Arc::new([self.zero; CHUNK as usize]));
        if let Some(slot) = Arc::make_mut(chunk).get_mut((index % CHUNK) as usize) {
            *slot = hash;
        }
    }
}

/// The hashes of every block of an image, and the tree above them.
#[derive(Clone, Debug)]
pub struct StateTree {
    volume_bytes: u64,
    block_size: u32,
    /// Leaves first; the last level has one node.
    levels: Vec<Level>,
}

impl StateTree {
    /// The tree of an image of zeroes. `volume_bytes` and `block_size` are at least 1.
    pub fn new(volume_bytes: u64, block_size: u32) -> Self {
        let blocks = volume_bytes.div_ceil(u64::from(block_size.max(1))).max(1);
        let mut levels = vec![Level {
            len: blocks,
            zero: Hash32::ZERO_BLOCK,
            chunks: BTreeMap::new(),
        }];
        while let Some(below) = levels.last().filter(|level| level.len > 1) {
            let len = below.len.div_ceil(FANOUT);
            let zero = node_hash(levels.len() as u8, &[below.zero; FANOUT as usize]);
            levels.push(Level {
                len,
                zero,
                chunks: BTreeMap::new(),
            });
        }
        let mut tree = Self {
            volume_bytes,
            block_size,
            levels,
        };
        // The last node of a level may have fewer children than a full one.
        tree.rehash_above(vec![blocks - 1]);
        tree
    }

    /// Number of blocks.
    pub fn block_count(&self) -> u64 {
        self.levels.first().map_or(0, |leaves| leaves.len)
    }

    /// The hash of a block; [`Hash32::ZERO_BLOCK`] for a zero one.
    pub fn block_hash(&self, block: u64) -> Hash32 {
        self.levels
            .first()
            .map_or(Hash32::ZERO_BLOCK, |leaves| leaves.get(block))
    }

    /// Sets the hashes of blocks and brings the tree up to date. `changes` are ascending; blocks
    /// beyond the image are ignored.
    pub fn update(&mut self, changes: impl IntoIterator<Item = (u64, Hash32)>) {
        let Some(leaves) = self.levels.first_mut() else {
            return;
        };
        let mut touched: Vec<u64> = Vec::new();
        for (block, hash) in changes {
            if block < leaves.len && leaves.get(block) != hash {
                leaves.set(block, hash);
                // One entry for each parent is enough: it is what is hashed again.
                if touched
                    .last()
                    .is_none_or(|last| last / FANOUT != block / FANOUT)
                {
                    touched.push(block);
                }
            }
        }
        self.rehash_above(touched);
    }

    /// Recomputes the nodes above the leaves `touched`, which are ascending.
    fn rehash_above(&mut self, mut touched: Vec<u64>) {
        for height in 1..self.levels.len() {
            touched.iter_mut().for_each(|index| *index /= FANOUT);
            touched.dedup();
            let (below, above) = self.levels.split_at_mut(height);
            let (Some(below), Some(level)) = (below.last(), above.first_mut()) else {
                return;
            };
            for &index in &touched {
                let first = index * FANOUT;
                let count = FANOUT.min(below.len.saturating_sub(first)) as usize;
                let mut children = [Hash32::ZERO_BLOCK; FANOUT as usize];
                for (child, at) in children.iter_mut().take(count).zip(first..) {
                    *child = below.get(at);
                }
                level.set(
                    index,
                    node_hash(height as u8, children.get(..count).unwrap_or_default()),
                );
            }
        }
    }

    /// The root over the whole image, its size and its block size.
    pub fn root(&self) -> Hash32 {
        static DOMAIN: OnceLock<Domain> = OnceLock::new();
        let top = self
            .levels
            .last()
            .map_or(Hash32::ZERO_BLOCK, |level| level.get(0));
        DOMAIN
            .get_or_init(|| Domain::new("soe layer state root 1"))
            .hash(&[
                &self.volume_bytes.to_le_bytes(),
                &self.block_size.to_le_bytes(),
                &top.0,
            ])
    }
}

fn node_hash(height: u8, children: &[Hash32]) -> Hash32 {
    static DOMAIN: OnceLock<Domain> = OnceLock::new();
    let mut bytes = [0u8; 1 + 32 * FANOUT as usize];
    let (first, rest) = bytes.split_at_mut(1);
    first.fill(height);
    for (slot, child) in rest.chunks_exact_mut(32).zip(children) {
        slot.copy_from_slice(&child.0);
    }
    let used = bytes.get(..1 + 32 * children.len()).unwrap_or_default();
    DOMAIN
        .get_or_init(|| Domain::new("soe layer state node 1"))
        .hash(&[used])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The root by the definition in docs/layer-format.md, without any of the shortcuts.
    fn root_by_definition(volume_bytes: u64, block_size: u32, leaves: &[Hash32]) -> Hash32 {
        let mut level = leaves.to_vec();
        let mut height = 1u8;
        while level.len() > 1 {
            level = level
                .chunks(16)
                .map(|children| {
                    let mut hasher = blake3::Hasher::new_derive_key("soe layer state node 1");
                    hasher.update(&[height]);
                    children.iter().for_each(|child| {
                        hasher.update(&child.0);
                    });
                    Hash32(*hasher.finalize().as_bytes())
                })
                .collect();
            height += 1;
        }
        let mut hasher = blake3::Hasher::new_derive_key("soe layer state root 1");
        hasher.update(&volume_bytes.to_le_bytes());
        hasher.update(&block_size.to_le_bytes());
        hasher.update(&level[0].0);
        Hash32(*hasher.finalize().as_bytes())
    }

    fn leaf(seed: u8) -> Hash32 {
        if seed == 0 {
            Hash32::ZERO_BLOCK
        } else {
            Hash32([seed; 32])
        }
    }

    proptest! {
        #[test]
        fn incremental_updates_give_the_root_by_definition(
            blocks in 1u64..900,
            short in 0u64..512,
            rounds in proptest::collection::vec(proptest::collection::btree_map(0u64..900, 0u8..4, 0..40), 0..5),
        ) {
            let volume_bytes = blocks * 512 - short;
            let mut leaves = vec![Hash32::ZERO_BLOCK; blocks as usize];
            let mut tree = StateTree::new(volume_bytes, 512);
            prop_assert_eq!(tree.root(), root_by_definition(volume_bytes, 512, &leaves));
            for round in rounds {
                let before = tree.clone();
                let before_root = before.root();
                let changes: Vec<_> = round.into_iter().filter(|(block, _)| *block < blocks).collect();
                tree.update(changes.iter().map(|&(block, seed)| (block, leaf(seed))));
                for (block, seed) in changes {
                    leaves[block as usize] = leaf(seed);
                }
                prop_assert_eq!(tree.root(), root_by_definition(volume_bytes, 512, &leaves));
                prop_assert_eq!(before.root(), before_root, "a clone must not see later updates");
                prop_assert!((0..blocks).all(|block| tree.block_hash(block) == leaves[block as usize]));
            }
        }
    }

    #[test]
    fn size_block_size_and_position_are_part_of_the_root() {
        let roots = [
            StateTree::new(1024, 512).root(),
            StateTree::new(1023, 512).root(),
            StateTree::new(2048, 1024).root(),
        ];
        assert!(roots[0] != roots[1] && roots[0] != roots[2] && roots[1] != roots[2]);
        let one_set = |at| {
            let mut tree = StateTree::new(1 << 20, 512);
            tree.update([(at, leaf(1))]);
            tree.root()
        };
        assert_ne!(one_set(3), one_set(4));
        assert_ne!(one_set(3), one_set(3 + 16));
    }

    #[test]
    fn an_enormous_empty_image_costs_nothing() {
        let tree = StateTree::new(u64::MAX, 512);
        assert!(tree.levels.iter().all(|level| level.chunks.len() <= 1));
    }
}
