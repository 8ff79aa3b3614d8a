//! Captures under fire, on this machine's kernel: the tracker, the readers, the capture, the freeze
//! guard and the layer store as the service uses them, while writers do what they can to get a block
//! forgotten. Every layer of every volume is held against the history of what was written.
//!
//! `SOE_TORTURE_CAPTURES` asks for more than the few hundred of an ordinary run, `SOE_TORTURE_SEED`
//! replays the random choices of a run (the kernel's timing is its own).

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use soe_agent::capture::{CapturePolicy, FreezeGuard, Level, Method, guard_main};
use soe_tests::device::{self, LoopDevice, Mounted, open_direct};
use soe_tests::torture::books::{Books, areas, complain, device_target, number, raw, seed};
use soe_tests::torture::devices::{Partitioned, PlacedFile, SlowDisk, Zram};
use soe_tests::torture::history::SECTOR;
use soe_tests::torture::hunt::Hunt;
use soe_tests::torture::lies::Lie;
use soe_tests::torture::load::{EndOnDrop, Gate, Habit, Rhythm, Target, depend, scribble};
use soe_tests::torture::oracle::Wrong;
use soe_tests::torture::rig::{Ask, Rig, Volume};

macro_rules! need_kernel {
    () => {
        if let Some(why) = device::unable() {
            println!("SKIPPED: {why}");
            return;
        }
    };
}

const MIB: u64 = 1 << 20;
const GUARD: &str = "SOE_TORTURE_GUARD";

/// Not a test: the guard's process when the environment says so.
#[test]
fn guard_process() {
    if std::env::var_os(GUARD).is_some() {
        let clean = guard_main() == ExitCode::SUCCESS;
        std::process::exit(i32::from(!clean));
    }
}

