//! A chain of layers in memory.

use std::collections::HashMap;

use rand::Rng;
use soe_common::BlockIndex;

use super::world::{BLOCK_SECTORS, SIM_SECTOR, World};
use crate::capture::{CutRecord, GroupCut, LayerKind, LayerSink, SinkError, VolumePlan};

/// Content of a sector no layer ever held.
pub const MISSING: u64 = u64::MAX;

/// The durable chain of a group: what a restore of the newest layer would give, and its cut.
#[derive(Clone, Debug, Default)]
pub struct MemoryChain {
    /// Sectors of every volume as of the newest layer.
    pub images: Vec<Vec<u64>>,
    /// The cut records of the newest layer.
    pub records: Vec<CutRecord>,
}

/// One attempt at the next layer of a [`MemoryChain`].
pub struct MemorySink<'a> {
    world: World,
    chain: &'a mut MemoryChain,
    blocks: HashMap<(usize, u64), Vec<u64>>,
    /// How likely a commit fails.
    pub commit_fails: f64,
    /// Landings at the time of the commit.
    pub committed_at: Option<usize>,
    /// Whether the attempt was given up.
    pub aborted: bool,
}

impl<'a> MemorySink<'a> {
    /// An attempt at the next layer.
    pub fn new(world: &World, chain: &'a mut MemoryChain) -> Self {
        Self {
            world: world.clone(),
            chain,
            blocks: HashMap::new(),
            commit_fails: 0.0,
            committed_at: None,
            aborted: false,
        }
    }
}

fn sectors_of(block: BlockIndex, data: &[u8]) -> Result<Vec<u64>, SinkError> {
    if data.len() != BLOCK_SECTORS * SIM_SECTOR as usize {
        return Err(format!("block {block:?} has {} bytes", data.len()).into());
    }
    Ok(data
        .chunks_exact(SIM_SECTOR as usize)
        .map(|bytes| bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
        .collect())
}

impl LayerSink for MemorySink<'_> {
    fn begin(&mut self, _volumes: &[VolumePlan]) -> Result<(), SinkError> {
        Ok(())
    }

    fn put_block(
        &mut self,
        volume: usize,
        block: BlockIndex,
        data: &[u8],
    ) -> Result<(), SinkError> {
        self.blocks
            .insert((volume, block.0), sectors_of(block, data)?);
        self.world.state().progress();
        Ok(())
    }

    fn agrees(&self, volume: usize, block: BlockIndex, data: &[u8]) -> Result<bool, SinkError> {
        let seen = sectors_of(block, data)?;
        let start = block.0 as usize * BLOCK_SECTORS;
        let image = self.chain.images.get(volume);
        let known = match self.blocks.get(&(volume, block.0)) {
            Some(put) => Some(put.as_slice()),
            None => image.and_then(|image| image.get(start..start + seen.len())),
        };
        Ok(known == Some(seen.as_slice()))
    }

    fn commit(&mut self, cut: &GroupCut) -> Result<(), SinkError> {
        {
            let mut state = self.world.state();
            self.committed_at = Some(state.landings.len());
            if state.rng.random_bool(self.commit_fails) {
                return Err("no space left in the store".into());
            }
            state.captures += 1;
        }
        let mut images = Vec::new();
        for (number, volume) in cut.volumes.iter().enumerate() {
            let sectors = (volume.volume_bytes / SIM_SECTOR) as usize;
            let mut image = match volume.kind {
                LayerKind::Differential => {
                    self.chain.images.get(number).cloned().unwrap_or_default()
                }
                // These read everything; a block they forgot must show.
                LayerKind::Baseline | LayerKind::Rescan => vec![MISSING; sectors],
            };
            for ((_, block), data) in self.blocks.iter().filter(|((v, _), _)| *v == number) {
                let start = *block as usize * BLOCK_SECTORS;
                if let Some(place) = image.get_mut(start..start + data.len()) {
                    place.copy_from_slice(data);
                }
            }
            images.push(image);
        }
        self.chain.images = images;
        self.chain.records = cut.volumes.iter().map(|v| v.record).collect();
        Ok(())
    }

    fn abort(&mut self) {
        self.aborted = true;
        self.blocks.clear();
    }
}
