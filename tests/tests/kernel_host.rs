//! The kernel half on real devices: every rule of change tracking that was once broken has a test
//! here. Runs on this machine's kernel and, as the same binary, in the VMs.

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use soe_agent::observe::disk::SliceMap;
use soe_agent::observe::tracker::{Start, Tracker, TrackerOptions};
use soe_agent::observe::volumes;
use soe_agent::seam::{ByteRange, ChangeMap, Reading, Tracking};
use soe_tests::device::{self, LoopDevice, Mounted, open_direct, write_direct};
use soe_tests::kernel::{Setting, sysfs_of, write_nowait};

macro_rules! need_kernel {
    () => {
        if let Some(why) = device::unable() {
            println!("SKIPPED: {why}");
            return;
        }
    };
}

const MIB: u64 = 1 << 20;

/// A tracker with pins of its own, removed on drop.
struct Bench {
    tracker: Option<Tracker>,
    root: PathBuf,
}

impl Bench {
    fn options(root: &std::path::Path) -> TrackerOptions {
        TrackerOptions {
            pin_root: root.into(),
            slots: 8,
            ..TrackerOptions::default()
        }
    }

    fn new(name: &str) -> Self {
        let root = PathBuf::from(format!(
            "/sys/fs/bpf/soe-test-{}-{name}",
            std::process::id()
        ));
        let tracker = Tracker::open(Self::options(&root)).expect("tracker");
        Self {
            tracker: Some(tracker),
            root,
        }
    }

    fn tracker(&self) -> &Tracker {
        self.tracker.as_ref().expect("open")
    }

