//! The keys. Each one's comment gives its range; `dist/soe.toml` repeats it for the reader.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::readers::*;
use super::units;
use crate::api::types::Criticality;

/// A key that has a meaning in the surface but none in this version: better refused than ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserved {}

impl<'de> Deserialize<'de> for Reserved {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        de::IgnoredAny::deserialize(deserializer)?;
        Err(de::Error::custom(
            "this version does not support the key; take it out",
        ))
    }
}

impl Serialize for Reserved {
    fn serialize<S: Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        match *self {}
    }
}

/// `[agent]`: the daemon itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Agent {
    /// Where it keeps what must survive a restart; an absolute path.
    #[serde(deserialize_with = "path")]
    pub state_dir: Option<PathBuf>,
    /// The name of this host in the history; a text.
    #[serde(deserialize_with = "some_text")]
    pub host: Option<String>,
    /// What is logged: `error`, `warn`, `info`, `debug`, `trace`, or directives such as `info,soe_agent::plan=debug`.
    #[serde(deserialize_with = "text")]
    pub log: String,
}

impl Default for Agent {
    fn default() -> Self {
        Self {
            state_dir: None,
            host: None,
            log: "info".into(),
        }
    }
}

/// A unix socket to listen on: `unix:/absolute/path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen(pub PathBuf);

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unix:{}", self.0.display())
    }
}

impl std::str::FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            // sun_path holds 108 bytes with its final zero.
            Some(path) if path.starts_with('/') && path.len() <= 107 && !path.contains('\0') => {
                Ok(Self(path.into()))
            }
            _ => Err(format!(
                "{text:?} is not unix: and an absolute path of at most 107 bytes, such as unix:/run/soe/soe.sock"
            )),
        }
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

impl Serialize for Listen {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// `[api]`: where it listens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Api {
    /// gRPC; `unix:` and an absolute path of at most 107 bytes.
    pub listen: Listen,
    /// HTTP; a loopback address and port, or `off`.
    #[serde(deserialize_with = "http", serialize_with = "http_text")]
    pub http: Option<SocketAddr>,
    /// Largest body of `POST /events`; 1 KiB to 64 MiB.
    #[serde(
        deserialize_with = "event_bytes",
        serialize_with = "units::size::serialize"
    )]
    pub max_event: u64,
    /// Not in this version.
    pub tls: Option<Reserved>,
}

impl Default for Api {
    fn default() -> Self {
        Self {
            listen: Listen("/run/soe/soe.sock".into()),
            http: Some(SocketAddr::from(([127, 0, 0, 1], 9620))),
            max_event: MIB,
            tls: None,
        }
    }
}

/// `[history]`: Parquet history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct History {
    /// Where; an absolute path.
    #[serde(deserialize_with = "path")]
    pub dir: Option<PathBuf>,
    /// Not in this version.
    pub url: Option<Reserved>,
    /// Length of a window of `volume_stats`; 100 ms to 1 h.
    #[serde(
        deserialize_with = "history_interval",
        serialize_with = "units::duration::serialize"
    )]
    pub interval: Duration,
    /// Length of a window of `region_heat`; `interval` to 1 d.
    #[serde(
        deserialize_with = "region_interval",
        serialize_with = "units::duration::serialize"
    )]
    pub region_interval: Duration,
    /// How long it is kept; 1 h to 3650 d.
    #[serde(
        deserialize_with = "retention",
        serialize_with = "units::duration::serialize"
    )]
    pub retention: Duration,
    /// How large it may grow; 16 MiB to 1 PiB.
    #[serde(
        deserialize_with = "disk_size",
        serialize_with = "units::size::serialize"
    )]
    pub max_size: u64,
    /// How much it leaves free on its filesystem; 16 MiB to 1 PiB.
    #[serde(
        deserialize_with = "disk_size",
        serialize_with = "units::size::serialize"
    )]
    pub min_free: u64,
}

impl Default for History {
    fn default() -> Self {
        Self {
            dir: None,
            url: None,
            interval: SECOND,
            region_interval: 60 * SECOND,
            retention: 30 * DAY,
            max_size: 16 * GIB,
            min_free: GIB,
        }
    }
}

/// How blocks are compressed: `none` or `zstd:1`, the one level the layer format knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// zstd at this level.
    Zstd(i32),
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

