//! The inputs by which it is decided whether to begin a capture now or to wait. Pure.
//!
//! One sample is one possible start in an interval in which one capture must be made. What counts is how
//! quiet it is now, against the last day and week, and how quiet it is likely to get in the starts that
//! remain: the least load of the same hours on the days before, and the least of the phases to come of
//! shorter rhythms. Days are seasons, hours 24ths of one.

use std::cell::Cell;

use super::series::{Known, SEASONS_IN_WEEK};

/// How many inputs a sample has.
pub const WINDOW_INPUTS: usize = 67;

/// Seasons of history below which there is nothing to compare with.
pub const WINDOW_SEASONS: usize = 7;

/// The newest bins, each an input.
const RECENT: usize = 12;
/// Places in the ascending loads of a trailing day, as shares of it.
const PLACES: [f64; 7] = [0.0, 14.0, 29.0, 72.0, 144.0, 216.0, 259.0];
/// Bins of a day to which [`PLACES`] refer.
const PLACES_OF: f64 = 288.0;
/// Inputs are cut off here, in standard deviations of the trailing day.
const MOST: f64 = 6.0;
/// Keeps nearly constant series from being blown up to noise.
const MIN_DEVIATION: f64 = 0.1;

/// Where the load of the last bin is among the inputs, the median of the trailing day, what windows met at
/// this clock time and the least of the later starts so, and the median over seven days of the least reached.
const NOW: usize = 0;
const MEDIAN_TODAY: usize = 30;
const SAME_CLOCK: usize = 44;
const LEAST_SAME_CLOCK: usize = 45;
const LEAST_REACHED: usize = 49;

/// The load of one or several volumes together, and what a window that starts in each bin would have met.
pub struct Past {
    /// `ln(1 + load / 1 KiB/s)` by bin.
    log: Vec<f64>,
    /// The load in KiB/s by bin.
    load: Vec<f64>,
    /// The log of the mean load of the window that starts in each bin; not a number until it is asked for.
    met: Vec<Cell<f64>>,
    first: i64,
    day: usize,
    /// Bins of a window.
    length: usize,
}

/// A possible start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Bins known: the window would begin with the next one.
    pub bins: usize,
    /// Later starts that remain.
    pub later: usize,
    /// Starts of the interval that have passed.
    pub passed: usize,
}

