//! A volume as a slice of a device file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::buffer::BUFFER_ALIGN;

/// Where a volume's bytes are: a partition is a slice of its whole disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSpec {
    /// The device node, or an image file.
    pub path: PathBuf,
    /// First byte of the volume in it.
    pub offset: u64,
    /// Bytes of the volume; `None` up to the end.
    pub len: Option<u64>,
}

impl VolumeSpec {
    /// The whole of `path`.
    pub fn whole(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            offset: 0,
            len: None,
        }
    }
}

/// Why a volume cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be opened past the page cache.
    #[error("opening {path} for direct reading: {source}")]
    Open {
        /// The device.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The slice is not inside the file.
    #[error(
        "{path} has {has} bytes, fewer than the volume's end at byte {end}; it was resized or is another device"
    )]
    TooShort {
        /// The device.
        path: PathBuf,
        /// Its bytes.
        has: u64,
        /// Where the volume ends.
        end: u64,
    },
    /// io_uring cannot be used; the plain reader can.
    #[error("io_uring for {path}: {reason}")]
    NoUring {
        /// The device.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// No memory for the buffers.
    #[error("no memory for {bytes} bytes of read buffers: {source}")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// Why.
        source: io::Error,
    },
}

/// An open volume.
#[derive(Debug)]
pub(super) struct VolumeFile {
    pub(super) file: File,
    pub(super) path: PathBuf,
    /// First byte of the volume in the file.
    pub(super) base: u64,
    pub(super) len: u64,
    /// Requests start and end at multiples of it, in bytes of the file.
    pub(super) align: u64,
}

impl VolumeFile {
    pub(super) fn open(spec: &VolumeSpec) -> Result<Self, OpenError> {
        let path = spec.path.clone();
        let failed = |source| OpenError::Open {
            path: spec.path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
            .open(&path)
            .map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let device = metadata.file_type().is_block_device();
        let align = if device {
            let size = rustix::fs::ioctl_blksszget(&file).map_err(|e| failed(e.into()))?;
            u64::from(size)
        } else {
            BUFFER_ALIGN as u64
        };
        let has = if device {
            rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(|e| failed(e.into()))?
        } else {
            metadata.len()
        };
        let end = match spec.len {
            Some(len) => spec.offset.saturating_add(len),
            None => has.max(spec.offset),
        };
        if end > has {
            return Err(OpenError::TooShort { path, has, end });
        }
        Ok(Self {
            file,
            path,
            base: spec.offset,
            len: end - spec.offset,
            align: align.max(1),
        })
    }
}

/// Names the device and the place in an error of the kernel.
pub(super) fn read_error(path: &Path, offset: u64, len: u64, source: &io::Error) -> io::Error {
    let place = format!("{} at byte {offset}, {len} bytes: {source}", path.display());
    io::Error::new(source.kind(), place)
}
