//! What clones of a store, its attempts and its images share.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::catalog::{self, Catalog, LayerRef, Listed};
use super::codec::Compression;
use super::error::LayerError;
use super::files;
use super::fs::{StoreFs, StoreLock};
use super::hash::Hash32;
use super::index::LayerIndex;
use super::manifest::{self, GroupManifest, LayerId, LayerKind, MAX_MANIFEST_LEN, VolumeLayer};
use super::segment;
use super::store::{Collected, LayerSpec, StoreOptions};
use super::tree::StateTree;

pub(super) struct Inner {
    pub(super) fs: Arc<dyn StoreFs>,
    pub(super) options: StoreOptions,
    /// How the next layers are compressed; it may change while the store is open.
    pub(super) compression: Mutex<Compression>,
    pub(super) id: Uuid,
    _lock: Option<Box<dyn StoreLock>>,
    state: Mutex<State>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) groups: BTreeMap<String, Group>,
    /// Attempts whose files no manifest names yet.
    live: BTreeSet<Uuid>,
    /// Groups with a live attempt.
    busy: BTreeSet<String>,
}

pub(super) struct Group {
    pub(super) catalog: Catalog,
    /// A commit ended without an answer: the folder has to be read again.
    stale: bool,
    /// The state tree of each volume's newest layer, with its sequence number.
    trees: HashMap<String, (u64, Arc<StateTree>)>,
}

/// What a layer is built on.
pub(super) struct Parent {
    pub(super) chain: Uuid,
    pub(super) sequence: u64,
    pub(super) state_root: Hash32,
    pub(super) tree: Arc<StateTree>,
}

impl Inner {
    pub(super) fn new(
        fs: Arc<dyn StoreFs>,
        options: StoreOptions,
        id: Uuid,
        lock: Option<Box<dyn StoreLock>>,
    ) -> Self {
        Self {
            fs,
            compression: Mutex::new(options.compression),
            options,
            id,
            _lock: lock,
            state: Mutex::new(State::default()),
        }
    }

    pub(super) fn compression(&self) -> Compression {
        *self
            .compression
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one statement: a panic elsewhere cannot leave half of one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn refresh_if_stale(&self, group: &str) -> Result<(), LayerError> {
        if self
            .state()
            .groups
            .get(group)
            .is_some_and(|group| group.stale)
        {
            self.load_group(group)?;
        }
        Ok(())
    }

    /// Reads a group. The folder is synced first: what is seen afterwards is as durable as what a
    /// commit has reported.
    pub(super) fn load_group(&self, group: &str) -> Result<(), LayerError> {
        let folder = catalog::group_folder(group)?;
        if !self.options.read_only {
            self.fs
                .sync_dir(&folder)
                .map_err(|error| LayerError::io("sync", &folder, error))?;
        }
        let loaded = Group {
            catalog: self.read_catalog(group)?,
            stale: false,
            trees: HashMap::new(),
        };
        self.state().groups.insert(group.to_owned(), loaded);
        Ok(())
    }

    /// Reads the manifests of a group.
    pub(super) fn read_catalog(&self, group: &str) -> Result<Catalog, LayerError> {
        let folder = catalog::group_folder(group)?;
        let mut catalog = Catalog::new(group);
        for entry in files::list(&*self.fs, &folder)? {
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
        let bytes = files::read_file(&*self.fs, path, MAX_MANIFEST_LEN)?;
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
        let bytes = files::read_file(&*self.fs, &path, layer.index.len)?;
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
    pub(super) fn parent(&self, group: &str, spec: &LayerSpec) -> Result<Parent, LayerError> {
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

    pub(super) fn collect_group(
        &self,
        group: &str,
        folder: &str,
        collected: &mut Collected,
    ) -> Result<(), LayerError> {
        // First the listing, then what is live: an attempt that begins in between is not in it.
        let entries = files::list(&*self.fs, folder)?;
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
        for entry in files::list(&*self.fs, path)? {
            self.remove_file(&format!("{path}/{}", entry.name), collected)?;
        }
        self.fs
            .remove_dir(path)
            .map_err(|error| LayerError::io("remove", path, error))
    }

    pub(super) fn remove_file(
        &self,
        path: &str,
        collected: &mut Collected,
    ) -> Result<(), LayerError> {
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
    pub(super) fn take(inner: &Arc<Inner>, group: &str) -> Result<Self, LayerError> {
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
