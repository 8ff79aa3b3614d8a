//! Raw outputs of the forecasters and of the window choice over a recorded history, so that anyone
//! can score them with a program of their own.
//!
//! Bins are handed to the same [`Forecaster`] as in the agent when they end, all volumes together in
//! the order of time, and an output is made from what was handed over: looking ahead is impossible.
//! Before the first output wanted the forecaster runs along as it would in an agent, so that its
//! choices have the evidence they would have there.

use std::collections::BTreeMap;
use std::time::Duration;

use super::simulate::{Trainer, VolumeHistory};
use super::types::{ExternalEvent, nanos};
use super::window::quietest;
use crate::model::{Forecaster, Pace, QuantileForecast, TimeScale, VolumeName};
use crate::seam::UnixNanos;

/// Seasons before the first output wanted in which forecasts are made for the forecaster's own evidence.
const WARM_UP_SEASONS: i64 = 10;

/// How the forecaster is run along.
#[derive(Clone, Copy)]
pub struct Course<'a> {
    /// Bin and season.
    pub scale: TimeScale,
    /// The first moment of which an output is wanted.
    pub from: UnixNanos,
    /// How a network is trained; without, none is.
    pub trainer: Option<&'a Trainer<'a>>,
    /// Time between two trainings; the first is at `from`.
    pub train_every: Duration,
    /// Events from outside with the time they arrived, ascending.
    pub events: &'a [(UnixNanos, ExternalEvent)],
}

/// Takes every volume whose history has begun and not ended, at the end of every bin, once the forecaster
/// needs to be run along.
type Step<'a> = dyn FnMut(&mut dyn Forecaster, &VolumeName, UnixNanos) + 'a;

fn replay(
    volumes: &[VolumeHistory],
    course: Course<'_>,
    forecaster: &mut dyn Forecaster,
    step: &mut Step<'_>,
) {
    let scale = course.scale;
    let range = |v: &VolumeHistory| {
        let first = scale.index_of(v.start);
        (first, first + v.bins.len() as i64)
    };
    let first = volumes.iter().map(|v| range(v).0).min().unwrap_or(0);
    let end = volumes.iter().map(|v| range(v).1).max().unwrap_or(0);
    let mut train_at = course.from;
    let mut events = course.events.iter().peekable();
    let warm = course
        .from
        .saturating_sub(nanos(scale.season()).saturating_mul(WARM_UP_SEASONS));
    for index in first..end {
        let now = scale.start_of(index + 1);
        let live = volumes.iter().filter(|v| {
            let (first, end) = range(v);
            (first..end).contains(&index)
        });
        for volume in live.clone() {
            let at = usize::try_from(index - range(volume).0).unwrap_or(usize::MAX);
            let load = volume.bins.get(at).copied().flatten();
            // A value that is no load is left out, as in the agent.
            let _ = forecaster.observe(&volume.name, scale.start_of(index), load);
        }
        while let Some((_, event)) = events.next_if(|(arrived, _)| *arrived <= now) {
            let happening = event.happening();
            for volume in volumes.iter().filter(|v| happening.concerns(&v.name)) {
                forecaster.happening(&volume.name, &happening);
            }
        }
        if let Some(trainer) = course.trainer.filter(|_| now >= train_at) {
            train_at = now.saturating_add(nanos(course.train_every).max(1));
            // Too little history trains nothing; the other members serve.
            if let Ok(trained) = trainer(&forecaster.dataset()) {
                let _ = forecaster.install(&trained);
            }
        }
        if now >= warm {
            live.for_each(|volume| step(forecaster, &volume.name, now));
        }
    }
}

/// Whether `now` is a multiple of `every`, counted from the Unix epoch.
fn due(now: UnixNanos, every: Duration) -> bool {
    now.rem_euclid(nanos(every).max(1)) == 0
}

fn bins(scale: TimeScale, length: Duration) -> usize {
    usize::try_from(nanos(length).div_euclid(scale.bin_nanos())).unwrap_or(usize::MAX)
}

