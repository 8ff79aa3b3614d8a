//! What the demo measured, in a table, as it came out.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::process;
use super::status::{Layer, Restored, captures, quantile};
use super::view::{LAYER_HEAD, capture_line, millis, size};
use super::watch::{FORETOLD_WITHIN_S, Seen};

const SQL_LIMIT: Duration = Duration::from_secs(60);

/// One volume before and after.
pub struct Proof {
    /// The volume.
    pub volume: &'static str,
    /// Its device.
    pub device: String,
    /// The layer restored.
    pub layer: String,
    /// SHA-256 of the device right after the layer was captured.
    pub before: String,
    /// SHA-256 of the restored file.
    pub after: String,
    /// What a check of the restored filesystem said.
    pub filesystem: String,
    /// What the restore did.
    pub restored: Restored,
    /// Wall time of the restore.
    pub took: Duration,
}

impl Proof {
    /// Whether the restored bytes are those that were captured.
    pub fn equal(&self) -> bool {
        !self.before.is_empty() && self.before == self.after
    }
}

/// Everything the table shows.
pub struct Report<'a> {
    /// The whole demo, without building.
    pub took: Duration,
    /// Bursts of the workload.
    pub bursts: u32,
    /// What was seen on the way.
    pub seen: &'a Seen,
    /// All layers.
    pub layers: &'a [Layer],
    /// The volumes before and after.
    pub proofs: &'a [Proof],
    /// What `soe layer verify` said.
    pub verified: &'a anyhow::Result<String>,
    /// Exit code after SIGTERM.
    pub ended: Option<i32>,
    /// What the agent warned of.
    pub warnings: Vec<String>,
    /// What kept the demo from running its course.
    pub failure: Option<String>,
}

impl Report<'_> {
    /// Whether everything came back as it was.
    pub fn good(&self) -> bool {
        self.failure.is_none()
            && !self.proofs.is_empty()
            && self.proofs.iter().all(Proof::equal)
            && self.verified.is_ok()
            && self.ended == Some(0)
    }
}

