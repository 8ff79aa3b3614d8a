use super::*;

const S: i64 = 1_000_000_000;
const MANY: u64 = 1 << 40;

fn block(i: u64) -> ByteRange {
    ByteRange::new(i * 4096, 4096)
}

fn read(heat: &mut BurstHeat, blocks: impl IntoIterator<Item = u64>) {
    // Not in ascending order, so that no scan is seen.
    let mut blocks: Vec<u64> = blocks.into_iter().collect();
    blocks.sort_unstable_by_key(|b| mix(*b));
    for b in blocks {
        heat.record(0, Access::Read, block(b), 1.0);
    }
}

fn burst(heat: &mut BurstHeat, at: UnixNanos, blocks: impl IntoIterator<Item = u64>) {
    heat.burst_began(at);
    read(heat, blocks);
    heat.burst_ended(at + S);
}

fn ranked(heat: &BurstHeat, now: UnixNanos, blocks: u64) -> Vec<u64> {
    let mut order: Vec<u64> = heat
        .rank(now, blocks * 4096, MANY)
        .iter()
        .map(|r| r.range.offset / 4096)
        .collect();
    order.sort_unstable();
    order
}

#[test]
fn without_bursts_the_most_read_come_first() {
    let mut heat = BurstHeat::new(BurstHeatConfig::default());
    for (i, reads) in [(3, 5), (90, 9), (1000, 2)] {
        for _ in 0..reads {
            read(&mut heat, [i]);
        }
    }
    let order = |budget| -> Vec<u64> {
        let ranked = heat.rank(0, budget, MANY);
        ranked.iter().map(|r| r.range.offset / 4096).collect()
    };
    assert_eq!(order(3 * 4096), [90, 3, 1000]);
    assert_eq!(order(2 * 4096 + 100), [90, 3]);
    assert!(order(100).is_empty());
}

#[test]
fn what_bursts_read_beats_what_is_read_more_often_between_them() {
    let mut heat = BurstHeat::new(BurstHeatConfig::default());
    heat.set_budget(100 * 4096);
    for i in 0..6 {
        for _ in 0..10 {
            read(&mut heat, 5000..5100);
        }
        burst(&mut heat, i * 3600 * S, 0..100);
    }
    read(&mut heat, 5000..5100);
    assert_eq!(ranked(&heat, 0, 100), (0..100).collect::<Vec<_>>());
}

#[test]
fn kinds_of_bursts_are_told_apart_by_what_precedes_them() {
    let mut heat = BurstHeat::new(BurstHeatConfig::default());
    heat.set_budget(100 * 4096);
    let kind = |i: u64| i % 3 / 2;
    for i in 0..20u64 {
        read(
            &mut heat,
            20_000 * (kind(i) + 1)..20_000 * (kind(i) + 1) + 400,
        );
        burst(&mut heat, 0, 1000 * kind(i)..1000 * kind(i) + 100);
    }
    for wanted in [1, 0] {
        read(
            &mut heat,
            20_000 * (wanted + 1)..20_000 * (wanted + 1) + 400,
        );
        let chosen = ranked(&heat, 0, 100);
        let right = chosen.iter().filter(|b| **b / 1000 == wanted).count();
        assert!(right >= 95, "{right} of kind {wanted}");
    }
}

#[test]
fn bursts_at_the_same_time_of_day_read_the_same() {
    let mut heat = BurstHeat::new(BurstHeatConfig::default());
    heat.set_budget(100 * 4096);
    let hour = 3600 * S;
    for day in 0..8i64 {
        burst(&mut heat, (24 * day + 3) * hour, 0..100);
        for h in [9, 12, 15] {
            burst(&mut heat, (24 * day + h) * hour, 7000..7100);
        }
    }
    let at_night = ranked(&heat, (24 * 8 + 3) * hour, 100);
    assert!(at_night.iter().filter(|b| **b < 100).count() >= 95);
    let at_noon = ranked(&heat, (24 * 8 + 12) * hour, 100);
    assert!(at_noon.iter().filter(|b| **b >= 7000).count() >= 95);
}

#[test]
fn blocks_that_are_overwritten_are_not_worth_it() {
    let mut heat = BurstHeat::new(BurstHeatConfig::default());
    for _ in 0..5 {
        heat.burst_began(0);
        for i in 0..50 {
            heat.record(0, Access::Write, block(i), 1.0);
            read(&mut heat, [i, i + 500]);
        }
        heat.burst_ended(0);
    }
    assert_eq!(ranked(&heat, 0, 50), (500..550).collect::<Vec<_>>());
}

