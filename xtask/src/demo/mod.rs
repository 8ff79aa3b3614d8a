//! `cargo xtask demo`: the whole loop on real devices in a few minutes, and what it measured.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{ebpf, place, run, setup};

mod agent;
mod live;
mod process;
mod simulated;
mod status;
pub(crate) mod stop;
mod summary;
mod view;
mod volumes;
mod watch;
mod workload;

/// A cold build takes about twenty minutes on two cores.
const BUILD_LIMIT: Duration = Duration::from_secs(3600);
const DOCTOR_LIMIT: Duration = Duration::from_secs(20);

#[derive(clap::Args)]
pub struct Args {
    /// Keep the Parquet history in this new or empty folder [default: target/demo/history-TIME]
    #[arg(long, value_name = "DIR", conflicts_with = "no_keep")]
    keep: Option<PathBuf>,
    /// Keep nothing
    #[arg(long)]
    no_keep: bool,
    /// How long the workload runs, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 180, value_parser = clap::value_parser!(u64).range(30..=220))]
    seconds: u64,
    /// Use this program `soe` instead of building it
    #[arg(long, value_name = "FILE")]
    soe: Option<PathBuf>,
    /// Simulate, even with the rights to do it live
    #[arg(long)]
    simulate: bool,
}

/// Runs the command.
pub fn command(args: &Args) -> Result<i32> {
    let soe = match &args.soe {
        Some(soe) => std::path::absolute(soe)
            .with_context(|| format!("cannot tell the path of {}", soe.display()))?,
        None => build()?,
    };
    // From here on a signal must not end this process before it has cleaned up.
    stop::install();
    let history = history_dir(args)?;
    let history = history.as_deref();
    let outcome = match hindrance(&soe, args.simulate) {
        None => live::run(&soe, history, Duration::from_secs(args.seconds)),
        Some(why) => {
            println!("demo: {why}; so the same decision loop runs over a trace, by simulation");
            simulated::run(&soe, history)
        }
    };
    if let Some(dir) = history
        && outcome.is_err()
    {
        remove_empty(dir);
        if dir.exists() {
            println!("demo: everything was removed but {}", dir.display());
        }
    }
    Ok(i32::from(!outcome?))
}

/// Sets the machine up, builds the eBPF object and the program, and returns where the program is.
fn build() -> Result<PathBuf> {
    if let Err(error) = setup::install(false) {
        // Someone without rights may still have all that a build needs.
        println!("demo: {error:#}");
    }
    let (object, changed) = ebpf::build()?;
    let state = if changed { "built" } else { "up to date" };
    println!(
        "demo: {} is {state}; building soe (the first time takes long)",
        object.display()
    );
    let mut cargo = Command::new("cargo");
    cargo
        .args(["build", "-p", "soe-agent", "--bin", "soe"])
        .current_dir(place::root());
    run::check(&mut cargo, BUILD_LIMIT)?;
    Ok(place::target().join("debug/soe"))
}

/// Where the history is kept: a folder that is new or empty.
fn history_dir(args: &Args) -> Result<Option<PathBuf>> {
    if args.no_keep {
        return Ok(None);
    }
    let dir = match &args.keep {
        Some(dir) => dir.clone(),
        None => {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            place::target().join(format!("demo/history-{}", now.as_secs()))
        }
    };
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let dir = dir
        .canonicalize()
        .with_context(|| format!("cannot find {}", dir.display()))?;
    let mut entries =
        std::fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    if entries.next().is_some() {
        bail!(
            "{} is not empty; name another folder for the history",
            dir.display()
        );
    }
    Ok(Some(dir))
}

/// Removes a history in which nothing but its lock was ever written.
fn remove_empty(dir: &Path) {
    let empty = std::fs::read_dir(dir).is_ok_and(|mut entries| {
        entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == ".lock"))
    });
    if empty {
        let _ = std::fs::remove_dir_all(dir);
    }
}

/// What keeps the demo from running on real devices; `None` if nothing does.
fn hindrance(soe: &Path, wanted: bool) -> Option<String> {
    if wanted {
        return Some("a simulation was asked for".to_owned());
    }
    if !place::is_root() {
        return Some("this user is not root, so no device can be made and watched".to_owned());
    }
    if place::program("fio").is_none() {
        return Some("fio is missing".to_owned());
    }
    let mut doctor = Command::new(soe);
    // Refusal is an answer too: it comes with an exit code.
    let text = process::output(doctor.args(["doctor", "--json"]), DOCTOR_LIMIT);
    let report = match text {
        Ok(text) => serde_json::from_str::<Value>(&text).unwrap_or_default(),
        Err(error) => return Some(format!("{error:#}")),
    };
    if report["ready"] == Value::Bool(true) {
        return None;
    }
    let failed = report["checks"].as_array().into_iter().flatten();
    let failed: Vec<&str> = failed
        .filter(|check| check["state"] != "ok" && check["state"] != "warning")
        .filter_map(|check| check["check"].as_str())
        .collect();
    Some(format!(
        "this machine lacks {} (see `soe doctor`)",
        failed.join(", ")
    ))
}
