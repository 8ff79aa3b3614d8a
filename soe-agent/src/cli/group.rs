//! `soe group`.

use std::time::Duration;

use clap::{Subcommand, ValueEnum};
use serde_json::json;

use super::args;
use super::client::{Client, plain, plain_all};
use super::error::CliError;
use super::output::{Output, Table, age, micros, or_dash, when};
use crate::api::pb;
use crate::api::types::{Criticality, GroupSpec, GroupStatus, GroupUpdate, VolumeStatus};
use crate::config::units::human_size;

/// Create, list, show, change and delete snapshot groups
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Create a group: volumes that are cut at one instant
    Create {
        /// The group's name
        name: String,
        /// Volumes: block devices, links to them, or mount points
        #[arg(long = "volume", value_name = "PATH", required = true, num_args = 1..)]
        volumes: Vec<String>,
        #[command(flatten)]
        terms: Terms,
    },
    /// List all groups
    List,
    /// Show a group and its volumes
    Status {
        /// The group's name
        name: String,
    },
    /// Change a group; what is not named stays
    Update {
        /// The group's name
        name: String,
        /// Volumes to add
        #[arg(long = "add-volume", value_name = "PATH", num_args = 1..)]
        add_volumes: Vec<String>,
        /// Volumes to take out; their layers stay
        #[arg(long = "remove-volume", value_name = "PATH", num_args = 1..)]
        remove_volumes: Vec<String>,
        #[command(flatten)]
        terms: Terms,
    },
    /// Forget a group; its layers stay in the store unless --delete-layers
    Delete {
        /// The group's name
        name: String,
        /// Also give up its layers, for good
        #[arg(long)]
        delete_layers: bool,
    },
}

