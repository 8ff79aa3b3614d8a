//! The parts of the agent as the service puts them together, for one group of volumes: kernel half,
//! layer store, readers, freeze guard; and a way to make attempts fail.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use soe_agent::capture::mounts::{DeviceNumber, Mounts, split};
use soe_agent::capture::{
    CaptureError, CaptureParts, CapturePolicy, CaptureRequest, FreezeGuard, GroupCut, LayerSink,
    SinkError, VolumeFreezer, VolumeParts, VolumePlan, capture_group,
};
use soe_agent::io::{ReadOptions, SystemClock, VolumeSpec, open_reader};
use soe_agent::layer::fs::DirFs;
use soe_agent::layer::{LayerStore, StoreOptions};
use soe_agent::observe::disk::SliceMap;
use soe_agent::observe::tracker::{Start, Tracker, TrackerOptions};
use soe_agent::observe::volumes;
use soe_agent::seam::{ChangeMap, GenerationEnd, Pace};
use soe_agent::service::sink::{StoreSink, VolumeFacts, base_of};
use soe_common::BlockIndex;

use super::history::{History, SECTOR, contents};
use super::lies::{Lie, Witness, window};
use super::oracle::{Oracle, Violation};

/// A tracker with pins of its own, removed on drop.
pub struct Kernel {
    tracker: Option<Tracker>,
    root: PathBuf,
    slots: u32,
}

impl Kernel {
    /// Attaches the programs.
    pub fn new(name: &str) -> Self {
        let root = format!("/sys/fs/bpf/soe-torture-{}-{name}", std::process::id());
        let mut kernel = Self {
            tracker: None,
            root: root.into(),
            slots: 8,
        };
        assert_eq!(kernel.open(), Start::Fresh);
        kernel
    }

    fn open(&mut self) -> Start {
        let options = TrackerOptions {
            pin_root: self.root.clone(),
            slots: self.slots,
            ..TrackerOptions::default()
        };
        let tracker = Tracker::open(options).expect("tracker");
        let start = tracker.start();
        self.tracker = Some(tracker);
        start
    }

    /// The agent dies and comes back; as another version, with other programs, when `upgrade`.
    pub fn restart(&mut self, pause: Duration, upgrade: bool) {
        drop(self.tracker.take());
        std::thread::sleep(pause);
        if upgrade {
            // Other maps are another set of programs; only growing ones are carried over.
            self.slots += 1;
        }
        let expected = if upgrade {
            Start::Upgraded
        } else {
            Start::Adopted
        };
        assert_eq!(self.open(), expected);
    }

    fn map(&self, path: &Path) -> SliceMap {
        let volume = volumes::resolve(path).expect("volume");
        let tracker = self.tracker.as_ref().expect("open");
        let (track, _) = tracker.track(&volume.disk).expect("track");
        SliceMap::new(track, &path.display().to_string(), volume.start, volume.end).expect("slice")
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        drop(self.tracker.take());
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

/// What an oracle looks at in the image of a volume.
pub type Look = Box<dyn Fn(&[u8]) -> Vec<u8>>;

/// One volume of the group.
pub struct Volume {
    /// Its device node.
    pub path: PathBuf,
    /// The bytes that the stamped writers own, out of the whole image.
    pub look: Look,
}

/// How a capture is asked for.
#[derive(Clone, Copy, Default)]
pub struct Ask<'a> {
    /// Read everything.
    pub baseline: bool,
    /// Limits.
    pub policy: CapturePolicy,
    /// The sink refuses a block after so many.
    pub fail_after: Option<u32>,
    /// The pace says stop after so many requests.
    pub cancel_after: Option<u32>,
    /// Freezes the filesystems on the volumes.
    pub guard: Option<&'a FreezeGuard>,
    /// Failed writes whose paths have settled since.
    pub settled_failures: u64,
}

/// A layer of every volume, held against the history.
pub struct Layer {
    /// The cut.
    pub cut: GroupCut,
    /// What the oracle has to say.
    pub violations: Vec<Violation>,
    /// The images, in the order of the volumes.
    pub images: Vec<Vec<u8>>,
}

/// A group of volumes under capture.
pub struct Rig {
    /// What the writers did.
    pub history: Arc<History>,
    volumes: Vec<Volume>,
    maps: Vec<Witness>,
    kernel: Kernel,
    oracle: Oracle,
    lie: Lie,
    store: LayerStore,
    _folder: tempfile::TempDir,
}

const GROUP: &str = "torture";

impl Rig {
    /// Begins to track `volumes`, which must be at rest, zeroed where stamps will be.
    pub fn new(name: &str, volumes: Vec<Volume>, lie: Lie) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("soe-torture-")
            .tempdir()
            .expect("a folder");
        let store = DirFs::open(folder.path()).expect("a store's folder");
        let store = LayerStore::open(Arc::new(store), StoreOptions::default()).expect("a store");
        let mut rig = Self {
            history: Arc::default(),
            volumes,
            maps: Vec::new(),
            kernel: Kernel::new(name),
            oracle: Oracle::default(),
            lie,
            store,
            _folder: folder,
        };
        rig.attach();
        rig.settle();
        rig
    }

