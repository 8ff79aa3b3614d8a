//! The simulated freezer: holds writers that go through a filesystem, not the raw ones.

use std::time::Duration;

use rand::Rng;

use super::world::World;
use crate::capture::{FreezeError, Hold, Thawed, VolumeFreezer};

/// Freezes all disks of a [`World`] that have a filesystem.
#[derive(Clone, Debug)]
pub struct SimFreezer {
    /// The world.
    pub world: World,
}

impl VolumeFreezer for SimFreezer {
    fn flush(&self) -> Result<(), FreezeError> {
        self.world.state().progress();
        Ok(())
    }

    fn freeze_estimate(&self) -> Duration {
        Duration::from_millis(1)
    }

    fn thaw_estimate(&self) -> Duration {
        Duration::ZERO
    }

    fn covers(&self, volume: usize) -> bool {
        let state = self.world.state();
        state.disks.get(volume).is_some_and(|disk| disk.has_fs)
    }

    fn freeze(&self, limit: Duration) -> Result<Box<dyn Hold + '_>, FreezeError> {
        let mut state = self.world.state();
        let began_ns = state.now_ns;
        state.frozen = true;
        // The freeze itself writes out what is dirty.
        for disk in 0..state.disks.len() {
            let has_fs = state.disks.get(disk).is_some_and(|d| d.has_fs);
            if has_fs && state.rng.random_bool(0.5) {
                let sectors = state.disks.get(disk).map_or(1, |d| d.sectors.len());
                let start = state.rng.random_range(0..sectors);
                state.submit(disk, start, 1, None, false);
            }
        }
        state.drain_filesystems();
        state.thaw_at_ns = Some(began_ns + limit.as_nanos() as u64);
        Ok(Box::new(SimHold {
            world: self.world.clone(),
            began_ns,
        }))
    }
}

struct SimHold {
    world: World,
    began_ns: u64,
}

impl Hold for SimHold {
    fn thaw(self: Box<Self>) -> Result<Thawed, FreezeError> {
        let mut state = self.world.state();
        let intact = state.frozen;
        state.frozen = false;
        state.thaw_at_ns = None;
        state.progress();
        Ok(Thawed {
            pause: Duration::from_nanos(state.now_ns - self.began_ns),
            intact,
        })
    }
}

impl Drop for SimHold {
    fn drop(&mut self) {
        let mut state = self.world.state();
        state.frozen = false;
        state.thaw_at_ns = None;
    }
}
