//! What a request must be before the daemon sees it. Pure.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use super::engine::EngineError;
use super::types::{Event, GroupSpec, GroupUpdate, HostUpdate, RestoreRequest};
use crate::config::units;

/// Volumes a group may have.
pub const MAX_VOLUMES: usize = 256;
/// Bytes of the longest name of a volume, layer, event or application.
pub const MAX_NAME_BYTES: usize = 4096;
/// Recovery point objectives, seconds.
pub const RPO_S: RangeInclusive<u64> = 1..=30 * 86_400;
/// Pause budgets, microseconds.
pub const MAX_PAUSE_US: RangeInclusive<u64> = 1_000..=10_000_000;
/// Foreground latency targets, microseconds.
pub const P99_TARGET_US: RangeInclusive<u64> = 10..=10_000_000;
/// Forecast horizons.
pub const HORIZON: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(7 * 86_400);
/// Lengths of a recording.
pub const RECORDING: RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(86_400);

type Checked = Result<(), EngineError>;

/// A group's name: 1 to 63 of letters, digits, `.`, `_`, `-`, beginning with a letter or digit, so
/// that it is safe as a file name and a label.
pub fn group_name(name: &str) -> Checked {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let begins_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins_well && name.len() <= 63 && name.chars().all(allowed) {
        return Ok(());
    }
    Err(EngineError::invalid(format!(
        "group name {name:?} is not usable; use 1 to 63 letters, digits, '.', '_' or '-', beginning with a letter or digit"
    )))
}

/// A text that names something: not empty, not overlong, no control characters.
pub fn name(what: &str, text: &str) -> Checked {
    if text.is_empty() {
        return Err(EngineError::invalid(format!("{what} is empty; name one")));
    }
    if text.len() > MAX_NAME_BYTES {
        return Err(EngineError::invalid(format!(
            "{what} is longer than {MAX_NAME_BYTES} bytes"
        )));
    }
    if text.chars().any(char::is_control) {
        return Err(EngineError::invalid(format!(
            "{what} {text:?} contains control characters"
        )));
    }
    Ok(())
}

fn in_range(what: &str, unit: &str, value: Option<u64>, range: &RangeInclusive<u64>) -> Checked {
    match value {
        Some(v) if !range.contains(&v) => Err(EngineError::invalid(format!(
            "{what} of {v} {unit} is out of range; use {} to {} {unit}",
            range.start(),
            range.end()
        ))),
        _ => Ok(()),
    }
}

fn duration(what: &str, value: Duration, range: &RangeInclusive<Duration>) -> Checked {
    if range.contains(&value) {
        return Ok(());
    }
    Err(EngineError::invalid(format!(
        "{what} of {} is out of range; use {} to {}",
        units::format_duration(value),
        units::format_duration(*range.start()),
        units::format_duration(*range.end())
    )))
}

fn volumes(names: &[String]) -> Checked {
    let mut seen = BTreeSet::new();
    for volume in names {
        name("volume", volume)?;
        if !seen.insert(volume) {
            return Err(EngineError::invalid(format!(
                "volume {volume} is named twice"
            )));
        }
    }
    if names.len() > MAX_VOLUMES {
        return Err(EngineError::invalid(format!(
            "{} volumes are too many for one group; it may have {MAX_VOLUMES}",
            names.len()
        )));
    }
    Ok(())
}

fn terms(
    rpo_s: Option<u64>,
    max_pause_us: Option<u64>,
    p99_us: Option<u64>,
    app: Option<&str>,
) -> Checked {
    in_range("rpo", "s", rpo_s, &RPO_S)?;
    in_range("pause budget", "us", max_pause_us, &MAX_PAUSE_US)?;
    in_range("p99 target", "us", p99_us, &P99_TARGET_US)?;
    app.map_or(Ok(()), |a| name("application type", a))
}

/// A group to create.
pub fn group_spec(spec: &GroupSpec) -> Checked {
    group_name(&spec.name)?;
    if spec.volumes.is_empty() {
        return Err(EngineError::invalid(format!(
            "group {} has no volumes; name at least one",
            spec.name
        )));
    }
    volumes(&spec.volumes)?;
    terms(
        spec.rpo_s,
        spec.max_pause_us,
        spec.p99_target_us,
        spec.app.as_deref(),
    )
}

