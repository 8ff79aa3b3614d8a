//! Whether a layer is the devices at one instant.
//!
//! A cut says that every volume of the group stood still from the end of the first readings
//! (`Window::first`) to the begin of the second ones (`Window::second`), with nothing in flight. So
//! each sector must hold the newest operation that had landed by then:
//!
//! - what it holds was issued before `first`, else the image is from later (`Early`);
//! - what came next on the sector was not acknowledged before `second`, else a completed operation
//!   is missing (`Lost`);
//! - an operation is there in all of its sectors or in none, for none was in flight (`Torn`);
//! - nothing else is there (`Foreign`).
//!
//! One window for all volumes of the group: an operation that was issued after another one on
//! another volume was acknowledged is never there without that one.

use std::collections::BTreeMap;
use std::fmt;

use super::history::{Content, History, Kind, Op};

/// The ticks between which the devices stood still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Taken after all first readings.
    pub first: u64,
    /// Taken before all second readings.
    pub second: u64,
}

/// In which way a layer is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wrong {
    /// A completed operation is missing.
    Lost,
    /// An operation from after the window is there.
    Early,
    /// Some sectors of an operation are there and some are not.
    Torn,
    /// No operation left this here.
    Foreign,
}

/// One violation.
#[derive(Clone, Debug)]
pub struct Violation {
    /// In which way.
    pub wrong: Wrong,
    /// On which volume.
    pub volume: usize,
    /// At which sector.
    pub sector: u64,
    /// What was found and what should have been.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            wrong,
            volume,
            sector,
            what,
        } = self;
        write!(f, "{wrong:?}: volume {volume} sector {sector}: {what}")
    }
}

#[derive(Clone, Copy, Debug)]
struct Version {
    id: u64,
    zero: bool,
    acked: u64,
    /// Place in the list of operations, for all but the oldest version.
    op: Option<usize>,
}

impl Version {
    const BLANK: Self = Self {
        id: 0,
        zero: true,
        acked: 0,
        op: None,
    };

    fn matches(&self, content: Content) -> bool {
        match content {
            Content::Zero => self.zero,
            Content::Stamp(id) => !self.zero && self.id == id,
            Content::Foreign => false,
        }
    }
}

/// Knows for every volume what lies below the operations that are still in the history.
#[derive(Default)]
pub struct Oracle {
    base: BTreeMap<usize, Vec<Version>>,
}

impl Oracle {
    /// Holds the images of one cut, as (volume, what its sectors hold), against the history. What was
    /// complete before the window is then forgotten.
    pub fn check(
        &mut self,
        history: &History,
        window: Window,
        images: &[(usize, Vec<Content>)],
    ) -> Vec<Violation> {
        let mut wrong = Vec::new();
        for (volume, contents) in images {
            let ops = history.of(*volume);
            let base = self.base.entry(*volume).or_default();
            base.resize(contents.len(), Version::BLANK);
            check_volume(*volume, base, &ops, window, contents, &mut wrong);
            let over = |op: &&Op| op.acked.is_some_and(|acked| acked < window.first);
            for op in ops.iter().filter(over) {
                for sector in op.sector..op.sector + op.sectors {
                    if let Some(base) = base.get_mut(sector as usize) {
                        *base = Version {
                            op: None,
                            ..version(op, 0)
                        };
                    }
                }
            }
            history.forget(*volume, window.first);
        }
        wrong
    }
}

fn version(op: &Op, place: usize) -> Version {
    Version {
        id: op.id,
        zero: op.kind != Kind::Write,
        acked: op.acked.unwrap_or(u64::MAX),
        op: Some(place),
    }
}

