//! The books of the kernel half under load, on several disks at once: every sector written is counted,
//! and the books balance at the next rest, also where the kernel skipped a program without a word (one
//! of the kernels this was run on does so in interrupts that hit its init process). Runs on this
//! machine's kernel and in the VMs.
//!
//! `SOE_LOAD_ROUNDS` asks for more than an ordinary run.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use soe_agent::observe::disk::SliceMap;
use soe_agent::seam::{ChangeMap, Reading, Tracking};
use soe_tests::device::{LoopDevice, open_direct, write_direct};
use soe_tests::kernel::{Bench, MIB};
use soe_tests::need_kernel;

#[test]
fn no_event_is_lost_under_load() {
    need_kernel!();
    let rounds: u64 = std::env::var("SOE_LOAD_ROUNDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(5);
    let bench = Bench::new("load");
    let disks: Vec<LoopDevice> = (0..3).map(|_| LoopDevice::new(64 * MIB).unwrap()).collect();
    let maps: Vec<SliceMap> = disks.iter().map(|disk| bench.map(&disk.path)).collect();
    for map in &maps {
        balanced(map);
    }
    let before: Vec<u64> = maps
        .iter()
        .map(|map| map.reading().unwrap().queued)
        .collect();
    let written: Vec<AtomicU64> = disks.iter().map(|_| AtomicU64::new(0)).collect();
    for round in 0..rounds {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for (number, disk) in disks.iter().enumerate() {
                for writer in 0..2u64 {
                    let (stop, written) = (&stop, &written[number]);
                    let seed = number as u64 * 7919 + writer * 104_729 + round;
                    scope.spawn(move || scribble(disk, seed, stop, written));
                }
            }
            std::thread::sleep(Duration::from_secs(2));
            stop.store(true, Ordering::Relaxed);
        });
        for (number, map) in maps.iter().enumerate() {
            let reading = balanced(map);
            assert_eq!(
                reading.queued - before[number],
                written[number].load(Ordering::Relaxed),
                "{}: the sectors queued are those that were written",
                map.volume()
            );
            assert_eq!(map.tracking(), Tracking::Complete);
        }
    }
    for (disk, map) in disks.iter().zip(&maps) {
        let reading = map.reading().unwrap();
        println!(
            "{}: {} sectors; events that no program saw or that were skipped: {:?}",
            disk.node(),
            reading.queued,
            reading.misses
        );
    }
}

/// Writes between one and 16 sectors at a time, anywhere.
fn scribble(disk: &LoopDevice, seed: u64, stop: &AtomicBool, written: &AtomicU64) {
    let file = open_direct(&disk.path).unwrap();
    let mut rng = SmallRng::seed_from_u64(seed);
    while !stop.load(Ordering::Relaxed) {
        let sectors = rng.random_range(1..=16u64);
        let sector = rng.random_range(0..64 * MIB / 512 - 16);
        write_direct(&file, sector * 512, sectors as usize * 512, 7).unwrap();
        written.fetch_add(sectors, Ordering::Relaxed);
    }
}

/// A reading at rest, within a bounded time.
fn balanced(map: &SliceMap) -> Reading {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        map.settle().unwrap();
        let reading = map.reading().unwrap();
        if reading.nothing_in_flight() {
            return reading;
        }
        assert!(
            Instant::now() < until,
            "{} never came to rest: {reading:?}",
            map.volume()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}
