//! The compiler and the linker that can make a BPF object, on whichever of two routes this machine
//! offers: a distribution's Rust compiler that brings a ready core library for the BPF target
//! (Debian 12's rustc-web), or a nightly compiler with the core library's source (rustup).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::{place, run};

/// The BPF target: little-endian, no operating system.
pub const TARGET: &str = "bpfel-unknown-none";
const QUICK: Duration = Duration::from_secs(60);

/// A compiler that can make code for [`TARGET`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compiler {
    /// A compiler with a ready core library.
    Ready {
        /// The compiler.
        rustc: PathBuf,
        /// The cargo of the same version.
        cargo: PathBuf,
    },
    /// A nightly compiler that builds the core library from source.
    Nightly {
        /// The toolchain's name for rustup.
        toolchain: String,
    },
}

impl Compiler {
    /// In words, for a message.
    pub fn describe(&self) -> String {
        match self {
            Compiler::Ready { rustc, .. } => {
                format!("{} (ready core library for {TARGET})", rustc.display())
            }
            Compiler::Nightly { toolchain } => format!("{toolchain} with rust-src"),
        }
    }
}

/// Finds a compiler for the BPF target.
pub fn compiler() -> Option<Compiler> {
    ready(Path::new("/usr/bin/rustc"), Path::new("/usr/bin/cargo")).or_else(nightly)
}

fn ready(rustc: &Path, cargo: &Path) -> Option<Compiler> {
    if !cargo.is_file() {
        return None;
    }
    let libdir = run::output(
        clean(Command::new(rustc)).args(["--print", "target-libdir", "--target", TARGET]),
        QUICK,
    )
    .ok()?;
    let core = std::fs::read_dir(libdir.trim())
        .ok()?
        .flatten()
        .any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("libcore-") && name.ends_with(".rlib")
        });
    core.then(|| Compiler::Ready {
        rustc: rustc.to_path_buf(),
        cargo: cargo.to_path_buf(),
    })
}

fn nightly() -> Option<Compiler> {
    let list = run::output(
        clean(Command::new("rustup")).args(["toolchain", "list"]),
        QUICK,
    )
    .ok()?;
    list.lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| name.starts_with("nightly"))
        .find(|name| {
            let sysroot = run::output(
                clean(Command::new("rustup")).args(["run", name, "rustc", "--print", "sysroot"]),
                QUICK,
            );
            sysroot.is_ok_and(|dir| {
                Path::new(dir.trim())
                    .join("lib/rustlib/src/rust/library/core")
                    .is_dir()
            })
        })
        .map(|name| Compiler::Nightly {
            toolchain: name.to_owned(),
        })
}

/// Finds the linker for the BPF target.
pub fn linker() -> Option<PathBuf> {
    place::program("bpf-linker")
}

/// Takes away what the cargo that runs us, or its user, set for another target: the flags for the
/// host would break a build for BPF.
pub fn clean(mut command: Command) -> Command {
    for name in [
        "CARGO",
        "RUSTC",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTDOC",
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "CARGO_BUILD_TARGET",
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_TARGET_DIR",
    ] {
        command.env_remove(name);
    }
    command
}
