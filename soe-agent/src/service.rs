//! Wires the agent: the only place that builds concrete parts.

use crate::api::server::ApiError;
use crate::api::socket::SocketError;
use crate::config::Config;

/// Why the daemon ended.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The surface could not be served.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// This build has no engine to serve.
    #[error("this build of the agent serves nothing yet; use the offline verbs")]
    NoEngine,
}

impl ServiceError {
    /// Whether the daemon refused for safety's sake (exit code 4).
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Api(ApiError::Socket(SocketError::InUse { .. } | SocketError::OpenFolder { .. }))
        )
    }
}

/// Runs the daemon until it is told to stop.
///
/// # Errors
/// [`ServiceError`] when it cannot start, or ended by itself.
pub fn run(_config: Config) -> Result<(), ServiceError> {
    Err(ServiceError::NoEngine)
}
