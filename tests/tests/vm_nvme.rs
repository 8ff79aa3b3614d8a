//! NVMe: requests of several ranges, refused bios, passthrough, paths behind a multipath head, and a
//! disk that vanishes.

use std::fs::File;
use std::path::{Path, PathBuf};

use soe_agent::observe::volumes;
use soe_agent::seam::{ByteRange, ChangeMap, GenerationEnd, Tracking};
use soe_tests::device::{Aligned, Mounted, open_direct, run, write_direct};
use soe_tests::guest::named;
use soe_tests::kernel::{
    Bench, DISCARD_MERGES, Erase, MIB, Setting, assert_exact, assert_whole, covers, erase,
    expected, ranges, set_sysfs, settled, statistic, sysfs_of, wait_for, write_nowait,
};
use soe_tests::passthrough::{Nvme, nvme};
use soe_tests::{need_kernel, uring};

#[test]
fn writes_discards_and_zeroes_are_marked_and_counted_exactly() {
    need_kernel!();
    let node = named("SOE_VM_NVME");
    let bench = Bench::new("nvme");
    let map = bench.map(&node);
    assert!(!map.track().disk().is_bio_based());
    let before = assert_whole(&map);
    let since = map.bump().unwrap();
    let file = open_direct(&node).unwrap();
    write_direct(&file, 4096, 4096, 1).unwrap();
    // Larger than any request: split into many.
    write_direct(&file, 100 * MIB + 512, 8 << 20, 2).unwrap();
    erase(&file, Erase::Discard, 300 * MIB, 65536);
    erase(&file, Erase::Zero, 400 * MIB + 512, 3 * MIB);
    let after = assert_exact(&map, &before);
    assert_eq!(
        after.queued - before.queued,
        (4096 + (8 << 20) + 65536 + 3 * MIB) / 512
    );
    assert_eq!(
        ranges(&map, since),
        expected([
            (0, 65536),
            (100 * MIB, 8 * MIB + 65536),
            (300 * MIB, 65536),
            (400 * MIB, 3 * MIB + 65536)
        ])
    );
    assert_eq!(after.misses.failed_writes, before.misses.failed_writes);
}

#[test]
fn discards_of_scattered_ranges_in_one_request_are_marked_one_by_one() {
    need_kernel!();
    let node = named("SOE_VM_NVME");
    let file = open_direct(&node).unwrap();
    let bench = Bench::new("multirange");
    let map = bench.map(&node);
    let before = assert_whole(&map);
    let merges = statistic(&node, DISCARD_MERGES);
    let since = map.bump().unwrap();
    let scattered = [0u64, 16, 48, 32].map(|at| (at * MIB, 65536));
    if !uring::discard_at_once(&file, &scattered) {
        println!("this kernel discards one range per call; files of XFS discard several below");
        return;
    }
    assert!(
        statistic(&node, DISCARD_MERGES) > merges,
        "no request had more than one range, so nothing was shown"
    );
    let after = assert_exact(&map, &before);
    assert_eq!(after.queued - before.queued, 4 * 128);
    let mut sorted = scattered;
    sorted.sort_unstable();
    assert_eq!(ranges(&map, since), expected(sorted));
    // As many ranges as a command takes (256), twice over.
    let since = map.bump().unwrap();
    let many: Vec<(u64, u64)> = (0..512).map(|n| (n * MIB, 4096)).collect();
    assert!(uring::discard_at_once(&file, &many));
    let last = assert_whole(&map);
    assert_eq!(last.queued - after.queued, 512 * 8);
    let marked: Vec<ByteRange> = (0..512).map(|n| ByteRange::new(n * MIB, 65536)).collect();
    assert_eq!(ranges(&map, since), marked);
}

/// Blocks of 64 KiB of the first `bytes` of a device.
fn blocks(node: &Path, bytes: u64) -> Vec<blake3::Hash> {
    use std::os::unix::fs::FileExt;
    let file = open_direct(node).unwrap();
    let mut buffer = Aligned::new(MIB as usize, 0);
    let mut all = Vec::new();
    for at in (0..bytes).step_by(MIB as usize) {
        file.read_exact_at(buffer.bytes_mut(), at).unwrap();
        all.extend(buffer.bytes().chunks(65536).map(blake3::hash));
    }
    all
}

