//! The simulated change map: the counters, stamps and epochs of a simulated disk.

use soe_common::Epoch;
use uuid::Uuid;

use super::world::{BLOCK_SECTORS, COARSE_BLOCKS, CPUS, SIM_BLOCK, SIM_SECTOR, World};
use crate::books::{self, Account, Device, Verdict};
use crate::seam::{ByteRange, ChangeMap, Reading, Rest, TrackError, Tracking};

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

    fn settle(&self) -> Result<(), TrackError> {
        let mut state = self.world.state();
        state.progress();
        // The device's own word, taken twice with a grace period between: here it simply knows.
        if state.in_flight(self.disk) {
            return Ok(());
        }
        let disk = state.disks.get_mut(self.disk).ok_or_else(|| self.gone())?;
        let accounted = disk.accounted.wrapping_add_signed(-disk.device_base);
        let Some(correction) = books::at_rest(&[disk.account()], 0, Some((accounted, true)), false)
        else {
            return Ok(());
        };
        if let Some(open) = correction.base.first() {
            disk.base += open;
        }
        disk.device_base += correction.device;
        disk.misses.queue += u64::from(correction.queue_unseen);
        disk.misses.complete += u64::from(correction.completion_unseen);
        disk.queue_base = disk.misses.queue;
        disk.untrue = false;
        disk.rest = Some(Rest {
            epoch: Epoch(disk.epoch),
            misses: disk.misses,
        });
        Ok(())
    }

    fn rest(&self) -> Option<Rest> {
        let state = self.world.state();
        state.disks.get(self.disk).and_then(|disk| disk.rest)
    }

    /// The device's word first, then *completed*, then *queued*, then the misses, with the world going
    /// on in between.
    fn reading(&self) -> Result<Reading, TrackError> {
        let mut state = self.world.state();
        loop {
            state.progress();
            let busy = state.at_device(self.disk);
            let disk = state.disks.get(self.disk).ok_or_else(|| self.gone())?;
            let (base, accounted) = (
                disk.base,
                disk.accounted.wrapping_add_signed(-disk.device_base),
            );
            let mut account = Account {
                queued: 0,
                completed: 0u64.wrapping_add_signed(base),
            };
            state.progress();
            for cpu in 0..CPUS {
                let disk = state.disks.get(self.disk).ok_or_else(|| self.gone())?;
                account.completed = account.completed.wrapping_add(disk.completed[cpu]);
                state.progress();
            }
            for cpu in 0..CPUS {
                let disk = state.disks.get(self.disk).ok_or_else(|| self.gone())?;
                account.queued += disk.queued[cpu];
                state.progress();
            }
            let faults = state.faults;
            let disk = state.disks.get_mut(self.disk).ok_or_else(|| self.gone())?;
            let misses = disk.misses;
            let device = Device {
                accounted,
                busy,
                exact: true,
            };
            let trusting = faults.trust_untrue_counters;
            let verdict = if trusting {
                books::judge(&[account], 0, 0, None)
            } else if disk.untrue {
                Verdict::Moving
            } else if misses.queue != disk.queue_base {
                Verdict::Untrue
            } else {
                books::judge(&[account], 0, 0, (!faults.no_witness).then_some(device))
            };
            match verdict {
                Verdict::RestUnseen => {
                    if disk.base == base {
                        disk.base += account.open();
                        disk.misses.complete += u64::from(!faults.forget_unseen);
                    }
                    continue;
                }
                Verdict::Untrue if !trusting => disk.untrue = true,
                _ => {}
            }
            return Ok(Reading {
                completed: match verdict {
                    Verdict::Rest => account.queued,
                    _ if account.open() == 0 => account.queued.wrapping_sub(1),
                    _ => account.completed,
                },
                queued: account.queued,
                misses,
            });
        }
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
