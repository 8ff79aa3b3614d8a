//! What a group consists of: its manifests, and the rules by which they form chains. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use uuid::Uuid;

use super::error::LayerError;
use super::manifest::{GroupManifest, VolumeLayer};

/// A manifest as it was found in a group's folder.
#[derive(Clone, Debug)]
pub(crate) enum Listed {
    /// Readable.
    Good(Arc<GroupManifest>),
    /// There, but unreadable. What it names is unknown.
    Bad {
        /// Relative to the store.
        path: String,
        /// What is wrong with it.
        what: String,
    },
}

/// The manifests of one group by sequence number.
#[derive(Clone, Debug)]
pub(crate) struct Catalog {
    pub(crate) group: String,
    pub(crate) manifests: BTreeMap<u64, Listed>,
}

/// A layer of one volume, with the manifest it belongs to.
#[derive(Clone, Debug)]
pub struct LayerRef {
    /// The manifest.
    pub manifest: Arc<GroupManifest>,
    /// The volume's place in it.
    pub position: usize,
}

impl LayerRef {
    /// The layer.
    pub fn layer(&self) -> &VolumeLayer {
        &self.manifest.volumes[self.position]
    }

    fn find(manifest: &Arc<GroupManifest>, volume: &str) -> Option<Self> {
        let position = manifest
            .volumes
            .iter()
            .position(|layer| layer.volume == volume)?;
        Some(Self {
            manifest: manifest.clone(),
            position,
        })
    }
}

impl Catalog {
    pub(crate) fn new(group: &str) -> Self {
        Self {
            group: group.to_owned(),
            manifests: BTreeMap::new(),
        }
    }

    /// The sequence number that the next commit takes.
    pub(crate) fn next_sequence(&self) -> u64 {
        self.manifests
            .last_key_value()
            .map_or(1, |(sequence, _)| sequence.saturating_add(1))
    }

    /// Readable manifests, oldest first.
    pub(crate) fn readable(&self) -> impl DoubleEndedIterator<Item = &Arc<GroupManifest>> {
        self.manifests.values().filter_map(|listed| match listed {
            Listed::Good(manifest) => Some(manifest),
            Listed::Bad { .. } => None,
        })
    }

    /// Whether every manifest can be read.
    pub(crate) fn all_readable(&self) -> bool {
        self.manifests
            .values()
            .all(|listed| matches!(listed, Listed::Good(_)))
    }

    /// What is wrong with the manifests that cannot be read, oldest first.
    pub(crate) fn unreadable(&self) -> Vec<LayerError> {
        self.manifests
            .values()
            .filter_map(|listed| good(listed).err())
            .collect()
    }

    /// The newest manifest. When it cannot be read, an older one would be a wrong answer.
    pub(crate) fn head(&self) -> Result<Option<Arc<GroupManifest>>, LayerError> {
        self.manifests
            .last_key_value()
            .map(|(_, listed)| good(listed).cloned())
            .transpose()
    }

    /// The newest layer of `volume` at or before `at`.
    pub(crate) fn newest(&self, volume: &str, at: u64) -> Result<Option<LayerRef>, LayerError> {
        for (_, listed) in self.manifests.range(..=at).rev() {
            // An unreadable manifest may name the volume: passing it by would be a guess.
            if let Some(found) = LayerRef::find(good(listed)?, volume) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The layer of `volume` in the manifest `sequence`.
    pub(crate) fn layer(&self, volume: &str, sequence: u64) -> Result<LayerRef, LayerError> {
        let missing = || LayerError::NotFound {
            what: format!("layer {sequence} of {volume} in group {}", self.group),
        };
        let listed = self.manifests.get(&sequence).ok_or_else(missing)?;
        LayerRef::find(good(listed)?, volume).ok_or_else(missing)
    }

    /// The layers that make up the image at `layer`: newest first, the baseline last.
    pub(crate) fn chain(&self, layer: LayerRef) -> Result<Vec<LayerRef>, LayerError> {
        let mut chain = vec![layer];
        while let Some(child) = chain.last()
            && let Some(parent_ref) = child.layer().parent.clone()
        {
            let volume = child.layer().volume.clone();
            let broken = |what: String| LayerError::BrokenChain {
                group: self.group.clone(),
                volume: volume.clone(),
                sequence: child.manifest.sequence,
                what,
            };
            let sequence = parent_ref.sequence;
            let listed = self
                .manifests
                .get(&sequence)
                .ok_or_else(|| broken(format!("its parent {sequence} is missing")))?;
            let parent = LayerRef::find(good(listed)?, &volume)
                .ok_or_else(|| broken(format!("manifest {sequence} does not name the volume")))?;
            link(
                child.layer(),
                parent.layer(),
                parent_ref.state_root == parent.layer().state_root,
            )
            .map_err(|what| broken(format!("{what} of its parent {sequence}")))?;
            chain.push(parent);
        }
        Ok(chain)
    }
}

fn good(listed: &Listed) -> Result<&Arc<GroupManifest>, LayerError> {
    match listed {
        Listed::Good(manifest) => Ok(manifest),
        Listed::Bad { path, what } => Err(LayerError::damaged(path, what.clone())),
    }
}

fn link(child: &VolumeLayer, parent: &VolumeLayer, same_root: bool) -> Result<(), &'static str> {
    if child.chain != parent.chain {
        return Err("it does not belong to the chain");
    }
    if (child.volume_bytes, child.block_size) != (parent.volume_bytes, parent.block_size) {
        return Err("it does not have the size");
    }
    if !same_root {
        return Err("it was not built on the state");
    }
    Ok(())
}

// Names in the store. ------------------------------------------------------------------------------

/// The folder of a group: percent-encoded, so that any name is one folder's name.
pub(crate) fn group_folder(group: &str) -> Result<String, LayerError> {
    let bad = |what: &str| LayerError::BadRequest {
        what: format!("group name {group:?} {what}"),
    };
    if group.is_empty() {
        return Err(bad("is empty"));
    }
    let mut folder = String::from("g-");
    for byte in group.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
            folder.push(char::from(byte));
        } else {
            folder.push_str(&format!("%{byte:02x}"));
        }
    }
    if folder.len() > 200 {
        Err(bad("is too long"))
    } else {
        Ok(folder)
    }
}

