//! Snapshot groups: volumes that are cut at one instant, and what the agent knows of them.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Decision, LayerInfo, Prediction, StagingStatus, TrackingState, named_enum, rfc3339};
use crate::seam::{GenerationEnd, UnixNanos};

named_enum! {
    /// How much an application matters when resources are short.
    pub enum Criticality {
        /// Yields first.
        Low = "low",
        /// The default.
        Normal = "normal",
        /// Yields last.
        High = "high",
    }
}

/// A group to create.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupSpec {
    /// Unique name.
    pub name: String,
    /// Volumes as the user names them; at least one.
    pub volumes: Vec<String>,
    /// Whether forecasts decide when layers are captured and blocks staged.
    pub prediction_enabled: bool,
    /// Age that the newest layer should not exceed, seconds; the configured default when absent.
    pub rpo_s: Option<u64>,
    /// Longest pause a cut may cause, microseconds; the configured default when absent.
    pub max_pause_us: Option<u64>,
    /// Foreground 99th percentile latency to respect, microseconds.
    pub p99_target_us: Option<u64>,
    /// Application type, such as `postgres`.
    pub app: Option<String>,
    /// How much the application matters.
    pub criticality: Criticality,
}

/// Changes to a group. What is `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GroupUpdate {
    /// The group.
    pub name: String,
    /// See [`GroupSpec::prediction_enabled`].
    pub prediction_enabled: Option<bool>,
    /// See [`GroupSpec::rpo_s`].
    pub rpo_s: Option<u64>,
    /// See [`GroupSpec::max_pause_us`].
    pub max_pause_us: Option<u64>,
    /// See [`GroupSpec::p99_target_us`].
    pub p99_target_us: Option<u64>,
    /// See [`GroupSpec::app`].
    pub app: Option<String>,
    /// See [`GroupSpec::criticality`].
    pub criticality: Option<Criticality>,
    /// Volumes to add.
    pub add_volumes: Vec<String>,
    /// Volumes to take out; their layers stay.
    pub remove_volumes: Vec<String>,
}

/// Host metadata to set for a group. What is `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostUpdate {
    /// The group.
    pub group: String,
    /// The host; empty means the agent's own.
    pub host: String,
    /// Application type.
    pub app: Option<String>,
    /// How much the application matters.
    pub criticality: Option<Criticality>,
    /// Foreground 99th percentile latency to respect, microseconds.
    pub p99_target_us: Option<u64>,
    /// Age that the newest layer should not exceed, seconds.
    pub rpo_s: Option<u64>,
}

/// What is known of one host that uses a group's volumes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostMetadata {
    /// The host's name.
    pub host: String,
    /// Application type.
    pub app: Option<String>,
    /// How much the application matters.
    pub criticality: Criticality,
    /// Foreground 99th percentile latency to respect, microseconds.
    pub p99_target_us: Option<u64>,
    /// Age that the newest layer should not exceed, seconds.
    pub rpo_s: Option<u64>,
}

/// A group and the state of its volumes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupStatus {
    /// The group's name.
    pub group: String,
    /// Whether forecasts decide.
    pub prediction_enabled: bool,
    /// Age that the newest layer should not exceed, seconds.
    pub rpo_s: u64,
    /// Longest pause a cut may cause, microseconds.
    pub max_pause_us: u64,
    /// Foreground 99th percentile latency to respect, microseconds.
    pub p99_target_us: Option<u64>,
    /// Application type.
    pub app: Option<String>,
    /// How much the application matters.
    pub criticality: Criticality,
    /// When the group was created.
    #[serde(with = "rfc3339")]
    pub created_at: UnixNanos,
    /// Captures whose pause was longer than the budget.
    pub missed_pause_budgets: u64,
    /// The last failed attempt since the last durable layer.
    pub last_error: Option<String>,
    /// What is known of the hosts.
    pub hosts: Vec<HostMetadata>,
    /// The volumes, in the order they were named.
    pub volumes: Vec<VolumeStatus>,
}

/// One volume of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Path of the block device.
    pub volume: String,
    /// Why it cannot be captured now: it is not there, or not what it was; `None` when all is well.
    pub missing: Option<String>,
    /// Identity that survives renumbering.
    pub device_id: String,
    /// Size.
    pub size_bytes: u64,
    /// What the change stamps belong to; `None` while detached.
    pub generation: Option<Uuid>,
    /// The current epoch.
    pub epoch: u64,
    /// What may be said of the change map.
    pub tracking: TrackingState,
    /// Why the next layer must read everything, if it must.
    pub rescan_reason: Option<GenerationEnd>,
    /// Durable layers.
    pub layers: u64,
    /// Of them baselines.
    pub baseline_layers: u64,
    /// Of them differentials.
    pub differential_layers: u64,
    /// The newest durable layer.
    pub last_layer: Option<LayerInfo>,
    /// Blocks the next differential would hold if it were cut now; `None` when the map cannot tell.
    pub changed_blocks_pending: Option<u64>,
    /// Age that the newest layer should not exceed, seconds.
    pub rpo_s: u64,
    /// Seconds since the cut of the newest durable layer.
    pub rpo_age_s: Option<u64>,
    /// Blocks staged ahead of a burst.
    pub staging: StagingStatus,
    /// What is predicted.
    pub predicted: Prediction,
    /// The last decision of the planner.
    pub last_decision: Option<Decision>,
}
