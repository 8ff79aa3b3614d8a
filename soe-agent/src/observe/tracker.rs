//! Attaches, pins and adopts the kernel half.
//!
//! Pins live in `<root>/set-<n>/`: every map, every link. A set whose programs, read-only data and
//! layout are those of this binary is adopted as it stands, so tracking goes on without a gap while
//! the agent is down. Any other set is replaced: new programs are attached before the old ones are
//! detached, and the stamps of the old set are carried over.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use soe_common::Epoch;
use soe_common::record::{
    CgroupKey, CgroupStats, DiskControl, DiskStats, KernelOffsets, LAYOUT_VERSION, TraceBooks,
};

use super::TrackerError;
use super::bpf::{self, Loaded, MARKING, PASSTHROUGH, SLOTTED, TRACING};
use super::disk::{DiskTrack, Geometry};
use super::maps::Maps;
use super::syscalls;
use super::volumes::Disk;
use crate::probe::btf::Btf;
use crate::seam::GenerationEnd;

/// Where the pins are kept unless said otherwise.
pub const DEFAULT_PIN_ROOT: &str = "/sys/fs/bpf/soe";

/// How the kernel half is set up.
#[derive(Clone, Debug)]
pub struct TrackerOptions {
    /// Folder on a bpffs that holds the pins.
    pub pin_root: PathBuf,
    /// Disks that can be tracked at once.
    pub slots: u32,
    /// Bytes that one disk's stamps may take; larger disks get larger blocks.
    pub max_stamp_bytes: u64,
    /// Bytes that a stamp covers at least: a power of two from 4 KiB to 1 MiB.
    pub min_block: u32,
}

impl Default for TrackerOptions {
    fn default() -> Self {
        Self {
            pin_root: DEFAULT_PIN_ROOT.into(),
            slots: 64,
            max_stamp_bytes: 64 << 20,
            min_block: 64 << 10,
        }
    }
}

/// How a tracker came to its programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Nothing was there: programs were attached anew.
    Fresh,
    /// The pinned programs were this binary's own and went on without a gap.
    Adopted,
    /// Other programs were pinned; they were replaced and their stamps carried over.
    Upgraded,
}

/// The kernel half, attached.
pub struct Tracker {
    maps: Arc<Maps>,
    options: TrackerOptions,
    start: Start,
    set: PathBuf,
    links: Mutex<BTreeMap<String, OwnedFd>>,
    _lock: File,
    tracing: Mutex<Vec<OwnedFd>>,
    slots: Mutex<()>,
}

/// Makes sure that `root` is a folder on a bpffs, mounting one when none is there.
fn prepare_pin_root(root: &Path) -> Result<(), TrackerError> {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    let is_bpffs = |path: &Path| rustix::fs::statfs(path).is_ok_and(|s| s.f_type == BPF_FS_MAGIC);
    let mount = Path::new("/sys/fs/bpf");
    if root.starts_with(mount) && !is_bpffs(mount) {
        rustix::mount::mount(
            "bpf",
            mount,
            "bpf",
            rustix::mount::MountFlags::empty(),
            None,
        )
        .map_err(|error| TrackerError::Io {
            what: format!("cannot mount a BPF filesystem at {}", mount.display()),
            source: error.into(),
        })?;
    }
    std::fs::create_dir_all(root).map_err(TrackerError::io(format!("mkdir {}", root.display())))?;
    if !is_bpffs(root) {
        return Err(TrackerError::Io {
            what: format!(
                "{} is not on a BPF filesystem, so tracking could not outlive the agent",
                root.display()
            ),
            source: io::ErrorKind::Unsupported.into(),
        });
    }
    Ok(())
}

fn lock_owner(root: &Path) -> Result<File, TrackerError> {
    let folder = File::open(root).map_err(TrackerError::io(format!("open {}", root.display())))?;
    match rustix::fs::flock(
        &folder,
        rustix::fs::FlockOperation::NonBlockingLockExclusive,
    ) {
        Ok(()) => Ok(folder),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(TrackerError::Owned {
            path: root.display().to_string(),
        }),
        Err(error) => Err(TrackerError::Io {
            what: format!("lock {}", root.display()),
            source: error.into(),
        }),
    }
}

/// bpffs allows no dots in names.
fn pin_name(map: &str) -> String {
    format!("map_{}", map.trim_start_matches('.'))
}

fn sets_in(root: &Path) -> Vec<PathBuf> {
    let mut sets: Vec<PathBuf> = std::fs::read_dir(root)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name()
                .is_some_and(|n| n.as_encoded_bytes().starts_with(b"set-"))
        })
        .collect();
    sets.sort();
    sets
}

