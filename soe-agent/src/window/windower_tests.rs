//! The windower against an oracle that sees all requests at once.

use proptest::prelude::*;

use super::*;
use crate::window::rows::IoOp;

const S: i64 = SECOND_NS;

fn record(ts: i64, volume: &str, op: IoOp, offset: u64, length: u64) -> IoRecord {
    IoRecord {
        ts,
        volume: volume.into(),
        op,
        offset,
        length,
        latency: Some(1_000_000),
        cgroup: None,
        pid: None,
        comm: None,
        sample_weight: 1,
    }
}

fn run(config: WindowConfig, records: &[IoRecord], last: i64) -> (Vec<VolumeWindow>, Books) {
    let mut windower = IoWindower::new(config);
    let mut out = Vec::new();
    for record in records {
        windower.push(record.clone(), &mut out);
        let books = windower.books();
        assert_eq!(books.seen, books.counted + books.dropped + books.held);
    }
    let books = windower.finish(last, &mut out);
    (out, books)
}

fn any_op() -> impl Strategy<Value = IoOp> {
    prop::sample::select(IoOp::ALL.to_vec())
}

prop_compose! {
    fn any_record()(
        ts in 0i64..20 * S,
        volume in prop::sample::select(vec!["a", "b"]),
        op in any_op(),
        block in 0u64..600,
        blocks in 1u64..40,
        latency in prop::option::weighted(0.98, 0u64..3_000_000_000),
        weight in 1u32..4,
    ) -> IoRecord {
        IoRecord {
            latency,
            sample_weight: weight,
            ..record(ts, volume, op, block * 64 * 1024, blocks * 4096)
        }
    }
}

/// Mean queue depth of `[start, end)`, by summing what each request adds to it.
fn depth(records: &[&IoRecord], start: i64, end: i64) -> f64 {
    let overlap: i64 = records
        .iter()
        .map(|r| (r.ts + r.latency.unwrap() as i64).min(end) - r.ts.max(start))
        .filter(|&ns| ns > 0)
        .sum();
    overlap as f64 / (end - start) as f64
}

proptest! {
    #[test]
    fn windows_say_what_an_oracle_says(mut records in prop::collection::vec(any_record(), 1..200)) {
        records.sort_by_key(|r| r.ts);
        let last = records.last().unwrap().ts;
        let (windows, books) = run(WindowConfig::default(), &records, last);
        prop_assert_eq!(books, Books {
            seen: records.len() as u64, counted: records.len() as u64, dropped: 0, held: 0,
        });
        for name in ["a", "b"] {
            let mine: Vec<&IoRecord> = records.iter().filter(|r| &*r.volume == name).collect();
            let windows: Vec<_> = windows.iter().filter(|w| &*w.volume == name).collect();
            let Some(first) = mine.first() else { prop_assert!(windows.is_empty()); continue };
            // One window a second from the first request to the end, none missing.
            let starts: Vec<i64> = windows.iter().map(|w| w.start / S).collect();
            prop_assert_eq!(starts, (first.ts / S..=last / S).collect::<Vec<_>>());
            for window in windows {
                let inside: Vec<&&IoRecord> =
                    mine.iter().filter(|r| (window.start..window.end()).contains(&r.ts)).collect();
                let sum = |class: IoClass, of: fn(&IoRecord) -> u64| -> u64 {
                    inside.iter().filter(|r| r.op.class() == class)
                        .map(|r| of(r) * u64::from(r.sample_weight)).sum()
                };
                for (class, stats) in [(IoClass::Read, &window.read), (IoClass::Write, &window.write)] {
                    prop_assert_eq!(stats.ops, Some(sum(class, |_| 1)));
                    prop_assert_eq!(stats.bytes, Some(sum(class, |r| r.length)));
                    prop_assert_eq!(
                        stats.histogram.total(),
                        sum(class, |r| u64::from(r.latency.is_some()))
                    );
                    prop_assert_eq!(
                        stats.latency.map(|l| l.max),
                        inside.iter().filter(|r| r.op.class() == class).filter_map(|r| r.latency).max()
                    );
                }
                prop_assert_eq!(window.discard_ops, Some(sum(IoClass::Discard, |_| 1)));
                prop_assert_eq!(window.discard_bytes, Some(sum(IoClass::Discard, |r| r.length)));
                prop_assert_eq!(window.flush_ops, Some(sum(IoClass::Flush, |_| 1)));
                let moved = |r: &&&&IoRecord| matches!(r.op.class(), IoClass::Read | IoClass::Write);
                let mut regions: Vec<u64> = inside.iter().filter(moved)
                    .flat_map(|r| (r.offset / 4096..(r.offset + r.length) / 4096).map(|b| b / 256))
                    .collect();
                regions.sort_unstable();
                regions.dedup();
                prop_assert_eq!(window.unique_regions, Some(regions.len() as u64));
                let known = mine.iter().filter(|r| r.ts < window.end()).all(|r| r.latency.is_some());
                prop_assert_eq!(window.queue_depth.is_some(), known);
                if let Some(queue) = window.queue_depth {
                    let want = depth(
                        &mine.iter().copied().filter(|r| r.ts < window.end()).collect::<Vec<_>>(),
                        window.start, window.end(),
                    );
                    prop_assert!((queue.mean - want).abs() < 1e-6, "{} is not {want}", queue.mean);
                }
            }
        }
    }

    #[test]
    fn a_request_held_back_long_enough_is_never_lost(
        records in prop::collection::vec(any_record(), 1..200),
        reorder in 0i64..30 * S,
    ) {
        let config = WindowConfig { reorder, ..WindowConfig::default() };
        let (windows, books) = run(config, &records, 20 * S);
        prop_assert_eq!(books.seen, records.len() as u64);
        prop_assert_eq!(books.seen, books.counted + books.dropped);
        prop_assert_eq!(windows.iter().map(|w| w.dropped).sum::<u64>(), books.dropped);
        if reorder > 20 * S {
            prop_assert_eq!(books.dropped, 0);
        }
        // Windows of one volume come out in order, none twice.
        for name in ["a", "b"] {
            let starts: Vec<i64> =
                windows.iter().filter(|w| &*w.volume == name).map(|w| w.start).collect();
            prop_assert!(starts.windows(2).all(|pair| pair[0] + S == pair[1]));
        }
    }
}

