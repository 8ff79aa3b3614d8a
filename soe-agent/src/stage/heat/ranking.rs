//! From scored blocks to the ranges to stage. Pure.

use crate::seam::ByteRange;
use crate::stage::score::ScoredRange;

/// Adds `more` to `scored`; a block that is in both keeps its higher score.
pub fn better_of_both(scored: &mut Vec<(u64, f64)>, more: Vec<(u64, f64)>) {
    if more.is_empty() {
        return;
    }
    scored.extend(more);
    scored.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
    scored.dedup_by_key(|s| s.0);
}

/// The best of the blocks `scored` (index, score), best first, of at most `budget` bytes together.
/// A block has `bytes` bytes; what reaches beyond `volume_bytes` is cut.
pub fn best(
    mut scored: Vec<(u64, f64)>,
    bytes: u64,
    budget: u64,
    volume_bytes: u64,
) -> Vec<ScoredRange> {
    let bytes = bytes.max(1);
    // Equal scores go by offset, so that the answer never depends on the order of arrival.
    let order = |a: &(u64, f64), b: &(u64, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let wanted = usize::try_from(budget / bytes)
        .unwrap_or(usize::MAX)
        .saturating_add(1);
    if wanted < scored.len() {
        scored.select_nth_unstable_by(wanted, order);
        scored.truncate(wanted);
    }
    scored.sort_unstable_by(order);
    let mut left = budget;
    let mut ranges = Vec::new();
    for (index, score) in scored {
        let Some(offset) = index.checked_mul(bytes).filter(|o| *o < volume_bytes) else {
            continue;
        };
        let len = bytes.min(volume_bytes - offset);
        if len > left {
            break;
        }
        left -= len;
        ranges.push(ScoredRange {
            range: ByteRange::new(offset, len),
            score,
        });
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_come_first_within_budget_and_volume() {
        let mut scored = vec![(3, 1.0), (1, 2.0), (9, 2.0), (u64::MAX, 9.0)];
        better_of_both(&mut scored, vec![(3, 5.0), (1, 0.5), (4, 0.1)]);
        let ranges = best(scored.clone(), 4096, 10 * 4096, 9 * 4096 + 100);
        let got: Vec<_> = ranges
            .iter()
            .map(|r| (r.range.offset / 4096, r.score))
            .collect();
        assert_eq!(got, [(3, 5.0), (1, 2.0), (9, 2.0), (4, 0.1)]);
        assert_eq!(ranges[2].range.len, 100, "the end of the volume cuts");
        assert_eq!(best(scored, 4096, 4096 + 4000, u64::MAX).len(), 1);
    }
}
