//! What every change map must do, real or simulated: one suite, run over a device it can write to.

use std::time::Duration;

use soe_common::Epoch;

use crate::seam::{ByteRange, ChangeMap, Reading, Tracking};

/// A volume the suite may overwrite, with nobody else writing to it.
pub trait TestDevice {
    /// Writes `range` and returns when the device told that it is done.
    fn write(&mut self, range: ByteRange) -> Result<(), String>;
    /// Discards `range` and returns when it is done. False: this device cannot.
    fn discard(&mut self, range: ByteRange) -> Result<bool, String>;
    /// Queues a write of `range` that stays in flight until [`finish`](Self::finish). False: this
    /// device cannot.
    fn begin(&mut self, range: ByteRange) -> Result<bool, String>;
    /// Lets the writes begun complete.
    fn finish(&mut self) -> Result<(), String>;
    /// Makes a write of `range` fail. False: this device cannot.
    fn fail(&mut self, range: ByteRange) -> Result<bool, String>;
    /// Writes the same disk outside the volume the map covers. False: there is nothing outside.
    fn write_outside(&mut self) -> Result<bool, String>;
    /// Bytes counted as one sector by the counters.
    fn sector_bytes(&self) -> u64 {
        512
    }
    /// Smallest write.
    fn write_bytes(&self) -> u64 {
        4096
    }
    /// How long the map may lag behind the device, for maps that are not read in place.
    fn settle(&mut self) -> Duration {
        Duration::ZERO
    }
}

/// A promise that was not kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("change map of {volume}: {promise}: {seen}")]
pub struct Broken {
    /// The volume.
    pub volume: String,
    /// The promise.
    pub promise: &'static str,
    /// What was seen instead.
    pub seen: String,
}

/// Runs the suite. Returns the promises checked; those the device cannot show are left out.
pub fn change_map(
    map: &dyn ChangeMap,
    device: &mut dyn TestDevice,
) -> Result<Vec<&'static str>, Broken> {
    let mut suite = Suite {
        map,
        device,
        kept: Vec::new(),
    };
    suite.shape()?;
    suite.stamps()?;
    suite.counters()?;
    suite.edges()?;
    suite.discards()?;
    suite.in_flight()?;
    suite.outside()?;
    suite.failures()?;
    Ok(suite.kept)
}

struct Suite<'a> {
    map: &'a dyn ChangeMap,
    device: &'a mut dyn TestDevice,
    kept: Vec<&'static str>,
}