impl Past {
    /// What is known of volumes that are captured together, for windows of `length` bins (at least one), as
    /// far as it is known of all; `None` without volumes or without common bins.
    pub fn of(volumes: &[Known<'_>], length: usize) -> Option<Self> {
        let day = volumes.first()?.scale.season_bins();
        let first = volumes.iter().map(|v| v.first).max()?;
        let next = volumes.iter().map(Known::next_index).min()?;
        let bins = usize::try_from(next - first).ok()?;
        let mut load = vec![0.0; bins];
        for volume in volumes {
            let from = usize::try_from(first - volume.first).ok()?;
            for (sum, row) in load.iter_mut().zip(&volume.rows[from..]) {
                *sum += f64::from(row.load) / 1024.0;
            }
        }
        let length = length.max(1);
        let log = match volumes {
            [one] => one.rows[..bins].iter().map(|r| f64::from(r.log)).collect(),
            _ => load.iter().map(|l| l.ln_1p()).collect(),
        };
        Some(Self {
            log,
            load,
            met: vec![Cell::new(f64::NAN); bins],
            first,
            day,
            length,
        })
    }

    /// Bins known.
    pub fn bins(&self) -> usize {
        self.load.len()
    }

    /// The number of the first bin since the Unix epoch.
    pub fn first(&self) -> i64 {
        self.first
    }

    /// Bins of a season.
    pub fn day(&self) -> usize {
        self.day
    }

    /// Bins of a window.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The mean load of the window that begins after `bins` bins, in KiB/s; `None` if it is not known to
    /// its end.
    pub fn load_met(&self, bins: usize) -> Option<f64> {
        let window = self.load.get(bins..bins + self.length)?;
        Some(window.iter().sum::<f64>() / self.length as f64)
    }

    fn log_met(&self, start: usize) -> Option<f64> {
        let kept = self.met.get(start)?;
        if kept.get().is_nan() {
            kept.set(self.load_met(start)?.ln_1p());
        }
        Some(kept.get())
    }

    /// The inputs at a start: [`WINDOW_INPUTS`] finite values. What comes after `start.bins` is not looked
    /// at. `None` with less than [`WINDOW_SEASONS`] behind it.
    pub fn inputs(&self, start: Start) -> Option<Vec<f32>> {
        let (t, day) = (start.bins, self.day);
        let week = SEASONS_IN_WEEK * day;
        if t < WINDOW_SEASONS * day || t > self.bins() {
            return None;
        }
        let at = At {
            past: self,
            t,
            later: start.later.min(day.saturating_sub(self.length)),
        };
        let log = &self.log[..t];
        let today = &log[t - day..];
        let (mean, deviation) = moments(today);
        let deviation = deviation.max(MIN_DEVIATION);
        let z = |value: f64| (((value - mean) / deviation).clamp(-MOST, MOST)) as f32;
        let hour = (day / 24).max(1);
        let last = |n: usize| &log[t - n.clamp(1, t)..];
        let mut x = Vec::with_capacity(WINDOW_INPUTS);

        x.extend((1..=RECENT).map(|back| z(log[t - back])));
        let level = smoothed(last(2 * day), 0.5);
        x.push(z(level));
        x.extend([0.2, 0.05].map(|alpha| z(smoothed(last(2 * day), alpha))));
        x.push(z(smoothed(&self.load[t - 2 * day..t], 0.3).ln_1p()));
        x.extend([hour, 3 * hour, week].map(|n| z(moments(last(n)).0)));
        x.push(z(moments(&self.load[t - day..t]).0.ln_1p()));
        x.push((moments(last(week)).1.max(MIN_DEVIATION) / deviation).ln() as f32);
        x.push(deviation.ln() as f32);
        x.push(((mean - 4.0) / 3.0) as f32);
        x.extend([3, hour].map(|n| z(least(last(n).iter().copied()))));
        x.push(z(-least(last(hour).iter().map(|v| -v))));
        let mut sorted = today.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        x.extend(PLACES.map(|place| z(sorted[(place / PLACES_OF * day as f64) as usize])));
        let now = log[t - 1];
        x.push(rank(today, now));
        x.push(rank(today, level));
        x.push(rank(last(week), now));

        let later = at.later as f64;
        x.push((later.ln_1p() / 3.0) as f32);
        x.push(((self.length as f64).ln() / 2.0) as f32);
        x.push((1.0 / (1.0 + later)) as f32);
        x.push(((start.passed as f64).ln_1p() / 3.0) as f32);
        let phase = (self.first + t as i64).rem_euclid(day as i64) as f64 / day as f64;
        let angle = std::f64::consts::TAU * phase;
        x.extend([angle.sin() as f32, angle.cos() as f32]);

        at.same_clock(&z, mean, &mut x);
        for (period, cycles) in [(week, 4), (day, 3)] {
            x.push(z(at.profile(t, period, 1, cycles).unwrap_or(mean)));
            let ahead = |h| at.profile(t + h, period, 1, cycles).unwrap_or(mean);
            x.push(z(at.least_later(ahead)));
        }
        for (parts, cycles) in [(2, 8), (4, 12), (8, 16), (24, 24), (48, 24), (24, 3)] {
            let period = (day / parts).max(1);
            let first = self.length.div_ceil(period);
            let here = at.profile(t, period, first, cycles).unwrap_or(mean);
            x.push(z(here));
            // The phases to come, as they were one period ago.
            let ahead = (1..=at.later.min(period - 1))
                .filter_map(|h| at.profile((t + h).checked_sub(period)?, period, first, cycles));
            let ahead = least(ahead);
            x.push(z(if ahead.is_finite() { ahead } else { here }));
        }
        debug_assert_eq!(x.len(), WINDOW_INPUTS);
        Some(x)
    }
}

/// A plain rule on the inputs of a start: begin when the load is half a deviation below the least that the
/// remaining starts usually reached on the days before, or when these starts are usually the quietest and the
/// load is not above the day's median.
pub fn quiet_enough(inputs: &[f32]) -> bool {
    let at = |index: usize| inputs.get(index).copied().unwrap_or(0.0);
    let now = at(NOW);
    now <= at(LEAST_REACHED) - 0.5
        || (at(SAME_CLOCK) <= at(LEAST_SAME_CLOCK) + 1e-3 && now <= at(MEDIAN_TODAY))
}

/// A moment: only what lies before it is looked at.
struct At<'a> {
    past: &'a Past,
    t: usize,
    later: usize,
}

