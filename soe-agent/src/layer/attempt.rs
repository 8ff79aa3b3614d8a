//! One capture on its way into the store.

use std::collections::BTreeMap;
use std::sync::Arc;

use soe_common::BlockIndex;
use uuid::Uuid;

use super::catalog;
use super::codec::Encoder;
use super::error::LayerError;
use super::files;
use super::hash::Hash32;
use super::index::{Entry, LayerIndex};
use super::inner::{self, Parent, Reservation};
use super::manifest::{self, CutRecord, FileRef, GroupManifest, LayerKind, ParentRef, VolumeLayer};
use super::runs::RunSet;
use super::segment::{SegmentHeader, SegmentWriter};
use super::store::{Collected, LayerSpec};
use super::tree::StateTree;

/// What became of a block that was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// Its data is in the layer.
    Stored,
    /// It is zero: the layer says so and holds no data.
    Hole,
    /// The chain has the same content already: the layer says nothing of it.
    Unchanged,
}

/// A layer of each volume of a group, being written. Dropped without a commit it leaves nothing.
///
/// After a method failed with anything but [`LayerError::BadBlock`] the attempt can only be dropped.
pub struct LayerAttempt {
    reservation: Reservation,
    /// The group's folder, and the attempt's in it.
    group_folder: String,
    folder: String,
    sequence: u64,
    volumes: Vec<VolumeAttempt>,
    encoder: Encoder,
    failed: bool,
    /// Whether the files are to be removed when the attempt is dropped.
    remove_files: bool,
}

struct VolumeAttempt {
    spec: LayerSpec,
    parent: Option<Parent>,
    /// Blocks with data, as last put.
    entries: BTreeMap<u64, Entry>,
    /// Blocks that were zero when last put.
    holes: RunSet,
    /// Every block put, whatever became of it.
    seen: RunSet,
    open_segment: Option<SegmentWriter>,
    segments: Vec<FileRef>,
}

impl LayerAttempt {
    pub(super) fn create(
        reservation: Reservation,
        group_folder: String,
        sequence: u64,
        volumes: Vec<(LayerSpec, Option<Parent>)>,
    ) -> Result<Self, LayerError> {
        let folder = format!(
            "{group_folder}/{}",
            catalog::attempt_name(reservation.attempt)
        );
        let encoder = Encoder::new(reservation.inner.compression())
            .map_err(|error| LayerError::io("prepare compression for", &folder, error))?;
        let volumes = volumes
            .into_iter()
            .map(|(spec, parent)| VolumeAttempt {
                spec,
                parent,
                entries: BTreeMap::new(),
                holes: RunSet::default(),
                seen: RunSet::default(),
                open_segment: None,
                segments: Vec::new(),
            })
            .collect();
        let created = reservation.inner.fs.create_dir(&folder);
        created.map_err(|error| LayerError::io("create", &folder, error))?;
        Ok(Self {
            reservation,
            group_folder,
            folder,
            sequence,
            volumes,
            encoder,
            failed: false,
            remove_files: true,
        })
    }

    /// The sequence number that the commit will have.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Blocks that the layer of the volume at `volume` would hold now, data and holes together.
    pub fn changed_blocks(&self, volume: usize) -> u64 {
        self.volumes.get(volume).map_or(0, |volume| {
            volume.entries.len() as u64 + volume.holes.block_count()
        })
    }

    /// Puts the content of one block of the volume at `volume` in the order of `begin`. A block put
    /// again replaces what was put before. The last block of a volume has what is left of it.
    ///
    /// # Errors
    /// [`LayerError::BadBlock`] when it does not fit, and what the file system says.
    pub fn put_block(
        &mut self,
        volume: usize,
        block: BlockIndex,
        data: &[u8],
    ) -> Result<Put, LayerError> {
        self.put(volume, block, data, false)
    }

