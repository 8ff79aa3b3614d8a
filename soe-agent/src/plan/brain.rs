//! The one owner of all decision state.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::capture::{Waiting, lowest_bin};
use super::staging::{PrecisionGate, StagingState, next_burst};
use super::types::{CaptureKind, Command, Event, GroupName, GroupSpec, PlannerConfig};
use super::window::Window;
use crate::model::burst::BurstDetector;
use crate::model::name::Name;
use crate::model::{Judgement, Member, QuantileForecast, SHORT_HORIZON, VolumeName};
use crate::seam::UnixNanos;

mod captures;
mod preparing;

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
    /// Bytes that the next differential would hold.
    changed: Option<u64>,
    /// The physical disks that it lies on.
    disks: Vec<Name>,
}

struct Group {
    spec: GroupSpec,
    created_at: UnixNanos,
    last_capture: Option<UnixNanos>,
    last_baseline: Option<UnixNanos>,
    differential_takes: Duration,
    baseline_takes: Duration,
    /// How fast differentials were captured of late, in bytes per second.
    rate: Option<f64>,
    failures: u32,
    not_before: Option<UnixNanos>,
    /// What was last recorded about waiting, so that it is recorded once.
    waiting: Option<(Waiting, Option<UnixNanos>)>,
    window: Option<Window>,
    /// For which moment it was asked whether to begin, and the answer.
    judged: Option<(Moment, Option<Judgement>)>,
}

/// What an answer depends on: the newest bin of all volumes, and the bin of now.
type Moment = (UnixNanos, i64);

struct Capture {
    volumes: Vec<VolumeName>,
    kind: CaptureKind,
    since: UnixNanos,
    /// Bytes that were known to have changed when it began.
    changed: Option<u64>,
}

#[derive(Default)]
struct Training {
    running: bool,
    last: Option<UnixNanos>,
    first_bin: Option<UnixNanos>,
}

/// Volumes of a disk whose load is looked at.
const MOST_NEIGHBOURS: usize = 16;

/// All decision state. See [`crate::plan`].
pub struct Brain {
    config: PlannerConfig,
    groups: BTreeMap<GroupName, Group>,
    volumes: BTreeMap<VolumeName, Volume>,
    captures: BTreeMap<GroupName, Capture>,
    /// The volumes on each physical disk.
    disks: BTreeMap<Name, BTreeSet<VolumeName>>,
    /// Of each disk the volumes that usually carry the most load, as of the bin in [`Brain::busiest_of`].
    busiest: BTreeMap<Name, Vec<VolumeName>>,
    busiest_of: Option<i64>,
    /// What each volume that may be staged weighs where the budget is shared.
    weights: BTreeMap<VolumeName, f64>,
    training: Training,
    last_now: UnixNanos,
}

impl Brain {
    /// A brain that knows nothing yet.
    pub fn new(config: PlannerConfig) -> Self {
        Self {
            config,
            groups: BTreeMap::new(),
            volumes: BTreeMap::new(),
            captures: BTreeMap::new(),
            disks: BTreeMap::new(),
            busiest: BTreeMap::new(),
            busiest_of: None,
            weights: BTreeMap::new(),
            training: Training::default(),
            last_now: UnixNanos::MIN,
        }
    }

