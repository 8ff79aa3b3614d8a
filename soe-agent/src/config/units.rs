//! Durations and byte sizes as people write them: `30d`, `1s`, `100ms`, `8GiB`, `512MiB`.

use std::time::Duration;

const DURATION_UNITS: [(&str, u64); 7] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

const SIZE_UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

/// Splits `12.5ms` into its digits and its unit.
fn split(text: &str) -> Option<(&str, &str)> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits)?;
    (!number.is_empty()).then_some((number, unit))
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let (number, unit) = split(text)?;
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

/// Reads one or more whole numbers with units, largest first or not: `90s`, `1h30m`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || {
        format!(
            "{text:?} is not a duration; write a whole number with ns, us, ms, s, m, h or d, such as 15m or 1h30m"
        )
    };
    let mut rest = text;
    let mut nanos = 0u64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (_, tail) = rest.split_at_checked(digits).ok_or_else(wrong)?;
        let unit_end = tail
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(tail.len());
        let (part, next) = rest.split_at_checked(digits + unit_end).ok_or_else(wrong)?;
        let add = scaled(part, &DURATION_UNITS).ok_or_else(wrong)?;
        nanos = nanos.checked_add(add).ok_or_else(wrong)?;
        rest = next;
    }
    if text.is_empty() {
        return Err(wrong());
    }
    Ok(Duration::from_nanos(nanos))
}

/// Reads a whole number of bytes with an optional unit.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let plain = text
        .parse::<u64>()
        .ok()
        .filter(|_| text.bytes().all(|b| b.is_ascii_digit()));
    plain.or_else(|| scaled(text, &SIZE_UNITS)).ok_or_else(|| {
        format!("{text:?} is not a size; write a whole number with KiB, MiB, GiB or TiB (or kB, MB, GB, TB), such as 8GiB")
    })
}

fn largest_unit(value: u64, units: &[(&str, u64)]) -> String {
    let exact = units
        .iter()
        .find(|(_, factor)| value >= *factor && value.is_multiple_of(*factor));
    match (exact, units.last()) {
        (Some((name, factor)), _) => format!("{}{name}", value / factor),
        (None, Some((name, _))) => format!("{value}{name}"),
        (None, None) => value.to_string(),
    }
}

/// The duration in the largest unit that is exact, as [`parse_duration`] reads it.
pub fn format_duration(value: Duration) -> String {
    if value.is_zero() {
        return "0s".into();
    }
    largest_unit(
        u64::try_from(value.as_nanos()).unwrap_or(u64::MAX),
        &DURATION_UNITS,
    )
}

/// The size in the largest binary unit that is exact, as [`parse_size`] reads it.
pub fn format_size(bytes: u64) -> String {
    let binary: Vec<(&str, u64)> = SIZE_UNITS
        .iter()
        .copied()
        .filter(|(name, _)| name.ends_with("iB") || *name == "B")
        .collect();
    largest_unit(bytes, &binary)
}

/// The size rounded for tables, such as `1.5 GiB`.
pub fn human_size(bytes: u64) -> String {
    let unit = SIZE_UNITS
        .iter()
        .take(4)
        .find(|(_, factor)| bytes >= *factor);
    match unit {
        Some((name, factor)) => format!("{:.1} {name}", bytes as f64 / *factor as f64),
        None => format!("{bytes} B"),
    }
}

/// `serde` as text, with a range.
pub(super) mod duration {
    use super::*;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(in crate::config) fn serialize<S: Serializer>(
        value: &Duration,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format_duration(*value))
    }

    pub(in crate::config) fn within<'de, D: Deserializer<'de>>(
        deserializer: D,
        min: Duration,
        max: Duration,
    ) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        let value = parse_duration(&text).map_err(serde::de::Error::custom)?;
        if value < min || value > max {
            return Err(serde::de::Error::custom(format!(
                "{text:?} is out of range; use {} to {}",
                format_duration(min),
                format_duration(max)
            )));
        }
        Ok(value)
    }
}

/// `serde` as text, with a range.
pub(super) mod size {
    use super::*;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(in crate::config) fn serialize<S: Serializer>(
        value: &u64,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format_size(*value))
    }

    pub(in crate::config) fn within<'de, D: Deserializer<'de>>(
        deserializer: D,
        min: u64,
        max: u64,
    ) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        let value = parse_size(&text).map_err(serde::de::Error::custom)?;
        if value < min || value > max {
            return Err(serde::de::Error::custom(format!(
                "{text:?} is out of range; use {} to {}",
                format_size(min),
                format_size(max)
            )));
        }
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations() {
        assert_eq!(parse_duration("30d"), Ok(Duration::from_secs(30 * 86_400)));
        assert_eq!(parse_duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(parse_duration("0s"), Ok(Duration::ZERO));
        for bad in [
            "",
            "1",
            "s",
            "1.5s",
            "-1s",
            "1 s",
            "1y",
            "1s2",
            "99999999999999999999s",
            "400000d",
            "ä",
            "1ä",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("8GiB"), Ok(8 << 30));
        assert_eq!(parse_size("1MB"), Ok(1_000_000));
        assert_eq!(parse_size("4096"), Ok(4096));
        for bad in [
            "",
            "GiB",
            "+4",
            "-4",
            "1.5GiB",
            "8 GiB",
            "8gib",
            "99999999TiB",
            "1é",
        ] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(human_size(1536 << 20), "1.5 GiB");
        assert_eq!(human_size(12), "12 B");
    }

    proptest! {
        #[test]
        fn what_is_formatted_reads_back(nanos in 0..=u64::MAX, bytes in 0..=u64::MAX) {
            prop_assert_eq!(parse_duration(&format_duration(Duration::from_nanos(nanos))), Ok(Duration::from_nanos(nanos)));
            prop_assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }

        #[test]
        fn nothing_panics(text in "\\PC*") {
            let _ = parse_duration(&text);
            let _ = parse_size(&text);
        }
    }
}