#[test]
fn no_block_that_a_filesystem_discards_in_bulk_is_missed() {
    need_kernel!();
    let node = named("SOE_VM_NVME");
    let bytes = 320 * MIB;
    run(
        "mkfs.xfs",
        &["-fq", "-d", "size=320m", &node.display().to_string()],
    )
    .unwrap();
    let mounted = Mounted::of(&node, &["-t", "xfs", "-o", "discard"]).unwrap();
    let sync = || {
        let folder = File::open(mounted.path()).unwrap();
        rustix::fs::syncfs(&folder).unwrap();
    };
    for n in 0..200 {
        let data = vec![n as u8 | 1; 200_000];
        std::fs::write(mounted.path().join(format!("f{n}")), data).unwrap();
    }
    sync();
    let bench = Bench::new("xfs");
    let map = bench.map(&node);
    assert_whole(&map);
    let before = blocks(&node, bytes);
    let merges = statistic(&node, DISCARD_MERGES);
    let since = map.bump().unwrap();
    for n in (0..200).step_by(2) {
        std::fs::remove_file(mounted.path().join(format!("f{n}"))).unwrap();
    }
    // Freed extents are discarded once the log has been written, in the background.
    wait_for("XFS never discarded in bulk", || {
        sync();
        (statistic(&node, DISCARD_MERGES) > merges).then_some(())
    });
    mounted.unmount().unwrap();
    assert_whole(&map);
    let changed = ranges(&map, since);
    let mut differ = 0;
    for (block, (old, new)) in before.iter().zip(blocks(&node, bytes)).enumerate() {
        if *old != new {
            differ += 1;
            assert!(
                covers(&changed, block as u64 * 65536, 65536),
                "block {block} changed and is not marked"
            );
        }
    }
    assert!(differ > 100, "only {differ} blocks changed");
}

/// Writes that may not wait, on a disk whose requests (`limits` is its folder in sysfs) are made few
/// and small: every bio is queued, and some end without becoming a request.
fn refuse(node: &Path, limits: &Path, name: &str) {
    let _few = Setting::new(limits.join("queue/nr_requests"), "4");
    let _small = Setting::new(limits.join("queue/max_sectors_kb"), "64");
    let bench = Bench::new(name);
    let map = bench.map(node);
    let file = open_direct(node).unwrap();
    // Pages that the partition scan left in the cache would turn the writes away before any bio.
    write_direct(&file, 0, 512 << 10, 1).unwrap();
    let before = assert_whole(&map);
    // One bio, too large for a request: to split it would be to wait.
    let large = Aligned::new(512 << 10, 3);
    let refused = (0..20)
        .filter(|_| !write_nowait(&file, 0, large.bytes()))
        .count();
    assert_eq!(refused, 20);
    let after = assert_exact(&map, &before);
    assert_eq!(after.queued - before.queued, 20 * 1024, "no bio was queued");
    // Out of tags.
    let data = Aligned::new(4096, 4);
    let offsets: Vec<u64> = (0..1024).map(|n| n * 65536).collect();
    let since = map.bump().unwrap();
    let refused = uring::write_nowait_at_once(&file, 256, &offsets, &data);
    println!("{refused} of 1024 small writes were refused");
    assert!(refused > 0, "nothing was shown");
    let last = assert_exact(&map, &after);
    assert_eq!(last.queued - after.queued, 1024 * 8, "every bio was queued");
    assert_eq!(last.misses.failed_writes, 0, "refused is not failed");
    // Marked too much, for those refused, and never too little.
    assert_eq!(ranges(&map, since), expected([(0, 1024 * 65536)]));
}

#[test]
fn bios_that_are_refused_leave_nothing_in_flight() {
    need_kernel!();
    let node = named("SOE_VM_NVME");
    refuse(&node, &sysfs_of(&node), "refused");
}

/// The namespace's character device: `/dev/ng0n1` of `/dev/nvme0n1`.
fn generic_of(node: &Path) -> PathBuf {
    let name = node.file_name().unwrap().to_string_lossy().into_owned();
    PathBuf::from(format!("/dev/{}", name.replacen("nvme", "ng", 1)))
}

/// Sends a command and tells what the map says then; the generation is begun anew.
fn after_command(node: &Path, command: impl FnOnce(&File)) -> Tracking {
    let bench = Bench::new("passthrough");
    let map = bench.map(node);
    settled(&map);
    assert_eq!(map.tracking(), Tracking::Complete);
    command(&open_direct(node).unwrap());
    let told = map.tracking();
    settled(&map);
    map.track().begin_generation().unwrap();
    assert_eq!(map.tracking(), Tracking::Complete);
    told
}

