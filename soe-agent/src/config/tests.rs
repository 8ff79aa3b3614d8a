use super::*;
use crate::api::types::Criticality;
use std::time::Duration;

const EXAMPLE: &str = include_str!("../../../dist/soe.toml");

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("soe.toml")).map_err(|e| e.to_string())
}

/// Takes the comment sign off every line that begins with one of `marks` and holds a key or a table.
fn uncommented(marks: &[&str]) -> String {
    let is_setting = |line: &str| {
        line.starts_with('[')
            || line
                .split_once(" = ")
                .is_some_and(|(k, _)| !k.contains(' '))
    };
    let lines = EXAMPLE.lines().map(|line| {
        let bare = marks
            .iter()
            .find_map(|mark| line.strip_prefix(mark))
            .filter(|bare| is_setting(bare));
        bare.unwrap_or(line)
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_example_is_valid_and_changes_nothing() {
    assert_eq!(parse(EXAMPLE), Ok(Config::default()));
}

#[test]
fn the_example_shows_the_real_defaults() {
    assert_eq!(parse(&uncommented(&["# "])), Ok(Config::default()));
}

#[test]
fn the_example_names_every_key() {
    let with_examples = uncommented(&["# example: ", "# "]);
    let config = parse(&with_examples).unwrap();
    assert_eq!(config.host.app.len(), 1);
    let all = serde_json::to_value(&config).unwrap();
    let reserved = ["tls", "url", "key_file"];
    fn check(value: &serde_json::Value, key: &str, reserved: &[&str]) {
        match value {
            serde_json::Value::Object(map) => map.iter().for_each(|(k, v)| check(v, k, reserved)),
            serde_json::Value::Array(items) => items.iter().for_each(|v| check(v, key, reserved)),
            serde_json::Value::Null => {
                assert!(reserved.contains(&key), "dist/soe.toml shows no {key}")
            }
            _ => assert!(
                EXAMPLE
                    .lines()
                    .any(|l| l.starts_with(&format!("# {key} = "))
                        || l.starts_with(&format!("# example: {key} = "))),
                "dist/soe.toml shows no {key}"
            ),
        }
    }
    check(&all, "", &reserved);
}

#[test]
fn everything_the_surface_shows_is_read() {
    let config = parse(
        r#"
[agent]
state_dir = "/srv/soe"
[api]
listen = "unix:/run/soe/soe.sock"
http = "[::1]:9620"
[history]
dir = "/srv/history"
interval = "1s"
retention = "30d"
[store]
dir = "/srv/store"
compression = "none"
[staging]
path = "/nvme/staging"
budget = "8GiB"
[limits]
cpu = 1
memory = "512MiB"
capture_bandwidth = "100MiB"
[[host.app]]
cgroup = "/system.slice/postgresql.service"
type = "postgres"
criticality = "high"
p99 = "5ms"
rpo = "15m"
[[event.source]]
type = "cloudevents"
"#,
    )
    .unwrap();
    assert_eq!(config.state_dir(), Path::new("/srv/soe"));
    assert_eq!(config.audit_file(), Path::new("/srv/soe/audit.jsonl"));
    assert_eq!(config.history_dir(), Path::new("/srv/history"));
    assert_eq!(config.store_dir(), Path::new("/srv/store"));
    assert_eq!(config.store.compression, Compression::None);
    assert_eq!(
        config.limits.capture_bandwidth,
        Bandwidth::BytesPerSecond(100 << 20)
    );
    assert_eq!(config.limits.cpu, 1.0);
    let app = &config.host.app[0];
    assert_eq!(app.criticality, Criticality::High);
    assert_eq!(app.p99, Some(Duration::from_millis(5)));
    assert!(config.accepts_cloudevents());
}

/// Every kind of mistake, and the one sentence it gives.
#[test]
fn mistakes_name_the_line() {
    let cases = [
        (
            "[agent]\nstate_dri = \"/x\"\n",
            "soe.toml:2: unknown field `state_dri`, expected one of `state_dir`, `host`, `log`",
        ),
        (
            "\n\n[agnet]\n",
            "soe.toml:3: unknown field `agnet`, expected one of",
        ),
        (
            "[history]\n\ninterval = \"0s\"\n",
            "soe.toml:3: history.interval: \"0s\" is out of range; use 100ms to 1h",
        ),
        (
            "[history]\ninterval = 1\n",
            "soe.toml:2: history.interval: invalid type: integer `1`, expected a string",
        ),
        (
            "[history]\nretention = \"soon\"\n",
            "soe.toml:2: history.retention: \"soon\" is not a duration;",
        ),
        (
            "[history]\ninterval = \"5m\"\n",
            "soe.toml:1: history.region_interval: must not be shorter than history.interval (5m)",
        ),
        (
            "[history]\nurl = \"s3://x\"\n",
            "soe.toml:2: history.url: this version does not support the key; take it out",
        ),
        (
            "[api]\ntls = { cert = \"x\" }\n",
            "soe.toml:2: api.tls: this version does not support the key; take it out",
        ),
        (
            "[api]\nlisten = \"/run/x\"\n",
            "soe.toml:2: api.listen: \"/run/x\" is not unix: and an absolute path",
        ),
        (
            "[api]\nhttp = \"0.0.0.0:80\"\n",
            "soe.toml:2: api.http: \"0.0.0.0:80\" is not a loopback address;",
        ),
        (
            "[store]\ncompression = \"zstd:3\"\n",
            "soe.toml:2: store.compression: \"zstd:3\" is not none or zstd:1",
        ),
        (
            "[store]\ndir = \"store\"\n",
            "soe.toml:2: store.dir: \"store\" is not an absolute path",
        ),
        (
            "[limits]\ncpu = 0\n",
            "soe.toml:2: limits.cpu: 0 is out of range; use 0.01 to 256 cores",
        ),
        (
            "[limits]\ncpu = nan\n",
            "soe.toml:2: limits.cpu: NaN is out of range; use 0.01 to 256 cores",
        ),
        (
            "[tracking]\nblock_size = \"48KiB\"\n",
            "soe.toml:2: tracking.block_size: 48KiB is not a power of two",
        ),
        (
            "[[event.source]]\ntype = \"file\"\n",
            "soe.toml:1: event.source: the source \"file\" needs dir, the folder",
        ),
        (
            "[[event.source]]\ntype = \"systemd\"\ndir = \"/x\"\n",
            "soe.toml:1: event.source: dir belongs to the source \"file\", not to \"systemd\"",
        ),
        (
            "[[event.source]]\ntype = \"cron\"\n",
            "soe.toml:1: event.source: \"cron\" is no event source; use cloudevents, file, systemd or kubernetes",
        ),
        (
            "[[host.app]]\ntype = \"postgres\"\n",
            "soe.toml:1: host.app: missing field `cgroup`",
        ),
        (
            "[plan]\nearliest = 1\n",
            "soe.toml:2: plan.earliest: 1 is out of range; use 0.01 to 0.99",
        ),
        (
            "[model]\nseason = \"1m\"\nbin = \"50s\"\n",
            "soe.toml:2: model.season: 1m is not 8 to 100000 whole bins of model.bin (50s)",
        ),
        (
            "[agent]\nlog = \"info\"\nlog = \"warn\"\n",
            "soe.toml:3: duplicate key",
        ),
        ("[agent\n", "soe.toml:1: "),
    ];
    for (text, expected) in cases {
        let message = parse(text).unwrap_err();
        assert!(
            message.starts_with(expected),
            "{text:?} gave {message:?}, not {expected:?}"
        );
        assert!(!message.contains('\n'), "{message:?} is more than one line");
    }
}

#[test]
fn an_unreadable_file_is_named() {
    let message = Config::load(Some(Path::new("/nonexistent/soe.toml")))
        .unwrap_err()
        .to_string();
    assert_eq!(
        message,
        "configuration /nonexistent/soe.toml: No such file or directory (os error 2); name a readable file with --config"
    );
}

#[test]
fn reload_tells_live_keys_from_others() {
    let old = Config::default();
    let mut new = old.clone();
    assert_eq!(old.reload(&new), Reload::default());
    new.limits.cpu = 1.0;
    new.plan.rpo = Duration::from_secs(60);
    new.history.interval = Duration::from_secs(2);
    new.event.source.clear();
    let reload = old.reload(&new);
    assert_eq!(reload.live, ["limits.cpu", "plan.rpo", "event.source"]);
    assert_eq!(reload.restart, ["history.interval"]);
}

#[test]
fn every_live_key_exists_and_is_marked_in_the_example() {
    let all = serde_json::to_value(Config::default()).unwrap();
    for key in super::LIVE {
        let found = key.split('.').try_fold(&all, |value, name| value.get(name));
        assert!(found.is_some(), "{key} is no key");
    }
    let live = |key: &str| {
        super::LIVE
            .iter()
            .any(|live| key == *live || key.starts_with(&format!("{live}.")))
    };
    let (mut table, mut said, mut keys) = ("", "", 0);
    for line in include_str!("../../../dist/soe.toml").lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            table = name;
        }
        let comment = line.strip_prefix("# ").unwrap_or_default();
        let text = comment.strip_prefix("example: ").unwrap_or(comment);
        if text.starts_with("[[") {
            // Arrays of tables are marked as a whole.
            break;
        }
        match text.split_once(" = ") {
            Some((key, _)) if key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') => {
                keys += 1;
                let key = format!("{table}.{key}");
                assert_eq!(said.contains("(live)"), live(&key), "{key}: {said}");
            }
            _ => said = comment,
        }
    }
    assert!(keys > 25, "only {keys} keys were compared");
}

