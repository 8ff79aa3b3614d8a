//! Captures: which groups now, and what became of the ones before.

use std::time::Duration;

use super::{Brain, Capture, Group, Volume};
use crate::model::{QuantileForecast, VolumeName};
use crate::plan::capture::{GroupView, Intent, Span, Waiting, plan};
use crate::plan::types::{Action, CaptureHints, CaptureKind, Command, Decision, GroupName, nanos};
use crate::plan::window::Window;
use crate::seam::UnixNanos;

/// What a capture of fewer bytes takes says nothing about its rate.
const LEAST_CHANGED: u64 = 16 << 20;

impl Brain {
    pub(super) fn capture_requested(
        &mut self,
        name: &GroupName,
        kind: Option<CaptureKind>,
        now: UnixNanos,
        out: &mut Vec<Command>,
    ) {
        let refusal = if !self.groups.contains_key(name) {
            Some(format!("there is no group {name}"))
        } else {
            self.busy(name)
        };
        if let Some(reason) = refusal {
            out.push(Command::RefuseCapture {
                group: name.clone(),
                reason,
            });
            return;
        }
        let Some(group) = self.groups.get(name) else {
            return;
        };
        let kind = match kind {
            Some(kind) => kind,
            None if group.last_baseline.is_none() => CaptureKind::Baseline,
            None => CaptureKind::Differential,
        };
        let takes = match kind {
            CaptureKind::Baseline => group.baseline_takes,
            CaptureKind::Differential => group.differential_takes,
        };
        let until = now.saturating_add(nanos(takes));
        self.start_capture(
            name,
            kind,
            false,
            until,
            "a user asked for it".to_owned(),
            now,
            out,
        );
    }

    /// Why the group cannot be captured now, if it cannot: one of its volumes is being captured.
    pub(super) fn busy(&self, name: &GroupName) -> Option<String> {
        if self.captures.contains_key(name) {
            return Some(format!("group {name} is being captured already"));
        }
        let group = self.groups.get(name)?;
        self.captures.iter().find_map(|(other, capture)| {
            let shared = capture
                .volumes
                .iter()
                .find(|v| group.spec.volumes.contains(v))?;
            Some(format!("{shared} is being captured for group {other}"))
        })
    }

    pub(super) fn plan_captures(&mut self, now: UnixNanos, out: &mut Vec<Command>) {
        let mut names: Vec<GroupName> = self.groups.keys().cloned().collect();
        // Where groups compete for a volume, the more critical one comes first.
        names.sort_by_key(|n| {
            self.groups
                .get(n)
                .map(|g| std::cmp::Reverse(g.spec.criticality))
        });
        for name in names {
            if !self.ask(&name, now, out) {
                self.plan_capture(&name, now, out);
            }
        }
    }

    /// Asks whether to begin, if that is to be judged and was not yet at this moment; the answer plans.
    fn ask(&mut self, name: &GroupName, now: UnixNanos, out: &mut Vec<Command>) -> bool {
        let Some(group) = self.groups.get(name).filter(|_| self.busy(name).is_none()) else {
            return false;
        };
        let view = self.view(group, now);
        let newest = view.forecasts.iter().map(|f| f.issued_at).min();
        let (Some(newest), Some(pace)) = (newest, view.pace(&self.config, now)) else {
            return false;
        };
        let moment = (newest, self.config.scale.index_of(now));
        if group.judged.is_some_and(|(asked, _)| asked == moment) {
            return false;
        }
        let neighbours = self.neighbours(&group.spec.volumes);
        out.push(Command::Judge {
            group: name.clone(),
            volumes: group.spec.volumes.clone(),
            neighbours: neighbours.into_iter().cloned().collect(),
            pace,
        });
        if let Some(group) = self.groups.get_mut(name) {
            group.judged = Some((moment, None));
        }
        true
    }

