//! Change tracking: which blocks were written, and which writes are in flight.
//!
//! The order inside these programs carries the proof (docs/architecture.md, "The mark/cut
//! protocol"): at queue *count, load the epoch, stamp*; at completion *load the epoch, stamp,
//! count*. Counting is a fetching atomic, which is a full barrier, although the counters are
//! per CPU.
//!
//! The programs here are the only ones at their tracepoints that always run: each marks first, then
//! hands on to [`stats`]. A program of its own for the statistics would cost every IO another entry and
//! another look for the disk, a fifth of all.

use core::ffi::{c_long, c_void};
use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::{
    helpers::{bpf_loop, bpf_probe_read_kernel},
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use soe_common::record::{
    CHUNK_BLOCKS, CHUNKS_PER_PAGE, ChunkStamp, DISK_BIO_BASED, DISK_NVME, DISK_SCSI, DiskControl,
    DiskCounters, MAX_SLICES, SLOT_ENTRIES, SLOT_PATH, SLOT_PROBES, StampPage, StashedBio,
    TAINT_DISCARD, TAINT_PASSTHROUGH, TAINT_RANGE, TAINT_STASH, op,
};

use crate::kernel::{Bio, Request, bio_offsets, scsi_cmnd_offset};
use crate::maps::{CHUNKS, CONTROL, COUNTERS, SLOTS, STAMPS, STASH};
use crate::stats;

/// Bios that one discard request may hold before the volume is tainted.
const MAX_DISCARD_BIOS: u32 = 256;
/// Blocks that are stamped without a call of bpf_loop; at 64 KiB a block these are 2 MiB, more than
/// nearly all bios. The verifier walks every turn of a loop, so it is kept short.
const SHORT_RUN: usize = 32;
/// `BLK_STS_AGAIN`: the bio never reached the device.
const STATUS_AGAIN: u8 = 12;

/// Slot of a tracked disk and whether it is a path of a multipath head.
#[inline(always)]
pub fn slot_of(diskseq: u64) -> Option<(u32, bool)> {
    let home = diskseq as u32 % SLOT_ENTRIES as u32;
    for probe in 0..SLOT_PROBES as u32 {
        let entry = SLOTS.get_ptr(home + probe)?;
        // SAFETY: points into a map value; volatile, because the agent changes it. It writes the slot
        // before the disk, and lets a grace period pass before it gives a slot to another disk.
        let (found, slot) = unsafe {
            (
                read_volatile(&raw const (*entry).diskseq),
                read_volatile(&raw const (*entry).slot) as u32,
            )
        };
        // A free entry first: requests of a queue without a disk (NVMe's admin queue) bring 0 as well.
        if found == 0 {
            return None;
        }
        if found == diskseq {
            return Some((slot & !SLOT_PATH, slot & SLOT_PATH != 0));
        }
    }
    None
}

#[inline(always)]
fn fetch_add(counter: *mut u64, amount: u64) {
    // SAFETY: `counter` points into a map value. The fetching form is a full barrier.
    unsafe {
        core::arch::asm!(
            "{amount} = atomic_fetch_add((u64 *)({counter} + 0), {amount})",
            counter = in(reg) counter,
            amount = inout(reg) amount => _,
        );
    }
}

#[inline(always)]
fn set_bits(word: *mut u64, bits: u64) {
    // SAFETY: `word` points into a map value.
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({word} + 0) |= {bits}",
            word = in(reg) word,
            bits = in(reg) bits,
        );
    }
}

/// One tracked disk within one run of a program.
#[derive(Clone, Copy)]
struct Disk {
    slot: u32,
    control: *mut DiskControl,
    counters: *mut DiskCounters,
}

impl Disk {
    #[inline(always)]
    fn of(slot: u32) -> Option<Disk> {
        Some(Disk {
            slot,
            control: CONTROL.get_ptr_mut(slot)?,
            counters: COUNTERS.get_ptr_mut(slot)?,
        })
    }

    #[inline(always)]
    fn epoch(self) -> u32 {
        // SAFETY: points into a map value; volatile, because the agent changes it.
        unsafe { read_volatile(&raw const (*self.control).epoch) }
    }

