//! What a name stands for: whole disk, partition, device-mapper node, loop device, by-id link or
//! mount point, found through sysfs. A volume is tracked by its whole disk, in absolute sectors.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use soe_common::SECTOR_SIZE;
use soe_common::record::{DISK_BIO_BASED, DISK_NVME, DISK_SCSI, DiskControl};

use super::{TrackerError, dm};

/// A whole disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Kernel name, such as `nvme0n1` or `loop3`.
    pub name: String,
    /// The kernel's sequence number of the disk: never used twice while the host is up.
    pub diskseq: u64,
    /// Sectors of 512 bytes.
    pub sectors: u64,
    /// `DISK_*` bits.
    pub flags: u32,
    /// `diskseq` of the hidden path disks of a multipath head.
    pub hidden_paths: Vec<u64>,
    /// Digest of the device-mapper tables that say which blocks stand behind the disk's sectors, and
    /// of the disks they lead to; 0 where there are none.
    pub mapping: u64,
    /// Folder in sysfs.
    sys: PathBuf,
}

/// What a user may name as a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// The name the user gave, links resolved: the device node.
    pub path: PathBuf,
    /// The whole disk.
    pub disk: Disk,
    /// First sector on the disk.
    pub start: u64,
    /// First sector after the volume.
    pub end: u64,
    /// A stable identity: wwid, serial, device-mapper uuid or partition uuid, else the disk's
    /// sequence number.
    pub device_id: String,
    /// Kernel name of the node, such as `sda1`.
    pub name: String,
    /// Major and minor number of the node.
    pub rdev: u64,
}

impl Volume {
    /// Bytes of the volume.
    pub fn bytes(&self) -> u64 {
        (self.end - self.start) * SECTOR_SIZE
    }
}

fn text(path: &Path) -> io::Result<String> {
    std::fs::read_to_string(path).map(|s| s.trim().to_string())
}

fn number(path: &Path) -> io::Result<u64> {
    text(path)?.parse().map_err(|_| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} holds no number", path.display()),
        )
    })
}

impl Disk {
    /// The disk of kernel name `name`.
    pub fn of_name(name: &str) -> io::Result<Self> {
        let sys = Path::new("/sys/block").join(name.replace('/', "!"));
        let blk_mq = sys.join("mq").exists();
        let mut flags = 0;
        let hidden_paths = hidden_paths(&sys, name);
        // A multipath head completes its IO as requests of its paths.
        if !blk_mq && hidden_paths.is_empty() {
            flags |= DISK_BIO_BASED;
        }
        if name.starts_with("nvme") {
            flags |= DISK_NVME;
        }
        if sys.join("device/scsi_level").exists() {
            flags |= DISK_SCSI;
        }
        Ok(Self {
            name: name.into(),
            diskseq: number(&sys.join("diskseq"))?,
            sectors: number(&sys.join("size"))?,
            flags,
            mapping: mapping(&sys)?,
            hidden_paths: hidden_paths.into_iter().map(|(seq, _)| seq).collect(),
            sys,
        })
    }

    /// The disk that a slot was laid out for, as far as the slot tells.
    pub(super) fn from_control(control: &DiskControl) -> Self {
        all_disks()
            .into_iter()
            .find(|disk| disk.diskseq == control.diskseq)
            .unwrap_or_else(|| Self {
                name: format!("disk {}", control.diskseq),
                diskseq: control.diskseq,
                sectors: control.sectors,
                flags: control.flags,
                hidden_paths: Vec::new(),
                mapping: control.mapping,
                sys: PathBuf::from("/nonexistent"),
            })
    }

    /// A disk that exists nowhere.
    #[cfg(test)]
    pub(crate) fn for_tests(diskseq: u64, sectors: u64) -> Self {
        Self {
            name: "none".into(),
            diskseq,
            sectors,
            flags: 0,
            hidden_paths: Vec::new(),
            mapping: 0,
            sys: PathBuf::from("/nonexistent"),
        }
    }

    /// Whether bios complete without becoming requests.
    pub fn is_bio_based(&self) -> bool {
        self.flags & DISK_BIO_BASED != 0
    }

    /// Whether commands can reach the disk past the block layer's bios.
    pub(super) fn takes_passthrough(&self) -> bool {
        self.flags & (DISK_NVME | DISK_SCSI) != 0
    }

