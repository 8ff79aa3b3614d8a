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

/// Whether staging of `volume` was started.
fn stages(commands: &[Command], volume: &str) -> bool {
    let started =
        |c: &Command| matches!(c, Command::StartStaging { volume: v, .. } if v.as_str() == volume);
    commands.iter().any(started)
}

#[test]
fn a_disk_is_not_captured_and_staged_at_once_unless_the_deadline_presses() {
    let mut world = World::new(&[
        critical("first", "a", Criticality::Normal),
        GroupSpec {
            rpo: Duration::from_secs(100_000),
            ..critical("second", "b", Criticality::Normal)
        },
    ]);
    place(&mut world, "a", "sda");
    place(&mut world, "b", "sda");
    announce(&mut world, 100);
    world.now = S;
    // Both first baselines are under way when it would be time to stage.
    assert_eq!(started(&world.apply(Event::Tick)).len(), 2);
    world.now = 95 * S;
    assert!(!stages(&world.apply(Event::Tick), "a"));
    world.finish_all();
    world.now = 96 * S;
    let commands = world.apply(Event::Tick);
    assert!(stages(&commands, "a") && stages(&commands, "b"));
    let volume = "a".into();
    world.apply(Event::StagingFinished {
        volume,
        outcome: Ok(1),
    });
    // "b" goes on being staged: "a" waits for it, but not beyond its deadline.
    let mut at = None;
    for second in 97..1_200 {
        world.now = second * S;
        if started(&world.apply(Event::Tick)).contains(&"first".to_owned()) {
            at = Some(second);
            break;
        }
    }
    let base = 95;
    assert!(
        at.is_some_and(|at| (base + 850..=base + 1_000).contains(&at)),
        "{at:?}"
    );
    let waits = |c: &Command| {
        matches!(c, Command::RecordDecision(d)
        if d.volume.as_str() == "a" && d.reason.contains("b on the same disk is being staged"))
    };
    assert!(world.log.iter().any(waits));
}

#[test]
fn of_many_volumes_on_a_disk_the_busiest_count() {
    let mut world = World::new(&[]);
    for i in 0..100 {
        let name = format!("v{i:03}");
        place(&mut world, &name, "sda");
        for bin in 0..30 {
            world.bin(&name, bin * BIN, 1e5 * f64::from(i));
        }
    }
    world.now = 300 * S;
    world.apply(Event::Tick);
    let own = ["v050".into()];
    let neighbours = world.brain.neighbours(&own);
    assert_eq!(neighbours.len(), MOST_NEIGHBOURS);
    assert!(
        neighbours.iter().all(|name| name.as_str() > "v080"),
        "{neighbours:?}"
    );
}

#[test]
fn a_disk_that_is_forgotten_is_nobodys_any_more() {
    let mut world = World::new(&[]);
    place(&mut world, "a", "sda");
    place(&mut world, "b", "sda");
    let of = |world: &mut World, name: &str| -> Vec<VolumeName> {
        world.apply(Event::Tick);
        let all = world.brain.neighbours(&[name.into()]);
        all.into_iter().cloned().collect()
    };
    assert_eq!(of(&mut world, "a"), ["b".into()]);
    place(&mut world, "b", "sdb");
    assert!(of(&mut world, "a").is_empty());
    place(&mut world, "b", "sda");
    world.apply(Event::VolumeGone { volume: "b".into() });
    assert!(of(&mut world, "a").is_empty());
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
