//! Re-reads everything a group has in the store and says what is wrong with it.

use std::collections::{BTreeMap, HashMap};

use uuid::Uuid;

use super::catalog::{Catalog, LayerRef, Listed};
use super::codec::Decoder;
use super::error::LayerError;
use super::hash::Hash32;
use super::index::{Entry, LayerIndex};
use super::inner::{self, Inner};
use super::manifest::{HeadAnchor, LayerKind};
use super::merged::MergedIndex;
use super::segment::{HEADER_LEN, SegmentHeader};
use super::store::LayerStore;
use super::tree::StateTree;

/// Bytes read at once.
const READ_BYTES: usize = 1 << 20;

/// One thing that is wrong, in one sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The manifest's sequence number.
    pub sequence: Option<u64>,
    /// The volume, when it is about one.
    pub volume: Option<String>,
    /// What is wrong.
    pub what: String,
}

/// What a verification saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Manifests read.
    pub manifests: u64,
    /// Layers checked.
    pub layers: u64,
    /// Blocks decoded and compared with their hashes.
    pub blocks: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What is wrong; empty when all is well.
    pub damages: Vec<Damage>,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.damages.is_empty()
    }
}

impl LayerStore {
    /// Re-reads all files of a group and checks hashes, chain links and roots. `expected` is the
    /// head as kept elsewhere: without it, newest layers that were dropped go unnoticed.
    ///
    /// Damage is reported, not returned as an error, so that one bad block does not hide another.
    ///
    /// # Errors
    /// [`LayerError::NotFound`] when there is no such group; an error of the file system that keeps
    /// the group from being listed at all.
    pub fn verify(
        &self,
        group: &str,
        expected: Option<&HeadAnchor>,
    ) -> Result<VerifyReport, LayerError> {
        self.verify_with(group, expected, &mut |_| {})
    }

    /// Like [`verify`](Self::verify), telling `progress` of the bytes read so far.
    ///
    /// # Errors
    /// As [`verify`](Self::verify).
    pub fn verify_with(
        &self,
        group: &str,
        expected: Option<&HeadAnchor>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<VerifyReport, LayerError> {
        // What is on disk now, not what was read when the store was opened.
        let known = self.groups().iter().any(|known| known == group);
        let catalog = if known {
            self.inner.read_catalog(group)?
        } else {
            Catalog::new(group)
        };
        if catalog.manifests.is_empty() && expected.is_none() {
            return Err(LayerError::NotFound {
                what: format!("group {group}"),
            });
        }
        let mut check = Check {
            inner: &self.inner,
            report: VerifyReport::default(),
            progress,
            trees: HashMap::new(),
        };
        check.manifests(&catalog);
        check.expected_head(&catalog, expected);
        Ok(check.report)
    }
}

struct Check<'a> {
    inner: &'a Inner,
    report: VerifyReport,
    progress: &'a mut dyn FnMut(u64),
    /// The newest state of each chain seen so far.
    trees: HashMap<(String, Uuid), (u64, StateTree)>,
}

