//! When to capture a group, which kind of layer, and why. Pure.

use std::fmt;
use std::time::Duration;

use super::types::{CaptureKind, GroupSpec, PlannerConfig, nanos};
use super::window::{Window, expected_load, quietest};
use crate::model::{Judgement, Pace, Q80, QuantileForecast, VolumeName};
use crate::seam::UnixNanos;

/// What the planner knows of a group that is not being captured.
#[derive(Clone, Debug)]
pub struct GroupView<'a> {
    /// What the user asked for.
    pub spec: &'a GroupSpec,
    /// When the group was created.
    pub created_at: UnixNanos,
    /// The cut of its newest layer.
    pub last_capture: Option<UnixNanos>,
    /// The cut of its newest baseline.
    pub last_baseline: Option<UnixNanos>,
    /// How long a differential is expected to take.
    pub differential_takes: Duration,
    /// How long a baseline is expected to take.
    pub baseline_takes: Duration,
    /// One forecast per volume; empty unless every volume has one.
    pub forecasts: Vec<&'a QuantileForecast>,
    /// The forecasts of other volumes on the same disks, as far as there are any: their load meets a capture
    /// as well.
    pub neighbours: Vec<&'a QuantileForecast>,
    /// The load observed last, all volumes and their neighbours together, in bytes per second; `None` if it
    /// is unknown of a volume.
    pub observed: Option<f64>,
    /// The median load of the volumes and their neighbours together, in bytes per second.
    pub median: f64,
    /// A volume that is in a burst right now.
    pub burst_on: Option<&'a VolumeName>,
    /// Whether to begin now, where that was judged.
    pub begin: Option<Judgement>,
}

/// Why nothing is done yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// The newest layer is fresh.
    Fresh,
    /// A volume is in a burst.
    Burst,
    /// A burst is about to begin.
    BurstExpected,
    /// A quieter window lies ahead.
    QuieterAhead,
    /// The window is here, but the load is above its forecast.
    LoadAboveForecast,
    /// There is no forecast, and the load is not low.
    NoForecast,
    /// Another volume on the same disk is being staged.
    Neighbour,
}

/// Starts an interval must have for the network to be asked when to begin.
const LEAST_STARTS: usize = 6;

/// What to do about a group.
#[derive(Clone, Debug, PartialEq)]
pub enum Intent {
    /// Capture now.
    Capture {
        /// The kind of layer.
        kind: CaptureKind,
        /// Whether the deadline presses.
        urgent: bool,
        /// When it is expected to end.
        until: UnixNanos,
        /// Why, in words.
        reason: String,
    },
    /// Wait.
    Wait {
        /// Why.
        waiting: Waiting,
        /// The window waited for, if there is one.
        window: Option<Window>,
        /// Why, in words.
        reason: String,
    },
}

/// The times between which a group must be captured next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Before this the newest layer is fresh enough.
    pub earliest: UnixNanos,
    /// From here on a capture cannot wait any longer.
    pub latest: UnixNanos,
    /// When the RPO is missed.
    pub deadline: UnixNanos,
}

