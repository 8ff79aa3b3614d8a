//! Forecasters: the burn network, the baselines beside it, and the choice among them.
//!
//! The way of the data: bins of load enter a [`Series`](series::Series) per volume; everything a
//! forecast may use is a [`Known`](series::Known) view of it, which ends at the moment of the
//! forecast, so looking ahead is impossible by construction. The [`Mixture`](mixture::Mixture)
//! keeps a [`Blend`](blend::Blend) per volume that weighs the members by their matured loss.
//!
//! Invariant: nothing outside this room names burn, and within it only `nn.rs` and the two networks do.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::seam::UnixNanos;

pub mod name;

pub mod series;

pub mod burst;

pub mod onset;

pub mod features;

pub mod baselines;

pub mod blend;

pub mod events;

pub mod mixture;

pub mod dataset;

pub mod weights;

pub mod onset_features;

pub mod window_features;

pub mod window_gate;

pub mod foretold;

pub mod promotion;

pub mod registry;

#[cfg(feature = "model")]
mod nn;

#[cfg(feature = "model")]
pub mod net;

#[cfg(feature = "model")]
mod window_net;

#[cfg(feature = "model")]
pub mod onset_net;

pub use baselines::Member;
pub use events::Happening;
pub use series::{LoadBin, SeriesError, TimeScale};
pub use weights::Trained;
pub use window_gate::Judgement;

/// The stable name by which a volume is known in forecasts and plans.
pub type VolumeName = name::Name;

/// The quantile levels of every forecast, ascending.
pub const QUANTILES: [f64; 6] = [0.1, 0.5, 0.8, 0.9, 0.95, 0.99];

/// One load per level of [`QUANTILES`], in bytes per second, ascending.
pub type QuantileRow = [f32; QUANTILES.len()];

/// The index of the 0.1 quantile in a [`QuantileRow`].
pub const Q10: usize = 0;
/// The index of the 0.9 quantile in a [`QuantileRow`].
pub const Q90: usize = 3;
/// The index of the median in a [`QuantileRow`].
pub const Q50: usize = 1;
/// The index of the 0.8 quantile in a [`QuantileRow`]; quiet windows minimise it.
pub const Q80: usize = 2;

/// A forecast of one volume's load (reads and writes together) for the bins after `issued_at`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantileForecast {
    /// The end of the last bin that was known.
    pub issued_at: UnixNanos,
    /// The width of a bin.
    pub bin: Duration,
    /// One row per bin; row 0 is the bin that starts at `issued_at`. Mean load over the bin.
    pub rows: Vec<QuantileRow>,
    /// For each bin the probability that a burst begins in it; as long as `rows`.
    pub onset: Vec<f32>,
    /// Above this load a bin is a burst, in bytes per second; infinite while too little is known.
    #[serde(with = "finite_or_null")]
    pub burst_threshold: f64,
    /// Who made the first rows.
    pub member: Member,
}

impl QuantileForecast {
    /// When bin `h` of the forecast starts.
    pub fn start_of(&self, h: usize) -> UnixNanos {
        let bin = i64::try_from(self.bin.as_nanos()).unwrap_or(i64::MAX);
        self.issued_at
            .saturating_add(bin.saturating_mul(i64::try_from(h).unwrap_or(i64::MAX)))
    }

    /// The bin in which `at` falls; `None` when the forecast does not cover it.
    pub fn bin_at(&self, at: UnixNanos) -> Option<usize> {
        let bin = i64::try_from(self.bin.as_nanos()).ok()?.max(1);
        let h = usize::try_from(at.checked_sub(self.issued_at)?.div_euclid(bin)).ok()?;
        (h < self.rows.len()).then_some(h)
    }

    /// The probability that a burst begins in any of the bins `from..to`.
    pub fn onset_within(&self, from: usize, to: usize) -> f64 {
        let to = to.min(self.onset.len());
        let bins = self.onset.get(from.min(to)..to).unwrap_or_default();
        any_of(bins.iter().map(|p| f64::from(*p)))
    }

    /// The probability that a burst begins within the first [`SHORT_HORIZON`] bins: the
    /// `burst_probability` of status and history.
    pub fn burst_probability(&self) -> f64 {
        self.onset_within(0, SHORT_HORIZON)
    }

