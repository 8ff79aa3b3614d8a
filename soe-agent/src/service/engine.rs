//! Answers callers: the surface's calls in terms of the agent's parts.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt;
use futures::stream::StreamExt;
use tokio::sync::broadcast;

use super::ServiceError;
use super::agent::{Agent, lock};
use super::report::{layer_detail, layer_info};
use super::state::Group;
use crate::api::engine::{Engine, EngineError, ErrorKind, Reply, StreamReply, WhichModel};
use crate::api::types::*;
use crate::layer::{ErrorClass, LayerError};
use crate::model::{Forecaster, VolumeName};
use crate::observe::volumes;
use crate::restore::RestoreError;
use crate::seam::{ByteRange, ChangeMap, Clock};

fn class(class: ErrorClass) -> ErrorKind {
    match class {
        ErrorClass::Integrity => ErrorKind::Integrity,
        ErrorClass::Refused => ErrorKind::Unsafe,
        _ => ErrorKind::Internal,
    }
}

pub(super) fn layer_error(error: LayerError) -> EngineError {
    let kind = match &error {
        LayerError::NotFound { .. } => ErrorKind::NotFound,
        other => class(other.class()),
    };
    EngineError::new(kind, error.to_string())
}

pub(super) fn restore_error(error: RestoreError) -> EngineError {
    EngineError::new(class(error.class()), error.to_string())
}

pub(super) fn service_error(error: ServiceError) -> EngineError {
    let kind = match &error {
        ServiceError::Tracker(crate::observe::TrackerError::NoVolume { .. }) => {
            ErrorKind::InvalidArgument
        }
        ServiceError::Tracker(crate::observe::TrackerError::Full { .. }) => ErrorKind::Exhausted,
        refusal if refusal.is_refusal() => ErrorKind::Unsafe,
        _ => ErrorKind::Internal,
    };
    EngineError::new(kind, error.to_string())
}

/// Runs blocking work off the async threads.
fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Reply<'static, T> {
    async move {
        tokio::task::spawn_blocking(work).await.map_err(|e| {
            EngineError::new(ErrorKind::Internal, format!("a call ended by a panic: {e}"))
        })?
    }
    .boxed()
}

impl Engine for Arc<Agent> {
    fn not_ready(&self) -> Option<String> {
        (!self.ready.load(Ordering::SeqCst)).then(|| "the agent is starting".into())
    }

