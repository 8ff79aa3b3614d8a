//! `soe doctor`.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::error::CliError;
use super::output::{Output, Table};
use crate::config::Config;
use crate::observe::volumes;
use crate::probe::btf::Btf;

/// Show what this kernel and host can do, what is missing, and how to mend it
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The agent's configuration, which says what it needs
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it should be.
    Ok,
    /// Works, but something is lost by it.
    Warning,
    /// The agent cannot track changes, or not keep layers.
    Missing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    check: &'static str,
    state: State,
    found: String,
    mend: Option<String>,
}

#[derive(Serialize)]
struct Report {
    kernel: String,
    ready: bool,
    checks: Vec<Finding>,
}

pub(super) fn run(args: Args, mut out: Output) -> Result<(), CliError> {
    let config = Config::load(args.config.as_deref())?;
    let checks = vec![
        kernel_types(),
        tracepoints(),
        capabilities(),
        bpffs(),
        io_uring(),
        disks(),
        state(&config),
    ];
    let report = Report {
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        ready: checks.iter().all(|c| c.state != State::Missing),
        checks,
    };
    out.show(&report, |r| {
        let mut table = Table::new(&["CHECK", "STATE", "FOUND", "MEND"], "");
        for c in &r.checks {
            let state = format!("{:?}", c.state).to_lowercase();
            table.row([
                c.check.to_owned(),
                state,
                c.found.clone(),
                c.mend.clone().unwrap_or_default(),
            ]);
        }
        table
    })?;
    if report.ready {
        return Ok(());
    }
    let missing: Vec<&str> = report
        .checks
        .iter()
        .filter(|c| c.state == State::Missing)
        .map(|c| c.check)
        .collect();
    Err(CliError::Failed(format!(
        "this host lacks what the agent needs: {}; see the table for the mend",
        missing.join(", ")
    )))
}

fn finding(
    check: &'static str,
    state: State,
    found: impl Into<String>,
    mend: Option<&str>,
) -> Finding {
    Finding {
        check,
        state,
        found: found.into(),
        mend: mend.map(str::to_owned),
    }
}

fn kernel_types() -> Finding {
    let check = "kernel types (BTF)";
    match Btf::of_kernel().and_then(|btf| btf.kernel_offsets()) {
        Ok(_) => finding(check, State::Ok, "all structures and members found", None),
        Err(error) => finding(
            check,
            State::Missing,
            error.to_string(),
            Some("use a kernel built with CONFIG_DEBUG_INFO_BTF=y, 5.15 or newer"),
        ),
    }
}

fn tracepoints() -> Finding {
    let check = "block tracepoints";
    let Ok(btf) = Btf::of_kernel() else {
        return finding(
            check,
            State::Missing,
            "unknown without kernel types",
            Some("see the line above"),
        );
    };
    let names = [
        "block_bio_queue",
        "block_rq_complete",
        "block_bio_complete",
        "block_rq_issue",
    ];
    let absent: Vec<&str> = names
        .into_iter()
        .filter(|n| btf.tracepoint_arguments(n).is_none())
        .collect();
    if absent.is_empty() {
        return finding(check, State::Ok, names.join(" "), None);
    }
    finding(
        check,
        State::Missing,
        format!("no {}", absent.join(" ")),
        Some("use a kernel built with CONFIG_BLOCK and CONFIG_TRACEPOINTS"),
    )
}

/// Bits of the effective capability set.
const NEEDED: [(&str, u32); 3] = [("CAP_BPF", 39), ("CAP_PERFMON", 38), ("CAP_SYS_ADMIN", 21)];

/// The effective capabilities that are absent, told from the text of `/proc/self/status`. Pure.
fn absent_capabilities(status: &str) -> Option<Vec<&'static str>> {
    let digits = status.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
    let set = u64::from_str_radix(digits.trim(), 16).ok()?;
    Some(
        NEEDED
            .iter()
            .filter(|(_, bit)| set & (1 << bit) == 0)
            .map(|(name, _)| *name)
            .collect(),
    )
}

