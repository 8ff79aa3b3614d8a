//! The history against an oracle in memory, and its promises one by one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;

use super::partition::{Hour, all_partitions, files};
use super::*;
use crate::window::*;

const S: i64 = SECOND_NS;
const HOUR: i64 = 3600 * S;
/// 2026-01-01T00:00:00Z.
const T0: i64 = 1_767_225_600 * S;

pub(super) fn window(start: i64, volume: &str, read_ops: u64) -> VolumeWindow {
    let mut histogram = LogHistogram::default();
    for i in 0..read_ops.min(50) {
        histogram.record(1000 + i * 77_777, 1);
    }
    VolumeWindow {
        host: "host".into(),
        device_id: "wwid-1".into(),
        read: DirectionStats::measured(read_ops, read_ops * 4096, histogram, Some(9_999_999)),
        write: DirectionStats {
            ops: Some(0),
            bytes: None,
            ..DirectionStats::default()
        },
        discard_ops: Some(1),
        queue_depth: Some(QueueDepth { mean: 0.5, max: 3 }),
        sequential_share: Some(0.25),
        unique_regions: Some(2),
        dropped: 1,
        ..VolumeWindow::unknown(start, S, volume.into())
    }
}

pub(super) fn request(ts: i64, volume: &str, offset: u64) -> IoRecord {
    IoRecord {
        ts,
        volume: volume.into(),
        op: IoOp::Write,
        offset,
        length: 4096,
        latency: Some(123_456),
        cgroup: Some("/system.slice/db.service".into()),
        pid: Some(77),
        comm: None,
        sample_weight: 8,
    }
}

fn store(dir: &Path) -> HistoryStore {
    HistoryStore::open(StoreConfig::new(dir)).unwrap()
}

fn read<R: TableRow>(dir: &Path, query: &Query) -> Vec<R> {
    HistoryReader::open(dir)
        .unwrap()
        .rows(query)
        .unwrap()
        .map(Result::unwrap)
        .collect()
}

fn all_files(dir: &Path) -> Vec<PathBuf> {
    let partitions = Table::ALL
        .iter()
        .flat_map(|&table| all_partitions(dir, table).unwrap());
    partitions
        .flat_map(|partition| files(&partition.path).unwrap())
        .collect()
}

fn round_trip<R: TableRow + Clone + PartialEq + std::fmt::Debug>(row: R) {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.append(std::slice::from_ref(&row)).unwrap();
    store.close().unwrap();
    assert_eq!(read::<R>(dir.path(), &Query::all()), [row]);
}

#[test]
fn every_table_gives_back_what_was_written() {
    round_trip(window(T0, "v", 20));
    round_trip(VolumeWindow::unknown(T0, 300 * S, "v".into()));
    round_trip(request(T0 + 123_456_789, "v", 4096));
    round_trip(RegionHeatRow {
        ts: T0,
        interval: 60 * S,
        volume: "v".into(),
        region: 9,
        read_ops: 1,
        write_ops: 2,
    });
    round_trip(AppStatsRow {
        ts: T0,
        interval: S,
        volume: "v".into(),
        cgroup: "/a".into(),
        app: Some("postgres".into()),
        unit: None,
        container: Some("c1".into()),
        read_ops: 1,
        write_ops: 2,
        read_bytes: 3,
        write_bytes: 4,
    });
    round_trip(EventRow {
        ts: T0,
        received: T0 + S,
        expected: Some(T0 + 60 * S),
        id: "1".into(),
        source: "/ci".into(),
        kind: "deployment".into(),
        subject: None,
        volumes: vec!["v".into(), "w".into()],
        data_content_type: Some("application/json".into()),
        data: Some("{}".into()),
    });
    round_trip(LayerRow {
        ts: T0,
        started: T0 - S,
        group: "g".into(),
        volume: "v".into(),
        layer: "id".into(),
        sequence: 3,
        kind: "differential".into(),
        level: "crash".into(),
        method: "optimistic".into(),
        generation: "gen".into(),
        epoch: 7,
        pause_us: 0,
        changed_blocks: 5,
        bytes_read: 6,
        bytes_stored: 7,
        error: Some("store full".into()),
    });
    round_trip(DecisionRow {
        ts: T0,
        group: None,
        volume: "v".into(),
        action: "wait".into(),
        window_start: Some(T0),
        window_end: None,
        reason: "busy".into(),
    });
    round_trip(ForecastRow {
        issued: T0,
        volume: "v".into(),
        target_start: T0,
        target_end: T0 + S,
        metric: "bytes_per_second".into(),
        q10: 1.0,
        q50: 2.0,
        q80: 3.0,
        q90: 4.0,
        q95: 5.0,
        q99: 6.0,
        burst_probability: None,
        member: "ewma".into(),
    });
    round_trip(StagingRow {
        ts: T0,
        volume: "v".into(),
        action: "staged".into(),
        offset: 1,
        length: 2,
        score: Some(0.5),
        evicted: None,
    });
}

