//! `soe sql`.

use std::path::PathBuf;

use super::error::CliError;
use super::offline;
use super::output::Output;
use crate::config::Config;

/// Query the Parquet history with SQL; no agent is needed
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// One SELECT statement
    query: String,
    /// The history's folder [default: that of the configuration]
    #[arg(long, value_name = "DIR")]
    history: Option<PathBuf>,
    /// The agent's configuration, which says where the history is
    #[arg(long, value_name = "FILE", conflicts_with = "history")]
    config: Option<PathBuf>,
}

pub(super) fn run(args: Args, mut out: Output) -> Result<(), CliError> {
    let dir = match args.history {
        Some(dir) => dir,
        None => Config::load(args.config.as_deref())?.history_dir(),
    };
    offline::sql(&dir, &args.query, &mut out)?;
    out.finish()
}
