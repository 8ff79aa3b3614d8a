//! The connection to the daemon.

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status, Streaming};

use super::error::CliError;
use crate::api::convert::WireError;
use crate::api::engine::{EngineError, ErrorKind};
use crate::api::grpc::{KIND_TRAILER, from_status};
use crate::api::pb::snapshot_orchestration_client::SnapshotOrchestrationClient;

/// Where the daemon listens unless it was told otherwise.
pub(super) const DEFAULT_ENDPOINT: &str = "unix:/run/soe/soe.sock";

/// Bytes of the largest message that is taken from the daemon: a status with very many layers.
const MAX_MESSAGE_BYTES: usize = 256 << 20;

/// The generated client.
pub(super) type Stub = SnapshotOrchestrationClient<Channel>;

/// A way to the daemon. Connects at each call.
pub(super) struct Client {
    endpoint: String,
    path: PathBuf,
    runtime: Runtime,
}

impl Client {
    /// A client of the daemon at `endpoint`.
    pub(super) fn new(endpoint: &str) -> Result<Self, CliError> {
        let path = endpoint
            .strip_prefix("unix://")
            .or_else(|| endpoint.strip_prefix("unix:"));
        let path = path.filter(|p| p.starts_with('/')).ok_or_else(|| {
            CliError::Usage(format!(
                "endpoint {endpoint:?} is not unix: and an absolute path, such as {DEFAULT_ENDPOINT}; mend --endpoint or SOE_ENDPOINT"
            ))
        })?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(CliError::io("the client's runtime"))?;
        Ok(Self {
            endpoint: endpoint.to_owned(),
            path: path.into(),
            runtime,
        })
    }

    /// Runs a call, or several, on one connection.
    pub(super) fn call<T, F, W>(&self, work: W) -> Result<T, CliError>
    where
        W: FnOnce(Stub) -> F,
        F: Future<Output = Result<T, CliError>>,
    {
        self.runtime
            .block_on(async { work(self.connect().await?).await })
    }

    async fn connect(&self) -> Result<Stub, CliError> {
        // Tried by itself first, since the transport's error would hide what the kernel said.
        if let Err(error) = UnixStream::connect(&self.path).await {
            return Err(self.no_connection(&error));
        }
        let path = self.path.clone();
        // The authority is not used on a unix socket, but the protocol wants one.
        let channel = Endpoint::from_static("http://localhost")
            .connect_timeout(Duration::from_secs(10))
            .connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
            .await
            .map_err(|e| CliError::NoDaemon {
                endpoint: self.endpoint.clone(),
                why: e.to_string(),
            })?;
        Ok(Stub::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
    }

    fn no_connection(&self, error: &std::io::Error) -> CliError {
        if error.kind() == std::io::ErrorKind::PermissionDenied {
            return CliError::Engine(EngineError::new(
                ErrorKind::PermissionDenied,
                format!(
                    "the agent's socket {} is closed to this user; run the command as root or as the agent's user",
                    self.path.display()
                ),
            ));
        }
        CliError::NoDaemon {
            endpoint: self.endpoint.clone(),
            why: error.to_string(),
        }
    }
}

impl From<Status> for CliError {
    fn from(status: Status) -> Self {
        let from_daemon = status.metadata().contains_key(KIND_TRAILER);
        if !from_daemon && std::error::Error::source(&status).is_some() {
            return Self::Engine(EngineError::new(
                ErrorKind::Unavailable,
                format!(
                    "the agent went away during the call ({}); see its log",
                    status.message()
                ),
            ));
        }
        Self::Engine(from_status(&status))
    }
}

impl From<WireError> for CliError {
    fn from(error: WireError) -> Self {
        Self::Failed(format!(
            "the agent's answer is not understood: {error}; use a command line and an agent of one version"
        ))
    }
}

/// The answer in plain types.
pub(super) fn plain<P, T>(response: Response<P>) -> Result<T, CliError>
where
    T: TryFrom<P>,
    CliError: From<T::Error>,
{
    Ok(T::try_from(response.into_inner())?)
}

/// The answers in plain types.
pub(super) fn plain_all<P, T>(messages: Vec<P>) -> Result<Vec<T>, CliError>
where
    T: TryFrom<P>,
    CliError: From<T::Error>,
{
    messages.into_iter().map(|m| Ok(T::try_from(m)?)).collect()
}

/// The next item of a stream in plain types; `None` at its end.
pub(super) async fn next<P, T>(stream: &mut Streaming<P>) -> Result<Option<T>, CliError>
where
    T: TryFrom<P>,
    CliError: From<T::Error>,
{
    stream
        .message()
        .await?
        .map(|m| Ok(T::try_from(m)?))
        .transpose()
}

impl From<std::convert::Infallible> for CliError {
    fn from(never: std::convert::Infallible) -> Self {
        match never {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        for good in ["unix:/run/soe/soe.sock", "unix:///run/soe/soe.sock"] {
            assert_eq!(
                Client::new(good).unwrap().path,
                PathBuf::from("/run/soe/soe.sock"),
                "{good}"
            );
        }
        for bad in [
            "",
            "unix:",
            "unix:soe.sock",
            "/run/soe.sock",
            "http://localhost:1",
            "unix://host/soe.sock",
        ] {
            let result = Client::new(bad).map(|c| c.path);
            assert!(matches!(result, Err(CliError::Usage(_))), "{bad}");
        }
    }
}
