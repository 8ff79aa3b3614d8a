//! The kernel half under test: a tracker with pins of its own, and what every test asks it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use soe_agent::observe::disk::SliceMap;
use soe_agent::observe::tracker::{Tracker, TrackerOptions};
use soe_agent::observe::volumes;
use soe_agent::seam::{ByteRange, ChangeMap, Reading, Tracking};
use soe_common::Epoch;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;

/// Ends a test with a printed reason where kernel tests cannot run.
#[macro_export]
macro_rules! need_kernel {
    () => {
        if let Some(why) = $crate::device::unable() {
            println!("SKIPPED: {why}");
            return;
        }
    };
}

/// A tracker with pins of its own, removed on drop.
pub struct Bench {
    tracker: Option<Tracker>,
    options: TrackerOptions,
}

impl Bench {
    /// Attaches the programs; `name` tells this test's pins from those of others.
    pub fn new(name: &str) -> Self {
        let options = TrackerOptions {
            pin_root: format!("/sys/fs/bpf/soe-test-{}-{name}", std::process::id()).into(),
            slots: 8,
            ..TrackerOptions::default()
        };
        let tracker = Tracker::open(options.clone()).expect("tracker");
        Self {
            tracker: Some(tracker),
            options,
        }
    }

    /// The tracker.
    pub fn tracker(&self) -> &Tracker {
        self.tracker.as_ref().expect("open")
    }

    /// The agent dies, something happens, the agent comes back.
    pub fn while_away(&mut self, body: impl FnOnce()) {
        drop(self.tracker.take());
        body();
        self.tracker = Some(Tracker::open(self.options.clone()).expect("tracker"));
    }

    /// Tracks the disk of the volume at `path`.
    pub fn map(&self, path: &Path) -> SliceMap {
        let volume = volumes::resolve(path).expect("volume");
        let (track, _) = self.tracker().track(&volume.disk).expect("track");
        SliceMap::new(track, &path.display().to_string(), volume.start, volume.end).expect("slice")
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        drop(self.tracker.take());
        let _ = std::fs::remove_dir_all(&self.options.pin_root);
    }
}

