//! A file system in memory that keeps no promise the real one does not make.
//!
//! Every file has what programs see and what would be there after a power cut; every folder has
//! names that programs see and changes that are not durable yet. A power cut keeps an arbitrary
//! part: of bytes that were never synced any prefix, possibly with holes of zeroes or rubbish in it;
//! of names that were never synced any subset of the changes. A sync that fails has dropped the
//! bytes for good, although programs still see them and a second sync succeeds, which is what Linux
//! does. Operations are counted, so that a test can let each one in turn fail or be the last.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::{AppendFile, DirEntry, ReadFile, StoreFs, StoreLock};

/// What happens at an operation chosen beforehand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It may or may not take effect, in part; everything after it fails.
    PowerCut,
    /// It fails with ENOSPC, and so does every later one that needs space.
    NoSpace,
    /// It fails with EIO; later ones work.
    IoError,
    /// Like `IoError`, but for operations that only look, which are counted apart: see
    /// [`SimFs::reads`].
    ReadError,
}

/// The simulated file system. Clones are the same one.
#[derive(Clone)]
pub struct SimFs {
    disk: Arc<Mutex<Disk>>,
}

struct Disk {
    inodes: BTreeMap<u64, Inode>,
    next_inode: u64,
    ops: u64,
    reads: u64,
    fault: Option<(u64, Fault)>,
    dead: bool,
    full: bool,
    locked: bool,
    rng: SmallRng,
}

#[derive(Clone)]
enum Inode {
    File(FileNode),
    Dir(DirNode),
}

#[derive(Clone, Default)]
struct FileNode {
    seen: Vec<u8>,
    /// How many bytes of `seen` survive a power cut for sure.
    durable: usize,
    /// Bytes from here on were dropped by a failed sync and will not become durable.
    dropped_from: Option<usize>,
}

#[derive(Clone, Default)]
struct DirNode {
    seen: BTreeMap<String, u64>,
    durable: BTreeMap<String, u64>,
    /// Changes since the last sync, oldest first; each is applied as a whole or not at all.
    pending: Vec<Vec<(String, Option<u64>)>>,
}

impl DirNode {
    fn change(&mut self, change: Vec<(String, Option<u64>)>) {
        apply(&mut self.seen, &change);
        self.pending.push(change);
    }
}

fn apply(names: &mut BTreeMap<String, u64>, change: &[(String, Option<u64>)]) {
    for (name, inode) in change {
        match inode {
            Some(inode) => names.insert(name.clone(), *inode),
            None => names.remove(name),
        };
    }
}

const ROOT: u64 = 0;

/// What an operation is to do, after its fault has been looked up.
enum Gate {
    Go,
    /// The power goes: the flag says whether the operation still reaches the disk.
    CutAfter(bool),
}

impl SimFs {
    /// An empty file system whose accidents follow from `seed`.
    pub fn new(seed: u64) -> Self {
        let inodes = BTreeMap::from([(ROOT, Inode::Dir(DirNode::default()))]);
        Self::from_inodes(inodes, 1, seed)
    }

    fn from_inodes(inodes: BTreeMap<u64, Inode>, next_inode: u64, seed: u64) -> Self {
        let rng = SmallRng::seed_from_u64(seed);
        let disk = Disk {
            inodes,
            next_inode,
            ops: 0,
            reads: 0,
            fault: None,
            dead: false,
            full: false,
            locked: false,
            rng,
        };
        Self {
            disk: Arc::new(Mutex::new(disk)),
        }
    }

    /// Operations so far that changed something or made something durable.
    pub fn ops(&self) -> u64 {
        self.disk().ops
    }

    /// Operations so far that only looked.
    pub fn reads(&self) -> u64 {
        self.disk().reads
    }

    /// Lets `fault` happen at the operation that begins when [`ops`](Self::ops) is `op`, or
    /// [`reads`](Self::reads) for [`Fault::ReadError`].
    pub fn fault_at(&self, op: u64, fault: Fault) {
        self.disk().fault = Some((op, fault));
    }

    /// Ends all faults that have not killed the disk; space is free again.
    pub fn heal(&self) {
        let mut disk = self.disk();
        disk.fault = None;
        disk.full = false;
    }