#[derive(Debug, clap::Args)]
struct Terms {
    /// Let forecasts decide when to capture and what to stage [default of a new group: on]
    #[arg(long, value_name = "on|off")]
    prediction: Option<Switch>,
    /// Age that the newest layer should not exceed, such as 15m
    #[arg(long, value_name = "DUR", value_parser = args::duration)]
    rpo: Option<Duration>,
    /// Longest pause of writes that a cut may cause, such as 100ms
    #[arg(long, value_name = "DUR", value_parser = args::duration)]
    max_pause: Option<Duration>,
    /// Foreground 99th percentile latency that background work must respect, such as 5ms
    #[arg(long, value_name = "DUR", value_parser = args::duration)]
    p99_target: Option<Duration>,
    /// What the application is, such as postgres
    #[arg(long, value_name = "TYPE")]
    app: Option<String>,
    /// How much it matters: low, normal or high
    #[arg(long, value_name = "LEVEL")]
    criticality: Option<Criticality>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

struct Converted {
    prediction: Option<bool>,
    rpo_s: Option<u64>,
    max_pause_us: Option<u64>,
    p99_target_us: Option<u64>,
}

impl Terms {
    fn converted(&self) -> Result<Converted, CliError> {
        Ok(Converted {
            prediction: self.prediction.map(|p| p == Switch::On),
            rpo_s: self.rpo.map(|d| args::seconds("--rpo", d)).transpose()?,
            max_pause_us: self
                .max_pause
                .map(|d| args::micros("--max-pause", d))
                .transpose()?,
            p99_target_us: self
                .p99_target
                .map(|d| args::micros("--p99-target", d))
                .transpose()?,
        })
    }
}

fn names(volumes: &[String]) -> Result<Vec<String>, CliError> {
    volumes.iter().map(|v| args::volume(v)).collect()
}

pub(super) fn run(args: Args, client: &Client, out: Output) -> Result<(), CliError> {
    match args.verb {
        Verb::Create {
            name,
            volumes,
            terms,
        } => {
            let Converted {
                prediction,
                rpo_s,
                max_pause_us,
                p99_target_us,
            } = terms.converted()?;
            let spec = GroupSpec {
                name,
                volumes: names(&volumes)?,
                prediction_enabled: prediction.unwrap_or(true),
                rpo_s,
                max_pause_us,
                p99_target_us,
                app: terms.app,
                criticality: terms.criticality.unwrap_or(Criticality::Normal),
            };
            let request = pb::CreateSnapshotGroupRequest::from(spec);
            let group =
                client.call(async |mut stub| plain(stub.create_snapshot_group(request).await?))?;
            show(&group, out)
        }
        Verb::List => list(client, out),
        Verb::Status { name } => {
            let request = pb::GetSnapshotGroupStatusRequest { group_name: name };
            let group = client
                .call(async |mut stub| plain(stub.get_snapshot_group_status(request).await?))?;
            show(&group, out)
        }
        Verb::Update {
            name,
            add_volumes,
            remove_volumes,
            terms,
        } => {
            let Converted {
                prediction,
                rpo_s,
                max_pause_us,
                p99_target_us,
            } = terms.converted()?;
            let update = GroupUpdate {
                name: name.clone(),
                prediction_enabled: prediction,
                rpo_s,
                max_pause_us,
                p99_target_us,
                app: terms.app,
                criticality: terms.criticality,
                add_volumes: names(&add_volumes)?,
                remove_volumes: names(&remove_volumes)?,
            };
            if update
                == (GroupUpdate {
                    name,
                    ..GroupUpdate::default()
                })
            {
                return Err(CliError::Usage(
                    "nothing to change was named; see `soe group update --help`".into(),
                ));
            }
            let request = pb::UpdateSnapshotGroupRequest::from(update);
            let group =
                client.call(async |mut stub| plain(stub.update_snapshot_group(request).await?))?;
            show(&group, out)
        }
        Verb::Delete {
            name,
            delete_layers,
        } => delete(name, delete_layers, client, out),
    }
}

fn delete(
    name: String,
    delete_layers: bool,
    client: &Client,
    mut out: Output,
) -> Result<(), CliError> {
    let request = pb::DeleteSnapshotGroupRequest {
        group_name: name.clone(),
        delete_layers,
    };
    let deleted = client.call(async |mut stub| {
        Ok(stub
            .delete_snapshot_group(request)
            .await?
            .into_inner()
            .layers_deleted)
    })?;
    if out.is_json() {
        return out.json(&json!({"group": name, "layers_deleted": deleted}));
    }
    out.line(&format!("group {name} deleted, {deleted} layers given up"))?;
    out.finish()
}

fn list(client: &Client, mut out: Output) -> Result<(), CliError> {
    let groups: Vec<GroupStatus> = client.call(async |mut stub| {
        plain_all(
            stub.list_snapshot_groups(pb::ListSnapshotGroupsRequest {})
                .await?
                .into_inner()
                .groups,
        )
    })?;
    if out.is_json() {
        return out.json(&json!({"groups": groups}));
    }
    out.show(&groups, |groups| {
        let header = [
            "GROUP",
            "VOLUMES",
            "LAYERS",
            "PREDICTION",
            "RPO",
            "OLDEST AGE",
            "LAST ERROR",
        ];
        let mut table = Table::new(&header, "no groups; create one with `soe group create`");
        for g in groups {
            let oldest = g
                .volumes
                .iter()
                .map(|v| v.rpo_age_s)
                .max_by_key(|a| a.unwrap_or(u64::MAX))
                .flatten();
            table.row([
                g.group.clone(),
                g.volumes.len().to_string(),
                g.volumes.iter().map(|v| v.layers).sum::<u64>().to_string(),
                on_off(g.prediction_enabled).into(),
                age(g.rpo_s),
                or_dash(oldest.map(age)),
                or_dash(g.last_error.as_ref()),
            ]);
        }
        table
    })
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

fn show(group: &GroupStatus, mut out: Output) -> Result<(), CliError> {
    out.show(group, |g| {
        let mut table = Table::pairs();
        table.pair("group", &g.group);
        table.pair("prediction", on_off(g.prediction_enabled));
        table.pair("rpo", age(g.rpo_s));
        table.pair(
            "pause budget",
            format!(
                "{}, missed {} times",
                micros(g.max_pause_us),
                g.missed_pause_budgets
            ),
        );
        table.pair("p99 target", or_dash(g.p99_target_us.map(micros)));
        table.pair(
            "application",
            format!("{}, criticality {}", or_dash(g.app.as_ref()), g.criticality),
        );
        if let Some(error) = &g.last_error {
            table.pair("last error", error);
        }
        g.volumes.iter().for_each(|v| volume(v, &mut table));
        table
    })
}

fn volume(v: &VolumeStatus, table: &mut Table) {
    table.pair(
        "volume",
        format!(
            "{} ({}, {})",
            v.volume,
            human_size(v.size_bytes),
            v.device_id
        ),
    );
    let rescan = v.rescan_reason.map_or(String::new(), |r| {
        format!("; the next layer reads everything: {r}")
    });
    table.pair(
        "  tracking",
        format!("{}, epoch {}{rescan}", v.tracking, v.epoch),
    );
    if let Some(why) = &v.missing {
        table.pair("  missing", why);
    }
    table.pair(
        "  layers",
        format!(
            "{} ({} baseline, {} differential)",
            v.layers, v.baseline_layers, v.differential_layers
        ),
    );
    if let Some(l) = &v.last_layer {
        table.pair(
            "  last layer",
            format!(
                "{} {} at {}, {} cut by {}, pause {}, {} blocks, {} read, {} stored",
                l.id,
                l.kind,
                when(l.cut_at),
                l.level,
                l.method,
                micros(l.pause_us),
                l.changed_blocks,
                human_size(l.bytes_read),
                human_size(l.bytes_stored)
            ),
        );
    }
    table.pair(
        "  pending",
        format!("{} changed blocks", or_dash(v.changed_blocks_pending)),
    );
    table.pair(
        "  age",
        format!("{} of {}", or_dash(v.rpo_age_s.map(age)), age(v.rpo_s)),
    );
    let s = &v.staging;
    table.pair(
        "  staging",
        format!(
            "{} staged, {} valid, of {}; hit ratio {}",
            human_size(s.staged_bytes),
            human_size(s.valid_bytes),
            human_size(s.budget_bytes),
            or_dash(s.hit_ratio.map(|r| format!("{r:.2}")))
        ),
    );
    let p = &v.predicted;
    table.pair(
        "  predicted",
        format!(
            "load {}, burst {} with probability {}, quiet from {}",
            or_dash(
                p.load_now
                    .map(|l| format!("{}/s", human_size(l.max(0.0) as u64)))
            ),
            or_dash(p.next_burst_at.map(when)),
            or_dash(p.burst_probability.map(|b| format!("{b:.2}"))),
            or_dash(
                p.next_low_window
                    .map(|w| format!("{} to {}", when(w.start), when(w.end)))
            )
        ),
    );
    if let Some(model) = &p.model {
        table.pair(
            "  model",
            format!("{model} ({})", or_dash(p.model_reason.as_ref())),
        );
    }
    if let Some(d) = &v.last_decision {
        table.pair(
            "  decision",
            format!("{} at {}: {}", d.action, when(d.at), d.reason),
        );
    }
}