    #[inline(always)]
    fn flags(self) -> u32 {
        // SAFETY: points into a map value.
        unsafe { read_volatile(&raw const (*self.control).flags) }
    }

    #[inline(always)]
    fn taint(self, bits: u64) {
        // SAFETY: points into a map value.
        set_bits(unsafe { &raw mut (*self.control).taint }, bits);
    }

    /// Counts `sectors` from `sector` on in every slice that they fall into.
    #[inline(always)]
    fn count(self, sector: u64, sectors: u64, completed: bool) {
        // SAFETY: all pointers point into map values and all indices are below MAX_SLICES.
        unsafe {
            let whole = &raw mut (*self.counters).slice[0];
            fetch_add(
                if completed {
                    &raw mut (*whole).completed
                } else {
                    &raw mut (*whole).queued
                },
                sectors,
            );
            let slices = read_volatile(&raw const (*self.control).slices);
            if slices <= 1 {
                return;
            }
            for index in 1..MAX_SLICES {
                if index as u32 >= slices {
                    break;
                }
                let start = read_volatile(&raw const (*self.control).slice[index].start);
                let end = read_volatile(&raw const (*self.control).slice[index].end);
                let from = if sector > start { sector } else { start };
                let to = if sector + sectors < end {
                    sector + sectors
                } else {
                    end
                };
                if from < to {
                    let flight = &raw mut (*self.counters).slice[index];
                    fetch_add(
                        if completed {
                            &raw mut (*flight).completed
                        } else {
                            &raw mut (*flight).queued
                        },
                        to - from,
                    );
                }
            }
        }
    }

    /// Stamps every block that `[sector, sector + sectors)` touches with the current epoch.
    #[inline(always)]
    fn stamp(self, sector: u64, sectors: u64) {
        // SAFETY: points into a map value.
        let shift = unsafe { read_volatile(&raw const (*self.control).block_shift) } & 31;
        let epoch = self.epoch();
        let first = sector >> shift;
        let last = (sector + sectors - 1) >> shift;
        if first / CHUNK_BLOCKS == last / CHUNK_BLOCKS && last - first < SHORT_RUN as u64 {
            if !stamp_part::<SHORT_RUN>(
                self.slot,
                first / CHUNK_BLOCKS,
                (first % CHUNK_BLOCKS) as u32,
                (last % CHUNK_BLOCKS) as u32,
                epoch,
            ) {
                self.taint(TAINT_RANGE);
            }
            return;
        }
        let mut range = Range {
            slot: self.slot,
            epoch,
            next: first,
            failed: 0,
        };
        let into_chunk = first % CHUNK_BLOCKS;
        if into_chunk != 0 {
            let rest = CHUNK_BLOCKS - into_chunk;
            let blocks = last - first + 1;
            range.each(if blocks < rest { blocks } else { rest }, stamp_block);
        }
        if range.next <= last {
            range.each((last + 1 - range.next) / CHUNK_BLOCKS, stamp_chunk);
        }
        if range.next <= last {
            range.each(last + 1 - range.next, stamp_block);
        }
        if range.failed != 0 {
            self.taint(TAINT_RANGE);
        }
    }
}

/// A long range of blocks on its way: single blocks up to a chunk's border, whole chunks, the rest.
#[repr(C)]
struct Range {
    slot: u32,
    epoch: u32,
    next: u64,
    failed: u64,
}

impl Range {
    #[inline(always)]
    fn each(&mut self, times: u64, step: extern "C" fn(u32, *mut Range) -> c_long) {
        // SAFETY: the callback has the signature that bpf_loop wants, the context outlives the call.
        unsafe {
            bpf_loop(
                times as u32,
                step as *mut c_void,
                (self as *mut Range).cast(),
                0,
            );
        }
    }
}

extern "C" fn stamp_block(_index: u32, range: *mut Range) -> c_long {
    // SAFETY: bpf_loop hands back the pointer it was given.
    let range = unsafe { &mut *range };
    let (chunk, block) = (
        range.next / CHUNK_BLOCKS,
        (range.next % CHUNK_BLOCKS) as u32,
    );
    if !stamp_part::<1>(range.slot, chunk, block, block, range.epoch) {
        range.failed = 1;
    }
    range.next += 1;
    0
}

