//! Captures of small volumes in memory, and the images they must lead to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use soe_common::{BlockIndex, Epoch};
use uuid::Uuid;

use crate::layer::fs::StoreFs;
use crate::layer::*;

pub(crate) const BLOCK: usize = 512;
pub(crate) const GROUP: &str = "db/eu 1";

/// Small segments and identities that differ between seeds but not between runs.
pub(crate) fn options(seed: u64) -> StoreOptions {
    let count = AtomicU64::new(0);
    StoreOptions {
        compression: Compression::Zstd1,
        segment_bytes: 3000,
        read_only: false,
        new_uuid: Arc::new(move || {
            Uuid::from_u64_pair(seed << 32 | count.fetch_add(1, Ordering::Relaxed), seed)
        }),
    }
}

pub(crate) fn open(
    fs: &(impl StoreFs + Clone + 'static),
    seed: u64,
) -> Result<LayerStore, LayerError> {
    LayerStore::open(Arc::new(fs.clone()), options(seed))
}

/// A group's volumes as they are now, and which of their blocks changed since the last capture.
#[derive(Clone)]
pub(crate) struct Volumes {
    pub(crate) images: Vec<Vec<u8>>,
    pub(crate) changed: Vec<BTreeSet<u64>>,
}

impl Volumes {
    /// Volumes of zeroes.
    pub(crate) fn new(sizes: &[usize]) -> Self {
        Self {
            images: sizes.iter().map(|&bytes| vec![0; bytes]).collect(),
            changed: sizes.iter().map(|_| BTreeSet::new()).collect(),
        }
    }

    /// Fills a block with bytes that follow from `content`: 0 are zeroes, odd ones do not compress.
    pub(crate) fn write(&mut self, volume: usize, block: u64, content: u64) {
        let start = block as usize * BLOCK;
        let image = &mut self.images[volume];
        let end = image.len().min(start + BLOCK);
        fill(&mut image[start..end], content);
        self.changed[volume].insert(block);
    }

    /// Writes (volume, block, content) each.
    pub(crate) fn write_all(&mut self, writes: &[(usize, u64, u64)]) {
        for &(volume, block, content) in writes {
            self.write(volume, block, content);
        }
    }

    pub(crate) fn blocks(&self, volume: usize) -> u64 {
        self.images[volume].len().div_ceil(BLOCK) as u64
    }

    pub(crate) fn block(&self, volume: usize, block: u64) -> &[u8] {
        let image = &self.images[volume];
        let start = block as usize * BLOCK;
        &image[start..image.len().min(start + BLOCK)]
    }

    pub(crate) fn specs(&self, kind: LayerKind) -> Vec<LayerSpec> {
        let spec = |(position, image): (usize, &Vec<u8>)| LayerSpec {
            volume: volume_name(position),
            device_id: format!("serial-{position}"),
            volume_bytes: image.len() as u64,
            block_size: BLOCK as u32,
            kind,
        };
        self.images.iter().enumerate().map(spec).collect()
    }

    /// Puts what a layer of `kind` needs.
    pub(crate) fn put(
        &self,
        attempt: &mut LayerAttempt,
        kind: LayerKind,
    ) -> Result<(), LayerError> {
        for volume in 0..self.images.len() {
            match kind {
                LayerKind::Baseline => {
                    for block in 0..self.blocks(volume) {
                        attempt.put_block(volume, BlockIndex(block), self.block(volume, block))?;
                    }
                }
                LayerKind::Differential => {
                    for &block in &self.changed[volume] {
                        attempt.put_block(volume, BlockIndex(block), self.block(volume, block))?;
                    }
                }
                LayerKind::Rescan => {
                    for block in 0..self.blocks(volume) {
                        attempt.put_if_different(
                            volume,
                            BlockIndex(block),
                            self.block(volume, block),
                        )?;
                    }
                }
            }
        }
        Ok(())
    }

    /// One whole capture. The changes are forgotten only when it is committed.
    pub(crate) fn capture(
        &mut self,
        store: &LayerStore,
        kind: LayerKind,
    ) -> Result<GroupManifest, LayerError> {
        let mut attempt = store.begin(GROUP, self.specs(kind))?;
        self.put(&mut attempt, kind)?;
        let manifest = attempt.commit(cut(self.images.len()))?;
        self.changed.iter_mut().for_each(BTreeSet::clear);
        Ok(manifest)
    }
}

pub(crate) fn volume_name(position: usize) -> String {
    format!("/dev/disk{position}")
}

pub(crate) fn fill(bytes: &mut [u8], content: u64) {
    let mut state = content;
    for byte in bytes {
        if content % 2 == 1 {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
        }
        *byte = (state >> 24) as u8 | u8::from(content != 0);
    }
}

pub(crate) fn cut(volumes: usize) -> CutRecord {
    CutRecord {
        level: CutLevel::Filesystem,
        method: CutMethod::Freeze,
        pause_us: 1200,
        skew_us: 3,
        started_at: 1_700_000_000_000_000_000,
        cut_at: 1_700_000_000_500_000_000,
        finished_at: 1_700_000_001_000_000_000,
        volumes: (0..volumes)
            .map(|position| VolumeCut {
                generation: Uuid::from_u128(9),
                cut_epoch: Epoch(7),
                since_epoch: Epoch(6),
                misses: crate::seam::Misses::default(),
                rescan_reason: None,
                bytes_read: position as u64 * 1000,
            })
            .collect(),
    }
}

/// All bytes of a volume at a layer, through the merged index.
pub(crate) fn read(
    store: &LayerStore,
    position: usize,
    sequence: u64,
) -> Result<Vec<u8>, LayerError> {
    let image = store.image(GROUP, &volume_name(position), Some(sequence))?;
    let mut out = Vec::new();
    for block in 0..image.index().block_count() {
        let mut buf = vec![0xaa; image.index().block_range(block).len as usize];
        image.read_block(BlockIndex(block), &mut buf)?;
        out.extend_from_slice(&buf);
    }
    Ok(out)
}

/// Images by sequence number.
pub(crate) type Expected = BTreeMap<u64, Vec<Vec<u8>>>;

/// Every layer that the store has is whole, leads to the image expected, and nothing else lies about.
pub(crate) fn check(store: &LayerStore, expected: &Expected) -> Result<(), String> {
    if store.groups().is_empty() {
        return Ok(());
    }
    let report = store
        .verify(GROUP, None)
        .map_err(|error| error.to_string())?;
    if !report.is_clean() {
        return Err(format!("verify: {:?}", report.damages));
    }
    for manifest in store.manifests(GROUP).map_err(|error| error.to_string())? {
        let sequence = manifest.sequence;
        let images = expected
            .get(&sequence)
            .ok_or(format!("layer {sequence} came from nowhere"))?;
        for (position, image) in images.iter().enumerate() {
            let found = read(store, position, sequence).map_err(|error| error.to_string())?;
            if &found != image {
                return Err(format!(
                    "layer {sequence} of volume {position} has other bytes"
                ));
            }
        }
    }
    Ok(())
}
