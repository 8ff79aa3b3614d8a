//! The kernel half's running totals into windows. Pure.

use soe_common::SECTOR_SIZE;
use soe_common::histogram::BUCKETS;
use soe_common::record::{DirectionStats as KernelDirection, DiskStats, OCTAVES};

use crate::seam::UnixNanos;
use crate::window::{DirectionStats, LogHistogram, Name, QueueDepth, VolumeWindow};

/// One direction's totals over all CPUs.
#[derive(Clone, Debug)]
struct Direction {
    ops: u64,
    bytes: u64,
    sequential: u64,
    fresh_regions: u64,
    repeated: u64,
    latency_sum: u64,
    latency: [u64; BUCKETS],
    seek: [u64; OCTAVES],
}

impl Default for Direction {
    fn default() -> Self {
        Self {
            ops: 0,
            bytes: 0,
            sequential: 0,
            fresh_regions: 0,
            repeated: 0,
            latency_sum: 0,
            latency: [0; BUCKETS],
            seek: [0; OCTAVES],
        }
    }
}

impl Direction {
    /// Adds what one CPU counted between two readings. The kernel's buckets are 32 bits wide and
    /// wrap; a window never holds that many.
    fn add(&mut self, before: &KernelDirection, after: &KernelDirection) {
        self.ops += after.ops.wrapping_sub(before.ops);
        self.bytes += after.bytes.wrapping_sub(before.bytes);
        self.sequential += after.sequential.wrapping_sub(before.sequential);
        self.fresh_regions += after.fresh_regions.wrapping_sub(before.fresh_regions);
        self.repeated += after.repeated.wrapping_sub(before.repeated);
        self.latency_sum += after.latency_sum.wrapping_sub(before.latency_sum);
        for (sum, (b, a)) in self
            .latency
            .iter_mut()
            .zip(before.latency.iter().zip(&after.latency))
        {
            *sum += u64::from(a.wrapping_sub(*b));
        }
        for (sum, (b, a)) in self
            .seek
            .iter_mut()
            .zip(before.seek.iter().zip(&after.seek))
        {
            *sum += u64::from(a.wrapping_sub(*b));
        }
    }

    fn window(&self) -> DirectionStats {
        DirectionStats::measured(
            self.ops,
            self.bytes,
            LogHistogram::from_counts(&self.latency),
            None,
        )
    }
}

/// Lower end, in bytes, of the octave that holds the median.
fn median_octave(octaves: impl Iterator<Item = u64> + Clone) -> Option<u64> {
    let total: u64 = octaves.clone().sum();
    let mut seen = 0;
    for (octave, count) in octaves.enumerate() {
        seen += count;
        if seen * 2 >= total && total > 0 {
            return Some(if octave == 0 {
                0
            } else {
                (1u64 << (octave - 1)) * SECTOR_SIZE
            });
        }
    }
    None
}

/// What a window is of.
pub struct WindowOf {
    /// Where it begins.
    pub start: UnixNanos,
    /// Its length in ns.
    pub interval: i64,
    /// The host.
    pub host: Name,
    /// The volume.
    pub volume: Name,
    /// The identity behind it.
    pub device_id: Name,
}

/// The window between two readings of a disk's statistics (one value per CPU).
pub fn window(of: WindowOf, before: &[DiskStats], after: &[DiskStats]) -> VolumeWindow {
    let (mut read, mut write) = (Direction::default(), Direction::default());
    let (mut discards, mut discard_bytes, mut flushes) = (0, 0, 0);
    for (b, a) in before.iter().zip(after) {
        read.add(&b.read, &a.read);
        write.add(&b.write, &a.write);
        discards += a.discard_ops.wrapping_sub(b.discard_ops);
        discard_bytes += a.discard_bytes.wrapping_sub(b.discard_bytes);
        flushes += a.flush_ops.wrapping_sub(b.flush_ops);
    }
    let ops = read.ops + write.ops;
    let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
    VolumeWindow {
        start: of.start,
        interval: of.interval,
        host: of.host,
        volume: of.volume,
        device_id: of.device_id,
        discard_ops: Some(discards),
        discard_bytes: Some(discard_bytes),
        flush_ops: Some(flushes),
        // Little's law: the time spent in the device over the time that passed.
        queue_depth: Some(QueueDepth {
            mean: (read.latency_sum + write.latency_sum) as f64 / of.interval.max(1) as f64,
            max: 0,
        }),
        sequential_share: share(read.sequential + write.sequential, ops),
        seek_distance_p50: median_octave(read.seek.iter().zip(&write.seek).map(|(r, w)| r + w)),
        unique_regions: Some(read.fresh_regions + write.fresh_regions),
        reread_share: share(read.repeated, read.ops),
        dropped: 0,
        read: read.window(),
        write: write.window(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zero() -> DiskStats {
        // SAFETY: plain integers.
        unsafe { std::mem::zeroed() }
    }

    #[test]
    fn a_window_is_the_difference_over_all_cpus() {
        let before = vec![zero(), zero()];
        let mut after = before.clone();
        after[0].read.ops = 3;
        after[0].read.bytes = 3 * 4096;
        after[0].read.sequential = 1;
        after[1].write.ops = 1;
        after[1].write.bytes = 512;
        after[0].read.latency[100] = 3;
        after[0].read.latency_sum = 500_000_000;
        after[1].flush_ops = 2;
        let of = WindowOf {
            start: 0,
            interval: 1_000_000_000,
            host: "h".into(),
            volume: "v".into(),
            device_id: "d".into(),
        };
        let window = window(of, &before, &after);
        assert_eq!((window.read.ops, window.write.bytes), (Some(3), Some(512)));
        assert_eq!(window.flush_ops, Some(2));
        assert_eq!(window.sequential_share, Some(0.25));
        assert_eq!(window.queue_depth.unwrap().mean, 0.5);
        assert_eq!(window.read.histogram.total(), 3);
    }

    #[test]
    fn the_median_distance_is_that_of_its_octave() {
        let mut octaves = [0u64; OCTAVES];
        octaves[0] = 1;
        octaves[11] = 5;
        assert_eq!(median_octave(octaves.iter().copied()), Some(1024 * 512));
        assert_eq!(median_octave([0u64; 4].iter().copied()), None);
    }
}
