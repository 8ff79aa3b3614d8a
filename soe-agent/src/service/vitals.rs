//! What metrics tell of the agent's own state, looked up every few seconds on a thread of its own:
//! counting files may take long where the store is remote.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::agent::{Agent, Entry, lock};
use crate::layer::{GroupManifest, LayerKind};
use crate::model::{Forecaster, Member, VolumeName};
use crate::plan::Event;
use crate::seam::{ChangeMap, Clock, UnixNanos};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(15);

/// What was told, so that what is gone is told no more.
#[derive(Default)]
struct Told {
    rows_written: u64,
    rows_dropped: u64,
    /// Volumes of groups.
    volumes: BTreeSet<String>,
}

/// Brings the metrics up to date that nothing else keeps, until the agent stops.
pub(super) fn keep(agent: &Arc<Agent>) {
    let mut told = Told::default();
    let mut next = agent.clock.monotonic();
    let soon = next + EVERY;
    while !agent.stopping() {
        let now = agent.clock.monotonic();
        if now < next {
            agent
                .clock
                .sleep((next - now).min(Duration::from_millis(100)));
            continue;
        }
        // A volume that was created a moment ago is told soon.
        let first = told.volumes.is_empty() && now < soon;
        next = now + if first { Duration::from_secs(1) } else { EVERY };
        publish(agent, &mut told);
    }
}

fn publish(agent: &Arc<Agent>, told: &mut Told) {
    let metrics = &agent.metrics;
    let entries = agent.all_entries();
    metrics.volumes_tracked.set([], entries.len() as f64);
    for entry in &entries {
        volume(agent, entry);
    }
    let rows = agent.history.stats();
    for (result, total, told) in [
        ("written", rows.rows_written, &mut told.rows_written),
        ("dropped", rows.rows_dropped, &mut told.rows_dropped),
    ] {
        let more = total.saturating_sub(*told);
        *told = total;
        metrics.history_rows.with([result]).inc_by(more);
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
    let mut volumes = BTreeSet::new();
    for (group, names) in groups {
        // A group without layers is not in the store.
        let manifests = agent.store.manifests(&group).unwrap_or_default();
        for name in names {
            layers(agent, &manifests, &name, now);
            volumes.insert(name);
        }
    }
    for gone in told.volumes.difference(&volumes) {
        forget(agent, gone);
    }
    told.volumes = volumes;
}

fn volume(agent: &Agent, entry: &Entry) {
    let metrics = &agent.metrics;
    let name = entry.name.as_str();
    match entry.map.reading() {
        Ok(reading) => {
            for (side, total) in [
                ("queue", reading.misses.queue),
                ("complete", reading.misses.complete),
                ("stash", reading.misses.stash),
            ] {
                metrics.observe_misses.set_total([name, side], total);
            }
        }
        Err(error) => tracing::debug!(volume = name, %error, "no counters"),
    }
    metrics
        .throttled
        .set_total([name], entry.pace.waited().as_secs());
    let serving = lock(&agent.mind).mixture.serving(&VolumeName::from(name));
    for (member, loss) in serving.into_iter().flat_map(|s| s.losses) {
        if let Some(loss) = loss {
            metrics.quantile_loss.set([name, &member.to_string()], loss);
        }
    }
    let Some(area) = &agent.area else {
        return;
    };
    match area.status(&entry.map) {
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
        Err(error) => tracing::debug!(volume = name, %error, "what is staged is not known"),
    }
}

fn layers(agent: &Arc<Agent>, manifests: &[Arc<GroupManifest>], name: &str, now: UnixNanos) {
    let metrics = &agent.metrics;
    let of = || manifests.iter().filter_map(|m| Some((m, m.volume(name)?)));
    let baselines = of()
        .filter(|(_, layer)| layer.kind == LayerKind::Baseline)
        .count();
    metrics.layers.set([name, "baseline"], baselines as f64);
    metrics
        .layers
        .set([name, "differential"], (of().count() - baselines) as f64);
    let newest = of().next_back();
    if let Some((manifest, _)) = newest {
        let age = now.saturating_sub(manifest.cut_at).max(0);
        metrics.layer_age.set([name], age as f64 / 1e9);
    }
    let Some(entry) = agent.entry(name) else {
        return;
    };
    let unit = u64::from(entry.map.block_size());
    let known = newest.filter(|(_, layer)| layer.generation == entry.map.generation());
    let blocks = match known {
        // The next layer reads everything.
        None => entry.map.volume_bytes().div_ceil(unit),
        Some((_, layer)) => match entry.map.changed_since(layer.since_epoch) {
            Ok(changed) => changed.iter().map(|r| r.len.div_ceil(unit)).sum(),
            Err(error) => {
                return tracing::debug!(volume = name, %error, "what changed is not known");
            }
        },
    };
    metrics.changed_blocks_pending.set([name], blocks as f64);
    agent.apply(Event::ChangesCounted {
        volume: name.into(),
        bytes: blocks.saturating_mul(unit),
    });
}

/// Ends the series of a volume that is in no group any more.
fn forget(agent: &Agent, name: &str) {
    let metrics = &agent.metrics;
    metrics.layers.remove([name, "baseline"]);
    metrics.layers.remove([name, "differential"]);
    metrics.layer_age.remove([name]);
    metrics.changed_blocks_pending.remove([name]);
    metrics.staged.remove([name]);
    metrics.staged_valid.remove([name]);
    metrics.tracking_complete.remove([name]);
    for member in Member::ALL {
        metrics.quantile_loss.remove([name, &member.to_string()]);
    }
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
