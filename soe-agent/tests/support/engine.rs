//! An [`Engine`] that keeps groups and events in memory and fails when it is told to.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use soe_agent::api::engine::{Engine, EngineError, ErrorKind, Reply, StreamReply, WhichModel};
use soe_agent::api::types::*;
use soe_agent::seam::ByteRange;

use super::samples;

#[derive(Default)]
pub struct MemoryEngine {
    groups: Mutex<BTreeMap<String, GroupStatus>>,
    pub events: Mutex<Vec<Event>>,
    /// The next call fails so.
    pub failure: Mutex<Option<EngineError>>,
    pub not_ready: Mutex<Option<String>>,
    /// What a verification finds.
    pub problems: Mutex<Vec<String>>,
    /// Restores break off before the end.
    pub break_off: Mutex<bool>,
    pub last_restore: Mutex<Option<RestoreRequest>>,
    pub last_spec: Mutex<Option<GroupSpec>>,
    pub last_kind: Mutex<Option<Option<LayerKind>>>,
}

impl MemoryEngine {
    pub fn fail_next(&self, kind: ErrorKind, message: &str) {
        *self.failure.lock().unwrap() = Some(EngineError::new(kind, message));
    }

    fn answer<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, EngineError>,
    ) -> Reply<'_, T> {
        let result = match self.failure.lock().unwrap().take() {
            Some(error) => Err(error),
            None => work(),
        };
        Box::pin(async move { result })
    }

    fn stream<T: Send + 'static>(&self, items: Vec<Result<T, EngineError>>) -> StreamReply<'_, T> {
        self.answer(|| Ok(stream::iter(items).boxed()))
    }

    fn group(&self, name: &str) -> Result<GroupStatus, EngineError> {
        let groups = self.groups.lock().unwrap();
        groups.get(name).cloned().ok_or_else(|| {
            EngineError::not_found(format!("there is no group {name}; see `soe group list`"))
        })
    }
}

impl Engine for MemoryEngine {
    fn not_ready(&self) -> Option<String> {
        self.not_ready.lock().unwrap().clone()
    }

