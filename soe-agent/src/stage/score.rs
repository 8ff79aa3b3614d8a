//! Words of staging: what an access did, and a range that is worth copying.

use serde::{Deserialize, Serialize};

use crate::seam::ByteRange;

/// Whether an access read or wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// It read.
    Read,
    /// It wrote, discarded or zeroed.
    Write,
}

/// A range worth staging.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoredRange {
    /// The range.
    pub range: ByteRange,
    /// Its score; only the order matters.
    pub score: f64,
}
