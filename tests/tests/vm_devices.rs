//! Kinds of disks that only a guest has: null_blk of both kinds, md arrays, SCSI, a RAM disk.

use std::path::Path;
use std::time::Duration;

use soe_agent::capture::CapturePolicy;
use soe_agent::observe::disk::SliceMap;
use soe_agent::seam::{ChangeMap, GenerationEnd, Tracking};
use soe_tests::device::{Aligned, LoopDevice, open_direct, run, write_direct};
use soe_tests::guest::{Md, NullBlk, ScsiDebug};
use soe_tests::kernel::{
    Bench, Erase, MIB, Setting, assert_exact, assert_whole, covers, erase, expected, ranges,
    settled, statistic, sysfs, sysfs_of, wait_for,
};
use soe_tests::passthrough::{Way, scsi};
use soe_tests::torture::lies::Lie;
use soe_tests::torture::rig::{Ask, Rig, Volume};
use soe_tests::{need_kernel, uring};

/// Writes, large and small, many at once: marked exactly, counted exactly, nothing left in flight.
fn exercise(map: &SliceMap, node: &Path) {
    let before = assert_whole(map);
    let since = map.bump().unwrap();
    let file = open_direct(node).unwrap();
    write_direct(&file, 4096, 4096, 1).unwrap();
    write_direct(&file, 3 * MIB + 512, 5 << 20, 2).unwrap();
    let after = assert_exact(map, &before);
    assert_eq!(after.queued - before.queued, (4096 + (5 << 20)) / 512);
    assert_eq!(
        ranges(map, since),
        expected([(0, 65536), (3 * MIB, 5 * MIB + 65536)])
    );
    let since = map.bump().unwrap();
    let data = Aligned::new(4096, 3);
    let offsets: Vec<u64> = (0..1024).map(|n| 16 * MIB + n * 4096).collect();
    assert_eq!(uring::begin_writes(&file, &offsets, &data).finish(), 0);
    // io_uring tries without waiting first: a bio that was refused is queued once more.
    let last = assert_whole(map);
    assert!(last.queued - after.queued >= 1024 * 8);
    assert_eq!(ranges(map, since), expected([(16 * MIB, 4 * MIB)]));
}

/// A discard and a zeroed range, where the disk takes them.
fn exercise_erasing(map: &SliceMap, node: &Path) {
    let file = open_direct(node).unwrap();
    for how in [Erase::Discard, Erase::Zero] {
        let before = assert_whole(map);
        let since = map.bump().unwrap();
        erase(&file, how, 8 * MIB, MIB);
        erase(&file, how, 24 * MIB + 4096, 4096);
        let after = assert_exact(map, &before);
        assert_eq!(after.queued - before.queued, (MIB + 4096) / 512, "{how:?}");
        assert_eq!(
            ranges(map, since),
            expected([(8 * MIB, MIB), (24 * MIB, 65536)]),
            "{how:?}"
        );
    }
}

#[test]
fn null_blk_with_requests() {
    need_kernel!();
    let disk = NullBlk::new("mq", 64, &[("queue_mode", "2"), ("discard", "1")]);
    let bench = Bench::new("nullb-mq");
    let map = bench.map(&disk.path);
    assert!(!map.track().disk().is_bio_based());
    exercise(&map, &disk.path);
    exercise_erasing(&map, &disk.path);
}

#[test]
fn a_bio_based_disk_that_counts_nothing_is_marked_and_never_said_to_be_at_rest() {
    need_kernel!();
    let disk = NullBlk::new("bio", 64, &[("queue_mode", "0")]);
    let bench = Bench::new("nullb-bio");
    let map = bench.map(&disk.path);
    if sysfs_of(&disk.path).join("mq").exists() {
        println!("this kernel's null_blk has no mode without requests any more (Linux 6.10)");
        exercise(&map, &disk.path);
        return;
    }
    assert!(map.track().disk().is_bio_based());
    let since = map.bump().unwrap();
    let file = open_direct(&disk.path).unwrap();
    write_direct(&file, 3 * MIB + 512, 5 << 20, 2).unwrap();
    assert_eq!(ranges(&map, since), expected([(3 * MIB, 5 * MIB + 65536)]));
    assert_eq!(statistic(&disk.path, 6), 0, "it does not count");
    let error = map.settle().unwrap_err().to_string();
    assert!(error.contains("does not count its IO"), "{error}");
    assert!(map.reading().is_err());
    assert_eq!(map.track().audit().unwrap(), None);
}

#[test]
fn a_failed_write_stays_changed_through_the_next_layer_and_forbids_the_optimistic_cut() {
    need_kernel!();
    let disk = NullBlk::new("bad", 16, &[("queue_mode", "2")]);
    let volume = Volume {
        path: disk.path.clone(),
        look: Box::new(|_| Vec::new()),
    };
    let mut rig = Rig::new("bad", vec![volume], Lie::None);
    let ask = |settled_failures| Ask {
        policy: CapturePolicy {
            optimistic_time: Duration::from_secs(20),
            ..CapturePolicy::default()
        },
        settled_failures,
        ..Ask::default()
    };
    let read = |rig: &mut Rig, settled| {
        let layer = rig.capture(&ask(settled)).expect("a layer");
        layer.cut.volumes[0].bytes_read
    };
    assert_eq!(read(&mut rig, 0), 16 * MIB, "the baseline");
    assert_eq!(read(&mut rig, 0), 0, "nothing changed");
    disk.set("badblocks", "+8192-8199");
    let file = open_direct(&disk.path).unwrap();
    let error = write_direct(&file, 4 * MIB, 4096, 1).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    disk.set("badblocks", "-8192-8199");
    assert_eq!(rig.audit(), [""; 0], "the device counted it as well");
    let refused = rig.capture(&ask(0)).err().expect("a refusal").to_string();
    assert!(refused.contains("has not settled"), "{refused}");
    // The path has settled by the caller's word: the layer holds the range, and the next one, too,
    // because the device might have carried the write out after the cut.
    assert_eq!(read(&mut rig, 1), 65536);
    assert_eq!(read(&mut rig, 1), 65536, "once more");
    assert_eq!(read(&mut rig, 1), 0, "and no longer");
}

