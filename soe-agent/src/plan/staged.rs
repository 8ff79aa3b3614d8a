//! Staging as the simulation sees it: what is staged, what invalidates it, what is used of it.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::simulate::{Sink, TraceAccess};
use crate::model::VolumeName;
use crate::seam::{ByteRange, UnixNanos};
use crate::stage::chosen::Chosen;
use crate::stage::heat::{BurstHeat, BurstHeatConfig};
use crate::stage::score::Access;

/// A row of `staged`: one range, from when to when it was staged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StagedRow {
    /// The volume.
    pub volume: VolumeName,
    /// When its copy was complete.
    pub at: UnixNanos,
    /// The range.
    pub range: ByteRange,
    /// Its score when it was chosen.
    pub score: f64,
    /// When it was overwritten or dropped; `None` if it was still staged at the end.
    pub evicted_at: Option<UnixNanos>,
}

/// What staging was good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StagingStatistics {
    /// Bytes copied.
    pub staged_bytes: u64,
    /// Bytes of them that were read at least once while staged.
    pub used_bytes: u64,
    /// Bytes of them that were overwritten before they were read.
    pub invalidated_bytes: u64,
    /// Units read in all, from the recorded IO.
    pub read_units: u64,
    /// Units read that were staged.
    pub hit_units: u64,
}

struct Staged {
    at: UnixNanos,
    range: ByteRange,
    score: f64,
    used: bool,
}

struct VolumeStaging {
    heat: BurstHeat,
    /// What was chosen for the last burst, copied or not.
    chosen: Option<Chosen>,
    /// What is staged, by offset; ranges are one unit long and aligned to it.
    staged: BTreeMap<u64, Staged>,
}

/// The staged ranges of all volumes.
pub(super) struct StagedSet {
    config: BurstHeatConfig,
    volumes: HashMap<VolumeName, VolumeStaging>,
    statistics: StagingStatistics,
}

impl StagedSet {
    pub(super) fn new(config: BurstHeatConfig) -> Self {
        Self {
            config,
            volumes: HashMap::new(),
            statistics: StagingStatistics::default(),
        }
    }

    pub(super) fn statistics(&self) -> StagingStatistics {
        self.statistics
    }

    /// Takes in one recorded IO.
    pub(super) fn access(&mut self, access: &TraceAccess, sink: &mut dyn Sink) {
        let statistics = &mut self.statistics;
        let volume = volume(&mut self.volumes, self.config, &access.volume);
        let unit = u64::from(volume.heat.unit_bytes());
        let first = access.range.offset / unit * unit;
        let touched: Vec<u64> = volume
            .staged
            .range(first..access.range.end())
            .map(|(offset, _)| *offset)
            .collect();
        if let Some(chosen) = &mut volume.chosen {
            match access.access {
                Access::Read => chosen.read(access.range, access.range.len as f64),
                Access::Write => chosen.overwritten(access.range),
            }
        }
        match access.access {
            Access::Read => {
                let last = access.range.end().saturating_sub(1) / unit;
                statistics.read_units += last - access.range.offset / unit + 1;
                for offset in touched {
                    let Some(staged) = volume.staged.get_mut(&offset) else {
                        continue;
                    };
                    if staged.at <= access.at {
                        statistics.hit_units += 1;
                        if !staged.used {
                            staged.used = true;
                            statistics.used_bytes += staged.range.len;
                        }
                    }
                }
            }
            Access::Write => {
                for offset in touched {
                    if let Some(staged) = volume.staged.remove(&offset) {
                        if !staged.used {
                            statistics.invalidated_bytes += staged.range.len;
                        }
                        sink.staged(&row(&access.volume, &staged, Some(access.at)));
                    }
                }
            }
        }
        volume
            .heat
            .record(access.at, access.access, access.range, 1.0);
    }

    /// Chooses the best ranges of `name` at `now`, to be judged; nothing is copied.
    pub(super) fn choose(&mut self, name: &VolumeName, now: UnixNanos, budget: u64) {
        let volume = volume(&mut self.volumes, self.config, name);
        volume.heat.set_budget(budget);
        let ranked = volume.heat.rank(now, budget, u64::MAX);
        volume.chosen = Some(Chosen::new(ranked.iter().map(|r| r.range)));
    }

    /// A burst of `name` has begun or ended: by that the choice learns.
    pub(super) fn burst(&mut self, name: &VolumeName, now: UnixNanos, on: bool) {
        let volume = volume(&mut self.volumes, self.config, name);
        match on {
            true => {
                volume.heat.burst_began(now);
                if let Some(chosen) = &mut volume.chosen {
                    chosen.burst_began();
                }
            }
            false => volume.heat.burst_ended(now),
        }
    }

    /// Bytes that were chosen last, and bytes of them that were read since.
    pub(super) fn judge(&mut self, name: &VolumeName) -> Option<(u64, u64)> {
        let chosen = self.volumes.get_mut(name)?.chosen.take()?;
        Some(chosen.score())
    }

    /// Stages the best ranges of `name` from `now` on; returns the bytes to copy.
    pub(super) fn stage(
        &mut self,
        name: &VolumeName,
        now: UnixNanos,
        budget: u64,
        rate: f64,
        sink: &mut dyn Sink,
    ) -> u64 {
        let volume = volume(&mut self.volumes, self.config, name);
        // The recorded IO does not say how large the volume is.
        let ranked = volume.heat.rank(now, budget, u64::MAX);
        let mut before = std::mem::take(&mut volume.staged);
        let mut copied = 0u64;
        for best in ranked {
            let offset = best.range.offset;
            let staged = match before.remove(&offset) {
                Some(kept) => Staged {
                    score: best.score,
                    ..kept
                },
                None => {
                    copied += best.range.len;
                    Staged {
                        at: now.saturating_add((copied as f64 / rate.max(1.0) * 1e9) as i64),
                        range: best.range,
                        score: best.score,
                        used: false,
                    }
                }
            };
            volume.staged.insert(offset, staged);
        }
        for staged in before.values() {
            sink.staged(&row(name, staged, Some(now)));
        }
        self.statistics.staged_bytes += copied;
        copied
    }

    /// Drops what is not copied yet at `now`.
    pub(super) fn cancel(&mut self, name: &VolumeName, now: UnixNanos) {
        if let Some(volume) = self.volumes.get_mut(name) {
            let dropped: u64 = volume
                .staged
                .values()
                .filter(|s| s.at > now)
                .map(|s| s.range.len)
                .sum();
            volume.staged.retain(|_, s| s.at <= now);
            self.statistics.staged_bytes -= dropped;
        }
    }

    /// Reports what is still staged.
    pub(super) fn finish(&mut self, sink: &mut dyn Sink) {
        let mut names: Vec<&VolumeName> = self.volumes.keys().collect();
        names.sort();
        for name in names {
            for staged in self.volumes[name].staged.values() {
                sink.staged(&row(name, staged, None));
            }
        }
    }
}

fn volume<'a>(
    volumes: &'a mut HashMap<VolumeName, VolumeStaging>,
    config: BurstHeatConfig,
    name: &VolumeName,
) -> &'a mut VolumeStaging {
    volumes
        .entry(name.clone())
        .or_insert_with(|| VolumeStaging {
            heat: BurstHeat::new(config),
            chosen: None,
            staged: BTreeMap::new(),
        })
}

fn row(volume: &VolumeName, staged: &Staged, evicted_at: Option<UnixNanos>) -> StagedRow {
    StagedRow {
        volume: volume.clone(),
        at: staged.at,
        range: staged.range,
        score: staged.score,
        evicted_at,
    }
}