impl<'de> Deserialize<'de> for Compression {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let level = text
            .strip_prefix("zstd:")
            .and_then(|l| l.parse().ok())
            .filter(|l| *l == 1);
        match (text.as_str(), level) {
            ("none", _) => Ok(Self::None),
            (_, Some(level)) => Ok(Self::Zstd(level)),
            _ => Err(de::Error::custom(format!("{text:?} is not none or zstd:1"))),
        }
    }
}

impl Serialize for Compression {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// `[store]`: where layers are kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Store {
    /// Where; an absolute path.
    #[serde(deserialize_with = "path")]
    pub dir: Option<PathBuf>,
    /// Not in this version.
    pub url: Option<Reserved>,
    /// Not in this version.
    pub key_file: Option<Reserved>,
    /// `none` or `zstd:1`.
    pub compression: Compression,
    /// How much a capture leaves free on the store's filesystem; 16 MiB to 1 PiB.
    #[serde(
        deserialize_with = "disk_size",
        serialize_with = "units::size::serialize"
    )]
    pub min_free: u64,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            dir: None,
            url: None,
            key_file: None,
            compression: Compression::Zstd(1),
            min_free: 256 * MIB,
        }
    }
}

/// `[staging]`: fast storage for blocks ahead of a burst.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Staging {
    /// A file or block device on fast storage; an absolute path. Without it nothing is staged.
    #[serde(deserialize_with = "path")]
    pub path: Option<PathBuf>,
    /// How much may be staged over all volumes; 1 MiB to 64 TiB.
    #[serde(
        deserialize_with = "staging_budget",
        serialize_with = "units::size::serialize"
    )]
    pub budget: u64,
}

impl Default for Staging {
    fn default() -> Self {
        Self {
            path: None,
            budget: 8 * GIB,
        }
    }
}

/// Bytes a second that a capture may read: `auto` or a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bandwidth {
    /// As much as the foreground's latency allows.
    Auto,
    /// No more than so many bytes a second, 1 MiB to 1 TiB.
    BytesPerSecond(u64),
}

impl<'de> Deserialize<'de> for Bandwidth {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let bytes =
            units::parse_size(&text).map_err(|e| de::Error::custom(format!("{e}, or auto")))?;
        if !(MIB..=TIB).contains(&bytes) {
            return Err(de::Error::custom(format!(
                "{text:?} is out of range; use auto or 1MiB to 1TiB (a second)"
            )));
        }
        Ok(Self::BytesPerSecond(bytes))
    }
}

impl Serialize for Bandwidth {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::BytesPerSecond(bytes) => serializer.serialize_str(&units::format_size(*bytes)),
        }
    }
}

/// `[limits]`: what it may use of the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Cores that background work may use; 0.01 to 256.
    #[serde(deserialize_with = "cpu")]
    pub cpu: f64,
    /// Memory; 64 MiB to 1 TiB.
    #[serde(deserialize_with = "memory", serialize_with = "units::size::serialize")]
    pub memory: u64,
    /// What a capture may read a second; `auto`, or 1 MiB to 1 TiB.
    pub capture_bandwidth: Bandwidth,
    /// Blocks of each volume that are read again after a cut and held against the layer; 0 to 4096.
    #[serde(deserialize_with = "audit_blocks")]
    pub audit_blocks: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            cpu: 0.5,
            memory: 512 * MIB,
            capture_bandwidth: Bandwidth::Auto,
            audit_blocks: crate::capture::AUDIT_BLOCKS,
        }
    }
}

/// `[tracking]`: the change map.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tracking {
    /// Bytes a stamp covers on a small volume; a power of two, 4 KiB to 1 MiB.
    #[serde(
        deserialize_with = "block_size",
        serialize_with = "units::size::serialize"
    )]
    pub block_size: u64,
    /// Kernel memory for one volume's stamps; larger volumes get larger blocks. 1 MiB to 64 GiB.
    #[serde(
        deserialize_with = "map_memory",
        serialize_with = "units::size::serialize"
    )]
    pub memory: u64,
}

impl Default for Tracking {
    fn default() -> Self {
        Self {
            block_size: 64 * KIB,
            memory: 64 * MIB,
        }
    }
}

