//! Requests into heat per region and interval.

use std::collections::BTreeMap;

use super::rows::{IoClass, IoRecord, Name, RegionHeatRow};
use super::{REGION_BYTES, floor_to};
use crate::seam::UnixNanos;

/// Counts of one region in the open interval.
#[derive(Clone, Copy, Debug, Default)]
struct Heat {
    read_ops: u64,
    write_ops: u64,
}

/// Turns requests of many volumes into rows of `region_heat`; every volume's requests must come in
/// order of time, and a request that comes late is counted in the open interval of its volume.
#[derive(Debug)]
pub struct HeatWindower {
    interval: i64,
    open: BTreeMap<Name, (UnixNanos, BTreeMap<u64, Heat>)>,
}

impl HeatWindower {
    /// Rows of `interval` ns.
    pub fn new(interval: i64) -> Self {
        Self {
            interval: interval.max(1),
            open: BTreeMap::new(),
        }
    }

    /// Counts a request in every region it touches; discards and flushes heat nothing.
    pub fn push(&mut self, record: &IoRecord, out: &mut Vec<RegionHeatRow>) {
        let class = record.op.class();
        if !matches!(class, IoClass::Read | IoClass::Write) {
            return;
        }
        let start = floor_to(record.ts, self.interval);
        let (open, regions) = self
            .open
            .entry(record.volume.clone())
            .or_insert_with(|| (start, BTreeMap::new()));
        if start > *open {
            emit(
                *open,
                self.interval,
                &record.volume,
                std::mem::take(regions),
                out,
            );
            *open = start;
        }
        let first = record.offset / REGION_BYTES;
        let last = record.offset.saturating_add(record.length.max(1) - 1) / REGION_BYTES;
        let weight = u64::from(record.sample_weight.max(1));
        for region in first..=last {
            let heat = regions.entry(region).or_default();
            match class {
                IoClass::Read => heat.read_ops += weight,
                _ => heat.write_ops += weight,
            }
        }
    }

    /// Closes the intervals that ended by `now`.
    pub fn advance(&mut self, now: UnixNanos, out: &mut Vec<RegionHeatRow>) {
        let interval = self.interval;
        self.open.retain(|volume, (start, regions)| {
            let ended = start.saturating_add(interval) <= now;
            if ended {
                emit(*start, interval, volume, std::mem::take(regions), out);
            }
            !ended
        });
    }

    /// Closes every interval.
    pub fn finish(&mut self, out: &mut Vec<RegionHeatRow>) {
        self.advance(UnixNanos::MAX, out);
    }
}

fn emit(
    ts: UnixNanos,
    interval: i64,
    volume: &Name,
    regions: BTreeMap<u64, Heat>,
    out: &mut Vec<RegionHeatRow>,
) {
    out.extend(regions.into_iter().map(|(region, heat)| RegionHeatRow {
        ts,
        interval,
        volume: volume.clone(),
        region,
        read_ops: heat.read_ops,
        write_ops: heat.write_ops,
    }));
}
