//! Groups.

use super::{WireError, criticality, pb, required, rescan, tracking, uuid};
use crate::api::types::{
    Criticality, GroupSpec, GroupStatus, GroupUpdate, HostMetadata, HostUpdate, VolumeStatus,
};

impl From<GroupSpec> for pb::CreateSnapshotGroupRequest {
    fn from(s: GroupSpec) -> Self {
        Self {
            group_name: s.name,
            volumes: s.volumes,
            prediction_enabled: s.prediction_enabled,
            rpo_s: s.rpo_s,
            max_pause_us: s.max_pause_us,
            p99_target_us: s.p99_target_us,
            app: s.app,
            criticality: criticality::to_pb(s.criticality),
        }
    }
}

impl TryFrom<pb::CreateSnapshotGroupRequest> for GroupSpec {
    type Error = WireError;

    fn try_from(r: pb::CreateSnapshotGroupRequest) -> Result<Self, WireError> {
        Ok(Self {
            name: r.group_name,
            volumes: r.volumes,
            prediction_enabled: r.prediction_enabled,
            rpo_s: r.rpo_s,
            max_pause_us: r.max_pause_us,
            p99_target_us: r.p99_target_us,
            app: r.app,
            criticality: criticality::from_pb(r.criticality)?.unwrap_or(Criticality::Normal),
        })
    }
}

impl From<GroupUpdate> for pb::UpdateSnapshotGroupRequest {
    fn from(u: GroupUpdate) -> Self {
        Self {
            group_name: u.name,
            prediction_enabled: u.prediction_enabled,
            rpo_s: u.rpo_s,
            max_pause_us: u.max_pause_us,
            p99_target_us: u.p99_target_us,
            app: u.app,
            criticality: criticality::to_pb_or_unspecified(u.criticality),
            add_volumes: u.add_volumes,
            remove_volumes: u.remove_volumes,
        }
    }
}

impl TryFrom<pb::UpdateSnapshotGroupRequest> for GroupUpdate {
    type Error = WireError;

    fn try_from(r: pb::UpdateSnapshotGroupRequest) -> Result<Self, WireError> {
        Ok(Self {
            name: r.group_name,
            prediction_enabled: r.prediction_enabled,
            rpo_s: r.rpo_s,
            max_pause_us: r.max_pause_us,
            p99_target_us: r.p99_target_us,
            app: r.app,
            criticality: criticality::from_pb(r.criticality)?,
            add_volumes: r.add_volumes,
            remove_volumes: r.remove_volumes,
        })
    }
}

impl From<HostUpdate> for pb::SetHostMetadataRequest {
    fn from(u: HostUpdate) -> Self {
        Self {
            group_name: u.group,
            host: u.host,
            app: u.app,
            criticality: criticality::to_pb_or_unspecified(u.criticality),
            p99_target_us: u.p99_target_us,
            rpo_s: u.rpo_s,
        }
    }
}

impl TryFrom<pb::SetHostMetadataRequest> for HostUpdate {
    type Error = WireError;

    fn try_from(r: pb::SetHostMetadataRequest) -> Result<Self, WireError> {
        Ok(Self {
            group: r.group_name,
            host: r.host,
            app: r.app,
            criticality: criticality::from_pb(r.criticality)?,
            p99_target_us: r.p99_target_us,
            rpo_s: r.rpo_s,
        })
    }
}

impl From<HostMetadata> for pb::HostMetadata {
    fn from(h: HostMetadata) -> Self {
        Self {
            host: h.host,
            app: h.app,
            criticality: criticality::to_pb(h.criticality),
            p99_target_us: h.p99_target_us,
            rpo_s: h.rpo_s,
        }
    }
}

impl TryFrom<pb::HostMetadata> for HostMetadata {
    type Error = WireError;

    fn try_from(h: pb::HostMetadata) -> Result<Self, WireError> {
        Ok(Self {
            host: h.host,
            app: h.app,
            criticality: criticality::required(h.criticality)?,
            p99_target_us: h.p99_target_us,
            rpo_s: h.rpo_s,
        })
    }
}

impl From<GroupStatus> for pb::GroupStatus {
    fn from(g: GroupStatus) -> Self {
        Self {
            group_name: g.group,
            prediction_enabled: g.prediction_enabled,
            volumes: g.volumes.into_iter().map(Into::into).collect(),
            rpo_s: g.rpo_s,
            max_pause_us: g.max_pause_us,
            p99_target_us: g.p99_target_us,
            app: g.app,
            criticality: criticality::to_pb(g.criticality),
            created_at_unix_ns: g.created_at,
            missed_pause_budgets: g.missed_pause_budgets,
            last_error: g.last_error,
            hosts: g.hosts.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<pb::GroupStatus> for GroupStatus {
    type Error = WireError;

    fn try_from(g: pb::GroupStatus) -> Result<Self, WireError> {
        Ok(Self {
            group: g.group_name,
            prediction_enabled: g.prediction_enabled,
            rpo_s: g.rpo_s,
            max_pause_us: g.max_pause_us,
            p99_target_us: g.p99_target_us,
            app: g.app,
            criticality: criticality::required(g.criticality)?,
            created_at: g.created_at_unix_ns,
            missed_pause_budgets: g.missed_pause_budgets,
            last_error: g.last_error,
            hosts: g
                .hosts
                .into_iter()
                .map(TryInto::try_into)
                .collect::<Result<_, _>>()?,
            volumes: g
                .volumes
                .into_iter()
                .map(TryInto::try_into)
                .collect::<Result<_, _>>()?,
        })
    }
}

impl From<VolumeStatus> for pb::VolumeStatus {
    fn from(v: VolumeStatus) -> Self {
        Self {
            volume: v.volume,
            device_id: v.device_id,
            size_bytes: v.size_bytes,
            generation: v.generation.map(|g| g.to_string()),
            epoch: v.epoch,
            tracking: tracking::to_pb(v.tracking),
            rescan_reason: rescan::to_pb_or_unspecified(v.rescan_reason),
            layers: v.layers,
            baseline_layers: v.baseline_layers,
            differential_layers: v.differential_layers,
            last_layer: v.last_layer.map(Into::into),
            changed_blocks_pending: v.changed_blocks_pending,
            rpo_s: v.rpo_s,
            rpo_age_s: v.rpo_age_s,
            staging: Some(v.staging.into()),
            predicted: Some(v.predicted.into()),
            last_decision: v.last_decision.map(Into::into),
            missing: v.missing,
        }
    }
}

impl TryFrom<pb::VolumeStatus> for VolumeStatus {
    type Error = WireError;

    fn try_from(v: pb::VolumeStatus) -> Result<Self, WireError> {
        Ok(Self {
            volume: v.volume,
            device_id: v.device_id,
            size_bytes: v.size_bytes,
            generation: uuid(v.generation, "generation")?,
            epoch: v.epoch,
            tracking: tracking::required(v.tracking)?,
            rescan_reason: rescan::from_pb(v.rescan_reason)?,
            layers: v.layers,
            baseline_layers: v.baseline_layers,
            differential_layers: v.differential_layers,
            last_layer: v.last_layer.map(TryInto::try_into).transpose()?,
            changed_blocks_pending: v.changed_blocks_pending,
            rpo_s: v.rpo_s,
            rpo_age_s: v.rpo_age_s,
            staging: required(v.staging, "staging")?.into(),
            predicted: required(v.predicted, "predicted")?.into(),
            last_decision: v.last_decision.map(Into::into),
            missing: v.missing,
        })
    }
}
