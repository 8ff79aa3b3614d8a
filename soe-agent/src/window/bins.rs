//! Windows of any length into evenly spaced bins, as the model wants them.

use std::ops::Range;

use super::floor_to;
use super::rows::{DirectionStats, Name, VolumeWindow};
use crate::seam::UnixNanos;

/// A bin counts as known when at least this share of it is: less is a guess.
const MIN_COVERAGE: f64 = 0.5;
/// The most bins of one series: half a year of seconds.
pub const MAX_BINS: usize = 16_000_000;

/// What one volume did in one bin. Totals are of the whole bin; where only a part of it is known
/// they are scaled up. `None` is unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoadBin {
    /// Reads.
    pub read_ops: Option<f64>,
    /// Writes.
    pub write_ops: Option<f64>,
    /// Bytes read.
    pub read_bytes: Option<f64>,
    /// Bytes written.
    pub write_bytes: Option<f64>,
    /// Median read latency in ns: mean over the windows, weighted by their operations.
    pub read_p50: Option<f64>,
    /// p99 read latency in ns, likewise.
    pub read_p99: Option<f64>,
    /// Median write latency in ns, likewise.
    pub write_p50: Option<f64>,
    /// p99 write latency in ns, likewise.
    pub write_p99: Option<f64>,
    /// Mean queue depth over time.
    pub queue_depth: Option<f64>,
    /// Share of sequential operations, weighted by operations.
    pub sequential_share: Option<f64>,
    /// Median seek distance in bytes, weighted by operations.
    pub seek_distance: Option<f64>,
    /// Regions touched in a window, mean over time.
    pub unique_regions: Option<f64>,
    /// Share of re-reads, weighted by operations.
    pub reread_share: Option<f64>,
    /// Events lost.
    pub dropped: u64,
}

impl LoadBin {
    /// Bytes read and written, when both are known.
    pub fn bytes(&self) -> Option<f64> {
        Some(self.read_bytes? + self.write_bytes?)
    }

    /// Reads and writes, when both are known.
    pub fn ops(&self) -> Option<f64> {
        Some(self.read_ops? + self.write_ops?)
    }
}

/// The bins of one volume, evenly spaced; a bin about which nothing is known is missing.
#[derive(Clone, Debug, PartialEq)]
pub struct BinSeries {
    /// The volume's name.
    pub volume: Name,
    /// Where the first bin begins: a multiple of `bin` since the Unix epoch.
    pub start: UnixNanos,
    /// Length of a bin in ns.
    pub bin: i64,
    /// The bins.
    pub bins: Vec<Option<LoadBin>>,
}

impl BinSeries {
    /// Where bin `index` begins.
    pub fn start_of(&self, index: usize) -> UnixNanos {
        self.start
            .saturating_add(self.bin.saturating_mul(index as i64))
    }
}

/// Why there is no series.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BinError {
    /// The bin has no length.
    #[error("a bin of {bin} ns has no length; give a positive one")]
    NoLength {
        /// The length asked for.
        bin: i64,
    },
    /// The range is too long for bins this short.
    #[error(
        "the range holds {count} bins of {bin} ns, the most is {MAX_BINS}; ask for longer bins or a shorter range"
    )]
    TooMany {
        /// How many it would be.
        count: i64,
        /// Their length.
        bin: i64,
    },
}

/// A mean under construction.
#[derive(Clone, Copy, Default)]
struct Mean {
    sum: f64,
    weight: f64,
}

impl Mean {
    fn add(&mut self, value: Option<f64>, weight: f64) {
        if let Some(value) = value.filter(|_| weight > 0.0) {
            self.sum += value * weight;
            self.weight += weight;
        }
    }

    fn value(self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }
}

/// A bin under construction. Load means are rates per ns weighted by known ns; `Mean::weight` is the
/// part of the bin that is known.
#[derive(Clone, Copy, Default)]
struct Building {
    read_ops: Mean,
    write_ops: Mean,
    read_bytes: Mean,
    write_bytes: Mean,
    read_p50: Mean,
    read_p99: Mean,
    write_p50: Mean,
    write_p99: Mean,
    queue_depth: Mean,
    sequential_share: Mean,
    seek_distance: Mean,
    unique_regions: Mean,
    reread_share: Mean,
    dropped: f64,
}

