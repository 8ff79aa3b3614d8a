//! Configuration: TOML, every key with a default and a documented range.
//!
//! `dist/soe.toml` lists every key with its default and range; a test compares it with the code. An
//! unknown key, a value out of range or a combination that makes no sense is an error that names
//! file and line; nothing is ignored and nothing is silently corrected.
//!
//! # Reload
//!
//! On SIGHUP the daemon reads the same file again with [`Config::load`]. If that fails, the daemon
//! says why and goes on with what it has. Otherwise [`Config::reload`] tells which changed keys take
//! effect at once ([`LIVE`]) and which wait for a restart; the daemon logs both and goes on with
//! [`Config::with_live_of`] the new one.

mod error;
mod readers;
mod reload;
mod schema;
pub mod units;

use std::path::{Path, PathBuf};

pub use error::ConfigError;
pub use reload::{LIVE, Reload};
pub use schema::{
    Agent, Api, Bandwidth, Cluster, Compression, EventSource, History, HostApp, Limits, Listen,
    Model, Plan, Staging, Store, Tracking,
};
use serde::{Deserialize, Serialize};

/// Where the daemon looks when it is not told.
pub const DEFAULT_PATH: &str = "/etc/soe/soe.toml";

/// The whole configuration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The daemon itself.
    pub agent: Agent,
    /// Where it listens.
    pub api: Api,
    /// Parquet history.
    pub history: History,
    /// Layer store.
    pub store: Store,
    /// Staging area.
    pub staging: Staging,
    /// What it may use of the host.
    pub limits: Limits,
    /// Change tracking.
    pub tracking: Tracking,
    /// Forecasts.
    pub model: Model,
    /// Decisions.
    pub plan: Plan,
    /// What runs on this host.
    pub host: Host,
    /// Where events come from.
    pub event: Events,
    /// The file this was read from, to be read again on SIGHUP.
    #[serde(skip)]
    pub path: Option<PathBuf>,
}

/// What runs on this host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Host {
    /// Applications by cgroup.
    pub app: Vec<HostApp>,
}

/// Where events come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Events {
    /// The sources; by default the HTTP listener's `POST /events`.
    pub source: Vec<EventSource>,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            source: vec![EventSource::Cloudevents],
        }
    }
}

impl Config {
    /// Reads `path`; without one, [`DEFAULT_PATH`] if it exists, else the defaults.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, optional) = match path {
            Some(path) => (path, false),
            None => (Path::new(DEFAULT_PATH), true),
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if optional && e.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(source) => {
                return Err(ConfigError::Read {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        let mut config = Self::parse(&text, path)?;
        config.path = Some(path.to_owned());
        Ok(config)
    }

    /// Reads the text of a file; `path` is only for messages.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self =
            toml::from_str(text).map_err(|e| ConfigError::from_toml(&e, text, path))?;
        config.check(text, path)?;
        Ok(config)
    }

    /// What single values cannot tell. The line named is that of the key at fault.
    fn check(&self, text: &str, path: &Path) -> Result<(), ConfigError> {
        let at = |table: &str, key: &str, message: String| {
            ConfigError::at_key(text, path, table, key, message)
        };
        if self.history.region_interval < self.history.interval {
            return Err(at(
                "history",
                "region_interval",
                format!(
                    "must not be shorter than history.interval ({})",
                    units::format_duration(self.history.interval)
                ),
            ));
        }
        if self.model.bin < self.history.interval {
            return Err(at(
                "model",
                "bin",
                format!(
                    "must not be shorter than history.interval ({})",
                    units::format_duration(self.history.interval)
                ),
            ));
        }
        if let Err(why) = self.season_bins() {
            return Err(at("model", "season", why));
        }
        Ok(())
    }

    /// Bins in a season, 8 to 100,000. The error says what is wrong with the two keys.
    pub fn season_bins(&self) -> Result<usize, String> {
        let (season, bin) = (self.model.season.as_nanos(), self.model.bin.as_nanos());
        let bins = season.checked_div(bin).filter(|bins| bins * bin == season);
        let bins = bins
            .and_then(|bins| usize::try_from(bins).ok())
            .filter(|bins| (8..=100_000).contains(bins));
        bins.ok_or_else(|| {
            format!(
                "{} is not 8 to 100000 whole bins of model.bin ({})",
                units::format_duration(self.model.season),
                units::format_duration(self.model.bin)
            )
        })
    }

    /// `[agent] state_dir`, else what systemd's `StateDirectory=` gave, else `/var/lib/soe`.
    pub fn state_dir(&self) -> PathBuf {
        let given = || {
            let dirs = std::env::var("STATE_DIRECTORY").ok()?;
            dirs.split(':')
                .next()
                .filter(|d| d.starts_with('/'))
                .map(PathBuf::from)
        };
        self.agent
            .state_dir
            .clone()
            .or_else(given)
            .unwrap_or_else(|| PathBuf::from("/var/lib/soe"))
    }

    /// `[history] dir`, else `history` below the state directory.
    pub fn history_dir(&self) -> PathBuf {
        self.history
            .dir
            .clone()
            .unwrap_or_else(|| self.state_dir().join("history"))
    }

    /// `[store] dir`, else `store` below the state directory.
    pub fn store_dir(&self) -> PathBuf {
        self.store
            .dir
            .clone()
            .unwrap_or_else(|| self.state_dir().join("store"))
    }

    /// The file that holds one line for every call that changed something.
    pub fn audit_file(&self) -> PathBuf {
        self.state_dir().join("audit.jsonl")
    }

    /// The host's name: `[agent] host`, else the kernel's.
    pub fn host_name(&self) -> String {
        self.agent.host.clone().unwrap_or_else(|| {
            rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned()
        })
    }

    /// Whether `POST /events` is open.
    pub fn accepts_cloudevents(&self) -> bool {
        self.event.source.contains(&EventSource::Cloudevents)
    }

    /// This configuration with what of `new` takes effect at once.
    pub fn with_live_of(&self, new: &Self) -> Self {
        reload::merge(self, new)
    }

    /// What of `new` takes effect at once, and what waits for a restart.
    pub fn reload(&self, new: &Self) -> Reload {
        reload::compare(self, new)
    }
}

#[cfg(test)]
mod tests;
