//! When to stage a volume's hot blocks: shortly before a burst, with time enough to copy. Pure.

use super::capture::Span;
use super::types::{PlannerConfig, nanos};
use crate::model::{Q50, QuantileForecast};
use crate::seam::UnixNanos;

/// A burst that is expected.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpectedBurst {
    /// When it begins.
    pub at: UnixNanos,
    /// How likely it is, 0 to 1.
    pub probability: f64,
    /// Why it is expected, in words.
    pub reason: String,
}

/// How likely a burst is taken to be that someone announced.
const ANNOUNCED: f64 = 0.9;

/// The next burst after `now` that is likely enough to act on.
///
/// It comes from what was announced, from the onset probabilities, or from the median load rising
/// above the threshold, whichever is first.
pub fn next_burst(
    forecast: Option<&QuantileForecast>,
    announced: &[UnixNanos],
    config: &PlannerConfig,
    now: UnixNanos,
) -> Option<ExpectedBurst> {
    let announced = announced
        .iter()
        .copied()
        .filter(|at| *at > now)
        .min()
        .map(|at| ExpectedBurst {
            at,
            probability: ANNOUNCED,
            reason: "a burst was announced".to_owned(),
        });
    let Some(forecast) = forecast else {
        return announced;
    };
    // A bin that has begun is not over: a burst expected in it may come at any moment.
    let bin = config.scale.bin_nanos();
    let start = |h: usize| {
        let start = forecast.start_of(h);
        (start.saturating_add(bin) > now).then_some(start.max(now))
    };
    let by_onset = forecast
        .next_onset(config.staging.alarm)
        .and_then(|(h, probability)| Some((start(h)?, probability)))
        .map(|(at, probability)| ExpectedBurst {
            at,
            probability,
            reason: format!("earlier bursts foretell one with probability {probability:.2}"),
        });
    let by_load = forecast
        .rows
        .iter()
        .position(|row| f64::from(row[Q50]) > forecast.burst_threshold)
        .filter(|h| *h > 0)
        .and_then(start)
        .map(|at| ExpectedBurst {
            at,
            probability: 0.5,
            reason: "the forecast's median rises above the burst threshold".to_owned(),
        });
    [announced, by_onset, by_load]
        .into_iter()
        .flatten()
        .min_by_key(|b| b.at)
}

/// Whether staging pays for a volume, by how much of what was chosen for bursts was read in them.
///
/// While it does not pay, blocks are still chosen but not copied, so that it is known when it would.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PrecisionGate {
    /// Decayed sum of the share used, and of ones.
    used: f64,
    judged: f64,
    off: bool,
}

/// What of the evidence is kept after each burst.
const KEEP: f64 = 0.8;
/// Bursts of evidence before staging is given up, decayed.
const LEAST_JUDGED: f64 = 2.4;
/// Staging comes back at this multiple of the precision at which it is given up.
const COMES_BACK: f64 = 1.5;

impl PrecisionGate {
    /// Takes how many of the `chosen` bytes were read.
    pub fn judge(&mut self, chosen: u64, used: u64, least: f64) {
        if chosen == 0 {
            return;
        }
        self.used = self.used * KEEP + (used as f64 / chosen as f64).min(1.0);
        self.judged = self.judged * KEEP + 1.0;
        let Some(precision) = self.precision() else {
            return;
        };
        self.off = match self.off {
            false => self.judged >= LEAST_JUDGED && precision < least,
            // Halfway to all of it at most, or a demanding floor would never let it back.
            true => precision < (least * COMES_BACK).min((1.0 + least) / 2.0),
        };
    }

    /// The share of the chosen bytes that was read of late; `None` before any burst.
    pub fn precision(&self) -> Option<f64> {
        (self.judged > 0.0).then(|| self.used / self.judged)
    }

    /// Whether staging is given up.
    pub fn off(&self) -> bool {
        self.off
    }
}

/// What staging has been doing for one volume.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StagingState {
    /// Whether it pays.
    pub gate: PrecisionGate,
    /// When what was chosen last is to be judged.
    pub judge_at: Option<UnixNanos>,
    /// When the copying under way, or the last one, began.
    pub began: UnixNanos,
    /// How long copying took of late; `None` before the first time.
    pub takes: Option<i64>,
    /// Whether blocks are being copied.
    pub running: bool,
    /// The burst staged for last.
    pub staged_for: Option<UnixNanos>,
    /// Not before this, after a failure.
    pub not_before: Option<UnixNanos>,
    /// Failures in a row.
    pub failures: u32,
}

/// What one volume may take of the budgets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Allowed {
    /// Bytes it may stage.
    pub bytes: u64,
    /// How fast, in bytes per second.
    pub rate: f64,
}

/// Whether staging for `burst` is to be thought of at all, whatever it may take.
pub fn possible(
    state: &StagingState,
    burst: &ExpectedBurst,
    in_burst: bool,
    config: &PlannerConfig,
    now: UnixNanos,
) -> bool {
    let staging = &config.staging;
    if !staging.enabled || state.running || in_burst || burst.probability < staging.alarm {
        return false;
    }
    if state.not_before.is_some_and(|at| now < at) {
        return false;
    }
    // The same burst, seen again: its expected time moves a little from forecast to forecast.
    let slack = config.scale.bin_nanos() * (config.burst.quiet_bins as i64 + 1);
    !state
        .staged_for
        .is_some_and(|at| now < at || (burst.at - at).abs() <= slack)
}