impl At<'_> {
    /// What a window that starts in bin `start` met; `None` if that is not known yet.
    fn met(&self, start: usize) -> Option<f64> {
        if start + self.past.length > self.t {
            return None;
        }
        self.past.log_met(start)
    }

    /// The mean over `cycles` cycles of what windows met that started whole periods before `start`, the
    /// first so many periods before.
    fn profile(&self, start: usize, period: usize, first: usize, cycles: usize) -> Option<f64> {
        let (mut sum, mut n) = (0.0, 0.0);
        for k in first..first + cycles {
            let Some(at) = start.checked_sub(k * period) else {
                break;
            };
            if let Some(met) = self.met(at) {
                sum += met;
                n += 1.0;
            }
        }
        (n > 0.0).then(|| sum / n)
    }

    /// The least of `value` over the later starts, by their distance; where there is none, of this one.
    fn least_later(&self, value: impl Fn(usize) -> f64) -> f64 {
        match self.later {
            0 => value(0),
            later => least((1..=later).map(value)),
        }
    }

    /// The same clock times on the seven days before, and the least of the later starts on each.
    fn same_clock(&self, z: &impl Fn(f64) -> f32, mean: f64, x: &mut Vec<f32>) {
        let day = self.past.day;
        let ago = |h: usize, days: usize| {
            (self.t + h)
                .checked_sub(day * days)
                .and_then(|at| self.met(at))
        };
        let week = |h| {
            self.profile(self.t + h, day, 1, SEASONS_IN_WEEK)
                .unwrap_or(mean)
        };
        x.push(z(ago(0, 1).unwrap_or(mean)));
        x.push(z(ago(0, SEASONS_IN_WEEK).unwrap_or(mean)));
        x.push(z(week(0)));
        x.push(z(self.least_later(week)));
        let mut reached: Vec<f64> = (1..=SEASONS_IN_WEEK)
            .map(|days| self.least_later(|h| ago(h, days).unwrap_or(f64::INFINITY)))
            .map(|least| if least.is_finite() { least } else { mean })
            .collect();
        x.push(z(reached[0]));
        x.push(z(reached.iter().sum::<f64>() / reached.len() as f64));
        reached.sort_unstable_by(f64::total_cmp);
        for place in [0, SEASONS_IN_WEEK / 2, SEASONS_IN_WEEK - 1] {
            x.push(z(reached[place]));
        }
    }
}

fn least(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::INFINITY, f64::min)
}

/// Mean and standard deviation.
fn moments(values: &[f64]) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| v * v).sum::<f64>() / n - mean * mean;
    (mean, variance.max(0.0).sqrt())
}

fn smoothed(values: &[f64], alpha: f64) -> f64 {
    let mut level = values.first().copied().unwrap_or(0.0);
    for value in values {
        level += alpha * (value - level);
    }
    level
}

/// The share of values below `value`, equal ones counting half.
fn rank(values: &[f64], value: f64) -> f32 {
    let sum: f64 = values
        .iter()
        .map(|v| match v.total_cmp(&value) {
            std::cmp::Ordering::Less => 1.0,
            std::cmp::Ordering::Equal => 0.5,
            std::cmp::Ordering::Greater => 0.0,
        })
        .sum();
    (sum / values.len().max(1) as f64) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::series::support::series_of;
    use proptest::prelude::*;

    fn loads(n: usize, seed: u64) -> Vec<Option<f64>> {
        (0..n as u64)
            .map(|i| {
                let noise = (i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 44;
                Some(1024.0 * (noise % 5000) as f64)
            })
            .collect()
    }

    #[test]
    fn less_than_a_week_gives_none() {
        let series = series_of(&loads(160, 1), 8);
        let past = Past::of(&[series.known()], 2).unwrap();
        let at = |bins| Start {
            bins,
            later: 5,
            passed: 1,
        };
        assert!(past.inputs(at(159)).is_none());
        let series = series_of(&loads(175, 1), 9);
        let past = Past::of(&[series.known()], 2).unwrap();
        assert!(past.inputs(at(170)).is_some());
        assert!(past.inputs(at(176)).is_none());
    }

    #[test]
    fn several_volumes_are_judged_by_their_sum() {
        let one = series_of(&loads(200, 1), 9);
        let double: Vec<_> = loads(200, 1).iter().map(|l| l.map(|l| l * 2.0)).collect();
        let double = series_of(&double, 9);
        let start = Start {
            bins: 190,
            later: 3,
            passed: 0,
        };
        let pair = Past::of(&[one.known(), one.known()], 1).unwrap();
        let sum = Past::of(&[double.known()], 1).unwrap();
        let (pair, sum) = (pair.inputs(start).unwrap(), sum.inputs(start).unwrap());
        assert!(pair.iter().zip(&sum).all(|(a, b)| (a - b).abs() < 1e-4));
    }

    proptest! {
        #[test]
        fn inputs_are_finite_and_do_not_look_ahead(
            seed in 0u64..1000, cut in 168usize..240, later in 0usize..30, length in 1usize..6,
            zeros in proptest::bool::ANY,
        ) {
            let mut a = loads(240, seed);
            if zeros {
                a.iter_mut().for_each(|l| *l = Some(0.0));
            }
            let mut b = a.clone();
            for load in &mut b[cut..] {
                *load = Some(9e9);
            }
            let start = Start { bins: cut, later, passed: 2 };
            let (a, b) = (series_of(&a, 12), series_of(&b, 12));
            let past = Past::of(&[a.known()], length).unwrap();
            let inputs = past.inputs(start).unwrap();
            prop_assert_eq!(inputs.len(), WINDOW_INPUTS);
            prop_assert!(inputs.iter().all(|v| v.is_finite()));
            prop_assert_eq!(&inputs, &Past::of(&[b.known()], length).unwrap().inputs(start).unwrap());
            let until = Past::of(&[a.until(cut)], length).unwrap().inputs(start).unwrap();
            prop_assert_eq!(inputs, until);
        }
    }
}
