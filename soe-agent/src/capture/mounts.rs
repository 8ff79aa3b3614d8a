//! Which filesystems have to be frozen for a cut through given devices, in which order, and whether
//! that is safe. Pure over the mount table and a device tree, so that tests bring their own.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::freezer::FreezeError;

/// A device number, major and minor.
pub type DeviceNumber = (u32, u32);

/// A filesystem to be frozen.
#[derive(Debug)]
pub struct Superblock {
    /// One of its mount points.
    pub mount: PathBuf,
    /// That mount point, open.
    pub folder: File,
    /// Filesystems of smaller depth are frozen first: a filesystem in a file on this one is above it.
    pub depth: u8,
    /// Numbers of the group's volumes it lies on.
    pub volumes: Vec<usize>,
}

/// A path the agent itself writes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProtectedPath {
    /// The path; it need not exist yet.
    pub path: PathBuf,
    /// What the agent keeps there.
    pub role: String,
}

/// A line of the mount table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    /// The superblock's number: the device's, or an anonymous one (btrfs, overlay).
    superblock: DeviceNumber,
    point: PathBuf,
    fs: String,
    source: PathBuf,
}

/// Where the kernel's tables are.
#[derive(Clone, Debug)]
pub struct Mounts {
    mountinfo: PathBuf,
    sys: PathBuf,
}

impl Default for Mounts {
    fn default() -> Self {
        Self {
            mountinfo: "/proc/self/mountinfo".into(),
            sys: "/sys".into(),
        }
    }
}

/// A filesystem found, before it is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    mounts: Vec<Mount>,
    depth: u8,
    volumes: BTreeSet<usize>,
}

impl Mounts {
    /// The filesystems on `volumes` (device numbers, in the order of the group), opened.
    ///
    /// Filesystems on partitions of a volume, on mappings over it and in loop files on it are among
    /// them. It is refused when one of `protected` lies on any of them, because the agent would then
    /// wait for itself, and when a filesystem has devices outside the group, because freezing it
    /// would not make the image complete.
    pub fn superblocks(
        &self,
        volumes: &[DeviceNumber],
        protected: &[ProtectedPath],
    ) -> Result<Vec<Superblock>, FreezeError> {
        let table = self.read_mounts()?;
        let found = self.find(&table, volumes)?;
        for path in protected {
            let Some(under) = mount_of(&table, &existing(&path.path)) else {
                continue;
            };
            if let Some(hit) = found.get(&under.superblock) {
                return Err(FreezeError::Protected {
                    mount: hit
                        .mounts
                        .first()
                        .map(|m| m.point.clone())
                        .unwrap_or_default(),
                    path: path.path.clone(),
                    role: path.role.clone(),
                });
            }
        }
        found.into_values().map(open).collect()
    }

    fn read_mounts(&self) -> Result<Vec<Mount>, FreezeError> {
        let text = std::fs::read(&self.mountinfo).map_err(|source| FreezeError::Discover {
            path: self.mountinfo.clone(),
            source,
        })?;
        Ok(text
            .split(|b| *b == b'\n')
            .filter_map(parse_mount)
            .collect())
    }

