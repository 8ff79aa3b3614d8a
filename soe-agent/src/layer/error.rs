//! What can go wrong in the layer store.

use std::io;

use soe_common::BlockIndex;

/// How an error is to be answered: the command line turns it into its exit code, the API into a
/// status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// Stored bytes are not what was stored: exit code 5.
    Integrity,
    /// The caller asked for something that makes no sense: exit code 2.
    Usage,
    /// Not now, or not safely: exit code 4.
    Refused,
    /// The host failed: exit code 1.
    Failed,
}

/// Errors of the layer store.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The file system under the store refused.
    #[error("layer store: {call} {path}: {source}")]
    Io {
        /// What was tried.
        call: &'static str,
        /// On what, relative to the store.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The store is full.
    #[error(
        "layer store: no space left to {call} {path}; earlier layers are intact, free some space and capture again"
    )]
    NoSpace {
        /// What was tried.
        call: &'static str,
        /// On what, relative to the store.
        path: String,
    },
    /// Stored bytes are not what was stored.
    #[error("layer store: {path} is damaged: {what}")]
    Damaged {
        /// The file, relative to the store.
        path: String,
        /// What is wrong with it.
        what: String,
    },
    /// A newer program wrote this.
    #[error(
        "layer store: {path} was written in {what} that this version does not know; use a newer soe"
    )]
    Unsupported {
        /// The file, relative to the store.
        path: String,
        /// The version or feature.
        what: String,
    },
    /// A layer that another one is built on is gone.
    #[error(
        "layer store: layer {sequence} of {volume} in group {group} cannot be resolved: {what}; take a new baseline"
    )]
    BrokenChain {
        /// The group.
        group: String,
        /// The volume.
        volume: String,
        /// The layer's sequence number.
        sequence: u64,
        /// What is missing or contradicts.
        what: String,
    },
    /// A differential or rescan was asked for where only a baseline is possible.
    #[error("group {group}: no differential of {volume} is possible: {reason}; take a baseline")]
    NeedsBaseline {
        /// The group.
        group: String,
        /// The volume.
        volume: String,
        /// Why.
        reason: String,
    },
    /// A baseline or rescan did not see the whole volume.
    #[error(
        "group {group}: the {kind} of {volume} is incomplete: block {block} was never put; the layer was not stored"
    )]
    Incomplete {
        /// The group.
        group: String,
        /// The volume.
        volume: String,
        /// `baseline` or `rescan`.
        kind: &'static str,
        /// The first block missing.
        block: u64,
    },
    /// A block does not fit the volume.
    #[error(
        "block {block} of {volume} with {bytes} bytes does not fit a volume of {volume_bytes} bytes in blocks of {block_size}"
    )]
    BadBlock {
        /// The volume.
        volume: String,
        /// The block.
        block: u64,
        /// Bytes given.
        bytes: usize,
        /// Bytes of the volume.
        volume_bytes: u64,
        /// Bytes of a block.
        block_size: u32,
    },
    /// The request itself is wrong.
    #[error("layer store: {what}")]
    BadRequest {
        /// What is wrong with it.
        what: String,
    },
    /// There is no such group, volume or layer.
    #[error("layer store: there is no {what}")]
    NotFound {
        /// What was looked for.
        what: String,
    },
    /// Somebody else is at work.
    #[error("layer store: {what}")]
    Busy {
        /// Who holds what.
        what: String,
    },
    /// The attempt failed before and can only be aborted.
    #[error(
        "group {group}: this capture failed to store its data earlier and cannot be committed; capture again"
    )]
    AttemptFailed {
        /// The group.
        group: String,
    },
}

impl LayerError {
    /// How to answer it.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Damaged { .. } | Self::BrokenChain { .. } => ErrorClass::Integrity,
            Self::BadBlock { .. } | Self::BadRequest { .. } | Self::NotFound { .. } => {
                ErrorClass::Usage
            }
            Self::NeedsBaseline { .. } | Self::Busy { .. } => ErrorClass::Refused,
            Self::Io { .. }
            | Self::NoSpace { .. }
            | Self::Unsupported { .. }
            | Self::Incomplete { .. }
            | Self::AttemptFailed { .. } => ErrorClass::Failed,
        }
    }

    /// Wraps an error of `call` on `path`.
    pub(crate) fn io(call: &'static str, path: &str, source: io::Error) -> Self {
        let full = matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        );
        let path = if path.is_empty() {
            ".".to_owned()
        } else {
            path.to_owned()
        };
        if full {
            Self::NoSpace { call, path }
        } else {
            Self::Io { call, path, source }
        }
    }

    /// `path` is damaged.
    pub(crate) fn damaged(path: &str, what: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            what: what.into(),
        }
    }

    /// A block was read whose bytes are not those of the index.
    pub(crate) fn bad_content(path: &str, block: BlockIndex) -> Self {
        Self::damaged(
            path,
            format!(
                "block {} does not have the content its index promises",
                block.0
            ),
        )
    }
}
