//! The staging area: copies of hot blocks on fast storage, and when they may be used.
//!
//! A staged block remembers the epoch that began *before* it was copied. For the live volume it is
//! valid only while its stamp in the change map is older than that epoch, so a write that goes
//! straight to the origin invalidates it by itself. For layers it is found by its content hash,
//! whatever became of the volume since. Nothing here must survive a restart: losing the area loses
//! copies only.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use soe_common::Epoch;
use uuid::Uuid;

use crate::seam::{BlockReader, ByteRange, ChangeMap, Clock, Misses, Pace, TrackError, Tracking};

/// Tries to find a moment with nothing in flight before a copy is given up.
const DRAIN_TRIES: u32 = 200;
/// Wait between two of them.
const DRAIN_WAIT: Duration = Duration::from_millis(10);

/// Why blocks could not be staged.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// The area's file.
    #[error("staging area {path}: {what}: {source}")]
    Area {
        /// The file.
        path: PathBuf,
        /// The call.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Reading the origin.
    #[error("staging of {volume}: reading it: {source}")]
    Origin {
        /// The volume.
        volume: String,
        /// Why.
        source: io::Error,
    },
    /// The change map.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// No moment without writes in flight came.
    #[error(
        "staging of {volume}: writes were in flight all the time, so a copy could not be proven coherent; it will be tried again"
    )]
    Busy {
        /// The volume.
        volume: String,
    },
    /// The map became unusable while blocks were copied.
    #[error(
        "staging of {volume}: change tracking missed something, so all its staged blocks were dropped"
    )]
    Missed {
        /// The volume.
        volume: String,
    },
}

/// What is staged of one volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageStats {
    /// Bytes staged now.
    pub staged_bytes: u64,
    /// Of these, bytes that still equal the origin.
    pub valid_bytes: u64,
    /// Bytes of staged blocks that were wanted at least once: read from the area, or read on the
    /// origin while they were staged and valid.
    pub used_bytes: u64,
    /// Bytes dropped because the origin was written before they were used.
    pub invalidated_bytes: u64,
    /// Reads of the volume since something of it is staged.
    pub reads: u64,
    /// Of these, those of staged and valid blocks: what the area would have served.
    pub hits: u64,
}

struct Staged {
    at: u64,
    len: u32,
    epoch: Epoch,
    hash: [u8; 32],
    used: bool,
    /// Rounds of reads that were noted before it was staged: only later ones can have met it.
    rounds: u64,
}

struct VolumeStage {
    generation: Uuid,
    misses: Misses,
    blocks: BTreeMap<u64, Staged>,
    invalidated: u64,
    rounds: u64,
    reads: f64,
    hits: f64,
}

impl VolumeStage {
    /// Counts `reads` of `range`, evenly spread over it as far as is known, in blocks of `unit` bytes.
    /// Returns the bytes of it that were staged and valid in the whole of this round, when some of
    /// them had not been wanted before.
    fn note(
        &mut self,
        range: ByteRange,
        reads: f64,
        unit: u64,
        stale: &BTreeSet<u64>,
    ) -> Option<u64> {
        let rounds = self.rounds;
        let (mut covered, mut fresh) = (0, false);
        let blocks = range.offset.div_ceil(unit)..range.end().div_ceil(unit);
        for (block, staged) in self.blocks.range_mut(blocks) {
            if staged.rounds < rounds && !stale.contains(block) {
                covered += u64::from(staged.len);
                fresh |= !std::mem::replace(&mut staged.used, true);
            }
        }
        self.reads += reads;
        self.hits += reads * (covered as f64 / range.len.max(1) as f64).min(1.0);
        (fresh && covered > 0).then_some(covered)
    }
}

/// Room in the file: freed pieces by size, and what was never used.
#[derive(Default)]
struct Room {
    free: HashMap<u32, Vec<u64>>,
    next: u64,
}

