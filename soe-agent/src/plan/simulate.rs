//! The same brain under virtual time, over a recorded history.
//!
//! Bins are handed over when they end, decisions use what lies before them, and only the summary,
//! which judges, looks at what happened afterwards.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use super::brain::Brain;
use super::staged::{StagedRow, StagedSet};
use super::summary::{CaptureRecord, Summary, Truth, judge};
use super::types::{
    CaptureKind, Command, Decision, Event, ExternalEvent, GroupName, GroupSpec, PlannerConfig,
    nanos,
};
use crate::model::dataset::Dataset;
use crate::model::weights::ModelError;
use crate::model::{Forecaster, LoadBin, Promotion, QuantileForecast, Trained, VolumeName};
use crate::seam::{ByteRange, UnixNanos};
use crate::stage::heat::BurstHeatConfig;
use crate::stage::score::Access;

/// Seasons before the judged time in which forecasts are made for the forecaster's own evidence.
const WARM_UP_SEASONS: i64 = 10;

/// The bins of one volume.
#[derive(Clone, Debug, PartialEq)]
pub struct VolumeHistory {
    /// The volume.
    pub name: VolumeName,
    /// When the first bin starts; a multiple of the bin.
    pub start: UnixNanos,
    /// The bins in order; `None` for a missing one.
    pub bins: Vec<Option<LoadBin>>,
}

/// One recorded IO.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceAccess {
    /// When.
    pub at: UnixNanos,
    /// The volume.
    pub volume: VolumeName,
    /// Whether it read or wrote.
    pub access: Access,
    /// Where.
    pub range: ByteRange,
}

/// What is simulated over.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// The volumes.
    pub volumes: Vec<VolumeHistory>,
    /// Recorded IO, if there is any, ascending by time.
    pub accesses: Vec<TraceAccess>,
    /// Events from outside with the time they arrived, ascending.
    pub events: Vec<(UnixNanos, ExternalEvent)>,
}

/// How to simulate.
#[derive(Clone, Debug)]
pub struct SimulationConfig {
    /// The brain's settings.
    pub planner: PlannerConfig,
    /// The groups, created when the history begins.
    pub groups: Vec<GroupSpec>,
    /// How fast a capture copies, in bytes per second.
    pub capture_rate: f64,
    /// The shortest time a capture takes.
    pub capture_min: Duration,
    /// How blocks are remembered and scored for staging.
    pub heat: BurstHeatConfig,
    /// Forecasts are given to the sink every so many bins.
    pub record_every: usize,
    /// Only captures from here on are judged.
    pub judge_from: Option<UnixNanos>,
}

impl SimulationConfig {
    /// The defaults for a planner and groups.
    pub fn new(planner: PlannerConfig, groups: Vec<GroupSpec>) -> Self {
        Self {
            planner,
            groups,
            capture_rate: 64.0 * 1024.0 * 1024.0,
            capture_min: Duration::from_secs(1),
            heat: BurstHeatConfig::default(),
            record_every: 1,
            judge_from: None,
        }
    }
}

/// Takes the raw outputs as they arise.
pub trait Sink {
    /// A forecast was issued.
    fn forecast(&mut self, volume: &VolumeName, forecast: &QuantileForecast);
    /// A decision was made.
    fn decision(&mut self, decision: &Decision);
    /// A range was staged; given when it is evicted, or at the end.
    fn staged(&mut self, row: &StagedRow);
}

/// Trains on what is known; a step budget keeps the simulation deterministic.
pub type Trainer<'a> = dyn Fn(&Dataset) -> Result<Trained, ModelError> + 'a;