/// `[model]`: forecasts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// Length of the bins that are forecast; `history.interval` to 1 h.
    #[serde(
        deserialize_with = "bin",
        serialize_with = "units::duration::serialize"
    )]
    pub bin: Duration,
    /// The period after which load is expected to repeat; 8 to 100000 whole bins, at most 31 d.
    #[serde(
        deserialize_with = "season",
        serialize_with = "units::duration::serialize"
    )]
    pub season: Duration,
    /// History needed before the first training; 1 s to 62 d.
    #[serde(
        deserialize_with = "train_after",
        serialize_with = "units::duration::serialize"
    )]
    pub train_after: Duration,
    /// How often the network is trained; 1 s to 31 d.
    #[serde(
        deserialize_with = "train_every",
        serialize_with = "units::duration::serialize"
    )]
    pub train_every: Duration,
    /// Seed of every random choice in training; any number.
    pub seed: u32,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            bin: 300 * SECOND,
            season: DAY,
            train_after: 2 * DAY,
            train_every: DAY,
            seed: 1,
        }
    }
}

/// `[plan]`: decisions, and what a group gets that does not say otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Plan {
    /// How often the planner looks; 50 ms to 1 h.
    #[serde(
        deserialize_with = "tick",
        serialize_with = "units::duration::serialize"
    )]
    pub tick: Duration,
    /// Load, in bytes a second, below which a volume is idle whatever the forecast; 0 to 1 GiB.
    #[serde(deserialize_with = "idle", serialize_with = "units::size::serialize")]
    pub idle: u64,
    /// Share of the RPO before which no new layer is taken; 0.01 to 0.99.
    #[serde(deserialize_with = "share")]
    pub earliest: f64,
    /// Probability of a burst above which blocks are staged; 0.01 to 0.99.
    #[serde(deserialize_with = "share")]
    pub stage_above: f64,
    /// Share of the blocks chosen for bursts that must be read in them; a volume below it is not staged
    /// until it would be better. 0.01 to 0.99.
    #[serde(deserialize_with = "share")]
    pub stage_precision: f64,
    /// Age that the newest layer should not exceed; 1 s to 30 d.
    #[serde(
        deserialize_with = "rpo",
        serialize_with = "units::duration::serialize"
    )]
    pub rpo: Duration,
    /// Longest pause of writes that a cut may cause; 1 ms to 10 s.
    #[serde(
        deserialize_with = "max_pause",
        serialize_with = "units::duration::serialize"
    )]
    pub max_pause: Duration,
    /// Age of the newest baseline after which a long quiet time is used for another; 1 s to 3650 d.
    #[serde(
        deserialize_with = "baseline_every",
        serialize_with = "units::duration::serialize"
    )]
    pub baseline_every: Duration,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            tick: SECOND,
            idle: 64 * KIB,
            earliest: 0.5,
            stage_above: 0.5,
            stage_precision: 0.05,
            rpo: 900 * SECOND,
            max_pause: Duration::from_millis(100),
            baseline_every: 7 * DAY,
        }
    }
}

/// `[[host.app]]`: an application on this host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostApp {
    /// Its cgroup; a path below the cgroup root, beginning with `/`.
    #[serde(deserialize_with = "cgroup")]
    pub cgroup: String,
    /// What it is, such as `postgres`; a text.
    #[serde(rename = "type", deserialize_with = "text")]
    pub kind: String,
    /// How much it matters: `low`, `normal` or `high`.
    #[serde(default = "normal")]
    pub criticality: Criticality,
    /// Foreground 99th percentile latency to respect; 10 us to 10 s.
    #[serde(
        default,
        deserialize_with = "some_p99",
        serialize_with = "some_duration"
    )]
    pub p99: Option<Duration>,
    /// Age that the newest layer should not exceed; 1 s to 30 d.
    #[serde(
        default,
        deserialize_with = "some_rpo",
        serialize_with = "some_duration"
    )]
    pub rpo: Option<Duration>,
}

/// `[[event.source]]`: where events come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "EventSourceTable", into = "EventSourceTable")]
pub enum EventSource {
    /// `POST /events` of the HTTP listener.
    Cloudevents,
    /// Files dropped into a folder.
    File {
        /// The folder.
        dir: PathBuf,
    },
    /// Units of systemd.
    Systemd {
        /// Names of the units told, with `*` and `?`.
        units: Vec<glob::Pattern>,
    },
    /// A Kubernetes cluster.
    Kubernetes(Cluster),
}

