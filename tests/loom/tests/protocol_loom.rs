//! The mark/cut protocol, checked over all interleavings and all orders in which memory may show
//! itself, up to a bound on preemptions; and each of its rules taken away in turn, which must be
//! noticed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use soe_loom::{Agent, CPUS, Cut, Missed, Rules, World, Write, write};

/// A handful of writes, and what the agent does beside them.
struct Scenario {
    name: &'static str,
    scripts: [&'static [Write]; CPUS],
    agent: fn(&mut Agent),
    /// Forced thread switches per execution. Every known counterexample needs at most this many.
    preemptions: usize,
}

/// One CPU writes two blocks, the second after the first is done, under an optimistic cut.
const OPTIMISTIC: Scenario = Scenario {
    name: "optimistic",
    scripts: [&[write(0, 1), write(1, 1)], &[]],
    agent: |agent| agent.cut(Cut::Optimistic),
    preemptions: 5,
};

/// The completion program of a write is skipped, so that only the mark at queue tells of it.
const COMPLETION_MISSED: Scenario = Scenario {
    name: "completion missed",
    scripts: [
        &[Write {
            block: 0,
            value: 1,
            missed: Missed::Completion,
        }],
        &[],
    ],
    agent: |agent| agent.cut(Cut::Optimistic),
    preemptions: 20,
};

/// The queue program of a write is skipped, so that it is in flight and not counted.
const QUEUE_MISSED: Scenario = Scenario {
    name: "queue missed",
    scripts: [
        &[Write {
            block: 0,
            value: 1,
            missed: Missed::Queue,
        }],
        &[],
    ],
    agent: |agent| agent.cut(Cut::Optimistic),
    preemptions: 20,
};

/// Two passes while a write is in flight, then a cut.
const PRE_COPY: Scenario = Scenario {
    name: "pre-copy",
    scripts: [&[write(0, 1)], &[]],
    agent: |agent| {
        agent.pass();
        agent.pass();
        agent.cut(Cut::Frozen);
    },
    preemptions: 6,
};

/// Two CPUs write blocks under the same coarse stamp; a cut, then a pass.
const CUT_THEN_PASS: Scenario = Scenario {
    name: "cut, then pass",
    scripts: [&[write(0, 1)], &[write(1, 1)]],
    agent: |agent| {
        agent.cut(Cut::Optimistic);
        agent.pass();
    },
    preemptions: 3,
};

/// Two CPUs write blocks under the same coarse stamp during one pass.
const PASS: Scenario = Scenario {
    name: "pass",
    scripts: [&[write(0, 1)], &[write(1, 1)]],
    agent: |agent| agent.pass(),
    preemptions: 3,
};

/// Two CPUs write blocks under the same coarse stamp; one of them goes on after a frozen cut.
const FROZEN: Scenario = Scenario {
    name: "frozen",
    scripts: [&[write(0, 1)], &[write(1, 1), write(1, 2)]],
    agent: |agent| agent.cut(Cut::Frozen),
    preemptions: 3,
};

/// Explores `scenario` under `rules`; returns the number of executions, or what went wrong in one.
fn explore(scenario: &'static Scenario, rules: Rules) -> Result<u64, String> {
    let executions = Arc::new(AtomicU64::new(0));
    let counter = executions.clone();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(scenario.preemptions);
    let outcome = catch_unwind(AssertUnwindSafe(move || {
        builder.check(move || {
            counter.fetch_add(1, Ordering::Relaxed);
            let world = Arc::new(World::new(rules));
            let mut threads = Vec::new();
            for (cpu, script) in scenario.scripts.into_iter().enumerate() {
                if !script.is_empty() {
                    let world = world.clone();
                    threads.push(loom::thread::spawn(move || {
                        for write in script {
                            world.submit(cpu, *write);
                        }
                    }));
                }
            }
            let agent = loom::thread::spawn(move || {
                let mut agent = Agent::new(world, scenario.scripts);
                (scenario.agent)(&mut agent);
                agent
            });
            for thread in threads {
                thread.join().unwrap();
            }
            agent.join().unwrap().last_cut();
        });
    }));
    match outcome {
        Ok(()) => Ok(executions.load(Ordering::Relaxed)),
        Err(panic) => Err(panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default()),
    }
}

/// Asserts that taking a rule away costs a block or an exact image in `scenario`, and nothing else.
fn assert_needed(rule: &str, rules: Rules, scenario: &'static Scenario) {
    match explore(scenario, rules) {
        Ok(executions) => panic!(
            "without \"{rule}\" nothing went wrong in {executions} executions of {:?}",
            scenario.name
        ),
        Err(found) => {
            assert!(
                found.starts_with("LOST") || found.starts_with("TORN"),
                "without \"{rule}\": {found}"
            );
            println!("without \"{rule}\", {}: {found}", scenario.name);
        }
    }
}

/// Asserts that nothing goes wrong in `scenario`.
fn assert_kept(scenario: &'static Scenario, rules: Rules) {
    match explore(scenario, rules) {
        Ok(executions) => println!("{}: nothing lost in {executions} executions", scenario.name),
        Err(found) => panic!("{}: {found}", scenario.name),
    }
}

macro_rules! kept {
    ($($test:ident: $scenario:ident;)*) => {
        $(
            #[test]
            fn $test() {
                assert_kept(&$scenario, Rules::KEPT);
            }
        )*
    };
}

kept! {
    an_optimistic_cut_is_exact: OPTIMISTIC;
    a_missed_completion_loses_nothing: COMPLETION_MISSED;
    a_missed_queue_program_loses_nothing: QUEUE_MISSED;
    a_pre_copy_loses_nothing: PRE_COPY;
    a_pass_loses_nothing: PASS;
    a_pass_after_a_cut_loses_nothing: CUT_THEN_PASS;
    a_frozen_cut_loses_nothing: FROZEN;
}

macro_rules! needed {
    ($($(#[$doc:meta])* $test:ident: without $rule:ident in $scenario:ident;)*) => {
        $(
            $(#[$doc])*
            #[test]
            fn $test() {
                assert_needed(stringify!($rule), Rules { $rule: false, ..Rules::KEPT }, &$scenario);
            }
        )*
    };
}

needed! {
    /// A queue program that loads the old epoch first can be overtaken by a whole cut before it
    /// counts. When its write's completion is missed, its stamp of the old epoch is all there is.
    a_write_is_counted_before_the_epoch_is_loaded: without queue_counts_before_epoch in COMPLETION_MISSED;

    /// The same delay, nothing missed: the stale stamp takes the coarse stamp back behind the cut,
    /// and the pass that follows does not see what others wrote under it.
    a_coarse_stamp_never_goes_back_behind_a_cut: without queue_counts_before_epoch in CUT_THEN_PASS;

    /// The mark at queue is what is left of a write whose completion program was skipped. (Where no
    /// run is ever missed the mark at completion would do alone.)
    the_mark_at_queue_covers_a_missed_completion: without mark_at_queue in COMPLETION_MISSED;

    /// A pass reads the old contents of a block whose write is under way: only a mark made after the
    /// device has the new contents brings the block into the next pass.
    the_mark_at_completion_covers_a_read_before_the_write_landed: without mark_at_completion in PRE_COPY;

    /// A write counted as completed whose stamp of an old epoch is still to come is out of every
    /// later selection.
    a_completion_is_counted_after_it_is_stamped: without completion_counts_after_stamp in PRE_COPY;

    /// Without the full barrier the epoch may be loaded before the count can be seen, which is the
    /// wrong order again. BPF's non-fetching atomics promise no order.
    the_counters_are_full_barriers: without counters_are_barriers in COMPLETION_MISSED;

    /// `queued` first, then `completed`: a write that is queued and done in between makes up for one
    /// that is still in flight. An optimistic cut would notice by reading `queued` again; a frozen
    /// one has only this reading.
    completed_is_read_before_queued: without completed_before_queued in FROZEN;

    /// The fence makes the stamps of everything counted as completed visible to the selection.
    the_selection_sees_what_was_counted: without fence_between_readings in PRE_COPY;

    /// Without the fence `queued` may be older than `completed` although it is read later: per-CPU
    /// counters may show one CPU's completion and not yet another CPU's earlier queueing.
    queued_is_no_older_than_completed: without fence_between_readings in FROZEN;

    /// An old completion program may be under way, about to stamp an epoch before the cut's.
    no_cut_while_writes_are_in_flight: without in_flight_check in PRE_COPY;

    /// A selection fixed before the counters are read misses the stamp of a completion that the
    /// counters then vouch for.
    the_residual_is_fixed_after_the_counters: without counters_before_selection in PRE_COPY;

    /// Two writes during the copy: the image gets the second and not the first.
    queued_is_read_again_after_the_data: without queued_read_again in OPTIMISTIC;

    /// A write whose queue program was skipped is in flight and not counted.
    missed_queue_programs_refuse_a_cut: without misses_refuse in QUEUE_MISSED;

    /// Without the wait a program that loaded an epoch two bumps ago may stamp after the selection.
    a_grace_period_lies_between_two_bumps: without grace_between_bumps in PRE_COPY;

    /// A program that straddles a pass's bump stamps the epoch before it.
    the_next_pass_selects_from_the_epoch_before: without fine_from_previous_epoch in PRE_COPY;

    /// Such a program also takes the coarse stamp back by one epoch, over the head of others.
    and_so_does_its_coarse_selection: without coarse_from_previous_epoch in PASS;
}

/// Between the bump and the reading of `queued` lies a full fence, or the agent may miss the count
/// of a write that missed the new epoch. There are two: behind the bump, and between the two
/// counters. Each alone is enough for this (the next test), and the second is needed for its own
/// reasons (above), so in this protocol the first is a spare: it makes the bump's promise hold for
/// whoever reads something else than the counters after it.
#[test]
fn a_full_fence_lies_between_the_bump_and_queued() {
    let rules = Rules {
        fence_after_bump: false,
        fence_between_readings: false,
        ..Rules::KEPT
    };
    assert_needed("a fence between bump and queued", rules, &COMPLETION_MISSED);
}

#[test]
fn one_full_fence_between_the_bump_and_queued_is_enough() {
    for scenario in [&COMPLETION_MISSED, &QUEUE_MISSED, &PRE_COPY] {
        assert_kept(
            scenario,
            Rules {
                fence_after_bump: false,
                ..Rules::KEPT
            },
        );
    }
    assert_kept(
        &COMPLETION_MISSED,
        Rules {
            fence_between_readings: false,
            ..Rules::KEPT
        },
    );
}
