//! The store: opens a folder, knows its groups, begins attempts, collects garbage.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::attempt::LayerAttempt;
use super::catalog::{self, Catalog, LayerRef, Listed};
use super::codec::Compression;
use super::error::LayerError;
use super::fs::{StoreFs, StoreLock};
use super::hash::Hash32;
use super::index::LayerIndex;
use super::manifest::{self, GroupManifest, LayerId, LayerKind, MAX_MANIFEST_LEN, VolumeLayer};
use super::segment;
use super::tree::StateTree;
use super::wire::Reader;

const HEADER_NAME: &str = "store";
const HEADER_MAGIC: &[u8; 8] = b"SOESTOR\0";
const HEADER_VERSION: u16 = 1;
const HEADER_LEN: usize = 36;

/// How a store is opened.
#[derive(Clone)]
pub struct StoreOptions {
    /// Compression of new layers.
    pub compression: Compression,
    /// A new segment is begun when one has this many bytes.
    pub segment_bytes: u64,
    /// Opens without taking the store and changes nothing.
    pub read_only: bool,
    /// Where identities come from; the simulation brings its own.
    pub new_uuid: Arc<dyn Fn() -> Uuid + Send + Sync>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            compression: Compression::default(),
            segment_bytes: 8 << 30,
            read_only: false,
            new_uuid: Arc::new(Uuid::new_v4),
        }
    }
}

/// What the next layer of one volume is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerSpec {
    /// The volume's name in the group.
    pub volume: String,
    /// What identifies the device now.
    pub device_id: String,
    /// Bytes of the volume.
    pub volume_bytes: u64,
    /// Bytes of a block: a power of two from 512 bytes to 16 MiB.
    pub block_size: u32,
    /// What the layer will hold.
    pub kind: LayerKind,
}

/// What a collection of garbage removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Files.
    pub files: u64,
    /// Groups left alone because a manifest of theirs cannot be read, so that what it names is unknown.
    pub groups_left_alone: u64,
}

/// A store of layers. Clones are the same store.
#[derive(Clone)]
pub struct LayerStore {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) fs: Arc<dyn StoreFs>,
    pub(super) options: StoreOptions,
    pub(super) id: Uuid,
    _lock: Option<Box<dyn StoreLock>>,
    state: Mutex<State>,
}

#[derive(Default)]
pub(super) struct State {
    groups: BTreeMap<String, Group>,
    /// Attempts whose files no manifest names yet.
    live: BTreeSet<Uuid>,
    /// Groups with a live attempt.
    busy: BTreeSet<String>,
}

struct Group {
    catalog: Catalog,
    /// A commit ended without an answer: the folder has to be read again.
    stale: bool,
    /// The state tree of each volume's newest layer, with its sequence number.
    trees: HashMap<String, (u64, Arc<StateTree>)>,
}

impl LayerStore {
    /// Opens the store in `fs`, or begins one in an empty folder. What a crash left behind is
    /// collected.
    ///
    /// # Errors
    /// [`LayerError::Busy`] when another process has the store open for writing. A damaged layer is
    /// no error here: the others stay within reach.
    pub fn open(fs: Arc<dyn StoreFs>, options: StoreOptions) -> Result<Self, LayerError> {
        let lock = if options.read_only {
            None
        } else {
            Some(fs.lock().map_err(|error| match error.kind() {
                std::io::ErrorKind::WouldBlock => LayerError::Busy {
                    what: format!(
                        "{} is in use by another process; only one may write to it",
                        fs.describe()
                    ),
                },
                _ => LayerError::io("lock", "", error),
            })?)
        };
        let folders = list(&*fs, "")?;
        let folders = folders
            .iter()
            .filter(|entry| entry.is_dir)
            .map(|entry| entry.name.as_str());
        let groups: Vec<String> = folders.filter_map(catalog::group_of_folder).collect();
        let id = match read_header(&*fs)? {
            Some(id) => id,
            None if !groups.is_empty() => {
                return Err(LayerError::damaged(
                    HEADER_NAME,
                    "it is missing although there are groups",
                ));
            }
            None if options.read_only => {
                return Err(LayerError::NotFound {
                    what: format!("layer store in {}", fs.describe()),
                });
            }
            None => create_header(&*fs, (options.new_uuid)())?,
        };
        let store = Self {
            inner: Arc::new(Inner {
                fs,
                options,
                id,
                _lock: lock,
                state: Mutex::new(State::default()),
            }),
        };
        for group in groups {
            let loaded = store.inner.load_group(&group)?;
            store.inner.state().groups.insert(group, loaded);
        }
        if !store.inner.options.read_only
            && let Err(error) = store.collect_garbage()
        {
            // It will be tried again; until then it only takes space.
            tracing::warn!(%error, "garbage was left in the layer store");
        }
        Ok(store)
    }

