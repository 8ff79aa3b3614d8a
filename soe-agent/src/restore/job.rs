//! Carries out a restore plan.

use std::ops::ControlFlow;

use super::error::RestoreError;
use super::plan::{Plan, Step};
use super::target::Target;
use crate::layer::{Hash32, Image, Source, is_zero};
use crate::seam::ByteRange;

/// Blocks that staging still has, found by what they contain.
pub trait StagedBlocks: Send + Sync {
    /// Fills all of `buf` with a block whose BLAKE3 is `hash`, and says whether it could. The bytes
    /// are hashed again before they are used, so a stale answer costs time and nothing else.
    fn get(&self, hash: &[u8; 32], buf: &mut [u8]) -> bool;
}

/// No staging.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoStaging;

impl StagedBlocks for NoStaging {
    fn get(&self, _hash: &[u8; 32], _buf: &mut [u8]) -> bool {
        false
    }
}

/// What is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Everything.
    #[default]
    Full,
    /// Only blocks whose present content differs. Also the way to resume.
    Differential,
}

/// How far a restore is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the volume that are in place.
    pub bytes_done: u64,
    /// Bytes of the volume.
    pub bytes_total: u64,
    /// The layer being restored, 0 for the newest.
    pub layer: usize,
    /// Layers of the chain.
    pub layers: usize,
}

/// What a restore did. All in bytes of the volume; the sum of the first four is its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestoreStats {
    /// Written, taken from staging.
    pub bytes_from_staging: u64,
    /// Written, read from the store.
    pub bytes_from_store: u64,
    /// Zero in the layer, and made zero or known to be.
    pub bytes_zeroed: u64,
    /// Left alone because the content was right.
    pub bytes_unchanged: u64,
    /// Blocks that staging offered with other bytes than it promised.
    pub staged_mismatches: u64,
}

impl RestoreStats {
    fn bytes_done(&self) -> u64 {
        self.bytes_from_staging + self.bytes_from_store + self.bytes_zeroed + self.bytes_unchanged
    }
}

/// Bytes gathered for one write.
const WRITE_BYTES: usize = 1 << 20;

/// Restores `image` onto `target` in the order of `plan`. `progress` is told about every mebibyte or
/// so, and may stop the job. When this returns `Ok` the target is durable.
///
/// # Errors
/// [`RestoreError::Layer`] when a block cannot be given back as it was captured: nothing wrong is
/// ever written in its place. The target then has a part of the image.
pub fn restore(
    image: &Image,
    plan: &Plan,
    target: &dyn Target,
    staged: &dyn StagedBlocks,
    mode: Mode,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> Result<RestoreStats, RestoreError> {
    let mut job = Job {
        image,
        target,
        staged,
        mode,
        progress,
        stats: RestoreStats::default(),
        block: vec![0; image.index().block_size() as usize],
        present: Vec::new(),
        gathered: Gathered {
            offset: 0,
            bytes: Vec::with_capacity(WRITE_BYTES),
        },
    };
    for step in plan.steps() {
        match step.source {
            Source::Data { .. } => job.data(step)?,
            Source::Hole => job.hole(step)?,
        }
    }
    target
        .sync()
        .map_err(|source| job.target_error("sync", source))?;
    Ok(job.stats)
}

struct Job<'a> {
    image: &'a Image,
    target: &'a dyn Target,
    staged: &'a dyn StagedBlocks,
    mode: Mode,
    progress: &'a mut dyn FnMut(&Progress) -> ControlFlow<()>,
    stats: RestoreStats,
    block: Vec<u8>,
    present: Vec<u8>,
    gathered: Gathered,
}

/// Adjacent blocks on their way to the target.
struct Gathered {
    offset: u64,
    bytes: Vec<u8>,
}

