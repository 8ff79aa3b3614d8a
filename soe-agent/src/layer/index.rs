//! The index of one volume's layer: where each of its blocks is, and what it must hash to.
//!
//! Fixed-size entries sorted by block, then the runs of zero blocks. The layout is in
//! docs/layer-format.md.

use std::ops::Range;

use uuid::Uuid;

use super::codec::Codec;
use super::error::LayerError;
use super::hash::Hash32;
use super::manifest::valid_geometry;
use super::wire::Reader;

const MAGIC: &[u8; 8] = b"SOEINDX\0";
const VERSION: u16 = 1;
const HEADER_LEN: usize = 64;
const ENTRY_LEN: usize = 64;
const HOLE_LEN: usize = 16;
const TRAILER_LEN: usize = 8;

/// Where a block with data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The block's number in the volume.
    pub block: u64,
    /// First byte in the segment.
    pub offset: u64,
    /// Bytes in the segment.
    pub stored_len: u32,
    /// The segment's number in the layer.
    pub segment: u32,
    /// How the bytes are to be decoded.
    pub codec: Codec,
    /// BLAKE3 of the decoded block.
    pub hash: Hash32,
}

/// Everything one layer says of one volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerIndex {
    /// The attempt that wrote it.
    pub attempt: Uuid,
    /// The volume's place in the manifest.
    pub volume: u32,
    /// Bytes of the volume.
    pub volume_bytes: u64,
    /// Bytes of a block.
    pub block_size: u32,
    /// Blocks with data, ascending.
    pub entries: Vec<Entry>,
    /// Runs of zero blocks: ascending, disjoint, not touching each other.
    pub holes: Vec<Range<u64>>,
}

impl LayerIndex {
    /// Blocks of the volume.
    pub fn block_count(&self) -> u64 {
        self.volume_bytes
            .div_ceil(u64::from(self.block_size.max(1)))
    }

    /// Blocks that this layer says are zero.
    pub fn hole_blocks(&self) -> u64 {
        self.holes.iter().map(|run| run.end - run.start).sum()
    }

