//! `soe agent`.

use std::path::PathBuf;

use super::error::CliError;
use super::logging;
use crate::api::engine::{EngineError, ErrorKind};
use crate::config::Config;
use crate::service;

/// Run the agent in the foreground; SIGTERM stops it, SIGHUP reloads the configuration
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Configuration file [default: /etc/soe/soe.toml, or defaults if there is none]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the configuration and stop
    #[arg(long)]
    check_config: bool,
}

pub(super) fn run(args: Args) -> Result<(), CliError> {
    let config = Config::load(args.config.as_deref())?;
    logging::check(&config.agent.log).map_err(CliError::Usage)?;
    if args.check_config {
        return Ok(());
    }
    logging::init(&config.agent.log).map_err(CliError::Failed)?;
    service::run(config).map_err(|e| {
        let kind = if e.is_refusal() {
            ErrorKind::Unsafe
        } else {
            ErrorKind::Internal
        };
        CliError::Engine(EngineError::new(kind, e.to_string()))
    })
}