    /// Whether the power was cut.
    pub fn is_dead(&self) -> bool {
        self.disk().dead
    }

    /// A copy that shares nothing, without faults, as programs see it and with the same durability.
    pub fn fork(&self, seed: u64) -> Self {
        let disk = self.disk();
        Self::from_inodes(disk.inodes.clone(), disk.next_inode, seed)
    }

    /// What is found when the machine comes back after its power was cut now.
    pub fn after_power_cut(&self, seed: u64) -> Self {
        let disk = self.disk();
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut inodes = disk.inodes.clone();
        for inode in inodes.values_mut() {
            match inode {
                Inode::File(file) => survive_file(file, &mut rng),
                Inode::Dir(dir) => {
                    for change in std::mem::take(&mut dir.pending) {
                        if rng.random_bool(0.5) {
                            apply(&mut dir.durable, &change);
                        }
                    }
                    dir.seen = dir.durable.clone();
                }
            }
        }
        Self::from_inodes(inodes, disk.next_inode, rng.random())
    }

    /// Paths of all files, sorted.
    pub fn files(&self) -> Vec<String> {
        let disk = self.disk();
        let mut out = Vec::new();
        let mut folders = vec![(String::new(), ROOT)];
        while let Some((path, inode)) = folders.pop() {
            let Some(Inode::Dir(dir)) = disk.inodes.get(&inode) else {
                continue;
            };
            for (name, child) in &dir.seen {
                let path = if path.is_empty() {
                    name.clone()
                } else {
                    format!("{path}/{name}")
                };
                match disk.inodes.get(child) {
                    Some(Inode::Dir(_)) => folders.push((path, *child)),
                    _ => out.push(path),
                }
            }
        }
        out.sort();
        out
    }

    /// Changes the bytes of a file behind everybody's back. False when there is no such file.
    pub fn tamper(&self, path: &str, change: impl FnOnce(&mut Vec<u8>)) -> bool {
        let mut disk = self.disk();
        let Ok(inode) = disk.lookup(path) else {
            return false;
        };
        let Some(Inode::File(file)) = disk.inodes.get_mut(&inode) else {
            return false;
        };
        change(&mut file.seen);
        file.durable = file.seen.len();
        true
    }

    /// Bytes of all files, as programs see them.
    pub fn used_bytes(&self) -> u64 {
        let disk = self.disk();
        let sizes = disk.inodes.values().map(|inode| match inode {
            Inode::File(file) => file.seen.len() as u64,
            Inode::Dir(_) => 0,
        });
        sizes.sum()
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a power cut leaves of a file.
fn survive_file(file: &mut FileNode, rng: &mut SmallRng) {
    if file.dropped_from.is_none() && rng.random_bool(0.25) {
        // Everything happened to be written back in time.
        file.durable = file.seen.len();
        return;
    }
    let kept = rng.random_range(file.durable..=file.seen.len());
    let durable = file.durable;
    file.seen.truncate(kept);
    if let Some(unsure) = file.seen.get_mut(durable..) {
        // The length may reach the disk before the bytes do, in any order of pages.
        for page in unsure.chunks_mut(512) {
            match rng.random_range(0..4) {
                0 => page.fill(0),
                1 => rng.fill(page),
                _ => {}
            }
        }
    }
    file.durable = file.seen.len();
    file.dropped_from = None;
}

fn not_found() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Disk {
    /// Counts an operation and says whether it fails. `needs_space` ones fail on a full disk.
    fn gate(&mut self, needs_space: bool) -> io::Result<Gate> {
        self.alive()?;
        let op = self.ops;
        self.ops += 1;
        match self.fault {
            Some((at, Fault::PowerCut)) if at == op => {
                self.dead = true;
                Ok(Gate::CutAfter(self.rng.random_bool(0.5)))
            }
            Some((at, Fault::IoError)) if at == op => Err(io::Error::from_raw_os_error(libc::EIO)),
            Some((at, Fault::NoSpace)) if at == op => {
                self.full = true;
                Err(io::Error::from_raw_os_error(libc::ENOSPC))
            }
            _ if self.full && needs_space => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            _ => Ok(Gate::Go),
        }
    }

    fn alive(&self) -> io::Result<()> {
        if self.dead {
            Err(io::Error::other("the power is off"))
        } else {
            Ok(())
        }
    }

    /// Counts an operation that only looks and says whether it fails.
    fn read_gate(&mut self) -> io::Result<()> {
        self.alive()?;
        let read = self.reads;
        self.reads += 1;
        match self.fault {
            Some((at, Fault::ReadError)) if at == read => {
                Err(io::Error::from_raw_os_error(libc::EIO))
            }
            _ => Ok(()),
        }
    }

    fn dir(&mut self, inode: u64) -> io::Result<&mut DirNode> {
        match self.inodes.get_mut(&inode) {
            Some(Inode::Dir(dir)) => Ok(dir),
            Some(Inode::File(_)) => Err(io::ErrorKind::NotADirectory.into()),
            None => Err(not_found()),
        }
    }

    fn file(&mut self, inode: u64) -> io::Result<&mut FileNode> {
        match self.inodes.get_mut(&inode) {
            Some(Inode::File(file)) => Ok(file),
            Some(Inode::Dir(_)) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(not_found()),
        }
    }

    fn lookup(&mut self, path: &str) -> io::Result<u64> {
        let mut inode = ROOT;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            inode = *self.dir(inode)?.seen.get(name).ok_or_else(not_found)?;
        }
        Ok(inode)
    }

    /// The folder of `path`, and the name in it.
    fn split<'a>(&mut self, path: &'a str) -> io::Result<(u64, &'a str)> {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        Ok((self.lookup(folder)?, name))
    }

