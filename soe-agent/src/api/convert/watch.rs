//! Events and what a watcher sees.

use super::{WireError, pb, required, rescan, tracking};
use crate::api::types::{Event, LoadSample, WatchEvent, WatchItem};

impl From<Event> for pb::Event {
    fn from(e: Event) -> Self {
        Self {
            id: e.id,
            source: e.source,
            r#type: e.kind,
            subject: e.subject,
            time_unix_ns: e.time,
            expected_at_unix_ns: e.expected_at,
            volumes: e.volumes,
            data_json: e.data.map(|d| d.to_string()),
        }
    }
}

impl TryFrom<pb::Event> for Event {
    type Error = WireError;

    fn try_from(e: pb::Event) -> Result<Self, WireError> {
        let data = e
            .data_json
            .map(|text| {
                serde_json::from_str(&text).map_err(|_| WireError::Unknown {
                    field: "data_json",
                    value: text,
                })
            })
            .transpose()?;
        Ok(Self {
            id: e.id,
            source: e.source,
            kind: e.r#type,
            subject: e.subject,
            time: e.time_unix_ns,
            expected_at: e.expected_at_unix_ns,
            volumes: e.volumes,
            data,
        })
    }
}

impl From<LoadSample> for pb::LoadSample {
    fn from(s: LoadSample) -> Self {
        let LoadSample {
            volume,
            interval_ms,
            read_ops,
            write_ops,
            read_bytes,
            write_bytes,
            p99_latency_us,
        } = s;
        Self {
            volume,
            interval_ms,
            read_ops,
            write_ops,
            read_bytes,
            write_bytes,
            p99_latency_us,
        }
    }
}

impl From<pb::LoadSample> for LoadSample {
    fn from(s: pb::LoadSample) -> Self {
        let pb::LoadSample {
            volume,
            interval_ms,
            read_ops,
            write_ops,
            read_bytes,
            write_bytes,
            p99_latency_us,
        } = s;
        Self {
            volume,
            interval_ms,
            read_ops,
            write_ops,
            read_bytes,
            write_bytes,
            p99_latency_us,
        }
    }
}

impl From<WatchItem> for pb::WatchItem {
    fn from(item: WatchItem) -> Self {
        use pb::watch_item::What;
        let what = match item.event {
            WatchEvent::Load(sample) => What::Load(sample.into()),
            WatchEvent::Layer(layer) => What::Layer((*layer).into()),
            WatchEvent::Decision { volume, decision } => What::Decision(pb::VolumeDecision {
                volume,
                decision: Some(decision.into()),
            }),
            WatchEvent::Staging(report) => What::Staging(report.into()),
            WatchEvent::Published { published } => What::Event((*published).into()),
            WatchEvent::Tracking {
                volume,
                tracking: state,
                reason,
            } => What::Tracking(pb::TrackingChange {
                volume,
                tracking: tracking::to_pb(state),
                reason: rescan::to_pb_or_unspecified(reason),
            }),
            WatchEvent::Missed { items } => What::Missed(items),
        };
        Self {
            at_unix_ns: item.at,
            what: Some(what),
        }
    }
}

impl TryFrom<pb::WatchItem> for WatchItem {
    type Error = WireError;

    fn try_from(item: pb::WatchItem) -> Result<Self, WireError> {
        use pb::watch_item::What;
        let event = match required(item.what, "what")? {
            What::Load(sample) => WatchEvent::Load(sample.into()),
            What::Layer(layer) => WatchEvent::Layer(Box::new(layer.try_into()?)),
            What::Decision(d) => WatchEvent::Decision {
                volume: d.volume,
                decision: required(d.decision, "decision")?.into(),
            },
            What::Staging(report) => WatchEvent::Staging(report.try_into()?),
            What::Event(event) => WatchEvent::Published {
                published: Box::new(event.try_into()?),
            },
            What::Tracking(change) => WatchEvent::Tracking {
                volume: change.volume,
                tracking: tracking::required(change.tracking)?,
                reason: rescan::from_pb(change.reason)?,
            },
            What::Missed(items) => WatchEvent::Missed { items },
        };
        Ok(Self {
            at: item.at_unix_ns,
            event,
        })
    }
}
