//! One tracked disk: its stamps, counters and statistics, and the views of its volumes.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use soe_common::record::{
    CHUNK_BLOCKS, CHUNKS_PER_PAGE, ChunkStamp, DISK_TRACED, DiskControl, DiskCounters, DiskStats,
    LAYOUT_VERSION, MAX_SLICES, REGIONS_PER_PAGE, RegionHeat, Slice,
};
use soe_common::{Epoch, SECTOR_SIZE};
use uuid::Uuid;

use super::TrackerError;
use super::counting::Witness;
use super::maps::Maps;
use super::syscalls::{self, Mapped, PAGE};
use super::tracker::grace;
use super::volumes::Disk;
use crate::seam::{ByteRange, ChangeMap, GenerationEnd, Reading, Rest, TrackError, Tracking};

/// How a disk is cut into blocks and regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Sectors of the disk.
    pub sectors: u64,
    /// log2 of the sectors that a stamp covers.
    pub block_shift: u32,
    /// log2 of the sectors of a heat region.
    pub region_shift: u32,
}

impl Geometry {
    /// Regions of heat are 1 MiB, and there are at most this many of them.
    const MAX_REGIONS: u64 = 1 << 20;

    /// Blocks of at least `min_block` bytes, larger where stamps would take more than
    /// `max_stamp_bytes`, at most 1 MiB.
    pub fn for_disk(disk: &Disk, min_block: u32, max_stamp_bytes: u64) -> Self {
        let mut block_shift = (u64::from(min_block.clamp(4096, 1 << 20)) / SECTOR_SIZE).ilog2();
        while block_shift < 11 && (disk.sectors >> block_shift) * 4 > max_stamp_bytes {
            block_shift += 1;
        }
        let mut region_shift = 11;
        while disk.sectors >> region_shift > Self::MAX_REGIONS {
            region_shift += 1;
        }
        Self {
            sectors: disk.sectors,
            block_shift,
            region_shift,
        }
    }

    /// The geometry that a slot was laid out with.
    pub fn from_control(control: &DiskControl) -> Self {
        Self {
            sectors: control.sectors,
            block_shift: control.block_shift,
            region_shift: control.region_shift,
        }
    }

    fn blocks(&self) -> u64 {
        self.sectors.div_ceil(1 << self.block_shift)
    }
    fn chunks(&self) -> u64 {
        self.blocks().div_ceil(CHUNK_BLOCKS).max(1)
    }
    fn chunk_pages(&self) -> u64 {
        self.chunks().div_ceil(CHUNKS_PER_PAGE)
    }
    fn heat_pages(&self) -> u64 {
        self.sectors
            .div_ceil(1 << self.region_shift)
            .div_ceil(REGIONS_PER_PAGE)
            .max(1)
    }
}

/// One disk's part of the kernel half.
pub struct DiskTrack {
    pub(super) maps: Arc<Maps>,
    pub(super) slot: u32,
    pub(super) disk: Disk,
    geometry: Geometry,
    stamps: Mapped,
    chunks: Mapped,
    heat: Mapped,
    pub(super) witness: Witness,
}

pub(super) fn atomic32<'a>(at: *mut u32) -> &'a AtomicU32 {
    // SAFETY: callers pass addresses within mappings that live as long as the track; the kernel
    // accesses the same words with single plain or atomic instructions.
    unsafe { AtomicU32::from_ptr(at) }
}

pub(super) fn atomic64<'a>(at: *mut u64) -> &'a AtomicU64 {
    // SAFETY: as in `atomic32`.
    unsafe { AtomicU64::from_ptr(at) }
}

/// The address of a word of the slot's control record.
macro_rules! word {
    ($track:expr, $field:ident) => {
        // SAFETY: the address of a field within the mapping.
        unsafe { &raw mut (*$track.maps.control_of($track.slot)).$field }
    };
}

pub(super) use word;

impl DiskTrack {
    fn map(
        maps: Arc<Maps>,
        slot: u32,
        disk: &Disk,
        geometry: Geometry,
        fds: [&impl AsFd; 3],
    ) -> Result<Self, TrackerError> {
        let mapped = |fd: &_, pages: u64, what: &str| {
            Mapped::new(fd, pages as usize * PAGE)
                .map_err(TrackerError::io(format!("mmap of {what}")))
        };
        Ok(Self {
            stamps: mapped(fds[0], geometry.chunks(), "stamps")?,
            chunks: mapped(fds[1], geometry.chunk_pages(), "chunk stamps")?,
            heat: mapped(fds[2], geometry.heat_pages(), "heat")?,
            witness: Witness::default(),
            maps,
            slot,
            disk: disk.clone(),
            geometry,
        })
    }

