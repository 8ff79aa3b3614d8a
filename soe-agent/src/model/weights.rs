//! A trained network as plain numbers, and the file it is kept in.
//!
//! One file holds everything that belongs together:
//!
//! ```text
//! bytes 0..8    "SOEMODEL"
//! bytes 8..12   format version, u32 little-endian (4)
//! bytes 12..16  length of the header, u32 little-endian
//! header        JSON of [`TrainedInfo`]
//! weights       f32 little-endian, in the order of [`Shape`]
//! onset         if the header says so: mean and deviation of its inputs, its weights; f32 little-endian
//! window        if the header says so: the weights of the network that says when to begin a capture
//! last 32       BLAKE3 of all bytes before
//! ```
//!
//! The checksum comes last so that a file cut short cannot pass.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::features::{FEATURE_VERSION, INPUTS};
use super::onset_features::ONSET_INPUTS;
use super::window_features::WINDOW_INPUTS;
use super::{QUANTILES, SHORT_HORIZON, TimeScale};
use crate::seam::UnixNanos;

const MAGIC: &[u8; 8] = b"SOEMODEL";
const VERSION: u32 = 4;
const CHECKSUM: usize = 32;
/// A file larger than this is not read: networks are smaller by orders of magnitude.
const MAX_FILE: u64 = 64 << 20;

/// Values a network puts out per sample, which is one bin of a forecast: the [`QUANTILES`].
pub const OUTPUTS: usize = QUANTILES.len();

/// Why a network cannot be made, kept or used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file cannot be read or written.
    #[error("model file {path}: {call}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The call that failed.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The bytes are not a model that was written whole.
    #[error("model file is damaged: {why}; train again with 'soe model train'")]
    Corrupt {
        /// What is wrong.
        why: String,
    },
    /// The network was made for other inputs or outputs.
    #[error("model does not fit this build: {why}; train again with 'soe model train'")]
    Mismatch {
        /// What differs.
        why: String,
    },
    /// There is not enough history.
    #[error("training: {samples} samples of history, at least {needed} are needed; wait for more")]
    TooLittle {
        /// Samples found.
        samples: usize,
        /// Samples needed.
        needed: usize,
    },
    /// The training was cancelled.
    #[error("training was cancelled after {steps} steps")]
    Cancelled {
        /// Steps done.
        steps: usize,
    },
    /// The loss is no longer a number.
    #[error("training diverged after {steps} steps (seed {seed}); use another seed")]
    Diverged {
        /// Steps done.
        steps: usize,
        /// The seed.
        seed: u64,
    },
    /// This program was built without the feature `model`.
    #[error("this build has no network (feature 'model' is off); the baselines forecast alone")]
    NotBuilt,
}

/// The layer sizes of a network; the weights follow each other in this order, row-major
/// `[input, output]`: context layer and bias, first layer and bias, second layer and bias, head and bias,
/// linear skip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Inputs.
    pub inputs: usize,
    /// Units that see the inputs of all [`SHORT_HORIZON`] rows of a forecast together, and that each row
    /// sees beside its own; 0 for a network whose rows stand alone.
    #[serde(default)]
    pub context: usize,
    /// Units of the hidden layers.
    pub hidden: [usize; 2],
    /// Outputs.
    pub outputs: usize,
}

impl Shape {
    /// The shape of this build.
    pub const CURRENT: Shape = Shape {
        inputs: INPUTS,
        context: 32,
        hidden: [128, 128],
        outputs: OUTPUTS,
    };

    /// The sizes of the arrays, in order.
    pub fn parts(&self) -> [usize; 9] {
        let Shape {
            inputs: i,
            context: c,
            hidden: [g, h],
            outputs: o,
        } = *self;
        let all = SHORT_HORIZON * i;
        [all * c, c, (i + c) * g, g, g * h, h, h * o, o, i * o]
    }

    /// The number of weights.
    pub fn weights(&self) -> usize {
        self.parts().iter().sum()
    }
}

/// The shape of the network that foretells onsets.
pub const ONSET_SHAPE: Shape = Shape {
    inputs: ONSET_INPUTS,
    context: 0,
    hidden: [64, 32],
    outputs: 1,
};

/// A network that foretells the onset of bursts ([`super::onset_features`]).
#[derive(Clone, Debug, PartialEq)]
pub struct OnsetWeights {
    /// Samples trained on.
    pub samples: usize,
    /// Mean of each input in training.
    pub mean: Vec<f32>,
    /// Its standard deviation, a little more than zero.
    pub deviation: Vec<f32>,
    /// The weights, as [`ONSET_SHAPE`] orders them.
    pub weights: Vec<f32>,
}

