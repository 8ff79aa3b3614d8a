//! The tables: names, versions, and what a row must be able to do.

use std::fmt;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{Schema, SchemaRef};

use super::error::Result;
use crate::seam::UnixNanos;
use crate::window::{
    AppStatsRow, DecisionRow, EventRow, ForecastRow, IoRecord, LayerRow, RegionHeatRow, StagingRow,
    VolumeWindow,
};

/// A table of the history (docs/history-schema.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Table {
    /// One volume, one interval.
    VolumeStats,
    /// One region, one interval.
    RegionHeat,
    /// One request.
    IoTrace,
    /// One control group on one volume, one interval.
    AppStats,
    /// One event from outside.
    Events,
    /// One layer.
    Layers,
    /// One decision.
    Decisions,
    /// One forecast of one bin.
    Forecasts,
    /// One thing that happened to a staged range.
    Staging,
}

impl Table {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::VolumeStats,
        Self::RegionHeat,
        Self::IoTrace,
        Self::AppStats,
        Self::Events,
        Self::Layers,
        Self::Decisions,
        Self::Forecasts,
        Self::Staging,
    ];

    /// The name, which is the folder's too.
    pub const fn name(self) -> &'static str {
        match self {
            Self::VolumeStats => "volume_stats",
            Self::RegionHeat => "region_heat",
            Self::IoTrace => "io_trace",
            Self::AppStats => "app_stats",
            Self::Events => "events",
            Self::Layers => "layers",
            Self::Decisions => "decisions",
            Self::Forecasts => "forecasts",
            Self::Staging => "staging",
        }
    }

    /// The newest schema version. A new column that may be missing does not change it.
    pub const fn version(self) -> u32 {
        1
    }

    /// Whether rows belong to one volume: then files are sorted by (volume, ts), else by ts.
    pub const fn has_volume(self) -> bool {
        !matches!(self, Self::Events)
    }

    /// The columns.
    pub fn schema(self) -> Result<SchemaRef> {
        let batch = match self {
            Self::VolumeStats => VolumeWindow::to_batch(&[])?,
            Self::RegionHeat => RegionHeatRow::to_batch(&[])?,
            Self::IoTrace => IoRecord::to_batch(&[])?,
            Self::AppStats => AppStatsRow::to_batch(&[])?,
            Self::Events => EventRow::to_batch(&[])?,
            Self::Layers => LayerRow::to_batch(&[])?,
            Self::Decisions => DecisionRow::to_batch(&[])?,
            Self::Forecasts => ForecastRow::to_batch(&[])?,
            Self::Staging => StagingRow::to_batch(&[])?,
        };
        Ok(Arc::new(Schema::new(batch.schema().fields().clone())))
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A row of a table. The columns are defined once, by [`TableRow::to_batch`].
pub trait TableRow: Sized {
    /// The table.
    const TABLE: Table;
    /// Columns that a reader may leave out to read faster.
    const BULKY: &'static [&'static str] = &[];

    /// The time by which the row is sorted and placed.
    fn ts(&self) -> UnixNanos;
    /// Rows into columns.
    fn to_batch(rows: &[&Self]) -> Result<RecordBatch>;
    /// Columns into rows.
    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>>;
}