fn capabilities() -> Finding {
    let check = "capabilities";
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    match absent_capabilities(&status) {
        Some(absent) if absent.is_empty() => {
            finding(check, State::Ok, "CAP_BPF CAP_PERFMON CAP_SYS_ADMIN", None)
        }
        Some(absent) => finding(
            check,
            State::Missing,
            format!("no {}", absent.join(" ")),
            Some(
                "run as root, or give the unit AmbientCapabilities= (CAP_SYS_ADMIN is for freezing filesystems)",
            ),
        ),
        None => finding(
            check,
            State::Warning,
            "/proc/self/status tells none",
            Some("mount /proc"),
        ),
    }
}

fn bpffs() -> Finding {
    let check = "BPF filesystem";
    if volumes::mounts().iter().any(|m| m.fs_type == "bpf") {
        return finding(check, State::Ok, "mounted", None);
    }
    finding(
        check,
        State::Warning,
        "not mounted",
        Some(
            "mount -t bpf bpf /sys/fs/bpf (the agent tries it by itself); without it tracking ends with the agent",
        ),
    )
}

fn io_uring() -> Finding {
    let check = "io_uring";
    match io_uring_state(
        fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
            .ok()
            .as_deref(),
    ) {
        Ok(found) => finding(check, State::Ok, found, None),
        Err(found) => finding(
            check,
            State::Warning,
            found,
            Some("sysctl kernel.io_uring_disabled=0; until then reads are slower"),
        ),
    }
}

/// What `kernel.io_uring_disabled` means for root. Pure.
fn io_uring_state(value: Option<&str>) -> Result<&'static str, &'static str> {
    match value.map(str::trim) {
        // Kernels before 6.6 have no such switch.
        None => Ok("no switch; allowed"),
        Some("0" | "1") => Ok("allowed"),
        Some(_) => Err("disabled for all"),
    }
}

fn disks() -> Finding {
    let check = "block devices";
    let disks = volumes::all_disks();
    if disks.is_empty() {
        return finding(
            check,
            State::Warning,
            "none",
            Some("attach a disk, or run the agent outside of the container"),
        );
    }
    let without: Vec<&str> = disks
        .iter()
        .filter(|d| !d.keeps_statistics())
        .map(|d| d.name.as_str())
        .collect();
    if without.is_empty() {
        return finding(check, State::Ok, format!("{} found", disks.len()), None);
    }
    finding(
        check,
        State::Warning,
        format!(
            "{} found; no statistics on {}",
            disks.len(),
            without.join(" ")
        ),
        Some(
            "echo 1 > /sys/block/DISK/queue/iostats, so that latency and completeness can be checked",
        ),
    )
}

fn state(config: &Config) -> Finding {
    let check = "state folder";
    let dir = config.state_dir();
    let existing = dir
        .ancestors()
        .find(|d| d.exists())
        .unwrap_or(Path::new("/"));
    let writable = rustix::fs::access(existing, rustix::fs::Access::WRITE_OK).is_ok();
    if writable {
        return finding(check, State::Ok, dir.display().to_string(), None);
    }
    finding(
        check,
        State::Missing,
        format!("{} cannot be written", existing.display()),
        Some("choose another [agent] state_dir, or run as root"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_from_the_effective_set() {
        assert_eq!(
            absent_capabilities("CapEff:\t000001ffffffffff\n"),
            Some(vec![])
        );
        assert_eq!(
            absent_capabilities("CapInh:\tffff\nCapEff:\t0000000000000000\n"),
            Some(vec!["CAP_BPF", "CAP_PERFMON", "CAP_SYS_ADMIN"])
        );
        assert_eq!(
            absent_capabilities("CapEff:\t000000c000000000\n"),
            Some(vec!["CAP_SYS_ADMIN"])
        );
        assert_eq!(absent_capabilities("nothing"), None);
    }

    #[test]
    fn io_uring_may_be_switched_off() {
        assert!(io_uring_state(None).is_ok());
        assert!(io_uring_state(Some("1\n")).is_ok());
        assert!(io_uring_state(Some("2\n")).is_err());
    }
}
