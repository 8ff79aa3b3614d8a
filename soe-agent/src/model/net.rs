//! The quantile network in burn: inputs and context -> 128 -> 128 -> quantiles, plus a linear skip.
//!
//! It is global: one network for all volumes and all leads, made possible by normalising each sample by
//! its own trailing season and by aligning its inputs to the bin that is forecast. The context is what 32
//! units make of the inputs of all bins of the forecast together. The skip begins as the
//! forecast of the weighted mean, so what is learnt is how to do better than that. The loss is the
//! pinball loss both in bytes, each volume weighing the same, by which forecasts are judged, and on the
//! log scale, which keeps quiet hours from being neglected. Weights are drawn by our own generator, not by burn's, so that a seed means the
//! same network wherever it is trained.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::optim::GradientsParams;
use burn::tensor::activation::relu;
use burn::tensor::{Device, Tensor, TensorData};

use super::dataset::{Dataset, MAX_LOG, Samples, Target};
use super::features::{FEATURE_VERSION, INPUTS, SMOOTHED_AT};
pub use super::nn::Budget;
use super::nn::{
    Batches, GENTLY, Net, cpu_time, floats, he_bounds, optimizer, random_weights, rate_at,
};
use super::onset_net;
use super::weights::{ModelError, OUTPUTS, Predictor, Shape, Trained, TrainedInfo};
use super::window_net;
use super::{QUANTILES, SHORT_HORIZON};

/// Forecasts in a batch.
pub const BATCH: usize = 64;
/// How often a training looks at every forecast, if its steps allow.
const EPOCHS: usize = 2;
/// Steps also where there are few.
const LEAST_STEPS: usize = 500;
/// What the loss on the log scale weighs beside that in bytes.
const LOG_WEIGHT: f32 = 3.0;
/// Fewer samples than this say nothing.
const MIN_SAMPLES: usize = 64;
/// Samples on which a state of the network is scored.
const VALIDATION_SAMPLES: usize = 2_000;
/// How often a training looks at the validation samples.
const CHECKS: usize = 12;

/// A trained network, ready to forecast.
pub struct Network {
    net: Net,
    device: Device,
}

impl Network {
    /// The network of `trained`.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] if it does not fit this build.
    pub fn new(trained: &Trained) -> Result<Self, ModelError> {
        trained.check()?;
        let device = Device::flex();
        Ok(Self {
            net: Net::new(trained.info.shape, &trained.weights, &device),
            device,
        })
    }
}

impl Predictor for Network {
    fn predict(&self, inputs: &[f32]) -> Vec<f32> {
        let rows = inputs.len() / INPUTS / SHORT_HORIZON * SHORT_HORIZON;
        let x = TensorData::new(inputs[..rows * INPUTS].to_vec(), [rows, INPUTS]);
        floats(
            self.net
                .forward(Tensor::from_data(x, &self.device))
                .into_data(),
        )
    }
}

/// Random weights whose skip hands the weighted mean's quantiles through.
fn fresh_weights(shape: Shape, seed: u64) -> Vec<f32> {
    let mut weights = random_weights(shape, he_bounds(shape, 1.0), seed);
    let skip = weights.len() - shape.inputs * shape.outputs;
    for quantile in 0..shape.outputs {
        let at = skip + (SMOOTHED_AT + quantile) * shape.outputs + quantile;
        if let Some(weight) = weights.get_mut(at) {
            *weight = 1.0;
        }
    }
    weights
}

/// A batch of targets as tensors of one column.
struct Targets {
    load: Tensor<2>,
    z: Tensor<2>,
    mean: Tensor<2>,
    deviation: Tensor<2>,
    weight: Tensor<2>,
    /// 1 where it is known what happened.
    known: Tensor<2>,
}

