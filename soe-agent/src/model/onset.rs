//! When the next burst will begin: clock patterns and the rhythm of earlier bursts.
//!
//! Load levels say next to nothing about the onset of a burst of one volume; the clock time of
//! earlier onsets and the intervals between them do. Three simple predictors (base rate, same
//! clock time, interval since the last onset) are averaged with weights that follow from how well
//! each of them foretold the recent past (Bayesian model averaging with forgetting), so a volume
//! without a pattern falls back to its base rate.

use std::collections::VecDeque;

use super::series::{Known, SEASONS_IN_WEEK};
use super::{ONSET_BINS, any_of};

/// Number of predictors.
const MEMBERS: usize = 3;
/// Bins over which a prediction is judged.
const JUDGED_BINS: usize = ONSET_BINS;
/// Onset intervals remembered.
const MAX_INTERVALS: usize = 32;
/// Seasons after which a judged prediction counts half.
const HALF_LIFE_SEASONS: f64 = 2.0;

/// The averaging of one volume.
#[derive(Clone, Debug, Default)]
pub struct OnsetMixture {
    log_loss: [f64; MEMBERS],
    pending: VecDeque<(i64, [f64; MEMBERS])>,
}

impl OnsetMixture {
    /// For each of the next `horizon` bins the probability that a burst begins in it.
    ///
    /// Also remembers the prediction, and judges those whose bins are now known; calling it again
    /// without new bins changes nothing.
    pub fn predict(&mut self, known: Known<'_>, horizon: usize) -> Vec<f32> {
        self.judge(known);
        let members = [
            base_rate(known, horizon.max(JUDGED_BINS)),
            same_clock(known, horizon.max(JUDGED_BINS)),
            interval(known, horizon.max(JUDGED_BINS)),
        ];
        let origin = known.next_index();
        if self.pending.back().is_none_or(|(at, _)| *at < origin) {
            let within = |p: &Vec<f64>| any_of(p[..JUDGED_BINS].iter().copied());
            self.pending
                .push_back((origin, std::array::from_fn(|m| within(&members[m]))));
        }
        let weights = self.weights();
        (0..horizon)
            .map(|h| {
                let p: f64 = weights.iter().zip(&members).map(|(w, m)| w * m[h]).sum();
                p.clamp(0.0, 1.0) as f32
            })
            .collect()
    }

    fn judge(&mut self, known: Known<'_>) {
        let next = known.next_index();
        let half_life = HALF_LIFE_SEASONS * known.scale.season_bins() as f64;
        let keep = 0.5f64.powf(1.0 / half_life);
        while let Some((origin, probabilities)) = self.pending.front().copied() {
            if origin + JUDGED_BINS as i64 > next {
                // A clock that stepped back leaves predictions for a time that was rewound.
                if origin > next {
                    self.pending.clear();
                }
                return;
            }
            self.pending.pop_front();
            let Ok(from) = usize::try_from(origin - known.first) else {
                continue;
            };
            let Some(rows) = known.rows.get(from..from + JUDGED_BINS) else {
                continue;
            };
            if rows.iter().any(|r| !r.known) {
                continue;
            }
            let happened = rows.iter().any(|r| r.onset);
            for (loss, p) in self.log_loss.iter_mut().zip(probabilities) {
                let p = p.clamp(0.001, 0.999);
                let told = if happened { p } else { 1.0 - p };
                // Neighbouring origins share most of their bins: they are one piece of evidence.
                *loss = *loss * keep - told.ln() / JUDGED_BINS as f64;
            }
        }
    }

    fn weights(&self) -> [f64; MEMBERS] {
        let best = self.log_loss.iter().copied().fold(f64::INFINITY, f64::min);
        let raw = self.log_loss.map(|l| (best - l).exp());
        let sum: f64 = raw.iter().sum();
        raw.map(|w| w / sum)
    }
}