    pub(super) fn plan_capture(
        &mut self,
        name: &GroupName,
        now: UnixNanos,
        out: &mut Vec<Command>,
    ) {
        let Some(group) = self.groups.get(name).filter(|_| self.busy(name).is_none()) else {
            return;
        };
        if group.spec.volumes.is_empty() || group.not_before.is_some_and(|at| now < at) {
            return;
        }
        let intent = plan(&self.view(group, now), &self.config, now);
        match intent {
            // Two at once on a disk would only slow each other, and everyone else. (Captures take turns on the
            // whole host.)
            Intent::Capture { urgent: false, .. }
                if let Some(beside) = self.staged_beside(&group.spec.volumes) =>
            {
                let left = self.view(group, now).schedule(&self.config).latest - now;
                let left = Span(left);
                let reason = format!("{beside} on the same disk is being staged; {left} left");
                self.wait(name, Waiting::Neighbour, None, &reason, now, out);
            }
            Intent::Capture {
                kind,
                urgent,
                until,
                reason,
            } => self.start_capture(name, kind, urgent, until, reason, now, out),
            Intent::Wait {
                waiting,
                window,
                reason,
            } => self.wait(name, waiting, window, &reason, now, out),
        }
    }

    /// The volume on a disk of these that is being staged, if there is one.
    fn staged_beside(&self, volumes: &[VolumeName]) -> Option<&VolumeName> {
        let staged = self.volumes.iter().filter(|(_, v)| v.staging.running);
        let mut staged = staged.filter(|(name, _)| !volumes.contains(name));
        staged.find_map(|(name, volume)| {
            let shared = self
                .disks_of(volumes)
                .any(|disk| volume.disks.contains(disk));
            shared.then_some(name)
        })
    }

    pub(super) fn view<'a>(&'a self, group: &'a Group, now: UnixNanos) -> GroupView<'a> {
        let volumes: Vec<(&VolumeName, &Volume)> = group
            .spec
            .volumes
            .iter()
            .filter_map(|name| self.volumes.get_key_value(name))
            .collect();
        let all = volumes.len() == group.spec.volumes.len();
        let forecasts: Option<Vec<&QuantileForecast>> =
            volumes.iter().map(|(_, v)| v.forecast.as_deref()).collect();
        let bin = self.config.scale.bin_nanos();
        let neighbours: Vec<&Volume> = self
            .neighbours(&group.spec.volumes)
            .into_iter()
            .filter_map(|name| self.volumes.get(name))
            .filter(|v| {
                let fresh = |f: &QuantileForecast| now.saturating_sub(f.issued_at) <= 2 * bin;
                v.forecast.as_deref().is_some_and(fresh)
            })
            .collect();
        let observed = volumes
            .iter()
            .map(|(_, v)| self.fresh(v, now))
            .sum::<Option<f64>>()
            .map(|own| {
                own + neighbours
                    .iter()
                    .filter_map(|v| self.fresh(v, now))
                    .sum::<f64>()
            });
        let medians = volumes
            .iter()
            .map(|(_, v)| *v)
            .chain(neighbours.iter().copied());
        let median = medians.map(|v| v.detector.median()).sum();
        let expected = self
            .changed(&group.spec.volumes)
            .zip(group.rate)
            .map(|(bytes, rate)| bytes as f64 / rate)
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            .unwrap_or_default();
        GroupView {
            spec: &group.spec,
            created_at: group.created_at,
            last_capture: group.last_capture,
            last_baseline: group.last_baseline,
            differential_takes: group.differential_takes.max(expected),
            baseline_takes: group.baseline_takes,
            forecasts: forecasts.filter(|_| all).unwrap_or_default(),
            observed: observed.filter(|_| all),
            median,
            neighbours: neighbours
                .iter()
                .filter_map(|v| v.forecast.as_deref())
                .collect(),
            burst_on: volumes
                .iter()
                .find(|(_, v)| self.in_burst(v, now))
                .map(|(name, _)| *name),
            begin: group.judged.and_then(|(_, begin)| begin),
        }
    }