impl GroupView<'_> {
    /// The times between which the group must be captured next.
    pub fn schedule(&self, config: &PlannerConfig) -> Schedule {
        let rpo = nanos(self.spec.rpo);
        let base = self.last_capture.unwrap_or(self.created_at);
        let deadline = base.saturating_add(rpo);
        // A capture takes time and is looked at only every tick.
        let takes = nanos(self.differential_takes).min(rpo / 2);
        let guard = nanos(config.tick).saturating_mul(2).max(rpo / 20);
        let latest = (deadline - takes - guard).max(base);
        let fresh = (rpo as f64 * config.earliest_share.clamp(0.0, 1.0)) as i64;
        let earliest = match self.last_capture {
            // Nothing is foreseen further ahead than a season.
            Some(_) => (base + fresh).max(latest - nanos(config.scale.season())),
            None => base,
        };
        Schedule {
            earliest: earliest.min(latest),
            latest,
            deadline,
        }
    }

    /// How the interval stands at `now`, if it is to be judged whether to begin: between the times at which
    /// the group may and must be captured, and with forecasts of all its volumes.
    pub fn pace(&self, config: &PlannerConfig, now: UnixNanos) -> Option<Pace> {
        let schedule = self.schedule(config);
        let bin = config.scale.bin_nanos();
        let open = (schedule.earliest..schedule.latest).contains(&now);
        // What was known some bins ago says nothing of now, and a first layer is not to wait.
        let stale = |f: &&QuantileForecast| now.saturating_sub(f.issued_at) > 2 * bin;
        let asked = self.spec.prediction_enabled && self.last_capture.is_some();
        if !asked || !open || self.forecasts.is_empty() || self.forecasts.iter().any(stale) {
            return None;
        }
        let bins = |span: i64| usize::try_from(span / bin).unwrap_or(0);
        let (kind, _) = self.kind(config, now, false);
        let pace = Pace {
            later: bins(schedule.latest - now),
            passed: bins(now - schedule.earliest),
            length: bins(nanos(self.takes(kind)).saturating_add(bin - 1)).max(1),
        };
        // Intervals of fewer starts were not trained on, and with the last start there is no choice.
        let starts = pace.passed + pace.later + 1;
        (pace.later > 0 && starts >= LEAST_STARTS).then_some(pace)
    }

    fn takes(&self, kind: CaptureKind) -> Duration {
        match kind {
            CaptureKind::Baseline => self.baseline_takes,
            CaptureKind::Differential => self.differential_takes,
        }
    }

    /// Whether a baseline is due, and the forecast leaves it time or it cannot wait for that.
    fn kind(&self, config: &PlannerConfig, now: UnixNanos, urgent: bool) -> (CaptureKind, String) {
        let Some(last) = self.last_baseline else {
            return (CaptureKind::Baseline, "there is no baseline yet".to_owned());
        };
        let age = now.saturating_sub(last);
        let every = nanos(config.baseline_every);
        if age >= every && !urgent {
            let end = now.saturating_add(nanos(self.baseline_takes));
            if self.quiet_until(now, end, config) {
                let reason = "the baseline is old and a long quiet time is expected";
                return (CaptureKind::Baseline, reason.to_owned());
            }
            if age >= every.saturating_mul(2) {
                let reason = "the baseline is very old".to_owned();
                return (CaptureKind::Baseline, reason);
            }
        }
        (CaptureKind::Differential, String::new())
    }

    /// The forecasts of all that is on the disks; empty unless every volume of the group has one.
    fn loads(&self) -> Vec<&QuantileForecast> {
        match self.forecasts.is_empty() {
            true => Vec::new(),
            false => [&*self.forecasts, &*self.neighbours].concat(),
        }
    }

    /// Whether the upper quantile stays below the usual load until `end`.
    fn quiet_until(&self, now: UnixNanos, end: UnixNanos, config: &PlannerConfig) -> bool {
        let loads = self.loads();
        let level = self.median.max(config.idle * loads.len() as f64);
        let bin = config.scale.bin_nanos();
        let mut at = now;
        while at < end {
            match expected_load(&loads, at) {
                Some(load) if load <= level && !loads.is_empty() => at += bin,
                _ => return false,
            }
        }
        true
    }
}