extern "C" fn stamp_chunk(_index: u32, range: *mut Range) -> c_long {
    // SAFETY: bpf_loop hands back the pointer it was given.
    let range = unsafe { &mut *range };
    if !stamp_whole(range.slot, range.next / CHUNK_BLOCKS, range.epoch) {
        range.failed = 1;
    }
    range.next += CHUNK_BLOCKS;
    0
}

#[inline(always)]
fn chunk_stamp(slot: u32, chunk: u64) -> Option<*mut ChunkStamp> {
    let page = CHUNKS.get_value_ptr_mut(slot, &((chunk / CHUNKS_PER_PAGE) as u32))?;
    // SAFETY: the index is below CHUNKS_PER_PAGE.
    Some(unsafe { &raw mut (*page)[(chunk % CHUNKS_PER_PAGE) as usize] })
}

/// Raises a stamp to `epoch`. A run that loaded an older epoch never lowers a newer stamp it sees,
/// and a stamp that is already there leaves the cache line clean.
#[inline(always)]
fn raise(stamp: *mut u32, epoch: u32) {
    // SAFETY: `stamp` points into a map value.
    unsafe {
        if read_volatile(stamp) < epoch {
            write_volatile(stamp, epoch);
        }
    }
}

/// The stamp at `index` of a page. The mask is written out, because the compiler would turn the
/// loop over a page into a moving pointer, whose bounds the verifier cannot see.
#[inline(always)]
fn stamp_at(page: *mut StampPage, index: u32) -> *mut u32 {
    let mut offset = index as u64 * 4;
    // SAFETY: arithmetic on a register.
    unsafe { core::arch::asm!("{0} &= 4095", inout(reg) offset) };
    // SAFETY: a multiple of 4 below the size of a page.
    unsafe { page.cast::<u8>().add(offset as usize).cast() }
}

#[inline(always)]
fn stamp_whole(slot: u32, chunk: u64, epoch: u32) -> bool {
    let Some(stamp) = chunk_stamp(slot, chunk) else {
        return false;
    };
    // SAFETY: points into a map value.
    unsafe {
        raise(&raw mut (*stamp).all, epoch);
        raise(&raw mut (*stamp).touched, epoch);
    }
    true
}

#[inline(always)]
fn stamp_part<const MOST: usize>(slot: u32, chunk: u64, low: u32, high: u32, epoch: u32) -> bool {
    let Some(page) = STAMPS.get_value_ptr_mut(slot, &(chunk as u32)) else {
        return false;
    };
    let mut index = low;
    for _ in 0..MOST {
        raise(stamp_at(page, index), epoch);
        if index >= high {
            break;
        }
        index += 1;
    }
    let Some(stamp) = chunk_stamp(slot, chunk) else {
        return false;
    };
    // SAFETY: points into a map value.
    raise(unsafe { &raw mut (*stamp).touched }, epoch);
    true
}

/// A write-like bio enters the block layer, after partition remapping: its range is absolute on the
/// whole disk, and the rest of a split bio fires no second event.
#[btf_tracepoint(function = "block_bio_queue")]
fn bio_queued(ctx: BtfTracePointContext) -> i32 {
    let bio = Bio(ctx.arg::<u64>(0) as usize);
    let Some((slot, false)) = slot_of(bio.diskseq()) else {
        return 0;
    };
    let op = bio.op();
    if op::is_write(op) {
        mark_queued(bio, slot);
    }
    stats::queued(bio, slot, op);
    0
}

#[inline(always)]
fn mark_queued(bio: Bio, slot: u32) {
    let sectors = (bio.bytes() >> 9) as u64;
    if sectors == 0 {
        return;
    }
    let Some(disk) = Disk::of(slot) else {
        return;
    };
    let sector = bio.sector();
    disk.count(sector, sectors, false);
    disk.stamp(sector, sectors);
    if disk.flags() & DISK_BIO_BASED != 0 {
        let stashed = StashedBio {
            sector,
            sectors: sectors as u32,
            slot,
        };
        if STASH.insert(bio.0 as u64, stashed, 0).is_err() {
            disk.taint(TAINT_STASH);
            // SAFETY: points into a map value.
            fetch_add(unsafe { &raw mut (*disk.counters).stash_failures }, 1);
        }
    }
}

