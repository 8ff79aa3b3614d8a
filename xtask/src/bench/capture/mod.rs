//! `cargo xtask bench capture`: what captures do to those who write, and what they cost.
//!
//! A real agent captures a mounted ext4 on a loop device: lightly used, then under steady random
//! writes. What the writers felt is measured by fio and by a probe that times every small write,
//! beside the same load without captures and beside freezing and copying by hand. Then the cost of
//! a differential of a large image, beside copying the blocks that are known to have changed.

mod cost;
mod ground;
mod load;
mod naive;
mod peers;
mod series;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use self::ground::Ground;
use self::load::{Fio, PATTERNS, Pattern, Written};
use self::series::Series;
use super::figures::{Durations, Table, ms, ratio, times};
use super::stage::Agent;
use crate::demo::stop;
use crate::place;

/// The pause budget of the group, and the goal for the 99th percentile.
const BUDGET: Duration = Duration::from_millis(100);
const EXT4_MIB: u64 = 1024;

#[derive(clap::Args)]
pub struct Args {
    /// Captures of each kind of load
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(3..=10_000))]
    captures: u32,
    /// Seconds of each load without captures, to compare with
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Differentials of the large image
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Folder on the disk that is to carry the volumes, the store and the copies
    /// [default: the folder for temporary files]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Also restic, borg and qemu-img, as far as they are installed
    #[arg(long)]
    peers: bool,
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Also write the figures to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The `soe` to measure, instead of one that is built now
    #[arg(long, value_name = "FILE")]
    soe: Option<PathBuf>,
}

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Captures of a lightly used filesystem
    Quiet,
    /// Captures under steady writes, and freezing by hand
    Steady,
    /// What a differential costs
    Cost,
}

impl Args {
    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

/// Runs the command.
pub fn command(args: &Args) -> Result<i32> {
    if !place::is_root() {
        bail!("loading BPF programs and making devices needs root");
    }
    for (program, package) in [
        ("fio", "fio"),
        ("losetup", "mount"),
        ("fsfreeze", "util-linux"),
        ("mkfs.ext4", "e2fsprogs"),
    ] {
        if place::program(program).is_none() {
            bail!("{program} is missing; install Debian's package {package}");
        }
    }
    let soe = match &args.soe {
        Some(soe) => soe.clone(),
        None => super::stage::build()?,
    };
    // From here on a signal must not end this process before it has cleaned up.
    stop::install();
    let mut builder = tempfile::Builder::new();
    builder.prefix("soe-bench-");
    let dir = match &args.dir {
        Some(dir) => builder.tempdir_in(dir),
        None => builder.tempdir(),
    }
    .context("a folder to work in")?;
    println!(
        "captures by {}, on {}; pause budget {}",
        soe.display(),
        dir.path().display(),
        ms(BUDGET)
    );
    let mut figures = json!({ "budget_us": BUDGET.as_micros() as u64 });
    if args.wants(Part::Quiet) || args.wants(Part::Steady) {
        mounted(args, &soe, dir.path(), &mut figures)?;
    }
    if args.wants(Part::Cost) {
        figures["cost"] = cost::measure(args, &soe, dir.path())?;
    }
    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&figures).context("figures")?;
        std::fs::write(file, text + "\n").with_context(|| file.display().to_string())?;
    }
    Ok(0)
}

/// An agent that watches the new volume and has a baseline of it. Its state lies outside of the
/// volume, or a freeze of it would be refused.
fn watched(soe: &Path, ground: &Ground) -> Result<Agent> {
    let mut agent = Agent::new(soe.to_owned())?;
    agent.start()?;
    agent
        .watch(series::GROUP, &ground.node)
        .with_context(|| format!("the agent said: {}", agent.last_words()))?;
    Ok(agent)
}

fn mounted(args: &Args, soe: &Path, dir: &Path, figures: &mut Value) -> Result<()> {
    let ground = Ground::ext4(dir, "volume", EXT4_MIB)?;
    load::lay_out(ground.mount()?)?;
    if args.wants(Part::Quiet) {
        figures["quiet"] = quiet(args, &watched(soe, &ground)?, &ground)?;
    }
    if args.wants(Part::Steady) {
        figures["steady"] = steady(args, soe, &ground, dir)?;
    }
    Ok(())
}

/// Captures of a filesystem to which a few small files are written every second.
fn quiet(args: &Args, agent: &Agent, ground: &Ground) -> Result<Value> {
    let writer = load::light(ground.mount()?);
    let series = Series::run(agent, args.captures)?;
    let rounds = writer.stop()?;
    let done = series.layers.len();
    println!(
        "\nquiet: ext4 on {}, three small files written and made durable every second ({rounds} times)",
        ground.node
    );
    println!(
        "  {} of {} captures held nobody ({:.0} %); tries: {}",
        series.optimistic(),
        done + series.failed.len(),
        series.optimistic() as f64 * 100.0 / (done + series.failed.len()).max(1) as f64,
        series.tries_shown()
    );
    println!(
        "  window in which the device stood still: {}",
        Durations::new(series.windows.clone()).shown()
    );
    if series.pauses().len() > 0 {
        println!("  writers were held: {}", series.pauses().shown());
    }
    print_failures(&series);
    Ok(series.json())
}