    /// Whether the node still is the same disk of the same size, with the same blocks behind it and
    /// no path to them that the programs do not know.
    pub fn is_still_there(&self) -> bool {
        number(&self.sys.join("diskseq")).is_ok_and(|seq| seq == self.diskseq)
            && number(&self.sys.join("size")).is_ok_and(|sectors| sectors == self.sectors)
            && mapping(&self.sys).is_ok_and(|mapping| mapping == self.mapping)
            && self
                .paths()
                .iter()
                .all(|(path, _)| self.hidden_paths.contains(path))
    }

    /// The paths of a multipath head as they are now, with their folders in sysfs.
    fn paths(&self) -> Vec<(u64, PathBuf)> {
        hidden_paths(&self.sys, &self.name)
    }

    /// Folders in sysfs whose statistics are those of this disk. A multipath head's IO is done, and
    /// on older kernels only counted, by its paths.
    fn counting(&self) -> Vec<PathBuf> {
        if self.hidden_paths.is_empty() {
            return vec![self.sys.clone()];
        }
        self.paths().into_iter().map(|(_, folder)| folder).collect()
    }

    /// The files by which the device tells what it did and what is in flight. An error tells what to
    /// do where it does not count.
    pub(super) fn statistics(&self) -> io::Result<Vec<Statistics>> {
        if self.suspended() {
            return Err(io::Error::new(
                io::ErrorKind::WouldBlock,
                format!("{} is suspended", self.name),
            ));
        }
        if !self.keeps_statistics() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!(
                    "{} does not count its IO, so it cannot be told when no write is in flight; \
                     if its driver can count, switch that on (echo 1 > {}/queue/iostats)",
                    self.name,
                    self.sys.display()
                ),
            ));
        }
        let open = |folder: &PathBuf| {
            Ok(Statistics {
                stat: File::open(folder.join("stat"))?,
                in_flight: File::open(folder.join("inflight"))?,
            })
        };
        self.counting().iter().map(open).collect()
    }

    /// Refuses disks whose content can change without a bio that says where: DAX, where memory is
    /// mapped, and zoned disks, whose zones are reset by commands without a range.
    fn refuse_writes_without_bios(&self) -> io::Result<()> {
        let queue = |file: &str| text(&self.sys.join("queue").join(file)).unwrap_or_default();
        let Some(why) = writes_without_bios(&queue("dax"), &queue("zoned")) else {
            return Ok(());
        };
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("{} {why}, so its changes cannot be tracked", self.name),
        ))
    }

    /// Whether a device-mapper disk is suspended: bios wait there uncounted.
    pub fn suspended(&self) -> bool {
        text(&self.sys.join("dm/suspended")).is_ok_and(|s| s == "1")
    }

    /// Whether the device counts its IO, and all of its paths are still there.
    pub fn keeps_statistics(&self) -> bool {
        // Some bio-based drivers count whatever the switch says, and some never do: it shows.
        if self.is_bio_based() {
            return self.counts_a_read().unwrap_or(false);
        }
        let counting = self.counting();
        counting.len() >= self.hidden_paths.len().max(1)
            && counting
                .iter()
                .all(|folder| text(&folder.join("queue/iostats")).is_ok_and(|s| s == "1"))
    }

    /// Reads one block and tells whether the device counted it.
    fn counts_a_read(&self) -> io::Result<bool> {
        const BLOCK: usize = 4096;
        let reads = || {
            let stat = text(&self.sys.join("stat"))?;
            let first = stat.split_whitespace().next().unwrap_or_default();
            first
                .parse::<u64>()
                .map_err(|_| io::ErrorKind::InvalidData.into())
        };
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(Path::new("/dev").join(&self.name))?;
        let mut memory = vec![0; 2 * BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK);
        let block = memory
            .get_mut(start..start + BLOCK)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let before: io::Result<u64> = reads();
        // A suspended node turns it away instead of holding us up.
        let mut into = [io::IoSliceMut::new(block)];
        let nowait = rustix::io::ReadWriteFlags::NOWAIT;
        match rustix::io::preadv2(&file, &mut into, 0, nowait) {
            Err(rustix::io::Errno::OPNOTSUPP) => {
                rustix::io::preadv(&file, &mut into, 0)?;
            }
            done => {
                done?;
            }
        }
        Ok(reads()? != before?)
    }

    /// Disks and partitions stacked on this one.
    pub fn holders(&self) -> Vec<String> {
        names_in(&self.sys.join("holders"))
    }

    /// Disks below this one (device-mapper, md).
    pub fn members(&self) -> Vec<String> {
        names_in(&self.sys.join("slaves"))
    }

    /// The whole disks at the bottom of the stack, by kernel name: this one where nothing is below it. A
    /// loop device counts as a disk of its own.
    pub fn bottom(&self) -> Vec<String> {
        let mut bottom = BTreeSet::new();
        add_bottom(&self.sys, &self.name, &mut bottom);
        bottom.into_iter().collect()
    }
}