fn rate(known: Known<'_>) -> f64 {
    let week = known.trailing(known.scale.week_bins());
    let onsets = week.iter().filter(|r| r.onset).count() as f64;
    let bins = week.iter().filter(|r| r.known).count() as f64;
    // Without evidence: about one onset a season.
    (onsets + 0.5) / (bins + 0.5 * known.scale.season_bins() as f64)
}

fn base_rate(known: Known<'_>, horizon: usize) -> Vec<f64> {
    vec![rate(known); horizon]
}

/// The weight of an offset in a triangular kernel that reaches `reach` to either side and whose
/// weights sum to one.
fn triangle(offset: i64, reach: i64) -> f64 {
    let height = reach + 1;
    ((height - offset.abs()).max(0)) as f64 / (height * height) as f64
}

/// How often a burst began at this clock time in the last seven seasons.
fn same_clock(known: Known<'_>, horizon: usize) -> Vec<f64> {
    let base = rate(known);
    let len = known.rows.len() as i64;
    let season = known.scale.season_bins() as i64;
    let reach = known.scale.clock_tolerance() as i64;
    let onset_at = |i: i64| {
        usize::try_from(i)
            .ok()
            .and_then(|i| known.rows.get(i))
            .is_some_and(|r| r.onset)
    };
    (0..horizon as i64)
        .map(|h| {
            let mut hits = 0.0;
            let mut seasons = 0.0;
            for k in 1..=SEASONS_IN_WEEK as i64 {
                let centre = len + h - k * season;
                if centre < 0 || centre + reach >= len {
                    continue;
                }
                seasons += 1.0;
                hits += (-reach..=reach)
                    .filter(|d| onset_at(centre + d))
                    .map(|d| triangle(d, reach))
                    .sum::<f64>();
            }
            (hits + base) / (seasons + 1.0)
        })
        .collect()
}

/// Bins between earlier onsets, newest last, and the bins since the last one (counted to the first
/// bin to forecast); `None` if there was no onset.
pub(super) fn intervals(known: Known<'_>) -> (Vec<i64>, Option<i64>) {
    let mut intervals = Vec::new();
    let mut later: Option<i64> = None;
    let mut age = None;
    let rows = known.trailing(known.scale.week_bins());
    for (i, row) in rows.iter().enumerate().rev() {
        if !row.onset {
            continue;
        }
        let at = i as i64;
        match later {
            None => age = Some(rows.len() as i64 - at),
            Some(later) => intervals.push(later - at),
        }
        later = Some(at);
        if intervals.len() == MAX_INTERVALS {
            break;
        }
    }
    intervals.reverse();
    (intervals, age)
}

