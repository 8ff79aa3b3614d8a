//! Device-mapper nodes: bio-based disks whose bios are split, remapped, held back and failed.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use soe_agent::seam::{ChangeMap, GenerationEnd, Tracking};
use soe_common::SECTOR_SIZE;
use soe_tests::device::{Aligned, LoopDevice, open_direct, run, write_direct};
use soe_tests::guest::{Mapper, named};
use soe_tests::kernel::{
    Bench, DISCARD_MERGES, Erase, MIB, assert_exact, assert_whole, books, covers, erase, expected,
    ranges, set_sysfs, settled, statistic, sysfs, sysfs_of, wait_for, write_nowait,
};
use soe_tests::{need_kernel, uring};

/// Bytes before the joint of the two segments of `SOE_VM_LINEAR`.
const JOINT: u64 = 65537 * SECTOR_SIZE;

#[test]
fn a_split_bio_is_marked_and_counted_by_the_range_it_was_queued_with() {
    need_kernel!();
    let node = named("SOE_VM_LINEAR");
    let bench = Bench::new("split");
    let map = bench.map(&node);
    assert!(map.track().disk().is_bio_based());
    let before = assert_whole(&map);
    let since = map.bump().unwrap();
    let file = open_direct(&node).unwrap();
    // 1,792 sectors, of which 897 lie before the joint.
    let start = JOINT - SECTOR_SIZE - 7 * 65536;
    write_direct(&file, start, 14 * 65536, 1).unwrap();
    let after = assert_exact(&map, &before);
    assert_eq!(after.queued - before.queued, 1792);
    assert_eq!(ranges(&map, since), expected([(start, 14 * 65536)]));
    // The smallest split: two sectors, one on either side.
    let since = map.bump().unwrap();
    write_direct(&file, JOINT - SECTOR_SIZE, 1024, 2).unwrap();
    let last = assert_exact(&map, &after);
    assert_eq!(last.queued - after.queued, 2);
    assert_eq!(
        ranges(&map, since),
        expected([(JOINT - SECTOR_SIZE, 65536)])
    );
}

#[test]
fn many_writers_across_a_joint_leave_nothing_in_flight_and_equal_books() {
    need_kernel!();
    let node = named("SOE_VM_LINEAR");
    let bench = Bench::new("writers");
    let map = bench.map(&node);
    let before = assert_whole(&map);
    let since = map.bump().unwrap();
    std::thread::scope(|scope| {
        for writer in 0..4u64 {
            let file = open_direct(&node).unwrap();
            scope.spawn(move || {
                let data = Aligned::new(64 << 10, writer as u8);
                let offsets: Vec<u64> = (0..64)
                    .map(|n| JOINT - SECTOR_SIZE - 32768 + 512 * ((n * 7 + writer) % 64))
                    .collect();
                assert_eq!(uring::begin_writes(&file, &offsets, &data).finish(), 0);
            });
        }
    });
    let after = assert_whole(&map);
    assert_eq!(after.queued - before.queued, 4 * 64 * 128);
    let from = (JOINT - SECTOR_SIZE - 32768) / 65536 * 65536;
    let changed = ranges(&map, since);
    assert!(covers(&changed, from, 2 * 65536), "{changed:?}");
}

#[test]
fn a_thin_volume_is_tracked_through_provisioning_discards_and_zeroes() {
    need_kernel!();
    let node = named("SOE_VM_THIN");
    let bench = Bench::new("thin");
    let map = bench.map(&node);
    assert!(map.track().disk().is_bio_based());
    let before = assert_whole(&map);
    let since = map.bump().unwrap();
    let file = open_direct(&node).unwrap();
    write_direct(&file, 0, 4096, 1).unwrap();
    // 3 MiB from the middle of a pool block on: one bio over many pool blocks.
    write_direct(&file, 8 * MIB + 4096, 3 << 20, 2).unwrap();
    let after = assert_exact(&map, &before);
    assert_eq!(after.queued - before.queued, (4096 + (3 << 20)) / 512);
    assert_eq!(
        ranges(&map, since),
        expected([(0, 65536), (8 * MIB, 3 * MIB + 65536)])
    );
    for how in [Erase::Discard, Erase::Zero] {
        let since = map.bump().unwrap();
        let before = assert_whole(&map);
        erase(&file, how, 9 * MIB, 65536);
        // Not aligned to pool blocks, over provisioned and unprovisioned ones alike.
        erase(&file, how, 10 * MIB + 4096, 40 * MIB);
        let after = assert_exact(&map, &before);
        assert_eq!(
            after.queued - before.queued,
            (65536 + 40 * MIB) / 512,
            "{how:?}"
        );
        assert_eq!(
            ranges(&map, since),
            expected([(9 * MIB, 65536), (10 * MIB, 40 * MIB + 65536)]),
            "{how:?}"
        );
    }
}

