//! `soe stage`.

use clap::Subcommand;

use super::args;
use super::client::{Client, plain};
use super::error::CliError;
use super::output::{Output, Table, or_dash};
use crate::api::pb;
use crate::api::types::StageReport;
use crate::config::units::human_size;

/// Show, start or drop the staging of a volume's blocks
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show what is staged
    Status {
        /// The volume
        volume: String,
    },
    /// Stage now what the next burst would want
    Now {
        /// The volume
        volume: String,
    },
    /// Drop everything staged of the volume
    Drop {
        /// The volume
        volume: String,
    },
}

pub(super) fn run(args: Args, client: &Client, mut out: Output) -> Result<(), CliError> {
    let request = |volume: &str| args::volume(volume).map(|volume| pb::StageRequest { volume });
    let report: StageReport = match &args.verb {
        Verb::Status { volume } => {
            let request = request(volume)?;
            client.call(async |mut stub| plain(stub.stage_status(request).await?))
        }
        Verb::Now { volume } => {
            let request = request(volume)?;
            client.call(async |mut stub| plain(stub.stage_now(request).await?))
        }
        Verb::Drop { volume } => {
            let request = request(volume)?;
            client.call(async |mut stub| plain(stub.stage_drop(request).await?))
        }
    }?;
    out.show(&report, |r| {
        let s = &r.status;
        let mut table = Table::pairs();
        table.pair("volume", &r.volume);
        table.pair("budget", human_size(s.budget_bytes));
        table.pair("staged", human_size(s.staged_bytes));
        table.pair("  valid", human_size(s.valid_bytes));
        table.pair("used", human_size(s.used_bytes));
        table.pair("overwritten before use", human_size(s.invalidated_bytes));
        table.pair("hit ratio", or_dash(s.hit_ratio.map(|h| format!("{h:.3}"))));
        let off = if s.switched_off {
            " (too little: not staged for bursts)"
        } else {
            ""
        };
        let precision = or_dash(s.precision.map(|p| format!("{p:.3}")));
        table.pair("read of what was chosen", format!("{precision}{off}"));
        table
    })
}
