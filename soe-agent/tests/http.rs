//! The HTTP listener, byte by byte.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::{Value, json};
use soe_agent::api::audit::{Caller, Line};
use soe_agent::api::engine::ErrorKind;
use support::Daemon;

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

fn send(daemon: &Daemon, request: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(daemon.http.unwrap()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream.write_all(request).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer {
        status,
        head: head.to_lowercase(),
        body: body.to_owned(),
    }
}

fn call(daemon: &Daemon, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
    let mut request = format!(
        "{method} {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    if !headers.iter().any(|(name, _)| *name == "host") {
        request.push_str(&format!("host: {}\r\n", daemon.http.unwrap()));
    }
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("\r\n");
    request.push_str(body);
    send(daemon, request.as_bytes())
}

fn get(daemon: &Daemon, path: &str) -> Answer {
    call(daemon, "GET", path, &[], "")
}

const STRUCTURED: (&str, &str) = ("content-type", "application/cloudevents+json");

fn event(id: &str) -> Value {
    json!({"specversion": "1.0", "id": id, "source": "/ci", "type": "deploy", "volumes": "/dev/loop0", "data": {"n": 1}})
}

#[test]
fn health_and_readiness() {
    let daemon = Daemon::start();
    assert_eq!(get(&daemon, "/healthz").status, 200);
    assert_eq!(get(&daemon, "/readyz").status, 200);
    *daemon.engine.not_ready.lock().unwrap() = Some("volumes are being adopted".into());
    assert_eq!(get(&daemon, "/healthz").status, 200);
    let answer = get(&daemon, "/readyz");
    assert_eq!(answer.status, 503);
    assert_eq!(
        answer.json(),
        json!({"error": "volumes are being adopted", "kind": "unavailable"})
    );
}

#[test]
fn metrics_are_open_metrics_text() {
    let daemon = Daemon::start();
    daemon
        .metrics
        .volume_operations
        .with(["/dev/loop0", "read"])
        .inc_by(3);
    let answer = get(&daemon, "/metrics");
    assert_eq!(answer.status, 200);
    assert!(
        answer
            .head
            .contains("content-type: application/openmetrics-text; version=1.0.0")
    );
    assert!(
        answer
            .body
            .contains("soe_volume_operations_total{volume=\"/dev/loop0\",op=\"read\"} 3")
    );
}

#[test]
fn json_is_that_of_the_command_line() {
    let daemon = Daemon::start();
    daemon.json(&["group", "create", "db", "--volume", "/dev/loop0"]);
    assert_eq!(
        get(&daemon, "/api/v1/groups").json(),
        daemon.json(&["group", "list"])
    );
    assert_eq!(
        get(&daemon, "/api/v1/groups/db").json(),
        daemon.json(&["group", "status", "db"])
    );
    assert_eq!(
        get(&daemon, "/api/v1/volumes").json(),
        daemon.json(&["volumes"])
    );
    assert_eq!(get(&daemon, "/api/v1/groups/absent").status, 404);
    assert_eq!(get(&daemon, "/api/v1/groups/..%2fetc").status, 400);
    assert_eq!(get(&daemon, "/nothing").status, 404);
    assert_eq!(
        call(&daemon, "DELETE", "/api/v1/groups/db", &[], "").status,
        405
    );
    daemon.engine.fail_next(ErrorKind::Internal, "x");
    assert_eq!(get(&daemon, "/api/v1/groups").status, 500);
}

#[test]
fn events_in_all_three_modes() {
    let daemon = Daemon::start();
    let answer = call(
        &daemon,
        "POST",
        "/events",
        &[STRUCTURED],
        &event("1").to_string(),
    );
    assert_eq!(
        (answer.status, answer.json()),
        (202, json!({"stored": 1, "already_known": 0}))
    );
    let again = call(
        &daemon,
        "POST",
        "/events",
        &[STRUCTURED],
        &event("1").to_string(),
    );
    assert_eq!(again.json(), json!({"stored": 0, "already_known": 1}));
    let batch = json!([event("1"), event("2"), event("3")]).to_string();
    let answer = call(
        &daemon,
        "POST",
        "/events",
        &[("content-type", "application/cloudevents-batch+json")],
        &batch,
    );
    assert_eq!(answer.json(), json!({"stored": 2, "already_known": 1}));
    let headers = [
        ("ce-specversion", "1.0"),
        ("ce-id", "4"),
        ("CE-Source", "/k8s"),
        ("ce-type", "scale"),
        ("content-type", "application/json"),
    ];
    assert_eq!(
        call(&daemon, "POST", "/events", &headers, "{\"replicas\":3}").status,
        202
    );
    let listed = daemon.json(&["events", "list"]);
    let ids: Vec<&str> = listed["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["4", "3", "2", "1"]);
    assert_eq!(listed["events"][0]["data"], json!({"replicas": 3}));
    assert_eq!(listed["events"][3]["volumes"], json!(["/dev/loop0"]));
    let audited = daemon.audit();
    assert_eq!(audited.len(), 6);
    assert!(
        matches!(&audited[0], Line::Entry(e) if matches!(e.caller, Caller::Http { .. }) && e.subject == "/ci 1")
    );
    assert!(
        get(&daemon, "/metrics")
            .body
            .contains("soe_events_total{outcome=\"stored\"} 4")
    );
}

#[test]
fn bad_events_are_refused_and_none_is_kept() {
    let daemon = Daemon::start_with(|config| config.api.max_event = 2048);
    let post = |content_type: &str, body: &str| {
        call(
            &daemon,
            "POST",
            "/events",
            &[("content-type", content_type)],
            body,
        )
        .status
    };
    assert_eq!(post("application/cloudevents+json", "{"), 400);
    assert_eq!(post("application/cloudevents+json", "{}"), 400);
    assert_eq!(
        post(
            "application/cloudevents-batch+json",
            &json!([event("1"), {}]).to_string()
        ),
        400
    );
    assert_eq!(post("application/json", &event("1").to_string()), 415);
    assert_eq!(
        post("application/cloudevents+json", &format!("{:4096}", "")),
        413
    );
    assert_eq!(call(&daemon, "GET", "/events", &[], "").status, 405);
    assert!(daemon.engine.events.lock().unwrap().is_empty());
    daemon
        .engine
        .fail_next(ErrorKind::Exhausted, "the history is full");
    let answer = call(
        &daemon,
        "POST",
        "/events",
        &[STRUCTURED],
        &event("1").to_string(),
    );
    assert_eq!(answer.status, 507);
    assert!(
        answer.json()["error"]
            .as_str()
            .unwrap()
            .starts_with("the history is full; 0 events were kept")
    );
}

#[test]
fn a_body_that_never_ends_is_cut_off() {
    let daemon = Daemon::start();
    let head = format!(
        "POST /events HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-length: 100\r\ncontent-type: application/cloudevents+json\r\n\r\n{{",
        daemon.http.unwrap()
    );
    assert_eq!(send(&daemon, head.as_bytes()).status, 408);
}

#[test]
fn events_can_be_switched_off() {
    let daemon = Daemon::start_with(|config| config.event.source.clear());
    let answer = call(
        &daemon,
        "POST",
        "/events",
        &[STRUCTURED],
        &event("1").to_string(),
    );
    assert_eq!(answer.status, 403);
    assert!(daemon.engine.events.lock().unwrap().is_empty());
}

#[test]
fn foreign_names_and_pages_are_refused_everywhere() {
    let daemon = Daemon::start();
    let own = daemon.http.unwrap().to_string();
    for path in ["/metrics", "/healthz", "/api/v1/groups", "/nothing"] {
        assert_eq!(
            call(&daemon, "GET", path, &[("host", "evil.example")], "").status,
            403,
            "{path}"
        );
        let foreign = [("host", own.as_str()), ("origin", "http://evil.example")];
        assert_eq!(
            call(&daemon, "GET", path, &foreign, "").status,
            403,
            "{path}"
        );
        assert_eq!(
            call(
                &daemon,
                "GET",
                path,
                &[("sec-fetch-site", "cross-site")],
                ""
            )
            .status,
            403,
            "{path}"
        );
    }
    let own_page = format!("http://{own}");
    assert_eq!(
        call(&daemon, "GET", "/healthz", &[("origin", &own_page)], "").status,
        200
    );
}
