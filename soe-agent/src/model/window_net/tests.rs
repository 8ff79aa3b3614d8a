use super::*;
use crate::model::burst::BurstRule;
use crate::model::series::{LoadBin, Series, TimeScale};
use std::time::Duration;

/// Volumes whose load is low for a quarter of an hour in every two hours, at a phase of their own.
fn volumes(count: u64, days: i64) -> Dataset {
    let scale = TimeScale::new(Duration::from_secs(300), 288).unwrap();
    let series = (0..count)
        .map(|v| {
            let mut rng = StdRng::seed_from_u64(v);
            let mut series = Series::new(scale, BurstRule::STRICT, days as usize);
            for i in 0..days * 288 {
                let low = (i + 5 * v as i64).rem_euclid(24) < 3;
                let noise = f64::from(uniform(&mut rng, 1, 0.3)[0]);
                let load = LoadBin {
                    read_bytes: (if low { 12.0 } else { 16.0 } + noise).exp() * 300.0,
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
fn a_rhythm_is_waited_for() {
    let data = volumes(3, 11);
    let never = AtomicBool::new(false);
    let network = WindowWeights {
        intervals: 0,
        weights: train_one(&[group(&data, i64::MAX, 72, 2)], 1, &never).unwrap(),
    };
    // Six hours, a window of ten minutes: the regret relative to a random start.
    let other = volumes(8, 12);
    let (mut mine, mut random) = (0.0, 0.0);
    for (_, series) in &other.series[4..] {
        let past = Past::of(&[series.known()], 2).unwrap();
        for from in (288 * 8..288 * 12 - 72).step_by(72) {
            let loads: Vec<f64> = (from..from + 71)
                .map(|s| past.load_met(s).unwrap())
                .collect();
            let chosen = (0..71).find(|passed| {
                let start = Start {
                    bins: from + passed,
                    later: 70 - passed,
                    passed: *passed,
                };
                let inputs = past.inputs(start).unwrap();
                start.later == 0 || network.log_odds(&inputs, start.later) > 0.0
            });
            let best = loads.iter().copied().fold(f64::INFINITY, f64::min);
            mine += loads[chosen.unwrap()] - best;
            random += loads.iter().sum::<f64>() / 71.0 - best;
        }
    }
    println!("regret {:.3}", mine / random);
    assert!(mine < 0.1 * random, "{mine} {random}");
}

#[test]
fn the_network_in_training_is_the_one_that_serves() {
    let weights = WindowWeights {
        intervals: 1,
        weights: fresh(3),
    };
    let device = Device::flex();
    let net = Net::new(&weights.weights, &device);
    let mut rng = StdRng::seed_from_u64(5);
    let inputs = uniform(&mut rng, WINDOW_INPUTS, 3.0);
    let x = TensorData::new(inputs.clone(), [1, WINDOW_INPUTS]);
    let there = floats(net.forward(Tensor::from_data(x, &device)).into_data())[0];
    assert!((there - weights.log_odds(&inputs, 1)).abs() < 1e-4);
    assert!((there - 5.0f32.ln() - weights.log_odds(&inputs, 5)).abs() < 1e-4);
}

#[test]
fn too_little_history_is_an_error_in_words() {
    let data = volumes(1, 8);
    let error = train(&data, 0, 1, &AtomicBool::new(false)).unwrap_err();
    assert!(matches!(error, ModelError::TooLittle { .. }), "{error}");
}

#[test]
fn a_seed_means_the_same_networks() {
    let data = volumes(1, 9);
    let never = AtomicBool::new(false);
    let groups = [group(&data, i64::MAX, 12, 1)];
    let train = |seed| train_one(&groups, seed, &never).unwrap();
    assert_eq!(train(1), train(1));
    assert_ne!(train(1), train(2));
}
