//! The inputs from which the onset of a burst is foretold. Pure.
//!
//! What counts is history at the clock times to come, the rhythm of earlier onsets, and how near the load
//! is to the threshold. A *label* at a bin is whether a burst began two to seven bins after it: what is
//! to be foretold, with a bin of lead. Days are seasons, and hours 24ths of one.

use super::ONSET_BINS;
use super::baselines::Smoothed;
use super::series::{Known, Row, SEASONS_IN_WEEK, Series, log_load};

/// Bins between what is known and the first in which an onset counts.
pub const LEAD: usize = 1;
/// Bins after which a label is known.
pub const MATURES: usize = LEAD + ONSET_BINS;

/// How many inputs a sample has.
pub const ONSET_INPUTS: usize = 82;

/// Days of history that are looked at.
const DAYS: usize = 28;
/// The share of a label's window that must be known.
const KNOWN: f64 = 0.6;
/// Intervals between onsets that are looked at.
const INTERVALS: usize = 100;

/// Whether a burst begins in the window after the first `bins` bins; `None` where that cannot be told or
/// is not asked.
pub(super) fn label(series: &Series, bins: usize) -> Option<bool> {
    let rows = series.known().rows;
    let now = rows.get(bins.checked_sub(1)?)?;
    let window = rows.get(bins + LEAD..bins + MATURES)?;
    let known = window.iter().filter(|row| row.known).count() as f64;
    (now.known && !now.burst && known >= KNOWN * window.len() as f64)
        .then(|| window.iter().any(|row| row.onset))
}

/// What is known of a volume, with sums that make counting in any range cheap.
struct Past<'a> {
    rows: &'a [Row],
    /// Onsets, and bursts, before each row.
    onsets: Vec<u32>,
    bursts: Vec<u32>,
    day: usize,
    hour: usize,
}

impl<'a> Past<'a> {
    fn of(known: Known<'a>) -> Self {
        let day = known.scale.season_bins();
        // A margin for what is looked at beside the same clock time.
        let rows = known.trailing((DAYS + 1) * day);
        let sums = |hit: fn(&Row) -> bool| {
            let mut sum = 0;
            let mut sums = Vec::with_capacity(rows.len() + 1);
            sums.push(0);
            for row in rows {
                sum += u32::from(hit(row));
                sums.push(sum);
            }
            sums
        };
        Self {
            rows,
            onsets: sums(|row| row.onset),
            bursts: sums(|row| row.burst),
            day,
            hour: (day / 24).max(1),
        }
    }

    /// The index of the last known bin.
    fn now(&self) -> i64 {
        self.rows.len() as i64 - 1
    }

    /// Onsets in `[from, to)`, indices that may lie outside.
    fn count(sums: &[u32], from: i64, to: i64) -> u32 {
        let at = |index: i64| {
            let index = usize::try_from(index).unwrap_or(0).min(sums.len() - 1);
            sums.get(index).copied().unwrap_or(0)
        };
        at(to).saturating_sub(at(from))
    }

    /// Whether a burst began in the bins `first` to `last` after the one `back` bins ago.
    fn began(&self, back: i64, first: i64, last: i64) -> f32 {
        let at = self.now() - back;
        if at < 0 {
            return 0.0;
        }
        let any = Self::count(&self.onsets, at + first, at + last + 1) > 0;
        f32::from(u8::from(any))
    }

    /// The label of the bin `back` bins ago; one that is not known yet counts as the newest that is.
    fn label(&self, back: i64) -> f32 {
        let back = back.max(MATURES as i64);
        self.began(back, LEAD as i64 + 1, MATURES as i64)
    }

    /// As [`Self::label`], three bins wider to either side.
    fn wide_label(&self, back: i64) -> f32 {
        self.began(back.max(MATURES as i64 + 3), -1, MATURES as i64 + 3)
    }

    /// The decayed mean of labels at the same clock time, `off` bins later, on the days before.
    fn decayed(&self, keep: f32, off: i64, label: fn(&Self, i64) -> f32) -> f32 {
        let mut weight = 1.0 - keep;
        let mut sum = 0.0;
        for day in 1..=DAYS {
            sum += weight * label(self, (day * self.day) as i64 - off);
            weight *= keep;
        }
        sum
    }

    fn mean_label(&self, step: usize, count: usize, of: f32) -> f32 {
        let sum: f32 = (1..=count).map(|k| self.label((k * step) as i64)).sum();
        sum / of.max(1.0)
    }
}

