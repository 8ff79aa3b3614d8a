//! The agent's side of the freeze guard.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::freezer::{FreezeError, Hold, Thawed, VolumeFreezer};
use super::guard::marker::{self, Mark, Marker};
use super::guard::protocol::{Answer, Ask, MAX_SUPERBLOCKS, receive, send};
use super::mounts::Superblock;

/// Assumed of a filesystem that was never frozen and has just been flushed.
const FIRST_FREEZE: Duration = Duration::from_millis(15);
/// Assumed of a filesystem that was never thawed.
const FIRST_THAW: Duration = Duration::from_millis(3);
/// The time after which half of an estimate is forgotten. Without forgetting, one freeze that took
/// longer than the budget would forbid every later one.
const FORGOTTEN: Duration = Duration::from_secs(20);

/// How long something took of late: the longest, fading with time.
#[derive(Clone, Copy, Debug)]
struct Fading {
    value: Duration,
    at: Instant,
}

impl Fading {
    fn now(&self, now: Instant) -> Duration {
        let age = now.saturating_duration_since(self.at).as_secs_f64();
        self.value
            .mul_f64(0.5f64.powf(age / FORGOTTEN.as_secs_f64()))
    }

    /// Believes a longer time at once, a shorter one slowly.
    fn learn(before: Option<Self>, took: Duration, now: Instant) -> Self {
        let faded = before.map_or(Duration::ZERO, |before| before.now(now).mul_f64(0.75));
        Self {
            value: took.max(faded),
            at: now,
        }
    }
}

/// What is known of a filesystem's freezes.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    freeze: Option<Fading>,
    thaw: Option<Fading>,
}

/// A running guard process. One freeze at a time; after [`FreezeError::Guard`] a new one is needed.
pub struct FreezeGuard {
    line: Mutex<Line>,
    pid: u32,
    marker: Option<PathBuf>,
    /// How long the freezes of each mount point took.
    seen: Mutex<HashMap<PathBuf, Known>>,
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

    fn seen(&self) -> MutexGuard<'_, HashMap<PathBuf, Known>> {
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
            pauses: Mutex::default(),
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
    pauses: Mutex<Vec<Thawed>>,
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

    /// Every time writers were held by this freezer, whether or not it led to a cut.
    pub fn pauses(&self) -> Vec<Thawed> {
        self.noted().clone()
    }

    fn noted(&self) -> MutexGuard<'_, Vec<Thawed>> {
        self.pauses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn learn(&self, part: impl Fn(&mut Known) -> &mut Option<Fading>, took: Duration) {
        let mut seen = self.guard.seen();
        for superblock in &self.superblocks {
            let known = part(seen.entry(superblock.mount.clone()).or_default());
            *known = Some(Fading::learn(*known, took, Instant::now()));
        }
    }

    fn expected(&self, part: impl Fn(&Known) -> Option<Fading>, first: Duration) -> Duration {
        let (seen, now) = (self.guard.seen(), Instant::now());
        self.superblocks
            .iter()
            .map(|s| {
                let known = seen.get(&s.mount).and_then(&part);
                known.map_or(first, |known| known.now(now))
            })
            .max()
            .unwrap_or_default()
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

    fn freeze_estimate(&self) -> Duration {
        self.expected(|known| known.freeze, FIRST_FREEZE)
    }

    fn thaw_estimate(&self) -> Duration {
        self.expected(|known| known.thaw, FIRST_THAW)
    }

    fn covers(&self, volume: usize) -> bool {
        volume < self.volumes && self.superblocks.iter().any(|s| s.volumes.contains(&volume))
    }

    fn freeze(&self, limit: Duration) -> Result<Box<dyn Hold + '_>, FreezeError> {
        let mut line = self.guard.line();
        // Another group may have been prepared since: its filesystems must not be frozen for ours.
        if self.prepared().number != line.prepared {
            let anew = self.guard.prepare_on(&mut line, &self.superblocks)?;
            *self.prepared() = anew;
        }
        let result = send(&line.socket, &Ask::Freeze(limit).encode(), &[])
            .and_then(|()| answer(&line.socket));
        match result {
            Ok(Answer::Frozen { took }) => {
                self.learn(|known| &mut known.freeze, took);
                Ok(Box::new(GuardHold {
                    freezer: self,
                    line: Some(line),
                }))
            }
            Ok(Answer::Refused { index, errno, held }) => {
                if errno == libc::ETIMEDOUT {
                    self.learn(|known| &mut known.freeze, held);
                }
                self.noted().push(Thawed {
                    pause: held,
                    intact: false,
                });
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
        let asked = Instant::now();
        let result = send(&line.socket, &Ask::Thaw.encode(), &[])
            .and_then(|()| answer(&line.socket))
            .and_then(|answer| match answer {
                Answer::Thawed { pause, intact } => Ok(Thawed { pause, intact }),
                other => Err(unexpected(other)),
            });
        match result {
            Ok(thawed) => {
                // What the guard thawed at its deadline was thawed before it was asked.
                if thawed.intact {
                    let took = asked.elapsed();
                    self.freezer.learn(|known| &mut known.thaw, took);
                }
                self.freezer.noted().push(thawed);
                Ok(thawed)
            }
            Err(error) => {
                self.freezer.rescue(&mut line);
                Err(guard_error("thaw")(error))
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_freeze_is_believed_at_once_and_forgotten_with_time() {
        let began = Instant::now();
        let ms = Duration::from_millis;
        let known = Fading::learn(None, ms(10), began);
        let known = Fading::learn(Some(known), ms(160), began);
        assert_eq!(known.now(began), ms(160));
        let shorter = Fading::learn(Some(known), ms(10), began);
        assert_eq!(shorter.now(began), ms(120), "a shorter one slowly");
        // It forbids freezes within 100 ms for a while, not for ever.
        assert!(known.now(began + FORGOTTEN / 2) > ms(100));
        assert_eq!(known.now(began + FORGOTTEN), ms(80));
    }
}
