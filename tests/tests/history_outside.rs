//! The history is plain Parquet: DuckDB and pyarrow, which share no code with SOE, read every table.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use soe_agent::history::{HistoryStore, StoreConfig, TableRow};
use soe_agent::window::{
    AppStatsRow, DecisionRow, DirectionStats, EventRow, ForecastRow, IoOp, IoRecord, LayerRow,
    LogHistogram, QueueDepth, RegionHeatRow, SECOND_NS, StagingRow, VolumeWindow,
};
use soe_tests::venv;

/// 2026-01-01T23:59:30Z, so that the rows fall into two days.
const T0: i64 = 1_767_311_970 * SECOND_NS;
const ROWS: i64 = 60;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn fill<R: TableRow>(store: &HistoryStore, row: impl Fn(i64) -> R) -> Result<()> {
    let rows: Vec<R> = (0..ROWS).map(|i| row(T0 + i * SECOND_NS)).collect();
    store.append(&rows)?;
    Ok(())
}

fn write_every_table(dir: &Path) -> Result<()> {
    let store = HistoryStore::open(StoreConfig::new(dir))?;
    fill(&store, |ts| {
        let mut histogram = LogHistogram::default();
        histogram.record(100_000, 2);
        histogram.record(5_000_000, 1);
        VolumeWindow {
            read: DirectionStats::measured(3, 12_288, histogram, Some(5_100_000)),
            queue_depth: Some(QueueDepth { mean: 0.25, max: 2 }),
            ..VolumeWindow::unknown(ts, SECOND_NS, "/dev/loop0".into())
        }
    })?;
    fill(&store, |ts| RegionHeatRow {
        ts,
        interval: 60 * SECOND_NS,
        volume: "/dev/loop0".into(),
        region: 7,
        read_ops: 1,
        write_ops: 0,
    })?;
    fill(&store, |ts| IoRecord {
        ts: ts + 123_456_789,
        volume: "/dev/loop0".into(),
        op: IoOp::Read,
        offset: 4096,
        length: 4096,
        latency: Some(100_000),
        cgroup: Some("/system.slice".into()),
        pid: Some(1),
        comm: Some("fio".into()),
        sample_weight: 1,
    })?;
    fill(&store, |ts| AppStatsRow {
        ts,
        interval: SECOND_NS,
        volume: "/dev/loop0".into(),
        cgroup: "/system.slice".into(),
        app: None,
        unit: Some("db.service".into()),
        container: None,
        read_ops: 1,
        write_ops: 1,
        read_bytes: 1,
        write_bytes: 1,
    })?;
    fill(&store, |ts| EventRow {
        ts,
        received: ts,
        expected: Some(ts + 60 * SECOND_NS),
        id: ts.to_string(),
        source: "/ci".into(),
        kind: "deployment".into(),
        subject: None,
        volumes: vec!["/dev/loop0".into(), "ü".into()],
        data_content_type: None,
        data: Some("{\"a\":1}".into()),
    })?;
    fill(&store, |ts| LayerRow {
        ts,
        started: ts,
        group: "db".into(),
        volume: "/dev/loop0".into(),
        layer: "l1".into(),
        sequence: 0,
        kind: "baseline".into(),
        level: "crash".into(),
        method: "optimistic".into(),
        generation: "g".into(),
        epoch: 1,
        pause_us: 0,
        changed_blocks: 0,
        bytes_read: 0,
        bytes_stored: 0,
        error: None,
    })?;
    fill(&store, |ts| DecisionRow {
        ts,
        group: None,
        volume: "/dev/loop0".into(),
        action: "wait".into(),
        window_start: None,
        window_end: Some(ts),
        reason: "no quiet window yet".into(),
    })?;
    fill(&store, |ts| ForecastRow {
        issued: ts,
        volume: "/dev/loop0".into(),
        target_start: ts,
        target_end: ts + SECOND_NS,
        metric: "bytes_per_second".into(),
        q10: 0.0,
        q50: 1.0,
        q80: 2.0,
        q90: 3.0,
        q95: 4.0,
        q99: 5.0,
        burst_probability: Some(0.5),
        member: "ewma".into(),
    })?;
    fill(&store, |ts| StagingRow {
        ts,
        volume: "/dev/loop0".into(),
        action: "staged".into(),
        offset: 0,
        length: 4096,
        score: None,
        evicted: None,
    })?;
    store.close()?;
    Ok(())
}

/// Table and column of every line of the tables in docs/history-schema.md, in their order.
fn documented_columns() -> Result<Vec<(String, String)>> {
    let path = root().join("docs/history-schema.md");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let (mut table, mut found) = (None, Vec::new());
    for line in text.lines() {
        if line.starts_with("## ") {
            table = None;
        } else if let Some(heading) = line.strip_prefix("### ") {
            table = Some(heading.trim_matches('`').to_owned());
        } else if let (Some(table), Some(rest)) = (&table, line.strip_prefix("| `")) {
            let column = rest.split('`').next().unwrap_or_default();
            found.push((table.clone(), column.to_owned()));
        }
    }
    Ok(found)
}

#[test]
fn duckdb_and_pyarrow_read_every_table() -> Result<()> {
    let python = match venv::python(&[("duckdb", "duckdb"), ("pyarrow", "pyarrow")]) {
        Ok(python) => python,
        Err(why) => {
            println!("SKIPPED: no DuckDB and pyarrow: {why}");
            return Ok(());
        }
    };
    let dir = tempfile::tempdir()?;
    write_every_table(dir.path())?;
    let script = root().join("tests/python/read_history.py");
    let output = Command::new("timeout")
        .args(["-s", "KILL", "120"])
        .arg(&python)
        .arg(script)
        .arg(dir.path())
        .output()
        .context("running the reader")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let seen: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let described = documented_columns()?;
    for table in soe_agent::history::Table::ALL {
        let table_seen = &seen[table.name()];
        let nanos = if table.name() == "io_trace" {
            123_456_789
        } else {
            0
        };
        let columns: Vec<&str> = described
            .iter()
            .filter(|(name, _)| name == table.name())
            .map(|(_, column)| column.as_str())
            .collect();
        assert!(!columns.is_empty(), "{table} is not documented");
        assert_eq!(table_seen["columns"], serde_json::json!(columns), "{table}");
        assert_eq!(table_seen["rows"], ROWS, "{table}");
        assert_eq!(table_seen["first_ns"], T0 + nanos, "{table}");
        assert_eq!(
            table_seen["last_ns"],
            T0 + (ROWS - 1) * SECOND_NS + nanos,
            "{table}"
        );
        assert_eq!(table_seen["misplaced"], 0, "{table}");
        assert_eq!(table_seen["versions"], serde_json::json!(["1"]), "{table}");
        assert_eq!(table_seen["page_index"], true, "{table}");
        assert_eq!(table_seen["codecs"], serde_json::json!(["ZSTD"]), "{table}");
    }
    assert_eq!(
        seen["sums"],
        serde_json::json!([3 * ROWS, 12_288 * ROWS, 3 * ROWS, ROWS])
    );
    Ok(())
}