/// A node of its own over a loop disk.
fn linear_over(disk: &LoopDevice, name: &str) -> Mapper {
    let sectors = sysfs(sysfs_of(&disk.path).join("size"));
    Mapper::new(name, &format!("0 {sectors} linear {} 0", disk.node())).unwrap()
}

#[test]
fn a_write_on_a_suspended_node_is_in_flight_and_no_base_is_taken() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let node = linear_over(&disk, "suspended");
    let bench = Bench::new("suspend");
    let map = bench.map(&node.path);
    let before = assert_whole(&map);
    let since = map.bump().unwrap();
    let file = open_direct(&node.path).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let suspended = node.suspend();
        scope.spawn(|| {
            write_direct(&file, 5 * MIB, 4096, 1).unwrap();
            done.store(true, Ordering::SeqCst);
        });
        wait_for("the write was never queued", || {
            (map.reading().unwrap().queued > before.queued).then_some(())
        });
        assert_eq!(
            sysfs(sysfs_of(&node.path).join("inflight"))
                .split_whitespace()
                .collect::<Vec<_>>(),
            ["0", "0"],
            "sysfs knows nothing of it"
        );
        // Who begins to track now has not seen the write queued and may not say "nothing in flight".
        let late = Bench::new("suspend-late");
        let late_map = late.map(&node.path);
        let late_since = late_map.epoch();
        for _ in 0..20 {
            map.settle().unwrap();
            late_map.settle().unwrap();
            assert!(!map.reading().unwrap().nothing_in_flight());
            assert!(!late_map.reading().unwrap().nothing_in_flight());
            assert_eq!(map.track().audit().unwrap(), None);
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(!done.load(Ordering::SeqCst));
        drop(suspended);
        wait_for("the write never ended", || {
            done.load(Ordering::SeqCst).then_some(())
        });
        settled(&late_map);
        let (counted, device) = books(&late_map);
        assert_eq!(counted, device);
        // Its queue event was not seen, so its range is not known: on a bio-based disk only the
        // first layer, which reads everything, holds it.
        let changed = ranges(&late_map, late_since);
        assert!(changed.is_empty(), "{changed:?}");
    });
    let after = assert_whole(&map);
    assert_eq!(after.queued - before.queued, 8);
    assert_eq!(ranges(&map, since), expected([(5 * MIB, 65536)]));
}

#[test]
fn more_bios_in_flight_than_can_be_remembered_end_the_generation() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let node = linear_over(&disk, "stash");
    let bench = Bench::new("stash");
    let map = bench.map(&node.path);
    assert_whole(&map);
    let since = map.bump().unwrap();
    let file = open_direct(&node.path).unwrap();
    let data = Aligned::new(512, 7);
    // The kernel half remembers 16,384 ranges.
    let offsets: Vec<u64> = (0..17_000).map(|n| n * 1024).collect();
    let suspended = node.suspend();
    let waiting = uring::begin_writes(&file, &offsets, &data);
    wait_for("the writes were never queued", || {
        (map.tracking() != Tracking::Complete).then_some(())
    });
    drop(suspended);
    assert_eq!(waiting.finish(), 0);
    assert_eq!(
        map.tracking(),
        Tracking::Tainted(GenerationEnd::GapMiss),
        "a range was lost"
    );
    assert!(map.reading().unwrap().misses.stash > 0);
    // What was seen is marked all the same.
    assert!(covers(&ranges(&map, since), 0, 17_000 * 1024));
}