/// Repeats `question` until it has an answer; panics with `what` after a limit that only a hang
/// reaches, also in a guest without a meaningful clock.
pub fn wait_for<T>(what: &str, mut question: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A reading with nothing in flight, within a bounded time.
pub fn settled(map: &dyn ChangeMap) -> Reading {
    let mut last = None;
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        map.settle().expect("settled");
        let reading = map.reading().expect("reading");
        if reading.nothing_in_flight() {
            return reading;
        }
        assert!(
            Instant::now() < deadline,
            "still in flight: {reading:?} (before: {last:?})"
        );
        last = Some(reading);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What changed since `since`.
pub fn ranges(map: &dyn ChangeMap, since: Epoch) -> Vec<ByteRange> {
    map.changed_since(since).expect("scan")
}

/// Ranges of (offset, length) in bytes.
pub fn expected<const N: usize>(of: [(u64, u64); N]) -> [ByteRange; N] {
    of.map(|(offset, len)| ByteRange::new(offset, len))
}

/// Whether `[offset, offset + len)` lies within what changed.
pub fn covers(changed: &[ByteRange], offset: u64, len: u64) -> bool {
    changed
        .iter()
        .any(|range| range.offset <= offset && offset + len <= range.end())
}

/// Sectors that the programs and the device itself counted, once the device is at rest.
pub fn books(map: &SliceMap) -> (u64, u64) {
    wait_for("the device never came to rest", || {
        map.track().audit().expect("statistics")
    })
}

/// Asserts that nothing is in flight, that the books of the programs and of the device are equal,
/// and that the map is complete. Returns the reading.
pub fn assert_whole(map: &SliceMap) -> Reading {
    let reading = settled(map);
    let (counted, device) = books(map);
    assert_eq!(counted, device, "sectors counted, and the device's own");
    assert_eq!(map.tracking(), Tracking::Complete);
    reading
}

/// [`assert_whole`], and that every event since `before` was seen: books that balance by a correction
/// are not enough. For few writes only, because a program may be skipped under load.
pub fn assert_exact(map: &SliceMap, before: &Reading) -> Reading {
    let reading = assert_whole(map);
    let lost = |reading: &Reading| {
        let misses = reading.misses;
        [misses.queue, misses.complete, misses.stash]
    };
    assert_eq!(lost(&reading), lost(before), "events that were not seen");
    reading
}

/// The words of a file in sysfs or procfs.
pub fn sysfs(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    std::fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .trim()
        .to_string()
}

/// Writes a file in sysfs, procfs or a cgroup.
pub fn set_sysfs(path: impl AsRef<Path>, value: &str) {
    let path = path.as_ref();
    std::fs::write(path, value)
        .unwrap_or_else(|error| panic!("{value:?} to {}: {error}", path.display()));
}

/// The folder in sysfs of the disk behind a node.
pub fn sysfs_of(node: &Path) -> PathBuf {
    use std::os::unix::fs::MetadataExt;
    let rdev = std::fs::metadata(node).expect("the node").rdev();
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
        .canonicalize()
        .expect("a block device")
}

/// Field `index` (from 0) of the device's own statistics (Documentation/block/stat.rst).
pub fn statistic(node: &Path, index: usize) -> u64 {
    sysfs(sysfs_of(node).join("stat"))
        .split_whitespace()
        .nth(index)
        .and_then(|n| n.parse().ok())
        .expect("a number")
}

/// Discards merged into others: with several ranges in one request, when they do not touch.
pub const DISCARD_MERGES: usize = 12;

/// How a range is changed without being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Erase {
    /// Discard.
    Discard,
    /// Write zeroes.
    Zero,
}

/// Discards or zeroes a range of a device.
pub fn erase(device: &File, how: Erase, offset: u64, len: u64) {
    if how == Erase::Discard {
        return discard(device, offset, len);
    }
    let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: a plain system call on an open file.
    let done = unsafe { libc::fallocate(device.as_raw_fd(), mode, offset as i64, len as i64) };
    assert_eq!(done, 0, "fallocate: {}", std::io::Error::last_os_error());
}

/// `BLKDISCARD` of linux/fs.h.
const BLKDISCARD: libc::c_ulong = 0x1277;

fn discard(device: &File, offset: u64, len: u64) {
    let range = [offset, len];
    // SAFETY: the request reads two words, which live through the call.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    assert_eq!(done, 0, "BLKDISCARD: {}", std::io::Error::last_os_error());
}

/// A write that does not wait; `false` when it was refused.
pub fn write_nowait(device: &File, offset: u64, data: &[u8]) -> bool {
    let vec = libc::iovec {
        iov_base: data.as_ptr() as *mut _,
        iov_len: data.len(),
    };
    // SAFETY: one live buffer.
    let written =
        unsafe { libc::pwritev2(device.as_raw_fd(), &vec, 1, offset as i64, libc::RWF_NOWAIT) };
    if written >= 0 {
        return true;
    }
    let error = std::io::Error::last_os_error();
    assert_eq!(error.raw_os_error(), Some(libc::EAGAIN), "{error}");
    false
}

/// A setting in sysfs that is put back on drop.
pub struct Setting {
    path: PathBuf,
    before: String,
}

impl Setting {
    /// Sets `path` to `value`.
    pub fn new(path: PathBuf, value: &str) -> Self {
        let before = sysfs(&path);
        // Of several words, the one in brackets is what was chosen.
        let before = before
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'))
            .map_or(before.clone(), |(chosen, _)| chosen.to_string());
        set_sysfs(&path, value);
        Self { path, before }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let _ = std::fs::write(&self.path, &self.before);
    }
}
