//! `soe trace`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use serde_json::json;

use super::args;
use super::client::{Client, plain};
use super::error::CliError;
use super::offline;
use super::output::{Output, Table, when};
use crate::api::pb;
use crate::api::types::TraceReport;
use crate::seam::UnixNanos;

/// Record, import and export traces of single IOs
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Record every IO of a volume into the history
    Record {
        /// The volume
        volume: String,
        /// For how long
        #[arg(long = "for", value_name = "DUR", value_parser = args::duration)]
        duration: Duration,
    },
    /// Import recorded traces into a history; no agent is needed
    Import {
        /// What the files hold: csv (one IO a line) or series (one bin a line)
        #[arg(long, value_name = "FMT")]
        format: String,
        /// The files
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// The volume of lines that name none
        #[arg(long, value_name = "NAME")]
        volume: Option<String>,
        /// The history's folder; created when missing
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Write recorded IOs as csv; no agent is needed
    Export {
        /// The history's folder
        #[arg(long, value_name = "DIR")]
        history: PathBuf,
        /// Only this volume
        #[arg(long, value_name = "V")]
        volume: Option<String>,
        /// Only IOs of this time or later
        #[arg(long, value_name = "TIME", value_parser = args::time)]
        from: Option<UnixNanos>,
        /// Only IOs before this time
        #[arg(long, value_name = "TIME", value_parser = args::time)]
        to: Option<UnixNanos>,
        /// The file to write [default: standard output]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
}

pub(super) fn run(
    args: Args,
    client: impl FnOnce() -> Result<Client, CliError>,
    out: Output,
) -> Result<(), CliError> {
    match args.verb {
        Verb::Record { volume, duration } => record(&volume, duration, &client()?, out),
        Verb::Import {
            format,
            files,
            volume,
            out: dir,
        } => import(&format, &files, volume.as_deref(), &dir, out),
        Verb::Export {
            history,
            volume,
            from,
            to,
            out: file,
        } => {
            let selection = offline::Selection { volume, from, to };
            export(&history, &selection, file, out)
        }
    }
}

fn record(
    volume: &str,
    duration: Duration,
    client: &Client,
    mut out: Output,
) -> Result<(), CliError> {
    let duration_ms = u64::try_from(duration.as_millis())
        .ok()
        .filter(|_| duration.subsec_nanos().is_multiple_of(1_000_000))
        .ok_or_else(|| CliError::Usage("--for is not a whole number of milliseconds".into()))?;
    let request = pb::TraceRecordRequest {
        volume: args::volume(volume)?,
        duration_ms,
    };
    let report: TraceReport =
        client.call(async |mut stub| plain(stub.trace_record(request).await?))?;
    out.show(&report, |r| {
        let mut table = Table::pairs();
        table.pair("volume", &r.volume);
        table.pair(
            "recorded",
            format!("{} to {}", when(r.window.start), when(r.window.end)),
        );
        table.pair("records", r.records);
        table.pair("dropped", r.dropped);
        table.pair("sampled out", r.sampled_out);
        r.files.iter().for_each(|file| table.pair("file", file));
        table
    })
}

fn import(
    format: &str,
    files: &[PathBuf],
    volume: Option<&str>,
    dir: &Path,
    mut out: Output,
) -> Result<(), CliError> {
    let report = offline::import(format, files, volume, dir)?;
    if out.is_json() {
        return out.json(&json!({
            "lines": report.lines, "volumes": report.volumes, "rows": report.rows,
        }));
    }
    let mut table = Table::pairs();
    table.pair("lines", report.lines);
    table.pair("volumes", report.volumes.join(" "));
    report
        .rows
        .iter()
        .for_each(|(name, rows)| table.pair(&format!("rows of {name}"), rows));
    out.text(&table.render(false))?;
    out.finish()
}

fn export(
    history: &Path,
    selection: &offline::Selection,
    file: Option<PathBuf>,
    mut out: Output,
) -> Result<(), CliError> {
    let Some(path) = file else {
        offline::export(history, selection, out.raw())?;
        return out.finish();
    };
    let failed = || CliError::io(format!("trace file {}", path.display()));
    let mut writer = BufWriter::new(File::create(&path).map_err(failed())?);
    let records = offline::export(history, selection, &mut writer)?;
    writer.flush().map_err(failed())?;
    if out.is_json() {
        return out.json(&json!({"records": records, "file": path}));
    }
    out.line(&format!("{records} records written to {}", path.display()))?;
    out.finish()
}
