//! The service over its unix socket, as a foreign client sees it.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use soe_agent::api::audit::{Caller, Line, Outcome};
use soe_agent::api::engine::ErrorKind;
use soe_agent::api::pb;
use soe_agent::api::pb::snapshot_orchestration_client::SnapshotOrchestrationClient;
use support::{Daemon, fails, soe_with, text};
use tokio::net::UnixStream;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

fn channel(daemon: &Daemon) -> Channel {
    let path = daemon.socket();
    daemon.runtime.block_on(async move {
        Endpoint::from_static("http://localhost")
            .connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
            .await
            .unwrap()
    })
}

fn create(daemon: &Daemon) -> SnapshotOrchestrationClient<Channel> {
    let mut client = SnapshotOrchestrationClient::new(channel(daemon));
    let request = pb::CreateSnapshotGroupRequest {
        group_name: "db".into(),
        volumes: vec!["/dev/loop0".into()],
        prediction_enabled: true,
        ..Default::default()
    };
    let status = daemon
        .runtime
        .block_on(client.create_snapshot_group(request))
        .unwrap()
        .into_inner();
    assert_eq!(status.group_name, "db");
    client
}

#[test]
fn a_group_is_created_and_its_status_read() {
    let daemon = Daemon::start();
    let mut client = create(&daemon);
    let request = pb::GetSnapshotGroupStatusRequest {
        group_name: "db".into(),
    };
    let status = daemon
        .runtime
        .block_on(client.get_snapshot_group_status(request))
        .unwrap()
        .into_inner();
    assert_eq!(status.volumes[0].layers, 5);
    assert_eq!(status.volumes[0].tracking(), pb::TrackingState::Complete);
}

#[test]
fn reflection_finds_the_service() {
    let daemon = Daemon::start();
    let paths = [
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ];
    for path in paths {
        // Requests and answers by hand: field 7 of the request lists services, field 4 asks for a symbol's file.
        for (request, expected) in [
            (vec![0x3a, 1, b'*'], "soe.v1.SnapshotOrchestration"),
            (
                symbol("soe.v1.SnapshotOrchestration"),
                "CreateSnapshotGroup",
            ),
        ] {
            let answer = raw_call(&daemon, path, request);
            assert!(
                contains(&answer, expected),
                "{path} does not tell of {expected}: {}",
                text(&answer)
            );
        }
    }
}

fn symbol(name: &str) -> Vec<u8> {
    let mut request = vec![0x22, u8::try_from(name.len()).unwrap()];
    request.extend_from_slice(name.as_bytes());
    request
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|w| w == text.as_bytes())
}

/// Bytes in, bytes out.
#[derive(Clone, Default)]
struct Bytes;

impl tonic::codec::Codec for Bytes {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl tonic::codec::Encoder for Bytes {
    type Item = Vec<u8>;
    type Error = tonic::Status;

    fn encode(
        &mut self,
        item: Vec<u8>,
        dst: &mut tonic::codec::EncodeBuf<'_>,
    ) -> Result<(), tonic::Status> {
        bytes::BufMut::put_slice(dst, &item);
        Ok(())
    }
}

impl tonic::codec::Decoder for Bytes {
    type Item = Vec<u8>;
    type Error = tonic::Status;

