//! Debian's cloud kernels: fetched with apt, unpacked, and kept outside the checkout.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{place, run};

/// The kernel series the tests are run on, besides this machine's own.
pub const SERIES: [&str; 2] = ["6.1", "6.12"];

/// Packages that depend on the newest kernel of some series; which series that is depends on the
/// Debian release.
const META_PACKAGES: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-6.12-cloud-amd64"];
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(900);
const QUICK: Duration = Duration::from_secs(120);

/// A kernel that is unpacked and can be booted.
#[derive(Debug)]
pub struct Kernel {
    /// The compressed kernel.
    pub image: PathBuf,
    /// `lib/modules/RELEASE`.
    pub modules: PathBuf,
    /// The release, as `uname -r` gives it in the guest.
    pub release: String,
}

fn store() -> PathBuf {
    place::cache().join("kernels")
}

/// The series that were not fetched yet.
pub fn missing() -> Vec<&'static str> {
    SERIES
        .into_iter()
        .filter(|series| unpacked(series).is_err())
        .collect()
}

/// The newest unpacked kernel of `series`.
pub fn unpacked(series: &str) -> Result<Kernel> {
    let prefix = format!("linux-image-{series}.");
    let mut names: Vec<String> = fs::read_dir(store())
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(&prefix) && name.ends_with("-cloud-amd64"))
        .collect();
    names.sort_by_key(|name| version_key(name));
    match names.pop() {
        Some(name) => open(&store().join(name)),
        None => bail!("Linux {series} was not downloaded (`cargo xtask setup --vm` does it)"),
    }
}

/// The numbers in a name, so that 6.12.9 sorts before 6.12.10.
fn version_key(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

fn open(dir: &Path) -> Result<Kernel> {
    let image = only_entry(&dir.join("boot"), "vmlinuz-")?;
    let release = image
        .file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.strip_prefix("vmlinuz-"))
        .context("the kernel's file name has no release")?
        .to_owned();
    let modules = ["lib/modules", "usr/lib/modules"]
        .map(|place| dir.join(place).join(&release))
        .into_iter()
        .find(|place| place.is_dir())
        .with_context(|| format!("{} has no modules", dir.display()))?;
    Ok(Kernel {
        image,
        modules,
        release,
    })
}

fn only_entry(dir: &Path, prefix: &str) -> Result<PathBuf> {
    fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .with_context(|| format!("{} has no file that begins with {prefix}", dir.display()))
}

/// Fetches and unpacks the newest kernel of `series`; returns the package's name.
pub fn download(series: &str) -> Result<String> {
    if place::program("apt-get").is_none() || place::program("dpkg-deb").is_none() {
        bail!("it comes as a Debian package, and this machine has no apt-get");
    }
    let package = newest_package(series)?;
    fs::create_dir_all(store()).with_context(|| format!("cannot create {}", store().display()))?;
    let work = tempfile::Builder::new()
        .prefix(".unpacking-")
        .tempdir_in(store())
        .with_context(|| format!("cannot write to {}", store().display()))?;
    run::check(
        Command::new("apt-get")
            .args(["-qq", "download", &package])
            .current_dir(work.path()),
        DOWNLOAD_LIMIT,
    )?;
    let deb = only_entry(work.path(), "linux-image-")?;
    let root = work.path().join("root");
    run::check(
        Command::new("dpkg-deb").arg("-x").args([&deb, &root]),
        DOWNLOAD_LIMIT,
    )?;
    open(&root)?;
    // A directory of this name is always complete: it appears by a rename.
    let place = store().join(&package);
    match fs::rename(&root, &place) {
        Ok(()) => Ok(package),
        Err(_) if open(&place).is_ok() => Ok(package),
        Err(error) => Err(error).with_context(|| format!("cannot create {}", place.display())),
    }
}

fn newest_package(series: &str) -> Result<String> {
    match find_package(series) {
        Ok(package) => Ok(package),
        Err(error) if place::is_root() => {
            // A fresh image has no package lists.
            let mut update = Command::new("apt-get");
            run::check(
                update.args(["-qq", "-o", "DPkg::Lock::Timeout=300", "update"]),
                DOWNLOAD_LIMIT,
            )
            .context(error)?;
            find_package(series)
        }
        Err(error) => Err(error),
    }
}

fn find_package(series: &str) -> Result<String> {
    let wanted = format!("linux-image-{series}.");
    for meta in META_PACKAGES {
        let text = run::output(Command::new("apt-cache").args(["depends", meta]), QUICK)
            .unwrap_or_default();
        let names = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "));
        if let Some(name) = names.map(str::trim).find(|name| name.starts_with(&wanted)) {
            return Ok(name.to_owned());
        }
    }
    bail!(
        "none of {} brings a kernel of this series here (Debian 12 with its backports does)",
        META_PACKAGES.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_sort_by_number() {
        assert!(
            version_key("linux-image-6.12.9+deb12-cloud-amd64")
                < version_key("linux-image-6.12.10+deb12-cloud-amd64")
        );
        assert!(
            version_key("linux-image-6.1.0-9-cloud-amd64")
                < version_key("linux-image-6.1.0-10-cloud-amd64")
        );
    }
}
