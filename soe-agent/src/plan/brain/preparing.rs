//! What is done ahead of time: staging, announced bursts, training.

use std::collections::BTreeSet;

use super::{Brain, Group};
use crate::model::VolumeName;
use crate::plan::staging::{next_burst, should_start};
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
            self.stage_if_due(&volume, now, out);
        }
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
        let Some(reason) = should_start(&volume.staging, &burst, in_burst, &config, now) else {
            return;
        };
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.staging.running = true;
            volume.staging.began = now;
            volume.staging.staged_for = Some(burst.at);
        }
        out.push(Command::RecordDecision(Decision {
            at: now,
            group: None,
            volume: name.clone(),
            action: Action::Stage,
            window_start: Some(now),
            window_end: Some(burst.at),
            reason: reason.clone(),
        }));
        out.push(Command::StartStaging {
            volume: name.clone(),
            before: burst.at,
            budget_bytes: config.staging.budget_bytes,
            reason,
        });
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
        out.push(Command::RecordDecision(Decision {
            at: now,
            group: None,
            volume: name.clone(),
            action: Action::Wait,
            window_start: None,
            window_end: None,
            reason: reason.clone(),
        }));
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
