//! The manifest: the one file whose appearance commits a layer of every volume of a group.

use std::fmt;

use serde::{Deserialize, Serialize};
use soe_common::Epoch;
use uuid::Uuid;

use super::error::LayerError;
use super::hash::{Domain, Hash32};
use crate::seam::{GenerationEnd, Misses, UnixNanos};

const MAGIC: &[u8; 8] = b"SOEMANI\0";
const VERSION: u16 = 1;
const HEADER_LEN: usize = 24;
const HASH_PURPOSE: &str = "soe layer manifest 1";
/// No manifest is longer; anything that claims to be is not read into memory.
pub(crate) const MAX_MANIFEST_LEN: u64 = 64 << 20;

/// What a layer promises about the bytes in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CutLevel {
    /// The device at one instant, as after a power cut.
    Crash,
    /// The file system was frozen at the cut.
    Filesystem,
    /// The application's hooks ran around the cut.
    Application,
}

impl fmt::Display for CutLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Crash => "crash",
            Self::Filesystem => "filesystem",
            Self::Application => "application",
        })
    }
}

/// How the cut was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CutMethod {
    /// The device stood still of itself; nothing was paused.
    Optimistic,
    /// The file systems were frozen.
    Freeze,
    /// A snapshot of the device or file below.
    Native,
    /// The device-mapper device was suspended.
    Suspend,
}

impl fmt::Display for CutMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Optimistic => "optimistic",
            Self::Freeze => "freeze",
            Self::Native => "native",
            Self::Suspend => "suspend",
        })
    }
}

/// What a layer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerKind {
    /// Every block; begins a chain.
    Baseline,
    /// The blocks that the change map named.
    Differential,
    /// Every block was read and compared with the chain, only what differs is stored. Continues the
    /// chain when the change map cannot be trusted.
    Rescan,
}

impl LayerKind {
    /// The name in records and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Differential => "differential",
            Self::Rescan => "rescan",
        }
    }

    /// Whether a layer of this kind must have seen every block of the volume.
    pub const fn reads_everything(self) -> bool {
        matches!(self, Self::Baseline | Self::Rescan)
    }
}

impl fmt::Display for LayerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One volume's part of a cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeCut {
    /// The generation of the change map.
    pub generation: Uuid,
    /// The epoch that began with the cut.
    pub cut_epoch: Epoch,
    /// The stamp from which the *next* layer has to select: normally `cut_epoch`, earlier after
    /// failed or missed writes.
    pub since_epoch: Epoch,
    /// Why the change map could not be used, when it could not.
    pub rescan_reason: Option<GenerationEnd>,
    /// What was missed by the cut since tracking was attached: the next capture counts from here.
    pub misses: Misses,
    /// Bytes read from the volume for this layer, all passes together.
    pub bytes_read: u64,
}

/// What the capture knows of the cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CutRecord {
    /// The level reached by every volume.
    pub level: CutLevel,
    /// How.
    pub method: CutMethod,
    /// The longest time a write was held back, in microseconds.
    pub pause_us: u64,
    /// The distance in time between the cuts of the group's volumes, in microseconds.
    pub skew_us: u64,
    /// When the capture began.
    pub started_at: UnixNanos,
    /// The instant the layer shows.
    pub cut_at: UnixNanos,
    /// When the last byte had been read and handed over.
    pub finished_at: UnixNanos,
    /// One for each volume of the attempt, in its order.
    pub volumes: Vec<VolumeCut>,
}

/// The identity of a layer: 16 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct LayerId(String);

impl LayerId {
    /// The first 64 bits of a random uuid.
    pub(crate) fn from_uuid(uuid: Uuid) -> Self {
        Self(format!("{:016x}", uuid.as_u64_pair().0))
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for LayerId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let digit = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        if text.len() == 16 && text.bytes().all(digit) {
            Ok(Self(text))
        } else {
            Err(format!(
                "{text:?} is not a layer id of 16 hexadecimal digits"
            ))
        }
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// The state a layer is built on. It names content, never files, so that the parent may be merged
/// with its own parents without making this layer invalid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParentRef {
    /// The parent's sequence number.
    pub sequence: u64,
    /// The root over the whole image at the parent.
    pub state_root: Hash32,
}

/// A file of a layer, in the folder of its attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRef {
    /// The name in the attempt's folder.
    pub file: String,
    /// Bytes.
    pub len: u64,
    /// BLAKE3 of all bytes.
    pub blake3: Hash32,
}

