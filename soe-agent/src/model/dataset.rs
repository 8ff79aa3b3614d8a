//! Training samples from the histories of all volumes, split by time.

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::index::sample;

use super::baselines::{self, Member, pinball};
use super::features::{INPUTS, Normal, SMOOTHED_AT, features};
use super::series::{Series, from_log_load};
use super::weights::{OUTPUTS, Predictor};
use super::{QuantileRow, SHORT_HORIZON, TimeScale, VolumeName};
use crate::seam::UnixNanos;

/// Forecasts end here, on the log scale: about 500 GB/s.
pub(super) const MAX_LOG: f32 = 20.0;
/// A volume whose forecasts lose less than this, in KiB/s, weighs no more for it.
const MIN_LOSS: f64 = 1e-3;

/// The histories a training may use.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// The scale of all series.
    pub scale: TimeScale,
    /// The series, by volume.
    pub series: Vec<(VolumeName, Series)>,
}

/// Where a sample comes from: the series, and how many of its bins were known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Position in [`Dataset::series`].
    pub series: usize,
    /// Bins known.
    pub bins: usize,
}

/// Inputs and targets of samples, [`SHORT_HORIZON`] for every forecast of which a bin is known.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    /// [`INPUTS`] values per sample.
    pub inputs: Vec<f32>,
    /// What happened, per sample.
    pub targets: Vec<Target>,
}

/// What a sample is to be forecast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Load in KiB/s.
    pub load: f32,
    /// The same, normalised on the log scale.
    pub z: f32,
    /// By what z was normalised.
    pub normal: Normal,
    /// What an error in KiB/s weighs: one over what the weighted mean loses on this volume, so that no
    /// volume outweighs the others by its size; 0 where it is not known what happened.
    pub weight: f32,
}

impl Samples {
    /// Number of samples.
    pub fn len(&self) -> usize {
        self.targets.len()
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }

    /// Number of forecasts.
    pub fn forecasts(&self) -> usize {
        self.targets.len() / SHORT_HORIZON
    }

    /// Adds the forecast at an origin, if a bin of it is known; returns the loss of the weighted mean on
    /// those that are.
    fn push(&mut self, series: &Series, bins: usize) -> (f64, usize) {
        let (x, normal) = features(series.until(bins));
        let mut lost = (0.0, 0);
        let rows = &series.known().rows[bins..bins + SHORT_HORIZON];
        if rows.iter().all(|row| !row.known) {
            return lost;
        }
        for (row, x) in rows.iter().zip(x.chunks_exact(INPUTS)) {
            let simple: QuantileRow = std::array::from_fn(|q| {
                from_log_load(normal.invert(x.get(SMOOTHED_AT + q).copied().unwrap_or(0.0)))
            });
            if row.known {
                lost.0 += pinball(&simple, row.load) / 1024.0;
                lost.1 += 1;
            }
            self.inputs.extend_from_slice(x);
            self.targets.push(Target {
                load: row.load / 1024.0,
                z: normal.apply(row.log),
                normal,
                weight: f32::from(u8::from(row.known)),
            });
        }
        lost
    }
}

impl Dataset {
    /// When the first and the last bin of all series start and end; `None` without bins.
    pub fn range(&self) -> Option<(UnixNanos, UnixNanos)> {
        let filled = || self.series.iter().filter(|(_, s)| !s.is_empty());
        let from = filled().map(|(_, s)| s.known().first).min()?;
        let to = filled().map(|(_, s)| s.known().next_index()).max()?;
        Some((self.scale.start_of(from), self.scale.start_of(to)))
    }

    /// The moment from which on nothing is trained on, if the share `held_back` at the end is not.
    pub fn split(&self, held_back: f64) -> Option<UnixNanos> {
        let (from, to) = self.range()?;
        let held = ((to - from) as f64 * held_back.clamp(0.0, 1.0)) as i64;
        Some(to - held)
    }