impl Building {
    /// Adds the part of `window` that overlaps the bin by `overlap` ns.
    fn add(&mut self, window: &VolumeWindow, overlap: f64) {
        let length = window.interval as f64;
        let part = overlap / length;
        let rate = |total: Option<u64>| total.map(|total| total as f64 / length);
        let (read, write) = (&window.read, &window.write);
        self.read_ops.add(rate(read.ops), overlap);
        self.write_ops.add(rate(write.ops), overlap);
        self.read_bytes.add(rate(read.bytes), overlap);
        self.write_bytes.add(rate(write.bytes), overlap);
        let ops = |stats: &DirectionStats| stats.ops.unwrap_or(0) as f64 * part;
        let (reads, writes) = (ops(read), ops(write));
        if let Some(latency) = read.latency {
            self.read_p50.add(Some(latency.p50 as f64), reads);
            self.read_p99.add(Some(latency.p99 as f64), reads);
        }
        if let Some(latency) = write.latency {
            self.write_p50.add(Some(latency.p50 as f64), writes);
            self.write_p99.add(Some(latency.p99 as f64), writes);
        }
        self.queue_depth
            .add(window.queue_depth.map(|depth| depth.mean), overlap);
        self.sequential_share
            .add(window.sequential_share, reads + writes);
        self.seek_distance
            .add(window.seek_distance_p50.map(|b| b as f64), reads + writes);
        self.unique_regions
            .add(window.unique_regions.map(|r| r as f64), overlap);
        self.reread_share.add(window.reread_share, reads);
        self.dropped += window.dropped as f64 * part;
    }

    fn finish(self, bin: f64) -> Option<LoadBin> {
        let total = |mean: Mean| (mean.weight >= MIN_COVERAGE * bin).then_some(mean.value()? * bin);
        let built = LoadBin {
            read_ops: total(self.read_ops),
            write_ops: total(self.write_ops),
            read_bytes: total(self.read_bytes),
            write_bytes: total(self.write_bytes),
            read_p50: self.read_p50.value(),
            read_p99: self.read_p99.value(),
            write_p50: self.write_p50.value(),
            write_p99: self.write_p99.value(),
            queue_depth: self.queue_depth.value(),
            sequential_share: self.sequential_share.value(),
            seek_distance: self.seek_distance.value(),
            unique_regions: self.unique_regions.value(),
            reread_share: self.reread_share.value(),
            dropped: self.dropped.round() as u64,
        };
        let known = built
            .read_ops
            .or(built.write_ops)
            .or(built.read_bytes)
            .or(built.write_bytes);
        known.map(|_| built)
    }
}

/// Bins under construction.
#[derive(Clone)]
pub struct BinBuilder {
    volume: Name,
    start: UnixNanos,
    bin: i64,
    building: Vec<Building>,
}

impl BinBuilder {
    /// Bins of `bin` ns over `range`. The first begins at or before `range.start`, the last holds the
    /// last instant of the range.
    pub fn new(volume: Name, range: Range<UnixNanos>, bin: i64) -> Result<Self, BinError> {
        if bin <= 0 {
            return Err(BinError::NoLength { bin });
        }
        let start = floor_to(range.start, bin);
        let span = range.end.saturating_sub(start).max(0);
        let count = span / bin + i64::from(span % bin != 0);
        if count > MAX_BINS as i64 {
            return Err(BinError::TooMany { count, bin });
        }
        Ok(Self {
            volume,
            start,
            bin,
            building: vec![Building::default(); count as usize],
        })
    }