    fn create_group(&self, spec: GroupSpec) -> Reply<'_, GroupStatus> {
        let agent = self.clone();
        blocking(move || agent.create(spec))
    }

    fn group_status(&self, name: String) -> Reply<'_, GroupStatus> {
        let agent = self.clone();
        blocking(move || agent.status(&agent.group(&name)?))
    }

    fn update_group(&self, update: GroupUpdate) -> Reply<'_, GroupStatus> {
        let agent = self.clone();
        blocking(move || agent.update(update))
    }

    fn list_groups(&self) -> Reply<'_, Vec<GroupStatus>> {
        let agent = self.clone();
        blocking(move || {
            let groups: Vec<Group> = lock(&agent.state).groups.values().cloned().collect();
            groups.iter().map(|group| agent.status(group)).collect()
        })
    }

    fn delete_group(&self, name: String, delete_layers: bool) -> Reply<'_, u64> {
        let agent = self.clone();
        blocking(move || agent.delete(&name, delete_layers))
    }

    fn set_host_metadata(&self, update: HostUpdate) -> Reply<'_, GroupStatus> {
        let agent = self.clone();
        blocking(move || {
            let mut group = agent.group(&update.group)?;
            let position = group.hosts.iter().position(|host| host.host == update.host);
            let host = match position {
                Some(position) => &mut group.hosts[position],
                None => {
                    group.hosts.push(HostMetadata {
                        host: update.host.clone(),
                        app: None,
                        criticality: Criticality::Normal,
                        p99_target_us: None,
                        rpo_s: None,
                    });
                    group
                        .hosts
                        .last_mut()
                        .ok_or_else(|| EngineError::invalid("no host"))?
                }
            };
            host.app = update.app.or(host.app.take());
            host.criticality = update.criticality.unwrap_or(host.criticality);
            host.p99_target_us = update.p99_target_us.or(host.p99_target_us);
            host.rpo_s = update.rpo_s.or(host.rpo_s);
            agent.keep(group)
        })
    }

    fn capture(&self, group: String, kind: Option<LayerKind>) -> Reply<'_, Vec<LayerInfo>> {
        self.clone().capture_now(group, kind).boxed()
    }

    fn list_layers(&self, group: String, volume: Option<String>) -> Reply<'_, Vec<LayerInfo>> {
        let agent = self.clone();
        blocking(move || {
            let manifests = agent.manifests_of(&group)?;
            let wanted = |name: &str| volume.as_ref().is_none_or(|v| v == name);
            Ok(manifests
                .iter()
                .flat_map(|m| {
                    m.volumes
                        .iter()
                        .filter(|l| wanted(&l.volume))
                        .map(|l| layer_info(m, l))
                })
                .collect())
        })
    }

    fn show_layer(&self, id: String) -> Reply<'_, LayerDetail> {
        let agent = self.clone();
        blocking(move || {
            let found = agent.store.find(&id).map_err(layer_error)?;
            Ok(layer_detail(
                &found.manifest,
                found.layer(),
                agent.config().store.compression.to_string(),
            ))
        })
    }

    fn verify_layers(&self, group: String, volume: Option<String>) -> StreamReply<'_, VerifyEvent> {
        let agent = self.clone();
        async move { agent.start_verify(group, volume) }.boxed()
    }

    fn diff_layers(
        &self,
        group: String,
        volume: String,
        from: String,
        to: String,
    ) -> StreamReply<'_, Vec<ByteRange>> {
        let agent = self.clone();
        async move {
            let ranges = tokio::task::spawn_blocking(move || {
                let image = |id: &str| {
                    let layer = agent.store.find(id).map_err(layer_error)?;
                    agent
                        .store
                        .image(&group, &volume, Some(layer.manifest.sequence))
                        .map_err(layer_error)
                };
                Ok::<_, EngineError>(image(&from)?.index().differences(image(&to)?.index()))
            })
            .await
            .map_err(|e| EngineError::new(ErrorKind::Internal, e.to_string()))??;
            let pages: Vec<Result<Vec<ByteRange>, EngineError>> =
                ranges.chunks(1024).map(|c| Ok(c.to_vec())).collect();
            Ok(futures::stream::iter(pages).boxed())
        }
        .boxed()
    }

    fn restore(&self, request: RestoreRequest) -> StreamReply<'_, RestoreProgress> {
        let agent = self.clone();
        async move {
            tokio::task::spawn_blocking(move || agent.start_restore(request))
                .await
                .map_err(|e| EngineError::new(ErrorKind::Internal, e.to_string()))?
        }
        .boxed()
    }

    fn list_volumes(&self) -> Reply<'_, Vec<VolumeInfo>> {
        let agent = self.clone();
        blocking(move || Ok(agent.list_volumes_now()))
    }

    fn record_trace(&self, volume: String, duration: Duration) -> Reply<'_, TraceReport> {
        let agent = self.clone();
        blocking(move || agent.record_trace_now(&volume, duration))
    }

    fn forecast(&self, volume: String, horizon: Duration) -> Reply<'_, ForecastReport> {
        let agent = self.clone();
        blocking(move || {
            agent.known(&volume)?;
            let name = VolumeName::from(volume.as_str());
            let bins = usize::try_from(horizon.as_nanos() / agent.scale.bin().as_nanos().max(1))
                .unwrap_or(1)
                .max(1);
            let forecast = lock(&agent.mind).mixture.forecast(&name, bins).ok_or_else(|| {
                EngineError::new(ErrorKind::Conflict, format!("nothing was observed of {volume} yet; the first bin of {:?} has to end first", agent.scale.bin()))
            })?;
            let history = lock(&agent.mind)
                .mixture
                .recent(&name, forecast.rows.len())
                .into_iter()
                .map(|(start, load)| LoadPoint { start, load })
                .collect();
            Ok(ForecastReport {
                history,
                predicted: agent.prediction(&volume, agent.clock.now()),
                volume,
                issued_at: forecast.issued_at,
                bin_s: forecast.bin.as_secs(),
                points: forecast
                    .rows
                    .iter()
                    .enumerate()
                    .map(|(index, row)| ForecastPoint {
                        start: forecast.start_of(index),
                        q10: f64::from(row[0]),
                        q50: f64::from(row[1]),
                        q80: f64::from(row[2]),
                        q90: f64::from(row[3]),
                        q95: f64::from(row[4]),
                        q99: f64::from(row[5]),
                        burst_probability: forecast.onset.get(index).map_or(0.0, |p| f64::from(*p)),
                    })
                    .collect(),
            })
        })
    }

    fn model_show(&self, volume: Option<String>) -> Reply<'_, ModelReport> {
        let agent = self.clone();
        blocking(move || agent.model_report(volume))
    }

    fn model_train(&self, volume: Option<String>) -> Reply<'_, ModelReport> {
        let agent = self.clone();
        blocking(move || {
            agent
                .train()
                .map_err(|reason| EngineError::new(ErrorKind::Conflict, reason))?;
            agent.model_report(volume)
        })
    }

    fn model_backtest(&self, volume: Option<String>) -> Reply<'_, ModelReport> {
        let agent = self.clone();
        blocking(move || agent.backtest_models(volume))
    }

    fn model_serve(&self, which: WhichModel) -> Reply<'_, ModelReport> {
        let agent = self.clone();
        blocking(move || {
            agent.serve_model(which)?;
            agent.model_report(None)
        })
    }

    fn publish_event(&self, event: Event) -> Reply<'_, bool> {
        let agent = self.clone();
        blocking(move || agent.take_event(event))
    }

    fn list_events(&self, query: EventQuery) -> Reply<'_, Vec<Event>> {
        let agent = self.clone();
        blocking(move || agent.read_events(query))
    }

    fn stage_status(&self, volume: String) -> Reply<'_, StageReport> {
        let agent = self.clone();
        blocking(move || {
            let entry = agent.known(&volume)?;
            agent.stage_report(&entry).map_err(service_error)
        })
    }

    fn stage_now(&self, volume: String) -> Reply<'_, StageReport> {
        let agent = self.clone();
        blocking(move || {
            let entry = agent.known(&volume)?;
            let Some(area) = &agent.area else {
                return Err(EngineError::new(
                    ErrorKind::Unsupported,
                    "no staging area is configured; set staging.path",
                ));
            };
            let cancels = agent.staging_cancels(&volume);
            agent
                .stage(
                    &volume,
                    &agent.ranked(&entry, area.budget()),
                    area.budget(),
                    cancels,
                )
                .map_err(service_error)?;
            agent.stage_report(&entry).map_err(service_error)
        })
    }

    fn stage_drop(&self, volume: String) -> Reply<'_, StageReport> {
        let agent = self.clone();
        blocking(move || {
            let entry = agent.known(&volume)?;
            if let Some(area) = &agent.area {
                area.drop_volume(&volume);
            }
            agent.stage_report(&entry).map_err(service_error)
        })
    }

    fn watch(&self, group: Option<String>) -> StreamReply<'_, WatchItem> {
        let agent = self.clone();
        async move {
            let volumes = match &group {
                Some(name) => Some(agent.group(name)?.volumes),
                None => None,
            };
            let stream =
                futures::stream::unfold(agent.watch.subscribe(), |mut receiver| async move {
                    match receiver.recv().await {
                        Ok(item) => Some((item, receiver)),
                        Err(broadcast::error::RecvError::Lagged(items)) => {
                            let missed = WatchItem {
                                at: crate::io::SystemClock.now(),
                                event: WatchEvent::Missed { items },
                            };
                            Some((missed, receiver))
                        }
                        Err(broadcast::error::RecvError::Closed) => None,
                    }
                });
            let concerns = move |item: &WatchItem| {
                let of = match &item.event {
                    WatchEvent::Load(load) => &load.volume,
                    WatchEvent::Layer(layer) => &layer.volume,
                    WatchEvent::Decision { volume, .. } | WatchEvent::Tracking { volume, .. } => {
                        volume
                    }
                    WatchEvent::Staging(report) => &report.volume,
                    WatchEvent::Published { .. } | WatchEvent::Missed { .. } => return true,
                };
                volumes.as_ref().is_none_or(|volumes| volumes.contains(of))
            };
            Ok(stream
                .filter(move |item| futures::future::ready(concerns(item)))
                .map(Ok)
                .boxed())
        }
        .boxed()
    }
}