impl Room {
    fn take(&mut self, len: u32, limit: u64) -> Option<u64> {
        let size = len.next_multiple_of(4096);
        if let Some(at) = self.free.get_mut(&size).and_then(Vec::pop) {
            return Some(at);
        }
        let at = self.next;
        if at + u64::from(size) > limit {
            return None;
        }
        self.next += u64::from(size);
        Some(at)
    }

    fn give(&mut self, at: u64, len: u32) {
        self.free
            .entry(len.next_multiple_of(4096))
            .or_default()
            .push(at);
    }
}

#[derive(Default)]
struct Inner {
    room: Room,
    volumes: HashMap<String, VolumeStage>,
    by_hash: HashMap<[u8; 32], (String, u64)>,
}

impl Inner {
    /// Drops a staged block. Returns its bytes when nobody had wanted it.
    fn drop_block(&mut self, volume: &str, block: u64) -> u64 {
        let Some(staged) = self
            .volumes
            .get_mut(volume)
            .and_then(|v| v.blocks.remove(&block))
        else {
            return 0;
        };
        if self
            .by_hash
            .get(&staged.hash)
            .is_some_and(|(v, b)| v == volume && *b == block)
        {
            self.by_hash.remove(&staged.hash);
        }
        self.room.give(staged.at, staged.len);
        if staged.used {
            0
        } else {
            u64::from(staged.len)
        }
    }
}

/// A file on fast storage and the index of what it holds.
pub struct StageArea {
    path: PathBuf,
    file: File,
    budget: AtomicU64,
    inner: Mutex<Inner>,
    /// A wrong rule, so that tests can show that it is noticed.
    #[cfg(test)]
    mutation: Mutation,
}

/// Wrong rules of coherence. The simulation must notice every one of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code))]
enum Mutation {
    /// The right rules.
    #[default]
    None,
    /// Writes may be in flight when copying begins.
    NoDrain,
    /// A copy is taken to be younger than it is.
    YoungEpoch,
    /// Skipped runs of the marking programs are taken for harmless.
    IgnoreMisses,
    /// Copies outlive the generation they were made in.
    KeepAcrossGenerations,
}

impl StageArea {
    /// Opens (or makes) the area. What it held before counts as nothing.
    pub fn open(path: &Path, budget: u64) -> Result<Self, StageError> {
        let failed = |what| {
            let path = path.to_owned();
            move |source| StageError::Area { path, what, source }
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(failed("open"))?;
        if file.metadata().map_err(failed("stat"))?.is_file() {
            file.set_len(0).map_err(failed("truncate"))?;
        }
        Ok(Self {
            path: path.into(),
            file,
            budget: AtomicU64::new(budget),
            inner: Mutex::default(),
            #[cfg(test)]
            mutation: Mutation::None,
        })
    }

    /// Whether a test asked for this wrong rule; never in a real build.
    fn mutated(&self, by: Mutation) -> bool {
        #[cfg(test)]
        return self.mutation == by;
        #[cfg(not(test))]
        {
            let _ = by;
            false
        }
    }

    /// Bytes that may be staged over all volumes.
    pub fn budget(&self) -> u64 {
        self.budget.load(Ordering::Relaxed)
    }

    /// Lets more or fewer bytes be staged from now on; what is staged beyond goes with the next staging.
    pub fn set_budget(&self, budget: u64) {
        self.budget.store(budget, Ordering::Relaxed);
    }

    /// The area's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> StageError {
        let path = self.path.clone();
        move |source| StageError::Area { path, what, source }
    }