    /// The store's identity.
    pub fn id(&self) -> Uuid {
        self.inner.id
    }

    /// Where the store is, for messages.
    pub fn describe(&self) -> String {
        self.inner.fs.describe()
    }

    /// Bytes that can still be written.
    pub fn free_space(&self) -> Result<u64, LayerError> {
        self.inner
            .fs
            .free_space()
            .map_err(|error| LayerError::io("ask for the free space of", "", error))
    }

    /// Groups with at least one layer.
    pub fn groups(&self) -> Vec<String> {
        let state = self.inner.state();
        let filled = state
            .groups
            .iter()
            .filter(|(_, group)| !group.catalog.manifests.is_empty());
        filled.map(|(name, _)| name.clone()).collect()
    }

    /// The newest durable manifest of a group: the truth from which the next capture starts, to be
    /// asked again after every failed commit.
    ///
    /// # Errors
    /// [`LayerError::Damaged`] when there is a newer one that cannot be read.
    pub fn head(&self, group: &str) -> Result<Option<GroupManifest>, LayerError> {
        let head = self.with_catalog(group, |catalog| catalog.head())?;
        Ok(head
            .flatten()
            .map(|manifest| GroupManifest::clone(&manifest)))
    }

    /// The newest layer of one volume, which is not in the head when the group's volumes changed.
    pub fn volume_head(&self, group: &str, volume: &str) -> Result<Option<LayerRef>, LayerError> {
        Ok(self
            .with_catalog(group, |catalog| catalog.newest(volume, u64::MAX))?
            .flatten())
    }

    /// The readable manifests of a group, oldest first.
    pub fn manifests(&self, group: &str) -> Result<Vec<Arc<GroupManifest>>, LayerError> {
        let found =
            self.with_catalog(group, |catalog| Ok(catalog.readable().cloned().collect()))?;
        found.ok_or_else(|| LayerError::NotFound {
            what: format!("group {group}"),
        })
    }

    /// The readable layers of a volume, oldest first.
    pub fn layers(&self, group: &str, volume: &str) -> Result<Vec<LayerRef>, LayerError> {
        let manifests = self.manifests(group)?;
        let refs = manifests.iter().filter_map(|manifest| {
            let position = manifest
                .volumes
                .iter()
                .position(|layer| layer.volume == volume)?;
            Some(LayerRef {
                manifest: manifest.clone(),
                position,
            })
        });
        Ok(refs.collect())
    }

    /// The layer with this id, or the only one whose id begins so.
    pub fn find(&self, id: &str) -> Result<LayerRef, LayerError> {
        let mut found = Vec::new();
        for group in self.groups() {
            for manifest in self.manifests(&group)? {
                let positions = (0..manifest.volumes.len())
                    .filter(|&position| manifest.volumes[position].id.as_str().starts_with(id));
                found.extend(positions.map(|position| LayerRef {
                    manifest: manifest.clone(),
                    position,
                }));
            }
        }
        match (found.pop(), found.is_empty()) {
            (Some(layer), true) if !id.is_empty() => Ok(layer),
            (Some(_), _) => Err(LayerError::BadRequest {
                what: format!("more than one layer id begins with {id:?}"),
            }),
            (None, _) => Err(LayerError::NotFound {
                what: format!("layer {id:?}"),
            }),
        }
    }

