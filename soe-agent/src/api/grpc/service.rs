//! The calls.

use std::sync::Arc;

use futures::StreamExt;
use futures::future::ready;
use futures::stream::{self, BoxStream};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::span::{Effect, Span};
use super::status::{caller, to_status};
use crate::api::audit::{Audit, Caller, Entry, Outcome};
use crate::api::convert::{self, WireError};
use crate::api::engine::{Engine, EngineError, Reply, StreamReply, WhichModel};
use crate::api::pb::snapshot_orchestration_server::SnapshotOrchestration;
use crate::api::types::{
    Event, EventQuery, GroupSpec, GroupUpdate, HostUpdate, RestorePhase, RestoreProgress,
    RestoreRequest, VerifyEvent,
};
use crate::api::{pb, validate};
use crate::metrics::Metrics;
use crate::seam::{ByteRange, Clock};

/// Extents in one message of a difference.
const EXTENTS_PER_CHUNK: usize = 4096;

/// What the service needs; shared by every call.
#[derive(Clone)]
pub struct Service {
    engine: Arc<dyn Engine>,
    audit: Arc<Audit>,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
    /// Becomes true when the daemon stops, to end streams that would never end.
    stopping: watch::Receiver<bool>,
}

type Streamed<T> = Result<Response<BoxStream<'static, Result<T, Status>>>, Status>;

impl Service {
    /// A service over `engine`. Streams end when `stopping` becomes true.
    pub fn new(
        engine: Arc<dyn Engine>,
        audit: Arc<Audit>,
        metrics: Arc<Metrics>,
        clock: Arc<dyn Clock>,
        stopping: watch::Receiver<bool>,
    ) -> Self {
        Self {
            engine,
            audit,
            metrics,
            clock,
            stopping,
        }
    }

    fn span(&self, call: &'static str, effect: Effect, caller: Caller, subject: &str) -> Span {
        let entry = (effect != Effect::Reads).then(|| Entry {
            at: 0,
            caller,
            call: call.to_owned(),
            subject: subject.to_owned(),
            outcome: Outcome::Started,
        });
        let span = Span {
            audit: self.audit.clone(),
            metrics: self.metrics.clone(),
            clock: self.clock.clone(),
            entry,
            call,
            ended: false,
        };
        if effect == Effect::Works {
            span.line(Outcome::Started);
        }
        span
    }

    /// Answers with what `work` gives. It is only begun when the arguments passed their check: an
    /// engine may do part of its work before the first poll.
    async fn unary<'a, T, P>(
        &'a self,
        span: Span,
        checked: Result<(), EngineError>,
        work: impl FnOnce() -> Reply<'a, T>,
    ) -> Result<Response<P>, Status>
    where
        P: From<T>,
    {
        let result = match checked {
            Ok(()) => work().await,
            Err(error) => Err(error),
        };
        span.end(result.as_ref().err());
        result
            .map(|value| Response::new(P::from(value)))
            .map_err(to_status)
    }

    /// Runs a stream. `is_last` tells the item after which the work is done; without it the work is
    /// done when the stream ends.
    async fn stream<'a, T, P>(
        &'a self,
        span: Span,
        checked: Result<(), EngineError>,
        work: impl FnOnce() -> StreamReply<'a, T>,
        is_last: Option<fn(&T) -> bool>,
    ) -> Streamed<P>
    where
        T: Send + 'static,
        P: From<T> + Send + 'static,
    {
        let begun = match checked {
            Ok(()) => work().await,
            Err(error) => Err(error),
        };
        let items = match begun {
            Ok(items) => items,
            Err(error) => {
                span.end(Some(&error));
                return Err(to_status(error));
            }
        };
        let mut stopping = self.stopping.clone();
        let stop = async move {
            // An error means that the sender is gone, which is the end as well.
            let _ = stopping.wait_for(|stop| *stop).await;
        };
        let mut span = Some(span);
        let mut end = move |error: Option<&EngineError>| {
            if let Some(span) = span.take() {
                span.end(error);
            }
        };
        let with_end = items
            .take_until(Box::pin(stop))
            .map(Some)
            .chain(stream::once(ready(None)));
        let sent = with_end.filter_map(move |item| {
            ready(match item {
                Some(Ok(value)) => {
                    if is_last.is_some_and(|is_last| is_last(&value)) {
                        end(None);
                    }
                    Some(Ok(P::from(value)))
                }
                Some(Err(error)) => {
                    end(Some(&error));
                    Some(Err(to_status(error)))
                }
                None => {
                    if is_last.is_none() {
                        end(None);
                    }
                    None
                }
            })
        });
        Ok(Response::new(sent.boxed()))
    }
}