impl Job<'_> {
    fn data(&mut self, step: &Step) -> Result<(), RestoreError> {
        let index = self.image.index();
        for nth in 0..step.count {
            let range = index.block_range(step.start + nth);
            let Some(entry) = index.entry(step, nth) else {
                continue;
            };
            if self.mode == Mode::Differential && self.present_hash(range)? == entry.hash {
                self.stats.bytes_unchanged += range.len;
            } else {
                self.block.resize(range.len as usize, 0);
                let from_staging = self.staged.get(&entry.hash.0, &mut self.block);
                if from_staging && Hash32::of(&self.block) == entry.hash {
                    self.stats.bytes_from_staging += range.len;
                } else {
                    self.stats.staged_mismatches += u64::from(from_staging);
                    self.image.read_entry(step.layer, entry, &mut self.block)?;
                    self.stats.bytes_from_store += range.len;
                }
                self.gather(range.offset)?;
            }
            if (nth + 1) % self.blocks_between_reports() == 0 {
                self.report(step)?;
            }
        }
        self.flush()?;
        self.report(step)
    }

    fn hole(&mut self, step: &Step) -> Result<(), RestoreError> {
        let index = self.image.index();
        let whole = ByteRange::new(
            index.block_range(step.start).offset,
            index.block_range(step.end() - 1).end() - index.block_range(step.start).offset,
        );
        if self.mode == Mode::Full || self.target.starts_zeroed() {
            if !self.target.starts_zeroed() {
                self.zero(whole)?;
            }
            self.stats.bytes_zeroed += whole.len;
            return self.report(step);
        }
        // Runs of what is not zero yet are made zero in one go.
        let mut dirty: Option<ByteRange> = None;
        for nth in 0..step.count {
            let range = index.block_range(step.start + nth);
            self.read_present(range)?;
            if is_zero(&self.present) {
                self.stats.bytes_unchanged += range.len;
                if let Some(run) = dirty.take() {
                    self.zero(run)?;
                }
            } else {
                self.stats.bytes_zeroed += range.len;
                dirty.get_or_insert(ByteRange::new(range.offset, 0)).len += range.len;
            }
            if (nth + 1) % self.blocks_between_reports() == 0 {
                self.report(step)?;
            }
        }
        if let Some(run) = dirty {
            self.zero(run)?;
        }
        self.report(step)
    }

    fn blocks_between_reports(&self) -> u64 {
        (WRITE_BYTES as u64 / u64::from(self.image.index().block_size())).max(1)
    }

    /// Adds the block in hand, writing when it does not continue what was gathered or enough is.
    fn gather(&mut self, offset: u64) -> Result<(), RestoreError> {
        let end = self.gathered.offset + self.gathered.bytes.len() as u64;
        if end != offset || self.gathered.bytes.len() + self.block.len() > WRITE_BYTES {
            self.flush()?;
            self.gathered.offset = offset;
        }
        self.gathered.bytes.extend_from_slice(&self.block);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), RestoreError> {
        if !self.gathered.bytes.is_empty() {
            let written = self
                .target
                .write_at(self.gathered.offset, &self.gathered.bytes);
            written.map_err(|source| self.target_error("write to", source))?;
            self.gathered.bytes.clear();
        }
        Ok(())
    }

    fn zero(&self, range: ByteRange) -> Result<(), RestoreError> {
        self.target
            .zero_at(range)
            .map_err(|source| self.target_error("write zeroes to", source))
    }

    fn read_present(&mut self, range: ByteRange) -> Result<(), RestoreError> {
        self.present.resize(range.len as usize, 0);
        let read = self.target.read_at(range.offset, &mut self.present);
        read.map_err(|source| self.target_error("read", source))
    }

    fn present_hash(&mut self, range: ByteRange) -> Result<Hash32, RestoreError> {
        self.read_present(range)?;
        Ok(Hash32::of(&self.present))
    }

    fn report(&mut self, step: &Step) -> Result<(), RestoreError> {
        let progress = Progress {
            bytes_done: self.stats.bytes_done(),
            bytes_total: self.image.index().volume_bytes(),
            layer: step.layer,
            layers: self.image.layers().len(),
        };
        match (self.progress)(&progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => {
                self.flush()?;
                Err(RestoreError::Cancelled {
                    bytes_done: progress.bytes_done,
                })
            }
        }
    }

    fn target_error(&self, call: &'static str, source: std::io::Error) -> RestoreError {
        RestoreError::Target {
            call,
            target: self.target.name().to_owned(),
            source,
        }
    }
}
