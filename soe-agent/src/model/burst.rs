//! What a burst is: a bin above the trailing threshold, and an onset the first of them.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::series::{TimeScale, quantile_of_sorted};

/// The definition of a burst.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BurstRule {
    /// Trailing seasons from which the threshold is taken.
    pub seasons: usize,
    /// The quantile of trailing load a burst exceeds, 0 to 1.
    pub quantile: f64,
    /// The multiple of the trailing median a burst exceeds.
    pub median_factor: f64,
    /// Bins without a burst before a burst counts as a new one.
    pub quiet_bins: usize,
    /// A load up to this is never a burst, in bytes per second.
    pub floor: f64,
    /// Whether bursts may fill more of the time than `quantile` leaves: the threshold then is at
    /// most halfway between the median and the 0.99 quantile. Without this a job that runs two
    /// hours a day (8 % of the time) lifts the 0.95 quantile to its own load and is never seen.
    pub long_bursts: bool,
}

impl BurstRule {
    /// The definition by which published figures are computed: the greater of the 0.95 quantile
    /// and twice the median of the trailing seven seasons, and nothing else.
    pub const STRICT: BurstRule = BurstRule {
        seasons: 7,
        quantile: 0.95,
        median_factor: 2.0,
        quiet_bins: 3,
        floor: 0.0,
        long_bursts: false,
    };
}

impl Default for BurstRule {
    fn default() -> Self {
        Self {
            long_bursts: true,
            ..Self::STRICT
        }
    }
}

/// What was found about one bin.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BurstMark {
    /// The threshold that applied, in bytes per second, from the bins before this one.
    pub threshold: f64,
    /// Whether the bin was a burst.
    pub burst: bool,
    /// Whether a burst began in the bin.
    pub onset: bool,
}

/// Finds bursts bin by bin.
#[derive(Clone, Debug)]
pub struct BurstDetector {
    rule: BurstRule,
    window: usize,
    min_samples: usize,
    recent: VecDeque<f32>,
    sorted: Vec<f32>,
    quiet_run: usize,
    in_burst: bool,
}

impl BurstDetector {
    /// A detector that has seen nothing.
    pub fn new(scale: TimeScale, rule: BurstRule) -> Self {
        Self {
            rule,
            window: rule.seasons.max(1) * scale.season_bins(),
            min_samples: (scale.season_bins() / 12).max(8),
            recent: VecDeque::new(),
            sorted: Vec::new(),
            quiet_run: 0,
            in_burst: false,
        }
    }

    /// The threshold for the next bin, in bytes per second; infinite while too little is known.
    pub fn threshold(&self) -> f64 {
        if self.sorted.len() < self.min_samples {
            return f64::INFINITY;
        }
        let mut high = f64::from(quantile_of_sorted(&self.sorted, self.rule.quantile));
        if self.rule.long_bursts {
            let top = f64::from(quantile_of_sorted(&self.sorted, 0.99));
            high = high.min((self.median() + top) / 2.0);
        }
        high.max(self.rule.median_factor * self.median())
            .max(self.rule.floor)
    }

    /// The trailing median load in bytes per second.
    pub fn median(&self) -> f64 {
        f64::from(quantile_of_sorted(&self.sorted, 0.5))
    }

    /// Whether the last known bin was a burst.
    pub fn in_burst(&self) -> bool {
        self.in_burst
    }

    /// Judges the next bin by what came before it, then learns from it. A missing bin neither
    /// begins nor ends anything.
    pub fn push(&mut self, load: Option<f64>) -> BurstMark {
        let threshold = self.threshold();
        let Some(load) = load.filter(|l| l.is_finite()) else {
            return BurstMark {
                threshold,
                burst: false,
                onset: false,
            };
        };
        // As it will be learnt: of a volume with few different loads the threshold often is one of them, and
        // a rounding must not put the same load above it.
        let load = f64::from(load as f32);
        let burst = load > threshold;
        let onset = burst && !self.in_burst && self.quiet_run >= self.rule.quiet_bins;
        self.in_burst = burst;
        self.quiet_run = if burst { 0 } else { self.quiet_run + 1 };
        self.learn(load as f32);
        BurstMark {
            threshold,
            burst,
            onset,
        }
    }

