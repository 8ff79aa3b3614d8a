//! `soe forecast`.

use std::time::Duration;

use super::args;
use super::client::{Client, plain};
use super::error::CliError;
use super::output::{Output, Table, or_dash, when};
use crate::api::pb;
use crate::api::types::{ForecastPoint, ForecastReport};
use crate::config::units::human_size;

/// Show the forecast of a volume's load
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The volume
    volume: String,
    /// How far ahead
    #[arg(long, value_name = "DUR", default_value = "1h", value_parser = args::duration)]
    horizon: Duration,
    /// Draw the median and the 90 % quantile as bars
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
    let p = &report.predicted;
    let mut table = if plot {
        Table::new(
            &["START", "MEDIAN", "90 %", "= MEDIAN, - 90 %"],
            "no forecast yet",
        )
    } else {
        Table::new(
            &["START", "10 %", "MEDIAN", "80 %", "90 %", "95 %", "99 %"],
            "no forecast yet",
        )
    };
    let top = report
        .points
        .iter()
        .map(|point| point.q90)
        .fold(0.0, f64::max);
    for point in &report.points {
        let ForecastPoint {
            start,
            q10,
            q50,
            q80,
            q90,
            q95,
            q99,
        } = *point;
        if plot {
            table.row([when(start), rate(q50), rate(q90), bar(q50, q90, top)]);
        } else {
            table.row([
                when(start),
                rate(q10),
                rate(q50),
                rate(q80),
                rate(q90),
                rate(q95),
                rate(q99),
            ]);
        }
    }
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

/// A bar whose first part is the median and whose rest is the 90 % quantile.
fn bar(median: f64, high: f64, top: f64) -> String {
    let length = |value: f64| {
        if top > 0.0 {
            ((value / top).clamp(0.0, 1.0) * BAR as f64).round() as usize
        } else {
            0
        }
    };
    let solid = length(median);
    format!(
        "{}{}",
        "=".repeat(solid),
        "-".repeat(length(high).saturating_sub(solid))
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
