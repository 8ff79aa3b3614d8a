//! The kernel half's maps, and the mapped words by which programs and agent talk.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use soe_common::record::{DiskControl, SLOT_ENTRIES, SLOT_PATH, SLOT_PROBES, SlotEntry};

use super::TrackerError;
use super::syscalls::{self, Mapped};

/// Places of the table from `diskseq` to slot.
const SLOT_PLACES: usize = SLOT_ENTRIES + SLOT_PROBES;
/// In place of a `diskseq`: a place that was given up.
const WITHDRAWN: u64 = u64::MAX;

/// What disks need of the tracker.
pub(super) struct Maps {
    by_name: BTreeMap<String, OwnedFd>,
    pub(super) programs: BTreeMap<String, OwnedFd>,
    pub(super) control: Mapped,
    table: Mapped,
    pub(super) cpus: usize,
    books: Mutex<()>,
}

impl Maps {
    pub(super) fn new(
        by_name: BTreeMap<String, OwnedFd>,
        programs: BTreeMap<String, OwnedFd>,
        slots: u32,
    ) -> Result<Self, TrackerError> {
        let mapped = |name: &str, bytes: usize| {
            let map = by_name.get(name).ok_or_else(|| TrackerError::Load {
                what: format!("map {name}"),
                reason: "not in the object".into(),
            })?;
            Mapped::new(map, bytes).map_err(TrackerError::io(format!("mmap of {name}")))
        };
        let control = mapped("CONTROL", slots as usize * size_of::<DiskControl>())?;
        let table = mapped("SLOTS", SLOT_PLACES * size_of::<SlotEntry>())?;
        let cpus = syscalls::possible_cpus().map_err(TrackerError::io("number of CPUs"))?;
        Ok(Self {
            by_name,
            programs,
            control,
            table,
            cpus,
            books: Mutex::new(()),
        })
    }

    pub(super) fn map(&self, name: &str) -> BorrowedFd<'_> {
        self.by_name
            .get(name)
            .expect("every map of the object is there")
            .as_fd()
    }

    pub(super) fn control_of(&self, slot: u32) -> *mut DiskControl {
        self.control.at(slot as usize * size_of::<DiskControl>())
    }

    /// A copy of a slot's control words. The programs change `taint` and `failed_epoch` only.
    pub(super) fn control_copy(&self, slot: u32) -> DiskControl {
        // SAFETY: within the mapping; plain data.
        unsafe { self.control_of(slot).read_volatile() }
    }

    fn slot_entry(&self, place: usize) -> (&AtomicU64, &AtomicU64) {
        let entry: *mut SlotEntry = self.table.at(place * size_of::<SlotEntry>());
        // SAFETY: within the mapping, which lives as long as `self`; the programs only read it.
        unsafe {
            (
                AtomicU64::from_ptr(&raw mut (*entry).diskseq),
                AtomicU64::from_ptr(&raw mut (*entry).slot),
            )
        }
    }

    /// Lets the programs find `slot` by `diskseq`.
    pub(super) fn publish(&self, diskseq: u64, slot: u64) -> Result<(), TrackerError> {
        let home = diskseq as usize % SLOT_ENTRIES;
        let free = (home..home + SLOT_PROBES).find(|place| {
            matches!(
                self.slot_entry(*place).0.load(Ordering::SeqCst),
                0 | WITHDRAWN
            )
        });
        let (disk, to) = self.slot_entry(free.ok_or(TrackerError::Full {
            slots: SLOT_ENTRIES as u32,
        })?);
        // The programs look at the disk first.
        to.store(slot, Ordering::SeqCst);
        disk.store(diskseq, Ordering::SeqCst);
        Ok(())
    }

    /// The disks, paths included, whose bios and requests count for `slot`.
    pub(super) fn disks_of(&self, slot: u32) -> Vec<u64> {
        (0..SLOT_PLACES)
            .map(|place| self.slot_entry(place))
            .filter(|(_, to)| to.load(Ordering::SeqCst) as u32 & !SLOT_PATH == slot)
            .map(|(disk, _)| disk.load(Ordering::SeqCst))
            .filter(|diskseq| !matches!(*diskseq, 0 | WITHDRAWN))
            .collect()
    }

    /// No program finds `slot` from now on, except those already running.
    pub(super) fn withdraw(&self, slot: u32) {
        for place in 0..SLOT_PLACES {
            let (disk, to) = self.slot_entry(place);
            let here = to.load(Ordering::SeqCst) as u32 & !SLOT_PATH == slot;
            if here && disk.load(Ordering::SeqCst) != 0 {
                // Not 0: a search goes on behind a place that was given up.
                disk.store(WITHDRAWN, Ordering::SeqCst);
            }
        }
    }

    /// Held while a slot's books are balanced.
    pub(super) fn one_at_a_time(&self) -> MutexGuard<'_, ()> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Skipped runs of the queue-side and of the completion-side marking programs.
    pub(super) fn misses(&self) -> io::Result<[u64; 2]> {
        let of = |name: &str| {
            let program = self.programs.get(name).ok_or(io::ErrorKind::NotFound)?;
            syscalls::program_info(program.as_fd()).map(|info| info.recursion_misses)
        };
        Ok([of("bio_queued")?, of("request_done")? + of("bio_done")?])
    }
}
