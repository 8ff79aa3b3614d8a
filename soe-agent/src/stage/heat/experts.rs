//! Several simple ways to guess what a burst reads, weighted by what each was good for. Pure.
//!
//! Prediction with expert advice (Littlestone and Warmuth 1994; Herbster and Warmuth 1998 for
//! experts that take turns): each expert scores every block by the reads it expects; after each
//! burst, the share of the burst's reads that its choice would have served is its gain. No expert
//! is trained, so there is little to over-fit, and where only a few bursts were seen the mixture
//! is what its prior says: decayed frequency.

use super::context::Sketch;
use super::unit::{Clock, Unit};

/// Bursts remembered.
pub const BURSTS: usize = 64;
/// Number of experts.
pub const EXPERTS: usize = 20;
/// The expert that is believed before anything was seen: decayed frequency.
pub const FALLBACK: usize = 0;

/// The expert that weighs the bursts before alike, but for a little decay.
pub const EARLIER_BURSTS: usize = 8;

/// One burst of the past.
#[derive(Clone, Debug)]
pub struct Past {
    /// What preceded it.
    pub before: Sketch,
    /// Seconds since midnight (UTC) when it began.
    pub second_of_day: i64,
}

/// How much each past burst counts, by expert family; index 0 is the last burst.
#[derive(Clone, Debug, Default)]
pub struct Kernels {
    families: [Vec<f32>; 4],
    /// Blocks expected to be accessed in the burst.
    accesses: f32,
}

impl Kernels {
    /// The weights for a burst that begins after `before` at `second_of_day`; `past` has the last
    /// burst first.
    pub fn new<'a>(
        past: impl Iterator<Item = &'a Past> + Clone,
        before: &Sketch,
        second_of_day: i64,
        accesses: f32,
    ) -> Self {
        let similar: Vec<f32> = past
            .clone()
            .map(|p| p.before.similarity(before) as f32)
            .collect();
        let clock: Vec<f32> = past
            .map(|p| {
                let apart = (p.second_of_day - second_of_day).rem_euclid(86_400);
                let apart = apart.min(86_400 - apart) as f32;
                (-apart / 1800.0).exp()
            })
            .collect();
        let family = |keep: f32, likeness: Option<&[f32]>| {
            let mut weights: Vec<f32> = (0..similar.len())
                .map(|j| keep.powi(j as i32) * likeness.map_or(1.0, |l| 0.02 + l[j]))
                .collect();
            let sum: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= sum.max(1e-9));
            weights
        };
        Self {
            families: [
                family(0.7, None),
                family(0.93, None),
                family(0.95, Some(&similar)),
                family(0.95, Some(&clock)),
            ],
            accesses,
        }
    }

    /// What each expert expects of `unit`, in reads in the burst; only the order of what one expert
    /// says matters.
    pub fn scores(&self, unit: &Unit, clock: &Clock) -> [f32; EXPERTS] {
        let slow = unit.slow_rate(clock, self.accesses);
        let fast = unit.fast_rate(clock, self.accesses);
        let windows = unit.window_rate(clock);
        let reads = unit.mean_reads();
        let mut scores = [0.0; EXPERTS];
        scores[FALLBACK] = slow;
        scores[1] = fast;
        scores[2] = (slow * windows).sqrt();
        scores[3] = 1.0 / (1.0 + unit.age(clock));
        for (weights, scores) in self.families.iter().zip(scores[4..].chunks_exact_mut(4)) {
            let burst = unit.in_bursts(weights) * reads;
            scores[0] = burst + 1e-4 * slow;
            scores[1] = burst + 0.3 * unit.after_bursts(weights) * reads + slow;
            scores[2] = burst + fast;
            scores[3] = ((burst + 0.01) * (windows + 0.01)).sqrt();
        }
        scores
    }
}

/// How good each expert was.
#[derive(Clone, Debug)]
pub struct Mixture {
    gains: [f64; EXPERTS],
    scale: [f32; EXPERTS],
    /// Reads in the burst per block of the choice.
    yields: [f64; EXPERTS],
    seen: f64,
}

impl Default for Mixture {
    fn default() -> Self {
        Self {
            gains: [0.0; EXPERTS],
            scale: [1.0; EXPERTS],
            yields: [0.0; EXPERTS],
            seen: 0.0,
        }
    }
}

