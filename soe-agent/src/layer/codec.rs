//! How a block's bytes are represented in a segment.

use zstd::bulk::{Compressor, Decompressor};

/// The compression that new layers are written with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Blocks as they are.
    Raw,
    /// zstd at level 1, for blocks it makes smaller by an eighth or more.
    #[default]
    Zstd1,
}

/// The codec byte of an index entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// The block as it is.
    Raw = 1,
    /// One zstd frame.
    Zstd = 2,
}

impl Codec {
    /// The codec with this byte. 0 stands for a zero block, which has no entry.
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Raw),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// Chooses the smaller representation.
pub(crate) struct Encoder {
    zstd: Option<Compressor<'static>>,
    buffer: Vec<u8>,
}

impl Encoder {
    pub(crate) fn new(compression: Compression) -> std::io::Result<Self> {
        let zstd = match compression {
            Compression::Raw => None,
            Compression::Zstd1 => Some(Compressor::new(1)?),
        };
        Ok(Self {
            zstd,
            buffer: Vec::new(),
        })
    }

    /// The codec and the bytes to store for `block`.
    pub(crate) fn encode<'a>(&'a mut self, block: &'a [u8]) -> (Codec, &'a [u8]) {
        let Some(zstd) = &mut self.zstd else {
            return (Codec::Raw, block);
        };
        // A saving of less than an eighth is not worth the time of every later read, and a buffer
        // of that size lets zstd give up early.
        let limit = block.len() - block.len() / 8;
        self.buffer.resize(limit, 0);
        match zstd.compress_to_buffer(block, self.buffer.as_mut_slice()) {
            Ok(len) => (Codec::Zstd, self.buffer.get(..len).unwrap_or_default()),
            Err(_) => (Codec::Raw, block),
        }
    }
}

/// Gives blocks back.
pub(crate) struct Decoder(Decompressor<'static>);

impl Decoder {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self(Decompressor::new()?))
    }

    /// Decodes `stored` into all of `block`; false when it does not give exactly that many bytes.
    pub(crate) fn decode(&mut self, codec: Codec, stored: &[u8], block: &mut [u8]) -> bool {
        match codec {
            Codec::Raw => {
                let fits = stored.len() == block.len();
                if fits {
                    block.copy_from_slice(stored);
                }
                fits
            }
            Codec::Zstd => self
                .0
                .decompress_to_buffer(stored, block)
                .is_ok_and(|len| len == block.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(seed in any::<u64>(), len in 1usize..9000, period in 1usize..5000) {
            let block: Vec<u8> =
                (0..len).map(|i| (seed.wrapping_mul((i % period) as u64 * 2 + 1) >> 32) as u8).collect();
            for compression in [Compression::Raw, Compression::Zstd1] {
                let mut encoder = Encoder::new(compression).unwrap();
                let (codec, stored) = encoder.encode(&block);
                prop_assert!(stored.len() <= block.len());
                let mut out = vec![0; len];
                prop_assert!(Decoder::new().unwrap().decode(codec, stored, &mut out));
                prop_assert_eq!(&out, &block);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(stored in proptest::collection::vec(any::<u8>(), 0..300), len in 0usize..600) {
            let mut out = vec![0; len];
            let mut decoder = Decoder::new().unwrap();
            decoder.decode(Codec::Zstd, &stored, &mut out);
            prop_assert_eq!(decoder.decode(Codec::Raw, &stored, &mut out), stored.len() == len);
        }
    }
}
