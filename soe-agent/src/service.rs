//! Wires the agent: the only place that builds concrete parts.

use crate::config::Config;

/// Why the daemon ended.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The surface could not be served.
    #[error(transparent)]
    Api(#[from] crate::api::server::ApiError),
}

/// Runs the daemon until it is told to stop.
pub fn run(_config: Config) -> Result<(), ServiceError> {
    Ok(())
}
