//! What a simulation came to, judged afterwards by what really happened.

use serde::{Deserialize, Serialize};

use super::simulate::{History, SimulationConfig};
use super::staged::StagingStatistics;
use super::types::{CaptureKind, GroupName, GroupSpec, nanos};
use crate::model::burst::{BurstDetector, BurstRule};
use crate::model::{TimeScale, VolumeName};
use crate::seam::UnixNanos;

/// One capture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CaptureRecord {
    /// When it started; the cut is taken to be then.
    pub start: UnixNanos,
    /// When it was durable.
    pub end: UnixNanos,
    /// The kind of layer.
    pub kind: CaptureKind,
}

/// How a policy captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CaptureSummary {
    /// Captures, of all groups.
    pub captures: u64,
    /// How many of them were baselines.
    pub baselines: u64,
    /// How many met a burst of one of their volumes.
    pub met_burst: u64,
    /// How often a layer became older than the RPO.
    pub rpo_misses: u64,
    /// The greatest age of a newest layer, as a multiple of its RPO.
    pub worst_age: f64,
    /// The mean foreground load while capturing, per capture, in bytes per second.
    pub mean_load: f64,
    /// Foreground bytes that met a capture.
    pub met_bytes: f64,
}

/// What a simulation came to: `summary.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Start of the judged time, in nanoseconds since the Unix epoch.
    pub from: UnixNanos,
    /// Its end.
    pub to: UnixNanos,
    /// Volumes in the history.
    pub volumes: u64,
    /// Groups simulated.
    pub groups: u64,
    /// Forecasts issued.
    pub forecasts: u64,
    /// Decisions recorded.
    pub decisions: u64,
    /// Bins that were no load.
    pub refused_bins: u64,
    /// Trainings run.
    pub trainings: u64,
    /// Trainings whose network was put in service.
    pub promotions: u64,
    /// Times staging was started.
    pub stagings: u64,
    /// What staging was good for; all zero without recorded IO.
    pub staging: StagingStatistics,
    /// The planner's captures.
    pub planned: CaptureSummary,
    /// Captures by cron at the same RPO: every RPO on the hour, or at 02:00 for a day and more.
    pub cron: CaptureSummary,
    /// The planner's mean load while capturing relative to cron's; below 1 is better.
    pub load_ratio: Option<f64>,
    /// The load of the judged time, all volumes, the mean in bytes per second.
    pub mean_load: f64,
}

/// What really happened, in a form that is quick to look up.
pub(super) struct Truth {
    scale: TimeScale,
    volumes: Vec<TrueVolume>,
}

struct TrueVolume {
    name: VolumeName,
    first: i64,
    /// Bytes before bin i, one more than there are bins.
    bytes: Vec<f64>,
    written: Vec<f64>,
    burst: Vec<bool>,
}

impl Truth {
    pub(super) fn new(history: &History, scale: TimeScale, rule: BurstRule) -> Self {
        let volumes = history
            .volumes
            .iter()
            .map(|v| {
                let mut detector = BurstDetector::new(scale, rule);
                let mut bytes = vec![0.0];
                let mut written = vec![0.0];
                let mut burst = Vec::new();
                for bin in &v.bins {
                    let bin = bin.filter(|b| b.check().is_ok());
                    let load = bin.unwrap_or_default();
                    bytes.push(bytes[bytes.len() - 1] + load.bytes());
                    written.push(written[written.len() - 1] + load.write_bytes);
                    burst.push(
                        detector
                            .push(bin.map(|b| b.bytes_per_second(scale.bin())))
                            .burst,
                    );
                }
                TrueVolume {
                    name: v.name.clone(),
                    first: scale.index_of(v.start),
                    bytes,
                    written,
                    burst,
                }
            })
            .collect();
        Self { scale, volumes }
    }

    fn range(&self) -> Option<(UnixNanos, UnixNanos)> {
        let from = self.volumes.iter().map(|v| v.first).min()?;
        let to = self
            .volumes
            .iter()
            .map(|v| v.first + v.burst.len() as i64)
            .max()?;
        Some((self.scale.start_of(from), self.scale.start_of(to)))
    }

    fn of<'a>(&'a self, names: &'a [VolumeName]) -> impl Iterator<Item = &'a TrueVolume> {
        self.volumes.iter().filter(|v| names.contains(&v.name))
    }

    fn bytes(&self, names: &[VolumeName], from: UnixNanos, to: UnixNanos) -> f64 {
        self.of(names)
            .map(|v| v.upto(&v.bytes, self.scale, to) - v.upto(&v.bytes, self.scale, from))
            .sum()
    }

    fn written(&self, names: &[VolumeName], from: UnixNanos, to: UnixNanos) -> f64 {
        self.of(names)
            .map(|v| v.upto(&v.written, self.scale, to) - v.upto(&v.written, self.scale, from))
            .sum()
    }

