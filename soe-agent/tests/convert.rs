//! Every type survives the wire, and JSON has the names that scripts rely on.

mod support;

use serde_json::{Value, json};
use soe_agent::api::convert::WireError;
use soe_agent::api::pb;
use soe_agent::api::types::*;
use support::samples;

macro_rules! there_and_back {
    ($value:expr, $plain:ty, $wire:ty) => {{
        let value: $plain = $value;
        let wire = <$wire>::from(value.clone());
        let back = <$plain>::try_from(wire).unwrap();
        assert_eq!(back, value);
    }};
}

#[test]
fn every_type_survives_the_wire() {
    let volumes = ["/dev/loop0".to_owned(), "/dev/loop1".to_owned()];
    there_and_back!(samples::group("db", &volumes), GroupStatus, pb::GroupStatus);
    there_and_back!(
        samples::fresh_volume_status("/dev/loop0"),
        VolumeStatus,
        pb::VolumeStatus
    );
    there_and_back!(samples::layer("/dev/loop0", 1), LayerInfo, pb::LayerInfo);
    there_and_back!(samples::layer_detail(), LayerDetail, pb::LayerDetail);
    there_and_back!(samples::forecast(), ForecastReport, pb::ForecastReport);
    there_and_back!(samples::model(), ModelReport, pb::ModelReport);
    there_and_back!(samples::event("e"), Event, pb::Event);
    there_and_back!(samples::volume_info(), VolumeInfo, pb::VolumeInfo);
    there_and_back!(samples::trace(), TraceReport, pb::TraceRecordResponse);
    for event in samples::watch_events() {
        there_and_back!(WatchItem { at: 5, event }, WatchItem, pb::WatchItem);
    }
    for event in [
        VerifyEvent::Progress {
            layer: "l".into(),
            bytes_checked: 1,
            bytes_total: 2,
        },
        VerifyEvent::Problem {
            layer: "l".into(),
            volume: "v".into(),
            what: "w".into(),
        },
        VerifyEvent::Summary {
            layers: 1,
            blocks: 2,
            bytes: 3,
            problems: 4,
        },
    ] {
        there_and_back!(event, VerifyEvent, pb::VerifyEvent);
    }
    let request = |point| RestoreRequest {
        group: "db".into(),
        volume: "/dev/loop0".into(),
        point,
        target: "/tmp/image".into(),
        differential: true,
    };
    for point in [
        RestorePoint::Latest,
        RestorePoint::Layer("x".into()),
        RestorePoint::At(-7),
    ] {
        there_and_back!(request(point), RestoreRequest, pb::RestoreRequest);
    }
    for phase in RestorePhase::ALL {
        let progress = RestoreProgress {
            phase: *phase,
            layer: "l".into(),
            bytes_total: 15,
            bytes_done: 10,
            bytes_written: 1,
            bytes_from_staging: 2,
            bytes_equal: 3,
            bytes_zeroed: 4,
        };
        there_and_back!(progress, RestoreProgress, pb::RestoreProgress);
    }
    for criticality in Criticality::ALL {
        let spec = GroupSpec {
            name: "db".into(),
            volumes: volumes.to_vec(),
            prediction_enabled: false,
            rpo_s: Some(1),
            max_pause_us: Some(2),
            p99_target_us: Some(3),
            app: Some("a".into()),
            criticality: *criticality,
        };
        there_and_back!(spec, GroupSpec, pb::CreateSnapshotGroupRequest);
        let update = GroupUpdate {
            name: "db".into(),
            prediction_enabled: Some(false),
            rpo_s: Some(1),
            max_pause_us: Some(2),
            p99_target_us: Some(3),
            app: Some("a".into()),
            criticality: Some(*criticality),
            add_volumes: vec!["x".into()],
            remove_volumes: vec!["y".into()],
        };
        there_and_back!(update, GroupUpdate, pb::UpdateSnapshotGroupRequest);
    }
    there_and_back!(
        GroupUpdate::default(),
        GroupUpdate,
        pb::UpdateSnapshotGroupRequest
    );
    there_and_back!(
        HostUpdate::default(),
        HostUpdate,
        pb::SetHostMetadataRequest
    );
}

#[test]
fn all_names_of_enums_survive() {
    for level in ConsistencyLevel::ALL {
        for method in CutMethod::ALL {
            let layer = LayerInfo {
                level: *level,
                method: *method,
                ..samples::layer("v", 2)
            };
            there_and_back!(layer, LayerInfo, pb::LayerInfo);
        }
    }
}

