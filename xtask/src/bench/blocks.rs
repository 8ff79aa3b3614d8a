//! `cargo xtask bench blocks`: which blocks are chosen for bursts, and what a live cache misses, over block
//! traces; choices are scored from raw outputs by a program that shares no code with SOE
//! (`tests/staging/score.py`).

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::figures::Table;
use super::forecast::python;
use crate::{place, run};

const LIMIT: Duration = Duration::from_secs(1800);
/// Budgets of the protocol.
const BUDGETS: [&str; 3] = ["1%", "5%", "10%"];
/// The size of the live cache.
const CAPACITY: &str = "5%";

#[derive(clap::Args)]
pub struct Args {
    /// Traces: ARC's `.lis`, or CSV with ts_us, op, offset and len; also compressed by zstd
    #[arg(required = true, value_name = "FILE")]
    traces: Vec<PathBuf>,
    /// The `soe` to measure, instead of one that is built now
    #[arg(long, value_name = "FILE")]
    soe: Option<PathBuf>,
}

/// Runs the command.
pub fn command(args: &Args) -> Result<i32> {
    let soe = match &args.soe {
        Some(soe) => soe.clone(),
        None => super::stage::build()?,
    };
    let folder = place::target().join("forecast");
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let python = python(&folder)?;
    let mut chosen = Table::new(&[
        "hit",
        "budget",
        "chosen",
        "of the oracle",
        "precision",
        "accessed last",
        "read most often",
    ]);
    let mut cached = Table::new(&["miss ratio at 5 %", "alone", "with staging"]);
    for trace in &args.traces {
        if !trace.is_file() {
            bail!("{} is no file; give a block trace", trace.display());
        }
        let name = trace
            .file_name()
            .and_then(|name| name.to_string_lossy().split('.').next().map(str::to_owned))
            .unwrap_or_default();
        let place = tempfile::tempdir_in(&folder).context("folder of the trace")?;
        let [accesses, bursts, history, out] =
            ["accesses.csv", "bursts.csv", "history", "out"].map(|name| place.path().join(name));
        let mut convert = Command::new(&python);
        convert
            .arg(place::root().join("tests/staging/convert.py"))
            .arg(trace)
            .args([&name])
            .args([&accesses, &bursts]);
        run::check(&mut convert, LIMIT)?;
        let mut import = Command::new(&soe);
        import
            .args(["trace", "import", "--format", "csv"])
            .arg(&accesses)
            .arg("--out")
            .arg(&history);
        run::output(&mut import, LIMIT)?;
        let backtest = |verb: &str, amount: [&str; 2]| -> Result<()> {
            let mut command = Command::new(&soe);
            command
                .args(["backtest", verb])
                .args(amount)
                .arg("--history")
                .arg(&history)
                .arg("--bursts")
                .arg(&bursts)
                .arg("--out")
                .arg(&out);
            run::output(&mut command, LIMIT).map(drop)
        };
        for budget in BUDGETS {
            backtest("staging", ["--budget", budget])?;
            let mut score = Command::new(&python);
            score
                .arg(place::root().join("tests/staging/score.py"))
                .args([&accesses, &bursts, &out]);
            let figures: Value = serde_json::from_str(&run::output(&mut score, LIMIT)?)
                .context("what the scorer says")?;
            let of = |key: &str| figures[key].as_f64().unwrap_or(f64::NAN);
            let shown = |value: f64| format!("{value:.3}");
            chosen.row(vec![
                name.clone(),
                budget.to_owned(),
                shown(of("hit")),
                shown(of("hit") / of("oracle")),
                shown(of("precision")),
                shown(of("lru")),
                shown(of("frequent")),
            ]);
        }
        backtest("cache", ["--capacity", CAPACITY])?;
        let text = std::fs::read_to_string(&out).with_context(|| out.display().to_string())?;
        let figures: Value = serde_json::from_str(&text).context("what the cache did")?;
        let of = |key: &str| {
            let value = figures[key].as_f64();
            value.map_or("-".to_owned(), |v| format!("{v:.3}"))
        };
        cached.row(vec![name, of("miss_ratio"), of("miss_ratio_with_staging")]);
    }
    chosen.print();
    cached.print();
    Ok(0)
}
