//! Where events come from besides `POST /events`: a folder, systemd, Kubernetes.
//!
//! Each source turns what it sees into an [`Event`] and hands it to a [`Sink`]. What it means for forecasts
//! is learnt from what follows ([`crate::model::events`]), so a source decides nothing.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::api::engine::{EngineError, ErrorKind};
use crate::api::types::Event;
use crate::config::EventSource;
use crate::seam::UnixNanos;

pub mod folder;
#[cfg(feature = "kubernetes")]
pub mod kubernetes;
pub mod systemd;

/// The `source` of systemd's events.
pub const SYSTEMD: &str = "//systemd";

/// Takes events.
pub trait Sink: Send + Sync + 'static {
    /// Takes an event; `false` if it was taken before. Returns once it would survive a crash.
    ///
    /// # Errors
    /// If it cannot be kept.
    fn publish(&self, event: Event) -> Result<bool, EngineError>;

    /// The time.
    fn now(&self) -> UnixNanos;
}

#[cfg(test)]
mod support {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// Remembers what it was given, unless its disk is full.
    #[derive(Default)]
    pub(super) struct Taken {
        pub(super) events: Mutex<Vec<Event>>,
        pub(super) full: AtomicBool,
    }

    impl Sink for Taken {
        fn publish(&self, event: Event) -> Result<bool, EngineError> {
            if self.full.load(Ordering::SeqCst) {
                return Err(EngineError::new(ErrorKind::Exhausted, "the disk is full"));
            }
            self.events.lock().unwrap().push(event);
            Ok(true)
        }

        fn now(&self) -> UnixNanos {
            1_000
        }
    }
}

/// How long a source that failed waits, at first and at most.
const AGAIN: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
/// Events a source may bring in a minute. Each is made durable by itself; a cluster in trouble must not
/// become this host's load.
const PER_MINUTE: u32 = 120;

/// The sources that run.
#[derive(Default)]
pub struct Sources {
    config: Vec<EventSource>,
    running: Vec<JoinHandle<()>>,
}

impl Sources {
    /// Runs these sources and no others; those that are already there begin anew if anything changed.
    /// Must be called within a tokio runtime.
    pub fn follow(&mut self, config: &[EventSource], sink: &Arc<dyn Sink>) {
        if self.config == config {
            return;
        }
        self.stop();
        self.config = config.to_vec();
        self.running = config
            .iter()
            .filter(|source| **source != EventSource::Cloudevents)
            .map(|source| tokio::spawn(run(source.clone(), sink.clone())))
            .collect();
    }

    /// Ends all.
    pub fn stop(&mut self) {
        self.running.drain(..).for_each(|task| task.abort());
        self.config.clear();
    }
}

impl Drop for Sources {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Runs a source until it is aborted; one that fails is begun again after a while.
async fn run(source: EventSource, sink: Arc<dyn Sink>) {
    let mut wait = AGAIN.0;
    loop {
        let mut outlet = Outlet::new(sink.clone());
        let began = tokio::time::Instant::now();
        let why = match &source {
            EventSource::Cloudevents => return,
            EventSource::File { dir } => folder::follow(dir, &mut outlet).await,
            EventSource::Systemd { units } => systemd::follow(units, &mut outlet).await,
            #[cfg(feature = "kubernetes")]
            EventSource::Kubernetes(options) => kubernetes::follow(options, &mut outlet).await,
            #[cfg(not(feature = "kubernetes"))]
            EventSource::Kubernetes(_) => {
                tracing::error!("this build has no Kubernetes (feature \"kubernetes\" is off)");
                return;
            }
        };
        // What held for a while is not failing again and again.
        if began.elapsed() > AGAIN.1 {
            wait = AGAIN.0;
        }
        tracing::warn!(
            source = source.name(),
            why,
            "event source; trying again in {wait:?}"
        );
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(AGAIN.1);
    }
}

/// What a source publishes through: bounded in its rate.
pub struct Outlet {
    sink: Arc<dyn Sink>,
    minute: tokio::time::Instant,
    published: u32,
    dropped: u32,
}

impl Outlet {
    /// To `sink`.
    pub fn new(sink: Arc<dyn Sink>) -> Self {
        Self {
            sink,
            minute: tokio::time::Instant::now(),
            published: 0,
            dropped: 0,
        }
    }

    /// The time.
    pub fn now(&self) -> UnixNanos {
        self.sink.now()
    }

    /// Past the bound: for what somebody wrote on purpose.
    pub fn sink(&self) -> Arc<dyn Sink> {
        self.sink.clone()
    }

    /// Publishes an event unless there were too many this minute.
    ///
    /// # Errors
    /// If it could not be kept.
    pub async fn publish(&mut self, event: Event) -> Result<(), EngineError> {
        if self.minute.elapsed() >= Duration::from_secs(60) {
            if self.dropped > 0 {
                tracing::warn!(
                    dropped = self.dropped,
                    "an event source brought more than {PER_MINUTE} events in a minute"
                );
            }
            self.minute = tokio::time::Instant::now();
            (self.published, self.dropped) = (0, 0);
        }
        if self.published >= PER_MINUTE {
            self.dropped += 1;
            return Ok(());
        }
        self.published += 1;
        let sink = self.sink.clone();
        // Waits for the disk.
        let published = tokio::task::spawn_blocking(move || sink.publish(event).map(drop));
        published.await.unwrap_or_else(|ended| {
            Err(EngineError::new(
                ErrorKind::Internal,
                format!("publishing an event ended unexpectedly: {ended}"),
            ))
        })
    }
}
