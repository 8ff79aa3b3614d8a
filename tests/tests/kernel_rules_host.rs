//! Rules of change tracking on disks that every kernel has: writes held back by a control group,
//! discards of any length, a disk that does not count, and disks that are swapped or vanish.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use soe_agent::seam::{ChangeMap, GenerationEnd, Tracking};
use soe_tests::device::{LoopDevice, open_direct, run, write_direct};
use soe_tests::guest::Throttle;
use soe_tests::kernel::{
    Bench, DISCARD_MERGES, Erase, MIB, Setting, assert_whole, books, covers, erase, expected,
    ranges, set_sysfs, settled, statistic, sysfs_of, wait_for,
};
use soe_tests::{need_kernel, uring};

#[test]
fn a_write_held_back_before_tracking_began_is_marked_when_it_completes() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let throttle = Throttle::new("held", &disk.path).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let free = throttle.hold();
        throttle.within(|| {
            let (entered, ready) = std::sync::mpsc::channel();
            let (path, done) = (&disk.path, &done);
            scope.spawn(move || {
                let file = open_direct(path).unwrap();
                entered.send(()).unwrap();
                write_direct(&file, 5 * MIB, 8192, 1).unwrap();
                done.store(true, Ordering::SeqCst);
            });
            ready.recv().unwrap();
            std::thread::sleep(Duration::from_millis(300));
        });
        assert!(!done.load(Ordering::SeqCst), "the write was not held back");
        let bench = Bench::new("held");
        let map = bench.map(&disk.path);
        // The device knows nothing of the write: a base is found, and it is a false one where the
        // queue event has fired already.
        settled(&map);
        let since = map.bump().unwrap();
        // Another writer, that nobody holds back, is seen as always.
        write_direct(&open_direct(&disk.path).unwrap(), 9 * MIB, 4096, 2).unwrap();
        settled(&map);
        drop(free);
        wait_for("the write never ended", || {
            done.load(Ordering::SeqCst).then_some(())
        });
        settled(&map);
        assert_eq!(
            ranges(&map, since),
            expected([(5 * MIB, 65536), (9 * MIB, 65536)])
        );
        // The counters are of use again.
        write_direct(&open_direct(&disk.path).unwrap(), 20 * MIB, 4096, 2).unwrap();
        settled(&map);
        let (counted, device) = books(&map);
        assert_eq!(counted, device);
        assert_eq!(map.tracking(), Tracking::Complete);
    });
}

#[test]
fn writes_held_back_while_tracked_leave_nothing_in_flight_and_equal_books() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let throttle = Throttle::new("slow", &disk.path).unwrap();
    let bench = Bench::new("slow");
    let map = bench.map(&disk.path);
    let before = assert_whole(&map);
    let since = map.bump().unwrap();
    // 256 KiB at 1 MiB/s: all but the first are held back, and large ones are split there.
    throttle.set(Some(1 << 20));
    throttle.within(|| {
        std::thread::scope(|scope| {
            for writer in 0..4u64 {
                let path = &disk.path;
                scope.spawn(move || {
                    let file = open_direct(path).unwrap();
                    write_direct(&file, writer * MIB, 65536, 1).unwrap();
                });
            }
        });
    });
    throttle.set(None);
    let after = assert_whole(&map);
    assert_eq!(after.queued - before.queued, 4 * 128);
    assert_eq!(
        ranges(&map, since),
        expected([0, MIB, 2 * MIB, 3 * MIB].map(|at| (at, 65536)))
    );
}

#[test]
fn a_cut_between_hold_and_completion_misses_no_block() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let throttle = Throttle::new("cut", &disk.path).unwrap();
    let bench = Bench::new("cut");
    let map = bench.map(&disk.path);
    assert_whole(&map);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let free = throttle.hold();
        throttle.within(|| {
            let (path, done) = (&disk.path, &done);
            scope.spawn(move || {
                let file = open_direct(path).unwrap();
                write_direct(&file, 5 * MIB, 8192, 1).unwrap();
                done.store(true, Ordering::SeqCst);
            });
            std::thread::sleep(Duration::from_millis(300));
        });
        assert!(!done.load(Ordering::SeqCst), "the write was not held back");
        // Three cuts, as far as the map is concerned, while it waits.
        for _ in 0..3 {
            map.bump().unwrap();
        }
        let since = map.epoch();
        drop(free);
        wait_for("the write never ended", || {
            done.load(Ordering::SeqCst).then_some(())
        });
        assert!(covers(&ranges(&map, since), 5 * MIB, 65536));
        assert_whole(&map);
    });
}

