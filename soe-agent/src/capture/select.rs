//! What a layer must take, judged from epochs and misses. Pure.

use std::time::Duration;

use soe_common::Epoch;
use uuid::Uuid;

use super::types::{CutRecord, LayerKind, Mutation};
use crate::seam::{Misses, Rest};

/// What kind of layer the base allows, and the first epoch whose blocks it takes (`None`: all).
///
/// A base from another generation never becomes a silent full copy: it makes the layer a rescan,
/// which reads everything and stores what differs.
pub fn layer_kind(
    baseline: bool,
    base: Option<&CutRecord>,
    generation: Uuid,
) -> (LayerKind, Option<Epoch>) {
    match base {
        _ if baseline => (LayerKind::Baseline, None),
        None => (LayerKind::Baseline, None),
        Some(base) if base.generation == generation => {
            (LayerKind::Differential, Some(base.since_next))
        }
        Some(_) => (LayerKind::Rescan, None),
    }
}

/// The last instant of which it is known that nothing was in flight: the cut of the base when it is
/// of the same generation, else a rest that was proven since the generation began, else the beginning
/// of tracking, where writes already under way were not seen at all.
#[derive(Clone, Copy, Debug)]
pub struct Reference {
    /// The epoch that began there.
    pub epoch: Epoch,
    /// The epoch that goes with `misses.failed_writes`: a rest says nothing about writes that failed
    /// before it, because the device may still carry them out.
    pub failed_since: Epoch,
    /// The totals there.
    pub misses: Misses,
    /// Whether it is a proven quiet instant.
    pub quiet: bool,
}

impl Reference {
    /// The reference for a capture in `generation`.
    pub fn new(base: Option<&CutRecord>, generation: Uuid, rest: Option<Rest>) -> Self {
        match (base, rest) {
            (Some(base), _) if base.generation == generation => Self {
                epoch: base.epoch,
                failed_since: base.epoch,
                misses: base.misses,
                quiet: true,
            },
            // A write that failed before the rest may be executed after it, and carries an older stamp:
            // then the rest is no instant from which stamps tell everything.
            (_, Some(rest)) if rest.misses.failed_writes == 0 => Self {
                epoch: rest.epoch,
                failed_since: Epoch::FIRST,
                misses: Misses {
                    failed_writes: 0,
                    ..rest.misses
                },
                quiet: true,
            },
            _ => Self {
                epoch: Epoch::FIRST,
                failed_since: Epoch::FIRST,
                misses: Misses::default(),
                quiet: false,
            },
        }
    }
}

/// Whether the marks made between two instants can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marks {
    /// Every write that was under way or came between has at least one of its two marks.
    Reliable,
    /// A write may have neither: the generation must end.
    Lost,
    /// A write from before the first quiet instant may have neither: read everything again.
    StartOver,
}

/// Judges the misses of an attempt.
///
/// One of the two marks is enough: a completion mark carries the epoch in which the write had
/// landed, and the mark at the queue covers a missed completion because nothing was in flight at
/// the reference, so that the write was queued, and stamped, after it. A write can lose both only if
/// programs of both kinds were skipped since the reference. `start` are the totals when an attempt
/// that reads everything began; what it has not read yet needs no mark, so it counts completions
/// from there. A differential depends on all marks since its base.
pub fn judge(reference: &Reference, kind: LayerKind, start: &Misses, now: &Misses) -> Marks {
    if fewer(now, &reference.misses) || fewer(now, start) {
        return Marks::Lost;
    }
    let from = if kind == LayerKind::Differential {
        &reference.misses
    } else {
        start
    };
    let completion_missed = now.complete > from.complete || now.stash > from.stash;
    let queue_missed = now.queue > reference.misses.queue || !reference.quiet;
    // A lost stash means a completion on a bio-based device whose range nobody knows: there, the
    // queue mark of a *later* queue event cannot stand in for it, so any of them counts as both.
    let stash_lost = now.stash > from.stash;
    if !completion_missed {
        Marks::Reliable
    } else if reference.quiet && (queue_missed || stash_lost) {
        Marks::Lost
    } else if queue_missed {
        Marks::StartOver
    } else {
        Marks::Reliable
    }
}

