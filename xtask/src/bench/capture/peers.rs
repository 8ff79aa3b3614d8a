//! What other tools take for the same differential. They do not know what changed, so they read the
//! whole image.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::cost::{Cost, cpu};
use super::ground::Ground;
use crate::demo::stop;
use crate::{place, run};

const LIMIT: Duration = Duration::from_secs(900);

/// A tool's incremental.
pub(super) struct Peer {
    pub(super) name: &'static str,
    pub(super) cost: Cost,
    pub(super) stored: u64,
}

/// A full backup of the image by each tool that is installed, then the change of the blocks
/// `changed`, then the incremental that is measured.
pub(super) fn measure(ground: &Ground, changed: &[u64], dir: &Path) -> Result<Vec<Peer>> {
    let mut tools: Vec<Tool> = Vec::new();
    for name in ["restic", "borg", "qemu-img"] {
        if place::program(name).is_none() {
            println!("  no {name} to compare with");
            continue;
        }
        let tool = Tool::new(name, ground.file(), dir);
        tool.prepare()?;
        tools.push(tool);
    }
    ground.rewrite(changed, 99)?;
    let mut peers = Vec::new();
    for tool in tools {
        stop::check()?;
        let held = bytes_in(&tool.repository)?;
        let (began, before) = (Instant::now(), cpu(libc::RUSAGE_CHILDREN)?);
        tool.incremental()?;
        peers.push(Peer {
            name: tool.name,
            cost: Cost {
                wall: began.elapsed(),
                cpu: cpu(libc::RUSAGE_CHILDREN)? - before,
            },
            stored: bytes_in(&tool.repository)?.saturating_sub(held),
        });
    }
    Ok(peers)
}

struct Tool {
    name: &'static str,
    image: String,
    repository: std::path::PathBuf,
}

impl Tool {
    fn new(name: &'static str, image: &Path, dir: &Path) -> Self {
        Self {
            name,
            image: image.display().to_string(),
            repository: dir.join(name),
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.name);
        command
            .args(arguments)
            .env("RESTIC_REPOSITORY", &self.repository)
            .env("RESTIC_PASSWORD", "bench")
            .env("RESTIC_CACHE_DIR", self.repository.with_extension("cache"))
            .env("BORG_REPO", &self.repository)
            .env("BORG_BASE_DIR", self.repository.with_extension("cache"));
        command
    }

    fn run(&self, arguments: &[&str]) -> Result<()> {
        run::output(&mut self.command(arguments), LIMIT).map(drop)
    }

    fn prepare(&self) -> Result<()> {
        match self.name {
            "restic" => {
                self.run(&["init"])?;
                self.run(&["backup", &self.image])
            }
            "borg" => {
                self.run(&["init", "--encryption=none"])?;
                self.borg("full")
            }
            "qemu-img" => {
                std::fs::create_dir(&self.repository).context("folder")?;
                let full = self.qcow("full");
                self.run(&[
                    "convert",
                    "-f",
                    "raw",
                    "-O",
                    "qcow2",
                    "-c",
                    &self.image,
                    &full,
                ])
            }
            other => bail!("unknown tool {other}"),
        }
    }

    fn incremental(&self) -> Result<()> {
        match self.name {
            "restic" => self.run(&["backup", &self.image]),
            "borg" => self.borg("incremental"),
            _ => {
                let (full, next, thin) = (self.qcow("full"), self.qcow("next"), self.qcow("thin"));
                self.run(&["convert", "-f", "raw", "-O", "qcow2", &self.image, &next])?;
                // Only what differs from the full backup stays in the new one, and is then written out.
                self.run(&["rebase", "-f", "qcow2", "-F", "qcow2", "-b", &full, &next])?;
                self.run(&[
                    "convert", "-O", "qcow2", "-B", &full, "-F", "qcow2", &next, &thin,
                ])?;
                std::fs::remove_file(&next).context("the copy that was compared")
            }
        }
    }

    fn borg(&self, archive: &str) -> Result<()> {
        let name = format!("::{archive}");
        // The best setting for images: blocks of a fixed size, weak compression.
        let fixed = ["--chunker-params=fixed,65536", "--compression=lz4"];
        self.run(&[&["create"], &fixed[..], &[&name, &self.image]].concat())
    }

    fn qcow(&self, name: &str) -> String {
        self.repository.join(name).display().to_string()
    }
}

fn bytes_in(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let entry = entry.context("folder")?;
        let meta = entry.metadata().context("file")?;
        sum += match meta.is_dir() {
            true => bytes_in(&entry.path())?,
            false => meta.len(),
        };
    }
    Ok(sum)
}