/// A configuration that differs from the default in every key that may differ.
fn all_other() -> Config {
    let text = r#"
        [agent]
        state_dir = "/x/state"
        host = "other"
        log = "debug"
        [api]
        listen = "unix:/x/sock"
        http = "off"
        max_event = "2MiB"
        [history]
        dir = "/x/history"
        interval = "2s"
        region_interval = "2m"
        retention = "31d"
        max_size = "17GiB"
        min_free = "2GiB"
        [store]
        dir = "/x/store"
        compression = "none"
        min_free = "257MiB"
        [staging]
        path = "/x/staging"
        budget = "9GiB"
        [limits]
        cpu = 0.6
        memory = "513MiB"
        capture_bandwidth = "2MiB"
        audit_blocks = 31
        [tracking]
        block_size = "128KiB"
        memory = "65MiB"
        [model]
        bin = "10m"
        season = "2d"
        train_after = "3d"
        train_every = "3d"
        seed = 2
        [plan]
        tick = "2s"
        idle = "65KiB"
        earliest = 0.6
        stage_above = 0.6
        stage_precision = 0.06
        rpo = "16m"
        max_pause = "101ms"
        baseline_every = "8d"
        [[host.app]]
        cgroup = "/a"
        type = "postgres"
        [event]
        source = []
    "#;
    Config::parse(text, Path::new("other.toml")).unwrap()
}

/// What a reload takes over is what it says is live, no more and no less.
#[test]
fn a_reload_takes_over_the_live_keys_and_no_other() {
    let (old, new) = (Config::default(), all_other());
    let said = old.reload(&new);
    let every = serde_json::to_value(&old).unwrap();
    let keys: usize = every
        .as_object()
        .unwrap()
        .values()
        .map(|table| table.as_object().unwrap().len())
        .sum();
    // All keys but those that this version reserves.
    assert_eq!(said.live.len() + said.restart.len(), keys - 4, "{said:?}");
    let taken = old.with_live_of(&new);
    assert_eq!(old.reload(&taken).live, said.live);
    assert_eq!(old.reload(&taken).restart, Vec::<String>::new());
    assert_eq!(taken.reload(&new).live, Vec::<String>::new());
    assert_eq!(taken.reload(&new).restart, said.restart);
}

proptest::proptest! {
    #[test]
    fn no_text_panics(text in "\\PC*", table in "(agent|api|history|plan|host|event)", key in "[a-z_]{1,10}", value in "\\PC{0,20}") {
        let _ = parse(&text);
        let _ = parse(&format!("[{table}]\n{key} = \"{value}\"\n"));
    }
}
