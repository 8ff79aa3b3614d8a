//! One volume under capture: what it was last read by, and what the change map says of it.

use std::io;
use std::ops::Range;
use std::time::Duration;

use soe_common::{BlockIndex, Epoch};
use uuid::Uuid;

use super::audit;
use super::error::CaptureError;
use super::pace::DeadlinePace;
use super::ranges;
use super::select::{self, Marks, Reference};
use super::sink::LayerSink;
use super::types::{CapturePolicy, CutRecord, LayerKind, Level, Mutation, VolumeCut, VolumeParts};
use crate::seam::{ByteRange, Clock, GenerationEnd, Misses, Pace, Reading, Tracking};

/// Longer than balancing the books takes: a grace period and the looks before and after it.
const SETTLING: Duration = Duration::from_millis(24);

/// One volume under capture.
pub(super) struct Volume<'a> {
    pub(super) parts: VolumeParts<'a>,
    pub(super) unit: u32,
    pub(super) bytes: u64,
    pub(super) generation: Uuid,
    pub(super) kind: LayerKind,
    pub(super) reference: Reference,
    pub(super) start: Misses,
    /// The next scan takes stamps of this epoch or later; `None` takes everything.
    pub(super) since: Option<Epoch>,
    /// Completions missed before the reads that `since` stands for began.
    pub(super) missed_before: u64,
    pub(super) bytes_read: u64,
    /// The try under way.
    pub(super) epoch: Epoch,
    pub(super) first: Option<Reading>,
    pub(super) scan: Vec<ByteRange>,
    pub(super) residual: Residual,
}

/// Blocks held in memory: offset of the block and place of its bytes.
#[derive(Default)]
pub(super) struct Residual {
    pub(super) bytes: Vec<u8>,
    pub(super) blocks: Vec<(u64, Range<usize>)>,
}

impl<'a> Volume<'a> {
    pub(super) fn begin(
        parts: VolumeParts<'a>,
        baseline: bool,
        policy: &CapturePolicy,
    ) -> Result<Self, CaptureError> {
        let map = parts.map;
        let unit = map.block_size();
        let bytes = map.volume_bytes();
        let bad = |what: String| CaptureError::BadVolume {
            volume: map.volume().to_owned(),
            what,
        };
        if unit == 0 {
            return Err(bad("its change map has blocks of no size".to_owned()));
        }
        for reader in [parts.reader, parts.urgent] {
            if reader.len() != bytes {
                return Err(bad(format!(
                    "its change map covers {bytes} bytes, but {} can be read; it was resized, detach and attach it",
                    reader.len()
                )));
            }
        }
        let generation = map.generation();
        let (kind, since) = select::layer_kind(baseline, parts.base.as_ref(), generation);
        map.settle()?;
        let start = map.reading()?.misses;
        let volume = Self {
            unit,
            bytes,
            generation,
            kind,
            reference: Reference::new(parts.base.as_ref(), generation, map.rest()),
            start,
            since,
            missed_before: start.complete,
            bytes_read: 0,
            epoch: Epoch::FIRST,
            first: None,
            scan: Vec::new(),
            residual: Residual::default(),
            parts,
        };
        volume.check_tracking()?;
        volume.check_marks(&start, policy)?;
        Ok(volume)
    }

    pub(super) fn name(&self) -> String {
        self.parts.map.volume().to_owned()
    }

    pub(super) fn unsettled(&self, now: &Misses) -> bool {
        now.failed_writes > self.parts.settled_failures
    }

    /// The totals at the first reading of the window.
    pub(super) fn misses(&self) -> Misses {
        self.first.map(|first| first.misses).unwrap_or_default()
    }

    pub(super) fn read_error(&self, source: io::Error) -> CaptureError {
        match source.kind() {
            io::ErrorKind::Interrupted => CaptureError::Cancelled,
            _ => CaptureError::Read {
                volume: self.name(),
                source,
            },
        }
    }