fn some(text: String) -> Option<String> {
    Some(text).filter(|t| !t.is_empty())
}

/// Converts a message, or ends the call with what is wrong with it.
macro_rules! read {
    ($message:expr) => {
        match $message.try_into() {
            Ok(value) => value,
            Err(error) => return Err(to_status(EngineError::from(WireError::from(error)))),
        }
    };
}

#[tonic::async_trait]
impl SnapshotOrchestration for Service {
    async fn create_snapshot_group(
        &self,
        request: Request<pb::CreateSnapshotGroupRequest>,
    ) -> Result<Response<pb::GroupStatus>, Status> {
        let caller = caller(&request);
        let spec: GroupSpec = read!(request.into_inner());
        let span = self.span("CreateSnapshotGroup", Effect::Changes, caller, &spec.name);
        self.unary(span, validate::group_spec(&spec), || {
            self.engine.create_group(spec)
        })
        .await
    }

    async fn get_snapshot_group_status(
        &self,
        request: Request<pb::GetSnapshotGroupStatusRequest>,
    ) -> Result<Response<pb::GroupStatus>, Status> {
        let span = self.span(
            "GetSnapshotGroupStatus",
            Effect::Reads,
            caller(&request),
            "",
        );
        let name = request.into_inner().group_name;
        self.unary(span, validate::group_name(&name), || {
            self.engine.group_status(name)
        })
        .await
    }

    async fn update_snapshot_group(
        &self,
        request: Request<pb::UpdateSnapshotGroupRequest>,
    ) -> Result<Response<pb::GroupStatus>, Status> {
        let caller = caller(&request);
        let update: GroupUpdate = read!(request.into_inner());
        let span = self.span("UpdateSnapshotGroup", Effect::Changes, caller, &update.name);
        self.unary(span, validate::group_update(&update), || {
            self.engine.update_group(update)
        })
        .await
    }

    async fn list_snapshot_groups(
        &self,
        request: Request<pb::ListSnapshotGroupsRequest>,
    ) -> Result<Response<pb::ListSnapshotGroupsResponse>, Status> {
        let span = self.span("ListSnapshotGroups", Effect::Reads, caller(&request), "");
        self.unary(span, Ok(()), || self.engine.list_groups()).await
    }

    async fn delete_snapshot_group(
        &self,
        request: Request<pb::DeleteSnapshotGroupRequest>,
    ) -> Result<Response<pb::DeleteSnapshotGroupResponse>, Status> {
        let caller = caller(&request);
        let pb::DeleteSnapshotGroupRequest {
            group_name,
            delete_layers,
        } = request.into_inner();
        let span = self.span("DeleteSnapshotGroup", Effect::Changes, caller, &group_name);
        let checked = validate::group_name(&group_name);
        self.unary(span, checked, || {
            self.engine.delete_group(group_name, delete_layers)
        })
        .await
    }

    async fn set_host_metadata(
        &self,
        request: Request<pb::SetHostMetadataRequest>,
    ) -> Result<Response<pb::GroupStatus>, Status> {
        let caller = caller(&request);
        let update: HostUpdate = read!(request.into_inner());
        let span = self.span("SetHostMetadata", Effect::Changes, caller, &update.group);
        self.unary(span, validate::host_update(&update), || {
            self.engine.set_host_metadata(update)
        })
        .await
    }

    async fn capture_layer(
        &self,
        request: Request<pb::CaptureLayerRequest>,
    ) -> Result<Response<pb::CaptureLayerResponse>, Status> {
        let caller = caller(&request);
        let pb::CaptureLayerRequest { group_name, kind } = request.into_inner();
        let kind = convert::layer_kind_from_pb(kind).map_err(|e| to_status(e.into()))?;
        let span = self.span("CaptureLayer", Effect::Works, caller, &group_name);
        let checked = validate::group_name(&group_name);
        self.unary(span, checked, || self.engine.capture(group_name, kind))
            .await
    }

    async fn list_layers(
        &self,
        request: Request<pb::ListLayersRequest>,
    ) -> Result<Response<pb::ListLayersResponse>, Status> {
        let span = self.span("ListLayers", Effect::Reads, caller(&request), "");
        let pb::ListLayersRequest { group_name, volume } = request.into_inner();
        let checked = validate::group_name(&group_name);
        self.unary(span, checked, || {
            self.engine.list_layers(group_name, some(volume))
        })
        .await
    }

    async fn show_layer(
        &self,
        request: Request<pb::ShowLayerRequest>,
    ) -> Result<Response<pb::LayerDetail>, Status> {
        let span = self.span("ShowLayer", Effect::Reads, caller(&request), "");
        let id = request.into_inner().id;
        self.unary(span, validate::name("layer", &id), || {
            self.engine.show_layer(id)
        })
        .await
    }