    /// Copies `ranges` (best first) of a volume, up to `budget` bytes of it in all, and returns the
    /// blocks copied, in ascending order. Blocks that are staged and valid are not copied again.
    #[allow(clippy::too_many_arguments)]
    pub fn stage(
        &self,
        map: &dyn ChangeMap,
        reader: &dyn BlockReader,
        ranges: &[ByteRange],
        budget: u64,
        pace: &dyn Pace,
        clock: &dyn Clock,
    ) -> Result<Vec<ByteRange>, StageError> {
        let volume = map.volume().to_string();
        let unit = u64::from(map.block_size());
        self.drop_stale(map)?;
        let (mut epoch, misses) = self.prove_drained(map, clock)?;
        let wanted = self.admit(
            &volume,
            ranges,
            unit,
            map.volume_bytes(),
            budget.min(self.budget()),
        );
        // What was written since the drain is about to be written again.
        let moving: BTreeSet<u64> = blocks_of(&map.changed_since(epoch)?, unit).collect();
        let to_copy: Vec<ByteRange> = wanted
            .into_iter()
            .filter(|block| !moving.contains(block))
            .map(|block| {
                let offset = block * unit;
                ByteRange::new(offset, unit.min(map.volume_bytes() - offset))
            })
            .collect();
        {
            let mut inner = self.inner();
            inner
                .volumes
                .entry(volume.clone())
                .or_insert_with(|| VolumeStage {
                    generation: map.generation(),
                    misses,
                    blocks: BTreeMap::new(),
                    invalidated: 0,
                    rounds: 0,
                    reads: 0.0,
                    hits: 0.0,
                });
        }
        if self.mutated(Mutation::YoungEpoch) {
            epoch = Epoch(epoch.0 + 1);
        }
        let mut written = Ok(true);
        let mut blocks = Vec::new();
        let copied = reader.read(&to_copy, map.block_size(), pace, &mut |offset, bytes| {
            // Holes cost nothing to read or to restore.
            if bytes.iter().all(|&b| b == 0) {
                return Ok(());
            }
            written = self.put(&volume, offset / unit, bytes, epoch);
            match &written {
                Ok(true) => {
                    blocks.push(ByteRange::new(offset, bytes.len() as u64));
                    Ok(())
                }
                Ok(false) => Err(io::ErrorKind::StorageFull.into()),
                Err(_) => Err(io::ErrorKind::Other.into()),
            }
        });
        let full = matches!(written, Ok(false));
        written.map(drop)?;
        match copied {
            Err(error) if error.kind() != io::ErrorKind::Interrupted && !full => {
                return Err(StageError::Origin {
                    volume,
                    source: error,
                });
            }
            _ => {}
        }
        let after = map.reading()?;
        if self.marks_missed(&misses, &after.misses) || map.tracking() != Tracking::Complete {
            self.drop_volume(&volume);
            return Err(StageError::Missed { volume });
        }
        blocks.sort_unstable();
        Ok(blocks)
    }

    /// Begins an epoch at whose beginning nothing was in flight.
    fn prove_drained(
        &self,
        map: &dyn ChangeMap,
        clock: &dyn Clock,
    ) -> Result<(Epoch, Misses), StageError> {
        for _ in 0..DRAIN_TRIES {
            map.settle()?;
            let epoch = map.bump()?;
            map.grace()?;
            let reading = map.reading()?;
            let drained = reading.nothing_in_flight() || self.mutated(Mutation::NoDrain);
            if drained && map.tracking() == Tracking::Complete {
                return Ok((epoch, reading.misses));
            }
            clock.sleep(DRAIN_WAIT);
        }
        Err(StageError::Busy {
            volume: map.volume().to_string(),
        })
    }

    /// Chooses the blocks to copy and makes room: staged blocks that are no longer wanted go.
    fn admit(
        &self,
        volume: &str,
        ranges: &[ByteRange],
        unit: u64,
        end: u64,
        budget: u64,
    ) -> Vec<u64> {
        let mut wanted = Vec::new();
        let mut seen = BTreeSet::new();
        let mut bytes = 0;
        for block in ranges
            .iter()
            .flat_map(|range| blocks_of(std::slice::from_ref(range), unit))
        {
            if block * unit >= end || bytes + unit > budget {
                continue;
            }
            if seen.insert(block) {
                bytes += unit;
                wanted.push(block);
            }
        }
        let mut inner = self.inner();
        let staged: Vec<u64> = inner
            .volumes
            .get(volume)
            .map(|stage| stage.blocks.keys().copied().collect())
            .unwrap_or_default();
        for block in staged {
            if !seen.contains(&block) {
                inner.drop_block(volume, block);
            }
        }
        let stage = inner.volumes.get(volume);
        wanted.retain(|block| stage.is_none_or(|stage| !stage.blocks.contains_key(block)));
        wanted
    }

