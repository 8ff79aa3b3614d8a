//! The demo without rights: the same decision loop in virtual time, over a trace.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{process, summary};

const IMPORT_LIMIT: Duration = Duration::from_secs(60);
const SIMULATE_LIMIT: Duration = Duration::from_secs(280);

/// Length of the trace, in seconds: twenty seasons.
const SECONDS: u64 = 36 * 20;
const BURST_S: u64 = 8;
const MIB: u64 = 1 << 20;
/// Reads of a burst in a second, each of 32 KiB.
const BURST_READS: u64 = 40;
/// Hot blocks a burst reads of.
const HOT: u64 = 512;
const READ: u64 = 32 * 1024;

/// A short stream of numbers that look random, the same in every run.
struct Noise(u64);

impl Noise {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound.max(1)
    }
}

/// The trace: one IO a line, a trickle of writes and a burst of reads in every season.
fn trace() -> String {
    let mut text = String::from("ts_us,volume,op,offset,length\n");
    let mut noise = Noise(0x5eed_0001);
    let epoch_us = 1_760_000_004_u64 * 1_000_000;
    let mut start = 12;
    for second in 0..SECONDS {
        let season = second / 36;
        if second % 36 == 0 {
            start = season * 36 + 11 + noise.below(3);
        }
        let at = epoch_us + second * 1_000_000;
        for n in 0..5 {
            let offset = 96 * MIB + noise.below(4096) * 4096;
            let _ = writeln!(text, "{},tables,write,{offset},4096", at + n * 1000);
        }
        if (start..start + BURST_S).contains(&second) {
            for n in 0..BURST_READS {
                let offset = noise.below(HOT) * READ;
                let at = at + 10_000 + n * 900_000 / BURST_READS;
                let _ = writeln!(text, "{at},tables,read,{offset},{READ}");
            }
        }
    }
    text
}

const CONFIGURATION: &str = r#"[history]
interval = "1s"
region_interval = "2s"
[staging]
path = "/nowhere/soe.stage"
budget = "16MiB"
[model]
bin = "1s"
season = "36s"
train_after = "144s"
train_every = "144s"
[plan]
tick = "1s"
rpo = "24s"
"#;

/// Runs it; whether the simulation ran to its end.
pub fn run(soe: &Path, history: Option<&Path>) -> Result<bool> {
    let began = Instant::now();
    let dir = tempfile::Builder::new()
        .prefix("soe-demo-")
        .tempdir()
        .context("cannot make a temporary folder")?;
    let kept = history.map_or_else(|| dir.path().join("history"), Path::to_path_buf);
    let out = history.map_or_else(|| dir.path().join("out"), |h| h.join("simulated"));
    let (csv, config) = (dir.path().join("trace.csv"), dir.path().join("soe.toml"));
    fs::write(&csv, trace()).with_context(|| format!("cannot write {}", csv.display()))?;
    fs::write(&config, CONFIGURATION)
        .with_context(|| format!("cannot write {}", config.display()))?;

    let mut import = Command::new(soe);
    import
        .args(["trace", "import", "--format", "csv", "--out"])
        .arg(&kept)
        .arg(&csv);
    print!("{}", process::output(&mut import, IMPORT_LIMIT)?);
    println!(
        "demo: simulating {SECONDS} s of a volume with a burst of reads every 36 s, give or take a second"
    );
    let mut simulate = Command::new(soe);
    simulate
        .args(["simulate", "--json", "--history"])
        .arg(&kept);
    simulate.arg("--config").arg(&config).arg("--out").arg(&out);
    process::output(&mut simulate, SIMULATE_LIMIT)?;

    let path = out.join("summary.json");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let summary: Value =
        serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    println!();
    print!("{}", flat(&summary));
    println!(
        "  {:<28} {:.1} s",
        "whole demo",
        began.elapsed().as_secs_f64()
    );
    if history.is_some() {
        println!(
            "decisions, forecasts and staged blocks: Parquet files in {}",
            out.display()
        );
    }
    summary::history(soe, history);
    Ok(true)
}

/// The summary as rows, in the order and with the names in which it was written.
fn flat(summary: &Value) -> String {
    let mut text = String::new();
    let Some(fields) = summary.as_object() else {
        return text;
    };
    for (name, value) in fields {
        match value.as_object() {
            Some(inner) => {
                for (field, value) in inner {
                    let name = format!("{name}.{field}");
                    let _ = writeln!(text, "  {name:<28} {value}");
                }
            }
            None => {
                let _ = writeln!(text, "  {name:<28} {value}");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trace_is_in_order_and_has_a_burst_in_every_season() {
        let text = trace();
        let mut last = 0;
        let mut reads = [0u64; (SECONDS / 36) as usize];
        for line in text.lines().skip(1) {
            let mut fields = line.split(',');
            let at: u64 = fields.next().unwrap().parse().unwrap();
            assert!(at >= last, "{line}");
            last = at;
            if line.contains(",read,") {
                reads[((at / 1_000_000 - 1_760_000_004) / 36) as usize] += 1;
            }
        }
        assert_eq!(reads, [BURST_READS * BURST_S; (SECONDS / 36) as usize]);
    }
}
