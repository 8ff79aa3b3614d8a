//! Tests of whole restores: onto memory, onto files, onto loop devices.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::layer::fs::SimFs;
use crate::layer::tests::support::*;
use crate::layer::{ErrorClass, Hash32, Image, LayerKind, LayerStore, Source};
use crate::seam::{BlockWriter, ByteRange};

/// A target in memory that notes what is written.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    writes: Mutex<Vec<ByteRange>>,
    fails_after: usize,
}

impl Memory {
    fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Mutex::new(bytes),
            writes: Mutex::new(Vec::new()),
            fails_after: usize::MAX,
        }
    }

    fn put(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut writes = self.writes.lock().unwrap();
        if writes.len() >= self.fails_after {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        writes.push(ByteRange::new(offset, data.len() as u64));
        self.bytes.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn written(&self) -> u64 {
        self.writes
            .lock()
            .unwrap()
            .iter()
            .map(|range| range.len)
            .sum()
    }
}

impl BlockWriter for Memory {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.put(offset, data)
    }
    fn zero_at(&self, range: ByteRange) -> io::Result<()> {
        self.put(range.offset, &vec![0; range.len as usize])
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Target for Memory {
    fn name(&self) -> &str {
        "memory"
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }
    fn starts_zeroed(&self) -> bool {
        false
    }
}

struct Staged(BTreeMap<[u8; 32], Vec<u8>>);

impl StagedBlocks for Staged {
    fn get(&self, hash: &[u8; 32], buf: &mut [u8]) -> bool {
        let Some(block) = self.0.get(hash).filter(|block| block.len() == buf.len()) else {
            return false;
        };
        buf.copy_from_slice(block);
        true
    }
}

fn run(
    image: &Image,
    target: &dyn Target,
    staged: &dyn StagedBlocks,
    mode: Mode,
) -> Result<RestoreStats, RestoreError> {
    let plan = plan(image.index(), &[]);
    restore(image, &plan, target, staged, mode, &mut |_| {
        ControlFlow::Continue(())
    })
}

/// A store with four layers of one volume of 60 blocks, and their images.
fn store() -> (SimFs, LayerStore, Vec<Vec<u8>>) {
    let fs = SimFs::new(3);
    let store = open(&fs, 1).unwrap();
    let mut volumes = Volumes::new(&[60 * BLOCK - 11]);
    (0..40).for_each(|block| volumes.write(0, block, block % 7 * 3));
    let mut images = Vec::new();
    for (round, kind) in [
        LayerKind::Baseline,
        LayerKind::Differential,
        LayerKind::Rescan,
        LayerKind::Differential,
    ]
    .into_iter()
    .enumerate()
    {
        let round = round as u64;
        (round * 9..round * 9 + 12)
            .step_by(2)
            .for_each(|block| volumes.write(0, block, 101 + 2 * (block + round)));
        (round * 5..round * 5 + 3).for_each(|block| volumes.write(0, block, 0));
        volumes.write(0, 59, 11 + round);
        volumes.capture(&store, kind).unwrap();
        images.push(volumes.images[0].clone());
    }
    (fs, store, images)
}

fn image(store: &LayerStore, sequence: u64) -> Image {
    store.image(GROUP, &volume_name(0), Some(sequence)).unwrap()
}

fn rubbish(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fill(&mut bytes, 999);
    bytes
}

#[test]
fn every_layer_is_restored_byte_for_byte_over_whatever_was_there() {
    let (_, store, images) = store();
    for (sequence, expected) in (1..).zip(&images) {
        let target = Memory::new(rubbish(expected.len()));
        let stats = run(&image(&store, sequence), &target, &NoStaging, Mode::Full).unwrap();
        assert!(
            &*target.bytes.lock().unwrap() == expected,
            "layer {sequence}"
        );
        assert_eq!(
            stats.bytes_from_store + stats.bytes_zeroed,
            expected.len() as u64
        );
        assert_eq!(target.written(), expected.len() as u64, "each block once");
        assert_eq!((stats.bytes_from_staging, stats.bytes_unchanged), (0, 0));
    }
}

#[test]
fn the_order_is_newest_first_and_by_address_inside_a_layer() {
    let (_, store, _) = store();
    let image = image(&store, 4);
    let plan = plan(image.index(), &[]);
    let places: Vec<_> = plan.layers.iter().map(|layer| layer.layer).collect();
    assert_eq!(places, [0, 1, 2, 3]);
    for layer in &plan.layers {
        assert!(layer.steps.iter().all(|step| step.layer == layer.layer));
        assert!(
            layer
                .steps
                .windows(2)
                .all(|pair| pair[0].end() <= pair[1].start)
        );
    }
    let target = Memory::new(rubbish(60 * BLOCK));
    run(&image, &target, &NoStaging, Mode::Full).unwrap();
    // The writes themselves: descending only when the next layer begins.
    let writes = target.writes.lock().unwrap();
    let turns = writes
        .windows(2)
        .filter(|pair| pair[1].offset < pair[0].offset)
        .count();
    assert_eq!(turns, 3, "{writes:?}");
}

#[test]
fn a_hot_range_behind_the_end_of_the_volume_makes_no_block_hot() {
    let (_, store, _) = store();
    let image = image(&store, 1);
    let end = image.index().volume_bytes();
    let behind = [ByteRange::new(end, 1)];
    assert_eq!(plan(image.index(), &behind), plan(image.index(), &[]));
}

proptest! {
    #[test]
    fn a_plan_has_each_block_once_newest_first_and_hot_ones_first_inside_a_layer(
        sequence in 1u64..5, hot in proptest::collection::vec((0u64..33_000, 0u64..6_000), 0..6)
    ) {
        let (_, store, images) = store();
        let image = image(&store, sequence);
        let hot: Vec<_> = hot.into_iter().map(|(offset, len)| ByteRange::new(offset, len)).collect();
        let plan = plan(image.index(), &hot);
        prop_assert_eq!(plan.block_count(), image.index().block_count());
        let rank = |block: u64| {
            let range = image.index().block_range(block);
            hot.iter().position(|hot| hot.len > 0 && hot.offset < range.end() && range.offset < hot.end())
                .unwrap_or(usize::MAX)
        };
        let mut seen = BTreeSet::new();
        let mut last = None;
        for step in plan.steps() {
            for nth in 0..step.count {
                let block = step.start + nth;
                prop_assert!(seen.insert(block), "block {} twice", block);
                let place = (step.layer, rank(block), block);
                prop_assert!(last < Some(place), "{:?} before {:?}", last, place);
                last = Some(place);
                let found = image.index().lookup(block).map(|(layer, entry)| (layer, *entry));
                let planned = image.index().entry(step, nth).map(|entry| (step.layer, *entry));
                prop_assert_eq!(found, planned);
                prop_assert_eq!(found.is_none(), step.source == Source::Hole);
            }
        }
        let expected = &images[sequence as usize - 1];
        let target = Memory::new(rubbish(expected.len()));
        restore(&image, &plan, &target, &NoStaging, Mode::Full, &mut |_| ControlFlow::Continue(())).unwrap();
        prop_assert!(&*target.bytes.lock().unwrap() == expected);
    }
}

#[test]
fn a_differential_restore_writes_only_what_differs() {
    let (_, store, images) = store();
    for (from, present) in images.iter().enumerate() {
        for (to, expected) in images.iter().enumerate() {
            let target = Memory::new(present.clone());
            let stats = run(
                &image(&store, to as u64 + 1),
                &target,
                &NoStaging,
                Mode::Differential,
            )
            .unwrap();
            assert!(&*target.bytes.lock().unwrap() == expected, "{from} to {to}");
            let blocks = present.chunks(BLOCK).zip(expected.chunks(BLOCK));
            let differing: usize = blocks.filter(|(a, b)| a != b).map(|(a, _)| a.len()).sum();
            assert_eq!(target.written(), differing as u64, "{from} to {to}");
            assert_eq!(stats.bytes_unchanged, (expected.len() - differing) as u64);
        }
    }
}

#[test]
fn staged_blocks_are_used_when_they_are_what_they_say_and_only_then() {
    let (_, store, images) = store();
    let expected = &images[3];
    let data: Vec<_> = expected
        .chunks(BLOCK)
        .filter(|block| block.iter().any(|&byte| byte != 0))
        .collect();
    let data_bytes: usize = data.iter().map(|block| block.len()).sum();
    let good = Staged(
        data.iter()
            .map(|block| (Hash32::of(block).0, block.to_vec()))
            .collect(),
    );
    let stale = Staged(
        data.iter()
            .map(|block| (Hash32::of(block).0, vec![5; block.len()]))
            .collect(),
    );
    let target = Memory::new(rubbish(expected.len()));
    let stats = run(&image(&store, 4), &target, &good, Mode::Full).unwrap();
    assert!(&*target.bytes.lock().unwrap() == expected);
    assert_eq!(
        (stats.bytes_from_staging, stats.bytes_from_store),
        (data_bytes as u64, 0)
    );
    let target = Memory::new(rubbish(expected.len()));
    let stats = run(&image(&store, 4), &target, &stale, Mode::Full).unwrap();
    assert!(
        &*target.bytes.lock().unwrap() == expected,
        "a lying stage must not reach the target"
    );
    assert_eq!(
        (stats.bytes_from_staging, stats.bytes_from_store),
        (0, data_bytes as u64)
    );
    assert_eq!(stats.staged_mismatches, data.len() as u64);
}

#[test]
fn a_damaged_block_stops_the_restore_before_anything_wrong_is_written() {
    let (fs, store, images) = store();
    let layer = store.head(GROUP).unwrap().unwrap();
    let segment = fs
        .files()
        .into_iter()
        .find(|path| path.contains(&layer.attempt.to_string()) && path.ends_with(".segment"));
    // The last block's bytes are the file's last.
    fs.tamper(&segment.unwrap(), |bytes| {
        *bytes.last_mut().unwrap() ^= 0x40
    });
    let before = rubbish(images[3].len());
    let target = Memory::new(before.clone());
    let error = run(&image(&store, 4), &target, &NoStaging, Mode::Full).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Integrity, "{error}");
    let after = target.bytes.lock().unwrap();
    for ((before, after), expected) in before
        .chunks(BLOCK)
        .zip(after.chunks(BLOCK))
        .zip(images[3].chunks(BLOCK))
    {
        assert!(after == before || after == expected);
    }
}

#[test]
fn a_restore_that_failed_or_was_cancelled_is_resumed_by_a_differential_one() {
    let (_, store, images) = store();
    let expected = &images[3];
    let image = image(&store, 4);
    let whole = Memory::new(rubbish(expected.len()));
    run(&image, &whole, &NoStaging, Mode::Full).unwrap();
    for fails_after in 0..whole.writes.lock().unwrap().len() {
        let mut target = Memory::new(rubbish(expected.len()));
        target.fails_after = fails_after;
        let error = run(&image, &target, &NoStaging, Mode::Full).unwrap_err();
        assert_eq!(error.class(), ErrorClass::Failed);
        let had = target.written();
        target.fails_after = usize::MAX;
        let stats = run(&image, &target, &NoStaging, Mode::Differential).unwrap();
        assert!(&*target.bytes.lock().unwrap() == expected);
        assert_eq!(
            stats.bytes_unchanged, had,
            "what was there already is left alone"
        );
    }
    let target = Memory::new(rubbish(expected.len()));
    let plan = plan(image.index(), &[]);
    let mut reports = Vec::new();
    let error = restore(
        &image,
        &plan,
        &target,
        &NoStaging,
        Mode::Full,
        &mut |progress| {
            reports.push(*progress);
            if reports.len() == 3 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        },
    );
    assert!(matches!(error, Err(RestoreError::Cancelled { .. })));
    assert!(
        reports
            .windows(2)
            .all(|pair| pair[0].bytes_done <= pair[1].bytes_done)
    );
    assert_eq!(
        reports[2].bytes_done,
        target.written(),
        "what is reported as done is written"
    );
    run(&image, &target, &NoStaging, Mode::Differential).unwrap();
    assert!(&*target.bytes.lock().unwrap() == expected);
}

#[test]
fn a_file_is_created_at_the_volumes_size_and_sparse() {
    use std::os::unix::fs::MetadataExt;
    let (_, store, images) = store();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.img");
    for (sequence, expected) in (1..).zip(&images) {
        // Over the file of the round before, in both modes.
        for (mode, keep) in [(Mode::Full, false), (Mode::Differential, true)] {
            let target = FileTarget::open(&path, expected.len() as u64, keep).unwrap();
            run(&image(&store, sequence), &target, &NoStaging, mode).unwrap();
            assert!(
                &std::fs::read(&path).unwrap() == expected,
                "layer {sequence}, {mode:?}"
            );
        }
    }
    // A volume that is mostly zero.
    let fs = SimFs::new(1);
    let store = open(&fs, 1).unwrap();
    let mut volumes = Volumes::new(&[8 << 20]);
    volumes.write(0, 9000, 5);
    volumes.capture(&store, LayerKind::Baseline).unwrap();
    for (was, keep) in [
        (None, false),
        (Some(vec![7; 9 << 20]), true),
        (Some(vec![7; 100]), false),
    ] {
        if let Some(was) = was {
            std::fs::write(&path, was).unwrap();
        }
        let target = FileTarget::open(&path, 8 << 20, keep).unwrap();
        let mode = if keep { Mode::Differential } else { Mode::Full };
        run(&image(&store, 1), &target, &NoStaging, mode).unwrap();
        assert!(std::fs::read(&path).unwrap() == volumes.images[0]);
        let blocks = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(
            blocks < 1 << 20,
            "{blocks} bytes for a file with one block of data"
        );
    }
    assert!(matches!(
        FileTarget::open(Path::new("/dev/null"), 1, true),
        Err(RestoreError::NotATarget { .. })
    ));
    assert!(matches!(
        DeviceTarget::open(&path, 1),
        Err(RestoreError::NotATarget { .. })
    ));
}

/// A loop device of our own, detached on every way out.
struct Loop(PathBuf);

impl Loop {
    /// None without the rights to make one.
    fn new(file: &Path) -> Option<Self> {
        let out = tool(
            "losetup",
            &["-f".as_ref(), "--show".as_ref(), file.as_os_str()],
        )?;
        Some(Self(PathBuf::from(out.trim())))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        tool("losetup", &["-d".as_ref(), self.0.as_os_str()]);
    }
}

/// A mount of our own.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        tool("umount", &[&self.0]);
    }
}

