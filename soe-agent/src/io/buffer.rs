//! Memory for direct I/O.

use std::io;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::volume::OpenError;

/// Alignment that every device accepts, in bytes.
pub const BUFFER_ALIGN: usize = 4096;

/// Page-aligned buffers of one size, in one mapping.
#[derive(Debug)]
pub(super) struct Buffers {
    start: NonNull<u8>,
    each: usize,
    count: usize,
}

// SAFETY: the mapping belongs to this value alone; nothing in it is tied to a thread.
unsafe impl Send for Buffers {}

impl Buffers {
    /// `count` buffers of at least `each` bytes.
    pub(super) fn new(count: usize, each: usize) -> Result<Self, OpenError> {
        let each = each.next_multiple_of(BUFFER_ALIGN).max(BUFFER_ALIGN);
        let count = count.max(1);
        let bytes = each.saturating_mul(count);
        let failed = |source: io::Error| OpenError::Memory { bytes, source };
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no
        // memory that is in use.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(|e| failed(e.into()))?;
        let start = NonNull::new(start.cast::<u8>())
            .ok_or_else(|| failed(io::ErrorKind::OutOfMemory.into()))?;
        Ok(Self { start, each, count })
    }

    /// Bytes of one buffer.
    pub(super) fn each(&self) -> usize {
        self.each
    }

    /// Number of buffers.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Where buffer `index` begins; the last one's for an index that is too big.
    pub(super) fn pointer(&self, index: usize) -> *mut u8 {
        let index = index.min(self.count - 1);
        // SAFETY: index < count, so the result stays inside the mapping of each * count bytes.
        unsafe { self.start.as_ptr().add(index * self.each) }
    }

    /// The first `len` bytes of buffer `index`.
    ///
    /// # Safety
    /// The kernel must not be writing into that buffer while the slice lives.
    pub(super) unsafe fn bytes(&self, index: usize, len: usize) -> &[u8] {
        // SAFETY: the length is cut to the buffer, whose memory is initialised (zeroes from the
        // kernel at least); the caller promises that nothing writes to it meanwhile.
        unsafe { std::slice::from_raw_parts(self.pointer(index), len.min(self.each)) }
    }

    /// The whole of buffer `index`, to be filled.
    pub(super) fn bytes_mut(&mut self, index: usize) -> &mut [u8] {
        // SAFETY: `&mut self` rules out other slices of the mapping, and the memory is initialised.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(index), self.each) }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length and is unmapped only here. Buffers
        // registered with a ring stay pinned by the kernel until it has finished with them.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.each * self.count) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}