#[inline(always)]
fn completed(disk: Disk, sector: u64, sectors: u64, failed: bool) {
    disk.stamp(sector, sectors);
    if failed {
        note_failure(disk);
    }
    disk.count(sector, sectors, true);
}

/// A failed write is not final: after a timeout or a failover the device may still carry it out.
#[inline(always)]
fn note_failure(disk: Disk) {
    let epoch = disk.epoch() as u64;
    // SAFETY: points into map values.
    unsafe {
        write_volatile(&raw mut (*disk.control).failed_epoch, epoch);
        fetch_add(&raw mut (*disk.counters).failed_writes, 1);
    }
}

/// A part of a request is complete; its submitter has not been told yet.
#[btf_tracepoint(function = "block_rq_complete")]
fn request_done(ctx: BtfTracePointContext) -> i32 {
    let request = Request(ctx.arg::<u64>(0) as usize);
    let sectors = (ctx.arg::<u32>(2) >> 9) as u64;
    if sectors == 0 {
        return 0;
    }
    let Some((slot, _)) = slot_of(request.diskseq()) else {
        return 0;
    };
    let op = request.op();
    if op::is_write(op) {
        let failed = ctx.arg::<u32>(1) & 0xff != 0;
        mark_request_done(request, slot, op, sectors, failed);
    }
    stats::request_done(request, slot, op);
    0
}

#[inline(always)]
fn mark_request_done(request: Request, slot: u32, op: u32, sectors: u64, failed: bool) {
    let Some(disk) = Disk::of(slot) else {
        return;
    };
    if op == op::DISCARD || op == op::SECURE_ERASE {
        // Discards of scattered ranges merge into one request whose own range is only the first.
        let mut walk = Walk {
            bio: request.bio().0 as u64,
            slot,
            broken: 0,
        };
        // SAFETY: as in `stamp`.
        unsafe {
            bpf_loop(
                MAX_DISCARD_BIOS,
                discard_bio as *mut c_void,
                (&raw mut walk).cast(),
                0,
            );
        }
        if walk.bio != 0 || walk.broken != 0 {
            disk.taint(TAINT_DISCARD);
        }
        if failed {
            note_failure(disk);
        }
    } else {
        completed(disk, request.sector(), sectors, failed);
    }
}

/// A walk over the bios of a discard request.
#[repr(C)]
struct Walk {
    bio: u64,
    slot: u32,
    broken: u32,
}

extern "C" fn discard_bio(_index: u32, walk: *mut Walk) -> c_long {
    // SAFETY: bpf_loop hands back the pointer it was given.
    let walk = unsafe { &mut *walk };
    if walk.bio == 0 {
        return 1;
    }
    let at = bio_offsets();
    // SAFETY: probe reads fail on bad addresses instead of faulting.
    let (sector, bytes, next) = unsafe {
        (
            bpf_probe_read_kernel((walk.bio as usize + at.sector) as *const u64),
            bpf_probe_read_kernel((walk.bio as usize + at.bytes) as *const u32),
            bpf_probe_read_kernel((walk.bio as usize + at.next) as *const u64),
        )
    };
    let (Ok(sector), Ok(bytes), Ok(next)) = (sector, bytes, next) else {
        walk.broken = 1;
        return 1;
    };
    walk.bio = next;
    let sectors = (bytes >> 9) as u64;
    if sectors == 0 {
        return 0;
    }
    if let Some(disk) = Disk::of(walk.slot) {
        completed(disk, sector, sectors, false);
    }
    0
}

/// A bio ends that never was a request: on bio-based disks every one, elsewhere those that were
/// turned away (RWF_NOWAIT out of tags).
#[btf_tracepoint(function = "block_bio_complete")]
fn bio_done(ctx: BtfTracePointContext) -> i32 {
    let bio = Bio(ctx.arg::<u64>(1) as usize);
    let Some((slot, is_path)) = slot_of(bio.diskseq()) else {
        return 0;
    };
    let op = bio.op();
    if op::is_write(op) {
        mark_bio_done(bio, slot, is_path);
    }
    if !is_path {
        stats::bio_done(bio, slot, op);
    }
    0
}

