//! Evenly spaced load of one volume: what every forecaster sees.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::burst::{BurstDetector, BurstRule};
use crate::seam::UnixNanos;

/// The width of a bin and the number of bins after which load is expected to repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeScale {
    bin: Duration,
    season_bins: usize,
}

/// Seasons in a week; also how far back clock patterns and burst thresholds reach.
pub const SEASONS_IN_WEEK: usize = 7;

/// A step back of the clock by more bins than this is believed: what was recorded after the new
/// time is dropped. A smaller one is refused, because clocks are often corrected by a little.
const BELIEVED_STEP_BACK: i64 = 12;

/// Missing bins in a row that repeat the last known bin; later ones repeat the season before.
const CARRY_BINS: usize = 6;

impl TimeScale {
    /// Bins of five minutes and a season of a day.
    pub const FIVE_MINUTES: TimeScale = TimeScale {
        bin: Duration::from_secs(300),
        season_bins: 288,
    };

    /// A scale with bins of `bin` (1 ms to 1 day) and seasons of `season_bins` bins (8 to 100,000).
    ///
    /// # Errors
    /// [`SeriesError::Scale`] outside of these ranges.
    pub fn new(bin: Duration, season_bins: usize) -> Result<Self, SeriesError> {
        let bin_ok = (Duration::from_millis(1)..=Duration::from_secs(86_400)).contains(&bin);
        if !bin_ok || !(8..=100_000).contains(&season_bins) {
            return Err(SeriesError::Scale { bin, season_bins });
        }
        Ok(Self { bin, season_bins })
    }

    /// The width of a bin.
    pub fn bin(&self) -> Duration {
        self.bin
    }

    /// Bins in a season.
    pub fn season_bins(&self) -> usize {
        self.season_bins
    }

    /// Bins in seven seasons.
    pub fn week_bins(&self) -> usize {
        self.season_bins * SEASONS_IN_WEEK
    }

    /// The duration of a season.
    pub fn season(&self) -> Duration {
        self.bin
            .saturating_mul(u32::try_from(self.season_bins).unwrap_or(u32::MAX))
    }

    /// The width of a bin in nanoseconds.
    pub fn bin_nanos(&self) -> i64 {
        i64::try_from(self.bin.as_nanos()).unwrap_or(i64::MAX)
    }

    /// The number of the bin in which `at` falls, counted from the Unix epoch.
    pub fn index_of(&self, at: UnixNanos) -> i64 {
        at.div_euclid(self.bin_nanos())
    }

    /// When bin `index` starts.
    pub fn start_of(&self, index: i64) -> UnixNanos {
        index.saturating_mul(self.bin_nanos())
    }

    /// How many bins around the same clock time count as the same: about 1/144 of a season (ten
    /// minutes of a day), at least one.
    pub fn clock_tolerance(&self) -> usize {
        (self.season_bins / 144).max(1)
    }
}

/// What one volume did in one bin: totals of the bin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadBin {
    /// Bytes read.
    pub read_bytes: f64,
    /// Bytes written.
    pub write_bytes: f64,
    /// Read operations.
    pub read_ops: f64,
    /// Write operations.
    pub write_ops: f64,
}

impl LoadBin {
    /// Bytes read and written.
    pub fn bytes(&self) -> f64 {
        self.read_bytes + self.write_bytes
    }

    /// The mean load over a bin as wide as `bin`, in bytes per second.
    pub fn bytes_per_second(&self, bin: Duration) -> f64 {
        self.bytes() / bin.as_secs_f64()
    }

    /// Checks that every value is a finite number of at least zero.
    ///
    /// # Errors
    /// [`SeriesError::Value`] that names the first field that is not.
    pub fn check(&self) -> Result<(), SeriesError> {
        let fields = [
            ("read_bytes", self.read_bytes),
            ("write_bytes", self.write_bytes),
            ("read_ops", self.read_ops),
            ("write_ops", self.write_ops),
        ];
        for (field, value) in fields {
            // The upper bound keeps squares and sums of a whole history finite.
            if !(0.0..=1e30).contains(&value) {
                return Err(SeriesError::Value { field, value });
            }
        }
        Ok(())
    }
}