fn remove_set(set: &Path) -> Result<(), TrackerError> {
    std::fs::remove_dir_all(set).map_err(TrackerError::io(format!("remove {}", set.display())))
}

/// A pinned set, opened.
struct PinnedSet {
    path: PathBuf,
    maps: BTreeMap<String, OwnedFd>,
    links: BTreeMap<String, OwnedFd>,
    programs: BTreeMap<String, OwnedFd>,
}

impl PinnedSet {
    fn open(path: &Path, like: &Loaded) -> io::Result<Self> {
        let mut maps = BTreeMap::new();
        for name in like.maps.keys() {
            maps.insert(name.clone(), syscalls::pinned(&path.join(pin_name(name)))?);
        }
        let mut links = BTreeMap::new();
        let mut programs = BTreeMap::new();
        for (name, _) in MARKING {
            let link = syscalls::pinned(&path.join(format!("link_{name}")))?;
            let id = syscalls::link_program(link.as_fd())?;
            programs.insert(name.to_string(), syscalls::program_by_id(id)?);
            links.insert(name.to_string(), link);
        }
        for (name, _) in TRACING.into_iter().chain([PASSTHROUGH]) {
            let program = syscalls::pinned(&path.join(format!("prog_{name}")))?;
            programs.insert(name.to_string(), program);
        }
        if let Ok(link) = syscalls::pinned(&path.join(format!("link_{}", PASSTHROUGH.0))) {
            links.insert(PASSTHROUGH.0.to_string(), link);
        }
        Ok(Self {
            path: path.into(),
            maps,
            links,
            programs,
        })
    }

    /// Whether this set is what `like` would be, had it been loaded before.
    fn matches(&self, like: &Loaded, slots: u32) -> io::Result<bool> {
        let mut own_maps: Vec<u32> = Vec::new();
        for map in self.maps.values() {
            own_maps.push(syscalls::map_info(map.as_fd())?.id);
        }
        for (name, program) in &self.programs {
            let Some(expected) = like.programs.get(name) else {
                return Ok(false);
            };
            if syscalls::program_info(program.as_fd())?.tag
                != syscalls::program_info(expected.as_fd())?.tag
            {
                return Ok(false);
            }
            let used = syscalls::program_map_ids(program.as_fd())?;
            if !used.iter().all(|id| own_maps.contains(id)) {
                return Ok(false);
            }
        }
        for name in SLOTTED {
            let info = self
                .maps
                .get(name)
                .map(|map| syscalls::map_info(map.as_fd()))
                .transpose()?;
            if info.is_none_or(|info| info.max_entries != slots) {
                return Ok(false);
            }
        }
        let rodata = |maps: &BTreeMap<String, OwnedFd>| {
            maps.get(".rodata")
                .map(|map| syscalls::lookup_bytes(map.as_fd(), 0))
                .transpose()
        };
        Ok(rodata(&self.maps)? == rodata(&like.maps)?)
    }
}

impl Tracker {
    /// Loads the programs, adopts or replaces what is pinned, and holds the pin folder's lock.
    pub fn open(options: TrackerOptions) -> Result<Self, TrackerError> {
        let offsets: KernelOffsets = Btf::of_kernel()?.kernel_offsets()?;
        prepare_pin_root(&options.pin_root)?;
        let lock = lock_owner(&options.pin_root)?;
        let loaded = bpf::load(&offsets, options.slots)?;
        let mut adopted = None;
        let mut replaced = Vec::new();
        for path in sets_in(&options.pin_root) {
            match PinnedSet::open(&path, &loaded) {
                Ok(set)
                    if adopted.is_none()
                        && set.matches(&loaded, options.slots).unwrap_or(false) =>
                {
                    adopted = Some(set);
                }
                Ok(set) => replaced.push(set),
                // A set that was never finished, or that another version laid out.
                Err(_) => remove_set(&path)?,
            }
        }
        if let Some(set) = adopted {
            for old in replaced {
                remove_set(&old.path)?;
            }
            let maps = Arc::new(Maps::new(set.maps, set.programs, options.slots)?);
            let tracker = Self {
                maps,
                options,
                start: Start::Adopted,
                set: set.path,
                links: Mutex::new(set.links),
                _lock: lock,
                tracing: Mutex::new(Vec::new()),
                slots: Mutex::new(()),
            };
            tracker.own_this_process();
            return Ok(tracker);
        }
        Self::attach(options, loaded, replaced, lock)
    }

