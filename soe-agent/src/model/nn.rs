//! What both networks share: a small network in burn, its weights from a seed, its optimiser, and the
//! budget of a training.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use burn::grad_clipping::GradientClippingConfig;
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::optim::AdamWConfig;
use burn::tensor::activation::relu;
use burn::tensor::{Device, Tensor, TensorData};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rustix::time::{ClockId, clock_gettime};

use super::SHORT_HORIZON;
use super::weights::Shape;

/// The learning rate rises to the first over some steps, then falls to the second along half a cosine.
const LEARNING_RATE: (f64, f64) = (2e-3, 4e-5);
/// A network that was trained before is changed more gently.
pub(super) const GENTLY: f64 = 0.5;
const WARM_UP: usize = 200;
/// Decay of the weights, per step and learning rate.
const DECAY: f32 = 0.1;
/// Longest gradient, by its norm.
const CLIP: f32 = 1.0;

/// What a training may spend.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Optimiser steps.
    pub max_steps: usize,
    /// CPU time of the training thread. The result depends on the machine if this ends it.
    pub max_cpu: Option<Duration>,
    /// Cores that it may use on average: it rests after every step until it keeps to that. More than
    /// one makes no difference, as one thread trains.
    pub cores: Option<f64>,
    /// Bins of forecasts drawn from the histories; one takes about 250 bytes.
    pub max_samples: usize,
    /// The share of the time range, at its end, that is not trained on but decides which state of the
    /// network is kept, and whether it serves.
    pub held_back: f64,
    /// The share after that which a training does not look at: by it the outcome is judged.
    pub judged: f64,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            max_steps: 10_000,
            max_cpu: Some(Duration::from_secs(300)),
            cores: None,
            max_samples: 1_920_000,
            held_back: 0.1,
            judged: 0.1,
        }
    }
}

impl Budget {
    /// What a training in the background of a host draws from its histories: a few ten MiB.
    pub const BACKGROUND_SAMPLES: usize = 100_000;

    /// Sleeps until `spent` CPU time since `began` is no more than the cores allow, or until it is
    /// cancelled.
    pub(super) fn rest(&self, began: Instant, spent: Duration, cancel: &AtomicBool) {
        let Some(cores) = self.cores.filter(|cores| *cores > 0.0) else {
            return;
        };
        let due = Duration::try_from_secs_f64(spent.as_secs_f64() / cores).unwrap_or(Duration::MAX);
        while !cancel.load(Ordering::Relaxed) {
            let left = due.saturating_sub(began.elapsed());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(Duration::from_millis(100)));
        }
    }
}

#[derive(Module, Debug)]
pub(super) struct Net {
    context: Option<Linear>,
    first: Linear,
    second: Linear,
    head: Linear,
    skip: Linear,
}

impl Net {
    pub(super) fn new(shape: Shape, weights: &[f32], device: &Device) -> Self {
        let Shape {
            inputs,
            context,
            hidden: [first, second],
            outputs,
        } = shape;
        let mut rest = weights;
        let mut take = |n: usize| {
            let (head, tail) = rest.split_at(n);
            rest = tail;
            head.to_vec()
        };
        let mut layer = |i: usize, o: usize, bias: bool| Linear {
            weight: Param::from_data(TensorData::new(take(i * o), [i, o]), device),
            bias: bias.then(|| Param::from_data(TensorData::new(take(o), [o]), device)),
        };
        Self {
            context: (context > 0).then(|| layer(SHORT_HORIZON * inputs, context, true)),
            first: layer(inputs + context, first, true),
            second: layer(first, second, true),
            head: layer(second, outputs, true),
            skip: layer(inputs, outputs, false),
        }
    }

