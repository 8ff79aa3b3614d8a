//! Records that cross the kernel boundary.
//!
//! All are `repr(C)`, all padding is spelled out, and all sizes are asserted. [`LAYOUT_VERSION`]
//! goes up with any change here: pinned maps of another version are not adopted.

use crate::histogram::BUCKETS;

/// Version of every layout in this file, kept in each [`DiskControl`].
pub const LAYOUT_VERSION: u32 = 2;

/// Entries of the table from `diskseq` to slot.
pub const SLOT_ENTRIES: usize = 1024;
/// Entries after its own in which a `diskseq` may lie.
pub const SLOT_PROBES: usize = 8;

/// One entry of the table from `diskseq` to slot: open addressing, at `diskseq % SLOT_ENTRIES` or one of
/// the places behind it. A hash map would do, but look-ups in an array are inlined, and there are four an IO.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotEntry {
    /// The disk; 0 where there is none.
    pub diskseq: u64,
    /// Its slot, with [`SLOT_PATH`] for a path.
    pub slot: u64,
}

/// Slot bit in the `diskseq` table that marks a hidden path disk of a multipath head: its requests
/// count for the head's slot, its bio completions do not.
pub const SLOT_PATH: u32 = 1 << 31;

/// Blocks whose stamps share one element of the stamp map. BPF rounds array elements up to 8 bytes,
/// so stamps are packed; 1,024 of 4 bytes make an element one page.
pub const CHUNK_BLOCKS: u64 = 1024;
/// Chunk stamps in one element of the chunk map: one page as well.
pub const CHUNKS_PER_PAGE: u64 = 512;
/// Region records in one element of the heat map: one page as well.
pub const REGIONS_PER_PAGE: u64 = 256;
/// Slices (the whole disk and partitions of it) whose counters one disk can carry.
pub const MAX_SLICES: usize = 8;
/// Concurrent sequential streams told apart per CPU, disk and direction.
pub const STREAMS: usize = 8;
/// Octaves of the seek-distance and size histograms (log2 of sectors).
pub const OCTAVES: usize = 40;

/// One page of the stamp map: the epoch in which each block of a chunk was last written.
pub type StampPage = [u32; CHUNK_BLOCKS as usize];

/// What is known of a chunk as a whole.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkStamp {
    /// The newest epoch in which any block of the chunk was written.
    pub touched: u32,
    /// The newest epoch in which *every* block of the chunk was written at once (large discards):
    /// a block's stamp is the larger of this and its own.
    pub all: u32,
}

/// One page of the chunk map.
pub type ChunkPage = [ChunkStamp; CHUNKS_PER_PAGE as usize];

/// The disk's bios complete without becoming requests (zram, dm, md, pmem, NVMe multipath heads).
pub const DISK_BIO_BASED: u32 = 1;
/// Every IO is recorded to the ring buffer.
pub const DISK_TRACED: u32 = 2;
/// Passthrough commands carry NVMe opcodes.
pub const DISK_NVME: u32 = 4;
/// Passthrough commands carry SCSI opcodes.
pub const DISK_SCSI: u32 = 8;

/// A mark fell outside the map: the disk grew.
pub const TAINT_RANGE: u64 = 1;
/// The range of a bio could not be remembered until its completion.
pub const TAINT_STASH: u64 = 2;
/// A passthrough command that may write was issued.
pub const TAINT_PASSTHROUGH: u64 = 4;
/// A discard request had more bios than one run may walk.
pub const TAINT_DISCARD: u64 = 8;
/// The books did not balance for so long that nobody can say what is missing. Set by the agent.
pub const TAINT_BOOKS: u64 = 16;

/// A range of sectors of the disk whose writes are counted apart.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slice {
    /// First sector.
    pub start: u64,
    /// First sector after the slice.
    pub end: u64,
}

