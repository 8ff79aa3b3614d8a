//! Whole captures of a mounted ext4 on this machine's kernel, through the freeze guard and io_uring.
//! The change map is a crude one made from the device's own statistics (everything is changed), so
//! that this needs no eBPF. Needs root; otherwise they are skipped, with the reason.

mod host;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use host::{Volume, can_run, freezer, guard, must, text};
use soe_agent::capture::{
    CaptureParts, CapturePolicy, CaptureRequest, GroupCut, LayerSink, Level, Method, SinkError,
    Uuid, VolumeFreezer, VolumeParts, VolumePlan, capture_group,
};
use soe_agent::io::{ReadOptions, SystemClock, UringReader, VolumeSpec};
use soe_agent::seam::{
    BlockReader, ByteRange, ChangeMap, Misses, Reading, Rest, TrackError, Tracking, Unpaced,
};
use soe_common::{BlockIndex, Epoch};

/// Counters from `/sys/block/*/stat`; every block counts as changed.
struct StatMap {
    device: PathBuf,
    bytes: u64,
    epoch: AtomicU32,
}

impl StatMap {
    fn new(device: &Path, bytes: u64) -> Self {
        Self {
            device: device.to_owned(),
            bytes,
            epoch: AtomicU32::new(1),
        }
    }
}

impl ChangeMap for StatMap {
    fn volume(&self) -> &str {
        text(&self.device)
    }
    fn volume_bytes(&self) -> u64 {
        self.bytes
    }
    fn block_size(&self) -> u32 {
        65536
    }
    fn generation(&self) -> Uuid {
        Uuid::nil()
    }
    fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::SeqCst))
    }
    fn bump(&self) -> Result<Epoch, TrackError> {
        Ok(Epoch(self.epoch.fetch_add(1, Ordering::SeqCst) + 1))
    }
    fn settle(&self) -> Result<(), TrackError> {
        Ok(())
    }
    fn rest(&self) -> Option<Rest> {
        None
    }
    fn grace(&self) -> Result<(), TrackError> {
        Ok(())
    }
    fn reading(&self) -> Result<Reading, TrackError> {
        let name = self.device.file_name().unwrap_or_default();
        let path = Path::new("/sys/block").join(name).join("stat");
        let stat = fs::read_to_string(path).expect("the device's statistics");
        let fields: Vec<u64> = stat
            .split_whitespace()
            .map(|field| field.parse().expect("a number"))
            .collect();
        // Writes and discards in sectors, and what is in flight (reads of ours are none then).
        let completed = fields[6] + fields[13];
        Ok(Reading {
            completed,
            queued: completed + fields[8],
            misses: Misses::default(),
        })
    }
    fn changed_since(&self, _since: Epoch) -> Result<Vec<ByteRange>, TrackError> {
        Ok(vec![ByteRange::new(0, self.bytes)])
    }
    fn tracking(&self) -> Tracking {
        Tracking::Complete
    }
}

/// Writes the layer into an image file.
struct ImageSink {
    image: File,
    cut: Option<GroupCut>,
}

impl LayerSink for ImageSink {
    fn begin(&mut self, _volumes: &[VolumePlan]) -> Result<(), SinkError> {
        Ok(())
    }
    fn put_block(&mut self, _: usize, block: BlockIndex, data: &[u8]) -> Result<(), SinkError> {
        use std::os::unix::fs::FileExt;
        Ok(self.image.write_all_at(data, block.0 * 65536)?)
    }
    fn agrees(&self, _: usize, block: BlockIndex, data: &[u8]) -> Result<bool, SinkError> {
        use std::os::unix::fs::FileExt;
        let mut held = vec![0; data.len()];
        self.image.read_exact_at(&mut held, block.0 * 65536)?;
        Ok(held == data)
    }
    fn commit(&mut self, cut: &GroupCut) -> Result<(), SinkError> {
        self.cut = Some(cut.clone());
        Ok(())
    }
    fn abort(&mut self) {}
}

