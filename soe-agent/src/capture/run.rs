//! The capture of a group: passes, then the cut that disturbs least.

use std::time::Duration;

use super::attempt::{Attempt, Moved, Window};
use super::audit::AUDIT_TIME;
use super::error::CaptureError;
use super::freezer::{FreezeError, VolumeFreezer};
use super::pace::DeadlinePace;
use super::sink::LayerSink;
use super::types::{CaptureParts, CapturePolicy, CaptureRequest, GroupCut, Level, Method};
use crate::seam::Unpaced;

/// What the freezes of a capture cost.
#[derive(Default)]
struct Pauses {
    last: Duration,
    wasted: Duration,
    missed: u32,
}

/// Captures one layer of every volume, all cut at one common instant, and commits them.
///
/// First the optimistic cut, which holds no writer; if no quiet instant comes, and there is something
/// to freeze, pre-copy and freeze within the pause budget. On any error the sink is aborted and
/// nothing became a layer; the blocks stay marked, because the next attempt starts from the newest
/// durable manifest again.
pub fn capture_group(
    parts: &CaptureParts<'_>,
    request: &CaptureRequest,
    sink: &mut dyn LayerSink,
) -> Result<GroupCut, CaptureError> {
    let result = capture(parts, request, sink);
    if result.is_err() {
        sink.abort();
    }
    result
}

fn capture(
    parts: &CaptureParts<'_>,
    request: &CaptureRequest,
    sink: &mut dyn LayerSink,
) -> Result<GroupCut, CaptureError> {
    let started_at = parts.clock.now();
    let mut capture = Capture {
        attempt: Attempt::begin(parts, request.baseline, request.policy)?,
        parts,
        policy: request.policy,
        pauses: Pauses::default(),
        tries: 0,
    };
    sink.begin(&capture.attempt.plan())
        .map_err(|source| CaptureError::Sink { source })?;
    let began = parts.clock.monotonic();
    let unsettled = capture.attempt.unsettled()?;
    let optimistic = request.policy.optimistic && unsettled.is_none();
    let mut cut = None;
    if optimistic {
        cut = capture
            .optimistic(sink)?
            .map(|window| (Method::Optimistic, window, false));
    }
    let optimistic_tries = capture.tries;
    let (method, window, frozen) = match (cut, parts.freezer) {
        (Some(cut), _) => cut,
        (None, Some(freezer)) => {
            let (window, intact) = capture.freezing(freezer, sink)?;
            (Method::Freeze, window, intact)
        }
        (None, None) => {
            return Err(match unsettled {
                Some(volume) => CaptureError::PathUnsettled { volume },
                None => CaptureError::NotQuiet {
                    tries: capture.tries,
                    elapsed: parts.clock.monotonic() - began,
                },
            });
        }
    };
    let volumes = capture
        .attempt
        .persist(sink, |number| match parts.freezer {
            Some(freezer) if frozen && freezer.covers(number) => Level::Filesystem,
            _ => Level::Crash,
        })?;
    if request.policy.audit_blocks > 0 {
        // Not paced: it is little, and the layer is not durable before it.
        let until = DeadlinePace {
            clock: parts.clock,
            until: parts.clock.monotonic() + AUDIT_TIME,
        };
        for (number, cut) in volumes.iter().enumerate() {
            capture.attempt.audit(number, cut, &until, sink)?;
        }
    }
    let cut = GroupCut {
        method,
        volumes,
        pause: if method == Method::Freeze {
            capture.pauses.last
        } else {
            Duration::ZERO
        },
        wasted_pause: capture.pauses.wasted,
        budget_missed: capture.pauses.missed,
        skew: Duration::ZERO,
        window: window.length,
        started_at,
        cut_at: window.at,
        passes: capture.attempt.passes,
        tries: capture.tries,
        optimistic_tries,
    };
    sink.commit(&cut)
        .map_err(|source| CaptureError::Sink { source })?;
    Ok(cut)
}

struct Capture<'a, 'p> {
    attempt: Attempt<'a, 'p>,
    parts: &'p CaptureParts<'a>,
    policy: CapturePolicy,
    pauses: Pauses,
    tries: u32,
}

