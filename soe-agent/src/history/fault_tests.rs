//! The end of the world at every file operation, and damage of every kind.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::disk::{Disk, DiskFile, RealDisk};
use super::file::HistoryFile;
use super::partition::{all_partitions, files};
use super::tests::{request, window};
use super::*;
use crate::window::{IoRecord, SECOND_NS, VolumeWindow};

const T0: i64 = 1_767_225_600 * SECOND_NS;

/// What outlives the crash.
#[derive(Default)]
struct World {
    /// Operations before the end.
    left: usize,
    /// Files with bytes that were never synced, under the names they have now.
    unsynced: BTreeMap<PathBuf, ()>,
    /// Whether syncing does nothing: the mutation that proves that the test would notice.
    lying: bool,
    failed: bool,
}

/// A disk that fails for good after some operations; the operation at which it ends may be done half.
#[derive(Clone)]
struct DoomedDisk(Arc<Mutex<World>>);

impl DoomedDisk {
    fn new(left: usize, lying: bool) -> Self {
        Self(Arc::new(Mutex::new(World {
            left,
            lying,
            ..World::default()
        })))
    }

    fn step(&self) -> io::Result<()> {
        let mut world = self.0.lock().unwrap();
        if world.left == 0 {
            world.failed = true;
            return Err(io::Error::other("the power is gone"));
        }
        world.left -= 1;
        Ok(())
    }

    /// What the power cut takes: bytes that were not synced. Says whether it came at all.
    fn crash(&self) -> bool {
        let world = self.0.lock().unwrap();
        for path in world.unsynced.keys() {
            if let Ok(file) = OpenOptions::new().write(true).open(path) {
                let length = file.metadata().unwrap().len();
                file.set_len(length / 2).unwrap();
            }
        }
        world.failed
    }

    fn renamed(&self, from: &Path, to: &Path) {
        let mut world = self.0.lock().unwrap();
        let moved: Vec<PathBuf> = world
            .unsynced
            .keys()
            .filter(|path| path.starts_with(from))
            .cloned()
            .collect();
        for path in moved {
            world.unsynced.remove(&path);
            let rest = path.strip_prefix(from).unwrap();
            let new = if rest.as_os_str().is_empty() {
                to.to_owned()
            } else {
                to.join(rest)
            };
            world.unsynced.insert(new, ());
        }
    }
}

const REAL: RealDisk = RealDisk { durable: false };

struct DoomedFile {
    disk: DoomedDisk,
    path: PathBuf,
    file: Box<dyn DiskFile>,
}

impl Write for DoomedFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if let Err(error) = self.disk.step() {
            self.file.write_all(&buf[..buf.len() / 2])?;
            return Err(error);
        }
        self.disk
            .0
            .lock()
            .unwrap()
            .unsynced
            .insert(self.path.clone(), ());
        self.file.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl DiskFile for DoomedFile {
    fn sync(&mut self) -> io::Result<()> {
        self.disk.step()?;
        let mut world = self.disk.0.lock().unwrap();
        if !world.lying {
            world.unsynced.remove(&self.path);
        }
        Ok(())
    }
}