/// See the module. The sum over the quantiles, the mean over the bins that are known.
fn loss(forecast: Tensor<2>, targets: Targets, levels: Tensor<2>) -> Tensor<1> {
    // max(q e, (q - 1) e) = q e + max(0, -e)
    let pinball = |error: Tensor<2>| error.clone() * levels.clone() + relu(-error);
    let bins = targets.known.clone().sum();
    let log = (pinball(targets.z - forecast.clone()) * targets.known).sum();
    let load = (forecast * targets.deviation + targets.mean)
        .clamp(0.0, MAX_LOG)
        .exp()
        - 1.0;
    let bytes = (pinball(targets.load - load) * targets.weight).sum();
    (bytes + log * LOG_WEIGHT) / bins
}

/// Trains a network on `data`, starting from `from` if given.
///
/// The same data, seed and step budget give the same weights. `cancel` is looked at in every step.
///
/// # Errors
/// [`ModelError::TooLittle`], [`ModelError::Cancelled`], [`ModelError::Diverged`], and
/// [`ModelError::Mismatch`] if `from` does not fit.
pub fn train(
    data: &Dataset,
    budget: Budget,
    seed: u64,
    from: Option<&Trained>,
    cancel: &AtomicBool,
) -> Result<Trained, ModelError> {
    let (began, started) = (Instant::now(), cpu_time());
    let too_little = |samples| ModelError::TooLittle {
        samples,
        needed: MIN_SAMPLES,
    };
    let (Some((data_from, data_to)), Some(split)) =
        (data.range(), data.split(budget.held_back + budget.judged))
    else {
        return Err(too_little(0));
    };
    let origins = data.training_origins(split, budget.max_samples / SHORT_HORIZON, seed);
    if origins.len() < MIN_SAMPLES {
        return Err(too_little(origins.len()));
    }
    let chosen_until = data.split(budget.judged).unwrap_or(data_to);
    let validation = data.validation_origins(split..chosen_until, VALIDATION_SAMPLES);
    let samples = data.samples(&origins);
    // An origin may be followed by bins of which nothing is known.
    if samples.len() < MIN_SAMPLES {
        return Err(too_little(samples.len()));
    }
    let mut weights = match from {
        Some(trained) => {
            trained.check()?;
            trained.weights.clone()
        }
        None => fresh_weights(Shape::CURRENT, seed),
    };
    let mut info = TrainedInfo {
        shape: Shape::CURRENT,
        feature_version: FEATURE_VERSION,
        scale: data.scale,
        seed,
        steps: 0,
        samples: samples.len(),
        volumes: data.series.len(),
        data_from,
        trained_until: split,
        chosen_until,
        data_to,
        score: f64::INFINITY,
        onset_samples: None,
        window_intervals: None,
    };
    let mut run = Run::new(&samples, &weights, seed);
    let rate = if from.is_some() { GENTLY } else { 1.0 };
    let steps = budget
        .max_steps
        .min((EPOCHS * samples.forecasts().div_ceil(BATCH)).max(LEAST_STEPS))
        .max(1);
    let check_every = (steps / CHECKS).max(1);
    for step in 1..=steps {
        if cancel.load(Ordering::Relaxed) {
            return Err(ModelError::Cancelled { steps: step - 1 });
        }
        let spent = cpu_time().saturating_sub(started);
        let progress = budget
            .max_cpu
            .map_or(0.0, |max| spent.as_secs_f64() / max.as_secs_f64().max(1e-9));
        let last = step == steps || progress >= 1.0;
        // Where CPU time is short, the rate falls with it.
        let at = ((progress * steps as f64) as usize).max(step);
        run.step(rate_at(at, steps) * rate);
        budget.rest(began, cpu_time().saturating_sub(started), cancel);
        if last || step % check_every == 0 {
            let candidate = run.weights();
            if candidate.iter().any(|w| !w.is_finite()) {
                return Err(ModelError::Diverged { steps: step, seed });
            }
            let trained = Trained {
                info: info.clone(),
                weights: candidate,
                onset: None,
                window: None,
            };
            let score = data.score(&Network::new(&trained)?, &validation);
            // Without validation samples the newest state is as good as any.
            if score.is_none_or(|s| s < info.score) {
                weights = trained.weights;
                info.score = score.unwrap_or(info.score);
                info.steps = step;
            }
        }
        if last {
            break;
        }
    }
    let onset = onset_net::train(
        data,
        data.scale.index_of(split),
        budget,
        seed,
        from.and_then(|trained| trained.onset.as_ref()),
        cancel,
    );
    let onset = match onset {
        Ok(onset) => Some(onset),
        // Bursts are rare: a host may have seen too few of them. Whatever it is, the network of the load
        // stands without this one.
        Err(ModelError::TooLittle { .. } | ModelError::Diverged { .. }) => {
            from.and_then(|trained| trained.onset.clone())
        }
        Err(error) => return Err(error),
    };
    info.onset_samples = onset.as_ref().map(|onset| onset.samples);
    // It is made of choices over months of many volumes: a host has too few to do better.
    let window = from.and_then(|trained| trained.window.clone());
    info.window_intervals = window.as_ref().map(|window| window.intervals);
    Ok(Trained {
        info,
        weights,
        onset,
        window,
    })
}