fn add_bottom(sys: &Path, name: &str, bottom: &mut BTreeSet<String>) {
    let mut below = false;
    for member in names_in(&sys.join("slaves")) {
        let Ok(folder) = sys.join("slaves").join(&member).canonicalize() else {
            continue;
        };
        below = true;
        // A partition stands for its disk.
        let partition = folder.join("partition").exists();
        match folder.parent().filter(|_| partition) {
            Some(disk) => {
                let name = disk.file_name().map(|n| n.to_string_lossy().into_owned());
                add_bottom(disk, &name.unwrap_or(member), bottom);
            }
            None => add_bottom(&folder, &member, bottom),
        }
    }
    if !below {
        bottom.insert(name.to_owned());
    }
}

/// What a device says of itself, its files kept open.
#[derive(Debug)]
pub(super) struct Statistics {
    stat: File,
    in_flight: File,
}

impl Statistics {
    /// Field `index` of a file, of fields of numbers.
    fn fields<const N: usize>(file: &File, wanted: [usize; N]) -> io::Result<[u64; N]> {
        let mut buffer = [0; 512];
        let len = file.read_at(&mut buffer, 0)?;
        let text = std::str::from_utf8(buffer.get(..len).unwrap_or_default())
            .map_err(|_| io::ErrorKind::InvalidData)?;
        let fields: Vec<&str> = text.split_whitespace().collect();
        let mut found = [0; N];
        for (found, index) in found.iter_mut().zip(wanted) {
            let field = fields.get(index).and_then(|field| field.parse().ok());
            *found = field.ok_or(io::ErrorKind::InvalidData)?;
        }
        Ok(found)
    }

    /// Sectors written and discarded (Documentation/block/stat.rst: fields 7 and 14).
    pub(super) fn sectors_changed(&self) -> io::Result<u64> {
        let [written, discarded] = Self::fields(&self.stat, [6, 13])?;
        Ok(written.wrapping_add(discarded))
    }

    /// Writes, discards included, that are in flight.
    pub(super) fn writes_in_flight(&self) -> io::Result<u64> {
        Self::fields(&self.in_flight, [1]).map(|[writes]| writes)
    }
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// A digest of which blocks stand behind the disk in `sys`: its device-mapper table, the tables
/// below it, and the disks at the bottom. Moving from table to table and back leaves it as it was,
/// and rightly so: what was written in between was marked.
fn mapping(sys: &Path) -> io::Result<u64> {
    if !sys.join("dm").exists() {
        return Ok(0);
    }
    let mut hash = blake3::Hasher::new();
    add_mapping(sys, &mut hash)?;
    let digest = hash.finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest.as_bytes()[..8]);
    Ok(u64::from_le_bytes(first))
}

fn add_mapping(sys: &Path, hash: &mut blake3::Hasher) -> io::Result<()> {
    let dev = text(&sys.join("dev"))?;
    let numbers = dev
        .split_once(':')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let (major, minor) = numbers.ok_or(io::ErrorKind::InvalidData)?;
    let table = dm::table(major, minor)
        .map_err(|e| io::Error::new(e.kind(), format!("device-mapper table of {dev}: {e}")))?;
    for target in &table {
        hash.update(&target.start.to_le_bytes());
        hash.update(&target.sectors.to_le_bytes());
        hash.update(target.kind.as_bytes());
        if target.maps_by_parameters() {
            hash.update(&target.parameters);
        }
    }
    if !table.iter().all(dm::Target::maps_members) {
        return Ok(());
    }
    for member in names_in(&sys.join("slaves")) {
        let member = sys.join("slaves").join(member).canonicalize()?;
        if member.join("dm").exists() {
            add_mapping(&member, hash)?;
        } else {
            // A partition has none of its own.
            let of = |folder: &Path| number(&folder.join("diskseq"));
            let diskseq = of(&member).or_else(|e| member.parent().map_or(Err(e), of))?;
            hash.update(&diskseq.to_le_bytes());
        }
    }
    Ok(())
}

