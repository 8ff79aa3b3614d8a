//! `soe events`.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use clap::Subcommand;
use serde_json::json;

use super::args;
use super::client::{Client, plain_all};
use super::error::CliError;
use super::output::{Output, Table, or_dash, when};
use crate::api::types::Event;
use crate::api::{cloudevents, pb};
use crate::seam::UnixNanos;

/// Bytes of the largest file that is published.
const MAX_BYTES: u64 = 64 << 20;

/// Publish or list events that announce a change of load
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Publish one CloudEvent, or a JSON array of them
    Publish {
        /// File with CloudEvents 1.0 as JSON; - is standard input
        #[arg(default_value = "-")]
        file: PathBuf,
    },
    /// List events, newest first
    List {
        /// Only events of this time or later
        #[arg(long, value_name = "TIME", value_parser = args::time)]
        since: Option<UnixNanos>,
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
        limit: u32,
    },
}

pub(super) fn run(args: Args, client: &Client, out: Output) -> Result<(), CliError> {
    match args.verb {
        Verb::Publish { file } => publish(&file, client, out),
        Verb::List { since, limit } => list(since, limit, client, out),
    }
}

fn read(file: &PathBuf) -> Result<Vec<u8>, CliError> {
    let mut text = Vec::new();
    let failed = || CliError::io(format!("event file {}", file.display()));
    if file.as_os_str() == "-" {
        io::stdin()
            .lock()
            .take(MAX_BYTES + 1)
            .read_to_end(&mut text)
            .map_err(failed())?;
    } else {
        File::open(file)
            .map_err(failed())?
            .take(MAX_BYTES + 1)
            .read_to_end(&mut text)
            .map_err(failed())?;
    }
    if text.len() as u64 > MAX_BYTES {
        return Err(CliError::Usage(format!(
            "event file {} is larger than 64 MiB; publish it in parts",
            file.display()
        )));
    }
    Ok(text)
}

fn publish(file: &PathBuf, client: &Client, mut out: Output) -> Result<(), CliError> {
    let now = chrono::Utc::now().timestamp_nanos_opt().unwrap_or_default();
    let events = cloudevents::from_json(&read(file)?, now)
        .map_err(|e| CliError::Usage(format!("event file {}: {e}", file.display())))?;
    let (stored, known) = client.call(async |mut stub| {
        let (mut stored, mut known) = (0u64, 0u64);
        for event in events {
            let request = pb::PublishEventRequest {
                event: Some(event.into()),
            };
            if stub.publish_event(request).await?.into_inner().stored {
                stored += 1;
            } else {
                known += 1;
            }
        }
        Ok((stored, known))
    })?;
    if out.is_json() {
        return out.json(&json!({"stored": stored, "already_known": known}));
    }
    out.line(&format!("{stored} events stored, {known} already known"))?;
    out.finish()
}

fn list(
    since: Option<UnixNanos>,
    limit: u32,
    client: &Client,
    mut out: Output,
) -> Result<(), CliError> {
    let request = pb::ListEventsRequest {
        since_unix_ns: since,
        limit,
    };
    let events: Vec<Event> = client
        .call(async |mut stub| plain_all(stub.list_events(request).await?.into_inner().events))?;
    if out.is_json() {
        return out.json(&json!({"events": events}));
    }
    out.show(&events, |events| {
        let mut table = Table::new(
            &[
                "TIME", "EXPECTED", "TYPE", "SOURCE", "ID", "SUBJECT", "VOLUMES",
            ],
            "no events",
        );
        for e in events {
            table.row([
                when(e.time),
                or_dash(e.expected_at.map(when)),
                e.kind.clone(),
                e.source.clone(),
                e.id.clone(),
                or_dash(e.subject.as_ref()),
                or_dash(Some(e.volumes.join(" ")).filter(|v| !v.is_empty())),
            ]);
        }
        table
    })
}