    /// Takes what happened, handled at `now`, and answers with what to do.
    pub fn apply(&mut self, event: Event, now: UnixNanos) -> Vec<Command> {
        let mut out = Vec::new();
        if now < self.last_now {
            self.clock_went_back(now);
        }
        self.last_now = now;
        match event {
            Event::Tick => {
                self.find_busiest(now);
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
            Event::ChangesCounted { volume, bytes } => {
                if let Some(volume) = self.volumes.get_mut(&volume) {
                    volume.changed = Some(bytes);
                }
            }
            Event::Judged { group, begin } => {
                if let Some((_, answer)) =
                    self.groups.get_mut(&group).and_then(|g| g.judged.as_mut())
                {
                    *answer = begin;
                    self.plan_capture(&group, now, &mut out);
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
                    group.judged = None;
                }
                self.weigh();
            }
            Event::GroupDeleted { group } => {
                self.groups.remove(&group);
                self.weigh();
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
            Event::StagingJudged {
                volume,
                chosen,
                used,
            } => self.staging_judged(&volume, chosen, used, now, &mut out),
            Event::VolumePlaced { volume, disks } => self.place(volume, disks),
            Event::EventReceived(event) => self.event_received(event, now),
            Event::TrainingFinished { .. } => {
                self.training.running = false;
                self.training.last = Some(now);
            }
            Event::Reconfigured { config } => {
                self.config = PlannerConfig {
                    scale: self.config.scale,
                    burst: self.config.burst,
                    ..*config
                };
            }
            Event::VolumeGone { volume } => {
                self.place(volume.clone(), Vec::new());
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

    /// Whether a volume is in a burst at `now`.
    pub fn bursting(&self, volume: &VolumeName, now: UnixNanos) -> bool {
        self.volumes
            .get(volume)
            .is_some_and(|volume| self.in_burst(volume, now))
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
            changed: None,
            disks: Vec::new(),
        })
    }

    fn place(&mut self, name: VolumeName, disks: Vec<Name>) {
        let before = std::mem::take(&mut self.volume(&name).disks);
        for disk in before {
            if let Some(volumes) = self.disks.get_mut(&disk) {
                volumes.remove(&name);
            }
        }
        self.disks.retain(|_, volumes| !volumes.is_empty());
        for disk in &disks {
            let volumes = self.disks.entry(disk.clone()).or_default();
            volumes.insert(name.clone());
        }
        self.volume(&name).disks = disks;
        self.busiest_of = None;
    }

    /// Finds the busiest volumes of each disk, once a bin: a disk may hold a thousand of them, and the load
    /// of the rest hardly matters.
    fn find_busiest(&mut self, now: UnixNanos) {
        let bin = self.config.scale.index_of(now);
        if self.busiest_of == Some(bin) {
            return;
        }
        self.busiest_of = Some(bin);
        let load = |name: &VolumeName| {
            let volume = self.volumes.get(name);
            volume.map_or(0.0, |volume| volume.detector.median())
        };
        let several = self.disks.iter().filter(|(_, volumes)| volumes.len() > 1);
        self.busiest = several
            .map(|(disk, volumes)| {
                let mut loads: Vec<(f64, &VolumeName)> =
                    volumes.iter().map(|name| (load(name), name)).collect();
                loads.sort_by(|a, b| b.0.total_cmp(&a.0));
                loads.truncate(MOST_NEIGHBOURS);
                let names = loads.into_iter().map(|(_, name)| name.clone());
                (disk.clone(), names.collect())
            })
            .collect();
    }

    fn weigh(&mut self) {
        self.weights.clear();
        for group in self.groups.values().filter(|g| g.spec.prediction_enabled) {
            for volume in &group.spec.volumes {
                let weight = self.weights.entry(volume.clone()).or_default();
                *weight = weight.max(group.spec.criticality.weight());
            }
        }
    }

    fn disks_of<'a>(&'a self, volumes: &'a [VolumeName]) -> impl Iterator<Item = &'a Name> {
        volumes
            .iter()
            .filter_map(|name| self.volumes.get(name))
            .flat_map(|volume| &volume.disks)
    }

    /// Volumes beside these on the same physical disks, the busiest of them.
    fn neighbours(&self, volumes: &[VolumeName]) -> BTreeSet<&VolumeName> {
        self.disks_of(volumes)
            .filter_map(|disk| self.busiest.get(disk))
            .flatten()
            .filter(|name| !volumes.contains(name))
            .collect()
    }

    /// Whether staging pays for a volume; `None` if the volume is unknown.
    pub fn staging_gate(&self, volume: &VolumeName) -> Option<PrecisionGate> {
        Some(self.volumes.get(volume)?.staging.gate)
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

    /// Whatever seems to lie in the future now would silence the planner until then.
    fn clock_went_back(&mut self, now: UnixNanos) {
        for group in self.groups.values_mut() {
            group.created_at = group.created_at.min(now);
            group.last_capture = group.last_capture.map(|at| at.min(now));
            group.last_baseline = group.last_baseline.map(|at| at.min(now));
            group.not_before = None;
            group.waiting = None;
            group.judged = None;
        }
        for volume in self.volumes.values_mut() {
            volume.observed = volume.observed.filter(|(at, _)| *at <= now);
            volume.forecast = volume.forecast.take().filter(|f| f.issued_at <= now);
            volume.staging.staged_for = None;
            volume.staging.not_before = None;
            volume.staging.judge_at = None;
        }
        for capture in self.captures.values_mut() {
            capture.since = capture.since.min(now);
        }
        self.training.last = self.training.last.map(|at| at.min(now));
        self.training.first_bin = self.training.first_bin.map(|at| at.min(now));
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
            rate: None,
            failures: 0,
            not_before: None,
            waiting: None,
            window: None,
            judged: None,
            spec,
        };
        self.groups.insert(group.spec.name.clone(), group);
        self.weigh();
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
}

#[cfg(test)]
mod tests;