fn fewer(now: &Misses, before: &Misses) -> bool {
    now.queue < before.queue
        || now.complete < before.complete
        || now.stash < before.stash
        || now.failed_writes < before.failed_writes
}

/// The first epoch the next layer takes.
///
/// A device may execute a failed write later, unmarked, so what was stamped since the reference is
/// taken once more. The same holds for missed completions, whose write may be still under way where
/// the counters had to be given a new base.
pub(crate) fn since_next(
    reference: &Reference,
    cut: Epoch,
    now: &Misses,
    mutated: impl Fn(Mutation) -> bool,
) -> Epoch {
    let failed = now.failed_writes > reference.misses.failed_writes
        && !mutated(Mutation::ForgetFailedWrites);
    if failed {
        reference.failed_since
    } else if now.complete > reference.misses.complete {
        reference.epoch
    } else if mutated(Mutation::SelectAfterCut) {
        cut.next()
    } else {
        cut
    }
}

/// Tells after a failed write when its path may be trusted again: when no further write failed for
/// a while, longer than any driver's retries.
#[derive(Clone, Copy, Debug)]
pub struct PathSettling {
    wait: Duration,
    settled: u64,
    seen: u64,
    seen_at: Duration,
}

impl PathSettling {
    /// Trusts a path `wait` after its last failed write. `failed_writes` are those known to have
    /// settled, for example those of the newest manifest.
    pub fn new(wait: Duration, failed_writes: u64) -> Self {
        Self {
            wait,
            settled: failed_writes,
            seen: failed_writes,
            seen_at: Duration::ZERO,
        }
    }

