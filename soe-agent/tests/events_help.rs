//! By how much events improve what is foretold: sixty days of a volume whose service is deployed at times
//! nobody can guess.
//!
//! A deployment is followed by three times the load for twenty minutes, four times of five; it is announced
//! forty minutes ahead. Beside it there are bursts of other origin, and events of a kind that does
//! nothing. The same course is forecast with and without being told of events.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use soe_agent::model::baselines::pinball;
use soe_agent::model::burst::BurstRule;
use soe_agent::model::mixture::{Mixture, MixtureConfig};
use soe_agent::model::onset_features::{LEAD, MATURES};
use soe_agent::model::series::Series;
use soe_agent::model::weights::prior;
use soe_agent::model::{Forecaster, Happening, LoadBin, TimeScale, VolumeName};

const SEED: u64 = 7;
const DAY: usize = 288;
const DAYS: usize = 60;
/// What is learnt by then is judged.
const JUDGED: usize = 30 * DAY;
/// Bins between the announcement and the deployment.
const AHEAD: usize = 8;
const BIN_NS: i64 = 300_000_000_000;
const MIB: f64 = 1024.0 * 1024.0;

fn scale() -> TimeScale {
    TimeScale::new(Duration::from_secs(300), DAY).unwrap()
}

struct Course {
    load: Vec<f64>,
    /// When it is told, and what.
    events: Vec<(usize, Happening)>,
}

fn course(effect: bool) -> Course {
    let mut rng = StdRng::seed_from_u64(SEED);
    let bins = DAYS * DAY;
    let mut factor = vec![1.0f64; bins];
    let mut events = Vec::new();
    let happening = |kind: &str, bin: usize| Happening {
        kind: kind.to_owned(),
        subject: None,
        volumes: Vec::new(),
        at: bin as i64 * BIN_NS,
    };
    for day in 0..DAYS {
        for _ in 0..rng.random_range(0..4) {
            let at = day * DAY + rng.random_range(AHEAD..DAY - 4);
            events.push((at - AHEAD, happening("deployment", at)));
            if rng.random_bool(0.8) && effect {
                factor[at..at + 4].fill(3.0);
            }
        }
        // Nobody is told of these.
        for _ in 0..rng.random_range(0..2) {
            let at = day * DAY + rng.random_range(0..DAY - 4);
            factor[at..at + 3].fill(4.0);
        }
        for _ in 0..rng.random_range(0..5) {
            let at = day * DAY + rng.random_range(0..DAY);
            events.push((at, happening("nothing", at)));
        }
    }
    events.sort_by_key(|(told, _)| *told);
    let mut drift = 0.0f64;
    let load = (0..bins)
        .map(|bin| {
            drift = 0.9 * drift + rng.random_range(-0.1..0.1);
            let clock = (bin % DAY) as f64 / DAY as f64;
            let day = 0.4 * (std::f64::consts::TAU * clock).sin();
            let noise = rng.random_range(-0.15..0.15f64);
            20.0 * MIB * (day + drift + noise).exp() * factor[bin]
        })
        .collect();
    Course { load, events }
}

#[derive(Debug)]
struct Judged {
    pr_auc: f64,
    loss: f64,
}

fn run(course: &Course, told: bool) -> Judged {
    let volume: VolumeName = "v".into();
    let mut mixture = Mixture::new(MixtureConfig {
        burst: BurstRule::STRICT,
        ..MixtureConfig::new(scale())
    });
    mixture.set_prior(&prior().unwrap()).unwrap();
    let mut truth = Series::new(scale(), BurstRule::STRICT, DAYS + 1);
    for (bin, load) in course.load.iter().enumerate() {
        truth
            .push(bin as i64 * BIN_NS, Some(load_bin(*load)))
            .unwrap();
    }
    let rows = truth.known().rows.to_vec();
    let mut answers = Vec::new();
    let mut loss = 0.0;
    let mut events = course.events.iter().peekable();
    for (bin, load) in course.load.iter().enumerate() {
        let start = bin as i64 * BIN_NS;
        mixture
            .observe(&volume, start, Some(load_bin(*load)))
            .unwrap();
        // Those that arrived by the end of the bin.
        while let Some((_, event)) = events.next_if(|(at, _)| *at <= bin + 1) {
            if told {
                mixture.happening(&volume, event);
            }
        }
        let forecast = mixture.forecast(&volume, 12).unwrap();
        if bin < JUDGED || bin + 13 > rows.len() {
            continue;
        }
        for (row, actual) in forecast.rows.iter().zip(&rows[bin + 1..]) {
            loss += pinball(row, actual.load);
        }
        if !rows[bin].burst {
            let happened = rows[bin + 1 + LEAD..bin + 1 + MATURES]
                .iter()
                .any(|r| r.onset);
            answers.push((forecast.onset_within(LEAD, MATURES), happened));
        }
    }
    answers.sort_by(|a, b| b.0.total_cmp(&a.0));
    let positives = answers.iter().filter(|(_, happened)| *happened).count() as f64;
    let (mut hits, mut area) = (0.0, 0.0);
    for (n, (_, happened)) in answers.iter().enumerate() {
        if *happened {
            hits += 1.0;
            area += hits / (n + 1) as f64 / positives;
        }
    }
    Judged { pr_auc: area, loss }
}

fn load_bin(load: f64) -> LoadBin {
    LoadBin {
        read_bytes: load * 300.0,
        ..LoadBin::default()
    }
}

#[test]
fn announced_deployments_are_foreseen() {
    let course = course(true);
    let (without, with) = (run(&course, false), run(&course, true));
    println!("seed {SEED}: without events {without:?}");
    println!("seed {SEED}: with events    {with:?}");
    println!(
        "loss with events {:.3} of without",
        with.loss / without.loss
    );
    assert!(with.pr_auc > without.pr_auc + 0.3, "{without:?} {with:?}");
    assert!(with.loss < without.loss * 0.95, "{without:?} {with:?}");
}

#[test]
fn events_that_do_nothing_do_no_harm() {
    let course = course(false);
    let (without, with) = (run(&course, false), run(&course, true));
    println!("seed {SEED}: without events {without:?}");
    println!("seed {SEED}: with events    {with:?}");
    assert!(with.pr_auc > without.pr_auc - 0.03, "{without:?} {with:?}");
    assert!(with.loss < without.loss * 1.01, "{without:?} {with:?}");
}
