use super::*;
use crate::stage::hash::mix;

fn cache(capacity: usize, max_depth: u32) -> LiveCache {
    LiveCache::new(LiveCacheConfig {
        capacity,
        max_depth,
        history: 10_000,
        ..LiveCacheConfig::default()
    })
}

fn read(cache: &mut LiveCache, block: u64, blocks: u64) -> Found {
    let range = ByteRange::new(block * 4096, blocks * 4096);
    cache.access(Access::Read, range, &mut Vec::new())
}

#[test]
fn a_scan_does_not_push_out_what_is_read_again() {
    let mut cache = cache(1000, 0);
    for round in 0..20u64 {
        for block in (0..300).chain(10_000 + 600 * round..10_600 + 600 * round) {
            read(&mut cache, block, 1);
        }
    }
    // Least recently used would keep none of a larger scan.
    (0..1000).for_each(|b| _ = read(&mut cache, 50_000 + b, 1));
    let hits: u64 = (0..300).map(|b| read(&mut cache, b, 1).hits).sum();
    assert!(hits > 280, "{hits} of 300");
}

#[test]
fn a_run_is_read_ahead_of_the_requests() {
    let mut cache = cache(1000, 64);
    let misses: u64 = (0..500).map(|i| read(&mut cache, i * 8, 8).misses).sum();
    assert!(misses <= 16, "{misses} of 4000");
    assert_eq!(cache.statistics().prefetched_used, 4000 - misses);
    let mut fetch = Vec::new();
    cache.access(Access::Read, ByteRange::new(4000 * 4096, 4096), &mut fetch);
    assert!(
        fetch
            .iter()
            .all(|r| r.offset > 4000 * 4096 && r.len % 4096 == 0)
    );
}

#[test]
fn a_sequence_read_before_is_replayed() {
    let mut cache = cache(500, 64);
    let sequence: Vec<u64> = (0..2000).map(|i| mix(i) >> 30).collect();
    let mut round = || {
        sequence
            .iter()
            .map(|b| read(&mut cache, *b, 1).misses)
            .sum::<u64>()
    };
    assert_eq!(round(), 2000);
    let again = round();
    assert!(again < 100, "{again} misses of 2000 the second time");
}

#[test]
fn prefetching_stops_where_it_is_waste() {
    let mut cache = cache(1000, 64);
    for i in 0..50_000u64 {
        read(&mut cache, mix(i) >> 20, 1);
    }
    let before = cache.statistics().prefetched;
    for i in 50_000..60_000u64 {
        read(&mut cache, mix(i) >> 20, 1);
    }
    let wasted = cache.statistics().prefetched - before;
    assert!(wasted < 1000, "{wasted} prefetched for 10,000 random reads");
}

#[test]
fn staged_blocks_serve_and_useless_staging_fades() {
    let mut cache = cache(10_000, 0);
    let staged = |n: u64| -> Vec<ByteRange> { vec![ByteRange::new(n * 409_600_000, 409_600_000)] };
    let mut counts = Vec::new();
    for n in 0..12 {
        let before = cache.statistics().staged;
        let mut fetch = Vec::new();
        cache.stage(&staged(n), &mut fetch);
        let count = cache.statistics().staged - before;
        assert_eq!(fetch.iter().map(|r| r.len).sum::<u64>(), count * 4096);
        counts.push(count);
        if n < 6 {
            let found = read(&mut cache, n * 100_000, count);
            assert_eq!(found.misses, 0);
        }
    }
    assert_eq!(counts[0], 100, "it begins with a hundredth");
    assert_eq!(counts[5], 1000, "and grows to a tenth");
    assert!(counts[11] < 50, "{counts:?}");
}

#[test]
fn any_access_keeps_within_the_capacity_and_gives_the_same_result() {
    let mut random = 0u64;
    let mut next = move || {
        random += 1;
        mix(random)
    };
    for capacity in [1, 7, 300] {
        let mut caches = [cache(capacity, 64), cache(capacity, 64)];
        for _ in 0..5000 {
            let (what, offset, len) = (next() % 16, next(), next());
            let range = match what % 4 {
                0 => ByteRange::new(offset, len),
                1 => ByteRange::new(u64::MAX - offset % 100_000, len % 100_000),
                2 => ByteRange::new(offset % 100_000, len % 3 * 4096),
                _ => ByteRange::new(offset % 8_000_000, len % 100_000),
            };
            let did = caches.each_mut().map(|cache| {
                let mut fetch = Vec::new();
                match what {
                    0 => cache.stage(&[range], &mut fetch),
                    1..4 => _ = cache.access(Access::Write, range, &mut fetch),
                    _ => _ = cache.access(Access::Read, range, &mut fetch),
                }
                assert!(cache.len() <= capacity);
                (fetch, cache.statistics())
            });
            assert_eq!(did[0], did[1]);
        }
    }
}
