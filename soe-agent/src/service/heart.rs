//! The heartbeat: samples the volumes, closes windows and bins, lets the brain decide, carries out
//! its commands.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use soe_common::record::CgroupStats;

use super::agent::{Agent, Entry, Sampling, lock};
use super::sampler::{WindowOf, window};
use super::spread::spread;
use super::steps::{Moment, SoberTime};
use crate::api::engine::{EngineError, ErrorKind};
use crate::api::types::{self, LoadSample, WatchEvent};
use crate::model::{Forecaster, QuantileForecast, SHORT_HORIZON, VolumeName};
use crate::observe::cgroups;
use crate::plan::{Command, Event};
use crate::seam::{ByteRange, ChangeMap, Clock, UnixNanos};
use crate::window::{AppStatsRow, DecisionRow, ForecastRow, RegionHeatRow, VolumeWindow, floor_to};

/// Between two rounds of compaction and retention.
const MAINTAIN_EVERY: Duration = Duration::from_secs(300);
/// Bytes that a read is taken to have at least.
const LEAST_READ: f64 = 4096.0;
/// Bins of a forecast that are kept in the history.
const KEPT_BINS: usize = SHORT_HORIZON;

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// Runs until the agent stops.
pub(super) fn beat(agent: &Arc<Agent>) {
    let clock = agent.clock.clone();
    let (mut ticked, mut maintained) = (clock.monotonic(), clock.monotonic());
    let mut heat_at = clock.monotonic();
    let mut sampled = clock.monotonic();
    // What the kernel counted while no agent ran belongs to no row.
    let mut apps = agent
        .tracker
        .cgroups()
        .map(|counts| counts.into_iter().collect())
        .ok();
    let mut sober = SoberTime::new(Moment::now(&*clock));
    while !agent.stopping() {
        let next =
            (sampled + agent.config().history.interval).min(ticked + agent.config().plan.tick);
        let now = clock.monotonic();
        if now < next {
            clock.sleep((next - now).min(Duration::from_millis(100)));
            continue;
        }
        if now >= sampled + agent.config().history.interval {
            // A beat that came late makes one longer window, not several short ones.
            sampled = now;
            let heat = now >= heat_at + agent.config().history.region_interval;
            if heat {
                heat_at = now;
            }
            for entry in agent.all_entries() {
                sample(agent, &entry, heat);
            }
            if heat {
                sample_apps(agent, &mut apps);
            }
            if let Err(error) = agent.history.tick() {
                tracing::warn!(%error, "the history could not be written; its rows wait in memory");
            }
        }
        if now >= ticked + agent.config().plan.tick {
            ticked = now;
            agent.apply(Event::Tick);
        }
        if now >= maintained + MAINTAIN_EVERY {
            maintained = now;
            match agent.history.maintain(sober.at(Moment::now(&*clock))) {
                Ok(done) => done
                    .skipped
                    .iter()
                    .for_each(|error| tracing::warn!(%error, "the history was repaired")),
                Err(error) => tracing::warn!(%error, "the history could not be maintained"),
            }
        }
        lock(&agent.jobs).retain(|job| !job.is_finished());
    }
    // The windows that the stop cut short.
    for entry in agent.all_entries() {
        sample(agent, &entry, true);
    }
    sample_apps(agent, &mut apps);
}

