//! Groups: made, changed, shown, captured on demand.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::agent::{Agent, Entry, lock};
use super::engine::{layer_error, service_error};
use super::report::layer_info;
use super::state::Group;
use crate::api::engine::{EngineError, ErrorKind};
use crate::api::types::{
    GroupSpec, GroupStatus, GroupUpdate, LayerInfo, LayerKind, Prediction, StagingStatus,
    TimeWindow, TrackingState, VolumeStatus,
};
use crate::layer::{GroupManifest, LayerError};
use crate::model::{Forecaster, VolumeName};
use crate::observe::volumes;
use crate::plan;
use crate::seam::{ChangeMap, Clock, Tracking, UnixNanos};

/// How long a call waits for a capture that is already under way before it asks for its own.
const CAPTURE_TURN: Duration = Duration::from_secs(300);

fn seconds(nanos: i64) -> u64 {
    u64::try_from(nanos / 1_000_000_000).unwrap_or(0)
}

impl Agent {
    pub(super) fn group(&self, name: &str) -> Result<Group, EngineError> {
        lock(&self.state).groups.get(name).cloned().ok_or_else(|| {
            EngineError::not_found(format!(
                "there is no group {name}; `soe group list` shows those there are"
            ))
        })
    }

    pub(super) fn known(&self, volume: &str) -> Result<Arc<Entry>, EngineError> {
        if let Some(entry) = self.entry(volume) {
            return Ok(entry);
        }
        if self.volumes_of_groups().iter().any(|(v, _)| v == volume) {
            let why = self.missing(volume).unwrap_or_default();
            return Err(EngineError::new(
                ErrorKind::Conflict,
                format!("{volume} cannot be used now: {why}"),
            ));
        }
        Err(EngineError::not_found(format!(
            "{volume} is in no group, so nothing is known of it; `soe group create` begins that"
        )))
    }

    pub(super) fn create(self: &Arc<Self>, spec: GroupSpec) -> Result<GroupStatus, EngineError> {
        if lock(&self.state).groups.contains_key(&spec.name) {
            return Err(EngineError::new(
                ErrorKind::AlreadyExists,
                format!("there is a group {} already", spec.name),
            ));
        }
        let mut resolved = Vec::new();
        for name in &spec.volumes {
            let volume = volumes::resolve(std::path::Path::new(name))
                .map_err(|e| service_error(e.into()))?;
            if resolved.contains(&volume.rdev) {
                return Err(EngineError::invalid(format!(
                    "{name} names a volume that the group has already"
                )));
            }
            for (other, group) in self.volumes_of_groups() {
                if self
                    .entry(&other)
                    .is_some_and(|entry| entry.volume.rdev == volume.rdev)
                {
                    return Err(EngineError::new(
                        ErrorKind::Conflict,
                        format!(
                            "{name} is in group {group} already (as {other}); a volume has one chain of layers"
                        ),
                    ));
                }
            }
            resolved.push(volume.rdev);
        }
        for name in &spec.volumes {
            self.adopt_new_volume(name).map_err(service_error)?;
        }
        let group = Group {
            name: spec.name.clone(),
            volumes: spec.volumes,
            prediction_enabled: spec.prediction_enabled,
            rpo_s: spec.rpo_s,
            max_pause_us: spec.max_pause_us,
            p99_target_us: spec.p99_target_us,
            app: spec.app,
            criticality: spec.criticality,
            created_at: self.clock.now(),
            hosts: Vec::new(),
            missed_pause_budgets: 0,
        };
        lock(&self.state)
            .groups
            .insert(group.name.clone(), group.clone());
        if let Err(error) = self.save_state() {
            lock(&self.state).groups.remove(&group.name);
            return Err(service_error(error));
        }
        self.tell_brain_of(&group);
        self.status(&group)
    }

    pub(super) fn volumes_of_groups(&self) -> Vec<(String, String)> {
        lock(&self.state)
            .groups
            .values()
            .flat_map(|g| g.volumes.iter().map(|v| (v.clone(), g.name.clone())))
            .collect()
    }

    pub(super) fn update(
        self: &Arc<Self>,
        update: GroupUpdate,
    ) -> Result<GroupStatus, EngineError> {
        let mut group = self.group(&update.name)?;
        group.prediction_enabled = update
            .prediction_enabled
            .unwrap_or(group.prediction_enabled);
        group.rpo_s = update.rpo_s.or(group.rpo_s);
        group.max_pause_us = update.max_pause_us.or(group.max_pause_us);
        group.p99_target_us = update.p99_target_us.or(group.p99_target_us);
        group.app = update.app.or(group.app);
        group.criticality = update.criticality.unwrap_or(group.criticality);
        for name in &update.remove_volumes {
            let before = group.volumes.len();
            group.volumes.retain(|v| v != name);
            if group.volumes.len() == before {
                return Err(EngineError::not_found(format!(
                    "{name} is not in group {}",
                    group.name
                )));
            }
        }
        for name in update.add_volumes {
            if self.volumes_of_groups().iter().any(|(v, _)| *v == name) {
                return Err(EngineError::new(
                    ErrorKind::Conflict,
                    format!("{name} is in a group already"),
                ));
            }
            self.adopt_new_volume(&name).map_err(service_error)?;
            group.volumes.push(name);
        }
        if group.volumes.is_empty() {
            return Err(EngineError::invalid(format!(
                "group {} would be left without volumes; delete it instead",
                group.name
            )));
        }
        self.keep(group)
    }

