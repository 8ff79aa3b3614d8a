//! What goes wrong around an agent on real devices: each time one sentence that says so, the
//! documented exit code, an agent that goes on, and layers that stay whole.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use soe_tests::agent::Soe;
use soe_tests::device::{self, LoopDevice, Mounted, open_direct, write_direct};

macro_rules! need_kernel {
    () => {
        if let Some(why) = device::unable() {
            println!("SKIPPED: {why}");
            return;
        }
    };
}

const MIB: u64 = 1 << 20;

/// Fills `device` from `start` to `end` with bytes that do not compress.
fn fill(device: &Path, start: u64, end: u64) {
    device::run(
        "dd",
        &[
            "if=/dev/urandom",
            &format!("of={}", device.display()),
            "bs=1M",
            &format!("seek={}", start / MIB),
            &format!("count={}", (end - start) / MIB),
            "oflag=direct",
            "conv=notrunc",
            "status=none",
        ],
    )
    .unwrap();
}

/// Files below `folder` whose name passes, in order.
fn files(folder: &Path, pass: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if pass(&entry.file_name().to_string_lossy()) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Turns over one bit in the middle of a file.
fn damage(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn without_an_agent_clients_say_so() {
    need_kernel!();
    let soe = Soe::new("none", "");
    for verb in [
        vec!["group", "list"],
        vec!["volumes"],
        vec!["layer", "capture", "g"],
        vec![
            "restore",
            "g",
            "--volume",
            "/dev/loop0",
            "--to",
            "/dev/null",
        ],
        vec!["stage", "status", "/dev/loop0"],
    ] {
        let why = soe.run(&verb).refused(3);
        assert!(why.contains(&*soe.socket().to_string_lossy()), "{why}");
    }
}

#[test]
fn a_bad_configuration_names_its_line() {
    need_kernel!();
    for (more, line, word) in [
        (
            "[history]\ninterval = \"1s\"\nintervall = \"2s\"",
            "9",
            "intervall",
        ),
        ("[history]\ninterval = \"1 fortnight\"", "8", "fortnight"),
        ("[limits]\ncpu = 0", "8", "cpu"),
        ("[nonsense]\n", "7", "nonsense"),
        ("[store]\ncompression = \"zstd:1", "8", ""),
    ] {
        let soe = Soe::new("config", more);
        let why = soe.start_in_vain().refused(2);
        assert!(
            why.contains(&format!(":{line}:")) || why.contains(&format!("line {line}")),
            "{why}"
        );
        assert!(why.contains(word), "{why}");
        assert!(!soe.state().exists(), "nothing was begun");
    }
}

#[test]
fn a_second_agent_is_refused() {
    need_kernel!();
    let disk = LoopDevice::new(32 * MIB).unwrap();
    let mut first = Soe::new("first", "");
    first.start();
    first.group("g", &[disk.node()]);
    let why = first.start_in_vain().refused(4);
    assert!(why.contains("another agent"), "{why}");

    // The same state directory behind another socket.
    let second = Soe::new("second", "");
    let text = std::fs::read_to_string(second.config()).unwrap();
    let ours = format!("state_dir = \"{}\"", second.state().display());
    let theirs = format!("state_dir = \"{}\"", first.state().display());
    std::fs::write(second.config(), text.replace(&ours, &theirs)).unwrap();
    let why = second.start_in_vain().refused(4);
    assert!(why.contains(&*first.state().to_string_lossy()), "{why}");

    // Another state directory, but the same pins.
    std::fs::write(second.config(), text).unwrap();
    let config = second.config().display().to_string();
    let third = second
        .command(&["agent", "--config", &config])
        .env("SOE_PIN_ROOT", first.pins())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&third.stderr).into_owned();
    assert_eq!(third.status.code(), Some(4), "{said}");
    assert!(
        said.contains("another agent") && !said.contains("panicked"),
        "{said}"
    );

    // None of them disturbed the first.
    first.capture("g");
    assert_eq!(first.restored_differs("g", disk.node(), &disk.path), None);
    assert_eq!(first.terminate(), 0);
}

#[test]
fn what_does_not_exist_is_named() {
    need_kernel!();
    let disk = LoopDevice::new(32 * MIB).unwrap();
    let mut soe = Soe::new("unknown", "");
    soe.start();
    let file = soe.config().display().to_string();
    for path in ["/dev/soe-has-no-such-device", &file, "/dev/null"] {
        let why = soe
            .run(&["group", "create", "g", "--volume", path])
            .refused(2);
        assert!(why.contains(path), "{why}");
    }
    for verb in [
        vec!["group", "status", "g"],
        vec!["group", "delete", "g"],
        vec!["layer", "capture", "g"],
        vec!["layer", "list", "g"],
        vec!["layer", "verify", "g"],
    ] {
        let why = soe.run(&verb).refused(1);
        assert!(why.contains('g') && why.contains("group"), "{why}");
    }
    soe.group("g", &[disk.node()]);
    let why = soe
        .run(&["group", "create", "g", "--volume", disk.node()])
        .refused(1);
    assert!(why.contains("already"), "{why}");
    let why = soe
        .run(&["group", "create", "h", "--volume", disk.node()])
        .refused(1);
    assert!(why.contains(disk.node()), "{why}");
    let to = soe.dir.path().join("image").display().to_string();
    soe.run(&["restore", "g", "--volume", disk.node(), "--to", &to])
        .refused(1);
    soe.capture("g");
    soe.run(&[
        "restore",
        "g",
        "--volume",
        disk.node(),
        "--layer",
        "0123456789abcdef",
        "--to",
        &to,
    ])
    .refused(1);
    // A restore never writes onto a device that somebody has mounted.
    let other = LoopDevice::new(32 * MIB).unwrap();
    let mounted = Mounted::new(&other.path, "ext4").unwrap();
    soe.run(&[
        "restore",
        "g",
        "--volume",
        disk.node(),
        "--to",
        other.node(),
    ])
    .refused(4);
    mounted.unmount().unwrap();
    assert_eq!(soe.terminate(), 0);
}

#[test]
fn a_volume_that_holds_the_store_is_refused() {
    need_kernel!();
    let disk = LoopDevice::new(128 * MIB).unwrap();
    let plain = LoopDevice::new(32 * MIB).unwrap();
    let mounted = Mounted::new(&disk.path, "ext4").unwrap();
    let store = mounted.path().join("store");
    let mut soe = Soe::new(
        "own",
        &format!(
            "[store]\ndir = \"{}\"\nmin_free = \"16MiB\"",
            store.display()
        ),
    );
    soe.start();
    let why = soe
        .run(&["group", "create", "g", "--volume", disk.node()])
        .refused(4);
    assert!(why.contains(&*store.to_string_lossy()), "{why}");
    assert_eq!(
        soe.run(&["group", "list", "--json"]).json()["groups"],
        serde_json::json!([])
    );
    soe.group("g", &[plain.node()]);
    let why = soe.run(&["group", "update", "g", "--add-volume", disk.node()]);
    // The verb may lack the option; what counts is that the volume stays out.
    assert_ne!(why.code, 0, "{why:?}");
    soe.capture("g");
    assert_eq!(soe.terminate(), 0);
    mounted.unmount().unwrap();
}

#[test]
fn a_damaged_layer_is_found_and_the_agent_starts() {
    need_kernel!();
    let disk = LoopDevice::new(32 * MIB).unwrap();
    fill(&disk.path, 0, 4 * MIB);
    let mut soe = Soe::new("damage", "");
    soe.start();
    soe.group("g", &[disk.node()]);
    soe.capture("g");
    fill(&disk.path, 8 * MIB, 9 * MIB);
    soe.capture("g");
    soe.run(&["layer", "verify", "g"]).ok();
    let manifests = files(&soe.state().join("store"), &|name| name.starts_with("m-"));
    let segments = files(&soe.state().join("store"), &|name| {
        name.ends_with(".segment")
    });
    assert_eq!((manifests.len(), segments.len()), (2, 2));
    for file in [&segments[1], &manifests[1], &manifests[0]] {
        let whole = std::fs::read(file).unwrap();
        damage(file);
        let store = soe.state().join("store").display().to_string();
        let why = soe
            .run(&["layer", "verify", "g", "--store", &store])
            .refused(5);
        assert!(why.contains("problem") || why.contains("damage"), "{why}");
        soe.terminate();
        soe.clear_log();
        soe.start();
        soe.run(&["layer", "verify", "g"]).refused(5);
        if manifests.contains(file) {
            let name = file.file_name().unwrap().to_string_lossy();
            let log = soe.log();
            assert!(
                log.contains("ERROR") && log.contains(&*name),
                "the start says it: {log}"
            );
        }
        std::fs::write(file, whole).unwrap();
        soe.terminate();
        soe.start();
        soe.run(&["layer", "verify", "g"]).ok();
    }
    soe.capture("g");
    assert_eq!(soe.restored_differs("g", disk.node(), &disk.path), None);
    assert_eq!(soe.terminate(), 0);
}

#[test]
fn a_damaged_history_is_left_out_and_the_agent_starts() {
    need_kernel!();
    let disk = LoopDevice::new(32 * MIB).unwrap();
    let mut soe = Soe::new(
        "history",
        "[history]\ninterval = \"100ms\"\n[model]\nbin = \"100ms\"\nseason = \"10s\"",
    );
    soe.start();
    soe.group("g", &[disk.node()]);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(soe.terminate(), 0);
    let parquet = |soe: &Soe| {
        files(&soe.state().join("history/volume_stats"), &|name| {
            name.ends_with(".parquet")
        })
    };
    let first = parquet(&soe).into_iter().next().expect("a file of windows");
    let whole = std::fs::read(&first).unwrap();
    for bytes in [&whole[..whole.len() / 2], b"PAR1 nonsense PAR1", b""] {
        std::fs::write(&first, bytes).unwrap();
        soe.clear_log();
        soe.start();
        let log = soe.log();
        assert!(
            log.contains("WARN") && log.contains(&*first.file_name().unwrap().to_string_lossy()),
            "{log}"
        );
        soe.capture("g");
        assert_eq!(soe.terminate(), 0);
    }
    let history = soe.state().join("history").display().to_string();
    let ask = soe.run(&[
        "sql",
        "--history",
        &history,
        "SELECT count(*) FROM volume_stats",
    ]);
    let why = ask.refused(5);
    assert!(
        why.contains(&*first.file_name().unwrap().to_string_lossy()),
        "{why}"
    );
}

#[test]
fn a_device_that_goes_away_is_reported_and_tracked_anew() {
    need_kernel!();
    let disk = LoopDevice::new(256 * MIB).unwrap();
    fill(&disk.path, 0, 256 * MIB);
    let mut soe = Soe::new("gone", "[limits]\ncapture_bandwidth = \"32MiB\"");
    soe.start();
    soe.group("g", &[disk.node()]);
    // The backing file ends while it is read: the device answers with errors.
    let mut capture = soe.spawn(&["layer", "capture", "g"]);
    std::thread::sleep(Duration::from_millis(1500));
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(disk.backing())
        .unwrap();
    file.set_len(0).unwrap();
    drop_caches(&disk.path);
    assert!(
        !capture.wait().unwrap().success(),
        "a capture of a device that fails does not succeed"
    );
    let status = soe.run(&["group", "status", "g", "--json"]).json();
    let error = status["last_error"].as_str().expect("the failure is kept");
    assert!(error.contains(disk.node()), "{error}");
    assert_eq!(
        soe.run(&["layer", "list", "g", "--json"]).json()["layers"],
        serde_json::json!([])
    );
    file.set_len(256 * MIB).unwrap();
    fill(&disk.path, 0, 16 * MIB);
    assert_eq!(soe.capture("g").len(), 1);

    // Detached in the midst of a capture: the kernel keeps it until the last reader is gone.
    write_direct(&open_direct(&disk.path).unwrap(), 0, 8 << 20, 7).unwrap();
    let mut capture = soe.spawn(&["layer", "capture", "g", "--kind", "baseline"]);
    std::thread::sleep(Duration::from_millis(700));
    device::run("losetup", &["-d", disk.node()]).unwrap();
    let _ = capture.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while Path::new(&format!(
        "/sys/block/{}/loop",
        disk.node().trim_start_matches("/dev/")
    ))
    .exists()
    {
        assert!(
            Instant::now() < deadline,
            "the agent holds a device that was detached"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    soe.run(&["group", "status", "g", "--json"]).ok();
    let why = soe.run(&["layer", "capture", "g"]).refused(1);
    assert!(why.contains(disk.node()), "{why}");
    // Back again, with other content.
    device::run(
        "losetup",
        &[disk.node(), &disk.backing().display().to_string()],
    )
    .unwrap();
    fill(&disk.path, 32 * MIB, 40 * MIB);
    let again = soe.run(&["layer", "capture", "g"]);
    if again.code != 0 {
        again.refused(1);
        soe.capture("g");
    }
    assert_eq!(soe.restored_differs("g", disk.node(), &disk.path), None);
    soe.run(&["layer", "verify", "g"]).ok();
    assert_eq!(soe.terminate(), 0);
}

/// No bio tells of it, so only the audit can find it; then everything is read again.
#[test]
fn a_backing_file_changed_behind_the_device_is_found_by_the_audit() {
    use std::os::unix::fs::FileExt;
    need_kernel!();
    let disk = LoopDevice::new(32 * MIB).unwrap();
    fill(&disk.path, 0, 32 * MIB);
    let mut soe = Soe::new("audit", "");
    soe.start();
    soe.group("g", &[disk.node()]);
    soe.capture("g");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(disk.backing())
        .unwrap();
    file.write_all_at(&vec![0xa5; 16 << 20], 8 * MIB).unwrap();
    let why = soe.run(&["layer", "capture", "g"]).refused(1);
    assert!(
        why.contains("AUDIT_FAIL") && why.contains("rescan"),
        "{why}"
    );
    let layers = soe.capture("g");
    assert_eq!(layers[0]["rescan_reason"], "AUDIT_FAIL", "{layers:?}");
    assert_eq!(soe.restored_differs("g", disk.node(), &disk.path), None);
    let again = soe.capture("g");
    assert!(again[0]["rescan_reason"].is_null(), "{again:?}");
    assert_eq!(soe.terminate(), 0);
}

/// Makes the next reads of a device go to its backing file.
fn drop_caches(device: &Path) {
    device::run("blockdev", &["--flushbufs", &device.display().to_string()]).unwrap();
}

#[test]
fn a_full_store_fails_a_capture_and_harms_nothing() {
    need_kernel!();
    let disk = LoopDevice::new(128 * MIB).unwrap();
    let small = LoopDevice::new(96 * MIB).unwrap();
    let mounted = Mounted::new(&small.path, "ext4").unwrap();
    let store = mounted.path().join("store");
    fill(&disk.path, 0, 8 * MIB);
    let mut soe = Soe::new(
        "full",
        &format!(
            "[store]\ndir = \"{}\"\nmin_free = \"16MiB\"",
            store.display()
        ),
    );
    soe.start();
    soe.group("g", &[disk.node()]);
    soe.capture("g");
    let generation = soe.volume("g", disk.node())["generation"].clone();
    fill(&disk.path, 0, 128 * MIB);
    for _ in 0..2 {
        let why = soe.run(&["layer", "capture", "g"]).refused(1);
        assert!(why.contains("space") || why.contains("free"), "{why}");
        assert!(why.contains("store"), "{why}");
    }
    soe.run(&["layer", "verify", "g"]).ok();
    let status = soe.volume("g", disk.node());
    assert_eq!(
        (&status["layers"], &status["generation"]),
        (&1.into(), &generation)
    );
    assert!(
        status["changed_blocks_pending"].as_u64() >= Some(128 * MIB / (64 << 10)),
        "what failed captures read is still marked: {status}"
    );
    // With less to store the next capture succeeds: the failed ones left nothing behind.
    device::run("blkdiscard", &["-o", &(24 * MIB).to_string(), disk.node()]).unwrap();
    let layer = &soe.capture("g")[0];
    assert_eq!(layer["kind"], "differential");
    assert_eq!(soe.restored_differs("g", disk.node(), &disk.path), None);
    soe.run(&["layer", "verify", "g"]).ok();
    assert_eq!(soe.terminate(), 0);
    mounted.unmount().unwrap();
}
