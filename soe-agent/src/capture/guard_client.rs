//! The agent's side of the freeze guard.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::freezer::{FreezeError, Hold, Thawed, VolumeFreezer};
use super::guard::marker::{self, Mark, Marker};
use super::guard::protocol::{Answer, Ask, MAX_SUPERBLOCKS, receive, send};
use super::mounts::Superblock;

/// Assumed of a filesystem that was never frozen and has just been flushed.
const FIRST_ESTIMATE: Duration = Duration::from_millis(15);

/// A running guard process. One freeze at a time; after [`FreezeError::Guard`] a new one is needed.
pub struct FreezeGuard {
    line: Mutex<Line>,
    pid: u32,
    marker: Option<PathBuf>,
    /// The longest of the recent freezes of each mount point.
    seen: Mutex<HashMap<PathBuf, Duration>>,
}

struct Line {
    socket: OwnedFd,
    child: Child,
    /// Which preparation the guard is in.
    prepared: u64,
}

fn guard_error(what: &'static str) -> impl Fn(io::Error) -> FreezeError {
    move |source| FreezeError::Guard { what, source }
}

impl FreezeGuard {
    /// Starts the guard: `command` runs [`guard_main`](super::guard_main) (`soe freeze-guard`).
    /// `marker` is a path on a memory filesystem for the page that says what is held; call
    /// [`thaw_left_frozen`](marker::thaw_left_frozen) with it before.
    pub fn spawn(mut command: Command, marker: Option<PathBuf>) -> Result<Self, FreezeError> {
        let failed = guard_error("start");
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|e| failed(e.into()))?;
        let child = command
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .map_err(&failed)?;
        // The command owns the other end until it is dropped; the guard's death must be seen.
        drop(command);
        Ok(Self {
            pid: child.id(),
            line: Mutex::new(Line {
                socket: ours,
                child,
                prepared: 0,
            }),
            marker,
            seen: Mutex::default(),
        })
    }

    /// The process id of the guard.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<PathBuf, Duration>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the guard prepare for `superblocks` (see [`Mounts`](super::mounts::Mounts)). `volumes`
    /// is the number of volumes in the group.
    pub fn prepare(
        &self,
        superblocks: Vec<Superblock>,
        volumes: usize,
    ) -> Result<GuardFreezer<'_>, FreezeError> {
        let prepared = self.prepare_on(&mut self.line(), &superblocks)?;
        Ok(GuardFreezer {
            guard: self,
            superblocks,
            volumes,
            prepared: Mutex::new(prepared),
        })
    }

    fn prepare_on(
        &self,
        line: &mut Line,
        superblocks: &[Superblock],
    ) -> Result<Prepared, FreezeError> {
        let failed = guard_error("prepare");
        if superblocks.len() > MAX_SUPERBLOCKS {
            return Err(failed(io::Error::other(format!(
                "{} filesystems in one freeze, {MAX_SUPERBLOCKS} at most",
                superblocks.len()
            ))));
        }
        let mounts: Vec<PathBuf> = superblocks.iter().map(|s| s.mount.clone()).collect();
        let page = marker::create(self.marker.as_deref(), &mounts).map_err(&failed)?;
        let marker = Marker::map(&page).map_err(&failed)?;
        let mut descriptors: Vec<BorrowedFd<'_>> =
            superblocks.iter().map(|s| s.folder.as_fd()).collect();
        descriptors.push(page.as_fd());
        let depths = superblocks.iter().map(|s| s.depth).collect();
        line.prepared += 1;
        send(&line.socket, &Ask::Prepare(depths).encode(), &descriptors).map_err(&failed)?;
        match answer(&line.socket).map_err(&failed)? {
            Answer::Ready { locked } => {
                if !locked {
                    tracing::warn!(
                        "the freeze guard could not lock its memory; raise LimitMEMLOCK or give it CAP_IPC_LOCK"
                    );
                }
            }
            other => return Err(failed(unexpected(other))),
        }
        Ok(Prepared {
            number: line.prepared,
            marker,
        })
    }
}

impl Drop for FreezeGuard {
    fn drop(&mut self) {
        let line = self.line.get_mut().unwrap_or_else(PoisonError::into_inner);
        // The end of the socket makes it thaw and leave.
        let _ = rustix::net::shutdown(&line.socket, rustix::net::Shutdown::Both);
        let _ = line.child.wait();
    }
}

fn answer(socket: &OwnedFd) -> io::Result<Answer> {
    let (packet, _) = receive(socket)?;
    if packet.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the guard process ended",
        ));
    }
    Answer::decode(&packet).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn unexpected(answer: Answer) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("unexpected answer {answer:?}"),
    )
}

/// Freezes the filesystems on one group's volumes through the guard.
pub struct GuardFreezer<'g> {
    guard: &'g FreezeGuard,
    superblocks: Vec<Superblock>,
    volumes: usize,
    prepared: Mutex<Prepared>,
}

/// A preparation of the guard, and the page it notes its states in.
struct Prepared {
    number: u64,
    marker: Marker,
}

