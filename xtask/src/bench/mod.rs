//! `cargo xtask bench`: figures from this machine. They are printed, never judged: a machine that
//! does something else beside the benchmark has other figures.

mod blocks;
mod capture;
mod figures;
pub mod forecast;
mod observe;
mod scale;
mod stage;

use anyhow::Result;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// What observing costs each IO, beside biolatency of libbpf-tools, and what it costs throughput
    Observe(observe::Args),
    /// How long captures hold writers, what share of them hold nobody, and what a differential costs,
    /// beside freezing and copying by hand
    Capture(capture::Args),
    /// What forecasts, burst warnings and capture windows are worth on a trace
    Forecast(forecast::Args),
    /// Which blocks are chosen for bursts of block traces, and what a live cache misses of them
    Blocks(blocks::Args),
    /// What forecasting for a host of many volumes takes of one core, and in memory
    Scale(scale::Args),
}

/// Runs the command.
pub fn command(args: &Args) -> Result<i32> {
    match &args.what {
        What::Observe(args) => observe::command(args),
        What::Capture(args) => capture::command(args),
        What::Forecast(args) => forecast::command(args),
        What::Blocks(args) => blocks::command(args),
        What::Scale(args) => scale::command(args),
    }
}
