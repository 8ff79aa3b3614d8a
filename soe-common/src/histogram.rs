//! A log-linear histogram of nanoseconds whose bucket maths both halves share.
//!
//! Every power of two is cut into [`SUB_BUCKETS`] equal buckets, so that a value taken as the middle
//! of its bucket is off by at most 1/16 of itself. Values below [`SUB_BUCKETS`] have a bucket each.

/// log2 of the buckets per power of two.
pub const SUB_BITS: u32 = 3;
/// Buckets per power of two.
pub const SUB_BUCKETS: u32 = 1 << SUB_BITS;
/// The largest power of two that is told apart, in bits: 2^38 ns are 275 s; all above falls into the
/// last bucket.
pub const MAX_BITS: u32 = 38;
/// Number of buckets.
pub const BUCKETS: usize = ((MAX_BITS - SUB_BITS + 1) * SUB_BUCKETS) as usize;

/// The bucket that `value` falls into; always below [`BUCKETS`].
#[inline(always)]
pub const fn bucket_of(value: u64) -> usize {
    if value < SUB_BUCKETS as u64 {
        return value as usize;
    }
    let magnitude = 63 - value.leading_zeros();
    if magnitude >= MAX_BITS {
        return BUCKETS - 1;
    }
    let sub = (value >> (magnitude - SUB_BITS)) as u32 & (SUB_BUCKETS - 1);
    (((magnitude - SUB_BITS + 1) * SUB_BUCKETS) + sub) as usize
}

/// The smallest value of bucket `index`.
pub const fn bucket_low(index: usize) -> u64 {
    let index = index as u64;
    let sub_buckets = SUB_BUCKETS as u64;
    if index < sub_buckets {
        return index;
    }
    let magnitude = index / sub_buckets - 1;
    (sub_buckets + index % sub_buckets) << magnitude
}

/// The middle of bucket `index`: what a reader takes for a value that fell into it.
pub const fn bucket_middle(index: usize) -> u64 {
    let low = bucket_low(index);
    let high = bucket_low(index + 1);
    low + (high - low) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bucket_holds_its_own_low_end_and_the_value_below_the_next() {
        for index in 0..BUCKETS - 1 {
            assert_eq!(bucket_of(bucket_low(index)), index);
            assert_eq!(bucket_of(bucket_low(index + 1) - 1), index);
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn the_middle_of_a_bucket_is_off_by_at_most_a_sixteenth() {
        let mut value = 1u64;
        while value < 1 << (MAX_BITS - 1) {
            for v in [value, value + value / 3, value * 2 - 1] {
                let middle = bucket_middle(bucket_of(v));
                assert!(middle.abs_diff(v) <= v / 16 + 1, "{v} became {middle}");
            }
            value *= 2;
        }
    }
}