    type VerifyLayersStream = BoxStream<'static, Result<pb::VerifyEvent, Status>>;

    async fn verify_layers(
        &self,
        request: Request<pb::VerifyLayersRequest>,
    ) -> Streamed<pb::VerifyEvent> {
        let span = self.span("VerifyLayers", Effect::Reads, caller(&request), "");
        let pb::VerifyLayersRequest { group_name, volume } = request.into_inner();
        let checked = validate::group_name(&group_name);
        let is_last: fn(&VerifyEvent) -> bool = |e| matches!(e, VerifyEvent::Summary { .. });
        self.stream(
            span,
            checked,
            || self.engine.verify_layers(group_name, some(volume)),
            Some(is_last),
        )
        .await
    }

    type DiffLayersStream = BoxStream<'static, Result<pb::DiffChunk, Status>>;

    async fn diff_layers(
        &self,
        request: Request<pb::DiffLayersRequest>,
    ) -> Streamed<pb::DiffChunk> {
        let span = self.span("DiffLayers", Effect::Reads, caller(&request), "");
        let pb::DiffLayersRequest {
            group_name,
            volume,
            from_layer,
            to_layer,
        } = request.into_inner();
        let checked = validate::group_name(&group_name)
            .and_then(|()| validate::name("volume", &volume))
            .and_then(|()| validate::name("layer", &from_layer))
            .and_then(|()| validate::name("layer", &to_layer));
        let work = move || {
            self.engine
                .diff_layers(group_name, volume, from_layer, to_layer)
        };
        let bounded = || -> StreamReply<'_, Vec<ByteRange>> {
            Box::pin(async move {
                let pieces = work().await?;
                Ok(pieces.flat_map(split_piece).boxed())
            })
        };
        self.stream(span, checked, bounded, None).await
    }

    type RestoreStream = BoxStream<'static, Result<pb::RestoreProgress, Status>>;

    async fn restore(&self, request: Request<pb::RestoreRequest>) -> Streamed<pb::RestoreProgress> {
        let caller = caller(&request);
        let request = RestoreRequest::from(request.into_inner());
        let subject = format!(
            "{} {} to {}",
            request.group,
            request.volume,
            request.target.display()
        );
        let span = self.span("Restore", Effect::Works, caller, &subject);
        let is_last: fn(&RestoreProgress) -> bool = |p| p.phase == RestorePhase::Done;
        self.stream(
            span,
            validate::restore(&request),
            || self.engine.restore(request),
            Some(is_last),
        )
        .await
    }

    async fn list_volumes(
        &self,
        request: Request<pb::ListVolumesRequest>,
    ) -> Result<Response<pb::ListVolumesResponse>, Status> {
        let span = self.span("ListVolumes", Effect::Reads, caller(&request), "");
        self.unary(span, Ok(()), || self.engine.list_volumes())
            .await
    }

    async fn trace_record(
        &self,
        request: Request<pb::TraceRecordRequest>,
    ) -> Result<Response<pb::TraceRecordResponse>, Status> {
        let caller = caller(&request);
        let pb::TraceRecordRequest {
            volume,
            duration_ms,
        } = request.into_inner();
        let duration = std::time::Duration::from_millis(duration_ms);
        let span = self.span("TraceRecord", Effect::Works, caller, &volume);
        let checked =
            validate::name("volume", &volume).and_then(|()| validate::recording(duration));
        self.unary(span, checked, || self.engine.record_trace(volume, duration))
            .await
    }

    async fn forecast(
        &self,
        request: Request<pb::ForecastRequest>,
    ) -> Result<Response<pb::ForecastReport>, Status> {
        let span = self.span("Forecast", Effect::Reads, caller(&request), "");
        let pb::ForecastRequest { volume, horizon_s } = request.into_inner();
        let horizon = std::time::Duration::from_secs(horizon_s);
        let checked = validate::name("volume", &volume).and_then(|()| validate::horizon(horizon));
        self.unary(span, checked, || self.engine.forecast(volume, horizon))
            .await
    }

    async fn model_show(
        &self,
        request: Request<pb::ModelRequest>,
    ) -> Result<Response<pb::ModelReport>, Status> {
        let span = self.span("ModelShow", Effect::Reads, caller(&request), "");
        self.unary(span, Ok(()), || {
            self.engine.model_show(some(request.into_inner().volume))
        })
        .await
    }

    async fn model_train(
        &self,
        request: Request<pb::ModelRequest>,
    ) -> Result<Response<pb::ModelReport>, Status> {
        let caller = caller(&request);
        let volume = request.into_inner().volume;
        let span = self.span("ModelTrain", Effect::Works, caller, &volume);
        self.unary(span, Ok(()), || self.engine.model_train(some(volume)))
            .await
    }

    async fn model_backtest(
        &self,
        request: Request<pb::ModelRequest>,
    ) -> Result<Response<pb::ModelReport>, Status> {
        let span = self.span("ModelBacktest", Effect::Reads, caller(&request), "");
        self.unary(span, Ok(()), || {
            self.engine
                .model_backtest(some(request.into_inner().volume))
        })
        .await
    }

    async fn model_serve(
        &self,
        request: Request<pb::ModelServeRequest>,
    ) -> Result<Response<pb::ModelReport>, Status> {
        use pb::model_serve_request::Which;
        let caller = caller(&request);
        let which = request.into_inner().which;
        let which = match which {
            Some(Which::Version(number)) => WhichModel::Version(number),
            Some(Which::Shipped(true)) => WhichModel::Shipped,
            Some(Which::Before(true)) => WhichModel::Before,
            _ => return Err(to_status(WireError::Missing { field: "which" }.into())),
        };
        let span = self.span("ModelServe", Effect::Changes, caller, "");
        self.unary(span, Ok(()), || self.engine.model_serve(which))
            .await
    }

    async fn publish_event(
        &self,
        request: Request<pb::PublishEventRequest>,
    ) -> Result<Response<pb::PublishEventResponse>, Status> {
        let caller = caller(&request);
        let event = request.into_inner().event;
        let event = event.ok_or_else(|| to_status(WireError::Missing { field: "event" }.into()))?;
        let event: Event = read!(event);
        let span = self.span(
            "PublishEvent",
            Effect::Changes,
            caller,
            &format!("{} {}", event.source, event.id),
        );
        self.unary(span, validate::event(&event), || {
            self.engine.publish_event(event)
        })
        .await
    }

    async fn list_events(
        &self,
        request: Request<pb::ListEventsRequest>,
    ) -> Result<Response<pb::ListEventsResponse>, Status> {
        let span = self.span("ListEvents", Effect::Reads, caller(&request), "");
        let pb::ListEventsRequest {
            since_unix_ns,
            limit,
        } = request.into_inner();
        let limit = if limit == 0 {
            100
        } else {
            limit.min(100_000) as usize
        };
        self.unary(span, Ok(()), || {
            self.engine.list_events(EventQuery {
                since: since_unix_ns,
                limit,
            })
        })
        .await
    }

    async fn stage_status(
        &self,
        request: Request<pb::StageRequest>,
    ) -> Result<Response<pb::StageReport>, Status> {
        let span = self.span("StageStatus", Effect::Reads, caller(&request), "");
        let volume = request.into_inner().volume;
        self.unary(span, validate::name("volume", &volume), || {
            self.engine.stage_status(volume)
        })
        .await
    }

    async fn stage_now(
        &self,
        request: Request<pb::StageRequest>,
    ) -> Result<Response<pb::StageReport>, Status> {
        let caller = caller(&request);
        let volume = request.into_inner().volume;
        let span = self.span("StageNow", Effect::Works, caller, &volume);
        self.unary(span, validate::name("volume", &volume), || {
            self.engine.stage_now(volume)
        })
        .await
    }

    async fn stage_drop(
        &self,
        request: Request<pb::StageRequest>,
    ) -> Result<Response<pb::StageReport>, Status> {
        let caller = caller(&request);
        let volume = request.into_inner().volume;
        let span = self.span("StageDrop", Effect::Changes, caller, &volume);
        self.unary(span, validate::name("volume", &volume), || {
            self.engine.stage_drop(volume)
        })
        .await
    }

    type WatchStream = BoxStream<'static, Result<pb::WatchItem, Status>>;

    async fn watch(&self, request: Request<pb::WatchRequest>) -> Streamed<pb::WatchItem> {
        let span = self.span("Watch", Effect::Reads, caller(&request), "");
        let group = some(request.into_inner().group_name);
        let checked = group.as_deref().map_or(Ok(()), validate::group_name);
        self.stream(span, checked, || self.engine.watch(group), None)
            .await
    }
}

/// Keeps every message of a difference small, whatever the store hands out.
fn split_piece(
    piece: Result<Vec<ByteRange>, EngineError>,
) -> BoxStream<'static, Result<Vec<ByteRange>, EngineError>> {
    let pieces: Vec<_> = match piece {
        Ok(ranges) => ranges
            .chunks(EXTENTS_PER_CHUNK)
            .map(|chunk| Ok(chunk.to_vec()))
            .collect(),
        Err(error) => vec![Err(error)],
    };
    stream::iter(pieces).boxed()
}