impl Check<'_> {
    fn damage(&mut self, sequence: Option<u64>, volume: Option<&str>, what: impl Into<String>) {
        self.report.damages.push(Damage {
            sequence,
            volume: volume.map(str::to_owned),
            what: what.into(),
        });
    }

    fn manifests(&mut self, catalog: &Catalog) {
        for (&sequence, listed) in &catalog.manifests {
            match listed {
                Listed::Bad { path, what } => {
                    self.damage(
                        Some(sequence),
                        None,
                        format!("manifest {path} is damaged: {what}"),
                    );
                }
                Listed::Good(manifest) => {
                    self.report.manifests += 1;
                    for position in 0..manifest.volumes.len() {
                        self.layer(
                            catalog,
                            LayerRef {
                                manifest: manifest.clone(),
                                position,
                            },
                        );
                    }
                }
            }
        }
    }

    /// Checks one layer; those it is built on have been checked before.
    fn layer(&mut self, catalog: &Catalog, found: LayerRef) {
        self.report.layers += 1;
        let sequence = found.manifest.sequence;
        let volume = found.layer().volume.clone();
        if let Err(error) = catalog.chain(found.clone()) {
            self.damage(Some(sequence), Some(&volume), error.to_string());
        }
        match self.inner.read_index(&found) {
            Err(error) => self.damage(Some(sequence), Some(&volume), error.to_string()),
            Ok(index) => {
                self.report.bytes += found.layer().index.len;
                if let Err(error) = self.state(&found, &index) {
                    self.damage(Some(sequence), Some(&volume), error);
                }
                for (number, entries) in by_segment(&index, found.layer().segments.len()) {
                    if let Err(error) = self.segment(&found, &index, number, &entries) {
                        self.damage(Some(sequence), Some(&volume), error.to_string());
                    }
                }
            }
        }
    }

    /// The image that the layer leads to has the state root that the manifest promises.
    fn state(&mut self, found: &LayerRef, index: &LayerIndex) -> Result<(), String> {
        let layer = found.layer();
        let key = (layer.volume.clone(), layer.chain);
        let mut tree = match &layer.parent {
            None => {
                MergedIndex::new(vec![index.clone()])
                    .map_err(|error| format!("the baseline is incomplete: {error}"))?;
                StateTree::new(layer.volume_bytes, layer.block_size)
            }
            Some(parent) => match self.trees.get(&key) {
                Some((sequence, tree)) if *sequence == parent.sequence => tree.clone(),
                _ => {
                    return Err(format!(
                        "its parent {} could not be checked",
                        parent.sequence
                    ));
                }
            },
        };
        inner::apply(&mut tree, index, layer.kind);
        let matches = tree.root() == layer.state_root;
        self.trees.insert(key, (found.manifest.sequence, tree));
        if matches {
            return Ok(());
        }
        let kind = if layer.kind == LayerKind::Baseline {
            "baseline"
        } else {
            "chain"
        };
        Err(format!(
            "the image its {kind} leads to does not have the state root promised"
        ))
    }

    /// Every byte of a segment is what was written, and every block of it what was captured.
    fn segment(
        &mut self,
        found: &LayerRef,
        index: &LayerIndex,
        number: u32,
        entries: &[Entry],
    ) -> Result<(), LayerError> {
        let Some(named) = found.layer().segments.get(number as usize) else {
            return Ok(());
        };
        let path = self.inner.file_path(found, &named.file)?;
        let file = self
            .inner
            .fs
            .open(&path)
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => LayerError::damaged(&path, "the file is missing"),
                _ => LayerError::io("open", &path, error),
            })?;
        let len = file
            .len()
            .map_err(|error| LayerError::io("measure", &path, error))?;
        if len != named.len {
            return Err(LayerError::damaged(
                &path,
                format!("it has {len} bytes instead of {}", named.len),
            ));
        }
        let read = |offset: u64, buf: &mut [u8]| {
            file.read_exact_at(offset, buf)
                .map_err(|error| LayerError::io("read", &path, error))
        };
        let mut hasher = blake3::Hasher::new();
        let mut buf = vec![0; READ_BYTES];
        let mut offset = 0;
        while offset < len {
            let part = (len - offset).min(READ_BYTES as u64) as usize;
            let Some(bytes) = buf.get_mut(..part) else {
                break;
            };
            read(offset, bytes)?;
            hasher.update(bytes);
            offset += part as u64;
            self.report.bytes += part as u64;
            (self.progress)(self.report.bytes);
        }
        let whole = Hash32(*hasher.finalize().as_bytes()) == named.blake3;
        let mut header = [0; HEADER_LEN];
        read(0, &mut header)?;
        let expected = SegmentHeader {
            number,
            attempt: found.manifest.attempt,
            store: self.inner.id,
            volume: found.position as u32,
        };
        if SegmentHeader::decode(&path, &header)? != expected {
            return Err(LayerError::damaged(
                &path,
                "it is another segment than the one that was committed",
            ));
        }
        let mut decoder = Decoder::new()
            .map_err(|error| LayerError::io("prepare decompression of", &path, error))?;
        let mut bad_blocks = Vec::new();
        let block_size = u64::from(index.block_size);
        for entry in entries {
            let block_len = block_size.min(index.volume_bytes - entry.block * block_size) as usize;
            let mut stored = vec![0; entry.stored_len as usize];
            let mut block = vec![0; block_len];
            read(entry.offset, &mut stored)?;
            self.report.blocks += 1;
            if !decoder.decode(entry.codec, &stored, &mut block) || Hash32::of(&block) != entry.hash
            {
                bad_blocks.push(entry.block);
            }
        }
        match (bad_blocks.first(), whole) {
            (None, true) => Ok(()),
            (None, false) => Err(LayerError::damaged(
                &path,
                "its bytes have changed, although every block in it can still be read",
            )),
            (Some(first), _) => Err(LayerError::damaged(
                &path,
                format!(
                    "{} blocks in it are lost, the first of them block {first}",
                    bad_blocks.len()
                ),
            )),
        }
    }

    fn expected_head(&mut self, catalog: &Catalog, expected: Option<&HeadAnchor>) {
        let Some(expected) = expected else { return };
        if expected.group != catalog.group {
            let what = format!(
                "the expected head is of group {}, not of {}",
                expected.group, catalog.group
            );
            return self.damage(None, None, what);
        }
        let newest = catalog
            .manifests
            .last_key_value()
            .map_or(0, |(sequence, _)| *sequence);
        if newest < expected.sequence {
            let what = format!(
                "the newest layer is {newest}, but {} was committed: layers were dropped",
                expected.sequence
            );
            self.damage(None, None, what);
        }
        let Some(Listed::Good(manifest)) = catalog.manifests.get(&expected.sequence) else {
            if newest >= expected.sequence {
                self.damage(
                    Some(expected.sequence),
                    None,
                    "the expected head is not in the store",
                );
            }
            return;
        };
        for anchor in &expected.volumes {
            let same = manifest.volume(&anchor.volume).is_some_and(|layer| {
                layer.chain == anchor.chain && layer.state_root == anchor.state_root
            });
            if !same {
                let what = "the layer in the store is not the one that the expected head names";
                self.damage(Some(expected.sequence), Some(&anchor.volume), what);
            }
        }
    }
}

/// The entries of each of `count` segments in the order in which they lie there. A segment may have
/// none, when all its blocks were put again later.
fn by_segment(index: &LayerIndex, count: usize) -> BTreeMap<u32, Vec<Entry>> {
    let mut segments: BTreeMap<u32, Vec<Entry>> = (0..count as u32)
        .map(|number| (number, Vec::new()))
        .collect();
    for entry in &index.entries {
        segments.entry(entry.segment).or_default().push(*entry);
    }
    segments
        .values_mut()
        .for_each(|entries| entries.sort_by_key(|entry| entry.offset));
    segments
}
