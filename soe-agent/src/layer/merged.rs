//! One index over all layers of a chain: where every block of the image is. Its look-ups cost the
//! same however many layers there are.

use super::error::LayerError;
use super::index::{Entry, LayerIndex};
use crate::seam::ByteRange;

/// What an extent of the image consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Consecutive entries of the layer's index, the first of them at this place.
    Data {
        /// Place of the extent's first block in [`LayerIndex::entries`].
        first_entry: usize,
    },
    /// Zeroes.
    Hole,
}

/// Consecutive blocks of the image that the same layer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first block.
    pub start: u64,
    /// Number of blocks, at least one.
    pub count: u64,
    /// The layer's place in the chain: 0 is the newest.
    pub layer: usize,
    /// What the blocks are.
    pub source: Source,
}

impl Extent {
    /// The block after the last.
    pub const fn end(&self) -> u64 {
        self.start + self.count
    }

    /// The part of it from block `from` up to `to`, which lie inside.
    pub(crate) fn cut(&self, from: u64, to: u64) -> Self {
        let source = match self.source {
            Source::Data { first_entry } => Source::Data {
                first_entry: first_entry + (from - self.start) as usize,
            },
            Source::Hole => Source::Hole,
        };
        Self {
            start: from,
            count: to - from,
            layer: self.layer,
            source,
        }
    }
}

/// The merged index of an image.
#[derive(Clone, Debug)]
pub struct MergedIndex {
    volume_bytes: u64,
    block_size: u32,
    /// Newest first, the baseline last.
    layers: Vec<LayerIndex>,
    /// Ascending, disjoint, without a gap.
    extents: Vec<Extent>,
}

impl MergedIndex {
    /// Merges a chain's indexes, newest first: the newest layer that says something of a block wins.
    ///
    /// # Errors
    /// [`LayerError::Damaged`] when the layers are of different sizes or no layer says anything of
    /// some block.
    pub fn new(layers: Vec<LayerIndex>) -> Result<Self, LayerError> {
        let damaged = |what: String| LayerError::damaged("a chain", what);
        let newest = layers
            .first()
            .ok_or_else(|| damaged("it has no layers".into()))?;
        let (volume_bytes, block_size, blocks) =
            (newest.volume_bytes, newest.block_size, newest.block_count());
        if layers
            .iter()
            .any(|layer| (layer.volume_bytes, layer.block_size) != (volume_bytes, block_size))
        {
            return Err(damaged("its layers are of different sizes".into()));
        }
        let mut extents = Vec::new();
        for (place, layer) in layers.iter().enumerate() {
            extents = add_older(extents, extents_of(layer, place));
        }
        let mut covered = 0;
        for extent in &extents {
            if extent.start != covered {
                break;
            }
            covered = extent.end();
        }
        if covered != blocks {
            return Err(damaged(format!(
                "no layer of it says anything of block {covered}"
            )));
        }
        Ok(Self {
            volume_bytes,
            block_size,
            layers,
            extents,
        })
    }

    /// Bytes of the volume.
    pub fn volume_bytes(&self) -> u64 {
        self.volume_bytes
    }

    /// Bytes of a block; the last one may be shorter.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Number of blocks.
    pub fn block_count(&self) -> u64 {
        self.volume_bytes.div_ceil(u64::from(self.block_size))
    }

    /// The bytes of `block` in the volume.
    pub fn block_range(&self, block: u64) -> ByteRange {
        let offset = block
            .saturating_mul(u64::from(self.block_size))
            .min(self.volume_bytes);
        ByteRange::new(
            offset,
            u64::from(self.block_size).min(self.volume_bytes - offset),
        )
    }

    /// The layers' indexes, newest first.
    pub fn layers(&self) -> &[LayerIndex] {
        &self.layers
    }

    /// All extents, ascending, without a gap.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The extent that `block` is in; `None` beyond the end.
    pub fn extent_of(&self, block: u64) -> Option<&Extent> {
        let after = self.extents.partition_point(|extent| extent.start <= block);
        self.extents
            .get(after.checked_sub(1)?)
            .filter(|extent| block < extent.end())
    }

