//! The volumes of the demo: loop devices with ext4 on an origin made slow by a limit of the kernel's
//! block controller. Whatever is made here is taken away when dropped.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::process;
use crate::place;

const LIMIT: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;

/// Size of each volume.
pub const VOLUME_BYTES: u64 = 160 * MIB;
/// What the slow origin reads and writes a second, each.
pub const ORIGIN_BYTES_PER_SECOND: u64 = 32 * MIB;
/// How many operations it does a second, in each direction.
pub const ORIGIN_OPS_PER_SECOND: u64 = 1500;

/// A program of the system, wherever it lies.
pub fn tool(name: &str) -> Command {
    Command::new(place::program(name).unwrap_or_else(|| PathBuf::from(name)))
}

/// A loop device with a mounted ext4.
pub struct Volume {
    /// What the demo calls it.
    pub name: &'static str,
    /// The loop device.
    pub device: String,
    /// The file behind it.
    pub backing: PathBuf,
    /// Where it is mounted.
    pub mount: PathBuf,
    attached: bool,
    mounted: bool,
}

impl Volume {
    /// Makes the backing file in `dir`, attaches, formats and mounts it.
    pub fn make(name: &'static str, dir: &Path) -> Result<Self> {
        let backing = dir.join(format!("{name}.img"));
        File::create(&backing)
            .and_then(|file| file.set_len(VOLUME_BYTES))
            .with_context(|| format!("cannot make {}", backing.display()))?;
        let mut attach = tool("losetup");
        attach.args(["-f", "--show"]).arg(&backing);
        let device = process::output(&mut attach, LIMIT)?.trim().to_owned();
        let mut volume = Self {
            name,
            device,
            mount: dir.join(format!("{name}.mnt")),
            backing,
            attached: true,
            mounted: false,
        };
        if !volume.is_ours() {
            volume.attached = false;
            bail!("{} does not lie on the file just attached", volume.device);
        }
        process::output(
            tool("mkfs.ext4")
                .args(["-Fq", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
                .arg(&volume.device),
            LIMIT,
        )?;
        fs::create_dir(&volume.mount)
            .with_context(|| format!("cannot make {}", volume.mount.display()))?;
        process::output(tool("mount").arg(&volume.device).arg(&volume.mount), LIMIT)?;
        volume.mounted = true;
        Ok(volume)
    }

    fn kernel_name(&self) -> &str {
        self.device.trim_start_matches("/dev/")
    }

    /// Whether the device still lies on this demo's file: numbers of loop devices are shared.
    fn is_ours(&self) -> bool {
        let file = format!("/sys/class/block/{}/loop/backing_file", self.kernel_name());
        fs::read_to_string(file).is_ok_and(|text| {
            let text = text.trim_end_matches('\n');
            Path::new(text.strip_suffix(" (deleted)").unwrap_or(text)) == self.backing
        })
    }

    /// `MAJOR:MINOR`.
    fn numbers(&self) -> Result<String> {
        let file = format!("/sys/class/block/{}/dev", self.kernel_name());
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?;
        Ok(text.trim().to_owned())
    }

    /// Makes sure that nothing writes to the volume any more: unmounts it or, when something keeps it
    /// busy, mounts it read-only. Says which.
    pub fn still(&mut self) -> Result<&'static str> {
        for _ in 0..8 {
            match process::output(tool("umount").arg(&self.mount), LIMIT) {
                Ok(_) => {
                    self.mounted = false;
                    self.drop_cache()?;
                    return Ok("unmounted");
                }
                Err(_) => std::thread::sleep(Duration::from_millis(400)),
            }
        }
        let mut remount = tool("mount");
        remount.args(["-o", "remount,ro"]).arg(&self.mount);
        process::output(&mut remount, LIMIT)?;
        self.drop_cache()?;
        Ok("mounted read-only, because something keeps it busy")
    }

    fn drop_cache(&self) -> Result<()> {
        process::output(tool("blockdev").args(["--flushbufs", &self.device]), LIMIT)?;
        Ok(())
    }

    /// Destroys the volume: detaches the device and overwrites the file behind it with garbage.
    pub fn lose(&mut self) -> Result<()> {
        self.release();
        let fail = || format!("cannot overwrite {}", self.backing.display());
        let mut garbage = vec![0; MIB as usize];
        File::open("/dev/urandom")
            .and_then(|mut random| random.read_exact(&mut garbage))
            .context("cannot read /dev/urandom")?;
        let mut file = File::options()
            .write(true)
            .open(&self.backing)
            .with_context(fail)?;
        for _ in 0..VOLUME_BYTES / MIB {
            file.write_all(&garbage).with_context(fail)?;
        }
        file.sync_all().with_context(fail)
    }

    /// Unmounts and detaches, as far as that was not done yet.
    fn release(&mut self) {
        if self.mounted {
            let plain = (0..5).any(|_| {
                let done = process::output_regardless(tool("umount").arg(&self.mount), LIMIT);
                if done.is_err() {
                    std::thread::sleep(Duration::from_millis(300));
                }
                done.is_ok()
            });
            let done = plain
                || process::output_regardless(tool("umount").arg("-l").arg(&self.mount), LIMIT)
                    .is_ok();
            if !done {
                eprintln!("demo: {} could not be unmounted", self.mount.display());
            }
            self.mounted = !done;
        }
        if self.attached && self.is_ours() {
            match process::output_regardless(tool("losetup").args(["-d", &self.device]), LIMIT) {
                Ok(_) => self.attached = false,
                Err(error) => eprintln!("demo: {error:#}"),
            }
        }
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.release();
    }
}

/// A child group of the kernel's block controller, in which the volumes are slow for every member.
pub struct SlowOrigin {
    dir: Option<PathBuf>,
    /// In words, for the reader.
    pub described: String,
}

impl SlowOrigin {
    /// Makes the group if this machine can; otherwise says that the origin is as fast as it is.
    pub fn make(volumes: &[Volume]) -> Self {
        match Self::throttled(volumes) {
            Ok(origin) => origin,
            Err(why) => Self {
                dir: None,
                described: format!(
                    "not throttled ({why:#}), so the origin is as fast as its files"
                ),
            },
        }
    }