    fn find(
        &self,
        table: &[Mount],
        volumes: &[DeviceNumber],
    ) -> Result<BTreeMap<DeviceNumber, Found>, FreezeError> {
        // Every device on top of a volume, with the volumes below it.
        let mut devices: BTreeMap<DeviceNumber, BTreeSet<usize>> = BTreeMap::new();
        let mut todo = Vec::new();
        for (number, device) in volumes.iter().enumerate() {
            todo.push((*device, BTreeSet::from([number])));
        }
        let mut found: BTreeMap<DeviceNumber, Found> = BTreeMap::new();
        // Superblock above -> superblocks of the loop files its devices are made of.
        let mut below: BTreeMap<DeviceNumber, BTreeSet<DeviceNumber>> = BTreeMap::new();
        let loops = self.loops();
        while let Some((device, on)) = todo.pop() {
            let known = devices.entry(device).or_default();
            if on.is_subset(known) {
                continue;
            }
            known.extend(&on);
            let on = known.clone();
            for above in self.stacked_on(device) {
                todo.push((above, on.clone()));
            }
            for mount in table {
                if !self.devices_of(mount).contains(&device) {
                    continue;
                }
                let entry = found.entry(mount.superblock).or_insert_with(|| Found {
                    mounts: Vec::new(),
                    depth: 0,
                    volumes: BTreeSet::new(),
                });
                entry.volumes.extend(&on);
                if !entry.mounts.contains(mount) {
                    entry.mounts.push(mount.clone());
                }
                for (loop_device, file) in &loops {
                    let lies_on = mount_of(table, file).map(|m| m.superblock);
                    if lies_on == Some(mount.superblock) {
                        todo.push((*loop_device, on.clone()));
                    }
                }
            }
        }
        for (superblock, entry) in &found {
            for device in entry.mounts.iter().flat_map(|m| self.devices_of(m)) {
                if !devices.contains_key(&device) {
                    return Err(FreezeError::SpansOutside {
                        mount: entry
                            .mounts
                            .first()
                            .map(|m| m.point.clone())
                            .unwrap_or_default(),
                        device: format!("{}:{}", device.0, device.1),
                    });
                }
                for base in self.roots_of(device) {
                    let file = loops.iter().find(|(number, _)| *number == base);
                    if let Some(lower) = file.and_then(|(_, file)| mount_of(table, file)) {
                        below
                            .entry(*superblock)
                            .or_default()
                            .insert(lower.superblock);
                    }
                }
            }
        }
        // A file below a file below a file: as many rounds as there are filesystems settle it.
        for _ in 0..found.len() {
            for (upper, lowers) in &below {
                let depth = found.get(upper).map_or(0, |f| f.depth).saturating_add(1);
                for lower in lowers {
                    if let Some(lower) = found.get_mut(lower) {
                        lower.depth = lower.depth.max(depth);
                    }
                }
            }
        }
        Ok(found)
    }

    fn class(&self, device: DeviceNumber) -> PathBuf {
        self.sys
            .join(format!("dev/block/{}:{}", device.0, device.1))
    }

    /// Partitions of a device and mappings over it.
    fn stacked_on(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        let folder = self.class(device);
        let holders = names(&folder.join("holders"))
            .into_iter()
            .map(|name| folder.join("holders").join(name));
        let partitions = names(&folder)
            .into_iter()
            .map(|name| folder.join(name))
            .filter(|path| path.join("partition").exists());
        holders
            .chain(partitions)
            .filter_map(|path| number_in(&path.join("dev")))
            .collect()
    }

    /// The devices at the bottom of `device`: itself, its disk, what a mapping is made of.
    fn roots_of(&self, device: DeviceNumber) -> BTreeSet<DeviceNumber> {
        let mut roots = BTreeSet::new();
        let mut todo = vec![device];
        while let Some(device) = todo.pop() {
            if !roots.insert(device) {
                continue;
            }
            let folder = self.class(device);
            if folder.join("partition").exists()
                && let Ok(real) = folder.canonicalize()
                && let Some(disk) = real.parent()
            {
                todo.extend(number_in(&disk.join("dev")));
            }
            let slaves = folder.join("slaves");
            todo.extend(
                names(&slaves)
                    .into_iter()
                    .filter_map(|name| number_in(&slaves.join(name).join("dev"))),
            );
        }
        roots
    }

    /// The loop devices that have a file, and the file.
    fn loops(&self) -> Vec<(DeviceNumber, PathBuf)> {
        let block = self.sys.join("block");
        names(&block)
            .into_iter()
            .filter_map(|name| {
                let folder = block.join(name);
                let mut file = std::fs::read(folder.join("loop/backing_file")).ok()?;
                while file.last() == Some(&b'\n') {
                    file.pop();
                }
                let number = number_in(&folder.join("dev"))?;
                Some((number, PathBuf::from(OsString::from_vec(file))))
            })
            .collect()
    }

