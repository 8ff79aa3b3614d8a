//! `cargo xtask bench scale`: what forecasting for a host of many volumes takes of one core.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::figures::Table;
use crate::{place, run};

const LIMIT: Duration = Duration::from_secs(3000);

#[derive(clap::Args)]
pub struct Args {
    /// Volumes of the host
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    volumes: u32,
}

/// Runs the command.
pub fn command(args: &Args) -> Result<i32> {
    let mut cargo = Command::new("cargo");
    // The same dependencies and features as every other build of the workspace, so that none is built anew.
    cargo
        .args(["build", "--quiet", "--workspace", "--example", "scale"])
        .current_dir(place::root());
    run::check(&mut cargo, LIMIT)?;
    let mut bench = Command::new(place::target().join("debug/examples/scale"));
    let said = run::output(bench.arg(args.volumes.to_string()), LIMIT)?;
    let figures: Value = serde_json::from_str(&said).context("what the example prints")?;
    let figure = |key: &str| figures[key].as_f64().unwrap_or(f64::NAN);
    let seconds = |key: &str| format!("{:.3} s", figure(key));
    let mut table = Table::new(&[
        "of CPU time",
        "this build",
        "goal",
        "multiply-adds alone, at most",
    ]);
    let mut row = |what: &str, this: String, goal: &str, limit: String| {
        table.row(vec![what.to_owned(), this, goal.to_owned(), limit]);
    };
    let volumes = args.volumes;
    row(
        &format!("a bin of {volumes} volumes taken in"),
        seconds("observe_s"),
        "",
        String::new(),
    );
    row(
        &format!(
            "{} bins forecast for {volumes} volumes",
            figures["bins_ahead"]
        ),
        seconds("forecast_s"),
        "1 s for 1000",
        String::new(),
    );
    row(
        "  of that the networks of the load (burn)",
        seconds("networks_alone_s"),
        "",
        format!("{:.4} s", figure("networks_limit_s")),
    );
    row(
        "nightly training",
        seconds("training_s"),
        "600 s for 1000",
        String::new(),
    );
    row(
        "  a step of it (burn)",
        format!("{:.3} ms", figure("training_step_s") * 1e3),
        "",
        format!("{:.3} ms", figure("training_step_limit_s") * 1e3),
    );
    row(
        "back-test of the new network",
        seconds("judging_s"),
        "",
        String::new(),
    );
    table.print();
    println!(
        "memory: {:.0} MiB with {volumes} volumes held, at most {:.0} MiB in training (goal 512 for 1000); \
         this core does {:.0} thousand million multiply-adds a second in registers",
        figure("resident_before_training_mib"),
        figure("resident_peak_mib"),
        figure("peak_multiply_adds_per_s") / 1e9,
    );
    Ok(0)
}