#[test]
fn a_raid1_array_is_tracked_by_what_is_queued_to_it() {
    need_kernel!();
    let members = [0, 1].map(|_| LoopDevice::new(64 * MIB).unwrap());
    let array = Md::new("1", "raid1", &[&members[0].path, &members[1].path]);
    let bench = Bench::new("raid1");
    let map = bench.map(&array.path);
    assert!(map.track().disk().is_bio_based());
    assert_eq!(map.track().disk().members().len(), 2);
    exercise(&map, &array.path);
}

#[test]
fn a_raid0_array_is_tracked_although_its_bios_are_split_and_remapped() {
    need_kernel!();
    let members = [0, 1].map(|_| LoopDevice::new(64 * MIB).unwrap());
    let array = Md::new("0", "raid0", &[&members[0].path, &members[1].path]);
    let bench = Bench::new("raid0");
    let map = bench.map(&array.path);
    assert!(map.track().disk().is_bio_based());
    exercise(&map, &array.path);
}

#[test]
fn a_scsi_disk_and_its_passthrough() {
    need_kernel!();
    let disk = ScsiDebug::new(64, &["lbpu=1", "lbpws=1"]);
    {
        let bench = Bench::new("scsi");
        let map = bench.map(&disk.path);
        exercise(&map, &disk.path);
        exercise_erasing(&map, &disk.path);
    }
    let file = open_direct(&disk.path).unwrap();
    let suspect = Tracking::Tainted(GenerationEnd::Passthrough);
    let mut data = Aligned::new(512, 5);
    // Command, way, bytes, and what the map may say then.
    let commands: [(&[u8], Way, usize, Tracking); 6] = [
        (
            &[0x2a, 0, 0, 0, 1, 0, 0, 0, 1, 0], // WRITE(10) of block 256
            Way::Out,
            512,
            suspect,
        ),
        (
            &[0x93, 8, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 8, 0, 0], // WRITE SAME(16) with UNMAP
            Way::Out,
            512,
            suspect,
        ),
        (&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], Way::Out, 24, suspect), // UNMAP
        (
            &[0x28, 0, 0, 0, 1, 0, 0, 0, 1, 0], // READ(10)
            Way::In,
            512,
            Tracking::Complete,
        ),
        (&[0x12, 0, 0, 0, 96, 0], Way::In, 96, Tracking::Complete), // INQUIRY
        (
            &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], // READ CAPACITY(10)
            Way::In,
            8,
            Tracking::Complete,
        ),
    ];
    for (command, way, bytes, told) in commands {
        let bench = Bench::new("sg");
        let map = bench.map(&disk.path);
        settled(&map);
        let mut buffer = Aligned::new(bytes, 0);
        if command[0] == 0x42 {
            // One descriptor: 8 blocks from 2,048 on.
            let list: [u8; 24] = [
                0, 22, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 8, 0, 0, 0, 0,
            ];
            buffer.bytes_mut().copy_from_slice(&list);
        } else {
            buffer
                .bytes_mut()
                .copy_from_slice(&data.bytes_mut()[..bytes]);
        }
        let status = scsi(&file, command, way, &mut buffer).unwrap();
        assert_eq!(status, 0, "SCSI status of {:#x}", command[0]);
        assert_eq!(map.tracking(), told, "after {:#x}", command[0]);
    }
}

#[test]
fn a_vanished_null_blk_disk_is_gone_for_the_map_too() {
    need_kernel!();
    let disk = NullBlk::new("gone", 64, &[("queue_mode", "2")]);
    let bench = Bench::new("gone");
    let map = bench.map(&disk.path);
    assert_whole(&map);
    let since = map.bump().unwrap();
    write_direct(&open_direct(&disk.path).unwrap(), MIB, 4096, 1).unwrap();
    disk.set("power", "0");
    assert_eq!(map.tracking(), Tracking::Tainted(GenerationEnd::Remapped));
    let _ = map.reading();
    let _ = map.track().audit();
    assert!(covers(&ranges(&map, since), MIB, 65536));
    disk.set("power", "1");
    assert_eq!(
        map.tracking(),
        Tracking::Tainted(GenerationEnd::Remapped),
        "it is another disk"
    );
    wait_for("no node", || disk.path.exists().then_some(()));
    let again = bench.map(&disk.path);
    assert_ne!(again.generation(), map.generation());
    assert_whole(&again);
}

#[test]
fn with_an_elevator_between_nothing_is_lost() {
    need_kernel!();
    // Built in on some kernels.
    let _ = run("modprobe", &["mq-deadline"]);
    let disk = NullBlk::new(
        "elevator",
        64,
        &[
            ("queue_mode", "2"),
            ("hw_queue_depth", "2"),
            ("discard", "1"),
        ],
    );
    let scheduler = sysfs_of(&disk.path).join("queue/scheduler");
    let _deadline = Setting::new(scheduler.clone(), "mq-deadline");
    assert!(sysfs(scheduler).contains("[mq-deadline]"));
    let bench = Bench::new("elevator");
    let map = bench.map(&disk.path);
    exercise(&map, &disk.path);
    exercise_erasing(&map, &disk.path);
}
