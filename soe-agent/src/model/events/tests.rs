use super::*;
use crate::model::burst::BurstRule;
use crate::model::series::{LoadBin, TimeScale};
use crate::model::{QUANTILES, SHORT_HORIZON};
use proptest::prelude::*;
use std::time::Duration;

const S: i64 = 1_000_000_000;

fn scale() -> TimeScale {
    TimeScale::new(Duration::from_secs(1), 48).unwrap()
}

fn deployment(at: i64) -> Happening {
    Happening {
        kind: "deployment".into(),
        subject: None,
        volumes: Vec::new(),
        at: at * S,
    }
}

/// A volume with a steady load, told of events.
struct World {
    series: Series,
    events: Events,
    next: i64,
}

impl World {
    fn new() -> Self {
        Self {
            series: Series::new(scale(), BurstRule::STRICT, 8),
            events: Events::default(),
            next: 0,
        }
    }

    fn bin(&mut self, load: f64) {
        let bin = LoadBin {
            read_bytes: load,
            ..LoadBin::default()
        };
        self.series.push(self.next * S, Some(bin)).unwrap();
        self.events.learn(&self.series);
        self.next += 1;
    }

    /// Bins in which every event triples the load from the third to the sixth bin after it.
    fn run(&mut self, bins: i64, events: &[i64], factor: f64) {
        for _ in 0..bins {
            for at in events.iter().filter(|at| **at == self.next) {
                self.events.take(&deployment(*at), &self.series);
            }
            let high = events.iter().any(|at| (3..7).contains(&(self.next - at)));
            let load = if high { factor * 1e6 } else { 1e6 };
            let flat = [vec![[1e6f32; QUANTILES.len()]; SHORT_HORIZON]].concat();
            let mut rows = flat.clone();
            let moved = self.events.move_rows(self.series.known(), &mut rows);
            self.bin(load);
            self.events.score(&moved, &flat, 0, load as f32);
        }
    }

    fn moved(&self) -> Vec<f32> {
        let mut rows = vec![[1e6f32; QUANTILES.len()]; SHORT_HORIZON];
        self.events.move_rows(self.series.known(), &mut rows);
        rows.iter().map(|row| row[1]).collect()
    }
}

const EVENTS: [i64; 6] = [100, 190, 260, 370, 430, 520];

#[test]
fn what_followed_earlier_events_is_expected_of_an_announced_one() {
    let mut world = World::new();
    world.run(600, &EVENTS, 3.0);
    assert!(world.moved().iter().all(|q50| (*q50 - 1e6).abs() < 1.0));
    // Two bins ahead.
    world.events.take(&deployment(602), &world.series);
    let q50 = world.moved();
    for (lead, q50) in q50.iter().enumerate() {
        let age = lead as i64 - 2;
        if (3..7).contains(&age) {
            assert!((2.3e6..3.2e6).contains(q50), "{age}: {q50}");
        } else if age < 3 {
            assert!((0.9e6..1.1e6).contains(q50), "{age}: {q50}");
        }
    }
    let known = &world.events.known_effects()[0];
    assert!(
        known.believed && (2.3..3.2).contains(&known.factor),
        "{known:?}"
    );
    let mut onsets = vec![0.0; SHORT_HORIZON];
    world.events.raise_onsets(world.series.known(), &mut onsets);
    let any = 1.0 - onsets.iter().map(|p| 1.0 - f64::from(*p)).product::<f64>();
    assert!(any > 0.7, "{onsets:?}");
    assert!(onsets[..5].iter().all(|p| *p < 0.05), "{onsets:?}");
}

#[test]
fn a_kind_without_effect_moves_nothing() {
    let mut world = World::new();
    world.run(600, &EVENTS, 1.0);
    world.events.take(&deployment(602), &world.series);
    assert!(world.moved().iter().all(|q50| (*q50 - 1e6).abs() < 1e4));
}

#[test]
fn an_effect_that_stays_away_is_no_longer_believed() {
    let mut world = World::new();
    world.run(600, &EVENTS, 3.0);
    let later: Vec<i64> = (0..8).map(|k| 650 + 60 * k).collect();
    world.run(600, &later, 1.0);
    world.events.take(&deployment(1202), &world.series);
    assert!(
        world.moved().iter().all(|q50| *q50 < 1.6e6),
        "{:?}",
        world.moved()
    );
}

#[test]
fn the_same_event_told_twice_counts_once_and_a_late_one_not_at_all() {
    let mut world = World::new();
    world.run(60, &[], 1.0);
    world.events.take(&deployment(61), &world.series);
    world.events.take(&deployment(61), &world.series);
    world.events.take(&deployment(20), &world.series);
    assert_eq!(world.events.active.len(), 1);
}

#[test]
fn a_subject_of_its_own_is_told_apart_from_its_kind() {
    let mut world = World::new();
    let of = |subject: &str, at: i64| Happening {
        subject: Some(subject.into()),
        ..deployment(at)
    };
    for k in 0..8 {
        let at = 60 + 60 * k;
        let loud = k % 2 == 0;
        while world.next < at + 50 {
            if world.next == at {
                let subject = if loud { "loud" } else { "still" };
                world.events.take(&of(subject, at), &world.series);
            }
            let high = loud && (1..5).contains(&(world.next - at));
            let load = if high { 5e6 } else { 1e6 };
            let flat = vec![[1e6f32; QUANTILES.len()]; SHORT_HORIZON];
            let mut rows = flat.clone();
            let moved = world.events.move_rows(world.series.known(), &mut rows);
            world.bin(load);
            world.events.score(&moved, &flat, 0, load as f32);
        }
    }
    let mut still = World {
        series: world.series.clone(),
        events: world.events.clone(),
        next: world.next,
    };
    world.events.take(&of("loud", world.next), &world.series);
    still.events.take(&of("still", still.next), &still.series);
    assert!(world.moved()[2] > 3e6, "{:?}", world.moved());
    assert!(still.moved()[2] < 1.3e6, "{:?}", still.moved());
}

proptest! {
    #[test]
    fn any_flood_of_events_keeps_forecasts_sound(
        steps in proptest::collection::vec(
            (0u8..6, proptest::option::of(0u8..90), -40i64..400, 0.0f64..1e12), 1..300),
    ) {
        let mut world = World::new();
        for (kind, subject, ahead, load) in steps {
            let event = Happening {
                kind: format!("k{kind}"),
                subject: subject.map(|s| format!("s{s}")),
                volumes: Vec::new(),
                at: (world.next + ahead) * S,
            };
            world.events.take(&event, &world.series);
            world.bin(load);
            prop_assert!(world.events.active.len() <= MOST_ACTIVE);
            prop_assert!(world.events.effects.len() <= MOST_KINDS);
            let mut rows = vec![[1e3, 1e4, 1e5, 1e6, 1e7, 1e8]; 30];
            let flat = rows.clone();
            let moved = world.events.move_rows(world.series.known(), &mut rows);
            world.events.score(&moved, &flat, 0, load as f32);
            for row in rows {
                prop_assert!(row.iter().all(|v| v.is_finite() && *v >= 0.0));
                prop_assert!(row.windows(2).all(|w| w[0] <= w[1]), "{:?}", row);
            }
            let mut onsets = vec![0.1f32; 30];
            world.events.raise_onsets(world.series.known(), &mut onsets);
            prop_assert!(onsets.iter().all(|p| (0.0..=1.0).contains(p)));
        }
    }
}