/// Trains the network that says when to begin a capture on all of `data`, and puts it beside `trained`.
///
/// # Errors
/// As [`train`].
pub fn train_windows(
    data: &Dataset,
    seed: u64,
    trained: &mut Trained,
    cancel: &AtomicBool,
) -> Result<(), ModelError> {
    let window = window_net::train(data, i64::MAX, seed, cancel)?;
    trained.info.window_intervals = Some(window.intervals);
    trained.window = Some(window);
    Ok(())
}

/// A training under way.
struct Run<'a> {
    samples: &'a Samples,
    batches: Batches,
    device: Device,
    levels: Tensor<2>,
    optimizer: burn::optim::ModuleOptimizer,
    net: Option<Net>,
}

impl<'a> Run<'a> {
    fn new(samples: &'a Samples, weights: &[f32], seed: u64) -> Self {
        let device = Device::flex().autodiff();
        let levels = QUANTILES.map(|q| q as f32).to_vec();
        Self {
            samples,
            batches: Batches::new(samples.forecasts(), BATCH, seed ^ 0x5eed),
            levels: Tensor::from_data(TensorData::new(levels, [1, QUANTILES.len()]), &device),
            optimizer: optimizer(),
            net: Some(Net::new(Shape::CURRENT, weights, &device)),
            device,
        }
    }

    fn step(&mut self, rate: f64) {
        let Some(net) = self.net.take() else { return };
        let forecasts = self.batches.next();
        let n = forecasts.len() * SHORT_HORIZON;
        let of = |forecast: &usize, width: usize| {
            let size = SHORT_HORIZON * width;
            forecast * size..(forecast + 1) * size
        };
        let mut inputs = Vec::with_capacity(n * INPUTS);
        let mut rows: Vec<&Target> = Vec::with_capacity(n);
        for forecast in forecasts {
            inputs.extend_from_slice(&self.samples.inputs[of(forecast, INPUTS)]);
            rows.extend(&self.samples.targets[of(forecast, 1)]);
        }
        let column = |pick: fn(&Target) -> f32| {
            let values: Vec<f32> = rows.iter().map(|target| pick(target)).collect();
            Tensor::<2>::from_data(TensorData::new(values, [n, 1]), &self.device)
        };
        let targets = Targets {
            load: column(|t| t.load),
            z: column(|t| t.z),
            mean: column(|t| t.normal.mean),
            deviation: column(|t| t.normal.deviation),
            weight: column(|t| t.weight),
            known: column(|t| f32::from(u8::from(t.weight > 0.0))),
        };
        let x = TensorData::new(inputs, [n, INPUTS]);
        let forecast = net.forward(Tensor::from_data(x, &self.device));
        let loss = loss(forecast, targets, self.levels.clone());
        let gradients = GradientsParams::from_grads(loss.backward(), &net);
        self.net = Some(self.optimizer.step(rate, net, gradients));
    }