fn guard() -> FreezeGuard {
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    command
        .args([
            "guard_process",
            "--exact",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(GUARD, "1");
    FreezeGuard::spawn(command, None).expect("a guard")
}

#[test]
fn every_layer_of_a_group_is_the_devices_at_one_instant() {
    need_kernel!();
    const NAME: &str = "group";
    const BYTES: u64 = 16 * MIB;
    const STAMPED: u64 = 14 * MIB;
    let seed = seed(NAME);
    let mut rng = SmallRng::seed_from_u64(seed);
    let disks = [
        LoopDevice::new(BYTES).unwrap(),
        LoopDevice::new(BYTES).unwrap(),
    ];
    let parts = Partitioned::new(BYTES).unwrap();
    let zram = Zram::new(BYTES);
    let mut paths: Vec<(&Path, u64)> = disks.iter().map(|disk| (&*disk.path, 1)).collect();
    paths.push((&parts.parts[1], 1));
    match &zram {
        Some(zram) => paths.push((&zram.path, 8)),
        None => println!("no zram in this kernel: one volume fewer"),
    }
    let volumes = paths.iter().map(|(path, _)| raw(path, STAMPED)).collect();
    let mut rig = Rig::new(NAME, volumes, Lie::None);
    let history = rig.history.clone();
    let targets: Vec<Target> = paths
        .iter()
        .enumerate()
        .map(|(number, (path, align))| device_target(number, path, *align))
        .collect();
    // The other partition of the same disk: its writes must neither disturb nor be forgotten as a
    // reason why the disk is not quiet. Its operations are logged under a number of no volume.
    let noise = device_target(usize::MAX, &parts.parts[0], 1);
    let gate = Gate::default();
    let links = AtomicU64::new(0);
    let mut books = Books::default();
    let wanted = number("SOE_TORTURE_CAPTURES").unwrap_or(60);
    let big = Habit {
        sectors: 8..512,
        zero_every: 8,
        think_us: 0..300,
    };
    let small = Habit {
        sectors: 1..17,
        zero_every: 12,
        think_us: 50..400,
    };
    let stamped = areas(STAMPED / SECTOR as u64, 4);
    let rhythm = Rhythm {
        open: 2..20,
        gap: 4..20,
        long_every: 5,
        long: 60..110,
    };
    std::thread::scope(|scope| {
        let _end = EndOnDrop(&gate);
        for target in &targets {
            let seed = seed ^ (target.volume as u64 + 1) << 8;
            let (one, two) = (stamped[0].clone(), stamped[1].clone());
            let (history, gate, big, small) = (&*history, &gate, &big, &small);
            scope.spawn(move || scribble(target, one, big, history, gate, seed));
            scope.spawn(move || scribble(target, two, small, history, gate, seed + 1));
        }
        for chain in [2, 3] {
            let area = stamped[chain].clone();
            let targets: Vec<&Target> = targets.iter().collect();
            let (history, gate, links) = (&*history, &gate, &links);
            let seed = seed ^ chain as u64;
            scope.spawn(move || depend(&targets, area, history, gate, links, seed));
        }
        scope.spawn(|| {
            let area = 0..BYTES / SECTOR as u64;
            scribble(&noise, area, &small, &history, &gate, seed ^ 77);
        });
        scope.spawn(|| gate.beat(&rhythm, seed ^ 99));

        let deadline = Instant::now() + Duration::from_secs(60 + wanted * 6);
        while u64::from(books.layers) < wanted {
            assert!(
                Instant::now() < deadline,
                "only {} cuts in time; failed {:?}; {}",
                books.layers,
                books.failed,
                rig.readings()
            );
            history.forget(usize::MAX, u64::MAX);
            if rng.random_range(0..12) == 0 {
                let upgrade = rng.random_range(0..4) == 0;
                rig.restart(Duration::from_millis(rng.random_range(0..60)), upgrade);
                *(if upgrade {
                    &mut books.upgrades
                } else {
                    &mut books.restarts
                }) += 1;
            }
            if rng.random_range(0..40) == 0 {
                rig.end_generation(rng.random_range(0..paths.len()));
            }
            let ask = Ask {
                baseline: rng.random_range(0..20) == 0,
                policy: CapturePolicy {
                    optimistic_residual: [64 << 10, 1 << 20, 4 << 20][rng.random_range(0..3)],
                    ..CapturePolicy::default()
                },
                fail_after: (rng.random_range(0..10) == 0).then(|| rng.random_range(0..200)),
                cancel_after: (rng.random_range(0..10) == 0).then(|| rng.random_range(0..60)),
                guard: None,
                settled_failures: 0,
            };
            assert_eq!(rig.audit(), [""; 0]);
            match rig.capture(&ask) {
                Ok(layer) => {
                    books.take(&layer);
                    complain(&format!("layer {}", books.layers), &layer.violations);
                }
                Err(error) => books.fail(&rig, &error),
            }
            if u64::from(books.layers) == wanted / 2 && books.layers > 0 {
                fio_area_survives(&mut rig, &disks[0], STAMPED, BYTES - STAMPED, &mut books);
            }
        }
    });
    // At rest the image is the device, to the last byte, and the books balance.
    let layer = rig.capture(&Ask::default()).expect("a cut at rest");
    complain("the last layer", &layer.violations);
    assert!(
        layer.images == rig.devices(),
        "the image of a device at rest is not the device"
    );
    assert_eq!(rig.audit(), [""; 0]);
    books.print(NAME, history.issued(), links.load(Ordering::Relaxed));
    for kind in ["Baseline", "Differential"] {
        assert!(books.by_kind.contains_key(kind), "no layer was a {kind}");
    }
}

/// fio fills the rest of a volume; a layer cut while the stamped writers go on passes fio's own check.
fn fio_area_survives(rig: &mut Rig, disk: &LoopDevice, offset: u64, bytes: u64, books: &mut Books) {
    let fio = |file: &str, mode: &str| {
        device::run(
            "fio",
            &[
                "--name=verified",
                &format!("--filename={file}"),
                &format!("--offset={offset}"),
                &format!("--size={bytes}"),
                "--rw=randwrite",
                "--bs=4k",
                "--direct=1",
                "--ioengine=psync",
                "--verify=crc32c",
                "--randseed=11",
                "--verify_state_save=0",
                mode,
            ],
        )
    };
    if device::run("fio", &["--version"]).is_err() {
        println!("fio is not installed: its part is left out");
        return;
    }
    fio(disk.node(), "--do_verify=0").expect("fio writes");
    for _ in 0..20 {
        match rig.capture(&Ask::default()) {
            Ok(layer) => {
                books.take(&layer);
                complain("the layer with fio's area", &layer.violations);
                let mut image = tempfile::NamedTempFile::new().expect("a file");
                image.write_all(&layer.images[0]).expect("written");
                fio(
                    image.path().to_str().expect("a plain path"),
                    "--verify_only=1",
                )
                .expect("fio finds in the layer what it wrote");
                // The same check does notice a block that is not there.
                let hole = vec![0; 4096];
                let file = image.as_file();
                file.write_all_at(&hole, offset + bytes / 2)
                    .expect("written");
                assert!(fio(image.path().to_str().expect("plain"), "--verify_only=1").is_err());
                return;
            }
            Err(error) => books.fail(rig, &error),
        }
    }
    panic!("no cut in 20 captures");
}

#[test]
fn frozen_filesystems_are_captured_at_one_instant() {
    need_kernel!();
    const NAME: &str = "frozen";
    const STAMPED: u64 = 8 * MIB;
    let seed = seed(NAME);
    let mut rng = SmallRng::seed_from_u64(seed);
    let disks = [
        LoopDevice::new(32 * MIB).unwrap(),
        LoopDevice::new(32 * MIB).unwrap(),
    ];
    let mounts = [
        Mounted::new(&disks[0].path, "ext4").unwrap(),
        Mounted::new(&disks[1].path, "ext4").unwrap(),
    ];
    let guard = guard();
    let mut targets = Vec::new();
    let mut volumes = Vec::new();
    for (number, (disk, mount)) in disks.iter().zip(&mounts).enumerate() {
        let placed = PlacedFile::new(mount.path().join("stamped"), STAMPED).unwrap();
        targets.push(Target {
            volume: number,
            file: open_direct(&placed.path).unwrap(),
            align: 1,
            device: false,
            borders: placed.borders(),
        });
        volumes.push(Volume {
            path: disk.path.clone(),
            look: Box::new(move |image| placed.of_image(image)),
        });
    }
    let mut rig = Rig::new(NAME, volumes, Lie::None);
    let history = rig.history.clone();
    let gate = Gate::default();
    let links = AtomicU64::new(0);
    let mut books = Books::default();
    let wanted = number("SOE_TORTURE_CAPTURES").map_or(25, |n| n / 4);
    let mut checked = 0;
    let habit = Habit {
        sectors: 1..257,
        zero_every: 0,
        think_us: 100..1500,
    };
    let stamped = areas(STAMPED / SECTOR as u64, 2);
    let chain: Vec<&Target> = targets.iter().collect();
    std::thread::scope(|scope| {
        let _end = EndOnDrop(&gate);
        for target in &targets {
            let seed = seed ^ (target.volume as u64 + 1) << 8;
            let area = stamped[0].clone();
            let (history, gate, habit) = (&*history, &gate, &habit);
            scope.spawn(move || scribble(target, area, habit, history, gate, seed));
        }
        scope.spawn(|| depend(&chain, stamped[1].clone(), &history, &gate, &links, seed));
        scope.spawn(|| churn(mounts[1].path(), &gate, seed));

        let deadline = Instant::now() + Duration::from_secs(60 + wanted * 10);
        while u64::from(books.layers) < wanted {
            assert!(
                Instant::now() < deadline,
                "only {} cuts in time; failed {:?}; {}",
                books.layers,
                books.failed,
                rig.readings()
            );
            if rng.random_range(0..12) == 0 {
                rig.restart(Duration::from_millis(rng.random_range(0..60)), false);
                books.restarts += 1;
                // The counters get their base in a silence only.
                gate.close(true);
                rest(&mounts);
                std::thread::sleep(Duration::from_millis(120));
                let _ = rig.audit();
                gate.close(false);
            }
            let ask = Ask {
                baseline: rng.random_range(0..20) == 0,
                policy: CapturePolicy {
                    optimistic: rng.random_range(0..5) == 0,
                    optimistic_time: Duration::from_millis(100),
                    pause_budget: Duration::from_millis(400),
                    freeze_tries: 4,
                    ..CapturePolicy::default()
                },
                fail_after: (rng.random_range(0..12) == 0).then(|| rng.random_range(0..200)),
                cancel_after: None,
                guard: Some(&guard),
                settled_failures: 0,
            };
            match rig.capture(&ask) {
                Ok(layer) => {
                    books.take(&layer);
                    complain(&format!("layer {}", books.layers), &layer.violations);
                    let frozen = layer
                        .cut
                        .volumes
                        .iter()
                        .all(|v| v.level == Level::Filesystem);
                    if frozen && rng.random_range(0..3) == 0 {
                        assert_eq!(layer.cut.method, Method::Freeze);
                        layer.images.iter().for_each(|image| clean(image));
                        checked += 1;
                    }
                }
                Err(error) => books.fail(&rig, &error),
            }
        }
    });
    books.print(NAME, history.issued(), links.load(Ordering::Relaxed));
    println!("{NAME}: e2fsck found nothing on the images of {checked} cuts");
    assert!(books.by_kind.contains_key("Freeze") && checked > 0);
}

fn rest(mounts: &[Mounted]) {
    for mount in mounts {
        let _ = device::run("sync", &["-f", &mount.path().display().to_string()]);
    }
}

/// Files come, are made durable, renamed, and go.
fn churn(folder: &Path, gate: &Gate, seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed ^ 5);
    while gate.pass() {
        let (from, to) = (rng.random_range(0..40u32), rng.random_range(0..40u32));
        let path = folder.join(format!("file{from}"));
        let done = match rng.random_range(0..4) {
            0 => std::fs::rename(&path, folder.join(format!("file{to}"))),
            1 => std::fs::remove_file(&path),
            _ => File::create(&path).and_then(|mut file| {
                file.write_all(&vec![from as u8; rng.random_range(1..100_000)])?;
                match rng.random() {
                    true => file.sync_all(),
                    false => Ok(()),
                }
            }),
        };
        if let Err(error) = done {
            assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}");
        }
        std::thread::sleep(Duration::from_micros(rng.random_range(500..4000)));
    }
}

