//! Reads of kernel structures. The offsets come from the running kernel's BTF and are read-only when
//! the programs are verified, so every load is checked against the structure's type by the verifier
//! and needs no `bpf_probe_read_kernel`.

use core::ptr::read_volatile;

use soe_common::record::KernelOffsets;

/// Filled in by the loader.
#[unsafe(no_mangle)]
static OFFSETS: KernelOffsets = KernelOffsets {
    bio_next: 0,
    bio_bdev: 0,
    bio_opf: 0,
    bio_ioprio: 0,
    bio_status: 0,
    bio_sector: 0,
    bio_size: 0,
    bio_blkg: 0,
    bdev_disk: 0,
    disk_diskseq: 0,
    rq_q: 0,
    rq_bio: 0,
    rq_cmd_flags: 0,
    rq_sector: 0,
    rq_start: 0,
    queue_disk: 0,
    blkg_blkcg: 0,
    blkcg_cgroup: 0,
    cgroup_kn: 0,
    kn_id: 0,
    rq_size: 0,
    scsi_cmnd: 0,
};

macro_rules! offset {
    ($field:ident) => {
        offset_at(&raw const OFFSETS.$field)
    };
}

#[inline(always)]
fn offset_at(field: *const u32) -> usize {
    // SAFETY: a plain load from the program's read-only data.
    unsafe { read_volatile(field) as usize }
}

macro_rules! load {
    ($base:expr, $field:ident, $ty:ty) => {
        // SAFETY: the verifier knows the type behind the pointer and accepts only offsets at which
        // it has a member; a fault reads as zero.
        unsafe { read_volatile(($base + offset!($field)) as *const $ty) }
    };
}

/// A `struct bio`.
#[derive(Clone, Copy)]
pub struct Bio(pub usize);

impl Bio {
    #[inline(always)]
    pub fn op(self) -> u32 {
        load!(self.0, bio_opf, u32) & 0xff
    }
    #[inline(always)]
    pub fn sector(self) -> u64 {
        load!(self.0, bio_sector, u64)
    }
    #[inline(always)]
    pub fn bytes(self) -> u32 {
        load!(self.0, bio_size, u32)
    }
    #[inline(always)]
    pub fn ioprio(self) -> u16 {
        load!(self.0, bio_ioprio, u16)
    }
    #[inline(always)]
    pub fn status(self) -> u8 {
        load!(self.0, bio_status, u8)
    }
    #[inline(always)]
    pub fn next(self) -> Bio {
        Bio(load!(self.0, bio_next, usize))
    }
    #[inline(always)]
    pub fn diskseq(self) -> u64 {
        let bdev = load!(self.0, bio_bdev, usize);
        let disk = load!(bdev, bdev_disk, usize);
        load!(disk, disk_diskseq, u64)
    }
    /// Id of the cgroup that owns the bio; 0 where there is none. Writeback threads submit for
    /// others, so the current task would be a stranger.
    #[inline(always)]
    pub fn cgroup(self) -> u64 {
        let blkg = load!(self.0, bio_blkg, usize);
        if blkg == 0 {
            return 0;
        }
        let blkcg = load!(blkg, blkg_blkcg, usize);
        let cgroup = load!(blkcg, blkcg_cgroup, usize);
        let kn = load!(cgroup, cgroup_kn, usize);
        load!(kn, kn_id, u64)
    }
}

/// A `struct request`.
#[derive(Clone, Copy)]
pub struct Request(pub usize);

impl Request {
    #[inline(always)]
    pub fn op(self) -> u32 {
        load!(self.0, rq_cmd_flags, u32) & 0xff
    }
    #[inline(always)]
    pub fn sector(self) -> u64 {
        load!(self.0, rq_sector, u64)
    }
    #[inline(always)]
    pub fn start_ns(self) -> u64 {
        load!(self.0, rq_start, u64)
    }
    #[inline(always)]
    pub fn bio(self) -> Bio {
        Bio(load!(self.0, rq_bio, usize))
    }
    #[inline(always)]
    pub fn diskseq(self) -> u64 {
        let queue = load!(self.0, rq_q, usize);
        let disk = load!(queue, queue_disk, usize);
        if disk == 0 {
            return 0;
        }
        load!(disk, disk_diskseq, u64)
    }
    /// Address of the driver's own data behind the request.
    #[inline(always)]
    pub fn driver_data(self) -> usize {
        self.0 + offset!(rq_size)
    }
}

/// Offset of the command bytes within `struct scsi_cmnd`.
#[inline(always)]
pub fn scsi_cmnd_offset() -> usize {
    offset!(scsi_cmnd)
}

/// Offsets for walking a list of bios by probe reads.
#[derive(Clone, Copy)]
pub struct BioOffsets {
    pub sector: usize,
    pub bytes: usize,
    pub next: usize,
}

/// See [`BioOffsets`].
#[inline(always)]
pub fn bio_offsets() -> BioOffsets {
    BioOffsets {
        sector: offset!(bio_sector),
        bytes: offset!(bio_size),
        next: offset!(bio_next),
    }
}
