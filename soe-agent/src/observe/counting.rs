//! The write counters of a tracked disk: their readings, and how they come to a true base. What a
//! reading amounts to is judged by [`crate::books`].

use std::io;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use soe_common::Epoch;
use soe_common::record::{DiskControl, DiskCounters, MAX_SLICES, TAINT_BOOKS};

use super::disk::{DiskTrack, atomic32, atomic64, word};
use super::syscalls;
use super::tracker::grace;
use super::volumes::{Disk, Statistics};
use crate::books::{self, Account, Device, Verdict};
use crate::seam::{Misses, Reading, Rest};

/// How long the device must say "nothing in flight" beside open counters before it is believed that
/// they will never close. Cgroup throttling holds a bio for seconds, rarely longer.
const HELD_AT_MOST: Duration = Duration::from_secs(60);
/// Between the two looks that find a disk at rest, besides the grace period.
const REST: Duration = Duration::from_millis(2);

/// The device's own statistics, kept open, and what else a base depends on.
#[derive(Default)]
pub(super) struct Witness {
    /// Of a multipath head, those of each of its paths; not there before the device was asked.
    statistics: OnceLock<Vec<Statistics>>,
    /// What the newest base was taken with: see [`Look::doubt`].
    trusted: Mutex<Option<(usize, u64)>>,
    /// Since when the device has been idle beside open counters, and those counters.
    waiting: Mutex<Option<(Instant, DiskCounters)>>,
}

/// What the device says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Look {
    /// Sectors written and discarded.
    accounted: u64,
    /// Whether writes are in flight.
    busy: bool,
    /// Devices that were asked and still answer.
    answers: usize,
}

impl Look {
    /// What has to be as it was when the base was taken. A path that went took its statistics along,
    /// and what a bio-based driver accounts of a bio that fails, nobody can tell: afterwards the
    /// device's word is of use again only with a new base.
    fn doubt(&self, disk: &Disk, counters: &DiskCounters) -> (usize, u64) {
        let failed = if disk.is_bio_based() {
            counters.rejected
        } else {
            0
        };
        (self.answers, failed)
    }
}

impl Witness {
    /// What the device says now. An error tells what to do where it does not count; `None` stands for
    /// a suspended disk, which cannot be asked whether it does.
    fn look(&self, disk: &Disk) -> io::Result<Option<Look>> {
        let statistics = match self.statistics.get() {
            Some(statistics) => statistics,
            None => match disk.statistics() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                opened => {
                    let opened = opened?;
                    self.statistics.get_or_init(|| opened)
                }
            },
        };
        let mut look = Look {
            accounted: 0,
            busy: false,
            answers: 0,
        };
        for statistics in statistics {
            let told = statistics
                .sectors_changed()
                .and_then(|sectors| Ok((sectors, statistics.writes_in_flight()?)));
            match told {
                Ok((sectors, writes)) => {
                    look.accounted = look.accounted.wrapping_add(sectors);
                    look.busy |= writes != 0;
                    look.answers += 1;
                }
                // The disk is gone, which may be one path of several.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(error) => return Err(error),
            }
        }
        if look.answers == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        Ok(Some(look))
    }

    /// Whether the device's word can be held against the base. The first question after an adoption
    /// takes the base for good.
    fn trusts(&self, doubt: (usize, u64)) -> bool {
        let mut trusted = self.trusted.lock().unwrap_or_else(PoisonError::into_inner);
        *trusted.get_or_insert(doubt) == doubt
    }

    fn trust(&self, doubt: (usize, u64)) {
        *self.trusted.lock().unwrap_or_else(PoisonError::into_inner) = Some(doubt);
    }
}

/// Sets words of a control record that only the agent writes.
fn put<T>(words: *mut T, value: T) {
    // SAFETY: the callers pass places within the mapping, which lives as long as the track.
    unsafe { words.write_volatile(value) }
}

impl DiskTrack {
    fn slice_count(control: &DiskControl) -> usize {
        (control.slices as usize).clamp(1, MAX_SLICES)
    }