/// Whether to begin staging at `now` for `burst`, and why.
pub fn should_start(
    state: &StagingState,
    burst: &ExpectedBurst,
    in_burst: bool,
    config: &PlannerConfig,
    allowed: Allowed,
    now: UnixNanos,
) -> Option<String> {
    if !possible(state, burst, in_burst, config, now) {
        return None;
    }
    // What was seen says more than what is allowed, of both the disk and the amount.
    let most = (allowed.bytes as f64 / allowed.rate.max(1.0) * 1e9) as i64;
    let copy = state.takes.unwrap_or(most);
    let lead = nanos(config.scale.bin()).saturating_add(copy);
    if now < burst.at.saturating_sub(lead) {
        return None;
    }
    Some(format!(
        "{}; it begins in {}, copying takes up to {}",
        burst.reason,
        Span(burst.at - now),
        Span(copy)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Member, TimeScale};
    use std::time::Duration;

    const S: i64 = 1_000_000_000;

    fn config() -> PlannerConfig {
        let mut c = PlannerConfig::new(TimeScale::new(Duration::from_secs(10), 24).unwrap());
        c.staging.rate = 1e6;
        c.staging.budget_bytes = 20_000_000;
        c
    }

    fn allowed() -> Allowed {
        Allowed {
            bytes: config().staging.budget_bytes,
            rate: config().staging.rate,
        }
    }

    #[test]
    fn staging_that_is_not_read_is_given_up_and_comes_back() {
        let mut gate = PrecisionGate::default();
        gate.judge(1000, 0, 0.1);
        gate.judge(0, 0, 0.1);
        assert!(!gate.off(), "one false alarm says little");
        for _ in 0..3 {
            gate.judge(1000, 10, 0.1);
        }
        assert!(gate.off());
        gate.judge(1000, 110, 0.1);
        assert!(gate.off(), "{:?}", gate.precision());
        for _ in 0..3 {
            gate.judge(1000, 400, 0.1);
        }
        assert!(!gate.off(), "{:?}", gate.precision());
        let mut demanding = PrecisionGate::default();
        (0..3).for_each(|_| demanding.judge(1000, 0, 0.99));
        assert!(demanding.off());
        (0..40).for_each(|_| demanding.judge(1000, 1000, 0.99));
        assert!(!demanding.off(), "{:?}", demanding.precision());
        // Between the two thresholds nothing changes.
        while gate.precision().unwrap() > 0.12 {
            gate.judge(1000, 110, 0.1);
        }
        assert!(!gate.off());
    }

    fn forecast(onset: &[f32]) -> QuantileForecast {
        QuantileForecast {
            issued_at: 0,
            bin: Duration::from_secs(10),
            rows: vec![[1.0; 6]; onset.len()],
            onset: onset.to_vec(),
            burst_threshold: 100.0,
            member: Member::Ewma,
        }
    }

    #[test]
    fn staging_begins_in_time_to_copy_and_not_earlier() {
        let c = config();
        let mut onset = vec![0.0; 20];
        onset[10] = 0.8;
        let f = forecast(&onset);
        let burst = next_burst(Some(&f), &[], &c, 0).unwrap();
        assert_eq!(burst.at, 100 * S);
        let state = StagingState::default();
        assert!(should_start(&state, &burst, false, &c, allowed(), 60 * S).is_none());
        let reason = should_start(&state, &burst, false, &c, allowed(), 70 * S).unwrap();
        assert!(reason.contains("20.0 s"), "{reason}");
        assert!(should_start(&state, &burst, true, &c, allowed(), 70 * S).is_none());
    }

    #[test]
    fn a_burst_is_staged_for_once() {
        let c = config();
        let burst = ExpectedBurst {
            at: 110 * S,
            probability: 0.9,
            reason: String::new(),
        };
        let state = StagingState {
            staged_for: Some(100 * S),
            ..StagingState::default()
        };
        assert!(should_start(&state, &burst, false, &c, allowed(), 95 * S).is_none());
        assert!(should_start(&state, &burst, false, &c, allowed(), 105 * S).is_none());
        let later = ExpectedBurst {
            at: 300 * S,
            ..burst
        };
        assert!(should_start(&state, &later, false, &c, allowed(), 280 * S).is_some());
    }

    #[test]
    fn a_rising_median_and_an_announcement_count_too() {
        let c = config();
        let mut f = forecast(&[0.0; 20]);
        f.rows[5][Q50] = 200.0;
        assert_eq!(next_burst(Some(&f), &[], &c, 0).unwrap().at, 50 * S);
        assert_eq!(next_burst(Some(&f), &[30 * S], &c, 0).unwrap().at, 30 * S);
        assert_eq!(next_burst(None, &[30 * S], &c, 0).unwrap().at, 30 * S);
        assert!(next_burst(None, &[30 * S], &c, 40 * S).is_none());
    }
}