    /// The entry of the block at `nth` in `extent`; `None` for a hole.
    pub fn entry(&self, extent: &Extent, nth: u64) -> Option<&Entry> {
        match extent.source {
            Source::Data { first_entry } => self
                .layers
                .get(extent.layer)?
                .entries
                .get(first_entry + nth as usize),
            Source::Hole => None,
        }
    }

    /// The layer and entry that `block` is read from; `None` when it is a hole or beyond the end.
    pub fn lookup(&self, block: u64) -> Option<(usize, &Entry)> {
        let extent = self.extent_of(block)?;
        Some((extent.layer, self.entry(extent, block - extent.start)?))
    }

    /// The ranges of the volume that hold data, ascending and merged.
    pub fn allocated(&self) -> Vec<ByteRange> {
        let data = self
            .extents
            .iter()
            .filter(|extent| extent.source != Source::Hole);
        self.byte_ranges(data.map(|extent| extent.start..extent.end()))
    }

    /// The ranges whose content differs between `self` and `other`, ascending and merged. Both must
    /// have the same block size; what only one of them has differs.
    pub fn differences(&self, other: &MergedIndex) -> Vec<ByteRange> {
        let larger = if self.volume_bytes >= other.volume_bytes {
            self
        } else {
            other
        };
        // None beyond the end, some none for a hole.
        let hash = |index: &MergedIndex, block: u64| {
            let extent = index.extent_of(block)?;
            Some(
                index
                    .entry(extent, block - extent.start)
                    .map(|entry| entry.hash),
            )
        };
        let mut differing = super::runs::RunSet::default();
        let mut block = 0;
        while block < larger.block_count() {
            // Where both say "hole" they agree for as long as both extents last.
            let holes = [self, other].map(|index| {
                index
                    .extent_of(block)
                    .filter(|extent| extent.source == Source::Hole)
                    .map(Extent::end)
            });
            if let [Some(mine), Some(theirs)] = holes {
                block = mine.min(theirs);
                continue;
            }
            let same_length = self.block_range(block).len == other.block_range(block).len;
            if !same_length || hash(self, block) != hash(other, block) {
                differing.insert(block..block + 1);
            }
            block += 1;
        }
        larger.byte_ranges(differing.iter())
    }

    fn byte_ranges(&self, runs: impl Iterator<Item = std::ops::Range<u64>>) -> Vec<ByteRange> {
        let mut out: Vec<ByteRange> = Vec::new();
        for run in runs {
            let start = self.block_range(run.start).offset;
            let end = self.block_range(run.end - 1).end();
            match out.last_mut() {
                Some(last) if last.end() == start => last.len = end - last.offset,
                _ => out.push(ByteRange::new(start, end - start)),
            }
        }
        out
    }
}

/// The extents of one layer, ascending.
fn extents_of(layer: &LayerIndex, place: usize) -> Vec<Extent> {
    let mut out: Vec<Extent> = Vec::new();
    for (first_entry, entry) in layer.entries.iter().enumerate() {
        match out.last_mut() {
            Some(last) if last.end() == entry.block => last.count += 1,
            _ => out.push(Extent {
                start: entry.block,
                count: 1,
                layer: place,
                source: Source::Data { first_entry },
            }),
        }
    }
    let holes = layer.holes.iter();
    out.extend(holes.map(|run| Extent {
        start: run.start,
        count: run.end - run.start,
        layer: place,
        source: Source::Hole,
    }));
    out.sort_by_key(|extent| extent.start);
    out
}

