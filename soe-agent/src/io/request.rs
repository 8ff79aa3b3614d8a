//! Cutting ranges of a volume into requests and requests into pieces. Pure.

use std::io;

use crate::seam::ByteRange;

/// A device request: the wanted bytes of the volume and the aligned bytes of the file around them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Wanted bytes, in the volume.
    pub(super) wanted: ByteRange,
    /// What is read for them, in the file.
    pub(super) cover: ByteRange,
}

impl Request {
    /// Hands the wanted bytes out of `data` (the cover's content) in pieces that do not straddle a
    /// multiple of `unit`.
    pub(super) fn pieces(
        &self,
        base: u64,
        unit: u32,
        data: &[u8],
        sink: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let unit = u64::from(unit.max(1));
        let skipped = base + self.wanted.offset - self.cover.offset;
        let mut at = self.wanted.offset;
        while at < self.wanted.end() {
            let end = ((at / unit + 1) * unit).min(self.wanted.end());
            let start = (skipped + at - self.wanted.offset) as usize;
            let piece = data.get(start..start + (end - at) as usize);
            sink(at, piece.ok_or(io::ErrorKind::UnexpectedEof)?)?;
            at = end;
        }
        Ok(())
    }
}

/// The requests for `ranges`, in the order of the device's addresses.
pub(super) struct Requests {
    ranges: Vec<ByteRange>,
    next: usize,
    at: u64,
    base: u64,
    align: u64,
    chunk: u64,
}

impl Requests {
    /// For ranges of a volume of `len` bytes that begins at byte `base` of its file. Ranges may come
    /// in any order and overlap. `max` is the size of a request without its alignment.
    pub(super) fn new(
        ranges: &[ByteRange],
        len: u64,
        base: u64,
        align: u64,
        unit: u32,
        max: u64,
    ) -> io::Result<Self> {
        let unit = u64::from(unit.max(1));
        let chunk = max / unit * unit;
        if chunk == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("units of {unit} bytes are larger than a request of {max} bytes"),
            ));
        }
        let mut sorted: Vec<ByteRange> = ranges.iter().filter(|r| r.len > 0).copied().collect();
        sorted.sort_unstable();
        let mut merged: Vec<ByteRange> = Vec::with_capacity(sorted.len());
        for range in sorted {
            let end = range.offset.checked_add(range.len);
            if end.is_none_or(|end| end > len) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!(
                        "{} bytes at byte {} reach beyond the volume's {len}",
                        range.len, range.offset
                    ),
                ));
            }
            match merged.last_mut() {
                Some(last) if range.offset <= last.end() => {
                    last.len = last.len.max(range.end() - last.offset);
                }
                _ => merged.push(range),
            }
        }
        Ok(Self {
            at: merged.first().map_or(0, |r| r.offset),
            ranges: merged,
            next: 0,
            base,
            align: align.max(1),
            chunk,
        })
    }
}

impl Iterator for Requests {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        let range = *self.ranges.get(self.next)?;
        let start = self.at;
        let end = ((start / self.chunk + 1) * self.chunk).min(range.end());
        if end == range.end() {
            self.next += 1;
            self.at = self.ranges.get(self.next).map_or(0, |r| r.offset);
        } else {
            self.at = end;
        }
        let first = (self.base + start) / self.align * self.align;
        let last = (self.base + end).div_ceil(self.align) * self.align;
        Some(Request {
            wanted: ByteRange::new(start, end - start),
            cover: ByteRange::new(first, last - first),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_wanted_byte_comes_once_in_whole_pieces(
            raw in proptest::collection::vec((0u64..4000, 0u64..600), 0..12),
            unit in 1u32..300,
            base in 0u64..100,
            align in 1u64..64,
            room in 0u64..900,
        ) {
            let len = 4600;
            let max = u64::from(unit) + room;
            let ranges: Vec<ByteRange> = raw.iter().map(|(o, l)| ByteRange::new(*o, *l)).collect();
            let content: Vec<u8> = (0..base + len + 64).map(|i| (i % 251) as u8).collect();
            let mut seen = vec![0u8; len as usize];
            let mut last = 0;
            for request in Requests::new(&ranges, len, base, align, unit, max).unwrap() {
                prop_assert!(request.cover.offset % align == 0 && request.cover.len % align == 0);
                prop_assert!(request.wanted.len <= max && request.wanted.offset >= last);
                last = request.wanted.end();
                let cover = request.cover.offset as usize..request.cover.end() as usize;
                let mut failed = None;
                request.pieces(base, unit, &content[cover], &mut |offset, data| {
                    let unit = u64::from(unit);
                    let end = offset + data.len() as u64;
                    if offset / unit != (end - 1) / unit {
                        failed = Some(format!("{offset}..{end} straddles"));
                    }
                    let starts = ranges.iter().any(|r| r.offset == offset);
                    if offset % unit != 0 && !starts {
                        failed = Some(format!("{offset} starts nowhere"));
                    }
                    for (i, byte) in data.iter().enumerate() {
                        let at = offset as usize + i;
                        seen[at] += 1;
                        if *byte != content[base as usize + at] {
                            failed = Some(format!("byte {at} is wrong"));
                        }
                    }
                    Ok(())
                }).unwrap();
                prop_assert_eq!(failed, None);
            }
            for (at, count) in seen.iter().enumerate() {
                let wanted = ranges.iter().any(|r| r.offset <= at as u64 && (at as u64) < r.end());
                prop_assert_eq!(*count, u8::from(wanted), "byte {}", at);
            }
        }
    }

    #[test]
    fn ranges_beyond_the_volume_and_units_beyond_a_request_are_refused() {
        let beyond = [ByteRange::new(90, 20)];
        assert!(Requests::new(&beyond, 100, 0, 1, 10, 50).is_err());
        let wraps = [ByteRange::new(u64::MAX, 2)];
        assert!(Requests::new(&wraps, 100, 0, 1, 10, 50).is_err());
        assert!(Requests::new(&[], 100, 0, 1, 60, 50).is_err());
    }
}
