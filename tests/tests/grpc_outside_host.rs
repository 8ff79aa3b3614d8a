//! A client that shares nothing with SOE, not even its proto file, drives a real agent over gRPC.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use soe_tests::agent::Soe;
use soe_tests::device::{self, LoopDevice};
use soe_tests::venv;

#[test]
fn grpcio_finds_the_service_by_reflection_and_drives_it() {
    if let Some(why) = device::unable() {
        println!("SKIPPED: {why}");
        return;
    }
    let python = match venv::python(&[("grpcio", "grpc"), ("grpcio-reflection", "grpc_reflection")])
    {
        Ok(python) => python,
        Err(why) => {
            println!("SKIPPED: no grpcio: {why}");
            return;
        }
    };
    let disk = LoopDevice::new(32 << 20).unwrap();
    let mut soe = Soe::new("grpc", "");
    soe.start();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/grpc_client.py");
    let output = Command::new("timeout")
        .args(["-s", "KILL", "120"])
        .arg(&python)
        .arg(script)
        .arg(soe.socket())
        .args(["third", disk.node()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let seen: Value = serde_json::from_slice(&output.stdout).unwrap();

    let has =
        |list: &Value, name: &str| list.as_array().is_some_and(|l| l.iter().any(|v| v == name));
    assert!(
        has(&seen["services"], "soe.v1.SnapshotOrchestration"),
        "{seen}"
    );
    for method in [
        "CreateSnapshotGroup",
        "GetSnapshotGroupStatus",
        "CaptureLayer",
    ] {
        assert!(has(&seen["methods"], method), "{seen}");
    }
    assert_eq!(seen["health"]["status"], "SERVING");
    assert_eq!(seen["created"]["group_name"], "third");
    assert_eq!(seen["created"]["volumes"][0]["volume"], disk.node());
    let kinds = [&seen["captured"][0], &seen["captured"][1]].map(|c| &c["layers"][0]["kind"]);
    assert_eq!(kinds, ["LAYER_KIND_BASELINE", "LAYER_KIND_DIFFERENTIAL"]);
    let volume = &seen["status"]["volumes"][0];
    // JSON of protobuf writes 64-bit numbers as text.
    assert_eq!(
        (&volume["layers"], &volume["baseline_layers"]),
        (&"2".into(), &"1".into())
    );
    assert_eq!(volume["tracking"], "TRACKING_STATE_COMPLETE");
    assert_eq!(seen["verified"]["summary"]["layers"], "2");
    assert_eq!(
        seen["verified"]["summary"].get("problems"),
        None,
        "zero is left out"
    );
    assert_eq!(seen["refusal"]["code"], "NOT_FOUND");
    assert!(
        seen["refusal"]["message"]
            .as_str()
            .unwrap()
            .contains("there-is-none"),
        "{seen}"
    );
    assert!(seen["refusal"]["kind"].is_string(), "{seen}");

    // The command line sees the same group.
    assert_eq!(soe.volume("third", disk.node())["layers"], 2);
    assert_eq!(soe.terminate(), 0);
}
