//! What a restarted agent learns from its own history before it decides anything.

use super::agent::{Agent, lock};
use crate::history::{HistoryReader, Query};
use crate::model::{Forecaster, LoadBin, VolumeName};
use crate::plan::Event;
use crate::seam::Clock;
use crate::window::{RegionHeatRow, floor_to};

impl Agent {
    /// Feeds the forecasters with the history of before. Eight seasons, because the start waits for it:
    /// what reaches further back (clock times of four weeks) fills again as time goes on.
    pub(super) fn prime(&self) {
        let names: Vec<String> = lock(&self.entries).keys().cloned().collect();
        if names.is_empty() {
            return;
        }
        let reader = match HistoryReader::open(self.history.dir()) {
            Ok(reader) => reader,
            Err(error) => return tracing::warn!(%error, "forecasts begin without history"),
        };
        let now = self.clock.now();
        let bin = self.scale.bin_nanos();
        let span = i64::try_from(self.scale.season().as_nanos())
            .unwrap_or(i64::MAX / 16)
            .saturating_mul(8);
        let end = floor_to(now, bin);
        let start = floor_to(now.saturating_sub(span), bin);
        let query = Query::range(start..end).volumes(names).skip_damage();
        let events = self.known_events(start);
        // The brain wants to know what is announced, the forecasters also what followed earlier events.
        for (_, event) in &events {
            let event = Event::EventReceived(event.clone());
            let _ = lock(&self.mind).brain.apply(event, now);
        }
        let (series, skipped) = match reader.load_bins(&query, bin) {
            Ok(read) => read,
            Err(error) => return tracing::warn!(%error, "forecasts begin without history"),
        };
        for error in skipped {
            tracing::warn!(%error, "a file of the history is left out");
        }
        let mut mind = lock(&self.mind);
        let events: Vec<_> = events
            .iter()
            .map(|(arrived, event)| (arrived, event.happening()))
            .collect();
        for (name, series) in series {
            let volume = VolumeName::from(&*name);
            let mut events = events
                .iter()
                .filter(|(_, e)| e.concerns(&volume))
                .peekable();
            for (index, load) in series.bins.iter().enumerate() {
                let start = series.start_of(index);
                while let Some((_, event)) = events.next_if(|(arrived, _)| **arrived <= start) {
                    mind.mixture.happening(&volume, event);
                }
                let load = load.as_ref().and_then(|bin| {
                    Some(LoadBin {
                        read_bytes: bin.read_bytes?,
                        write_bytes: bin.write_bytes?,
                        read_ops: bin.read_ops?,
                        write_ops: bin.write_ops?,
                    })
                });
                if mind.mixture.observe(&volume, start, load).is_ok() {
                    let event = Event::WindowClosed {
                        volume: volume.clone(),
                        start,
                        load,
                    };
                    // At the time it is: for the brain the clock would have gone back by days.
                    let _ = mind.brain.apply(event, now);
                }
            }
            for (_, event) in events {
                mind.mixture.happening(&volume, event);
            }
        }
    }

    /// Fills the heat maps from the history of before: what was read often is staged first also after a
    /// restart. May take long, so it is done beside the work. Heat of older seasons
    /// than these would weigh little.
    pub(super) fn prime_heat(&self) {
        const SEASONS: i64 = 5;
        let entries = self.all_entries();
        if entries.is_empty() {
            return;
        }
        let now = self.clock.now();
        let span = i64::try_from(self.scale.season().as_nanos()).unwrap_or(i64::MAX / 16);
        let query = Query::range(now.saturating_sub(span.saturating_mul(SEASONS))..now)
            .volumes(entries.iter().map(|entry| entry.name.clone()))
            .skip_damage();
        let rows = HistoryReader::open(self.history.dir())
            .and_then(|reader| reader.rows_by_time::<RegionHeatRow>(&query));
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => return tracing::warn!(%error, "staging begins without history"),
        };
        for row in rows {
            if self.stopping() {
                return;
            }
            let row = match row {
                Ok(row) => row,
                Err(error) => {
                    return tracing::warn!(%error, "staging begins with a part of its history");
                }
            };
            if let Some(entry) = entries.iter().find(|entry| *entry.name == *row.volume) {
                let mut heat = lock(&entry.heat);
                let unit = (row.region << 20) / u64::from(heat.unit_bytes());
                let (reads, writes) = (row.read_ops as f64, row.write_ops as f64);
                heat.prime_unit(unit, reads, writes);
            }
        }
    }
}
