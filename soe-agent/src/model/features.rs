//! The network's inputs, from what is known at one moment. Pure.
//!
//! One sample is one bin of one forecast: its inputs are aligned to that bin (the same clock time a
//! season ago, the same phase of the hours before), so one small network serves every lead.

use super::baselines::Smoothed;
use super::series::{Known, Row, SEASONS_IN_WEEK, quantile_of_sorted};
use super::{QUANTILES, SHORT_HORIZON};

/// The newest bins, each an input.
const RECENT: usize = 4;
/// Parts of a season; an input is the load so many parts before the bin (24 hours of a day).
const PARTS: usize = 24;
/// Levels at which the same clock times of seven seasons are given.
const CLOCK_LEVELS: [f64; 4] = [0.1, 0.5, 0.75, 0.9];
/// Levels at which the trailing season is given.
const TRAILING_LEVELS: [f64; 3] = [0.1, 0.5, 0.9];

/// Where the forecast of the weighted mean begins among the inputs, level by level of [`QUANTILES`]: the
/// network starts out as that forecast.
pub const SMOOTHED_AT: usize = RECENT + PARTS + 1 + CLOCK_LEVELS.len() + 1;

/// How many inputs a sample has.
pub const INPUTS: usize = SMOOTHED_AT + QUANTILES.len() + TRAILING_LEVELS.len() + 3 + 7;

/// Changes whenever the meaning of an input does; saved with the weights.
pub const FEATURE_VERSION: u32 = 2;

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
    pub const MIN_DEVIATION: f32 = 0.1;

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
        ((log - self.mean) / self.deviation).clamp(-8.0, 12.0)
    }

    /// The network's scale to log load.
    pub fn invert(&self, z: f32) -> f32 {
        z * self.deviation + self.mean
    }
}

/// The inputs for forecasts of the [`SHORT_HORIZON`] bins after what is known: [`INPUTS`] finite values
/// for each.
pub fn features(known: Known<'_>) -> (Vec<f32>, Normal) {
    let normal = Normal::of(known);
    let z = |log: f32| normal.apply(log);
    let mut x = Vec::with_capacity(SHORT_HORIZON * INPUTS);
    // What all leads share.
    let recent: Vec<f32> = (1..=RECENT)
        .map(|back| known.back(back).map_or(0.0, |row| z(row.log)))
        .collect();
    let smoothed = Smoothed::of(known);
    let errors = smoothed.error_quantiles();
    let season = sorted(known.season().iter().map(|row| row.log));
    let trailing = TRAILING_LEVELS.map(|level| z(quantile_of_sorted(&season, level)));
    for lead in 0..SHORT_HORIZON {
        x.extend_from_slice(&recent);
        hours(known, lead, normal, &mut x);
        clock_times(known, lead, normal, &mut x);
        x.push(z(smoothed.level));
        x.extend(errors.map(|error| z(smoothed.level + error)));
        x.extend_from_slice(&trailing);
        x.push(normal.mean / 5.0);
        x.push(normal.deviation.ln());
        x.push((lead + 1) as f32 / SHORT_HORIZON as f32);
        clock(known, lead, &mut x);
    }
    debug_assert_eq!(x.len(), SHORT_HORIZON * INPUTS);
    (x, normal)
}

/// The row `back` bins before the bin at `lead`, if that is known already.
fn before(known: Known<'_>, lead: usize, back: usize) -> Option<&Row> {
    known.back(back.checked_sub(lead).filter(|back| *back > 0)?)
}

/// Bins of a part of the season: an hour of a day.
fn part_bins(known: Known<'_>) -> usize {
    (known.scale.season_bins() / PARTS).max(1)
}

/// The load whole parts of the season before the bin. Where a part is shorter than the lead, the newest
/// row of the same phase stands in; where there is no history, the mean.
fn hours(known: Known<'_>, lead: usize, normal: Normal, x: &mut Vec<f32>) {
    let part = part_bins(known);
    let newest = (lead + 1).div_ceil(part).max(1);
    x.extend((1..=PARTS).map(|k| {
        before(known, lead, part * k.max(newest)).map_or(0.0, |row| normal.apply(row.log))
    }));
}

/// The same clock time a week ago, and over seven seasons, a bin to either side included.
fn clock_times(known: Known<'_>, lead: usize, normal: Normal, x: &mut Vec<f32>) {
    let season = known.scale.season_bins();
    let same = |back: usize| before(known, lead, back).map(|row| normal.apply(row.log));
    x.push(same(season * SEASONS_IN_WEEK).unwrap_or(0.0));
    let around = sorted((1..=SEASONS_IN_WEEK).flat_map(|k| {
        [k * season + 1, k * season, k * season - 1]
            .into_iter()
            .filter_map(same)
    }));
    x.extend(CLOCK_LEVELS.map(|level| quantile_of_sorted(&around, level)));
}

/// Phase in the season, in its part and in half of it, and the weekend.
fn clock(known: Known<'_>, lead: usize, x: &mut Vec<f32>) {
    let season = known.scale.season_bins() as i64;
    let part = part_bins(known) as i64;
    let index = known.next_index() + lead as i64;
    for (period, harmonic) in [(season, 1.0), (part, 1.0), (part, 2.0)] {
        let phase = index.rem_euclid(period) as f64 / period as f64;
        let angle = std::f64::consts::TAU * phase * harmonic;
        x.push(angle.sin() as f32);
        x.push(angle.cos() as f32);
    }
    // The first of January 1970 was a Thursday.
    let day = (known.scale.start_of(index).div_euclid(86_400_000_000_000) + 3).rem_euclid(7);
    x.push(f32::from(u8::from(day >= 5)));
}

fn sorted(values: impl Iterator<Item = f32>) -> Vec<f32> {
    let mut values: Vec<f32> = values.collect();
    values.sort_unstable_by(f32::total_cmp);
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::series::{Series, support::series_of};
    use proptest::prelude::*;

    fn series(loads: &[Option<f64>]) -> Series {
        series_of(loads, 8)
    }

    #[test]
    fn one_point_gives_finite_inputs() {
        let s = series(&[Some(5.0)]);
        let (x, _) = features(s.known());
        assert_eq!(x.len(), SHORT_HORIZON * INPUTS);
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
        for i in 0..RECENT + PARTS {
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