    /// Begins a layer of each volume in `specs`. Nothing is visible until
    /// [`LayerAttempt::commit`].
    ///
    /// # Errors
    /// [`LayerError::NeedsBaseline`] when a differential or rescan has nothing to build on,
    /// [`LayerError::Busy`] when the group has an attempt already, and what the chain's damage or
    /// the file system says.
    pub fn begin(&self, group: &str, specs: Vec<LayerSpec>) -> Result<LayerAttempt, LayerError> {
        let inner = &self.inner;
        if inner.options.read_only {
            return Err(LayerError::Busy {
                what: "it was opened for reading only".into(),
            });
        }
        check_specs(&specs)?;
        let folder = catalog::group_folder(group)?;
        let reservation = Reservation::take(inner, group)?;
        // A group without manifests exists only in memory until its first commit.
        inner.refresh_if_stale(group)?;
        let mut volumes = Vec::with_capacity(specs.len());
        for spec in specs {
            let parent = if spec.kind == LayerKind::Baseline {
                None
            } else {
                Some(inner.parent(group, &spec)?)
            };
            volumes.push((spec, parent));
        }
        let sequence = inner
            .state()
            .groups
            .get(group)
            .map_or(1, |group| group.catalog.next_sequence());
        match inner.fs.create_dir(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(LayerError::io("create", &folder, error));
            }
            _ => {}
        }
        // Also when the folder was there: an earlier attempt may have died before its sync.
        inner
            .fs
            .sync_dir("")
            .map_err(|error| LayerError::io("sync", "", error))?;
        LayerAttempt::create(reservation, folder, sequence, volumes)
    }

    /// Removes what no manifest names and no live attempt writes. Groups with an unreadable manifest
    /// are left alone.
    pub fn collect_garbage(&self) -> Result<Collected, LayerError> {
        let inner = &self.inner;
        let mut collected = Collected::default();
        let root = list(&*inner.fs, "")?;
        for entry in &root {
            if let Some(group) = catalog::group_of_folder(&entry.name).filter(|_| entry.is_dir) {
                inner.collect_group(&group, &entry.name, &mut collected)?;
            } else if !entry.is_dir && catalog::attempt_of_name(&entry.name).is_some() {
                inner.remove_file(&entry.name, &mut collected)?; // a store header that was never renamed
            }
        }
        Ok(collected)
    }

    /// Reads a group's folder again; what another process has committed becomes visible.
    pub fn refresh(&self, group: &str) -> Result<(), LayerError> {
        let loaded = self.inner.load_group(group)?;
        self.inner.state().groups.insert(group.to_owned(), loaded);
        Ok(())
    }

    /// Runs `look` on a group's catalog; `None` when there is no such group.
    pub(super) fn with_catalog<T>(
        &self,
        group: &str,
        look: impl FnOnce(&Catalog) -> Result<T, LayerError>,
    ) -> Result<Option<T>, LayerError> {
        self.inner.refresh_if_stale(group)?;
        let state = self.inner.state();
        state
            .groups
            .get(group)
            .map(|group| look(&group.catalog))
            .transpose()
    }
}

/// What a layer is built on.
pub(super) struct Parent {
    pub(super) chain: Uuid,
    pub(super) sequence: u64,
    pub(super) state_root: Hash32,
    pub(super) tree: Arc<StateTree>,
}

impl Inner {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one statement: a panic elsewhere cannot leave half of one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refresh_if_stale(&self, group: &str) -> Result<(), LayerError> {
        if self
            .state()
            .groups
            .get(group)
            .is_some_and(|group| group.stale)
        {
            let loaded = self.load_group(group)?;
            self.state().groups.insert(group.to_owned(), loaded);
        }
        Ok(())
    }

