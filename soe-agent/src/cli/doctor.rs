//! `soe doctor`.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::error::CliError;
use super::output::{Output, Table};
use crate::config::Config;
use crate::observe::volumes;
use crate::probe::support::{KernelSupport, TRACEPOINTS};

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
    let support = KernelSupport::probe();
    let mut checks = of_kernel(&support);
    checks.extend([disks(), state(&config)]);
    let report = Report {
        kernel: support.release,
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
    verdict(&report.checks)
}

/// What is said of a kernel and a process. Pure.
fn of_kernel(support: &KernelSupport) -> Vec<Finding> {
    vec![
        kernel_types(support),
        tracepoints(support),
        capabilities(support),
        bpffs(support),
        io_uring(support),
    ]
}

/// One sentence that names all that is missing. Pure.
fn verdict(checks: &[Finding]) -> Result<(), CliError> {
    let missing: Vec<&str> = checks
        .iter()
        .filter(|c| c.state == State::Missing)
        .map(|c| c.check)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
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

fn kernel_types(support: &KernelSupport) -> Finding {
    let check = "kernel types (BTF)";
    match &support.types {
        Ok(()) => finding(check, State::Ok, "all structures and members found", None),
        Err(error) => finding(
            check,
            State::Missing,
            error.to_string(),
            Some("use a kernel built with CONFIG_DEBUG_INFO_BTF=y, 5.18 or newer"),
        ),
    }
}

fn tracepoints(support: &KernelSupport) -> Finding {
    let check = "block tracepoints";
    match &support.absent_tracepoints {
        None => finding(
            check,
            State::Missing,
            "unknown without kernel types",
            Some("see the line above"),
        ),
        Some(absent) if absent.is_empty() => finding(check, State::Ok, TRACEPOINTS.join(" "), None),
        Some(absent) => finding(
            check,
            State::Missing,
            format!("no {}", absent.join(" ")),
            Some("use a kernel built with CONFIG_BLOCK and CONFIG_TRACEPOINTS"),
        ),
    }
}

fn capabilities(support: &KernelSupport) -> Finding {
    let check = "capabilities";
    match &support.absent_capabilities {
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

fn bpffs(support: &KernelSupport) -> Finding {
    let check = "BPF filesystem";
    if support.bpffs {
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

/// What `kernel.io_uring_disabled` means for root.
fn io_uring(support: &KernelSupport) -> Finding {
    let check = "io_uring";
    match support.io_uring_disabled.as_deref().map(str::trim) {
        // Kernels before 6.6 have no such switch.
        None => finding(check, State::Ok, "no switch; allowed", None),
        Some("0" | "1") => finding(check, State::Ok, "allowed", None),
        Some(_) => finding(
            check,
            State::Warning,
            "disabled for all",
            Some("sysctl kernel.io_uring_disabled=0; until then reads are slower"),
        ),
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
    use crate::probe::btf::BtfError;

    fn whole() -> KernelSupport {
        KernelSupport {
            release: "6.12".into(),
            types: Ok(()),
            absent_tracepoints: Some(Vec::new()),
            absent_capabilities: Some(Vec::new()),
            bpffs: true,
            io_uring_disabled: Some("0\n".into()),
        }
    }

    /// The one finding that is not as it should be.
    fn only(support: &KernelSupport) -> Finding {
        let mut found = of_kernel(support);
        found.retain(|finding| finding.state != State::Ok);
        assert_eq!(found.len(), 1, "{found:?}");
        let finding = found.remove(0);
        let text = format!("{} {:?}", finding.found, finding.mend);
        assert!(!text.contains('\n') && finding.mend.is_some(), "{text}");
        finding
    }

    #[test]
    fn a_host_that_has_all_is_ready() {
        let checks = of_kernel(&whole());
        assert!(
            checks
                .iter()
                .all(|c| c.state == State::Ok && c.mend.is_none())
        );
        assert!(verdict(&checks).is_ok());
    }

    #[test]
    fn each_thing_that_is_missing_is_one_clear_sentence() {
        let without_types = KernelSupport {
            types: Err(BtfError::Read {
                path: "/sys/kernel/btf/vmlinux".into(),
                source: std::io::ErrorKind::NotFound.into(),
            }),
            ..whole()
        };
        let finding = only(&without_types);
        assert_eq!(
            (finding.check, finding.state),
            ("kernel types (BTF)", State::Missing)
        );
        assert!(
            finding.found.contains("/sys/kernel/btf/vmlinux"),
            "{finding:?}"
        );

        let older = KernelSupport {
            types: Err(BtfError::Missing {
                what: "member diskseq in struct gendisk".into(),
            }),
            ..whole()
        };
        assert!(only(&older).found.contains("diskseq"));

        let without_tracepoint = KernelSupport {
            absent_tracepoints: Some(vec!["block_rq_issue"]),
            ..whole()
        };
        let finding = only(&without_tracepoint);
        assert_eq!(
            (finding.state, finding.found.as_str()),
            (State::Missing, "no block_rq_issue")
        );

        let without_rights = KernelSupport {
            absent_capabilities: Some(vec!["CAP_BPF", "CAP_SYS_ADMIN"]),
            ..whole()
        };
        let finding = only(&without_rights);
        assert_eq!(
            (finding.state, finding.found.as_str()),
            (State::Missing, "no CAP_BPF CAP_SYS_ADMIN")
        );

        let without_bpffs = KernelSupport {
            bpffs: false,
            ..whole()
        };
        assert_eq!(only(&without_bpffs).state, State::Warning);
        for (switch, fine) in [(None, true), (Some("1\n"), true), (Some("2\n"), false)] {
            let support = KernelSupport {
                io_uring_disabled: switch.map(str::to_owned),
                ..whole()
            };
            let warned = of_kernel(&support)
                .iter()
                .any(|c| c.state == State::Warning);
            assert_eq!(!warned, fine, "{switch:?}");
        }
    }

    #[test]
    fn all_that_is_missing_is_named_at_once() {
        let bare = KernelSupport {
            types: Err(BtfError::Missing { what: "x".into() }),
            absent_tracepoints: None,
            absent_capabilities: Some(vec!["CAP_BPF"]),
            ..whole()
        };
        let error = verdict(&of_kernel(&bare)).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert_eq!(
            error.to_string(),
            "this host lacks what the agent needs: kernel types (BTF), block tracepoints, capabilities; see the table for the mend"
        );
    }
}
