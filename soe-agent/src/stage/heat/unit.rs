//! What is remembered of one block: in which bursts it was read, and how often at all. Pure.

/// Reads counted of one block in one burst at most: more are the work of the live cache.
const MOST_READS: u16 = 64;
/// How much of the mean reads per burst is kept at each burst in which the block was read.
const KEEP_MEAN: f32 = 0.9;
/// Accesses in a window of [`Unit::window_rate`].
pub const WINDOW: u64 = 4096;
/// How much of the share of windows is kept per window.
const KEEP_WINDOW: f32 = 0.95;

/// The clock of the volume: what "now" is for its blocks. Counted in accesses and bursts, not in
/// time, so that an idle weekend ages nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Clock {
    /// Blocks accessed so far.
    pub accesses: u64,
    /// Bursts that have ended so far.
    pub bursts: u32,
    /// Accesses after which a read counts 1/e in the slow count.
    pub slow: f32,
    /// The same of the fast count.
    pub fast: f32,
}

/// One block's history, 64 bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unit {
    /// The block's index.
    pub index: u64,
    /// Bit `j`: it was read in the burst `j` before the last one, as of `epoch`.
    bursts: u64,
    /// Access clock at the last access.
    at: u64,
    /// Bit `j`: it was read soon after that burst.
    after: u32,
    /// Bursts that had ended when the bits were last shifted.
    epoch: u32,
    slow: f32,
    fast: f32,
    writes: f32,
    windows: f32,
    window: u32,
    reads_per_burst: f32,
    bursts_read: f32,
    reads_now: u16,
    overwritten_now: bool,
}

impl Unit {
    /// A block never touched.
    pub fn new(index: u64, clock: &Clock) -> Self {
        Self {
            index,
            epoch: clock.bursts,
            at: clock.accesses,
            ..Self::default()
        }
    }

    /// Counts a read; `in_burst` while a burst runs, `after_burst` soon after one.
    pub fn read(&mut self, clock: &Clock, weight: f32, in_burst: bool, after_burst: bool) {
        self.settle(clock);
        self.decay(clock);
        self.slow += weight;
        self.fast += weight;
        let window = (clock.accesses / WINDOW) as u32;
        if self.windows == 0.0 || self.window != window {
            self.windows = self.windows * keep(KEEP_WINDOW, window.wrapping_sub(self.window)) + 1.0;
            self.window = window;
        }
        if in_burst && !self.overwritten_now {
            self.reads_now = (self.reads_now + 1).min(MOST_READS);
        }
        if after_burst && clock.bursts > 0 {
            self.after |= 1;
        }
    }

    /// Counts a write: from now on a staged copy would be stale.
    pub fn write(&mut self, clock: &Clock, weight: f32, in_burst: bool) {
        self.settle(clock);
        self.decay(clock);
        self.writes += weight;
        self.overwritten_now = in_burst;
    }

    /// Reads in the burst that runs now, as far as they came before a write.
    pub fn reads_now(&self) -> u16 {
        self.reads_now
    }

    /// Shifts the bits to `clock.bursts`, the reads of the burst that ended among them.
    pub fn settle(&mut self, clock: &Clock) {
        let ended = clock.bursts.saturating_sub(self.epoch);
        if ended == 0 {
            return;
        }
        self.bursts = self.bursts.checked_shl(ended).unwrap_or(0);
        self.after = self.after.checked_shl(ended).unwrap_or(0);
        if self.reads_now > 0 {
            self.bursts |= 1u64.checked_shl(ended - 1).unwrap_or(0);
            self.reads_per_burst = self.reads_per_burst * KEEP_MEAN + f32::from(self.reads_now);
            self.bursts_read = self.bursts_read * KEEP_MEAN + 1.0;
        }
        self.reads_now = 0;
        self.overwritten_now = false;
        self.epoch = clock.bursts;
    }

    fn decay(&mut self, clock: &Clock) {
        let age = clock.accesses.saturating_sub(self.at) as f32;
        self.slow *= (-age / clock.slow).exp();
        self.writes *= (-age / clock.slow).exp();
        self.fast *= (-age / clock.fast).exp();
        self.at = clock.accesses;
    }

    /// Reads in a burst in which it is read at all.
    pub fn mean_reads(&self) -> f32 {
        // Half a burst of one read is assumed beforehand.
        (self.reads_per_burst + 0.5) / (self.bursts_read + 0.5)
    }

