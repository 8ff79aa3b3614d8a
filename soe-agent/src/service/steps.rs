//! Time where the wall clock may step. Pure.

use std::time::Duration;

use crate::seam::{Clock, UnixNanos};

/// By how much of a window's length the two clocks may differ before it counts as a step: clocks are
/// slewed by far less.
const SLEWED: i64 = 10;
/// A clock that runs ahead by more than this at once is doubted.
const LEAP: Duration = Duration::from_secs(3600);
/// How long it is doubted.
const DOUBT: Duration = Duration::from_secs(86_400);

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// An instant by both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moment {
    /// By the clock that may step.
    pub(super) wall: UnixNanos,
    /// By the clock that never does.
    pub(super) monotonic: Duration,
}

impl Moment {
    /// Now.
    pub(super) fn now(clock: &dyn Clock) -> Self {
        Self {
            wall: clock.now(),
            monotonic: clock.monotonic(),
        }
    }

    /// The window from `earlier` to this moment: where it begins and how long it is, in ns.
    ///
    /// While the wall clock runs evenly one window begins where the last one ended. When it stepped
    /// in between, the window is as long as it really was and ends now: a step forward leaves a gap,
    /// of which nothing is known, and after a step back the same hours are filled once more.
    pub(super) fn window_since(&self, earlier: Moment) -> (UnixNanos, i64) {
        let took = nanos(self.monotonic.saturating_sub(earlier.monotonic)).max(1);
        let by_wall = self.wall.saturating_sub(earlier.wall);
        if by_wall > 0 && by_wall.abs_diff(took) <= took.unsigned_abs() / SLEWED.unsigned_abs() {
            (earlier.wall, by_wall)
        } else {
            (self.wall.saturating_sub(took), took)
        }
    }
}

/// Wall-clock time for what cannot be undone: the removal of history by age.
///
/// A clock that leaps ahead, because it was set wrong, would make everything old at once. It is
/// believed only when it has stood by it for a day; until then time goes on as before.
#[derive(Clone, Copy, Debug)]
pub(super) struct SoberTime {
    base: Moment,
    doubted_since: Option<Duration>,
}

impl SoberTime {
    /// Believes the clock as it is.
    pub(super) fn new(now: Moment) -> Self {
        Self {
            base: now,
            doubted_since: None,
        }
    }

