//! What metrics tell of the agent's own state, looked up every few seconds.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::agent::{Agent, Entry, lock};
use crate::layer::{LayerError, LayerKind};
use crate::model::{Forecaster, VolumeName};
use crate::seam::{ChangeMap, Clock, Misses, UnixNanos};

/// Rows of the history that were told already.
#[derive(Default)]
pub(super) struct Told {
    written: AtomicU64,
    dropped: AtomicU64,
}

/// Brings the metrics up to date that nothing else keeps.
pub(super) fn publish(agent: &Agent, told: &Told) {
    let metrics = &agent.metrics;
    let entries = agent.all_entries();
    metrics.volumes_tracked.set([], entries.len() as f64);
    let mut misses = Misses::default();
    for entry in &entries {
        match entry.map.reading() {
            Ok(reading) => {
                misses.queue += reading.misses.queue;
                misses.complete += reading.misses.complete;
                misses.stash += reading.misses.stash;
            }
            Err(error) => tracing::debug!(volume = entry.name, %error, "no counters"),
        }
        volume(agent, entry);
    }
    for (side, total) in [
        ("queue", misses.queue),
        ("complete", misses.complete),
        ("stash", misses.stash),
    ] {
        metrics.observe_misses.set_total([side], total);
    }
    let rows = agent.history.stats();
    for (result, total, told) in [
        ("written", rows.rows_written, &told.written),
        ("dropped", rows.rows_dropped, &told.dropped),
    ] {
        let before = told.swap(total, Ordering::Relaxed);
        metrics
            .history_rows
            .with([result])
            .inc_by(total.saturating_sub(before));
    }
    let config = agent.config();
    metrics
        .history_size
        .set([], bytes_under(&config.history_dir()) as f64);
    metrics
        .store_size
        .set([], bytes_under(&config.store_dir()) as f64);
    let groups: Vec<(String, Vec<String>)> = lock(&agent.state)
        .groups
        .iter()
        .map(|(name, group)| (name.clone(), group.volumes.clone()))
        .collect();
    let now = agent.clock.now();
    for (group, volumes) in groups {
        for name in volumes {
            if let Err(error) = layers(agent, &group, &name, now) {
                tracing::debug!(group, volume = name, %error, "no layers to count");
            }
        }
    }
}

fn volume(agent: &Agent, entry: &Entry) {
    let metrics = &agent.metrics;
    let name = entry.name.as_str();
    metrics
        .throttled
        .set_total([name], entry.pace.waited().as_secs());
    let serving = lock(&agent.mind).mixture.serving(&VolumeName::from(name));
    for (member, loss) in serving.into_iter().flat_map(|s| s.losses) {
        if let Some(loss) = loss {
            metrics.quantile_loss.set([name, &member.to_string()], loss);
        }
    }
    match &agent.area {
        None => {}
        Some(area) => match area.status(&entry.map) {
            Ok(stats) => {
                metrics.staged.set([name], stats.staged_bytes as f64);
                metrics.staged_valid.set([name], stats.valid_bytes as f64);
                metrics.staging_lookups.set_total([name, "hit"], stats.hits);
                metrics
                    .staging_lookups
                    .set_total([name, "miss"], stats.reads.saturating_sub(stats.hits));
                metrics
                    .staging_invalidated
                    .set_total([name], stats.invalidated_bytes);
            }
            Err(error) => {
                tracing::debug!(volume = name, %error, "what is staged is not known")
            }
        },
    }
}

fn layers(agent: &Agent, group: &str, name: &str, now: UnixNanos) -> Result<(), LayerError> {
    let layers = match agent.store.layers(group, name) {
        Err(LayerError::NotFound { .. }) => Vec::new(),
        layers => layers?,
    };
    let metrics = &agent.metrics;
    let baselines = layers
        .iter()
        .filter(|l| l.layer().kind == LayerKind::Baseline)
        .count();
    metrics.layers.set([name, "baseline"], baselines as f64);
    metrics
        .layers
        .set([name, "differential"], (layers.len() - baselines) as f64);
    let Some(newest) = layers.last() else {
        return Ok(());
    };
    let age = now.saturating_sub(newest.manifest.cut_at).max(0);
    metrics.layer_age.set([name], age as f64 / 1e9);
    if let Some(entry) = agent.entry(name)
        && entry.map.generation() == newest.layer().generation
        && let Ok(changed) = entry.map.changed_since(newest.layer().since_epoch)
    {
        let unit = u64::from(entry.map.block_size());
        let blocks: u64 = changed.iter().map(|r| r.len.div_ceil(unit)).sum();
        metrics.changed_blocks_pending.set([name], blocks as f64);
    }
    Ok(())
}

/// Bytes of the files under `folder`; what vanishes meanwhile counts as nothing.
fn bytes_under(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => bytes_under(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_under_a_folder_are_those_of_all_its_files() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("in")).unwrap();
        std::fs::write(folder.path().join("a"), [0; 10]).unwrap();
        std::fs::write(folder.path().join("in/b"), [0; 7]).unwrap();
        assert_eq!(bytes_under(folder.path()), 17);
        assert_eq!(bytes_under(&folder.path().join("absent")), 0);
    }
}