fn capture(volume: &Volume, freezer: Option<&dyn VolumeFreezer>, image: &Path) -> GroupCut {
    let spec = VolumeSpec::whole(volume.device());
    let reader = UringReader::open(&spec, ReadOptions::BACKGROUND).expect("a reader");
    let urgent = UringReader::open(&spec, ReadOptions::URGENT).expect("a reader");
    let map = StatMap::new(volume.device(), reader.len());
    let policy = CapturePolicy {
        optimistic: freezer.is_none(),
        optimistic_residual: reader.len(),
        optimistic_time: Duration::from_secs(20),
        pause_budget: Duration::from_secs(5),
        ..CapturePolicy::default()
    };
    let parts = CaptureParts {
        volumes: vec![VolumeParts {
            map: &map,
            reader: &reader,
            urgent: &urgent,
            base: None,
            settled_failures: 0,
        }],
        clock: &SystemClock,
        pace: &Unpaced,
        freezer,
        parallel: true,
    };
    let request = CaptureRequest {
        baseline: false,
        policy,
    };
    let image = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(image)
        .expect("an image");
    let mut sink = ImageSink { image, cut: None };
    let cut = capture_group(&parts, &request, &mut sink).expect("a layer");
    assert_eq!(sink.cut.as_ref(), Some(&cut));
    cut
}

#[test]
fn a_frozen_capture_of_a_busy_ext4_is_a_clean_filesystem() {
    if !can_run() {
        return;
    }
    let volume = Volume::new();
    let folder = tempfile::tempdir().expect("a folder");
    let guard = guard();
    let freezer = freezer(&guard, &[&volume]);
    let busy = Arc::new(AtomicBool::new(true));
    let writer = {
        let (busy, mount) = (busy.clone(), volume.mount().to_owned());
        std::thread::spawn(move || {
            let mut written = 0u64;
            while busy.load(Ordering::Relaxed) {
                let path = mount.join(format!("file{}", written % 20));
                let _ = fs::remove_file(&path);
                let wrote = File::create(&path).and_then(|mut file| {
                    file.write_all(&[written as u8; 40_000])?;
                    if written.is_multiple_of(3) {
                        file.sync_all()?;
                    }
                    Ok(())
                });
                wrote.expect("the writer writes on after every thaw");
                written += 1;
            }
            written
        })
    };
    for round in 0..5 {
        std::thread::sleep(Duration::from_millis(50));
        let image = folder.path().join("image");
        let cut = capture(&volume, Some(&freezer), &image);
        assert_eq!(cut.method, Method::Freeze, "round {round}");
        assert_eq!(cut.volumes[0].level, Level::Filesystem, "round {round}");
        assert!(cut.pause > Duration::ZERO && cut.pause < Duration::from_secs(5));
        assert_eq!(cut.budget_missed, 0);
        // Clean without replaying the journal: that is what the level promises.
        must("e2fsck", &["-f", "-n", text(&image)]);
        println!("pause {:?}, window {:?}", cut.pause, cut.window);
    }
    busy.store(false, Ordering::Relaxed);
    assert!(writer.join().expect("the writer") > 0);
}

#[test]
fn a_quiet_ext4_is_captured_without_a_pause() {
    if !can_run() {
        return;
    }
    let volume = Volume::new();
    let folder = tempfile::tempdir().expect("a folder");
    for round in 0..3u8 {
        let content = vec![round; 300_000];
        let path = volume.mount().join("data");
        File::create(&path)
            .and_then(|mut file| {
                file.write_all(&content)?;
                file.sync_all()
            })
            .expect("written");
        let image = folder.path().join("image");
        let cut = capture(&volume, None, &image);
        assert_eq!(cut.method, Method::Optimistic);
        assert_eq!(cut.volumes[0].level, Level::Crash);
        assert_eq!(cut.pause, Duration::ZERO);
        println!("tries {}, window {:?}", cut.tries, cut.window);
        // As after a power cut: the journal is replayed, and what was synced is there. e2fsck says 1
        // when it corrected something, which a replay is.
        let _ = host::run("e2fsck", &["-f", "-y", text(&image)]);
        must("e2fsck", &["-f", "-n", text(&image)]);
        let copy = folder.path().join("copy");
        must(
            "debugfs",
            &["-R", &format!("dump data {}", text(&copy)), text(&image)],
        );
        assert!(
            fs::read(&copy).expect("the file") == content,
            "round {round}"
        );
    }
}