    /// What has to be read again, in whole blocks of the layer. `now` are the totals before the scan.
    pub(super) fn scan(
        &self,
        now: &Misses,
        policy: &CapturePolicy,
    ) -> Result<Vec<ByteRange>, CaptureError> {
        let missed = now.complete > self.missed_before && !policy.mutated(Mutation::TrustPasses);
        let since = self.since.map(|since| match missed {
            true => since.min(self.reference.epoch),
            false => since,
        });
        Ok(match since {
            None if self.bytes == 0 => Vec::new(),
            None => vec![ByteRange::new(0, self.bytes)],
            Some(since) => {
                let changed = self.parts.map.changed_since(since)?;
                ranges::widen(&changed, self.unit, self.bytes)
            }
        })
    }

    pub(super) fn take_first(
        &mut self,
        clock: &dyn Clock,
        until: Duration,
        policy: &CapturePolicy,
    ) -> Result<bool, CaptureError> {
        let mut settled = false;
        loop {
            let reading = self.parts.map.reading()?;
            self.first = Some(reading);
            if reading.nothing_in_flight() || policy.mutated(Mutation::NoInFlightCheck) {
                return Ok(true);
            }
            if clock.monotonic() >= until {
                return Ok(false);
            }
            // Under a freeze this may be the only rest in which the books can be balanced.
            if !settled && clock.monotonic() + SETTLING <= until {
                self.parts.map.settle()?;
                settled = true;
                continue;
            }
            clock.sleep(Duration::from_micros(100));
        }
    }

    /// Reads the residual into memory.
    pub(super) fn fetch(&mut self, pace: &dyn Pace) -> Result<(), CaptureError> {
        self.residual.clear();
        let residual = &mut self.residual;
        self.parts
            .urgent
            .read(&self.scan, self.unit, pace, &mut |offset, data| {
                let start = residual.bytes.len();
                residual.bytes.extend_from_slice(data);
                residual.blocks.push((offset, start..start + data.len()));
                Ok(())
            })
            .map_err(|source| self.read_error(source))?;
        self.bytes_read += ranges::total(&self.scan);
        Ok(())
    }

    pub(super) fn check_tracking(&self) -> Result<(), CaptureError> {
        let ends = |reason| {
            Err(CaptureError::GenerationEnds {
                volume: self.name(),
                reason,
            })
        };
        match self.parts.map.tracking() {
            Tracking::Complete => Ok(()),
            Tracking::Tainted(reason) => ends(reason),
            Tracking::Detached => ends(GenerationEnd::GapMiss),
        }
    }

    pub(super) fn check_marks(
        &self,
        now: &Misses,
        policy: &CapturePolicy,
    ) -> Result<(), CaptureError> {
        if policy.mutated(Mutation::IgnoreDoubleMiss) {
            return Ok(());
        }
        match select::judge(&self.reference, self.kind, &self.start, now) {
            Marks::Reliable => Ok(()),
            Marks::Lost => Err(CaptureError::GenerationEnds {
                volume: self.name(),
                reason: GenerationEnd::GapMiss,
            }),
            Marks::StartOver => Err(CaptureError::MissedBeforeFirstCut {
                volume: self.name(),
            }),
        }
    }

    /// After the second reading: whether the map told the whole truth about the same device.
    pub(super) fn check_truth(&self, policy: &CapturePolicy) -> Result<(), CaptureError> {
        self.check_tracking()?;
        let map = self.parts.map;
        if map.generation() != self.generation || map.volume_bytes() != self.bytes {
            return Err(CaptureError::GenerationChanged {
                volume: self.name(),
            });
        }
        let misses = self.misses();
        self.check_marks(&misses, policy)
    }

