//! The whole agent on real devices, driven as a user drives it: groups, layers, restores, a stop, and
//! kills at random moments.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use rustix::process::{Signal, kill_process};
use serde_json::Value;
use soe_tests::agent::{Soe, accepts_writes, difference, free_port, http_get};
use soe_tests::device::{self, Aligned, LoopDevice, Mounted, open_direct, write_direct};

macro_rules! need_kernel {
    () => {
        if let Some(why) = device::unable() {
            println!("SKIPPED: {why}");
            return;
        }
    };
}

const MIB: u64 = 1 << 20;

/// Runs `work` again and again on a thread of its own while `meanwhile` runs.
fn beside<T>(work: impl Fn() + Send + Sync, meanwhile: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                work();
            }
        });
        // Also when a check fails, or the scope would wait for ever.
        let _stop = Stop(&stop);
        meanwhile()
    })
}

fn text(value: &Value) -> &str {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no text"))
}

#[test]
fn a_group_is_captured_listed_restored_and_verified() {
    need_kernel!();
    let disk = LoopDevice::new(128 * MIB).unwrap();
    let raw = LoopDevice::new(64 * MIB).unwrap();
    let mounted = Mounted::new(&disk.path, "ext4").unwrap();
    let mut soe = Soe::new("whole", "");
    soe.start();
    soe.group("db", &[disk.node(), raw.node()]);
    let first = soe.volume("db", disk.node());
    assert_eq!(
        (&first["tracking"], &first["layers"], &first["size_bytes"]),
        (&"complete".into(), &0.into(), &(128 * MIB).into())
    );

    let baseline = soe.capture("db");
    assert_eq!(baseline.len(), 2, "one layer of every volume");
    assert!(baseline.iter().all(|layer| layer["kind"] == "baseline"));
    std::fs::write(mounted.path().join("file"), vec![7; 5 << 20]).unwrap();
    device::run("sync", &["-f", &mounted.path().display().to_string()]).unwrap();
    let file = open_direct(&raw.path).unwrap();
    write_direct(&file, 3 * MIB, 65536, 9).unwrap();
    assert_eq!(soe.volume("db", raw.node())["changed_blocks_pending"], 1);

    let layers = soe.capture("db");
    for layer in &layers {
        assert_eq!(layer["kind"], "differential");
        assert_eq!(layer["cut_at"], layers[0]["cut_at"], "cut at one instant");
        assert!(layer["bytes_read"].as_u64() < Some(32 * MIB), "{layer}");
    }
    let of_raw = layers.iter().find(|l| l["volume"] == raw.node()).unwrap();
    assert_eq!(of_raw["changed_blocks"], 1);

    mounted.unmount().unwrap();
    soe.capture("db");
    for volume in [&disk, &raw] {
        let listed = soe
            .run(&["layer", "list", "db", "--volume", volume.node(), "--json"])
            .json();
        let sequence: Vec<_> = listed["layers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|l| l["sequence"].as_u64().unwrap())
            .collect();
        assert_eq!(sequence, [1, 2, 3], "oldest first");
        assert_eq!(
            soe.restored_differs("db", volume.node(), &volume.path),
            None
        );
        let status = soe.volume("db", volume.node());
        assert_eq!(
            (
                &status["layers"],
                &status["baseline_layers"],
                &status["changed_blocks_pending"]
            ),
            (&3.into(), &1.into(), &0.into())
        );
    }
    // The comparison notices a single byte.
    write_direct(&file, 40 * MIB, 512, 1).unwrap();
    assert_eq!(
        soe.restored_differs("db", raw.node(), &raw.path),
        Some(40 * MIB)
    );
    // An older layer is still what it was: the block of the second layer is zero in the first.
    let old = soe.dir.path().join("old.img");
    soe.run(&[
        "restore",
        "db",
        "--volume",
        raw.node(),
        "--layer",
        text(&baseline.iter().find(|l| l["volume"] == raw.node()).unwrap()["id"]),
        "--to",
        &old.display().to_string(),
    ])
    .ok();
    assert!(std::fs::read(&old).unwrap().iter().all(|byte| *byte == 0));
    let report = soe.run(&["layer", "verify", "db", "--json"]).json();
    assert_eq!(
        (&report["layers"], &report["problems"]),
        (&6.into(), &serde_json::json!([]))
    );
    assert_eq!(soe.terminate(), 0);
}

/// A number, written into a file past the page cache.
struct Counter(std::fs::File);

impl Counter {
    fn new(folder: &Path) -> Self {
        let path = folder.join("counter");
        std::fs::write(&path, [0; 4096]).unwrap();
        device::run("sync", &["-f", &folder.display().to_string()]).unwrap();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT | libc::O_DSYNC)
            .open(path)
            .unwrap();
        Self(file)
    }

    fn set(&self, number: u64) {
        let mut page = Aligned::new(4096, 0);
        page.bytes_mut()[..8].copy_from_slice(&number.to_le_bytes());
        self.0.write_all_at(page.bytes(), 0).unwrap();
    }
}

