//! Whether somebody uses a block device. The kernel is asked in several ways, because no single one
//! sees everything and the messages are to say who it is; opening with `O_EXCL` has the last word.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Who uses a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeldBy {
    /// It is mounted.
    Mounted {
        /// The device itself or a partition of it.
        device: String,
        /// Where.
        at: String,
    },
    /// It is swap space.
    Swap {
        /// The device itself or a partition of it.
        device: String,
    },
    /// Another block device is made of it.
    Holder {
        /// The device itself or a partition of it.
        device: String,
        /// The one made of it.
        holder: String,
    },
    /// The file is behind a loop device that is in use.
    Loop {
        /// The loop device.
        device: String,
    },
    /// Opening it exclusively failed.
    Exclusive,
}

impl fmt::Display for HeldBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { device, at } => write!(f, "{device} is mounted at {at}"),
            Self::Swap { device } => write!(f, "{device} is in use as swap space"),
            Self::Holder { device, holder } => write!(f, "{device} is part of {holder}"),
            Self::Loop { device } => write!(f, "it is the file behind {device}"),
            Self::Exclusive => f.write_str("another program or the kernel has it open exclusively"),
        }
    }
}

/// Major and minor number of a block device.
pub(crate) type DeviceNumber = (u32, u32);

/// Who uses the block device `number` or a partition of it; `None` when nobody is known to.
pub fn device_in_use(number: (u32, u32)) -> io::Result<Option<HeldBy>> {
    let devices = device_and_partitions(number)?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default(); // absent without swap support
    for device in &devices {
        if let Some(at) = mounted_at(&mounts, device.number, &device.name) {
            return Ok(Some(HeldBy::Mounted {
                device: device.name.clone(),
                at,
            }));
        }
        let is_swap = swap_paths(&swaps).iter().any(|path| {
            block_number(Path::new(path)).is_ok_and(|number| number == Some(device.number))
        });
        if is_swap {
            return Ok(Some(HeldBy::Swap {
                device: device.name.clone(),
            }));
        }
        if let Some(holder) = first_name(&device.sysfs.join("holders"))? {
            return Ok(Some(HeldBy::Holder {
                device: device.name.clone(),
                holder,
            }));
        }
    }
    Ok(None)
}

/// The loop device whose backing file is the file with this device and inode number.
pub(crate) fn loop_over(file_device: u64, inode: u64) -> io::Result<Option<String>> {
    use std::os::unix::fs::MetadataExt;
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        let Ok(backing) = fs::read_to_string(entry.path().join("loop/backing_file")) else {
            continue;
        };
        // The name may be stale; only the same device and inode is the same file.
        let same = fs::metadata(backing.trim_end_matches('\n'))
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == (file_device, inode));
        if same {
            return Ok(Some(format!(
                "/dev/{}",
                entry.file_name().to_string_lossy()
            )));
        }
    }
    Ok(None)
}

struct Device {
    name: String,
    number: DeviceNumber,
    sysfs: PathBuf,
}

fn device_and_partitions(number: DeviceNumber) -> io::Result<Vec<Device>> {
    let sysfs = fs::canonicalize(format!("/sys/dev/block/{}:{}", number.0, number.1))?;
    let mut devices = vec![Device {
        name: device_name(&sysfs),
        number,
        sysfs: sysfs.clone(),
    }];
    for entry in fs::read_dir(&sysfs)? {
        let path = entry?.path();
        if path.join("partition").exists()
            && let Some(number) = fs::read_to_string(path.join("dev"))
                .ok()
                .and_then(|text| parse_number(text.trim()))
        {
            devices.push(Device {
                name: device_name(&path),
                number,
                sysfs: path,
            });
        }
    }
    Ok(devices)
}

fn device_name(sysfs: &Path) -> String {
    format!(
        "/dev/{}",
        sysfs
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .replace('!', "/")
    )
}

fn first_name(folder: &Path) -> io::Result<Option<String>> {
    match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
        Ok(mut entries) => Ok(entries
            .next()
            .transpose()?
            .map(|entry| format!("/dev/{}", entry.file_name().to_string_lossy()))),
    }
}

/// The number of the block device at `path`; `None` when it is something else.
pub(crate) fn block_number(path: &Path) -> io::Result<Option<DeviceNumber>> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let meta = fs::metadata(path)?;
    let number = (
        rustix::fs::major(meta.rdev()),
        rustix::fs::minor(meta.rdev()),
    );
    Ok(meta.file_type().is_block_device().then_some(number))
}

fn parse_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Where `mountinfo` says that the device is mounted. File systems on several devices show a number
/// of their own there, so that the source is compared too.
fn mounted_at(mountinfo: &str, number: DeviceNumber, name: &str) -> Option<String> {
    mountinfo.lines().find_map(|line| {
        let (fixed, rest) = line.split_once(" - ")?;
        let mut fields = fixed.split(' ').skip(2);
        let mounted = parse_number(fields.next()?)?;
        let at = fields.nth(1)?;
        let source = rest.split(' ').nth(1)?;
        let same_source = || {
            let source = unescape(source);
            source == name
                || block_number(Path::new(&source)).is_ok_and(|source| source == Some(number))
        };
        (mounted == number || source.starts_with('/') && same_source()).then(|| unescape(at))
    })
}

/// The paths in `/proc/swaps`.
fn swap_paths(swaps: &str) -> Vec<String> {
    swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split([' ', '\t']).next())
        .map(unescape)
        .collect()
}

/// Undoes the octal escapes with which the kernel writes blanks in names.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal.filter(|_| first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 27 0:20 / /proc rw,relatime shared:12 - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
31 27 7:3 /sub /mnt/with\\040blank rw - ext4 /dev/loop3 rw
40 27 0:45 / /mnt/btrfs rw,relatime shared:90 - btrfs /dev/nowhere9 rw
rubbish
41 27";

    #[test]
    fn mounts_are_found_by_number_and_by_source() {
        assert_eq!(
            mounted_at(MOUNTINFO, (7, 3), "/dev/loop3"),
            Some("/mnt/with blank".into())
        );
        assert_eq!(
            mounted_at(MOUNTINFO, (259, 1), "/dev/nowhere9"),
            Some("/mnt/btrfs".into())
        );
        assert_eq!(mounted_at(MOUNTINFO, (7, 4), "/dev/loop4"), None);
        assert_eq!(mounted_at("", (7, 4), "/dev/loop4"), None);
    }

    #[test]
    fn swaps_are_listed_by_path() {
        let swaps = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/dev/sdb2    partition\t1\t0\t-2\n/swap\\040file file\t1\t0\t-3\n";
        assert_eq!(swap_paths(swaps), ["/dev/sdb2", "/swap file"]);
        assert!(swap_paths("").is_empty());
    }

    #[test]
    fn the_root_file_systems_device_is_in_use() {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let numbers = mounts
            .lines()
            .filter_map(|line| parse_number(line.split(' ').nth(2)?));
        for number in numbers.filter(|(major, _)| *major != 0) {
            let held = device_in_use(number).unwrap();
            assert!(
                matches!(held, Some(HeldBy::Mounted { .. })),
                "{number:?} {held:?}"
            );
        }
    }
}
