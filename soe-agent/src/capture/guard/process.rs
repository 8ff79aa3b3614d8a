//! The guard's process: the hidden verb `soe freeze-guard`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, getppid, pidfd_open, setsid};

use super::marker::Marker;
use super::protocol::{Answer, Ask, receive, send};
use super::slots::{Slots, State};

/// Error number for a freeze that took longer than it may.
const TOO_SLOW: i32 = libc::ETIMEDOUT;

/// Runs the freeze guard until its agent is gone. Standard input is the socket to the agent.
///
/// It returns only when nothing is frozen by it any more.
pub fn guard_main() -> ExitCode {
    // The agent's terminal and service manager end the agent; the guard ends after it, thawing.
    for signal in [
        libc::SIGINT,
        libc::SIGTERM,
        libc::SIGHUP,
        libc::SIGQUIT,
        libc::SIGPIPE,
        libc::SIGTSTP,
    ] {
        // SAFETY: ignoring a signal installs no handler; no other thread exists yet.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    // Fails for a group leader only, which needs no new session.
    let _ = setsid();
    // Best effort: without the right to it the guard is as safe as any process.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    match Guard::new(std::io::stdin().as_fd()).and_then(Guard::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soe freeze-guard: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Guard {
    socket: OwnedFd,
    parent: Option<OwnedFd>,
    locked: bool,
    slots: Option<Slots>,
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Woken {
    /// The agent sent something.
    Asked,
    /// The agent is gone.
    Gone,
    /// A superblock settled.
    Settled,
    /// Time is up.
    Late,
}

impl Guard {
    fn new(socket: BorrowedFd<'_>) -> io::Result<Self> {
        // The end of the socket tells that the agent is gone, unless a child of it holds a copy.
        let parent = getppid().and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        // SAFETY: mlockall takes flags only.
        let locked = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) } == 0;
        Ok(Self {
            socket: socket.try_clone_to_owned()?,
            parent,
            locked,
            slots: None,
        })
    }

    fn run(mut self) -> io::Result<()> {
        loop {
            if self.wait(None, false) == Woken::Gone {
                return Ok(());
            }
            let (packet, descriptors) = receive(&self.socket)?;
            if packet.is_empty() {
                return Ok(());
            }
            match Ask::decode(&packet) {
                Some(Ask::Prepare(depths)) => self.prepare(&depths, descriptors)?,
                Some(Ask::Freeze(hold)) => self.hold(hold),
                // Thaw without a freeze, or noise: whatever it is, nothing is frozen.
                Some(Ask::Thaw) | None => self.answer(Answer::Thawed {
                    pause: Duration::ZERO,
                    intact: false,
                }),
            }
        }
    }

    fn prepare(&mut self, depths: &[u8], mut mounts: Vec<OwnedFd>) -> io::Result<()> {
        let marker = mounts
            .pop()
            .filter(|_| mounts.len() == depths.len())
            .ok_or_else(|| io::Error::other("a preparation with too few descriptors"))?;
        let marker = Arc::new(Marker::map(marker)?);
        self.slots = None;
        self.slots = Some(Slots::start(depths, mounts, &marker)?);
        self.answer(Answer::Ready {
            locked: self.locked,
        });
        Ok(())
    }

    /// An answer nobody receives is no error: the agent is gone, the next wait tells.
    fn answer(&self, answer: Answer) {
        let _ = send(&self.socket, &answer.encode(), &[]);
    }

    /// Waits until `until`. `asks` says whether a packet from the agent ends the wait. A dead agent
    /// always does.
    fn wait(&self, until: Option<Instant>, settles: bool) -> Woken {
        let settled = self.slots.as_ref().filter(|_| settles).map(|s| &*s.settled);
        let nothing = self.socket.as_fd();
        let mut fds = [
            PollFd::new(&self.socket, PollFlags::IN),
            PollFd::from_borrowed_fd(
                self.parent.as_ref().map_or(nothing, |p| p.as_fd()),
                PollFlags::IN,
            ),
            PollFd::from_borrowed_fd(settled.map_or(nothing, |s| s.as_fd()), PollFlags::IN),
        ];
        // Places that are not used look at the socket, too; their answers are not read.
        let (has_parent, has_settled) = (self.parent.is_some(), settled.is_some());
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let timeout = left.map(|left| Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            });
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return Woken::Late,
                Ok(_) => {}
                Err(_) => continue,
            }
            let [socket, parent, settled] = &fds;
            let gone = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
            if has_settled && settled.revents().contains(PollFlags::IN) {
                return Woken::Settled;
            }
            if socket.revents().intersects(gone) || (has_parent && !parent.revents().is_empty()) {
                return Woken::Gone;
            }
            if socket.revents().contains(PollFlags::IN) {
                return Woken::Asked;
            }
        }
    }

    /// Freezes, holds until told, until `limit` after the first freeze was asked for or until the agent
    /// is gone, and thaws.
    ///
    /// When not all is frozen at the limit, what is frozen is thawed, and the rest as soon as the
    /// kernel grants it.
    fn hold(&mut self, limit: Duration) {
        let Some(slots) = &self.slots else {
            self.answer(Answer::Refused {
                index: 0,
                errno: libc::EINVAL,
                held: Duration::ZERO,
            });
            return;
        };
        let began = Instant::now();
        let mut gone = false;
        let mut failure = None;
        slots.slots.iter().for_each(|slot| slot.reset());
        let deepest = slots.slots.iter().map(|s| s.depth).max().unwrap_or(0);
        'freezing: for depth in 0..=deepest {
            for slot in slots.slots.iter().filter(|s| s.depth == depth) {
                slot.freeze();
            }
            loop {
                slots.drain();
                failure = failed(slots);
                if failure.is_some() || gone {
                    break 'freezing;
                }
                if slots.slots.iter().all(|s| s.state().settled()) {
                    break;
                }
                match self.wait(Some(began + limit), true) {
                    Woken::Settled => {}
                    Woken::Gone => gone = true,
                    // Asked to thaw before it is frozen, or too late.
                    Woken::Asked | Woken::Late => {
                        failure = Some((0, TOO_SLOW));
                        break 'freezing;
                    }
                }
            }
        }
        if failure.is_some() || gone {
            self.thaw(slots, deepest);
            let (index, errno) = failure.unwrap_or((0, libc::EPIPE));
            self.answer(Answer::Refused {
                index,
                errno,
                held: began.elapsed(),
            });
            return;
        }
        let frozen = Instant::now();
        self.answer(Answer::Frozen {
            took: frozen - began,
        });
        let woken = self.wait(Some(began + limit), false);
        let all_ours = self.thaw(slots, deepest);
        let pause = began.elapsed();
        if woken == Woken::Late {
            // The agent will ask; until then nothing else may be begun.
            self.wait(None, false);
        }
        if let Ok((packet, _)) = receive(&self.socket)
            && Ask::decode(&packet) == Some(Ask::Thaw)
        {
            self.answer(Answer::Thawed {
                pause,
                intact: all_ours && woken == Woken::Asked,
            });
        }
    }

    /// Thaws from the lowest filesystem to the uppermost, and returns when nothing is held. Whether
    /// all of it had still been frozen.
    fn thaw(&self, slots: &Slots, deepest: u8) -> bool {
        for depth in (0..=deepest).rev() {
            let level = || slots.slots.iter().filter(move |s| s.depth == depth);
            level().for_each(|slot| slot.thaw());
            // A freeze that was not granted yet does not keep the others frozen.
            while level().any(|s| s.state() == State::Thawing) {
                self.pause_for_settling(slots);
            }
        }
        while slots.slots.iter().any(|s| !s.state().settled()) {
            self.pause_for_settling(slots);
        }
        slots.slots.iter().all(|s| s.state() == State::Thawed)
    }

    fn pause_for_settling(&self, slots: &Slots) {
        let mut fds = [PollFd::new(&*slots.settled, PollFlags::IN)];
        let step = Timespec {
            tv_sec: 0,
            tv_nsec: 20_000_000,
        };
        // A signal, or a wake-up that came before: the caller looks at the states.
        let _ = poll(&mut fds, Some(&step));
        slots.drain();
    }
}

/// The first superblock that could not be frozen.
fn failed(slots: &Slots) -> Option<(u8, i32)> {
    slots
        .slots
        .iter()
        .enumerate()
        .find_map(|(index, slot)| match slot.state() {
            State::Refused(errno) => Some((index as u8, errno)),
            _ => None,
        })
}