/// Closes the window of one volume.
fn sample(agent: &Arc<Agent>, entry: &Arc<Entry>, heat: bool) {
    let moment = Moment::now(&*agent.clock);
    let now = moment.wall;
    let stats = match entry.track.stats() {
        Ok(stats) => stats,
        Err(error) => return tracing::warn!(volume = entry.name, %error, "no statistics"),
    };
    entry.track.next_window(heat);
    let mut sampling = lock(&entry.sampling);
    let Some((since, before)) = sampling.last.replace((moment, stats.clone())) else {
        return;
    };
    let (start, interval) = moment.window_since(since);
    let of = WindowOf {
        start,
        interval,
        host: agent.host(),
        volume: entry.name.as_str().into(),
        device_id: entry.volume.device_id.as_str().into(),
    };
    let window = window(of, &before, &stats);
    sampling.window = Some(window.clone());
    let Sampling { bin, open, .. } = &mut *sampling;
    let usual = nanos(agent.config().history.interval);
    let closed = spread(agent.scale, usual, bin, open, &window);
    sampling.read.0 += window.read.bytes.unwrap_or(0);
    sampling.read.1 += window.read.ops.unwrap_or(0);
    let heat_rows = if heat {
        // Over the same time as the heat.
        let (bytes, ops) = std::mem::take(&mut sampling.read);
        let mean = bytes as f64 / ops.max(1) as f64;
        heat_rows(agent, entry, &mut sampling.heat, now, mean)
    } else {
        Vec::new()
    };
    drop(sampling);
    publish(agent, entry, &window);
    if let Err(error) = agent
        .history
        .append(std::slice::from_ref(&window))
        .and_then(|()| agent.history.append(&heat_rows))
    {
        tracing::warn!(%error, "the history could not be written; its rows wait in memory");
    }
    if agent.stopping() {
        // Nothing is decided any more.
        return;
    }
    let name = VolumeName::from(entry.name.as_str());
    let bytes = window.read.bytes.unwrap_or(0) + window.write.bytes.unwrap_or(0);
    agent.apply(Event::LoadSampled {
        volume: name.clone(),
        bytes_per_second: bytes as f64 / (interval as f64 / 1e9),
    });
    tell_burst(agent, entry, heat, now);
    for (start, load) in closed {
        let observed = lock(&agent.mind).mixture.observe(&name, start, load);
        match observed {
            Ok(()) => agent.apply(Event::WindowClosed {
                volume: name.clone(),
                start,
                load,
            }),
            Err(error) => {
                tracing::warn!(volume = entry.name, %error, "a bin was not used for forecasts")
            }
        }
    }
}

/// Tells the heat when a burst begins and ends.
fn tell_burst(agent: &Agent, entry: &Entry, heat: bool, now: UnixNanos) {
    let name = VolumeName::from(entry.name.as_str());
    let bursting = lock(&agent.mind).brain.bursting(&name, now);
    let told = lock(&entry.sampling).bursting;
    // It ends with an interval of the heat, or its last reads would count as read after it.
    let tell = match bursting {
        true => !told,
        false => told && heat,
    };
    if !tell {
        return;
    }
    lock(&entry.sampling).bursting = bursting;
    if bursting {
        lock(&entry.heat).burst_began(now);
        if let Some(chosen) = &mut *lock(&entry.chosen) {
            chosen.burst_began();
        }
    } else {
        lock(&entry.heat).burst_ended(now);
    }
}

fn heat_rows(
    agent: &Agent,
    entry: &Entry,
    before: &mut BTreeMap<u64, (u32, u32)>,
    now: UnixNanos,
    mean_read: f64,
) -> Vec<RegionHeatRow> {
    let interval = nanos(agent.config().history.region_interval);
    let region_bytes = soe_common::SECTOR_SIZE << entry.track.geometry().region_shift;
    let first = entry.volume.start * soe_common::SECTOR_SIZE / region_bytes;
    let end = entry.volume.end * soe_common::SECTOR_SIZE;
    let mut rows = Vec::new();
    let mut read = Vec::new();
    let mut map = lock(&entry.heat);
    for (region, heat) in entry.track.heat() {
        if region < first || region * region_bytes >= end {
            continue;
        }
        let old = before
            .insert(region, (heat.reads, heat.writes))
            .unwrap_or_default();
        let (reads, writes) = (
            heat.reads.wrapping_sub(old.0),
            heat.writes.wrapping_sub(old.1),
        );
        if reads == 0 && writes == 0 {
            continue;
        }
        map.record_unit(now, region - first, f64::from(reads), f64::from(writes));
        if reads > 0 {
            let range = ByteRange::new((region - first) * region_bytes, region_bytes);
            read.push((range, u64::from(reads)));
        }
        rows.push(RegionHeatRow {
            ts: floor_to(now - interval, nanos(agent.config().history.interval)),
            interval,
            volume: entry.name.as_str().into(),
            region: (region - first) * (region_bytes >> 20),
            read_ops: u64::from(reads),
            write_ops: u64::from(writes),
        });
    }
    drop(map);
    if let Some(chosen) = &mut *lock(&entry.chosen) {
        // How large a region's reads were is not known, only how large those of the volume.
        for (range, reads) in &read {
            chosen.read(*range, *reads as f64 * mean_read.max(LEAST_READ));
        }
    }
    agent.note_reads(entry, now, &read);
    rows
}

