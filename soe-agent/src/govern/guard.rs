//! The foreground-latency guard: how fast background reads may go without hurting others. Pure.

use std::time::Duration;

/// Measures the foreground's latency on a volume, the agent's own I/O left out.
pub trait LatencyProbe: Send + Sync {
    /// 99th percentile since the last call; `None` when there was too little I/O to say.
    fn p99(&self) -> Option<Duration>;
}

impl<F: Fn() -> Option<Duration> + Send + Sync> LatencyProbe for F {
    fn p99(&self) -> Option<Duration> {
        self()
    }
}

/// What the guard keeps to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GuardLimits {
    /// The foreground's 99th percentile may not be above this because of us.
    pub target: Duration,
    /// Rate never gone below, in bytes per second, so that a capture ends some day even on a volume
    /// that misses its target without us. 0 lets it stop altogether.
    pub floor: u64,
    /// Rate never exceeded, in bytes per second.
    pub ceiling: u64,
    /// Added for each quiet observation, in bytes per second.
    pub step: u64,
}

impl GuardLimits {
    /// Limits for a volume with this target and at most `ceiling` bytes per second.
    pub fn new(target: Duration, ceiling: u64) -> Self {
        Self {
            target,
            floor: (ceiling / 256).max(64 << 10).min(ceiling),
            ceiling,
            step: (ceiling / 64).max(1),
        }
    }
}

/// Share of the rate that is kept when the target is missed.
const BACK_OFF: f64 = 0.5;
/// Share of the target above which the rate is held, neither raised nor lowered.
const COMFORT: f64 = 0.8;
/// Quiet observations in a row after which the step doubles.
const PATIENCE: u32 = 8;

/// Additive increase, multiplicative decrease of the rate, by observations of the foreground.
#[derive(Clone, Copy, Debug)]
pub struct LatencyGuard {
    limits: GuardLimits,
    rate: u64,
    calm: u32,
    back_offs: u64,
}

impl LatencyGuard {
    /// Begins carefully, with one step above the floor.
    pub fn new(limits: GuardLimits) -> Self {
        let start = limits.floor.saturating_add(limits.step);
        Self {
            rate: start.clamp(limits.floor, limits.ceiling.max(limits.floor)),
            limits,
            calm: 0,
            back_offs: 0,
        }
    }

    /// Takes one observation (call it in regular intervals of 50 to 200 ms) and returns the rate
    /// allowed from now on, in bytes per second.
    ///
    /// Without foreground I/O there is nobody to hurt, so the rate doubles.
    pub fn observe(&mut self, p99: Option<Duration>) -> u64 {
        let limits = self.limits;
        let wanted = match p99 {
            None => {
                self.calm = self.calm.saturating_add(1);
                self.rate.saturating_mul(2).max(limits.step)
            }
            Some(p99) if p99 > limits.target => {
                self.calm = 0;
                self.back_offs += 1;
                // Twice the target or more: it is not a matter of fine tuning.
                let share = if p99 > limits.target * 2 {
                    BACK_OFF * BACK_OFF
                } else {
                    BACK_OFF
                };
                (self.rate as f64 * share) as u64
            }
            Some(p99) if p99 > limits.target.mul_f64(COMFORT) => {
                self.calm = 0;
                self.rate
            }
            Some(_) => {
                self.calm = self.calm.saturating_add(1);
                let steps = 1 << (self.calm / PATIENCE).min(4);
                self.rate.saturating_add(limits.step.saturating_mul(steps))
            }
        };
        self.rate = wanted.clamp(limits.floor, limits.ceiling.max(limits.floor));
        self.rate
    }

    /// Asks the probe and returns the rate allowed from now on, in bytes per second.
    pub fn observe_probe(&mut self, probe: &dyn LatencyProbe) -> u64 {
        self.observe(probe.p99())
    }

    /// The rate allowed now, in bytes per second.
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// How often the guard had to back off.
    pub fn back_offs(&self) -> u64 {
        self.back_offs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    fn limits() -> GuardLimits {
        GuardLimits::new(5 * MS, 500 << 20)
    }

    /// A disk whose latency grows with the share of its bandwidth that is used, as a queue's does.
    fn latency(bandwidth: f64, foreground: f64, ours: f64) -> Duration {
        let free = (1.0 - (foreground + ours) / bandwidth).max(0.02);
        MS.mul_f64(1.0 / free)
    }

    #[test]
    fn it_takes_the_disk_when_nobody_else_does() {
        let mut guard = LatencyGuard::new(limits());
        for _ in 0..20 {
            guard.observe(None);
        }
        assert_eq!(guard.rate(), limits().ceiling);
    }

    #[test]
    fn it_settles_where_the_foreground_keeps_its_target() {
        let bandwidth = 400e6;
        let mut guard = LatencyGuard::new(limits());
        let mut missed = 0;
        let mut bytes = 0.0;
        for round in 0..2000 {
            let p99 = latency(bandwidth, 100e6, guard.rate() as f64);
            guard.observe(Some(p99));
            if round >= 200 {
                missed += u32::from(p99 > limits().target);
                bytes += guard.rate() as f64;
            }
        }
        let mean = bytes / 1800.0;
        // 1 ms / (1 - used) = 5 ms at 80 % use: 220 MB/s are left for us.
        assert!(missed < 180, "target missed in {missed} of 1800 rounds");
        assert!(mean > 100e6 && mean < 240e6, "mean rate {mean}");
    }

    #[test]
    fn it_yields_within_a_second_when_a_burst_comes() {
        let mut guard = LatencyGuard::new(limits());
        (0..50).for_each(|_| {
            guard.observe(None);
        });
        let mut rounds = 0;
        while latency(400e6, 280e6, guard.rate() as f64) > limits().target {
            guard.observe(Some(latency(400e6, 280e6, guard.rate() as f64)));
            rounds += 1;
            assert!(rounds <= 10, "still {} bytes/s", guard.rate());
        }
    }

    #[test]
    fn a_volume_that_misses_its_target_by_itself_still_gets_the_floor() {
        let mut guard = LatencyGuard::new(limits());
        (0..100).for_each(|_| {
            guard.observe(Some(50 * MS));
        });
        assert_eq!(guard.rate(), limits().floor);
        assert_eq!(guard.back_offs(), 100);
    }

    proptest! {
        #[test]
        fn it_stays_within_its_limits(
            seen in proptest::collection::vec(proptest::option::of(0u64..20_000), 0..200),
            floor in 0u64..1000,
            ceiling in 0u64..100_000,
        ) {
            let limits = GuardLimits { target: 5 * MS, floor, ceiling, step: 100 };
            let mut guard = LatencyGuard::new(limits);
            for micros in seen {
                let before = guard.rate();
                let p99 = micros.map(Duration::from_micros);
                let rate = guard.observe(p99);
                prop_assert!(rate >= floor && rate <= ceiling.max(floor));
                if p99.is_some_and(|p99| p99 > limits.target) {
                    prop_assert!(rate <= before.max(floor));
                }
            }
        }
    }
}