    /// Reads a group. The folder is synced first: what is seen afterwards is as durable as what a
    /// commit has reported.
    fn load_group(&self, group: &str) -> Result<Group, LayerError> {
        let folder = catalog::group_folder(group)?;
        if !self.options.read_only {
            self.fs
                .sync_dir(&folder)
                .map_err(|error| LayerError::io("sync", &folder, error))?;
        }
        Ok(Group {
            catalog: self.read_catalog(group)?,
            stale: false,
            trees: HashMap::new(),
        })
    }

    /// Reads the manifests of a group.
    pub(super) fn read_catalog(&self, group: &str) -> Result<Catalog, LayerError> {
        let folder = catalog::group_folder(group)?;
        let mut catalog = Catalog::new(group);
        for entry in list(&*self.fs, &folder)? {
            let Some(sequence) = catalog::sequence_of_name(&entry.name) else {
                continue;
            };
            let path = format!("{folder}/{}", entry.name);
            let listed = match self.read_manifest(&path, group, sequence) {
                Ok(manifest) => Listed::Good(Arc::new(manifest)),
                Err(LayerError::Damaged { path, what }) => Listed::Bad { path, what },
                Err(error) => Listed::Bad {
                    path,
                    what: error.to_string(),
                },
            };
            catalog.manifests.insert(sequence, listed);
        }
        Ok(catalog)
    }

    fn read_manifest(
        &self,
        path: &str,
        group: &str,
        sequence: u64,
    ) -> Result<GroupManifest, LayerError> {
        let bytes = read_file(&*self.fs, path, MAX_MANIFEST_LEN)?;
        let manifest = manifest::decode(path, &bytes)?;
        if manifest.store != self.id || manifest.group != group || manifest.sequence != sequence {
            let what = format!(
                "it belongs to number {} of group {} in store {}",
                manifest.sequence, manifest.group, manifest.store
            );
            return Err(LayerError::damaged(path, what));
        }
        Ok(manifest)
    }

    /// The index of a layer, checked against the manifest that names it.
    pub(super) fn read_index(&self, found: &LayerRef) -> Result<LayerIndex, LayerError> {
        let layer = found.layer();
        let path = self.file_path(found, &layer.index.file)?;
        let bytes = read_file(&*self.fs, &path, layer.index.len)?;
        if bytes.len() as u64 != layer.index.len || Hash32::of(&bytes) != layer.index.blake3 {
            return Err(LayerError::damaged(
                &path,
                "the index is not the one that was committed",
            ));
        }
        let index = LayerIndex::decode(&path, &bytes)?;
        check_index(found, &index).map_err(|what| LayerError::damaged(&path, what))?;
        Ok(index)
    }

    /// The path of a layer's file.
    pub(super) fn file_path(&self, found: &LayerRef, file: &str) -> Result<String, LayerError> {
        let folder = catalog::group_folder(&found.manifest.group)?;
        Ok(format!(
            "{folder}/{}/{file}",
            catalog::attempt_name(found.manifest.attempt)
        ))
    }

    /// What a differential or rescan of `spec` is built on.
    fn parent(&self, group: &str, spec: &LayerSpec) -> Result<Parent, LayerError> {
        let needs_baseline = |reason: String| LayerError::NeedsBaseline {
            group: group.to_owned(),
            volume: spec.volume.clone(),
            reason,
        };
        let catalog = self
            .state()
            .groups
            .get(group)
            .map(|group| group.catalog.clone());
        let catalog = catalog.unwrap_or_else(|| Catalog::new(group));
        let head = catalog
            .newest(&spec.volume, u64::MAX)?
            .ok_or_else(|| needs_baseline("it has no baseline yet".into()))?;
        let layer = head.layer();
        if (layer.volume_bytes, layer.block_size) != (spec.volume_bytes, spec.block_size) {
            return Err(needs_baseline(format!(
                "it has {} bytes in blocks of {}, its last layer {} in blocks of {}",
                spec.volume_bytes, spec.block_size, layer.volume_bytes, layer.block_size
            )));
        }
        // A rescan compares every block, so it may well be another device.
        if spec.kind == LayerKind::Differential && layer.device_id != spec.device_id {
            return Err(needs_baseline(format!(
                "the device is {}, its last layer is of {}",
                spec.device_id, layer.device_id
            )));
        }
        let (chain, sequence, state_root) = (layer.chain, head.manifest.sequence, layer.state_root);
        Ok(Parent {
            chain,
            sequence,
            state_root,
            tree: self.tree(&catalog, head)?,
        })
    }

