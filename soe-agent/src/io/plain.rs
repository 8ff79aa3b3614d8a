//! Reading without io_uring: one direct `pread` at a time.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use super::ReadOptions;
use super::buffer::{BUFFER_ALIGN, Buffers};
use super::request::Requests;
use super::volume::{OpenError, VolumeFile, VolumeSpec, read_error};
use crate::seam::{BlockReader, ByteRange, Pace};

/// Reads one volume with system calls that block.
pub struct PlainReader {
    volume: VolumeFile,
    options: ReadOptions,
    buffers: Mutex<Buffers>,
}

impl PlainReader {
    /// Opens the volume.
    pub fn open(spec: &VolumeSpec, options: ReadOptions) -> Result<Self, OpenError> {
        Ok(Self {
            volume: VolumeFile::open(spec)?,
            options,
            buffers: Mutex::new(Buffers::new(
                1,
                options.max_request as usize + 2 * BUFFER_ALIGN,
            )?),
        })
    }
}

impl BlockReader for PlainReader {
    fn len(&self) -> u64 {
        self.volume.len
    }

    fn read(
        &self,
        ranges: &[ByteRange],
        unit: u32,
        pace: &dyn Pace,
        sink: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let volume = &self.volume;
        let requests = Requests::new(
            ranges,
            volume.len,
            volume.base,
            volume.align,
            unit,
            u64::from(self.options.max_request),
        )?;
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let file_end = volume.base + volume.len;
        for request in requests {
            pace.before(request.cover.len)?;
            let cover = request.cover;
            let data = buffers
                .bytes_mut(0)
                .get_mut(..cover.len as usize)
                .ok_or_else(|| io::Error::other("a request is larger than its buffer"))?;
            let needed = (cover.len.min(file_end - cover.offset.min(file_end))) as usize;
            let priority = ThreadPriority::set(self.options.ioprio());
            let mut done = 0;
            while done < needed {
                let at = cover.offset + done as u64;
                let rest = data.get_mut(done..).unwrap_or_default();
                let wanted = rest.len() as u64;
                match volume.file.read_at(rest, at) {
                    Ok(0) => {
                        let end = io::ErrorKind::UnexpectedEof.into();
                        return Err(read_error(&volume.path, at, wanted, &end));
                    }
                    Ok(read) => done += read,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(read_error(&volume.path, at, wanted, &error)),
                }
            }
            // The sink's own I/O, if any, is not part of it.
            drop(priority);
            request.pieces(volume.base, unit, data, sink)?;
        }
        Ok(())
    }
}

/// The calling thread's I/O priority, put back on drop. Where the kernel refuses it the reads go on
/// without.
struct ThreadPriority {
    before: libc::c_long,
}

/// `IOPRIO_WHO_PROCESS`: a thread.
const WHO_PROCESS: libc::c_int = 1;

impl ThreadPriority {
    fn set(ioprio: u16) -> Self {
        // SAFETY: both calls take integers only and concern the calling thread (0).
        let before = unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, 0) };
        // SAFETY: as above.
        unsafe {
            libc::syscall(
                libc::SYS_ioprio_set,
                WHO_PROCESS,
                0,
                libc::c_int::from(ioprio),
            )
        };
        Self { before }
    }
}

impl Drop for ThreadPriority {
    fn drop(&mut self) {
        if self.before >= 0 {
            // SAFETY: takes integers only and concerns the calling thread (0).
            unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, self.before) };
        }
    }
}
