//! The simulated change map: the counters, stamps and epochs of a simulated disk.

use soe_common::Epoch;
use uuid::Uuid;

use super::world::{BLOCK_SECTORS, COARSE_BLOCKS, CPUS, SIM_BLOCK, SIM_SECTOR, World};
use crate::seam::{ByteRange, ChangeMap, Misses, Reading, TrackError, Tracking};

/// The change map of one disk of a [`World`].
#[derive(Debug)]
pub struct SimMap {
    world: World,
    disk: usize,
    name: String,
}

impl SimMap {
    /// The map of disk `disk`.
    pub fn new(world: &World, disk: usize) -> Self {
        Self {
            world: world.clone(),
            disk,
            name: format!("sim{disk}"),
        }
    }

    fn gone(&self) -> TrackError {
        TrackError::Gone {
            volume: self.name.clone(),
        }
    }
}

impl ChangeMap for SimMap {
    fn volume(&self) -> &str {
        &self.name
    }

    fn volume_bytes(&self) -> u64 {
        let state = self.world.state();
        state
            .disks
            .get(self.disk)
            .map_or(0, |d| d.sectors.len() as u64 * SIM_SECTOR)
    }

    fn block_size(&self) -> u32 {
        SIM_BLOCK
    }

    fn generation(&self) -> Uuid {
        let state = self.world.state();
        state
            .disks
            .get(self.disk)
            .map_or(Uuid::nil(), |d| d.generation)
    }

    fn epoch(&self) -> Epoch {
        let state = self.world.state();
        Epoch(state.disks.get(self.disk).map_or(0, |d| d.epoch))
    }

    fn bump(&self) -> Result<Epoch, TrackError> {
        let mut state = self.world.state();
        state.progress();
        let disk = state.disks.get_mut(self.disk).ok_or_else(|| self.gone())?;
        disk.epoch += 1;
        let epoch = Epoch(disk.epoch);
        state.progress();
        Ok(epoch)
    }

    fn grace(&self) -> Result<(), TrackError> {
        let mut state = self.world.state();
        state.grace(self.disk);
        state.progress();
        Ok(())
    }

    /// Counters that lost an event have no true base: until a reading at which the device itself is
    /// idle gives them one, nothing is ever said to be complete. The misses are read last and judged
    /// by, so that an event lost while the counters are being read counts as well.
    fn reading(&self) -> Result<Reading, TrackError> {
        let mut state = self.world.state();
        state.progress();
        let mut completed = 0;
        let mut queued = 0;
        for cpu in 0..CPUS {
            let disk = state.disks.get(self.disk).ok_or_else(|| self.gone())?;
            completed += disk.completed[cpu];
            state.progress();
        }
        for cpu in 0..CPUS {
            let disk = state.disks.get(self.disk).ok_or_else(|| self.gone())?;
            queued += disk.queued[cpu];
            state.progress();
        }
        let idle = !state.in_flight(self.disk);
        let trusting = state.faults.trust_untrue_counters;
        let disk = state.disks.get_mut(self.disk).ok_or_else(|| self.gone())?;
        let completed = completed.wrapping_add_signed(disk.correction);
        let misses = disk.misses;
        let lost = |m: &Misses| (m.queue, m.complete, m.stash);
        if lost(&misses) == lost(&disk.based_on) {
            return Ok(Reading {
                completed,
                queued,
                misses,
            });
        }
        if idle {
            let sum = |counters: &[u64; CPUS]| counters.iter().sum::<u64>() as i64;
            disk.correction = sum(&disk.queued) - sum(&disk.completed);
            disk.based_on = misses;
        }
        Ok(Reading {
            completed,
            queued: if trusting { queued } else { completed + 1 },
            misses,
        })
    }

    fn changed_since(&self, since: Epoch) -> Result<Vec<ByteRange>, TrackError> {
        let mut state = self.world.state();
        state.progress();
        let blocks = state.disks.get(self.disk).map_or(0, |d| d.fine.len());
        let mut ranges: Vec<ByteRange> = Vec::new();
        for coarse in 0..blocks.div_ceil(COARSE_BLOCKS) {
            let at_least = |stamp: Option<&u32>| stamp.is_some_and(|s| *s >= since.0);
            let disk = state.disks.get(self.disk).ok_or_else(|| self.gone())?;
            if !at_least(disk.coarse.get(coarse)) {
                continue;
            }
            for block in coarse * COARSE_BLOCKS..((coarse + 1) * COARSE_BLOCKS).min(blocks) {
                let disk = state.disks.get(self.disk).ok_or_else(|| self.gone())?;
                if at_least(disk.fine.get(block)) {
                    let len = BLOCK_SECTORS as u64 * SIM_SECTOR;
                    let offset = block as u64 * len;
                    match ranges.last_mut() {
                        Some(last) if last.end() == offset => last.len += len,
                        _ => ranges.push(ByteRange::new(offset, len)),
                    }
                }
                state.progress();
            }
        }
        Ok(ranges)
    }

    fn tracking(&self) -> Tracking {
        self.world.state().progress();
        Tracking::Complete
    }
}