    /// The devices a mounted filesystem lies on: several for btrfs.
    fn devices_of(&self, mount: &Mount) -> Vec<DeviceNumber> {
        if mount.fs != "btrfs" {
            return vec![mount.superblock];
        }
        let source = mount.source.canonicalize().unwrap_or(mount.source.clone());
        let Some(name) = source.file_name() else {
            return Vec::new();
        };
        let all = self.sys.join("fs/btrfs");
        for id in names(&all) {
            let folder = all.join(id).join("devices");
            let members = names(&folder);
            if members.iter().any(|member| member == name) {
                return members
                    .iter()
                    .filter_map(|member| number_in(&folder.join(member).join("dev")))
                    .collect();
            }
        }
        Vec::new()
    }
}

fn open(found: Found) -> Result<Superblock, FreezeError> {
    let mut last = std::io::Error::from(std::io::ErrorKind::NotFound);
    for mount in &found.mounts {
        let opened = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(&mount.point)
            .and_then(|folder| Ok((folder.metadata()?.dev(), folder)));
        match opened {
            // Another filesystem mounted over the same place must not be frozen in its stead.
            Ok((dev, folder)) if mount.fs == "btrfs" || split(dev) == mount.superblock => {
                return Ok(Superblock {
                    mount: mount.point.clone(),
                    folder,
                    depth: found.depth,
                    volumes: found.volumes.into_iter().collect(),
                });
            }
            Ok(_) => last = std::io::Error::other("another filesystem is mounted over it"),
            Err(error) => last = error,
        }
    }
    Err(FreezeError::Freeze {
        mount: found
            .mounts
            .first()
            .map(|m| m.point.clone())
            .unwrap_or_default(),
        source: last,
    })
}

/// The parts of a `dev_t`.
pub fn split(dev: u64) -> DeviceNumber {
    (libc::major(dev), libc::minor(dev))
}

fn names(folder: &Path) -> Vec<OsString> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut names: Vec<OsString> = entries.flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    names
}

fn number_in(path: &Path) -> Option<DeviceNumber> {
    parse_number(std::fs::read_to_string(path).ok()?.trim())
}

fn parse_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A line of mountinfo: id, parent, device, root, mount point, options, optional fields, `-`, type,
/// source, options.
fn parse_mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let superblock = parse_number(std::str::from_utf8(fields.nth(2)?).ok()?)?;
    let point = unescape(fields.nth(1)?);
    let mut rest = fields.skip_while(|field| *field != b"-");
    let fs = String::from_utf8_lossy(rest.nth(1)?).into_owned();
    let source = unescape(rest.next()?);
    Some(Mount {
        superblock,
        point,
        fs,
        source,
    })
}

