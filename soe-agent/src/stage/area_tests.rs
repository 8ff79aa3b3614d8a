use super::*;
use crate::seam::{ByteRange, Unpaced};
use crate::sim::{Faults, Load, SimClock, SimMap, SimReader, World};

const BLOCKS: usize = 24;

fn load(miss: f64) -> Load {
    Load {
        writers: 3,
        raw_writers: 1,
        start: 0.3,
        calm: 0.05,
        burst: 0.02,
        miss_queue: miss,
        miss_complete: miss,
        miss_silently: 0.0,
        fail: 0.0,
    }
}

fn idle() -> Load {
    Load {
        start: 0.0,
        ..load(0.0)
    }
}

struct Bench {
    world: World,
    map: SimMap,
    reader: SimReader,
    area: StageArea,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new(seed: u64, miss: f64, mutation: Mutation) -> Self {
        let world = World::new(seed, 1, BLOCKS, load(miss), Faults::default());
        let dir = tempfile::tempdir().unwrap();
        let mut area = StageArea::open(&dir.path().join("area"), 1 << 20).unwrap();
        area.mutation = mutation;
        Self {
            map: SimMap::new(&world, 0),
            reader: SimReader::new(&world, 0),
            world,
            area,
            _dir: dir,
        }
    }

    fn unit(&self) -> u64 {
        u64::from(self.map.block_size())
    }

    fn stage(&self, ranges: &[ByteRange], budget: u64) -> Result<Vec<ByteRange>, StageError> {
        let clock = SimClock(self.world.clone());
        self.area
            .stage(&self.map, &self.reader, ranges, budget, &Unpaced, &clock)
    }

    fn whole(&self) -> [ByteRange; 1] {
        [ByteRange::new(0, self.map.volume_bytes())]
    }

    /// Lets every write complete.
    fn settle(&self) {
        self.world.set_load(idle());
        for _ in 0..200 {
            self.world.run(50);
            self.map.settle().unwrap();
            if self.map.reading().unwrap().nothing_in_flight() {
                break;
            }
        }
        self.world.run(2_000);
    }

    /// Compares every block that is said to be valid with the origin: how many were right, and wrong.
    ///
    /// What is valid is asked for when all is read: who has seen a new block on the origin must not be
    /// given the old one from the area afterwards. (And reading may itself write back what is dirty.)
    fn compare(&self) -> (u64, u64) {
        let mut staged = Vec::new();
        if let Some(volume) = self.area.inner().volumes.get(self.map.volume()) {
            for (block, s) in &volume.blocks {
                let mut bytes = vec![0; s.len as usize];
                self.area.file.read_exact_at(&mut bytes, s.at).unwrap();
                staged.push((*block, bytes));
            }
        }
        let mut equal = Vec::new();
        for (block, bytes) in staged {
            let range = ByteRange::new(block * self.unit(), bytes.len() as u64);
            let mut origin = Vec::new();
            let mut take = |_: u64, data: &[u8]| {
                origin.extend_from_slice(data);
                Ok(())
            };
            self.reader
                .read(&[range], self.map.block_size(), &Unpaced, &mut take)
                .unwrap();
            equal.push((block, origin == bytes));
        }
        if !self.area.healthy(&self.map).unwrap() {
            return (0, 0);
        }
        let stale = self.area.stale(&self.map).unwrap();
        let valid = || equal.iter().filter(|(block, _)| !stale.contains(block));
        let right = valid().filter(|(_, equal)| *equal).count() as u64;
        (right, valid().count() as u64 - right)
    }
}

/// Stages now and then while writers go on, and compares then, and when they have stopped.
fn course(seed: u64, miss: f64, mutation: Mutation) -> (u64, u64) {
    let bench = Bench::new(seed, miss, mutation);
    let (mut right, mut wrong) = (0, 0);
    let mut add = |(r, w): (u64, u64)| (right, wrong) = (right + r, wrong + w);
    // A write whose mark at the queue was skipped is known from its completion on, not before.
    let at_once = miss == 0.0;
    for round in 0..6 {
        bench.world.run(40);
        // Busy and missed are answers, too.
        let _ = bench.stage(&bench.whole(), 1 << 20);
        if at_once {
            add(bench.compare());
        }
        if round == 3 && seed.is_multiple_of(4) {
            bench.world.new_generation(0);
        }
    }
    bench.world.run((seed % 7) as usize * 30);
    if at_once {
        add(bench.compare());
    }
    bench.settle();
    add(bench.compare());
    (right, wrong)
}

