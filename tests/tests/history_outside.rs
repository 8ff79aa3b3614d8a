//! The history is plain Parquet: DuckDB and pyarrow, which share no code with SOE, read every table.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use soe_agent::history::{HistoryStore, StoreConfig, TableRow};
use soe_agent::window::{
    AppStatsRow, DecisionRow, DirectionStats, EventRow, ForecastRow, IoOp, IoRecord, LayerRow,
    LogHistogram, QueueDepth, RegionHeatRow, SECOND_NS, StagingRow, VolumeWindow,
};

/// 2026-01-01T23:59:30Z, so that the rows fall into two days.
const T0: i64 = 1_767_311_970 * SECOND_NS;
const ROWS: i64 = 60;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The Python of `target/venv` with DuckDB and pyarrow, which is made on demand; `None` with the
/// reason printed when it can't be made here.
fn python() -> Option<PathBuf> {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let venv = target.join("venv");
    let python = venv.join("bin").join("python");
    let run = |what: &str, command: &mut Command| match command.output() {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr);
            eprintln!(
                "skipped: {what} failed: {}",
                why.lines().last().unwrap_or("no reason given")
            );
            false
        }
        Err(error) => {
            eprintln!("skipped: {what} can't be run: {error}");
            false
        }
    };
    let ready = || {
        let import = Command::new(&python)
            .args(["-c", "import duckdb, pyarrow"])
            .output();
        import.is_ok_and(|output| output.status.success())
    };
    if ready() {
        return Some(python);
    }
    let seconds = |limit: &str| {
        let mut command = Command::new("timeout");
        command.args(["-s", "KILL", limit]);
        command
    };
    let made = run(
        "python3 -m venv",
        seconds("60").args(["python3", "-m", "venv"]).arg(&venv),
    );
    let installed = made
        && run(
            "pip install duckdb pyarrow",
            seconds("300")
                .arg(&python)
                .args(["-m", "pip", "install", "-q", "duckdb", "pyarrow"]),
        );
    (installed && ready()).then_some(python)
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

#[test]
fn duckdb_and_pyarrow_read_every_table() -> Result<()> {
    let Some(python) = python() else {
        return Ok(());
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
    for table in soe_agent::history::Table::ALL {
        let table_seen = &seen[table.name()];
        let nanos = if table.name() == "io_trace" {
            123_456_789
        } else {
            0
        };
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
