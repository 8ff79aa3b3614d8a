//! What the surface is told of layers, in its own words.

use crate::api::types::{ConsistencyLevel, CutMethod, LayerDetail, LayerInfo, LayerKind};
use crate::layer::{self, CutLevel, GroupManifest, VolumeLayer};
use crate::window::LayerRow;

/// What the surface calls the kind: a rescan is a differential that had to read everything.
pub fn kind(kind: layer::LayerKind) -> LayerKind {
    match kind {
        layer::LayerKind::Baseline => LayerKind::Baseline,
        layer::LayerKind::Differential | layer::LayerKind::Rescan => LayerKind::Differential,
    }
}

/// A layer as the surface shows it.
pub fn layer_info(manifest: &GroupManifest, layer: &VolumeLayer) -> LayerInfo {
    LayerInfo {
        id: layer.id.to_string(),
        group: manifest.group.clone(),
        volume: layer.volume.clone(),
        sequence: manifest.sequence,
        kind: kind(layer.kind),
        level: match manifest.level {
            CutLevel::Crash => ConsistencyLevel::Crash,
            CutLevel::Filesystem => ConsistencyLevel::Filesystem,
            CutLevel::Application => ConsistencyLevel::Application,
        },
        method: match manifest.method {
            layer::CutMethod::Optimistic => CutMethod::Optimistic,
            layer::CutMethod::Freeze => CutMethod::Freeze,
            layer::CutMethod::Native => CutMethod::Native,
            layer::CutMethod::Suspend => CutMethod::Suspend,
        },
        pause_us: manifest.pause_us,
        skew_us: manifest.skew_us,
        changed_blocks: layer.changed_blocks(),
        block_size_bytes: u64::from(layer.block_size),
        bytes_read: layer.bytes_read,
        bytes_stored: layer.bytes_stored,
        started_at: manifest.started_at,
        cut_at: manifest.cut_at,
        finished_at: manifest.finished_at,
        generation: Some(layer.generation),
        epoch: u64::from(layer.cut_epoch.0),
        rescan_reason: layer.rescan_reason,
        volume_bytes: layer.volume_bytes,
        state_root: Some(layer.state_root.to_string()),
    }
}

/// All that is known of one layer.
pub fn layer_detail(
    manifest: &GroupManifest,
    layer: &VolumeLayer,
    compression: String,
) -> LayerDetail {
    LayerDetail {
        layer: layer_info(manifest, layer),
        parent: layer
            .parent
            .as_ref()
            .map(|parent| format!("{}@{}", parent.state_root, parent.sequence)),
        delta_root: Some(layer.delta_root.to_string()),
        zero_blocks: layer.hole_blocks,
        compression,
        files: layer
            .segments
            .iter()
            .chain([&layer.index])
            .map(|file| file.file.clone())
            .collect(),
    }
}

/// A layer as a row of the history.
pub fn layer_row(manifest: &GroupManifest, layer: &VolumeLayer) -> LayerRow {
    let info = layer_info(manifest, layer);
    LayerRow {
        ts: info.finished_at,
        started: info.started_at,
        group: info.group.into(),
        volume: info.volume.into(),
        layer: info.id,
        sequence: info.sequence,
        kind: info.kind.to_string(),
        level: info.level.to_string(),
        method: info.method.to_string(),
        generation: layer.generation.to_string(),
        epoch: info.epoch,
        pause_us: info.pause_us,
        changed_blocks: info.changed_blocks,
        bytes_read: info.bytes_read,
        bytes_stored: info.bytes_stored,
        error: None,
    }
}
