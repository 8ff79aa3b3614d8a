//! The table of all metrics.

use std::fmt;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::family::{Counters, Gauges, Histograms};
use super::{Definition, Kind, Stability, Unit};

/// Pauses of a cut: 100 us to 10 s, fine around the default budget of 100 ms.
fn pauses() -> Histogram {
    Histogram::new([
        0.0001, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 10.0,
    ])
}

/// Work of 1 ms to about 4 hours.
fn works() -> Histogram {
    Histogram::new([
        0.001, 0.01, 0.1, 1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 14400.0,
    ])
}

macro_rules! define {
    (@type counter $n:expr) => { Counters<$n> };
    (@type gauge $n:expr) => { Gauges<$n> };
    (@type histogram $n:expr) => { Histograms<$n> };
    (@kind counter) => { Kind::Counter };
    (@kind gauge) => { Kind::Gauge };
    (@kind histogram) => { Kind::Histogram };
    (@new counter $labels:expr,) => { Counters { names: $labels, family: Family::default() } };
    (@new gauge $labels:expr,) => { Gauges { names: $labels, family: Family::default() } };
    (@new histogram $labels:expr, $buckets:expr) => {
        Histograms { names: $labels, family: Family::new_with_constructor($buckets as fn() -> Histogram) }
    };
    (@count) => { 0 };
    (@count $first:literal $($rest:literal)*) => { 1 + define!(@count $($rest)*) };
    ($($kind:ident $field:ident $name:literal [$($label:literal),*] $unit:ident $stability:ident $(by $buckets:expr)?, $meaning:literal;)+) => {
        /// Every metric of the agent.
        pub struct Metrics {
            registry: Registry,
            $(#[doc = $meaning] pub $field: define!(@type $kind { define!(@count $($label)*) }),)+
        }

        /// Every metric, in the order of the document.
        pub const DEFINITIONS: &[Definition] = &[$(Definition {
            name: $name,
            kind: define!(@kind $kind),
            unit: Unit::$unit,
            labels: &[$($label),*],
            stability: Stability::$stability,
            meaning: $meaning,
        },)+];

        #[cfg(test)]
        impl Metrics {
            /// Makes one series of every metric, since the encoder leaves out metrics without any.
            pub(super) fn touch_all(&self) {
                $(self.$field.touch();)+
            }
        }

        impl Default for Metrics {
            fn default() -> Self {
                let mut registry = Registry::default();
                $(
                    let $field = define!(@new $kind [$($label),*], $($buckets)?);
                    // The registry ends every help text with a full stop itself.
                    registry.register($name, $meaning.trim_end_matches('.'), $field.family.clone());
                )+
                Self { registry, $($field,)+ }
            }
        }
    };
}

define! {
    gauge build_info "soe_build_info" ["version"] Count Stable, "Always 1; the label tells the version.";
    gauge start_time "soe_start_time_seconds" [] UnixSeconds Stable, "When the agent started.";
    gauge volumes_tracked "soe_volumes_tracked" [] Count Stable, "Volumes whose changes are tracked.";

    counter volume_operations "soe_volume_operations" ["volume", "op"] Count Stable, "IOs completed; op is read, write, discard or flush.";
    counter volume_bytes "soe_volume_bytes" ["volume", "op"] Bytes Stable, "Bytes of completed IOs; op is read, write or discard.";
    gauge volume_latency "soe_volume_latency_seconds" ["volume", "op", "quantile"] Seconds Stable, "Latency in the last window; quantile is 0.5, 0.9, 0.99 or 0.999.";
    gauge volume_queue_depth "soe_volume_queue_depth" ["volume"] Count Experimental, "Mean of IOs under way in the last window.";
    gauge volume_sequential "soe_volume_sequential_ratio" ["volume"] Ratio Experimental, "Share of IOs in the last window that continued a sequential run.";

    counter observe_events "soe_observe_events" ["result"] Count Stable, "Kernel events; result is seen, rejected or dropped. Their sum is what the kernel produced.";
    counter observe_misses "soe_observe_misses" ["volume", "side"] Count Stable, "Marks of writes that were missed; side is queue, complete or stash. Runs of programs that the kernel skipped count for every volume of the host.";
    gauge tracking_complete "soe_tracking_complete" ["volume"] Count Stable, "1 while the change map tells the whole truth, else 0.";
    gauge changed_blocks_pending "soe_changed_blocks_pending" ["volume"] Count Stable, "Blocks the next differential would hold if it were cut now.";
    counter rescans "soe_rescans" ["volume", "reason"] Count Stable, "Generations that ended, by reason.";

    counter history_rows "soe_history_rows" ["result"] Count Stable, "Rows of the history; result is written or dropped (what could not be written for too long).";
    gauge history_size "soe_history_size_bytes" [] Bytes Stable, "Size of the history on disk.";

    counter captures "soe_captures" ["group", "kind", "method", "outcome"] Count Stable, "Attempts to capture; outcome is done or failed.";
    histogram capture_pause "soe_capture_pause_seconds" ["group", "method"] Seconds Stable by pauses, "How long a cut paused writes.";
    histogram capture_duration "soe_capture_duration_seconds" ["group", "kind"] Seconds Stable by works, "From the beginning of a capture until its layers were durable.";
    counter capture_missed_budgets "soe_capture_missed_pause_budgets" ["group"] Count Stable, "Captures whose pause was longer than the budget.";
    counter capture_optimistic "soe_capture_optimistic_attempts" ["group", "outcome"] Count Experimental, "Tries of the zero-pause cut; outcome is won or lost.";
    counter capture_read "soe_capture_read_bytes" ["volume"] Bytes Stable, "Bytes read from the volume by captures, pre-copy passes included.";
    counter capture_stored "soe_capture_stored_bytes" ["volume"] Bytes Stable, "Bytes added to the store.";
    counter guard_thaws "soe_guard_forced_thaws" [] Count Stable, "Freezes that ended before the agent thawed them: the deadline passed, or somebody else thawed.";
    gauge layers "soe_layers" ["volume", "kind"] Count Stable, "Durable layers; kind is baseline or differential.";
    gauge layer_age "soe_layer_age_seconds" ["volume"] Seconds Stable, "Time since the cut of the newest durable layer.";
    gauge store_size "soe_store_size_bytes" [] Bytes Stable, "Size of the layer store.";
    counter restore_bytes "soe_restore_bytes" ["source"] Bytes Stable, "Bytes written by restores; source is layer, staging or hole.";
    counter restores "soe_restores" ["outcome"] Count Stable, "Restores; outcome is done or failed.";

    gauge staged "soe_staging_staged_bytes" ["volume"] Bytes Stable, "Bytes staged.";
    gauge staged_valid "soe_staging_valid_bytes" ["volume"] Bytes Stable, "Bytes staged and still equal to the origin.";
    counter staging_lookups "soe_staging_lookups" ["volume", "result"] Count Stable, "Reads that asked the staging area; result is hit or miss.";
    counter staging_invalidated "soe_staging_invalidated_bytes" ["volume"] Bytes Stable, "Bytes overwritten on the origin before use.";

    counter forecasts "soe_forecasts" ["member"] Count Stable, "Forecasts served, by member.";
    histogram forecast_duration "soe_forecast_duration_seconds" [] Seconds Experimental by works, "Time to forecast one volume.";
    histogram training_duration "soe_training_duration_seconds" [] Seconds Experimental by works, "Time of one training.";
    gauge quantile_loss "soe_forecast_quantile_loss_bytes_per_second" ["volume", "member"] BytesPerSecond Experimental, "Recent mean pinball loss of the matured forecasts.";
    gauge predicted_load "soe_predicted_load_bytes_per_second" ["volume", "quantile"] BytesPerSecond Stable, "Forecast load of the next bin; quantile is 0.1, 0.5 or 0.9.";
    gauge burst_probability "soe_burst_probability_ratio" ["volume"] Ratio Stable, "Probability of a burst within the horizon.";
    counter decisions "soe_decisions" ["volume", "action"] Count Stable, "Decisions of the planner; action is capture, stage or wait.";

    counter throttled "soe_throttled_seconds" ["volume"] Seconds Experimental, "Whole seconds that captures and staging of the volume waited for their budget or the foreground.";
    counter api_requests "soe_api_requests" ["call", "outcome"] Count Stable, "gRPC calls; outcome is done, abandoned or the kind of error.";
    counter events "soe_events" ["outcome"] Count Stable, "Events over HTTP; outcome is stored, known, refused or failed.";
}

impl Metrics {
    /// The content type of [`Metrics::encode`].
    pub const CONTENT_TYPE: &'static str =
        "application/openmetrics-text; version=1.0.0; charset=utf-8";

    /// A fresh registry.
    pub fn new() -> Self {
        let metrics = Self::default();
        metrics.build_info.set([env!("CARGO_PKG_VERSION")], 1.0);
        metrics
    }

    /// All series as OpenMetrics text.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}