#[test]
fn messages_that_say_too_little_are_refused() {
    let mut wire = pb::VolumeStatus::from(samples::volume_status("v"));
    wire.tracking = 0;
    assert_eq!(
        VolumeStatus::try_from(wire.clone()),
        Err(WireError::Missing { field: "tracking" })
    );
    wire.tracking = 99;
    assert_eq!(
        VolumeStatus::try_from(wire.clone()),
        Err(WireError::Unknown {
            field: "tracking",
            value: "99".into()
        })
    );
    wire.tracking = 1;
    wire.generation = Some("no uuid".into());
    assert!(VolumeStatus::try_from(wire.clone()).is_err());
    wire.generation = None;
    wire.staging = None;
    assert_eq!(
        VolumeStatus::try_from(wire),
        Err(WireError::Missing { field: "staging" })
    );
    assert!(WatchItem::try_from(pb::WatchItem::default()).is_err());
    let event = pb::Event {
        data_json: Some("{".into()),
        ..pb::Event::default()
    };
    assert!(Event::try_from(event).is_err());
}

/// The keys of the contract, and of what kind their values are, are all there.
fn carries(actual: &Value, expected: &Value, at: &str) {
    match expected {
        Value::Object(fields) => {
            for (name, value) in fields {
                let inner = actual
                    .get(name)
                    .unwrap_or_else(|| panic!("{at}.{name} is absent from {actual}"));
                carries(inner, value, &format!("{at}.{name}"));
            }
        }
        Value::Array(items) => carries(&actual[0], &items[0], &format!("{at}[0]")),
        Value::Null => {}
        Value::Bool(_) => assert!(actual.is_boolean(), "{at} is {actual}"),
        Value::Number(n) if n.is_u64() => assert!(actual.is_u64(), "{at} is {actual}"),
        Value::Number(_) => assert!(actual.is_number(), "{at} is {actual}"),
        Value::String(text) if text.contains('|') => {
            let allowed: Vec<&str> = text.split('|').collect();
            assert!(
                actual.as_str().is_some_and(|a| allowed.contains(&a)),
                "{at} is {actual}, not one of {text}"
            );
        }
        Value::String(_) => assert!(actual.is_string(), "{at} is {actual}"),
    }
}

#[test]
fn status_carries_the_documented_fields() {
    let contract = json!({"group":"db","prediction_enabled":true,"volumes":[{
      "volume":"/dev/loop0","device_id":"...","size_bytes":0,"generation":"uuid","epoch":7,
      "tracking":"complete|tainted|detached","rescan_reason":null,
      "layers":5,"baseline_layers":1,"differential_layers":4,
      "last_layer":{"id":"...","kind":"baseline|differential","level":"filesystem|crash|application","method":"optimistic|freeze|native|suspend",
                    "pause_us":0,"changed_blocks":0,"bytes_read":0,"bytes_stored":0,"started_at":"...","finished_at":"..."},
      "changed_blocks_pending":12,"rpo_s":900,"rpo_age_s":31,
      "staging":{"budget_bytes":0,"staged_bytes":0,"valid_bytes":0,"hit_ratio":null},
      "predicted":{"load_now":0.0,"next_burst_at":null,"burst_probability":0.0,"next_low_window":{"start":"...","end":"..."},"model":"..."}
    }]});
    let group = samples::group("db", &["/dev/loop0".to_owned()]);
    carries(&serde_json::to_value(&group).unwrap(), &contract, "");
    // Nothing known yet: the names are there all the same.
    let mut fresh = group;
    fresh.volumes = vec![samples::fresh_volume_status("/dev/loop0")];
    let fresh = serde_json::to_value(&fresh).unwrap();
    for (name, _) in contract["volumes"][0].as_object().unwrap() {
        assert!(fresh["volumes"][0].get(name).is_some(), "{name} is absent");
    }
    assert_eq!(fresh["volumes"][0]["rescan_reason"], "GAP_BOOT");
    assert_eq!(fresh["volumes"][0]["staging"]["hit_ratio"], Value::Null);
}

#[test]
fn json_reads_back() {
    let group = samples::group("db", &["/dev/loop0".to_owned()]);
    let text = serde_json::to_string(&group).unwrap();
    assert_eq!(serde_json::from_str::<GroupStatus>(&text).unwrap(), group);
    for event in samples::watch_events() {
        let item = WatchItem {
            at: samples::T0,
            event,
        };
        let text = serde_json::to_string(&item).unwrap();
        assert_eq!(
            serde_json::from_str::<WatchItem>(&text).unwrap(),
            item,
            "{text}"
        );
    }
}