/// Why a bin was not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SeriesError {
    /// A value is not a load.
    #[error("bin of load: {field} is {value}, not a number from 0 to 1e30; the bin is left out")]
    Value {
        /// The field.
        field: &'static str,
        /// Its value.
        value: f64,
    },
    /// The bin is not later than the last one.
    #[error(
        "bin of load starts at {got} ns, but bins up to {expected} ns are already closed \
         (did the clock go back?); the bin is left out"
    )]
    ClockWentBack {
        /// The earliest start that would be taken, in nanoseconds since the Unix epoch.
        expected: UnixNanos,
        /// The start of the refused bin.
        got: UnixNanos,
    },
    /// The time scale is out of range.
    #[error(
        "time scale: bins of {bin:?} and seasons of {season_bins} bins; use bins of 1 ms to 1 day \
         and seasons of 8 to 100000 bins"
    )]
    Scale {
        /// The width of a bin.
        bin: Duration,
        /// Bins in a season.
        season_bins: usize,
    },
}

/// What is kept of a bin.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// Mean load in bytes per second; carried from earlier bins if the bin is missing.
    pub load: f32,
    /// `ln(1 + load / 1 KiB/s)`.
    pub log: f32,
    /// Above this load the bin would have been a burst, by what was known before it.
    pub threshold: f32,
    /// Whether the load was measured; missing bins are never scored.
    pub known: bool,
    /// Whether the bin was a burst.
    pub burst: bool,
    /// Whether a burst began in the bin.
    pub onset: bool,
}

/// `ln(1 + load / 1 KiB/s)`: the scale on which load is modelled.
pub fn log_load(bytes_per_second: f64) -> f32 {
    (bytes_per_second.max(0.0) / 1024.0).ln_1p() as f32
}

/// The inverse of [`log_load`], in bytes per second.
pub fn from_log_load(log: f32) -> f32 {
    // Beyond this the answer would overflow an f32; no device is that fast.
    (f64::from(log.clamp(0.0, 60.0)).exp_m1() * 1024.0) as f32
}

/// The load history of one volume, of bounded length.
#[derive(Clone, Debug)]
pub struct Series {
    scale: TimeScale,
    first: i64,
    rows: Vec<Row>,
    keep: usize,
    missing_run: usize,
    detector: BurstDetector,
}

impl Series {
    /// An empty series that keeps at least `keep_seasons` (8 or more) seasons.
    pub fn new(scale: TimeScale, rule: BurstRule, keep_seasons: usize) -> Self {
        Self {
            scale,
            first: 0,
            rows: Vec::new(),
            keep: keep_seasons.max(SEASONS_IN_WEEK + 1) * scale.season_bins,
            missing_run: 0,
            detector: BurstDetector::new(scale, rule),
        }
    }

    /// The scale of the series.
    pub fn scale(&self) -> TimeScale {
        self.scale
    }

    /// Takes the bin in which `start` falls; `None` for a bin of which nothing is known. Bins
    /// that were skipped become missing bins.
    ///
    /// # Errors
    /// [`SeriesError::Value`] for a value that is no load, [`SeriesError::ClockWentBack`] for a
    /// bin that is not later than the last; the series is then as before.
    pub fn push(&mut self, start: UnixNanos, load: Option<LoadBin>) -> Result<(), SeriesError> {
        if let Some(load) = &load {
            load.check()?;
        }
        let index = self.scale.index_of(start);
        if self.rows.is_empty() {
            self.first = index;
        }
        let next = self.first + self.rows.len() as i64;
        if index < next {
            let back = next - index;
            if back <= BELIEVED_STEP_BACK {
                return Err(SeriesError::ClockWentBack {
                    expected: self.scale.start_of(next),
                    got: start,
                });
            }
            match usize::try_from(index - self.first) {
                Ok(kept) => self.rows.truncate(kept),
                Err(_) => self.restart(index),
            }
        } else if index - next > self.keep as i64 {
            self.restart(index);
        }
        let next = self.first + self.rows.len() as i64;
        for _ in next..index {
            self.append(None);
        }
        self.append(load);
        if self.rows.len() >= self.keep + self.keep / 4 {
            let surplus = self.rows.len() - self.keep;
            self.rows.drain(..surplus);
            self.first += surplus as i64;
        }
        Ok(())
    }

