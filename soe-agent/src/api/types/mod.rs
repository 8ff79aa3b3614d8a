//! What the surface speaks of. The `serde` names are the JSON field names that scripts rely on.

pub mod event;
pub mod group;
pub mod layer;
pub mod prediction;
pub mod volume;
pub mod watch;

pub use event::{Event, EventQuery};
pub use group::{
    Criticality, GroupSpec, GroupStatus, GroupUpdate, HostMetadata, HostUpdate, VolumeStatus,
};
pub use layer::{
    ConsistencyLevel, CutMethod, LayerDetail, LayerInfo, LayerKind, RestorePhase, RestorePoint,
    RestoreProgress, RestoreRequest, VerifyEvent,
};
pub use prediction::{
    Decision, EventEffect, ForecastPoint, ForecastReport, LoadPoint, MemberScore, ModelReport,
    ModelVersion, Prediction, StartScore, TimeWindow,
};
pub use volume::{StageReport, StagingStatus, TraceReport, TrackingState, VolumeInfo};
pub use watch::{LoadSample, WatchEvent, WatchItem};

/// Declares an enum whose values have one stable lower-case name in JSON, tables and arguments.
macro_rules! named_enum {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$vmeta:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $name {
            $($(#[$vmeta])* #[serde(rename = $text)] $variant,)+
        }

        impl $name {
            /// Every value, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The stable name.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(format!("{text:?} is none of {}", [$($text,)+].join(", "))),
                }
            }
        }
    };
}
pub(crate) use named_enum;

/// `serde` as RFC 3339 in UTC with nanoseconds where there are any.
pub mod rfc3339 {
    use chrono::{DateTime, SecondsFormat, Utc};
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::seam::UnixNanos;

    /// The time as text, for example `2026-03-01T12:00:00.000000001Z`.
    pub fn format(at: UnixNanos) -> String {
        DateTime::<Utc>::from_timestamp_nanos(at).to_rfc3339_opts(SecondsFormat::AutoSi, true)
    }

    /// Reads RFC 3339 with any offset. The error says what was wrong.
    pub fn parse(text: &str) -> Result<UnixNanos, String> {
        let time = DateTime::parse_from_rfc3339(text).map_err(|e| {
            format!("{text:?} is not an RFC 3339 time ({e}), such as 2026-03-01T12:00:00Z")
        })?;
        time.timestamp_nanos_opt()
            .ok_or_else(|| format!("{text:?} lies outside the years 1678 to 2261"))
    }

    /// For `serde(with)`.
    pub fn serialize<S: Serializer>(at: &UnixNanos, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format(*at))
    }

    /// For `serde(with)`.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<UnixNanos, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse(&text).map_err(serde::de::Error::custom)
    }

    /// The same for an optional time; `null` when absent.
    pub mod option {
        use super::*;

        /// For `serde(with)`.
        pub fn serialize<S: Serializer>(
            at: &Option<UnixNanos>,
            serializer: S,
        ) -> Result<S::Ok, S::Error> {
            match at {
                Some(at) => super::serialize(at, serializer),
                None => serializer.serialize_none(),
            }
        }

        /// For `serde(with)`.
        pub fn deserialize<'de, D: Deserializer<'de>>(
            deserializer: D,
        ) -> Result<Option<UnixNanos>, D::Error> {
            let text = Option::<String>::deserialize(deserializer)?;
            text.map(|t| parse(&t).map_err(serde::de::Error::custom))
                .transpose()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_the_text_form() {
        for at in [0, 1, 999_999_999, 1_772_366_400_000_000_000, -1] {
            assert_eq!(rfc3339::parse(&rfc3339::format(at)), Ok(at));
        }
        assert_eq!(rfc3339::format(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339::parse("1970-01-01T02:00:00+02:00"), Ok(0));
        assert!(rfc3339::parse("yesterday").is_err());
        assert!(rfc3339::parse("9999-01-01T00:00:00Z").is_err());
    }

    #[test]
    fn names_read_back() {
        for kind in CutMethod::ALL {
            assert_eq!(kind.as_str().parse(), Ok(*kind));
        }
        assert_eq!(
            "fuzzy".parse::<LayerKind>().unwrap_err(),
            "\"fuzzy\" is none of baseline, differential"
        );
    }
}
