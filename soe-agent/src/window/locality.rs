//! Sequential streams and re-reads, in bounded memory.

use std::collections::HashSet;

/// Streams that are followed at the same time. Eight cover a file system's journal, a few scans and
/// writeback without calling chance neighbours a stream.
const STREAMS: usize = 8;

/// Tells whether a request continues one of the last [`STREAMS`] streams of its volume.
#[derive(Clone, Debug, Default)]
pub struct SequentialStreams {
    /// Ends of the streams, the most recently continued last.
    ends: Vec<u64>,
}

impl SequentialStreams {
    /// Whether a request at `offset` begins exactly where a followed stream ended. The stream goes
    /// on at `end`; a request that continues none begins one and displaces the oldest.
    pub fn continues(&mut self, offset: u64, end: u64) -> bool {
        let found = self
            .ends
            .iter()
            .rposition(|&stream_end| stream_end == offset);
        if let Some(at) = found {
            self.ends.remove(at);
        } else if self.ends.len() >= STREAMS {
            self.ends.remove(0);
        }
        self.ends.push(end);
        found.is_some()
    }
}

/// Remembers the first blocks of recent reads: all of the last `capacity` different ones, none
/// beyond the last `2 * capacity`.
#[derive(Clone, Debug)]
pub struct Rereads {
    recent: HashSet<u64>,
    older: HashSet<u64>,
    capacity: usize,
}

impl Rereads {
    /// Remembers at least `capacity` blocks.
    pub fn new(capacity: usize) -> Self {
        Self {
            recent: HashSet::new(),
            older: HashSet::new(),
            capacity: capacity.max(1),
        }
    }

    /// Whether `block` was read shortly before; remembers it.
    pub fn seen_before(&mut self, block: u64) -> bool {
        let seen = self.recent.contains(&block) || self.older.contains(&block);
        if self.recent.insert(block) && self.recent.len() >= self.capacity {
            self.older = std::mem::take(&mut self.recent);
        }
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_streams_are_each_sequential() {
        let mut streams = SequentialStreams::default();
        let mut sequential = 0;
        for step in 0..100u64 {
            for stream in 0..STREAMS as u64 {
                let offset = (stream << 30) + step * 4096;
                sequential += u32::from(streams.continues(offset, offset + 4096));
            }
        }
        assert_eq!(sequential, 99 * STREAMS as u32);
    }

    #[test]
    fn one_stream_more_than_are_followed_is_random() {
        let mut streams = SequentialStreams::default();
        for step in 0..20u64 {
            for stream in 0..=STREAMS as u64 {
                let offset = (stream << 30) + step * 4096;
                assert!(!streams.continues(offset, offset + 4096));
            }
        }
    }

    #[test]
    fn rereads_are_remembered_within_the_capacity_and_forgotten_beyond_twice_of_it() {
        let mut rereads = Rereads::new(100);
        assert!(!rereads.seen_before(7));
        for block in 1000..1099 {
            assert!(!rereads.seen_before(block));
        }
        assert!(rereads.seen_before(7));
        for block in 2000..2300 {
            assert!(!rereads.seen_before(block));
        }
        assert!(!rereads.seen_before(7));
    }
}
