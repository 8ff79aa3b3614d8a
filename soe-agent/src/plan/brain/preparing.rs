//! What is done ahead of time: staging, announced bursts, training.

use std::collections::BTreeSet;

use super::{Brain, Group};
use crate::model::name::Name;
use crate::model::{ONSET_BINS, VolumeName};
use crate::plan::staging::{Allowed, next_burst, possible, should_start};
use crate::plan::types::{Action, Command, Decision, ExternalEvent, nanos};
use crate::seam::UnixNanos;

impl Brain {
    pub(super) fn staged_volumes(&self) -> BTreeSet<VolumeName> {
        self.groups
            .values()
            .filter(|g| g.spec.prediction_enabled)
            .flat_map(|g| g.spec.volumes.iter().cloned())
            .collect()
    }

    pub(super) fn plan_staging(&mut self, now: UnixNanos, out: &mut Vec<Command>) {
        for volume in self.staged_volumes() {
            self.judge_staging_if_due(&volume, now, out);
            self.stage_if_due(&volume, now, out);
        }
    }

    /// What `name` may take: its share of the bytes by criticality, and of the rate by how many volumes are
    /// being staged.
    fn allowed(&self, name: &VolumeName) -> Allowed {
        let all: f64 = self.weights.values().sum();
        let share = self.weights.get(name).map_or(0.0, |weight| weight / all);
        let running = self.volumes.values().filter(|v| v.staging.running).count();
        let staging = &self.config.staging;
        Allowed {
            bytes: (staging.budget_bytes as f64 * share) as u64,
            rate: staging.rate / (running + 1) as f64,
        }
    }

    fn judge_staging_if_due(&mut self, name: &VolumeName, now: UnixNanos, out: &mut Vec<Command>) {
        let Some(volume) = self.volumes.get_mut(name) else {
            return;
        };
        if volume.staging.judge_at.is_some_and(|at| at <= now) {
            volume.staging.judge_at = None;
            out.push(Command::JudgeStaging {
                volume: name.clone(),
            });
        }
    }

    pub(super) fn staging_judged(
        &mut self,
        name: &VolumeName,
        chosen: u64,
        used: u64,
        now: UnixNanos,
        out: &mut Vec<Command>,
    ) {
        let least = self.config.staging.least_precision;
        let Some(volume) = self.volumes.get_mut(name) else {
            return;
        };
        let gate = &mut volume.staging.gate;
        let before = gate.off();
        gate.judge(chosen, used, least);
        let percent = gate.precision().unwrap_or(0.0) * 100.0;
        let reason = match (before, gate.off()) {
            (false, true) => format!(
                "staging is switched off for this volume: {percent:.1} % of what was chosen for the last bursts was read"
            ),
            (true, false) => format!(
                "staging is switched on again: {percent:.1} % of what would have been staged for the last bursts was read"
            ),
            _ => return,
        };
        out.push(not_staged(name, reason, now));
    }

    pub(super) fn plan_staging_of(
        &mut self,
        volume: &VolumeName,
        now: UnixNanos,
        out: &mut Vec<Command>,
    ) {
        let predicted = |g: &Group| g.spec.prediction_enabled && g.spec.volumes.contains(volume);
        if self.groups.values().any(predicted) {
            self.stage_if_due(volume, now, out);
        }
    }

    pub(super) fn stage_if_due(
        &mut self,
        name: &VolumeName,
        now: UnixNanos,
        out: &mut Vec<Command>,
    ) {
        let config = self.config;
        let Some(volume) = self.volumes.get(name) else {
            return;
        };
        let in_burst = self.in_burst(volume, now);
        let forecast = volume.forecast.as_deref();
        let Some(burst) = next_burst(forecast, &volume.announced, &config, now) else {
            return;
        };
        // Most of what is expected is far ahead, and not worth a look at the others.
        if !possible(&volume.staging, &burst, in_burst, &config, now) || self.disk_busy(name) {
            return;
        }
        let allowed = self.allowed(name);
        let Some(reason) = should_start(&volume.staging, &burst, in_burst, &config, allowed, now)
        else {
            return;
        };
        let copy = !volume.staging.gate.off();
        let (action, reason) = match copy {
            true => (Action::Stage, reason),
            false => (
                Action::Wait,
                format!("{reason}; staging is switched off, so blocks are chosen and watched only"),
            ),
        };
        if let Some(volume) = self.volumes.get_mut(name) {
            // What was chosen before is judged by what was read so far.
            if volume.staging.judge_at.is_some() {
                out.push(Command::JudgeStaging {
                    volume: name.clone(),
                });
            }
            volume.staging.judge_at = Some(
                burst
                    .at
                    .saturating_add(config.scale.bin_nanos() * ONSET_BINS as i64),
            );
            volume.staging.running = copy;
            volume.staging.began = now;
            volume.staging.staged_for = Some(burst.at);
        }
        out.push(Command::RecordDecision(Decision {
            at: now,
            group: None,
            volume: name.clone(),
            action,
            window_start: Some(now),
            window_end: Some(burst.at),
            reason: reason.clone(),
        }));
        out.push(Command::StartStaging {
            volume: name.clone(),
            before: burst.at,
            budget_bytes: allowed.bytes,
            copy,
            reason,
        });
    }

