//! The networks that say when to begin a capture: inputs -> 32 -> 16 -> 1, for all volumes, intervals and
//! lengths; five of them, which differ by their seed.
//!
//! In an interval in which one capture must be made, every bin offers a start: to begin now, or to wait for
//! a quieter one that may not come. The network's output is the log odds of beginning, less the log of the
//! number of later starts; what it is trained on is the load that a capture meets which begins with these
//! odds (the product of all refusals before is the chance that it comes to a start at all), as regret
//! against the best start of the interval. That is the score itself, and it can be differentiated. Regrets
//! are taken to the power of 0.35, so that no single interval rules.
//!
//! Forecasting the load and taking the lowest forecast, as the planner did before, is beaten by a wide
//! margin: what it is like now says most about what it will be like in a moment (docs/forecasting.md).

use std::sync::atomic::{AtomicBool, Ordering};

use burn::grad_clipping::GradientClippingConfig;
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::activation::{log_sigmoid, silu};
use burn::tensor::{Device, Tensor, TensorData};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use super::dataset::Dataset;
use super::nn::{floats, uniform};
use super::weights::{ModelError, WINDOW_LAYERS, WINDOW_NETWORKS, WindowWeights};
use super::window_features::{Past, Start, WINDOW_INPUTS, WINDOW_SEASONS};

/// Intervals and windows trained on, in 288ths of a season: from half an hour and five minutes to a day and
/// half an hour.
const PAIRS: [(usize, usize); 6] = [(288, 6), (144, 3), (72, 2), (36, 2), (12, 1), (6, 1)];
/// Starts in a batch.
const BATCH: usize = 16_384;
const EPOCHS: usize = 6;
/// Steps also where there are few intervals.
const LEAST_STEPS: usize = 300;
const WARM_UP: usize = 100;
const LEARNING_RATE: f64 = 3e-3;
const DECAY: f32 = 1e-4;
const CLIP: f32 = 1.0;
/// The power of regrets, and what keeps its slope finite.
const POWER: f64 = 0.35;
const LEAST: f64 = 1e-3;
/// Fewer intervals say nothing.
const MIN_INTERVALS: usize = 500;

/// Intervals of one length, and what every start of each is like.
struct Group {
    starts: usize,
    /// [`WINDOW_INPUTS`] for each start of each interval.
    inputs: Vec<f32>,
    /// The regret of each, to its power.
    regrets: Vec<f32>,
}

impl Group {
    fn intervals(&self) -> usize {
        self.regrets.len() / self.starts
    }
}

/// All intervals of one length that are wholly known and lie before bin `until`.
fn group(data: &Dataset, until: i64, interval: usize, length: usize) -> Group {
    let starts = interval - length + 1;
    let mut group = Group {
        starts,
        inputs: Vec::new(),
        regrets: Vec::new(),
    };
    let step = interval as i64;
    for (_, series) in &data.series {
        let known = series.known();
        let Some(past) = Past::of(&[known], length) else {
            continue;
        };
        let earliest = known.first + (WINDOW_SEASONS * data.scale.season_bins()) as i64;
        let mut from = (earliest + step - 1).div_euclid(step) * step;
        let mut regrets = Vec::new();
        let (mut spread, mut mean_load) = (0.0, 0.0);
        while from + step <= until.min(known.next_index()) {
            let at = (from - known.first) as usize;
            from += step;
            if known.rows[at..at + interval].iter().any(|row| !row.known) {
                continue;
            }
            let loads: Vec<f64> = (at..at + starts).filter_map(|s| past.load_met(s)).collect();
            let mut inputs = Vec::with_capacity(starts * WINDOW_INPUTS);
            for passed in 0..starts {
                let start = Start {
                    bins: at + passed,
                    later: starts - 1 - passed,
                    passed,
                };
                inputs.extend(past.inputs(start).into_iter().flatten());
            }
            if loads.len() < starts || inputs.len() < starts * WINDOW_INPUTS {
                continue;
            }
            let best = loads.iter().copied().fold(f64::INFINITY, f64::min);
            let mean = loads.iter().sum::<f64>() / starts as f64;
            spread += mean - best;
            mean_load += mean;
            regrets.extend(loads.iter().map(|load| load - best));
            group.inputs.extend(inputs);
        }
        let n = (regrets.len() / starts).max(1) as f64;
        // A volume that is the same all the time does not count for more because of it.
        let scale = (spread / n).max(1e-3 * mean_load / n + 1e-6);
        group.regrets.extend(
            regrets
                .iter()
                .map(|regret| (regret / scale + LEAST).powf(POWER) as f32),
        );
    }
    group
}