    /// Every block of this layer with its hash in the state tree, ascending.
    pub fn state_changes(&self) -> impl Iterator<Item = (u64, Hash32)> + '_ {
        let mut entries = self
            .entries
            .iter()
            .map(|entry| (entry.block, entry.hash))
            .peekable();
        let mut holes = self
            .holes
            .iter()
            .cloned()
            .flatten()
            .map(|block| (block, Hash32::ZERO_BLOCK))
            .peekable();
        std::iter::from_fn(move || match (entries.peek(), holes.peek()) {
            (Some(entry), Some(hole)) if hole.0 < entry.0 => holes.next(),
            (Some(_), _) => entries.next(),
            (None, _) => holes.next(),
        })
    }

    /// The bytes of the index file.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let len =
            HEADER_LEN + self.entries.len() * ENTRY_LEN + self.holes.len() * HOLE_LEN + TRAILER_LEN;
        let mut out = Vec::with_capacity(len);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&0u16.to_le_bytes());
        out.extend_from_slice(&self.block_size.to_le_bytes());
        out.extend_from_slice(&self.volume_bytes.to_le_bytes());
        out.extend_from_slice(&(self.entries.len() as u64).to_le_bytes());
        out.extend_from_slice(&(self.holes.len() as u64).to_le_bytes());
        out.extend_from_slice(self.attempt.as_bytes());
        out.extend_from_slice(&self.volume.to_le_bytes());
        out.extend_from_slice(&crc32c::crc32c(&out).to_le_bytes());
        let entries_at = out.len();
        for entry in &self.entries {
            out.extend_from_slice(&entry.block.to_le_bytes());
            out.extend_from_slice(&entry.offset.to_le_bytes());
            out.extend_from_slice(&entry.stored_len.to_le_bytes());
            out.extend_from_slice(&entry.segment.to_le_bytes());
            // Codec, then seven reserved bytes: flags, origin attempt of a merged block.
            out.extend_from_slice(&[entry.codec as u8, 0, 0, 0, 0, 0, 0, 0]);
            out.extend_from_slice(&entry.hash.0);
        }
        let holes_at = out.len();
        for run in &self.holes {
            out.extend_from_slice(&run.start.to_le_bytes());
            out.extend_from_slice(&(run.end - run.start).to_le_bytes());
        }
        let sums = [
            crc32c::crc32c(out.get(entries_at..holes_at).unwrap_or_default()),
            crc32c::crc32c(out.get(holes_at..).unwrap_or_default()),
        ];
        sums.iter()
            .for_each(|sum| out.extend_from_slice(&sum.to_le_bytes()));
        out
    }

    /// Reads the bytes of the index file `path`.
    ///
    /// # Errors
    /// [`LayerError::Damaged`] or [`LayerError::Unsupported`]; arbitrary bytes never panic.
    pub(crate) fn decode(path: &str, bytes: &[u8]) -> Result<Self, LayerError> {
        let damaged = |what: &str| LayerError::damaged(path, what);
        let short = || damaged("the index is cut short");
        let mut file = Reader::new(bytes);
        let header = file.take(HEADER_LEN).ok_or_else(short)?;
        let mut fields = Reader::new(header);
        if fields.take(8) != Some(MAGIC.as_slice()) {
            return Err(damaged("it does not begin like an index"));
        }
        let covered = header.get(..HEADER_LEN - 4).unwrap_or_default();
        if header.get(HEADER_LEN - 4..) != Some(crc32c::crc32c(covered).to_le_bytes().as_slice()) {
            return Err(damaged("the checksum of the index header is wrong"));
        }
        let version = fields.u16().ok_or_else(short)?;
        let flags = fields.u16().ok_or_else(short)?;
        if version != VERSION || flags != 0 {
            return Err(LayerError::Unsupported {
                path: path.into(),
                what: format!("index version {version}"),
            });
        }
        let block_size = fields.u32().ok_or_else(short)?;
        let volume_bytes = fields.u64().ok_or_else(short)?;
        let entry_count = fields.u64().ok_or_else(short)?;
        let hole_count = fields.u64().ok_or_else(short)?;
        let attempt = fields.uuid().ok_or_else(short)?;
        let volume = fields.u32().ok_or_else(short)?;
        if !valid_geometry(volume_bytes, block_size) {
            return Err(damaged("the sizes in the index header are impossible"));
        }
        // Lengths are compared before anything is allocated for them.
        let section = |count: u64, item: usize| usize::try_from(count).ok()?.checked_mul(item);
        let entry_bytes = section(entry_count, ENTRY_LEN)
            .and_then(|len| file.take(len))
            .ok_or_else(short)?;
        let hole_bytes = section(hole_count, HOLE_LEN)
            .and_then(|len| file.take(len))
            .ok_or_else(short)?;
        let entries_sum = file.u32().ok_or_else(short)?;
        let holes_sum = file.u32().ok_or_else(short)?;
        if file.take(1).is_some() {
            return Err(damaged("unknown bytes follow the index"));
        }
        if crc32c::crc32c(entry_bytes) != entries_sum || crc32c::crc32c(hole_bytes) != holes_sum {
            return Err(damaged("a checksum of the index is wrong"));
        }
        let mut index = Self {
            attempt,
            volume,
            volume_bytes,
            block_size,
            entries: Vec::new(),
            holes: Vec::new(),
        };
        index.entries = entry_bytes
            .chunks_exact(ENTRY_LEN)
            .map(|bytes| decode_entry(bytes, block_size))
            .collect::<Option<_>>()
            .ok_or_else(|| damaged("an entry of the index is impossible"))?;
        index.holes = hole_bytes
            .chunks_exact(HOLE_LEN)
            .map(decode_hole)
            .collect::<Option<_>>()
            .ok_or_else(|| damaged("a hole of the index is impossible"))?;
        index.check_order().map_err(damaged)?;
        Ok(index)
    }

    /// Entries and holes ascend, stay inside the volume, and no block is in both.
    fn check_order(&self) -> Result<(), &'static str> {
        let ascending = self
            .entries
            .windows(2)
            .all(|pair| matches!(pair, [a, b] if a.block < b.block));
        let apart = self
            .holes
            .windows(2)
            .all(|pair| matches!(pair, [a, b] if a.end < b.start));
        if !ascending || !apart {
            return Err("the index is not sorted");
        }
        let blocks = self.block_count();
        if self
            .entries
            .last()
            .is_some_and(|entry| entry.block >= blocks)
            || self.holes.last().is_some_and(|run| run.end > blocks)
        {
            return Err("the index names blocks beyond the end of the volume");
        }
        let mut entries = self.entries.iter().peekable();
        for run in &self.holes {
            while entries.next_if(|entry| entry.block < run.start).is_some() {}
            if entries.peek().is_some_and(|entry| entry.block < run.end) {
                return Err("the index says of a block both that it has data and that it is zero");
            }
        }
        Ok(())
    }
}

