//! Figures of many measurements, and how they are shown.

use std::time::Duration;

use serde_json::{Value, json};

/// Durations that were measured, in ascending order.
#[derive(Clone, Debug, Default)]
pub(super) struct Durations(Vec<Duration>);

impl Durations {
    pub(super) fn new(mut values: Vec<Duration>) -> Self {
        values.sort_unstable();
        Self(values)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The value that a share `level` of all does not exceed (nearest rank); `None` of nothing.
    pub(super) fn quantile(&self, level: f64) -> Option<Duration> {
        let rank = (level * self.0.len() as f64).ceil().max(1.0) as usize;
        self.0.get(rank.min(self.0.len()).checked_sub(1)?).copied()
    }

    pub(super) fn max(&self) -> Option<Duration> {
        self.0.last().copied()
    }

    /// How many exceed `limit`.
    pub(super) fn above(&self, limit: Duration) -> usize {
        self.0.len() - self.0.partition_point(|value| *value <= limit)
    }

    /// p50, p99 and the greatest, for people.
    pub(super) fn shown(&self) -> String {
        match (self.quantile(0.5), self.quantile(0.99), self.max()) {
            (Some(p50), Some(p99), Some(max)) => {
                format!("p50 {}, p99 {}, max {}", ms(p50), ms(p99), ms(max))
            }
            _ => "none".to_owned(),
        }
    }

    /// The same for programs, in microseconds.
    pub(super) fn json(&self) -> Value {
        let us = |value: Option<Duration>| value.map(|v| v.as_micros() as u64);
        json!({
            "count": self.len(),
            "p50_us": us(self.quantile(0.5)),
            "p90_us": us(self.quantile(0.9)),
            "p99_us": us(self.quantile(0.99)),
            "max_us": us(self.max()),
        })
    }
}

/// A duration in milliseconds, with as many places as say something.
pub(super) fn ms(value: Duration) -> String {
    let ms = value.as_secs_f64() * 1e3;
    match ms {
        ms if ms < 1.0 => format!("{ms:.3} ms"),
        ms if ms < 100.0 => format!("{ms:.1} ms"),
        ms => format!("{ms:.0} ms"),
    }
}

/// How many times `b` `a` is, for people.
pub(super) fn times(a: Option<Duration>, b: Option<Duration>) -> String {
    ratio(a, b).map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.1}x"))
}

/// How many times `b` `a` is.
pub(super) fn ratio(a: Option<Duration>, b: Option<Duration>) -> Option<f64> {
    let (a, b) = (a?.as_secs_f64(), b?.as_secs_f64());
    (b > 0.0).then(|| a / b)
}

/// The median of `values`; sorts.
pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let upper = values.get(values.len() / 2).copied().unwrap_or(f64::NAN);
    match values.len() % 2 {
        0 => {
            let lower = (values.len() / 2).wrapping_sub(1);
            (upper + values.get(lower).copied().unwrap_or(f64::NAN)) / 2.0
        }
        _ => upper,
    }
}

/// Rows of text in columns.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(head: &[&str]) -> Self {
        Self {
            rows: vec![head.iter().map(|cell| (*cell).to_owned()).collect()],
        }
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub(super) fn print(&self) {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let cells: Vec<String> = row
                .iter()
                .zip(&widths)
                .map(|(cell, width)| format!("{cell:<width$}"))
                .collect();
            println!("  {}", cells.join("  ").trim_end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&mut []).is_nan());
    }

    #[test]
    fn quantiles_are_by_nearest_rank() {
        let of = |n: u64| Durations::new((1..=n).rev().map(Duration::from_millis).collect());
        assert_eq!(of(100).quantile(0.99), Some(Duration::from_millis(99)));
        assert_eq!(of(60).quantile(0.99), Some(Duration::from_millis(60)));
        assert_eq!(of(3).quantile(0.5), Some(Duration::from_millis(2)));
        assert_eq!(of(0).quantile(0.5), None);
        assert_eq!(of(100).above(Duration::from_millis(98)), 2);
    }
}
