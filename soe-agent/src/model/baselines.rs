//! The simple forecasters: each is a pure function of what is known.
//!
//! They are the bar the network must clear, and what serves while it does not.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::series::{Known, Row, SEASONS_IN_WEEK, from_log_load, quantile_of_sorted};
use super::{QUANTILES, QuantileRow};

/// Who can make a forecast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Member {
    /// Exponentially weighted mean with the quantiles of its recent errors.
    Ewma,
    /// Quantiles of the trailing season.
    Trailing,
    /// Quantiles of the same clock time in the last seven seasons.
    Seasonal,
    /// The last value with the quantiles of its recent errors.
    LastValue,
    /// The network that ships with SOE.
    Prior,
    /// The network that was trained on this host.
    Network,
}

impl Member {
    /// All members, the default one first.
    pub const ALL: [Member; 6] = [
        Member::Ewma,
        Member::Trailing,
        Member::Seasonal,
        Member::LastValue,
        Member::Prior,
        Member::Network,
    ];

    /// The members that need no training.
    pub const SIMPLE: [Member; 4] = [
        Member::Ewma,
        Member::Trailing,
        Member::Seasonal,
        Member::LastValue,
    ];

    /// The position in [`Member::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Member::Ewma => "ewma",
            Member::Trailing => "trailing",
            Member::Seasonal => "seasonal",
            Member::LastValue => "last-value",
            Member::Prior => "prior",
            Member::Network => "network",
        })
    }
}

/// The weight of the newest bin in the exponentially weighted mean.
const EWMA_ALPHA: f32 = 0.3;

/// The forecast of a simple member for the next `horizon` bins; `None` without a single known bin,
/// and for the networks.
pub fn forecast(member: Member, known: Known<'_>, horizon: usize) -> Option<Vec<QuantileRow>> {
    if !known.rows.iter().any(|r| r.known) {
        return None;
    }
    match member {
        Member::Ewma => Some(vec![Smoothed::of(known).row(); horizon]),
        Member::LastValue => Some(vec![Smoothed::by(known, 1.0).row(); horizon]),
        Member::Trailing => Some(vec![trailing(known); horizon]),
        Member::Seasonal => Some(seasonal(known, horizon)),
        Member::Prior | Member::Network => None,
    }
}

/// The quantiles of ascending values at [`QUANTILES`].
fn row_of_sorted(sorted: &[f32]) -> QuantileRow {
    QUANTILES.map(|q| quantile_of_sorted(sorted, q))
}

fn sorted(values: impl Iterator<Item = f32>) -> Vec<f32> {
    let mut values: Vec<f32> = values.collect();
    values.sort_unstable_by(f32::total_cmp);
    values
}

/// An exponentially weighted mean of the log load, with its errors one bin ahead over the trailing
/// season. On the log scale, and with these errors at every lead, it is the strongest of the simple
/// forecasts by far (docs/forecasting.md has the figures).
#[derive(Clone, Debug)]
pub struct Smoothed {
    /// The mean after the last known bin, on the log scale.
    pub level: f32,
    /// The greatest load of the rows looked at, on the log scale.
    top: f32,
    /// Ascending.
    errors: Vec<f32>,
}

impl Smoothed {
    /// The smoothing by which forecasts are measured.
    pub fn of(known: Known<'_>) -> Self {
        Self::by(known, EWMA_ALPHA)
    }

    /// Smoothing in which the newest bin weighs `alpha`.
    fn by(known: Known<'_>, alpha: f32) -> Self {
        let season = known.scale.season_bins();
        let rows = known.trailing(2 * season);
        let mut level = rows.first().map_or(0.0, |r| r.log);
        let from = rows.len().saturating_sub(season);
        let mut errors = Vec::with_capacity(season);
        for (i, row) in rows.iter().enumerate() {
            if i >= from && i > 0 && row.known {
                errors.push(row.log - level);
            }
            level += alpha * (row.log - level);
        }
        errors.sort_unstable_by(f32::total_cmp);
        let top = rows.iter().map(|r| r.log).fold(0.0, f32::max);
        Self { level, top, errors }
    }

    /// The errors at the levels of [`QUANTILES`], on the log scale.
    pub fn error_quantiles(&self) -> QuantileRow {
        row_of_sorted(&self.errors)
    }

    /// The forecast for any bin, in bytes per second. An error of a time of little load is a factor; on
    /// a high level it would give loads that no device carries, so none is above twice the greatest seen.
    pub fn row(&self) -> QuantileRow {
        let most = self.top + std::f32::consts::LN_2;
        self.error_quantiles()
            .map(|error| from_log_load((self.level + error).min(most)))
    }
}

