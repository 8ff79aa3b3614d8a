//! Volumes, staging, recordings.

use super::{WireError, pb, required, tracking};
use crate::api::types::{StageReport, StagingStatus, TraceReport, VolumeInfo};

impl From<VolumeInfo> for pb::VolumeInfo {
    fn from(v: VolumeInfo) -> Self {
        Self {
            volume: v.volume,
            device_id: v.device_id,
            kind: v.kind,
            size_bytes: v.size_bytes,
            aliases: v.aliases,
            members: v.members,
            mounts: v.mounts,
            leaf: v.leaf,
            tracked: v.tracked,
            tracking: tracking::to_pb_or_unspecified(v.tracking),
            group_name: v.group,
            untrackable: v.untrackable,
        }
    }
}

impl TryFrom<pb::VolumeInfo> for VolumeInfo {
    type Error = WireError;

    fn try_from(v: pb::VolumeInfo) -> Result<Self, WireError> {
        Ok(Self {
            volume: v.volume,
            device_id: v.device_id,
            kind: v.kind,
            size_bytes: v.size_bytes,
            aliases: v.aliases,
            members: v.members,
            mounts: v.mounts,
            leaf: v.leaf,
            tracked: v.tracked,
            tracking: tracking::from_pb(v.tracking)?,
            group: v.group_name,
            untrackable: v.untrackable,
        })
    }
}

impl From<StagingStatus> for pb::StagingStatus {
    fn from(s: StagingStatus) -> Self {
        let StagingStatus {
            budget_bytes,
            staged_bytes,
            valid_bytes,
            used_bytes,
            invalidated_bytes,
            hit_ratio,
            precision,
            switched_off,
        } = s;
        Self {
            budget_bytes,
            staged_bytes,
            valid_bytes,
            used_bytes,
            invalidated_bytes,
            hit_ratio,
            precision,
            switched_off,
        }
    }
}

impl From<pb::StagingStatus> for StagingStatus {
    fn from(s: pb::StagingStatus) -> Self {
        let pb::StagingStatus {
            budget_bytes,
            staged_bytes,
            valid_bytes,
            used_bytes,
            invalidated_bytes,
            hit_ratio,
            precision,
            switched_off,
        } = s;
        Self {
            budget_bytes,
            staged_bytes,
            valid_bytes,
            used_bytes,
            invalidated_bytes,
            hit_ratio,
            precision,
            switched_off,
        }
    }
}

impl From<StageReport> for pb::StageReport {
    fn from(r: StageReport) -> Self {
        Self {
            volume: r.volume,
            status: Some(r.status.into()),
        }
    }
}

impl TryFrom<pb::StageReport> for StageReport {
    type Error = WireError;

    fn try_from(r: pb::StageReport) -> Result<Self, WireError> {
        Ok(Self {
            volume: r.volume,
            status: required(r.status, "status")?.into(),
        })
    }
}

impl From<TraceReport> for pb::TraceRecordResponse {
    fn from(r: TraceReport) -> Self {
        Self {
            volume: r.volume,
            records: r.records,
            dropped: r.dropped,
            sampled_out: r.sampled_out,
            window: Some(r.window.into()),
            files: r.files,
        }
    }
}

impl TryFrom<pb::TraceRecordResponse> for TraceReport {
    type Error = WireError;

    fn try_from(r: pb::TraceRecordResponse) -> Result<Self, WireError> {
        Ok(Self {
            volume: r.volume,
            records: r.records,
            dropped: r.dropped,
            sampled_out: r.sampled_out,
            window: required(r.window, "window")?.into(),
            files: r.files,
        })
    }
}