/// The table.
pub fn table(report: &Report<'_>) -> String {
    let mut out = String::from("\n");
    let captures = captures(report.layers);
    let _ = writeln!(out, "{LAYER_HEAD}");
    for (sequence, layers) in &captures {
        let _ = writeln!(out, "{}", capture_line(*sequence, layers));
    }
    out.push('\n');
    let mut row = |name: &str, value: String| {
        let _ = writeln!(out, "  {name:<28} {value}");
    };

    let of_kind = |kind: &str| {
        let is = |layers: &&Vec<&Layer>| layers.first().is_some_and(|l| l.kind == kind);
        captures.values().filter(is).count()
    };
    row(
        "captures (both volumes)",
        format!(
            "{}: {} baseline, {} differential; pause budget missed {} times",
            captures.len(),
            of_kind("baseline"),
            of_kind("differential"),
            report
                .seen
                .last
                .groups
                .iter()
                .map(|g| g.missed_pause_budgets)
                .sum::<u64>()
        ),
    );
    let optimistic = |layers: &&Vec<&Layer>| layers.iter().all(|l| l.method == "optimistic");
    let optimistic = captures.values().filter(optimistic).count();
    row(
        "cut without a pause",
        format!("{optimistic} of {}", captures.len()),
    );
    let mut pauses: Vec<u64> = captures
        .values()
        .filter_map(|layers| layers.iter().map(|l| l.pause_us).max())
        .collect();
    pauses.sort_unstable();
    let pause = |q| quantile(&pauses, q).map_or("-".to_owned(), millis);
    row(
        "pause p50 / p99 / max",
        format!("{} / {} / {}", pause(0.5), pause(0.99), pause(1.0)),
    );
    let sum = |of: fn(&Layer) -> u64| size(report.layers.iter().map(of).sum());
    row("read from the volumes", sum(|l| l.bytes_read));
    row("stored", sum(|l| l.bytes_stored));

    let views: u64 = report.seen.members.values().sum();
    let members: Vec<String> = report
        .seen
        .members
        .iter()
        .map(|(name, n)| format!("{name} {:.0} %", *n as f64 * 100.0 / views.max(1) as f64))
        .collect();
    row("forecasts served by", or_nobody(members.join(", ")));
    for volume in report.seen.last.groups.iter().flat_map(|g| &g.volumes) {
        let why = volume.predicted.model_reason.clone().unwrap_or_default();
        let model = volume.predicted.model.clone().unwrap_or_default();
        row(
            &format!("  at the end, {}", name_of(report, &volume.volume)),
            format!("{model} ({why})"),
        );
    }
    for proof in report.proofs {
        let of: Vec<_> = report
            .seen
            .prepared
            .iter()
            .filter(|p| p.volume == proof.volume)
            .collect();
        let foretold = of.iter().filter(|p| p.foretold()).count();
        let staged = of.iter().filter(|p| p.staged_bytes > 0).count();
        let ahead: Vec<String> = of
            .iter()
            .map(|p| format!("{}:{}", p.burst, size(p.staged_bytes)))
            .collect();
        row(
            &format!("bursts foretold, {}", proof.volume),
            format!(
                "{foretold} of {} (within {FORETOLD_WITHIN_S} s)",
                report.bursts
            ),
        );
        row(
            &format!("staged ahead, {}", proof.volume),
            format!(
                "at {staged} of {} bursts ({})",
                report.bursts,
                ahead.join(", ")
            ),
        );
    }
    row(
        "staging",
        format!(
            "{} decisions, at most {} valid at once",
            report.seen.stagings,
            size(report.seen.staged_most)
        ),
    );
    for volume in report.seen.last.groups.iter().flat_map(|g| &g.volumes) {
        let s = &volume.staging;
        row(
            &format!("  at the end, {}", name_of(report, &volume.volume)),
            format!(
                "{} valid of {}, {} of it read, hit ratio {}",
                size(s.valid_bytes),
                size(s.staged_bytes),
                size(s.used_bytes),
                s.hit_ratio.map_or("-".to_owned(), |h| format!("{h:.2}"))
            ),
        );
    }
    for (n, proof) in report.proofs.iter().enumerate() {
        let lost = if n == 0 { "lost, " } else { "" };
        row(
            &format!("restore of {}", proof.volume),
            format!(
                "{lost}{:.2} s, {} written ({} from staging), {} zeros",
                proof.took.as_secs_f64(),
                size(proof.restored.bytes_written),
                size(proof.restored.bytes_from_staging),
                size(proof.restored.bytes_zeroed)
            ),
        );
        let verdict = if proof.equal() { "equal" } else { "DIFFERENT" };
        row(
            "  SHA-256",
            format!(
                "{verdict}: {} | {}",
                short(&proof.before),
                short(&proof.after)
            ),
        );
        row("  filesystem", proof.filesystem.clone());
    }
    row(
        "layers verified",
        match report.verified {
            Ok(text) => text.clone(),
            Err(error) => format!("FAILED: {error:#}"),
        },
    );
    row(
        "agent's end after SIGTERM",
        report
            .ended
            .map_or("by a signal".to_owned(), |code| format!("code {code}")),
    );
    if let Some(error) = report
        .seen
        .last
        .groups
        .iter()
        .find_map(|g| g.last_error.clone())
    {
        row("last failed capture", error);
    }
    row("warnings of the agent", report.warnings.len().to_string());
    for warning in report.warnings.iter().take(5) {
        row("", warning.chars().take(150).collect());
    }
    if let Some(failure) = &report.failure {
        row("FAILED", failure.clone());
    }
    row(
        "whole demo, once built",
        format!("{:.0} s", report.took.as_secs_f64()),
    );
    out
}

fn name_of<'a>(report: &'a Report<'_>, device: &'a str) -> &'a str {
    let proof = report.proofs.iter().find(|proof| proof.device == device);
    proof.map_or(device, |proof| proof.volume)
}

fn or_nobody(text: String) -> String {
    if text.is_empty() {
        "nobody".to_owned()
    } else {
        text
    }
}

fn short(sum: &str) -> &str {
    sum.get(..16).unwrap_or(sum)
}

const QUERY: &str = "SELECT volume, count(*) AS windows, sum(read_bytes) / 1048576 AS read_mib, \
     sum(write_bytes) / 1048576 AS written_mib FROM volume_stats GROUP BY volume";

/// Says where the history lies and queries it once.
pub fn history(soe: &Path, dir: Option<&Path>) {
    let Some(dir) = dir else {
        println!("history: not kept (--no-keep)");
        return;
    };
    println!("history: Parquet files in {}", dir.display());
    println!(
        "  {} sql --history {} '{QUERY}'",
        soe.display(),
        dir.display()
    );
    let mut sql = Command::new(soe);
    sql.args(["sql", "--history"]).arg(dir).arg(QUERY);
    match process::output(&mut sql, SQL_LIMIT) {
        Ok(text) => println!("{text}"),
        Err(error) => println!("  (it failed: {error:#})"),
    }
}