fn decode_entry(bytes: &[u8], block_size: u32) -> Option<Entry> {
    let mut fields = Reader::new(bytes);
    let entry = Entry {
        block: fields.u64()?,
        offset: fields.u64()?,
        stored_len: fields.u32()?,
        segment: fields.u32()?,
        codec: Codec::from_byte(fields.u8()?)?,
        hash: {
            if fields.array::<7>()? != [0; 7] {
                return None;
            }
            Hash32(fields.array()?)
        },
    };
    entry.offset.checked_add(u64::from(entry.stored_len))?;
    (entry.stored_len > 0 && entry.stored_len <= block_size).then_some(entry)
}

fn decode_hole(bytes: &[u8]) -> Option<Range<u64>> {
    let mut fields = Reader::new(bytes);
    let start = fields.u64()?;
    let len = fields.u64()?;
    let end = start.checked_add(len)?;
    (len > 0).then_some(start..end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn index() -> impl Strategy<Value = LayerIndex> {
        let kinds = proptest::collection::vec((0u8..4, any::<[u8; 32]>(), 1u32..=512), 1..40);
        (kinds, any::<u128>()).prop_map(|(kinds, attempt)| {
            let mut runs = super::super::runs::RunSet::default();
            let mut entries = Vec::new();
            for (block, (kind, hash, len)) in (0u64..).zip(&kinds) {
                match kind {
                    0 => runs.insert(block..block + 1),
                    1 | 2 => entries.push(Entry {
                        block,
                        offset: block * 600,
                        stored_len: *len,
                        segment: u32::from(*kind),
                        codec: if *kind == 1 { Codec::Raw } else { Codec::Zstd },
                        hash: Hash32(*hash),
                    }),
                    _ => {}
                }
            }
            LayerIndex {
                attempt: Uuid::from_u128(attempt),
                volume: 3,
                volume_bytes: kinds.len() as u64 * 512,
                block_size: 512,
                entries,
                holes: runs.iter().collect(),
            }
        })
    }

    proptest! {
        #[test]
        fn round_trip(index in index()) {
            prop_assert_eq!(&LayerIndex::decode("i", &index.encode()).unwrap(), &index);
            let changes: Vec<_> = index.state_changes().collect();
            prop_assert!(changes.windows(2).all(|pair| pair[0].0 < pair[1].0));
            prop_assert_eq!(changes.len() as u64, index.entries.len() as u64 + index.hole_blocks());
        }

        #[test]
        fn every_flipped_bit_and_every_other_length_is_noticed(index in index(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let good = index.encode();
            let mut bad = good.clone();
            bad[at.index(good.len())] ^= 1 << bit;
            prop_assert!(LayerIndex::decode("i", &bad).is_err());
            prop_assert!(LayerIndex::decode("i", &good[..at.index(good.len())]).is_err());
            prop_assert!(LayerIndex::decode("i", &[good.as_slice(), &[0]].concat()).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), fix in any::<bool>()) {
            if fix && bytes.len() >= HEADER_LEN {
                // Get past the magic and the header's checksum.
                bytes[..8].copy_from_slice(MAGIC);
                bytes[8..12].copy_from_slice(&[1, 0, 0, 0]);
                let sum = crc32c::crc32c(&bytes[..HEADER_LEN - 4]);
                bytes[HEADER_LEN - 4..HEADER_LEN].copy_from_slice(&sum.to_le_bytes());
            }
            let _ = LayerIndex::decode("i", &bytes);
        }
    }

    #[test]
    fn a_block_that_is_both_data_and_hole_is_refused_although_all_checksums_match() {
        let entry = Entry {
            block: 1,
            offset: 0,
            stored_len: 512,
            segment: 0,
            codec: Codec::Raw,
            hash: Hash32([1; 32]),
        };
        let mut index = LayerIndex {
            attempt: Uuid::nil(),
            volume: 0,
            volume_bytes: 4096,
            block_size: 512,
            entries: vec![entry],
            holes: vec![0..1, 2..8],
        };
        assert!(LayerIndex::decode("i", &index.encode()).is_ok());
        // Over the entry twice, empty, beyond the end, not sorted, not merged.
        let wrong: [&[(u64, u64)]; 6] = [
            &[(0, 2)],
            &[(1, 2)],
            &[(0, 1), (1, 1)],
            &[(2, 9)],
            &[(3, 4), (2, 3)],
            &[(2, 3), (3, 4)],
        ];
        for holes in wrong {
            index.holes = holes.iter().map(|&(start, end)| start..end).collect();
            assert!(
                LayerIndex::decode("i", &index.encode()).is_err(),
                "{:?}",
                index.holes
            );
        }
    }
}
