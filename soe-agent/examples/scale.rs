//! What forecasting for many volumes costs one core: `cargo xtask bench scale` builds and runs this.
//!
//! Prints JSON: seconds of CPU for taking a bin of every volume and for forecasting all of them, CPU and
//! memory of a nightly training, and how its steps compare to the multiply-adds they need at the rate this
//! core was measured to do.

use std::hint::black_box;
use std::time::Duration;

use serde_json::json;
use soe_agent::model::dataset::Dataset;
use soe_agent::model::features::INPUTS;
use soe_agent::model::mixture::{Mixture, MixtureConfig};
use soe_agent::model::net::{BATCH, Budget, train};
use soe_agent::model::weights::{Shape, predictor, prior};
use soe_agent::model::{Forecaster, LoadBin, SHORT_HORIZON, TimeScale, VolumeName};

const BIN: i64 = 300_000_000_000;
const DAY: i64 = 288;
/// Seasons of history: as many as an agent ever holds (it keeps 29, and drops the surplus at a quarter more).
const SEASONS: i64 = 36;
/// Optimiser steps of two trainings whose difference shows what a step takes.
const STEPS: (usize, usize) = (400, 500);

fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn spent<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let before = cpu();
    let answer = work();
    (cpu().saturating_sub(before).as_secs_f64(), answer)
}

/// The greatest resident size so far, in MiB.
fn peak_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok())
        .map_or(0.0, |kib| kib / 1024.0)
}

/// A load with a daily shape, jobs at hours of its own, and noise; of another kind for every volume.
fn load(volume: i64, bin: i64) -> LoadBin {
    let hash = (volume * 1_000_003 + bin) as u64;
    let noise = (hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64 / (1u64 << 24) as f64;
    let clock = (bin % DAY) as f64 / DAY as f64;
    let day = (std::f64::consts::TAU * (clock + volume as f64 / 17.0)).sin();
    let job = (bin - volume * 7).rem_euclid(12 * (1 + volume % 8)) < 2;
    let level = 6.0 + (volume % 9) as f64 + day + 2.0 * noise + if job { 2.5 } else { 0.0 };
    let idle = volume % 10 == 3 && noise < 0.8;
    LoadBin {
        read_bytes: if idle {
            0.0
        } else {
            level.exp() * 300.0 * 1024.0
        },
        ..LoadBin::default()
    }
}

/// Multiply-adds a second in registers: what a core can do at most.
fn peak_multiply_adds() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature was found.
        return unsafe { fused::wide(16, fused::avx512) };
    } else if std::arch::is_x86_feature_detected!("fma") {
        // SAFETY: the feature was found.
        return unsafe { fused::wide(8, fused::fma) };
    }
    f64::NAN
}

#[cfg(target_arch = "x86_64")]
mod fused {
    use std::arch::x86_64::*;

    pub const ROUNDS: usize = 20_000_000;

    /// # Safety
    /// The CPU must have what `kernel` uses.
    pub unsafe fn wide(lanes: usize, kernel: unsafe fn(usize) -> f32) -> f64 {
        // SAFETY: as required of the caller.
        let (seconds, _) = super::spent(|| super::black_box(unsafe { kernel(ROUNDS) }));
        (ROUNDS * 10 * lanes) as f64 / seconds
    }