    /// Writes one block into the area. False when there is no room.
    fn put(
        &self,
        volume: &str,
        block: u64,
        bytes: &[u8],
        epoch: Epoch,
    ) -> Result<bool, StageError> {
        let hash = *blake3::hash(bytes).as_bytes();
        let len = bytes.len() as u32;
        let Some(at) = self.inner().room.take(len, self.budget()) else {
            return Ok(false);
        };
        if let Err(source) = self.file.write_all_at(bytes, at) {
            self.inner().room.give(at, len);
            return Err(self.failed("write")(source));
        }
        let mut inner = self.inner();
        inner.drop_block(volume, block);
        let Some(stage) = inner.volumes.get_mut(volume) else {
            inner.room.give(at, len);
            return Ok(true);
        };
        stage.blocks.insert(
            block,
            Staged {
                at,
                len,
                epoch,
                hash,
                used: false,
                rounds: stage.rounds,
            },
        );
        inner.by_hash.insert(hash, (volume.into(), block));
        Ok(true)
    }

    /// Drops what the origin no longer equals, and everything when the map cannot vouch for it.
    fn drop_stale(&self, map: &dyn ChangeMap) -> Result<(), StageError> {
        let volume = map.volume();
        let healthy = self.healthy(map)?;
        if !healthy {
            self.drop_volume(volume);
            return Ok(());
        }
        let stale = self.stale(map)?;
        let mut inner = self.inner();
        let mut dropped = 0;
        for block in stale {
            dropped += inner.drop_block(volume, block);
        }
        if let Some(stage) = inner.volumes.get_mut(volume) {
            stage.invalidated += dropped;
        }
        Ok(())
    }

    fn healthy(&self, map: &dyn ChangeMap) -> Result<bool, StageError> {
        let known = self
            .inner()
            .volumes
            .get(map.volume())
            .map(|stage| (stage.generation, stage.misses));
        let Some((generation, misses)) = known else {
            return Ok(true);
        };
        let same = generation == map.generation() || self.mutated(Mutation::KeepAcrossGenerations);
        Ok(same
            && map.tracking() == Tracking::Complete
            && !self.marks_missed(&misses, &map.reading()?.misses))
    }

    /// Whether a write since the drain may have neither of its marks. One of them is enough: nothing
    /// was in flight at the drain, so a mark at the queue as well as one at the completion, made before
    /// the writer is told, carries its epoch or a later one. Failed writes are marked like any other.
    fn marks_missed(&self, before: &Misses, now: &Misses) -> bool {
        let both = before.queue != now.queue && before.complete != now.complete;
        (both || before.stash != now.stash) && !self.mutated(Mutation::IgnoreMisses)
    }

    /// Staged blocks that were written since they were copied.
    fn stale(&self, map: &dyn ChangeMap) -> Result<Vec<u64>, StageError> {
        let unit = u64::from(map.block_size());
        let epochs: BTreeSet<Epoch> = self
            .inner()
            .volumes
            .get(map.volume())
            .map(|stage| stage.blocks.values().map(|b| b.epoch).collect())
            .unwrap_or_default();
        let mut stale = Vec::new();
        for epoch in epochs {
            let changed: BTreeSet<u64> = blocks_of(&map.changed_since(epoch)?, unit).collect();
            if let Some(stage) = self.inner().volumes.get(map.volume()) {
                stale.extend(
                    stage
                        .blocks
                        .iter()
                        .filter(|(block, b)| b.epoch == epoch && changed.contains(block))
                        .map(|(block, _)| *block),
                );
            }
        }
        Ok(stale)
    }

