//! The maps. Sizes given here are the least; the loader sets the real number of slots.

use aya_ebpf::{
    bindings::{BPF_F_INNER_MAP, BPF_F_MMAPABLE},
    btf_maps::{Array, ArrayOfMaps, HashMap, LruHashMap, LruPerCpuHashMap, PerCpuArray, RingBuf},
    macros::btf_map,
};
use soe_common::record::{
    CgroupKey, CgroupStats, ChunkPage, DiskControl, DiskCounters, DiskStats, HeatPage,
    SLOT_ENTRIES, SLOT_PROBES, SlotEntry, StampPage, StashedBio, TraceBooks, TracedBio,
};

const MMAP: usize = BPF_F_MMAPABLE as usize;
const INNER: usize = (BPF_F_MMAPABLE | BPF_F_INNER_MAP) as usize;

/// `diskseq` to slot. A `diskseq` is never used twice, unlike major:minor numbers.
#[btf_map]
pub static SLOTS: Array<SlotEntry, { SLOT_ENTRIES + SLOT_PROBES }, MMAP> = Array::new();

/// Per slot: what the agent says, and taints.
#[btf_map]
pub static CONTROL: Array<DiskControl, 64, MMAP> = Array::new();

/// Per slot: the stamps, one element per chunk of blocks.
#[btf_map]
pub static STAMPS: ArrayOfMaps<Array<StampPage, 1, INNER>, 64> = ArrayOfMaps::new();

/// Per slot: the chunk stamps.
#[btf_map]
pub static CHUNKS: ArrayOfMaps<Array<ChunkPage, 1, INNER>, 64> = ArrayOfMaps::new();

/// Per slot: heat by region.
#[btf_map]
pub static HEAT: ArrayOfMaps<Array<HeatPage, 1, INNER>, 64> = ArrayOfMaps::new();

/// Per slot and CPU: sectors queued and completed.
#[btf_map]
pub static COUNTERS: PerCpuArray<DiskCounters, 64> = PerCpuArray::new();

/// Ranges of write-like bios in flight on bio-based disks.
#[btf_map]
pub static STASH: HashMap<u64, StashedBio, 16384> = HashMap::new();

/// Per slot and CPU: statistics.
#[btf_map]
pub static STATS: PerCpuArray<DiskStats, 64> = PerCpuArray::new();

/// Start times of bios in flight on bio-based disks; statistics only, so the oldest may be lost.
#[btf_map]
pub static STARTED: LruHashMap<u64, u64, 16384> = LruHashMap::new();

/// Operations and bytes per cgroup and slot.
#[btf_map]
pub static CGROUPS: LruPerCpuHashMap<CgroupKey, CgroupStats, 4096> = LruPerCpuHashMap::new();

/// Bios of traced disks in flight.
#[btf_map]
pub static TRACED: LruHashMap<u64, TracedBio, 16384> = LruHashMap::new();

/// Records of traced disks.
#[btf_map]
pub static EVENTS: RingBuf<soe_common::record::IoEvent, 8388608> = RingBuf::new();

/// Books of `EVENTS`.
#[btf_map]
pub static BOOKS: PerCpuArray<TraceBooks, 1> = PerCpuArray::new();
