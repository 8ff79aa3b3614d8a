//! A folder of the host.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::{AppendFile, DirEntry, ReadFile, StoreFs, StoreLock};

const LOCK_NAME: &str = "lock";
/// Bytes written before they are brought to disk: more dirty pages would make the sync at the commit
/// long and take the page cache from the applications.
const DIRTY_BYTES: u64 = 64 << 20;

/// A store in a folder. Everything is opened relative to a descriptor, so that a folder renamed or
/// mounted over meanwhile does not split the store in two.
#[derive(Debug)]
pub struct DirFs {
    root: OwnedFd,
    path: PathBuf,
}

impl DirFs {
    /// Opens an existing folder.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
        Ok(Self {
            root,
            path: path.to_owned(),
        })
    }

    /// Opens a folder, creating it and those above it when missing. Only the owner may enter a
    /// folder made here: layers hold whatever the volumes hold.
    pub fn create(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)?;
        // The new names must be as durable as what will be stored below them.
        for parent in path.ancestors().skip(1) {
            let parent = if parent.as_os_str().is_empty() {
                Path::new(".")
            } else {
                parent
            };
            let synced = File::open(parent).and_then(|dir| dir.sync_all());
            if synced.is_err() {
                break; // A folder above that we may not open existed before.
            }
        }
        Self::open(path)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn openat(&self, path: &str, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        let path = if path.is_empty() { "." } else { path };
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(rustix::fs::openat(&self.root, path, flags, mode)?)
    }
}

struct RealAppend {
    file: File,
    dirty: u64,
}

impl AppendFile for RealAppend {
    fn append(&mut self, data: &[u8]) -> io::Result<()> {
        self.file.write_all(data)?;
        self.dirty += data.len() as u64;
        if self.dirty >= DIRTY_BYTES {
            self.file.sync_data()?;
            // Layers are seldom read; a refusal of this advice harms nothing.
            let _ = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed);
            self.dirty = 0;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_all()
    }
}

struct RealFile(File);

impl ReadFile for RealFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }
}

struct FileLock {
    // The kernel releases the lock with the last descriptor, however the process ends.
    _file: OwnedFd,
}

impl StoreLock for FileLock {}

impl StoreFs for DirFs {
    fn describe(&self) -> String {
        self.path.display().to_string()
    }

    fn create(&self, path: &str) -> io::Result<Box<dyn AppendFile>> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let fd = self.openat(path, flags, Mode::RUSR | Mode::WUSR)?;
        Ok(Box::new(RealAppend {
            file: File::from(fd),
            dirty: 0,
        }))
    }

    fn open(&self, path: &str) -> io::Result<Box<dyn ReadFile>> {
        let fd = self.openat(path, OFlags::RDONLY, Mode::empty())?;
        Ok(Box::new(RealFile(File::from(fd))))
    }

    fn create_dir(&self, path: &str) -> io::Result<()> {
        Ok(rustix::fs::mkdirat(&self.root, path, Mode::RWXU)?)
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        let fd = self.openat(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
        Ok(rustix::fs::fsync(fd)?)
    }

    fn rename_no_replace(&self, from: &str, to: &str) -> io::Result<()> {
        match rustix::fs::renameat_with(&self.root, from, &self.root, to, RenameFlags::NOREPLACE) {
            // Some network and overlay file systems lack the flag; a link refuses a taken name too.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                rustix::fs::linkat(&self.root, from, &self.root, to, AtFlags::empty())?;
                Ok(rustix::fs::unlinkat(&self.root, from, AtFlags::empty())?)
            }
            other => Ok(other?),
        }
    }

    fn list(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        let fd = self.openat(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
        let mut entries = Vec::new();
        for entry in Dir::read_from(fd.as_fd())? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else {
                continue;
            }; // not one of ours
            if name == "." || name == ".." {
                continue;
            }
            let is_dir = match entry.file_type() {
                FileType::Unknown => {
                    let stat = rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
                    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
                }
                kind => kind == FileType::Directory,
            };
            entries.push(DirEntry {
                name: name.to_owned(),
                is_dir,
            });
        }
        entries.sort();
        Ok(entries)
    }

    fn remove_file(&self, path: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.root, path, AtFlags::empty())?)
    }

    fn remove_dir(&self, path: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.root, path, AtFlags::REMOVEDIR)?)
    }

    fn free_space(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn lock(&self) -> io::Result<Box<dyn StoreLock>> {
        let flags = OFlags::RDWR | OFlags::CREATE;
        let file = self.openat(LOCK_NAME, flags, Mode::RUSR | Mode::WUSR)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Box::new(FileLock { _file: file })),
            Err(Errno::WOULDBLOCK) => Err(io::ErrorKind::WouldBlock.into()),
            Err(error) => Err(error.into()),
        }
    }
}