    /// Like [`put_block`](Self::put_block), but a block that has the same content in the chain
    /// already is left out. What a rescan calls with every block of the volume.
    ///
    /// # Errors
    /// As [`put_block`](Self::put_block).
    pub fn put_if_different(
        &mut self,
        volume: usize,
        block: BlockIndex,
        data: &[u8],
    ) -> Result<Put, LayerError> {
        self.put(volume, block, data, true)
    }

    /// Whether the layer as put so far, on top of its chain, says that a block has this content.
    ///
    /// # Errors
    /// [`LayerError::BadBlock`] when it does not fit.
    pub fn agrees(
        &self,
        volume: usize,
        block: BlockIndex,
        data: &[u8],
    ) -> Result<bool, LayerError> {
        let target = self
            .volumes
            .get(volume)
            .ok_or_else(|| no_such_volume(volume, self.volumes.len()))?;
        target.check(block, data)?;
        let known = if let Some(entry) = target.entries.get(&block.0) {
            Some(entry.hash)
        } else if target.holes.contains(block.0) {
            Some(Hash32::ZERO_BLOCK)
        } else {
            let parent = target.parent.as_ref();
            parent.map(|parent| parent.tree.block_hash(block.0))
        };
        Ok(known == Some(Hash32::of_block(data)))
    }

    fn put(
        &mut self,
        volume: usize,
        block: BlockIndex,
        data: &[u8],
        compare: bool,
    ) -> Result<Put, LayerError> {
        if self.failed {
            return Err(LayerError::AttemptFailed {
                group: self.reservation.group.clone(),
            });
        }
        let count = self.volumes.len();
        let target = self
            .volumes
            .get_mut(volume)
            .ok_or_else(|| no_such_volume(volume, count))?;
        target.check(block, data)?;
        let hash = Hash32::of_block(data);
        target.seen.insert(block.0..block.0 + 1);
        let before = target
            .parent
            .as_ref()
            .map(|parent| parent.tree.block_hash(block.0));
        if compare && before == Some(hash) {
            target.entries.remove(&block.0);
            target.holes.remove(block.0..block.0 + 1);
            return Ok(Put::Unchanged);
        }
        if hash == Hash32::ZERO_BLOCK {
            target.entries.remove(&block.0);
            target.holes.insert(block.0..block.0 + 1);
            return Ok(Put::Hole);
        }
        target.holes.remove(block.0..block.0 + 1);
        if target
            .entries
            .get(&block.0)
            .is_some_and(|entry| entry.hash == hash)
        {
            return Ok(Put::Stored); // a later pass read what an earlier one had read
        }
        let (codec, stored) = self.encoder.encode(data);
        match target.append(&self.reservation, &self.folder, volume as u32, stored) {
            Ok((segment, offset)) => {
                let stored_len = stored.len() as u32;
                target.entries.insert(
                    block.0,
                    Entry {
                        block: block.0,
                        offset,
                        stored_len,
                        segment,
                        codec,
                        hash,
                    },
                );
                Ok(Put::Stored)
            }
            Err(error) => {
                // What reached the file is unknown, so nothing in it may be named.
                self.failed = true;
                Err(error)
            }
        }
    }

