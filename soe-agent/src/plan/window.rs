//! The quietest window: where a capture disturbs least, by the forecast's upper quantile.
//!
//! The 0.8 quantile is minimised, not the median: a window that is mostly quiet but sometimes hit
//! by a burst is a bad one.

use std::time::Duration;

use super::types::nanos;
use crate::model::{Q80, QuantileForecast, TimeScale};
use crate::seam::UnixNanos;

/// A window chosen for a capture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// When it starts.
    pub start: UnixNanos,
    /// When it ends.
    pub end: UnixNanos,
    /// Mean over the window of the volumes' 0.8 quantiles together, in bytes per second.
    pub load: f64,
    /// The same if the window started at the earliest time allowed.
    pub load_at_once: f64,
}

/// The load expected (0.8 quantile, all volumes together, bytes per second) in the bin of `at`;
/// `None` if a forecast does not cover it.
pub fn expected_load(forecasts: &[&QuantileForecast], at: UnixNanos) -> Option<f64> {
    forecasts
        .iter()
        .map(|f| Some(f64::from(f.rows.get(f.bin_at(at)?)?[Q80])))
        .sum()
}

/// The window of `length` with the least expected load that starts in `[from, latest]`.
///
/// A later window is only chosen if it lowers the load by the share `waiting_pays`; among equals
/// the earliest wins. `None` if there is no forecast or it does not cover a window at `from`.
pub fn quietest(
    forecasts: &[&QuantileForecast],
    scale: TimeScale,
    from: UnixNanos,
    latest: UnixNanos,
    length: Duration,
    waiting_pays: f64,
) -> Option<Window> {
    if forecasts.is_empty() {
        return None;
    }
    let length = nanos(length).max(1);
    let latest = latest.max(from);
    // The integral of the expected load from `from` to the end of each bin.
    let mut edges = vec![from];
    let mut integral = vec![0.0];
    let mut index = scale.index_of(from);
    let mut at = from;
    while at < latest.saturating_add(length) {
        let Some(load) = expected_load(forecasts, at) else {
            break;
        };
        index += 1;
        let edge = scale.start_of(index);
        integral.push(integral[integral.len() - 1] + load * (edge - at) as f64);
        edges.push(edge);
        at = edge;
    }
    let covered = edges[edges.len() - 1];
    let upto = |at: UnixNanos| {
        let k = edges.partition_point(|e| *e <= at).min(edges.len() - 1);
        if k == 0 {
            return 0.0;
        }
        let width = (edges[k] - edges[k - 1]) as f64;
        let share = (at - edges[k - 1]) as f64 / width;
        integral[k - 1] + (integral[k] - integral[k - 1]) * share
    };
    let mean = |start: UnixNanos| {
        let end = start.checked_add(length).filter(|end| *end <= covered)?;
        Some((upto(end) - upto(start)) / length as f64)
    };
    let load_at_once = mean(from)?;
    let mut best = (from, load_at_once);
    for start in edges.iter().copied().filter(|e| *e > from && *e <= latest) {
        let Some(load) = mean(start) else { break };
        if load < best.1 {
            best = (start, load);
        }
    }
    if best.1 > load_at_once * (1.0 - waiting_pays) {
        best = (from, load_at_once);
    }
    Some(Window {
        start: best.0,
        end: best.0 + length,
        load: best.1,
        load_at_once,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Member;
    use proptest::prelude::*;

    const S: i64 = 1_000_000_000;

    fn scale() -> TimeScale {
        TimeScale::new(Duration::from_secs(10), 24).unwrap()
    }

    fn forecast(loads: &[f32]) -> QuantileForecast {
        QuantileForecast {
            issued_at: 0,
            bin: Duration::from_secs(10),
            rows: loads.iter().map(|l| [*l; 6]).collect(),
            onset: vec![0.0; loads.len()],
            burst_threshold: f64::INFINITY,
            member: Member::Ewma,
        }
    }

    fn at(loads: &[f32], from: i64, latest: i64, length: u64) -> Option<Window> {
        quietest(
            &[&forecast(loads)],
            scale(),
            from * S,
            latest * S,
            Duration::from_secs(length),
            0.05,
        )
    }

    #[test]
    fn the_quietest_bin_wins() {
        let w = at(&[5.0, 4.0, 1.0, 3.0, 0.5], 0, 30, 10).unwrap();
        assert_eq!(
            (w.start, w.load),
            (20 * S, 1.0),
            "the last bin starts too late"
        );
    }

    #[test]
    fn equals_go_to_the_earliest_and_small_gains_do_not_pay() {
        assert_eq!(at(&[2.0, 2.0, 2.0], 0, 20, 10).unwrap().start, 0);
        assert_eq!(at(&[2.0, 1.95, 2.0], 0, 20, 10).unwrap().start, 0);
        assert_eq!(at(&[0.0, 0.0], 0, 10, 10).unwrap().start, 0);
    }

    #[test]
    fn without_cover_there_is_no_window() {
        assert!(at(&[1.0], 5, 50, 10).is_none());
        assert!(at(&[1.0], 100, 200, 5).is_none());
        assert!(quietest(&[], scale(), 0, S, Duration::from_secs(1), 0.0).is_none());
    }

    proptest! {
        #[test]
        fn no_start_on_a_bin_edge_would_have_been_quieter(
            loads in proptest::collection::vec(0.0f32..100.0, 1..40),
            from in 0i64..100, span in 0i64..300, length in 1u64..60,
        ) {
            if let Some(w) = at(&loads, from, from + span, length) {
                prop_assert!(w.start >= from * S && w.start <= (from + span) * S);
                // The mean by brute force, second by second.
                let mean = |start: i64| -> Option<f64> {
                    let mut sum = 0.0;
                    for s in start..start + length as i64 {
                        sum += f64::from(*loads.get((s / 10) as usize)?);
                    }
                    Some(sum / length as f64)
                };
                prop_assert!((w.load - mean(w.start / S).unwrap()).abs() < 1e-3);
                for start in (0..40).map(|k| k * 10).filter(|s| *s > from && *s <= from + span) {
                    if let Some(load) = mean(start) {
                        prop_assert!(w.load * 0.95 <= load + 1e-3, "{start}: {load} < {}", w.load);
                    }
                }
            }
        }
    }
}