#[test]
fn a_live_scan_is_continued_into_what_was_never_read() {
    let mut heat = BurstHeat::new(BurstHeatConfig::default());
    heat.set_budget(200 * 4096);
    for i in 0..40u64 {
        if i % 10 == 9 {
            heat.burst_began(0);
        }
        for j in 0..20 {
            let range = ByteRange::new((i * 20 + j) * 65_536, 65_536);
            heat.record(0, Access::Read, range, 1.0);
        }
        heat.burst_ended(0);
    }
    let next = 800 * 16;
    let chosen = ranked(&heat, 0, 200);
    assert_eq!(chosen, (next..next + 200).collect::<Vec<_>>());
}

#[test]
fn what_is_told_of_long_before_is_no_part_of_a_burst() {
    let mut heat = BurstHeat::new(BurstHeatConfig::default());
    heat.set_budget(50 * 4096);
    heat.burst_began(0);
    read(&mut heat, 0..50);
    (1000..1050).for_each(|index| heat.prime_unit(index, 1.0, 0.0));
    heat.burst_ended(S);
    let (before, length) = (heat.clock.accesses, heat.length);
    assert_eq!((before, length), (100, 50.0));
    let clock = heat.clock;
    let mut in_burst = |index: u64| {
        let unit = &mut heat.units[heat.slots[&index] as usize];
        unit.settle(&clock);
        unit.in_bursts(&[1.0])
    };
    assert_eq!((in_burst(7), in_burst(1007)), (1.0, 0.0));
}

#[test]
fn memory_is_bounded_and_what_bursts_read_stays() {
    let mut heat = BurstHeat::new(BurstHeatConfig {
        max_units: 1000,
        ..BurstHeatConfig::default()
    });
    heat.set_budget(20 * 4096);
    for i in 0..10 {
        burst(&mut heat, 0, 0..20);
        read(&mut heat, 10_000 * (i + 1)..10_000 * (i + 1) + 3000);
    }
    heat.record(0, Access::Read, ByteRange::new(0, u64::MAX), 1.0);
    assert!(heat.len() <= 1000);
    let chosen = ranked(&heat, 0, 20);
    assert!(
        chosen.iter().filter(|b| **b < 20).count() >= 18,
        "{chosen:?}"
    );
}

#[test]
fn ranking_is_sound_and_the_same_for_the_same_accesses() {
    let mut random = 1u64;
    let mut next = move || {
        random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(random)
    };
    for _ in 0..30 {
        let mut maps = [0, 1].map(|_| {
            BurstHeat::new(BurstHeatConfig {
                max_units: 300,
                budget_share: f64::NAN,
                ..BurstHeatConfig::default()
            })
        });
        for _ in 0..400 {
            let (what, at, offset, len) = (next() % 20, next() as i64, next(), next());
            let range = match what % 3 {
                0 => ByteRange::new(offset, len),
                1 => ByteRange::new(offset % 1_000_000, len % 100_000),
                _ => ByteRange::new(u64::MAX - offset % 9000, len % 10_000),
            };
            for map in &mut maps {
                match what {
                    0 => map.burst_began(at),
                    1 => map.burst_ended(at),
                    2..8 => map.record(at, Access::Write, range, f64::MAX),
                    8 => map.record(at, Access::Read, range, f64::NAN),
                    _ => map.record(at, Access::Read, range, 1.5),
                }
            }
        }
        let (budget, volume) = (next() % 1_000_000, next() >> (next() % 60));
        let ranked = maps[0].rank(i64::MIN, budget, volume);
        assert_eq!(ranked, maps[1].rank(i64::MIN, budget, volume));
        assert!(ranked.iter().map(|r| r.range.len).sum::<u64>() <= budget);
        assert!(ranked.windows(2).all(|w| w[0].score >= w[1].score));
        let mut ranges: Vec<_> = ranked.iter().map(|r| r.range).collect();
        ranges.sort();
        assert!(ranges.windows(2).all(|w| w[0].end() <= w[1].offset));
        assert!(ranges.iter().all(|r| r.end() <= volume && r.len > 0));
    }
}
