//! Segments: the files that hold the blocks' bytes, one after another behind a header. Where a block
//! begins only the index knows.

use uuid::Uuid;

use super::error::LayerError;
use super::fs::{AppendFile, StoreFs};
use super::hash::Hash32;
use super::manifest::FileRef;
use super::wire::Reader;

const MAGIC: &[u8; 8] = b"SOESEGM\0";
const VERSION: u16 = 1;
/// Bytes before the first block.
pub(crate) const HEADER_LEN: usize = 128;
/// Bytes gathered before the file is written.
const BUFFER_BYTES: usize = 1 << 20;

/// What a segment says of itself, so that a stray file can be told from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) number: u32,
    pub(crate) attempt: Uuid,
    pub(crate) store: Uuid,
    pub(crate) volume: u32,
}

impl SegmentHeader {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_LEN);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&0u16.to_le_bytes());
        out.extend_from_slice(&self.number.to_le_bytes());
        out.extend_from_slice(self.attempt.as_bytes());
        out.extend_from_slice(self.store.as_bytes());
        out.extend_from_slice(&self.volume.to_le_bytes());
        out.resize(HEADER_LEN - 4, 0); // key id, salt and reserve
        out.extend_from_slice(&crc32c::crc32c(&out).to_le_bytes());
        out
    }

    pub(crate) fn decode(path: &str, bytes: &[u8]) -> Result<Self, LayerError> {
        let damaged = |what: &str| LayerError::damaged(path, what);
        let short = || damaged("the segment is cut short");
        let header = bytes.get(..HEADER_LEN).ok_or_else(short)?;
        let mut fields = Reader::new(header);
        if fields.take(8) != Some(MAGIC.as_slice()) {
            return Err(damaged("it does not begin like a segment"));
        }
        let covered = header.get(..HEADER_LEN - 4).unwrap_or_default();
        if header.get(HEADER_LEN - 4..) != Some(crc32c::crc32c(covered).to_le_bytes().as_slice()) {
            return Err(damaged("the checksum of the segment header is wrong"));
        }
        let version = fields.u16().ok_or_else(short)?;
        let flags = fields.u16().ok_or_else(short)?;
        let decoded = Self {
            number: fields.u32().ok_or_else(short)?,
            attempt: fields.uuid().ok_or_else(short)?,
            store: fields.uuid().ok_or_else(short)?,
            volume: fields.u32().ok_or_else(short)?,
        };
        let reserved = header.get(52..HEADER_LEN - 4).unwrap_or_default();
        if version != VERSION || flags != 0 || reserved.iter().any(|&byte| byte != 0) {
            return Err(LayerError::Unsupported {
                path: path.into(),
                what: format!("segment version {version}"),
            });
        }
        Ok(decoded)
    }
}

/// A segment being written.
pub(crate) struct SegmentWriter {
    file: Box<dyn AppendFile>,
    /// Relative to the store.
    path: String,
    name: String,
    buffer: Vec<u8>,
    hasher: blake3::Hasher,
    len: u64,
}

impl SegmentWriter {
    /// Creates segment `header.number` in `folder`.
    pub(crate) fn create(
        fs: &dyn StoreFs,
        folder: &str,
        header: SegmentHeader,
    ) -> Result<Self, LayerError> {
        let name = format!("v{}-{}.segment", header.volume, header.number);
        let path = format!("{folder}/{name}");
        let file = fs
            .create(&path)
            .map_err(|error| LayerError::io("create", &path, error))?;
        let mut writer = Self {
            file,
            path,
            name,
            buffer: Vec::with_capacity(BUFFER_BYTES),
            hasher: blake3::Hasher::new(),
            len: 0,
        };
        writer.append(&header.encode())?;
        Ok(writer)
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Appends `bytes` and returns where they begin.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<u64, LayerError> {
        if self.buffer.len() + bytes.len() > BUFFER_BYTES {
            self.flush()?;
        }
        let offset = self.len;
        self.buffer.extend_from_slice(bytes);
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(offset)
    }

    fn flush(&mut self) -> Result<(), LayerError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.file
            .append(&self.buffer)
            .map_err(|error| LayerError::io("write to", &self.path, error))?;
        self.buffer.clear();
        Ok(())
    }

    /// Makes the segment durable and says how the manifest is to name it.
    pub(crate) fn finish(mut self) -> Result<FileRef, LayerError> {
        self.flush()?;
        self.file
            .sync()
            .map_err(|error| LayerError::io("sync", &self.path, error))?;
        Ok(FileRef {
            file: self.name,
            len: self.len,
            blake3: Hash32(*self.hasher.finalize().as_bytes()),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn header_round_trip_and_no_bit_goes_unnoticed(
            ids in any::<[u128; 2]>(), number in any::<u32>(), volume in any::<u32>(), at in 0..HEADER_LEN, bit in 0u8..8
        ) {
            let header = SegmentHeader {
                number, volume, attempt: Uuid::from_u128(ids[0]), store: Uuid::from_u128(ids[1]),
            };
            let mut bytes = header.encode();
            prop_assert_eq!(bytes.len(), HEADER_LEN);
            prop_assert_eq!(SegmentHeader::decode("s", &bytes).unwrap(), header);
            prop_assert!(SegmentHeader::decode("s", &bytes[..at]).is_err());
            bytes[at] ^= 1 << bit;
            prop_assert!(SegmentHeader::decode("s", &bytes).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(SegmentHeader::decode("s", &bytes).is_err());
        }
    }
}