impl Suite<'_> {
    fn broken(&self, promise: &'static str, seen: impl ToString) -> Broken {
        Broken {
            volume: self.map.volume().to_owned(),
            promise,
            seen: seen.to_string(),
        }
    }

    fn check(
        &mut self,
        promise: &'static str,
        holds: bool,
        seen: impl FnOnce() -> String,
    ) -> Result<(), Broken> {
        if !holds {
            return Err(self.broken(promise, seen()));
        }
        if !self.kept.contains(&promise) {
            self.kept.push(promise);
        }
        Ok(())
    }

    fn bump(&self) -> Result<Epoch, Broken> {
        self.map.bump().map_err(|e| self.broken("bump works", e))
    }

    /// A reading after the books had the chance to be balanced.
    fn reading(&self) -> Result<Reading, Broken> {
        self.map
            .settle()
            .map_err(|e| self.broken("settle works", e))?;
        self.map
            .reading()
            .map_err(|e| self.broken("reading works", e))
    }

    fn changed(&self, since: Epoch) -> Result<Vec<ByteRange>, Broken> {
        self.map
            .changed_since(since)
            .map_err(|e| self.broken("changed_since works", e))
    }

    fn done(&self, result: Result<(), String>) -> Result<(), Broken> {
        result.map_err(|e| self.broken("the test device works", e))
    }

    fn can(&self, result: Result<bool, String>) -> Result<bool, Broken> {
        result.map_err(|e| self.broken("the test device works", e))
    }

    fn write(&mut self, range: ByteRange) -> Result<(), Broken> {
        let written = self.device.write(range);
        std::thread::sleep(self.device.settle());
        self.done(written)
    }

    fn block(&self) -> u64 {
        u64::from(self.map.block_size())
    }

    /// A write of the smallest size inside block `block`.
    fn inside(&self, block: u64) -> ByteRange {
        ByteRange::new(block * self.block(), self.device.write_bytes())
    }

    fn covers(ranges: &[ByteRange], range: ByteRange) -> bool {
        ranges
            .iter()
            .any(|r| r.offset <= range.offset && range.end() <= r.end())
    }

    fn touches(ranges: &[ByteRange], range: ByteRange) -> bool {
        ranges
            .iter()
            .any(|r| r.offset < range.end() && range.offset < r.end())
    }

    fn shape(&mut self) -> Result<(), Broken> {
        let (block, bytes) = (self.block(), self.map.volume_bytes());
        self.check(
            "blocks have a size, and the volume has at least 8 of them",
            block > 0 && bytes >= 8 * block,
            || format!("{bytes} bytes in blocks of {block}"),
        )?;
        let tracking = self.map.tracking();
        self.check(
            "tracking is complete",
            tracking == Tracking::Complete,
            || format!("{tracking:?}"),
        )?;
        let (before, bumped) = (self.map.epoch(), self.bump()?);
        let after = self.map.epoch();
        self.check(
            "a bump begins and returns a later epoch",
            bumped > before && after == bumped,
            || format!("{before:?}, bumped to {bumped:?}, then {after:?}"),
        )?;
        self.map
            .grace()
            .map_err(|e| self.broken("grace works", e))?;
        let generation = self.map.generation();
        self.check(
            "the generation stays the same",
            generation == self.map.generation(),
            || "it changed by itself".to_owned(),
        )
    }

    fn stamps(&mut self) -> Result<(), Broken> {
        let first = self.bump()?;
        self.write(self.inside(1))?;
        let second = self.bump()?;
        self.write(self.inside(5))?;
        let third = self.bump()?;
        let (one, five) = (self.inside(1), self.inside(5));
        let since_first = self.changed(first)?;
        let since_second = self.changed(second)?;
        let since_third = self.changed(third)?;
        self.check(
            "a write is found from the epoch it was made in",
            Self::covers(&since_first, one) && Self::covers(&since_second, five),
            || format!("{since_first:?}, then {since_second:?}"),
        )?;
        self.check(
            "an older write is not found from a later epoch",
            !Self::touches(&since_second, one) && !Self::touches(&since_third, five),
            || format!("{since_second:?}, then {since_third:?}"),
        )?;
        self.check(
            "blocks nobody wrote are not found",
            !Self::touches(&since_first, self.inside(3)),
            || format!("{since_first:?}"),
        )
    }

    fn counters(&mut self) -> Result<(), Broken> {
        let before = self.reading()?;
        self.check(
            "an idle device has nothing in flight",
            before.nothing_in_flight(),
            || format!("{before:?}"),
        )?;
        let again = self.reading()?;
        self.check("an idle device's reading repeats", before == again, || {
            format!("{before:?}, then {again:?}")
        })?;
        let range = self.inside(2);
        self.write(range)?;
        let after = self.reading()?;
        let sectors = range.len / self.device.sector_bytes();
        self.check(
            "a write moves both counters by its sectors",
            after.queued == before.queued + sectors
                && after.completed == before.completed + sectors,
            || format!("{before:?}, then {after:?} after {sectors} sectors"),
        )
    }

    fn edges(&mut self) -> Result<(), Broken> {
        let block = self.block();
        let bytes = self.map.volume_bytes();
        let write = self.device.write_bytes();
        let epoch = self.bump()?;
        // Across the border of blocks 3 and 4, and the volume's very end.
        let across = ByteRange::new(4 * block - write, 2 * write);
        let end = ByteRange::new(bytes - write, write);
        self.write(across)?;
        self.write(end)?;
        self.write(self.inside(0))?;
        let changed = self.changed(epoch)?;
        self.check(
            "a write across blocks marks all of them",
            Self::covers(&changed, across),
            || format!("{across:?} in {changed:?}"),
        )?;
        self.check(
            "the first and the last block are marked, and nothing behind the volume",
            Self::covers(&changed, end)
                && Self::covers(&changed, self.inside(0))
                && changed.iter().all(|r| r.end() <= bytes),
            || format!("{end:?} in {changed:?} of {bytes}"),
        )?;
        self.check(
            "ranges are ascending, disjoint and merged",
            changed.windows(2).all(|pair| match pair {
                [a, b] => a.end() < b.offset,
                _ => true,
            }) && changed.iter().all(|r| r.len > 0),
            || format!("{changed:?}"),
        )
    }

    fn discards(&mut self) -> Result<(), Broken> {
        let epoch = self.bump()?;
        let range = ByteRange::new(2 * self.block(), 3 * self.block());
        let discarded = self.device.discard(range);
        if self.can(discarded)? {
            std::thread::sleep(self.device.settle());
            let changed = self.changed(epoch)?;
            self.check(
                "a discard marks all its blocks",
                Self::covers(&changed, range),
                || format!("{range:?} in {changed:?}"),
            )?;
        }
        Ok(())
    }

    fn in_flight(&mut self) -> Result<(), Broken> {
        let queued_in = self.bump()?;
        let range = self.inside(6);
        let begun = self.device.begin(range);
        if !self.can(begun)? {
            return Ok(());
        }
        let during = self.reading()?;
        let at_queue = self.changed(queued_in)?;
        let cut = self.bump()?;
        let after_bump = self.changed(cut)?;
        let finished = self.device.finish();
        self.done(finished)?;
        std::thread::sleep(self.device.settle());
        let after = self.reading()?;
        let at_completion = self.changed(cut)?;
        self.check(
            "a write on its way is in flight",
            !during.nothing_in_flight() && after.nothing_in_flight(),
            || format!("{during:?}, then {after:?}"),
        )?;
        self.check(
            "a write is marked when it is queued",
            Self::covers(&at_queue, range),
            || format!("{range:?} in {at_queue:?}"),
        )?;
        self.check(
            "a write queued before a bump and completed after it is marked in the new epoch",
            !Self::touches(&after_bump, range) && Self::covers(&at_completion, range),
            || format!("{range:?} in {after_bump:?}, then {at_completion:?}"),
        )
    }

    fn outside(&mut self) -> Result<(), Broken> {
        let epoch = self.bump()?;
        let before = self.reading()?;
        let written = self.device.write_outside();
        if self.can(written)? {
            std::thread::sleep(self.device.settle());
            let (after, changed) = (self.reading()?, self.changed(epoch)?);
            self.check(
                "writes outside the volume are neither marked nor counted",
                changed.is_empty() && before == after,
                || format!("{changed:?}, {before:?}, then {after:?}"),
            )?;
        }
        Ok(())
    }

    fn failures(&mut self) -> Result<(), Broken> {
        let epoch = self.bump()?;
        let before = self.reading()?;
        let range = self.inside(7);
        let failed = self.device.fail(range);
        if self.can(failed)? {
            std::thread::sleep(self.device.settle());
            let (after, changed) = (self.reading()?, self.changed(epoch)?);
            self.check(
                "a failed write is counted as such, is marked, and is not in flight",
                after.misses.failed_writes > before.misses.failed_writes
                    && Self::covers(&changed, range)
                    && after.nothing_in_flight(),
                || format!("{before:?}, then {after:?}, {changed:?}"),
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::map::SimMap;
    use super::super::world::{Faults, Load, SIM_SECTOR, World};
    use super::*;

    /// A simulated disk nobody else writes to.
    struct Quiet(World);

    const IDLE: Load = Load {
        writers: 0,
        raw_writers: 0,
        start: 0.0,
        calm: 0.0,
        burst: 0.0,
        miss_queue: 0.0,
        miss_complete: 0.0,
        miss_silently: 0.0,
        fail: 0.0,
    };

    fn sectors(range: ByteRange) -> (usize, usize) {
        (
            (range.offset / SIM_SECTOR) as usize,
            (range.len / SIM_SECTOR) as usize,
        )
    }

    impl TestDevice for Quiet {
        fn write(&mut self, range: ByteRange) -> Result<(), String> {
            self.begin(range)?;
            self.finish()
        }

        fn discard(&mut self, range: ByteRange) -> Result<bool, String> {
            self.write(range).map(|()| true)
        }

        fn begin(&mut self, range: ByteRange) -> Result<bool, String> {
            let (start, len) = sectors(range);
            let mut state = self.0.state();
            state.submit(0, start, len, None, false);
            state.queue_all();
            Ok(true)
        }

        fn finish(&mut self) -> Result<(), String> {
            self.0.state().drain_filesystems();
            Ok(())
        }

        fn fail(&mut self, range: ByteRange) -> Result<bool, String> {
            self.0.set_load(Load { fail: 1.0, ..IDLE });
            self.write(range)?;
            self.0.set_load(IDLE);
            Ok(true)
        }

        fn write_outside(&mut self) -> Result<bool, String> {
            Ok(false)
        }

        fn sector_bytes(&self) -> u64 {
            SIM_SECTOR
        }

        fn write_bytes(&self) -> u64 {
            SIM_SECTOR
        }
    }

    fn suite(seed: u64, faults: Faults) -> Result<Vec<&'static str>, Broken> {
        let world = World::new(seed, 1, 12, IDLE, faults);
        let map = SimMap::new(&world, 0);
        world.hold_in_flight();
        change_map(&map, &mut Quiet(world))
    }

    #[test]
    fn the_simulated_map_keeps_every_promise() {
        for seed in 0..50 {
            let kept = suite(seed, Faults::default());
            assert_eq!(kept.map(|k| k.len()), Ok(18), "seed {seed}");
        }
    }

    #[test]
    fn a_map_that_marks_only_at_queue_is_caught() {
        let faults = Faults {
            mark_only_at_queue: true,
            ..Faults::default()
        };
        let broken = suite(1, faults).expect_err("the suite must notice");
        assert!(broken.promise.contains("completed after it"), "{broken}");
    }
}
