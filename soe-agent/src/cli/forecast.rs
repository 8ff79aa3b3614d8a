//! `soe forecast`.

use std::time::Duration;

use super::args;
use super::client::{Client, plain};
use super::error::CliError;
use super::output::{Output, Table, or_dash, when};
use crate::api::pb;
use crate::api::types::ForecastReport;
use crate::config::units::human_size;

/// Show the forecast of a volume's load
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The volume
    volume: String,
    /// How far ahead
    #[arg(long, value_name = "DUR", default_value = "1h", value_parser = args::duration)]
    horizon: Duration,
    /// Draw what was, the median and the 90 % quantile as bars, and where quiet and bursts are expected
    #[arg(long)]
    plot: bool,
}

/// Characters of the longest bar.
const BAR: usize = 50;

pub(super) fn run(args: Args, client: &Client, mut out: Output) -> Result<(), CliError> {
    let horizon_s = args::seconds("--horizon", args.horizon)?;
    let request = pb::ForecastRequest {
        volume: args::volume(&args.volume)?,
        horizon_s,
    };
    let report: ForecastReport =
        client.call(async |mut stub| plain(stub.forecast(request).await?))?;
    let plot = args.plot;
    out.show(&report, |r| table(r, plot))
}

fn rate(bytes_per_second: f64) -> String {
    format!("{}/s", human_size(bytes_per_second.max(0.0) as u64))
}

fn table(report: &ForecastReport, plot: bool) -> Table {
    let mut table = if plot {
        drawn(report)
    } else {
        let mut table = Table::new(
            &["START", "10 %", "MEDIAN", "80 %", "90 %", "95 %", "99 %"],
            "no forecast yet",
        );
        for p in &report.points {
            let [a, b, c, d, e, f] = [p.q10, p.q50, p.q80, p.q90, p.q95, p.q99].map(rate);
            table.row([when(p.start), a, b, c, d, e, f]);
        }
        table
    };
    let p = &report.predicted;
    table.row([String::new()]);
    let burst = p.next_burst_at.map_or("none expected".into(), |at| {
        format!("expected at {}", when(at))
    });
    let probability = or_dash(p.burst_probability.map(|b| format!("{b:.2}")));
    table.row([format!("burst: {burst}, probability {probability}")]);
    table.row([format!(
        "model: {} ({})",
        or_dash(p.model.as_ref()),
        or_dash(p.model_reason.as_ref())
    )]);
    table
}

/// A probability of a burst from which on a bin is marked.
const LIKELY: f64 = 0.1;

/// History and forecast as bars, a line a bin, with marks where the quiet window and bursts are expected.
fn drawn(report: &ForecastReport) -> Table {
    let heads = [
        "START",
        "LOAD",
        "90 %",
        "# WAS, = MEDIAN, - 90 %",
        "EXPECTED",
    ];
    let mut table = Table::new(&heads, "no forecast yet");
    let was = report.history.iter().filter_map(|p| p.load);
    let will = report.points.iter().map(|p| p.q90);
    let top = was.chain(will).fold(0.0, f64::max);
    for point in &report.history {
        let (load, bar) = match point.load {
            Some(load) => (rate(load), "#".repeat(length(load, top))),
            None => ("-".to_owned(), String::new()),
        };
        table.row([when(point.start), load, String::new(), bar, String::new()]);
    }
    let bin = i64::try_from(report.bin_s)
        .unwrap_or(i64::MAX)
        .saturating_mul(1_000_000_000);
    let quiet = report.predicted.next_low_window;
    for point in &report.points {
        let mut marks = Vec::new();
        let end = point.start.saturating_add(bin);
        if quiet.is_some_and(|w| point.start < w.end && w.start < end) {
            marks.push("quiet".to_owned());
        }
        if point.burst_probability >= LIKELY {
            marks.push(format!("burst {:.0} %", point.burst_probability * 100.0));
        }
        table.row([
            when(point.start),
            rate(point.q50),
            rate(point.q90),
            bar(point.q50, point.q90, top),
            marks.join(", "),
        ]);
    }
    table
}

fn length(value: f64, top: f64) -> usize {
    if top > 0.0 {
        ((value / top).clamp(0.0, 1.0) * BAR as f64).round() as usize
    } else {
        0
    }
}

/// A bar whose first part is the median and whose rest is the 90 % quantile.
fn bar(median: f64, high: f64, top: f64) -> String {
    let solid = length(median, top);
    format!(
        "{}{}",
        "=".repeat(solid),
        "-".repeat(length(high, top).saturating_sub(solid))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_scale_with_the_highest() {
        assert_eq!(
            bar(50.0, 100.0, 100.0),
            format!("{}{}", "=".repeat(25), "-".repeat(25))
        );
        assert_eq!(bar(0.0, 0.0, 0.0), "");
        assert_eq!(bar(f64::NAN, f64::INFINITY, 100.0).len(), BAR);
    }
}
