//! The simple forecasters: each is a pure function of what is known.
//!
//! They are the bar the network must clear, and what serves while it does not.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::series::{Known, Row, SEASONS_IN_WEEK, quantile_of_sorted};
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
    /// The burn network.
    Network,
}

impl Member {
    /// All members, the default one first.
    pub const ALL: [Member; 5] = [
        Member::Ewma,
        Member::Trailing,
        Member::Seasonal,
        Member::LastValue,
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
            Member::Network => "network",
        })
    }
}

/// The weight of the newest bin in the exponentially weighted mean.
const EWMA_ALPHA: f32 = 0.3;

/// Leads (in bins) at which errors are collected; a lead between two uses the longer one.
const LEADS: [usize; 5] = [1, 2, 4, 8, 16];

/// The forecast of a simple member for the next `horizon` bins; `None` without a single known bin,
/// and for [`Member::Network`].
pub fn forecast(member: Member, known: Known<'_>, horizon: usize) -> Option<Vec<QuantileRow>> {
    if !known.rows.iter().any(|r| r.known) {
        return None;
    }
    match member {
        Member::Ewma => Some(with_errors(known, horizon, EWMA_ALPHA)),
        Member::LastValue => Some(with_errors(known, horizon, 1.0)),
        Member::Trailing => Some(vec![trailing(known); horizon]),
        Member::Seasonal => Some(seasonal(known, horizon)),
        Member::Network => None,
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

/// An exponentially weighted mean, its errors over the trailing season added to it lead by lead.
fn with_errors(known: Known<'_>, horizon: usize, alpha: f32) -> Vec<QuantileRow> {
    let season = known.scale.season_bins();
    let rows = known.trailing(2 * season);
    let mut level = rows.first().map_or(0.0, |r| r.load);
    let levels: Vec<f32> = rows
        .iter()
        .map(|r| {
            level += alpha * (r.load - level);
            level
        })
        .collect();
    let from = rows.len().saturating_sub(season);
    let by_lead: Vec<QuantileRow> = LEADS
        .iter()
        .map(|lead| {
            let errors = sorted((from..rows.len().saturating_sub(*lead)).filter_map(|i| {
                let then: &Row = &rows[i + lead];
                then.known.then_some(then.load - levels[i])
            }));
            row_of_sorted(&errors).map(|e| (level + e).max(0.0))
        })
        .collect();
    (1..=horizon)
        .map(|h| {
            let at = LEADS.iter().position(|lead| *lead >= h);
            by_lead[at.unwrap_or(LEADS.len() - 1)]
        })
        .collect()
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

/// The pinball loss of one row against what happened, the mean over [`QUANTILES`].
pub fn pinball(row: &QuantileRow, actual: f32) -> f64 {
    let sum: f64 = QUANTILES
        .iter()
        .zip(row)
        .map(|(q, forecast)| {
            let error = f64::from(actual) - f64::from(*forecast);
            (q * error).max((q - 1.0) * error)
        })
        .sum();
    sum / QUANTILES.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::burst::BurstRule;
    use crate::model::series::{LoadBin, Series, TimeScale};
    use proptest::prelude::*;
    use std::time::Duration;

    fn series(loads: &[Option<f64>]) -> Series {
        let scale = TimeScale::new(Duration::from_secs(1), 24).unwrap();
        let mut series = Series::new(scale, BurstRule::default(), 8);
        for (i, load) in loads.iter().enumerate() {
            let bin = load.map(|b| LoadBin {
                read_bytes: b,
                ..LoadBin::default()
            });
            series.push(i as i64 * 1_000_000_000, bin).unwrap();
        }
        series
    }

    #[test]
    fn a_constant_series_is_forecast_exactly_by_all() {
        let s = series(&[Some(500.0); 60]);
        for member in Member::SIMPLE {
            for row in forecast(member, s.known(), 40).unwrap() {
                assert_eq!(row, [500.0; 6], "{member}");
            }
        }
    }

    #[test]
    fn one_point_is_repeated_and_none_gives_nothing() {
        let one = series(&[Some(9.0)]);
        let none = series(&[None, None]);
        for member in Member::SIMPLE {
            assert_eq!(forecast(member, one.known(), 3).unwrap(), vec![[9.0; 6]; 3]);
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
