//! The on-disk layer format, the rules of chains, the store.
//!
//! A *group* of volumes is captured at one instant. Each capture adds one *layer* to every volume
//! and one *manifest* to the group; a manifest is there, whole and durable, or it is not, and what
//! no manifest names is garbage. A volume's layers form a *chain*: a baseline, and layers that say
//! only what changed. The bytes are described in docs/layer-format.md.

mod error;

mod hash;

mod wire;

mod runs;

mod codec;

pub mod fs;

mod manifest;

mod index;

mod segment;

mod tree;

mod catalog;

mod files;

mod inner;

mod store;

mod attempt;

mod merged;

mod image;

mod verify;

#[cfg(test)]
pub(crate) mod tests;

pub use attempt::{LayerAttempt, Put};
pub use catalog::LayerRef;
pub use codec::{Codec, Compression};
pub use error::{ErrorClass, LayerError};
pub use hash::{Hash32, is_zero};
pub use image::Image;
pub use index::{Entry, LayerIndex};
pub use manifest::{
    CutLevel, CutMethod, CutRecord, FileRef, GroupManifest, HeadAnchor, LayerId, LayerKind,
    ParentRef, VolumeAnchor, VolumeCut, VolumeLayer,
};
pub use merged::{Extent, MergedIndex, Source};
pub use runs::RunSet;
pub use store::{Collected, LayerSpec, LayerStore, StoreOptions};
pub use tree::StateTree;
pub use verify::{Damage, VerifyReport};
