use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::model::mixture::{Mixture, MixtureConfig};
use crate::model::{Forecaster, LoadBin, TimeScale};
use crate::plan::types::{Action, Criticality, Decision, ExternalEvent};

mod sharing;

const S: i64 = 1_000_000_000;
const BIN: i64 = 10;

fn config() -> PlannerConfig {
    let scale = TimeScale::new(Duration::from_secs(BIN as u64), 24).unwrap();
    let mut config = PlannerConfig::new(scale);
    config.staging.budget_bytes = 1 << 20;
    config
}

fn spec(name: &str, volumes: &[&str], prediction: bool, rpo: u64) -> GroupSpec {
    GroupSpec {
        name: name.into(),
        volumes: volumes.iter().map(|v| (*v).into()).collect(),
        prediction_enabled: prediction,
        rpo: Duration::from_secs(rpo),
        max_pause: Duration::from_millis(100),
        p99_target: None,
        app: None,
        criticality: Criticality::Normal,
    }
}

/// A brain with the real forecaster, and captures that end when the test says so.
struct World {
    brain: Brain,
    forecaster: Mixture,
    now: UnixNanos,
    running: Vec<GroupName>,
    log: Vec<Command>,
}

impl World {
    fn new(groups: &[GroupSpec]) -> Self {
        let mut world = Self {
            brain: Brain::new(config()),
            forecaster: Mixture::new(MixtureConfig::new(config().scale)),
            now: 0,
            running: Vec::new(),
            log: Vec::new(),
        };
        for spec in groups {
            world.apply(Event::GroupCreated {
                spec: spec.clone(),
                last_capture: None,
                last_baseline: None,
            });
        }
        world
    }

    fn apply(&mut self, event: Event) -> Vec<Command> {
        let commands = self.brain.apply(event, self.now);
        assert_recorded(&commands, self.now);
        for command in &commands {
            match command {
                Command::Forecast { volume, horizon } => {
                    if let Some(forecast) = self.forecaster.forecast(volume, *horizon) {
                        let forecast = forecast.into();
                        let volume = volume.clone();
                        self.apply(Event::ForecastReady { volume, forecast });
                    }
                }
                Command::Judge {
                    group,
                    volumes,
                    neighbours,
                    pace,
                } => {
                    let begin = self.forecaster.begin(volumes, neighbours, *pace);
                    let group = group.clone();
                    self.apply(Event::Judged { group, begin });
                }
                Command::StartCapture { group, .. } => {
                    assert!(!self.running.contains(group), "{group} twice at once");
                    self.running.push(group.clone());
                }
                _ => {}
            }
        }
        self.log.extend(commands.iter().cloned());
        commands
    }

    fn bin(&mut self, volume: &str, start: i64, load: f64) -> Vec<Command> {
        let volume: VolumeName = volume.into();
        let load = Some(LoadBin {
            write_bytes: load * BIN as f64,
            ..LoadBin::default()
        });
        self.forecaster.observe(&volume, start * S, load).unwrap();
        self.apply(Event::WindowClosed {
            volume,
            start: start * S,
            load,
        })
    }

    fn finish_all(&mut self) {
        for group in std::mem::take(&mut self.running) {
            let kind = self.kind_of_last(&group);
            let cut_at = self.now;
            self.apply(Event::CaptureFinished {
                group,
                kind,
                cut_at,
            });
        }
    }

    fn kind_of_last(&self, name: &GroupName) -> CaptureKind {
        self.log
            .iter()
            .rev()
            .find_map(|c| match c {
                Command::StartCapture { group, kind, .. } if group == name => Some(*kind),
                _ => None,
            })
            .unwrap()
    }
}

/// Every command that does something stands beside a decision with the same reason.
fn assert_recorded(commands: &[Command], now: UnixNanos) {
    let recorded = |action: Action, reason: &str| {
        commands.iter().any(|c| {
            matches!(c, Command::RecordDecision(Decision { at, action: a, reason: r, .. })
                if *a == action && r == reason && *at == now && !r.is_empty())
        })
    };
    for command in commands {
        match command {
            Command::StartCapture { reason, .. } => assert!(recorded(Action::Capture, reason)),
            Command::StartStaging { reason, copy, .. } => {
                let action = if *copy { Action::Stage } else { Action::Wait };
                assert!(recorded(action, reason));
            }
            Command::CancelStaging { reason, .. } => assert!(recorded(Action::Wait, reason)),
            Command::Train { reason } | Command::RefuseCapture { reason, .. } => {
                assert!(!reason.is_empty());
            }
            Command::Forecast { .. }
            | Command::Judge { .. }
            | Command::JudgeStaging { .. }
            | Command::RecordDecision(_) => {}
        }
    }
}

