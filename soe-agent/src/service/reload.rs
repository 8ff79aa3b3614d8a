//! Takes over a changed configuration while the agent runs.
//!
//! A file that cannot be used changes nothing. Of one that can be, the keys that
//! [`crate::config::LIVE`] lists take effect, all together; the others are named and wait for a
//! restart.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::agent::{Agent, layer_compression, lock, planner_config, retention};
use crate::cli::logging;
use crate::config::{Config, Reload};
use crate::plan::Event;

/// Reads the file again, with all the checks of a start.
fn read(path: Option<&Path>) -> Result<Config, String> {
    let config = Config::load(path).map_err(|e| e.to_string())?;
    logging::check(&config.agent.log)?;
    layer_compression(&config).map_err(|e| e.to_string())?;
    Ok(config)
}

impl Agent {
    /// Reads the configuration again and takes over what can change while running.
    pub(super) fn reload(self: &Arc<Self>, accept_events: &AtomicBool) {
        let old = self.config();
        let new = match read(old.path.as_deref()) {
            Ok(new) => new,
            Err(error) => {
                return tracing::error!(%error, "the configuration was not read again; the agent goes on with what it has");
            }
        };
        let Reload { live, restart } = old.reload(&new);
        let config = Arc::new(old.with_live_of(&new));
        self.set_config(config.clone());
        // Checked above; a log that cannot be changed is no reason to keep the rest back.
        if let Err(error) = logging::set(&config.agent.log) {
            tracing::warn!(error, "the log goes on as it was");
        }
        accept_events.store(config.accepts_cloudevents(), Ordering::SeqCst);
        self.history.set_retention(retention(&config));
        if let Ok(compression) = layer_compression(&config) {
            self.store.set_compression(compression);
        }
        if let Some(area) = &self.area {
            area.set_budget(config.staging.budget);
        }
        // A capture that is under way keeps to the limit it began with.
        if let Ok(_idle) = self.capture_turn.try_lock() {
            for entry in self.all_entries() {
                entry.pace.set_rate(self.ceiling());
            }
        }
        self.apply(Event::Reconfigured {
            config: Box::new(planner_config(&config, self.scale, self.area.is_some())),
        });
        let groups: Vec<_> = lock(&self.state).groups.values().cloned().collect();
        for group in groups {
            // The defaults that the group goes by may have changed.
            self.apply(Event::GroupUpdated {
                spec: self.plan_spec(&group),
            });
        }
        match live.is_empty() {
            true => {
                tracing::info!("the configuration was read again; nothing that can change now did")
            }
            false => tracing::info!(
                keys = live.join(" "),
                "the configuration was read again and is in effect"
            ),
        }
        if !restart.is_empty() {
            tracing::warn!(
                keys = restart.join(" "),
                "these keys changed, too, but wait for a restart of the agent"
            );
        }
    }
}
