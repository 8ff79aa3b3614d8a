//! `soe restore`.

use std::path::PathBuf;

use super::args;
use super::client::{Client, next};
use super::error::CliError;
use super::output::{Output, Table};
use super::progress::Progress;
use crate::api::pb;
use crate::api::types::{RestorePhase, RestorePoint, RestoreProgress, RestoreRequest};
use crate::config::units::human_size;
use crate::seam::UnixNanos;

/// Restore a state of a volume to a file or block device
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The group
    name: String,
    /// The volume whose state is wanted
    #[arg(long, value_name = "V")]
    volume: String,
    /// The layer to restore: an id, or latest
    #[arg(
        long,
        value_name = "ID|latest",
        default_value = "latest",
        conflicts_with = "at"
    )]
    layer: String,
    /// The newest layer cut at or before this time, such as 2026-03-01T12:00:00Z
    #[arg(long, value_name = "TIME", value_parser = args::time)]
    at: Option<UnixNanos>,
    /// The file (created at the volume's size) or block device to write
    #[arg(long, value_name = "PATH")]
    to: PathBuf,
    /// Write only what differs from the target's present content; also resumes a restore
    #[arg(long)]
    differential: bool,
}

pub(super) fn run(args: Args, client: &Client, mut out: Output) -> Result<(), CliError> {
    let point = match (args.at, args.layer.as_str()) {
        (Some(at), _) => RestorePoint::At(at),
        (None, "latest") => RestorePoint::Latest,
        (None, id) => RestorePoint::Layer(id.to_owned()),
    };
    let request = RestoreRequest {
        group: args.name,
        volume: args::volume(&args.volume)?,
        point,
        target: args::absolute(&args.to)?.into(),
        differential: args.differential,
    };
    let target = request.target.display().to_string();
    let last = client.call(async |mut stub| {
        let mut steps = stub
            .restore(pb::RestoreRequest::from(request))
            .await?
            .into_inner();
        let mut bar = Progress::new("restoring");
        let mut last: Option<RestoreProgress> = None;
        while let Some(step) = next(&mut steps).await? {
            let step: RestoreProgress = step;
            bar.update(step.bytes_done, step.bytes_total);
            last = Some(step);
        }
        bar.finish();
        Ok(last)
    })?;
    let done = last.filter(|p| p.phase == RestorePhase::Done).ok_or_else(|| {
        CliError::Failed(format!(
            "the restore to {target} broke off before its end and the target is incomplete; run it again with --differential to go on"
        ))
    })?;
    out.show(&done, |p| {
        let mut table = Table::pairs();
        table.pair(
            "restored",
            format!("{} to {target}", human_size(p.bytes_total)),
        );
        table.pair("  from the store", human_size(p.bytes_written));
        table.pair("  from staging", human_size(p.bytes_from_staging));
        table.pair("  already there", human_size(p.bytes_equal));
        table.pair("  zero", human_size(p.bytes_zeroed));
        table
    })
}
