//! Volumes of a group that vanish, come back and change their size while the agent runs: it notices
//! by itself, says so, and goes on. No capture is needed to find out.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use soe_tests::agent::Soe;
use soe_tests::device::{self, LoopDevice, open_direct, write_direct};

macro_rules! need_kernel {
    () => {
        if let Some(why) = device::unable() {
            println!("SKIPPED: {why}");
            return;
        }
    };
}

const MIB: u64 = 1 << 20;
/// Far longer than the kernel's word takes, and shorter than the agent's own rounds where the word
/// alone must do.
const SOON: Duration = Duration::from_secs(8);

/// Waits until the group's status of `volume` is what is wanted.
#[track_caller]
fn becomes(soe: &Soe, volume: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let began = Instant::now();
    loop {
        let status = soe.volume("g", volume);
        if wanted(&status) {
            println!("{what} after {:?}", began.elapsed());
            return status;
        }
        assert!(began.elapsed() < SOON, "{what} was not noticed: {status}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn attach(disk: &LoopDevice) {
    device::run(
        "losetup",
        &[disk.node(), &disk.backing().display().to_string()],
    )
    .unwrap();
}

fn write(device: &Path, offset: u64, fill: u8) {
    write_direct(&open_direct(device).unwrap(), offset, 1 << 20, fill).unwrap();
}

#[test]
fn a_volume_that_vanishes_and_comes_back_is_noticed() {
    need_kernel!();
    let disk = LoopDevice::new(32 * MIB).unwrap();
    let other = LoopDevice::new(32 * MIB).unwrap();
    write(&disk.path, 0, 1);
    let mut soe = Soe::new("hotplug", "[history]\ninterval = \"100ms\"");
    soe.start();
    soe.group("g", &[disk.node(), other.node()]);
    soe.capture("g");
    let before = soe.volume("g", disk.node());
    assert_eq!(before["missing"], Value::Null);

    device::run("losetup", &["-d", disk.node()]).unwrap();
    let gone = becomes(&soe, disk.node(), "the loss", |v| {
        v["tracking"] == "detached"
    });
    let why = gone["missing"].as_str().expect("a reason");
    assert!(why.contains(disk.node()), "{why}");
    assert_eq!(gone["layers"], 1, "its layers stay");
    assert!(
        soe.log().contains("the volume is gone; its layers stay"),
        "{}",
        soe.log()
    );
    // The other volume of the group goes on.
    assert_eq!(
        soe.volume("g", other.node())["tracking"],
        "complete",
        "only one volume is gone"
    );

    // It comes back with other content: the next layer must not build on what was known.
    std::fs::OpenOptions::new()
        .write(true)
        .open(disk.backing())
        .and_then(|file| {
            use std::os::unix::fs::FileExt;
            file.write_all_at(&[9; 4096], 20 * MIB)
        })
        .unwrap();
    attach(&disk);
    let back = becomes(&soe, disk.node(), "the return", |v| {
        v["tracking"] == "complete"
    });
    assert_eq!(back["missing"], Value::Null);
    assert_ne!(back["generation"], before["generation"]);
    assert!(back["rescan_reason"].is_string(), "{back}");
    write(&disk.path, 4 * MIB, 3);
    soe.capture("g");
    assert_eq!(soe.restored_differs("g", disk.node(), &disk.path), None);
    assert_eq!(soe.restored_differs("g", other.node(), &other.path), None);
    soe.run(&["layer", "verify", "g"]).ok();
    assert_eq!(soe.terminate(), 0);
}

#[test]
fn a_volume_that_grows_is_tracked_anew_and_whole() {
    need_kernel!();
    let disk = LoopDevice::new(16 * MIB).unwrap();
    write(&disk.path, 0, 1);
    let mut soe = Soe::new("resize", "");
    soe.start();
    soe.group("g", &[disk.node()]);
    soe.capture("g");
    std::fs::OpenOptions::new()
        .write(true)
        .open(disk.backing())
        .unwrap()
        .set_len(48 * MIB)
        .unwrap();
    device::run("losetup", &["-c", disk.node()]).unwrap();
    let grown = becomes(&soe, disk.node(), "the new size", |v| {
        v["size_bytes"] == 48 * MIB && v["rescan_reason"] == "RESIZE"
    });
    assert_eq!(grown["tracking"], "complete");
    write(&disk.path, 40 * MIB, 7);
    soe.capture("g");
    assert_eq!(soe.restored_differs("g", disk.node(), &disk.path), None);
    let after = soe.volume("g", disk.node());
    assert_eq!(
        (&after["rescan_reason"], &after["layers"]),
        (&Value::Null, &2.into())
    );
    assert_eq!(soe.terminate(), 0);
}

/// A partition that moves on a disk that stays: the disk's stamps tell nothing of what lies in it
/// now, and without a new generation the next layer would miss blocks.
#[test]
fn a_partition_that_moves_is_another_volume() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    for at in 0..64 {
        write(&disk.path, at * MIB, at as u8 + 1);
    }
    let layout = |start: u64| {
        let script = format!("label: dos\nstart={start}MiB, size=16MiB\n");
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(script.as_bytes()).unwrap();
        let node = disk.node();
        device::run(
            "sh",
            &[
                "-c",
                &format!("sfdisk -q {node} < {}", file.path().display()),
            ],
        )
        .unwrap();
        device::run("partx", &["-u", node]).unwrap();
    };
    layout(8);
    let part = format!("{}p1", disk.node());
    let mut soe = Soe::new("moved", "");
    soe.start();
    soe.group("g", &[&part]);
    soe.capture("g");
    let before = soe.volume("g", &part);
    layout(32);
    let moved = becomes(&soe, &part, "the move", |v| {
        v["tracking"] == "complete" && v["generation"] != before["generation"]
    });
    assert_eq!(moved["size_bytes"], 16 * MIB);
    soe.capture("g");
    assert_eq!(soe.restored_differs("g", &part, Path::new(&part)), None);
    assert_eq!(soe.terminate(), 0);
}

#[test]
fn a_volume_that_was_away_at_the_start_is_tracked_when_it_comes() {
    need_kernel!();
    let disk = LoopDevice::new(32 * MIB).unwrap();
    let mut soe = Soe::new("late", "");
    soe.start();
    soe.group("g", &[disk.node()]);
    write(&disk.path, 0, 5);
    soe.capture("g");
    assert_eq!(soe.terminate(), 0);
    device::run("losetup", &["-d", disk.node()]).unwrap();
    soe.start();
    assert_eq!(soe.volume("g", disk.node())["tracking"], "detached");
    let why = soe.run(&["layer", "capture", "g"]).refused(1);
    assert!(why.contains(disk.node()), "{why}");
    attach(&disk);
    becomes(&soe, disk.node(), "the volume", |v| {
        v["tracking"] == "complete"
    });
    write(&disk.path, 2 * MIB, 6);
    soe.capture("g");
    assert_eq!(soe.restored_differs("g", disk.node(), &disk.path), None);
    assert_eq!(soe.terminate(), 0);
}