/// A load per bin: quiet with noise, and bursts of some bins.
fn loads(bins: usize) -> impl Strategy<Value = Vec<f64>> {
    proptest::collection::vec((0.0f64..1.0, 0u32..12), bins).prop_map(|steps| {
        let mut burst = 0;
        steps
            .into_iter()
            .map(|(noise, start)| {
                if burst == 0 && start == 0 {
                    burst = 3;
                }
                if burst > 0 {
                    burst -= 1;
                    5e7 * (1.0 + noise)
                } else {
                    3e5 * (1.0 + noise)
                }
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_rpo_is_always_met_when_captures_succeed_at_once(
        a in loads(150), b in loads(150), rpo in 20u64..2_000, prediction in any::<bool>(),
    ) {
        let mut world = World::new(&[spec("g", &["a", "b"], prediction, rpo)]);
        let mut last = 0;
        for (i, (a, b)) in a.iter().zip(&b).enumerate() {
            let start = i as i64 * BIN;
            world.now = (start + BIN) * S;
            world.bin("a", start, *a);
            world.bin("b", start, *b);
            for tick in 0..5 {
                world.now = (start + BIN + tick * 2) * S;
                world.apply(Event::Tick);
                let age = world.now - last;
                prop_assert!(age <= rpo as i64 * S, "age {} s", age / S);
                if !world.running.is_empty() {
                    last = world.now;
                    world.finish_all();
                }
            }
        }
        prop_assert!(last > 0);
    }

    #[test]
    fn in_an_observed_burst_only_the_rpo_captures(
        a in loads(200), rpo in 60u64..2_000,
    ) {
        let mut world = World::new(&[spec("g", &["a"], true, rpo)]);
        let mut detector = BurstDetector::new(config().scale, config().burst);
        for (i, load) in a.iter().enumerate() {
            let start = i as i64 * BIN;
            world.now = (start + BIN) * S;
            world.bin("a", start, *load);
            detector.push(Some(*load));
            let in_burst = *load > detector.threshold();
            for tick in 0..5 {
                world.now = (start + BIN + tick * 2) * S;
                for command in world.apply(Event::Tick) {
                    if let Command::StartCapture { hints, reason, .. } = command {
                        prop_assert!(!in_burst || hints.urgent, "{reason}");
                        prop_assert!(!in_burst || reason.contains("RPO"), "{reason}");
                    }
                }
                world.finish_all();
            }
        }
    }

    #[test]
    fn no_volume_is_captured_twice_at_once_whatever_happens(
        steps in proptest::collection::vec((0u8..9, any::<u8>()), 1..250),
    ) {
        let specs = [
            spec("g", &["a", "b"], true, 60),
            spec("h", &["b", "c"], true, 40),
            spec("i", &["d"], false, 30),
        ];
        let mut world = World::new(&specs);
        let mut start = 0;
        for (step, pick) in steps {
            world.now += S;
            let group: GroupName = ["g", "h", "i"][usize::from(pick) % 3].into();
            let volume = ["a", "b", "c", "d"][usize::from(pick) % 4];
            match step {
                0..=2 => { world.apply(Event::Tick); }
                3 => {
                    start += BIN;
                    world.now = world.now.max((start + BIN) * S);
                    for v in ["a", "b", "c", "d"] {
                        world.bin(v, start, f64::from(pick) * 1e5);
                    }
                }
                4 => if let Some(group) = world.running.pop() {
                    let kind = world.kind_of_last(&group);
                    let cut_at = world.now + i64::from(pick) * S;
                    world.apply(Event::CaptureFinished { group, kind, cut_at });
                }
                5 => if let Some(group) = world.running.pop() {
                    world.apply(Event::CaptureFailed { group, reason: "store full".into() });
                }
                6 => { world.apply(Event::CaptureRequested { group, kind: None }); }
                7 => { world.apply(Event::LoadSampled {
                    volume: volume.into(),
                    bytes_per_second: if pick == 0 { f64::NAN } else { f64::from(pick) * 1e6 },
                }); }
                _ => match pick % 4 {
                    0 => { world.apply(Event::GroupDeleted { group }); }
                    1 => { world.apply(Event::VolumeGone { volume: volume.into() }); }
                    2 => { world.apply(Event::GroupUpdated { spec: specs[usize::from(pick) % 3].clone() }); }
                    _ => { world.apply(Event::GroupCreated {
                        spec: specs[usize::from(pick) % 3].clone(),
                        last_capture: Some(world.now + S),
                        last_baseline: None,
                    }); }
                },
            }
            let volumes: Vec<&VolumeName> = world
                .running
                .iter()
                .flat_map(|g| &specs.iter().find(|s| s.name == *g).unwrap().volumes)
                .collect();
            for (i, v) in volumes.iter().enumerate() {
                prop_assert!(!volumes[..i].contains(v), "{v} twice in {:?}", world.running);
            }
        }
    }
}

#[test]
fn after_a_failure_the_next_try_waits_longer_each_time() {
    let mut world = World::new(&[spec("g", &["a"], false, 10_000)]);
    let mut tries = Vec::new();
    for second in 0..4_000 {
        world.now = second * S;
        for command in world.apply(Event::Tick) {
            if let Command::StartCapture { group, .. } = command {
                tries.push(second);
                let reason = "store full".to_owned();
                world.running.clear();
                world.apply(Event::CaptureFailed { group, reason });
            }
        }
    }
    let gaps: Vec<i64> = tries.windows(2).map(|w| w[1] - w[0]).collect();
    assert!(gaps.windows(2).all(|w| w[0] <= w[1]), "{gaps:?}");
    assert!(gaps[0] <= 10 && *gaps.last().unwrap() >= 600, "{gaps:?}");
    assert!(
        *gaps.last().unwrap() <= 1_250,
        "never beyond an eighth of the RPO"
    );
}

#[test]
fn a_rhythm_is_staged_for_ahead_of_its_burst_and_copying_stops_when_it_begins() {
    let mut world = World::new(&[spec("g", &["a"], true, 100)]);
    let period = 20;
    let mut ahead = 0;
    let bursts = 30;
    for i in 0..period * bursts {
        let burst = i % period < 2;
        let load = if burst {
            5e7
        } else {
            3e5 + (i % 7) as f64 * 1e3
        };
        let start = i * BIN;
        world.now = (start + BIN) * S;
        let before = world.log.len();
        world.bin("a", start, load);
        for tick in 0..5 {
            world.now = (start + BIN + tick * 2) * S;
            world.apply(Event::Tick);
            world.finish_all();
        }
        let commands = world.log[before..].to_vec();
        if i > period * 10 {
            for command in &commands {
                if let Command::StartStaging { before, .. } = command {
                    let due = (i / period + 1) * period * BIN * S;
                    assert!(
                        (before - due).abs() <= 2 * BIN * S,
                        "for {before}, due {due}"
                    );
                    ahead += 1;
                }
            }
            if i % period == 0 {
                let cancelled = commands
                    .iter()
                    .any(|c| matches!(c, Command::CancelStaging { .. }));
                assert!(cancelled, "the burst has begun");
            }
        }
        if commands
            .iter()
            .any(|c| matches!(c, Command::StartStaging { .. }))
        {
            let predicted = world.brain.predicted(&"a".into(), world.now).unwrap();
            assert!(predicted.next_burst_at.is_some() || burst);
        }
    }
    assert!(ahead >= bursts - 12, "staged ahead of {ahead} bursts");
}

#[test]
fn an_announced_burst_is_staged_for() {
    let mut world = World::new(&[spec("g", &["a"], true, 1_000)]);
    world.bin("a", -BIN, 1e5);
    world.apply(Event::EventReceived(ExternalEvent {
        id: "1".into(),
        kind: "com.example.deployment".into(),
        subject: None,
        at: 0,
        volumes: vec!["a".into()],
        burst_expected_at: Some(100 * S),
    }));
    let mut staged_at = None;
    for second in 0..100 {
        world.now = second * S;
        for command in world.apply(Event::Tick) {
            if let Command::StartStaging { before, .. } = command {
                assert_eq!(before, 100 * S);
                staged_at = Some(second);
            }
        }
    }
    assert_eq!(staged_at, Some(90), "one bin and the time to copy ahead");
}

#[test]
fn a_failed_staging_is_tried_again_later_and_told() {
    let mut world = World::new(&[spec("g", &["a"], true, 1_000)]);
    world.apply(Event::EventReceived(ExternalEvent {
        id: "1".into(),
        kind: "k".into(),
        subject: None,
        at: 0,
        volumes: Vec::new(),
        burst_expected_at: Some(500 * S),
    }));
    world.now = 495 * S;
    assert!(matches!(
        world.apply(Event::Tick).last(),
        Some(Command::StartStaging { .. })
    ));
    let told = world.apply(Event::StagingFinished {
        volume: "a".into(),
        outcome: Err("staging area full".into()),
    });
    assert!(matches!(&told[..], [Command::RecordDecision(d)] if d.reason.contains("full")));
    world.now = 496 * S;
    let again = world.apply(Event::Tick);
    assert!(
        !again
            .iter()
            .any(|c| matches!(c, Command::StartStaging { .. }))
    );
}

#[test]
fn a_requested_capture_of_a_busy_or_unknown_group_is_refused_in_words() {
    let mut world = World::new(&[spec("g", &["a"], true, 1_000)]);
    let request = |group: &str| Event::CaptureRequested {
        group: group.into(),
        kind: Some(CaptureKind::Baseline),
    };
    assert!(matches!(
        world.apply(request("g")).last(),
        Some(Command::StartCapture {
            kind: CaptureKind::Baseline,
            ..
        })
    ));
    let refusal = world.apply(request("g"));
    assert!(
        matches!(&refusal[..], [Command::RefuseCapture { reason, .. }] if reason.contains("already"))
    );
    let refusal = world.apply(request("nobody"));
    assert!(
        matches!(&refusal[..], [Command::RefuseCapture { reason, .. }] if reason.contains("no group"))
    );
}

#[test]
fn a_clock_that_goes_back_by_a_year_does_not_silence_the_planner() {
    let mut world = World::new(&[spec("g", &["a"], true, 100)]);
    let year = 365 * 86_400;
    let mut captured = 0;
    for second in 0..600 {
        world.now = (if second < 300 { year } else { 0 } + second) * S;
        world.apply(Event::Tick);
        if second >= 300 {
            captured += world.running.len();
        }
        world.finish_all();
    }
    assert!(
        captured >= 3,
        "{captured} captures in three RPOs after the step"
    );
}

#[test]
fn waiting_is_recorded_once_and_not_every_tick() {
    let mut world = World::new(&[spec("g", &["a"], true, 1_000)]);
    world.bin("a", -BIN, 1e5);
    world.apply(Event::Tick);
    world.finish_all();
    world.log.clear();
    for second in 1..300 {
        world.now = second * S;
        world.apply(Event::Tick);
    }
    let waits = world
        .log
        .iter()
        .filter(|c| matches!(c, Command::RecordDecision(d) if d.action == Action::Wait))
        .count();
    assert!((1..=3).contains(&waits), "{waits} rows");
}

#[test]
fn training_is_asked_for_once_enough_is_known_and_not_while_one_runs() {
    let mut world = World::new(&[]);
    let mut asked = Vec::new();
    for i in 0..24 * 5 {
        world.now = (i + 1) * BIN * S;
        world.bin("a", i * BIN, 1e5);
        for command in world.apply(Event::Tick) {
            if let Command::Train { .. } = command {
                asked.push(i);
                if asked.len() == 2 {
                    world.apply(Event::TrainingFinished {
                        outcome: Err("cancelled".into()),
                    });
                }
            }
        }
        if i == 60 {
            world.apply(Event::TrainingFinished {
                outcome: Ok("better".into()),
            });
        }
    }
    assert_eq!(asked, [47, 84, 108]);
}
