//! From windows of statistics to bins of load. Pure.

use crate::model::{LoadBin, TimeScale};
use crate::seam::UnixNanos;
use crate::window::VolumeWindow;

/// A window this many times longer than configured does not tell what happened when.
const LONG_WINDOW: i64 = 4;

/// Spreads a window over the bins it lies in, and returns the bins that ended with it. Bins in which
/// nothing was sampled are unknown, and so are those of a window that is much longer than it should be
/// (the host slept, or its clock went ahead): it does not tell what happened when.
///
/// `open` is the first bin that was not told yet. The two clocks differ by a little, so a window may
/// seem to begin in the bin before; what it has of it goes to the open one.
pub(super) fn spread(
    scale: TimeScale,
    usual: i64,
    bin: &mut Option<(i64, LoadBin)>,
    open: &mut i64,
    window: &VolumeWindow,
) -> Vec<(UnixNanos, Option<LoadBin>)> {
    let end = window.start.saturating_add(window.interval.max(1));
    let begins = scale.start_of(*open);
    let start =
        if window.start < begins && begins < end && *open - scale.index_of(window.start) == 1 {
            begins
        } else {
            window.start
        };
    let (first, last) = (scale.index_of(start), scale.index_of(end - 1));
    let mut closed = Vec::new();
    if let Some((filling, load)) = bin.take_if(|(filling, _)| *filling != first) {
        closed.push((scale.start_of(filling), Some(load)));
        for missing in (filling + 1..first).take(scale.week_bins()) {
            closed.push((scale.start_of(missing), None));
        }
    }
    if window.interval > usual.saturating_mul(LONG_WINDOW).max(scale.bin_nanos()) {
        *bin = None;
        for unknown in (first..=last).take(scale.week_bins()) {
            closed.push((scale.start_of(unknown), None));
        }
        return closed;
    }
    for index in first..=last {
        let (from, to) = (scale.start_of(index), scale.start_of(index + 1));
        let share = (end.min(to) - start.max(from)) as f64 / (end - start) as f64;
        let (_, load) = bin.get_or_insert((index, LoadBin::default()));
        let add = |to: &mut f64, value: Option<u64>| *to += value.unwrap_or(0) as f64 * share;
        add(&mut load.read_bytes, window.read.bytes);
        add(&mut load.write_bytes, window.write.bytes);
        add(&mut load.read_ops, window.read.ops);
        add(&mut load.write_ops, window.write.ops);
        if end >= to
            && let Some((_, load)) = bin.take()
        {
            closed.push((from, Some(load)));
        }
    }
    // A clock that stepped back fills the same hours once more.
    *open = last + i64::from(bin.is_none());
    closed
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::window::DirectionStats;

    const S: i64 = 1_000_000_000;

    fn window(start: i64, interval: i64, bytes: u64) -> VolumeWindow {
        let stats = |bytes| DirectionStats::measured(1, bytes, Default::default(), None);
        VolumeWindow {
            start,
            interval,
            read: stats(bytes),
            write: stats(0),
            ..VolumeWindow::unknown(start, interval, "v".into())
        }
    }

    fn closed(bin: &mut Option<(i64, LoadBin)>, window: &VolumeWindow) -> Vec<(i64, Option<f64>)> {
        closed_from(bin, &mut 0, window)
    }

    fn closed_from(
        bin: &mut Option<(i64, LoadBin)>,
        open: &mut i64,
        window: &VolumeWindow,
    ) -> Vec<(i64, Option<f64>)> {
        let scale = TimeScale::new(Duration::from_secs(1), 24).unwrap();
        spread(scale, S, bin, open, window)
            .into_iter()
            .map(|(start, load)| (start / S, load.map(|l| l.read_bytes)))
            .collect()
    }

    #[test]
    fn windows_that_drift_against_the_bins_lose_and_skip_nothing() {
        let mut bin = None;
        let mut seen = Vec::new();
        let (mut at, mut bytes) = (100 * S, 0.0);
        while at < 200 * S {
            let length = S + 13_000_000;
            seen.extend(closed(&mut bin, &window(at, length, 1_013_000)));
            at += length;
            bytes += 1_013_000.0;
        }
        let starts: Vec<i64> = seen.iter().map(|(start, _)| *start).collect();
        let wanted: Vec<i64> = (100..100 + starts.len() as i64).collect();
        assert_eq!(starts, wanted, "every bin once");
        for (start, load) in &seen {
            let load = load.expect("a known bin");
            assert!((load - 1e6).abs() < 1.0, "bin {start} has {load}");
        }
        let sum: f64 = seen.iter().filter_map(|(_, load)| *load).sum();
        let rest = bin.map_or(0.0, |(_, load)| load.read_bytes);
        assert!(
            (sum + rest - bytes).abs() < 1.0,
            "{sum} + {rest} of {bytes}"
        );
    }

    #[test]
    fn a_bin_ends_with_the_window_that_reaches_its_end() {
        let mut bin = None;
        assert_eq!(closed(&mut bin, &window(5 * S, S / 2, 7)), []);
        assert_eq!(
            closed(&mut bin, &window(5 * S + S / 2, S / 2, 7)),
            [(5, Some(14.0))]
        );
        assert!(bin.is_none());
    }

    #[test]
    fn no_bin_is_told_twice_when_a_window_seems_to_begin_too_early() {
        let (mut bin, mut open) = (None, 0);
        let first = closed_from(&mut bin, &mut open, &window(5 * S, S, 7));
        assert_eq!((first, open), (vec![(5, Some(7.0))], 6));
        let second = closed_from(&mut bin, &mut open, &window(6 * S - 900, S + 900, 8));
        assert_eq!((second, open), (vec![(6, Some(8.0))], 7));
        // A clock that was set back is another thing.
        let third = closed_from(&mut bin, &mut open, &window(2 * S, S, 9));
        assert_eq!((third, open), (vec![(2, Some(9.0))], 3));
    }

    #[test]
    fn a_gap_and_a_sleep_are_unknown() {
        let mut bin = None;
        closed(&mut bin, &window(5 * S, S / 2, 7));
        let gap = closed(&mut bin, &window(8 * S, S / 2, 9));
        assert_eq!(gap, [(5, Some(7.0)), (6, None), (7, None)]);
        let mut bin = None;
        let slept = closed(&mut bin, &window(20 * S, 5 * S, 9));
        assert_eq!(slept, [20, 21, 22, 23, 24].map(|start| (start, None)));
    }
}
