//! The one owner of all decision state.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::capture::{GroupView, Intent, Waiting, lowest_bin, plan};
use super::staging::{StagingState, next_burst, should_start};
use super::types::{
    Action, CaptureHints, CaptureKind, Command, Decision, Event, ExternalEvent, GroupName,
    GroupSpec, PlannerConfig, nanos,
};
use super::window::Window;
use crate::model::burst::BurstDetector;
use crate::model::{Member, QuantileForecast, SHORT_HORIZON, VolumeName};
use crate::seam::UnixNanos;

/// What is predicted for a volume, as `soe group status` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Predicted {
    /// The load observed last, in bytes per second.
    pub load_now: Option<f64>,
    /// When the next burst is expected.
    pub next_burst_at: Option<UnixNanos>,
    /// The probability that a burst begins soon, 0 to 1.
    pub burst_probability: f64,
    /// The bin with the least expected load, start and end.
    pub next_low_window: Option<(UnixNanos, UnixNanos)>,
    /// Who made the forecast.
    pub model: Option<Member>,
}

struct Volume {
    detector: BurstDetector,
    /// When the load was last known, and how high it was in bytes per second.
    observed: Option<(UnixNanos, f64)>,
    forecast: Option<Arc<QuantileForecast>>,
    staging: StagingState,
    announced: Vec<UnixNanos>,
}

struct Group {
    spec: GroupSpec,
    created_at: UnixNanos,
    last_capture: Option<UnixNanos>,
    last_baseline: Option<UnixNanos>,
    differential_takes: Duration,
    baseline_takes: Duration,
    failures: u32,
    not_before: Option<UnixNanos>,
    /// What was last recorded about waiting, so that it is recorded once.
    waiting: Option<(Waiting, Option<UnixNanos>)>,
    window: Option<Window>,
}

struct Capture {
    volumes: Vec<VolumeName>,
    kind: CaptureKind,
    since: UnixNanos,
}

#[derive(Default)]
struct Training {
    running: bool,
    last: Option<UnixNanos>,
    first_bin: Option<UnixNanos>,
}

/// All decision state. See [`crate::plan`].
pub struct Brain {
    config: PlannerConfig,
    groups: BTreeMap<GroupName, Group>,
    volumes: BTreeMap<VolumeName, Volume>,
    captures: BTreeMap<GroupName, Capture>,
    training: Training,
}

impl Brain {
    /// A brain that knows nothing yet.
    pub fn new(config: PlannerConfig) -> Self {
        Self {
            config,
            groups: BTreeMap::new(),
            volumes: BTreeMap::new(),
            captures: BTreeMap::new(),
            training: Training::default(),
        }
    }

    /// Takes what happened, handled at `now`, and answers with what to do.
    pub fn apply(&mut self, event: Event, now: UnixNanos) -> Vec<Command> {
        let mut out = Vec::new();
        match event {
            Event::Tick => {
                self.plan_captures(now, &mut out);
                self.plan_staging(now, &mut out);
                self.plan_training(now, &mut out);
            }
            Event::WindowClosed {
                volume,
                start,
                load,
            } => self.window_closed(volume, start, load.map(|l| l.bytes()), now, &mut out),
            Event::LoadSampled {
                volume,
                bytes_per_second,
            } => {
                if bytes_per_second.is_finite() && bytes_per_second >= 0.0 {
                    self.volume(&volume).observed = Some((now, bytes_per_second));
                    self.cancel_staging_in_burst(&volume, now, &mut out);
                }
            }
            Event::ForecastReady { volume, forecast } => {
                self.volume(&volume).forecast = Some(forecast);
                self.plan_staging_of(&volume, now, &mut out);
            }
            Event::GroupCreated {
                spec,
                last_capture,
                last_baseline,
            } => self.group_created(spec, last_capture, last_baseline, now),
            Event::GroupUpdated { spec } => {
                for volume in &spec.volumes {
                    self.volume(volume);
                }
                if let Some(group) = self.groups.get_mut(&spec.name) {
                    group.spec = spec;
                    group.waiting = None;
                }
            }
            Event::GroupDeleted { group } => {
                self.groups.remove(&group);
            }
            Event::CaptureRequested { group, kind } => {
                self.capture_requested(&group, kind, now, &mut out);
            }
            Event::CaptureStarted { group } => {
                if let Some(capture) = self.captures.get_mut(&group) {
                    capture.since = now;
                }
            }
            Event::CaptureFinished {
                group,
                kind,
                cut_at,
            } => self.capture_finished(&group, kind, cut_at, now),
            Event::CaptureFailed { group, reason } => {
                self.capture_failed(&group, &reason, now, &mut out);
            }
            Event::StagingFinished { volume, outcome } => {
                self.staging_finished(&volume, outcome, now, &mut out);
            }
            Event::EventReceived(event) => self.event_received(event, now),
            Event::TrainingFinished { .. } => {
                self.training.running = false;
                self.training.last = Some(now);
            }
            Event::VolumeGone { volume } => {
                self.volumes.remove(&volume);
            }
        }
        out
    }