fn check_volume(
    volume: usize,
    base: &[Version],
    ops: &[Op],
    window: Window,
    contents: &[Content],
    wrong: &mut Vec<Violation>,
) {
    let mut later: Vec<Vec<u32>> = vec![Vec::new(); contents.len()];
    for (place, op) in ops.iter().enumerate() {
        for sector in op.sector..op.sector + op.sectors {
            if let Some(list) = later.get_mut(sector as usize) {
                list.push(place as u32);
            }
        }
    }
    // Of each operation: sectors in which it or a later one is, and in which only earlier ones are.
    let mut parts = vec![(0u64, 0u64); ops.len()];
    let mut versions = Vec::new();
    for (sector, ((content, base), later)) in contents.iter().zip(base).zip(&later).enumerate() {
        versions.clear();
        versions.push(*base);
        versions.extend(later.iter().map(|place| {
            let place = *place as usize;
            version(&ops[place], place)
        }));
        let mut complain = |kind, what: String| {
            wrong.push(Violation {
                wrong: kind,
                volume,
                sector: sector as u64,
                what,
            });
        };
        let fits: Vec<usize> = (0..versions.len())
            .filter(|at| versions[*at].matches(*content))
            .collect();
        let Some(newest) = fits.last().copied() else {
            complain(
                Wrong::Foreign,
                format!("{content:?} is none of {versions:?}"),
            );
            continue;
        };
        let lost = |at: &usize| {
            versions
                .get(at + 1)
                .is_some_and(|v| v.acked < window.second)
        };
        let early = |at: &usize| versions[*at].id > window.first;
        if !fits.iter().any(|at| !lost(at) && !early(at)) {
            let kind = if fits.iter().all(lost) {
                Wrong::Lost
            } else {
                Wrong::Early
            };
            let next = versions.get(newest + 1);
            complain(
                kind,
                format!("{content:?} in {window:?}, next on the sector is {next:?}"),
            );
        }
        // Zeroes may be the work of several: then they say nothing about any of them.
        if fits.len() == 1 {
            for (at, version) in versions.iter().enumerate().skip(1) {
                if let Some(part) = version.op.and_then(|place| parts.get_mut(place)) {
                    if at <= newest {
                        part.0 += 1;
                    } else {
                        part.1 += 1;
                    }
                }
            }
        }
    }
    for (op, (new, old)) in ops.iter().zip(parts) {
        if new > 0 && old > 0 {
            wrong.push(Violation {
                wrong: Wrong::Torn,
                volume,
                sector: op.sector,
                what: format!("{new} sectors are of operation {op:?} or later, {old} are older"),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECTORS: u64 = 8;

    /// A world in which operations land when a test says so.
    struct World {
        history: History,
        oracle: Oracle,
        disks: Vec<Vec<Content>>,
    }

    impl World {
        fn new() -> Self {
            Self {
                history: History::default(),
                oracle: Oracle::default(),
                disks: vec![vec![Content::Zero; SECTORS as usize]; 2],
            }
        }

        fn land(&mut self, volume: usize, sectors: std::ops::Range<u64>, content: Content) {
            for sector in sectors {
                self.disks[volume][sector as usize] = content;
            }
        }

        fn write(&mut self, volume: usize, sector: u64, sectors: u64) -> u64 {
            let id = self.history.issue(volume, sector, sectors, Kind::Write);
            self.land(volume, sector..sector + sectors, Content::Stamp(id));
            self.history.acknowledge(id);
            id
        }

        fn zero(&mut self, volume: usize, sector: u64, sectors: u64) {
            let id = self.history.issue(volume, sector, sectors, Kind::Discard);
            self.land(volume, sector..sector + sectors, Content::Zero);
            self.history.acknowledge(id);
        }

        fn now(&self) -> Window {
            Window {
                first: self.history.tick(),
                second: self.history.tick(),
            }
        }

        fn check(&mut self, window: Window, disks: &[Vec<Content>]) -> Vec<Wrong> {
            let images: Vec<_> = disks.iter().cloned().enumerate().collect();
            let found = self.oracle.check(&self.history, window, &images);
            found.iter().map(|violation| violation.wrong).collect()
        }
    }

    #[test]
    fn the_device_itself_is_right_again_and_again() {
        let mut world = World::new();
        for round in 0..20 {
            world.write(round % 2, round as u64 % 4, 4);
            world.zero(0, 2, 3);
            let (window, image) = (world.now(), world.disks.clone());
            // Later operations are not in the image, and must not be.
            world.write(0, 0, 8);
            world.zero(1, 0, 8);
            assert_eq!(world.check(window, &image), []);
        }
    }

    #[test]
    fn a_forgotten_sector_is_lost_also_behind_zeroes_and_after_forgetting() {
        let mut world = World::new();
        world.write(0, 0, 2);
        let old = world.disks.clone();
        world.write(0, 0, 2);
        let window = world.now();
        assert_eq!(world.check(window, &old), [Wrong::Lost, Wrong::Lost]);
        // Now the second write is the base, and the first one is not known any more.
        let window = world.now();
        assert_eq!(world.check(window, &old), [Wrong::Foreign, Wrong::Foreign]);
        let stale = world.disks.clone();
        world.zero(0, 0, 1);
        let window = world.now();
        assert_eq!(world.check(window, &stale), [Wrong::Lost]);
    }

    #[test]
    fn what_was_written_after_the_window_is_early() {
        let mut world = World::new();
        world.write(1, 3, 1);
        let window = world.now();
        world.write(1, 3, 1);
        let image = world.disks.clone();
        assert_eq!(world.check(window, &image), [Wrong::Early]);
    }

    #[test]
    fn an_operation_under_way_is_wholly_there_or_not_at_all() {
        for landed in 0..=4 {
            let mut world = World::new();
            world.write(0, 0, 4);
            let id = world.history.issue(0, 0, 4, Kind::Write);
            world.land(0, 0..landed, Content::Stamp(id));
            let (window, image) = (world.now(), world.disks.clone());
            let torn = if landed % 4 == 0 {
                vec![]
            } else {
                vec![Wrong::Torn]
            };
            assert_eq!(world.check(window, &image), torn, "{landed} sectors");
        }
    }

    #[test]
    fn a_write_without_the_one_it_waited_for_is_no_instant() {
        let mut world = World::new();
        let before = world.disks[0].clone();
        world.write(0, 5, 1);
        world.write(1, 5, 1);
        let image = [before, world.disks[1].clone()];
        // Wherever the window lies, one of the two says that it does not lie there.
        for first in 1..=6 {
            let mut oracle = Oracle::default();
            let images: Vec<_> = image.iter().cloned().enumerate().collect();
            let window = Window {
                first,
                second: first + 1,
            };
            assert!(!oracle.check(&world.history, window, &images).is_empty());
            // What was forgotten is logged again for the next turn.
            world = World::new();
            world.write(0, 5, 1);
            world.write(1, 5, 1);
        }
    }
}
