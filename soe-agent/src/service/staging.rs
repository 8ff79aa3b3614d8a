//! Staging: what is copied ahead of a burst, and what the burst then wanted of it.

use std::sync::atomic::Ordering;

use super::agent::{Agent, Entry, lock};
use crate::api::types::{self, WatchEvent};
use crate::io::{ReadOptions, VolumeSpec, open_reader};
use crate::model::VolumeName;
use crate::seam::{ByteRange, ChangeMap, Clock, UnixNanos};
use crate::stage::chosen::Chosen;
use crate::stage::score::ScoredRange;
use crate::window::StagingRow;

impl Agent {
    /// Tells the staging area what was read on the origin, and keeps what was wanted of it.
    pub(super) fn note_reads(&self, entry: &Entry, now: UnixNanos, read: &[(ByteRange, u64)]) {
        let Some(area) = &self.area else {
            return;
        };
        let used = match area.note_reads(&entry.map, read) {
            Ok(used) => used,
            Err(error) => {
                return tracing::warn!(volume = entry.name, %error, "what staging was good for is not known");
            }
        };
        let row = |(range, covered): &(ByteRange, u64)| StagingRow {
            ts: now,
            volume: entry.name.as_str().into(),
            action: "used".into(),
            offset: range.offset,
            length: *covered,
            score: None,
            evicted: None,
        };
        let rows: Vec<StagingRow> = used.iter().map(row).collect();
        if let Err(error) = self.history.append(&rows) {
            tracing::warn!(%error, "what was used of the staged blocks could not be kept in the history");
        }
    }

    /// How often staging of a volume was cancelled so far.
    pub(super) fn staging_cancels(&self, volume: &str) -> u64 {
        self.entry(volume)
            .map_or(0, |entry| entry.staging_cancels.load(Ordering::SeqCst))
    }

    /// Chooses the blocks most likely to be read, and remembers them: by them staging is judged.
    pub(super) fn choose(&self, volume: &str, budget: u64) -> Vec<ScoredRange> {
        let Some(entry) = self.entry(volume) else {
            return Vec::new();
        };
        let mut heat = lock(&entry.heat);
        heat.set_budget(budget);
        let ranked = heat.rank(self.clock.now(), budget, entry.volume.bytes());
        drop(heat);
        let mut chosen = Chosen::new(ranked.iter().map(|r| r.range));
        // It may have begun while they were chosen.
        if lock(&entry.sampling).bursting {
            chosen.burst_began();
        }
        *lock(&entry.chosen) = Some(chosen);
        ranked
    }

    /// The blocks most likely to be read, for a user who asks for them now.
    pub(super) fn ranked(&self, entry: &Entry, budget: u64) -> Vec<ScoredRange> {
        lock(&entry.heat).rank(self.clock.now(), budget, entry.volume.bytes())
    }

    /// Copies the blocks `ranked`, best first, within `budget` bytes, until it was cancelled more than
    /// `cancels` times. Returns the bytes copied.
    pub(super) fn stage(
        &self,
        volume: &str,
        ranked: &[ScoredRange],
        budget: u64,
        cancels: u64,
    ) -> Result<u64, super::ServiceError> {
        let (Some(area), Some(entry)) = (&self.area, self.entry(volume)) else {
            return Ok(0);
        };
        let spec = VolumeSpec {
            path: entry.volume.path.clone(),
            offset: 0,
            len: Some(entry.volume.bytes()),
        };
        let reader = open_reader(&spec, ReadOptions::BACKGROUND)?;
        let ranges: Vec<ByteRange> = ranked.iter().map(|r| r.range).collect();
        let pace = Cancellable {
            entry: &entry,
            cancels,
        };
        let copied = area.stage(&entry.map, &*reader, &ranges, budget, &pace, &*self.clock)?;
        // Only what was copied is told, not what was chosen: it may have been cancelled, or written to.
        let done = self.clock.now();
        let rows: Vec<StagingRow> = ranked
            .iter()
            .filter_map(|ranked| {
                let range = ranked.range;
                let from = copied.partition_point(|block| block.offset < range.offset);
                let within = copied
                    .iter()
                    .skip(from)
                    .take_while(|b| b.offset < range.end());
                let length = within.map(|block| block.len).sum();
                (length > 0).then(|| StagingRow {
                    ts: done,
                    volume: volume.into(),
                    action: "staged".into(),
                    offset: range.offset,
                    length,
                    score: Some(ranked.score),
                    evicted: None,
                })
            })
            .collect();
        if let Err(error) = self.history.append(&rows) {
            tracing::warn!(%error, "what was staged could not be kept in the history");
        }
        if let Ok(report) = self.stage_report(&entry) {
            self.metrics
                .staged
                .set([volume], report.status.staged_bytes as f64);
            self.metrics
                .staged_valid
                .set([volume], report.status.valid_bytes as f64);
            self.tell(WatchEvent::Staging(report));
        }
        Ok(copied.iter().map(|block| block.len).sum())
    }

    /// What is staged of a volume.
    pub(super) fn stage_report(
        &self,
        entry: &Entry,
    ) -> Result<types::StageReport, super::ServiceError> {
        let mut status = types::StagingStatus::default();
        let gate = lock(&self.mind)
            .brain
            .staging_gate(&VolumeName::from(entry.name.as_str()))
            .unwrap_or_default();
        if let Some(area) = &self.area {
            let stats = area.status(&entry.map)?;
            status = types::StagingStatus {
                budget_bytes: area.budget(),
                staged_bytes: stats.staged_bytes,
                valid_bytes: stats.valid_bytes,
                used_bytes: stats.used_bytes,
                invalidated_bytes: stats.invalidated_bytes,
                hit_ratio: (stats.reads > 0).then(|| stats.hits as f64 / stats.reads as f64),
                precision: gate.precision(),
                switched_off: gate.off(),
            };
        }
        Ok(types::StageReport {
            volume: entry.map.volume().to_string(),
            status,
        })
    }
}

/// Holds staging back with the volume's pace, and ends it when it was cancelled.
struct Cancellable<'a> {
    entry: &'a Entry,
    cancels: u64,
}

impl crate::seam::Pace for Cancellable<'_> {
    fn before(&self, bytes: u64) -> std::io::Result<()> {
        if self.entry.staging_cancels.load(Ordering::SeqCst) != self.cancels {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
        self.entry.pace.before(bytes)
    }
}