/// Decides about one group at `now`.
pub fn plan(view: &GroupView<'_>, config: &PlannerConfig, now: UnixNanos) -> Intent {
    let schedule = view.schedule(config);
    if now >= schedule.latest {
        return forced(view, config, now, schedule);
    }
    let wait = |waiting, window, reason: String| Intent::Wait {
        waiting,
        window,
        reason,
    };
    if !view.spec.prediction_enabled {
        if view.last_capture.is_none() && view.burst_on.is_none() {
            let reason = "there is no baseline yet (prediction is off)".to_owned();
            return start(view, CaptureKind::Baseline, false, now, reason);
        }
        let reason = format!(
            "prediction is off: next capture by the RPO schedule in {}",
            Span(schedule.latest - now)
        );
        return wait(Waiting::Fresh, None, reason);
    }
    let (kind, why_kind) = view.kind(config, now, false);
    let loads = view.loads();
    let window = quietest(
        &loads,
        config.scale,
        now.max(schedule.earliest),
        schedule.latest,
        view.takes(kind),
        config.waiting_pays,
    );
    if now < schedule.earliest {
        let reason = match &window {
            Some(w) => format!(
                "the newest layer is fresh; the quietest window starts in {}",
                Span(w.start - now)
            ),
            None => "the newest layer is fresh".to_owned(),
        };
        return wait(Waiting::Fresh, window, reason);
    }
    if let Some(volume) = view.burst_on {
        return wait(
            Waiting::Burst,
            None,
            format!(
                "{volume} is in a burst; {} left",
                Span(schedule.latest - now)
            ),
        );
    }
    let end = now.saturating_add(nanos(view.takes(kind)));
    if let Some(p) = onset_until(view, config, now, end) {
        let reason = format!("a burst is expected within the capture (probability {p:.2})");
        return wait(Waiting::BurstExpected, None, reason);
    }
    let Some(window) = window else {
        return without_forecast(view, config, now, schedule, kind, &why_kind);
    };
    if let Some(judged) = view.begin.filter(|judged| !judged.begin) {
        let reason = format!(
            "a quieter moment is likely to come ({judged}); {} left",
            Span(schedule.latest - now)
        );
        let window = Some(window).filter(|w| w.start > now);
        return wait(Waiting::QuieterAhead, window, reason);
    }
    if view.begin.is_none() && window.start > now {
        let reason = format!(
            "a quieter window starts in {}: {} expected there, {} now (q0.8)",
            Span(window.start - now),
            Rate(window.load),
            Rate(window.load_at_once)
        );
        return wait(Waiting::QuieterAhead, Some(window), reason);
    }
    let allowed = expected_load(&loads, now)
        .map(|load| load * config.load_check)
        .unwrap_or(0.0)
        .max(config.idle * loads.len() as f64);
    if let Some(observed) = view.observed
        && observed > allowed
    {
        let reason = format!(
            "the predicted window is here, but the last load is {}, above {}",
            Rate(observed),
            Rate(allowed)
        );
        return wait(Waiting::LoadAboveForecast, Some(window), reason);
    }
    let why = match view.begin {
        Some(judged) => format!(
            "no quieter moment is likely before the deadline in {} ({judged})",
            Span(schedule.deadline - now)
        ),
        None => format!(
            "predicted quiet window: {} expected (q0.8), no quieter one before the deadline in {}",
            Rate(window.load),
            Span(schedule.deadline - now)
        ),
    };
    let reason = join(&why_kind, &why);
    start(view, kind, false, now, reason)
}

fn start(
    view: &GroupView<'_>,
    kind: CaptureKind,
    urgent: bool,
    now: UnixNanos,
    reason: String,
) -> Intent {
    Intent::Capture {
        kind,
        urgent,
        until: now.saturating_add(nanos(view.takes(kind))),
        reason,
    }
}

/// The RPO leaves no choice.
fn forced(
    view: &GroupView<'_>,
    config: &PlannerConfig,
    now: UnixNanos,
    schedule: Schedule,
) -> Intent {
    let (kind, why_kind) = view.kind(config, now, true);
    let left = schedule.deadline - now;
    let deadline = if !view.spec.prediction_enabled {
        "the RPO schedule is due (prediction is off)".to_owned()
    } else if left >= 0 {
        format!("the RPO deadline is in {}", Span(left))
    } else {
        format!("the RPO was missed {} ago", Span(-left))
    };
    let burst = match view.burst_on {
        Some(volume) => format!("although {volume} is in a burst"),
        None => String::new(),
    };
    let reason = join(&why_kind, &[deadline, burst].join(" "));
    start(view, kind, true, now, reason.trim_end().to_owned())
}

/// Without a forecast a capture starts when the observed load is not above the usual.
fn without_forecast(
    view: &GroupView<'_>,
    config: &PlannerConfig,
    now: UnixNanos,
    schedule: Schedule,
    kind: CaptureKind,
    why_kind: &str,
) -> Intent {
    let usual = view
        .median
        .max(config.idle * (view.spec.volumes.len() + view.neighbours.len()) as f64);
    match view.observed {
        Some(load) if load > usual => Intent::Wait {
            waiting: Waiting::NoForecast,
            window: None,
            reason: format!(
                "no forecast covers the window and the load is {}, above the usual {}; {} left",
                Rate(load),
                Rate(usual),
                Span(schedule.latest - now)
            ),
        },
        _ => {
            let reason = join(
                why_kind,
                "no forecast yet, and no load is observed above the usual",
            );
            start(view, kind, false, now, reason)
        }
    }
}

/// The probability that a burst begins on any volume until `end`, if it is alarming.
fn onset_until(
    view: &GroupView<'_>,
    config: &PlannerConfig,
    now: UnixNanos,
    end: UnixNanos,
) -> Option<f64> {
    let none: f64 = view
        .forecasts
        .iter()
        .filter_map(|f| {
            let from = f.bin_at(now)?;
            let to = f.bin_at(end).unwrap_or(f.rows.len());
            Some(1.0 - f.onset_within(from, to + 1))
        })
        .product();
    let any = 1.0 - none;
    (any >= config.staging.alarm).then_some(any)
}