impl OnsetWeights {
    /// Inputs are cut off here, in standard deviations.
    const MOST: f32 = 5.0;

    /// Weights to begin with, for inputs spread as these samples are.
    pub fn fresh(inputs: &[f32], weights: Vec<f32>) -> Self {
        let n = (inputs.len() / ONSET_INPUTS).max(1) as f64;
        let mut sums = vec![(0.0f64, 0.0f64); ONSET_INPUTS];
        for row in inputs.chunks_exact(ONSET_INPUTS) {
            for (sum, x) in sums.iter_mut().zip(row) {
                sum.0 += f64::from(*x);
                sum.1 += f64::from(*x).powi(2);
            }
        }
        let mean = |(sum, _): &(f64, f64)| sum / n;
        let deviation =
            |s: &(f64, f64)| ((s.1 / n - mean(s).powi(2)).max(0.0).sqrt() + 1e-3) as f32;
        Self {
            samples: 0,
            mean: sums.iter().map(|s| mean(s) as f32).collect(),
            deviation: sums.iter().map(deviation).collect(),
            weights,
        }
    }

    /// The inputs of one sample on the network's scale.
    pub fn standardised(&self, inputs: &[f32]) -> Vec<f32> {
        inputs
            .iter()
            .zip(self.mean.iter().zip(&self.deviation))
            .map(|(x, (mean, deviation))| ((x - mean) / deviation).clamp(-Self::MOST, Self::MOST))
            .collect()
    }

    fn parts(&self) -> [&[f32]; 3] {
        [&self.mean, &self.deviation, &self.weights]
    }

    /// How many numbers it is made of.
    fn len() -> usize {
        2 * ONSET_INPUTS + ONSET_SHAPE.weights()
    }

    fn from_numbers(samples: usize, numbers: &[f32]) -> Option<Self> {
        let (mean, rest) = numbers.split_at_checked(ONSET_INPUTS)?;
        let (deviation, weights) = rest.split_at_checked(ONSET_INPUTS)?;
        let sound = numbers.iter().all(|n| n.is_finite()) && deviation.iter().all(|d| *d > 0.0);
        (sound && weights.len() == ONSET_SHAPE.weights()).then(|| Self {
            samples,
            mean: mean.to_vec(),
            deviation: deviation.to_vec(),
            weights: weights.to_vec(),
        })
    }
}

/// The layer sizes of the network that says when to begin a capture; its weights follow each other layer by
/// layer, row-major `[input, output]` and then the bias.
pub const WINDOW_LAYERS: [usize; 4] = [WINDOW_INPUTS, 32, 16, 1];

/// Networks so many that their mean says when to begin a capture ([`super::window_features`]): one alone
/// depends more on its seed than on anything else.
pub const WINDOW_NETWORKS: usize = 5;

/// The networks that say when to begin a capture.
#[derive(Clone, Debug, PartialEq)]
pub struct WindowWeights {
    /// Intervals trained on.
    pub intervals: usize,
    /// The weights of [`WINDOW_NETWORKS`] networks, each as [`WINDOW_LAYERS`] orders them.
    pub weights: Vec<f32>,
}

impl WindowWeights {
    /// The number of weights of one network.
    fn len() -> usize {
        WINDOW_LAYERS
            .windows(2)
            .map(|pair| pair[0] * pair[1] + pair[1])
            .sum()
    }

    fn from_numbers(intervals: usize, weights: Vec<f32>) -> Option<Self> {
        let sound =
            weights.len() == WINDOW_NETWORKS * Self::len() && weights.iter().all(|w| w.is_finite());
        sound.then_some(Self { intervals, weights })
    }

    /// The log odds of beginning a capture at a start with these [`WINDOW_INPUTS`] inputs when `later`
    /// starts remain; above 0 it is better to begin. (Small enough to be worked out here.)
    pub fn log_odds(&self, inputs: &[f32], later: usize) -> f32 {
        let networks = self.weights.chunks_exact(Self::len());
        let n = networks.len().max(1) as f32;
        let mean = networks
            .map(|network| Self::of(network, inputs))
            .sum::<f32>()
            / n;
        mean - (later.max(1) as f32).ln()
    }

