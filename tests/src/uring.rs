//! A batch of requests handed to the kernel at once, so that it plugs them: what io_uring does and a
//! single system call cannot.

use std::fs::File;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::device::Aligned;

/// `BLOCK_URING_CMD_DISCARD` of linux/blkdev.h (Linux 6.12).
const CMD_DISCARD: u32 = 0x1200;

/// Submits `entries` with one system call each `depth` of them and returns the results in order.
fn submit(depth: u32, entries: Vec<squeue::Entry>) -> Vec<i32> {
    let mut ring = IoUring::new(depth).expect("io_uring");
    let mut results = vec![0; entries.len()];
    let mut next = 0;
    for batch in entries.chunks(depth as usize) {
        for entry in batch {
            let entry = entry.clone().user_data(next);
            next += 1;
            // SAFETY: buffers and files outlive the ring: all completions are reaped below.
            unsafe { ring.submission().push(&entry).expect("room in the ring") };
        }
        ring.submit_and_wait(batch.len()).expect("io_uring_enter");
        let done: Vec<cqueue::Entry> = ring.completion().collect();
        assert_eq!(done.len(), batch.len());
        for one in done {
            results[one.user_data() as usize] = one.result();
        }
    }
    results
}

/// Discards of ranges (offset, length), handed over at once. `false` when this kernel has no
/// discards by io_uring (before 6.12).
pub fn discard_at_once(device: &File, ranges: &[(u64, u64)]) -> bool {
    let entries = ranges
        .iter()
        .map(|&(offset, len)| {
            // The offset is in `addr`, the length in `addr3`, which lies where `cmd` begins.
            let mut command = [0; 16];
            command[..8].copy_from_slice(&len.to_ne_bytes());
            opcode::UringCmd16::new(types::Fd(device.as_raw_fd()), CMD_DISCARD)
                .addr(Some(offset))
                .cmd(command)
                .build()
        })
        .collect();
    let results = submit(ranges.len().next_power_of_two() as u32, entries);
    if results
        .iter()
        .all(|&r| r == -libc::EOPNOTSUPP || r == -libc::EINVAL || r == -libc::ENOTTY)
    {
        return false;
    }
    assert!(results.iter().all(|&r| r == 0), "{results:?}");
    true
}

/// Writes of `data` at all `offsets`, handed over at once `depth` at a time, that may not wait; how
/// many of them were refused.
pub fn write_nowait_at_once(device: &File, depth: u32, offsets: &[u64], data: &Aligned) -> usize {
    let entries = offsets
        .iter()
        .map(|&offset| write(device, offset, data, libc::RWF_NOWAIT))
        .collect();
    let results = submit(depth, entries);
    for &result in &results {
        assert!(
            result == -libc::EAGAIN || result == data.bytes().len() as i32,
            "{}",
            std::io::Error::from_raw_os_error(-result)
        );
    }
    results.iter().filter(|&&r| r == -libc::EAGAIN).count()
}

fn write(device: &File, offset: u64, data: &Aligned, flags: i32) -> squeue::Entry {
    opcode::Write::new(
        types::Fd(device.as_raw_fd()),
        data.bytes().as_ptr(),
        data.bytes().len() as u32,
    )
    .offset(offset)
    .rw_flags(flags)
    .build()
}

/// Writes that were handed over and wait for their completions.
pub struct Waiting<'a> {
    ring: IoUring,
    count: usize,
    _data: &'a Aligned,
}

/// Hands over a write of `data` at each of `offsets` and waits for none of them.
pub fn begin_writes<'a>(device: &File, offsets: &[u64], data: &'a Aligned) -> Waiting<'a> {
    let mut ring = IoUring::builder()
        .setup_cqsize((offsets.len().next_power_of_two() as u32).max(1024))
        .build(512)
        .expect("io_uring");
    for batch in offsets.chunks(512) {
        for &offset in batch {
            // SAFETY: the file is open and the data lives until all completions are reaped.
            unsafe {
                ring.submission()
                    .push(&write(device, offset, data, 0))
                    .expect("room in the ring");
            }
        }
        ring.submit().expect("io_uring_enter");
    }
    Waiting {
        ring,
        count: offsets.len(),
        _data: data,
    }
}

impl Waiting<'_> {
    /// Waits for all of them; how many failed.
    pub fn finish(mut self) -> usize {
        let mut failed = 0;
        while self.count > 0 {
            self.ring.submit_and_wait(1).expect("io_uring_enter");
            for done in self.ring.completion() {
                failed += usize::from(done.result() < 0);
                self.count -= 1;
            }
        }
        failed
    }
}