/// What every control group did since the last time: rows of `app_stats`.
fn sample_apps(agent: &Agent, before: &mut Option<BTreeMap<(u32, u64), CgroupStats>>) {
    let counts = match agent.tracker.cgroups() {
        Ok(counts) => counts,
        Err(error) => return tracing::warn!(%error, "no statistics by control group"),
    };
    let Some(before) = before else {
        *before = Some(counts.into_iter().collect());
        return;
    };
    let names = cgroups::paths();
    let entries = agent.all_entries();
    let config = agent.config();
    let interval = nanos(config.history.region_interval);
    let ts = agent.clock.now() - interval;
    let mut rows = Vec::new();
    for ((slot, cgroup), now) in &counts {
        let key = &(*slot, *cgroup);
        // A cgroup that was evicted from the map begins at zero again.
        let old = before
            .get(key)
            .filter(|old| old.read_ops <= now.read_ops && old.write_ops <= now.write_ops);
        let old = old.copied().unwrap_or_default();
        if now == &old {
            continue;
        }
        let path = names
            .get(cgroup)
            .cloned()
            .unwrap_or_else(|| cgroup.to_string());
        let app = config.host.app.iter().find(|app| {
            path == app.cgroup
                || path.starts_with(&format!("{}/", app.cgroup.trim_end_matches('/')))
        });
        for entry in entries.iter().filter(|entry| entry.track.slot() == *slot) {
            rows.push(AppStatsRow {
                ts,
                interval,
                volume: entry.name.as_str().into(),
                cgroup: path.as_str().into(),
                app: app.map(|app| app.kind.as_str().into()),
                unit: cgroups::unit_of(&path).map(Into::into),
                container: cgroups::container_of(&path).map(Into::into),
                read_ops: now.read_ops - old.read_ops,
                write_ops: now.write_ops - old.write_ops,
                read_bytes: now.read_bytes.saturating_sub(old.read_bytes),
                write_bytes: now.write_bytes.saturating_sub(old.write_bytes),
            });
        }
    }
    *before = counts.into_iter().collect();
    if let Err(error) = agent.history.append(&rows) {
        tracing::warn!(%error, "the history could not be written; its rows wait in memory");
    }
}

/// Metrics and watchers.
fn publish(agent: &Agent, entry: &Entry, window: &VolumeWindow) {
    let name = entry.name.as_str();
    let metrics = &agent.metrics;
    for (op, count) in [
        ("read", window.read.ops),
        ("write", window.write.ops),
        ("discard", window.discard_ops),
        ("flush", window.flush_ops),
    ] {
        metrics
            .volume_operations
            .with([name, op])
            .inc_by(count.unwrap_or(0));
    }
    for (op, bytes) in [
        ("read", window.read.bytes),
        ("write", window.write.bytes),
        ("discard", window.discard_bytes),
    ] {
        metrics
            .volume_bytes
            .with([name, op])
            .inc_by(bytes.unwrap_or(0));
    }
    let p99 = |latency: &Option<crate::window::LatencySummary>| latency.as_ref().map(|l| l.p99);
    for (op, latency) in [
        ("read", &window.read.latency),
        ("write", &window.write.latency),
    ] {
        if let Some(latency) = latency {
            for (quantile, ns) in [
                ("0.5", latency.p50),
                ("0.9", latency.p90),
                ("0.99", latency.p99),
                ("0.999", latency.p999),
            ] {
                metrics
                    .volume_latency
                    .set([name, op, quantile], ns as f64 / 1e9);
            }
        }
    }
    metrics
        .volume_queue_depth
        .set([name], window.queue_depth.map_or(0.0, |q| q.mean));
    metrics
        .volume_sequential
        .set([name], window.sequential_share.unwrap_or(0.0));
    let complete = matches!(entry.map.tracking(), crate::seam::Tracking::Complete);
    metrics
        .tracking_complete
        .set([name], if complete { 1.0 } else { 0.0 });
    agent.tell(WatchEvent::Load(LoadSample {
        volume: entry.name.clone(),
        interval_ms: u64::try_from(window.interval / 1_000_000).unwrap_or(0),
        read_ops: window.read.ops.unwrap_or(0),
        write_ops: window.write.ops.unwrap_or(0),
        read_bytes: window.read.bytes.unwrap_or(0),
        write_bytes: window.write.bytes.unwrap_or(0),
        p99_latency_us: p99(&window.read.latency)
            .max(p99(&window.write.latency))
            .map(|ns| ns / 1000),
    }));
}