fn courses(miss: f64, mutation: Mutation) -> (u64, u64) {
    (0..300)
        .map(|seed| course(seed, miss, mutation))
        .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
}

#[test]
fn what_is_said_to_be_valid_equals_the_origin() {
    for miss in [0.0, 0.01] {
        let (right, wrong) = courses(miss, Mutation::None);
        assert_eq!(wrong, 0, "of {right} others, with misses {miss}");
        assert!(right > 300, "only {right} blocks were compared");
    }
}

#[test]
fn every_rule_is_needed() {
    for (mutation, miss) in [
        (Mutation::NoDrain, 0.0),
        (Mutation::YoungEpoch, 0.0),
        (Mutation::IgnoreMisses, 0.05),
    ] {
        let (right, wrong) = courses(miss, mutation);
        println!("{mutation:?}: {right} right, {wrong} wrong");
        assert!(wrong > 0, "{mutation:?} was not noticed");
    }
}

#[test]
fn another_generation_drops_what_was_staged() {
    let staged_after = |mutation| {
        let bench = Bench::new(3, 0.0, mutation);
        bench.world.run(500);
        bench.settle();
        assert!(!bench.stage(&bench.whole(), 1 << 20).unwrap().is_empty());
        bench.world.new_generation(0);
        bench.area.status(&bench.map).unwrap().staged_bytes
    };
    assert_eq!(staged_after(Mutation::None), 0);
    assert!(staged_after(Mutation::KeepAcrossGenerations) > 0);
}

#[test]
fn only_reads_of_what_was_staged_before_them_are_hits() {
    let bench = Bench::new(5, 0.0, Mutation::None);
    bench.world.run(3_000);
    bench.settle();
    let unit = bench.unit();
    let written = bench.stage(&bench.whole(), 1 << 20).unwrap();
    bench.area.drop_volume(bench.map.volume());
    let (first, second) = (written[0], written[1]);
    assert_eq!(bench.stage(&[first], 1 << 20).unwrap(), [first]);
    let note = |reads: &[(ByteRange, u64)]| bench.area.note_reads(&bench.map, reads).unwrap();
    let stats = || bench.area.status(&bench.map).unwrap();
    // The first note covers time before the copy was made.
    assert_eq!(note(&[]), []);
    assert_eq!(note(&[(first, 3), (second, 1)]), [(first, unit)]);
    assert_eq!(
        (stats().reads, stats().hits, stats().used_bytes),
        (4, 3, unit)
    );
    assert_eq!(note(&[(first, 4)]), [], "it was wanted before");
    assert_eq!((stats().reads, stats().hits), (8, 7));
    // Half of a range that is twice as long is staged.
    let twice = ByteRange::new(first.offset / (2 * unit) * 2 * unit, 2 * unit);
    note(&[(twice, 2)]);
    assert_eq!((stats().reads, stats().hits), (10, 8));
    // What is staged now was not there for the reads noted next.
    bench.stage(&[first, second], 1 << 20).unwrap();
    note(&[(second, 1)]);
    assert_eq!((stats().reads, stats().hits), (11, 9));
}

#[test]
fn the_budget_holds_and_room_is_used_again() {
    let bench = Bench::new(7, 0.0, Mutation::None);
    bench.world.run(5_000);
    bench.settle();
    let unit = bench.unit();
    for first in [0, 4, 8, 12] {
        let ranges = [ByteRange::new(first * unit, 12 * unit)];
        bench.stage(&ranges, 4 * unit).unwrap();
        assert!(bench.area.status(&bench.map).unwrap().staged_bytes <= 4 * unit);
        assert!(bench.area.inner().room.next <= 4 * unit.next_multiple_of(4096) * 2);
        assert_eq!(bench.compare().1, 0);
    }
}
