//! Opens the listeners and serves until told to stop.

use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::InterceptorLayer;
use tonic::transport::Server;

use super::audit::{Audit, AuditError};
use super::engine::Engine;
use super::grpc::{Service, check_peer};
use super::http::{HttpState, router};
use super::pb;
use super::pb::snapshot_orchestration_server::SnapshotOrchestrationServer;
use super::socket::{self, OwnedSocket, SocketError};
use crate::config::Config;
use crate::metrics::Metrics;
use crate::seam::Clock;

/// How long calls under way may take to end after the stop.
pub const DRAIN: Duration = Duration::from_secs(5);

/// How often health follows [`Engine::not_ready`].
const HEALTH_INTERVAL: Duration = Duration::from_millis(500);

/// Why the surface cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The unix socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The audit file.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The HTTP listener.
    #[error("HTTP listener {address}: {source}; choose another address ([api] http) or \"off\"")]
    Http {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A server ended by itself.
    #[error("the {server} server ended: {detail}")]
    Ended {
        /// Which one.
        server: &'static str,
        /// Why.
        detail: String,
    },
}

/// The open listeners. Binding early tells early that another agent runs.
pub struct Listeners {
    grpc: StdUnixListener,
    socket: OwnedSocket,
    http: Option<std::net::TcpListener>,
    http_address: Option<SocketAddr>,
    audit: Arc<Audit>,
    max_event_bytes: usize,
    accept_events: Arc<AtomicBool>,
}

impl Listeners {
    /// Opens the socket, the HTTP listener and the audit file that `config` names.
    pub fn open(config: &Config) -> Result<Self, ApiError> {
        let (grpc, socket) = socket::bind(&config.api.listen.0)?;
        let audit = Arc::new(Audit::open(&config.audit_file())?);
        let http = config
            .api
            .http
            .map(|address| bind_http(address).map_err(|source| ApiError::Http { address, source }));
        let http = http.transpose()?;
        let http_address = http
            .as_ref()
            .and_then(|listener| listener.local_addr().ok());
        Ok(Self {
            grpc,
            socket,
            http,
            http_address,
            audit,
            max_event_bytes: usize::try_from(config.api.max_event).unwrap_or(usize::MAX),
            accept_events: Arc::new(AtomicBool::new(config.accepts_cloudevents())),
        })
    }

    /// The unix socket's path.
    pub fn socket_path(&self) -> PathBuf {
        self.socket.path().to_owned()
    }

    /// The HTTP address, with the port that was really bound.
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http_address
    }

    /// The switch of `POST /events`, for a reload.
    pub fn accept_events(&self) -> Arc<AtomicBool> {
        self.accept_events.clone()
    }

    /// The audit file, for what the daemon does by itself.
    pub fn audit(&self) -> Arc<Audit> {
        self.audit.clone()
    }

    /// Serves until `stop` becomes true (or its sender is dropped), then gives calls under way
    /// [`DRAIN`] to end. Call it inside a tokio runtime.
    pub async fn serve(
        self,
        engine: Arc<dyn Engine>,
        metrics: Arc<Metrics>,
        clock: Arc<dyn Clock>,
        stop: watch::Receiver<bool>,
    ) -> Result<(), ApiError> {
        let Self {
            grpc,
            socket,
            http,
            http_address,
            audit,
            max_event_bytes,
            accept_events,
        } = self;
        let ended = |server: &'static str, detail: String| ApiError::Ended { server, detail };
        let grpc = UnixListener::from_std(grpc).map_err(|e| ended("gRPC", e.to_string()))?;
        let service = Service::new(
            engine.clone(),
            audit.clone(),
            metrics.clone(),
            clock.clone(),
            stop.clone(),
        );
        let grpc = serve_grpc(grpc, service, engine.clone(), stop.clone());
        let http = async {
            let (Some(listener), Some(address)) = (http, http_address) else {
                stopped(stop.clone()).await;
                return Ok(());
            };
            let state = HttpState {
                engine,
                audit,
                metrics,
                clock,
                max_event_bytes,
                accept_events,
                address,
            };
            let listener =
                TcpListener::from_std(listener).map_err(|e| ended("HTTP", e.to_string()))?;
            axum::serve(
                listener,
                router(state).into_make_service_with_connect_info::<SocketAddr>(),
            )
            .with_graceful_shutdown(stopped(stop.clone()))
            .await
            .map_err(|e| ended("HTTP", e.to_string()))
        };
        let late = async {
            stopped(stop.clone()).await;
            tokio::time::sleep(DRAIN).await;
        };
        let served = tokio::select! {
            both = async { tokio::try_join!(grpc, http) } => both.map(|_| ()),
            () = late => Ok(()),
        };
        drop(socket);
        served
    }
}

fn bind_http(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Ends when the daemon stops. A dropped sender is a stop as well.
async fn stopped(mut stop: watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn serve_grpc(
    listener: UnixListener,
    service: Service,
    engine: Arc<dyn Engine>,
    stop: watch::Receiver<bool>,
) -> Result<(), ApiError> {
    let ended = |detail: String| ApiError::Ended {
        server: "gRPC",
        detail,
    };
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(pb::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let v1 = reflection().build_v1().map_err(|e| ended(e.to_string()))?;
    let v1alpha = reflection()
        .build_v1alpha()
        .map_err(|e| ended(e.to_string()))?;
    let (reporter, health) = tonic_health::server::health_reporter();
    let server = Server::builder()
        .layer(InterceptorLayer::new(check_peer))
        .add_service(v1)
        .add_service(v1alpha)
        .add_service(health)
        .add_service(SnapshotOrchestrationServer::new(service))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stopped(stop.clone()));
    let follow = follow_health(reporter, engine);
    tokio::select! {
        result = server => result.map_err(|e| ended(e.to_string())),
        () = follow => Ok(()),
    }
}

/// Keeps the health service in step with the daemon, for ever.
async fn follow_health(reporter: tonic_health::server::HealthReporter, engine: Arc<dyn Engine>) {
    loop {
        let status = match engine.not_ready() {
            None => tonic_health::ServingStatus::Serving,
            Some(_) => tonic_health::ServingStatus::NotServing,
        };
        reporter.set_service_status("", status).await;
        reporter
            .set_service_status("soe.v1.SnapshotOrchestration", status)
            .await;
        tokio::time::sleep(HEALTH_INTERVAL).await;
    }
}

/// Tells systemd what the daemon does. A no-op when systemd does not listen.
pub fn service_notify(state: ServiceState<'_>) {
    use sd_notify::NotifyState;
    let sent = match state {
        ServiceState::Ready(status) => {
            sd_notify::notify(false, &[NotifyState::Ready, NotifyState::Status(status)])
        }
        ServiceState::Reloading => {
            let mut states = vec![NotifyState::Reloading];
            states.extend(NotifyState::monotonic_usec_now());
            sd_notify::notify(false, &states)
        }
        ServiceState::Stopping => sd_notify::notify(false, &[NotifyState::Stopping]),
        ServiceState::Status(status) => sd_notify::notify(false, &[NotifyState::Status(status)]),
    };
    if let Err(error) = sent {
        tracing::warn!(%error, "systemd was not told");
    }
}

/// What there is to tell systemd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceState<'a> {
    /// Ready (again), with a status line.
    Ready(&'a str),
    /// Reading the configuration again; [`ServiceState::Ready`] must follow.
    Reloading,
    /// Stopping.
    Stopping,
    /// A status line.
    Status(&'a str),
}
