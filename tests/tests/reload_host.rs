//! SIGHUP: what can change while the agent runs does, a bad file changes nothing, and what waits for
//! a restart is named. Events that announced something outlive a restart.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use soe_tests::agent::{Soe, free_port};
use soe_tests::device::{self, LoopDevice};

macro_rules! need_kernel {
    () => {
        if let Some(why) = device::unable() {
            println!("SKIPPED: {why}");
            return;
        }
    };
}

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(10);

/// Sends SIGHUP and waits until the log holds `word` once more than before.
#[track_caller]
fn reload(soe: &Soe, word: &str) {
    let before = soe.log().matches(word).count();
    kill_process(soe.pid(), Signal::HUP).unwrap();
    let deadline = Instant::now() + SOON;
    while soe.log().matches(word).count() == before {
        assert!(
            Instant::now() < deadline,
            "no {word:?} in the log: {}",
            soe.log()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Posts one CloudEvent and returns the status of the answer.
fn post(port: u16, id: &str, more: &str) -> u16 {
    let body = format!(
        "{{\"specversion\":\"1.0\",\"id\":\"{id}\",\"source\":\"/ci\",\"type\":\"com.example.backup\"{more}}}"
    );
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    write!(
        stream,
        "POST /events HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\
         Content-Type: application/cloudevents+json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .unwrap_or_else(|| panic!("{answer:?}"))
}

#[test]
fn a_changed_configuration_is_taken_over_and_a_bad_one_is_not() {
    need_kernel!();
    let disk = LoopDevice::new(32 * MIB).unwrap();
    let port = free_port();
    let mut soe = Soe::new("reload", "");
    soe.configure_http(port, "");
    soe.start();
    soe.run(&["group", "create", "g", "--volume", disk.node()])
        .ok();
    let status = |soe: &Soe| soe.run(&["group", "status", "g", "--json"]).json();
    assert_eq!(status(&soe)["rpo_s"], 900);
    assert_eq!(post(port, "1", ""), 202);

    // All of a good file: what can change does, the rest is named.
    soe.configure_http(port,
        "[plan]\nrpo = \"2h\"\nmax_pause = \"50ms\"\n[history]\ninterval = \"2s\"\n[event]\nsource = []\n\
         [store]\ncompression = \"none\"\nmin_free = \"16MiB\"",
    );
    reload(&soe, "is in effect");
    let now = status(&soe);
    assert_eq!(now["rpo_s"], 7200);
    assert_eq!(now["max_pause_us"], 50_000);
    assert_eq!(now["volumes"][0]["rpo_s"], 7200);
    let log = soe.log();
    let line = |word: &str| {
        log.lines()
            .find(|line| line.contains(word))
            .unwrap_or_else(|| panic!("no {word:?} in {log}"))
            .to_owned()
    };
    for key in [
        "plan.rpo",
        "plan.max_pause",
        "event.source",
        "store.compression",
    ] {
        assert!(line("is in effect").contains(key), "{log}");
    }
    assert!(
        line("wait for a restart").contains("history.interval"),
        "{log}"
    );
    assert_ne!(post(port, "2", ""), 202, "the events' door is shut");
    // Blocks of one byte compress to nearly nothing; not now.
    device::run(
        "sh",
        &["-c", &format!("head -c 4194304 /dev/zero | tr '\\0' 'x' | dd of={} oflag=direct bs=1M iflag=fullblock status=none", disk.node())],
    )
    .unwrap();
    let layer = &soe.capture("g")[0];
    assert!(
        layer["bytes_stored"].as_u64().unwrap() >= 4 * MIB,
        "{layer}"
    );

    // A bad file is refused whole, and its line is named.
    soe.configure_http(port, "[plan]\nrpo = \"3h\"\n[limits]\ncpu = -1");
    reload(&soe, "was not read again");
    assert!(soe.log().contains("soe.toml:10:"), "{}", soe.log());
    assert_eq!(status(&soe)["rpo_s"], 7200);
    soe.configure_http(
        port,
        "[plan]\nrpo = \"3h\"\n[event]\nsource = []\nsuorce = []",
    );
    reload(&soe, "was not read again");
    assert_eq!(status(&soe)["rpo_s"], 7200);
    std::fs::remove_file(soe.config()).unwrap();
    reload(&soe, "was not read again");
    assert_eq!(status(&soe)["rpo_s"], 7200);

    // The log follows, too.
    soe.configure_http(port, "");
    let text = std::fs::read_to_string(soe.config()).unwrap();
    std::fs::write(soe.config(), text.replace("\"info\"", "\"debug\"")).unwrap();
    reload(&soe, "is in effect");
    assert_eq!(status(&soe)["rpo_s"], 900);
    assert_eq!(post(port, "3", ""), 202, "the events' door is open again");
    assert_eq!(soe.terminate(), 0);
}

/// What was announced is in the history, in the list, and known to the planner again after a kill.
#[test]
fn an_announcement_outlives_a_restart() {
    need_kernel!();
    let disk = LoopDevice::new(32 * MIB).unwrap();
    let port = free_port();
    let model = "[history]\ninterval = \"100ms\"\n[model]\nbin = \"100ms\"\nseason = \"10s\"";
    let mut soe = Soe::new("announce", "");
    soe.configure_http(port, model);
    soe.start();
    soe.group("g", &[disk.node()]);
    let volume = format!(",\"volumes\":\"{}\"", disk.node());
    let expected = "2126-01-02T03:04:05Z";
    let event = format!("{volume},\"expectedtime\":\"{expected}\"");
    assert_eq!(post(port, "a", &event), 202);
    assert_eq!(post(port, "b", &volume), 202);
    soe.kill();
    soe.start();
    let events = soe.run(&["events", "list", "--json"]).json();
    let of = |id: &str| {
        let list = events["events"].as_array().or(events.as_array());
        list.and_then(|list| list.iter().find(|event| event["id"] == id))
            .unwrap_or_else(|| panic!("no {id} in {events}"))
            .clone()
    };
    assert_eq!(of("a")["expected_at"], expected);
    assert_eq!(of("b")["expected_at"], serde_json::Value::Null);
    let deadline = Instant::now() + SOON;
    loop {
        let status = soe.volume("g", disk.node());
        if status["predicted"]["next_burst_at"] == expected {
            break;
        }
        assert!(Instant::now() < deadline, "{status}");
        std::thread::sleep(Duration::from_millis(100));
    }
    // The same event again is no second one.
    assert_eq!(post(port, "a", &event), 202);
    let history = soe.state().join("history").display().to_string();
    assert_eq!(soe.terminate(), 0);
    let rows = soe
        .run(&[
            "sql",
            "--history",
            &history,
            "--json",
            "SELECT id, expected_at FROM events ORDER BY id",
        ])
        .ok();
    let rows: Vec<serde_json::Value> = rows
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(rows.len(), 2, "{rows:?}");
    assert_eq!(rows[0]["expected_at"], expected);
}