    /// Bytes that the next differential of these volumes would hold, as far as they were counted.
    fn changed(&self, volumes: &[VolumeName]) -> Option<u64> {
        volumes
            .iter()
            .map(|name| self.volumes.get(name)?.changed)
            .sum()
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "each is a part of the decision's record"
    )]
    pub(super) fn start_capture(
        &mut self,
        name: &GroupName,
        kind: CaptureKind,
        urgent: bool,
        until: UnixNanos,
        reason: String,
        now: UnixNanos,
        out: &mut Vec<Command>,
    ) {
        let Some(group) = self.groups.get_mut(name) else {
            return;
        };
        group.waiting = None;
        group.window = None;
        group.judged = None;
        for volume in &group.spec.volumes {
            out.push(Command::RecordDecision(Decision {
                at: now,
                group: Some(name.clone()),
                volume: volume.clone(),
                action: Action::Capture,
                window_start: Some(now),
                window_end: Some(until),
                reason: reason.clone(),
            }));
        }
        out.push(Command::StartCapture {
            group: name.clone(),
            kind,
            hints: CaptureHints {
                max_pause: group.spec.max_pause,
                p99_target: group.spec.p99_target,
                urgent,
            },
            reason,
        });
        let volumes = group.spec.volumes.clone();
        let capture = Capture {
            changed: self.changed(&volumes),
            volumes,
            kind,
            since: now,
        };
        self.captures.insert(name.clone(), capture);
    }

    pub(super) fn wait(
        &mut self,
        name: &GroupName,
        waiting: Waiting,
        window: Option<Window>,
        reason: &str,
        now: UnixNanos,
        out: &mut Vec<Command>,
    ) {
        let Some(group) = self.groups.get_mut(name) else {
            return;
        };
        group.window = window;
        // Within one bin the start of a window only moves with the clock.
        let bin = window.map(|w| self.config.scale.index_of(w.start));
        if group.waiting == Some((waiting, bin)) {
            return;
        }
        group.waiting = Some((waiting, bin));
        for volume in &group.spec.volumes {
            out.push(Command::RecordDecision(Decision {
                at: now,
                group: Some(name.clone()),
                volume: volume.clone(),
                action: Action::Wait,
                window_start: window.map(|w| w.start),
                window_end: window.map(|w| w.end),
                reason: reason.to_owned(),
            }));
        }
    }

    pub(super) fn capture_finished(
        &mut self,
        name: &GroupName,
        kind: CaptureKind,
        cut_at: UnixNanos,
        now: UnixNanos,
    ) {
        let capture = self.captures.remove(name);
        for volume in capture.iter().flat_map(|c| &c.volumes) {
            if let Some(volume) = self.volumes.get_mut(volume) {
                // Until it is counted again.
                volume.changed = None;
            }
        }
        let Some(group) = self.groups.get_mut(name) else {
            return;
        };
        let cut_at = cut_at.min(now);
        group.failures = 0;
        group.not_before = None;
        group.last_capture = Some(cut_at);
        if kind == CaptureKind::Baseline {
            group.last_baseline = Some(cut_at);
        }
        // A differential that had to become a baseline says nothing about how long one takes.
        if let Some(capture) = capture.filter(|c| c.kind == kind) {
            let took = Duration::from_nanos(u64::try_from(now - capture.since).unwrap_or(0));
            let known = match kind {
                CaptureKind::Baseline => &mut group.baseline_takes,
                CaptureKind::Differential => &mut group.differential_takes,
            };
            *known = (*known * 7 + took * 3) / 10;
            let bytes = capture.changed.filter(|b| *b >= LEAST_CHANGED);
            if let (CaptureKind::Differential, Some(bytes)) = (kind, bytes) {
                let rate = bytes as f64 / took.as_secs_f64().max(1e-3);
                group.rate = Some(group.rate.map_or(rate, |before| 0.7 * before + 0.3 * rate));
            }
        }
    }

    pub(super) fn capture_failed(
        &mut self,
        name: &GroupName,
        reason: &str,
        now: UnixNanos,
        out: &mut Vec<Command>,
    ) {
        self.captures.remove(name);
        let Some(group) = self.groups.get_mut(name) else {
            return;
        };
        group.failures = group.failures.saturating_add(1);
        let longest = (group.spec.rpo / 8).max(self.config.backoff);
        let wait = self
            .config
            .backoff
            .saturating_mul(1 << (group.failures - 1).min(16))
            .min(longest);
        group.not_before = Some(now.saturating_add(nanos(wait)));
        for volume in &group.spec.volumes {
            out.push(Command::RecordDecision(Decision {
                at: now,
                group: Some(name.clone()),
                volume: volume.clone(),
                action: Action::Wait,
                window_start: group.not_before,
                window_end: None,
                reason: format!(
                    "capture failed ({reason}); trying again after {:.1} s",
                    wait.as_secs_f64()
                ),
            }));
        }
    }
}