/// Given how long ago the last burst began, how often did the next one begin after as long.
///
/// What is asked is the chance that it begins in a bin *and has not begun yet*: of an interval that is
/// partly over only the part that is left counts, in the sum as in the whole. So a burst that is late
/// stays expected until no earlier interval was as long.
fn interval(known: Known<'_>, horizon: usize) -> Vec<f64> {
    let base = rate(known);
    let (intervals, Some(age)) = intervals(known) else {
        return vec![base; horizon];
    };
    let reach = |interval: i64| (interval / 10).max(1);
    let possible: Vec<i64> = intervals
        .into_iter()
        .filter(|i| i + reach(*i) >= age)
        .collect();
    let left: f64 = possible
        .iter()
        .map(|i| {
            let to = reach(*i);
            (-to..=to)
                .filter(|d| i + d >= age)
                .map(|d| triangle(d, to))
                .sum::<f64>()
        })
        .sum();
    (0..horizon as i64)
        .map(|h| {
            let hits: f64 = possible
                .iter()
                .map(|i| triangle(age + h - i, reach(*i)))
                .sum();
            (hits + base) / (left + 1.0)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::burst::BurstRule;
    use crate::model::series::{LoadBin, Series, TimeScale};
    use std::time::Duration;

    fn run(bins: i64, season: usize, load: impl Fn(i64) -> f64) -> (OnsetMixture, Series) {
        let scale = TimeScale::new(Duration::from_secs(1), season).unwrap();
        let mut series = Series::new(scale, BurstRule::default(), 8);
        let mut mixture = OnsetMixture::default();
        for i in 0..bins {
            let bin = LoadBin {
                write_bytes: load(i),
                ..LoadBin::default()
            };
            series.push(i * 1_000_000_000, Some(bin)).unwrap();
            mixture.predict(series.known(), 12);
        }
        (mixture, series)
    }

    fn noise(i: i64) -> f64 {
        f64::from((i as u32).wrapping_mul(2_654_435_761) >> 16) / 65_536.0
    }

    #[test]
    fn a_rhythm_that_is_not_the_season_is_found() {
        // Bursts every 37 bins up to bin 37 * 20; the season is 60, so only the intervals can tell.
        let (mut mixture, series) = run(37 * 20, 60, |i| {
            if i % 37 < 3 {
                1e7
            } else {
                1e4 * (1.0 + noise(i))
            }
        });
        let p = mixture.predict(series.known(), 37);
        let best = (0..37).max_by(|a, b| p[*a].total_cmp(&p[*b])).unwrap();
        assert!(
            best <= 1,
            "the next burst is due at once, not in {best} bins"
        );
        let around: f32 = p[best.saturating_sub(3)..(best + 4).min(37)].iter().sum();
        assert!(around > 0.5, "{around} {p:?}");
    }

    #[test]
    fn a_burst_that_is_late_stays_expected() {
        // Bursts every 36 bins, give or take one; the last interval is 38 long and not over yet.
        let starts = [12, 48, 85, 120, 157, 192];
        let next = starts[5] + 38;
        for early in 0..3 {
            let now = next - early;
            let (mut mixture, series) = run(now, 36, |i| {
                if starts.iter().any(|s| (*s..s + 8).contains(&i)) {
                    1e7
                } else {
                    1e4 * (1.0 + noise(i))
                }
            });
            let p = mixture.predict(series.known(), 36);
            let soon: f32 = p[..6].iter().sum();
            // 38 is longer than any interval before, so less than certain.
            assert!(soon > 0.25, "{early} bins before it begins: {soon}");
        }
    }

    #[test]
    fn three_bursts_are_enough_to_expect_the_fourth() {
        let starts = [12, 47, 85];
        let (mut mixture, series) = run(118, 36, |i| {
            if starts.iter().any(|s| (*s..s + 8).contains(&i)) {
                1e7
            } else {
                1e4 * (1.0 + noise(i))
            }
        });
        let p = mixture.predict(series.known(), 24);
        let soon: f32 = p[..ONSET_BINS].iter().sum();
        let later: f32 = p[8..8 + ONSET_BINS].iter().sum();
        assert!(soon > 0.5 && later < 0.3, "{soon} {later} {p:?}");
    }

    #[test]
    fn a_clock_pattern_with_uneven_gaps_is_found() {
        // Two bursts a season at fixed clock times.
        let burst = |i: i64| [10, 45].contains(&(i % 60));
        let (mut mixture, series) = run(60 * 9, 60, |i| {
            if burst(i) {
                1e7
            } else {
                1e4 * (1.0 + noise(i))
            }
        });
        let p = mixture.predict(series.known(), 60);
        let near = |at: usize| p[at - 2..=at + 2].iter().sum::<f32>();
        assert!(
            near(10) > 0.5 && near(45) > 0.5,
            "{} {}",
            near(10),
            near(45)
        );
        assert!(near(28) < 0.1, "{}", near(28));
    }

    #[test]
    fn without_a_pattern_probabilities_stay_near_the_base_rate() {
        let (mut mixture, series) = run(2_000, 60, |i| {
            if noise(i * 7 + 3) > 0.97 {
                1e7
            } else {
                1e4 * (1.0 + noise(i))
            }
        });
        let p = mixture.predict(series.known(), 12);
        let sum: f32 = p.iter().sum();
        assert!(sum < 0.9, "{p:?}");
    }
}
