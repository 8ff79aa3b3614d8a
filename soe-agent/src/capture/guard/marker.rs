//! A shared page that says what a guard holds frozen, for the case that the guard itself is killed.
//!
//! It is a file on a memory filesystem (`/run`), or anonymous. Layout, little-endian:
//!
//! | bytes | content |
//! | --- | --- |
//! | 0..8 | `SOEFRZ01` |
//! | 8..44 | the kernel's boot id as text; a mark of another boot means nothing |
//! | 44..48 | number of entries |
//! | 64.. | entries of 512 bytes: state (0 free, 1 asked, 2 frozen), 1 byte of padding, length of the path (2 bytes), path |
//!
//! A state is a single byte stored before and after each call, so it needs no write that could block.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::protocol::MAX_SUPERBLOCKS;

const MAGIC: &[u8; 8] = b"SOEFRZ01";
const HEADER: usize = 64;
const ENTRY: usize = 512;
const PATH_AT: usize = 4;
/// Bytes of the page.
pub const MARKER_BYTES: usize = HEADER + MAX_SUPERBLOCKS * ENTRY;

/// What is known of a superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Nothing of ours.
    Free,
    /// FIFREEZE was called and has not returned as far as known.
    Asked,
    /// Frozen by us.
    Frozen,
}

/// The shared page.
#[derive(Debug)]
pub struct Marker {
    start: NonNull<u8>,
}

// SAFETY: the mapping lives as long as the value; the states are only touched as atomics.
unsafe impl Send for Marker {}
// SAFETY: as above.
unsafe impl Sync for Marker {}

impl Marker {
    /// Maps the page behind `file`, which must have its full size.
    pub(crate) fn map(file: impl AsFd) -> io::Result<Self> {
        let size = rustix::fs::fstat(&file)?.st_size;
        if size < MARKER_BYTES as i64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a freeze marker of {size} bytes is too short"),
            ));
        }
        // SAFETY: a new shared mapping at an address of the kernel's choice; the file has the size.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                MARKER_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                0,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start })
    }

    fn state(&self, index: usize) -> &AtomicU8 {
        let index = index.min(MAX_SUPERBLOCKS - 1);
        // SAFETY: inside the mapping, which lives as long as `self`; a byte has no alignment, and
        // all access to it is atomic, in every process.
        unsafe { AtomicU8::from_ptr(self.start.as_ptr().add(HEADER + index * ENTRY)) }
    }

    /// Notes a state.
    pub(crate) fn set(&self, index: usize, mark: Mark) {
        let value = match mark {
            Mark::Free => 0,
            Mark::Asked => 1,
            Mark::Frozen => 2,
        };
        self.state(index).store(value, Ordering::SeqCst);
    }

    /// The state noted last.
    pub(crate) fn get(&self, index: usize) -> Mark {
        match self.state(index).load(Ordering::SeqCst) {
            0 => Mark::Free,
            1 => Mark::Asked,
            _ => Mark::Frozen,
        }
    }
}

impl Drop for Marker {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length and is unmapped only here.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), MARKER_BYTES) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

/// The page's content for `mounts`, all free. A path too long for its entry is left out: then only
/// the agent that asked can thaw it, by its open descriptor.
fn content(mounts: &[PathBuf], boot: &str) -> Vec<u8> {
    let mut page = vec![0; MARKER_BYTES];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = page.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, MAGIC);
    put(
        8,
        boot.as_bytes()
            .get(..boot.len().min(36))
            .unwrap_or_default(),
    );
    put(44, &(mounts.len() as u32).to_le_bytes());
    for (index, mount) in mounts.iter().enumerate().take(MAX_SUPERBLOCKS) {
        let path = mount.as_os_str().as_bytes();
        if path.len() <= ENTRY - PATH_AT {
            let at = HEADER + index * ENTRY;
            put(at + 2, &(path.len() as u16).to_le_bytes());
            put(at + PATH_AT, path);
        }
    }
    page
}

