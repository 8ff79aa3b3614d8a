//! Layers, verification, restore.

use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::{WireError, kind, level, method, pb, phase, required, rescan, uuid};
use crate::api::types::{
    LayerDetail, LayerInfo, RestorePoint, RestoreProgress, RestoreRequest, VerifyEvent,
};

impl From<LayerInfo> for pb::LayerInfo {
    fn from(l: LayerInfo) -> Self {
        Self {
            id: l.id,
            group_name: l.group,
            volume: l.volume,
            sequence: l.sequence,
            kind: kind::to_pb(l.kind),
            level: level::to_pb(l.level),
            method: method::to_pb(l.method),
            pause_us: l.pause_us,
            skew_us: l.skew_us,
            changed_blocks: l.changed_blocks,
            block_size_bytes: l.block_size_bytes,
            bytes_read: l.bytes_read,
            bytes_stored: l.bytes_stored,
            started_at_unix_ns: l.started_at,
            cut_at_unix_ns: l.cut_at,
            finished_at_unix_ns: l.finished_at,
            generation: l.generation.map(|g| g.to_string()),
            epoch: l.epoch,
            rescan_reason: rescan::to_pb_or_unspecified(l.rescan_reason),
            volume_bytes: l.volume_bytes,
            state_root: l.state_root,
        }
    }
}

impl TryFrom<pb::LayerInfo> for LayerInfo {
    type Error = WireError;

    fn try_from(l: pb::LayerInfo) -> Result<Self, WireError> {
        Ok(Self {
            id: l.id,
            group: l.group_name,
            volume: l.volume,
            sequence: l.sequence,
            kind: kind::required(l.kind)?,
            level: level::required(l.level)?,
            method: method::required(l.method)?,
            pause_us: l.pause_us,
            skew_us: l.skew_us,
            changed_blocks: l.changed_blocks,
            block_size_bytes: l.block_size_bytes,
            bytes_read: l.bytes_read,
            bytes_stored: l.bytes_stored,
            started_at: l.started_at_unix_ns,
            cut_at: l.cut_at_unix_ns,
            finished_at: l.finished_at_unix_ns,
            generation: uuid(l.generation, "generation")?,
            epoch: l.epoch,
            rescan_reason: rescan::from_pb(l.rescan_reason)?,
            volume_bytes: l.volume_bytes,
            state_root: l.state_root,
        })
    }
}

impl From<LayerDetail> for pb::LayerDetail {
    fn from(d: LayerDetail) -> Self {
        Self {
            layer: Some(d.layer.into()),
            parent: d.parent,
            delta_root: d.delta_root,
            zero_blocks: d.zero_blocks,
            compression: d.compression,
            files: d.files,
        }
    }
}

impl TryFrom<pb::LayerDetail> for LayerDetail {
    type Error = WireError;

    fn try_from(d: pb::LayerDetail) -> Result<Self, WireError> {
        Ok(Self {
            layer: required(d.layer, "layer")?.try_into()?,
            parent: d.parent,
            delta_root: d.delta_root,
            zero_blocks: d.zero_blocks,
            compression: d.compression,
            files: d.files,
        })
    }
}

impl From<VerifyEvent> for pb::VerifyEvent {
    fn from(event: VerifyEvent) -> Self {
        use pb::verify_event::Event as Wire;
        let event = match event {
            VerifyEvent::Progress {
                layer,
                bytes_checked,
                bytes_total,
            } => Wire::Progress(pb::VerifyProgress {
                layer,
                bytes_checked,
                bytes_total,
            }),
            VerifyEvent::Problem {
                layer,
                volume,
                what,
            } => Wire::Problem(pb::VerifyProblem {
                layer,
                volume,
                what,
            }),
            VerifyEvent::Summary {
                layers,
                blocks,
                bytes,
                problems,
            } => Wire::Summary(pb::VerifySummary {
                layers,
                blocks,
                bytes,
                problems,
            }),
        };
        Self { event: Some(event) }
    }
}

impl TryFrom<pb::VerifyEvent> for VerifyEvent {
    type Error = WireError;

    fn try_from(event: pb::VerifyEvent) -> Result<Self, WireError> {
        use pb::verify_event::Event as Wire;
        Ok(match required(event.event, "event")? {
            Wire::Progress(p) => Self::Progress {
                layer: p.layer,
                bytes_checked: p.bytes_checked,
                bytes_total: p.bytes_total,
            },
            Wire::Problem(p) => Self::Problem {
                layer: p.layer,
                volume: p.volume,
                what: p.what,
            },
            Wire::Summary(s) => Self::Summary {
                layers: s.layers,
                blocks: s.blocks,
                bytes: s.bytes,
                problems: s.problems,
            },
        })
    }
}

impl From<RestoreRequest> for pb::RestoreRequest {
    fn from(r: RestoreRequest) -> Self {
        use pb::restore_request::Point;
        Self {
            group_name: r.group,
            volume: r.volume,
            target: String::from_utf8_lossy(&r.target.into_os_string().into_vec()).into_owned(),
            differential: r.differential,
            point: match r.point {
                RestorePoint::Latest => None,
                RestorePoint::Layer(id) => Some(Point::Layer(id)),
                RestorePoint::At(at) => Some(Point::AtUnixNs(at)),
            },
        }
    }
}

impl From<pb::RestoreRequest> for RestoreRequest {
    fn from(r: pb::RestoreRequest) -> Self {
        use pb::restore_request::Point;
        Self {
            group: r.group_name,
            volume: r.volume,
            point: match r.point {
                None => RestorePoint::Latest,
                Some(Point::Layer(id)) => RestorePoint::Layer(id),
                Some(Point::AtUnixNs(at)) => RestorePoint::At(at),
            },
            target: PathBuf::from(r.target),
            differential: r.differential,
        }
    }
}

impl From<RestoreProgress> for pb::RestoreProgress {
    fn from(p: RestoreProgress) -> Self {
        Self {
            phase: phase::to_pb(p.phase),
            layer: p.layer,
            bytes_total: p.bytes_total,
            bytes_done: p.bytes_done,
            bytes_written: p.bytes_written,
            bytes_from_staging: p.bytes_from_staging,
            bytes_equal: p.bytes_equal,
            bytes_zeroed: p.bytes_zeroed,
        }
    }
}

impl TryFrom<pb::RestoreProgress> for RestoreProgress {
    type Error = WireError;

    fn try_from(p: pb::RestoreProgress) -> Result<Self, WireError> {
        Ok(Self {
            phase: phase::required(p.phase)?,
            layer: p.layer,
            bytes_total: p.bytes_total,
            bytes_done: p.bytes_done,
            bytes_written: p.bytes_written,
            bytes_from_staging: p.bytes_from_staging,
            bytes_equal: p.bytes_equal,
            bytes_zeroed: p.bytes_zeroed,
        })
    }
}