#[test]
fn sequential_share_seek_distance_and_rereads() {
    let mut records: Vec<IoRecord> = (0..10)
        .map(|i| record(i, "a", IoOp::Read, i as u64 * 4096, 4096))
        .collect();
    records.extend((0..10).map(|i| record(10 + i, "a", IoOp::Read, i as u64 * 4096, 4096)));
    let (windows, _) = run(WindowConfig::default(), &records, 0);
    let window = &windows[0];
    // Two runs of ten: the first request of each continues nothing.
    assert_eq!(window.sequential_share, Some(0.9));
    assert_eq!(window.reread_share, Some(0.5));
    assert_eq!(window.seek_distance_p50, Some(0));

    let apart: Vec<IoRecord> = (0..9)
        .map(|i| record(i, "a", IoOp::Write, (i as u64 % 2) << 40, 4096))
        .collect();
    let (windows, _) = run(WindowConfig::default(), &apart, 0);
    assert_eq!(windows[0].sequential_share, Some(0.0));
    let distance = windows[0].seek_distance_p50.unwrap();
    assert!(distance.abs_diff(1 << 40) <= 1 << 36, "{distance}");
}

#[test]
fn idle_time_is_zeroes_and_an_interruption_is_missing() {
    let config = WindowConfig {
        max_idle: 10 * S,
        ..WindowConfig::default()
    };
    let records = [
        record(0, "a", IoOp::Read, 0, 512),
        record(5 * S, "a", IoOp::Read, 0, 512),
        record(1_000_000 * S, "a", IoOp::Read, 0, 512),
    ];
    let (windows, _) = run(config, &records, 1_000_000 * S);
    let starts: Vec<i64> = windows.iter().map(|w| w.start / S).collect();
    assert_eq!(starts, [0, 1, 2, 3, 4, 5, 1_000_000]);
    assert_eq!(windows[2].read.ops, Some(0));
    assert_eq!(
        windows[2].queue_depth,
        Some(QueueDepth { mean: 0.0, max: 0 })
    );
    assert_eq!(windows[2].sequential_share, None);
}

#[test]
fn a_recorded_volume_is_idle_before_its_first_request() {
    let mut windower = IoWindower::new(WindowConfig::default());
    let mut out = Vec::new();
    windower.begin(&"a".into(), 3 * S + 7);
    windower.push(record(6 * S, "a", IoOp::Flush, 0, 0), &mut out);
    windower.advance(6 * S + 1, &mut out);
    assert_eq!(
        out.iter().map(|w| w.start / S).collect::<Vec<_>>(),
        [3, 4, 5]
    );
    windower.finish(8 * S, &mut out);
    assert_eq!(
        out.iter().map(|w| w.flush_ops.unwrap()).collect::<Vec<_>>(),
        [0, 0, 0, 1, 0, 0]
    );
}

#[test]
fn a_request_held_back_may_open_the_first_window() {
    let config = WindowConfig {
        reorder: 20 * S,
        ..WindowConfig::default()
    };
    let records = [
        record(9 * S, "a", IoOp::Read, 0, 4096),
        record(0, "a", IoOp::Read, 0, 4096),
    ];
    let (windows, books) = run(config, &records, 9 * S);
    assert_eq!((windows.len(), books.dropped), (10, 0));
}