/// The inputs for the onset of a burst in the window after what is known: [`ONSET_INPUTS`] finite values.
pub fn onset_features(known: Known<'_>) -> Vec<f32> {
    let past = Past::of(known);
    let (day, hour) = (past.day, past.hour);
    let mut x = Vec::with_capacity(ONSET_INPUTS);

    // The same clock time on earlier days.
    for days in [1, 2, 3, 4, 5, 6, 7, 14, 21, 28] {
        x.push(past.label((days * day) as i64));
    }
    let days = (past.rows.len() / day).clamp(1, DAYS);
    x.push(past.mean_label(day, 7, 7.0));
    x.push(past.mean_label(day, 14, days.min(14) as f32));
    x.push(past.mean_label(day, 28, days as f32));
    x.push(past.mean_label(SEASONS_IN_WEEK * day, 4, 4.0));
    for label in [Past::label, Past::wide_label] {
        for keep in [0.8, 0.93] {
            x.push(past.decayed(keep, 0, label));
        }
    }
    for reach in [hour as i64 / 2, hour as i64 * 3 / 2] {
        let around = (-reach..=reach).map(|off| past.decayed(0.93, off, Past::label));
        x.push(around.sum::<f32>() / (2 * reach + 1) as f32);
    }

    // The same phase of the hours before, and of longer periods.
    x.extend((1..=12).map(|k| past.label((k * hour) as i64)));
    for hours in [1, 4, 6, 12] {
        for over in [24, 24 * SEASONS_IN_WEEK] {
            let count = over / hours;
            x.push(past.mean_label(hours * hour, count, count as f32));
        }
    }

    rhythm(&past, &mut x);
    activity(&past, &mut x);
    level(known, &past, &mut x);
    debug_assert_eq!(x.len(), ONSET_INPUTS);
    x
}