    /// See [`audit`]. `cut` is this volume's, whose blocks the sink has. What is not read by `until`, or
    /// cannot be read, is not judged.
    pub(super) fn audit(
        &self,
        number: usize,
        cut: &VolumeCut,
        until: &DeadlinePace<'_>,
        sink: &dyn LayerSink,
        policy: &CapturePolicy,
    ) -> Result<(), CaptureError> {
        let (map, unit) = (self.parts.map, self.unit);
        let count = audit::affordable(policy.audit_blocks, unit);
        let recent = map.changed_since(self.reference.epoch)?;
        let recent = ranges::widen(&recent, unit, self.bytes);
        let seed = self.generation.as_u64_pair().1 ^ u64::from(cut.record.epoch.0);
        let chosen = audit::choose(&recent, unit, self.bytes, count, seed);
        let first = self.look_again(number, &chosen, until, sink)?;
        let differ: Vec<ByteRange> = first.iter().map(|(block, _)| *block).collect();
        if differ.is_empty() {
            return Ok(());
        }
        // Nothing was in flight at the cut, so a write since has its mark from the queue already, unless
        // that program was skipped: then its mark comes with its completion, and the books will tell.
        map.settle()?;
        if map.reading()?.misses.queue > cut.record.misses.queue
            || map.tracking() != Tracking::Complete
        {
            return Ok(());
        }
        // Content that is not the same twice is nobody's write: mirrors that were never made equal, or
        // blocks without content on a device that does not define what they read as.
        let stable: Vec<(ByteRange, blake3::Hash)> = self
            .look_again(number, &differ, until, sink)?
            .into_iter()
            .filter(|found| first.contains(found))
            .collect();
        // What the next layer takes anyway proves nothing.
        let changed = map.changed_since(cut.record.since_next)?;
        let changed = ranges::widen(&changed, unit, self.bytes);
        let forgotten = stable
            .iter()
            .find(|(block, _)| audit::unchanged(block, &changed));
        let Some((block, _)) = forgotten else {
            return Ok(());
        };
        // A layer that read everything holds what was there; another rescan would find no more.
        let everything = self.kind != LayerKind::Differential;
        tracing::error!(
            volume = self.name(),
            offset = block.offset,
            bytes = block.len,
            everything,
            "a block changed without a mark"
        );
        if everything {
            return Ok(());
        }
        Err(CaptureError::GenerationEnds {
            volume: self.name(),
            reason: GenerationEnd::AuditFail,
        })
    }

    /// Reads blocks and returns those that are not as the layer says, with what they contain.
    fn look_again(
        &self,
        number: usize,
        blocks: &[ByteRange],
        until: &DeadlinePace<'_>,
        sink: &dyn LayerSink,
    ) -> Result<Vec<(ByteRange, blake3::Hash)>, CaptureError> {
        let mut differ = Vec::new();
        let mut refused = None;
        let read = self
            .parts
            .reader
            .read(blocks, self.unit, until, &mut |offset, data| {
                let block = BlockIndex(offset / u64::from(self.unit));
                match sink.agrees(number, block, data) {
                    Ok(true) => Ok(()),
                    Ok(false) => {
                        let range = ByteRange::new(offset, data.len() as u64);
                        differ.push((range, blake3::hash(data)));
                        Ok(())
                    }
                    Err(error) => {
                        refused = Some(error);
                        Err(io::Error::other("the layer store refused a block"))
                    }
                }
            });
        if let Some(source) = refused {
            return Err(CaptureError::Sink { source });
        }
        if let Err(error) = read {
            tracing::warn!(volume = self.name(), %error, "the audit of a cut was not finished");
        }
        Ok(differ)
    }

    pub(super) fn cut(&self, level: Level, policy: &CapturePolicy) -> VolumeCut {
        let misses = self.misses();
        VolumeCut {
            volume: self.name(),
            volume_bytes: self.bytes,
            kind: self.kind,
            level,
            record: CutRecord {
                generation: self.generation,
                epoch: self.epoch,
                since_next: select::since_next(&self.reference, self.epoch, &misses, |m| {
                    policy.mutated(m)
                }),
                misses,
            },
            bytes_read: self.bytes_read,
        }
    }
}

impl Residual {
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.blocks.clear();
    }
}
