//! What the verbs do with a daemon: arguments that arrive as meant, answers that are shown.

mod support;

use std::collections::BTreeSet;
use std::io::Read;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use soe_agent::api::types::{Criticality, LayerKind, RestorePoint};
use support::{Daemon, fails, soe_with, text, write};

#[test]
fn json_has_stable_names() {
    let daemon = Daemon::start();
    let names = |value: &Value| -> BTreeSet<String> {
        value.as_object().unwrap().keys().cloned().collect()
    };
    let all = |list: &[&str]| -> BTreeSet<String> { list.iter().map(|s| s.to_string()).collect() };
    let group = daemon.json(&[
        "group",
        "create",
        "db",
        "--volume",
        "/dev/loop0",
        "--volume",
        "/dev/loop1",
    ]);
    assert_eq!(
        names(&group),
        all(&[
            "group",
            "prediction_enabled",
            "rpo_s",
            "max_pause_us",
            "p99_target_us",
            "app",
            "criticality",
            "created_at",
            "missed_pause_budgets",
            "last_error",
            "hosts",
            "volumes"
        ])
    );
    assert_eq!(daemon.json(&["group", "status", "db"]), group);
    assert_eq!(daemon.json(&["group", "list"]), json!({"groups": [group]}));
    let layers = daemon.json(&["layer", "list", "db", "--volume", "/dev/loop0"]);
    let listed = layers["layers"].as_array().unwrap();
    assert_eq!(
        listed
            .iter()
            .map(|l| l["sequence"].as_u64().unwrap())
            .collect::<Vec<_>>(),
        [1, 2],
        "oldest first"
    );
    assert_eq!(
        names(&listed[0]),
        all(&[
            "id",
            "group",
            "volume",
            "sequence",
            "kind",
            "level",
            "method",
            "pause_us",
            "skew_us",
            "changed_blocks",
            "block_size_bytes",
            "bytes_read",
            "bytes_stored",
            "started_at",
            "cut_at",
            "finished_at",
            "generation",
            "epoch",
            "rescan_reason",
            "volume_bytes",
            "state_root"
        ])
    );
    assert_eq!(
        daemon.json(&["layer", "capture", "db"])["layers"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    assert_eq!(
        daemon.json(&["layer", "show", "x"])["compression"],
        "zstd:1"
    );
    assert_eq!(daemon.json(&["stage", "status", "v"])["hit_ratio"], 0.5);
    assert_eq!(daemon.json(&["forecast", "v"])["points"][0]["q99"], 6.0);
    assert_eq!(
        daemon.json(&["model", "show", "v"])["members"][0]["member"],
        "ewma"
    );
    assert_eq!(daemon.json(&["model", "train"])["training_samples"], 1000);
    for args in [
        &["model", "backtest"][..],
        &["model", "promote", "3"],
        &["model", "promote", "shipped"],
        &["model", "rollback"],
    ] {
        assert_eq!(
            daemon.json(args)["versions"][0]["backtest"],
            0.5,
            "{args:?}"
        );
    }
    assert_eq!(daemon.json(&["volumes"])["volumes"][0]["kind"], "loop");
    assert_eq!(
        daemon.json(&["trace", "record", "v", "--for", "1s"])["dropped"],
        1
    );
    assert_eq!(
        daemon.json(&["group", "update", "db", "--rpo", "5m"])["rpo_s"],
        300
    );
    let top = daemon.json(&["top", "--count", "1"]);
    assert_eq!(names(&top), all(&["groups", "load"]));
    assert_eq!(
        daemon.json(&["group", "delete", "db", "--delete-layers"]),
        json!({"group": "db", "layers_deleted": 5})
    );
}

#[test]
fn tables_are_plain_when_nobody_watches() {
    let daemon = Daemon::start();
    daemon.json(&["group", "create", "db", "--volume", "/dev/loop0"]);
    for args in [
        &["volumes"][..],
        &["group", "list"],
        &["group", "status", "db"],
        &["layer", "list", "db"],
        &["layer", "show", "x"],
        &["forecast", "v"],
        &["forecast", "v", "--plot"],
        &["model", "show"],
        &["stage", "status", "v"],
        &["events", "list"],
        &["top", "--count", "2", "--interval", "100ms"],
    ] {
        let output = daemon.soe(args);
        assert!(
            output.status.success(),
            "{args:?}: {}",
            text(&output.stderr)
        );
        let table = text(&output.stdout);
        assert!(
            !table.is_empty() && !table.contains('\x1b'),
            "{args:?}: {table}"
        );
    }
    let table = text(&daemon.soe(&["layer", "list", "db"]).stdout);
    assert!(
        table.contains("differential") && table.contains("32.0 ms"),
        "{table}"
    );
}

#[test]
fn arguments_reach_the_engine_as_meant() {
    let daemon = Daemon::start();
    let args = [
        "group",
        "create",
        "db",
        "--volume",
        "sda",
        "/dev/sdb",
        "--volume",
        "./disk.img",
        "--prediction",
        "off",
        "--rpo",
        "15m",
        "--max-pause",
        "250ms",
        "--p99-target",
        "5ms",
        "--app",
        "postgres",
        "--criticality",
        "high",
    ];
    assert!(daemon.soe(&args).status.success());
    let spec = daemon.engine.last_spec.lock().unwrap().clone().unwrap();
    assert_eq!(spec.volumes[..2], ["sda", "/dev/sdb"]);
    assert!(spec.volumes[2].starts_with('/') && spec.volumes[2].ends_with("/disk.img"));
    assert!(!spec.prediction_enabled);
    assert_eq!(
        (spec.rpo_s, spec.max_pause_us, spec.p99_target_us),
        (Some(900), Some(250_000), Some(5_000))
    );
    assert_eq!(
        (spec.app.as_deref(), spec.criticality),
        (Some("postgres"), Criticality::High)
    );

    for (args, kind) in [
        (&["layer", "capture", "db"][..], None),
        (&["layer", "capture", "db", "--kind", "auto"], None),
        (
            &["layer", "capture", "db", "--kind", "baseline"],
            Some(LayerKind::Baseline),
        ),
        (
            &["layer", "capture", "db", "--kind", "differential"],
            Some(LayerKind::Differential),
        ),
    ] {
        assert!(daemon.soe(args).status.success());
        assert_eq!(daemon.engine.last_kind.lock().unwrap().take(), Some(kind));
    }

    let restore = |extra: &[&str]| {
        let mut args = vec!["restore", "db", "--volume", "v", "--to", "image"];
        args.extend(extra);
        let output = soe_with(&args, |c| {
            c.env("SOE_ENDPOINT", daemon.endpoint())
                .current_dir(daemon.dir.path());
        });
        assert!(output.status.success(), "{}", text(&output.stderr));
        daemon.engine.last_restore.lock().unwrap().take().unwrap()
    };
    let plain = restore(&[]);
    assert_eq!(plain.target, daemon.dir.path().join("image"));
    assert_eq!(
        (plain.point, plain.differential),
        (RestorePoint::Latest, false)
    );
    assert_eq!(restore(&["--layer", "latest"]).point, RestorePoint::Latest);
    assert_eq!(
        restore(&["--layer", "x", "--differential"]).point,
        RestorePoint::Layer("x".into())
    );
    assert_eq!(
        restore(&["--at", "1970-01-01T00:00:01+00:00"]).point,
        RestorePoint::At(1_000_000_000)
    );
}

#[test]
fn verification_that_finds_something_is_an_integrity_failure() {
    let daemon = Daemon::start();
    daemon.json(&["group", "create", "db", "--volume", "/dev/loop0"]);
    let clean = daemon.json(&["layer", "verify", "db"]);
    assert_eq!(
        clean,
        json!({"layers": 2, "blocks": 3, "bytes": 10, "problems": []})
    );
    *daemon.engine.problems.lock().unwrap() = vec!["block 7 does not match its hash".into()];
    let output = daemon.soe(&["layer", "verify", "db", "--json"]);
    assert_eq!(output.status.code(), Some(5));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        report["problems"][0]["what"],
        "block 7 does not match its hash"
    );
}

#[test]
fn a_difference_is_one_document_however_long() {
    let daemon = Daemon::start();
    let diff = daemon.json(&["layer", "diff", "db", "--volume", "v", "a", "b"]);
    assert_eq!((&diff["from"], &diff["to"]), (&json!("a"), &json!("b")));
    let extents = diff["extents"].as_array().unwrap();
    assert_eq!(extents.len(), 10_001);
    assert_eq!(extents[1], json!({"offset": 131_072, "len": 65_536}));
    let plain = text(
        &daemon
            .soe(&["layer", "diff", "db", "--volume", "v", "a", "b"])
            .stdout,
    );
    assert_eq!(plain.lines().count(), 10_002);
}

#[test]
fn a_closed_pipe_is_no_panic() {
    let daemon = Daemon::start();
    let mut child = Command::new(env!("CARGO_BIN_EXE_soe"))
        .args([
            "layer",
            "diff",
            "db",
            "--volume",
            "v",
            "a",
            "b",
            "--endpoint",
            &daemon.endpoint(),
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(said, "");
}

#[test]
fn events_are_published_from_files() {
    let daemon = Daemon::start();
    let event =
        |id: &str| json!({"specversion": "1.0", "id": id, "source": "/ci", "type": "deploy"});
    let file = write(
        &daemon.dir.path().join("event.json"),
        &event("1").to_string(),
    );
    let file = file.to_str().unwrap();
    assert_eq!(
        daemon.json(&["events", "publish", file]),
        json!({"stored": 1, "already_known": 0})
    );
    let many = write(
        &daemon.dir.path().join("many.json"),
        &json!([event("1"), event("2")]).to_string(),
    );
    assert_eq!(
        daemon.json(&["events", "publish", many.to_str().unwrap()]),
        json!({"stored": 1, "already_known": 1})
    );
    let bad = write(
        &daemon.dir.path().join("bad.json"),
        "{\"specversion\": \"1.0\"}",
    );
    fails(
        &daemon.soe(&["events", "publish", bad.to_str().unwrap()]),
        2,
        "the event lacks the attribute source",
    );
    fails(
        &daemon.soe(&["events", "publish", "/nonexistent/e.json"]),
        1,
        "event file /nonexistent/e.json",
    );
    fails(
        &daemon.soe(&["events", "publish"]),
        2,
        "the body is not JSON",
    );
}

#[test]
fn the_audit_is_shown() {
    let daemon = Daemon::start();
    daemon.json(&["group", "create", "db", "--volume", "/dev/loop0"]);
    fails(
        &daemon.soe(&["group", "create", "db", "--volume", "/dev/loop0"]),
        1,
        "there is a group db already",
    );
    let file = daemon.config.audit_file();
    let shown = daemon.json(&["audit", "--file", file.to_str().unwrap()]);
    let outcomes: Vec<_> = shown["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["outcome"].as_str().unwrap())
        .collect();
    assert_eq!(outcomes, ["done", "failed"]);
    assert_eq!(shown["entries"][0]["subject"], "db");
    let config = write(
        &daemon.dir.path().join("soe.toml"),
        &format!("[agent]\nstate_dir = {:?}\n", daemon.dir.path()),
    );
    let table = text(
        &daemon
            .soe(&["audit", "--config", config.to_str().unwrap()])
            .stdout,
    );
    assert!(table.contains("CreateSnapshotGroup"), "{table}");
    fails(
        &daemon.soe(&["audit", "--file", "/nonexistent/audit"]),
        1,
        "audit file /nonexistent/audit",
    );
}