#[test]
fn one_discard_may_cover_a_whole_large_disk() {
    need_kernel!();
    let bytes = 64 << 30;
    let disk = LoopDevice::new(bytes).unwrap();
    let bench = Bench::new("large");
    let map = bench.map(&disk.path);
    let before = assert_whole(&map);
    let file = open_direct(&disk.path).unwrap();
    write_direct(&file, bytes - 4096, 4096, 1).unwrap();
    settled(&map);
    let since = map.bump().unwrap();
    erase(&file, Erase::Discard, 0, bytes);
    let after = assert_whole(&map);
    assert_eq!(after.queued - before.queued, bytes / 512 + 8);
    assert_eq!(ranges(&map, since), expected([(0, bytes)]));
    // Neither end at a chunk's border (64 MiB), nor at a block's.
    let since = map.bump().unwrap();
    let (from, len) = (63 * MIB + 4096, (5 << 30) + 8192);
    erase(&file, Erase::Discard, from, len);
    assert_whole(&map);
    let end = (from + len).next_multiple_of(65536);
    assert_eq!(ranges(&map, since), expected([(63 * MIB, end - 63 * MIB)]));
    // A chunk that was discarded whole and one block of which is written again afterwards.
    let since = map.bump().unwrap();
    write_direct(&file, 256 * MIB, 4096, 1).unwrap();
    assert_whole(&map);
    assert_eq!(ranges(&map, since), expected([(256 * MIB, 65536)]));
}

/// Discards of `count` blocks of 4 KiB that touch one another, handed over at once, so that they merge
/// into one request; `None` where the kernel discards one range per call. How many bios merged into
/// others.
fn merged_discards(disk: &LoopDevice, count: u64) -> Option<u64> {
    // A loop disk merges nothing by itself.
    let _merging = Setting::new(sysfs_of(&disk.path).join("queue/nomerges"), "0");
    let before = statistic(&disk.path, DISCARD_MERGES);
    let file = open_direct(&disk.path).unwrap();
    let all: Vec<(u64, u64)> = (0..count).map(|n| (16 * MIB + n * 4096, 4096)).collect();
    if !uring::discard_at_once(&file, &all) {
        println!("this kernel discards one range per call (before Linux 6.12); see vm_mapper");
        return None;
    }
    Some(statistic(&disk.path, DISCARD_MERGES) - before)
}

#[test]
fn a_discard_request_of_as_many_bios_as_are_walked_is_marked_wholly() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let bench = Bench::new("walk");
    let map = bench.map(&disk.path);
    let before = assert_whole(&map);
    let since = map.bump().unwrap();
    let Some(merged) = merged_discards(&disk, 256) else {
        return;
    };
    println!("{merged} of 256 discards merged");
    assert!(merged > 128, "nothing was shown");
    let after = assert_whole(&map);
    assert_eq!(after.queued - before.queued, 256 * 8);
    assert_eq!(ranges(&map, since), expected([(16 * MIB, MIB)]));
}

#[test]
fn a_discard_request_of_too_many_bios_ends_the_generation() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let bench = Bench::new("walk2");
    let map = bench.map(&disk.path);
    assert_whole(&map);
    let since = map.bump().unwrap();
    let Some(merged) = merged_discards(&disk, 400) else {
        return;
    };
    println!("{merged} of 400 discards merged");
    assert!(
        merged >= 257,
        "no request was too long, so nothing was shown"
    );
    assert_eq!(map.tracking(), Tracking::Tainted(GenerationEnd::GapMiss));
    // The mark at the queue stands for what was not walked.
    assert!(covers(&ranges(&map, since), 16 * MIB, 400 * 4096));
    map.track().begin_generation().unwrap();
    assert_eq!(map.tracking(), Tracking::Complete);
}

#[test]
fn after_a_discard_that_was_not_walked_to_its_end_a_new_generation_finds_a_true_base() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let bench = Bench::new("walk3");
    let map = bench.map(&disk.path);
    assert_whole(&map);
    let Some(merged) = merged_discards(&disk, 400) else {
        return;
    };
    assert!(merged >= 257);
    assert_ne!(map.tracking(), Tracking::Complete);
    map.track().begin_generation().unwrap();
    assert_whole(&map);
}

#[test]
fn scattered_discards_handed_over_at_once_are_marked_one_by_one() {
    need_kernel!();
    let disk = LoopDevice::new(512 * MIB).unwrap();
    let bench = Bench::new("at-once");
    let map = bench.map(&disk.path);
    assert_whole(&map);
    let since = map.bump().unwrap();
    let file = open_direct(&disk.path).unwrap();
    let scattered: Vec<(u64, u64)> = [0u64, 16, 48, 32].map(|at| (at * MIB, 65536)).into();
    if !uring::discard_at_once(&file, &scattered) {
        println!("this kernel discards one range per call (before Linux 6.12)");
        for &(offset, len) in &scattered {
            erase(&file, Erase::Discard, offset, len);
        }
    }
    assert_whole(&map);
    let mut sorted = [0u64, 16, 48, 32].map(|at| (at * MIB, 65536));
    sorted.sort_unstable();
    assert_eq!(ranges(&map, since), expected(sorted));
}

