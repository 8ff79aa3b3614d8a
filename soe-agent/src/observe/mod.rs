//! Block events in: the eBPF half, recorded traces, and the volumes they belong to.
//!
//! `bpf` loads the programs, `tracker` attaches, pins and adopts them, `disk` reads and steers one
//! disk's maps, `counting` its write counters, `volumes` finds out what a name stands for, `uevents`
//! hears of devices that come and go.

pub mod bpf;
pub mod cgroups;
mod counting;
pub mod disk;
pub mod dm;
mod maps;
pub mod ring;
pub mod syscalls;
pub mod tracker;
pub mod uevents;
pub mod volumes;

/// Errors of the kernel half and of the volumes it watches.
#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    /// The kernel's types do not offer what is needed.
    #[error(transparent)]
    Btf(#[from] crate::probe::btf::BtfError),
    /// Loading failed.
    #[error(
        "cannot load {what} into the kernel: {reason}; run as root or with CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN, see `soe doctor`"
    )]
    Load {
        /// Program, map or object.
        what: String,
        /// Why.
        reason: String,
    },
    /// A call failed.
    #[error("{what}: {source}")]
    Io {
        /// The call and what it was about.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// Another agent owns the pinned programs.
    #[error("another agent already tracks this host (it holds {path}); stop it first")]
    Owned {
        /// The pin folder.
        path: String,
    },
    /// No slot is left.
    #[error("all {slots} tracking slots are in use; raise limits.volumes")]
    Full {
        /// Number of slots.
        slots: u32,
    },
    /// No such volume.
    #[error("{path} is not a volume: {reason}")]
    NoVolume {
        /// What the user named.
        path: String,
        /// Why.
        reason: String,
    },
}

impl TrackerError {
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
