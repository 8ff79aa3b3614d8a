//! The simulated clock, and the simulated reader.

use std::io;
use std::time::Duration;

use rand::Rng;
use rand::seq::SliceRandom;

use super::world::{SIM_SECTOR, World};
use crate::seam::{BlockReader, ByteRange, Clock, Pace, UnixNanos};

/// Virtual time; the world runs while somebody sleeps.
#[derive(Clone, Debug)]
pub struct SimClock(pub World);

impl Clock for SimClock {
    fn now(&self) -> UnixNanos {
        1_700_000_000_000_000_000 + self.0.state().now_ns as i64
    }

    fn monotonic(&self) -> Duration {
        let mut state = self.0.state();
        state.progress();
        Duration::from_nanos(state.now_ns)
    }

    fn sleep(&self, duration: Duration) {
        let mut state = self.0.state();
        let until = state.now_ns + duration.as_nanos() as u64;
        for _ in 0..200 {
            if state.now_ns >= until {
                return;
            }
            state.step();
        }
        state.now_ns = state.now_ns.max(until);
    }
}

/// Reads a simulated disk sector by sector while its writers go on.
#[derive(Debug)]
pub struct SimReader {
    world: World,
    disk: usize,
}

impl SimReader {
    /// Reads disk `disk`.
    pub fn new(world: &World, disk: usize) -> Self {
        Self {
            world: world.clone(),
            disk,
        }
    }

    fn piece(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut state = self.world.state();
        let first = (offset / SIM_SECTOR) as usize;
        let count = (len / SIM_SECTOR) as usize;
        // Reading past the page cache writes dirty metadata in the range back first.
        let mounted = state.disks.get(self.disk).is_some_and(|d| d.has_fs) && !state.frozen;
        if mounted && count > 0 && state.rng.random_bool(0.01) {
            state.submit(self.disk, first, count.min(2), None, false);
            state.drain_filesystems();
        }
        let mut data = Vec::with_capacity(count * SIM_SECTOR as usize);
        for sector in first..first + count {
            let value = state
                .disks
                .get(self.disk)
                .and_then(|d| d.sectors.get(sector))
                .copied()
                .unwrap_or(u64::MAX);
            data.extend_from_slice(&value.to_le_bytes());
            if state.rng.random_bool(0.3) {
                state.step();
            }
        }
        data
    }
}

impl BlockReader for SimReader {
    fn len(&self) -> u64 {
        let state = self.world.state();
        state
            .disks
            .get(self.disk)
            .map_or(0, |d| d.sectors.len() as u64 * SIM_SECTOR)
    }

    fn read(
        &self,
        ranges: &[ByteRange],
        unit: u32,
        pace: &dyn Pace,
        sink: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let unit = u64::from(unit.max(1));
        let mut pieces = Vec::new();
        for range in ranges {
            let mut offset = range.offset;
            while offset < range.end() {
                let end = ((offset / unit + 1) * unit).min(range.end());
                pieces.push((offset, end - offset));
                offset = end;
            }
        }
        {
            let mut state = self.world.state();
            let rng = &mut state.rng;
            if rng.random_bool(0.5) {
                pieces.shuffle(rng);
            }
        }
        for (offset, len) in pieces {
            pace.before(len)?;
            sink(offset, &self.piece(offset, len))?;
        }
        Ok(())
    }
}