    /// Lays out a free slot for `disk`. The programs find it only after [`Self::publish`].
    pub(super) fn create(
        maps: Arc<Maps>,
        slot: u32,
        disk: &Disk,
        geometry: Geometry,
        epoch: Epoch,
    ) -> Result<Self, TrackerError> {
        let create = |name: &str, outer: &str, pages: u64| {
            let inner = syscalls::create_page_array(name, pages as u32)
                .map_err(TrackerError::io(format!("map of {name} for {}", disk.name)))?;
            syscalls::update_inner(maps.map(outer), slot, inner.as_fd())
                .map_err(TrackerError::io(format!("slot {slot} of {outer}")))?;
            Ok::<_, TrackerError>(inner)
        };
        let fds = [
            create("soe_stamps", "STAMPS", geometry.chunks())?,
            create("soe_chunks", "CHUNKS", geometry.chunk_pages())?,
            create("soe_heat", "HEAT", geometry.heat_pages())?,
        ];
        let mut slices = [Slice::default(); MAX_SLICES];
        slices[0] = Slice {
            start: 0,
            end: geometry.sectors,
        };
        let control = DiskControl {
            epoch: epoch.0,
            layout: LAYOUT_VERSION,
            flags: disk.flags,
            block_shift: geometry.block_shift,
            region_shift: geometry.region_shift,
            slices: 1,
            window: 1,
            interval: 1,
            slice: slices,
            diskseq: disk.diskseq,
            generation: *Uuid::new_v4().as_bytes(),
            sectors: geometry.sectors,
            mapping: disk.mapping,
            own_tgid: std::process::id(),
            miss_base: maps.misses().map_err(TrackerError::io("skipped runs"))?[0],
            ..DiskControl::default()
        };
        // SAFETY: within the mapping; no program knows the slot yet.
        unsafe { maps.control_of(slot).write_volatile(control) };
        let mut zero = vec![DiskCounters::default(); maps.cpus];
        syscalls::update_per_cpu(maps.map("COUNTERS"), slot, &mut zero)
            .map_err(TrackerError::io("COUNTERS"))?;
        // SAFETY: statistics are plain integers; all zero is valid.
        let mut zero: Vec<DiskStats> = vec![unsafe { std::mem::zeroed() }; maps.cpus];
        syscalls::update_per_cpu(maps.map("STATS"), slot, &mut zero)
            .map_err(TrackerError::io("STATS"))?;
        Self::map(maps, slot, disk, geometry, [&fds[0], &fds[1], &fds[2]])
    }

    /// Opens a slot that is already tracked.
    pub(super) fn open(maps: Arc<Maps>, slot: u32, disk: &Disk) -> Result<Self, TrackerError> {
        let geometry = Geometry::from_control(&maps.control_copy(slot));
        let inner = |outer: &str| {
            syscalls::lookup_inner(maps.map(outer), slot)
                .and_then(|fd| fd.ok_or(io::ErrorKind::NotFound.into()))
                .map_err(TrackerError::io(format!("slot {slot} of {outer}")))
        };
        let fds = [inner("STAMPS")?, inner("CHUNKS")?, inner("HEAT")?];
        Self::map(maps, slot, disk, geometry, [&fds[0], &fds[1], &fds[2]])
    }

    /// Lets the programs find the slot: marking begins with the next bio.
    pub(super) fn publish(&self) -> Result<(), TrackerError> {
        fence(Ordering::SeqCst);
        let slot = u64::from(self.slot);
        for path in &self.disk.hidden_paths {
            let marked = slot | u64::from(soe_common::record::SLOT_PATH);
            self.maps.publish(*path, marked)?;
        }
        self.maps.publish(self.disk.diskseq, slot)
    }