impl GuardFreezer<'_> {
    /// Whether there is nothing to freeze. A capture is better given no freezer then.
    pub fn is_empty(&self) -> bool {
        self.superblocks.is_empty()
    }

    /// Mount points of what is frozen.
    pub fn mounts(&self) -> impl Iterator<Item = &Path> {
        self.superblocks.iter().map(|s| s.mount.as_path())
    }

    fn prepared(&self) -> MutexGuard<'_, Prepared> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn learn(&self, took: Duration) {
        let mut seen = self.guard.seen();
        for superblock in &self.superblocks {
            let before = seen.entry(superblock.mount.clone()).or_insert(took);
            // Believe a longer one at once, a shorter one slowly.
            *before = took.max(before.mul_f64(0.75));
        }
    }

    fn refused(&self, index: u8, errno: i32, held: Duration) -> FreezeError {
        let mount = self
            .superblocks
            .get(usize::from(index))
            .map(|s| s.mount.clone())
            .unwrap_or_default();
        match errno {
            libc::EBUSY => FreezeError::AlreadyFrozen { mount },
            libc::ETIMEDOUT => FreezeError::TooSlow { mount, held },
            errno => FreezeError::Freeze {
                mount,
                source: io::Error::from_raw_os_error(errno),
            },
        }
    }

    /// The guard is gone: thaws what it held, once it is known that none of its calls goes on.
    fn rescue(&self, line: &mut Line) {
        let _ = line.child.kill();
        let _ = line.child.wait();
        let marker = &self.prepared().marker;
        for (index, superblock) in self.superblocks.iter().enumerate().rev() {
            if marker.get(index) != Mark::Free {
                super::guard::thaw_surely(superblock.folder.as_fd());
                marker.set(index, Mark::Free);
                tracing::error!(mount = %superblock.mount.display(), "thawed after the freeze guard was lost");
            }
        }
    }
}

impl Drop for GuardFreezer<'_> {
    /// Lets the guard close the mount points: open ones could not be unmounted.
    fn drop(&mut self) {
        let mut line = self.guard.line();
        line.prepared += 1;
        let released = marker::create(self.guard.marker.as_deref(), &[])
            .and_then(|page| {
                send(
                    &line.socket,
                    &Ask::Prepare(Vec::new()).encode(),
                    &[page.as_fd()],
                )
            })
            .and_then(|()| answer(&line.socket));
        if let Err(error) = released {
            tracing::warn!(%error, "the freeze guard may still hold mount points open");
        }
    }
}

impl VolumeFreezer for GuardFreezer<'_> {
    fn flush(&self) -> Result<(), FreezeError> {
        for superblock in &self.superblocks {
            rustix::fs::syncfs(&superblock.folder).map_err(|error| FreezeError::Freeze {
                mount: superblock.mount.clone(),
                source: error.into(),
            })?;
        }
        Ok(())
    }

    fn estimate(&self) -> Duration {
        let seen = self.guard.seen();
        self.superblocks
            .iter()
            .map(|s| seen.get(&s.mount).copied().unwrap_or(FIRST_ESTIMATE))
            .max()
            .unwrap_or_default()
    }

    fn covers(&self, volume: usize) -> bool {
        volume < self.volumes && self.superblocks.iter().any(|s| s.volumes.contains(&volume))
    }

    fn freeze(&self, hold: Duration) -> Result<Box<dyn Hold + '_>, FreezeError> {
        let mut line = self.guard.line();
        // Another group may have been prepared since: its filesystems must not be frozen for ours.
        if self.prepared().number != line.prepared {
            let anew = self.guard.prepare_on(&mut line, &self.superblocks)?;
            *self.prepared() = anew;
        }
        let result = send(&line.socket, &Ask::Freeze(hold).encode(), &[])
            .and_then(|()| answer(&line.socket));
        match result {
            Ok(Answer::Frozen { took }) => {
                self.learn(took);
                Ok(Box::new(GuardHold {
                    freezer: self,
                    line: Some(line),
                }))
            }
            Ok(Answer::Refused { index, errno, held }) => {
                if errno == libc::ETIMEDOUT {
                    self.learn(held);
                }
                Err(self.refused(index, errno, held))
            }
            Ok(other) => {
                self.rescue(&mut line);
                Err(guard_error("freeze")(unexpected(other)))
            }
            Err(error) => {
                self.rescue(&mut line);
                Err(guard_error("freeze")(error))
            }
        }
    }
}

struct GuardHold<'a, 'g> {
    freezer: &'a GuardFreezer<'g>,
    line: Option<MutexGuard<'a, Line>>,
}

impl GuardHold<'_, '_> {
    fn end(&mut self) -> Result<Thawed, FreezeError> {
        let Some(mut line) = self.line.take() else {
            return Err(guard_error("thaw")(io::ErrorKind::NotConnected.into()));
        };
        let result = send(&line.socket, &Ask::Thaw.encode(), &[])
            .and_then(|()| answer(&line.socket))
            .and_then(|answer| match answer {
                Answer::Thawed { pause, intact } => Ok(Thawed { pause, intact }),
                other => Err(unexpected(other)),
            });
        result.map_err(|error| {
            self.freezer.rescue(&mut line);
            guard_error("thaw")(error)
        })
    }
}

impl Hold for GuardHold<'_, '_> {
    fn thaw(mut self: Box<Self>) -> Result<Thawed, FreezeError> {
        self.end()
    }
}

impl Drop for GuardHold<'_, '_> {
    fn drop(&mut self) {
        if self.line.is_some()
            && let Err(error) = self.end()
        {
            tracing::error!(%error, "thawing");
        }
    }
}