    /// Everything known so far.
    pub fn known(&self) -> Known<'_> {
        self.until(self.rows.len())
    }

    /// What was known after the first `bins` bins that are still kept.
    pub fn until(&self, bins: usize) -> Known<'_> {
        Known {
            scale: self.scale,
            first: self.first,
            rows: &self.rows[..bins.min(self.rows.len())],
        }
    }

    /// Bins kept.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether no bin was taken yet.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    fn restart(&mut self, index: i64) {
        self.rows.clear();
        self.first = index;
        self.missing_run = 0;
    }

    fn append(&mut self, load: Option<LoadBin>) {
        let mark = self
            .detector
            .push(load.map(|l| l.bytes_per_second(self.scale.bin)));
        let mut row = match load {
            Some(load) => {
                self.missing_run = 0;
                measured(&load, self.scale.bin)
            }
            None => {
                self.missing_run += 1;
                self.carried()
            }
        };
        row.threshold = mark.threshold as f32;
        row.burst = mark.burst;
        row.onset = mark.onset;
        self.rows.push(row);
    }

    /// The best guess for a missing bin: the last known one for a while, then the season before.
    fn carried(&self) -> Row {
        let last = self.rows.last().copied();
        let season_ago = self
            .rows
            .len()
            .checked_sub(self.scale.season_bins)
            .and_then(|i| self.rows.get(i).copied());
        let from = if self.missing_run <= CARRY_BINS {
            last
        } else {
            season_ago.or(last)
        };
        Row {
            known: false,
            ..from.unwrap_or(measured(&LoadBin::default(), self.scale.bin))
        }
    }
}

fn measured(load: &LoadBin, bin: Duration) -> Row {
    let per_second = load.bytes_per_second(bin);
    Row {
        load: per_second as f32,
        log: log_load(per_second),
        threshold: f32::INFINITY,
        known: true,
        burst: false,
        onset: false,
    }
}

/// What may be used at one moment: a series that ends there.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The scale.
    pub scale: TimeScale,
    /// The number of the first bin since the Unix epoch.
    pub first: i64,
    /// The bins, oldest first.
    pub rows: &'a [Row],
}

impl<'a> Known<'a> {
    /// The number of the first bin that is not known: the first one to forecast.
    pub fn next_index(&self) -> i64 {
        self.first + self.rows.len() as i64
    }

    /// When the last known bin ended.
    pub fn issued_at(&self) -> UnixNanos {
        self.scale.start_of(self.next_index())
    }

    /// The last `bins` bins, or as many as there are.
    pub fn trailing(&self, bins: usize) -> &'a [Row] {
        &self.rows[self.rows.len().saturating_sub(bins)..]
    }

    /// The trailing season.
    pub fn season(&self) -> &'a [Row] {
        self.trailing(self.scale.season_bins)
    }

    /// The row `back` bins before the first bin to forecast; `1` is the last known one.
    pub fn back(&self, back: usize) -> Option<&'a Row> {
        self.rows
            .len()
            .checked_sub(back)
            .and_then(|i| self.rows.get(i))
    }

    /// How many seasons of history there are.
    pub fn seasons(&self) -> f64 {
        self.rows.len() as f64 / self.scale.season_bins as f64
    }
}

/// The quantile `level` of ascending `sorted` values, interpolated linearly; 0 without values.
pub fn quantile_of_sorted(sorted: &[f32], level: f64) -> f32 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let position = level.clamp(0.0, 1.0) * last as f64;
    let below = position.floor() as usize;
    let above = (below + 1).min(last);
    let share = (position - below as f64) as f32;
    sorted[below] + (sorted[above] - sorted[below]) * share
}

#[cfg(test)]
pub(super) mod support {
    use super::*;

