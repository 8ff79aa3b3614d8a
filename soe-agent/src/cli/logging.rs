//! The daemon's log on standard error, and changing its level while it runs.

use std::io::{self, IsTerminal};
use std::sync::OnceLock;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Reads `[agent] log`. The error says what is wrong with it.
pub fn check(directives: &str) -> Result<EnvFilter, String> {
    EnvFilter::builder().parse(directives).map_err(|e| {
        format!("agent.log: {directives:?} is no log level ({e}); use error, warn, info, debug, trace, or target=level")
    })
}

/// Starts logging. Under systemd, which adds the time itself, lines have none.
pub fn init(directives: &str) -> Result<(), String> {
    let (filter, handle) = reload::Layer::new(check(directives)?);
    let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal() && !plain)
        .with_target(false);
    let registry = tracing_subscriber::registry().with(filter);
    let started = if std::env::var_os("JOURNAL_STREAM").is_some() {
        registry.with(lines.without_time()).try_init()
    } else {
        registry.with(lines).try_init()
    };
    started.map_err(|e| format!("the log cannot be started: {e}"))?;
    // Set once: try_init above fails a second time.
    let _ = FILTER.set(handle);
    Ok(())
}

/// Changes the level, for a reload of the configuration.
pub fn set(directives: &str) -> Result<(), String> {
    let filter = check(directives)?;
    match FILTER.get() {
        Some(handle) => handle
            .reload(filter)
            .map_err(|e| format!("the log level cannot be changed: {e}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_checked() {
        for good in ["info", "warn,soe_agent::plan=debug", "trace"] {
            assert!(check(good).is_ok(), "{good}");
        }
        assert!(
            check("soe_agent=loud")
                .unwrap_err()
                .starts_with("agent.log: \"soe_agent=loud\" is no log level")
        );
    }
}