#[inline(always)]
fn mark_bio_done(bio: Bio, slot: u32, is_path: bool) {
    let status = bio.status();
    // A path tells of the first bio of each request that it completes, before the request does. Only
    // what it turned away was never in a request.
    if is_path && status != STATUS_AGAIN {
        return;
    }
    let Some(disk) = Disk::of(slot) else {
        return;
    };
    // Turned away is not failed: nobody will carry it out later.
    let failed = status != 0 && status != STATUS_AGAIN;
    let bio_based = disk.flags() & DISK_BIO_BASED != 0;
    let (sector, sectors);
    if !bio_based {
        sector = bio.sector();
        sectors = (bio.bytes() >> 9) as u64;
    } else {
        // The bio's own range may have moved by now: it is as it was queued. The front of a split
        // bio has no entry; its sectors are those of the bio it was split from, which ends last.
        let key = bio.0 as u64;
        // SAFETY: the entry is removed only here, by the one completion of its bio.
        let Some(&stashed) = (unsafe { STASH.get(key) }) else {
            return;
        };
        let _ = STASH.remove(key);
        sector = stashed.sector;
        sectors = stashed.sectors as u64;
    }
    if !bio_based || status != 0 {
        // SAFETY: points into a map value.
        fetch_add(unsafe { &raw mut (*disk.counters).rejected }, sectors);
    }
    if sectors != 0 {
        completed(disk, sector, sectors, failed);
    }
}

/// Passthrough commands change disks without a bio that says where.
#[btf_tracepoint(function = "block_rq_issue")]
fn watch_passthrough(ctx: BtfTracePointContext) -> i32 {
    let request = Request(ctx.arg::<u64>(0) as usize);
    if request.op() < op::FIRST_PASSTHROUGH {
        return 0;
    }
    let Some((slot, _)) = slot_of(request.diskseq()) else {
        return 0;
    };
    let Some(disk) = Disk::of(slot) else {
        return 0;
    };
    let flags = disk.flags();
    // SAFETY: probe reads fail on bad addresses instead of faulting.
    let harmless = unsafe {
        if flags & DISK_NVME != 0 {
            bpf_probe_read_kernel(request.driver_data() as *const u64)
                .and_then(|command| bpf_probe_read_kernel(command as usize as *const u8))
                .is_ok_and(nvme_only_reads)
        } else if flags & DISK_SCSI != 0 && scsi_cmnd_offset() != u32::MAX as usize {
            bpf_probe_read_kernel((request.driver_data() + scsi_cmnd_offset()) as *const u8)
                .is_ok_and(scsi_only_reads)
        } else {
            false
        }
    };
    if !harmless {
        disk.taint(TAINT_PASSTHROUGH);
    }
    0
}

/// NVM command set: flush, read, compare, verify, and reservations change no block.
#[inline(always)]
fn nvme_only_reads(opcode: u8) -> bool {
    matches!(
        opcode,
        0x00 | 0x02 | 0x05 | 0x0c | 0x0d | 0x0e | 0x11 | 0x15
    )
}

/// SPC and SBC: test unit ready, request sense, inquiry, mode and log sense, reads, capacity,
/// synchronize cache, start/stop, reservations, report LUNs, maintenance in.
#[inline(always)]
fn scsi_only_reads(opcode: u8) -> bool {
    matches!(
        opcode,
        0x00 | 0x03
            | 0x08
            | 0x12
            | 0x1a
            | 0x1b
            | 0x1e
            | 0x25
            | 0x28
            | 0x2f
            | 0x34
            | 0x35
            | 0x37
            | 0x3c
            | 0x4d
            | 0x5a
            | 0x5e
            | 0x5f
            | 0x88
            | 0x8f
            | 0x91
            | 0x9e
            | 0xa0
            | 0xa3
            | 0xa8
            | 0xab
            | 0xb7
    )
}
