//! How many requests to keep in flight. Pure.

use std::time::Duration;

/// Finds by measuring the depth from which on more requests in flight bring no more bytes.
///
/// It compares the throughput of one round of requests with that of the round before: a step that
/// gained is followed by another in the same direction, one that did not is taken back by a step the
/// other way. Without gain it drifts down, because depth costs the foreground latency.
#[derive(Clone, Copy, Debug)]
pub(super) struct DepthControl {
    depth: u32,
    max: u32,
    rising: bool,
    last_rate: f64,
    round_bytes: u64,
    round_requests: u32,
    round_began: Duration,
}

/// A round's throughput must grow by this much to count as a gain.
const GAIN: f64 = 1.05;
/// Requests of a round for each request in flight.
const ROUND: u32 = 4;

impl DepthControl {
    /// Begins at `start` and stays within 1 and `max`.
    pub(super) fn new(start: u32, max: u32) -> Self {
        let max = max.max(1);
        Self {
            depth: start.clamp(1, max),
            max,
            rising: true,
            last_rate: 0.0,
            round_bytes: 0,
            round_requests: 0,
            round_began: Duration::ZERO,
        }
    }

    /// Requests to keep in flight now.
    pub(super) fn depth(&self) -> usize {
        self.depth as usize
    }

    /// Begins measuring at `now`: what came before was another read.
    pub(super) fn restart(&mut self, now: Duration) {
        self.round_bytes = 0;
        self.round_requests = 0;
        self.round_began = now;
    }

    /// A request of `bytes` completed at `now`.
    pub(super) fn completed(&mut self, bytes: u64, now: Duration) {
        self.round_bytes += bytes;
        self.round_requests += 1;
        if self.round_requests < self.depth * ROUND || now <= self.round_began {
            return;
        }
        let rate = self.round_bytes as f64 / (now - self.round_began).as_secs_f64();
        let gained = rate > self.last_rate * GAIN;
        let lost = rate * GAIN < self.last_rate;
        self.rising = match (self.rising, gained) {
            (true, gained) => gained,
            // Fewer requests in flight for the same bytes is a gain of its own.
            (false, _) => lost,
        };
        let step = (self.depth / 4).max(1);
        self.depth = if self.rising {
            (self.depth + step).min(self.max)
        } else {
            self.depth.saturating_sub(step).max(1)
        };
        self.last_rate = rate;
        self.restart(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk that serves `parallel` requests at a time, each in 1 ms.
    fn settle(parallel: u32, start: u32) -> Vec<u32> {
        let mut control = DepthControl::new(start, 64);
        let mut now = Duration::ZERO;
        let mut seen = Vec::new();
        for _ in 0..20_000 {
            let busy = f64::from(control.depth.min(parallel));
            now += Duration::from_secs_f64(0.001 / busy);
            control.completed(1 << 20, now);
            seen.push(control.depth);
        }
        seen.split_off(10_000)
    }

    #[test]
    fn it_finds_the_depth_the_disk_can_use() {
        for (parallel, start) in [(1, 16), (4, 1), (12, 4), (40, 4)] {
            let depths = settle(parallel, start);
            let mean = depths.iter().sum::<u32>() as f64 / depths.len() as f64;
            let ratio = mean / f64::from(parallel);
            assert!(
                (0.5..=2.0).contains(&ratio) || (parallel == 1 && mean < 3.0),
                "a disk of {parallel} from {start}: {mean}"
            );
        }
    }

    #[test]
    fn it_stays_within_its_bounds() {
        assert!(settle(1000, 64).iter().all(|depth| *depth <= 64));
        assert!(settle(1, 1).iter().all(|depth| *depth >= 1));
    }
}
