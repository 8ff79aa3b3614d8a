//! Carries out restores and verifications for callers.

use std::ops::ControlFlow;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

use futures::stream::{BoxStream, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::agent::Agent;
use super::engine::{layer_error, restore_error};
use crate::api::engine::{EngineError, ErrorKind};
use crate::api::types::{RestorePhase, RestorePoint, RestoreProgress, RestoreRequest, VerifyEvent};
use crate::layer::{LayerError, LayerRef, VerifyReport};
use crate::restore::{
    DeviceTarget, FileTarget, Mode, NoStaging, RestoreStats, StagedBlocks, Target, plan, restore,
};
use crate::stage::area::StageArea;

struct Staged<'a>(&'a StageArea);

impl StagedBlocks for Staged<'_> {
    fn get(&self, hash: &[u8; 32], buf: &mut [u8]) -> bool {
        self.0.read_by_hash(hash, buf)
    }
}

/// Progress messages that may wait for a slow caller.
const BACKLOG: usize = 64;

type Stream<T> = BoxStream<'static, Result<T, EngineError>>;

impl Agent {
    /// The layer that a restore point names.
    fn point(&self, request: &RestoreRequest) -> Result<LayerRef, EngineError> {
        let layers = self
            .store
            .layers(&request.group, &request.volume)
            .map_err(layer_error)?;
        let none = || {
            EngineError::not_found(format!(
                "group {} has no layer of {} at that point; `soe layer list {}` shows what there is",
                request.group, request.volume, request.group
            ))
        };
        match &request.point {
            RestorePoint::Latest => layers.into_iter().next_back().ok_or_else(none),
            RestorePoint::Layer(id) => {
                let found = self.store.find(id).map_err(layer_error)?;
                if found.manifest.group != request.group || found.layer().volume != request.volume {
                    return Err(none());
                }
                Ok(found)
            }
            RestorePoint::At(at) => layers
                .into_iter()
                .rev()
                .find(|l| l.manifest.cut_at <= *at)
                .ok_or_else(none),
        }
    }

    /// Starts a restore on a thread of its own and returns its progress.
    pub(super) fn start_restore(
        self: &Arc<Self>,
        request: RestoreRequest,
    ) -> Result<Stream<RestoreProgress>, EngineError> {
        let layer = self.point(&request)?;
        let (sender, receiver) = mpsc::channel(BACKLOG);
        let agent = self.clone();
        std::thread::Builder::new()
            .name("soe-restore".into())
            .spawn(move || {
                let outcome = agent.restore(&request, &layer, &sender);
                let counted = if outcome.is_ok() { "done" } else { "failed" };
                agent.metrics.restores.with([counted]).inc();
                // A caller that went away has cancelled the restore already.
                let _ = sender.blocking_send(outcome);
            })
            .map_err(|e| {
                EngineError::new(ErrorKind::Internal, format!("no thread for a restore: {e}"))
            })?;
        Ok(ReceiverStream::new(receiver).boxed())
    }

    fn restore(
        &self,
        request: &RestoreRequest,
        layer: &LayerRef,
        sender: &mpsc::Sender<Result<RestoreProgress, EngineError>>,
    ) -> Result<RestoreProgress, EngineError> {
        let id = layer.layer().id.to_string();
        let bytes = layer.layer().volume_bytes;
        let report = |phase, done, stats: RestoreStats| RestoreProgress {
            phase,
            layer: id.clone(),
            bytes_total: bytes,
            bytes_done: done,
            bytes_written: stats.bytes_from_store,
            bytes_from_staging: stats.bytes_from_staging,
            bytes_equal: stats.bytes_unchanged,
            bytes_zeroed: stats.bytes_zeroed,
        };
        let _ = sender.blocking_send(Ok(report(
            RestorePhase::Planning,
            0,
            RestoreStats::default(),
        )));
        let image = self
            .store
            .image(
                &request.group,
                &request.volume,
                Some(layer.manifest.sequence),
            )
            .map_err(layer_error)?;
        let plan = plan(image.index(), &[]);
        let device =
            std::fs::metadata(&request.target).is_ok_and(|meta| meta.file_type().is_block_device());
        let target: Box<dyn Target> = if device {
            Box::new(DeviceTarget::open(&request.target, bytes).map_err(restore_error)?)
        } else {
            Box::new(
                FileTarget::open(&request.target, bytes, request.differential)
                    .map_err(restore_error)?,
            )
        };
        let mode = if request.differential {
            Mode::Differential
        } else {
            Mode::Full
        };
        let staged: Box<dyn StagedBlocks + '_> = match &self.area {
            Some(area) => Box::new(Staged(area)),
            None => Box::new(NoStaging),
        };
        let stats = restore(&image, &plan, &*target, &*staged, mode, &mut |progress| {
            if sender.is_closed() || self.stopping() {
                return ControlFlow::Break(());
            }
            let _ = sender.try_send(Ok(report(
                RestorePhase::Writing,
                progress.bytes_done,
                RestoreStats::default(),
            )));
            ControlFlow::Continue(())
        })
        .map_err(restore_error)?;
        for (source, bytes) in [
            ("layer", stats.bytes_from_store),
            ("staging", stats.bytes_from_staging),
            ("hole", stats.bytes_zeroed),
        ] {
            self.metrics.restore_bytes.with([source]).inc_by(bytes);
        }
        Ok(report(RestorePhase::Done, bytes, stats))
    }

    /// Re-reads and checks all layers of a group on a thread of its own.
    pub(super) fn start_verify(
        self: &Arc<Self>,
        group: String,
        volume: Option<String>,
    ) -> Result<Stream<VerifyEvent>, EngineError> {
        let manifests = self.manifests_of(&group)?;
        let total: u64 = manifests
            .iter()
            .flat_map(|m| &m.volumes)
            .map(|layer| layer.bytes_stored)
            .sum();
        let without_layers = manifests.is_empty();
        let (sender, receiver) = mpsc::channel(BACKLOG);
        let agent = self.clone();
        std::thread::Builder::new()
            .name("soe-verify".into())
            .spawn(move || {
                let outcome = agent.store.verify_with(&group, None, &mut |bytes_checked| {
                    let _ = sender.try_send(Ok(VerifyEvent::Progress {
                        layer: String::new(),
                        bytes_checked,
                        bytes_total: total,
                    }));
                });
                let report = match outcome {
                    Ok(report) => report,
                    Err(LayerError::NotFound { .. }) if without_layers => VerifyReport::default(),
                    Err(error) => {
                        let _ = sender.blocking_send(Err(layer_error(error)));
                        return;
                    }
                };
                let concerns = |d: &&crate::layer::Damage| {
                    volume
                        .as_ref()
                        .is_none_or(|v| d.volume.as_ref().is_none_or(|of| of == v))
                };
                let problems: Vec<_> = report.damages.iter().filter(concerns).collect();
                for damage in &problems {
                    let problem = VerifyEvent::Problem {
                        layer: damage.sequence.map(|s| s.to_string()).unwrap_or_default(),
                        volume: damage.volume.clone().unwrap_or_default(),
                        what: damage.what.clone(),
                    };
                    if sender.blocking_send(Ok(problem)).is_err() {
                        return;
                    }
                }
                let _ = sender.blocking_send(Ok(VerifyEvent::Summary {
                    layers: report.layers,
                    blocks: report.blocks,
                    bytes: report.bytes,
                    problems: problems.len() as u64,
                }));
            })
            .map_err(|e| {
                EngineError::new(
                    ErrorKind::Internal,
                    format!("no thread for a verification: {e}"),
                )
            })?;
        Ok(ReceiverStream::new(receiver).boxed())
    }
}
