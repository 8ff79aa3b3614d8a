//! `soe layer`.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use serde_json::json;

use super::args;
use super::client::{Client, next, plain, plain_all};
use super::error::CliError;
use super::offline;
use super::output::{Output, Table, micros, or_dash, when};
use super::progress::Progress;
use crate::api::engine::{EngineError, ErrorKind};
use crate::api::types::{LayerDetail, LayerInfo, LayerKind, VerifyEvent};
use crate::api::{convert, pb};
use crate::config::units::human_size;
use crate::seam::ByteRange;

/// Capture, list, show, compare and verify layers
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Capture one layer of every volume of a group; returns when all are durable
    Capture {
        /// The group
        name: String,
        /// What to capture
        #[arg(long, value_enum, default_value_t = Kind::Auto)]
        kind: Kind,
    },
    /// List layers, oldest first
    List {
        /// The group
        name: String,
        /// Only of this volume
        #[arg(long, value_name = "V")]
        volume: Option<String>,
    },
    /// Show one layer
    Show {
        /// The layer's id
        id: String,
    },
    /// List the extents that differ between two layers of a volume
    Diff {
        /// The group
        name: String,
        /// The volume
        #[arg(long, value_name = "V")]
        volume: String,
        /// A layer's id
        from: String,
        /// Another layer's id
        to: String,
    },
    /// Re-read and check every layer of a group without restoring it
    Verify {
        /// The group
        name: String,
        /// Only of this volume
        #[arg(long, value_name = "V", conflicts_with = "store")]
        volume: Option<String>,
        /// Check the store in this folder, without an agent
        #[arg(long, value_name = "DIR")]
        store: Option<PathBuf>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// As the agent sees fit
    Auto,
    /// The whole volume
    Baseline,
    /// What changed since the layer before
    Differential,
}

pub(super) fn run(
    args: Args,
    client: impl FnOnce() -> Result<Client, CliError>,
    out: Output,
) -> Result<(), CliError> {
    match args.verb {
        Verb::Capture { name, kind } => capture(name, kind, &client()?, out),
        Verb::List { name, volume } => {
            let volume = volume
                .map(|v| args::volume(&v))
                .transpose()?
                .unwrap_or_default();
            let request = pb::ListLayersRequest {
                group_name: name,
                volume,
            };
            let layers: Vec<LayerInfo> = client()?.call(async |mut stub| {
                plain_all(stub.list_layers(request).await?.into_inner().layers)
            })?;
            show_layers(&layers, out)
        }
        Verb::Show { id } => show(id, &client()?, out),
        Verb::Diff {
            name,
            volume,
            from,
            to,
        } => {
            let volume = args::volume(&volume)?;
            diff(
                pb::DiffLayersRequest {
                    group_name: name,
                    volume,
                    from_layer: from,
                    to_layer: to,
                },
                &client()?,
                out,
            )
        }
        Verb::Verify {
            name,
            store: Some(store),
            ..
        } => {
            let mut report = Report::default();
            let mut progress = Progress::new("verifying");
            offline::verify(&store, &name, &mut |event| {
                report.note(event, &mut progress)
            })?;
            progress.finish();
            report.tell(out)
        }
        Verb::Verify {
            name,
            volume,
            store: None,
        } => {
            let volume = volume
                .map(|v| args::volume(&v))
                .transpose()?
                .unwrap_or_default();
            let request = pb::VerifyLayersRequest {
                group_name: name,
                volume,
            };
            let report = client()?.call(async |mut stub| {
                let mut report = Report::default();
                let mut progress = Progress::new("verifying");
                let mut events = stub.verify_layers(request).await?.into_inner();
                while let Some(event) = next(&mut events).await? {
                    report.note(event, &mut progress);
                }
                progress.finish();
                Ok(report)
            })?;
            report.tell(out)
        }
    }
}

fn capture(name: String, kind: Kind, client: &Client, out: Output) -> Result<(), CliError> {
    let kind = match kind {
        Kind::Auto => None,
        Kind::Baseline => Some(LayerKind::Baseline),
        Kind::Differential => Some(LayerKind::Differential),
    };
    let request = pb::CaptureLayerRequest {
        group_name: name,
        kind: convert::layer_kind_to_pb(kind),
    };
    let layers: Vec<LayerInfo> = client
        .call(async |mut stub| plain_all(stub.capture_layer(request).await?.into_inner().layers))?;
    show_layers(&layers, out)
}

fn show_layers(layers: &[LayerInfo], mut out: Output) -> Result<(), CliError> {
    if out.is_json() {
        return out.json(&json!({"layers": layers}));
    }
    out.show(&layers, |layers| {
        let header = [
            "SEQ", "ID", "VOLUME", "KIND", "LEVEL", "METHOD", "PAUSE", "BLOCKS", "READ", "STORED",
            "CUT AT",
        ];
        let mut table = Table::new(&header, "no layers");
        for l in *layers {
            table.row([
                l.sequence.to_string(),
                l.id.clone(),
                l.volume.clone(),
                l.kind.to_string(),
                l.level.to_string(),
                l.method.to_string(),
                micros(l.pause_us),
                l.changed_blocks.to_string(),
                human_size(l.bytes_read),
                human_size(l.bytes_stored),
                when(l.cut_at),
            ]);
        }
        table
    })
}

