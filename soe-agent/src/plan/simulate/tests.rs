use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::model::TimeScale;
use crate::model::mixture::{Mixture, MixtureConfig};
use crate::plan::types::{Action, Criticality};

const S: i64 = 1_000_000_000;

#[derive(Default)]
struct Rows {
    forecasts: Vec<(VolumeName, QuantileForecast)>,
    decisions: Vec<Decision>,
    staged: Vec<StagedRow>,
}

impl Sink for Rows {
    fn forecast(&mut self, volume: &VolumeName, forecast: &QuantileForecast) {
        self.forecasts.push((volume.clone(), forecast.clone()));
    }

    fn decision(&mut self, decision: &Decision) {
        self.decisions.push(decision.clone());
    }

    fn staged(&mut self, row: &StagedRow) {
        self.staged.push(row.clone());
    }
}

fn scale() -> TimeScale {
    TimeScale::new(Duration::from_secs(300), 48).unwrap()
}

fn spec(name: &str, volumes: &[&str], rpo: u64) -> GroupSpec {
    GroupSpec {
        name: name.into(),
        volumes: volumes.iter().map(|v| (*v).into()).collect(),
        prediction_enabled: true,
        rpo: Duration::from_secs(rpo),
        max_pause: Duration::from_millis(100),
        p99_target: None,
        app: None,
        criticality: Criticality::Normal,
    }
}

/// A season of 48 bins: busy by day, a burst at bin 30 with reads of the same blocks, noise.
fn history(volumes: &[&str], seasons: i64, seed: u64) -> History {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut history = History::default();
    for name in volumes {
        let mut bins = Vec::new();
        for i in 0..seasons * 48 {
            let clock = i % 48;
            let busy = (12..40).contains(&clock);
            let burst = (30..32).contains(&clock);
            let level = if burst {
                6e9
            } else if busy {
                9e8
            } else {
                3e7
            };
            let load = level * rng.random_range(0.6..1.4);
            bins.push(rng.random_bool(0.97).then_some(LoadBin {
                read_bytes: load * 0.7,
                write_bytes: load * 0.3,
                read_ops: 100.0,
                write_ops: 40.0,
            }));
            for _ in 0..if burst { 40 } else { 4 } {
                let block: u64 = if burst {
                    rng.random_range(0..200)
                } else {
                    rng.random_range(1_000..100_000)
                };
                history.accesses.push(TraceAccess {
                    at: (i * 300 + rng.random_range(0..300)) * S,
                    volume: (*name).into(),
                    access: if rng.random_bool(0.9) {
                        Access::Read
                    } else {
                        Access::Write
                    },
                    range: ByteRange::new(block * 4096, 4096),
                });
            }
        }
        history.volumes.push(VolumeHistory {
            name: (*name).into(),
            start: 0,
            bins,
        });
    }
    history.accesses.sort_by_key(|a| a.at);
    history
}

fn config(groups: Vec<GroupSpec>) -> SimulationConfig {
    let mut planner = PlannerConfig::new(scale());
    planner.staging.budget_bytes = 200 * 4096;
    SimulationConfig::new(planner, groups)
}

fn run(history: &History, config: &SimulationConfig) -> (Rows, Summary) {
    let mut forecaster = Mixture::new(MixtureConfig::new(scale()));
    let mut rows = Rows::default();
    let summary = simulate(history, config, &mut forecaster, None, &mut rows);
    (rows, summary)
}

#[test]
fn the_planner_captures_at_less_load_than_cron_and_misses_no_rpo() {
    let history = history(&["a", "b"], 20, 1);
    let mut config = config(vec![
        spec("often", &["a"], 9_000),
        spec("daily", &["b"], 48 * 300),
    ]);
    config.judge_from = Some(8 * 48 * 300 * S);
    let (_, summary) = run(&history, &config);
    println!("{summary:#?}");
    assert_eq!(summary.planned.rpo_misses, 0);
    assert!(summary.planned.worst_age <= 1.0);
    assert!(summary.planned.captures >= 12 + 12);
    assert!(
        summary.load_ratio.unwrap() < 0.8,
        "{:?}",
        summary.load_ratio
    );
    assert!(summary.planned.met_burst * 4 <= summary.planned.captures);
}