/// The intervals between onsets, and how long ago the last one was.
fn rhythm(past: &Past<'_>, x: &mut Vec<f32>) {
    let now = past.now();
    let times: Vec<i64> = past
        .rows
        .iter()
        .enumerate()
        .filter(|(_, row)| row.onset)
        .map(|(at, _)| at as i64)
        .collect();
    let never = ((SEASONS_IN_WEEK * past.day + 1) as f32).ln();
    let Some(&last) = times.last() else {
        x.extend([never, never, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        return;
    };
    let elapsed = now - last;
    // What an interval must be so that the next onset falls into the window.
    let (first, until) = (elapsed + 1 + LEAD as i64, elapsed + MATURES as i64);
    let intervals: Vec<i64> = times
        .windows(2)
        .rev()
        .take(INTERVALS)
        .map(|pair| pair[1] - pair[0])
        .collect();
    x.push((elapsed as f32).ln_1p());
    x.push(intervals.first().map_or(never, |i| (*i as f32).ln_1p()));

    let (mut weight, mut hits, mut all) = (1.0f32, [0.0f32; 2], [0.0f32; 2]);
    for interval in &intervals {
        if *interval >= first {
            for (n, w) in [1.0, weight].into_iter().enumerate() {
                all[n] += w;
                hits[n] += if *interval <= until { w } else { 0.0 };
            }
        }
        weight *= 0.93;
    }
    x.extend((0..2).map(|n| (hits[n] + 0.3) / (all[n] + 3.0)));
    let again = intervals
        .first()
        .is_some_and(|i| (first..=until).contains(i));
    x.push(f32::from(u8::from(again)));

    // What followed intervals like the last one.
    let (mut like, mut hit) = (0.0f32, 0.0f32);
    if let Some(newest) = intervals.first() {
        for pair in intervals.windows(2).take(10) {
            let (next, before) = (pair[0], pair[1]);
            if (newest - before).abs() <= 2 && next >= first {
                like += 1.0;
                hit += f32::from(u8::from(next <= until));
            }
        }
    }
    x.push((hit + 0.1) / (like + 1.0));

    // Sums of the newest intervals that would end in the window.
    let mut sum = 0;
    let ends = intervals.iter().take(7).filter(|interval| {
        sum += **interval;
        (first..=until).contains(&sum)
    });
    x.push(ends.count() as f32);
    let day = Past::count(&past.onsets, now + 1 - past.day as i64, now + 1);
    x.push(day as f32 / 10.0);
    let fourth = times[times.len().saturating_sub(4)];
    x.push(((now - fourth) as f32).ln_1p());
}

/// How much of the time was burst of late.
fn activity(past: &Past<'_>, x: &mut Vec<f32>) {
    let now = past.now();
    let run = past.rows.iter().rev().take_while(|row| !row.burst).count() as f32;
    x.push(run.min(3.0) / 3.0);
    x.push(run.ln_1p() / 5.0);
    let week = SEASONS_IN_WEEK * past.day;
    for bins in [past.hour, 3 * past.hour, past.day, week] {
        let bursts = Past::count(&past.bursts, now + 1 - bins as i64, now + 1) as f32;
        x.push((bursts / bins as f32).sqrt());
    }
    for bins in [past.day, week, DAYS * past.day] {
        let onsets = Past::count(&past.onsets, now + 1 - bins as i64, now + 1) as f32;
        x.push(((onsets + 0.5) / bins as f32 * 100.0).ln());
    }
}

/// How near the load is to the threshold, now and at the same clock time before.
fn level(known: Known<'_>, past: &Past<'_>, x: &mut Vec<f32>) {
    let threshold = known.back(1).map_or(0.0, |row| match row.threshold {
        t if t.is_finite() => log_load(f64::from(t)),
        _ => 0.0,
    });
    let moments = |rows: &[Row]| {
        let n = rows.len().max(1) as f64;
        let mean = rows.iter().map(|r| f64::from(r.log)).sum::<f64>() / n;
        let square = rows.iter().map(|r| f64::from(r.log).powi(2)).sum::<f64>() / n;
        (mean as f32, (square - mean * mean).max(0.0).sqrt() as f32)
    };
    let (mean, deviation) = moments(known.season());
    let scale = (threshold - mean).max(deviation).max(0.1);
    let relative = |log: f32| ((log - threshold) / scale).clamp(-4.0, 4.0);
    for back in 1..=8 {
        x.push(known.back(back).map_or(0.0, |row| relative(row.log)));
    }
    let hour = known.trailing(past.hour.max(2));
    let most = hour.iter().map(|r| r.log).fold(0.0, f32::max);
    let (hour_mean, hour_deviation) = moments(hour);
    x.push(relative(most));
    x.push(relative(hour_mean));
    x.push((hour_deviation / scale).min(4.0));
    x.push(scale.ln());
    x.push(((threshold - mean) / 3.0).clamp(-4.0, 4.0));
    x.push(relative(Smoothed::of(known).level));
    x.push(relative(mean));
    for days in [1, 2, 3, 4, 5, 6, 7, 14, 28] {
        let at = past.now() - (days * past.day) as i64;
        let window = usize::try_from(at)
            .ok()
            .and_then(|at| past.rows.get(at + LEAD + 1..=at + MATURES));
        x.push(window.map_or(0.0, |rows| {
            relative(rows.iter().map(|r| r.log).fold(0.0, f32::max))
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::series::{Series, support::series_of};
    use proptest::prelude::*;

    fn series(loads: &[Option<f64>]) -> Series {
        series_of(loads, 30)
    }

    #[test]
    fn a_daily_burst_is_seen_at_its_clock_time_only() {
        let loads: Vec<_> = (0..24 * 12)
            .map(|i| Some(if i % 24 == 12 { 1e8 } else { 1e3 }))
            .collect();
        let s = series(&loads);
        // Known up to 24 * 11 + 8: a burst begins four bins later.
        let x = onset_features(s.until(24 * 11 + 8 + 1));
        assert_eq!(x[..7], [1.0; 7], "{x:?}");
        let y = onset_features(s.until(24 * 11 + 17));
        assert_eq!(y[..7], [0.0; 7], "{y:?}");
        assert!(x[40] < y[40] + 5.0);
    }

    proptest! {
        #[test]
        fn inputs_are_finite_and_do_not_look_ahead(
            loads in proptest::collection::vec(
                proptest::option::weighted(0.9, prop_oneof![Just(0.0), 0.0f64..1e12]), 2..400),
            cut in 1usize..399,
        ) {
            let cut = cut.min(loads.len() - 1);
            let mut altered = loads.clone();
            for v in &mut altered[cut..] {
                *v = Some(9e9);
            }
            let (a, b) = (series(&loads), series(&altered));
            let x = onset_features(a.until(cut));
            prop_assert_eq!(x.len(), ONSET_INPUTS);
            prop_assert!(x.iter().all(|v| v.is_finite()), "{:?}", x);
            prop_assert_eq!(x, onset_features(b.until(cut)));
        }
    }
}