/// The counter in the filesystem of a restored image.
fn counter_of(image: &Path) -> u64 {
    let node = device::run("losetup", &["-f", "--show", &image.display().to_string()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let point = folder.path().display().to_string();
    let mounted = device::run("mount", &[&node, &point]);
    let read = std::fs::read(folder.path().join("counter"));
    if mounted.is_ok() {
        device::run("umount", &[&point]).unwrap();
    }
    device::run("losetup", &["-d", &node]).unwrap();
    mounted.unwrap();
    u64::from_le_bytes(read.unwrap()[..8].try_into().unwrap())
}

/// One capture of a group is one instant for all its volumes: of two writes that depend on each
/// other, no layer holds the second without the first.
#[test]
fn volumes_of_a_group_are_cut_at_one_instant() {
    need_kernel!();
    let disks = [64, 96].map(|mib| LoopDevice::new(mib * MIB).unwrap());
    let mounts = disks
        .each_ref()
        .map(|d| Mounted::new(&d.path, "ext4").unwrap());
    let counters = mounts.each_ref().map(|m| Counter::new(m.path()));
    let mut soe = Soe::new("instant", "");
    soe.start();
    soe.group("pair", &[disks[0].node(), disks[1].node()]);
    soe.capture("pair");
    let next = AtomicU64::new(1);
    let write = || {
        let number = next.fetch_add(1, Ordering::SeqCst);
        counters[0].set(number);
        counters[1].set(number);
    };
    let mut before = 0;
    for round in 0..4 {
        let layers = beside(write, || soe.capture("pair"));
        let numbers = disks.each_ref().map(|disk| {
            let image = soe.dir.path().join("image");
            let _ = std::fs::remove_file(&image);
            let to = image.display().to_string();
            soe.run(&["restore", "pair", "--volume", disk.node(), "--to", &to])
                .ok();
            counter_of(&image)
        });
        println!(
            "round {round}: {numbers:?} by {}",
            text(&layers[0]["method"])
        );
        assert!(
            numbers[0] == numbers[1] || numbers[0] == numbers[1] + 1,
            "the second write without the first: {numbers:?}"
        );
        assert!(numbers[1] >= before, "a layer is older than the one before");
        before = numbers[1];
    }
    assert!(before > 0, "nothing was written beside the captures");
    assert_eq!(soe.terminate(), 0);
}

/// A stop by SIGTERM loses nothing of the history: windows without a gap up to the stop, and every
/// byte that the device was given is in them.
#[test]
fn a_stop_leaves_a_complete_history() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let mut soe = Soe::new("stop", "");
    soe.start();
    soe.group("g", &[disk.node()]);
    let file = open_direct(&disk.path).unwrap();
    let mut written = 0;
    let until = Instant::now() + Duration::from_millis(3300);
    while Instant::now() < until {
        write_direct(&file, written % (64 * MIB), 65536, 1).unwrap();
        written += 65536;
        std::thread::sleep(Duration::from_millis(10));
    }
    let stopped = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    assert_eq!(soe.terminate(), 0);
    let history = soe.state().join("history").display().to_string();
    let query = "SELECT count(*) AS windows, sum(write_bytes) AS written, \
                 max(arrow_cast(ts, 'Int64') * 1000 + arrow_cast(interval_ms, 'Int64') * 1000000) AS last, \
                 min(arrow_cast(ts, 'Int64')) * 1000 AS first, sum(arrow_cast(interval_ms, 'Int64')) * 1000000 AS covered \
                 FROM volume_stats";
    let row = soe
        .run(&["sql", "--history", &history, "--json", query])
        .json();
    let number = |name: &str| {
        row[name]
            .as_i64()
            .unwrap_or_else(|| panic!("{name} of {row}"))
    };
    assert!(number("windows") >= 4, "{row}");
    assert_eq!(number("written"), i64::try_from(written).unwrap(), "{row}");
    let missing = i64::try_from(stopped.as_nanos()).unwrap() - number("last");
    assert!(
        missing < 2_000_000_000,
        "the last {missing} ns are missing: {row}"
    );
    let gap = (number("last") - number("first") - number("covered")).abs();
    assert!(
        gap < 100_000_000,
        "{gap} ns between windows are missing: {row}"
    );
    assert!(!soe.socket().exists(), "the socket is taken away");
}

/// Random writes to a file of a filesystem, made durable now and then.
struct Load {
    file: std::fs::File,
    bytes: u64,
    random: std::sync::Mutex<StdRng>,
}

impl Load {
    fn new(folder: &Path, bytes: u64, seed: u64) -> Self {
        let file = std::fs::File::create(folder.join("load")).unwrap();
        file.set_len(bytes).unwrap();
        Self {
            file,
            bytes,
            random: StdRng::seed_from_u64(seed).into(),
        }
    }

    fn step(&self) {
        for _ in 0..16 {
            let mut page = [0; 4096];
            let at = {
                let mut random = self.random.lock().unwrap();
                random.fill_bytes(&mut page);
                random.random_range(0..self.bytes / 4096) * 4096
            };
            self.file.write_all_at(&page, at).unwrap();
        }
        self.file.sync_data().unwrap();
    }
}

/// Direct writes at full depth to a file of a filesystem, so that no instant is without one and a
/// cut needs a freeze.
struct Storm(std::process::Child);

impl Storm {
    fn new(folder: &Path) -> Self {
        let child = std::process::Command::new("fio")
            .args(["--name=storm", "--thread", "--rw=randwrite", "--bs=4k"])
            .args(["--ioengine=libaio", "--iodepth=32", "--direct=1"])
            .args(["--size=2M", "--time_based", "--runtime=90"])
            .arg(format!("--filename={}/load", folder.display()))
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("fio, which `cargo xtask setup` installs");
        Self(child)
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `SOE_SEED` replays a run.
fn seed() -> u64 {
    let seed = std::env::var("SOE_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| std::process::id().into());
    println!("SOE_SEED={seed}");
    seed
}

/// Killed at any moment of a capture under load, the agent takes up its change map again, no
/// filesystem stays frozen, the chain is whole and the next layer is a differential that forgets
/// nothing.
#[test]
fn kills_at_random_moments_lose_no_change() {
    need_kernel!();
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    let disk = LoopDevice::new(128 * MIB).unwrap();
    let mounted = Mounted::new(&disk.path, "ext4").unwrap();
    let load = Load::new(mounted.path(), 48 * MIB, seed);
    let mut soe = Soe::new("kill", "");
    soe.start();
    soe.group("g", &[disk.node()]);
    soe.capture("g");
    let generation = soe.volume("g", disk.node())["generation"].clone();
    let mut rounds_with_layer = 0;
    for round in 0..8 {
        let before = soe.volume("g", disk.node())["layers"].as_u64().unwrap();
        beside(
            || load.step(),
            || {
                std::thread::sleep(Duration::from_millis(random.random_range(0..300)));
                let mut capture = soe.spawn(&["layer", "capture", "g"]);
                let delay = Duration::from_micros(random.random_range(0..2_500_000));
                std::thread::sleep(delay);
                println!("round {round}: killed {delay:?} into a capture");
                soe.kill();
                let _ = capture.wait();
                assert!(
                    accepts_writes(mounted.path(), Duration::from_secs(10)),
                    "the filesystem stayed frozen"
                );
            },
        );
        beside(|| load.step(), || soe.start());
        let status = soe.volume("g", disk.node());
        assert_eq!(status["tracking"], "complete", "{status}");
        assert_eq!(
            status["generation"], generation,
            "tracking went on without the agent"
        );
        assert!(
            status["changed_blocks_pending"].as_u64() > Some(0),
            "{status}"
        );
        rounds_with_layer += u64::from(status["layers"].as_u64().unwrap() > before);
        soe.run(&["layer", "verify", "g"]).ok();
    }
    println!("{rounds_with_layer} of the captures ended before the kill");
    drop(load);
    mounted.unmount().unwrap();
    let layer = &soe.capture("g")[0];
    assert_eq!(layer["kind"], "differential");
    assert_eq!(soe.restored_differs("g", disk.node(), &disk.path), None);
    soe.run(&["layer", "verify", "g"]).ok();
    assert_eq!(soe.terminate(), 0);
}

/// What the agent marks as frozen, in the page it shares with its guard.
fn frozen_now(soe: &Soe) -> bool {
    let name = blake3::hash(soe.state().as_os_str().as_encoded_bytes()).to_hex();
    let page = std::fs::read(format!("/dev/shm/soe-frozen-{}", &name[..12])).unwrap_or_default();
    page.get(64..)
        .is_some_and(|rest| rest.chunks(512).any(|entry| entry[0] == 2))
}

/// Killed while a filesystem is frozen, the guard thaws it; with the guard killed too, the next start
/// does.
#[test]
fn a_kill_while_frozen_ends_thawed() {
    need_kernel!();
    let disk = LoopDevice::new(128 * MIB).unwrap();
    let mounted = Mounted::new(&disk.path, "ext4").unwrap();
    let mut soe = Soe::new("frozen", "");
    soe.start();
    soe.group("g", &[disk.node()]);
    soe.capture("g");
    let storm = Storm::new(mounted.path());
    for guard_too in [false, true] {
        let mut caught = false;
        // Where the machine is busy the storm is mild, and most cuts need no freeze.
        let deadline = Instant::now() + Duration::from_secs(120);
        while Instant::now() < deadline {
            let guards = soe.children();
            assert!(!guards.is_empty(), "the agent has a guard");
            let mut capture = soe.spawn(&["layer", "capture", "g"]);
            while !caught && capture.try_wait().unwrap().is_none() {
                caught = frozen_now(&soe);
            }
            if caught {
                if guard_too {
                    for guard in guards {
                        kill_process(guard, Signal::KILL).unwrap();
                    }
                }
                soe.kill();
            }
            let _ = capture.wait();
            if caught {
                break;
            }
        }
        let made = soe.log();
        assert!(caught, "no capture in a storm froze its filesystem: {made}");
        if guard_too {
            // Only the next start can thaw now, if the kill came before the thaw.
            println!("frozen without a guard: {}", frozen_now(&soe));
            soe.start();
        }
        assert!(
            accepts_writes(mounted.path(), Duration::from_secs(10)),
            "the filesystem stayed frozen"
        );
        if !guard_too {
            soe.start();
        }
        assert_eq!(soe.volume("g", disk.node())["tracking"], "complete");
    }
    drop(storm);
    mounted.unmount().unwrap();
    assert_eq!(soe.capture("g")[0]["kind"], "differential");
    assert_eq!(soe.restored_differs("g", disk.node(), &disk.path), None);
    assert_eq!(soe.terminate(), 0);
}

/// A restore writes to a device of the volume's size, and a differential restore only what differs.
#[test]
fn a_device_is_restored_in_place() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let target = LoopDevice::new(64 * MIB).unwrap();
    let file = open_direct(&disk.path).unwrap();
    write_direct(&file, 0, 8 << 20, 3).unwrap();
    let mut soe = Soe::new("target", "");
    soe.start();
    soe.group("g", &[disk.node()]);
    soe.capture("g");
    let restore = [
        "restore",
        "g",
        "--volume",
        disk.node(),
        "--to",
        target.node(),
    ];
    soe.run(&restore).ok();
    assert_eq!(difference(&disk.path, &target.path).unwrap(), None);
    write_direct(&open_direct(&target.path).unwrap(), MIB, 4096, 4).unwrap();
    let differential: Vec<&str> = restore
        .iter()
        .copied()
        .chain(["--differential", "--json"])
        .collect();
    let report = soe.run(&differential).json();
    assert!(report["bytes_written"].as_u64() <= Some(MIB), "{report}");
    assert_eq!(difference(&disk.path, &target.path).unwrap(), None);
    let small = LoopDevice::new(32 * MIB).unwrap();
    let why = soe
        .run(&[
            "restore",
            "g",
            "--volume",
            disk.node(),
            "--to",
            small.node(),
        ])
        .refused(1);
    assert!(why.contains(small.node()), "{why}");
    assert_eq!(soe.terminate(), 0);
}

/// What was read often is known after a restart, from the history and from nothing else: neither is
/// forgotten nor counted twice what the pinned programs counted before.
#[test]
fn a_restarted_agent_stages_what_was_read_before() {
    need_kernel!();
    const READS: u64 = 200;
    let disk = LoopDevice::new(32 * MIB).unwrap();
    // Zeroes are not staged.
    write_direct(&open_direct(&disk.path).unwrap(), 0, 32 << 20, 5).unwrap();
    let mut soe = Soe::new("reheat", "");
    let area = soe.dir.path().join("staging").display().to_string();
    soe.configure(&format!(
        "[history]\ninterval = \"1s\"\nregion_interval = \"1s\"\n\
         [staging]\npath = \"{area}\"\nbudget = \"16MiB\""
    ));
    soe.start();
    soe.group("g", &[disk.node()]);
    let file = open_direct(&disk.path).unwrap();
    let mut buffer = Aligned::new(4096, 0);
    for n in 0..READS {
        let offset = 9 * MIB + n % 200 * 4096;
        file.read_exact_at(buffer.bytes_mut(), offset).unwrap();
    }
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(soe.terminate(), 0);
    soe.start();
    std::thread::sleep(Duration::from_millis(1500));
    let report = soe.run(&["stage", "now", disk.node(), "--json"]).json();
    let staged = report["valid_bytes"].as_u64();
    assert_eq!(soe.terminate(), 0);
    let history = soe.state().join("history").display().to_string();
    assert_eq!(staged, Some(MIB), "the one region that was read: {report}");
    for table in ["region_heat", "app_stats"] {
        let query = format!("SELECT CAST(sum(read_ops) AS BIGINT) AS n FROM {table}");
        let row = soe
            .run(&["sql", "--history", &history, "--json", &query])
            .json();
        assert_eq!(row["n"].as_u64(), Some(READS), "{table}: {row}");
    }
}

/// What the history tells a restarted agent is of days ago, but its layers are not.
#[test]
fn a_restart_with_history_is_no_missed_rpo() {
    need_kernel!();
    const RPO: Duration = Duration::from_secs(20);
    let disk = LoopDevice::new(16 * MIB).unwrap();
    let mut soe = Soe::new(
        "remember",
        "[history]\ninterval = \"1s\"\n[model]\nbin = \"1s\"\nseason = \"8s\"\n[plan]\ntick = \"500ms\"",
    );
    soe.start();
    soe.run(&[
        "group",
        "create",
        "g",
        "--rpo",
        "20s",
        "--volume",
        disk.node(),
    ])
    .ok();
    std::thread::sleep(RPO + Duration::from_secs(5));
    soe.capture("g");
    let layers = soe.volume("g", disk.node())["layers"].clone();
    assert_eq!(soe.terminate(), 0);
    soe.clear_log();
    soe.start();
    std::thread::sleep(Duration::from_secs(3));
    let now = soe.volume("g", disk.node());
    assert_eq!(soe.terminate(), 0);
    let log = soe.log();
    assert!(!log.contains("RPO was missed"), "{log}");
    assert_eq!(
        now["layers"], layers,
        "the newest layer is fresh: {now}\n{log}"
    );
}

/// The names in docs/metrics.md that every agent with a captured volume must tell; what others tell
/// of needs a burst, a frozen filesystem, an event or a fault.
const ALWAYS_TOLD: &[&str] = &[
    "soe_build_info",
    "soe_start_time_seconds",
    "soe_volumes_tracked",
    "soe_volume_operations_total",
    "soe_volume_bytes_total",
    "soe_volume_queue_depth",
    "soe_volume_sequential_ratio",
    "soe_observe_misses_total",
    "soe_tracking_complete",
    "soe_changed_blocks_pending",
    "soe_history_rows_total",
    "soe_history_size_bytes",
    "soe_captures_total",
    "soe_capture_pause_seconds_count",
    "soe_capture_duration_seconds_count",
    "soe_capture_optimistic_attempts_total",
    "soe_capture_read_bytes_total",
    "soe_capture_stored_bytes_total",
    "soe_layers",
    "soe_layer_age_seconds",
    "soe_store_size_bytes",
    "soe_restore_bytes_total",
    "soe_restores_total",
    "soe_throttled_seconds_total",
    "soe_api_requests_total",
];

#[test]
fn the_documented_metrics_are_told() {
    need_kernel!();
    let disk = LoopDevice::new(32 * MIB).unwrap();
    write_direct(&open_direct(&disk.path).unwrap(), 0, 4 << 20, 3).unwrap();
    let port = free_port();
    let mut soe = Soe::new("metrics", "");
    soe.configure_http(port, "");
    soe.start();
    soe.group("g", &[disk.node()]);
    soe.capture("g");
    write_direct(&open_direct(&disk.path).unwrap(), 0, 1 << 20, 4).unwrap();
    assert_eq!(soe.restored_differs("g", disk.node(), &disk.path), Some(0));
    let deadline = Instant::now() + Duration::from_secs(60);
    let value = loop {
        let text = http_get(port, "/metrics");
        let value = |name: &str| {
            text.lines()
                .filter(|line| {
                    line.strip_prefix(name)
                        .is_some_and(|r| r.starts_with([' ', '{']))
                })
                .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
                .reduce(|a, b| a + b)
        };
        let missing: Vec<&&str> = ALWAYS_TOLD.iter().filter(|n| value(n).is_none()).collect();
        if missing.is_empty() && value("soe_changed_blocks_pending") > Some(0.0) {
            break [
                "soe_volumes_tracked",
                "soe_layers",
                "soe_changed_blocks_pending",
            ]
            .map(|name| value(name).unwrap_or_default());
        }
        assert!(Instant::now() < deadline, "not told: {missing:?} in {text}");
        std::thread::sleep(Duration::from_millis(500));
    };
    assert_eq!(
        value,
        [1.0, 1.0, 16.0],
        "one volume, one layer, 1 MiB changed"
    );
    assert_eq!(soe.terminate(), 0);
}