    /// The time to go by.
    pub(super) fn at(&mut self, now: Moment) -> UnixNanos {
        let passed = now.monotonic.saturating_sub(self.base.monotonic);
        let expected = self.base.wall.saturating_add(nanos(passed));
        if now.wall > expected.saturating_add(nanos(LEAP)) {
            let since = *self.doubted_since.get_or_insert(now.monotonic);
            if now.monotonic.saturating_sub(since) < DOUBT {
                return expected;
            }
        }
        *self = Self::new(now);
        now.wall
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::history::{HistoryReader, HistoryStore, Query, Retention, StoreConfig};
    use crate::window::{Name, SECOND_NS, VolumeWindow};

    /// 2026-01-01T00:00:00Z.
    const T0: UnixNanos = 1_767_225_600 * SECOND_NS;
    const S: Duration = Duration::from_secs(1);
    const HOUR: i64 = 3600 * SECOND_NS;

    /// A clock whose wall time is set by hand.
    struct StepClock(Mutex<(i64, Duration)>);

    impl StepClock {
        fn new() -> Self {
            Self(Mutex::new((0, Duration::ZERO)))
        }

        fn step(&self, by: i64) {
            self.0.lock().unwrap().0 += by;
        }
    }

    impl Clock for StepClock {
        fn now(&self) -> UnixNanos {
            let (offset, monotonic) = *self.0.lock().unwrap();
            T0 + offset + nanos(monotonic)
        }
        fn monotonic(&self) -> Duration {
            self.0.lock().unwrap().1
        }
        fn sleep(&self, duration: Duration) {
            self.0.lock().unwrap().1 += duration;
        }
    }

    #[test]
    fn windows_join_while_the_clock_runs_evenly() {
        let clock = StepClock::new();
        let first = Moment::now(&clock);
        clock.sleep(S);
        // Slewed by a thousandth.
        clock.step(1_000_000);
        let second = Moment::now(&clock);
        assert_eq!(second.window_since(first), (T0, SECOND_NS + 1_000_000));
        clock.sleep(S);
        let third = Moment::now(&clock);
        let (start, length) = third.window_since(second);
        assert_eq!((start, start + length), (second.wall, third.wall));
    }

    /// A history over which the clock steps forward by an hour, then back by two: no window is lost
    /// or made longer, no file is overwritten, every reader is content, and the hour that was leapt
    /// over is unknown, not idle.
    #[test]
    fn a_history_survives_a_clock_that_steps() {
        let dir = tempfile::tempdir().unwrap();
        let store = HistoryStore::open(StoreConfig::new(dir.path())).unwrap();
        let clock = StepClock::new();
        let volume: Name = "v".into();
        let mut last = Moment::now(&clock);
        for second in 0..180 {
            match second {
                60 => clock.step(HOUR),
                120 => clock.step(-2 * HOUR),
                _ => {}
            }
            clock.sleep(S);
            let now = Moment::now(&clock);
            let (start, interval) = now.window_since(last);
            assert_eq!(interval, SECOND_NS, "second {second}");
            last = now;
            let mut window = VolumeWindow::unknown(start, interval, volume.clone());
            window.read.ops = Some(10);
            window.read.bytes = Some(40_960);
            window.write.ops = Some(0);
            window.write.bytes = Some(0);
            store.append(&[window]).unwrap();
            if second % 7 == 0 {
                store.flush().unwrap();
            }
            if second % 50 == 0 {
                store.maintain(clock.now()).unwrap();
            }
        }
        store.compact_all().unwrap();
        store.close().unwrap();
        let reader = HistoryReader::open(dir.path()).unwrap();
        assert!(reader.verify().unwrap().is_empty());
        let rows: Vec<VolumeWindow> = reader
            .rows::<VolumeWindow>(&Query::all())
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap();
        assert_eq!(rows.len(), 180);
        let ops: u64 = rows.iter().filter_map(|row| row.read.ops).sum();
        assert_eq!(ops, 1800);
        let minutes = |from: i64, to: i64| {
            let (bins, _) = reader
                .load_bins(&Query::range(from..to), 60 * SECOND_NS)
                .unwrap();
            let series = bins["v"].bins.clone();
            series
                .iter()
                .map(|bin| bin.and_then(|bin| bin.read_ops))
                .collect::<Vec<_>>()
        };
        // The minute before the step, the hour that was leapt over, the minute after it.
        let first = minutes(T0, T0 + 2 * HOUR);
        assert_eq!(first[0], Some(600.0));
        assert!(first[1..61].iter().all(Option::is_none), "{first:?}");
        assert_eq!(first[61], Some(600.0));
        // And the minute at the time that the clock was set back to.
        let back = minutes(T0 - HOUR, T0);
        assert_eq!(back[2], Some(600.0), "{back:?}");
    }

    /// The year is set wrong and mended after an hour: nothing of the history is removed. Without
    /// the doubt all of it would be.
    #[test]
    fn a_clock_that_leaps_ahead_removes_no_history() {
        for sober in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let store = HistoryStore::open(StoreConfig {
                retention: Retention {
                    max_age: Some(Duration::from_secs(30 * 86_400)),
                    ..Retention::default()
                },
                ..StoreConfig::new(dir.path())
            })
            .unwrap();
            let clock = StepClock::new();
            let mut time = SoberTime::new(Moment::now(&clock));
            let mut removed = 0;
            for minute in 0..180 {
                match minute {
                    30 => clock.step(3650 * 24 * HOUR),
                    90 => clock.step(-3650 * 24 * HOUR),
                    _ => {}
                }
                clock.sleep(60 * S);
                let window = VolumeWindow::unknown(clock.now(), SECOND_NS, "v".into());
                store.append(&[window]).unwrap();
                store.flush().unwrap();
                let now = Moment::now(&clock);
                let now = if sober { time.at(now) } else { now.wall };
                removed += store.maintain(now).unwrap().expired;
            }
            assert_eq!(removed > 0, !sober);
        }
    }

    #[test]
    fn a_leap_that_stays_is_believed_after_a_day() {
        let clock = StepClock::new();
        let mut time = SoberTime::new(Moment::now(&clock));
        clock.step(100 * 24 * HOUR);
        for hour in 0..24 {
            let believed = time.at(Moment::now(&clock));
            assert_eq!(believed, T0 + hour * HOUR, "hour {hour}");
            clock.sleep(3600 * S);
        }
        assert_eq!(time.at(Moment::now(&clock)), clock.now());
        // A step back is believed at once: it removes nothing.
        clock.step(-50 * 24 * HOUR);
        assert_eq!(time.at(Moment::now(&clock)), clock.now());
    }

    proptest! {
        #[test]
        fn a_window_is_never_longer_than_it_took_by_more_than_a_slew(
            wall in -1_000_000_000_000i64..1_000_000_000_000, took in 0u64..10_000_000_000,
        ) {
            let earlier = Moment { wall: T0, monotonic: Duration::from_secs(5) };
            let now = Moment {
                wall: T0.saturating_add(wall),
                monotonic: earlier.monotonic + Duration::from_nanos(took),
            };
            let (start, length) = now.window_since(earlier);
            prop_assert!(length >= 1);
            prop_assert!(length.abs_diff(took as i64) <= 1 + took / 10);
            prop_assert_eq!(start + length, now.wall);
        }
    }
}
