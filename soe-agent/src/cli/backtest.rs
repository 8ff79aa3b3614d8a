//! `soe backtest`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;

use super::args;
use super::error::CliError;
use super::offline::backtest::{self, Answer, Job};
use super::offline::blocks;
use super::output::{Output, Table, or_dash};
use crate::config::units::{parse_duration as duration, parse_size};
use crate::plan::backtest_blocks::Amount;
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

#[derive(Debug, clap::Args)]
struct Blocks {
    /// The history's folder
    #[arg(long, value_name = "DIR")]
    history: PathBuf,
    /// Bytes of a block; a power of two from 512 to 1 MiB
    #[arg(long, value_name = "SIZE", default_value = "4096", value_parser = block)]
    block: u32,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

fn block(text: &str) -> Result<u32, String> {
    let size = text.parse().ok().or_else(|| parse_size(text).ok());
    size.and_then(|size: u64| u32::try_from(size).ok())
        .filter(|size| size.is_power_of_two() && (512..=1 << 20).contains(size))
        .ok_or_else(|| format!("{text:?} is no size of a block; use 4096 for example"))
}

fn amount(text: &str) -> Result<Amount, String> {
    let share = text.strip_suffix('%').map(str::parse::<f64>);
    match share {
        Some(Ok(percent)) if percent > 0.0 && percent <= 100.0 => {
            Ok(Amount::Share(percent / 100.0))
        }
        Some(_) => Err(format!("{text:?} is no share; use 5% for example")),
        None => parse_size(text).map(Amount::Bytes),
    }
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
    /// The blocks that would be staged for given bursts, from recorded IO
    Staging {
        #[command(flatten)]
        blocks: Blocks,
        /// The bursts, a CSV file: volume,start_us,end_us
        #[arg(long, value_name = "FILE")]
        bursts: PathBuf,
        /// How much is staged per burst: a share of the footprint so far, or a size
        #[arg(long, value_name = "SHARE|SIZE", default_value = "5%", value_parser = amount)]
        budget: Amount,
    },
    /// What a cache of the live volume misses of recorded IO, alone and with staging
    Cache {
        #[command(flatten)]
        blocks: Blocks,
        /// Bursts to stage for, a CSV file: volume,start_us,end_us [default: nothing is staged]
        #[arg(long, value_name = "FILE")]
        bursts: Option<PathBuf>,
        /// How much the cache holds: a share of the whole footprint, or a size
        #[arg(long, value_name = "SHARE|SIZE", default_value = "5%", value_parser = amount)]
        capacity: Amount,
    },
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

pub(super) fn run(args: Args, out: Output) -> Result<(), CliError> {
    let (over, job) = match args.verb {
        Verb::Prior(args) => return prior(args, out),
        Verb::Staging {
            blocks,
            bursts,
            budget,
        } => return staging(blocks, bursts, budget, out),
        Verb::Cache {
            blocks,
            bursts,
            capacity,
        } => return cache(blocks, bursts, capacity, out),
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
        out: over.out,
    })?;
    show(&answer, out)
}

fn show(answer: &Answer, mut out: Output) -> Result<(), CliError> {
    out.show(
        answer,
        |Answer {
             rows,
             volumes,
             file,
         }| {
            let mut table = Table::pairs();
            table.pair("volumes", volumes);
            table.pair("rows", rows);
            table.pair("written to", file);
            table
        },
    )
}

fn staging(blocks: Blocks, bursts: PathBuf, budget: Amount, out: Output) -> Result<(), CliError> {
    let answer = blocks::run_staging(&blocks::Request {
        history: blocks.history,
        bursts: Some(bursts),
        amount: budget,
        block: blocks.block,
        out: blocks.out,
    })?;
    show(&answer, out)
}

fn cache(
    blocks: Blocks,
    bursts: Option<PathBuf>,
    capacity: Amount,
    mut out: Output,
) -> Result<(), CliError> {
    let file = blocks.out.display().to_string();
    let answer = blocks::run_cache(&blocks::Request {
        history: blocks.history,
        bursts,
        amount: capacity,
        block: blocks.block,
        out: blocks.out,
    })?;
    out.show(&answer, |answer| {
        let mut table = Table::pairs();
        table.pair("volumes", answer.volumes.len());
        table.pair("miss ratio", format!("{:.4}", answer.miss_ratio));
        let with = answer.miss_ratio_with_staging.map(|r| format!("{r:.4}"));
        table.pair("with staging", or_dash(with));
        table.pair("written to", &file);
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
