//! Networks left alone for a year, while the volume they serve becomes another one.
//!
//! The network that ships, and one trained on the volume's first 40 days, are never touched again. What is
//! served must stay within 5 % of the best simple forecast, chosen afterwards, over the year and over the
//! days that follow each change.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use soe_agent::model::baselines::{self, Member, pinball_levels};
use soe_agent::model::burst::BurstRule;
use soe_agent::model::dataset::Dataset;
use soe_agent::model::mixture::{Mixture, MixtureConfig};
use soe_agent::model::net::{Budget, train};
use soe_agent::model::series::Series;
use soe_agent::model::weights::prior;
use soe_agent::model::{Forecaster, LoadBin, QuantileRow, SHORT_HORIZON, TimeScale, VolumeName};

/// Bins of half an hour keep a year short enough; what is learnt is in parts of seasons.
const BIN: Duration = Duration::from_secs(1800);
const DAY: i64 = 48;
const DAYS: i64 = 365;
/// Days on which the second network is trained.
const TRAINED: i64 = 40;
/// The levels by which forecasts are judged.
const LEVELS: [usize; 3] = [0, 1, 3];
const MIB: f64 = 1024.0 * 1024.0;

/// A server's load in a bin, in bytes per second.
struct Server {
    rng: StdRng,
    drift: f64,
}

impl Server {
    fn new(seed: u64) -> Self {
        Self {
            rng: StdRng::seed_from_u64(seed),
            drift: 0.0,
        }
    }

    /// A daily shape whose top is at `peak` (0 to 1), a job at night, drifting noise.
    fn load(&mut self, bin: i64, level: f64, shape: f64, peak: f64) -> f64 {
        self.drift = 0.85 * self.drift + self.rng.random_range(-0.25..0.25);
        let noise = self.rng.random_range(-0.3..0.3f64);
        let clock = (bin % DAY) as f64 / DAY as f64;
        let day = shape * (std::f64::consts::TAU * (clock - peak + 0.25)).sin();
        let job = if (bin - (peak * DAY as f64) as i64 - 20).rem_euclid(DAY) < 3 {
            shape
        } else {
            0.0
        };
        level * (day + job + self.drift + noise).exp()
    }
}

type Course = Vec<Option<f64>>;

/// A year by `day of the year, bin -> load`.
fn year(seed: u64, mut at: impl FnMut(&mut Server, i64, i64) -> Option<f64>) -> Course {
    let mut server = Server::new(seed);
    (0..DAYS * DAY)
        .map(|bin| at(&mut server, bin / DAY, bin))
        .collect()
}

fn scale() -> TimeScale {
    TimeScale::new(BIN, DAY as usize).unwrap()
}

fn load_bin(load: f64) -> LoadBin {
    LoadBin {
        read_bytes: load * BIN.as_secs_f64(),
        ..LoadBin::default()
    }
}

/// Losses of what was served and of the simple members.
#[derive(Clone, Copy, Default)]
struct Losses {
    served: f64,
    simple: [f64; Member::SIMPLE.len()],
}

impl Losses {
    fn best(&self) -> f64 {
        self.simple.into_iter().fold(f64::INFINITY, f64::min)
    }
}

fn loss(rows: &[QuantileRow], course: &[Option<f64>]) -> f64 {
    rows.iter()
        .zip(course)
        .filter_map(|(row, load)| {
            let levels = pinball_levels(row, (*load)? as f32);
            Some(LEVELS.iter().map(|l| levels[*l]).sum::<f64>())
        })
        .sum()
}

/// What stands beside the network that ships.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Second {
    Nothing,
    /// A network trained on the first days.
    Trained,
    /// The same with its weights turned round.
    Wrong,
}

/// Losses by the day on which the forecast was made.
fn run(course: &Course, second: Second) -> Vec<Losses> {
    let volume: VolumeName = "v".into();
    let mut mixture = Mixture::new(MixtureConfig::new(scale()));
    mixture.set_prior(&prior().unwrap()).unwrap();
    let mut series = Series::new(scale(), BurstRule::default(), 29);
    let mut days = vec![Losses::default(); DAYS as usize];
    for (bin, load) in course.iter().enumerate() {
        let start = bin as i64 * scale().bin_nanos();
        let bin_load = load.map(load_bin);
        mixture.observe(&volume, start, bin_load).unwrap();
        series.push(start, bin_load).unwrap();
        if second != Second::Nothing && bin as i64 == TRAINED * DAY {
            let data = Dataset {
                scale: scale(),
                series: vec![(volume.clone(), series.clone())],
            };
            let budget = Budget {
                max_steps: 300,
                max_cpu: None,
                ..Budget::default()
            };
            let never = AtomicBool::new(false);
            let mut trained = train(&data, budget, 1, Some(&prior().unwrap()), &never).unwrap();
            if second == Second::Wrong {
                trained.weights.iter_mut().for_each(|w| *w = -*w);
            }
            mixture.restore(&trained).unwrap();
        }
        let Some(served) = mixture.forecast(&volume, SHORT_HORIZON) else {
            continue;
        };
        let ahead = &course[bin + 1..];
        if load.is_none() || ahead.len() < SHORT_HORIZON {
            continue;
        }
        let day = &mut days[bin / DAY as usize];
        day.served += loss(&served.rows, ahead);
        for (sum, member) in day.simple.iter_mut().zip(Member::SIMPLE) {
            let rows = baselines::forecast(member, series.known(), SHORT_HORIZON).unwrap();
            *sum += loss(&rows, ahead);
        }
    }
    let serving = mixture.serving(&volume).unwrap();
    let lost = |member| {
        let of = serving.losses.iter().find(|(m, _)| *m == member);
        of.and_then(|(_, loss)| *loss)
    };
    if second == Second::Wrong {
        // Served alone it would not have passed.
        assert!(
            lost(Member::Network) > lost(Member::Ewma).map(|l| l * WORSE),
            "{serving:?}"
        );
    }
    days
}

