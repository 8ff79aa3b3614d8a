//! Volumes of groups that come, go and change while the agent runs.
//!
//! The kernel's uevents say when to look; what is so is read from sysfs. A volume that is gone, or
//! that is another one now, loses its entry; a volume without an entry gets one as soon as it is
//! there. Its layers stay, and what it missed makes the next layer a rescan.
//!
//! Invariant: the slot of an entry is given back only when nobody holds the entry any more. A capture
//! that reads the counters of a slot which counts for another disk would prove what is not so.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::ServiceError;
use super::agent::{Agent, Entry, lock};
use crate::api::types::WatchEvent;
use crate::observe::TrackerError;
use crate::observe::uevents::{Heard, Uevents};
use crate::observe::volumes::{self, Volume};
use crate::seam::{ChangeMap, Clock, GenerationEnd, Tracking};

/// How long one wait for the kernel's word lasts; a stop waits for its end.
const WAIT: Duration = Duration::from_millis(200);
/// How often the agent looks without being told: words may be lost, and an entry that is still held
/// may be free by then.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Words come in bursts; one look serves all that came within this time.
const SETTLE: Duration = Duration::from_millis(50);

/// How long an adoption waits for those who still hold the entry of before.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a volume is now, compared with its entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// What it was.
    Same,
    /// It is there, but not what it was.
    Other(GenerationEnd),
    /// It is not there, in words.
    Gone(String),
}

/// Compares what `name` stands for now with what it stood for. Pure.
fn compare(before: &Volume, now: Result<&Volume, &TrackerError>) -> Found {
    match now {
        Err(why) => Found::Gone(why.to_string()),
        Ok(now) if now.disk.diskseq != before.disk.diskseq || now.rdev != before.rdev => {
            Found::Other(GenerationEnd::Remapped)
        }
        Ok(now) if now.disk.sectors != before.disk.sectors => Found::Other(GenerationEnd::Resize),
        // Other blocks stand behind the same sectors, or a path to them that the programs do not know.
        Ok(now)
            if now.disk.mapping != before.disk.mapping
                || !now
                    .disk
                    .hidden_paths
                    .iter()
                    .all(|path| before.disk.hidden_paths.contains(path)) =>
        {
            Found::Other(GenerationEnd::Remapped)
        }
        // The partition was laid out anew: its blocks are others, whatever their stamps say.
        Ok(now) if (now.start, now.end) != (before.start, before.end) => {
            Found::Other(GenerationEnd::Remapped)
        }
        Ok(_) => Found::Same,
    }
}

pub(super) fn look(entry: &Entry) -> Found {
    let now = volumes::resolve(Path::new(&entry.name));
    compare(&entry.volume, now.as_ref())
}

impl Agent {
    /// Follows the kernel's word until the agent stops.
    pub(super) fn follow_devices(&self) {
        let uevents = match Uevents::listen() {
            Ok(uevents) => Some(uevents),
            Err(error) => {
                tracing::warn!(%error, "the kernel's uevents cannot be heard; volumes are looked at every {LOOK_EVERY:?}");
                None
            }
        };
        let mut looked = None;
        while !self.stopping() {
            let due = match uevents.as_ref().map(|uevents| uevents.wait(WAIT)) {
                Some(Ok(Heard::Nothing)) => false,
                Some(Ok(Heard::Block(_) | Heard::Lost)) => true,
                Some(Err(error)) => {
                    tracing::warn!(%error, "the kernel's uevents cannot be read");
                    self.clock.sleep(WAIT);
                    false
                }
                None => {
                    self.clock.sleep(WAIT);
                    false
                }
            };
            if due {
                self.clock.sleep(SETTLE);
            }
            let now = self.clock.monotonic();
            if due || looked.is_none_or(|at| now >= at + LOOK_EVERY) {
                looked = Some(now);
                self.look_at_volumes();
            }
        }
    }

    /// Compares every volume of every group with what is there, and follows.
    pub(super) fn look_at_volumes(&self) {
        for (name, group) in self.volumes_of_groups() {
            let reason = match self.entry(&name) {
                Some(entry) => match look(&entry) {
                    Found::Same => continue,
                    Found::Gone(why) => {
                        tracing::warn!(
                            group,
                            volume = name,
                            why,
                            "the volume is gone; its layers stay"
                        );
                        self.part_with(&entry);
                        continue;
                    }
                    Found::Other(reason) => {
                        tracing::warn!(group, volume = name, %reason, "the volume is not what it was");
                        self.part_with(&entry);
                        Some(reason)
                    }
                },
                None => None,
            };
            // Not there yet, or still held by a capture that is about to fail: the next look.
            let Ok(entry) = self.adopt_volume(&name) else {
                continue;
            };
            if let Some(reason) = reason {
                *lock(&entry.reason) = reason;
            }
            let reason = *lock(&entry.reason);
            tracing::info!(group, volume = name, %reason, "the volume is tracked; the next layer reads everything");
            self.tell(WatchEvent::Tracking {
                volume: name,
                tracking: entry.map.tracking().into(),
                reason: Some(reason),
            });
        }
        if let Err(error) = self.give_slots_back() {
            tracing::warn!(%error, "disks that no group needs are still tracked");
        }
    }