impl Agent {
    /// Tells the brain what happened and carries out what it answers.
    pub(super) fn apply(self: &Arc<Self>, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let commands = lock(&self.mind).brain.apply(event, self.clock.now());
            for command in commands {
                if let Some(event) = self.carry_out(command) {
                    events.push_back(event);
                }
            }
        }
    }

    /// Carries out a command; what is known at once is returned as an event.
    fn carry_out(self: &Arc<Self>, command: Command) -> Option<Event> {
        match command {
            Command::StartCapture {
                group,
                kind,
                hints,
                reason,
            } => {
                tracing::info!(group = %group, ?kind, reason, "capture");
                let agent = self.clone();
                let of = group.clone();
                if !self.job("capture", move || agent.run_capture(&of, kind, hints)) {
                    let reason = "the agent could start no thread for it".to_owned();
                    self.answer_waiters(
                        &group,
                        &Err(EngineError::new(ErrorKind::Exhausted, reason.clone())),
                    );
                    return Some(Event::CaptureFailed { group, reason });
                }
            }
            Command::RefuseCapture { group, reason } => {
                // A capture of the same group that began since the caller looked is as good as its own.
                if !lock(&self.mind).brain.capturing(&group) {
                    let reason = format!("capture of {group}: {reason}");
                    self.answer_waiters(
                        &group,
                        &Err(EngineError::new(ErrorKind::Conflict, reason)),
                    );
                }
            }
            Command::StartStaging {
                volume,
                before,
                budget_bytes,
                copy,
                reason,
            } => {
                tracing::info!(volume = %volume, before, budget_bytes, copy, reason, "staging");
                let agent = self.clone();
                // Before the job runs, or a cancellation that comes first would be lost.
                let cancels = self.staging_cancels(&volume);
                let of = volume.clone();
                let started = self.job("staging", move || {
                    let ranked = agent.choose(&of, budget_bytes);
                    if !copy {
                        return;
                    }
                    let outcome = agent
                        .stage(&of, &ranked, budget_bytes, cancels)
                        .map_err(|error| error.to_string());
                    agent.apply(Event::StagingFinished {
                        volume: of,
                        outcome,
                    });
                });
                if !started {
                    let outcome = Err("the agent could start no thread for it".to_owned());
                    return Some(Event::StagingFinished { volume, outcome });
                }
            }
            Command::CancelStaging { volume, reason } => {
                tracing::info!(volume = %volume, reason, "staging cancelled");
                if let Some(entry) = self.entry(&volume) {
                    entry.staging_cancels.fetch_add(1, Ordering::SeqCst);
                }
            }
            Command::JudgeStaging { volume } => {
                let entry = self.entry(&volume)?;
                let (chosen, used) = lock(&entry.chosen).take()?.score();
                return Some(Event::StagingJudged {
                    volume,
                    chosen,
                    used,
                });
            }
            Command::Forecast { volume, horizon } => {
                let began = self.clock.monotonic();
                let forecast = lock(&self.mind).mixture.forecast(&volume, horizon)?;
                let took = self.clock.monotonic() - began;
                self.metrics
                    .forecast_duration
                    .observe([], took.as_secs_f64());
                self.keep_forecast(&volume, &forecast);
                return Some(Event::ForecastReady {
                    volume,
                    forecast: Arc::new(forecast),
                });
            }
            Command::Judge {
                group,
                volumes,
                neighbours,
                pace,
            } => {
                let begin = lock(&self.mind).mixture.begin(&volumes, &neighbours, pace);
                return Some(Event::Judged { group, begin });
            }
            Command::Train { reason } => {
                tracing::info!(reason, "training");
                let agent = self.clone();
                let started = self.job("training", move || {
                    let outcome = agent.train();
                    match &outcome {
                        Ok(reason) => tracing::info!(reason, "training ended"),
                        Err(reason) => tracing::warn!(reason, "training failed"),
                    }
                    agent.apply(Event::TrainingFinished { outcome });
                });
                if !started {
                    let outcome = Err("the agent could start no thread for it".to_owned());
                    return Some(Event::TrainingFinished { outcome });
                }
            }
            Command::RecordDecision(decision) => self.keep_decision(decision),
        }
        None
    }

    /// Tells everyone who waits for a capture of `group` how it ended.
    pub(super) fn answer_waiters(
        &self,
        group: &str,
        answer: &Result<Vec<types::LayerInfo>, EngineError>,
    ) {
        for waiter in lock(&self.waiters).remove(group).unwrap_or_default() {
            // A caller that went away needs no answer.
            let _ = waiter.send(answer.clone());
        }
    }

    /// Starts work on a thread of its own; whether it could be started.
    pub(super) fn job(&self, name: &str, work: impl FnOnce() + Send + 'static) -> bool {
        match std::thread::Builder::new()
            .name(format!("soe-{name}"))
            .spawn(work)
        {
            Ok(job) => {
                lock(&self.jobs).push(job);
                true
            }
            Err(error) => {
                tracing::error!(job = name, %error, "no thread for a job");
                false
            }
        }
    }

    fn keep_forecast(&self, volume: &VolumeName, forecast: &QuantileForecast) {
        let bin = nanos(forecast.bin);
        let member = format!("{}", forecast.member);
        self.metrics.forecasts.with([member.as_str()]).inc();
        self.metrics
            .burst_probability
            .set([volume.as_str()], forecast.burst_probability());
        if let Some(row) = forecast.rows.first() {
            for (quantile, index) in [("0.1", 0), ("0.5", 1), ("0.9", 3)] {
                self.metrics
                    .predicted_load
                    .set([volume.as_str(), quantile], f64::from(row[index]));
            }
        }
        let rows: Vec<ForecastRow> = forecast
            .rows
            .iter()
            .take(KEPT_BINS)
            .enumerate()
            .map(|(index, row)| ForecastRow {
                issued: forecast.issued_at,
                volume: volume.as_str().into(),
                target_start: forecast.start_of(index),
                target_end: forecast.start_of(index).saturating_add(bin),
                metric: "bytes_per_second".into(),
                q10: f64::from(row[0]),
                q50: f64::from(row[1]),
                q80: f64::from(row[2]),
                q90: f64::from(row[3]),
                q95: f64::from(row[4]),
                q99: f64::from(row[5]),
                burst_probability: forecast.onset.get(index).map(|p| f64::from(*p)),
                member: member.as_str().into(),
            })
            .collect();
        if let Err(error) = self.history.append(&rows) {
            tracing::warn!(%error, "forecasts could not be kept");
        }
    }

    fn keep_decision(&self, decision: crate::plan::Decision) {
        let action = match decision.action {
            crate::plan::Action::Capture => "capture",
            crate::plan::Action::Stage => "stage",
            crate::plan::Action::Wait => "wait",
        };
        self.metrics
            .decisions
            .with([decision.volume.as_str(), action])
            .inc();
        let shown = types::Decision {
            at: decision.at,
            action: action.into(),
            reason: decision.reason.clone(),
        };
        if let Some(entry) = self.entry(&decision.volume) {
            *lock(&entry.last_decision) = Some(shown.clone());
        }
        self.tell(WatchEvent::Decision {
            volume: decision.volume.to_string(),
            decision: shown,
        });
        let row = DecisionRow {
            ts: decision.at,
            group: decision.group.map(|group| group.as_str().into()),
            volume: decision.volume.as_str().into(),
            action: action.into(),
            window_start: decision.window_start,
            window_end: decision.window_end,
            reason: decision.reason,
        };
        if let Err(error) = self.history.append(&[row]) {
            tracing::warn!(%error, "a decision could not be kept");
        }
    }
}