    /// The weights of the bursts in which it was read, added up; `weights[0]` is the last burst's.
    pub fn in_bursts(&self, weights: &[f32]) -> f32 {
        weighted(self.bursts, weights)
    }

    /// The same for the time soon after those bursts.
    pub fn after_bursts(&self, weights: &[f32]) -> f32 {
        weighted(u64::from(self.after), weights)
    }

    /// Reads expected in `accesses` accesses when they go on as over the long run.
    pub fn slow_rate(&self, clock: &Clock, accesses: f32) -> f32 {
        let age = clock.accesses.saturating_sub(self.at) as f32;
        self.slow * (-age / clock.slow).exp() / clock.slow.min(clock.accesses.max(1) as f32)
            * accesses
    }

    /// Reads expected in `accesses` accesses when they go on as lately.
    pub fn fast_rate(&self, clock: &Clock, accesses: f32) -> f32 {
        let age = clock.accesses.saturating_sub(self.at) as f32;
        self.fast * (-age / clock.fast).exp() / clock.fast.min(clock.accesses.max(1) as f32)
            * accesses
    }

    /// The share of windows of 4,096 accesses in which it was read, of late.
    pub fn window_rate(&self, clock: &Clock) -> f32 {
        let now = (clock.accesses / WINDOW) as u32;
        self.windows * keep(KEEP_WINDOW, now.wrapping_sub(self.window)) * (1.0 - KEEP_WINDOW)
    }

    /// Accesses to the volume since the last one to this block.
    pub fn age(&self, clock: &Clock) -> f32 {
        clock.accesses.saturating_sub(self.at) as f32
    }

    /// The share of its accesses that are reads, a write counting `penalty` reads.
    pub fn read_share(&self, penalty: f32) -> f32 {
        let against = self.slow + penalty.max(0.0) * self.writes;
        if against > 0.0 {
            self.slow / against
        } else {
            0.0
        }
    }
}

fn keep(share: f32, times: u32) -> f32 {
    share.powi(times.min(10_000) as i32)
}

fn weighted(mut bits: u64, weights: &[f32]) -> f32 {
    let mut sum = 0.0;
    while bits != 0 {
        match weights.get(bits.trailing_zeros() as usize) {
            Some(weight) => sum += weight,
            None => break,
        }
        bits &= bits - 1;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(accesses: u64, bursts: u32) -> Clock {
        Clock {
            accesses,
            bursts,
            slow: 1e5,
            fast: 1e4,
        }
    }

    #[test]
    fn the_bits_say_in_which_bursts_it_was_read() {
        let mut unit = Unit::new(1, &clock(0, 0));
        unit.read(&clock(1, 0), 1.0, true, false);
        unit.read(&clock(2, 0), 1.0, true, false);
        unit.read(&clock(3, 1), 1.0, false, true);
        unit.read(&clock(4, 3), 1.0, true, false);
        unit.settle(&clock(5, 4));
        let weights = [1.0, 10.0, 100.0, 1000.0];
        assert_eq!(unit.in_bursts(&weights), 1001.0);
        assert_eq!(unit.after_bursts(&weights), 1000.0);
        assert!((unit.mean_reads() - (2.0 * 0.9 + 1.0 + 0.5) / (0.9 + 1.0 + 0.5)).abs() < 1e-5);
        unit.settle(&clock(6, u32::MAX));
        assert_eq!(unit.in_bursts(&[1.0; 64]), 0.0, "long ago is forgotten");
    }

    #[test]
    fn reads_after_an_overwrite_in_the_burst_do_not_count() {
        let mut unit = Unit::new(1, &clock(0, 0));
        unit.read(&clock(1, 0), 1.0, true, false);
        unit.write(&clock(2, 0), 1.0, true);
        unit.read(&clock(3, 0), 1.0, true, false);
        assert_eq!(unit.reads_now(), 1);
        assert!(unit.read_share(1.0) < 0.7 && unit.read_share(0.0) == 1.0);
    }

    #[test]
    fn rates_fall_when_others_are_accessed() {
        let mut unit = Unit::new(1, &clock(0, 0));
        for i in 0..10 {
            unit.read(&clock(i, 0), 1.0, false, false);
        }
        let (soon, late) = (clock(20, 0), clock(40_000, 0));
        assert!(unit.fast_rate(&late, 1e3) < 0.2 * unit.slow_rate(&late, 1e3));
        assert!(unit.window_rate(&late) < unit.window_rate(&soon));
        assert_eq!(std::mem::size_of::<Unit>(), 64);
    }
}