    fn create_group(&self, spec: GroupSpec) -> Reply<'_, GroupStatus> {
        self.answer(|| {
            *self.last_spec.lock().unwrap() = Some(spec.clone());
            let mut groups = self.groups.lock().unwrap();
            if groups.contains_key(&spec.name) {
                return Err(EngineError::new(
                    ErrorKind::AlreadyExists,
                    format!("there is a group {} already", spec.name),
                ));
            }
            let mut status = samples::group(&spec.name, &spec.volumes);
            status.prediction_enabled = spec.prediction_enabled;
            groups.insert(spec.name, status.clone());
            Ok(status)
        })
    }

    fn group_status(&self, name: String) -> Reply<'_, GroupStatus> {
        self.answer(|| self.group(&name))
    }

    fn update_group(&self, update: GroupUpdate) -> Reply<'_, GroupStatus> {
        self.answer(|| {
            let mut status = self.group(&update.name)?;
            status.rpo_s = update.rpo_s.unwrap_or(status.rpo_s);
            status.prediction_enabled = update
                .prediction_enabled
                .unwrap_or(status.prediction_enabled);
            self.groups
                .lock()
                .unwrap()
                .insert(update.name, status.clone());
            Ok(status)
        })
    }

    fn list_groups(&self) -> Reply<'_, Vec<GroupStatus>> {
        self.answer(|| Ok(self.groups.lock().unwrap().values().cloned().collect()))
    }

    fn delete_group(&self, name: String, delete_layers: bool) -> Reply<'_, u64> {
        self.answer(|| {
            self.group(&name)?;
            self.groups.lock().unwrap().remove(&name);
            Ok(if delete_layers { 5 } else { 0 })
        })
    }

    fn set_host_metadata(&self, update: HostUpdate) -> Reply<'_, GroupStatus> {
        self.answer(|| self.group(&update.group))
    }

    fn capture(&self, group: String, kind: Option<LayerKind>) -> Reply<'_, Vec<LayerInfo>> {
        self.answer(|| {
            *self.last_kind.lock().unwrap() = Some(kind);
            Ok(self
                .group(&group)?
                .volumes
                .iter()
                .map(|v| samples::layer(&v.volume, 6))
                .collect())
        })
    }

    fn list_layers(&self, group: String, volume: Option<String>) -> Reply<'_, Vec<LayerInfo>> {
        self.answer(|| {
            let group = self.group(&group)?;
            let names = group.volumes.iter().map(|v| v.volume.clone());
            let names = names.filter(|v| volume.as_ref().is_none_or(|only| only == v));
            Ok(names
                .flat_map(|v| (1..=2).map(move |n| samples::layer(&v, n)))
                .collect())
        })
    }

    fn show_layer(&self, _id: String) -> Reply<'_, LayerDetail> {
        self.answer(|| Ok(samples::layer_detail()))
    }

    fn verify_layers(
        &self,
        _group: String,
        _volume: Option<String>,
    ) -> StreamReply<'_, VerifyEvent> {
        let problems = self.problems.lock().unwrap().clone();
        let mut items = vec![Ok(VerifyEvent::Progress {
            layer: "layer-1".into(),
            bytes_checked: 5,
            bytes_total: 10,
        })];
        items.extend(problems.iter().map(|what| {
            Ok(VerifyEvent::Problem {
                layer: "layer-1".into(),
                volume: "/dev/loop0".into(),
                what: what.clone(),
            })
        }));
        let problems = problems.len() as u64;
        items.push(Ok(VerifyEvent::Summary {
            layers: 2,
            blocks: 3,
            bytes: 10,
            problems,
        }));
        self.stream(items)
    }

    fn diff_layers(
        &self,
        _g: String,
        _v: String,
        _from: String,
        _to: String,
    ) -> StreamReply<'_, Vec<ByteRange>> {
        let many = (0..10_000)
            .map(|i| ByteRange::new(i * 131_072, 65_536))
            .collect();
        self.stream(vec![Ok(many), Ok(vec![ByteRange::new(1 << 40, 4096)])])
    }

    fn restore(&self, request: RestoreRequest) -> StreamReply<'_, RestoreProgress> {
        *self.last_restore.lock().unwrap() = Some(request);
        let step = |phase, bytes_done| {
            Ok(RestoreProgress {
                phase,
                layer: "layer-2".into(),
                bytes_total: 100,
                bytes_done,
                bytes_written: bytes_done / 2,
                bytes_from_staging: bytes_done / 4,
                bytes_equal: bytes_done / 4,
                bytes_zeroed: 0,
            })
        };
        let mut steps = vec![
            step(RestorePhase::Planning, 0),
            step(RestorePhase::Writing, 60),
        ];
        if !*self.break_off.lock().unwrap() {
            steps.push(step(RestorePhase::Done, 100));
        }
        self.stream(steps)
    }

    fn list_volumes(&self) -> Reply<'_, Vec<VolumeInfo>> {
        self.answer(|| Ok(vec![samples::volume_info()]))
    }

    fn record_trace(&self, _volume: String, _duration: Duration) -> Reply<'_, TraceReport> {
        self.answer(|| Ok(samples::trace()))
    }

    fn forecast(&self, _volume: String, _horizon: Duration) -> Reply<'_, ForecastReport> {
        self.answer(|| Ok(samples::forecast()))
    }

    fn model_show(&self, _volume: Option<String>) -> Reply<'_, ModelReport> {
        self.answer(|| Ok(samples::model()))
    }

    fn model_train(&self, _volume: Option<String>) -> Reply<'_, ModelReport> {
        self.answer(|| Ok(samples::model()))
    }

    fn model_backtest(&self, _volume: Option<String>) -> Reply<'_, ModelReport> {
        self.answer(|| Ok(samples::model()))
    }

    fn model_serve(&self, _which: WhichModel) -> Reply<'_, ModelReport> {
        self.answer(|| Ok(samples::model()))
    }

    fn publish_event(&self, event: Event) -> Reply<'_, bool> {
        self.answer(|| {
            let mut events = self.events.lock().unwrap();
            let known = events
                .iter()
                .any(|e| (&e.source, &e.id) == (&event.source, &event.id));
            if !known {
                events.push(event);
            }
            Ok(!known)
        })
    }

    fn list_events(&self, query: EventQuery) -> Reply<'_, Vec<Event>> {
        self.answer(|| {
            Ok(self
                .events
                .lock()
                .unwrap()
                .iter()
                .rev()
                .take(query.limit)
                .cloned()
                .collect())
        })
    }

    fn stage_status(&self, volume: String) -> Reply<'_, StageReport> {
        self.answer(|| {
            Ok(StageReport {
                volume,
                status: samples::staging(),
            })
        })
    }

    fn stage_now(&self, volume: String) -> Reply<'_, StageReport> {
        self.stage_status(volume)
    }

    fn stage_drop(&self, volume: String) -> Reply<'_, StageReport> {
        self.answer(|| {
            Ok(StageReport {
                volume,
                status: StagingStatus::default(),
            })
        })
    }

    /// Everything once, then nothing for ever.
    fn watch(&self, _group: Option<String>) -> StreamReply<'_, WatchItem> {
        let items = samples::watch_events().into_iter().map(|event| {
            Ok(WatchItem {
                at: samples::T0,
                event,
            })
        });
        let endless = stream::iter(items.collect::<Vec<_>>()).chain(stream::pending());
        self.answer(|| Ok(endless.boxed()))
    }
}
