//! What a changed configuration changes at once. Pure.

use serde_json::Value;

use super::Config;

/// Keys, or whole tables, that take effect without a restart. All others are fixed when the daemon
/// starts, because files, sockets or programs have been set up by them.
pub const LIVE: &[&str] = &[
    "agent.log",
    "event",
    "history.max_size",
    "history.min_free",
    "history.retention",
    "host",
    "limits",
    "model.train_after",
    "model.train_every",
    "plan",
    "staging.budget",
    "store.compression",
    "store.min_free",
];

/// `old` with the values that `new` has for the keys of [`LIVE`].
pub(super) fn merge(old: &Config, new: &Config) -> Config {
    let mut config = old.clone();
    config.agent.log.clone_from(&new.agent.log);
    config.event = new.event.clone();
    config.history.max_size = new.history.max_size;
    config.history.min_free = new.history.min_free;
    config.history.retention = new.history.retention;
    config.host = new.host.clone();
    config.limits = new.limits.clone();
    config.model.train_after = new.model.train_after;
    config.model.train_every = new.model.train_every;
    config.plan = new.plan.clone();
    config.staging.budget = new.staging.budget;
    config.store.compression = new.store.compression;
    config.store.min_free = new.store.min_free;
    config
}

/// The keys that differ between two configurations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reload {
    /// Changed, and in effect at once.
    pub live: Vec<String>,
    /// Changed, but only in effect after a restart.
    pub restart: Vec<String>,
}

fn flatten(value: &Value, key: &str, out: &mut Vec<(String, Value)>) {
    match value {
        Value::Object(table) => {
            for (name, inner) in table {
                let key = if key.is_empty() {
                    name.clone()
                } else {
                    format!("{key}.{name}")
                };
                flatten(inner, &key, out);
            }
        }
        other => out.push((key.to_owned(), other.clone())),
    }
}

fn keys(config: &Config) -> Vec<(String, Value)> {
    let mut out = Vec::new();
    flatten(
        &serde_json::to_value(config).unwrap_or(Value::Null),
        "",
        &mut out,
    );
    out
}

fn is_live(key: &str) -> bool {
    LIVE.iter().any(|live| {
        key == *live
            || key
                .strip_prefix(live)
                .is_some_and(|rest| rest.starts_with('.'))
    })
}

pub(super) fn compare(old: &Config, new: &Config) -> Reload {
    let (old, new) = (keys(old), keys(new));
    let mut reload = Reload::default();
    for (key, value) in &new {
        let before = old.iter().find(|(k, _)| k == key).map(|(_, v)| v);
        if before == Some(value) {
            continue;
        }
        let list = if is_live(key) {
            &mut reload.live
        } else {
            &mut reload.restart
        };
        list.push(key.clone());
    }
    reload
}
