//! Statistics: operations, bytes, latency, locality, heat, and who did it. Everything here is kept
//! per CPU and never waits; nothing here decides which blocks a layer holds.

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns};
use soe_common::histogram::{BUCKETS, bucket_of};
use soe_common::record::{
    CgroupKey, CgroupStats, DISK_BIO_BASED, DirectionStats, DiskControl, DiskStats, OCTAVES,
    REGIONS_PER_PAGE, STREAMS, is_own_ioprio, op,
};

use crate::kernel::{Bio, Request};
use crate::maps::{CGROUPS, CONTROL, HEAT, STARTED, STATS};

#[inline(always)]
fn add(counter: *mut u64, amount: u64) {
    // SAFETY: points into a per-CPU map value; a statistic may lose an update to an interrupt.
    unsafe { *counter += amount }
}

/// An index below `limit`, in a form whose bounds the verifier sees: the compiler must not know where
/// the value comes from, or it leaves the comparison out.
#[inline(always)]
fn bounded(index: usize, limit: usize) -> usize {
    let mut index = index as u64;
    // SAFETY: arithmetic on a register; all indices are far below 65,535.
    unsafe { core::arch::asm!("{0} &= 65535", inout(reg) index) };
    if index >= limit as u64 {
        limit - 1
    } else {
        index as usize
    }
}

/// floor(log2(value)) + 1, 0 for 0, below OCTAVES.
#[inline(always)]
fn octave(value: u64) -> usize {
    let mut rest = value;
    let mut bits = 0u64;
    if rest >> 32 != 0 {
        bits += 32;
        rest >>= 32;
    }
    if rest >> 16 != 0 {
        bits += 16;
        rest >>= 16;
    }
    if rest >> 8 != 0 {
        bits += 8;
        rest >>= 8;
    }
    if rest >> 4 != 0 {
        bits += 4;
        rest >>= 4;
    }
    if rest >> 2 != 0 {
        bits += 2;
        rest >>= 2;
    }
    if rest >> 1 != 0 {
        bits += 1;
        rest >>= 1;
    }
    bits += rest;
    bounded(bits as usize, OCTAVES)
}

/// A bio of a tracked disk was queued.
#[inline(always)]
pub fn queued(bio: Bio, slot: u32, operation: u32) {
    let Some(stats) = STATS.get_ptr_mut(slot) else {
        return;
    };
    let Some(control) = CONTROL.get_ptr_mut(slot) else {
        return;
    };
    let bytes = bio.bytes() as u64;
    let own = is_own_ioprio(bio.ioprio())
        // SAFETY: points into a map value.
        || (bpf_get_current_pid_tgid() >> 32) as u32
            == unsafe { read_volatile(&raw const (*control).own_tgid) };
    // SAFETY: all pointers point into map values.
    unsafe {
        if own {
            add(&raw mut (*stats).own_ops, 1);
            add(&raw mut (*stats).own_bytes, bytes);
            return;
        }
        if bytes == 0 {
            add(&raw mut (*stats).flush_ops, 1);
            return;
        }
        if read_volatile(&raw const (*control).flags) & DISK_BIO_BASED != 0 {
            let _ = STARTED.insert(bio.0 as u64, bpf_ktime_get_ns(), 0);
        }
        let write = match operation {
            op::READ => false,
            op::DISCARD | op::SECURE_ERASE => {
                add(&raw mut (*stats).discard_ops, 1);
                add(&raw mut (*stats).discard_bytes, bytes);
                return;
            }
            _ => true,
        };
        let direction = if write {
            &raw mut (*stats).write
        } else {
            &raw mut (*stats).read
        };
        let sector = bio.sector();
        locality(direction, sector, bytes);
        heat(slot, control, direction, sector, write);
    }
    attribute(stats, slot, bio.cgroup(), operation != op::READ, bytes);
}

/// Counts for the cgroup that owns the bio. A CPU mostly serves one cgroup at a time, so the counts of
/// the current one are kept beside the statistics and go to the map when another comes.
#[inline(always)]
fn attribute(stats: *mut DiskStats, slot: u32, cgroup: u64, write: bool, bytes: u64) {
    // SAFETY: points into a map value.
    unsafe {
        let current = &raw mut (*stats).current;
        if (*stats).cgroup != cgroup {
            let key = CgroupKey {
                cgroup: (*stats).cgroup,
                slot,
                pad: 0,
            };
            let gone = *current;
            (*stats).cgroup = cgroup;
            *current = CgroupStats {
                read_ops: 0,
                write_ops: 0,
                read_bytes: 0,
                write_bytes: 0,
            };
            if gone.read_ops | gone.write_ops == 0 {
                // Nothing to hand over: the first one on this CPU.
            } else if let Some(sum) = CGROUPS.get_ptr_mut(key) {
                (*sum).read_ops += gone.read_ops;
                (*sum).write_ops += gone.write_ops;
                (*sum).read_bytes += gone.read_bytes;
                (*sum).write_bytes += gone.write_bytes;
            } else {
                let _ = CGROUPS.insert(key, gone, 0);
            }
        }
        if write {
            (*current).write_ops += 1;
            (*current).write_bytes += bytes;
        } else {
            (*current).read_ops += 1;
            (*current).read_bytes += bytes;
        }
    }
}

