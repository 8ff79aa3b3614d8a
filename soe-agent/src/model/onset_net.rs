//! The onset network in burn: inputs -> 64 -> 32 -> 1, plus a linear skip; one for all volumes.
//!
//! Its output is the log odds that a burst begins in the window of a label
//! ([`super::onset_features`]); it is trained by cross entropy on bins that are no burst themselves.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::optim::GradientsParams;
use burn::tensor::activation::relu;
use burn::tensor::{Device, Tensor, TensorData};

use super::dataset::{Dataset, Origin};
use super::nn::{
    Batches, Budget, GENTLY, Net, cpu_time, floats, he_bounds, optimizer, random_weights, rate_at,
};
use super::onset_features::{MATURES, ONSET_INPUTS, label, onset_features};
use super::weights::{ModelError, ONSET_SHAPE, OnsetPredictor, OnsetWeights};

const BATCH: usize = 512;
const EPOCHS: usize = 2;
/// Steps also where there are few samples.
const LEAST_STEPS: usize = 200;
/// Fewer samples than this say nothing of bursts.
const MIN_SAMPLES: usize = 1_000;
/// Seasons of history a sample should have behind it, and needs.
const SEASONS: (usize, usize) = (15, 2);
/// Log odds at the beginning: bursts are rare.
const FIRST_ODDS: f32 = -2.0;

/// A trained onset network, ready to foretell.
pub struct OnsetNetwork {
    net: Net,
    device: Device,
    weights: OnsetWeights,
}

impl OnsetNetwork {
    /// The network of `weights`, which fit this build.
    pub fn new(weights: &OnsetWeights) -> Self {
        let device = Device::flex();
        Self {
            net: Net::new(ONSET_SHAPE, &weights.weights, &device),
            device,
            weights: weights.clone(),
        }
    }
}

impl OnsetPredictor for OnsetNetwork {
    fn log_odds(&self, inputs: &[f32]) -> Option<f32> {
        let x = self.weights.standardised(inputs);
        let x = TensorData::new(x, [1, ONSET_INPUTS]);
        let out = self.net.forward(Tensor::from_data(x, &self.device));
        floats(out.into_data())
            .first()
            .copied()
            .filter(|z| z.is_finite())
    }
}

/// Trains an onset network on the bins of `data` whose windows end before `split`, beginning with `from`
/// if given.
///
/// # Errors
/// As [`super::net::train`].
pub(super) fn train(
    data: &Dataset,
    split: i64,
    budget: Budget,
    seed: u64,
    from: Option<&OnsetWeights>,
    cancel: &AtomicBool,
) -> Result<OnsetWeights, ModelError> {
    let (began, started) = (Instant::now(), cpu_time());
    let season = data.scale.season_bins();
    let samples: Vec<(Origin, bool)> = data
        .drawn(budget.max_samples, seed, |series| {
            // Of a short history the later half: inputs that reach back for days say little before.
            let behind = (series.len() / season / 2).clamp(SEASONS.1, SEASONS.0);
            let before = usize::try_from(split - series.known().first).unwrap_or(0);
            behind * season..=before.min(series.len()).saturating_sub(MATURES)
        })
        .into_iter()
        .filter_map(|o| Some((o, label(&data.series[o.series].1, o.bins)?)))
        .collect();
    if samples.len() < MIN_SAMPLES || !samples.iter().any(|(_, happens)| *happens) {
        return Err(ModelError::TooLittle {
            samples: samples.len(),
            needed: MIN_SAMPLES,
        });
    }
    let mut inputs = Vec::with_capacity(samples.len() * ONSET_INPUTS);
    for (nth, (origin, _)) in samples.iter().enumerate() {
        if nth % 1024 == 0 {
            if cancel.load(Ordering::Relaxed) {
                return Err(ModelError::Cancelled { steps: 0 });
            }
            budget.rest(began, cpu_time().saturating_sub(started), cancel);
        }
        inputs.extend(onset_features(
            data.series[origin.series].1.until(origin.bins),
        ));
    }
    let mut weights = match from {
        Some(weights) => weights.clone(),
        None => OnsetWeights::fresh(&inputs, fresh(seed)),
    };
    for row in inputs.chunks_exact_mut(ONSET_INPUTS) {
        row.copy_from_slice(&weights.standardised(row));
    }
    let device = Device::flex().autodiff();
    let mut optimizer = optimizer();
    let mut net = Net::new(ONSET_SHAPE, &weights.weights, &device);
    let mut batches = Batches::new(samples.len(), BATCH, seed ^ 0x0b57);
    let steps = (EPOCHS * samples.len().div_ceil(BATCH))
        .max(LEAST_STEPS)
        .min(budget.max_steps);
    let gently = if from.is_some() { GENTLY } else { 1.0 };
    for step in 1..=steps {
        if cancel.load(Ordering::Relaxed) {
            return Err(ModelError::Cancelled { steps: step - 1 });
        }
        let rows = batches.next();
        let n = rows.len();
        let mut x = Vec::with_capacity(n * ONSET_INPUTS);
        let mut y = Vec::with_capacity(n);
        for row in rows {
            x.extend_from_slice(&inputs[row * ONSET_INPUTS..(row + 1) * ONSET_INPUTS]);
            y.push(f32::from(u8::from(samples[*row].1)));
        }
        let x = Tensor::<2>::from_data(TensorData::new(x, [n, ONSET_INPUTS]), &device);
        let y = Tensor::<2>::from_data(TensorData::new(y, [n, 1]), &device);
        let z = net.forward(x);
        // Cross entropy from log odds: max(z, 0) - z y + ln(1 + exp(-|z|)).
        let loss = (relu(z.clone()) - z.clone() * y + (-z.abs()).exp().log1p()).mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &net);
        net = optimizer.step(rate_at(step, steps) * gently, net, gradients);
        budget.rest(began, cpu_time().saturating_sub(started), cancel);
    }
    weights.weights = net.weights();
    weights.samples = samples.len();
    if weights.weights.iter().any(|w| !w.is_finite()) {
        return Err(ModelError::Diverged { steps, seed });
    }
    Ok(weights)
}

