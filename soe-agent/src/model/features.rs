//! The network's inputs, from what is known at one moment. Pure.

use super::SHORT_HORIZON;
use super::onset::intervals;
use super::series::{Known, Row, SEASONS_IN_WEEK};

/// The newest bins, each an input.
const LAGS: usize = 24;
/// Equal parts of the trailing season, each mean an input.
const PARTS: usize = 8;
/// Groups of neighbouring bins of the horizon for which the onset history is an input.
const ONSET_GROUPS: usize = 3;

/// How many inputs a sample has.
pub const INPUTS: usize = LAGS + PARTS + 2 * SHORT_HORIZON + 7 + 6 + ONSET_GROUPS + 3 + 3;

/// Changes whenever the meaning of an input does; saved with the weights.
pub const FEATURE_VERSION: u32 = 1;

/// The level and spread by which one sample is normalised, both on the log scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normal {
    /// Mean of the trailing season's log load.
    pub mean: f32,
    /// Its standard deviation, never below [`Normal::MIN_DEVIATION`].
    pub deviation: f32,
}

impl Normal {
    /// Keeps nearly constant series from being blown up to noise.
    pub const MIN_DEVIATION: f32 = 0.2;

    /// The normalisation of what is known.
    pub fn of(known: Known<'_>) -> Self {
        let season = known.season();
        let n = season.len().max(1) as f64;
        let mean = season.iter().map(|r| f64::from(r.log)).sum::<f64>() / n;
        let variance = season
            .iter()
            .map(|r| (f64::from(r.log) - mean).powi(2))
            .sum::<f64>()
            / n;
        Self {
            mean: mean as f32,
            deviation: (variance.sqrt() as f32).max(Self::MIN_DEVIATION),
        }
    }

    /// Log load to the network's scale.
    pub fn apply(&self, log: f32) -> f32 {
        ((log - self.mean) / self.deviation).clamp(-10.0, 10.0)
    }

    /// The network's scale to log load.
    pub fn invert(&self, z: f32) -> f32 {
        z * self.deviation + self.mean
    }
}

/// The inputs for a forecast of the bins after what is known: [`INPUTS`] finite values.
pub fn features(known: Known<'_>) -> (Vec<f32>, Normal) {
    let normal = Normal::of(known);
    let mut x = Vec::with_capacity(INPUTS);
    let z = |row: &Row| normal.apply(row.log);

    // What just happened.
    x.extend((1..=LAGS).map(|back| known.back(back).map_or(0.0, z)));
    // The shape of the trailing season.
    let season_bins = known.scale.season_bins();
    for part in 0..PARTS {
        let from = part * season_bins / PARTS;
        let to = (part + 1) * season_bins / PARTS;
        x.push(mean(
            (from + 1..=to).filter_map(|back| known.back(back).map(z)),
        ));
    }
    // The same clock time a season ago and over seven.
    for h in 0..SHORT_HORIZON {
        let same = |k: usize| (k * season_bins).checked_sub(h).and_then(|b| known.back(b));
        x.push(same(1).map_or(0.0, z));
        x.push(mean((1..=SEASONS_IN_WEEK).filter_map(|k| same(k).map(z))));
    }
    level(known, normal, &mut x);
    clock(known, &mut x);
    onset_history(known, &mut x);
    mix(known, &mut x);
    debug_assert_eq!(x.len(), INPUTS);
    (x, normal)
}

/// Where the volume stands: level, spread, extremes, gaps.
fn level(known: Known<'_>, normal: Normal, x: &mut Vec<f32>) {
    let season = known.season();
    let share = |hit: &dyn Fn(&Row) -> bool| {
        season.iter().filter(|r| hit(r)).count() as f32 / season.len().max(1) as f32
    };
    let logs = || season.iter().map(|r| r.log);
    x.push(normal.mean / 10.0);
    x.push(normal.deviation);
    x.push(normal.apply(logs().fold(0.0, f32::max)));
    x.push(normal.apply(logs().fold(f32::INFINITY, f32::min).min(1e6)));
    x.push(share(&|r| r.load == 0.0));
    x.push(share(&|r| !r.known));
    x.push(mean((1..=SHORT_HORIZON / 2).filter_map(|b| {
        let (new, old) = (known.back(b)?, known.back(b + SHORT_HORIZON / 2)?);
        Some(normal.apply(new.log) - normal.apply(old.log))
    })));
}

/// Phase in the season, twice the season and the week.
fn clock(known: Known<'_>, x: &mut Vec<f32>) {
    let season = known.scale.season_bins() as i64;
    for (period, harmonic) in [
        (season, 1.0),
        (season, 2.0),
        (season * SEASONS_IN_WEEK as i64, 1.0),
    ] {
        let phase = known.next_index().rem_euclid(period) as f64 / period as f64;
        let angle = std::f64::consts::TAU * phase * harmonic;
        x.push(angle.sin() as f32);
        x.push(angle.cos() as f32);
    }
}