    /// What is predicted for `volume` at `now`; `None` if the volume is unknown.
    pub fn predicted(&self, volume: &VolumeName, now: UnixNanos) -> Option<Predicted> {
        let volume = self.volumes.get(volume)?;
        let forecast = volume.forecast.as_deref();
        let bin = self.config.scale.bin_nanos();
        Some(Predicted {
            load_now: volume.observed.map(|(_, load)| load),
            next_burst_at: next_burst(forecast, &volume.announced, &self.config, now).map(|b| b.at),
            burst_probability: forecast.map_or(0.0, QuantileForecast::burst_probability),
            next_low_window: forecast.and_then(|f| {
                let start = f.start_of(lowest_bin(f, now)?);
                Some((start, start + bin))
            }),
            model: forecast.map(|f| f.member),
        })
    }

    /// The window a group is waiting for; `None` if there is none.
    pub fn next_window(&self, group: &GroupName) -> Option<(UnixNanos, UnixNanos)> {
        let window = self.groups.get(group)?.window?;
        Some((window.start, window.end))
    }

    /// Whether a capture of the group is under way.
    pub fn capturing(&self, group: &GroupName) -> bool {
        self.captures.contains_key(group)
    }

    /// The cut of a group's newest layer.
    pub fn last_capture(&self, group: &GroupName) -> Option<UnixNanos> {
        self.groups.get(group)?.last_capture
    }

    fn volume(&mut self, name: &VolumeName) -> &mut Volume {
        let config = &self.config;
        self.volumes.entry(name.clone()).or_insert_with(|| Volume {
            detector: BurstDetector::new(config.scale, config.burst),
            observed: None,
            forecast: None,
            staging: StagingState::default(),
            announced: Vec::new(),
        })
    }

    fn window_closed(
        &mut self,
        volume: VolumeName,
        start: UnixNanos,
        bytes: Option<f64>,
        now: UnixNanos,
        out: &mut Vec<Command>,
    ) {
        let load = bytes
            .map(|b| b / self.config.scale.bin().as_secs_f64())
            .filter(|l| l.is_finite() && *l >= 0.0);
        let horizon = self.horizon();
        let end = start.saturating_add(self.config.scale.bin_nanos());
        self.training.first_bin.get_or_insert(start);
        let state = self.volume(&volume);
        state.detector.push(load);
        if let Some(load) = load
            && state.observed.is_none_or(|(at, _)| at <= end)
        {
            state.observed = Some((end, load));
        }
        self.cancel_staging_in_burst(&volume, now, out);
        out.push(Command::Forecast { volume, horizon });
    }

    /// Bins ahead that decisions need: to the longest RPO, at most a season and a little.
    fn horizon(&self) -> usize {
        let bin = self.config.scale.bin().as_secs_f64();
        let longest = self
            .groups
            .values()
            .filter(|g| g.spec.prediction_enabled)
            .map(|g| (g.spec.rpo + g.baseline_takes).as_secs_f64() / bin)
            .fold(0.0, f64::max);
        // The cast saturates; the bound makes it small.
        (longest.ceil() as usize + 2).clamp(
            SHORT_HORIZON,
            self.config.scale.season_bins() + SHORT_HORIZON,
        )
    }

    fn group_created(
        &mut self,
        spec: GroupSpec,
        last_capture: Option<UnixNanos>,
        last_baseline: Option<UnixNanos>,
        now: UnixNanos,
    ) {
        for volume in &spec.volumes {
            self.volume(volume);
        }
        let group = Group {
            created_at: now,
            // A cut in the future would silence the group: the clock has stepped back since.
            last_capture: last_capture.map(|at| at.min(now)),
            last_baseline: last_baseline.map(|at| at.min(now)),
            differential_takes: self.config.capture_duration,
            baseline_takes: self.config.capture_duration * 4,
            failures: 0,
            not_before: None,
            waiting: None,
            window: None,
            spec,
        };
        self.groups.insert(group.spec.name.clone(), group);
    }

