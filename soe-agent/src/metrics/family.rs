//! Series by labels: the number of labels is part of the type, so a call with too few does not compile.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

type Labels<const N: usize> = [(&'static str, String); N];

fn labels<const N: usize>(names: [&'static str; N], values: [&str; N]) -> Labels<N> {
    std::array::from_fn(|i| (names[i], escaped(values[i])))
}

/// The encoder writes label values as they are, but the format wants these three escaped.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// Counters by `N` labels.
#[derive(Clone, Debug)]
pub struct Counters<const N: usize> {
    pub(super) names: [&'static str; N],
    pub(super) family: Family<Labels<N>, Counter<u64, AtomicU64>>,
}

impl<const N: usize> Counters<N> {
    /// The counter with these label values.
    pub fn with(&self, values: [&str; N]) -> Counter<u64, AtomicU64> {
        self.family.get_or_create_owned(&labels(self.names, values))
    }

    /// Sets a counter whose total is kept elsewhere, such as in the kernel.
    pub fn set_total(&self, values: [&str; N], total: u64) {
        self.with(values).inner().store(total, Ordering::Relaxed);
    }

    /// Forgets a series, such as that of a volume that is gone.
    pub fn remove(&self, values: [&str; N]) {
        self.family.remove(&labels(self.names, values));
    }
}

/// Gauges by `N` labels.
#[derive(Clone, Debug)]
pub struct Gauges<const N: usize> {
    pub(super) names: [&'static str; N],
    pub(super) family: Family<Labels<N>, Gauge<f64, AtomicU64>>,
}

impl<const N: usize> Gauges<N> {
    /// Sets the gauge with these label values.
    pub fn set(&self, values: [&str; N], value: f64) {
        self.family
            .get_or_create_owned(&labels(self.names, values))
            .set(value);
    }

    /// Forgets a series.
    pub fn remove(&self, values: [&str; N]) {
        self.family.remove(&labels(self.names, values));
    }
}

/// Histograms by `N` labels.
#[derive(Clone, Debug)]
pub struct Histograms<const N: usize> {
    pub(super) names: [&'static str; N],
    pub(super) family: Family<Labels<N>, Histogram, fn() -> Histogram>,
}

impl<const N: usize> Histograms<N> {
    /// Counts one value in the histogram with these label values.
    pub fn observe(&self, values: [&str; N], value: f64) {
        self.family
            .get_or_create_owned(&labels(self.names, values))
            .observe(value);
    }

    /// Forgets a series.
    pub fn remove(&self, values: [&str; N]) {
        self.family.remove(&labels(self.names, values));
    }
}

#[cfg(test)]
impl<const N: usize> Counters<N> {
    pub(super) fn touch(&self) {
        self.with([""; N]);
    }
}

#[cfg(test)]
impl<const N: usize> Gauges<N> {
    pub(super) fn touch(&self) {
        self.set([""; N], 0.0);
    }
}

#[cfg(test)]
impl<const N: usize> Histograms<N> {
    pub(super) fn touch(&self) {
        self.observe([""; N], 0.0);
    }
}