    /// With a context the rows are those of whole forecasts, one after the other.
    pub(super) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let wide = match &self.context {
            None => x.clone(),
            Some(layer) => {
                let [rows, inputs] = x.dims();
                let forecasts = rows / SHORT_HORIZON;
                let all = x.clone().reshape([forecasts, SHORT_HORIZON * inputs]);
                let context = relu(layer.forward(all));
                let units = context.dims()[1];
                let each = context
                    .reshape([forecasts, 1, units])
                    .repeat_dim(1, SHORT_HORIZON)
                    .reshape([rows, units]);
                Tensor::cat(vec![x.clone(), each], 1)
            }
        };
        let hidden = relu(self.first.forward(wide));
        let hidden = relu(self.second.forward(hidden));
        self.head.forward(hidden) + self.skip.forward(x)
    }

    pub(super) fn weights(&self) -> Vec<f32> {
        let mut all = Vec::new();
        let layers = [&self.first, &self.second, &self.head, &self.skip];
        for layer in self.context.iter().chain(layers) {
            all.extend(floats(layer.weight.val().into_data()));
            if let Some(bias) = &layer.bias {
                all.extend(floats(bias.val().into_data()));
            }
        }
        all
    }
}

pub(super) fn floats(data: TensorData) -> Vec<f32> {
    // The network is made of f32 throughout, so the conversion has nothing to refuse.
    data.try_to_vec::<f32>().unwrap_or_default()
}

/// Bounds of uniform first weights by part: hidden layers within the square root of six over the fan-in,
/// the head within `head` of that over a hundred, biases and skip zero.
pub(super) fn he_bounds(shape: Shape, head: f32) -> [f32; 9] {
    let bound = |fan_in: usize| (6.0 / fan_in as f32).sqrt();
    let [first, second] = shape.hidden;
    [
        bound(SHORT_HORIZON * shape.inputs),
        0.0,
        bound(shape.inputs + shape.context),
        0.0,
        bound(first),
        0.0,
        0.01 * head * bound(second),
        0.0,
        0.0,
    ]
}

/// Weights drawn by `seed`, uniform within the bound of their part.
pub(super) fn random_weights(shape: Shape, bounds: [f32; 9], seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut weights = Vec::with_capacity(shape.weights());
    for (n, bound) in shape.parts().into_iter().zip(bounds) {
        if bound == 0.0 {
            weights.extend(std::iter::repeat_n(0.0, n));
        } else {
            weights.extend(uniform(&mut rng, n, bound));
        }
    }
    weights
}

/// The optimiser of both networks.
pub(super) fn optimizer() -> burn::optim::ModuleOptimizer {
    AdamWConfig::new()
        .with_weight_decay(DECAY)
        .with_grad_clipping(Some(GradientClippingConfig::Norm(CLIP)))
        .init()
}

/// The learning rate of a step.
pub(super) fn rate_at(step: usize, steps: usize) -> f64 {
    let progress = step as f64 / steps.max(1) as f64;
    let warm = (step as f64 / WARM_UP.min(steps / 10).max(1) as f64).min(1.0);
    let (high, low) = LEARNING_RATE;
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos());
    (low + (high - low) * cosine) * warm
}

/// Shuffled batches of sample numbers, for ever; the same for the same seed.
pub(super) struct Batches {
    order: Vec<usize>,
    at: usize,
    batch: usize,
    rng: StdRng,
}

impl Batches {
    pub(super) fn new(samples: usize, batch: usize, seed: u64) -> Self {
        Self {
            order: (0..samples).collect(),
            at: samples,
            batch: batch.min(samples).max(1),
            rng: StdRng::seed_from_u64(seed),
        }
    }

    pub(super) fn next(&mut self) -> &[usize] {
        if self.at + self.batch > self.order.len() {
            self.order.shuffle(&mut self.rng);
            self.at = 0;
        }
        let from = self.at;
        self.at += self.batch;
        &self.order[from..self.at]
    }
}

/// Uniform values in `[-bound, bound)`; the same for the same generator state.
pub(super) fn uniform(rng: &mut StdRng, n: usize, bound: f32) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-bound..bound)).collect()
}

pub(super) fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}
