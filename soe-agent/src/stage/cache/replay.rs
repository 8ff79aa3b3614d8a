//! Prefetching of sequences seen before. Pure.
//!
//! Programs start, boot and scan alike every time. What followed a block the last time it was
//! fetched is likely to follow again: temporal streaming (Wenisch et al., ISCA 2005) with a global
//! history buffer (Nesbit and Smith, HPCA 2004). It needs to see a sequence once, where mining for
//! associations (MITHRIL, Yang et al., SoCC 2017) needs several times, and follows it as long as it
//! repeats.

use super::gate::{Cell, Gate, Source};
use crate::stage::hash::BlockMap;

/// Sequences followed at once; the one idle for longest makes room.
const FOLLOWED: usize = 64;
/// How far beyond the expected place a sequence is still recognised.
const AHEAD: u64 = 128;
/// How far before it.
const BEHIND: u64 = 8;

/// A place in the history where the present follows the past.
#[derive(Clone, Copy, Debug)]
struct Follow {
    /// The place expected next.
    next: u64,
    /// The first place not asked for yet.
    ahead: u64,
    matches: u64,
    at: u64,
}

/// The blocks fetched so far, in order, and where they stand.
#[derive(Clone, Debug)]
pub struct Replay {
    /// A ring: place `p` is at `p % capacity`.
    history: Vec<u64>,
    capacity: usize,
    /// Places written so far.
    written: u64,
    /// The last place of a block; of requests only the first and the last block.
    places: BlockMap<u64>,
    followed: Vec<Follow>,
    now: u64,
}

impl Replay {
    /// A history of `capacity` blocks. A block takes about 30 bytes.
    pub fn new(capacity: usize) -> Self {
        Self {
            history: Vec::new(),
            capacity: capacity.max(1),
            written: 0,
            places: BlockMap::default(),
            followed: Vec::new(),
            now: 0,
        }
    }

    /// Takes in that the blocks `first..=last` are accessed; adds to `want` what followed the last
    /// time, at most `most` blocks.
    pub fn follow(
        &mut self,
        first: u64,
        last: u64,
        most: u64,
        gate: &mut Gate,
        want: &mut Vec<(u64, Cell)>,
    ) {
        self.now += 1;
        let mut advanced = false;
        for block in [first, last] {
            let Some(place) = self.places.get(&block).copied() else {
                continue;
            };
            let near = |f: &Follow| {
                place.saturating_add(BEHIND) >= f.next && place < f.next.saturating_add(AHEAD)
            };
            let nearest = (0..self.followed.len())
                .filter(|i| near(&self.followed[*i]))
                .min_by_key(|i| self.followed[*i].next.abs_diff(place));
            let follow = match nearest {
                Some(i) => {
                    let mut follow = self.followed[i];
                    // A request counts once, its first and last block notwithstanding.
                    follow.matches += u64::from(!advanced);
                    follow.next = follow.next.max(place + 1);
                    self.ask(follow, most, gate, want)
                }
                // A sequence begins behind the request.
                None if block == last => {
                    let follow = Follow {
                        next: place + 1,
                        ahead: place + 1,
                        matches: 1,
                        at: self.now,
                    };
                    self.ask(follow, most, gate, want)
                }
                None => continue,
            };
            advanced = true;
            let idle = || (0..self.followed.len()).min_by_key(|i| self.followed[*i].at);
            match nearest.or_else(|| idle().filter(|_| self.followed.len() >= FOLLOWED)) {
                Some(i) => self.followed[i] = follow,
                None => self.followed.push(follow),
            }
            if first == last {
                break;
            }
        }
    }

    /// Asks for what `follow` expects next and was not asked for yet.
    fn ask(
        &self,
        mut follow: Follow,
        most: u64,
        gate: &mut Gate,
        want: &mut Vec<(u64, Cell)>,
    ) -> Follow {
        let reach = gate.reach(Source::Replay, follow.matches, most);
        let end = (follow.next + reach).min(self.written);
        let oldest = self.written.saturating_sub(self.history.len() as u64);
        for place in follow.ahead.max(follow.next).max(oldest)..end {
            let cell = Gate::cell(Source::Replay, follow.matches, place + 1 - follow.next);
            want.push((self.history[(place % self.capacity as u64) as usize], cell));
        }
        follow.ahead = follow.ahead.max(end);
        follow.at = self.now;
        follow
    }

    /// Appends the blocks `first..=last`, fetched by one request, to the history.
    pub fn append(&mut self, first: u64, last: u64) {
        // A request of more than the history holds would only repeat what read-ahead knows.
        let last = last.min(first.saturating_add(self.capacity as u64 - 1));
        for block in first..=last {
            let place = self.written;
            let slot = (place % self.capacity as u64) as usize;
            if let Some(old) = self.history.get_mut(slot) {
                let forgotten = std::mem::replace(old, block);
                if self.places.get(&forgotten) == Some(&(place - self.capacity as u64)) {
                    self.places.remove(&forgotten);
                }
            } else {
                self.history.push(block);
            }
            if block == first || block == last {
                self.places.insert(block, place);
            }
            self.written += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(salt: u64) -> Vec<u64> {
        (0..40)
            .map(|i| crate::stage::hash::mix(i ^ salt) >> 20)
            .collect()
    }

    #[test]
    fn a_sequence_is_replayed_the_second_time() {
        let (mut replay, mut gate) = (Replay::new(1000), Gate::new(0.2));
        let mut want = Vec::new();
        let (a, b) = (sequence(0), sequence(1 << 32));
        let between: Vec<u64> = (1 << 50..(1 << 50) + 300).collect();
        let before = a.iter().chain(&between).chain(&b);
        before.for_each(|x| replay.append(*x, *x));
        // Two at once.
        for i in 0..20 {
            for x in [a[i], b[i]] {
                replay.follow(x, x, 8, &mut gate, &mut want);
                replay.append(x, x);
            }
        }
        let asked: Vec<u64> = want.iter().map(|w| w.0).collect();
        for s in [a, b] {
            for x in &s[1..28] {
                let times = asked.iter().filter(|y| *y == x).count();
                assert_eq!(times, 1, "each is asked for once");
            }
            assert!(!asked.contains(&s[30]), "not further than eight ahead");
        }
    }

    #[test]
    fn memory_is_bounded_and_what_was_forgotten_is_not_followed() {
        let (mut replay, mut gate) = (Replay::new(100), Gate::new(0.2));
        for x in 0..10_000u64 {
            replay.append(x * 10, x * 10 + 1);
        }
        replay.append(0, u64::MAX);
        assert!(replay.history.len() <= 100 && replay.places.len() <= 100);
        let mut want = Vec::new();
        replay.follow(50, 51, 8, &mut gate, &mut want);
        replay.follow(50_000, 50_001, 8, &mut gate, &mut want);
        replay.follow(u64::MAX, u64::MAX, 8, &mut gate, &mut want);
        assert!(want.iter().all(|w| w.0 < 100), "{want:?}");
    }
}