    fn throttled(volumes: &[Volume]) -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let name = format!("soe-demo-{}", std::process::id());
        let dir = if root.join("blkio/blkio.throttle.read_bps_device").exists() {
            root.join("blkio").join(name)
        } else if fs::read_to_string(root.join("cgroup.subtree_control"))
            .is_ok_and(|on| on.split_whitespace().any(|c| c == "io"))
        {
            root.join(name)
        } else {
            bail!("the block controller of control groups is not to be had");
        };
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let origin = Self {
            described: format!(
                "{} MiB/s and {ORIGIN_OPS_PER_SECOND} operations/s in each direction, by {}",
                ORIGIN_BYTES_PER_SECOND / MIB,
                dir.display()
            ),
            dir: Some(dir.clone()),
        };
        let (bytes, ops) = (ORIGIN_BYTES_PER_SECOND, ORIGIN_OPS_PER_SECOND);
        for volume in volumes {
            let device = volume.numbers()?;
            let limits = if dir.join("io.max").exists() {
                let all = format!("{device} rbps={bytes} wbps={bytes} riops={ops} wiops={ops}");
                vec![("io.max", all)]
            } else {
                vec![
                    (
                        "blkio.throttle.read_bps_device",
                        format!("{device} {bytes}"),
                    ),
                    (
                        "blkio.throttle.write_bps_device",
                        format!("{device} {bytes}"),
                    ),
                    ("blkio.throttle.read_iops_device", format!("{device} {ops}")),
                    (
                        "blkio.throttle.write_iops_device",
                        format!("{device} {ops}"),
                    ),
                ]
            };
            for (file, value) in limits {
                fs::write(dir.join(file), value)
                    .with_context(|| format!("cannot write {}", dir.join(file).display()))?;
            }
        }
        Ok(origin)
    }

    /// A command that runs `program` as a member of the group.
    pub fn command(&self, program: &Path) -> Command {
        match &self.dir {
            None => Command::new(program),
            Some(dir) => {
                let mut command = Command::new("sh");
                command
                    .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
                    .arg(dir.join("cgroup.procs"))
                    .arg(program);
                command
            }
        }
    }
}

impl Drop for SlowOrigin {
    fn drop(&mut self) {
        let Some(dir) = &self.dir else { return };
        // What the demo started in the group and has not ended by now, such as a child of the killed agent.
        let members = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        for pid in members
            .lines()
            .filter_map(|line| Pid::from_raw(line.parse().ok()?))
        {
            let _ = kill_process(pid, Signal::KILL);
        }
        // They leave the group a moment later.
        for _ in 0..50 {
            if fs::remove_dir(dir).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        eprintln!("demo: {} could not be removed", dir.display());
    }
}