    /// At most `max` origins whose targets lie wholly before `split`, drawn by `seed`.
    pub fn training_origins(&self, split: UnixNanos, max: usize, seed: u64) -> Vec<Origin> {
        let split = self.scale.index_of(split);
        let mut drawn = self.drawn(max, seed, |series| {
            let before = usize::try_from(split - series.known().first).unwrap_or(0);
            let last = before.min(series.len()).saturating_sub(SHORT_HORIZON);
            self.scale.season_bins()..=last
        });
        drawn.retain(|origin| self.asked(*origin));
        drawn
    }

    /// At most `max` places, drawn by `seed` from those that `range` allows, in the order drawn. `range` is
    /// given a series and says the fewest and the most bins known there. Takes memory for what is drawn
    /// only, however much there is to draw from.
    pub(super) fn drawn(
        &self,
        max: usize,
        seed: u64,
        range: impl Fn(&Series) -> std::ops::RangeInclusive<usize>,
    ) -> Vec<Origin> {
        let mut total = 0;
        let ends: Vec<(usize, usize)> = self
            .series
            .iter()
            .map(|(_, series)| {
                let range = range(series);
                total += (range.end() + 1).saturating_sub(*range.start());
                (total, *range.end())
            })
            .collect();
        let mut rng = StdRng::seed_from_u64(seed);
        sample(&mut rng, total, max.min(total))
            .into_iter()
            .map(|place| {
                let series = ends.partition_point(|(end, _)| *end <= place);
                let (end, last) = ends[series];
                let bins = last + 1 + place - end;
                Origin { series, bins }
            })
            .collect()
    }

    /// At most `max` origins whose targets lie wholly within a time, evenly spaced.
    pub fn validation_origins(
        &self,
        within: std::ops::Range<UnixNanos>,
        max: usize,
    ) -> Vec<Origin> {
        let from = self.scale.index_of(within.start);
        let last = self
            .scale
            .index_of(within.end)
            .saturating_sub(SHORT_HORIZON as i64);
        let origins = || {
            self.origins()
                .filter(|(start, _)| (from..=last).contains(start))
        };
        let stride = origins().count().div_ceil(max.max(1)).max(1);
        origins()
            .step_by(stride)
            .map(|(_, origin)| origin)
            .collect()
    }

    /// The inputs and targets of `origins`.
    pub fn samples(&self, origins: &[Origin]) -> Samples {
        let mut samples = Samples::default();
        let most = origins.len() * SHORT_HORIZON;
        samples.inputs.reserve(most * INPUTS);
        samples.targets.reserve(most);
        let mut lost = vec![(0.0, 0usize); self.series.len()];
        let mut of = Vec::with_capacity(origins.len());
        for origin in origins {
            let (loss, bins) = samples.push(&self.series[origin.series].1, origin.bins);
            lost[origin.series].0 += loss;
            lost[origin.series].1 += bins;
            if bins > 0 {
                of.push(origin.series);
            }
        }
        let mut targets = samples.targets.iter_mut();
        for series in of {
            let (loss, n) = lost[series];
            let mean = (loss / n.max(1) as f64).max(MIN_LOSS);
            targets
                .by_ref()
                .take(SHORT_HORIZON)
                .for_each(|t| t.weight /= mean as f32);
        }
        samples
    }

