//! A pace in bytes per second.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::seam::{Clock, Pace};

/// Longest time between two looks at the rate, so that a change and a cancellation are seen soon.
const LOOK: Duration = Duration::from_millis(20);
/// Bytes that may go at once after a time of rest, as time at the present rate.
const BURST: f64 = 0.05;

/// A token bucket whose rate others may change while I/O waits in it.
///
/// A request may go as soon as the bucket is not in debt, and takes it into debt by its size: so a
/// request larger than the bucket goes, too, and the average keeps the rate.
pub struct PacedBy<C> {
    clock: C,
    rate: AtomicU64,
    cancelled: AtomicBool,
    waited_ns: AtomicU64,
    bucket: Mutex<Bucket>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    filled: Duration,
}

impl<C: Clock> PacedBy<C> {
    /// Lets `rate` bytes per second pass; 0 holds everything until the rate changes.
    pub fn new(clock: C, rate: u64) -> Self {
        let filled = clock.monotonic();
        Self {
            clock,
            rate: AtomicU64::new(rate),
            cancelled: AtomicBool::new(false),
            waited_ns: AtomicU64::new(0),
            bucket: Mutex::new(Bucket {
                tokens: 0.0,
                filled,
            }),
        }
    }

    /// The rate now, in bytes per second.
    pub fn rate(&self) -> u64 {
        self.rate.load(Ordering::Relaxed)
    }

    /// Changes the rate, also for I/O that waits already.
    pub fn set_rate(&self, bytes_per_second: u64) {
        self.rate.store(bytes_per_second, Ordering::Relaxed);
    }

    /// How long I/O was held back so far.
    pub fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited_ns.load(Ordering::Relaxed))
    }

    /// Ends this and every later I/O with [`io::ErrorKind::Interrupted`].
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Takes `bytes`, or says how long to wait before asking again.
    fn take(&self, bytes: u64) -> Result<(), Duration> {
        let rate = self.rate() as f64;
        let now = self.clock.monotonic();
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_sub(bucket.filled).as_secs_f64();
        bucket.tokens = (bucket.tokens + passed * rate).min(rate * BURST);
        bucket.filled = now;
        if rate > 0.0 && bucket.tokens >= 0.0 {
            bucket.tokens -= bytes as f64;
            return Ok(());
        }
        if rate == 0.0 {
            return Err(LOOK);
        }
        let wait = Duration::try_from_secs_f64(-bucket.tokens / rate).unwrap_or(LOOK);
        Err(wait.clamp(Duration::from_micros(50), LOOK))
    }
}

impl<C: Clock> Pace for PacedBy<C> {
    fn before(&self, bytes: u64) -> io::Result<()> {
        loop {
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(io::Error::new(
                    io::ErrorKind::Interrupted,
                    "the reading was cancelled",
                ));
            }
            if bytes == 0 {
                return Ok(());
            }
            match self.take(bytes) {
                Ok(()) => return Ok(()),
                Err(wait) => {
                    self.clock.sleep(wait);
                    let ns = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
                    self.waited_ns.fetch_add(ns, Ordering::Relaxed);
                }
            }
        }
    }
}

impl<P: Pace + ?Sized> Pace for Arc<P> {
    fn before(&self, bytes: u64) -> io::Result<()> {
        (**self).before(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seam::UnixNanos;

    #[derive(Default)]
    struct Ticker(AtomicU64);

    impl Clock for &Ticker {
        fn now(&self) -> UnixNanos {
            self.0.load(Ordering::Relaxed) as UnixNanos
        }

        fn monotonic(&self) -> Duration {
            Duration::from_nanos(self.0.load(Ordering::Relaxed))
        }

        fn sleep(&self, duration: Duration) {
            self.0
                .fetch_add(duration.as_nanos() as u64, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_average_keeps_the_rate_whatever_the_requests_are() {
        for request in [4_096u64, 1 << 20] {
            let ticker = Ticker::default();
            let pace = PacedBy::new(&ticker, 10 << 20);
            let total = 64u64 << 20;
            for _ in 0..total / request {
                pace.before(request).unwrap();
            }
            let took = ticker.0.load(Ordering::Relaxed) as f64 / 1e9;
            assert!((6.0..6.6).contains(&took), "{request}: {took} s");
        }
    }

    #[test]
    fn rest_earns_no_more_than_a_short_burst() {
        let ticker = Ticker::default();
        let pace = PacedBy::new(&ticker, 1 << 20);
        (&ticker).sleep(Duration::from_secs(3600));
        let began = (&ticker).monotonic();
        for _ in 0..1024 {
            pace.before(4096).unwrap();
        }
        let took = ((&ticker).monotonic() - began).as_secs_f64();
        assert!(took > 3.8, "4 MiB at 1 MiB/s took {took} s");
    }

    #[test]
    fn a_rate_of_zero_holds_until_it_is_raised_or_cancelled() {
        let ticker = Ticker::default();
        let pace = PacedBy::new(&ticker, 0);
        assert!(pace.take(1).is_err());
        pace.set_rate(1000);
        assert!(pace.before(1).is_ok());
        pace.cancel();
        let error = pace.before(1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Interrupted);
    }
}