/// Fills the gaps between `newer` with what `older` has there. Both ascend, and so does the result.
fn add_older(newer: Vec<Extent>, older: Vec<Extent>) -> Vec<Extent> {
    if newer.is_empty() {
        return older;
    }
    let mut out = Vec::with_capacity(newer.len() + older.len());
    let mut newer = newer.into_iter().peekable();
    for extent in older {
        let mut from = extent.start;
        while from < extent.end() {
            // Everything newer that begins at or before `from` comes first and hides what it covers.
            if let Some(next) = newer.next_if(|next| next.start <= from) {
                from = from.max(next.end());
                out.push(next);
                continue;
            }
            let to = newer
                .peek()
                .map_or(extent.end(), |next| next.start.min(extent.end()));
            // Blocks hidden by a newer extent pushed before this older one began.
            let hidden = out.last().map_or(0, Extent::end);
            from = from.max(hidden);
            if from < to {
                out.push(extent.cut(from, to));
            }
            from = from.max(to);
        }
    }
    out.extend(newer);
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::super::codec::Codec;
    use super::super::hash::Hash32;
    use super::super::runs::RunSet;
    use super::*;

    const BLOCKS: u64 = 40;

    /// A layer from one letter per block: 0 says nothing, 1 a hole, others data with that hash.
    fn layer(letters: &[u8]) -> LayerIndex {
        let mut holes = RunSet::default();
        let mut entries = Vec::new();
        for (block, &letter) in (0..).zip(letters) {
            match letter {
                0 => {}
                1 => holes.insert(block..block + 1),
                _ => entries.push(Entry {
                    block,
                    offset: 0,
                    stored_len: 1,
                    segment: 0,
                    codec: Codec::Raw,
                    hash: Hash32([letter; 32]),
                }),
            }
        }
        LayerIndex {
            attempt: Uuid::nil(),
            volume: 0,
            volume_bytes: BLOCKS * 512 - 100,
            block_size: 512,
            entries,
            holes: holes.iter().collect(),
        }
    }

    fn letters(low: u8) -> impl Strategy<Value = Vec<u8>> {
        // Runs, so that extents form.
        proptest::collection::vec((low..6, 1usize..9), BLOCKS as usize).prop_map(|runs| {
            runs.into_iter()
                .flat_map(|(letter, len)| vec![letter; len])
                .take(BLOCKS as usize)
                .collect()
        })
    }

    /// The oracle: letter and layer of each block.
    fn newest_wins(layers: &[Vec<u8>]) -> Vec<(u8, usize)> {
        let at = |block: usize| {
            layers
                .iter()
                .enumerate()
                .find(|(_, layer)| layer[block] != 0)
        };
        (0..BLOCKS as usize)
            .map(|block| {
                at(block)
                    .map(|(place, layer)| (layer[block], place))
                    .unwrap()
            })
            .collect()
    }

    proptest! {
        #[test]
        fn the_newest_layer_wins(
            mut layers in proptest::collection::vec(letters(0), 0..6), baseline in letters(1), other in letters(1)
        ) {
            layers.push(baseline);
            let expected = newest_wins(&layers);
            let merged = MergedIndex::new(layers.iter().map(|letters| layer(letters)).collect()).unwrap();
            for (block, (letter, place)) in (0..).zip(&expected) {
                let extent = merged.extent_of(block).unwrap();
                prop_assert_eq!(extent.layer, *place, "block {}", block);
                let hash = merged.lookup(block).map(|(_, entry)| (entry.block, entry.hash));
                prop_assert_eq!(hash, (*letter > 1).then_some((block, Hash32([*letter; 32]))));
            }
            prop_assert!(merged.extent_of(BLOCKS).is_none());
            prop_assert_eq!(merged.extents().iter().map(|extent| extent.count).sum::<u64>(), BLOCKS);

            let ranges = |differs: &dyn Fn(usize) -> bool| {
                let mut runs = RunSet::default();
                (0..BLOCKS).filter(|block| differs(*block as usize)).for_each(|block| runs.insert(block..block + 1));
                runs.iter()
                    .map(|run| ByteRange::new(run.start * 512, (run.end * 512).min(BLOCKS * 512 - 100) - run.start * 512))
                    .collect::<Vec<_>>()
            };
            prop_assert_eq!(merged.allocated(), ranges(&|block| expected[block].0 > 1));
            let against = MergedIndex::new(vec![layer(&other)]).unwrap();
            prop_assert_eq!(merged.differences(&against), ranges(&|block| expected[block].0 != other[block]));
        }
    }

    #[test]
    fn a_block_that_no_layer_knows_is_damage() {
        for missing in [0, 7, BLOCKS as usize - 1] {
            let mut letters = vec![2; BLOCKS as usize];
            letters[missing] = 0;
            let error = MergedIndex::new(vec![layer(&letters)]).unwrap_err();
            assert!(
                error.to_string().contains(&format!("block {missing}")),
                "{error}"
            );
        }
    }
}
