//! The mark/cut protocol under thousands of interleavings, and each of its rules removed in turn.

use super::scenario::{Setup, Tally, run, sweep};
use super::world::Faults;
use crate::capture::CapturePolicy;
use crate::capture::types::Mutation;

/// Seeds of a sweep that must hold; `SOE_SIM_SEEDS` overrides it for long runs.
fn seeds() -> u64 {
    std::env::var("SOE_SIM_SEEDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(4000)
}

/// Seeds within which a mutation must be noticed.
const SEEDS: u64 = 20_000;

fn holds(name: &str, setup: &Setup) -> Tally {
    let (tally, violation) = sweep(0..seeds(), setup);
    if let Some(violation) = violation {
        panic!("{name}: {violation}");
    }
    println!("{name}: {tally:?}");
    // A wrong layer that the audit prevented is wrong all the same. A failed write may be executed later
    // without any event, which only the audit can see.
    assert!(
        setup.failing_writes || tally.audits_failed == 0,
        "{tally:?}"
    );
    assert!(tally.optimistic > seeds() / 4, "{tally:?}");
    assert!(tally.frozen > seeds() / 4, "{tally:?}");
    tally
}

/// Without the audit, which would find many of these faults before a layer is made: what is shown is
/// that the oracle finds them.
fn noticed(name: &str, setup: &Setup) {
    let mut setup = *setup;
    setup.policy.audit_blocks = 0;
    let setup = &setup;
    let (tally, violation) = sweep(0..SEEDS, setup);
    match violation {
        Some(violation) => println!("{name}: noticed, {violation}"),
        None => panic!("{name}: not noticed in {} seeds: {tally:?}", SEEDS),
    }
}

fn mutated(mutation: Mutation) -> Setup {
    Setup {
        policy: CapturePolicy {
            mutation,
            ..CapturePolicy::default()
        },
        ..Setup::default()
    }
}

fn faulty(faults: Faults) -> Setup {
    Setup {
        faults,
        ..Setup::default()
    }
}

#[test]
fn every_layer_is_an_instant_of_all_disks() {
    holds("healthy", &Setup::default());
}

/// A false alarm costs a rescan; there is none while every write has its marks.
#[test]
fn the_audit_of_a_healthy_volume_finds_nothing() {
    for setup in [
        Setup::default(),
        Setup {
            misses: true,
            silent_misses: true,
            ..Setup::default()
        },
    ] {
        let tally = holds("audit", &setup);
        assert_eq!(tally.audits_failed, 0, "{tally:?}");
    }
}

/// Hidden are changes of blocks that are written to again between the cut and the audit (they are in the
/// next layer), of blocks that change under the audit, and those under a layer that reads everything,
/// which is kept.
#[test]
fn the_audit_finds_blocks_that_changed_without_a_mark() {
    let wrong_layers = |audit_blocks| {
        let setup = Setup {
            policy: CapturePolicy {
                audit_blocks,
                ..CapturePolicy::default()
            },
            behind: true,
            ..Setup::default()
        };
        let runs = (0..1000).map(|seed| run(seed, &setup));
        let (mut wrong, mut tally) = (0u32, Tally::default());
        for run in runs {
            match run {
                Ok(one) => tally.add(&one),
                Err(_) => wrong += 1,
            }
        }
        (wrong, tally)
    };
    let (without, _) = wrong_layers(0);
    let (with, tally) = wrong_layers(u32::MAX);
    println!(
        "wrong layers in 1000 scenarios: {without} without an audit, {with} with one, {tally:?}"
    );
    assert!(without > 500, "{without}");
    assert!(with < without / 5, "{with} of {without}");
    assert!(tally.audits_failed > 500, "{tally:?}");
}

#[test]
fn every_layer_is_an_instant_although_writes_fail_and_come_late() {
    let tally = holds(
        "failing writes",
        &Setup {
            failing_writes: true,
            ..Setup::default()
        },
    );
    assert!(tally.after_failed_writes > seeds() / 4, "{tally:?}");
}

#[test]
fn every_layer_is_an_instant_although_programs_are_skipped() {
    let tally = holds(
        "misses",
        &Setup {
            misses: true,
            failing_writes: true,
            ..Setup::default()
        },
    );
    assert!(tally.generations > 0, "{tally:?}");
}

#[test]
fn every_layer_is_an_instant_although_completions_are_lost_without_a_word() {
    let lossy = Setup {
        silent_misses: true,
        ..Setup::default()
    };
    holds("silent misses", &lossy);
    holds(
        "all kinds of misses",
        &Setup {
            misses: true,
            failing_writes: true,
            ..lossy
        },
    );
}

#[test]
fn a_base_moved_without_counting_a_miss_is_noticed() {
    noticed(
        "forget unseen",
        &Setup {
            silent_misses: true,
            ..faulty(Faults {
                forget_unseen: true,
                ..Faults::default()
            })
        },
    );
}

#[test]
fn marking_only_at_queue_is_noticed() {
    noticed(
        "mark only at queue",
        &faulty(Faults {
            mark_only_at_queue: true,
            ..Faults::default()
        }),
    );
}

#[test]
fn counting_completions_before_stamping_is_noticed() {
    noticed(
        "count before stamp",
        &faulty(Faults {
            count_before_stamp: true,
            no_witness: true,
            ..Faults::default()
        }),
    );
}

/// The device accounts a write after its completion program, so its word covers for this one.
#[test]
fn counting_completions_before_stamping_is_made_up_for_by_the_device() {
    holds(
        "count before stamp, with the device's word",
        &faulty(Faults {
            count_before_stamp: true,
            ..Faults::default()
        }),
    );
}

#[test]
fn trusting_counters_that_lost_an_event_is_noticed() {
    noticed(
        "untrue counters",
        &Setup {
            faults: Faults {
                trust_untrue_counters: true,
                ..Faults::default()
            },
            misses: true,
            ..Setup::default()
        },
    );
}

#[test]
fn a_cut_without_the_in_flight_check_is_noticed() {
    noticed("no in-flight check", &mutated(Mutation::NoInFlightCheck));
}

#[test]
fn a_residual_fixed_before_the_counters_is_noticed() {
    noticed(
        "residual before counters",
        &mutated(Mutation::ResidualBeforeCounters),
    );
}

#[test]
fn selecting_later_than_the_cut_is_noticed() {
    noticed("select after cut", &mutated(Mutation::SelectAfterCut));
}

#[test]
fn thawing_before_the_residual_is_read_is_noticed() {
    noticed("thaw before read", &mutated(Mutation::ThawBeforeRead));
}

#[test]
fn a_pass_without_grace_is_noticed() {
    noticed("no grace", &mutated(Mutation::NoGrace));
}

#[test]
fn a_cut_without_the_second_reading_is_noticed() {
    noticed("no second reading", &mutated(Mutation::NoSecondReading));
}

#[test]
fn cutting_volume_by_volume_is_noticed() {
    noticed("volume by volume", &mutated(Mutation::VolumeByVolume));
}

#[test]
fn forgetting_failed_writes_is_noticed() {
    noticed(
        "forget failed writes",
        &Setup {
            failing_writes: true,
            ..mutated(Mutation::ForgetFailedWrites)
        },
    );
}

#[test]
fn relying_on_passes_after_a_missed_completion_is_noticed() {
    noticed(
        "trust passes",
        &Setup {
            misses: true,
            ..mutated(Mutation::TrustPasses)
        },
    );
}

#[test]
fn ignoring_that_both_marks_were_missed_is_noticed() {
    noticed(
        "ignore double miss",
        &Setup {
            misses: true,
            ..mutated(Mutation::IgnoreDoubleMiss)
        },
    );
}