/// The forecasts of the load issued `every` so often.
pub fn load(
    volumes: &[VolumeHistory],
    course: Course<'_>,
    forecaster: &mut dyn Forecaster,
    horizon: Duration,
    every: Duration,
    take: &mut dyn FnMut(&VolumeName, QuantileForecast),
) {
    let horizon = bins(course.scale, horizon).max(1);
    replay(
        volumes,
        course,
        forecaster,
        &mut |forecaster, volume, now| {
            if due(now, every)
                && let Some(forecast) = forecaster.forecast(volume, horizon)
                && now >= course.from
            {
                take(volume, forecast);
            }
        },
    );
}

/// One answer to "will a burst begin".
#[derive(Clone, Debug, PartialEq)]
pub struct BurstAnswer {
    /// The volume.
    pub volume: VolumeName,
    /// The end of the last bin known.
    pub issued_at: UnixNanos,
    /// The probability that a burst begins between `lead` and `lead + window` from then.
    pub probability: f64,
}

/// At the end of every bin the probability that a burst begins in the `window` that opens after
/// `lead`.
pub fn bursts(
    volumes: &[VolumeHistory],
    course: Course<'_>,
    forecaster: &mut dyn Forecaster,
    lead: Duration,
    window: Duration,
    take: &mut dyn FnMut(BurstAnswer),
) {
    let from = bins(course.scale, lead);
    let to = from.saturating_add(bins(course.scale, window).max(1));
    replay(
        volumes,
        course,
        forecaster,
        &mut |forecaster, volume, now| {
            if let Some(forecast) = forecaster.forecast(volume, to)
                && now >= course.from
            {
                take(BurstAnswer {
                    volume: volume.clone(),
                    issued_at: forecast.issued_at,
                    probability: forecast.onset_within(from, to),
                });
            }
        },
    );
}

/// A window chosen for a capture. It is chosen when it begins.
#[derive(Clone, Debug, PartialEq)]
pub struct WindowAnswer {
    /// The volume.
    pub volume: VolumeName,
    /// The interval in which one capture was to be made.
    pub interval_start: UnixNanos,
    /// When it would begin.
    pub window_start: UnixNanos,
    /// Who chose it.
    pub member: &'static str,
}

/// In every `interval` (counted from the Unix epoch) one capture of `length`, begun as the agent begins it:
/// at the end of each bin it is decided, by what is known then, whether to begin or to wait.
pub fn windows(
    volumes: &[VolumeHistory],
    course: Course<'_>,
    forecaster: &mut dyn Forecaster,
    interval: Duration,
    length: Duration,
    take: &mut dyn FnMut(WindowAnswer),
) {
    let scale = course.scale;
    let window = bins(scale, length).max(1);
    let starts = bins(scale, interval).saturating_sub(window) + 1;
    // Intervals in which no capture has begun yet.
    let mut open: BTreeMap<VolumeName, UnixNanos> = BTreeMap::new();
    replay(
        volumes,
        course,
        forecaster,
        &mut |forecaster, volume, now| {
            if due(now, interval) {
                open.insert(volume.clone(), now);
            }
            let Some(interval_start) = open.get(volume).copied() else {
                return;
            };
            let passed = usize::try_from((now - interval_start) / scale.bin_nanos()).unwrap_or(0);
            let pace = Pace {
                later: (starts - 1).saturating_sub(passed),
                passed,
                length: window,
            };
            let (begin, member) = begins(forecaster, scale, volume, pace, now);
            if begin {
                open.remove(volume);
                if interval_start >= course.from {
                    take(WindowAnswer {
                        volume: volume.clone(),
                        interval_start,
                        window_start: now,
                        member,
                    });
                }
            }
        },
    );
}