    /// The counters of all slices, *completed* read on all CPUs before *queued*, then the misses.
    pub(super) fn counters(&self) -> io::Result<(DiskCounters, Misses)> {
        let read = || {
            syscalls::lookup_per_cpu::<u32, DiskCounters>(
                self.maps.map("COUNTERS"),
                self.slot,
                self.maps.cpus,
            )
            .and_then(|values| values.ok_or(io::ErrorKind::NotFound.into()))
        };
        let first = read()?;
        fence(Ordering::SeqCst);
        let second = read()?;
        fence(Ordering::SeqCst);
        let mut sum = DiskCounters::default();
        for (earlier, later) in first.iter().zip(&second) {
            for index in 0..MAX_SLICES {
                sum.slice[index].completed += earlier.slice[index].completed;
                sum.slice[index].queued += later.slice[index].queued;
            }
            sum.failed_writes += later.failed_writes;
            sum.stash_failures += later.stash_failures;
            sum.rejected += later.rejected;
        }
        let [queue, complete] = self.maps.misses()?;
        let found = self.maps.control_copy(self.slot).found;
        let misses = Misses {
            queue: queue + found[0],
            complete: complete + found[1],
            stash: sum.stash_failures + found[2],
            failed_writes: sum.failed_writes + found[3],
        };
        Ok((sum, misses))
    }

    fn accounts(control: &DiskControl, counters: &DiskCounters) -> Vec<Account> {
        let slices = counters.slice.iter().zip(&control.base);
        slices
            .take(Self::slice_count(control))
            .map(|(flight, base)| Account {
                queued: flight.queued,
                completed: flight.completed.wrapping_add_signed(*base),
            })
            .collect()
    }

    /// Counts misses that no program counted.
    pub(super) fn found(&self, more: &Misses) {
        // SAFETY: the address of a field within the mapping.
        let found = word!(self, found).cast::<u64>();
        let add = [more.queue, more.complete, more.stash, more.failed_writes];
        for (index, more) in add.into_iter().enumerate() {
            // SAFETY: within the array of four words.
            atomic64(unsafe { found.add(index) }).fetch_add(more, Ordering::SeqCst);
        }
    }

    /// The reading of one slice: see [`crate::books`]. Cheap; a base is only looked for by
    /// [`Self::settle`], and until there is one, nothing is ever said to be at rest.
    pub(super) fn reading(&self, slice: usize) -> io::Result<Reading> {
        let mut looks = 0;
        loop {
            // The base first: one that is moved meanwhile must not meet older counters.
            let control = self.maps.control_copy(self.slot);
            let device = self.witness.look(&self.disk)?;
            let (counters, misses) = self.counters()?;
            let accounts = Self::accounts(&control, &counters);
            let verdict = self.judge(&control, slice, &accounts, &counters, &misses, device);
            looks += 1;
            match verdict {
                // The totals that go with this rest include the miss found just now: look again.
                Verdict::RestUnseen if looks < 4 => {
                    self.complete_unseen(&control, &accounts);
                    continue;
                }
                Verdict::Untrue => atomic64(word!(self, untrue)).store(1, Ordering::SeqCst),
                _ => {}
            }
            let account = accounts.get(slice).copied().unwrap_or_default();
            let completed = match verdict {
                Verdict::Rest => account.queued,
                _ if account.completed == account.queued => account.queued.wrapping_sub(1),
                _ => account.completed,
            };
            return Ok(Reading {
                completed,
                queued: account.queued,
                misses,
            });
        }
    }

    fn judge(
        &self,
        control: &DiskControl,
        slice: usize,
        accounts: &[Account],
        counters: &DiskCounters,
        misses: &Misses,
        look: Option<Look>,
    ) -> Verdict {
        let based = control.based & 1 != 0 && control.based & (1 << slice) != 0;
        if !based || control.untrue != 0 {
            return Verdict::Moving;
        }
        // A queue event that was missed: the counters may meet with a write in flight.
        if misses.queue != control.queue_base {
            return Verdict::Untrue;
        }
        let Some(look) = look else {
            return Verdict::Moving;
        };
        if !self.witness.trusts(look.doubt(&self.disk, counters)) {
            return Verdict::Untrue;
        }
        let device = Device {
            accounted: look.accounted.wrapping_sub(control.stat_base as u64),
            busy: look.busy,
            exact: !self.disk.is_bio_based(),
        };
        books::judge(accounts, slice, counters.rejected, Some(device))
    }