impl Disk for DoomedDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.step()?;
        let file = REAL.create(path)?;
        Ok(Box::new(DoomedFile {
            disk: self.clone(),
            path: path.to_owned(),
            file,
        }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        REAL.create_dir(path)
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        self.step()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        REAL.rename(from, to)?;
        self.renamed(from, to);
        Ok(())
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        self.step()?;
        REAL.exchange(a, b)?;
        let aside = a.with_extension("swap");
        self.renamed(a, &aside);
        self.renamed(b, a);
        self.renamed(&aside, b);
        Ok(())
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        REAL.hard_link(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        self.0.lock().unwrap().unsynced.remove(path);
        REAL.remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        REAL.remove_dir(path)
    }
}

/// All rows as every plain reader sees them: every `*.parquet` below the table's folder.
fn plainly(dir: &Path) -> Result<Vec<u64>> {
    let mut offsets = Vec::new();
    for partition in all_partitions(dir, Table::IoTrace)? {
        for path in files(&partition.path)? {
            let damaged = |error: String| HistoryError::Damaged {
                path: path.clone(),
                reason: error,
            };
            let file = fs::File::open(&path).map_err(|error| damaged(error.to_string()))?;
            let reader =
                parquet::arrow::arrow_reader::ParquetRecordBatchReader::try_new(file, 1000)
                    .map_err(|error| damaged(error.to_string()))?;
            for batch in reader {
                let batch = batch.map_err(|error| damaged(error.to_string()))?;
                offsets.extend(IoRecord::from_batch(&batch)?.iter().map(|row| row.offset));
            }
        }
    }
    offsets.sort_unstable();
    Ok(offsets)
}

fn ours(dir: &Path) -> Result<Vec<u64>> {
    let rows = HistoryReader::open(dir)?.rows::<IoRecord>(&Query::all())?;
    let mut offsets = rows
        .map(|row| Ok(row?.offset))
        .collect::<Result<Vec<_>>>()?;
    offsets.sort_unstable();
    Ok(offsets)
}

/// One life: two flushes into one hour, compaction, then retention of everything old. Returns the
/// rows whose flush was confirmed, and all rows that were handed over.
fn life(dir: &Path, disk: DoomedDisk) -> (Vec<u64>, Vec<u64>) {
    let (mut confirmed, mut given) = (Vec::new(), Vec::new());
    let config = StoreConfig {
        retention: Retention::default(),
        ..StoreConfig::new(dir)
    };
    let Ok(store) = HistoryStore::open_on(config, Box::new(disk)) else {
        return (confirmed, given);
    };
    for part in 0..3u64 {
        let rows: Vec<IoRecord> = (0..5)
            .map(|i| {
                request(
                    T0 + (part as i64 * 10 + i) * SECOND_NS,
                    "v",
                    part * 5 + i as u64,
                )
            })
            .collect();
        store.append(&rows).unwrap();
        given.extend(rows.iter().map(|row| row.offset));
        if store.flush().is_err() {
            return (confirmed, given);
        }
        confirmed.clone_from(&given);
    }
    let _ = store.compact_all();
    (confirmed, given)
}

/// How often the rows were wrong after a crash at one of the first operations, and how many lives
/// there were until one got through.
fn crash_everywhere(lying: bool) -> (usize, usize) {
    let mut wrong = 0;
    for left in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let disk = DoomedDisk::new(left, lying);
        let (confirmed, given) = life(dir.path(), disk.clone());
        let crashed = disk.crash();
        // As a plain reader sees it before anyone repairs, and we after it.
        let before = plainly(dir.path());
        let store = HistoryStore::open(StoreConfig::new(dir.path())).unwrap();
        let after = ours(dir.path());
        let right = |rows: &Result<Vec<u64>>| {
            rows.as_ref().is_ok_and(|rows| {
                // Each row at most once, every confirmed one, none that was never given.
                rows.windows(2).all(|pair| pair[0] < pair[1])
                    && confirmed.iter().all(|row| rows.contains(row))
                    && rows.iter().all(|row| given.contains(row))
            })
        };
        wrong += usize::from(!right(&before) || !right(&after));
        store.compact_all().unwrap();
        let work = dir.path().join(".work");
        assert!(!work.exists() || fs::read_dir(work).unwrap().next().is_none());
        for partition in all_partitions(dir.path(), Table::IoTrace).unwrap() {
            for entry in fs::read_dir(&partition.path).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                assert!(!name.contains(".tmp"), "{name} was left behind");
            }
        }
        if !crashed {
            return (wrong, left);
        }
    }
    unreachable!()
}

#[test]
fn a_crash_at_any_operation_loses_no_confirmed_row_and_doubles_none() {
    let (wrong, operations) = crash_everywhere(false);
    assert_eq!(wrong, 0);
    assert!(operations > 30, "only {operations} operations were tried");
}