    /// The first bin at which a burst is expected with at least the probability `alarm`.
    ///
    /// An onset's time is never exact, so the probability is gathered over [`ONSET_BINS`] bins. The
    /// answer is the first bin that carries a fair part of it, and the gathered probability.
    pub fn next_onset(&self, alarm: f64) -> Option<(usize, f64)> {
        (0..self.onset.len()).find_map(|from| {
            let to = (from + ONSET_BINS).min(self.onset.len());
            let gathered = self.onset_within(from, to);
            if gathered < alarm {
                return None;
            }
            let window = &self.onset[from..to];
            let peak = window.iter().copied().fold(0.0f32, f32::max);
            let first = window.iter().position(|p| *p >= peak * 0.5).unwrap_or(0);
            Some((from + first, gathered))
        })
    }
}

/// Bins the network forecasts, and over which members are judged.
pub const SHORT_HORIZON: usize = 12;

/// Bins over which the probability of an onset is gathered and judged: half an hour of five-minute
/// bins.
pub const ONSET_BINS: usize = 6;

/// The probability of any of these onsets. They are other times of one burst, not other bursts: one
/// that begins in a bin does not begin in its neighbours. So the probabilities add.
pub(crate) fn any_of(onsets: impl Iterator<Item = f64>) -> f64 {
    onsets.map(|p| p.clamp(0.0, 1.0)).sum::<f64>().min(1.0)
}

/// Why a member serves a volume, for status and `soe model show`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Serving {
    /// Who serves the first [`SHORT_HORIZON`] bins.
    pub member: Member,
    /// Why, in words.
    pub why: String,
    /// Each member's recent mean pinball loss in bytes per second; `None` without evidence.
    pub losses: Vec<(Member, Option<f64>)>,
    /// Bins of history the volume has.
    pub bins: usize,
}

/// What became of a trained network that was offered for service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Promotion {
    /// It serves where the gates choose it.
    Promoted {
        /// Why, with the scores.
        reason: String,
    },
    /// The network before it stays.
    Rejected {
        /// Why, with the scores.
        reason: String,
    },
}

/// Learns from bins of load and forecasts; one for all volumes.
pub trait Forecaster: Send {
    /// Takes the bin of `volume` that started at `start`; `None` if what happened is unknown.
    ///
    /// # Errors
    /// [`SeriesError`] if the value is not a load or time went back; the bin is then not used.
    fn observe(
        &mut self,
        volume: &VolumeName,
        start: UnixNanos,
        load: Option<LoadBin>,
    ) -> Result<(), SeriesError>;

    /// Takes an event that concerns `volume`; one that concerns a volume never observed is forgotten.
    fn happening(&mut self, volume: &VolumeName, event: &Happening);

    /// Forecasts `horizon` bins after the last known bin; `None` for a volume never observed.
    fn forecast(&mut self, volume: &VolumeName, horizon: usize) -> Option<QuantileForecast>;

    /// Whether to begin a capture of `volumes` together, beside whose load that of `neighbours` counts, with the next bin, if it must begin with it or one of
    /// the `later` bins after it, `passed` bins after the first that it could have begun with, and takes
    /// `length` bins. `None` where nothing can be said.
    fn begin(
        &mut self,
        volumes: &[VolumeName],
        neighbours: &[VolumeName],
        pace: Pace,
    ) -> Option<Judgement>;

    /// Who serves `volume` and why; `None` for a volume never observed.
    fn serving(&self, volume: &VolumeName) -> Option<Serving>;

    /// Copies what a training needs, so that it can run on another thread.
    fn dataset(&self) -> dataset::Dataset;

    /// Offers a trained network for service.
    ///
    /// # Errors
    /// [`weights::ModelError`] if the network does not fit this build.
    fn install(&mut self, trained: &Trained) -> Result<Promotion, weights::ModelError>;

    /// Forgets a volume that is gone.
    fn forget(&mut self, volume: &VolumeName);
}

/// How a capture's interval stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Starts that remain after the next one.
    pub later: usize,
    /// Starts that have passed.
    pub passed: usize,
    /// Bins that the capture takes.
    pub length: usize,
}

/// Infinity has no JSON form; a threshold that is not known yet is written as null.
mod finite_or_null {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() {
            to.serialize_some(value)
        } else {
            to.serialize_none()
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::INFINITY))
    }
}