    /// Moves the base over completions that nobody saw. The miss is counted first, so that a death in
    /// between is a miss too many, never one too few.
    fn complete_unseen(&self, judged: &DiskControl, accounts: &[Account]) {
        let _one_at_a_time = self.maps.one_at_a_time();
        if self.maps.control_copy(self.slot).base != judged.base {
            return;
        }
        self.found(&Misses {
            complete: 1,
            ..Misses::default()
        });
        let mut base = judged.base;
        for (base, account) in base.iter_mut().zip(accounts) {
            *base = base.wrapping_add(account.open().max(0));
        }
        put(word!(self, base), base);
    }

    /// Takes the base away: the next rest gives another, whatever the counters say.
    pub(super) fn forget_base(&self) {
        atomic32(word!(self, based)).store(0, Ordering::SeqCst);
    }

    /// Gives the counters their base where they lack one, and balances the books where events were
    /// lost, if the disk is at rest by its own word: twice, a grace period apart, with unchanged
    /// counters. Whether the books are balanced. Takes tens of milliseconds when they are not.
    pub fn settle(&self) -> io::Result<bool> {
        let control = self.maps.control_copy(self.slot);
        let whole = self.reading(0)?;
        let all = (1u32 << Self::slice_count(&control)) - 1;
        if whole.nothing_in_flight() && control.based & all == all && self.agrees()? {
            self.forget_waiting();
            self.remember_rest(Epoch(control.epoch), &whole.misses);
            return Ok(true);
        }
        if self.disk.suspended() {
            self.forget_waiting();
            return Ok(false);
        }
        // Switched off meanwhile, its word would stand still for good. A path may go, and be missed.
        if !self.disk.is_bio_based() && self.disk.hidden_paths.is_empty() {
            self.disk.statistics()?;
        }
        let at_rest = || -> io::Result<_> {
            let look = self.witness.look(&self.disk)?.filter(|look| !look.busy);
            let Some(look) = look.filter(|_| !self.disk.suspended()) else {
                return Ok(None);
            };
            Ok(Some((look, self.counters()?)))
        };
        let Some(before) = at_rest()? else {
            self.forget_waiting();
            return Ok(false);
        };
        grace()?;
        std::thread::sleep(REST);
        if at_rest()?.as_ref() != Some(&before) {
            self.forget_waiting();
            return Ok(false);
        }
        let (look, (counters, misses)) = before;
        Ok(self.balance(Epoch(control.epoch), &counters, &misses, look))
    }

    /// Whether the device accounted just what was counted; where it is not exact, what it left out since
    /// the last balance would hide as many sectors that were never counted as queued.
    fn agrees(&self) -> io::Result<bool> {
        if !self.disk.is_bio_based() {
            return Ok(true);
        }
        Ok(self
            .compare()?
            .is_none_or(|(counted, device)| counted == device))
    }