/// Makes the page for `mounts`: at `path`, or anonymous.
pub(crate) fn create(path: Option<&Path>, mounts: &[PathBuf]) -> io::Result<OwnedFd> {
    let file: File = match path {
        Some(path) => {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder)?;
            }
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)?
        }
        None => {
            rustix::fs::memfd_create("soe-freeze-marker", rustix::fs::MemfdFlags::CLOEXEC)?.into()
        }
    };
    std::os::unix::fs::FileExt::write_all_at(&file, &content(mounts, &boot_id()), 0)?;
    Ok(file.into())
}

/// Mount points a page of this boot says are (or may be) frozen by us.
fn left_frozen(page: &[u8], boot: &str) -> Vec<PathBuf> {
    let text = |from: usize, len: usize| page.get(from..from + len).unwrap_or_default();
    let written = text(8, 36).split(|b| *b == 0).next().unwrap_or_default();
    if text(0, 8) != MAGIC || boot.is_empty() || written != boot.as_bytes() {
        return Vec::new();
    }
    (0..MAX_SUPERBLOCKS)
        .filter_map(|index| {
            let entry = page.get(HEADER + index * ENTRY..HEADER + (index + 1) * ENTRY)?;
            let [state, _, low, high, path @ ..] = entry else {
                return None;
            };
            let path = path.get(..usize::from(u16::from_le_bytes([*low, *high])))?;
            (*state != 0 && !path.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(path)))
        })
        .collect()
}

/// Thaws what a guard that was killed together with its agent left frozen, according to the page at
/// `path`, and returns the mount points. Call it at start, when no guard of ours can be alive.
///
/// A page may say "asked" for a freeze that was granted just as the guard was killed, so that is
/// thawed as well: a filesystem frozen for good does more harm than an ended freeze of somebody who
/// froze it in the same instant.
pub fn thaw_left_frozen(path: &Path) -> io::Result<Vec<PathBuf>> {
    let page = match std::fs::read(path) {
        Ok(page) => page,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut thawed = Vec::new();
    // Lower filesystems were frozen last, so they are thawed first.
    for mount in left_frozen(&page, &boot_id()).into_iter().rev() {
        if let Ok(folder) = File::open(&mount)
            && super::thaw_surely(folder.as_fd())
        {
            thawed.push(mount);
        }
    }
    std::fs::remove_file(path)?;
    Ok(thawed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_names_what_was_left_frozen_in_this_boot_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/marker");
        let mounts = [
            PathBuf::from("/a"),
            PathBuf::from("/b c"),
            PathBuf::from("/d"),
        ];
        let file = create(Some(&path), &mounts).unwrap();
        let marker = Marker::map(&file).unwrap();
        marker.set(0, Mark::Asked);
        marker.set(1, Mark::Frozen);
        assert_eq!(marker.get(1), Mark::Frozen);
        marker.set(2, Mark::Frozen);
        marker.set(2, Mark::Free);
        let page = std::fs::read(&path).unwrap();
        assert_eq!(left_frozen(&page, &boot_id()), &mounts[..2]);
        assert!(left_frozen(&page, "another boot").is_empty());
        assert!(left_frozen(&page[..100], &boot_id()).is_empty());
        assert!(left_frozen(b"", &boot_id()).is_empty());
    }

    proptest::proptest! {
        /// The page lies in shared memory, where anybody with the right may have written.
        #[test]
        fn any_page_is_read_without_a_panic(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..MARKER_BYTES + 9),
            ours in proptest::prelude::any::<bool>(),
        ) {
            let mut page = bytes;
            if ours {
                let head = content(&[], "boot");
                let len = page.len().min(48);
                page[..len].copy_from_slice(&head[..len]);
            }
            proptest::prop_assert!(left_frozen(&page, "boot").len() <= MAX_SUPERBLOCKS);
        }
    }

    #[test]
    fn no_marker_means_nothing_to_thaw() {
        assert!(
            thaw_left_frozen(Path::new("/nonexistent/marker"))
                .unwrap()
                .is_empty()
        );
    }
}