    /// Adds a window, in any order. One that overlaps several bins counts in each by its share of
    /// time; windows that overlap each other are averaged.
    pub fn add(&mut self, window: &VolumeWindow) {
        if window.interval <= 0 || window.end() <= self.start {
            return;
        }
        let mut index = (window.start.max(self.start) - self.start) / self.bin;
        while let Some(slot) = self.building.get_mut(index as usize) {
            let from = self.start + index * self.bin;
            if window.end() <= from {
                break;
            }
            let overlap = window.end().min(from.saturating_add(self.bin)) - window.start.max(from);
            slot.add(window, overlap as f64);
            index += 1;
        }
    }

    /// The bins.
    pub fn finish(self) -> BinSeries {
        let length = self.bin as f64;
        let bins = self
            .building
            .into_iter()
            .map(|slot| slot.finish(length))
            .collect();
        BinSeries {
            volume: self.volume,
            start: self.start,
            bin: self.bin,
            bins,
        }
    }
}

/// The bins of `range`, from the windows of one volume; see [`BinBuilder`].
pub fn bin_series<'a>(
    volume: &Name,
    windows: impl IntoIterator<Item = &'a VolumeWindow>,
    range: Range<UnixNanos>,
    bin: i64,
) -> Result<BinSeries, BinError> {
    let mut builder = BinBuilder::new(volume.clone(), range, bin)?;
    windows.into_iter().for_each(|window| builder.add(window));
    Ok(builder.finish())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::window::SECOND_NS as S;

    fn window(start_s: i64, seconds: i64, read_bytes: Option<u64>) -> VolumeWindow {
        let mut window = VolumeWindow::unknown(start_s * S, seconds * S, "v".into());
        window.read.bytes = read_bytes;
        window
    }

    fn bins(windows: &[VolumeWindow], range: Range<i64>, bin_s: i64) -> Vec<Option<f64>> {
        let series = bin_series(
            &"v".into(),
            windows,
            range.start * S..range.end * S,
            bin_s * S,
        )
        .unwrap();
        series
            .bins
            .iter()
            .map(|bin| bin.and_then(|bin| bin.read_bytes))
            .collect()
    }

    #[test]
    fn missing_is_missing_and_idle_is_zero() {
        let windows = [
            window(0, 5, Some(10)),
            window(5, 5, Some(0)),
            window(15, 5, None),
        ];
        assert_eq!(
            bins(&windows, 0..20, 5),
            [Some(10.0), Some(0.0), None, None]
        );
    }

    #[test]
    fn a_half_known_bin_is_scaled_and_a_third_is_not_enough() {
        assert_eq!(bins(&[window(0, 5, Some(10))], 0..10, 10), [Some(20.0)]);
        assert_eq!(bins(&[window(0, 3, Some(10))], 0..10, 10), [None]);
    }

    #[test]
    fn long_windows_spread_over_short_bins() {
        assert_eq!(
            bins(&[window(0, 10, Some(100))], 0..10, 5),
            [Some(50.0), Some(50.0)]
        );
    }

    #[test]
    fn bad_questions_are_refused() {
        let ask = |range, bin| bin_series(&"v".into(), &[], range, bin).map(|s| s.bins.len());
        assert_eq!(ask(0..10, 0), Err(BinError::NoLength { bin: 0 }));
        assert!(matches!(
            ask(i64::MIN..i64::MAX, 1),
            Err(BinError::TooMany { .. })
        ));
        let (later, earlier) = (10, 0);
        assert_eq!(ask(later..earlier, 5), Ok(0));
        assert_eq!(ask(-7..0, 5), Ok(2));
    }

    proptest! {
        #[test]
        fn nothing_is_gained_or_lost_where_all_is_known(
            bytes in prop::collection::vec(0u64..1_000_000, 60..240),
            bin in 1i64..20,
        ) {
            let windows: Vec<_> =
                bytes.iter().enumerate().map(|(i, &b)| window(i as i64, 1, Some(b))).collect();
            let whole = bytes.len() as i64 / bin * bin;
            let got: f64 = bins(&windows, 0..whole, bin).into_iter().map(Option::unwrap).sum();
            let want: u64 = bytes[..whole as usize].iter().sum();
            prop_assert!((got - want as f64).abs() < 1e-3);
        }
    }
}
