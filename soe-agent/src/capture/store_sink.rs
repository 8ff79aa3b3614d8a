//! Captures into the layer store.

use soe_common::BlockIndex;

use super::sink::{LayerSink, SinkError, VolumePlan};
use super::types::{CutRecord, GroupCut, LayerKind, Level, Method};
use crate::layer::{
    CutLevel, CutMethod, CutRecord as StoredCut, GroupManifest, LayerAttempt, LayerKind as Stored,
    LayerSpec, LayerStore, VolumeCut as StoredVolume, VolumeLayer,
};
use crate::seam::{Clock, GenerationEnd, Misses};

/// What the store has to know of a volume that the capture does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreVolume {
    /// The volume's name in the group.
    pub volume: String,
    /// What identifies the device now.
    pub device_id: String,
    /// Why the generation before this one ended; recorded when the layer becomes a rescan.
    pub rescan_reason: Option<GenerationEnd>,
}

/// One attempt at a layer of every volume of a group, in a [`LayerStore`].
pub struct StoreSink<'a> {
    store: &'a LayerStore,
    clock: &'a dyn Clock,
    group: String,
    volumes: Vec<StoreVolume>,
    kinds: Vec<LayerKind>,
    attempt: Option<LayerAttempt>,
    manifest: Option<GroupManifest>,
}

impl<'a> StoreSink<'a> {
    /// An attempt for `group`, whose volumes are in the order of the capture's parts.
    pub fn new(
        store: &'a LayerStore,
        clock: &'a dyn Clock,
        group: impl Into<String>,
        volumes: Vec<StoreVolume>,
    ) -> Self {
        Self {
            store,
            clock,
            group: group.into(),
            volumes,
            kinds: Vec::new(),
            attempt: None,
            manifest: None,
        }
    }

    /// The manifest, once committed.
    pub fn manifest(&self) -> Option<&GroupManifest> {
        self.manifest.as_ref()
    }

    fn attempt(&mut self) -> Result<&mut LayerAttempt, SinkError> {
        let nothing = || "no attempt at a layer was begun".into();
        self.attempt.as_mut().ok_or_else(nothing)
    }
}

impl LayerSink for StoreSink<'_> {
    fn begin(&mut self, plans: &[VolumePlan]) -> Result<(), SinkError> {
        if plans.len() != self.volumes.len() {
            return Err(format!(
                "group {}: {} volumes are captured, the store was told of {}",
                self.group,
                plans.len(),
                self.volumes.len()
            )
            .into());
        }
        let specs = plans
            .iter()
            .zip(&self.volumes)
            .map(|(plan, volume)| LayerSpec {
                volume: volume.volume.clone(),
                device_id: volume.device_id.clone(),
                volume_bytes: plan.volume_bytes,
                block_size: plan.block_size,
                kind: match plan.kind {
                    LayerKind::Baseline => Stored::Baseline,
                    LayerKind::Differential => Stored::Differential,
                    LayerKind::Rescan => Stored::Rescan,
                },
            })
            .collect();
        self.kinds = plans.iter().map(|plan| plan.kind).collect();
        self.attempt = Some(self.store.begin(&self.group, specs)?);
        Ok(())
    }

    fn put_block(
        &mut self,
        volume: usize,
        block: BlockIndex,
        data: &[u8],
    ) -> Result<(), SinkError> {
        let baseline = self.kinds.get(volume) == Some(&LayerKind::Baseline);
        let attempt = self.attempt()?;
        // A block written again with what it held, or only read again, need not be stored again.
        if baseline {
            attempt.put_block(volume, block, data)?;
        } else {
            attempt.put_if_different(volume, block, data)?;
        }
        Ok(())
    }

    fn commit(&mut self, cut: &GroupCut) -> Result<(), SinkError> {
        let stored = StoredCut {
            level: level(cut),
            method: match cut.method {
                Method::Optimistic => CutMethod::Optimistic,
                Method::Freeze => CutMethod::Freeze,
            },
            pause_us: micros(cut.pause),
            skew_us: micros(cut.skew),
            started_at: cut.started_at,
            cut_at: cut.cut_at,
            finished_at: self.clock.now(),
            volumes: cut
                .volumes
                .iter()
                .zip(&self.volumes)
                .map(|(cut, volume)| StoredVolume {
                    generation: cut.record.generation,
                    cut_epoch: cut.record.epoch,
                    since_epoch: cut.record.since_next,
                    rescan_reason: volume
                        .rescan_reason
                        .filter(|_| cut.kind == LayerKind::Rescan),
                    bytes_read: cut.bytes_read,
                })
                .collect(),
        };
        self.attempt()?;
        if let Some(attempt) = self.attempt.take() {
            self.manifest = Some(attempt.commit(stored)?);
        }
        Ok(())
    }

    fn abort(&mut self) {
        if let Some(attempt) = self.attempt.take() {
            attempt.abort();
        }
    }
}

/// The level every volume of the cut has reached.
fn level(cut: &GroupCut) -> CutLevel {
    match cut.volumes.iter().map(|volume| volume.level).min() {
        Some(Level::Application) => CutLevel::Application,
        Some(Level::Filesystem) => CutLevel::Filesystem,
        Some(Level::Crash) | None => CutLevel::Crash,
    }
}

