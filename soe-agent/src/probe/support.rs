//! What this kernel and host offer of what the agent needs. Reading it is apart from judging it, so
//! that what is missing can be told without a host that lacks it.

use std::fs;
use std::path::Path;

use super::btf::{Btf, BtfError};

/// The tracepoints that change tracking needs.
pub const TRACEPOINTS: [&str; 4] = [
    "block_bio_queue",
    "block_rq_complete",
    "block_bio_complete",
    "block_rq_issue",
];

/// The capabilities that the agent needs, with their bits in the effective set.
const CAPABILITIES: [(&str, u32); 3] =
    [("CAP_BPF", 39), ("CAP_PERFMON", 38), ("CAP_SYS_ADMIN", 21)];

/// What was found.
#[derive(Debug)]
pub struct KernelSupport {
    /// The kernel's release.
    pub release: String,
    /// Whether its types have all that the programs need, else what is missing.
    pub types: Result<(), BtfError>,
    /// Tracepoints of [`TRACEPOINTS`] that it lacks; `None` when its types cannot be read.
    pub absent_tracepoints: Option<Vec<&'static str>>,
    /// Capabilities that this process lacks; `None` when `/proc` does not tell.
    pub absent_capabilities: Option<Vec<&'static str>>,
    /// Whether a BPF filesystem is mounted.
    pub bpffs: bool,
    /// What `kernel.io_uring_disabled` says; `None` before Linux 6.6.
    pub io_uring_disabled: Option<String>,
}

impl KernelSupport {
    /// Looks at the running kernel and this process.
    pub fn probe() -> Self {
        Self::below(
            Path::new("/"),
            rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
        )
    }

    /// The same with the files below `root`.
    pub fn below(root: &Path, release: String) -> Self {
        let btf = Btf::from_file(&root.join("sys/kernel/btf/vmlinux"));
        let absent_tracepoints = btf.as_ref().ok().map(|btf| {
            let absent = |name: &&str| btf.tracepoint_arguments(name).is_none();
            TRACEPOINTS.into_iter().filter(absent).collect()
        });
        let text = |path: &str| fs::read_to_string(root.join(path)).ok();
        let mounts = text("proc/self/mountinfo").unwrap_or_default();
        Self {
            release,
            types: btf.and_then(|btf| btf.kernel_offsets()).map(drop),
            absent_tracepoints,
            absent_capabilities: text("proc/self/status")
                .as_deref()
                .and_then(absent_capabilities),
            bpffs: mounts
                .lines()
                .filter_map(|line| line.split_once(" - "))
                .any(|(_, right)| right.starts_with("bpf ")),
            io_uring_disabled: text("proc/sys/kernel/io_uring_disabled"),
        }
    }
}

/// The effective capabilities that are absent, told from the text of `/proc/self/status`. Pure.
fn absent_capabilities(status: &str) -> Option<Vec<&'static str>> {
    let digits = status.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
    let set = u64::from_str_radix(digits.trim(), 16).ok()?;
    Some(
        CAPABILITIES
            .iter()
            .filter(|(_, bit)| set & (1 << bit) == 0)
            .map(|(name, _)| *name)
            .collect(),
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
        assert_eq!(absent_capabilities("CapEff:\tnonsense\n"), None);
    }

    #[test]
    fn a_host_without_anything_is_read_as_one() {
        let root = tempfile::tempdir().unwrap();
        let found = KernelSupport::below(root.path(), "0".into());
        assert!(matches!(found.types, Err(BtfError::Read { .. })));
        assert_eq!(found.absent_tracepoints, None);
        assert_eq!(found.absent_capabilities, None);
        assert!(!found.bpffs && found.io_uring_disabled.is_none());
    }
}