    fn attach(
        options: TrackerOptions,
        loaded: Loaded,
        replaced: Vec<PinnedSet>,
        lock: File,
    ) -> Result<Self, TrackerError> {
        let number = sets_in(&options.pin_root)
            .iter()
            .filter_map(|p| {
                p.file_name()?
                    .to_str()?
                    .strip_prefix("set-")?
                    .parse::<u64>()
                    .ok()
            })
            .max()
            .unwrap_or(0)
            + 1;
        let set = options.pin_root.join(format!("set-{number:08}"));
        std::fs::create_dir(&set).map_err(TrackerError::io(format!("mkdir {}", set.display())))?;
        for (name, map) in &loaded.maps {
            syscalls::pin(map.as_fd(), &set.join(pin_name(name)))
                .map_err(TrackerError::io(format!("pin of map {name}")))?;
        }
        for (name, _) in TRACING.into_iter().chain([PASSTHROUGH]) {
            let program = loaded.programs.get(name).expect("loaded above");
            syscalls::pin(program.as_fd(), &set.join(format!("prog_{name}")))
                .map_err(TrackerError::io(format!("pin of program {name}")))?;
        }
        let maps = Arc::new(Maps::new(loaded.maps, loaded.programs, options.slots)?);
        let start = if replaced.is_empty() {
            Start::Fresh
        } else {
            Start::Upgraded
        };
        // Slots first, so that the new programs mark from their first run on.
        let mut carried = Vec::new();
        for old in &replaced {
            carried.extend(carry_slots(old, &maps, &options)?);
        }
        let mut links = BTreeMap::new();
        let exposed = carried.iter().any(|(_, to)| to.disk().takes_passthrough());
        let marking = MARKING.into_iter().chain(exposed.then_some(PASSTHROUGH));
        for (name, _) in marking {
            links.insert(name.to_string(), attach_pinned(&maps, &set, name)?);
        }
        grace().map_err(TrackerError::io("membarrier"))?;
        for old in replaced {
            remove_set(&old.path)?;
            drop(old.links);
        }
        // The last runs of the old programs are over after this; then their stamps are final.
        grace().map_err(TrackerError::io("membarrier"))?;
        for (old, new) in carried {
            new.absorb(&old);
        }
        let tracker = Self {
            maps,
            options,
            start,
            set,
            links: Mutex::new(links),
            _lock: lock,
            tracing: Mutex::new(Vec::new()),
            slots: Mutex::new(()),
        };
        tracker.own_this_process();
        Ok(tracker)
    }

    /// How the programs came to be.
    pub fn start(&self) -> Start {
        self.start
    }

    fn own_this_process(&self) {
        for slot in 0..self.options.slots {
            // SAFETY: within the mapping; only the agent writes this word.
            unsafe {
                (&raw mut (*self.maps.control_of(slot)).own_tgid).write_volatile(std::process::id())
            };
        }
    }

    fn used_slots(&self) -> Vec<(u32, DiskControl)> {
        (0..self.options.slots)
            .map(|slot| (slot, self.maps.control_copy(slot)))
            .filter(|(_, control)| control.diskseq != 0)
            .collect()
    }

    /// Tracks `disk`, or goes on with the slot that already does. The second value tells why a new
    /// generation was begun, if one was.
    pub fn track(
        &self,
        disk: &Disk,
    ) -> Result<(Arc<DiskTrack>, Option<GenerationEnd>), TrackerError> {
        let _one_at_a_time = self.slots.lock().expect("no panic while a slot is taken");
        let mut reason = GenerationEnd::First;
        for (slot, control) in self.used_slots() {
            if control.diskseq != disk.diskseq {
                continue;
            }
            let paths = self.maps.disks_of(slot);
            let other = control.mapping != disk.mapping
                || !disk.hidden_paths.iter().all(|path| paths.contains(path));
            if control.layout == LAYOUT_VERSION && control.sectors == disk.sectors && !other {
                let track = DiskTrack::open(self.maps.clone(), slot, disk)?;
                return Ok((Arc::new(track), None));
            }
            reason = match control.sectors == disk.sectors {
                true => GenerationEnd::Remapped,
                false => GenerationEnd::Resize,
            };
            self.release(slot)?;
        }
        let taken: Vec<u32> = self.used_slots().iter().map(|(slot, _)| *slot).collect();
        let slot = (0..self.options.slots)
            .find(|slot| !taken.contains(slot))
            .ok_or(TrackerError::Full {
                slots: self.options.slots,
            })?;
        let geometry =
            Geometry::for_disk(disk, self.options.min_block, self.options.max_stamp_bytes);
        let track = DiskTrack::create(self.maps.clone(), slot, disk, geometry, Epoch::FIRST)?;
        if disk.takes_passthrough() {
            let (name, _) = PASSTHROUGH;
            let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
            if !links.contains_key(name) {
                links.insert(
                    name.to_string(),
                    attach_pinned(&self.maps, &self.set, name)?,
                );
            }
        }
        track.publish()?;
        Ok((Arc::new(track), Some(reason)))
    }

