//! `soe backtest`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;

use super::args;
use super::error::CliError;
use super::offline::backtest::{self, Answer, Job};
use super::output::{Output, Table};
use crate::config::units::parse_duration as duration;
use crate::seam::UnixNanos;

/// Write what the forecasters of the agent would have said over a recorded history, for scoring by
/// other programs; no agent is needed
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Args)]
struct Over {
    /// The history's folder
    #[arg(long, value_name = "DIR")]
    history: PathBuf,
    /// Width of a bin of load; must divide a day
    #[arg(long, value_name = "DUR", default_value = "5m", value_parser = duration)]
    bin: Duration,
    /// The first moment of which an output is wanted [default: where the history begins]
    #[arg(long, value_name = "TIME", value_parser = args::time)]
    from: Option<UnixNanos>,
    /// Time between two trainings on what is known by then, the first at --from; 0 trains never
    #[arg(long, value_name = "DUR", default_value = "7d", value_parser = duration)]
    train_every: Duration,
    /// The network to begin with [default: the one that ships with SOE]
    #[arg(long, value_name = "FILE")]
    prior: Option<PathBuf>,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

#[derive(Debug, clap::Args)]
struct PriorArgs {
    /// The history's folder
    #[arg(long, value_name = "DIR")]
    history: PathBuf,
    /// Width of a bin of load
    #[arg(long, value_name = "DUR", default_value = "5m", value_parser = duration)]
    bin: Duration,
    /// Nothing from here on is looked at
    #[arg(long, value_name = "TIME", value_parser = args::time)]
    until: Option<UnixNanos>,
    /// Leave out one fold of the volumes: FOLD/FOLDS, from 0
    #[arg(long, value_name = "FOLD/FOLDS", value_parser = fold)]
    leave_out: Option<(usize, usize)>,
    /// The seed of weights and batches
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

fn fold(text: &str) -> Result<(usize, usize), String> {
    let parts = text.split_once('/').and_then(|(fold, folds)| {
        Some((fold.parse::<usize>().ok()?, folds.parse::<usize>().ok()?))
    });
    parts
        .filter(|(fold, folds)| fold < folds)
        .ok_or_else(|| format!("{text:?} is no fold; use 0/4 for the first of four"))
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Quantiles of the load, read and write together, in bytes per second
    Load {
        #[command(flatten)]
        over: Over,
        /// How far ahead
        #[arg(long, value_name = "DUR", default_value = "1h", value_parser = duration)]
        horizon: Duration,
        /// Time between two forecasts
        #[arg(long, value_name = "DUR", default_value = "1h", value_parser = duration)]
        every: Duration,
    },
    /// The probability that a burst begins, at the end of every bin
    Bursts {
        #[command(flatten)]
        over: Over,
        /// Time that must be left before the burst
        #[arg(long, value_name = "DUR", default_value = "5m", value_parser = duration)]
        lead: Duration,
        /// Time after the lead in which it may begin
        #[arg(long, value_name = "DUR", default_value = "30m", value_parser = duration)]
        window: Duration,
        /// Probability from which on it is an alarm
        #[arg(long, value_name = "P", default_value_t = 0.5)]
        alarm: f64,
    },
    /// Train the network that ships with SOE on a recorded history (`cargo xtask train-prior`)
    #[command(hide = true)]
    Prior(PriorArgs),
    /// The window chosen for one capture in every interval
    Windows {
        #[command(flatten)]
        over: Over,
        /// The interval in which one capture is made
        #[arg(long, value_name = "DUR", default_value = "24h", value_parser = duration)]
        interval: Duration,
        /// How long a capture takes
        #[arg(long, value_name = "DUR", default_value = "30m", value_parser = duration)]
        length: Duration,
    },
}

pub(super) fn run(args: Args, mut out: Output) -> Result<(), CliError> {
    let (over, job) = match args.verb {
        Verb::Prior(args) => return prior(args, out),
        Verb::Load {
            over,
            horizon,
            every,
        } => (over, Job::Load { horizon, every }),
        Verb::Bursts {
            over,
            lead,
            window,
            alarm,
        } => (
            over,
            Job::Bursts {
                lead,
                window,
                alarm,
            },
        ),
        Verb::Windows {
            over,
            interval,
            length,
        } => (over, Job::Windows { interval, length }),
    };
    let answer = backtest::run(&backtest::Request {
        history: over.history,
        bin: over.bin,
        from: over.from,
        train_every: (!over.train_every.is_zero()).then_some(over.train_every),
        prior: over.prior,
        job,
        out: over.out.clone(),
    })?;
    out.show(&answer, |Answer { rows, volumes, .. }| {
        let mut table = Table::pairs();
        table.pair("volumes", volumes);
        table.pair("rows", rows);
        table.pair("written to", over.out.display());
        table
    })
}

fn prior(args: PriorArgs, mut out: Output) -> Result<(), CliError> {
    let info = backtest::train_prior(&backtest::PriorRequest {
        history: args.history,
        bin: args.bin,
        until: args.until,
        leave_out: args.leave_out,
        seed: args.seed,
        out: args.out.clone(),
    })?;
    out.show(&info, |info| {
        let mut table = Table::pairs();
        table.pair("volumes", info.volumes);
        table.pair("samples", info.samples);
        table.pair("steps", info.steps);
        table.pair("loss of the weighted mean's", format!("{:.4}", info.score));
        table.pair("written to", args.out.display());
        table
    })
}
