//! Carries out captures: base from the newest manifest, readers, freezer, sink, and what is told of
//! the outcome.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::agent::{Agent, Entry, lock};
use super::hotplug::{Found, look};
use super::report::{layer_info, layer_row};
use super::sampler::{WindowOf, window};
use super::sink::{StoreSink, VolumeFacts, base_of};
use crate::api::engine::{EngineError, ErrorKind};
use crate::api::types::{LayerInfo, WatchEvent};
use crate::capture::mounts::Mounts;
use crate::capture::{
    CaptureError, CaptureParts, CapturePolicy, CaptureRequest, FreezeError, FreezeGuard, Method,
    Thawed, VolumeFreezer, VolumeParts, capture_group,
};
use crate::govern::{GuardLimits, LatencyGuard};
use crate::io::{ReadOptions, VolumeSpec, open_reader};
use crate::plan::{CaptureHints, CaptureKind, Event};
use crate::seam::{BlockReader, ChangeMap, Clock, GenerationEnd, Pace, Tracking};

/// How often the foreground's latency is looked at during a capture.
const GUARD_EVERY: Duration = Duration::from_millis(100);
/// A 99th percentile below this counts as unharmed where the group names no target.
const UNHARMED: Duration = Duration::from_millis(20);

/// Why a capture did not become a layer, with what the caller is told.
struct Failed {
    kind: ErrorKind,
    message: String,
}

impl Failed {
    fn new(kind: ErrorKind, error: &dyn std::error::Error) -> Self {
        Self {
            kind,
            message: error.to_string(),
        }
    }
}

/// Tells the threads that watch the foreground that the capture is over.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// All volumes of the group wait for the slowest of their paces.
struct Paces(Vec<Arc<crate::io::PacedBy<crate::io::SystemClock>>>);

impl Pace for Paces {
    fn before(&self, bytes: u64) -> std::io::Result<()> {
        self.0.iter().try_for_each(|pace| pace.before(bytes))
    }
}

struct Readers {
    background: Box<dyn BlockReader>,
    urgent: Box<dyn BlockReader>,
}