#[test]
fn passthrough_that_may_write_ends_the_generation_and_reading_does_not() {
    need_kernel!();
    for node in [named("SOE_VM_NVME"), named("SOE_VM_MULTIPATH")] {
        let suspect = Tracking::Tainted(GenerationEnd::Passthrough);
        let io = |command: Nvme| after_command(&node, |file| command.send(file).unwrap());
        let ring = |command: Nvme| {
            after_command(&node, |_| {
                let generic = File::open(generic_of(&node)).or_else(|_| {
                    File::options()
                        .read(true)
                        .write(true)
                        .open(generic_of(&node))
                });
                command.send_by_ring(&generic.unwrap()).unwrap();
            })
        };
        let mut data = Aligned::new(4096, 9);
        let mut with_data = |opcode| Nvme::new(opcode, 2048, 8).with(&mut data);
        let (write, read) = (with_data(nvme::WRITE), with_data(nvme::READ));
        let zeroes = Nvme::new(nvme::WRITE_ZEROES, 4096, 8);
        let flush = Nvme::new(nvme::FLUSH, 0, 0);
        assert_eq!(io(write), suspect, "write to {}", node.display());
        assert_eq!(io(zeroes), suspect, "write-zeroes to {}", node.display());
        assert_eq!(io(read), Tracking::Complete, "read of {}", node.display());
        assert_eq!(io(flush), Tracking::Complete, "flush of {}", node.display());
        assert_eq!(ring(write), suspect, "write to {} by ring", node.display());
        assert_eq!(
            ring(zeroes),
            suspect,
            "zeroes to {} by ring",
            node.display()
        );
        assert_eq!(ring(read), Tracking::Complete, "read of {}", node.display());
        let identify = Nvme::new(nvme::IDENTIFY, 0, 0).with(&mut data);
        assert_eq!(
            after_command(&node, |file| identify.send_admin(file).unwrap()),
            Tracking::Complete,
            "identify of {}",
            node.display()
        );
    }
}

#[test]
fn writes_through_a_multipath_head_are_marked_and_counted_once() {
    need_kernel!();
    let node = named("SOE_VM_MULTIPATH");
    let volume = volumes::resolve(&node).unwrap();
    assert_eq!(volume.disk.hidden_paths.len(), 2, "{:?}", volume.disk);
    let bench = Bench::new("head");
    let map = bench.map(&node);
    assert!(!map.track().disk().is_bio_based());
    let before = assert_whole(&map);
    let since = map.bump().unwrap();
    let file = open_direct(&node).unwrap();
    write_direct(&file, 0, 4096, 1).unwrap();
    write_direct(&file, 64 * MIB, 4 << 20, 2).unwrap();
    erase(&file, Erase::Discard, 200 * MIB, MIB);
    erase(&file, Erase::Zero, 300 * MIB, MIB);
    let after = assert_exact(&map, &before);
    assert_eq!(
        after.queued - before.queued,
        (4096 + (4 << 20) + 2 * MIB) / 512
    );
    assert_eq!(
        ranges(&map, since),
        expected([
            (0, 65536),
            (64 * MIB, 4 * MIB),
            (200 * MIB, MIB),
            (300 * MIB, MIB)
        ])
    );
    // Many at once, so that bios merge: only the first of a request has a completion of its own.
    let data = Aligned::new(4096, 3);
    let offsets: Vec<u64> = (0..2048).map(|n| n * 4096).collect();
    assert_eq!(uring::begin_writes(&file, &offsets, &data).finish(), 0);
    let last = assert_whole(&map);
    assert_eq!(last.queued - after.queued, 2048 * 8);
}

#[test]
fn bios_that_a_path_refuses_leave_nothing_in_flight() {
    need_kernel!();
    let node = named("SOE_VM_MULTIPATH");
    let head = sysfs_of(&node);
    let name = head.file_name().unwrap().to_string_lossy().into_owned();
    let (subsystem, namespace) = name.rsplit_once('n').unwrap();
    let paths: Vec<PathBuf> = std::fs::read_dir("/sys/block")
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let path = path.file_name().unwrap().to_string_lossy().into_owned();
            path.starts_with(&format!("{subsystem}c")) && path.ends_with(&format!("n{namespace}"))
        })
        .collect();
    assert_eq!(paths.len(), 2, "{paths:?}");
    // IO takes either path; one is narrowed here, the other within.
    let _few = Setting::new(paths[1].join("queue/nr_requests"), "4");
    let _small = Setting::new(paths[1].join("queue/max_sectors_kb"), "64");
    refuse(&node, &paths[0], "refused-path");
}

