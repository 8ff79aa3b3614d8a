//! Read-ahead of sequential runs, up and down, several at once. Pure.
//!
//! As in AMP (Gill and Bathen, FAST 2007) each run has its own depth; how far to go is asked of the
//! gate, so it follows what the volume's runs turned out to be.

use super::gate::{Cell, Gate, Source};

/// Runs followed at once; the one idle for longest makes room.
const RUNS: usize = 64;
/// Blocks by which a request may miss the expected place and still belong to a run.
const SLACK: u64 = 16;

#[derive(Clone, Copy, Debug)]
struct Run {
    source: Source,
    /// The block expected next.
    next: u64,
    /// The first block not asked for yet.
    ahead: u64,
    requests: u64,
    at: u64,
}

/// The runs of one volume.
#[derive(Clone, Debug, Default)]
pub struct ReadAhead {
    runs: Vec<Run>,
    now: u64,
}

impl ReadAhead {
    /// Takes in a read of the blocks `first..=last`; adds to `want` what to read ahead, at most
    /// `most` blocks per run beyond what was read.
    pub fn read(
        &mut self,
        first: u64,
        last: u64,
        most: u64,
        gate: &mut Gate,
        want: &mut Vec<(u64, Cell)>,
    ) {
        self.now += 1;
        let now = self.now;
        let known = self.runs.iter_mut().find(|run| match run.source {
            Source::Down => run.next.abs_diff(last) <= 2 && first <= run.next,
            _ => run.next.abs_diff(first) <= SLACK && last >= run.next,
        });
        if let Some(run) = known {
            run.requests += 1;
            run.at = now;
            run.follow(first, last, most, gate, want);
            return;
        }
        for source in [Source::Up, Source::Down] {
            let mut run = Run {
                source,
                next: 0,
                ahead: if source == Source::Up { 0 } else { u64::MAX },
                requests: 1,
                at: now,
            };
            run.follow(first, last, most, gate, want);
            if self.runs.len() < RUNS {
                self.runs.push(run);
            } else if let Some(idle) = self.runs.iter_mut().min_by_key(|run| run.at) {
                *idle = run;
            }
        }
    }
}

impl Run {
    fn follow(
        &mut self,
        first: u64,
        last: u64,
        most: u64,
        gate: &mut Gate,
        want: &mut Vec<(u64, Cell)>,
    ) {
        let reach = gate.reach(self.source, self.requests, most);
        let cell = |distance| Gate::cell(self.source, self.requests, distance);
        if self.source == Source::Up {
            self.next = last.saturating_add(1);
            let end = self.next.saturating_add(reach);
            for block in self.ahead.max(self.next)..end {
                want.push((block, cell(block - last)));
            }
            self.ahead = self.ahead.max(end);
        } else {
            self.next = first.saturating_sub(1);
            let end = first.saturating_sub(reach);
            for block in (end..first.min(self.ahead)).rev() {
                want.push((block, cell(first - block)));
            }
            self.ahead = self.ahead.min(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(reads: &[(u64, u64)], most: u64) -> Vec<u64> {
        let (mut ahead, mut gate) = (ReadAhead::default(), Gate::new(0.2));
        let mut want = Vec::new();
        for (first, last) in reads {
            want.clear();
            ahead.read(*first, *last, most, &mut gate, &mut want);
        }
        want.iter().map(|w| w.0).collect()
    }

    #[test]
    fn runs_up_and_down_are_read_ahead_once() {
        assert_eq!(wanted(&[(100, 103), (104, 107)], 4), [108, 109, 110, 111]);
        assert_eq!(
            wanted(&[(100, 103), (5000, 5000), (104, 105)], 4),
            [108, 109],
            "the rest was asked for before"
        );
        assert_eq!(wanted(&[(100, 101), (98, 99), (96, 97)], 3), [94, 93]);
    }

    #[test]
    fn the_ends_of_the_address_range_are_fine() {
        assert_eq!(wanted(&[(1, 2), (0, 0)], 4), [] as [u64; 0]);
        let end = u64::MAX;
        assert!(wanted(&[(end - 3, end - 2), (end - 1, end)], 4).is_empty());
        assert!(wanted(&[(0, end), (end, end), (0, 0)], 4).len() <= 8);
    }
}