    /// The state tree of a volume's newest layer: kept since its commit, or built from the indexes.
    fn tree(&self, catalog: &Catalog, head: LayerRef) -> Result<Arc<StateTree>, LayerError> {
        let (volume, sequence) = (head.layer().volume.clone(), head.manifest.sequence);
        let kept = self
            .state()
            .groups
            .get(&catalog.group)
            .and_then(|group| group.trees.get(&volume).cloned());
        if let Some((_, tree)) = kept.filter(|(kept_sequence, _)| *kept_sequence == sequence) {
            return Ok(tree);
        }
        let layer = head.layer();
        let mut tree = StateTree::new(layer.volume_bytes, layer.block_size);
        for found in catalog.chain(head)?.iter().rev() {
            apply(&mut tree, &self.read_index(found)?, found.layer().kind);
            if tree.root() != found.layer().state_root {
                let path = self.file_path(found, &found.layer().index.file)?;
                return Err(LayerError::damaged(
                    &path,
                    "the image it leads to does not have the state root promised",
                ));
            }
        }
        let tree = Arc::new(tree);
        if let Some(group) = self.state().groups.get_mut(&catalog.group) {
            group.trees.insert(volume, (sequence, tree.clone()));
        }
        Ok(tree)
    }

    /// Makes a committed manifest known.
    pub(super) fn publish(
        &self,
        manifest: GroupManifest,
        trees: Vec<Arc<StateTree>>,
    ) -> Arc<GroupManifest> {
        let manifest = Arc::new(manifest);
        let mut state = self.state();
        let group = state
            .groups
            .entry(manifest.group.clone())
            .or_insert_with(|| Group {
                catalog: Catalog::new(&manifest.group),
                stale: false,
                trees: HashMap::new(),
            });
        group
            .catalog
            .manifests
            .insert(manifest.sequence, Listed::Good(manifest.clone()));
        for (layer, tree) in manifest.volumes.iter().zip(trees) {
            group
                .trees
                .insert(layer.volume.clone(), (manifest.sequence, tree));
        }
        manifest
    }

    /// Has the group's folder read again before anything is said of it.
    pub(super) fn mark_stale(&self, group: &str) {
        let mut state = self.state();
        let known = state
            .groups
            .entry(group.to_owned())
            .or_insert_with(|| Group {
                catalog: Catalog::new(group),
                stale: true,
                trees: HashMap::new(),
            });
        known.stale = true;
    }

    fn collect_group(
        &self,
        group: &str,
        folder: &str,
        collected: &mut Collected,
    ) -> Result<(), LayerError> {
        // First the listing, then what is live: an attempt that begins in between is not in it.
        let entries = list(&*self.fs, folder)?;
        let named: BTreeSet<Uuid> = {
            let state = self.state();
            let Some(known) = state
                .groups
                .get(group)
                .filter(|known| !known.stale && known.catalog.all_readable())
            else {
                collected.groups_left_alone += u64::from(state.groups.contains_key(group));
                return Ok(());
            };
            known
                .catalog
                .readable()
                .map(|manifest| manifest.attempt)
                .chain(state.live.iter().copied())
                .collect()
        };
        let garbage: Vec<_> = entries
            .iter()
            .filter(|entry| {
                catalog::attempt_of_name(&entry.name)
                    .is_some_and(|attempt| !named.contains(&attempt))
            })
            .collect();
        if garbage.is_empty() {
            return Ok(());
        }
        // A manifest that was taken back must not return after its files are gone.
        self.fs
            .sync_dir(folder)
            .map_err(|error| LayerError::io("sync", folder, error))?;
        for entry in garbage {
            let path = format!("{folder}/{}", entry.name);
            if entry.is_dir {
                self.remove_folder(&path, collected)?;
            } else {
                self.remove_file(&path, collected)?;
            }
        }
        Ok(())
    }

