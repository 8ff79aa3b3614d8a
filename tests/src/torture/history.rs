//! What writers did: every operation with the tick at which it was issued and the tick at which its
//! writer knew that it was complete, from one clock for all volumes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Bytes of a sector: the unit of stamps.
pub const SECTOR: usize = 512;
const MAGIC: u64 = 0x736f_6574_6f72_7475;

/// What an operation leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Stamped sectors.
    Write,
    /// Zeroes, by a discard.
    Discard,
    /// Zeroes, by a write-zeroes command.
    WriteZeroes,
}

/// One operation.
#[derive(Clone, Debug)]
pub struct Op {
    /// The tick at which it was issued: its name as well.
    pub id: u64,
    /// The volume's number.
    pub volume: usize,
    /// First sector on the volume.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u64,
    /// What it leaves behind.
    pub kind: Kind,
    /// When it was issued, for mutations that look at time.
    pub issued_at: Instant,
    /// The tick after its completion was seen; `None` while it is under way.
    pub acked: Option<u64>,
}

/// The log of all writers. No two operations on one sector are ever under way at once: every writer
/// waits for its own, and areas are disjoint. So the order on a sector is the order of the ids.
#[derive(Default)]
pub struct History {
    clock: AtomicU64,
    ops: Mutex<BTreeMap<u64, Op>>,
    issued: AtomicU64,
}

impl History {
    /// The next tick, greater than all before on every CPU.
    pub fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Operations issued so far.
    pub fn issued(&self) -> u64 {
        self.issued.load(Ordering::Relaxed)
    }

    fn ops(&self) -> MutexGuard<'_, BTreeMap<u64, Op>> {
        self.ops.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs an operation that is about to be issued; returns its id.
    pub fn issue(&self, volume: usize, sector: u64, sectors: u64, kind: Kind) -> u64 {
        let mut ops = self.ops();
        let id = self.tick();
        let op = Op {
            id,
            volume,
            sector,
            sectors,
            kind,
            issued_at: Instant::now(),
            acked: None,
        };
        ops.insert(id, op);
        self.issued.fetch_add(1, Ordering::Relaxed);
        id
    }

    /// Logs that an operation completed. The tick is taken first, so it is not later than needed.
    pub fn acknowledge(&self, id: u64) {
        let now = self.tick();
        if let Some(op) = self.ops().get_mut(&id) {
            op.acked = Some(now);
        }
    }

    /// The operations on one volume that were not forgotten, in the order of their ids.
    pub fn of(&self, volume: usize) -> Vec<Op> {
        let ops = self.ops();
        ops.values()
            .filter(|op| op.volume == volume)
            .cloned()
            .collect()
    }

    /// Forgets the operations on `volume` that were complete before `tick`.
    pub fn forget(&self, volume: usize, tick: u64) {
        self.ops()
            .retain(|_, op| op.volume != volume || op.acked.is_none_or(|acked| acked >= tick));
    }
}

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Only zeroes.
    Zero,
    /// The whole stamp of this operation, at its right place.
    Stamp(u64),
    /// Anything else: half a sector, another place's or volume's stamp, rubbish.
    Foreign,
}

fn mix(mut x: u64) -> u64 {
    // splitmix64's finaliser.
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn seal(id: u64, volume: u64, sector: u64) -> u64 {
    mix(id ^ mix(volume ^ mix(sector ^ MAGIC)))
}

/// Fills `buffer` with the stamps of operation `id`, whose first sector is `sector` of `volume`.
pub fn stamp(buffer: &mut [u8], volume: usize, sector: u64, id: u64) {
    for (number, bytes) in buffer.chunks_exact_mut(SECTOR).enumerate() {
        let sector = sector + number as u64;
        let words = [
            MAGIC,
            id,
            volume as u64,
            sector,
            seal(id, volume as u64, sector),
        ];
        let mut fill = bytes.chunks_exact_mut(8);
        for word in words {
            if let Some(place) = fill.next() {
                place.copy_from_slice(&word.to_le_bytes());
            }
        }
        // The id to the last byte, so that a sector torn anywhere is seen.
        fill.for_each(|place| place.copy_from_slice(&id.to_le_bytes()));
    }
}

/// What the sector `bytes` at `sector` of `volume` holds.
pub fn content(bytes: &[u8], volume: usize, sector: u64) -> Content {
    let mut words = [0u64; SECTOR / 8];
    for (word, place) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        let mut le = [0; 8];
        le.copy_from_slice(place);
        *word = u64::from_le_bytes(le);
    }
    if words.iter().all(|word| *word == 0) {
        return Content::Zero;
    }
    let id = words[1];
    let head = [
        MAGIC,
        id,
        volume as u64,
        sector,
        seal(id, volume as u64, sector),
    ];
    if words[..5] == head && words[5..].iter().all(|word| *word == id) {
        Content::Stamp(id)
    } else {
        Content::Foreign
    }
}

/// What every sector of `bytes` holds; `bytes` begin at sector `first` of `volume`.
pub fn contents(bytes: &[u8], volume: usize, first: u64) -> Vec<Content> {
    bytes
        .chunks_exact(SECTOR)
        .enumerate()
        .map(|(number, bytes)| content(bytes, volume, first + number as u64))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_known_only_whole_and_at_its_own_place() {
        let mut bytes = vec![0; 3 * SECTOR];
        stamp(&mut bytes, 2, 70, 9);
        assert_eq!(contents(&bytes, 2, 70), [Content::Stamp(9); 3]);
        assert_eq!(contents(&bytes, 2, 71), [Content::Foreign; 3]);
        assert_eq!(contents(&bytes, 1, 70), [Content::Foreign; 3]);
        for at in [0, 9, 100, 511] {
            let mut torn = bytes[..SECTOR].to_vec();
            torn[at] ^= 1;
            assert_eq!(content(&torn, 2, 70), Content::Foreign, "byte {at}");
        }
        assert_eq!(content(&[0; SECTOR], 2, 70), Content::Zero);
    }
}
