//! `soe model`.

use clap::Subcommand;

use super::args;
use super::client::{Client, plain};
use super::error::CliError;
use super::output::{Output, Table, or_dash, when};
use crate::api::pb;
use crate::api::pb::model_serve_request::Which;
use crate::api::types::{ModelReport, ModelVersion};

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
    /// Judge every version of the model by the history since the newest one was trained
    Backtest {
        /// The volume [default: all volumes together]
        volume: Option<String>,
    },
    /// Let a version serve
    Promote {
        /// Its number in 'soe model show', or 'shipped'
        #[arg(value_name = "VERSION")]
        number: String,
    },
    /// Go back to the version before the one that serves
    Rollback,
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
        Verb::Backtest { volume } => {
            let request = request(volume)?;
            client.call(async |mut stub| plain(stub.model_backtest(request).await?))
        }
        Verb::Promote { number } => {
            let request = serve(match number.as_str() {
                "shipped" => Which::Shipped(true),
                number => Which::Version(number.parse().map_err(|_| {
                    CliError::Usage(format!(
                        "{number:?} is no version of the model; use a number of 'soe model show', or 'shipped'"
                    ))
                })?),
            });
            client.call(async |mut stub| plain(stub.model_serve(request).await?))
        }
        Verb::Rollback => {
            let request = serve(Which::Before(true));
            client.call(async |mut stub| plain(stub.model_serve(request).await?))
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
        for version in &r.versions {
            table.pair("version", version_line(version));
        }
        for start in &r.starts {
            let regret = |r: Option<f64>| or_dash(r.map(|r| format!("{r:.2}")));
            table.pair(
                "captures begin by",
                format!(
                    "{} for {}: regret of the network {}, of the rule {} over {:.0} intervals",
                    start.by,
                    start.volumes.join(", "),
                    regret(start.network_regret),
                    regret(start.rule_regret),
                    start.intervals
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

fn serve(which: Which) -> pb::ModelServeRequest {
    pb::ModelServeRequest { which: Some(which) }
}

fn version_line(version: &ModelVersion) -> String {
    let number = version.version.map(|number| number.to_string());
    let mut line = number.unwrap_or_else(|| "shipped".to_owned());
    if version.serving {
        line.push_str(" (serves)");
    }
    if let Some(at) = version.trained_at {
        line.push_str(&format!(", trained until {}", when(at)));
    }
    if let Some(score) = version.score {
        line.push_str(&format!(", loss {score:.3} of ewma's then"));
    }
    if let Some(loss) = version.backtest {
        line.push_str(&format!(", {loss:.3} since"));
    }
    if let Some(why) = &version.unusable {
        line.push_str(&format!(", cannot serve: {why}"));
    }
    line
}
