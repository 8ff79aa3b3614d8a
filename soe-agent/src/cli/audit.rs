//! `soe audit`.

use std::path::PathBuf;

use serde_json::json;

use super::args;
use super::error::CliError;
use super::output::{Output, Table, when};
use crate::api::audit::{Caller, Entry, Line, Outcome, read};
use crate::config::Config;
use crate::seam::UnixNanos;

/// Show who did what: every call that changed something, oldest first
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The agent's configuration, which says where the file is
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The audit file itself
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    file: Option<PathBuf>,
    /// Only calls of this time or later
    #[arg(long, value_name = "TIME", value_parser = args::time)]
    since: Option<UnixNanos>,
}

pub(super) fn run(args: Args, mut out: Output) -> Result<(), CliError> {
    let path = match args.file {
        Some(file) => file,
        None => Config::load(args.config.as_deref())?.audit_file(),
    };
    let mut entries = Vec::new();
    let mut damaged = Vec::new();
    for line in read(&path)? {
        match line {
            Line::Entry(entry) if args.since.is_none_or(|since| entry.at >= since) => {
                entries.push(entry)
            }
            Line::Entry(_) => {}
            Line::Damaged { number } => damaged.push(number),
        }
    }
    if out.is_json() {
        return out.json(&json!({"entries": entries, "damaged_lines": damaged}));
    }
    out.show(&entries, |entries| {
        let mut table = Table::new(
            &["TIME", "WHO", "CALL", "SUBJECT", "OUTCOME"],
            "nothing was changed yet",
        );
        for entry in entries {
            table.row(cells(entry));
        }
        for number in &damaged {
            table.row([format!("line {number} of {} is damaged", path.display())]);
        }
        table
    })
}

fn cells(entry: &Entry) -> [String; 5] {
    let who = match &entry.caller {
        Caller::Unix {
            uid,
            pid: Some(pid),
            ..
        } => format!("uid {uid} pid {pid}"),
        Caller::Unix { uid, pid: None, .. } => format!("uid {uid}"),
        Caller::Http { peer } => format!("http {peer}"),
    };
    let outcome = match &entry.outcome {
        Outcome::Started => "started".into(),
        Outcome::Done => "done".into(),
        Outcome::Failed { error, .. } => format!("failed: {error}"),
        Outcome::Abandoned => "the caller went away".into(),
    };
    [
        when(entry.at),
        who,
        entry.call.clone(),
        entry.subject.clone(),
        outcome,
    ]
}
