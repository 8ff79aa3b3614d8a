//! What the agent says through `soe ... --json`, as far as the demo shows it.

use std::collections::BTreeMap;

use serde::Deserialize;

/// One view of `soe top --json`.
#[derive(Debug, Default, Deserialize)]
pub struct View {
    /// The groups.
    pub groups: Vec<Group>,
    /// The last window of each volume that had any load.
    #[serde(default)]
    pub load: Vec<Load>,
}

/// A group.
#[derive(Debug, Deserialize)]
pub struct Group {
    /// Its volumes.
    pub volumes: Vec<VolumeStatus>,
    /// The last failed attempt.
    pub last_error: Option<String>,
    /// Captures with a pause above the budget.
    #[serde(default)]
    pub missed_pause_budgets: u64,
}

/// A volume of a group.
#[derive(Debug, Deserialize)]
pub struct VolumeStatus {
    /// The device.
    pub volume: String,
    /// Durable layers.
    pub layers: u64,
    /// Blocks changed since the newest.
    pub changed_blocks_pending: Option<u64>,
    /// What is staged.
    pub staging: Staging,
    /// What is predicted.
    pub predicted: Predicted,
    /// What the planner decided last.
    pub last_decision: Option<Decision>,
}

/// What is staged of a volume.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Staging {
    /// Bytes copied.
    pub staged_bytes: u64,
    /// Of them still the newest.
    pub valid_bytes: u64,
    /// Of them read since.
    #[serde(default)]
    pub used_bytes: u64,
    /// Share of the volume's reads that staged blocks would have served.
    pub hit_ratio: Option<f64>,
}

/// What is predicted for a volume.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Predicted {
    /// RFC 3339.
    pub next_burst_at: Option<String>,
    /// 0 to 1.
    pub burst_probability: Option<f64>,
    /// The quietest time ahead.
    pub next_low_window: Option<LowWindow>,
    /// The member of the mixture that serves.
    pub model: Option<String>,
    /// Why that one.
    #[serde(default)]
    pub model_reason: Option<String>,
}

/// A quiet time.
#[derive(Clone, Debug, Deserialize)]
pub struct LowWindow {
    /// RFC 3339.
    pub start: String,
}

/// A decision of the planner.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Decision {
    /// RFC 3339.
    pub at: String,
    /// `capture`, `stage` or `wait`.
    pub action: String,
    /// In words.
    pub reason: String,
}

/// The load of a volume in one window.
#[derive(Debug, Deserialize)]
pub struct Load {
    /// The device.
    pub volume: String,
    /// Length of the window.
    pub interval_ms: u64,
    /// Bytes read in it.
    pub read_bytes: u64,
    /// Bytes written in it.
    pub write_bytes: u64,
}

/// `soe forecast --json`.
#[derive(Debug, Default, Deserialize)]
pub struct Forecast {
    /// One a bin.
    pub points: Vec<Point>,
}

/// What is expected of one bin.
#[derive(Debug, Deserialize)]
pub struct Point {
    /// The median, bytes a second.
    pub q50: f64,
}

/// `soe layer list --json`.
#[derive(Debug, Default, Deserialize)]
pub struct Layers {
    /// Oldest first.
    pub layers: Vec<Layer>,
}

/// One layer of one volume.
#[derive(Clone, Debug, Deserialize)]
pub struct Layer {
    /// What `soe restore --layer` takes.
    pub id: String,
    /// The device.
    pub volume: String,
    /// The capture it belongs to.
    pub sequence: u64,
    /// `baseline` or `differential`.
    pub kind: String,
    /// `optimistic`, `freeze`, ...
    pub method: String,
    /// How long writes were held.
    pub pause_us: u64,
    /// Blocks in it.
    pub changed_blocks: u64,
    /// From the device.
    pub bytes_read: u64,
    /// To the store.
    pub bytes_stored: u64,
}

/// The last line of `soe restore --json`.
#[derive(Debug, Default, Deserialize)]
pub struct Restored {
    /// Bytes written.
    #[serde(default)]
    pub bytes_written: u64,
    /// Of them from staged blocks.
    #[serde(default)]
    pub bytes_from_staging: u64,
    /// Bytes that hold zeros.
    #[serde(default)]
    pub bytes_zeroed: u64,
}

/// The captures, each with its layers of all volumes, oldest first.
pub fn captures(layers: &[Layer]) -> BTreeMap<u64, Vec<&Layer>> {
    let mut captures: BTreeMap<u64, Vec<&Layer>> = BTreeMap::new();
    for layer in layers {
        captures.entry(layer.sequence).or_default().push(layer);
    }
    captures
}

/// The value below which a share `q` of `sorted` lies (nearest rank); `None` of nothing.
pub fn quantile(sorted: &[u64], q: f64) -> Option<u64> {
    let rank = (q * sorted.len() as f64).ceil().max(1.0) as usize;
    sorted.get(rank.min(sorted.len()).checked_sub(1)?).copied()
}

/// Seconds since 1970 of an RFC 3339 time in UTC.
pub fn seconds(text: &str) -> Option<f64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.splitn(3, '-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let mut time = time.splitn(3, ':').map(|part| part.parse::<f64>().ok());
    let (hour, minute, second) = (time.next()??, time.next()??, time.next()??);
    // Days of the Gregorian calendar, with years that begin in March.
    let shifted = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = 365 * shifted + shifted.div_euclid(4) - shifted.div_euclid(100)
        + shifted.div_euclid(400)
        + day_of_year
        - 719_468;
    Some(days as f64 * 86_400.0 + hour * 3_600.0 + minute * 60.0 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        assert_eq!(seconds("1970-01-01T00:00:00Z"), Some(0.0));
        assert_eq!(seconds("2000-02-29T12:00:01.5Z"), Some(951_825_601.5));
        assert_eq!(seconds("2026-11-22T16:43:07Z"), Some(1_795_365_787.0));
        for bad in ["", "Z", "2026-11-22", "2026-11T1:2:3Z", "2026-11-22T16:43Z"] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }

    #[test]
    fn quantiles_are_by_nearest_rank() {
        let hundred: Vec<u64> = (1..=100).collect();
        assert_eq!(quantile(&hundred, 0.5), Some(50));
        assert_eq!(quantile(&hundred, 0.99), Some(99));
        assert_eq!(quantile(&hundred, 1.0), Some(100));
        assert_eq!(quantile(&[7], 0.5), Some(7));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn a_view_is_read_with_fields_that_are_absent_or_new() {
        let text = r#"{"groups":[{"group":"g","last_error":null,"new":1,"volumes":[{"volume":"/dev/loop2",
            "layers":1,"changed_blocks_pending":null,"staging":{"staged_bytes":4,"valid_bytes":3,"hit_ratio":null},
            "predicted":{"load_now":null,"next_burst_at":null,"burst_probability":0.5,"next_low_window":null,
            "model":null},"last_decision":null}]}]}"#;
        let view: View = serde_json::from_str(text).unwrap();
        assert_eq!(view.groups[0].volumes[0].staging.valid_bytes, 3);
    }
}
