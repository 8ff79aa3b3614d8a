//! One registry of metrics: every name with its unit, meaning and stability stands in [`defs`], and
//! `docs/metrics.md` is made from the same table (a test compares them).

mod defs;
mod family;

pub use defs::{DEFINITIONS, Metrics};
pub use family::{Counters, Gauges, Histograms};

/// What a metric counts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A plain number.
    Count,
    /// Bytes.
    Bytes,
    /// Bytes per second.
    BytesPerSecond,
    /// Seconds.
    Seconds,
    /// 0 to 1.
    Ratio,
    /// Seconds since the Unix epoch.
    UnixSeconds,
}

/// What kind of series it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; exposed with the suffix `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by buckets.
    Histogram,
}

/// What a user may rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stability {
    /// Name, labels and meaning stay within a major version.
    Stable,
    /// May change.
    Experimental,
}

/// One metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Definition {
    /// The name, without `_total`.
    pub name: &'static str,
    /// What kind of series it is.
    pub kind: Kind,
    /// What it counts in.
    pub unit: Unit,
    /// Names of its labels.
    pub labels: &'static [&'static str],
    /// What a user may rely on.
    pub stability: Stability,
    /// What it means.
    pub meaning: &'static str,
}

impl Definition {
    /// The name as it is exposed.
    pub fn exposed_name(&self) -> String {
        match self.kind {
            Kind::Counter => format!("{}_total", self.name),
            Kind::Gauge | Kind::Histogram => self.name.to_owned(),
        }
    }
}

/// The text of `docs/metrics.md`.
pub fn document() -> String {
    let mut text = String::from(
        "# Metrics\n\n\
         Served as OpenMetrics text at `http://127.0.0.1:9620/metrics`. This file is made from the table in\n\
         `soe-agent/src/metrics/defs.rs`; after a change there, `UPDATE_DOCS=1 cargo test -p soe-agent metrics::` writes it anew.\n\n\
         | name | kind | unit | labels | stability | meaning |\n\
         | --- | --- | --- | --- | --- | --- |\n",
    );
    for d in DEFINITIONS {
        let labels: Vec<String> = d.labels.iter().map(|l| format!("`{l}`")).collect();
        text.push_str(&format!(
            "| `{}` | {} | {} | {} | {} | {} |\n",
            d.exposed_name(),
            format!("{:?}", d.kind).to_lowercase(),
            match d.unit {
                Unit::Count => "count",
                Unit::Bytes => "bytes",
                Unit::BytesPerSecond => "bytes per second",
                Unit::Seconds => "seconds",
                Unit::Ratio => "ratio",
                Unit::UnixSeconds => "seconds since 1970",
            },
            labels.join(", "),
            format!("{:?}", d.stability).to_lowercase(),
            d.meaning
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_document_is_up_to_date() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, document()).unwrap();
        }
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert_eq!(
            written,
            document(),
            "run `UPDATE_DOCS=1 cargo test -p soe-agent metrics::`"
        );
    }

    #[test]
    fn names_are_unique_and_tell_their_unit() {
        let mut seen = BTreeSet::new();
        for d in DEFINITIONS {
            assert!(seen.insert(d.name), "{} is defined twice", d.name);
            assert!(d.name.starts_with("soe_"), "{}", d.name);
            assert!(
                d.name
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'),
                "{}",
                d.name
            );
            assert!(
                !d.name.ends_with("_total"),
                "{}: the suffix is added",
                d.name
            );
            let suffix = match d.unit {
                Unit::Bytes => "_bytes",
                Unit::BytesPerSecond => "_bytes_per_second",
                Unit::Seconds | Unit::UnixSeconds => "_seconds",
                Unit::Ratio => "_ratio",
                Unit::Count => "",
            };
            assert!(
                d.name.ends_with(suffix),
                "{} does not end with {suffix}",
                d.name
            );
            assert!(
                !d.meaning.contains('|') && d.meaning.ends_with('.'),
                "{}",
                d.name
            );
        }
    }

    #[test]
    fn every_definition_is_exposed_and_nothing_else() {
        let metrics = Metrics::new();
        metrics.touch_all();
        let text = metrics.encode().unwrap();
        let exposed: BTreeSet<&str> = text
            .lines()
            .filter_map(|l| l.strip_prefix("# TYPE "))
            .filter_map(|l| l.split(' ').next())
            .collect();
        let defined: BTreeSet<&str> = DEFINITIONS.iter().map(|d| d.name).collect();
        assert_eq!(exposed, defined);
    }

    #[test]
    fn values_and_labels_are_exposed() {
        let metrics = Metrics::new();
        metrics
            .volume_operations
            .with(["/dev/loop0", "read"])
            .inc_by(3);
        metrics
            .volume_operations
            .set_total(["/dev/loop0", "write"], 7);
        metrics.burst_probability.set(["/dev/\"quoted\"\n"], 0.25);
        metrics.capture_pause.observe(["db", "freeze"], 0.032);
        let text = metrics.encode().unwrap();
        for line in [
            "soe_volume_operations_total{volume=\"/dev/loop0\",op=\"read\"} 3",
            "soe_volume_operations_total{volume=\"/dev/loop0\",op=\"write\"} 7",
            "soe_burst_probability_ratio{volume=\"/dev/\\\"quoted\\\"\\n\"} 0.25",
            "soe_capture_pause_seconds_count{group=\"db\",method=\"freeze\"} 1",
            "soe_capture_pause_seconds_bucket{le=\"0.05\",group=\"db\",method=\"freeze\"} 1",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        metrics.volume_operations.remove(["/dev/loop0", "read"]);
        assert!(!metrics.encode().unwrap().contains("op=\"read\""));
    }
}
