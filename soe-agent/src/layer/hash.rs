//! Hashes: of blocks, of files, and of what is built from them.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A BLAKE3 hash of 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash32(pub [u8; 32]);

impl Hash32 {
    /// Stands for an all-zero block in the state tree. Nothing known hashes to it.
    pub const ZERO_BLOCK: Hash32 = Hash32([0; 32]);

    /// The plain hash of `bytes`: a block's content, or a whole file.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The hash in the state tree of a block with content `bytes`.
    pub fn of_block(bytes: &[u8]) -> Self {
        if is_zero(bytes) {
            Self::ZERO_BLOCK
        } else {
            Self::of(bytes)
        }
    }

    /// Parses 64 lower-case hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        if digits.len() != 64 {
            return None;
        }
        let mut out = [0u8; 32];
        for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
            let nibble = |d: u8| match d {
                b'0'..=b'9' => Some(d - b'0'),
                b'a'..=b'f' => Some(d - b'a' + 10),
                _ => None,
            };
            *byte = nibble(*pair.first()?)? << 4 | nibble(*pair.get(1)?)?;
        }
        Some(Self(out))
    }
}

impl fmt::Display for Hash32 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash32 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Hash32 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash32 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::from_hex(&text).ok_or_else(|| {
            de::Error::custom(format!("{text:?} is not a hash of 64 hexadecimal digits"))
        })
    }
}

/// A hasher whose results cannot be mistaken for those of another purpose.
#[derive(Clone)]
pub(crate) struct Domain(blake3::Hasher);

impl Domain {
    /// The hasher for `purpose`.
    pub(crate) fn new(purpose: &str) -> Self {
        Self(blake3::Hasher::new_derive_key(purpose))
    }

    /// The hash of the concatenated `parts`.
    pub(crate) fn hash(&self, parts: &[&[u8]]) -> Hash32 {
        let mut hasher = self.0.clone();
        for part in parts {
            hasher.update(part);
        }
        Hash32(*hasher.finalize().as_bytes())
    }
}

/// Whether all of `bytes` are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Comparing 64-byte pieces with a constant is what the compiler vectorises well.
    const ZEROES: [u8; 64] = [0; 64];
    let mut pieces = bytes.chunks_exact(64);
    pieces.all(|piece| piece == ZEROES) && pieces.remainder().iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_bit_anywhere_is_not_zero() {
        for len in [0usize, 1, 63, 64, 65, 4096] {
            let mut bytes = vec![0u8; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn hexadecimal_round_trip_and_nothing_else() {
        let hash = Hash32::of(b"block");
        assert_eq!(Hash32::from_hex(&hash.to_string()), Some(hash));
        assert_eq!(Hash32::from_hex(&hash.to_string().to_uppercase()), None);
        assert_eq!(Hash32::from_hex(&hash.to_string()[1..]), None);
        assert_eq!(Hash32::from_hex(&"g".repeat(64)), None);
    }
}