/// The layer of one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeLayer {
    /// The layer's identity.
    pub id: LayerId,
    /// The volume's name in the group.
    pub volume: String,
    /// What identified the device at the cut.
    pub device_id: String,
    /// Bytes of the volume.
    pub volume_bytes: u64,
    /// Bytes of a block.
    pub block_size: u32,
    /// What the layer holds.
    pub kind: LayerKind,
    /// The chain: one baseline and what is built on it.
    pub chain: Uuid,
    /// What it is built on; none for a baseline.
    pub parent: Option<ParentRef>,
    /// The generation of the change map.
    pub generation: Uuid,
    /// The epoch that began with the cut.
    #[serde(with = "epoch")]
    pub cut_epoch: Epoch,
    /// The stamp from which the next layer has to select.
    #[serde(with = "epoch")]
    pub since_epoch: Epoch,
    /// What was missed by the cut since tracking was attached: the next capture counts from here.
    pub misses: Misses,
    /// Why the change map could not be used, when it could not.
    pub rescan_reason: Option<GenerationEnd>,
    /// Bytes read from the volume.
    pub bytes_read: u64,
    /// Bytes this layer takes in the store, without the manifest.
    pub bytes_stored: u64,
    /// Blocks with data in this layer.
    pub data_blocks: u64,
    /// Blocks that this layer says are zero.
    pub hole_blocks: u64,
    /// Data, in the order of the index' segment numbers.
    pub segments: Vec<FileRef>,
    /// The index.
    pub index: FileRef,
    /// The root over this layer's representation: its index and segments.
    pub delta_root: Hash32,
    /// The root over the whole image at this point.
    pub state_root: Hash32,
}

impl VolumeLayer {
    /// Blocks that this layer has something to say of.
    pub fn changed_blocks(&self) -> u64 {
        self.data_blocks.saturating_add(self.hole_blocks)
    }

    /// Blocks of the volume.
    pub fn block_count(&self) -> u64 {
        self.volume_bytes
            .div_ceil(u64::from(self.block_size.max(1)))
    }

    /// The root over this layer's representation, as its parts say.
    pub(crate) fn compute_delta_root(index: &FileRef, segments: &[FileRef]) -> Hash32 {
        let mut bytes = Vec::with_capacity(44 + segments.len() * 40);
        bytes.extend_from_slice(&index.blake3.0);
        bytes.extend_from_slice(&index.len.to_le_bytes());
        bytes.extend_from_slice(&(segments.len() as u32).to_le_bytes());
        for segment in segments {
            bytes.extend_from_slice(&segment.blake3.0);
            bytes.extend_from_slice(&segment.len.to_le_bytes());
        }
        Domain::new("soe layer delta root 1").hash(&[&bytes])
    }
}

/// One commit of a group: one layer of each of its volumes, cut at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupManifest {
    /// The store it belongs to.
    pub store: Uuid,
    /// The group.
    pub group: String,
    /// The commit's number in the group; ascending, gaps are allowed.
    pub sequence: u64,
    /// The attempt whose folder holds the files.
    pub attempt: Uuid,
    /// The level reached.
    pub level: CutLevel,
    /// How the cut was made.
    pub method: CutMethod,
    /// The longest time a write was held back, in microseconds.
    pub pause_us: u64,
    /// The distance in time between the volumes' cuts, in microseconds.
    pub skew_us: u64,
    /// When the capture began.
    pub started_at: UnixNanos,
    /// The instant the layer shows.
    pub cut_at: UnixNanos,
    /// When the last byte had been read.
    pub finished_at: UnixNanos,
    /// The layers.
    pub volumes: Vec<VolumeLayer>,
    /// Sequence numbers whose layers were merged into this one. Empty in version 1.
    pub replaces: Vec<u64>,
    /// How the blocks are encrypted. Null in version 1.
    pub encryption: Option<serde_json::Value>,
}

impl GroupManifest {
    /// The layer of `volume`.
    pub fn volume(&self, volume: &str) -> Option<&VolumeLayer> {
        self.volumes.iter().find(|layer| layer.volume == volume)
    }

    /// What proves, kept elsewhere, that no newer layer was dropped from the store.
    pub fn anchor(&self) -> HeadAnchor {
        HeadAnchor {
            group: self.group.clone(),
            sequence: self.sequence,
            volumes: self
                .volumes
                .iter()
                .map(|layer| VolumeAnchor {
                    volume: layer.volume.clone(),
                    chain: layer.chain,
                    state_root: layer.state_root,
                })
                .collect(),
        }
    }
}

/// The head of a group as it is known elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadAnchor {
    /// The group.
    pub group: String,
    /// The sequence number of its newest manifest.
    pub sequence: u64,
    /// Its volumes.
    pub volumes: Vec<VolumeAnchor>,
}

/// One volume of a [`HeadAnchor`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeAnchor {
    /// The volume.
    pub volume: String,
    /// Its chain.
    pub chain: Uuid,
    /// The root over its image.
    pub state_root: Hash32,
}

/// Writes the bytes of a manifest file; the layout is in docs/layer-format.md.
pub(crate) fn encode(manifest: &GroupManifest) -> Result<Vec<u8>, LayerError> {
    let body = serde_json::to_vec(manifest).map_err(|error| LayerError::BadRequest {
        what: format!("cannot write the manifest: {error}"),
    })?;
    Ok(seal(&body))
}

/// The bytes of a manifest file around its body.
pub(super) fn seal(body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + body.len() + 36);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&0u16.to_le_bytes());
    bytes.extend_from_slice(&0u32.to_le_bytes());
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    bytes.extend_from_slice(body);
    let hash = Domain::new(HASH_PURPOSE).hash(&[&bytes]);
    bytes.extend_from_slice(&hash.0);
    bytes.extend_from_slice(&0u32.to_le_bytes());
    bytes
}