impl Agent {
    fn list_volumes_now(&self) -> Vec<VolumeInfo> {
        let groups = self.volumes_of_groups();
        let mut out = Vec::new();
        for disk in volumes::all_disks() {
            if disk.sectors == 0 {
                continue;
            }
            let path = format!("/dev/{}", disk.name);
            let entry = lock(&self.entries)
                .values()
                .find(|e| e.volume.disk.diskseq == disk.diskseq)
                .cloned();
            let name = entry.as_ref().map_or(path.clone(), |e| e.name.clone());
            let resolved = volumes::resolve(std::path::Path::new(&path));
            out.push(VolumeInfo {
                volume: name.clone(),
                device_id: resolved
                    .as_ref()
                    .map(|v| v.device_id.clone())
                    .unwrap_or_default(),
                kind: volumes::kind(&disk.name).into(),
                size_bytes: disk.sectors * soe_common::SECTOR_SIZE,
                aliases: if name == path { Vec::new() } else { vec![path] },
                members: disk.members(),
                mounts: resolved
                    .as_ref()
                    .map(|v| {
                        volumes::mount_points(v)
                            .iter()
                            .map(|m| m.point.display().to_string())
                            .collect()
                    })
                    .unwrap_or_default(),
                leaf: disk.holders().is_empty(),
                tracked: entry.is_some(),
                tracking: entry.as_ref().map(|e| e.map.tracking().into()),
                group: groups
                    .iter()
                    .find(|(v, _)| *v == name)
                    .map(|(_, g)| g.clone()),
                untrackable: resolved.err().map(|e| e.to_string()),
            });
        }
        out
    }
}