    pub(super) fn keep(self: &Arc<Self>, group: Group) -> Result<GroupStatus, EngineError> {
        lock(&self.state)
            .groups
            .insert(group.name.clone(), group.clone());
        self.save_state().map_err(service_error)?;
        self.apply(plan::Event::GroupUpdated {
            spec: self.plan_spec(&group),
        });
        self.status(&group)
    }

    pub(super) fn delete(
        self: &Arc<Self>,
        name: &str,
        delete_layers: bool,
    ) -> Result<u64, EngineError> {
        let group = self.group(name)?;
        if delete_layers {
            return Err(EngineError::new(
                ErrorKind::Unsupported,
                format!(
                    "this version does not delete layers; delete group {name} without them, its layers stay in the store"
                ),
            ));
        }
        if lock(&self.mind).brain.capturing(&name.into()) {
            return Err(EngineError::new(
                ErrorKind::Conflict,
                format!("a capture of group {name} is under way; try again when it has ended"),
            ));
        }
        lock(&self.state).groups.remove(name);
        self.save_state().map_err(service_error)?;
        self.apply(plan::Event::GroupDeleted { group: name.into() });
        for volume in &group.volumes {
            if let Some(area) = &self.area {
                area.drop_volume(volume);
            }
            let entry = lock(&self.entries).remove(volume);
            lock(&self.parted).extend(entry);
            // What was measured of it stays in the history, and is learnt from again after a restart.
            let volume = VolumeName::from(volume.as_str());
            lock(&self.mind).mixture.forget(&volume);
            self.apply(plan::Event::VolumeGone { volume });
        }
        self.give_slots_back()
            .map_err(|e| service_error(e.into()))?;
        Ok(self
            .store
            .manifests(name)
            .map(|m| m.len() as u64)
            .unwrap_or(0))
    }

    pub(super) fn status(&self, group: &Group) -> Result<GroupStatus, EngineError> {
        // No lock is held while the volumes are looked at.
        let missed_pause_budgets = lock(&self.state)
            .groups
            .get(&group.name)
            .map_or(0, |g| g.missed_pause_budgets);
        let last_error = lock(&self.errors).get(&group.name).cloned();
        Ok(GroupStatus {
            group: group.name.clone(),
            prediction_enabled: group.prediction_enabled,
            rpo_s: self.rpo(group).as_secs(),
            max_pause_us: u64::try_from(self.max_pause(group).as_micros()).unwrap_or(u64::MAX),
            p99_target_us: group.p99_target_us,
            app: group.app.clone(),
            criticality: group.criticality,
            created_at: group.created_at,
            missed_pause_budgets,
            last_error,
            hosts: group.hosts.clone(),
            volumes: group
                .volumes
                .iter()
                .map(|volume| self.volume_status(group, volume))
                .collect::<Result<_, _>>()?,
        })
    }

    fn volume_status(&self, group: &Group, name: &str) -> Result<VolumeStatus, EngineError> {
        let layers = self.layers_of(&group.name, name)?;
        let last = layers.last().cloned();
        let baselines = layers
            .iter()
            .filter(|l| l.kind == LayerKind::Baseline)
            .count() as u64;
        let now = self.clock.now();
        let mut status = VolumeStatus {
            volume: name.into(),
            missing: self.missing(name),
            device_id: String::new(),
            size_bytes: last.as_ref().map_or(0, |l| l.volume_bytes),
            generation: None,
            epoch: 0,
            tracking: TrackingState::Detached,
            rescan_reason: None,
            layers: layers.len() as u64,
            baseline_layers: baselines,
            differential_layers: layers.len() as u64 - baselines,
            rpo_s: self.rpo(group).as_secs(),
            rpo_age_s: last.as_ref().map(|l| seconds(now.saturating_sub(l.cut_at))),
            last_layer: last.clone(),
            changed_blocks_pending: None,
            staging: StagingStatus::default(),
            predicted: self.prediction(name, now),
            last_decision: None,
        };
        let Some(entry) = self.entry(name) else {
            return Ok(status);
        };
        let generation = entry.map.generation();
        let tracking = entry.map.tracking();
        status.device_id = entry.volume.device_id.clone();
        status.size_bytes = entry.volume.bytes();
        status.generation = Some(generation);
        status.epoch = u64::from(entry.map.epoch().0);
        status.tracking = tracking.into();
        status.last_decision = lock(&entry.last_decision).clone();
        let base = self.store.volume_head(&group.name, name).ok().flatten();
        status.rescan_reason = match (tracking, &base) {
            (Tracking::Tainted(reason), _) => Some(reason),
            (_, Some(base)) if base.layer().generation != generation => Some(*lock(&entry.reason)),
            _ => None,
        };
        if let (Some(base), None, Tracking::Complete) = (&base, status.rescan_reason, tracking) {
            let changed = entry
                .map
                .changed_since(base.layer().since_epoch)
                .map_err(|e| service_error(e.into()))?;
            let unit = u64::from(entry.map.block_size());
            status.changed_blocks_pending =
                Some(changed.iter().map(|r| r.len.div_ceil(unit)).sum());
        }
        status.staging = self.stage_report(&entry).map_err(service_error)?.status;
        Ok(status)
    }

