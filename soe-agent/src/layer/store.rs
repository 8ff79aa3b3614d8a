//! The store: opens a folder, knows its groups, begins attempts, collects garbage.

use std::sync::{Arc, PoisonError};

use uuid::Uuid;

use super::attempt::LayerAttempt;
use super::catalog::{self, Catalog, LayerRef};
use super::codec::Compression;
use super::error::LayerError;
use super::files;
use super::fs::StoreFs;
use super::inner::{Inner, Reservation};
use super::manifest::{self, GroupManifest, LayerKind};
use crate::seam::UnixNanos;

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
        let folders = files::list(&*fs, "")?;
        let folders = folders
            .iter()
            .filter(|entry| entry.is_dir)
            .map(|entry| entry.name.as_str());
        let groups: Vec<String> = folders.filter_map(catalog::group_of_folder).collect();
        let id = match files::read_header(&*fs)? {
            Some(id) => id,
            None if !groups.is_empty() => {
                return Err(LayerError::damaged(
                    "store",
                    "it is missing although there are groups",
                ));
            }
            None if options.read_only => {
                return Err(LayerError::NotFound {
                    what: format!("layer store in {}", fs.describe()),
                });
            }
            None => files::create_header(&*fs, (options.new_uuid)())?,
        };
        let store = Self {
            inner: Arc::new(Inner::new(fs, options, id, lock)),
        };
        for group in groups {
            store.inner.load_group(&group)?;
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

    /// Compresses layers that are begun from now on another way.
    pub fn set_compression(&self, compression: Compression) {
        *self
            .inner
            .compression
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = compression;
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

    /// What is wrong with the manifests of a group that cannot be read, oldest first; nothing for a
    /// group without layers. Contents are not looked at, see [`LayerStore::verify`].
    pub fn unreadable(&self, group: &str) -> Result<Vec<LayerError>, LayerError> {
        let found = self.with_catalog(group, |catalog| Ok(catalog.unreadable()))?;
        Ok(found.unwrap_or_default())
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

    /// The newest readable layer of a volume whose cut was at or before `instant`.
    ///
    /// # Errors
    /// [`LayerError::NotFound`] when all are younger.
    pub fn layer_at(
        &self,
        group: &str,
        volume: &str,
        instant: UnixNanos,
    ) -> Result<LayerRef, LayerError> {
        let layers = self.layers(group, volume)?;
        let found = layers
            .into_iter()
            .rfind(|layer| layer.manifest.cut_at <= instant);
        found.ok_or_else(|| LayerError::NotFound {
            what: format!("layer of {volume} in group {group} as old as that"),
        })
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
        let root = files::list(&*inner.fs, "")?;
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
        self.inner.load_group(group)
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