    fn decode(
        &mut self,
        src: &mut tonic::codec::DecodeBuf<'_>,
    ) -> Result<Option<Vec<u8>>, tonic::Status> {
        let mut item = vec![0; bytes::Buf::remaining(src)];
        bytes::Buf::copy_to_slice(src, &mut item);
        Ok(Some(item))
    }
}

fn raw_call(daemon: &Daemon, path: &'static str, request: Vec<u8>) -> Vec<u8> {
    let channel = channel(daemon);
    daemon.runtime.block_on(async move {
        let mut grpc = tonic::client::Grpc::new(channel);
        grpc.ready().await.unwrap();
        let requests = tonic::Request::new(tokio_stream::once(request));
        let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
        let mut answers = grpc
            .streaming(requests, path, Bytes)
            .await
            .unwrap()
            .into_inner();
        answers.message().await.unwrap().unwrap()
    })
}

#[test]
fn health_follows_the_daemon() {
    let daemon = Daemon::start();
    let mut client = tonic_health::pb::health_client::HealthClient::new(channel(&daemon));
    let mut status = |service: &str| {
        let request = tonic_health::pb::HealthCheckRequest {
            service: service.into(),
        };
        daemon
            .runtime
            .block_on(client.check(request))
            .unwrap()
            .into_inner()
            .status
    };
    std::thread::sleep(Duration::from_millis(100));
    for service in ["", "soe.v1.SnapshotOrchestration"] {
        assert_eq!(status(service), 1, "{service} serves");
    }
    *daemon.engine.not_ready.lock().unwrap() = Some("starting".into());
    std::thread::sleep(Duration::from_millis(800));
    assert_eq!(status(""), 2);
}

#[test]
fn every_kind_of_error_has_its_code_and_its_trailer() {
    let daemon = Daemon::start();
    let mut client = create(&daemon);
    let codes = [
        (ErrorKind::InvalidArgument, Code::InvalidArgument),
        (ErrorKind::NotFound, Code::NotFound),
        (ErrorKind::AlreadyExists, Code::AlreadyExists),
        (ErrorKind::Conflict, Code::Aborted),
        (ErrorKind::PermissionDenied, Code::PermissionDenied),
        (ErrorKind::Unsafe, Code::FailedPrecondition),
        (ErrorKind::Integrity, Code::DataLoss),
        (ErrorKind::Exhausted, Code::ResourceExhausted),
        (ErrorKind::Unsupported, Code::Unimplemented),
        (ErrorKind::Unavailable, Code::Unavailable),
        (ErrorKind::Cancelled, Code::Cancelled),
        (ErrorKind::Internal, Code::Internal),
    ];
    assert_eq!(codes.len(), ErrorKind::ALL.len());
    for (kind, code) in codes {
        daemon.engine.fail_next(kind, "é: it failed");
        let request = pb::GetSnapshotGroupStatusRequest {
            group_name: "db".into(),
        };
        let status = daemon
            .runtime
            .block_on(client.get_snapshot_group_status(request))
            .unwrap_err();
        assert_eq!((status.code(), status.message()), (code, "é: it failed"));
        assert_eq!(
            status
                .metadata()
                .get("soe-error-kind")
                .unwrap()
                .to_str()
                .unwrap(),
            kind.as_str()
        );
    }
}

#[test]
fn wrong_arguments_never_reach_the_engine() {
    let daemon = Daemon::start();
    let mut client = create(&daemon);
    // Would be consumed by the first call that reaches it.
    daemon.engine.fail_next(ErrorKind::Internal, "reached");
    let wait = |code: Result<(), tonic::Status>| {
        assert_eq!(code.unwrap_err().code(), Code::InvalidArgument)
    };
    let run = &daemon.runtime;
    let group_name = "../etc".to_owned();
    wait(
        run.block_on(client.capture_layer(pb::CaptureLayerRequest {
            group_name: "db".into(),
            kind: 77,
        }))
        .map(drop),
    );
    wait(
        run.block_on(client.capture_layer(pb::CaptureLayerRequest {
            group_name,
            kind: 0,
        }))
        .map(drop),
    );
    wait(
        run.block_on(client.create_snapshot_group(pb::CreateSnapshotGroupRequest::default()))
            .map(drop),
    );
    wait(
        run.block_on(client.forecast(pb::ForecastRequest {
            volume: "v".into(),
            horizon_s: 0,
        }))
        .map(drop),
    );
    wait(
        run.block_on(client.publish_event(pb::PublishEventRequest { event: None }))
            .map(drop),
    );
    wait(
        run.block_on(client.show_layer(pb::ShowLayerRequest::default()))
            .map(drop),
    );
    wait(
        run.block_on(client.trace_record(pb::TraceRecordRequest {
            volume: "v".into(),
            duration_ms: u64::MAX,
        }))
        .map(drop),
    );
    let restore = pb::RestoreRequest {
        group_name: "db".into(),
        volume: "v".into(),
        target: "relative".into(),
        ..Default::default()
    };
    wait(run.block_on(client.restore(restore)).map(drop));
    assert!(daemon.engine.failure.lock().unwrap().is_some());
}

#[test]
fn what_changes_something_is_in_the_audit_and_reading_is_not() {
    let daemon = Daemon::start();
    let mut client = create(&daemon);
    let run = &daemon.runtime;
    run.block_on(client.list_volumes(pb::ListVolumesRequest {}))
        .unwrap();
    daemon
        .engine
        .fail_next(ErrorKind::Exhausted, "the store is full");
    let capture = pb::CaptureLayerRequest {
        group_name: "db".into(),
        kind: 0,
    };
    run.block_on(client.capture_layer(capture)).unwrap_err();
    let uid = rustix::process::geteuid().as_raw();
    let entries: Vec<_> = daemon
        .audit()
        .into_iter()
        .map(|line| match line {
            Line::Entry(entry) => entry,
            Line::Damaged { number } => panic!("line {number} is damaged"),
        })
        .collect();
    let seen: Vec<_> = entries
        .iter()
        .map(|e| (e.call.as_str(), e.subject.as_str(), &e.outcome))
        .collect();
    let full = Outcome::Failed {
        kind: "exhausted".into(),
        error: "the store is full".into(),
    };
    assert_eq!(
        seen,
        [
            ("CreateSnapshotGroup", "db", &Outcome::Done),
            ("CaptureLayer", "db", &Outcome::Started),
            ("CaptureLayer", "db", &full),
        ]
    );
    for entry in &entries {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(
            matches!(entry.caller, Caller::Unix { uid: u, pid: Some(p), .. } if u == uid && p == own)
        );
    }
}

#[test]
fn a_caller_that_goes_away_is_in_the_audit() {
    let daemon = Daemon::start();
    *daemon.engine.break_off.lock().unwrap() = true;
    let output = daemon.soe(&["restore", "db", "--volume", "v", "--to", "/nonexistent/x"]);
    fails(&output, 1, "broke off before its end");
    let last = daemon.audit().pop();
    assert!(
        matches!(last, Some(Line::Entry(e)) if e.outcome == Outcome::Abandoned && e.call == "Restore")
    );
}

#[test]
fn an_endless_stream_does_not_keep_the_daemon_from_stopping() {
    let mut daemon = Daemon::start();
    let mut client = SnapshotOrchestrationClient::new(channel(&daemon));
    let mut items = daemon
        .runtime
        .block_on(client.watch(pb::WatchRequest::default()))
        .unwrap()
        .into_inner();
    for _ in 0..7 {
        daemon.runtime.block_on(items.message()).unwrap().unwrap();
    }
    drop(client);
    assert!(
        daemon.stop() < Duration::from_secs(3),
        "the stop waited for the stream"
    );
    assert!(
        daemon.runtime.block_on(items.message()).unwrap().is_none(),
        "the stream ends in order"
    );
    assert!(!daemon.socket().exists());
}

#[test]
fn a_second_daemon_on_the_same_socket_is_refused() {
    let daemon = Daemon::start();
    let error = soe_agent::api::server::Listeners::open(&daemon.config)
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("is served by another agent"), "{error}");
    create(&daemon);
}

/// Another user is kept out by the file's mode, and by its uid when the mode was opened by hand.
#[test]
fn other_users_are_refused() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    const NOBODY: u32 = 65_534;
    let daemon = Daemon::start();
    let program = daemon.dir.path().join("soe");
    std::fs::copy(env!("CARGO_BIN_EXE_soe"), &program).unwrap();
    let open = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open(daemon.dir.path(), 0o755);
    open(&program, 0o755);
    let as_nobody = || {
        let mut command = std::process::Command::new(&program);
        command
            .arg("volumes")
            .env("SOE_ENDPOINT", daemon.endpoint())
            .uid(NOBODY)
            .gid(NOBODY);
        command.output().unwrap()
    };
    fails(&as_nobody(), 4, "is closed to this user");
    open(daemon.socket().parent().unwrap(), 0o755);
    fails(&as_nobody(), 4, "is closed to this user");
    open(&daemon.socket(), 0o666);
    fails(&as_nobody(), 4, "uid 65534 may not call the agent");
    let root = soe_with(&["volumes"], |c| {
        c.env("SOE_ENDPOINT", daemon.endpoint());
    });
    assert!(root.status.success(), "{}", text(&root.stderr));
}