/// Reads the bytes of the manifest file `path`.
///
/// # Errors
/// [`LayerError::Damaged`] or [`LayerError::Unsupported`]; arbitrary bytes never panic.
pub(crate) fn decode(path: &str, bytes: &[u8]) -> Result<GroupManifest, LayerError> {
    let damaged = |what: &str| LayerError::damaged(path, what);
    let (header, rest) = bytes
        .split_at_checked(HEADER_LEN)
        .ok_or_else(|| damaged("the manifest is cut short"))?;
    let mut header_fields = super::wire::Reader::new(header);
    if header_fields.take(8) != Some(MAGIC.as_slice()) {
        return Err(damaged("it does not begin like a manifest"));
    }
    let version = header_fields.u16().unwrap_or_default();
    let flags = header_fields.u16().unwrap_or_default();
    let reserved = header_fields.u32().unwrap_or_default();
    let body_len = header_fields.u64().unwrap_or_default();
    let body_len =
        usize::try_from(body_len).map_err(|_| damaged("the length of its body is impossible"))?;
    let (body, rest) = rest
        .split_at_checked(body_len)
        .ok_or_else(|| damaged("the manifest is cut short"))?;
    let (hash, signature_len) = rest
        .split_at_checked(32)
        .ok_or_else(|| damaged("the manifest is cut short"))?;
    let covered = bytes.get(..HEADER_LEN + body_len).unwrap_or_default();
    if Domain::new(HASH_PURPOSE).hash(&[covered]).0.as_slice() != hash {
        return Err(damaged("the manifest does not have the hash it carries"));
    }
    // Only now: a flipped bit must be called damage, not a newer version.
    if version != VERSION || flags != 0 || reserved != 0 {
        return Err(LayerError::Unsupported {
            path: path.to_owned(),
            what: format!("manifest version {version}"),
        });
    }
    if signature_len != 0u32.to_le_bytes() {
        return Err(damaged("unknown bytes follow the manifest's hash"));
    }
    let manifest: GroupManifest = serde_json::from_slice(body)
        .map_err(|error| damaged(&format!("its body cannot be read: {error}")))?;
    check(path, &manifest)?;
    Ok(manifest)
}

/// The rules that a single manifest must keep.
fn check(path: &str, manifest: &GroupManifest) -> Result<(), LayerError> {
    let damaged = |what: String| Err(LayerError::damaged(path, what));
    if manifest.encryption.is_some() || !manifest.replaces.is_empty() {
        return Err(LayerError::Unsupported {
            path: path.to_owned(),
            what: "a merged or encrypted form".into(),
        });
    }
    if manifest.volumes.is_empty() {
        return damaged("it names no volume".into());
    }
    for (position, layer) in manifest.volumes.iter().enumerate() {
        let name = &layer.volume;
        if manifest
            .volumes
            .iter()
            .take(position)
            .any(|other| &other.volume == name)
        {
            return damaged(format!("it names volume {name} twice"));
        }
        if !valid_geometry(layer.volume_bytes, layer.block_size) {
            return damaged(format!(
                "volume {name} cannot have {} bytes in blocks of {}",
                layer.volume_bytes, layer.block_size
            ));
        }
        if layer.parent.is_some() == (layer.kind == LayerKind::Baseline) {
            return damaged(format!(
                "the parent of the {} of {name} is wrong",
                layer.kind
            ));
        }
        if layer
            .parent
            .as_ref()
            .is_some_and(|parent| parent.sequence >= manifest.sequence)
        {
            return damaged(format!(
                "the layer of {name} claims to be older than its parent"
            ));
        }
        let files = layer.segments.iter().chain([&layer.index]);
        for file in files {
            if !valid_file_name(&file.file) {
                return damaged(format!(
                    "{:?} cannot be the name of a layer's file",
                    file.file
                ));
            }
        }
        if VolumeLayer::compute_delta_root(&layer.index, &layer.segments) != layer.delta_root {
            return damaged(format!("the delta root of {name} does not match its files"));
        }
    }
    Ok(())
}

/// Whether a volume may have this shape: at least a byte, blocks of a power of two from 512 bytes to
/// 16 MiB.
pub(crate) fn valid_geometry(volume_bytes: u64, block_size: u32) -> bool {
    volume_bytes > 0 && block_size.is_power_of_two() && (512..=16 << 20).contains(&block_size)
}

/// A name that cannot lead out of the attempt's folder.
fn valid_file_name(name: &str) -> bool {
    let plain = |c: u8| c.is_ascii_alphanumeric() || c == b'.' || c == b'-';
    !name.is_empty() && name.len() <= 64 && !name.starts_with('.') && name.bytes().all(plain)
}

mod epoch {
    use serde::{Deserialize, Deserializer, Serializer};
    use soe_common::Epoch;

    pub(super) fn serialize<S: Serializer>(
        epoch: &Epoch,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(epoch.0)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Epoch, D::Error> {
        u32::deserialize(deserializer).map(Epoch)
    }
}