/// `nvmeXcYnZ` disks are hidden paths of `nvmeXnZ` when native multipath is on: their `diskseq` and
/// folders, without doublets.
fn hidden_paths(sys: &Path, name: &str) -> Vec<(u64, PathBuf)> {
    let Some((subsystem, namespace)) = name
        .strip_prefix("nvme")
        .and_then(|rest| rest.split_once('n'))
    else {
        return Vec::new();
    };
    let Some(parent) = sys.parent() else {
        return Vec::new();
    };
    let mut folders = vec![parent.to_path_buf(), sys.join("multipath")];
    folders.extend(
        sys.canonicalize()
            .ok()
            .and_then(|p| p.parent().map(Path::to_path_buf)),
    );
    let mut found: Vec<(u64, PathBuf)> = folders
        .iter()
        .flat_map(|folder| {
            names_in(folder)
                .into_iter()
                .map(|path| (folder.clone(), path))
        })
        .filter(|(_, path)| {
            path.strip_prefix("nvme")
                .and_then(|rest| rest.strip_prefix(subsystem))
                .and_then(|rest| rest.strip_prefix('c'))
                .and_then(|rest| rest.split_once('n'))
                .is_some_and(|(controller, ns)| {
                    ns == namespace && controller.bytes().all(|b| b.is_ascii_digit())
                })
        })
        .filter_map(|(folder, path)| {
            let folder = folder.join(path);
            Some((number(&folder.join("diskseq")).ok()?, folder))
        })
        .collect();
    found.sort_unstable();
    found.dedup_by_key(|(diskseq, _)| *diskseq);
    found
}

/// All disks of the host, in the order of their names.
pub fn all_disks() -> Vec<Disk> {
    names_in(Path::new("/sys/block"))
        .iter()
        .filter_map(|name| Disk::of_name(&name.replace('!', "/")).ok())
        .collect()
}

/// Finds the volume that `path` names: a block device, a link to one, or a mount point.
pub fn resolve(path: &Path) -> Result<Volume, TrackerError> {
    let refuse = |reason: String| TrackerError::NoVolume {
        path: path.display().to_string(),
        reason,
    };
    let real = path.canonicalize().map_err(|e| refuse(e.to_string()))?;
    let meta = std::fs::metadata(&real).map_err(|e| refuse(e.to_string()))?;
    if meta.is_dir() {
        let device = device_of_mount(&real).ok_or_else(|| {
            refuse("it is neither a block device nor the mount point of one".into())
        })?;
        return resolve(&device);
    }
    if !meta.file_type().is_block_device() {
        return Err(refuse(
            "it is not a block device; attach an image file with losetup first".into(),
        ));
    }
    of_rdev(&real, meta.rdev()).map_err(|e| refuse(e.to_string()))
}

fn of_rdev(path: &Path, rdev: u64) -> io::Result<Volume> {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let sys = Path::new("/sys/dev/block")
        .join(format!("{major}:{minor}"))
        .canonicalize()?;
    let name = sys
        .file_name()
        .map(|n| n.to_string_lossy().replace('!', "/"))
        .unwrap_or_default();
    let partition = sys.join("partition").exists();
    let disk_name = if partition {
        sys.parent()
            .and_then(Path::file_name)
            .map(|n| n.to_string_lossy().replace('!', "/"))
            .ok_or(io::ErrorKind::NotFound)?
    } else {
        name.clone()
    };
    let disk = Disk::of_name(&disk_name)?;
    let sectors = number(&sys.join("size"))?;
    if sectors == 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the device has no medium (size 0)",
        ));
    }
    let start = if partition {
        number(&sys.join("start"))?
    } else {
        0
    };
    disk.refuse_writes_without_bios()?;
    Ok(Volume {
        device_id: device_id(&disk, &sys, partition),
        path: path.into(),
        start,
        end: start + sectors,
        disk,
        name,
        rdev,
    })
}

fn device_id(disk: &Disk, sys: &Path, partition: bool) -> String {
    let of = |file: &str| text(&disk.sys.join(file)).ok().filter(|s| !s.is_empty());
    let base = of("dm/uuid")
        .map(|id| format!("dm:{id}"))
        .or_else(|| of("wwid").map(|id| format!("wwid:{id}")))
        .or_else(|| of("device/wwid").map(|id| format!("wwid:{id}")))
        .or_else(|| of("serial").map(|id| format!("serial:{id}")))
        .or_else(|| of("device/serial").map(|id| format!("serial:{id}")))
        .or_else(|| of("loop/backing_file").map(|file| format!("loop:{file}")))
        .unwrap_or_else(|| format!("diskseq:{}", disk.diskseq));
    match (partition, text(&sys.join("partition"))) {
        (true, Ok(number)) => format!("{base}:part{number}"),
        _ => base,
    }
}

