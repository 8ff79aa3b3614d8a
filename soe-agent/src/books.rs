//! The books of a disk: what the programs counted, held against what the device says of itself.
//!
//! A write is counted when it is queued and when it completes. A kernel may skip a program, mostly
//! with a count of the skipped runs (`recursion_misses`), but on some kernels without a word. So
//! equality of the two counters is not taken for rest by itself: the device's own statistics are the
//! third witness. On disks that serve requests the kernel calls the completion program first and
//! accounts the sectors afterwards (`blk_update_request`), so what is accounted is marked, or its
//! program was skipped.
//!
//! Let `q` and `c` be the sectors queued and completed, and `s` those that the device accounted,
//! read in the order `s`, `c`, `q`:
//!
//! - `s = q = c`: every write counted was complete before the reading began.
//! - `s = q > c`: the same, but completion programs were skipped. Their writes have the mark of
//!   their queueing only; the miss is counted and the base moved, never one without the other.
//! - `c > q` or `s > q`: queue programs were skipped (or a bio from before the base was found). `c`
//!   could now equal `q` with a write in flight, so nothing is believed before the device is at rest.
//! - otherwise writes are in flight.
//!
//! Pure; the kernel's map and the simulated one both decide by it.

/// What the counters of one slice say, its base included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Sectors queued.
    pub queued: u64,
    /// Sectors completed, plus the slice's base.
    pub completed: u64,
}

impl Account {
    /// Sectors queued and not completed, by these counters alone; negative when more completed.
    pub fn open(self) -> i64 {
        self.queued.wrapping_sub(self.completed) as i64
    }
}

/// The device's own word, read before the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Sectors it accounted as written or discarded, minus the base.
    pub accounted: u64,
    /// Whether it has write-like requests in flight.
    pub busy: bool,
    /// Whether it accounts every write, and does so only after the write's completion program ran or
    /// was skipped, as disks that serve requests do. Bio-based drivers account first, and some leave
    /// discards out (zram): of them only "more than was queued" can be held against the counters.
    pub exact: bool,
}

/// What a reading of one slice amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every write counted as queued was complete before the reading began, and is marked twice.
    Rest,
    /// The same, except that some were not seen to complete: they are marked once.
    RestUnseen,
    /// Writes are in flight, or that cannot be told apart.
    Moving,
    /// The counters lack queue events: see [`at_rest`] before any other reading is believed.
    Untrue,
}

/// Judges a reading of slice `slice` of a disk. `slices[0]` is the whole disk; `rejected` are the
/// sectors that were turned away before the device saw them.
pub fn judge(slices: &[Account], slice: usize, rejected: u64, device: Option<Device>) -> Verdict {
    let (Some(whole), Some(this)) = (slices.first(), slices.get(slice)) else {
        return Verdict::Moving;
    };
    if whole.open() < 0 || this.open() < 0 {
        return Verdict::Untrue;
    }
    let Some(device) = device else {
        return if this.open() == 0 {
            Verdict::Rest
        } else {
            Verdict::Moving
        };
    };
    let expected = whole.queued.wrapping_sub(rejected);
    if (device.accounted.wrapping_sub(expected) as i64) > 0 {
        return Verdict::Untrue;
    }
    let all_done = device.accounted == expected;
    match (this.open(), slice) {
        (0, 0) if !device.busy && (all_done || !device.exact) => Verdict::Rest,
        // Other parts of the disk may move, so the device's word is not about this one.
        (0, 1..) => Verdict::Rest,
        (1.., _) if !device.busy && all_done && device.exact => Verdict::RestUnseen,
        _ => Verdict::Moving,
    }
}

/// How the base must change so that the books are true again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Correction {
    /// To add to each slice's base.
    pub base: Vec<i64>,
    /// To add to the base of the device's statistics.
    pub device: i64,
    /// Queue events were not seen.
    pub queue_unseen: bool,
    /// Completions were not seen.
    pub completion_unseen: bool,
}

