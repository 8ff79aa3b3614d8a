//! Devices that only a guest has: device-mapper nodes, null_blk, md, scsi_debug, NVMe controllers.
//! Everything is removed on drop, also when the test panics.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::device::run;
use crate::kernel::{set_sysfs, sysfs, sysfs_of, wait_for};

/// The device that the guest's first script named, such as `SOE_VM_NVME`.
pub fn named(variable: &str) -> PathBuf {
    let value = std::env::var_os(variable)
        .unwrap_or_else(|| panic!("{variable} is not set: this test runs in a guest only"));
    PathBuf::from(value)
}

/// Loads a kernel module.
pub fn modprobe(arguments: &[&str]) {
    run("modprobe", arguments).expect("a module of the guest");
}

/// A device-mapper node.
pub struct Mapper {
    /// Its node.
    pub path: PathBuf,
    name: String,
}

impl Mapper {
    /// Makes a node from a table (dmsetup(8)).
    pub fn new(name: &str, table: &str) -> io::Result<Self> {
        let name = format!("soe-test-{name}");
        run("dmsetup", &["create", &name, "--table", table])?;
        Ok(Self {
            path: Path::new("/dev/mapper").join(&name),
            name,
        })
    }

    /// Suspends it; IO waits from now on. It is resumed when the value is dropped: a thread that
    /// waits on it could not be joined otherwise.
    pub fn suspend(&self) -> Suspended<'_> {
        let suspended = Suspended(self);
        run("dmsetup", &["suspend", "--nolockfs", &self.name]).expect("dmsetup suspend");
        suspended
    }

    /// Puts another table in place of the present one.
    pub fn reload(&self, table: &str) {
        run("dmsetup", &["reload", &self.name, "--table", table]).expect("dmsetup reload");
        drop(self.suspend());
    }
}

/// A suspended node.
pub struct Suspended<'a>(&'a Mapper);

impl Drop for Suspended<'_> {
    fn drop(&mut self) {
        let resumed = run("dmsetup", &["resume", &self.0.name]);
        if !std::thread::panicking() {
            resumed.expect("dmsetup resume");
        }
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        // Whoever waits on a suspended node would wait for ever.
        let _ = run("dmsetup", &["resume", &self.name]);
        for _ in 0..50 {
            if run("dmsetup", &["remove", &self.name]).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let _ = run("dmsetup", &["remove", "--force", &self.name]);
    }
}

/// A disk of the null_blk driver, made through configfs, that remembers what is written.
pub struct NullBlk {
    /// Its node.
    pub path: PathBuf,
    folder: PathBuf,
}

impl NullBlk {
    /// A disk of `mib` MiB with `attributes` (Documentation/block/null_blk.rst).
    pub fn new(name: &str, mib: u32, attributes: &[(&str, &str)]) -> Self {
        modprobe(&["null_blk", "nr_devices=0"]);
        let folder = Path::new("/sys/kernel/config/nullb").join(format!("soe-test-{name}"));
        fs::create_dir(&folder).expect("configfs");
        let mut disk = Self {
            path: PathBuf::new(),
            folder,
        };
        disk.set("size", &mib.to_string());
        disk.set("memory_backed", "1");
        for (attribute, value) in attributes {
            disk.set(attribute, value);
        }
        disk.set("power", "1");
        // Newer kernels name the disk as its folder is named.
        let named = PathBuf::from(format!("/dev/soe-test-{name}"));
        let numbered = PathBuf::from(format!("/dev/nullb{}", sysfs(disk.folder.join("index"))));
        disk.path = wait_for("no node of null_blk", || {
            [&named, &numbered]
                .into_iter()
                .find(|n| n.exists())
                .cloned()
        });
        disk
    }

    /// Sets an attribute, such as `badblocks`.
    pub fn set(&self, attribute: &str, value: &str) {
        set_sysfs(self.folder.join(attribute), value);
    }

    /// An attribute as it is.
    pub fn get(&self, attribute: &str) -> String {
        sysfs(self.folder.join(attribute))
    }
}

impl Drop for NullBlk {
    fn drop(&mut self) {
        let _ = fs::write(self.folder.join("power"), "0");
        let _ = fs::remove_dir(&self.folder);
    }
}

/// An md array without metadata, made through sysfs: no mdadm is needed.
pub struct Md {
    /// Its node.
    pub path: PathBuf,
    folder: PathBuf,
}