#[test]
fn after_a_lost_range_a_new_generation_finds_a_true_base() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let node = linear_over(&disk, "stash2");
    let bench = Bench::new("stash2");
    let map = bench.map(&node.path);
    assert_whole(&map);
    let file = open_direct(&node.path).unwrap();
    let data = Aligned::new(512, 7);
    let offsets: Vec<u64> = (0..17_000).map(|n| n * 1024).collect();
    let suspended = node.suspend();
    let waiting = uring::begin_writes(&file, &offsets, &data);
    wait_for("the writes were never queued", || {
        (map.tracking() != Tracking::Complete).then_some(())
    });
    drop(suspended);
    assert_eq!(waiting.finish(), 0);
    map.track().begin_generation().unwrap();
    assert_whole(&map);
    let since = map.bump().unwrap();
    write_direct(&file, 50 * MIB, 4096, 1).unwrap();
    assert_whole(&map);
    assert_eq!(ranges(&map, since), expected([(50 * MIB, 65536)]));
}

#[test]
fn failed_writes_are_counted_marked_and_part_of_the_books() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let table = format!(
        "0 65536 linear {0} 0\n65536 8192 error\n73728 57344 linear {0} 73728",
        disk.node()
    );
    let erring = Mapper::new("erring", &table).unwrap();
    let flakey = Mapper::new(
        "flakey",
        &format!("0 131072 flakey {} 0 0 1000000 1 error_writes", disk.node()),
    )
    .unwrap();
    for (node, bad) in [(&erring, 32 * MIB), (&flakey, 0)] {
        let bench = Bench::new("failed");
        let map = bench.map(&node.path);
        let before = settled(&map);
        let since = map.bump().unwrap();
        let file = open_direct(&node.path).unwrap();
        let error = write_direct(&file, bad, 8192, 1).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
        // Half of it fails, where half of it is good.
        let split = write_direct(&file, bad + 4 * MIB - 4096, 8192, 1).unwrap_err();
        assert_eq!(split.raw_os_error(), Some(libc::EIO), "{split}");
        let after = assert_whole(&map);
        assert_eq!(after.misses.failed_writes - before.misses.failed_writes, 2);
        assert_eq!(after.queued - before.queued, 32);
        assert_eq!(
            ranges(&map, since),
            expected([(bad, 65536), (bad + 4 * MIB - 65536, 131072)])
        );
    }
}

#[test]
fn a_bio_that_a_suspended_node_turns_away_is_neither_failed_nor_in_flight() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let node = linear_over(&disk, "nowait");
    let bench = Bench::new("nowait");
    let map = bench.map(&node.path);
    let before = assert_whole(&map);
    let file = open_direct(&node.path).unwrap();
    let data = Aligned::new(8192, 1);
    {
        let _suspended = node.suspend();
        for _ in 0..10 {
            assert!(!write_nowait(&file, MIB, data.bytes()));
        }
        let now = map.reading().unwrap();
        assert_eq!(now.queued - before.queued, 160, "no bio was queued");
    }
    let after = assert_whole(&map);
    assert_eq!(after.misses.failed_writes, before.misses.failed_writes);
    // The books are exact again afterwards.
    write_direct(&file, 2 * MIB, 4096, 1).unwrap();
    let (counted, device) = books(&map);
    assert_eq!(counted, device);
}

/// A node whose segments of `sectors` lie at the given bytes of `lower`: what is discarded of it in
/// one call arrives at `lower` as one bio per segment, all at once.
fn scattered_over(lower: &Path, name: &str, sectors: u64, at: &[u64]) -> Mapper {
    let table: Vec<String> = at
        .iter()
        .enumerate()
        .map(|(n, byte)| {
            let start = n as u64 * sectors;
            format!(
                "{start} {sectors} linear {} {}",
                lower.display(),
                byte / 512
            )
        })
        .collect();
    Mapper::new(name, &table.join("\n")).unwrap()
}

#[test]
fn discards_of_scattered_ranges_in_one_request_are_marked_one_by_one() {
    need_kernel!();
    let node = named("SOE_VM_NVME");
    let bench = Bench::new("scattered");
    let map = bench.map(&node);
    let scattered = [0, 16, 48, 32].map(|at| at * MIB);
    let upper = scattered_over(&node, "scattered", 128, &scattered);
    let before = assert_whole(&map);
    let merges = statistic(&node, DISCARD_MERGES);
    let since = map.bump().unwrap();
    let file = open_direct(&upper.path).unwrap();
    erase(&file, Erase::Discard, 0, 4 * 65536);
    assert_eq!(
        statistic(&node, DISCARD_MERGES) - merges,
        3,
        "it was not one request, so nothing was shown"
    );
    let after = assert_exact(&map, &before);
    assert_eq!(after.queued - before.queued, 4 * 128);
    let mut sorted = scattered.map(|at| (at, 65536));
    sorted.sort_unstable();
    assert_eq!(ranges(&map, since), expected(sorted));
}

