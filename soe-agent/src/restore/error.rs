//! What can go wrong in a restore.

use std::io;

use crate::layer::{ErrorClass, LayerError};

/// Errors of a restore.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The layers cannot give a block back.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The target is in use.
    #[error("refusing to restore onto {target}: {held}; release it first")]
    Held {
        /// The target.
        target: String,
        /// By whom.
        held: String,
    },
    /// The target cannot take the volume.
    #[error("cannot restore onto {target}: it has {target_bytes} bytes, the volume {volume_bytes}")]
    TooSmall {
        /// The target.
        target: String,
        /// Its size.
        target_bytes: u64,
        /// The volume's size.
        volume_bytes: u64,
    },
    /// The target is neither a file nor a block device.
    #[error("cannot restore onto {target}: it is neither a regular file nor a block device")]
    NotATarget {
        /// The target.
        target: String,
    },
    /// The target refused.
    #[error("restore: {call} {target}: {source}")]
    Target {
        /// What was tried.
        call: &'static str,
        /// The target.
        target: String,
        /// Why.
        source: io::Error,
    },
    /// Progress was told to stop.
    #[error(
        "the restore was cancelled after {bytes_done} bytes; run it again with --differential to resume"
    )]
    Cancelled {
        /// Bytes of the volume that are in place.
        bytes_done: u64,
    },
}

impl RestoreError {
    /// How to answer it.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Layer(error) => error.class(),
            Self::Held { .. } => ErrorClass::Refused,
            Self::TooSmall { .. } | Self::NotATarget { .. } => ErrorClass::Usage,
            Self::Target { .. } | Self::Cancelled { .. } => ErrorClass::Failed,
        }
    }
}