    /// Takes the entry of a volume that is gone or another one now. Whoever holds it may end its work.
    pub(super) fn part_with(&self, entry: &Arc<Entry>) {
        let mut entries = lock(&self.entries);
        let ours = entries
            .get(&entry.name)
            .is_some_and(|known| Arc::ptr_eq(known, entry));
        if !ours {
            return;
        }
        entries.remove(&entry.name);
        lock(&self.parted).push(entry.clone());
        drop(entries);
        if let Some(area) = &self.area {
            area.drop_volume(&entry.name);
        }
        // A disk that goes on as it was, with a partition that does not: its stamps are not to be
        // taken for those of what lies there now.
        if entry.volume.disk.is_still_there()
            && let Err(error) = entry.track.begin_generation()
        {
            tracing::error!(volume = entry.name, %error, "a new generation could not be begun");
        }
        self.metrics
            .tracking_complete
            .set([entry.name.as_str()], 0.0);
        self.tell(WatchEvent::Tracking {
            volume: entry.name.clone(),
            tracking: Tracking::Detached.into(),
            reason: None,
        });
    }

    /// Waits a moment for those who still work with what the disk was before. Holds no lock.
    pub(super) fn wait_until_free(&self, volume: &Volume) {
        let began = self.clock.monotonic();
        while self.refuse_while_held(volume).is_err() && self.clock.monotonic() < began + PATIENCE {
            self.clock.sleep(Duration::from_millis(20));
        }
    }

    /// Fails while somebody still works with what the disk was before.
    pub(super) fn refuse_while_held(&self, volume: &Volume) -> Result<(), ServiceError> {
        let mut parted = lock(&self.parted);
        parted.retain(|entry| Arc::strong_count(entry) > 1);
        let held = parted
            .iter()
            .any(|entry| entry.volume.disk.diskseq == volume.disk.diskseq);
        match held {
            true => Err(ServiceError::Held {
                volume: volume.path.clone(),
            }),
            false => Ok(()),
        }
    }

    /// Ends the tracking of disks that no entry needs and nobody holds.
    pub(super) fn give_slots_back(&self) -> Result<(), TrackerError> {
        // Both locks are held to the end: an entry that is made meanwhile would lose its slot.
        let entries = lock(&self.entries);
        let mut parted = lock(&self.parted);
        parted.retain(|entry| Arc::strong_count(entry) > 1);
        let used: Vec<u64> = entries
            .values()
            .chain(parted.iter())
            .map(|entry| entry.volume.disk.diskseq)
            .collect();
        self.tracker.retain(|diskseq| used.contains(&diskseq))
    }

    /// Why a volume of a group cannot be captured now, in words; `None` when it is there.
    pub(super) fn missing(&self, name: &str) -> Option<String> {
        match self.entry(name) {
            Some(entry) => match look(&entry) {
                Found::Same => None,
                Found::Gone(why) => Some(why),
                Found::Other(reason) => Some(format!(
                    "{name} became another device or changed its size ({reason}); it is about to be tracked anew"
                )),
            },
            None => Some(match volumes::resolve(Path::new(name)) {
                Ok(_) => format!("{name} is there and about to be tracked"),
                Err(error) => error.to_string(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::volumes::Disk;

    fn volume(diskseq: u64, sectors: u64, start: u64, end: u64) -> Volume {
        Volume {
            path: "/dev/x".into(),
            disk: Disk::for_tests(diskseq, sectors),
            start,
            end,
            device_id: String::new(),
            name: "x".into(),
            rdev: 7,
        }
    }

    #[test]
    fn what_changed_is_told_apart() {
        let before = volume(5, 1000, 0, 1000);
        let found = |now: Volume| compare(&before, Ok(&now));
        assert_eq!(found(before.clone()), Found::Same);
        let other = Found::Other(GenerationEnd::Remapped);
        assert_eq!(found(volume(6, 1000, 0, 1000)), other);
        assert_eq!(
            found(volume(5, 2000, 0, 2000)),
            Found::Other(GenerationEnd::Resize)
        );
        // Another device number behind the same name.
        let renumbered = Volume {
            rdev: 8,
            ..before.clone()
        };
        assert_eq!(found(renumbered), other);
        // Another device-mapper table, a path more, a path less.
        let mut mapped = before.clone();
        mapped.disk.mapping = 9;
        assert_eq!(found(mapped), other);
        let mut pathed = before.clone();
        pathed.disk.hidden_paths = vec![11];
        assert_eq!(found(pathed.clone()), other);
        assert_eq!(compare(&pathed, Ok(&before)), Found::Same);
        // A partition of the same length at another place of the same disk.
        let part = volume(5, 1000, 100, 200);
        let moved = volume(5, 1000, 200, 300);
        assert_eq!(compare(&part, Ok(&moved)), other);
        let gone = TrackerError::NoVolume {
            path: "/dev/x".into(),
            reason: "there is none".into(),
        };
        assert_eq!(
            compare(&before, Err(&gone)),
            Found::Gone("/dev/x is not a volume: there is none".into())
        );
    }
}