/// The group that a folder belongs to.
pub(crate) fn group_of_folder(folder: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = folder.strip_prefix("g-")?.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first == b'%' {
            let (digits, tail) = rest.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = tail;
        } else {
            bytes.push(first);
        }
    }
    let group = String::from_utf8(bytes).ok()?;
    // Only the canonical spelling, so that no two folders are one group.
    (group_folder(&group).ok()? == folder).then_some(group)
}

/// The file of manifest `sequence`.
pub(crate) fn manifest_name(sequence: u64) -> String {
    format!("m-{sequence:020}")
}

/// The sequence number of a manifest's file.
pub(crate) fn sequence_of_name(name: &str) -> Option<u64> {
    let sequence = name.strip_prefix("m-")?.parse().ok()?;
    (manifest_name(sequence) == name).then_some(sequence)
}

/// The folder of an attempt.
pub(crate) fn attempt_name(attempt: Uuid) -> String {
    format!("a-{attempt}")
}

/// The manifest of an attempt before it is renamed.
pub(crate) fn temporary_name(attempt: Uuid) -> String {
    format!("tmp-{attempt}")
}

/// The attempt that a folder or temporary manifest belongs to.
pub(crate) fn attempt_of_name(name: &str) -> Option<Uuid> {
    let text = name
        .strip_prefix("a-")
        .or_else(|| name.strip_prefix("tmp-"))?;
    let attempt = Uuid::try_parse(text).ok()?;
    (attempt_name(attempt) == name || temporary_name(attempt) == name).then_some(attempt)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_group_name_is_one_folder_and_back(group in "\\PC{1,20}") {
            let folder = group_folder(&group).unwrap();
            prop_assert!(!folder.contains('/') && !folder.contains('.'));
            prop_assert_eq!(group_of_folder(&folder), Some(group));
        }

        #[test]
        fn arbitrary_folder_names_never_panic(name in "\\PC{0,20}") {
            if let Some(group) = group_of_folder(&name) {
                prop_assert_eq!(group_folder(&group).unwrap(), name.clone());
            }
            sequence_of_name(&name);
            attempt_of_name(&name);
        }
    }

    #[test]
    fn names_are_read_back_only_in_their_canonical_form() {
        assert_eq!(sequence_of_name(&manifest_name(7)), Some(7));
        assert_eq!(sequence_of_name("m-7"), None);
        assert_eq!(sequence_of_name("m-+0000000000000000007"), None);
        let attempt = Uuid::from_u128(5);
        assert_eq!(attempt_of_name(&attempt_name(attempt)), Some(attempt));
        assert_eq!(attempt_of_name(&temporary_name(attempt)), Some(attempt));
        assert_eq!(attempt_of_name(&attempt_name(attempt).to_uppercase()), None);
        assert_eq!(group_of_folder("g-%2D"), None);
        assert_eq!(group_of_folder("g-%2"), None);
        assert!(group_folder("").is_err());
        assert!(group_folder(&"x".repeat(300)).is_err());
    }
}
