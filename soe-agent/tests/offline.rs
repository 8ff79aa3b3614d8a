//! Verbs that work on files, without a daemon.

mod support;

use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;
use support::{fails, soe, text, write};

/// Two days of five-minute bins with a burst every third hour.
fn series(path: &Path) -> String {
    let mut lines = String::from("ts_s,volume,read_ops,write_ops,read_bytes,write_bytes\n");
    for bin in 0..576u64 {
        let burst = if bin % 36 == 0 { 100 } else { 1 };
        writeln!(
            lines,
            "{},vol1,{burst},{burst},{},{}",
            1_700_006_400 + bin * 300,
            burst * 4096,
            burst * 8192
        )
        .unwrap();
    }
    write(path, &lines).to_str().unwrap().to_owned()
}

#[test]
fn a_history_is_imported_and_simulated() {
    let dir = tempfile::tempdir().unwrap();
    let trace = series(&dir.path().join("trace.csv"));
    let history = dir.path().join("history");
    let history = history.to_str().unwrap();
    let output = soe(&[
        "trace", "import", "--format", "series", &trace, "--out", history, "--json",
    ]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (report["lines"].as_u64(), &report["volumes"][0]),
        (Some(576), &Value::from("vol1"))
    );
    let out = dir.path().join("out");
    let run = |out: &Path| {
        let output = soe(&[
            "simulate",
            "--history",
            history,
            "--out",
            out.to_str().unwrap(),
            "--json",
        ]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        output.stdout
    };
    let summary: Value = serde_json::from_slice(&run(&out)).unwrap();
    assert_eq!(summary["volumes"], 1);
    assert!(summary["decisions"].as_u64().unwrap() > 0, "{summary}");
    for name in ["forecasts.parquet", "decisions.parquet", "staged.parquet"] {
        let bytes = std::fs::read(out.join(name)).unwrap();
        assert_eq!(
            (&bytes[..4], &bytes[bytes.len() - 4..]),
            (&b"PAR1"[..], &b"PAR1"[..]),
            "{name}"
        );
    }
    let written: Value =
        serde_json::from_slice(&std::fs::read(out.join("summary.json")).unwrap()).unwrap();
    assert_eq!(written, summary);
    // The same history and configuration give the same result.
    let again = dir.path().join("again");
    assert_eq!(
        run(&again),
        serde_json::to_vec(&summary)
            .unwrap()
            .into_iter()
            .chain(*b"\n")
            .collect::<Vec<_>>()
    );
    for name in ["forecasts.parquet", "decisions.parquet"] {
        assert!(
            std::fs::read(out.join(name)).unwrap() == std::fs::read(again.join(name)).unwrap(),
            "{name} differs"
        );
    }
}

#[test]
fn traces_go_in_and_come_out() {
    let dir = tempfile::tempdir().unwrap();
    let lines = "ts_us,volume,op,offset,length,latency_us\n1700000000000000,v,R,0,4096,100\n1700000000000500,v,W,8192,4096,200\n";
    let trace = write(&dir.path().join("trace.csv"), lines);
    let history = dir.path().join("history");
    let history = history.to_str().unwrap();
    let output = soe(&[
        "trace",
        "import",
        "--format",
        "csv",
        trace.to_str().unwrap(),
        "--out",
        history,
    ]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let exported = text(&soe(&["trace", "export", "--history", history]).stdout);
    assert_eq!(exported.lines().count(), 3, "{exported}");
    assert!(exported.contains("8192,4096,200"), "{exported}");
    let none = text(&soe(&["trace", "export", "--history", history, "--volume", "other"]).stdout);
    assert_eq!(none.lines().count(), 1);
    let late = text(
        &soe(&[
            "trace",
            "export",
            "--history",
            history,
            "--from",
            "2030-01-01T00:00:00Z",
        ])
        .stdout,
    );
    assert_eq!(late.lines().count(), 1);
}

/// Every `*.parquet` below `dir`.
fn parquet_files(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "parquet") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

#[test]
fn a_damaged_history_is_named_and_never_a_number() {
    let dir = tempfile::tempdir().unwrap();
    let trace = series(&dir.path().join("trace.csv"));
    let history = dir.path().join("history");
    let import = [
        "trace",
        "import",
        "--format",
        "series",
        &trace,
        "--out",
        history.to_str().unwrap(),
    ];
    assert!(soe(&import).status.success());
    let history = history.to_str().unwrap();
    let query = [
        "sql",
        "SELECT sum(read_ops) FROM volume_stats",
        "--history",
        history,
    ];
    assert!(soe(&query).status.success());
    let path = parquet_files(Path::new(history)).remove(7);
    let good = std::fs::read(&path).unwrap();
    for at in [0, 4, good.len() / 3, good.len() / 2, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        std::fs::write(&path, bad).unwrap();
        fails(&soe(&query), 5, path.to_str().unwrap());
    }
    for length in [0, 1, good.len() / 2, good.len() - 1] {
        std::fs::write(&path, &good[..length]).unwrap();
        fails(&soe(&query), 5, path.to_str().unwrap());
    }
    std::fs::write(&path, &good).unwrap();
    assert!(soe(&query).status.success());
}

/// What an event announces is a column of the history, and the planner of a simulation acts on it
/// from the event's arrival on.
#[test]
fn an_announced_burst_is_staged_for_in_a_simulation() {
    use soe_agent::history::{HistoryStore, StoreConfig};
    use soe_agent::window::{EventRow, SECOND_NS};
    let dir = tempfile::tempdir().unwrap();
    let trace = series(&dir.path().join("trace.csv"));
    let history = dir.path().join("history");
    let path = history.to_str().unwrap();
    let import = [
        "trace", "import", "--format", "series", &trace, "--out", path,
    ];
    assert!(soe(&import).status.success());
    let arrived = (1_700_006_400 + 400 * 300) * SECOND_NS;
    let store = HistoryStore::open(StoreConfig::new(&history)).unwrap();
    store
        .append(&[EventRow {
            ts: arrived,
            received: arrived,
            expected: Some(arrived + 3000 * SECOND_NS),
            id: "1".into(),
            source: "/ci".into(),
            kind: "com.example.backup".into(),
            subject: None,
            volumes: vec!["vol1".into()],
            data_content_type: None,
            data: None,
        }])
        .unwrap();
    store.close().unwrap();
    let out = dir.path().join("out");
    let out = out.to_str().unwrap();
    let output = soe(&["simulate", "--history", path, "--out", out]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let announced = |dir: &Path| {
        let bytes = std::fs::read(dir.join("decisions.parquet")).unwrap();
        let needle = b"a burst was announced";
        bytes.windows(needle.len()).any(|w| w == needle)
    };
    assert!(announced(Path::new(out)));
    // Without the event nothing of the kind is decided.
    for file in parquet_files(&history.join("events")) {
        std::fs::remove_file(file).unwrap();
    }
    let without = dir.path().join("without");
    let output = soe(&[
        "simulate",
        "--history",
        path,
        "--out",
        without.to_str().unwrap(),
    ]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!announced(&without));
}

#[test]
fn what_is_not_there_is_said_in_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let missing = missing.to_str().unwrap();
    let out = dir.path().join("out");
    let out = out.to_str().unwrap();
    fails(
        &soe(&["simulate", "--history", missing, "--out", out]),
        1,
        missing,
    );
    fails(&soe(&["trace", "export", "--history", missing]), 1, missing);
    fails(
        &soe(&["layer", "verify", "db", "--store", missing]),
        1,
        missing,
    );
    fails(
        &soe(&["trace", "import", "--format", "csv", missing, "--out", out]),
        1,
        missing,
    );
    let bad = write(
        &dir.path().join("bad.csv"),
        "ts_us,volume,op,offset,length\n1,v,R,zero,1\n",
    );
    let bad = bad.to_str().unwrap();
    fails(
        &soe(&["trace", "import", "--format", "csv", bad, "--out", out]),
        1,
        &format!("{bad}:2: "),
    );
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    fails(
        &soe(&[
            "simulate",
            "--history",
            empty.to_str().unwrap(),
            "--out",
            out,
        ]),
        1,
        "has no volume_stats",
    );
    fails(
        &soe(&["layer", "verify", "db", "--store", empty.to_str().unwrap()]),
        1,
        "there is no layer store",
    );
}

#[test]
fn the_doctor_looks_and_says_what_to_do() {
    let output = soe(&["doctor", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["ready"], output.status.success());
    let checks = report["checks"].as_array().unwrap();
    assert_eq!(checks.len(), 7);
    for check in checks {
        let state = check["state"].as_str().unwrap();
        assert!(["ok", "warning", "missing"].contains(&state), "{check}");
        assert_eq!(check["mend"].is_null(), state == "ok", "{check}");
    }
}
