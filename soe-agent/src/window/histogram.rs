//! Sparse counts over the buckets that kernel and agent share, and their quantiles.

use hdrhistogram::Histogram;
use soe_common::histogram::{BUCKETS, MAX_BITS, bucket_middle, bucket_of};

/// Counts per bucket of [`soe_common::histogram`], ascending, without empty buckets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogHistogram {
    counts: Vec<(u16, u64)>,
}

/// Quantiles of a latency distribution, in nanoseconds. All but `max` are off by at most a
/// sixteenth of themselves, which is the width of half a bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LatencySummary {
    /// The median.
    pub p50: u64,
    /// Nine of ten were at most this.
    pub p90: u64,
    /// 99 of 100 were at most this.
    pub p99: u64,
    /// 999 of 1,000 were at most this.
    pub p999: u64,
    /// The largest; exact when it was measured apart from the histogram.
    pub max: u64,
}

impl LogHistogram {
    /// Takes over dense counts; what lies past the last known bucket is counted in the last.
    pub fn from_counts(dense: &[u64]) -> Self {
        let mut histogram = Self::default();
        for (bucket, &count) in dense.iter().enumerate() {
            histogram.add(bucket, count);
        }
        histogram
    }

    /// Adds one value `count` times.
    pub fn record(&mut self, value: u64, count: u64) {
        self.add(bucket_of(value), count);
    }

    /// Adds to a bucket by its index.
    pub fn add(&mut self, bucket: usize, count: u64) {
        if count == 0 {
            return;
        }
        let bucket = bucket.min(BUCKETS - 1) as u16;
        match self.counts.binary_search_by_key(&bucket, |entry| entry.0) {
            Ok(at) => {
                if let Some(entry) = self.counts.get_mut(at) {
                    entry.1 = entry.1.saturating_add(count);
                }
            }
            Err(at) => self.counts.insert(at, (bucket, count)),
        }
    }

    /// Adds all of another histogram.
    pub fn merge(&mut self, other: &Self) {
        for &(bucket, count) in &other.counts {
            self.add(usize::from(bucket), count);
        }
    }

    /// The non-empty buckets, ascending, as (index, count).
    pub fn iter(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.counts
            .iter()
            .map(|&(bucket, count)| (usize::from(bucket), count))
    }

    /// Number of values.
    pub fn total(&self) -> u64 {
        self.counts
            .iter()
            .fold(0, |sum, entry| sum.saturating_add(entry.1))
    }

    /// Whether nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// The quantiles, or `None` without values. `max` is the exact maximum where it is known; else
    /// the middle of the highest bucket is taken.
    pub fn summary(&self, max: Option<u64>) -> Option<LatencySummary> {
        let highest = bucket_middle(usize::from(self.counts.last()?.0));
        let max = max.unwrap_or(highest);
        // Two significant digits: 1 % beside the 6 % of the buckets.
        let mut hdr = Histogram::<u64>::new_with_bounds(1, 1 << (MAX_BITS + 1), 2).ok()?;
        for (bucket, count) in self.iter() {
            hdr.saturating_record_n(bucket_middle(bucket).max(1), count);
        }
        let at = |quantile| hdr.value_at_quantile(quantile).min(max);
        Some(LatencySummary {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max,
        })
    }

    /// The median as the middle of its bucket, or `None` without values.
    pub fn median(&self) -> Option<u64> {
        let half = self.total().div_ceil(2);
        let mut below = 0u64;
        for (bucket, count) in self.iter() {
            below = below.saturating_add(count);
            if below >= half {
                return Some(bucket_middle(bucket));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn exact(sorted: &[u64], quantile: f64) -> u64 {
        let rank = ((quantile * sorted.len() as f64).ceil() as usize).clamp(1, sorted.len());
        sorted[rank - 1]
    }

    proptest! {
        #[test]
        fn quantiles_stay_within_the_width_of_a_bucket(
            mut values in prop::collection::vec(1u64..1 << 36, 1..400),
        ) {
            let mut histogram = LogHistogram::default();
            for &value in &values {
                histogram.record(value, 1);
            }
            values.sort_unstable();
            let max = values.last().copied();
            let summary = histogram.summary(max).unwrap();
            prop_assert_eq!(Some(summary.max), max);
            for (got, quantile) in
                [(summary.p50, 0.5), (summary.p90, 0.9), (summary.p99, 0.99), (summary.p999, 0.999)]
            {
                let want = exact(&values, quantile);
                prop_assert!(got.abs_diff(want) <= want / 12 + 1, "{quantile}: {got}, not {want}");
            }
        }

        #[test]
        fn merging_is_counting_together(
            a in prop::collection::vec(0u64..u64::MAX, 0..50),
            b in prop::collection::vec(0u64..u64::MAX, 0..50),
        ) {
            let of = |values: &[u64]| {
                let mut histogram = LogHistogram::default();
                values.iter().for_each(|&value| histogram.record(value, 1));
                histogram
            };
            let mut merged = of(&a);
            merged.merge(&of(&b));
            prop_assert_eq!(merged.total(), (a.len() + b.len()) as u64);
            prop_assert_eq!(merged, of(&[a, b].concat()));
        }
    }

    #[test]
    fn nothing_recorded_has_no_quantiles() {
        assert_eq!(LogHistogram::default().summary(Some(5)), None);
        assert_eq!(LogHistogram::default().median(), None);
        assert_eq!(
            LogHistogram::from_counts(&[0; BUCKETS + 9]),
            LogHistogram::default()
        );
    }
}