    /// Takes over what a replaced set knew of this disk, except its counters.
    pub(super) fn continue_generation(&self, old: &DiskControl) {
        // SAFETY: within the mapping; not published yet.
        unsafe {
            let control = self.maps.control_of(self.slot);
            (&raw mut (*control).generation).write_volatile(old.generation);
            (&raw mut (*control).slices).write_volatile(old.slices);
            (&raw mut (*control).slice).write_volatile(old.slice);
            (&raw mut (*control).taint).write_volatile(old.taint);
            (&raw mut (*control).failed_epoch).write_volatile(old.failed_epoch);
            (&raw mut (*control).mapping).write_volatile(old.mapping);
        }
    }

    /// Raises every stamp to that of `old`, whose programs are detached. Ours may be marking.
    pub(super) fn absorb(&self, old: &DiskTrack) {
        let raise = |to: *mut u32, from: *mut u32| {
            let stamp = atomic32(from).load(Ordering::Relaxed);
            atomic32(to).fetch_max(stamp, Ordering::SeqCst);
        };
        for chunk in 0..self.geometry.chunks() {
            let (to, from) = (self.chunk(chunk), old.chunk(chunk));
            // SAFETY: addresses of fields within the mappings.
            let touched = unsafe { &raw mut (*from).touched };
            if atomic32(touched).load(Ordering::Relaxed) == 0 {
                continue;
            }
            for block in 0..CHUNK_BLOCKS {
                raise(self.stamp(chunk, block), old.stamp(chunk, block));
            }
            // SAFETY: as above.
            unsafe {
                raise(&raw mut (*to).all, &raw mut (*from).all);
                raise(&raw mut (*to).touched, touched);
            }
        }
        // The old programs' taints up to their end count as well.
        let gone = old.maps.control_copy(old.slot);
        atomic64(word!(self, taint)).fetch_or(gone.taint, Ordering::SeqCst);
        // So do their misses, which the newest layers refer to.
        if let Ok((_, misses)) = old.counters() {
            self.found(&misses);
            // What the old generation had forgiven is forgiven still.
            let control = self.maps.control_of(self.slot);
            // SAFETY: within the mapping; only the agent writes this word.
            unsafe {
                let base = (&raw const (*control).miss_base).read_volatile();
                (&raw mut (*control).miss_base).write_volatile(base + gone.miss_base);
            }
        }
    }

    fn chunk(&self, chunk: u64) -> *mut ChunkStamp {
        self.chunks.at(chunk as usize * size_of::<ChunkStamp>())
    }

    fn stamp(&self, chunk: u64, block: u64) -> *mut u32 {
        self.stamps.at((chunk * CHUNK_BLOCKS + block) as usize * 4)
    }

    /// The disk behind the slot.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Slot number, which trace records carry.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Block and region sizes.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The generation the stamps belong to.
    pub fn generation(&self) -> Uuid {
        Uuid::from_bytes(self.maps.control_copy(self.slot).generation)
    }

    /// The current epoch.
    pub fn epoch(&self) -> Epoch {
        Epoch(atomic32(word!(self, epoch)).load(Ordering::SeqCst))
    }

    /// Begins the next epoch.
    pub fn bump(&self) -> Epoch {
        let epoch = atomic32(word!(self, epoch)).fetch_add(1, Ordering::SeqCst) + 1;
        fence(Ordering::SeqCst);
        Epoch(epoch)
    }

    /// Ends the generation and begins another: taints and misses up to now belong to the old one.
    pub fn begin_generation(&self) -> Result<Uuid, TrackerError> {
        let [queue, _] = self
            .maps
            .misses()
            .map_err(TrackerError::io("skipped runs"))?;
        let generation = Uuid::new_v4();
        // SAFETY: within the mapping; only the agent writes these words.
        unsafe {
            let control = self.maps.control_of(self.slot);
            let found = (&raw const (*control).found).read_volatile();
            (&raw mut (*control).miss_base).write_volatile(queue + found[0]);
            (&raw mut (*control).rest_epoch).write_volatile(0);
            (&raw mut (*control).generation).write_volatile(*generation.as_bytes());
        }
        let taint = atomic64(word!(self, taint)).swap(0, Ordering::SeqCst);
        // Of what was lost nobody will hear again.
        if taint & (soe_common::record::TAINT_BOOKS | soe_common::record::TAINT_STASH) != 0 {
            self.forget_base();
        }
        self.bump();
        Ok(generation)
    }