    fn link_new(&mut self, path: &str, node: Inode) -> io::Result<u64> {
        let (folder, name) = self.split(path)?;
        if self.dir(folder)?.seen.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let (inode, gate) = (self.next_inode, self.gate(true)?);
        if !matches!(gate, Gate::CutAfter(false)) {
            self.next_inode += 1;
            self.inodes.insert(inode, node);
            self.dir(folder)?
                .change(vec![(name.to_owned(), Some(inode))]);
        }
        self.alive()?;
        Ok(inode)
    }

    fn unlink(&mut self, path: &str) -> io::Result<()> {
        let (folder, name) = self.split(path)?;
        if !matches!(self.gate(false)?, Gate::CutAfter(false)) {
            // The inode stays: the removal may be undone by a power cut.
            self.dir(folder)?.change(vec![(name.to_owned(), None)]);
        }
        self.alive()
    }
}

struct SimFile {
    fs: SimFs,
    inode: u64,
}

impl AppendFile for SimFile {
    fn append(&mut self, data: &[u8]) -> io::Result<()> {
        let mut disk = self.fs.disk();
        let gate = match disk.gate(true) {
            Ok(gate) => gate,
            Err(error) => {
                // A failed write may have written a part.
                if !disk.dead {
                    let part = disk.rng.random_range(0..=data.len());
                    disk.file(self.inode)?
                        .seen
                        .extend_from_slice(data.get(..part).unwrap_or_default());
                }
                return Err(error);
            }
        };
        if !matches!(gate, Gate::CutAfter(false)) {
            disk.file(self.inode)?.seen.extend_from_slice(data);
        }
        disk.alive()
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut disk = self.fs.disk();
        let gate = match disk.gate(false) {
            Ok(gate) => gate,
            Err(error) => {
                if !disk.dead {
                    let file = disk.file(self.inode)?;
                    file.dropped_from.get_or_insert(file.durable);
                }
                return Err(error);
            }
        };
        if !matches!(gate, Gate::CutAfter(false)) {
            let file = disk.file(self.inode)?;
            file.durable = file.dropped_from.unwrap_or(file.seen.len());
        }
        disk.alive()
    }
}

impl ReadFile for SimFile {
    fn len(&self) -> io::Result<u64> {
        let mut disk = self.fs.disk();
        disk.read_gate()?;
        Ok(disk.file(self.inode)?.seen.len() as u64)
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut disk = self.fs.disk();
        disk.read_gate()?;
        let file = disk.file(self.inode)?;
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|start| file.seen.get(start..)?.get(..buf.len()));
        buf.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

struct SimLock(SimFs);

impl StoreLock for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        self.0.disk().locked = false;
    }
}

