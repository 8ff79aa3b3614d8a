//! From a capture to the layer store: what one room calls a cut, the other writes into a manifest.

use soe_common::BlockIndex;

use crate::capture::{self, GroupCut, LayerSink, SinkError, VolumePlan};
use crate::layer::{
    self, CutLevel, CutMethod, GroupManifest, LayerAttempt, LayerSpec, LayerStore, VolumeLayer,
};
use crate::seam::{Clock, GenerationEnd};

/// What the store is told of a volume beside what the capture knows.
pub struct VolumeFacts {
    /// Identity of the device.
    pub device_id: String,
    /// Why the change map could not be used, when it could not.
    pub rescan_reason: Option<GenerationEnd>,
}

/// One attempt at a layer of every volume of a group.
pub struct StoreSink<'a> {
    store: &'a LayerStore,
    group: &'a str,
    clock: &'a dyn Clock,
    facts: Vec<VolumeFacts>,
    kinds: Vec<layer::LayerKind>,
    attempt: Option<LayerAttempt>,
    /// What became durable.
    pub manifest: Option<GroupManifest>,
}

impl<'a> StoreSink<'a> {
    /// A sink for the next layer of `group`; `facts` in the order of its volumes.
    pub fn new(
        store: &'a LayerStore,
        group: &'a str,
        clock: &'a dyn Clock,
        facts: Vec<VolumeFacts>,
    ) -> Self {
        Self {
            store,
            group,
            clock,
            facts,
            kinds: Vec::new(),
            attempt: None,
            manifest: None,
        }
    }
}

fn kind_of(kind: capture::LayerKind) -> layer::LayerKind {
    match kind {
        capture::LayerKind::Baseline => layer::LayerKind::Baseline,
        capture::LayerKind::Differential => layer::LayerKind::Differential,
        capture::LayerKind::Rescan => layer::LayerKind::Rescan,
    }
}

/// The base of a volume's next layer, as its newest durable layer says.
pub fn base_of(newest: &VolumeLayer) -> capture::CutRecord {
    capture::CutRecord {
        generation: newest.generation,
        epoch: newest.cut_epoch,
        since_next: newest.since_epoch,
        misses: newest.misses,
    }
}

fn no_attempt() -> SinkError {
    "the capture did not begin".into()
}

impl LayerSink for StoreSink<'_> {
    fn begin(&mut self, volumes: &[VolumePlan]) -> Result<(), SinkError> {
        self.kinds = volumes.iter().map(|plan| kind_of(plan.kind)).collect();
        let specs = volumes
            .iter()
            .zip(&self.facts)
            .map(|(plan, facts)| LayerSpec {
                volume: plan.volume.clone(),
                device_id: facts.device_id.clone(),
                volume_bytes: plan.volume_bytes,
                block_size: plan.block_size,
                kind: kind_of(plan.kind),
            })
            .collect();
        self.attempt = Some(self.store.begin(self.group, specs)?);
        Ok(())
    }

    fn put_block(
        &mut self,
        volume: usize,
        block: BlockIndex,
        data: &[u8],
    ) -> Result<(), SinkError> {
        let attempt = self.attempt.as_mut().ok_or_else(no_attempt)?;
        match self.kinds.get(volume) {
            Some(layer::LayerKind::Rescan) => attempt.put_if_different(volume, block, data)?,
            _ => attempt.put_block(volume, block, data)?,
        };
        Ok(())
    }

    fn agrees(&self, volume: usize, block: BlockIndex, data: &[u8]) -> Result<bool, SinkError> {
        let attempt = self.attempt.as_ref().ok_or_else(no_attempt)?;
        Ok(attempt.agrees(volume, block, data)?)
    }

    fn commit(&mut self, cut: &GroupCut) -> Result<(), SinkError> {
        let attempt = self.attempt.take().ok_or_else(no_attempt)?;
        let level = cut
            .volumes
            .iter()
            .map(|volume| volume.level)
            .min()
            .unwrap_or(capture::Level::Crash);
        let record = layer::CutRecord {
            level: match level {
                capture::Level::Crash => CutLevel::Crash,
                capture::Level::Filesystem => CutLevel::Filesystem,
                capture::Level::Application => CutLevel::Application,
            },
            method: match cut.method {
                capture::Method::Optimistic => CutMethod::Optimistic,
                capture::Method::Freeze => CutMethod::Freeze,
            },
            pause_us: u64::try_from(cut.pause.as_micros()).unwrap_or(u64::MAX),
            skew_us: u64::try_from(cut.skew.as_micros()).unwrap_or(u64::MAX),
            started_at: cut.started_at,
            cut_at: cut.cut_at,
            finished_at: self.clock.now(),
            volumes: cut
                .volumes
                .iter()
                .zip(&self.facts)
                .map(|(volume, facts)| layer::VolumeCut {
                    generation: volume.record.generation,
                    cut_epoch: volume.record.epoch,
                    since_epoch: volume.record.since_next,
                    rescan_reason: match volume.kind {
                        capture::LayerKind::Rescan => facts.rescan_reason,
                        _ => None,
                    },
                    misses: volume.record.misses,
                    bytes_read: volume.bytes_read,
                })
                .collect(),
        };
        self.manifest = Some(attempt.commit(record)?);
        Ok(())
    }

    fn abort(&mut self) {
        if let Some(attempt) = self.attempt.take() {
            attempt.abort();
        }
    }
}
