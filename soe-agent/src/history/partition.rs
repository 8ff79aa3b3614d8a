//! Where files lie: `<dir>/<table>/dt=YYYY-MM-DD/hour=HH/`.

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use chrono::{DateTime, NaiveDate};

use super::error::{HistoryError, Result};
use super::table::Table;
use crate::seam::UnixNanos;
use crate::window::SECOND_NS;

const HOUR_NS: i64 = 3600 * SECOND_NS;
/// Every finished file ends like this; nothing else does.
pub(super) const SUFFIX: &str = ".parquet";
/// A file under construction ends like this.
pub(super) const TEMPORARY: &str = ".tmp";
/// A file that was moved aside because it is damaged ends like this.
pub(super) const QUARANTINED: &str = ".damaged";
/// The writer's own folder: compactions, imports and removals under way.
pub(super) const WORK: &str = ".work";

/// An hour, counted from the Unix epoch, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Hour(pub i64);

impl Hour {
    pub fn of(ts: UnixNanos) -> Self {
        Self(ts.div_euclid(HOUR_NS))
    }

    pub fn start(self) -> UnixNanos {
        self.0.saturating_mul(HOUR_NS)
    }

    pub fn end(self) -> UnixNanos {
        self.start().saturating_add(HOUR_NS)
    }

    /// `dt=YYYY-MM-DD/hour=HH`.
    pub fn folder(self) -> PathBuf {
        let day = DateTime::from_timestamp(self.0.saturating_mul(3600), 0).unwrap_or_default();
        PathBuf::from(format!("dt={}", day.format("%Y-%m-%d")))
            .join(format!("hour={:02}", self.0.rem_euclid(24)))
    }

    pub fn in_table(self, dir: &Path, table: Table) -> PathBuf {
        dir.join(table.name()).join(self.folder())
    }
}

/// One hour of one table.
#[derive(Clone, Debug)]
pub(super) struct Partition {
    pub hour: Hour,
    pub path: PathBuf,
}

/// The names in a folder; a folder that does not exist has none.
fn names(path: &Path) -> Result<Vec<String>> {
    let listed = fs::read_dir(path).and_then(|entries| {
        entries
            .map(|entry| Ok(entry?.file_name()))
            .collect::<io::Result<Vec<_>>>()
    });
    let mut names: Vec<String> = match listed {
        Ok(names) => names
            .into_iter()
            .filter_map(|name| name.into_string().ok())
            .collect(),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound) => Vec::new(),
        Err(error) => return Err(HistoryError::io("list", path)(error)),
    };
    names.sort_unstable();
    Ok(names)
}

/// The partitions of a table within `hours`, in order of time. Folders with other names are not ours.
pub(super) fn partitions(
    dir: &Path,
    table: Table,
    hours: RangeInclusive<Hour>,
) -> Result<Vec<Partition>> {
    let mut found = Vec::new();
    let root = dir.join(table.name());
    for day_name in names(&root)? {
        let Some(day) = day_name
            .strip_prefix("dt=")
            .and_then(|day| NaiveDate::parse_from_str(day, "%Y-%m-%d").ok())
        else {
            continue;
        };
        let first = day
            .and_time(chrono::NaiveTime::MIN)
            .and_utc()
            .timestamp()
            .div_euclid(3600);
        if Hour(first + 23) < *hours.start() || Hour(first) > *hours.end() {
            continue;
        }
        let day_path = root.join(&day_name);
        for hour_name in names(&day_path)? {
            let hour = hour_name
                .strip_prefix("hour=")
                .and_then(|hour| hour.parse::<i64>().ok());
            let Some(hour) = hour.filter(|hour| (0..24).contains(hour)) else {
                continue;
            };
            let hour = Hour(first + hour);
            if hours.contains(&hour) {
                found.push(Partition {
                    hour,
                    path: day_path.join(&hour_name),
                });
            }
        }
    }
    found.sort_unstable_by_key(|partition| partition.hour);
    Ok(found)
}

/// All partitions of a table.
pub(super) fn all_partitions(dir: &Path, table: Table) -> Result<Vec<Partition>> {
    partitions(dir, table, Hour(i64::MIN)..=Hour(i64::MAX))
}

/// The finished files of a partition, in order of name.
pub(super) fn files(partition: &Path) -> Result<Vec<PathBuf>> {
    Ok(names(partition)?
        .into_iter()
        .filter(|name| name.ends_with(SUFFIX) && !name.starts_with('.'))
        .map(|name| partition.join(name))
        .collect())
}

/// The names in a partition that are no finished files.
pub(super) fn others(partition: &Path) -> Result<Vec<PathBuf>> {
    Ok(names(partition)?
        .into_iter()
        .filter(|name| !name.ends_with(SUFFIX) || name.starts_with('.'))
        .map(|name| partition.join(name))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_utc_hours_before_and_after_the_epoch() {
        assert_eq!(Hour::of(0).folder(), Path::new("dt=1970-01-01/hour=00"));
        assert_eq!(Hour::of(-1).folder(), Path::new("dt=1969-12-31/hour=23"));
        let ts = 1_372_629_804 * SECOND_NS;
        assert_eq!(Hour::of(ts).folder(), Path::new("dt=2013-06-30/hour=22"));
        assert!(Hour::of(ts).start() <= ts && ts < Hour::of(ts).end());
    }

    #[test]
    fn only_our_folders_are_listed() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "dt=2013-06-30/hour=22",
            "dt=2013-06-30/hour=77",
            "dt=x/hour=01",
            "a/b",
        ] {
            fs::create_dir_all(dir.path().join("events").join(name)).unwrap();
        }
        let found = all_partitions(dir.path(), Table::Events).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].hour, Hour::of(1_372_629_804 * SECOND_NS));
        assert!(
            partitions(dir.path(), Table::Events, Hour(0)..=Hour(5))
                .unwrap()
                .is_empty()
        );
    }
}