impl StoreFs for SimFs {
    fn describe(&self) -> String {
        "the simulated disk".into()
    }

    fn create(&self, path: &str) -> io::Result<Box<dyn AppendFile>> {
        let inode = self
            .disk()
            .link_new(path, Inode::File(FileNode::default()))?;
        Ok(Box::new(SimFile {
            fs: self.clone(),
            inode,
        }))
    }

    fn open(&self, path: &str) -> io::Result<Box<dyn ReadFile>> {
        let mut disk = self.disk();
        disk.read_gate()?;
        let inode = disk.lookup(path)?;
        disk.file(inode)?;
        Ok(Box::new(SimFile {
            fs: self.clone(),
            inode,
        }))
    }

    fn create_dir(&self, path: &str) -> io::Result<()> {
        self.disk()
            .link_new(path, Inode::Dir(DirNode::default()))
            .map(drop)
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        let mut disk = self.disk();
        let inode = disk.lookup(path)?;
        disk.dir(inode)?;
        if !matches!(disk.gate(false)?, Gate::CutAfter(false)) {
            let dir = disk.dir(inode)?;
            dir.pending.clear();
            dir.durable = dir.seen.clone();
        }
        disk.alive()
    }

    fn rename_no_replace(&self, from: &str, to: &str) -> io::Result<()> {
        let mut disk = self.disk();
        let (from_dir, from_name) = disk.split(from)?;
        let (to_dir, to_name) = disk.split(to)?;
        let inode = *disk
            .dir(from_dir)?
            .seen
            .get(from_name)
            .ok_or_else(not_found)?;
        if disk.dir(to_dir)?.seen.contains_key(to_name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        if from_dir != to_dir {
            return Err(io::ErrorKind::CrossesDevices.into()); // never needed by the store
        }
        if !matches!(disk.gate(true)?, Gate::CutAfter(false)) {
            disk.dir(from_dir)?.change(vec![
                (from_name.to_owned(), None),
                (to_name.to_owned(), Some(inode)),
            ]);
        }
        disk.alive()
    }

    fn list(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        let mut disk = self.disk();
        disk.read_gate()?;
        let inode = disk.lookup(path)?;
        let names = disk.dir(inode)?.seen.clone();
        let is_dir = |inode: &u64| matches!(disk.inodes.get(inode), Some(Inode::Dir(_)));
        Ok(names
            .iter()
            .map(|(name, inode)| DirEntry {
                name: name.clone(),
                is_dir: is_dir(inode),
            })
            .collect())
    }

    fn remove_file(&self, path: &str) -> io::Result<()> {
        let mut disk = self.disk();
        let inode = disk.lookup(path)?;
        disk.file(inode)?;
        disk.unlink(path)
    }

    fn remove_dir(&self, path: &str) -> io::Result<()> {
        let mut disk = self.disk();
        let inode = disk.lookup(path)?;
        if !disk.dir(inode)?.seen.is_empty() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        disk.unlink(path)
    }

    fn free_space(&self) -> io::Result<u64> {
        let disk = self.disk();
        disk.alive()?;
        Ok(if disk.full { 0 } else { u64::MAX / 2 })
    }

    fn lock(&self) -> io::Result<Box<dyn StoreLock>> {
        let mut disk = self.disk();
        disk.alive()?;
        if std::mem::replace(&mut disk.locked, true) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(Box::new(SimLock(self.clone())))
    }
}

/// The set of files, for tests that compare before and after.
impl SimFs {
    /// Paths and bytes of all files.
    pub fn contents(&self) -> BTreeSet<(String, Vec<u8>)> {
        let paths = self.files();
        let mut disk = self.disk();
        let mut out = BTreeSet::new();
        for path in paths {
            if let Ok(inode) = disk.lookup(&path)
                && let Ok(file) = disk.file(inode)
            {
                out.insert((path, file.seen.clone()));
            }
        }
        out
    }
}