#[test]
fn a_disk_that_does_not_count_is_never_said_to_be_at_rest_and_never_audited() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let iostats = sysfs_of(&disk.path).join("queue/iostats");
    set_sysfs(&iostats, "0");
    let bench = Bench::new("iostats");
    let map = bench.map(&disk.path);
    let since = map.epoch();
    let file = open_direct(&disk.path).unwrap();
    write_direct(&file, 5 * MIB, 4096, 1).unwrap();
    let refused = |error: String| {
        assert!(
            error.contains("does not count its IO") && error.contains("queue/iostats"),
            "{error}"
        );
    };
    for _ in 0..3 {
        refused(map.reading().unwrap_err().to_string());
    }
    assert_eq!(map.track().audit().unwrap(), None);
    // What it marks it marks all the same.
    assert_eq!(ranges(&map, since), expected([(5 * MIB, 65536)]));
    set_sysfs(&iostats, "1");
    assert_whole(&map);
    // Switched off later it is no witness any more.
    set_sysfs(&iostats, "0");
    write_direct(&file, 7 * MIB, 4096, 1).unwrap();
    refused(map.settle().unwrap_err().to_string());
    assert!(!map.reading().unwrap().nothing_in_flight());
    assert_eq!(map.track().audit().unwrap(), None);
}

/// `LOOP_CHANGE_FD` of linux/loop.h: another backing file behind a read-only loop disk.
const LOOP_CHANGE_FD: libc::c_ulong = 0x4c06;

fn change_backing(node: &File, file: &File) -> io::Result<()> {
    // SAFETY: the request takes a descriptor by value.
    match unsafe { libc::ioctl(node.as_raw_fd(), LOOP_CHANGE_FD, file.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[test]
fn another_backing_file_behind_a_loop_disk_is_another_disk() {
    need_kernel!();
    let file = || {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 * MIB).unwrap();
        file
    };
    let (first, second) = (file(), file());
    let attach = |file: &tempfile::NamedTempFile| {
        let name = file.path().display().to_string();
        let node =
            std::path::PathBuf::from(run("losetup", &["-f", "--show", "-r", &name]).unwrap());
        set_sysfs(sysfs_of(&node).join("queue/iostats"), "1");
        node
    };
    struct Attached(std::path::PathBuf);
    impl Drop for Attached {
        fn drop(&mut self) {
            let _ = run("losetup", &["-d", &self.0.display().to_string()]);
        }
    }
    let one = Attached(attach(&first));
    let bench = Bench::new("swap");
    let map = bench.map(&one.0);
    settled(&map);
    assert_eq!(map.tracking(), Tracking::Complete);
    change_backing(&File::open(&one.0).unwrap(), second.as_file()).unwrap();
    assert_eq!(map.tracking(), Tracking::Tainted(GenerationEnd::Remapped));
    let again = bench.map(&one.0);
    assert_ne!(again.generation(), map.generation());
    assert_eq!(again.tracking(), Tracking::Complete);
    assert_ne!(
        again.track().disk().diskseq,
        map.track().disk().diskseq,
        "the kernel's own word for it"
    );
}

#[test]
fn a_loop_disk_that_is_detached_while_it_is_tracked_is_gone_for_the_map_too() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let bench = Bench::new("detached");
    let map = bench.map(&disk.path);
    assert_whole(&map);
    let since = map.bump().unwrap();
    write_direct(&open_direct(&disk.path).unwrap(), MIB, 4096, 1).unwrap();
    settled(&map);
    drop(disk);
    wait_for("the disk is still there", || {
        (map.tracking() != Tracking::Complete).then_some(())
    });
    assert_eq!(map.tracking(), Tracking::Tainted(GenerationEnd::Remapped));
    let _ = map.reading();
    let _ = map.track().audit();
    assert_eq!(ranges(&map, since), expected([(MIB, 65536)]));
    // Its slot serves another disk.
    bench.tracker().retain(|_| false).unwrap();
    let other = LoopDevice::new(64 * MIB).unwrap();
    let map = bench.map(&other.path);
    assert_whole(&map);
    assert_eq!(ranges(&map, soe_common::Epoch::FIRST), []);
}

#[test]
fn writes_to_one_disk_are_not_marked_on_another() {
    need_kernel!();
    let (one, two) = (
        LoopDevice::new(32 * MIB).unwrap(),
        LoopDevice::new(32 * MIB).unwrap(),
    );
    let bench = Bench::new("two");
    let (first, second) = (bench.map(&one.path), bench.map(&two.path));
    assert_whole(&first);
    assert_whole(&second);
    let (since, other) = (first.bump().unwrap(), second.bump().unwrap());
    write_direct(&open_direct(&one.path).unwrap(), MIB, 4096, 1).unwrap();
    assert_whole(&first);
    assert_whole(&second);
    assert_eq!(ranges(&first, since), expected([(MIB, 65536)]));
    assert_eq!(ranges(&second, other), []);
    assert_ne!(first.generation(), second.generation());
}
