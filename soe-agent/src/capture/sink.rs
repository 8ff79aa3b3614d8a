//! Where captured blocks go.

use soe_common::BlockIndex;

use super::types::{GroupCut, LayerKind};

/// Why a sink failed.
pub type SinkError = Box<dyn std::error::Error + Send + Sync>;

/// What the layer of one volume is going to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumePlan {
    /// The volume's name.
    pub volume: String,
    /// Its bytes.
    pub volume_bytes: u64,
    /// Bytes of a block; only the last one may be shorter.
    pub block_size: u32,
    /// What the layer holds. Of a rescan every block is put, and the sink keeps those that differ.
    pub kind: LayerKind,
}

/// One attempt at a layer of every volume of a group.
///
/// Blocks are counted from the start of their volume, in units of its change map's block size. A
/// block may be put several times: the last one counts, also when it equals what the chain has
/// already. Nothing is a layer before [`commit`](Self::commit) returned.
pub trait LayerSink: Send {
    /// Called once before anything is put, with one entry for each volume.
    fn begin(&mut self, volumes: &[VolumePlan]) -> Result<(), SinkError>;
    /// Takes a block of `volume` (its number in the group); only the last block may be short.
    fn put_block(&mut self, volume: usize, block: BlockIndex, data: &[u8])
    -> Result<(), SinkError>;
    /// Whether the layer under way, with the chain it builds on, says that `block` has this content.
    fn agrees(&self, volume: usize, block: BlockIndex, data: &[u8]) -> Result<bool, SinkError>;
    /// Makes the layers of all volumes durable, all or none.
    fn commit(&mut self, cut: &GroupCut) -> Result<(), SinkError>;
    /// Gives up what was put. Called at most once, instead of or after a failed commit.
    fn abort(&mut self);
}