fn trailing(known: Known<'_>) -> QuantileRow {
    let measured = |rows: &[Row]| sorted(rows.iter().filter(|r| r.known).map(|r| r.load));
    let season = measured(known.season());
    if season.is_empty() {
        row_of_sorted(&measured(known.rows))
    } else {
        row_of_sorted(&season)
    }
}

fn seasonal(known: Known<'_>, horizon: usize) -> Vec<QuantileRow> {
    let season = known.scale.season_bins() as i64;
    let reach = known.scale.clock_tolerance() as i64;
    let len = known.rows.len() as i64;
    let mut fallback = None;
    (0..horizon as i64)
        .map(|h| {
            let same_clock = (1..=SEASONS_IN_WEEK as i64)
                .flat_map(|k| (-reach..=reach).map(move |d| len + h + d - k * season))
                .filter_map(|i| known.rows.get(usize::try_from(i).ok()?))
                .filter(|r| r.known)
                .map(|r| r.load);
            let same_clock = sorted(same_clock);
            if same_clock.is_empty() {
                *fallback.get_or_insert_with(|| trailing(known))
            } else {
                row_of_sorted(&same_clock)
            }
        })
        .collect()
}

/// The pinball loss of one row against what happened, for each of [`QUANTILES`].
pub fn pinball_levels(row: &QuantileRow, actual: f32) -> [f64; QUANTILES.len()] {
    std::array::from_fn(|level| {
        let error = f64::from(actual) - f64::from(row[level]);
        let q = QUANTILES[level];
        (q * error).max((q - 1.0) * error)
    })
}

/// The mean of [`pinball_levels`].
pub fn pinball(row: &QuantileRow, actual: f32) -> f64 {
    pinball_levels(row, actual).iter().sum::<f64>() / QUANTILES.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::series::{Series, support::series_of};
    use proptest::prelude::*;

    fn series(loads: &[Option<f64>]) -> Series {
        series_of(loads, 8)
    }

    #[test]
    fn a_constant_series_is_forecast_exactly_by_all() {
        let s = series(&[Some(500.0); 60]);
        for member in Member::SIMPLE {
            for row in forecast(member, s.known(), 40).unwrap() {
                assert!(
                    row.iter().all(|v| (v - 500.0).abs() < 0.1),
                    "{member} {row:?}"
                );
            }
        }
    }

    #[test]
    fn one_point_is_repeated_and_none_gives_nothing() {
        let one = series(&[Some(9.0)]);
        let none = series(&[None, None]);
        for member in Member::SIMPLE {
            let rows = forecast(member, one.known(), 3).unwrap();
            assert!(
                rows.iter().flatten().all(|v| (v - 9.0).abs() < 0.01),
                "{rows:?}"
            );
            assert!(forecast(member, none.known(), 3).is_none());
        }
    }

    #[test]
    fn the_seasonal_member_knows_the_clock() {
        let loads: Vec<_> = (0..24 * 8)
            .map(|i| Some(if i % 24 == 12 { 1000.0 } else { 10.0 }))
            .collect();
        let s = series(&loads);
        let rows = forecast(Member::Seasonal, s.known(), 24).unwrap();
        assert!(rows[12][5] > 900.0 && rows[0][5] < 20.0);
    }

    #[test]
    fn pinball_is_least_at_the_quantile() {
        let values: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        let loss = |shift: f32| -> f64 {
            let row = row_of_sorted(&values).map(|v| v + shift);
            values.iter().map(|v| pinball(&row, *v)).sum()
        };
        assert!(loss(0.0) < loss(30.0) && loss(0.0) < loss(-30.0));
    }

    proptest! {
        #[test]
        fn rows_ascend_and_are_finite(
            loads in proptest::collection::vec(
                proptest::option::weighted(0.8, prop_oneof![Just(0.0), 0.0f64..1e12]), 1..120),
            horizon in 0usize..60,
        ) {
            let s = series(&loads);
            for member in Member::SIMPLE {
                if let Some(rows) = forecast(member, s.known(), horizon) {
                    prop_assert_eq!(rows.len(), horizon);
                    for row in rows {
                        prop_assert!(row.iter().all(|v| v.is_finite() && *v >= 0.0));
                        prop_assert!(row.windows(2).all(|w| w[0] <= w[1]), "{member} {row:?}");
                    }
                }
            }
        }
    }
}
