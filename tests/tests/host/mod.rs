//! What tests on this machine's kernel share: loop devices with ext4, and guard processes.

// Not every test binary uses all of it.
#![allow(dead_code)]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use soe_agent::capture::mounts::{DeviceNumber, Mounts, split};
use soe_agent::capture::{FreezeGuard, GuardFreezer, guard_main};

const GUARD: &str = "SOE_TEST_GUARD";

/// Runs a command that may not take longer than 30 s; its output.
pub fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new("timeout")
        .args(["-s", "KILL", "30", program])
        .args(args)
        .output()
        .map_err(|e| e.to_string())?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        let said = String::from_utf8_lossy(&output.stderr);
        Err(format!("{program} {args:?}: {} {said}", output.status))
    }
}

pub fn must(program: &str, args: &[&str]) -> String {
    run(program, args).unwrap_or_else(|error| panic!("{error}"))
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are plain")
}

/// Whether this can run here; prints why not.
pub fn can_run() -> bool {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: needs root for loop devices and freezing");
        return false;
    }
    if !Path::new("/dev/loop-control").exists() {
        println!("SKIPPED: this kernel has no loop devices");
        return false;
    }
    true
}

/// A loop device over a file of its own.
pub struct Loop {
    /// Its node.
    pub device: PathBuf,
}

impl Loop {
    pub fn attach(file: &Path) -> Self {
        let device = must("losetup", &["-f", "--show", text(file)]);
        Self {
            device: device.into(),
        }
    }

    pub fn number(&self) -> DeviceNumber {
        split(fs::metadata(&self.device).expect("the loop device").rdev())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = run("losetup", &["-d", text(&self.device)]);
    }
}

/// A mounted ext4 on a loop device. Fields are dropped in order: device, then files.
pub struct Volume {
    mount: PathBuf,
    device: Loop,
    _folder: tempfile::TempDir,
}

impl Volume {
    /// In the machine's temporary folder.
    pub fn new() -> Self {
        Self::inside(&std::env::temp_dir())
    }

    /// Its device node.
    pub fn device(&self) -> &Path {
        &self.device.device
    }

    /// Its device number.
    pub fn number(&self) -> DeviceNumber {
        self.device.number()
    }

    /// Where it is mounted.
    pub fn mount(&self) -> &Path {
        &self.mount
    }

    /// With its image file in `parent`.
    pub fn inside(parent: &Path) -> Self {
        let folder = tempfile::tempdir_in(parent).expect("a folder");
        let image = folder.path().join("image");
        File::create(&image)
            .and_then(|file| file.set_len(24 << 20))
            .expect("an image file");
        let device = Loop::attach(&image);
        must("mkfs.ext4", &["-q", "-F", text(&device.device)]);
        let mount = std::env::temp_dir().join(format!(
            "soe-capture-host-{}",
            folder
                .path()
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
        ));
        fs::create_dir(&mount).expect("a mount point");
        let volume = Self {
            mount,
            device,
            _folder: folder,
        };
        must("mount", &[text(&volume.device.device), text(&volume.mount)]);
        volume
    }

    /// Writes a file and makes it durable, on a thread; tells when it is done.
    pub fn write(&self) -> Receiver<Instant> {
        let (done, told) = mpsc::channel();
        let path = self.mount.join("written");
        std::thread::spawn(move || {
            let written = File::create(path).and_then(|mut file| {
                file.write_all(b"written")?;
                file.sync_all()
            });
            if written.is_ok() {
                let _ = done.send(Instant::now());
            }
        });
        told
    }

    pub fn is_frozen(&self) -> bool {
        self.write()
            .recv_timeout(Duration::from_millis(400))
            .is_err()
    }

    pub fn thaws_within(&self, limit: Duration) -> bool {
        self.write().recv_timeout(limit).is_ok()
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // A test that failed may leave it frozen; it is this test's own.
        let _ = run("fsfreeze", &["--unfreeze", text(&self.mount)]);
        for _ in 0..50 {
            if run("umount", &[text(&self.mount)]).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let _ = fs::remove_dir(&self.mount);
    }
}

pub fn guard_command() -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    command
        .args([
            "host::guard_process",
            "--exact",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(GUARD, "1");
    command
}

pub fn guard() -> FreezeGuard {
    FreezeGuard::spawn(guard_command(), None).expect("a guard")
}

pub fn freezer<'g>(guard: &'g FreezeGuard, volumes: &[&Volume]) -> GuardFreezer<'g> {
    let numbers: Vec<DeviceNumber> = volumes.iter().map(|v| v.number()).collect();
    let superblocks = Mounts::default()
        .superblocks(&numbers, &[])
        .expect("the superblocks");
    assert_eq!(superblocks.len(), volumes.len());
    guard.prepare(superblocks, volumes.len()).expect("prepared")
}

/// Not a test: the guard's process when the environment says so.
#[test]
fn guard_process() {
    if std::env::var_os(GUARD).is_some() {
        let clean = guard_main() == ExitCode::SUCCESS;
        std::process::exit(i32::from(!clean));
    }
}

/// Ends a process this test started.
pub fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("killed");
}