/// Runs the brain over `history` and judges what it did.
pub fn simulate(
    history: &History,
    config: &SimulationConfig,
    forecaster: &mut dyn Forecaster,
    trainer: Option<&Trainer<'_>>,
    sink: &mut dyn Sink,
) -> Summary {
    let scale = config.planner.scale;
    let mut run = Run {
        history,
        config,
        brain: Brain::new(config.planner),
        forecaster,
        trainer,
        sink,
        due: BinaryHeap::new(),
        sequence: 0,
        staged: StagedSet::new(config.heat),
        bursting: BTreeMap::new(),
        next_access: 0,
        captures: BTreeMap::new(),
        written: history
            .volumes
            .iter()
            .map(|v| (v.name.clone(), Vec::new()))
            .collect(),
        counts: Counts::default(),
    };
    let first = history
        .volumes
        .iter()
        .map(|v| scale.index_of(v.start))
        .min();
    let end = history
        .volumes
        .iter()
        .map(|v| scale.index_of(v.start) + v.bins.len() as i64)
        .max();
    if let (Some(first), Some(end)) = (first, end) {
        run.whole(first, end);
    }
    let Run {
        captures,
        counts,
        staged,
        ..
    } = run;
    let truth = Truth::new(history, scale, config.planner.burst);
    let mut summary = judge(&truth, config, &captures);
    summary.forecasts = counts.forecasts;
    summary.decisions = counts.decisions;
    summary.refused_bins = counts.refused_bins;
    summary.trainings = counts.trainings;
    summary.promotions = counts.promotions;
    summary.stagings = counts.stagings;
    summary.staging = staged.statistics();
    summary
}

#[derive(Default)]
struct Counts {
    forecasts: u64,
    decisions: u64,
    refused_bins: u64,
    trainings: u64,
    promotions: u64,
    stagings: u64,
}

struct Run<'a> {
    history: &'a History,
    config: &'a SimulationConfig,
    brain: Brain,
    forecaster: &'a mut dyn Forecaster,
    trainer: Option<&'a Trainer<'a>>,
    sink: &'a mut dyn Sink,
    /// What will be reported to the brain, by time and order.
    due: BinaryHeap<Reverse<(UnixNanos, u64, Due)>>,
    sequence: u64,
    staged: StagedSet,
    /// Whether each volume is in a burst.
    bursting: BTreeMap<&'a VolumeName, bool>,
    next_access: usize,
    captures: BTreeMap<GroupName, Vec<CaptureRecord>>,
    /// Bytes written since the beginning, after each bin.
    written: BTreeMap<VolumeName, Vec<(UnixNanos, f64)>>,
    counts: Counts,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Captured(GroupName, bool, UnixNanos),
    Staged(VolumeName, u64),
}

