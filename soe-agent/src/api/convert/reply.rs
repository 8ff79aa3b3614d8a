//! Plain results to the messages that wrap them.

use super::pb;
use crate::api::types::{Event, GroupStatus, LayerInfo, VolumeInfo};
use crate::seam::ByteRange;

impl From<Vec<GroupStatus>> for pb::ListSnapshotGroupsResponse {
    fn from(groups: Vec<GroupStatus>) -> Self {
        Self {
            groups: groups.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<u64> for pb::DeleteSnapshotGroupResponse {
    fn from(layers_deleted: u64) -> Self {
        Self { layers_deleted }
    }
}

impl From<Vec<LayerInfo>> for pb::CaptureLayerResponse {
    fn from(layers: Vec<LayerInfo>) -> Self {
        Self {
            layers: layers.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<Vec<LayerInfo>> for pb::ListLayersResponse {
    fn from(layers: Vec<LayerInfo>) -> Self {
        Self {
            layers: layers.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<Vec<ByteRange>> for pb::DiffChunk {
    fn from(ranges: Vec<ByteRange>) -> Self {
        Self {
            extents: ranges.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<Vec<VolumeInfo>> for pb::ListVolumesResponse {
    fn from(volumes: Vec<VolumeInfo>) -> Self {
        Self {
            volumes: volumes.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<bool> for pb::PublishEventResponse {
    fn from(stored: bool) -> Self {
        Self { stored }
    }
}

impl From<Vec<Event>> for pb::ListEventsResponse {
    fn from(events: Vec<Event>) -> Self {
        Self {
            events: events.into_iter().map(Into::into).collect(),
        }
    }
}