    fn attach(&mut self) {
        let maps = self.volumes.iter().enumerate().map(|(number, volume)| {
            let map = self.kernel.map(&volume.path);
            Witness::new(map, number, self.history.clone(), self.lie)
        });
        self.maps = maps.collect();
    }

    /// Waits until all counters have their base.
    fn settle(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        for map in &self.maps {
            while {
                map.settle().expect("settled");
                !map.inner().reading().expect("reading").nothing_in_flight()
            } {
                assert!(
                    Instant::now() < deadline,
                    "{} never came to rest",
                    map.volume()
                );
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    /// Restarts the kernel half's owner while the writers go on; nothing may get lost.
    pub fn restart(&mut self, pause: Duration, upgrade: bool) {
        let generations: Vec<_> = self.maps.iter().map(|map| map.generation()).collect();
        self.maps.clear();
        self.kernel.restart(pause, upgrade);
        self.attach();
        let now: Vec<_> = self.maps.iter().map(|map| map.generation()).collect();
        assert_eq!(generations, now, "a restart ended a generation");
    }

    /// Ends the generation of one volume, so that its next layer is a rescan.
    pub fn end_generation(&self, volume: usize) {
        let track = self.maps[volume].inner().track();
        track.begin_generation().expect("a new generation");
    }

    /// The volume's number by its map's name.
    pub fn number_of(&self, name: &str) -> Option<usize> {
        self.maps.iter().position(|map| map.volume() == name)
    }

    /// Compares the counters with the devices' own statistics where they are quiet; the difference.
    pub fn audit(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for map in &self.maps {
            if let Some((counted, device)) = map.inner().track().audit().expect("statistics")
                && counted != device
            {
                wrong.push(format!(
                    "{}: the programs counted {counted} sectors, the device {device}",
                    map.volume()
                ));
            }
        }
        wrong
    }

    /// What every map says right now, for messages.
    pub fn readings(&self) -> String {
        let of = |map: &Witness| format!("{}: {:?}", map.volume(), map.inner().reading());
        self.maps.iter().map(of).collect::<Vec<_>>().join("; ")
    }

    fn rdevs(&self) -> Vec<DeviceNumber> {
        let rdev = |volume: &Volume| split(std::fs::metadata(&volume.path).expect("node").rdev());
        self.volumes.iter().map(rdev).collect()
    }

    /// One attempt at a layer, and the oracle's word on it.
    pub fn capture(&mut self, ask: &Ask<'_>) -> Result<Layer, CaptureError> {
        let clock = SystemClock;
        let head = self.store.head(GROUP).expect("the newest manifest");
        let open = |options| {
            let spec = |volume: &Volume| VolumeSpec::whole(&volume.path);
            let readers = self.volumes.iter().map(|v| open_reader(&spec(v), options));
            readers.collect::<Result<Vec<_>, _>>().expect("readers")
        };
        let (background, urgent) = (open(ReadOptions::BACKGROUND), open(ReadOptions::URGENT));
        let facts = self.maps.iter().map(|map| VolumeFacts {
            device_id: map.volume().to_owned(),
            rescan_reason: Some(GenerationEnd::GapMiss),
        });
        let mut sink = FaultySink {
            sink: StoreSink::new(&self.store, GROUP, &clock, facts.collect()),
            left: ask.fail_after,
        };
        let freezer = ask.guard.map(|guard| {
            let superblocks = Mounts::default().superblocks(&self.rdevs(), &[]);
            let superblocks = superblocks.expect("the filesystems on the volumes");
            guard
                .prepare(superblocks, self.volumes.len())
                .expect("a prepared guard")
        });
        let pace = StopAfter(ask.cancel_after.map(AtomicU32::new));
        let volumes = self.maps.iter().zip(background.iter().zip(&urgent));
        let parts = CaptureParts {
            volumes: volumes
                .map(|(map, (background, urgent))| VolumeParts {
                    map,
                    reader: &**background,
                    urgent: &**urgent,
                    base: head
                        .as_ref()
                        .and_then(|head| head.volume(map.volume()))
                        .map(base_of),
                    settled_failures: ask.settled_failures,
                })
                .collect(),
            clock: &clock,
            pace: &pace,
            freezer: freezer
                .as_ref()
                .map(|freezer| freezer as &dyn VolumeFreezer),
            parallel: true,
        };
        let request = CaptureRequest {
            baseline: ask.baseline,
            policy: ask.policy,
        };
        let cut = capture_group(&parts, &request, &mut sink)?;
        let manifest = sink.sink.manifest.take().expect("a manifest");
        let maps: Vec<&Witness> = self.maps.iter().collect();
        let window = window(&maps).expect("two readings of every map");
        let mut images = Vec::new();
        let mut looks = Vec::new();
        for (number, (volume, map)) in self.volumes.iter().zip(&self.maps).enumerate() {
            let image = self.image(map.volume(), manifest.sequence);
            let look = (volume.look)(&image);
            assert_eq!(look.len() % SECTOR, 0);
            looks.push((number, contents(&look, number, 0)));
            images.push(image);
        }
        let violations = self.oracle.check(&self.history, window, &looks);
        Ok(Layer {
            cut,
            violations,
            images,
        })
    }

    fn image(&self, volume: &str, sequence: u64) -> Vec<u8> {
        let image = self
            .store
            .image(GROUP, volume, Some(sequence))
            .expect("an image");
        let index = image.index();
        let mut bytes = vec![0; index.volume_bytes() as usize];
        for block in 0..index.block_count() {
            let range = index.block_range(block);
            let place = range.offset as usize..range.end() as usize;
            image
                .read_block(BlockIndex(block), &mut bytes[place])
                .expect("a whole block");
        }
        bytes
    }

    /// What the devices hold now, past the page cache.
    pub fn devices(&self) -> Vec<Vec<u8>> {
        let read = |volume: &Volume| {
            let spec = VolumeSpec::whole(&volume.path);
            let reader = open_reader(&spec, ReadOptions::URGENT).expect("a reader");
            let mut bytes = vec![0; reader.len() as usize];
            let all = [soe_agent::seam::ByteRange::new(0, reader.len())];
            reader
                .read(
                    &all,
                    65536,
                    &soe_agent::seam::Unpaced,
                    &mut |offset, data| {
                        bytes[offset as usize..offset as usize + data.len()].copy_from_slice(data);
                        Ok(())
                    },
                )
                .expect("read");
            bytes
        };
        self.volumes.iter().map(read).collect()
    }
}

struct FaultySink<'a> {
    sink: StoreSink<'a>,
    left: Option<u32>,
}

impl LayerSink for FaultySink<'_> {
    fn begin(&mut self, volumes: &[VolumePlan]) -> Result<(), SinkError> {
        self.sink.begin(volumes)
    }

    fn put_block(
        &mut self,
        volume: usize,
        block: BlockIndex,
        data: &[u8],
    ) -> Result<(), SinkError> {
        match &mut self.left {
            Some(0) => return Err("refused on purpose".into()),
            Some(left) => *left -= 1,
            None => {}
        }
        self.sink.put_block(volume, block, data)
    }

    fn agrees(&self, volume: usize, block: BlockIndex, data: &[u8]) -> Result<bool, SinkError> {
        self.sink.agrees(volume, block, data)
    }

    fn commit(&mut self, cut: &GroupCut) -> Result<(), SinkError> {
        self.sink.commit(cut)
    }

    fn abort(&mut self) {
        self.sink.abort();
    }
}

struct StopAfter(Option<AtomicU32>);

impl Pace for StopAfter {
    fn before(&self, _bytes: u64) -> io::Result<()> {
        let Some(left) = &self.0 else {
            return Ok(());
        };
        // Wraps after the end of the capture at the latest.
        match left.fetch_sub(1, Ordering::Relaxed) {
            0 => Err(io::ErrorKind::Interrupted.into()),
            _ => Ok(()),
        }
    }
}
