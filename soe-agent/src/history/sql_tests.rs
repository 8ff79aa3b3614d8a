//! Queries: right, read-only, bounded, and clear about mistakes and damage.

use std::path::PathBuf;

use super::*;
use crate::history::tests::window;
use crate::history::{HistoryStore, StoreConfig, partition};
use crate::window::SECOND_NS;

const T0: i64 = 1_767_225_600 * SECOND_NS;

fn history() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let store = HistoryStore::open(StoreConfig::new(dir.path())).unwrap();
    for hour in 0..3 {
        let rows: Vec<_> = (0..50)
            .map(|i| {
                window(
                    T0 + (hour * 3600 + i) * SECOND_NS,
                    if i % 2 == 0 { "a" } else { "b" },
                    5,
                )
            })
            .collect();
        store.append(&rows).unwrap();
    }
    store.close().unwrap();
    dir
}

fn ask_as(dir: &Path, query: &str, format: SqlFormat) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let mut out = Vec::new();
    runtime.block_on(run_sql(dir, query, SqlLimits::default(), format, &mut out))?;
    Ok(String::from_utf8(out).unwrap())
}

fn ask(dir: &Path, query: &str) -> Result<Vec<serde_json::Value>> {
    let lines = ask_as(dir, query, SqlFormat::JsonLines)?;
    Ok(lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect())
}

#[test]
fn sums_are_those_of_the_rows() {
    let dir = history();
    let rows = ask(
        dir.path(),
        "SELECT volume, hour, CAST(dt AS VARCHAR) AS dt, sum(read_ops) AS ops, count(*) AS n \
         FROM volume_stats WHERE ts < TIMESTAMP '2026-01-01T02:00:00Z' AND hour = 1 \
         GROUP BY volume, hour, dt ORDER BY volume",
    )
    .unwrap();
    assert_eq!(
        rows,
        [
            serde_json::json!({"volume": "a", "hour": 1, "dt": "2026-01-01", "ops": 125, "n": 25}),
            serde_json::json!({"volume": "b", "hour": 1, "dt": "2026-01-01", "ops": 125, "n": 25}),
        ]
    );
}

#[test]
fn missing_values_are_null_and_times_are_utc() {
    let dir = history();
    let query =
        "SELECT ts, write_bytes, read_latency_histogram FROM volume_stats ORDER BY ts LIMIT 1";
    let row = ask(dir.path(), query).unwrap().remove(0);
    assert_eq!(row["ts"], "2026-01-01T00:00:00Z");
    assert_eq!(row["write_bytes"], serde_json::Value::Null);
    assert_eq!(
        row["read_latency_histogram"][0],
        serde_json::json!({"from_ns": 960, "count": 1})
    );
}

#[test]
fn tables_without_rows_are_there() {
    let dir = tempfile::tempdir().unwrap();
    for table in Table::ALL {
        let rows = ask(dir.path(), &format!("SELECT count(*) AS n FROM {table}")).unwrap();
        assert_eq!(rows, [serde_json::json!({"n": 0})]);
    }
    let text = ask_as(dir.path(), "SELECT ts, id FROM events", SqlFormat::Table).unwrap();
    assert_eq!(text, "ts  id\n--  --\n");
    assert!(ask(dir.path(), "SHOW TABLES").unwrap().len() >= Table::ALL.len());
}

#[test]
fn a_table_for_eyes() {
    let dir = history();
    let query = "SELECT volume, count(*) AS n FROM volume_stats GROUP BY volume ORDER BY volume";
    let text = ask_as(dir.path(), query, SqlFormat::Table).unwrap();
    assert_eq!(text, "volume   n\n------  --\na       75\nb       75\n");
}

#[test]
fn nothing_can_be_changed() {
    let dir = history();
    let target = dir.path().join("stolen.csv");
    for query in [
        "DROP TABLE volume_stats",
        "CREATE TABLE x AS SELECT 1",
        "INSERT INTO events SELECT * FROM events",
        &format!("COPY volume_stats TO '{}'", target.display()),
        &format!(
            "CREATE EXTERNAL TABLE x STORED AS CSV LOCATION '{}'",
            target.display()
        ),
        "SET datafusion.execution.batch_size = 1",
        "DELETE FROM volume_stats",
    ] {
        let error = ask(dir.path(), query).unwrap_err();
        assert!(error.is_usage(), "{query}: {error}");
    }
    assert!(!target.exists());
    assert_eq!(
        ask(dir.path(), "SELECT count(*) AS n FROM volume_stats").unwrap()[0]["n"],
        150
    );
}

#[test]
fn mistakes_and_damage_are_one_sentence() {
    let dir = history();
    for query in [
        "SELEC 1",
        "SELECT nothing FROM volume_stats",
        "SELECT * FROM nowhere",
        "",
        "SELECT '/etc/passwd'.x",
        "SELECT * FROM '/etc/passwd'",
    ] {
        let error = ask(dir.path(), query).unwrap_err().to_string();
        assert!(
            !error.contains('\n') && error.len() < 400,
            "{query}: {error}"
        );
    }
    let missing = ask(&dir.path().join("none"), "SELECT 1").unwrap_err();
    assert!(missing.to_string().contains("none"));
    let partition = partition::all_partitions(dir.path(), Table::VolumeStats)
        .unwrap()
        .remove(0);
    let path = partition::files(&partition.path).unwrap().remove(0);
    std::fs::write(&path, b"PAR1 this is no parquet PAR1").unwrap();
    let error = ask(dir.path(), "SELECT sum(read_ops) FROM volume_stats").unwrap_err();
    assert!(
        error.is_integrity() && error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );
}