/// Onsets at the clock times to come, and the rhythm since the last one.
fn onset_history(known: Known<'_>, x: &mut Vec<f32>) {
    let season = known.scale.season_bins();
    let group = SHORT_HORIZON / ONSET_GROUPS;
    for g in 0..ONSET_GROUPS {
        let mut onsets = 0.0;
        let mut seasons: f32 = 0.0;
        for k in 1..=SEASONS_IN_WEEK {
            let rows = (g * group..(g + 1) * group)
                .filter_map(|h| (k * season).checked_sub(h).and_then(|b| known.back(b)));
            let mut any = None;
            for row in rows {
                any = Some(any.unwrap_or(false) || row.onset);
            }
            if let Some(any) = any {
                seasons += 1.0;
                onsets += f32::from(u8::from(any));
            }
        }
        x.push(onsets / seasons.max(1.0));
    }
    let (intervals, age) = intervals(known);
    let week = known.scale.week_bins() as f32;
    x.push(age.map_or(1.0, |a| (a as f32).ln_1p() / week.ln_1p()));
    let mean_interval = mean(intervals.iter().map(|i| *i as f32));
    x.push(match age {
        Some(age) if mean_interval > 0.0 => (age as f32 / mean_interval).min(3.0),
        _ => 0.0,
    });
    x.push(f32::from(u8::from(known.back(1).is_some_and(|r| r.burst))));
}

/// What kind of load it is.
fn mix(known: Known<'_>, x: &mut Vec<f32>) {
    x.push(known.back(1).map_or(0.5, |r| r.read_share));
    x.push(mean(known.season().iter().map(|r| r.read_share)));
    x.push(known.back(1).map_or(0.0, |r| r.log_size / 5.0));
}

fn mean(values: impl Iterator<Item = f32>) -> f32 {
    let (sum, n) = values.fold((0.0f32, 0u32), |(s, n), v| (s + v, n + 1));
    if n == 0 { 0.0 } else { sum / n as f32 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::burst::BurstRule;
    use crate::model::series::{LoadBin, Series, TimeScale};
    use proptest::prelude::*;
    use std::time::Duration;

    fn series(loads: &[Option<f64>]) -> Series {
        let scale = TimeScale::new(Duration::from_secs(1), 24).unwrap();
        let mut series = Series::new(scale, BurstRule::default(), 8);
        for (i, load) in loads.iter().enumerate() {
            let bin = load.map(|b| LoadBin {
                read_bytes: b,
                read_ops: 3.0,
                ..LoadBin::default()
            });
            series.push(i as i64 * 1_000_000_000, bin).unwrap();
        }
        series
    }

    #[test]
    fn one_point_gives_finite_inputs() {
        let s = series(&[Some(5.0)]);
        let (x, _) = features(s.known());
        assert_eq!(x.len(), INPUTS);
        assert!(x.iter().all(|v| v.is_finite()));
    }

    #[test]
    fn scaling_the_load_leaves_the_lags_alone() {
        let a: Vec<_> = (0..100)
            .map(|i| Some(1e6 * (1.0 + f64::from(i % 7))))
            .collect();
        let b: Vec<_> = a.iter().map(|v| v.map(|v| v * 64.0)).collect();
        let (xa, _) = features(series(&a).known());
        let (xb, _) = features(series(&b).known());
        for i in 0..LAGS + PARTS {
            assert!((xa[i] - xb[i]).abs() < 0.01, "{i}: {} {}", xa[i], xb[i]);
        }
    }

    proptest! {
        #[test]
        fn inputs_are_finite_and_do_not_look_ahead(
            loads in proptest::collection::vec(
                proptest::option::weighted(0.9, prop_oneof![Just(0.0), 0.0f64..1e12]), 2..260),
            cut in 1usize..259,
        ) {
            let cut = cut.min(loads.len() - 1);
            let mut altered = loads.clone();
            for v in &mut altered[cut..] {
                *v = Some(123_456.0);
            }
            let (a, b) = (series(&loads), series(&altered));
            let gone_a = loads.len() - a.len();
            let gone_b = loads.len() - b.len();
            prop_assert_eq!(gone_a, gone_b);
            let (xa, na) = features(a.until(cut.saturating_sub(gone_a)));
            let (xb, nb) = features(b.until(cut.saturating_sub(gone_b)));
            prop_assert_eq!(na, nb);
            prop_assert!(xa.iter().all(|v| v.is_finite()));
            prop_assert_eq!(xa, xb);
        }
    }
}
