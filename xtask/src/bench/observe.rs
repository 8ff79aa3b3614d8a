//! `cargo xtask bench observe`: the cost of the programs that always run.
//!
//! First, with both in the kernel at once, so that both see the same IOs: the time that the kernel
//! accounts to SOE's programs and to those of biolatency, per IO of fio. Then, without that
//! accounting, fio's throughput with and without SOE in turn.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::figures::median;
use super::stage::{Account, Agent, Bookkeeping, Device, Running, accounts, fio};
use crate::place;

const PATTERNS: [&str; 2] = ["randread", "randwrite"];
const DEVICE_MIB: u64 = 256;

#[derive(clap::Args)]
pub struct Args {
    /// Seconds of each measurement
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Pairs of runs with and without SOE
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=100))]
    pairs: u32,
    /// The `soe` to measure, instead of one that is built now
    #[arg(long, value_name = "FILE")]
    soe: Option<PathBuf>,
}

/// Runs the command.
pub fn command(args: &Args) -> Result<i32> {
    if !place::is_root() {
        bail!("loading BPF programs and making devices needs root");
    }
    for (program, package) in [("fio", "fio"), ("bpftool", "bpftool"), ("losetup", "mount")] {
        if place::program(program).is_none() {
            bail!("{program} is missing; install Debian's package {package}");
        }
    }
    let soe = match &args.soe {
        Some(soe) => soe.clone(),
        None => super::stage::build()?,
    };
    let device = Device::new(DEVICE_MIB)?;
    let mut agent = Agent::new(soe)?;
    cost(args, &device, &mut agent)?;
    throughput(args, &device, &mut agent)?;
    Ok(0)
}

/// Nanoseconds per IO of all programs together.
fn cost(args: &Args, device: &Device, agent: &mut Agent) -> Result<()> {
    let _books = Bookkeeping::on()?;
    agent.start()?;
    agent.watch(&device.node)?;
    let rival = match place::program("biolatency") {
        Some(path) => {
            let disk = device.node.trim_start_matches("/dev/");
            let running = Running::start(Command::new(path).args(["-d", disk, "1000"]))?;
            // It loads its programs after it has read the symbols of the kernel.
            std::thread::sleep(Duration::from_secs(2));
            Some(running)
        }
        None => {
            println!("no biolatency to compare with; install Debian's package libbpf-tools");
            None
        }
    };
    let ours = agent.programs()?;
    let theirs = rival
        .as_ref()
        .map(Running::programs)
        .transpose()?
        .unwrap_or_default();
    println!(
        "cost of the programs, 4 KiB at depth 16 on a loop device in memory, {} s each",
        args.seconds
    );
    for pattern in PATTERNS {
        let before = (accounts(&ours)?, accounts(&theirs)?);
        let load = fio(Path::new(&device.node), pattern, args.seconds)?;
        let after = (accounts(&ours)?, accounts(&theirs)?);
        let ns = report("soe", pattern, load.ios, before.0, after.0);
        if rival.is_some() {
            let other = report("biolatency", pattern, load.ios, before.1, after.1);
            println!(
                "  {pattern}: soe costs {:.2} times what biolatency costs",
                ns / other
            );
        }
    }
    drop(rival);
    agent.stop();
    Ok(())
}

type Accounts = std::collections::BTreeMap<u64, Account>;

/// Prints what each program cost, and returns the sum in ns per IO.
fn report(who: &str, pattern: &str, ios: u64, before: Accounts, after: Accounts) -> f64 {
    let mut total = 0;
    let mut parts = Vec::new();
    for (id, account) in after {
        let old = before.get(&id).cloned().unwrap_or_default();
        let (runs, ns) = (account.runs - old.runs, account.ns - old.ns);
        total += ns;
        if runs > 0 {
            parts.push(format!(
                "{} {:.0} ns x {:.2}",
                account.name,
                ns as f64 / runs as f64,
                runs as f64 / ios as f64
            ));
        }
    }
    let per_io = total as f64 / ios as f64;
    println!(
        "  {pattern}: {who} {per_io:.0} ns per IO over {ios} IOs ({})",
        parts.join(", ")
    );
    per_io
}

/// Throughput with and without the programs, in turn, so that what else changes meets both.
fn throughput(args: &Args, device: &Device, agent: &mut Agent) -> Result<()> {
    println!("throughput, {} pairs of {} s", args.pairs, args.seconds);
    for pattern in PATTERNS {
        let mut ratios = Vec::new();
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for pair in 0..args.pairs {
            // Which comes first changes, or a drift of the machine would look like a cost.
            for watched in if pair % 2 == 0 {
                [true, false]
            } else {
                [false, true]
            } {
                if watched {
                    agent.start()?;
                } else {
                    agent.stop();
                }
                let load = fio(Path::new(&device.node), pattern, args.seconds)?;
                if watched { &mut with } else { &mut without }.push(load.iops);
            }
            agent.stop();
            let pair = with
                .last()
                .zip(without.last())
                .context("a pair was measured")?;
            ratios.push(pair.0 / pair.1);
        }
        println!(
            "  {pattern}: {:.0} IOPS with, {:.0} without (medians); with/without {:.3} (median of pairs, {:.3} to {:.3})",
            median(&mut with),
            median(&mut without),
            median(&mut ratios),
            ratios.first().copied().unwrap_or(f64::NAN),
            ratios.last().copied().unwrap_or(f64::NAN),
        );
    }
    Ok(())
}