/// What the agent tells the programs about one disk, and the few words they answer with.
/// Lives in a mapped array, one element per slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskControl {
    /// The current epoch; only the agent writes it.
    pub epoch: u32,
    /// [`LAYOUT_VERSION`].
    pub layout: u32,
    /// `DISK_*` bits.
    pub flags: u32,
    /// log2 of the sectors that a stamp covers.
    pub block_shift: u32,
    /// log2 of the sectors of a heat region.
    pub region_shift: u32,
    /// Number of slices in use; slice 0 is the whole disk.
    pub slices: u32,
    /// Number of the current statistics window, for "unique in this window".
    pub window: u32,
    /// Number of the current heat interval, for "read again in this interval".
    pub interval: u32,
    /// `TAINT_*` bits, set by the programs, cleared by the agent with a new generation.
    pub taint: u64,
    /// Epoch of the newest write that failed.
    pub failed_epoch: u64,
    /// The slices; those past `slices` are empty.
    pub slice: [Slice; MAX_SLICES],
    /// Identity of the disk (`diskseq`), so that a pinned slot can be matched on restart.
    pub diskseq: u64,
    /// The generation's UUID.
    pub generation: [u8; 16],
    /// Sectors of the disk when the slot was filled.
    pub sectors: u64,
    /// Process id of the agent, whose IO is no load.
    pub own_tgid: u32,
    /// A bit per slice: `base` has its meaning.
    pub based: u32,
    /// Per slice, `queued - completed` at a moment when nothing was in flight: bios that were under
    /// way when the programs were attached leave it different from zero, and so do events that no
    /// program saw.
    pub base: [i64; MAX_SLICES],
    /// The device's own count of sectors written and discarded, less what the programs had counted,
    /// at that moment.
    pub stat_base: i64,
    /// Misses of the queue side when the generation began.
    pub miss_base: u64,
    /// Misses of the queue side when the books were last balanced at rest.
    pub queue_base: u64,
    /// Misses that no program counted: found by the books (queue, completion), or carried over from
    /// a replaced set of programs (queue, completion, stash, failed writes).
    pub found: [u64; 4],
    /// 1 while the counters are known to lack queue events: nothing is believed before a rest.
    pub untrue: u64,
    /// An epoch in which the disk was proven to be at rest in this generation; 0: not yet.
    pub rest_epoch: u64,
    /// The misses (as in `found`) at that rest.
    pub rest_misses: [u64; 4],
    /// Digest of the device-mapper tables behind the disk when the slot was filled; 0 where there
    /// are none.
    pub mapping: u64,
}
const _: () = assert!(size_of::<DiskControl>() == 88 + 24 * MAX_SLICES + 112);

/// Sectors of write-like IO of one slice.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flight {
    /// Queued.
    pub queued: u64,
    /// Completed.
    pub completed: u64,
}

/// Per-CPU counters of change tracking.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskCounters {
    /// Per slice.
    pub slice: [Flight; MAX_SLICES],
    /// Write-like completions that carried an error.
    pub failed_writes: u64,
    /// Bios whose range could not be remembered.
    pub stash_failures: u64,
    /// Sectors of bios that were turned away before they became requests; the device's own
    /// statistics never saw them. On bio-based disks, of bios that ended with an error, which the
    /// statistics may or may not have seen.
    pub rejected: u64,
}
const _: () = assert!(size_of::<DiskCounters>() == 16 * MAX_SLICES + 24);

/// The range of a bio between queue and completion, on bio-based disks.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StashedBio {
    /// First sector.
    pub sector: u64,
    /// Sectors.
    pub sectors: u32,
    /// Slot of the disk.
    pub slot: u32,
}

/// One direction's statistics.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DirectionStats {
    /// Bios.
    pub ops: u64,
    /// Bytes.
    pub bytes: u64,
    /// Bios that continued one of the recent streams.
    pub sequential: u64,
    /// Bios whose region had not been touched in this window before.
    pub fresh_regions: u64,
    /// Bios whose region had been touched by the same direction in this interval already.
    pub repeated: u64,
    /// Sum of the latencies of requests, in nanoseconds.
    pub latency_sum: u64,
    /// Requests by latency.
    pub latency: [u32; BUCKETS],
    /// Bios by log2 of their sectors.
    pub size: [u32; OCTAVES],
    /// Bios by log2 of the distance in sectors from the previous bio's end.
    pub seek: [u32; OCTAVES],
    /// Ends (sectors) of the recent streams.
    pub stream: [u64; STREAMS],
    /// The stream to be replaced next, and where the last bio ended.
    pub next_stream: u64,
    /// End of the last bio.
    pub last_end: u64,
}

/// Per-CPU statistics of one disk.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DiskStats {
    /// Reads.
    pub read: DirectionStats,
    /// Writes.
    pub write: DirectionStats,
    /// Discards and secure erases.
    pub discard_ops: u64,
    /// Their bytes.
    pub discard_bytes: u64,
    /// Flushes without data.
    pub flush_ops: u64,
    /// Bios queued (any kind), for the queue depth.
    pub started: u64,
    /// Requests or bios done. `started - done` over all CPUs drifts with merges, so the depth is
    /// taken from time: the sum of latencies over a window divided by its length.
    pub done: u64,
    /// The agent's own bios, left out of everything above.
    pub own_ops: u64,
    /// Their bytes.
    pub own_bytes: u64,
    /// The cgroup that this CPU served last, and what it did since then that is not in the map of
    /// cgroups yet.
    pub cgroup: u64,
    /// See `cgroup`.
    pub current: CgroupStats,
}

/// Heat of one region.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionHeat {
    /// Read bios since tracking began.
    pub reads: u32,
    /// Write bios since tracking began.
    pub writes: u32,
    /// The window in which the region was last touched.
    pub window: u32,
    /// The interval in which it was last read.
    pub interval: u32,
}
/// One page of the heat map.
pub type HeatPage = [RegionHeat; REGIONS_PER_PAGE as usize];

/// Key of the per-cgroup counters.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CgroupKey {
    /// The cgroup's id (its kernfs node id).
    pub cgroup: u64,
    /// Slot of the disk.
    pub slot: u32,
    /// Zero.
    pub pad: u32,
}

/// What one cgroup did to one disk.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CgroupStats {
    /// Read bios.
    pub read_ops: u64,
    /// Write bios.
    pub write_ops: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
}