#[test]
fn a_disk_that_lies_about_sync_is_noticed_by_the_same_test() {
    assert!(crash_everywhere(true).0 > 0);
}

fn history_with_two_hours() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let store = HistoryStore::open(StoreConfig::new(dir.path())).unwrap();
    for hour in 0..2 {
        let rows: Vec<VolumeWindow> = (0..60)
            .map(|i| window(T0 + (hour * 3600 + i) * SECOND_NS, "v", 7))
            .collect();
        store.append(&rows).unwrap();
    }
    store.close().unwrap();
    let paths: Vec<PathBuf> = all_partitions(dir.path(), Table::VolumeStats)
        .unwrap()
        .iter()
        .flat_map(|partition| files(&partition.path).unwrap())
        .collect();
    (dir, paths[0].clone(), paths[1].clone())
}

fn read_all(dir: &Path, query: &Query) -> (Result<usize>, Vec<HistoryError>) {
    let mut rows = HistoryReader::open(dir)
        .unwrap()
        .rows::<VolumeWindow>(query)
        .unwrap();
    let count = rows
        .by_ref()
        .map(|row| row.map(|_| ()))
        .collect::<Result<Vec<_>>>();
    (count.map(|rows| rows.len()), rows.skipped())
}

/// Every bit of a file matters: flipped anywhere, the file is called damaged, by its name, and the
/// daemon goes on without it.
#[test]
fn a_flipped_bit_anywhere_is_noticed() {
    let (dir, path, _) = history_with_two_hours();
    let good = fs::read(&path).unwrap();
    assert_eq!(read_all(dir.path(), &Query::all()).0.unwrap(), 120);
    let mut places: Vec<usize> = (0..good.len()).step_by(41).collect();
    places.extend(good.len() - 8..good.len());
    for at in places {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, &bad).unwrap();
        let error = read_all(dir.path(), &Query::all()).0.unwrap_err();
        assert!(error.is_integrity(), "byte {at}: {error}");
        assert!(
            error.to_string().contains(path.to_str().unwrap()),
            "{error}"
        );
        assert!(!error.to_string().contains('\n'));
        let (rows, skipped) = read_all(dir.path(), &Query::all().skip_damage());
        assert_eq!((rows.unwrap(), skipped.len()), (60, 1), "byte {at}");
    }
    fs::write(&path, &good).unwrap();
    assert_eq!(read_all(dir.path(), &Query::all()).0.unwrap(), 120);
}

#[test]
fn a_torn_file_is_noticed_at_any_length() {
    let (dir, path, _) = history_with_two_hours();
    let good = fs::read(&path).unwrap();
    for length in (0..good.len()).step_by(97) {
        fs::write(&path, &good[..length]).unwrap();
        assert!(
            read_all(dir.path(), &Query::all())
                .0
                .unwrap_err()
                .is_integrity()
        );
        let reader = HistoryReader::open(dir.path()).unwrap();
        assert_eq!(reader.verify().unwrap().len(), 1);
    }
}

#[test]
fn compaction_moves_a_damaged_file_aside_and_keeps_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let store = HistoryStore::open(StoreConfig::new(dir.path())).unwrap();
    for i in 0..3 {
        store.append(&[window(T0 + i * SECOND_NS, "v", 7)]).unwrap();
        store.flush().unwrap();
    }
    let partition = all_partitions(dir.path(), Table::VolumeStats)
        .unwrap()
        .remove(0)
        .path;
    let path = files(&partition).unwrap().remove(1);
    let mut bad = fs::read(&path).unwrap();
    bad[100] ^= 1;
    fs::write(&path, bad).unwrap();
    let done = store.compact_all().unwrap();
    assert_eq!((done.compacted, done.skipped.len()), (1, 1));
    assert_eq!(read_all(dir.path(), &Query::all()).0.unwrap(), 2);
    let aside = fs::read_dir(&partition)
        .unwrap()
        .filter(|entry| {
            entry
                .as_ref()
                .unwrap()
                .path()
                .to_str()
                .unwrap()
                .ends_with(".damaged")
        })
        .count();
    assert_eq!(aside, 1);
}