fn over(days: &[Losses]) -> Losses {
    days.iter().fold(Losses::default(), |mut sum, day| {
        sum.served += day.served;
        sum.simple
            .iter_mut()
            .zip(day.simple)
            .for_each(|(s, d)| *s += d);
        sum
    })
}

/// Days after which a change is no longer new: what simple forecasts know of a week has been replaced, and
/// the blend has seen who does well now.
const SETTLED: i64 = 14;
/// What is served may lose so much more than the best simple forecast.
const WORSE: f64 = 1.05;
/// A loss that nobody would notice, in bytes per second: a volume at rest is foreseen exactly by some.
const NOTHING: f64 = 100.0;

/// Checks the course as a whole, and what follows each change once it is no longer new, both for the
/// network that ships alone and beside one trained on the first days.
fn check(name: &str, course: &Course, changes: &[i64]) {
    for second in [Second::Nothing, Second::Trained, Second::Wrong] {
        let days = run(course, second);
        let ends = changes.iter().skip(1).copied().chain([DAYS]);
        let spans = changes.iter().map(|from| from + SETTLED).zip(ends);
        for (from, to) in [(2, DAYS)].into_iter().chain(spans) {
            let sum = over(&days[from as usize..to as usize]);
            let nothing =
                NOTHING * ((to - from) * DAY) as f64 * (SHORT_HORIZON * LEVELS.len()) as f64;
            let shown: Vec<String> = Member::SIMPLE
                .into_iter()
                .zip(sum.simple)
                .map(|(m, s)| format!("{m} {:.3}", s / sum.best()))
                .collect();
            let said = format!(
                "{name}, days {from} to {to}, second network {second:?}: served {:.3} of the best \
                 simple forecast; {}",
                sum.served / sum.best(),
                shown.join(", ")
            );
            println!("{said}");
            assert!(sum.served <= sum.best() * WORSE + nothing, "{said}");
        }
    }
}

#[test]
fn a_new_regime() {
    let course = year(1, |s, day, bin| {
        Some(match day {
            ..120 => s.load(bin, MIB, 1.2, 0.5),
            120..240 => s.load(bin, 60.0 * MIB, 1.2, 0.0),
            _ => s.load(bin, 5.0 * MIB, 0.0, 0.0),
        })
    });
    check("regime", &course, &[120, 240]);
}

#[test]
fn a_volume_that_dies_and_comes_back() {
    let course = year(2, |s, day, bin| {
        let load = s.load(bin, 8.0 * MIB, 1.0, 0.4);
        Some(if (100..300).contains(&day) { 0.0 } else { load })
    });
    check("dead", &course, &[100, 300]);
}

#[test]
fn a_volume_that_turns_intermittent() {
    let course = year(3, |s, day, bin| {
        let load = s.load(bin, 8.0 * MIB, 0.8, 0.6);
        Some(if day < 150 || s.rng.random_bool(0.12) {
            load
        } else {
            0.0
        })
    });
    check("intermittent", &course, &[150]);
}

#[test]
fn clocks_put_forward_and_back() {
    let course = year(4, |s, day, bin| {
        // The volume follows its users' clock.
        let shift = if (90..300).contains(&day) { 2 } else { 0 };
        Some(s.load(bin + shift, 4.0 * MIB, 1.5, 0.5))
    });
    check("clock", &course, &[90, 300]);
}

#[test]
fn days_that_are_missing() {
    let course = year(5, |s, day, bin| {
        let load = s.load(bin, 4.0 * MIB, 1.2, 0.5);
        let gone = day % 11 == 7 || (180..195).contains(&day) || s.rng.random_bool(0.02);
        (!gone).then_some(load)
    });
    check("missing", &course, &[180]);
}

#[test]
fn a_level_that_drifts_without_a_clock() {
    let mut level = 0.0f64;
    let course = year(6, |s, _, bin| {
        level = (level + s.rng.random_range(-0.12..0.12f64)).clamp(-3.0, 3.0);
        Some(s.load(bin, 8.0 * MIB * level.exp(), 0.0, 0.0))
    });
    check("drift", &course, &[180]);
}
