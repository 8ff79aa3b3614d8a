//! The contract of every verb: help, version, bad input, no daemon, JSON, exit codes, one sentence.

mod support;

use soe_agent::api::engine::ErrorKind;
use support::{Daemon, fails, soe, soe_with, text, write};

/// Every verb with arguments it takes, and whether it needs the daemon.
const VERBS: &[(&[&str], bool)] = &[
    (&["volumes"], true),
    (&["top", "--count", "1"], true),
    (&["group", "create", "db", "--volume", "v"], true),
    (&["group", "list"], true),
    (&["group", "status", "db"], true),
    (&["group", "update", "db", "--rpo", "5m"], true),
    (&["group", "delete", "db"], true),
    (&["layer", "capture", "db"], true),
    (&["layer", "list", "db"], true),
    (&["layer", "show", "x"], true),
    (&["layer", "diff", "db", "--volume", "v", "a", "b"], true),
    (&["layer", "verify", "db"], true),
    (
        &["restore", "db", "--volume", "v", "--to", "/nonexistent/x"],
        true,
    ),
    (&["stage", "status", "v"], true),
    (&["stage", "now", "v"], true),
    (&["stage", "drop", "v"], true),
    (&["forecast", "v"], true),
    (&["model", "show"], true),
    (&["model", "train"], true),
    (&["model", "backtest"], true),
    (&["model", "promote", "1"], true),
    (&["model", "rollback"], true),
    (&["events", "list"], true),
    (&["trace", "record", "v", "--for", "1s"], true),
    (&["agent"], false),
    (&["doctor"], false),
    (&["sql", "SELECT 1"], false),
    (
        &[
            "trace",
            "import",
            "--format",
            "csv",
            "x",
            "--volume",
            "v",
            "--out",
            "/nonexistent/y",
        ],
        false,
    ),
    (&["trace", "export", "--history", "/nonexistent/y"], false),
    (
        &[
            "simulate",
            "--history",
            "/nonexistent/y",
            "--out",
            "/nonexistent/z",
        ],
        false,
    ),
    (
        &[
            "backtest",
            "staging",
            "--history",
            "/nonexistent/y",
            "--bursts",
            "/nonexistent/b",
            "--out",
            "/nonexistent/z",
        ],
        false,
    ),
    (
        &[
            "backtest",
            "cache",
            "--history",
            "/nonexistent/y",
            "--out",
            "/nonexistent/z",
        ],
        false,
    ),
    (&["audit"], false),
    (&["completions", "bash"], false),
    (&["man", "--out", "x"], false),
];

/// The verb without its arguments.
fn path<'a>(args: &[&'a str]) -> Vec<&'a str> {
    let nested = [
        "group", "layer", "stage", "model", "events", "trace", "backtest",
    ];
    let depth = if nested.contains(&args[0]) { 2 } else { 1 };
    args[..depth].to_vec()
}