    fn learn(&mut self, load: f32) {
        if self.recent.len() >= self.window
            && let Some(old) = self.recent.pop_front()
        {
            let at = self.sorted.partition_point(|v| *v < old);
            self.sorted.remove(at);
        }
        self.recent.push_back(load);
        let at = self.sorted.partition_point(|v| *v < load);
        self.sorted.insert(at, load);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn detector(seasons: usize) -> BurstDetector {
        let rule = BurstRule {
            seasons,
            ..BurstRule::STRICT
        };
        BurstDetector::new(TimeScale::new(Duration::from_secs(1), 24).unwrap(), rule)
    }

    #[test]
    fn an_onset_needs_quiet_before_it() {
        let mut d = detector(7);
        for i in 0..100 {
            assert!(!d.push(Some(10.0 + f64::from(i % 3))).onset);
        }
        assert!(d.push(Some(100.0)).onset);
        assert!(!d.push(Some(100.0)).onset, "the burst goes on");
        d.push(Some(10.0));
        let again = d.push(Some(100.0));
        assert!(again.burst && !again.onset, "one quiet bin is not enough");
        for _ in 0..3 {
            d.push(Some(10.0));
        }
        assert!(d.push(Some(100.0)).onset);
    }

    #[test]
    fn constant_and_unknown_load_never_bursts() {
        let mut d = detector(7);
        for _ in 0..200 {
            assert!(!d.push(Some(5.0)).burst);
            assert!(!d.push(None).burst);
            assert!(!d.push(Some(f64::NAN)).burst);
        }
    }

    #[test]
    fn a_job_that_fills_a_fifth_of_the_time_is_a_burst_unless_the_rule_is_strict() {
        let onsets = |rule| {
            let scale = TimeScale::new(Duration::from_secs(1), 24).unwrap();
            let mut d = BurstDetector::new(scale, rule);
            (0..240)
                .filter(|i| d.push(Some(if i % 20 < 4 { 100.0 } else { 10.0 })).onset)
                .count()
        };
        assert!(onsets(BurstRule::default()) >= 10);
        assert_eq!(onsets(BurstRule::STRICT), 0);
    }

    #[test]
    fn a_load_that_is_the_threshold_is_no_burst() {
        // Not exact in binary: as f32 it is a little less.
        let mut d = detector(7);
        assert!((0..200).all(|i| !d.push(Some(if i % 4 == 0 { 716.8 } else { 0.0 })).burst));
    }

    #[test]
    fn nothing_is_a_burst_before_enough_is_known() {
        let mut d = detector(7);
        assert!(!d.push(Some(1e12)).burst);
        assert!(d.threshold().is_infinite());
    }

    proptest! {
        #[test]
        fn the_threshold_is_that_of_a_plain_sort(
            loads in proptest::collection::vec(0.0f64..1e6, 0..300)
        ) {
            let mut d = detector(2);
            for (i, load) in loads.iter().enumerate() {
                let mut window: Vec<f32> =
                    loads[i.saturating_sub(48)..i].iter().map(|v| *v as f32).collect();
                window.sort_by(f32::total_cmp);
                let mark = d.push(Some(*load));
                if window.len() < 8 {
                    prop_assert!(mark.threshold.is_infinite());
                } else {
                    let expected = f64::from(quantile_of_sorted(&window, 0.95))
                        .max(2.0 * f64::from(quantile_of_sorted(&window, 0.5)));
                    prop_assert_eq!(mark.threshold, expected);
                    prop_assert_eq!(mark.burst, f64::from(*load as f32) > expected);
                }
            }
        }
    }
}