impl Agent {
    /// Captures a layer of every volume of `group` on this thread, and tells the brain, the callers
    /// that wait, and the watchers.
    pub(super) fn run_capture(
        self: &Arc<Self>,
        group: &str,
        kind: CaptureKind,
        hints: CaptureHints,
    ) {
        // One capture at a time: the guard is prepared for one group's filesystems, and two copies at
        // once would only slow each other and the foreground.
        let turn = lock(&self.capture_turn);
        self.apply(Event::CaptureStarted {
            group: group.into(),
        });
        let began = self.clock.monotonic();
        let work = || self.capture(group, kind, hints);
        // A panic must not leave the group "being captured", nor its callers without an answer.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(
            |_| {
                Err(Failed {
                    kind: ErrorKind::Internal,
                    message: format!(
                        "capture of {group}: the agent made a mistake (its log tells where); nothing became a layer"
                    ),
                })
            },
        );
        drop(turn);
        let took = self.clock.monotonic() - began;
        let kind_name = match kind {
            CaptureKind::Baseline => "baseline",
            CaptureKind::Differential => "differential",
        };
        let reply = match outcome {
            Ok(layers) => {
                self.metrics
                    .capture_duration
                    .observe([group, kind_name], took.as_secs_f64());
                lock(&self.errors).remove(group);
                let made = if layers
                    .iter()
                    .all(|l| l.kind == crate::api::types::LayerKind::Baseline)
                {
                    CaptureKind::Baseline
                } else {
                    CaptureKind::Differential
                };
                let cut_at = layers.first().map_or(0, |layer| layer.cut_at);
                self.apply(Event::CaptureFinished {
                    group: group.into(),
                    kind: made,
                    cut_at,
                });
                Ok(layers)
            }
            Err(failed) => {
                tracing::warn!(
                    group,
                    reason = failed.message,
                    "capture failed; nothing is lost, its blocks stay marked"
                );
                self.metrics
                    .captures
                    .with([group, kind_name, "none", "failed"])
                    .inc();
                lock(&self.errors).insert(group.into(), failed.message.clone());
                self.apply(Event::CaptureFailed {
                    group: group.into(),
                    reason: failed.message.clone(),
                });
                Err(EngineError::new(failed.kind, failed.message))
            }
        };
        self.answer_waiters(group, &reply);
    }

    fn capture(
        &self,
        group: &str,
        kind: CaptureKind,
        hints: CaptureHints,
    ) -> Result<Vec<LayerInfo>, Failed> {
        let volumes = lock(&self.state)
            .groups
            .get(group)
            .map(|g| g.volumes.clone())
            .ok_or_else(|| Failed {
                kind: ErrorKind::NotFound,
                message: format!("there is no group {group}"),
            })?;
        let entries: Vec<Arc<Entry>> = volumes
            .iter()
            .map(|name| {
                self.adopt_volume(name)
                    .map_err(|e| Failed::new(ErrorKind::Internal, &e))
            })
            .collect::<Result<_, _>>()?;
        let free = self
            .store
            .free_space()
            .map_err(|e| Failed::new(ErrorKind::Internal, &e))?;
        if free < self.config().store.min_free {
            return Err(Failed {
                kind: ErrorKind::Exhausted,
                message: format!(
                    "capture of {group}: only {free} bytes are free in {}, {} are to stay free; make room or lower store.min_free",
                    self.store.describe(),
                    self.config().store.min_free
                ),
            });
        }
        let mut settled = Vec::new();
        for entry in &entries {
            self.check_generation(entry)?;
            settled.push(self.settled_failures(entry));
        }
        let head = self
            .store
            .head(group)
            .map_err(|e| Failed::new(ErrorKind::Integrity, &e))?;
        let readers: Vec<Readers> = entries
            .iter()
            .map(|entry| open(entry))
            .collect::<Result<_, _>>()?;
        let pace = Paces(entries.iter().map(|entry| entry.pace.clone()).collect());
        let facts = entries
            .iter()
            .map(|entry| VolumeFacts {
                device_id: entry.volume.device_id.clone(),
                rescan_reason: Some(*lock(&entry.reason)),
            })
            .collect();
        let mut sink = StoreSink::new(&self.store, group, &*self.clock, facts);
        let mut guard = self.guard();
        let mut freezer = guard.as_deref().map(|guard| self.freezer(guard, &entries));
        if let Some(Err(FreezeError::Guard { .. })) = freezer {
            drop(freezer);
            self.replace_guard();
            guard = self.guard();
            freezer = guard.as_deref().map(|guard| self.freezer(guard, &entries));
        }
        let freezer = match freezer {
            Some(Ok(freezer)) => freezer,
            Some(Err(error @ FreezeError::Protected { .. })) => {
                return Err(Failed::new(ErrorKind::Unsafe, &error));
            }
            // Without a freezer the optimistic cut is still possible; if it fails, this is why.
            Some(Err(error)) => {
                tracing::warn!(group, %error, "filesystems cannot be frozen for this capture");
                None
            }
            None => None,
        };
        let parts = CaptureParts {
            volumes: entries
                .iter()
                .zip(&readers)
                .zip(&settled)
                .map(|((entry, readers), settled)| VolumeParts {
                    map: &entry.map,
                    reader: &*readers.background,
                    urgent: &*readers.urgent,
                    base: head
                        .as_ref()
                        .and_then(|manifest| newest_of(&self.store, group, manifest, &entry.name))
                        .filter(|layer| {
                            layer.volume_bytes == entry.volume.bytes()
                                && layer.block_size == entry.map.block_size()
                        })
                        .map(|layer| base_of(&layer)),
                    settled_failures: *settled,
                })
                .collect(),
            clock: &*self.clock,
            pace: &pace,
            freezer: freezer.as_ref().map(|f| f as &dyn VolumeFreezer),
            parallel: true,
        };
        let request = CaptureRequest {
            baseline: kind == CaptureKind::Baseline,
            policy: CapturePolicy {
                pause_budget: hints.max_pause,
                optimistic_time: if hints.urgent {
                    Duration::from_millis(500)
                } else {
                    Duration::from_secs(2)
                },
                memory_limit: self.config().limits.memory / 4,
                audit_blocks: self.config().limits.audit_blocks,
                ..CapturePolicy::default()
            },
        };
        let done = &AtomicBool::new(false);
        let cut = std::thread::scope(|scope| {
            // Also when the capture panics: the scope waits for its threads.
            let _done = SetOnDrop(done);
            for entry in &entries {
                let target = hints.p99_target;
                scope.spawn(move || self.guard_foreground(entry, target, done));
            }
            capture_group(&parts, &request, &mut sink)
        });
        if let Some(freezer) = &freezer {
            self.count_pauses(group, &freezer.pauses(), hints.max_pause);
        }
        let cut = cut.map_err(|error| self.capture_failed(&entries, error))?;
        let Some(manifest) = sink.manifest.take() else {
            return Err(Failed {
                kind: ErrorKind::Internal,
                message: "the capture ended without a manifest".into(),
            });
        };
        let won = u64::from(cut.method == Method::Optimistic);
        let optimistic = self.metrics.capture_optimistic.clone();
        optimistic.with([group, "won"]).inc_by(won);
        optimistic
            .with([group, "lost"])
            .inc_by(u64::from(cut.optimistic_tries) - won);
        tracing::info!(
            group,
            sequence = manifest.sequence,
            method = ?cut.method,
            pause_us = cut.pause.as_micros() as u64,
            wasted_us = cut.wasted_pause.as_micros() as u64,
            window_us = cut.window.as_micros() as u64,
            passes = cut.passes,
            tries = cut.tries,
            budget_missed = cut.budget_missed,
            "captured"
        );
        let mut layers = Vec::new();
        for layer in &manifest.volumes {
            let info = layer_info(&manifest, layer);
            self.metrics
                .capture_read
                .with([layer.volume.as_str()])
                .inc_by(layer.bytes_read);
            self.metrics
                .capture_stored
                .with([layer.volume.as_str()])
                .inc_by(layer.bytes_stored);
            if let Err(error) = self.history.append(&[layer_row(&manifest, layer)]) {
                tracing::warn!(%error, "the layer is durable, but the history could not take it yet");
            }
            self.tell(WatchEvent::Layer(Box::new(info.clone())));
            layers.push(info);
        }
        if let Some(layer) = layers.first() {
            self.metrics
                .captures
                .with([group, layer.kind.as_str(), layer.method.as_str(), "done"])
                .inc();
        }
        if cut.method == Method::Optimistic {
            self.metrics
                .capture_pause
                .observe([group, "optimistic"], 0.0);
        }
        Ok(layers)
    }

    /// Counts every time writers were held, also where it led to no layer.
    fn count_pauses(&self, group: &str, pauses: &[Thawed], budget: Duration) {
        for thawed in pauses {
            self.metrics
                .capture_pause
                .observe([group, "freeze"], thawed.pause.as_secs_f64());
            tracing::info!(
                group,
                pause_us = thawed.pause.as_micros() as u64,
                intact = thawed.intact,
                "writers were held"
            );
        }
        let ended = pauses.iter().filter(|t| !t.intact).count() as u64;
        self.metrics.guard_thaws.with([]).inc_by(ended);
        let missed = pauses.iter().filter(|t| t.pause > budget).count() as u64;
        if missed == 0 {
            return;
        }
        self.metrics
            .capture_missed_budgets
            .with([group])
            .inc_by(missed);
        if let Some(state) = lock(&self.state).groups.get_mut(group) {
            state.missed_pause_budgets += missed;
        }
        if let Err(error) = self.save_state() {
            tracing::warn!(%error, "the count of missed pause budgets could not be saved");
        }
    }

    /// Sets the pace of a capture by what the volume's own users feel, until `done`.
    fn guard_foreground(&self, entry: &Entry, target: Option<Duration>, done: &AtomicBool) {
        let ceiling = self.ceiling();
        let latency = |window: &crate::window::VolumeWindow| {
            let p99 = |stats: &crate::window::DirectionStats| {
                stats.latency.as_ref().map(|l| Duration::from_nanos(l.p99))
            };
            p99(&window.read).max(p99(&window.write))
        };
        // Without a target: what the users felt before the capture, with room for noise.
        let before = lock(&entry.sampling).window.as_ref().and_then(latency);
        let target = target.unwrap_or_else(|| (before.unwrap_or_default() * 4).max(UNHARMED));
        let mut guard = LatencyGuard::new(GuardLimits::new(target, ceiling));
        entry.pace.set_rate(guard.rate());
        let mut last = entry.track.stats().ok();
        while !done.load(Ordering::SeqCst) {
            self.clock.sleep(GUARD_EVERY);
            let now = entry.track.stats().ok();
            if let (Some(last), Some(now)) = (&last, &now) {
                let of = WindowOf {
                    start: 0,
                    interval: i64::try_from(GUARD_EVERY.as_nanos()).unwrap_or(1),
                    host: Default::default(),
                    volume: Default::default(),
                    device_id: Default::default(),
                };
                entry
                    .pace
                    .set_rate(guard.observe(latency(&window(of, last, now))));
            }
            last = now;
        }
        entry.pace.set_rate(ceiling);
    }

    /// Ends the generation of a volume whose map may lack changes, also when its counters and the
    /// device's own statistics disagree.
    fn check_generation(&self, entry: &Arc<Entry>) -> Result<(), Failed> {
        let internal = |e: super::ServiceError| Failed::new(ErrorKind::Internal, &e);
        match look(entry) {
            Found::Same => {}
            Found::Gone(message) => {
                self.part_with(entry);
                return Err(Failed {
                    kind: ErrorKind::Internal,
                    message,
                });
            }
            Found::Other(_) => return Err(self.became_another(entry)),
        }
        match entry.map.tracking() {
            Tracking::Complete => {}
            Tracking::Tainted(GenerationEnd::Remapped | GenerationEnd::Resize) => {
                return Err(self.became_another(entry));
            }
            Tracking::Tainted(reason) => self.end_generation(entry, reason).map_err(internal)?,
            Tracking::Detached => self
                .end_generation(entry, GenerationEnd::GapMiss)
                .map_err(internal)?,
        }
        if let Some((counted, device)) = entry
            .track
            .audit()
            .map_err(|e| Failed::new(ErrorKind::Internal, &e))?
            && counted != device
        {
            tracing::error!(
                volume = entry.name,
                counted,
                device,
                "the device wrote other sectors than the programs saw"
            );
            self.end_generation(entry, GenerationEnd::CounterMismatch)
                .map_err(internal)?;
        }
        Ok(())
    }

    /// Another device or another size: the slot must be laid out anew.
    fn became_another(&self, entry: &Arc<Entry>) -> Failed {
        self.part_with(entry);
        Failed {
            kind: ErrorKind::Conflict,
            message: format!(
                "{} became another device or changed its size; it is tracked anew, capture again",
                entry.name
            ),
        }
    }

    fn settled_failures(&self, entry: &Entry) -> u64 {
        let failed = entry
            .map
            .reading()
            .map_or(0, |reading| reading.misses.failed_writes);
        lock(&entry.settling).observe(self.clock.monotonic(), failed)
    }

    fn freezer<'g>(
        &self,
        guard: &'g FreezeGuard,
        entries: &[Arc<Entry>],
    ) -> Result<Option<crate::capture::GuardFreezer<'g>>, FreezeError> {
        let devices: Vec<(u32, u32)> = entries
            .iter()
            .map(|entry| {
                (
                    rustix::fs::major(entry.volume.rdev),
                    rustix::fs::minor(entry.volume.rdev),
                )
            })
            .collect();
        let superblocks = Mounts::default().superblocks(&devices, &self.protected())?;
        if superblocks.is_empty() {
            return Ok(None);
        }
        guard.prepare(superblocks, entries.len()).map(Some)
    }

    fn capture_failed(&self, entries: &[Arc<Entry>], error: CaptureError) -> Failed {
        let end = |volume: &str, reason| {
            if let Some(entry) = entries.iter().find(|entry| entry.name == volume)
                && let Err(error) = self.end_generation(entry, reason)
            {
                tracing::error!(volume, %error, "a new generation could not be begun");
            }
        };
        match &error {
            CaptureError::GenerationEnds { volume, reason, .. } => end(volume, *reason),
            CaptureError::MissedBeforeFirstCut { volume, .. } => {
                end(volume, GenerationEnd::GapMiss)
            }
            CaptureError::Freeze(FreezeError::Guard { .. }) => self.replace_guard(),
            _ => {}
        }
        let kind = match &error {
            CaptureError::Freeze(
                FreezeError::Protected { .. } | FreezeError::AlreadyFrozen { .. },
            ) => ErrorKind::Unsafe,
            CaptureError::Cancelled => ErrorKind::Cancelled,
            CaptureError::NotQuiet { .. }
            | CaptureError::NotConverging { .. }
            | CaptureError::FreezeTooLong { .. }
            | CaptureError::FrozenButMoving { .. } => ErrorKind::Conflict,
            _ => ErrorKind::Internal,
        };
        Failed::new(kind, &error)
    }
}

/// The newest layer of a volume: usually in the newest manifest, but a volume may have been away.
fn newest_of(
    store: &crate::layer::LayerStore,
    group: &str,
    head: &crate::layer::GroupManifest,
    volume: &str,
) -> Option<crate::layer::VolumeLayer> {
    head.volume(volume).cloned().or_else(|| {
        store
            .volume_head(group, volume)
            .ok()
            .flatten()
            .map(|layer| layer.layer().clone())
    })
}

fn open(entry: &Entry) -> Result<Readers, Failed> {
    let spec = VolumeSpec {
        path: entry.volume.path.clone(),
        offset: 0,
        len: Some(entry.volume.bytes()),
    };
    let open =
        |options| open_reader(&spec, options).map_err(|e| Failed::new(ErrorKind::Internal, &e));
    Ok(Readers {
        background: open(ReadOptions::BACKGROUND)?,
        urgent: open(ReadOptions::URGENT)?,
    })
}