#[test]
fn every_verb_explains_itself() {
    for (args, _) in VERBS {
        let mut args = path(args);
        args.push("--help");
        let output = soe(&args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(text(&output.stdout).contains("Usage: soe"), "{args:?}");
        assert!(output.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn every_verb_tells_its_version() {
    for (args, _) in VERBS {
        let mut args = path(args);
        args.push("--version");
        let output = soe(&args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(
            text(&output.stdout).contains(env!("CARGO_PKG_VERSION")),
            "{args:?}"
        );
    }
}

#[test]
fn every_verb_refuses_what_it_does_not_know() {
    for (args, _) in VERBS {
        let mut args = args.to_vec();
        args.push("--no-such-flag");
        let output = soe(&args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(text(&output.stderr).starts_with("error: "), "{args:?}");
    }
    for args in [
        &[][..],
        &["no-such-verb"],
        &["group"],
        &["group", "no-such-verb"],
    ] {
        assert_eq!(soe(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn without_a_daemon_clients_say_how_to_start_it() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = format!("unix:{}", dir.path().join("none.sock").display());
    for (args, _) in VERBS.iter().filter(|(_, client)| *client) {
        let mut args = args.to_vec();
        args.extend(["--endpoint", &endpoint]);
        fails(&soe(&args), 3, "start it with `soe agent`");
    }
    // The option wins over the environment, the environment over the default.
    let output = soe_with(&["volumes"], |c| {
        c.env("SOE_ENDPOINT", &endpoint);
    });
    fails(&output, 3, &endpoint);
    fails(
        &soe(&["volumes", "--endpoint", "http://localhost:1"]),
        2,
        "is not unix: and an absolute path",
    );
    // A socket that nobody serves any more.
    let stale = dir.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    fails(
        &soe(&[
            "volumes",
            "--endpoint",
            &format!("unix:{}", stale.display()),
        ]),
        3,
        "Connection refused",
    );
}

#[test]
fn each_kind_of_error_has_its_exit_code() {
    let daemon = Daemon::start();
    for kind in ErrorKind::ALL {
        daemon.engine.fail_next(*kind, "it failed\nbadly");
        fails(
            &daemon.soe(&["volumes"]),
            i32::from(kind.exit_code()),
            "it failed badly",
        );
    }
}

#[test]
fn bad_arguments_are_wrong_usage() {
    let daemon = Daemon::start();
    for args in [
        &["group", "create", "db", "--volume", "v", "--rpo", "soon"][..],
        &["group", "create", "db", "--volume", "v", "--rpo", "1500ms"],
        &["group", "create", "db", "--volume", "v", "--rpo", "0s"],
        &[
            "group",
            "create",
            "db",
            "--volume",
            "v",
            "--criticality",
            "extreme",
        ],
        &[
            "group",
            "create",
            "db",
            "--volume",
            "v",
            "--prediction",
            "maybe",
        ],
        &["group", "create", "../db", "--volume", "v"],
        &["group", "create", "db", "--volume", "v", "--volume", "v"],
        &["group", "create", "db"],
        &["group", "update", "db"],
        &["layer", "capture", "db", "--kind", "fuzzy"],
        &[
            "restore",
            "db",
            "--volume",
            "v",
            "--to",
            "x",
            "--at",
            "yesterday",
        ],
        &[
            "restore",
            "db",
            "--volume",
            "v",
            "--to",
            "x",
            "--at",
            "2026-01-01T00:00:00Z",
            "--layer",
            "y",
        ],
        &["restore", "db", "--volume", "v"],
        &["forecast", "v", "--horizon", "1ns"],
        &["trace", "record", "v", "--for", "1us"],
        &[
            "trace",
            "import",
            "--format",
            "blktrace",
            "x",
            "--volume",
            "v",
            "--out",
            "/tmp/never-made",
        ],
        &["top", "--interval", "1ms"],
        &["events", "list", "--limit", "0"],
    ] {
        let output = daemon.soe(args);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{args:?}: {}",
            text(&output.stderr)
        );
        assert!(!text(&output.stderr).contains("panicked"), "{args:?}");
    }
    assert!(daemon.engine.last_spec.lock().unwrap().is_none());
}

#[test]
fn a_bad_configuration_names_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let config = write(&dir.path().join("soe.toml"), "[agent]\n\nlgo = \"info\"\n");
    let path = config.to_str().unwrap();
    for args in [
        &["agent", "--config", path][..],
        &["audit", "--config", path],
        &["doctor", "--config", path],
        &["sql", "SELECT 1", "--config", path],
        &[
            "simulate",
            "--history",
            "/nonexistent/h",
            "--out",
            "/nonexistent/o",
            "--config",
            path,
        ],
    ] {
        fails(&soe(args), 2, &format!("{path}:3: unknown field `lgo`"));
    }
    fails(
        &soe(&["agent", "--config", "/nonexistent/soe.toml"]),
        1,
        "configuration /nonexistent/soe.toml",
    );
    let loud = write(
        &dir.path().join("loud.toml"),
        "[agent]\nlog = \"soe_agent=loud\"\n",
    );
    fails(
        &soe(&[
            "agent",
            "--check-config",
            "--config",
            loud.to_str().unwrap(),
        ]),
        2,
        "agent.log",
    );
    let good = concat!(env!("CARGO_MANIFEST_DIR"), "/../dist/soe.toml");
    assert!(
        soe(&["agent", "--check-config", "--config", good])
            .status
            .success()
    );
}

#[test]
fn completions_and_man_pages_come_from_the_definitions() {
    for shell in ["bash", "zsh", "fish"] {
        let script = text(&soe(&["completions", shell]).stdout);
        assert!(
            script.contains("capture") && script.contains("forecast"),
            "{shell}"
        );
    }
    let dir = tempfile::tempdir().unwrap();
    assert!(
        soe(&["man", "--out", dir.path().to_str().unwrap()])
            .status
            .success()
    );
    for page in [
        "soe.1",
        "soe-group-create.1",
        "soe-layer-verify.1",
        "soe-restore.1",
    ] {
        let roff = std::fs::read_to_string(dir.path().join(page)).unwrap();
        assert!(roff.contains(".SH NAME"), "{page}");
    }
    assert!(!dir.path().join("soe-freeze-guard.1").exists());
}

#[test]
fn verbs_of_later_versions_are_not_there() {
    for verb in ["export", "attach", "detach", "backtest"] {
        assert_eq!(soe(&[verb]).status.code(), Some(2), "{verb}");
    }
    for verb in ["merge", "prune"] {
        assert_eq!(soe(&["layer", verb, "db"]).status.code(), Some(2), "{verb}");
    }
}