    fn balance(&self, epoch: Epoch, counters: &DiskCounters, misses: &Misses, look: Look) -> bool {
        let _one_at_a_time = self.maps.one_at_a_time();
        let mut control = self.maps.control_copy(self.slot);
        let slices = Self::slice_count(&control);
        let fresh = control.based & 1 == 0;
        let mut unseen = Misses::default();
        let mut accounts = Self::accounts(&control, counters);
        if !fresh {
            // Slices without a base have nothing to say yet.
            for (index, account) in accounts.iter_mut().enumerate() {
                if control.based & (1 << index) == 0 {
                    account.completed = account.queued;
                }
            }
            let trusted = self.witness.trusts(look.doubt(&self.disk, counters));
            let accounted = look.accounted.wrapping_sub(control.stat_base as u64);
            let accounted = trusted.then_some((accounted, !self.disk.is_bio_based()));
            let missed = control.rest_epoch != 0 && misses.complete > control.rest_misses[1];
            let rejected = counters.rejected;
            let Some(correction) = books::at_rest(&accounts, rejected, accounted, missed) else {
                self.wait_for_held(counters);
                return false;
            };
            unseen.queue = u64::from(correction.queue_unseen);
            unseen.complete = u64::from(correction.completion_unseen);
        }
        self.forget_waiting();
        self.found(&unseen);
        for (base, flight) in control.base.iter_mut().zip(&counters.slice) {
            *base = flight.queued.wrapping_sub(flight.completed) as i64;
        }
        let counted = counters.slice[0].queued.wrapping_sub(counters.rejected);
        put(word!(self, base), control.base);
        put(
            word!(self, stat_base),
            look.accounted.wrapping_sub(counted) as i64,
        );
        self.witness.trust(look.doubt(&self.disk, counters));
        put(word!(self, queue_base), misses.queue + unseen.queue);
        let misses = Misses {
            queue: misses.queue + unseen.queue,
            complete: misses.complete + unseen.complete,
            ..*misses
        };
        self.remember_rest(epoch, &misses);
        atomic64(word!(self, untrue)).store(0, Ordering::SeqCst);
        atomic32(word!(self, based)).store((1 << slices) - 1, Ordering::SeqCst);
        true
    }

    /// Notes that nothing was in flight in `epoch`: what was queued since then has its stamp or a later
    /// one, unless that is counted as missed.
    fn remember_rest(&self, epoch: Epoch, misses: &Misses) {
        let totals = [
            misses.queue,
            misses.complete,
            misses.stash,
            misses.failed_writes,
        ];
        put(word!(self, rest_misses), totals);
        put(word!(self, rest_epoch), u64::from(epoch.0));
    }

    /// The newest rest in this generation that [`Self::settle`] proved.
    pub(super) fn rest(&self) -> Option<Rest> {
        let control = self.maps.control_copy(self.slot);
        let [queue, complete, stash, failed_writes] = control.rest_misses;
        (control.rest_epoch != 0).then_some(Rest {
            epoch: Epoch(control.rest_epoch as u32),
            misses: Misses {
                queue,
                complete,
                stash,
                failed_writes,
            },
        })
    }

    fn forget_waiting(&self) {
        *self
            .witness
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The device is idle, but the counters are open: something waits before the device, or was lost
    /// there. After a while nobody can say, and the generation has to end.
    fn wait_for_held(&self, counters: &DiskCounters) {
        let mut waiting = self
            .witness
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match &*waiting {
            Some((since, then)) if then == counters => {
                if since.elapsed() >= HELD_AT_MOST {
                    atomic64(word!(self, taint)).fetch_or(TAINT_BOOKS, Ordering::SeqCst);
                }
            }
            _ => *waiting = Some((Instant::now(), *counters)),
        }
    }

    /// What the programs counted and what the device accounted since the base, in sectors. `None`
    /// while the disk is not at rest, keeps no statistics, or is known to leave writes out of them.
    pub fn audit(&self) -> io::Result<Option<(u64, u64)>> {
        let vague = self.disk.is_bio_based();
        Ok(self
            .compare()?
            .filter(|(counted, device)| !vague || device >= counted))
    }

    fn compare(&self) -> io::Result<Option<(u64, u64)>> {
        let before = match self.reading(0) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(None),
            reading => reading?,
        };
        if !self.disk.keeps_statistics() {
            return Ok(None);
        }
        let look = self.witness.look(&self.disk)?;
        let (counters, _) = self.counters()?;
        let after = self.reading(0)?;
        let Some(look) = look else {
            return Ok(None);
        };
        if !before.nothing_in_flight() || after != before {
            return Ok(None);
        }
        let base = self.maps.control_copy(self.slot).stat_base as u64;
        let counted = counters.slice[0].queued.wrapping_sub(counters.rejected);
        Ok(Some((counted, look.accounted.wrapping_sub(base))))
    }
}