impl Md {
    /// An array of `level` over `members`, which are of one size.
    pub fn new(name: &str, level: &str, members: &[&Path]) -> Self {
        modprobe(&[level]);
        let name = format!("md_soe{name}");
        set_sysfs("/sys/module/md_mod/parameters/new_array", &name);
        let array = Self {
            path: Path::new("/dev").join(&name),
            folder: Path::new("/sys/block").join(&name).join("md"),
        };
        let set = |attribute: &str, value: &str| set_sysfs(array.folder.join(attribute), value);
        set("metadata_version", "none");
        set("level", level);
        set("raid_disks", &members.len().to_string());
        if level == "raid0" {
            set("chunk_size", "65536");
        }
        let sectors = sysfs(sysfs_of(members[0]).join("size"));
        let kib = sectors.parse::<u64>().expect("a size") / 2;
        set("component_size", &kib.to_string());
        for (slot, member) in members.iter().enumerate() {
            let member = sysfs_of(member);
            let name = member.file_name().expect("a name").to_string_lossy();
            set("new_dev", &sysfs(member.join("dev")));
            let device = array.folder.join(format!("dev-{name}"));
            set_sysfs(device.join("slot"), &slot.to_string());
            set_sysfs(device.join("size"), &kib.to_string());
        }
        if level == "raid1" {
            // The members are blank and equal.
            set("resync_start", "none");
        }
        set("array_state", "active");
        let node = array.path.clone();
        wait_for("no node of the array", || node.exists().then_some(()));
        // With the first opening it becomes another disk by `diskseq`, as after any change of medium.
        fs::File::open(&node).expect("the array");
        array
    }
}

impl Drop for Md {
    fn drop(&mut self) {
        let _ = fs::write(self.folder.join("array_state"), "clear");
    }
}

/// A disk of the scsi_debug driver.
pub struct ScsiDebug {
    /// Its node.
    pub path: PathBuf,
}

impl ScsiDebug {
    /// A disk of `mib` MiB with module parameters.
    pub fn new(mib: u32, parameters: &[&str]) -> Self {
        let before = scsi_disks();
        modprobe(&["sd_mod"]);
        let size = format!("dev_size_mb={mib}");
        let mut arguments = vec!["scsi_debug", &size];
        arguments.extend(parameters);
        modprobe(&arguments);
        let path = wait_for("no disk of scsi_debug", || {
            scsi_disks().into_iter().find(|d| !before.contains(d))
        });
        Self { path }
    }
}

fn scsi_disks() -> Vec<PathBuf> {
    fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("sd"))
        .map(|name| Path::new("/dev").join(name))
        .filter(|node| node.exists())
        .collect()
}

impl Drop for ScsiDebug {
    fn drop(&mut self) {
        for _ in 0..50 {
            if run("modprobe", &["-r", "scsi_debug"]).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}

/// A control group whose writes to one disk are throttled, of either version of the hierarchy.
pub struct Throttle {
    folder: PathBuf,
    attribute: &'static str,
    device: String,
    key: &'static str,
    home: PathBuf,
}

/// This process's group in the hierarchy that is mounted at `mount` with `controller`.
fn home(mount: &Path, controller: &str) -> PathBuf {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = groups.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        controllers
            .split(',')
            .any(|one| one == controller)
            .then_some(path)
    });
    mount.join(path.unwrap_or("/").trim_start_matches('/'))
}

impl Throttle {
    /// A group of this process's own, which it is not in yet.
    pub fn new(name: &str, node: &Path) -> io::Result<Self> {
        let name = format!("soe-test-{}-{name}", std::process::id());
        let device = sysfs(sysfs_of(node).join("dev"));
        let first = Path::new("/sys/fs/cgroup/blkio");
        let throttle = if first.join("blkio.throttle.write_bps_device").exists() {
            Self {
                folder: first.join(name),
                attribute: "blkio.throttle.write_bps_device",
                device,
                key: "",
                home: home(first, "blkio"),
            }
        } else {
            let root = Path::new("/sys/fs/cgroup");
            fs::write(root.join("cgroup.subtree_control"), "+io")?;
            Self {
                folder: root.join(name),
                attribute: "io.max",
                device,
                key: "wbps=",
                home: home(root, ""),
            }
        };
        fs::create_dir(&throttle.folder)?;
        Ok(throttle)
    }

    /// Bytes per second that members may write; `None` for as many as they like.
    pub fn set(&self, rate: Option<u64>) {
        let rate = match (rate, self.key) {
            (Some(rate), _) => rate.to_string(),
            (None, "") => "0".into(),
            (None, _) => "max".into(),
        };
        let rule = format!("{} {}{rate}", self.device, self.key);
        set_sysfs(self.folder.join(self.attribute), &rule);
    }

    /// Holds all writes of members back until the value is dropped, also by a panic: threads that
    /// wait could not be joined otherwise.
    pub fn hold(&self) -> Held<'_> {
        // The least that either hierarchy takes.
        self.set(Some(2));
        Held(self)
    }

    /// Moves this process into the group, runs `body`, and moves it back.
    pub fn within<T>(&self, body: impl FnOnce() -> T) -> T {
        struct Back<'a>(&'a Throttle);
        impl Drop for Back<'_> {
            fn drop(&mut self) {
                let procs = self.0.home.join("cgroup.procs");
                let _ = fs::write(procs, std::process::id().to_string());
            }
        }
        set_sysfs(
            self.folder.join("cgroup.procs"),
            &std::process::id().to_string(),
        );
        let _back = Back(self);
        body()
    }
}

/// Writes that are held back.
pub struct Held<'a>(&'a Throttle);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.set(None);
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // What is still held may go.
        self.set(None);
        for _ in 0..50 {
            if fs::remove_dir(&self.folder).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}