impl Run<'_> {
    fn whole(&mut self, first: i64, end: i64) {
        let scale = self.config.planner.scale;
        let tick = nanos(self.config.planner.tick).max(1);
        let mut next_event = 0;
        let start = scale.start_of(first);
        for spec in &self.config.groups {
            let created = Event::GroupCreated {
                spec: spec.clone(),
                last_capture: None,
                last_baseline: None,
            };
            self.apply(created, start);
        }
        for index in first..=end {
            let now = scale.start_of(index);
            self.heat_until(now);
            self.report_due(now);
            if index > first {
                self.close_bins(index - 1, now);
            }
            if index == end {
                break;
            }
            let mut at = now;
            while at < scale.start_of(index + 1) {
                while let Some((_, event)) = self
                    .history
                    .events
                    .get(next_event)
                    .filter(|(arrived, _)| *arrived <= at)
                {
                    next_event += 1;
                    self.happening(event);
                    self.apply(Event::EventReceived(event.clone()), at);
                }
                self.report_due(at);
                self.apply(Event::Tick, at);
                at += tick;
            }
        }
        self.staged.finish(&mut *self.sink);
    }

    /// Hands over bin `index` of every volume at its end.
    fn close_bins(&mut self, index: i64, now: UnixNanos) {
        let scale = self.config.planner.scale;
        let history = self.history;
        for volume in &history.volumes {
            let Some(load) = usize::try_from(index - scale.index_of(volume.start))
                .ok()
                .and_then(|i| volume.bins.get(i).copied())
            else {
                continue;
            };
            let start = scale.start_of(index);
            // A value that is no load is refused by the forecaster and unknown to the brain.
            let load = match self.forecaster.observe(&volume.name, start, load) {
                Ok(()) => load,
                Err(_) => {
                    self.counts.refused_bins += 1;
                    None
                }
            };
            if let Some(written) = self.written.get_mut(&volume.name) {
                let before = written.last().map_or(0.0, |(_, b)| *b);
                written.push((now, before + load.map_or(0.0, |l| l.write_bytes)));
            }
            let event = Event::WindowClosed {
                volume: volume.name.clone(),
                start,
                load,
            };
            self.apply(event, now);
            let bursting = self.brain.bursting(&volume.name, now);
            if self.bursting.insert(&volume.name, bursting) != Some(bursting) {
                self.heat_until(now);
                self.staged.burst(&volume.name, now, bursting);
            }
            let bytes = self.changed(&volume.name) as u64;
            let volume = volume.name.clone();
            self.apply(Event::ChangesCounted { volume, bytes }, now);
        }
    }

    fn happening(&mut self, event: &ExternalEvent) {
        let happening = event.happening();
        let volumes = self.history.volumes.iter().map(|v| &v.name);
        for volume in volumes.filter(|name| happening.concerns(name)) {
            self.forecaster.happening(volume, &happening);
        }
    }

    fn report_due(&mut self, now: UnixNanos) {
        while let Some(Reverse((at, _, _))) = self.due.peek()
            && *at <= now
        {
            let Some(Reverse((at, _, due))) = self.due.pop() else {
                return;
            };
            match due {
                Due::Captured(group, baseline, cut_at) => {
                    let kind = if baseline {
                        CaptureKind::Baseline
                    } else {
                        CaptureKind::Differential
                    };
                    let event = Event::CaptureFinished {
                        group,
                        kind,
                        cut_at,
                    };
                    self.apply(event, at);
                }
                Due::Staged(volume, bytes) => {
                    let event = Event::StagingFinished {
                        volume,
                        outcome: Ok(bytes),
                    };
                    self.apply(event, at);
                }
            }
        }
    }

    fn apply(&mut self, event: Event, now: UnixNanos) {
        let commands = self.brain.apply(event, now);
        for command in commands {
            self.carry_out(command, now);
        }
    }

    fn carry_out(&mut self, command: Command, now: UnixNanos) {
        match command {
            Command::RecordDecision(decision) => {
                self.counts.decisions += 1;
                self.sink.decision(&decision);
            }
            Command::Forecast { volume, horizon } => self.forecast(&volume, horizon, now),
            Command::StartCapture { group, kind, .. } => self.capture(group, kind, now),
            Command::StartStaging {
                volume,
                budget_bytes,
                copy,
                ..
            } => {
                self.heat_until(now);
                self.staged.choose(&volume, now, budget_bytes);
                if !copy {
                    return;
                }
                self.counts.stagings += 1;
                let rate = self.config.planner.staging.rate;
                let bytes = self
                    .staged
                    .stage(&volume, now, budget_bytes, rate, &mut *self.sink);
                let copied = now + (bytes as f64 / rate.max(1.0) * 1e9) as i64;
                self.later(copied, Due::Staged(volume, bytes));
            }
            Command::JudgeStaging { volume } => {
                self.heat_until(now);
                if let Some((chosen, used)) = self.staged.judge(&volume) {
                    let event = Event::StagingJudged {
                        volume,
                        chosen,
                        used,
                    };
                    self.apply(event, now);
                }
            }
            Command::CancelStaging { volume, .. } => self.staged.cancel(&volume, now),
            Command::Judge {
                group,
                volumes,
                neighbours,
                pace,
            } => {
                let begin = self.forecaster.begin(&volumes, &neighbours, pace);
                self.apply(Event::Judged { group, begin }, now);
            }
            Command::Train { .. } => self.train(now),
            // Nobody asks for captures here.
            Command::RefuseCapture { .. } => {}
        }
    }

    /// Bytes written to a volume since the last cut of a group that holds it.
    fn changed(&self, volume: &VolumeName) -> f64 {
        let of = |spec: &&GroupSpec| spec.volumes.contains(volume);
        let since = self.config.groups.iter().find(of).and_then(|spec| {
            let records = self.captures.get(&spec.name)?;
            records.last().map(|record| record.start)
        });
        self.written
            .get(volume)
            .map_or(0.0, |written| written_since(written, since))
    }

    fn forecast(&mut self, volume: &VolumeName, horizon: usize, now: UnixNanos) {
        // Before that forecasts would only be evidence that has faded by the time that is judged.
        let season = nanos(self.config.planner.scale.season());
        let warm = |from: UnixNanos| from.saturating_sub(season.saturating_mul(WARM_UP_SEASONS));
        if self.config.judge_from.is_some_and(|from| now < warm(from)) {
            return;
        }
        let Some(forecast) = self.forecaster.forecast(volume, horizon) else {
            return;
        };
        self.counts.forecasts += 1;
        let index = self.config.planner.scale.index_of(forecast.issued_at);
        if index.rem_euclid(self.config.record_every.max(1) as i64) == 0 {
            self.sink.forecast(volume, &forecast);
        }
        let event = Event::ForecastReady {
            volume: volume.clone(),
            forecast: forecast.into(),
        };
        self.apply(event, now);
    }

    fn capture(&mut self, group: GroupName, kind: CaptureKind, now: UnixNanos) {
        let volumes = self
            .config
            .groups
            .iter()
            .find(|g| g.name == group)
            .map(|g| g.volumes.clone())
            .unwrap_or_default();
        let records = self.captures.entry(group.clone()).or_default();
        let since = records.last().map(|r| r.start);
        let changed: f64 = volumes
            .iter()
            .filter_map(|v| self.written.get(v))
            .map(|w| written_since(w, since))
            .sum();
        let takes = Duration::from_secs_f64((changed / self.config.capture_rate.max(1.0)).min(1e9))
            .max(self.config.capture_min);
        let until = now.saturating_add(nanos(takes));
        records.push(CaptureRecord {
            start: now,
            end: until,
            kind,
        });
        self.apply(
            Event::CaptureStarted {
                group: group.clone(),
            },
            now,
        );
        let baseline = kind == CaptureKind::Baseline;
        self.later(until, Due::Captured(group, baseline, now));
    }

    fn train(&mut self, now: UnixNanos) {
        let Some(trainer) = self.trainer else {
            // Without a trainer the wish stays open, and the brain does not repeat it.
            return;
        };
        self.counts.trainings += 1;
        let outcome = trainer(&self.forecaster.dataset())
            .and_then(|trained| self.forecaster.install(&trained));
        let outcome = match outcome {
            Ok(Promotion::Promoted { reason }) => {
                self.counts.promotions += 1;
                Ok(reason)
            }
            Ok(Promotion::Rejected { reason }) => Err(reason),
            Err(error) => Err(error.to_string()),
        };
        self.apply(Event::TrainingFinished { outcome }, now);
    }

    fn later(&mut self, at: UnixNanos, due: Due) {
        self.sequence += 1;
        self.due.push(Reverse((at, self.sequence, due)));
    }

    /// Takes in the recorded IO before `now`.
    fn heat_until(&mut self, now: UnixNanos) {
        let history = self.history;
        while let Some(access) = history
            .accesses
            .get(self.next_access)
            .filter(|a| a.at < now)
        {
            self.next_access += 1;
            self.staged.access(access, &mut *self.sink);
        }
    }
}

fn written_since(written: &[(UnixNanos, f64)], since: Option<UnixNanos>) -> f64 {
    let total = written.last().map_or(0.0, |(_, b)| *b);
    let before = since.map_or(0.0, |since| {
        let k = written.partition_point(|(at, _)| *at <= since);
        k.checked_sub(1)
            .and_then(|k| written.get(k))
            .map_or(0.0, |(_, b)| *b)
    });
    total - before
}

#[cfg(test)]
mod tests;