/// The first file of `volume_stats`.
fn first_file(dir: &Path) -> PathBuf {
    let partition = partition::all_partitions(dir, Table::VolumeStats)
        .unwrap()
        .remove(0);
    partition::files(&partition.path).unwrap().remove(0)
}

/// What damage does to a file: a bit flipped in one place out of `flips`, or the file cut short at
/// one of `cuts` lengths.
fn damaged(good: &[u8], flips: usize, cuts: usize) -> Vec<(String, Vec<u8>)> {
    let flipped = (0..flips).map(|i| {
        let at = i * good.len() / flips;
        let mut bad = good.to_vec();
        bad[at] ^= 1 << (i % 8);
        (format!("bit {} of byte {at}", i % 8), bad)
    });
    let cut = (0..cuts).map(|i| {
        let length = i * good.len() / cuts;
        (format!("cut to {length} bytes"), good[..length].to_vec())
    });
    let short = (1..12).map(|length| (format!("cut to {length} bytes"), good[..length].to_vec()));
    let short = short.filter(|_| cuts > 0);
    flipped.chain(cut).chain(short).collect()
}

/// Every column of every row, in an order of its own: no byte of the data is left unread.
const ALL: &str = "SELECT * FROM volume_stats ORDER BY ts, volume";

/// Whatever happens to a file, the query ends with one sentence that names it.
#[test]
fn damage_anywhere_is_one_sentence_and_never_a_number() {
    let dir = history();
    let path = first_file(dir.path());
    let good = std::fs::read(&path).unwrap();
    let right = ask(dir.path(), ALL).unwrap();
    for (what, bad) in damaged(&good, 120, 20) {
        std::fs::write(&path, &bad).unwrap();
        for query in [ALL, "SELECT count(*) AS n, max(ts) FROM volume_stats"] {
            match ask(dir.path(), query) {
                // Counts come from the footer alone, which has a proof of its own.
                Ok(rows) => assert!(
                    rows[0]["n"] == 150,
                    "{what}: {query} gave {} rows",
                    rows.len()
                ),
                Err(error) => {
                    let text = error.to_string();
                    assert!(error.is_integrity(), "{what}: {text}");
                    assert!(text.contains(path.to_str().unwrap()), "{what}: {text}");
                    assert!(!text.contains('\n') && text.len() < 600, "{what}: {text}");
                }
            }
        }
    }
    std::fs::write(&path, &good).unwrap();
    assert_eq!(ask(dir.path(), ALL).unwrap(), right);
}

/// The same damage is believed by the engine where nobody proves the bytes: the test above would
/// notice if the proof were gone.
#[test]
fn without_the_proof_damage_is_believed() {
    let dir = history();
    let path = first_file(dir.path());
    let good = std::fs::read(&path).unwrap();
    let decode = |bytes: &[u8]| {
        let bytes = bytes::Bytes::from(bytes.to_vec());
        super::super::contain::contained(|| {
            use parquet::arrow::arrow_reader::ParquetRecordBatchReader;
            let reader = ParquetRecordBatchReader::try_new(bytes, 1000).ok()?;
            reader.collect::<std::result::Result<Vec<_>, _>>().ok()
        })
    };
    let right = decode(&good).unwrap();
    assert!(right.is_some());
    let wrong = damaged(&good, 230, 0)
        .iter()
        .filter(|(_, bad)| matches!(decode(bad), Ok(Some(rows)) if Some(&rows) != right.as_ref()))
        .count();
    assert!(wrong > 0, "no flipped bit gave a wrong number");
}

/// A file of somebody else has no checksums: it is read as far as it can be decoded, and what can't
/// be is named; the decoder's panics are nobody's end.
#[test]
fn damage_of_a_file_without_checksums_never_panics() {
    let dir = history();
    let path = first_file(dir.path());
    let good = std::fs::read(&path).unwrap();
    let other = path.with_file_name("other.parquet");
    std::fs::rename(&path, &other).unwrap();
    assert_eq!(ask(dir.path(), ALL).unwrap().len(), 150);
    let mut refused = 0;
    for (what, bad) in damaged(&good, 120, 20) {
        std::fs::write(&other, &bad).unwrap();
        if let Err(error) = ask(dir.path(), ALL) {
            let text = error.to_string();
            assert!(!text.contains('\n') && text.len() < 600, "{what}: {text}");
            refused += 1;
        }
    }
    assert!(refused > 20, "only {refused} damages were noticed");
}

#[test]
fn a_query_that_needs_too_much_memory_says_so() {
    let dir = history();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let query = "SELECT array_agg(a.read_latency_histogram) FROM volume_stats a, volume_stats b, volume_stats c";
    let limits = SqlLimits {
        memory_bytes: 4 << 20,
    };
    let mut out = Vec::new();
    let run = run_sql(dir.path(), query, limits, SqlFormat::JsonLines, &mut out);
    let error = runtime.block_on(run).unwrap_err().to_string();
    assert!(error.contains("memory"), "{error}");
}