#[test]
fn every_table_has_the_columns_of_its_contract() {
    let contract: BTreeMap<Table, &str> = [
        (Table::VolumeStats, "ts interval_ms host volume device_id read_ops write_ops discard_ops flush_ops read_bytes write_bytes read_latency_p50 read_latency_p90 read_latency_p99 read_latency_p999 read_latency_max read_latency_histogram write_latency_p50 write_latency_p90 write_latency_p99 write_latency_p999 write_latency_max write_latency_histogram queue_depth sequential_share seek_distance_p50 unique_regions reread_share dropped"),
        (Table::RegionHeat, "ts volume region read_ops write_ops"),
        (Table::IoTrace, "ts volume op offset length latency cgroup pid comm sample_weight"),
        (Table::AppStats, "ts volume cgroup app unit container read_ops write_ops bytes"),
        (Table::Events, "ts id source type subject volumes data"),
        (Table::Layers, "ts volume layer kind level method pause_us changed_blocks bytes_read bytes_stored"),
        (Table::Decisions, "ts volume action window_start window_end reason"),
        (Table::Forecasts, "ts volume target_start target_end metric q10 q50 q80 q90 q95 q99 burst_probability member"),
        (Table::Staging, "ts volume action offset length score evicted_at"),
    ]
    .into();
    let manual = include_str!("../../../docs/history-schema.md");
    for table in Table::ALL {
        let schema = table.schema().unwrap();
        for column in contract[&table].split(' ') {
            assert!(
                schema.field_with_name(column).is_ok(),
                "{table} lacks {column}"
            );
        }
        let section = manual
            .split("\n### ")
            .find(|part| part.starts_with(&format!("`{table}`")));
        let section = section.unwrap_or_else(|| panic!("the manual has no section on {table}"));
        for field in schema.fields() {
            let documented = section.contains(&format!("| `{}` |", field.name()));
            assert!(documented, "{table}.{} is not in the manual", field.name());
        }
    }
}

#[derive(Clone, Debug)]
enum Action {
    Append(Vec<(u8, i64)>),
    Flush,
    Reopen,
    CompactAll,
    Maintain,
}