    fn map(&self, path: &std::path::Path) -> SliceMap {
        let volume = volumes::resolve(path).expect("volume");
        let (track, _) = self.tracker().track(&volume.disk).expect("track");
        SliceMap::new(track, &path.display().to_string(), volume.start, volume.end).expect("slice")
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        drop(self.tracker.take());
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

/// A reading with nothing in flight, within a bounded time.
fn settled(map: &dyn ChangeMap) -> Reading {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        map.settle().expect("settled");
        let reading = map.reading().expect("reading");
        if reading.nothing_in_flight() {
            return reading;
        }
        assert!(Instant::now() < deadline, "still in flight: {reading:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ranges(map: &dyn ChangeMap, since: soe_common::Epoch) -> Vec<ByteRange> {
    map.changed_since(since).expect("scan")
}

fn fallocate(file: &std::fs::File, mode: i32, offset: u64, len: u64) {
    // SAFETY: a plain system call on an open file.
    let done = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, len as i64) };
    assert_eq!(done, 0, "fallocate: {}", std::io::Error::last_os_error());
}

#[test]
fn direct_writes_are_marked_and_counted_exactly() {
    need_kernel!();
    let disk = LoopDevice::new(256 * MIB).unwrap();
    let bench = Bench::new("exact");
    let map = bench.map(&disk.path);
    let before = settled(&map);
    let since = map.bump().unwrap();
    assert_eq!(ranges(&map, since), []);
    let file = open_direct(&disk.path).unwrap();
    write_direct(&file, 0, 4096, 1).unwrap();
    write_direct(&file, 10 * MIB - 4096, 8192, 2).unwrap();
    write_direct(&file, 256 * MIB - 512, 512, 3).unwrap();
    let after = settled(&map);
    assert_eq!(after.queued - before.queued, (4096 + 8192 + 512) / 512);
    assert_eq!(
        ranges(&map, since),
        [
            ByteRange::new(0, 65536),
            ByteRange::new(10 * MIB - 65536, 131072),
            ByteRange::new(256 * MIB - 65536, 65536)
        ]
    );
    let next = map.bump().unwrap();
    assert_eq!(
        ranges(&map, next),
        [],
        "nothing changed since the second cut"
    );
    assert_eq!(map.tracking(), Tracking::Complete);
}

#[test]
fn multi_range_discards_and_write_zeroes_are_marked_wholly() {
    need_kernel!();
    let disk = LoopDevice::new(512 * MIB).unwrap();
    let mounted = Mounted::new(&disk.path, "ext4").unwrap();
    let fill = std::process::Command::new("sh")
        .arg("-c")
        .arg("for i in $(seq 64); do head -c 1000000 /dev/zero | tr '\\0' x > $0/f$i; done; sync; rm $0/f*[02468]; sync")
        .arg(mounted.path())
        .status()
        .unwrap();
    assert!(fill.success());
    let bench = Bench::new("discard");
    let map = bench.map(&disk.path);
    settled(&map);
    let since = map.bump().unwrap();
    let trimmed = device::run("fstrim", &["-v", &mounted.path().display().to_string()]).unwrap();
    assert!(trimmed.contains("trimmed"), "{trimmed}");
    settled(&map);
    let (counted, device) = bench_audit(&bench, &disk);
    assert_eq!(
        counted, device,
        "the books of the programs and of the device agree"
    );
    assert!(!ranges(&map, since).is_empty());
    assert_eq!(map.tracking(), Tracking::Complete);

    // Every block that reads differently after discards of scattered ranges is marked.
    drop(mounted);
    let file = open_direct(&disk.path).unwrap();
    for at in [0u64, 16, 48, 32] {
        write_direct(&file, at * MIB, 65536, 7).unwrap();
    }
    settled(&map);
    let since = map.bump().unwrap();
    fallocate(
        &file,
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        16 * MIB,
        65536,
    );
    fallocate(
        &file,
        libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        48 * MIB,
        8192,
    );
    fallocate(
        &file,
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        64 * MIB,
        300 * MIB,
    );
    settled(&map);
    assert_eq!(
        ranges(&map, since),
        [
            ByteRange::new(16 * MIB, 65536),
            ByteRange::new(48 * MIB, 65536),
            ByteRange::new(64 * MIB, 300 * MIB)
        ]
    );
}

fn bench_audit(bench: &Bench, disk: &LoopDevice) -> (u64, u64) {
    let volume = volumes::resolve(&disk.path).unwrap();
    let (track, _) = bench.tracker().track(&volume.disk).unwrap();
    for _ in 0..500 {
        if let Some(books) = track.audit().unwrap() {
            return books;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the device never came to rest");
}

#[test]
fn a_partition_sees_writes_through_the_whole_disk_and_only_its_own() {
    need_kernel!();
    let disk = LoopDevice::new(128 * MIB).unwrap();
    let table = "label: dos\nstart=2048, size=65536\nstart=67584, size=65536\n";
    let mut child = std::process::Command::new("sfdisk")
        .args(["-q", disk.node()])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), table.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    let _ = device::run("partx", &["-u", disk.node()]);
    let node = |n: u32| PathBuf::from(format!("{}p{n}", disk.node()));
    let deadline = Instant::now() + Duration::from_secs(5);
    while !(node(1).exists() && node(2).exists()) {
        if Instant::now() > deadline {
            make_partition_nodes(&disk);
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let bench = Bench::new("part");
    let (first, second) = (bench.map(&node(1)), bench.map(&node(2)));
    assert_eq!(first.volume_bytes(), 32 * MIB);
    let (one, two) = (settled(&first), settled(&second));
    let since = first.bump().unwrap();
    // Through the whole disk, across the border of the two partitions (33 MiB).
    let whole = open_direct(&disk.path).unwrap();
    write_direct(&whole, 33 * MIB - 8192, 16384, 9).unwrap();
    // Through the first partition's own node.
    let part = open_direct(&node(1)).unwrap();
    write_direct(&part, 0, 4096, 8).unwrap();
    assert_eq!(settled(&first).queued - one.queued, (8192 + 4096) / 512);
    assert_eq!(settled(&second).queued - two.queued, 8192 / 512);
    assert_eq!(
        ranges(&first, since),
        [
            ByteRange::new(0, 65536),
            ByteRange::new(32 * MIB - 65536, 65536)
        ]
    );
    assert_eq!(ranges(&second, since), [ByteRange::new(0, 65536)]);
}

fn make_partition_nodes(disk: &LoopDevice) {
    let name = disk.path.file_name().unwrap().to_str().unwrap().to_string();
    for n in 1..=2 {
        let dev = std::fs::read_to_string(format!("/sys/block/{name}/{name}p{n}/dev")).unwrap();
        let (major, minor) = dev.trim().split_once(':').unwrap();
        let node = format!("{}p{n}", disk.node());
        let _ = device::run("mknod", &[&node, "b", major, minor]);
    }
}

#[test]
fn refused_nowait_writes_do_not_stay_in_flight() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let bench = Bench::new("nowait");
    let map = bench.map(&disk.path);
    settled(&map);
    let file = open_direct(&disk.path).unwrap();
    // One bio above the largest request: RWF_NOWAIT turns it away where it would have to be split.
    let _small = Setting::new(sysfs_of(&disk.path).join("queue/max_sectors_kb"), "64");
    let data = device::Aligned::new(512 << 10, 7);
    // Pages that the partition scan left in the cache would turn the writes away before any bio.
    write_direct(&file, 0, data.bytes().len(), 7).unwrap();
    let before = settled(&map);
    let refused = (0..200)
        .filter(|_| !write_nowait(&file, 0, data.bytes()))
        .count();
    println!("{refused} of 200 writes were refused");
    let after = settled(&map);
    assert_eq!(refused, 200);
    assert_eq!(
        after.queued - before.queued,
        200 * 1024,
        "no bio was queued"
    );
    let (counted, device) = bench_audit(&bench, &disk);
    assert_eq!(counted, device);
    assert_eq!(map.tracking(), Tracking::Complete);
}

#[test]
fn bio_based_disks_are_tracked_by_the_range_at_queue_time() {
    need_kernel!();
    let Ok(id) = std::fs::read_to_string("/sys/class/zram-control/hot_add") else {
        assert!(
            std::env::var_os("SOE_VM").is_some(),
            "this machine is expected to have zram"
        );
        println!("SKIPPED: no zram module in this kernel");
        return;
    };
    struct Zram(String);
    impl Drop for Zram {
        fn drop(&mut self) {
            let _ = std::fs::write(format!("/sys/block/zram{}/reset", self.0), "1");
            let _ = std::fs::write("/sys/class/zram-control/hot_remove", &self.0);
        }
    }
    let zram = Zram(id.trim().to_string());
    std::fs::write(format!("/sys/block/zram{}/disksize", zram.0), "67108864").unwrap();
    let node = PathBuf::from(format!("/dev/zram{}", zram.0));
    let bench = Bench::new("zram");
    let map = bench.map(&node);
    assert!(map.track().disk().is_bio_based());
    let before = settled(&map);
    let since = map.bump().unwrap();
    let file = open_direct(&node).unwrap();
    // Large enough to be split.
    write_direct(&file, 3 * MIB, 5 << 20, 5).unwrap();
    write_direct(&file, 60 * MIB, 4096, 6).unwrap();
    let after = settled(&map);
    assert_eq!(after.queued - before.queued, ((5 << 20) + 4096) / 512);
    assert_eq!(
        ranges(&map, since),
        [
            ByteRange::new(3 * MIB, 5 * MIB),
            ByteRange::new(60 * MIB, 65536)
        ]
    );
    assert_eq!(map.tracking(), Tracking::Complete);
}

#[test]
fn tracking_goes_on_while_no_agent_runs_and_is_adopted() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let mut bench = Bench::new("adopt");
    assert_eq!(bench.tracker().start(), Start::Fresh);
    let (since, generation) = {
        let map = bench.map(&disk.path);
        settled(&map);
        (map.bump().unwrap(), map.generation())
    };
    drop(bench.tracker.take());
    let file = open_direct(&disk.path).unwrap();
    write_direct(&file, 7 * MIB, 4096, 1).unwrap();
    bench.tracker = Some(Tracker::open(Bench::options(&bench.root)).unwrap());
    assert_eq!(bench.tracker().start(), Start::Adopted);
    let map = bench.map(&disk.path);
    assert_eq!(map.generation(), generation);
    assert_eq!(ranges(&map, since), [ByteRange::new(7 * MIB, 65536)]);
    settled(&map);
    let second = Tracker::open(Bench::options(&bench.root));
    assert!(second.err().unwrap().to_string().contains("another agent"));
}

#[test]
fn an_upgrade_carries_stamps_and_generation_over() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let mut bench = Bench::new("upgrade");
    let (since, generation) = {
        let map = bench.map(&disk.path);
        settled(&map);
        (map.bump().unwrap(), map.generation())
    };
    let file = open_direct(&disk.path).unwrap();
    write_direct(&file, 7 * MIB, 4096, 1).unwrap();
    drop(bench.tracker.take());
    write_direct(&file, 9 * MIB, 4096, 1).unwrap();
    // Another number of slots is another set of programs and maps, as a new version would be.
    let more = TrackerOptions {
        slots: 16,
        ..Bench::options(&bench.root)
    };
    bench.tracker = Some(Tracker::open(more).unwrap());
    assert_eq!(bench.tracker().start(), Start::Upgraded);
    let map = bench.map(&disk.path);
    write_direct(&file, 11 * MIB, 4096, 1).unwrap();
    assert_eq!(map.generation(), generation);
    settled(&map);
    assert_eq!(
        ranges(&map, since),
        [7u64, 9, 11].map(|at| ByteRange::new(at * MIB, 65536))
    );
}

#[test]
fn a_grown_disk_taints_and_a_swapped_backing_file_is_another_disk() {
    need_kernel!();
    let disk = LoopDevice::new(64 * MIB).unwrap();
    let bench = Bench::new("grow");
    let map = bench.map(&disk.path);
    settled(&map);
    std::fs::OpenOptions::new()
        .write(true)
        .open(disk.backing())
        .unwrap()
        .set_len(192 * MIB)
        .unwrap();
    device::run("losetup", &["-c", disk.node()]).unwrap();
    let file = open_direct(&disk.path).unwrap();
    write_direct(&file, 190 * MIB, 4096, 1).unwrap();
    settled(&map);
    assert!(
        matches!(map.tracking(), Tracking::Tainted(_)),
        "{:?}",
        map.tracking()
    );
}

#[test]
fn verifier_cost_of_every_program_is_recorded() {
    need_kernel!();
    let bench = Bench::new("cost");
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    for (name, info) in bench.tracker().program_report().unwrap() {
        println!(
            "verifier {} {name} {} instructions",
            kernel.trim(),
            info.verified_insns
        );
        assert!(info.verified_insns > 0 && info.verified_insns < 500_000);
    }
}