    /// Stops tracking the disks that `keep` refuses, by `diskseq`.
    pub fn retain(&self, keep: impl Fn(u64) -> bool) -> Result<(), TrackerError> {
        let _one_at_a_time = self.slots.lock().expect("no panic while a slot is taken");
        for (slot, control) in self.used_slots() {
            if !keep(control.diskseq) {
                self.release(slot)?;
            }
        }
        Ok(())
    }

    fn release(&self, slot: u32) -> Result<(), TrackerError> {
        self.maps.withdraw(slot);
        // No program may still be marking into a slot that is handed out again.
        grace().map_err(TrackerError::io("membarrier"))?;
        for map in ["STAMPS", "CHUNKS", "HEAT"] {
            syscalls::delete(self.maps.map(map), slot).map_err(TrackerError::io(map))?;
        }
        // SAFETY: within the mapping; no program refers to the slot any more.
        unsafe {
            self.maps
                .control_of(slot)
                .write_volatile(DiskControl::default())
        };
        Ok(())
    }

    /// Attaches (or detaches) the programs that record every IO of traced disks.
    pub fn set_tracing(&self, on: bool) -> Result<(), TrackerError> {
        let mut links = self
            .tracing
            .lock()
            .expect("no panic while tracing is switched");
        if !on {
            links.clear();
            return Ok(());
        }
        if !links.is_empty() {
            return Ok(());
        }
        for (name, _) in TRACING {
            let program = self
                .maps
                .programs
                .get(name)
                .ok_or_else(|| TrackerError::Load {
                    what: name.into(),
                    reason: "not pinned beside the adopted programs".into(),
                })?;
            links.push(
                syscalls::attach_tracepoint(program.as_fd())
                    .map_err(TrackerError::io(format!("cannot attach program {name}")))?,
            );
        }
        Ok(())
    }

    /// The ring buffer of traced IOs.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.maps.map("EVENTS")
    }

    /// The ring buffer's books, over all CPUs.
    pub fn trace_books(&self) -> Result<TraceBooks, TrackerError> {
        let all =
            syscalls::lookup_per_cpu::<u32, TraceBooks>(self.maps.map("BOOKS"), 0, self.maps.cpus)
                .map_err(TrackerError::io("BOOKS"))?
                .unwrap_or_default();
        Ok(all
            .iter()
            .fold(TraceBooks::default(), |sum, cpu| TraceBooks {
                seen: sum.seen + cpu.seen,
                written: sum.written + cpu.written,
                dropped: sum.dropped + cpu.dropped,
                unmatched: sum.unmatched + cpu.unmatched,
            }))
    }

    /// What every cgroup did to every slot since tracking began, summed over CPUs.
    pub fn cgroups(&self) -> Result<BTreeMap<(u32, u64), CgroupStats>, TrackerError> {
        // A CPU that hands its counts over between the two readings would be seen twice or not at all.
        let mut tries = 0;
        loop {
            let before = self.held_back()?;
            let mut sums = self.handed_over()?;
            let after = self.held_back()?;
            let calm = before.iter().zip(&after).all(|((_, then), (_, now))| {
                let ops = |stats: &DiskStats| stats.current.read_ops + stats.current.write_ops;
                then.cgroup == now.cgroup && ops(then) <= ops(now)
            });
            tries += 1;
            if !calm && tries < 8 {
                continue;
            }
            for (slot, stats) in before.iter().filter(|(_, stats)| stats.cgroup != 0) {
                add(
                    sums.entry((*slot, stats.cgroup)).or_default(),
                    &stats.current,
                );
            }
            return Ok(sums);
        }
    }

    /// The statistics of every slot and CPU, with what they have not handed over yet.
    fn held_back(&self) -> Result<Vec<(u32, DiskStats)>, TrackerError> {
        let mut all = Vec::new();
        for (slot, _) in self.used_slots() {
            let stats: Option<Vec<DiskStats>> =
                syscalls::lookup_per_cpu(self.maps.map("STATS"), slot, self.maps.cpus)
                    .map_err(TrackerError::io("STATS"))?;
            all.extend(stats.unwrap_or_default().into_iter().map(|s| (slot, s)));
        }
        Ok(all)
    }

    fn handed_over(&self) -> Result<BTreeMap<(u32, u64), CgroupStats>, TrackerError> {
        let map = self.maps.map("CGROUPS");
        let mut sums: BTreeMap<(u32, u64), CgroupStats> = BTreeMap::new();
        for key in syscalls::keys::<CgroupKey>(map).map_err(TrackerError::io("keys of CGROUPS"))? {
            let counts: Option<Vec<CgroupStats>> =
                syscalls::lookup_per_cpu(map, key, self.maps.cpus)
                    .map_err(TrackerError::io("CGROUPS"))?;
            for cpu in counts.unwrap_or_default() {
                add(sums.entry((key.slot, key.cgroup)).or_default(), &cpu);
            }
        }
        Ok(sums)
    }

    /// What the kernel says of each program: name, instructions verified, runs and nanoseconds
    /// (with `kernel.bpf_stats_enabled`), skipped runs.
    pub fn program_report(&self) -> Result<Vec<(String, syscalls::ProgramInfo)>, TrackerError> {
        self.maps
            .programs
            .iter()
            .map(|(name, program)| {
                syscalls::program_info(program.as_fd())
                    .map(|info| (name.clone(), info))
                    .map_err(TrackerError::io(format!("info of program {name}")))
            })
            .collect()
    }

    /// Detaches everything and removes the pins: tracking ends here.
    pub fn uninstall(self) -> Result<(), TrackerError> {
        remove_set(&self.set)
    }
}