/// How much of the gains is kept per burst.
const KEEP_GAIN: f64 = 0.93;
/// How fast an expert that gains a smaller part of what the best gains loses its say.
const RATE: f64 = 25.0;

/// The gain with which the fallback starts.
const PRIOR_GAIN: f64 = 0.02;
/// Reads per chosen block that are assumed before anything was seen.
const PRIOR_YIELD: f64 = 0.2;

impl Mixture {
    /// Takes in how many of a burst's `reads` the choice of `chosen` blocks of each expert served.
    pub fn learn(&mut self, served: &[f64; EXPERTS], reads: f64, chosen: f64) {
        for (i, served) in served.iter().enumerate() {
            self.gains[i] = self.gains[i] * KEEP_GAIN + served / reads.max(1.0);
            self.yields[i] = self.yields[i] * KEEP_GAIN + served / chosen.max(1.0);
        }
        self.seen = self.seen * KEEP_GAIN + 1.0;
    }

    /// Takes in the mean score of what each expert chose, so that their scores can be added.
    pub fn set_scale(&mut self, means: &[f64; EXPERTS]) {
        for (scale, mean) in self.scale.iter_mut().zip(means) {
            *scale = if *mean > 1e-12 {
                1.0 / *mean as f32
            } else {
                0.0
            };
        }
    }

    /// The factors with which to add the experts' scores, so that the sum is about the number of
    /// reads to expect.
    pub fn weights(&self) -> [f32; EXPERTS] {
        let gain = |i: usize| self.gains[i] + if i == FALLBACK { PRIOR_GAIN } else { 0.0 };
        let best = (0..EXPERTS).map(gain).fold(0.0, f64::max);
        let say: [f64; EXPERTS] = std::array::from_fn(|i| (-RATE * (1.0 - gain(i) / best)).exp());
        let sum: f64 = say.iter().sum();
        let expected = |i: usize| (self.yields[i] + PRIOR_YIELD) / (self.seen + 1.0);
        let mean: f64 = (0..EXPERTS).map(|i| say[i] / sum * expected(i)).sum();
        std::array::from_fn(|i| (say[i] / sum * mean) as f32 * self.scale[i])
    }

    /// The experts' relative gains: the mean share of a burst's reads that each one's choice served.
    pub fn gains(&self) -> [f64; EXPERTS] {
        self.gains.map(|g| g / self.seen.max(1e-9))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expert_that_served_most_has_most_to_say_and_the_fallback_before() {
        let mut mixture = Mixture::default();
        let most = |m: &Mixture| {
            let weights = m.weights();
            (0..EXPERTS).max_by(|a, b| weights[*a].total_cmp(&weights[*b]))
        };
        assert_eq!(most(&mixture), Some(FALLBACK));
        let mut served = [10.0; EXPERTS];
        served[7] = 40.0;
        for _ in 0..3 {
            mixture.learn(&served, 100.0, 20.0);
        }
        assert_eq!(most(&mixture), Some(7));
        assert!((mixture.gains()[7] - 0.4).abs() < 1e-9);
        served[7] = 0.0;
        served[2] = 60.0;
        for _ in 0..20 {
            mixture.learn(&served, 100.0, 20.0);
        }
        assert_eq!(most(&mixture), Some(2), "experts take turns");
    }

    #[test]
    fn weights_stay_finite_when_nothing_is_served() {
        let mut mixture = Mixture::default();
        mixture.learn(&[0.0; EXPERTS], 0.0, 0.0);
        mixture.set_scale(&[0.0; EXPERTS]);
        assert!(mixture.weights().iter().all(|w| w.is_finite() && *w >= 0.0));
    }

    #[test]
    fn similar_and_same_time_bursts_weigh_most() {
        let sketch = |from: u64| {
            let mut recent = super::super::context::Recent::default();
            (from..from + 300).for_each(|b| recent.touch(b));
            recent.sketch()
        };
        let past = [(9000, 40_000), (0, 100)].map(|(from, second_of_day)| Past {
            before: sketch(from),
            second_of_day,
        });
        let kernels = Kernels::new(past.iter(), &sketch(0), 86_399, 100.0);
        let [recent, _, similar, clock] = &kernels.families;
        assert!(recent[0] > recent[1]);
        assert!(similar[1] > 10.0 * similar[0], "{similar:?}");
        assert!(clock[1] > 10.0 * clock[0], "midnight is no wall: {clock:?}");
        for family in &kernels.families {
            assert!((family.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        }
    }
}