/// A Kubernetes cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// How to reach it; without, as a pod does, or as the user does.
    pub kubeconfig: Option<PathBuf>,
    /// The namespaces watched; none for all.
    pub namespaces: Vec<String>,
    /// This host's name in the cluster.
    pub node: String,
}

impl EventSource {
    /// Its kind, as in `type`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Cloudevents => "cloudevents",
            Self::File { .. } => "file",
            Self::Systemd { .. } => "systemd",
            Self::Kubernetes(_) => "kubernetes",
        }
    }
}

/// As it is written.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EventSourceTable {
    /// `cloudevents`, `file`, `systemd` or `kubernetes`.
    #[serde(rename = "type")]
    kind: String,
    /// Of `file`: the folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    dir: Option<PathBuf>,
    /// Of `systemd`: names of units with `*` and `?` [default: `*.service`].
    #[serde(skip_serializing_if = "Option::is_none")]
    units: Option<Vec<String>>,
    /// Of `kubernetes`: the file that says how to reach the cluster [default: as a pod does].
    #[serde(skip_serializing_if = "Option::is_none")]
    kubeconfig: Option<PathBuf>,
    /// Of `kubernetes`: namespaces [default: all].
    #[serde(skip_serializing_if = "Option::is_none")]
    namespaces: Option<Vec<String>>,
    /// Of `kubernetes`: this host's name in the cluster [default: the host's name].
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
}

impl TryFrom<EventSourceTable> for EventSource {
    type Error = String;

    fn try_from(table: EventSourceTable) -> Result<Self, String> {
        let kind = table.kind.as_str();
        let belongs = [
            ("dir", table.dir.is_some(), "file"),
            ("units", table.units.is_some(), "systemd"),
            ("kubeconfig", table.kubeconfig.is_some(), "kubernetes"),
            ("namespaces", table.namespaces.is_some(), "kubernetes"),
            ("node", table.node.is_some(), "kubernetes"),
        ];
        if let Some((key, _, of)) = belongs.iter().find(|(_, given, of)| *given && *of != kind) {
            return Err(format!(
                "{key} belongs to the source {of:?}, not to {kind:?}"
            ));
        }
        let absolute = |key: &str, path: PathBuf| match path.is_absolute() {
            true => Ok(path),
            false => Err(format!("{key}: {path:?} is not an absolute path")),
        };
        match kind {
            "cloudevents" => Ok(Self::Cloudevents),
            "file" => {
                let dir = table
                    .dir
                    .ok_or("the source \"file\" needs dir, the folder")?;
                absolute("dir", dir).map(|dir| Self::File { dir })
            }
            "systemd" => {
                let units = table.units.unwrap_or_else(|| vec!["*.service".to_owned()]);
                let pattern = |unit: &String| {
                    glob::Pattern::new(unit).map_err(|e| format!("units: {unit:?}: {e}"))
                };
                let units = units.iter().map(pattern).collect::<Result<_, _>>()?;
                Ok(Self::Systemd { units })
            }
            "kubernetes" => Ok(Self::Kubernetes(Cluster {
                kubeconfig: table
                    .kubeconfig
                    .map(|path| absolute("kubeconfig", path))
                    .transpose()?,
                namespaces: table.namespaces.unwrap_or_default(),
                node: table.node.unwrap_or_else(|| {
                    let uname = rustix::system::uname();
                    uname.nodename().to_string_lossy().into_owned()
                }),
            })),
            _ => Err(format!(
                "{kind:?} is no event source; use cloudevents, file, systemd or kubernetes"
            )),
        }
    }
}

impl From<EventSource> for EventSourceTable {
    fn from(source: EventSource) -> Self {
        let table = Self {
            kind: source.name().to_owned(),
            ..Self::default()
        };
        match source {
            EventSource::Cloudevents => table,
            EventSource::File { dir } => Self {
                dir: Some(dir),
                ..table
            },
            EventSource::Systemd { units } => Self {
                units: Some(units.iter().map(ToString::to_string).collect()),
                ..table
            },
            EventSource::Kubernetes(cluster) => Self {
                kubeconfig: cluster.kubeconfig,
                namespaces: Some(cluster.namespaces),
                node: Some(cluster.node),
                ..table
            },
        }
    }
}