    fn of(network: &[f32], inputs: &[f32]) -> f32 {
        let mut rest = network;
        let mut values = inputs.to_vec();
        for (layer, pair) in WINDOW_LAYERS.windows(2).enumerate() {
            let (weights, tail) = rest.split_at(pair[0] * pair[1]);
            let (bias, tail) = tail.split_at(pair[1]);
            rest = tail;
            let mut next = bias.to_vec();
            for (value, row) in values.iter().zip(weights.chunks_exact(pair[1])) {
                next.iter_mut().zip(row).for_each(|(n, w)| *n += value * w);
            }
            if layer + 2 < WINDOW_LAYERS.len() {
                next.iter_mut().for_each(|n| *n /= 1.0 + (-*n).exp());
            }
            values = next;
        }
        values.first().copied().unwrap_or(0.0)
    }
}

/// Foretells the onset of bursts from the inputs of one sample.
pub trait OnsetPredictor: Send {
    /// The log odds for [`ONSET_INPUTS`] inputs; `None` if they are not finite.
    fn log_odds(&self, inputs: &[f32]) -> Option<f32>;
}

/// Makes the onset network of a trained one ready; `None` if it has none.
pub fn onset_predictor(trained: &Trained) -> Option<Box<dyn OnsetPredictor>> {
    onset_predictor_of(trained.onset.as_ref()?)
}

/// Makes an onset network ready; `None` in a build without networks.
pub(super) fn onset_predictor_of(weights: &OnsetWeights) -> Option<Box<dyn OnsetPredictor>> {
    #[cfg(feature = "model")]
    return Some(Box::new(super::onset_net::OnsetNetwork::new(weights)));
    #[cfg(not(feature = "model"))]
    {
        let _ = weights;
        None
    }
}

/// How a network came about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainedInfo {
    /// The layer sizes.
    pub shape: Shape,
    /// Which inputs it takes.
    pub feature_version: u32,
    /// The scale of the histories it was trained on.
    pub scale: TimeScale,
    /// The seed of weights and batches.
    pub seed: u64,
    /// Optimiser steps done.
    pub steps: usize,
    /// Samples trained on.
    pub samples: usize,
    /// Volumes trained on.
    pub volumes: usize,
    /// Start of the histories, in nanoseconds since the Unix epoch.
    pub data_from: UnixNanos,
    /// From here on nothing was trained on.
    pub trained_until: UnixNanos,
    /// Between `trained_until` and here the state of the network was chosen, and scored.
    #[serde(default)]
    pub chosen_until: UnixNanos,
    /// End of the histories.
    pub data_to: UnixNanos,
    /// Pinball loss relative to the exponentially weighted mean, the geometric mean over volumes;
    /// below 1 is better.
    pub score: f64,
    /// Samples on which the onset network was trained; `None` without one.
    #[serde(default)]
    pub onset_samples: Option<usize>,
    /// Intervals on which the network was trained that says when to begin a capture; `None` without one.
    #[serde(default)]
    pub window_intervals: Option<usize>,
}

/// A trained network.
#[derive(Clone, Debug, PartialEq)]
pub struct Trained {
    /// How it came about.
    pub info: TrainedInfo,
    /// The weights, as [`Shape`] orders them.
    pub weights: Vec<f32>,
    /// The network that foretells onsets, where there was enough to learn it from.
    pub onset: Option<OnsetWeights>,
    /// The network that says when to begin a capture.
    pub window: Option<WindowWeights>,
}

/// The network that this build ships with: `cargo xtask train-prior` made it (docs/forecasting.md says from
/// what, and how it scores). It serves until a host has trained one of its own, and that one begins
/// from it.
pub fn prior() -> Result<Trained, ModelError> {
    Trained::from_bytes(include_bytes!("../../models/prior.soe"))
}

/// Forecasts on the network's scale from the inputs of one sample.
pub trait Predictor: Send {
    /// [`OUTPUTS`] normalised log loads for every [`INPUTS`] inputs.
    fn predict(&self, inputs: &[f32]) -> Vec<f32>;
}

/// Makes a trained network ready to forecast.
///
/// # Errors
/// [`ModelError::Mismatch`] if it was made for other inputs, [`ModelError::NotBuilt`] without the
/// feature `model`.
pub fn predictor(trained: &Trained) -> Result<Box<dyn Predictor>, ModelError> {
    trained.check()?;
    #[cfg(feature = "model")]
    return Ok(Box::new(super::net::Network::new(trained)?));
    #[cfg(not(feature = "model"))]
    Err(ModelError::NotBuilt)
}