fn print_failures(series: &Series) {
    for (reason, count) in series.reasons() {
        println!("  failed {count} times: {reason}");
    }
}

/// A load without and with captures: what its writers felt.
struct Felt {
    alone: (Written, Durations),
    captured: (Written, Durations),
    series: Series,
}

/// Measures a load. A volume whose writes the agent still believes in flight when all have ended would
/// spoil every later figure: that is told, and the measurement made again with another agent.
fn felt(
    args: &Args,
    soe: &Path,
    ground: &Ground,
    pattern: Pattern,
    dir: &Path,
    stuck: &mut u32,
) -> Result<Felt> {
    loop {
        let agent = watched(soe, ground)?;
        let felt = felt_with(args, &agent, ground, pattern, dir)?;
        std::thread::sleep(Duration::from_secs(1));
        match series::capture(&agent, "differential")? {
            Err(reason) if *stuck < 3 => {
                *stuck += 1;
                println!("  after {}, with no load any more: {reason}", pattern.name);
            }
            _ => return Ok(felt),
        }
    }
}

fn felt_with(
    args: &Args,
    agent: &Agent,
    ground: &Ground,
    pattern: Pattern,
    dir: &Path,
) -> Result<Felt> {
    let mount = ground.mount()?;
    let report = dir.join("fio.json");
    let settle = Duration::from_secs(1);
    let fio = Fio::start(mount, pattern, &report)?;
    std::thread::sleep(settle);
    let probe = load::probe(mount)?;
    for _ in 0..args.seconds {
        stop::check()?;
        std::thread::sleep(Duration::from_secs(1));
    }
    let alone = (probe.stop(), fio.stop()?);
    let fio = Fio::start(mount, pattern, &report)?;
    std::thread::sleep(settle);
    let probe = load::probe(mount)?;
    let series = Series::run(agent, args.captures)?;
    let captured = (probe.stop(), fio.stop()?);
    Ok(Felt {
        alone: (alone.1, alone.0?),
        captured: (captured.1, captured.0?),
        series,
    })
}

fn steady(args: &Args, soe: &Path, ground: &Ground, dir: &Path) -> Result<Value> {
    let mut stuck = 0;
    let mut pauses = Table::new(&[
        "4 KiB random writes",
        "IOPS",
        "held nobody",
        "times writers were held",
        "for",
        "above budget",
        "failed",
    ]);
    let mut clients = Table::new(&[
        "what clients saw",
        "fio's longest write: alone",
        "with captures",
        "probe p99: alone",
        "with captures",
        "probe's longest: alone",
        "with captures",
    ]);
    let mut figures = json!({});
    let mut failures = Vec::new();
    for pattern in PATTERNS {
        let felt = felt(args, soe, ground, pattern, dir, &mut stuck)
            .with_context(|| format!("under {}", pattern.name))?;
        let (alone, captured, series) = (&felt.alone, &felt.captured, &felt.series);
        println!(
            "  {}: {} captures, {} held nobody, {} failed; writers were held {} times: {}",
            pattern.name,
            series.layers.len() + series.failed.len(),
            series.optimistic(),
            series.failed.len(),
            series.pauses().len(),
            series.pauses().shown()
        );
        pauses.row(vec![
            pattern.name.to_owned(),
            format!("{:.0}", captured.0.iops),
            format!(
                "{} of {}",
                series.optimistic(),
                series.layers.len() + series.failed.len()
            ),
            series.pauses().len().to_string(),
            series.pauses().shown(),
            series.pauses().above(BUDGET).to_string(),
            series.failed.len().to_string(),
        ]);
        let both = |a: Option<Duration>, b: Option<Duration>| {
            let shown = |value: Option<Duration>| value.map_or("-".to_owned(), ms);
            [shown(a), format!("{} ({})", shown(b), times(b, a))]
        };
        let mut row = vec![pattern.name.to_owned()];
        row.extend(both(Some(alone.0.longest), Some(captured.0.longest)));
        row.extend(both(alone.1.quantile(0.99), captured.1.quantile(0.99)));
        row.extend(both(alone.1.max(), captured.1.max()));
        clients.row(row);
        if !series.failed.is_empty() {
            failures.push((pattern.name, series.clone()));
        }
        let side = |(written, probe): &(Written, Durations)| {
            json!({
                "iops": written.iops,
                "longest_us": written.longest.as_micros() as u64,
                "probe": probe.json(),
            })
        };
        figures[pattern.name] = json!({
            "captures": series.json(),
            "alone": side(alone),
            "with_captures": side(captured),
            "longest_ratio": ratio(captured.1.max(), alone.1.max()),
        });
    }
    println!(
        "\nsteady writes: ext4 on {}, {} captures of each",
        ground.node, args.captures
    );
    pauses.print();
    for (name, series) in failures {
        println!("  under {name}:");
        print_failures(&series);
    }
    println!();
    clients.print();
    figures["by_hand"] = naive::measure(&watched(soe, ground)?, ground, dir)?;
    figures["agents_replaced"] = stuck.into();
    Ok(figures)
}
