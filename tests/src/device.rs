//! Block devices for one test. Everything is removed on drop, also when the test panics.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Why kernel tests cannot run here, or `None` when they can. On a machine with root and BTF
/// nothing may be skipped.
pub fn unable() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("kernel tests need root");
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Some("kernel tests need a kernel with BTF");
    }
    None
}

/// Runs a command under a hard limit and returns what it printed.
pub fn run(program: &str, arguments: &[&str]) -> io::Result<String> {
    let out = Command::new("timeout")
        .args(["-s", "KILL", "60", program])
        .args(arguments)
        .output()?;
    if out.status.success() {
        Ok(String::from_utf8_lossy(&out.stdout).trim().to_string())
    } else {
        Err(io::Error::other(format!(
            "{program} {}: {} {}",
            arguments.join(" "),
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        )))
    }
}

/// Makes a loop disk count its IO. The switch outlives the disk: whoever had it before may have left it
/// off.
pub fn count_io(node: &str) -> io::Result<()> {
    let name = node.trim_start_matches("/dev/");
    std::fs::write(format!("/sys/block/{name}/queue/iostats"), "1")
}

/// A loop device over a sparse file of its own.
pub struct LoopDevice {
    /// The device node.
    pub path: PathBuf,
    backing: tempfile::TempPath,
}

impl LoopDevice {
    /// A loop device of `bytes`, with direct IO to its file where that works.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let file = tempfile::Builder::new().prefix("soe-test-").tempfile()?;
        file.as_file().set_len(bytes)?;
        let backing = file.into_temp_path();
        let name = backing
            .to_str()
            .ok_or(io::ErrorKind::InvalidInput)?
            .to_string();
        let path = run("losetup", &["-f", "--show", "-P", &name])?;
        let disk = Self {
            path: path.into(),
            backing,
        };
        count_io(disk.node())?;
        Ok(disk)
    }

    /// The file behind it.
    pub fn backing(&self) -> &Path {
        &self.backing
    }

    /// The node's path as text.
    pub fn node(&self) -> &str {
        self.path.to_str().expect("loop nodes have plain names")
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = run("losetup", &["-d", self.node()]);
    }
}

/// A mounted filesystem.
pub struct Mounted {
    /// Where.
    pub point: tempfile::TempDir,
}

impl Mounted {
    /// Makes a filesystem on `device` and mounts it.
    pub fn new(device: &Path, fs: &str) -> io::Result<Self> {
        let node = device.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        let force = if fs == "ext4" { "-Fq" } else { "-fq" };
        run(&format!("mkfs.{fs}"), &[force, node])?;
        Self::of(device, &[])
    }

    /// Mounts the filesystem on `device` with `options` of mount(8).
    pub fn of(device: &Path, options: &[&str]) -> io::Result<Self> {
        let node = device.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        let point = tempfile::Builder::new().prefix("soe-mnt-").tempdir()?;
        let place = point.path().display().to_string();
        run("mount", &[options, &[node, &place]].concat())?;
        Ok(Self { point })
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        self.point.path()
    }

    /// Unmounts it, which fails while somebody holds it.
    pub fn unmount(self) -> io::Result<()> {
        run("umount", &[&self.point.path().display().to_string()]).map(drop)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let point = self.point.path().to_path_buf();
        let name = point.display().to_string();
        // Who held it may be about to end; a mount that is left keeps its device for good.
        for _ in 0..50 {
            let mounted = soe_agent::observe::volumes::mounts()
                .iter()
                .any(|mount| mount.point == point);
            if !mounted || run("umount", &[&name]).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}

/// Opens a device past the page cache.
pub fn open_direct(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
}

/// Memory aligned for O_DIRECT.
pub struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// `len` bytes of `fill`.
    pub fn new(len: usize, fill: u8) -> Self {
        let memory = vec![fill; len + 4096];
        let start = memory.as_ptr().align_offset(4096);
        Self { memory, start, len }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// Writes `len` bytes of `fill` at `offset` past the page cache.
pub fn write_direct(device: &File, offset: u64, len: usize, fill: u8) -> io::Result<()> {
    device.write_all_at(Aligned::new(len, fill).bytes(), offset)
}