/// Rewrites a file's metadata with other tools' means: a plain Parquet file with the keys given.
fn foreign(path: &Path, pairs: &[(&str, &str)]) {
    use parquet::file::metadata::KeyValue;
    use parquet::file::properties::WriterProperties;
    let row = window(T0, "v", 1);
    let batch = VolumeWindow::to_batch(&[&row]).unwrap();
    let pairs = pairs
        .iter()
        .map(|(key, value)| KeyValue::new(key.to_string(), value.to_string()));
    let properties = WriterProperties::builder()
        .set_key_value_metadata(Some(pairs.collect()))
        .build();
    let file = fs::File::create(path).unwrap();
    let mut writer =
        parquet::arrow::ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[test]
fn a_newer_schema_is_refused_by_name_and_left_alone() {
    let (dir, path, _) = history_with_two_hours();
    let newer = path.with_file_name("newer.parquet");
    foreign(
        &newer,
        &[("soe.table", "volume_stats"), ("soe.schema_version", "9")],
    );
    let error = read_all(dir.path(), &Query::all()).0.unwrap_err();
    assert!(matches!(error, HistoryError::Version { .. }), "{error}");
    assert!(error.to_string().contains("newer.parquet") && error.to_string().contains('9'));
    let (rows, skipped) = read_all(dir.path(), &Query::all().skip_damage());
    assert_eq!((rows.unwrap(), skipped.len()), (120, 1));
    let store = HistoryStore::open(StoreConfig::new(dir.path())).unwrap();
    let done = store.compact_all().unwrap();
    assert_eq!((done.compacted, done.skipped.len()), (0, 1));
    assert!(newer.exists());
}

#[test]
fn files_of_others_are_read_when_they_say_what_they_are() {
    let (dir, path, _) = history_with_two_hours();
    let other = path.with_file_name("other.parquet");
    foreign(
        &other,
        &[("soe.table", "volume_stats"), ("soe.schema_version", "1")],
    );
    assert_eq!(read_all(dir.path(), &Query::all()).0.unwrap(), 121);
    foreign(
        &other,
        &[("soe.table", "io_trace"), ("soe.schema_version", "1")],
    );
    assert!(HistoryFile::open(&other, Table::VolumeStats).is_err_and(|e| e.is_integrity()));
    foreign(&other, &[]);
    assert!(HistoryFile::open(&other, Table::VolumeStats).is_err_and(|e| e.is_integrity()));
}

/// A full disk: rows wait, then are dropped and counted, and the next file says how many.
#[test]
fn rows_that_can_not_be_written_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let disk = DoomedDisk::new(0, false);
    let mut config = StoreConfig::new(dir.path());
    (config.flush_bytes, config.buffer_bytes) = (1, 40_000);
    let store = HistoryStore::open_on(config, Box::new(disk.clone())).unwrap();
    let mut errors = 0;
    for i in 0..40 {
        errors += usize::from(store.append(&[request(T0 + i, "v", i as u64)]).is_err());
    }
    let stats = store.stats();
    assert!(errors > 0 && stats.rows_dropped > 0);
    assert_eq!(stats.rows_appended, 40);
    assert_eq!(stats.rows_buffered + stats.rows_dropped, 40);
    disk.0.lock().unwrap().left = usize::MAX;
    store.flush().unwrap();
    assert_eq!(store.stats().rows_written, stats.rows_buffered);
    let partition = all_partitions(dir.path(), Table::IoTrace)
        .unwrap()
        .remove(0)
        .path;
    let file = HistoryFile::open(&files(&partition).unwrap()[0], Table::IoTrace).unwrap();
    assert_eq!(file.losses.dropped_rows, stats.rows_dropped);
}