    fn weights(&self) -> Vec<f32> {
        self.net.as_ref().map(Net::weights).unwrap_or_default()
    }
}

const _: () = assert!(OUTPUTS == QUANTILES.len());

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::baselines::{self, Member, pinball};
    use crate::model::burst::BurstRule;
    use crate::model::dataset::network_rows;
    use crate::model::features::features;
    use crate::model::nn::uniform;
    use crate::model::series::{LoadBin, Series, TimeScale};
    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use std::time::Duration;

    /// Volumes of different levels with a daily shape, drifting noise and a job every few hours
    /// whose start wanders: something to learn, but not a sine.
    fn seasonal(volumes: u64, seasons: i64) -> Dataset {
        let scale = TimeScale::new(Duration::from_secs(300), 96).unwrap();
        let series = (0..volumes)
            .map(|v| {
                let mut rng = StdRng::seed_from_u64(100 + v);
                let mut noise = |b: f32| f64::from(uniform(&mut rng, 1, b)[0]);
                let mut series = Series::new(scale, BurstRule::default(), 40);
                let mut drift = 0.0f64;
                for i in 0..seasons * 96 {
                    drift = 0.9 * drift + noise(0.3);
                    let clock = (i % 96) as f64 / 96.0;
                    let day = 1.5 * (std::f64::consts::TAU * (clock + v as f64 / 7.0)).sin();
                    let job = if (i % 96 - 30 - (i / 96 * 7 + v as i64) % 4).rem_euclid(32) < 3 {
                        2.0
                    } else {
                        0.0
                    };
                    let level = 12.0 + v as f64 * 0.7 + day + job + drift;
                    let load = LoadBin {
                        read_bytes: level.exp() * (300.0 + 200.0 * noise(0.5)),
                        read_ops: 10.0,
                        ..LoadBin::default()
                    };
                    series.push(i * scale.bin_nanos(), Some(load)).unwrap();
                }
                (format!("v{v}").into(), series)
            })
            .collect();
        Dataset { scale, series }
    }

    fn steps(max_steps: usize) -> Budget {
        Budget {
            max_steps,
            max_cpu: None,
            cores: None,
            max_samples: 20_000,
            held_back: 0.2,
            judged: 0.0,
        }
    }

    /// However slow the machine is, the time that passes is the time used times four.
    #[test]
    fn a_training_keeps_to_its_share_of_a_core() {
        let data = seasonal(2, 8);
        let budget = Budget {
            cores: Some(0.25),
            ..steps(20)
        };
        let (began, started) = (Instant::now(), cpu_time());
        train(&data, budget, 1, None, &AtomicBool::new(false)).unwrap();
        let (took, spent) = (began.elapsed(), cpu_time().saturating_sub(started));
        // What is done after the last step is not rested for.
        assert!(took >= spent * 2, "{spent:?} of CPU time within {took:?}");
    }

    #[test]
    fn the_network_beats_last_value_and_the_weighted_mean_on_held_out_time() {
        let data = seasonal(6, 20);
        let trained = train(&data, steps(400), 1, None, &AtomicBool::new(false)).unwrap();
        println!(
            "seed 1: score {:.3} after {} steps",
            trained.info.score, trained.info.steps
        );
        assert!(trained.info.score < 0.8, "{}", trained.info.score);
        let network = Network::new(&trained).unwrap();
        let (mut mine, mut last) = (0.0, 0.0);
        for origin in data.validation_origins(data.split(0.2).unwrap()..i64::MAX, 500) {
            let series = &data.series[origin.series].1;
            let known = series.until(origin.bins);
            let (x, normal) = features(known);
            let net = network_rows(&network, &x, normal).unwrap();
            let naive = baselines::forecast(Member::LastValue, known, SHORT_HORIZON).unwrap();
            let actual = &series.known().rows[origin.bins..];
            for ((row, net), naive) in actual.iter().zip(&net).zip(&naive) {
                mine += pinball(net, row.load);
                last += pinball(naive, row.load);
            }
        }
        println!("pinball {mine:.0} against {last:.0} of last value");
        assert!(mine < 0.75 * last, "{mine} {last}");
    }

    #[test]
    fn a_seed_means_the_same_network() {
        let data = seasonal(2, 8);
        let run = |seed| train(&data, steps(20), seed, None, &AtomicBool::new(false)).unwrap();
        let first = run(3);
        assert_eq!(first, run(3));
        assert_ne!(first.weights, run(4).weights);
    }

    #[test]
    fn training_resumes_from_weights() {
        let data = seasonal(2, 8);
        let never = AtomicBool::new(false);
        let first = train(&data, steps(60), 3, None, &never).unwrap();
        let more = train(&data, steps(2), 4, Some(&first), &never).unwrap();
        let fresh = train(&data, steps(2), 4, None, &never).unwrap();
        assert!(more.info.score < fresh.info.score);
    }

    #[test]
    fn a_training_can_be_cancelled_and_bounded() {
        let data = seasonal(2, 8);
        let error = train(&data, steps(100), 1, None, &AtomicBool::new(true)).unwrap_err();
        assert!(
            matches!(error, ModelError::Cancelled { steps: 0 }),
            "{error}"
        );
        let budget = Budget {
            max_cpu: Some(Duration::from_millis(1)),
            ..steps(1_000_000)
        };
        let trained = train(&data, budget, 1, None, &AtomicBool::new(false)).unwrap();
        assert!(trained.info.steps <= 2, "{}", trained.info.steps);
    }

    #[test]
    fn too_little_history_is_an_error_in_words() {
        let data = seasonal(1, 1);
        let error = train(&data, steps(10), 1, None, &AtomicBool::new(false)).unwrap_err();
        assert!(matches!(error, ModelError::TooLittle { .. }), "{error}");
    }

    #[test]
    fn a_constant_series_trains_and_forecasts_itself() {
        let scale = TimeScale::new(Duration::from_secs(1), 24).unwrap();
        let mut series = Series::new(scale, BurstRule::default(), 40);
        for i in 0..600 {
            let load = LoadBin {
                write_bytes: 4096.0,
                ..LoadBin::default()
            };
            series.push(i * 1_000_000_000, Some(load)).unwrap();
        }
        let data = Dataset {
            scale,
            series: vec![("c".into(), series)],
        };
        let trained = train(&data, steps(200), 1, None, &AtomicBool::new(false)).unwrap();
        let network = Network::new(&trained).unwrap();
        let (x, normal) = features(data.series[0].1.known());
        for row in network_rows(&network, &x, normal).unwrap() {
            assert!((row[1] - 4096.0).abs() < 400.0, "{row:?}");
        }
    }

    #[test]
    fn a_saved_network_forecasts_the_same() {
        let data = seasonal(2, 8);
        let trained = train(&data, steps(20), 3, None, &AtomicBool::new(false)).unwrap();
        let loaded = Trained::from_bytes(&trained.to_bytes()).unwrap();
        let (x, _) = features(data.series[0].1.known());
        assert_eq!(
            Network::new(&trained).unwrap().predict(&x),
            Network::new(&loaded).unwrap().predict(&x)
        );
    }

    #[test]
    fn batches_cover_every_sample_each_epoch() {
        let mut batches = Batches::new(10, 5, 3);
        let mut seen: Vec<usize> = batches.next().to_vec();
        seen.extend_from_slice(batches.next());
        seen.sort_unstable();
        assert_eq!(seen, (0..10).collect::<Vec<_>>());
    }
}