    pub(super) fn remove_folder(
        &self,
        path: &str,
        collected: &mut Collected,
    ) -> Result<(), LayerError> {
        for entry in list(&*self.fs, path)? {
            self.remove_file(&format!("{path}/{}", entry.name), collected)?;
        }
        self.fs
            .remove_dir(path)
            .map_err(|error| LayerError::io("remove", path, error))
    }

    fn remove_file(&self, path: &str, collected: &mut Collected) -> Result<(), LayerError> {
        self.fs
            .remove_file(path)
            .map_err(|error| LayerError::io("remove", path, error))?;
        collected.files += 1;
        Ok(())
    }
}

/// A group held for one attempt, and the attempt's files kept from the garbage collection.
pub(super) struct Reservation {
    pub(super) inner: Arc<Inner>,
    pub(super) group: String,
    pub(super) attempt: Uuid,
}

impl Reservation {
    fn take(inner: &Arc<Inner>, group: &str) -> Result<Self, LayerError> {
        let attempt = (inner.options.new_uuid)();
        let mut state = inner.state();
        if !state.busy.insert(group.to_owned()) {
            return Err(LayerError::Busy {
                what: format!("group {group} is being captured already"),
            });
        }
        state.live.insert(attempt);
        Ok(Self {
            inner: inner.clone(),
            group: group.to_owned(),
            attempt,
        })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.inner.state();
        state.busy.remove(&self.group);
        state.live.remove(&self.attempt);
    }
}

/// Applies a layer to the tree of its parent.
pub(super) fn apply(tree: &mut StateTree, index: &LayerIndex, kind: LayerKind) {
    if kind == LayerKind::Baseline {
        // A baseline's holes are zero in the fresh tree already, and may be most of the volume.
        tree.update(index.entries.iter().map(|entry| (entry.block, entry.hash)));
    } else {
        tree.update(index.state_changes());
    }
}

/// A random layer identity.
pub(super) fn new_layer_id(options: &StoreOptions) -> LayerId {
    LayerId::from_uuid((options.new_uuid)())
}

fn check_specs(specs: &[LayerSpec]) -> Result<(), LayerError> {
    let bad = |what: String| Err(LayerError::BadRequest { what });
    if specs.is_empty() {
        return bad("a capture needs at least one volume".into());
    }
    for (position, spec) in specs.iter().enumerate() {
        if !manifest::valid_geometry(spec.volume_bytes, spec.block_size) {
            return bad(format!(
                "volume {} cannot have {} bytes in blocks of {}",
                spec.volume, spec.volume_bytes, spec.block_size
            ));
        }
        if specs
            .iter()
            .take(position)
            .any(|other| other.volume == spec.volume)
        {
            return bad(format!("volume {} was given twice", spec.volume));
        }
    }
    Ok(())
}

/// An index must agree with the manifest that names it.
fn check_index(found: &LayerRef, index: &LayerIndex) -> Result<(), &'static str> {
    let layer: &VolumeLayer = found.layer();
    let same = index.attempt == found.manifest.attempt
        && index.volume as usize == found.position
        && (index.volume_bytes, index.block_size) == (layer.volume_bytes, layer.block_size)
        && index.entries.len() as u64 == layer.data_blocks
        && index.hole_blocks() == layer.hole_blocks;
    if !same {
        return Err("the index contradicts its manifest");
    }
    let inside = index.entries.iter().all(|entry| {
        let segment = layer.segments.get(entry.segment as usize);
        let end = entry.offset.saturating_add(u64::from(entry.stored_len));
        segment
            .is_some_and(|segment| entry.offset >= segment::HEADER_LEN as u64 && end <= segment.len)
    });
    if inside {
        Ok(())
    } else {
        Err("the index points outside of the layer's segments")
    }
}

