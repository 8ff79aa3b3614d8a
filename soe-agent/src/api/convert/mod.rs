//! Between protobuf and the plain types of [`crate::api::types`], both ways: the daemon answers and
//! the command line reads with the same code, and a test sends every type there and back.

mod group;
mod layer;
mod prediction;
mod reply;
mod volume;
mod watch;

use uuid::Uuid;

use super::pb;
use super::types::{
    ConsistencyLevel, Criticality, CutMethod, LayerKind, RestorePhase, TimeWindow, TrackingState,
};
use crate::seam::{ByteRange, GenerationEnd};

/// A message that does not say what it must.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A field is absent.
    #[error("the message lacks {field}")]
    Missing {
        /// The field's name in the service definition.
        field: &'static str,
    },
    /// A field has a value that this version does not know.
    #[error("{field} has the value {value}, which this version does not know")]
    Unknown {
        /// The field's name in the service definition.
        field: &'static str,
        /// What it held.
        value: String,
    },
}

pub(super) fn required<T>(value: Option<T>, field: &'static str) -> Result<T, WireError> {
    value.ok_or(WireError::Missing { field })
}

pub(super) fn uuid(text: Option<String>, field: &'static str) -> Result<Option<Uuid>, WireError> {
    text.map(|t| Uuid::try_parse(&t).map_err(|_| WireError::Unknown { field, value: t }))
        .transpose()
}

/// Maps a plain enum and a protobuf enum whose values have the same names. An unspecified value is
/// an absent one.
macro_rules! map_enum {
    ($name:ident, $plain:ty, $pb:ty, $field:literal, [$($variant:ident),+ $(,)?]) => {
        /// Conversions of one enum.
        pub(super) mod $name {
            use super::*;

            pub fn to_pb(value: $plain) -> i32 {
                (match value { $(<$plain>::$variant => <$pb>::$variant,)+ }) as i32
            }

            #[allow(dead_code)]
            pub fn to_pb_or_unspecified(value: Option<$plain>) -> i32 {
                value.map_or(0, to_pb)
            }

            pub fn from_pb(value: i32) -> Result<Option<$plain>, WireError> {
                match <$pb>::try_from(value) {
                    Ok(<$pb>::Unspecified) => Ok(None),
                    $(Ok(<$pb>::$variant) => Ok(Some(<$plain>::$variant)),)+
                    Err(_) => Err(WireError::Unknown { field: $field, value: value.to_string() }),
                }
            }

            #[allow(dead_code)]
            pub fn required(value: i32) -> Result<$plain, WireError> {
                super::required(from_pb(value)?, $field)
            }
        }
    };
}

map_enum!(
    kind,
    LayerKind,
    pb::LayerKind,
    "kind",
    [Baseline, Differential]
);
map_enum!(
    level,
    ConsistencyLevel,
    pb::ConsistencyLevel,
    "level",
    [Crash, Filesystem, Application]
);
map_enum!(
    method,
    CutMethod,
    pb::CutMethod,
    "method",
    [Optimistic, Freeze, Native, Suspend]
);
map_enum!(
    tracking,
    TrackingState,
    pb::TrackingState,
    "tracking",
    [Complete, Tainted, Detached]
);
map_enum!(
    criticality,
    Criticality,
    pb::Criticality,
    "criticality",
    [Low, Normal, High]
);
map_enum!(
    phase,
    RestorePhase,
    pb::RestorePhase,
    "phase",
    [Planning, Writing, Syncing, Done]
);
map_enum!(
    rescan,
    GenerationEnd,
    pb::RescanReason,
    "rescan_reason",
    [
        First,
        GapBoot,
        GapMiss,
        Resize,
        Remapped,
        Passthrough,
        CounterMismatch,
        AuditFail
    ]
);

/// The wire value of an optional layer kind.
pub fn layer_kind_to_pb(value: Option<LayerKind>) -> i32 {
    kind::to_pb_or_unspecified(value)
}

/// The optional layer kind of a wire value.
pub fn layer_kind_from_pb(value: i32) -> Result<Option<LayerKind>, WireError> {
    kind::from_pb(value)
}

impl From<TimeWindow> for pb::TimeWindow {
    fn from(w: TimeWindow) -> Self {
        Self {
            start_unix_ns: w.start,
            end_unix_ns: w.end,
        }
    }
}

impl From<pb::TimeWindow> for TimeWindow {
    fn from(w: pb::TimeWindow) -> Self {
        Self {
            start: w.start_unix_ns,
            end: w.end_unix_ns,
        }
    }
}

impl From<ByteRange> for pb::Extent {
    fn from(r: ByteRange) -> Self {
        Self {
            offset_bytes: r.offset,
            length_bytes: r.len,
        }
    }
}

impl From<pb::Extent> for ByteRange {
    fn from(e: pb::Extent) -> Self {
        Self::new(e.offset_bytes, e.length_bytes)
    }
}
