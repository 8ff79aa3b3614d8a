//! Readers of single values: each knows the range of one key.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serializer, de};

use super::units;
use crate::api::types::Criticality;

pub(super) const SECOND: Duration = Duration::from_secs(1);
pub(super) const HOUR: Duration = Duration::from_secs(3600);
pub(super) const DAY: Duration = Duration::from_secs(86_400);
pub(super) const KIB: u64 = 1 << 10;
pub(super) const MIB: u64 = 1 << 20;
pub(super) const GIB: u64 = 1 << 30;
pub(super) const TIB: u64 = 1 << 40;

/// Makes a reader of durations within a range.
macro_rules! duration_within {
    ($name:ident, $min:expr, $max:expr) => {
        pub(super) fn $name<'de, D: Deserializer<'de>>(
            deserializer: D,
        ) -> Result<Duration, D::Error> {
            units::duration::within(deserializer, $min, $max)
        }
    };
}

/// Makes a reader of byte sizes within a range.
macro_rules! size_within {
    ($name:ident, $min:expr, $max:expr) => {
        pub(super) fn $name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
            units::size::within(deserializer, $min, $max)
        }
    };
}

duration_within!(history_interval, Duration::from_millis(100), HOUR);
duration_within!(region_interval, Duration::from_millis(100), DAY);
duration_within!(retention, HOUR, 3650 * DAY);
duration_within!(tick, Duration::from_millis(50), HOUR);
duration_within!(bin, Duration::from_millis(100), HOUR);
duration_within!(season, SECOND, 31 * DAY);
duration_within!(train_every, SECOND, 31 * DAY);
duration_within!(train_after, SECOND, 62 * DAY);
duration_within!(rpo, SECOND, 30 * DAY);
duration_within!(max_pause, Duration::from_millis(1), 10 * SECOND);
duration_within!(baseline_every, SECOND, 3650 * DAY);
duration_within!(p99, Duration::from_micros(10), 10 * SECOND);
size_within!(event_bytes, KIB, 64 * MIB);
size_within!(disk_size, 16 * MIB, 1024 * TIB);
size_within!(staging_budget, MIB, 64 * TIB);
size_within!(memory, 64 * MIB, TIB);
size_within!(idle, 0, GIB);
size_within!(map_memory, MIB, 64 * GIB);

pub(super) fn block_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let bytes = units::size::within(deserializer, 4 * KIB, MIB)?;
    if !bytes.is_power_of_two() {
        return Err(de::Error::custom(format!(
            "{} is not a power of two",
            units::format_size(bytes)
        )));
    }
    Ok(bytes)
}

pub(super) fn cpu<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let cores = f64::deserialize(deserializer)?;
    if !(0.01..=256.0).contains(&cores) {
        return Err(de::Error::custom(format!(
            "{cores} is out of range; use 0.01 to 256 cores"
        )));
    }
    Ok(cores)
}

pub(super) fn audit_blocks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let blocks = u32::deserialize(deserializer)?;
    if blocks > 4096 {
        return Err(de::Error::custom(format!(
            "{blocks} is out of range; use 0 to 4096 blocks"
        )));
    }
    Ok(blocks)
}

pub(super) fn share<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let share = f64::deserialize(deserializer)?;
    if !(0.01..=0.99).contains(&share) {
        return Err(de::Error::custom(format!(
            "{share} is out of range; use 0.01 to 0.99"
        )));
    }
    Ok(share)
}

/// An absolute path.
pub(super) fn path<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<PathBuf>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if !text.starts_with('/') || text.contains('\0') {
        return Err(de::Error::custom(format!(
            "{text:?} is not an absolute path"
        )));
    }
    Ok(Some(PathBuf::from(text)))
}

/// A text that is not empty.
pub(super) fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err(de::Error::custom(format!(
            "{text:?} is empty or has control characters"
        )));
    }
    Ok(text)
}

pub(super) fn some_text<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    text(deserializer).map(Some)
}

pub(super) fn http<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text == "off" {
        return Ok(None);
    }
    let address: SocketAddr = text.parse().map_err(|_| {
        de::Error::custom(format!(
            "{text:?} is not an address and port, such as 127.0.0.1:9620, and not off"
        ))
    })?;
    if !address.ip().is_loopback() {
        return Err(de::Error::custom(format!(
            "{text:?} is not a loopback address; nothing would authenticate callers from outside"
        )));
    }
    Ok(Some(address))
}

pub(super) fn http_text<S: Serializer>(
    http: &Option<SocketAddr>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match http {
        Some(address) => serializer.collect_str(address),
        None => serializer.serialize_str("off"),
    }
}

pub(super) fn normal() -> Criticality {
    Criticality::Normal
}

pub(super) fn cgroup<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = text(deserializer)?;
    if !text.starts_with('/') {
        return Err(de::Error::custom(format!(
            "{text:?} does not begin with /, such as /system.slice/postgresql.service"
        )));
    }
    Ok(text)
}

pub(super) fn some_p99<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Duration>, D::Error> {
    p99(deserializer).map(Some)
}

pub(super) fn some_rpo<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Duration>, D::Error> {
    rpo(deserializer).map(Some)
}

pub(super) fn some_duration<S: Serializer>(
    value: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => units::duration::serialize(value, serializer),
        None => serializer.serialize_none(),
    }
}
