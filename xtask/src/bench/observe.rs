//! `cargo xtask bench observe`: the cost of the programs that always run.
//!
//! First, with both in the kernel at once, so that both see the same IOs: the time that the kernel
//! accounts to SOE's programs and to those of biolatency, per IO of fio. Then, without that
//! accounting, fio's throughput with and without SOE in turn: on a disk, and on a device in memory,
//! where nothing but the CPU is the limit, so that every nanosecond shows.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use super::figures::median;
use super::stage::{Account, Agent, Bookkeeping, Device, Running, accounts, fio};
use crate::place;

const PATTERNS: [&str; 2] = ["randread", "randwrite"];
const DEVICE_MIB: u64 = 256;
const DISK_MIB: u64 = 1024;

#[derive(clap::Args)]
pub struct Args {
    /// Seconds of each measurement
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Rounds of runs without, with, and again without SOE
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=100))]
    pairs: u32,
    /// Folder on the disk to measure on, instead of the build's
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
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
    let memory = Device::in_memory(DEVICE_MIB)?;
    let mut agent = Agent::new(soe)?;
    cost(args, &memory, &mut agent)?;
    let folder = args.dir.clone().unwrap_or_else(place::target);
    let disk = Device::on_disk(&folder, DISK_MIB)?;
    agent.start()?;
    agent.watch("disk", &disk.node)?;
    agent.stop();
    println!(
        "throughput, {} rounds of {} s each without, with, without SOE; with/without beside the noise, which is \
         without/without",
        args.pairs, args.seconds
    );
    let of = format!("a file on the disk of {}", folder.display());
    throughput(args, &of, &disk, &mut agent)?;
    throughput(args, "a file in memory", &memory, &mut agent)?;
    Ok(0)
}

/// Nanoseconds per IO of all programs together.
fn cost(args: &Args, device: &Device, agent: &mut Agent) -> Result<()> {
    let _books = Bookkeeping::on()?;
    agent.start()?;
    agent.watch("memory", &device.node)?;
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

/// Throughput with and without the programs, in turn, so that what else changes meets both; between two
/// runs without, which say how much runs differ by themselves.
fn throughput(args: &Args, of: &str, device: &Device, agent: &mut Agent) -> Result<()> {
    for pattern in PATTERNS {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        let (mut ratios, mut noise) = (Vec::new(), Vec::new());
        for _ in 0..args.pairs {
            let run = || fio(Path::new(&device.node), pattern, args.seconds).map(|load| load.iops);
            let before = run()?;
            agent.start()?;
            let watched = run()?;
            agent.stop();
            let after = run()?;
            with.push(watched);
            without.extend([before, after]);
            ratios.push(watched * 2.0 / (before + after));
            noise.push(after / before);
        }
        println!(
            "  {pattern} on {of}: {:.0} IOPS with, {:.0} without (medians); {} beside {}",
            median(&mut with),
            median(&mut without),
            spread(&mut ratios),
            spread(&mut noise),
        );
    }
    Ok(())
}

/// The median, and the range, of ratios.
fn spread(ratios: &mut [f64]) -> String {
    let middle = median(ratios);
    let end = |at: Option<&f64>| at.copied().unwrap_or(f64::NAN);
    format!(
        "{middle:.3} ({:.3} to {:.3})",
        end(ratios.first()),
        end(ratios.last())
    )
}
