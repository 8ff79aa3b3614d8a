//! One record per IO, on demand: these programs are attached only while a disk is traced.

use aya_ebpf::{
    bindings::BPF_RB_NO_WAKEUP,
    helpers::{bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_ktime_get_ns},
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use soe_common::record::{DISK_TRACED, IoEvent, TraceBooks, TracedBio};

use crate::kernel::{Bio, Request};
use crate::maps::{BOOKS, CONTROL, EVENTS, TRACED};
use crate::mark::slot_of;

/// Bios of one request that one run looks at; a request rarely has more.
const MAX_BIOS: u32 = 64;

#[btf_tracepoint(function = "block_bio_queue")]
fn trace_queue(ctx: BtfTracePointContext) -> i32 {
    let bio = Bio(ctx.arg::<u64>(0) as usize);
    let Some((slot, false)) = slot_of(bio.diskseq()) else {
        return 0;
    };
    let Some(control) = CONTROL.get(slot) else {
        return 0;
    };
    if control.flags & DISK_TRACED == 0 || bio.bytes() == 0 {
        return 0;
    }
    let traced = TracedBio {
        // SAFETY: the helper takes no argument and touches no memory of ours.
        at: unsafe { bpf_ktime_get_ns() },
        sector: bio.sector(),
        cgroup: bio.cgroup(),
        sectors: bio.bytes() >> 9,
        op: bio.op(),
        slot,
        pid: (bpf_get_current_pid_tgid() >> 32) as u32,
        comm: bpf_get_current_comm().unwrap_or_default(),
    };
    let _ = TRACED.insert(bio.0 as u64, traced, 0);
    0
}

#[inline(always)]
fn emit(bio: u64, books: *mut TraceBooks) {
    // SAFETY: `books` is a per-CPU value; the traced entry is copied at once.
    unsafe {
        (*books).seen += 1;
        let Some(&traced) = TRACED.get(bio) else {
            (*books).unmatched += 1;
            return;
        };
        let _ = TRACED.remove(bio);
        let at = bpf_ktime_get_ns();
        let event = IoEvent {
            at,
            sector: traced.sector,
            latency: at - traced.at,
            cgroup: traced.cgroup,
            sectors: traced.sectors,
            op: traced.op,
            slot: traced.slot,
            pid: traced.pid,
            comm: traced.comm,
        };
        // No wake-up: the reader drains every few milliseconds, which makes a record several times
        // cheaper.
        if EVENTS.output(event, BPF_RB_NO_WAKEUP as u64).is_ok() {
            (*books).written += 1;
        } else {
            (*books).dropped += 1;
        }
    }
}

#[btf_tracepoint(function = "block_rq_complete")]
fn trace_request_done(ctx: BtfTracePointContext) -> i32 {
    let request = Request(ctx.arg::<u64>(0) as usize);
    let mut left = ctx.arg::<u32>(2);
    if left == 0 || !traced(request.diskseq()) {
        return 0;
    }
    let Some(books) = BOOKS.get_ptr_mut(0) else {
        return 0;
    };
    let mut bio = request.bio();
    for _ in 0..MAX_BIOS {
        if bio.0 == 0 {
            break;
        }
        let bytes = bio.bytes();
        // A bio that is completed only in part comes again.
        if bytes > left {
            break;
        }
        left -= bytes;
        emit(bio.0 as u64, books);
        bio = bio.next();
    }
    0
}

#[btf_tracepoint(function = "block_bio_complete")]
fn trace_bio_done(ctx: BtfTracePointContext) -> i32 {
    let bio = Bio(ctx.arg::<u64>(1) as usize);
    if !traced(bio.diskseq()) {
        return 0;
    }
    let Some(books) = BOOKS.get_ptr_mut(0) else {
        return 0;
    };
    emit(bio.0 as u64, books);
    0
}

#[inline(always)]
fn traced(diskseq: u64) -> bool {
    slot_of(diskseq)
        .and_then(|(slot, _)| CONTROL.get(slot))
        .is_some_and(|control| control.flags & DISK_TRACED != 0)
}