fn micros(time: std::time::Duration) -> u64 {
    // Rounded up: a pause that was is never told as none.
    u64::try_from(time.as_nanos().div_ceil(1000)).unwrap_or(u64::MAX)
}

/// The base of the next layer of a volume: the cut its newest durable layer records.
///
/// The manifest does not say how many marks had been missed at the cut. Taking all misses since
/// tracking was attached for later ones errs on the safe side: more is read again, or a rescan made.
pub fn base_of(layer: &VolumeLayer) -> CutRecord {
    CutRecord {
        generation: layer.generation,
        epoch: layer.cut_epoch,
        since_next: layer.since_epoch,
        misses: Misses::default(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use soe_common::Epoch;
    use uuid::Uuid;

    use super::*;
    use crate::capture::types::VolumeCut;
    use crate::io::SystemClock;
    use crate::layer::StoreOptions;
    use crate::layer::fs::RealFs;

    const BLOCK: u32 = 4096;

    fn plan(kind: LayerKind) -> [VolumePlan; 1] {
        [VolumePlan {
            volume: "/dev/a".into(),
            volume_bytes: 4 * u64::from(BLOCK),
            block_size: BLOCK,
            kind,
        }]
    }

    fn cut(kind: LayerKind, epoch: u32) -> GroupCut {
        GroupCut {
            method: Method::Freeze,
            volumes: vec![VolumeCut {
                volume: "/dev/a".into(),
                volume_bytes: 4 * u64::from(BLOCK),
                kind,
                level: Level::Filesystem,
                record: CutRecord {
                    generation: Uuid::from_u128(7),
                    epoch: Epoch(epoch),
                    since_next: Epoch(epoch - 1),
                    misses: Misses::default(),
                },
                bytes_read: 9,
            }],
            pause: Duration::from_nanos(1500),
            wasted_pause: Duration::ZERO,
            budget_missed: 0,
            skew: Duration::ZERO,
            window: Duration::ZERO,
            started_at: 1,
            cut_at: 2,
            passes: 1,
            tries: 1,
        }
    }

    #[test]
    fn layers_reach_the_store_and_the_next_capture_finds_its_base() {
        let folder = tempfile::tempdir().unwrap();
        let fs = Arc::new(RealFs::create(&folder.path().join("store")).unwrap());
        let store = LayerStore::open(fs, StoreOptions::default()).unwrap();
        let volumes = || {
            vec![StoreVolume {
                volume: "/dev/a".into(),
                device_id: "disk".into(),
                rescan_reason: Some(GenerationEnd::GapBoot),
            }]
        };
        let sink = || StoreSink::new(&store, &SystemClock, "group", volumes());
        let block = |fill: u8| vec![fill; BLOCK as usize];

        let mut baseline = sink();
        assert!(baseline.put_block(0, BlockIndex(0), &block(1)).is_err());
        baseline.begin(&plan(LayerKind::Baseline)).unwrap();
        for index in 0..4 {
            let data = block(index as u8 + 1);
            baseline.put_block(0, BlockIndex(index), &data).unwrap();
        }
        baseline.commit(&cut(LayerKind::Baseline, 5)).unwrap();
        let manifest = baseline.manifest().unwrap().clone();
        let layer = manifest.volume("/dev/a").unwrap();
        assert_eq!(layer.rescan_reason, None);
        let base = base_of(layer);
        assert_eq!((base.epoch, base.since_next), (Epoch(5), Epoch(4)));
        assert_eq!(base.generation, Uuid::from_u128(7));
        drop(baseline);

        let mut given_up = sink();
        given_up.begin(&plan(LayerKind::Differential)).unwrap();
        given_up.put_block(0, BlockIndex(3), &block(77)).unwrap();
        given_up.abort();
        drop(given_up);

        let mut rescan = sink();
        rescan.begin(&plan(LayerKind::Rescan)).unwrap();
        // Block 1 differed for a while and is as before at the cut; block 2 differs.
        for (index, fill) in [(0, 1), (1, 9), (2, 8), (3, 4), (1, 2)] {
            rescan
                .put_block(0, BlockIndex(index), &block(fill))
                .unwrap();
        }
        rescan.commit(&cut(LayerKind::Rescan, 6)).unwrap();
        let manifest = rescan.manifest().unwrap().clone();
        let layer = manifest.volume("/dev/a").unwrap();
        assert_eq!(layer.data_blocks, 1);
        assert_eq!(layer.rescan_reason, Some(GenerationEnd::GapBoot));
        let image = store.image("group", "/dev/a", None).unwrap();
        let mut data = block(0);
        for (index, fill) in [(0, 1), (1, 2), (2, 8), (3, 4)] {
            image.read_block(BlockIndex(index), &mut data).unwrap();
            assert_eq!(data, block(fill), "block {index}");
        }
    }

    #[test]
    fn a_pause_is_rounded_up() {
        assert_eq!(micros(Duration::from_nanos(1)), 1);
        assert_eq!(micros(Duration::from_micros(7)), 7);
        assert_eq!(micros(Duration::ZERO), 0);
    }
}
