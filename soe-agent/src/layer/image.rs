//! The image of a volume at one layer, read block by block out of the chain.

use std::sync::{Arc, Mutex, PoisonError};

use soe_common::BlockIndex;

use super::catalog::{Catalog, LayerRef};
use super::codec::Decoder;
use super::error::LayerError;
use super::fs::ReadFile;
use super::hash::Hash32;
use super::index::{Entry, LayerIndex};
use super::inner::Inner;
use super::merged::MergedIndex;
use super::segment::SegmentHeader;
use super::store::LayerStore;

/// Files kept open by an image, so that a long chain cannot use up the process' descriptors.
const MAX_OPEN_SEGMENTS: usize = 64;
/// Decoders kept for the next read.
const MAX_IDLE_DECODERS: usize = 8;

/// A volume as it was at one layer. Every block is checked against its hash when read. May be used
/// by several threads at once.
pub struct Image {
    index: MergedIndex,
    /// Newest first, as in the index.
    layers: Vec<LayerRef>,
    segments: SegmentCache,
    decoders: Mutex<Vec<(Decoder, Vec<u8>)>>,
}

impl LayerStore {
    /// The image of `volume` at the manifest `sequence`; at its newest layer without one.
    ///
    /// # Errors
    /// [`LayerError::NotFound`], [`LayerError::BrokenChain`] or [`LayerError::Damaged`].
    pub fn image(
        &self,
        group: &str,
        volume: &str,
        sequence: Option<u64>,
    ) -> Result<Image, LayerError> {
        let missing = || LayerError::NotFound {
            what: format!("layer of {volume} in group {group}"),
        };
        let chain = self.with_catalog(group, |catalog: &Catalog| {
            let layer = match sequence {
                Some(sequence) => catalog.layer(volume, sequence)?,
                None => catalog.newest(volume, u64::MAX)?.ok_or_else(missing)?,
            };
            catalog.chain(layer)
        })?;
        Image::open(self.inner.clone(), chain.ok_or_else(missing)?)
    }
}

impl Image {
    fn open(inner: Arc<Inner>, layers: Vec<LayerRef>) -> Result<Self, LayerError> {
        let indexes: Vec<LayerIndex> = layers
            .iter()
            .map(|layer| inner.read_index(layer))
            .collect::<Result<_, _>>()?;
        let index = MergedIndex::new(indexes)?;
        let segments = SegmentCache {
            inner,
            open: Mutex::new(Vec::new()),
        };
        Ok(Self {
            index,
            layers,
            segments,
            decoders: Mutex::new(Vec::new()),
        })
    }

    /// Where every block is.
    pub fn index(&self) -> &MergedIndex {
        &self.index
    }

    /// The chain, newest first.
    pub fn layers(&self) -> &[LayerRef] {
        &self.layers
    }

    /// Reads a block into `buf`, which must have the block's length ([`MergedIndex::block_range`]).
    ///
    /// # Errors
    /// [`LayerError::Damaged`] when the bytes are not those that were captured.
    pub fn read_block(&self, block: BlockIndex, buf: &mut [u8]) -> Result<(), LayerError> {
        if block.0 >= self.index.block_count()
            || buf.len() as u64 != self.index.block_range(block.0).len
        {
            return Err(LayerError::BadBlock {
                volume: self
                    .layers
                    .first()
                    .map(|layer| layer.layer().volume.clone())
                    .unwrap_or_default(),
                block: block.0,
                bytes: buf.len(),
                volume_bytes: self.index.volume_bytes(),
                block_size: self.index.block_size(),
            });
        }
        match self.index.lookup(block.0) {
            Some((layer, entry)) => self.read_entry(layer, entry, buf),
            None => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    /// Reads the block of `entry` of the layer at place `layer` into `buf`.
    pub(crate) fn read_entry(
        &self,
        layer: usize,
        entry: &Entry,
        buf: &mut [u8],
    ) -> Result<(), LayerError> {
        let Some(found) = self.layers.get(layer) else {
            return Err(LayerError::BadRequest {
                what: format!("the chain has no layer {layer}"),
            });
        };
        let (path, file) = self.segments.get(found, entry.segment)?;
        let (mut decoder, mut stored) = self.decoder(&path)?;
        stored.resize(entry.stored_len as usize, 0);
        read_at(&*file, &path, entry.offset, &mut stored)?;
        let good = decoder.decode(entry.codec, &stored, buf) && Hash32::of(buf) == entry.hash;
        let mut idle = self.decoders.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE_DECODERS {
            idle.push((decoder, stored));
        }
        if good {
            Ok(())
        } else {
            Err(LayerError::bad_content(&path, BlockIndex(entry.block)))
        }
    }

    fn decoder(&self, path: &str) -> Result<(Decoder, Vec<u8>), LayerError> {
        if let Some(idle) = self
            .decoders
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop()
        {
            return Ok(idle);
        }
        let new = Decoder::new()
            .map_err(|error| LayerError::io("prepare decompression of", path, error))?;
        Ok((new, Vec::new()))
    }
}

/// Open segments, the last used ones first.
struct SegmentCache {
    inner: Arc<Inner>,
    open: Mutex<Vec<OpenSegment>>,
}

#[derive(Clone)]
struct OpenSegment {
    sequence: u64,
    number: u32,
    path: Arc<str>,
    file: Arc<dyn ReadFile>,
}

impl SegmentCache {
    fn get(
        &self,
        found: &LayerRef,
        number: u32,
    ) -> Result<(Arc<str>, Arc<dyn ReadFile>), LayerError> {
        let sequence = found.manifest.sequence;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let place = open
            .iter()
            .position(|open| open.sequence == sequence && open.number == number);
        let segment = match place {
            Some(place) => open.remove(place),
            None => open_segment(&self.inner, found, number)?,
        };
        open.insert(0, segment.clone());
        open.truncate(MAX_OPEN_SEGMENTS);
        Ok((segment.path, segment.file))
    }
}

/// Opens a segment and makes sure that it is the one that the manifest names.
fn open_segment(inner: &Inner, found: &LayerRef, number: u32) -> Result<OpenSegment, LayerError> {
    let missing = || LayerError::damaged("a manifest", format!("it names no segment {number}"));
    let named = found
        .layer()
        .segments
        .get(number as usize)
        .ok_or_else(missing)?;
    let path = inner.file_path(found, &named.file)?;
    let file = inner.fs.open(&path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => LayerError::damaged(&path, "the file is missing"),
        _ => LayerError::io("open", &path, error),
    })?;
    let mut bytes = [0; super::segment::HEADER_LEN];
    read_at(&*file, &path, 0, &mut bytes)?;
    let expected = SegmentHeader {
        number,
        attempt: found.manifest.attempt,
        store: inner.id,
        volume: found.position as u32,
    };
    if SegmentHeader::decode(&path, &bytes)? != expected {
        return Err(LayerError::damaged(
            &path,
            "it is another segment than the one that was committed",
        ));
    }
    Ok(OpenSegment {
        sequence: found.manifest.sequence,
        number,
        path: path.into(),
        file: file.into(),
    })
}

fn read_at(file: &dyn ReadFile, path: &str, offset: u64, buf: &mut [u8]) -> Result<(), LayerError> {
    file.read_exact_at(offset, buf)
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => LayerError::damaged(path, "the file is cut short"),
            _ => LayerError::io("read", path, error),
        })
}