fn show(id: String, client: &Client, mut out: Output) -> Result<(), CliError> {
    let request = pb::ShowLayerRequest { id };
    let detail: LayerDetail =
        client.call(async |mut stub| plain(stub.show_layer(request).await?))?;
    out.show(&detail, |d| {
        let l = &d.layer;
        let mut table = Table::pairs();
        table.pair("layer", &l.id);
        table.pair("group", &l.group);
        table.pair(
            "volume",
            format!("{} ({})", l.volume, human_size(l.volume_bytes)),
        );
        table.pair("sequence", l.sequence);
        table.pair("parent", or_dash(d.parent.as_ref()));
        table.pair("kind", l.kind);
        table.pair("rescan", or_dash(l.rescan_reason));
        table.pair("level", l.level);
        table.pair(
            "cut",
            format!(
                "{} at {}, pause {}, skew {}",
                l.method,
                when(l.cut_at),
                micros(l.pause_us),
                micros(l.skew_us)
            ),
        );
        table.pair(
            "captured",
            format!("{} to {}", when(l.started_at), when(l.finished_at)),
        );
        table.pair(
            "epoch",
            format!("{} of generation {}", l.epoch, or_dash(l.generation)),
        );
        table.pair(
            "blocks",
            format!(
                "{} of {}, {} zero",
                l.changed_blocks,
                human_size(l.block_size_bytes),
                d.zero_blocks
            ),
        );
        table.pair(
            "bytes",
            format!(
                "{} read, {} stored as {}",
                l.bytes_read, l.bytes_stored, d.compression
            ),
        );
        table.pair("state root", or_dash(l.state_root.as_ref()));
        table.pair("delta root", or_dash(d.delta_root.as_ref()));
        for file in &d.files {
            table.pair("file", file);
        }
        table
    })
}

/// Extents are written as they come: there may be millions.
fn diff(request: pb::DiffLayersRequest, client: &Client, mut out: Output) -> Result<(), CliError> {
    client.call(async |mut stub| {
        let head = json!({
            "group": request.group_name, "volume": request.volume,
            "from": request.from_layer, "to": request.to_layer,
        });
        let mut pieces = stub.diff_layers(request).await?.into_inner();
        if out.is_json() {
            let head = head.to_string();
            out.text(&format!("{},\"extents\":[", head.trim_end_matches('}')))?;
        } else {
            out.line("OFFSET LENGTH")?;
        }
        let mut first = true;
        while let Some(piece) = pieces.message().await? {
            for range in piece.extents.into_iter().map(ByteRange::from) {
                if out.is_json() {
                    let comma = if first { "" } else { "," };
                    out.text(&format!(
                        "{comma}{{\"offset\":{},\"len\":{}}}",
                        range.offset, range.len
                    ))?;
                } else {
                    out.line(&format!("{} {}", range.offset, range.len))?;
                }
                first = false;
            }
        }
        if out.is_json() {
            out.line("]}")?;
        }
        out.finish()
    })
}

/// What a verification found.
#[derive(Default)]
struct Report {
    problems: Vec<serde_json::Value>,
    sentences: Vec<String>,
    summary: Option<(u64, u64, u64, u64)>,
}

impl Report {
    fn note(&mut self, event: VerifyEvent, progress: &mut Progress) {
        match event {
            VerifyEvent::Progress {
                bytes_checked,
                bytes_total,
                ..
            } => progress.update(bytes_checked, bytes_total),
            VerifyEvent::Problem {
                layer,
                volume,
                what,
            } => {
                self.sentences
                    .push(format!("layer {layer} of {volume}: {what}"));
                self.problems
                    .push(json!({"layer": layer, "volume": volume, "what": what}));
            }
            VerifyEvent::Summary {
                layers,
                blocks,
                bytes,
                problems,
            } => {
                self.summary = Some((layers, blocks, bytes, problems));
            }
        }
    }

    fn tell(self, mut out: Output) -> Result<(), CliError> {
        let Some((layers, blocks, bytes, found)) = self.summary else {
            return Err(CliError::Failed(
                "the verification broke off before its end; run it again".into(),
            ));
        };
        if out.is_json() {
            out.json(&json!({"layers": layers, "blocks": blocks, "bytes": bytes, "problems": self.problems}))?;
        } else {
            for sentence in &self.sentences {
                out.line(sentence)?;
            }
            out.line(&format!(
                "{layers} layers, {blocks} blocks, {} checked, {found} problems",
                human_size(bytes)
            ))?;
            out.finish()?;
        }
        if found > 0 || !self.problems.is_empty() {
            let count = found.max(self.problems.len() as u64);
            return Err(EngineError::new(
                ErrorKind::Integrity,
                format!("{count} problems were found; restore from layers before the damage or from another copy of the store"),
            )
            .into());
        }
        Ok(())
    }
}
