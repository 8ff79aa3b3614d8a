//! Series that are no good: each gives one clear sentence or a sensible forecast, never a panic, and what
//! was refused leaves no history behind.

mod support;

use std::fmt::Write as _;
use std::path::Path;

use support::{soe, text, write};

const START: u64 = 1_700_000_100;

fn good(bin: u64) -> String {
    format!("{},v,1,1,{},500\n", START + bin * 300, 1000 + bin % 7 * 100)
}

fn imported(dir: &Path, rows: &str) -> (bool, String) {
    let head = "ts_s,volume,read_ops,write_ops,read_bytes,write_bytes\n";
    let file = write(&dir.join("s.csv"), &format!("{head}{rows}"));
    let history = dir.join("history");
    let output = soe(&[
        "trace",
        "import",
        "--format",
        "series",
        file.to_str().unwrap(),
        "--out",
        history.to_str().unwrap(),
    ]);
    (output.status.success(), text(&output.stderr).to_string())
}

/// The error of a series that cannot be one, and that nothing was kept of it.
fn refused(rows: &str, says: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (taken, error) = imported(dir.path(), rows);
    assert!(!taken && error.contains(says), "{error}");
    assert_eq!(error.trim().lines().count(), 1, "{error}");
    let history = dir.path().join("history");
    let out = dir.path().join("o.parquet");
    let output = soe(&[
        "backtest",
        "load",
        "--history",
        history.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ]);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("no volume_stats"), "{error}");
}

#[test]
fn what_is_no_load_is_refused_and_named() {
    for bad in ["NaN", "-5", "inf", "1e300", "many"] {
        let mut rows: String = (0..20).map(good).collect();
        writeln!(rows, "{},v,1,1,{bad},5", START + 20 * 300).unwrap();
        refused(&rows, &format!("s.csv:22: read_bytes is {bad:?}"));
    }
}

#[test]
fn a_clock_that_goes_back_is_refused_and_named() {
    let rows: String = (0..20).chain(5..10).map(good).collect();
    refused(&rows, "s.csv:22: volume v: this bin does not follow");
}

#[test]
fn one_point_and_none_are_refused_in_words() {
    refused(&good(0), "one bin alone");
    refused("", "no line");
}

#[test]
fn constant_dead_and_short_series_are_forecast() {
    let constant = |load: u64, bins: u64| -> String {
        (0..bins)
            .map(|bin| format!("{},v,1,1,{load},0\n", START + bin * 300))
            .collect()
    };
    let short: String = (0..3).map(good).collect();
    for rows in [constant(3_000, 288 * 9), constant(0, 288 * 9), short] {
        let dir = tempfile::tempdir().unwrap();
        let (taken, error) = imported(dir.path(), &rows);
        assert!(taken, "{error}");
        for verb in ["load", "bursts", "windows"] {
            let output = soe(&[
                "backtest",
                verb,
                "--history",
                dir.path().join("history").to_str().unwrap(),
                "--out",
                dir.path().join("o.parquet").to_str().unwrap(),
            ]);
            assert!(output.status.success(), "{verb}: {}", text(&output.stderr));
        }
    }
}