#[test]
fn staging_comes_before_the_burst_and_is_used() {
    let history = history(&["a"], 20, 2);
    let (rows, summary) = run(&history, &config(vec![spec("g", &["a"], 3_600)]));
    println!("{:?} {} stagings", summary.staging, summary.stagings);
    assert!(summary.stagings >= 8, "{}", summary.stagings);
    for d in rows.decisions.iter().filter(|d| d.action == Action::Stage) {
        assert!(d.window_end.unwrap() > d.at);
    }
    assert!(summary.staging.hit_units > 0);
    assert!(
        rows.staged
            .iter()
            .all(|r| r.evicted_at.is_none_or(|e| e >= r.at - 300 * S))
    );
    let staged_in_all: u64 = rows.staged.iter().map(|r| r.range.len).sum();
    assert!(staged_in_all >= summary.staging.used_bytes);
}

#[test]
fn the_same_history_gives_the_same_rows() {
    let history = history(&["a", "b"], 6, 3);
    let config = config(vec![spec("g", &["a", "b"], 7_200)]);
    let (a, sa) = run(&history, &config);
    let (b, sb) = run(&history, &config);
    assert_eq!(sa, sb);
    assert_eq!(a.decisions, b.decisions);
    assert_eq!(a.forecasts, b.forecasts);
    assert_eq!(a.staged, b.staged);
}

#[test]
fn an_empty_history_and_unknown_volumes_are_no_harm() {
    let (rows, summary) = run(&History::default(), &config(vec![spec("g", &["x"], 60)]));
    assert_eq!((rows.decisions.len(), summary.planned.captures), (0, 0));
    let (_, summary) = run(
        &history(&["a"], 2, 4),
        &config(vec![spec("g", &["x"], 3_600)]),
    );
    assert_eq!(summary.planned.rpo_misses, 0);
    assert_eq!(summary.load_ratio, None);
}

#[test]
fn bins_that_are_no_load_are_counted_and_left_out() {
    let mut history = history(&["a"], 3, 5);
    for i in (0..100).step_by(10) {
        history.volumes[0].bins[i] = Some(LoadBin {
            read_bytes: f64::NAN,
            ..LoadBin::default()
        });
    }
    let (_, summary) = run(&history, &config(vec![spec("g", &["a"], 3_600)]));
    assert_eq!(summary.refused_bins, 10);
    assert!(summary.mean_load.is_finite());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Nothing issued before t may change when what comes after t does.
    #[test]
    fn there_is_no_look_ahead(cut in 1i64..9 * 48, seed in 0u64..1000) {
        let config = config(vec![spec("g", &["a"], 3_600), spec("h", &["a", "b"], 14_400)]);
        let original = history(&["a", "b"], 9, seed);
        let t = cut * 300 * S;
        let mut altered = original.clone();
        for volume in &mut altered.volumes {
            for bin in &mut volume.bins[cut as usize..] {
                *bin = Some(LoadBin { write_bytes: 5e10, ..LoadBin::default() });
            }
        }
        altered.accesses.retain(|a| a.at < t);
        let (a, _) = run(&original, &config);
        let (b, _) = run(&altered, &config);
        let forecasts = |r: &Rows| {
            r.forecasts.iter().filter(|(_, f)| f.issued_at <= t).cloned().collect::<Vec<_>>()
        };
        let decisions = |r: &Rows| {
            r.decisions.iter().filter(|d| d.at <= t).cloned().collect::<Vec<_>>()
        };
        prop_assert_eq!(forecasts(&a), forecasts(&b));
        prop_assert_eq!(decisions(&a), decisions(&b));
        // What was copied by t is the same, and so is what was evicted before.
        let staged = |r: &Rows| {
            let mut rows: Vec<_> = r
                .staged
                .iter()
                .filter(|s| s.at <= t)
                .map(|s| (s.at, s.volume.clone(), s.range))
                .collect();
            rows.sort();
            rows
        };
        let evicted = |r: &Rows| {
            let mut rows: Vec<_> = r
                .staged
                .iter()
                .filter(|s| s.evicted_at.is_some_and(|e| e < t))
                .map(|s| (s.at, s.volume.clone(), s.range, s.score.to_bits()))
                .collect();
            rows.sort();
            rows
        };
        prop_assert_eq!(staged(&a), staged(&b));
        prop_assert_eq!(evicted(&a), evicted(&b));
    }
}