/// When the volume's forecast is lowest: for status.
pub fn lowest_bin(forecast: &QuantileForecast, from: UnixNanos) -> Option<usize> {
    (0..forecast.rows.len())
        .filter(|h| forecast.start_of(*h) >= from)
        .min_by(|a, b| forecast.rows[*a][Q80].total_cmp(&forecast.rows[*b][Q80]))
}

fn join(first: &str, second: &str) -> String {
    if first.is_empty() {
        second.to_owned()
    } else {
        format!("{first}; {second}")
    }
}

/// A time span in nanoseconds, written for people.
pub(super) struct Span(pub(super) i64);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0 as f64 / 1e9;
        match seconds {
            s if s < 120.0 => write!(f, "{s:.1} s"),
            s if s < 7_200.0 => write!(f, "{:.0} min", s / 60.0),
            s => write!(f, "{:.1} h", s / 3_600.0),
        }
    }
}

/// A load in bytes per second, written for people.
pub(super) struct Rate(pub(super) f64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kib = self.0 / 1024.0;
        if kib < 1024.0 {
            write!(f, "{kib:.1} KiB/s")
        } else {
            write!(f, "{:.1} MiB/s", kib / 1024.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::window_gate::Starter;
    use crate::model::{Member, TimeScale};
    use crate::plan::types::Criticality;

    const S: i64 = 1_000_000_000;

    fn config() -> PlannerConfig {
        PlannerConfig::new(TimeScale::new(Duration::from_secs(10), 24).unwrap())
    }

    fn spec(prediction: bool) -> GroupSpec {
        GroupSpec {
            name: "g".into(),
            volumes: vec!["v".into()],
            prediction_enabled: prediction,
            rpo: Duration::from_secs(100),
            max_pause: Duration::from_millis(100),
            p99_target: None,
            app: None,
            criticality: Criticality::Normal,
        }
    }

    fn forecast(loads: &[f32]) -> QuantileForecast {
        QuantileForecast {
            issued_at: 0,
            bin: Duration::from_secs(10),
            rows: loads.iter().map(|l| [*l; 6]).collect(),
            onset: vec![0.0; loads.len()],
            burst_threshold: f64::INFINITY,
            member: Member::Ewma,
        }
    }

    fn view<'a>(spec: &'a GroupSpec, forecasts: Vec<&'a QuantileForecast>) -> GroupView<'a> {
        GroupView {
            spec,
            created_at: -1000 * S,
            last_capture: Some(0),
            last_baseline: Some(0),
            differential_takes: Duration::from_secs(2),
            baseline_takes: Duration::from_secs(10),
            forecasts,
            neighbours: Vec::new(),
            observed: Some(0.0),
            median: 1e6,
            burst_on: None,
            begin: None,
        }
    }

    fn judged(log_odds: f32) -> Option<Judgement> {
        Some(Judgement {
            begin: log_odds > 0.0,
            by: Starter::Network,
            log_odds,
        })
    }

    const HIGH: f32 = 1e8;
    const LOW: f32 = 1e6;

    #[test]
    fn it_waits_for_the_quieter_window_then_captures_in_it() {
        let spec = spec(true);
        let mut loads = vec![HIGH; 20];
        loads[7] = LOW;
        let f = forecast(&loads);
        let v = view(&spec, vec![&f]);
        let Intent::Wait {
            waiting, window, ..
        } = plan(&v, &config(), 55 * S)
        else {
            panic!()
        };
        assert_eq!(waiting, Waiting::QuieterAhead);
        assert_eq!(window.unwrap().start, 70 * S);
        let Intent::Capture { kind, urgent, .. } = plan(&v, &config(), 70 * S) else {
            panic!()
        };
        assert_eq!((kind, urgent), (CaptureKind::Differential, false));
    }

    #[test]
    fn a_network_that_says_when_to_begin_is_followed() {
        let spec = spec(true);
        let mut loads = vec![HIGH; 20];
        loads[7] = LOW;
        let f = forecast(&loads);
        let mut v = view(&spec, vec![&f]);
        assert_eq!(v.pace(&config(), 55 * S), None, "five starts are too few");
        let mut long = spec.clone();
        long.rpo = Duration::from_secs(200);
        let mut fresh = f.clone();
        fresh.issued_at = 110 * S;
        let mut w = view(&long, vec![&fresh]);
        let pace = w.pace(&config(), 120 * S).unwrap();
        assert_eq!((pace.length, pace.passed), (1, 2));
        assert_eq!(w.pace(&config(), 90 * S), None, "the layer is fresh");
        assert_eq!(w.pace(&config(), 140 * S), None, "what is known is old");
        w.last_capture = None;
        assert_eq!(
            w.pace(&config(), 120 * S),
            None,
            "a first layer does not wait"
        );
        v.begin = judged(1.0);
        assert!(matches!(
            plan(&v, &config(), 55 * S),
            Intent::Capture { .. }
        ));
        v.begin = judged(-1.0);
        assert!(matches!(
            plan(&v, &config(), 70 * S),
            Intent::Wait {
                waiting: Waiting::QuieterAhead,
                window: None,
                ..
            }
        ));
        let Intent::Capture { urgent, .. } = plan(&v, &config(), 95 * S) else {
            panic!()
        };
        assert!(urgent);
    }

    #[test]
    fn the_last_check_puts_a_capture_off_until_the_deadline() {
        let spec = spec(true);
        let f = forecast(&[LOW; 20]);
        let mut v = view(&spec, vec![&f]);
        v.observed = Some(1e8);
        assert!(matches!(
            plan(&v, &config(), 60 * S),
            Intent::Wait {
                waiting: Waiting::LoadAboveForecast,
                ..
            }
        ));
        assert!(matches!(
            plan(&v, &config(), 95 * S),
            Intent::Capture { urgent: true, .. }
        ));
    }

    #[test]
    fn a_burst_forbids_a_capture_unless_the_rpo_forces_it() {
        let spec = spec(true);
        let f = forecast(&[LOW; 20]);
        let volume: VolumeName = "v".into();
        let mut v = view(&spec, vec![&f]);
        v.burst_on = Some(&volume);
        assert!(matches!(
            plan(&v, &config(), 60 * S),
            Intent::Wait {
                waiting: Waiting::Burst,
                ..
            }
        ));
        let Intent::Capture { reason, urgent, .. } = plan(&v, &config(), 95 * S) else {
            panic!()
        };
        assert!(
            urgent && reason.contains("in a burst") && reason.contains("RPO"),
            "{reason}"
        );
    }

    #[test]
    fn an_expected_burst_is_waited_out() {
        let spec = spec(true);
        let mut f = forecast(&[LOW; 20]);
        f.onset[6] = 0.9;
        let v = view(&spec, vec![&f]);
        assert!(matches!(
            plan(&v, &config(), 62 * S),
            Intent::Wait {
                waiting: Waiting::BurstExpected,
                ..
            }
        ));
    }

    #[test]
    fn without_prediction_the_schedule_decides() {
        let spec = spec(false);
        let v = view(&spec, vec![]);
        assert!(matches!(plan(&v, &config(), 60 * S), Intent::Wait { .. }));
        let Intent::Capture { reason, .. } = plan(&v, &config(), 95 * S) else {
            panic!()
        };
        assert!(reason.contains("prediction is off"), "{reason}");
    }

    #[test]
    fn baselines_come_first_and_are_renewed_in_long_quiet_times() {
        let spec = spec(true);
        let f = forecast(&[LOW / 2.0; 20]);
        let mut v = view(&spec, vec![&f]);
        v.last_baseline = None;
        v.last_capture = None;
        v.created_at = 0;
        assert!(matches!(
            plan(&v, &config(), 0),
            Intent::Capture {
                kind: CaptureKind::Baseline,
                ..
            }
        ));
        let every = nanos(config().baseline_every);
        let mut v = view(&spec, vec![&f]);
        v.last_baseline = Some(60 * S - every);
        assert!(matches!(
            plan(&v, &config(), 60 * S),
            Intent::Capture {
                kind: CaptureKind::Baseline,
                ..
            }
        ));
        let busy = forecast(&[HIGH; 20]);
        let mut v = view(&spec, vec![&busy]);
        v.last_baseline = Some(60 * S - every);
        assert!(matches!(
            plan(&v, &config(), 60 * S),
            Intent::Capture {
                kind: CaptureKind::Differential,
                ..
            }
        ));
    }

    #[test]
    fn the_schedule_leaves_room_for_the_capture_and_the_tick() {
        let spec = spec(true);
        let v = view(&spec, vec![]);
        let s = v.schedule(&config());
        assert_eq!(s.deadline, 100 * S);
        assert!(s.latest <= 98 * S - 2 * nanos(config().tick));
        assert!(s.earliest <= s.latest);
    }
}