/// Runs a tool with a hard limit; its output when it succeeded.
fn tool<S: AsRef<std::ffi::OsStr>>(name: &str, args: &[S]) -> Option<String> {
    let out = Command::new("timeout")
        .args(["-s", "KILL", "30", name])
        .args(args)
        .output()
        .ok()?;
    out.status
        .success()
        .then(|| String::from_utf8_lossy(&out.stdout).into_owned())
}

#[test]
fn a_block_device_is_restored_when_free_and_refused_when_held() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("disk");
    std::fs::write(&file, rubbish(16 << 20)).unwrap();
    let Some(device) = Loop::new(&file) else {
        assert!(
            !rustix::process::geteuid().is_root(),
            "root must be able to make a loop device"
        );
        return;
    };
    let path = &device.0;
    let (_, store, images) = store();
    let len = images[3].len() as u64;
    let target = DeviceTarget::open(path, len).unwrap();
    run(&image(&store, 4), &target, &NoStaging, Mode::Full).unwrap();
    let differential = run(&image(&store, 4), &target, &NoStaging, Mode::Differential).unwrap();
    assert_eq!(differential.bytes_unchanged, len);
    // Opened exclusively: nobody else gets it meanwhile.
    assert!(matches!(
        DeviceTarget::open(path, len),
        Err(RestoreError::Held { .. })
    ));
    drop(target);
    assert!(std::fs::read(path).unwrap()[..images[3].len()] == images[3]);

    let too_small = DeviceTarget::open(path, (16 << 20) + 1).unwrap_err();
    assert!(
        matches!(too_small, RestoreError::TooSmall { .. }),
        "{too_small}"
    );
    // The file behind a loop device is as much in use as the device.
    let held = FileTarget::open(&file, len, true).unwrap_err();
    assert!(held.to_string().contains(path.to_str().unwrap()), "{held}");

    tool(
        "mkfs.ext4",
        &["-q".as_ref(), "-F".as_ref(), path.as_os_str()],
    )
    .expect("mkfs.ext4");
    let at = folder.path().join("a mount");
    std::fs::create_dir(&at).unwrap();
    tool("mount", &[path.as_os_str(), at.as_os_str()]).expect("mount");
    let mount = Mount(at.clone());
    let error = DeviceTarget::open(path, len).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Refused);
    assert!(
        error
            .to_string()
            .contains(&format!("is mounted at {}", at.display())),
        "{error}"
    );
    drop(mount);
    DeviceTarget::open(path, len).unwrap();
}
