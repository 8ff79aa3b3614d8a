//! `soe top`.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IsTerminal};
use std::time::Duration;

use serde_json::json;
use tokio::time::{MissedTickBehavior, interval};

use super::args;
use super::client::{Client, next, plain_all};
use super::error::CliError;
use super::output::{Output, Table, age, micros, or_dash, when};
use crate::api::pb;
use crate::api::types::{GroupStatus, LoadSample, WatchEvent, WatchItem};
use crate::config::units::human_size;

/// Show load, forecasts, layers and decisions as they happen; Ctrl-C ends it
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Time between two views
    #[arg(long, value_name = "DUR", default_value = "1s", value_parser = args::duration)]
    interval: Duration,
    /// End after so many views
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

/// Lines of what happened last.
const NEWS: usize = 8;

#[derive(Default)]
struct Seen {
    load: BTreeMap<String, LoadSample>,
    news: VecDeque<String>,
}

impl Seen {
    fn note(&mut self, item: WatchItem) {
        let news = match item.event {
            WatchEvent::Load(sample) => {
                self.load.insert(sample.volume.clone(), sample);
                return;
            }
            WatchEvent::Layer(l) => {
                format!(
                    "{}: {} layer {} by {}, pause {}",
                    l.volume,
                    l.kind,
                    l.sequence,
                    l.method,
                    micros(l.pause_us)
                )
            }
            WatchEvent::Decision { volume, decision } => {
                format!("{volume}: {}: {}", decision.action, decision.reason)
            }
            WatchEvent::Staging(r) => format!(
                "{}: {} staged, {} valid",
                r.volume,
                human_size(r.status.staged_bytes),
                human_size(r.status.valid_bytes)
            ),
            WatchEvent::Published { published } => {
                format!("event {} from {}", published.kind, published.source)
            }
            WatchEvent::Tracking {
                volume,
                tracking,
                reason,
            } => {
                format!("{volume}: tracking is {tracking} {}", or_dash(reason))
            }
            WatchEvent::Missed { items } => {
                format!("{items} items were left out: this view is too slow")
            }
        };
        self.news.push_front(format!("{} {news}", when(item.at)));
        self.news.truncate(NEWS);
    }
}

pub(super) fn run(args: Args, client: &Client, mut out: Output) -> Result<(), CliError> {
    if args.interval < Duration::from_millis(100) {
        return Err(CliError::Usage("--interval is shorter than 100ms".into()));
    }
    let terminal = io::stdout().is_terminal();
    client.call(async |mut stub| {
        let mut items = stub.watch(pb::WatchRequest::default()).await?.into_inner();
        let mut seen = Seen::default();
        let mut views = 0u64;
        let mut ticks = interval(args.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => return Ok(()),
                item = next(&mut items) => match item? {
                    Some(item) => seen.note(item),
                    None => return Err(CliError::Failed("the agent stopped".into())),
                },
                _ = ticks.tick() => {
                    let listed = stub.list_snapshot_groups(pb::ListSnapshotGroupsRequest {}).await?;
                    let groups: Vec<GroupStatus> = plain_all(listed.into_inner().groups)?;
                    view(&groups, &seen, terminal, &mut out)?;
                    views += 1;
                    if args.count.is_some_and(|count| views >= count) {
                        return Ok(());
                    }
                }
            }
        }
    })
}

fn view(
    groups: &[GroupStatus],
    seen: &Seen,
    terminal: bool,
    out: &mut Output,
) -> Result<(), CliError> {
    if out.is_json() {
        let load: Vec<&LoadSample> = seen.load.values().collect();
        return out.json(&json!({"groups": groups, "load": load}));
    }
    if terminal {
        // Home and clear, so that the view stays in place.
        out.text("\x1b[H\x1b[2J")?;
    }
    out.show(&(), |()| table(groups, seen))?;
    for line in &seen.news {
        out.line(line)?;
    }
    out.finish()
}

fn table(groups: &[GroupStatus], seen: &Seen) -> Table {
    let header = [
        "GROUP", "VOLUME", "READ", "WRITE", "OPS", "P99", "BURST AT", "BURST", "PENDING", "LAYERS",
        "PAUSE", "AGE", "STAGED", "HITS",
    ];
    let mut table = Table::new(&header, "no groups");
    for group in groups {
        for v in &group.volumes {
            let load = seen.load.get(&v.volume);
            let rate = |bytes: u64, interval_ms: u64| {
                format!(
                    "{}/s",
                    human_size(bytes.saturating_mul(1000) / interval_ms.max(1))
                )
            };
            table.row([
                group.group.clone(),
                v.volume.clone(),
                or_dash(load.map(|l| rate(l.read_bytes, l.interval_ms))),
                or_dash(load.map(|l| rate(l.write_bytes, l.interval_ms))),
                or_dash(load.map(|l| {
                    (l.read_ops + l.write_ops).saturating_mul(1000) / l.interval_ms.max(1)
                })),
                or_dash(load.and_then(|l| l.p99_latency_us).map(micros)),
                or_dash(v.predicted.next_burst_at.map(when)),
                or_dash(v.predicted.burst_probability.map(|b| format!("{b:.2}"))),
                or_dash(v.changed_blocks_pending),
                format!("{}+{}", v.baseline_layers, v.differential_layers),
                or_dash(v.last_layer.as_ref().map(|l| micros(l.pause_us))),
                or_dash(v.rpo_age_s.map(age)),
                human_size(v.staging.valid_bytes),
                or_dash(v.staging.hit_ratio.map(|h| format!("{h:.2}"))),
            ]);
        }
    }
    table
}
