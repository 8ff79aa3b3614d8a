//! `soe volumes`.

use serde_json::json;

use super::client::{Client, plain_all};
use super::error::CliError;
use super::output::{Output, Table, or_dash};
use crate::api::pb;
use crate::api::types::VolumeInfo;
use crate::config::units::human_size;

/// List the volumes of this host: identity, stacking, tracked or not
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_: Args, client: &Client, mut out: Output) -> Result<(), CliError> {
    let volumes: Vec<VolumeInfo> = client.call(async |mut stub| {
        plain_all(
            stub.list_volumes(pb::ListVolumesRequest {})
                .await?
                .into_inner()
                .volumes,
        )
    })?;
    if out.is_json() {
        return out.json(&json!({"volumes": volumes}));
    }
    out.show(&volumes, |volumes| {
        let header = [
            "VOLUME",
            "KIND",
            "SIZE",
            "TRACKED",
            "GROUP",
            "MADE OF",
            "MOUNTED ON",
            "IDENTITY",
        ];
        let mut table = Table::new(&header, "no volumes");
        for v in volumes {
            let tracked = match (&v.tracking, &v.untrackable) {
                (Some(state), _) => state.to_string(),
                (None, Some(why)) => format!("cannot: {why}"),
                (None, None) => "no".into(),
            };
            table.row([
                v.volume.clone(),
                v.kind.clone(),
                human_size(v.size_bytes),
                tracked,
                or_dash(v.group.as_ref()),
                or_dash(Some(v.members.join(" ")).filter(|m| !m.is_empty())),
                or_dash(Some(v.mounts.join(" ")).filter(|m| !m.is_empty())),
                v.device_id.clone(),
            ]);
        }
        table
    })
}