/// A filesystem that was frozen needs no repair, not even its journal.
fn clean(image: &[u8]) {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(image).expect("written");
    let path = file.path().to_str().expect("a plain path");
    device::run("e2fsck", &["-f", "-n", path]).expect("a clean filesystem");
}

/// Writes that take tens of milliseconds and land in several requests.
fn slow_hunt<'a>(name: &'a str, disk: &'a SlowDisk) -> Hunt<'a> {
    Hunt {
        name,
        path: &disk.path,
        habit: Habit {
            sectors: 512..513,
            zero_every: 0,
            think_us: 0..0,
        },
        writers: 3,
        rhythm: Rhythm {
            open: 100..200,
            gap: 180..260,
            long_every: 0,
            long: 0..1,
        },
        policy: CapturePolicy {
            optimistic_time: Duration::from_secs(3),
            optimistic_tries: 200,
            optimistic_residual: 8 << 20,
            backoff_max: Duration::from_millis(8),
            ..CapturePolicy::default()
        },
        baseline: false,
        captures: 12,
    }
}

#[test]
fn a_cut_without_the_in_flight_check_is_noticed() {
    need_kernel!();
    let disk = SlowDisk::new(16 * MIB, 8 << 20, 32).unwrap();
    let hunt = slow_hunt("in-flight", &disk);
    hunt.must_find(
        Lie::NothingInFlight,
        &[Wrong::Torn, Wrong::Lost, Wrong::Early],
    );
}

#[test]
fn marks_at_queue_only_are_noticed() {
    need_kernel!();
    let disk = SlowDisk::new(16 * MIB, 8 << 20, 256).unwrap();
    let hunt = Hunt {
        // Everything is read by a pass under way, so that what lands behind it must be marked again.
        baseline: true,
        captures: 25,
        ..slow_hunt("queue-marks", &disk)
    };
    hunt.must_find(Lie::QueueMarksOnly, &[Wrong::Lost, Wrong::Torn]);
}

#[test]
fn a_residual_fixed_before_the_counters_is_noticed() {
    need_kernel!();
    let disk = LoopDevice::new(16 * MIB).unwrap();
    let hunt = Hunt {
        name: "scan-first",
        path: &disk.path,
        habit: Habit {
            sectors: 8..9,
            zero_every: 0,
            think_us: 100..700,
        },
        writers: 2,
        rhythm: Rhythm {
            open: 3..8,
            gap: 3..8,
            long_every: 6,
            long: 60..100,
        },
        policy: CapturePolicy::default(),
        baseline: false,
        captures: 150,
    };
    hunt.must_find(Lie::ScanFirst, &[Wrong::Lost]);
}