fn list(fs: &dyn StoreFs, path: &str) -> Result<Vec<super::fs::DirEntry>, LayerError> {
    fs.list(path)
        .map_err(|error| LayerError::io("list", path, error))
}

/// Reads a whole file of at most `max_len` bytes; what is longer is damaged.
fn read_file(fs: &dyn StoreFs, path: &str, max_len: u64) -> Result<Vec<u8>, LayerError> {
    let missing_or_io = |call, error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => LayerError::damaged(path, "the file is missing"),
        std::io::ErrorKind::UnexpectedEof => LayerError::damaged(path, "the file is cut short"),
        _ => LayerError::io(call, path, error),
    };
    let file = fs
        .open(path)
        .map_err(|error| missing_or_io("open", error))?;
    let len = file
        .len()
        .map_err(|error| LayerError::io("measure", path, error))?;
    if len > max_len {
        return Err(LayerError::damaged(
            path,
            format!("it has {len} bytes, more than the {max_len} it should have"),
        ));
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(0, &mut bytes)
        .map_err(|error| missing_or_io("read", error))?;
    Ok(bytes)
}

/// The identity in the store's header; `None` when there is no header.
fn read_header(fs: &dyn StoreFs) -> Result<Option<Uuid>, LayerError> {
    match fs.open(HEADER_NAME) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(LayerError::io("open", HEADER_NAME, error)),
        Ok(_) => {}
    }
    let bytes = read_file(fs, HEADER_NAME, HEADER_LEN as u64)?;
    decode_header(&bytes).map(Some)
}

pub(super) fn decode_header(bytes: &[u8]) -> Result<Uuid, LayerError> {
    let damaged = || LayerError::damaged(HEADER_NAME, "it is not the header of a layer store");
    let (covered, sum) = bytes.split_last_chunk::<4>().ok_or_else(damaged)?;
    if bytes.len() != HEADER_LEN || crc32c::crc32c(covered).to_le_bytes() != *sum {
        return Err(damaged());
    }
    let mut fields = Reader::new(covered);
    if fields.take(8) != Some(HEADER_MAGIC.as_slice()) {
        return Err(damaged());
    }
    let (version, flags, reserved) = (fields.u16(), fields.u16(), fields.u32());
    if (version, flags, reserved) != (Some(HEADER_VERSION), Some(0), Some(0)) {
        return Err(LayerError::Unsupported {
            path: HEADER_NAME.into(),
            what: format!("store version {}", version.unwrap_or_default()),
        });
    }
    fields.uuid().ok_or_else(damaged)
}

fn create_header(fs: &dyn StoreFs, id: Uuid) -> Result<Uuid, LayerError> {
    let mut bytes = Vec::with_capacity(HEADER_LEN);
    bytes.extend_from_slice(HEADER_MAGIC);
    bytes.extend_from_slice(&HEADER_VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 6]);
    bytes.extend_from_slice(id.as_bytes());
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    write_durably(fs, "", &catalog::temporary_name(id), HEADER_NAME, &bytes)?;
    fs.sync_dir("")
        .map_err(|error| LayerError::io("sync", "", error))?;
    Ok(id)
}

/// Writes `bytes` under a temporary name, makes them durable and gives them their name, which must
/// not be taken. The name is durable only when the folder has been synced afterwards.
pub(super) fn write_durably(
    fs: &dyn StoreFs,
    folder: &str,
    temporary: &str,
    name: &str,
    bytes: &[u8],
) -> Result<(), LayerError> {
    let join = |name: &str| {
        if folder.is_empty() {
            name.to_owned()
        } else {
            format!("{folder}/{name}")
        }
    };
    let (temporary, name) = (join(temporary), join(name));
    let mut file = fs
        .create(&temporary)
        .map_err(|error| LayerError::io("create", &temporary, error))?;
    file.append(bytes)
        .map_err(|error| LayerError::io("write to", &temporary, error))?;
    file.sync()
        .map_err(|error| LayerError::io("sync", &temporary, error))?;
    fs.rename_no_replace(&temporary, &name)
        .map_err(|error| LayerError::io("rename to", &name, error))
}