    macro_rules! kernel {
        ($name:ident, $feature:literal, $set:ident, $fma:ident, $add:ident, $first:ident) => {
            /// # Safety
            /// The CPU must have the feature.
            #[target_feature(enable = $feature)]
            pub unsafe fn $name(rounds: usize) -> f32 {
                let (a, b) = ($set(super::black_box(0.999)), $set(super::black_box(0.001)));
                // Ten chains hide the latency of each; as variables, so that they stay in registers
                // however little the compiler optimises.
                let (mut c, mut d, mut e, mut f, mut g) = (b, b, b, b, b);
                let (mut h, mut i, mut j, mut k, mut l) = (b, b, b, b, b);
                let mut round = 0;
                while round < rounds {
                    (c, d, e, f, g) = (
                        $fma(c, a, b),
                        $fma(d, a, b),
                        $fma(e, a, b),
                        $fma(f, a, b),
                        $fma(g, a, b),
                    );
                    (h, i, j, k, l) = (
                        $fma(h, a, b),
                        $fma(i, a, b),
                        $fma(j, a, b),
                        $fma(k, a, b),
                        $fma(l, a, b),
                    );
                    round += 1;
                }
                let low = $add($add($add(c, d), $add(e, f)), g);
                let high = $add($add($add(h, i), $add(j, k)), l);
                $first($add(low, high))
            }
        };
    }
    kernel!(
        fma,
        "avx,fma",
        _mm256_set1_ps,
        _mm256_fmadd_ps,
        _mm256_add_ps,
        _mm256_cvtss_f32
    );
    kernel!(
        avx512,
        "avx512f",
        _mm512_set1_ps,
        _mm512_fmadd_ps,
        _mm512_add_ps,
        _mm512_cvtss_f32
    );
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let volumes: i64 = match std::env::args().nth(1) {
        Some(text) => text.parse()?,
        None => 1_000,
    };
    let scale = TimeScale::new(Duration::from_secs(300), DAY as usize)?;
    let names: Vec<VolumeName> = (0..volumes)
        .map(|v| format!("v{v}").as_str().into())
        .collect();
    let mut mixture = Mixture::new(MixtureConfig::new(scale));
    let prior = prior()?;
    mixture.set_prior(&prior)?;
    mixture.restore(&prior)?;
    let (fed, ()) = spent(|| {
        for bin in 0..SEASONS * DAY {
            for (v, name) in names.iter().enumerate() {
                let _ = mixture.observe(name, bin * BIN, Some(load(v as i64, bin)));
            }
        }
    });
    eprintln!("{volumes} volumes hold {SEASONS} seasons after {fed:.1} s");
    let held = peak_mib();

    // A few rounds as in an agent: a bin of every volume ends, and every volume is forecast.
    let (mut took, mut observed) = (Vec::new(), Vec::new());
    for bin in SEASONS * DAY..SEASONS * DAY + 14 {
        let (seconds, ()) = spent(|| {
            for (v, name) in names.iter().enumerate() {
                let _ = mixture.observe(name, bin * BIN, Some(load(v as i64, bin)));
            }
        });
        observed.push(seconds);
        let (seconds, ()) = spent(|| {
            for name in &names {
                black_box(mixture.forecast(name, SHORT_HORIZON));
            }
        });
        took.push(seconds);
    }
    let network = predictor(&prior)?;
    let inputs = vec![0.1f32; SHORT_HORIZON * INPUTS];
    let (network_alone, ()) = spent(|| {
        for _ in 0..2 * volumes {
            black_box(network.predict(&inputs));
        }
    });

    let data: Dataset = mixture.dataset();
    let run = |max_steps| {
        let budget = Budget {
            max_cpu: None,
            max_steps,
            max_samples: Budget::BACKGROUND_SAMPLES,
            ..Budget::default()
        };
        let never = std::sync::atomic::AtomicBool::new(false);
        spent(|| train(&data, budget, 1, Some(&prior), &never))
    };
    let (training, trained) = run(Budget::default().max_steps);
    let trained = trained?;
    // Both do all that is done beside the steps, and all steps of the onset network.
    let (few, many) = (run(STEPS.0), run(STEPS.1));
    let step_takes = (many.0 - few.0) / (STEPS.1 - STEPS.0) as f64;
    drop(data);
    let (judging, promotion) = spent(|| mixture.install(&trained));
    eprintln!("{:?}", promotion?);

    let peak = peak_multiply_adds();
    let Shape {
        inputs,
        context,
        hidden: [g, h],
        outputs,
    } = Shape::CURRENT;
    // The context is worked out once for all bins of a forecast.
    let bin = (inputs + context) * g + g * h + h * outputs + inputs * outputs;
    let forward = (SHORT_HORIZON * (bin + inputs * context)) as f64;
    // Backward needs twice the forward pass's: for the inputs and for the weights of every layer.
    let step = 3.0 * forward * BATCH as f64;
    took.sort_by(f64::total_cmp);
    observed.sort_by(f64::total_cmp);
    println!(
        "{}",
        serde_json::to_string_pretty(&json!({
            "volumes": volumes,
            "bins_ahead": SHORT_HORIZON,
            "observe_s": observed[observed.len() / 2],
            "forecast_s": took[took.len() / 2],
            "forecast_slowest_s": took.last(),
            "networks_alone_s": network_alone,
            "networks_limit_s": 2.0 * volumes as f64 * forward / peak,
            "training_s": training,
            "training_step_s": step_takes,
            "training_step_limit_s": step / peak,
            "training_samples": trained.info.samples,
            "judging_s": judging,
            "resident_before_training_mib": held,
            "resident_peak_mib": peak_mib(),
            "peak_multiply_adds_per_s": peak,
        }))?
    );
    Ok(())
}