    /// Makes the layers durable and visible, all or none. When this returns `Ok` they survive a
    /// power cut.
    ///
    /// # Errors
    /// Whatever it is, earlier layers are intact. The new ones are absent, except that after a
    /// failure of the very last step they may be there, whole: ask
    /// [`LayerStore::head`](super::LayerStore::head) again before the next capture.
    pub fn commit(mut self, cut: CutRecord) -> Result<GroupManifest, LayerError> {
        if self.failed {
            return Err(LayerError::AttemptFailed {
                group: self.reservation.group.clone(),
            });
        }
        if cut.volumes.len() != self.volumes.len() {
            return Err(LayerError::BadRequest {
                what: format!(
                    "a cut of {} volumes cannot end a capture of {}",
                    cut.volumes.len(),
                    self.volumes.len()
                ),
            });
        }
        for volume in &self.volumes {
            volume.check_complete(&self.reservation.group)?;
        }
        let (manifest, trees) = self.write_layers(cut)?;
        let bytes = manifest::encode(&manifest)?;
        let inner = self.reservation.inner.clone();
        let sync = |path: &str| {
            inner
                .fs
                .sync_dir(path)
                .map_err(|error| LayerError::io("sync", path, error))
        };
        // The files' names must last before a manifest names them.
        sync(&self.folder)?;
        sync(&self.group_folder)?;
        let temporary = catalog::temporary_name(self.reservation.attempt);
        let name = catalog::manifest_name(self.sequence);
        if let Err(error) =
            files::write_durably(&*inner.fs, &self.group_folder, &temporary, &name, &bytes)
        {
            let _ = inner
                .fs
                .remove_file(&format!("{}/{temporary}", self.group_folder));
            return Err(error);
        }
        // From here on the manifest may survive a power cut, and so must what it names.
        self.remove_files = false;
        if let Err(error) = sync(&self.group_folder) {
            inner.mark_stale(&self.reservation.group);
            return Err(error);
        }
        Ok(GroupManifest::clone(&inner.publish(manifest, trees)))
    }

    /// Gives up and removes what was written.
    pub fn abort(self) {
        drop(self);
    }

    /// Makes every volume's files durable and describes them.
    fn write_layers(
        &mut self,
        cut: CutRecord,
    ) -> Result<(GroupManifest, Vec<Arc<StateTree>>), LayerError> {
        let mut layers = Vec::with_capacity(self.volumes.len());
        let mut trees = Vec::with_capacity(self.volumes.len());
        let attempt = self.reservation.attempt;
        let options = &self.reservation.inner.options;
        for (position, (mut volume, cut)) in self.volumes.drain(..).zip(cut.volumes).enumerate() {
            let (index, segments) = volume.finish(attempt, position as u32)?;
            let index_ref = write_index(&self.reservation, &self.folder, position, &index)?;
            let (spec, parent) = (volume.spec, volume.parent);
            let mut tree = match &parent {
                Some(parent) => StateTree::clone(&parent.tree),
                None => StateTree::new(spec.volume_bytes, spec.block_size),
            };
            inner::apply(&mut tree, &index, spec.kind);
            let stored = segments
                .iter()
                .chain([&index_ref])
                .map(|file| file.len)
                .sum();
            layers.push(VolumeLayer {
                id: inner::new_layer_id(options),
                volume: spec.volume,
                device_id: spec.device_id,
                volume_bytes: spec.volume_bytes,
                block_size: spec.block_size,
                kind: spec.kind,
                chain: parent
                    .as_ref()
                    .map_or_else(|| (options.new_uuid)(), |parent| parent.chain),
                parent: parent.map(|parent| ParentRef {
                    sequence: parent.sequence,
                    state_root: parent.state_root,
                }),
                generation: cut.generation,
                cut_epoch: cut.cut_epoch,
                since_epoch: cut.since_epoch,
                misses: cut.misses,
                rescan_reason: cut.rescan_reason,
                bytes_read: cut.bytes_read,
                bytes_stored: stored,
                data_blocks: index.entries.len() as u64,
                hole_blocks: index.hole_blocks(),
                delta_root: VolumeLayer::compute_delta_root(&index_ref, &segments),
                state_root: tree.root(),
                segments,
                index: index_ref,
            });
            trees.push(Arc::new(tree));
        }
        let manifest = GroupManifest {
            store: self.reservation.inner.id,
            group: self.reservation.group.clone(),
            sequence: self.sequence,
            attempt,
            level: cut.level,
            method: cut.method,
            pause_us: cut.pause_us,
            skew_us: cut.skew_us,
            started_at: cut.started_at,
            cut_at: cut.cut_at,
            finished_at: cut.finished_at,
            volumes: layers,
            replaces: Vec::new(),
            encryption: None,
        };
        Ok((manifest, trees))
    }
}