    fn capture_requested(
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
    fn busy(&self, name: &GroupName) -> Option<String> {
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

    fn plan_captures(&mut self, now: UnixNanos, out: &mut Vec<Command>) {
        let mut names: Vec<GroupName> = self.groups.keys().cloned().collect();
        // Where groups compete for a volume, the more critical one comes first.
        names.sort_by_key(|n| {
            self.groups
                .get(n)
                .map(|g| std::cmp::Reverse(g.spec.criticality))
        });
        for name in names {
            if self.busy(&name).is_some() {
                continue;
            }
            let Some(group) = self.groups.get(&name) else {
                continue;
            };
            if group.spec.volumes.is_empty() || group.not_before.is_some_and(|at| now < at) {
                continue;
            }
            let intent = plan(&self.view(group, now), &self.config, now);
            match intent {
                Intent::Capture {
                    kind,
                    urgent,
                    until,
                    reason,
                } => self.start_capture(&name, kind, urgent, until, reason, now, out),
                Intent::Wait {
                    waiting,
                    window,
                    reason,
                } => self.wait(&name, waiting, window, &reason, now, out),
            }
        }
    }

    fn view<'a>(&'a self, group: &'a Group, now: UnixNanos) -> GroupView<'a> {
        let volumes: Vec<(&VolumeName, &Volume)> = group
            .spec
            .volumes
            .iter()
            .filter_map(|name| self.volumes.get_key_value(name))
            .collect();
        let all = volumes.len() == group.spec.volumes.len();
        let forecasts: Option<Vec<&QuantileForecast>> =
            volumes.iter().map(|(_, v)| v.forecast.as_deref()).collect();
        let observed = volumes
            .iter()
            .map(|(_, v)| self.fresh(v, now))
            .sum::<Option<f64>>();
        GroupView {
            spec: &group.spec,
            created_at: group.created_at,
            last_capture: group.last_capture,
            last_baseline: group.last_baseline,
            differential_takes: group.differential_takes,
            baseline_takes: group.baseline_takes,
            forecasts: forecasts.filter(|_| all).unwrap_or_default(),
            observed: observed.filter(|_| all),
            median: volumes.iter().map(|(_, v)| v.detector.median()).sum(),
            burst_on: volumes
                .iter()
                .find(|(_, v)| self.in_burst(v, now))
                .map(|(name, _)| *name),
        }
    }

    /// The observed load, unless it is too old to mean anything.
    fn fresh(&self, volume: &Volume, now: UnixNanos) -> Option<f64> {
        let (at, load) = volume.observed?;
        (now.saturating_sub(at) <= 2 * self.config.scale.bin_nanos()).then_some(load)
    }

    fn in_burst(&self, volume: &Volume, now: UnixNanos) -> bool {
        match self.fresh(volume, now) {
            Some(load) => load > volume.detector.threshold(),
            None => volume.detector.in_burst(),
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "each is a part of the decision's record"
    )]
    fn start_capture(
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
        let capture = Capture {
            volumes: group.spec.volumes.clone(),
            kind,
            since: now,
        };
        self.captures.insert(name.clone(), capture);
    }

    fn wait(
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

    fn capture_finished(
        &mut self,
        name: &GroupName,
        kind: CaptureKind,
        cut_at: UnixNanos,
        now: UnixNanos,
    ) {
        let capture = self.captures.remove(name);
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
        }
    }

    fn capture_failed(
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

    fn staged_volumes(&self) -> BTreeSet<VolumeName> {
        self.groups
            .values()
            .filter(|g| g.spec.prediction_enabled)
            .flat_map(|g| g.spec.volumes.iter().cloned())
            .collect()
    }

    fn plan_staging(&mut self, now: UnixNanos, out: &mut Vec<Command>) {
        for volume in self.staged_volumes() {
            self.stage_if_due(&volume, now, out);
        }
    }

    fn plan_staging_of(&mut self, volume: &VolumeName, now: UnixNanos, out: &mut Vec<Command>) {
        let predicted = |g: &Group| g.spec.prediction_enabled && g.spec.volumes.contains(volume);
        if self.groups.values().any(predicted) {
            self.stage_if_due(volume, now, out);
        }
    }

    fn stage_if_due(&mut self, name: &VolumeName, now: UnixNanos, out: &mut Vec<Command>) {
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

    fn cancel_staging_in_burst(
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

    fn staging_finished(
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
        state.running = false;
        match outcome {
            Ok(_) => state.failures = 0,
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

    fn event_received(&mut self, event: ExternalEvent, now: UnixNanos) {
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

    fn plan_training(&mut self, now: UnixNanos, out: &mut Vec<Command>) {
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