fn any_action() -> impl Strategy<Value = Action> {
    prop_oneof![
        5 => prop::collection::vec((0u8..3, 0i64..4 * 3600), 0..40).prop_map(Action::Append),
        2 => Just(Action::Flush),
        1 => Just(Action::Reopen),
        1 => Just(Action::CompactAll),
        1 => Just(Action::Maintain),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// Whatever is written, flushed, compacted and reopened in whatever order: what is read is what
    /// was written, each row once, sorted, and pruning by time and volume leaves out nothing.
    #[test]
    fn reading_equals_an_oracle(
        actions in prop::collection::vec(any_action(), 1..14),
        from in 0i64..4 * 3600,
        length in 0i64..2 * 3600,
        wanted in prop::collection::btree_set(0u8..4, 0..3),
        keep_hours in 1u64..6,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut open = Some(store(dir.path()));
        let mut oracle: Vec<IoRecord> = Vec::new();
        let mut number = 0;
        for action in actions {
            let current = open.as_ref().unwrap();
            match action {
                Action::Append(rows) => {
                    let rows: Vec<IoRecord> = rows.into_iter().map(|(volume, second)| {
                        number += 1;
                        request(T0 + second * S + number as i64, &format!("v{volume}"), number)
                    }).collect();
                    current.append(&rows).unwrap();
                    oracle.extend(rows);
                }
                Action::Flush => current.flush().unwrap(),
                Action::Reopen => {
                    open.take().unwrap().close().unwrap();
                    open = Some(store(dir.path()));
                }
                Action::CompactAll => drop(current.compact_all().unwrap()),
                Action::Maintain => drop(current.maintain(T0 + 2 * HOUR).unwrap()),
            }
        }
        open.take().unwrap().close().unwrap();
        let key = |row: &IoRecord| (Hour::of(row.ts), row.volume.clone(), row.ts, row.offset);
        let sorted = |mut rows: Vec<IoRecord>| { rows.sort_by_key(key); rows };
        let got: Vec<IoRecord> = read(dir.path(), &Query::all());
        prop_assert_eq!(&sorted(got.clone()), &sorted(oracle.clone()));
        prop_assert!(got.windows(2).all(|pair| key(&pair[0]) < key(&pair[1])));
        let by_time: Vec<IoRecord> = HistoryReader::open(dir.path()).unwrap()
            .rows_by_time(&Query::all()).unwrap().map(Result::unwrap).collect();
        prop_assert!(by_time.windows(2).all(|pair| pair[0].ts <= pair[1].ts));
        prop_assert_eq!(by_time.len(), oracle.len());

        let range = T0 + from * S..T0 + (from + length) * S;
        let names: BTreeSet<String> = wanted.iter().map(|volume| format!("v{volume}")).collect();
        let query = Query::range(range.clone()).volumes(names.clone());
        let expected: Vec<IoRecord> = oracle.iter()
            .filter(|row| range.contains(&row.ts) && names.contains(&*row.volume)).cloned().collect();
        prop_assert_eq!(sorted(read(dir.path(), &query)), sorted(expected));

        // Retention removes whole hours, the oldest, and nothing else.
        let now = T0 + 5 * HOUR;
        let mut config = StoreConfig::new(dir.path());
        config.retention.max_age = Some(Duration::from_secs(keep_hours * 3600));
        HistoryStore::open(config).unwrap().maintain(now).unwrap();
        let left: Vec<IoRecord> = oracle.into_iter()
            .filter(|row| Hour::of(row.ts).end() >= now - keep_hours as i64 * HOUR).collect();
        prop_assert_eq!(sorted(read(dir.path(), &Query::all())), sorted(left));
    }
}

#[test]
fn a_closed_hour_becomes_one_file_with_a_row_group_a_volume() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    for part in 0..6 {
        for volume in ["a", "b"] {
            let rows: Vec<_> = (0..600)
                .map(|i| window(T0 + (part * 600 + i) * S, volume, 3))
                .collect();
            store.append(&rows).unwrap();
        }
        store.note_dropped_events(Table::VolumeStats, 5);
        store.flush().unwrap();
    }
    assert_eq!(all_files(dir.path()).len(), 6);
    // The hour is not over: six files are too few to bother.
    assert_eq!(store.maintain(T0 + HOUR).unwrap().compacted, 0);
    assert_eq!(store.maintain(T0 + 2 * HOUR).unwrap().compacted, 1);
    let files = all_files(dir.path());
    assert_eq!(files.len(), 1);
    let file = file::HistoryFile::open(&files[0], Table::VolumeStats).unwrap();
    assert_eq!((file.rows(), file.row_groups()), (7200, 2));
    assert_eq!(
        file.losses,
        Losses {
            dropped_events: 30,
            dropped_rows: 0
        }
    );
    assert_eq!(fs::read_dir(dir.path().join(".work")).unwrap().count(), 0);
    let query = Query::all().volumes(["b"]).without_bulky();
    let rows: Vec<VolumeWindow> = read(dir.path(), &query);
    assert_eq!(rows.len(), 3600);
    assert!(
        rows.iter()
            .all(|row| row.read.histogram.is_empty() && row.read.latency.is_some())
    );
    let (bins, skipped) = HistoryReader::open(dir.path())
        .unwrap()
        .load_bins(&Query::range(T0..T0 + HOUR), 300 * S)
        .unwrap();
    assert!(skipped.is_empty());
    assert_eq!(bins["a"].bins.len(), 12);
    assert_eq!(bins["a"].bins[3].unwrap().read_ops, Some(900.0));
    let span = HistoryReader::open(dir.path())
        .unwrap()
        .time_span(Table::VolumeStats)
        .unwrap();
    assert_eq!(span, Some((T0, T0 + 3599 * S)));
}