    /// Whether another volume on the disks of `name` is being captured: copying beside it would slow both.
    fn disk_busy(&self, name: &VolumeName) -> bool {
        let own = std::slice::from_ref(name);
        let mut captured = self.captures.values().flat_map(|capture| &capture.volumes);
        captured.any(|volume| {
            let shares = |disk: &Name| self.disks.get(disk).is_some_and(|v| v.contains(volume));
            volume != name && self.disks_of(own).any(shares)
        })
    }

    pub(super) fn cancel_staging_in_burst(
        &mut self,
        name: &VolumeName,
        now: UnixNanos,
        out: &mut Vec<Command>,
    ) {
        let Some(volume) = self.volumes.get(name) else {
            return;
        };
        if !volume.staging.running || !self.in_burst(volume, now) {
            return;
        }
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.staging.running = false;
        }
        let reason = "staging is cancelled: the burst has begun".to_owned();
        out.push(not_staged(name, reason.clone(), now));
        out.push(Command::CancelStaging {
            volume: name.clone(),
            reason,
        });
    }

    pub(super) fn staging_finished(
        &mut self,
        name: &VolumeName,
        outcome: Result<u64, String>,
        now: UnixNanos,
        out: &mut Vec<Command>,
    ) {
        let bin = self.config.scale.bin_nanos();
        let Some(volume) = self.volumes.get_mut(name) else {
            return;
        };
        let state = &mut volume.staging;
        let was_running = std::mem::take(&mut state.running);
        match outcome {
            Ok(bytes) => {
                state.failures = 0;
                // Nothing copied says nothing, and neither does what was cut short by the burst.
                if bytes > 0 && was_running {
                    let took = now.saturating_sub(state.began).max(0);
                    state.takes = Some(state.takes.map_or(took, |before| took.max(before / 2)));
                }
            }
            Err(reason) => {
                state.failures = state.failures.saturating_add(1);
                state.staged_for = None;
                state.judge_at = None;
                let wait = bin.saturating_mul(1 << (state.failures - 1).min(8));
                state.not_before = Some(now.saturating_add(wait));
                out.push(Command::RecordDecision(Decision {
                    at: now,
                    group: None,
                    volume: name.clone(),
                    action: Action::Wait,
                    window_start: state.not_before,
                    window_end: None,
                    reason: format!("staging failed ({reason})"),
                }));
            }
        }
    }

    pub(super) fn event_received(&mut self, event: ExternalEvent, now: UnixNanos) {
        let Some(at) = event.burst_expected_at.filter(|at| *at > now) else {
            return;
        };
        let about = event.volumes;
        for (name, volume) in &mut self.volumes {
            if about.is_empty() || about.contains(name) {
                volume.announced.retain(|t| *t > now);
                // Announcements are few; the bound keeps a flood of them from growing the state.
                if volume.announced.len() < 64 {
                    volume.announced.push(at);
                }
            }
        }
    }

    pub(super) fn plan_training(&mut self, now: UnixNanos, out: &mut Vec<Command>) {
        let config = self.config;
        let Some(first) = self.training.first_bin else {
            return;
        };
        let enough = now.saturating_sub(first) >= nanos(config.train_after);
        let due = self
            .training
            .last
            .is_none_or(|at| now.saturating_sub(at) >= nanos(config.train_every));
        let quiet = self.captures.is_empty()
            && self
                .volumes
                .values()
                .all(|v| !v.staging.running && !self.in_burst(v, now));
        // Among many volumes one is always busy: what is long overdue no longer waits for quiet.
        let overdue = match self.training.last {
            Some(at) => now.saturating_sub(at) >= nanos(config.train_every * 2),
            None => now.saturating_sub(first) >= nanos(config.train_after * 2),
        };
        if self.training.running || !enough || !due || !(quiet || overdue) {
            return;
        }
        self.training.running = true;
        let reason = match self.training.last {
            None => "enough history for a first training",
            Some(_) => "the last training is a while ago, and all volumes are quiet",
        };
        out.push(Command::Train {
            reason: reason.to_owned(),
        });
    }
}

/// The record of a decision about staging by which nothing is copied.
fn not_staged(volume: &VolumeName, reason: String, at: UnixNanos) -> Command {
    Command::RecordDecision(Decision {
        at,
        group: None,
        volume: volume.clone(),
        action: Action::Wait,
        window_start: None,
        window_end: None,
        reason,
    })
}
