//! `soe simulate`.

use std::path::PathBuf;

use super::args;
use super::error::CliError;
use super::offline;
use super::output::{Output, Table};
use crate::config::Config;

/// Run the whole decision loop over a recorded history in virtual time; no agent is needed
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The history's folder
    #[arg(long, value_name = "DIR")]
    history: PathBuf,
    /// The configuration to decide by [default: the defaults]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Only captures from this moment on are judged (RFC 3339) [default: all]
    #[arg(long, value_name = "TIME", value_parser = args::time)]
    from: Option<i64>,
    /// The folder for forecasts.parquet, decisions.parquet, staged.parquet and summary.json
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub(super) fn run(args: Args, mut out: Output) -> Result<(), CliError> {
    let config = match &args.config {
        Some(path) => Config::load(Some(path))?,
        None => Config::default(),
    };
    let summary = offline::simulate(&args.history, &config, args.from, &args.out)?;
    out.show(&summary, |summary| {
        let mut table = Table::pairs();
        if let Some(fields) = summary.as_object() {
            fields
                .iter()
                .for_each(|(name, value)| table.pair(name, value));
        }
        table.pair("written to", args.out.display());
        table
    })
}
