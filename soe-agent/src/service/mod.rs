//! Wires the agent: the only place that builds concrete parts.
//!
//! `agent` holds the parts, `heart` is the heartbeat that samples, decides and carries out,
//! `capture` runs a capture, `engine` answers callers, `events` takes events from outside, `groups` keeps
//! the groups, `hotplug` follows volumes that come and go, `reload` takes over a changed configuration,
//! `staging` copies ahead of bursts.

mod agent;
mod capture;
mod engine;
mod events;
mod groups;
mod heart;
mod hotplug;
mod models;
mod prime;
mod reload;
mod report;
mod restore;
mod sampler;
pub mod sink;
mod spread;
mod staging;
mod state;
mod steps;
mod trace;
mod vitals;

use std::path::PathBuf;
use std::sync::Arc;

pub use agent::Agent;
pub use report::{layer_detail, layer_info};
pub use state::{Group, State, StateError, StateLock};

use crate::api::server::{ApiError, Listeners, ServiceState, service_notify};
use crate::api::socket::SocketError;
use crate::config::Config;
use crate::metrics::Metrics;
use crate::sources::{Sink, Sources};

/// Why the daemon ended, or could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The surface could not be served.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The kernel half or a volume.
    #[error(transparent)]
    Tracker(#[from] crate::observe::TrackerError),
    /// The change map.
    #[error(transparent)]
    Track(#[from] crate::seam::TrackError),
    /// The layer store.
    #[error(transparent)]
    Layer(#[from] crate::layer::LayerError),
    /// The history.
    #[error(transparent)]
    History(#[from] crate::history::HistoryError),
    /// The state file.
    #[error(transparent)]
    State(#[from] StateError),
    /// The folder of the trained networks.
    #[error(transparent)]
    Models(#[from] crate::model::weights::ModelError),
    /// The staging area.
    #[error(transparent)]
    Stage(#[from] crate::stage::area::StageError),
    /// The freeze guard.
    #[error(transparent)]
    Guard(#[from] crate::capture::FreezeError),
    /// A volume could not be opened.
    #[error(transparent)]
    Open(#[from] crate::io::OpenError),
    /// A folder could not be made.
    #[error("cannot use {path}: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The layer format knows no such compression.
    #[error(
        "store.compression zstd:{level}: layers are compressed with zstd:1 or not at all (none)"
    )]
    Compression {
        /// The level asked for.
        level: i32,
    },
    /// The model's settings do not fit.
    #[error("model settings: {reason}")]
    Model {
        /// Why.
        reason: String,
    },
    /// The process could not be set up.
    #[error("{what}: {source}")]
    Process {
        /// What was tried.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// What a disk was before is still being read.
    #[error("{} became another device, and what it was is still being read; try again in a moment", volume.display())]
    Held {
        /// The volume.
        volume: PathBuf,
    },
    /// A part ended by a panic.
    #[error("the agent's {part} ended unexpectedly; its log says why")]
    Ended {
        /// The part.
        part: &'static str,
    },
}

impl ServiceError {
    /// Whether it is a refusal for safety's sake rather than a failure.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Tracker(crate::observe::TrackerError::Owned { .. })
                | Self::State(StateError::InUse { .. })
                | Self::Api(ApiError::Socket(SocketError::InUse { .. }))
                | Self::Guard(
                    crate::capture::FreezeError::Protected { .. }
                        | crate::capture::FreezeError::AlreadyFrozen { .. }
                )
                | Self::Layer(crate::layer::LayerError::Busy { .. })
                | Self::History(crate::history::HistoryError::Locked { .. })
        )
    }
}

/// Runs the daemon until SIGTERM or SIGINT. Returns `Ok` after a clean stop with a complete history.
pub fn run(config: Config) -> Result<(), ServiceError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| ServiceError::Process {
            what: "starting the async runtime",
            source,
        })?;
    let state_dir = config.state_dir();
    std::fs::create_dir_all(&state_dir).map_err(|source| ServiceError::Folder {
        path: state_dir.clone(),
        source,
    })?;
    // The listeners first: they tell early that another agent runs.
    let listeners = {
        let _in_runtime = runtime.enter();
        Listeners::open(&config)?
    };
    let metrics = Arc::new(Metrics::new());
    let agent = Arc::new(Agent::open(config, metrics.clone())?);
    let heart = {
        let agent = agent.clone();
        std::thread::Builder::new()
            .name("soe-heart".into())
            .spawn(move || heart::beat(&agent))
            .map_err(|source| ServiceError::Process {
                what: "starting the heartbeat",
                source,
            })?
    };
    {
        let following = agent.clone();
        agent.job("devices", move || following.follow_devices());
        let looking = agent.clone();
        agent.job("vitals", move || vitals::keep(&looking));
        let remembering = agent.clone();
        agent.job("heat", move || remembering.prime_heat());
    }
    let served = runtime.block_on(serve(&agent, listeners, metrics));
    service_notify(ServiceState::Stopping);
    agent.close();
    if heart.join().is_err() {
        return Err(ServiceError::Ended { part: "heartbeat" });
    }
    agent.close();
    served
}

async fn serve(
    agent: &Arc<Agent>,
    listeners: Listeners,
    metrics: Arc<Metrics>,
) -> Result<(), ServiceError> {
    use tokio::signal::unix::{SignalKind, signal};
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let listen = |kind| {
        signal(kind).map_err(|source| ServiceError::Process {
            what: "listening for signals",
            source,
        })
    };
    let (mut term, mut int, mut hup) = (
        listen(SignalKind::terminate())?,
        listen(SignalKind::interrupt())?,
        listen(SignalKind::hangup())?,
    );
    let clock = agent.clock.clone();
    let accept_events = listeners.accept_events();
    let serving = listeners.serve(Arc::new(agent.clone()), metrics, clock, stopped);
    tokio::pin!(serving);
    let sink: Arc<dyn Sink> = Arc::new(agent.clone());
    let mut sources = Sources::default();
    sources.follow(&agent.config().event.source, &sink);
    service_notify(ServiceState::Ready("tracking"));
    tracing::info!("ready");
    loop {
        tokio::select! {
            ended = &mut serving => return Ok(ended?),
            _ = term.recv() => break,
            _ = int.recv() => break,
            _ = hup.recv() => {
                service_notify(ServiceState::Reloading);
                agent.reload(&accept_events);
                sources.follow(&agent.config().event.source, &sink);
                service_notify(ServiceState::Ready("tracking"));
            }
        }
    }
    tracing::info!("stopping");
    sources.stop();
    agent
        .stopping
        .store(true, std::sync::atomic::Ordering::SeqCst);
    let _ = stop.send(true);
    Ok(serving.await?)
}
