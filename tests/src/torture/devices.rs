//! Devices to torture: a partition of a loop disk, a zram disk, a slow disk, a file on ext4 whose
//! place on the disk is known. Everything is removed on drop.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::history::SECTOR;
use crate::device::{Aligned, LoopDevice, count_io, open_direct, run};

/// A loop disk with two partitions.
pub struct Partitioned {
    /// The nodes of the partitions.
    pub parts: [PathBuf; 2],
    made: bool,
    _disk: LoopDevice,
}

impl Partitioned {
    /// Partitions of `bytes` each.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let sectors = bytes / SECTOR as u64;
        let disk = LoopDevice::new(2 * bytes + (4 << 20))?;
        let second = 2048 + sectors;
        let table =
            format!("label: dos\nstart=2048, size={sectors}\nstart={second}, size={sectors}\n");
        let mut child = Command::new("timeout")
            .args(["-s", "KILL", "30", "sfdisk", "-q", disk.node()])
            .stdin(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(table.as_bytes())?;
        }
        child.wait()?;
        // Fails when the kernel has read the table already.
        let _ = run("partx", &["-u", disk.node()]);
        let parts = [1, 2].map(|n| PathBuf::from(format!("{}p{n}", disk.node())));
        let deadline = Instant::now() + Duration::from_secs(3);
        while !parts.iter().all(|part| part.exists()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut made = false;
        for part in &parts {
            if !part.exists() {
                // No udev here.
                let name = part.file_name().unwrap_or_default().to_string_lossy();
                let disk_name = disk.path.file_name().unwrap_or_default().to_string_lossy();
                let dev = fs::read_to_string(format!("/sys/block/{disk_name}/{name}/dev"))?;
                let (major, minor) = dev.trim().split_once(':').unwrap_or_default();
                run("mknod", &[&part.display().to_string(), "b", major, minor])?;
                made = true;
            }
        }
        Ok(Self {
            parts,
            made,
            _disk: disk,
        })
    }
}

impl Drop for Partitioned {
    fn drop(&mut self) {
        for part in self.parts.iter().filter(|_| self.made) {
            let _ = fs::remove_file(part);
        }
    }
}

/// A zram disk.
pub struct Zram {
    /// Its node.
    pub path: PathBuf,
    number: String,
}

impl Zram {
    /// A zram disk of `bytes`, where the kernel has zram.
    pub fn new(bytes: u64) -> Option<Self> {
        let number = fs::read_to_string("/sys/class/zram-control/hot_add").ok()?;
        let number = number.trim().to_owned();
        let zram = Self {
            path: format!("/dev/zram{number}").into(),
            number,
        };
        let size = format!("/sys/block/zram{}/disksize", zram.number);
        fs::write(size, bytes.to_string()).ok()?;
        Some(zram)
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let _ = fs::write(format!("/sys/block/zram{}/reset", self.number), "1");
        let _ = fs::write("/sys/class/zram-control/hot_remove", &self.number);
    }
}

/// A loop disk over another one, which the kernel throttles: its writes take tens of milliseconds,
/// and those of several requests land piece by piece.
pub struct SlowDisk {
    /// The upper disk's node.
    pub path: PathBuf,
    rule: Option<(PathBuf, String)>,
    _lower: LoopDevice,
}

impl SlowDisk {
    /// A disk of `bytes` that takes `write_rate` bytes per second, in requests of at most
    /// `request_kib`.
    pub fn new(bytes: u64, write_rate: u64, request_kib: u32) -> io::Result<Self> {
        let lower = LoopDevice::new(bytes)?;
        let path = run("losetup", &["-f", "--show", "--direct-io=on", lower.node()])?;
        count_io(&path)?;
        let mut slow = Self {
            path: path.into(),
            rule: None,
            _lower: lower,
        };
        let name = slow
            .path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let limit = format!("/sys/block/{name}/queue/max_sectors_kb");
        fs::write(limit, request_kib.to_string())?;
        let rdev = fs::metadata(&slow._lower.path)?.rdev();
        let device = format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
        let groups = fs::read_to_string("/proc/self/cgroup")?;
        let blkio = groups
            .lines()
            .find_map(|line| line.split_once(":blkio:").map(|(_, at)| at));
        let file = blkio.map(|group| {
            Path::new("/sys/fs/cgroup/blkio")
                .join(group.trim_start_matches('/'))
                .join("blkio.throttle.write_bps_device")
        });
        match file.filter(|file| fs::write(file, format!("{device} {write_rate}")).is_ok()) {
            Some(file) => slow.rule = Some((file, device)),
            // Small requests alone make a smaller race: more captures are needed to see it.
            None => println!("no throttling in this kernel: the slow disk is not slow"),
        }
        Ok(slow)
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        if let Some((file, device)) = &self.rule {
            let _ = fs::write(file, format!("{device} 0"));
        }
        let _ = run("losetup", &["-d", &self.path.display().to_string()]);
    }
}

/// A file whose blocks never move, and where they are.
pub struct PlacedFile {
    /// The file.
    pub path: PathBuf,
    /// (offset in the file, offset on the device, bytes), in the order of the file.
    pub extents: Vec<(u64, u64, u64)>,
}

impl PlacedFile {
    /// Makes a file of `bytes` zeroes in a filesystem that overwrites in place.
    pub fn new(path: PathBuf, bytes: u64) -> io::Result<Self> {
        {
            let file = File::create(&path)?;
            file.set_len(bytes)?;
        }
        let file = open_direct(&path)?;
        let zeroes = Aligned::new(1 << 20, 0);
        for offset in (0..bytes).step_by(1 << 20) {
            let len = (bytes - offset).min(1 << 20) as usize;
            file.write_all_at(&zeroes.bytes()[..len], offset)?;
        }
        file.sync_all()?;
        let extents = extents(&file, bytes)?;
        let covered: u64 = extents.iter().map(|(_, _, len)| len).sum();
        if covered != bytes {
            return Err(io::Error::other(format!(
                "{covered} of {bytes} bytes are placed"
            )));
        }
        Ok(Self { path, extents })
    }

    /// The file's bytes out of the image of its device.
    pub fn of_image(&self, image: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (_, place, len) in &self.extents {
            bytes.extend_from_slice(&image[*place as usize..(place + len) as usize]);
        }
        bytes
    }

    /// Sectors of the file at which an extent begins.
    pub fn borders(&self) -> Vec<u64> {
        self.extents
            .iter()
            .map(|(at, _, _)| at / SECTOR as u64)
            .collect()
    }
}

/// linux/fiemap.h, with room for many extents.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [FiemapExtent; 256],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_too: [u32; 3],
}

fn extents(file: &File, bytes: u64) -> io::Result<Vec<(u64, u64, u64)>> {
    const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;
    let mut map = Fiemap {
        start: 0,
        length: bytes,
        flags: 1, // sync first
        mapped: 0,
        count: 256,
        reserved: 0,
        extents: [FiemapExtent::default(); 256],
    };
    // SAFETY: the request fills at most `count` extents of the struct it is given.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as _, &raw mut map) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let found = map.extents.iter().take(map.mapped as usize);
    Ok(found
        .map(|extent| {
            (
                extent.logical,
                extent.physical,
                extent.length.min(bytes - extent.logical),
            )
        })
        .collect())
}