impl Capture<'_, '_> {
    /// Looks for an instant in which nothing moves. `None` when none came in time.
    fn optimistic(&mut self, sink: &mut dyn LayerSink) -> Result<Option<Window>, CaptureError> {
        let clock = self.parts.clock;
        let limit = self
            .policy
            .optimistic_residual
            .min(self.policy.memory_limit);
        let mut backoff = self.policy.backoff_min;
        let mut began = None;
        loop {
            let pending = self.attempt.pending()?;
            if pending > limit {
                if !self.attempt.converging() {
                    return Ok(None);
                }
                self.attempt.pass(sink)?;
                continue;
            }
            let now = clock.monotonic();
            let since = *began.get_or_insert(now);
            if self.tries >= self.policy.optimistic_tries
                || now - since >= self.policy.optimistic_time
            {
                return Ok(None);
            }
            self.attempt.make_room(pending);
            // A bump is not worth it while writes are visibly under way.
            if self.attempt.looks_quiet()? {
                self.tries += 1;
                let tried = self.attempt.window(&Unpaced, Duration::ZERO, &mut || ())?;
                if self.attempt.window_unsettled() {
                    return Ok(None);
                }
                if let Ok(window) = tried {
                    return Ok(Some(window));
                }
                // A smaller rest makes the next window shorter.
                if pending > limit / 16 && self.attempt.converging() {
                    self.attempt.pass(sink)?;
                }
            } else {
                self.attempt.settle()?;
            }
            clock.sleep(backoff);
            backoff = (backoff * 2).min(self.policy.backoff_max);
        }
    }

    /// Passes until the rest fits into the pause, then freezes. The flag says whether the freeze
    /// held through the whole window.
    fn freezing(
        &mut self,
        freezer: &dyn VolumeFreezer,
        sink: &mut dyn LayerSink,
    ) -> Result<(Window, bool), CaptureError> {
        let mut last = Moved::InFlight;
        for nth in 0..self.policy.freeze_tries {
            if nth > 0 {
                // Whoever wrote past the freeze, or was held by it, gets time to finish.
                self.parts.clock.sleep(self.policy.backoff_max);
            }
            let pending = self.until_it_fits(freezer, sink)?;
            self.attempt.make_room(pending);
            self.tries += 1;
            let (tried, intact) = self.frozen_window(freezer)?;
            match tried {
                Ok(window) => return Ok((window, intact)),
                Err(moved) => last = moved,
            }
            self.pauses.wasted += self.pauses.last;
        }
        Err(CaptureError::FrozenButMoving {
            tries: self.policy.freeze_tries,
            why: last.describe().to_owned(),
        })
    }

    fn until_it_fits(
        &mut self,
        freezer: &dyn VolumeFreezer,
        sink: &mut dyn LayerSink,
    ) -> Result<u64, CaptureError> {
        loop {
            // What is flushed now is copied by a pass, what is dirty then is written in the pause.
            freezer.flush()?;
            self.attempt.settle()?;
            let pending = self.attempt.pending()?;
            let budget = self.policy.pause_budget;
            let expected = freezer.freeze_estimate() + freezer.thaw_estimate();
            if expected > budget {
                return Err(CaptureError::FreezeTooLong { expected, budget });
            }
            let need = self.attempt.reading_time(pending) + expected;
            if need <= budget && pending <= self.policy.memory_limit {
                return Ok(pending);
            }
            let goes_on = self.attempt.converging() || self.attempt.hurry();
            if pending == 0 || !goes_on {
                return Err(CaptureError::NotConverging {
                    passes: self.attempt.passes,
                    residual: pending,
                    budget,
                });
            }
            self.attempt.pass(sink)?;
        }
    }

    fn frozen_window(
        &mut self,
        freezer: &dyn VolumeFreezer,
    ) -> Result<(Result<Window, Moved>, bool), CaptureError> {
        let clock = self.parts.clock;
        let budget = self.policy.pause_budget;
        // All of it counts: freezing, reading, and thawing, which begins early enough to be over in time.
        let limit = budget
            .saturating_sub(freezer.thaw_estimate())
            .max(Duration::from_millis(1));
        let until = clock.monotonic() + limit;
        let mut hold = match freezer.freeze(limit) {
            Ok(hold) => Some(hold),
            Err(FreezeError::TooSlow { held, .. }) => {
                self.pauses.last = held;
                self.pauses.missed += u32::from(held > budget);
                return Ok((Err(Moved::Deadline), false));
            }
            Err(error) => return Err(error.into()),
        };
        let mut thawed = None;
        let pace = DeadlinePace { clock, until };
        let patience = until.saturating_sub(clock.monotonic()) / 4;
        // Only a mutation thaws before the window is over.
        let tried = self.attempt.window(&pace, patience, &mut || {
            thawed = hold.take().map(|hold| hold.thaw());
        });
        if let Some(hold) = hold.take() {
            thawed = Some(hold.thaw());
        }
        let thawed = thawed.transpose();
        let tried = tried?;
        let Some(thawed) = thawed? else {
            return Ok((tried, false));
        };
        self.pauses.last = thawed.pause;
        if thawed.pause > budget {
            self.pauses.missed += 1;
        }
        Ok((tried, thawed.intact))
    }
}