    /// Takes the total at `now` (monotonic) and returns the total that has settled.
    pub fn observe(&mut self, now: Duration, failed_writes: u64) -> u64 {
        if failed_writes != self.seen {
            self.seen = failed_writes;
            self.seen_at = now;
        } else if now.saturating_sub(self.seen_at) >= self.wait {
            self.settled = self.seen;
        }
        self.settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quiet(misses: Misses) -> Reference {
        Reference {
            epoch: Epoch(5),
            failed_since: Epoch(5),
            misses,
            quiet: true,
        }
    }

    fn misses(queue: u64, complete: u64, stash: u64, failed_writes: u64) -> Misses {
        Misses {
            queue,
            complete,
            stash,
            failed_writes,
        }
    }

    #[test]
    fn a_base_of_another_generation_makes_a_rescan() {
        let (here, there) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let base = CutRecord {
            generation: here,
            epoch: Epoch(9),
            since_next: Epoch(7),
            misses: Misses::default(),
        };
        let kind = |baseline, base, generation| layer_kind(baseline, base, generation);
        assert_eq!(kind(false, None, here), (LayerKind::Baseline, None));
        assert_eq!(
            kind(false, Some(&base), here),
            (LayerKind::Differential, Some(Epoch(7)))
        );
        assert_eq!(kind(false, Some(&base), there), (LayerKind::Rescan, None));
        assert_eq!(kind(true, Some(&base), here), (LayerKind::Baseline, None));
    }

    #[test]
    fn one_kind_of_miss_is_harmless_and_both_end_the_generation() {
        let at = quiet(misses(3, 4, 0, 0));
        let start = at.misses;
        let judged = |now| judge(&at, LayerKind::Differential, &start, &now);
        assert_eq!(judged(misses(3, 4, 0, 0)), Marks::Reliable);
        assert_eq!(judged(misses(9, 4, 0, 0)), Marks::Reliable);
        assert_eq!(judged(misses(3, 9, 0, 0)), Marks::Reliable);
        assert_eq!(judged(misses(4, 5, 0, 0)), Marks::Lost);
        assert_eq!(judged(misses(3, 4, 1, 0)), Marks::Lost);
        assert_eq!(judged(misses(2, 4, 0, 0)), Marks::Lost, "totals went back");
    }

    #[test]
    fn a_baseline_forgives_completions_missed_before_it_began() {
        let at = quiet(misses(3, 4, 0, 0));
        let start = misses(7, 8, 0, 0);
        assert_eq!(
            judge(&at, LayerKind::Baseline, &start, &start),
            Marks::Reliable
        );
        assert_eq!(
            judge(&at, LayerKind::Differential, &start, &start),
            Marks::Lost
        );
        assert_eq!(
            judge(&at, LayerKind::Baseline, &start, &misses(7, 9, 0, 0)),
            Marks::Lost
        );
    }

    #[test]
    fn a_rest_after_a_failed_write_is_no_reference() {
        let generation = Uuid::nil();
        let rest = |failed_writes| Rest {
            epoch: Epoch(8),
            misses: misses(1, 1, 0, failed_writes),
        };
        let good = Reference::new(None, generation, Some(rest(0)));
        assert!(good.quiet && good.epoch == Epoch(8));
        let doubtful = Reference::new(None, generation, Some(rest(1)));
        assert!(!doubtful.quiet && doubtful.epoch == Epoch::FIRST);
        // What that write may still change is in the next layer.
        let now = misses(1, 1, 0, 1);
        assert_eq!(
            since_next(&doubtful, Epoch(20), &now, |_| false),
            Epoch::FIRST
        );
    }

    #[test]
    fn before_the_first_quiet_instant_a_missed_completion_starts_over() {
        let at = Reference::new(None, Uuid::nil(), None);
        let start = misses(0, 2, 0, 0);
        assert_eq!(
            judge(&at, LayerKind::Baseline, &start, &start),
            Marks::Reliable
        );
        assert_eq!(
            judge(&at, LayerKind::Baseline, &start, &misses(0, 3, 0, 0)),
            Marks::StartOver
        );
    }

    #[test]
    fn a_failed_write_is_taken_by_the_next_layer_too() {
        let at = quiet(misses(0, 0, 0, 2));
        let next = |now| since_next(&at, Epoch(8), &now, |_| false);
        assert_eq!(next(misses(0, 0, 0, 2)), Epoch(8));
        assert_eq!(next(misses(0, 0, 0, 3)), Epoch(5));
        assert_eq!(next(misses(0, 1, 0, 2)), Epoch(5));
        assert_eq!(next(misses(1, 0, 0, 2)), Epoch(8));
    }

    #[test]
    fn a_rest_stands_in_for_a_base_except_for_writes_that_failed_before_it() {
        let rest = Rest {
            epoch: Epoch(7),
            misses: misses(1, 2, 0, 3),
        };
        let at = Reference::new(None, Uuid::nil(), Some(rest));
        let start = rest.misses;
        let now = misses(1, 4, 0, 3);
        assert_eq!(
            judge(&at, LayerKind::Baseline, &start, &now),
            Marks::Reliable
        );
        let next = |now| since_next(&at, Epoch(9), &now, |_| false);
        assert_eq!(next(misses(1, 4, 0, 0)), Epoch(7));
        assert_eq!(next(now), Epoch::FIRST);
    }

    #[test]
    fn a_path_settles_after_a_time_without_failures() {
        let second = Duration::from_secs;
        let mut path = PathSettling::new(second(60), 1);
        assert_eq!(path.observe(second(0), 1), 1);
        assert_eq!(path.observe(second(10), 2), 1);
        assert_eq!(path.observe(second(60), 2), 1);
        assert_eq!(path.observe(second(65), 3), 1);
        assert_eq!(path.observe(second(100), 3), 1);
        assert_eq!(path.observe(second(125), 3), 3);
    }
}
