//! Reads a BPF ring buffer (Documentation/bpf/ringbuf.rst): one page with our position, one with
//! the kernel's, then the data mapped twice in a row so that a record never wraps.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use soe_common::record::IoEvent;

use super::syscalls::{PAGE, map_info};

const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;
const HEADER: u64 = 8;

/// The reading end. There is one at a time.
pub struct RingReader {
    consumer: NonNull<u8>,
    producer: NonNull<u8>,
    size: usize,
}

// SAFETY: the mappings are shared memory that only this value's methods touch, through atomics.
unsafe impl Send for RingReader {}

fn map(fd: BorrowedFd<'_>, len: usize, protection: i32, offset: i64) -> io::Result<NonNull<u8>> {
    // SAFETY: a new shared mapping at an address of the kernel's choice.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            protection,
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            offset,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(at.cast()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

impl RingReader {
    /// Maps the ring buffer.
    pub fn new(ring: BorrowedFd<'_>) -> io::Result<Self> {
        let size = map_info(ring)?.max_entries as usize;
        let consumer = map(ring, PAGE, libc::PROT_READ | libc::PROT_WRITE, 0)?;
        let producer = match map(ring, PAGE + 2 * size, libc::PROT_READ, PAGE as i64) {
            Ok(at) => at,
            Err(error) => {
                // SAFETY: our own mapping, made just now.
                unsafe { libc::munmap(consumer.as_ptr().cast(), PAGE) };
                return Err(error);
            }
        };
        Ok(Self {
            consumer,
            producer,
            size,
        })
    }

    fn positions(&self) -> (&AtomicU64, &AtomicU64) {
        // SAFETY: both pages begin with a position that is aligned and lives as long as the mapping.
        unsafe {
            (
                AtomicU64::from_ptr(self.consumer.as_ptr().cast()),
                AtomicU64::from_ptr(self.producer.as_ptr().cast()),
            )
        }
    }

    /// Hands every finished record to `take`, and returns how many there were.
    pub fn drain(&mut self, take: &mut dyn FnMut(IoEvent)) -> usize {
        let (consumed, produced) = self.positions();
        let mut at = consumed.load(Ordering::Relaxed);
        let mut records = 0;
        while at < produced.load(Ordering::Acquire) {
            let offset = PAGE + (at as usize & (self.size - 1));
            // SAFETY: within the mapping, which holds the data twice; headers are 8-byte aligned.
            let header = unsafe { AtomicU32::from_ptr(self.producer.as_ptr().add(offset).cast()) }
                .load(Ordering::Acquire);
            if header & BUSY != 0 {
                break;
            }
            let len = header & !(BUSY | DISCARDED);
            if header & DISCARDED == 0 && len as usize == size_of::<IoEvent>() {
                // SAFETY: the record is finished, of this size, and within the double mapping.
                take(unsafe {
                    self.producer
                        .as_ptr()
                        .add(offset + HEADER as usize)
                        .cast::<IoEvent>()
                        .read_unaligned()
                });
                records += 1;
            }
            at += (u64::from(len) + HEADER).next_multiple_of(8);
            consumed.store(at, Ordering::Release);
        }
        records
    }
}

impl Drop for RingReader {
    fn drop(&mut self) {
        // SAFETY: our own mappings; nothing refers to them any more.
        unsafe {
            libc::munmap(self.consumer.as_ptr().cast(), PAGE);
            libc::munmap(self.producer.as_ptr().cast(), PAGE + 2 * self.size);
        }
    }
}