/// Judges the books of a device that is at rest by its own word: nothing in flight twice, a grace
/// period apart, with unchanged counters. `accounted` is the device's word if it can be had;
/// `missed` says that completions are known to have been missed. `None` when writes wait before the
/// device (held by cgroup throttling, for example), which look like lost ones to the counters but not to
/// a device that is exact.
pub fn at_rest(
    slices: &[Account],
    rejected: u64,
    accounted: Option<(u64, bool)>,
    missed: bool,
) -> Option<Correction> {
    let whole = slices.first()?;
    let mut correction = Correction {
        base: slices.iter().map(|slice| slice.open()).collect(),
        ..Correction::default()
    };
    let open = correction.base.iter().any(|open| *open > 0);
    correction.queue_unseen = correction.base.iter().any(|open| *open < 0);
    correction.completion_unseen = open;
    let expected = whole.queued.wrapping_sub(rejected);
    // The device did `more` sectors that were never counted as queued.
    let more = accounted.map(|(accounted, exact)| (accounted.wrapping_sub(expected) as i64, exact));
    match more {
        Some((more, true)) if more < 0 => return None,
        // Nobody but the device could tell what is lost from what waits, and it does not.
        None | Some((..=0, false)) if open && !missed => return None,
        _ => {}
    }
    if let Some((accounted, exact)) = accounted {
        let more = accounted.wrapping_sub(expected) as i64;
        // Those it did and the programs did not see completing are missing from `completed`.
        let unseen = accounted.wrapping_sub(whole.completed.wrapping_sub(rejected)) as i64;
        correction.device = more;
        correction.queue_unseen |= more > 0;
        correction.completion_unseen |= unseen > 0 && (exact || more > 0);
    }
    Some(correction)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn account(queued: u64, completed: u64) -> Account {
        Account { queued, completed }
    }

    fn says(accounted: u64) -> Option<Device> {
        Some(Device {
            accounted,
            busy: false,
            exact: true,
        })
    }

    fn vague(accounted: u64) -> Option<Device> {
        says(accounted).map(|device| Device {
            exact: false,
            ..device
        })
    }

    #[test]
    fn a_device_that_leaves_writes_out_can_only_say_that_there_were_more() {
        let whole = [account(10, 10)];
        assert_eq!(judge(&whole, 0, 0, vague(4)), Verdict::Rest);
        assert_eq!(judge(&whole, 0, 0, vague(11)), Verdict::Untrue);
        let fewer = at_rest(&whole, 0, Some((4, false)), false).expect("at rest");
        assert!(!fewer.queue_unseen && !fewer.completion_unseen);
        assert_eq!(fewer.device, -6);
        // Lost or waiting? Only a counted miss tells.
        let open = [account(10, 7)];
        assert_eq!(at_rest(&open, 0, Some((4, false)), false), None);
        let missed = at_rest(&open, 0, Some((4, false)), true).expect("at rest");
        assert!(missed.completion_unseen && !missed.queue_unseen);
        let more = at_rest(&whole, 0, Some((14, false)), false).expect("at rest");
        assert!(more.queue_unseen && more.completion_unseen);
    }

    #[test]
    fn rest_needs_all_witnesses() {
        let whole = [account(10, 10)];
        assert_eq!(judge(&whole, 0, 0, says(10)), Verdict::Rest);
        assert_eq!(judge(&whole, 0, 0, says(9)), Verdict::Moving);
        assert_eq!(judge(&whole, 0, 0, says(11)), Verdict::Untrue);
        assert_eq!(judge(&whole, 0, 2, says(8)), Verdict::Rest);
        assert_eq!(judge(&whole, 0, 0, None), Verdict::Rest);
        let busy = Device {
            busy: true,
            ..says(10).expect("a device")
        };
        assert_eq!(judge(&whole, 0, 0, Some(busy)), Verdict::Moving);
    }

    #[test]
    fn a_completion_nobody_saw_is_told_from_a_write_in_flight_by_the_device() {
        let whole = [account(10, 7)];
        assert_eq!(judge(&whole, 0, 0, says(10)), Verdict::RestUnseen);
        assert_eq!(judge(&whole, 0, 0, says(7)), Verdict::Moving);
        assert_eq!(judge(&whole, 0, 0, None), Verdict::Moving);
        assert_eq!(judge(&whole, 0, 0, vague(10)), Verdict::Moving);
    }

    #[test]
    fn a_partition_is_judged_by_its_own_counters_and_its_losses_by_the_whole_disk() {
        let slices = [account(30, 25), account(10, 10), account(8, 8)];
        assert_eq!(judge(&slices, 1, 0, says(25)), Verdict::Rest);
        assert_eq!(judge(&slices, 0, 0, says(25)), Verdict::Moving);
        let slices = [account(30, 28), account(10, 8)];
        assert_eq!(judge(&slices, 1, 0, says(28)), Verdict::Moving);
        assert_eq!(judge(&slices, 1, 0, says(30)), Verdict::RestUnseen);
        let slices = [account(30, 31), account(10, 10)];
        assert_eq!(judge(&slices, 1, 0, says(30)), Verdict::Untrue);
    }

    #[test]
    fn what_waits_before_the_device_is_not_lost() {
        assert_eq!(at_rest(&[account(10, 7)], 0, Some((7, true)), false), None);
        assert_eq!(at_rest(&[account(10, 7)], 0, None, false), None);
        let lost = at_rest(&[account(10, 7)], 0, Some((10, true)), false).expect("at rest");
        assert!(lost.completion_unseen && !lost.queue_unseen);
        assert_eq!((lost.base, lost.device), (vec![3], 0));
    }

    #[test]
    fn a_queue_event_nobody_saw_moves_both_bases() {
        let lost = at_rest(&[account(10, 14)], 0, Some((14, true)), false).expect("at rest");
        assert!(lost.queue_unseen && !lost.completion_unseen);
        assert_eq!((lost.base, lost.device), (vec![-4], 4));
        let both = at_rest(&[account(10, 10)], 0, Some((14, true)), false).expect("at rest");
        assert!(both.queue_unseen && both.completion_unseen, "{both:?}");
        assert_eq!((both.base, both.device), (vec![0], 4));
    }

    proptest! {
        /// Whatever was lost on either side, what is judged at rest balances afterwards, and a write
        /// that lacks a mark is never overlooked.
        #[test]
        fn corrected_books_balance(
            writes in prop::collection::vec((1u64..64, any::<bool>(), any::<bool>()), 0..40),
            rejected in 0u64..100,
        ) {
            let (mut queued, mut completed, mut accounted) = (rejected, rejected, 0);
            for (sectors, seen_queued, seen_done) in &writes {
                queued += if *seen_queued { *sectors } else { 0 };
                completed += if *seen_done { *sectors } else { 0 };
                accounted += sectors;
            }
            let now = account(queued, completed);
            let correction = at_rest(&[now], rejected, Some((accounted, true)), false).expect("at rest");
            let after = account(queued, completed.wrapping_add_signed(correction.base[0]));
            let device = accounted.wrapping_add_signed(-correction.device);
            prop_assert_eq!(judge(&[after], 0, rejected, says(device)), Verdict::Rest);
            prop_assert_eq!(correction.queue_unseen, writes.iter().any(|w| !w.1));
            prop_assert_eq!(correction.completion_unseen, writes.iter().any(|w| !w.2));
            // And a reading before that never says rest while a mark is missing unnoticed.
            let unseen = writes.iter().any(|w| !w.1 || !w.2);
            let verdict = judge(&[now], 0, rejected, says(accounted));
            prop_assert!(!unseen || verdict != Verdict::Rest);
        }
    }
}