impl Drop for LayerAttempt {
    fn drop(&mut self) {
        // Open files are closed before their folder is removed.
        self.volumes.clear();
        if self.remove_files {
            // Whatever cannot be removed now is garbage, which the next open collects.
            let _ = self
                .reservation
                .inner
                .remove_folder(&self.folder, &mut Collected::default());
        }
    }
}

impl VolumeAttempt {
    fn check(&self, block: BlockIndex, data: &[u8]) -> Result<(), LayerError> {
        let spec = &self.spec;
        let start = block
            .0
            .checked_mul(u64::from(spec.block_size))
            .filter(|&start| start < spec.volume_bytes);
        let expected = start.map(|start| u64::from(spec.block_size).min(spec.volume_bytes - start));
        if expected == Some(data.len() as u64) {
            return Ok(());
        }
        Err(LayerError::BadBlock {
            volume: spec.volume.clone(),
            block: block.0,
            bytes: data.len(),
            volume_bytes: spec.volume_bytes,
            block_size: spec.block_size,
        })
    }

    /// A baseline or rescan that did not see a block would say something false of it.
    fn check_complete(&self, group: &str) -> Result<(), LayerError> {
        let spec = &self.spec;
        let blocks = spec.volume_bytes.div_ceil(u64::from(spec.block_size));
        match self
            .seen
            .first_gap(blocks)
            .filter(|_| spec.kind.reads_everything())
        {
            None => Ok(()),
            Some(block) => Err(LayerError::Incomplete {
                group: group.to_owned(),
                volume: spec.volume.clone(),
                kind: if spec.kind == LayerKind::Baseline {
                    "baseline"
                } else {
                    "rescan"
                },
                block,
            }),
        }
    }

    /// Appends a block's representation and returns its segment and place.
    fn append(
        &mut self,
        reservation: &Reservation,
        folder: &str,
        volume: u32,
        stored: &[u8],
    ) -> Result<(u32, u64), LayerError> {
        let inner = &reservation.inner;
        if let Some(full) = self
            .open_segment
            .take_if(|open| open.len() >= inner.options.segment_bytes)
        {
            self.segments.push(full.finish()?);
        }
        let number = self.segments.len() as u32;
        let open = match &mut self.open_segment {
            Some(open) => open,
            none => none.insert(SegmentWriter::create(
                &*inner.fs,
                folder,
                SegmentHeader {
                    number,
                    attempt: reservation.attempt,
                    store: inner.id,
                    volume,
                },
            )?),
        };
        Ok((number, open.append(stored)?))
    }

    /// Makes the segments durable and returns them with the index over them.
    fn finish(
        &mut self,
        attempt: Uuid,
        position: u32,
    ) -> Result<(LayerIndex, Vec<FileRef>), LayerError> {
        if let Some(open) = self.open_segment.take() {
            self.segments.push(open.finish()?);
        }
        let index = LayerIndex {
            attempt,
            volume: position,
            volume_bytes: self.spec.volume_bytes,
            block_size: self.spec.block_size,
            entries: std::mem::take(&mut self.entries).into_values().collect(),
            holes: self.holes.iter().collect(),
        };
        Ok((index, std::mem::take(&mut self.segments)))
    }
}

fn no_such_volume(volume: usize, count: usize) -> LayerError {
    LayerError::BadRequest {
        what: format!("there is no volume {volume} in a capture of {count}"),
    }
}

fn write_index(
    reservation: &Reservation,
    folder: &str,
    position: usize,
    index: &LayerIndex,
) -> Result<FileRef, LayerError> {
    let file_name = format!("v{position}.index");
    let path = format!("{folder}/{file_name}");
    let bytes = index.encode();
    let fs = &reservation.inner.fs;
    let mut file = fs
        .create(&path)
        .map_err(|error| LayerError::io("create", &path, error))?;
    file.append(&bytes)
        .map_err(|error| LayerError::io("write to", &path, error))?;
    file.sync()
        .map_err(|error| LayerError::io("sync", &path, error))?;
    Ok(FileRef {
        file: file_name,
        len: bytes.len() as u64,
        blake3: Hash32::of(&bytes),
    })
}
