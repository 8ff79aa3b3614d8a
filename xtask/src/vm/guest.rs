//! The guest's first and only root file system.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::kernel::Kernel;
use super::modules;
use crate::place;

/// Programs of the host that the guest needs.
const TOOLS: [&str; 4] = ["dmsetup", "losetup", "mkfs.ext4", "mount"];
/// Programs of the host that the guest gets where the host has them.
const TOOLS_WHERE_PRESENT: [&str; 13] = [
    "umount",
    "blkdiscard",
    "blockdev",
    "blkzone",
    "e2fsck",
    "fsfreeze",
    "fstrim",
    "lsblk",
    "mkfs.xfs",
    "mdadm",
    "sfdisk",
    "timeout",
    "xfs_repair",
];
/// The script that runs first, and the one that makes devices; both are part of the guest's side.
const GUEST_FILES: [(&str, &str); 2] = [("init", "/init"), ("soe-devices", "/usr/bin/soe-devices")];

/// Where a program of the host lies in the guest.
pub fn place_of(program: &Path) -> String {
    let name = program
        .file_name()
        .unwrap_or(OsStr::new("program"))
        .to_string_lossy();
    format!("/usr/bin/{name}")
}

/// Writes the archive the kernel unpacks at boot. `script` is what the guest runs.
pub fn write_initrd(path: &Path, kernel: &Kernel, files: &[PathBuf], script: &str) -> Result<()> {
    let failed = || format!("cannot write the guest's file system {}", path.display());
    let out = BufWriter::new(File::create(path).with_context(failed)?);
    let mut archive = Archive::new(out);
    for dir in [
        "/proc",
        "/sys",
        "/dev",
        "/run",
        "/tmp",
        "/root",
        "/bin",
        "/sbin",
        "/usr/sbin",
        "/etc",
        "/var",
        "/mnt",
    ] {
        archive.directory(dir).with_context(failed)?;
    }
    let busybox = place::program("busybox")
        .context("busybox is not installed (`cargo xtask setup --vm` installs it)")?;
    archive
        .file("/bin/busybox", 0o755, &read(&busybox)?)
        .with_context(failed)?;
    archive.symlink("/bin/sh", "busybox").with_context(failed)?;
    for (name, target) in GUEST_FILES {
        archive
            .file(
                target,
                0o755,
                &read(&place::root().join("tests/vm").join(name))?,
            )
            .with_context(failed)?;
    }
    archive
        .file("/etc/soe-script", 0o755, script.as_bytes())
        .with_context(failed)?;
    archive
        .file(
            "/etc/passwd",
            0o644,
            b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
        )
        .with_context(failed)?;
    archive
        .file("/etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")
        .with_context(failed)?;
    archive
        .symlink("/etc/mtab", "/proc/mounts")
        .with_context(failed)?;

    let modules = modules::collect(&kernel.modules)?;
    let dir = format!("/lib/modules/{}", kernel.release);
    for (name, data) in &modules.files {
        archive
            .file(&format!("{dir}/{name}"), 0o644, data)
            .with_context(failed)?;
    }
    archive
        .file(&format!("{dir}/modules.dep"), 0o644, modules.dep.as_bytes())
        .with_context(failed)?;
    archive
        .file(
            &format!("{dir}/modules.alias"),
            0o644,
            modules.alias.as_bytes(),
        )
        .with_context(failed)?;
    archive
        .file(&format!("{dir}/modules.symbols"), 0o644, b"")
        .with_context(failed)?;

    let mut libraries = BTreeSet::new();
    let mut programs = Vec::new();
    for name in TOOLS {
        programs.push(place::program(name).with_context(|| format!("{name} is not installed"))?);
    }
    programs.extend(TOOLS_WHERE_PRESENT.into_iter().filter_map(place::program));
    programs.extend(files.iter().cloned());
    for program in &programs {
        archive
            .file(&place_of(program), 0o755, &stripped(program)?)
            .with_context(failed)?;
        libraries.extend(libraries_of(program));
    }
    for library in &libraries {
        archive
            .file(library, 0o755, &read(Path::new(library))?)
            .with_context(failed)?;
    }
    archive
        .finish()
        .and_then(|mut out| out.flush())
        .with_context(failed)
}

/// The shared libraries of a program, as the dynamic loader finds them. A static program or a script
/// has none.
fn libraries_of(program: &Path) -> Vec<String> {
    let text = super::ask("ldd", &[program.as_os_str()]).unwrap_or_default();
    text.split_whitespace()
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .map(str::to_owned)
        .collect()
}

/// A program without its debugging information, which is most of a test program and would only fill
/// the guest's memory.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let data = read(program)?;
    if data.len() < 8 << 20 || !data.starts_with(b"\x7fELF") {
        return Ok(data);
    }
    let copy = tempfile::NamedTempFile::new().context("cannot create a temporary file")?;
    let args = [
        OsStr::new("--strip-debug"),
        OsStr::new("-o"),
        copy.path().as_os_str(),
        program.as_os_str(),
    ];
    match super::ask("strip", &args) {
        Ok(_) => read(copy.path()),
        Err(_) => Ok(data),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