/// Writes a file that is there whole or not at all, whatever happens meanwhile.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    let failed = |call: &'static str| {
        move |source: io::Error| ModelError::Io {
            path: path.to_owned(),
            call,
            source,
        }
    };
    let temporary = path.with_extension("new");
    let mut file = fs::File::create(&temporary).map_err(failed("create"))?;
    file.write_all(bytes).map_err(failed("write"))?;
    file.sync_all().map_err(failed("fsync"))?;
    fs::rename(&temporary, path).map_err(failed("rename"))?;
    if let Some(directory) = path.parent().filter(|d| !d.as_os_str().is_empty()) {
        fs::File::open(directory)
            .and_then(|d| d.sync_all())
            .map_err(failed("fsync directory"))?;
    }
    Ok(())
}

impl Trained {
    /// Checks that the network fits this build.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] that says what differs.
    pub fn check(&self) -> Result<(), ModelError> {
        let mismatch = |why: String| Err(ModelError::Mismatch { why });
        if self.info.feature_version != FEATURE_VERSION {
            return mismatch(format!(
                "inputs of version {}, this build has version {FEATURE_VERSION}",
                self.info.feature_version
            ));
        }
        if self.info.shape != Shape::CURRENT {
            return mismatch(format!(
                "layers {:?}, this build has {:?}",
                self.info.shape,
                Shape::CURRENT
            ));
        }
        if self.weights.len() != self.info.shape.weights() {
            return mismatch(format!(
                "{} weights, the layers need {}",
                self.weights.len(),
                self.info.shape.weights()
            ));
        }
        if self.weights.iter().any(|w| !w.is_finite()) {
            return mismatch("a weight is not a finite number".to_owned());
        }
        Ok(())
    }

    /// The bytes of the model file.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Serialising plain numbers to JSON cannot fail.
        let header = serde_json::to_vec(&self.info).unwrap_or_default();
        let mut bytes = Vec::with_capacity(16 + header.len() + self.weights.len() * 4 + CHECKSUM);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(header.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&header);
        let onset = self.onset.iter().flat_map(OnsetWeights::parts).flatten();
        let window = self.window.iter().flat_map(|window| &window.weights);
        for number in self.weights.iter().chain(onset).chain(window) {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        let checksum = blake3::hash(&bytes);
        bytes.extend_from_slice(checksum.as_bytes());
        bytes
    }

    /// Reads the bytes of a model file.
    ///
    /// # Errors
    /// [`ModelError::Corrupt`] if they were not written whole, [`ModelError::Mismatch`] if the
    /// network does not fit this build.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ModelError> {
        let corrupt = |why: &str| ModelError::Corrupt {
            why: why.to_owned(),
        };
        let (content, checksum) = bytes
            .split_last_chunk::<CHECKSUM>()
            .ok_or_else(|| corrupt("it is too short"))?;
        let rest = content
            .strip_prefix(MAGIC)
            .ok_or_else(|| corrupt("it does not begin as a model file does"))?;
        if blake3::hash(content) != blake3::Hash::from_bytes(*checksum) {
            return Err(corrupt("its checksum does not match"));
        }
        let (version, rest) = take_u32(rest).ok_or_else(|| corrupt("it has no version"))?;
        if version != VERSION {
            return Err(ModelError::Mismatch {
                why: format!("file format {version}, this build reads {VERSION}"),
            });
        }
        let (length, rest) = take_u32(rest).ok_or_else(|| corrupt("it has no header"))?;
        let (header, rest) = usize::try_from(length)
            .ok()
            .and_then(|n| rest.split_at_checked(n))
            .ok_or_else(|| corrupt("its header is cut short"))?;
        let info: TrainedInfo =
            serde_json::from_slice(header).map_err(|e| ModelError::Corrupt {
                why: format!("its header cannot be read: {e}"),
            })?;
        let (floats, remainder) = rest.as_chunks::<4>();
        if !remainder.is_empty() {
            return Err(corrupt("its weights are cut short"));
        }
        let mut weights: Vec<f32> = floats.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let window = match info.window_intervals {
            None => None,
            Some(intervals) => {
                let at = weights
                    .len()
                    .checked_sub(WINDOW_NETWORKS * WindowWeights::len())
                    .ok_or_else(|| corrupt("its window network is cut short"))?;
                let window = WindowWeights::from_numbers(intervals, weights.split_off(at))
                    .ok_or_else(|| corrupt("its window network is not made of numbers"))?;
                Some(window)
            }
        };
        let onset = match info.onset_samples {
            None => None,
            Some(samples) => {
                let at = weights
                    .len()
                    .checked_sub(OnsetWeights::len())
                    .ok_or_else(|| corrupt("its onset network is cut short"))?;
                let numbers = weights.split_off(at);
                let onset = OnsetWeights::from_numbers(samples, &numbers)
                    .ok_or_else(|| corrupt("its onset network is not made of numbers"))?;
                Some(onset)
            }
        };
        let trained = Self {
            info,
            weights,
            onset,
            window,
        };
        trained.check()?;
        Ok(trained)
    }

    /// Writes the model file so that a crash leaves the old one or the new one.
    ///
    /// # Errors
    /// [`ModelError::Io`].
    pub fn save(&self, path: &Path) -> Result<(), ModelError> {
        write_whole(path, &self.to_bytes())
    }

    /// Reads a model file.
    ///
    /// # Errors
    /// As [`Trained::from_bytes`], and [`ModelError::Io`].
    pub fn load(path: &Path) -> Result<Self, ModelError> {
        let failed = |call: &'static str| {
            move |source: io::Error| ModelError::Io {
                path: path.to_owned(),
                call,
                source,
            }
        };
        let length = fs::metadata(path).map_err(failed("stat"))?.len();
        if length > MAX_FILE {
            return Err(ModelError::Corrupt {
                why: format!("{length} bytes is more than any model has"),
            });
        }
        Self::from_bytes(&fs::read(path).map_err(failed("read"))?)
    }
}

