//! Live sequential runs: where they are, how long, how busy. Pure.
//!
//! Scans read blocks that no history knows, but one after the other. Several can run at once, and
//! their requests come a little out of order (sequential stream detection as in AMP: Gill and
//! Bathen, FAST 2007, and in Linux read-ahead).

/// Runs followed at once; the one idle for longest makes room.
const SCANS: usize = 32;
/// Blocks by which a request may miss the expected place and still belong to a run.
const SLACK: u64 = 16;

/// A sequential run of one volume.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scan {
    /// The block expected next.
    pub next: u64,
    /// Blocks read so far.
    pub run: u64,
    /// Requests so far.
    pub requests: u64,
    /// Access clock when it began.
    pub began: u64,
    /// Access clock at its last request.
    pub at: u64,
}

/// The sequential runs of one volume.
#[derive(Clone, Debug, Default)]
pub struct Scans {
    scans: Vec<Scan>,
}

impl Scans {
    /// Takes in a read of the blocks `first..=last` when the access clock is `now`; the run that it
    /// is part of.
    pub fn read(&mut self, first: u64, last: u64, now: u64) -> Scan {
        let belongs = |scan: &Scan| scan.next.abs_diff(first) <= SLACK && last >= scan.next;
        let blocks = (last - first).saturating_add(1);
        if let Some(scan) = self.scans.iter_mut().find(|scan| belongs(scan)) {
            scan.run = scan
                .run
                .saturating_add((last - scan.next).saturating_add(1));
            scan.next = last.saturating_add(1);
            scan.requests += 1;
            scan.at = now;
            return *scan;
        }
        let scan = Scan {
            next: last.saturating_add(1),
            run: blocks,
            requests: 1,
            began: now.saturating_sub(blocks),
            at: now,
        };
        if self.scans.len() < SCANS {
            self.scans.push(scan);
        } else if let Some(idle) = self.scans.iter_mut().min_by_key(|scan| scan.at) {
            *idle = scan;
        }
        scan
    }

    /// The runs of at least `requests` requests that read within the last `accesses` accesses.
    pub fn live(&self, now: u64, accesses: u64, requests: u64) -> impl Iterator<Item = &Scan> + '_ {
        self.scans.iter().filter(move |scan| {
            scan.requests >= requests && now.saturating_sub(scan.at) <= accesses
        })
    }
}

impl Scan {
    /// The chance that it reads `distance` blocks further: what has lasted long goes on for long
    /// (Pareto with exponent 1).
    pub fn survival(&self, distance: u64) -> f64 {
        let run = self.run as f64;
        run / (run + distance as f64)
    }

    /// The share of the volume's accesses that were this run's since it began.
    pub fn share(&self, now: u64) -> f64 {
        let since = now.saturating_sub(self.began).max(1);
        (self.run as f64 / since as f64).min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_runs_are_told_apart() {
        let mut scans = Scans::default();
        for i in 0..100u64 {
            scans.read(i * 8, i * 8 + 7, i * 20);
            scans.read(1_000_000 + i, 1_000_000 + i, i * 20 + 8);
            scans.read(
                i * 7919 % 100_000 + 10_000_000,
                i * 7919 % 100_000 + 10_000_000,
                i * 20 + 9,
            );
        }
        let live: Vec<_> = scans.live(2000, 100, 4).map(|s| (s.next, s.run)).collect();
        assert_eq!(live, [(800, 800), (1_000_100, 100)]);
        assert_eq!(
            scans.live(1_000_000, 100, 4).count(),
            0,
            "idle runs are over"
        );
    }

    #[test]
    fn a_request_a_little_out_of_order_does_not_end_a_run() {
        let mut scans = Scans::default();
        scans.read(0, 7, 0);
        scans.read(16, 23, 8);
        let scan = scans.read(24, 31, 16);
        assert_eq!((scan.next, scan.requests), (32, 3));
        let again = scans.read(24, 31, 24);
        assert_eq!(
            again.requests, 1,
            "what was read before does not go on with it"
        );
    }

    #[test]
    fn the_ends_of_the_address_range_are_fine() {
        let mut scans = Scans::default();
        scans.read(u64::MAX - 1, u64::MAX, 0);
        scans.read(0, u64::MAX, u64::MAX);
        let scan = scans.read(u64::MAX, u64::MAX, 0);
        assert!(scan.survival(u64::MAX) >= 0.0 && scan.share(0) <= 1.0);
    }
}