#[derive(Module, Debug)]
struct Net {
    first: Linear,
    second: Linear,
    head: Linear,
}

impl Net {
    fn new(weights: &[f32], device: &Device) -> Self {
        let mut rest = weights;
        let mut take = |n: usize| {
            let (head, tail) = rest.split_at(n);
            rest = tail;
            head.to_vec()
        };
        let mut layer = |i: usize, o: usize| Linear {
            weight: Param::from_data(TensorData::new(take(i * o), [i, o]), device),
            bias: Some(Param::from_data(TensorData::new(take(o), [o]), device)),
        };
        let [i, g, h, o] = WINDOW_LAYERS;
        Self {
            first: layer(i, g),
            second: layer(g, h),
            head: layer(h, o),
        }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let hidden = silu(self.first.forward(x));
        let hidden = silu(self.second.forward(hidden));
        self.head.forward(hidden)
    }

    fn weights(&self) -> Vec<f32> {
        let mut all = Vec::new();
        for layer in [&self.first, &self.second, &self.head] {
            all.extend(floats(layer.weight.val().into_data()));
            if let Some(bias) = &layer.bias {
                all.extend(floats(bias.val().into_data()));
            }
        }
        all
    }
}

fn fresh(seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut weights = Vec::new();
    for (layer, pair) in WINDOW_LAYERS.windows(2).enumerate() {
        let (i, o) = (pair[0], pair[1]);
        let last = layer + 2 == WINDOW_LAYERS.len();
        let bound = (1.0 / i as f32).sqrt() * if last { 0.1 } else { 1.0 };
        weights.extend(uniform(&mut rng, i * o, bound));
        match last {
            true => weights.extend(std::iter::repeat_n(0.0, o)),
            false => weights.extend(uniform(&mut rng, o, bound)),
        }
    }
    weights
}

/// The mean over the intervals of the regret to be expected.
fn loss(odds: Tensor<2>, regrets: Tensor<2>, device: &Device) -> Tensor<1> {
    let [intervals, starts] = odds.dims();
    let later: Vec<f32> = (0..starts)
        .map(|s| ((starts - 1 - s).max(1) as f32).ln())
        .collect();
    let later = Tensor::<2>::from_data(TensorData::new(later, [1, starts]), device);
    let free = (odds - later).narrow(1, 0, starts - 1);
    // The log of the chance that none of the starts before was taken: a sum over them.
    let before: Vec<f32> = (0..starts - 1)
        .flat_map(|from| (0..starts).map(move |to| f32::from(u8::from(from < to))))
        .collect();
    let before = Tensor::<2>::from_data(TensorData::new(before, [starts - 1, starts]), device);
    let reached = log_sigmoid(-free.clone()).matmul(before);
    // The last start is taken if no other was.
    let last = Tensor::<2>::zeros([intervals, 1], device);
    let taken = Tensor::cat(vec![log_sigmoid(free), last], 1);
    ((reached + taken).exp() * regrets).sum() / intervals as f32
}

