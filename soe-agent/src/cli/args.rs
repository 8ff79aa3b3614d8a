//! Arguments that several verbs share.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::CliError;
use crate::api::types::rfc3339;
use crate::config::units;
use crate::seam::UnixNanos;

/// Reads a duration such as `15m`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    units::parse_duration(text)
}

/// Reads a time such as `2026-03-01T12:00:00Z`.
pub(super) fn time(text: &str) -> Result<UnixNanos, String> {
    rfc3339::parse(text)
}

/// A volume as the daemon should see it: a name that begins with `./` or `../` is relative to the
/// caller's folder, of which the daemon knows nothing.
pub(super) fn volume(name: &str) -> Result<String, CliError> {
    if name.starts_with("./") || name.starts_with("../") {
        return absolute(Path::new(name));
    }
    Ok(name.to_owned())
}

/// A path as the daemon should see it.
pub(super) fn absolute(path: &Path) -> Result<String, CliError> {
    let full: PathBuf = std::path::absolute(path)
        .map_err(|e| CliError::Usage(format!("path {path:?} cannot be made absolute: {e}")))?;
    full.into_os_string()
        .into_string()
        .map_err(|path| CliError::Usage(format!("path {path:?} is not UTF-8; rename it")))
}

/// Whole seconds of a duration that the service takes in seconds.
pub(super) fn seconds(what: &str, value: Duration) -> Result<u64, CliError> {
    if value.subsec_nanos() != 0 {
        return Err(CliError::Usage(format!(
            "{what} of {} is not a whole number of seconds",
            units::format_duration(value)
        )));
    }
    Ok(value.as_secs())
}

/// Whole microseconds of a duration that the service takes in microseconds.
pub(super) fn micros(what: &str, value: Duration) -> Result<u64, CliError> {
    let micros = u64::try_from(value.as_micros())
        .ok()
        .filter(|_| value.subsec_nanos().is_multiple_of(1000));
    micros.ok_or_else(|| {
        CliError::Usage(format!(
            "{what} of {} is not a whole number of microseconds",
            units::format_duration(value)
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_relative_volumes_are_resolved() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(volume("sda").unwrap(), "sda");
        assert_eq!(volume("/dev/sda").unwrap(), "/dev/sda");
        assert_eq!(
            volume("./disk.img").unwrap(),
            here.join("disk.img").to_str().unwrap()
        );
    }

    #[test]
    fn units_are_whole() {
        assert_eq!(seconds("rpo", Duration::from_secs(900)).unwrap(), 900);
        assert_eq!(
            seconds("rpo", Duration::from_millis(1500))
                .unwrap_err()
                .to_string(),
            "rpo of 1500ms is not a whole number of seconds"
        );
        assert!(micros("pause", Duration::from_nanos(1)).is_err());
    }
}