    fn burst(&self, names: &[VolumeName], from: UnixNanos, to: UnixNanos) -> bool {
        let first = self.scale.index_of(from);
        let last = self.scale.index_of(to.saturating_sub(1).max(from));
        self.of(names).any(|v| {
            (first..=last).any(|i| {
                usize::try_from(i - v.first).is_ok_and(|i| v.burst.get(i).copied().unwrap_or(false))
            })
        })
    }
}

impl TrueVolume {
    /// The running total `sums` at `at`, a bin's share taken evenly.
    fn upto(&self, sums: &[f64], scale: TimeScale, at: UnixNanos) -> f64 {
        let index = scale.index_of(at) - self.first;
        let Ok(i) = usize::try_from(index) else {
            return 0.0;
        };
        let last = sums.len() - 1;
        if i >= last {
            return sums[last];
        }
        let into = (at - scale.start_of(scale.index_of(at))) as f64 / scale.bin_nanos() as f64;
        sums[i] + (sums[i + 1] - sums[i]) * into
    }
}

/// Judges the captures of a simulation and those cron would have made.
pub(super) fn judge(
    truth: &Truth,
    config: &SimulationConfig,
    captures: &std::collections::BTreeMap<GroupName, Vec<CaptureRecord>>,
) -> Summary {
    let Some((begin, to)) = truth.range() else {
        return Summary::default();
    };
    let from = config.judge_from.unwrap_or(begin).clamp(begin, to);
    let mut planned = Tally::default();
    let mut cron = Tally::default();
    for spec in &config.groups {
        let none = Vec::new();
        let records = captures.get(&spec.name).unwrap_or(&none);
        planned.add(truth, spec, records, from, to);
        cron.add(
            truth,
            spec,
            &cron_captures(truth, config, spec, begin, to),
            from,
            to,
        );
    }
    let planned = planned.summary();
    let cron = cron.summary();
    let names: Vec<VolumeName> = truth.volumes.iter().map(|v| v.name.clone()).collect();
    Summary {
        from,
        to,
        volumes: truth.volumes.len() as u64,
        groups: config.groups.len() as u64,
        planned,
        cron,
        load_ratio: (planned.captures > 0 && cron.mean_load > 0.0)
            .then(|| planned.mean_load / cron.mean_load),
        mean_load: truth.bytes(&names, from, to) / seconds(to - from).max(1e-9),
        ..Summary::default()
    }
}

/// What cron would have captured with the same RPO and the same copying speed.
fn cron_captures(
    truth: &Truth,
    config: &SimulationConfig,
    spec: &GroupSpec,
    begin: UnixNanos,
    to: UnixNanos,
) -> Vec<CaptureRecord> {
    let period = nanos(spec.rpo).max(1);
    let season = nanos(truth.scale.season());
    // Daily jobs run at 02:00, a twelfth into the day.
    let phase = if period >= season { season / 12 } else { 0 };
    let mut records = Vec::new();
    let mut since = begin;
    let mut at = (begin - phase).div_euclid(period) * period + phase;
    while at < to {
        if at >= begin {
            let changed = truth.written(&spec.volumes, since, at);
            let takes = ((changed / config.capture_rate.max(1.0) * 1e9) as i64)
                .max(nanos(config.capture_min));
            records.push(CaptureRecord {
                start: at,
                end: at.saturating_add(takes),
                kind: CaptureKind::Differential,
            });
            since = at;
        }
        at = at.saturating_add(period);
    }
    records
}

#[derive(Default)]
struct Tally {
    summary: CaptureSummary,
    load_sum: f64,
}

impl Tally {
    fn add(
        &mut self,
        truth: &Truth,
        spec: &GroupSpec,
        records: &[CaptureRecord],
        from: UnixNanos,
        to: UnixNanos,
    ) {
        let s = &mut self.summary;
        let rpo = nanos(spec.rpo).max(1);
        // Ages are counted from the last cut before the judged time, if there is one.
        let before = records.iter().rfind(|r| r.start < from);
        let mut last = before.map_or(from, |r| r.start);
        let judged = records.iter().filter(|r| r.start >= from && r.start < to);
        for cut in judged.clone().map(|r| r.start).chain([to]) {
            let age = cut - last;
            s.rpo_misses += u64::from(age > rpo);
            s.worst_age = s.worst_age.max(age as f64 / rpo as f64);
            last = cut;
        }
        for record in judged {
            let end = record.end.min(to);
            let bytes = truth.bytes(&spec.volumes, record.start, end);
            s.captures += 1;
            s.baselines += u64::from(record.kind == CaptureKind::Baseline);
            s.met_burst += u64::from(truth.burst(&spec.volumes, record.start, end));
            s.met_bytes += bytes;
            self.load_sum += bytes / seconds(end - record.start).max(1e-9);
        }
    }

    fn summary(mut self) -> CaptureSummary {
        self.summary.mean_load = self.load_sum / (self.summary.captures as f64).max(1.0);
        self.summary
    }
}

fn seconds(nanos: i64) -> f64 {
    nanos as f64 / 1e9
}