/// Blanks, tabs, line ends and backslashes come as a backslash and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        match rest {
            [
                b'\\',
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// The deepest part of `path` that exists, resolved.
fn existing(path: &Path) -> PathBuf {
    path.ancestors()
        .find_map(|part| part.canonicalize().ok())
        .unwrap_or_else(|| PathBuf::from("/"))
}

/// The mount `path` lies on: the longest mount point above it, the latest of equals.
fn mount_of<'a>(table: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    table
        .iter()
        .filter(|mount| path.starts_with(&mount.point))
        .max_by_key(|mount| mount.point.as_os_str().len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 7:0 / /mnt/lower rw - ext4 /dev/loop0 rw
31 22 7:1 / /mnt/with\\040blank rw master:2 - ext4 /dev/loop1 rw
32 22 0:44 / /mnt/b1 rw - btrfs /dev/loop2 rw
33 22 0:44 /sub /mnt/b2 rw - btrfs /dev/loop2 rw
34 22 8:1 / /boot rw - ext4 /dev/sda1 rw
35 22 8:2 / /home rw - xfs /dev/sda2 rw
garbage
";

    struct Host {
        folder: tempfile::TempDir,
        mounts: Mounts,
    }

    impl Host {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let root = folder.path().to_owned();
            std::fs::write(root.join("mountinfo"), TABLE).unwrap();
            let host = Self {
                mounts: Mounts {
                    mountinfo: root.join("mountinfo"),
                    sys: root.join("sys"),
                },
                folder,
            };
            for number in 0..4 {
                host.put(&format!("block/loop{number}/dev"), &format!("7:{number}\n"));
            }
            host.put("dev/block/8:0/sda1/partition", "1\n");
            host.put("dev/block/8:0/sda1/dev", "8:1\n");
            host.put("dev/block/8:0/sda2/partition", "2\n");
            host.put("dev/block/8:0/sda2/dev", "8:2\n");
            host.put("dev/block/8:0/queue/nr_requests", "2\n");
            for number in [2, 3] {
                let member = format!("fs/btrfs/some-id/devices/loop{number}/dev");
                host.put(&member, &format!("7:{number}\n"));
            }
            host
        }

        fn put(&self, path: &str, text: &str) {
            let path = self.folder.path().join("sys").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        fn find(&self, volumes: &[DeviceNumber]) -> Vec<(PathBuf, u8, Vec<usize>)> {
            let table = self.mounts.read_mounts().unwrap();
            let found = self.mounts.find(&table, volumes).unwrap();
            found
                .into_values()
                .map(|f| {
                    let volumes = f.volumes.into_iter().collect();
                    (f.mounts[0].point.clone(), f.depth, volumes)
                })
                .collect()
        }
    }

    #[test]
    fn a_disk_has_the_filesystems_of_its_partitions() {
        let host = Host::new();
        assert_eq!(
            host.find(&[(8, 0)]),
            [("/boot".into(), 0, vec![0]), ("/home".into(), 0, vec![0])]
        );
        assert_eq!(host.find(&[(8, 2)]), [("/home".into(), 0, vec![0])]);
        assert!(host.find(&[(9, 9)]).is_empty());
    }

    #[test]
    fn escaped_mount_points_are_read() {
        let host = Host::new();
        let found = host.find(&[(7, 1)]);
        assert_eq!(found, [("/mnt/with blank".into(), 0, vec![0])]);
    }

    #[test]
    fn a_filesystem_in_a_file_is_above_the_one_the_file_lies_on() {
        let host = Host::new();
        host.put("block/loop1/loop/backing_file", "/mnt/lower/image\n");
        assert_eq!(
            host.find(&[(7, 0)]),
            [
                ("/mnt/lower".into(), 1, vec![0]),
                ("/mnt/with blank".into(), 0, vec![0])
            ]
        );
    }

    #[test]
    fn a_btrfs_is_one_superblock_and_needs_all_its_devices() {
        let host = Host::new();
        assert_eq!(
            host.find(&[(7, 3), (7, 2)]),
            [("/mnt/b1".into(), 0, vec![0, 1])]
        );
        let table = host.mounts.read_mounts().unwrap();
        let error = host.mounts.find(&table, &[(7, 2)]).unwrap_err();
        assert!(matches!(error, FreezeError::SpansOutside { .. }), "{error}");
    }

    #[test]
    fn the_filesystem_of_a_protected_path_is_refused() {
        let host = Host::new();
        let root = host.folder.path();
        // The state folder does not exist yet; its nearest parent lies on a volume of the group.
        let table = format!(
            "40 22 7:0 / {} rw - ext4 /dev/loop0 rw\n",
            root.canonicalize().unwrap().display()
        );
        std::fs::write(root.join("mountinfo"), format!("{TABLE}{table}")).unwrap();
        let protected = [ProtectedPath {
            path: root.join("not/yet/there"),
            role: "state".into(),
        }];
        let error = host.mounts.superblocks(&[(7, 0)], &protected).unwrap_err();
        assert!(matches!(error, FreezeError::Protected { .. }), "{error}");
        assert!(error.to_string().contains("state"), "{error}");
    }
}
