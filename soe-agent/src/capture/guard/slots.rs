//! One thread per superblock, parked until it is told to freeze or to thaw.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::marker::{Mark, Marker};

/// Where a superblock stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing to do, nothing held.
    Idle,
    /// FIFREEZE has been asked for; it may be granted at any time.
    Freezing,
    /// Frozen by us.
    Frozen,
    /// FITHAW is being tried.
    Thawing,
    /// Thawed by us.
    Thawed,
    /// Somebody else had thawed it.
    LostIt,
    /// FIFREEZE failed with this error number; nothing of ours to thaw.
    Refused(i32),
}

impl State {
    /// Whether the thread has come to rest.
    pub(super) fn settled(self) -> bool {
        !matches!(self, Self::Freezing | Self::Thawing)
    }
}

/// A superblock and its thread.
pub(super) struct Slot {
    pub(super) depth: u8,
    shared: Arc<Shared>,
}

struct Shared {
    inner: Mutex<Inner>,
    told: Condvar,
    mount: OwnedFd,
}

struct Inner {
    state: State,
    /// Thaw as soon as the freeze is granted.
    abandoned: bool,
    ends: bool,
}

impl Shared {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    pub(super) fn state(&self) -> State {
        self.shared.inner().state
    }

    /// Forgets how the last freeze ended.
    pub(super) fn reset(&self) {
        let mut inner = self.shared.inner();
        if inner.state.settled() && inner.state != State::Frozen {
            inner.state = State::Idle;
        }
    }

    /// Begins to freeze.
    pub(super) fn freeze(&self) {
        let mut inner = self.shared.inner();
        if inner.state.settled() && inner.state != State::Frozen {
            inner.state = State::Freezing;
            inner.abandoned = false;
            self.shared.told.notify_one();
        }
    }

    /// Thaws what is frozen, and what FIFREEZE is still being waited for as soon as it is granted.
    pub(super) fn thaw(&self) {
        let mut inner = self.shared.inner();
        match inner.state {
            State::Frozen => {
                inner.state = State::Thawing;
                self.shared.told.notify_one();
            }
            State::Freezing => inner.abandoned = true,
            _ => {}
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.thaw();
        self.shared.inner().ends = true;
        self.shared.told.notify_one();
    }
}

/// The superblocks of a group and the descriptor that becomes readable when one of them settles.
pub(super) struct Slots {
    pub(super) slots: Vec<Slot>,
    pub(super) settled: Arc<OwnedFd>,
}

impl Slots {
    /// Starts a thread for each superblock.
    pub(super) fn start(
        depths: &[u8],
        mounts: Vec<OwnedFd>,
        marker: &Arc<Marker>,
    ) -> io::Result<Self> {
        let settled = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mut slots = Vec::with_capacity(depths.len());
        for (index, (depth, mount)) in depths.iter().zip(mounts).enumerate() {
            let shared = Arc::new(Shared {
                inner: Mutex::new(Inner {
                    state: State::Idle,
                    abandoned: false,
                    ends: false,
                }),
                told: Condvar::new(),
                mount,
            });
            let (worker, marker, settled) = (shared.clone(), marker.clone(), settled.clone());
            std::thread::Builder::new()
                .name(format!("freeze-{index}"))
                // All of it is locked into memory.
                .stack_size(128 << 10)
                .spawn(move || work(&worker, index, &marker, &settled))?;
            slots.push(Slot {
                depth: *depth,
                shared,
            });
        }
        Ok(Self { slots, settled })
    }

    /// Empties the descriptor before the states are looked at.
    pub(super) fn drain(&self) {
        let mut count = [0; 8];
        // Nothing to read is fine: the states tell.
        let _ = rustix::io::read(&*self.settled, &mut count);
    }
}

fn work(shared: &Shared, index: usize, marker: &Marker, settled: &OwnedFd) {
    loop {
        let mut inner = shared.inner();
        while inner.state.settled() && !inner.ends {
            inner = shared
                .told
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let state = inner.state;
        drop(inner);
        match state {
            State::Freezing => {
                marker.set(index, Mark::Asked);
                let result = super::freeze(shared.mount.as_fd());
                let mut inner = shared.inner();
                match result {
                    Ok(()) => {
                        marker.set(index, Mark::Frozen);
                        inner.state = if inner.abandoned {
                            State::Thawing
                        } else {
                            State::Frozen
                        };
                    }
                    Err(error) => {
                        marker.set(index, Mark::Free);
                        inner.state = State::Refused(error.raw_os_error().unwrap_or(libc::EIO));
                    }
                }
            }
            State::Thawing => {
                let ours = super::thaw_surely(shared.mount.as_fd());
                marker.set(index, Mark::Free);
                shared.inner().state = if ours { State::Thawed } else { State::LostIt };
            }
            // Settled, so it was told to end.
            _ => return,
        }
        if shared.inner().state.settled() {
            // Full or gone: the waiter looks at the states anyway.
            let _ = rustix::io::write(settled, &1u64.to_ne_bytes());
        }
    }
}
