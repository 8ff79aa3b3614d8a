//! A daemon without devices: an engine in memory behind the real surface.
#![allow(dead_code, missing_docs)]

pub mod engine;
pub mod samples;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use soe_agent::api::server::Listeners;
use soe_agent::config::Config;
use soe_agent::io::SystemClock;
use soe_agent::metrics::Metrics;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::watch;

pub use engine::MemoryEngine;

/// The surface over a [`MemoryEngine`], in a folder of its own.
pub struct Daemon {
    pub engine: Arc<MemoryEngine>,
    pub metrics: Arc<Metrics>,
    pub http: Option<std::net::SocketAddr>,
    pub config: Config,
    stop: watch::Sender<bool>,
    served: Option<tokio::task::JoinHandle<Result<(), soe_agent::api::server::ApiError>>>,
    pub runtime: Runtime,
    pub dir: TempDir,
}

impl Daemon {
    pub fn start() -> Self {
        Self::start_with(|_| {})
    }

    pub fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.agent.state_dir = Some(dir.path().to_owned());
        config.api.listen = format!("unix:{}", dir.path().join("run/soe.sock").display())
            .parse()
            .unwrap();
        config.api.http = Some("127.0.0.1:0".parse().unwrap());
        change(&mut config);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let listeners = Listeners::open(&config).unwrap();
        let http = listeners.http_address();
        let engine = Arc::new(MemoryEngine::default());
        let metrics = Arc::new(Metrics::new());
        let (stop, stopping) = watch::channel(false);
        let served = runtime.spawn(listeners.serve(
            engine.clone(),
            metrics.clone(),
            Arc::new(SystemClock),
            stopping,
        ));
        Self {
            engine,
            metrics,
            http,
            config,
            stop,
            served: Some(served),
            runtime,
            dir,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.config.api.listen.0.clone()
    }

    pub fn endpoint(&self) -> String {
        self.config.api.listen.to_string()
    }

    /// A finished `soe` with these arguments, as a client of this daemon.
    pub fn soe(&self, args: &[&str]) -> Output {
        soe_with(args, |c| drop(c.env("SOE_ENDPOINT", self.endpoint())))
    }

    /// Its standard output as JSON; it must have succeeded.
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let args: Vec<&str> = args.iter().copied().chain(["--json"]).collect();
        let output = self.soe(&args);
        assert!(
            output.status.success(),
            "{args:?}: {}",
            text(&output.stderr)
        );
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("{args:?}: {e}: {}", text(&output.stdout)))
    }

    pub fn audit(&self) -> Vec<soe_agent::api::audit::Line> {
        soe_agent::api::audit::read(&self.config.audit_file()).unwrap()
    }

    /// Stops and waits; tells how long it took.
    pub fn stop(&mut self) -> Duration {
        let began = std::time::Instant::now();
        let _ = self.stop.send(true);
        if let Some(served) = self.served.take() {
            self.runtime.block_on(served).unwrap().unwrap();
        }
        began.elapsed()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.stop();
        }
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A finished `soe` with these arguments, ended by force if it hangs.
pub fn soe(args: &[&str]) -> Output {
    soe_with(args, |_| {})
}

pub fn soe_with(args: &[&str], change: impl FnOnce(&mut Command)) -> Output {
    let mut command = Command::new("timeout");
    command
        .args(["-s", "KILL", "30", env!("CARGO_BIN_EXE_soe")])
        .args(args);
    command
        .env_remove("SOE_ENDPOINT")
        .env_remove("STATE_DIRECTORY")
        .stdin(Stdio::null());
    change(&mut command);
    command.output().unwrap()
}

/// Asserts the exit code and that standard error is exactly one sentence, after lines of progress
/// if there are any.
pub fn fails(output: &Output, code: i32, contains: &str) {
    let said = text(&output.stderr);
    assert_eq!(
        output.status.code(),
        Some(code),
        "{said}{}",
        text(&output.stdout)
    );
    let is_progress =
        |line: &&str| line.starts_with("restoring: ") || line.starts_with("verifying: ");
    let lines: Vec<&str> = said.lines().skip_while(is_progress).collect();
    assert!(
        lines.len() == 1 && lines[0].starts_with("soe: "),
        "{said:?} is not one sentence"
    );
    assert!(
        lines[0].contains(contains) && !said.contains("panicked"),
        "{said:?} does not say {contains:?}"
    );
}

pub fn write(path: &Path, text: &str) -> PathBuf {
    std::fs::write(path, text).unwrap();
    path.to_owned()
}