/// The controllers behind a namespace, as PCI devices, with the paths they carry.
fn controllers_of(node: &Path) -> Vec<PathBuf> {
    let serial = |ctrl: &Path| std::fs::read_to_string(ctrl.join("serial")).unwrap_or_default();
    let wanted = if node == named("SOE_VM_MULTIPATH") {
        "SOESHARED"
    } else {
        "SOETESTS"
    };
    let mut found: Vec<PathBuf> = std::fs::read_dir("/sys/class/nvme")
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .filter(|ctrl| serial(ctrl).starts_with(wanted))
        .map(|ctrl| ctrl.join("device").canonicalize().unwrap())
        .collect();
    found.sort();
    found
}

#[test]
fn a_path_that_goes_is_survived_and_an_unknown_one_ends_the_generation() {
    need_kernel!();
    let node = named("SOE_VM_MULTIPATH");
    let bench = Bench::new("paths");
    let map = bench.map(&node);
    assert_whole(&map);
    let generation = map.generation();
    let controllers = controllers_of(&node);
    assert_eq!(controllers.len(), 2);
    let file = open_direct(&node).unwrap();
    let paths = || volumes::resolve(&node).unwrap().disk.hidden_paths;
    set_sysfs(controllers[0].join("remove"), "1");
    wait_for("the path is still there", || {
        (paths().len() == 1).then_some(())
    });
    let since = map.bump().unwrap();
    write_direct(&file, 7 * MIB, 4096, 1).unwrap();
    settled(&map);
    assert_eq!(ranges(&map, since), expected([(7 * MIB, 65536)]));
    assert_eq!(map.tracking(), Tracking::Complete, "one path is enough");
    // Its statistics went with it.
    assert_eq!(map.track().audit().unwrap(), None);

    set_sysfs("/sys/bus/pci/rescan", "1");
    wait_for("the path did not come back", || {
        (paths().len() == 2).then_some(())
    });
    assert_eq!(
        map.tracking(),
        Tracking::Tainted(GenerationEnd::Remapped),
        "the programs do not know the new path"
    );
    // Tracked anew, both paths are known.
    let map = bench.map(&node);
    assert_ne!(map.generation(), generation);
    assert_whole(&map);
    set_sysfs(controllers[1].join("remove"), "1");
    wait_for("the path is still there", || {
        (paths().len() == 1).then_some(())
    });
    let since = map.bump().unwrap();
    write_direct(&file, 9 * MIB, 4096, 1).unwrap();
    settled(&map);
    assert_eq!(ranges(&map, since), expected([(9 * MIB, 65536)]));
    set_sysfs("/sys/bus/pci/rescan", "1");
    wait_for("the path did not come back", || {
        (paths().len() == 2).then_some(())
    });
}

#[test]
fn a_disk_that_vanishes_while_it_is_tracked_is_another_one_when_it_comes_back() {
    need_kernel!();
    let node = named("SOE_VM_NVME");
    let bench = Bench::new("vanish");
    let map = bench.map(&node);
    assert_whole(&map);
    let file = open_direct(&node).unwrap();
    write_direct(&file, MIB, 4096, 1).unwrap();
    let controllers = controllers_of(&node);
    assert_eq!(controllers.len(), 1);
    set_sysfs(controllers[0].join("remove"), "1");
    assert_eq!(map.tracking(), Tracking::Tainted(GenerationEnd::Remapped));
    assert!(write_direct(&file, MIB, 4096, 1).is_err());
    let _ = map.reading();
    if let Ok(books) = map.track().audit() {
        assert_eq!(books, None, "there is nothing to compare with");
    }
    assert!(volumes::resolve(&node).is_err());
    drop(file);
    set_sysfs("/sys/bus/pci/rescan", "1");
    wait_for("the disk did not come back", || {
        volumes::resolve(&node).ok()
    });
    assert_eq!(map.tracking(), Tracking::Tainted(GenerationEnd::Remapped));
    let again = bench.map(&node);
    assert_ne!(again.generation(), map.generation());
    assert_whole(&again);
}
