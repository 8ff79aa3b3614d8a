//! What volumes share: disks, and the budget of staging; and staging that does not pay.

use super::*;

fn critical(name: &str, volume: &str, criticality: Criticality) -> GroupSpec {
    GroupSpec {
        criticality,
        ..spec(name, &[volume], true, 1_000)
    }
}

fn place(world: &mut World, volume: &str, disk: &str) {
    world.apply(Event::VolumePlaced {
        volume: volume.into(),
        disks: vec![disk.into()],
    });
}

fn announce(world: &mut World, at: i64) {
    world.apply(Event::EventReceived(ExternalEvent {
        id: at.to_string(),
        kind: "k".into(),
        subject: None,
        at: 0,
        volumes: Vec::new(),
        burst_expected_at: Some(at * S),
    }));
}

fn started(commands: &[Command]) -> Vec<String> {
    let started = |command: &Command| match command {
        Command::StartCapture { group, .. } => Some(group.to_string()),
        _ => None,
    };
    commands.iter().filter_map(started).collect()
}

#[test]
fn the_budget_of_staging_is_shared_by_criticality() {
    let mut world = World::new(&[
        critical("first", "a", Criticality::Low),
        critical("second", "b", Criticality::High),
        GroupSpec {
            prediction_enabled: false,
            ..critical("third", "c", Criticality::Critical)
        },
    ]);
    announce(&mut world, 500);
    world.now = 495 * S;
    let commands = world.apply(Event::Tick);
    let mut budgets: Vec<(VolumeName, u64)> = commands
        .iter()
        .filter_map(|c| match c {
            Command::StartStaging {
                volume,
                budget_bytes,
                ..
            } => Some((volume.clone(), *budget_bytes)),
            _ => None,
        })
        .collect();
    budgets.sort();
    let all = config().staging.budget_bytes;
    assert_eq!(budgets, [("a".into(), all / 5), ("b".into(), all * 4 / 5)]);
}

#[test]
fn volumes_of_one_disk_are_captured_one_after_the_other_the_critical_one_first() {
    let mut world = World::new(&[
        critical("first", "a", Criticality::Low),
        critical("second", "b", Criticality::High),
        critical("third", "c", Criticality::Normal),
    ]);
    place(&mut world, "a", "sda");
    place(&mut world, "b", "sda");
    place(&mut world, "c", "sdb");
    world.now = S;
    // No forecasts yet: first baselines begin at once where nothing is in the way.
    let commands = world.apply(Event::Tick);
    assert_eq!(started(&commands), ["second", "third"]);
    let waits = |c: &Command| {
        matches!(c, Command::RecordDecision(d)
        if d.volume.as_str() == "a" && d.reason.contains("b on the same disk is being captured for group second"))
    };
    assert!(commands.iter().any(waits), "{commands:?}");
    world.now = 2 * S;
    assert!(started(&world.apply(Event::Tick)).is_empty());
    world.finish_all();
    world.now = 3 * S;
    assert_eq!(started(&world.apply(Event::Tick)), ["first"]);
    // A neighbour that hangs does not cost the recovery point.
    world.finish_all();
    world.apply(Event::CaptureRequested {
        group: "second".into(),
        kind: None,
    });
    let mut at = None;
    for second in 4..1_100 {
        world.now = second * S;
        if started(&world.apply(Event::Tick)) == ["first"] {
            at = Some(second);
            break;
        }
    }
    assert!(at.is_some_and(|at| (900..1_003).contains(&at)), "{at:?}");
}

#[test]
fn a_disk_that_is_forgotten_is_nobodys_any_more() {
    let mut world = World::new(&[]);
    place(&mut world, "a", "sda");
    place(&mut world, "b", "sda");
    let of = |world: &World, name: &str| -> Vec<VolumeName> {
        let all = world.brain.neighbours(&[name.into()]);
        all.into_iter().cloned().collect()
    };
    assert_eq!(of(&world, "a"), ["b".into()]);
    place(&mut world, "b", "sdb");
    assert!(of(&world, "a").is_empty());
    place(&mut world, "b", "sda");
    world.apply(Event::VolumeGone { volume: "b".into() });
    assert!(of(&world, "a").is_empty());
}

/// The load of a neighbour counts: the window is where both are quiet.
#[test]
fn a_neighbours_load_moves_the_window() {
    let met_in_busy = |shared: bool| {
        let mut world = World::new(&[spec("g", &["a"], true, 300)]);
        if shared {
            place(&mut world, "a", "sda");
            place(&mut world, "b", "sda");
        }
        let mut begun = Vec::new();
        for i in 0..24 * 9 {
            let start = i * BIN;
            world.now = (start + BIN) * S;
            // "a" is as busy always; "b" is busy for the first third of every season.
            world.bin("a", start, 3e5 + (i % 5) as f64 * 1e3);
            world.bin("b", start, if i % 24 < 8 { 2e7 } else { 1e4 });
            for tick in 0..5 {
                world.now = (start + BIN + tick * 2) * S;
                world.apply(Event::Tick);
                // What was judged begins within the answer.
                if !world.running.is_empty() && i > 24 * 4 {
                    begun.push((i + 1) % 24);
                }
                world.finish_all();
            }
        }
        let busy = begun.iter().filter(|bin| **bin < 8).count();
        (busy, begun.len())
    };
    let ((met, of), (spared, among)) = (met_in_busy(false), met_in_busy(true));
    assert!(of > 3 && among > 3 && met > 0, "{met} of {of}, {among}");
    assert_eq!(spared, 0, "of {among}");
}

#[test]
fn staging_that_is_never_read_is_switched_off_watched_and_taken_up_again() {
    let mut world = World::new(&[spec("g", &["a"], true, 10_000)]);
    let mut used = 0;
    let mut copies = Vec::new();
    for burst in 1..30 {
        if burst == 12 {
            // From now on what is chosen is read.
            used = 900;
        }
        announce(&mut world, burst * 500);
        let end = burst * 500 + 200;
        for second in (burst * 500 - 100)..end {
            world.now = second * S;
            for command in world.apply(Event::Tick) {
                match command {
                    Command::StartStaging { copy, .. } => {
                        copies.push(copy);
                        let outcome = Ok(1_000);
                        if copy {
                            let volume = "a".into();
                            world.apply(Event::StagingFinished { volume, outcome });
                        }
                    }
                    Command::JudgeStaging { volume } => {
                        let chosen = 1_000;
                        world.apply(Event::StagingJudged {
                            volume,
                            chosen,
                            used,
                        });
                    }
                    _ => {}
                }
            }
        }
    }
    assert_eq!(copies.len(), 29, "every burst is chosen for");
    assert!(copies[..3].iter().all(|c| *c), "{copies:?}");
    assert!(copies[4..11].iter().all(|c| !*c), "{copies:?}");
    assert!(copies[14..].iter().all(|c| *c), "{copies:?}");
    let told = |word: &str| {
        let has = |c: &&Command| matches!(c, Command::RecordDecision(d) if d.reason.contains(word));
        world.log.iter().filter(has).count()
    };
    assert_eq!(told("is switched off for this volume"), 1);
    assert_eq!(told("is switched on again"), 1);
}
