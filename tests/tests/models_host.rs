//! The networks of a real agent: trained, kept as a version over a restart, gone back from, and refused in
//! sentences.

use std::time::{Duration, Instant};

use serde_json::Value;
use soe_tests::agent::Soe;
use soe_tests::device::{self, LoopDevice, open_direct, write_direct};

const MIB: u64 = 1 << 20;
/// Seasons of two seconds, so that a training has enough of them soon.
const MODEL: &str = "[history]\ninterval = \"100ms\"\n[model]\nbin = \"100ms\"\nseason = \"2s\"\ntrain_after = \"30d\"";

/// The version that serves; `None` for the one that ships.
fn serving(report: &Value) -> Option<u64> {
    let versions = report["versions"].as_array().unwrap();
    let mut serving = versions.iter().filter(|v| v["serving"] == true);
    let one = serving.next().unwrap_or_else(|| panic!("{report}"));
    assert!(serving.next().is_none(), "{report}");
    one["version"].as_u64()
}

#[test]
fn a_trained_network_is_a_version_that_outlives_a_restart_and_can_be_gone_back_from() {
    if let Some(why) = device::unable() {
        println!("SKIPPED: {why}");
        return;
    }
    let disk = LoopDevice::new(16 * MIB).unwrap();
    let mut soe = Soe::new("models", MODEL);
    soe.start();
    soe.group("g", &[disk.node()]);
    let show = |soe: &Soe| soe.run(&["model", "show", "--json"]).json();
    assert_eq!(serving(&show(&soe)), None);
    let none = soe.run(&["model", "rollback"]).refused(1);
    assert!(none.contains("there is none before it"), "{none}");
    let none = soe.run(&["model", "promote", "7"]).refused(1);
    assert!(none.contains("no version 7"), "{none}");
    soe.run(&["model", "promote", "first"]).refused(2);

    // A load with a rhythm that the shipped network has not seen; whether what is learnt from it is better is
    // up to the back-test, so it may take more than one training.
    let file = open_direct(&disk.path).unwrap();
    let deadline = Instant::now() + Duration::from_secs(90);
    let mut trained = None;
    let mut said = String::new();
    while trained.is_none() && Instant::now() < deadline {
        let until = Instant::now() + Duration::from_secs(12);
        let mut beat = 0u64;
        while Instant::now() < until {
            let mib: usize = if beat % 10 < 3 { 4 } else { 1 };
            write_direct(&file, 0, mib << 20, beat as u8).unwrap();
            beat += 1;
            std::thread::sleep(Duration::from_millis(100));
        }
        let outcome = soe.run(&["model", "train", "--json"]);
        said = format!("{outcome:?}");
        trained = serving(&show(&soe));
    }
    let Some(version) = trained else {
        panic!("no training was better than the network that ships within 90 s: {said}");
    };
    let judged = soe.run(&["model", "show", disk.node(), "--json"]).json();
    assert_eq!(serving(&judged), Some(version));
    assert_eq!(soe.terminate(), 0);
    soe.start();
    assert_eq!(serving(&show(&soe)), Some(version), "after a restart");
    let back = soe.run(&["model", "rollback", "--json"]).json();
    assert_eq!(serving(&back), version.checked_sub(1).filter(|v| *v > 0));
    let number = version.to_string();
    let again = soe.run(&["model", "promote", &number, "--json"]).json();
    assert_eq!(serving(&again), Some(version));
    let shipped = soe.run(&["model", "promote", "shipped", "--json"]).json();
    assert_eq!(serving(&shipped), None);
    let again = soe.run(&["model", "rollback", "--json"]).json();
    assert_eq!(
        serving(&again),
        Some(version),
        "what a user left can be gone back to"
    );
    assert_eq!(soe.terminate(), 0);
}
