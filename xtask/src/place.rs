//! Where things are: the checkout, the build directory, the cache, programs.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use crate::run;

/// The root of the checkout this binary was built from.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Cargo's build directory, wherever the environment or a configuration file puts it.
pub fn target() -> PathBuf {
    static TARGET: OnceLock<PathBuf> = OnceLock::new();
    TARGET
        .get_or_init(|| ask_cargo().unwrap_or_else(|| root().join("target")))
        .clone()
}

fn ask_cargo() -> Option<PathBuf> {
    let mut cargo = Command::new("cargo");
    cargo
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root());
    let text = run::output(&mut cargo, Duration::from_secs(60)).ok()?;
    let metadata: serde_json::Value = serde_json::from_str(&text).ok()?;
    metadata["target_directory"].as_str().map(PathBuf::from)
}

/// The eBPF object that `soe-agent` embeds. It lies inside the checkout wherever the build directory
/// is, so that a plain `cargo build` finds it.
pub fn ebpf_object() -> PathBuf {
    root().join("target/bpf/soe-ebpf.o")
}

/// What is downloaded once and used by every checkout: `$XDG_CACHE_HOME/soe` or `~/.cache/soe`.
pub fn cache() -> PathBuf {
    match env::var_os("XDG_CACHE_HOME").filter(|dir| Path::new(dir).is_absolute()) {
        Some(dir) => PathBuf::from(dir).join("soe"),
        None => home().join(".cache/soe"),
    }
}

/// Where `cargo install` puts programs.
pub fn cargo_bin() -> PathBuf {
    match env::var_os("CARGO_HOME") {
        Some(dir) => PathBuf::from(dir).join("bin"),
        None => home().join(".cargo/bin"),
    }
}

fn home() -> PathBuf {
    env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from)
}

/// Finds a program in `PATH`, where `cargo install` puts programs, and where Debian keeps those of
/// the administrator (which are not in an ordinary user's `PATH`).
pub fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain([cargo_bin()])
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Whether this process may do what the kernel tests need.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