fn take_u32(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<4>()?;
    Some((u32::from_le_bytes(*head), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn trained() -> Trained {
        Trained {
            info: TrainedInfo {
                shape: Shape::CURRENT,
                feature_version: FEATURE_VERSION,
                scale: TimeScale::FIVE_MINUTES,
                seed: 7,
                steps: 10,
                samples: 20,
                volumes: 2,
                data_from: 0,
                trained_until: 80,
                chosen_until: 80,
                data_to: 100,
                score: 0.9,
                onset_samples: Some(5),
                window_intervals: Some(7),
            },
            weights: (0..Shape::CURRENT.weights())
                .map(|i| i as f32 * 0.25 - 3.0)
                .collect(),
            onset: Some(OnsetWeights {
                samples: 5,
                mean: vec![0.5; ONSET_INPUTS],
                deviation: vec![2.0; ONSET_INPUTS],
                weights: vec![0.25; ONSET_SHAPE.weights()],
            }),
            window: Some(WindowWeights {
                intervals: 7,
                weights: vec![0.5; WINDOW_NETWORKS * WindowWeights::len()],
            }),
        }
    }

    #[test]
    fn the_network_that_ships_fits_this_build() {
        let prior = prior().unwrap();
        assert!(prior.info.score < 0.9, "{}", prior.info.score);
    }

    #[test]
    fn a_file_round_trips() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.soe");
        let model = trained();
        model.save(&path).unwrap();
        model.save(&path).unwrap();
        assert_eq!(Trained::load(&path).unwrap(), model);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_network_of_another_shape_is_refused_in_words() {
        let mut model = trained();
        model.info.feature_version += 1;
        let error = Trained::from_bytes(&model.to_bytes()).unwrap_err();
        assert!(matches!(error, ModelError::Mismatch { .. }), "{error}");
        let mut model = trained();
        model.weights.pop();
        assert!(Trained::from_bytes(&model.to_bytes()).is_err());
        let mut model = trained();
        model.weights[5] = f32::NAN;
        assert!(Trained::from_bytes(&model.to_bytes()).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_damaged_byte_and_any_cut_is_noticed(
            at in any::<prop::sample::Index>(), flip in 1u8..=255, cut in any::<prop::sample::Index>()
        ) {
            let bytes = trained().to_bytes();
            let mut damaged = bytes.clone();
            let at = at.index(bytes.len());
            damaged[at] ^= flip;
            let error = Trained::from_bytes(&damaged).unwrap_err();
            prop_assert!(matches!(error, ModelError::Corrupt { .. }), "{}", error);
            prop_assert!(Trained::from_bytes(&bytes[..cut.index(bytes.len())]).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut framed = MAGIC.to_vec();
            framed.extend_from_slice(&bytes);
            let sum = *blake3::hash(&framed).as_bytes();
            framed.extend_from_slice(&sum);
            prop_assert!(Trained::from_bytes(&framed).is_err());
        }
    }
}