    /// What is staged of a volume, and how much of it is valid now.
    pub fn status(&self, map: &dyn ChangeMap) -> Result<StageStats, StageError> {
        let stale: BTreeSet<u64> = if self.healthy(map)? {
            self.stale(map)?.into_iter().collect()
        } else {
            self.drop_volume(map.volume());
            BTreeSet::new()
        };
        let inner = self.inner();
        let mut stats = StageStats::default();
        if let Some(stage) = inner.volumes.get(map.volume()) {
            stats.invalidated_bytes = stage.invalidated;
            // The casts round down and saturate.
            (stats.reads, stats.hits) = (stage.reads as u64, stage.hits as u64);
            for (block, staged) in &stage.blocks {
                let len = u64::from(staged.len);
                stats.staged_bytes += len;
                stats.valid_bytes += if stale.contains(block) { 0 } else { len };
                stats.used_bytes += if staged.used { len } else { 0 };
            }
        }
        Ok(stats)
    }

    /// Notes what was read on the origin since the last call: how often each range. Returns the ranges
    /// of which staged and valid blocks were wanted for the first time, with the bytes of these.
    ///
    /// A block counts from the first call after it was staged, so that what was read before it was
    /// there is no hit.
    pub fn note_reads(
        &self,
        map: &dyn ChangeMap,
        reads: &[(ByteRange, u64)],
    ) -> Result<Vec<(ByteRange, u64)>, StageError> {
        let known = self.inner().volumes.contains_key(map.volume());
        if !known || !self.healthy(map)? {
            return Ok(Vec::new());
        }
        let stale: BTreeSet<u64> = self.stale(map)?.into_iter().collect();
        let unit = u64::from(map.block_size());
        let mut inner = self.inner();
        let Some(stage) = inner.volumes.get_mut(map.volume()) else {
            return Ok(Vec::new());
        };
        stage.rounds += 1;
        Ok(reads
            .iter()
            .filter_map(|(range, count)| {
                let covered = stage.note(*range, *count as f64, unit, &stale)?;
                Some((*range, covered))
            })
            .collect())
    }

    /// Forgets everything staged of a volume.
    pub fn drop_volume(&self, volume: &str) {
        let mut inner = self.inner();
        let blocks: Vec<u64> = inner
            .volumes
            .get(volume)
            .map(|stage| stage.blocks.keys().copied().collect())
            .unwrap_or_default();
        for block in blocks {
            inner.drop_block(volume, block);
        }
        inner.volumes.remove(volume);
    }

    /// Fills `buf` with the staged block of this content, if there is one of that length.
    ///
    /// The index is held while the block is read, so its place cannot be handed out meanwhile; the
    /// caller hashes what it got.
    pub fn read_by_hash(&self, hash: &[u8; 32], buf: &mut [u8]) -> bool {
        let mut inner = self.inner();
        let Some((volume, block)) = inner.by_hash.get(hash).cloned() else {
            return false;
        };
        let Some(staged) = inner
            .volumes
            .get_mut(&volume)
            .and_then(|stage| stage.blocks.get_mut(&block))
        else {
            return false;
        };
        if staged.len as usize != buf.len() || self.file.read_exact_at(buf, staged.at).is_err() {
            return false;
        }
        staged.used = true;
        true
    }
}

/// Blocks of `unit` bytes that `ranges` touch.
fn blocks_of(ranges: &[ByteRange], unit: u64) -> impl Iterator<Item = u64> + '_ {
    ranges
        .iter()
        .filter(|range| range.len > 0)
        .flat_map(move |range| range.offset / unit..=(range.end() - 1) / unit)
}

#[cfg(test)]
#[path = "area_tests.rs"]
mod tests;