/// Trains on what lies before bin `until`. The same data and seed give the same weights.
///
/// # Errors
/// [`ModelError::TooLittle`], [`ModelError::Cancelled`] and [`ModelError::Diverged`].
pub(super) fn train(
    data: &Dataset,
    until: i64,
    seed: u64,
    cancel: &AtomicBool,
) -> Result<WindowWeights, ModelError> {
    let season = data.scale.season_bins();
    let bins = |n: usize| n * season / 288;
    let mut groups = Vec::new();
    for (interval, length) in PAIRS {
        if cancel.load(Ordering::Relaxed) {
            return Err(ModelError::Cancelled { steps: 0 });
        }
        let (interval, length) = (bins(interval), bins(length).max(1));
        if interval > length {
            groups.push(group(data, until, interval, length));
        }
    }
    let intervals: usize = groups.iter().map(Group::intervals).sum();
    if intervals < MIN_INTERVALS {
        return Err(ModelError::TooLittle {
            samples: intervals,
            needed: MIN_INTERVALS,
        });
    }
    let mut weights = Vec::new();
    for network in 0..WINDOW_NETWORKS as u64 {
        let seed = seed.wrapping_mul(1_000).wrapping_add(network);
        weights.extend(train_one(&groups, seed, cancel)?);
    }
    Ok(WindowWeights { intervals, weights })
}

fn train_one(groups: &[Group], seed: u64, cancel: &AtomicBool) -> Result<Vec<f32>, ModelError> {
    let device = Device::flex().autodiff();
    let mut net = Net::new(&fresh(seed), &device);
    let mut optimizer = AdamWConfig::new()
        .with_weight_decay(DECAY)
        .with_grad_clipping(Some(GradientClippingConfig::Norm(CLIP)))
        .init();
    let mut rng = StdRng::seed_from_u64(seed ^ 0x51ee7);
    // Batches are of one length each.
    let batches = |rng: &mut StdRng| {
        let mut batches: Vec<(usize, Vec<usize>)> = Vec::new();
        for (number, group) in groups.iter().enumerate() {
            let mut order: Vec<usize> = (0..group.intervals()).collect();
            order.shuffle(rng);
            let size = (BATCH / group.starts).max(1);
            batches.extend(order.chunks(size).map(|chunk| (number, chunk.to_vec())));
        }
        batches.shuffle(rng);
        batches
    };
    let per_epoch = batches(&mut rng).len().max(1);
    let epochs = EPOCHS.max(LEAST_STEPS.div_ceil(per_epoch));
    let steps = epochs * per_epoch;
    let mut step = 0;
    for _ in 0..epochs {
        for (number, chosen) in batches(&mut rng) {
            if cancel.load(Ordering::Relaxed) {
                return Err(ModelError::Cancelled { steps: step });
            }
            step += 1;
            let group = &groups[number];
            let (n, starts) = (chosen.len(), group.starts);
            let pick = |all: &[f32], width: usize| {
                let mut picked = Vec::with_capacity(n * width);
                for interval in &chosen {
                    picked.extend_from_slice(&all[interval * width..(interval + 1) * width]);
                }
                picked
            };
            let x = TensorData::new(
                pick(&group.inputs, starts * WINDOW_INPUTS),
                [n * starts, WINDOW_INPUTS],
            );
            let regrets = TensorData::new(pick(&group.regrets, starts), [n, starts]);
            let odds = net
                .forward(Tensor::from_data(x, &device))
                .reshape([n, starts]);
            let loss = loss(odds, Tensor::from_data(regrets, &device), &device);
            let gradients = GradientsParams::from_grads(loss.backward(), &net);
            let warm = (step as f64 / WARM_UP as f64).min(1.0);
            let cosine = 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos());
            net = optimizer.step(LEARNING_RATE * warm * cosine, net, gradients);
        }
    }
    let weights = net.weights();
    if weights.iter().any(|w| !w.is_finite()) {
        return Err(ModelError::Diverged { steps, seed });
    }
    Ok(weights)
}

#[cfg(test)]
mod tests;