/// # Safety
///
/// `direction` points into a map value.
#[inline(always)]
unsafe fn locality(direction: *mut DirectionStats, sector: u64, bytes: u64) {
    // SAFETY: the caller's; all indices are masked or bounded.
    unsafe {
        add(&raw mut (*direction).ops, 1);
        add(&raw mut (*direction).bytes, bytes);
        let sectors = bytes >> 9;
        (*direction).size[octave(sectors)] += 1;
        let end = sector + sectors;
        let last_end = (*direction).last_end;
        (*direction).last_end = end;
        let distance = if sector > last_end {
            sector - last_end
        } else {
            last_end - sector
        };
        (*direction).seek[octave(distance)] += 1;
        for index in 0..STREAMS {
            if (*direction).stream[index] == sector {
                (*direction).stream[index] = end;
                add(&raw mut (*direction).sequential, 1);
                return;
            }
        }
        let next = (*direction).next_stream;
        (*direction).stream[(next & (STREAMS as u64 - 1)) as usize] = end;
        (*direction).next_stream = next + 1;
    }
}

/// # Safety
///
/// `control` and `direction` point into map values.
#[inline(always)]
unsafe fn heat(
    slot: u32,
    control: *mut DiskControl,
    direction: *mut DirectionStats,
    sector: u64,
    write: bool,
) {
    // SAFETY: the caller's; the index is masked.
    unsafe {
        let region = sector >> (read_volatile(&raw const (*control).region_shift) & 63);
        let page = (region / REGIONS_PER_PAGE) as u32;
        let Some(page) = HEAT.get_value_ptr_mut(slot, &page) else {
            return;
        };
        let entry = &raw mut (*page)[(region % REGIONS_PER_PAGE) as usize];
        let window = read_volatile(&raw const (*control).window);
        if (*entry).window != window {
            write_volatile(&raw mut (*entry).window, window);
            add(&raw mut (*direction).fresh_regions, 1);
        }
        if write {
            (*entry).writes += 1;
        } else {
            let interval = read_volatile(&raw const (*control).interval);
            if (*entry).interval == interval {
                add(&raw mut (*direction).repeated, 1);
            } else {
                write_volatile(&raw mut (*entry).interval, interval);
            }
            (*entry).reads += 1;
        }
    }
}

#[inline(always)]
fn latency(slot: u32, operation: u32, started: u64) {
    let Some(stats) = STATS.get_ptr_mut(slot) else {
        return;
    };
    // SAFETY: points into a map value; the bucket is below BUCKETS.
    unsafe {
        let direction = if operation == op::READ {
            &raw mut (*stats).read
        } else {
            &raw mut (*stats).write
        };
        let now = bpf_ktime_get_ns();
        let spent = if now > started { now - started } else { 0 };
        (*direction).latency[bounded(bucket_of(spent), BUCKETS)] += 1;
        add(&raw mut (*direction).latency_sum, spent);
    }
}

#[inline(always)]
fn has_latency(operation: u32) -> bool {
    operation == op::READ || operation == op::WRITE
}

/// Latency of requests: their start time is kept by the kernel, so nothing is remembered at issue.
#[inline(always)]
pub fn request_done(request: Request, slot: u32, operation: u32) {
    if !has_latency(operation) {
        return;
    }
    let started = request.start_ns();
    if started != 0 && !is_own_ioprio(request.bio().ioprio()) {
        latency(slot, operation, started);
    }
}

/// Latency of bios that never become requests.
#[inline(always)]
pub fn bio_done(bio: Bio, slot: u32, operation: u32) {
    if !has_latency(operation) {
        return;
    }
    let key = bio.0 as u64;
    // SAFETY: the value is copied at once; a reused entry costs one wrong sample at most.
    if let Some(&started) = unsafe { STARTED.get(key) } {
        let _ = STARTED.remove(key);
        latency(slot, operation, started);
    }
}
