//! `soe model`.

use clap::Subcommand;

use super::args;
use super::client::{Client, plain};
use super::error::CliError;
use super::output::{Output, Table, or_dash, when};
use crate::api::pb;
use crate::api::types::ModelReport;

/// Show or train the models behind the forecasts
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show which member serves, why, and how well each did
    Show {
        /// The volume [default: the model all volumes share]
        volume: Option<String>,
    },
    /// Train now; returns when the result was judged
    Train {
        /// The volume [default: the model all volumes share]
        volume: Option<String>,
    },
}

pub(super) fn run(args: Args, client: &Client, mut out: Output) -> Result<(), CliError> {
    let request = |volume: Option<String>| -> Result<pb::ModelRequest, CliError> {
        Ok(pb::ModelRequest {
            volume: volume
                .map(|v| args::volume(&v))
                .transpose()?
                .unwrap_or_default(),
        })
    };
    let report: ModelReport = match args.verb {
        Verb::Show { volume } => {
            let request = request(volume)?;
            client.call(async |mut stub| plain(stub.model_show(request).await?))
        }
        Verb::Train { volume } => {
            let request = request(volume)?;
            client.call(async |mut stub| plain(stub.model_train(request).await?))
        }
    }?;
    out.show(&report, |r| {
        let mut table = Table::pairs();
        table.pair("model of", r.volume.as_deref().unwrap_or("all volumes"));
        table.pair("serving", format!("{} ({})", r.serving, r.reason));
        let window = r
            .trained_on
            .map(|w| format!("{} to {}", when(w.start), when(w.end)));
        table.pair("trained", or_dash(r.trained_at.map(when)));
        table.pair(
            "  on",
            format!(
                "{}, {} samples, seed {}",
                or_dash(window),
                r.training_samples,
                or_dash(r.seed)
            ),
        );
        table.pair("  weights", or_dash(r.parameters));
        for member in &r.members {
            let loss = or_dash(member.quantile_loss.map(|l| format!("{l:.4}")));
            table.pair(
                "member",
                format!(
                    "{}: quantile loss {loss} over {} forecasts",
                    member.member, member.matured
                ),
            );
        }
        for effect in &r.effects {
            let subject = effect.subject.as_deref().map(|s| format!(" of {s}"));
            let believed = if effect.believed {
                ""
            } else {
                ", not believed"
            };
            table.pair(
                "event",
                format!(
                    "{}{}: load times {:.2} {} s after it, a burst follows with probability {:.2} \
                     ({:.1} events{believed})",
                    effect.kind,
                    subject.unwrap_or_default(),
                    effect.factor,
                    effect.after_s,
                    effect.burst_probability,
                    effect.events
                ),
            );
        }
        table
    })
}