    /// A series of one-second bins and seasons of 24, with these loads in bytes.
    pub(in crate::model) fn series_of(loads: &[Option<f64>], keep_seasons: usize) -> Series {
        let scale = TimeScale::new(Duration::from_secs(1), 24).unwrap();
        let mut series = Series::new(scale, BurstRule::default(), keep_seasons);
        for (i, load) in loads.iter().enumerate() {
            let bin = load.map(|bytes| LoadBin {
                read_bytes: bytes,
                ..LoadBin::default()
            });
            series.push(i as i64 * 1_000_000_000, bin).unwrap();
        }
        series
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scale() -> TimeScale {
        TimeScale::new(Duration::from_secs(1), 24).unwrap()
    }

    fn series() -> Series {
        Series::new(scale(), BurstRule::default(), 8)
    }

    fn load(bytes: f64) -> LoadBin {
        LoadBin {
            read_bytes: bytes,
            read_ops: 1.0,
            ..LoadBin::default()
        }
    }

    const S: i64 = 1_000_000_000;

    #[test]
    fn values_that_are_no_load_are_refused_and_named() {
        for bad in [f64::NAN, f64::INFINITY, -1.0, 1e31] {
            let mut s = series();
            let bin = LoadBin {
                write_bytes: bad,
                ..LoadBin::default()
            };
            let error = s.push(0, Some(bin)).unwrap_err();
            assert!(error.to_string().contains("write_bytes"), "{error}");
            assert!(s.is_empty());
        }
    }

    #[test]
    fn a_small_step_back_is_refused_and_a_large_one_believed() {
        let mut s = series();
        for i in 0..40 {
            s.push(i * S, Some(load(i as f64))).unwrap();
        }
        assert!(matches!(
            s.push(38 * S, Some(load(0.0))),
            Err(SeriesError::ClockWentBack { .. })
        ));
        assert_eq!(s.len(), 40);
        s.push(10 * S, Some(load(7.0))).unwrap();
        assert_eq!(s.len(), 11);
        assert_eq!(s.known().back(1).unwrap().load, 7.0);
        s.push(-100 * S, Some(load(1.0))).unwrap();
        assert_eq!((s.len(), s.known().first), (1, -100));
    }

    #[test]
    fn missing_bins_are_carried_then_taken_from_the_season_before() {
        let mut s = series();
        for i in 0..24 {
            s.push(i * S, Some(load(f64::from(100 + i as i32))))
                .unwrap();
        }
        s.push(34 * S, None).unwrap();
        let rows = s.known().rows.to_vec();
        assert_eq!(rows.len(), 35);
        assert!(rows[24..].iter().all(|r| !r.known));
        assert_eq!(rows[29].load, 123.0, "six bins carry the last value");
        assert_eq!(rows[30].load, 106.0, "then the season before");
    }

    #[test]
    fn a_gap_longer_than_what_is_kept_starts_afresh() {
        let mut s = series();
        s.push(0, Some(load(5.0))).unwrap();
        s.push(10_000_000 * S, Some(load(6.0))).unwrap();
        assert_eq!(s.len(), 1);
    }

    #[test]
    fn length_is_bounded() {
        let mut s = series();
        for i in 0..5_000 {
            s.push(i * S, Some(load(1.0))).unwrap();
        }
        assert!((8 * 24..=10 * 24).contains(&s.len()), "{}", s.len());
        assert_eq!(s.known().next_index(), 5_000);
    }

    #[test]
    fn scales_out_of_range_are_refused() {
        assert!(TimeScale::new(Duration::ZERO, 24).is_err());
        assert!(TimeScale::new(Duration::from_secs(1), 7).is_err());
        assert!(TimeScale::new(Duration::from_secs(1), 100_001).is_err());
    }

    #[test]
    fn quantiles_interpolate() {
        assert_eq!(quantile_of_sorted(&[], 0.5), 0.0);
        assert_eq!(quantile_of_sorted(&[3.0], 0.9), 3.0);
        assert_eq!(quantile_of_sorted(&[0.0, 1.0, 2.0, 3.0, 4.0], 0.9), 3.6);
    }

    proptest! {
        #[test]
        fn log_load_round_trips(v in 0.0f64..1e12) {
            let back = f64::from(from_log_load(log_load(v)));
            prop_assert!((back - v).abs() <= 1.0 + v * 1e-4, "{v} -> {back}");
        }

        #[test]
        fn any_sequence_of_times_and_values_keeps_the_series_sound(
            pushes in proptest::collection::vec((-50i64..3_000, proptest::option::of(prop_oneof![
                Just(f64::NAN), Just(-1.0), Just(0.0), 0.0f64..1e12
            ])), 0..200)
        ) {
            let mut s = series();
            for (at, value) in pushes {
                let before = s.len();
                if s.push(at * S, value.map(load)).is_err() {
                    prop_assert_eq!(s.len(), before);
                }
                for row in s.known().rows {
                    prop_assert!(row.load.is_finite() && row.log.is_finite() && row.load >= 0.0);
                }
            }
        }
    }
}
