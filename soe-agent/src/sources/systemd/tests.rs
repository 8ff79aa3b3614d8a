use super::super::support::Taken;
use super::*;
use proptest::prelude::*;
use std::sync::Arc;
use zbus::object_server::SignalEmitter;

/// What systemd has of it.
struct FakeManager;

#[zbus::interface(name = "org.freedesktop.systemd1.Manager")]
impl FakeManager {
    fn subscribe(&self) {}

    fn list_units(&self) -> Vec<Listed> {
        let unit = |name: &str, state: &str, path: &str| -> Listed {
            let path = ObjectPath::try_from(path.to_owned()).unwrap();
            let none = ObjectPath::try_from("/").unwrap();
            let text = String::new;
            (
                name.to_owned(),
                text(),
                text(),
                state.to_owned(),
                text(),
                text(),
                path.into(),
                0,
                text(),
                none.into(),
            )
        };
        vec![
            unit(
                "web.service",
                "active",
                "/org/freedesktop/systemd1/unit/web_2eservice",
            ),
            unit(
                "backup.timer",
                "active",
                "/org/freedesktop/systemd1/unit/backup_2etimer",
            ),
        ]
    }
}

struct FakeTimer;

#[zbus::interface(name = "org.freedesktop.systemd1.Timer")]
impl FakeTimer {
    #[zbus(property, name = "NextElapseUSecRealtime")]
    fn next_elapse_usec_realtime(&self) -> u64 {
        5_000_000
    }
}

async fn state(connection: &Connection, unit: &str, state: &str) {
    let path = format!("{UNITS}/{unit}");
    let emitter = SignalEmitter::new(connection, path).unwrap();
    let value = zbus::Variant::from(state);
    let changed = HashMap::from([("ActiveState", &value)]);
    emitter
        .emit(
            PROPERTIES,
            "PropertiesChanged",
            &(UNIT, changed, Vec::<String>::new()),
        )
        .await
        .unwrap();
}

#[test]
fn units_and_timers_are_told() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let events = runtime.block_on(async {
        let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
        let guid = zbus::Guid::generate();
        let server = zbus::connection::Builder::unix_stream(there)
            .server(guid)
            .p2p()
            .serve_at(MANAGER_PATH, FakeManager)
            .serve_at(format!("{UNITS}/backup_2etimer"), FakeTimer)
            .build();
        let client = zbus::connection::Builder::unix_stream(here).p2p().build();
        let (server, client) = tokio::join!(server, client);
        let (server, client) = (server.unwrap(), client.unwrap());
        let taken = Arc::new(Taken::default());
        let told = taken.clone();
        let following = tokio::spawn(async move {
            let units = [glob::Pattern::new("*.service").unwrap()];
            let mut outlet = Outlet::new(told);
            follow_on(&client, &units, &mut outlet).await
        });
        let wait_for = async |n: usize| {
            for _ in 0..500 {
                if taken.events.lock().unwrap().len() >= n {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            panic!("only {:?}", taken.events.lock().unwrap());
        };
        // The timer's announcement says that all is set up.
        wait_for(1).await;
        state(&server, "job_2eservice", "activating").await;
        state(&server, "job_2eservice", "inactive").await;
        state(&server, "web_2eservice", "reloading").await;
        state(&server, "web_2eservice", "deactivating").await;
        state(&server, "web_2eservice", "failed").await;
        state(&server, "other_2esocket", "active").await;
        wait_for(4).await;
        following.abort();
        taken.events.lock().unwrap().clone()
    });
    let told: Vec<(&str, &str)> = events
        .iter()
        .map(|e| (e.kind.as_str(), e.subject.as_deref().unwrap_or_default()))
        .collect();
    assert_eq!(
        told,
        [
            (DUE, "backup.timer"),
            (STARTED, "job.service"),
            (STOPPED, "job.service"),
            (FAILED, "web.service"),
        ]
    );
    assert_eq!(events[0].expected_at, Some(5_000_000_000));
}

#[test]
fn names_are_read_as_systemd_writes_them() {
    let of = |label: &str| unit_of(&format!("{UNITS}/{label}"));
    assert_eq!(
        of("dev_2ddisk_5cx2dby_5cx2duuid_2edevice").as_deref(),
        Some("dev-disk\\x2dby\\x2duuid.device")
    );
    assert_eq!(of("a_2"), None);
    assert_eq!(of("a_zz"), None);
    assert_eq!(of(""), None);
    assert_eq!(unit_of("/org/other"), None);
}

#[test]
fn a_timer_is_told_once_for_each_elapse() {
    let mut units = Units::default();
    assert!(units.due("a.timer", 5));
    assert!(!units.due("a.timer", 5));
    assert!(units.due("a.timer", 6));
    assert!(!units.due("a.timer", 0) && !units.due("a.timer", u64::MAX));
}

proptest! {
    #[test]
    fn any_path_is_read_or_refused(path in ".{0,80}") {
        let _ = unit_of(&path);
        let _ = unit_of(&format!("{UNITS}/{path}"));
    }

    #[test]
    fn starts_and_stops_alternate(states in proptest::collection::vec(0usize..6, 0..40)) {
        let names = ["active", "inactive", "failed", "activating", "deactivating", "reloading"];
        let mut units = Units::default();
        let mut runs = false;
        for state in states {
            if let Some(kind) = units.state("u", names[state]) {
                prop_assert_eq!(kind == STARTED, !runs);
                runs = kind == STARTED;
            }
        }
    }
}