/// Why changes of a disk can go without a bio that says where, by its `queue/dax` and `queue/zoned`.
fn writes_without_bios(dax: &str, zoned: &str) -> Option<&'static str> {
    if dax == "1" {
        Some("offers DAX: programs may write to it past the block layer")
    } else if !matches!(zoned, "" | "none") {
        Some("is zoned: resets of zones do not say what they change")
    } else {
        None
    }
}

/// What kind of disk a kernel name stands for.
pub fn kind(name: &str) -> &'static str {
    match name.trim_end_matches(|c: char| c.is_ascii_digit()) {
        "loop" => "loop",
        "zram" => "zram",
        "dm-" => "device-mapper",
        "md" => "md",
        "nbd" => "nbd",
        "ublkb" => "ublk",
        "ram" => "ram",
        _ if name.starts_with("nvme") => "nvme",
        _ if name.starts_with("sd") => "scsi",
        _ if name.starts_with("vd") => "virtio",
        _ => "disk",
    }
}

/// One line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Device number of the filesystem.
    pub dev: u64,
    /// Where it is mounted.
    pub point: PathBuf,
    /// Filesystem type.
    pub fs_type: String,
    /// What was mounted.
    pub source: String,
}

/// Parses mountinfo; lines that do not parse are left out.
pub fn parse_mountinfo(text: &str) -> Vec<Mount> {
    text.lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let fields: Vec<&str> = left.split(' ').collect();
            let (major, minor) = fields.get(2)?.split_once(':')?;
            let mut right = right.split(' ');
            Some(Mount {
                dev: rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?),
                point: PathBuf::from(unescape(fields.get(4)?)),
                fs_type: right.next()?.to_string(),
                source: unescape(right.next()?),
            })
        })
        .collect()
}

/// Octal escapes of spaces, tabs, newlines and backslashes.
fn unescape(field: &str) -> String {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes
            .get(at + 1..at + 4)
            .filter(|d| bytes[at] == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)))
            .map(|d| d.iter().fold(0u32, |n, b| n * 8 + u32::from(b - b'0')));
        match octal {
            Some(byte) if byte < 256 => {
                out.push(byte as u8);
                at += 4;
            }
            _ => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// All mounts this process sees.
pub fn mounts() -> Vec<Mount> {
    std::fs::read_to_string("/proc/self/mountinfo")
        .map(|t| parse_mountinfo(&t))
        .unwrap_or_default()
}

fn device_of_mount(point: &Path) -> Option<PathBuf> {
    let source = mounts()
        .into_iter()
        .rev()
        .find(|m| m.point == point)?
        .source;
    Some(PathBuf::from(source)).filter(|p| p.starts_with("/dev"))
}

/// Mount points of the filesystems on `volume`; several for btrfs subvolumes and bind mounts.
/// btrfs reports an anonymous device number, so the source counts as well.
pub fn mount_points(volume: &Volume) -> Vec<Mount> {
    mounts()
        .into_iter()
        .filter(|m| {
            m.dev == volume.rdev
                || std::fs::metadata(&m.source).is_ok_and(|meta| {
                    meta.file_type().is_block_device() && meta.rdev() == volume.rdev
                })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_that_can_change_without_a_bio_are_told_apart() {
        assert_eq!(writes_without_bios("0", "none"), None);
        assert_eq!(writes_without_bios("", ""), None);
        assert!(writes_without_bios("1", "none").is_some_and(|why| why.contains("DAX")));
        for zoned in ["host-managed", "host-aware"] {
            assert!(writes_without_bios("0", zoned).is_some_and(|why| why.contains("zone")));
        }
    }

    #[test]
    fn mountinfo_lines_parse_with_escapes_and_optional_fields() {
        let text = "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:2 - ext3 /dev/root rw\nrubbish\n";
        let mounts = parse_mountinfo(text);
        assert_eq!(mounts.len(), 1);
        assert_eq!(mounts[0].point, PathBuf::from("/mnt 2"));
        assert_eq!(mounts[0].dev, rustix::fs::makedev(98, 0));
        assert_eq!(mounts[0].fs_type, "ext3");
    }

    #[test]
    fn a_file_is_not_a_volume_and_the_message_says_what_to_do() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = resolve(file.path()).unwrap_err().to_string();
        assert!(error.contains("losetup"), "{error}");
    }
}
