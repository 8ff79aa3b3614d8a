//! Events that announce a change of load: deployments, scaling, backups.

use serde::{Deserialize, Serialize};

use super::rfc3339;
use crate::seam::UnixNanos;

/// An event as it is kept. `source` and `id` together are unique.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Unique within its source.
    pub id: String,
    /// Where it comes from, a URI reference.
    pub source: String,
    /// What kind of event it is, such as `com.example.deploy.started`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What it is about, within its source.
    pub subject: Option<String>,
    /// When it happened.
    #[serde(with = "rfc3339")]
    pub time: UnixNanos,
    /// When the announced change is expected, if it is not now.
    #[serde(with = "rfc3339::option")]
    pub expected_at: Option<UnixNanos>,
    /// Volumes concerned; none means all of the host.
    pub volumes: Vec<String>,
    /// The event's data.
    pub data: Option<serde_json::Value>,
}

/// Which events to list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventQuery {
    /// Only events of this time or later.
    pub since: Option<UnixNanos>,
    /// At most so many, newest first.
    pub limit: usize,
}
