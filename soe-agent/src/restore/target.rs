//! What a volume is restored onto: a file or a block device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::FallocateFlags;

use super::error::RestoreError;
use super::held::{self, HeldBy};
use crate::seam::{BlockWriter, ByteRange};

/// A restore target: written like any [`BlockWriter`], and read to see what differs.
pub trait Target: BlockWriter {
    /// For messages.
    fn name(&self) -> &str;
    /// Fills `buf` from `offset` on with the present content.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Whether everything not yet written reads as zeroes, so that holes need no work.
    fn starts_zeroed(&self) -> bool;
}

/// A regular file at the volume's size, sparse where the volume has holes.
#[derive(Debug)]
pub struct FileTarget {
    file: File,
    name: String,
    fresh: bool,
}

impl FileTarget {
    /// Opens `path`, or creates it at `volume_bytes`. What was in it is dropped, unless `keep`: then
    /// only its size is brought in line.
    ///
    /// # Errors
    /// [`RestoreError::Held`] when the file is behind a loop device, [`RestoreError::NotATarget`]
    /// when it is not a regular file.
    pub fn open(path: &Path, volume_bytes: u64, keep: bool) -> Result<Self, RestoreError> {
        let name = path.display().to_string();
        let failed = |call, source| RestoreError::Target {
            call,
            target: name.clone(),
            source,
        };
        let mut options = OpenOptions::new();
        let options = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600);
        let file = options.open(path).map_err(|error| failed("open", error))?;
        let meta = file.metadata().map_err(|error| failed("look at", error))?;
        if !meta.is_file() {
            return Err(RestoreError::NotATarget { target: name });
        }
        let over = held::loop_over(meta.dev(), meta.ino())
            .map_err(|error| failed("look for users of", error))?;
        if let Some(device) = over {
            return Err(RestoreError::Held {
                target: name,
                held: HeldBy::Loop { device }.to_string(),
            });
        }
        if !keep {
            file.set_len(0).map_err(|error| failed("empty", error))?;
        }
        file.set_len(volume_bytes)
            .map_err(|error| failed("set the size of", error))?;
        Ok(Self {
            file,
            fresh: !keep || meta.len() == 0,
            name,
        })
    }
}

impl BlockWriter for FileTarget {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn zero_at(&self, range: ByteRange) -> io::Result<()> {
        zero(
            &self.file,
            range,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        )
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

impl Target for FileTarget {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn starts_zeroed(&self) -> bool {
        self.fresh
    }
}

/// A block device that nobody else uses, held exclusively as long as this lives.
#[derive(Debug)]
pub struct DeviceTarget {
    file: File,
    name: String,
}

impl DeviceTarget {
    /// Opens the device at `path` for a volume of `volume_bytes`.
    ///
    /// # Errors
    /// [`RestoreError::Held`] when it or a partition of it is mounted, swap, part of another device
    /// or opened exclusively; [`RestoreError::TooSmall`]; [`RestoreError::NotATarget`].
    pub fn open(path: &Path, volume_bytes: u64) -> Result<Self, RestoreError> {
        let name = path.display().to_string();
        let failed = |call, source| RestoreError::Target {
            call,
            target: name.clone(),
            source,
        };
        let held = |by: HeldBy| RestoreError::Held {
            target: name.clone(),
            held: by.to_string(),
        };
        let number = held::block_number(path).map_err(|error| failed("look at", error))?;
        let number = number.ok_or_else(|| RestoreError::NotATarget {
            target: name.clone(),
        })?;
        if let Some(by) =
            held::device_in_use(number).map_err(|error| failed("look for users of", error))?
        {
            return Err(held(by));
        }
        let mut options = OpenOptions::new();
        // On a block device O_EXCL claims it: neither a mount nor another claim can come in between.
        let file = options
            .read(true)
            .write(true)
            .custom_flags(libc::O_EXCL)
            .open(path)
            .map_err(|error| {
                if error.raw_os_error() == Some(libc::EBUSY) {
                    held(HeldBy::Exclusive)
                } else {
                    failed("open", error)
                }
            })?;
        // The name may have been given to another device since it was looked at.
        let opened = file
            .metadata()
            .map_err(|error| failed("look at", error))?
            .rdev();
        if (rustix::fs::major(opened), rustix::fs::minor(opened)) != number {
            return Err(held(HeldBy::Exclusive));
        }
        let target_bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))
            .map_err(|error| failed("ask for the size of", error.into()))?;
        if target_bytes < volume_bytes {
            return Err(RestoreError::TooSmall {
                target: name,
                target_bytes,
                volume_bytes,
            });
        }
        Ok(Self { file, name })
    }
}

impl BlockWriter for DeviceTarget {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn zero_at(&self, range: ByteRange) -> io::Result<()> {
        // Unlike a discard this guarantees zeroes, and the kernel writes them where the device cannot.
        zero(
            &self.file,
            range,
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        )
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

impl Target for DeviceTarget {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn starts_zeroed(&self) -> bool {
        false
    }
}

/// Makes a range zero by `fallocate`, or by writing zeroes where that is not possible.
fn zero(file: &File, range: ByteRange, flags: FallocateFlags) -> io::Result<()> {
    use rustix::io::Errno;
    match rustix::fs::fallocate(file, flags, range.offset, range.len) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
            let zeroes = vec![0; range.len.min(1 << 20) as usize];
            let mut offset = range.offset;
            while offset < range.end() {
                let part = zeroes
                    .get(..(range.end() - offset).min(zeroes.len() as u64) as usize)
                    .unwrap_or_default();
                file.write_all_at(part, offset)?;
                offset += part.len() as u64;
            }
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}
