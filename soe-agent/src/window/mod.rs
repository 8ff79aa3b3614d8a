//! Events into windows, and windows into evenly spaced bins.
//!
//! Everything here is pure: no clock, no I/O. The rows are what [`crate::history`] keeps; the names
//! of their fields are the names of the columns (docs/history-schema.md).
//!
//! A *window* holds what one volume did in one interval. A window of zeroes says "idle"; no window
//! says "unknown"; inside a window `None` says "this figure is unknown".

mod bins;
mod heat;
mod histogram;
mod locality;
mod rows;
mod windower;

pub use bins::{BinBuilder, BinError, BinSeries, LoadBin, MAX_BINS, bin_series};
pub use heat::HeatWindower;
pub use histogram::{LatencySummary, LogHistogram};
pub use locality::{Rereads, SequentialStreams};
pub use rows::{
    AppStatsRow, DecisionRow, DirectionStats, EventRow, ForecastRow, IoClass, IoOp, IoRecord,
    LayerRow, Name, QueueDepth, RegionHeatRow, StagingRow, VolumeWindow,
};
pub use windower::{Books, IoWindower, WindowConfig};

/// Nanoseconds in a second.
pub const SECOND_NS: i64 = 1_000_000_000;
/// Bytes of a region, the unit of heat and of `unique_regions`.
pub const REGION_BYTES: u64 = 1 << 20;

/// The start of the interval of `interval` ns that `ts` falls into, counted from the Unix epoch.
pub fn floor_to(ts: i64, interval: i64) -> i64 {
    let interval = interval.max(1);
    ts.div_euclid(interval).saturating_mul(interval)
}