/// Changes to a group.
pub fn group_update(update: &GroupUpdate) -> Checked {
    group_name(&update.name)?;
    volumes(&update.add_volumes)?;
    volumes(&update.remove_volumes)?;
    if let Some(both) = update
        .add_volumes
        .iter()
        .find(|v| update.remove_volumes.contains(v))
    {
        return Err(EngineError::invalid(format!(
            "volume {both} is both to be added and to be removed"
        )));
    }
    terms(
        update.rpo_s,
        update.max_pause_us,
        update.p99_target_us,
        update.app.as_deref(),
    )
}

/// Host metadata to set.
pub fn host_update(update: &HostUpdate) -> Checked {
    group_name(&update.group)?;
    if !update.host.is_empty() {
        name("host", &update.host)?;
    }
    terms(
        update.rpo_s,
        None,
        update.p99_target_us,
        update.app.as_deref(),
    )
}

/// A restore to run.
pub fn restore(request: &RestoreRequest) -> Checked {
    group_name(&request.group)?;
    name("volume", &request.volume)?;
    let target = request.target.to_string_lossy();
    name("restore target", &target)?;
    if !Path::new(target.as_ref()).is_absolute() {
        return Err(EngineError::invalid(format!(
            "restore target {target} is not absolute; the daemon has a working directory of its own"
        )));
    }
    Ok(())
}

/// A forecast's horizon.
pub fn horizon(value: Duration) -> Checked {
    duration("horizon", value, &HORIZON)
}

/// The length of a recording.
pub fn recording(value: Duration) -> Checked {
    duration("recording", value, &RECORDING)
}

/// An event to keep.
pub fn event(event: &Event) -> Checked {
    name("event id", &event.id)?;
    name("event source", &event.source)?;
    name("event type", &event.kind)?;
    event
        .subject
        .as_deref()
        .map_or(Ok(()), |s| name("event subject", s))?;
    volumes(&event.volumes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::engine::ErrorKind;
    use crate::api::types::{Criticality, RestorePoint};

    fn spec() -> GroupSpec {
        GroupSpec {
            name: "db".into(),
            volumes: vec!["/dev/loop0".into()],
            prediction_enabled: true,
            rpo_s: None,
            max_pause_us: None,
            p99_target_us: None,
            app: None,
            criticality: Criticality::Normal,
        }
    }

    #[test]
    fn group_names() {
        for good in ["db", "0", "a.b_c-d", &"x".repeat(63)] {
            assert_eq!(group_name(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "-x",
            "a/b",
            "a b",
            "ä",
            "a\0",
            "a\n",
            &"x".repeat(64),
        ] {
            assert_eq!(
                group_name(bad).unwrap_err().kind,
                ErrorKind::InvalidArgument,
                "{bad}"
            );
        }
    }

    #[test]
    fn a_good_group_passes_and_each_fault_is_named() {
        assert_eq!(group_spec(&spec()), Ok(()));
        type Fault = fn(&mut GroupSpec);
        let faults: [(Fault, &str); 6] = [
            (
                |s| s.volumes.clear(),
                "group db has no volumes; name at least one",
            ),
            (
                |s| s.volumes.push("/dev/loop0".into()),
                "volume /dev/loop0 is named twice",
            ),
            (
                |s| s.volumes.push(String::new()),
                "volume is empty; name one",
            ),
            (
                |s| s.rpo_s = Some(0),
                "rpo of 0 s is out of range; use 1 to 2592000 s",
            ),
            (
                |s| s.max_pause_us = Some(1),
                "pause budget of 1 us is out of range; use 1000 to 10000000 us",
            ),
            (
                |s| s.app = Some("a\tb".into()),
                "application type \"a\\tb\" contains control characters",
            ),
        ];
        for (spoil, message) in faults {
            let mut spec = spec();
            spoil(&mut spec);
            assert_eq!(group_spec(&spec).unwrap_err().message, message);
        }
    }

    #[test]
    fn a_restore_needs_an_absolute_target() {
        let mut request = RestoreRequest {
            group: "db".into(),
            volume: "/dev/loop0".into(),
            point: RestorePoint::Latest,
            target: "/tmp/image".into(),
            differential: false,
        };
        assert_eq!(restore(&request), Ok(()));
        request.target = "image".into();
        assert!(
            restore(&request)
                .unwrap_err()
                .message
                .contains("not absolute")
        );
    }

    #[test]
    fn durations_are_bounded() {
        assert_eq!(horizon(Duration::from_secs(3600)), Ok(()));
        assert_eq!(
            horizon(Duration::ZERO).unwrap_err().message,
            "horizon of 0s is out of range; use 1s to 7d"
        );
        assert!(recording(Duration::from_secs(90_000)).is_err());
    }
}