/// Whether to begin now, and who says so.
fn begins(
    forecaster: &mut dyn Forecaster,
    scale: TimeScale,
    volume: &VolumeName,
    pace: Pace,
    now: UnixNanos,
) -> (bool, &'static str) {
    if pace.later == 0 {
        return (true, "last");
    }
    if let Some(judged) = forecaster.begin(std::slice::from_ref(volume), &[], pace) {
        return (judged.begin, judged.by.as_str());
    }
    let at = |bins: usize| scale.bin_nanos().saturating_mul(bins as i64);
    let length = Duration::from_nanos(at(pace.length).unsigned_abs());
    let forecast = forecaster.forecast(volume, pace.later + pace.length);
    let best = forecast.and_then(|f| {
        quietest(
            &[&f],
            scale,
            now,
            now.saturating_add(at(pace.later)),
            length,
            0.0,
        )
    });
    (best.is_none_or(|window| window.start <= now), "forecast")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::LoadBin;
    use crate::model::mixture::{Mixture, MixtureConfig};
    use crate::model::weights::prior;

    const BIN: i64 = 10_000_000_000;
    const DAY: usize = 48;
    const DAYS: usize = 14;
    /// From here on the altered history is another one.
    const CUT: usize = 11 * DAY + 17;

    fn scale() -> TimeScale {
        TimeScale::new(Duration::from_secs(10), DAY).unwrap()
    }

    fn history(altered: bool) -> Vec<VolumeHistory> {
        let bins = (0..DAYS * DAY)
            .map(|i| {
                let noise = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 44;
                let burst = if i % 13 < 2 { 100.0 } else { 1.0 };
                let load = match altered && i >= CUT {
                    true => 1e9 * (1.0 + (i % 5) as f64),
                    false => 1e4 * burst * (1.0 + (noise % 1000) as f64 / 1e3),
                };
                Some(LoadBin {
                    read_bytes: load,
                    ..LoadBin::default()
                })
            })
            .collect();
        vec![VolumeHistory {
            name: "v".into(),
            start: 0,
            bins,
        }]
    }

    fn course() -> Course<'static> {
        Course {
            scale: scale(),
            from: 8 * DAY as i64 * BIN,
            trainer: None,
            train_every: Duration::from_secs(1),
            events: &[],
        }
    }

    fn forecaster() -> Mixture {
        let mut mixture = Mixture::new(MixtureConfig::new(scale()));
        if let Ok(prior) = prior() {
            let _ = mixture.set_prior(&prior);
        }
        mixture
    }

    fn windows_of(altered: bool) -> Vec<WindowAnswer> {
        let mut answers = Vec::new();
        let (interval, length) = (Duration::from_secs(240), Duration::from_secs(20));
        windows(
            &history(altered),
            course(),
            &mut forecaster(),
            interval,
            length,
            &mut |answer| answers.push(answer),
        );
        answers
    }

    #[test]
    fn nothing_issued_before_a_time_depends_on_what_came_after_it() {
        let at = CUT as i64 * BIN;
        let loads = |altered| {
            let mut all = Vec::new();
            let (horizon, every) = (Duration::from_secs(120), Duration::from_secs(30));
            load(
                &history(altered),
                course(),
                &mut forecaster(),
                horizon,
                every,
                &mut |_, forecast| all.push(forecast),
            );
            all
        };
        let before = |all: Vec<QuantileForecast>| -> Vec<QuantileForecast> {
            all.into_iter().filter(|f| f.issued_at <= at).collect()
        };
        let (a, b) = (loads(false), loads(true));
        assert_ne!(a, b);
        let (a, b) = (before(a), before(b));
        assert!(a.len() > 20);
        assert_eq!(a, b);

        let answers = |altered| {
            let mut all = Vec::new();
            let (lead, window) = (Duration::from_secs(10), Duration::from_secs(60));
            bursts(
                &history(altered),
                course(),
                &mut forecaster(),
                lead,
                window,
                &mut |answer| all.push(answer),
            );
            all.retain(|answer: &BurstAnswer| answer.issued_at <= at);
            all
        };
        assert!(answers(false).len() > 100);
        assert_eq!(answers(false), answers(true));

        // A window is issued when it begins.
        let begun = |altered| {
            let mut all = windows_of(altered);
            all.retain(|answer| answer.window_start <= at);
            all
        };
        assert!(begun(false).len() > 4);
        assert_eq!(begun(false), begun(true));
    }

    #[test]
    fn every_interval_has_one_window_wholly_inside() {
        let answers = windows_of(false);
        assert_eq!(answers.len(), (DAYS - 8) * 2);
        for (nth, answer) in answers.iter().enumerate() {
            let start = (8 * DAY as i64 + nth as i64 * 24) * BIN;
            assert_eq!(answer.interval_start, start);
            assert!((start..=start + 22 * BIN).contains(&answer.window_start));
        }
    }
}