    /// How `network` does on `origins`: the geometric mean over volumes of its pinball loss
    /// relative to that of the exponentially weighted mean. `None` if nothing can be compared.
    pub fn score(&self, network: &dyn Predictor, origins: &[Origin]) -> Option<f64> {
        let mut sums = vec![(0.0, 0.0); self.series.len()];
        for origin in origins {
            let series = &self.series[origin.series].1;
            let known = series.until(origin.bins);
            let (x, normal) = features(known);
            let (Some(simple), Some(rows)) = (
                baselines::forecast(Member::Ewma, known, SHORT_HORIZON),
                network_rows(network, &x, normal),
            ) else {
                continue;
            };
            let actual = &series.known().rows[origin.bins..origin.bins + SHORT_HORIZON];
            let sum = &mut sums[origin.series];
            for ((row, mine), theirs) in actual.iter().zip(&rows).zip(&simple) {
                if row.known {
                    sum.0 += pinball(mine, row.load);
                    sum.1 += pinball(theirs, row.load);
                }
            }
        }
        let ratios: Vec<f64> = sums
            .into_iter()
            .filter(|(mine, theirs)| *mine > 0.0 && *theirs > 0.0)
            .map(|(mine, theirs)| (mine / theirs).ln())
            .collect();
        (!ratios.is_empty()).then(|| (ratios.iter().sum::<f64>() / ratios.len() as f64).exp())
    }

    /// Whether a forecast would be made there: nothing is asked of a volume while it is not measured.
    fn asked(&self, origin: Origin) -> bool {
        let rows = self.series[origin.series].1.known().rows;
        rows[origin.bins - 1].known
    }

    /// All origins, with the number of the first bin of their targets.
    fn origins(&self) -> impl Iterator<Item = (i64, Origin)> + '_ {
        self.series.iter().enumerate().flat_map(|(series, (_, s))| {
            let last = s.len().saturating_sub(SHORT_HORIZON);
            (self.scale.season_bins()..=last)
                .map(move |bins| (s.known().first + bins as i64, Origin { series, bins }))
                .filter(|(_, origin)| self.asked(*origin))
        })
    }
}

/// The network's forecast in bytes per second, quantiles ascending; `None` if it is not finite.
pub(super) fn network_rows(
    network: &dyn Predictor,
    inputs: &[f32],
    normal: Normal,
) -> Option<Vec<QuantileRow>> {
    let z = network.predict(inputs);
    if z.len() != SHORT_HORIZON * OUTPUTS || z.iter().any(|v| !v.is_finite()) {
        return None;
    }
    let rows = z
        .chunks_exact(OUTPUTS)
        .map(|chunk| {
            let mut row: QuantileRow =
                std::array::from_fn(|q| from_log_load(normal.invert(chunk[q]).clamp(0.0, MAX_LOG)));
            row.sort_unstable_by(f32::total_cmp);
            row
        })
        .collect();
    Some(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::burst::BurstRule;
    use crate::model::series::LoadBin;
    use std::time::Duration;

    fn dataset(bins: i64) -> Dataset {
        let scale = TimeScale::new(Duration::from_secs(1), 24).unwrap();
        let mut series = Series::new(scale, BurstRule::default(), 20);
        for i in 0..bins {
            let load = LoadBin {
                read_bytes: (i % 24) as f64 * 1e5,
                ..LoadBin::default()
            };
            series.push(i * 1_000_000_000, Some(load)).unwrap();
        }
        Dataset {
            scale,
            series: vec![("v".into(), series)],
        }
    }

    #[test]
    fn training_and_validation_do_not_touch() {
        let data = dataset(300);
        let split = data.split(0.2).unwrap();
        let cut = usize::try_from(data.scale.index_of(split)).unwrap();
        let training = data.training_origins(split, 1000, 1);
        let validation = data.validation_origins(split..i64::MAX, 1000);
        assert!(training.iter().all(|o| o.bins + SHORT_HORIZON <= cut));
        assert!(validation.iter().all(|o| o.bins >= cut));
        assert!(!training.is_empty() && !validation.is_empty());
        assert_eq!(training, data.training_origins(split, 1000, 1));
        assert_ne!(training, data.training_origins(split, 1000, 2));
    }

    #[test]
    fn short_series_give_no_samples() {
        let data = dataset(20);
        let split = data.split(0.2).unwrap();
        assert!(data.training_origins(split, 10, 1).is_empty());
        assert!(data.samples(&[]).is_empty());
    }
}