fn add(sum: &mut CgroupStats, more: &CgroupStats) {
    sum.read_ops += more.read_ops;
    sum.write_ops += more.write_ops;
    sum.read_bytes += more.read_bytes;
    sum.write_bytes += more.write_bytes;
}

/// Attaches a program for good: its link outlives this process.
fn attach_pinned(maps: &Maps, set: &Path, name: &str) -> Result<OwnedFd, TrackerError> {
    let program = maps.programs.get(name).ok_or_else(|| TrackerError::Load {
        what: format!("program {name}"),
        reason: "not in the object".into(),
    })?;
    let link = syscalls::attach_tracepoint(program.as_fd())
        .map_err(TrackerError::io(format!("cannot attach program {name}")))?;
    syscalls::pin(link.as_fd(), &set.join(format!("link_{name}")))
        .map_err(TrackerError::io(format!("pin of link {name}")))?;
    Ok(link)
}

/// Returns when every program that was running when it was called has ended: the programs run
/// within RCU read-side sections, and this waits for a grace period of all CPUs.
pub fn grace() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: membarrier takes no pointers.
    if unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Lays out the slots of a set that is to be replaced in the new maps, one epoch on.
fn carry_slots(
    old: &PinnedSet,
    maps: &Arc<Maps>,
    options: &TrackerOptions,
) -> Result<Vec<(DiskTrack, DiskTrack)>, TrackerError> {
    let control = old.maps.get("CONTROL").expect("opened with all maps");
    let info = syscalls::map_info(control.as_fd()).map_err(TrackerError::io("info of CONTROL"))?;
    // A layout that is not this one cannot be read: its generations end.
    if info.value_size as usize != size_of::<DiskControl>() || info.max_entries > options.slots {
        return Ok(Vec::new());
    }
    let clone_fds =
        |fds: &BTreeMap<String, OwnedFd>| -> Result<BTreeMap<String, OwnedFd>, TrackerError> {
            fds.iter()
                .map(|(name, fd)| {
                    Ok((
                        name.clone(),
                        fd.try_clone().map_err(TrackerError::io("dup"))?,
                    ))
                })
                .collect()
        };
    let old_maps = Arc::new(Maps::new(
        clone_fds(&old.maps)?,
        clone_fds(&old.programs)?,
        info.max_entries,
    )?);
    let mut carried = Vec::new();
    for slot in 0..info.max_entries {
        let control = old_maps.control_copy(slot);
        if control.diskseq == 0 || control.layout != LAYOUT_VERSION {
            continue;
        }
        let disk = Disk::from_control(&control);
        let from = DiskTrack::open(old_maps.clone(), slot, &disk)?;
        let to = DiskTrack::create(
            maps.clone(),
            slot,
            &disk,
            Geometry::from_control(&control),
            Epoch(control.epoch).next(),
        )?;
        to.continue_generation(&control);
        to.publish()?;
        carried.push((from, to));
    }
    Ok(carried)
}
