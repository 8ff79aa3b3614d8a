//! Arithmetic on byte ranges.

use crate::seam::ByteRange;

/// Widens ascending `ranges` to multiples of `unit`, cuts them to `len` and merges what touches.
///
/// The change map counts its blocks from the start of the disk, a layer from the start of the
/// volume; a partition may begin anywhere, so a marked range need not begin at a layer's block.
pub fn widen(ranges: &[ByteRange], unit: u32, len: u64) -> Vec<ByteRange> {
    let unit = u64::from(unit.max(1));
    let mut widened: Vec<ByteRange> = Vec::with_capacity(ranges.len());
    for range in ranges.iter().filter(|r| r.len > 0 && r.offset < len) {
        let start = range.offset - range.offset % unit;
        let end = range.end().div_ceil(unit).saturating_mul(unit).min(len);
        match widened.last_mut() {
            Some(last) if start <= last.end() => last.len = last.len.max(end - last.offset),
            _ => widened.push(ByteRange::new(start, end - start)),
        }
    }
    widened
}

/// Sum of the ranges' lengths.
pub fn total(ranges: &[ByteRange]) -> u64 {
    ranges.iter().map(|r| r.len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn widened_ranges_cover_exactly_the_touched_units(
            raw in proptest::collection::vec((0u64..500, 0u64..90), 0..20),
            unit in 1u32..40,
            len in 1u64..550,
        ) {
            let mut raw: Vec<ByteRange> = raw.into_iter().map(|(o, l)| ByteRange::new(o, l)).collect();
            raw.sort();
            let wide = widen(&raw, unit, len);
            for pair in wide.windows(2) {
                prop_assert!(pair[0].end() < pair[1].offset, "{:?} touches", pair);
            }
            let unit = u64::from(unit);
            for byte in 0..len {
                let block = byte / unit;
                let (start, end) = (block * unit, ((block + 1) * unit).min(len));
                let touched = raw.iter().any(|r| r.len > 0 && r.offset < end && r.end() > start);
                let covered = wide.iter().any(|r| r.offset <= byte && byte < r.end());
                prop_assert_eq!(touched, covered, "byte {}", byte);
            }
            prop_assert!(wide.iter().all(|r| r.end() <= len));
        }
    }
}