    /// Switches the recording of every IO on or off (the programs must be attached too).
    pub fn set_traced(&self, on: bool) {
        let flags = atomic32(word!(self, flags));
        if on {
            flags.fetch_or(DISK_TRACED, Ordering::SeqCst);
        } else {
            flags.fetch_and(!DISK_TRACED, Ordering::SeqCst);
        }
    }

    /// Begins the next statistics window, and the next heat interval when `interval` says so.
    pub fn next_window(&self, interval: bool) {
        atomic32(word!(self, window)).fetch_add(1, Ordering::Relaxed);
        if interval {
            atomic32(word!(self, interval)).fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Slices of the disk that are counted apart: the whole disk first.
    pub fn slices(&self) -> Vec<Slice> {
        let control = self.maps.control_copy(self.slot);
        control.slice[..(control.slices as usize).clamp(1, MAX_SLICES)].to_vec()
    }

    /// The index of the slice `[start, end)` in sectors, which is begun when it is new.
    pub fn slice(&self, start: u64, end: u64) -> Result<usize, TrackerError> {
        let slices = self.slices();
        if let Some(index) = slices.iter().position(|s| s.start == start && s.end == end) {
            return Ok(index);
        }
        let index = slices.len();
        if index == MAX_SLICES {
            return Err(TrackerError::Full {
                slots: MAX_SLICES as u32,
            });
        }
        // SAFETY: within the mapping; the programs look at the slice only once it is counted.
        unsafe {
            (&raw mut (*self.maps.control_of(self.slot)).slice[index])
                .write_volatile(Slice { start, end });
        }
        // Bios under way now will be completed without having been queued in this slice: it has no base
        // before the disk is found at rest. The other slices keep theirs.
        atomic32(word!(self, slices)).store(index as u32 + 1, Ordering::SeqCst);
        Ok(index)
    }

    /// Whether the map tells the whole truth.
    pub fn tracking(&self) -> Tracking {
        use soe_common::record::{
            TAINT_BOOKS, TAINT_DISCARD, TAINT_PASSTHROUGH, TAINT_RANGE, TAINT_STASH,
        };
        let taint = atomic64(word!(self, taint)).load(Ordering::SeqCst);
        if taint & TAINT_RANGE != 0 {
            return Tracking::Tainted(GenerationEnd::Resize);
        }
        if taint & TAINT_PASSTHROUGH != 0 {
            return Tracking::Tainted(GenerationEnd::Passthrough);
        }
        if taint & (TAINT_STASH | TAINT_DISCARD) != 0 {
            return Tracking::Tainted(GenerationEnd::GapMiss);
        }
        if taint & TAINT_BOOKS != 0 {
            return Tracking::Tainted(GenerationEnd::CounterMismatch);
        }
        let control = self.maps.control_copy(self.slot);
        let Ok(now) = self.maps.misses() else {
            return Tracking::Detached;
        };
        // Where the range is remembered at the queue, a missed queue event takes both marks: the
        // completion does not know what it completes. Elsewhere one mark stands in for the other,
        // which a capture judges from its base on (`capture::select`).
        if self.disk.is_bio_based() && now[0] + control.found[0] > control.miss_base {
            return Tracking::Tainted(GenerationEnd::GapMiss);
        }
        match self.disk.is_still_there() {
            true => Tracking::Complete,
            false => Tracking::Tainted(GenerationEnd::Remapped),
        }
    }

    /// Byte ranges of the whole disk whose stamp is `since` or later, within `[start, end)` sectors.
    fn changed_since(&self, since: Epoch, start: u64, end: u64) -> Vec<ByteRange> {
        let block_bytes = SECTOR_SIZE << self.geometry.block_shift;
        let (start, end) = (
            start * SECTOR_SIZE,
            end.min(self.geometry.sectors) * SECTOR_SIZE,
        );
        let mut out: Vec<ByteRange> = Vec::new();
        if start >= end {
            return out;
        }
        let mut push = |from: u64, to: u64| {
            let (from, to) = (from.max(start), to.min(end));
            if from >= to {
                return;
            }
            match out.last_mut() {
                Some(last) if last.end() == from => last.len += to - from,
                _ => out.push(ByteRange::new(from, to - from)),
            }
        };
        let chunk_bytes = block_bytes * CHUNK_BLOCKS;
        for chunk in start / chunk_bytes..=(end - 1) / chunk_bytes {
            let stamp = self.chunk(chunk);
            // SAFETY: addresses of fields within the mapping.
            let (touched, all) = unsafe { (&raw mut (*stamp).touched, &raw mut (*stamp).all) };
            if atomic32(touched).load(Ordering::SeqCst) < since.0 {
                continue;
            }
            if atomic32(all).load(Ordering::SeqCst) >= since.0 {
                push(chunk * chunk_bytes, (chunk + 1) * chunk_bytes);
                continue;
            }
            for block in 0..CHUNK_BLOCKS {
                if atomic32(self.stamp(chunk, block)).load(Ordering::Relaxed) >= since.0 {
                    let from = chunk * chunk_bytes + block * block_bytes;
                    push(from, from + block_bytes);
                }
            }
        }
        out
    }

    /// Statistics since tracking began, one value per CPU.
    pub fn stats(&self) -> Result<Vec<DiskStats>, TrackerError> {
        syscalls::lookup_per_cpu(self.maps.map("STATS"), self.slot, self.maps.cpus)
            .and_then(|values| values.ok_or(io::ErrorKind::NotFound.into()))
            .map_err(TrackerError::io(format!(
                "statistics of {}",
                self.disk.name
            )))
    }

    /// Regions of this disk and their heat counters since tracking began; only touched ones.
    pub fn heat(&self) -> Vec<(u64, RegionHeat)> {
        let regions = self.geometry.heat_pages() * REGIONS_PER_PAGE;
        (0..regions)
            .map(|region| {
                let at: *mut RegionHeat = self.heat.at(region as usize * size_of::<RegionHeat>());
                // SAFETY: within the mapping; counters may be a moment apart.
                (region, unsafe { at.read_volatile() })
            })
            .filter(|(_, heat)| heat.reads != 0 || heat.writes != 0)
            .collect()
    }
}

/// One volume's view of its disk's change map.
pub struct SliceMap {
    track: Arc<DiskTrack>,
    name: String,
    slice: usize,
    start: u64,
    end: u64,
}

impl SliceMap {
    /// The view of the sectors `[start, end)` of `track`, under the name `name`.
    pub fn new(
        track: Arc<DiskTrack>,
        name: &str,
        start: u64,
        end: u64,
    ) -> Result<Self, TrackerError> {
        let slice = track.slice(start, end)?;
        Ok(Self {
            track,
            name: name.into(),
            slice,
            start,
            end,
        })
    }

    /// The disk behind the volume.
    pub fn track(&self) -> &Arc<DiskTrack> {
        &self.track
    }

    fn kernel(&self, call: &'static str) -> impl FnOnce(io::Error) -> TrackError {
        let volume = self.name.clone();
        move |source| TrackError::Kernel {
            volume,
            call,
            source,
        }
    }
}

impl ChangeMap for SliceMap {
    fn volume(&self) -> &str {
        &self.name
    }
    fn volume_bytes(&self) -> u64 {
        (self.end - self.start) * SECTOR_SIZE
    }
    fn block_size(&self) -> u32 {
        (SECTOR_SIZE as u32) << self.track.geometry.block_shift
    }
    fn generation(&self) -> Uuid {
        self.track.generation()
    }
    fn epoch(&self) -> Epoch {
        self.track.epoch()
    }
    fn bump(&self) -> Result<Epoch, TrackError> {
        Ok(self.track.bump())
    }
    fn rest(&self) -> Option<Rest> {
        self.track.rest()
    }
    fn settle(&self) -> Result<(), TrackError> {
        self.track
            .settle()
            .map(drop)
            .map_err(self.kernel("finding the disk at rest"))
    }
    fn grace(&self) -> Result<(), TrackError> {
        grace().map_err(self.kernel("membarrier"))
    }
    fn reading(&self) -> Result<Reading, TrackError> {
        self.track
            .reading(self.slice)
            .map_err(self.kernel("reading the write counters"))
    }
    fn changed_since(&self, since: Epoch) -> Result<Vec<ByteRange>, TrackError> {
        let start = self.start * SECTOR_SIZE;
        let mut ranges = self.track.changed_since(since, self.start, self.end);
        for range in &mut ranges {
            range.offset -= start;
        }
        Ok(ranges)
    }
    fn tracking(&self) -> Tracking {
        self.track.tracking()
    }
}