    pub(super) fn prediction(&self, volume: &str, now: UnixNanos) -> Prediction {
        let name = VolumeName::from(volume);
        let mind = lock(&self.mind);
        let serving = mind.mixture.serving(&name);
        let Some(predicted) = mind.brain.predicted(&name, now) else {
            return Prediction::default();
        };
        Prediction {
            load_now: predicted.load_now,
            next_burst_at: predicted.next_burst_at,
            burst_probability: Some(predicted.burst_probability),
            next_low_window: predicted
                .next_low_window
                .map(|(start, end)| TimeWindow { start, end }),
            model: predicted.model.map(|m| m.to_string()),
            model_reason: serving.map(|s| s.why),
        }
    }

    /// The readable manifests of a group, oldest first. A group may exist without layers, and its
    /// layers without the group.
    pub(super) fn manifests_of(&self, group: &str) -> Result<Vec<Arc<GroupManifest>>, EngineError> {
        match self.store.manifests(group) {
            Ok(manifests) => Ok(manifests),
            Err(LayerError::NotFound { .. }) => self.group(group).map(|_| Vec::new()),
            Err(error) => Err(layer_error(error)),
        }
    }

    fn layers_of(&self, group: &str, volume: &str) -> Result<Vec<LayerInfo>, EngineError> {
        let layers = match self.store.layers(group, volume) {
            Ok(layers) => layers,
            Err(LayerError::NotFound { .. }) => Vec::new(),
            Err(error) => return Err(layer_error(error)),
        };
        Ok(layers
            .iter()
            .map(|l| layer_info(&l.manifest, l.layer()))
            .collect())
    }

    /// Asks for a capture and waits for its end. A capture that is under way has its cut behind it
    /// perhaps, so it does not count: the call waits for its turn. A differential that began just
    /// before a baseline was asked for answers all who wait, but is none: then the call asks again.
    pub(super) async fn capture_now(
        self: Arc<Self>,
        group: String,
        kind: Option<LayerKind>,
    ) -> Result<Vec<LayerInfo>, EngineError> {
        self.group(&group)?;
        let began = self.clock.monotonic();
        loop {
            let layers = self.clone().capture_once(group.clone(), kind).await?;
            let other = |layer: &LayerInfo| layer.kind != LayerKind::Baseline;
            if kind != Some(LayerKind::Baseline) || !layers.iter().any(other) {
                return Ok(layers);
            }
            if self.clock.monotonic() - began > CAPTURE_TURN {
                return Err(EngineError::new(
                    ErrorKind::Conflict,
                    format!(
                        "differentials of group {group} came first again and again; try again later"
                    ),
                ));
            }
        }
    }

    async fn capture_once(
        self: Arc<Self>,
        group: String,
        kind: Option<LayerKind>,
    ) -> Result<Vec<LayerInfo>, EngineError> {
        let began = self.clock.monotonic();
        while lock(&self.mind).brain.capturing(&group.as_str().into()) {
            if self.clock.monotonic() - began > CAPTURE_TURN || self.stopping() {
                return Err(EngineError::new(
                    ErrorKind::Conflict,
                    format!(
                        "another capture of group {group} goes on for too long; try again later"
                    ),
                ));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let (sender, receiver) = oneshot::channel();
        lock(&self.waiters)
            .entry(group.clone())
            .or_default()
            .push(sender);
        let agent = self.clone();
        let asked = tokio::task::spawn_blocking(move || {
            agent.apply(plan::Event::CaptureRequested {
                group: group.as_str().into(),
                kind: kind.map(|kind| match kind {
                    LayerKind::Baseline => plan::CaptureKind::Baseline,
                    LayerKind::Differential => plan::CaptureKind::Differential,
                }),
            });
        });
        let gone = || {
            EngineError::new(
                ErrorKind::Cancelled,
                "the agent is stopping; the blocks stay marked".to_string(),
            )
        };
        asked.await.map_err(|_| gone())?;
        receiver.await.map_err(|_| gone())?
    }
}
