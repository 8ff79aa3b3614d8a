//! The freeze guard: a process of its own that freezes filesystems and is sure to thaw them.
//!
//! A freeze outlives the process that made it, holds writers in uninterruptible sleep, and may be
//! granted long after it was asked for. So the process that decides (the agent) does not do it: it
//! may die, be stopped, or wait for memory or for a disk that is frozen. The guard
//!
//! - is spawned early, locks its memory, is given open descriptors of the mount points, starts a
//!   thread per superblock, and neither allocates nor logs between freeze and thaw;
//! - issues FIFREEZE itself, and never a FITHAW before that very call returned 0: until then FITHAW
//!   answers EINVAL and the freeze is granted later, or it would undo somebody else's freeze;
//! - thaws when it is told to, at a deadline, and when the agent is gone (end of its socket, pidfd);
//! - leaves alone what was frozen before (EBUSY).
//!
//! What it holds frozen is written to a shared page beforehand, so that the agent, or the next
//! one, can thaw it in case the guard itself was killed ([`marker`]).

pub mod marker;

pub mod process;

pub mod protocol;

mod slots;

pub use process::guard_main;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `FIFREEZE`, `_IOWR('X', 119, int)`.
const FIFREEZE: libc::c_ulong = 0xC004_5877;
/// `FITHAW`, `_IOWR('X', 120, int)`.
const FITHAW: libc::c_ulong = 0xC004_5878;

/// Freezes the filesystem `mount` lies on. Returns when it is frozen.
pub(crate) fn freeze(mount: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the descriptor is open for the call; FIFREEZE ignores its argument.
    let result = unsafe { libc::ioctl(mount.as_raw_fd(), FIFREEZE as _, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Thaws the filesystem `mount` lies on.
pub(crate) fn thaw(mount: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the descriptor is open for the call; FITHAW ignores its argument.
    let result = unsafe { libc::ioctl(mount.as_raw_fd(), FITHAW as _, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Thaws a filesystem this project froze, whatever it takes. False when somebody else had thawed
/// it already.
pub(crate) fn thaw_surely(mount: BorrowedFd<'_>) -> bool {
    loop {
        match thaw(mount) {
            Ok(()) => return true,
            // Not frozen (any more).
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return false,
            // Nothing but another try is left: giving up would leave it frozen for good.
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
    }
}