#[test]
fn a_clock_that_steps_back_overwrites_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..3 {
        let store = store(dir.path());
        store.append(&[window(T0, "v", 1)]).unwrap();
        store.close().unwrap();
    }
    assert_eq!(read::<VolumeWindow>(dir.path(), &Query::all()).len(), 3);
    let store = store(dir.path());
    store.compact_all().unwrap();
    assert_eq!(all_files(dir.path()).len(), 1);
    assert_eq!(read::<VolumeWindow>(dir.path(), &Query::all()).len(), 3);
}

#[test]
fn rows_wait_no_longer_than_they_may() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = StoreConfig::new(dir.path());
    config.flush_every = Duration::from_millis(30);
    let store = HistoryStore::open(config).unwrap();
    store.append(&[window(T0, "v", 1)]).unwrap();
    store.tick().unwrap();
    assert_eq!(store.stats().rows_written, 0);
    std::thread::sleep(Duration::from_millis(40));
    store.tick().unwrap();
    assert_eq!(
        (store.stats().rows_written, store.stats().rows_buffered),
        (1, 0)
    );
}

#[test]
fn one_writer_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let first = store(dir.path());
    let second = HistoryStore::open(StoreConfig::new(dir.path()));
    assert!(matches!(second, Err(HistoryError::Locked { .. })));
    first.close().unwrap();
    store(dir.path());
}

#[test]
fn room_is_made_by_removing_the_oldest_hours() {
    let dir = tempfile::tempdir().unwrap();
    let hours = |store: &HistoryStore| all_partitions(store.dir(), Table::VolumeStats).unwrap();
    let opened = store(dir.path());
    for hour in 0..6 {
        opened.append(&[window(T0 + hour * HOUR, "v", 1)]).unwrap();
    }
    opened.flush().unwrap();
    let bytes: u64 = all_files(dir.path())
        .iter()
        .map(|path| fs::metadata(path).unwrap().len())
        .sum();
    opened.close().unwrap();
    let mut config = StoreConfig::new(dir.path());
    config.retention.max_bytes = Some(bytes / 2);
    let store = HistoryStore::open(config.clone()).unwrap();
    let done = store.maintain(T0 + 5 * HOUR + S).unwrap();
    assert!(done.evicted >= 2);
    let left: Vec<Hour> = hours(&store)
        .iter()
        .map(|partition| partition.hour)
        .collect();
    let newest = Hour::of(T0 + 5 * HOUR);
    assert_eq!(
        left,
        (newest.0 + 1 - left.len() as i64..=newest.0)
            .map(Hour)
            .collect::<Vec<_>>()
    );
    store.close().unwrap();
    // No free space at all: all but the present hour goes.
    config.retention = Retention {
        min_free_bytes: Some(u64::MAX),
        ..Retention::default()
    };
    let store = HistoryStore::open(config).unwrap();
    store.maintain(T0 + 5 * HOUR + S).unwrap();
    assert_eq!(hours(&store).len(), 1);
    assert_eq!(hours(&store)[0].hour, newest);
}

#[test]
fn a_flat_result_is_replaced_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("forecasts.parquet");
    for rows in [1, 3] {
        let table = FlatTable::default()
            .column("volume", FlatColumn::Text(vec!["v".into(); rows]))
            .column("issued_at", FlatColumn::Time(vec![T0; rows]))
            .column("q50", FlatColumn::OptNumber(vec![None; rows]))
            .column("alarm", FlatColumn::Truth(vec![true; rows]));
        write_flat(&path, &table).unwrap();
        let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReader::try_new(
            fs::File::open(&path).unwrap(),
            100,
        );
        let read: usize = reader.unwrap().map(|batch| batch.unwrap().num_rows()).sum();
        assert_eq!(read, rows);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let uneven = FlatTable::default()
        .column("a", FlatColumn::Count(vec![1]))
        .column("b", FlatColumn::Count(vec![]));
    assert!(matches!(
        write_flat(&path, &uneven),
        Err(HistoryError::Columns { .. })
    ));
}