#[test]
fn a_discard_request_of_too_many_bios_ends_the_generation() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    // A loop disk merges nothing by itself.
    set_sysfs(sysfs_of(&disk.path).join("queue/nomerges"), "0");
    for (name, bios, told) in [
        ("few", 256, Tracking::Complete),
        ("many", 257, Tracking::Tainted(GenerationEnd::GapMiss)),
    ] {
        let bench = Bench::new(name);
        let map = bench.map(&disk.path);
        assert_whole(&map);
        let at: Vec<u64> = (0..bios).map(|n| 16 * MIB + n * 4096).collect();
        let upper = scattered_over(&disk.path, name, 8, &at);
        let merges = statistic(&disk.path, DISCARD_MERGES);
        let since = map.bump().unwrap();
        let file = open_direct(&upper.path).unwrap();
        erase(&file, Erase::Discard, 0, bios * 4096);
        assert_eq!(
            statistic(&disk.path, DISCARD_MERGES) - merges,
            bios - 1,
            "it was not one request, so nothing was shown"
        );
        assert_eq!(map.tracking(), told, "{bios} bios");
        // The mark at the queue stands for what was not walked.
        assert!(covers(&ranges(&map, since), 16 * MIB, bios * 4096));
        if told == Tracking::Complete {
            assert_whole(&map);
        }
    }
}

#[test]
fn another_table_behind_the_same_node_ends_the_generation() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let table = |start: u32| format!("0 65536 linear {} {start}", disk.node());
    let node = Mapper::new("table", &table(0)).unwrap();
    let mut bench = Bench::new("table");
    let map = bench.map(&node.path);
    assert_whole(&map);
    let first = map.generation();
    // The same table once more is no change.
    node.reload(&table(0));
    assert_eq!(map.tracking(), Tracking::Complete);
    node.reload(&table(65536));
    assert_eq!(
        map.tracking(),
        Tracking::Tainted(GenerationEnd::Remapped),
        "other blocks stand behind the same numbers"
    );
    // Tracking it again is another generation, of the same disk.
    let map = bench.map(&node.path);
    assert_whole(&map);
    let second = map.generation();
    assert_ne!(second, first);
    drop(map);
    // So is a table that changes while no agent runs.
    bench.while_away(|| node.reload(&table(0)));
    let map = bench.map(&node.path);
    assert_whole(&map);
    assert_ne!(map.generation(), second);
    // A larger one is a resize, told as such or as another table.
    node.reload(&format!("0 131072 linear {} 0", disk.node()));
    assert!(matches!(map.tracking(), Tracking::Tainted(_)));
}

#[test]
fn a_change_in_a_lower_table_is_a_change_of_the_volume() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let lower = Mapper::new("lower", &format!("0 65536 linear {} 0", disk.node())).unwrap();
    let upper = Mapper::new(
        "upper",
        &format!("0 65536 linear {} 0", lower.path.display()),
    )
    .unwrap();
    let bench = Bench::new("lower");
    let map = bench.map(&upper.path);
    assert_whole(&map);
    lower.reload(&format!("0 65536 linear {} 65536", disk.node()));
    assert_eq!(
        map.tracking(),
        Tracking::Tainted(GenerationEnd::Remapped),
        "the blocks of the upper node are others now"
    );
}

#[test]
fn a_node_that_is_removed_while_tracked_is_another_volume_afterwards() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let node = linear_over(&disk, "removed");
    let bench = Bench::new("removed");
    let map = bench.map(&node.path);
    assert_whole(&map);
    let path = node.path.clone();
    drop(node);
    assert!(!path.exists());
    assert_eq!(map.tracking(), Tracking::Tainted(GenerationEnd::Remapped));
    assert!(run("dmsetup", &["info", "soe-test-removed"]).is_err());
    let _ = map.reading();
    let _ = map.track().audit();
    let node = linear_over(&disk, "removed");
    let again = bench.map(&node.path);
    assert_ne!(again.generation(), map.generation());
    assert_whole(&again);
    assert_eq!(map.tracking(), Tracking::Tainted(GenerationEnd::Remapped));
}