fn fresh(seed: u64) -> Vec<f32> {
    let mut weights = random_weights(ONSET_SHAPE, he_bounds(ONSET_SHAPE, 1.0), seed);
    let skip = weights.len() - ONSET_SHAPE.inputs * ONSET_SHAPE.outputs;
    if let Some(bias) = weights.get_mut(skip - 1) {
        *bias = FIRST_ODDS;
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::burst::BurstRule;
    use crate::model::series::{LoadBin, Series, TimeScale};
    use std::time::Duration;

    /// Volumes with a burst at a clock time of their own, and noise.
    fn volumes() -> Dataset {
        let scale = TimeScale::new(Duration::from_secs(300), 48).unwrap();
        let series = (0..4i64)
            .map(|v| {
                let mut series = Series::new(scale, BurstRule::STRICT, 40);
                for i in 0..48 * 30 {
                    let noise =
                        f64::from((i as u32 * 97 + v as u32).wrapping_mul(2_654_435_761) >> 20);
                    let burst = (i % 48 - 10 - 7 * v).rem_euclid(48) < 2;
                    let load = LoadBin {
                        read_bytes: if burst { 1e10 } else { 1e6 + noise * 100.0 },
                        ..LoadBin::default()
                    };
                    series.push(i * scale.bin_nanos(), Some(load)).unwrap();
                }
                (format!("v{v}").into(), series)
            })
            .collect();
        Dataset { scale, series }
    }

    #[test]
    fn a_clock_pattern_is_learnt() {
        let data = volumes();
        let split = data.scale.index_of(data.split(0.2).unwrap());
        let budget = Budget {
            max_cpu: None,
            ..Budget::default()
        };
        let never = AtomicBool::new(false);
        let weights = train(&data, split, budget, 3, None, &never).unwrap();
        assert_eq!(
            weights,
            train(&data, split, budget, 3, None, &never).unwrap()
        );
        let network = OnsetNetwork::new(&weights);
        let (mut before, mut else_) = (Vec::new(), Vec::new());
        for (_, series) in &data.series {
            for bins in 48 * 26..48 * 29 {
                if let Some(happens) = label(series, bins) {
                    let odds = network
                        .log_odds(&onset_features(series.until(bins)))
                        .unwrap();
                    if happens { &mut before } else { &mut else_ }.push(odds);
                }
            }
        }
        let mean = |v: &[f32]| v.iter().sum::<f32>() / v.len() as f32;
        assert!(
            mean(&before) > mean(&else_) + 2.0,
            "{} {}",
            mean(&before),
            mean(&else_)
        );
    }

    #[test]
    fn too_little_history_is_an_error_in_words() {
        let mut data = volumes();
        data.series.truncate(1);
        let budget = Budget::default();
        let error = train(&data, i64::MIN, budget, 3, None, &AtomicBool::new(false)).unwrap_err();
        assert!(matches!(error, ModelError::TooLittle { .. }), "{error}");
    }
}
