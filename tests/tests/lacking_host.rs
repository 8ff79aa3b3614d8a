//! A host that lacks what the agent needs: `soe doctor` names it, and the agent ends with one sentence
//! and leaves nothing behind.

use std::process::Command;

use soe_tests::agent::{Soe, binary};
use soe_tests::device;

macro_rules! need_kernel {
    () => {
        if let Some(why) = device::unable() {
            println!("SKIPPED: {why}");
            return;
        }
    };
}

/// Runs `soe` with `arguments` behind `wrapper`, which takes something of the host away for it alone.
fn lacking(soe: &Soe, wrapper: &[&str], arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new("timeout")
        .args(["-s", "KILL", "60"])
        .args(wrapper)
        .arg(binary())
        .args(arguments)
        .env("SOE_PIN_ROOT", soe.pins())
        .env_remove("STATE_DIRECTORY")
        .env_remove("RUST_BACKTRACE")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code().unwrap_or(-1),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// Asserts that the agent ended with one sentence that contains `word`.
#[track_caller]
fn one_sentence(said: &str, word: &str) {
    let sentences: Vec<&str> = said
        .lines()
        .filter_map(|line| line.strip_prefix("soe: "))
        .collect();
    assert_eq!(sentences.len(), 1, "{said}");
    assert!(sentences[0].contains(word), "{said}");
    assert!(!said.contains("panicked"), "{said}");
}

/// In a mount namespace of its own, with an empty folder over the kernel's types.
const WITHOUT_BTF: &[&str] = &[
    "unshare",
    "--mount",
    "--propagation",
    "private",
    "sh",
    "-c",
    "mount -t tmpfs none /sys/kernel/btf && exec \"$@\"",
    "sh",
];

/// As root, but without the capabilities to load programs and to freeze.
const WITHOUT_RIGHTS: &[&str] = &[
    "setpriv",
    "--bounding-set=-sys_admin,-bpf,-perfmon",
    "--inh-caps=-all",
];

#[test]
fn without_kernel_types_it_says_so() {
    need_kernel!();
    let soe = Soe::new("no-btf", "");
    let (code, out, err) = lacking(&soe, WITHOUT_BTF, &["doctor", "--json"]);
    assert_eq!(code, 1, "{out}{err}");
    one_sentence(&err, "kernel types (BTF)");
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["ready"], false);
    let checks = report["checks"].as_array().unwrap();
    let found = checks.iter().find(|c| c["check"] == "kernel types (BTF)");
    let found = found.expect("the check");
    assert_eq!(found["state"], "missing");
    let text = found["found"].as_str().unwrap();
    assert!(text.contains("/sys/kernel/btf/vmlinux"), "{text}");
    assert!(found["mend"].is_string());

    let config = soe.config().display().to_string();
    let (code, _, err) = lacking(&soe, WITHOUT_BTF, &["agent", "--config", &config]);
    assert_eq!(code, 1, "{err}");
    one_sentence(&err, "/sys/kernel/btf/vmlinux");
    assert!(!soe.socket().exists(), "the socket is left behind");
}

#[test]
fn without_capabilities_it_says_so() {
    need_kernel!();
    let soe = Soe::new("no-caps", "");
    let (code, out, err) = lacking(&soe, WITHOUT_RIGHTS, &["doctor", "--json"]);
    assert_eq!(code, 1, "{out}{err}");
    one_sentence(&err, "capabilities");
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let found = checks.iter().find(|c| c["check"] == "capabilities");
    let found = found.expect("the check");
    assert_eq!(found["found"], "no CAP_BPF CAP_PERFMON CAP_SYS_ADMIN");

    let config = soe.config().display().to_string();
    let (code, _, err) = lacking(&soe, WITHOUT_RIGHTS, &["agent", "--config", &config]);
    assert!(code == 1 || code == 4, "{code}: {err}");
    one_sentence(&err, "CAP_");
    assert!(!soe.socket().exists(), "the socket is left behind");
}