/// One IO, from the ring buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoEvent {
    /// When it completed, on the kernel's monotonic clock, in nanoseconds.
    pub at: u64,
    /// First sector on the whole disk.
    pub sector: u64,
    /// Nanoseconds from queue to completion.
    pub latency: u64,
    /// Id of the cgroup that owns the IO.
    pub cgroup: u64,
    /// Sectors.
    pub sectors: u32,
    /// The request operation (`bi_opf & 0xff`).
    pub op: u32,
    /// Slot of the disk.
    pub slot: u32,
    /// Process that queued it.
    pub pid: u32,
    /// Its name.
    pub comm: [u8; 16],
}
const _: () = assert!(size_of::<IoEvent>() == 64);

/// A traced bio between queue and completion.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TracedBio {
    /// When it was queued.
    pub at: u64,
    /// First sector.
    pub sector: u64,
    /// Id of the cgroup.
    pub cgroup: u64,
    /// Sectors.
    pub sectors: u32,
    /// The operation.
    pub op: u32,
    /// Slot of the disk.
    pub slot: u32,
    /// Process.
    pub pid: u32,
    /// Its name.
    pub comm: [u8; 16],
}

/// Books of the ring buffer, per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceBooks {
    /// IOs of traced disks that completed.
    pub seen: u64,
    /// Records written.
    pub written: u64,
    /// Records dropped because the buffer was full.
    pub dropped: u64,
    /// Completions whose queue event was not seen.
    pub unmatched: u64,
}

/// Byte offsets of kernel structure members, found in the running kernel's BTF when the programs
/// are loaded.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelOffsets {
    /// `bio.bi_next`
    pub bio_next: u32,
    /// `bio.bi_bdev`
    pub bio_bdev: u32,
    /// `bio.bi_opf`
    pub bio_opf: u32,
    /// `bio.bi_ioprio`
    pub bio_ioprio: u32,
    /// `bio.bi_status`
    pub bio_status: u32,
    /// `bio.bi_iter.bi_sector`
    pub bio_sector: u32,
    /// `bio.bi_iter.bi_size`
    pub bio_size: u32,
    /// `bio.bi_blkg`
    pub bio_blkg: u32,
    /// `block_device.bd_disk`
    pub bdev_disk: u32,
    /// `gendisk.diskseq`
    pub disk_diskseq: u32,
    /// `request.q`
    pub rq_q: u32,
    /// `request.bio`
    pub rq_bio: u32,
    /// `request.cmd_flags`
    pub rq_cmd_flags: u32,
    /// `request.__sector`
    pub rq_sector: u32,
    /// `request.start_time_ns`
    pub rq_start: u32,
    /// `request_queue.disk`
    pub queue_disk: u32,
    /// `blkcg_gq.blkcg`
    pub blkg_blkcg: u32,
    /// `blkcg.css.cgroup`
    pub blkcg_cgroup: u32,
    /// `cgroup.kn`
    pub cgroup_kn: u32,
    /// `kernfs_node.id`
    pub kn_id: u32,
    /// `sizeof(struct request)`: a driver's own data follows it.
    pub rq_size: u32,
    /// `scsi_cmnd.cmnd`; `u32::MAX` where the kernel's BTF does not know it.
    pub scsi_cmnd: u32,
}

/// Request operations (`enum req_op`) that matter here; the odd ones change the disk.
pub mod op {
    /// Read.
    pub const READ: u32 = 0;
    /// Write.
    pub const WRITE: u32 = 1;
    /// Flush the volatile cache.
    pub const FLUSH: u32 = 2;
    /// Discard.
    pub const DISCARD: u32 = 3;
    /// Secure erase.
    pub const SECURE_ERASE: u32 = 5;
    /// Write zeroes.
    pub const WRITE_ZEROES: u32 = 9;
    /// Driver-private, to the host.
    pub const DRV_IN: u32 = 34;
    /// Driver-private, from the host.
    pub const DRV_OUT: u32 = 35;
    /// Passthrough of older kernels' SCSI layer and driver-private commands begin here.
    pub const FIRST_PASSTHROUGH: u32 = 32;

    /// Whether `op` changes the content of a disk.
    #[inline(always)]
    pub const fn is_write(op: u32) -> bool {
        op & 1 == 1 && op < FIRST_PASSTHROUGH
    }
}

/// The agent's own IO carries this level within the idle class of I/O priorities, so that the
/// programs can leave it out of the load at queue and at completion alike. (Best effort would not
/// do: a task of nice 5 to 9 has level 5 there.)
pub const OWN_IOPRIO_LEVEL: u16 = 5;
/// The idle class, in the place it has within an I/O priority.
pub const IOPRIO_CLASS_IDLE: u16 = 3 << 13;

/// Whether a bio of this I/O priority is the agent's own. Bits 3 to 12 are hints.
#[inline(always)]
pub const fn is_own_ioprio(ioprio: u16) -> bool {
    ioprio & 0xe007 == IOPRIO_CLASS_IDLE | OWN_IOPRIO_LEVEL
}
